"""Run by test_sharding.py: the embedded model on meshes DATAxFSDPxTENSOR over the first of so many fake devices.

python uneven_meshes.py DEVICES MESH...     # one line a mesh: name, difference of the logits, share of the weights
"""

import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={sys.argv[1]}"

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from plain_forward import forward

import cgrpo_jax
from cgrpo_jax.config.options import MeshConfig
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.decoder import logits
from cgrpo_jax.model.hf_config import config_from_hf

FOLDER = pathlib.Path(cgrpo_jax.__file__).parent / "quickstart"
MODEL = config_from_hf(FOLDER)


@jax.jit
def logits_of(params, tokens_BT):
    """`[B, T, V]`"""
    return logits(MODEL, params, forward(MODEL, params, tokens_BT))


def on_mesh(sizes):
    """Logits on a mesh, and the part of all weights that its first device holds."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    params = hf.load_params(FOLDER, MODEL, functools.partial(sharding.param_sharding, mesh), jnp.float32)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    tokens_BT = np.random.default_rng(0).integers(0, MODEL.vocab, (2, 9)).astype(np.int32)
    return np.asarray(logits_of(params, tokens_BT)), held / sum(leaf.nbytes for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    expected, _ = on_mesh((1, 1, 1))
    for name in sys.argv[2:]:
        found, share = on_mesh(tuple(map(int, name.split("x"))))
        print(name, np.abs(found - expected).max() / np.abs(expected).max(), share)
