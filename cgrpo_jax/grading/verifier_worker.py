"""The process that compares answers. It stands alone: run as a file, imports math-verify and nothing of this project.

One JSON request a line on stdin, {"gold", "answer", "seconds"}; one JSON reply a line on stdout, {"yes", "status",
"seconds", "worn"}: is the answer equal to the gold or, where it is null, can the gold be read? What an answer does here
can only end this process: the kernel's CPU timer kills it after `seconds` (no Python handler is asked), and its memory
is limited. Each answer may use as much memory as the first one, whatever those before it left: a worker that has grown
says that it is worn, and is replaced. It ends when its stdin does.
"""

import json
import logging
import os
import resource
import signal
import sys
import time

SPARE = 8  # this part of the memory may be left over from earlier answers


class MemoryWatch(logging.Handler):
    """math-verify swallows what goes wrong and logs it: this notices where it was the memory limit."""

    hit = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] and issubclass(record.exc_info[0], MemoryError):
            self.hit = True


def held_bytes(*names: str) -> list[int]:
    """Of this process: VmSize, VmRSS, or VmHWM, its most ever. (getrusage would tell its parent's before the exec.)"""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return [1024 * int(lines[name].split()[0]) for name in names]


def in_box(text: str) -> str:
    """The form in which math-verify takes a whole text for the answer."""
    return text if "\\boxed" in text else f"\\boxed{{{text}}}"


def main(memory_bytes: int) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    from math_verify import parse, verify

    watch = MemoryWatch()
    for name in ("math_verify", "latex2sympy2_extended"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(watch)
    size, peak_at_start = held_bytes("VmSize", "VmHWM")
    room, most = memory_bytes - size, memory_bytes + memory_bytes // SPARE
    if room < memory_bytes // SPARE:
        raise SystemExit(
            f"verifier.memory_mb = {memory_bytes >> 20} is too little: it takes {size >> 20} to begin with"
        )
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    golds: dict[str, list] = {}  # the last gold: the answers to one problem come one after another
    print("ready", file=replies)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # whatever a library prints must not look like a reply
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        request = json.loads(line)
        size, resident = held_bytes("VmSize", "VmRSS")
        resource.setrlimit(resource.RLIMIT_AS, (min(size + room, most), most))
        signal.setitimer(signal.ITIMER_PROF, max(request["seconds"], 0.01))  # SIGPROF's default action ends the process
        began = time.process_time()
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
        signal.setitimer(signal.ITIMER_PROF, 0)
        (peak,) = held_bytes("VmHWM")
        # Not every MemoryError comes through: an answer that took half of what is allowed counts as one that took all.
        # The peak is that of this answer: a worker whose peak an earlier one has raised by more than a little is gone.
        if watch.hit or 2 * (peak - resident) > memory_bytes:
            watch.hit, golds, yes = True, {}, False
        reply = {"yes": yes, "status": "memory" if watch.hit else "ok", "seconds": time.process_time() - began}
        print(json.dumps(reply | {"worn": SPARE * (peak - peak_at_start) > memory_bytes}), file=replies)


if __name__ == "__main__":
    main(int(sys.argv[1]))
