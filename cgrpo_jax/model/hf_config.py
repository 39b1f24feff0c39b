"""`config.json` of Hugging Face <-> `ModelConfig`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.model.rope import LinearRope, Llama3Rope, RopeScaling, YarnRope, yarn_attention_factor

# What a family adds to the common decoder. A new dense family of this shape is one more record.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPES = {"linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope}  # by rope_type; fields as there
DEFAULT_THETA = 10_000.0  # of transformers, where a file names none: Llama 2's


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises CheckpointError where it holds no JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a Hugging Face folder needs it") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, not {type(raw).__name__}")
    return raw


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _size(path: pathlib.Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {key} = {value!r}: a positive whole number is needed")
    return value


def _number(path: pathlib.Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{path}: {key} = {value!r}: a number is needed")
    return float(value)


def _refuse(path: pathlib.Path, key: str, value: Any, allowed: str) -> None:
    raise CheckpointError(f"{path}: {key} = {value!r} is not supported (only {allowed})")


def _positive(path: pathlib.Path, table: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number greater than 0 of the rope's part of `config.json`; None or nothing is the default, if there is one."""
    value = table.get(key)
    if value is None and default is not None:
        return float(default)
    if value is None:
        raise CheckpointError(f"{path}: the rope scaling lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{path}: {key} = {value!r} of the rope: a number greater than 0 is needed")
    return float(value)


def _rope_theta(path: pathlib.Path, raw: Mapping[str, Any]) -> float:
    """One for the whole file: which of several counts depends on the version of transformers, so they must agree."""
    places = {"": raw} | {f"{key}.": raw.get(key) or {} for key in ("rope_parameters", "rope_scaling")}
    found = {f"{name}rope_theta": table["rope_theta"] for name, table in places.items() if "rope_theta" in table}
    given = {key: _positive(path, {key: value}, key) for key, value in found.items() if value is not None}
    if len(set(given.values())) > 1:
        several = ", ".join(f"{key} = {value:g}" for key, value in given.items())
        raise CheckpointError(f"{path}: {several}: which one counts depends on the version of transformers")
    if found and not given:
        raise CheckpointError(f"{path}: {next(iter(found))} is null")
    theta = next(iter(given.values()), DEFAULT_THETA)
    if raw.get("rope_scaling") and theta != DEFAULT_THETA and given.keys() == {"rope_parameters.rope_theta"}:
        raise CheckpointError(
            f"{path}: transformers lets rope_scaling replace rope_parameters and its rope_theta = {theta:g}; write "
            "rope_theta beside rope_scaling as well"
        )
    return theta


