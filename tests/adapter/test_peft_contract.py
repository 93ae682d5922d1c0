"""What PEFT promises for every method: names, deleting, switching, status, dtypes, unloading."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType

from prefixtune_cli.adapter import Memory, MemoryLayer, PrefixTuningPlusConfig

from .architectures import (
    NAMES,
    SITES,
    adapted_modules,
    attention,
    base_model,
    fill,
    logits,
    tokens,
)


def with_adapters(*names: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A Llama with these adapters, each different; the first one is active."""
    first, *others = names
    model = base_model(dtype=dtype)
    model = get_peft_model(model, PrefixTuningPlusConfig(**options), adapter_name=first)
    for name in others:
        model.add_adapter(name, PrefixTuningPlusConfig(**options))
    for seed, name in enumerate(names):
        fill(model, name, seed=seed)
    return model.eval()


def outputs(model: PeftModel, *names: str) -> dict[str, torch.Tensor]:
    results = {}
    for name in names:
        model.set_adapter(name)
        results[name] = logits(model, tokens())
    return results


def trainable(model: torch.nn.Module) -> set[str]:
    """The adapters that have a parameter with a gradient; all parameters of an adapter must agree."""
    found: dict[str, set[bool]] = {}
    for key, parameter in model.named_parameters():
        adapter = "base"
        if "prefix_tuning_plus_memory." in key:
            adapter = key.split("prefix_tuning_plus_memory.")[1].split(".")[0]
        found.setdefault(adapter, set()).add(parameter.requires_grad)
    assert all(len(values) == 1 for values in found.values())
    return {name for name, values in found.items() if values == {True}}


# Names


@SITES
def test_adapters_whose_names_contain_each_other_keep_apart(tmp_path, sites):
    names = ("a", "adapter", "adapter_1", "adapter_10", "prefix")
    model = with_adapters(*names, sites=sites)
    expected = outputs(model, *names)
    for name in names:
        state = get_peft_model_state_dict(model, adapter_name=name)
        modules = adapted_modules("llama", sites)
        assert len(state) == len(modules)
        for module in modules:
            memories = model.get_base_model().get_submodule(module).prefix_tuning_plus_memory
            key = f"base_model.model.{module}.prefix_tuning_plus_memory.M"
            assert torch.equal(state[key], memories[name].M)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "a", adapter_name="a")
    for name in names[1:]:
        loaded.load_adapter(tmp_path / name, name)
    for name, value in outputs(loaded, *names).items():
        assert torch.equal(value, expected[name])

    model.delete_adapter("adapter_1")
    rest = [name for name in names if name != "adapter_1"]
    assert list(model.peft_config) == rest
    for name, value in outputs(model, *rest).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("name", ["M", "M_down", "M_up", "W_phi", "b_phi"])
def test_adapter_named_like_a_parameter_is_refused(name):
    """A parameter of this name would make PEFT drop it from every other adapter's file."""
    model = base_model()
    with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        get_peft_model(model, PrefixTuningPlusConfig(), name)
    assert not any(isinstance(module, MemoryLayer) for module in model.modules())
    model = with_adapters("one")
    with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        model.add_adapter(name, PrefixTuningPlusConfig())
    assert list(model.peft_config) == ["one"]


def test_names_refused_are_those_of_the_memorys_parameters():
    found = set()
    for rank in (None, 2):
        model = with_adapters("one", feature_map="mlp", rank=rank)
        memory = attention(model, "llama", 0).prefix_tuning_plus_memory["one"]
        found |= {name for name, _ in memory.named_parameters()}
    assert found == {"M", "M_down", "M_up", "W_phi", "b_phi"} == set(Memory.parameter_names)


# Switching and deleting


@SITES
def test_disable_adapter_gives_the_base_and_then_the_adapter_back(sites):
    base = logits(base_model(), tokens())
    model = with_adapters("default", sites=sites)
    adapted = logits(model, tokens())
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), base)
    assert torch.equal(logits(model, tokens()), adapted)
    assert not torch.allclose(adapted, base, atol=0.1)
    assert trainable(model) == {"default"}


@SITES
def test_set_adapter_switches_whom_the_model_reads(sites):
    model = with_adapters("one", "two", sites=sites)
    results = outputs(model, "one", "two")
    for name in ("one", "two"):
        alone = with_adapters("one", "two", sites=sites)
        alone.set_adapter(name)
        assert torch.equal(logits(alone, tokens()), results[name])
        assert alone.active_adapters == [name]
    assert not torch.allclose(results["one"], results["two"], atol=0.1)
    with pytest.raises(ValueError, match="three"):
        model.set_adapter("three")


@SITES
def test_deleting_the_active_adapter_activates_another(sites):
    model = with_adapters("one", "two", sites=sites)
    expected = outputs(model, "one", "two")
    model.set_adapter("one")
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert list(model.peft_config) == ["two"]
    assert model.active_adapters == ["two"]
    assert torch.equal(logits(model, tokens()), expected["two"])
    assert not [key for key in model.state_dict() if ".one." in key]


