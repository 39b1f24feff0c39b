"""A checkpoint on the paper's tasks: greedy pass@1, or pass@k with samples.

    python -m cgrpo_jax.main --config=eval --config.model.path=CHECKPOINT --workdir=runs/eval
    ... --config.eval.tasks=gsm8k=gsm8k/test.jsonl,aime24      # names, and NAME=FILE for a local .jsonl .parquet .csv
    python -m cgrpo_jax.main --config=eval:pass_at_k ...     # 32 samples at temperature 0.6, top-p 0.95

The same command again goes on where it was stopped, and grades anew what is stored. Tasks: cgrpo_jax/data/tasks.py.
Answers have 8,192 tokens, as in the paper; a model whose window holds less is refused, and wants
--config.sampling.max_new_tokens=2048 or so.
"""

from cgrpo_jax.config import default_config

EIGHT = "math500,minerva_math,olympiadbench,amc23,aime24,theoremqa,gpqa_diamond,mmlu_pro"  # of the paper


def get_config(decoding: str = "greedy"):
    config = default_config("dr_grpo")
    config.method = "eval"
    config.eval.tasks = EIGHT
    config.eval.problems = 0  # all
    config.data.max_prompt_tokens = 2048
    config.data.on_bad_row = "drop"
    config.sampling.max_new_tokens = 8192
    if decoding == "pass_at_k":
        config.eval.samples, config.eval.temperature, config.eval.top_p = 32, 0.6, 0.95
    elif decoding == "greedy":
        config.eval.samples, config.eval.temperature = 1, 0.0
    else:
        raise ValueError(f"decoding {decoding!r}: greedy or pass_at_k")
    return config
