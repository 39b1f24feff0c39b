"""Critique-GRPO of Qwen3-8B at 8,192 tokens on 16 TPU v6e chips (v6e-16), refinements up to 15,360.

    python -m cgrpo_jax.plan --config=tpu_v6e --topology=v6e-16       # first: does it fit, how long may it take
    python -m cgrpo_jax.main --config=tpu_v6e --workdir=runs/tpu_v6e  # on every host of the slice
    ... --config=tpu_v6e:dr_grpo                                      # without refinements

A failure of 6,144 tokens is shown to the model as a whole. The plan (libtpu 0.0.42.1, compiled and estimated): 28.9 of
31.25 GiB a chip at the fullest, the prefill beside all rows; a step of answers half as long as they may be takes 7
minutes, of the longest 18; a checkpoint 98 GB, on a disk that all hosts mount. Not yet run on hardware.
"""

from cgrpo_jax.config import default_config


def get_config(method: str = "critique_grpo"):
    config = default_config(method)
    config.model.path = "Qwen/Qwen3-8B"
    config.data.source, config.data.split = "open-r1/OpenR1-Math-220k:default", "train"
    config.data.question_column, config.data.answer_column = "problem", "answer"
    config.data.on_bad_row = "drop"
    config.data.max_prompt_tokens = 2048
    config.refine.max_prompt_tokens = 9216
    config.sampling.max_new_tokens = 6144
    config.model.thinking = "off"  # thoughts would not end within the limit
    config.train.steps = 400
    config.train.prompts = 128
    config.train.remat = "attention"
    config.sampler.tensor = 4  # of 16 chips: 4 groups, each with its own rows
    config.sampler.rings, config.sampler.prefills = "8192x192,16384x32", "1024,9216"
    config.sampler.kv_cache_mb = 19000.0
    config.eval.every = 50
    config.eval.tasks = "math500"
    config.eval.samples = 1
    config.checkpoint.every = 20
    return config
