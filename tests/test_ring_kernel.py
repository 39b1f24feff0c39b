"""The decode kernel, interpreted, against attention over all slots; what it reads; that it is what TPUs are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgrpo_jax.model.attention import attend_masked, in_ring
from cgrpo_jax.model.ring_kernel import attend_divided, attend_in_live_blocks, block_size, live_blocks

# time, slots, block, lengths: empty, within a block, over its edge, round the end of the ring, all of it
RINGS = [
    (3, 512, 128, [0, 1, 3, 2]),
    (130, 512, 128, [129, 1, 0, 64]),
    (5000, 1024, 128, [0, 3, 200, 900, 1023]),
    (511, 512, 512, [511, 2, 300]),
    (1920, 640, 128, [640, 5, 639]),
    (1027, 1024, 256, [1023, 1022, 4, 3]),
]


def made(slots, rows, heads, group, dtype, layers=2, head_dim=32, seed=0):
    """Queries `[R, K, G, H]`, and stacked keys and values."""
    keys = jax.random.split(jax.random.key(seed), 3)
    q_RKMH = jax.random.normal(keys[0], (rows, heads, group, head_dim), dtype) * 2
    kv = [jax.random.normal(key, (layers, rows, heads, slots, head_dim), dtype) for key in keys[1:]]
    return q_RKMH, *kv


def reference(q_RKMH, k_RKSH, v_RKSH, time, length_R, mesh):
    R, K, M, H = q_RKMH.shape
    live_RS = in_ring(time, length_R, k_RKSH.shape[2], mesh).live_RS
    return attend_masked(q_RKMH.reshape(R, K * M, 1, H), k_RKSH, v_RKSH, live_RS[:, None]).reshape(q_RKMH.shape)


@pytest.mark.parametrize(("heads", "group"), [(2, 4), (1, 7), (3, 1)])
@pytest.mark.parametrize("ring", RINGS)
def test_the_kernel_is_attention_over_the_ring(ring, heads, group, mesh):
    time, slots, block, lengths = ring
    length_R = jnp.array(lengths, jnp.int32)
    q, k, v = made(slots, len(lengths), heads, group, jnp.float32)
    for layer in range(2):
        got = attend_in_live_blocks(q, k, v, layer, jnp.int32(time), length_R, block=block, interpret=True)
        np.testing.assert_allclose(got, reference(q, k[layer], v[layer], time, length_R, mesh), atol=2e-6)


def test_the_kernel_in_bfloat16(mesh):
    """As far from float64 as the reference is, which rounds its weights too."""
    time, lengths = jnp.int32(700), jnp.array([900, 30, 511, 0], jnp.int32)
    arrays = made(1024, 4, 2, 4, jnp.bfloat16)
    got = attend_in_live_blocks(*arrays, 1, time, lengths, block=256, interpret=True)
    assert got.dtype == jnp.bfloat16
    q, k, v = (np.asarray(x, np.float32) for x in arrays)
    exact = np.asarray(reference(q, k[1], v[1], time, lengths, mesh))
    plain = np.asarray(reference(arrays[0], arrays[1][1], arrays[2][1], time, lengths, mesh), np.float32)
    own, theirs = (np.abs(np.asarray(x, np.float32) - exact).max() for x in (got, plain))
    assert 0 < own < 0.02 and own < 1.5 * theirs


def test_dead_blocks_are_not_read(mesh):
    """They hold NaN, which no mask of zeros would hide."""
    time, slots, block, lengths = 2000, 1024, 128, [0, 100, 700, 1023]
    length_R = jnp.array(lengths, jnp.int32)
    q, k, v = made(slots, 4, 2, 2, jnp.float32)
    first_R, count_R = (np.asarray(x) for x in live_blocks(jnp.int32(time), length_R, slots, block))
    read_RN = np.zeros((4, slots // block), bool)
    for row in range(4):
        read_RN[row, (first_R[row] + np.arange(count_R[row])) % (slots // block)] = True
    live_RS = np.asarray(in_ring(jnp.int32(time), length_R, slots, mesh).live_RS)
    np.testing.assert_array_equal(read_RN, live_RS.reshape(4, -1, block).any(-1))
    read_RS = jnp.asarray(np.repeat(read_RN, block, axis=1))[None, :, None, :, None]
    expected = reference(q, k[0], v[0], time, length_R, mesh)
    dirty = [jnp.where(read_RS, x, jnp.nan) for x in (k, v)]
    got = attend_in_live_blocks(q, *dirty, 0, jnp.int32(time), length_R, block=block, interpret=True)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_rows_of_usual_lengths_read_little_more_than_what_lives(rng):
    """Slots read over slots live, in rings that are full, half and a quarter live on average."""
    for slots, heads, size in ((8192, 2, 512), (16384, 2, 512), (8192, 8, 128), (1536, 4, 256)):
        block = block_size(slots, heads, 128, 2)
        assert block == size
        for share in (1.0, 0.5, 0.25):
            length_R = jnp.asarray(rng.integers(1, max(2, int(2 * share * slots)), 512).clip(max=slots - 1), jnp.int32)
            _, count_R = live_blocks(jnp.int32(rng.integers(slots)), length_R, slots, block)
            assert 1 <= float(count_R.sum()) * block / float((length_R + 1).sum()) < (1.3 if slots > 2048 else 1.6)
    assert block_size(640, 2, 128, 2) == 128 and block_size(96, 2, 16, 4) == 96


def test_divided_by_rows_and_heads(mesh):
    q, k, v = made(256, 4, 2, 3, jnp.float32)
    length_R, layer, time = jnp.array([3, 200, 0, 255], jnp.int32), jnp.int32(1), jnp.int32(77)
    q_RN1H = q.reshape(4, 6, 1, 32)
    got = attend_divided(mesh, q_RN1H, k, v, layer, time, length_R, interpret=True)
    expected = reference(q, k[1], v[1], time, length_R, mesh).reshape(q_RN1H.shape)
    np.testing.assert_allclose(got, expected, atol=2e-6)
