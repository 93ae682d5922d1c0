"""The tables and lines that `ptp merge-info` prints on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from prefixtune_cli.cli import console

if TYPE_CHECKING:
    from prefixtune_cli.merge_info.matrices import Cell, Statistics
    from prefixtune_cli.merge_info.one_adapter import Facts
    from prefixtune_cli.merge_info.pairs import Likeness, Pair

SHOWN_FINDINGS = 8
SHOWN_SPARE = 12
NONE = "-"


def print_facts(facts: Sequence[Facts]) -> None:
    """Print the facts of each adapter, one adapter a column; for a single one, also what it has learned."""
    from prefixtune_cli.merge_info.pairs import distinct_names

    columns = [_rows(one) for one in facts]
    rows = []
    for alike in zip(*columns, strict=True):  # so that rows of one kind stand together
        for label in dict.fromkeys(label for group in alike for label in group):
            rows.append([label, *(group.get(label, NONE) for group in alike)])
    console.print_table(["adapter", *distinct_names(facts)], rows, by_column=True)
    for one in facts:
        if one.base_problem is not None:
            told = "its costs in per cent and its keys are not checked"
            console.warning(f"Without the base of {one.adapter.name}, {told}: {one.base_problem}")
    reasons = {one.adapter.method: one.folding for one in facts if not one.folding.possible}
    for method, folding in reasons.items():
        console.say(f"\nWhy {method} does not fold into the base:", style="bold")
        for line in folding.reason:
            console.say(line)
    for one in facts:
        _print_findings(one)
    if len(facts) == 1 and facts[0].learned is not None:
        _print_learned(facts[0], facts[0].learned)
    for note in dict.fromkeys(note for one in facts for note in one.notes):
        console.notice(note)


def print_pairs(pairs: Sequence[Pair]) -> None:
    """Print for every two adapters whether they can be merged, and how alike they are."""
    for pair in pairs:
        console.say(f"\n{pair.first} and {pair.second}", style="bold")
        for line in _verdict(pair):
            console.say(line)
        if pair.whole is not None:
            rows = [
                _likeness_row(str(NONE if one.layer is None else one.layer), one)
                for one in pair.by_layer
            ]
            rows.append(_likeness_row("all", pair.whole))
            console.print_table(["layer", "cosine", "sign conflict", "norm, second/first"], rows)
    if any(pair.prediction for pair in pairs):
        from prefixtune_cli.merge_info.pairs import RULE

        console.notice(RULE)


def print_tables(tables: Sequence[tuple[str, list[str], list[list[str]]]]) -> None:
    """Print tables with their titles."""
    for title, columns, rows in tables:
        console.say(f"\n{title}", style="bold")
        console.print_table(columns, rows)


def _rows(facts: Facts) -> list[dict[str, str]]:
    """Rows as label → text, in groups. Every adapter has the same groups; some may be empty."""
    saved, base, section = facts.adapter, facts.base, facts.adapter.model
    named = NONE if section is None else section.name
    if section is not None and section.revision:
        named += f" at {section.revision}"
    who = {
        "folder": str(saved.folder),
        "base": named if base is None else f"{named} ({base.parameters:,} parameters)",
        "method": saved.method,
    }
    where = {"layers": f"{_ranges(facts.layers)} ({len(facts.layers)})"} if facts.layers else {}
    for site, heads in facts.heads.items():
        where[f"{'blocks' if site == 'ffn' else 'heads'} at {site}"] = str(heads)
    share = (
        "" if base is None else f" ({100 * facts.parameters / base.parameters:.2f} % of the base's)"
    )
    size = {
        "parameters": f"{facts.parameters:,}{share}",
        "on disk": f"{saved.bytes_on_disk:,} bytes, {', '.join(facts.dtypes)}",
    }
    settings = {name: _spelled(value) for name, value in facts.settings.items()}
    made = dict(_run_rows(facts))
    return [
        who,
        settings,
        where,
        size,
        made,
        _folding_rows(facts),
        _cost_rows(facts),
        _check_rows(facts),
    ]


def _run_rows(facts: Facts) -> list[tuple[str, str]]:
    """The run's data, the main settings of its recipe, and its result; empty without a run."""
    recipe, summary = facts.adapter.recipe, facts.adapter.summary
    if recipe is None:
        return []
    rows = [("data", _data(facts.adapter.environment.get("data")) or str(recipe.data.train))]
    if (start := facts.adapter.environment.get("start")) is not None:
        rows.append(("went on from", f"{start['folder']}, sha256 {start['sha256'][:16]}…"))
    train = recipe.train
    passes = f"{train.epochs:g} epochs" if train.max_steps is None else f"{train.max_steps} steps"
    rows.append(
        (
            "recipe",
            f"{passes}, learning rate {train.learning_rate:g} ({train.schedule}), {train.batch_size} rows a step and "
            f"device, max. length {recipe.data.max_length}, {recipe.model.bits} bits, seed {train.seed}",
        )
    )
    losses = [summary.get(who, {}).get("loss") for who in ("base", "adapter")]
    if not summary:
        rows.append(("result", "the run is not finished"))
    elif all(isinstance(loss, float) for loss in losses):
        rows.append(("result", f"held-out loss {losses[0]:.4f} → {losses[1]:.4f}"))
    return rows


