"""The decoder against `transformers` on torch, and its own invariances."""

import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import plain_forward
import pytest
from conftest import tiny_config

from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.attention import (
    KVCache,
    after_prompt,
    among_themselves,
    follow,
    in_ring,
    keep_own,
    write_ring,
    write_ring_of_layer,
)
from cgrpo_jax.model.decoder import init_params, logits, run_layers, scanned_in_place, unrolled, unstack
from cgrpo_jax.model.hf_config import config_from_hf, config_to_hf
from cgrpo_jax.model.rope import rope_frequencies

forward = jax.jit(plain_forward.forward, static_argnums=0, static_argnames=("dtype", "remat"))


@functools.partial(jax.jit, static_argnums=0)
def packed_forward(cfg, params, tokens_BT, positions_BT, segment_BT):
    """Hidden states of rows that hold several segments."""
    seen = among_themselves(segment_BT, positions_BT)
    return run_layers(cfg, params, tokens_BT, positions_BT, seen)[0]


def ids(values):
    return jnp.asarray(values, jnp.int32)


def counted(lengths):
    """Positions and segments (from 1) of a row that holds segments of these lengths one after another."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    return ids(positions[None]), ids(np.repeat(np.arange(1, len(lengths) + 1), lengths)[None])


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 20_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
WHOLE = YARN | {"mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2}
BROKEN = YARN | {"truncate": False, "attention_factor": 1.25, "factor": 2.5}
BARE = {
    "rope_type": "yarn",
    "rope_theta": 20_000.0,
    "factor": 4.0,
}  # the original positions are max_position_embeddings


def scaled(rope):
    """In the form of transformers 5, and of 4, which knows no theta inside."""
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_parameters": rope, "rope_scaling": old}


CASES = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama3_rope": ("llama", scaled(LLAMA3)),
    "llama_linear": ("llama", scaled(LINEAR)),
    "llama_yarn_whole": ("llama", scaled(WHOLE)),
    "llama_yarn_bare": ("llama", scaled(BARE) | {"max_position_embeddings": 160}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_linear": ("qwen2", scaled(LINEAR)),
    "qwen2_yarn": ("qwen2", scaled(YARN) | {"max_position_embeddings": 128}),
    "qwen2_yarn_broken": ("qwen2", scaled(BROKEN)),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_linear": ("qwen3", scaled(LINEAR)),
    "qwen3_yarn": ("qwen3", scaled(YARN)),
    "qwen3_yarn_whole": ("qwen3", scaled(WHOLE | BROKEN)),
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
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model.eval()


def reference_logits(model, tokens_T):
    """Logits `[T, V]` of `transformers` for one sequence alone."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens_T[None], dtype=torch.long)).logits[0].float().numpy()


def assert_parity(ours, theirs):
    gap = np.abs(ours - theirs)
    assert gap.max() < 5e-4 and gap.mean() < 2e-5, (gap.max(), gap.mean())
    best = ours.argmax(-1)
    chosen = np.take_along_axis(theirs, best[:, None], -1)[:, 0]
    assert (theirs.max(-1) - chosen < 1e-3).all()  # equal up to ties


