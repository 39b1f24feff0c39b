"""Multiple choice with 2 to 26 options: which option does an answer name?

A problem's `entry` holds {"options": [...]} in the order shown; its answer is the letter of the right one.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from cgrpo_jax.grading.answers import CHATTER, MAX_ANSWER, last_boxes
from cgrpo_jax.grading.normalise import clean
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.records import Problem, Verdict

LETTERS = string.ascii_uppercase
_WRAP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm) ?\{([^{}]*)\}")
_LETTER = re.compile(r"(?:(?:option|choice|answer)(?: is)?:? )?[(\[]?([A-Za-z])[)\]]?[.:]?", re.IGNORECASE)
_LEADING = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(?=\S)")
_CUE = re.compile(r"(?:answer|choice|option)(?:\s+(?:is|must be|should be)|\s*:)[\s:*$]*", re.IGNORECASE)
_IT = re.compile(r"\b[Ii]t(?: is|'s| must be)\s+(?=\**(?:[Oo]ption )?(?:\([A-Z]\)|[A-Z]\b))(?!A [a-z]|I )")
_RIGHT = re.compile(
    r"\b(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer) \**(?:\(([A-Za-z])\)|([A-Z]))|\(([A-Z])\))\** (?:is|must be|should be) "
    r"(?:therefore |thus )?(?:the )?(?:correct|right|best|true|answer)\b"
)
_SAID_RIGHT = re.compile(
    r"(?:(?:option|choice|answer) )?(\([A-Z]\)|[A-Z])[.,]? (?:is|must be|should be) (?:therefore |thus )?(?:the )?"
    r"(?:correct|right|best|true|answer)(?: (?:answer|option|choice|one))?",
    re.IGNORECASE,
)
_NOT = re.compile(r"[,;]? ?(?:and |but )?(?:not|rather than|instead of) (?:option |choice )?\(?[A-Z]\)?")
_NOT_BUT = re.compile(r"(?:it is )?not (?:option )?\(?[A-Z]\)?,? but (?:rather )?(.+)", re.IGNORECASE)
_SPOKEN = re.compile(r"(?:(?:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Z])(?![\w'-]))")


def extract_choice(text: str) -> str | None:
    """The last boxed answer, else what follows the last "answer is"/"Answer:", else a last line that is a letter.

    A single line that starts with a letter, "(C) ..." or "C. ...", is an answer, too. What is said after the thoughts
    goes before what is said in them.
    """
    thoughts, _, after = text.rpartition("</think>")
    return _found(after) or (_found(thoughts) if thoughts else None)


def _found(text: str) -> str | None:
    if "\\boxed" in text:
        answer = last_boxes(text)
        return answer if answer and len(answer) <= MAX_ANSWER else None
    right = list(_RIGHT.finditer(text))
    cues = sorted([*_CUE.finditer(text), *_IT.finditer(text)], key=re.Match.start)
    while cues and CHATTER.match(text, cues[-1].end()) and not text.startswith("not ", cues[-1].end()):
        cues.pop()  # "I hope this answer is helpful"
    if right and (not cues or right[-1].start() >= cues[-1].start()):
        return right[-1][1] or right[-1][2] or right[-1][3]
    if cues:
        return _spoken(text[cues[-1].end() : cues[-1].end() + MAX_ANSWER])
    tail = text[-MAX_ANSWER:]
    lines = [line for line in tail.splitlines() if line.strip()]
    last = lines[-1].strip().strip("*$ ") if lines else ""
    names = _LETTER.fullmatch(_settled(last)) or (len(lines) == 1 and _LEADING.match(last))
    return last if names else None


def _spoken(text: str) -> str | None:
    """The letter that a line starts with, or the line where more than a letter is said."""
    rest = text.split("\n")[0].strip().strip("*$ ")
    spoken = _SPOKEN.match(rest)
    if spoken and (spoken[1] or rest[spoken.end() :][:1] in ("", ".", ",", ":", ")", " ", ";")):
        article = spoken[2] in ("A", "I") and re.match(r" [a-z]", rest[spoken.end() :])
        return rest if article or rest[spoken.end() :].strip(" .") else spoken[1] or spoken[2]
    return rest.rstrip(".") or None


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
    """Without wrapping commands, bold, dollars and outer full stops."""
    text = _WRAP.sub(r"\1", text.replace("**", ""))
    return " ".join(text.replace("$", " ").split()).strip(" .")


def _comparable(text: str) -> str:
    """What is equal for texts of the same option."""
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
    named = LETTERS.index(leading[1] or leading[2])
    rest = _comparable(text[leading.end() :])
    others = [i for i, option in enumerate(texts) if option and option == rest]
    if named >= len(options) or (others and named not in others):
        return None
    return LETTERS[named] if others or not _several(text[leading.end() :]) else None


def _several(rest: str) -> bool:
    """Whether more letters follow: "(A) and (B)" chooses none."""
    return bool(re.search(r"(?:^|\W)(?:\([A-Z]\)|[A-Z][.)](?:\s|$)|(?:and|or) \(?[A-Z]\)?$)", rest))


def grade(pairs: Sequence[tuple[Problem, str]], verifier: Verifier) -> list[Verdict]:
    """The answer names the option whose letter is the gold."""
    verdicts = []
    for problem, answer in pairs:
        assert problem.entry is not None
        verdicts.append(Verdict.of(chosen(answer, problem.entry["options"]) == problem.answer))
    return verdicts
