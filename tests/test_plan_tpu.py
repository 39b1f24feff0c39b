"""The plan of a TPU that is not here, as a user makes it: needs libtpu, and no TPU."""

import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
from test_hlo_reader import other_reader  # noqa: F401  a fixture
from test_plan import SHAPES, command

from cgrpo_jax.config import from_config_dict
from cgrpo_jax.config.files import get_config
from cgrpo_jax.planner import chips
from cgrpo_jax.planner.cost import cost_of
from cgrpo_jax.planner.most import most_in_a_bin
from cgrpo_jax.run import build
from cgrpo_jax.sampling.room import row_devices

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
LAYERS = 4  # compile time is flat in depth
SHORT = [
    "--config.data.max_prompt_tokens=512",
    "--config.refine.max_prompt_tokens=1024",
    "--config.sampling.max_new_tokens=512",
    "--config.refine.trigger=never",
    "--config.train.samples=1",
]
KINDS = {"synced", "prefill", "decode", "update"}


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """A model folder with nothing but a `config.json`."""
    folder = tmp_path_factory.mktemp("shape")
    shape = json.loads((SHAPES / "qwen3_8b/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": LAYERS}))
    return folder


@pytest.mark.parametrize(("config", "topology"), [("tpu_v4", "v4-32"), ("tpu_v5p:qwen3_8b,memory", "v5p-32")])
def test_programs_compile_for_chips_that_are_not_here(tmp_path, four_layers, other_reader, config, topology):  # noqa: F811
    arguments = [f"--config={config}", f"--topology={topology}", f"--config.model.path={four_layers}", *SHORT]
    arguments += [f"--only={','.join(sorted(KINDS))}", "--most=false", "--json=plan.json", "--hlo=hlo"]
    done = command(*arguments, folder=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["chips"] == 16 and plan["programs"].keys() == KINDS
    assert "fits: " in done.stdout and "a step at 100%" in done.stdout and "Nothing was run" in done.stdout
    for kind, program in plan["programs"].items():
        text = (tmp_path / "hlo" / f"{program['program'].replace('/', '_')}.hlo").read_text()
        assert cost_of(text).cycles == program["estimated_cycles"] > 0
        theirs = other_reader.analyze(text)
        assert theirs["estimated_cycles"] == pytest.approx(program["estimated_cycles"], rel=2e-3), kind
        assert theirs["collective_wire_bytes_per_device"] == pytest.approx(program["wire_bytes"]), kind
        assert 0 < program["peak_bytes"] < plan["hbm_bytes"]
    assert plan["programs"]["update"]["mfu"] > 0 and plan["programs"]["decode"]["each_turn"]["computing"] > 0
    assert plan["steps"][0]["seconds"] > plan["steps"][1]["seconds"] > 0


def test_bins_are_tried_by_the_rows_of_all_chips_where_the_sampler_shares_its_rows_among_fewer():
    """tpu_v4: a bin has a row a chip, 16; the sampler's four groups of four chips have 4. No less than 16 is asked."""
    run = build.plan_run(from_config_dict(get_config("tpu_v4")), chips.devices(chips.topology("v4-32")))
    (size,), tried = build.bin_sizes(run, run.cfg.data.max_prompt_tokens), []

    def occupy(program):
        tried.append(program.arguments[-1].token_ABT.shape[1])
        return SimpleNamespace(bytes=float(tried[-1]))

    found = most_in_a_bin(run, size, SimpleNamespace(bytes=16.0), 50.0, occupy)
    assert size.rows == 16 and row_devices(run.policy.sampler.mesh) == 4
    assert tried == [32, 48] and found == (48, 48.0)


def test_too_few_chips_exit_1_and_name_class_and_knob(tmp_path):
    """8.2 G parameters and their optimizer state on four chips of 15.75 GiB."""
    arguments = [
        "--config=tpu_v5e",
        "--topology=v5litepod-4",
        "--config.sampler.tensor=1",
        "--config.sampler.rings=",  # those of the file are for 64 chips
        "--config.sampler.prefills=",
        "--only=init",
        "--most=false",
    ]
    done = command(*arguments, "--json=plan.json", *SHORT, folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("does not fit: ")]
    assert "optimizer state" in line and "mesh.fsdp" in line
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path):
    """libtpu keeps a lock and logs there where it is not told otherwise."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = set(os.listdir("/tmp"))
    arguments = ["--config=quickstart", "--topology=v5litepod-4", "--only=synced", "--most=false"]
    done = command(*arguments, folder=tmp_path, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not {name for name in set(os.listdir("/tmp")) - before if "tpu" in name} and not list(temporary.iterdir())
