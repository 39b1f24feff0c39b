"""What must hold between several options, and between options and model, before anything is compiled."""

from __future__ import annotations

from cgrpo_jax.config import Config, ConfigError, samples_refinements
from cgrpo_jax.data.files import local_file
from cgrpo_jax.data.tasks import parse_names
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.options import faults
from cgrpo_jax.sampling.sizes import fixed_sizes

CONCLUDING = ("worked", "offline", "self_gt", "self_eval", "api", "local")  # critics that end in a verdict


def _evaluation_faults(cfg: Config) -> list[str]:
    wrong = []
    own_file = local_file(cfg.data.source) is not None and cfg.eval.source in ("", cfg.data.source)
    if cfg.eval.every and own_file and not cfg.eval.tasks and cfg.method != "generate":
        wrong.append(
            "eval.every needs eval.source or eval.tasks: a file has no split, and its rows are those of training"
        )
    if cfg.method == "eval" and not cfg.eval.tasks:
        wrong.append("method=eval needs eval.tasks: names and NAME=FILE, with commas between them")
    return wrong


def _best_faults(cfg: Config) -> list[str]:
    best = cfg.checkpoint.best
    if not best:
        return []
    if cfg.method not in ("rl", "sft") or not cfg.eval.every:
        return [f"checkpoint.best = {best!r} needs evaluations in training: method=rl or sft, and eval.every > 0"]
    tasks = [f"eval/{name}" for name, _ in parse_names(cfg.eval.tasks)]
    known = [f"{name}/pass@1" for name in (["eval"] if cfg.eval.source or not tasks else []) + tasks]
    if best in known:
        return []
    return [f"checkpoint.best = {best!r}: no evaluation ranks checkpoints by it; there is {', '.join(known)}"]


def _refine_faults(cfg: Config) -> list[str]:
    wrong: list[str] = []
    samples = cfg.train.samples
    if cfg.refine.trigger == "never":
        return wrong
    if cfg.refine.k < (0 if cfg.method == "generate" and cfg.generate.rows == "critiques" else 1):
        wrong.append("refine.k must be at least 1 with refinements on (refine.trigger=never turns them off)")
    if cfg.refine.k > samples:
        wrong.append(f"refine.k = {cfg.refine.k} exceeds the train.samples = {samples} refinements of a problem")
    if cfg.refine.group == "replace" and cfg.refine.k >= samples:
        wrong.append("refine.group=replace with refine.k >= train.samples leaves no response in the group")
    if not samples_refinements(cfg):
        if cfg.refine.k > 1:
            wrong.append(f"refine.k = {cfg.refine.k}: refine.refiner=target has one trace for each problem")
        if cfg.objective.refined_shape == "ratio_to_sampler":
            wrong.append("objective.refined_shape=ratio_to_sampler: nobody sampled what refine.refiner=target takes")
        return wrong
    if cfg.refine.refiner == "local" and cfg.refine.own_group:
        wrong.append("refine.own_group trains under the prompt of a refinement: refiner=local's is not the policy's")
    if cfg.refine.refiner == "local" and cfg.objective.refined_shape == "ratio_to_sampler":
        wrong.append("objective.refined_shape=ratio_to_sampler: refine.refiner=local is not sampled from the policy")
    if cfg.refine.own_group and cfg.refine.context != "together":
        wrong.append("refine.own_group needs refine.context=together: refinements of one prompt are a group")
    if cfg.refine.inverted and cfg.refine.critique == "no_verdict":
        wrong.append("refine.inverted turns a verdict round: refine.critique=no_verdict has none")
    if cfg.refine.critique_accept == "any" and cfg.refine.critique in ("self_eval", "no_verdict"):
        wrong.append(f"refine.critique_accept=any: refine.critique={cfg.refine.critique} has a rule of its own")
    written = cfg.refine.critique in ("self_gt", "self_eval", "no_verdict", "local")
    if (cfg.refine.critique == "function") != bool(cfg.refine.critique_fn):
        wrong.append("refine.critique=function and refine.critique_fn=package.module:function need each other")
    if written and cfg.refine.critique_tokens > cfg.sampling.max_new_tokens:
        wrong.append(
            f"refine.critique_tokens = {cfg.refine.critique_tokens} exceeds sampling.max_new_tokens = "
            f"{cfg.sampling.max_new_tokens}: a critique is sampled in the same rows"
        )
    if "local" in (cfg.refine.critique, cfg.refine.refiner) and not cfg.local.path.strip():
        wrong.append("refine.critique=local and refine.refiner=local need the second model: local.path")
    if cfg.refine.critique == "worked" and cfg.data.source != "arithmetic":
        wrong.append("refine.critique=worked needs a task with a step checker (data.source=arithmetic)")
    if cfg.refine.max_prompt_tokens <= cfg.data.max_prompt_tokens:
        wrong.append("refine.max_prompt_tokens must exceed data.max_prompt_tokens: it holds the question and more")
    return wrong


