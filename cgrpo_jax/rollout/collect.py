"""The rollout of a step on the host: the story of a problem, from its question to its group."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.data.cells import trace_of
from cgrpo_jax.errors import PromptError
from cgrpo_jax.records import LOCAL, POLICY, Attempt, Completion, Critique, Group, Kind, Message, Name, Problem, Request
from cgrpo_jax.rollout.stories import Phase, Sample, Stories, Story, Work
from cgrpo_jax.text import stop
from cgrpo_jax.text.prompts import RefinementPrompt, Texts, refinement_messages
from cgrpo_jax.text.tokenizer import Tokenizer

CUT = "\n[...]\n"  # in the place of the middle of a solution that is too long


class Posed(NamedTuple):
    """A problem as a step poses it."""

    problem: Problem
    number: int  # within the step; it is in the names of the problem's requests, and so in their random numbers
    step: int


# Scores (problem, completion, its text) at once: `score(items, step=step)`. Any thread may call it.
Score = Callable[..., list[Attempt]]

# Parts of a story are generators as it is, and wait as it does: for samples (a self-critique), for work (a grader, a
# server), or for nothing. A scorer is given the completions of a problem, responses or refinements; a critic the
# responses that are refined, each with its index in the group.
Attempts = Generator[Sample | Work, Any, list[Attempt]]
Scorer = Callable[[Posed, Kind, Sequence[Completion]], Attempts]
Chosen = Sequence[tuple[int, Attempt]]
Critiques = Generator[Sample | Work, Any, list[Critique]]
Criticise = Callable[[Posed, Chosen], Critiques]


@dataclasses.dataclass(frozen=True)
class Method:
    """How the problems of a run are sampled, scored, criticised and refined: the same for all steps."""

    samples: int  # responses to a problem
    scorer: Scorer
    criticise: Criticise
    tokenizer: Tokenizer
    refine: RefineConfig
    seed: int
    texts: Texts = Texts()
    trace_tokens: int | None = None  # kept of a trace of the data, or of what `local` wrote; None: all
    local: Tokenizer | None = None  # that of the second model, where it writes the refinements


def by_rule(
    score: Score, tokenizer: Tokenizer, posed: Posed, kind: Kind, completions: Sequence[Completion]
) -> Attempts:
    """Attempts that are scored in a thread, while others are decoded."""
    items = [(posed.problem, completion, tokenizer.decode(completion.ids)) for completion in completions]
    return (yield Work(functools.partial(score, items, step=posed.step), "score"))


def story(posed: Iterator[Posed], method: Method) -> Story:
    """The next problem from its question to its group (arXiv 2506.03106, section 4).

    If the rewards of a group are all alike, which leaves no gradient, the story goes on with another one while there
    are any. Which problems are taken in all does not depend on the order in which the stories of a step do so: the
    samples of a problem follow from its number, and each group without a gradient takes one problem more.

    A truncated response or refinement keeps exactly its sampled ids: no end-of-sequence id is added. A trace of the
    data stands for a refinement, and is scored and trained on as one (arXiv 2504.14945). What a second model wrote is
    tokenized again by the policy's tokenizer.

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
        scored = (yield from method.scorer(one, Kind.REFINEMENT, completions)) if completions else []
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
    """Everything that was sampled for a problem, and which rows of it are trained on."""
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
    """The refinements of a problem, and the origin of each. The critiques are also written into `responses`."""
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

    asked: list[tuple[int, int | None, list[int] | None]]  # number of the refinement, Attempt.source, prompt
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
    phase: Phase = contextlib.nullcontext,
    threads: int = 2,
    spare: Iterable[Problem] = (),
) -> Stories:
    """The stories of a step, one for each problem; see `groups_of` for their results.

    The refinements of a problem are asked for soon after its last response has ended, while others are still sampled.

    Args:
      spare: problems that replace those whose rewards are all alike, one by one, taken as far as they are needed.
        The step has more groups then, of which as many are trained on as there are `problems`.
    """
    posed = (Posed(problem, number, step) for number, problem in enumerate(itertools.chain(problems, spare)))
    return Stories([story(posed, method) for _ in problems], phase, threads)


