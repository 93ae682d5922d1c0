"""When a generated answer is right. Needs no torch, so that finished runs can be judged without it."""

from __future__ import annotations

import re

EXACT_MATCH_RULE = (
    "the answer equals the reference, but for white space around both and a <think> block before"
)


def exactly_matches(answer: str, reference: str) -> bool:
    """Whether `answer` counts as right: see EXACT_MATCH_RULE."""
    return final_answer(answer) == reference.strip()


def final_answer(answer: str) -> str:
    """What of a generated answer is compared with the reference."""
    return re.sub(r"^\s*<think>.*?</think>", "", answer, flags=re.DOTALL).strip()
