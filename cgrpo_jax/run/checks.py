"""What must hold between several options, and between options and model, before anything is compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cgrpo_jax.config import Config, critic_of, samples_refinements, stop_texts
from cgrpo_jax.config.critics import CRITICS
from cgrpo_jax.config.options import RefineConfig, faults
from cgrpo_jax.data.files import local_file
from cgrpo_jax.data.tasks import parse_names
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.grading.functions import deciding
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.sampling.room import fixed_sizes

Faults = Iterator[tuple[str, str]]  # what is wrong, and the option that mends it, to be pasted; "": none does


def holds_out(cfg: Config) -> bool:
    """Whether a tenth of the training file is kept for evaluation, as it has no split and no other source is named."""
    trained = cfg.method in ("rl", "sft") and local_file(cfg.data.source) is not None
    return bool(trained and cfg.eval.every and not cfg.eval.source and not cfg.eval.tasks)


def _evaluation(cfg: Config) -> Faults:
    same = local_file(cfg.data.source) is not None and cfg.eval.source == cfg.data.source and cfg.method != "generate"
    if cfg.eval.every and same:
        trained = f"eval.source = {cfg.eval.source!r} is the file that is trained on"
        yield f"{trained}; without it a tenth of its questions is held out", "eval.source="
    if cfg.method == "eval" and not cfg.eval.tasks:
        yield "method=eval needs eval.tasks: names and NAME=FILE, with commas between them", "eval.tasks=math500"


def _best(cfg: Config) -> Faults:
    best = cfg.checkpoint.best
    if not best:
        return
    if cfg.method not in ("rl", "sft") or not cfg.eval.every:
        needed = "needs evaluations in training: method=rl or sft, and eval.every > 0"
        yield f"checkpoint.best = {best!r} {needed}", "checkpoint.best="
        return
    tasks = [f"eval/{name}" for name, _ in parse_names(cfg.eval.tasks)]
    known = [f"{name}/pass@1" for name in (["eval"] if cfg.eval.source or not tasks else []) + tasks]
    if best not in known:
        none = "no evaluation ranks checkpoints by it; there is"
        yield f"checkpoint.best = {best!r}: {none} {', '.join(known)}", f"checkpoint.best={known[0]}"


def _refinement(cfg: Config) -> Faults:
    refine, samples = cfg.refine, cfg.train.samples
    by_sampler, local = cfg.objective.refined_shape == "ratio_to_sampler", refine.refiner == "local"
    shape, shaped = "objective.refined_shape=ratio_to_sampler", "objective.refined_shape=shaped"
    if refine.trigger == "never":
        return
    if refine.k < (0 if cfg.method == "generate" and cfg.generate.rows == "critiques" else 1):
        yield "refine.k must be at least 1, or refine.trigger=never", "refine.k=1"
    if refine.k > samples:
        exceeds = f"exceeds the train.samples = {samples} refinements of a problem"
        yield f"refine.k = {refine.k} {exceeds}", f"refine.k={samples}"
    if refine.group == "replace" and refine.k >= samples:
        none = "refine.group=replace with refine.k >= train.samples leaves no response in the group"
        yield none, "refine.group=append"
    if refine.refiner == "target":
        if refine.k > 1:
            yield f"refine.k = {refine.k}: refine.refiner=target has one trace for each problem", "refine.k=1"
        if by_sampler:
            yield f"{shape}: nobody sampled what refine.refiner=target takes", shaped
        return
    if local and refine.own_group:
        own = "refine.own_group trains under the prompt of a refinement: refiner=local's is not the policy's"
        yield own, "refine.own_group=false"
    if local and by_sampler:
        yield f"{shape}: refine.refiner=local is not sampled from the policy", shaped
    if refine.own_group and refine.context != "together":
        together = "refine.own_group needs refine.context=together: refinements of one prompt are a group"
        yield together, "refine.context=together"
    if refine.max_prompt_tokens <= (question := cfg.data.max_prompt_tokens):
        more = "refine.max_prompt_tokens must exceed data.max_prompt_tokens: it holds the question and more"
        yield more, f"refine.max_prompt_tokens={max(4 * question, 4)}"
    yield from _critic(cfg)


def _critic(cfg: Config) -> Faults:
    refine, critic, new = cfg.refine, critic_of(cfg), cfg.sampling.max_new_tokens
    named, usual = f"refine.critique={critic.name}", RefineConfig()
    if refine.inverted and not critic.judges:
        yield f"refine.inverted turns a verdict round: {named} has none", "refine.inverted=false"
    if refine.critique_accept == "any" and critic.is_model and not critic.accepts:
        own = f"refine.critique_accept=any: {named} has a rule of its own"
        yield own, f"refine.critique_accept={usual.critique_accept}"
    if (critic.by == "function") != bool(refine.critique_fn):
        both = "refine.critique=function and refine.critique_fn=package.module:function need each other"
        yield both, "refine.critique=function" if refine.critique_fn else "refine.critique_fn=MODULE:FUNCTION"
    if critic.sampled and refine.critique_tokens > new:
        exceeds = f"exceeds sampling.max_new_tokens = {new}: a critique is sampled in the same rows"
        yield f"refine.critique_tokens = {refine.critique_tokens} {exceeds}", f"refine.critique_tokens={new}"
    if (critic.by == "second" or refine.refiner == "local") and not cfg.local.path.strip():
        needed = "refine.critique=local and refine.refiner=local need the second model: local.path"
        yield needed, "local.path=FOLDER"
    if critic.by == "task" and cfg.data.source != "arithmetic":
        checker = f"{named} needs a task with a step checker (data.source=arithmetic)"
        yield checker, f"refine.critique={usual.critique}"


def _objective(cfg: Config) -> Faults:
    limit = cfg.objective.correction_limit
    if 0 < limit <= 1:
        above = f"objective.correction_limit = {limit:g}: above 1, or 0 for the default"
        yield above, "objective.correction_limit=0"
    if cfg.objective.aggregation == "token_mean" and cfg.objective.weights != "uniform":
        alike = "objective.aggregation=token_mean weights all tokens alike: it needs objective.weights=uniform"
        yield alike, "objective.weights=uniform"


def _training(cfg: Config) -> Faults:
    updates, prompts, stop = max(1, cfg.train.updates_per_rollout), cfg.train.prompts, cfg.sampling.stop
    if prompts % updates:
        undivided = f"train.updates_per_rollout = {updates} does not divide {prompts} prompts"
        yield undivided, f"train.prompts={-(-prompts // updates) * updates}"
    if cfg.method == "sft" and cfg.data.source.startswith("reasoning_gym:"):
        texts = "method=sft learns the texts of a file or hub set (or arithmetic): a generated task has none"
        yield texts, "data.source=arithmetic"
    if cfg.method == "sft" and cfg.train.updates_per_rollout != 1:
        yield "method=sft has one update a step: train.updates_per_rollout=1", "train.updates_per_rollout=1"
    if cfg.reward.correct_at > 1 and not cfg.reward.fn:
        most = f"reward.correct_at = {cfg.reward.correct_at:g}: a grader gives 1 at most; only reward.fn gives more"
        yield most, "reward.correct_at=1"
    if stop and not stop_texts(cfg):
        yield f"sampling.stop = {stop!r}: a list of texts in JSON is needed", """sampling.stop='["\\nQuestion:"]'"""
    if cfg.sampling.temperature <= 0 and cfg.method == "rl":
        yield "sampling.temperature must be positive: training needs samples", "sampling.temperature=1"


def _generation(cfg: Config) -> Faults:
    rows = cfg.generate.rows
    if cfg.method != "generate" or rows == "responses":
        return
    if not samples_refinements(cfg):
        asked = f"generate.rows = {rows!r} needs what a model refines: refine.trigger not never, refiner not target"
        yield asked, "generate.rows=responses"
    elif rows == "critiques" and cfg.refine.inverted:
        none = "generate.rows=critiques keeps those whose verdict is the rule's: refine.inverted leaves none"
        yield none, "refine.inverted=false"
    elif rows == "critiques" and not critic_of(cfg).concludes:
        concluding = ", ".join(critic.name for critic in CRITICS.values() if critic.concludes)
        needed = "generate.rows=critiques needs critiques that end in a verdict"
        yield f"{needed}: refine.critique of {concluding}", "refine.critique=self_gt"


def _model(cfg: Config, model: ModelConfig) -> Faults:
    new, positions = cfg.sampling.max_new_tokens, model.max_positions
    refining = samples_refinements(cfg)
    for key, slots in [("data", cfg.data.max_prompt_tokens)] + [("refine", cfg.refine.max_prompt_tokens)] * refining:
        if slots > (room := positions - new):
            both = f"{key}.max_prompt_tokens {slots} + sampling.max_new_tokens {new}"
            mend = f"{key}.max_prompt_tokens={room}" if room > 0 else f"sampling.max_new_tokens={positions // 4}"
            yield f"{both} exceeds the model's {positions} positions", mend
    if model.heads % model.kv_heads:
        yield f"the model's {model.heads} heads are no multiple of its {model.kv_heads} key/value heads", ""


def _refused(cfg: Config) -> Faults:
    """Faults that a function of its own finds and words."""
    try:
        deciding(cfg.reward)
    except ValueError as error:
        yield str(error), ""
    try:
        fixed_sizes(cfg.sampler)
    except ValueError as error:
        yield str(error), ""


def check_local(cfg: Config, model: ModelConfig) -> None:
    """Raises ConfigError where the second model's context window is too short for what it would be asked."""
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
    rules = (_evaluation, _best, _refinement, _objective, _training, _generation, _refused)
    found = itertools.chain(*(rule(cfg) for rule in rules), _model(cfg, model) if model else ())
    wrong = faults(cfg) + [f"{what} (--config.{mend})" if mend else what for what, mend in found]
    if wrong:
        separator = "\n  " if len(wrong) > 1 else " "  # a single one is a line
        raise ConfigError(separator.join(["the configuration cannot be run:", *wrong]))
