"""Shared prefixes are computed once: fewer tokens, and the same scores as for whole sequences."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    MistralConfig,
    MptConfig,
    RwkvConfig,
)

from prefixtune_cli import model as models
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.shared_prefix import Request, Scored, log_likelihoods, plan, rows_of
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import Lora, ModelSection, PrefixTuning, PrefixTuningPlus

Tokens = tuple[int, ...]


def questions(seed: int = 0) -> list[Request]:
    """Two subjects with examples before each question and four choices each; and requests that share nothing."""
    draw = random.Random(seed)

    def some(count: int) -> Tokens:
        return tuple(draw.randrange(5, 200) for _ in range(count))

    found = []
    for examples in (some(60), some(45)):
        for _ in range(5):
            question = some(draw.randrange(4, 15))
            found += [Request(examples + question, some(draw.choice((1, 1, 3)))) for _ in range(4)]
    return [*found, *(Request(some(5), some(4)) for _ in range(3)), Request(some(150), some(2))]


def scores(model: Any, requests: list[Request], limit: BatchLimit, longest: int) -> list[Scored]:
    found: dict[int, Scored] = {}
    for some in log_likelihoods(model, requests, max_length=longest, pad_id=0, limit=limit):
        found.update(some)
    return [found[i] for i in range(len(requests))]


def one_by_one(model: Any, requests: list[Request], longest: int) -> list[Scored]:
    """The plain way: one forward pass for each sequence."""
    found = []
    for request in requests:
        tokens = (request.context + request.continuation)[-(longest + 1) :]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].float()
        target = torch.tensor(request.continuation)
        mine = logits.log_softmax(-1)[-len(target) :]
        chosen = mine.gather(-1, target[:, None]).sum().item()
        found.append((chosen, bool((mine.argmax(-1) == target).all())))
    return found


def agree(found: list[Scored], expected: list[Scored]) -> None:
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.fixture(scope="module")
def base(random_base: Path) -> Any:
    return models.load_base(ModelSection(name=str(random_base), bits=32)).eval()


def adapted(random_base: Path, section: Any) -> Any:
    torch.manual_seed(3)
    model = models.attach(models.load_base(ModelSection(name=str(random_base), bits=32)), section)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    "limit",
    [
        BatchLimit(2, 10_000, Silent()),
        BatchLimit(64, 300, Silent()),
        BatchLimit(99, 9999, Silent()),
    ],
    ids=["two rows", "few tokens", "all at once"],
)
def test_scores_are_those_of_whole_sequences_whatever_the_batch(
    base: Any, limit: BatchLimit
) -> None:
    requests = questions()
    agree(scores(base, requests, limit, 512), one_by_one(base, requests, 512))


@pytest.mark.parametrize("section", [PrefixTuningPlus(), Lora(), PrefixTuning()], ids=str)
def test_scores_of_an_adapted_model_are_those_of_whole_sequences(
    random_base: Path, base: Any, section: Any
) -> None:
    model, requests = adapted(random_base, section), questions()
    found = scores(model, requests, BatchLimit(7, 2000, Silent()), 512)
    agree(found, one_by_one(model, requests, 512))
    assert found != one_by_one(base, requests, 512)


@pytest.mark.parametrize("window", [32, 4096])
def test_a_sliding_window_allows_a_shared_prefix_only_while_it_does_not_slide(window: int) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    requests = questions()
    with counting_tokens(model) as counted:
        found = scores(model, requests, BatchLimit(7, 2000, Silent()), 512)
    shared = sum(counted) < sum(len(row.tokens) for row in rows_of(requests, 512))
    assert shared is (window == 4096)
    agree(found, one_by_one(model, requests, 512))


def test_learned_positions_are_counted_from_the_start_of_the_text() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    model = AutoModelForCausalLM.from_config(config).eval()
    requests = questions()
    found = scores(model, requests, BatchLimit(7, 2000, Silent()), 256)
    agree(found, one_by_one(model, requests, 256))


@pytest.mark.parametrize(
    "config",
    [
        MptConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
        GPTNeoConfig(
            vocab_size=256,
            hidden_size=32,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            window_size=16,
        ),
        RwkvConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, context_length=512),
    ],
    ids=["alibi", "local attention", "recurrent"],
)
def test_models_that_count_positions_by_themselves_share_nothing_and_see_no_padding(
    config: Any,
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    requests = questions()
    found = scores(model, requests, BatchLimit(7, 2000, Silent()), 256)
    agree(found, one_by_one(model, requests, 256))


def test_a_context_that_is_too_long_loses_its_beginning(base: Any) -> None:
    requests = questions()
    found = scores(base, requests, BatchLimit(7, 2000, Silent()), 40)
    agree(found, one_by_one(base, requests, 40))
    assert max(len(row.tokens) for row in rows_of(requests, 40)) == 40


@contextmanager
def counting_tokens(model: Any) -> Iterator[list[int]]:
    """Within the block, the list gets the number of tokens of every forward pass, without padding."""
    counted: list[int] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        ids, mask = given["input_ids"], given["attention_mask"]
        counted.append(int(mask[:, -ids.shape[1] :].sum()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()


def test_a_prefix_is_computed_once_and_choices_of_one_token_share_a_row(random_base: Path) -> None:
    model = models.load_base(ModelSection(name=str(random_base), bits=32)).eval()
    examples = tuple(range(10, 110))
    asked = [(200 + i, 300 + i) for i in range(8)]
    requests = [Request((*examples, *a), (c,)) for a in asked for c in (5, 6, 7, 8)]
    with counting_tokens(model) as counted:
        scores(model, requests, BatchLimit(100, 9999, Silent()), 512)
    assert sum(counted) == len(examples) + 8 * 2
    assert len(counted) == 2


def test_the_plan_computes_the_fewest_tokens_and_loses_no_request() -> None:
    requests = questions()
    rows = rows_of(requests, 512)
    jobs = plan(rows)
    assert sorted(i for job in jobs for row in job.rows for i in row.requests) == list(
        range(len(requests))
    )
    for job in jobs:
        assert len({row.tokens[: job.prefix] for row in job.rows}) == 1
        assert all(job.prefix <= row.first < len(row.tokens) for row in job.rows)
    whole = sum(len(row.tokens) for row in rows)
    shared = sum(job.prefix + sum(len(r.tokens) - job.prefix for r in job.rows) for job in jobs)
    assert shared < whole / 3


def test_questions_share_their_context_where_their_examples_differ() -> None:
    """As with new examples for every question: the choices of a question share them, but questions share nothing."""
    draw = random.Random(1)
    contexts = [tuple(draw.randrange(5, 200) for _ in range(120)) for _ in range(6)]
    requests = [Request(c, (i, i + 1, i + 2)) for c in contexts for i in (10, 20, 30, 40)]
    jobs = plan(rows_of(requests, 512))
    assert sorted(job.prefix for job in jobs) == [119] * 6
    assert all(len(job.rows) == 4 for job in jobs)


def test_nothing_is_shared_where_it_would_not_pay() -> None:
    requests = [Request((1, 2, i, 7, 8), (9, 9)) for i in range(3, 5)]
    assert {job.prefix for job in plan(rows_of(requests, 512))} == {0}


def test_a_batch_that_runs_out_of_memory_in_the_middle_of_a_prefix_is_halved(base: Any) -> None:
    requests = questions()
    expected = one_by_one(base, requests, 512)

    def refuse(_: Any, __: Any, given: dict[str, Any]) -> None:
        if len(given["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    handle = base.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        limit = BatchLimit(64, 9999, Silent())
        found = scores(base, requests, limit, 512)
    finally:
        handle.remove()
    agree(found, expected)
    assert limit.tokens < 9999


@pytest.mark.gpu
def test_a_gpu_scores_as_a_cpu_does_and_goes_on_after_a_real_lack_of_memory(
    random_base: Path, base: Any
) -> None:
    """All but 64 MiB of the memory is taken, so the first batch of 1,000 long sequences cannot fit."""
    expected = one_by_one(base.cpu(), questions(), 512)
    model = models.load_base(ModelSection(name=str(random_base), bits=32)).eval()
    assert model.device.type == "cuda"
    agree(scores(model, questions(), BatchLimit(7, 2000, Silent()), 512), expected)
    long = [Request(tuple(5 + (i * j) % 90 for j in range(500)), (7,)) for i in range(1, 1000)]
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 64 * 2**20, dtype=torch.uint8, device="cuda")
    limit = BatchLimit(1000, 10**6, Silent())
    found = scores(model, long, limit, 512)
    del taken
    assert limit.rows < 1000 or limit.tokens < 10**6
    agree(found[:3], one_by_one(base.cpu(), long[:3], 512))
