"""The beginning of a prompt that is prefilled on its own: what siblings share is computed once, what is long in chunks.

The refinement prompts of a problem begin alike. Their common beginning, rounded down to few sizes, is prefilled like a
prompt, and each goes on behind its keys and values. Which prompts share it follows from the requests that are asked for
together, never from which of them find a row first.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from cgrpo_jax.records import Request
from cgrpo_jax.sampling.sizes import prefill_size

LEAST = 64  # tokens that are worth a program of their own
CHUNK = 2048  # tokens of a long prompt that are run through the model at once

Ids = tuple[int, ...]


def prefix_sizes(length: int) -> list[int]:
    """Where a prompt of `length` tokens may be cut: 64, 96, 128, 192, ... 2048, 4096, 6144, ..., shorter than it."""
    powers = [LEAST << i for i in range((CHUNK // LEAST).bit_length())]
    halves = [power * 3 // 2 for power in powers[:-1]]
    sizes = sorted(powers + halves) + list(range(2 * CHUNK, length, CHUNK))
    return [size for size in sizes if size < length]


def common(prompts: Iterable[Ids]) -> int:
    """How many ids all of them begin with."""
    first, last = min(ordered := list(prompts)), max(ordered)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def shared_prefixes(requests: Sequence[Request]) -> dict[Ids, int]:
    """Of prompts that begin with what others of their problem begin with, how many tokens to compute once.

    A prompt's last id does not count: it is not prefilled.

    Args:
      requests: asked for together.
    """
    of_problem: dict[tuple[int, ...], dict[Ids, None]] = collections.defaultdict(dict)
    for request in requests:
        kind, problem, _, round_, task = request.name
        of_problem[kind, problem, round_, task][tuple(request.prompt_ids)] = None
    found: dict[Ids, int] = {}
    for prompts in of_problem.values():
        least = min(len(ids) - 1 for ids in prompts)
        if len(prompts) > 1 and (sizes := prefix_sizes(min(least, 1 + common(prompts)))):
            whole = sum(prefill_size(len(ids) - 1) for ids in prompts)
            apart = sizes[-1] + sum(prefill_size(len(ids) - 1 - sizes[-1]) for ids in prompts)
            if apart < whole:
                found |= dict.fromkeys(prompts, sizes[-1])
    return found


def cut(length: int, shared: int) -> int:
    """How many tokens of a prompt lie before the part that is run last, one of `prefix_sizes`; 0: it is run at once.

    Args:
      shared: with siblings, of `shared_prefixes`.
    """
    return shared if length - shared <= CHUNK else (length - 1) // CHUNK * CHUNK
