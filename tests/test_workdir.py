"""What a workdir promises: digests, checkpoints, the lock, and files that nobody expected."""

import dataclasses
import errno
import fnmatch
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import QUICKSTART
from safetensors.numpy import load_file, save_file

from cgrpo_jax import config, convert
from cgrpo_jax.config.options import CheckpointConfig
from cgrpo_jax.errors import CheckpointError, ConfigError
from cgrpo_jax.evaluating import evaluate_tasks
from cgrpo_jax.run import build
from cgrpo_jax.training import train
from cgrpo_jax.workdir import changes, checkpoints, digests
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.metrics import Writer
from cgrpo_jax.workdir.places import BusyError, exclusive

HERE = pathlib.Path(__file__).parent


def small(**changes):
    """Two problems, three responses, two steps of the quickstart, each of them saved."""
    raw = config.default_config("critique_grpo")
    raw.model.path, raw.data.source = "package://quickstart", "arithmetic"
    raw.data.max_prompt_tokens, raw.refine.max_prompt_tokens = 64, 256
    raw.sampling.max_new_tokens, raw.sampler.kv_cache_mb = 64, 8.0
    raw.train.steps, raw.train.prompts, raw.train.samples, raw.train.micro_batch = 2, 2, 3, 1
    raw.optimizer.learning_rate, raw.checkpoint.every, raw.verifier.workers = 1e-3, 1, 1
    raw.update_from_flattened_dict(changes)
    return config.from_config_dict(raw)


# One tree on several meshes; x64 for the float64 leaf.
ON_MESHES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import NamedSharding, PartitionSpec as P
from cgrpo_jax.workdir.digests import tree_digest, leaf_digests, nonfinite_leaves
rng = np.random.default_rng(0)
tree = {
    "w": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32), "h": jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16),
    "d": rng.normal(size=(8, 16)), "i": np.arange(8, dtype=np.int32), "u": np.arange(16, dtype=np.uint32),
    "b": rng.random(8) < 0.5, "count": np.int32(3),
}
print(jax.device_count(), tree_digest(tree))
for shape in ((8, 1), (1, 8), (2, 4), (4, 2))[: 4 if jax.device_count() == 8 else 0]:
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (P(), P("x"), P("y"), P(("x", "y"))):
        shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec if np.ndim(leaf) else P()), tree)
        placed = jax.device_put(tree, shardings)
        print(shape, spec, tree_digest(placed))
        assert nonfinite_leaves(placed) == []
"""


def test_digests_are_the_same_on_any_mesh():
    """1 and 8 devices, four meshes, four shardings each: one digest."""
    found = set()
    for devices in (1, 8):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run(
            [sys.executable, "-c", ON_MESHES], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = done.stdout.splitlines()
        assert lines[0].startswith(f"{devices} ") and len(lines) == (1 if devices == 1 else 17)
        found |= {line.split()[-1] for line in lines}
    assert len(found) == 1 and len(found.pop()) == 32


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, np.bool_]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_digest(dtype, rng):
    """Each bit of each position of a [3, 5] leaf: all digests differ, and only that leaf's."""
    base = np.asarray(jnp.asarray(rng.normal(size=(3, 5)) * 100).astype(dtype))
    tree = {"a": base, "rest": np.ones(3, np.float32)}
    seen = {digests.leaf_digests(tree)["a"]}
    rest = digests.leaf_digests(tree)["rest"]
    bits = 1 if dtype == np.bool_ else 8 * base.dtype.itemsize
    for byte in range(base.nbytes):
        for bit in range(min(bits, 8)):
            flipped = bytearray(base.tobytes())
            flipped[byte] ^= 1 << bit
            got = digests.leaf_digests(tree | {"a": np.frombuffer(bytes(flipped), base.dtype).reshape(base.shape)})
            assert got["rest"] == rest
            seen.add(got["a"])
    assert len(seen) == 1 + base.size * bits


