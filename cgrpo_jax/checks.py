"""What must hold between several options, and between options and model, before anything is compiled."""

from __future__ import annotations

from cgrpo_jax.config import Config, ConfigError, critic_of, samples_refinements, stop_texts
from cgrpo_jax.critics import CRITICS
from cgrpo_jax.data.files import local_file
from cgrpo_jax.data.tasks import parse_names
from cgrpo_jax.grading.functions import deciding
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.options import RefineConfig, faults
from cgrpo_jax.sampling.sizes import fixed_sizes


def holds_out(cfg: Config) -> bool:
    """Whether questions of the training file are kept for evaluation: it has no split, and no other is named."""
    trained = cfg.method in ("rl", "sft") and local_file(cfg.data.source) is not None
    return bool(trained and cfg.eval.every and not cfg.eval.source and not cfg.eval.tasks)


def _told(*rules: tuple[bool, str, str]) -> list[str]:
    """Of (whether it is wrong, what is wrong, what mends it) what is wrong, with its mend as an option to paste."""
    return [f"{what} (--config.{mend})" for wrong, what, mend in rules if wrong]


def _evaluation_faults(cfg: Config) -> list[str]:
    same = local_file(cfg.data.source) is not None and cfg.eval.source == cfg.data.source and cfg.method != "generate"
    return _told(
        (
            bool(cfg.eval.every and same),
            f"eval.source = {cfg.eval.source!r} is the file that is trained on; without it a tenth of its questions is "
            "held out",
            "eval.source=",
        ),
        (
            cfg.method == "eval" and not cfg.eval.tasks,
            "method=eval needs eval.tasks: names and NAME=FILE, with commas between them",
            "eval.tasks=math500",
        ),
    )


def _best_faults(cfg: Config) -> list[str]:
    best = cfg.checkpoint.best
    if not best:
        return []
    if cfg.method not in ("rl", "sft") or not cfg.eval.every:
        needed = f"checkpoint.best = {best!r} needs evaluations in training: method=rl or sft, and eval.every > 0"
        return _told((True, needed, "checkpoint.best="))
    tasks = [f"eval/{name}" for name, _ in parse_names(cfg.eval.tasks)]
    known = [f"{name}/pass@1" for name in (["eval"] if cfg.eval.source or not tasks else []) + tasks]
    there = f"checkpoint.best = {best!r}: no evaluation ranks checkpoints by it; there is {', '.join(known)}"
    return _told((best not in known, there, f"checkpoint.best={known[0]}"))


def _refine_faults(cfg: Config) -> list[str]:
    refine, samples, new = cfg.refine, cfg.train.samples, cfg.sampling.max_new_tokens
    if refine.trigger == "never":
        return []
    by_sampler, local = cfg.objective.refined_shape == "ratio_to_sampler", refine.refiner == "local"
    shape = "objective.refined_shape=ratio_to_sampler"
    least = 0 if cfg.method == "generate" and cfg.generate.rows == "critiques" else 1
    wrong = _told(
        (refine.k < least, "refine.k must be at least 1, or refine.trigger=never", "refine.k=1"),
        (
            refine.k > samples,
            f"refine.k = {refine.k} exceeds the train.samples = {samples} refinements of a problem",
            f"refine.k={samples}",
        ),
        (
            refine.group == "replace" and refine.k >= samples,
            "refine.group=replace with refine.k >= train.samples leaves no response in the group",
            "refine.group=append",
        ),
    )
    if not samples_refinements(cfg):
        one = f"refine.k = {refine.k}: refine.refiner=target has one trace for each problem"
        nobody = f"{shape}: nobody sampled what refine.refiner=target takes"
        return wrong + _told((refine.k > 1, one, "refine.k=1"), (by_sampler, nobody, "objective.refined_shape=shaped"))
    own = "refine.own_group trains under the prompt of a refinement: refiner=local's is not the policy's"
    other = f"{shape}: refine.refiner=local is not sampled from the policy"
    together = "refine.own_group needs refine.context=together: refinements of one prompt are a group"
    return (
        wrong
        + _told(
            (local and refine.own_group, own, "refine.own_group=false"),
            (local and by_sampler, other, "objective.refined_shape=shaped"),
            (refine.own_group and refine.context != "together", together, "refine.context=together"),
            (
                refine.max_prompt_tokens <= cfg.data.max_prompt_tokens,
                "refine.max_prompt_tokens must exceed data.max_prompt_tokens: it holds the question and more",
                f"refine.max_prompt_tokens={max(4 * cfg.data.max_prompt_tokens, 4)}",
            ),
        )
        + _critic_faults(cfg, new)
    )


