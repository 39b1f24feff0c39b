"""The worker pool: agreement with math-verify, limits, replacement, fair queueing."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from cgrpo_jax.grading.verifier import Reading, Verifier, VerifierError
from cgrpo_jax.options import VerifierConfig
from cgrpo_jax.records import Verdict

BOMB = "9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(VerifierConfig(workers=2, cpu_seconds=1.0)) as pool:
        yield pool


PAIRS = [
    ("5", "5"), ("5", "6"), ("1,234", "1234"), (r"\frac12", "0.5"), ("(6,31,-1)", "(6, 31, -1)"), ("x^2+1", "1+x^2"),
    ("025", "25"), ("142.0", "142"), (r"\{1,2\}", r"\{2,1\}"), ("7", "seven"), ("3", "x=3"), ("0.333", r"\frac13"),
]  # fmt: skip


def test_verdicts_are_those_of_math_verify(verifier):
    """The library itself, called in a fresh process with its own defaults."""
    code = (
        "import json, sys; from math_verify import parse, verify;"
        "pairs = [[parse('\\\\boxed{' + text + '}') for text in pair] for pair in json.load(sys.stdin)];"
        "print(json.dumps([bool(verify(gold, answer)) for gold, answer in pairs]))"
    )
    import json

    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PAIRS), capture_output=True, text=True, check=True
    )
    expected = json.loads(done.stdout)
    assert [verdict.correct for verdict in verifier.compare(PAIRS)] == expected
    assert any(expected) and not all(expected)


def test_a_bomb_is_cut_counted_and_hurts_nobody(verifier):
    began = time.perf_counter()
    verdicts = verifier.compare([("5", "5"), ("9", BOMB), ("5", "5"), ("9", BOMB), ("5", "5")])
    assert verdicts == [Verdict(1.0, True, "ok"), Verdict(0.0, False, "timeout")] * 2 + [Verdict(1.0, True, "ok")]
    assert time.perf_counter() - began < 60
    assert verifier.compare([("5", "5")] * 4) == [Verdict(1.0, True, "ok")] * 4  # replaced workers work


def test_the_size_of_this_process_is_not_held_against_the_workers():
    """A trainer holds gigabytes; the workers it starts do not."""
    large = np.ones(2**28)  # 2 GiB
    with Verifier(VerifierConfig(workers=1)) as pool:
        assert pool.compare([("5", "5")] * 3) == [Verdict(1.0, True, "ok")] * 3
    assert large[0] == 1


def test_waiting_in_the_queue_costs_nothing(tmp_path, monkeypatch):
    """One worker, half a second an answer, 6 s of them; one answer's wall-clock limit is 5 s."""
    slow = "import json, time\nprint('ready', flush=True)\nwhile input():\n    time.sleep(0.5)\n"
    (tmp_path / "slow.py").write_text(slow + "    print(json.dumps({'yes': True, 'status': 'ok'}), flush=True)\n")
    monkeypatch.setattr("cgrpo_jax.grading.verifier.WORKER", tmp_path / "slow.py")
    with Verifier(VerifierConfig(workers=1, cpu_seconds=1.0)) as pool:
        assert pool.compare([("5", "5")] * 12) == [Verdict(1.0, True, "ok")] * 12


def test_a_dead_worker_is_replaced(verifier):
    worker = verifier.idle.get()
    worker.ask("1", "1")
    worker.process.kill()
    worker.process.wait()
    verifier.idle.put(worker)
    statuses = [verdict.status for verdict in verifier.compare([("1", "1")] * 6)]
    assert sorted(statuses) == ["died"] + ["ok"] * 5
    assert [v.status for v in verifier.compare([("1", "1")] * 4)] == ["ok"] * 4


@pytest.mark.parametrize(
    "answer", ["\0", "\ud800", "", " ", "{" * 500, "\\frac{", "__import__('os').system('true')", "a" * 2000]
)
def test_odd_text_gets_a_verdict(verifier, answer):
    assert verifier.compare([("5", answer)])[0].correct is False