def test_what_stands_elsewhere_changes_the_digest(rng):
    """Swapped rows or values (also x and -x), a transposition, another shape, dtype or name; and nothing else."""
    base = rng.normal(size=(4, 4)).astype(np.float32)
    signs = base.copy()
    signs[0, 1] = -signs[0, 0]
    swapped = signs.copy()
    swapped[0, :2] = signs[0, 1::-1]
    zeros = np.zeros((4, 4), np.float32)
    changes = [
        base, base[::-1], base[:, ::-1], base.T, base.reshape(2, 8), base.reshape(16), signs, swapped, zeros, -zeros,
        zeros.reshape(2, 8), zeros.astype(jnp.bfloat16), zeros.astype(np.int32), zeros.view(np.uint32), zeros[:0],
    ]  # fmt: skip
    assert len({digests.tree_digest({"a": change}) for change in changes}) == len(changes)
    assert digests.tree_digest({"a": base}) != digests.tree_digest({"b": base})
    assert digests.tree_digest({"a": base, "b": zeros}) != digests.tree_digest({"a": zeros, "b": base})
    assert digests.tree_digest({"a": base}) == digests.tree_digest({"a": jnp.asarray(base)})
    assert digests.leaf_digests({}) == {}


def test_a_tree_is_one_program(rng):
    """However many leaves, and the second time none."""
    from cgrpo_jax.workdir import compilation

    counts = compilation.watch()
    tree = {f"leaf{i}": np.full((i + 1, 7), i, np.float32) for i in range(9)}
    for function in (digests.leaf_digests, digests.nonfinite_leaves):
        before = counts.programs
        function(tree)
        assert counts.programs == before + 1
        function(tree)
        assert counts.programs == before + 1


def test_leaves_that_are_not_finite_are_named_in_order():
    tree = {
        "a": np.array([1.0, np.inf], np.float32),
        "b": {"c": np.ones(3, np.float32)},
        "i": np.arange(3, dtype=np.int32),
    }
    tree["z"] = [jnp.array([jnp.nan], jnp.bfloat16), np.float32(2.0)]
    assert digests.nonfinite_leaves(tree) == ["a", "z/0"]
    assert digests.nonfinite_leaves({"i": np.arange(3, dtype=np.int32)}) == []
    with pytest.raises(TypeError, match="d: float64 without jax_enable_x64"):
        digests.leaf_digests({"d": np.zeros(2)})


# ---- Checkpoints ----


class Small(NamedTuple):
    params: dict
    opt_state: dict


def small_state(value=1.0):
    return Small({"a": jnp.full((300,), value), "b": {"c": jnp.arange(4)}}, {"count": jnp.int32(3), "mu": jnp.ones(5)})


def abstract(state):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)._asdict()


def opened(workdir, log=None, **changes):
    return Checkpointer(workdir, CheckpointConfig(**changes), [].append if log is None else log)


def edit_meta(step_folder, change):
    path = step_folder / "meta/metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(checkpoints.sealed(meta)))


def test_a_checkpoint_that_is_not_what_was_saved_is_refused(tmp_path):
    """Another bit under the digest of the leaf; no digests at all. Both ways of reading."""
    with opened(tmp_path, keep=9) as checkpointer:
        for step in (1, 2, 4):
            checkpointer.save(step, small_state(), {"step": step})
    folder = tmp_path / "checkpoints"
    other = digests.leaf_digests({"params": {"a": jnp.full((300,), 1.0).at[7].set(-1.0)}})["params/a"]
    edit_meta(folder / "2", lambda meta: meta["digests"].update({"params/a": other}))
    edit_meta(folder / "4", lambda meta: meta.pop("digests"))  # as a version that wrote none

    def place(path, shape):
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    whole = abstract(small_state())
    with opened(tmp_path) as checkpointer:
        assert checkpointer.newest() == 4
        same = jax.tree.map(np.array_equal, checkpointer.restore(1, **whole), small_state()._asdict())
        assert jax.tree.all(same)
        for step, words in (
            (2, ": params/a is not what was saved"),
            (4, "/meta/metadata: no digests in it"),
        ):
            with pytest.raises(CheckpointError, match=f"checkpoints/{step}{words}") as refused:
                checkpointer.restore(step, **whole)
            assert "\n" not in str(refused.value)
            with pytest.raises(CheckpointError, match=f"checkpoints/{step}{words}"):
                checkpoints.restore_params(folder / str(step), place)
    edit_meta(folder / "1", lambda meta: meta["digests"].pop("opt_state/mu"))
    with opened(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="opt_state/mu is not what was saved"):
        checkpointer.restore(1, **whole)


