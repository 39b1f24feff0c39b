"""Drives one story a problem: a generator that yields what it waits for, and is sent what came of it.

The sampler polls for requests and tells what ended (`records.Source`). What is sampled is found by its name. Work (a
verdict, a critique that is computed here) runs beside the decoding, and is delivered by a schedule of tokens, not of
clocks: what begins after chunk c is told at the poll after chunk c+1. What is late then is waited for as long as that
chunk took, or PATIENCE, and no longer: decoding goes on, and it is told when it arrives. The order of what is sampled
then follows a clock, so it is counted (`late`) and never silent. Work of others (a server) is told as it arrives, or in
the order in which it began where `ordered` is set: then it is waited for, too.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from cgrpo_jax import stopping
from cgrpo_jax.records import Completion, Done, Name, Request

GLANCE = 0.5  # seconds, at most, until a signal is noticed while something is waited for
REMOTE_THREADS = 1024  # at most; they only wait
PATIENCE = (
    1.0  # seconds; a verdict takes milliseconds, and an answer that is hard to compare reaches its own limit later
)

Phase = Callable[[str], contextlib.AbstractContextManager]


class Sample(NamedTuple):
    """Wait for completions of these requests; they are sent in this order."""

    requests: Sequence[Request]


class Work(NamedTuple):
    """Wait for the result of a call that runs in another thread."""

    call: Callable[[], Any]
    phase: str  # the name under which waiting is counted
    remote: bool = False  # somebody else's machine: it answers when it answers


Story = Generator[Sample | Work, Any, Any]


@dataclasses.dataclass
class _Job:
    """Work under way."""

    story: int
    chunk: int  # how many chunks had ended when it began
    future: concurrent.futures.Future
    work: Work
    late: bool = False  # it was waited for once


def _wait(futures: Sequence[concurrent.futures.Future]) -> None:
    """Until one of them is done. Raises Stopped where a signal has come."""
    while not any(future.done() for future in futures):
        stopping.look()
        concurrent.futures.wait(futures, GLANCE, concurrent.futures.FIRST_COMPLETED)


class Stories:
    """All stories of a step as a source of the sampler. Use as a context manager: leaving waits for work under way.

    A run that is stopped waits for none of it (`stopping.Stopped`).

    Args:
      threads: for work. Work must not depend on other work.
      ordered: remote work is told in the order in which it began.
      patience: seconds that a poll waits for late local work at least; it waits no longer than the last chunk took.
    """

    def __init__(
        self,
        stories: Sequence[Story],
        phase: Phase,
        threads: int = 2,
        ordered: bool = False,
        patience: float = PATIENCE,
    ):
        self.stories, self.phase, self.ordered, self.patience = list(stories), phase, ordered, patience
        self.late = 0  # pieces of local work that decoding did not wait for
        self.asked_at = time.monotonic()  # when the last poll ended
        self.chunk_seconds = 0.0
        self.results: dict[int, Any] = {}
        self.asked: list[Request] = []
        self.story_of: dict[Name, int] = {}
        self.wanted: dict[int, Sequence[Request]] = {}
        self.arrived: dict[int, dict[Name, Completion]] = {}
        self.jobs: list[_Job] = []
        self.chunk = 0
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.waiters = concurrent.futures.ThreadPoolExecutor(REMOTE_THREADS)  # so that servers never keep work waiting
        self.begun = False

    def __enter__(self) -> Stories:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        wait = kind is not stopping.Stopped
        self.pool.shutdown(wait, cancel_futures=True)
        self.waiters.shutdown(wait, cancel_futures=True)
        for story in self.stories:
            story.close()

    def ended(self, done: Done) -> None:
        """Completions of a chunk; a story goes on when all that it waits for are there."""
        self.chunk += 1
        self.chunk_seconds = time.monotonic() - self.asked_at
        for request, completion in done:
            story = self.story_of.pop(request.name)
            self.arrived[story][request.name] = completion
            wanted = self.wanted[story]
            if len(self.arrived[story]) == len(wanted):
                arrived = self.arrived.pop(story)
                self._advance(story, [arrived[asked.name] for asked in wanted])

    def poll(self, idle: bool) -> Sequence[Request]:
        """Tells what is due, and returns what the stories ask for. Where idle, waits until something is asked."""
        if not self.begun:
            self.begun = True
            for story in range(len(self.stories)):
                self._advance(story, None)
        if not idle:
            self._wait_for_late()
        self._tell(self._due())
        while idle and not self.asked and self.jobs:
            self._tell(self._next())
        asked, self.asked = self.asked, []
        self.asked_at = time.monotonic()
        return asked

    def pending(self) -> bool:
        return len(self.results) < len(self.stories)

    def _wait_for_late(self) -> None:
        """For what should be there by now, once, and not for longer than a chunk; the rest comes when it comes."""
        until = time.monotonic() + max(self.patience, self.chunk_seconds)
        for job in self.jobs:
            if not job.work.remote and job.chunk < self.chunk and not job.late:
                with self.phase(job.work.phase):
                    concurrent.futures.wait([job.future], timeout=max(0.0, until - time.monotonic()))
                job.late = not job.future.done()
                self.late += job.late

    def _due(self) -> list[_Job]:
        return [job for job in self.jobs if self._is_due(job)]

    def _is_due(self, job: _Job) -> bool:
        if not job.work.remote:
            return job.chunk < self.chunk and (job.future.done() or not job.late)
        if self.ordered:
            return False  # told when nothing else is left to do, so that arrival decides nothing
        return job.future.done()

    def _next(self) -> list[_Job]:
        """What to wait for when nothing can be decoded: all local work, else the first remote one."""
        if local := [job for job in self.jobs if not job.work.remote]:
            return local
        if self.ordered:
            return self.jobs[:1]
        _wait([job.future for job in self.jobs])
        return self._due()

    def _tell(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            self.jobs.remove(job)
            with self.phase(job.work.phase):
                _wait([job.future])
                result = job.future.result()
            self._advance(job.story, result)

    def _advance(self, number: int, value: Any) -> None:
        """Lets a story run until it waits again."""
        try:
            wish = self.stories[number].send(value)
            while isinstance(wish, Sample) and not wish.requests:
                wish = self.stories[number].send([])
        except StopIteration as end:
            self.results[number] = end.value
            return
        if isinstance(wish, Sample):
            self.asked += wish.requests
            self.wanted[number], self.arrived[number] = wish.requests, {}
            self.story_of |= {request.name: number for request in wish.requests}
        else:
            pool = self.waiters if wish.remote else self.pool
            self.jobs.append(_Job(number, self.chunk, pool.submit(wish.call), wish))

    def __iter__(self) -> Iterator[Any]:
        """Results of the stories, in their order."""
        return (self.results[story] for story in range(len(self.stories)))
