"""Recipe, --set and flags become one recipe, or one error with all problems."""

from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.errors import RecipeError
from prefixtune_cli.recipe.load import difference, dump, find, resolve, shipped, summary
from prefixtune_cli.recipe.schema import Lora, Peft, PrefixTuningPlus, Recipe, default_rate


def problems(*given: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve(*given)
    lines = str(caught.value).splitlines()
    return lines if len(lines) == 1 else [line.strip() for line in lines[1:]]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "r.yaml").write_text(text)
        return str(tmp_path / "r.yaml")

    return write


def test_nothing_given_is_the_schemas_defaults() -> None:
    assert resolve() == Recipe()


def test_flag_wins_over_set_wins_over_recipe_wins_over_default(write: Any) -> None:
    file = write("train: {seed: 1, batch_size: 2, epochs: 3, log_steps: 4}\n")
    sets = ["train.batch_size=20", "train.epochs=30"]
    found = resolve(file, sets, {"train": {"epochs": 300.0}}).train
    assert (found.seed, found.batch_size, found.epochs) == (1, 20, 300.0)
    assert found.keep_checkpoints == Recipe().train.keep_checkpoints


def test_the_later_of_two_sets_wins() -> None:
    assert resolve(None, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_set_takes_yaml_values() -> None:
    sets = [
        "train.learning_rate=1e-4",
        "adapter.layers=[0, 2]",
        "data.map.prompt=q",
        "out=runs/a=b",
    ]
    found = resolve(None, sets)
    assert found.train.learning_rate == 1e-4
    assert isinstance(found.adapter, PrefixTuningPlus)
    assert found.adapter.layers == [0, 2]
    assert found.data.map == {"prompt": "q"}
    assert found.out == "runs/a=b"


def test_all_problems_of_a_recipe_stand_in_one_error_with_their_lines(write: Any) -> None:
    file = write(
        "model:\n  bits: 5\ndata:\n  map: {prompt: 3}\n  eval_split: 2\n"
        "adapter:\n  feature_map: relu\n  alpha: 3\n  layers: [0, a]\n"
        "train:\n  batch_size: eight\n  learning_rat: 1e-4\n  epochs:\n  packing: yes\n"
        "  max_steps: true\n  seed: 1.5\ntrian: {seed: 1}\nlearning_rate: 3\n"
    )
    assert problems(file) == [
        f"{file}:2: model.bits must be 4, 8, 16 or 32, got 5",
        f"{file}:4: data.map.prompt must be text, got 3",
        f"{file}:5: data.eval_split must be less than 1, got 2",
        f"{file}:7: adapter.feature_map must be elu, gelu or mlp, got 'relu'. Did you mean 'elu'?",
        f"{file}:8: adapter.alpha belongs to lora, but adapter.method is prefix-tuning-plus",
        f"{file}:9: adapter.layers must be all, a list of layer numbers such as [0, 1], or last:k, "
        "got [0, 'a']",
        f"{file}:11: train.batch_size must be a whole number, got 'eight'",
        f"{file}:12: train.learning_rat is not a setting. Did you mean train.learning_rate?",
        f"{file}:13: train.epochs must be a number, got nothing (null)",
        f"{file}:14: train.packing must be true or false, got 'yes'",
        f"{file}:15: train.max_steps must be a whole number, got true",
        f"{file}:16: train.seed must be a whole number, got 1.5",
        f"{file}:17: trian is not a setting. Did you mean train?",
        f"{file}:18: learning_rate is not a setting. Did you mean train.learning_rate?",
    ]


def test_a_flags_wrong_value_is_not_blamed_on_the_recipes_line(write: Any) -> None:
    file = write("model:\n  bits: 4\n")
    assert problems(file, [], {"model": {"bits": 5}}) == [
        "model.bits must be 4, 8, 16 or 32, got 5"
    ]


def test_a_flag_puts_a_recipes_wrong_value_right(write: Any) -> None:
    assert resolve(write("model: {bits: 5}\n"), [], {"model": {"bits": 8}}).model.bits == 8


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        (
            ["adapter.feature_map=relu"],
            "adapter.feature_map must be elu, gelu or mlp, got 'relu'. Did you mean 'elu'?",
        ),
        (
            ["adapter.method=loar"],
            "adapter.method must be prefix-tuning-plus, lora, prefix-tuning, full or another method of peft's, "
            "such as ia3, got 'loar'. "
            "Did you mean 'lora'?",
        ),
        (
            ["adapter.method=[1]"],
            "adapter.method must be prefix-tuning-plus, lora, prefix-tuning, full or another method of peft's, "
            "such as ia3, got [1]",
        ),
        (
            ["adapter=lora"],
            "adapter must be a section, with keys under it, as in `adapter: {method: lora}`, got 'lora'",
        ),
        (["train=3"], "train must be a section, with keys under it, got 3"),
        (["data.map=3"], "data.map must be a mapping such as {prompt: question}, got 3"),
        (["model.name.x=3"], "model.name must be text, got {'x': 3}"),
        (["train.batch_size="], "train.batch_size must be a whole number, got nothing (null)"),
        (["train.batch_size=0"], "train.batch_size must be 1 or more, got 0"),
        (["train.epochs=0"], "train.epochs must be greater than 0, got 0"),
        (["train.learning_rate=.inf"], "train.learning_rate must be a finite number, got inf"),
        (
            ["adapter.layers=[1, 1]"],
            "adapter.layers must name each layer once, and at least one, got [1, 1]",
        ),
        (
            ["adapter.method=lora", "adapter.target_modules=[3]"],
            "adapter.target_modules must be text or a list of text, got [3]",
        ),
        (
            ["adapter.method=lora", "adapter.feature_map=elu"],
            "adapter.feature_map belongs to prefix-tuning-plus, but adapter.method is lora",
        ),
        (
            ["adapter.featuremap=elu"],
            "adapter.featuremap is not a setting. Did you mean adapter.feature_map?",
        ),
        (
            ["adapter.feature_dim=3"],
            "adapter.feature_dim belongs to feature_map mlp; elu has the query's width. Leave it out.",
        ),
        (
            ["adapter.sites=attention", "adapter.block_size=32"],
            "adapter.block_size belongs to sites ffn and attention+ffn; at attention an M has its head's width. "
            "Leave it out, or type --sites ffn.",
        ),
        (
            ["adapter.sites=ffn", "adapter.share_heads=kv"],
            "adapter.share_heads kv belongs to sites attention and attention+ffn; an FFN has no heads. Leave it out.",
        ),
        (
            ["adapter.method=full", "model.bits=4"],
            "model.bits 4 cannot be trained by method full: quantized weights have no gradient. "
            "Use --bits 16, or another method.",
        ),
        (
            ["adapter.method=prefix-tuning", "train.packing=true"],
            "train.packing does not go with method prefix-tuning, whose prefix lies in the key/value cache. "
            "Type --no-packing, or use another method.",
        ),
        (
            ["adapter.method=prefix-tuning", "train.gradient_checkpointing=true"],
            "train.gradient_checkpointing does not go with method prefix-tuning, whose prefix lies in the "
            "key/value cache. Type --no-gradient-checkpointing, or use another method.",
        ),
        (
            ["adapter.method=prompt-tuning", "train.packing=true"],
            "train.packing does not go with method prompt-tuning, whose trained tokens stand in front of a row, not "
            "of each example. Type --no-packing, or use another method.",
        ),
        (
            ["train.packing=true", "train.group_by_length=true"],
            "train.group_by_length does not go with train.packing, whose rows are all filled to the same length. "
            "Type --no-packing, or --set train.group_by_length=false.",
        ),
        (
            ["adapter.method=prefix-tunning"],
            "adapter.method must be prefix-tuning-plus, lora, prefix-tuning, full or another method of peft's, "
            "such as ia3, got 'prefix-tunning'. Did you mean 'prefix-tuning'?",
        ),
        (
            ["adapter.method=lora", "adapter.config.lora_alpha=3"],
            "adapter.config.lora_alpha has its own setting here. Give it as adapter.alpha.",
        ),
        (
            ["adapter.method=vera", "adapter.config.task_type=CAUSAL_LM"],
            "adapter.config.task_type is set by ptp itself. Leave it out.",
        ),
        (
            ["adapter.method=vera", "adapter.r=3"],
            "adapter.r is not a setting. Settings of peft's methods belong under adapter.config",
        ),
        (
            ["adapter.method=vera", "adapter.feature_map=elu"],
            "adapter.feature_map belongs to prefix-tuning-plus, but adapter.method is another one",
        ),
        (
            ["adapter.method=vera", "adapter.config=3"],
            "adapter.config must be a mapping such as {prompt: question}, got 3",
        ),
        (["train.batch_siz=3"], "train.batch_siz is not a setting. Did you mean train.batch_size?"),
        (["foo.bar=3"], "foo is not a setting. `ptp recipe-schema` lists all settings."),
        (
            ["train.batch_siz"],
            "--set takes section.key=value, as in train.batch_size=…, got 'train.batch_siz'",
        ),
        (["=3"], "--set takes section.key=value, as in train.batch_size=…, got '=3'"),
    ],
)
def test_a_wrong_setting_is_told_in_words(sets: list[str], problem: str) -> None:
    assert problems(None, sets) == [problem]


