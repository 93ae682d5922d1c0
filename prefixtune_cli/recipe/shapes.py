"""The shapes of well-known base models, from their config.json, so that a run can be planned without a network.

`assets/shapes.json` has them by hub id. A test builds each on the meta device and counts its parameters.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

SHAPES = Path(str(files("prefixtune_cli"))) / "assets" / "shapes.json"


def shape(hub_id: str) -> dict[str, Any] | None:
    """The configuration's numbers, `model_type` among them; None if they are not known here."""
    found = _shapes().get(hub_id.lower())
    return None if found is None else dict(found)


@cache
def _shapes() -> dict[str, dict[str, Any]]:
    entries = json.loads(SHAPES.read_text(encoding="utf-8"))
    return {hub_id.lower(): entry["config"] for entry in entries for hub_id in entry["hub_ids"]}