def check_parity(cfg, params, model, rng, length):
    """A row with right padding, one without, and one of three segments; each sequence against itself alone."""
    head = jax.jit(logits, static_argnums=0)
    tokens_BT = rng.integers(0, cfg.vocab, (3, length))
    hidden_BTD = forward(cfg, params, ids(tokens_BT[:2]))
    lengths = [length // 5, length // 2, length - length // 5 - length // 2]
    packed_1TD = packed_forward(cfg, params, ids(tokens_BT[2:]), *counted(lengths))
    ours_BTV = np.asarray(head(cfg, params, jnp.concatenate([hidden_BTD, packed_1TD])))
    ends = np.cumsum(lengths)
    pieces = [(0, 0, length * 4 // 5), (1, 0, length)]
    pieces += [(2, end - own, end) for end, own in zip(ends, lengths, strict=True)]
    theirs = [reference_logits(model, tokens_BT[row, first:last]) for row, first, last in pieces]
    ours = [ours_BTV[row, first:last] for row, first, last in pieces]
    assert_parity(np.concatenate(ours), np.concatenate(theirs))


def test_logits_equal_transformers(random_checkpoint, mesh, rng):
    folder, model = random_checkpoint
    check_parity(*load(folder, mesh), model, rng, 520)


def test_smollm2_logits_equal_transformers(smollm2, mesh, rng):
    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM

    check_parity(*load(smollm2, mesh), AutoModelForCausalLM.from_pretrained(smollm2).eval(), rng, 512)


@pytest.fixture(scope="module")
def tiny():
    cfg = tiny_config("qwen3", layers=3)
    return cfg, init_params(cfg, jax.random.key(0))


def prefilled(cfg, params, tokens_BT):
    """Keys and values that a prompt leaves, stacked."""
    positions_BT, segment_BT = counted([tokens_BT.shape[1]])
    positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)
    segment_BT = jnp.broadcast_to(segment_BT, tokens_BT.shape)
    return run_layers(cfg, params, tokens_BT, positions_BT, among_themselves(segment_BT, positions_BT), None, keep_own)[
        1
    ]


@pytest.mark.parametrize("form", ["scanned_in_place", "unrolled"])
def test_cached_decode_equals_full_forward(tiny, rng, form, mesh):
    """Two rows of unlike length, token by token, in a ring that turns over."""
    cfg, params = tiny
    tokens_BT = ids(rng.integers(0, cfg.vocab, (2, 20)))
    full_BTD = forward(cfg, params, tokens_BT)
    S, time, length_B = 24, 20, np.array([8, 11])
    noise = jnp.full((cfg.layers, 2, cfg.kv_heads, S, cfg.head_dim), 7.0)  # of rows that ended: never seen

    def ring(x_LBKTH):
        rows = [
            jnp.roll(noise[:, row].at[:, :, :length].set(x_LBKTH[:, row, :, :length]), time - length, axis=2)
            for row, length in enumerate(length_B)
        ]
        return jnp.stack(rows, axis=1)

    cache = jax.tree.map(ring, prefilled(cfg, params, tokens_BT[:, :11]))
    loop, write = (unrolled, write_ring) if form == "unrolled" else (scanned_in_place, write_ring_of_layer)
    if form == "unrolled":
        params, cache = params | {"layers": unstack(params["layers"])}, unstack(cache)

    @jax.jit
    def step(cache, token_B1, length_B, time):
        seen = in_ring(time, length_B, S, mesh)
        place = (token_B1, length_B[:, None], seen, cache, write(time % S))
        return run_layers(cfg, params, *place, loop=loop)

    for _ in range(9):
        token_B1 = jnp.take_along_axis(tokens_BT, ids(length_B)[:, None], axis=1)
        hidden_B1D, cache = step(cache, token_B1, ids(length_B), jnp.int32(time))
        np.testing.assert_allclose(hidden_B1D[:, 0], full_BTD[np.arange(2), length_B], atol=2e-5)
        time, length_B = time + 1, length_B + 1
    assert time % S < 20  # the ring turned over


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_behind_a_prompt_equals_the_whole_row(tiny, rng, remat):
    """Two segments behind one prompt, whose slots are not all used, give what each whole text gives."""
    cfg, params = tiny
    prompt, slots = rng.integers(0, cfg.vocab, 6), 9
    tails = [rng.integers(0, cfg.vocab, length) for length in (5, 3)]
    padded = np.concatenate([prompt, rng.integers(0, cfg.vocab, slots - 6)])
    past = prefilled(cfg, params, ids(padded[None]))
    assert isinstance(past, KVCache)
    positions_BT, segment_BT = counted([len(tail) for tail in tails])
    positions_BT += 6
    seen = after_prompt(segment_BT, positions_BT, ids([6]), slots)
    tail_BT = ids(np.concatenate(tails)[None])
    hidden_BTD, left = run_layers(cfg, params, tail_BT, positions_BT, seen, past, follow, remat=remat)
    assert left is None
    whole = [forward(cfg, params, ids(np.concatenate([prompt, tail])[None]))[0, 6:] for tail in tails]
    np.testing.assert_allclose(hidden_BTD[0], np.concatenate(whole), atol=1e-5)


def test_stacked_and_unstacked_layers_agree(tiny, rng):
    cfg, params = tiny
    tokens_BT = ids(rng.integers(0, cfg.vocab, (2, 9)))
    positions_BT = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))
    place = (tokens_BT, positions_BT, among_themselves(jnp.zeros_like(tokens_BT), positions_BT))
    one, cache = run_layers(cfg, params, *place, None, keep_own)
    apart = params | {"layers": unstack(params["layers"])}
    other, caches = run_layers(cfg, apart, *place, (None,) * cfg.layers, keep_own, loop=unrolled)
    np.testing.assert_allclose(one, other, atol=1e-5)
    for own, theirs in zip(unstack(cache), caches, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), own, theirs)


