"""A table of the condition under which each option has an effect, to name the options that a run sets in vain.

Every option stands in exactly one row (tested), so a new one needs its place here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cgrpo_jax.config import METHODS, Config, asks_local, critic_of, samples_refinements
from cgrpo_jax.config.critics import By, Critic
from cgrpo_jax.config.options import GYM, generated
from cgrpo_jax.data.files import local_file
from cgrpo_jax.run.folders import PACKAGE
from cgrpo_jax.workdir.changes import flat
from cgrpo_jax.workdir.places import expanded

Holds = Callable[[Config], bool]


class Row(NamedTuple):
    """Options that have an effect under one condition."""

    needs: str  # the condition in words
    holds: Holds
    keys: str  # with spaces between them


def _trains(cfg: Config) -> bool:
    return cfg.method in ("rl", "sft")


def _rolls_out(cfg: Config) -> bool:
    return cfg.method in ("rl", "generate")


def _evaluates(cfg: Config) -> bool:
    return cfg.method == "eval" or (_trains(cfg) and cfg.eval.every > 0)


def _samples(cfg: Config) -> bool:
    return _rolls_out(cfg) or _evaluates(cfg)


def _holds_out(cfg: Config) -> bool:
    """Whether problems of eval.source, or of data.source in its place, are asked in training."""
    return _trains(cfg) and cfg.eval.every > 0 and bool(cfg.eval.source or not cfg.eval.tasks)


def _of_the_hub(source: str) -> bool:
    return not generated(source) and local_file(source) is None


def _hub_model(path: str) -> bool:
    return not path.startswith(PACKAGE) and not expanded(path).is_dir()


def _held_out_source(cfg: Config) -> str:
    return cfg.eval.source or cfg.data.source


def _by_mathematics(cfg: Config) -> bool:
    """Whether rows of a file or hub set are graded by their answer."""
    scored = [cfg.data.source] * _rolls_out(cfg) + [_held_out_source(cfg)] * _holds_out(cfg)
    by_answer = not cfg.reward.fn and not all(map(generated, scored))
    return by_answer or (_evaluates(cfg) and bool(cfg.eval.tasks))


def _own_scores(cfg: Config) -> bool:
    """Whether reward.fn has problems to score."""
    return _rolls_out(cfg) or _holds_out(cfg)


def _fractions(cfg: Config) -> bool:
    """Whether a score may be other than 0 and 1."""
    return bool(cfg.reward.fn) or (_rolls_out(cfg) and cfg.data.source.startswith(GYM))


def _refines(cfg: Config) -> bool:
    return _rolls_out(cfg) and samples_refinements(cfg)


def _has_refined(cfg: Config) -> bool:
    return _rolls_out(cfg) and cfg.refine.trigger != "never"


def _critic(is_so: Callable[[Critic], bool]) -> Holds:
    return lambda cfg: _refines(cfg) and is_so(critic_of(cfg))


def _by(kind: By) -> Holds:
    return _critic(lambda c: c.by == kind)


def _trains_refined(cfg: Config) -> bool:
    return cfg.method == "rl" and _has_refined(cfg)


def _moves(cfg: Config) -> bool:
    """Whether the policy has moved since the rollout where a ratio is taken; else each ratio is exactly 1."""
    return cfg.method == "rl" and cfg.train.updates_per_rollout > 1


def _clips_refined(cfg: Config) -> bool:
    shape = cfg.objective.refined_shape
    return _trains_refined(cfg) and shape != "log_probability" and (shape != "ratio" or _moves(cfg))


def _clips(cfg: Config) -> bool:
    of = cfg.objective
    return (of.clip_responses and _moves(cfg)) or (of.clip_refinements and _clips_refined(cfg))


def _clips_above(cfg: Config) -> bool:
    """Whether the upper clip can act: an importance ratio may exceed 1 + clip_high, a probability never does."""
    of, ratios = cfg.objective, ("ratio", "ratio_to_sampler")
    refined = of.clip_refinements and _clips_refined(cfg) and of.refined_shape in ratios
    return refined or (of.clip_responses and _moves(cfg))


TRAINS, ROLLS_OUT, RL = "method=rl or sft", "method=rl or generate", "method=rl"
REFINED = "refinements: method=rl or generate, refine.trigger other than never"
REFINES = f"{REFINED}, and a refine.refiner that is a model"
LOCAL = "refine.critique=local or refine.refiner=local, with refinements"
EVALUATES = "method=eval, or eval.every above 0 in training"
HELD_OUT = "eval.every above 0, and eval.source or no eval.tasks"

TABLE = (
    Row("", lambda cfg: True, "method seed model.path model.dtype model.random_init model.thinking model.rope_theta "
        "model.max_positions data.on_bad_row data.max_prompt_tokens texts.task sampling.max_new_tokens mesh.data "
        "mesh.fsdp mesh.tensor"),
    Row("a model.path of the hub", lambda cfg: _hub_model(cfg.model.path), "model.revision"),
    Row("a method other than eval, which reads eval.tasks", lambda cfg: cfg.method != "eval", "data.source"),
    Row("a data.source of the hub or a generated one, and a method other than eval",
        lambda cfg: cfg.method != "eval" and local_file(cfg.data.source) is None, "data.split"),
    Row("a data.source of the hub, and a method other than eval",
        lambda cfg: cfg.method != "eval" and _of_the_hub(cfg.data.source), "data.revision"),
    Row("a data.source with rows, and a method other than eval",
        lambda cfg: cfg.method != "eval" and not generated(cfg.data.source),
        "data.question_column data.answer_column"),
    Row("rows that are graded by their answer, and not by reward.fn", _by_mathematics, "data.grader"),
    Row("method=rl or generate, or an eval.source in training", _own_scores, "reward.fn"),
    Row("reward.fn", lambda cfg: _own_scores(cfg) and bool(cfg.reward.fn), "reward.seconds"),
    Row("several functions in reward.fn", lambda cfg: _own_scores(cfg) and "," in cfg.reward.fn, "reward.correct_by"),
    Row("scores other than 0 and 1: reward.fn, or reasoning_gym", lambda cfg: _fractions(cfg) and _own_scores(cfg),
        "reward.correct_at"),
    Row("scores other than 0 and 1 from reasoning_gym; what reward.fn returns is the reward whatever it is, and the "
        "verdict of self_eval",
        lambda cfg: _fractions(cfg) and not cfg.reward.fn and not _critic(lambda c: c.scores)(cfg), "reward.partial"),
    Row("a critic that is a model, or generate.rows=critiques",
        lambda cfg: _critic(lambda c: c.is_model)(cfg)
        or (cfg.method == "generate" and cfg.generate.rows == "critiques"), "texts.critique"),
    Row(REFINES, _refines, "refine.critique refine.critique_fn refine.inverted refine.context "
        "refine.max_prompt_tokens texts.refinement"),
    Row(ROLLS_OUT, _rolls_out, "sampling.temperature train.samples refine.trigger"),
    Row(f"{ROLLS_OUT}, and sampling.temperature above 0",
        lambda cfg: _rolls_out(cfg) and cfg.sampling.temperature > 0, "sampling.top_k sampling.top_p"),
    Row("something that is sampled: method=rl, generate or eval, or eval.every above 0", _samples,
        "sampling.stop sampler.kv_cache_mb sampler.tensor sampler.rings sampler.prefills verifier.workers "
        "verifier.cpu_seconds verifier.memory_mb"),
    Row(REFINED, _has_refined, "refine.refiner refine.k"),
    Row("refine.critique=function", _by("function"), "refine.critique_seconds"),
    Row("a critic that is sampled here", _critic(lambda c: c.sampled), "refine.critique_tokens"),
    Row("refine.critique=self_gt, api or local", _critic(lambda c: c.accepts), "refine.critique_accept"),
    Row("a critic that is a model and may try again", _critic(lambda c: c.retries),
        "refine.critique_tries"),
    Row("a critic that may have nothing to say", _critic(lambda c: c.falls_back),
        "refine.critique_fallback"),
    Row(f"{RL}, and several refinements of a problem to select from",
        lambda cfg: _trains_refined(cfg) and _refines(cfg), "refine.select refine.own_group"),
    Row(f"{RL}, and {REFINED}", _trains_refined, "refine.group objective.baseline objective.refined_shape"),
    Row("method=generate", lambda cfg: cfg.method == "generate", "generate.rows"),
    Row("refine.critique=api", _by("server"), "api.base_url api.model api.key_variable api.reference api.concurrent "
        "api.seconds api.retries api.tokens api.temperature api.top_p api.price_read api.price_written"),
    Row("refine.critique=api with prices", lambda cfg: _by("server")(cfg)
        and cfg.api.price_read + cfg.api.price_written > 0, "api.spend_cap"),
    Row(LOCAL, asks_local, "local.path local.thinking local.temperature"),
    Row(f"{LOCAL}, and a local.path of the hub", lambda cfg: asks_local(cfg) and _hub_model(cfg.local.path),
        "local.revision"),
    Row("refine.critique=local", _by("second"), "local.reference"),
    Row(f"{LOCAL}, and local.temperature above 0", lambda cfg: asks_local(cfg) and cfg.local.temperature > 0,
        "local.top_p"),
    Row("refinements that are trained on, and objective.refined_shape=shaped",
        lambda cfg: _trains_refined(cfg) and cfg.objective.refined_shape == "shaped", "objective.gamma"),
    Row("a clip that can bind: several train.updates_per_rollout (in a single one each ratio of a response is 1), or "
        "refinements that are clipped", _clips, "objective.clip_eps"),
    Row("a ratio above 1 that is clipped: several train.updates_per_rollout (in a single one each is 1), or "
        "refined_shape=ratio_to_sampler", _clips_above, "objective.clip_high"),
    Row("several train.updates_per_rollout: in a single one each ratio is 1", _moves, "objective.clip_responses"),
    Row("refinements that are trained on by a shape that may leave the clip", _clips_refined,
        "objective.clip_refinements"),
    Row(RL, lambda cfg: cfg.method == "rl", "objective.weights objective.aggregation objective.divide_by_std "
        "objective.kl_coef objective.entropy_coef objective.overlong objective.correction "
        "train.updates_per_rollout train.replacements"),
    Row(f"{RL} and objective.kl_coef above 0", lambda cfg: cfg.method == "rl" and cfg.objective.kl_coef > 0,
        "objective.kl_limit"),
    Row(f"{RL} and objective.entropy_coef above 0", lambda cfg: cfg.method == "rl" and cfg.objective.entropy_coef > 0,
        "objective.entropy_mean"),
    Row(f"{RL} and objective.correction=token or sequence",
        lambda cfg: cfg.method == "rl" and cfg.objective.correction != "none", "objective.correction_limit"),
    Row(TRAINS, _trains, "optimizer.learning_rate optimizer.schedule optimizer.warmup_updates optimizer.b2 "
        "optimizer.weight_decay optimizer.clip_norm train.micro_batch train.remat "
        "train.tracker eval.every checkpoint.every checkpoint.keep checkpoint.best"),
    Row("optimizer.schedule=cosine", lambda cfg: _trains(cfg) and cfg.optimizer.schedule == "cosine",
        "optimizer.final_fraction"),
    Row("a method other than eval", lambda cfg: cfg.method != "eval", "train.steps train.prompts train.accept_changes"),
    Row("eval.every above 0 in training", lambda cfg: _trains(cfg) and cfg.eval.every > 0, "eval.source"),
    Row(f"{HELD_OUT}; of the hub", lambda cfg: _holds_out(cfg) and bool(cfg.eval.source)
        and _of_the_hub(cfg.eval.source), "eval.revision"),
    Row(f"{HELD_OUT}; of the hub or generated",
        lambda cfg: _holds_out(cfg) and local_file(_held_out_source(cfg)) is None, "eval.split"),
    Row(EVALUATES, _evaluates, "eval.tasks eval.problems eval.samples eval.temperature"),
    Row(f"{EVALUATES}, and eval.temperature above 0", lambda cfg: _evaluates(cfg) and cfg.eval.temperature > 0,
        "eval.top_p"),
)  # fmt: skip


def _of_a_method(values: dict[str, Any]) -> Iterator[str]:
    """Keys that a named method has set, all of whose settings hold: nobody set them one by one."""
    for settings in METHODS.values():
        if all(values[key] == value for key, value in settings.items()):
            yield from settings


def without_effect(cfg: Config) -> list[str]:
    """What is not its default and has no effect in this run: a line for each condition that is not met."""
    values, default = flat(dataclasses.asdict(cfg)), flat(dataclasses.asdict(Config()))
    changed = {key for key, value in values.items() if value != default[key]} - set(_of_a_method(values))
    lines = []
    for row in TABLE:
        idle = [f"{key} = {values[key]!r}" for key in row.keys.split() if key in changed]
        if idle and not row.holds(cfg):
            lines.append(f"without effect: {', '.join(idle)}; needed for that: {row.needs}")
    return lines
