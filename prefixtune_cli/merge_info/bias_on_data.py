"""The paper's analysis on real queries: how many directions the bias of an adapter has, and how large it is.

The spectrum of the bias's covariance shows how many directions the bias uses. The more slowly its eigenvalues fall, the
more an adapter can express; for Prefix-Tuning they fall at once (arXiv 2506.13674). The size of the bias, relative to
attention's own output and by position, shows whether a long input drowns it. That happens to a prefix, which shares one
softmax with the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PrefixTuningConfig

from prefixtune_cli import model as models
from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.adapter_folder import check_fits, load_adapter
from prefixtune_cli.data.load import evenly_spread, load_rows
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.errors import ResourceError, UsageError
from prefixtune_cli.merge_info.bias import (
    FIRST,
    Biases,
    Sums,
    bucket_range,
    buckets,
    observed,
)
from prefixtune_cli.merge_info.matrices import effective_rank
from prefixtune_cli.merge_info.plots import draw_by_position, draw_spectra
from prefixtune_cli.merge_info.saved_adapter import SavedAdapter
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import DataSection, ModelSection
from prefixtune_cli.tokenizer import check_base, check_data, load_tokenizer

Table = tuple[str, list[str], list[list[str]]]
DEFINITIONS = {
    "bias": "prefix-tuning-plus: φ(q)ᵀM; prefix-tuning: attention's output with the prefix less its output "
    "without it, of the same queries, keys and values",
    "spectrum": "eigenvalues of each head's (at an FFN: block's) covariance as shares of their sum, averaged over the "
    "heads",
    "effective_rank": "exp of the entropy of the spectrum",
    "ratio": "root mean square of the bias's norm over that of the output it is added to, all heads together",
}


@dataclass(frozen=True)
class OnData:
    """The result of the analysis.

    Attributes:
        data: the rows that it was made on: their source and number, and their length in tokens.
        written: the pictures.
    """

    data: dict[str, Any]
    adapters: list[Biases]
    written: list[Path]

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "definitions": DEFINITIONS,
            "adapters": [biases.to_json() for biases in self.adapters],
        }

    @property
    def tables(self) -> list[Table]:
        """Two tables, each as title, columns and rows: the spectra, and the sizes by position."""
        return [_spectra(self.adapters), _sizes(self.adapters)]


def analyse(
    who: Sequence[SavedAdapter], data: str, *, rows: int, out: Path, reporter: Reporter
) -> OnData:
    """Run the base with each adapter on the data, and measure the biases that the adapter adds.

    Args:
        who: adapters of the first one's base. Those of Prefix-Tuning+ and Prefix-Tuning are analysed; the others are
            left out with a warning.
        data: in any format of `ptp train`. It is read with the settings of the first run among the adapters.
        rows: how many to use, evenly spread over the data.
        out: the folder for the pictures.
        reporter: is told what is done.

    Raises:
        UsageError: no adapter is of a method that has such a bias, or the first one names no base.
        AdapterError: an adapter does not fit the base.
        DataError: the data is missing or wrong.
        ModelError, ResourceError: the base cannot be loaded, or the pictures cannot be written.
    """
    model, names = who[0].base, _names(who)
    chosen = [
        (name, one)
        for name, one in zip(names, who, strict=True)
        if isinstance(one.config, PrefixTuningPlusConfig | PrefixTuningConfig)
    ]
    if not chosen:
        raise UsageError(
            "--data shows the bias that Prefix-Tuning+ or Prefix-Tuning adds to attention, and no adapter given is of "
            f"these methods ({', '.join(names)}). Leave --data out."
        )
    for name in sorted(set(names) - {name for name, _ in chosen}):
        reporter.warning(
            f"{name} is left out of the analysis on data: its method adds no such bias."
        )
    check_base(model)
    for _, one in chosen:
        check_fits(model, one.folder)
    reading = next((one.reading for one in who if one.run is not None), DataSection())
    reading = reading.model_copy(update={"train_on": "all"})
    examples, about = _examples(data, reading, rows, model, chosen[0][1].folder, reporter)

    if model.attention not in (
        "auto",
        "sdpa",
        "eager",
    ):  # others cannot cut their masks, or compute in float32
        model = model.model_copy(update={"attention": "auto"})
    models.tell_loading(model, reporter)
    base = models.load_base(model).eval()
    found = []
    for name, one in chosen:
        adapted = load_adapter(base, one.folder).eval()
        is_prefix = isinstance(one.config, PrefixTuningConfig)
        with observed(adapted, one.config.num_virtual_tokens if is_prefix else None) as layers:
            for done, ids in enumerate(examples):
                adapted(input_ids=torch.tensor([ids], device=base.device))
                reporter.progress(f"biases of {name}", done + 1, len(examples), {})
        models.detach(adapted)
        found.append(Biases(name, one.method, one.folder, layers))
    return OnData(about, found, _draw(found, out))


def _names(who: Sequence[SavedAdapter]) -> list[str]:
    """The names of the runs or folders; where two are the same, what was typed for each."""
    names = [one.name for one in who]
    return names if len(set(names)) == len(names) else [one.given for one in who]


def _examples(
    data: str,
    section: DataSection,
    limit: int,
    model: ModelSection,
    adapter: Path,
    reporter: Reporter,
) -> tuple[list[list[int]], dict[str, Any]]:
    """The token ids of the chosen rows, and `data` of the result."""
    loaded = load_rows(data, section)
    total = len(loaded)
    if limit < total:
        loaded = loaded.select(evenly_spread(total, limit))
    tokenizer = load_tokenizer(model, adapter)
    tokenized = tokenize(loaded, tokenizer, section)
    check_data(model, tokenizer, tokenized)
    for notice in (*loaded.notices, *tokenized.notices):
        reporter.notice(notice)
    examples = cast(list[list[int]], tokenized.dataset.with_format(None)["input_ids"][:])
    about = {
        "source": loaded.source,
        "rows": total,
        "analysed": len(examples),
        "tokens": sum(map(len, examples)),
        "longest": max(map(len, examples), default=0),
    }
    return examples, about


def _spectra(adapters: Sequence[Biases]) -> Table:
    rows = []
    layers = [(biases.name, sums) for biases in adapters for sums in biases.layers]
    for name, sums in sorted(layers, key=lambda pair: (pair[1].layer, pair[1].site)):
        shares = sums.eigenvalues()
        told = ["does not vary", *("" for _ in FIRST)]
        if shares:
            firsts = [f"{100 * sum(shares[:n]):.1f} %" for n in FIRST]
            told = [f"{effective_rank(shares):.1f} of {len(shares)}", *firsts]
        rows.append([_place(sums), name, *told])
    heads = ["effective rank", "first eigenvalue", *(f"first {n}" for n in FIRST[1:])]
    return "Spectrum of the bias's covariance", ["layer", "adapter", *heads], rows


def _sizes(adapters: Sequence[Biases]) -> Table:
    numbers = buckets(adapters)
    rows = [
        [
            _place(sums),
            biases.name,
            f"{100 * sums.ratio():.1f} %",
            *(f"{100 * sums.ratio(n):.1f} %" if n in sums.squares else "" for n in numbers),
        ]
        for biases in adapters
        for sums in biases.layers
    ]
    title = "Size of the bias in per cent of the output it is added to, by position"
    ranges = [f"{start}–{end}" for start, end in map(bucket_range, numbers)]
    return title, ["layer", "adapter", "all", *ranges], rows


def _place(sums: Sums) -> str:
    return str(sums.layer) if sums.site == "attention" else f"{sums.layer} {sums.site}"


def _draw(adapters: Sequence[Biases], out: Path) -> list[Path]:
    written = [out / "bias-spectrum.png", out / "bias-by-position.png"]
    try:
        draw_spectra(written[0], adapters)
        draw_by_position(written[1], adapters)
    except OSError as error:
        raise ResourceError(
            f"The pictures cannot be written to {out} ({error}). Give another folder with --out."
        ) from error
    return written
