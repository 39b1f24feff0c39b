"""The optax update: gradients accumulated over bins inside jit, donated state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cgrpo_jax.learning.logprobs import token_logps
from cgrpo_jax.learning.objective import Tokens, token_loss
from cgrpo_jax.learning.packing import Bins
from cgrpo_jax.model import sharding
from cgrpo_jax.model.decoder import ModelConfig, Params
from cgrpo_jax.options import ObjectiveConfig, OptimizerConfig


class TrainState(NamedTuple):
    """Everything an update changes. `opt_state` also counts updates and non-finite gradients."""

    params: Params  # what is trained; what is frozen is handed to the update beside the state
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Learner:
    """All that is static in the update."""

    model: ModelConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    temperature: float  # of the sampler: log-probabilities are those of the distribution that was sampled
    total_updates: int  # length of the schedule
    dtype: DTypeLike
    remat: str  # a key of decoder.REMAT
    row_devices: int  # devices that share the rows of a bin


def joined(trained: Params, frozen: Params) -> Params:
    """All parameters of the model: two trees without a common leaf as one. Nothing is copied."""
    both = dict(trained)
    for name, part in frozen.items():
        both[name] = joined(both[name], part) if name in both else part
    return both


def make_optimizer(cfg: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Global-norm clip, AdamW, schedule; a non-finite gradient changes nothing and is counted in the state."""
    peak = cfg.learning_rate
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total_updates - cfg.warmup_updates), cfg.final_fraction)
    else:
        after = optax.constant_schedule(peak)

    def ramp(count: jax.Array) -> jax.Array:
        return peak * (count + 1) / (cfg.warmup_updates + 1)

    def decays(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: sharding.path_of(path).endswith(("kernel", "embedding")), params
        )

    schedule = optax.join_schedules([ramp, after], [cfg.warmup_updates])
    adamw = optax.adamw(schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=decays)
    never = jnp.iinfo(jnp.int32).max  # the training loop stops long before
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw), never)


def state_shardings(cfg: Learner, mesh: Mesh, params: Params) -> TrainState:
    """The optimizer's moments lie where their parameters lie; scalars are replicated."""
    tx = make_optimizer(cfg.optimizer, cfg.total_updates)

    def place(key_path: tuple, leaf: Any) -> NamedSharding:
        path = [part for part in key_path if isinstance(part, jax.tree_util.DictKey)]  # that of its parameter
        of_parameter = sharding.path_of(tuple(path))
        return sharding.param_sharding(mesh, of_parameter, leaf.shape) if path else sharding.replicated(mesh)

    of_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))
    return TrainState(sharding.param_shardings(mesh, params), of_state)


def make_init(cfg: Learner, mesh: Mesh, params: Params) -> Callable[[Params], optax.OptState]:
    """The jitted fresh optimizer state of (sharded) parameters."""
    tx = make_optimizer(cfg.optimizer, cfg.total_updates)
    return jax.jit(tx.init, out_shardings=state_shardings(cfg, mesh, params).opt_state)


def init_state(cfg: Learner, mesh: Mesh, params: Params) -> TrainState:
    """Fresh optimizer state around (sharded) parameters."""
    return TrainState(params, make_init(cfg, mesh, params)(params))


def _bin(bins: Bins, index: jax.Array) -> Bins:
    """One bin: every array without its leading [A]."""
    return jax.tree.map(lambda x: x[index] if x.ndim else x, bins)


def _logps(cfg: Learner, params: Params, one: Bins) -> tuple[jax.Array, jax.Array]:
    return token_logps(
        cfg.model,
        params,
        one,
        temperature=cfg.temperature,
        row_devices=cfg.row_devices,
        dtype=cfg.dtype,
        remat=cfg.remat,
    )


