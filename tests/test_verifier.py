"""The worker pool: agreement with math-verify, limits, replacement, fair queueing."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from cgrpo_jax.config.options import VerifierConfig
from cgrpo_jax.grading import equivalence
from cgrpo_jax.grading import verifier as verifier_module
from cgrpo_jax.grading.parts import Parts
from cgrpo_jax.grading.verifier import Reading, Reply, Verifier, VerifierError
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


def timed(pairs, **changes):
    """Verdicts by the grader of answers, and the wall seconds that they took once the workers had started."""
    with Verifier(VerifierConfig(workers=1, **changes)) as pool:
        pool.compare([("1", "1")])
        began = time.perf_counter()
        verdicts = equivalence.compare(pairs, pool)
        return verdicts, time.perf_counter() - began


def test_the_time_limit_is_that_of_an_answer():
    """Not of each of its parts: four power towers in a list, and then an answer with a limit of its own."""
    towers = ", ".join(f"{n}^{{{n}^{{{n}^{{{n}}}}}}}" for n in (9, 8, 7, 6))
    verdicts, seconds = timed([("2, 3, 5, 7", towers), (r"\frac{x}{2}", "x/2")], cpu_seconds=1.0)
    assert verdicts == [Verdict(0.0, False, "timeout"), Verdict(1.0, True, "ok")]
    assert seconds < 8, seconds


def test_many_parts_against_many_have_one_limit():
    """60 against 60 are 3,600 questions."""
    gold = ", ".join(f"\\sqrt{{{n}}}+x" for n in range(101, 161))
    answer = ", ".join(f"x+1+\\sqrt{{{n}}}" for n in range(101, 161))
    verdicts, seconds = timed([(gold, answer)], cpu_seconds=1.0)
    assert verdicts == [Verdict(0.0, False, "timeout")] and seconds < 8, seconds


def test_what_an_answer_is_charged_does_not_depend_on_others():
    """Equal answers have equal verdicts, in any order, and what one has no time for is still asked by another."""
    towers = ("2, 3, \\frac{y}{2}", "9^{9^{9^{9}}}, 8^{8^{8^{8}}}, y/2")
    pairs = [towers, (r"\frac{y}{2}", "y/2"), towers]
    for order in (pairs, pairs[::-1]):
        verdicts, seconds = timed(order, cpu_seconds=1.0)
        assert [verdict.status for verdict in verdicts] == ["timeout", "ok", "timeout"]
        assert [verdict.correct for verdict in verdicts] == [False, True, False] and seconds < 8, seconds


class Scripted:
    """Answers from a table of CPU seconds; a part that takes longer than what is left is cut."""

    cpu_seconds = 2.0

    def __init__(self, takes):
        self.takes, self.asked = takes, []

    def compare_parts(self, answers):
        found = []
        for questions, left in answers:
            replies = []
            for question in questions:
                if left <= 0:
                    break
                self.asked.append(question)
                takes = self.takes[question[1]]
                replies.append(Reply(takes <= left, "ok" if takes <= left else "timeout", min(takes, left)))
                left -= takes
            found.append(replies)
        return found


@pytest.mark.parametrize("reverse", [False, True])
def test_the_limit_is_charged_alike_in_any_order(reverse):
    """(a) uses 1.5 of 2 s for its first part and has no time for its second, which (b) alone has."""
    scripted = Scripted({"p": 1.5, "q": 1.0, "r": 0.1})
    wanted = {0: [("g", "p"), ("h", "q"), ("i", "r")], 1: [("h", "q")], 2: [("g", "p"), ("h", "q"), ("i", "r")]}
    parts = Parts(scripted, 3)
    for answer in wanted:
        assert all(parts.says(answer, question) for question in wanted[answer])
    numbers = sorted(wanted, reverse=reverse)
    parts.ask({answer: parts.unknown(answer, wanted[answer]) for answer in numbers})
    assert parts.spent == [True, False, True] and scripted.asked.count(("g", "p")) == 1  # equal answers are asked once
    assert [parts.verdict(answer, answer == 1, wanted[answer]).status for answer in range(3)] == [
        "timeout",
        "ok",
        "timeout",
    ]
    assert not parts.says(0, ("i", "r")) and parts.says(1, ("h", "q"))


LEAVING = """
import json, sys
sys.path.insert(0, {folder!r})
import verifier_worker, math_verify
kept = []
def parse(text, **_):
    if text.startswith("\\\\boxed{{grow"):
        kept.append(bytearray(int(text.split()[1].rstrip("}}")) << 20))
    return [text]
math_verify.parse, math_verify.verify = parse, lambda gold, answer, **_: True
verifier_worker.main(int(sys.argv[1]))
"""


def test_a_worker_that_has_grown_is_replaced_before_it_is_blamed(tmp_path, monkeypatch):
    """Answers that leave 100 MB each behind, of 1,000: none is refused. One that takes 600 is, wherever it stands."""
    folder = str(pathlib.Path(verifier_module.__file__).parent)
    (tmp_path / "leaving.py").write_text(LEAVING.format(folder=folder))
    monkeypatch.setattr("cgrpo_jax.grading.verifier.WORKER", tmp_path / "leaving.py")
    with Verifier(VerifierConfig(workers=1, memory_mb=1000)) as pool:
        answers = ["grow 100"] * 5 + ["grow 600"] + ["grow 100"] * 2 + ["grow 600", "5"]
        statuses = [pool.compare([("5", answer)])[0].status for answer in answers]
    assert statuses == ["memory" if answer == "grow 600" else "ok" for answer in answers]


def test_too_little_memory_to_begin_with_is_said():
    with (
        Verifier(VerifierConfig(workers=1, memory_mb=60)) as pool,
        pytest.raises(VerifierError, match="memory_mb = 60"),
    ):
        pool.compare([("5", "5")])


def test_a_worker_that_cannot_be_restarted_is_an_error_that_says_so(monkeypatch):
    """And once there are processes again, the pool works."""
    popen, working = subprocess.Popen, True

    def start(*args, **kwargs):
        if not working:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return popen(*args, **kwargs)

    monkeypatch.setattr("cgrpo_jax.grading.verifier.subprocess.Popen", start)
    with Verifier(VerifierConfig(workers=1, cpu_seconds=1.0)) as pool:
        assert pool.compare([("1", "1")]) == [Verdict(1.0, True, "ok")]
        working = False
        for _ in range(2):
            with pytest.raises(VerifierError, match=r"worker cannot be restarted: .*temporarily unavailable"):
                pool.compare([("9", BOMB)])
        working = True
        assert pool.compare([("1", "1")]) == [Verdict(1.0, True, "ok")]
    working = False
    with pytest.raises(VerifierError, match=r"worker cannot be started: .*temporarily unavailable"):
        Verifier(VerifierConfig(workers=2))


def test_derivatives_that_cannot_be_compared_are_not_held_equal():
    """An equation against an expression: their difference is none."""
    import sympy

    from cgrpo_jax.grading.verifier_worker import doubtful

    x, y = sympy.symbols("x y")
    slope = sympy.Derivative(y, x)
    assert doubtful(sympy.Eq(slope, 2 * x, evaluate=False), 2 * x)
    assert not doubtful(slope + x, x + slope)
    assert doubtful(slope, sympy.Derivative(x, y))
