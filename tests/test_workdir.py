"""What a workdir promises: digests, checkpoints, the lock, and files that nobody expected."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from cgrpo_jax.workdir import digests

# One tree on several meshes; x64 for the float64 leaf.
ON_MESHES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import NamedSharding, PartitionSpec as P
from cgrpo_jax.workdir.digests import tree_digest, leaf_digests, nonfinite_leaves
rng = np.random.default_rng(0)
tree = {
    "w": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32), "h": jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16),
    "d": rng.normal(size=(8, 16)), "i": np.arange(8, dtype=np.int32), "u": np.arange(16, dtype=np.uint32),
    "b": rng.random(8) < 0.5, "count": np.int32(3),
}
print(jax.device_count(), tree_digest(tree))
for shape in ((8, 1), (1, 8), (2, 4), (4, 2))[: 4 if jax.device_count() == 8 else 0]:
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (P(), P("x"), P("y"), P(("x", "y"))):
        put = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec if np.ndim(leaf) else P()))
        placed = jax.tree.map(put, tree)
        print(shape, spec, tree_digest(placed))
        assert nonfinite_leaves(placed) == []
"""


def test_digests_are_the_same_on_any_mesh():
    """1 and 8 devices, four meshes, four shardings each: one digest."""
    found = set()
    for devices in (1, 8):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run(
            [sys.executable, "-c", ON_MESHES], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = done.stdout.splitlines()
        assert lines[0].startswith(f"{devices} ") and len(lines) == (1 if devices == 1 else 17)
        found |= {line.split()[-1] for line in lines}
    assert len(found) == 1 and len(found.pop()) == 32


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, np.bool_]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_digest(dtype, rng):
    """Each bit of each position of a [3, 5] leaf: all digests differ, and only that leaf's."""
    base = np.asarray(jnp.asarray(rng.normal(size=(3, 5)) * 100).astype(dtype))
    tree = {"a": base, "rest": np.ones(3, np.float32)}
    seen = {digests.leaf_digests(tree)["a"]}
    rest = digests.leaf_digests(tree)["rest"]
    bits = 1 if dtype == np.bool_ else 8 * base.dtype.itemsize
    for byte in range(base.nbytes):
        for bit in range(min(bits, 8)):
            flipped = bytearray(base.tobytes())
            flipped[byte] ^= 1 << bit
            got = digests.leaf_digests(tree | {"a": np.frombuffer(bytes(flipped), base.dtype).reshape(base.shape)})
            assert got["rest"] == rest
            seen.add(got["a"])
    assert len(seen) == 1 + base.size * bits


def test_what_stands_elsewhere_changes_the_digest(rng):
    """Swapped rows or values (also x and -x), a transposition, another shape, dtype or name; and nothing else."""
    base = rng.normal(size=(4, 4)).astype(np.float32)
    signs = base.copy()
    signs[0, 1] = -signs[0, 0]
    swapped = signs.copy()
    swapped[0, :2] = signs[0, 1::-1]
    zeros = np.zeros((4, 4), np.float32)
    changes = [
        base, base[::-1], base[:, ::-1], base.T, base.reshape(2, 8), base.reshape(16), signs, swapped, zeros, -zeros,
        zeros.reshape(2, 8), zeros.astype(jnp.bfloat16), zeros.astype(np.int32), zeros.view(np.uint32), zeros[:0],
    ]  # fmt: skip
    assert len({digests.tree_digest({"a": change}) for change in changes}) == len(changes)
    assert digests.tree_digest({"a": base}) != digests.tree_digest({"b": base})
    assert digests.tree_digest({"a": base, "b": zeros}) != digests.tree_digest({"a": zeros, "b": base})
    assert digests.tree_digest({"a": base}) == digests.tree_digest({"a": jnp.asarray(base)})
    assert digests.leaf_digests({}) == {}


def test_a_tree_is_one_program(rng):
    """However many leaves, and the second time none."""
    from cgrpo_jax.workdir import compilation

    counts = compilation.watch()
    tree = {f"leaf{i}": np.full((i + 1, 7), i, np.float32) for i in range(9)}
    for function in (digests.leaf_digests, digests.nonfinite_leaves):
        before = counts.programs
        function(tree)
        assert counts.programs == before + 1
        function(tree)
        assert counts.programs == before + 1


def test_leaves_that_are_not_finite_are_named_in_order():
    tree = {
        "a": np.array([1.0, np.inf], np.float32),
        "b": {"c": np.ones(3, np.float32)},
        "i": np.arange(3, dtype=np.int32),
    }
    tree["z"] = [jnp.array([jnp.nan], jnp.bfloat16), np.float32(2.0)]
    assert digests.nonfinite_leaves(tree) == ["a", "z/0"]
    assert digests.nonfinite_leaves({"i": np.arange(3, dtype=np.int32)}) == []
    with pytest.raises(TypeError, match="d: float64 without jax_enable_x64"):
        digests.leaf_digests({"d": np.zeros(2)})
