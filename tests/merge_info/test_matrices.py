"""Norm, effective rank and spectrum of matrices with known singular values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefixtune_cli.merge_info.matrices import (
    TrainedMatrix,
    effective_rank,
    statistics,
    trained_matrices,
)
from prefixtune_cli.merge_info.one_adapter import gather
from prefixtune_cli.merge_info.plots import draw_heat_map
from prefixtune_cli.merge_info.saved_adapter import read
from prefixtune_cli.pointed import point

from .conftest import MEMORY, WEIGHTS, Make, change, dense, lora, memory, with_singular_values


def head(values: list[float], *, layer: int = 0) -> TrainedMatrix:
    return TrainedMatrix(layer, "attention", with_singular_values(16, 16, values)[None])


def test_the_effective_rank_is_exp_of_the_entropy_of_the_singular_values() -> None:
    shares = (0.5, 0.25, 0.25)
    entropy = -sum(p * math.log(p) for p in shares)
    assert effective_rank(shares) == pytest.approx(math.exp(entropy))
    assert effective_rank([0.25] * 4 + [0.0]) == pytest.approx(4)
    assert effective_rank([1.0]) == 1
    assert effective_rank([]) == 0
    zero, one = (statistics({"here": head([value])}).cells[0] for value in (0.0, 7.0))
    assert (zero.effective_rank, zero.norm) == (0, 0)
    assert one.effective_rank == pytest.approx(1, rel=1e-3)


def test_norm_rank_and_spectrum_are_those_of_the_matrix() -> None:
    found = statistics({"here": head([4.0, 2, 2])})
    assert found is not None
    (cell,) = found.cells
    assert cell.norm == pytest.approx(math.sqrt(24), rel=1e-5)
    assert cell.spectrum[:4] == pytest.approx((4, 2, 2, 0), abs=1e-5)
    assert cell.effective_rank == pytest.approx(2**1.5, rel=1e-4)


def test_a_product_of_low_rank_has_the_dense_matrixs_singular_values() -> None:
    torch.manual_seed(0)
    product = TrainedMatrix(0, "ffn", torch.randn(3, 8, 2), torch.randn(3, 2, 6))
    expected = torch.linalg.svdvals(dense(product).double())
    torch.testing.assert_close(product.singular_values(), expected[:, :2])
    assert expected[:, 2:].abs().max() < 1e-6
    assert product.shape == (3, 8, 6)


def test_the_fewest_layers_that_hold_90_percent_of_the_squared_norm_are_named() -> None:
    squares = {0: 5.0, 1: 50.0, 2: 30.0, 3: 10.0, 4: 5.0}
    found = statistics(
        {str(n): head([math.sqrt(square)], layer=n) for n, square in squares.items()}
    )
    assert found is not None
    assert found.main_layers == (1, 2, 3)
    assert found.by_layer[1] == pytest.approx(0.5)


def test_heads_that_hold_under_one_percent_together_could_be_dropped() -> None:
    squares = [50.0, 0.4, 48.8, 0.5, 0.3]  # 0.3 and 0.4 are below 1 % together; 0.5 is too much
    whole = torch.stack([with_singular_values(16, 16, [math.sqrt(square)]) for square in squares])
    found = statistics({"here": TrainedMatrix(2, "attention", whole)})
    assert found is not None
    assert [cell.head for cell in found.spare] == [1, 4]


def test_m_is_read_from_the_file_by_layer_and_head(make: Make) -> None:
    folder = make("plus", memory())

    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MEMORY.format(1, "self_attn", "M")][2] = with_singular_values(16, 16, [3.0, 3.0])

    change(folder, put)
    facts = gather(point(folder))
    assert facts.layers == [0, 1]
    assert facts.heads == {"attention": 4}
    assert facts.learned is not None
    (cell,) = [cell for cell in facts.learned.cells if (cell.layer, cell.head) == (1, 2)]
    assert cell.norm == pytest.approx(math.sqrt(18), rel=1e-5)
    assert cell.effective_rank == pytest.approx(2, rel=1e-3)


def test_m_of_low_rank_and_m_at_the_ffn_are_read_too(make: Make) -> None:
    folder = make("both", memory(sites="attention+ffn", rank=3))
    tensors = load_file(folder / WEIGHTS)
    found = trained_matrices(read(point(folder)))
    assert {m.column for m in found.values()} == {"attention", "ffn"}
    parts = [tensors[MEMORY.format(0, "mlp", part)] for part in ("M_down", "M_up")]
    torch.testing.assert_close(dense(found["model.layers.0.mlp"]), parts[0] @ parts[1])
    assert gather(point(folder)).heads == {"attention": 4, "ffn": 4}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_of_lora_is_b_times_a_times_its_scale(make: Make, rslora: bool) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], "use_rslora": rslora}
    folder = make("lora", lora(**settings))
    tensors = load_file(folder / WEIGHTS)
    found = trained_matrices(read(point(folder)))
    for place in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        a, b = (tensors[f"base_model.model.{place}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(
            dense(found[place])[0], b @ a * 4 / (math.sqrt(2) if rslora else 2)
        )
    assert [m.column for m in found.values()].count("down_proj") == 2


def test_ranks_and_scales_by_pattern_are_the_modules_own(make: Make) -> None:
    config = lora(
        target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 1}
    )
    folder = make("pattern", config)
    tensors = load_file(folder / WEIGHTS)
    place = "model.layers.0.self_attn.v_proj"
    a, b = (tensors[f"base_model.model.{place}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(dense(trained_matrices(read(point(folder)))[place])[0], b @ a / 4)


def test_a_matrix_that_is_not_finite_has_no_figures_and_spoils_no_others() -> None:
    broken = TrainedMatrix(0, "attention", torch.full((1, 4, 4), float("nan")))
    found = statistics({"broken": broken, "whole": head([2.0], layer=1)})
    assert found is not None
    assert math.isnan(found.cells[0].norm)
    assert found.by_layer == {0: 0, 1: pytest.approx(1)}
    assert found.main_layers == (1,)


def test_norms_of_a_trained_map_are_said_not_to_be_comparable(make: Make) -> None:
    assert "not comparable across heads" in " ".join(
        gather(point(make("mlp", memory(feature_map="mlp")))).notes
    )
    assert gather(point(make("elu", memory()))).notes == ()


@pytest.mark.parametrize(
    "config", [memory(sites="attention+ffn"), lora(target_modules="all-linear")], ids=["M", "BA"]
)
def test_the_heat_map_is_drawn(make: Make, tmp_path: Path, config) -> None:
    from matplotlib.image import imread

    draw_heat_map(tmp_path / "pictures" / "heat-map.png", gather(point(make("one", config))))
    pixels = imread(tmp_path / "pictures" / "heat-map.png")
    assert min(pixels.shape[:2]) > 200
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, 4).round(2).tolist()}) > 10
