"""A model of a run as one record: which of its parameters are trained, and where the others come from."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from conftest import QUICKSTART
from safetensors.numpy import load_file, save_file
from test_planning import compiled, is_within, shapes  # noqa: F401
from test_train import lines, small, weights, without_times

from cgrpo_jax import convert
from cgrpo_jax.errors import CheckpointError, ConfigError
from cgrpo_jax.model import hf
from cgrpo_jax.model.sharding import joined, path_of, split
from cgrpo_jax.planner.memory import residents
from cgrpo_jax.planner.programs import largest, programs
from cgrpo_jax.run import build
from cgrpo_jax.training import train
from cgrpo_jax.workdir.checkpoints import Checkpointer, read_meta

SEVERAL = {"train.updates_per_rollout": 2, "objective.kl_coef": 0.1, "eval.every": 1, "eval.problems": 4}
CHANGES = SEVERAL | {"refine.trigger": "always", "optimizer.learning_rate": 1e-2}


def is_trained(path):
    return path.startswith(("layers/mlp/", "norm/"))


def partly_trained(run):
    return dataclasses.replace(run, policy=dataclasses.replace(run.policy, trained=is_trained))


@pytest.fixture
def part(monkeypatch):
    """Every run is opened with a policy of which only the MLPs and the last norm are trained."""
    whole = build.open_run
    monkeypatch.setattr(build, "open_run", lambda *args: partly_trained(whole(*args)))


def trained_tensors():
    """The names that Hugging Face has for what is trained."""
    shape = build.open_run(small()).policy.shape
    return {name for path, source in hf.sources(shape).items() if is_trained(path) for name in source.names}


class Killed(Exception):
    pass


@pytest.mark.thorough
def test_a_run_that_trains_a_part_of_the_model(part, tmp_path, monkeypatch):
    """Killed and resumed it ends as one that was not; its checkpoints hold the part, and an export the whole."""

    def killed_at_the_second(self, step, *rest):
        if step == 2:
            raise Killed
        save(self, step, *rest)

    save, cfg = Checkpointer.save, small(**CHANGES)
    with jax.numpy_rank_promotion("allow"):
        train(cfg, tmp_path / "whole")
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Checkpointer, "save", killed_at_the_second)
            train(cfg, tmp_path / "w")
        train(cfg, tmp_path / "w")
    runs = [tmp_path / name for name in ("whole", "w")]
    one, other = (without_times(lines(run / "metrics.jsonl")) for run in runs)
    assert one == other
    assert len({(run / "rollouts/000002.jsonl").read_bytes() for run in runs}) == 1
    exports = [weights(run, tmp_path, f"{run.name}_hf") for run in runs]
    base = load_file(QUICKSTART / "model.safetensors")
    assert exports[0].keys() == exports[1].keys() == base.keys()
    for name, tensor in base.items():
        first, second = (export[name].tobytes() for export in exports)
        assert first == second and (first == tensor.tobytes()) == (name not in trained_tensors()), name
    digests = read_meta(tmp_path / "w/checkpoints/2")["digests"]
    of_params = {path.removeprefix("params/") for path in digests if path.startswith("params/")}
    assert of_params == {"norm/scale", *(f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down"))}
    moments = [path for path in digests if path.startswith("opt_state/") and path.endswith(("kernel", "scale"))]
    assert len(moments) == 2 * len(of_params) and not any("embed" in path or "attn" in path for path in digests)
    # Sampled from the weights that the update then sees, which are others after the first step:
    (row,) = [row for row in one if row["step"] == 2 and "reward/responses" in row]
    assert row["sampler/logp_diff_max"] < 1e-3 and row["policy/kl"] > 1e-3


def test_frozen_weights_that_are_gone_or_others_are_refused_in_one_line(part, tmp_path):
    model, cfg = shutil.copytree(QUICKSTART, tmp_path / "model"), {"model.path": str(tmp_path / "model")}
    with jax.numpy_rank_promotion("allow"):
        train(small(**cfg | {"train.steps": 1}), tmp_path / "w")
    tensors = load_file(model / "model.safetensors")
    changed = tensors | {"model.embed_tokens.weight": -tensors["model.embed_tokens.weight"]}
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    accepted = cfg | {"train.accept_changes": "model.weights"}
    with pytest.raises(ConfigError, match=r"model\.weights"):
        train(small(**cfg), tmp_path / "w")
    words = (
        "model.path = .*: not the weights this run began with, and those that it does not train are in no checkpoint"
    )
    with pytest.raises(CheckpointError, match=words):
        train(small(**accepted), tmp_path / "w")
    with pytest.raises(CheckpointError, match=words):
        convert.convert(str(tmp_path / "w"), "hf", str(tmp_path / "out"))
    shutil.rmtree(model)
    with pytest.raises(CheckpointError, match=r"no such folder.*; the run trains a part of it") as raised:
        convert.convert(str(tmp_path / "w"), "hf", str(tmp_path / "out"))
    assert len(str(raised.value).splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_frozen_weights_that_were_drawn_are_drawn_again(part, tmp_path):
    """From the run's seed, whatever the exporting process has."""
    cfg = small(**{"model.random_init": True, "seed": 11, "train.steps": 1})
    with jax.numpy_rank_promotion("allow"):
        train(cfg, tmp_path / "w")
    params, _ = convert.load(str(tmp_path / "w"), None)
    initial = build.open_run(cfg).policy.weights()
    for (key_path, leaf), own in zip(
        jax.tree_util.tree_leaves_with_path(initial), jax.tree.leaves(params), strict=True
    ):
        assert is_trained(path_of(key_path)) or np.asarray(leaf).tobytes() == np.asarray(own).tobytes()


def test_two_trees_are_one_again():
    params = build.plan_run(small()).policy.abstract_weights()
    trained, frozen = split(params, is_trained)
    paths = [{path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)} for tree in (trained, frozen)]
    assert not paths[0] & paths[1] and trained.keys() == {"layers", "norm"} and frozen["layers"].keys() > {"attn"}
    assert jax.tree.structure(joined(trained, frozen)) == jax.tree.structure(params)
    assert split(params, lambda path: True) == (params, {})


def test_a_plan_counts_moments_and_reference_of_what_is_trained():
    run = build.plan_run(small(**{"objective.kl_coef": 0.1}))
    found = {}
    for who in (run, partly_trained(run)):
        chosen = largest(programs(who, build.bin_sizes(who, 64)))
        found[who] = {resident.name: resident.leaves for resident in residents(who, chosen)}
    whole, part = found.values()
    own = split(run.policy.abstract_weights(), is_trained)[0]
    assert part["parameters"] == whole["parameters"]
    assert part["reference parameters"].total() == len(jax.tree.leaves(own)) < whole["reference parameters"].total()
    scalars = whole["optimizer state"].total() - 2 * whole["parameters"].total()
    assert part["optimizer state"].total() == 2 * part["reference parameters"].total() + scalars


@pytest.mark.thorough
def test_no_program_of_a_part_compiles_that_is_not_listed(part, tmp_path, compiled):  # noqa: F811
    cfg = small(**CHANGES)
    run, listed = build.open_run(cfg), {}
    for program in programs(run, build.bin_sizes(run, 64)):
        listed.setdefault(program.function.__name__, []).append(shapes(program))
    compiled.clear()
    with jax.numpy_rank_promotion("allow"):
        train(cfg, tmp_path / "w")
        train(small(**CHANGES | {"train.steps": 3}), tmp_path / "w")
    for name, found in compiled:
        assert any(is_within(found, of) for of in listed[name]), f"{name} {found}"
