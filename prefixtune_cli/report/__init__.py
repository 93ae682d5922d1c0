"""report.html: a comparison as one page, which needs no network, no other file and no script.

The page is template.html.jinja with tables of text, and with the pictures as data URIs. Jinja escapes everything that
comes from the user: labels, paths, commands, reasons of failure.
"""

from __future__ import annotations

import base64
from pathlib import Path

from prefixtune_cli.compare.comparison import Comparison
from prefixtune_cli.compare.folder import RESULTS, TABLE, claimed, mark
from prefixtune_cli.compare.pictures import Picture, draw, pictures
from prefixtune_cli.compare.table import markdown
from prefixtune_cli.report import tables
from prefixtune_cli.report.verdict import verdict
from prefixtune_cli.run_dir import write_atomically, write_json

FILE = "report.html"


def publish(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all files of a comparison to `folder`: results.json, table.md, the pictures and report.html.

    Raises:
        UsageError: the folder has files that no comparison has written.
    """
    with claimed(folder):
        mark(folder)
        results, table = folder / RESULTS, folder / TABLE
        write_json(results, comparison.to_json())
        write_atomically(table, markdown(comparison))
        return [results, table, *draw(comparison, folder), write(comparison, folder)]


def write(comparison: Comparison, folder: Path) -> Path:
    """Write `folder`/report.html, with those pictures that `compare.pictures.draw` has drawn into the folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("prefixtune_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [p for p in pictures(comparison) if (folder / p.file).is_file()]
    page = environment.get_template("template.html.jinja").render(
        comparison=comparison,
        findings=verdict(comparison),
        result=tables.result(comparison),
        pictures=[_embedded(picture, folder) for picture in drawn],
        sweep=tables.sweep(comparison),
        runs=tables.runs(comparison),
        protocol=tables.protocol(comparison),
        data=tables.data(comparison),
        environment=tables.environment(comparison),
    )
    write_atomically(folder / FILE, page)
    return folder / FILE


def _embedded(picture: Picture, folder: Path) -> dict[str, str | int]:
    content = base64.b64encode((folder / picture.file).read_bytes()).decode()
    return {
        "title": picture.title,
        "text": picture.text,
        "uri": f"data:image/png;base64,{content}",
        "width": picture.pixels[0],
        "height": picture.pixels[1],
    }
