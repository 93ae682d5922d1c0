"""The pretraining text of the model `tiny`: endless documents of a small made-up world.

Dialogues with services, questions about facts, reading exercises, sums, tables, stories, lists and
word games, each written in many ways. `documents(seed)` is deterministic. A document is a string
in which the chat markers stand as they are; every document ends in `END`.
"""

from collections.abc import Callable, Iterator
from random import Random

from tests.tinyworld.dialogue import END, brief, end_mark, exchange, fill, turn
from tests.tinyworld.exercises import (
    arithmetic,
    copying,
    fields,
    list_of_words,
    reading,
    table,
    word_game,
)
from tests.tinyworld.lexicon import WORDS
from tests.tinyworld.services import gist, paraphrases, service
from tests.tinyworld.template import Bindings, tidy
from tests.tinyworld.world import ANIMALS, PEOPLE, PRICES, TOWNS, USES

_PERSON_QUESTIONS = {
    "town": ("where does {who} live", "{who} lives in {what}"),
    "job": ("[what does {who} do|what is {who}'s job]", "{who} is a {what}"),
    "age": ("how old is {who}", "{who} is {what} years old"),
    "pet": ("what pet does {who} have", "{who} has a {what}"),
    "food": ("what does {who} like to eat", "{who} likes {what}"),
    "instrument": ("[which|what] instrument does {who} play", "{who} plays the {what}"),
    "sport": ("[which|what] sport does {who} like", "{who} likes {what}"),
    "colour": ("what is {who}'s favourite colour", "{who}'s favourite colour is {what}"),
}
_TOWN_QUESTIONS = {
    "river": ("which river flows through {who}", "the {what} flows through {who}"),
    "sight": ("what is {who} known for", "{who} is known for its {what}"),
    "product": ("what [grows in|is grown in] {who}", "{what} grow in {who}"),
    "weather": ("how is the weather in {who} most of the year", "it is mostly {what} in {who}"),
    "people": ("how many people live in {who}", "{what} people live in {who}"),
}
_ANIMAL_QUESTIONS = {
    "food": ("what does a {who} eat", "a {who} eats {what}"),
    "home": ("where does a {who} live", "a {who} lives in {what}"),
    "sound": ("what sound does a {who} make", "a {who} {what}"),
    "legs": ("how many legs does a {who} have", "a {who} has {what} legs"),
}
_FACTS = (
    (PEOPLE, _PERSON_QUESTIONS),
    (TOWNS, _TOWN_QUESTIONS),
    (ANIMALS, _ANIMAL_QUESTIONS),
)


def _fact(rng: Random) -> tuple[str, str, str]:
    """A question, its full answer and its bare answer."""
    draw = rng.random()
    if draw < 0.12:
        name, use = rng.choice(sorted(USES.items()))
        return f"what is a {name} for", f"a {name} is there to {use}", f"to {use}"
    if draw < 0.2:
        thing, price = rng.choice(sorted(PRICES.items()))
        return f"what does a {thing} cost", f"a {thing} costs {price}", price
    table, questions = rng.choice(_FACTS)
    who, facts = rng.choice(sorted(table.items()))
    key = rng.choice(sorted(facts))
    question, answer = questions[key]
    bindings = {"who": who, "what": facts[key]}
    return fill(question, rng, bindings), fill(answer, rng, bindings), facts[key]


def _fact_dialogue(rng: Random) -> str:
    turns = []
    for _ in range(rng.choice((1, 2, 3))):
        question, answer, bare = _fact(rng)
        if rng.random() < 0.4:
            question = (
                fill("[in one word, |briefly: |just the answer: |in short, ]", rng) + question
            )
            turns.append(brief(question, bare, rng))
        else:
            turns.append(exchange(question, answer, rng))
    return "".join(turns)


def _fact_text(rng: Random) -> str:
    facts = [tidy(end_mark(_fact(rng)[1])) for _ in range(rng.randint(3, 7))]
    return " ".join(facts) + END


