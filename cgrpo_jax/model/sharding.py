"""All sharding of the project: the mesh, one strict table from parameter path to axes, host <-> device arrays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cgrpo_jax.options import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Weights are [out, in]; layers carry a leading [L] axis. Every parameter must match exactly one row.
PARAM_RULES = (
    (r"(embed/embedding|head/kernel)", P("tensor", "fsdp")),
    (r"layers/attn/[qkv]/kernel", P(None, "tensor", "fsdp")),
    (r"layers/attn/[qkv]/bias", P(None, "tensor")),
    (r"layers/attn/o/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(gate|up)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/mlp/down/kernel", P(None, "fsdp", "tensor")),
    (r"(layers/.*norm|norm)/scale", P()),
)


class MeshError(ValueError):
    """A mesh that these devices cannot form."""


def make_mesh(cfg: MeshConfig, among: Sequence[jax.Device]) -> Mesh:
    """The mesh over some devices. Raises MeshError where the sizes do not fill them."""
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    devices = len(among)
    asked = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise MeshError(f"{asked}: positive sizes are needed, or -1 on one axis for what is left")
    known = int(np.prod([size for size in sizes if size > 0]))
    sizes = [devices // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != devices:
        raise MeshError(f"{asked} does not fill the {devices} devices")
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=axis_types, devices=among)


def path_of(key_path: tuple) -> str:
    """`layers/attn/q/kernel` for a key path of a nested dict."""
    return "/".join(str(part.key) for part in key_path)


def param_spec(path: str) -> P:
    """The partition of one parameter. Raises ValueError unless exactly one rule matches."""
    matches = [spec for pattern, spec in PARAM_RULES if re.fullmatch(pattern, path)]
    if len(matches) != 1:
        raise ValueError(f"parameter {path!r} matches {len(matches)} sharding rules, not one")
    return matches[0]


def param_sharding(mesh: Mesh, path: str) -> NamedSharding:
    return NamedSharding(mesh, param_spec(path))


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of every leaf of a parameter tree (arrays or abstract ones)."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: param_sharding(mesh, path_of(key_path)), params)


def sampler_spec(path: str) -> P:
    """The partition of a parameter in the sampler: whole along `fsdp`, or each token would gather it anew."""
    return P(*(None if axis == "fsdp" else axis for axis in param_spec(path)))


def check_divides(mesh: Mesh, params: Any) -> None:
    """Raises MeshError where the mesh cannot share an axis of a parameter evenly."""
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        for size, axis in zip(leaf.shape, param_spec(path), strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise MeshError(f"mesh.{axis} = {mesh.shape[axis]} does not divide the {size} of {path} {leaf.shape}")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
