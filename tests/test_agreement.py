"""The model generates what it computes, for every way an adapter acts on the base; otherwise the user is told."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel
from typer.testing import CliRunner

from prefixtune_cli import agreement
from prefixtune_cli import model as models
from prefixtune_cli.agreement import check_generation
from prefixtune_cli.cli.app import app
from prefixtune_cli.errors import ModelError
from prefixtune_cli.evaluate.subjects import assemble
from prefixtune_cli.pointed import choose
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train import train
from tests.train.test_run import Listener, recipe

SMALL: dict[str, dict[str, Any]] = {
    "p-tuning": {"num_virtual_tokens": 4},
    "prompt-tuning": {"num_virtual_tokens": 4},
    "cartridge": {"num_virtual_tokens": 4},
}
VIRTUAL = ["prefix-tuning", *SMALL]
PROMPT = list(range(40, 60))
LEARNING = {"max_steps": 4, "learning_rate": 0.5, "save_steps": 4}


def adapted(base: Path | str, method: str, bits: int = 32) -> PeftModel:
    """The base with an adapter that changes its output."""
    section = ModelSection.model_validate({"name": str(base), "bits": bits})
    adapter = resolve(
        flags={
            "adapter": {"method": method, **({"config": SMALL[method]} if method in SMALL else {})}
        }
    ).adapter
    model = models.attach(models.load_base(section), adapter)
    assert isinstance(model, PeftModel)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def greedy(model: Any, count: int = 8) -> list[int]:
    """The tokens that plain forward passes choose, one after another."""
    ids = torch.tensor([PROMPT])
    for _ in range(count):
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return list(ids[0].tolist())


def generated(model: Any, count: int = 8) -> list[int]:
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False
    )
    return list(found[0].tolist())


@pytest.fixture
def crippled(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """`generate` loses the adapter, as it would if a library renamed what peft reads."""
    whole = PeftModelForCausalLM.generate

    def generate(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        with self.disable_adapter():
            return whole(self, *args, **kwargs)

    monkeypatch.setattr(PeftModelForCausalLM, "generate", generate)
    return monkeypatch


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_take_part_in_generation(method: str) -> None:
    model = adapted("tiny", method).eval()
    assert generated(model) == greedy(model)
    with models.without_adapter(model):
        plain = greedy(model)
        assert generated(model) == plain
    assert plain != greedy(model), "the adapter does something"
    base = model.get_base_model()
    models.detach(model)
    assert generated(base) == plain


@pytest.mark.parametrize(
    ("method", "bits"),
    [*((m, 32) for m in [*VIRTUAL, "lora"]), *(("prefix-tuning-plus", b) for b in (16, 8, 4))],
)
def test_a_model_that_generates_what_it_computes_passes(
    method: str, bits: int, random_base: Path
) -> None:
    model = adapted(random_base, method, bits).train()
    before = torch.get_rng_state()
    assert check_generation(model, PROMPT, then="") is None
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize(
    ("method", "bits"), [*((m, 32) for m in [*VIRTUAL, "lora"]), ("prefix-tuning-plus", 16)]
)
def test_an_adapter_that_generation_loses_is_told_with_method_and_versions(
    method: str, bits: int, random_base: Path, crippled: pytest.MonkeyPatch
) -> None:
    model = adapted(random_base, method, bits)
    with pytest.raises(ModelError) as told:
        check_generation(model, PROMPT, then="type it again.")
    said = str(told.value)
    assert said.startswith(f"With method {method} this model does not generate what it computes")
    for library in ("peft", "transformers", "torch"):
        assert f"{library} {metadata.version(library)}" in said
    assert "pip install --upgrade peft transformers" in said
    assert said.endswith("then type it again.")
    assert "base alone" not in said


def test_the_base_is_named_where_it_does_not_generate_what_it_computes_either(
    random_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(random_base, "lora")
    whole = agreement._logits
    monkeypatch.setattr(agreement, "_logits", lambda *args: whole(*args).flip(-1))
    with pytest.raises(ModelError, match="So do those of the base alone"):
        check_generation(model, PROMPT, then="")


def test_what_cannot_be_told_is_said(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(random_base, "lora")
    with monkeypatch.context() as patched:
        patched.setattr(agreement, "is_sharded", lambda model: True)
        found = check_generation(model, PROMPT, then="")
        assert found == "the weights are spread over several processes"

    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no cache")

    with monkeypatch.context() as patched:
        patched.setattr(GenerationMixin, "generate", fails)
        found = check_generation(model, PROMPT, then="")
        assert found == "this base cannot generate: NotImplementedError: no cache"

    whole = PeftModelForCausalLM.generate

    def fails_with_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return whole(self, *args, **kwargs) if self._adapters_disabled else fails()

    monkeypatch.setattr(PeftModelForCausalLM, "generate", fails_with_adapter)
    with pytest.raises(ModelError, match=r"Method lora cannot generate on this base.*no cache"):
        check_generation(model, PROMPT, then="")


@pytest.mark.parametrize("text", [False, True], ids=["questions", "text"])
def test_a_run_whose_adapter_generation_loses_ends_with_an_error_and_goes_on_afterwards(
    text: bool, random_base: Path, colours: Path, tmp_path: Path, crippled: pytest.MonkeyPatch
) -> None:
    source = colours
    if text:
        rows = [json.loads(line) for line in colours.read_text().splitlines()]
        source = tmp_path / "text.jsonl"
        source.write_text("".join(json.dumps({"text": row["prompt"]}) + "\n" for row in rows))
    made = recipe(random_base, source, tmp_path / "run", adapter={"method": "lora"}, train=LEARNING)
    run_dir = RunDir(str(made.out))
    with pytest.raises(ModelError, match=r"method lora .*--resume.*what is trained is kept"):
        train(made)
    assert run_dir.adapter.exists()
    assert not run_dir.finished
    crippled.undo()
    train(made, resume=True)
    assert run_dir.finished


def test_full_fine_tuning_is_checked_too(
    random_base: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []

    def look(model: Any, prompt: Any, *, then: str) -> str | None:
        checked.append(model)
        return check_generation(model, prompt, then=then) or "for once"

    monkeypatch.setattr("prefixtune_cli.train.run.check_generation", look)
    listener = Listener()
    made = recipe(
        random_base, colours, tmp_path / "run", adapter={"method": "full"}, train={"max_steps": 1}
    )
    train(made, reporter=listener)
    assert [isinstance(model, PreTrainedModel) for model in checked] == [True]
    said = "Did not check that the model generates what it computes: for once."
    assert said in listener.notices


def test_full_in_16_bits_is_allowed_the_rounding_of_its_autocast(
    random_base: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are float32. If a CPU rounds passes of one token by themselves, no other pass tells by how much."""
    found: list[float] = []

    def look(model: Any, prompt: Any, *, then: str) -> None:
        assert model.dtype == torch.float32
        with torch.no_grad(), models.evaluating(model):
            found.append(agreement._apart(model, list(prompt))[1])

    monkeypatch.setattr(agreement, "_rounding", lambda *_: 0.0)
    monkeypatch.setattr("prefixtune_cli.train.run.check_generation", look)
    for bits in (16, 32):
        out = tmp_path / f"{bits}"
        made = recipe(
            random_base,
            colours,
            out,
            model={"bits": bits},
            adapter={"method": "full"},
            train={"max_steps": 1},
        )
        train(made)
    units = [
        agreement.UNITS * unit for unit in (torch.finfo(torch.bfloat16).eps, agreement.FEWEST_UNIT)
    ]
    assert found == pytest.approx(units)


def test_evaluation_and_answers_are_refused_where_generation_loses_the_adapter(
    random_base: Path, tmp_path: Path, crippled: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    adapted(random_base, "lora").save_pretrained(folder)
    cast = assemble(choose(adapters=[str(folder)], typed={"name": str(random_base), "bits": 32}))
    with cast.loaded() as base:
        plain = greedy(base)
        for _ in range(2):
            with (
                pytest.raises(ModelError, match=r"method lora.*type the same command again"),
                cast.on_stage(cast.subjects[1]),
            ):
                pass
        assert greedy(base) == plain
        assert not any("lora" in name for name, _ in base.named_parameters())
    asked = ["generate", "--model", str(random_base), "--adapter", str(folder), "--prompt", "One?"]
    answered = CliRunner().invoke(app, [*asked, "--bits", "32"])
    assert isinstance(answered.exception, ModelError | SystemExit)
    assert "does not generate what it computes" in f"{answered.output}{answered.exception}"


def test_any_prompt_is_one_that_the_tokenizer_makes(random_base: Path) -> None:
    ids = agreement.any_prompt(AutoTokenizer.from_pretrained(random_base))
    assert 4 < len(ids) < 100
