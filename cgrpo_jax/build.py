"""From a configuration to the parts of a run: model folder, tokenizer, mesh, initial parameters."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.checks import check, check_local
from cgrpo_jax.config import (
    Config,
    ConfigError,
    asks_local,
    longest_prompt,
    rows_per_group,
    samples_refinements,
    stop_texts,
)
from cgrpo_jax.data.sources import GYM
from cgrpo_jax.learning.packing import BinSize, Terms, bin_size, shares_prompts
from cgrpo_jax.learning.update import Learner, TrainState, make_optimizer, state_shardings
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.attention import attend
from cgrpo_jax.model.decoder import ModelConfig, Params, init_params
from cgrpo_jax.model.hf_config import CheckpointError, config_from_hf
from cgrpo_jax.model.splash import attend_by_splash, attend_own_heads
from cgrpo_jax.options import MeshConfig, SamplingConfig
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.engine import Engine, Weights, weights_of
from cgrpo_jax.sampling.pool import EngineSetup
from cgrpo_jax.sampling.room import room_for, row_devices, unfit
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.widening import widened
from cgrpo_jax.workdir.checkpoints import check_finite, with_shardings
from cgrpo_jax.workdir.places import expanded

PACKAGE = "package://"


@dataclasses.dataclass(frozen=True)
class Outline:
    """What decides the programs of a run: all but weights, tokenizer and data."""

    cfg: Config
    model: ModelConfig
    mesh: Mesh
    learner: Learner
    sampler: EngineSetup
    share_prompts: bool  # in the update's bins, see packing.shares_prompts
    local: EngineSetup | None  # of the second model, where one is asked


class Spoken(NamedTuple):
    """A model as it reads and writes."""

    folder: pathlib.Path  # of Hugging Face
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Run(Outline):
    """The parts that stay the same over a run."""

    folder: pathlib.Path  # Hugging Face folder of the initial model
    tokenizer: Tokenizer
    second: Spoken | None  # the second model (`local`), where one is asked


def _run_of(folder: pathlib.Path) -> pathlib.Path | None:
    """The workdir that a folder is, or lies in as a checkpoint; an Orbax folder of weights; None for all else."""
    if any(folder.glob("*.safetensors")):
        return None
    if folder.name.isdigit() and folder.parent.name == "checkpoints":
        return folder.parent.parent
    if folder.name == "checkpoints":
        return folder.parent
    return folder if (folder / "checkpoints").is_dir() or (folder / "params").is_dir() else None


def model_folder(path: str, revision: str = "main", key: str = "model.path") -> pathlib.Path:
    """A local Hugging Face folder for a path, a hub id, or `package://NAME`. Downloads only what is safe to read.

    Args:
      key: of the configuration, for errors.
    """
    if path.startswith(PACKAGE):
        return pathlib.Path(__file__).parent / path.removeprefix(PACKAGE)
    folder = expanded(path)
    if path.strip() and folder.is_dir():
        if run := _run_of(folder):
            raise CheckpointError(
                f"{key} = {path!r} is of a run or of Orbax, not a Hugging Face folder: "
                f"python -m cgrpo_jax.convert --from={run} --to=hf --out={run}_model writes one"
            )
        return folder.absolute()
    if not path.strip() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise CheckpointError(
            f"{key} = {path!r}: no such folder; give a Hugging Face folder or a hub id "
            f"(--config.{key}={PACKAGE}quickstart is the embedded model)"
        )
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise CheckpointError(f"{key} = {path!r}: no such folder, and not to be had from the hub ({line})") from error


def shape_folder(path: str, key: str = "model.path") -> pathlib.Path:
    """The folder of a `config.json` for a key such as `model.path`, without asking the hub.

    Raises:
      CheckpointError: neither a folder nor the name of a model whose shape the package carries; names those.
    """
    if path.startswith(PACKAGE) or (path.strip() and expanded(path).is_dir()):
        return model_folder(path, key=key)
    shapes = pathlib.Path(__file__).parent / "shapes"
    name = re.sub(r"[-.]", "_", path.rpartition("/")[2].lower())
    name = re.sub(r"_(base|instruct|\d{4})", "", name)
    if name and (shapes / name / "config.json").is_file():
        return shapes / name
    carried = ", ".join(sorted(folder.name for folder in shapes.iterdir()))
    raise CheckpointError(
        f"{key} = {path!r}: no such folder, and no shape of that name; give a folder with a config.json, or one "
        f"of {carried}"
    )


def shape_of(cfg: Config) -> ModelConfig:
    """The model of `model.path`, which need not be here: of a folder's `config.json`, or one in the package."""
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


