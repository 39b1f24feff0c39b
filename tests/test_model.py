"""The decoder against `transformers` on torch, and its own invariances."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.decoder import decoder as model_module
from cgrpo_jax.model.decoder import init_cache, init_params, logits, unstack
from cgrpo_jax.model.hf_config import config_from_hf, config_to_hf

forward = jax.jit(model_module.forward, static_argnums=0, static_argnames=("dtype", "remat"))

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
CASES = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    # in the form of transformers 5, and of 4
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
}


def load(folder, mesh):
    cfg = config_from_hf(folder)
    return cfg, hf.load_params(folder, cfg, functools.partial(sharding.param_sharding, mesh), jnp.float32)


@pytest.fixture(params=CASES)
def random_checkpoint(request, tmp_path):
    """A folder that `transformers` itself wrote, with weights large enough that every part of the model matters."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers")
    family, changes = CASES[request.param]
    raw = config_to_hf(tiny_config(family), (1,), 0) | changes
    raw.pop("rope_theta")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model.eval()


def reference_logits(model, tokens_BT, start_B):
    """Logits of `transformers`, with its own attention mask and positions."""
    import torch

    slots = np.arange(tokens_BT.shape[1])
    mask = torch.tensor((slots[None] >= start_B[:, None]).astype(np.int64))
    positions = torch.tensor(np.maximum(slots[None] - start_B[:, None], 0))
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens_BT, dtype=torch.long), attention_mask=mask, position_ids=positions)
    return out.logits.float().numpy()


def our_logits(cfg, params, tokens_BT, start_B):
    hidden, _ = forward(cfg, params, jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(start_B, jnp.int32))
    return np.asarray(jax.jit(logits, static_argnums=0)(cfg, params, hidden))


def assert_parity(ours, theirs, real_BT):
    gap = np.abs(ours - theirs)[real_BT]
    assert gap.max() < 5e-4 and gap.mean() < 2e-5, (gap.max(), gap.mean())
    ours, theirs = ours[real_BT], theirs[real_BT]
    best = ours.argmax(-1)
    chosen = np.take_along_axis(theirs, best[:, None], -1)[:, 0]
    assert (theirs.max(-1) - chosen < 1e-3).all()  # equal up to ties