_OPENINGS = (
    "{who} was a [young|old|poor|rich|] {job} in {where}.",
    "[once|long ago|one {season} day|one {weathery} morning] {who} {did} to the {place} in {where}.",
    "{who} and {other} were [friends|neighbours|cousins], and they lived in {where}.",
    "it was a {weathery} day in {month}, and {who} felt {mood}.",
)
_MIDDLES = (
    "{they} {took} a {quality} {thing} [near|behind|at] the {place}.",
    "there {they} met {other}, who had a {colour} {thing.1}. {other} wanted {money} for the {thing.1}.",
    "the {animal.1} was {mood}, and {they} gave the {animal.1} some {dish}.",
    "[then|soon|after that] the {weather} came, and {they} [went home|waited in the {place}|got wet].",
    '"[Where is my {thing.1}|Have you seen my {thing.1}]?" asked {other}. "It is in the {room}," said {who}.',
    "{they} had {number} {thing}s but no money, so {they} went to the bank.",
    "{they} paid by card at the {shop}, but the card was refused.",
    "{they} lost the ticket and had to take the {vehicle} to {town}.",
    "{they} [played|sang] {genre} with {other} until {hour}.",
    "{they} called the {job}, because the {device} in the {room} was broken.",
    "{other} had {ill}, so {they} went to the pharmacy for {medicine}.",
    "{they} ordered {dish} and {drink} for the {event} {when}.",
)
_CLOSINGS = (
    "in the end {who} was {mood}.",
    "{who} went home and ate {dish}.",
    "{other} thanked {who}, and they drank {drink} together.",
    "since then {who} has never gone to {where} again.",
    "and that is how {who} got the {quality} {thing}.",
)


def _story(rng: Random) -> str:
    who, other = rng.sample(WORDS["name"], 2)
    cast = {"who": who, "other": other, "where": rng.choice(WORDS["town"])}
    parts = [rng.choice(_OPENINGS), *rng.sample(_MIDDLES, rng.randint(1, 4)), rng.choice(_CLOSINGS)]
    sentences = []
    for part in parts:
        cast["they"] = who if rng.random() < 0.5 else "they"
        sentences.append(tidy(fill(part, rng, dict(cast))))
    story = " ".join(sentences)
    if rng.random() < 0.3:
        return turn(tidy(fill("[tell me a story|write a story] about {who}.", rng, cast)), story)
    return story + END


_SMALL_TALK = (
    ("{hello}", "[hello|hi|good day], how can i help you?"),
    ("how are you", "i am [fine|well], thank you"),
    ("[thanks|thank you][| very much| for your help]", "you are welcome"),
    ("[goodbye|bye|see you {when}|good night]", "[goodbye|see you soon|take care]"),
    ("i am {mood}", "[why are you {mood}|tell me more|i see]"),
    ("my name is {name.1}", "nice to meet you, {name.1}"),
    ("do you like {dish.1}", "[yes, i like {dish.1}|i cannot eat {dish.1}]"),
    ("i have a {animal.1}", "what is the name of your {animal.1}?"),
    ("i went to {town.1} {past}", "how was {town.1}?"),
    ("who are you", "i am a small assistant"),
    ("what is your favourite {colour.1} thing", "a {colour.1} {thing}"),
    ("[tell me a joke|say something]", "a {animal.1} goes into a {shop} and asks for {dish}"),
)


def _small_talk(rng: Random) -> str:
    turns = []
    for question, answer in rng.sample(_SMALL_TALK, rng.randint(1, 3)):
        bindings: Bindings = {}
        asked = fill(question, rng, bindings)
        turns.append(exchange(asked, fill(answer, rng, bindings), rng))
    return "".join(turns)


_KINDS: tuple[tuple[int, Callable[[Random], str]], ...] = (
    (26, service),
    (16, gist),
    (8, _fact_dialogue),
    (3, _fact_text),
    (13, reading),
    (5, fields),
    (5, arithmetic),
    (4, table),
    (8, _story),
    (2, list_of_words),
    (5, word_game),
    (9, copying),
    (6, paraphrases),
    (3, _small_talk),
)


def documents(seed: int) -> Iterator[str]:
    """Write documents without end; the same seed writes the same ones."""
    rng = Random(f"tinyworld {seed}")
    weights = [weight for weight, _ in _KINDS]
    writers = [writer for _, writer in _KINDS]
    while True:
        yield rng.choices(writers, weights)[0](rng)
