"""Records of the host side, one per stage: Problem -> Attempt -> Group -> Segment.

The name of an array ends in a letter for each axis (`logp_BT`); a digit is a length. The letters, everywhere:

    A bins of an update                  B rows of a batch                    C tokens of a decode chunk
    D width of the model                 E end-of-sequence ids                F width of the MLP
    G rows of one problem                H dimensions of a head               I tokens of a bin, one after another
    J blocks of the vocabulary           K key/value heads                    L layers
    M query heads of a key/value head    N query heads                        O tasks of an evaluation
    P problems                           Q prompts run through the model      R rows of an engine
    S slots of a KV cache (keys)         T tokens of a row (queries)          U distinct values of a sample
    V entries of the vocabulary          W entries of a block                 X numbers of samples, the k of pass@k
    Y queries of a key/value head        Z distinct problems
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

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
    grader: str = "math"  # a key of grading.grader.GRADERS
    tag: str = ""  # evaluation reports each tag on its own, e.g. "hard"
    entry: Mapping[str, Any] | None = None  # what its grader needs beside the answer
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the row's other values, as JSON has them
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # all of them, where reward.fn is given them
    chat: bool = False  # the row holds chat turns of its own


class Verdict(NamedTuple):
    """What a grader finds of one answer."""

    reward: float
    correct: bool
    status: str  # "ok", or why there is no verdict: "timeout", "memory", "died", "error", "no_reward"
    parts: Mapping[str, float] | None = None  # what each function of reward.fn gave

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


class Name(NamedTuple):
    """Names a sequence within a step; its first four parts name its random numbers, with seed and step.

    Round 0 folds nothing into the key. `task` tells the sequences of several tasks of one queue apart.
    """

    kind: Kind
    problem: int
    sample: int
    round: int = 0
    task: int = 0


POLICY, LOCAL = 0, 1  # models that are sampled from; the second is options.LocalConfig


class Request(NamedTuple):
    """One sequence to sample."""

    name: Name
    prompt_ids: Sequence[int]
    limit: int | None = None  # tokens to draw at most; None: sampling.max_new_tokens
    model: int = POLICY  # the model that writes it: POLICY or LOCAL; `prompt_ids` are its tokenizer's


class Completion(NamedTuple):
    """Sampled ids, including what ended them, and their log-probabilities.

    What ended them is an end-of-sequence id, or the ids that spell a stop text (`sampling.stop`). It has a loss as all
    sampled ids have, for it is how the model ended. What was decoded after a stop text, before anybody looked, is not
    part of the completion.

    Ids that the policy did not draw may stand among them: a forced beginning, the turn of somebody else. They are
    context of the ids that follow, have no loss and are not counted as tokens; their `logp` and `kept` mean nothing. A
    text that is trained on as if the policy had drawn it (`collect.as_sampled`) has a loss at each id.
    """

    ids: np.ndarray  # int32 [length]
    logp: np.ndarray  # float32 [length]: full support, at the sampling temperature
    kept: np.ndarray  # float32 [length]: probability mass that top-k and top-p left to draw from
    finished: bool  # ended by an end-of-sequence id or a stop text, not by the length limit
    sampled_T: np.ndarray | None = None  # bool [length], which ids the policy drew; None: all of them

    @property
    def has_loss_T(self) -> np.ndarray:
        """Which ids have a loss, bool `[length]`: those in `sampled_T`."""
        return np.ones(len(self.ids), bool) if self.sampled_T is None else self.sampled_T

    @property
    def tokens(self) -> int:
        """How many ids have a loss: the length that metrics and normalisers count."""
        return int(self.has_loss_T.sum())


Done = Sequence[tuple[Request, Completion]]


class Critique(NamedTuple):
    """What a critic made of an attempt; no text: nothing usable, and the attempt is not refined."""

    text: str | None
    verdict: bool | None = None  # what the last try concludes; None: it cannot be read, or this critic never says
    agrees: bool | None = None  # whether that is what the rule says; None without a verdict
    tries: int = 0  # critiques that a model wrote of this attempt
    tokens: int = 0  # written in all tries
    fallback: bool = False  # no try was usable, so a template stands in
    first_agrees: bool | None = None  # as `agrees`, of the first try


class Segment(NamedTuple):
    """One sequence to train on under a prompt, with plain numbers per token `[T]`: every normaliser is in them.

    loss = - sum_t [ surrogate(x_t, pg_t) + ce_t log p_t + ent_t H_t - kl_t k3_t ],  x_t the token's ratio or shape
    """

    prompt_ids: Sequence[int]
    ids: np.ndarray  # int32
    refined: bool  # x_t is the shaped probability, not the importance ratio
    pg_T: np.ndarray  # float64: weight x advantage over the normaliser, signed
    ce_T: np.ndarray  # float64: of the log-likelihood (supervised)
    ent_T: np.ndarray  # float64: of the entropy
    kl_T: np.ndarray  # float64: of the k3 estimate against the reference
    sampler_logp_T: np.ndarray | None = None  # float32, under the prompt that was sampled from
    sampled_T: np.ndarray | None = None  # bool, as in `Completion`; ids that are not sampled have weight 0; None: all

    @property
    def silent(self) -> bool:
        """Whether all weights are zero: such a segment has a gradient of exactly zero."""
        return not any(weight_T.any() for weight_T in (self.pg_T, self.ce_T, self.ent_T, self.kl_T))


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A scored response or refinement."""

    completion: Completion
    text: str
    reward: float
    correct: bool
    extracted: str | None  # the answer found in the text
    status: str  # of its verdict
    critique: Critique | None = None  # under which it is refined, where it is
    evaluation: Critique | None = None  # the policy's own, where the reward is its verdict
    source: int | None = None  # refinements: index of the response it refines; None: of several, or of none
    prompt_ids: Sequence[int] | None = None  # of a refinement by the policy: the prompt it was sampled under
    parts: Mapping[str, float] | None = None  # of the reward, where functions of the user give it


@dataclasses.dataclass(frozen=True)
class Group:
    """One problem of a step with everything sampled for it, and what is trained on: nothing where it was replaced."""

    problem: Problem
    prompt_ids: Sequence[int]  # the question-only prompt, under which every row of the group is trained
    responses: tuple[Attempt, ...]
    refinements: tuple[Attempt, ...]  # all that were sampled; empty where refinement was not triggered
    kept: tuple[int, ...]  # indices of the responses that are trained on
    selected: tuple[int, ...]  # indices of the refinements that are trained on
    own_group: tuple[int, ...] = ()  # those trained on under their own prompts, in a second group

    @property
    def alike(self) -> bool:
        """Whether the rewards of all rows that share a baseline are the same: no advantage, so no gradient."""
        first = {attempt.reward for attempt, _ in self.rows()}
        second = {self.refinements[i].reward for i in self.own_group}
        return len(first) < 2 and len(second) < 2

    def rows(self) -> list[tuple[Attempt, bool]]:
        """(attempt, is refinement) of the rows to train on."""
        return [(self.responses[i], False) for i in self.kept] + [(self.refinements[i], True) for i in self.selected]