@SITES
def test_deleting_an_inactive_adapter_leaves_the_active_one(sites):
    model = with_adapters("one", "two", sites=sites)
    expected = outputs(model, "two", "one")
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    assert model.active_adapters == ["one"]
    assert torch.equal(logits(model, tokens()), expected["one"])
    assert not [key for key in model.state_dict() if ".two." in key]


def test_deleting_an_unknown_adapter_is_refused_and_changes_nothing():
    model = with_adapters("one")
    expected = logits(model, tokens())
    with pytest.raises(ValueError, match="unknown does not exist"):
        model.delete_adapter("unknown")
    assert torch.equal(logits(model, tokens()), expected)


@SITES
def test_deleting_the_last_adapter_leaves_the_base(sites):
    model = with_adapters("one", sites=sites)
    model.delete_adapter("one")
    assert model.active_adapters == []
    # PeftModel itself cannot run without an adapter, but the model inside it can.
    assert torch.equal(logits(model.base_model.model, tokens()), logits(base_model(), tokens()))


def test_deleted_name_can_be_used_again():
    model = with_adapters("one", "two")
    model.delete_adapter("two")
    model.add_adapter("two", PrefixTuningPlusConfig(feature_map="mlp"))
    model.set_adapter("two")
    assert torch.equal(logits(model, tokens()), logits(base_model(), tokens()))


# requires_grad


@SITES
def test_only_the_active_adapter_asks_for_gradients(sites):
    model = with_adapters("one", sites=sites)
    assert trainable(model) == {"one"}
    model.add_adapter("two", PrefixTuningPlusConfig(sites=sites))
    assert trainable(model) == {"one"}
    model.add_adapter("three", PrefixTuningPlusConfig(sites=sites, layers=[1]))
    assert trainable(model) == {"one"}
    for name in ("two", "three", "one"):
        model.set_adapter(name)
        assert trainable(model) == {name}
    model.base_model.set_adapter(["one", "two"])
    assert trainable(model) == {"one", "two"}
    model.set_adapter("one")
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == {"one"}
    model.set_adapter("two", inference_mode=True)
    assert trainable(model) == set()


@SITES
def test_adapter_named_default_on_new_layers_stays_frozen_while_inactive(sites):
    # `default` is also a layer's own default for the name of the active adapter.
    model = with_adapters("one", layers=[0], sites=sites)
    model.add_adapter("default", PrefixTuningPlusConfig(sites=sites, layers=[2]))
    assert trainable(model) == {"one"}
    fill(model, "default")
    before = with_adapters("one", layers=[0], sites=sites)
    assert torch.equal(logits(model, tokens()), logits(before, tokens()))


@SITES
def test_only_adapter_parameters_change_in_three_optimizer_steps(sites):
    model = with_adapters("one", "two", feature_map="mlp", sites=sites).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        batch = tokens(seed=step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == {key for key in before if "prefix_tuning_plus_memory.one." in key}


# Status, counts


@SITES
def test_layer_and_model_status_tell_what_is_there(sites):
    model = with_adapters("one", "two", sites=sites)
    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == [
        f"model.{module}" for module in adapted_modules("llama", sites)
    ]
    for layer in layers:
        kind = "MemoryLayer" if layer.name.endswith("self_attn") else "FeedForwardMemoryLayer"
        assert layer.module_type == f"prefix_tuning_plus.{kind}"
        assert layer.enabled is True
        assert layer.active_adapters == ["one"]
        assert layer.merged_adapters == []
        assert layer.requires_grad == {"one": True, "two": False}
        assert layer.available_adapters == ["one", "two"]
        assert layer.devices == {"one": ["cpu"], "two": ["cpu"]}

    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "PrefixTuningPlusModel"
    assert status.peft_types == {"one": "PREFIX_TUNING_PLUS", "two": "PREFIX_TUNING_PLUS"}
    assert status.trainable_params == len(layers) * 4 * 8 * 8
    assert status.num_adapter_layers == len(layers)
    assert status.enabled is True
    assert status.active_adapters == ["one"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"one": True, "two": False}

    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_trainable_parameters_are_h_times_dphi_times_dhead_a_layer():
    model = with_adapters("default")
    base = sum(p.numel() for p in base_model().parameters())
    assert model.get_nb_trainable_parameters() == (3 * 4 * 8 * 8, base + 3 * 4 * 8 * 8)


@SITES
def test_tuner_lists_the_modules_it_adapted(sites):
    model = with_adapters("one", layers=[0], sites=sites)
    model.add_adapter("two", PrefixTuningPlusConfig(sites=sites, layers="last:1"))
    expected = adapted_modules("llama", sites, [0, 2])
    assert model.targeted_module_names == expected


# dtypes and initial values


@SITES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapter_is_float32_or_in_the_bases_dtype_by_autocast_adapter_dtype(
    dtype, autocast_adapter_dtype, tmp_path, sites
):
    def dtypes(model: PeftModel, adapter: str) -> set[torch.dtype]:
        return {p.dtype for n, p in model.named_parameters() if f"memory.{adapter}." in n}

    expected = {torch.float32 if autocast_adapter_dtype else dtype}
    how = {"autocast_adapter_dtype": autocast_adapter_dtype}
    config = PrefixTuningPlusConfig(sites=sites, feature_map="mlp")
    model = get_peft_model(base_model(dtype=dtype), config, **how)
    model.add_adapter("added", PrefixTuningPlusConfig(sites=sites, feature_map="mlp"), **how)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", **how)
    for name in ("default", "added", "loaded"):
        assert dtypes(model, name) == expected
    assert logits(model, tokens()).dtype == dtype
    loaded = PeftModel.from_pretrained(base_model(dtype=dtype), tmp_path, **how)
    assert dtypes(loaded, "default") == expected


@pytest.mark.gpu
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_live_on_the_bases_device(tmp_path, low_cpu_mem_usage):
    model = get_peft_model(base_model().cuda(), PrefixTuningPlusConfig(feature_map="mlp"))
    model.add_adapter("added", PrefixTuningPlusConfig(feature_map="mlp"))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.device.type for p in model.parameters()} == {"cuda"}


