"""The engine of one model: it is given requests, decodes a chunk of tokens at a time, and returns what has ended.

The caller owns the loop (`rollout.stories.run_stories`). Which request enters which row is decided between two chunks,
by the order of the requests and the lengths of what has ended, never by clocks. The sampled tokens do not depend on it,
for the random number of a token is a function of the name of its sequence (`draw.row_keys`).
"""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cgrpo_jax.config.options import SamplingConfig
from cgrpo_jax.model import sharding
from cgrpo_jax.model.decoder import Params, unstack
from cgrpo_jax.records import Done, Name, Request
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.draw import step_key
from cgrpo_jax.sampling.pool import Draft, EngineSetup, Pool, Stats
from cgrpo_jax.sampling.room import Ids, cut, shared_prefixes, split_count


class RequestError(ValueError):
    """A request that no row can hold."""


# ---- Weight sync ----
class Weights(NamedTuple):
    """A model's parameters in the dtype and layout of its engine. Arrays that need no change are not copied."""

    decoding: Params
    prefilling: Params


def weights_of(setup: EngineSetup, params: Params) -> Weights:
    """The weights of an engine, made from the parameters of training."""
    layout: dict[str, Any] = {"dtype": setup.dtype, "mesh": setup.mesh}
    decoding, stale = params, stale_weights(params, unrolled=setup.unrolled, **layout)
    if stale:
        sync = make_sync(stale, unrolled=setup.unrolled, **layout)
        decoding = params | sync(stale, dtype=setup.dtype, unrolled=setup.unrolled)
    return Weights(decoding, weights_to_prefill(params, decoding, **layout))


def weights_to_prefill(params: Params, decoding: Params, *, dtype: DTypeLike, mesh: Mesh) -> Params:
    """The parameters where they have the dtype and layout of the engine, else the weights for decoding.

    A loop over stacked layers, as the parameters have them, compiles sooner. Takes arrays or abstract ones.
    """
    return decoding if stale_weights(params, dtype=dtype, mesh=mesh, unrolled=False) else params


def stale_weights(params: Params, *, dtype: DTypeLike, mesh: Mesh, unrolled: bool) -> Params:
    """The subtrees of the parameters (arrays or abstract ones) of which the engine needs other arrays."""

    def differs(key_path: tuple, leaf: jax.Array) -> bool:
        moves = not leaf.sharding.is_equivalent_to(weight_sharding(mesh, key_path, leaf), leaf.ndim)
        moves |= isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh != mesh
        return leaf.dtype != dtype or moves or (unrolled and sharding.path_of(key_path).startswith("layers/"))

    changes = jax.tree_util.tree_map_with_path(differs, params)
    return {name: tree for name, tree in params.items() if jax.tree.reduce(operator.or_, changes[name])}


def weight_sharding(mesh: Mesh, key_path: tuple, leaf: Any) -> NamedSharding:
    """The sharding of a weight of the engine, whose layers may be a tuple (`unstack`)."""
    one_layer = len(key_path) > 1 and isinstance(key_path[1], jax.tree_util.SequenceKey)
    names = key_path[:1] + key_path[2:] if one_layer else key_path
    spec = sharding.sampler_spec(sharding.path_of(names), (0, *leaf.shape) if one_layer else leaf.shape, mesh)
    return NamedSharding(mesh, P(*spec[1:]) if one_layer else spec)


def synced(params: Params, *, dtype: DTypeLike, unrolled: bool) -> Params:
    """The parameters in the dtype of the engine, and with a tree for each layer where these are `unrolled`."""
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    if unrolled and "layers" in weights:
        weights |= {"layers": unstack(weights["layers"])}
    return weights


def make_sync(params: Params, *, dtype: DTypeLike, mesh: Mesh, unrolled: bool) -> Any:
    """The program of `synced` for parameters (arrays or abstract ones), from their mesh to that of the engine.

    Both meshes have the same devices in the same order. Parameters of the same shapes share one compiled program.
    """
    made = jax.eval_shape(functools.partial(synced, dtype=dtype, unrolled=unrolled), params)
    shardings = jax.tree_util.tree_map_with_path(functools.partial(weight_sharding, mesh), made)
    return jax.jit(synced, static_argnames=("dtype", "unrolled"), out_shardings=shardings)


