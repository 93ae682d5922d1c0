"""The basis in which M is trained changes the training of M, but nothing that is read, saved or loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from prefixtune_cli.adapter import (
    Memory,
    PrefixTuningPlusConfig,
    basis_state,
    fold_basis,
    initialize_basis,
    load_basis_state,
    step_weight,
)

from .architectures import NAMES, SITES, VOCAB, adapted_modules, base_model, fill, logits, tokens

BATCHES = [{"input_ids": tokens(batch=4, positions=12, seed=seed)} for seed in (1, 2)]


def adapted(
    name: str = "llama", dtype: torch.dtype = torch.float64, **options: object
) -> PeftModel:
    """A model with a basis and with coordinates other than zero."""
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(base_model(name, dtype=dtype), config, autocast_adapter_dtype=False)
    initialize_basis(model, BATCHES)
    fill(model)
    return model.eval()


def memories(model: torch.nn.Module) -> list[Memory]:
    return [module for module in model.modules() if isinstance(module, Memory)]


def second_moments(model: PeftModel, value: Callable[[Memory, Tensor], Tensor]) -> list[Tensor]:
    """E[xxᵀ] of each memory over BATCHES, from a hook of this test; x is [heads, queries, f]."""
    seen: dict[Memory, list[Tensor]] = {memory: [] for memory in memories(model)}

    def look(memory: Memory, given: tuple[Tensor, ...]) -> None:
        query = given[0].detach()
        heads = query.unflatten(1, (memory.heads, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3)
        seen[memory].append(value(memory, heads))

    handles = [memory.register_forward_pre_hook(look) for memory in seen]
    for batch in BATCHES:
        logits(model, **batch)
    for handle in handles:
        handle.remove()
    found = [torch.cat(parts, 1) for parts in seen.values()]
    return [x.mT @ x / x.shape[1] for x in found]


@SITES
@pytest.mark.parametrize("name", NAMES)
def test_folded_logits_equal_unfolded_ones(name, sites):
    model = adapted(name, sites=sites)
    assert all(memory.basis is not None for memory in memories(model))
    assert len(memories(model)) == len(adapted_modules(name, sites))
    before = logits(model, tokens())
    assert not torch.allclose(before, logits(base_model(name, dtype=torch.float64), tokens()))
    fold_basis(model)
    assert all(memory.basis is None for memory in memories(model))
    torch.testing.assert_close(logits(model, tokens()), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"share_heads": "kv"},
        {"rank": 3},
        {"rank": 3, "sites": "attention+ffn", "share_heads": "kv"},
        {"feature_map": "gelu"},
        {"feature_map": "mlp", "feature_dim": 5},
        {"normalize_query": True},
        {"sites": "ffn", "block_size": 16},
        {"layers": [1]},
    ],
    ids=str,
)
def test_every_form_of_the_memory_has_a_basis(options):
    model = adapted(**options)
    before = logits(model, tokens())
    fold_basis(model)
    torch.testing.assert_close(logits(model, tokens()), before, rtol=1e-10, atol=1e-10)


def test_folded_bfloat16_logits_equal_unfolded_ones_within_rounding():
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM")
    model = get_peft_model(base_model(dtype=torch.bfloat16), config).eval()
    initialize_basis(model, BATCHES)
    fill(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(model, tokens())
        fold_basis(model)
        after = logits(model, tokens())
    torch.testing.assert_close(after, before, rtol=2**-6, atol=2**-6)


def test_a_fresh_basis_changes_nothing_that_is_computed():
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", sites="attention+ffn")
    model = get_peft_model(base_model(), config).eval()
    expected = logits(base_model(), tokens())
    initialize_basis(model, BATCHES)
    assert torch.equal(logits(model, tokens()), expected)


def test_a_basis_for_a_trained_adapter_leaves_it_as_it_is():
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", rank=3, sites="attention+ffn")
    base = base_model(dtype=torch.float64)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    fill(model)
    expected = logits(model, tokens())
    initialize_basis(model, BATCHES)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"share_heads": "kv"}, {"sites": "ffn"}, {"feature_map": "gelu"}], ids=str
)
def test_the_basis_whitens_the_features(options):
    """The second moment of Bφ/s is C(C + ε·λ̄·I)⁻¹: the identity, except for directions below the floor."""
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", basis_epsilon=1e-6, **options)
    base = base_model(dtype=torch.float64)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    plain = second_moments(model, lambda memory, query: memory.features(query))
    initialize_basis(model, BATCHES)
    assert len(plain) == len(memories(model))
    for C, memory in zip(plain, memories(model), strict=True):
        B = memory.basis
        whitened = B.mT @ C @ B
        # One number for each layer: s².
        scale = whitened.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        identity = torch.eye(C.shape[-1], dtype=C.dtype).expand_as(C)
        torch.testing.assert_close(whitened / scale, identity, rtol=0, atol=1e-2)
        assert scale.max() / scale.min() < 1.01
        assert not torch.allclose(
            C / C.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None], identity, atol=0.1
        )


def test_the_scale_is_that_of_what_is_read_to():
    """Whitened features of unit size, times coordinates of η, change the output by about η of its size."""
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM")
    base = base_model(dtype=torch.float64)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    outputs: dict[Memory, list[Tensor]] = {memory: [] for memory in memories(model)}
    handles = [
        memory.register_forward_pre_hook(lambda m, given: outputs[m].append(given[1].detach()))
        for memory in outputs
    ]
    initialize_basis(model, BATCHES)
    for handle in handles:
        handle.remove()
    C = second_moments(model, lambda memory, query: memory.features(query))
    for moment, memory in zip(C, memories(model), strict=True):
        given = outputs[memory]
        median = sum(float(o.abs().median()) for o in given) / len(given)
        read = memory.basis.mT @ moment @ memory.basis  # for one column of coordinates of size 1
        size = read.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        torch.testing.assert_close(size, torch.full_like(size, 1.4826 * median), rtol=0.1, atol=0)


def _bases(batches: list[dict[str, Tensor]], base: torch.nn.Module) -> tuple[float | None, Tensor]:
    """What the pass returns, and all bases."""
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    loss = initialize_basis(model, batches)
    return loss, torch.stack([memory.basis for memory in memories(model)])


def test_a_base_that_is_near_its_data_takes_smaller_steps():
    """The basis is smaller in proportion to the base's loss on the trained tokens, which alone count."""
    base = base_model(dtype=torch.float64)
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(4)  # some tokens become likely
    batches, nats, count = [], 0.0, 0
    for seed, end in ((0, 5), (1, 3)):  # four tokens that the base expects, and two
        given = tokens(batch=4, positions=12, seed=seed)
        scores = logits(base, given).log_softmax(-1)
        labels = torch.full_like(given, -100)
        labels[0, 1:end] = scores[0, : end - 1].argmax(-1)
        labels[:, 0] = 7  # nothing comes before it, so that it is never predicted
        batches.append({"input_ids": given, "labels": labels})
        nats -= float(scores[0, : end - 1].max(-1).values.sum())
        count += end - 1
    batches.append({"input_ids": tokens(batch=4, positions=12, seed=2)})  # without labels
    loss, near = _bases(batches, base)
    without, far = _bases(
        [{"input_ids": batch["input_ids"]} for batch in batches], base_model(dtype=torch.float64)
    )
    assert loss == pytest.approx(nats / count)
    assert 0.05 < loss < 5
    assert without is None
    torch.testing.assert_close(near, far * loss / 5, rtol=1e-9, atol=0)


