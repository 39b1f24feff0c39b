"""Which responses are refined, under which prompt, and which refinements are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cgrpo_jax.records import Attempt, Completion, Message, Problem
from cgrpo_jax.text.prompts import refinement_messages
from cgrpo_jax.text.tokenizer import PromptError, Tokenizer

CUT = "\n[...]\n"


def refinement_prompt(
    tokenizer: Tokenizer, problem: Problem, text: str, critique: str, budget: int
) -> list[int] | None:
    """Ids of the refinement prompt within `budget`; None where there is no room, see `fitted`."""

    def messages(solution: str) -> Sequence[Message]:
        return refinement_messages(problem.question, solution, critique)

    return fitted(tokenizer, messages, text, budget)


def fitted(
    tokenizer: Tokenizer, messages: Callable[[str], Sequence[Message]], text: str, budget: int
) -> list[int] | None:
    """Ids of a prompt that holds a solution, within `budget`.

    Where it is too long the middle of the solution gives way to a mark (half of what fits is kept from each end); the
    rest is never cut. None where even an empty solution does not fit, or where the chat template would rewrite it.
    """
    try:
        return _fit_solution(tokenizer, messages, text, budget)
    except PromptError:
        return None


def _fit_solution(
    tokenizer: Tokenizer, messages: Callable[[str], Sequence[Message]], text: str, budget: int
) -> list[int] | None:
    def encode(solution: str) -> list[int]:
        return tokenizer.encode_chat(messages(solution))

    ids = encode(text)
    if len(ids) <= budget:
        return ids
    solution_ids = tokenizer.encode_text(text)
    keep = budget - len(encode(CUT))
    while keep > 0:
        head, tail = solution_ids[: keep - keep // 2], solution_ids[len(solution_ids) - keep // 2 :]
        ids = encode(tokenizer.decode(head) + CUT + tokenizer.decode(tail))
        if len(ids) <= budget:
            return ids
        keep -= len(ids) - budget  # cutting at token borders can change a few tokens beside the cut
    ids = encode(CUT)
    return ids if len(ids) <= budget else None


def trace_completion(tokenizer: Tokenizer, text: str, most: int | None) -> Completion:
    """A solution from the data as if it had been sampled, with the tokenizer's end-of-sequence id behind it.

    One that is too long is cut to `most` ids, has no end, and is scored as what is left of it. Its log-probabilities
    mean nothing.
    """
    end = tokenizer.hf.eos_token_id
    ids = np.asarray([*tokenizer.encode_text(text), tokenizer.eos_ids[0] if end is None else end], np.int32)[:most]
    return Completion(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32), ids[-1] in tokenizer.eos_ids)


def refined_responses(attempts: Sequence[Attempt], trigger: str) -> list[int]:
    """Indices of the responses of one problem to refine."""
    wrong = [i for i, attempt in enumerate(attempts) if not attempt.correct]
    if trigger == "always":
        return list(range(len(attempts)))
    if trigger == "any_wrong":
        return wrong
    return wrong if trigger == "none_correct" and len(wrong) == len(attempts) else []


def select(correct: Sequence[bool], k: int, how: str, rng: np.random.Generator) -> tuple[int, ...]:
    """Indices of the k refinements to train on, correct ones first unless `how` is "random"."""
    order = list(range(len(correct))) if how == "correct_first" else rng.permutation(len(correct)).tolist()
    if how != "random":
        order.sort(key=lambda i: not correct[i])  # stable: keeps the drawn order within each kind
    return tuple(order[:k])
