"""The engine of one model: it is given requests, decodes a chunk of tokens at a time, and hands back what ended.

The caller owns the loop (`rollout.loop.run_stories`). Which request enters which row is decided between two chunks by
the order of the requests and the lengths of what has ended: by tokens, never by clocks. Which tokens are sampled does
not depend on it, for the random number of a token is a function of the name of its sequence (`draw.row_keys`).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.config.options import SamplingConfig
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.records import Done, Name, Request
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.draw import step_key
from cgrpo_jax.sampling.pool import EngineSetup, Pool, Row, Stats
from cgrpo_jax.sampling.prefixes import cut, shared_prefixes
from cgrpo_jax.sampling.sizes import split_count
from cgrpo_jax.sampling.weights import weights_for_sampling, weights_to_prefill


class RequestError(ValueError):
    """A request that no row can hold."""


class Weights(NamedTuple):
    """A model's parameters in the dtype and layout of its engine; leaves that need no change are not copied."""

    decoding: Params
    prefilling: Params


def weights_of(setup: EngineSetup, params: Params) -> Weights:
    """The weight sync: what an engine reads, made from the parameters of training."""
    layout: dict[str, Any] = {"dtype": setup.dtype, "mesh": setup.mesh}
    decoding = weights_for_sampling(params, unrolled=setup.unrolled, **layout)
    return Weights(decoding, weights_to_prefill(params, decoding, **layout))


