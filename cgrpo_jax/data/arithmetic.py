"""A generated task with two planted weaknesses: the mechanism of Critique-GRPO on a model of half a million weights.

The work is written column by column, lowest digit first, then the boxed result:

    What is 23+46?     3+6+0=09;2+4+0=06;\\boxed{69}          easy: a+b, two or three digits each
    What is 63433*6?   3*6+0=18;3*6+1=19;...;\\boxed{380598}  hard: a*m, five digits, all inner carries non-zero

The warm-start data plants a different habit in each half, for plain prompts only: sums are careless (each column is off
by one with probability 0.25), products forget the carry (each is written as 0 with probability 0.95). So a hard problem
is never solved by sampling (0.05^4 a sample) while each single carry keeps a probability near gamma. Refinement prompts
show correct work. The hard half is engineered: it demonstrates a mechanism and is no evidence about language models.
"""

from __future__ import annotations

import re
import zlib

import numpy as np

from cgrpo_jax.grading.answers import boxed
from cgrpo_jax.records import Message, Problem
from cgrpo_jax.text.prompts import indicative, indicative_gt, question_messages, refinement_messages

CARELESS = 0.25
FORGOTTEN = 0.95
HELD_OUT = 16  # one question in so many is kept for evaluation, by its hash
STREAMS = {"train": 0, "test": 1}


def _held_out(question: str) -> bool:
    return zlib.crc32(question.encode()) % HELD_OUT == 0


def _carries(a: int, m: int) -> list[int]:
    """Carries into the columns of a*m, lowest first."""
    carries = [0]
    for digit in reversed(str(a)):
        carries.append((int(digit) * m + carries[-1]) // 10)
    return carries


def _draw(rng: np.random.Generator, hard: bool) -> tuple[str, int]:
    """A question and its answer."""
    if not hard:
        low, high = (10, 100) if rng.random() < 0.5 else (100, 1000)
        a, b = (int(x) for x in rng.integers(low, high, 2))
        return f"What is {a}+{b}?", a + b
    while True:
        a, m = int(rng.integers(10_000, 100_000)), int(rng.integers(3, 10))
        if all(_carries(a, m)[1:-1]):
            return f"What is {a}*{m}?", a * m


def problem(seed: int, split: str, index: int) -> Problem:
    """Problem `index` of a stream; even ones are easy, odd ones hard. No question is in both splits."""
    rng = np.random.default_rng((seed, STREAMS[split], index))
    hard = index % 2 == 1
    while True:
        question, answer = _draw(rng, hard)
        if _held_out(question) == (split == "test"):
            messages = question_messages(question)
            tag, columns = "hard" if hard else "easy", {"target": solution(question)}
            return Problem(question, str(answer), messages, grader="exact", tag=tag, columns=columns)


def solution(question: str, rng: np.random.Generator | None = None, slip: float = 1.0) -> str:
    """The work for a question: correct without `rng`, else with the planted habit scaled by `slip`."""
    a, operator, b = re.fullmatch(r"What is (\d+)([+*])(\d+)\?", question).groups()  # type: ignore[union-attr]
    steps, carry, total = [], 0, 0
    for column, digit in enumerate(map(int, reversed(a))):
        if operator == "+":
            other = int(b[-1 - column])
            result = digit + other + carry
            if rng is not None and rng.random() < CARELESS * slip:
                result = max(0, result + (1 if rng.random() < 0.5 else -1))
        else:
            other = int(b)
            if rng is not None and carry and rng.random() < FORGOTTEN * slip:
                carry = 0
            result = digit * other + carry
        steps.append(f"{digit}{operator}{other}+{carry}={result:02d}")
        carry = result // 10
        total += (result if column == len(a) - 1 else result % 10) * 10**column
    return ";".join(steps) + f";\\boxed{{{total}}}"


def worked_critique(question: str, text: str, correct: bool) -> str:
    """Checks the steps of a solution: names the first wrong one and gives the verdict, never the answer."""
    if correct:
        return "Each step is right. Conclusion: correct [END]"
    wanted, shown = solution(question).split(";")[:-1], text.split(";")
    for number, step in enumerate(wanted):
        if number >= len(shown) or "\\boxed" in shown[number]:
            return f"Step {number + 1} is missing. Conclusion: incorrect [END]"
        if shown[number] != step:
            return f"Step {number + 1} is wrong: {shown[number][:40]}. Conclusion: incorrect [END]"
    return "Each step is right, the final answer is wrong. Conclusion: incorrect [END]"


def _scribble(text: str, rng: np.random.Generator) -> str:
    """One to four random digits written over."""
    places = [i for i, character in enumerate(text) if character.isdigit()]
    characters = list(text)
    for place in rng.choice(places, min(int(rng.integers(1, 5)), len(places)), replace=False):
        characters[place] = str(rng.integers(10))
    return "".join(characters)


def _critique(question: str, answer: str, text: str, rng: np.random.Generator) -> tuple[str, bool]:
    """A critique of one of the three kinds, and whether it says enough to correct the work."""
    draw, right = rng.random(), boxed(text) == answer
    if draw < 0.7:
        return indicative_gt(right, answer), True
    if draw < 0.85:
        return worked_critique(question, text, right), False
    return indicative(right), False


def warm_start_row(seed: int, index: int, refinement: bool) -> tuple[tuple[Message, ...], str]:
    """Row `index` of the supervised warm start: chat turns and the answer to learn, of one of the two kinds."""
    rng = np.random.default_rng((seed, 7, index, refinement))
    hard = rng.random() < (0.6 if refinement else 0.5)
    item = problem(seed, "train", 2 * int(rng.integers(1 << 30)) + int(hard))
    text = solution(item.question, rng)
    if not refinement:
        return item.messages, text
    if rng.random() < 0.15:
        text = _scribble(text, rng)
    critique, enough = _critique(item.question, item.answer, text, rng)
    prompt = refinement_messages(item.question, [(text, critique)])
    right = boxed(text) == item.answer
    return prompt, text if right else solution(item.question, None if enough else rng, slip=0.5)
