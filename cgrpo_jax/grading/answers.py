"""Finds the final answer in a response. Plain string work, linear in the text; nothing is evaluated."""

from __future__ import annotations

import re

MAX_ANSWER = 2_000  # characters; a longer "answer" is none
_CUE = re.compile(
    r"(?:final answer is|answer (?:is|was|equals|would be|should be|must be|will be|comes to)|answer(?= ?[:=]))"
    r"(?: ?(?:therefore|thus|simply|just|exactly|approximately|about|roughly|around|equal to|\\approx))*"
    r"[\s:*=]*",
    re.IGNORECASE,
)
_MARKED = re.compile(r"(?:^|\n)#### ?([-+$\d][^\n]{0,200})\s*$")  # the last line, as in GSM8K
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# What stands between boxes that are one answer, and the name of a value in front of its box.
_BETWEEN = re.compile(r"(?:[\s$,;.&]|\\[()\[\],;: ]|\\q?quad|\b(?:and|or)\b|\\text ?\{ ?(?:and|or|,)? ?\})*")
_JOINS = re.compile(r"[,;&]|\b(?:and|or)\b|\\q?quad")
_NAME = re.compile(r"[^\w\\]*(\\?[A-Za-z]{1,8}(?:_(?:\w|\{\w{1,3}\}))?(?:\([a-z]\))?) ?= ?$")
_PLACEHOLDERS = ("", "...", "\\ldots", "\\dots", "…", "\\cdots", "answer", "your answer", "final answer", "?")
_PROSE_AFTER = re.compile(
    r",? (?:which|since|because|where|so|as|therefore|thus|hence|that is|i\.e\.)\b"
    r"|,? (?:not|rather than|instead of) (?=\S+$)|, (?!and\b|or\b)(?=[a-z]{2,} [a-z]{2,})"
)
CHATTER = re.compile(
    r"(?:helpful|correct|clear|right|wrong|useful|above|below|boxed|shown|given|in|as|not|found|based|what|that|reasonable|"
    r"consistent|ok|okay|fine|good|great|hidden|obvious|within|at|on|here|there|needed|required|unclear|understandable|"
    r"satisfactory|easy|ready|provided|written|expressed|placed|supposed|expected|your|you|ask|me|please|if|yours)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\banswer (?:is|was|can|could|must)(?:n't|not| not) "
    r"(?!only\b|just\b|[^.\n]{0,80}\bbut (?:rather )?[-$\d])[^.\n]{0,200}[.\n\s]*$"
    r"|(?:is|are|was)(?:n't| not) (?:the|my) (?:final )?answer\W*$",
    re.IGNORECASE,
)
_COUNTED = re.compile(r"([-−]?\\?\$? ?\d[\d,]*(?:\.\d+)?(?:/\d+)?)((?: [a-z]{2,20}){2,12})")
_FORMULA = re.compile(r"\$([^$]{1,400})\$ ((?:[a-z]{2,20} ){1,20}[a-z]{2,20})")  # $x^2$ by the power rule
_HEDGES = frozenset(
    re.findall(
        r"\w+",
        "or if to and than minus plus times mod million billion thousand hundred trillion dozen half percent not more "
        "less over divided squared cubed factorial pi degrees least most but either maybe root",
    )
)


def closing(text: str, start: int = 0, brackets: tuple[str, str] = ("{", "}")) -> int | None:
    """The position at which the bracket that opens at `start` is closed.

    Args:
      brackets: the characters that open and those that close; different ones are not told apart.
    """
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in brackets[0]) - (text[position] in brackets[1])
        if depth == 0:
            return position
    return None


def boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` (or `\\boxed x`); None where there is none or its braces never close."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].strip().split("\n")[0] or None
    end = closing(rest)
    return rest[1:end].strip() if end else None


def _closed(text: str, start: int) -> tuple[str, int] | None:
    """Content and end of the box whose command ends at `start`, or what follows the command where that is no prose.

    None where its braces never close.
    """
    opening = len(text) - len(text[start:].lstrip())
    if text.startswith("{", opening):
        end = closing(text, opening)
        return (text[opening + 1 : end].strip(), end + 1) if end else None
    content = text[opening : opening + MAX_ANSWER].split("$")[0].strip().split("\n")[0]
    prose = re.match(r"[.,;:'\"`*)\]}]", content) or re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}[.!]?(?: |$)", content)
    return ("" if prose else content), start


