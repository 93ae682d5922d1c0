"""report.html in a real browser: offline, on a phone, in print, in the dark, and to a screen reader."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prefixtune_cli.compare.comparison import Comparison
from prefixtune_cli.compare.pictures import draw
from prefixtune_cli.report import write
from tests.compare.made import comparison

from .browser import COMMAND, Browser
from .test_report import evil

pytestmark = pytest.mark.skipif(COMMAND is None, reason="no chromium or chrome in PATH")

PHONE, DESKTOP, PAPER = 360, 1280, 1032  # CSS pixels; the width of A4 without its margins


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def many(found: Comparison) -> Comparison:
    """Nine contestants with long names, and a command without spaces."""
    contestants = [
        replace(
            found.contestants[i % 4], label=f"prefix-tuning-plus adapter.layers=last:{i} {'w' * 30}"
        )
        for i in range(9)
    ]
    return replace(found, contestants=contestants, command="ptp" + "-" * 400)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        "plain": comparison(failed=True, notices=["The runs differ in batch: 16 against 32."]),
        "many": many(comparison()),
        "evil": evil(comparison()),
    }
    drawn = draw(made["plain"], tmp_path_factory.mktemp("pictures"))
    found = {}
    for name, each in made.items():
        folder = tmp_path_factory.mktemp(name)
        for picture in drawn:
            shutil.copy(picture, folder)
        found[name] = write(each, folder)
    return found


def complaints(browser: Browser) -> list[dict[str, object]]:
    return [
        e
        for e in browser.events
        if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]


def test_opened_from_disk_it_asks_for_nothing(browser: Browser, reports: dict[str, Path]) -> None:
    for report in reports.values():
        browser.open(report, width=DESKTOP)
        page, *others = browser.requests()
        assert page == report.as_uri()
        assert len(others) == 5
        assert all(address.startswith("data:image/png;base64,") for address in others)
        assert complaints(browser) == []
        assert browser.run("[...document.images].every(i => i.naturalWidth > 1000)")


def test_a_page_that_does_ask_is_caught(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='https://example.org/a.png'>")
    browser.open(page, width=DESKTOP)
    assert browser.requests()[1:] == ["https://example.org/a.png"]


@pytest.mark.parametrize("name", ["plain", "many", "evil"])
def test_on_a_phone_nothing_is_cut_or_scrolled(
    browser: Browser, reports: dict[str, Path], name: str
) -> None:
    browser.open(reports[name], width=PHONE)
    assert browser.run("innerWidth") == PHONE
    assert browser.run("document.documentElement.scrollWidth") == PHONE
    assert max(scrolled(browser)) <= 0
    assert (
        browser.run("parseFloat(getComputedStyle(document.querySelector('main li')).fontSize)")
        >= 16
    )


def scrolled(browser: Browser) -> list[int]:
    """The number of pixels by which each table overflows its place."""
    return browser.run(
        "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )


def test_on_a_desk_every_column_is_seen(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["plain"], width=DESKTOP)
    assert max(scrolled(browser)) <= 0


def test_in_print_nothing_is_cut_or_dark(browser: Browser, reports: dict[str, Path]) -> None:
    for report in reports.values():
        browser.open(report, width=PAPER, prefers_color_scheme="dark")
        pages = re.findall(rb"/Type\s*/Page\b", browser.pdf())
        assert 3 <= len(pages) <= 20
        browser.call("Emulation.setEmulatedMedia", media="print",
            features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
        assert browser.run(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        assert browser.run(
            "[...document.querySelectorAll('table')].every(t => t.getBoundingClientRect().right <= innerWidth)"
        )
        assert (
            browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert (
            browser.run("getComputedStyle(document.querySelector('main th')).color")
            == "rgb(0, 0, 0)"
        )
        assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_a_screen_reader_is_told_of_landmarks_tables_and_pictures(
    browser: Browser, reports: dict[str, Path]
) -> None:
    browser.open(reports["plain"], width=DESKTOP)
    found = browser.accessibility()
    roles = Counter(role for role, _ in found)
    assert all(roles[role] == 1 for role in ("banner", "navigation", "main", "contentinfo"))
    assert roles["table"] == 6
    names = [name for role, name in found if role == "table"]
    assert "Every run, with its directory" in names
    assert all(names)
    assert roles["rowheader"] >= 4 * 3
    assert roles["columnheader"] >= 30
    pictures = [name for role, name in found if role == "image"]
    assert len(pictures) == 5
    assert "lora 90.0 ± 4.3 %" in pictures[0]
    assert [n for role, n in found if role == "heading"][:2] == ["Comparison: made", "Verdict"]


CONTRAST = """
(() => {
  const light = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const found = numbers(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll('body *')].filter(
    e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  return Math.min(...texts.map(e => {
    const both = [luminance(numbers(getComputedStyle(e).color)), luminance(behind(e))].sort((a, b) => b - a);
    return (both[0] + 0.05) / (both[1] + 0.05);
  }));
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(
    browser: Browser, reports: dict[str, Path], scheme: str
) -> None:
    browser.open(reports["plain"], width=DESKTOP, prefers_color_scheme=scheme)
    red, *_ = re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor"))
    assert (int(red) < 60) == (scheme == "dark")
    assert browser.run(CONTRAST) >= 4.5  # WCAG 2.2, 1.4.3, level AA


def test_what_users_name_runs_nothing(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["evil"], width=DESKTOP)
    assert not any(e.get("method") == "Page.javascriptDialogOpening" for e in browser.events)
    assert browser.run("document.scripts.length") == 0
    assert "<script>alert(1)</script>" in browser.run("document.querySelector('h1').textContent")
