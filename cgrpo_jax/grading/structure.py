"""What an answer is made of: lists, tuples, sets, intervals, unions and matrices of parts, and the names of values.

Plain string work, linear in the text for each of at most `MAX_DEPTH` levels; nothing is evaluated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from cgrpo_jax.grading.answers import closing
from cgrpo_jax.grading.normalise import split_commas, split_top, words

MAX_DEPTH = 4

_SUBSCRIPT = (
    r"(?: ?_(?:\w|\\[A-Za-z]+|\{(?:[^{}]|\{[^{}]{0,40}\}){1,60}\})|'|\^ ?\{? ?\\prime ?\}?|\^ ?\{?-1\}?(?= ?\())*"
)
_ARGUMENTS = r"(?: ?\([^()]{1,40}\))?"
_LETTERS = rf"\\?[A-Za-z]+{_SUBSCRIPT}{_ARGUMENTS}"
_DRESSED = r"\\(?:overline|vec|hat|bar|mathbf|mathcal|dot|ddot|text|boldsymbol) ?\{[^{}]{1,60}\}"
_SEGMENT = r"\|(?:[A-Z]{1,4}|z|\\vec ?\{[^{}]{1,9}\})\||m? ?\\(?:angle|triangle) ?(?:[A-Z] ?(?:_\{? ?\w ?\}?)? ?){1,4}"
_TRIGONOMETRY = r"\\(?:sin|cos|tan|cot|sec|csc) ?(?:[A-Za-z]|\\[a-z]{2,7}|\([^()=]{1,20}\)|\{[^{}=]{1,20}\})"
_COMPOSED = r"\( ?[A-Za-z] ?\\circ ?[A-Za-z] ?\) ?\([^()]{1,40}\)"
_DERIVATIVE = r"\\frac ?\{ ?(?:d|\\partial)[^{}]{0,20}\} ?\{ ?(?:d|\\partial)[^{}]{1,20}\}"
_OPERATION = r"\\(?:lim|int|sum|prod|det|max|min|gcd|operatorname)(?![a-z]).{1,200}"
_ONE_NAME = (
    rf"(?:{_LETTERS}|(?:{_DRESSED}){_SUBSCRIPT}{_ARGUMENTS}"
    rf"|{_SEGMENT}|{_TRIGONOMETRY}|{_DERIVATIVE}|{_COMPOSED})"
)
_IS_NAME = re.compile(rf"{_ONE_NAME}(?: ?: ?{_ONE_NAME}){{0,5}}|{_OPERATION}")
_FUNCTION_NAMES = re.compile(r"\\(?:sqrt|frac|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|infty|binom)(?![a-z])")
NAME = re.compile(rf"(?:\\?[A-Za-z]+{_SUBSCRIPT}) ?(?:\([A-Za-z](?:, ?[A-Za-z])*\))? ?(?:=(?!=)|\\in(?![a-z])) ?")
_TUPLE_NAME = re.compile(rf"\( ?({_LETTERS}(?: ?, ?{_LETTERS}){{1,7}}) ?\) ?(?:=|\\in(?![a-z])) ?")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
RELATION = re.compile(
    r"[<>]|\\(?:le|ge|ne|lt|gt|setminus|mathbb|in|notin|backslash)(?![a-z])|\\\{.*(?:\||:|\\mid)", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Collection:
    """Parts with what holds them: "bare" (a list without brackets), "{}", "()", "[]", "(]", "[)", "union", "matrix".

    `names` are those of the parts, in their order, where they were written: (a, b) = (1, 2) and a = 1, b = 2.
    """

    kind: str
    parts: tuple[Collection | str, ...]
    names: tuple[str, ...] = ()


Parsed = Collection | str


def is_name(text: str) -> bool:
    """Whether it names one value: x, f(2), AB, |AB|, \\angle ABC, \\sin A, S_1 : S_2; not xy, x + z or 2x."""
    text = text.strip()
    if len(text) > 250 or not _IS_NAME.fullmatch(text) or _FUNCTION_NAMES.fullmatch(text):
        return False
    run = re.split("[^A-Za-z]", text, maxsplit=1)[0]
    if len(run) < 2 or run.isupper() or (len(run) == 2 and run[0] == "d"):
        return True
    return len(run) > 2 and bool(re.search(r"[aeiouAEIOU]", run)) and bool(set(run) - set("abcxyz"))


def parse(text: str, depth: int = 0, inside: bool = False) -> Parsed:
    """The structure of a cleaned answer. What is no collection stays text."""
    if depth >= MAX_DEPTH:
        return text
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in matrix[2].split("\\\\") if row.strip()]
        return Collection("matrix", tuple(Collection("row", tuple(map(str.strip, row.split("&")))) for row in rows))
    tuple_name = _TUPLE_NAME.match(text)
    if tuple_name:
        return _named(parse(text[tuple_name.end() :], depth, inside), tuple_name[1])
    parts = [part for part in split_commas(text, inside) if part]
    if not inside and len(parts) > 1:
        names = _own_names(parts)
        kind = "()" if names else "bare"
        return Collection(kind, _plus_minus(_names_off(parts, bool(names)), depth), names)
    united = split_top(text, "\\cup")
    if len(united) > 1:
        return Collection("union", tuple(parse(part, depth + 1, True) for part in united))
    if text.startswith("\\{") and text.endswith("\\}") and text.count("\\{") == text.count("\\}") == 1:
        parts = [part for part in split_commas(text[2:-2].strip(), True) if part]
        return text if RELATION.search(text) else Collection("{}", _plus_minus(_names_off(parts), depth))
    if text.startswith("{") and "," in text and _closes_last(text):  # a set whose braces LaTeX would not show
        return parse(f"\\{{{text[1:-1]}\\}}", depth + 1)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_last(text):
        return _bracketed(text, depth)
    if "\\pm" in text and depth == 0:
        return Collection("bare", _plus_minus([text], depth))
    return text


def _bracketed(text: str, depth: int) -> Parsed:
    """What stands in one pair of brackets, round or square at either end."""
    content = text[1:-1].strip()
    inner = split_commas(content, True)
    if len(inner) > 1:
        return Collection(text[0] + text[-1], tuple(parse(part, depth + 1, True) for part in inner))
    if text[0] == "(" and text[-1] == ")":
        return parse(content, depth + 1) if words(text) is None else text
    return parse(content, depth + 1) if _MATRIX.fullmatch(content) else text


def _closes_last(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    return closing(text, 0, ("([{", ")]}")) == len(text) - 1


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


def _named(parsed: Parsed, names: str) -> Parsed:
    """A tuple with the names of its parts, where it has as many."""
    each = tuple(name.strip().replace(" ", "") for name in names.split(","))
    if isinstance(parsed, Collection) and parsed.kind == "()" and len(parsed.parts) == len(each):
        return dataclasses.replace(parsed, names=each)
    return parsed


def _own_names(parts: Sequence[str]) -> tuple[str, ...]:
    """The names where each part has a different one, "a = 1, b = 2"; none for x_1 = 1, x_2 = 2, which lists x."""
    found = [NAME.match(part) for part in parts]
    if not all(match and "\\in" not in match[0] for match in found):
        return ()
    names = tuple(match[0].strip("= ").replace(" ", "") for match in found if match)
    stems = {name.partition("_")[0] for name in names}
    return names if len(set(names)) == len(names) and len(stems) > 1 else ()


def _names_off(parts: Sequence[str], always: bool = False) -> list[str]:
    """Without "x =" where every part has the same one (but for a subscript), or the first alone has one."""
    names = [NAME.match(part) for part in parts]
    heads = [re.sub(r"[ =]|_(?:\w|\{[^{}]*\})", "", name[0]) if name else None for name in names]
    first = names[0] if names else None
    if first and (always or all(head == heads[0] for head in heads) or not any(heads[1:])):
        return [part[name.end() :] if name else part for part, name in zip(parts, names, strict=True)]
    return list(parts)


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


def sides(text: str) -> list[str]:
    """What stands between the equality signs outside all brackets."""
    return split_top(text.replace("==", "="), "=")
