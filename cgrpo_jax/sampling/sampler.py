"""The host side of sampling: requests come from a source, enter rows as these come free, and leave as completions.

Which request enters which row is decided between chunks, from the order of the requests and the lengths of what has
ended: from tokens, never from clocks. Tokens do not depend on it: a token's random number is a function of its name
(`draw.row_keys`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.model.decoder import ModelConfig, Params
from cgrpo_jax.options import SamplerMemory, SamplingConfig
from cgrpo_jax.records import Completion, Done, Name, Request, Source
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.draw import step_key
from cgrpo_jax.sampling.sizes import power_of_two, prefill_size, ring_size, row_sizes, split_count

CHUNK = 32  # tokens decoded between two looks at the queue, at most
PREFILL_TOKENS = 4096  # of the prompts prefilled together, padding included
PREFILL_SHARE = 8  # of the memory for keys and values, one part in so many is for prompts that are not in a row


class RequestError(ValueError):
    """A request that the sampler cannot hold."""


@dataclasses.dataclass
class Stats:
    """Counts of one or more runs of a `Sampler`."""

    tokens: int = 0  # drawn
    row_steps: int = 0  # rows x steps decoded, whether a row was active or not
    prefilled: int = 0  # prompt tokens run through the model, without padding
    nonfinite: int = 0  # tokens whose log-probability is no finite number

    @property
    def slot_use(self) -> float:
        """The share of row-steps that made a token somebody asked for."""
        return self.tokens / max(1, self.row_steps)


@dataclasses.dataclass(frozen=True)
class Room:
    """What fits a memory budget."""

    rows: int  # decoded together at most; 0: not even one on each device
    prompt_tokens: int  # of prefilled prompts that are not in a row, padding included


@dataclasses.dataclass(frozen=True)
class SamplerSetup:
    """What stays the same over a run."""

    model: ModelConfig
    mesh: Mesh
    eos_ids: tuple[int, ...]
    seed: int
    room: Room
    dtype: DTypeLike
    unrolled: bool  # layers in decoding, see programs.unrolls
    chunk: int = CHUNK

    @property
    def least_rows(self) -> int:
        return row_devices(self.mesh)

    def bind(self, params: Params, step: int, sampling: SamplingConfig) -> Sampler:
        """The sampler of these parameters at this step."""
        return Sampler(self, params, step, sampling)


def drawing_of(sampling: SamplingConfig) -> SamplingConfig:
    """Without the limit, which each row has of its own: one program serves all."""
    return dataclasses.replace(sampling, max_new_tokens=0)


def row_devices(mesh: Mesh) -> int:
    """Devices that share the rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def room_for(model: ModelConfig, mesh: Mesh, cfg: SamplerMemory, slots: int, prompt: int, dtype: DTypeLike) -> Room:
    """Rows (a power of two on each device) with rings for `slots` tokens, beside prefilled prompts, within the budget.

    Args:
      prompt: tokens of the longest one; room for one is always counted.
    """
    heads = model.kv_heads // mesh.shape["tensor"] if model.kv_heads % mesh.shape["tensor"] == 0 else model.kv_heads
    token_bytes = 2 * model.layers * heads * model.head_dim * jnp.dtype(dtype).itemsize
    budget, sharing = cfg.kv_cache_mb * 2**20, row_devices(mesh)
    longest = prefill_size(prompt) * sharing  # a prefill runs one on each device, see `_Schedule._prefill`
    parted = int(budget / PREFILL_SHARE * sharing // token_bytes)  # a prompt's tokens lie on all these devices
    prompt_tokens = max(longest, min(PREFILL_TOKENS, parted))
    left = budget - prompt_tokens * token_bytes / sharing
    fit = int(left // (token_bytes * ring_size(slots))) if left > 0 else 0
    return Room((1 << (fit.bit_length() - 1)) * sharing if fit else 0, prompt_tokens)


@dataclasses.dataclass
class _Row:
    """A request under way."""

    request: Request
    limit: int
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    logp: list[np.ndarray] = dataclasses.field(default_factory=list)
    kept: list[np.ndarray] = dataclasses.field(default_factory=list)

    def left(self, length: int) -> int:
        """Tokens still to draw at most, given the length of its ring."""
        return self.limit - (int(length) - len(self.request.prompt_ids) + 1)

    def completion(self, finished: bool) -> Completion:
        ids, logp, kept = (np.concatenate(parts) for parts in (self.ids, self.logp, self.kept))
        return Completion(ids, logp, kept, finished)


class _Asked:
    """The source of requests that are all known at the beginning."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.done: dict[Name, Completion] = {}

    def ended(self, done: Done) -> None:
        self.done |= {request.name: completion for request, completion in done}

    def poll(self, idle: bool) -> Sequence[Request]:
        asked, self.requests = self.requests, []
        return asked

    def pending(self) -> bool:
        return False


class Sampler:
    """For one set of parameters, at one step. Holds a copy of them: drop it before the update."""

    def __init__(self, setup: SamplerSetup, params: Params, step: int, sampling: SamplingConfig):
        self.setup, self.params, self.sampling = setup, params, sampling
        self.key = step_key(np.uint32(setup.seed), np.int32(step))
        self.weights = programs.weights_for_sampling(
            params, dtype=setup.dtype, mesh=setup.mesh, unrolled=setup.unrolled
        )
        self.stats = Stats()

    def run(self, source: Source) -> None:
        """Samples what the source asks for, until it has nothing more.

        Raises:
          RequestError: a prompt is too long to be continued by a single token, or a name is asked for twice.
        """
        schedule = _Schedule(self)
        while True:
            schedule.ask(source.poll(idle=not schedule.busy))
            if schedule.busy:
                source.ended(schedule.advance(more_may_come=source.pending()))
            elif not source.pending():
                return

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of requests that are all known, in their order."""
        source = _Asked(requests)
        self.run(source)
        return [source.done[request.name] for request in requests]


class _Schedule:
    """One run of a sampler: the queue, the rows, and the prompts that are prefilled but not used up."""

    def __init__(self, owner: Sampler):
        self.owner, self.setup = owner, owner.setup
        self.queue: collections.deque[_Row] = collections.deque()
        self.under_way: set[Name] = set()
        self.waiting: collections.Counter[tuple[int, ...]] = collections.Counter()  # requests a prompt still serves
        self.prompts: dict[tuple[int, ...], programs.KVCache] = {}
        self.rows: list[_Row | None] = []
        self.slots: programs.Slots | None = None
        self.length = np.zeros(0, np.int64)  # tokens in each row's ring, as `Slots.length_R`

    @property
    def busy(self) -> bool:
        return bool(self.queue) or any(row is not None for row in self.rows)

    def ask(self, requests: Sequence[Request]) -> None:
        """Puts requests at the end of the queue."""
        most = self.setup.model.max_positions
        for request in requests:
            limit = self.owner.sampling.max_new_tokens if request.limit is None else request.limit
            room = most - len(request.prompt_ids)
            who = f"{request.name.kind.name.lower()} of problem {request.name.problem}"
            if room < 1 or not request.prompt_ids:
                raise RequestError(
                    f"{who}: a prompt of {len(request.prompt_ids)} tokens leaves no room in the model's {most} "
                    "positions"
                )
            if request.name in self.under_way:
                raise RequestError(f"{who}: {tuple(map(int, request.name))} is asked for while it is under way")
            self.under_way.add(request.name)
            self.queue.append(_Row(request, min(limit, room)))
            self.waiting[tuple(request.prompt_ids)] += 1

    def advance(self, more_may_come: bool) -> Done:
        """Fills rows and decodes a chunk; what ended, in the order of the names."""
        self._fit_rows()
        self._admit()
        return self._decode(more_may_come)

    def _rows_wanted(self, live: int) -> int:
        least, now = self.setup.least_rows, len(self.rows)
        wanted = min(self.setup.room.rows, live + len(self.queue))
        if wanted > now:
            return least * power_of_two(-(-wanted // least))
        return next(size for size in row_sizes(now, least) if size >= wanted)

    def _fit_rows(self) -> None:
        """Grows or shrinks rows and slots to what is needed until the next look."""
        live = [r for r, row in enumerate(self.rows) if row is not None]
        rows, setup = self._rows_wanted(len(live)), self.setup
        entering = [(len(row.request.prompt_ids) - 1, row.limit) for row in list(self.queue)[: rows - len(live)]]
        under_way = [(int(self.length[r]), row.left(self.length[r])) for r, row in enumerate(self.rows) if row]
        needed = ring_size(max(length + min(left, setup.chunk) for length, left in entering + under_way))
        if self.slots is None:
            layout = {"dtype": setup.dtype, "mesh": setup.mesh, "unrolled": setup.unrolled}
            self.slots = programs.empty_slots(cfg=setup.model, rows=rows, slots=needed, **layout)
            self.rows, self.length = [None] * rows, np.zeros(rows, np.int64)
            return
        now_slots = self.slots.ring
        needed = now_slots if now_slots // 2 < needed <= now_slots else needed  # a resize is a copy
        if (rows, needed) == (len(self.rows), now_slots):
            return
        source = np.full(rows, -1, np.int32)
        source[: len(live)] = live
        self.slots = programs.resize(self.slots, source, slots_to=needed, mesh=setup.mesh)
        self.rows = [self.rows[r] if r >= 0 else None for r in source]
        self.length = np.where(source >= 0, self.length[source], 0)

    def _admit(self) -> None:
        """Gives free rows to waiting requests, all that share a prompt at once; prefills a part at a time."""
        free = [r for r, row in enumerate(self.rows) if row is None]
        entering: dict[tuple[int, ...], list[tuple[int, _Row]]] = {}
        while free and self.queue:
            row = self.queue.popleft()
            entering.setdefault(tuple(row.request.prompt_ids), []).append((free.pop(0), row))
        for ids in [ids for ids in entering if ids in self.prompts]:
            self._enter(ids, entering.pop(ids))
        for part in self._parts(list(entering)):
            self._prefill(part)
            for ids in part:
                self._enter(ids, entering[ids])

    def _parts(self, prompts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Prompts of like length together, no more of them than there is room for."""
        by_size: dict[int, list[tuple[int, ...]]] = {}
        for ids in prompts:
            by_size.setdefault(prefill_size(len(ids) - 1), []).append(ids)
        parts, least = [], self.setup.least_rows
        for size, alike in by_size.items():
            first = 0
            for count in split_count(-(-len(alike) // least), self.setup.room.prompt_tokens // (size * least)):
                parts.append(alike[first : first + count * least])
                first += count * least
        return parts

    def _prefill(self, part: Sequence[tuple[int, ...]]) -> None:
        """Runs some prompts of like length, each but its last token, through the model."""
        setup, least, size = self.setup, self.setup.least_rows, prefill_size(len(part[0]) - 1)
        count = split_count(-(-len(part) // least), setup.room.prompt_tokens // (size * least))[0]
        self._make_room(count * least * size)
        tokens_QT = np.zeros((count * least, size), np.int32)
        for q, ids in enumerate(part):
            tokens_QT[q, : len(ids) - 1] = ids[:-1]
        made = programs.prefill(self.owner.params, tokens_QT, cfg=setup.model, dtype=setup.dtype, mesh=setup.mesh)
        self.prompts |= dict(zip(part, made, strict=False))  # the rest only fills the batch
        self.owner.stats.prefilled += sum(len(ids) - 1 for ids in part)

    def _make_room(self, tokens: int) -> None:
        """Lets go of prompts that others still wait for (they will be prefilled again), the oldest first."""
        held = sum(prefill_size(len(ids) - 1) for ids in self.prompts)
        for ids in list(self.prompts):
            if held + tokens <= self.setup.room.prompt_tokens:
                return
            held -= prefill_size(len(ids) - 1)
            del self.prompts[ids]

    def _enter(self, ids: tuple[int, ...], placed: Sequence[tuple[int, _Row]]) -> None:
        """Gives a prefilled prompt to rows, and lets go of it where nobody else waits for it."""
        R = len(self.rows)
        row_R, limit_R, name_R4 = np.zeros(R, np.int32), np.zeros(R, np.int32), np.zeros((R, 4), np.int32)
        for i, (r, row) in enumerate(placed):
            row_R[i], limit_R[i], name_R4[i] = r, row.limit, row.request.name[:4]
            self.rows[r], self.length[r] = row, len(ids) - 1
        entry = programs.Entry(np.int32(len(placed)), row_R, limit_R, name_R4)
        assert self.slots is not None
        args = (self.slots, self.prompts[ids], np.int32(len(ids) - 1), np.int32(ids[-1]), entry, self.owner.key)
        self.slots = programs.enter(*args, mesh=self.setup.mesh)
        self.waiting[ids] -= len(placed)
        if not self.waiting[ids]:
            del self.waiting[ids], self.prompts[ids]

    def _decode(self, more_may_come: bool) -> Done:
        """Decodes until enough rows have ended."""
        live = sum(row is not None for row in self.rows)
        if self.queue or more_may_come:
            leave_at = max(1, len(self.rows) // 16)
        else:  # nobody waits: leave when fewer rows would do
            leave_at = live - [0, *row_sizes(len(self.rows), self.setup.least_rows)][-2]
        setup, stats = self.setup, self.owner.stats
        self.slots, out = programs.decode(
            self.owner.weights,
            self.slots,
            programs.eos_set(setup.eos_ids),
            np.int32(max(1, leave_at)),
            cfg=setup.model,
            sampling=drawing_of(self.owner.sampling),
            dtype=setup.dtype,
            mesh=setup.mesh,
            chunk=setup.chunk,
        )
        chunk = jax.device_get(out)
        stats.row_steps += int(chunk.steps) * len(self.rows)
        done = []
        for r, row in enumerate(self.rows):
            if row is None:
                continue
            made = int(chunk.made_R[r])
            row.ids.append(chunk.token_RC[r, :made])
            row.logp.append(chunk.logp_RC[r, :made])
            row.kept.append(chunk.kept_RC[r, :made])
            self.length[r] += made
            stats.tokens += made
            stats.nonfinite += int(np.count_nonzero(~np.isfinite(chunk.logp_RC[r, :made])))
            if not chunk.active_R[r]:
                done.append((row.request, row.completion(bool(chunk.finished_R[r]))))
                self.rows[r] = None
        done.sort(key=lambda item: item[0].name)
        self.under_way -= {request.name for request, _ in done}
        return done
