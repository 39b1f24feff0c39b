"""The reward of the paper's release (`data.grader=math_verify`): Qwen2.5-Math's extraction, then plain math-verify.

For comparing with published numbers, so its faults are kept: it accepts `3 = 6` for 6, makes `23` of "2 and 3", and
takes letters that stand alone for units (of t^2 + 3t it makes ^2 + 3t), so that it refuses 73 of the 1,036 distinct
golds of the authors' validation file. `math`, the default, does none of that. What the release gives for inputs of ours
is on file in tests/release.jsonl. Shorter here: of its words for units these are the letters, the LaTeX commands that
they break, and common measures; numbers in words are whole ones. math-verify is the installed version (there: 0.7.0).
"""

from __future__ import annotations

import re

from cgrpo_jax.grading.answers import MAX_ANSWER, closing
from cgrpo_jax.grading.normalise import number_in_words

_NUMBER = re.compile(r"-?\d*\.?\d+")
_ENDS = re.compile(r"</s>|<\|im_end\|>|<\|endoftext\|>")
_UNITS = [
    re.compile(rf"(?<!\w){unit}s?(?!\w)")
    for unit in (
        *"acdghlmost",
        *("ab", "deg", "degree", "lt", "min", "mp", "pm", "per", "prime", "sec", "sq", "square"),
        *("percent", "mile", "mph", "km", "cm", "mm", "kg", "ft", "feet", "inch", "inches", "meter", "metre", "liter"),
        *("litre", "yard", "hr", "hour", "minute", "second", "day", "month", "year", "unit"),
    )
]
_BEFORE_UNITS = (
    (r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}"),
    (r"\\end\{array\}", r"\\end{pmatrix}"),
    ("bmatrix", "pmatrix"),
    (r"\\!|\\left|\\right", ""),  # of \leftarrow, too
    (r"\\([nlg]e)q", r"\\\1"),  # of \geqslant, too
    (r"\\([{}])", r"\1"),
)
_AFTER_UNITS = (
    (r"\^\{\\circ\}|\^\\circ|\\\$|\$|\\\(|\\\)", ""),
    (r"\\text\{(.*?)\}", r"\1"),
    (r"[xyz](?:=|\\in|\\to)", ""),  # of xy=6, too
    (r"\\emptyset", "{}"),
    (r"\(-\\infty,\\infty\)", r"\\mathbb{R}"),
    (r"\\?%", ""),
    (r"([ {])\.", r"\g<1>0."),
    ("infinity", r"\\infty"),
    (r"and|\\mathbf|\\mbox\{.*?\}", ""),
    (r"(\d+)\.0*([^\d])", r"\1\2"),
    (r"(\d+)\.0*$", r"\1"),
    (r"^\.", "0."),
)


def _boxed(text: str) -> str:
    """After the last "boxed": up to the closing brace, or to the end where there is none."""
    rest = text.rpartition("boxed")[2]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    return rest[1 : closing(rest)]


def _found(text: str) -> str:
    """Where the answer is looked for, in this order: Minerva's phrase, a box, a cue, the last number."""
    if "final answer is $" in text and "$. I hope" in text:
        return text.partition("final answer is $")[2].partition("$. I hope")[0].strip()
    if "boxed" in text:
        return _boxed(text)
    for cue in ("he answer is", "final answer is"):
        if cue in text:
            return text.rpartition(cue)[2].strip()
    if "答案是" in text:
        return text.split("答案是")[1].strip().split("\n\n")[0].strip()
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


def _without_units(text: str) -> str:
    """Nothing is taken away where nothing would be left."""
    cut = re.sub(r"\\text\{.*\}$", "", text).strip()
    text = cut or text
    for unit in _UNITS:
        text = unit.sub("", text) or text
    return text


def _stripped(text: str) -> str:
    """The answer as it is given to math-verify: lines joined, no units, no spaces, `x=` and its like left out."""
    text = text.strip().replace("\n", "").rstrip(".")
    for pattern, new in _BEFORE_UNITS:
        text = re.sub(pattern, new, text)
    text = _without_units(text)
    worded = number_in_words(text)
    text = str(worded.value) if worded and worded.value.denominator == 1 else text
    for pattern, new in _AFTER_UNITS:
        text = re.sub(pattern, new, text)
    if "\\infty" not in text:
        text = text.replace("inf", "\\infty")
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    return text.replace(" ", "")


def extract(text: str) -> str | None:
    """The answer as the release finds it in a response, which ends at the first text of an end; None where none is."""
    answer = re.sub(r"\n\s*", "", _found(_ENDS.split(text, maxsplit=1)[0]))
    answer = answer.removeprefix(":").removesuffix(".").removesuffix("/")
    answer = _stripped(answer) if len(answer) <= MAX_ANSWER else ""
    return answer or None
