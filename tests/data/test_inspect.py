"""`ptp inspect-data`: what it prints, and that it needs only a tokenizer."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from prefixtune_cli.cli.inspect_data import _coloured
from prefixtune_cli.cli.inspect_data import inspect_data as command
from prefixtune_cli.cli.typer_options import for_typer
from prefixtune_cli.data.inspect import Example, facts, warnings
from prefixtune_cli.data.tokenized_data import DataStatistics
from prefixtune_cli.errors import DataError, UsageError

inspect_data = for_typer(command)
PAIR = {"prompt": "What is [bold]up[/bold]?", "completion": "Paris 😀"}


@pytest.fixture
def model(make_tokenizer, tmp_path) -> str:
    """A folder with a tokenizer and without a model."""
    make_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_examples_and_statistics_are_printed(write, model, capsys):
    inspect_data(source=write("a.jsonl", [PAIR]), model=model)
    out, err = capsys.readouterr()
    assert (
        "<|im_start|>user\nWhat is [bold]up[/bold]?<|im_end|>\n<|im_start|>assistant\n⟦Paris 😀<|im_end|>⟧"
        in out
    )
    assert "a.jsonl, line 1: " in out
    assert "1 rows of format prompt-completion, 1 of them trained on" in out
    assert "Format: prompt-completion" in err


def test_without_a_model_it_says_by_whose_tokenizer_it_shows(write, capsys):
    inspect_data(source=write("a.jsonl", [PAIR]))
    assert "These are tokens of tiny, the toy inside ptp" in capsys.readouterr().err
    inspect_data(source="sample:chat")
    assert "the toy" not in capsys.readouterr().err


def test_json_on_stdout_has_the_same_and_nothing_else(write, model, capsys):
    inspect_data(data=write("a.jsonl", [PAIR] * 9), model=model, examples=2, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["statistics"]["rows"] == 9
    assert len(found["examples"]) == 2
    assert found["examples"][0]["spans"][-1] == ["Paris 😀<|im_end|>", True]


def test_a_row_that_ends_with_its_first_answer_tokens_is_shown_so(write, model, capsys):
    long = {"prompt": "Count.", "completion": "one two three four five six seven eight nine ten"}
    inspect_data(data=write("a.jsonl", [long]), model=model, as_json=True)
    whole = json.loads(capsys.readouterr().out)["examples"][0]
    inspect_data(data=write("a.jsonl", [long]), model=model, first_tokens=4)
    out, err = capsys.readouterr()
    prompt = whole["tokens"] - whole["trained_tokens"]
    assert f"{prompt + 4} tokens, 4 trained" in out
    assert f"longest {prompt + 4};" in out
    assert "The first 4 answer tokens of a row are learned" in err
    assert "warning" not in err
    shown = out.split("⟦")[1].split("⟧")[0]
    assert whole["spans"][-1][0].startswith(shown)
    assert len(shown) < len(whole["spans"][-1][0])


def test_truncation_is_a_warning_on_stderr(write, model, capsys):
    inspect_data(data=write("a.jsonl", [PAIR]), model=model, max_length=28)
    out, err = capsys.readouterr()
    assert "warning: 1 of 1 rows (100.0 %) are truncated to 28 tokens" in err
    assert "28 tokens, cut from " in out


def test_examples_are_drawn_by_the_seed(write, model, capsys):
    file = write("a.jsonl", [PAIR | {"prompt": str(i)} for i in range(50)])

    def origins(seed: int) -> list[str]:
        inspect_data(data=file, model=model, seed=seed, as_json=True)
        return [shown["origin"] for shown in json.loads(capsys.readouterr().out)["examples"]]

    assert origins(1) == origins(1) != origins(2)


def test_nothing_to_train_on_is_an_error(write, model):
    with pytest.raises(DataError, match="has a token to train on"):
        inspect_data(data=write("a.jsonl", [PAIR | {"completion": ""}]), model=model)


def test_data_given_twice_or_not_at_all_is_a_usage_error(model):
    with pytest.raises(UsageError, match="given twice"):
        inspect_data(source="a.jsonl", data="b.jsonl", model=model)
    with pytest.raises(UsageError, match="No data is given"):
        inspect_data(model=model)


def test_trained_tokens_alone_are_on_green():
    from rich.console import Console

    shown = Example("a.jsonl, line 1", (("masked", False), ("trained", True)), 2, 2, 1)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", no_color=False)
    console.print(_coloured(shown, marks=False))
    assert out.getvalue() == "\x1b[2mmasked\x1b[0m\x1b[1;30;42mtrained\x1b[0m\n"
    assert _coloured(shown, marks=True).plain == "masked⟦trained⟧"


def test_facts_and_warnings_state_counts_and_percentages():
    percentiles = {"p5": 1, "p50": 2, "p95": 3, "p99": 4, "max": 2000}
    trouble = DataStatistics("text", 1000, 940, 5000, 4000, percentiles, 1024, 25, 50, 10, 24)
    told = "\n".join(facts(trouble) + warnings(trouble))
    assert "1,000 rows of format text, 940 of them" in told
    assert "4,000 of them trained (80.0 %)" in told
    assert "25 of 1,000 rows (2.5 %) are truncated" in told
    assert "50 of 1,000 rows (5.0 %) are longer than" in told
    assert "24 of 1,000 rows (2.4 %) are cut before their end-of-turn" in told
    assert "10 of 1,000 rows (1.0 %) have nothing to train on" in told
    fine = DataStatistics("text", 1000, 1000, 5000, 4000, percentiles, 4096, 0, 0, 0, 0)
    assert warnings(fine) == []


def test_the_commands_file_imports_neither_datasets_nor_torch():
    work = (
        "import sys, prefixtune_cli.cli.inspect_data\n"
        "print([m for m in ('datasets', 'torch', 'transformers', 'rich', 'numpy') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert "datasets" not in ran.stdout and "torch" not in ran.stdout


def test_the_data_layer_imports_neither_torch_nor_a_trainer():
    work = (
        "import sys, prefixtune_cli.data.inspect, prefixtune_cli.data.load\n"
        "print([m for m in ('torch', 'trl', 'peft', 'typer', 'rich', 'datasets') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
