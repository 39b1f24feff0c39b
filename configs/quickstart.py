"""Critique-GRPO on the embedded model: the mechanism, on a laptop, in about two minutes.

    python -m cgrpo_jax.main --config=quickstart --workdir=runs/quickstart
    python -m cgrpo_jax.main --config=quickstart:dr_grpo --workdir=runs/quickstart_dr_grpo

Task: column arithmetic (cgrpo_jax/data/arithmetic.py). The hard half is engineered: the warm start holds a habit that
plain sampling never escapes. It shows how the method works and is no evidence about language models.
"""

from cgrpo_jax.config import default_config


def get_config(method: str = "critique_grpo"):
    config = default_config(method)
    config.model.path = "package://quickstart"
    config.data.source = "arithmetic"
    config.data.max_prompt_tokens = 64
    config.refine.max_prompt_tokens = 256
    config.sampling.max_new_tokens = 64
    if config.refine.context == "together":  # golf: four attempts are what the model's 512 positions hold
        config.train.samples, config.refine.max_prompt_tokens = 4, 448
    config.train.steps = 50
    config.train.prompts = 16
    config.train.micro_batch = 4
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_updates = 5
    config.optimizer.b2 = 0.99
    config.eval.every = 25
    config.eval.problems = 256  # half easy, half hard
    config.eval.samples = 4
    config.checkpoint.every = 25
    return config
