"""Run by test_devices.py in a process of its own: a step of shipped configurations on so many fake devices.

python devices_run.py DEVICES WORKDIR [KEY=VALUE...]     # changes of all; what came out goes to WORKDIR/found.json
"""

import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={sys.argv[1]}"

import json
import pathlib

import jax

import cgrpo_jax

TINY = {"model.path": "package://quickstart", "train.steps": 1, "eval.every": 0, "verifier.workers": 1}
OF_TEXT = {"data.source": "arithmetic", "data.max_prompt_tokens": 128, "refine.max_prompt_tokens": 320}
CONFIGS = {
    "quickstart": {"train.prompts": 5, "train.samples": 3},
    "smollm2_cpu": {"train.prompts": 3, "train.samples": 3, "refine.trigger": "always"} | OF_TEXT,
}
QUESTIONS = [("What is 23+46?", 69), ("What is 118+247?", 365), ("What is 63433*6?", 380598)]


def configured(name, changes):
    config = cgrpo_jax.get_config(name)
    config.update_from_flattened_dict(changes)
    return config


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(name, workdir, changes):
    """Losses, and what was sampled with its rewards."""
    metrics = cgrpo_jax.train(configured(name, TINY | CONFIGS[name] | changes), workdir / name)
    groups = read(workdir / name / "rollouts/000001.jsonl")
    attempts = [attempt for group in groups for attempt in group["responses"] + group["refinements"]]
    return {
        "problems": len(groups),
        "losses": {key: value for key, value in metrics.items() if key.startswith(("loss/", "policy/grad_norm"))},
        "rewards": [attempt["reward"] for attempt in attempts],
        "texts": [attempt["text"] for attempt in attempts],
    }


def evaluated(workdir, changes):
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in QUESTIONS]
    (workdir / "three.jsonl").write_text("\n".join(rows))
    tiny = {"data.max_prompt_tokens": 128, "sampling.max_new_tokens": 64, "eval.tasks": f"three={workdir}/three.jsonl"}
    cgrpo_jax.evaluate(configured("eval", TINY | {"eval.every": 0} | tiny | changes), workdir / "eval")
    graded = read(workdir / "eval/eval/three/graded.jsonl")
    return {"rewards": [float(row["correct"]) for row in graded], "texts": [row["text"] for row in graded]}


if __name__ == "__main__":
    workdir = pathlib.Path(sys.argv[2])
    changes = {key: json.loads(value) for key, value in (argument.split("=") for argument in sys.argv[3:])}
    workdir.mkdir()
    found = {name: trained(name, workdir, changes) for name in CONFIGS} | {"eval": evaluated(workdir, changes)}
    (workdir / "found.json").write_text(json.dumps(found | {"devices": jax.device_count()}))
