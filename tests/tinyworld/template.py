"""Sentence templates, the notation in which the grammar and the tasks are written.

`[a|b|]` chooses one alternative, possibly an empty one, and nests. `{name}` is a word list of the
vocabulary, whose entries are templates too. `{name.1}` draws once and repeats the same word
wherever the same mark stands within one set of bindings.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

Vocabulary = Mapping[str, Sequence[str]]
Bindings = dict[str, str]


@dataclass(frozen=True)
class _Choice:
    """`[a|b]`."""

    branches: tuple["_Sequence", ...]


@dataclass(frozen=True)
class _Slot:
    """`{name}` or `{name.mark}`."""

    name: str
    mark: str


_Sequence = tuple[str | _Choice | _Slot, ...]


@cache
def _parse(template: str) -> _Sequence:
    sequence, end = _parse_until(template, 0, "")
    assert end == len(template), f"unbalanced bracket in {template!r}"
    return sequence


def _parse_until(template: str, start: int, stops: str) -> tuple[_Sequence, int]:
    """Parse from `start` to the first character of `stops` at this depth, or to the end."""
    nodes: list[str | _Choice | _Slot] = []
    at = start
    while at < len(template) and template[at] not in stops:
        if template[at] == "[":
            branches = []
            while template[at] != "]":
                branch, at = _parse_until(template, at + 1, "|]")
                branches.append(branch)
            nodes.append(_Choice(tuple(branches)))
            at += 1
        elif template[at] == "{":
            end = template.index("}", at)
            name, _, mark = template[at + 1 : end].partition(".")
            nodes.append(_Slot(name, mark))
            at = end + 1
        else:
            plain = re.compile(r"[^\[\]{|]+|.").match(template, at)
            assert plain is not None
            nodes.append(plain.group())
            at = plain.end()
    return tuple(nodes), at


def expand(template: str, words: Vocabulary, rng: Random, bindings: Bindings | None = None) -> str:
    """Write one text of the template.

    `bindings` fixes the words of slots by name. If given, it gets the first word that each slot
    drew, under the slot's name.
    """
    pieces: list[str] = []
    given = {} if bindings is None else dict(bindings)
    drawn: Bindings = {} if bindings is None else bindings
    _write(_parse(template), words, rng, given, drawn, pieces)
    return "".join(pieces)


def _write(
    nodes: _Sequence,
    words: Vocabulary,
    rng: Random,
    given: Bindings,
    drawn: Bindings,
    pieces: list[str],
) -> None:
    for node in nodes:
        if isinstance(node, str):
            pieces.append(node)
        elif isinstance(node, _Choice):
            _write(rng.choice(node.branches), words, rng, given, drawn, pieces)
        else:
            key = f"{node.name}.{node.mark}" if node.mark else node.name
            word = given.get(key)
            if word is None:
                inner: list[str] = []
                _write(_parse(rng.choice(words[node.name])), words, rng, given, drawn, inner)
                word = "".join(inner)
                drawn.setdefault(key, word)
                if node.mark:
                    given[key] = word
            pieces.append(word)


_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|uni|use|euro)")
_BEFORE_STOP = re.compile(r" +(?=[.,;:!?])")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?] )|(?<=\n))[a-z]")
_PLURAL = re.compile(
    r"\b(?P<es>\w*(?:sh|ch|x|to|ngo))s\b|\b(?P<y>\w*[^aeiou\W])ys\b|\b(?P<f>kni|shel)fe?s\b"
    r"|\b(?P<same>scissors|pliers|headphones|jeans|shoes|boots)s\b"
)
_LONE_I = re.compile(r"\bi(?='|\b)(?!\.)")


def _plural(match: re.Match[str]) -> str:
    stem, ending = match.lastgroup, {"es": "es", "y": "ies", "f": "ves", "same": ""}
    assert stem is not None
    return match.group(stem) + ending[stem]


def tidy(text: str) -> str:
    """Clean up after expansion: spaces, plurals, a/an, capitals at sentence starts, a lone i."""
    text = _BEFORE_STOP.sub("", re.sub(r" {2,}", " ", text)).strip()
    text = _PLURAL.sub(_plural, text)
    text = _ARTICLE.sub(r"\1n ", text)
    text = _LONE_I.sub("I", text)
    return _SENTENCE_START.sub(lambda match: match.group().upper(), text)
