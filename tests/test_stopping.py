"""Ctrl-C and SIGTERM: where a run leaves, what it saves, what it says; and that it then ends as if never stopped."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from test_train import lines, small, without_times

from cgrpo_jax import api
from cgrpo_jax.process import stopping
from cgrpo_jax.run import saving
from cgrpo_jax.workdir import checkpoints
from cgrpo_jax.workdir.progress import Progress

CHANGES = {"train.steps": 3, "checkpoint.every": 9, "eval.every": 2, "eval.problems": 4, "eval.samples": 1}


def run(workdir, method="rl", **changes):
    with jax.numpy_rank_promotion("allow"):
        api.train(small(**CHANGES | {"method": method} | changes), workdir)


def ended(workdir):
    """Metrics without times, digests of the arrays, rollouts."""
    meta = checkpoints.read_meta(workdir / "checkpoints/3")
    rollouts = [path.read_bytes() for path in sorted((workdir / "rollouts").iterdir())]
    return without_times(lines(workdir / "metrics.jsonl")), meta["digests"], meta["problems_seen"], rollouts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir)
    return ended(workdir)


@pytest.fixture
def signalled(monkeypatch):
    """Sends a signal to this process when a phase is entered for the so manieth time."""
    phase, left = Progress.phase, {}

    def watched(self, name):
        if name in left:
            number, count = left[name]
            left[name] = number, count - 1
            if count == 1:
                os.kill(os.getpid(), number)
        return phase(self, name)

    monkeypatch.setattr(Progress, "phase", watched)
    return left.update


def on_disk(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.thorough
def test_the_last_step_is_saved_and_the_run_ends_the_same(undisturbed, tmp_path, signalled, capfd):
    """In an update, in an evaluation, in a rollout, by either signal, with the report written each time."""
    for number, phase, count, after in (
        (signal.SIGINT, "update", 1, 1),
        (signal.SIGTERM, "evaluate", 1, 2),  # whose evaluation is done first by the next start
        (signal.SIGINT, "sample", 1, 2),
    ):
        signalled({phase: (number, count)})
        words = f"stopped after step {after}, which is saved; the same command goes on after step {after}$"
        before = signal.getsignal(number)
        with pytest.raises(stopping.Stopped, match=words):
            run(tmp_path)
        assert on_disk(tmp_path)[-1] == str(after) and (tmp_path / "report.html").exists()
        assert signal.getsignal(number) is before and "once more leaves at once" in capfd.readouterr().err
        (tmp_path / "report.html").unlink()
    run(tmp_path)
    assert ended(tmp_path) == undisturbed
    (tmp_path / "report.html").unlink()  # as a kill while it was written leaves it
    run(tmp_path)
    assert (tmp_path / "report.html").exists() and ended(tmp_path) == undisturbed


def test_steps_that_are_not_saved_are_named(tmp_path, signalled, monkeypatch):
    """A state too large for a minute; a step whose evaluation checkpoint.best goes by; none at all."""
    signalled({"sample": (signal.SIGINT, 1)})
    with pytest.raises(stopping.Stopped, match="stopped before the first step was done; the same command begins anew"):
        run(tmp_path, **{"eval.every": 0})
    monkeypatch.setattr(saving, "RATE", 1e3)
    signalled({"sample": (signal.SIGINT, 3)})
    lost = "after step 2; steps 1 to 2 are lost, for 0 GB are not saved within a minute; the same command begins anew"
    with pytest.raises(stopping.Stopped, match=lost):
        run(tmp_path, **{"eval.every": 0})
    assert on_disk(tmp_path) == []
    monkeypatch.undo()


def test_a_step_without_the_evaluation_that_ranks_it_is_not_saved(tmp_path, signalled):
    signalled({"evaluate": (signal.SIGTERM, 2)})
    words = (
        "after step 2; step 2 is lost, for its evaluation, which checkpoint.best goes by, was not done; .* after step 1"
    )
    with pytest.raises(stopping.Stopped, match=words):
        run(tmp_path, **{"checkpoint.best": "eval/pass@1", "checkpoint.every": 1})
    assert on_disk(tmp_path) == ["1"]


def test_supervised_training_and_generation_leave_too(tmp_path, signalled):
    signalled({"update": (signal.SIGINT, 2)})
    with pytest.raises(stopping.Stopped, match="stopped after step 2, which is saved"):
        run(
            tmp_path / "sft", "sft", **{"eval.every": 0, "data.max_prompt_tokens": 256, "refine.max_prompt_tokens": 300}
        )
    signalled({"sample": (signal.SIGINT, 2)})
    rows = {"method": "generate", "refine.trigger": "never", "train.steps": 3, "generate.rows": "responses"}
    with jax.numpy_rank_promotion("allow"), pytest.raises(stopping.Stopped, match="the rows of 1 of 3 steps are in"):
        api.generate(small(**rows), tmp_path / "rows")


SECOND = """
import sys, threading, time
from cgrpo_jax.process import stopping
stopping.for_this_process()
print("ready", flush=True)
lock = threading.Lock(); lock.acquire(); lock.acquire(timeout=60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(number):
    """Whatever the main thread waits for; in a line, without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", SECOND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert said.split("\n")[1:] == [
        "stopping after what is under way; once more leaves at once", "left at once: what was not saved yet is lost", ""
    ]  # fmt: skip


def test_a_signal_inside_a_callback_of_jax_is_not_swallowed():
    def interrupted(x):
        os.kill(os.getpid(), signal.SIGINT)
        return x

    with stopping.for_this_call():
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(interrupted, x, x))(1.0))
        with pytest.raises(stopping.Stopped):
            stopping.look()
    stopping.look()  # of the next call nothing was asked
