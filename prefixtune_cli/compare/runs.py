"""`ptp compare runs/a runs/b …`: from finished runs to a comparison. It needs no torch.

Runs that differ in their seed alone are one contestant. Other differences than the method, its settings and the seed
make a comparison unfair. They are refused, all of them in one error, unless --anyway is typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefixtune_cli.compare import fairness, wording
from prefixtune_cli.compare.comparison import (
    FORGETTING,
    TEST,
    Cell,
    Comparison,
    Contestant,
    Result,
)
from prefixtune_cli.compare.finished_run import ADAPTER, BASE, FinishedRun, open_run
from prefixtune_cli.compare.metrics import Cost, Measured
from prefixtune_cli.errors import RunDirError, UsageError
from prefixtune_cli.evaluate.matching import rule_sentence
from prefixtune_cli.pointed import run_of
from prefixtune_cli.recipe.schema import WITH_REFERENCE, Recipe
from prefixtune_cli.run_dir import RunDir


def read_runs(runs: Sequence[str], *, anyway: bool = False, command: str = "") -> Comparison:
    """Read finished runs.

    Args:
        runs: run directories; the contestant of the first is the one that the others are compared with.
        anyway: compare runs even if their data, base or budget differs. Then the differences become notices, a run
            that has not finished becomes a failed cell, and different rows are not tested.
        command: as typed, for the record.

    Raises:
        UsageError: there are fewer than two runs, or one is given twice.
        RunDirError: a folder is no run or cannot be read, a run has not finished, or the runs cannot be compared
            fairly. One error says all that is wrong.
    """
    _check_given(runs)
    opened: list[FinishedRun] = []
    unreadable: list[str] = []
    for given in runs:
        try:
            opened.append(open_run(given))
        except RunDirError as error:
            unreadable.append(str(error))
    differences = fairness.differences(opened)
    if len(kinds := sorted({run.recipe.kind for run in opened})) > 1:
        unreadable.append(
            f"Some of the runs learned from {', others from '.join(map(wording.rows_of, kinds))}: they share no "
            "figure. Compare each kind by itself."
        )
    if unreadable or (differences and not anyway):
        raise RunDirError(_refusal(unreadable, differences))
    finished = [run for run in opened if run.finished]
    if not finished:
        raise RunDirError(_refusal(differences, []))
    return _compared(opened, finished, differences, command)


def _check_given(runs: Sequence[str]) -> None:
    if len(runs) < 2:
        given = f"one, {runs[0]}," if runs else "none"
        raise UsageError(
            f"A comparison takes at least two runs, and {given} was given. "
            "Type: ptp compare runs/NAME runs/OTHER"
        )
    given_as: dict[Path, list[str]] = {}
    for run in runs:
        found = run_of(Path(run).expanduser())
        folder = (found.path if found else Path(run)).resolve()
        given_as.setdefault(folder, []).append(run)
    twice = {run for given in given_as.values() if len(given) > 1 for run in given}
    if twice:
        raise UsageError(f"A run is given twice: {', '.join(sorted(twice))}. Give each once.")


def _refusal(wrong: Sequence[str], differences: Sequence[str]) -> str:
    """The text of an error: `wrong` cannot be passed over, `differences` can with --anyway."""
    lines = [*wrong, *differences]
    if len(lines) > 1:
        lines = ["These runs cannot be compared:", *(f"  - {line}" for line in lines)]
    said = "\n".join(lines)
    return said if wrong else f"{said}\nTo compare them all the same, type --anyway."


def _compared(
    opened: Sequence[FinishedRun],
    finished: Sequence[FinishedRun],
    differences: Sequence[str],
    command: str,
) -> Comparison:
    twins = {run.given for run, _ in fairness.twins(opened)}
    groups: dict[str, list[FinishedRun]] = {}
    for run in opened:
        if run.given not in twins:
            groups.setdefault(fairness.identity(run), []).append(run)
    labelled = fairness.labels([group[0] for group in groups.values()])
    common, left_out = _in_common([run for run in finished if run.given not in twins])
    same_base = len({fairness.base(run) for run in finished}) == 1
    same_rows = fairness.same_held_out_rows(finished)
    first = finished[0]
    of_base = {name: first.evaluated[name].results for name in common}
    base = {name: found[BASE] for name, found in of_base.items() if BASE in found and same_base}
    if same_base and same_rows:
        base = {TEST: first.held_out(BASE), **base}
    return Comparison(
        name=_name(opened),
        kind="runs",
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model={
            **first.recipe.model.model_dump(include={"name", "revision", "bits"}),
            "parameters": _parameters_of_the_base(first),
        },
        data=_data(first, common, same_rows=same_rows),
        protocol=_protocol(finished),
        environment={
            key: value
            for key, value in first.environment.items()
            if key not in ("data", "command", "git_commit")
        },
        base=base,
        contestants=[
            _contestant(label, group, common)
            for label, group in zip(labelled, groups.values(), strict=True)
        ],
        notices=[
            *differences,
            *_of_matching(finished),
            *_of_other_machines(finished),
            *left_out,
        ],
    )


def _contestant(label: str, group: Sequence[FinishedRun], common: Sequence[str]) -> Contestant:
    """A contestant, whose cells are the group's runs in the order of their seeds."""
    recipe = group[0].recipe
    finished = [run for run in group if run.finished]
    about = finished[0].summary if finished else {}
    return Contestant(
        label=label,
        method=recipe.adapter.method,
        settings=_own_settings(recipe),
        learning_rate=recipe.train.learning_rate,
        trainable_parameters=about.get("trainable_parameters"),
        adapter_bytes=about.get("adapter_bytes"),
        cells=[_cell(run, common) for run in sorted(group, key=lambda run: run.seed)],
        cost=_cost(finished),
    )