def test_all_wrong_sets_are_told_together() -> None:
    assert len(problems(None, ["a", "train.seed=[1", "train.seed=1"])) == 2


def test_another_method_drops_what_the_recipe_says_of_its_own(write: Any) -> None:
    file = write("adapter: {feature_map: gelu}\ntrain: {learning_rate: 0.01, seed: 3}\n")
    found = resolve(file, [], {"adapter": {"method": "lora"}})
    assert found.adapter == Lora()
    assert found.train.learning_rate is None
    assert found.train.seed == 3


def test_a_learning_rate_that_is_typed_goes_with_any_method(write: Any) -> None:
    file = write("adapter: {method: prefix-tuning-plus}\ntrain: {learning_rate: 0.002}\n")
    assert resolve(file, ["adapter.method=lora"]).train.learning_rate is None
    typed = ["adapter.method=lora", "train.learning_rate=0.004"]
    assert resolve(file, typed).train.learning_rate == 0.004


@pytest.mark.parametrize("method", ["lora", "full", "hra"])
def test_default_rates_of_weights_fall_with_the_bases_width(method: str) -> None:
    found = resolve(None, [f"adapter.method={method}"])
    rates = [found.with_learning_rate(width).train.learning_rate for width in (192, 1024, 4096)]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] / rates[2] == pytest.approx(4**0.781, rel=0.1)


