"""What contestants cost, measured beside each other: on the base that they were trained on, or on random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from transformers import PreTrainedModel

from prefixtune_cli import model as models
from prefixtune_cli.compare.comparison import Comparison, Contestant, Cost
from prefixtune_cli.compare.contest import Entry, Settings, entries
from prefixtune_cli.compare.folder import check_free
from prefixtune_cli.compare.speed import (
    BASE,
    DECODE,
    FIRST_TOKEN,
    TRAINING,
    Shape,
    Speeds,
    measure,
    random_base,
)
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.train.environment import describe_environment

ROUNDS = 5
LONG_PROMPT = 2048


def compare_costs(settings: Settings, reporter: Reporter | None = None) -> tuple[Comparison, Path]:
    """The costs alone, on a base of the model's shape with random weights; no data is read.

    Returns:
        what was found, and the comparison's folder.

    Raises:
        PtpError: see `errors`.
    """
    reporter = reporter or Silent()
    contest = entries(settings)
    recipe = contest[0].recipe
    for entry in contest:
        models.peft_config(entry.recipe.adapter)
    name = f"{recipe.model.name.rstrip('/').split('/')[-1]}-speed"
    folder = Path(settings.out) if settings.out else Path("compare") / name
    check_free(folder)
    reporter.notice(f"Building {recipe.model.name} with random weights.")
    base = random_base(recipe.model)
    speeds = costs_of(contest, settings, base, reporter)
    contestants = [
        Contestant(
            label=entry.label,
            method=entry.method,
            settings=entry.settings,
            learning_rate=None,
            trainable_parameters=speeds.parameters.get(entry.label),
            adapter_bytes=speeds.adapter_bytes.get(entry.label),
            cells=[],
        )
        for entry in contest
    ]
    found = Comparison(
        name=folder.name,
        kind="speed",
        command=settings.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model={
            **recipe.model.model_dump(include={"name", "revision", "bits"}),
            "parameters": speeds.parameters[BASE],
        },
        data={},
        protocol=_protocol(shape_of(contest, settings, base)),
        environment=describe_environment({}, 1),
        base={},
        contestants=contestants,
    )
    return with_costs(found, speeds), folder


def costs_of(
    contest: Sequence[Entry], settings: Settings, base: PreTrainedModel, reporter: Reporter
) -> Speeds:
    """Measure the contestants on this base."""
    recipe = contest[0].recipe
    return measure(
        recipe.model,
        [(entry.label, entry.recipe.adapter) for entry in contest],
        shape_of(contest, settings, base),
        base=base,
        reporter=reporter,
    )


def most_virtual_tokens(contest: Sequence[Entry]) -> int:
    """The most tokens that a contestant puts before a row."""
    configs = [models.peft_config(entry.recipe.adapter) for entry in contest]
    return max(int(getattr(config, "num_virtual_tokens", None) or 0) for config in configs)


def shape_of(contest: Sequence[Entry], settings: Settings, base: PreTrainedModel) -> Shape:
    """As much as the recipe's training step computes, and a prompt as long as the base takes, up to LONG_PROMPT."""
    recipe, plain = contest[0].recipe, Shape()
    config = base.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None) or LONG_PROMPT
    virtual = most_virtual_tokens(contest)
    room = most - plain.new_tokens - virtual
    return Shape(
        rounds=settings.rounds or ROUNDS,
        batch_size=recipe.train.batch_size,
        length=min(recipe.data.max_length, most - virtual),
        prompt_tokens=settings.prompt_tokens or min(LONG_PROMPT, room),
        prompts=settings.prompts or plain.prompts,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        optimizer=recipe.train.optimizer,
    )


def with_costs(found: Comparison, speeds: Speeds) -> Comparison:
    """The comparison with what its contestants cost; one that could not be measured is told."""
    lora = next((c.label for c in found.contestants if c.method == "lora"), None)
    contestants, unmeasured = [], {}
    for one in found.contestants:
        cost = speeds.contestants[one.label]
        if isinstance(cost, str):
            unmeasured[one.label] = cost
            contestants.append(one)
        else:
            contestants.append(replace(one, cost=_over(cost, one.label, lora, speeds)))
    base = _over(speeds.base, BASE, lora, speeds)
    return replace(found, contestants=contestants, base_cost=base, unmeasured=unmeasured)


def _over(cost: Cost, label: str, lora: str | None, speeds: Speeds) -> Cost:
    """The cost with its ratios to LoRA's, round by round."""
    if lora is None:
        return cost
    return replace(
        cost,
        training_over_lora=speeds.ratio(label, lora, TRAINING),
        decode_over_lora=speeds.ratio(label, lora, DECODE),
        first_token_over_lora=speeds.ratio(label, lora, FIRST_TOKEN),
    )


def _protocol(shape: Shape) -> dict[str, object]:
    return {
        "rounds": shape.rounds,
        "batch_size": shape.batch_size,
        "length": shape.length,
        "prompt_tokens": shape.prompt_tokens,
        "prompts": shape.prompts,
        "new_tokens": shape.new_tokens,
    }
