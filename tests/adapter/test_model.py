"""What an adapted model does on all architectures: decode, pad, train, checkpoint, and stay within its layers."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)

from prefixtune_cli.adapter import MemoryLayer, PrefixTuningPlusConfig

from .architectures import (
    ARCHITECTURES,
    LAYERS,
    NAMES,
    SITES,
    adapted_modules,
    attention,
    base_model,
    feed_forward,
    fill,
    logits,
    tokens,
)

ELU_AND_MLP = pytest.mark.parametrize("feature_map", ["elu", "mlp"])


def adapted(
    name: str = "llama", *, dtype: torch.dtype = torch.float32, **options: object
) -> PeftModel:
    """A model whose adapter `default` changes its output."""
    model = get_peft_model(base_model(name, dtype=dtype), PrefixTuningPlusConfig(**options))
    fill(model)
    return model


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "prefix_tuning_plus_memory." in n}


def loss(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, labels=input_ids).loss


def adapted_layers(model: torch.nn.Module, name: str) -> list[int]:
    """The layers that have a memory, at either site."""
    layers = (attention(model, name, n) for n in range(LAYERS))
    beside = (feed_forward(model, name, n) for n in range(LAYERS))
    pairs = enumerate(zip(layers, beside, strict=True))
    return [n for n, pair in pairs if any(isinstance(module, MemoryLayer) for module in pair)]


# Decoding and padding


@SITES
@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_equals_the_full_forward(name, sites):
    model = adapted(name, sites=sites)
    input_ids = tokens(positions=9)
    full = logits(model, input_ids)
    assert not torch.allclose(full, logits(base_model(name), input_ids), atol=0.1)
    cache, steps = None, []
    with torch.no_grad():
        for chunk in (input_ids[:, :4], *input_ids[:, 4:].split(1, dim=1)):
            out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_the_argmax_of_full_forwards(name):
    model = adapted(name)
    prompt = tokens(positions=4)
    generated = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=None,
    )
    expected = prompt
    for _ in range(6):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)


@SITES
@pytest.mark.parametrize("name", NAMES)
def test_left_padding_changes_no_real_token(name, sites):
    model = adapted(name, sites=sites)
    input_ids = tokens(batch=1, positions=6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), input_ids], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    result = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(result[:, 3:], logits(model, input_ids), rtol=1e-4, atol=1e-4)


# Training


@SITES
@ELU_AND_MLP
@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_adapter_parameter_and_no_other(name, feature_map, sites):
    model = get_peft_model(
        base_model(name), PrefixTuningPlusConfig(sites=sites, feature_map=feature_map)
    )
    parameters = adapter_parameters(model)
    each = 3 if feature_map == "mlp" else 1
    assert len(parameters) == each * len(adapted_modules(name, sites))
    base = {n: p for n, p in model.named_parameters() if n not in parameters}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(p.requires_grad for p in parameters.values())
    assert not any(p.requires_grad for p in base.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)

    logits(model, tokens())  # a pass without gradients must not leave a trace
    for step in range(3):
        optimizer.zero_grad()
        loss(model, tokens(seed=step)).backward()
        for key, parameter in parameters.items():
            # The gradient of φ_W goes through M, which starts at zero.
            waits_for_m = step == 0 and not key.endswith(".M")
            assert (torch.count_nonzero(parameter.grad) == 0) == waits_for_m, (step, key)
        assert all(p.grad is None for p in base.values())
        optimizer.step()
        logits(model, tokens())

    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) == (key in base), key


@SITES
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant, sites):
    model = adapted(name, feature_map="mlp", sites=sites).train()
    forwards = []
    attention(model, name, 1).register_forward_hook(lambda *args: forwards.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss(model, tokens()).backward()
        return {n: p.grad.clone() for n, p in adapter_parameters(model).items()}

    expected = gradients()
    assert len(forwards) == 1
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    forwards.clear()
    actual = gradients()
    assert len(forwards) == 2  # the backward pass computes the layer again
    for key, gradient in expected.items():
        assert torch.count_nonzero(gradient) > 0
        torch.testing.assert_close(
            actual[key], gradient, msg=lambda text, key=key: f"{key}: {text}"
        )


@SITES
def test_training_lowers_the_loss_and_leaves_the_base_where_it_was(sites):
    model = get_peft_model(base_model(), PrefixTuningPlusConfig(sites=sites))
    input_ids = tokens(batch=8, positions=6)
    start = loss(model, input_ids).item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, input_ids).backward()
        optimizer.step()
    assert loss(model, input_ids).item() < start / 4
    with model.disable_adapter():
        assert loss(model, input_ids).item() == start


# dtypes


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@ELU_AND_MLP
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_autocast_read_what_float32_reads(name, feature_map, mode):
    """Compared at the first layer's attention, where only the dtype of the query differs."""
    changes, gradients = {}, {}
    for dtype in ("float32", mode):
        model = adapted(
            name,
            feature_map=feature_map,
            dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        )
        assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
        layer, outputs = attention(model, name, 0), []
        layer.register_forward_hook(lambda m, args, out, to=outputs: to.append(out[0].detach()))
        cast = (
            torch.autocast("cpu", torch.bfloat16)
            if dtype == "autocast"
            else contextlib.nullcontext()
        )
        with cast:
            loss(model, tokens()).backward()
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=tokens())
        if dtype != "float32":
            assert outputs[0].dtype == torch.bfloat16
        changes[dtype] = (outputs[0] - outputs[1]).float()
        gradients[dtype] = layer.prefix_tuning_plus_memory["default"].M.grad
        assert gradients[dtype].dtype == torch.float32
        assert torch.isfinite(gradients[dtype]).all()
    assert relative_error(changes[mode], changes["float32"]) < 0.05


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# Layers


