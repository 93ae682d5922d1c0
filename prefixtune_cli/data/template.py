"""The chat template: which characters of a rendered conversation are trained.

Each assistant turn's content and the end-of-turn token behind it are trained. A template may mark its
answers with `{% generation %}`. For any other template, ptp renders the conversation before the turn, with
the generation prompt. The turn begins where that text ends, which is exactly the text that the model sees
when it is asked for the turn.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefixtune_cli.data.conversation import Conversation
from prefixtune_cli.data.lines import start_of
from prefixtune_cli.data.locate import check_exists
from prefixtune_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

OPTIONS = (
    "Give a template with --chat-template FILE.jinja (best with its answers between {% generation %} and "
    "{% endgeneration %}), or a model whose tokenizer has a fitting one, or data with the columns prompt and completion"
)
_PROBE = "PROBE"


class Answer(NamedTuple):
    """Where an answer is in the rendered conversation, whether it is trained, and whether the data masks it."""

    start: int
    end: int
    trained: bool
    masked: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the token that ends an answer in it.

    Attributes:
        source: the Jinja text.
        variables: the special tokens that the template may print.
        end_of_turn: the token right behind an answer; None if the template puts none.
        marked: whether the template has `{% generation %}`.
    """

    source: str
    variables: dict[str, str]
    end_of_turn: str | None
    marked: bool

    def accepted(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation in the form that the template takes.

        ShareGPT's function_call becomes `tool_calls` if the template knows them, else it stays text. Arguments of
        calls that are JSON text stay text if the template prints them as they are. A template that encodes them would
        encode them twice, so it gets objects. Answers before the first question are left out if the template refuses
        them.
        """
        conversation = conversation.with_calls("tool_calls" in self.source)
        if conversation.arguments and not self._prints_arguments(conversation, where):
            conversation = conversation.with_parsed_arguments()
        if conversation.opening:
            try:
                self._render(conversation, where, ask=False, mark=False)
            except DataError:
                return conversation.without_opening()
        return conversation

    def _prints_arguments(self, conversation: Conversation, where: str) -> bool:
        try:
            text = self.render(conversation, where, ask=False)
        except DataError:  # it takes only objects
            return False
        return all(
            written in text and json.dumps(written, ensure_ascii=False) not in text
            for written in conversation.arguments
        )

    def render(self, conversation: Conversation, where: str, *, ask: bool) -> str:
        """The conversation as text; with `ask`, up to where the next answer begins."""
        return self._render(conversation, where, ask, mark=False)[0]

    def unprinted(self, conversation: Conversation, where: str, keys: set[str]) -> set[str]:
        """The keys among `keys` that the template ignores: without them, the rendered text is the same."""
        text = self.render(conversation, where, ask=False)

        def changes(without: set[str]) -> bool:
            try:
                return self.render(conversation.without(without), where, ask=False) != text
            except DataError:  # the template needs them
                return True

        return {key for key in keys if not changes({key})} if changes(keys) else keys

    def answers(self, conversation: Conversation, where: str) -> tuple[str, list[Answer]]:
        """The rendered conversation, and its answers, in order.

        An answer is trained if it is not empty, the data does not mask it, and a question came before it.

        Raises:
            DataError: the template refuses the conversation, or its answers cannot be told apart.
        """
        answers, learned = conversation.answers, {*conversation.learned}
        if not self.marked:
            text, _ = self._render(conversation, where, ask=False, mark=False)
            return text, self._search(text, conversation, learned, where)
        text, marks = self._render(conversation, where, ask=False, mark=True)
        matched = len(marks) == len(answers)
        if conversation.masked and not matched:
            raise DataError(
                f"{where}: the template has {len(marks)} {{% generation %}} blocks for {len(answers)} answers, "
                "so it is unknown which of them the data masks. Put each answer in one block."
            )
        end_of_turn = self.end_of_turn or ""
        found = []
        for number, (start, end) in enumerate(marks):
            trained = text[start:end].rstrip()
            if not trained.endswith(end_of_turn):
                raise DataError(
                    f"{where}: the template's {{% generation %}} block leaves out the end-of-turn token "
                    f"{end_of_turn!r}, so the model would never learn to stop. Put {{% endgeneration %}} behind it."
                )
            said = bool(trained.removesuffix(end_of_turn).strip())
            i = answers[number] if matched else None
            wanted = said and (i is None or i in learned)
            found.append(Answer(start, start + len(trained), wanted, i in conversation.masked))
        return text, found

    def _search(
        self, text: str, conversation: Conversation, learned: set[int], where: str
    ) -> list[Answer]:
        found: list[Answer] = []
        for i in conversation.answers:
            span = self._turn(text, conversation, i, where)
            if span is not None:
                said = i in learned and self._says(text, conversation, i, span, where)
                found.append(Answer(*span, said, i in conversation.masked))
            elif i not in conversation.opening:  # those are context, wherever they begin
                raise DataError(
                    f"{where}, message {i + 1}: the chat template renders this answer differently within the "
                    "conversation than after the messages before it, so it is unknown which tokens to train. "
                    f"{OPTIONS}."
                )
        return found

    def _turn(self, text: str, conversation: Conversation, i: int, where: str) -> Span | None:
        """Where answer `i` is in the text of the whole conversation, with its end-of-turn token; None if unknown."""
        message = conversation.messages[i]
        try:
            prompt = self.render(conversation.until(i), where, ask=True)
        except DataError:
            if i in conversation.opening:
                return None
            raise
        if not text.startswith(prompt):
            return None
        start, content = len(prompt), message["content"].strip()
        more = {*message} - {"role", "content"}  # may be printed behind the content
        has_more = bool(more)
        if has_more and self.end_of_turn is None:  # else all printed text would count as the answer
            has_more = self.unprinted(conversation.until(i + 1), where, more) != more
        end = None if has_more else self._end(text, start, content)
        if end is not None:
            return start, end
        whole = self.render(conversation.until(i + 1), where, ask=False).rstrip()
        if text.startswith(whole) and whole.endswith(self.end_of_turn or ""):
            return (start, len(whole)) if content in whole[start:] else None
        end = self._end(text, start, content) if has_more else None
        if end is None and has_more and self.end_of_turn is not None:
            stop = text.find(self.end_of_turn, start)
            end = (
                stop + len(self.end_of_turn) if content in text[start : max(stop, start)] else None
            )
        return None if end is None else (start, end)

    def _says(self, text: str, conversation: Conversation, i: int, span: Span, where: str) -> bool:
        """Whether the answer is more than an empty turn. It may be a call without text."""
        message = conversation.messages[i]
        if message["content"].strip() or message.keys() == {"role", "content"}:
            return bool(message["content"].strip())
        blank = conversation.until(i)
        blank = replace(blank, messages=[*blank.messages, {"role": message["role"], "content": ""}])
        return not self.render(blank, where, ask=False).startswith(text[: span[1]])

    def _end(self, text: str, start: int, content: str) -> int | None:
        """Where the answer that begins at `start` ends, with its end-of-turn token."""
        at = text.find(content, start)
        while at >= 0:
            behind = at + len(content)
            if self.end_of_turn is None:
                return None if text[start:at].strip() else behind
            if self.end_of_turn in text[start:at]:
                return None
            end = text.find(self.end_of_turn, behind)
            if end >= 0 and not text[behind:end].strip():
                return end + len(self.end_of_turn)
            at = text.find(content, at + 1)
        return None

    def _render(
        self, conversation: Conversation, where: str, ask: bool, mark: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[conversation.messages],
                tools=conversation.tools,
                chat_template=self.source,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=mark,
                **self.variables,
            )
        except Exception as error:  # a template is a program, and may raise anything
            roles = ", ".join(message["role"] for message in conversation.messages) or "none"
            raise DataError(
                f"{where}: the chat template refuses the conversation (roles: {roles}): {start_of(str(error), 200)}. "
                f"Change the conversation. {OPTIONS}."
            ) from error
        return texts[0], marks[0] if mark else []


def chat_template(
    tokenizer: PreTrainedTokenizerBase, file: str | None = None
) -> ChatTemplate | None:
    """The template in `file`, else the tokenizer's own; None if there is neither.

    Raises:
        DataError: the file is missing or not UTF-8, or the template cannot render one question and answer.
    """
    if file is not None:
        path = Path(file).expanduser()
        check_exists("The chat template", file)
        try:
            source = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"The chat template {file} cannot be read: {error}.") from error
    elif tokenizer.chat_template:
        source = tokenizer.get_chat_template()
    else:
        return None
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
    template = ChatTemplate(source, variables, None, marked)
    question = Conversation(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
    )
    text = template.render(question, file or "The tokenizer's chat template", ask=False)
    if _PROBE not in text:
        raise DataError(
            f"{file or 'The tokenizer'}: the chat template leaves out the answer of a conversation. {OPTIONS}."
        )
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens = sorted((token for token in added if token.strip()), key=len, reverse=True)
    found = re.match(
        rf"\s*({'|'.join(map(re.escape, tokens)) or '(?!)'})", text.rpartition(_PROBE)[2]
    )
    return ChatTemplate(source, variables, found[1] if found else None, marked)