def _own_settings(recipe: Recipe) -> dict[str, Any]:
    """The adapter's settings that are not its method's defaults."""
    adapter = recipe.adapter
    return {
        f"adapter.{name}": value
        for name, field in type(adapter).model_fields.items()
        if name != "method"
        and (value := getattr(adapter, name)) != field.get_default(call_default_factory=True)
    }


def _cell(run: FinishedRun, common: Sequence[str]) -> Cell:
    if not run.finished:
        why = f"The run has not finished. {RunDir(run.given).how_to_go_on}"
        return Cell(run.seed, run.given, failure=why)
    results: dict[str, Result] = {TEST: run.held_out(ADAPTER)}
    results |= {name: run.evaluated[name].results[ADAPTER] for name in common}
    return Cell(
        seed=run.seed,
        run=run.given,
        steps=int(run.summary["steps"]),
        results=results,
        losses=[(int(row["step"]), float(row["loss"])) for row in run.metrics if "loss" in row],
    )


def _cost(finished: Sequence[FinishedRun]) -> Cost | None:
    """The costs that the runs logged. Of several lines of a run the first is left out, as it includes the warm-up."""
    speeds: list[float] = []
    for run in finished:
        of_run = [float(r["tokens_per_second"]) for r in run.metrics if "tokens_per_second" in r]
        speeds += of_run[1:] or of_run
    logged = [row for run in finished for row in run.metrics]
    peaks = [float(row["peak_memory_gib"]) for row in logged if "peak_memory_gib" in row]
    if not speeds and not peaks:
        return None
    return Cost(Measured.of(speeds) if speeds else None, peak_memory_gib=max(peaks, default=None))


