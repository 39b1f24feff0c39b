"""The one loop in which everything is sampled, and the stories that make the requests.

A story is a generator for one problem: it yields what it waits for (`Sample` or `Work`), and is sent the result. Work
is a call, say of a grader, that runs in a thread while the engines decode.

When the result of local work is delivered follows from tokens and not from clocks: work that begins after chunk c is
delivered after chunk c+1. Where it is not done by then, it is waited for once: as long as the last chunk took, or
PATIENCE if that is longer. Then decoding goes on, and the result is delivered when it is there. From then on the order
of the requests depends on a clock, so such cases are counted (`late`). Remote work is delivered when it arrives.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.process import stopping
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.records import Completion, Done, Name, Request
from cgrpo_jax.sampling.engine import Engine
from cgrpo_jax.sampling.pool import Stats, summed

GLANCE = 0.5  # seconds between two looks for a signal while something is waited for
REMOTE_THREADS = 1024  # at most; they only wait
PATIENCE = 1.0  # seconds; a verdict takes milliseconds, and one that takes seconds is better not waited for

Phase = Callable[[str], contextlib.AbstractContextManager]  # counts the seconds of its block under a name


class Sample(NamedTuple):
    """Wait for the completions of these requests, which are sent in the order of the requests."""

    requests: Sequence[Request]
    last: bool = False  # the story makes no more requests, so no rows need to be kept for it


class Work(NamedTuple):
    """Wait for the result of a call that runs in another thread."""

    call: Callable[[], Any]
    phase: str  # under which the seconds of waiting are counted
    remote: bool = False  # it runs on another machine, and may take any time


Story = Generator[Sample | Work, Any, Any]
Completions = dict[Name, Completion]


def run_stories(
    stories: Stories,
    engines: Sequence[Engine],
    hosts: Hosts = ONE_HOST,
    completions: Completions | None = None,
) -> Stats:
    """Samples what the stories ask for until none of them asks for more: of a rollout, an evaluation, a benchmark.

    `Request.model` is the index of the engine of a request. Engines decode a chunk each in turn, so that the order of
    what is sampled does not depend on how fast they are.

    Args:
      stories: those of the leader; the other hosts have none, and are sent the requests of the leader's stories.
      completions: is given everything that is sampled, on every host.

    Raises:
      RequestError: no row can hold a request, or another request of its name has not ended.
      Stopped: a signal has come; raised between two chunks.
    """
    while True:
        requests, more = hosts.share(lambda: stories.due(idle=not any(engine.busy for engine in engines)))
        for model, engine in enumerate(engines):
            engine.submit([request for request in requests if request.model == model])
        busy = [engine for engine in engines if engine.busy]
        done = [item for engine in busy for item in engine.advance(more)]
        if completions is not None:
            completions |= {request.name: completion for request, completion in done}
        if busy and hosts.leader:
            stories.ended(sorted(done, key=lambda item: item[0].name))
        elif not busy and not more:
            return dataclasses.replace(summed(engine.stats for engine in engines), late=stories.late)


def sample_all(
    engine: Engine, requests: Sequence[Request], ended: Callable[[], None] = lambda: None, more: bool = False
) -> list[Completion]:
    """Completions of requests that are all known at the beginning, in their order.

    Args:
      ended: called for each completion.
      more: rows are kept as in training, where more requests may come.
    """

    def story(request: Request) -> Story:
        (completion,) = yield Sample([request], last=not more)
        ended()
        return completion

    with Stories([story(request) for request in requests]) as stories:
        run_stories(stories, [engine])
    return list(stories)


class Due(NamedTuple):
    """What the engines are to do next."""

    requests: Sequence[Request] = ()
    more: bool = False  # some story may still make requests


@dataclasses.dataclass
class _Job:
    """Work that has begun."""

    story: int
    chunk: int  # how many chunks had ended when it began
    future: concurrent.futures.Future
    work: Work
    late: bool = False  # it was waited for once, and was not done

    def due(self, chunk: int) -> bool:
        """Whether its result is delivered after `chunk` chunks, see above."""
        done = self.future.done()
        return done if self.work.remote else self.chunk < chunk and (done or not self.late)


def _wait(futures: Sequence[concurrent.futures.Future]) -> None:
    """Waits until one of them is done. Raises Stopped where a signal has come."""
    while not any(future.done() for future in futures):
        stopping.look()
        concurrent.futures.wait(futures, GLANCE, concurrent.futures.FIRST_COMPLETED)


class Stories:
    """All stories of a step. Use as a context manager: leaving it waits for the work that has begun.

    It does not wait where the run is stopped (`stopping.Stopped`).

    Args:
      stories: generators, one for each problem.
      phase: counts the seconds of waiting under the name of the work.
      threads: for local work, which must not wait for other work.
    """

    def __init__(self, stories: Sequence[Story], phase: Phase = contextlib.nullcontext, threads: int = 2):
        self.stories, self.phase = list(stories), phase
        self.unbegun = list(range(len(self.stories)))
        self.asked: list[Request] = []  # since `due` last returned
        self.story_of: dict[Name, int] = {}  # the story of each request that has not ended
        self.arrived: dict[int, dict[Name, Completion | None]] = {}  # what a story waits for; None: not there yet
        self.closing: set[int] = set()  # stories that wait for their last completions
        self.results: dict[int, Any] = {}
        self.jobs: list[_Job] = []
        self.late = 0  # pieces of local work that decoding did not wait for
        self.chunk = 0  # how many have ended
        self.chunk_seconds = 0.0  # that the last one took
        self.asked_at = time.monotonic()  # when `due` last returned
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.waiters = concurrent.futures.ThreadPoolExecutor(REMOTE_THREADS)  # so that servers never keep work waiting

    def __enter__(self) -> Stories:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        wait = kind is not stopping.Stopped
        self.pool.shutdown(wait, cancel_futures=True)
        self.waiters.shutdown(wait, cancel_futures=True)
        for story in self.stories:
            story.close()

    def due(self, idle: bool) -> Due:
        """Delivers the results that are due, and returns the requests that the stories then make.

        Args:
          idle: nothing is being decoded, so it waits until there is something to sample, or nothing is left.

        Raises:
          Stopped: a signal has come.
        """
        stopping.look()
        while self.unbegun:
            self._advance(self.unbegun.pop(0), None)
        if not idle:
            self._wait_for_late()
        self._deliver([job for job in self.jobs if job.due(self.chunk)])
        while idle and not self.asked and self.jobs:
            local = [job for job in self.jobs if not job.work.remote]
            if not local:
                _wait([job.future for job in self.jobs])
            self._deliver(local or [job for job in self.jobs if job.future.done()])
        asked, self.asked = self.asked, []
        self.asked_at = time.monotonic()
        return Due(asked, len(self.results) + len(self.closing) < len(self.stories))

    def _advance(self, number: int, value: Any) -> None:
        """Sends a value to a story, which runs until it waits again."""
        self.closing.discard(number)
        try:
            wish = self.stories[number].send(value)
            while isinstance(wish, Sample) and not wish.requests:
                wish = self.stories[number].send([])
        except StopIteration as end:
            self.results[number] = end.value
            return
        if isinstance(wish, Sample):
            self.asked += wish.requests
            if wish.last:
                self.closing.add(number)
            self.arrived[number] = {request.name: None for request in wish.requests}
            self.story_of |= {request.name: number for request in wish.requests}
        else:
            pool = self.waiters if wish.remote else self.pool
            self.jobs.append(_Job(number, self.chunk, pool.submit(wish.call), wish))

    def ended(self, done: Done) -> None:
        """Takes the completions of a chunk, if any. A story goes on once all that it waits for is there."""
        self.chunk += 1
        self.chunk_seconds = time.monotonic() - self.asked_at
        for request, completion in done:
            story = self.story_of.pop(request.name)
            self.arrived[story][request.name] = completion
            if all(one is not None for one in self.arrived[story].values()):
                self._advance(story, list(self.arrived.pop(story).values()))

    def _wait_for_late(self) -> None:
        """Waits once for local work that should be done by now, see above."""
        until = time.monotonic() + max(PATIENCE, self.chunk_seconds)
        for job in self.jobs:
            if not job.work.remote and job.chunk < self.chunk and not job.late:
                with self.phase(job.work.phase):
                    concurrent.futures.wait([job.future], timeout=max(0.0, until - time.monotonic()))
                job.late = not job.future.done()
                self.late += job.late

    def _deliver(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            self.jobs.remove(job)
            with self.phase(job.work.phase):
                _wait([job.future])
                result = job.future.result()
            self._advance(job.story, result)

    def __iter__(self) -> Iterator[Any]:
        """The results of the stories, in the order of the stories."""
        return (self.results[story] for story in range(len(self.stories)))
