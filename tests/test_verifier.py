"""The worker pool: agreement with math-verify, limits, replacement, fair queueing."""

import subprocess
import sys
import time

import pytest

from cgrpo_jax.verifier import Verdict, Verifier, VerifierConfig

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
        "import json, sys; from math_verify import parse, verify; box = lambda t: parse('\\\\boxed{' + t + '}');"
        "print(json.dumps([bool(verify(box(g), box(a))) for g, a in json.load(sys.stdin)]))"
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
    assert verdicts == [Verdict(True, "ok"), Verdict(False, "timeout")] * 2 + [Verdict(True, "ok")]
    assert time.perf_counter() - began < 60
    assert verifier.compare([("5", "5")] * 4) == [Verdict(True, "ok")] * 4  # replaced workers work


def test_waiting_in_the_queue_costs_nothing():
    """One worker, far more work than one answer's wall-clock limit."""
    with Verifier(VerifierConfig(workers=1, cpu_seconds=0.2)) as pool:
        assert all(verdict.correct for verdict in pool.compare([(str(i), str(i)) for i in range(600)]))


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


def test_parsable(verifier):
    assert [v.correct for v in verifier.parsable(["5", r"\frac{1}{2}", ""])] == [True, True, False]


def test_no_worker_outlives_the_pool():
    with Verifier(VerifierConfig(workers=2)) as pool:
        pool.compare([("1", "1")] * 2)
        workers = [pool.idle.get() for _ in range(2)]
        for worker in workers:
            pool.idle.put(worker)
    assert all(worker.process.poll() is not None for worker in workers)
