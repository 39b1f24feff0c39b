"""One host thinks, all hosts compute: a recorded leader is followed by an instance that has nothing but the devices."""

import jax
import numpy as np
import pytest
from test_train import small

from cgrpo_jax.learning import credit, steps
from cgrpo_jax.process import wire
from cgrpo_jax.records import Kind
from cgrpo_jax.rollout import critics
from cgrpo_jax.run import beginning, opening
from cgrpo_jax.run import leader as of_leader
from cgrpo_jax.sampling.engine import Engine
from cgrpo_jax.text import tokenizer
from cgrpo_jax.training import train
from cgrpo_jax.workdir import metrics, progress

CHANGES = {
    "eval.every": 2,
    "eval.problems": 4,
    "eval.samples": 1,
    "train.updates_per_rollout": 2,
    "objective.kl_coef": 0.1,
}


class Recorder:
    """A leader that writes down all it tells the others, as bytes: nothing but plain data can be told."""

    leader = True

    def __init__(self):
        self.told = []

    def share(self, find):
        found = find()
        self.told.append(wire.packed(found))
        return found

    def meet(self, purpose):
        pass

    def does(self, what):
        pass

    def check_alike(self, facts):
        pass

    def check_folder(self, folder):
        pass


class Follower:
    """Hears what a leader told, and finds nothing out."""

    leader = False

    def __init__(self, told):
        self.told = iter(told)

    def share(self, find):
        return wire.unpacked(next(self.told))

    def meet(self, purpose):
        pass

    def does(self, what):
        pass

    def check_alike(self, facts):
        pass

    def check_folder(self, folder):
        pass


def watched(monkeypatch, seen):
    """Notes each request, each bin and each loss."""
    submit, put, update = Engine.submit, steps.put_bins, steps.make_update

    def noting_submit(self, requests):
        seen.extend(("request", tuple(r.name), tuple(r.prompt_ids), r.limit) for r in requests)
        return submit(self, requests)

    def noting_put(mesh, bins):
        seen.append(("bins", *(x.tobytes() for x in jax.tree.leaves(bins))))
        return put(mesh, bins)

    def noting_update(*args):
        function = update(*args)

        def call(state, frozen, bins):
            state, sums = function(state, frozen, bins)
            seen.append(("sums", *((name, float(value)) for name, value in sorted(sums.items()))))
            return state, sums

        return call

    monkeypatch.setattr(Engine, "submit", noting_submit)
    monkeypatch.setattr(steps, "put_bins", noting_put)
    monkeypatch.setattr(steps, "make_update", noting_update)


def forbidden(*args, **kwargs):
    raise AssertionError("a follower must not do this")


@pytest.mark.thorough
def test_a_follower_does_what_its_leader_did(tmp_path, monkeypatch):
    """The same requests, bins and losses, while data, graders, critics, texts, files and clocks raise if called."""
    leader, follower = [], []
    recorder = Recorder()
    with jax.numpy_rank_promotion("allow"), monkeypatch.context() as patched:
        watched(patched, leader)
        train(small(**CHANGES), tmp_path / "leader", recorder)
    kinds = {row[1][0] for row in leader if row[0] == "request"}
    assert (
        kinds == {Kind.RESPONSE, Kind.REFINEMENT, Kind.EVALUATION} and len([r for r in leader if r[0] == "sums"]) == 4
    )
    with jax.numpy_rank_promotion("allow"), monkeypatch.context() as patched:
        watched(patched, follower)
        for owner, name in [
            (opening, "load_problems"), (of_leader, "Verifier"), (of_leader.rewards, "score"), (of_leader, "open_all"),
            (critics, "indicative_gt"), (tokenizer.Tokenizer, "encode_chat"), (tokenizer.Tokenizer, "decode"),
            (metrics.Writer, "scalars"), (beginning, "exclusive"), (credit, "of_updates"),
            (progress.Progress, "__init__"),  # the only clock of a run
        ]:  # fmt: skip
            patched.setattr(owner, name, forbidden)
        train(small(**CHANGES), tmp_path / "follower", Follower(recorder.told))
    assert follower == leader
    saved = [sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir() if p.name.isdigit()) for name in
             ("leader", "follower")]  # fmt: skip
    assert saved[0] == saved[1] == ["1", "2"]


def test_a_follower_that_hears_something_else_does_something_else(tmp_path, monkeypatch):
    """The comparison can fail: one id of one prompt changed."""
    recorder, seen = Recorder(), []
    cfg = small(**{"train.steps": 1})
    with jax.numpy_rank_promotion("allow"):
        train(cfg, tmp_path / "leader", recorder)
        told = [wire.unpacked(data) for data in recorder.told]
        first = next(
            i for i, message in enumerate(told) if isinstance(message, tuple) and len(message) == 2 and message[0]
        )
        requests, more = told[first]
        told[first] = ([requests[0]._replace(prompt_ids=[5, *requests[0].prompt_ids[1:]]), *requests[1:]], more)
        watched(monkeypatch, seen)
        train(cfg, tmp_path / "follower", Follower(map(wire.packed, told)))
    asked = [row for row in seen if row[0] == "request"]
    assert (
        asked[0][2][0] == 5 and np.isfinite([value for row in seen if row[0] == "sums" for _, value in row[1:]]).all()
    )


def test_a_recording_holds_no_text(tmp_path):
    """Only ids, names and arrays are told: texts, golds and critiques stay with the leader."""
    recorder = Recorder()
    with jax.numpy_rank_promotion("allow"):
        train(small(**{"train.steps": 1}), tmp_path / "w", recorder)
    polls = [
        message for message in map(wire.unpacked, recorder.told) if isinstance(message, tuple) and len(message) == 2
    ]
    assert polls and not any(b"What is" in data for data in recorder.told)
