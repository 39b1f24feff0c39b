"""The process that grades answers, which `verifier.py` starts with two limits: bytes of memory and seconds of CPU time.

It reads pickled lists of `grader.Job` on stdin, until that is closed, and writes lines of JSON on stdout: for each job
{"extracted"} as soon as the answer is found, then {"reward", "status", "worn"}; and {"starting": true}, later false,
around an import, for which the verifier waits longer. sympy is imported for the first answer that needs it.

What an answer does here can only end this process: the kernel's CPU timer kills it (no Python handler is asked), and
its memory is limited. Each answer may use as much memory as the first one: a process that has grown says that it is
worn, ends and is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from cgrpo_jax.grading import grader

SPARE = 8  # this part of the memory may be left over from earlier answers
REMEMBERED = 256


class MemoryWatch(logging.Handler):
    """math-verify swallows what goes wrong and logs it: this notices where it was the memory limit."""

    hit = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] and issubclass(record.exc_info[0], MemoryError):
            self.hit = True


def held_bytes() -> tuple[int, int, int]:
    """Address space, resident memory and its peak, of this process (getrusage would tell its parent's peak)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        lines = dict(line.split(":", 1) for line in status)
    size, resident, peak = (1024 * int(lines[name].split()[0]) for name in ("VmSize", "VmRSS", "VmHWM"))
    return size, resident, peak


class Worker:
    """Grades one answer after the other, each under its own limits."""

    def __init__(self, memory_bytes: int, cpu_seconds: float):
        self.memory_bytes, self.most = memory_bytes, memory_bytes + memory_bytes // SPARE
        self.cpu_seconds, self.charged = max(cpu_seconds, 0.01), 0.0
        self.replies, self.errors = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8"), os.dup(2)
        self.nowhere, self.watch = os.open(os.devnull, os.O_WRONLY), MemoryWatch()
        self.remembered: dict[Any, tuple[Any, float]] = {}
        os.dup2(self.nowhere, 1)  # whatever a library prints must not look like a reply
        for name in ("math_verify", "latex2sympy2_extended"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
            logger.addHandler(self.watch)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with self.unlimited():
            pass

    def say(self, **message: Any) -> None:
        self.replies.write(json.dumps(message) + "\n")

    @contextlib.contextmanager
    def unlimited(self) -> Iterator[None]:
        """While something is imported: no answer is charged for it, and why it fails is told on stderr."""
        left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (self.most, self.most))
        os.dup2(self.errors, 2)
        self.say(starting=True)
        try:
            yield
        except Exception as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from None
        self.size, self.resident, self.first_peak = held_bytes()
        self.room = self.memory_bytes - self.size
        if self.room < self.memory_bytes // SPARE:
            megabytes = self.memory_bytes >> 20, self.size >> 20
            raise SystemExit("verifier.memory_mb = {} is too little: it takes {} to begin with".format(*megabytes))
        os.dup2(self.nowhere, 2)
        self.say(starting=False)
        self.limit_memory()
        signal.setitimer(signal.ITIMER_PROF, left)

    def load(self, name: str) -> Any:
        """A module, imported outside the limits of an answer."""
        if name not in sys.modules:
            with self.unlimited():
                importlib.import_module(name)
        return sys.modules[name]

    def limit_memory(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (min(self.size + self.room, self.most), self.most))

    def ask(self, gold: str, answer: str, how: str = "equal") -> bool:
        """Asks math-verify (see `expressions.holds`)."""
        expressions = self.load("cgrpo_jax.grading.expressions")

        def held() -> bool:
            try:
                parsed = self.once((gold, how == "plain"), lambda: expressions.read(gold, how == "plain"))
                return expressions.holds(gold, parsed, answer, how)
            except ValueError:  # an integer of more digits than Python reads
                return False

        return self.once((gold, answer, how), held)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` gives. Whoever asks again is charged what it took: a verdict depends on no earlier answer."""
        if key in self.remembered:
            found, seconds = self.remembered[key]
            left = signal.getitimer(signal.ITIMER_PROF)[0] - seconds
            if left <= 0:
                os.kill(os.getpid(), signal.SIGPROF)
            signal.setitimer(signal.ITIMER_PROF, left)
            self.charged += seconds
            return found
        began = time.process_time() + self.charged
        found = compute()
        if len(self.remembered) >= REMEMBERED:
            self.remembered.clear()
        self.remembered[key] = found, time.process_time() + self.charged - began
        return found

    def grade(self, job: grader.Job) -> bool:
        """Sends the verdict on one answer; whether this process is fit for another one."""
        if needs := grader.GRADERS[job.grader].needs:
            self.load(needs)
        self.watch.hit, status, reward = False, "ok", 0.0
        self.limit_memory()
        signal.setitimer(signal.ITIMER_PROF, self.cpu_seconds)  # SIGPROF's default action ends the process
        try:
            answer = grader.extract(job)
            self.say(extracted=answer)
            reward = grader.reward(job, answer, self.ask)
        except MemoryError:
            self.watch.hit = True
        except Exception:  # of a library, on hostile text: no reward, and counted
            status = "error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        before = self.resident
        self.size, self.resident, peak = held_bytes()
        # Not every MemoryError comes through: an answer that took half of what is allowed counts as one that took all.
        # The peak is that of this answer: a process whose peak an earlier one has raised by more than a little is gone.
        if self.watch.hit or 2 * (peak - before) > self.memory_bytes:
            status, reward = "memory", 0.0
        worn = status == "memory" or SPARE * (peak - self.first_peak) > self.memory_bytes
        self.say(reward=reward, status=status, worn=worn)
        return not worn


def main(memory_bytes: int, cpu_seconds: float) -> None:
    worker = Worker(memory_bytes, cpu_seconds)
    with contextlib.suppress(EOFError):
        while all(map(worker.grade, pickle.load(sys.stdin.buffer))):
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
