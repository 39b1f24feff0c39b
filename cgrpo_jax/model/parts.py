"""Parameters that lie in parts on the devices of a mesh, as seen from inside `jax.shard_map`.

The devices that share a parameter (`fsdp`) each hold a part of it. A layer's weights are gathered in the dtype of the
computation where they are used, inside the rematerialised layer, so no more than a layer is ever whole; the transpose
of a gather is a reduce-scatter, so gradients are born in parts. `fsdp` is walked in two stages, as two axes: on one
axis of a torus XLA turns each reduce-scatter into an all-reduce of twice the bytes. `tensor` is left to the compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cgrpo_jax.model.sharding import param_spec, path_of

STAGES = ("fsdp_outer", "fsdp_inner")  # of the axis `fsdp`
MANUAL = ("data", *STAGES)  # the axes of the rows
NARROW = 128  # columns: a part of the embedding with fewer is gathered whole


def staged(mesh: Mesh) -> Mesh:
    """The same devices in the same order with `fsdp` as two axes, the inner one not smaller."""
    fsdp = mesh.shape["fsdp"]
    outer = next(size for size in range(math.isqrt(fsdp), 0, -1) if fsdp % size == 0)
    sizes = (mesh.shape["data"], outer, fsdp // outer, mesh.shape["tensor"])
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return Mesh(mesh.devices.reshape(sizes), ("data", *STAGES, "tensor"), axis_types=axis_types)


def divided_axes(mesh: Mesh, params: Any) -> Any:
    """For each leaf the axis along which `fsdp` divides it; -1: none. Layers count their leading [L]."""

    def axis_of(key_path: tuple, leaf: Any) -> int:
        spec = param_spec(path_of(key_path), leaf.shape, mesh)
        return spec.index("fsdp") if "fsdp" in spec and mesh.shape["fsdp"] > 1 else -1

    return jax.tree_util.tree_map_with_path(axis_of, params)


def shared_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the rows that have several devices: over one alone XLA's partitioner knows no sum beside `tensor`."""
    sizes = staged(mesh).shape
    return tuple(axis for axis in MANUAL if sizes[axis] > 1)


def part_specs(divided: Any) -> Any:
    """The partition of each leaf over the stages."""

    def spec_of(axis: int) -> P:
        return P(*[None] * axis, STAGES) if axis >= 0 else P()

    return jax.tree.map(spec_of, divided)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, axis: int) -> jax.Array:
    for stage in reversed(STAGES):
        x = jax.lax.all_gather(x, stage, axis=axis, tiled=True)
    return x


def _gathered_forward(x: jax.Array, axis: int) -> tuple[jax.Array, None]:
    return _gathered(x, axis), None


def _gathered_backward(axis: int, saved: None, cotangent: jax.Array) -> tuple[jax.Array]:
    """The barrier keeps the conversion to float32 behind the reduce-scatter, where there is less of it."""
    return (jax.lax.optimization_barrier(scattered(cotangent, axis)),)


def scattered(x: jax.Array, axis: int) -> jax.Array:
    """The sum over the devices, each with its part along `axis`; with axis -1 the local array, not yet summed."""
    if axis < 0:
        return x
    for stage in STAGES:
        x = jax.lax.psum_scatter(x, stage, scatter_dimension=axis, tiled=True)
    return x


_gathered.defvjp(_gathered_forward, _gathered_backward)


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the parameters that a program is handed are divided. Without `divided`: not at all."""

    divided: Any = None  # as `divided_axes`
    shared: tuple[str, ...] = ()  # as `shared_axes`

    def axis(self, *path: str) -> int:
        """Along which axis the parameter at this path is divided."""
        of = self.divided
        for name in path if of is not None else ():
            of = of[name]
        return -1 if of is None else of

    def whole(self, leaf: jax.Array, axis: int, dtype: DTypeLike) -> jax.Array:
        """A parameter in the dtype of the computation; one that is not divided as it is."""
        return leaf if axis < 0 else _gathered(leaf.astype(dtype), axis)

    def layer(self, params: Any, dtype: DTypeLike) -> Any:
        """The whole parameters of one layer (without [L])."""
        if self.divided is None:
            return params

        def gather(leaf: jax.Array, axis: int) -> jax.Array:
            return self.whole(leaf, axis - 1 if axis > 0 else -1, dtype)

        return jax.tree.map(gather, params, self.divided["layers"])

    def embedded(self, table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Rows of the embedding `[B, T, D]`. Each device looks up the tokens of all in its columns, and sends them."""
        axis = self.axis("embed", "embedding")
        if axis < 0:
            return table_VD[tokens_BT].astype(dtype)
        if axis == 0 or table_VD.shape[1] < NARROW:
            return self.whole(table_VD, axis, dtype)[tokens_BT]
        everybodys_BT = jax.lax.all_gather(tokens_BT, STAGES, axis=0, tiled=True)
        columns_BTD = table_VD[everybodys_BT].astype(dtype)
        return jax.lax.all_to_all(columns_BTD, STAGES, split_axis=0, concat_axis=2, tiled=True)

    def summed(self, grads: Any) -> Any:
        """Gradients of local losses -> those of their sum: over the axes along which a leaf is not divided."""
        if self.divided is None:
            return grads

        def total(leaf: jax.Array, axis: int) -> jax.Array:
            over = tuple(name for name in self.shared if axis < 0 or name not in STAGES)
            return jax.lax.psum(leaf, over) if over else leaf

        return jax.tree.map(total, grads, self.divided)

    def over_devices(self, sums: dict[str, jax.Array], largest: Sequence[str]) -> dict[str, jax.Array]:
        """Sums over all rows' devices; of those named `largest` the maximum."""
        if not self.shared:
            return sums
        return {
            name: jax.lax.pmax(value, self.shared) if name in largest else jax.lax.psum(value, self.shared)
            for name, value in sums.items()
        }


WHOLE = Parts()