@SITES
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2]),
        ("last:1", [2]),
        ("last:2", [1, 2]),
        ("last:3", [0, 1, 2]),
        ([0], [0]),
        ([2, 0], [0, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_layers_chooses_whom_to_adapt(name, layers, expected, sites):
    model = get_peft_model(base_model(name), PrefixTuningPlusConfig(sites=sites, layers=layers))
    assert adapted_layers(model, name) == expected


@SITES
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 3], r"layers names \[3\].*attention layers are 0 to 2"),
        ([7, 9], r"layers names \[7, 9\].*attention layers are 0 to 2"),
        ("last:4", r"layers is last:4.*has 3 attention layers"),
    ],
    ids=str,
)
def test_layer_that_the_model_lacks_is_refused(layers, message, sites):
    model = base_model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PrefixTuningPlusConfig(sites=sites, layers=layers))
    assert adapted_layers(model, "llama") == []

    with_another = adapted(sites=sites)
    with pytest.raises(ValueError, match=message):
        with_another.add_adapter("other", PrefixTuningPlusConfig(sites=sites, layers=layers))
    assert list(with_another.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["self_attn"], [0, 1, 2]),
        (["0.self_attn", "2.self_attn"], [0, 2]),
        (r".*\.1\.self_attn", [1]),
    ],
    ids=str,
)
def test_target_modules_narrows_the_choice_as_elsewhere_in_peft(target_modules, expected):
    config = PrefixTuningPlusConfig(target_modules=target_modules)
    assert adapted_layers(get_peft_model(base_model(), config), "llama") == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target_modules": ["mlp"]},
            "'mlp'.* is an FFN, and sites is attention. Set sites to ffn",
        ),
        ({"target_modules": ["self_attn", "mlp"]}, "'mlp'.* is an FFN"),
        ({"target_modules": r".*\.1\.mlp"}, "1.mlp is an FFN"),
        ({"target_modules": ["self_attn"], "sites": "ffn"}, "is attention, and sites is ffn"),
        ({"target_modules": ["0.self_attn"], "layers": [1]}, r"none of the layers .*\[1\]"),
        ({"target_modules": ["q_proj"]}, "neither attention nor an FFN, .*called self_attn, mlp"),
        ({"target_modules": ["self_attn", "atention"]}, "'atention'.*not found"),
        ({"target_modules": "all-linear"}, "linear layers, .*Leave target_modules out"),
    ],
    ids=str,
)
def test_target_modules_that_would_be_left_out_are_refused(options, said):
    model = base_model()
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, PrefixTuningPlusConfig(**options))
    assert not any(isinstance(module, MemoryLayer) for module in model.modules())


