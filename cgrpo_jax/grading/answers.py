"""Finds the final answer in a response. Plain string work, linear in the text; nothing is evaluated."""

from __future__ import annotations

import re

MAX_ANSWER = 2_000  # characters; a longer "answer" is none
_SPOKEN = re.compile(r"(?:final answer is|answer is|answer(?=:))[\s:*]*", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` (or `\\boxed x`); None where there is none or its braces never close."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].strip().split("\n")[0] or None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip()
    return None


def extract_answer(text: str) -> str | None:
    """Minerva's phrase, else the last boxed answer; without any, what follows the last "answer is", else a last number.

    The order is that of the release (Qwen2.5-Math). A box that never closes is no answer: the response was cut. What is
    said is one sentence on one line.
    """
    _, phrase, rest = text.partition("final answer is $")
    if phrase and "$. I hope" in rest:
        answer = rest.split("$. I hope")[0].strip() or None
    elif "\\boxed" in text:
        answer = boxed(text)
    else:
        tail = text[-MAX_ANSWER:]
        spoken = list(_SPOKEN.finditer(tail))
        numbers = _NUMBER.findall(tail)
        if spoken:
            sentence = re.split(r"\.\s|\n", tail[spoken[-1].end() :], maxsplit=1)[0]
            answer = sentence.strip().rstrip(".").strip("$* ") or None
        else:
            answer = numbers[-1].rstrip(",") if numbers else None
    return answer if answer and len(answer) <= MAX_ANSWER else None
