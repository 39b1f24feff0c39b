"""The process that compares answers. It stands alone: run as a file, imports math-verify and nothing of this project.

One JSON request a line on stdin, {"gold", "answer"}; one JSON reply a line on stdout, {"yes", "status"}: is the answer
equal to the gold or, where it is null, can the gold be read? What an answer does here can only end this process:
the kernel's CPU timer kills it (no Python handler is asked), and its memory is limited. It ends when its stdin does.
"""

import json
import logging
import os
import resource
import signal
import sys


class MemoryWatch(logging.Handler):
    """math-verify swallows what goes wrong and logs it: this notices where it was the memory limit."""

    hit = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] and issubclass(record.exc_info[0], MemoryError):
            self.hit = True


def peak_bytes() -> int:
    """The most memory this process ever held. (getrusage would tell that of its parent before the exec, too.)"""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def in_box(text: str) -> str:
    """The form in which math-verify takes a whole text for the answer."""
    return text if "\\boxed" in text else f"\\boxed{{{text}}}"


def main(cpu_seconds: float, memory_bytes: int) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    from math_verify import parse, verify

    watch = MemoryWatch()
    for name in ("math_verify", "latex2sympy2_extended"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(watch)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    golds: dict[str, list] = {}  # the last gold: the answers to one problem come one after another
    print("ready", file=replies)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # whatever a library prints must not look like a reply
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF's default action ends the process
        watch.hit = False
        try:
            if request["gold"] not in golds:
                golds = {request["gold"]: parse(in_box(request["gold"]), parsing_timeout=None)}
            gold = golds[request["gold"]]
            yes = bool(gold)
            if yes and request["answer"] is not None:
                answer = parse(in_box(request["answer"]), parsing_timeout=None)
                yes = bool(verify(gold, answer, timeout_seconds=None))
        except MemoryError:
            watch.hit = True
        # Not every MemoryError comes through: an answer that took half of what is allowed counts as one that took all.
        bloated = 2 * peak_bytes() > memory_bytes
        if watch.hit or bloated:
            golds, yes = {}, False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"yes": yes, "status": "memory" if watch.hit or bloated else "ok"}), file=replies)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
