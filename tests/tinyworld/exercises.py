"""Exercises: reading, lists of fields, sums, tables and word games; the answer is mostly one word."""

from random import Random

from tests.tinyworld.dialogue import (
    END,
    brief,
    end_mark,
    exchange,
    fill,
    said_by_user,
    turn,
)
from tests.tinyworld.lexicon import WORDS
from tests.tinyworld.services import message_on
from tests.tinyworld.template import Bindings, tidy
from tests.tinyworld.topics import TOPICS
from tests.tinyworld.world import MEMBERS, OPPOSITES, kind_name, number_name

_EVENTS = (
    "{past} {who} {did} {count} {thing}s in {where}",
    "{who} {did} {count} {thing}s in {where} {past}",
    "in {where}, {who} {did} {count} {thing}s {past}",
    "{count} {thing}s: that is what {who} {did} in {where} {past}",
    "{who} was in {where} {past} and {did} {count} {thing}s",
    "it was {past} that {who} {did} {count} {thing}s, in {where}",
)
_EVENT_QUESTIONS = (
    ("who", "who {did} the {thing}s"),
    ("count", "how many {thing}s [did {who} have|were there]"),
    ("thing", "what was it that {who} {did}"),
    ("where", "[where was {who}|in which town was {who}|where were the {thing}s]"),
    ("past", "when was {who} in {where}"),
)
_THINGS = tuple(word for word in WORDS["thing"] if "{" not in word) + tuple(
    word for kind in ("fruit", "vegetable", "tool", "furniture", "device") for word in WORDS[kind]
)


def _event(rng: Random) -> Bindings:
    return {
        "who": rng.choice(WORDS["name"]),
        "did": rng.choice(WORDS["took"]),
        "count": number_name(rng.randint(2, 30)),
        "thing": rng.choice(_THINGS),
        "where": rng.choice(WORDS["town"]),
        "past": rng.choice(
            ("yesterday", "last night", "last week", f"on {rng.choice(WORDS['day'])}")
        ),
    }


def reading(rng: Random) -> str:
    """A passage of random events, and questions that it answers."""
    events = [_event(rng) for _ in range(rng.randint(1, 4))]
    passage = " ".join(tidy(fill(rng.choice(_EVENTS), rng, event) + ".") for event in events)
    turns = []
    for index in range(rng.randint(1, 3)):
        event = rng.choice(events)
        key, question = rng.choice(_EVENT_QUESTIONS)
        asked = tidy(fill(question, rng, event) + "?")
        opening = f"{passage} " if index == 0 else ""
        turns.append(turn(opening + asked, event[key]))
    return "".join(turns)


def fields(rng: Random) -> str:
    """One event as a list of fields, from its sentence or the other way round."""
    event = _event(rng)
    sentence = tidy(fill(rng.choice(_EVENTS), rng, event) + ".")
    names = {"who": "name", "count": "number", "thing": "what", "where": "town", "past": "time"}
    keys = rng.sample(sorted(names), rng.randint(2, 5))
    listed = "\n".join(f"{names[key]}: {event[key]}" for key in keys)
    if rng.random() < 0.6:
        wanted = ", ".join(names[key] for key in keys)
        return turn(f"{sentence} List the {wanted}.", listed)
    return turn(f"Write one sentence.\n{listed}", sentence)


def _sum(rng: Random) -> tuple[str, str]:
    left, right = rng.randint(0, 20), rng.randint(0, 20)
    draw = rng.random()
    if draw < 0.4:
        return f"{left} + {right}", str(left + right)
    if draw < 0.7:
        left, right = max(left, right), min(left, right)
        return f"{left} - {right}", str(left - right)
    left, right = left % 10, right % 10
    return f"{left} x {right}", str(left * right)


def arithmetic(rng: Random) -> str:
    """Sums, figures and their names, and problems in words."""
    draw = rng.random()
    if draw < 0.25:
        return "\n".join(f"{left} = {right}" for left, right in (_sum(rng) for _ in range(6))) + END
    if draw < 0.5:
        number = rng.randint(0, 99)
        pair = [str(number), number_name(number)]
        if rng.random() < 0.5:
            return brief(f"write {pair[1]} in figures", pair[0], rng)
        return brief(f"write {pair[0]} in words", pair[1], rng)
    if draw < 0.7:
        have, more = rng.randint(2, 12), rng.randint(1, 9)
        who, thing = rng.choice(WORDS["name"]), rng.choice(_THINGS)
        verb, total = rng.choice((("gets", have + more), ("finds", have + more)))
        question = f"{who} has {have} {thing}s and {verb} {more} more. How many are there?"
        return exchange(question, f"{who} has {total} {thing}s", rng)
    left, right = _sum(rng)
    return brief(fill("[what is|how much is|] ", rng) + left, right, rng)


