"""Decides when a generated answer is right. It needs no torch, so that finished runs can be judged without it."""

from __future__ import annotations

import re

EXACT_MATCH_RULE = (
    "it equals the reference, apart from white space around both and a <think> block before it"
)


def match_rule(pattern: str | None) -> str:
    """The rule of `exactly_matches`, in words."""
    if pattern is None:
        return EXACT_MATCH_RULE
    return (
        f"the first part that `{pattern}` finds in it equals the first that it finds in the reference, apart from "
        "white space around both; a <think> block before it is ignored"
    )


def rule_sentence(pattern: str | None) -> str:
    """`match_rule` as a sentence for the user."""
    return f"An answer is right if {match_rule(pattern)}."


def exactly_matches(answer: str, reference: str, pattern: str | None = None) -> bool:
    """Whether `answer` counts as right: see `match_rule`."""
    if pattern is None:
        return final_answer(answer) == final_answer(reference)
    found = compared_part(answer, pattern)
    return found is not None and found == compared_part(reference, pattern)


def compared_part(text: str, pattern: str | None) -> str | None:
    """The part of an answer or a reference that is compared; None if the pattern finds nothing.

    Args:
        text: the answer.
        pattern: for Python's `re`. The part is the group of its first match, or all of the match if it has no group.
            None takes the whole answer.
    """
    text = final_answer(text)
    if pattern is None:
        return text
    found = re.search(pattern, text)
    part = found[found.re.groups] if found else None
    return part if part is None else part.strip()


def final_answer(answer: str) -> str:
    """A generated answer without the <think> block before it and the white space around it."""
    return re.sub(r"^\s*<think>.*?</think>", "", answer, flags=re.DOTALL).strip()