def _sampler_setup(
    cfg: Config, model: ModelConfig, eos_ids: tuple[int, ...], mesh: Mesh, dtype: DTypeLike, platform: str
) -> EngineSetup:
    """How a model is sampled from. Raises ConfigError where the memory or the sizes that are given hold nothing."""
    prompt, sampler_mesh = longest_prompt(cfg), sharding.reshaped(mesh, cfg.sampler.tensor)
    room = room_for(model, sampler_mesh, cfg.sampler, prompt + cfg.sampling.max_new_tokens, prompt, dtype)
    if wrong := unfit(room, row_devices(sampler_mesh), prompt, cfg.sampling.max_new_tokens):
        raise ConfigError(wrong)
    if not room.rows:
        raise ConfigError(
            f"sampler.kv_cache_mb = {cfg.sampler.kv_cache_mb:g} does not hold one row of "
            f"{prompt + cfg.sampling.max_new_tokens} tokens and a prompt of {prompt} on each device"
        )
    unrolled = programs.unrolls(platform)
    forms: dict[str, Any] = {
        "stacked_cache": not programs.unrolls_cache(platform),
        "attend": attend_own_heads if platform == "tpu" else attend,
    }
    return EngineSetup(model, sampler_mesh, eos_ids, cfg.seed, room, dtype, unrolled, **forms)


Shape = tuple[ModelConfig, tuple[int, ...]]  # a model, and its end-of-sequence ids


def outline(
    cfg: Config, shape: Shape, devices: Sequence[jax.Device] | None = None, local: Shape | None = None
) -> Outline:
    """Checks the whole configuration; needs no tokenizer and no file of the model.

    Args:
      devices: real ones or those of a topology; None: all there are.
      local: the second model, where one is asked.
    """
    model, eos_ids = shape
    devices = jax.devices() if devices is None else devices
    mesh, platform = sharding.make_mesh(cfg.mesh, devices), devices[0].platform
    check(cfg, model)
    dtype = compute_dtype(cfg.model.dtype, devices[0])
    learner = Learner(
        model=model,
        objective=cfg.objective,
        optimizer=cfg.optimizer,
        temperature=1.0 if cfg.method == "sft" else cfg.sampling.temperature,  # a likelihood has none
        total_updates=cfg.train.steps * cfg.train.updates_per_rollout,
        dtype=dtype,
        remat=cfg.train.remat,
        logit_entries=1 << (27 if platform == "tpu" else 24),
        attend=attend_by_splash if platform == "tpu" else attend,
    )
    setup = _sampler_setup(cfg, model, eos_ids, mesh, dtype, platform)
    second = None
    if local is not None:
        check_local(cfg, local[0])
        second = _sampler_setup(cfg, *local, mesh, dtype, platform)
    return Outline(cfg, model, mesh, learner, setup, shares_prompts(platform), second)


def _opened(folder: pathlib.Path, thinking: str, stops: Sequence[str]) -> tuple[Shape, Tokenizer]:
    """Model configuration and tokenizer of a folder."""
    model = config_from_hf(folder)
    tokenizer = Tokenizer(folder, thinking, stops)
    if (largest := max(*tokenizer.hf.get_vocab().values(), *tokenizer.eos_ids)) >= model.vocab:
        raise CheckpointError(f"{folder}: the tokenizer has id {largest}, the model's vocab_size is {model.vocab}")
    if largest + 1 < model.vocab:  # a padded vocabulary, such as Qwen's 151,936 for 151,669 ids
        model = dataclasses.replace(model, vocab_used=largest + 1)
    return (model, tokenizer.eos_ids), tokenizer


