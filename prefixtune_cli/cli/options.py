"""The flags that several commands share, and the recipe keys that they set.

Every flag of a recipe's setting is None unless it was typed, so that what was not typed leaves the
recipe alone; the defaults stand in recipe/schema.py and nowhere else.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from prefixtune_cli.errors import UsageError

# A parameter of a command → the recipe key that it sets. What a recipe has no key for, such as
# --resume, is not in here.
KEYS = {
    "model": "model.name",
    "revision": "model.revision",
    "bits": "model.bits",
    "device": "model.device",
    "attention": "model.attention",
    "trust_remote_code": "model.trust_remote_code",
    "data": "data.train",
    "eval_data": "data.eval",
    "eval_split": "data.eval_split",
    "format": "data.format",
    "map": "data.map",
    "train_on": "data.train_on",
    "max_length": "data.max_length",
    "on_long": "data.on_long",
    "chat_template": "data.chat_template",
    "method": "adapter.method",
    "feature_map": "adapter.feature_map",
    "feature_dim": "adapter.feature_dim",
    "normalize_query": "adapter.normalize_query",
    "share_heads": "adapter.share_heads",
    "layers": "adapter.layers",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "num_virtual_tokens": "adapter.num_virtual_tokens",
    "epochs": "train.epochs",
    "steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "batch_size": "train.batch_size",
    "gradient_accumulation": "train.gradient_accumulation",
    "packing": "train.packing",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "gpus": "train.gpus",
    "parallel": "train.parallel",
    "auto_batch": "train.auto_batch",
    "keep": "train.keep_checkpoints",
    "save_steps": "train.save_steps",
    "save_minutes": "train.save_minutes",
    "track": "train.track",
    "out": "out",
}


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe settings that a command's flags ask for, nested as a recipe is.

    Args:
        given: a command's parameters by name (its `locals()`); those that are None or have no
            recipe key are passed over.

    Raises:
        UsageError: `--map` is not of the form column=column.
    """
    nested: dict[str, Any] = {}
    for name, key in KEYS.items():
        value = given.get(name)
        if value is None:
            continue
        if name in PARSERS:
            value = PARSERS[name](value)
        *sections, last = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested


def parse_map(given: list[str]) -> dict[str, str]:
    """`--map prompt=question,completion=answer`, once or several times, as a mapping."""
    pairs = [pair.partition("=") for text in given for pair in text.split(",")]
    for left, equals, right in pairs:
        if not (left.strip() and equals and right.strip()):
            raise UsageError(
                f"--map takes FIELD=COLUMN,…, as in prompt=question,completion=answer, got {','.join(given)!r}"
            )
    return {left.strip(): right.strip() for left, _, right in pairs}


def names(given: list[str]) -> tuple[str, ...]:
    """`--bench a,b --bench c` as names, each once."""
    found = [name.strip() for text in given for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in found if name))


def parse_pairs(flag: str, given: list[str]) -> dict[str, str]:
    """`--bench-data mmlu=PATH`, once or several times, as a mapping; a path may hold commas and equal signs."""
    pairs = [text.partition("=") for text in given]
    for (name, equals, path), text in zip(pairs, given, strict=True):
        if not (name.strip() and equals and path.strip()):
            raise UsageError(f"{flag} takes NAME=PATH, as in mmlu=/data/mmlu, got {text!r}")
    return {name.strip(): path.strip() for name, _, path in pairs}


def parse_layers(given: str) -> str | list[int]:
    """`--layers 0,1,5` as a list; `all` and `last:4` stay as they are."""
    numbers = given.strip("[] ").split(",")
    return [int(n) for n in numbers] if all(n.strip().isdecimal() for n in numbers) else given


def parse_gpus(given: str) -> int | str | list[int]:
    """`--gpus 4` as a number, `--gpus 0,2` or `--gpus 1,` as a list; `auto` stays as it is."""
    if given.strip().isdecimal():
        return int(given)
    numbers = [part for part in given.strip("[] ").split(",") if part.strip()]
    return (
        [int(n) for n in numbers]
        if numbers and all(n.strip().isdecimal() for n in numbers)
        else given
    )


def with_resume_value(given: list[str]) -> list[str]:
    """The arguments, `--resume` by itself being `--resume must`: Typer knows no option whose value may be left out."""
    return [
        "--resume=must" if text == "--resume" and after not in ("auto", "must") else text
        for text, after in itertools.zip_longest(given, given[1:])
    ]


PARSERS: dict[str, Callable[[Any], Any]] = {
    "map": parse_map,
    "layers": parse_layers,
    "gpus": parse_gpus,
}