@pytest.mark.parametrize("name", ["runs [old]", "a*", "is it?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    """By training before anything is written, by an export; what was moved there is still read."""
    with pytest.raises(CheckpointError, match="checkpoints cannot be kept under a path with") as refused:
        train(small(), tmp_path / name / "w")
    assert name in str(refused.value) and not list((tmp_path / name / "w").glob("[!.]*"))
    with pytest.raises(CheckpointError, match="cannot be kept under a path with"):
        convert.convert(str(QUICKSTART), "orbax", str(tmp_path / name / "out"))
    convert.convert(str(QUICKSTART), "orbax", str(tmp_path / "out"))
    shutil.move(tmp_path / "out", tmp_path / name / "moved")
    convert.convert(str(tmp_path / name / "moved"), "hf", str(tmp_path / name / "hf"))
    again = load_file(tmp_path / name / "hf/model.safetensors")
    assert all(np.array_equal(again[key], value) for key, value in load_file(QUICKSTART / "model.safetensors").items())


def test_a_save_counts_when_it_was_read_back(tmp_path, monkeypatch):
    """Orbax says nothing where its own pattern finds no arrays to merge; older checkpoints stay until then."""
    monkeypatch.setattr(checkpoints, "check_path", lambda path: None)
    with opened(tmp_path / "w", keep=1) as checkpointer:
        checkpointer.save(1, small_state(), {})
    shutil.move(tmp_path / "w", tmp_path / "w[x]")
    with (
        opened(tmp_path / "w[x]", keep=1) as checkpointer,
        pytest.raises(CheckpointError, match=r"2: the save is lost .NOT_FOUND: .*older checkpoints are untouched"),
    ):
        checkpointer.save(2, small_state(), {})
        checkpointer.wait()
    shutil.rmtree(tmp_path / "w[x]/checkpoints/2")
    with opened(tmp_path / "w[x]") as checkpointer:
        assert checkpointer.restore(1, **abstract(small_state()))["opt_state"]["count"] == 3


def test_an_older_step_that_nobody_needs_stops_nothing(tmp_path):
    """Whichever of its files is empty: the newest is read, and the next save lets the older go."""
    with opened(tmp_path / "w", keep=3, best="a") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small_state(float(step)), {}, {"a": 1 / step})
    files = [path.relative_to(tmp_path / "w") for path in (tmp_path / "w/checkpoints/1").rglob("*") if path.is_file()]
    kinds = {(file.name if file.parent.name != "d" else "d"): file for file in files}
    assert {"metadata", "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "d"} <= kinds.keys()
    for file in kinds.values():
        workdir, said = shutil.copytree(tmp_path / "w", tmp_path / "copy"), []
        (workdir / file).write_bytes(b"")
        with opened(workdir, said.append, keep=1, best="a") as checkpointer:
            assert checkpointer.newest() == 2, file
            assert checkpointer.restore(2, **abstract(small_state()))["params"]["a"][0] == 2
            checkpointer.save(3, small_state(), {}, {"a": 0.9})
        kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        assert kept == (["3"] if file.name == "metadata" else ["1", "3"]), (file, kept)
        assert any("checkpoints/1/meta/metadata: cannot be read" in line for line in said) == (file.name == "metadata")
        shutil.rmtree(workdir)


def test_what_is_not_finite_is_not_saved(tmp_path):
    """Neither a parameter nor a moment of the optimizer: the newest checkpoint stays the one before."""
    bad = small_state()._replace(opt_state={"count": jnp.int32(3), "mu": jnp.full(5, jnp.inf)})
    with opened(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(), {})
        for state, name in ((small_state(jnp.nan), "params/a"), (bad, "opt_state/mu")):
            with pytest.raises(CheckpointError, match=f"checkpoints/2: the save is lost .{name} holds a NaN"):
                checkpointer.save(2, state, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    """By a metric of the evaluation, over restarts; the newest of equals; a save without evaluation is never best."""
    said, name = [], "eval/pass@1"

    def on_disk():
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    def noted():
        return json.loads((tmp_path / "best.json").read_text())

    with opened(tmp_path, said.append, keep=2, best=name) as checkpointer:
        checkpointer.save(1, small_state(), {}, {name: 0.0, "eval/length": 9.0})
        for step, value in ((2, 0.9), (3, 0.2), (4, None), (5, 0.3), (6, 0.2)):
            checkpointer.save(step, small_state(), {}, None if value is None else {name: value})
    assert on_disk() == [2, 5, 6] and noted() == {"step": 2, "metric": name, "value": 0.9}
    assert said == [f"best so far: step 1, {name} 0.0000", f"best so far: step 2, {name} 0.9000"]
    with opened(tmp_path, said.append, keep=2, best=name) as checkpointer:
        assert checkpointer.best() == 2 and len(said) == 2
        checkpointer.save(7, small_state(), {})
        checkpointer.wait()
        assert on_disk() == [2, 6, 7]
        checkpointer.save(8, small_state(), {}, {name: 0.9})
    assert on_disk() == [7, 8] and noted()["step"] == 8
    (tmp_path / "best.json").unlink()  # as a kill between the save and this file leaves it
    with opened(tmp_path, keep=1, best=name):
        assert noted()["step"] == 8
    with opened(tmp_path, keep=1) as checkpointer:
        checkpointer.save(9, small_state(), {}, {name: 0.1})
    assert on_disk() == [9]


BEST = [
    ({"checkpoint.best": "eval/pass@1"}, "eval.every > 0"),
    ({"checkpoint.best": "eval/pas@1", "eval.every": 1}, "there is eval/pass@1"),
    ({"checkpoint.best": "eval/pass@1", "eval.every": 1, "eval.tasks": "x=y.jsonl"}, "there is eval/x/pass@1"),
    ({"checkpoint.best": "eval/pass@1", "eval.every": 1, "method": "generate"}, "method=rl or sft"),
]


@pytest.mark.parametrize(("changes", "words"), BEST)
def test_a_metric_that_nothing_measures_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        build.open_run(small(**changes))


def test_a_metric_that_is_measured_is_taken():
    build.open_run(small(**{"checkpoint.best": "eval/x/pass@1", "eval.every": 1, "eval.tasks": "x=y.jsonl"}))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


SAVING = """
import sys, time, jax
from test_workdir import CheckpointError, Small, opened
state = Small({"a": jax.random.normal(jax.random.key(0), (200_000,))}, {"count": jax.numpy.int32(0)})
try:
    with opened(sys.argv[1], print, keep=9) as checkpointer:
        for step in range(1, 9):
            for _ in range(20):
                if checkpointer.ended():
                    checkpointer.wait()
                time.sleep(0.05)
            print("step", step, flush=True)
            checkpointer.save(step, state, {})
except CheckpointError as error:
    sys.exit(f"error: {error}")
"""


def test_a_full_disk_ends_the_run_in_one_line(small_disk):
    """The failed save is raised before the next one begins; what was saved before is there; the next start tidies up."""
    command = [sys.executable, "-c", SAVING, str(small_disk)]
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and done.stdout.split() == ["step", "1", "step", "2", "step", "3"], done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "checkpoints/3: the save is lost" in line and "No space left on device" in line
    with opened(small_disk, keep=9) as checkpointer:
        assert checkpointer.newest() == 2
        state = Small({"a": jax.random.normal(jax.random.key(0), (200_000,))}, {"count": jax.numpy.int32(0)})
        for step in (1, 2):
            restored = checkpointer.restore(step, params=abstract(state)["params"])
            assert np.array_equal(restored["params"]["a"], state.params["a"])
        checkpointer.save(3, small_state(), {})
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == ["1", "2", "3"]


FILLING = """
import sys, pathlib
from cgrpo_jax.workdir.metrics import Writer
writer, step = Writer(sys.argv[1] + "/w", 0, print), 0
try:
    pathlib.Path(sys.argv[1], "fill").write_bytes(bytes(4_000_000))
except OSError:
    pass
try:
    while True:
        writer.scalars(step := step + 1, {"a": 1.0})
except OSError as error:
    print(error, flush=True)
"""


def test_a_full_disk_names_the_file(small_disk):
    done = subprocess.run(
        [sys.executable, "-c", FILLING, small_disk], capture_output=True, text=True, timeout=60, cwd=HERE.parent
    )
    assert any(
        f"No space left on device: '{small_disk}/w/{name}'" in done.stdout for name in ("metrics.jsonl", "tensorboard")
    )


def test_a_file_in_the_place_of_the_checkpoints_is_noticed_at_the_start(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match="w/checkpoints: a file stands where checkpoints are to be kept"):
        train(small(), tmp_path / "w")
    assert (tmp_path / "w/checkpoints").read_text() == "mine" and not (tmp_path / "w/metrics.jsonl").exists()


def test_a_save_under_way_is_finished_when_the_run_is_stopped(tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, said.append) as checkpointer:
        checkpointer.save(1, small_state(), {})
        raise KeyboardInterrupt
    assert said == ["finishing the save of step 1", "step 1 is saved"]
    with opened(tmp_path) as checkpointer:
        assert checkpointer.restore(1, **abstract(small_state()))["opt_state"]["count"] == 3


def test_a_save_is_finished_when_the_run_is_stopped_while_it_waits(tmp_path, monkeypatch):
    said = []
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, said.append) as checkpointer:
        finish = checkpointer.manager.wait_until_finished

        def stopped():
            monkeypatch.setattr(checkpointer.manager, "wait_until_finished", finish)
            raise KeyboardInterrupt

        checkpointer.save(1, small_state(), {})
        monkeypatch.setattr(checkpointer.manager, "wait_until_finished", stopped)
        checkpointer.wait()
    assert said == ["finishing the save of step 1", "step 1 is saved"]


def test_a_lost_save_is_said_and_does_not_hide_why_the_run_stopped(tmp_path, monkeypatch):
    said = []
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, said.append) as checkpointer:

        def fail():
            raise OSError("No space left on device")

        checkpointer.save(1, small_state(), {})
        monkeypatch.setattr(checkpointer.manager, "wait_until_finished", fail)
        monkeypatch.setattr(checkpointer.manager, "close", list)
        raise KeyboardInterrupt
    assert said[0] == "finishing the save of step 1" and "checkpoints/1: the save is lost (No space left" in said[1]


# ---- One process a workdir ----

HOLDING = "import sys, time; from cgrpo_jax.workdir.places import exclusive\nwith exclusive(sys.argv[1]): print(); sys.stdout.flush(); time.sleep(60)"


def test_a_second_process_is_turned_away(tmp_path):
    """By training, supervised training and evaluation, with the process named; a killed process holds nothing."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path / "w"], stdout=subprocess.PIPE, cwd=HERE.parent)
    try:
        holder.stdout.readline()
        words = f"process {holder.pid} on {socket.gethostname()} works on it"
        for run, changes in (
            (train, {}),
            (train, {"method": "sft"}),
            (evaluate_tasks, {"method": "eval", "eval.tasks": "x=y.jsonl"}),
        ):
            with pytest.raises(BusyError, match=words) as refused:
                run(small(**changes), tmp_path / "w")
            assert "\n" not in str(refused.value)
    finally:
        holder.kill()
        holder.wait()
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".lock"]
    with (
        exclusive(tmp_path / "w"),
        pytest.raises(BusyError, match=f"process {os.getpid()} on"),
        exclusive(tmp_path / "w"),
    ):
        pass
    with exclusive(tmp_path / "w"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with exclusive(tmp_path / "w"):
        assert (tmp_path / "w").is_dir()
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be locked (Operation not supported): nothing keeps a second process" in line


# ---- Files that nobody expected ----


def test_stray_lines_and_files_are_named_and_kept(tmp_path):
    """Lines without a step go to a file of their own, files of other names stay; a torn last line goes."""
    said = []
    (tmp_path / "rollouts").mkdir()
    for name in ("000001.jsonl", "000002.jsonl", "000003.jsonl", "12abc.jsonl", "7.jsonl", "notes.txt"):
        (tmp_path / "rollouts" / name).write_text("x")
    strays = [b'{"loss": 1}', b"not json", b"[1]", b'{"step": "2"}', b"\xff\xfe", b""]
    lines = [b'{"step": 1, "a": 1}', *strays, b'{"step": 2, "a": 2}', b'{"step": 3, "a": 3}', b'{"step": 4, "a']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    Writer(tmp_path, 2, said.append).close()
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == [lines[0], lines[7]]
    assert (tmp_path / "metrics.stray.jsonl").read_bytes().splitlines() == strays
    left = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert left == ["000001.jsonl", "000002.jsonl", "12abc.jsonl", "7.jsonl", "notes.txt"]
    assert said == [
        f"{tmp_path}/metrics.jsonl: without a step, moved to metrics.stray.jsonl: line 2, 3, 4, 5, 6, 7",
        f"{tmp_path}/rollouts: not named by a step, left alone: 12abc.jsonl, 7.jsonl, notes.txt",
    ]
    said.clear()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\nmy own note')  # no newline, yet no torn line of ours
    Writer(tmp_path, 1, said.append).close()
    assert (tmp_path / "metrics.stray.jsonl").read_bytes().splitlines()[-1] == b"my own note" and len(said) == 2


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_exported_weights_have_the_permissions_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        convert.convert(str(QUICKSTART), "hf", str(tmp_path / "out"))
        convert.convert(str(QUICKSTART), "hf", str(tmp_path / "many"), shard_gb=1e-3)
    finally:
        os.umask(before)
    files = [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "many").glob("*.safetensors")]
    assert len(files) > 2 and {path.stat().st_mode & 0o777 for path in files} == {mode}


# ---- Which run goes on ----


def test_every_key_has_its_rule():
    """By a row of the table, and no row is there for nothing."""
    keys = [*changes.flat(dataclasses.asdict(small())), "model.weights", "model.files", "data.content", "data.held_out"]
    keys += ["local.weights", "local.files"]
    matched = {key: [pattern for pattern, *_ in changes.RULES if fnmatch.fnmatchcase(key, pattern)][:1] for key in keys}
    assert all(matched.values()), [key for key in keys if not matched[key]]
    assert {pattern for (pattern,) in matched.values()} == {pattern for pattern, *_ in changes.RULES}


OLD = changes.flat(dataclasses.asdict(small(**{"train.steps": 9}))) | {"data.content": "abc"}
COMPARED = [  # changes, accepted, refused with these words (None: logged)
    ({}, "", None),
    ({"checkpoint.keep": 5, "mesh.data": 4, "train.micro_batch": 7, "eval.every": 3, "data.source": "moved.jsonl"}, "", None),
    ({"seed": 1}, "", r"seed = 1 \(was 0\): another seed .*accept_changes=seed$"),
    ({"data.content": "abd", "refine.k": 2}, "", "accept_changes=data.content,refine.k$"),
    ({"data.content": "abd", "refine.k": 2}, "refine.k", "accept_changes=data.content$"),
    ({"data.content": "abd", "refine.k": 2}, "refine.k, data.content", None),
    ({"method": "sft"}, "", "another method has other updates"),
    ({"objective.gamma": 0.2}, "", "objective.gamma = 0.2"),
    ({"sampling.temperature": 0.9}, "", "sampling.temperature = 0.9"),
    ({"api.temperature": 0.1, "api.top_p": 0.9, "api.tokens": 7}, "", "accept_changes=api.temperature,api.tokens,api.top_p$"),
    ({"api.base_url": "http://elsewhere", "api.retries": 1}, "", None),
    ({"optimizer.learning_rate": 0.5}, "", "optimizer.learning_rate = 0.5"),
    ({"train.steps": 12}, "", None),
    ({"train.steps": 12, "optimizer.schedule": "cosine"}, "optimizer.schedule", "train.steps = 12"),
    ({"train.steps": 2, "optimizer.schedule": "cosine"}, "optimizer.schedule", None),  # nothing to train
    ({}, "seed", "seed has not changed since step 4"),
    ({"seed": 1}, "sed", "no key 'sed'; did you mean 'seed'"),
    ({"new.option": 1}, "", r"new.option = 1 \(was None\): this version does not know"),
    ({"reward.fn": "mine:other", "reward.seconds": 9}, "", "reward.fn = 'mine:other' .*: other rewards. .*=reward.fn$"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "accepted", "words"), COMPARED)
def test_what_may_change_on_resume(changed, accepted, words):
    said = []
    if words is None:
        changes.check_changes(OLD, OLD | changed, accepted, 4, said.append)
        assert len(said) == len(changed) - (changed.get("train.steps") == 2)
        return
    with pytest.raises(ConfigError, match=words) as refused:
        changes.check_changes(OLD, OLD | changed, accepted, 4, said.append)
    assert "\n" not in str(refused.value)


def test_an_option_that_has_vanished_is_refused():
    with pytest.raises(ConfigError, match=r"old.option = None \(was 1\): this version does not know"):
        changes.check_changes(OLD | {"old.option": 1}, OLD, "", 4, print)


def test_only_names_and_limits_may_differ_of_what_decides_an_update():
    sections = ("method", "seed", "model", "data", "reward", "texts", "sampling", "refine", "local", "generate",
                "objective", "optimizer")  # fmt: skip
    keys = [*OLD, *(f"{name}.{part}" for name in ("model", "local") for part in ("weights", "files")), "data.held_out"]
    loose = {key for key in keys if key.split(".")[0] in sections and changes.rule(key)[0] != changes.REFUSED}
    names = {f"{name}.{part}" for name, part in itertools.product(("model", "local"), ("path", "revision"))}
    assert loose == names | {"data.source", "data.revision", "reward.seconds", "refine.critique_seconds"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps on four problems in a file."""
    folder = tmp_path_factory.mktemp("begun")
    rows = [
        ("What is 23+46?", 69),
        ("What is 63433*6?", 380598),
        ("What is 118+247?", 365),
        ("What is 92366*7?", 646562),
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    shutil.copytree(QUICKSTART, folder / "model")
    with jax.numpy_rank_promotion("allow"):
        train(of_file(folder), folder / "w")
    return folder


def of_file(folder, **changes):
    return small(**{"data.source": f"{folder}/data.jsonl", "model.path": f"{folder}/model"} | changes)


@pytest.fixture
def copied(begun, tmp_path):
    """That run, to be spoilt, under another path: only contents decide whether it is the same."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder, words, error=ConfigError, **changes):
    """Refused in one line, with nothing changed on disk."""
    kept = {path: path.read_bytes() for path in (folder / "w").rglob("*") if path.is_file() and path.name != ".lock"}
    with jax.numpy_rank_promotion("allow"), pytest.raises(error, match=words) as raised:
        train(of_file(folder, **changes), folder / "w")
    assert "\n" not in str(raised.value)
    assert kept == {
        path: path.read_bytes() for path in (folder / "w").rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_another_seed_or_other_bytes_are_another_run(copied):
    refused(copied, "seed = 5", **{"train.steps": 3, "seed": 5})
    with (copied / "data.jsonl").open("a") as file:
        file.write('{"question": "What is 1+1?", "answer": 2}\n')
    refused(copied, "data.content", **{"train.steps": 3})


def with_tensor(folder, change):
    """Changes the first entry of the embedding in a model folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"].flat[0] = change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_another_model_is_another_run(copied):
    """Weights and tokenizer by their bytes; the side files of the first start stay whatever is accepted."""
    with_tensor(copied / "model", 0.5)
    refused(copied, "model.weights", **{"train.steps": 3})
    (copied / "model/generation_config.json").write_text('{"another": "model"}')
    refused(copied, "model.files.*accept_changes=model.files,model.weights$", **{"train.steps": 3})
    before = {path.name: path.read_bytes() for path in (copied / "w/hf").iterdir()}
    with jax.numpy_rank_promotion("allow"):
        train(of_file(copied, **{"train.steps": 3, "train.accept_changes": "model.files,model.weights"}), copied / "w")
    assert before == {path.name: path.read_bytes() for path in (copied / "w/hf").iterdir()}
    shutil.rmtree(copied / "w/checkpoints")
    refused(copied, "w/hf: files of another model", CheckpointError)


def test_the_reference_stays_the_initial_model(copied):
    """With a KL term other initial weights are refused whatever is accepted; a moved folder is the same."""
    accepted = {"train.steps": 3, "objective.kl_coef": 0.1, "train.accept_changes": "objective.kl_coef"}
    with_tensor(copied / "model", 0.5)
    words = "not the weights this run began with"
    refused(copied, words, CheckpointError, **accepted | {"train.accept_changes": "objective.kl_coef,model.weights"})
    shutil.copy(QUICKSTART / "model.safetensors", copied / "model/model.safetensors")
    with jax.numpy_rank_promotion("allow"):
        train(of_file(copied, **accepted), copied / "w")
    rows = [json.loads(line) for line in (copied / "w/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["policy/kl"] > 0


def test_fewer_steps_than_are_done_is_said(copied, capsys):
    kept = (copied / "w/config.json").read_bytes(), (copied / "w/metrics.jsonl").read_bytes()
    train(of_file(copied, **{"train.steps": 1}), copied / "w")
    assert "step 2 is done already; nothing to do for train.steps=1" in capsys.readouterr().err
    assert kept == ((copied / "w/config.json").read_bytes(), (copied / "w/metrics.jsonl").read_bytes())


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_one_flipped_bit_on_disk_is_refused(copied, item):
    """In the largest file of the arrays: by training and, of parameters, by export; the checkpoint before is sound."""
    folder = copied / "w/checkpoints/2"
    file = max((folder / item).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    words = f"checkpoints/2: {item}/.* is not what was saved"
    refused(copied, words, CheckpointError, **{"train.steps": 3})
    if item == "params":
        with pytest.raises(CheckpointError, match=words):
            convert.convert(str(copied / "w"), "hf", str(copied / "out"))
        assert not (copied / "out").exists()
        convert.convert(str(copied / "w"), "orbax", str(copied / "out"), step=1)
        edit_meta(copied / "out", lambda meta: meta["digests"].update({"params/norm/scale": "0"}))
        with pytest.raises(CheckpointError, match="out: params/norm/scale is not what was saved"):
            convert.convert(str(copied / "out"), "hf", str(copied / "again"))


def flipped(folder):
    """A bit of the place in the stream of problems: 4 -> 5, which is as good a number."""
    path = folder / "meta/metadata"
    changed = path.read_bytes().replace(b'"problems_seen": 4', b'"problems_seen": 5')
    assert changed != path.read_bytes()
    path.write_bytes(changed)


def swapped(folder):
    for name, other in (("2", "other"), ("1", "2"), ("other", "1")):
        (folder.parent / name).rename(folder.parent / other)


def emptied(folder):
    (folder / "meta/metadata").write_bytes(b"")


METADATA = [
    (flipped, "checkpoints/2/meta/metadata: not what was saved", "the newest whole checkpoint is step 1: "),
    (emptied, "checkpoints/2/meta/metadata: cannot be read", "the newest whole checkpoint is step 1: "),
    (swapped, "checkpoints/2: holds step 1", "no older checkpoint here is whole"),
]


@pytest.mark.parametrize(("damage", "words", "mend"), METADATA)
def test_metadata_is_vouched_for(copied, damage, words, mend):
    """What the arrays go with, too; and the mend that is offered works."""
    damage(copied / "w/checkpoints/2")
    refused(copied, f"{words}.*{mend}", CheckpointError, **{"train.steps": 3})
    with pytest.raises(CheckpointError, match=f"{words}.*--step=STEP"):
        convert.convert(str(copied / "w"), "hf", str(copied / "out"))
    if damage is flipped:
        shutil.move(copied / "w/checkpoints/2", copied / "away")
        with jax.numpy_rank_promotion("allow"):
            train(of_file(copied, **{"train.steps": 2}), copied / "w")
        again = checkpoints.read_meta(copied / "w/checkpoints/2")
        assert again["digests"] == json.loads((copied / "away/meta/metadata").read_text())["digests"]


def test_initial_weights_that_are_not_finite_are_refused(copied):
    with_tensor(copied / "model", np.inf)
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(CheckpointError, match="model: embed/embedding holds a NaN or an infinity"),
    ):
        train(of_file(copied), copied / "new")
    assert not (copied / "new/config.json").exists() and not (copied / "new/metrics.jsonl").exists()
