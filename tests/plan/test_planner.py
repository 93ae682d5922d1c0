"""The memory plan: parts, methods, checkpointing, depth, batches, several GPUs, and bases that cannot be planned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune_cli.errors import ModelError, RecipeError
from prefixtune_cli.optimizer import optimizer_factory
from prefixtune_cli.plan import (
    FRAMEWORK_RESERVE_BYTES,
    METHODS,
    Planner,
    largest_batch,
    plan,
    with_method,
)
from prefixtune_cli.plan.base import base_config
from prefixtune_cli.plan.skeleton import Skeleton
from prefixtune_cli.plan.step import Batch, peaks, step
from prefixtune_cli.recipe.schema import ModelSection, Recipe
from tests.plan.conftest import MakeRecipe

FLOAT32, BFLOAT16 = 4, 2


def test_all_methods_are_planned_side_by_side_and_their_parts_add_up(recipe: MakeRecipe) -> None:
    plans = plan(recipe())
    assert [found.method for found in plans] == list(METHODS)
    for found in plans:
        assert found.total == sum(asdict(found.parts).values())
        assert found.parts.reserve == FRAMEWORK_RESERVE_BYTES
        assert min(asdict(found.parts).values()) >= 0


def test_weights_adapter_and_optimizer_are_counted_to_the_byte(recipe: MakeRecipe) -> None:
    model, whole = plan(recipe(), methods=["prefix-tuning-plus", "full"])
    elements = 2 * 2048 * 256 + 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256) + 256
    memories = 2 * 2 * 4 * 64 * 64  # at attention, and beside the FFN in blocks of 64
    rotary_tables = 2 * 32 * FLOAT32
    assert model.parts.weights == BFLOAT16 * elements + rotary_tables
    assert model.parts.adapter == 2 * FLOAT32 * memories  # the basis of each M has its size
    assert model.parts.optimizer == 2 * FLOAT32 * memories + 4 * FLOAT32  # and four step counts
    assert whole.parts.weights == FLOAT32 * elements + rotary_tables
    assert whole.parts.adapter == 0


def test_a_quantized_base_counts_its_packed_weights_and_scales(recipe: MakeRecipe) -> None:
    linear = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704)
    plain = Planner(recipe()).parts().weights - BFLOAT16 * linear
    blocks = [size // 64 for size in [65536, 65536, 32768, 32768] + 3 * [180224]]
    scales_4 = 2 * sum(n + 4 * -(-n // 256) + 4 * 17 for n in blocks)
    scales_8 = 2 * 4 * (256 + 2 * 128 + 256 + 2 * 704 + 256)
    assert Planner(recipe(model={"bits": 4})).parts().weights == plain + linear // 2 + scales_4
    assert Planner(recipe(model={"bits": 8})).parts().weights == plain + linear + scales_8


def test_a_checkpoint_that_is_quantized_already_counts_at_its_own_precision(
    recipe: MakeRecipe,
) -> None:
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    stored = recipe({"quantization_config": nf4})
    assert Planner(stored).parts().weights == Planner(recipe(model={"bits": 4})).parts().weights
    gptq = Planner(
        recipe({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}})
    )
    assert gptq.parts().weights < Planner(recipe(model={"bits": 8})).parts().weights
    with pytest.raises(ModelError, match="method full cannot train it"):
        plan(stored, methods=["full"])


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "lora", "full"])
def test_checkpointing_lowers_activations_and_is_told_beside(
    method: str, recipe: MakeRecipe
) -> None:
    (found,) = plan(recipe(data={"max_length": 512}), methods=[method])
    assert found.checkpointed is not None
    assert found.checkpointed.activations < found.plain.activations
    assert found.parts == found.plain
    (chosen,) = plan(recipe(train={"gradient_checkpointing": True}), methods=[method])
    assert chosen.parts == chosen.checkpointed


def test_a_plan_does_not_depend_on_what_was_planned_before(recipe: MakeRecipe) -> None:
    planner = Planner(with_method(recipe(), "lora"))
    planner.parts(4, checkpointing=True)
    after = planner.parts(2, checkpointing=False)
    assert after == Planner(planner.recipe).parts(2, checkpointing=False)


def test_prefix_tuning_has_no_plan_with_checkpointing(recipe: MakeRecipe) -> None:
    (found,) = plan(recipe(train={"gradient_checkpointing": True}), methods=["prefix-tuning"])
    assert found.checkpointed is None
    assert found.parts == found.plain


MIXTURE = {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
ODD = {
    "equal layers": {},
    "a first layer of its own": MIXTURE,
    "sliding and full attention": {"model_type": "gemma3_text", "head_dim": 64},
}


@pytest.mark.parametrize("base", ODD)
@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [("prefix-tuning-plus", False), ("lora", True), ("full", False)],
)
def test_a_shortened_decoder_tells_the_memory_of_the_whole_one(
    base: str, method: str, checkpointing: bool, recipe: MakeRecipe
) -> None:
    asked = with_method(recipe(ODD[base] | {"num_hidden_layers": 7}), method)
    skeleton = Skeleton(asked.model, asked.adapter, base_config(asked.model), on_gpu=True)
    batch = Batch(2, 64, True, False, checkpointing, 1.0)
    optimizer = optimizer_factory("adamw_torch", on_gpu=True, use_cpu=True)
    shortened = peaks(skeleton, batch, optimizer)
    whole = step(skeleton, batch, optimizer, None)
    # A layer with the other kind of attention would keep tables of rotary angles in memory.
    close = pytest.approx(max(sum(p.values()) for p in whole.values()), rel=2e-3)
    assert max(sum(p.values()) for p in shortened.values()) == close


def test_the_head_computes_the_tokens_that_are_learned_alone(recipe: MakeRecipe) -> None:
    wide = {"vocab_size": 50_000}
    of_all, of_few, of_more = (
        Planner(recipe(wide, train={"first_tokens": first})).parts().total
        for first in (None, 2, 10_000)
    )
    assert of_few < of_all == of_more
    packed = {"first_tokens": 2, "packing": True}
    in_rows = Planner(recipe(wide, train=packed)).parts().total
    assert in_rows == Planner(recipe(wide, train={"packing": True})).parts().total


def test_only_adapted_layers_and_those_above_keep_activations(recipe: MakeRecipe) -> None:
    six = {"num_hidden_layers": 6}
    everywhere = Planner(recipe(six)).parts()
    on_top = Planner(recipe(six, adapter={"layers": "last:2"})).parts()
    assert on_top.adapter * 3 == everywhere.adapter
    assert on_top.activations < 0.6 * everywhere.activations


@pytest.mark.parametrize(("method", "rows"), [("prefix-tuning-plus", 21), ("full", 3)])
def test_the_largest_batch_is_the_largest(method: str, rows: int, recipe: MakeRecipe) -> None:
    planner = Planner(with_method(recipe(), method))
    room, more = planner.parts(rows).total, planner.parts(rows + 1).total
    assert room < more
    assert planner.largest_batch(room) == planner.largest_batch(more - 1) == rows
    assert planner.largest_batch(room - 1) == rows - 1
    one = planner.parts(1).total
    assert largest_batch(planner.recipe, one) == 1
    assert largest_batch(planner.recipe, one - 1) == 0


def test_rows_of_one_length_in_flash_attention_take_less_than_padded_ones(
    recipe: MakeRecipe,
) -> None:
    padded = Planner(recipe()).parts().total
    assert Planner(recipe(model={"attention": "flash_attention_2"})).parts().total < padded
    assert Planner(recipe(model={"attention": "eager"})).parts().total > padded


def test_pairs_are_padded_in_flash_attention_too(recipe: MakeRecipe) -> None:
    pairs = {"train": {"objective": "dpo"}}
    padded = Planner(recipe(**pairs)).parts().total
    flash = Planner(recipe(**pairs, model={"attention": "flash_attention_2"}))
    assert flash.parts().total == padded


def test_an_optimizer_counts_what_it_keeps(recipe: MakeRecipe) -> None:
    def kept(name: str) -> int:
        return Planner(with_method(recipe(train={"optimizer": name}), "lora")).parts().optimizer

    assert kept("sgd") == 0
    assert kept("adamw_bnb_8bit") < kept("adamw_torch")
    with pytest.raises(RecipeError, match="Did you mean adamw_torch"):
        kept("adamw_torhc")


def on(recipe: Recipe, **train: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def test_several_gpus_share_out_what_their_parallelism_shards(recipe: MakeRecipe) -> None:
    asked = with_method(recipe(train={"batch_size": 1}), "full")
    alone = Planner(asked).parts()
    for gpus in (4, [0, 1, 2, 3]):
        replicated = Planner(on(asked, gpus=gpus)).parts()
        assert replicated.weights == alone.weights
        assert replicated.gradients == alone.gradients + alone.weights - 2 * 32 * FLOAT32
    sharded = Planner(on(asked, gpus=4, parallel="deepspeed-zero3")).parts()
    states = Planner(on(asked, gpus=4, parallel="deepspeed-zero2")).parts()
    assert sharded.total < states.total < alone.total
    assert states.weights == alone.weights


def test_fsdp_shards_the_frozen_base_alone(recipe: MakeRecipe) -> None:
    asked = recipe({"num_hidden_layers": 12}, train={"batch_size": 1})
    alone, sharded = Planner(asked).parts(), Planner(on(asked, gpus=4, parallel="fsdp")).parts()
    assert sharded.weights < alone.weights
    assert (sharded.adapter, sharded.optimizer) == (alone.adapter, alone.optimizer)
    for method in ("full", "prefix-tuning"):
        with pytest.raises(RecipeError, match="--parallel fsdp does not go with it"):
            with_method(on(asked, gpus=4, parallel="fsdp"), method)


def test_a_cpu_has_no_reserve_and_kernels_of_its_own(recipe: MakeRecipe) -> None:
    on_cpu = Planner(recipe(model={"device": "cpu"})).parts()
    assert on_cpu.reserve == 0
    # Without Triton, operators fold the head's tiles, each with its own result; so the tiles are narrower.
    assert on_cpu.logits > Planner(recipe()).parts().logits


def test_a_folder_without_config_says_what_it_is_instead(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ModelError, match="is an adapter, not a base model"):
        base_config(ModelSection(name=str(tmp_path)))


def test_an_unknown_hub_id_offline_is_one_clear_error() -> None:
    with pytest.raises(ModelError, match=r"some-org/some-model is not known here.*--model /path"):
        base_config(ModelSection(name="some-org/some-model"))


def test_a_model_that_does_not_run_without_weights_is_told_so(recipe: MakeRecipe) -> None:
    asked = recipe({"num_attention_heads": 3})  # 256 is not a multiple of it
    with pytest.raises(ModelError, match=r"cannot be planned.*ptp train --steps 2"):
        Planner(asked).parts()


def test_planning_leaves_the_threads_and_the_default_device_alone(recipe: MakeRecipe) -> None:
    plan(recipe(), methods=["lora"])
    assert torch.empty(1).device.type == "cpu"
    assert type(torch.empty(1)) is torch.Tensor
