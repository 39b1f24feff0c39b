"""Multiple choice with 2 to 26 options: which option does an answer name?

A problem's `entry` holds {"options": [...]} in the order shown; its answer is the letter of the right one.
"""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Sequence

from cgrpo_jax.grading.answers import CHATTER, MAX_ANSWER, last_boxes
from cgrpo_jax.grading.normalise import clean

LETTERS = string.ascii_uppercase
MOST = 16  # statements that are looked at, from the last one on
_WRAP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm) ?\{([^{}]*)\}")
_MARKS = re.compile(r"\*\*|__|`|\\[()\[\]]|\$")
_LETTER = re.compile(r"(?:(?:option|choice|answer|letter)(?: is)?:? )?[(\[]?([A-Za-z])[)\]]?[.:]?", re.IGNORECASE)
_LEADING = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter) )?"
    r"(?:\(([A-Z])\)[.:,]?|\[([A-Z])\][.:,]?|([A-Z])(?:[.):,;]| [-–—:=](?= )| (?=\()))\s*(?=\S)"
)
_HEDGE = (
    r"(?:[ ,*_]*(?:therefore|thus|then|hence|clearly|simply|just|probably|likely|most likely|definitely|indeed|"
    r"obviously|actually|in fact|of course)\b)*"
)
_IS = r"(?:is|was|are|would be|will be|must be|should be|has to be|seems to be|appears to be|comes out as|becomes)\b"
# "answer is", "**Answer**:", "Answer - ", "Final Answer" above a line of its own
_CUE = re.compile(
    rf"\b(?:answer|choice|option)\b(?:\s+(?:choice|option|letter))?[*_ ]*{_HEDGE}"
    rf"(?:\s+{_IS}{_HEDGE}[:\s*_]*|\s*(?::|=>|->|→|⇒|=|[-–—](?=\s*[(\[*]*(?-i:[A-Z])\b))[\s*_]*"
    r"|[ \t]*\n\s*(?=[(\[*]*(?-i:[A-Z])\b))"
    r"|答案(?:是|为|：|:)?\s*"
    r"|<answer>\s*",
    re.IGNORECASE,
)
_TOKEN = r"(?:\([A-Za-z]\)|\[[A-Z]\]|(?-i:[A-Z])(?![\w'’-]))"
# A letter is named by what is done: "I would choose option B", "So, (C).", "it must be D", "Answer B"
_DONE = re.compile(
    rf"\b(?:(?:I(?: would| will|'d|'ll|’d|’ll| am|'m|’m)?|we(?: would| will)?|let's|let us|my)\s+)?"
    rf"(?:choose|chose|choosing|pick|picking|select|selecting|go(?:ing)? (?:for|with)|opt(?:ing)? for|settle on|"
    rf"(?:selection|pick|guess|response|solution|conclusion|correct|right|best)\s*[:=])\s*(?:with )?(?:the )?"
    rf"(?=(?:(?:option|choice|answer|letter) )?{_TOKEN})"
    rf"|\bit(?: is|['’]s| must be| has to be| should be) +{_HEDGE}(?:option )?(?={_TOKEN}(?! [a-z]|['’]))"
    rf"|^[ \t]*(?:so|thus|therefore|hence|then|finally|in conclusion|overall|consequently)\b[,:]?(?: the)?"
    rf"(?: (?:correct |right |best )?(?:answer|option|choice))?\s+(?=(?:option )?{_TOKEN}[ .!]*$)"
    rf"|\b(?:answer|choice|option)\s+(?={_TOKEN}\s*[.!]?\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
_SAYS = r"(?:is|must be|should be|would be|has to be|seems|appears to be) (?:therefore |thus |clearly |indeed )?"
# "Option B is correct", "(B) is the right one"; of a bare letter only where it says of what
_RIGHT = re.compile(
    rf"\b(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer) (?:\(([A-Za-z])\)|([A-Z]))|\(([A-Z])\)) {_SAYS}"
    r"(?:the )?(?:correct|right|best|true|answer|most)\b"
    rf"|(?<![\w(.-])([A-Z]) {_SAYS}(?:(?:the|my|our) (?:final )?(?:(?:only )?(?:correct|right|best) )?"
    r"(?:answer|option|choice|one)\b|(?:correct|right)(?=[.!,]|$))"
    rf"|\(([A-Z])\) {_SAYS}(?:correct|right|true|the)\b",
    re.MULTILINE,
)
_SAID_RIGHT = re.compile(
    r"(?:(?:option|choice|answer) )?(\([A-Z]\)|[A-Z])[.,]? (?:is|must be|should be) (?:therefore |thus )?(?:the )?"
    r"(?:correct|right|best|true|answer)(?: (?:answer|option|choice|one))?",
    re.IGNORECASE,
)
_NOT = re.compile(r"[,;]? ?(?:and |but )?(?:not|rather than|instead of) (?:option |choice )?\(?[A-Z]\)?")
_NOT_BUT = re.compile(r"(?:it is )?not (?:option )?\(?[A-Z]\)?,? but (?:rather )?(.+)", re.IGNORECASE)
_SPOKEN = re.compile(
    r"(?:(?:option|choice|answer|letter)\s+)?(?:\(([A-Za-z])\)|\[([A-Z])\]|([A-Z])(?![\w'’-]))", re.IGNORECASE
)
_REASON = re.compile(
    r"[,;:.]?\s*[-–—(]?\s*(?:because|since|as|due to|given|while|whereas|based on|so|which|where|"
    r"for (?:the|this|it|we))\b",
    re.IGNORECASE,
)
_DENIED = re.compile(r"(?:is|are|was|can|could) ?(?:not|n't|n’t|wrong|incorrect|false|too)\b|cannot\b", re.IGNORECASE)
_MORE = re.compile(r"\s*(?:,|&|/|\+|,?\s*(?:and|or)\b)\s*(?:also )?(?:option |choice )?[(\[]?[A-Z][)\]]?(?![\w'’])")


def extract_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The last boxed answer, else what the last statement names, else a last or first line that is a letter.

    A single line that starts with a letter, "(C) ..." or "C. ...", is an answer, too. What is said after the thoughts
    goes before what is said in them.

    Args:
      options: those shown; a statement that names none of them is passed over for one that does.
    """
    thoughts, _, after = text.rpartition("</think>")
    return _found(after, options) or (_found(thoughts, options) if thoughts else None)


def _found(text: str, options: Sequence[str]) -> str | None:
    if "\\boxed" in text:
        answer = last_boxes(text)
        return answer if answer and len(answer) <= MAX_ANSWER else None
    text = _MARKS.sub("", _WRAP.sub(r"\1", text))
    said = _statements(text)
    for answer in said:
        if chosen(answer, options or [""] * len(LETTERS)) or _undecided(answer):
            return answer
    return _line(text, options) or next(iter(said), None)


def _statements(text: str) -> list[str]:
    """What each statement of the text names as the answer, the last statement first."""
    cues = [match.end() for match in _last(_CUE, text)]
    starts = [start for start in cues if not CHATTER.match(text, start) or text.startswith("not ", start)]
    starts += [match.end() for match in _last(_DONE, text)]
    found = [(start, _spoken(text[start : start + MAX_ANSWER])) for start in starts]
    found += [(match.end(), next(filter(None, match.groups()))) for match in _last(_RIGHT, text)]
    return [answer for _, answer in sorted(found, key=operator.itemgetter(0), reverse=True) if answer]


def _last(pattern: re.Pattern, text: str) -> list[re.Match]:
    """The last matches, in their order."""
    return list(pattern.finditer(text))[-MOST:]


def _undecided(answer: str) -> bool:
    """Whether letters are named, and not one: "A and C", "not A"."""
    spoken = _SPOKEN.match(answer)
    return answer.casefold().startswith(("not ", "either ", "neither ", "both ")) or bool(
        spoken and _MORE.match(answer, spoken.end())
    )


def _spoken(text: str) -> str | None:
    """The letter that a line starts with, or the line where more than a letter is said."""
    rest = text.strip().split("\n")[0].partition("</answer>")[0].strip().strip("*_, ")
    spoken = _SPOKEN.match(rest)
    if not spoken or (rest[spoken.start() : spoken.end()].islower() and not spoken[1]):
        return rest.rstrip(".") or None
    letter, after = (spoken[1] or spoken[2] or spoken[3]).upper(), rest[spoken.end() :]
    if (
        not after.strip(" .!*_")
        or _REASON.match(after)
        or re.match(r"[.!]\s+[A-Z][a-z]|\s*\(?(?:not|rather than|instead of)\b", after)
    ):
        return letter
    return rest.rstrip(".")


def _line(text: str, options: Sequence[str]) -> str | None:
    """The last line, else the first, that is a letter; with or by the text of an option where no other line is one."""
    lines = [stripped for line in text[-MAX_ANSWER:].splitlines() if (stripped := line.strip().strip("*_# "))]
    if not lines:
        return None
    first = next((stripped for line in text[:MAX_ANSWER].splitlines() if (stripped := line.strip().strip("*_# "))), "")
    for line in (lines[-1], first):
        if _LETTER.fullmatch(_settled(line)) and (line is lines[-1] or not _list_of_letters(text)):
            return line
        if _by_text(line, options) and sum(_by_text(other, options) for other in {first, *lines[-64:]}) == 1:
            return line
    return lines[0] if len(lines) == 1 and _LEADING.match(lines[0]) else None


def _list_of_letters(text: str) -> bool:
    """Whether more lines than one are letters."""
    return sum(bool(_LETTER.fullmatch(line.strip("*_# "))) for line in text[:MAX_ANSWER].splitlines()) > 1


def _by_text(line: str, options: Sequence[str]) -> bool:
    """Whether a line is the text of an option, perhaps behind its letter."""
    if not options:
        return False
    leading = _LEADING.match(line)
    named = chosen(line[leading.end() :] if leading else line, options)
    return named is not None and (not leading or named == chosen(line, options))


def _settled(text: str) -> str:
    """What is left of "C, not A", "not B but D" and "option C is correct": the letter that is meant."""
    but = _NOT_BUT.fullmatch(text)
    text = but[1] if but else text
    rest = re.match(r"(?:it is |option |choice )?\(?[A-Z]\)?", text)
    if rest and _NOT.fullmatch(text[rest.end() :]):
        text = rest[0].removeprefix("it is ")
    right = _SAID_RIGHT.fullmatch(text)
    return right[1] if right else text


def _plain(text: str) -> str:
    """The text without \\text and its like, bold marks, dollar signs and outer full stops."""
    text = _WRAP.sub(r"\1", text.replace("**", ""))
    return " ".join(text.replace("$", " ").split()).strip(" .")


def _comparable(text: str) -> str:
    """A form in which two spellings of one option's text are the same string."""
    return clean(_plain(text)).replace(" ", "").casefold()


def chosen(answer: str, options: Sequence[str]) -> str | None:
    """The letter an answer names: by itself, in front of its option's text, or by the text of exactly one option.

    A letter in front of the text of a different option names none.
    """
    text = _plain(answer)
    texts = [_comparable(option) for option in options]
    verbatim = [i for i, option in enumerate(options) if option.strip() == answer.strip()]  # "Bb" is not "BB"
    whole = verbatim or [i for i, option in enumerate(texts) if option and option == _comparable(text)]
    text = text if whole else _settled(text)
    letter = _LETTER.fullmatch(text)
    if letter:
        named = LETTERS.index(letter[1].upper())
        if len(whole) == 1 and (named >= len(options) or (len(text) == 1 and text.islower())):
            return LETTERS[whole[0]]  # an option that is a letter itself
        return LETTERS[named] if named < len(options) else None
    if len(whole) == 1:
        return LETTERS[whole[0]]
    leading = _LEADING.match(text)
    if not leading or whole:
        return None
    named = LETTERS.index(leading[1] or leading[2] or leading[3])
    after = text[leading.end() :]
    spelt = {_comparable(after), _comparable(after.removeprefix("(").removesuffix(")"))}
    others = [i for i, option in enumerate(texts) if option and option in spelt]
    if named >= len(options) or (others and named not in others):
        return None
    return LETTERS[named] if others or not (_several(after) or _DENIED.match(after)) else None


def _several(rest: str) -> bool:
    """Whether more letters follow: "(A) and (B)" chooses none."""
    return bool(re.search(r"(?:^|\W)(?:\([A-Z]\)|[A-Z][.)](?:\s|$)|(?:and|or) \(?[A-Z]\)?$)|^[(\[]?[A-Z][)\]]?$", rest))
