"""Compares mathematical answers with `math-verify`, in worker processes that may be killed.

Model text is never evaluated in this process. Each answer has a CPU-time limit (kept by the kernel in the worker) and
a wall-clock backstop five times larger, counted from when a worker takes it, so waiting in the queue costs nothing. A
worker that hangs or dies is replaced; its answer scores 0 and says why.
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
from collections.abc import Sequence
from typing import NamedTuple

from cgrpo_jax.options import VerifierConfig
from cgrpo_jax.records import Verdict

WORKER = pathlib.Path(__file__).with_name("verifier_worker.py")
START_SECONDS = 120  # for importing sympy on a busy machine
BACKSTOP = 5


class VerifierError(RuntimeError):
    """The workers cannot run at all."""


class Reading(NamedTuple):
    """Whether a gold answer can be read; a status other than "ok" (as of verdicts) says that nobody knows."""

    readable: bool
    status: str


class _Reply(NamedTuple):
    """Of a worker: yes, no, or no and the status that says why nobody knows."""

    yes: bool
    status: str


class _Worker:
    def __init__(self, cfg: VerifierConfig):
        self.wall_seconds = BACKSTOP * cfg.cpu_seconds
        limits = [str(cfg.cpu_seconds), str(cfg.memory_mb * 2**20)]
        # -P: the folder of the script is not searched for imports.
        command = [sys.executable, "-P", str(WORKER), *limits]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(  # its own session: Ctrl-C is for the main process alone
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.stdout, selectors.EVENT_READ)
        self.ready = self.too_slow = False

    def _line(self, seconds: float) -> str:
        """The next line, or "" where the worker is silent for too long (it is killed) or gone."""
        if not self.selector.select(seconds):
            self.too_slow = True
            self.process.kill()
            return ""
        return self.stdout.readline()

    def ask(self, gold: str, answer: str | None, how: str = "equal") -> _Reply:
        """Is the answer equal to the gold? Without an answer: can the gold be read?"""
        if not self.ready:
            if self._line(START_SECONDS) != "ready\n":
                self.process.kill()
                errors = self.stderr.read().strip().splitlines() or ["it said nothing"]
                raise VerifierError(f"a verifier worker did not start: {errors[-1]}")
            self.ready = True
        try:
            self.stdin.write(json.dumps({"gold": gold, "answer": answer, "how": how}) + "\n")
            self.stdin.flush()
            line = self._line(self.wall_seconds)
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            timed_out = self.process.wait() == -signal.SIGPROF or self.too_slow
            return _Reply(False, "timeout" if timed_out else "died")
        reply = _Reply(**json.loads(line))
        if reply.status == "memory":  # a fresh worker takes over
            self.process.kill()
            self.process.wait()
        return reply

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.selector.close()
        self.stdout.close()
        self.stderr.close()
        with contextlib.suppress(BrokenPipeError):  # what was meant for a dead worker
            self.stdin.close()


class Verifier:
    """A pool of workers. Use as a context manager; workers start at once, so their imports overlap other work."""

    def __init__(self, cfg: VerifierConfig):
        self.cfg = cfg
        self.threads = concurrent.futures.ThreadPoolExecutor(cfg.workers)
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(cfg.workers):
            self.idle.put(_Worker(cfg))

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
        return [Verdict.of(reply.yes, reply.status) for reply in replies]

    def readable(self, golds: Sequence[str]) -> list[Reading]:
        """Whether each gold answer can be read at all."""
        replies = self.threads.map(self._ask, golds, [None] * len(golds))
        return [Reading(reply.yes, reply.status) for reply in replies]

    def _ask(self, gold: str, answer: str | None, how: str = "equal") -> _Reply:
        worker = self.idle.get()
        try:
            return worker.ask(gold, answer, how)
        finally:
            try:
                if not worker.alive():
                    worker.close()
                    worker = _Worker(self.cfg)
            finally:  # even where the system has no process to give, somebody may wait for this place
                self.idle.put(worker)
