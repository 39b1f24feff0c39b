"""Critics of a run: those that the policy or a second model writes, and what is set up for any critic before step 1.

After arXiv 2506.03106, appendices G and H. A sampled critique ends in a conclusion. Where the rule says otherwise, the
critique is written anew, a few times; then the fallback is used, and counted. The text may be hostile: nothing of it is
evaluated, and its reasoning block is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from cgrpo_jax.data.cells import worked_solution
from cgrpo_jax.data.sources import Problems
from cgrpo_jax.errors import CriticError
from cgrpo_jax.records import LOCAL, POLICY, Attempt, Completion, Critique, Kind, Name, Problem, Request
from cgrpo_jax.rollout.collect import Attempts, Chosen, Criticise, Critiques, Posed, Scorer, fitted
from cgrpo_jax.rollout.critics import TEMPLATES, Brief, OwnCritic, inverted, offline, templated, verdict_of
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.stories import Sample, Work
from cgrpo_jax.text.tokenizer import Tokenizer

PLACE = "I do not know."  # shown in the place of an attempt of the policy
EDGE = 300  # characters of a long text that are shown of its beginning and of its end


@dataclasses.dataclass(frozen=True)
class SampledCritic:
    """A critic that is sampled by an engine of the run."""

    brief: Brief
    tokenizer: Tokenizer  # of the model
    model: int = POLICY  # or LOCAL

    def request(self, problem: Problem, name: Name, solution: str) -> Request | None:
        """The request for a critique of a solution; None where the solution does not fit its prompt."""
        cfg = self.brief.cfg
        messages = functools.partial(self.brief.messages, problem)
        ids = fitted(self.tokenizer, messages, [solution], cfg.max_prompt_tokens)
        return None if ids is None else Request(name, ids, cfg.critique_tokens or None, self.model)

    def write(
        self, posed: Posed, attempts: Mapping[int, Attempt], before: Mapping[int, Critique], round_: int
    ) -> Generator[Sample | Work, Any, dict[int, Critique]]:
        """The critiques `before`, after one more text for each of these attempts that fits the prompt.

        Args:
          round_: in the names of the requests, so that each round has its own random numbers.
        """
        names = {g: Name(Kind.CRITIQUE, posed.number, g, round_) for g in attempts}
        asked = [self.request(posed.problem, names[g], attempt.text) for g, attempt in attempts.items()]
        requests = [request for request in asked if request is not None]
        completions = yield Sample(requests)
        critiques = dict(before)
        for request, completion in zip(requests, completions, strict=True):
            g, text, tokens = request.name.sample, self.tokenizer.decode(completion.ids), len(completion.ids)
            critiques[g] = self.brief.judged(text, completion.finished, attempts[g].correct, before[g], tokens)
        return critiques


def by_model(model: SampledCritic, posed: Posed, chosen: Chosen) -> Critiques:
    """The critiques of a model that is sampled here, which writes one anew while it does not count."""
    brief, found = model.brief, {g: Critique(None) for g, _ in chosen}
    for round_ in range(brief.cfg.critique_tries):
        wanting = {g: attempt for g, attempt in chosen if found[g].text is None and brief.asks_about(attempt)}
        found = yield from model.write(posed, wanting, found, round_)
    return [brief.or_fallback(found[g], posed.problem, attempt) for g, attempt in chosen]


def criticised(server: Server, brief: Brief, problem: Problem, attempt: Attempt) -> Critique:
    """A critique by a server, written anew while it does not count. A fault ends it: the client has tried again."""
    messages, found = brief.messages(problem, attempt.text), Critique(None)
    for number in range(brief.cfg.critique_tries if brief.asks_about(attempt) else 0):
        reply = server.ask(messages, number)
        found = brief.judged(reply.text or "", reply.finished, attempt.correct, found, reply.written)
        if found.text is not None or reply.fault is not None:
            break
    return brief.or_fallback(found, problem, attempt)


def by_server(server: Server, brief: Brief, posed: Posed, chosen: Chosen) -> Critiques:
    """The critiques of a server. All are requested at once, and waited for while others are decoded."""
    futures = [server.threads.submit(criticised, server, brief, posed.problem, attempt) for _, attempt in chosen]
    return (yield Work(lambda: [future.result() for future in futures], "critique", remote=True))


def by_function(own: OwnCritic, brief: Brief, posed: Posed, chosen: Chosen) -> Critiques:
    """The critiques of a function of the user. It is called once for all of them, while others are decoded."""
    attempts = [attempt for _, attempt in chosen]
    texts = yield Work(functools.partial(own.texts, posed.problem, attempts, posed.step), "critique")
    critiques = []
    for text, attempt in zip(texts, attempts, strict=True):
        verdict = verdict_of(text or "", finished=True)
        agrees = None if verdict is None else verdict == attempt.correct
        critique = Critique(text, verdict, agrees, tries=1, first_agrees=agrees)
        critiques.append(brief.or_fallback(critique, posed.problem, attempt))
    return critiques


def self_evaluation(
    model: SampledCritic, rule: Scorer, posed: Posed, kind: Kind, completions: Sequence[Completion]
) -> Attempts:
    """Attempts whose rewards are the policy's own verdicts, of responses and of refinements.

    The verdicts of the rule are used only to measure agreement. An attempt whose critique has no verdict counts as
    wrong, and is not refined.
    """
    attempts = yield from rule(posed, kind, completions)
    before = {g: Critique(None) for g in range(len(attempts))}
    found = yield from model.write(posed, dict(enumerate(attempts)), before, 0 if kind == Kind.RESPONSE else 1)
    judged = []
    for attempt, critique in zip(attempts, found.values(), strict=True):
        right, status = critique.verdict is True, "no_verdict" if critique.verdict is None else "ok"
        scored = dataclasses.replace(attempt, reward=float(right), correct=right, status=status)
        judged.append(dataclasses.replace(scored, evaluation=critique))
    return judged


def evaluated(posed: Posed, chosen: Chosen) -> Critiques:
    """The critic of a run with `self_evaluation`, which has made the critiques."""
    yield from ()
    return [attempt.evaluation or Critique(None) for _, attempt in chosen]


def turned_round(criticise: Criticise, posed: Posed, chosen: Chosen) -> Critiques:
    """The control of the paper's appendix C: each critique has the opposite verdict, or no text where it has none."""
    critiques = yield from criticise(posed, chosen)
    return [one._replace(text=inverted(one.text)) if one.text is not None else one for one in critiques]


