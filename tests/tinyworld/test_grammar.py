"""The pretraining text: deterministic, varied, well-formed, and cleaned by `tidy`."""

import re
from itertools import islice
from random import Random

import pytest

from tests.tinyworld.dialogue import ASSISTANT, END, SYSTEM, USER
from tests.tinyworld.grammar import documents
from tests.tinyworld.template import expand, tidy

WORDS = {"animal": ("owl", "fox", "cat"), "pair": ("{animal} and {animal}",)}


def _documents(seed: int, count: int) -> list[str]:
    return list(islice(documents(seed), count))


def test_same_seed_writes_same_documents() -> None:
    assert _documents(3, 300) == _documents(3, 300)


def test_another_seed_writes_other_documents() -> None:
    assert len(set(_documents(3, 300)) & set(_documents(4, 300))) < 30


def test_documents_seldom_repeat() -> None:
    assert len(set(_documents(0, 3000))) > 2700


def test_every_document_ends_in_the_end_marker() -> None:
    assert all(document.endswith(END) for document in _documents(1, 500))


def test_no_template_notation_is_left_over() -> None:
    assert not [text for text in _documents(2, 3000) if re.search(r"[{}\[\]]", text)]


def test_dialogues_alternate_between_user_and_assistant() -> None:
    turn = re.compile(
        rf"(?:{re.escape(SYSTEM)}[^<]+<\|end\|>)?"
        rf"(?:{re.escape(USER)}[^<]+<\|end\|>{re.escape(ASSISTANT)}[^<]+<\|end\|>)+"
    )
    dialogues = [text for text in _documents(5, 1000) if USER in text]
    assert len(dialogues) > 500
    assert all(turn.fullmatch(text) for text in dialogues)


def test_marked_slots_repeat_their_word_and_plain_slots_draw_again() -> None:
    rng = Random(0)
    repeated = [expand("{animal.1} {animal.1}", WORDS, rng).split() for _ in range(50)]
    drawn = [expand("{animal} {animal}", WORDS, rng).split() for _ in range(50)]
    assert all(first == second for first, second in repeated)
    assert any(first != second for first, second in drawn)


def test_given_words_fill_their_slots_and_first_draws_are_reported() -> None:
    bindings = {"animal": "hen"}
    assert expand("{animal}, {pair}", WORDS, Random(0), bindings) == "hen, hen and hen"
    assert bindings == {"animal": "hen", "pair": "hen and hen"}


def test_choices_nest_and_may_be_empty() -> None:
    written = {expand("a[b[c|d]|]", {}, Random(seed)) for seed in range(40)}
    assert written == {"abc", "abd", "a"}


@pytest.mark.parametrize(
    ("rough", "mended"),
    [
        ("i saw a owl .  it was a unit", "I saw an owl. It was a unit"),
        ("two brushs, cherrys and knifes", "Two brushes, cherries and knives"),
        ("i'm in the cafe; may i?", "I'm in the cafe; may I?"),
    ],
)
def test_tidy_mends_expanded_text(rough: str, mended: str) -> None:
    assert tidy(rough) == mended
