"""The whole configuration as frozen dataclasses, and the strict way from a `ConfigDict` to them.

Every default stands in the dataclass of the module that reads it. Configuration files start from `default_config` and
change what they need; an unknown key is an error that suggests the nearest, an impossible combination is refused in
one message before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from ml_collections import config_dict

from cgrpo_jax import objective, rollout
from cgrpo_jax.checkpoints import CheckpointConfig
from cgrpo_jax.critiques import CRITICS
from cgrpo_jax.data import FILE_SUFFIXES, DataConfig
from cgrpo_jax.drawing import SamplingConfig
from cgrpo_jax.evaluate import EvalConfig
from cgrpo_jax.generation import SamplerConfig
from cgrpo_jax.learner import OptimizerConfig
from cgrpo_jax.model import REMAT, ModelConfig
from cgrpo_jax.objective import ObjectiveConfig
from cgrpo_jax.rollout import RefineConfig
from cgrpo_jax.sharding import MeshConfig
from cgrpo_jax.verifier import VerifierConfig


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the keys."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Which weights to start from."""

    path: str = ""  # Hugging Face folder, hub id, or package://quickstart (the embedded model)
    revision: str = "main"  # of a hub id
    dtype: str = "auto"  # of the computation: float32 | bfloat16; auto: bfloat16 where the device has it
    random_init: bool = False  # keep configuration and tokenizer, draw fresh weights
    thinking: str = "auto"  # on | off: `enable_thinking` of the chat template (Qwen3); auto: the template's own default


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 400  # rollouts
    prompts: int = 128  # P, problems a step
    samples: int = 7  # n, responses a problem
    updates_per_rollout: int = 1  # optimizer updates, each on its own share of the problems
    # Problems at once in the gradient, each with all its rows; changes memory, not the result. 0: one a device.
    micro_batch: int = 0
    remat: str = "dots"  # | full: less memory, more time
    max_nonfinite: int = 3  # stop after so many non-finite gradients in a row


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    method: str = "rl"  # | sft: the supervised warm start | eval: no training, eval.tasks only
    seed: int = 0
    model: ModelSource = ModelSource()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    sampler: SamplerConfig = SamplerConfig()
    refine: RefineConfig = RefineConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    verifier: VerifierConfig = VerifierConfig()
    mesh: MeshConfig = MeshConfig()


# What a method changes. The dataclass defaults are Critique-GRPO as in the newest paper.
METHODS: dict[str, dict[str, Any]] = {
    "critique_grpo": {},
    "dr_grpo": {"refine.trigger": "never", "train.samples": 8},
}

