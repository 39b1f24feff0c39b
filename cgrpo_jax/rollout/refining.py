"""Which responses are refined, under which prompt, and which refinements are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cgrpo_jax.errors import PromptError
from cgrpo_jax.records import Attempt, Completion, Message, Problem
from cgrpo_jax.text.prompts import RefinementPrompt, refinement_messages
from cgrpo_jax.text.stop import before
from cgrpo_jax.text.tokenizer import Tokenizer

CUT = "\n[...]\n"


def refinement_prompt(
    tokenizer: Tokenizer,
    problem: Problem,
    attempts: Sequence[tuple[str, str]],
    budget: int,
    write: RefinementPrompt = refinement_messages,
) -> list[int] | None:
    """Ids of the refinement prompt of some (solution, critique), within `budget`; None without room, see `fitted`."""
    critiques = [critique for _, critique in attempts]

    def messages(*solutions: str) -> Sequence[Message]:
        return write(problem.question, list(zip(solutions, critiques, strict=True)))

    return fitted(tokenizer, messages, [text for text, _ in attempts], budget)


def fitted(
    tokenizer: Tokenizer, messages: Callable[..., Sequence[Message]], texts: Sequence[str], budget: int
) -> list[int] | None:
    """Ids of a prompt that holds solutions, within `budget`.

    Where it is too long the middle of the longest solutions gives way to a mark (half of what fits is kept from each
    end); the rest is never cut. None where empty solutions do not fit either, or where the chat template rewrites it.
    """
    try:
        return _fit_solutions(tokenizer, messages, texts, budget)
    except PromptError:
        return None


def _level(lengths: Sequence[int], room: int) -> int:
    """What each may keep at most, so that together they fill the room: water level of the lengths."""
    level = 0
    for left, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        level = room // left
        if length > level:
            break
        room -= length
    return level


def _fit_solutions(
    tokenizer: Tokenizer, messages: Callable[..., Sequence[Message]], texts: Sequence[str], budget: int
) -> list[int] | None:
    def encode(solutions: Sequence[str]) -> list[int]:
        return tokenizer.encode_chat(messages(*solutions))

    ids = encode(texts)
    if len(ids) <= budget:
        return ids
    ids_of = [tokenizer.encode_text(text) for text in texts]
    bare = encode([CUT] * len(texts))
    keep = _level([len(own) for own in ids_of], budget - len(bare))

    def cut(text: str, own: list[int]) -> str:
        if len(own) <= keep:
            return text
        return tokenizer.decode(own[: keep - keep // 2]) + CUT + tokenizer.decode(own[len(own) - keep // 2 :])

    while keep > 0:
        ids = encode([cut(text, own) for text, own in zip(texts, ids_of, strict=True)])
        if len(ids) <= budget:
            return ids
        over = len(ids) - budget  # cutting at token borders can change a few tokens beside the cut
        keep -= -(-over // sum(len(own) > keep for own in ids_of))
    return bare if len(bare) <= budget else None


def as_sampled(tokenizer: Tokenizer, text: str, most: int | None, ended: bool = True) -> Completion:
    """A text that was not sampled from the policy (a trace of the data, another model's) as if it had been.

    Where it has `ended`, the end of a turn stands behind it. A stop text ends it as it would have ended the policy. One
    that is too long is cut to `most` ids, has no end, and is scored as what is left of it. Its log-probabilities mean
    nothing.
    """
    said = before(text, tokenizer.stops)
    ended = ended or said != text
    ids = np.asarray([*tokenizer.encode_text(said), *[tokenizer.end_id] * ended], np.int32)
    finished, ids = ended and (most is None or len(ids) <= most), ids[:most]
    return Completion(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32), finished)


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
