"""Packed rows are full and whole, and examples in one row do not see each other; otherwise packing is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    FalconMambaConfig,
    Lfm2Config,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    RwkvConfig,
)

from prefixtune_cli import model as models
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.errors import ModelError
from prefixtune_cli.parallel.processes import joined
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import DataSection, Lora, PrefixTuningPlus, Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train import train
from prefixtune_cli.train.checks import check_packing
from prefixtune_cli.train.fit import Job, _trainer
from prefixtune_cli.train.prepare import Data, prepare_data
from prefixtune_cli.train.stop import StopRequest
from prefixtune_cli.train.trainer import SafeTrainer
from tests.adapter.architectures import ARCHITECTURES, GROUPED, NAMES, base_model
from tests.data.chat_templates import SENTENCES
from tests.train.test_run import recipe

METHODS = {"prefix-tuning-plus": PrefixTuningPlus(), "lora": Lora()}
SLOW = pytest.mark.slow
QUICK = {
    ("llama", "sdpa", "prefix-tuning-plus"),
    ("llama", "eager", "lora"),
    ("gpt2", "sdpa", "prefix-tuning-plus"),
    ("mistral", "sdpa", "prefix-tuning-plus"),
    ("gemma2", "eager", "prefix-tuning-plus"),
    ("gpt_neox", "sdpa", "lora"),
    ("mixtral", "sdpa", "prefix-tuning-plus"),
    ("deepseek_v3", "sdpa", "prefix-tuning-plus"),
}
CASES = [
    pytest.param(name, kernel, method, marks=[] if (name, kernel, method) in QUICK else SLOW)
    for name in NAMES
    for kernel in (*ARCHITECTURES[name].implementations, "flex_attention")
    for method in METHODS
]

# Models whose examples would see each other, and why.
WITHOUT_POSITIONS: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "mpt": MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=64),
    "afmoe": AfmoeConfig(
        **GROUPED, head_dim=8, sliding_window=4, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, experts_implementation="batched_mm",
    ),
}  # fmt: skip
# Refused up to transformers 5.23; from 5.24 on, it makes its mask from the positions.
FALCON: dict[str, PreTrainedConfig] = {
    name: FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, alibi=alibi
    )
    for name, alibi in (("falcon", False), ("falcon_alibi", True))
}
WITH_A_STATE: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64),
    "falcon_mamba": FalconMambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64),
    "rwkv": RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64),
    "lfm2": Lfm2Config(**GROUPED | {"layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next": Qwen3NextConfig(
        **GROUPED
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
        | {"num_experts": 4, "head_dim": 8}
    ),
}


@contextmanager
def trainer_of(made: Recipe, model: Any = None) -> Iterator[tuple[SafeTrainer, Data]]:
    """The trainer as `ptp train` makes it, and its data."""
    run_dir = RunDir(str(made.out))
    tokenizer = load_tokenizer(made.model)
    with joined(1) as processes:
        data = prepare_data(made, tokenizer, Silent())
        job = Job(made, run_dir, data, False, processes, StopRequest(run_dir), Silent())
        base = model or models.attach(models.load_base(made.model), made.adapter)
        yield _trainer(job, made, base, tokenizer, None), data


@pytest.fixture(scope="module")
def batch(random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The output of the trainer's own loader: two rows, each with several examples."""
    settings = recipe(
        random_base, colours, tmp_path_factory.mktemp("packed"),
        train={"packing": True, "batch_size": 2},
    )  # fmt: skip
    with trainer_of(settings) as (trainer, _):
        found = dict(next(iter(trainer.get_train_dataloader())))
    assert len(found["input_ids"]) == 1, "rows are laid end to end"
    assert len(found["cu_seq_lens_q"]) > 4
    return found


def adapted(base: nn.Module, method: str) -> nn.Module:
    """The base with an adapter whose weights are as large as the base's."""
    model = models.attach(base, METHODS[method])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def together_and_alone(
    model: nn.Module, batch: dict[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The logits of each example in the batch, and alone."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    given["input_ids"] = given["input_ids"] % model.config.vocab_size
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    packed = model(**given, use_cache=False).logits[0].split(lengths)
    examples = given["input_ids"].split(lengths, dim=1)
    return [
        (found, model(input_ids=ids, use_cache=False).logits[0])
        for found, ids in zip(packed, examples, strict=True)
    ]


@pytest.mark.parametrize(("name", "kernel", "method"), CASES)
def test_packed_examples_give_the_logits_that_they_give_alone(
    name: str, kernel: str, method: str, batch: dict[str, Any]
) -> None:
    longest = int(batch["cu_seq_lens_q"].diff().max())
    assert 4 < longest < 64, "longer than a sliding window, and within all positions"
    model = adapted(base_model(name, implementation=kernel), method)
    assert model.config._attn_implementation == kernel
    with torch.no_grad():
        for found, alone in together_and_alone(model, batch):
            assert alone.std() > 0.1
            torch.testing.assert_close(found, alone, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=SLOW) for n in ("gpt2", "mistral", "gemma3"))]
)
def test_gradients_of_packed_examples_are_the_sum_of_theirs_alone_with_checkpointing(
    name: str, method: str, batch: dict[str, Any]
) -> None:
    model = adapted(base_model(name), method).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs = together_and_alone(model, batch)
    packed, alone = (sum(pair[i].logsumexp(-1).sum() for pair in pairs) for i in (0, 1))
    expected = torch.autograd.grad(alone, trained)
    assert max(g.abs().max() for g in expected) > 1e-2
    for found, wanted in zip(torch.autograd.grad(packed, trained), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-2)


