"""What to suggest for an option that is not there: how TRL, verl and OpenRLHF call ours, and names spelt alike.

`TABLE` is also the section "Coming from TRL or verl" of configs/README.md (`python tests/config_reference.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CLOSE, SURE = 0.75, 0.85  # the similarity (difflib) from which on a name is a misspelling: of as many letters, of any
FEW = 3  # suggestions, at most


class Row(NamedTuple):
    """An option of ours, and its names elsewhere, with blanks between them."""

    ours: str  # one key of the configuration, or several; --NAME: an option of the command
    trl: str
    verl: str
    openrlhf: str  # before and since its options have dots
    differs: str = ""


TABLE = (
    Row("model.path", "model_name_or_path", "model.path", "pretrain actor.model_name_or_path"),
    Row("model.dtype", "dtype torch_dtype bf16", "rollout.dtype", "ds.param_dtype", "of the computation; weights are float32"),
    Row("model.thinking", "chat_template_kwargs", "apply_chat_template_kwargs", "", "`enable_thinking`: on, off"),
    Row("data.source", "dataset_name", "train_files", "prompt_data data.prompt_dataset"),
    Row("data.split", "dataset_train_split", "", "prompt_split data.prompt_split"),
    Row("data.question_column", "", "prompt_key", "input_key data.input_key"),
    Row("data.answer_column", "", "", "label_key data.label_key"),
    Row("data.max_prompt_tokens", "max_prompt_length", "max_prompt_length rollout.prompt_length", "prompt_max_len", "a longer question is a bad row"),
    Row("data.on_bad_row", "", "filter_overlong_prompts", "", "`drop`"),
    Row("reward.fn", "reward_funcs", "custom_reward_function.path custom_reward_function", "remote_rm_url reward.remote_url", "`module:function`, TRL's signature"),
    Row("train.steps", "max_steps num_train_epochs", "total_training_steps total_epochs", "num_episodes max_epochs train.max_epochs", "rollouts, not epochs"),
    Row("train.prompts", "generation_batch_size", "train_batch_size", "rollout_batch_size rollout.batch_size", "problems a rollout; TRL counts completions"),
    Row("train.samples", "num_generations", "rollout.n", "n_samples_per_prompt rollout.n_samples_per_prompt", "responses; a refinement is added to them"),
    Row("train.updates_per_rollout", "steps_per_generation num_iterations", "ppo_mini_batch_size ppo_epochs", "train_batch_size train.batch_size", "a number of updates, each on its own share of the problems; no second pass"),
    Row("train.micro_batch", "per_device_train_batch_size gradient_accumulation_steps", "ppo_micro_batch_size_per_gpu ppo_micro_batch_size", "micro_train_batch_size train.micro_batch_size", "problems at once; changes memory and not the result"),
    Row("train.remat", "gradient_checkpointing", "enable_gradient_checkpointing", "actor.gradient_checkpointing_enable", "dots, full, attention, wide"),
    Row("train.tracker", "report_to", "trainer.logger", "use_wandb", "wandb or trackio, beside TensorBoard"),
    Row("sampling.max_new_tokens", "max_completion_length", "max_response_length rollout.response_length", "generate_max_len rollout.max_new_tokens"),
    Row("sampling.temperature", "temperature", "rollout.temperature", "temperature rollout.temperature"),
    Row("sampling.top_p", "top_p", "rollout.top_p", "top_p rollout.top_p"),
    Row("sampling.top_k", "top_k", "rollout.top_k", "", "0 keeps all"),
    Row("sampler.kv_cache_mb", "vllm_gpu_memory_utilization", "gpu_memory_utilization", "vllm_gpu_memory_utilization vllm.gpu_memory_utilization", "megabytes a device"),
    Row("sampler.tensor", "vllm_tensor_parallel_size", "tensor_model_parallel_size", "vllm_tensor_parallel_size vllm.tensor_parallel_size"),
    Row("objective.clip_eps", "epsilon", "clip_ratio clip_ratio_low", "eps_clip actor.eps_clip", "also of refinements: `objective.clip_refinements`"),
    Row("objective.clip_high", "epsilon_high", "clip_ratio_high", "eps_clip_low_high actor.eps_clip_low_high"),
    Row("objective.kl_coef", "beta", "kl_loss_coef", "init_kl_coef algo.kl.init_coef", "k3 against the initial policy; 0 loads no reference"),
    Row("objective.entropy_coef", "", "entropy_coeff", "entropy_loss_coef actor.entropy_coef"),
    Row("objective.aggregation", "loss_type", "loss_agg_mode", "", "constant: `dr_grpo`; token_mean: `dapo`; sequence_mean: `grpo`"),
    Row("objective.divide_by_std", "scale_rewards", "norm_adv_by_std_in_grpo", "no_advantage_std_norm algo.advantage.no_std_norm", "off by default"),
    Row("objective.overlong", "mask_truncated_completions", "", "", "`mask`"),
    Row("objective.correction", "vllm_importance_sampling_correction", "", "enable_vllm_is_correction algo.advantage.is_correction_enable"),
    Row("optimizer.learning_rate", "learning_rate", "optim.lr lr", "actor_learning_rate actor.adam.lr"),
    Row("optimizer.schedule", "lr_scheduler_type", "lr_scheduler_type warmup_style", "lr_scheduler", "constant or cosine"),
    Row("optimizer.warmup_updates", "warmup_steps warmup_ratio", "lr_warmup_steps lr_warmup_steps_ratio", "lr_warmup_ratio", "a number of updates"),
    Row("optimizer.weight_decay", "weight_decay", "optim.weight_decay", "l2"),
    Row("optimizer.b2", "adam_beta2", "betas", "adam_betas"),
    Row("optimizer.clip_norm", "max_grad_norm", "grad_clip clip_grad", "max_norm"),
    Row("eval.every", "eval_steps", "test_freq val_before_train", "eval_steps eval.steps", "before the first step, too"),
    Row("eval.source", "", "val_files", "eval_dataset eval.dataset"),
    Row("eval.split", "dataset_test_split", "", "eval_split"),
    Row("eval.samples", "num_generations_eval", "val_kwargs.n", "eval_n_samples_per_prompt eval.n_samples_per_prompt"),
    Row("eval.temperature", "", "val_kwargs.temperature", "eval_temperature"),
    Row("checkpoint.every", "save_steps", "save_freq", "save_steps ckpt.save_steps"),
    Row("checkpoint.keep", "save_total_limit", "max_actor_ckpt_to_keep", "max_ckpt_num ckpt.max_num"),
    Row("checkpoint.best", "metric_for_best_model", "", "ckpt.best_metric_key"),
    Row("mesh.fsdp", "fsdp", "n_gpus_per_node fsdp_size", "zero_stage ds.zero_stage", "all devices that are there, by default"),
    Row("seed", "seed", "", "seed train.seed"),
    Row("--workdir", "output_dir", "default_local_dir", "save_path ckpt_path ckpt.output_dir ckpt.path", "the same command resumes"),
)  # fmt: skip
# Short forms that belong to no one framework.
SHORT = {
    "lr": "optimizer.learning_rate", "batch_size": "train.prompts", "n": "train.samples", "group_size": "train.samples",
    "temp": "sampling.temperature", "max_tokens": "sampling.max_new_tokens", "max_length": "sampling.max_new_tokens",
    "epochs": "train.steps", "num_steps": "train.steps", "kl": "objective.kl_coef", "dataset": "data.source",
    "train.batch_size": "train.prompts", "eval.n": "eval.samples", "entropy": "objective.entropy_coef", "eps": "objective.clip_eps", "warmup": "optimizer.warmup_updates",
}  # fmt: skip


def elsewhere() -> dict[str, tuple[str, ...]]:
    """Name of another framework, or short form -> our keys for it."""
    found: dict[str, tuple[str, ...]] = {}
    named = [(name, row.ours) for row in TABLE for name in f"{row.trl} {row.verl} {row.openrlhf}".split()]
    for name, key in (*SHORT.items(), *named):
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), key)))
    return found


def _of_another(key: str) -> tuple[str, ...]:
    """Our keys for a name of another framework: of all endings of the dotted name, the longest that is one."""
    names, parts = elsewhere(), key.split(".")
    endings = (".".join(parts[first:]) for first in range(len(parts)))
    return next((names[ending] for ending in endings if ending in names), ())


def closest(name: str, known: Iterable[str]) -> list[str]:
    """The known names that begin with `name`, where these are few, else the one of which it is a misspelling."""
    known = sorted(set(known))
    begun = [other for other in known if len(name) > 2 and other.startswith(name)]
    if 0 < len(begun) <= FEW:
        return begun
    as_long = [other for other in known if abs(len(other) - len(name)) <= 1]
    return difflib.get_close_matches(name, known, 1, SURE) or difflib.get_close_matches(name, as_long, 1, CLOSE)


def suggested(key: str, known: Sequence[str]) -> list[str]:
    """Dotted names of `known` that may be meant by one that is not among them; none rather than a wrong one."""
    part, _, leaf = key.rpartition(".")
    parts: dict[str, list[str]] = {}  # part -> its leaves
    places: dict[str, list[str]] = {}  # leaf -> whole names
    for name in known:
        parts.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
        places.setdefault(name.rpartition(".")[2], []).append(name)
    near = [part] if part in parts else closest(part, parts)[:1]
    within = [f"{near[0]}.{other}" if near[0] else other for other in closest(leaf, parts[near[0]])] if near else []
    if f"{''.join(near)}.{leaf}" in within:  # only the part was misspelt
        return [f"{near[0]}.{leaf}"]
    other = list(_of_another(key)) or within or [name for name in known if key.startswith(f"{name}.")]
    if other:
        return other
    alike = [leaf] if leaf in places else closest(leaf, places)
    found = [name for leaf in alike for name in elsewhere().get(leaf, places[leaf])]
    return found if len(found) <= FEW else []


def unknown(key: str, known: Sequence[str]) -> str:
    """What to say behind a key that is not there: what may be meant, else what the part of that name holds."""
    meant = [name if name.startswith("--") else f"config.{name}" for name in suggested(key, known)]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    part = key.partition(".")[0] if "." in key else ""
    held = [name.removeprefix(f"{part}.") for name in known if part and name.startswith(f"{part}.")]
    if held:
        return f"config.{part} holds {', '.join(held)}"
    parts = dict.fromkeys(name.partition(".")[0] for name in known)
    return f"config holds {', '.join(parts)}; all keys: configs/REFERENCE.md"
