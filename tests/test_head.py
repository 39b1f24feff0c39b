"""Log-probabilities and entropies over chunks of the vocabulary: values and gradients of the plain computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgrpo_jax.learning.logprobs import LANES, Head, make_head

N, D, V, USED, TEMPERATURE = 13, 24, 700, 650, 0.7  # three chunks; the last one begins early


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


def arrays():
    rng = np.random.default_rng(0)
    target_I = np.array([0, 127, 128, 255, 256, 443, 444, 511, 512, 640, 649, 3, 300])  # also where chunks overlap
    return rng.normal(size=(N, D)), rng.normal(size=(V, D)), target_I, rng.normal(size=N), rng.normal(size=N)


def head_of(dtype, used=USED):
    return Head(V, used, TEMPERATURE, dtype, N * 2 * LANES)


def plain(hidden_ID, kernel_VD, target_I):
    """As in a textbook."""
    logp_IV = jax.nn.log_softmax(hidden_ID @ kernel_VD[:USED].T / TEMPERATURE, axis=-1)
    return logp_IV[jnp.arange(N), target_I], -(jnp.exp(logp_IV) * logp_IV).sum(axis=-1)


def weighed(function, hidden_ID, kernel_VD, target_I, a_I, b_I):
    logp_I, entropy_I = function(hidden_ID, kernel_VD, target_I)
    return (a_I * logp_I + b_I * entropy_I).sum()


def test_chunks_are_multiples_that_cover_the_vocabulary():
    head = head_of(jnp.float32)
    chunk = head.chunk(N)
    assert chunk == 2 * LANES and list(head.starts(chunk)) == [0, 256, 444]
    assert Head(100, 100, 1.0, jnp.float32, 1).chunk(10**9) == 100  # fewer than the lanes


def test_values_and_gradients_equal_the_plain_ones(in_float64):
    hidden_ID, kernel_VD, target_I, a_I, b_I = map(jnp.asarray, arrays())
    ours = make_head(head_of(jnp.float64))
    for got, expected in zip(ours(hidden_ID, kernel_VD, target_I), plain(hidden_ID, kernel_VD, target_I), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    gradients = [
        jax.grad(weighed, argnums=(1, 2))(function, hidden_ID, kernel_VD, target_I, a_I, b_I) for function in (ours, plain)
    ]  # fmt: skip
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert not gradients[0][1][USED:].any() and np.abs(gradients[0][1][:USED]).max() > 0


def test_bfloat16_products_accumulate_in_float32():
    """The error of log-probabilities is that of rounding the operands, not of a sum in bfloat16."""
    hidden_ID, kernel_VD, target_I, _, _ = map(jnp.asarray, arrays())
    low_ID, low_VD = hidden_ID.astype(jnp.bfloat16), kernel_VD.astype(jnp.bfloat16)
    logp_I, entropy_I = make_head(head_of(jnp.bfloat16))(low_ID, low_VD, target_I)
    exact = plain(low_ID.astype(jnp.float32), low_VD.astype(jnp.float32), target_I)
    assert logp_I.dtype == jnp.float32
    np.testing.assert_allclose(logp_I, exact[0], atol=1e-4)
    np.testing.assert_allclose(entropy_I, exact[1], atol=1e-4)
