"""Generates answers from a model, with or without an adapter: in batches for files, streamed for a chat."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    set_seed,
)

from prefixtune_cli import model as models
from prefixtune_cli.adapter_folder import check_fits, load_adapter
from prefixtune_cli.agreement import any_prompt, check_generation
from prefixtune_cli.answer_file import AnswerFile
from prefixtune_cli.data.conversation import Conversation
from prefixtune_cli.data.row_encoder import end_of_turn_id, plain, start_ids, with_start
from prefixtune_cli.data.template import ChatTemplate
from prefixtune_cli.data.template import chat_template as template_of
from prefixtune_cli.pointed import Pointed
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.sampling import Sampling
from prefixtune_cli.tokenizer import check_base, check_ids, load_tokenizer

SECONDS_BETWEEN_LOOKS = 1.0  # at a batch that is being answered


def answer_batched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int | None,
    sampling: Sampling,
    batch_size: int = 32,
    told: Callable[[int], object] = lambda done: None,
    made: Callable[[int, str], object] = lambda i, answer: None,
) -> list[str]:
    """Answers to tokenized prompts, in their order.

    Prompts of similar length share a batch, padded on the left.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        prompts: token ids, one list a prompt.
        end_id: the token that ends an answer, beside those of the model's generation_config.
        sampling: how tokens are chosen.
        batch_size: prompts a forward pass.
        told: called with the number of finished prompts, after each batch, and every second within one.
        made: called with the index of each prompt and its answer, as soon as the answer is finished.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [torch.tensor(prompts[i], dtype=torch.long) for i in chosen]
        ids = pad_sequence(rows, True, tokenizer.pad_token_id or 0, "left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        width = ids.shape[1]
        with torch.no_grad(), models.evaluating(model):
            how = sampling.arguments(model, tokenizer, end_id)

            def more(made: int, before: int = start) -> None:
                told(before + made)

            pace = _Pace(width, sampling.max_new_tokens, how["eos_token_id"] or [], more)
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                stopping_criteria=StoppingCriteriaList([pace]),
                **how,
            )
        for i, tokens in zip(chosen, output[:, width:], strict=True):
            answers[i] = tokenizer.decode(tokens, skip_special_tokens=True)
            made(i, answers[i])
        told(start + len(chosen))
    return answers


class _Pace(StoppingCriteria):
    """Reports every second how many answers of a batch are done; never stops one.

    An unfinished answer counts as a fraction: its tokens over the most tokens.

    Args:
        width: tokens of the prompts, including padding.
        most: the most tokens of an answer.
        ends: the tokens that end an answer.
        told: called with the number of answers.
    """

    def __init__(
        self, width: int, most: int, ends: Sequence[int], told: Callable[[int], object]
    ) -> None:
        self._width, self._most, self._ends, self._told = width, most, ends, told
        self._at = time.monotonic()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if time.monotonic() - self._at >= SECONDS_BETWEEN_LOOKS:
            made = input_ids[:, self._width :]
            ended = torch.isin(made, torch.tensor(self._ends).to(made)).any(dim=1)
            share = torch.where(ended, 1.0, made.shape[1] / self._most)
            self._told(int(share.sum()))
            self._at = time.monotonic()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class Speaker:
    """A loaded model that answers questions, with its adapter or without."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    name: str
    use_adapter: bool
    section: ModelSection

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter that can be switched off."""
        return isinstance(self.model, PeftModel)

    @property
    def description(self) -> str:
        if not self.has_adapter:
            return self.name
        return f"{self.name}, {'with its adapter' if self.use_adapter else 'the base alone'}"

    @property
    def end_id(self) -> int | None:
        return end_of_turn_id(self.tokenizer, self.template)

    def prompt(self, asked: Conversation) -> list[int]:
        """The token ids of a conversation that waits for an answer, rendered as in training.

        Raises:
            DataError: the template refuses the conversation.
            ModelError: the base has no embedding for one of them.
        """
        if self.template is None:
            start, text = start_ids(self.tokenizer), plain(asked.messages)
        else:
            asked = self.template.accepted(asked, "The conversation")
            start, text = [], self.template.render(asked, "The conversation", ask=True)
        ids = with_start(start, self.tokenizer(text, add_special_tokens=False)["input_ids"])
        check_ids(self.section, self.tokenizer, ids, "The prompt")
        return ids

    def mode(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, the adapter is on or off, as `use_adapter` says."""
        return contextlib.nullcontext() if self.use_adapter else models.without_adapter(self.model)


def load_speaker(
    who: Pointed,
    *,
    no_adapter: bool = False,
    seed: int = 0,
    chat_template: str | None = None,
) -> Speaker:
    """Load a base, and the adapter trained on it, if any.

    An adapter comes with the tokenizer and the template that it was trained with; the file `chat_template` replaces
    the template.

    Raises:
        DataError: the chat template cannot be read.
        ModelError: the base or the adapter cannot be loaded, or does not generate what it computes.
    """
    section, folder = who.base, who.folder
    if who.whole:
        if not no_adapter:
            section = section.model_copy(update={"name": str(folder), "revision": None})
        folder = None
    check_base(section)
    models.check_precision(section)
    if folder is not None:
        check_fits(section, folder)
    tokenizer = load_tokenizer(section, who.folder)
    chat = template_of(tokenizer, chat_template)
    set_seed(seed)
    loaded: Any = models.load_base(section)
    if folder is not None:
        loaded = load_adapter(loaded, folder)
        check_generation(loaded, any_prompt(tokenizer), then="type the same command again.")
    return Speaker(loaded.eval(), tokenizer, chat, who.given, not no_adapter, section)


def conversation(text: str | None, system: str | None) -> Conversation:
    """The beginning of a conversation: a system message, a question, or both."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return Conversation(
        messages if text is None else [*messages, {"role": "user", "content": text}]
    )


def answer_file(
    speaker: Speaker,
    asked: Sequence[Conversation],
    out: AnswerFile,
    *,
    sampling: Sampling,
    batch_size: int,
    reporter: Reporter,
) -> None:
    """Answer every conversation of `asked`, and write the answers to the open file `out`."""
    with speaker.mode():
        answer_batched(
            speaker.model,
            speaker.tokenizer,
            [speaker.prompt(question) for question in asked],
            end_id=speaker.end_id,
            sampling=sampling,
            batch_size=batch_size,
            told=lambda done: reporter.progress("generating", done, len(asked), {}),
            made=out.add,
        )


class _Stop(StoppingCriteria):
    """Ends a generation from another thread."""

    def __init__(self) -> None:
        self.wanted = Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.wanted.is_set(), device=input_ids.device)


def answer_streamed(
    speaker: Speaker, asked: Conversation, *, sampling: Sampling
) -> Generator[str, None, None]:
    """The answer to a conversation, in pieces as they are generated; together they are the whole text.

    Closing the iterator ends the generation.
    """
    tokenizer = speaker.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([speaker.prompt(asked)], device=speaker.model.device)
    stop, failure = _Stop(), list[BaseException]()

    def work() -> None:
        try:
            with torch.no_grad(), speaker.mode():
                speaker.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                    **sampling.arguments(speaker.model, tokenizer, speaker.end_id),
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.wanted.set()
        thread.join()
    if failure:
        raise failure[0]