def _rope_scaling(path: pathlib.Path, raw: Mapping[str, Any]) -> RopeScaling | None:
    """That of `rope_scaling` where it is there, else of `rope_parameters`: transformers goes by the same order."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("type", kind) != kind:  # the older name; 4 goes by it, 5 by the newer
        _refuse(path, f"{key}.type", rope["type"], f"that of rope_type, {kind!r}")
    positions = raw.get("max_position_embeddings")
    outside, inside = raw.get("original_max_position_embeddings"), rope.get("original_max_position_embeddings")
    if kind in ("yarn", "llama3") and outside not in (None, inside):
        _refuse(path, "original_max_position_embeddings", outside, f"inside {key}, where it is {inside}")
    number = functools.partial(_positive, path, rope)
    if kind == "linear":
        return LinearRope(number("factor"))
    if kind == "llama3":
        original = int(number("original_max_position_embeddings"))
        return Llama3Rope(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
    if kind == "yarn":
        factor = number("factor")
        if not isinstance(rope.get("truncate", True), bool):
            _refuse(path, f"{key}.truncate", rope["truncate"], "true, false")
        computed = yarn_attention_factor(
            factor, *(number(key) if rope.get(key) else None for key in ("mscale", "mscale_all_dim"))
        )
        return YarnRope(
            factor=factor,
            original_max_position_embeddings=int(number("original_max_position_embeddings", positions)),
            attention_factor=number("attention_factor", computed),
            beta_fast=number("beta_fast", 32),
            beta_slow=number("beta_slow", 1),
            truncate=rope.get("truncate", True),
        )
    if kind != "default":
        _refuse(path, f"{key}.rope_type", kind, ", ".join(map(repr, ("default", *ROPES))))
    return None


def _check_rope(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    """Refuses what is no rope of one kind over the whole head in all layers."""
    if raw.get("partial_rotary_factor") not in (None, 1):
        _refuse(path, "partial_rotary_factor", raw["partial_rotary_factor"], "1")
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            _refuse(path, key, rope, "an object")
        if rope.get("partial_rotary_factor") not in (None, 1):
            _refuse(path, f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "1")
        for name, value in rope.items():
            if isinstance(value, dict):
                _refuse(path, f"{key}.{name}", value, "one rope for all layers")


def _check_layers(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    """Refuses what makes other layers of the decoder than those here."""
    if raw.get("hidden_act", "silu") != "silu":
        _refuse(path, "hidden_act", raw["hidden_act"], "'silu'")
    biased = () if raw["model_type"] == "qwen2" else ("attention_bias",)
    for key in ("use_sliding_window", "mlp_bias", *biased):
        if raw.get(key):
            _refuse(path, key, raw[key], "false")
    kinds = raw.get("layer_types") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind != "full_attention":
            _refuse(path, "layer_types", kind, "'full_attention'")


def config_from_hf(folder: str | os.PathLike) -> ModelConfig:
    """Reads `config.json`, in the form of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    YaRN stretches the positions that a model takes to `factor` times the original ones, even where
    `max_position_embeddings` was left as it was (the Qwen model cards leave it).
    """
    path = pathlib.Path(folder) / "config.json"
    raw = read_json(path)

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise CheckpointError(f"{path}: key {key!r} is missing")
        return raw[key]

    def size(key: str, default: Any = None) -> int:
        return _size(path, key, need(key) if default is None else raw.get(key) or default)

    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        _refuse(path, "model_type", family, ", ".join(FAMILIES))
    _check_layers(path, raw)
    _check_rope(path, raw)
    heads, width, positions = size("num_attention_heads"), size("hidden_size"), size("max_position_embeddings")
    head_dim, scaling = size("head_dim", width // heads), _rope_scaling(path, raw)
    if head_dim % 2:
        _refuse(path, "head_dim", head_dim, "even ones: the rope turns pairs")
    if isinstance(scaling, YarnRope):
        positions = max(positions, int(scaling.factor * scaling.original_max_position_embeddings))
    return ModelConfig(
        family=family,
        vocab=size("vocab_size"),
        width=width,
        mlp_width=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=head_dim,
        rope_theta=_rope_theta(path, raw),
        rope_scaling=scaling,
        max_positions=positions,
        norm_eps=_number(path, "rms_norm_eps", need("rms_norm_eps")),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        **FAMILIES[family],
    )


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    return {"rope_type": {record: kind for kind, record in ROPES.items()}[type(scaling)]} | dataclasses.asdict(scaling)


def config_to_hf(cfg: ModelConfig, eos_ids: tuple[int, ...], pad_id: int) -> dict[str, Any]:
    """A `config.json` for a model that was made here and has none yet; both rope forms are written."""
    rope = _scaling_to_hf(cfg.rope_scaling)
    scaling = {} if cfg.rope_scaling is None else {"rope_scaling": rope}
    return {
        "architectures": [ARCHITECTURES[cfg.family]], "model_type": cfg.family, "dtype": "float32",
        "vocab_size": cfg.vocab, "hidden_size": cfg.width, "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers, "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim, "hidden_act": "silu", "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions, "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta, **scaling, "rope_parameters": {**rope, "rope_theta": cfg.rope_theta},
        "eos_token_id": list(eos_ids), "pad_token_id": pad_id,
    }  # fmt: skip
