"""From a configuration to the parts of a run: model folder, tokenizer, mesh, initial parameters."""

from __future__ import annotations

import dataclasses
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.checks import check
from cgrpo_jax.config import Config, ConfigError, longest_prompt
from cgrpo_jax.learning.update import LearnerConfig
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.decoder import ModelConfig, Params, init_params
from cgrpo_jax.model.hf_config import CheckpointError, config_from_hf
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.queue import Generator, rows_that_fit
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.workdir.checkpoints import check_finite

PACKAGE = "package://"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts that stay the same over a run."""

    cfg: Config
    folder: pathlib.Path  # Hugging Face folder of the initial model
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    learner: LearnerConfig
    generator: Generator


def model_folder(path: str, revision: str = "main") -> pathlib.Path:
    """A local Hugging Face folder for a path, a hub id, or `package://NAME`. Downloads only what is safe to read."""
    if path.startswith(PACKAGE):
        return pathlib.Path(__file__).parent / path.removeprefix(PACKAGE)
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not path or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise CheckpointError(f"model.path = {path!r}: no such folder; give a Hugging Face folder or a hub id")
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise CheckpointError(
            f"model.path = {path!r}: no such folder, and not to be had from the hub ({line})"
        ) from error


def compute_dtype(name: str) -> DTypeLike:
    """bfloat16 where the device computes in it (TPU, GPU from compute capability 8.0), float32 elsewhere."""
    if name != "auto":
        return jnp.dtype(name)
    device = jax.devices()[0]
    if device.platform == "gpu":
        native = float(getattr(device, "compute_capability", 0)) >= 8.0
    else:
        native = device.platform == "tpu"
    return jnp.dtype(jnp.bfloat16 if native else jnp.float32)


def open_run(cfg: Config) -> Run:
    """Reads model configuration and tokenizer and checks the whole configuration; loads no weights yet."""
    folder = model_folder(cfg.model.path, cfg.model.revision)
    model = config_from_hf(folder)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_divides(mesh, hf.abstract_params(model))
    if model.kv_heads % mesh.shape["tensor"]:
        raise ConfigError(f"mesh.tensor = {mesh.shape['tensor']} does not divide the {model.kv_heads} key/value heads")
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.train.micro_batch == 0:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch=row_devices))
    check(cfg, model)
    tokenizer = Tokenizer(folder, cfg.model.thinking)
    if (largest := max(*tokenizer.hf.get_vocab().values(), *tokenizer.eos_ids)) >= model.vocab:
        raise CheckpointError(f"{folder}: the tokenizer has id {largest}, the model's vocab_size is {model.vocab}")
    dtype = compute_dtype(cfg.model.dtype)
    longest = longest_prompt(cfg) + cfg.sampling.max_new_tokens
    rows = rows_that_fit(model, mesh, cfg.sampler, longest, dtype)
    if not rows:
        budget = f"sampler.kv_cache_mb = {cfg.sampler.kv_cache_mb:g}"
        raise ConfigError(f"{budget} does not hold one row of {longest} tokens on each device")
    return Run(
        cfg=cfg,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        learner=LearnerConfig(
            model=model,
            objective=cfg.objective,
            optimizer=cfg.optimizer,
            temperature=cfg.sampling.temperature,
            loss_constant=float(cfg.sampling.max_new_tokens),
            total_updates=cfg.train.steps * cfg.train.updates_per_rollout,
            dtype=dtype,
            remat=cfg.train.remat,
        ),
        generator=Generator(
            model, mesh, tokenizer.eos_ids, cfg.seed, rows, dtype, programs.unrolls(jax.default_backend())
        ),
    )


def initial_params(run: Run) -> Params:
    """float32 parameters on the mesh, streamed from the folder or drawn fresh.

    Raises:
      CheckpointError: the folder cannot be read, or a parameter holds a NaN or an infinity.
    """
    if not run.cfg.model.random_init:
        params = hf.load_params(
            run.folder, run.model, lambda path, _: sharding.param_sharding(run.mesh, path), jnp.float32
        )
        check_finite(str(run.folder), params)
        return params
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: sharding.param_sharding(run.mesh, sharding.path_of(path)), hf.abstract_params(run.model)
    )
    init = jax.jit(lambda key: init_params(run.model, key), out_shardings=shardings)
    return init(jax.random.key(run.cfg.seed))
