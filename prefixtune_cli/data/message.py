"""Messages of data files, checked: the role, the content, whether it is learned, and other keys.

Roles and keys follow the files of OpenAI, ShareGPT, Axolotl, LLaMA-Factory and ms-swift.
"""

from __future__ import annotations

import json
from typing import Any

from prefixtune_cli.data.conversation import ANSWERS
from prefixtune_cli.data.field import named, text
from prefixtune_cli.data.lines import Row, start_of
from prefixtune_cli.errors import DataError

# The roles, with ShareGPT's names for them, and OpenAI's developer.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# Keys that say whether a turn is learned: OpenAI's and Axolotl's `weight`, Axolotl's `train` and `training`,
# ms-swift's `loss`, LLaMA-Factory's `loss_weight`.
LEARNED = ("weight", "train", "training", "loss", "loss_weight")


def checked(turn: Any, where: str) -> Row:
    """A turn as {role, content, trained, more}.

    Returns:
        `trained` is None if the turn does not say; `more` has its other keys as JSON, or is None.

    Raises:
        DataError: a key is missing, or is not what it must be.
    """
    if not isinstance(turn, dict):
        raise DataError(
            f'{where}: a message must be an object, got {named(turn)}. Write {{"role": "user", "content": "…"}}.'
        )
    who, what = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    calls = turn.get("tool_calls") or turn.get("function_call")
    for key in (who,) if calls else (who, what):
        if key not in turn:
            raise DataError(
                f"{where}: {key!r} is missing; the keys are {', '.join(map(repr, turn)) or 'none'}. Write "
                '{"role": "user", "content": "…"}, or ShareGPT\'s {"from": "human", "value": "…"}.'
            )
    role = ROLES.get(turn[who]) if isinstance(turn[who], str) else None
    if role is None:
        raise DataError(f"{where}: {who!r} must be one of {', '.join(ROLES)}, got {turn[who]!r}.")
    content = "" if calls and turn.get(what) is None else _content(turn, what, where)
    more = _more(turn, {who, what, *LEARNED}, where)
    return {"role": role, "content": content, "trained": _trained(turn, where), "more": more}


def _content(turn: Row, what: str, where: str) -> str:
    """The text of a message; text parts are joined by line breaks, as vLLM does for templates that take a text."""
    parts = turn[what]
    if not isinstance(parts, list) or not parts:
        return text(turn, what, where)
    texts = []
    for i, part in enumerate(parts):
        found = part if isinstance(part, dict) else {"type": "text", "text": part}
        kind = found.get("type", "text")
        if kind != "text":
            raise DataError(
                f"{where}: part {i + 1} of {what!r} is of the type {kind!r}, and ptp trains only on text. Leave out "
                "the part, or the row."
            )
        if "text" not in found:
            raise DataError(
                f"{where}: part {i + 1} of {what!r} has no 'text'; its keys are {', '.join(found) or 'none'}. Write "
                '{"type": "text", "text": "…"}.'
            )
        texts.append(text(found, "text", f"{where}, part {i + 1}"))
    return "\n".join(texts)


def _trained(turn: Row, where: str) -> bool | None:
    said: dict[str, bool] = {}
    for key in LEARNED:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"{where}: {key!r} must be 0 or 1, false or true, got {start_of(json.dumps(value, default=str))}. A "
                "turn is either learned or not."
            )
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        both = " and ".join(f"{key!r} {str(value).lower()}" for key, value in said.items())
        raise DataError(f"{where}: {both} contradict each other. Keep one of them.")
    return next(iter(said.values()), None)


def _more(turn: Row, taken: set[str], where: str) -> str | None:
    """The other keys that are not null: a table has nulls for keys that a turn does not have."""
    others = {key: value for key, value in turn.items() if key not in taken and value is not None}
    return _json(others, ", ".join(others), where) if others else None


def _json(value: Any, name: str, where: str) -> str:
    return text({name: json.dumps(value, ensure_ascii=False, default=str)}, name, where)