def conversations(count: int) -> list[str]:
    """JSON rows of one to six turns, with sentences from the sample data."""
    import json

    rng = Random(0)
    rows = load_rows("sample:chat", DataSection()).dataset
    said = [m["content"] for row in rows for m in row["messages"]] + SENTENCES
    found = []
    for _ in range(count):
        turns = [
            {"role": role, "content": " ".join(rng.choices(said, k=rng.randint(1, 4)))}
            for _ in range(rng.randint(1, 6))
            for role in ("user", "assistant")
        ]
        found.append(json.dumps({"messages": turns}) + "\n")
    return found


def test_packed_conversations_fill_the_rows_and_stay_whole(
    random_base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(conversations(600)))
    settings = recipe(
        random_base, file, tmp_path / "run",
        data={"max_length": 2048}, train={"packing": True},
    )  # fmt: skip
    with trainer_of(settings) as (trainer, data):
        rows = trainer.train_dataset[:]
    lengths = [len(ids) for ids in data.train["input_ids"]]
    assert max(lengths) < 2048, "nothing was cut before packing"
    assert max(lengths) > 4 * min(lengths)
    assert len(lengths) == 525
    filled = sum(lengths) / (len(rows["input_ids"]) * 2048)
    print(f"{filled:.2%} of {len(rows['input_ids'])} rows of 2048 positions filled")
    assert filled > 0.95
    examples: Counter[Any] = Counter()
    for ids, labels, parts in zip(*(rows[k] for k in ("input_ids", "labels", "seq_lengths")), strict=True):  # fmt: skip
        assert sum(parts) == len(ids) == len(labels) <= 2048
        at = 0
        for length in parts:
            examples[tuple(ids[at : at + length]), tuple(labels[at : at + length])] += 1
            at += length
    given = zip(data.train["input_ids"], data.train["labels"], strict=True)
    assert examples == Counter((tuple(ids), tuple(labels)) for ids, labels in given)


def packing(config: PreTrainedConfig, folder: Path, **model: Any) -> Recipe:
    """A recipe for a base that has no readable weights."""
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return Recipe.model_validate(
        {
            "model": {"name": str(folder), "bits": 32, "device": "cpu", **model},
            "data": {"train": "sample:chat"},
            "adapter": {"method": "lora"},
            "train": {"packing": True},
            "out": str(folder / "run"),
        }
    )


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_taken_where_the_examples_are_kept_apart(name: str, tmp_path: Path) -> None:
    check_packing(packing(ARCHITECTURES[name].config(), tmp_path))


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa", "flex_attention"])
def test_packing_is_refused_before_weights_load_whatever_the_kernel(
    attention: str, tmp_path: Path
) -> None:
    made = packing(WITHOUT_POSITIONS["afmoe"], tmp_path, attention=attention)
    with pytest.raises(ModelError, match=r"AfmoeForCausalLM.*positions.*Type --no-packing"):
        train(made)
    assert not Path(str(made.out)).exists()


@pytest.mark.parametrize("name", [*WITHOUT_POSITIONS, *WITH_A_STATE])
def test_packing_is_refused_where_examples_would_see_each_other(name: str, tmp_path: Path) -> None:
    config = (WITHOUT_POSITIONS | WITH_A_STATE)[name]
    made = packing(config, tmp_path)
    with pytest.raises(ModelError, match=r"train\.packing does not work with .*--no-packing"):
        check_packing(made)
    check_packing(made.model_copy(update={"train": made.train.model_copy(update={"packing": False})}))  # fmt: skip


def largest_leaks(config: PreTrainedConfig, batch: dict[str, Any]) -> list[float]:
    """How much each example of a row changes with those before it; the first has none and is left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        pairs = together_and_alone(model, batch)
    torch.testing.assert_close(*pairs[0], atol=2e-4, rtol=1e-3)
    return [float((found - alone).abs().max()) for found, alone in pairs[1:]]


@pytest.mark.parametrize("name", WITHOUT_POSITIONS)
def test_what_is_refused_for_its_mask_does_leak(name: str, batch: dict[str, Any]) -> None:
    assert min(largest_leaks(WITHOUT_POSITIONS[name], batch)) > 0.1


@pytest.mark.parametrize("name", FALCON)
def test_packing_is_taken_of_a_model_that_has_changed_exactly_where_it_does_not_leak(
    name: str, batch: dict[str, Any], tmp_path: Path
) -> None:
    leaks = largest_leaks(FALCON[name], batch)
    if max(leaks) < 1e-3:
        check_packing(packing(FALCON[name], tmp_path))
        return
    assert min(leaks) > 0.1
    with pytest.raises(ModelError, match=r"FalconForCausalLM.*positions.*Type --no-packing"):
        check_packing(packing(FALCON[name], tmp_path))
