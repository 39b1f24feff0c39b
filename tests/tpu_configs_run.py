"""Run by test_tpu_configs.py in a process of its own: two steps of a shipped TPU configuration on fake devices.

python tpu_configs_run.py DEVICES CONFIG WORKDIR
"""

import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={sys.argv[1]}"

import json
import pathlib

import jax

import cgrpo_jax

TINY = {
    "model.path": "package://quickstart", "model.thinking": "auto", "data.source": "arithmetic", "verifier.workers": 1,
    "data.question_column": "", "data.answer_column": "", "data.on_bad_row": "error", "data.max_prompt_tokens": 64,
    "refine.max_prompt_tokens": 256, "sampling.max_new_tokens": 64, "eval.every": 0, "train.steps": 2,
    "train.prompts": 2, "train.samples": 2, "refine.trigger": "always", "sampler.kv_cache_mb": 64.0,
    "sampler.rings": "128x32,384x16", "sampler.prefills": "64,256",
}  # fmt: skip

if __name__ == "__main__":
    config, workdir = cgrpo_jax.get_config(sys.argv[2]), pathlib.Path(sys.argv[3])
    tensor = config.sampler.tensor
    config.update_from_flattened_dict(TINY)
    metrics = cgrpo_jax.train(config, workdir)
    found = {"metrics": metrics, "devices": jax.device_count(), "tensor": tensor}
    (workdir / "found.json").write_text(json.dumps(found))
