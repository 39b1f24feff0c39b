"""The reward of the paper's release (`data.grader=math_verify`): Qwen2.5-Math's extraction, then plain math-verify.

For comparing with published numbers. What it accepts wrongly an optimiser finds; `math`, the default, is stricter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cgrpo_jax.grading.answers import MAX_ANSWER
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.records import Problem, Verdict

_NUMBER = re.compile(r"-?\d*\.?\d+")
_ENDS = re.compile(r"</s>|<\|im_end\|>|<\|endoftext\|>")
_CUES = ("he answer is", "final answer is", "答案是")
_DROPPED = ("\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$", "\\%", "%", "\\(", "\\)")
_UNIT = re.compile(r"\\text\{[^{}]*\}$")
_NAME = re.compile(r"^[A-Za-z] ?= ?")


def _boxed(text: str) -> str:
    """After the last "boxed": up to the closing brace, or to the end where there is none."""
    rest = text.rpartition("boxed")[2]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position]
    return rest[1:]


def extract(text: str) -> str | None:
    """The answer as Qwen2.5-Math's `extract_answer` finds it; its lists of units are not repeated here."""
    text = _ENDS.split(text.rpartition("<|im_start|>assistant")[2], maxsplit=1)[0].strip()
    if "final answer is $" in text and "$. I hope" in text:
        answer = text.partition("final answer is $")[2].partition("$. I hope")[0]
    elif "boxed" in text:
        answer = _boxed(text)
    else:
        cue = next((cue for cue in _CUES if cue in text), None)
        numbers = _NUMBER.findall(text.replace(",", "")) if cue is None else []
        answer = text.rpartition(cue)[2] if cue else numbers[-1] if numbers else ""
    answer = answer.strip().split("\n")[0].removeprefix(":").removesuffix(".").removesuffix("/").strip()
    for dropped in _DROPPED:
        answer = answer.replace(dropped, "")
    unitless = _UNIT.sub("", answer).strip()
    answer = _NAME.sub("", unitless or answer).strip()
    return answer if answer and len(answer) <= MAX_ANSWER else None


def grade(pairs: Sequence[tuple[Problem, str]], verifier: Verifier) -> list[Verdict]:
    """Whether plain math-verify holds gold and answer equal."""
    return verifier.compare([(problem.answer, answer) for problem, answer in pairs], how="plain")