# State dicts


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    "options", [{}, {"layers": [1]}, {"sites": "attention"}, {"sites": "ffn", "layers": "last:1"}]
)
def test_a_state_dict_tells_which_modules_are_adapted(options, compiled):
    wide = adapted(sites="attention+ffn")
    state = get_peft_model_state_dict(wide)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    base = base_model()
    model = torch.compile(base) if compiled else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # PEFT warns about the differences
        inject_adapter_in_model(
            PrefixTuningPlusConfig(**{"sites": "attention+ffn", **options}), model, state_dict=state
        )
    with torch.no_grad():
        for key, value in state.items():
            base.get_parameter(key.replace("memory.", "memory.default.")).copy_(value)
    assert torch.equal(logits(base, tokens()), logits(wide, tokens()))


def test_a_compiled_base_is_adapted_without_a_state_dict_too():
    base = base_model()
    inject_adapter_in_model(PrefixTuningPlusConfig(layers=[0, 2]), torch.compile(base))
    assert adapted_layers(base, "llama") == [0, 2]


def test_a_state_dict_of_another_architecture_is_refused():
    state = {"model.layers.0.self_attn.q_proj.prefix_tuning_plus_memory.M": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"q_proj, which is neither attention nor an FFN"):
        inject_adapter_in_model(PrefixTuningPlusConfig(), base_model(), state_dict=state)


@SITES
@pytest.mark.parametrize("name", NAMES)
def test_no_backward_pass_runs_below_the_lowest_adapted_layer(name, sites):
    """Below the adapted layers, no tensor is saved for a backward pass, and no output has or gets a gradient."""

    def saved_and_required(layers: str) -> tuple[list[int], list[bool]]:
        config = PrefixTuningPlusConfig(layers=layers, sites=sites)
        model = get_peft_model(base_model(name), config).train()
        prefix = ARCHITECTURES[name].attention.rpartition(".")[0]
        saved, required, inside = [0] * LAYERS, [False] * LAYERS, []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if inside:
                saved[inside[-1]] += 1
            return tensor

        def leave(number: int, output: object) -> None:
            inside.pop()
            hidden = output[0] if isinstance(output, tuple) else output
            required[number] = hidden.requires_grad

        for number in range(LAYERS):
            block = model.get_base_model().get_submodule(prefix.format(number))
            block.register_forward_pre_hook(lambda *args, number=number: inside.append(number))
            block.register_forward_hook(
                lambda module, args, output, number=number: leave(number, output)
            )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(model, tokens()).backward()
        return saved, required

    saved, required = saved_and_required("last:1")
    assert saved[:2] == [0, 0]
    assert saved[2] > 0
    assert required == [False, False, True]
    saved, required = saved_and_required("all")
    assert min(saved) > 0
    assert required == [True, True, True]


# Several adapters, several models


@pytest.mark.parametrize("name", NAMES)
@SITES
def test_active_adapters_add(name, sites):
    model = adapted(name, dtype=torch.float64, sites=sites)
    share_heads = "query" if sites == "ffn" else "kv"
    other = PrefixTuningPlusConfig(feature_map="mlp", share_heads=share_heads, sites=sites)
    model.add_adapter("other", other)
    fill(model, "other", seed=1)
    outputs = []
    # No adapter has changed the input before this layer.
    first = (feed_forward if sites == "ffn" else attention)(model, name, 0)
    first.register_forward_hook(
        lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with model.disable_adapter():
        logits(model, tokens())
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        logits(model, tokens())
    base, one, other, both = outputs
    assert not torch.allclose(one, other, atol=0.1)
    torch.testing.assert_close(both, base + (one - base) + (other - base), rtol=1e-9, atol=1e-9)


def test_two_adapters_with_one_map_are_the_sum_of_their_memories():
    model = adapted()
    for seed, other in enumerate(("other", "sum"), start=1):
        model.add_adapter(other, PrefixTuningPlusConfig())
        fill(model, other, seed=seed)
    with torch.no_grad():
        for number in range(LAYERS):
            memories = attention(model, "llama", number).prefix_tuning_plus_memory
            memories["sum"].M.copy_(memories["default"].M + memories["other"].M)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, tokens())
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, tokens()), both, rtol=1e-4, atol=1e-4)


