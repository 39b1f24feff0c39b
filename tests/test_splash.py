"""The kernels of a TPU, interpreted, against the reference: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cgrpo_jax.model.attention import Seen, among_themselves, attend
from cgrpo_jax.model.splash import attend_by_splash, attend_own_heads, divided

B, N, K, H = 2, 4, 2, 64


def packed(lengths):
    """Segment and position `[T]` of segments one after another; then padding."""
    segment, position = [], []
    for number, length in enumerate(lengths, 1):
        segment += [number] * length
        position += range(length)
    return segment, position


def rows(T, *lengths):
    segment_BT, position_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b, own in enumerate(lengths):
        segment, position = packed(own)
        segment_BT[b, : len(segment)], position_BT[b, : len(segment)] = segment, position
    return segment_BT, position_BT


def on_one_device(function):
    """Inside of a shard_map that leaves `tensor` alone, as in the update."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False)
    )


def compare(seen, real_BT, T, S):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (B, heads, size, H))
        for key, heads, size in zip(keys[:3], (N, K, K), (T, S, S), strict=True)
    )
    weight = jax.random.normal(keys[3], (B, N, T, H)) * real_BT[:, None, :, None]  # padding means nothing

    def loss(backend, q, k, v):
        return (backend(q, k, v, seen) * weight).sum()

    splash = functools.partial(attend_by_splash, interpret=True)
    got, expected = (
        on_one_device(jax.value_and_grad(functools.partial(loss, backend), argnums=(0, 1, 2)))(q, k, v)
        for backend in (splash, attend)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("T", [128, 384])
def test_packed_rows_with_padding_and_grouped_heads(T):
    segment_BT, position_BT = rows(T, (50, 70), (T - 9,))
    compare(among_themselves(jnp.asarray(segment_BT), jnp.asarray(position_BT)), segment_BT > 0, T, T)


def test_queries_behind_a_prompt_part_of_the_same_segment():
    """Keys are [padding, prompt, response]; queries are the response."""
    prompt, T = 128, 256
    key_BS = np.ones((B, prompt + T), np.int32)
    key_BS[0, :40] = key_BS[1, :100] = 0
    place_BS = np.broadcast_to(np.arange(prompt + T, dtype=np.int32), (B, prompt + T))
    parts = (key_BS[:, prompt:], key_BS, place_BS[:, prompt:], place_BS)
    seen = Seen(*map(jnp.asarray, parts), ordered=True)
    compare(seen, np.ones((B, T), bool), T, prompt + T)


def test_what_splash_cannot_do_goes_to_the_reference():
    """Lengths that are no multiple of a block: the same numbers."""
    segment_BT, position_BT = map(jnp.asarray, rows(100, (50, 30), (100,)))
    seen = among_themselves(segment_BT, position_BT)
    q, k, v = (jax.random.normal(jax.random.key(i), (B, heads, 100, H)) for i, heads in enumerate((N, K, K)))
    got = on_one_device(lambda q, k, v: attend_by_splash(q, k, v, seen, interpret=True))(q, k, v)
    np.testing.assert_allclose(got, attend(q, k, v, seen), atol=1e-6)


def test_causal_rows_of_each_device(mesh):
    """As in prefilling: a mesh that is divided by rows and heads, each device with its own."""
    segment_BT, position_BT = (jnp.asarray(x) for x in rows(256, (256,), (256,)))
    q, k, v = (jax.random.normal(jax.random.key(i), (B, heads, 256, H)) for i, heads in enumerate((N, K, K)))
    own = divided(mesh, functools.partial(attend_own_heads, interpret=True))
    seen = among_themselves(jnp.zeros_like(segment_BT), position_BT)
    np.testing.assert_allclose(own(q, k, v, seen), attend(q, k, v, seen), atol=2e-5)
