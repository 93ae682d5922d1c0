"""The fixed facts of the world: people and their homes, towns, animals and things.

They are drawn once, from a constant seed, so that every document of every seed agrees on them.
"""

from random import Random

from tests.tinyworld.lexicon import WORDS
from tests.tinyworld.template import expand

Facts = dict[str, dict[str, str]]

_ANIMALS = """dog|bones|a kennel|barks|four;cat|mice|a house|purrs|four;horse|hay|a stable|neighs|four
cow|grass|a field|moos|four;sheep|grass|a meadow|bleats|four;goat|leaves|a hill farm|bleats|four
pig|scraps|a sty|grunts|four;hen|grain|a coop|clucks|two;duck|weeds|a pond|quacks|two
goose|grass|a farmyard|honks|two;fox|hens|a den|barks|four;wolf|sheep|a forest|howls|four
bear|honey|a cave|growls|four;rabbit|carrots|a burrow|squeaks|four;mouse|cheese|a hole|squeaks|four
owl|mice|a hollow tree|hoots|two;crow|corn|a tall tree|caws|two;frog|flies|a marsh|croaks|four
bee|nectar|a hive|buzzes|six;trout|worms|a river|makes no sound|no;spider|flies|a web|is silent|eight
lion|meat|the savanna|roars|four;parrot|seeds|a cage|talks|two;donkey|hay|a shed|brays|four
elephant|leaves|the savanna|trumpets|four;monkey|bananas|the jungle|chatters|two
whale|fish|the sea|sings|no;snake|mice|the desert|hisses|no;turtle|weeds|the sea|is silent|four"""

_TOOLS = """hammer|drive nails;saw|cut wood;axe|split logs;spade|dig holes;rake|gather leaves
knife|slice bread;needle|sew cloth;rope|tie things;ladder|climb up;bucket|carry water;brush|paint walls
drill|make holes;file|smooth metal;wrench|turn bolts;broom|sweep floors;scissors|cut paper
shovel|move snow;screwdriver|turn screws;torch|see in the dark;kettle|boil water;oven|bake bread
fridge|keep food cold;umbrella|stay dry;clock|tell the time;map|find the way;key|open a lock
wallet|keep money;bank|keep money safe;pharmacy|buy medicine;hospital|heal the ill
library|borrow books;airport|take a plane;station|take a train;card|pay in shops;phone|call people
PIN|prove that a card is yours;passport|travel to other countries;thermostat|set the heating
calendar|plan the days;insurance|be paid after an accident;ticket|enter a train"""

_KINDS = (
    "fruit", "vegetable", "dish", "drink", "animal", "tool", "clothing", "furniture", "device",
    "room", "job", "instrument", "sport", "vehicle", "weather", "season", "day", "month", "colour",
    "currency", "country", "body", "genre", "shop", "mood",
)  # fmt: skip

KIND_NAMES = {
    "dish": "food", "clothing": "piece of clothing", "furniture": "piece of furniture",
    "weather": "kind of weather", "day": "day of the week", "body": "part of the body",
    "genre": "kind of music", "shop": "kind of shop",
}  # fmt: skip

OPPOSITES = dict(
    pair.split("/")
    for pair in """big/small hot/cold old/new good/bad clean/dirty cheap/dear quick/slow quiet/loud
    soft/hard strong/weak bright/dark dry/wet full/empty happy/sad tall/short long/brief wide/narrow
    heavy/light early/late open/closed rich/poor young/old high/low left/right day/night up/down
    first/last more/less always/never yes/no buy/sell send/receive win/lose arrive/leave lock/unlock
    start/stop raise/lower remember/forget debit/credit deposit/withdrawal""".split()
)

_NUMBER_NAMES = """zero one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_name(number: int) -> str:
    """The English name of 0 … 99."""
    if number < 20:
        return _NUMBER_NAMES[number]
    ten = _TENS[number // 10 - 2]
    return ten if number % 10 == 0 else f"{ten}-{_NUMBER_NAMES[number % 10]}"


def _rows(table: str) -> list[list[str]]:
    return [row.split("|") for row in table.replace("\n", ";").split(";")]


def _people(rng: Random) -> Facts:
    return {
        name: {
            "town": rng.choice(WORDS["town"]),
            "job": rng.choice(WORDS["job"]),
            "age": str(rng.randint(9, 80)),
            "pet": rng.choice(WORDS["animal"][:12]),
            "food": rng.choice(WORDS["dish"]),
            "instrument": rng.choice(WORDS["instrument"]),
            "sport": rng.choice(WORDS["sport"]),
            "colour": rng.choice(WORDS["colour"]),
        }
        for name in WORDS["name"][:20]
    }


def _towns(rng: Random) -> Facts:
    rivers = "Senn Arle Dorn Wick Tamme Oule Brea Lorrin Isk Yale".split()
    return {
        town: {
            "river": rng.choice(rivers),
            "sight": rng.choice(WORDS["place"]),
            "product": rng.choice(WORDS["fruit"] + WORDS["vegetable"]) + "s",
            "weather": rng.choice(WORDS["weathery"]),
            "people": f"{rng.randint(2, 90)} thousand",
        }
        for town in WORDS["town"][:15]
    }


_RNG = Random("the world")
PEOPLE = _people(_RNG)
TOWNS = _towns(_RNG)
ANIMALS = {
    name: {"food": food, "home": home, "sound": sound, "legs": legs}
    for name, food, home, sound, legs in _rows(_ANIMALS)
}
USES = {name: use for name, use in _rows(_TOOLS)}
PRICES = {
    thing: f"{_RNG.randint(1, 30)} {_RNG.choice(('crowns', 'pounds', 'euros'))}"
    for kind in ("fruit", "vegetable", "dish", "drink", "tool", "clothing", "furniture", "device")
    for thing in WORDS[kind]
}
MEMBERS = {kind: [expand(word, WORDS, _RNG) for word in WORDS[kind]] for kind in _KINDS}


def kind_name(kind: str) -> str:
    """The kind of a member of this word list: a pear is a fruit, soup is food."""
    return KIND_NAMES.get(kind, kind)
