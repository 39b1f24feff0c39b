"""What a critic is shown, said before step 1 with the first row as example; and its server, asked once."""

from __future__ import annotations

from collections.abc import Callable

from cgrpo_jax.data.rows import worked_solution
from cgrpo_jax.data.sources import Problems
from cgrpo_jax.errors import CriticError
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.verdicts import verdict_of

PLACE = "I do not know."  # where the attempt of the policy will stand
EDGE = 300  # characters of a long text that are shown from either end


def _excerpt(text: str) -> str:
    """A text in one line; of a long one both ends."""
    line = " ".join(text.split())
    return line if len(line) <= 2 * EDGE else f"{line[:EDGE]} [...] {line[-EDGE:]}"


def _solutions(problems: Problems, critic: str, source: str) -> str:
    """Which column a critic is shown. Raises CriticError where reference=solution finds none at all."""
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
    """Says what a critic that is a model is shown, and asks its server once.

    Args:
      source: data.source, from which the problems are.

    Raises:
      CriticError: it is to be shown a solution, and the data hold none; or see `Server.check`.
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
