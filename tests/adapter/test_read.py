"""o + φ(q)ᵀM as one operation: its gradients, its layouts, and that it keeps no tensor that was not kept before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor

from prefixtune_cli.adapter import Memory, PrefixTuningPlusConfig
from prefixtune_cli.adapter.feed_forward import add_read_of_blocks

from .architectures import base_model, fill, tokens
from .equation import read

BATCH, HEADS, GROUP, POSITIONS, D_QUERY, D_VALUE = 2, 2, 2, 3, 4, 5
MAPS = [("elu", None), ("gelu", None), ("mlp", None), ("mlp", 7)]


def heads_within_positions(shape: tuple[int, ...]) -> Tensor:
    """[b, h, s, d], as a projection gives it: the heads of a token are adjacent."""
    b, h, s, d = shape
    return torch.randn(b, s, h, d, dtype=torch.float64).transpose(1, 2)


def part_of_qkv(shape: tuple[int, ...]) -> Tensor:
    """[b, h, s, d], cut from one projection for query, key and value."""
    b, h, s, d = shape
    return torch.randn(b, s, h, 3 * d, dtype=torch.float64)[..., :d].transpose(1, 2)


LAYOUTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": lambda shape: torch.randn(shape, dtype=torch.float64),
    "transposed": heads_within_positions,
    "of a fused projection": part_of_qkv,
}


def memory(rank: int | None = None, **options: object) -> Memory:
    found = Memory(HEADS, D_QUERY, D_VALUE, rank=rank, **options).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_()
    return found


def query_and_output(layout: str) -> tuple[Tensor, Tensor]:
    make = LAYOUTS[layout]
    query = make((BATCH, HEADS * GROUP, POSITIONS, D_QUERY))
    return query, make((BATCH, HEADS * GROUP, POSITIONS, D_VALUE)).transpose(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize_query", [False, True])
@pytest.mark.parametrize(("feature_map", "feature_dim"), MAPS)
@pytest.mark.parametrize("rank", [None, 2])
def test_every_gradient_is_that_of_small_differences(
    rank, feature_map, feature_dim, normalize_query, layout
):
    torch.manual_seed(0)
    one = memory(
        rank,
        feature_map=feature_map,
        feature_dim=feature_dim,
        normalize_query=normalize_query,
    )
    query, output = query_and_output(layout)

    def of(output: Tensor, query: Tensor, *_: Tensor) -> Tensor:
        return one(query, output)

    inputs = (output.requires_grad_(), query.requires_grad_(), *one.parameters())
    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_read_is_added_to_an_output_of_any_layout_and_nothing_is_overwritten(layout):
    one = memory(feature_map="gelu")
    query, output = query_and_output(layout)
    before = query.clone(), output.clone()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            actual = one(query, output)
        torch.testing.assert_close(actual, before[1] + read(one, query))
    torch.testing.assert_close((query, output), before, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", ["query", "M", "output"])
def test_what_needs_no_gradient_gets_none_and_the_others_keep_theirs(frozen):
    one = memory()
    query, output = query_and_output("transposed")
    leaves = {"query": query.requires_grad_(), "M": one.M, "output": output.requires_grad_()}
    cotangent = torch.randn(output.shape, dtype=torch.float64)
    whole = dict(
        zip(
            leaves, torch.autograd.grad(one(query, output), leaves.values(), cotangent), strict=True
        )
    )
    leaves.pop(frozen).requires_grad_(False)
    some = torch.autograd.grad(one(query, output), leaves.values(), cotangent)
    for name, gradient in zip(leaves, some, strict=True):
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=0)


def test_half_precision_accumulates_over_tokens_in_float32():
    torch.manual_seed(0)
    one = Memory(1, 8, 8)
    query = torch.randn(4, 1, 512, 8).bfloat16()
    cotangent = torch.randn(4, 512, 1, 8).bfloat16()
    (actual,) = torch.autograd.grad(one(query), one.M, cotangent)
    wide = memory_of(one)
    (expected,) = torch.autograd.grad(wide(query.double()), wide.M, cotangent.double())
    assert actual.dtype == torch.float32
    # A sum of 2048 terms in bfloat16 would be off by several of its steps of 2⁻⁸.
    assert (actual - expected).norm() < 2**-8 * expected.norm()


def memory_of(one: Memory) -> Memory:
    wide = Memory(one.heads, one.d_query, one.d_value).double()
    wide.load_state_dict(one.state_dict())
    return wide


def test_in_decoding_m_is_not_rounded_and_elsewhere_it_is():
    torch.manual_seed(0)
    one = Memory(2, 8, 8, init_weights=False)
    query = torch.randn(1, 2, 64, 8).bfloat16()
    phi = F.elu(query[0].float())
    unrounded = torch.bmm(phi, one.M).transpose(0, 1)[None].bfloat16()
    with torch.no_grad():
        at_once = one(query)
        one_by_one = torch.cat([one(query[:, :, i : i + 1]) for i in range(64)], 1)
    assert torch.equal(one_by_one, unrounded)
    assert not torch.equal(at_once, unrounded)
    torch.testing.assert_close(at_once, one_by_one, rtol=2**-5, atol=2**-7)


def test_autocast_computes_in_bfloat16_and_gives_the_outputs_dtype():
    one = Memory(2, 8, 8, init_weights=False)
    query, output = torch.randn(1, 2, 5, 8), torch.zeros(1, 5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        actual = one(query, output)
    assert actual.dtype == torch.float32
    expected = one(query.bfloat16(), output.bfloat16()).float()
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "gelu", "share_heads": "kv"},
        {"normalize_query": True},
        {"feature_map": "mlp", "feature_dim": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_grow_by_no_byte_over_the_frozen_base(dtype, name, options):
    """By storage, autograd keeps of a forward pass only what it keeps of the base's, and the parameters."""
    base = base_model(name, dtype=dtype).requires_grad_(False)
    expected = kept_bytes(base)
    model = get_peft_model(base, PrefixTuningPlusConfig(**options))
    fill(model)
    assert kept_bytes(model) == expected > 0


