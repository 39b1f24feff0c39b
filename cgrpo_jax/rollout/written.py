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
from cgrpo_jax.rollout.verdicts import NEEDS, inverted, is_asked_about, judged, or_fallback
from cgrpo_jax.text.prompts import CriticPrompt, critique_messages
from cgrpo_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Writer:
    """How a model writes critiques."""

    tokenizer: Tokenizer
    cfg: RefineConfig
    reference: str  # what the critic is shown, one of options.REFERENCES
    needs: str  # of a usable critique, see `judged`
    concludes: bool = True  # the critic is asked for a verdict
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
        text, written = self.tokenizer.decode(completion.ids), len(completion.ids)
        return judged(text, completion.finished, correct, self.needs, before, written)


class LocalCritic(NamedTuple):
    """The second model as a critic."""

    tokenizer: Tokenizer
    reference: str


def by_model(writer: Writer) -> Critic:
    """A critic that is asked anew while what it wrote is not usable, `refine.critique_tries` times."""

    def critic(
        problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
    ) -> Generator[Sample | Work, Any, list[Critique]]:
        found = {g: Critique(None) for g, _ in attempts}
        for round_ in range(writer.cfg.critique_tries):
            asked = []
            for g, attempt in attempts:
                if found[g].text is None and is_asked_about(attempt, writer.cfg):
                    asked.append(
                        (attempt, writer.request(problem, Name(Kind.CRITIQUE, number, g, round_), attempt.text))
                    )
            requests = [request for _, request in asked if request is not None]
            completions = iter((yield Sample(requests)))
            for attempt, request in asked:
                if request is not None:
                    g = request.name.sample
                    found[g] = writer.critique(next(completions), attempt.correct, found[g])
        return [or_fallback(found[g], problem, attempt, writer.cfg, writer.reference) for g, attempt in attempts]

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


def turned_round(critic: Critic) -> Critic:
    """The control of the paper's appendix C: each critique with the opposite verdict; unusable where it has none."""

    def opposite(
        problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
    ) -> Generator[Sample | Work, Any, list[Critique]]:
        critiques = yield from critic(problem, number, attempts)
        return [one._replace(text=inverted(one.text)) if one.text is not None else one for one in critiques]

    return opposite


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
    scorer = rule
    if server is not None:
        critic = by_server(server, cfg, prompt)
    elif own is not None:
        critic = by_function(own)
    elif cfg.critique in TEMPLATES:
        critic = templated(TEMPLATES[cfg.critique])
    elif cfg.critique == "offline":
        critic = offline
    elif cfg.critique == "local":
        assert local is not None  # it has been opened with the run
        writer = Writer(local.tokenizer, cfg, local.reference, NEEDS[cfg.critique_accept], prompt=prompt, model=LOCAL)
        critic = by_model(writer)
    elif cfg.critique == "self_eval":
        critic, scorer = evaluated, self_evaluation(Writer(tokenizer, cfg, "none", "verdict", prompt=prompt), rule)
    elif cfg.critique == "no_verdict":
        critic = by_model(Writer(tokenizer, cfg, "none", "text", concludes=False, prompt=prompt))
    else:
        critic = by_model(Writer(tokenizer, cfg, "gt", NEEDS[cfg.critique_accept], prompt=prompt))
    return turned_round(critic) if cfg.inverted else critic, scorer
