"""When a generated answer is right. Needs no torch, so that finished runs can be judged without it."""

from __future__ import annotations

import re

EXACT_MATCH_RULE = (
    "the answer equals the reference, but for white space around both and a <think> block before"
)


def match_rule(pattern: str | None) -> str:
    """The rule by which `exactly_matches` judges, in words."""
    if pattern is None:
        return EXACT_MATCH_RULE
    return (
        f"what `{pattern}` first finds in it equals what it finds in the reference, but for white space around both; "
        "a <think> block before is passed over"
    )


def exactly_matches(answer: str, reference: str, pattern: str | None = None) -> bool:
    """Whether `answer` counts as right: see `match_rule`."""
    if pattern is None:
        return final_answer(answer) == final_answer(reference)
    found = compared_part(answer, pattern)
    return found is not None and found == compared_part(reference, pattern)


def compared_part(text: str, pattern: str | None) -> str | None:
    """What of an answer or a reference is compared; None where the pattern finds nothing.

    Args:
        text: the answer.
        pattern: of Python's `re`, of whose first match the group is taken, or all of it where there is no group; None
            takes the whole answer.
    """
    text = final_answer(text)
    if pattern is None:
        return text
    found = re.search(pattern, text)
    part = found[found.re.groups] if found else None
    return part if part is None else part.strip()


def final_answer(answer: str) -> str:
    """A generated answer without what was thought before it, and without white space around it."""
    return re.sub(r"^\s*<think>.*?</think>", "", answer, flags=re.DOTALL).strip()
