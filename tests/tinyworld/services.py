"""Dialogues with services, and exercises about the topic of a message."""

from random import Random

from tests.tinyworld.dialogue import END, SYSTEM, brief, end_mark, exchange, fill, turn
from tests.tinyworld.template import Bindings, tidy
from tests.tinyworld.topics import TOPICS, Topic

_SYSTEM_LINES = (
    "you are a helpful assistant[| of the {shop}| in {town}| of the bank].",
    "[answer|reply] [in few words|briefly|in one word|in a friendly way|politely].",
    "you [work|help people] at the [{shop}|bank|{place}][| in {town}].",
    "your name is {name}. you help people with their questions.",
)


def message_on(topic: Topic, rng: Random, drawn: Bindings | None = None) -> str:
    """A user's raw message on this topic; `drawn` collects its words."""
    text = fill(rng.choice(topic.messages), rng, drawn)
    manner = rng.random()
    if manner < 0.2:
        text = fill("{hello}, ", rng) + text
    elif manner < 0.4:
        text = end_mark(text) + fill(" {closing}", rng)
    elif manner < 0.46:
        text = end_mark(text) + " " + fill(rng.choice(topic.messages), rng, drawn)
    return text


_NEW_IN_ANSWERS = ("when", "past", "few", "money", "number")


def _service_turn(topic: Topic, rng: Random) -> str:
    """A message and its answer; the answer names the message's own room, town, song, …"""
    drawn: Bindings = {}
    message = message_on(topic, rng, drawn)
    kept = {name: word for name, word in drawn.items() if name not in _NEW_IN_ANSWERS}
    answer = fill(rng.choice(topic.answers), rng, kept)
    opening = fill(rng.choice(("", "", "{ok}, ", "{sorry}, ")), rng)
    turns = exchange(message, opening + answer, rng)
    follow = rng.random()
    if follow < 0.15:
        thanks = rng.choice(("thanks", "thank you", "great"))
        turns += exchange(thanks, "you are welcome", rng)
    elif follow < 0.25:
        turns += exchange("say that again", answer, rng)
    return turns


def service(rng: Random) -> str:
    """A dialogue with a service: one to three turns on one or two topics."""
    topic = rng.choice(TOPICS)
    parts = []
    if rng.random() < 0.15:
        parts.append(SYSTEM + tidy(fill(rng.choice(_SYSTEM_LINES), rng)) + END)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parts.append(_service_turn(topic, rng))
        if rng.random() < 0.4:
            topic = rng.choice(TOPICS)
    return "".join(parts)


def gist(rng: Random) -> str:
    """The topic of a message: its gist, its domain, or which of two gists."""
    topic, other = rng.sample(TOPICS, 2)
    message = tidy(end_mark(message_on(topic, rng)))
    ask = rng.random()
    if ask < 0.4:
        question = fill(
            "[what is this about|sum up this message|in a few words|what does the customer mean|"
            "what is this person asking about]: ",
            rng,
        )
        return brief(question + message, topic.gist, rng)
    if ask < 0.6:
        question = fill("[which field is this|what topic is this|name the field]: ", rng)
        return brief(question + message, topic.domain, rng)
    if ask < 0.8:
        pair = [topic.gist, other.gist]
        rng.shuffle(pair)
        return brief(f"{message} is this about {pair[0]} or {pair[1]}?", topic.gist, rng)
    letter = fill("{name} wrote to the [bank|office|company|service] {past}: ", rng)
    return tidy(f"{letter}{message} It was about {topic.gist}.") + END


def paraphrases(rng: Random) -> str:
    """The same statement in two wordings, so that the model learns which sentences mean the same."""
    topic, other = rng.sample(TOPICS, 2)
    first, second, third = (
        tidy(end_mark(message_on(which, rng))) for which in (topic, topic, other)
    )
    if rng.random() < 0.5:
        return turn(f"Say it in other words: {first}", second)
    same = rng.random() < 0.5
    return brief(
        f"do these mean the same? A: {first} B: {second if same else third}",
        "yes" if same else "no",
        rng,
    )