@SITES
@pytest.mark.parametrize("name", NAMES)
def test_init_weights_false_changes_the_output_from_the_start(name, sites):
    base = logits(base_model(name), tokens())
    model = get_peft_model(
        base_model(name), PrefixTuningPlusConfig(sites=sites, init_weights=False)
    )
    assert not torch.allclose(logits(model, tokens()), base, atol=1e-2)


# Merging and unloading


@SITES
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_with_the_reason_and_changes_nothing(method, sites):
    model = with_adapters("default", sites=sites)
    expected = logits(model, tokens())
    with pytest.raises(NotImplementedError, match="φ is not linear") as error:
        getattr(model, method)()
    assert "unload()" in str(error.value)
    assert torch.equal(logits(model, tokens()), expected)


@SITES
@pytest.mark.parametrize("name", NAMES)
def test_unload_gives_the_base_back_without_a_trace(name, sites):
    base = base_model(name)
    expected = logits(base, tokens())
    modules = {key: id(module) for key, module in base.named_modules()}
    attributes = {key: set(vars(module)) for key, module in base.named_modules()}
    state = {key: value.clone() for key, value in base.state_dict().items()}

    model = get_peft_model(base, PrefixTuningPlusConfig(sites=sites, feature_map="mlp"))
    model.add_adapter("other", PrefixTuningPlusConfig(sites=sites, layers=[0]))
    fill(model)
    fill(model, "other")
    changed = logits(model, tokens())
    assert not torch.allclose(changed, expected, atol=0.1)

    unloaded = model.unload()
    assert unloaded is base
    assert {key: id(module) for key, module in base.named_modules()} == modules
    assert {key: set(vars(module)) for key, module in base.named_modules()} == attributes
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert torch.equal(logits(base, tokens()), expected)

    again = get_peft_model(base, PrefixTuningPlusConfig(sites=sites, feature_map="mlp"))
    assert torch.equal(logits(again, tokens()), expected)
    fill(again)
    assert not torch.allclose(logits(again, tokens()), expected, atol=0.1)


@SITES
def test_base_can_take_lora_after_unload_and_lora_cannot_be_added_beside(sites):
    model = with_adapters("default", sites=sites)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    lora = get_peft_model(model.unload(), LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(lora, tokens()), logits(base_model(), tokens()))
    assert not any(isinstance(module, MemoryLayer) for module in lora.modules())


@SITES
def test_hooks_of_accelerate_stay_with_the_module_that_they_are_on(sites):
    """A base spread over devices has a hook on every module, and accelerate can remove them."""
    base = base_model()
    for module in base.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    model = get_peft_model(base, PrefixTuningPlusConfig(sites=sites))
    fill(model)
    hooked = logits(model, tokens())
    assert torch.equal(hooked, logits(with_adapters("default", sites=sites), tokens()))
    remove_hook_from_submodules(base)
    assert not any(hasattr(module, "_hf_hook") for module in base.modules())
    assert torch.equal(logits(model, tokens()), hooked)


@SITES
def test_inference_mode_freezes_the_adapter(sites):
    model = get_peft_model(base_model(), PrefixTuningPlusConfig(sites=sites, inference_mode=True))
    assert trainable(model) == set()


def test_type_is_told_by_the_model():
    model = with_adapters("default")
    assert model.peft_type is PeftType.PREFIX_TUNING_PLUS
    assert model.active_peft_config is model.peft_config["default"]
