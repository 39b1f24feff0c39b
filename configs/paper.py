"""A row of the paper's tables as a whole recipe: MODEL,ROW (arXiv 2506.03106).

    python -m cgrpo_jax.subset --size=4k --seed=0 --out=data/openr1_math_4k.parquet
    python -m cgrpo_jax.main --config=paper:qwen2_5_7b,critique_grpo_cot --workdir=runs/row
    python -m cgrpo_jax.convert --from=runs/row --step=350 --to=hf --out=runs/row_model   # of runs/row/best.json
    python -m cgrpo_jax.main --config=paper:qwen2_5_7b,eval --workdir=runs/row_eval --config.model.path=runs/row_model

MODEL: of MODELS. ROW: a method of cgrpo_jax/config.py or of ROWS below; `eval`: the eight tasks, greedy, by the paper's
own grader, and the two of multiple choice by the letter (without --config.model.path the base model's row).
data/validation.parquet is the authors' test.parquet of 2,019 rows; it is asked every 50 of 400 steps, and the best step
is kept. Rows that generate are followed by one that learns data.source=WORKDIR/rows.jsonl: raft, refinement_ft, citl_ft
by sft_generated, critique_ft by sft_critiques, grpo_then_refinement_sft by sft.

Where the paper says nothing this says what was chosen: lengths, two updates a rollout and the critic's sampling are
those of the release and of the authors' replies, but luffy's answers, which are LUFFY's; sft is LUFFY's recipe, and as
the paper trains such rows to convergence and reports the best checkpoint, sft_generated makes three epochs of the most
rows there can be, 32,000; how many epochs of the rows at hand a run makes is said at its start. A model's own critique
has the 1,024 tokens that the authors' replies give one. The seed of the subset is ours, for their rows are not public.
Revisions are "main": no commit could be looked up here; pin them (--config.model.revision=COMMIT).
Memory and mesh are those of one's chips, see tpu_v4.py and its neighbours. Nothing here has been run at scale.
"""

from cgrpo_jax.config import METHODS, default_config

# As LUFFY widens it: a rope base of 40,000 and a window of 16,384 in place of 10,000 and 4,096
LUFFY_WINDOW = {"model.rope_theta": 40_000.0, "model.max_positions": 16_384}
MODELS = {
    "qwen2_5_7b": {"model.path": "Qwen/Qwen2.5-7B"},
    "qwen2_5_math_7b": {"model.path": "Qwen/Qwen2.5-Math-7B"} | LUFFY_WINDOW,
    "qwen3_8b": {"model.path": "Qwen/Qwen3-8B", "model.thinking": "on"},
    "qwen3_8b_base": {"model.path": "Qwen/Qwen3-8B-Base"},
    "llama_3_2_3b_instruct": {"model.path": "meta-llama/Llama-3.2-3B-Instruct"},
    "qwen3_32b": {"model.path": "Qwen/Qwen3-32B", "model.thinking": "on"},
}
COT = {"refine.critique": "api", "api.base_url": "https://api.openai.com/v1", "api.model": "gpt-4o"}
# LUFFY's: 3 epochs of the 4,000 rows
SFT = {
    "train.prompts": 64,
    "train.steps": 188,
    "optimizer.learning_rate": 5e-5,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_updates": 19,
    "sampling.max_new_tokens": 8192,
}
# Of the 4,000 problems x 8 responses, each of which is right or refined
GENERATED = SFT | {"train.steps": 1500, "optimizer.warmup_updates": 150}
# A prompt is a question and a whole response; Critique-FT's own rate
CRITIQUES = SFT | {
    "data.max_prompt_tokens": 9216,
    "sampling.max_new_tokens": 6144,
    "optimizer.learning_rate": 5e-6,
}
CONCISE = {"refine.critique_tokens": 1024}
EIGHT = "math500,minerva_math,olympiadbench,amc23,aime24,theoremqa,gpqa_diamond,mmlu_pro"
EVAL = {"method": "eval", "eval.tasks": EIGHT, "sampling.max_new_tokens": 8192, "refine.trigger": "never"}
# row -> its method, and what the row changes
ROWS = {
    "critique_grpo_indicative": ("critique_grpo", {"refine.critique": "indicative"}),
    "critique_grpo_cot": ("critique_grpo", COT),
    "critique_grpo_text": ("critique_grpo_text", {key: COT[key] for key in ("api.base_url", "api.model")}),
    "self_critique": ("self_critique", CONCISE),
    "self_evaluation": ("critique_grpo", CONCISE | {"refine.critique": "self_eval"}),
    # 8,192 of LUFFY; its 1,024 for prompts would leave rows of the validation file out
    "luffy": ("luffy", {"sampling.max_new_tokens": 8192}),
    "weak_to_strong": ("weak_to_strong", {"local.path": "Qwen/Qwen3-8B-Base"}),
    "refinement_ft": ("refinement_ft", COT),
    "critique_ft": ("critique_ft", COT),
    "citl_ft": ("citl_ft", COT),
    "grpo_then_refinement_sft": ("grpo_then_refinement_sft", COT),
    "sft": ("sft", SFT),
    "sft_generated": ("sft", GENERATED),
    "sft_critiques": ("sft", CRITIQUES),
    "eval": ("dr_grpo", EVAL),
}


def get_config(model_and_row: str = "qwen2_5_7b,critique_grpo"):
    model, _, row = model_and_row.partition(",")
    if model not in MODELS or row not in (*METHODS, *ROWS):
        known = ", ".join(dict.fromkeys([*METHODS, *ROWS]))
        raise ValueError(f"{model_and_row!r}: MODEL,ROW of {', '.join(MODELS)} and {known}")
    method, changes = ROWS.get(row, (row, {}))
    config = default_config(method)
    config.data.source = "data/openr1_math_4k.parquet"
    config.data.on_bad_row = "drop"
    config.data.grader = "math_verify"  # the paper's own
    config.data.max_prompt_tokens = 2048
    config.refine.max_prompt_tokens = 9216  # a failure of 6,144 tokens is shown whole
    config.sampling.max_new_tokens = 6144
    config.train.steps = 400
    config.train.prompts = 128
    config.train.remat = "attention"
    if config.method == "rl":
        config.train.updates_per_rollout = 2
    config.sampler.kv_cache_mb = 19000.0
    config.eval.every = 50
    config.eval.tasks = "validation=data/validation.parquet"
    config.eval.problems = 0  # all
    config.eval.samples, config.eval.temperature = 1, 0.0
    config.checkpoint.every = 50
    if config.method in ("rl", "sft") and row != "eval":
        config.checkpoint.best = "eval/validation/pass@1"
    config.update_from_flattened_dict(MODELS[model] | changes)
    return config
