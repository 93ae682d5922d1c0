"""Writes a document: the chat markers, a turn of a dialogue, and users' typing."""

import re
from random import Random

from tests.tinyworld.lexicon import WORDS
from tests.tinyworld.template import Bindings, expand, tidy

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

_QUESTION = re.compile(
    r"(?:.*, )?(who|what|when|where|why|how|which|is|are|am|can|could|do|does|did|will|would|"
    r"may|must|have you|has|shall|should|any)\b",
    re.IGNORECASE,
)


def fill(template: str, rng: Random, bindings: Bindings | None = None) -> str:
    """Expand a template with the words of the world."""
    return expand(template, WORDS, rng, bindings)


def end_mark(sentence: str) -> str:
    """Close the sentence with a question mark or a full stop, unless it has one."""
    if sentence[-1:] in ".?!":
        return sentence
    last = re.split(r"[.?!] ", sentence)[-1]
    return sentence + ("?" if _QUESTION.match(last) else ".")


def said_by_user(sentence: str, rng: Random) -> str:
    """A user's sentence as typed: mostly clean, at times in lower case, unpunctuated or mistyped."""
    clean = tidy(end_mark(sentence))
    manner = rng.random()
    if manner < 0.12:
        clean = clean.lower()
    elif manner < 0.24:
        clean = clean.rstrip(".?!").lower() if rng.random() < 0.5 else clean.rstrip(".?!")
    if rng.random() < 0.04 and len(clean) > 12:
        at = rng.randrange(3, len(clean) - 2)
        clean = clean[:at] + clean[at + 1] + clean[at] + clean[at + 2 :]
    return clean


def turn(user: str, assistant: str) -> str:
    """One question and its answer, with the markers of the chat format."""
    return f"{USER}{user}{END}{ASSISTANT}{assistant}{END}"


def exchange(question: str, answer: str, rng: Random) -> str:
    """A turn with a whole sentence as its answer."""
    return turn(said_by_user(question, rng), tidy(end_mark(answer)))


def brief(question: str, answer: str, rng: Random) -> str:
    """A turn with only the bare answer: no capital, no full stop."""
    return turn(said_by_user(question, rng), answer)
