"""How many rows and prefilled prompts a memory budget holds."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.config.options import SamplerMemory
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.sampling.prefixes import CHUNK
from cgrpo_jax.sampling.sizes import COUNTS, PREFILL_TOKENS, Fixed, fixed_sizes, prefill_size, ring_size

PREFILL_SHARE = 8  # of the memory for keys and values, one part in so many is for prompts that are not in a row


@dataclasses.dataclass(frozen=True)
class Room:
    """What fits a memory budget."""

    rows: int  # decoded together at most; 0: not even one on each device, or not what is fixed
    prompt_tokens: int  # of prefilled prompts that are not in a row, padding included
    fixed: Fixed | None = None

    def prefill_size(self, length: int) -> int:
        """To what a prompt of `length` tokens is padded."""
        return self.fixed.prefill_size(length) if self.fixed else prefill_size(length)

    def counts(self, size: int, least: int) -> tuple[int, ...]:
        """How many times `least` prompts of a size may be prefilled together."""
        most = max(1, self.prompt_tokens // (size * least))
        if not self.fixed:
            return tuple(count for count in COUNTS if count <= most)
        return (next(count for count in COUNTS if count <= min(most, max(1, PREFILL_TOKENS // size))),)


def row_devices(mesh: Mesh) -> int:
    """Devices that share the rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def token_bytes(model: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> int:
    """Of keys and values of a token, on each device that shares its heads."""
    heads = model.kv_heads // mesh.shape["tensor"] if model.kv_heads % mesh.shape["tensor"] == 0 else model.kv_heads
    return 2 * model.layers * heads * model.head_dim * jnp.dtype(dtype).itemsize


def room_for(model: ModelConfig, mesh: Mesh, cfg: SamplerMemory, slots: int, prompt: int, dtype: DTypeLike) -> Room:
    """Rows with rings for `slots` tokens, beside prefilled prompts, within the budget; or the rows that are fixed.

    Args:
      prompt: tokens of the longest one; room for one is always counted.
    """
    fixed, sharing = fixed_sizes(cfg), row_devices(mesh)
    tokens = int(cfg.kv_cache_mb * 2**20 / token_bytes(model, mesh, dtype) * sharing)  # that all devices hold
    longest = (fixed.prefills[-1] if fixed else prefill_size(prompt)) * sharing  # a prefill runs one on each device
    if fixed:
        left = tokens - sum(ring.slots * ring.rows for ring in fixed.rings)
        rows = sum(ring.rows for ring in fixed.rings) if left >= longest else 0
        return Room(rows, max(longest, min(left, 2 * longest)), fixed)  # few wait: their rows come free together
    most = 2 * longest if prompt > CHUNK else longest  # what is run in chunks lies beside its prefix
    prompt_tokens = max(most, min(PREFILL_TOKENS, tokens // PREFILL_SHARE))  # they lie on all these devices
    return Room(max(0, tokens - prompt_tokens) // (sharing * ring_size(slots)) * sharing, prompt_tokens)


def unfit(room: Room, sharing: int, prompt: int, new: int) -> str | None:
    """What is wrong with fixed sizes for prompts of `prompt` tokens and `new` ones after them.

    Args:
      sharing: devices that share the rows (`row_devices`).
    """
    fixed = room.fixed
    if fixed is None:
        return None
    if bad := [ring.rows for ring in fixed.rings if ring.rows % sharing]:
        return f"sampler.rings: {bad[0]} rows do not divide among the {sharing} devices that share them"
    if fixed.prefills[-1] < prompt - 1:
        return f"sampler.prefills: none holds a prompt of {prompt} tokens"
    if not any(fixed.fits(ring, prompt - 1, new) for ring in fixed.rings):
        return f"sampler.rings: none holds a prompt of {prompt} tokens and {new} new ones"
    return None
