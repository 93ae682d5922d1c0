"""The chat template: which characters of a rendered conversation are trained.

Trained are each assistant turn's content and the end-of-turn token behind it. A template that marks
its answers with `{% generation %}` says so itself. For any other, the turn begins where the
conversation before it, rendered with the generation prompt, ends, which is exactly what the model
sees when it is asked for that turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune_cli.data.locate import near_names
from prefixtune_cli.data.read import start_of
from prefixtune_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Span = tuple[int, int]

OPTIONS = (
    "Give a template with --chat-template FILE.jinja (one whose answers stand between {% generation %} and "
    "{% endgeneration %} leaves nothing to guess), or a model whose tokenizer has a fitting one, or data with the "
    "columns prompt and completion"
)
_PROBE = "PROBE"


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the token that ends an answer in it.

    Attributes:
        source: the Jinja text.
        variables: the special tokens that the template may print.
        end_of_turn: the token right behind an answer; None where the template puts none.
        marked: whether the template has `{% generation %}`.
    """

    source: str
    variables: dict[str, str]
    end_of_turn: str | None
    marked: bool

    def render(self, messages: Messages, where: str, *, ask: bool) -> str:
        """The conversation as text; with `ask`, up to where the next answer begins."""
        return self._render(messages, where, ask, mark=False)[0]

    def spans(self, messages: Messages, where: str) -> tuple[str, list[tuple[Span, bool]]]:
        """The rendered conversation, and each answer's (start, end) in it with whether it says anything.

        Raises:
            DataError: the template refuses the conversation, or its answers cannot be told apart.
        """
        if not self.marked:
            text, _ = self._render(messages, where, ask=False, mark=False)
            return text, self._search(text, messages, where)
        text, marks = self._render(messages, where, ask=False, mark=True)
        end_of_turn = self.end_of_turn or ""
        spans = []
        for start, end in marks:
            trained = text[start:end].rstrip()
            if not trained.endswith(end_of_turn):
                raise DataError(
                    f"{where}: the template's {{% generation %}} block leaves out the end-of-turn token "
                    f"{end_of_turn!r}, so the model would never learn to stop. Put {{% endgeneration %}} behind it."
                )
            said = bool(trained.removesuffix(end_of_turn).strip())
            spans.append(((start, start + len(trained)), said))
        return text, spans

    def _search(self, text: str, messages: Messages, where: str) -> list[tuple[Span, bool]]:
        spans: list[tuple[Span, bool]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:i], where, ask=True)
            content = message["content"].strip()
            end = self._end(text, len(prompt), content) if text.startswith(prompt) else None
            if end is None:
                raise DataError(
                    f"{where}, message {i + 1}: the chat template renders this answer differently within the "
                    "conversation than after the messages before it, so which tokens to train cannot be told. "
                    f"{OPTIONS}."
                )
            spans.append(((len(prompt), end), bool(content)))
        return spans

    def _end(self, text: str, start: int, content: str) -> int | None:
        """Where the answer that begins at `start` ends, its end-of-turn token included."""
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
        self, messages: Messages, where: str, ask: bool, mark: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=mark,
                **self.variables,
            )
        except Exception as error:  # a template is a program, and may raise anything
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise DataError(
                f"{where}: the chat template refuses the conversation (roles: {roles}): {start_of(str(error), 200)}. "
                f"Change the conversation. {OPTIONS}."
            ) from error
        return texts[0], marks[0] if mark else []


def chat_template(
    tokenizer: PreTrainedTokenizerBase, file: str | None = None
) -> ChatTemplate | None:
    """The template of `file`, else the tokenizer's own; None where there is neither.

    Raises:
        DataError: the file is missing, not UTF-8, or no template that can render one question and answer.
    """
    if file is not None:
        path = Path(file).expanduser()
        try:
            source = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise DataError(
                f"The chat template {file} does not exist. {near_names(path)}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"The chat template {file} cannot be read: {error}.") from error
    elif tokenizer.chat_template:
        source = tokenizer.get_chat_template()
    else:
        return None
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
    template = ChatTemplate(source, variables, None, marked)
    question = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
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
