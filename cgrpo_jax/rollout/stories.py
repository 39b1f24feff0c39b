"""A story is a generator for one problem: it yields what it waits for, and is sent the result when that is there.

`loop.run_stories` asks all stories of a step what is due, and tells them what was sampled; completions are found by the
name of their request. Work (a verdict, or a critique that is computed on this machine) runs in threads beside the
decoding. Its result is delivered by a schedule of tokens, not of clocks: what begins after chunk c is delivered after
chunk c+1. If it is not there by then, it is waited for as long as that chunk took, or PATIENCE, and no longer: decoding
goes on, and the result is delivered when it arrives. The order of what is sampled then depends on a clock, so such
cases are counted (`late`). Remote work (a server) is delivered as it arrives, or in the order in which it began where
`ordered` is set, and then it is waited for.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.process import stopping
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
    last: bool = False  # the story asks for no other ones, so their rows need not be kept for it


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


class Due(NamedTuple):
    """What the engines are to do next."""

    requests: Sequence[Request] = ()
    more: bool = False  # some story may still ask for something


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Counts the seconds of no phase."""
    return contextlib.nullcontext()


class Stories:
    """All stories of a step. Use as a context manager: leaving it waits for work under way.

    A run that is stopped waits for none of it (`stopping.Stopped`).

    Args:
      stories: generators, one a problem.
      phase: counts the seconds of waiting under the name of the work.
      threads: for local work, which must not depend on other work.
      ordered: remote work is delivered in the order in which it began.
      patience: seconds that late local work is waited for, or as long as the last chunk took where that is longer.
    """

    def __init__(
        self,
        stories: Sequence[Story],
        phase: Phase = no_phase,
        threads: int = 2,
        ordered: bool = False,
        patience: float = PATIENCE,
    ):
        self.stories, self.phase, self.ordered, self.patience = list(stories), phase, ordered, patience
        self.late = 0  # pieces of local work that decoding did not wait for
        self.asked_at = time.monotonic()  # when `due` last returned
        self.chunk_seconds = 0.0
        self.results: dict[int, Any] = {}
        self.asked: list[Request] = []
        self.story_of: dict[Name, int] = {}
        self.wanted: dict[int, Sequence[Request]] = {}
        self.arrived: dict[int, dict[Name, Completion]] = {}
        self.jobs: list[_Job] = []
        self.chunk = 0
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.closing: set[int] = set()  # stories that wait for their last completions
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
        """Takes the completions of a chunk, which may be none. A story goes on once it has all that it waits for."""
        self.chunk += 1
        self.chunk_seconds = time.monotonic() - self.asked_at
        for request, completion in done:
            story = self.story_of.pop(request.name)
            self.arrived[story][request.name] = completion
            wanted = self.wanted[story]
            if len(self.arrived[story]) == len(wanted):
                arrived = self.arrived.pop(story)
                self._advance(story, [arrived[asked.name] for asked in wanted])

    def due(self, idle: bool) -> Due:
        """Delivers the results that are due, and returns the requests that the stories then make.

        Args:
          idle: nothing is being decoded, so it waits until there is something to sample, or nothing is left.
        """
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
        return Due(asked, len(self.results) + len(self.closing) < len(self.stories))

    def _wait_for_late(self) -> None:
        """Waits once for local work that should be done by now, and not for longer than a chunk took."""
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
            self.wanted[number], self.arrived[number] = wish.requests, {}
            self.story_of |= {request.name: number for request in wish.requests}
        else:
            pool = self.waiters if wish.remote else self.pool
            self.jobs.append(_Job(number, self.chunk, pool.submit(wish.call), wish))

    def __iter__(self) -> Iterator[Any]:
        """Results of the stories, in their order."""
        return (self.results[story] for story in range(len(self.stories)))
