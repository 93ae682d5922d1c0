"""`ptp merge-info`: everything to know of an adapter, or of several, before it is deployed or merged."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixtune_cli.cli import lookup, typer_options
from prefixtune_cli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from prefixtune_cli.merge_info.bias_on_data import OnData
    from prefixtune_cli.merge_info.one_adapter import Facts

BASE, QUERIES, RESULTS = "The base", "On real queries", "Results"


def merge_info(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER]…",
            help="Runs of `ptp train`, or adapter folders; else the newest finished run. Several are held against "
            "each other.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer_options.option(
            "--model",
            "-m",
            panel=BASE,
            metavar="NAME",
            help="The base, where it is not the one that the adapter names.",
            offers="model.name",
        ),
    ] = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    data: Annotated[
        str | None,
        typer_options.option(
            "--data",
            "-d",
            panel=QUERIES,
            metavar="DATA",
            help="Measure what the adapter adds to the base on these rows; this loads the base's weights.",
        ),
    ] = None,
    rows: Annotated[
        int, typer_options.option("--rows", panel=QUERIES, metavar="N", help="Rows of --data; 64.")
    ] = 64,
    bits: int | None = None,
    device: str | None = None,
    out: Annotated[
        str | None,
        typer_options.option(
            "--out",
            "-o",
            panel=RESULTS,
            metavar="FOLDER",
            help="Where pictures go; else the run's merge-info/, or merge-info-NAME/.",
        ),
    ] = None,
    as_json: bool = False,
) -> None:
    """Tell what an adapter is, what it costs, what it has learned, and whether several can be merged.

    The base's weights are not loaded, but for --data. The exit code is 1 where an adapter is found to be damaged.
    """
    if rows < 1:
        raise UsageError(f"--rows must be above 0, got {rows}.")
    from prefixtune_cli.cli import console, merge_info_table
    from prefixtune_cli.data.locate import check_sources

    named = model is not None
    who = lookup.several(
        adapters,
        model,
        None,
        needs_base=data is not None,
        revision=revision,
        trust_remote_code=trust_remote_code,
        bits=bits,
        device=device,
    )
    check_sources(data)
    console.quiet_libraries()
    from prefixtune_cli.lock import locked
    from prefixtune_cli.merge_info.one_adapter import gather
    from prefixtune_cli.merge_info.pairs import pairs

    facts = [gather(one, typed_base=named) for one in who]
    found = pairs(facts)
    folders = _folders(facts, out)
    measured = None
    with contextlib.ExitStack() as opened:
        for one in facts if out is None else ():
            if one.adapter.run is not None:
                opened.enter_context(locked(one.adapter.run.path, shared=True))
        written = _drawn(facts, folders)
        if data is not None:
            measured = _on_data(facts, data, rows, Path(out or folders[0]))
            written += measured.written
    if as_json:
        console.print_json(
            {
                "adapters": [one.to_json() for one in facts],
                "pairs": [pair.to_json() for pair in found],
                "on_data": None if measured is None else measured.to_json(),
                "written": [str(path) for path in written],
            }
        )
    else:
        merge_info_table.print_facts(facts)
        merge_info_table.print_pairs(found)
        if measured is not None:
            merge_info_table.print_tables(measured.tables)
        for path in written:
            console.notice(f"Written: {path}")
    if any(one.findings for one in facts):
        raise typer.Exit(1)


def _on_data(facts: list[Facts], data: str, rows: int, out: Path) -> OnData:
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.merge_info.bias_on_data import analyse

    who = [one.adapter for one in facts]
    with reporter() as shown:
        return analyse(who, data, rows=rows, out=out, reporter=shown)


def _folders(facts: list[Facts], out: str | None) -> list[Path]:
    """The folder for each adapter's pictures; several adapters have one each below --out."""
    from prefixtune_cli.merge_info.pairs import distinct_names

    names = distinct_names(facts)
    if out is not None:
        return [Path(out) / name if len(names) > 1 else Path(out) for name in names]
    return [
        Path(f"merge-info-{name}") if one.adapter.run is None else one.adapter.run.merge_info
        for name, one in zip(names, facts, strict=True)
    ]


def _drawn(facts: list[Facts], folders: list[Path]) -> list[Path]:
    from prefixtune_cli.merge_info.plots import draw_heat_map

    written = []
    for one, folder in zip(facts, folders, strict=True):
        if one.learned is None:
            continue
        path = folder / "heat-map.png"
        try:
            draw_heat_map(path, one)
        except OSError as error:
            raise ResourceError(
                f"{path} cannot be written ({error}). Give another folder with --out."
            ) from error
        written.append(path)
    return written
