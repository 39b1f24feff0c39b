"""Compares two mathematical answers: lists, tuples, sets, intervals and matrices part by part.

Numbers and words are compared here (exactly, as strings and fractions); every other part is a question for math-verify,
which is asked through `ask` (`leaves.Ask`). Nothing is evaluated here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cgrpo_jax.grading.answers import boxed
from cgrpo_jax.grading.golds import NO_ANSWERS
from cgrpo_jax.grading.leaves import BASE, Ask, said, same_leaf, squeezed
from cgrpo_jax.grading.normalise import clean, number, split_top, split_unit, words
from cgrpo_jax.grading.reals import is_set, real_set
from cgrpo_jax.grading.structure import NAME, RELATION, Collection, Parsed, parse, render

MAX_PARTS = 64  # of an unordered list; a longer one must have the order of the gold


def _infinity(text: str) -> str:
    """`oo` and other spellings of infinity as LaTeX."""
    if text.lstrip("+- ") in ("\\infty", "oo", "inf", "infinity", "infty"):
        return "-\\infty" if text.startswith("-") else "\\infty"
    return text


def _ordered(gold: Sequence[Parsed], answer: Sequence[Parsed], ask: Ask) -> bool:
    return len(gold) == len(answer) and all(same(*parts, ask) for parts in zip(gold, answer, strict=True))


def _unordered(gold: Sequence[Parsed], answer: Sequence[Parsed], ask: Ask, distinct: bool) -> bool:
    """Each part of the gold is met by its own part of the answer; in sets a repetition counts once."""
    if distinct:
        gold, answer = tuple(dict.fromkeys(gold)), tuple(dict.fromkeys(answer))
    if len(gold) != len(answer):
        return False
    if len(gold) > MAX_PARTS:
        return _ordered(gold, answer, ask)
    gold_left, answer_left = list(gold), list(answer)
    for part in gold:  # what needs no question goes first
        found = next((i for i, other in enumerate(answer_left) if same(part, other, _no)), None)
        if found is not None:
            gold_left.remove(part)
            answer_left.pop(found)
    return _matched([[same(part, other, ask) for other in answer_left] for part in gold_left])


def _no(gold: str, answer: str, how: str = "equal") -> bool:
    """Answers every question to math-verify with no, so that only what is plainly equal is found."""
    return False


def _matched(table: Sequence[Sequence[bool]]) -> bool:
    """Whether each row can have a column of its own (augmenting paths)."""
    owner: dict[int, int] = {}

    def find_column(row: int, seen: set[int]) -> bool:
        for column, equal in enumerate(table[row]):
            if equal and column not in seen:
                seen.add(column)
                if column not in owner or find_column(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return all(find_column(row, set()) for row in range(len(table)))


def same(gold: Parsed, answer: Parsed, ask: Ask) -> bool:
    """Whether two parsed answers are equal."""
    if isinstance(gold, str) or isinstance(answer, str):
        sets = _as_sets(gold, answer)
        if sets:
            return same(*sets, ask)
        if isinstance(gold, str) and isinstance(answer, str):
            return same_leaf(_infinity(gold), _infinity(answer), ask)
        return _one_collection(gold, answer, ask)
    kinds = {gold.kind, answer.kind}
    if kinds == {"union"}:
        return _unordered(gold.parts, answer.parts, ask, True)
    if kinds == {"matrix", "[]"}:
        return _array(gold, answer, ask)
    if kinds <= {"bare", "{}"}:
        return _unordered(gold.parts, answer.parts, ask, "{}" in kinds)
    if gold.names and answer.names:
        return _by_name(gold, answer, ask)
    if gold.names and _misnamed(gold, answer):
        return False
    if gold.kind == answer.kind or kinds == {"bare", "()"} or (len(gold.parts) > 2 and kinds == {"()", "[]"}):
        return _ordered(gold.parts, answer.parts, ask)
    return False


def _as_sets(gold: Parsed, answer: Parsed) -> tuple[Collection, Collection] | None:
    """Both as sets of real numbers where at least one is described by a text; None where they are no such sets."""
    if isinstance(gold, str) and isinstance(answer, str) and squeezed(gold) == squeezed(answer):
        return None
    read = [real_set(part) if isinstance(part, str) else (part, None) for part in (gold, answer)]
    if not read[0] or not read[1] or not is_set(read[0][0]) or not is_set(read[1][0]):
        return None
    other_variable = read[0][1] and read[1][1] and read[0][1] != read[1][1]
    return None if other_variable else (read[0][0], read[1][0])


def _by_name(gold: Collection, answer: Collection, ask: Ask) -> bool:
    """(a, b) = (1, 2) against b = 2, a = 1."""
    values = dict(zip(answer.names, answer.parts, strict=True))
    if len(values) != len(gold.names) or set(values) != set(gold.names):
        return False
    return _ordered(gold.parts, tuple(values[name] for name in gold.names), ask)


def _misnamed(gold: Collection, answer: Collection) -> bool:
    """Whether parts of the answer have the names of other parts, as in y = 1, y = 2 for x = 1, y = 2."""
    named = [NAME.match(part) if isinstance(part, str) else None for part in answer.parts]
    pairs = zip(named, gold.names, strict=False)
    return any(own and own[0].strip("= ").replace(" ", "") != name for own, name in pairs)


def _array(gold: Collection, answer: Collection, ask: Ask) -> bool:
    """A matrix against [[1, 2], [3, 4]]; one of a single row or column also against [1, 2]."""
    return _ordered(_rows(gold, answer), _rows(answer, gold), ask)


def _rows(collection: Collection, other: Collection) -> tuple[Parsed, ...]:
    """Rows of a matrix; its entries where the other one is an array of entries and it has one row or column."""
    parts = [part for part in collection.parts if isinstance(part, Collection)]
    nested = len(parts) == len(collection.parts)
    if collection.kind == "[]":
        return tuple(dataclasses.replace(part, kind="row") for part in parts) if nested else collection.parts
    flat = not any(isinstance(part, Collection) for part in other.parts)
    if flat and len(parts) == 1:
        return parts[0].parts
    if flat and all(len(part.parts) == 1 for part in parts):
        return tuple(part.parts[0] for part in parts)
    return collection.parts


def _one_collection(gold: Parsed, answer: Parsed, ask: Ask) -> bool:
    """A collection against a text: a set of one is its element; a set written by relations is for math-verify."""
    text, collection = (gold, answer) if isinstance(gold, str) else (answer, gold)
    assert isinstance(text, str) and isinstance(collection, Collection)
    name = NAME.match(text)
    if name and not RELATION.search(text[name.end() :]):
        inner = parse(text[name.end() :])
        if isinstance(inner, Collection):
            return same(inner, answer, ask) if isinstance(gold, str) else same(gold, inner, ask)
    if text == "\\emptyset":
        return False
    if collection.kind == "{}" and len(collection.parts) == 1 and not RELATION.search(text):
        element, other = (part if isinstance(part, str) else part.parts[0] for part in (gold, answer))
        return same(element, other, ask)
    if isinstance(gold, str) and collection.kind == "bare" and len(set(collection.parts)) == len(collection.parts):
        texts = [part for part in collection.parts if isinstance(part, str)]
        if len(texts) == len(collection.parts) and all(same_leaf(gold, part, ask) for part in texts):
            return True  # "one half, or 0.5" says one thing
    if _grouped(text) and collection.kind == "bare":
        return _ordered(tuple(split_top(text, ",")), collection.parts, ask)
    if collection.kind == "matrix" and "matrix}" in text:
        return ask(render(gold), render(answer))  # a multiple or a sum of matrices
    if not RELATION.search(text):
        return False
    return ask(text, render(collection))  # math-verify turns relations into sets on this side only


def _grouped(text: str) -> bool:
    """Whether a number with a thousands separator may be a list after all: "1,234" against "1, 234"."""
    return "," in text and number(text) is not None


def equal(gold: str, answer: str, ask: Ask) -> bool:
    """Whether an answer is mathematically the gold; nothing is equal to a gold that says nothing."""
    return not says_nothing(gold) and same(_top(gold), _top(answer), ask)


def says_nothing(gold: str) -> bool:
    """Whether a gold is a word of despair, "proof" or "not found": whoever repeats it earns nothing."""
    return said(clean(gold)) in NO_ANSWERS


def _top(text: str) -> Parsed:
    """The structure of a whole answer, which may stand in a box."""
    text = text.strip().strip("$")
    inner = boxed(text) if text.startswith("\\boxed{") and text.count("\\boxed") == 1 else None
    cleaned = clean(inner if inner and text == f"\\boxed{{{inner}}}" else text)
    name = NAME.match(cleaned)
    if name and "\\in" in name[0]:
        cleaned = cleaned[name.end() :]
    return cleaned if words(cleaned) is not None else parse(cleaned)


def readable(gold: str, ask: Ask) -> bool:
    """Whether a gold can be read: by itself as words, a number or a collection of them, else by math-verify."""
    parsed = _top(gold)
    return not says_nothing(gold) and (_reads(parsed) or ask(render(parsed) or " ", "", "read"))


def _reads(parsed: Parsed) -> bool:
    if isinstance(parsed, Collection):
        return all(_reads(part) for part in parsed.parts)
    value, _ = split_unit(parsed)
    return words(parsed) is not None or number(value) is not None or bool(BASE.fullmatch(value))
