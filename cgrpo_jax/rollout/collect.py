"""One step's rollout on the host: the story of a problem from its question to its group. No arrays of a device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.data.rows import trace_of
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
)
from cgrpo_jax.rollout.refining import as_sampled, refined_responses, refinement_prompt, select
from cgrpo_jax.rollout.stories import Phase, Sample, Stories, Story, Work, no_phase
from cgrpo_jax.text.prompts import Texts
from cgrpo_jax.text.tokenizer import Tokenizer

Item = tuple[Problem, Completion, str]  # what is scored: a completion to a problem, and its text


class Posed(NamedTuple):
    """A problem as a step poses it."""

    problem: Problem
    number: int  # within the step; names what is sampled for it, so its random numbers follow from it
    step: int


# Parts of a story. Each may wait: for a sampler (a self-critique), for work (a grader, a server), or for nothing. A
# scorer is given what was sampled for a problem, responses or refinements; a critic the responses that are refined,
# with their places among the samples.
Attempts = Generator[Sample | Work, Any, list[Attempt]]
Scorer = Callable[[Posed, Kind, Sequence[Completion]], Attempts]
Chosen = Sequence[tuple[int, Attempt]]
Critiques = Generator[Sample | Work, Any, list[Critique]]
Criticise = Callable[[Posed, Chosen], Critiques]


class Score(Protocol):
    """Scores items at once; any thread may ask. Only functions of the user are told the step."""

    def __call__(self, items: Sequence[Item], *, step: int = 0) -> list[Attempt]: ...


@dataclasses.dataclass(frozen=True)
class Method:
    """What each problem of a run goes through: the same for all steps."""

    samples: int  # n, responses a problem
    scorer: Scorer
    criticise: Criticise
    tokenizer: Tokenizer
    refine: RefineConfig
    seed: int
    texts: Texts = Texts()
    trace_tokens: int | None = None  # of a trace of the data, or of what `local` wrote, at most; None: all
    local: Tokenizer | None = None  # of the second model, where that writes the refinements


def by_rule(score: Score, tokenizer: Tokenizer) -> Scorer:
    """A scorer that asks graders, beside the decoding."""

    def scorer(posed: Posed, kind: Kind, completions: Sequence[Completion]) -> Attempts:
        items = [(posed.problem, completion, tokenizer.decode(completion.ids)) for completion in completions]
        attempts = yield Work(functools.partial(score, items, step=posed.step), "score")
        return attempts

    return scorer


def story(posed: Iterator[Posed], method: Method) -> Story:
    """Responses, verdicts, critiques, refinements, verdicts, group (arXiv 2506.03106, section 4) of the next problem.

    While a group ends without a gradient and there is another problem, that one follows. What is taken in all depends
    on no order: a problem's samples follow from its number, and each group without a gradient takes one problem more.

    A truncated response or refinement keeps exactly its sampled ids: no end-of-sequence id is invented. A trace of the
    data is a refinement that nobody samples: scored and trained on as the others are (arXiv 2504.14945). What a second
    model wrote is read anew with the policy's tokenizer.

    Returns:
      (number, group) of each problem that was taken.
    """
    told: list[tuple[int, Group]] = []
    for one in posed:
        prompt_ids = method.tokenizer.encode_chat(one.problem.messages)
        asked = [Request(Name(Kind.RESPONSE, one.number, g), prompt_ids) for g in range(method.samples)]
        completions = yield Sample(asked)
        responses = yield from method.scorer(one, Kind.RESPONSE, completions)
        origins, completions = yield from _refined(one, responses, method)
        scored: list[Attempt] = []
        if completions:
            scored = yield from method.scorer(one, Kind.REFINEMENT, completions)
        refinements = [
            dataclasses.replace(attempt, source=source, prompt_ids=ids)
            for attempt, (source, ids) in zip(scored, origins, strict=True)
        ]
        told.append((one.number, _group(one, prompt_ids, responses, refinements, method)))
        if not told[-1][1].alike:
            break
    return told


def _group(
    posed: Posed, prompt_ids: Sequence[int], responses: list[Attempt], refinements: list[Attempt], method: Method
) -> Group:
    """What was sampled for a problem, and what of it is trained on."""
    problem, number, step = posed
    rng = np.random.default_rng((method.seed, step, Kind.REFINEMENT, number))
    selected = select([attempt.correct for attempt in refinements], method.refine.k, method.refine.select, rng)
    dropped = len(selected) if method.refine.group == "replace" else 0
    kept = tuple(range(dropped, method.samples))
    own_group = tuple(range(len(refinements))) if method.refine.own_group else ()
    return Group(problem, prompt_ids, tuple(responses), tuple(refinements), kept, selected, own_group)


Origin = tuple[int | None, Sequence[int] | None]  # of a refinement: Attempt.source and Attempt.prompt_ids


def _refined(
    posed: Posed, responses: list[Attempt], method: Method
) -> Generator[Sample | Work, Any, tuple[list[Origin], Sequence[Completion]]]:
    """Criticises what is to be refined (into `responses`, too); where refinements come from, and the refinements."""
    problem, number, _ = posed
    cfg, chosen = method.refine, refined_responses(responses, method.refine.trigger)
    if not chosen:
        return [], []
    if cfg.refiner == "target":
        return [(None, None)], [as_sampled(method.tokenizer, trace_of(problem), method.trace_tokens)]
    critiques = yield from method.criticise(posed, [(g, responses[g]) for g in chosen])
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


def stories_of(
    problems: Sequence[Problem],
    method: Method,
    step: int,
    phase: Phase = no_phase,
    threads: int = 2,
    spare: Iterable[Problem] = (),
) -> Stories:
    """The stories of a step, one a problem; `groups_of` has what they came to.

    A problem's refinements are asked for soon after its last response is there, while others are still sampled.

    Args:
      spare: problems that stand in, one by one, for those whose rewards are all alike; taken as far as needed. The
        groups are then more by what was taken: as many are trained on as there are `problems`.
    """
    numbered = enumerate(itertools.chain(problems, spare))
    posed = (Posed(problem, number, step) for number, problem in numbered)
    return Stories([story(posed, method) for _ in problems], phase, threads)


def groups_of(stories: Stories) -> list[Group]:
    """One group for each problem that was taken, in the order of the problems."""
    groups = [group for _, group in sorted(itertools.chain(*stories), key=_number)]
    return _trained(groups, len(stories.stories))


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
