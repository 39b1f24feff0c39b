"""Critique-GRPO of a model of half a billion parameters on GSM8K, on one chip: TPU v5e-1 or v6e-1, or a GPU.

    python -m cgrpo_jax.main --config=small_model --workdir=runs/small_model           # Qwen2.5-0.5B-Instruct
    ... --config=small_model:Qwen/Qwen3-0.6B                                           # another
    python -m cgrpo_jax.plan --config=small_model --topology=v5litepod-1               # does it fit

What the plan says of it on one v5e chip (libtpu 0.0.42.1, compiled and estimated): 10.1 of 15.75 GiB at the fullest,
the update, and at most 278 rows of the sampler; a step of answers half as long as they may be takes 7 s, of the
longest 15 s; a checkpoint 5.9 GB. On a T4 (15 GB, no bfloat16), by the same bytes in float32: the decoding of 96 rows
would take 14.6 GiB, so there, with 10.4 GiB at the fullest and XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment,

    ... --config.sampler.rings=896x32,1536x16 --config.sampler.kv_cache_mb=1900

Not yet run on hardware.
"""

from cgrpo_jax.config import default_config


def get_config(model: str = "Qwen/Qwen2.5-0.5B-Instruct"):
    config = default_config()
    config.model.path = model
    config.model.thinking = "off" if "Qwen3" in model else "auto"
    config.data.source, config.data.split = "openai/gsm8k:main", "train"
    config.data.max_prompt_tokens = 384
    config.refine.max_prompt_tokens = 1024
    config.sampling.max_new_tokens = 512
    config.train.steps = 100
    config.train.prompts = 16
    config.sampler.rings, config.sampler.prefills = "896x96,1536x32", "384,1024"
    config.sampler.kv_cache_mb = 3000.0
    config.eval.every = 25
    config.eval.problems = 128
    config.eval.samples = 1
    config.checkpoint.every = 25
    return config
