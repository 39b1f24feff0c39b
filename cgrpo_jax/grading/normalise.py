"""Plain string work on mathematical answers: spelling, units, plain numbers, lists. Linear in the text; no evaluation.

Written against what math-verify 0.9 reads wrongly (table in configs/README.md), not to read more than it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from cgrpo_jax.grading.spelling import as_latex

_SYMBOLS = {
    "−": "-", "–": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\ne ", "∪": "\\cup ", "°": "^\\circ ", "€": "\\text{euro}", "£": "\\text{pound}",
    "≈": "\\approx ", "±": "\\pm ", "∈": "\\in ", "\u00a0": " ", "，": ", ", "\\$": "\\text{dollar}", "$": " ",
    "{,}": ",", "\\(": " ", "\\)": " ", "\\[": " ", "\\]": " ", "\\%": "%", "\\lbrace": "\\{",
    "\\rbrace": "\\}", "\\langle": "(", "\\rangle": ")",
}  # fmt: skip
_SYMBOL = re.compile("|".join(re.escape(key) for key in sorted(_SYMBOLS, key=len, reverse=True)))
_COMMANDS = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "leq": "\\le", "geq": "\\ge", "leqslant": "\\le",
    "geqslant": "\\ge", "neq": "\\ne", "mbox": "\\text", "textbf": "\\text", "textrm": "\\text", "textit": "\\text",
    "textnormal": "\\text", "mathrm": "\\text", "mathbf": "\\text", "operatorname": "\\operatorname",
    "degree": "^\\circ", "degrees": "^\\circ", "left": "", "right": "", "big": "", "Big": "", "bigl": "", "bigr": "",
    "Bigl": "", "Bigr": "", "displaystyle": "", "quad": " ", "qquad": " ", "infin": "\\infty", "euro": "\\text{euro}",
    "pounds": "\\text{pound}", "cents": "\\text{cent}", "percent": "%",
    "varnothing": "\\emptyset", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "dots": "\\ldots",
    "R": "\\mathbb{R}", "lt": "<", "gt": ">", "backslash": "\\setminus",
}  # fmt: skip
_COMMAND = re.compile(r"\\(?:\\|!\s*|[,;: ]|[A-Za-z]+)")
_DEGREES = re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ)")
_JOINED = re.compile(
    r"(?:, ?)?\\text ?\{ ?(and|or|,) ?\}|\\text ?\{[^{}]*\}"
    r"|(?<![A-Za-z\\])(?:, ?)?(?:(and|or)(?![A-Za-z])|(?<=[\d)}])(and|or)(?=[A-Za-z]\b))|;"
)
_COMPARISON = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
COUNTS = {word: value for value, word in enumerate(re.findall(r"\w+", _ONES))}
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
COUNTS |= {word: 10 * value for value, word in enumerate(_TENS, 2)}
SHARES = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "tenth": 10}

# Unit words -> one name each, so that spellings agree and different units do not.
_UNIT_WORDS = {
    "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "m": "m meter metre",
    "km": "km kilometer kilometre", "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "g": "g gram", "kg": "kg kilogram", "mg": "mg milligram", "lb": "lb lbs", "oz": "oz ounce",
    "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month",
    "year": "yr year", "degree": "degree deg", "radian": "rad radian", "dollar": "dollar usd buck", "cent": "cent",
    "euro": "euro", "pound": "pound", "percent": "percent per~cent percentage~point",
    "unit": "unit", "l": "liter litre", "ml": "ml milliliter",
    "mph": "mph mile~per~hour miles~per~hour", "K": "kelvin", "N": "newton", "J": "joule", "W": "watt", "V": "volt",
    "Hz": "hz hertz",
    "person": "person people", "student": "student", "way": "way", "square unit": "square~unit",
    "m/s": "m/s meters~per~second",
    "km/h": "km/h kmh kmph kilometers~per~hour", "celsius": "celsius", "fahrenheit": "fahrenheit",
    "cup": "cup", "ton": "ton tonne",
    "gallon": "gallon gal", "am": "am a.m. a.m", "pm": "pm p.m. p.m", "yuan": "yuan", "rupee": "rupee", "yen": "yen",
}  # fmt: skip
_UNITS = {
    word.replace("~", " "): name for name, words in _UNIT_WORDS.items() for word in words.split()
}  # fmt: skip
_UNITS |= {word + "s": name for word, name in list(_UNITS.items()) if len(word) > 2 and not word.endswith("s")}
_BARE = sorted((word for word in _UNITS if len(word) > 1), key=len, reverse=True)  # "5 m" is 5 times m
_BARE_UNIT = re.compile(
    rf"(?<=[\d}}) ]) ?(square|cubic|sq)? ?({'|'.join(map(re.escape, _BARE))})\.?(?: ?\^ ?\{{?([23])\}}?)?$", re.I
)
_BRACKETED = re.compile(r"(?<=[\d ])\( ?([a-z]{2,20}) ?\)$")
_TEXT_UNIT = re.compile(r"\\text ?\{([^{}]{0,60})\}(?: ?\^ ?\{? ?(-?\d) ?\}?)?$")
_LETTER_UNIT = re.compile(r"(?<=[\d}) ])()(m|g|s|h|l|L|K|N|J|W|V|A)(?: ?\^ ?\{?([23])\}?)?$")
_OTHER_UNIT = re.compile(r"(?<=[\d}]) ((?=[a-z]*[aeiou])[a-z]{3,20}(?: [a-z]{2,20}){0,3})$")
NO_UNITS = frozenset((*SCALES, *COUNTS, *SHARES)) | frozenset(
    re.findall(
        r"\w+",
        "if or and not nor when unless maybe perhaps otherwise than more less most least about mod modulo times plus "
        "minus over where with for else but either both except only any all to from into of is are does",
    )
)
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_ANY_COMMAND = re.compile(r"\\(?:operatorname ?\{[^{}]*\}|(?:begin|end) ?\{[^{}]*\}(?:\{[lcr| ]*\})?|[A-Za-z]+)")
_GREEK = re.compile(
    r"\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|psi|chi|omega)"
    r"(?![a-z])"
)
_WORDS = re.compile(r"[^\W\d_][^\W\d_]*(?:[ '-]{1,2}[^\W\d_]+)*")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_PART = rf"[-+]? ?(?:{_DECIMAL})"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?:(?P<whole>\d+)(?: ?\\frac ?(?:\{(?P<wa>\d+)\}|(?P<wb>\d)) ?(?:\{(?P<wc>\d+)\}|(?P<wd>\d))"
    r"| (?P<we>\d+)/(?P<wf>\d+))"
    rf"|\\frac ?(?:\{{ ?(?P<fa>{_PART}) ?\}}|(?P<fb>\d)) ?(?:\{{ ?(?P<fc>{_PART}) ?\}}|(?P<fd>\d))"
    rf"|(?P<a>{_DECIMAL}) ?/ ?(?P<b>{_PART})"
    rf"|(?P<m>{_DECIMAL})(?:[eE](?P<e>[-+]?\d{{1,4}})| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?"
    r"(?:\{ ?(?P<t>[-+]?\d{1,4}) ?\}|\(? ?(?P<u>[-+]?\d{1,4}) ?\)?))?"
    r"|10 ?\^ ?(?:\{ ?(?P<p>[-+]?\d{1,4}) ?\}|(?P<q>\d)))"
)
MAX_EXPONENT = 400
_REPEATING = re.compile(
    r"([-+]?) ?(\d{0,30})\.(\d{0,30})(?:\\(?:overline|bar|dot) ?(?:\{ ?(\d{1,30}) ?\}|(\d))|\((\d{1,30})\))"
)
_SCALED = re.compile(rf"(.{{1,80}}?) ?(?:\\text ?\{{ ?)?({'|'.join(SCALES)})(?: ?\}})?")


class Number(NamedTuple):
    """A plain number. `places` are the digits after the point of a plain decimal, None for anything else."""

    value: Fraction
    places: int | None


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def number(text: str) -> Number | None:
    """The value of a plain decimal, fraction, mixed number or power of ten; None for any other text.

    A thousands comma needs groups of three. Exponents beyond +-400 and a zero denominator are no plain number.
    """
    if len(text) > 2_000:
        return None
    match = _NUMBER.fullmatch(text.strip())
    if not match:
        return _repeating(text.strip()) or _scaled(text.strip())
    group = match.groupdict()
    sign = -1 if group["sign"] == "-" else 1
    exponent = next((int(group[key]) for key in "etupq" if group[key]), 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    names = (("wa", "wb", "wc", "wd"), ("fa", "fb", "fc", "fd"), ("we", "we", "wf", "wf"), ("a", "a", "b", "b"))
    parts = [(group[x] or group[y], group[z] or group[w]) for x, y, z, w in names]
    top, bottom = next(((a, b) for a, b in parts if a and b), ("", ""))
    if top:
        if _plain(bottom) == 0:
            return None
        return Number(sign * (int(group["whole"] or 0) + _plain(top) / _plain(bottom)), None)
    mantissa = group["m"] or "1"
    places = None if exponent else len(mantissa.rstrip().partition(".")[2])
    return Number(sign * _plain(mantissa) * Fraction(10) ** exponent, places)


def _repeating(text: str) -> Number | None:
    """0.1\\overline{6}, 0.\\dot{3}, 0.(36)"""
    match = _REPEATING.fullmatch(text)
    if not match:
        return None
    sign, whole, fixed, period = match[1], match[2], match[3], match[4] or match[5] or match[6]
    value = Fraction(int(whole + fixed or "0")) + Fraction(int(period), 10 ** len(period) - 1)
    return Number((-1 if sign == "-" else 1) * value / 10 ** len(fixed), None)


def _scaled(text: str) -> Number | None:
    """5 million"""
    match = _SCALED.fullmatch(text) if len(text) < 120 else None
    base = number(match[1].strip()) if match and match[1][-1:] in "0123456789} " else None
    return Number(base.value * SCALES[match[2]], None) if match and base else None


def number_in_words(text: str) -> Number | None:
    """Six; twenty-one; two hundred; three quarters."""
    parts = text.casefold().replace("-", " ").split()
    total = current = 0
    for position, part in enumerate(parts):
        if part in COUNTS and (current % 10 == 0 if part not in _TENS else current % 100 == 0):
            current += COUNTS[part]
        elif part in SCALES and current:
            total, current = (total, current * 100) if part == "hundred" else (total + current * SCALES[part], 0)
        elif part in ("and", "a") and position in range(1, len(parts) - 1):
            continue
        elif position == len(parts) - 1 and part.removesuffix("s") in SHARES and current and not total:
            return Number(Fraction(current, SHARES[part.removesuffix("s")]), None)
        else:
            return None
    return Number(Fraction(total + current), None) if parts else None


def same_number(gold: Number, answer: Number) -> bool:
    """Equal; or one is a fraction and the other a decimal of six places or more that is its correct rounding."""
    if gold.value == answer.value:
        return True
    for exact, rounded in ((gold, answer), (answer, gold)):
        if exact.places is None and (rounded.places or 0) >= 6:
            return 2 * abs(exact.value - rounded.value) <= Fraction(1, 10 ** (rounded.places or 0))
    return False


def clean(text: str) -> str:
    """One spelling for symbols, spaces, fractions, relations, degrees; no dollar signs, no final full stop."""
    text = as_latex(text.replace("\0", " ").encode("utf-8", "replace").decode())
    text = _SYMBOL.sub(lambda match: _SYMBOLS[match[0]], text)

    def command(match: re.Match) -> str:
        name = match[0][1:]
        if name == "\\":  # the end of a row
            return match[0]
        if not name[0].isalpha():
            return "" if name[0] == "!" else " "
        return _COMMANDS.get(name, match[0])

    text = _COMMAND.sub(command, text)
    if "=" in text or _COMPARISON.search(text):  # x = 1 \\lor x = 2, but not p \\lor q
        text = text.replace("\\lor ", "\\text{or} ").replace("\\land ", "\\text{and} ")
    text = _DEGREES.sub(r"\\text{degree}", " ".join(text.split()))
    text = text if _WORDS.fullmatch(text) else _JOINED.sub(_joiner(text), text)
    return " ".join(text.split()).strip().rstrip(".,").strip()


def _joiner(text: str) -> Callable[[re.Match], str]:
    """What stands for a joining word: a comma, but between comparisons the operation on what they hold."""
    compared = bool(_COMPARISON.search(text))

    def joined(match: re.Match) -> str:
        word = match[1] or match[2] or match[3]
        if not word and match[0] != ";":
            return match[0]  # other words in \\text
        return {"and": " \\cap ", "or": " \\cup "}.get(word, ",") if compared else ","

    return joined


def words(text: str) -> str | None:
    """What a textual answer says, in lower case without its article; None for mathematics.

    Text is what stands in \\text{...} alone, an option letter in brackets, and bare words of four letters or more.
    """
    inner = _TEXT.fullmatch(text)
    bare = (inner[1] if inner else text).strip(" .").casefold()
    letter = _CHOICE.fullmatch(bare)
    if letter and (inner or bare.startswith("(")):
        return letter[1]
    if not _WORDS.fullmatch(bare) or (not inner and len(bare) < 4) or (inner and len(bare) < 2):
        return None
    first, _, rest = bare.partition(" ")
    return rest if first in ("a", "an", "the") and rest else bare


def _unit_name(word: str, power: str | None) -> str | None:
    word = " ".join(word.casefold().split()).strip(".")
    power = power or ""
    for prefix, exponent in (("square ", "2"), ("sq ", "2"), ("cubic ", "3")):
        if word.startswith(prefix) and word.removeprefix(prefix) in _UNITS:
            word, power = word.removeprefix(prefix), exponent
    base, caret, raised = word.partition("^")
    if caret and raised.strip("{}") in ("2", "3"):
        word, power = base.strip(), raised.strip("{}")
    return _UNITS[word] + power if word in _UNITS else None


def split_unit(text: str) -> tuple[str, str | None]:
    """(value, unit): a trailing unit, a percent sign or a leading currency; the unit by its one name, None for none.

    An unknown word in \\text{...} behind a value is a unit under its own name.
    """
    if text.endswith("%"):
        return text[:-1].strip(), "percent"
    for currency in ("dollar", "euro", "pound"):
        head = f"\\text{{{currency}}}"
        for sign in ("", "-"):
            if text.startswith(sign + head) and len(text) > len(sign + head):
                return sign + split_unit(text[len(sign + head) :].strip())[0], currency
    match = _TEXT_UNIT.search(text[-120:])
    start = max(0, len(text) - 120)
    if match and text[: start + match.start()].strip():
        word = " ".join(match[1].casefold().split()).strip(".() ")
        if word and not re.search(r"\d", word.partition("^")[0]) and NO_UNITS.isdisjoint(re.findall(r"[a-z]+", word)):
            value, name = text[: start + match.start()].strip(), _unit_name(word, match[2])
            if name or len(word) > 1 or (word not in "ijk" and number(value)):  # 2\\text{j} may be a vector
                return value, name or word + (match[2] or "")
    text = _BRACKETED.sub(r" \1", text)
    match = _BARE_UNIT.search(text[-60:])
    start = max(0, len(text) - 60)
    if match and not letters(text[: start + match.start()]):
        name = _unit_name(f"{match[1]} {match[2]}" if match[1] else match[2], match[3])
        return text[: start + match.start()].strip(), name
    match = _OTHER_UNIT.search(text[-60:])
    if match and NO_UNITS.isdisjoint(match[1].split()) and len(match[1]) > 3 and number(text[: start + match.start()]):
        return text[: start + match.start()].strip(), _UNITS.get(match[1], match[1])
    return text, None


def split_letter_unit(text: str) -> tuple[str, str | None]:
    """(value, unit) of a plain number before a letter, "10 m": a unit only where something else says so."""
    start = max(0, len(text) - 60)
    match = _LETTER_UNIT.search(text[-60:])
    if match and number(text[: start + match.start()]):
        return text[: start + match.start()].strip(), _unit_name(match[2], match[3])
    return text, None


def letters(text: str) -> set[str]:
    """The variables of an expression; e and i are numbers."""
    plain = _ANY_COMMAND.sub(" ", _TEXT.sub(" ", text))
    return (set(re.findall(r"[A-Za-z]", plain)) | set(_GREEK.findall(text))) - {"e", "i"}


def split_commas(text: str, inside: bool = False) -> list[str]:
    """Parts between commas outside all brackets. Unless inside brackets, a number with thousands commas is one part."""
    if not inside and number(split_unit(text)[0]):
        return [text]
    if ", " in text:
        spaced = split_top(text, ", ")
        if all("," not in part or (number(part) and "{" not in part) for part in spaced):
            return spaced
    return split_top(text, ",")


def split_top(text: str, separator: str) -> list[str]:
    """Parts between separators outside all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        depth += (character in "([{") - (character in ")]}")
        if depth <= 0 and text.startswith(separator, position):
            parts.append(text[start:position].strip())
            position = start = position + len(separator)
            continue
        position += 1
    return [*parts, text[start:].strip()]