def option(*flags: str, panel: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(
        *flags, help=help, metavar=metavar, rich_help_panel=panel, show_default=False
    )


def with_flags_of(
    command: Callable[..., None],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that takes the flags of another one as well, as `**flags`, in the eyes of Typer."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(command, eval_str=True).parameters
        own = inspect.signature(function, eval_str=True).parameters
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for parameter in {**shared, **own}.values()
                if parameter.kind is not inspect.Parameter.VAR_KEYWORD
            ]
        )
        return function

    return decorate


RECIPE, MODEL, DATA, ADAPTER, TRAINING, RUN = (
    "Recipe",
    "Model",
    "Data",
    "Adapter",
    "Training",
    "Run",
)

RecipeName = Annotated[
    str | None,
    option(
        "--recipe",
        "-r",
        panel=RECIPE,
        metavar="NAME|FILE",
        help="A YAML file, or the name of a shipped recipe (see `ptp recipes`).",
    ),
]
Sets = Annotated[
    list[str] | None,
    option(
        "--set",
        panel=RECIPE,
        metavar="KEY=VALUE",
        help="Any setting of the recipe, as in train.weight_decay=0.1. Repeatable; flags win over it.",
    ),
]
Model = Annotated[
    str | None,
    option(
        "--model",
        "-m",
        panel=MODEL,
        metavar="NAME",
        help="tiny, an alias of `ptp models`, a local folder, or a hub id.",
    ),
]
Revision = Annotated[
    str | None,
    option("--revision", panel=MODEL, metavar="NAME", help="Branch, tag or commit of a hub model."),
]
Bits = Annotated[
    int | None,
    option(
        "--bits", panel=MODEL, metavar="N", help="Precision of the frozen base: 4, 8, 16 or 32."
    ),
]
Device = Annotated[
    str | None,
    option("--device", panel=MODEL, metavar="NAME", help="Where to compute: auto, cuda or cpu."),
]
Attention = Annotated[
    str | None,
    option(
        "--attention",
        panel=MODEL,
        metavar="NAME",
        help="auto, sdpa, eager, flash_attention_2, flash_attention_3 or flex_attention.",
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    option(
        "--trust-remote-code",
        panel=MODEL,
        help="Run Python code that the model's repository ships.",
    ),
]
Data = Annotated[
    str | None,
    option(
        "--data",
        "-d",
        panel=DATA,
        metavar="DATA",
        help="A file, a folder, sample:NAME, or a hub data set id.",
    ),
]
EvalData = Annotated[
    str | None,
    option(
        "--eval-data",
        panel=DATA,
        metavar="DATA",
        help="Held-out data, in the same forms as --data.",
    ),
]
EvalSplit = Annotated[
    float | None,
    option(
        "--eval-split",
        panel=DATA,
        metavar="FRACTION",
        help="Fraction of --data that is held out where there is no --eval-data.",
    ),
]
Format = Annotated[
    str | None,
    option(
        "--format",
        panel=DATA,
        metavar="NAME",
        help="auto, messages, conversations, prompt-completion, alpaca, question-answer or text.",
    ),
]
Map = Annotated[
    list[str] | None,
    option(
        "--map",
        panel=DATA,
        metavar="FIELD=COLUMN,…",
        help="Which column of yours is which field, as in prompt=question,completion=answer.",
    ),
]
TrainOn = Annotated[
    str | None,
    option("--train-on", panel=DATA, metavar="WHAT", help="Tokens with a loss: completion or all."),
]
MaxLength = Annotated[
    int | None,
    option(
        "--max-length",
        panel=DATA,
        metavar="TOKENS",
        help="Tokens of an example, template included.",
    ),
]
OnLong = Annotated[
    str | None,
    option(
        "--on-long",
        panel=DATA,
        metavar="WHAT",
        help="What happens to longer examples: truncate, drop or error.",
    ),
]
ChatTemplate = Annotated[
    str | None,
    option(
        "--chat-template",
        panel=DATA,
        metavar="FILE",
        help="A Jinja file used in place of the tokenizer's template.",
    ),
]
Method = Annotated[
    str | None,
    option(
        "--method",
        panel=ADAPTER,
        metavar="NAME",
        help="prefix-tuning-plus, lora, prefix-tuning or full.",
    ),
]
FeatureMap = Annotated[
    str | None,
    option(
        "--feature-map", panel=ADAPTER, metavar="NAME", help="Prefix-Tuning+: elu, gelu or mlp."
    ),
]
FeatureDim = Annotated[
    int | None,
    option(
        "--feature-dim", panel=ADAPTER, metavar="N", help="Prefix-Tuning+: features a head of mlp."
    ),
]
NormalizeQuery = Annotated[
    bool | None,
    option(
        "--normalize-query/--no-normalize-query",
        panel=ADAPTER,
        help="Prefix-Tuning+: divide the query by its root mean square.",
    ),
]
ShareHeads = Annotated[
    str | None,
    option(
        "--share-heads",
        panel=ADAPTER,
        metavar="WHAT",
        help="Prefix-Tuning+: one M a query head, or one a key/value head: query or kv.",
    ),
]
Layers = Annotated[
    str | None,
    option(
        "--layers",
        panel=ADAPTER,
        metavar="LAYERS",
        help="Prefix-Tuning+: all, last:4, or numbers such as 0,1,5.",
    ),
]
LoraR = Annotated[
    int | None,
    option("--lora-r", panel=ADAPTER, metavar="N", help="LoRA: rank."),
]
LoraAlpha = Annotated[
    float | None,
    option("--lora-alpha", panel=ADAPTER, metavar="X", help="LoRA: scale."),
]
NumVirtualTokens = Annotated[
    int | None,
    option(
        "--num-virtual-tokens",
        panel=ADAPTER,
        metavar="N",
        help="Prefix-Tuning: trained vectors a layer.",
    ),
]
Epochs = Annotated[
    float | None,
    option("--epochs", panel=TRAINING, metavar="X", help="Passes over the data."),
]
Steps = Annotated[
    int | None,
    option("--steps", panel=TRAINING, metavar="N", help="Optimizer steps, in place of --epochs."),
]
LearningRate = Annotated[
    float | None,
    option("--learning-rate", "--lr", panel=TRAINING, metavar="X", help="Peak learning rate."),
]
BatchSize = Annotated[
    int | None,
    option("--batch-size", panel=TRAINING, metavar="N", help="Examples a device and forward pass."),
]
GradientAccumulation = Annotated[
    int | None,
    option(
        "--gradient-accumulation",
        panel=TRAINING,
        metavar="N",
        help="Forward passes an optimizer step.",
    ),
]
Packing = Annotated[
    bool | None,
    option("--packing/--no-packing", panel=TRAINING, help="Fill each row with several examples."),
]
GradientCheckpointing = Annotated[
    bool | None,
    option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        panel=TRAINING,
        help="Recompute activations in the backward pass, to save memory.",
    ),
]
Seed = Annotated[
    int | None,
    option("--seed", panel=TRAINING, metavar="N", help="Seed of everything random."),
]
AutoBatch = Annotated[
    bool | None,
    option(
        "--auto-batch/--no-auto-batch",
        panel=TRAINING,
        help="Halve the batch, and double the accumulation, until it fits the memory.",
    ),
]
Gpus = Annotated[
    str | None,
    option(
        "--gpus",
        panel=TRAINING,
        metavar="N|auto|LIST",
        help="GPUs of each machine: how many, auto, or numbers such as 0,2; with --device cpu, processes.",
    ),
]
Parallel = Annotated[
    str | None,
    option(
        "--parallel",
        panel=TRAINING,
        metavar="HOW",
        help="Over several GPUs: ddp, fsdp, deepspeed-zero2 or deepspeed-zero3.",
    ),
]
Nodes = Annotated[
    int | None, option("--nodes", panel=TRAINING, metavar="N", help="Machines of the run.")
]
NodeRank = Annotated[
    int | None,
    option("--node-rank", panel=TRAINING, metavar="N", help="Which of them this one is, from 0."),
]
Rendezvous = Annotated[
    str | None,
    option(
        "--rendezvous",
        panel=TRAINING,
        metavar="HOST:PORT",
        help="Where the others find machine 0: its name, and a free port of it.",
    ),
]
Resume = Annotated[
    str | None,
    option(
        "--resume",
        panel=RUN,
        metavar="[auto]",
        help="Go on from the last checkpoint in --out; with auto, or start where there is no run.",
    ),
]
Keep = Annotated[
    int | None,
    option("--keep", panel=RUN, metavar="N", help="Checkpoints that are kept."),
]
SaveSteps = Annotated[
    int | None,
    option("--save-steps", panel=RUN, metavar="N", help="Steps between two checkpoints."),
]
SaveMinutes = Annotated[
    float | None,
    option(
        "--save-minutes",
        panel=RUN,
        metavar="X",
        help="Minutes between two checkpoints, beside the steps.",
    ),
]
Track = Annotated[
    str | None,
    option("--track", panel=TRAINING, metavar="NAME", help="none, tensorboard, wandb or trackio."),
]
Out = Annotated[
    str | None,
    option("--out", "-o", panel=RUN, metavar="FOLDER", help="The run directory."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON on stdout, for another program to read."),
]

# What `generate` and `chat` share.
Run = Annotated[
    str | None, typer.Option("--run", metavar="FOLDER", help="A run directory of `ptp train`.")
]
AdapterFolder = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FOLDER", help="An adapter folder, for the base --model."),
]
NoAdapter = Annotated[
    bool, typer.Option("--no-adapter", help="The base alone, to see what the adapter changes.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="The longest answer.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest token.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", metavar="X", help="Sample from the likeliest tokens of this mass."),
]
SamplingSeed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, metavar="N", help="Seed of the sampling.")
]