def test_steps_are_whole_from_five_nats_upwards_and_never_nothing():
    assert [step_weight(loss) for loss in (None, 9.0, 5.0, 1.0, 0.0)] == [1, 1, 1, 0.2, 0.01]
    assert step_weight(math.nan) == 1  # training then names the rows


@pytest.mark.parametrize("rank", [None, 2])
def test_gradients_pass_the_basis(rank):
    memory = Memory(2, 3, 4, rank=rank).double()
    basis = torch.randn(2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    memory.set_basis(basis)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    name = memory.factor_name
    coordinates = getattr(memory, name).detach().clone().requires_grad_()

    def read(query: Tensor, coordinates: Tensor) -> Tensor:
        return torch.func.functional_call(memory, {name: coordinates}, (query,))

    assert torch.autograd.gradcheck(read, (query, coordinates))


@SITES
def test_saved_is_m_alone_and_an_ordinary_adapter(tmp_path, sites):
    model = adapted(dtype=torch.float32, sites=sites)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"M"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["format_version"] == (1 if sites == "attention" else 2)
    assert "basis_epsilon" not in config
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens()), expected, rtol=1e-4, atol=1e-4)
    fold_basis(model)
    folded = {name: value for name, value in model.named_parameters() if name.endswith(".M")}
    assert len(folded) == len(saved)
    for name, value in folded.items():  # saving gives exactly what folding gives
        assert torch.equal(saved[name.replace(".default", "")], value)


def test_an_adapter_that_is_loaded_into_a_basis_reads_as_it_did(tmp_path):
    trained = adapted(rank=3)
    trained.save_pretrained(tmp_path)
    expected = logits(trained, tokens())
    other = adapted(rank=3)
    fill(other, seed=5)
    other.load_adapter(str(tmp_path), "default", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(other, tokens()), expected, rtol=1e-6, atol=1e-6)


