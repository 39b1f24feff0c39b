"""The whole configuration, and the strict way from a `ConfigDict` to it. Imports no jax.

Configuration files start from `default_config` and change what they need; an unknown key is an error that suggests the
nearest.

In: files, flags, ConfigDicts. Out: a frozen `Config`, whose options stand in `options`.
May import: errors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from ml_collections import config_dict

from cgrpo_jax.config.critics import CRITICS, Critic
from cgrpo_jax.config.names import unknown
from cgrpo_jax.config.options import (
    ApiConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LocalConfig,
    MeshConfig,
    ModelSource,
    ObjectiveConfig,
    OptimizerConfig,
    RefineConfig,
    RewardConfig,
    SamplerMemory,
    SamplingConfig,
    TextsConfig,
    TrainConfig,
    VerifierConfig,
    nearest,
    option,
)
from cgrpo_jax.config.secrecy import public_url, secrets_of, without
from cgrpo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    # rl | sft: learns the texts of data.source | generate: writes such texts | eval: no training, eval.tasks only
    method: str = option("rl", choices=("rl", "sft", "generate", "eval"))
    seed: int = option(0, at_least=0, at_most=2**32 - 1)
    model: ModelSource = ModelSource()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    texts: TextsConfig = TextsConfig()
    sampling: SamplingConfig = SamplingConfig()
    sampler: SamplerMemory = SamplerMemory()
    refine: RefineConfig = RefineConfig()
    generate: GenerateConfig = GenerateConfig()
    api: ApiConfig = ApiConfig()
    local: LocalConfig = LocalConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    verifier: VerifierConfig = VerifierConfig()
    mesh: MeshConfig = MeshConfig()


UNCLIPPED = {"objective.clip_responses": False, "objective.clip_refinements": False}
RELEASE = UNCLIPPED | {
    "refine.trigger": "always",
    "refine.group": "replace",
    "refine.select": "correct_first",
    "train.samples": 8,
    "train.updates_per_rollout": 2,
    "objective.weights": "sum",
    "objective.divide_by_std": True,
    "objective.entropy_coef": 0.001,
    "objective.entropy_mean": "token_mean",
    "objective.kl_limit": 10.0,
}
GENERATE = {"method": "generate", "train.samples": 8}
# What a method changes. The dataclass defaults are Critique-GRPO as in the newest paper. What a paper leaves open is
# said in configs/README.md.
METHODS: dict[str, dict[str, Any]] = {
    "critique_grpo": {},
    # arXiv 2506.03106 v1 to v5: every response is refined, nothing is clipped
    "critique_grpo_v1": {"refine.trigger": "always"} | UNCLIPPED,
    # The authors' release with its defects mended: its group of 8, selection, scale, entropy and k3
    "critique_grpo_code": RELEASE,
    # R1-GRPO: advantages over the standard deviation, each response's own mean, a KL penalty
    "grpo": {
        "refine.trigger": "never",
        "train.samples": 8,
        "objective.weights": "uniform",
        "objective.aggregation": "sequence_mean",
        "objective.divide_by_std": True,
        "objective.kl_coef": 0.001,
    },
    # Appendix H: the policy criticises itself, and is shown the ground truth
    "self_critique": {"refine.critique": "self_gt"},
    "dr_grpo": {"refine.trigger": "never", "train.samples": 8},
    # The release's critic `text`: gpt-4o is shown the data's solution, of wrong attempts only, and whatever it writes
    # counts; api.base_url and api.model say where it is
    "critique_grpo_text": RELEASE
    | {
        "refine.critique": "api",
        "refine.critique_accept": "any",
        "refine.critique_fallback": "indicative_gt",
        "texts.critique": "cgrpo_jax.text.prompts:release_critique_messages",
        "api.reference": "solution",
        "api.tokens": 4096,
        "api.seconds": 30.0,
    },
    # arXiv 2504.14945: 7 responses and a trace of the data in each group, p/(p+0.1), union mean, no std, no clip
    "luffy": UNCLIPPED
    | {
        "refine.trigger": "always",
        "refine.refiner": "target",
        "train.updates_per_rollout": 2,
        "objective.weights": "sum",
        "objective.entropy_coef": 0.001,
        "objective.entropy_mean": "token_mean",
    },
    # arXiv 2603.04597: all wrong attempts in one prompt; the second group is trained on beside the first (`credit`)
    "golf": {
        "refine.context": "together",
        "refine.own_group": True,
        "refine.group": "replace",
        "train.samples": 8,
        "objective.weights": "uniform",
        "objective.clip_refinements": False,
    },
    # arXiv 2602.02482: all refinements by A0 log pi(y1 | q), A0 = R(y1) - mean R(y0), no ratio
    "rltf_sd": {
        "refine.trigger": "always",
        "refine.k": 8,
        "train.samples": 8,
        "objective.refined_shape": "log_probability",
        "objective.baseline": "responses",
    },
    # Weak to strong: refinements by a second model (local.path), from critiques with the ground truth
    "weak_to_strong": {"refine.refiner": "local", "local.temperature": 1.0, "local.top_p": 1.0},
    # The supervised baselines. Each but sft writes WORKDIR/rows.jsonl, which sft then learns (generating.py).
    "sft": {"method": "sft", "train.samples": 1, "refine.trigger": "never"},
    "raft": {"method": "generate", "train.samples": 8, "refine.trigger": "never"},
    "refinement_ft": GENERATE | {"refine.trigger": "any_wrong", "generate.rows": "refinements"},
    "citl_ft": GENERATE | {"refine.trigger": "any_wrong", "generate.rows": "both"},
    # one response a question, as in Critique-FT; a server criticises it
    "critique_ft": GENERATE
    | {
        "train.samples": 1,
        "refine.trigger": "always",
        "refine.k": 0,
        "refine.critique": "api",
        "generate.rows": "critiques",
    },
    # the policy is a checkpoint of `grpo`; what it never solves in 8 responses is refined
    "grpo_then_refinement_sft": GENERATE | {"generate.rows": "refinements"},
}


def default_config(method: str = "critique_grpo") -> config_dict.ConfigDict:
    """All defaults, for a configuration file to start from."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{nearest(method, METHODS)}")
    config = config_dict.ConfigDict(dataclasses.asdict(Config()))
    with config.ignore_type():
        config.update_from_flattened_dict(METHODS[method])
    return config


def keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Dotted names of all options."""
    found: list[str] = []
    for name, kind in get_type_hints(cls).items():
        found += keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [f"{prefix}{name}"]
    return found


T = TypeVar("T")


def _build(cls: type[T], raw: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"unknown key config.{where}{key}; {unknown(f'{where}{key}', keys())}")
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


def stop_texts(cfg: Config) -> tuple[str, ...]:
    """The texts of sampling.stop; () where it is no list of texts in JSON, which `checks` refuses."""
    try:
        texts = json.loads(cfg.sampling.stop, strict=False)  # a line break may stand for itself
    except ValueError:
        return ()
    good = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    return tuple(texts) if good else ()


def samples_refinements(cfg: Config) -> bool:
    """Whether a model is asked for refinements, and critics for critiques."""
    return cfg.refine.trigger != "never" and cfg.refine.refiner != "target"


def critic_of(cfg: Config) -> Critic:
    """The critic of a run; the default's record where the name is none, which `options.faults` refuses."""
    return CRITICS.get(cfg.refine.critique) or CRITICS[RefineConfig().critique]


def reference_of(cfg: Config) -> str:
    """What the critic is shown beside question and attempt, of critics.REFERENCES."""
    critic = critic_of(cfg)
    return getattr(cfg, critic.name).reference if critic.shown is None else critic.shown


def fallback(cfg: Config) -> str:
    """What stands in for a critique that does not count, see `Critic.fallback`."""
    return critic_of(cfg).fallback(cfg.refine.critique_fallback, reference_of(cfg))


def shows_truth(cfg: Config) -> bool:
    """Whether a critique may need the ground truth of a problem."""
    falls_back = critic_of(cfg).falls_back and fallback(cfg) == "indicative_gt"
    return samples_refinements(cfg) and (reference_of(cfg) != "none" or falls_back)


def public(cfg: Config) -> dict[str, Any]:
    """The configuration as nested dicts for files, logs and trackers: without keys and passwords."""
    tree = dataclasses.asdict(cfg)
    tree["api"]["base_url"] = public_url(cfg.api.base_url)
    return without(secrets_of(cfg.api.base_url, cfg.api.key_variable), tree)


def longest_prompt(cfg: Config) -> int:
    """Tokens of the longest prompt that is sampled from."""
    return max(cfg.data.max_prompt_tokens, cfg.refine.max_prompt_tokens if samples_refinements(cfg) else 0)


def asks_local(cfg: Config) -> bool:
    """Whether a second model is sampled from."""
    asked = critic_of(cfg).by == "second" or cfg.refine.refiner == "local"
    return asked and samples_refinements(cfg) and cfg.method in ("rl", "generate")


def rows_per_group(cfg: Config) -> int:
    """G: rows trained on per problem where refinement is triggered; in method=sft a problem is a row."""
    if cfg.method == "sft":
        return 1
    added = cfg.refine.k if cfg.refine.trigger != "never" and cfg.refine.group == "append" else 0
    return cfg.train.samples + added