def critic_and_scorer(
    brief: Brief,
    tokenizer: Tokenizer,
    rule: Scorer,
    server: Server | None = None,
    second: Tokenizer | None = None,
    own: OwnCritic | None = None,
) -> tuple[Criticise, Scorer]:
    """The critic and the scorer of a run. The scorer is `rule`, unless the verdicts of the critic are the rewards.

    Args:
      tokenizer: of the policy.
      server, second, own: what a critic of that kind asks (`second` is the second model's tokenizer). They may be None
        in a run that refines nothing, whose critic is never asked.
    """
    critic, policy, scorer = brief.critic, SampledCritic(brief, tokenizer), rule
    criticise: Criticise
    if server is not None:
        criticise = functools.partial(by_server, server, brief)
    elif own is not None:
        criticise = functools.partial(by_function, own, brief)
    elif critic.name in TEMPLATES:
        criticise = functools.partial(templated, TEMPLATES[critic.name])
    elif critic.by == "column":
        criticise = offline
    elif critic.scores:
        criticise, scorer = evaluated, functools.partial(self_evaluation, policy, rule)
    elif critic.by == "second" and second is not None:
        criticise = functools.partial(by_model, SampledCritic(brief, second, LOCAL))
    else:
        criticise = functools.partial(by_model, policy)
    return (functools.partial(turned_round, criticise) if brief.cfg.inverted else criticise), scorer


def _excerpt(text: str) -> str:
    """A text as one line; of a long one both ends."""
    line = " ".join(text.split())
    return line if len(line) <= 2 * EDGE else f"{line[:EDGE]} [...] {line[-EDGE:]}"


def _solutions(problems: Problems, critic: str, source: str) -> str:
    """Names the columns of the worked solutions that a critic is shown. Raises CriticError where no row has one."""
    count = problems.size or 1
    found = [worked_solution(problems.get(index)) for index in range(count)]
    columns = sorted({one.column for one in found if one is not None})
    if not columns:
        raise CriticError(
            f"{critic}.reference = 'solution': {source} has no worked solution in a column `solution`, `target` or "
            "`answer`; `gt` shows the final answer"
        )
    without = sum(one is None for one in found)
    rest = f"; {without} of {count} rows have none: their final answer alone" if without else ""
    return f"the data's {' and '.join(f'`{column}`' for column in columns)}{rest}"


def introduce(brief: Brief, problems: Problems, source: str, server: Server | None, log: Callable[[str], None]) -> None:
    """Logs what a critic that is a model is shown, with the first row as example; asks a server once.

    Args:
      source: data.source, the source of the problems.

    Raises:
      CriticError: it is to be shown a solution and the data hold none, or what `Server.check` raises.
    """
    critic, first = brief.critic, problems.get(0)
    if not critic.is_model:
        return
    shown = {"none": "nothing else", "gt": "the final answer"}.get(brief.reference)
    shown = shown or _solutions(problems, critic.name, source)
    messages = brief.messages(first, PLACE)
    log(
        f"the critic ({critic.name}) is shown question, attempt and {shown}; of the first row, with "
        f"{PLACE!r} as the attempt: {_excerpt(messages[-1]['content'])}"
    )
    if server is None:
        return
    reply = server.check(messages)
    if server.form:
        log(f"api.model = {server.cfg.model!r}: {server.form}, for the server refused the request as it was")
    if reply.text is None:
        log(
            f"the critic was asked once and did not answer: {reply.fault}. The run goes on; where a request fails, "
            f"refine.critique_fallback = {brief.fallback} stands in"
        )
        return
    verdict = {True: "correct", False: "incorrect", None: "that cannot be read"}[verdict_of(reply.text, reply.finished)]
    log(f"it answered, with a verdict {verdict}: {_excerpt(reply.text)}")
