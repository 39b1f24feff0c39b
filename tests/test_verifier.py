"""The worker pool: agreement with math-verify, limits, replacement, fair queueing; nothing is parsed in this process."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from cgrpo_jax.config.options import VerifierConfig
from cgrpo_jax.errors import VerifierError
from cgrpo_jax.grading.grader import Job
from cgrpo_jax.grading.verifier import Graded, Reading, Verifier
from cgrpo_jax.records import Verdict

BOMB = "9^{9^{9^{9}}}"
YES = Verdict(1.0, True, "ok")
WORKER = "cgrpo_jax.grading.verifier.WORKER"


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
    assert [verdict.correct for verdict in verifier.compare(PAIRS, "math_verify")] == expected
    assert any(expected) and not all(expected)


def test_a_bomb_is_cut_counted_and_hurts_nobody(verifier):
    began = time.perf_counter()
    verdicts = verifier.compare([("5", "5"), ("9", BOMB), ("5", "5"), ("9", BOMB), ("5", "5")])
    assert verdicts == [YES, Verdict(0.0, False, "timeout")] * 2 + [YES]
    assert time.perf_counter() - began < 60
    assert verifier.compare([("5", "5")] * 4) == [YES] * 4  # replaced workers work


def test_the_size_of_this_process_is_not_held_against_the_workers():
    """A trainer holds gigabytes; the workers it starts do not."""
    large = np.ones(2**28)  # 2 GiB
    with Verifier(VerifierConfig(workers=1)) as pool:
        assert pool.compare([("5", "5")] * 3) == [YES] * 3
    assert large[0] == 1


def test_waiting_in_the_queue_costs_nothing(tmp_path, monkeypatch):
    """One worker, half a second an answer, 6 s of them; one answer's wall-clock limit is 5 s."""
    slow = """
import json, pickle, sys, time
print(json.dumps({"starting": False}), flush=True)
while jobs := pickle.load(sys.stdin.buffer):
    for job in jobs:
        time.sleep(0.5)
        print(json.dumps({"reward": 1.0, "status": "ok", "worn": False}), flush=True)
"""
    (tmp_path / "slow.py").write_text(slow)
    monkeypatch.setattr(WORKER, (str(tmp_path / "slow.py"),))
    with Verifier(VerifierConfig(workers=1, cpu_seconds=1.0)) as pool:
        assert pool.compare([("5", "5")] * 12) == [YES] * 12


def test_a_dead_worker_is_replaced(verifier):
    """Killed before its batch of four: only the first one has no verdict."""
    worker = verifier.idle.get()
    worker.process.kill()
    worker.process.wait()
    worker.starting = False
    verifier.idle.put(worker)
    statuses = [verdict.status for verdict in verifier.compare([("1", "1")] * 64)]
    assert sorted(statuses) == ["died"] + ["ok"] * 63
    assert [v.status for v in verifier.compare([("1", "1")] * 4)] == ["ok"] * 4


def test_a_bomb_costs_its_batch_one_verdict_and_keeps_its_answer(verifier):
    """Whole responses, several to a message: those behind the bomb are graded by the next worker."""
    texts = [f"so \\boxed{{{BOMB if n % 40 == 1 else n}}}" for n in range(64)]
    found = verifier.grade([Job("math", str(n), text) for n, text in enumerate(texts)])
    assert found == [
        Graded(BOMB, Verdict(0.0, False, "timeout")) if n % 40 == 1 else Graded(str(n), YES) for n in range(64)
    ]


