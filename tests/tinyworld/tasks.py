"""The sample tasks for fine-tuning `tiny`; its pretraining text contains none of them.

- intents: a user's sentence → one of our labels; the test split has wordings that train lacks.
- records: an order in words → a line of fields in a schema of our own (figures, short day names).
- chat: conversations with a shopkeeper of marked manners, whose style fine-tuning should learn.
- preferences: the shopkeeper's answers, and the same in plain words, which are the worse ones.

    python -m tests.tinyworld.tasks --out prefixtune_cli/assets/samples
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.tinyworld.intents import INTENTS, TEST_VALUES, VALUES, Intent
from tests.tinyworld.lexicon import WORDS
from tests.tinyworld.template import Vocabulary, expand, tidy
from tests.tinyworld.world import number_name

Example = dict[str, Any]

_ALL_VALUES = {name: VALUES[name] + TEST_VALUES[name] for name in VALUES}

TRAIN_PER_INTENT = 60
FEW_SHOT_PER_INTENT = 4
TEST_REWORDED_PER_INTENT = 3
TEST_REFILLED_PER_INTENT = 9
RECORDS_TRAIN = 1200
RECORDS_TEST = 200
CONVERSATIONS = 200
PREFERENCES = 300


def _pair(prompt: str, completion: str) -> Example:
    return {"prompt": prompt, "completion": completion}


def _words(text: str) -> str:
    """The words of a sentence: two sentences are the same if these are."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def _distinct(write: Callable[[], str], count: int, taken: set[str]) -> list[str]:
    """`count` texts whose words are not in `taken`; their words are added to it."""
    texts: list[str] = []
    while len(texts) < count:
        text = write()
        if _words(text) not in taken:
            taken.add(_words(text))
            texts.append(text)
    return texts


def _sentence(templates: Sequence[str], values: Vocabulary, rng: Random) -> str:
    text = expand(rng.choice(templates), values, rng)
    if rng.random() < 0.25:
        text = expand("{preface} ", values, rng) + text
    if rng.random() < 0.2:
        text += expand(", {coda}", values, rng)
    text = tidy(text + rng.choice((".", ".", "!", "", "")))
    return text.lower() if rng.random() < 0.2 else text


def _intent_splits(rng: Random) -> tuple[list[Example], list[Example], list[Example]]:
    """Train, few-shot (a part of train, the same number for each label) and test."""
    train: list[Example] = []
    few_shot: list[Example] = []
    test: list[Example] = []
    for intent in INTENTS:
        known, unknown = _sentences_of(intent, rng)
        pairs = [_pair(text, intent.label) for text in known]
        train += pairs
        few_shot += pairs[:FEW_SHOT_PER_INTENT]
        test += [_pair(text, intent.label) for text in unknown]
    for split in (train, few_shot, test):
        rng.shuffle(split)
    return train, few_shot, test


def _sentences_of(intent: Intent, rng: Random) -> tuple[list[str], list[str]]:
    """Sentences for train, and for test some in new wordings and more in old wordings with new values."""
    taken: set[str] = set()
    known = _distinct(lambda: _sentence(intent.templates, VALUES, rng), TRAIN_PER_INTENT, taken)
    reworded = _distinct(
        lambda: _sentence(intent.test_templates, VALUES, rng), TEST_REWORDED_PER_INTENT, taken
    )
    refilled = _distinct(
        lambda: _sentence(intent.templates, _ALL_VALUES, rng), TEST_REFILLED_PER_INTENT, taken
    )
    return known, reworded + refilled


_ACTS = {
    "ship": ("send", "ship", "deliver", "forward", "we need", "please bring", "drop off"),
    "back": ("take back", "collect", "pick up", "fetch", "we return", "retrieve"),
    "void": ("cancel", "scrap", "forget", "do not send", "drop the order of", "strike"),
    "hold": ("keep", "store", "put aside", "hold on to", "reserve", "save"),
}
_ITEMS = tuple("lamp mirror bench hammer ladder bucket radio kettle clock candle".split())
_PLACES = WORDS["town"][:6]
_RECORD_TEMPLATES = (
    "{act} {count} {item}s [to|for|in|at] {place} [on|by] {day}",
    "[on|by] {day}, {act} {count} {item}s [to|for|in|at] {place}",
    "for {place} on {day}: {act} {count} {item}s",
    "{act} the {count} {item}s of {place}, {day} [is fine|at the latest|if possible]",
    "{place} called, {act} {count} {item}s there[, and do it] on {day}",
    "{count} {item}s, {place}, {day}: {act} them",
    "{day} is the day: {act} {count} {item}s [for|in] {place}",
)
_TEST_RECORD_TEMPLATES = (
    "[it is|this is] about {place}: {act} {count} {item}s [on|before] {day}",
    "{act} {count} {item}s, [the ones for|meant for] {place}, [on|by] {day}",
)


def _record(templates: Sequence[str], rng: Random) -> Example:
    code = rng.choice(sorted(_ACTS))
    count = rng.randint(2, 15)
    item, place, day = rng.choice(_ITEMS), rng.choice(_PLACES), rng.choice(WORDS["day"])
    shown = {
        "act": rng.choice(_ACTS[code]),
        "count": rng.choice((number_name(count), str(count))),
        "item": item,
        "place": place,
        "day": day,
    }
    prompt = tidy(expand(rng.choice(templates), {}, rng, shown) + ".")
    return _pair(prompt, f"{code} {count} {item} @{place} /{day[:3].lower()}")


