"""A conversation as chat templates take it: messages, tools, and which messages are not to be learned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

# The roles of a model's turns. A function_call is ShareGPT's name for an answer that calls a tool.
ANSWERS = ("assistant", "function_call")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages for `apply_chat_template`.

    Attributes:
        messages: each has a role, a content (a text), and any other keys that the data has for the template.
        tools: their JSON schemas; None if there are none.
        masked: the indices of the messages that are not to be learned, as the data says.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    masked: frozenset[int] = frozenset()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Conversation:
        """The conversation of a row of layout `messages` or `prompt-completion`, as `format.convert` makes it."""
        turns = row.get("messages")
        if turns is None:
            pair = (("user", row["prompt"]), ("assistant", row["completion"]))
            said = [{"role": role, "content": content} for role, content in pair]
            turns = [*(row["before"] or ()), *said]
        messages = [
            {"role": turn["role"], "content": turn["content"]}
            | (json.loads(turn["more"]) if turn.get("more") else {})
            for turn in turns
        ]
        masked = frozenset(i for i, turn in enumerate(turns) if turn.get("trained") is False)
        tools = json.loads(row["tools"]) if row["tools"] else None
        return cls(messages, tools, masked)

    def until(self, i: int) -> Conversation:
        """The messages before message `i`."""
        return dataclasses.replace(self, messages=self.messages[:i])

    def with_system(self, system: str | None) -> Conversation:
        """The conversation with a system message in front, unless it has its own."""
        if system is None or (self.messages and self.messages[0]["role"] == "system"):
            return self
        front = {"role": "system", "content": system}
        shifted = frozenset(i + 1 for i in self.masked)
        return dataclasses.replace(self, messages=[front, *self.messages], masked=shifted)

    @property
    def answers(self) -> list[int]:
        """The indices of the messages that a model says."""
        return [i for i, message in enumerate(self.messages) if message["role"] in ANSWERS]

    @property
    def learned(self) -> list[int]:
        """The indices of the answers to a question, without those that the data masks."""
        opening = self.opening
        return [i for i in self.answers if i not in self.masked and i not in opening]

    @property
    def opening(self) -> list[int]:
        """The indices of the answers before the first question; empty if there is no question."""
        silent = (*ANSWERS, "system")
        asked = (i for i, message in enumerate(self.messages) if message["role"] not in silent)
        first = next(asked, 0)
        return [i for i in self.answers if i < first]

    def without_opening(self) -> Conversation:
        """The conversation without the answers before the first question, for templates that refuse them."""
        opening = self.opening
        kept = [i for i in range(len(self.messages)) if i not in opening]
        return dataclasses.replace(
            self,
            messages=[self.messages[i] for i in kept],
            masked=frozenset(new for new, i in enumerate(kept) if i in self.masked),
        )

    def without(self, keys: set[str]) -> Conversation:
        """The conversation without these keys of its messages. The key `tools` means the row's tools."""
        return dataclasses.replace(
            self,
            messages=[
                {k: v for k, v in message.items() if k not in keys} for message in self.messages
            ],
            tools=None if "tools" in keys else self.tools,
        )

    @property
    def text(self) -> str:
        """All its texts, one per line."""
        said = [text for message in self.messages for key, text in message.items() if key != "role"]
        said += self.tools or []
        return "\n".join(x if isinstance(x, str) else json.dumps(x) for x in said)

    @property
    def extra(self) -> set[str]:
        """The keys of its messages besides role and content, and `tools` if the row has some."""
        keys = {key for message in self.messages for key in message} - {"role", "content"}
        return keys | {"tools"} if self.tools else keys

    def with_calls(self, as_tool_calls: bool) -> Conversation:
        """The conversation with function_call turns as the assistant's, with `tool_calls` or with their plain text."""
        messages = [_called(message, as_tool_calls) for message in self.messages]
        return dataclasses.replace(self, messages=messages)

    @property
    def arguments(self) -> list[str]:
        """The arguments of calls that are JSON text, as in OpenAI's files."""
        lists = [message.get("tool_calls") for message in self.messages]
        calls = [call for calls in lists if isinstance(calls, list) for call in calls]
        functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
        found = [each.get("arguments") for each in functions if isinstance(each, dict)]
        return [each for each in found if isinstance(each, str) and _object(each) is not None]

    def with_parsed_arguments(self) -> Conversation:
        """The conversation with objects in place of the arguments that are JSON text."""
        messages = [
            {**message, "tool_calls": [_parsed(call) for call in message["tool_calls"]]}
            if isinstance(message.get("tool_calls"), list)
            else message
            for message in self.messages
        ]
        return dataclasses.replace(self, messages=messages)


def _parsed(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _parsed(call["function"])}
    text = call.get("arguments")
    found = _object(text) if isinstance(text, str) else None
    return call if found is None else {**call, "arguments": found}


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _called(message: dict[str, Any], as_tool_calls: bool) -> dict[str, Any]:
    if message["role"] != "function_call":
        return message
    calls = _calls(message["content"]) if as_tool_calls else None
    said = {"content": "", "tool_calls": calls} if calls else {"content": message["content"]}
    return {**message, "role": "assistant", **said}


def _calls(text: str) -> list[dict[str, Any]] | None:
    """The calls that ShareGPT writes as one JSON object or a list of them; None for any other text."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return None
    return [
        {"type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
        for call in calls
    ]
