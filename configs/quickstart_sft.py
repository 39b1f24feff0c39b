"""The warm start of the embedded model, from random weights (about 10 minutes on 2 cores).

python -m cgrpo_jax.main --config=quickstart_sft --workdir=runs/quickstart_sft
python -m cgrpo_jax.convert --from=runs/quickstart_sft --to=hf --out=runs/quickstart_model
"""

from cgrpo_jax.config import default_config


def get_config():
    config = default_config("dr_grpo")
    config.method = "sft"
    config.model.path = "package://quickstart"
    config.model.random_init = True
    config.data.source = "arithmetic"
    config.data.max_prompt_tokens = 256  # refinement prompts are trained on too
    config.sampling.max_new_tokens = 64
    config.train.steps = 840
    config.train.prompts = 48  # rows a step; plain ones and refinements take turns
    config.train.samples = 1
    config.train.micro_batch = 48
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.03
    config.optimizer.warmup_updates = 100
    config.optimizer.b2 = 0.98
    config.checkpoint.every = 200
    return config