def _boxes(text: str) -> list[tuple[str, int, int]] | None:
    """(content, start, end) of the boxes that hold something, last first; None where the last one never closes.

    Looked at are the last 64: a box nobody can mean, as in "put it within \\boxed{}", is passed over.
    """
    found: list[tuple[str, int, int]] = []
    end = len(text)
    for tried in range(64):
        start = text.rfind("\\boxed", 0, end)
        if start < 0:
            break
        box = _closed(text[:end] if tried else text, start + len("\\boxed"))
        if box is None:
            if not tried:
                return None
            break
        content = box[0].strip()
        if content.strip("'\"` ").casefold() not in _PLACEHOLDERS:
            found.append((content, start, box[1]))
        elif found and len(found) > 1:
            break
        end = start
    return found


def last_boxes(text: str) -> str | None:
    """The last box; with those in front of it that are part of one answer, `\\boxed{1}` and `\\boxed{-2}`."""
    boxes = _boxes(text)
    if not boxes:
        return None
    run = boxes[:1]
    for content, start, end in boxes[1:]:
        between = text[end : run[-1][1]]
        name = _NAME.search(between[-40:])
        gap = between[: len(between) - len(between[-40:]) + name.start(1)] if name else between
        if len(between) > 200 or not _BETWEEN.fullmatch(gap) or not _JOINS.search(gap):
            break
        run.append((content, start, end))
    run.reverse()
    contents = [content for content, _, _ in run]
    if len(set(contents)) == 1:
        cue = _CUE.search(contents[0][:80])  # \\boxed{The answer is 12}
        return contents[0][cue.end() :] if cue and cue.start() <= len("the final ") else contents[0]
    names = [_NAME.search(text[max(0, start - 40) : start]) for _, start, _ in run]
    if all(names) and not any("=" in content for content in contents):
        contents = [f"{name[1]} = {content}" for name, content in zip(names, contents, strict=True) if name]
    return ", ".join(contents)


def _sentence(text: str) -> str:
    """What is said: one sentence on one line, without the prose that follows the answer."""
    sentence = re.split(r"\.\s|\n", text[:MAX_ANSWER], maxsplit=1)[0]
    sentence = _PROSE_AFTER.split(sentence, maxsplit=1)[0]
    sentence = sentence.strip().rstrip(".!")
    formula = _FORMULA.fullmatch(sentence)
    if formula and _HEDGES.isdisjoint(formula[2].split()):
        return formula[1].strip()
    sentence = sentence.strip("$* \"'`")
    counted = _COUNTED.fullmatch(sentence)
    if counted and _HEDGES.isdisjoint(counted[2].split()):
        return f"{counted[1]} {counted[2].split()[0]}"
    return sentence


def _spoken(text: str) -> str | None:
    """What follows the last "answer is" that is followed by an answer, not by small talk."""
    said = [_sentence(text[match.end() : match.end() + MAX_ANSWER + 1]) for match in _last(_CUE, text)]
    answers = [sentence for sentence in said if sentence and not CHATTER.match(sentence)]
    likely = [sentence for sentence in answers if re.search(r"[\d\\^=+<>]", sentence) or len(sentence.split()) <= 3]
    return next(iter(likely or answers), None)


def _last(pattern: re.Pattern, text: str) -> list[re.Match]:
    """The last few matches, last first."""
    return list(pattern.finditer(text))[:-9:-1]


def _said_after(text: str) -> str | None:
    """The answer of a text that may have boxes, else what it says is the answer."""
    if "\\boxed" in text:
        if _boxes(text) is None:
            return None
        answer = last_boxes(text)
        if answer:
            return answer
    marked = _MARKED.search(text[-MAX_ANSWER:])
    if marked:
        return marked[1].strip()
    tagged = text.rpartition("<answer>")[2] if "<answer>" in text else ""
    return _spoken(text) or tagged.partition("</answer>")[0].strip() or None


def extract_answer(text: str) -> str | None:
    """Minerva's phrase, else the last boxed answer; without any, what follows the last "answer is", else a last number.

    The order is that of the release (Qwen2.5-Math). A box that never closes is no answer: the response was cut. What
    is said after the thoughts goes before what is boxed in them.
    """
    _, phrase, rest = text.partition("final answer is $")
    if phrase and "$. I hope" in rest:
        answer = rest.split("$. I hope")[0].strip() or None
        return answer if answer and len(answer) <= MAX_ANSWER else None
    thoughts, thought, after = text.rpartition("</think>")
    cut = "\\boxed" in after and _boxes(after) is None
    answer = _said_after(after)
    numbers = _NUMBER.findall(after[-MAX_ANSWER:])
    if answer is None and not cut and thought:
        only = numbers[0] if len(numbers) == 1 and len(after) <= 200 else None
        answer = only or _said_after(thoughts)
    if answer is None and not cut and "\\boxed" not in text and not _DENIED.search(after[-MAX_ANSWER:]):
        answer = numbers[-1].rstrip(",") if numbers else None
    return answer if answer and len(answer) <= MAX_ANSWER else None
