"""The tokenizer and chat template of an adapter: those that it was trained with win over the base's."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from prefixtune_cli import generate
from prefixtune_cli import model as models
from prefixtune_cli.cli.app import app
from prefixtune_cli.errors import AdapterError, ModelError, UsageError
from prefixtune_cli.evaluate.evaluations import prepare as prepare_evaluations
from prefixtune_cli.evaluate.settings import Settings
from prefixtune_cli.evaluate.subjects import Cast, assemble
from prefixtune_cli.generate import conversation
from prefixtune_cli.merge.adapters import merge
from prefixtune_cli.pointed import choose, point
from prefixtune_cli.recipe.load import dump, resolve
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuningPlus, Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train.prepare import Data, prepare_data
from tests.train.test_run import Listener

TRAINED = "{% for m in messages %}{{ m.role }} says {{ m.content }}{{ eos_token }}{% endfor %}"
TYPED = TRAINED.replace("says", "types")


@pytest.fixture(scope="module")
def bare(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder as peft alone writes it."""
    folder = tmp_path_factory.mktemp("bare") / "adapter"
    base = models.load_base(ModelSection(name=str(random_base), bits=32))
    models.attach(base, PrefixTuningPlus()).save_pretrained(folder)
    return folder


def with_tokenizer(
    bare: Path, base: Path, folder: Path, template: str = TRAINED, *tokens: str
) -> Path:
    """An adapter folder as `ptp train` and TRL write it."""
    shutil.copytree(bare, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


def cast_of(base: Path, *adapters: Path, template: str | None = None) -> Cast:
    who = choose(model=str(base), adapters=list(map(str, adapters)), typed={"bits": 32})
    return assemble(who, template=template)


def prompt_of(speaker: generate.Speaker) -> str:
    return str(speaker.tokenizer.decode(speaker.prompt(conversation("Hi", None))))


def test_what_an_adapter_carries_wins_over_the_base(
    bare: Path, random_base: Path, tmp_path: Path
) -> None:
    section = ModelSection(name=str(random_base))
    bases = AutoTokenizer.from_pretrained(random_base)
    assert load_tokenizer(section, bare).chat_template == bases.chat_template
    folder = with_tokenizer(bare, random_base, tmp_path / "a", TRAINED, "<new>")
    assert load_tokenizer(section, folder).chat_template == TRAINED
    assert len(load_tokenizer(section, folder)) == len(bases) + 1
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_tokenizer(section, folder).chat_template == TRAINED
    assert len(load_tokenizer(section, folder)) == len(bases)


def test_an_adapter_that_carries_none_has_the_template_of_the_run_around_it(
    bare: Path, random_base: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(bare, run.adapter)
    shutil.copytree(bare, run.checkpoint(3))
    run.recipe.write_text(dump(resolve(flags={"model": {"name": str(random_base)}})))
    run.chat_template.write_text(TRAINED)
    for folder in (run.adapter, run.checkpoint(3)):
        section = ModelSection(name=str(random_base))
        assert load_tokenizer(section, folder).chat_template == TRAINED


def test_a_broken_tokenizer_of_an_adapter_is_told_with_its_folder(
    bare: Path, random_base: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(bare, random_base, tmp_path / "a")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"tokenizer of the adapter in .*delete .*config\.json"):
        load_tokenizer(ModelSection(name=str(random_base)), folder)


def test_generate_asks_by_the_template_of_the_adapter_unless_one_is_typed(
    bare: Path, random_base: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(bare, random_base, tmp_path / "a")
    (tmp_path / "typed.jinja").write_text(TYPED)

    def asked(template: str | None) -> str:
        return prompt_of(
            generate.load_speaker(
                point(folder, {"name": str(random_base), "bits": 32}), chat_template=template
            )
        )

    assert "user says Hi" in asked(None)
    assert "user types Hi" in asked(str(tmp_path / "typed.jinja"))


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_a_template_can_be_typed(command: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "no.jinja")
    also = {"generate": ["--prompt", "x"], "chat": [], "eval": ["--data", "sample:intents-test"]}
    typed = [command, "--model", "tiny", "--chat-template", missing, *also[command]]
    done = CliRunner().invoke(app, typed)
    assert f"The chat template {missing} does not exist" in str(done.exception)


def test_eval_reads_data_by_the_template_of_the_adapter_unless_one_is_typed(
    bare: Path, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(bare, random_base, tmp_path / "a")
    other = with_tokenizer(bare, random_base, tmp_path / "b", TYPED)
    (tmp_path / "typed.jinja").write_text(TYPED)
    typed = str(tmp_path / "typed.jinja")
    cast = cast_of(random_base, folder)
    assert cast.tokenizer.chat_template == TRAINED
    assert cast_of(random_base).tokenizer.chat_template not in (TRAINED, TYPED)

    def prepared(cast: Cast, template: str | None) -> str:
        settings = Settings(
            (), data=(str(colours),), data_settings={"chat_template": template} if template else {}
        )
        evaluations = prepare_evaluations(settings, cast, cast.tokenizer, Listener())
        return next(evaluations).name

    assert prepared(cast, None)
    with pytest.raises(UsageError, match=r"the chat template.*--chat-template"):
        prepared(cast_of(random_base, folder, other), None)
    assert prepared(cast_of(random_base, folder, other, template=typed), typed)


def test_adapters_of_different_tokenizers_are_not_evaluated_by_one(
    bare: Path, random_base: Path, tmp_path: Path
) -> None:
    one = with_tokenizer(bare, random_base, tmp_path / "a")
    other = with_tokenizer(bare, random_base, tmp_path / "b", TRAINED, "<new>")
    with pytest.raises(UsageError, match=r"different tokenizers \(2,048 and 2,049 tokens\)"):
        cast_of(random_base, one, other)


def test_a_merged_adapter_carries_the_template_of_its_sources(
    bare: Path, random_base: Path, tmp_path: Path
) -> None:
    one = with_tokenizer(bare, random_base, tmp_path / "a")
    two = with_tokenizer(bare, random_base, tmp_path / "b")
    other = with_tokenizer(bare, random_base, tmp_path / "c", TYPED)
    new = with_tokenizer(bare, random_base, tmp_path / "d", TRAINED, "<new>")
    heard, section = Listener(), ModelSection(name=str(random_base))
    merge([point(one), point(two)], out=tmp_path / "m", reporter=heard)
    assert load_tokenizer(section, tmp_path / "m").chat_template == TRAINED
    assert not heard.warnings
    merge([point(one), point(other)], out=tmp_path / "n", reporter=heard)
    assert "another chat template" in heard.warnings[0]
    with pytest.raises(AdapterError, match="differ in their tokenizers: 2,048 tokens"):
        merge([point(one), point(new)], out=tmp_path / "o", reporter=heard)


# Tokens that the base lacks


def enlarged(base: Path, folder: Path, *tokens: str, pad: str | None = None) -> Path:
    """A base that was not resized after its tokenizer got more tokens."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    return folder


def rows(file: Path, *prompts: str) -> Path:
    lines = (json.dumps({"prompt": prompt, "completion": "yes"}) + "\n" for prompt in prompts)
    file.write_text("".join(lines))
    return file


def prepared(base: Path, data: Path, **changes: object) -> Data:
    section = {"train": str(data), "eval": str(data), **changes}
    recipe = Recipe.model_validate({"model": {"name": str(base)}, "data": section})
    return prepare_data(recipe, load_tokenizer(recipe.model), Listener())


def test_a_padding_token_that_the_base_lacks_is_refused_with_a_line_that_mends_it(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = enlarged(random_base, tmp_path / "padded", pad="[PAD]")
    with pytest.raises(
        ModelError, match=r"padding has the token '\[PAD\]', id 2048.*2,048 rows"
    ) as told:
        load_tokenizer(ModelSection(name=str(base)))
    monkeypatch.chdir(tmp_path)
    program, _, code = shlex.split(str(told.value).splitlines()[-1])
    assert program == "python"
    exec(code)
    assert "--model ./padded-resized" in str(told.value)
    mended = ModelSection(name=str(tmp_path / "padded-resized"))
    assert load_tokenizer(mended).pad_token_id == 2048
    assert models.load_base(mended).get_input_embeddings().num_embeddings == 2049


def test_tokens_that_the_base_lacks_are_refused_where_they_occur_and_only_there(
    random_base: Path, tmp_path: Path
) -> None:
    base = enlarged(random_base, tmp_path / "enlarged", "<think>", "</think>")
    plain = rows(tmp_path / "plain.jsonl", "Are you?", "Is it?")
    assert len(prepared(base, plain).train) == 2
    own = rows(tmp_path / "own.jsonl", "Are you?", "<think>Is it?</think>")
    said = r"own\.jsonl, line 2 has the token '</think>', id 2049, .*resize_token_embeddings"
    with pytest.raises(ModelError, match=f"(?s){said}"):
        prepared(base, own)
    for typed in (
        ["inspect-data", str(own), "--model", str(base)],
        ["eval", "--model", str(base), "--data", str(own)],
    ):
        done = CliRunner().invoke(app, typed)
        assert isinstance(done.exception, ModelError)
        assert "own.jsonl, line 2 has the token '</think>'" in str(done.exception)
    [who] = choose(model=str(base), typed={"bits": 32})
    speaker = generate.load_speaker(who)
    assert speaker.prompt(conversation("Is it?", None))
    with pytest.raises(ModelError, match="The prompt has the token '<think>'"):
        speaker.prompt(conversation("<think>", None))


def test_the_tokenizer_of_an_adapter_is_held_to_the_base_too(
    bare: Path, random_base: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(bare, random_base, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"padding has the token '\[PAD\]'"):
        load_tokenizer(ModelSection(name=str(random_base)), folder)


def test_what_a_template_writes_like_a_token_and_the_tokenizer_lacks_is_told(
    random_base: Path, tmp_path: Path
) -> None:
    data = rows(tmp_path / "plain.jsonl", "Are you?")
    template = tmp_path / "chatml.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    )
    heard = Listener()
    section = {"train": str(data), "eval": str(data), "chat_template": str(template)}
    recipe = Recipe.model_validate({"model": {"name": str(random_base)}, "data": section})
    prepare_data(recipe, load_tokenizer(recipe.model), heard)
    [told] = [
        notice for notice in heard.notices if "which is not a token of the tokenizer" in notice
    ]
    assert told.startswith("The chat template writes <|im_start|>, which")