def test_the_rate_of_a_relative_change_is_one_for_all_widths() -> None:
    found = resolve(None)
    assert found.train.learning_rate is None
    rates = {found.with_learning_rate(width).train.learning_rate for width in (192, 576, 4096)}
    assert rates == {default_rate(PrefixTuningPlus()).at}
    paper = resolve(None, ["adapter.preset=paper"])
    assert paper.with_learning_rate(576).train.learning_rate not in rates
    assert (
        resolve(None, ["train.learning_rate=0.5"]).with_learning_rate(9).train
        == resolve(None, ["train.learning_rate=0.5"]).train
    )


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "lora", "vera"])
def test_a_rate_for_preferences_is_a_part_of_sfts_and_says_why(method: str) -> None:
    found = resolve(None, [f"adapter.method={method}"])
    of_dpo = resolve(None, [f"adapter.method={method}", "train.objective=dpo"])
    of_simpo = resolve(None, [f"adapter.method={method}", "train.objective=simpo"])
    whole, third, part = (
        one.with_learning_rate(192).train.learning_rate or 0 for one in (found, of_dpo, of_simpo)
    )
    assert third == pytest.approx(whole / 3, rel=0.05)
    assert "a third of sft's for dpo" in default_rate(of_dpo.adapter, "dpo").why
    divisor, word = (10, "tenth") if method == "prefix-tuning-plus" else (3, "third")
    assert part == pytest.approx(whole / divisor, rel=0.05)
    assert f"a {word} of sft's for simpo" in default_rate(of_simpo.adapter, "simpo").why
    for objective in ("orpo", "kto"):
        rate = default_rate(of_simpo.adapter, objective)
        assert rate.of(192) == pytest.approx(whole / (3 if divisor == 10 else 1), rel=0.05)
        assert f"{'a third' if divisor == 10 else 'the whole'} of sft's for {objective}" in rate.why


