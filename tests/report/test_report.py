"""report.html as text: complete, escaped, self-contained; test_browser tests it in a browser."""

from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from prefixtune_cli.compare.comparison import Cell, Comparison, Point
from prefixtune_cli.compare.pictures import FILES, draw
from prefixtune_cli.report import write
from tests.compare.made import FAILURE, comparison


class Page(HTMLParser):
    """Tags with their attributes, in order, and the text outside of tags."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("made")
    found = comparison(failed=True, notices=["The runs differ in batch: 16 against 32."])
    draw(found, folder)
    return Page(write(found, folder))


def test_the_page_needs_no_other_file_and_no_network(page: Page) -> None:
    addresses = [v or "" for _, a in page.tags for k, v in a.items() if k in ("src", "href")]
    assert len([address for address in addresses if address.startswith("data:image/png")]) == 5
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base"}
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_every_part_of_the_comparison_is_told(page: Page) -> None:
    assert "full has the best mean" in page.text  # the verdict
    assert "The runs differ in batch: 16 against 32." in page.text
    assert "KV cache a sequence, MB" in page.text  # the table
    assert "Every learning rate that was tried" in page.text
    assert f"failed: {FAILURE}" in page.text
    for method in ("prefix-tuning-plus", "lora", "prefix-tuning", "full"):
        for seed in (0, 1, 2):
            assert f"compare/made/{method}-seed-{seed}" in page.text
    for digit in "12345":
        assert f"a{digit}" * 32 in page.text  # the hashes of the data
    assert "cosine" in page.text
    assert "packages.torch" in page.text
    assert "ptp compare --model tiny --recipe quickstart --seeds 3" in page.text


def test_the_best_figure_is_said_and_not_only_bold(page: Page) -> None:
    assert page.words[page.words.index("93.3 ± 1.4") + 1] == " (best)"


def test_on_a_narrow_page_each_figure_stands_beside_its_head(page: Page, tmp_path: Path) -> None:
    """On a phone, a wide table is neither cut nor scrolled: each row is a card. Elsewhere, figures do not wrap."""
    heads = {word.strip() for word in page.words}
    cells = page.all("td")
    assert len(cells) > 100
    assert all(cell["data-head"] in heads for cell in cells)
    css = next(word for word in page.words if "@media" in word)
    narrow = css.partition("@media screen and (max-width: 48rem)")[2].partition("@media print")[0]
    assert "tbody th, td { display: block }" in narrow
    assert "td::before { content: attr(data-head)" in narrow
    assert "nowrap" not in css


def test_headings_tables_and_pictures_are_marked_up(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) >= 6
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert all("%" in (img["alt"] or "") or "nats" in (img["alt"] or "") for img in page.all("img"))
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("title")
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(names)) == len(names)
    targets = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert targets | {(a["href"] or "")[1:] for a in page.all("a")} <= set(names)


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'


def evil(found: Comparison) -> Comparison:
    """An attack in everything that a user can name."""
    first = replace(
        found.contestants[0],
        label=f"first {EVIL}",
        cells=[Cell(0, EVIL, failure=EVIL), *found.contestants[0].cells[1:]],
        sweep=[Point(0.1, None, None, EVIL, EVIL)],
    )
    other = replace(found.contestants[1], label=EVIL)
    return replace(
        found, name=EVIL, command=EVIL, created=EVIL, model={"name": EVIL}, notices=[EVIL],
        data={EVIL: {"source": EVIL, "rows": 1, "sha256": EVIL}}, protocol={EVIL: EVIL},
        environment={EVIL: {EVIL: [EVIL]}}, contestants=[first, other],
    )  # fmt: skip


def test_everything_that_a_user_names_is_escaped(tmp_path: Path) -> None:
    found = evil(comparison())
    for file in FILES:
        (tmp_path / file).write_bytes(b"a picture")
    page = Page(write(found, tmp_path))
    assert page.all("script") == []
    assert len(page.all("img")) == 5
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert page.text.count(EVIL) > 12  # as text, including the template syntax in it


def test_pictures_that_were_not_drawn_are_left_out(tmp_path: Path) -> None:
    page = Page(write(comparison(), tmp_path))
    assert page.all("img") == []
    assert {"href": "#pictures"} not in page.all("a")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_costs_alone_make_a_report(tmp_path: Path) -> None:
    found = comparison(kind="speed", base={}, data={}, protocol={})
    bare = replace(found, contestants=[replace(c, cells=[], sweep=[]) for c in found.contestants])
    page = Page(write(bare, tmp_path))
    assert "prefix-tuning-plus trains fastest" in page.text
    assert {"href": "#runs"} not in page.all("a")
    assert {"href": "#sweep"} not in page.all("a")
