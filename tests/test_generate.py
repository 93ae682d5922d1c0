"""Answers: batched, streamed, from a file, with and without the adapter; and the chat at the terminal."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prefixtune_cli import generate
from prefixtune_cli import model as models
from prefixtune_cli.cli.app import app
from prefixtune_cli.errors import DataError, RecipeError, UsageError
from prefixtune_cli.generate import answer_batched, answer_streamed, conversation
from prefixtune_cli.pointed import choose
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuningPlus
from prefixtune_cli.sampling import Sampling

GREEDY = Sampling(max_new_tokens=6)
CASES = Path(__file__).parents[2] / "shared" / "cases"


@pytest.fixture(scope="module")
def adapter(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the base's output."""
    section = ModelSection(name=str(random_base))
    attached = models.attach(models.load_base(section), PrefixTuningPlus())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=3)
    folder = tmp_path_factory.mktemp("generate") / "adapter"
    attached.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speaker(random_base: Path, adapter: Path) -> generate.Speaker:
    return load(random_base, adapter)


def load(base: Path, adapter: Path | None = None, **how: Any) -> generate.Speaker:
    adapters = [] if adapter is None else [str(adapter)]
    [who] = choose(model=str(base), adapters=adapters, typed={"bits": 32})
    return generate.load_speaker(who, **how)


def test_answers_do_not_depend_on_the_batch_that_they_share(speaker: generate.Speaker) -> None:
    prompts = [
        speaker.prompt(conversation(text, None)) for text in ("a", "a much longer text", "b c")
    ]
    alone = [
        answer_batched(speaker.model, speaker.tokenizer, [prompt], end_id=None, sampling=GREEDY)[0]
        for prompt in prompts
    ]
    together = answer_batched(
        speaker.model, speaker.tokenizer, prompts, end_id=None, sampling=GREEDY, batch_size=2
    )
    assert together == alone
    assert len(set(alone)) > 1


def test_a_streamed_answer_joins_to_the_batched_one(speaker: generate.Speaker) -> None:
    messages = conversation("Say it", "You are brief.")
    pieces = list(answer_streamed(speaker, messages, sampling=GREEDY))
    whole = answer_batched(
        speaker.model, speaker.tokenizer, [speaker.prompt(messages)], end_id=None, sampling=GREEDY
    )
    assert "".join(pieces) == whole[0] != ""


def test_an_error_while_streaming_reaches_the_caller(speaker: generate.Speaker) -> None:
    endless = conversation("x " * 4, None)
    with pytest.raises(Exception, match="strictly positive"):
        list(answer_streamed(speaker, endless, sampling=_Broken()))


class _Broken(Sampling):
    def arguments(self, *_: object) -> dict[str, object]:
        return {"max_new_tokens": 2, "do_sample": True, "temperature": -1.0}


def test_without_the_adapter_the_base_speaks(
    speaker: generate.Speaker, random_base: Path, adapter: Path
) -> None:
    def said(no_adapter: bool, folder: Path | None) -> str:
        loaded = load(random_base, folder, no_adapter=no_adapter)
        return "".join(answer_streamed(loaded, conversation("Hello", None), sampling=GREEDY))

    base = said(False, None)
    assert said(True, adapter) == base
    assert said(False, adapter) != base
    speaker.use_adapter = False
    assert "".join(answer_streamed(speaker, conversation("Hello", None), sampling=GREEDY)) == base
    speaker.use_adapter = True


def test_generation_stops_at_the_token_that_training_taught(speaker: generate.Speaker) -> None:
    prompt = speaker.prompt(conversation("Hello", None))

    def said(end_id: int | None) -> list[int]:
        [answer] = answer_batched(
            speaker.model, speaker.tokenizer, [prompt], end_id=end_id, sampling=GREEDY
        )
        return list(speaker.tokenizer(answer, add_special_tokens=False)["input_ids"])

    whole = said(None)
    assert len(whole) > 1
    assert len(said(whole[0])) < len(whole)
    assert speaker.end_id == speaker.tokenizer.eos_token_id


def test_greedy_is_not_bent_by_the_models_generation_config(speaker: generate.Speaker) -> None:
    messages = conversation("Hello", None)
    plain = "".join(answer_streamed(speaker, messages, sampling=GREEDY))
    settings = speaker.model.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 9.0, 1
    try:
        assert "".join(answer_streamed(speaker, messages, sampling=GREEDY)) == plain
    finally:
        settings.repetition_penalty, settings.no_repeat_ngram_size = 1.0, 0