def groups_of(stories: Stories) -> list[Group]:
    """The groups of all problems that were taken, in the order of the problems.

    There are as many with rows to train on as there are stories: of the groups without a gradient, the first ones train
    nothing.
    """
    groups = [group for _, group in sorted(itertools.chain(*stories), key=lambda numbered: numbered[0])]
    surplus = len(groups) - len(stories.stories)
    for place in [place for place, group in enumerate(groups) if group.alike][:surplus]:
        groups[place] = dataclasses.replace(groups[place], kept=(), selected=(), own_group=())
    return groups


# ---- Refinement: which responses, under which prompt, and which refinements are trained on ----
def refinement_prompt(
    tokenizer: Tokenizer,
    problem: Problem,
    attempts: Sequence[tuple[str, str]],
    budget: int,
    write: RefinementPrompt = refinement_messages,
) -> list[int] | None:
    """Ids of the prompt for a refinement of some (solution, critique), of `budget` ids at most; see `fitted`."""
    critiques = [critique for _, critique in attempts]

    def messages(*solutions: str) -> Sequence[Message]:
        return write(problem.question, list(zip(solutions, critiques, strict=True)))

    return fitted(tokenizer, messages, [text for text, _ in attempts], budget)


def _level(lengths: Sequence[int], room: int) -> int:
    """The largest number to which all lengths may be cut so that their sum is at most `room`."""
    level = 0
    for left, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        level = room // left
        if length > level:
            break
        room -= length
    return level


def fitted(
    tokenizer: Tokenizer, messages: Callable[..., Sequence[Message]], texts: Sequence[str], budget: int
) -> list[int] | None:
    """Ids of the prompt with these solutions, of `budget` ids at most.

    If it is too long, the middle of the longest solutions is replaced by a mark, and as much is kept of their beginning
    as of their end. Nothing else is cut. None where that is not enough, or where the chat template rewrites a text.
    """

    def encode(solutions: Sequence[str]) -> list[int]:
        return tokenizer.encode_chat(messages(*solutions))

    def cut(text: str, ids: list[int], keep: int) -> str:
        if len(ids) <= keep:
            return text
        return tokenizer.decode(ids[: keep - keep // 2]) + CUT + tokenizer.decode(ids[len(ids) - keep // 2 :])

    try:
        ids = encode(texts)
        if len(ids) <= budget:
            return ids
        ids_of, bare = [tokenizer.encode_text(text) for text in texts], encode([CUT] * len(texts))
        keep = _level([len(own) for own in ids_of], budget - len(bare))
        while keep > 0:
            ids = encode([cut(text, own, keep) for text, own in zip(texts, ids_of, strict=True)])
            if len(ids) <= budget:
                return ids
            over = len(ids) - budget  # a cut can change how the text beside it is tokenized
            keep -= -(-over // sum(len(own) > keep for own in ids_of))
        return bare if len(bare) <= budget else None
    except PromptError:
        return None


def as_sampled(tokenizer: Tokenizer, text: str, most: int | None, ended: bool = True) -> Completion:
    """A text that the policy did not sample (a trace of the data, or of another model) as if it had been sampled.

    An end-of-turn id is added where the text has `ended`. It also ends at a stop text, as a sampled one would. A text
    of more than `most` ids is cut, has no end, and is scored as it is then. The log-probabilities mean nothing.
    """
    said = stop.before(text, tokenizer.stops)
    ended = ended or said != text
    ids = np.asarray([*tokenizer.encode_text(said), *[tokenizer.end_id] * ended], np.int32)
    finished, ids = ended and (most is None or len(ids) <= most), ids[:most]
    return Completion(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32), finished)


def refined_responses(attempts: Sequence[Attempt], trigger: str) -> list[int]:
    """Indices of the responses to a problem that are refined, by `refine.trigger`."""
    wrong = [i for i, attempt in enumerate(attempts) if not attempt.correct]
    if trigger == "always":
        return list(range(len(attempts)))
    if trigger == "any_wrong":
        return wrong
    return wrong if trigger == "none_correct" and len(wrong) == len(attempts) else []


def select(correct: Sequence[bool], k: int, how: str, rng: np.random.Generator) -> tuple[int, ...]:
    """Indices of the k refinements that are trained on, correct ones first unless `how` is "random"."""
    order = list(range(len(correct))) if how == "correct_first" else rng.permutation(len(correct)).tolist()
    if how != "random":
        order.sort(key=lambda i: not correct[i])  # stable: keeps the drawn order within each kind
    return tuple(order[:k])
