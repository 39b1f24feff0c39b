"""The rows that are decoded together, and what of their state the host keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax.config.options import SamplingConfig
from cgrpo_jax.model.attention import attend
from cgrpo_jax.model.decoder import Attend, ModelConfig, Params
from cgrpo_jax.model.splash import attend_own_heads
from cgrpo_jax.records import Completion, Done, Request
from cgrpo_jax.sampling import programs
from cgrpo_jax.sampling.room import Ring, Room, grown_rows, ring_size, row_devices, row_sizes

DECODE_CHUNK = 32  # tokens that are decoded before the host looks at the queue again, at most

# Given the ids of a row and how many of them are new: how many it keeps if they spell a stop text, else None.
Stop = Callable[[Sequence[int], int], int | None]


@dataclasses.dataclass
class Stats:
    """Counts of what one or more engines did in a rollout."""

    tokens: int = 0  # of completions
    row_steps: int = 0  # steps of decoding times rows, active or not
    prefilled: int = 0  # prompt tokens run through the model, without padding
    nonfinite: int = 0  # tokens whose log-probability is not finite
    late: int = 0  # verdicts and critiques that decoding did not wait for, see `rollout.stories`

    @property
    def slot_use(self) -> float:
        """The share of row-steps in which a token of a completion was drawn."""
        return self.tokens / max(1, self.row_steps)


def summed(parts: Iterable[Stats]) -> Stats:
    """The counts of several engines together."""
    return Stats(*map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))


@dataclasses.dataclass(frozen=True)
class EngineSetup:
    """What an engine needs to know of its model, devices and memory; the same at each step of a run."""

    model: ModelConfig
    mesh: Mesh
    eos_ids: tuple[int, ...]
    seed: int
    room: Room
    dtype: DTypeLike
    unrolled: bool  # decoding has a tree of weights for each layer, see `setup_for`
    chunk: int = DECODE_CHUNK
    stacked_cache: bool = False  # one array for all layers, though their weights are unrolled
    attend: Attend = attend  # in prefills
    stop: Stop | None = None  # None: only end-of-sequence ids and limits end a row

    @property
    def least_rows(self) -> int:
        return row_devices(self.mesh)

    @property
    def shared(self) -> dict[str, Any]:
        """The static arguments that several programs have."""
        return {"cfg": self.model, "dtype": self.dtype, "mesh": self.mesh}

    @property
    def of_slots(self) -> dict[str, Any]:
        """The static arguments of `programs.empty_slots` but for the sizes."""
        return self.shared | {"unrolled": self.unrolled and not self.stacked_cache}


def setup_for(
    model: ModelConfig, mesh: Mesh, room: Room, seed: int, dtype: DTypeLike, eos_ids: tuple[int, ...], stop: Stop | None
) -> EngineSetup:
    """The setup with the forms of weights, cache and attention that are fastest on the devices of the mesh.

    In a compiled loop over stacked layers the CPU copies the weights and the cache of each layer, and the TPU does not
    prefetch weights, so these decode with unrolled weights. Other devices loop, which compiles faster. XLA on TPU v4
    copies an unrolled cache of few rows to fast memory, so only the CPU unrolls it. The tokens are always the same.
    """
    platform = mesh.devices.flat[0].platform
    forms: dict[str, Any] = {"unrolled": platform in ("cpu", "tpu"), "stacked_cache": platform != "cpu"}
    if platform == "tpu":
        forms["attend"] = attend_own_heads
    return EngineSetup(model, mesh, eos_ids, seed, room, dtype, stop=stop, **forms)


def drawing_of(sampling: SamplingConfig) -> SamplingConfig:
    """The static argument of `programs.decode`. Limits and stop texts are not in it, so they change no program."""
    return dataclasses.replace(sampling, max_new_tokens=0, stop="")


@dataclasses.dataclass
class Draft:
    """A request that is queued or in a row, and the tokens that have been drawn for it, chunk by chunk."""

    request: Request
    limit: int  # tokens to draw at most
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    logp: list[np.ndarray] = dataclasses.field(default_factory=list)
    kept: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def prefilled(self) -> int:
        """Tokens of its prompt but for the last, which decoding feeds."""
        return len(self.request.prompt_ids) - 1

    @property
    def drawn(self) -> int:
        return sum(map(len, self.ids))


class Pool:
    """Rows whose rings have one size. Where that is not fixed, rows and slots grow and shrink with the requests."""

    def __init__(self, setup: EngineSetup, fixed: Ring | None):
        self.setup, self.fixed = setup, fixed
        self.rows: list[Draft | None] = []
        self.slots: programs.Slots | None = None
        if fixed:
            self._make(fixed.rows, fixed.slots)

    def _make(self, rows: int, slots: int) -> None:
        self.slots, self.rows = programs.empty_slots(rows=rows, slots=slots, **self.setup.of_slots), [None] * rows

    @property
    def live(self) -> list[int]:
        """The rows that have a request."""
        return [r for r, draft in enumerate(self.rows) if draft is not None]

    @property
    def free(self) -> list[int]:
        return [r for r, draft in enumerate(self.rows) if draft is None]

    def holds(self, draft: Draft) -> bool:
        """Whether the rings of this pool are large enough for a request."""
        sizes = self.setup.room.fixed
        return self.fixed is None or sizes is None or sizes.fits(self.fixed, draft.prefilled, draft.limit)

    def _rows_wanted(self, live: int, queued: int) -> int:
        least, now = self.setup.least_rows, len(self.rows)
        wanted = min(self.setup.room.rows, live + queued)
        if wanted > now:
            return grown_rows(wanted, least, self.setup.room.rows)
        return next(size for size in row_sizes(now, least) if size >= wanted)

    def fit(self, queue: Sequence[Draft]) -> None:
        """Grows or shrinks rows and slots to what the next chunk needs."""
        if self.fixed:
            return
        live = self.live
        rows = self._rows_wanted(len(live), len(queue))
        used = [draft for draft in self.rows if draft is not None] + [*queue[: rows - len(live)]]
        needed = ring_size(max(draft.prefilled + min(draft.limit, draft.drawn + self.setup.chunk) for draft in used))
        if self.slots is None:
            self._make(rows, needed)
            return
        now_slots = self.slots.ring
        needed = now_slots if now_slots // 2 < needed <= now_slots else needed  # a resize copies the cache
        if (rows, needed) == (len(self.rows), now_slots):
            return
        source = np.full(rows, -1, np.int32)
        source[: len(live)] = live
        self.slots = programs.resize(self.slots, source, slots_to=needed, mesh=self.setup.mesh)
        self.rows = [self.rows[r] if r >= 0 else None for r in source]

    def enter(self, placed: Sequence[tuple[int, Draft]], prompt: programs.KVCache, key: jax.Array) -> None:
        """Puts a prefilled prompt into rows, each with a request that has this prompt."""
        R, ids = len(self.rows), placed[0][1].request.prompt_ids
        row_R, limit_R, name_R4 = np.zeros(R, np.int32), np.zeros(R, np.int32), np.zeros((R, 4), np.int32)
        for i, (r, draft) in enumerate(placed):
            row_R[i], limit_R[i], name_R4[i] = r, draft.limit, draft.request.name[:4]
            self.rows[r] = draft
        entry = programs.Entry(np.int32(len(placed)), row_R, limit_R, name_R4)
        assert self.slots is not None
        args = (self.slots, prompt, np.int32(len(ids) - 1), np.int32(ids[-1]), entry, key)
        self.slots = programs.enter(*args, mesh=self.setup.mesh)

    def decode(self, weights: Params, sampling: SamplingConfig, others_wait: bool) -> programs.Chunk:
        """Starts to decode a chunk, and leaves the result on the devices.

        It ends early once enough rows have ended: for others that wait for a row, or for the pool to shrink.
        """
        setup = self.setup
        if others_wait:
            leave_at = max(1, len(self.rows) // 16)
        else:
            fewer = [0] if self.fixed else [0, *row_sizes(len(self.rows), setup.least_rows)][:-1]
            leave_at = len(self.live) - fewer[-1]
        args = (weights, self.slots, programs.eos_set(setup.eos_ids), np.int32(max(1, leave_at)))
        static = setup.shared | {"sampling": drawing_of(sampling), "chunk": setup.chunk}
        self.slots, out = programs.decode(*args, **static)
        return out

    def book(self, out: programs.Chunk, stats: Stats) -> Done:
        """Waits for a chunk, appends to each row its new tokens, and returns the requests that ended."""
        chunk = jax.device_get(out)
        stats.row_steps += int(chunk.steps) * len(self.rows)
        done = []
        for r, draft in enumerate(self.rows):
            if draft is None:
                continue
            made, over = int(chunk.made_R[r]), not chunk.active_R[r]
            draft.ids.append(chunk.token_RC[r, :made])
            draft.logp.append(chunk.logp_RC[r, :made])
            draft.kept.append(chunk.kept_RC[r, :made])
            count = None  # the tokens that a row keeps that has written a stop text
            if self.setup.stop is not None:
                drawn = np.concatenate(draft.ids).tolist()
                count = self.setup.stop(drawn, len(drawn) if over else made)  # at its end all of it is searched
            if count is not None:
                made -= draft.drawn - count  # those after a stop text are dropped
            stats.tokens += made
            stats.nonfinite += int(np.count_nonzero(~np.isfinite(chunk.logp_RC[r, : max(made, 0)])))
            if over or count is not None:
                ids, logp, kept = (np.concatenate(parts)[:count] for parts in (draft.ids, draft.logp, draft.kept))
                finished = bool(chunk.finished_R[r]) or count is not None
                done.append((draft.request, Completion(ids, logp, kept, finished)))
                self.rows[r] = None
        if self.slots is not None and any(chunk.active_R[r] and draft is None for r, draft in enumerate(self.rows)):
            going_on_R = np.array([draft is not None for draft in self.rows])
            self.slots = programs.halt(self.slots, going_on_R, mesh=self.setup.mesh)
        return done
