"""Answers from a model, with or without an adapter: batched for files, streamed for a chat."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer, set_seed

from prefixtune_cli import model as models
from prefixtune_cli.data.question import Messages, questions
from prefixtune_cli.data.template import ChatTemplate, chat_template
from prefixtune_cli.errors import RunDirError, UsageError
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.run_dir import RunDir, write_atomically
from prefixtune_cli.tokenizer import check_base, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; a temperature of 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise UsageError(f"--temperature must be 0 or above, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must lie above 0 and up to 1, got {self.top_p}.")

    def arguments(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The keyword arguments of `generate`."""
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if self.temperature == 0:
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **chosen,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None,
        }


def answer_batched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    batch_size: int = 32,
    task: str = "generating",
    reporter: Reporter | None = None,
) -> list[str]:
    """Answers to tokenized prompts, in their order.

    Prompts of similar length share a batch, padded on the left.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        prompts: token ids, one list a prompt.
        sampling: how tokens are chosen.
        batch_size: prompts a forward pass.
        task: what the reporter calls the work.
        reporter: is told how many are done.
    """
    reporter = reporter or Silent()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, width - len(prompts[i]) :] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                **sampling.arguments(tokenizer),
            )
        for i, tokens in zip(chosen, output[:, width:], strict=True):
            answers[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        reporter.progress(task, start + len(chosen), len(order), {})
    model.train(was_training)
    return answers


@dataclass
class Speaker:
    """A loaded model that is asked questions, with its adapter or without."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    name: str
    use_adapter: bool

    @property
    def description(self) -> str:
        return f"{self.name}, {'with its adapter' if self.use_adapter else 'the base alone'}"

    def prompt(self, messages: Messages) -> list[int]:
        """The token ids of a conversation that waits for an answer, as training saw them."""
        if self.template is None:
            text = "\n".join(message["content"] for message in messages)
            return list(self.tokenizer(text)["input_ids"])
        text = self.template.render(messages, "The conversation", ask=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def mode(self) -> Any:
        """Within it the model is with or without its adapter, as `use_adapter` says."""
        if isinstance(self.model, PeftModel) and not self.use_adapter:
            return self.model.disable_adapter()
        return contextlib.nullcontext()


def load_speaker(
    *,
    run: str | None,
    model: str | None,
    adapter: str | None,
    no_adapter: bool,
    bits: int | None,
    seed: int,
) -> Speaker:
    """Load what `--run`, or `--model` with `--adapter`, names.

    Raises:
        UsageError: both or neither are given.
        RunDirError: the run has no adapter yet.
        ModelError: the base or the adapter cannot be loaded.
    """
    if (run is None) == (model is None):
        raise UsageError(
            "Give either --run FOLDER, or --model NAME (with --adapter FOLDER or without)."
        )
    if run is not None and adapter is not None:
        raise UsageError("--run has its own adapter. Leave --adapter out, or give --model with it.")
    section, template, folder = ModelSection(name=model or "tiny"), None, adapter
    if run is not None:
        run_dir = RunDir(run)
        if not run_dir.recipe.exists():
            raise RunDirError(
                f"{run} is not a run directory (it has no recipe.yaml). The runs are under runs/."
            )
        if not run_dir.adapter.exists():
            raise RunDirError(
                f"The run in {run} has no adapter yet. To go on with it: {run_dir.resume_command}"
            )
        recipe = resolve(str(run_dir.recipe))
        section, template, folder = recipe.model, recipe.data.chat_template, str(run_dir.adapter)
        if recipe.adapter.method == "full" and not no_adapter:
            section, folder = section.model_copy(update={"name": folder}), None
    if bits is not None:
        section = ModelSection.model_validate({**section.model_dump(), "bits": bits})
    if folder is not None and not no_adapter:
        models.read_adapter_config(Path(folder))
    check_base(section)
    tokenizer = load_tokenizer(section)
    set_seed(seed)
    loaded: Any = models.load_base(section)
    if folder is not None and not no_adapter:
        loaded = models.load_adapter(loaded, folder)
    return Speaker(
        model=loaded.eval(),
        tokenizer=tokenizer,
        template=chat_template(tokenizer, template),
        name=run or str(model),
        use_adapter=folder is not None and not no_adapter,
    )


def conversation(text: str | None, system: str | None) -> Messages:
    """The beginning of a conversation: a system message, a question, or both."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages if text is None else [*messages, {"role": "user", "content": text}]


def answer_file(
    speaker: Speaker,
    source: str,
    out: str,
    *,
    mapping: Mapping[str, str],
    sampling: Sampling,
    batch_size: int,
    reporter: Reporter,
) -> int:
    """Answer every prompt of `source` into `out`, a JSONL of the rows with an `answer` added; return how many."""
    asked = list(questions(source, mapping))
    with speaker.mode():
        answers = answer_batched(
            speaker.model,
            speaker.tokenizer,
            [speaker.prompt(messages) for _, messages in asked],
            sampling=sampling,
            batch_size=batch_size,
            reporter=reporter,
        )
    lines = (
        json.dumps({**row, "answer": answer}, ensure_ascii=False, default=str)
        for (row, _), answer in zip(asked, answers, strict=True)
    )
    write_atomically(Path(out), "".join(f"{line}\n" for line in lines))
    return len(asked)


def answer_streamed(speaker: Speaker, messages: Messages, *, sampling: Sampling) -> Iterator[str]:
    """The answer to a conversation, in pieces as they are generated; pieces join to the whole text."""
    tokenizer = speaker.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([speaker.prompt(messages)], device=speaker.model.device)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad(), speaker.mode():
                speaker.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    **sampling.arguments(tokenizer),
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failure:
        raise failure[0]
