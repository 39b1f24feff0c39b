"""The host side of sampling: requests wait in a queue, enter rows as these come free, and leave as completions.

Which request enters which row is decided between chunks, from the order of the requests and the lengths of what has
ended. Tokens do not depend on it: a token's random number is a function of its name (`drawing.row_keys`).
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
from cgrpo_jax.records import Completion, FollowUp, Request
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.draw import step_key
from cgrpo_jax.sampling.sizes import power_of_two, prefill_size, ring_size, row_sizes, split_count

CHUNK = 32  # tokens decoded between two looks at the queue, at most
PREFILL_TOKENS = 4096  # of the prompts prefilled together, padding included


class RequestError(ValueError):
    """A request that the sampler cannot hold."""


@dataclasses.dataclass
class Stats:
    """Counts of one or more calls of `Sampler.__call__`."""

    tokens: int = 0  # drawn
    row_steps: int = 0  # rows x steps decoded, whether a row was active or not
    prefilled: int = 0  # prompt tokens run through the model, without padding

    @property
    def slot_use(self) -> float:
        """The share of row-steps that made a token somebody asked for."""
        return self.tokens / max(1, self.row_steps)


@dataclasses.dataclass(frozen=True)
class Generator:
    """What stays the same over a run: model, end-of-sequence ids, seed, and the largest number of rows."""

    model: ModelConfig
    mesh: Mesh
    eos_ids: tuple[int, ...]
    seed: int
    max_rows: int
    dtype: DTypeLike
    unrolled: bool  # layers in decoding, see programs.unrolls
    chunk: int = CHUNK

    @property
    def least_rows(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def bind(self, params: Params, step: int, sampling: SamplingConfig) -> Sampler:
        """The sampler of these parameters at this step."""
        return Sampler(self, params, step, sampling)


def rows_that_fit(model: ModelConfig, mesh: Mesh, cfg: SamplerMemory, slots: int, dtype: DTypeLike) -> int:
    """The largest number of rows (a power of two on each device) whose rings of `slots` fit the budget; 0: none."""
    heads = model.kv_heads // mesh.shape["tensor"]
    row_bytes = 2 * model.layers * heads * model.head_dim * ring_size(slots) * jnp.dtype(dtype).itemsize
    fit = int(cfg.kv_cache_mb * 2**20 // row_bytes)
    return (1 << (fit.bit_length() - 1)) * mesh.shape["data"] * mesh.shape["fsdp"] if fit else 0


@dataclasses.dataclass
class _Row:
    """A request under way."""

    number: int
    request: Request
    limit: int
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    logp: list[np.ndarray] = dataclasses.field(default_factory=list)
    kept: list[np.ndarray] = dataclasses.field(default_factory=list)

    def left(self, length: int) -> int:
        """Tokens still to draw at most, given the length of its ring."""
        return self.limit - (int(length) - len(self.request.prompt_ids) + 1)

    def completion(self, finished: bool) -> Completion:
        join = np.concatenate
        return Completion(join(self.ids), join(self.logp), join(self.kept), finished)


class Sampler:
    """Requests -> completions, for one set of parameters. Holds a copy of them: drop it before the update."""

    def __init__(self, generator: Generator, params: Params, step: int, sampling: SamplingConfig):
        self.of, self.params, self.sampling = generator, params, sampling
        self.drawing = dataclasses.replace(
            sampling, max_new_tokens=0
        )  # each row has its own limit: one program for all
        self.key = step_key(np.uint32(generator.seed), np.int32(step))
        self.weights = programs.weights_for_sampling(
            params, dtype=generator.dtype, mesh=generator.mesh, unrolled=generator.unrolled
        )
        self.stats = Stats()

    def __call__(self, requests: Sequence[Request], then: FollowUp | None = None) -> list[Completion]:
        """Samples all requests.

        Args:
          then: called with (number, completion) of each request as it ends; may ask for more, which are numbered on.

        Returns:
          One completion a request, in order: the given ones, then those that `then` asked for.

        Raises:
          RequestError: a prompt is too long to be continued by a single token.
        """
        return _Schedule(self, then).run(requests)


class _Schedule:
    """One call of a sampler: the queue, the rows, and the prompts that are prefilled but not used up."""

    def __init__(self, owner: Sampler, then: FollowUp | None):
        self.owner, self.of, self.then = owner, owner.of, then
        self.queue: collections.deque[_Row] = collections.deque()
        self.done: dict[int, Completion] = {}
        self.asked = 0
        self.waiting: collections.Counter[tuple[int, ...]] = collections.Counter()  # requests a prompt still serves
        self.prompts: dict[tuple[int, ...], programs.KVCache] = {}
        self.rows: list[_Row | None] = []
        self.slots: programs.Slots | None = None
        self.length = np.zeros(0, np.int64)  # tokens in each row's ring, as `Slots.length_R`

    def ask(self, requests: Sequence[Request]) -> None:
        for request in requests:
            limit = self.owner.sampling.max_new_tokens if request.limit is None else request.limit
            room = self.of.model.max_positions - len(request.prompt_ids)
            if room < 1 or not request.prompt_ids:
                raise RequestError(
                    f"{request.kind.name.lower()} of problem {request.problem}: a prompt of {len(request.prompt_ids)} "
                    f"tokens leaves no room in the model's {self.of.model.max_positions} positions"
                )
            self.queue.append(_Row(self.asked, request, min(limit, room)))
            self.waiting[tuple(request.prompt_ids)] += 1
            self.asked += 1

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        self.ask(requests)
        while self.queue or any(self.rows):
            self._fit_rows()
            self._admit()
            self._decode()
        return [self.done[number] for number in range(self.asked)]

    def _fit_rows(self) -> None:
        """Grows or shrinks rows and slots to what is needed until the next look."""
        live = [r for r, row in enumerate(self.rows) if row is not None]
        wanted = min(self.of.max_rows, len(live) + len(self.queue))
        least, now_rows = self.of.least_rows, len(self.rows)
        if wanted > now_rows:
            rows = least * power_of_two(-(-wanted // least))
        else:
            rows = next(size for size in row_sizes(now_rows, least) if size >= wanted)
        entering = [(len(row.request.prompt_ids) - 1, row.limit) for row in list(self.queue)[: rows - len(live)]]
        under_way = [(int(self.length[r]), row.left(self.length[r])) for r, row in enumerate(self.rows) if row]
        needed = ring_size(max(length + min(left, self.of.chunk) for length, left in entering + under_way))
        if self.slots is None:
            self.slots = programs.empty_slots(
                cfg=self.of.model,
                rows=rows,
                slots=needed,
                dtype=self.of.dtype,
                mesh=self.of.mesh,
                unrolled=self.of.unrolled,
            )
            self.rows, self.length = [None] * rows, np.zeros(rows, np.int64)
            return
        now_slots = self.slots.ring
        needed = now_slots if now_slots // 2 < needed <= now_slots else needed  # a resize is a copy
        if (rows, needed) == (now_rows, now_slots):
            return
        source = np.full(rows, -1, np.int32)
        source[: len(live)] = live
        self.slots = programs.resize(self.slots, source, slots_to=needed, mesh=self.of.mesh)
        self.rows = [self.rows[r] if r >= 0 else None for r in source]
        self.length = np.where(source >= 0, self.length[source], 0)

    def _admit(self) -> None:
        """Gives free rows to waiting requests, all that share a prompt at once."""
        free = [r for r, row in enumerate(self.rows) if row is None]
        entering: dict[tuple[int, ...], list[tuple[int, _Row]]] = {}
        while free and self.queue:
            row = self.queue.popleft()
            entering.setdefault(tuple(row.request.prompt_ids), []).append((free.pop(0), row))
        self._prefill([ids for ids in entering if ids not in self.prompts])
        R = len(self.rows)
        for ids, placed in entering.items():
            row_R, limit_R, name_R3 = np.zeros(R, np.int32), np.zeros(R, np.int32), np.zeros((R, 3), np.int32)
            for i, (r, row) in enumerate(placed):
                request = row.request
                row_R[i], limit_R[i], name_R3[i] = r, row.limit, (request.kind, request.problem, request.sample)
                self.rows[r], self.length[r] = row, len(ids) - 1
            entry = programs.Entry(np.int32(len(placed)), row_R, limit_R, name_R3)
            assert self.slots is not None
            args = (self.slots, self.prompts[ids], np.int32(len(ids) - 1), np.int32(ids[-1]), entry, self.owner.key)
            self.slots = programs.enter(*args, mesh=self.of.mesh)
            self.waiting[ids] -= len(placed)
            if not self.waiting[ids]:
                del self.waiting[ids], self.prompts[ids]

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Runs each prompt, but its last token, through the model: prompts of like length together."""
        by_size: dict[int, list[tuple[int, ...]]] = {}
        for ids in prompts:
            by_size.setdefault(prefill_size(len(ids) - 1), []).append(ids)
        of = self.of
        for size, alike in by_size.items():
            first = 0
            for part in split_count(-(-len(alike) // of.least_rows), PREFILL_TOKENS // (size * of.least_rows)):
                tokens_QT = np.zeros((part * of.least_rows, size), np.int32)
                together = alike[first : first + len(tokens_QT)]
                for q, ids in enumerate(together):
                    tokens_QT[q, : len(ids) - 1] = ids[:-1]
                made = programs.prefill(self.owner.params, tokens_QT, cfg=of.model, dtype=of.dtype, mesh=of.mesh)
                self.prompts |= dict(zip(together, made, strict=False))  # the rest only fills the batch
                self.owner.stats.prefilled += sum(len(ids) - 1 for ids in together)
                first += len(tokens_QT)

    def _decode(self) -> None:
        """Decodes until enough rows have ended, and hands out what they made."""
        live = sum(row is not None for row in self.rows)
        if self.queue or self.then:
            leave_at = max(1, len(self.rows) // 16)
        else:  # nobody waits: leave when fewer rows would do
            leave_at = live - [0, *row_sizes(len(self.rows), self.of.least_rows)][-2]
        of, stats = self.of, self.owner.stats
        self.slots, out = programs.decode(
            self.owner.weights, self.slots, np.asarray(of.eos_ids, np.int32), np.int32(max(1, leave_at)), cfg=of.model,
            sampling=self.owner.drawing, dtype=of.dtype, mesh=of.mesh,
            chunk=of.chunk,
        )  # fmt: skip
        chunk = jax.device_get(out)
        stats.row_steps += int(chunk.steps) * len(self.rows)
        ended = []
        for r, row in enumerate(self.rows):
            if row is None:
                continue
            made = int(chunk.made_R[r])
            row.ids.append(chunk.token_RC[r, :made])
            row.logp.append(chunk.logp_RC[r, :made])
            row.kept.append(chunk.kept_RC[r, :made])
            self.length[r] += made
            stats.tokens += made
            if not chunk.active_R[r]:
                self.done[row.number] = row.completion(bool(chunk.finished_R[r]))
                self.rows[r] = None
                ended.append(row.number)
        for number in sorted(ended):
            if self.then is not None:
                self.ask(self.then(number, self.done[number]))
