"""When two mathematical answers are equal: lists, tuples, sets, intervals and matrices part by part.

Numbers and words are compared here (exactly, as strings and fractions); every other part is a question for math-verify,
asked through `ask` and answered by the worker processes. Nothing is evaluated in this process.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from cgrpo_jax.grading.normalise import Number, clean, number, same_number, split_commas, split_top, split_unit, words
from cgrpo_jax.grading.parts import Parts
from cgrpo_jax.grading.verifier import Reading, Verifier
from cgrpo_jax.records import Verdict

Ask = Callable[[str, str], bool]  # (gold, answer): does math-verify hold them equal?
MAX_PARTS = 64  # of an unordered list; a longer one must have the order of the gold
MAX_DEPTH = 4
MAX_ROUNDS = 8

_NAME = re.compile(
    r"(?:\\?[A-Za-z]+(?:_(?:\w|\{[^{}]*\}))?\'?)(?: ?\([A-Za-z](?:, ?[A-Za-z])*\))? ?(?:=(?!=)|\\in(?![a-z])) ?"
)
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BASE = re.compile(r"([0-9A-Za-z]+)_(?:\{ ?(\d{1,2}) ?\}|(\d{1,2}))")
_RELATION = re.compile(
    r"[<>]|\\(?:le|ge|ne|lt|gt|setminus|mathbb|in|notin|backslash)(?![a-z])|\\\{.*(?:\||:|\\mid)", re.DOTALL
)
_ROOT = re.compile(r"\\sqrt ?(\d)")


@dataclasses.dataclass(frozen=True)
class Collection:
    """Parts with what holds them: "bare" (a list without brackets), "{}", "()", "[]", "(]", "[)", "union", "matrix"."""

    kind: str
    parts: tuple[Collection | str, ...]


Parsed = Collection | str


def parse(text: str, depth: int = 0, inside: bool = False) -> Parsed:
    """The structure of a cleaned answer. What is no collection stays text."""
    if depth >= MAX_DEPTH:
        return text
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in matrix[2].split("\\\\") if row.strip()]
        return Collection("matrix", tuple(Collection("row", tuple(map(str.strip, row.split("&")))) for row in rows))
    parts = [part for part in split_commas(text, inside) if part]
    if not inside and len(parts) > 1:
        return Collection("bare", _plus_minus(_names_off(parts), depth))
    united = split_top(text, "\\cup")
    if len(united) > 1:
        return Collection("union", tuple(parse(part, depth + 1, True) for part in united))
    if text.startswith("\\{") and text.endswith("\\}") and text.count("\\{") == text.count("\\}") == 1:
        parts = [part for part in split_commas(text[2:-2].strip(), True) if part]
        relation = _RELATION.search(text)
        return text if relation else Collection("{}", _plus_minus(_names_off(parts), depth))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_last(text):
        inner = split_commas(text[1:-1].strip(), True)
        if len(inner) > 1:
            return Collection(text[0] + text[-1], tuple(parse(part, depth + 1, True) for part in inner))
        return parse(text[1:-1].strip(), depth + 1) if text[0] == "(" and words(text) is None else text
    if "\\pm" in text and depth == 0:
        return Collection("bare", _plus_minus([text], depth))
    return text


def _closes_last(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _plus_minus(parts: Sequence[str], depth: int) -> tuple[Parsed, ...]:
    """Each part with one \\pm stands for two."""
    found: list[Parsed] = []
    for part in parts:
        if part.count("\\pm") == 1:
            for sign, other in (("+", "-"), ("-", "+")):
                signed = part.replace("\\pm", sign).replace("\\mp", other)
                found.append(signed.lstrip("+ "))
        else:
            found.append(parse(part, depth + 1, True))
    return tuple(found)


def _names_off(parts: Sequence[str]) -> list[str]:
    """Without "x =" where every part has the same one, or the first alone has one."""
    names = [_NAME.match(part) for part in parts]
    heads = [name and name[0].replace(" ", "") for name in names]
    first = names[0] if names else None
    if (
        first
        and (all(head == heads[0] for head in heads) or not any(heads[1:]))
        and not any("=" in part[name.end() if name else 0 :] for part, name in zip(parts, names, strict=True))
    ):
        return [part[name.end() :] if name else part for part, name in zip(parts, names, strict=True)]
    return list(parts)


def _same_names(gold: str, answer: str) -> tuple[str, str]:
    """Without "x =" in front, where only one has it or both have the same."""
    of_gold, of_answer = _NAME.match(gold), _NAME.match(answer)
    if of_gold and of_answer and of_gold[0].replace(" ", "") != of_answer[0].replace(" ", ""):
        return gold, answer
    gold_value = gold[of_gold.end() :] if of_gold else gold
    answer_value = answer[of_answer.end() :] if of_answer else answer
    if bool(of_gold) != bool(of_answer) and ("=" in (answer if of_gold else gold) or (of_gold and "=" in gold_value)):
        return gold, answer  # an equation is more than its right-hand side
    return gold_value, answer_value


def _units_agree(gold: str | None, answer: str | None) -> bool:
    return gold is None or answer is None or gold == answer or {gold, answer} <= {"percent", None}


def same_leaf(gold: str, answer: str, ask: Ask) -> bool:
    """Two parts that are no collections."""
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    gold, answer = _same_names(gold, answer)
    gold_words, answer_words = words(gold), words(answer)
    if gold_words is not None or answer_words is not None:
        # A bare letter may answer "(C)"; text and mathematics are never equal otherwise.
        bare_gold, bare_answer = (text.strip("() .").casefold() for text in (gold, answer))
        return bool(bare_gold) and (gold_words or bare_gold) == (answer_words or bare_answer)
    (gold, gold_unit), (answer, answer_unit) = split_unit(gold), split_unit(answer)
    if not _units_agree(gold_unit, answer_unit):
        return False
    gold_base, answer_base = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if gold_base and gold_base[1].isdigit():
        base = gold_base[2] or gold_base[3]
        digits, other_base = (answer_base[1], answer_base[2] or answer_base[3]) if answer_base else (answer, base)
        return digits.lstrip("0") == gold_base[1].lstrip("0") and other_base == base
    gold_number, answer_number = number(gold), number(answer)
    if gold_number and answer_number:
        if same_number(gold_number, answer_number):
            return True
        one_percent = (gold_unit == "percent") != (answer_unit == "percent")
        return one_percent and _same_hundredths(gold_number, answer_number, gold_unit)
    if gold_number and answer_base and answer_base[1].isdigit():
        return _in_base(answer_base) == gold_number.value
    if _approximate(answer) and not _approximate(gold):
        sides = split_top(answer, "\\approx")
        return any(same_leaf(gold, side, ask) for side in (sides if gold_number else sides[:1]) if side)
    gold, answer = (_ROOT.sub(r"\\sqrt{\1}", text) for text in (gold, answer))
    return bool(gold and answer) and (gold.replace(" ", "") == answer.replace(" ", "") or ask(gold, answer))


def _same_hundredths(gold: Number, answer: Number, gold_unit: str | None) -> bool:
    """17.5 % is 0.175: just one of the two has a percent sign."""
    percent, plain = (gold, answer) if gold_unit == "percent" else (answer, gold)
    return percent.value == 100 * plain.value


def _in_base(match: re.Match) -> int | None:
    base = int(match[2] or match[3])
    return int(match[1], base) if 2 <= base <= 10 and all(int(digit) < base for digit in match[1]) else None


def _approximate(text: str) -> bool:
    return "\\approx" in text


def _infinity(text: Parsed) -> Parsed:
    if isinstance(text, str) and text.lstrip("+- ") in ("\\infty", "oo", "inf", "infinity", "infty"):
        return "-\\infty" if text.startswith("-") else "\\infty"
    return text


def _ordered(gold: Sequence[Parsed], answer: Sequence[Parsed], ask: Ask) -> bool:
    if len(gold) != len(answer):
        return False
    pairs = zip(gold, answer, strict=True)
    return all(same(_infinity(gold_part), _infinity(answer_part), ask) for gold_part, answer_part in pairs)


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
    table = [[same(part, other, ask) for other in answer_left] for part in gold_left]
    return _matched(table)


def _no(gold: str, answer: str) -> bool:
    """Asks nobody."""
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
    if isinstance(gold, str) and isinstance(answer, str):
        return same_leaf(gold, answer, ask)
    if isinstance(gold, str) or isinstance(answer, str):
        return _one_collection(gold, answer, ask)
    kinds = {gold.kind, answer.kind}
    if kinds == {"union"}:
        return _unordered(gold.parts, answer.parts, ask, True)
    if "matrix" in kinds or "row" in kinds or "union" in kinds:
        return len(kinds) == 1 and _ordered(gold.parts, answer.parts, ask)
    if kinds <= {"bare", "{}"}:
        return _unordered(gold.parts, answer.parts, ask, "{}" in kinds)
    if "{}" in kinds:
        return False
    if gold.kind == answer.kind or kinds == {"bare", "()"} or (len(gold.parts) > 2 and kinds == {"()", "[]"}):
        return _ordered(gold.parts, answer.parts, ask)
    return False


def _one_collection(gold: Parsed, answer: Parsed, ask: Ask) -> bool:
    """A collection against a text: a set of one is its element; a set written by relations is for math-verify."""
    text = gold if isinstance(gold, str) else answer
    collection = answer if isinstance(gold, str) else gold
    assert isinstance(text, str) and isinstance(collection, Collection)
    name = _NAME.match(text)
    if name and not _RELATION.search(text[name.end() :]):
        inner = parse(text[name.end() :])
        if isinstance(inner, Collection):
            return same(inner, answer, ask) if isinstance(gold, str) else same(gold, inner, ask)
    if collection.kind == "{}" and len(collection.parts) == 1 and not _RELATION.search(text):
        element, other = (part if isinstance(part, str) else part.parts[0] for part in (gold, answer))
        return same(element, other, ask)
    if _grouped(text) and collection.kind == "bare":
        return _ordered(tuple(split_top(text, ",")), collection.parts, ask)
    if not _RELATION.search(text):
        return False
    return ask(text, render(collection))  # math-verify turns relations into sets on this side only


def _grouped(text: str) -> bool:
    """Whether it may be a list after all: "1,234" against "1, 234"."""
    return "," in text and number(text) is not None


def render(parsed: Parsed) -> str:
    """Back to text, for math-verify."""
    if isinstance(parsed, str):
        return parsed
    parts = [render(part) for part in parsed.parts]
    if parsed.kind == "union":
        return "\\cup ".join(parts)
    if parsed.kind == "matrix":
        return "\\begin{pmatrix}" + "\\\\".join(parts) + "\\end{pmatrix}"
    if parsed.kind == "row":
        return " & ".join(parts)
    opening, closing = {"bare": ("", ""), "{}": ("\\{", "\\}")}.get(parsed.kind, (parsed.kind[:1], parsed.kind[1:]))
    return opening + ", ".join(parts) + closing


def compare(pairs: Sequence[tuple[str, str]], verifier: Verifier) -> list[Verdict]:
    """A verdict for each (gold, answer). Parts that need math-verify are asked together, again while new ones come up.

    All parts of an answer share its CPU limit (`Parts`).
    """
    parts = Parts(verifier, len(pairs))
    verdicts: list[Verdict | None] = [None] * len(pairs)
    parsed = [(_top(gold), _top(answer)) for gold, answer in pairs]
    for round_ in range(MAX_ROUNDS):
        missing: dict[int, list[tuple[str, str]]] = {}
        for index, (gold, answer) in enumerate(parsed):
            if verdicts[index] is None:
                asked: list[tuple[str, str]] = []

                def ask(gold: str, answer: str, asked: list = asked, index: int = index) -> bool:
                    asked.append((gold, answer))
                    return parts.says(index, (gold, answer))

                correct = same(gold, answer, ask)
                unknown = parts.unknown(index, asked)
                if correct and unknown and round_ < MAX_ROUNDS - 1:
                    missing[index] = unknown
                    continue
                verdicts[index] = parts.verdict(index, correct and not unknown, asked)
        if not missing:
            break
        parts.ask(missing)
    return [verdict or Verdict.of(False) for verdict in verdicts]


def _top(text: str) -> Parsed:
    cleaned = clean(text)
    name = _NAME.match(cleaned)
    if name and "\\in" in name[0]:
        cleaned = cleaned[name.end() :]
    return cleaned if words(cleaned) is not None else parse(cleaned)


def readable(golds: Sequence[str], verifier: Verifier) -> list[Reading]:
    """Whether each gold answer can be read: by itself as words, number or collection, else by math-verify."""
    readings = [Reading(_reads(_top(gold)), "ok") for gold in golds]
    unsure = [i for i, reading in enumerate(readings) if not reading.readable]
    for i, reading in zip(unsure, verifier.readable([render(_top(golds[i])) or " " for i in unsure]), strict=True):
        readings[i] = reading
    return readings


def _reads(parsed: Parsed) -> bool:
    if isinstance(parsed, Collection):
        return all(_reads(part) for part in parsed.parts)
    value, _ = split_unit(parsed)
    return words(parsed) is not None or number(value) is not None or bool(_BASE.fullmatch(value))
