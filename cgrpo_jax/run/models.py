"""A language model of a run as one record: the policy, and the second model of `local.*`.

The record says what the model is, where its weights come from and how it is sampled from. It holds no arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cgrpo_jax.config.options import SamplingConfig
from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.decoder import ModelConfig, Params, init_params
from cgrpo_jax.model.hf_config import config_from_hf
from cgrpo_jax.model.sharding import Which, every_leaf, part_of
from cgrpo_jax.sampling.engine import Engine, Weights, weights_of
from cgrpo_jax.sampling.pool import EngineSetup
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.workdir.checkpoints import check_finite
from cgrpo_jax.workdir.digests import tree_digest


class Found(NamedTuple):
    """What is known of a model from its folder, without its weights."""

    folder: pathlib.Path  # of Hugging Face, or one with nothing but a config.json
    shape: ModelConfig
    reader: Tokenizer | None  # None: the model is only planned


class Load(NamedTuple):
    """What the sampler of a model is asked for in a run. It decides which programs the sampler may need."""

    prompt_tokens: int  # of the longest prompt
    requests: int  # that may be asked for at the same time
    samplings: tuple[SamplingConfig, ...]  # all the ways in which tokens are drawn; (): it is never sampled from


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model of a run."""

    section: str  # of the configuration, `model` or `local`
    folder: pathlib.Path  # of Hugging Face: the initial weights, the tokenizer, the configuration
    shape: ModelConfig
    reader: Tokenizer | None  # None: the model is only planned
    mesh: Mesh  # on which the parameters lie
    sampler: EngineSetup
    sampling: SamplingConfig  # how tokens are drawn in a rollout
    load: Load
    seed: int | None = None  # from which the initial weights are drawn; None: they are read from `folder`
    trained: Which = every_leaf  # the parameters that the run trains

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. A model that is only planned has none."""
        assert self.reader is not None, f"the {self.section} of a plan has no tokenizer"
        return self.reader

    def frozen(self, path: str) -> bool:
        """Whether the run leaves a parameter as it is, so that the initial one is that of every step."""
        return not self.trained(path)

    def weights(self, chosen: Which = every_leaf) -> Params:
        """The initial parameters. See `initial_weights`."""
        return initial_weights(self.folder, self.shape, self.mesh, self.seed, chosen)

    def abstract_weights(self, chosen: Which = every_leaf) -> Params:
        """Shapes, dtypes and shardings of `weights`."""
        params = part_of(hf.abstract_params(self.shape), chosen)
        return sharding.with_shardings(params, sharding.param_shardings(self.mesh, params))

    def synced(self) -> Weights:
        """The initial parameters in the dtype and layout of the model's engine."""
        return weights_of(self.sampler, self.weights())

    def engine(self, weights: Weights, step: int, sampling: SamplingConfig | None = None) -> Engine:
        """The engine of a step.

        Args:
          sampling: how tokens are drawn; None: as in a rollout.
        """
        return Engine(self.sampler, weights, step, sampling or self.sampling)

    def engine_of(self, params: Params, step: int, sampling: SamplingConfig | None = None) -> Engine:
        """As `engine`, from all parameters of the model."""
        return self.engine(weights_of(self.sampler, params), step, sampling)

    def engines(self, params: Params, second: Model | None, weights: Weights | None, step: int) -> list[Engine]:
        """The engines of a rollout: of this model, the policy, and where a second model is asked that of this one.

        Args:
          params: all parameters of the policy.
          weights: what the second model's engine reads (`synced`).
        """
        own = self.engine_of(params, step)
        return [own, second.engine(weights, step)] if second and weights else [own]


def initial_weights(
    folder: pathlib.Path, shape: ModelConfig, mesh: Mesh, seed: int | None = None, chosen: Which = every_leaf
) -> Params:
    """Parameters in float32 as a run begins with them, each device with its own part.

    Args:
      seed: from which they are drawn; None: they are read from `folder`.
      chosen: the parameters that are wanted.

    Raises:
      CheckpointError: the folder cannot be read, or a parameter holds a NaN or an infinity.
    """
    if seed is None:
        params = hf.load_params(folder, shape, functools.partial(sharding.param_sharding, mesh), jnp.float32, chosen)
        check_finite(str(folder), params)
        return params
    shardings = sharding.param_shardings(mesh, hf.abstract_params(shape))
    init = jax.jit(functools.partial(init_params, shape), out_shardings=shardings)
    return part_of(init(jax.random.key(seed)), chosen)


def check_frozen(path: str, frozen: Params, digest: str) -> None:
    """Raises CheckpointError where the frozen parameters are not those that a run began with.

    Args:
      path: `model.path`, from which they were read.
      digest: of what the run began with, `frozen_digest`.
    """
    if frozen_digest(frozen) != digest:
        raise CheckpointError(
            f"model.path = {path!r}: not the weights this run began with, and those that it does not train are in no "
            "checkpoint; give those"
        )


def frozen_digest(frozen: Params) -> str:
    """The digest of the parameters that a run does not train; "" where it trains all."""
    return tree_digest(frozen) if frozen else ""


def outlined(folder: pathlib.Path) -> Found:
    """The model of a folder with nothing but a `config.json`.

    Which ids its tokenizer has is not known, so all count as ids that may be drawn.
    """
    return Found(folder, config_from_hf(folder), None)


def opened(folder: pathlib.Path, thinking: str, stops: Sequence[str]) -> Found:
    """The model of a Hugging Face folder with its tokenizer.

    Args:
      thinking: as `model.thinking`.
      stops: texts that end a response.

    Raises:
      CheckpointError: the folder's files cannot be read, or do not belong to each other.
    """
    shape, tokenizer = config_from_hf(folder), Tokenizer(folder, thinking, stops)
    if (largest := max(*tokenizer.hf.get_vocab().values(), *tokenizer.eos_ids)) >= shape.vocab:
        raise CheckpointError(f"{folder}: the tokenizer has id {largest}, the model's vocab_size is {shape.vocab}")
    if largest + 1 < shape.vocab:  # a padded vocabulary, such as Qwen's 151,936 for 151,669 ids
        shape = dataclasses.replace(shape, vocab_used=largest + 1)
    return Found(folder, shape, tokenizer)