def test_nothing_that_a_model_wrote_is_parsed_in_this_process(verifier, monkeypatch):
    """Responses, votes and golds: whatever reads an answer raises here, and works in the workers."""

    def forbidden(*args, **kwargs):
        raise AssertionError("parsed in the process that trains")

    from cgrpo_jax.grading import answers, choices, grader, normalise, rewards, structure
    from cgrpo_jax.records import Problem

    for module, name in [
        (answers, "extract_answer"), (grader, "extract_answer"), (choices, "extract_choice"), (choices, "chosen"),
        (normalise, "clean"), (structure, "parse"), (grader.equivalence, "equal"), (grader.equivalence, "same"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, forbidden)
    options = {"options": ["red", "blue"]}
    asked = [("math", "\\frac12", None), ("exact", "0.5", None), ("math_verify", "0.5", None), ("function", "", None)]
    problems = [Problem("?", gold, (), name, entry=entry) for name, gold, entry in [*asked, ("choice", "B", options)]]
    texts = ["\\boxed{0.5}"] * 4 + ["I choose (B)."]
    attempts = rewards.score([(p, None, text) for p, text in zip(problems, texts, strict=True)], verifier)
    assert [(a.extracted, a.reward) for a in attempts] == [("0.5", 1)] * 3 + [("0.5", 0), ("B", 1)]
    assert rewards.votes([(problems[-1], "(B) blue"), (problems[-1], None), (problems[0], "1/2")], verifier) == [
        "B",
        None,
        "1/2",
    ]
    assert verifier.readable(["\\frac{x}{2}"]) == [Reading(True, "ok")]


def test_a_worker_begins_without_numpy_and_sympy_and_ends_with_its_pipe():
    """Numbers and words need neither, and arrays would take the memory that answers are allowed."""
    code = (
        "import sys; from cgrpo_jax.grading import worker; sys.stdin = open('/dev/null'); worker.main(1 << 30, 2.0);"
        "print(*({'numpy', 'sympy', 'jax', 'math_verify'} & sys.modules.keys()), file=sys.__stderr__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == '{"starting": true}\n{"starting": false}\n' and done.stderr.strip() == ""


@pytest.mark.parametrize(
    "answer", ["\0", "\ud800", "", " ", "{" * 500, "\\frac{", "__import__('os').system('true')", "a" * 2000]
)
def test_odd_text_gets_a_verdict(verifier, answer):
    assert verifier.compare([("5", answer)])[0].correct is False
    assert all(not graded.verdict.correct for graded in verifier.grade([Job("math", "5", answer)]))


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
        pool.compare([("1 + x", "x + 1")] * 4)  # the workers have started
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
        verdict, after = pool.compare([("5", "(x+y+z+w)^{400}"), ("5", "5")], "math_verify")
    assert verdict == Verdict(0.0, False, "memory") and after == YES


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
            assert all(verdict.correct for verdict in pool.compare(pairs, "math_verify"))
            sizes.append([resident_kb(pid) for pid in pids])
    assert all(last - first < 40_000 for first, last in zip(sizes[0], sizes[-1], strict=True)), sizes


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit('no math-verify here')")
    monkeypatch.setattr(WORKER, (str(tmp_path / "worker.py"),))
    with Verifier(VerifierConfig()) as pool, pytest.raises(VerifierError, match="did not start: no math-verify here"):
        pool.compare([("1", "1")] * 5)


def test_a_library_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    """It is imported for the first answer that needs it; what comes before has its verdict."""
    hidden = "import sys\nsys.modules['math_verify'] = None\nfrom cgrpo_jax.grading import worker\n"
    (tmp_path / "worker.py").write_text(hidden + "worker.main(int(sys.argv[1]), float(sys.argv[2]))")
    monkeypatch.setattr(WORKER, (str(tmp_path / "worker.py"),))
    with Verifier(VerifierConfig(workers=1)) as pool:
        assert pool.compare([("1", "1")]) == [YES]
        with pytest.raises(VerifierError, match=r"did not start: ModuleNotFoundError: .*math_verify"):
            pool.compare([("1 + x", "x + 1")])


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
        pool.compare([("1 + x", "x + 1")])
        began = time.perf_counter()
        verdicts = pool.compare(pairs)
        return verdicts, time.perf_counter() - began


def test_the_time_limit_is_that_of_an_answer():
    """Not of each of its parts: four power towers in a list, and then an answer with a limit of its own."""
    towers = ", ".join(f"{n}^{{{n}^{{{n}^{{{n}}}}}}}" for n in (9, 8, 7, 6))
    verdicts, seconds = timed([("2, 3, 5, 7", towers), (r"\frac{x}{2}", "x/2")], cpu_seconds=1.0)
    assert verdicts == [Verdict(0.0, False, "timeout"), YES]
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


CHARGED = """
import sys, time
from cgrpo_jax.grading import expressions, worker
def read(text, plain=False):
    busy(0.7 if text == "slow" else 0)
    return [text]
def busy(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
expressions.read, expressions.holds = read, lambda text, gold, answer, how: busy(0.7 if "+" in answer else 0) or True
worker.main(int(sys.argv[1]), float(sys.argv[2]))
"""


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_known_already_is_charged_all_the_same(tmp_path, monkeypatch, reverse):
    """One gold takes 0.7 s to read, one comparison 0.7 s more; 1 s is allowed. Whoever comes first pays no more."""
    (tmp_path / "charged.py").write_text(CHARGED)
    monkeypatch.setattr(WORKER, (str(tmp_path / "charged.py"),))
    asked = [("slow", "a"), ("slow", "a + b"), ("slow", "c"), ("quick", "a + b"), ("slow", "a"), ("quick", "a + b")]
    wanted = dict(zip(asked, ["ok", "timeout", "ok", "ok"], strict=False))
    with Verifier(VerifierConfig(workers=1, cpu_seconds=1.0)) as pool:
        order = asked[::-1] if reverse else asked
        assert [verdict.status for verdict in pool.compare(order, "math_verify")] == [wanted[pair] for pair in order]


LEAVING = """
import sys
from cgrpo_jax.grading import expressions, worker
kept = []
def parse(text, **_):
    if text.startswith("\\\\boxed{grow"):
        kept.append(bytearray(int(text.split()[1].rstrip("}")) << 20))
    return [text]
expressions.parse, expressions.verify = parse, lambda gold, answer, **_: True
worker.main(int(sys.argv[1]), float(sys.argv[2]))
"""


def test_a_worker_that_has_grown_is_replaced_before_it_is_blamed(tmp_path, monkeypatch):
    """Answers that leave 100 MB each behind, of 1,000: none is refused. One that takes 600 is, wherever it stands."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    monkeypatch.setattr(WORKER, (str(tmp_path / "leaving.py"),))
    with Verifier(VerifierConfig(workers=1, memory_mb=1000)) as pool:
        answers = ["grow 100"] * 5 + ["grow 600"] + ["grow 100"] * 2 + ["grow 600", "5"]
        statuses = [pool.compare([("5", answer)], "math_verify")[0].status for answer in answers]
    assert statuses == ["memory" if answer == "grow 600" else "ok" for answer in answers]


def test_too_little_memory_to_begin_with_is_said():
    with (
        Verifier(VerifierConfig(workers=1, memory_mb=60)) as pool,
        pytest.raises(VerifierError, match="memory_mb = 60"),
    ):
        pool.compare([("5 + x", "x + 5")])


def test_a_worker_that_cannot_be_restarted_is_an_error_that_says_so(monkeypatch):
    """And once there are processes again, the pool works."""
    popen, working = subprocess.Popen, True

    def start(*args, **kwargs):
        if not working:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return popen(*args, **kwargs)

    monkeypatch.setattr("cgrpo_jax.grading.verifier.subprocess.Popen", start)
    with Verifier(VerifierConfig(workers=1, cpu_seconds=1.0)) as pool:
        assert pool.compare([("1", "1")]) == [YES]
        working = False
        assert pool.compare([("9", BOMB)]) == [Verdict(0.0, False, "timeout")]
        for _ in range(2):
            with pytest.raises(VerifierError, match=r"worker cannot be restarted: .*temporarily unavailable"):
                pool.compare([("1", "1")])
        working = True
        assert pool.compare([("1", "1")]) == [YES]
    working = False
    with pytest.raises(VerifierError, match=r"worker cannot be started: .*temporarily unavailable"):
        Verifier(VerifierConfig(workers=2))


def test_derivatives_that_cannot_be_compared_are_not_held_equal():
    """An equation against an expression: their difference is none."""
    import sympy

    from cgrpo_jax.grading.expressions import doubtful

    x, y = sympy.symbols("x y")
    slope = sympy.Derivative(y, x)
    assert doubtful(sympy.Eq(slope, 2 * x, evaluate=False), 2 * x)
    assert not doubtful(slope + x, x + slope)
    assert doubtful(slope, sympy.Derivative(x, y))
