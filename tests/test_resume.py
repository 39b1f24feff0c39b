"""A run that is killed and started again ends as one that was not: bit for bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

HERE = pathlib.Path(__file__).parent
# Four problems, two a step: steps 1, 3, 5 open an epoch, steps 2, 4, 6 close one. Saves follow steps 2, 4, 6.
QUESTIONS = [
    ("What is 23+46?", 69),
    ("What is 63433*6?", 380598),
    ("What is 118+247?", 365),
    ("What is 92366*7?", 646562),
]
# (phase, its how manieth entry in the process, newest checkpoint it leaves): each starts from what the last one left.
KILLS = [
    ("sample", 1, 0),  # the first batch of an epoch, nothing saved yet
    ("save", 1, 0),  # inside the first save: it never becomes a checkpoint
    ("save/arrays", 2, 2),  # inside the second, with arrays on disk
    ("score", 1, 2),  # the first batch of an epoch, after a checkpoint
    ("evaluate", 1, 2),  # evaluation after step 3
    ("save/named", 1, 4),  # the moment the second save has its name
    ("update", 2, 4),  # the last batch of an epoch, after a checkpoint
    ("save/arrays", 1, 4),  # inside the last save
]


def run(workdir, data, cache, *kill):
    command = [sys.executable, str(HERE / "killed_run.py"), str(workdir), str(data), *map(str, kill)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "XDG_CACHE_HOME": str(cache)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-3000:]
    return done.stderr


def arrays(workdir):
    checkpointer = ocp.StandardCheckpointer()
    parts = [checkpointer.restore((workdir / f"checkpoints/6/{name}").absolute()) for name in ("params", "opt_state")]
    return [np.asarray(x) for x in jax.tree.leaves(parts)]


def metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "_per_s" not in k} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rows = [json.dumps({"question": q, "answer": a}) for q, a in QUESTIONS]
    (folder / "data.jsonl").write_text("\n".join(rows))
    said = run(folder / "run", folder / "data.jsonl", folder / "cache")
    return folder, said


@pytest.mark.thorough
def test_killed_anywhere_it_ends_the_same(undisturbed, tmp_path):
    """Also across the compilation cache: the undisturbed run compiled everything, the others load most of it."""
    folder, _ = undisturbed
    left = []
    for phase, count, _ in KILLS:
        run(tmp_path / "run", folder / "data.jsonl", folder / "cache", phase, count)
        saved = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()]
        left.append(max(saved, default=0))
    assert left == [newest for _, _, newest in KILLS]
    said = run(tmp_path / "run", folder / "data.jsonl", folder / "cache")
    assert "resuming after step 4" in said
    assert metrics(tmp_path / "run") == metrics(folder / "run") and len(metrics(folder / "run")) == 9
    for step in range(1, 7):
        name = f"rollouts/{step:06d}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (folder / "run" / name).read_bytes()
    one, other = arrays(tmp_path / "run"), arrays(folder / "run")
    assert len(one) == len(other) > 20 and all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))
    for name in ("best.json", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "run" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["4", "6"]  # and nothing half written
    again = run(tmp_path / "run", folder / "data.jsonl", folder / "cache")
    assert "step 6 is done already" in again and metrics(tmp_path / "run") == metrics(folder / "run")


@pytest.mark.thorough
def test_compilation_is_kept_on_disk_and_mended(undisturbed, tmp_path):
    """The second start compiles next to nothing; broken entries are removed and made again."""
    folder, said = undisturbed

    def counts(text):
        return [int(n) for n in text.split("compiled ")[-1].split() if n.isdigit()][:2]

    programs, from_disk = counts(said)
    assert programs > 5 and from_disk == 0
    warm = counts(run(tmp_path / "warm", folder / "data.jsonl", folder / "cache"))
    assert warm[0] == programs and warm[1] >= 5
    entries = sorted((folder / "cache/cgrpo_jax/programs").glob("jit_decode-*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])  # as an interrupted write leaves it
    mended = run(tmp_path / "mended", folder / "data.jsonl", folder / "cache")
    assert "removed unreadable entries of jit_decode" in mended
    assert all(entry.stat().st_size > 100 for entry in entries)
    assert metrics(tmp_path / "mended") == metrics(folder / "run")


@pytest.mark.thorough
def test_an_unreadable_checkpoint_stops_the_run(undisturbed, tmp_path):
    """In one line, with nothing touched; before it, the other configuration has to be asked for, as the message says."""
    folder, _ = undisturbed
    shutil.copytree(folder / "run", tmp_path / "run")
    broken = [p for p in (tmp_path / "run/checkpoints/6/params").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    for file in broken:
        file.write_bytes(file.read_bytes()[:50])
    before = (tmp_path / "run/metrics.jsonl").read_text()
    command = [sys.executable, "-m", "cgrpo_jax.main", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run"]
    for words in ("data.content = 'arithmetic at main'", "checkpoints/6: cannot be read"):
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and len(errors) == 1 and words in errors[0], done.stderr
        assert "Traceback" not in done.stderr and (tmp_path / "run/metrics.jsonl").read_text() == before
        command.append(errors[0].split(" or ")[-1])  # --config.train.accept_changes=...
