"""A pool of worker processes that grade answers (`worker.py`); the process that trains parses none of them.

Each answer has a CPU-time limit (kept by the kernel in the worker) and a wall-clock limit five times larger, counted
from when a worker takes it, so waiting in the queue costs nothing. A worker that hangs, dies or has grown is replaced;
only the answer that it was at loses its verdict, whose status says why.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pickle
import queue
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.config.options import VerifierConfig
from cgrpo_jax.errors import VerifierError
from cgrpo_jax.grading.grader import Job
from cgrpo_jax.process import stopping
from cgrpo_jax.records import Verdict

WORKER = ("-m", "cgrpo_jax.grading.worker")
START_SECONDS = 120  # for importing sympy on a busy machine
BACKSTOP = 5
BATCH = 16  # jobs at most that are sent to a worker at once


class Graded(NamedTuple):
    """What a worker found in a response, and its verdict."""

    extracted: str | None
    verdict: Verdict


class Reading(NamedTuple):
    """Whether a gold answer can be read; a status other than "ok" (as of verdicts) says that nobody knows."""

    readable: bool
    status: str


class _Worker:
    def __init__(self, cfg: VerifierConfig):
        """Raises OSError where the system has no process to give."""
        self.wall_seconds = BACKSTOP * cfg.cpu_seconds
        # -P: the working directory is searched for imports only where this process searches it, too. Libraries for
        # linear algebra would reserve memory for a thread on each core.
        command = [sys.executable, "-P", *WORKER, str(cfg.memory_mb * 2**20), str(cfg.cpu_seconds)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(  # its own session: Ctrl-C is for the main process alone
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.stdout, selectors.EVENT_READ)
        self.received = b""
        self.starting, self.too_slow, self.closed = True, False, False

    def _line(self) -> bytes:
        """The next line, or b"" where the worker is silent for too long (it is killed) or gone."""
        while b"\n" not in self.received:
            if not self.selector.select(START_SECONDS if self.starting else self.wall_seconds):
                self.too_slow = True
                self.process.kill()
                return b""
            chunk = os.read(self.stdout.fileno(), 1 << 16)
            if not chunk:
                return b""
            self.received += chunk
        line, _, self.received = self.received.partition(b"\n")
        return line

    def _message(self) -> dict[str, Any] | None:
        """What the worker says next; None where it has ended. Raises VerifierError where it ended while it started."""
        line = self._line()
        if line:
            return json.loads(line)
        if self.starting:
            self.process.kill()
            errors = self.stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise VerifierError(f"a verifier worker did not start: {errors[-1]}")
        return None

    def grade(self, jobs: Sequence[Job]) -> Iterator[Graded]:
        """What comes of each job, in order. It ends early, and the worker is closed, behind a job that wore it out."""
        while self.starting and (message := self._message()):
            self.starting = message["starting"]
        with contextlib.suppress(BrokenPipeError):  # it has ended, which shows below
            self.stdin.write(pickle.dumps(jobs))
            self.stdin.flush()
        for _ in jobs:
            extracted = None
            while (message := self._message()) and "reward" not in message:
                self.starting = message.get("starting", False)
                extracted = message.get("extracted", extracted)
            if message is None:
                timed_out = self.process.wait() == -signal.SIGPROF or self.too_slow
                self.close()
                yield Graded(extracted, Verdict.of(False, "timeout" if timed_out else "died"))
                return
            if message["worn"]:
                self.close()
            yield Graded(extracted, Verdict(message["reward"], message["reward"] == 1.0, message["status"]))
            if self.closed:
                return

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


def _started(cfg: VerifierConfig, what: str) -> _Worker:
    try:
        return _Worker(cfg)
    except OSError as error:
        raise VerifierError(f"a verifier worker cannot be {what}: {error}") from error


class Verifier:
    """A pool of workers, for any thread. Use it as a context manager.

    Every method raises VerifierError where a worker cannot run, and Stopped where a signal has come.
    """

    def __init__(self, cfg: VerifierConfig):
        """Raises VerifierError where the system has no process to give."""
        self.cfg = cfg
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

    def __exit__(self, *exc: object) -> None:
        self.threads.shutdown(cancel_futures=True)  # answers under way end within their limits
        for _ in range(self.cfg.workers):
            self.idle.get().close()

    def grade(self, jobs: Sequence[Job]) -> list[Graded]:
        """The answer and the verdict of each job, which depend neither on the other jobs nor on their order."""
        size = max(1, min(BATCH, len(jobs) // (8 * self.cfg.workers)))  # so that a slow batch keeps nobody waiting
        batches = [jobs[first : first + size] for first in range(0, len(jobs), size)]
        return [graded for batch in self.threads.map(self._batch, batches) for graded in batch]

    def compare(self, pairs: Sequence[tuple[str, str]], grader: str = "math") -> list[Verdict]:
        """The verdict on each (gold, answer)."""
        return [graded.verdict for graded in self.grade([Job(grader, gold, answer=answer) for gold, answer in pairs])]

    def readable(self, golds: Sequence[str]) -> list[Reading]:
        """Whether each gold answer can be read: as words, a number or a collection of them, else by math-verify."""
        verdicts = [graded.verdict for graded in self.grade([Job("math", gold) for gold in golds])]
        return [Reading(verdict.correct, verdict.status) for verdict in verdicts]

    def _batch(self, jobs: Sequence[Job]) -> list[Graded]:
        worker, done = self.idle.get(), list[Graded]()
        try:
            while len(done) < len(jobs):
                if worker.closed:
                    worker = _started(self.cfg, "restarted")
                for graded in worker.grade(jobs[len(done) :]):
                    done.append(graded)
                    stopping.look()
            return done
        except BaseException:  # replies may be on their way that nobody will read
            worker.close()
            raise
        finally:  # even where the system has no process to give, somebody may wait for this place
            self.idle.put(worker)
