"""The texts of the paper: task prompt, indicative critiques, refinement prompt (released code, and appendix M)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cgrpo_jax.records import Message

SYSTEM = "You are a helpful assistant."
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

REFINEMENT = """Given the following inputs:
        **Question**: {question}
{attempts}

        Please re-answer by:
        - Correcting potential errors identified in the critique, if they exist.
        - Providing clear, step-by-step reasoning.
        - Formatting the final answer as `\\boxed{{answer}}`.

        Ensure the revised solution addresses all issues raised in the critique."""
ATTEMPT = """        **Previous Solution{number}**: {solution}
        **Critique{number}**: {critique}"""


def question_messages(question: str) -> tuple[Message, ...]:
    """The task prompt of training and validation ("qwen-boxed")."""
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{question}\n{INSTRUCTION}"})


def refinement_messages(question: str, attempts: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    """The refinement prompt: bare question, whole previous solutions (with any `<think>` part), each with its critique.

    The paper's has one; several are numbered (GOLF, arXiv 2603.04597, whose literal text is another).
    """
    numbers = [f" {i}" for i in range(1, len(attempts) + 1)] if len(attempts) > 1 else [""]
    shown = [
        ATTEMPT.format(number=number, solution=solution, critique=critique)
        for number, (solution, critique) in zip(numbers, attempts, strict=True)
    ]
    text = REFINEMENT.format(question=question, attempts="\n".join(shown))
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": text})


CRITIC = (
    "You are a science expert. A student is trying to solve a question. Please explain briefly (step-by-step) whether "
    "the student's solution is correct or not. Finally, conclude your judgment with: "
    '"Conclusion: correct/incorrect [END]."'
)
DOUBTER = """You are a science expert. A student is trying to solve a question. Go through the student's solution step \
by step, and say briefly what in it is doubtful, missing or wrong. Do not say whether the solution is correct."""
RELEASE_CRITIC = """You are a science expert. Analyze a student's incorrect solution by comparing it with the correct \
solution. Identify any errors and provide a detailed step-by-step explanation of mistakes. Conclude with: 'Conclusion: \
wrong [END]'"""


def critique_messages(question: str, solution: str, ground_truth: str | None, verdict: bool) -> tuple[Message, ...]:
    """The critic's prompt of the paper (appendix B).

    The line with the ground truth, and the prompt without a verdict, are ours: the paper has them in words alone (H).

    Args:
      ground_truth: shown to the critic where it is given.
      verdict: whether the critic shall conclude whether the solution is correct.
    """
    reference = "" if ground_truth is None else f"\nGround truth: {ground_truth}"
    text = f"Question: {question}\nStudent's Solution: {solution}{reference}"
    return ({"role": "system", "content": CRITIC if verdict else DOUBTER}, {"role": "user", "content": text})


def release_critique_messages(
    question: str, solution: str, ground_truth: str | None, verdict: bool
) -> tuple[Message, ...]:
    """The critic's prompt of the paper's release (its critique type `text`): a wrong solution beside a right one."""
    parts = (
        f"**Question:** {question}",
        f"**Student's Answer:** \n{solution}",
        f"**Correct Solution:** \n{ground_truth or ''}",
        "**Critique:**",
    )
    return ({"role": "system", "content": RELEASE_CRITIC}, {"role": "user", "content": "\n\n".join(parts)})


TaskPrompt = Callable[[str], Sequence[Message]]
CriticPrompt = Callable[[str, str, str | None, bool], Sequence[Message]]
RefinementPrompt = Callable[[str, Sequence[tuple[str, str]]], Sequence[Message]]


class Texts(NamedTuple):
    """Who writes the prompts, see `options.TextsConfig`; the paper's by default."""

    task: TaskPrompt = question_messages
    critique: CriticPrompt = critique_messages
    refinement: RefinementPrompt = refinement_messages


def indicative(correct: bool) -> str:
    return f"The generated solution is {'correct' if correct else 'incorrect'}."


def indicative_gt(correct: bool, ground_truth: str) -> str:
    return f"The generated solution is {'correct' if correct else 'incorrect'}, the ground truth is {ground_truth}."