def test_closing_a_stream_ends_the_generation(speaker: generate.Speaker) -> None:
    pieces = answer_streamed(
        speaker, conversation("Hello", None), sampling=Sampling(max_new_tokens=100_000)
    )
    next(pieces)
    pieces.close()  # returns only after the thread has ended


def test_sampling_repeats_by_seed(random_base: Path) -> None:
    def said(seed: int) -> str:
        loaded = load(random_base, seed=seed)
        sampling = Sampling(max_new_tokens=12, temperature=1.0)
        return "".join(answer_streamed(loaded, conversation("Hello", None), sampling=sampling))

    assert said(1) == said(1) != said(2)


def test_a_file_is_answered_row_by_row_and_keeps_its_columns(
    random_base: Path, adapter: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.jsonl"
    rows = [
        {"prompt": "One?", "id": 7},
        {"question": "Two?", "answer": "left out"},
        {"messages": [{"role": "user", "content": "Three?"}]},
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    arguments = ["generate", "--model", str(random_base), "--adapter", str(adapter)]
    done = CliRunner().invoke(
        app, [*arguments, "--data", str(asked), "--out", str(out), "--max-new-tokens", "4"]
    )
    assert done.exit_code == 0, done.output
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    said = [row.pop("generated") for row in answered]
    assert answered == rows
    assert all(isinstance(text, str) for text in said)
    assert sorted(tmp_path.iterdir()) == [out, asked]
    one = CliRunner().invoke(app, [*arguments, "--prompt", "One?", "--max-new-tokens", "4"])
    assert one.stdout.strip() == said[0].strip()


def test_a_prompt_is_answered_as_often_as_asked(random_base: Path, tmp_path: Path) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "One?", "id": 7}, {"prompt": "And another one?", "id": 8}]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["generate", "--model", str(random_base), "--data", str(asked), "--out", str(out)]
    drawn = ["--samples", "3", "--temperature", "1.5", "--max-new-tokens", "6"]
    done = CliRunner().invoke(app, [*arguments, *drawn])
    assert done.exit_code == 0, done.output
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    said = [row.pop("generated") for row in answered]
    assert answered == [row for row in rows for _ in range(3)]
    assert len(set(said)) == 6


def test_a_half_surrogate_of_an_unused_column_comes_out_as_it_went_in(
    random_base: Path, tmp_path: Path
) -> None:
    asked, out = CASES / "half-surrogate.jsonl", tmp_path / "answers.jsonl"
    if not asked.exists():
        pytest.skip(f"{asked} is not here")
    arguments = ["generate", "--model", str(random_base), "--data", str(asked), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    answered = [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert answered == [json.loads(line)["id"] for line in asked.read_text().splitlines()]


def test_a_file_is_asked_in_the_tokens_that_training_saw(
    speaker: generate.Speaker, tmp_path: Path
) -> None:
    from prefixtune_cli.data.load import load_rows
    from prefixtune_cli.data.question import questions
    from prefixtune_cli.data.row_encoder import RowEncoder
    from prefixtune_cli.recipe.schema import DataSection

    call = {"from": "function_call", "value": '{"name": "room", "arguments": {}}'}
    turns = [{"from": "human", "value": "Hi"}, call, {"from": "observation", "value": "12"}]
    end = {"from": "gpt", "value": "Room 12."}
    row = {"system": "Be kind.", "tools": '[{"name": "room"}]', "conversations": [*turns, end]}
    pair = {"instruction": "Hi", "output": "Ho", "system": "s", "history": [["a", "b"]]}
    for i, each in enumerate((row, pair)):
        file = tmp_path / f"{i}.jsonl"
        file.write_text(json.dumps(each) + "\n", encoding="utf-8")
        rows = load_rows(str(file), DataSection())
        for template in (speaker.template, None) if i else (speaker.template,):
            asker = dataclasses.replace(speaker, template=template)
            ((_, asked),) = questions(str(file), {})
            tokenizer = copy.deepcopy(speaker.tokenizer)
            if template is None:
                tokenizer.chat_template = None
            (trained,) = map(RowEncoder(rows, tokenizer, DataSection()).prompt, rows.dataset)
            assert asker.prompt(asked) == trained.prompt_ids


def test_a_row_without_a_prompt_is_told_by_line(random_base: Path, tmp_path: Path) -> None:
    from prefixtune_cli.data.question import questions

    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "One?"}\n{"ask": "Two?"}\n')
    with pytest.raises(DataError, match=r"asked\.jsonl, line 2: no prompt; the columns are ask"):
        list(questions(str(asked), {}))


def test_chat_remembers_resets_and_switches_the_adapter_off(
    random_base: Path, adapter: Path
) -> None:
    arguments = ["chat", "--model", str(random_base), "--adapter", str(adapter)]
    done = CliRunner().invoke(
        app,
        [*arguments, "--max-new-tokens", "4"],
        input="Hello\nHello\n/reset\nHello\n/base\n/reset\nHello\n\n/quit\n",
    )
    assert done.exit_code == 0, done.output
    first, _, after_reset, base = done.stdout.splitlines()[:4]
    assert first == after_reset
    assert base != first
    assert "the base alone" in done.stderr


def test_the_base_has_a_conversation_of_its_own(random_base: Path, adapter: Path) -> None:
    def said(typed: str) -> list[str]:
        arguments = ["chat", "--model", str(random_base), "--adapter", str(adapter)]
        done = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "4"], input=typed)
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()

    alone = said("/base\nHello\nAgain\n")
    assert said("Hi\n/base\nHello\n/adapter\nHi\n/base\nAgain\n")[1::2] == alone