def test_a_learning_rate_belongs_to_the_recipes_objective(write: Any) -> None:
    file = write("train: {learning_rate: 0.002, seed: 3}\n")
    assert resolve(file, ["train.objective=sft"]).train.learning_rate == 0.002
    found = resolve(file, ["train.objective=dpo"]).train
    assert (found.learning_rate, found.seed) == (None, 3)
    of_simpo = write("train: {objective: simpo, beta: 3.0, gamma: 0.5}\n")
    found = resolve(of_simpo, ["train.objective=dpo"]).train
    assert (found.beta, found.gamma) == (0.1, 1.0)
    of_none = write("train: {learning_rate: 0.002, beta: 3.0, gamma: 0.5}\n")
    found = resolve(of_none, ["train.objective=simpo"]).train
    assert (found.learning_rate, found.beta, found.gamma) == (None, 3.0, 0.5)
    of_dpo = write("train: {objective: dpo, learning_rate: 0.002, beta: 0.5}\n")
    found = resolve(of_dpo, ["train.objective=sft"]).train
    assert (found.learning_rate, found.beta) == (None, 0.1)
    assert resolve(of_dpo, ["train.objective=simpo"]).train.beta == 2.0
    assert resolve(of_dpo, ["train.objective=simpo", "train.beta=3.0"]).train.beta == 3.0


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["train.beta=0.2"], "train.beta belongs to objective dpo, simpo, orpo, kto"),
        (
            ["train.undesirable_weight=2"],
            "belongs to objective kto. Leave it out, or type --objective kto",
        ),
        (["train.objective=kto", "train.batch_size=1"], "Type --batch-size 2 or more"),
        (["train.objective=kto", "train.packing=true"], "Type --no-packing"),
        (["train.objective=kto", "adapter.method=full"], "does not go with method full"),
        (
            ["train.objective=kto", "adapter.method=lora", "adapter.dropout=0.1"],
            "dropout does not go with objective kto",
        ),
        (
            ["train.gamma=0.2", "train.objective=dpo"],
            "train.gamma belongs to objective simpo. Leave it out, or type --objective simpo",
        ),
        (["train.packing=true", "train.objective=simpo"], "does not go with objective simpo"),
        (["train.objective=dpo", "adapter.method=full"], "does not go with method full"),
        (
            ["train.objective=dpo", "adapter.method=vera", "adapter.config.vera_dropout=0.1"],
            "vera_dropout does not go with objective dpo",
        ),
        (["train.objective=dpo", "train.packing=true"], "Type --no-packing"),
        (["train.objective=dpo", "train.parallel=fsdp"], "Type --parallel ddp"),
        (["train.objective=dpo", "data.train_on=all"], "which compares answers alone"),
        (["train.objective=dp"], "Did you mean 'dpo'?"),
        (["train.first_tokens=8", "train.objective=dpo"], "does not go with train.objective dpo"),
        (["train.first_tokens=8", "data.train_on=all"], "does not go with data.train_on all"),
        (["train.first_tokens=0"], "train.first_tokens"),
    ],
)
def test_what_does_not_go_with_an_objective_is_refused(sets: list[str], told: str) -> None:
    assert told in problems(None, sets)[0]


