"""One step's rollout on the host: the story of a problem from its question to its group. No arrays of a device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.data.rows import trace_of
from cgrpo_jax.options import RefineConfig
from cgrpo_jax.records import (
    LOCAL,
    POLICY,
    Attempt,
    Completion,
    Critique,
    Group,
    Kind,
    Name,
    Problem,
    Request,
    Source,
)
from cgrpo_jax.rollout.refining import as_sampled, refined_responses, refinement_prompt, select
from cgrpo_jax.rollout.stories import Phase, Sample, Stories, Story, Work
from cgrpo_jax.text.prompts import Texts
from cgrpo_jax.text.tokenizer import Tokenizer

# Parts of a story. Each may wait: for the sampler (a self-critique), for work (a grader, a server), or for nothing.
# A scorer is given the problem, its number in the step, what was sampled (responses or refinements) and completions; a
# critic the problem, its number, and the responses with their places among the samples.
Scorer = Callable[[Problem, int, Kind, Sequence[Completion]], Generator[Sample | Work, Any, list[Attempt]]]
Critic = Callable[[Problem, int, Sequence[tuple[int, Attempt]]], Generator[Sample | Work, Any, list[Critique]]]

# Scores (problem, completion, its text) at once.
Score = Callable[[Sequence[tuple[Problem, Completion, str]]], list[Attempt]]


@dataclasses.dataclass(frozen=True)
class Method:
    """What the problems of a step go through."""

    samples: int  # n, responses a problem
    scorer: Scorer
    critic: Critic
    tokenizer: Tokenizer
    refine: RefineConfig
    seed: int
    step: int
    texts: Texts = Texts()
    trace_tokens: int | None = None  # of a trace of the data, or of what `local` wrote, at most; None: all
    local: Tokenizer | None = None  # of the second model, where that writes the refinements


def by_rule(score: Score, tokenizer: Tokenizer) -> Scorer:
    """A scorer that asks graders, beside the decoding."""

    def scorer(
        problem: Problem, number: int, kind: Kind, completions: Sequence[Completion]
    ) -> Generator[Sample | Work, Any, list[Attempt]]:
        items = [(problem, completion, tokenizer.decode(completion.ids)) for completion in completions]
        attempts = yield Work(functools.partial(score, items), "score")
        return attempts

    return scorer


def story(problem: Problem, number: int, prompt_ids: Sequence[int], method: Method) -> Story:
    """Responses, verdicts, critiques, refinements, verdicts, group (arXiv 2506.03106, section 4).

    A truncated response or refinement keeps exactly its sampled ids: no end-of-sequence id is invented. A trace of the
    data is a refinement that nobody samples: scored and trained on as the others are (arXiv 2504.14945). What a second
    model wrote is read anew with the policy's tokenizer.
    """
    asked = [Request(Name(Kind.RESPONSE, number, g), prompt_ids) for g in range(method.samples)]
    completions = yield Sample(asked)
    responses = yield from method.scorer(problem, number, Kind.RESPONSE, completions)

    origins, completions = yield from _refined(problem, number, responses, method)
    scored: list[Attempt] = []
    if completions:
        scored = yield from method.scorer(problem, number, Kind.REFINEMENT, completions)
    refinements = [
        dataclasses.replace(attempt, source=source, prompt_ids=ids)
        for attempt, (source, ids) in zip(scored, origins, strict=True)
    ]

    rng = np.random.default_rng((method.seed, method.step, Kind.REFINEMENT, number))
    selected = select([attempt.correct for attempt in refinements], method.refine.k, method.refine.select, rng)
    dropped = len(selected) if method.refine.group == "replace" else 0
    kept = tuple(range(dropped, method.samples))
    own_group = tuple(range(len(refinements))) if method.refine.own_group else ()
    return Group(problem, prompt_ids, tuple(responses), tuple(refinements), kept, selected, own_group)


Origin = tuple[int | None, Sequence[int] | None]  # of a refinement: Attempt.source and Attempt.prompt_ids


def _refined(
    problem: Problem, number: int, responses: list[Attempt], method: Method
) -> Generator[Sample | Work, Any, tuple[list[Origin], Sequence[Completion]]]:
    """Criticises what is to be refined (into `responses`, too); where refinements come from, and the refinements."""
    cfg, chosen = method.refine, refined_responses(responses, method.refine.trigger)
    if not chosen:
        return [], []
    if cfg.refiner == "target":
        return [(None, None)], [as_sampled(method.tokenizer, trace_of(problem), method.trace_tokens)]
    critiques = yield from method.critic(problem, number, [(g, responses[g]) for g in chosen])
    usable: list[tuple[int, tuple[str, str]]] = []
    for g, critique in zip(chosen, critiques, strict=True):
        responses[g] = dataclasses.replace(responses[g], critique=critique)
        if critique.text is not None and cfg.k:
            usable.append((g, (responses[g].text, critique.text)))

    def prompt(attempts: list[tuple[str, str]]) -> list[int] | None:
        reader = method.local or method.tokenizer
        return refinement_prompt(reader, problem, attempts, cfg.max_prompt_tokens, method.texts.refinement)

    asked: list[tuple[int, int | None, list[int] | None]]  # its number, Attempt.source, prompt
    if cfg.context == "together":
        ids = prompt([attempt for _, attempt in usable]) if usable else None
        asked = [(sample, None, ids) for sample in range(method.samples)]
    else:
        asked = [(g, g, prompt([attempt])) for g, attempt in usable]
    fitting = [(sample, source, ids) for sample, source, ids in asked if ids is not None]
    model = POLICY if method.local is None else LOCAL
    completions = yield Sample(
        [Request(Name(Kind.REFINEMENT, number, sample), ids, model=model) for sample, _, ids in fitting]
    )
    if method.local is not None:
        texts = [(method.local.decode(completion.ids), completion.finished) for completion in completions]
        completions = [as_sampled(method.tokenizer, text, method.trace_tokens, ended) for text, ended in texts]
    return [(source, ids) for _, source, ids in fitting], completions


def _no_phase(name: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def collect_groups(
    problems: Sequence[Problem],
    method: Method,
    run: Callable[[Source], None],
    phase: Phase = _no_phase,
    threads: int = 2,
    spare: Iterable[Problem] = (),
) -> tuple[list[Group], int]:
    """One group per problem, and how many verdicts and critiques decoding did not wait for (`Stories.late`).

    `run` is that of a sampler.

    A problem's refinements are asked for soon after its last response is there, while others are still sampled.

    Args:
      spare: problems that stand in, one by one, for those whose rewards are all alike; taken as far as needed. The
        groups are then more by what was taken: as many are trained on as there are `problems`.
    """
    numbered = enumerate(itertools.chain(problems, spare))
    with Stories([_with_replacements(numbered, method) for _ in problems], phase, threads) as stories:
        run(stories)
        groups = [group for _, group in sorted(itertools.chain(*stories), key=_number)]
    return _trained(groups, len(problems)), stories.late


def _with_replacements(numbered: Iterator[tuple[int, Problem]], method: Method) -> Story:
    """The story of the next problem; while it ends without a gradient and there is another one, that of the next.

    What is taken in all depends on no order: a problem's samples follow from its number, and each group without a
    gradient takes one more.
    """
    told: list[tuple[int, Group]] = []
    for number, problem in numbered:
        group = yield from story(problem, number, method.tokenizer.encode_chat(problem.messages), method)
        told.append((number, group))
        if not group.alike:
            break
    return told


def _number(numbered: tuple[int, Group]) -> int:
    return numbered[0]


def _trained(groups: Sequence[Group], count: int) -> list[Group]:
    """The groups, of which all but `count` have nothing to train on: the first ones without a gradient."""
    surplus, made = len(groups) - count, []
    for group in groups:
        if surplus and group.alike:
            surplus, group = surplus - 1, dataclasses.replace(group, kept=(), selected=(), own_group=())
        made.append(group)
    return made
