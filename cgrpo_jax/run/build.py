"""Makes a `Run` from a configuration and the devices: models, mesh, and everything static in the jitted update."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.config import Config, asks_local, longest_prompt, rows_per_group, samples_refinements, stop_texts
from cgrpo_jax.config.options import MeshConfig, SamplingConfig, generated
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.learning.packing import BinSize, Terms, bin_size, shares_prompts
from cgrpo_jax.learning.update import Learner, TrainState, abstract_state
from cgrpo_jax.model import sharding
from cgrpo_jax.model.splash import attend_by_splash
from cgrpo_jax.run.checks import check, check_local
from cgrpo_jax.run.folders import model_folder, shape_folder, widened
from cgrpo_jax.run.models import Found, Load, Model, opened, outlined
from cgrpo_jax.sampling.pool import setup_for
from cgrpo_jax.sampling.room import Room, room_for, row_devices, unfit


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same over a run and decides which programs are compiled. It holds no weights and no data.

    A run that is only planned has no tokenizers, and its devices may be those of a topology that is not here.
    """

    cfg: Config
    mesh: Mesh
    policy: Model
    second: Model | None  # of `local.*`, where it is asked for critiques or refinements
    learner: Learner
    evaluation: SamplingConfig  # how the policy's tokens are drawn in evaluations
    share_prompts: bool  # in the update's bins, see packing.shares_prompts

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""
        return abstract_state(self.learner, self.mesh, self.policy.abstract_weights(self.policy.trained))


def compute_dtype(name: str, device: jax.Device) -> DTypeLike:
    """bfloat16 where the device computes in it (TPU, GPU from compute capability 8.0), float32 elsewhere."""
    if name != "auto":
        return jnp.dtype(name)
    if device.platform == "gpu":
        native = float(getattr(device, "compute_capability", 0)) >= 8.0
    else:
        native = device.platform == "tpu"
    return jnp.dtype(jnp.bfloat16 if native else jnp.float32)


def _room(cfg: Config, found: Found, mesh: Mesh, prompt: int, dtype: DTypeLike) -> Room:
    """How many rows an engine's KV cache holds. Raises ConfigError where the memory or the given sizes hold none."""
    new = cfg.sampling.max_new_tokens
    room = room_for(found.shape, mesh, cfg.sampler, prompt + new, prompt, dtype)
    if wrong := unfit(room, row_devices(mesh), prompt, new):
        raise ConfigError(wrong)
    if not room.rows:
        raise ConfigError(
            f"sampler.kv_cache_mb = {cfg.sampler.kv_cache_mb:g} does not hold one row of {prompt + new} tokens and a "
            f"prompt of {prompt} on each device"
        )
    return room


def _load_of_policy(cfg: Config, evaluation: SamplingConfig) -> Load:
    """The longest prompt, the number of requests and the ways of sampling that a run asks of the policy's engine."""
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
    own_mesh = sharding.reshaped(mesh, cfg.sampler.tensor)

    def model(section: str, found: Found, sampling: SamplingConfig, load: Load) -> Model:
        room = _room(cfg, found, own_mesh, load.prompt_tokens, dtype)
        eos_ids, stop = (found.reader.eos_ids, found.reader.stopping) if found.reader else ((), None)
        setup = setup_for(found.shape, own_mesh, room, cfg.seed, dtype, eos_ids, stop)
        return Model(section, *found, mesh, setup, sampling, load)

    made = model("model", policy, cfg.sampling, _load_of_policy(cfg, evaluation))
    if cfg.model.random_init:
        made = dataclasses.replace(made, seed=cfg.seed)
    if second is None:
        return made, None
    of_local = dataclasses.replace(cfg.sampling, temperature=cfg.local.temperature, top_k=0, top_p=cfg.local.top_p)
    load = Load(longest_prompt(cfg), cfg.train.prompts * cfg.train.samples, (of_local,))
    return made, dataclasses.replace(model("local", second, of_local, load), trained=sharding.no_leaf)


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
        **({"attend": attend_by_splash} if platform == "tpu" else {}),
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

    See `open_run`.
    """
    policy = outlined(widened(shape_folder(cfg.model.path), cfg.model))
    second = outlined(shape_folder(cfg.local.path, "local.path")) if asks_local(cfg) else None
    return _run(cfg, policy, second, devices)


def whole_mesh() -> Mesh:
    """A mesh of all devices with the default axes."""
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

    found = size(min(longest, cfg.data.max_prompt_tokens))
    largest = size(cfg.data.max_prompt_tokens)
    return (found, largest) if generated(cfg.data.source) and found != largest else (found,)


def terms(cfg: Config) -> Terms:
    """Which terms the loss of a run has."""
    if cfg.method == "sft":
        return Terms(ce=True, sampler=False)
    by_likelihood = cfg.objective.refined_shape == "log_probability"
    return Terms(ce=by_likelihood, ent=cfg.objective.entropy_coef > 0, kl=cfg.objective.kl_coef > 0)