def _data(found: Any) -> str:
    training = found.get("train") if isinstance(found, dict) else None
    if not isinstance(training, dict):
        return ""
    return f"{training.get('source')}, {training.get('rows')} rows, sha256 {str(training.get('sha256'))[:16]}…"


def _folding_rows(facts: Facts) -> dict[str, str]:
    found = facts.folding
    if not found.possible:
        return {"folds into the base": "unknown" if found.possible is None else "no"}
    into = ", ".join(f"{name} × {count}" for name, count in found.modules.items())
    rows = {"folds into the base": f"yes: {into}"}
    if found.kinds:
        rows["of these kinds"] = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items())
    return rows


def _cost_rows(facts: Facts) -> dict[str, str]:
    found = facts.costs
    beside = ", until it is folded" if facts.folding.possible else ""
    cache = _number(found.kv_cache_bytes, None)
    if found.kv_cache_tokens:
        cache += f", as {found.kv_cache_tokens} tokens more"
    return {
        "FLOPs a token": _number(found.flops, found.flops_percent) + beside,
        "bytes read a token": _number(found.bytes_read, found.bytes_read_percent) + beside,
        "KV-cache bytes a sequence": cache,
    }


def _number(value: int | None, percent: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" + ("" if percent is None else f" ({percent:.3g} % of the base's)")


def _check_rows(facts: Facts) -> dict[str, str]:
    count = len(facts.findings)
    checked = "values, keys and shapes" if facts.base is not None else "values"
    found = f"{count} finding{'s' * (count > 1)}, below" if count else f"sound ({checked})"
    return {"integrity": found, "sha256": facts.adapter.sha256}


def _print_findings(facts: Facts) -> None:
    for finding in facts.findings[:SHOWN_FINDINGS]:
        console.error(f"{facts.adapter.name}: {finding.text}")
    if (left := len(facts.findings) - SHOWN_FINDINGS) > 0:
        console.error(f"{facts.adapter.name}: and {left} more; --json has them all.")


def _print_learned(facts: Facts, found: Statistics) -> None:
    by_head = bool(facts.heads)
    console.say(
        f"\nWhat it has learned: {'M' if by_head else 'ΔW = B·A·scale'} by layer", style="bold"
    )
    table = _head_table(found) if by_head else _module_table(found)
    console.print_table(*table)
    unit = "heads" if by_head else "modules"
    main = _ranges([layer for layer in found.main_layers if layer is not None])
    held = f"{main or NONE} ({len(found.main_layers)} of {len(found.by_layer)})"
    console.say(f"\nLayers that hold 90 % of the squared norm: {held}")
    spare = [
        _cell_name(cell, by_head=by_head, sites=len(found.columns) > 1) for cell in found.spare
    ]
    shown = ", ".join(spare[:SHOWN_SPARE]) + (
        f" and {len(spare) - SHOWN_SPARE} more" if len(spare) > SHOWN_SPARE else ""
    )
    rule = f"the smallest {unit} that hold under 1 % of the squared norm, all together"
    console.say(
        f"{unit.capitalize()} that could be dropped ({rule}): {shown or 'none'}"
        + (f" ({len(spare)} of {len(found.cells)})" if spare else "")
    )


def _head_table(found: Statistics) -> tuple[list[str], list[list[str]]]:
    sites = len(found.columns) > 1
    columns = [
        "layer",
        "norm",
        "of all",
        "effective rank, mean (range)",
        "of",
        "largest head",
        "smallest head",
    ]
    rows = []
    for layer, site in dict.fromkeys((cell.layer, cell.column) for cell in found.cells):
        cells = [cell for cell in found.cells if (cell.layer, cell.column) == (layer, site)]
        ranks = [cell.effective_rank for cell in cells]
        largest, smallest = max(cells, key=_size), min(cells, key=_size)
        rows.append(
            [
                _layer(layer),
                *([site] if sites else []),
                f"{sum(_size(cell) ** 2 for cell in cells) ** 0.5:.4g}",
                f"{100 * _share(found, cells):.1f} %",
                f"{sum(ranks) / len(ranks):.1f} ({min(ranks):.1f}–{max(ranks):.1f})",
                str(len(largest.spectrum)),
                f"{largest.head} ({largest.norm:.3g})",
                f"{smallest.head} ({smallest.norm:.3g})",
            ]
        )
    return [columns[0], *(["site"] if sites else []), *columns[1:]], rows


def _module_table(found: Statistics) -> tuple[list[str], list[list[str]]]:
    rows = []
    for layer, share in found.by_layer.items():
        cells = {cell.column: cell for cell in found.cells if cell.layer == layer}
        shown = [
            f"{cells[name].norm:.3g} / {cells[name].effective_rank:.1f}" if name in cells else NONE
            for name in found.columns
        ]
        rows.append([_layer(layer), f"{100 * share:.1f} %", *shown])
    return ["layer", "of all", *found.columns, "(norm / effective rank)"], [
        [*row, ""] for row in rows
    ]


def _size(cell: Cell) -> float:
    return cell.norm if isfinite(cell.norm) else 0.0


def _share(found: Statistics, cells: Sequence[Cell]) -> float:
    whole = sum(_size(cell) ** 2 for cell in found.cells)
    return sum(_size(cell) ** 2 for cell in cells) / whole if whole else 0.0


def _cell_name(cell: Cell, *, by_head: bool, sites: bool) -> str:
    if not by_head:
        return f"{_layer(cell.layer)}.{cell.column}"
    return f"{_layer(cell.layer)}.{f'{cell.column}.' if sites else ''}{cell.head}"


def _verdict(pair: Pair) -> list[str]:
    if pair.difference is not None:
        lines = [f"They cannot be merged: {pair.difference}."]
    else:
        lines = ["They can be merged: `ptp merge`."]
        lines += [f"They differ in {one}; merged by {one.merged_by}." for one in pair.bridged]
    return [*lines, *(line for line in (pair.incomparable, pair.prediction) if line)]


def _likeness_row(label: str, found: Likeness) -> list[str]:
    return [
        label,
        *(f"{value:+.3f}" if isfinite(value) else NONE for value in (found.cosine,)),
        *(
            f"{value:.3f}" if isfinite(value) else NONE
            for value in (found.sign_conflict, found.norm_ratio)
        ),
    ]


def _layer(layer: int | None) -> str:
    return "other" if layer is None else str(layer)


def _spelled(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """The numbers as ranges, such as 0–3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