def _generate_faults(cfg: Config) -> list[str]:
    rows = cfg.generate.rows
    if rows != "responses" and not samples_refinements(cfg):
        return [f"generate.rows = {rows!r} needs what a model refines: refine.trigger not never, refiner not target"]
    if rows == "critiques" and cfg.refine.inverted:
        return ["generate.rows=critiques keeps those whose verdict is the rule's: refine.inverted leaves none"]
    if rows == "critiques" and cfg.refine.critique not in CONCLUDING:
        return [
            f"generate.rows=critiques needs critiques that end in a verdict: refine.critique of {', '.join(CONCLUDING)}"
        ]
    return []


def _model_faults(cfg: Config, model: ModelConfig) -> list[str]:
    wrong, new = [], cfg.sampling.max_new_tokens
    refining = samples_refinements(cfg)
    for key, slots in [("data", cfg.data.max_prompt_tokens)] + [("refine", cfg.refine.max_prompt_tokens)] * refining:
        if slots + new > model.max_positions:
            wrong.append(
                f"{key}.max_prompt_tokens {slots} + sampling.max_new_tokens {new} exceeds the model's "
                f"{model.max_positions} positions"
            )
    if model.heads % model.kv_heads:
        wrong.append(f"the model's {model.heads} heads are no multiple of its {model.kv_heads} key/value heads")
    return wrong


def check_local(cfg: Config, model: ModelConfig) -> None:
    """Raises ConfigError where the second model does not hold what it would be asked."""
    slots, new = cfg.refine.max_prompt_tokens, cfg.sampling.max_new_tokens
    if slots + new > model.max_positions:
        raise ConfigError(
            f"local.path = {cfg.local.path!r}: refine.max_prompt_tokens {slots} + sampling.max_new_tokens {new} "
            f"exceeds that model's {model.max_positions} positions"
        )


def check(cfg: Config, model: ModelConfig) -> None:
    """Raises ConfigError for clashing or impossible values, all of them in one message."""
    wrong = faults(cfg)
    wrong += _evaluation_faults(cfg) + _best_faults(cfg) + _refine_faults(cfg) + _model_faults(cfg, model)
    try:
        fixed_sizes(cfg.sampler)
    except ValueError as error:
        wrong.append(str(error))
    updates = max(1, cfg.train.updates_per_rollout)
    if cfg.train.prompts % updates:
        wrong.append(f"train.updates_per_rollout = {updates} does not divide {cfg.train.prompts} prompts")
    if cfg.objective.aggregation == "token_mean" and cfg.objective.weights != "uniform":
        wrong.append("objective.aggregation=token_mean weights all tokens alike: it needs objective.weights=uniform")
    if cfg.method == "sft" and cfg.data.source.startswith("reasoning_gym:"):
        wrong.append("method=sft learns the texts of a file or hub set (or arithmetic): a generated task has none")
    if cfg.method == "sft" and cfg.train.updates_per_rollout != 1:
        wrong.append("method=sft has one update a step: train.updates_per_rollout=1")
    if cfg.method == "generate":
        wrong += _generate_faults(cfg)
    if cfg.reward.correct_at > 1 and not cfg.reward.fn:
        wrong.append(
            f"reward.correct_at = {cfg.reward.correct_at:g}: a grader gives 1 at most; only reward.fn gives more"
        )
    if cfg.sampling.temperature <= 0 and cfg.method == "rl":
        wrong.append("sampling.temperature must be positive: training needs samples")
    if wrong:
        separator = "\n  " if len(wrong) > 1 else " "  # a single one is a line
        raise ConfigError(separator.join(["the configuration cannot be run:", *wrong]))
