"""`train`: the content of the run directory for every method, and what is refused before the base loads."""

import dataclasses
import json
import math
import re
import shutil
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from prefixtune_cli.adapter_folder import load_adapter
from prefixtune_cli.errors import (
    ModelError,
    RecipeError,
    ResourceError,
    RunDirError,
    TrainingError,
    UsageError,
)
from prefixtune_cli.evaluate.held_out import Score
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, write_json
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train import Summary, train
from prefixtune_cli.train.checks import check_disk
from prefixtune_cli.train.prepare import Data, prepare_data
from prefixtune_cli.train.sft import training_arguments


def recipe(base: Path, source: Path, out: Path, **changes: dict[str, Any]) -> Recipe:
    settings: dict[str, Any] = {
        "model": {"name": str(base), "bits": 32},
        "data": {"train": str(source), "eval_split": 0.125, "max_length": 64},
        "train": {"max_steps": 8, "batch_size": 8, "log_steps": 2, "save_steps": 4},
        "evaluate": {"max_new_tokens": 8},
        "out": str(out),
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return Recipe.model_validate(settings)


class Listener:
    """Collects the reports of a run."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.warnings: list[str] = []
        self.tasks: dict[str, int] = {}

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, figures: Any) -> None:
        self.tasks[task] = done


@pytest.fixture(scope="module")
def finished(
    random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Summary, Listener, Recipe]:
    listener = Listener()
    chosen = recipe(
        random_base,
        colours,
        tmp_path_factory.mktemp("runs") / "colours",
        train={"max_steps": 60, "learning_rate": 0.05, "eval_steps": 30, "save_steps": 30},
    )
    summary = train(chosen, reporter=listener)
    return RunDir(str(chosen.out)), summary, listener, chosen


def test_the_run_directory_is_complete(finished: tuple[RunDir, Summary, Listener, Recipe]) -> None:
    run_dir = finished[0]
    names = sorted(p.name for p in run_dir.path.iterdir())
    assert names == [
        "adapter",
        "checkpoint-30",
        "checkpoint-60",
        "environment.json",
        "eval",
        "loss.png",
        "metrics.jsonl",
        "recipe.yaml",
        "summary.json",
    ]
    assert sorted(p.name for p in run_dir.adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not list(run_dir.path.rglob("README.md"))  # peft's blank cards, in checkpoints as well
    assert run_dir.loss_plot.read_bytes().startswith(b"\x89PNG")


def test_the_saved_recipe_is_the_whole_one(
    finished: tuple[RunDir, Summary, Listener, Recipe],
) -> None:
    assert resolve(str(finished[0].recipe)) == finished[3]


def test_only_training_rows_end_with_the_first_tokens(random_base: Path, colours: Path) -> None:
    def prepared(first: int | None) -> Data:
        values = {
            "model": {"name": str(random_base)},
            "data": {"train": str(colours), "eval_split": 0.25},
            "train": {"first_tokens": first},
        }
        asked = Recipe.model_validate(values)
        return prepare_data(asked, load_tokenizer(asked.model), Listener())

    whole, cut = prepared(None), prepared(2)
    assert cut.held_out_sha256 == whole.held_out_sha256
    assert cut.questions == whole.questions
    for row, of in zip(cut.train, whole.train, strict=True):
        assert row["row"] == of["row"]
        assert sum(label >= 0 for label in row["labels"]) == 2 < sum(x >= 0 for x in of["labels"])
        assert row["input_ids"] == of["input_ids"][: len(row["input_ids"])]
        assert row["labels"][-1] >= 0


def test_metrics_have_a_row_each_log_step_with_every_figure(
    finished: tuple[RunDir, Summary, Listener, Recipe],
) -> None:
    rows = finished[0].read_metrics()
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, *range(2, 61, 2)]
    for row in trained:
        assert set(row) == {
            "step",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens_per_second",
            "peak_memory_gib",
            "epoch",
            "time",
        }
        assert row["epoch"] == pytest.approx(row["step"] / 7, abs=1e-3)  # 56 rows, 8 a step
        assert datetime.fromisoformat(row["time"]).tzinfo is UTC
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_gib"] > 0
    assert [row["step"] for row in rows if "eval_loss" in row] == [30, 60]
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_the_summary_compares_base_and_adapter_on_held_out_rows(
    finished: tuple[RunDir, Summary, Listener, Recipe], colours: Path
) -> None:
    run_dir, summary, *_ = finished
    stored = json.loads(run_dir.summary.read_text())
    assert stored["base"]["loss"] == summary.base.loss
    assert stored["adapter"]["exact_match"] == summary.adapter.exact_match
    assert summary.adapter.loss < summary.base.loss
    assert summary.held_out_rows == 8
    assert summary.trainable_parameters == 2 * 2 * 4 * 16 * 16  # two sites
    assert summary.steps == 60
    answers = [json.loads(line) for line in run_dir.answers.read_text().splitlines()]
    assert len(answers) == 8
    source = [json.loads(line) for line in colours.read_text().splitlines()]
    for row in answers:
        number = int(row["origin"].removeprefix(f"{colours}, line "))
        assert source[number - 1] == {"prompt": row["prompt"], "completion": row["answer"]}
    right = sum(row["adapter"].strip() == row["answer"] for row in answers)
    assert summary.adapter.exact_match == right / 8


def test_the_summary_says_what_was_trained_when_how_long_and_with_what_verdict(
    finished: tuple[RunDir, Summary, Listener, Recipe],
) -> None:
    run_dir, summary, _, chosen = finished
    stored = json.loads(run_dir.summary.read_text())
    assert (stored["model"], stored["method"]) == (chosen.model.name, "prefix-tuning-plus")
    started, ended = (datetime.fromisoformat(stored[name]) for name in ("started", "finished"))
    assert started.tzinfo is ended.tzinfo is UTC
    assert started <= ended
    assert 0 < stored["seconds"] <= (ended - started).total_seconds() + 30
    assert stored["verdict"] == "better"
    assert Summary.read(run_dir) == summary


@pytest.mark.parametrize(
    ("base", "adapter", "verdict"),
    [
        (Score(2.0, 0.5), Score(1.9, 0.4), "better"),
        (Score(2.0, None), Score(1.999, None), "no better"),
        (Score(2.0, None), Score(2.001, None), "no better"),
        (Score(2.0, None), Score(2.1, None), "worse"),
        (Score(2.0, 0.5), Score(2.1, 0.5), "worse"),
        (Score(2.0, 0.5), Score(2.1, 0.6), "no better"),
        (Score(2.0, None), Score(math.nan, None), "worse"),
    ],
)
def test_an_adapter_is_worse_where_its_loss_is_higher_and_no_more_answers_are_right(
    finished: tuple[RunDir, Summary, Listener, Recipe], base: Score, adapter: Score, verdict: str
) -> None:
    made = dataclasses.replace(finished[1], base=base, adapter=adapter)
    assert made.verdict == made.to_json()["verdict"] == verdict


def test_the_summary_of_an_older_version_is_read(
    finished: tuple[RunDir, Summary, Listener, Recipe], tmp_path: Path
) -> None:
    stored = json.loads(finished[0].summary.read_text())
    for name in ("model", "method", "started", "finished", "seconds", "example"):
        del stored[name]
    del stored["why_no_exact_match"], stored["verdict"]
    write_json(RunDir(tmp_path).summary, stored)
    assert Summary.read(RunDir(tmp_path)).steps == 60


def test_the_held_out_loss_of_the_run_is_that_of_the_trainer(
    finished: tuple[RunDir, Summary, Listener, Recipe],
) -> None:
    last = [row["eval_loss"] for row in finished[0].read_metrics() if "eval_loss" in row][-1]
    assert finished[1].adapter.loss == pytest.approx(last, rel=1e-4)


def test_the_environment_names_versions_and_the_content_of_the_data(
    finished: tuple[RunDir, Summary, Listener, Recipe],
) -> None:
    environment = json.loads(finished[0].environment.read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["data"]["train"]["rows"] == 64
    assert len(environment["data"]["train"]["sha256"]) == 64


def test_the_user_hears_of_format_rows_and_lengths_before_the_base_loads(
    finished: tuple[RunDir, Summary, Listener, Recipe],
) -> None:
    notices = finished[2].notices
    loading = next(i for i, text in enumerate(notices) if text.startswith("Loading "))
    before = "\n".join(notices[:loading])
    assert "prompt-completion" in before
    assert "56 rows" in before
    assert "length in tokens" in before
    assert finished[2].tasks["training"] == 60


def test_plain_peft_with_one_import_gives_the_logits_that_ptp_gives(
    finished: tuple[RunDir, Summary, Listener, Recipe], random_base: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    import prefixtune_cli.adapter  # noqa: F401
    from prefixtune_cli import model as models

    chosen = finished[3]
    ours = load_adapter(models.load_base(chosen.model), finished[0].adapter).eval()
    plain = AutoPeftModelForCausalLM.from_pretrained(finished[0].adapter, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain.eval()(ids).logits)
        with ours.disable_adapter():
            assert not torch.equal(ours(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "lora", "prefix-tuning", "full"])
def test_every_method_trains_through_the_same_trainer(
    method: str, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = recipe(random_base, colours, tmp_path / "run", adapter={"method": method})
    summary = train(chosen)
    assert summary.adapter.loss < summary.base.loss
    assert list(RunDir(tmp_path / "run").adapter.glob("*.safetensors"))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_trains_and_its_adapter_stays_in_float32(
    bits: int, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = recipe(random_base, colours, tmp_path / "run", model={"bits": bits})
    summary = train(chosen)
    assert summary.adapter.loss < summary.base.loss
    weights = load_file(RunDir(tmp_path / "run").adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    layer = 64 * (64 + 32 + 32 + 64 + 3 * 128) + 2 * 64
    assert summary.total_parameters == 2048 * 64 + 2 * layer + 64 + summary.trainable_parameters


def test_the_first_row_of_packed_data_trains_as_many_tokens(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = recipe(random_base, colours, tmp_path / "run", train={"packing": True, "max_steps": 4})
    summary = train(chosen)
    assert summary.adapter.loss < summary.base.loss


def test_a_loss_that_is_not_finite_stops_with_step_rows_and_advice(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-base"
    shutil.copytree(random_base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    chosen = recipe(broken, colours, tmp_path / "run")
    with pytest.raises(TrainingError) as caught:
        train(chosen)
    message = str(caught.value)
    assert "became nan at step 1." in message
    assert message.count("colours.jsonl, line ") == 8
    assert "--learning-rate" in message
    assert not RunDir(tmp_path / "run").finished


def test_an_output_directory_that_is_taken_is_refused_and_kept(
    finished: tuple[RunDir, Summary, Listener, Recipe], tmp_path: Path
) -> None:
    run_dir, *_, chosen = finished
    with pytest.raises(RunDirError, match="--overwrite"):
        train(chosen)
    assert run_dir.finished
    with pytest.raises(RunDirError, match="is finished"):
        train(chosen, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    foreign = chosen.model_copy(update={"out": str(tmp_path / "mine")})
    with pytest.raises(RunDirError, match="not a run directory"):
        train(foreign, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_resuming_another_recipe_or_other_data_shows_the_difference(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(colours, data)
    chosen = recipe(random_base, data, tmp_path / "run")
    train(chosen)
    RunDir(tmp_path / "run").summary.unlink()
    changed = recipe(random_base, data, tmp_path / "run", train={"learning_rate": 0.5})
    with pytest.raises(RunDirError, match=r"train\.learning_rate: 0\.03 → 0\.5"):
        train(changed, resume=True)
    data.write_text(data.read_text().replace("RED", "ROT"))
    with pytest.raises(RunDirError, match=r"data of the run .* has changed"):
        train(chosen, resume=True)
    with pytest.raises(RunDirError, match=r"no run in .* to resume"):
        train(chosen.model_copy(update={"out": str(tmp_path / "none")}), resume=True)


def test_too_little_disk_is_told_in_mebibytes(tmp_path: Path) -> None:
    check_disk(tmp_path, 1)
    with pytest.raises(ResourceError, match=r"needs 1,099,511,627,776\.0 MiB .* free"):
        check_disk(tmp_path, 2**60)


def test_gpus_that_are_not_there_are_refused(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    there = torch.cuda.device_count()
    chosen = recipe(random_base, colours, tmp_path / "run", train={"gpus": there + 4})
    with pytest.raises(ResourceError, match=f"train.gpus is {there + 4}, but this machine has"):
        train(chosen)


def test_a_run_of_one_step_trains_and_has_its_line_of_metrics(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = recipe(random_base, colours, tmp_path / "run", train={"max_steps": 1, "log_steps": 10})
    assert train(chosen).adapter.loss < train_base_loss(tmp_path)
    assert [row["step"] for row in RunDir(tmp_path / "run").read_metrics()] == [1]
    assert RunDir(tmp_path / "run").loss_plot.exists()


def train_base_loss(folder: Path) -> float:
    summary = json.loads(RunDir(folder / "run").summary.read_text())
    return float(summary["base"]["loss"])


def test_chats_without_an_answer_can_be_trained_whole(random_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    row = {"messages": [{"role": "user", "content": "Is anybody there?"}]}
    file.write_text((json.dumps(row) + "\n") * 16)
    chosen = recipe(
        random_base,
        file,
        tmp_path / "run",
        data={"train_on": "all"},
        train={"max_steps": 2, "batch_size": 2},
    )
    summary = train(chosen)
    assert summary.adapter.exact_match is None
    assert re.fullmatch(
        r"No exact match: .*asked\.jsonl, line \d+ has no answer\.", str(summary.why_no_exact_match)
    )


def test_a_fully_trained_run_answers_with_its_own_weights(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    from prefixtune_cli.generate import answer_streamed, conversation, load_speaker
    from prefixtune_cli.pointed import point
    from prefixtune_cli.sampling import Sampling

    chosen = recipe(
        random_base,
        colours,
        tmp_path / "run",
        adapter={"method": "full"},
        train={"max_steps": 60, "learning_rate": 3e-3},
    )
    assert train(chosen).adapter.loss < 2

    def said(no_adapter: bool) -> str:
        speaker = load_speaker(point(str(chosen.out)), no_adapter=no_adapter)
        assert not speaker.has_adapter
        messages = conversation("Say the colour red, number 3.", None)
        return "".join(answer_streamed(speaker, messages, sampling=Sampling(max_new_tokens=5)))

    assert said(no_adapter=False) != said(no_adapter=True)


def test_the_adapter_carries_the_tokenizer_and_the_template_of_its_training(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    chosen = recipe(
        random_base,
        colours,
        tmp_path / "run",
        data={"chat_template": str(template)},
        train={"max_steps": 1},
    )
    train(chosen)
    adapter = RunDir(tmp_path / "run").adapter
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.chat_template == template.read_text()
    assert tokenizer("Say it").input_ids == load_tokenizer(chosen.model)("Say it").input_ids


def test_a_changed_chat_template_is_changed_data(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    source = (random_base / "chat_template.jinja").read_text()
    template.write_text(source)
    chosen = recipe(random_base, colours, tmp_path / "run", data={"chat_template": str(template)})
    train(chosen)
    run_dir = RunDir(tmp_path / "run")
    assert run_dir.chat_template.read_text() == source
    run_dir.summary.unlink()
    template.write_text(source.replace("<|user|>", "<|system|>") + " ")
    with pytest.raises(RunDirError, match=r"chat_template: .*mine\.jinja"):
        train(chosen, resume=True)


def test_an_unknown_optimizer_is_told_with_the_nearest(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = recipe(random_base, colours, tmp_path / "run", train={"optimizer": "adamw_torhc"})
    with pytest.raises(RecipeError, match="Did you mean adamw_torch"):
        train(chosen)


def test_a_tracker_that_is_not_installed_is_told_with_what_to_install(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    absent = [name for name in ("wandb", "trackio", "tensorboard") if find_spec(name) is None]
    if not absent:
        pytest.skip("every tracker is installed here")
    chosen = recipe(random_base, colours, tmp_path / "run", train={"track": absent[0]})
    with pytest.raises(ResourceError, match=rf"pip install 'prefixtune-cli\[{absent[0]}\]'"):
        train(chosen)


@pytest.mark.parametrize(
    ("attention", "method", "expected"),
    [
        ("flash_attention_2", "prefix-tuning-plus", True),
        ("flash_attention_3", "lora", True),
        ("flash_attention_2", "prefix-tuning", False),
        ("sdpa", "prefix-tuning-plus", False),
    ],
)
def test_batches_are_padding_free_where_the_kernel_and_the_method_allow_it(
    attention: str, method: str, expected: bool, random_base: Path, tmp_path: Path
) -> None:
    chosen = recipe(
        random_base,
        Path("data.jsonl"),
        tmp_path / "run",
        model={"attention": attention},
        adapter={"method": method},
    )
    assert training_arguments(chosen, RunDir(tmp_path)).padding_free is expected


def test_a_hub_model_while_offline_is_refused_at_once(colours: Path, tmp_path: Path) -> None:
    chosen = recipe(Path("mistral-7b"), colours, tmp_path / "run")
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*--model"):
        train(chosen)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_weights_is_refused(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(random_base / "config.json", bare)
    with pytest.raises(ModelError, match="no weights"):
        train(recipe(bare, colours, tmp_path / "run"))


def test_no_data_at_all_is_told_with_the_flag(random_base: Path, tmp_path: Path) -> None:
    chosen = recipe(random_base, Path("x"), tmp_path / "run", data={"train": None})
    with pytest.raises(UsageError, match="--data FILE"):
        train(chosen)


def test_layers_that_the_base_does_not_have_are_refused(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = recipe(random_base, colours, tmp_path / "run", adapter={"layers": "last:9"})
    with pytest.raises(ModelError, match="layers is last:9, but the model has 2"):
        train(chosen)