def _critic_faults(cfg: Config, new: int) -> list[str]:
    refine, critic = cfg.refine, critic_of(cfg)
    return _told(
        (
            refine.inverted and not critic.judges,
            f"refine.inverted turns a verdict round: refine.critique={critic.name} has none",
            "refine.inverted=false",
        ),
        (
            refine.critique_accept == "any" and critic.is_model and not critic.accepts,
            f"refine.critique_accept=any: refine.critique={critic.name} has a rule of its own",
            f"refine.critique_accept={RefineConfig().critique_accept}",
        ),
        (
            (critic.by == "function") != bool(refine.critique_fn),
            "refine.critique=function and refine.critique_fn=package.module:function need each other",
            "refine.critique=function" if refine.critique_fn else "refine.critique_fn=MODULE:FUNCTION",
        ),
        (
            critic.sampled and refine.critique_tokens > new,
            f"refine.critique_tokens = {refine.critique_tokens} exceeds sampling.max_new_tokens = {new}: a critique is "
            "sampled in the same rows",
            f"refine.critique_tokens={new}",
        ),
        (
            (critic.by == "second" or refine.refiner == "local") and not cfg.local.path.strip(),
            "refine.critique=local and refine.refiner=local need the second model: local.path",
            "local.path=FOLDER",
        ),
        (
            critic.by == "task" and cfg.data.source != "arithmetic",
            f"refine.critique={critic.name} needs a task with a step checker (data.source=arithmetic)",
            "refine.critique=indicative_gt",
        ),
    )


def _reward_faults(cfg: Config) -> list[str]:
    try:
        deciding(cfg.reward)
    except ValueError as error:
        return [str(error)]
    return []


def _objective_faults(cfg: Config) -> list[str]:
    return _told(
        (
            0 < cfg.objective.correction_limit <= 1,
            f"objective.correction_limit = {cfg.objective.correction_limit:g}: above 1, or 0 for the default",
            "objective.correction_limit=0",
        ),
        (
            cfg.objective.aggregation == "token_mean" and cfg.objective.weights != "uniform",
            "objective.aggregation=token_mean weights all tokens alike: it needs objective.weights=uniform",
            "objective.weights=uniform",
        ),
    )


def _generate_faults(cfg: Config) -> list[str]:
    rows = cfg.generate.rows
    if rows != "responses" and not samples_refinements(cfg):
        asked = f"generate.rows = {rows!r} needs what a model refines: refine.trigger not never, refiner not target"
        return _told((True, asked, "generate.rows=responses"))
    if rows == "critiques" and cfg.refine.inverted:
        none = "generate.rows=critiques keeps those whose verdict is the rule's: refine.inverted leaves none"
        return _told((True, none, "refine.inverted=false"))
    concluding = ", ".join(critic.name for critic in CRITICS.values() if critic.concludes)
    needed = f"generate.rows=critiques needs critiques that end in a verdict: refine.critique of {concluding}"
    return _told((rows == "critiques" and not critic_of(cfg).concludes, needed, "refine.critique=self_gt"))


def _model_faults(cfg: Config, model: ModelConfig) -> list[str]:
    wrong, new = [], cfg.sampling.max_new_tokens
    refining = samples_refinements(cfg)
    for key, slots in [("data", cfg.data.max_prompt_tokens)] + [("refine", cfg.refine.max_prompt_tokens)] * refining:
        room = model.max_positions - new
        wrong += _told(
            (
                slots > room,
                f"{key}.max_prompt_tokens {slots} + sampling.max_new_tokens {new} exceeds the model's "
                f"{model.max_positions} positions",
                f"{key}.max_prompt_tokens={room}"
                if room > 0
                else f"sampling.max_new_tokens={model.max_positions // 4}",
            )
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


def check(cfg: Config, model: ModelConfig | None) -> None:
    """Raises ConfigError for clashing or impossible values, all of them in one message.

    Args:
      model: None: it is not to be had, and what does not fit it is not found.
    """
    wrong = faults(cfg)
    wrong += _evaluation_faults(cfg) + _best_faults(cfg) + _refine_faults(cfg)
    wrong += _model_faults(cfg, model) if model else []
    wrong += _reward_faults(cfg) + _objective_faults(cfg)
    try:
        fixed_sizes(cfg.sampler)
    except ValueError as error:
        wrong.append(str(error))
    updates, prompts, supervised = max(1, cfg.train.updates_per_rollout), cfg.train.prompts, cfg.method == "sft"
    wrong += _told(
        (
            prompts % updates != 0,
            f"train.updates_per_rollout = {updates} does not divide {prompts} prompts",
            f"train.prompts={-(-prompts // updates) * updates}",
        ),
        (
            supervised and cfg.data.source.startswith("reasoning_gym:"),
            "method=sft learns the texts of a file or hub set (or arithmetic): a generated task has none",
            "data.source=arithmetic",
        ),
        (
            supervised and cfg.train.updates_per_rollout != 1,
            "method=sft has one update a step: train.updates_per_rollout=1",
            "train.updates_per_rollout=1",
        ),
        (
            cfg.reward.correct_at > 1 and not cfg.reward.fn,
            f"reward.correct_at = {cfg.reward.correct_at:g}: a grader gives 1 at most; only reward.fn gives more",
            "reward.correct_at=1",
        ),
        (
            bool(cfg.sampling.stop) and not stop_texts(cfg),
            f"sampling.stop = {cfg.sampling.stop!r}: a list of texts in JSON is needed",
            """sampling.stop='["\\nQuestion:"]'""",
        ),
        (
            cfg.sampling.temperature <= 0 and cfg.method == "rl",
            "sampling.temperature must be positive: training needs samples",
            "sampling.temperature=1",
        ),
    )
    if cfg.method == "generate":
        wrong += _generate_faults(cfg)
    if wrong:
        separator = "\n  " if len(wrong) > 1 else " "  # a single one is a line
        raise ConfigError(separator.join(["the configuration cannot be run:", *wrong]))