def test_a_batch_is_decoded_beside_the_ffn_as_each_of_its_rows_is():
    memory = Memory(4, 8, 8, feature_map="gelu", init_weights=False)
    torch.manual_seed(0)
    hidden, output = torch.randn(2, 3, 1, 32).bfloat16()
    with torch.no_grad():
        together = add_read_of_blocks(output, hidden, memory)
        alone = [
            add_read_of_blocks(o, x, memory)
            for o, x in zip(output[:, None], hidden[:, None], strict=True)
        ]
    assert torch.equal(together, torch.cat(alone))


def test_beside_the_ffn_its_input_is_kept_and_nothing_else():
    base = base_model().requires_grad_(False)
    expected = kept_bytes(base)
    model = get_peft_model(base, PrefixTuningPlusConfig(sites="ffn", normalize_query=True))
    inputs = base.config.num_hidden_layers * tokens().numel() * base.config.hidden_size
    assert kept_bytes(model) == expected + 4 * inputs


def kept_bytes(model: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass to the embeddings, besides parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # keeps tensors alive, so that no address occurs twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(storage)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(inputs_embeds=embedded, use_cache=False).logits.float().sum()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("batch", "positions"), [(0, POSITIONS), (BATCH, 0), (0, 1)])
def test_of_no_tokens_nothing_is_read_and_no_gradient_comes(batch: int, positions: int) -> None:
    one = memory(feature_map="mlp")
    query = torch.zeros(batch, HEADS * GROUP, positions, D_QUERY, dtype=torch.float64)
    output = torch.zeros(batch, positions, HEADS * GROUP, D_VALUE, dtype=torch.float64)
    query.requires_grad_(True)
    found = one(query, output)
    assert found.shape == output.shape
    found.sum().backward()
    assert query.grad is not None
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in one.parameters())
    with torch.no_grad():
        assert one(query, output).shape == output.shape
