"""A batch with one adapter a row: every row gives what its adapter gives alone, as with PEFT's LoRA."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from prefixtune_cli.adapter import MemoryLayer, PrefixTuningPlusConfig
from tests.adapter.architectures import NAMES, base_model, fill, logits, tokens

ROWS = ["a", "__base__", "b", "a"]
# All of them give different outputs.
DIFFERENT: dict[str, dict[str, object]] = {
    "a": {"sites": "attention+ffn"},
    "b": {"sites": "attention+ffn", "feature_map": "gelu", "normalize_query": True},
    "low rank": {"sites": "attention+ffn", "rank": 2},
    "one head": {"sites": "attention", "share_heads": "kv"},
    "trained map": {"sites": "attention", "feature_map": "mlp", "feature_dim": 5},
    "wider map": {"sites": "attention", "feature_map": "mlp", "feature_dim": 6},
    "blocks": {"sites": "ffn", "block_size": 16},
    "top": {"sites": "attention+ffn", "layers": [2]},
}


def with_adapters(
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    adapters: dict[str, dict[str, object]] = DIFFERENT,
) -> PeftModel:
    (first, options), *others = adapters.items()
    model = get_peft_model(base_model(name, dtype=dtype), PrefixTuningPlusConfig(**options), first)
    for other, options in others:
        model.add_adapter(other, PrefixTuningPlusConfig(**options))
    for seed, adapter in enumerate(adapters):
        fill(model, adapter, seed=seed)
    return model.eval()


def alone(model: PeftModel, rows: list[str], ids: torch.Tensor, **given: torch.Tensor):
    """The logits of each row, computed alone."""
    found = []
    for i, row in enumerate(rows):
        own = {key: value[i : i + 1] for key, value in given.items()}
        if row == "__base__":
            with model.disable_adapter():
                found.append(logits(model, ids[i : i + 1], **own))
        else:
            model.set_adapter(row)
            found.append(logits(model, ids[i : i + 1], **own))
    return torch.cat(found)


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_what_its_adapter_gives_alone(name):
    model = with_adapters(name, adapters={key: DIFFERENT[key] for key in ("a", "b")})
    ids = tokens(4)
    expected = alone(model, ROWS, ids)
    assert not torch.allclose(expected[:1], alone(model, ["__base__"], ids), atol=0.1)
    model.set_adapter("b")
    torch.testing.assert_close(logits(model, ids, adapter_names=ROWS), expected)
    torch.testing.assert_close(logits(model, ids), alone(model, ["b"] * 4, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_every_form_share_a_batch(dtype):
    model = with_adapters(dtype=dtype)
    rows = [*DIFFERENT, "__base__", "a"]
    ids = tokens(len(rows))
    mask = torch.ones_like(ids)
    mask[::2, :3] = 0
    expected = alone(model, rows, ids, attention_mask=mask)
    found = logits(model, ids, attention_mask=mask, adapter_names=rows)
    exact = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.15}
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], **exact)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}],
    ids=str,
)
def test_each_row_generates_as_its_adapter_does_alone(how):
    model = with_adapters()
    rows = ["a", "blocks", "__base__", "one head"]
    ids = tokens(4)

    def said(given: torch.Tensor, **names: object) -> list[list[int]]:
        mask = torch.ones_like(given)
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **how, **names}
        return model.generate(input_ids=given, attention_mask=mask, **settings).tolist()

    expected = []
    for i, row in enumerate(rows):
        if row == "__base__":
            with model.disable_adapter():
                expected += said(ids[i : i + 1])
        else:
            model.set_adapter(row)
            expected += said(ids[i : i + 1])
    assert said(ids, adapter_names=rows) == expected


def test_modules_that_are_saved_with_an_adapter_follow_its_rows():
    options = {"sites": "attention", "modules_to_save": ["lm_head"]}
    model = with_adapters(adapters={"a": options, "b": options})
    with torch.no_grad():
        for seed, adapter in enumerate(("a", "b")):
            torch.manual_seed(seed)
            weight = model.get_base_model().lm_head.modules_to_save[adapter].weight
            weight.copy_(torch.randn_like(weight))
    ids = tokens(4)
    expected = alone(model, ROWS, ids)
    torch.testing.assert_close(logits(model, ids, adapter_names=ROWS), expected)


def test_names_that_do_not_fit_are_refused_and_leave_nothing_behind():
    model = with_adapters()
    model.set_adapter("a")
    expected = logits(model, tokens(2))
    for names, said in {
        ("a", "c"): "non-existing adapter.*: c. There are a, b,",
        ("a",): "same as the number of inputs, but got 1 and 2",
        (): "a name for each row",
    }.items():
        with pytest.raises(ValueError, match=said):
            logits(model, tokens(2), adapter_names=list(names))
    with pytest.raises(ValueError, match="a name for each row, got 'ab'"):
        logits(model, tokens(2), adapter_names="ab")
    with pytest.raises(ValueError, match="inputs, but got 2 and 4"):
        model(inputs_embeds=torch.zeros(4, 4, 32), adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(input_ids=tokens(2), adapter_names=["a", "b"])
    assert torch.equal(logits(model.eval(), tokens(2)), expected)


def test_one_product_a_layer_and_site_reads_all_adapters_that_are_alike():
    alike = {name: {"sites": "attention+ffn"} for name in ("a", "b", "c")}
    model = with_adapters(adapters=alike)
    layers = [module for module in model.modules() if isinstance(module, MemoryLayer)]
    for layer in layers:
        layer.read_by_row(["a", "b", "__base__", "c"])
        assert len(layer.reads()) == 1
        layer.read_by_row(None)
        assert layer.reads() == [layer.active_memories()]