def test_padding_content_and_amount_change_nothing(tiny, rng):
    """Neither what stands to the right of a row, nor other segments to both sides."""
    cfg, params = tiny
    own = rng.integers(0, cfg.vocab, 10)
    expected = forward(cfg, params, ids(own[None]))[0]
    for left, right in [(1, 0), (7, 3), (30, 5)]:
        before, after = rng.integers(0, cfg.vocab, left), rng.integers(0, cfg.vocab, right)
        hidden = forward(cfg, params, ids(np.concatenate([own, after])[None]))
        np.testing.assert_allclose(hidden[0, :10], expected, atol=1e-5)
        row = ids(np.concatenate([before, own, after])[None])
        hidden = packed_forward(cfg, params, row, *counted([left, 10, right]))
        np.testing.assert_allclose(hidden[0, left : left + 10], expected, atol=1e-5)


def test_several_segments_in_a_row_are_as_alone(tiny, rng):
    cfg, params = tiny
    lengths = [4, 1, 9, 6]
    pieces = [rng.integers(0, cfg.vocab, length) for length in lengths]
    hidden = packed_forward(cfg, params, ids(np.concatenate(pieces)[None]), *counted(lengths))
    alone = [forward(cfg, params, ids(piece[None]))[0] for piece in pieces]
    np.testing.assert_allclose(hidden[0], np.concatenate(alone), atol=1e-5)


def test_no_token_sees_the_future(tiny, rng):
    """The gradient of an output with respect to every later input embedding is exactly zero."""
    cfg, params = tiny
    tokens_BT = jnp.arange(12, dtype=jnp.int32)[None]  # distinct ids: a row of the embedding is one position

    def output(embedding, position):
        hidden = forward(cfg, params | {"embed": {"embedding": embedding}}, tokens_BT)
        return (hidden[0, position] ** 3).sum()

    for position in (0, 5, 11):
        gradient = np.abs(jax.jit(jax.grad(output))(params["embed"]["embedding"], position)).sum(-1)
        assert (gradient[position + 1 : 12] == 0).all()
        assert (gradient[: position + 1] > 0).all()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(tiny, rng, remat):
    cfg, params = tiny
    tokens_BT = ids(rng.integers(0, cfg.vocab, (2, 9)))

    def loss(params, remat):
        return (forward(cfg, params, tokens_BT, remat=remat) ** 3).sum()

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    plain, other = slope(params, "none"), slope(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)


def test_compile_size_is_flat_in_depth():
    """Scanned layers: the lowered training program of 12 layers is as long as that of 3."""

    def program(layers):
        cfg = tiny_config("llama", layers=layers)
        params = hf.abstract_params(cfg)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        grad = jax.grad(lambda p, t: forward(cfg, p, t).sum())
        return len(jax.jit(grad).lower(params, tokens).as_text().splitlines())

    assert program(12) == program(3)


