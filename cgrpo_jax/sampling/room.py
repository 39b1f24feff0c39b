"""What fits an engine's memory, and the few sizes to which lengths and counts are rounded up.

Each size is a program to compile. By default rows, slots and prefills grow with the requests, as far as the memory
goes. A configuration may fix the sizes instead (`Fixed`), so that programs are few and known before step 1.

The refinement prompts of a problem begin alike: their common prefix is prefilled once. A long prompt is prefilled in
chunks. Which prompts share a prefix follows from which requests are made together, never from which of them finds a
row first.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.config.options import SamplerMemory
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.records import Request

PREFILL_COUNTS = (64, 16, 4, 1)  # prompts that are prefilled together
PREFILL_TOKENS = 4096  # of prompts that are prefilled together, padding included
PREFILL_SHARE = 8  # one part in so many of the memory for keys and values is for prompts that are in no row yet
PREFILL_CHUNK = 2048  # tokens of a long prompt that are run through the model at once
LEAST_PREFIX = 64  # tokens that are worth a program of their own

Ids = tuple[int, ...]


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def prefill_size(length: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, ... that holds `length` tokens: two sizes an octave."""
    power = max(64, power_of_two(length))
    return power * 3 // 4 if length <= power * 3 // 4 and power > 64 else power


def ring_size(length: int) -> int:
    """The smallest of 128, 256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, ... slots that holds `length` tokens."""
    step = 128 if length <= 768 else power_of_two(length) // 4
    return -(-length // step) * step


def row_sizes(rows: int, least: int) -> list[int]:
    """The sizes to which `rows` rows may shrink: 8, 32, 128, ... times `least`, up to a quarter of them; and `rows`."""
    sizes = [8 * least]
    while sizes[-1] <= rows // 4:
        sizes.append(4 * sizes[-1])
    return [*sizes[:-1], rows]


def grown_rows(wanted: int, least: int, most: int) -> int:
    """The smallest of 1, 2, 4, ... times `least` that holds `wanted` rows, and at most `most`."""
    return min(most, least * power_of_two(-(-wanted // least)))


def split_count(count: int, sizes: tuple[int, ...]) -> list[int]:
    """Few of the sizes (largest first) whose sum is `count`, or more where the smallest does not divide the rest."""
    parts = []
    while count > 0:
        parts.append(next((size for size in sizes if size <= count), sizes[-1]))
        count -= parts[-1]
    return parts


class Ring(NamedTuple):
    """A number of rows whose ring buffers have the same number of slots."""

    slots: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Sizes that a configuration fixes: the rings, and the lengths to which prompts are padded; the smallest first."""

    rings: tuple[Ring, ...]
    prefills: tuple[int, ...]

    def fits(self, ring: Ring, prompt: int, limit: int) -> bool:
        """Whether a row of this ring holds a prefilled prompt of `prompt` tokens and `limit` tokens after it."""
        return prompt + limit <= ring.slots and self.prefill_size(prompt) <= ring.slots

    def prefill_size(self, length: int) -> int:
        return next(size for size in self.prefills if size >= length)


def fixed_sizes(cfg: SamplerMemory) -> Fixed | None:
    """The sizes of `sampler.rings` and `sampler.prefills`; None where both are empty.

    Raises:
      ValueError: they cannot be read; the message says how they are written.
    """
    if not cfg.rings and not cfg.prefills:
        return None
    try:
        pairs = [tuple(map(int, part.split("x"))) for part in cfg.rings.split(",")]
        rings = tuple(sorted(Ring(slots, rows) for slots, rows in pairs))
        prefills = tuple(sorted(map(int, cfg.prefills.split(","))))
    except ValueError:
        rings, prefills = (), ()
    if not rings or min(map(min, rings)) < 1 or min(prefills) < 1:
        raise ValueError(
            f"sampler.rings = {cfg.rings!r}, sampler.prefills = {cfg.prefills!r}: slots x rows, and numbers of tokens, "
            "as in '8192x256,16384x32' and '1024,9216'; or both empty"
        )
    return Fixed(rings, prefills)


@dataclasses.dataclass(frozen=True)
class Room:
    """What fits the memory of an engine."""

    rows: int  # decoded together at most; 0: not one on each device fits, or not the rings that are fixed
    prompt_tokens: int  # of prefilled prompts that are in no row yet, padding included
    fixed: Fixed | None = None

    def prefill_size(self, length: int) -> int:
        """The length to which a prompt of `length` tokens is padded."""
        return self.fixed.prefill_size(length) if self.fixed else prefill_size(length)

    def counts(self, size: int, least: int) -> tuple[int, ...]:
        """How many times `least` prompts of a size may be prefilled together."""
        most = max(1, self.prompt_tokens // (size * least))
        if not self.fixed:
            return tuple(count for count in PREFILL_COUNTS if count <= most)
        return (next(count for count in PREFILL_COUNTS if count <= min(most, max(1, PREFILL_TOKENS // size))),)


def row_devices(mesh: Mesh) -> int:
    """The number of devices among which the rows are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def room_for(model: ModelConfig, mesh: Mesh, cfg: SamplerMemory, slots: int, prompt: int, dtype: DTypeLike) -> Room:
    """The rows with rings for `slots` tokens that fit the memory beside prefilled prompts; or the rows that are fixed.

    Args:
      prompt: tokens of the longest prompt. Memory for one of them on each device is always set aside.
    """
    fixed, sharing, parts = fixed_sizes(cfg), row_devices(mesh), mesh.shape["tensor"]
    heads = model.kv_heads // parts if model.kv_heads % parts == 0 else model.kv_heads  # on each device
    token_bytes = 2 * model.layers * heads * model.head_dim * jnp.dtype(dtype).itemsize
    tokens = int(cfg.kv_cache_mb * 2**20 / token_bytes * sharing)  # that all devices hold
    longest = (fixed.prefills[-1] if fixed else prefill_size(prompt)) * sharing  # one prompt on each device
    if fixed:
        left = tokens - sum(ring.slots * ring.rows for ring in fixed.rings)
        rows = sum(ring.rows for ring in fixed.rings) if left >= longest else 0
        return Room(rows, max(longest, min(left, 2 * longest)), fixed)  # few prompts wait: rows come free together
    most = 2 * longest if prompt > PREFILL_CHUNK else longest  # a chunk is held beside its prefix
    prompt_tokens = max(most, min(PREFILL_TOKENS, tokens // PREFILL_SHARE))
    return Room(max(0, tokens - prompt_tokens) // (sharing * ring_size(slots)) * sharing, prompt_tokens)


def unfit(room: Room, sharing: int, prompt: int, new: int) -> str | None:
    """What is wrong with fixed sizes for prompts of `prompt` tokens and `new` tokens after them; None: nothing.

    Args:
      sharing: of `row_devices`.
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


# ---- Prefixes ----
def prefix_sizes(length: int) -> list[int]:
    """Lengths of a prefix of a prompt of `length` tokens: those of 64, 96, 128, ... 2048, 4096, 6144, ... below it."""
    powers = [LEAST_PREFIX << i for i in range((PREFILL_CHUNK // LEAST_PREFIX).bit_length())]
    halves = [power * 3 // 2 for power in powers[:-1]]
    sizes = sorted(powers + halves) + list(range(2 * PREFILL_CHUNK, length, PREFILL_CHUNK))
    return [size for size in sizes if size < length]


def shared_prefixes(requests: Sequence[Request]) -> dict[Ids, int]:
    """Prompt -> length of the prefix that it shares with others of its problem, where sharing saves computation.

    The last id of a prompt does not count: decoding feeds it, so it is not prefilled.

    Args:
      requests: those that are made together.
    """
    of_problem: dict[tuple[int, ...], dict[Ids, None]] = collections.defaultdict(dict)
    for request in requests:
        kind, problem, _, round_, task = request.name
        of_problem[kind, problem, round_, task][tuple(request.prompt_ids)] = None
    found: dict[Ids, int] = {}
    for prompts in of_problem.values():
        least, ends = min(len(ids) - 1 for ids in prompts), (min(prompts), max(prompts))
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
        if len(prompts) > 1 and (sizes := prefix_sizes(min(least, 1 + common))):
            whole = sum(prefill_size(len(ids) - 1) for ids in prompts)
            apart = sizes[-1] + sum(prefill_size(len(ids) - 1 - sizes[-1]) for ids in prompts)
            if apart < whole:
                found |= dict.fromkeys(prompts, sizes[-1])
    return found


def cut(length: int, shared: int) -> int:
    """The length of the prefix after which the last part of a prompt is prefilled; 0: the prompt is prefilled at once.

    Args:
      length: tokens of the prompt that are prefilled.
      shared: with others, of `shared_prefixes`; 0: nothing.
    """
    return shared if length - shared <= PREFILL_CHUNK else (length - 1) // PREFILL_CHUNK * PREFILL_CHUNK