def as_written(turn: Row) -> Row:
    """A checked turn in the form of a file. Checked again, it is the same."""
    more = json.loads(turn["more"]) if turn["more"] else {}
    weight = {} if turn["trained"] is None else {"weight": int(turn["trained"])}
    return {"role": turn["role"], "content": turn["content"], **more, **weight}


def conversation(turns: list[Row], row: Row, where: str) -> Row:
    """Checked messages, with the row's column `system` in front, and its `tools`.

    Raises:
        DataError: there are two system prompts, or a column is not what it must be.
    """
    front = system(row, where)
    if front and turns[0]["role"] == "system":
        if turns[0]["content"] != front[0]["content"]:
            raise DataError(
                f"{where}: the row has two system prompts, {start_of(front[0]['content'])} in its column 'system', and "
                f"{start_of(turns[0]['content'])} as its first message. Keep one of them."
            )
        front = []
    return {"messages": [*front, *turns], "tools": tools(row, where)}


def system(row: Row, where: str) -> list[Row]:
    """The column `system` as messages: one, or none if it is null or blank."""
    if row.get("system") is None:
        return []
    said = text(row, "system", where)
    return [_turn("system", said)] if said.strip() else []


def history(row: Row, where: str) -> list[Row]:
    """Alpaca's column `history`, a list of [question, answer], as messages."""
    turns = []
    pairs = _list(row, "history", '[["a question", "its answer"]]', where)
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"{where}: entry {i + 1} of 'history' must be a question and its answer, got {named(pair)}. Write "
                '["a question", "its answer"].'
            )
        place = f"{where}, entry {i + 1} of 'history'"
        said = dict(zip(("question", "answer"), pair, strict=True))
        turns += [
            _turn("user", text(said, "question", place)),
            _turn("assistant", text(said, "answer", place)),
        ]
    return turns


def tools(row: Row, where: str) -> str | None:
    """The column `tools`, a list of JSON schemas or its JSON text, as JSON text for templates; None if it is empty.

    A schema without a wrapper, as LLaMA-Factory writes it, gets OpenAI's wrapper.
    """
    schemas = _list(row, "tools", '[{"type": "function", "function": {"name": "…"}}]', where)
    for i, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            raise DataError(
                f"{where}: entry {i + 1} of 'tools' must be a tool's JSON schema, got {named(schema)}. Write "
                '{"type": "function", "function": {"name": "…", "parameters": {…}}}.'
            )
    wrapped = [
        {"type": "function", "function": schema}
        if "name" in schema and "function" not in schema
        else schema
        for schema in schemas
    ]
    return _json(wrapped, "tools", where) if wrapped else None


def _list(row: Row, column: str, form: str, where: str) -> list[Any]:
    """A column that is a list, or its JSON text; empty for null and blank text."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if not isinstance(found, list):
        raise DataError(
            f"{where}: the column {column!r} must be a list or its JSON text, got {named(value)}. Write {form}."
        )
    return found


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content, "trained": None, "more": None}


def weights_said(turns: list[Row]) -> dict[str, int]:
    """How many turns say whether they are learned, by the effect."""
    return {
        "answers masked": sum(t["trained"] is False for t in turns if t["role"] in ANSWERS),
        "others asked for": sum(t["trained"] is True for t in turns if t["role"] not in ANSWERS),
        "others masked": sum(t["trained"] is False for t in turns if t["role"] not in ANSWERS),
    }


def weight_notices(weights: dict[str, int], *, in_prompts: bool, train_on: str) -> list[str]:
    """What `weight`, `train` and the like do to the messages that have them.

    Args:
        weights: sums of `weights_said` over all rows.
        in_prompts: answers are masked because they stand in prompts, not by a weight.
        train_on: the recipe's setting.
    """
    why = "they stand in a prompt" if in_prompts else "their weight says so"
    found = [(weights.get("answers masked"), f"answers are not trained, as {why}.")]
    if train_on == "completion":
        others = "messages that are not answers ask to be trained; only --train-on all trains them."
        found.append((weights.get("others asked for"), others))
    else:
        others = "messages that are not answers ask not to be trained; --train-on all trains them."
        found.append((weights.get("others masked"), others))
    return [f"{count:,} {what}" for count, what in found if count]
