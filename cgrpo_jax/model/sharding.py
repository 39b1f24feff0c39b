"""The mesh, and parameter trees by the paths of their leaves: how each leaf lies on the mesh, which ones are trained.

The parameters of a model are two trees without a common leaf: those that are trained, and those that are frozen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cgrpo_jax.config.options import MeshConfig
from cgrpo_jax.errors import MeshError

AXES = ("data", "fsdp", "tensor")
Tree = dict[str, Any]  # nested dicts of arrays, or of abstract ones
Which = Callable[[str], bool]  # whether a leaf is in a set of leaves, by its path (`layers/attn/q/kernel`)

# Weights are [out, in]; layers carry a leading [L] axis. Every parameter must match exactly one row. Where a mesh axis
# does not divide an axis of a parameter, the parameter is replicated along that mesh axis.
PARAM_RULES = (
    (r"(embed/embedding|head/kernel)", P("tensor", "fsdp")),
    (r"layers/attn/[qkv]/kernel", P(None, "tensor", "fsdp")),
    (r"layers/attn/[qkv]/bias", P(None, "tensor")),
    (r"layers/attn/o/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(gate|up)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/mlp/down/kernel", P(None, "fsdp", "tensor")),
    (r"(layers/.*norm|norm)/scale", P()),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh over these devices, which lie in one order whatever the sizes. See `reshaped`.

    Raises:
      MeshError: the sizes do not fill the devices.
    """
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    asked = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise MeshError(f"{asked}: positive sizes are needed, or -1 on one axis for what is left")
    known = int(np.prod([size for size in sizes if size > 0]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise MeshError(f"{asked} does not fill the {len(devices)} devices")
    line = jax.make_mesh((len(devices),), ("line",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    return _mesh(line.devices, sizes)


def _mesh(devices: np.ndarray, sizes: Sequence[int]) -> Mesh:
    return Mesh(devices.reshape(tuple(sizes)), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def reshaped(mesh: Mesh, tensor: int) -> Mesh:
    """The devices of a mesh in the same order, `tensor` along that axis and the others along `data`; 0: as they are.

    One program may read what lies on the one mesh and write what shall lie on the other.

    Raises:
      MeshError: `tensor` does not divide the devices.
    """
    devices = mesh.devices.size
    if not tensor:
        return mesh
    if devices % tensor:
        raise MeshError(f"sampler.tensor = {tensor} does not divide the {devices} devices")
    return _mesh(mesh.devices, [{"data": devices // tensor, "tensor": tensor}.get(axis, 1) for axis in AXES])


def path_of(key_path: tuple) -> str:
    """`layers/attn/q/kernel` for a key path of a nested dict."""
    return "/".join(str(part.key) for part in key_path)


def param_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of one parameter: its rule, less the mesh axes that do not divide their axis of `shape`.

    Raises:
      ValueError: not exactly one rule matches.
    """
    matches = [rule for pattern, rule in PARAM_RULES if re.fullmatch(pattern, path)]
    if len(matches) != 1:
        raise ValueError(f"parameter {path!r} matches {len(matches)} sharding rules, not one")
    (rule,) = matches
    sizes = shape[: len(rule)]  # a rule may be shorter than its parameter has axes
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(rule, sizes, strict=True)))


def param_sharding(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, param_spec(path, shape, mesh))


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of every leaf of a parameter tree (arrays or abstract ones)."""

    def of_leaf(key_path: tuple, leaf: Any) -> NamedSharding:
        return param_sharding(mesh, path_of(key_path), leaf.shape)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def sampler_spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of a parameter in the sampler: whole along `fsdp`, or each token would gather it anew."""
    return P(*(None if axis == "fsdp" else axis for axis in param_spec(path, shape, mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree (arrays or abstract ones), for a restore or a compilation."""
    return jax.tree.map(lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), tree, shardings)


def every_leaf(path: str) -> bool:
    return True


def no_leaf(path: str) -> bool:
    return False


def part_of(params: Tree, chosen: Which, within: str = "") -> Tree:
    """The chosen leaves of a tree of arrays or abstract ones. Nothing is copied; branches without a leaf are left out.

    Args:
      within: where the tree lies in a larger one, as the beginning of a path.
    """
    kept: Tree = {}
    for name, part in params.items():
        if not isinstance(part, dict):
            kept |= {name: part} if chosen(within + name) else {}
        elif below := part_of(part, chosen, f"{within}{name}/"):
            kept[name] = below
    return kept


def split(params: Tree, trained: Which) -> tuple[Tree, Tree]:
    """The trained leaves and the frozen ones; `joined` is the inverse."""
    return part_of(params, trained), part_of(params, lambda path: not trained(path))


def joined(trained: Tree, frozen: Tree) -> Tree:
    """Two trees without a common leaf as one: all parameters of the model. Nothing is copied."""
    both = dict(trained)
    for name, part in frozen.items():
        both[name] = joined(both[name], part) if name in both else part
    return both
