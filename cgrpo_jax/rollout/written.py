"""Critiques that the policy or a second model writes, and verdicts of the policy's own.

After arXiv 2506.03106, appendices G and H. A critique ends in a conclusion. Where there is a rule, one that concludes
otherwise is written anew, a few times; then a fallback stands in, and is counted. Model text is hostile: nothing of it
is evaluated, and no reasoning block is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from cgrpo_jax.records import LOCAL, POLICY, Attempt, Completion, Critique, Kind, Name, Problem, Request
from cgrpo_jax.rollout.collect import Attempts, Chosen, Criticise, Critiques, Posed, Scorer
from cgrpo_jax.rollout.critics import TEMPLATES, Brief, offline, templated
from cgrpo_jax.rollout.own_critic import OwnCritic, by_function
from cgrpo_jax.rollout.refining import fitted
from cgrpo_jax.rollout.served import Server, by_server
from cgrpo_jax.rollout.stories import Sample
from cgrpo_jax.rollout.verdicts import inverted
from cgrpo_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that is sampled here and writes critiques."""

    brief: Brief
    tokenizer: Tokenizer
    model: int = POLICY  # whose tokenizer it is

    def request(self, problem: Problem, name: Name, solution: str) -> Request | None:
        """None where the solution does not fit."""
        cfg = self.brief.cfg
        messages = functools.partial(self.brief.messages, problem)
        ids = fitted(self.tokenizer, messages, [solution], cfg.max_prompt_tokens)
        return None if ids is None else Request(name, ids, cfg.critique_tokens or None, self.model)

    def critique(self, completion: Completion, correct: bool, before: Critique) -> Critique:
        """What one more text makes of a critique."""
        text, written = self.tokenizer.decode(completion.ids), len(completion.ids)
        return self.brief.judged(text, completion.finished, correct, before, written)


def by_model(writer: Writer) -> Criticise:
    """A critic that is asked anew while what it wrote does not count, `refine.critique_tries` times."""
    brief = writer.brief

    def criticise(posed: Posed, chosen: Chosen) -> Critiques:
        problem, number, _ = posed
        found = {g: Critique(None) for g, _ in chosen}
        for round_ in range(brief.cfg.critique_tries):
            asked = []
            for g, attempt in chosen:
                if found[g].text is None and brief.asks_about(attempt):
                    request = writer.request(problem, Name(Kind.CRITIQUE, number, g, round_), attempt.text)
                    asked += [(attempt, request)] if request is not None else []
            completions = yield Sample([request for _, request in asked])
            for (attempt, request), completion in zip(asked, completions, strict=True):
                g = request.name.sample
                found[g] = writer.critique(completion, attempt.correct, found[g])
        return [brief.or_fallback(found[g], problem, attempt) for g, attempt in chosen]

    return criticise


def self_evaluation(writer: Writer, rule: Scorer) -> Scorer:
    """Rewards are the policy's own verdicts, of responses and of refinements; the rule only measures agreement.

    An attempt of which no verdict can be read is taken for wrong, and its critique does not count.
    """

    def scorer(posed: Posed, kind: Kind, completions: Sequence[Completion]) -> Attempts:
        attempts = yield from rule(posed, kind, completions)
        round_ = 0 if kind == Kind.RESPONSE else 1
        asked = [
            writer.request(posed.problem, Name(Kind.CRITIQUE, posed.number, g, round_), attempt.text)
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


def evaluated(posed: Posed, chosen: Chosen) -> Critiques:
    """The critic beside `self_evaluation`: the critiques are there already."""
    yield from ()
    return [attempt.evaluation or Critique(None) for _, attempt in chosen]


def turned_round(criticise: Criticise) -> Criticise:
    """The control of the paper's appendix C: each critique with the opposite verdict; unusable where it has none."""

    def opposite(posed: Posed, chosen: Chosen) -> Critiques:
        critiques = yield from criticise(posed, chosen)
        return [one._replace(text=inverted(one.text)) if one.text is not None else one for one in critiques]

    return opposite


def critic_and_scorer(
    brief: Brief,
    tokenizer: Tokenizer,
    rule: Scorer,
    server: Server | None = None,
    second: Tokenizer | None = None,
    own: OwnCritic | None = None,
) -> tuple[Criticise, Scorer]:
    """The critic of a run, bound to what it asks; and who scores: the rule, or the critic itself.

    Args:
      tokenizer: of the policy.
      server, second, own: what a critic of that kind asks (`second` is the second model's tokenizer). A run that
        refines nothing has opened none of them, and its critic is never asked.
    """
    critic, policy, scorer = brief.critic, Writer(brief, tokenizer), rule
    criticise: Criticise
    if server is not None:
        criticise = by_server(server, brief)
    elif own is not None:
        criticise = by_function(own, brief)
    elif critic.name in TEMPLATES:
        criticise = templated(TEMPLATES[critic.name])
    elif critic.by == "column":
        criticise = offline
    elif critic.scores:
        criticise, scorer = evaluated, self_evaluation(policy, rule)
    elif critic.by == "second" and second is not None:
        criticise = by_model(Writer(brief, second, LOCAL))
    else:
        criticise = by_model(policy)
    return (turned_round(criticise) if brief.cfg.inverted else criticise), scorer
