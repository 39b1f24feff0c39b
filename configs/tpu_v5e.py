"""Critique-GRPO of Qwen3-8B at 8,192 tokens on 64 TPU v5e chips (v5litepod-64).

    python -m cgrpo_jax.plan --config=tpu_v5e --topology=v5litepod-64   # first: does it fit, how long may it take
    python -m cgrpo_jax.main --config=tpu_v5e --workdir=runs/tpu_v5e    # on every host of the slice
    ... --config=tpu_v5e:dr_grpo                                        # without refinements

Memory is scarce: prompts take at most 1,024 tokens and those of refinements 2,048, so that of a failure of 6,144 about
1,000 are shown to the model, from its beginning and its end. The plan (libtpu 0.0.42.1, compiled and estimated): 12.6
of 15.75 GiB a chip at the fullest, the prefill beside all rows; a step of answers half as long as they may be takes
3.4 minutes, of the longest 8.7; a checkpoint 98 GB, on a disk that all hosts mount. Not yet run on hardware.
"""

from cgrpo_jax.config import default_config


def get_config(method: str = "critique_grpo"):
    config = default_config(method)
    config.model.path = "Qwen/Qwen3-8B"
    config.data.source, config.data.split = "open-r1/OpenR1-Math-220k:default", "train"
    config.data.question_column, config.data.answer_column = "problem", "answer"
    config.data.on_bad_row = "drop"
    config.data.max_prompt_tokens = 1024
    config.refine.max_prompt_tokens = 2048
    config.sampling.max_new_tokens = 6144
    config.model.thinking = "off"  # thoughts would not end within the limit
    config.train.steps = 400
    config.train.prompts = 128
    config.train.remat = "attention"
    config.sampler.tensor = 8  # of 64 chips: 8 groups, each with its own rows
    config.sampler.rings, config.sampler.prefills = "8192x512", "1024,2048"
    config.sampler.kv_cache_mb = 9700.0
    config.eval.every = 50
    config.eval.tasks = "math500"
    config.eval.samples = 1
    config.checkpoint.every = 20
    return config
