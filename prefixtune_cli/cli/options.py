"""The flags that several commands share; `typed` knows the recipe keys that they set.

Every flag of a recipe's setting is None unless it was typed, so that what was not typed leaves the
recipe alone; the defaults stand in recipe/schema.py and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from prefixtune_cli.cli import typed


def option(*flags: str, panel: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(
        *flags,
        help=help,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=_values_of(flags[0]),
    )


def _values_of(flag: str) -> Callable[[str], list[str]]:
    """What the shell's completion offers behind a flag; where that is nothing, it offers files."""
    name = flag.removeprefix("--").partition("/")[0].replace("-", "_")

    def offered(incomplete: str) -> list[str]:
        key = OFFERED.get(name) or typed.KEYS.get(name)
        if key is None:
            return []
        from prefixtune_cli.recipe.settings import values

        before, comma, last = incomplete.rpartition(",")  # of a list
        return [f"{before}{comma}{value}" for value in values(key) if value.startswith(last)]

    return offered


# Flags that set no recipe key of their own, and whose values they take.
OFFERED = {
    "recipe": "recipe",
    "methods": "adapter.method",
    "feature_maps": "adapter.feature_map",
}


def with_flags_of(
    command: Callable[..., None], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that takes the flags of another one as well, as `**flags`, in the eyes of Typer.

    Args:
        command: the other one.
        without: parameters of it that are left out.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(command, eval_str=True).parameters
        own = inspect.signature(function, eval_str=True).parameters
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for name, parameter in {**shared, **own}.items()
                if parameter.kind is not inspect.Parameter.VAR_KEYWORD
                and (name in own or name not in without)
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
        help="tiny, an alias of `ptp models`, a local folder, a GGUF file, or a hub id.",
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
AnswerPattern = Annotated[
    str | None,
    option(
        "--answer-pattern",
        panel=DATA,
        metavar="REGEX",
        help="What of an answer has to match the reference: '#### (.*)' for worked answers.",
    ),
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
        help="prefix-tuning-plus, lora, prefix-tuning, full, or another of peft's, such as ia3, boft or vera; its "
        "settings by --set adapter.config.KEY=VALUE.",
    ),
]
Preset = Annotated[
    str | None,
    option(
        "--preset",
        panel=ADAPTER,
        metavar="NAME",
        help="Prefix-Tuning+: paper is the paper's form exactly: elu, at attention alone, no basis.",
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
Sites = Annotated[
    str | None,
    option(
        "--sites",
        panel=ADAPTER,
        metavar="WHERE",
        help="Prefix-Tuning+: where M is read: attention, ffn or attention+ffn.",
    ),
]
BlockSize = Annotated[
    int | None,
    option(
        "--block-size",
        panel=ADAPTER,
        metavar="N",
        help="Prefix-Tuning+ at the FFN: width of a block of its input.",
    ),
]
Basis = Annotated[
    bool | None,
    option(
        "--basis/--no-basis",
        panel=ADAPTER,
        help="Prefix-Tuning+: train M in the basis of its queries, found by a pass over some rows.",
    ),
]
Rank = Annotated[
    int | None,
    option("--rank", panel=ADAPTER, metavar="N", help="Prefix-Tuning+: rank of each M."),
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
WarmupRatio = Annotated[
    float | None,
    option(
        "--warmup-ratio", panel=TRAINING, metavar="X", help="Fraction of the steps for warm-up."
    ),
]
WeightDecay = Annotated[
    float | None,
    option("--weight-decay", panel=TRAINING, metavar="X", help="Of what is trained."),
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
    str | None,
    typer.Option(
        "--run",
        metavar="FOLDER",
        help="A run of `ptp train`; else, without --model and --adapter, the newest finished one.",
    ),
]
AdapterFolder = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="FOLDER", help="An adapter folder, on the base that it names."
    ),
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
