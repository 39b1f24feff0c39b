"""Ids that the model has and the tokenizer has not: never drawn, and without probability in the trainer."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICKSTART, engine_of, tiny_config
from plain_forward import forward
from safetensors.numpy import load_file, save_file
from test_train import small

from cgrpo_jax.config.options import SamplingConfig
from cgrpo_jax.learning.logprobs import Pass, token_logps
from cgrpo_jax.learning.packing import Terms, bin_size, pack
from cgrpo_jax.model.decoder import init_params, logits
from cgrpo_jax.planner.programs import sampler_programs
from cgrpo_jax.records import Kind, Name, Request, Segment
from cgrpo_jax.rollout.stories import sample_all
from cgrpo_jax.run import build
from cgrpo_jax.sampling.pool import EngineSetup
from cgrpo_jax.sampling.room import Room

USED, NEW, PROMPT = 190, 24, [5, 9, 2, 33, 7]
CFG = tiny_config("qwen3", vocab_used=USED)


@pytest.fixture(scope="module")
def params():
    """The rows behind the tokenizer's ids are so large that one of them would win nearly always."""
    params = init_params(CFG, jax.random.key(0))
    kernel_VD = params["head"]["kernel"] * 6
    return params | {"head": {"kernel": kernel_VD.at[USED:].multiply(40)}}


def sampled(mesh, params, cfg, sampling):
    setup = EngineSetup(cfg, mesh, (), 0, Room(4, 4096), jnp.float32, unrolled=True, chunk=8)
    asked = [Request(Name(Kind.RESPONSE, 0, g), PROMPT) for g in range(4)]
    return sample_all(engine_of(setup, params, 0, sampling), asked)


def reference(params, ids, temperature):
    """Log-probabilities `[T, USED]` in float64 over the ids that exist, and over those only."""
    every = dataclasses.replace(CFG, vocab_used=None)
    text_1T = jnp.asarray([[*PROMPT, *ids]], jnp.int32)
    logit_TV = np.asarray(logits(every, params, forward(every, params, text_1T))[0], np.float64)
    scaled_TU = logit_TV[len(PROMPT) - 1 : -1, :USED] / temperature
    return scaled_TU - np.logaddexp.reduce(scaled_TU, axis=-1)[:, None]


def in_a_bin(got):
    """One bin of one row that holds the prompt and the sampled ids."""
    none_T = np.zeros(NEW)
    segment = Segment(PROMPT, got.ids, False, none_T + 1, none_T, none_T, none_T, got.logp)
    size = bin_size(
        share=False, problems=1, group=1, at_once=1, row_devices=1, longest_prompt=len(PROMPT), longest_ids=NEW
    )
    bins = pack([segment], size, Terms())
    return jax.tree.map(lambda x: x[0] if np.ndim(x) else x, bins)


@pytest.mark.parametrize("sampling", [SamplingConfig(0.8, 0, 1.0, NEW), SamplingConfig(1.0, 200, 0.99, NEW)])
def test_sampler_and_trainer_know_only_the_ids_that_exist(mesh, params, sampling):
    for got in sampled(mesh, params, CFG, sampling):
        assert (got.ids < USED).all()
        logp_TU = reference(params, got.ids, sampling.temperature)
        own_T = logp_TU[np.arange(NEW), got.ids]
        np.testing.assert_allclose(got.logp, own_T, atol=2e-4)
        one = in_a_bin(got)
        logp, entropy = token_logps(Pass(CFG, jnp.float32, "none", sampling.temperature), params, one)
        np.testing.assert_allclose(logp[one.scored_ABT], own_T, atol=2e-4)
        np.testing.assert_allclose(entropy[one.scored_ABT], -(np.exp(logp_TU) * logp_TU).sum(-1), atol=2e-3)


def test_greedy_takes_none_of_them(mesh, params):
    got = sampled(mesh, params, CFG, SamplingConfig(0.0, 0, 1.0, NEW))[0]
    np.testing.assert_array_equal(got.ids, reference(params, got.ids, 1.0).argmax(-1))
    free = sampled(mesh, params, dataclasses.replace(CFG, vocab_used=None), SamplingConfig(0.0, 0, 1.0, NEW))[0]
    assert (free.ids >= USED).any()  # what the mask is for


def test_gradients_stay_finite_and_the_rows_beyond_get_none(mesh, params):
    one = in_a_bin(sampled(mesh, params, CFG, SamplingConfig(0.8, 0, 1.0, NEW))[0])

    def loss(params):
        logp, entropy = token_logps(Pass(CFG, jnp.float32, "none", 1e-3), params, one)
        return jnp.where(one.scored_ABT, logp + entropy, 0).sum()

    slope = jax.grad(loss)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert np.abs(slope["head"]["kernel"][:USED]).max() > 0 and not slope["head"]["kernel"][USED:].any()


def test_nothing_to_mask_is_no_work():
    hidden = jax.ShapeDtypeStruct((4, CFG.width), jnp.float32)
    params = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))

    def program(used):
        cfg = dataclasses.replace(CFG, vocab_used=used)
        return jax.jit(logits, static_argnums=0).lower(cfg, params, hidden).as_text()

    assert program(None) == program(CFG.vocab) != program(USED)


@pytest.fixture
def padded_folder(tmp_path):
    """The embedded model with 27 rows that no token has."""
    shutil.copytree(QUICKSTART, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    extra = np.zeros((27, 128), np.float32)
    tensors["model.embed_tokens.weight"] = np.concatenate([tensors["model.embed_tokens.weight"], extra])
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(raw | {"vocab_size": raw["vocab_size"] + 27}))
    return tmp_path / "model"


def test_a_run_finds_out_which_ids_exist(padded_folder):
    run = build.open_run(small(**{"model.path": str(padded_folder)}))
    assert run.policy.shape.vocab_used == run.policy.shape.vocab - 27 == len(run.policy.tokenizer.hf)
    assert run.policy.sampler.model == run.learner.model == run.policy.shape
    planned = [program for program in sampler_programs(run.policy) if "cfg" in program.static]
    assert planned and all(program.static["cfg"] == run.policy.shape for program in planned)
    assert build.open_run(small()).policy.shape.vocab_used is None