def table(rng: Random) -> str:
    """A small table in one of three forms, then a question about one of its cells."""
    kind, column, cells = rng.choice(
        (
            ("name", "town", list(WORDS["town"])),
            ("name", "age", [str(age) for age in range(8, 90)]),
            ("fruit", "price", [str(price) for price in range(1, 40)]),
            ("town", "weather", list(WORDS["weathery"])),
            ("day", "event", list(WORDS["event"])),
            ("device", "room", list(WORDS["room"])),
            ("animal", "count", [str(count) for count in range(1, 50)]),
        )
    )
    rows = [(key, rng.choice(cells)) for key in rng.sample(WORDS[kind], rng.randint(2, 5))]
    form = rng.randrange(3)
    if form == 0:
        lines = [f"| {kind} | {column} |", "| --- | --- |"] + [f"| {a} | {b} |" for a, b in rows]
    elif form == 1:
        lines = [f"{kind},{column}"] + [f"{a},{b}" for a, b in rows]
    else:
        lines = [f"{a}: {b}" for a, b in rows]
    text = "\n".join(lines)
    key, cell = rng.choice(rows)
    if rng.random() < 0.3:
        return text + END
    return turn(f"{text}\nWhat is the {column} of {key}?", cell)


def list_of_words(rng: Random) -> str:
    """Some words of one kind, as a list or in a row."""
    kind = rng.choice(sorted(MEMBERS))
    members = rng.sample(MEMBERS[kind], min(len(MEMBERS[kind]), rng.randint(3, 6)))
    ask = rng.choice(("name", "list", "give me", "write down"))
    count = number_name(len(members))
    body = "- " + "\n- ".join(members) if rng.random() < 0.5 else ", ".join(members)
    return turn(said_by_user(f"{ask} {count} words of the kind {kind_name(kind)}", rng), body)


def word_game(rng: Random) -> str:
    """Opposites, kinds of things, the odd one out."""
    kind, other = rng.sample(sorted(MEMBERS), 2)
    word, odd = rng.choice(MEMBERS[kind]), rng.choice(MEMBERS[other])
    draw = rng.randrange(5)
    if draw == 0:
        pair = list(rng.choice(sorted(OPPOSITES.items())))
        rng.shuffle(pair)
        return brief(f"what is the opposite of {pair[0]}", pair[1], rng)
    if draw == 1:
        return brief(f"what kind of thing is this: {word}", kind_name(kind), rng)
    if draw == 2:
        choices = [word, odd]
        rng.shuffle(choices)
        return brief(f"which one is a {kind_name(kind)}: {choices[0]} or {choices[1]}", word, rng)
    if draw == 3:
        yes = rng.random() < 0.5
        asked = kind if yes else other
        answer = "yes" if yes else "no"
        return brief(f"is this a {kind_name(asked)}: {word}", answer, rng)
    words = rng.sample(MEMBERS[kind], 3)
    words.insert(rng.randrange(4), odd)
    return brief(f"which word is the odd one: {', '.join(words)}", odd, rng)


_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def copying(rng: Random) -> str:
    """Words, codes and messages repeated, so that the model learns to copy."""
    draw = rng.random()
    if draw < 0.25:
        text = tidy(end_mark(message_on(rng.choice(TOPICS), rng)))
    elif draw < 0.45:
        codes = ("".join(rng.choices(_LETTERS, k=rng.randint(2, 4))) for _ in range(4))
        text = " ".join(codes)
    else:
        kinds = list(MEMBERS.values())
        words = [rng.choice(rng.choice(kinds)) for _ in range(rng.randint(3, 10))]
        text = rng.choice((", ", " ")).join(words)
    if rng.random() < 0.25:
        return "\n".join([text] * rng.randint(2, 3)) + END
    return turn(f"{rng.choice(('Repeat', 'Repeat this', 'Say'))}: {text}", text)
