"""From a configuration and devices to a run: its models, the mesh, and what is static in its updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.config import (
    Config,
    ConfigError,
    asks_local,
    longest_prompt,
    rows_per_group,
    samples_refinements,
    stop_texts,
)
from cgrpo_jax.config.options import MeshConfig, SamplingConfig
from cgrpo_jax.data.sources import GYM
from cgrpo_jax.learning.packing import BinSize, Terms, bin_size, shares_prompts
from cgrpo_jax.learning.update import Learner, TrainState, make_optimizer, state_shardings
from cgrpo_jax.model import sharding
from cgrpo_jax.model.attention import attend
from cgrpo_jax.model.decoder import ModelConfig, Params
from cgrpo_jax.model.hf_config import config_from_hf
from cgrpo_jax.model.splash import attend_by_splash, attend_own_heads
from cgrpo_jax.model.trees import no_leaf, part_of
from cgrpo_jax.run.checks import check, check_local
from cgrpo_jax.run.folders import model_folder, shape_folder, widened
from cgrpo_jax.run.models import Found, Load, Model, opened
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.engine import Engine, Weights, weights_of
from cgrpo_jax.sampling.pool import EngineSetup
from cgrpo_jax.sampling.room import room_for, row_devices, unfit
from cgrpo_jax.workdir.checkpoints import with_shardings


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same over a run. It decides the programs, and is known without weights and data.

    A run that is only planned has no tokenizers, and its devices may be those of a topology that is not here.
    """

    cfg: Config
    mesh: Mesh
    policy: Model
    second: Model | None  # of `local.*`, where it is asked for critiques or refinements
    learner: Learner
    evaluation: SamplingConfig  # how the policy's tokens are drawn in evaluations
    share_prompts: bool  # in the update's bins, see packing.shares_prompts


def shape_of(cfg: Config) -> ModelConfig:
    """The shape of `model.path`, which need not be here: of a folder's `config.json`, or of one in the package."""
    return config_from_hf(widened(shape_folder(cfg.model.path), cfg.model))


def compute_dtype(name: str, device: jax.Device) -> DTypeLike:
    """bfloat16 where the device computes in it (TPU, GPU from compute capability 8.0), float32 elsewhere."""
    if name != "auto":
        return jnp.dtype(name)
    if device.platform == "gpu":
        native = float(getattr(device, "compute_capability", 0)) >= 8.0
    else:
        native = device.platform == "tpu"
    return jnp.dtype(jnp.bfloat16 if native else jnp.float32)


def _sampler_setup(cfg: Config, found: Found, mesh: Mesh, load: Load, dtype: DTypeLike) -> EngineSetup:
    """How a model is sampled from. Raises ConfigError where the memory or the sizes that are given hold nothing."""
    sampler_mesh, platform = sharding.reshaped(mesh, cfg.sampler.tensor), mesh.devices.flat[0].platform
    prompt, new = load.prompt_tokens, cfg.sampling.max_new_tokens
    room = room_for(found.shape, sampler_mesh, cfg.sampler, prompt + new, prompt, dtype)
    if wrong := unfit(room, row_devices(sampler_mesh), prompt, new):
        raise ConfigError(wrong)
    if not room.rows:
        raise ConfigError(
            f"sampler.kv_cache_mb = {cfg.sampler.kv_cache_mb:g} does not hold one row of {prompt + new} tokens and a "
            f"prompt of {prompt} on each device"
        )
    unrolled, reader = programs.unrolls(platform), found.reader
    forms: dict[str, Any] = {
        "stacked_cache": not programs.unrolls_cache(platform),
        "attend": attend_own_heads if platform == "tpu" else attend,
        "stop": reader.stopping if reader else None,
    }
    eos_ids = reader.eos_ids if reader else ()
    return EngineSetup(found.shape, sampler_mesh, eos_ids, cfg.seed, room, dtype, unrolled, **forms)


def _load_of_policy(cfg: Config, evaluation: SamplingConfig) -> Load:
    """What a run asks of the policy, in rollouts and in evaluations."""
    requests = cfg.train.prompts * cfg.train.samples
    if cfg.eval.every or cfg.method == "eval":
        sets = 1 + len([name for name in cfg.eval.tasks.split(",") if name.strip()])
        requests = max(requests, sets * (cfg.eval.problems or 1 << 20) * cfg.eval.samples)
    evaluates = cfg.method == "eval" or (cfg.eval.every and cfg.method != "generate")
    samplings = [cfg.sampling] * (cfg.method in ("rl", "generate")) + [evaluation] * bool(evaluates)
    return Load(longest_prompt(cfg), requests, tuple(samplings))


def _models(
    cfg: Config, policy: Found, second: Found | None, mesh: Mesh, evaluation: SamplingConfig, dtype: DTypeLike
) -> tuple[Model, Model | None]:
    def model(section: str, found: Found, sampling: SamplingConfig, load: Load) -> Model:
        setup = _sampler_setup(cfg, found, mesh, load, dtype)
        return Model(section, *found, mesh, setup, sampling, load)

    made = model("model", policy, cfg.sampling, _load_of_policy(cfg, evaluation))
    if cfg.model.random_init:
        made = dataclasses.replace(made, seed=cfg.seed)
    if second is None:
        return made, None
    of_local = dataclasses.replace(cfg.sampling, temperature=cfg.local.temperature, top_k=0, top_p=cfg.local.top_p)
    load = Load(longest_prompt(cfg), cfg.train.prompts * cfg.train.samples, (of_local,))
    return made, dataclasses.replace(model("local", second, of_local, load), trained=no_leaf)


