"""The pictures of a comparison: which are drawn, their words, and which contestants are on a Pareto front."""

import itertools
import math
import struct
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from prefixtune_cli.compare.axes import Axis, front
from prefixtune_cli.compare.comparison import OOD, TEST, Cell, Comparison, Result
from prefixtune_cli.compare.metrics import EXACT_MATCH, LOSS, OF_PAIRS, Metric
from prefixtune_cli.compare.pictures import DPI, FILES, LOOK, WIDTH, _curve, draw, pictures
from prefixtune_cli.compare.plots import _count_in_thousands, paint_quality, styles

from .made import comparison, contestant


def size(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def text(found: Comparison, file: str) -> str:
    (picture,) = (picture for picture in pictures(found) if picture.file == file)
    return picture.text


def without(found: Comparison, data: str) -> Comparison:
    """Nobody was judged on this data."""
    contestants = [
        replace(
            c,
            cells=[
                replace(cell, results={k: v for k, v in cell.results.items() if k != data})
                for cell in c.cells
            ],
        )
        for c in found.contestants
    ]
    base = {name: result for name, result in found.base.items() if name != data}
    return replace(found, contestants=contestants, base=base)


def test_a_whole_comparison_has_all_pictures_of_the_size_that_they_say(tmp_path: Path) -> None:
    found = comparison()
    assert draw(found, tmp_path) == [tmp_path / file for file in FILES]
    for picture in pictures(found):
        assert size(tmp_path / picture.file) == pytest.approx(picture.pixels, abs=1)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)  # no half-written file


def test_one_contestant_has_no_fronts(tmp_path: Path) -> None:
    alone = replace(comparison(), contestants=[contestant("lora")])
    assert [path.name for path in draw(alone, tmp_path)] == ["quality.png", "training-loss.png"]


def test_what_was_not_measured_is_left_out() -> None:
    assert FILES[3] not in [p.file for p in pictures(without(comparison(), OOD))]
    found = comparison()
    free = replace(found, contestants=[replace(c, cost=None) for c in found.contestants])
    assert FILES[2] not in [picture.file for picture in pictures(free)]
    assert FILES[1] in [picture.file for picture in pictures(free)]


def test_costs_alone_have_no_picture(tmp_path: Path) -> None:
    found = comparison(kind="speed", base={})
    bare = replace(found, contestants=[replace(c, cells=[]) for c in found.contestants])
    assert draw(bare, tmp_path) == []


def test_a_picture_that_can_no_longer_be_drawn_is_deleted(tmp_path: Path) -> None:
    for name in (*FILES, "mine.png"):
        (tmp_path / name).write_bytes(b"")
    draw(replace(comparison(), contestants=[contestant("lora")]), tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"quality.png", "training-loss.png", "mine.png"}


def test_a_contestant_without_any_result_keeps_its_row_and_is_on_no_front(tmp_path: Path) -> None:
    found = comparison()
    dead = replace(
        found.contestants[3], cells=[Cell(0, "runs/x", failure="out of memory")], cost=None
    )
    failed = replace(found, contestants=[*found.contestants[:3], dead])
    assert "full no result" in text(failed, "quality.png")
    assert "full" not in text(failed, FILES[1])
    assert len(draw(failed, tmp_path)) == 5


def test_the_words_hold_the_figures_of_the_picture() -> None:
    found = comparison()
    shares = [100 * (r.exact_match or 0) for r in found.contestants[1].results(TEST)]
    mean = sum(shares) / 3
    deviation = math.sqrt(sum((share - mean) ** 2 for share in shares) / 2)
    assert f"lora {mean:.1f} ± {deviation:.1f} %" in text(found, "quality.png")
    assert "lora 224,256, " in text(found, FILES[1])
    assert "lora 4,100 tokens/s, " in text(found, FILES[2])
    assert "On the Pareto front: " in text(found, FILES[3])


def test_without_right_answers_quality_is_the_loss() -> None:
    found = comparison()
    bare = [
        replace(
            c,
            cells=[
                replace(cell, results={TEST: Result([6.0, 2.0], [2, 2])}) for cell in c.cells[:1]
            ],
        )
        for c in found.contestants
    ]
    said = text(replace(found, contestants=bare, base={}), "quality.png")
    assert "test data: loss (nats a token, less is better): prefix-tuning-plus 2.000 nats;" in said


