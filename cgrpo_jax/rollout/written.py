"""Critiques that the policy or a second model writes, and verdicts of the policy's own.

After arXiv 2506.03106, appendices G and H. A critique ends in a conclusion. Where there is a rule, one that concludes
otherwise is written anew, a few times; then a fallback stands in, and is counted. Model text is hostile: nothing of it
is evaluated, and no reasoning block is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.options import RefineConfig
from cgrpo_jax.records import (
    LOCAL,
    POLICY,
    Attempt,
    Completion,
    Critique,
    Kind,
    Message,
    Name,
    Problem,
    Request,
)
from cgrpo_jax.rollout.collect import Critic, Scorer
from cgrpo_jax.rollout.critics import TEMPLATES, offline, shown_truth, templated
from cgrpo_jax.rollout.own_critic import OwnCritic, by_function
from cgrpo_jax.rollout.refining import fitted
from cgrpo_jax.rollout.served import Server, by_server
from cgrpo_jax.rollout.stories import Sample, Work
from cgrpo_jax.rollout.verdicts import or_fallback, usable, verdict_of
from cgrpo_jax.text.prompts import CriticPrompt, critique_messages
from cgrpo_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Writer:
    """How a model writes critiques."""

    tokenizer: Tokenizer
    cfg: RefineConfig
    reference: str  # what the critic is shown, one of options.REFERENCES
    concludes: bool  # the critic is asked for a verdict
    must_agree: bool  # a verdict that is not that of the rule makes a critique unusable
    prompt: CriticPrompt = critique_messages
    model: int = POLICY  # whose tokenizer it is

    def request(self, problem: Problem, name: Name, solution: str) -> Request | None:
        """None where the solution does not fit."""

        def messages(shown: str) -> Sequence[Message]:
            truth = shown_truth(problem, self.reference)
            return self.prompt(problem.question, shown, truth, self.concludes)

        ids = fitted(self.tokenizer, messages, [solution], self.cfg.max_prompt_tokens)
        return None if ids is None else Request(name, ids, self.cfg.critique_tokens or None, self.model)

    def critique(self, completion: Completion, correct: bool, before: Critique) -> Critique:
        """What one more text makes of a critique."""
        whole = self.tokenizer.decode(completion.ids)
        text, verdict = usable(whole), verdict_of(usable(whole) if self.concludes else "")
        agrees = None if verdict is None else verdict == correct
        heard = not self.concludes or (verdict is not None and (agrees or not self.must_agree))
        good = bool(text) and heard
        return Critique(text if good else None, verdict, agrees, before.tries + 1, before.tokens + len(completion.ids))


class LocalCritic(NamedTuple):
    """The second model as a critic."""

    tokenizer: Tokenizer
    reference: str


def by_model(writer: Writer) -> Critic:
    """A critic whose verdict must be that of the rule."""

    def critic(
        problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
    ) -> Generator[Sample | Work, Any, list[Critique]]:
        found = {g: Critique(None) for g, _ in attempts}
        for round_ in range(writer.cfg.critique_tries):
            asked = []
            for g, attempt in attempts:
                if found[g].text is None:
                    asked.append(
                        (attempt, writer.request(problem, Name(Kind.CRITIQUE, number, g, round_), attempt.text))
                    )
            requests = [request for _, request in asked if request is not None]
            completions = iter((yield Sample(requests)))
            for attempt, request in asked:
                if request is not None:
                    g = request.name.sample
                    found[g] = writer.critique(next(completions), attempt.correct, found[g])
        return [or_fallback(found[g], problem, attempt, writer.cfg) for g, attempt in attempts]

    return critic


def self_evaluation(writer: Writer, rule: Scorer) -> Scorer:
    """Rewards are the policy's own verdicts, of responses and of refinements; the rule only measures agreement.

    An attempt of which no verdict can be read is taken for wrong, and its critique is not usable.
    """

    def scorer(
        problem: Problem, number: int, kind: Kind, completions: Sequence[Completion]
    ) -> Generator[Sample | Work, Any, list[Attempt]]:
        attempts = yield from rule(problem, number, kind, completions)
        round_ = 0 if kind == Kind.RESPONSE else 1
        asked = [
            writer.request(problem, Name(Kind.CRITIQUE, number, g, round_), attempt.text)
            for g, attempt in enumerate(attempts)
        ]
        texts = iter((yield Sample([request for request in asked if request is not None])))
        judged = []
        for attempt, request in zip(attempts, asked, strict=True):
            critique = Critique(None)
            if request is not None:
                critique = writer.critique(next(texts), attempt.correct, critique)
            judged.append(_judged(attempt, critique))
        return judged

    return scorer


def _judged(attempt: Attempt, critique: Critique) -> Attempt:
    right, status = critique.verdict is True, "ok" if critique.verdict is not None else "no_verdict"
    return dataclasses.replace(attempt, reward=float(right), correct=right, status=status, evaluation=critique)


def evaluated(
    problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
) -> Generator[Sample | Work, Any, list[Critique]]:
    """The critic beside `self_evaluation`: the critiques are there already."""
    yield from ()
    return [attempt.evaluation or Critique(None) for _, attempt in attempts]


def critic_and_scorer(
    cfg: RefineConfig,
    tokenizer: Tokenizer,
    rule: Scorer,
    server: Server | None = None,
    prompt: CriticPrompt = critique_messages,
    local: LocalCritic | None = None,
    own: OwnCritic | None = None,
) -> tuple[Critic, Scorer]:
    """Who criticises as `refine.critique` says, and who scores: the rule, but for self_eval.

    Args:
      server: of critique=api.
      prompt: of a critic that is a model.
      local: of critique=local.
      own: of critique=function.
    """
    if server is not None:
        return by_server(server, cfg, prompt), rule
    if own is not None:
        return by_function(own), rule
    if cfg.critique in TEMPLATES:
        return templated(TEMPLATES[cfg.critique]), rule
    if cfg.critique == "offline":
        return offline, rule
    if cfg.critique == "local":
        assert local is not None  # it has been opened with the run
        writer = Writer(
            local.tokenizer, cfg, local.reference, concludes=True, must_agree=True, prompt=prompt, model=LOCAL
        )
        return by_model(writer), rule
    writer = Writer(
        tokenizer,
        cfg,
        reference="gt" if cfg.critique == "self_gt" else "none",
        concludes=cfg.critique != "no_verdict",
        must_agree=cfg.critique == "self_gt",
        prompt=prompt,
    )
    if cfg.critique == "self_eval":
        return evaluated, self_evaluation(writer, rule)
    return by_model(writer), rule
