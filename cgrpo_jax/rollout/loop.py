"""The one loop of all sampling, in which stories, engines and hosts meet: of a rollout, an evaluation, a benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cgrpo_jax.process import stopping
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.records import Completion, Name, Request
from cgrpo_jax.rollout.stories import Sample, Stories, Story
from cgrpo_jax.sampling.engine import Engine
from cgrpo_jax.sampling.pool import Stats, summed


def run_stories(stories: Stories | None, engines: Sequence[Engine], hosts: Hosts = ONE_HOST) -> Stats:
    """Samples what the stories ask for until none of them asks for more; `Request.model` says by which engine.

    Engines with something to decode take turns, a chunk each: whose turn it is follows from tokens, never from clocks.

    Args:
      stories: of the leader; None on the other hosts, which sample what the leader's stories ask for.

    Raises:
      RequestError: no row holds a request, or its name is under way.
      Stopped: between two chunks, where a signal has come.
    """
    while True:
        stopping.look()
        idle = not any(engine.busy for engine in engines)
        requests, more = hosts.share(stories.due(idle) if stories else None)
        for model, engine in enumerate(engines):
            engine.submit([request for request in requests if request.model == model])
        busy = [engine for engine in engines if engine.busy]
        done = [item for engine in busy for item in engine.advance(more)]
        if busy and stories:
            stories.ended(sorted(done, key=_name_of))
        elif not busy and not more:
            late = stories.late if stories else 0
            return dataclasses.replace(summed(engine.stats for engine in engines), late=late)


def _name_of(item: tuple[Request, Completion]) -> Name:
    return item[0].name


def sample_all(
    engine: Engine, requests: Sequence[Request], ended: Callable[[], None] = lambda: None, more: bool = False
) -> list[Completion]:
    """Completions of requests that are all known at the beginning, in their order.

    Args:
      ended: called as each completion is there.
      more: rows are kept as if more might be asked, as in training.
    """

    def story(request: Request) -> Story:
        (completion,) = yield Sample([request], last=not more)
        ended()
        return completion

    with Stories([story(request) for request in requests]) as stories:
        run_stories(stories, [engine])
    return list(stories)
