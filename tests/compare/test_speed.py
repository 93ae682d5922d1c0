"""The cost columns: everything is measured for every method, on one base, which stays unchanged."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
)

from prefixtune_cli.compare.metrics import (
    DECODE,
    FIRST_TOKEN,
    PEAK_MEMORY,
    TRAINING,
    Cost,
    Measured,
)
from prefixtune_cli.compare.speed import (
    BASE,
    Shape,
    Speeds,
    measure,
)
from prefixtune_cli.compare.speed import random_base as build_random_base
from prefixtune_cli.compare.speed.inference import Answer, cache_bytes
from prefixtune_cli.compare.speed.peak_memory import available_bytes, peak_memory
from prefixtune_cli.compare.speed.training import TrainingStep
from prefixtune_cli.compare.speed.turn import attached, in_float32, seconds_each
from prefixtune_cli.errors import ModelError, RecipeError, ResourceError, UsageError
from prefixtune_cli.model import AdapterSection
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import (
    Full,
    Lora,
    ModelSection,
    Peft,
    PrefixTuning,
    PrefixTuningPlus,
)

METHODS: list[tuple[str, AdapterSection]] = [
    ("prefix-tuning-plus", PrefixTuningPlus()),
    ("lora", Lora(r=2)),
    ("prefix-tuning", PrefixTuning(num_virtual_tokens=5)),
    ("full", Full()),
]
SHAPE = Shape(rounds=2, batch_size=2, length=16, prompt_tokens=24, new_tokens=3, seconds=0)
BYTES_A_TOKEN = 2 * 2 * 2 * 16 * 2  # layers, keys and values, kv heads, width, bytes of bfloat16


class Collecting(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.steps.append((done, total))


@pytest.fixture
def base(random_base: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.bfloat16)
    return found.eval()


@pytest.fixture(scope="module")
def speeds(random_base: Path) -> Speeds:
    """All four methods on a base from the configuration."""
    section = ModelSection(name=str(random_base), device="cpu")
    return measure(section, METHODS, SHAPE, base=build_random_base(section), reporter=Silent())


def prompt(tokens: int = 24) -> torch.Tensor:
    return torch.arange(tokens)[None] * 7 % 200


def test_every_cost_of_every_method_is_there(speeds: Speeds) -> None:
    assert list(speeds.contestants) == [label for label, _ in METHODS]
    for cost in [speeds.base, *speeds.contestants.values()]:
        assert not isinstance(cost, str)
        for measured in (
            cost.training_tokens_per_second,
            cost.decode_tokens_per_second,
            cost.time_to_first_token_seconds,
        ):
            assert measured is not None
            assert 0 < measured.low <= measured.median <= measured.high
        assert cost.peak_memory_gib is None or cost.peak_memory_gib > 0.1
        assert cost.interleaved
        assert cost.prompt_tokens == 24


def test_ratios_are_taken_round_by_round(speeds: Speeds) -> None:
    lora, base = speeds.rounds["lora"], speeds.rounds[BASE]
    assert all(len(lora[m]) == len(base[m]) == 2 for m in (TRAINING, DECODE, FIRST_TOKEN))
    cost = speeds.contestants["lora"]
    assert not isinstance(cost, str)
    expected = sorted(a / b for a, b in zip(lora[TRAINING], base[TRAINING], strict=True))
    assert cost.training_ratio is not None
    assert (cost.training_ratio.low, cost.training_ratio.high) == tuple(expected)
    assert cost.training_ratio.median == pytest.approx(sum(expected) / 2)
    # Speed is the inverse of waiting time.
    slower = [a / b for a, b in zip(lora[FIRST_TOKEN], base[FIRST_TOKEN], strict=True)]
    assert cost.first_token_ratio is not None
    assert cost.first_token_ratio.high == pytest.approx(1 / min(slower))
    assert speeds.base.training_ratio is None


def test_ratios_to_lora_are_taken_round_by_round(speeds: Speeds) -> None:
    lora, base = speeds.contestants["lora"], speeds.base
    assert isinstance(lora, Cost)
    assert lora.decode_over_lora == Measured(1.0, 1.0, 1.0)
    assert lora.decode_ratio is not None and base.decode_over_lora is not None
    assert base.decode_over_lora.low == pytest.approx(1 / lora.decode_ratio.high)


def test_the_rounds_interleave_and_the_order_rotates(speeds: Speeds) -> None:
    labels = [BASE, *(label for label, _ in METHODS)]
    assert [sorted(order) for order in speeds.order] == [sorted(labels)] * 2
    first, second = speeds.order
    assert second == [*first[1:], first[0]]


def test_the_cache_is_that_of_the_formula_and_prefix_tuning_adds_its_tokens(speeds: Speeds) -> None:
    found = {label: cost.kv_cache_bytes for label, cost in speeds.contestants.items()}  # type: ignore[union-attr]
    assert speeds.base.kv_cache_bytes == 24 * BYTES_A_TOKEN
    assert found["prefix-tuning-plus"] == found["lora"] == found["full"] == 24 * BYTES_A_TOKEN
    assert found["prefix-tuning"] == (24 + 5) * BYTES_A_TOKEN


def test_what_is_trained_and_saved_is_counted(speeds: Speeds, base: PreTrainedModel) -> None:
    heads, width, layers = 4, 16, 2
    memory = 2 * layers * heads * width * width  # at attention and beside the FFN
    prefix = layers * 2 * 5 * 2 * width
    assert speeds.parameters[BASE] == speeds.parameters["full"] == base.num_parameters()
    assert speeds.parameters["prefix-tuning-plus"] == memory
    assert speeds.parameters["prefix-tuning"] == prefix
    assert speeds.adapter_bytes["prefix-tuning-plus"] == 4 * memory
    assert speeds.adapter_bytes["prefix-tuning"] == 4 * prefix
    assert speeds.adapter_bytes["lora"] == 4 * speeds.parameters["lora"]
    assert BASE not in speeds.adapter_bytes


def test_the_base_is_as_it_was(base: PreTrainedModel) -> None:
    weights = {name: (p.dtype, p.detach().clone()) for name, p in base.named_parameters()}
    modules = [name for name, _ in base.named_modules()]
    with torch.no_grad():
        before = base(prompt()).logits
    base.lm_head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    shape = replace(SHAPE, rounds=1)
    measure(ModelSection(device="cpu"), METHODS, shape, base=base.train(), reporter=Silent())
    assert torch.equal(torch.get_rng_state(), state)
    assert base.training
    base.eval()
    for name, parameter in base.named_parameters():
        dtype, values = weights[name]
        assert parameter.dtype == dtype
        assert torch.equal(parameter, values), name
        assert parameter.grad is None
        assert parameter.requires_grad is (name != "model.embed_tokens.weight")  # tied to the head
    assert [name for name, _ in base.named_modules()] == modules
    assert "forward" not in vars(base) or base.forward.__func__ is type(base).forward
    with torch.no_grad():
        assert torch.equal(base(prompt()).logits, before)


@pytest.mark.parametrize(("label", "adapter"), METHODS[:3], ids=[label for label, _ in METHODS[:3]])
def test_an_answer_is_that_of_peft_and_not_the_bases(
    base: PreTrainedModel, label: str, adapter: AdapterSection
) -> None:
    base.float()
    alone = Answer(base, prompt())
    alone.begin()
    with attached(base, adapter) as model:
        assert isinstance(model, PeftModel)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        answer = Answer(model, prompt())
        answer.begin()
        first = int(answer.token)
        with torch.no_grad():
            expected = model(input_ids=prompt(), attention_mask=torch.ones_like(prompt())).logits
        torch.testing.assert_close(answer.logits, expected[:, -1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(answer.logits, alone.logits, atol=1e-3)
        answer.go_on(4)
        whole = model.generate(
            input_ids=prompt(),
            attention_mask=torch.ones_like(prompt()),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert first == int(whole[0, 24])
        assert int(answer.token) == int(whole[0, 28])
        assert answer.cache.get_seq_length() - 28 == (5 if label == "prefix-tuning" else 0)


@pytest.mark.parametrize(
    "adapter",
    [
        *(adapter for _, adapter in METHODS[:3]),
        Peft(method="prompt-tuning", config={"num_virtual_tokens": 3}),
    ],
    ids=lambda adapter: adapter.method,
)
def test_answers_at_once_are_those_that_each_prompt_gets_alone(
    base: PreTrainedModel, adapter: AdapterSection
) -> None:
    base.float()
    prompts = torch.randint(200, (3, 24), generator=torch.Generator().manual_seed(0))
    with attached(base, adapter) as model:

        def logits(prompts: torch.Tensor) -> torch.Tensor:
            answer = Answer(model, prompts)
            answer.begin()
            answer.go_on(3)
            return answer.logits

        alone = torch.cat([logits(one[None]) for one in prompts])
        torch.testing.assert_close(logits(prompts), alone, rtol=1e-3, atol=1e-4)


def test_the_cache_is_told_for_one_of_the_sequences_that_are_decoded_at_once(
    random_base: Path, speeds: Speeds
) -> None:
    section = ModelSection(name=str(random_base), device="cpu")
    shape = replace(SHAPE, rounds=1, prompts=3)
    found = measure(section, METHODS[:1], shape, base=build_random_base(section), reporter=Silent())
    assert found.base.prompts == 3
    assert found.base.kv_cache_bytes == speeds.base.kv_cache_bytes


@pytest.mark.parametrize(
    ("method", "config"), [("ia3", {}), ("prompt-tuning", {"num_virtual_tokens": 3})]
)
def test_other_methods_of_peft_are_measured(
    base: PreTrainedModel, method: str, config: dict[str, Any]
) -> None:
    adapter = Peft(method=method, config=config)
    shape = replace(SHAPE, rounds=1)
    found = measure(
        ModelSection(device="cpu"), [(method, adapter)], shape, base=base, reporter=Silent()
    )
    cost = found.contestants[method]
    assert not isinstance(cost, str)
    assert cost.kv_cache_bytes == (24 + config.get("num_virtual_tokens", 0)) * BYTES_A_TOKEN
    with attached(base.float(), adapter) as model:
        answer = Answer(model, prompt())
        answer.begin()
        with torch.no_grad():
            expected = model(input_ids=prompt(), attention_mask=torch.ones_like(prompt())).logits
        torch.testing.assert_close(answer.logits, expected[:, -1], rtol=1e-4, atol=1e-5)


def test_the_loss_by_chunks_is_the_models_own(base: PreTrainedModel) -> None:
    """On more tokens than one chunk of the projection has."""
    ids = torch.randint(200, (3, 700))
    base.float().requires_grad_(True)
    base(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in base.parameters()]
    base.zero_grad(set_to_none=True)
    step = TrainingStep(base, base, ids, optimizer="adamw_torch", autocast=False)
    with step.ready(checkpointing=False):
        output = base(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        for parameter, expected in zip(base.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_step_takes_gradients_of_what_is_trained_and_changes_nothing(
    base: PreTrainedModel,
) -> None:
    with attached(base, PrefixTuningPlus()) as model:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in trained.items()}
        ids = torch.randint(200, (2, 16))
        step = TrainingStep(model, base, ids, optimizer="adamw_torch", autocast=True)
        with step.ready(checkpointing=True):
            step()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
            assert all(p.dtype == torch.float32 for p in trained.values())
            assert base.is_gradient_checkpointing
            assert step.optimizer is not None
            assert len(step.optimizer.state) == len(trained)
        assert all(torch.equal(p, before[n]) for n, p in trained.items())
        assert not base.is_gradient_checkpointing


def test_the_bases_step_goes_down_to_the_embeddings_output(base: PreTrainedModel) -> None:
    base.requires_grad_(False)
    reached: list[torch.Tensor] = []
    embeddings = base.get_input_embeddings()
    step = TrainingStep(
        base, base, torch.randint(200, (2, 16)), optimizer="adamw_torch", autocast=True
    )
    with step.ready(checkpointing=False):
        hook = embeddings.register_forward_hook(
            lambda *a: a[2].register_hook(reached.append) and None
        )
        step()
        hook.remove()
    assert [gradient.shape for gradient in reached] == [(2, 16, 64)]
    assert reached[0].abs().sum() > 0
    assert step.optimizer is None


def test_a_method_that_fails_is_marked_and_the_others_go_on(base: PreTrainedModel) -> None:
    modules = [name for name, _ in base.named_modules()]
    contestants: list[tuple[str, AdapterSection]] = [
        ("no such layer", PrefixTuningPlus(layers=[7])),
        ("half way", Lora(target_modules=r".*(q_proj|input_layernorm)")),
        ("too large", Lora(r=10**13)),
        ("plus", PrefixTuningPlus()),
    ]
    reporter = Collecting()
    section = ModelSection(device="cpu")
    found = measure(section, contestants, SHAPE, base=base, reporter=reporter)
    failed = {label: told for label, told in found.contestants.items() if isinstance(told, str)}
    assert list(failed) == ["no such layer", "half way", "too large"]
    assert "layers names [7]" in failed["no such layer"]
    assert "LlamaRMSNorm" in failed["half way"]
    assert failed["too large"].startswith(
        "The memory does not suffice for training on 2 rows of 16 tokens"
    )
    assert [text.split(" cannot be")[0] for text in reporter.warnings] == list(failed)
    assert sorted(found.rounds) == ["base", "plus"]
    assert [sorted(order) for order in found.order] == [["base", "plus"]] * 2
    assert [name for name, _ in base.named_modules()] == modules
    assert reporter.steps[-1] == (15, 15)


def test_prefix_tuning_with_gradient_checkpointing_is_marked(base: PreTrainedModel) -> None:
    shape = replace(SHAPE, rounds=1, gradient_checkpointing=True)
    section = ModelSection(device="cpu")
    found = measure(section, METHODS[1:3], shape, base=base, reporter=Silent())
    failed = [label for label, cost in found.contestants.items() if isinstance(cost, str)]
    assert failed == ["prefix-tuning"]


@pytest.mark.parametrize("adapter", [adapter for _, adapter in METHODS[:2]])
def test_adapters_at_once_are_all_trained(base: PreTrainedModel, adapter: AdapterSection) -> None:
    modules = [name for name, _ in base.named_modules()]
    with attached(base, adapter) as model:
        one = sum(p.requires_grad for p in model.parameters())
    with attached(base, adapter, 3) as model:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 3 * one
        ids = torch.randint(200, (2, 16))
        step = TrainingStep(model, base, ids, optimizer="adamw_torch", autocast=True)
        with step.ready(checkpointing=False):
            step()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert [name for name, _ in base.named_modules()] == modules


def test_memories_at_once_add(base: PreTrainedModel) -> None:
    with attached(base.float(), PrefixTuningPlus(), 3) as model, torch.no_grad():
        together = model(input_ids=prompt()).logits
        adapters = [
            [p for name, p in model.named_parameters() if f".{adapter}." in name]
            for adapter in model.peft_config
        ]
        for first, second, third in zip(*adapters, strict=True):
            first += second + third
            second.zero_()
            third.zero_()
        torch.testing.assert_close(model(input_ids=prompt()).logits, together)
        model.base_model.set_adapter("default")
        torch.testing.assert_close(model(input_ids=prompt()).logits, together)


def test_what_cannot_be_active_beside_its_like_is_marked_and_the_others_go_on(
    base: PreTrainedModel, speeds: Speeds
) -> None:
    modules = [name for name, _ in base.named_modules()]
    shape = replace(SHAPE, rounds=1, adapters=2)
    found = measure(ModelSection(device="cpu"), METHODS, shape, base=base, reporter=Silent())
    failed = {label: cost for label, cost in found.contestants.items() if isinstance(cost, str)}
    assert list(failed) == ["prefix-tuning", "full"]
    for label, told in failed.items():
        assert told.startswith(f"Method {label} cannot have two active adapters")
    for label in ("prefix-tuning-plus", "lora"):
        cost = found.contestants[label]
        assert not isinstance(cost, str)
        assert cost.adapters == 2
        assert found.parameters[label] == 2 * speeds.parameters[label]
        assert found.adapter_bytes[label] == 2 * speeds.adapter_bytes[label]
    assert [name for name, _ in base.named_modules()] == modules


def test_full_that_does_not_fit_main_memory_is_refused_before_it_is_tried() -> None:
    if available_bytes() is None:
        pytest.skip("this system does not say what memory it has left")
    huge = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).expand(10**14))
    with pytest.raises(ResourceError, match=r"takes 1303851\.\d GiB more"), in_float32([huge]):
        pass


def test_a_base_that_does_not_fit_ends_the_measurement(base: PreTrainedModel) -> None:
    shape = Shape(rounds=1, batch_size=10**12, length=10**3)
    with pytest.raises(ResourceError, match="Not even the base by itself can be measured"):
        measure(ModelSection(device="cpu"), [], shape, base=base, reporter=Silent())


def test_more_tokens_than_positions_are_refused(base: PreTrainedModel) -> None:
    shape = Shape(prompt_tokens=2040, new_tokens=8)
    with pytest.raises(UsageError, match="Ask for 5 fewer"):
        measure(ModelSection(device="cpu"), METHODS, shape, base=base, reporter=Silent())


def test_an_unknown_optimizer_is_named(base: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match="adamw_toch"):
        TrainingStep(base, base, prompt(), optimizer="adamw_toch", autocast=False)


def test_a_4_bit_base_needs_no_checkpoint_and_full_is_marked(random_base: Path) -> None:
    section = ModelSection(name=str(random_base), bits=4, device="cpu")
    shape = replace(SHAPE, rounds=1)
    found = measure(section, METHODS, shape, base=build_random_base(section), reporter=Silent())
    failed = {label: told for label, told in found.contestants.items() if isinstance(told, str)}
    assert failed == {"full": "Quantized weights have no gradient: method full cannot train them."}
    assert found.base.kv_cache_bytes == 24 * BYTES_A_TOKEN


def test_the_known_models_are_built_without_a_network() -> None:
    found = build_random_base(ModelSection(name="smollm2-135m", device="cpu"))
    assert found.num_parameters() == 134_515_008
    assert found.dtype == torch.bfloat16
    weights = found.get_input_embeddings().weight
    assert 0 < float(weights.detach().float().std()) < 1


def test_a_base_that_the_memory_cannot_hold_is_one_error(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=10**13, hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ResourceError, match="does not fit into the memory"):
        build_random_base(ModelSection(name=str(tmp_path), device="cpu"))


def test_a_checkpoint_that_is_quantized_cannot_be_drawn(tmp_path: Path) -> None:
    config = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="quantized by its checkpoint"):
        build_random_base(ModelSection(name=str(tmp_path), device="cpu"))


def test_all_tensors_of_a_cache_count_once() -> None:
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 3, 4)
    cache.update(keys, keys.clone(), 0)
    assert cache_bytes(cache) == 2 * keys.nbytes
    cache.update(keys, keys.clone(), 0)
    assert cache_bytes(cache) == 4 * keys.nbytes


def test_a_sliding_window_keeps_its_own_tokens_alone() -> None:
    config = MistralConfig(sliding_window=4, num_hidden_layers=1)
    cache = DynamicCache(config=config)
    keys = torch.zeros(1, 2, 9, 4)
    cache.update(keys, keys.clone(), 0)
    assert cache_bytes(cache) == 2 * keys[:, :, :3].nbytes


def test_work_is_repeated_until_it_has_taken_long_enough() -> None:
    calls: list[int] = []
    each = seconds_each(lambda: calls.append(1), 0.01, torch.device("cpu"))
    assert len(calls) > 1
    assert each * len(calls) >= 0.01


def test_the_peak_is_that_of_the_block() -> None:
    def peak(mebibytes: int) -> int | None:
        with peak_memory(torch.device("cpu")) as found:
            torch.ones(mebibytes, 2**20, dtype=torch.uint8)
        return found.nbytes

    large, small = peak(300), peak(1)
    if large is None or small is None:
        pytest.skip("this system's record of memory cannot be started over")
    assert 250 * 2**20 < large - small < 350 * 2**20


@pytest.mark.gpu
def test_a_gpu_is_measured_with_its_allocators_peak(random_base: Path) -> None:
    section = ModelSection(name=str(random_base), device="cuda")
    found = measure(section, METHODS, SHAPE, base=build_random_base(section), reporter=Silent())
    assert not any(isinstance(cost, str) for cost in found.contestants.values())
    assert found.base.kv_cache_bytes == 24 * BYTES_A_TOKEN
    peaks = {label: rounds[PEAK_MEMORY] for label, rounds in found.rounds.items()}
    # float32 weights, gradients and two moments: no method takes as much as full.
    assert min(peaks["full"]) > max(peaks["prefix-tuning-plus"])
    assert 0 < max(peaks[BASE]) < 1  # GiB
