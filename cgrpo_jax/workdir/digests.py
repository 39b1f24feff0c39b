"""Digests of the bits of arrays, which do not depend on the mesh or the number of hosts.

Each 32-bit word of a leaf is xored with a key of its position and mixed by a bijection; the words are summed modulo
2^32. The sum does not depend on the order of the additions, so not on the sharding. One changed word always changes
the sum; swapped values leave it unchanged with probability 2^-32, and there are two sums with different keys. (Words
times odd weights of their positions would not do: their sum does not change when x and -x are swapped.) The digests
guard against accidents, not against attackers.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

SEEDS = (0x9E3779B9, 0x7F4A7C15)  # keys of the two sums
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes per element; 8: two words per element


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of the result depends on every bit (the finaliser of murmur3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits as uint32, in the shape of the leaf; 64-bit elements give two words on a new last axis."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)


def _sum(bits: jax.Array, seed: int) -> jax.Array:
    """One sum of a leaf, a uint32 scalar. The key takes in the position axis by axis, so no flat index can overflow."""
    key = jnp.full((1,) * bits.ndim, seed, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        along = [1] * bits.ndim
        along[axis] = size
        key = _mix((key ^ jax.lax.broadcasted_iota(jnp.uint32, along, axis)) + jnp.uint32(seed))
    return jnp.sum(_mix(bits ^ key), dtype=jnp.uint32)


def _sums(leaves: list[jax.Array]) -> jax.Array:
    """Both sums of each leaf, uint32 [leaves, 2]."""
    return jnp.stack([jnp.stack([_sum(_bits(leaf), seed) for seed in SEEDS]) for leaf in leaves])


def _nonfinite(leaves: list[jax.Array]) -> jax.Array:
    """Whether each leaf holds a NaN or an infinity, bool [leaves]."""
    return jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves])


@functools.cache
def _program(function: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """`function` jitted for a whole tree, its result replicated to all hosts."""
    return jax.jit(function, out_shardings=None if mesh is None else NamedSharding(mesh, P()))


def checking_programs(tree: Any, mesh: jax.sharding.Mesh) -> list[tuple[Any, list[Any]]]:
    """(program, its argument) of `leaf_digests` and of `nonfinite_leaves` for a tree of arrays or abstract ones."""
    leaves = jax.tree.leaves(tree)
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return [(_program(_sums, mesh), leaves), (_program(_nonfinite, mesh), floats)]


def _run(function: Any, leaves: list[Any]) -> np.ndarray:
    meshes = {leaf.sharding.mesh for leaf in leaves if isinstance(getattr(leaf, "sharding", None), NamedSharding)}
    return np.asarray(_program(function, next(iter(meshes), None))(leaves))


def _named(tree: Any) -> dict[str, Any]:
    """Path -> array, in the order of the tree. Raises TypeError for a dtype that jax would narrow."""
    named = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        named[path] = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        if jax.dtypes.canonicalize_dtype(named[path].dtype) != named[path].dtype:
            raise TypeError(f"{path}: {named[path].dtype} without jax_enable_x64")
    return named


def leaf_digests(tree: Any) -> dict[str, str]:
    """Path -> 32 hex digits over shape, dtype and bits of each leaf, by one program; waits for its result.

    Leaves: device or numpy arrays of floats, integers and bools of 8 to 64 bits, no PRNG keys.

    Raises:
      TypeError: a 64-bit host array without jax_enable_x64.
    """
    named = _named(tree)
    if not named:
        return {}
    digests = {}
    for (path, leaf), (one, other) in zip(named.items(), _run(_sums, list(named.values())), strict=True):
        text = f"{leaf.dtype} {leaf.shape} {one:08x}{other:08x}"
        digests[path] = hashlib.sha256(text.encode()).hexdigest()[:32]
    return digests


def tree_digest(tree: Any) -> str:
    """32 hex digits over the paths and `leaf_digests` of a tree."""
    lines = "".join(f"{path} {digest}\n" for path, digest in leaf_digests(tree).items())
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def nonfinite_leaves(tree: Any) -> list[str]:
    """Paths of the float leaves that hold a NaN or an infinity, in the order of the tree, by one program."""
    floats = {path: leaf for path, leaf in _named(tree).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if not floats:
        return []
    return [path for path, bad in zip(floats, _run(_nonfinite, list(floats.values())), strict=True) if bad]