def test_the_recipes_own_method_spelled_out_keeps_its_section(write: Any) -> None:
    found = resolve(write("adapter: {feature_map: gelu}\n"), ["adapter.method=prefix-tuning-plus"])
    assert found.adapter == PrefixTuningPlus(feature_map="gelu")


def test_a_section_whose_keys_are_commented_out_is_empty(write: Any) -> None:
    assert resolve(write("train:\n  # seed: 1\nmodel:\n  name: tiny\n")) == Recipe()


def test_a_missing_recipe_names_the_nearest_and_all_shipped_ones() -> None:
    (problem,) = problems("quickstrat")
    assert problem.endswith("Did you mean quickstart?")
    assert all(name in problem for name in shipped())


def test_a_folder_is_not_a_recipe_but_tells_where_one_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    assert problems(str(tmp_path)) == [
        f"The recipe {tmp_path} is a folder. Type {tmp_path / 'recipe.yaml'}."
    ]


def test_a_recipe_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    assert problems(str(tmp_path / "r.yaml"))[0].startswith(
        f"The recipe {tmp_path / 'r.yaml'} cannot be read: "
    )


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["train.learning_rate=1e-5", "data.map={a: 'no', b: '1e-4'}", "adapter.layers=last:2"],
        ["adapter.method=lora", "adapter.target_modules=[q_proj, v_proj]", "out='1e-4'"],
        ["adapter.method=full"],
        ["adapter.method=lora", "adapter.config.use_dora=true"],
        ["adapter.method=vera", "adapter.config={r: 8, d_initial: 1e-1, target_modules: [q_proj]}"],
        ["adapter.method=ln_tuning"],
    ],
)
def test_a_dumped_recipe_is_read_back_as_an_equal_one(sets: list[str], write: Any) -> None:
    recipe = resolve(None, sets)
    assert resolve(write(dump(recipe))) == recipe


def test_a_dump_writes_every_default_out() -> None:
    text = dump(Recipe())
    assert "keep_checkpoints: 3\n" in text
    assert "revision: null\n" in text


def test_difference_names_each_setting_that_changed() -> None:
    before = resolve(None, ["train.learning_rate=0.01", "data.map.a=b"])
    after = resolve(None, ["train.learning_rate=0.02", "train.packing=true", "out=x"])
    assert difference(before, after) == [
        "data.map.a: b → (none)",
        "train.learning_rate: 0.01 → 0.02",
        "train.packing: false → true",
        "out: null → x",
    ]
    assert difference(before, before) == []


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    resolve(name)
    assert summary(find(name).read_text()).endswith(".")


def test_recipes_of_more_than_one_method_are_shipped() -> None:
    assert {resolve(name).adapter.method for name in shipped()} >= {"prefix-tuning-plus", "lora"}


def test_a_method_of_pefts_has_its_settings_under_config_and_its_own_learning_rate(
    write: Any,
) -> None:
    file = write("adapter:\n  method: vera\n  config:\n    r: 8\n    save_projection: true\n")
    found = resolve(file, ["adapter.config.save_projection=false"])
    assert found.adapter == Peft(method="vera", config={"r": 8, "save_projection": False})
    assert found.with_learning_rate(576).train.learning_rate == 1e-2
    assert resolve(None, ["adapter.method=ln_tuning"]).adapter.method == "ln-tuning"
    assert resolve(file, ["adapter.method=lora"]).adapter == Lora()


def test_a_wrong_setting_under_config_has_its_line(write: Any) -> None:
    file = write("adapter:\n  method: lora\n  config:\n    use_dora: true\n    r: 8\n")
    assert problems(file) == [
        f"{file}:5: adapter.config.r has its own setting here. Give it as adapter.r."
    ]