# Answers short enough to be compared; some hang sympy, some fill the memory, some only look dangerous.
HOSTILE = [
    BOMB, "9" * 1900 + "!" * 20, r"\sum_{n=1}^{10^{12}} n!", "(" * 900 + ")" * 900, r"\frac{1}{" * 300, "2^" * 900 + "2",
    r"x^{2}" * 300, "10^{10^{10}}", r"\binom{10^9}{5\cdot 10^8}", "__import__('os')._exit(1)",
    "[x for x in ().__class__.__base__.__subclasses__()]", "\0\0", "\ud800\udfff", "{" * 1900, r"\int " * 300 + "x",
    r"\left(" * 200, "0." + "3" * 1900, r"\sqrt{" * 250 + "2" + "}" * 250, "os.fork()", "A" * 1900,
]  # fmt: skip


def test_ten_thousand_answers_with_hostile_ones_among_them():
    """Through the whole of scoring: nothing hangs or crashes, what is hostile gets 0, the rest its due, within a minute."""
    from cgrpo_jax.grading.rewards import score
    from cgrpo_jax.records import Completion, Problem

    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), np.ones(1, np.float32), True)
    problems = [Problem(f"{n}", str(n), ()) for n in range(10_000)]
    texts = [f"\\boxed{{{n + n % 2}}}" for n in range(10_000)]  # even ones are right
    oversized = ["\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}", "\\boxed{" + "a" * 1_000_000 + "}", "x" * 1_000_000]
    hostile = {251 + 498 * i: f"\\boxed{{{answer}}}" for i, answer in enumerate(HOSTILE)}
    hostile |= {9_993 + 2 * i: text for i, text in enumerate(oversized)}
    for n, text in hostile.items():
        texts[n] = text
    with Verifier(VerifierConfig()) as pool:
        pool.compare([("1", "1")] * 4)  # the workers have started
        began = time.perf_counter()
        attempts = score([(p, completion, text) for p, text in zip(problems, texts, strict=True)], pool)
        seconds = time.perf_counter() - began
    assert len(hostile) == 23 and all(attempts[n].reward == 0 for n in hostile)
    assert all(a.reward == float(n % 2 == 0) for n, a in enumerate(attempts) if n not in hostile)
    assert all(a.status == "ok" for n, a in enumerate(attempts) if n not in hostile)
    given_up = [attempts[n].status for n in hostile if attempts[n].status != "ok"]
    assert 1 <= given_up.count("timeout") + given_up.count("memory") <= len(HOSTILE)
    assert seconds < 60, seconds


def test_memory_of_a_worker_is_limited():
    """Whatever an answer makes it allocate: the worker says so or dies, and the next answer is fine."""
    with Verifier(VerifierConfig(workers=1, cpu_seconds=20.0, memory_mb=400)) as pool:
        verdict, after = pool.compare([("5", "(x+y+z+w)^{400}"), ("5", "5")])
    assert verdict == Verdict(0.0, False, "memory") and after == Verdict(1.0, True, "ok")


def resident_kb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])


def test_memory_stays_flat_over_many_answers():
    """50,000 answers: neither this process nor a worker grows by more than 40 MB after the first tenth."""
    with Verifier(VerifierConfig()) as pool:
        workers = [pool.idle.get() for _ in range(2)]
        pids = [os.getpid(), *(worker.process.pid for worker in workers)]
        for worker in workers:
            pool.idle.put(worker)
        sizes = []
        for _ in range(10):
            pairs = [(f"{n // 50}", f"{n // 50}") for n in range(5_000)]
            assert all(verdict.correct for verdict in pool.compare(pairs))
            sizes.append([resident_kb(pid) for pid in pids])
    assert all(last - first < 40_000 for first, last in zip(sizes[0], sizes[-1], strict=True)), sizes


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit('no math-verify here')")
    monkeypatch.setattr("cgrpo_jax.grading.verifier.WORKER", tmp_path / "worker.py")
    with Verifier(VerifierConfig()) as pool, pytest.raises(VerifierError, match="did not start: no math-verify here"):
        pool.compare([("1", "1")] * 5)


def test_which_golds_can_be_read(verifier):
    assert verifier.readable(["5", r"\frac{1}{2}", ""]) == [Reading(r, "ok") for r in (True, True, False)]
    assert verifier.readable([]) == [] and verifier.compare([]) == []


def test_no_worker_outlives_the_pool():
    with Verifier(VerifierConfig(workers=2)) as pool:
        pool.compare([("1", "1")] * 2)
        workers = [pool.idle.get() for _ in range(2)]
        for worker in workers:
            pool.idle.put(worker)
    assert all(worker.process.poll() is not None for worker in workers)