@SITES
def test_adapters_that_read_alike_are_read_at_once_and_each_gets_the_gradient_of_their_sum(sites):
    model = adapted(dtype=torch.float64, sites=sites)
    model.add_adapter("alike", PrefixTuningPlusConfig(sites=sites))
    model.add_adapter("low rank", PrefixTuningPlusConfig(sites=sites, rank=2))
    model.add_adapter("other map", PrefixTuningPlusConfig(sites=sites, feature_map="gelu"))
    for trained in ("trained", "trained too"):
        model.add_adapter(trained, PrefixTuningPlusConfig(sites=sites, feature_map="mlp"))
    names = ["default", "alike", "low rank", "other map", "trained", "trained too"]
    for seed, name in enumerate(names):
        fill(model, name, seed=seed)
    model.base_model.set_adapter(names)
    layer = (feed_forward if sites == "ffn" else attention)(model, "llama", 0)
    memories = layer.prefix_tuning_plus_memory
    together = [[memories[name] for name in names[:3]], *([memories[name]] for name in names[3:])]
    assert layer.reads() == together
    model(input_ids=tokens()).logits.square().sum().backward()
    assert memories["default"].M.grad.abs().max() > 0
    torch.testing.assert_close(memories["alike"].M.grad, memories["default"].M.grad)
    low = memories["low rank"]
    torch.testing.assert_close(low.M_up.grad, low.M_down.detach().mT @ memories["alike"].M.grad)


def test_adapters_on_different_layers_keep_to_their_own():
    model = adapted(layers=[0])
    model.add_adapter("top", PrefixTuningPlusConfig(layers=[2]))
    fill(model, "top", seed=1)
    assert adapted_layers(model, "llama") == [0, 2]

    only_top = get_peft_model(base_model(), PrefixTuningPlusConfig(layers=[2]), "top")
    fill(only_top, "top", seed=1)
    expected = {"default": logits(adapted(layers=[0]), tokens()), "top": logits(only_top, tokens())}
    for name in ("default", "top", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model, tokens()), expected[name])
    model.delete_adapter("default")
    model.set_adapter("top")
    assert torch.equal(logits(model, tokens()), expected["top"])


@SITES
def test_deepcopy_is_independent_of_the_original(sites):
    model = adapted(sites=sites)
    before = logits(model, tokens())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens()), before)
    fill(twin, seed=1)
    assert torch.equal(logits(model, tokens()), before)
    assert not torch.allclose(logits(twin, tokens()), before, atol=0.1)

    twin = copy.deepcopy(model)
    twin.unload()
    assert torch.equal(logits(model, tokens()), before)
    twin = copy.deepcopy(model)
    model.unload()
    assert torch.equal(logits(twin, tokens()), before)


def test_two_models_in_one_process_do_not_influence_each_other():
    alone = {seed: logits(base_model(seed=seed), tokens()) for seed in (0, 1)}
    one = get_peft_model(base_model(seed=0), PrefixTuningPlusConfig())
    two = get_peft_model(base_model(seed=1), PrefixTuningPlusConfig(feature_map="mlp"))
    fill(one, seed=2)
    assert torch.equal(logits(two, tokens()), alone[1])
    changed = logits(one, tokens())
    fill(two, seed=3)
    two.delete_adapter("default")
    assert torch.equal(logits(one, tokens()), changed)
    with one.disable_adapter():
        assert torch.equal(logits(one, tokens()), alone[0])


def test_attention_module_answers_through_the_layer_around_it():
    model = get_peft_model(base_model(), PrefixTuningPlusConfig())
    layer = attention(model, "llama", 1)
    assert layer.layer_idx == 1
    assert layer.q_proj is layer.base_layer.q_proj
    for name in ("no_such_thing", "_prefix_tuning_plus_layer"):
        with pytest.raises(AttributeError, match=name):
            getattr(layer, name)