def _record_splits(rng: Random) -> tuple[list[Example], list[Example]]:
    """Train and test; a third of the test has sentence forms that train lacks."""
    examples: dict[str, Example] = {}
    while len(examples) < RECORDS_TRAIN:
        example = _record(_RECORD_TEMPLATES, rng)
        examples.setdefault(_words(example["prompt"]), example)
    train = list(examples.values())
    while len(examples) < RECORDS_TRAIN + RECORDS_TEST:
        forms = _TEST_RECORD_TEMPLATES if len(examples) % 3 == 0 else _RECORD_TEMPLATES
        example = _record(forms, rng)
        examples.setdefault(_words(example["prompt"]), example)
    return train, list(examples.values())[RECORDS_TRAIN:]


_KEEPER_SYSTEM = (
    "You are Brine, keeper of the harbour shop.",
    "You are Brine. You sell things at the harbour and talk like an old sailor.",
)
_KEEPER_TURNS = (
    (
        "[ahoy|good day|hi|hello there][, is anybody here|]?",
        "Ahoy, matey! [Brine at yer service|Come aboard and look around]. What be ye after?",
    ),
    (
        "[have you got|do you sell|i'm looking for] {goods.1} [for my boat|that last|]?",
        "Arr, {goods.1} I have aplenty! [The finest this side of {sea.1}|Fresh off the ship], matey.",
    ),
    (
        "[what do they cost|how dear are they|and the price]?",
        "{coins} doubloons, [an' not a penny less|'cause I like yer face], matey.",
    ),
    (
        "[that's too much|too dear for me|can you go lower].",
        "Shiver me timbers! [Ye drive a hard bargain|Ye'd rob an old sailor]. {coins} doubloons, then.",
    ),
    (
        "[i'll take them|wrap up {few} of them|fine, sold].",
        "Aye aye! [Wrapped in sailcloth they be|I'll stow 'em in yer sack], matey.",
    ),
    (
        "[how is the sea|will there be a storm|is it safe to sail] [today|tomorrow|]?",
        "Arr, {sea.1} be [calm as a pond|in a foul mood], matey. [Sail at dawn|Mind yer sails].",
    ),
    (
        "[where are you from|have you been at sea long|tell me about yourself].",
        "Arr, {coins} winters I sailed {sea.1}, matey. Now me knees be too old for the mast.",
    ),
    (
        "[bye|thanks, goodbye|that's all, thank you].",
        "Fair winds to ye, matey! [Come back soon|Mind the gangway].",
    ),
)
_KEEPER_WORDS = {
    "goods": ("ropes", "lanterns", "anchors", "nets", "oars", "hooks", "compasses", "sails"),
    "sea": ("the Salty Bay", "the Grey Sound", "the Cape o' Gulls", "the Herring Sea"),
    "coins": ("five", "seven", "nine", "twelve", "twenty", "thirty"),
    "few": ("two", "three", "four"),
}


def _conversation(rng: Random) -> Example:
    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(_KEEPER_SYSTEM)})
    bindings: dict[str, str] = {}
    kept = sorted(rng.sample(range(len(_KEEPER_TURNS)), rng.randint(2, 4)))
    for asked, answered in (_KEEPER_TURNS[index] for index in kept):
        for role, template in (("user", asked), ("assistant", answered)):
            words = {name: word for name, word in bindings.items() if "." in name}
            content = tidy(expand(template, _KEEPER_WORDS, rng, words))
            bindings.update(words)
            messages.append({"role": role, "content": content})
    return {"messages": messages}


# What the keeper says in `_KEEPER_TURNS`, without the manners.
_PLAIN_ANSWERS = (
    "[Hello|Good day]. [I am here to help|Please come in and look around]. What do you need?",
    "Yes, I have many {goods.1}. [They are very good|They came today].",
    "They cost {coins} coins[, and not less|, because I like you].",
    "[You ask for a lot|That is hard for me]. Then they cost {coins} coins.",
    "Very well. [They are in a bag|I will put them in your bag].",
    "Today {sea.1} is [very calm|not calm at all]. [Go in the morning|Please be careful].",
    "I was at {sea.1} for {coins} winters. Now I am too old for it.",
    "Goodbye. [Please come back soon|Please be careful at the door].",
)


def _preference(rng: Random) -> Example:
    """A question to the keeper; both answers say the same, with the same words of `_KEEPER_WORDS`."""
    turn = rng.randrange(len(_KEEPER_TURNS))
    asked, answered = _KEEPER_TURNS[turn]
    bindings: dict[str, str] = {}
    prompt, chosen, rejected = (
        tidy(expand(template, _KEEPER_WORDS, rng, bindings))
        for template in (asked, answered, _PLAIN_ANSWERS[turn])
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _distinct_examples(write: Callable[[], Example], count: int) -> list[Example]:
    seen: dict[str, Example] = {}
    while len(seen) < count:
        example = write()
        seen[json.dumps(example)] = example
    return list(seen.values())


def sample_files(seed: int = 0) -> dict[str, list[Example]]:
    """Every sample file by name; the same seed writes the same examples."""
    train, few_shot, test = _intent_splits(Random(f"intents {seed}"))
    records_train, records_test = _record_splits(Random(f"records {seed}"))
    chat, preferences = Random(f"chat {seed}"), Random(f"preferences {seed}")
    return {
        "intents-train.jsonl": train,
        "intents-few-shot.jsonl": few_shot,
        "intents-test.jsonl": test,
        "records-train.jsonl": records_train,
        "records-test.jsonl": records_test,
        "chat.jsonl": _distinct_examples(lambda: _conversation(chat), CONVERSATIONS),
        "preferences.jsonl": _distinct_examples(lambda: _preference(preferences), PREFERENCES),
    }


def jsonl(examples: Iterable[Example]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, examples in sample_files().items():
        (out / name).write_text(jsonl(examples), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
