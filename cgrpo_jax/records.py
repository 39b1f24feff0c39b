"""Records of the host side, one per stage: Problem -> Attempt -> Group."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np


class Message(TypedDict):
    """One chat turn."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with what is needed to ask it, score it and criticise answers to it."""

    question: str
    answer: str
    messages: tuple[Message, ...]  # the task prompt, as chat turns
    grader: str = "math"  # key of rewards.GRADERS
    tag: str = ""  # evaluation reports each tag on its own, e.g. "hard"
    entry: Mapping[str, Any] | None = None  # what its grader needs beside the answer
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the row's other values, as JSON has them


class Verdict(NamedTuple):
    """What a grader finds of one answer."""

    reward: float
    correct: bool
    status: str  # "ok", or why there is no verdict: "timeout", "memory", "died", "error"

    @classmethod
    def of(cls, correct: bool, status: str = "ok") -> Verdict:
        """Reward 1 for a correct answer, 0 for any other."""
        return cls(float(correct), correct, status)


class Kind(enum.IntEnum):
    """What a sampled sequence is for; part of the key of its random numbers."""

    RESPONSE = 0
    REFINEMENT = 1
    CRITIQUE = 2
    EVALUATION = 3


class Request(NamedTuple):
    """One sequence to sample. (kind, problem, sample) name it within a step."""

    prompt_ids: Sequence[int]
    kind: Kind
    problem: int
    sample: int
    limit: int | None = None  # tokens to draw at most; None: sampling.max_new_tokens


class Completion(NamedTuple):
    """Sampled ids, including the end-of-sequence id where one was sampled, and their log-probabilities."""

    ids: np.ndarray  # int32 [length]
    logp: np.ndarray  # float32 [length]: full support, at the sampling temperature
    kept: np.ndarray  # float32 [length]: probability mass that top-k and top-p left to draw from
    finished: bool  # ended by an end-of-sequence id, not by the length limit


FollowUp = Callable[[int, Completion], Sequence[Request]]  # (number of a request, its completion) -> further requests


class Generate(Protocol):
    """Samples requests, and those that `then` asks for as they end; completions in the order asked."""

    def __call__(self, requests: Sequence[Request], then: FollowUp | None = None) -> list[Completion]: ...


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A scored response or refinement."""

    completion: Completion
    text: str
    reward: float
    correct: bool
    extracted: str | None  # the answer found in the text
    status: str  # of its verdict
    critique: str | None = None  # of this attempt, where it was criticised
    source: int | None = None  # refinements: index of the response it refines


@dataclasses.dataclass(frozen=True)
class Group:
    """One problem of a step with everything sampled for it, and what is trained on."""

    problem: Problem
    prompt_ids: Sequence[int]  # the question-only prompt: every row of the group is trained under it
    responses: tuple[Attempt, ...]
    refinements: tuple[Attempt, ...]  # all that were sampled; empty where refinement was not triggered
    kept: tuple[int, ...]  # indices of the responses that are trained on
    selected: tuple[int, ...]  # indices of the refinements that are trained on

    def rows(self) -> list[tuple[Attempt, bool]]:
        """(attempt, is refinement) of the rows to train on."""
        return [(self.responses[i], False) for i in self.kept] + [(self.refinements[i], True) for i in self.selected]
