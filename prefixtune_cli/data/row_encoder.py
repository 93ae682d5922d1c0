"""A row becomes token ids and labels.

Each trained or masked part of a text is tokenized on its own. So the boundary between prompt and answer is exact, and
the prompt has the same tokens that the model sees when it is asked. tokenized_data.py encodes a pair of answers as two
rows of one prompt.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixtune_cli.data.conversation import Conversation
from prefixtune_cli.data.lines import origin
from prefixtune_cli.data.load import LoadedData
from prefixtune_cli.data.template import OPTIONS, ChatTemplate, chat_template
from prefixtune_cli.errors import DataError
from prefixtune_cli.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED = -100


class PromptAndAnswer(NamedTuple):
    """A question for generation, and the answer that the data gives."""

    prompt_ids: list[int]
    answer: str


class _Segment(NamedTuple):
    text: str
    trained: bool
    ends_turn: bool = False
    masked: bool = False


class Remark(StrEnum):
    """What is noted about a row beside its tokens. Some are followed by a name, as in `printed: name`."""

    CONTROL = "control"  # its own text spells this control token
    OPENING = "opening"  # it begins with an answer
    OPENING_LEFT_OUT = "opening left out"  # it begins with an answer, which the template refuses
    PRINTED = "printed"  # the template uses this key of its messages
    UNPRINTED = "unprinted"  # the template ignores this key of its messages


class RowEncoder:
    """Turns rows into tokens by one tokenizer, one template and one data section.

    Args:
        rows: what `load_rows` returned.
        tokenizer: the model's.
        section: how rows are read.
        first_tokens: the trained tokens after which a row ends, before it is truncated; None ends none.

    Raises:
        DataError: the data needs a template or a token that the tokenizer does not have, or has no answers whose first
            tokens could be counted.
    """

    def __init__(
        self,
        rows: LoadedData,
        tokenizer: PreTrainedTokenizerBase,
        section: DataSection,
        first_tokens: int | None = None,
    ) -> None:
        self.tokenizer, self.section, self.files = tokenizer, section, rows.files
        self.first_tokens = first_tokens
        self.is_plain = _is_plain(tokenizer)
        if first_tokens is not None and rows.layout == "text":
            raise DataError(
                "train.first_tokens counts tokens of answers, and texts (format text) have none. Leave it out."
            )
        self.chat: ChatTemplate | None = None
        if rows.layout != "text":
            self.chat = chat_template(tokenizer, section.chat_template)
        if rows.layout == "messages" and self.chat is None:
            raise DataError(
                f"The data is chats (format {rows.format}), and the model's tokenizer has no chat template. {OPTIONS}."
            )
        self.appends_end = self.chat is None or self.chat.end_of_turn is None
        end_id = end_of_turn_id(tokenizer, self.chat)
        if end_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token and the chat template puts no token behind an answer, so "
                f"the model could not learn to stop. {OPTIONS}."
            )
        self.end_id = end_id
        self.start_ids = [] if self.chat else start_ids(tokenizer)
        self.printed: set[str] = set()  # keys of messages that the template is known to use
        tokens = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self.control = re.compile("|".join(re.escape(t) for t in tokens if t.strip()) or "(?!)")
        # SentencePiece puts a space before every text: later segments are tokenized behind a line break.
        newline, joined = self._ids(["\n", "\na"])
        plain = self._ids(["a"])[0]
        self.anchor = (
            newline if joined != newline + plain and joined[: len(newline)] == newline else []
        )

    def prompt(self, row: dict[str, Any]) -> PromptAndAnswer:
        """The row up to its last answer, in the same tokens as in training, and that answer.

        Raises:
            DataError: the row has no answer.
        """
        where = origin(self.files[row["file"]], row["line"])
        if "text" in row:
            raise DataError(f"{where}: a text has no answer to compare with.")
        conversation = Conversation.of(row)
        if self.chat is None:
            text, answer = plain(conversation.messages[:-1]), row["completion"]
        else:
            conversation = self.chat.accepted(conversation, where)
            turns = conversation.learned
            if not turns:
                raise DataError(f"{where}: no message is an answer that is trained.")
            text = self.chat.render(conversation.until(turns[-1]), where, ask=True)
            answer = self._reference(self.chat, conversation.until(turns[-1] + 1), where)
        return PromptAndAnswer(with_start(self.start_ids, self._rows_ids([[text]])[0][0]), answer)

    def _reference(self, chat: ChatTemplate, conversation: Conversation, where: str) -> str:
        """The text of the last message; for a call of a tool, the text that the model has to generate."""
        last = conversation.messages[-1]
        if "tool_calls" not in last:
            return str(last["content"])
        text, answers = chat.answers(conversation, where)
        ids = self._ids([text[answers[-1].start : answers[-1].end]])[0]
        said = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return said.rpartition("</think>")[2].strip()

    def __call__(self, table: Any, numbers: list[int]) -> Any:
        """Turn a batch of rows (pyarrow table) into input_ids, labels, length, trained, ended, remarks and row."""
        import numpy as np
        import pyarrow as pa

        rows = table.to_pylist()
        origins = [origin(self.files[row["file"]], row["line"]) for row in rows]
        remarks: list[list[str]] = [[] for _ in rows]
        segments = [
            self._segments(row, where, said)
            for row, where, said in zip(rows, origins, remarks, strict=True)
        ]
        ids = self._rows_ids([[segment.text for segment in row] for row in segments])
        most = sys.maxsize if self.first_tokens is None else self.first_tokens
        flat: list[int] = []
        counts, flags, offsets, lengths, trained, ended = [], [], [0], [], [], []
        for row, parts, where in zip(segments, ids, origins, strict=True):
            length = used = turn_end = learned = row_trained = 0
            for segment, part in zip(
                [_Segment("", row[0].trained if row else False), *row],
                [self._start(parts), *parts],
                strict=True,
            ):
                part = self._ended(part, where) if segment.ends_turn else part
                part = part[: most - learned] if segment.trained or learned == most else part
                learned += len(part) if segment.trained else 0
                length += len(part)
                turn_end = length if segment.ends_turn and segment.trained else turn_end
                part = part[: self.section.max_length - used]
                used += len(part)
                flat += part
                counts.append(len(part))
                flags.append(segment.trained)
                row_trained += len(part) if segment.trained else 0
            offsets.append(len(flat))
            lengths.append(length)
            trained.append(row_trained)
            ended.append(turn_end <= used)
        tokens = np.array(flat, dtype=np.int32)
        labels = np.where(np.repeat(np.array(flags, dtype=bool), counts), tokens, MASKED)
        starts = pa.array(offsets, pa.int32())
        return pa.table(
            {
                "input_ids": pa.ListArray.from_arrays(starts, pa.array(tokens)),
                "labels": pa.ListArray.from_arrays(starts, pa.array(labels.astype(np.int32))),
                "length": pa.array(lengths, pa.int32()),
                "trained": pa.array(trained, pa.int32()),
                "ended": pa.array(ended),
                "remarks": pa.array(remarks, pa.list_(pa.string())),
                "row": pa.array(numbers, pa.int32()),
            }
        )

    def _start(self, parts: list[list[int]]) -> list[int]:
        """The ids to put before these parts of a row."""
        first = next(filter(None, parts), [])
        return [] if first[: len(self.start_ids)] == self.start_ids else self.start_ids

    def _segments(self, row: dict[str, Any], where: str, remarks: list[str]) -> list[_Segment]:
        if self.chat is not None:
            segments = self._chat_segments(self.chat, Conversation.of(row), where, remarks)
        elif "text" in row:
            segments = [_Segment(row["text"], bool(row["text"].strip()), ends_turn=True)]
        else:
            conversation = Conversation.of(row)
            remarks += [f"{Remark.UNPRINTED}: {key}" for key in sorted(conversation.extra)]
            prompt, completion = join(plain(conversation.messages[:-1]), row["completion"])
            said = bool(completion.strip())
            segments = [_Segment(prompt, False), _Segment(completion, said, ends_turn=True)]
        if self.section.train_on == "all":
            said = any(segment.text.strip() for segment in segments)
            return [segment._replace(trained=said and not segment.masked) for segment in segments]
        return segments

    def _chat_segments(
        self, chat: ChatTemplate, conversation: Conversation, where: str, remarks: list[str]
    ) -> list[_Segment]:
        """The rendered conversation, cut where training begins and ends."""
        accepted = chat.accepted(conversation, where)
        remarks += self._remarks(chat, conversation, accepted, where)
        text, answers = chat.answers(accepted, where)
        segments, at = [], 0
        for answer in answers:
            segments.append(_Segment(text[at : answer.start], False))
            part = text[answer.start : answer.end]
            segments.append(_Segment(part, answer.trained, ends_turn=True, masked=answer.masked))
            at = answer.end
        return [*segments, _Segment(text[at:].rstrip(), False)]

    def _remarks(
        self, chat: ChatTemplate, conversation: Conversation, accepted: Conversation, where: str
    ) -> Iterator[str]:
        for token in sorted(set(self.control.findall(conversation.text))):
            yield f"{Remark.CONTROL}: {token}"
        if conversation.opening:
            yield Remark.OPENING if accepted.opening else Remark.OPENING_LEFT_OUT
        unknown = accepted.extra - self.printed
        if unknown:
            unprinted = chat.unprinted(accepted, where, unknown)
            self.printed |= unknown - unprinted
            for key in sorted(unknown):
                yield f"{Remark.UNPRINTED if key in unprinted else Remark.PRINTED}: {key}"

    def _ended(self, ids: list[int], where: str) -> list[int]:
        """The ids of a turn, with the end-of-turn token at their end."""
        if ids and ids[-1] == self.end_id:
            return ids
        if self.appends_end:
            return [*ids, self.end_id]
        raise DataError(
            f"{where}: the last trained token is not the end-of-turn token "
            f"{self.tokenizer.convert_ids_to_tokens(self.end_id)!r}, but "
            f"{self.tokenizer.decode(ids[-1:])!r}: the tokenizer merges it with the text before it. {OPTIONS}."
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not self.is_plain:
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            return list(encoded["input_ids"])
        # The same ids as above, without the time to find the place of each token in the text.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _rows_ids(self, rows: list[list[str]]) -> list[list[list[int]]]:
        """The ids of each row's texts, in one call of the tokenizer."""
        texts = [text for row in rows for text in row if text]
        found = iter(self._ids(texts)) if texts else iter(())
        ids = [[next(found) if text else [] for text in row] for row in rows]
        if self.anchor:
            later = [
                (parts, i, row[i])
                for row, parts in zip(rows, ids, strict=True)
                for i in range(1, len(row))
                if row[i] and any(row[:i])
            ]
            behind = self._ids(["\n" + text for *_, text in later]) if later else []
            for (parts, i, _), part in zip(later, behind, strict=True):
                if part[: len(self.anchor)] == self.anchor:
                    parts[i] = part[len(self.anchor) :]
        return ids


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer does only what its backend does: some override the call."""
    from transformers import PreTrainedTokenizerFast

    own = ("__call__", "_encode_plus")
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name) for name in own
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None) -> int | None:
    """The token that ends an answer, in training as in generation: the template's, else end-of-sequence."""
    end = chat.end_of_turn if chat else None
    found = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)
    return None if found is None else int(found)


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts it before a text without a template."""
    first = int(tokenizer("a").input_ids[0])
    return [first] if first == tokenizer.bos_token_id else []


def with_start(start: Sequence[int], ids: Sequence[int]) -> list[int]:
    """The ids with `start` in front, unless they already begin with it."""
    start, ids = list(start), list(ids)
    return ids if ids[: len(start)] == start else start + ids


def plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as text without a template: a line break between them."""
    return "\n".join(message["content"] for message in messages)


def join(prompt: str, completion: str) -> tuple[str, str]:
    """Prompt and completion as they are joined without a template: with a space between words."""
    if prompt and completion and not prompt[-1].isspace() and not completion[0].isspace():
        return prompt, " " + completion
    return prompt, completion
