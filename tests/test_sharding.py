"""The same results on every mesh; one strict table; no device holds the whole model."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import QUICKSTART, tiny_config
from jax.sharding import PartitionSpec as P

from cgrpo_jax.config.options import MeshConfig
from cgrpo_jax.errors import MeshError
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.sharding import make_mesh, param_spec, reshaped, sampler_spec

HERE = pathlib.Path(__file__).parent
MESHES = ["8x1x1", "1x8x1", "2x2x2"]


def on_eight_devices(folder, dtype):
    command = [sys.executable, str(HERE / "eight_devices.py"), str(folder / "out.npz"), dtype]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "out.npz"))


@pytest.mark.thorough
def test_the_same_on_every_mesh_and_schedule(tmp_path):
    """float64: tokens, under random rows, chunks, room and orders; loss and gradients to 1e-10, prompts shared or not."""
    found = on_eight_devices(tmp_path, "float64")
    expected, gradient = found["tokens/1x1x1/0"], found["gradient/1x1x1/shared"]
    assert len({tuple(row) for row in expected}) == 20 and (expected >= 0).sum() > 100
    trials = [name for name in found if name.startswith("tokens/")]
    assert len(trials) == 9
    for name in trials:
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert np.linalg.norm(gradient) > 0
    updates = [f"{mesh}/{bins}" for mesh in ["1x1x1", *MESHES] for bins in ("shared", "own")]
    for name in updates:
        tolerance = {"rtol": 1e-10, "atol": 1e-10 * np.abs(gradient).max(), "err_msg": name}
        np.testing.assert_allclose(found[f"gradient/{name}"], gradient, **tolerance)
        np.testing.assert_allclose(found[f"loss/{name}"], found["loss/1x1x1/shared"], rtol=1e-10, err_msg=name)


def test_float32_gradients_and_what_each_device_holds(tmp_path):
    """Within 1e-5 of the gradient's norm; no device holds more than its share (the norms are replicated)."""
    found = on_eight_devices(tmp_path, "float32")
    gradient = found["gradient/1x1x1/shared"]
    for mesh in MESHES:
        other = found[f"gradient/{mesh}/shared"]
        assert np.linalg.norm(other - gradient) < 1e-5 * np.linalg.norm(gradient), mesh
    assert found["share/1x8x1"] < 0.14 and found["share/2x2x2"] < 0.27 and found["share/8x1x1"] == 1


def axes_of(data=1, fsdp=1, tensor=1):
    """A mesh without devices."""
    return jax.sharding.AbstractMesh((data, fsdp, tensor), sharding.AXES)


def test_every_parameter_has_exactly_one_rule(monkeypatch):
    for family in ("llama", "qwen2", "qwen3"):
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(hf.abstract_params(tiny_config(family))):
            param_spec(sharding.path_of(key_path), leaf.shape, axes_of())
    with pytest.raises(ValueError, match="matches 0 sharding rules"):
        param_spec("layers/attn/q/scale", (2, 8), axes_of())
    monkeypatch.setattr(sharding, "PARAM_RULES", sharding.PARAM_RULES * 2)
    with pytest.raises(ValueError, match="matches 2 sharding rules"):
        param_spec("norm/scale", (8,), axes_of())


def test_an_axis_that_does_not_divide_is_replicated():
    """Along that axis only; the sampler's layout follows."""
    embedding = "embed/embedding", (211, 48)
    assert param_spec(*embedding, axes_of(fsdp=8)) == P("tensor", "fsdp")
    assert param_spec(*embedding, axes_of(fsdp=8, tensor=2)) == P(None, "fsdp")
    assert param_spec(*embedding, axes_of(fsdp=5, tensor=2)) == P(None, None)
    assert sampler_spec(*embedding, axes_of(fsdp=8)) == P("tensor", None)
    assert sampler_spec(*embedding, axes_of(fsdp=8, tensor=2)) == P(None, None)
    stacked = "layers/mlp/down/kernel", (2, 48, 80)
    assert param_spec(*stacked, axes_of(fsdp=32, tensor=16)) == P(None, None, "tensor")
    assert param_spec("layers/attn_norm/scale", (2, 48), axes_of(fsdp=5)) == P()


@pytest.mark.thorough
@pytest.mark.parametrize(("devices", "meshes"), [(8, ["1x8x1", "1x1x2", "1x3x2"]), (3, ["1x3x1"])])
def test_the_embedded_model_on_meshes_that_do_not_divide_it(devices, meshes):
    """Its 485 tokens are odd, its width is 128: it loads, and its logits are those of one device."""
    command = [sys.executable, str(HERE / "uneven_meshes.py"), str(devices), *meshes]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == meshes
    for name, difference, share in lines:
        assert float(difference) < 1e-5, name
        assert float(share) < {"1x8x1": 0.14, "1x1x2": 0.7}.get(name, 1.01), name


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as a mesh looks at."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0
    core_on_chip: int = 0


def test_all_meshes_hold_the_devices_in_one_order():
    """So that one program can read from one and write to another. Of 2 x 2 x 4 chips; neighbours share `tensor`."""
    chips = [Chip(i, (i % 2, i // 2 % 2, i // 4)) for i in range(16)]
    mesh = make_mesh(MeshConfig(), chips)
    others = [make_mesh(MeshConfig(*sizes), chips) for sizes in ((1, 4, 4), (4, 1, 4), (2, -1, 1))]
    own = reshaped(mesh, 4)
    assert dict(own.shape) == {"data": 4, "fsdp": 1, "tensor": 4} and reshaped(mesh, 0) is mesh
    assert all(list(other.devices.flat) == list(mesh.devices.flat) for other in [*others, own])
    for row in own.devices.reshape(4, 4):
        assert len({chip.coords[:2] for chip in row}) == 1
    with pytest.raises(MeshError, match=r"sampler\.tensor = 3 does not divide the 16 devices"):
        reshaped(mesh, 3)


def test_meshes_that_cannot_be():
    for cfg, words in [
        (MeshConfig(3, -1, 1), "mesh.data = 3"), (MeshConfig(-1, -1, 1), "-1 on one axis"), (MeshConfig(0, 1, 1), "positive"),
    ]:  # fmt: skip
        with pytest.raises(MeshError, match=words):
            make_mesh(cfg, jax.devices()[:1])


READS = """
import functools, sys
import jax, jax.numpy as jnp
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.hf_config import config_from_hf

sizes, read = [], hf.TensorFiles.read

def counted(self, name, index):
    part = read(self, name, index)
    sizes.append(part.size if "embed" in name else 0)
    return part

hf.TensorFiles.read = counted
mesh = sharding.make_mesh(sharding.MeshConfig(1, 8, 1), jax.devices())
cfg = config_from_hf(sys.argv[1])
params = hf.load_params(sys.argv[1], cfg, functools.partial(sharding.param_sharding, mesh), jnp.float32)
print(max(sizes), params["embed"]["embedding"].size)
"""


def test_loading_reads_only_what_a_device_keeps():
    """Each read of a file is one device's part, never a whole parameter of a sharded model."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(HERE.parent)
    }  # fmt: skip
    command = [sys.executable, "-c", READS, str(QUICKSTART)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    largest, whole = map(int, done.stdout.split())
    assert largest == whole // 8