class Engine:
    """The rows of one model at one step, with the queue of requests that wait for a row.

    It holds the weights and the KV cache: drop it before the update.

    Args:
      step: with the seed of `setup`, the key of all random numbers.
      sampling: how tokens are drawn.
    """

    def __init__(self, setup: EngineSetup, weights: Weights, step: int, sampling: SamplingConfig):
        self.setup, self.weights, self.sampling = setup, weights, sampling
        self.key = step_key(np.uint32(setup.seed), np.int32(step))
        self.stats = Stats()
        self.queue: collections.deque[Row] = collections.deque()
        self.under_way: set[Name] = set()
        self.waiting: collections.Counter[tuple[int, ...]] = (
            collections.Counter()
        )  # requests that a prompt still serves
        self.prompts: dict[tuple[int, ...], programs.KVCache] = {}  # prefilled, but not used up
        self.shared: dict[tuple[int, ...], int] = {}  # of `shared_prefixes`
        fixed = setup.room.fixed
        self.pools = [Pool(setup, ring) for ring in (fixed.rings if fixed else (None,))]

    @property
    def busy(self) -> bool:
        """Whether there is anything to decode."""
        return bool(self.queue) or any(pool.live for pool in self.pools)

    def submit(self, requests: Sequence[Request]) -> None:
        """Puts requests at the end of the queue.

        Raises:
          RequestError: a prompt is too long to be continued by a single token, no ring holds it, or a name is asked for
            while it is under way.
        """
        most = self.setup.model.max_positions
        if self.setup.room.fixed is None:
            known = {ids: count for ids, count in shared_prefixes(requests).items() if ids not in self.waiting}
            self.shared |= known
        for request in requests:
            limit = self.sampling.max_new_tokens if request.limit is None else request.limit
            room = most - len(request.prompt_ids)
            who = f"{request.name.kind.name.lower()} of problem {request.name.problem}"
            row = Row(request, min(limit, room))
            if room < 1 or not request.prompt_ids:
                raise RequestError(
                    f"{who}: a prompt of {len(request.prompt_ids)} tokens leaves no room in the model's {most} "
                    "positions"
                )
            if not any(pool.holds(row) for pool in self.pools):
                raise RequestError(
                    f"{who}: no ring of sampler.rings holds {len(request.prompt_ids)} tokens and {row.limit} new ones"
                )
            if request.name in self.under_way:
                raise RequestError(f"{who}: {tuple(map(int, request.name))} is asked for while it is under way")
            self.under_way.add(request.name)
            self.queue.append(row)
            self._wait_for(tuple(request.prompt_ids))

    def _wait_for(self, ids: tuple[int, ...]) -> None:
        """A request for a prompt, or a prompt for its prefix."""
        self.waiting[ids] += 1
        if self.waiting[ids] == 1 and (prefix := self._prefix(ids)):
            self._wait_for(prefix)

    def _let_go(self, ids: tuple[int, ...], count: int) -> None:
        """So many do not wait for it any longer; what nobody waits for is dropped."""
        self.waiting[ids] -= count
        if self.waiting[ids]:
            return
        prefix = self._prefix(ids)
        del self.waiting[ids]
        self.prompts.pop(ids, None)
        self.shared.pop(ids, None)
        if prefix:
            self._let_go(prefix, 1)

    def _cut(self, ids: tuple[int, ...]) -> int:
        """Tokens of a prompt that are prefilled before the rest, as a prompt of their own; 0 also for want of room."""
        room, length = self.setup.room, len(ids) - 1
        before = 0 if room.fixed else cut(length, self.shared.get(ids, 0))
        return before if before + room.prefill_size(length) <= room.prompt_tokens else 0

    def _prefix(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt that is prefilled before it; () is none. Its last id is any: as of each prompt it is not run."""
        before = self._cut(ids)
        return (*ids[:before], 0) if before else ()

    def advance(self, more_may_come: bool) -> Done:
        """Fills free rows from the queue and decodes one chunk of tokens in all rows.

        Args:
          more_may_come: rows that come free may be needed; without it rows may be given up when the queue is empty.

        Returns:
          The requests that ended in this chunk, with what was sampled for them.
        """
        for pool in self.pools:
            pool.fit(list(self.queue))
        self._admit()
        others_wait = bool(self.queue) or more_may_come
        begun = [
            (pool, pool.decode(self.weights.decoding, self.sampling, others_wait)) for pool in self.pools if pool.live
        ]
        done = [item for pool, out in begun for item in pool.book(out, self.stats)]
        self.under_way -= {request.name for request, _ in done}
        return done

    def _admit(self) -> None:
        """Gives free rows to waiting requests, all that share a prompt at once; prefills a part at a time."""
        entering: dict[tuple[int, ...], list[tuple[Pool, int, Row]]] = {}
        for pool, r, row in self._placed():
            entering.setdefault(tuple(row.request.prompt_ids), []).append((pool, r, row))
        for ids in [ids for ids in entering if ids in self.prompts]:
            self._enter(ids, entering.pop(ids))
        for part in self._parts(list(entering)):
            self._prefill(part)
            for ids in part:
                self._enter(ids, entering[ids])

    def _placed(self) -> list[tuple[Pool, int, Row]]:
        """Takes requests from the queue, in its order, that find a free row; of the smallest ring that holds them."""
        free, placed = [pool.free for pool in self.pools], []
        left: collections.deque[Row] = collections.deque()
        while self.queue and any(free):
            row = self.queue.popleft()
            where = next((i for i, pool in enumerate(self.pools) if free[i] and pool.holds(row)), None)
            if where is None:
                left.append(row)
            else:
                placed.append((self.pools[where], free[where].pop(0), row))
        self.queue.extendleft(reversed(left))
        return placed

    def _parts(self, prompts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Prompts of like length together, no more of them than there is room for."""
        alike: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
        for ids in prompts:
            alike.setdefault(self._sizes(ids), []).append(ids)
        parts, least = [], self.setup.least_rows
        for sizes, those in alike.items():
            first = 0
            for count in split_count(-(-len(those) // least), self._counts(sizes)):
                parts.append(those[first : first + count * least])
                first += count * least
        return parts

    def _sizes(self, ids: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens of its prefix, and with padding of the rest and of the whole."""
        room, before, length = self.setup.room, self._cut(ids), len(ids) - 1
        return before, room.prefill_size(length - before), room.prefill_size(length)

    def _counts(self, sizes: tuple[int, int, int]) -> tuple[int, ...]:
        """How many times `least_rows` such prompts may be prefilled together, each beside its prefix."""
        before, _, whole = sizes
        return self.setup.room.counts(before + whole, self.setup.least_rows)

    def _prefill(self, part: Sequence[tuple[int, ...]], kept: Sequence[tuple[int, ...]] = ()) -> None:
        """Runs some prompts of like length, each but its last token, through the model; before that, their prefixes.

        Args:
          kept: prompts that must not give way.
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
        static: dict[str, Any] = {"cfg": setup.model, "dtype": setup.dtype, "mesh": setup.mesh, "attend": setup.attend}
        if before:
            prefixes += prefixes[:1] * (len(tokens_QT) - len(part))
            static |= {"before": before, "whole": whole}
        pasts = tuple(self.prompts[ids] for ids in prefixes)
        made = programs.prefill(self.weights.prefilling, tokens_QT, pasts, **static)
        self.prompts |= dict(zip(part, made, strict=False))  # the rest only fills the batch
        self.stats.prefilled += sum(len(ids) - 1 - before for ids in part)

    def _make_room(self, tokens: int, kept: Sequence[tuple[int, ...]]) -> None:
        """Lets go of prompts that others still wait for (they will be prefilled again), the oldest first."""
        held = {ids: prompt.k_BKSH.shape[-2] for ids, prompt in self.prompts.items()}
        for ids in [ids for ids in held if ids not in kept]:
            if sum(held.values()) + tokens <= self.setup.room.prompt_tokens:
                return
            del held[ids], self.prompts[ids]

    def _enter(self, ids: tuple[int, ...], placed: Sequence[tuple[Pool, int, Row]]) -> None:
        """Gives a prefilled prompt to rows, and lets go of it where nobody else waits for it."""
        for pool in self.pools:
            if own := [(r, row) for of, r, row in placed if of is pool]:
                pool.enter(own, self.prompts[ids], self.key)
        self._let_go(ids, len(placed))
