"""The sampler's own weights: parameters in another dtype and layout, made by one program, on a mesh of its own."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cgrpo_jax.model import sharding
from cgrpo_jax.model.decoder import Params, unstack


def weights_for_sampling(params: Params, *, dtype: DTypeLike, mesh: Mesh, unrolled: bool) -> Params:
    """Parameters in the dtype and layout of the sampler; what needs no change is handed on, not copied."""
    layout: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "unrolled": unrolled}
    stale = stale_weights(params, **layout)
    return params | make_sync(stale, **layout)(stale, dtype=dtype, unrolled=unrolled) if stale else params


def weights_to_prefill(params: Params, weights: Params, *, dtype: DTypeLike, mesh: Mesh) -> Params:
    """The parameters where they have dtype and layout of the sampler (arrays or abstract ones), else its weights.

    A loop over stacked layers compiles sooner.
    """
    return weights if stale_weights(params, dtype=dtype, mesh=mesh, unrolled=False) else params


def stale_weights(params: Params, *, dtype: DTypeLike, mesh: Mesh, unrolled: bool) -> Params:
    """The parts of the parameters (arrays or abstract ones) that the sampler needs in another form."""

    def differs(key_path: tuple, leaf: jax.Array) -> bool:
        moves = not leaf.sharding.is_equivalent_to(weight_sharding(mesh, key_path, leaf), leaf.ndim)
        moves |= isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh != mesh
        return leaf.dtype != dtype or moves or (unrolled and sharding.path_of(key_path).startswith("layers/"))

    changes = jax.tree_util.tree_map_with_path(differs, params)
    return {name: tree for name, tree in params.items() if jax.tree.reduce(operator.or_, changes[name])}


def weight_sharding(mesh: Mesh, key_path: tuple, leaf: Any) -> NamedSharding:
    """Where a weight of the sampler lies; its layers may be a tuple (`unstack`)."""
    one_layer = len(key_path) > 1 and isinstance(key_path[1], jax.tree_util.SequenceKey)
    names = key_path[:1] + key_path[2:] if one_layer else key_path
    spec = sharding.sampler_spec(sharding.path_of(names), (0, *leaf.shape) if one_layer else leaf.shape, mesh)
    return NamedSharding(mesh, P(*spec[1:]) if one_layer else spec)


def synced(params: Params, *, dtype: DTypeLike, unrolled: bool) -> Params:
    """The weight sync: an identity into another dtype and, by the sharding of what it returns, another layout."""
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    if unrolled and "layers" in weights:
        weights |= {"layers": unstack(weights["layers"])}
    return weights


def make_sync(params: Params, *, dtype: DTypeLike, mesh: Mesh, unrolled: bool) -> Any:
    """`synced` of parameters (arrays or abstract ones) as one program: from their mesh to the sampler's.

    Both hold the same devices in one order. Programs made for like parameters are one.
    """
    made = jax.eval_shape(functools.partial(synced, dtype=dtype, unrolled=unrolled), params)
    shardings = jax.tree_util.tree_map_with_path(functools.partial(weight_sharding, mesh), made)
    return jax.jit(synced, static_argnames=("dtype", "unrolled"), out_shardings=shardings)
