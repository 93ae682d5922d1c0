"""The shapes of well-known base models, from their config.json, so that a run can be planned without a network.

`assets/shapes.json` has them by hub id. A test builds each on the meta device and counts its parameters.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


def shape(hub_id: str) -> dict[str, Any] | None:
    """The configuration's numbers, `model_type` among them; None if they are not known here."""
    found = _shapes().get(hub_id.lower())
    return None if found is None else dict(found["config"])


def known_shapes() -> dict[str, str]:
    """Every hub id whose shape is known, and how many parameters the model has, as in 7.2B."""
    return {hub_id: entry["parameters"] for entry in _entries() for hub_id in entry["hub_ids"]}


@cache
def _entries() -> list[dict[str, Any]]:
    text = (files("prefixtune_cli") / "assets" / "shapes.json").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = json.loads(text)
    return entries


@cache
def _shapes() -> dict[str, dict[str, Any]]:
    return {hub_id.lower(): entry for entry in _entries() for hub_id in entry["hub_ids"]}
