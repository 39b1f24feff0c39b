"""`config.json` of Hugging Face <-> `ModelConfig`."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from cgrpo_jax.model.decoder import Llama3Rope, ModelConfig

# What a family adds to the common decoder. A new dense family of this shape is one more record.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file and the key or tensor."""


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


def config_from_hf(folder: str | os.PathLike) -> ModelConfig:
    """Reads `config.json`, in the form of transformers 4 (`rope_theta`) or 5 (`rope_parameters`)."""
    path = pathlib.Path(folder) / "config.json"
    raw = read_json(path)

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise CheckpointError(f"{path}: key {key!r} is missing")
        return raw[key]

    def size(key: str, default: Any = None) -> int:
        return _size(path, key, need(key) if default is None else raw.get(key) or default)

    def refuse(key: str, value: Any, allowed: str) -> None:
        raise CheckpointError(f"{path}: {key} = {value!r} is not supported (only {allowed})")

    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        refuse("model_type", family, ", ".join(FAMILIES))
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", raw["hidden_act"], "'silu'")
    for key in ("use_sliding_window", "mlp_bias") + (() if family == "qwen2" else ("attention_bias",)):
        if raw.get(key):
            refuse(key, raw[key], "false")
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise CheckpointError(f"{path}: neither 'rope_theta' nor 'rope_parameters.rope_theta' is there")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if rope_type == "llama3":
        try:
            scaling = Llama3Rope(
                float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            )  # fmt: skip
        except KeyError as error:
            raise CheckpointError(f"{path}: llama3 rope scaling lacks {error}") from None
    elif rope_type != "default":
        refuse("rope type", rope_type, "'default', 'llama3'")
    heads, width = size("num_attention_heads"), size("hidden_size")
    return ModelConfig(
        family=family,
        vocab=size("vocab_size"),
        width=width,
        mlp_width=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", width // heads),
        rope_theta=_number(path, "rope_theta", theta),
        rope_scaling=scaling,
        max_positions=size("max_position_embeddings"),
        norm_eps=_number(path, "rms_norm_eps", need("rms_norm_eps")),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        **FAMILIES[family],
    )


def config_to_hf(cfg: ModelConfig, eos_ids: tuple[int, ...], pad_id: int) -> dict[str, Any]:
    """A `config.json` for a model that was made here and has none yet; both rope forms are written."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.rope_scaling.factor,
            "low_freq_factor": cfg.rope_scaling.low_freq_factor,
            "high_freq_factor": cfg.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": cfg.rope_scaling.original_max_positions,
        }
    return {
        "architectures": [ARCHITECTURES[cfg.family]], "model_type": cfg.family, "dtype": "float32",
        "vocab_size": cfg.vocab, "hidden_size": cfg.width, "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers, "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim, "hidden_act": "silu", "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions, "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta, "rope_parameters": rope,
        "eos_token_id": list(eos_ids), "pad_token_id": pad_id,
    }  # fmt: skip
