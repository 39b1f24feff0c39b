"""Compares mathematical answers with `math-verify`, in worker processes that may be killed.

Model text is never evaluated in this process. Each answer has a CPU-time limit for all of its parts (kept by the kernel
in the worker) and a wall-clock backstop five times larger, counted from when a worker takes it, so waiting in the queue
costs nothing. A worker that hangs or dies is replaced; its answer scores 0 and says why.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import queue
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from cgrpo_jax.config.options import VerifierConfig
from cgrpo_jax.process import stopping
from cgrpo_jax.records import Verdict

T = TypeVar("T")

WORKER = pathlib.Path(__file__).with_name("verifier_worker.py")
START_SECONDS = 120  # for importing sympy on a busy machine
BACKSTOP = 5


class VerifierError(RuntimeError):
    """The workers cannot run at all."""


class Reading(NamedTuple):
    """Whether a gold answer can be read; a status other than "ok" (as of verdicts) says that nobody knows."""

    readable: bool
    status: str


class Reply(NamedTuple):
    """Of a worker: yes, no, or no and the status that says why nobody knows."""

    yes: bool
    status: str
    seconds: float = 0.0  # of CPU time that it took; all that was allowed where that was not enough
    worn: bool = False  # the worker has grown, and is replaced before it could be short of memory


class _Worker:
    def __init__(self, cfg: VerifierConfig):
        self.cpu_seconds = cfg.cpu_seconds
        # -P: the folder of the script is not searched for imports.
        command = [sys.executable, "-P", str(WORKER), str(cfg.memory_mb * 2**20)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(  # its own session: Ctrl-C is for the main process alone
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.stdout, selectors.EVENT_READ)
        self.ready = self.too_slow = self.closed = False

    def _line(self, seconds: float) -> str:
        """The next line, or "" where the worker is silent for too long (it is killed) or gone."""
        if not self.selector.select(seconds):
            self.too_slow = True
            self.process.kill()
            return ""
        return self.stdout.readline()

    def ask(self, gold: str, answer: str | None, how: str = "equal", seconds: float | None = None) -> Reply:
        """Is the answer equal to the gold? Without an answer: can the gold be read?

        Args:
          how: see `Verifier.compare`.
          seconds: of CPU time, at most; None: those of the configuration.
        """
        seconds = self.cpu_seconds if seconds is None else seconds
        if not self.ready:
            if self._line(START_SECONDS) != "ready\n":
                self.process.kill()
                errors = self.stderr.read().strip().splitlines() or ["it said nothing"]
                raise VerifierError(f"a verifier worker did not start: {errors[-1]}")
            self.ready = True
        try:
            request = {"gold": gold, "answer": answer, "how": how, "seconds": seconds}
            self.stdin.write(json.dumps(request) + "\n")
            self.stdin.flush()
            line = self._line(BACKSTOP * seconds)
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            timed_out = self.process.wait() == -signal.SIGPROF or self.too_slow
            return Reply(False, "timeout" if timed_out else "died", seconds)
        reply = Reply(**json.loads(line))
        if reply.status == "memory" or reply.worn:  # a fresh worker takes over
            self.process.kill()
            self.process.wait()
        return reply

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.process.kill()
        self.process.wait()
        self.selector.close()
        self.stdout.close()
        self.stderr.close()
        with contextlib.suppress(BrokenPipeError):  # what was meant for a dead worker
            self.stdin.close()


def _watched(replies: Iterable[T]) -> Iterator[T]:
    """The replies as they come. Raises Stopped, and asks no more, where a signal has come."""
    for reply in replies:
        stopping.look()
        yield reply


def _started(cfg: VerifierConfig, what: str) -> _Worker:
    try:
        return _Worker(cfg)
    except OSError as error:
        raise VerifierError(f"a verifier worker cannot be {what}: {error}") from error


class Verifier:
    """A pool of workers. Use as a context manager; workers start at once, so their imports overlap other work."""

    def __init__(self, cfg: VerifierConfig):
        """Raises VerifierError where the system has no process to give."""
        self.cfg, self.cpu_seconds = cfg, cfg.cpu_seconds
        self.threads = concurrent.futures.ThreadPoolExecutor(cfg.workers)
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        try:
            for _ in range(cfg.workers):
                self.idle.put(_started(cfg, "started"))
        except VerifierError:
            while not self.idle.empty():
                self.idle.get().close()
            raise

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exc) -> None:
        self.threads.shutdown(cancel_futures=True)  # answers under way end within their limits
        for _ in range(self.cfg.workers):
            self.idle.get().close()

    def compare(self, pairs: Sequence[tuple[str, str]], how: str = "equal") -> list[Verdict]:
        """A verdict for each (gold, answer).

        Args:
          how: equal (in value, too), plain (what math-verify says, as it is) or rounded (is the answer, a plain
            decimal, the rounding of the gold?).
        """
        golds, answers = [gold for gold, _ in pairs], [answer for _, answer in pairs]
        replies = self.threads.map(self._ask, golds, answers, [how] * len(pairs))
        return [Verdict.of(reply.yes, reply.status) for reply in _watched(replies)]

    def compare_parts(self, answers: Sequence[tuple[Sequence[tuple[str, str, str]], float]]) -> list[list[Reply]]:
        """Replies to the (gold, answer, how) questions of each answer, in order.

        Args:
          answers: questions, and the CPU seconds for all of them. Where these are used up the list of replies ends
            early.
        """
        return list(_watched(self.threads.map(self._ask_all, *zip(*answers, strict=True)))) if answers else []

    def readable(self, golds: Sequence[str]) -> list[Reading]:
        """Whether each gold answer can be read at all."""
        replies = self.threads.map(self._ask, golds, [None] * len(golds))
        return [Reading(reply.yes, reply.status) for reply in _watched(replies)]

    def _ask_all(self, questions: Sequence[tuple[str, str, str]], left: float) -> list[Reply]:
        replies: list[Reply] = []
        for gold, answer, how in questions:
            if left <= 0:
                break
            replies.append(self._ask(gold, answer, how, left))
            left -= replies[-1].seconds
        return replies

    def _ask(self, gold: str, answer: str | None, how: str = "equal", seconds: float | None = None) -> Reply:
        """Raises VerifierError where there is no worker, and none can be started."""
        worker = self.idle.get()
        try:
            if worker.closed:  # none could be started in its place before
                worker = _started(self.cfg, "restarted")
            return worker.ask(gold, answer, how, seconds)
        finally:
            try:
                if not worker.closed and not worker.alive():
                    worker.close()
                    worker = _started(self.cfg, "restarted")
            finally:  # even where the system has no process to give, somebody may wait for this place
                self.idle.put(worker)