def test_the_state_is_taken_up_bit_for_bit():
    model, other = adapted(sites="attention+ffn"), adapted(sites="attention+ffn")
    fold_basis(other)
    fill(other, seed=3)
    state = {key: value.clone() for key, value in basis_state(model).items()}
    assert {key.rpartition(".")[2] for key in state} == {"basis", "coordinates"}
    load_basis_state(other, state)
    assert torch.equal(logits(other, tokens()), logits(model, tokens()))
    fold_basis(model)
    assert basis_state(model) == {}


def test_padding_has_no_part_in_the_basis():
    model = adapted()
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM")
    base = base_model(dtype=torch.float64)
    padded = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    rows = []
    for batch in BATCHES:
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 5), value=0)
        mask = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 5))
        rows.append({"input_ids": ids, "attention_mask": mask})
    initialize_basis(padded, rows)
    for one, other in zip(memories(model), memories(padded), strict=True):
        torch.testing.assert_close(one.basis, other.basis, rtol=1e-8, atol=1e-10)


def test_each_of_several_adapters_has_its_own():
    model = adapted()
    model.add_adapter("second", PrefixTuningPlusConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="not active"):
        initialize_basis(model, BATCHES, "second")
    model.base_model.set_adapter(["default", "second"])
    initialize_basis(model, BATCHES, "second")
    fill(model, "second", seed=4)
    both = logits(model, tokens())
    fold_basis(model)
    torch.testing.assert_close(logits(model, tokens()), both, rtol=1e-6, atol=1e-6)


def test_what_has_no_basis_is_refused():
    with pytest.raises(ValueError, match="PEFT model with a Prefix-Tuning"):
        initialize_basis(base_model(), BATCHES)
    fresh = get_peft_model(base_model(), PrefixTuningPlusConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="no token of the batches"):
        initialize_basis(fresh, [])
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="are zero on these rows"):
        initialize_basis(fresh, BATCHES)
    with pytest.raises(ValueError, match="basis_epsilon must be above 0, got 0"):
        PrefixTuningPlusConfig(basis_epsilon=0)


def test_the_pass_leaves_the_model_as_it_was():
    model = get_peft_model(base_model(), PrefixTuningPlusConfig(task_type="CAUSAL_LM"))
    model.train()
    training = {name: module.training for name, module in model.named_modules()}
    initialize_basis(model, BATCHES)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(not memory._forward_pre_hooks for memory in memories(model))
    assert all(memory.M.requires_grad for memory in memories(model))


def _scaled_queries(base: torch.nn.Module, factor: float) -> None:
    """Scale the queries of one layer by a factor, without changing the base's function."""
    attention = base.model.layers[1].self_attn
    attention.q_proj.weight.mul_(factor)
    attention.k_proj.weight.div_(factor)


def _scaled_outputs(base: torch.nn.Module, factor: float) -> None:
    attention = base.model.layers[1].self_attn
    attention.v_proj.weight.div_(factor)
    attention.o_proj.weight.mul_(factor)


def _trained(change: Callable[[torch.nn.Module, float], None], factor: float, basis: bool) -> float:
    """The loss after 30 steps of Adam at one rate."""
    base = base_model()
    with torch.no_grad():
        change(base, factor)
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", layers=[1])
    model = get_peft_model(base, config)
    if basis:
        initialize_basis(model, BATCHES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = tokens(batch=4, positions=12, seed=1)
    for _ in range(30):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("change", [_scaled_queries, _scaled_outputs])
def test_a_base_of_another_scale_trains_alike_at_the_same_rate(change):
    """The base computes the same function, so the adapter should learn the same; without the basis it does not."""
    plain = [_trained(change, factor, basis=False) for factor in (1, 100)]
    based = [_trained(change, factor, basis=True) for factor in (1, 100)]
    assert abs(math.log(based[1] / based[0])) < 0.05, (plain, based)
    assert abs(math.log(plain[1] / plain[0])) > 0.15, (plain, based)


def test_sft_trainer_trains_in_the_basis(tmp_path):
    """PEFT's convention: make the model, initialize it from batches, and give it to the trainer."""
    rows = [{"input_ids": row.tolist()} for row in tokens(batch=8, positions=6)]
    model = get_peft_model(base_model(), PrefixTuningPlusConfig(task_type="CAUSAL_LM"))
    initialize_basis(model, [{"input_ids": tokens(batch=8, positions=6)}])
    from .test_trl import ARGUMENTS, words

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path / "run"), **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=words(VOCAB),
    )
    trainer.train()
    expected = logits(trainer.model.eval(), tokens())
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, tokens()), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(base_model(), tokens()), atol=1e-3)
