"""Critique-GRPO of Qwen3-8B at 8,192 tokens on 16 TPU v5p chips (v5p-32), refinements up to 15,360.

    python -m cgrpo_jax.plan --config=tpu_v5p:qwen3_8b,memory --topology=v5p-32  # does it fit, how long may it take
    python -m cgrpo_jax.main --config=tpu_v5p:qwen3_8b,memory --workdir=runs/tpu_v5p  # on every host of the slice
    ... --config=tpu_v5p:qwen3_8b,speed     # keeps more for the backward pass
    ... --config=tpu_v5p:qwen3_32b,memory   # for 64 chips (v5p-128)

A failure of 6,144 tokens is shown to the model as a whole. The plan of `qwen3_8b,memory` (libtpu 0.0.42.1, compiled and
estimated): 56.0 of 95.74 GiB a chip at the fullest, the prefill beside all rows; a step of answers half as long as they
may be takes 4.5 minutes, of the longest 11.5; a checkpoint 98 GB, on a disk that all hosts mount. Not yet run on
hardware.
"""

from cgrpo_jax.config import default_config

MODELS = {"qwen3_8b": "Qwen/Qwen3-8B", "qwen3_32b": "Qwen/Qwen3-32B"}
REMAT = {"memory": "attention", "speed": "wide"}  # what the backward pass finds saved


def get_config(model_and_aim: str = "qwen3_8b,memory"):
    model, _, aim = model_and_aim.partition(",")
    if model not in MODELS or (aim or "memory") not in REMAT:
        raise ValueError(f"{model_and_aim!r}: MODEL,AIM of {', '.join(MODELS)} and {', '.join(REMAT)}")
    config = default_config()
    config.model.path = MODELS[model]
    config.data.source, config.data.split = "open-r1/OpenR1-Math-220k:default", "train"
    config.data.question_column, config.data.answer_column = "problem", "answer"
    config.data.on_bad_row = "drop"
    config.data.max_prompt_tokens = 2048
    config.refine.max_prompt_tokens = 9216
    config.sampling.max_new_tokens = 6144
    config.model.thinking = "off"  # thoughts would not end within the limit
    config.train.steps = 400
    config.train.prompts = 128
    config.train.remat = REMAT[aim or "memory"]
    config.sampler.tensor = 4  # chips of a group, which has its own rows
    config.sampler.rings, config.sampler.prefills = "8192x512,16384x64", "1024,9216"
    config.sampler.kv_cache_mb = 47000.0
    config.eval.every = 50
    config.eval.tasks = "math500"
    config.eval.samples = 1
    config.checkpoint.every = 20
    return config
