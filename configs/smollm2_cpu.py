"""Critique-GRPO on a real 135 M-parameter chat model, on a laptop: ten steps, to see every part at work.

    python -m cgrpo_jax.main --config=smollm2_cpu --workdir=runs/smollm2 --config.model.path=CHECKPOINT
    ... --config.data.source=gsm8k/train.jsonl     # a local file (.jsonl .parquet .csv) instead of letter counting

CHECKPOINT is any Llama, Qwen2 or Qwen3 folder or hub id; the sizes suit HuggingFaceTB/SmolLM2-135M-Instruct.
Ten steps teach it nothing to speak of: raise train.steps and optimizer.learning_rate for that.
"""

from cgrpo_jax.config import default_config


def get_config(method: str = "critique_grpo"):
    config = default_config(method)
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.source = "reasoning_gym:letter_counting"
    config.data.max_prompt_tokens = 320  # the longest question of GSM8K takes 261
    config.refine.max_prompt_tokens = 512
    config.sampling.max_new_tokens = 64
    config.train.steps = 10
    config.train.prompts = 4
    config.optimizer.learning_rate = 1e-5
    config.checkpoint.every = 5
    return config