POINTS = {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (3.0, 1.5), "d": (1.0, 0.5)}


def test_the_front_is_what_nothing_beats() -> None:
    assert front(POINTS, right=False, up=True) == ["a", "b"]  # few parameters, many right answers
    assert front(POINTS, right=True, up=True) == ["b", "c"]  # fast, many right answers
    assert front(POINTS, right=False, up=False) == ["d"]  # few parameters, low loss


def test_equal_points_are_both_on_the_front_always_in_the_same_order() -> None:
    twins = {"b": (1, 1), "a": (1, 1), "c": (2, 0)}
    assert front(twins, right=False, up=True) == ["a", "b"]


def test_the_curve_is_the_mean_and_range_of_the_finished_seeds() -> None:
    cells = [
        Cell(0, "runs/0", losses=[(1, 2.0), (2, 1.0), (3, math.nan)]),
        Cell(1, "runs/1", losses=[(1, 4.0), (2, 2.0), (3, 1.0)]),
        Cell(2, "runs/2", losses=[(1, 90.0)], failure="The loss is nan."),
    ]
    one = replace(contestant("lora"), cells=cells)
    assert _curve(one) == [(1, 3.0, 2.0, 4.0), (2, 1.5, 1.0, 2.0)]


@pytest.mark.filterwarnings("error")
def test_any_label_can_be_drawn(tmp_path: Path) -> None:
    found = comparison()
    labels = ["$x$ 50 % \\alpha", "_hidden", "a very " * 20 + "long one", "φ² {x}_y^z$"]
    odd = [replace(c, label=new) for c, new in zip(found.contestants, labels, strict=True)]
    assert len(draw(replace(found, contestants=odd), tmp_path)) == 5


@pytest.mark.filterwarnings("error")
def test_losses_of_zero_and_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    found = comparison()
    flat = [
        replace(c, cells=[replace(cell, losses=[(1, 0.0)]) for cell in c.cells])
        for c in found.contestants
    ]
    assert tmp_path / FILES[4] in draw(replace(found, contestants=flat), tmp_path)
    steep = replace(found.contestants[0], cells=[Cell(0, "r", losses=[(1, 11.0), (9, 0.0)])])
    assert draw(replace(found, contestants=[steep]), tmp_path) == [tmp_path / FILES[4]]


@pytest.mark.filterwarnings("error")
def test_contestants_of_the_same_size_can_be_drawn(tmp_path: Path) -> None:
    found = comparison()
    same = [replace(c, trainable_parameters=98_304) for c in found.contestants]
    assert tmp_path / FILES[1] in draw(replace(found, contestants=same), tmp_path)


@pytest.mark.parametrize("counts", [(1.1e6, 2.2e6, 2.44e6), (1e4, 2e5, 3e5), (2e3, 1e5, 7e7)])
def test_no_numbers_of_the_axis_of_parameters_lie_on_each_other(counts) -> None:
    figure = Figure(figsize=(5.6, 4))
    axes = figure.subplots()
    axes.plot(counts, [1] * len(counts))
    _count_in_thousands(axes, counts)
    axes.margins(x=0.1)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    shown = [
        label.get_window_extent()
        for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= at <= high and label.get_text()
    ]
    assert len(shown) >= 2
    boxes = sorted(shown, key=lambda box: box.x0)
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize("metric", [EXACT_MATCH, LOSS, *OF_PAIRS], ids=lambda metric: metric.name)
def test_the_name_of_an_axis_lies_within_the_picture(metric: Metric) -> None:
    picture = next(p for p in pictures(comparison()) if p.file == FILES[0])
    axis = Axis(metric, f"test data: {metric.axis}", {"prefix-tuning-plus": [0.1, 0.2]})
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, picture.height), dpi=DPI, layout="constrained")
        paint_quality(figure, axis=axis, styles=styles(["prefix-tuning-plus", "lora"]))
        figure.draw_without_rendering()
    label = figure.axes[0].xaxis.label.get_window_extent()
    assert 0 <= label.x0 < label.x1 <= figure.bbox.x1
