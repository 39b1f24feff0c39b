"""The texts of the paper: task prompt, indicative critiques, refinement prompt (released code, and appendix M)."""

from __future__ import annotations

from cgrpo_jax.records import Message

SYSTEM = "You are a helpful assistant."
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

REFINEMENT = """Given the following inputs:
        **Question**: {question}
        **Previous Solution**: {solution}
        **Critique**: {critique}

        Please re-answer by:
        - Correcting potential errors identified in the critique, if they exist.
        - Providing clear, step-by-step reasoning.
        - Formatting the final answer as `\\boxed{{answer}}`.

        Ensure the revised solution addresses all issues raised in the critique."""


def question_messages(question: str) -> tuple[Message, ...]:
    """The task prompt of training and validation ("qwen-boxed")."""
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{question}\n{INSTRUCTION}"})


def refinement_messages(question: str, solution: str, critique: str) -> tuple[Message, ...]:
    """The refinement prompt: bare question, the whole previous solution (with any `<think>` part), its critique."""
    text = REFINEMENT.format(question=question, solution=solution, critique=critique)
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": text})


def indicative(correct: bool) -> str:
    return f"The generated solution is {'correct' if correct else 'incorrect'}."


def indicative_gt(correct: bool, ground_truth: str) -> str:
    return f"The generated solution is {'correct' if correct else 'incorrect'}, the ground truth is {ground_truth}."