# ---- Engine ----
class Engine:
    """The rows of one model at one step, and the queue of requests that wait for a row.

    It holds the weights and the KV cache: drop it before the update, which needs the memory.

    Args:
      step: names the random numbers, with the seed of `setup`.
      sampling: how tokens are drawn.
    """

    def __init__(self, setup: EngineSetup, weights: Weights, step: int, sampling: SamplingConfig):
        self.setup, self.weights, self.sampling = setup, weights, sampling
        self.key = step_key(np.uint32(setup.seed), np.int32(step))
        self.stats = Stats()
        self.queue: collections.deque[Draft] = collections.deque()
        self.under_way: set[Name] = set()
        # Of a prompt, or of a prefix of prompts (`_prefix`): who still waits for its keys and values; these, once they
        # are computed; and the length of the prefix that it shares with its siblings (`shared_prefixes`).
        self.waiting: collections.Counter[Ids] = collections.Counter()
        self.prompts: dict[Ids, programs.KVCache] = {}
        self.shared: dict[Ids, int] = {}
        fixed = setup.room.fixed
        self.pools = [Pool(setup, ring) for ring in (fixed.rings if fixed else (None,))]

    @property
    def busy(self) -> bool:
        """Whether any request waits or is decoded."""
        return bool(self.queue) or any(pool.live for pool in self.pools)

    def submit(self, requests: Sequence[Request]) -> None:
        """Puts requests at the end of the queue.

        Raises:
          RequestError: a prompt leaves no room for a single token, no ring holds it, or another request of that name
            has not ended.
        """
        most = self.setup.model.max_positions
        if self.setup.room.fixed is None:
            self.shared |= {ids: n for ids, n in shared_prefixes(requests).items() if ids not in self.waiting}
        for request in requests:
            limit = self.sampling.max_new_tokens if request.limit is None else request.limit
            length = len(request.prompt_ids)
            who = f"{request.name.kind.name.lower()} of problem {request.name.problem}"
            draft = Draft(request, min(limit, most - length))
            if not 0 < length < most:
                raise RequestError(f"{who}: a prompt of {length} tokens leaves no room in the model's {most} positions")
            if not any(pool.holds(draft) for pool in self.pools):
                raise RequestError(f"{who}: no ring of sampler.rings holds {length} tokens and {draft.limit} new ones")
            if request.name in self.under_way:
                raise RequestError(f"{who}: {tuple(map(int, request.name))} is asked for while it is under way")
            self.under_way.add(request.name)
            self.queue.append(draft)
            self._wait_for(tuple(request.prompt_ids))

    def _wait_for(self, ids: Ids) -> None:
        """Counts one more that waits for a prompt: a request, or a prompt of which it is the prefix."""
        self.waiting[ids] += 1
        if self.waiting[ids] == 1 and (prefix := self._prefix(ids)):
            self._wait_for(prefix)

    def _let_go(self, ids: Ids, count: int) -> None:
        """So many do not wait for a prompt any longer; it is dropped once nobody waits for it."""
        self.waiting[ids] -= count
        if self.waiting[ids]:
            return
        prefix = self._prefix(ids)
        del self.waiting[ids]
        self.prompts.pop(ids, None)
        self.shared.pop(ids, None)
        if prefix:
            self._let_go(prefix, 1)

    def _cut(self, ids: Ids) -> int:
        """Length of the prefix that is prefilled before the rest of a prompt; 0: none, or there is no room for it."""
        room, length = self.setup.room, len(ids) - 1
        before = 0 if room.fixed else cut(length, self.shared.get(ids, 0))
        return before if before + room.prefill_size(length) <= room.prompt_tokens else 0

    def _prefix(self, ids: Ids) -> Ids:
        """The prefix of a prompt as a prompt of its own; (): none. Its last id is arbitrary: it is not prefilled."""
        before = self._cut(ids)
        return (*ids[:before], 0) if before else ()

    def advance(self, more_may_come: bool) -> Done:
        """Fills free rows from the queue and decodes one chunk of tokens in all rows.

        Args:
          more_may_come: rows that come free may be needed, so they are kept though the queue is empty.

        Returns:
          The requests that ended in this chunk, with their completions.
        """
        for pool in self.pools:
            pool.fit(list(self.queue))
        self._admit()
        others_wait = bool(self.queue) or more_may_come
        live = [pool for pool in self.pools if pool.live]
        chunks = [pool.decode(self.weights.decoding, self.sampling, others_wait) for pool in live]
        done = [item for pool, chunk in zip(live, chunks, strict=True) for item in pool.book(chunk, self.stats)]
        self.under_way -= {request.name for request, _ in done}
        return done

    def _admit(self) -> None:
        """Gives free rows to waiting requests, prompt by prompt; a prompt that is not there yet is prefilled first."""
        entering = self._placed()
        for ids in [ids for ids in entering if ids in self.prompts]:
            self._enter(ids, entering.pop(ids))
        for part in self._parts(list(entering)):
            self._prefill(part)
            for ids in part:
                self._enter(ids, entering[ids])

    def _placed(self) -> dict[Ids, list[tuple[Pool, int, Draft]]]:
        """Takes from the queue, in order, the requests that find a free row, each in its smallest ring; by prompt."""
        free, placed = [pool.free for pool in self.pools], collections.defaultdict(list)
        left: collections.deque[Draft] = collections.deque()
        while self.queue and any(free):
            draft = self.queue.popleft()
            where = next((i for i, pool in enumerate(self.pools) if free[i] and pool.holds(draft)), None)
            if where is None:
                left.append(draft)
            else:
                placed[tuple(draft.request.prompt_ids)].append((self.pools[where], free[where].pop(0), draft))
        self.queue.extendleft(reversed(left))
        return placed

    def _parts(self, prompts: Sequence[Ids]) -> list[list[Ids]]:
        """The prompts in batches to be prefilled together: of the same padded sizes, as many as there is room for."""
        alike: dict[tuple[int, int, int], list[Ids]] = {}
        for ids in prompts:
            alike.setdefault(self._sizes(ids), []).append(ids)
        parts, least = [], self.setup.least_rows
        for sizes, those in alike.items():
            first = 0
            for count in split_count(-(-len(those) // least), self._counts(sizes)):
                parts.append(those[first : first + count * least])
                first += count * least
        return parts

    def _sizes(self, ids: Ids) -> tuple[int, int, int]:
        """Of a prompt: the length of its prefix, and the padded lengths of the rest and of the whole."""
        room, before, length = self.setup.room, self._cut(ids), len(ids) - 1
        return before, room.prefill_size(length - before), room.prefill_size(length)

    def _counts(self, sizes: tuple[int, int, int]) -> tuple[int, ...]:
        """How many times `least_rows` prompts of these sizes may be prefilled together, each beside its prefix."""
        before, _, whole = sizes
        return self.setup.room.counts(before + whole, self.setup.least_rows)

    def _prefill(self, part: Sequence[Ids], kept: Sequence[Ids] = ()) -> None:
        """Computes the keys and values of a batch of `_parts`, all but the last token of each; first of the prefixes.

        Args:
          kept: prompts that must not be dropped to make room.
        """
        setup, least = self.setup, self.setup.least_rows
        before, rest, whole = sizes = self._sizes(part[0])
        prefixes = [self._prefix(ids) for ids in part] if before else []
        for missing in self._parts([ids for ids in dict.fromkeys(prefixes) if ids not in self.prompts]):
            self._prefill(missing, [*kept, *prefixes])
        count = split_count(-(-len(part) // least), self._counts(sizes))[0]
        self._make_room(count * least * whole, [*kept, *prefixes])
        tokens_QT = np.zeros((count * least, rest), np.int32)
        for q, ids in enumerate(part):
            tokens_QT[q, : len(ids) - 1 - before] = ids[before:-1]
        static = setup.shared | {"attend": setup.attend}
        if before:
            prefixes += prefixes[:1] * (len(tokens_QT) - len(part))
            static |= {"before": before, "whole": whole}
        pasts = tuple(self.prompts[ids] for ids in prefixes)
        made = programs.prefill(self.weights.prefilling, tokens_QT, pasts, **static)
        self.prompts |= dict(zip(part, made, strict=False))  # the others only fill the batch
        self.stats.prefilled += sum(len(ids) - 1 - before for ids in part)

    def _make_room(self, tokens: int, kept: Sequence[Ids]) -> None:
        """Drops prompts, the oldest first, until so many tokens fit. Those still needed are prefilled again later."""
        held = {ids: prompt.k_BKSH.shape[-2] for ids, prompt in self.prompts.items()}
        for ids in [ids for ids in held if ids not in kept]:
            if sum(held.values()) + tokens <= self.setup.room.prompt_tokens:
                return
            del held[ids], self.prompts[ids]

    def _enter(self, ids: Ids, placed: Sequence[tuple[Pool, int, Draft]]) -> None:
        """Puts a prefilled prompt into rows, and drops it where nobody else waits for it."""
        for pool in self.pools:
            if own := [(r, draft) for of, r, draft in placed if of is pool]:
                pool.enter(own, self.prompts[ids], self.key)
        self._let_go(ids, len(placed))