def padded_batch(rng, vocab, length):
    """Left padding in row 0, right padding in row 1, none in row 2."""
    tokens_BT = rng.integers(0, vocab, (3, length))
    start_B = np.array([length // 5, 0, 0])
    slots = np.arange(length)
    real_BT = (slots[None] >= start_B[:, None]) & (slots[None] < np.array([length, length * 4 // 5, length])[:, None])
    return tokens_BT, start_B, real_BT


def test_logits_equal_transformers(random_checkpoint, mesh, rng):
    folder, model = random_checkpoint
    cfg, params = load(folder, mesh)
    tokens_BT, start_B, real_BT = padded_batch(rng, cfg.vocab, 520)
    assert_parity(our_logits(cfg, params, tokens_BT, start_B), reference_logits(model, tokens_BT, start_B), real_BT)


def test_smollm2_logits_equal_transformers(smollm2, mesh, rng):
    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM

    cfg, params = load(smollm2, mesh)
    tokens_BT, start_B, real_BT = padded_batch(rng, cfg.vocab, 512)
    theirs = reference_logits(AutoModelForCausalLM.from_pretrained(smollm2).eval(), tokens_BT, start_B)
    assert_parity(our_logits(cfg, params, tokens_BT, start_B), theirs, real_BT)


@pytest.fixture(scope="module")
def tiny():
    cfg = tiny_config("qwen3", layers=3)
    return cfg, init_params(cfg, jax.random.key(0))


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_cached_decode_equals_full_forward(tiny, rng, form):
    cfg, params = tiny
    tokens_BT = jnp.asarray(rng.integers(0, cfg.vocab, (2, 20)), jnp.int32)
    start_B = jnp.array([3, 0], jnp.int32)
    full, _ = forward(cfg, params, tokens_BT, start_B)
    cache, parts = init_cache(cfg, 2, 24, jnp.float32), []
    if form == "unrolled":
        params, cache = params | {"layers": unstack(params["layers"])}, unstack(cache)
    for first, last in [(0, 11), (11, 12), (12, 13), (13, 20)]:
        hidden, cache = forward(cfg, params, tokens_BT[:, first:last], start_B, cache, first)
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, 1)[0, 3:], full[0, 3:], atol=2e-5)
    np.testing.assert_allclose(np.concatenate(parts, 1)[1], full[1], atol=2e-5)


def test_stacked_and_unstacked_layers_agree(tiny, rng):
    cfg, params = tiny
    tokens_BT, start_B = jnp.asarray(rng.integers(0, cfg.vocab, (2, 9)), jnp.int32), jnp.zeros(2, jnp.int32)
    one, _ = forward(cfg, params, tokens_BT, start_B)
    other, _ = forward(cfg, params | {"layers": unstack(params["layers"])}, tokens_BT, start_B)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_padding_content_and_amount_change_nothing(tiny, rng):
    cfg, params = tiny
    ids = rng.integers(0, cfg.vocab, 10)
    expected, _ = forward(cfg, params, jnp.asarray(ids[None], jnp.int32), jnp.zeros(1, jnp.int32))
    for left, right in [(1, 0), (7, 3), (30, 5)]:
        noise = rng.integers(0, cfg.vocab, left), rng.integers(0, cfg.vocab, right)
        padded = jnp.asarray(np.concatenate([noise[0], ids, noise[1]])[None], jnp.int32)
        hidden, _ = forward(cfg, params, padded, jnp.array([left], jnp.int32))
        np.testing.assert_allclose(hidden[0, left : left + 10], expected[0], atol=1e-5)


def test_no_token_sees_the_future(tiny, rng):
    """The gradient of an output with respect to every later input embedding is exactly zero."""
    cfg, params = tiny
    tokens_BT = jnp.arange(12, dtype=jnp.int32)[None]  # distinct ids: a row of the embedding is one position

    def output(embedding, position):
        hidden, _ = forward(cfg, params | {"embed": {"embedding": embedding}}, tokens_BT, jnp.zeros(1, jnp.int32))
        return (hidden[0, position] ** 3).sum()

    for position in (0, 5, 11):
        gradient = np.abs(jax.jit(jax.grad(output))(params["embed"]["embedding"], position)).sum(-1)
        assert (gradient[position + 1 : 12] == 0).all()
        assert (gradient[: position + 1] > 0).all()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(tiny, rng, remat):
    cfg, params = tiny
    tokens_BT, start_B = jnp.asarray(rng.integers(0, cfg.vocab, (2, 9)), jnp.int32), jnp.zeros(2, jnp.int32)
    loss = lambda params, remat: (forward(cfg, params, tokens_BT, start_B, remat=remat)[0] ** 3).sum()
    slope = jax.jit(jax.grad(loss), static_argnums=1)
    plain, other = slope(params, "none"), slope(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)


def test_compile_size_is_flat_in_depth():
    """Scanned layers: the lowered training program of 12 layers is as long as that of 3."""

    def program(layers):
        cfg = tiny_config("llama", layers=layers)
        params = hf.abstract_params(cfg)
        tokens, start = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
        grad = jax.grad(lambda p, t, s: forward(cfg, p, t, s)[0].sum())
        return len(jax.jit(grad).lower(params, tokens, start).as_text().splitlines())

    assert program(12) == program(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_config_errors_name_the_key(tmp_path, change, words):
    raw = config_to_hf(tiny_config("llama"), (1,), 0) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=words):
        config_from_hf(tmp_path)


def test_both_forms_of_the_rope_configuration(tmp_path):
    """transformers 4 wrote `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`."""
    new = config_to_hf(tiny_config("llama"), (1,), 0) | {"rope_parameters": LLAMA3}
    new.pop("rope_theta")
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 10_000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    (tmp_path / "config.json").write_text(json.dumps(new))
    first = config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert config_from_hf(tmp_path) == first
    assert first.rope_scaling is not None and first.rope_scaling.factor == 8.0
    assert os.listdir(tmp_path) == ["config.json"]