def read(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return config_from_hf(folder)


def plain_config(family="llama", **changes):
    """A `config.json` of transformers 5 as a dict; None takes a key away."""
    raw = config_to_hf(tiny_config(family), (1,), 0) | changes
    return {key: value for key, value in raw.items() if value is not None}


YARN_OF_CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta is null"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type = 'longrope'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "original_max_position"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor = '4'"),
        ({"rope_scaling": YARN_OF_CARD | {"beta_fast": -1}}, "beta_fast = -1"),
        ({"rope_scaling": YARN_OF_CARD | {"mscale": "1", "mscale_all_dim": 1}}, "mscale = '1'"),
        ({"rope_scaling": YARN_OF_CARD | {"truncate": "no"}}, "truncate = 'no'"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
        ({"rope_scaling": YARN_OF_CARD, "original_max_position_embeddings": 256}, "original_max_position_embeddings"),
        ({"rope_scaling": YARN_OF_CARD | {"type": "linear"}}, "rope_scaling.type = 'linear'"),
        ({"rope_theta": 4e4}, "rope_theta = 40000, rope_parameters.rope_theta = 10000"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
    ],
)
def test_config_errors_name_the_key(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        read(tmp_path, config_to_hf(tiny_config("llama"), (1,), 0) | change)
    assert len(str(caught.value).splitlines()) == 1


def test_a_theta_that_transformers_would_drop_is_refused(tmp_path):
    """The card's `rope_scaling` beside what transformers 5 wrote: theta would be 10,000 there."""
    raw = plain_config("qwen2", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert read(tmp_path, raw).rope_theta == 1e6
    with pytest.raises(CheckpointError, match="beside rope_scaling"):
        read(tmp_path, raw | {"rope_scaling": YARN_OF_CARD})
    assert read(tmp_path, raw | {"rope_scaling": YARN_OF_CARD, "rope_theta": 1e6}).rope_theta == 1e6


def test_all_that_says_full_attention_is_read(tmp_path):
    kinds = {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0, "use_sliding_window": False}
    assert read(tmp_path, plain_config(**kinds)) == read(tmp_path, plain_config())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_no_theta_is_that_of_llama_2(tmp_path, family):
    assert read(tmp_path, plain_config(family, rope_theta=None, rope_parameters=None)).rope_theta == 10_000


def test_yarn_widens_the_positions(tmp_path):
    """The cards of Qwen leave `max_position_embeddings` as it was."""
    assert read(tmp_path, plain_config(rope_scaling=YARN_OF_CARD)).max_positions == 4096
    wider = plain_config(rope_scaling=YARN_OF_CARD, max_position_embeddings=5000)
    assert read(tmp_path, wider).max_positions == 5000
    assert read(tmp_path, plain_config(rope_scaling={"type": "linear", "factor": 4.0})).max_positions == 1024


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, YARN, WHOLE, BROKEN])
def test_both_forms_of_the_rope_configuration(tmp_path, rope):
    """transformers 4 wrote `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`; here both are written."""
    new = plain_config(rope_theta=None, rope_parameters=rope)
    old = plain_config(**scaled(rope) | {"rope_parameters": None})
    first = read(tmp_path, new)
    assert read(tmp_path, old) == first and type(first.rope_scaling).__name__.lower().startswith(rope["rope_type"])
    written = config_to_hf(first, (1,), 0)
    assert read(tmp_path, written) == first
    assert read(tmp_path, {key: value for key, value in written.items() if key != "rope_parameters"}) == first
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    "change",
    [
        {}, {"mscale": 0.8, "mscale_all_dim": 0.5}, {"mscale": 0.8}, {"truncate": False}, {"factor": 40.0},
        {"beta_fast": 16, "beta_slow": 4}, {"original_max_position_embeddings": 6},  # a ramp without length
    ],
)  # fmt: skip
def test_frequencies_of_a_long_model_equal_transformers(tmp_path, change):
    """Qwen's head of 128 and theta of 1e6, where the ramp of yarn has many steps."""
    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} | change
    raw = plain_config("qwen3", rope_theta=1e6, rope_parameters=None, rope_scaling=rope, head_dim=128)
    cfg = read(tmp_path, raw)
    theirs, scale = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.from_pretrained(tmp_path), "cpu")
    ours = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert ours.dtype == np.float32 and cfg.rope_scaling.attention_factor == pytest.approx(scale, rel=1e-12)


def test_what_stands_beside_rope_parameters_counts(tmp_path):
    """As in transformers: the card's `rope_scaling`, put into a folder that has `rope_parameters` too."""
    beside = read(tmp_path, plain_config("qwen3", rope_scaling=YARN_OF_CARD))
    assert beside == read(tmp_path, plain_config("qwen3", rope_parameters=None, rope_scaling=YARN_OF_CARD))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    scaling = getattr(theirs, "rope_parameters", None) or theirs.rope_scaling
    assert scaling["rope_type"] == "yarn" and beside.rope_scaling.factor == scaling["factor"]