def _in_common(finished: Sequence[FinishedRun]) -> tuple[list[str], list[str]]:
    """The data sets on which `ptp eval` has judged every run, and a sentence about each other one."""
    names = sorted({name for run in finished for name in run.evaluated})
    common, left_out = [], []
    for name in names:
        having = [run for run in finished if name in run.evaluated]
        file = f"eval/{name if name == FORGETTING else f'data-{name}'}.json"
        if len(having) < len(finished):
            without = [run.given for run in finished if run not in having]
            shown = ", ".join(without) if len(without) < 4 else f"{len(without)} of the runs"
            left_out.append(f"{file} is left out: it is missing in {shown}.")
        elif len({run.evaluated[name].rows for run in having}) > 1:
            left_out.append(f"{file} is left out: the runs were judged on different rows.")
        else:
            results = [run.evaluated[name].results[ADAPTER] for run in having]
            if any(result.kind != "answers" and result.losses is None for result in results):
                left_out.append(
                    f"Of {file} the objective's loss and rewards are left out: not every run has them there. They need "
                    "rows of the kind that the run learned from and, of DPO and KTO, the base's figures."
                )
            common.append(name)
    return common, left_out


def _data(
    first: FinishedRun, common: Sequence[str], *, same_rows: bool
) -> dict[str, Mapping[str, Any]]:
    train = dict(first.fingerprints["train"])
    held_out = first.fingerprints.get("eval")
    test = {
        "source": held_out["source"] if held_out else f"held out of {train['source']}",
        "rows": first.summary["held_out_rows"],
        "sha256": (held_out or train)["sha256"],
        "same_rows": same_rows,
    }
    found: dict[str, Mapping[str, Any]] = {"train": train, TEST: test}
    for name in common:
        its = first.evaluated[name]
        found[name] = {"source": its.source, "rows": len(its.origins), "sha256": its.sha256}
    return found


def _protocol(finished: Sequence[FinishedRun]) -> dict[str, Any]:
    """What all runs share; None where they differ."""

    def equal(values: Sequence[Any]) -> Any:
        return values[0] if all(value == values[0] for value in values) else None

    shared = fairness.shared_objective([run.recipe for run in finished])
    starts = equal([run.start for run in finished])
    if shared.get("objective") in WITH_REFERENCE and starts is None:
        del shared["objective"]  # the figures are against different references
    return {
        "steps": equal([run.summary["steps"] for run in finished]),
        "batch": equal([run.batch for run in finished]),
        "seeds": sorted({run.seed for run in finished}),
        "sweep": None,
        "few_shot": None,
        "schedule": equal([run.recipe.train.schedule for run in finished]),
        **shared,
    }


def _of_matching(finished: Sequence[FinishedRun]) -> list[str]:
    """The pattern by which answers were matched, and why answers were not matched; of preferences none are."""
    finished = [run for run in finished if not run.recipe.on_preferences]
    patterns = [run.recipe.evaluate.answer_pattern for run in finished]
    rules = [rule_sentence(pattern) for pattern in patterns if pattern]
    reasons = [str(why) for run in finished if (why := run.summary.get("why_no_exact_match"))]
    return list(dict.fromkeys([*rules, *reasons]))


def _of_other_machines(finished: Sequence[FinishedRun]) -> list[str]:
    """Differences that do not affect the quality, but may affect the costs."""
    found = []
    machines = {
        json.dumps([r.environment.get("gpus"), r.environment.get("cpu_count")]) for r in finished
    }
    if len(machines) > 1:
        found.append(
            "The runs were made on different machines, so their speeds and memory are not comparable."
        )
    versions = {json.dumps(run.environment.get("packages"), sort_keys=True) for run in finished}
    if len(versions) > 1:
        found.append(
            "The runs were made with different versions of packages: see their environment.json."
        )
    return found


def _parameters_of_the_base(run: FinishedRun) -> int | None:
    total, trained = run.summary.get("total_parameters"), run.summary.get("trainable_parameters")
    if total is None or trained is None:
        return None
    return int(total) - (0 if run.recipe.adapter.method == "full" else int(trained))


def _name(runs: Sequence[FinishedRun]) -> str:
    names = [re.sub(r"[^\w.-]+", "-", Path(run.given).resolve().name) for run in runs]
    return "-and-".join(names) if len(names) == 2 else f"{names[0]}-and-{len(names) - 1}-more"
