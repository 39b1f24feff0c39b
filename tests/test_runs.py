"""Whole runs: against numbers on file, rows of groups, resume with a reference, steps without a gradient."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import QUICKSTART
from golden_run import FILE, golden_run
from safetensors.numpy import load_file, save_file
from test_train import EVALUATED, lines, run_main, small, weights, without_times

from cgrpo_jax.errors import ConfigError, TrainingError
from cgrpo_jax.learning import steps
from cgrpo_jax.run import build
from cgrpo_jax.training import train
from cgrpo_jax.workdir.checkpoints import Checkpointer


def run(workdir, **changes):
    """The metrics, without times."""
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), workdir)
    return without_times(lines(workdir / "metrics.jsonl"))


# ---- On file ----

# What is rounded: losses, entropies, gradients. All else counts or averages rewards, and is compared exactly. XLA's own
# kernels at its own optimization level in place of the flags of conftest.py, or SSE4.2 in place of AVX, sample the same
# ids and change these by 2e-6 of themselves at most, the gap of sampler and trainer (which is rounding) by 3e-6.
ROUNDED = ("loss/", "policy/", "sampler/logp_diff")
RTOL, ATOL, OF_ROUNDING = 1e-3, 1e-6, 1e-4


def assert_the_same(found, wanted, rtol, words=""):
    """Two lists of metrics: what is rounded within `rtol`, all else exactly."""
    assert [list(row) for row in found] == [list(row) for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        for name, value in row.items():
            if name.startswith(ROUNDED):
                atol = OF_ROUNDING if name.startswith("sampler/") else ATOL
                np.testing.assert_allclose(value, other[name], rtol, atol, err_msg=f"{name} {words}")
            else:
                assert value == other[name], (name, words)


def test_two_steps_are_those_on_file(tmp_path):
    """Sampled ids, rewards, counts and evaluations exactly; what is rounded within the tolerances above."""
    found, wanted = golden_run(tmp_path / "w"), json.loads(FILE.read_text())
    words = f"made with {wanted['made_with']}"
    assert found["sampled"] == wanted["sampled"], words
    assert_the_same(found["metrics"], wanted["metrics"], RTOL, words)


# ---- Several refinements a group ----


def trained_rows(bins):
    """(ids, refined, weight x advantage) of each segment of an update."""
    rows = []
    for a, b in np.ndindex(bins.segment_ABT.shape[:2]):
        for number in range(1, bins.segment_ABT[a, b].max() + 1):
            own_T = (bins.segment_ABT[a, b] == number) & bins.scored_ABT[a, b]
            (refined,), (pg,) = (set(x[a, b][own_T].tolist()) for x in (bins.refined_ABT, bins.pg_ABT))
            rows.append((bins.target_ABT[a, b][own_T], refined, pg))
    return rows


def wanted_rows(groups, weight_of, constant):
    """(text, refined, weight x advantage) of the rows of a rollout file that have an advantage, by hand."""
    rows = []
    for group in groups:
        kept = [(group["responses"][i], False) for i in group["kept"]]
        selected = [(group["refinements"][i], True) for i in group["selected"]]
        mean = sum(attempt["reward"] for attempt, _ in kept + selected) / len(kept + selected)
        for attempt, refined in kept + selected:
            pg = weight_of[refined] * (attempt["reward"] - mean) / (len(groups) * constant)
            rows += [(attempt["text"], refined, pg)] if pg else []
    return rows


@pytest.mark.parametrize(
    ("group", "kept", "weight_of"), [("append", [0, 1, 2], (1 / 3, 1 / 2)), ("replace", [2], (1.0, 1 / 2))]
)
def test_two_refinements_a_group(tmp_path, monkeypatch, tokenizer, group, kept, weight_of):
    """Of three each: which rows are trained, and with which weights, from the file of rollouts to the update."""
    seen, put = [], steps.put_bins

    def noting(mesh, bins):
        seen.append(bins)
        return put(mesh, bins)

    monkeypatch.setattr(steps, "put_bins", noting)
    changes = {"refine.k": 2, "refine.trigger": "always", "refine.group": group, "train.steps": 1}
    (row,) = run(tmp_path / "w", **changes)
    groups = lines(tmp_path / "w/rollouts/000001.jsonl")
    for of in groups:
        assert len(of["responses"]) == len(of["refinements"]) == 3 and of["kept"] == kept
        assert len(set(of["selected"])) == 2 and [r["source"] for r in of["refinements"]] == [0, 1, 2]
    wanted = wanted_rows(groups, weight_of, 64)
    trained = [(tokenizer.decode(ids), refined, pg) for ids, refined, pg in trained_rows(seen[0])]
    assert {refined for _, refined, _ in wanted} == {True, False} and len(trained) == len(wanted)
    for one, other in zip(sorted(trained), sorted(wanted), strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(one[2], other[2], rtol=1e-6)
    assert row["tokens/trained"] == sum(len(ids) for ids, *_ in trained_rows(seen[0]))


# ---- Resume ----

WITH_REFERENCE = {"objective.kl_coef": 0.1, "train.prompts": 4, "train.updates_per_rollout": 2}  # two bins an update
HARMLESS = {"train.micro_batch": 2, "checkpoint.every": 2, "sampler.kv_cache_mb": 4.0}


@pytest.fixture(scope="module")
def referred(tmp_path_factory):
    """Two steps with a reference and two updates each: undisturbed, and stopped after the first."""
    folder = tmp_path_factory.mktemp("referred")
    run(folder / "whole", **WITH_REFERENCE)
    run(folder / "stopped", **WITH_REFERENCE, **{"train.steps": 1})
    return folder


@pytest.mark.thorough
def test_resume_with_a_reference_is_bit_equal(referred, tmp_path):
    shutil.copytree(referred / "stopped", tmp_path / "w")
    found = run(tmp_path / "w", **WITH_REFERENCE)
    assert found == without_times(lines(referred / "whole/metrics.jsonl")) and found[1]["policy/kl"] > 1e-6
    one, other = weights(tmp_path / "w", tmp_path, "a"), weights(referred / "whole", tmp_path, "b")
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def without_logp(workdir):
    """The rollouts of step 2 without the probabilities of their tokens, which may round to another letter."""
    groups = lines(workdir / "rollouts/000002.jsonl")
    for group in groups:
        for attempt in group["responses"] + group["refinements"]:
            assert attempt.pop("logp")
    return groups


@pytest.mark.thorough
def test_resume_with_harmless_changes_is_the_same_but_for_rounding(referred, tmp_path, capsys):
    shutil.copytree(referred / "stopped", tmp_path / "w")
    found = run(tmp_path / "w", **WITH_REFERENCE | HARMLESS)
    said = capsys.readouterr().err
    assert all(f"changed since step 1: {name} = {value!r}" in said for name, value in HARMLESS.items())
    of_memory = ("sampler/slot_use", "tokens/prefilled")
    rows = [found, without_times(lines(referred / "whole/metrics.jsonl"))]
    one, other = ([{k: v for k, v in row.items() if k not in of_memory} for row in part] for part in rows)
    assert_the_same(one, other, rtol=1e-4)
    assert without_logp(tmp_path / "w") == without_logp(referred / "whole")


@pytest.mark.thorough
def test_resume_with_another_loss_is_refused(referred, tmp_path):
    shutil.copytree(referred / "stopped", tmp_path / "w")
    with pytest.raises(ConfigError, match=r"objective.kl_coef = 0.2 \(was 0.1\): another loss"):
        run(tmp_path / "w", **WITH_REFERENCE | {"objective.kl_coef": 0.2})
    assert [row["step"] for row in lines(tmp_path / "w/metrics.jsonl")] == [1]


# ---- Nothing to train on ----


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """The embedded model with a final norm so large that hidden states and logits are infinite; its weights are not."""
    folder = shutil.copytree(QUICKSTART, tmp_path_factory.mktemp("overflowing") / "model")
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = (scale / np.abs(scale).max() * 3e38).astype(np.float32)
    assert np.isfinite(tensors["model.norm.weight"]).all()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_overflows_is_not_trained_in_silence(overflowing, tmp_path, capsys):
    """No row has an advantage, so no gradient ever tells: the sampler does."""
    with pytest.raises(TrainingError) as stopped:
        run(tmp_path / "w", **{"model.path": str(overflowing), "train.steps": 5})
    words = str(stopped.value)
    assert "step 3: 3 steps in a row were not finite" in words and "\n" not in words
    assert "sampled log-probabilities" in words and "gradients;" not in words.replace("such gradients", "")
    assert "done:" not in capsys.readouterr().err
    for row in lines(tmp_path / "w/metrics.jsonl"):
        assert row["reward/trained"] == row["tokens/trained"] == 0 and row["sampler/nonfinite"] > 0
    assert max(Checkpointer(tmp_path / "w", small().checkpoint, print).manager.all_steps()) == 2


def test_a_short_run_of_a_model_that_overflows_is_not_called_done(overflowing, tmp_path, capsys):
    """Fewer steps than would have stopped it; its evaluations say what they are worth."""
    with pytest.raises(TrainingError, match="the last 2 of 2 steps were not finite"):
        run(tmp_path / "w", **{"model.path": str(overflowing), "train.steps": 2, **EVALUATED})
    told = capsys.readouterr().err
    assert "done:" not in told and "of eval were sampled from numbers that are not finite" in told


@pytest.mark.thorough
def test_a_model_that_overflows_ends_the_command_in_one_line(overflowing, tmp_path):
    keys = {
        "model.path": overflowing,
        "train.prompts": 2,
        "train.samples": 2,
        "eval.every": 0,
    }
    changes = [f"--config.{name}={value}" for name, value in keys.items()]
    done = run_main("--config=quickstart", f"--workdir={tmp_path}/w", *changes)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and done.stderr.splitlines()[-1:] == errors, done.stderr
    assert "step 3: 3 steps" in errors[0] and "sampled log-probabilities" in errors[0]
    assert "done:" not in done.stderr and "Traceback" not in done.stderr and not list(tmp_path.glob("w/checkpoints/1"))


def untouched(workdir, step):
    """The checkpoint holds the initial weights, and an optimizer that never took a step."""
    stored = ocp.StandardCheckpointer().restore((workdir / f"checkpoints/{step}").absolute() / "params")
    initial = build.open_run(small()).policy.weights()
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(initial), strict=True):
        np.testing.assert_array_equal(one, other)
    moments = ocp.StandardCheckpointer().restore((workdir / f"checkpoints/{step}").absolute() / "opt_state")
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(moments) if np.asarray(leaf).dtype != bool)


def test_a_step_of_equal_rewards(tmp_path):
    """Hard problems without refinements: every reward is 0, no row has any weight, and no mean is over nothing.

    So the update is none: nothing decays, and Adam's moments and count stay.
    """
    hard = [{"question": f"What is {a}*{m}?", "answer": a * m} for a, m in ((63433, 6), (92366, 7))]
    (tmp_path / "hard.jsonl").write_text("\n".join(map(json.dumps, hard)))
    changes = {"data.source": f"{tmp_path}/hard.jsonl", "refine.trigger": "never", "train.steps": 1}
    (row,) = run(tmp_path / "w", **changes)
    assert row["reward/trained"] == 0 and row["tokens/trained"] == 0 and row["update/skipped"] == 1
    assert {name for name in row if name.startswith("policy/")} == {"policy/entropy", "policy/nonfinite_tokens"}
    assert row["loss/total"] == row["loss/responses"] == row["loss/refinements"] == 0
    assert not any(name.startswith("sampler/logp_diff") for name in row)
    untouched(tmp_path / "w", 1)
    assert all(value is not None and np.isfinite(value) for value in row.values())


def test_what_is_all_cut_and_masked_trains_nothing(tmp_path, capfd):
    """One token each: no row is finished. Of two updates none is made, and that is said."""
    cut = {"objective.overlong": "mask", "sampling.max_new_tokens": 1, "train.updates_per_rollout": 2, "train.steps": 1}
    (row,) = run(tmp_path / "w", **cut, **{"objective.entropy_coef": 0.1})
    assert row["truncated/responses"] == 1 and row["update/skipped"] == 2 and row["tokens/trained"] == 0
    assert "2 of 2 updates trained nothing" in capfd.readouterr().err
    untouched(tmp_path / "w", 1)