def _run(cfg: Config, policy: Found, second: Found | None, devices: Sequence[jax.Device] | None) -> Run:
    """Checks the whole configuration; see `open_run`."""
    devices = jax.devices() if devices is None else devices
    mesh, platform = sharding.make_mesh(cfg.mesh, devices), devices[0].platform
    check(cfg, policy.shape)
    if second is not None:
        check_local(cfg, second.shape)
    dtype = compute_dtype(cfg.model.dtype, devices[0])
    learner = Learner(
        model=policy.shape,
        objective=cfg.objective,
        optimizer=cfg.optimizer,
        temperature=1.0 if cfg.method == "sft" else cfg.sampling.temperature,  # a likelihood has none
        total_updates=cfg.train.steps * cfg.train.updates_per_rollout,
        dtype=dtype,
        remat=cfg.train.remat,
        logit_entries=1 << (27 if platform == "tpu" else 24),
        attend=attend_by_splash if platform == "tpu" else attend,
    )
    evaluation = SamplingConfig(cfg.eval.temperature, 0, cfg.eval.top_p, cfg.sampling.max_new_tokens)
    models = _models(cfg, policy, second, mesh, evaluation, dtype)
    return Run(cfg, mesh, *models, learner, evaluation, shares_prompts(platform))


def open_run(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Run:
    """Reads configuration and tokenizer of the models and checks the whole configuration; reads no weights.

    Args:
      devices: that the run computes on; None: all there are.

    Raises:
      ConfigError, CheckpointError, MeshError: values that are impossible, or do not fit the model or the devices.
    """
    stops, second = stop_texts(cfg), None
    folder = widened(model_folder(cfg.model.path, cfg.model.revision), cfg.model)
    policy = opened(folder, cfg.model.thinking, stops)
    if asks_local(cfg) and cfg.local.path.strip():  # that it is named is checked with the rest
        second = opened(model_folder(cfg.local.path, cfg.local.revision, "local.path"), cfg.local.thinking, stops)
    return _run(cfg, policy, second, devices)


def plan_run(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Run:
    """The run of models of which nothing but a `config.json` is here, in a local folder or in the package.

    Ids that the tokenizer does not have are not known then, and count as ids that may be drawn. See `open_run`.
    """
    second = None
    if asks_local(cfg):
        folder = shape_folder(cfg.local.path, "local.path")
        second = Found(folder, config_from_hf(folder), None)
    return _run(cfg, Found(shape_folder(cfg.model.path), shape_of(cfg), None), second, devices)


def whole_mesh() -> Mesh:
    """All devices, with the default axes."""
    return sharding.make_mesh(MeshConfig(), jax.devices())


def bin_sizes(run: Run, longest: int) -> tuple[BinSize, ...]:
    """The bins of a run's updates, the smallest first; the last one holds every problem that the configuration allows.

    Args:
      longest: tokens of the longest prompt that was found in the data. A generated task may bring a longer one later.
    """
    cfg = run.cfg

    own_group = cfg.refine.own_group and samples_refinements(cfg)  # then a problem has two prompts with rows

    def size(prompt: int) -> BinSize:
        return bin_size(
            share=run.share_prompts,
            problems=cfg.train.prompts // cfg.train.updates_per_rollout * (2 if own_group else 1),
            group=rows_per_group(cfg),
            at_once=cfg.train.micro_batch,
            row_devices=row_devices(run.mesh),
            longest_prompt=max(prompt, cfg.refine.max_prompt_tokens) if own_group else prompt,
            longest_ids=cfg.sampling.max_new_tokens,
        )

    generated = cfg.data.source == "arithmetic" or cfg.data.source.startswith(GYM)
    found = size(min(longest, cfg.data.max_prompt_tokens))
    largest = size(cfg.data.max_prompt_tokens)
    return (found, largest) if generated and found != largest else (found,)


def terms(cfg: Config) -> Terms:
    """What the loss of a run is made of."""
    if cfg.method == "sft":
        return Terms(ce=True, sampler=False)
    by_likelihood = cfg.objective.refined_shape == "log_probability"
    return Terms(ce=by_likelihood, ent=cfg.objective.entropy_coef > 0, kl=cfg.objective.kl_coef > 0)


def evaluation_engine(run: Run, params: Params, step: int) -> Engine:
    """The policy's engine of an evaluation at a step, from all of its parameters."""
    return run.policy.engine(weights_of(run.policy.sampler, params), step, run.evaluation)


def engines(run: Run, params: Params, second: Weights | None, step: int) -> list[Engine]:
    """The engines of a rollout: that of the policy, and where a second model is asked that of this one.

    Args:
      params: all parameters of the policy.
      second: what the second model's engine reads (`Model.synced`).
    """
    of_policy = run.policy.engine(weights_of(run.policy.sampler, params), step)
    return [of_policy, run.second.engine(second, step)] if run.second and second else [of_policy]


def abstract_state(run: Run) -> TrainState:
    """Shapes, dtypes and shardings of the train state."""
    params = part_of(run.policy.abstract_weights(), run.policy.trained)
    tx = make_optimizer(run.learner.optimizer, run.learner.total_updates)
    state = TrainState(params, jax.eval_shape(tx.init, params))
    return with_shardings(state, state_shardings(run.learner, run.mesh, params))