def _tokens(one: Bins) -> Tokens:
    return Tokens(
        scored_BT=one.scored_ABT,
        refined_BT=one.refined_ABT,
        pg_BT=one.pg_ABT,
        ce_BT=one.ce_ABT,
        ent_BT=one.ent_ABT,
        kl_BT=one.kl_ABT,
        old_logp_BT=one.old_logp_ABT,
        ref_logp_BT=one.ref_logp_ABT,
        sampler_logp_BT=one.sampler_logp_ABT,
    )


def _update(state: TrainState, frozen: Params, bins: Bins, cfg: Learner) -> tuple[TrainState, dict[str, jax.Array]]:
    def loss_of(trained: Params, one: Bins) -> tuple[jax.Array, dict[str, jax.Array]]:
        logp_BT, entropy_BT = _logps(cfg, joined(trained, frozen), one)
        loss, sums = token_loss(logp_BT, entropy_BT, _tokens(one), cfg.objective)
        return loss, sums | {"loss": jax.lax.stop_gradient(loss)}

    def accumulate(index: jax.Array, carry: tuple[Params, dict[str, jax.Array]]) -> tuple[Params, Any]:
        grads, sums = carry
        new, own = jax.grad(loss_of, has_aux=True)(state.params, _bin(bins, index))
        largest = {name: jnp.maximum(sums[name], own[name]) for name in own if name.endswith("_max")}
        return jax.tree.map(jnp.add, grads, new), jax.tree.map(jnp.add, sums, own) | largest

    _, abstract = jax.eval_shape(loss_of, state.params, _bin(bins, jnp.int32(0)))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    start = (jax.tree.map(jnp.zeros_like, state.params), nothing)
    grads, sums = jax.lax.fori_loop(0, bins.count, accumulate, start)
    tx = make_optimizer(cfg.optimizer, cfg.total_updates)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    scalars = sums | {
        "grad_norm": optax.tree.norm(grads),
        "notfinite_in_a_row": opt_state.notfinite_count,
        "notfinite_total": opt_state.total_notfinite,
    }
    return TrainState(optax.apply_updates(state.params, updates), opt_state), scalars


def make_update(cfg: Learner, mesh: Mesh, params: Params) -> Callable:
    """The jitted update: (state, frozen, bins) -> (state, metric sums). The state is donated.

    Without any bin the gradient is zero, and the optimizer does with it what it does with every gradient.
    """
    out = (state_shardings(cfg, mesh, params), sharding.replicated(mesh))
    return jax.jit(_named("update", functools.partial(_update, cfg=cfg)), donate_argnums=0, out_shardings=out)


def make_logps(cfg: Learner, mesh: Mesh) -> Callable[[Params, Bins], jax.Array]:
    """Jitted log-probabilities `[A, B, T]` of a batch's targets under any parameters, without gradient; 0 beyond."""

    def logps(params: Params, bins: Bins) -> jax.Array:
        def fill(index: jax.Array, logp_ABT: jax.Array) -> jax.Array:
            return logp_ABT.at[index].set(_logps(cfg, params, _bin(bins, index))[0])

        zero_ABT = jnp.zeros(bins.target_ABT.shape, jnp.promote_types(cfg.dtype, jnp.float32))
        return jax.lax.fori_loop(0, bins.count, fill, zero_ABT)

    return jax.jit(logps, out_shardings=NamedSharding(mesh, P(None, ("data", "fsdp"))))


def _named(name: str, function: Callable) -> Callable:
    """A partial has no name of its own; compiled programs are told apart by theirs."""
    function.__name__ = name  # type: ignore[attr-defined]
    return function


def bin_shardings(mesh: Mesh, bins: Bins) -> Bins:
    """Rows, and prompts, over the data axes."""
    rows, whole = NamedSharding(mesh, P(None, ("data", "fsdp"))), sharding.replicated(mesh)
    return jax.tree.map(lambda x: rows if x.shape else whole, bins)


def put_bins(mesh: Mesh, bins: Bins) -> Bins:
    """Host arrays -> device arrays."""
    return jax.tree.map(jax.device_put, bins, bin_shardings(mesh, bins))
