"""The optax update: log-probabilities of the trained tokens, gradients accumulated inside jit, donated state."""

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

from cgrpo_jax.learning import objective
from cgrpo_jax.model import sharding
from cgrpo_jax.model.decoder import ModelConfig, Params, forward, init_cache, logits
from cgrpo_jax.options import ObjectiveConfig, OptimizerConfig

Array = jax.Array | Any  # device arrays, or numpy before `put_batch`
LOGIT_ENTRIES = 1 << 24  # of one chunk of logits [rows, time, V]: 64 MB in float32


class TrainState(NamedTuple):
    """Everything an update changes. `opt_state` also counts updates and non-finite gradients."""

    params: Params
    opt_state: optax.OptState


class Batch(NamedTuple):
    """Rows of one update (numpy on the host, then device arrays), micro-batches on the first axis.

    A micro-batch holds Q problems and B = Q G rows, G for each problem in turn. A prompt stands once: its keys and
    values serve all rows of the problem. Prompts are left-padded, responses right-padded, as in the sampler.
    """

    prompt_AQT: Array  # int32
    start_AQ: Array  # int32: slot of the first prompt token
    response_ABT: Array  # int32
    length_AB: Array  # int32: response tokens; 0 in rows that only fill the batch
    adv_AB: Array  # float32
    weight_AB: Array  # float32: within the group
    refined_AB: Array  # bool
    sampler_logp_ABT: Array  # float32; compared with the trainer's own, never in the loss
    groups: Array  # float32 scalar: problems in this update
    old_logp_ABT: Array | None = None  # the trainer's own, where there are several updates per rollout
    ref_logp_ABT: Array | None = None  # of the reference policy, where there is a KL term


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """All that is static in the update."""

    model: ModelConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    temperature: float  # of the sampler: log-probabilities are those of the distribution that was sampled
    loss_constant: float  # what the token sum is divided by (aggregation "constant"): max_new_tokens
    total_updates: int  # length of the schedule
    dtype: DTypeLike
    remat: str  # a key of model.REMAT


