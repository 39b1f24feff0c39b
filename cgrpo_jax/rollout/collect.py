"""One step's rollout on the host: sample, score, criticise, refine, select, assemble groups. No arrays of a device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from cgrpo_jax.options import RefineConfig
from cgrpo_jax.records import Attempt, Completion, Generate, Group, Kind, Problem, Request
from cgrpo_jax.rollout.critics import Critic
from cgrpo_jax.text.prompts import refinement_messages
from cgrpo_jax.text.tokenizer import PromptError, Tokenizer

TRIGGERS = ("none_correct", "any_wrong", "always", "never")
SELECTIONS = ("correct_then_random", "correct_first", "random")
GROUPS = ("append", "replace")
CUT = "\n[...]\n"

Score = Callable[[Sequence[tuple[Problem, Completion, str]]], list[Attempt]]
Phase = Callable[[str], contextlib.AbstractContextManager]


def refinement_prompt(
    tokenizer: Tokenizer, problem: Problem, text: str, critique: str, budget: int
) -> list[int] | None:
    """Ids of the refinement prompt within `budget`.

    Where it is too long the middle of the previous solution gives way to a mark (half of what fits is kept from each
    end); question and critique are never cut. None where even an empty solution does not fit, or where the chat
    template would rewrite the text.
    """
    try:
        return _fit_solution(tokenizer, problem, text, critique, budget)
    except PromptError:
        return None


def _fit_solution(tokenizer: Tokenizer, problem: Problem, text: str, critique: str, budget: int) -> list[int] | None:
    encode = lambda solution: tokenizer.encode_chat(refinement_messages(problem.question, solution, critique))
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


@dataclasses.dataclass
class _Collection:
    """Attempts of a step as they come in, and what they lead to."""

    problems: Sequence[Problem]
    samples: int
    score: Score
    critic: Critic
    tokenizer: Tokenizer
    cfg: RefineConfig
    phase: Phase

    def __post_init__(self):
        self.responses: list[list[Attempt]] = [[] for _ in self.problems]
        self.refinements: list[list[Attempt]] = [[] for _ in self.problems]
        self.arrived: list[dict[int, Completion]] = [{} for _ in self.problems]
        self.sources: list[tuple[int, int]] = []  # (problem, response) of each refinement, in the order asked
        self.refined: dict[int, Completion] = {}

    def scored(self, p: int, completions: Sequence[Completion]) -> list[Attempt]:
        with self.phase("score"):
            texts = [self.tokenizer.decode(completion.ids) for completion in completions]
            problem = self.problems[p]
            return self.score([(problem, c, text) for c, text in zip(completions, texts, strict=True)])

    def take(self, number: int, completion: Completion) -> list[Request]:
        """Called as a request ends: a problem whose responses are complete is scored, and refined where triggered."""
        asked = len(self.problems) * self.samples
        if number >= asked:
            self.refined[number - asked] = completion
            return []
        p, g = divmod(number, self.samples)
        self.arrived[p][g] = completion
        if len(self.arrived[p]) < self.samples:
            return []
        self.responses[p] = self.scored(p, [self.arrived[p][g] for g in range(self.samples)])
        return self.refine(p)

    def refine(self, p: int) -> list[Request]:
        """Criticises the responses of a problem that are to be refined; the requests to refine them."""
        problem, own, requests = self.problems[p], self.responses[p], []
        with self.phase("critique"):
            chosen = refined_responses(own, self.cfg.trigger)
            critiques = self.critic([(problem, own[g]) for g in chosen])
            for g, critique in zip(chosen, critiques, strict=True):
                text = own[g].text
                own[g] = dataclasses.replace(own[g], critique=critique)
                ids = refinement_prompt(self.tokenizer, problem, text, critique, self.cfg.max_prompt_tokens)
                if ids is not None:
                    self.sources.append((p, g))
                    requests.append(Request(ids, Kind.REFINEMENT, p, g))
        return requests

    def score_refinements(self) -> None:
        by_problem: dict[int, list[tuple[int, Completion]]] = {}
        for number, (p, g) in enumerate(self.sources):
            by_problem.setdefault(p, []).append((g, self.refined[number]))
        for p, items in by_problem.items():
            attempts = self.scored(p, [completion for _, completion in items])
            self.refinements[p] = [
                dataclasses.replace(attempt, source=g) for (g, _), attempt in zip(items, attempts, strict=True)
            ]


def collect_groups(
    problems: Sequence[Problem],
    samples: int,
    generate: Generate,
    score: Score,
    critic: Critic,
    tokenizer: Tokenizer,
    cfg: RefineConfig,
    *,
    seed: int,
    step: int,
    phase: Phase = lambda name: contextlib.nullcontext(),
) -> list[Group]:
    """Samples `samples` responses a problem, refines where triggered, and returns one group per problem.

    A problem's refinements are asked for as soon as its last response is there, while others are still sampled. A
    truncated response or refinement keeps exactly its sampled ids: no end-of-sequence id is invented.
    """
    prompts = [tokenizer.encode_chat(problem.messages) for problem in problems]
    requests = [Request(prompts[p], Kind.RESPONSE, p, g) for p in range(len(problems)) for g in range(samples)]
    collection = _Collection(problems, samples, score, critic, tokenizer, cfg, phase)
    with phase("sample"):
        generate(requests, collection.take)
    collection.score_refinements()
    groups = []
    for p, problem in enumerate(problems):
        own = tuple(collection.refinements[p])
        rng = np.random.default_rng((seed, step, Kind.REFINEMENT, p))
        selected = select([attempt.correct for attempt in own], cfg.k, cfg.select, rng)
        dropped = len(selected) if cfg.group == "replace" else 0
        responses = tuple(collection.responses[p])
        groups.append(Group(problem, prompts[p], responses, own, tuple(range(dropped, samples)), selected))
    return groups
