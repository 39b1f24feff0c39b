"""Run by test_sharding.py in a process of its own with 8 devices: the same work on several meshes, to one .npz file."""

import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from cgrpo_jax.config.options import MeshConfig, ObjectiveConfig, OptimizerConfig, SamplingConfig
from cgrpo_jax.learning.packing import Terms, bin_size, pack
from cgrpo_jax.learning.update import Learner, init_state, make_update, put_bins
from cgrpo_jax.model import sharding
from cgrpo_jax.model.decoder import ModelConfig, init_params
from cgrpo_jax.model.hf_config import FAMILIES
from cgrpo_jax.records import Kind, Name, Request, Segment
from cgrpo_jax.rollout.stories import sample_all
from cgrpo_jax.sampling.engine import Engine, weights_of
from cgrpo_jax.sampling.pool import EngineSetup
from cgrpo_jax.sampling.room import Room, row_devices

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "1x2x1": (1, 2, 1)}
# Random schedules: whether layers are unrolled, and the axis `tensor` of the sampler's own mesh.
TRIALS = {
    "1x1x1": ((True, 0), (False, 0)),
    "8x1x1": ((True, 0),),
    "1x8x1": ((False, 0), (False, 2), (True, 4)),
    "2x2x2": ((False, 0), (True, 0)),
    "1x2x1": ((True, 0),),
}
SCALE = 2  # of the initial weights: sharper distributions
MODEL = ModelConfig(
    family="qwen3", vocab=256, width=64, mlp_width=128, layers=2, heads=4, kv_heads=2, head_dim=16, rope_theta=1e4,
    max_positions=512, **FAMILIES["qwen3"],
)  # fmt: skip


def make_params(mesh, dtype):
    params = init_params(MODEL, jax.random.key(0))
    params = jax.tree.map(lambda x: (x * SCALE if x.ndim > 1 else x).astype(dtype), params)
    return jax.device_put(params, sharding.param_shardings(mesh, params))


def tokens(mesh, params, dtype, rng, unrolled, tensor):
    """Ids of 20 requests under a random schedule: rows, room for prompts, chunk and order of admission."""
    requests = [
        Request(Name(Kind.RESPONSE, p, g), list(range(3, 3 + [1, 9, 120][p % 3])), [None, 3, 25][g % 3])
        for p in range(4)
        for g in range(5)
    ]
    mesh = sharding.reshaped(mesh, tensor)
    least = row_devices(mesh)
    room = Room(least * int(rng.choice([1, 2, 4])), least * int(rng.choice([128, 512])))
    chunk, order = int(rng.choice([3, 8, 32])), rng.permutation(len(requests))
    setup = EngineSetup(MODEL, mesh, (7,), 0, room, dtype, unrolled, chunk)
    engine = Engine(setup, weights_of(setup, params), 0, SamplingConfig(0.9, 0, 0.95, 12))
    got = sample_all(engine, [requests[i] for i in order])
    ids = np.full((len(requests), 32), -1)
    for place, i in enumerate(order):
        ids[i, : len(got[place].ids)] = got[place].ids
    return ids


def update(mesh, params, dtype, share):
    """Loss, and gradients as Adam's first moment of the first update (a tenth of them), of 8 problems of 2 rows."""
    rng = np.random.default_rng(0)

    def segment(prompt, refined):
        ids = rng.integers(0, MODEL.vocab, rng.integers(2, 9)).astype(np.int32)
        weight_T = np.full(len(ids), 1.0 / (8 * 8))
        pg_T = rng.normal() * weight_T
        return Segment(prompt, ids, refined, pg_T, 0 * weight_T, 0 * weight_T, 0 * weight_T, np.zeros(len(ids)))

    prompts = [rng.integers(0, MODEL.vocab, 3 + p).tolist() for p in range(8)]
    segments = [segment(prompt, refined) for prompt in prompts for refined in (False, True)]
    devices = row_devices(mesh)
    size = bin_size(share=share, problems=8, group=2, at_once=8, row_devices=devices, longest_prompt=10, longest_ids=8)
    bins = put_bins(mesh, pack(segments, size, Terms()))
    optimizer = OptimizerConfig(clip_norm=1e9)
    cfg = Learner(MODEL, ObjectiveConfig(), optimizer, 0.9, 10, dtype, "dots")
    params = jax.tree.map(jnp.copy, params)  # the update takes them away
    state = init_state(cfg, mesh, params)
    moments = state.opt_state.inner_state[1][0].mu
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, moments, params))
    state, sums = make_update(cfg, mesh, params)(state, {}, bins)
    assert sums["tokens"] == sum(len(segment.ids) for segment in segments)
    gradients = jax.tree.leaves(state.opt_state.inner_state[1][0].mu)
    return float(sums["loss"]), np.concatenate([np.asarray(x, np.float64).ravel() for x in gradients])


def largest_share(params):
    """The largest part of all parameters that one device holds."""
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    held = {}
    for x in jax.tree.leaves(params):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / total


if __name__ == "__main__":
    out, dtype = sys.argv[1], jnp.dtype(sys.argv[2])
    jax.config.update("jax_enable_x64", dtype == jnp.float64)
    found, rng = {}, np.random.default_rng(0)
    for name, shape in MESHES.items():
        mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
        params = make_params(mesh, dtype)
        found[f"share/{name}"] = largest_share(params)
        if dtype == jnp.float64:
            for trial, (unrolled, tensor) in enumerate(TRIALS[name]):
                found[f"tokens/{name}/{trial}"] = tokens(mesh, params, dtype, rng, unrolled, tensor)
        if name != "1x2x1":  # two devices for the tokens only
            for bins in ("shared", "own") if dtype == jnp.float64 else ("shared",):
                loss, gradient = update(mesh, params, dtype, share=bins == "shared")
                found[f"loss/{name}/{bins}"], found[f"gradient/{name}/{bins}"] = loss, gradient
    np.savez(out, **found)
