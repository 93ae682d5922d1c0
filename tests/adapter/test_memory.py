"""The memory alone, against eq. 7 as loops over plain floats."""

from __future__ import annotations

import math

import pytest
import torch

from prefixtune_cli.adapter import Memory, PrefixTuningPlusConfig, feature_map
from prefixtune_cli.recipe.schema import PrefixTuningPlus

from .equation import features, matrix, read


def random_memory(heads: int, d_query: int, d_value: int, **options: object) -> Memory:
    memory = Memory(heads, d_query, d_value, **options).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    return memory


@pytest.mark.parametrize("normalize_query", [False, True])
@pytest.mark.parametrize(
    ("feature_map", "feature_dim"), [("elu", None), ("gelu", None), ("mlp", None), ("mlp", 7)]
)
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("rank", [None, 2])
def test_read_is_the_equation(rank, heads, feature_map, feature_dim, normalize_query):
    memory = random_memory(
        heads,
        3,
        5,
        feature_map=feature_map,
        feature_dim=feature_dim,
        normalize_query=normalize_query,
        rank=rank,
    )
    query = 2 * torch.randn(2, 4, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(memory(query), read(memory, query), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("feature_map", "at_one", "at_minus_one"),
    [
        ("elu", 1.0, math.exp(-1) - 1),
        ("gelu", 0.8413447460685429, -0.15865525393145707),
        ("mlp", 1.0, 0.0),
    ],
)
def test_feature_maps_take_their_known_values(feature_map, at_one, at_minus_one):
    memory = Memory(1, 2, 2, feature_map=feature_map).double()
    with torch.no_grad():
        memory.M[0] = torch.eye(2)
        if feature_map == "mlp":
            memory.W_phi[0] = torch.eye(2)
            memory.b_phi.zero_()
    query = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    expected = torch.tensor([at_one, at_minus_one], dtype=torch.float64)
    torch.testing.assert_close(memory(query).flatten(), expected)


def test_a_new_feature_map_is_one_class(monkeypatch):
    class Sine:
        name, is_trained, has_kernel = "sine", False, False

        @staticmethod
        def value(x, W, b):
            return torch.sin(x)

        @staticmethod
        def gradients(gradient, value, x, W):
            return gradient * torch.cos(x), None, None

    with pytest.raises(ValueError, match="must be elu, gelu or mlp, got 'sine'"):
        PrefixTuningPlusConfig(feature_map="sine")
    monkeypatch.setitem(feature_map.MAPS, "sine", Sine)
    assert PrefixTuningPlusConfig(feature_map="sine").feature_map == "sine"
    memory = random_memory(2, 3, 5, feature_map="sine", normalize_query=True)
    query = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(memory, query)


def test_the_recipes_schema_lists_the_feature_maps_that_there_are():
    schema = PrefixTuningPlus.model_json_schema()["properties"]["feature_map"]
    assert schema["enum"] == list(feature_map.MAPS)


def test_normalized_query_forgets_the_querys_length_and_keeps_its_direction():
    memory = random_memory(2, 3, 3, normalize_query=True)
    query = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(memory(1000 * query), memory(10 * query), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(memory(-query), memory(query))


def test_normalization_of_a_half_precision_query_is_computed_in_float32():
    # The square of 300 overflows float16.
    query = torch.full((1, 1, 1, 4), 300.0, dtype=torch.float16)
    memory = Memory(1, 4, 4, normalize_query=True)
    with torch.no_grad():
        memory.M[0] = torch.eye(4)
    torch.testing.assert_close(memory(query), torch.ones(1, 1, 1, 4, dtype=torch.float16))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("feature_map", ["elu", "gelu", "mlp"])
def test_fresh_memory_reads_exact_zero(feature_map, rank):
    memory = Memory(2, 3, 5, feature_map=feature_map, rank=rank)
    assert torch.count_nonzero(memory(torch.randn(2, 4, 6, 3))) == 0


def test_fresh_trained_map_has_features_and_so_gives_m_a_gradient():
    memory = Memory(2, 8, 8, feature_map="mlp")
    assert torch.count_nonzero(memory.features(torch.randn(2, 5, 8))) > 0
    memory(torch.randn(1, 4, 5, 8)).sum().backward()
    assert torch.count_nonzero(memory.M.grad) > 0


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"M": (2, 3, 5)}),
        ({"feature_map": "mlp"}, {"M": (2, 3, 5), "W_phi": (2, 3, 3), "b_phi": (2, 3)}),
        (
            {"feature_map": "mlp", "feature_dim": 7},
            {"M": (2, 7, 5), "W_phi": (2, 7, 3), "b_phi": (2, 7)},
        ),
        ({"rank": 4}, {"M_down": (2, 3, 4), "M_up": (2, 4, 5)}),
        (
            {"feature_map": "mlp", "feature_dim": 7, "rank": 4},
            {"M_down": (2, 7, 4), "M_up": (2, 4, 5), "W_phi": (2, 7, 3), "b_phi": (2, 7)},
        ),
    ],
)
def test_parameters_have_the_papers_shapes_in_float32(options, shapes):
    memory = Memory(2, 3, 5, **options)
    assert {name: tuple(value.shape) for name, value in memory.named_parameters()} == shapes
    assert {value.dtype for value in memory.parameters()} == {torch.float32}


def test_fresh_low_rank_memory_gives_m_up_a_gradient_and_starts_m_down_as_a_linear_layer():
    memory = Memory(2, 64, 8, rank=3)
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound < memory.M_down.abs().max() <= bound
    memory(torch.randn(1, 2, 5, 64)).sum().backward()
    assert torch.count_nonzero(memory.M_up.grad) > 0
    assert torch.count_nonzero(memory.M_down.grad) == 0  # its gradient goes through M_up


@pytest.mark.parametrize("rank", [None, 2])
def test_matrix_is_m_in_float32_in_either_form(rank):
    memory = random_memory(2, 3, 5, rank=rank)
    expected = torch.tensor(matrix(memory), dtype=torch.float64)
    assert memory.matrix().dtype == torch.float32
    assert memory.matrix().shape == (2, 3, 5)
    torch.testing.assert_close(memory.matrix().double(), expected, rtol=1e-5, atol=1e-6)
    assert memory.bfloat16().matrix().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_read_has_the_querys_dtype_and_m_keeps_its_own(dtype):
    memory = Memory(2, 3, 5, init_weights=False)
    assert memory(torch.randn(1, 4, 6, 3, dtype=dtype)).dtype == dtype
    assert memory.M.dtype == torch.float32


def test_memories_of_the_same_map_add():
    one, two, both = (random_memory(2, 3, 5) for _ in range(3))
    with torch.no_grad():
        both.M.copy_(one.M + two.M)
    query = torch.randn(1, 4, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(both(query), one(query) + two(query))


def test_query_of_another_width_or_head_count_is_refused():
    memory = Memory(2, 3, 5)
    with pytest.raises(ValueError, match=r"2 heads of width 3.*4 heads of width 8"):
        memory(torch.randn(1, 4, 6, 8))
    with pytest.raises(ValueError, match=r"2 heads of width 3.*3 heads of width 3"):
        memory(torch.randn(1, 3, 6, 3))


def test_reference_and_code_are_not_the_same_code():
    # The reference must distinguish a wrong feature from a right one.
    memory = random_memory(1, 3, 3)
    query = [0.5, -0.5, 1.0]
    assert features(memory, 0, query)[1] == math.expm1(-0.5)