def test_a_chat_on_a_pipe_has_no_prompts_and_tells_its_commands(random_base: Path) -> None:
    typed = "/help\n/rest\n/quit\n"
    done = CliRunner().invoke(app, ["chat", "--model", str(random_base)], input=typed)
    assert done.exit_code == 0, done.output
    assert "you:" not in done.output
    assert done.stdout == ""
    assert "There is no /rest." in done.stderr
    assert done.stderr.count("/reset forgets both") == 3


@pytest.mark.parametrize("arguments", [["chat"], ["generate", "--prompt", "-"]], ids=" ".join)
def test_stdin_that_is_not_utf_8_is_told_in_words(arguments: list[str], random_base: Path) -> None:
    typed = [*arguments, "--model", str(random_base)]
    done = CliRunner().invoke(app, typed, input="Un café\n".encode("latin1"))
    assert isinstance(done.exception, UsageError)
    assert "has byte 0xe9 after 'Un caf'" in str(done.exception)


def test_a_model_without_an_adapter_has_none_to_switch(random_base: Path) -> None:
    done = CliRunner().invoke(
        app, ["chat", "--model", str(random_base)], input="/adapter\n/base\n/quit\n"
    )
    assert done.exit_code == 0, done.output
    assert done.stderr.count("has no adapter to switch") == 2
    assert "with its adapter" not in done.stderr


def test_wrong_bits_are_told_like_those_of_a_recipe(random_base: Path) -> None:
    done = CliRunner().invoke(
        app, ["generate", "--model", str(random_base), "--bits", "5", "--prompt", "x"]
    )
    assert isinstance(done.exception, RecipeError)
    assert "model.bits must be 4, 8, 16 or 32, got 5" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --prompt TEXT or --data FILE"),
        (["--prompt", "x", "--data", "y"], "either --prompt TEXT or --data FILE"),
        (["--data", "y"], "--data FILE and --out FILE belong together"),
        (
            ["--prompt", "x", "--samples", "2", "--temperature", "1"],
            "--samples 2 takes --data FILE",
        ),
        (["--data", "x", "--out", "y", "--samples", "2"], "Type --temperature 0.8"),
        (["--prompt", "x", "--out", "y"], "--data FILE and --out FILE belong together"),
        (["--prompt", "x"], "either --run FOLDER, or --model NAME"),
        (["--prompt", "x", "--model", "tiny", "--temperature", "-1"], "--temperature must be 0"),
        (["--prompt", "x", "--model", "tiny", "--max-new-tokens", "0"], "at least 1"),
        (["--prompt", "x", "--run", "r", "--adapter", "a"], "--run has its own adapter"),
    ],
)
def test_contradicting_flags_are_usage_errors(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # which has no runs
    done = CliRunner().invoke(app, ["generate", *arguments])
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
