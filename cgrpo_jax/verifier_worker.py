"""The process that compares answers. It stands alone: run as a file, imports math-verify and nothing of this project.

One JSON request a line on stdin, one JSON reply a line on stdout. What an answer does here can only end this process:
the kernel's CPU timer kills it (no Python handler is asked), and its memory is limited.
"""

import functools
import json
import logging
import os
import resource
import signal
import sys


def main(cpu_seconds: float, memory_bytes: int) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read = lambda text: parse(text if "\\boxed" in text else f"\\boxed{{{text}}}", parsing_timeout=None)
    read_gold = functools.lru_cache(maxsize=1024)(read)
    print("ready", file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF's default action ends the process
        try:
            gold = read_gold(request["gold"])
            correct = bool(gold)
            if request["answer"] is not None:
                correct = correct and verify(gold, read(request["answer"]), timeout_seconds=None)
            reply = {"correct": bool(correct), "status": "ok"}
        except MemoryError:
            reply = {"correct": False, "status": "memory"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