def make_optimizer(cfg: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Global-norm clip, AdamW, schedule; a non-finite gradient changes nothing and is counted in the state."""
    peak = cfg.learning_rate
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total_updates - cfg.warmup_updates), cfg.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    ramp = lambda count: peak * (count + 1) / (cfg.warmup_updates + 1)
    schedule = optax.join_schedules([ramp, after], [cfg.warmup_updates])
    decays = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: sharding.path_of(path).endswith(("kernel", "embedding")), params
    )
    adamw = optax.adamw(schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=decays)
    never = jnp.iinfo(jnp.int32).max  # the training loop stops long before
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw), never)


def state_shardings(cfg: LearnerConfig, mesh: Mesh, params: Params) -> TrainState:
    """The optimizer's moments lie where their parameters lie; scalars are replicated."""
    tx = make_optimizer(cfg.optimizer, cfg.total_updates)
    of_params = sharding.param_shardings(mesh, params)
    of_state = optax.tree_utils.tree_map_params(
        tx,
        lambda _, spec: spec,
        jax.eval_shape(tx.init, params),
        of_params,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
    return TrainState(of_params, of_state)


def init_state(cfg: LearnerConfig, mesh: Mesh, params: Params) -> TrainState:
    """Fresh optimizer state around (sharded) parameters."""
    tx = make_optimizer(cfg.optimizer, cfg.total_updates)
    return TrainState(params, jax.jit(tx.init, out_shardings=state_shardings(cfg, mesh, params).opt_state)(params))


def _time_chunk(rows: int, steps: int, vocab: int) -> int:
    """The largest divisor of `steps` whose logits stay within LOGIT_ENTRIES (at least 1)."""
    fits = [c for c in range(1, steps + 1) if steps % c == 0 and rows * c * vocab <= LOGIT_ENTRIES]
    return fits[-1] if fits else 1


def token_logps(
    cfg: LearnerConfig, params: Params, prompt_QT: jax.Array, start_Q: jax.Array, response_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of each response token, `[B, T]`, at the sampling temperature.

    Row b continues prompt b // (B / Q), which runs through the model once for all its rows. The head is applied to
    response positions only, a chunk of time at a time, and recomputed in the backward pass, so no [B, T, V] array
    exists.
    """
    (Q, prompt_slots), (B, response_slots) = prompt_QT.shape, response_BT.shape
    run = functools.partial(forward, cfg.model, params, dtype=cfg.dtype, remat=cfg.remat)
    cache = init_cache(cfg.model, Q, prompt_slots + response_slots, cfg.dtype)
    hidden_QTD, cache = run(prompt_QT, start_Q, cache, 0)
    cache = jax.tree.map(lambda x: jnp.repeat(x, B // Q, axis=1), cache)
    hidden_BTD, _ = run(response_BT, jnp.repeat(start_Q, B // Q), cache, prompt_slots)
    last_B1D = jnp.repeat(hidden_QTD[:, -1:], B // Q, axis=0)
    hidden_BTD, target_BT = jnp.concatenate([last_B1D, hidden_BTD[:, :-1]], axis=1), response_BT
    chunk = _time_chunk(B, response_slots, cfg.model.vocab)

    @jax.checkpoint
    def one_chunk(piece):
        hidden_BCD, target_BC = piece
        logp_BCV = jax.nn.log_softmax(logits(cfg.model, params, hidden_BCD) / cfg.temperature, axis=-1)
        logp_BC = jnp.take_along_axis(logp_BCV, target_BC[..., None], axis=-1)[..., 0]
        return logp_BC, -(jnp.exp(logp_BCV) * logp_BCV).sum(axis=-1)

    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(target_BT.shape)
    logp, entropy = jax.lax.map(one_chunk, (split(hidden_BTD), split(target_BT)))
    return join(logp), join(entropy)


def _micro_loss(params: Params, micro: Batch, cfg: LearnerConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss and metric sums of one micro-batch (no leading [A] axis)."""
    logp_BT, entropy_BT = token_logps(cfg, params, micro.prompt_AQT, micro.start_AQ, micro.response_ABT)
    mask_BT = jnp.arange(logp_BT.shape[1])[None] < micro.length_AB[:, None]
    loss_sum, sums = objective.policy_loss(
        logp_BT,
        micro.old_logp_ABT,
        micro.ref_logp_ABT,
        entropy_BT,
        mask_BT,
        micro.adv_AB,
        micro.weight_AB,
        micro.refined_AB,
        cfg.objective,
    )
    on_BT = mask_BT & ~micro.refined_AB[:, None]
    gap_BT = jnp.where(on_BT, jnp.abs(jax.lax.stop_gradient(logp_BT) - micro.sampler_logp_ABT), 0.0)
    return loss_sum, sums | {"logp_gap": gap_BT.sum(), "logp_gap_max": gap_BT.max()}


def _update(state: TrainState, batch: Batch, cfg: LearnerConfig) -> tuple[TrainState, dict[str, jax.Array]]:
    value_and_grad = jax.value_and_grad(_micro_loss, has_aux=True)
    stacked = batch._replace(groups=jnp.broadcast_to(batch.groups, batch.prompt_AQT.shape[:1]))

    def accumulate(grads, micro):
        def learn(grads):
            (loss, sums), new = value_and_grad(state.params, micro, cfg)
            return jax.tree.map(jnp.add, grads, new), sums | {"loss": loss}

        def measure(grads):
            loss, sums = _micro_loss(state.params, micro, cfg)
            return grads, sums | {"loss": loss}

        if cfg.objective.kl_coef or cfg.objective.entropy_coef:
            return learn(grads)
        # Without an advantage the gradient is exactly zero: the forward pass, for the metrics, is enough.
        return jax.lax.cond((micro.adv_AB != 0).any(), learn, measure, grads)

    grads, sums_A = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), stacked)
    sums = {name: value.max() if name.endswith("_max") else value.sum() for name, value in sums_A.items()}
    mask_ABT = jnp.arange(batch.response_ABT.shape[-1])[None, None] < batch.length_AB[..., None]
    denominator = objective.loss_denominator(mask_ABT, batch.groups, cfg.loss_constant, cfg.objective)
    grads = jax.tree.map(lambda g: g / denominator, grads)
    tx = make_optimizer(cfg.optimizer, cfg.total_updates)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    scalars = sums | {
        "denominator": denominator,
        "grad_norm": optax.tree.norm(grads),
        "notfinite_in_a_row": opt_state.notfinite_count,
        "notfinite_total": opt_state.total_notfinite,
    }
    return TrainState(optax.apply_updates(state.params, updates), opt_state), scalars


def make_update(cfg: LearnerConfig, mesh: Mesh, params: Params) -> Callable:
    """The jitted update: (state, batch) -> (state, metric sums). The state is donated."""
    out = (state_shardings(cfg, mesh, params), sharding.replicated(mesh))
    return jax.jit(functools.partial(_update, cfg=cfg), donate_argnums=0, out_shardings=out)


def make_logps(cfg: LearnerConfig, mesh: Mesh) -> Callable[[Params, Batch], jax.Array]:
    """Jitted log-probabilities `[A, B, T]` of a batch's response tokens under any parameters, without gradient."""

    def logps(params: Params, batch: Batch) -> jax.Array:
        one = lambda micro: token_logps(cfg, params, *micro)[0]
        return jax.lax.map(one, (batch.prompt_AQT, batch.start_AQ, batch.response_ABT))

    return jax.jit(logps, out_shardings=NamedSharding(mesh, P(None, ("data", "fsdp"))))


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Host arrays -> device arrays: rows over the data axes."""
    rows, whole = NamedSharding(mesh, P(None, ("data", "fsdp"))), sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.device_put(x, rows if x.ndim else whole), batch)
