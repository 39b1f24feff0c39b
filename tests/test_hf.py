"""Hugging Face folders in and out: bit-equal round trips, total mapping, errors that name the tensor."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import QUICKSTART, tiny_config
from plain_forward import forward
from safetensors.numpy import load_file, save_file

from cgrpo_jax import convert
from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.decoder import init_params, logits
from cgrpo_jax.model.hf import both_rope_forms, both_tokenizer_forms
from cgrpo_jax.model.hf_config import config_from_hf, config_to_hf


def load(folder, mesh, dtype=None):
    cfg = config_from_hf(folder)
    return cfg, hf.load_params(folder, cfg, functools.partial(sharding.param_sharding, mesh), dtype)


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def folder(request, tmp_path):
    """A folder with random bfloat16 weights, tokenizer and chat template."""
    cfg = tiny_config(request.param, tie_embeddings=request.param == "llama")
    shutil.copytree(QUICKSTART, tmp_path / "side")
    raw = config_to_hf(cfg, (2,), 0)
    (tmp_path / "side/config.json").write_text(json.dumps(raw))
    hf.save_hf(tmp_path / "model", cfg, init_params(cfg, jax.random.key(0)), tmp_path / "side", ml_dtypes.bfloat16)
    return tmp_path / "model"


def tensors(folder):
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def assert_same_folder(original, copy):
    expected, found = tensors(original), tensors(copy)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and array.tobytes() == found[name].tobytes(), name
    for side in ("config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (original / side).read_bytes() == (copy / side).read_bytes()


def test_round_trip_is_bit_equal(folder, tmp_path):
    convert.convert(str(folder), "orbax", str(tmp_path / "orbax"))
    convert.convert(str(tmp_path / "orbax"), "hf", str(tmp_path / "back"))
    assert_same_folder(folder, tmp_path / "back")
    assert next(iter(tensors(folder).values())).dtype == ml_dtypes.bfloat16


def test_layers_of_several_dtypes_are_read_exactly(folder, tmp_path, mesh):
    """One array holds all layers, in the widest of their dtypes: not in that of the first one, which would round."""
    (file,) = folder.glob("*.safetensors")
    values = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    values[name] = values[name].astype(np.float32) + np.float32(2**-20)
    save_file(values, file, metadata={"format": "pt"})
    _, params = load(folder, mesh)
    kernel = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    assert kernel.dtype == np.float32 and (kernel[1] == values[name]).all()
    assert params["layers"]["mlp"]["down"]["kernel"].dtype == ml_dtypes.bfloat16


def test_sharded_files_in_and_out(folder, tmp_path):
    convert.convert(str(folder), "hf", str(tmp_path / "sharded"), shard_gb=2e-5)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "sharded/model.safetensors").exists()
    convert.convert(str(tmp_path / "sharded"), "hf", str(tmp_path / "whole"))
    assert_same_folder(folder, tmp_path / "whole")


def test_export_opens_in_transformers(folder, tmp_path, mesh, rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert.convert(str(folder), "hf", str(tmp_path / "out"), dtype="float32", shard_gb=2e-5)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == (QUICKSTART / "chat_template.jinja").read_text()
    _, params = load(folder, mesh, jnp.float32)
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), params["embed"]["embedding"])
    gate = model.model.layers[1].mlp.gate_proj.weight
    np.testing.assert_array_equal(gate.detach().numpy(), params["layers"]["mlp"]["gate"]["kernel"][1])
    assert gate.dtype == torch.float32


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 20_000.0}


def of_transformers_5(folder):
    """The embedded model as 5 writes it: one form of the rope, a class that 4 has not, special tokens as a list."""
    shutil.copytree(QUICKSTART, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps(raw | {"rope_parameters": YARN}))
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    raw.pop("model_input_names")
    raw |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<|im_start|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw | {"is_local": True, "local_files_only": False}))
    return folder


def test_an_export_generates_in_the_oldest_transformers(tmp_path, mesh):
    """4.56 knows neither `rope_parameters` nor the class, and makes token types that `generate` refuses."""
    source = of_transformers_5(tmp_path / "model")
    convert.convert(str(source), "hf", str(tmp_path / "out"))
    written, tokenizer = (
        json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("config", "tokenizer_config")
    )
    assert written["rope_theta"] == 20_000 and written["rope_parameters"] == YARN
    assert written["rope_scaling"] == {key: value for key, value in YARN.items() if key != "rope_theta"}
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in tokenizer
    assert config_from_hf(tmp_path / "out") == config_from_hf(source)

    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (kind.from_pretrained(tmp_path / "out") for kind in (AutoTokenizer, AutoModelForCausalLM))
    turn = [{"role": "user", "content": "What is 2+3?"}] * 30  # some hundred tokens
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > 302
    cfg, params = load(tmp_path / "out", mesh)
    ours = logits(cfg, params, forward(cfg, params, jnp.asarray(inputs["input_ids"].numpy(), jnp.int32)))
    np.testing.assert_allclose(ours, model(**inputs).logits.detach().numpy(), atol=1e-3)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_side_files_that_both_read_stay_as_they_are(tmp_path, name):
    """Within the project every side file does: an Orbax folder keeps what 4 would not read."""
    source = of_transformers_5(tmp_path / "model")
    convert.convert(str(source), "orbax", str(tmp_path / "orbax"))
    assert (tmp_path / "orbax/hf" / name).read_bytes() == (source / name).read_bytes()
    convert.convert(str(QUICKSTART), "hf", str(tmp_path / "out"))
    assert (tmp_path / "out" / name).read_bytes() == (QUICKSTART / name).read_bytes()


def test_only_what_is_lacking_is_added():
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    both = old | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert both_rope_forms(old) == old and both_rope_forms(both) == both and both_rope_forms({}) == {}
    assert both_rope_forms({"rope_parameters": both["rope_parameters"]}).keys() == both.keys()
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert both_rope_forms(plain) == plain | {"rope_theta": 5e5}
    assert both_rope_forms({"rope_scaling": old["rope_scaling"] | {"rope_theta": 5e5}})["rope_theta"] == 5e5
    llama = {"tokenizer_class": "LlamaTokenizerFast", "extra_special_tokens": {"image": "<i>"}}
    assert both_tokenizer_forms(llama) == llama and both_tokenizer_forms({}) == {}


def test_what_transformers_saves_is_read(tmp_path, mesh):
    """Its own sharded export, including the lm_head it may leave out or keep."""
    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(QUICKSTART)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    cfg, params = load(tmp_path / "saved", mesh)
    _, original = load(QUICKSTART, mesh)
    assert cfg.tie_embeddings and len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, params, original)


def edit(folder, change):
    path = folder / "model.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"),
        (lambda c: c.update({"model.extra": np.zeros(3, np.float32)}), "model.extra"),
        (lambda c: c.update({"model.norm.weight": np.zeros(3, np.float32)}), r"model\.norm\.weight.*\(3,\)"),
        (lambda c: c.update({"lm_head.weight": c["model.embed_tokens.weight"] + 1}), "lm_head.weight differs"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, mesh, family, change, words):
    shutil.copytree(QUICKSTART, tmp_path / "model")
    edit(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "model", mesh)
    with pytest.raises(CheckpointError, match=words):
        convert.convert(str(tmp_path / "model"), "orbax", str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing half-written


def test_a_tied_head_that_agrees_and_rope_buffers_are_accepted(tmp_path, mesh):
    shutil.copytree(QUICKSTART, tmp_path / "model")
    edit(
        tmp_path / "model",
        lambda c: c.update(
            {
                "lm_head.weight": c["model.embed_tokens.weight"].copy(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    _, params = load(tmp_path / "model", mesh)
    _, original = load(QUICKSTART, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, original)


def test_truncated_missing_and_foreign_files(tmp_path, mesh):
    shutil.copytree(QUICKSTART, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        load(tmp_path / "model", mesh)
    path.rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        load(tmp_path / "model", mesh)
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load(tmp_path / "model", mesh)
    for table in (3, None, ["a"], {"model.norm.weight": 3}):
        (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        with pytest.raises(CheckpointError, match=r"index\.json: weight_map is no table from tensors to files"):
            load(tmp_path / "model", mesh)


def test_an_existing_result_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        convert.convert(str(QUICKSTART), "hf", str(tmp_path / "out"))
    assert (tmp_path / "out/precious").read_text() == "x"


def test_a_failing_export_leaves_nothing(tmp_path, mesh):
    cfg, params = load(QUICKSTART, mesh)
    with pytest.raises(CheckpointError):
        hf.save_hf(tmp_path / "out", cfg, params, tmp_path)  # the side folder has no config.json
    assert list(tmp_path.iterdir()) == []


def test_real_checkpoint_round_trip(smollm2, tmp_path):
    convert.convert(str(smollm2), "orbax", str(tmp_path / "orbax"))
    convert.convert(str(tmp_path / "orbax"), "hf", str(tmp_path / "back"))
    first, second = tensors(smollm2), tensors(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_each_parameter_has_one_row_and_one_sharding_rule(mesh):
    for family in ("llama", "qwen2", "qwen3"):
        cfg = tiny_config(family)
        names = [name for source in hf.sources(cfg).values() for name in source.names]
        assert len(names) == len(set(names))
        sharding.param_shardings(mesh, hf.abstract_params(cfg))
    with pytest.raises(ValueError, match="0 sharding rules"):
        sharding.param_spec("layers/attn/w/kernel", (2, 8, 8), mesh)