@pytest.mark.parametrize("parallel", ["fsdp", "deepspeed-zero3"])
@pytest.mark.parametrize(
    "sets", [["adapter.method=hra"], ["adapter.method=lora", "adapter.config.use_dora=true"]]
)
def test_what_may_read_the_bases_weights_is_not_sharded(parallel: str, sets: list[str]) -> None:
    (told,) = problems(None, [*sets, f"train.parallel={parallel}"])
    assert (
        "which may read the base's weights, and each process has only a part of them. Use --p"
        in told
    )


def test_other_data_leaves_the_recipes_held_out_data_and_columns_behind(write: Any) -> None:
    file = write(
        "data: {train: a.jsonl, eval: b.jsonl, map: {prompt: x}, format: alpaca, max_length: 99}\n"
        "train: {max_steps: 7}\n"
    )
    data = resolve(file, [], {"data": {"train": "mine.jsonl"}}).data
    assert (data.train, data.eval, data.map, data.format) == ("mine.jsonl", None, {}, "auto")
    assert data.max_length == 99
    assert resolve(file, [], {"data": {"eval_split": 0.2}}).data.eval is None
    assert (
        resolve(file, ["data.eval=c.jsonl"], {"data": {"train": "m.jsonl"}}).data.eval == "c.jsonl"
    )
    assert resolve(file, [], {"train": {"epochs": 2.0}}).train.max_steps is None
    assert resolve(file).train.max_steps == 7


@pytest.mark.parametrize(
    ("parallel", "method", "why"),
    [
        ("fsdp", "prefix-tuning", "outside the sharded modules. Use --parallel ddp, or another"),
        ("fsdp", "full", "shards it as frozen. Use --parallel ddp or deepspeed-zero3, or another"),
        ("deepspeed-zero3", "prefix-tuning", "outside the sharded modules. Use --parallel ddp"),
    ],
)
def test_a_method_that_cannot_be_spread_over_gpus_is_refused(
    parallel: str, method: str, why: str
) -> None:
    flags = {"adapter": {"method": method}, "train": {"parallel": parallel}}
    with pytest.raises(RecipeError) as told:
        resolve(flags=flags)
    assert f"train.parallel {parallel} does not go with method {method}, " in str(told.value)
    assert why in str(told.value)
    resolve(flags={**flags, "train": {"parallel": "ddp"}})


@pytest.mark.parametrize("gpus", [1, 4, "auto", [0], [3, 1]])
def test_gpus_are_a_number_auto_or_a_list(gpus: object) -> None:
    assert resolve(flags={"train": {"gpus": gpus}}).train.gpus == gpus


@pytest.mark.parametrize("gpus", [0, -1, True, "all", [], [1, 1], ["0"], [-1], 1.5])
def test_other_gpus_are_refused(gpus: object) -> None:
    with pytest.raises(RecipeError, match=r"train.gpus must be a number of GPUs, auto, or a list"):
        resolve(flags={"train": {"gpus": gpus}})


def test_a_preset_stands_for_all_settings_of_the_adapter(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("adapter: {feature_map: gelu, sites: ffn, block_size: 8}\n", encoding="utf-8")
    found = resolve(str(file), flags={"adapter": {"preset": "paper"}})
    assert found == resolve(flags={"adapter": {"preset": "paper", "feature_map": "elu"}})
    assert found.adapter.model_dump()["sites"] == "attention"
    again = tmp_path / "again.yaml"
    again.write_text(dump(found), encoding="utf-8")
    assert resolve(str(again)) == found


def test_a_setting_that_contradicts_the_preset_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"adapter\.feature_map is 'elu' in the preset paper, got 'gelu'"
    ):
        resolve(flags={"adapter": {"preset": "paper", "feature_map": "gelu"}})
    with pytest.raises(RecipeError, match=r"adapter\.preset must be"):
        resolve(flags={"adapter": {"preset": "papers"}})