CHOICES = {
    "method": ("rl", "sft", "eval"),
    "model.thinking": ("auto", "on", "off"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "data.on_bad_row": ("error", "drop"),
    "refine.trigger": rollout.TRIGGERS,
    "refine.select": rollout.SELECTIONS,
    "refine.group": rollout.GROUPS,
    "refine.critique": tuple(CRITICS),
    "objective.refined_shape": objective.SHAPES,
    "objective.weights": objective.WEIGHTS,
    "objective.aggregation": objective.AGGREGATIONS,
    "optimizer.schedule": ("constant", "cosine"),
    "train.remat": tuple(REMAT),
}
POSITIVE = (
    "sampling.max_new_tokens", "sampler.kv_cache_mb", "train.prompts", "train.samples", "train.updates_per_rollout",
    "train.micro_batch", "train.max_nonfinite", "checkpoint.every", "checkpoint.keep", "verifier.workers",
    "verifier.cpu_seconds", "verifier.memory_mb", "data.max_prompt_tokens", "refine.max_prompt_tokens",
    "optimizer.learning_rate", "optimizer.clip_norm", "objective.gamma", "eval.samples",
    "train.steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "sampling.temperature", "sampling.top_k", "eval.temperature", "eval.every", "objective.kl_coef",
    "objective.entropy_coef", "eval.problems", "optimizer.warmup_updates", "optimizer.weight_decay",
    "optimizer.final_fraction",
)  # fmt: skip
BELOW_ONE = ("objective.clip_eps", "optimizer.b1", "optimizer.b2")


def default_config(method: str = "critique_grpo") -> config_dict.ConfigDict:
    """All defaults, for a configuration file to start from."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{_nearest(method, METHODS)}")
    config = config_dict.ConfigDict(dataclasses.asdict(Config()))
    with config.ignore_type():
        config.update_from_flattened_dict(METHODS[method])
    return config


def _nearest(name: str, known: Mapping | tuple) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


T = TypeVar("T")


def _build(cls: type[T], raw: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"unknown key config.{where}{key}{_nearest(key, hints)}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{where}{key}.")  # type: ignore[arg-type]
        elif isinstance(value, bool) != (hints[key] is bool) or not isinstance(
            value, (int, float) if hints[key] is float else hints[key]
        ):
            raise ConfigError(f"config.{where}{key} = {value!r}: {hints[key].__name__} is needed")
        else:
            values[key] = float(value) if hints[key] is float else value
    return cls(**values)


def from_config_dict(raw: Mapping[str, Any]) -> Config:
    """Raises ConfigError for an unknown key or a value of another type."""
    return _build(Config, raw, "")


def lookup(cfg: Config, dotted: str) -> Any:
    value: Any = cfg
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def longest_row(cfg: Config) -> int:
    """Tokens of the longest sequence that is sampled."""
    prompt = max(cfg.data.max_prompt_tokens, cfg.refine.max_prompt_tokens if cfg.refine.trigger != "never" else 0)
    return prompt + cfg.sampling.max_new_tokens


def rows_per_group(cfg: Config) -> int:
    """G: rows trained on per problem where refinement is triggered."""
    added = cfg.refine.k if cfg.refine.trigger != "never" and cfg.refine.group == "append" else 0
    return cfg.train.samples + added


def _evaluation_faults(cfg: Config) -> list[str]:
    wrong = []
    own_file = cfg.data.source.endswith(FILE_SUFFIXES) and cfg.eval.source in ("", cfg.data.source)
    if cfg.eval.every and own_file and not cfg.eval.tasks:
        wrong.append(
            "eval.every needs eval.source or eval.tasks: a file has no split, and its rows are those of training"
        )
    if cfg.method == "eval" and not cfg.eval.tasks:
        wrong.append("method=eval needs eval.tasks: names and NAME=FILE, with commas between them")
    return wrong


def check(cfg: Config, model: ModelConfig, row_devices: int) -> None:
    """Refuses clashing or impossible values, all of them in one message.

    Args:
      row_devices: devices that share the rows of a batch (the data and fsdp axes).
    """
    wrong = []
    for key, allowed in CHOICES.items():
        if (value := lookup(cfg, key)) not in allowed:
            wrong.append(f"{key} = {value!r}{_nearest(str(value), allowed)}")
    for key in POSITIVE:
        if (value := lookup(cfg, key)) <= 0:
            wrong.append(f"{key} = {value} must be positive")
    for key in NOT_NEGATIVE:
        if not (value := lookup(cfg, key)) >= 0:
            wrong.append(f"{key} = {value} must not be negative")
    for key in BELOW_ONE:
        if not 0 <= (value := lookup(cfg, key)) < 1:
            wrong.append(f"{key} = {value} must lie in [0, 1)")
    refining = cfg.refine.trigger != "never"
    new, train = cfg.sampling.max_new_tokens, cfg.train
    wrong += _evaluation_faults(cfg)
    if refining and cfg.refine.k < 1:
        wrong.append("refine.k must be at least 1 with refinements on (refine.trigger=never turns them off)")
    if refining and cfg.refine.k > train.samples:
        wrong.append(f"refine.k = {cfg.refine.k} exceeds the train.samples = {train.samples} refinements of a problem")
    if refining and cfg.refine.group == "replace" and cfg.refine.k >= train.samples:
        wrong.append("refine.group=replace with refine.k >= train.samples leaves no response in the group")
    if refining and cfg.refine.critique == "worked" and cfg.data.source != "arithmetic":
        wrong.append("refine.critique=worked needs a task with a step checker (data.source=arithmetic)")
    if refining and cfg.refine.max_prompt_tokens <= cfg.data.max_prompt_tokens:
        wrong.append("refine.max_prompt_tokens must exceed data.max_prompt_tokens: it holds the question and more")
    for key, slots in [("data", cfg.data.max_prompt_tokens)] + [("refine", cfg.refine.max_prompt_tokens)] * refining:
        if slots + new > model.max_positions:
            wrong.append(
                f"{key}.max_prompt_tokens {slots} + sampling.max_new_tokens {new} exceeds the model's "
                f"{model.max_positions} positions"
            )
    updates = max(1, train.updates_per_rollout)
    if train.prompts % updates:
        wrong.append(f"train.updates_per_rollout = {updates} does not divide {train.prompts} prompts")
    elif (share := train.prompts // updates) % max(1, train.micro_batch):
        wrong.append(f"train.micro_batch = {train.micro_batch} does not divide the {share} problems of an update")
    if train.micro_batch % row_devices:
        wrong.append(f"train.micro_batch = {train.micro_batch} is no multiple of the {row_devices} devices of the rows")
    if cfg.objective.aggregation == "token_mean" and cfg.objective.weights != "uniform":
        wrong.append("objective.aggregation=token_mean weights all tokens alike: it needs objective.weights=uniform")
    if cfg.method == "sft" and (cfg.eval.every or train.updates_per_rollout != 1):
        wrong.append("method=sft has no evaluation and one update a step: eval.every=0, train.updates_per_rollout=1")
    if cfg.sampling.temperature <= 0 and cfg.method == "rl":
        wrong.append("sampling.temperature must be positive: training needs samples")
    if not 0 < cfg.sampling.top_p <= 1 or not 0 < cfg.eval.top_p <= 1:
        wrong.append("top_p must lie in (0, 1]")
    if model.heads % model.kv_heads:
        wrong.append(f"the model's {model.heads} heads are no multiple of its {model.kv_heads} key/value heads")
    if wrong:
        raise ConfigError("\n  ".join(["the configuration cannot be run:", *wrong]))
