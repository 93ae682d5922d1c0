"""The table of flags: those that set a key of the recipe, and the other flags of `ptp train`.

A flag that sets a key of the recipe takes its type, choices, default and description from recipe/schema/.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag; `typer_options.takes` makes a command's option from it.

    Attributes:
        names: as they are typed, as in `--out -o` or `--basis/--no-basis`.
        key: the key of the recipe that it sets, if any.
        type: the type of its value; if it has a key, the schema gives the type.
        metavar: the placeholder for the value in help; by default N, X or NAME, by the type.
        help: what it does; by default the schema's description of the key.
        offers: the key whose values the shell's completion offers; by default its own.
        called: the name of its parameter; by default the flag's name.
        panel: its section in help.
    """

    names: str
    key: str | None = None
    type: Any = str
    metavar: str | None = None
    help: str | None = None
    offers: str | None = None
    called: str | None = None
    panel: str = "Options"

    @property
    def name(self) -> str:
        """Its first name, which errors use: `--out`."""
        return self.names.split()[0].partition("/")[0]

    @property
    def parameter(self) -> str:
        """The name of the parameter that takes it: `out`."""
        return self.called or self.name.removeprefix("--").replace("-", "_")


def panel(title: str, *flags: Flag) -> tuple[Flag, ...]:
    """The flags of one section of help."""
    return tuple(replace(flag, panel=title) for flag in flags)


FLAGS = (
    *panel(
        "Recipe",
        Flag(
            "--recipe -r",
            metavar="NAME|FILE",
            help="A YAML file, or the name of a shipped recipe (see `ptp recipes`).",
            offers="recipe",
        ),
        Flag(
            "--set",
            type=list[str],
            metavar="KEY=VALUE",
            help="Any setting of the recipe, as in train.weight_decay=0.1. Repeatable; flags win over it.",
        ),
    ),
    *panel(
        "Model",
        Flag("--model -m", "model.name"),
        Flag("--revision", "model.revision"),
        Flag("--bits", "model.bits"),
        Flag("--device", "model.device"),
        Flag("--attention", "model.attention"),
        Flag("--trust-remote-code", "model.trust_remote_code"),
    ),
    *panel(
        "Data",
        Flag("--data -d", "data.train", metavar="DATA"),
        Flag(
            "--eval-data",
            "data.eval",
            metavar="DATA",
            help="Held-out data, in the same forms as --data.",
        ),
        Flag(
            "--eval-split",
            "data.eval_split",
            metavar="FRACTION",
            help="Fraction of --data to hold out if there is no --eval-data.",
        ),
        Flag("--format", "data.format"),
        Flag(
            "--map",
            "data.map",
            metavar="FIELD=COLUMN,…",
            help="Which field is which of your columns, as in prompt=question,completion=answer.",
        ),
        Flag("--train-on", "data.train_on", metavar="WHAT"),
        Flag("--max-length", "data.max_length", metavar="TOKENS"),
        Flag("--on-long", "data.on_long", metavar="WHAT"),
        Flag("--chat-template", "data.chat_template", metavar="FILE"),
        Flag("--answer-pattern", "evaluate.answer_pattern", metavar="REGEX"),
    ),
    *panel(
        "Run",
        Flag("--out -o", "out", metavar="FOLDER"),
        Flag(
            "--resume",
            metavar="[auto]",
            help="Continue from the last checkpoint in --out; with auto, start if there is no run.",
        ),
        Flag("--overwrite", type=bool, help="Delete the run that is in --out."),
        Flag("--keep", "train.keep_checkpoints"),
        Flag("--save-steps", "train.save_steps"),
        Flag("--save-minutes", "train.save_minutes"),
    ),
    *panel(
        "Training",
        Flag(
            "--find-learning-rate",
            type=bool,
            help="First try a few rates around the default in short runs, then take the best.",
        ),
        Flag("--objective", "train.objective"),
        Flag("--beta", "train.beta"),
        Flag("--gamma", "train.gamma"),
        Flag("--first-tokens", "train.first_tokens"),
        Flag("--epochs", "train.epochs"),
        Flag("--steps", "train.max_steps", help="Optimizer steps, instead of --epochs."),
        Flag("--learning-rate --lr", "train.learning_rate"),
        Flag("--warmup-ratio", "train.warmup_ratio"),
        Flag("--weight-decay", "train.weight_decay"),
        Flag("--batch-size", "train.batch_size"),
        Flag("--gradient-accumulation", "train.gradient_accumulation"),
        Flag("--packing/--no-packing", "train.packing"),
        Flag(
            "--gradient-checkpointing/--no-gradient-checkpointing", "train.gradient_checkpointing"
        ),
        Flag("--auto-batch/--no-auto-batch", "train.auto_batch"),
        Flag("--seed", "train.seed"),
        Flag(
            "--gpus",
            "train.gpus",
            metavar="N|auto|LIST",
            help="GPUs of each machine: how many, auto, or numbers such as 0,2; with --device cpu, processes.",
        ),
        Flag("--parallel", "train.parallel", metavar="HOW"),
        Flag("--nodes", type=int, help="Number of machines of the run."),
        Flag("--node-rank", type=int, help="This machine's number, from 0."),
        Flag(
            "--rendezvous",
            metavar="HOST:PORT",
            help="The address of machine 0: its name, and a free port on it.",
        ),
        Flag("--track", "train.track"),
    ),
    *panel(
        "Adapter",
        Flag("--from", "train.start_from", metavar="RUN|FOLDER", called="start_from"),
        Flag(
            "--method",
            "adapter.method",
            help="prefix-tuning-plus, lora, prefix-tuning, full, or another method of peft, such as ia3, boft or vera, "
            "with its settings as --set adapter.config.KEY=VALUE.",
        ),
        Flag(
            "--preset",
            "adapter.preset",
            help="Prefix-Tuning+: paper is exactly the paper's form: elu, only at attention, no basis.",
        ),
        Flag("--feature-map", "adapter.feature_map"),
        Flag("--feature-dim", "adapter.feature_dim"),
        Flag("--normalize-query/--no-normalize-query", "adapter.normalize_query"),
        Flag("--basis/--no-basis", "adapter.basis"),
        Flag("--sites", "adapter.sites", metavar="WHERE"),
        Flag("--block-size", "adapter.block_size"),
        Flag("--rank", "adapter.rank"),
        Flag("--share-heads", "adapter.share_heads", metavar="WHAT"),
        Flag(
            "--layers",
            "adapter.layers",
            metavar="LAYERS",
            help="Prefix-Tuning+: all, last:4, or numbers such as 0,1,5.",
        ),
        Flag("--lora-r", "adapter.r"),
        Flag("--lora-alpha", "adapter.alpha"),
        Flag("--num-virtual-tokens", "adapter.num_virtual_tokens"),
    ),
    Flag(
        "--json",
        type=bool,
        help="Print JSON on stdout, for another program to read.",
        called="as_json",
    ),
)
