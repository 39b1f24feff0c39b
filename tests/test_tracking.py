"""Trackers: what they are told, and that one that fails, hangs or is slow costs its own curves alone."""

import shutil
import sys
import threading
import time
import types

import jax
import pytest
from conftest import QUICKSTART
from test_train import small

from cgrpo_jax.errors import ConfigError
from cgrpo_jax.run import step_log
from cgrpo_jax.training import train
from cgrpo_jax.workdir import tracking
from cgrpo_jax.workdir.metrics import Writer


class Fake(types.ModuleType):
    """A module with the calls of wandb; each may be made to do something else."""

    def __init__(self, name, key=True, **calls):
        super().__init__(name)
        self.told, self.key, self.calls = [], key, calls

    def _call(self, name, /, *given, **named):
        self.told.append((name, *given, named))
        if name in self.calls:
            self.calls[name]()

    def login(self, prompt):
        assert prompt is False
        return self.key

    def init(self, **named):
        self._call("init", **named)

    def log(self, values, step):
        self._call("log", values, step=step)

    def finish(self):
        self._call("finish")


def written(monkeypatch, workdir, fake, rows=3, first=0, said=None):
    """Metrics of some steps through a writer with a tracker; the seconds that it took."""
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    log = (said if said is not None else []).append
    workdir.mkdir(exist_ok=True)
    tracker = tracking.open_tracker(fake.__name__, workdir, {"seed": 3}, log)
    writer, began = Writer(workdir, first, log, tracker=tracker), time.monotonic()
    for step in range(first + 1, first + rows + 1):
        writer.scalars(step, {"reward/responses": step / 4, "policy/entropy": float("nan")})
    writer.close()
    taken = time.monotonic() - began
    assert writer.path.read_text().count("\n") == first + rows
    return taken


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_told_the_same_names(tmp_path, monkeypatch, name):
    """A resumed run is the same run there; what is not finite is left out."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fakes = [Fake(name), Fake(name)]
    written(monkeypatch, tmp_path / "run", fakes[0])
    written(monkeypatch, tmp_path / "run", fakes[1], first=3)
    for first, fake in zip((0, 3), fakes, strict=True):
        (begun, named), *logged, ended = fake.told
        assert begun == "init" and named["config"] == {"seed": 3} and named["resume"] == "allow"
        assert logged == [
            ("log", {"reward/responses": step / 4}, {"step": step}) for step in range(first + 1, first + 4)
        ]
        assert ended == ("finish", {})
    names = {fake.told[0][1]["name"] for fake in fakes}
    assert len(names) == 1 and names.pop().startswith("run-")


@pytest.mark.parametrize(
    ("key", "mode", "found"), [(True, None, "online"), (False, None, "offline"), (True, "offline", "offline")]
)
def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch, key, mode, found):
    """It is never asked for one, and it is said how the run gets there later."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    said, fake = [], Fake("wandb", key)
    written(monkeypatch, tmp_path / "run", fake, said=said)
    assert fake.told[0][1]["mode"] == found and fake.told[0][1]["dir"] == str(tmp_path / "run")
    assert [line.startswith("wandb is offline") for line in said] == [True] * (found == "offline")


def test_others_are_not_told_where_things_lie(tmp_path, monkeypatch):
    """Of settings what a card says, too; wandb is kept from the rest (its own console, machine, user, repository)."""
    fake, told = Fake("wandb"), []
    written(monkeypatch, tmp_path / "run", fake)
    quiet = fake.told[0][1]["settings"]
    assert quiet["console"] == "off" and quiet["x_disable_meta"] and quiet["disable_git"] and quiet["host"] == ""

    def opened(name, workdir, config, log):
        told.append(config)
        raise InterruptedError

    folder = shutil.copytree(QUICKSTART, tmp_path / "secret_place/model")
    changes = {"model.path": str(folder), "api.base_url": "http://inner.host/v1", "train.tracker": "wandb"}
    monkeypatch.setattr(step_log, "open_tracker", opened)
    for method in ("sft", "rl"):
        with jax.numpy_rank_promotion("allow"), pytest.raises(InterruptedError):
            train(small(**changes, method=method), tmp_path / method)
    assert [config["model"]["path"] for config in told] == ["model"] * 2
    assert not [word for word in ("secret_place", "inner.host") if word in str(told)]


def fail():
    raise RuntimeError("the server\nsaid no")


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once(tmp_path, monkeypatch, call):
    said, fake = [], Fake("wandb", **{call: fail})
    written(monkeypatch, tmp_path / "run", fake, said=said)
    assert len(said) == 1 and "wandb failed and is told no more (RuntimeError: the server said no)" in said[0]
    assert [one[0] for one in fake.told].count(call) == 1


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, monkeypatch, call):
    monkeypatch.setattr(tracking.Tracker.close, "__defaults__", (0.2,))
    for_ever, said = threading.Event(), []
    taken = written(monkeypatch, tmp_path / "run", Fake("wandb", **{call: for_ever.wait}), said=said)
    for_ever.set()
    assert taken < 5 and len(said) == 1 and "wandb did not end within 0.2 s" in said[0]


def test_a_slow_tracker_loses_lines_and_says_so():
    go, said = threading.Event(), []
    tracker = tracking.Tracker("slow", lambda: (go.wait(), Fake("slow"))[1], said.append, rows=2)
    for step in range(5):
        tracker.row({"step": step, "loss": 0.0})
    assert tracker.lost == 3 and said == ["slow does not keep up: some of its curves will have gaps"]
    go.set()
    tracker.close()
    assert said[1:] == ["slow lacks 3 lines of metrics.jsonl"]


def test_a_tracker_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = small(**{"method": "sft", "train.tracker": "trackio"})
    with pytest.raises(
        ConfigError, match=r"train\.tracker = 'trackio' needs its package: pip install 'cgrpo_jax\[trackio\]'"
    ):
        train(cfg, tmp_path / "w")
