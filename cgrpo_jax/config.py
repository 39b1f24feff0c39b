"""The whole configuration, and the strict way from a `ConfigDict` to it. Imports no jax.

Configuration files start from `default_config` and change what they need; an unknown key is an error that suggests the
nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from ml_collections import config_dict

from cgrpo_jax.options import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelSource,
    ObjectiveConfig,
    OptimizerConfig,
    RefineConfig,
    SamplerMemory,
    SamplingConfig,
    TrainConfig,
    VerifierConfig,
    nearest,
    option,
)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the keys."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    # rl | sft: the supervised warm start | eval: no training, eval.tasks only
    method: str = option("rl", choices=("rl", "sft", "eval"))
    seed: int = option(0, at_least=0, at_most=2**32 - 1)
    model: ModelSource = ModelSource()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    sampler: SamplerMemory = SamplerMemory()
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


def default_config(method: str = "critique_grpo") -> config_dict.ConfigDict:
    """All defaults, for a configuration file to start from."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{nearest(method, METHODS)}")
    config = config_dict.ConfigDict(dataclasses.asdict(Config()))
    with config.ignore_type():
        config.update_from_flattened_dict(METHODS[method])
    return config


T = TypeVar("T")


def _build(cls: type[T], raw: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"unknown key config.{where}{key}{nearest(key, hints)}")
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


def longest_prompt(cfg: Config) -> int:
    """Tokens of the longest prompt that is sampled from."""
    return max(cfg.data.max_prompt_tokens, cfg.refine.max_prompt_tokens if cfg.refine.trigger != "never" else 0)


def rows_per_group(cfg: Config) -> int:
    """G: rows trained on per problem where refinement is triggered."""
    added = cfg.refine.k if cfg.refine.trigger != "never" and cfg.refine.group == "append" else 0
    return cfg.train.samples + added
