"""The sections of a recipe besides `adapter`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from prefixtune_cli.recipe.schema.section import Section

Objective = Literal["sft", "dpo", "simpo", "orpo", "kto"]
# What a row of training data is: a prompt with its answer; a prompt with a chosen and a rejected answer; a prompt with
# an answer that is said to be desirable or not.
Kind = Literal["answers", "pairs", "labelled"]
DataFormat = Literal[
    "auto", "messages", "conversations", "prompt-completion", "alpaca", "question-answer", "text",
    "preference",
]  # fmt: skip


class ModelSection(Section):
    name: str = Field(
        "tiny",
        description="tiny, an alias of `ptp models`, a local folder, a GGUF file, or a hub id.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    bits: Literal[4, 8, 16, 32] = Field(
        16,
        description="Precision of the frozen base; 4 and 8 by bitsandbytes, 16 is bfloat16, 32 is float32; for a base "
        "that is already quantized, 16 and 32 are the precision of the computation.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="Where to compute; `auto` takes the GPUs if there are any."
    )
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field(
        "auto", description="The base's attention kernel; `auto` leaves the choice to transformers."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code from the model's repository."
    )


HELD_OUT_SHARE = 0.05  # of the rows, if neither `eval` nor `eval_split` is set


class DataSection(Section):
    train: str | None = Field(
        None, description="A file, a folder, sample:NAME, or a hub data set id."
    )
    eval: str | None = Field(None, description="Held-out data, in the same forms as `train`.")
    eval_split: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=f"Fraction of `train` to hold out if there is no `eval`; null is {HELD_OUT_SHARE}.",
    )
    format: DataFormat = Field(
        "auto", description="Format of the rows; `auto` recognises it from the columns."
    )
    map: dict[str, str] = Field(
        default_factory=dict, description="Renamed columns, as in {prompt: question}."
    )
    train_on: Literal["completion", "all"] = Field(
        "completion",
        description="Tokens with a loss; completions and assistant turns, or every token.",
    )
    max_length: int = Field(
        1024, ge=8, description="Maximum tokens per example, template included."
    )
    on_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What to do with longer examples."
    )
    chat_template: str | None = Field(
        None, description="A Jinja file to use in place of the tokenizer's template."
    )

    @property
    def held_out_share(self) -> float:
        """The fraction of `train` that is held out if there is no `eval`."""
        return HELD_OUT_SHARE if self.eval_split is None else self.eval_split


class TrainSection(Section):
    objective: Objective = Field(
        "sft",
        description="What is learned; sft learns answers, dpo, simpo and orpo to prefer one answer of a pair to the "
        "other (arXiv 2305.18290, 2405.14734, 2403.07691), kto to give answers that are labelled desirable, and not "
        "the others (arXiv 2402.01306).",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="β: how strongly DPO and KTO hold the adapter to its base or start; SimPO's factor of "
        "log-probabilities per token, whose default is 2.0; or the weight of ORPO's odds ratio, which its paper calls "
        "λ.",
    )
    gamma: float = Field(
        1.0, ge=0, description="γ: by how much SimPO wants the chosen answer ahead."
    )
    desirable_weight: float = Field(
        1.0, gt=0, description="λ_D: the weight of desirable answers in KTO's loss."
    )
    undesirable_weight: float = Field(
        1.0, gt=0, description="λ_U: the weight of undesirable answers in KTO's loss."
    )
    start_from: str | None = Field(
        None,
        description="A run or an adapter folder whose adapter is trained on; it gives the base and the adapter's "
        "settings that are not set.",
    )
    first_tokens: int | None = Field(
        None,
        ge=1,
        description="Learn only so many answer tokens of a training row, the first ones, and leave out the rest of it "
        "(UPFT, Ji et al. 2025, arXiv 2503.02875); null learns all.",
    )
    epochs: float = Field(3.0, gt=0, description="Passes over the data; `max_steps` overrides it.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate; null is a rate for the method and the base's width, which `ptp train` prints.",
    )
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate changes during training."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Fraction of the steps for warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the trained weights.")
    batch_size: int = Field(8, ge=1, description="Examples per device and forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    auto_batch: bool = Field(
        False,
        description="Halve the batch and double the accumulation until it fits into memory.",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0 switches it off.")
    packing: bool = Field(
        False,
        description="Fill each row with several examples; only if the attention kernel keeps them apart.",
    )
    group_by_length: bool = Field(
        False,
        description="Make batches of rows of about the same length, in random order; saves padding if lengths differ.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, to save memory."
    )
    optimizer: str = Field(
        "adamw_torch", description="An optimizer of transformers' TrainingArguments."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")
    log_steps: int = Field(10, ge=1, description="Steps between two lines of metrics.jsonl.")
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between two held-out losses; null is only at the end."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Steps between two checkpoints; null is a tenth of the run."
    )
    save_minutes: float | None = Field(
        10, gt=0, description="Minutes between two checkpoints, besides the steps; null is never."
    )
    keep_checkpoints: int = Field(
        3, ge=1, description="Checkpoints to keep; older ones are deleted."
    )
    gpus: int | str | list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="GPUs of each machine: a number, `auto` for all, or a list; null is the first, or the CPU.",
    )
    parallel: Literal["ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"] = Field(
        "ddp",
        description="How to use several GPUs; ddp gives each the whole base, the others shard the base or the trained "
        "weights.",
    )
    track: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="Where else to send the metrics."
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpus_have_a_form(cls, value: Any) -> Any:
        number = type(value) is int and value >= 1
        listed = isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value)
        if not (value in (None, "auto") or number or (listed and len(set(value)) == len(value))):
            raise ValueError(
                f"must be a number of GPUs, auto, or a list such as [0, 2], each once, got {value!r}"
            )
        return value


class EvaluateSection(Section):
    """The evaluation on held-out data that ends a run, and the local data of `ptp eval`'s benchmarks."""

    max_rows: int = Field(500, ge=1, description="Held-out rows to score, evenly spread.")
    max_new_tokens: int = Field(
        32, ge=1, description="Answers longer than this count as long, and are not matched exactly."
    )
    answer_pattern: str | None = Field(
        None,
        description="The part of an answer that must match the reference: '#### (.*)' for worked answers; a regular "
        "expression of Python's re. Its group's first match in the answer must equal that in the reference, however "
        "long both are.",
    )
    batch_size: int = Field(32, ge=1, description="Rows per forward pass.")
    bench_data: dict[str, str] = Field(
        default_factory=dict,
        description="Local copies of benchmarks' data, as in {mmlu: /data/mmlu}, for `ptp eval`.",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_finds_one_part(cls, value: str | None) -> str | None:
        if not value:
            return None
        try:
            groups = re.compile(value).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"must be a regular expression of Python's re, got {value!r}: {error}"
            ) from None
        if groups > 1:
            raise ValueError(
                f"must have one group, got {groups} in {value!r}. Write the other brackets as (?:…)"
            )
        return value