def open_run(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Run:
    """Reads model configuration and tokenizer and checks the whole configuration; loads no weights. See `outline`."""
    folder = widened(model_folder(cfg.model.path, cfg.model.revision), cfg.model)
    shape, tokenizer = _opened(folder, cfg.model.thinking, stop_texts(cfg))
    local_shape, second = None, None
    if asks_local(cfg) and cfg.local.path.strip():  # that it is named is checked with the rest
        of_local = model_folder(cfg.local.path, cfg.local.revision, "local.path")
        local_shape, local_tokenizer = _opened(of_local, cfg.local.thinking, stop_texts(cfg))
        second = Spoken(of_local, local_tokenizer)
    made = outline(cfg, shape, devices, local_shape)
    parts = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    parts["sampler"] = dataclasses.replace(made.sampler, stop=tokenizer.stopping)
    if made.local is not None and second is not None:
        parts["local"] = dataclasses.replace(made.local, stop=second.tokenizer.stopping)
    return Run(**parts, folder=folder, tokenizer=tokenizer, second=second)


def outline_of_shape(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Outline:
    """The outline of a model that need not be here: a local folder's `config.json`, else one that the package carries.

    Ids that the tokenizer does not have are not known, and count as drawn.
    """
    local = (config_from_hf(shape_folder(cfg.local.path, "local.path")), ()) if asks_local(cfg) else None
    return outline(cfg, (shape_of(cfg), ()), devices, local)


def whole_mesh() -> Mesh:
    """All devices, with the default axes."""
    return sharding.make_mesh(MeshConfig(), jax.devices())


def bin_sizes(run: Outline, longest: int) -> tuple[BinSize, ...]:
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


def _loaded(folder: pathlib.Path, model: ModelConfig, mesh: Mesh) -> Params:
    params = hf.load_params(folder, model, functools.partial(sharding.param_sharding, mesh), jnp.float32)
    check_finite(str(folder), params)
    return params


def local_weights(run: Run) -> Weights | None:
    """What the engine of the second model reads; None where none is asked.

    Raises:
      CheckpointError: the folder cannot be read, or a parameter holds a NaN or an infinity.
    """
    if run.local is None or run.second is None:
        return None
    return weights_of(run.local, _loaded(run.second.folder, run.local.model, run.mesh))


def engines(run: Run, params: Params, second: Weights | None, step: int) -> list[Engine]:
    """Those of a rollout: the policy's, and where a second model is asked that one's.

    Args:
      second: of `local_weights`.
    """
    own = [Engine(run.sampler, weights_of(run.sampler, params), step, run.cfg.sampling)]
    if run.local is None or second is None:
        return own
    return [*own, Engine(run.local, second, step, local_sampling(run.cfg))]


def local_sampling(cfg: Config) -> SamplingConfig:
    """How the second model's tokens are drawn."""
    return SamplingConfig(cfg.local.temperature, 0, cfg.local.top_p, cfg.sampling.max_new_tokens, cfg.sampling.stop)


def initial_params(run: Run) -> Params:
    """float32 parameters on the mesh, streamed from the folder or drawn fresh.

    Raises:
      CheckpointError: the folder cannot be read, or a parameter holds a NaN or an infinity.
    """
    if not run.cfg.model.random_init:
        return _loaded(run.folder, run.model, run.mesh)
    shardings = sharding.param_shardings(run.mesh, hf.abstract_params(run.model))
    init = jax.jit(lambda key: init_params(run.model, key), out_shardings=shardings)
    return init(jax.random.key(run.cfg.seed))


def abstract_state(run: Outline) -> TrainState:
    """Shapes, dtypes and shardings of the train state."""
    params = hf.abstract_params(run.model, jnp.float32)
    tx = make_optimizer(run.learner.optimizer, run.learner.total_updates)
    state = TrainState(params, jax.eval_shape(tx.init, params))
    return with_shardings(state, state_shardings(run.learner, run.mesh, params))
