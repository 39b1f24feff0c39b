"""The configurations for TPUs: each is read, each can be planned, and each runs a tiny model on fake devices."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from cgrpo_jax.config import files as config_files
from cgrpo_jax.config import from_config_dict
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.model.hf_config import config_from_hf
from cgrpo_jax.run.checks import check
from cgrpo_jax.run.folders import shape_folder

HERE = pathlib.Path(__file__).parent
NAMES = [
    "tpu_v4", "tpu_v4:dr_grpo", "tpu_v5e", "tpu_v5p", "tpu_v5p:qwen3_8b,memory", "tpu_v5p:qwen3_8b,speed",
    "tpu_v5p:qwen3_32b,memory", "tpu_v6e",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_fits_its_model(name):
    cfg = from_config_dict(config_files.get_config(name))
    check(cfg, config_from_hf(shape_folder(cfg.model.path)))
    assert cfg.data.max_prompt_tokens + cfg.sampling.max_new_tokens <= 8192


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(ConfigError, match="qwen3_8b, qwen3_32b and memory, speed"):
        config_files.get_config("tpu_v5p:qwen3_8b,fast")


@pytest.mark.thorough
@pytest.mark.parametrize(("count", "name"), [(8, "tpu_v5p:qwen3_8b,speed"), (16, "tpu_v4")])
def test_two_steps_of_a_tiny_model_on_fake_devices(tmp_path, count, name):
    command = [sys.executable, str(HERE / "tpu_configs_run.py"), str(count), name, str(tmp_path / "w")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "w/found.json").read_text())
    assert (found["devices"], found["tensor"]) == (count, 4)
    losses = [value for key, value in found["metrics"].items() if key.startswith("loss/")]
    assert losses and all(math.isfinite(value) for value in losses)
    compiles_before_the_first_step(done.stderr)


def compiles_before_the_first_step(said):
    """Every program has its line; training compiles none of them again, and little else (Orbax slices arrays)."""
    ahead = re.findall(r"^compiled (\d+)/(\d+) (\S+)  \d+ s, \d+\.\d\d GiB a device$", said, re.MULTILINE)
    assert [int(number) for number, _, _ in ahead] == list(range(1, int(ahead[0][1]) + 1))
    assert {"update", "prefill", "decode", "enter", "synced"} <= {name.split("/")[0] for _, _, name in ahead}
    by_step_1 = int(re.search(r"^compiled (\d+) programs", said, re.MULTILINE)[1])
    assert len(ahead) <= by_step_1 <= len(ahead) + 6
    assert said.index(f"compiled {len(ahead)}/{len(ahead)} ") < said.index("memory: planned ") < said.index("step 1/2")
