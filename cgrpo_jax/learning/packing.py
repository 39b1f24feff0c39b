"""Packs segments into bins of one size, in numpy. The number of bins is a trip count, so one program serves a run.

A bin has B rows of T tokens, each row with whole segments one after another, and, where prompts are shared, Q prompts
of S slots: prompt q stands before the B/Q rows that follow from it and runs through the model once for them. Who shares
is decided by backend (`shares_prompts`); the gradient is the same.

A segment is fed as (prompt + ids) less its last id, and scored where the next id is one that was sampled. Where its
prompt is shared the row begins with the prompt's last id, so a row takes as many places as the segment has ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.records import Segment

SHORT = 128  # tokens: rows up to this length are not worth packing several segments into
BLOCK = 128  # tokens: rows with their own prompts are multiples of it, as the attention kernels of a TPU want


class PackingError(ValueError):
    """A segment, or all segments of an update, that the bins have no room for."""


class BinSize(NamedTuple):
    """The shape of the bins of a run."""

    capacity: int  # A, bins at most in an update
    prompts: int  # Q; 0: rows hold their own prompts
    prompt_slots: int  # S
    rows: int  # B
    tokens: int  # T


class Bins(NamedTuple):
    """The segments of one update (numpy on the host, then device arrays); the first `count` bins are filled."""

    count: Any  # int32
    token_ABT: Any  # int32, what is fed
    position_ABT: Any  # int32, of the text
    segment_ABT: Any  # int32, from 1 in each row; 0: padding
    target_ABT: Any  # int32, the id that follows
    scored_ABT: Any  # bool: the target is one of the segment's own ids, and sampled
    refined_ABT: Any  # bool
    pg_ABT: Any  # float32, as the rest; see records.Segment
    ce_ABT: Any | None  # None where the run has no such term
    ent_ABT: Any | None
    kl_ABT: Any | None
    sampler_logp_ABT: Any | None
    prompt_AQS: Any | None  # int32; None where rows hold their own prompts
    prompt_length_AQ: Any | None  # int32
    old_logp_ABT: Any | None = None  # the trainer's own, where there are several updates per rollout
    ref_logp_ABT: Any | None = None  # of the reference policy, where there is a KL term


class Terms(NamedTuple):
    """Which terms and comparisons a run has: decides which arrays its bins carry."""

    ce: bool = False
    ent: bool = False
    kl: bool = False
    sampler: bool = True


def ladder(length: int) -> int:
    """The smallest of 64, 80, 96, 112, 128, 160, ... that holds `length`: tokens of a row.

    Four sizes an octave bound the shapes ever compiled, and the padding (beyond 64) by a quarter.
    """
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return max(64, -(-length // step) * step)


def shares_prompts(platform: str) -> bool:
    """On a TPU a second pass over the layers costs more than the tokens it saves; elsewhere sharing wins."""
    return platform != "tpu"


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def bin_size(
    *,
    share: bool,
    problems: int,
    group: int,
    at_once: int,
    row_devices: int,
    longest_prompt: int,
    longest_ids: int,
) -> BinSize:
    """The bins of a run.

    Args:
      problems: of an update.
      group: G, segments a problem at most.
      at_once: problems whose segments share a bin; rounded up to the devices. 0: as little as can be, one problem a
        device where prompts are shared, and one row a device where not.
      row_devices: devices that share the rows of a bin.
      longest_prompt, longest_ids: tokens.
    """
    prompts = _rounded_up(max(1, at_once), row_devices)
    if not share:
        rows = prompts * group if at_once else row_devices
        tokens = _rounded_up(ladder(longest_prompt + longest_ids - 1), BLOCK)
        return BinSize(-(-problems * group // rows), 0, 0, rows, tokens)
    tokens = ladder(longest_ids)
    rows_each = group if tokens <= SHORT else -(-group // 2)
    capacity = -(-problems * -(-group // rows_each) // prompts)
    return BinSize(capacity, prompts, ladder(max(1, longest_prompt - 1)), prompts * rows_each, tokens)


def _into_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Assigns segments to rows by first fit, longest first: the indices of the segments of each row."""
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(left) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(index)
        left[row] -= lengths[index]
    return rows


def _rows_of(segments: Sequence[Segment], size: BinSize) -> Iterator[tuple[Sequence[int], list[list[Segment]]]]:
    """(shared prompt or none, its rows of segments); never more rows than stand behind a prompt of a bin."""
    if not size.prompts:
        rows = _into_rows([len(s.prompt_ids) + len(s.ids) - 1 for s in segments], size.tokens)
        yield from (([], [[segments[i] for i in row]]) for row in rows)
        return
    by_prompt: dict[tuple[int, ...], list[Segment]] = {}
    for segment in segments:
        by_prompt.setdefault(tuple(segment.prompt_ids), []).append(segment)
    each = size.rows // size.prompts
    for prompt, own in by_prompt.items():
        rows = _into_rows([len(s.ids) for s in own], size.tokens)
        for first in range(0, len(rows), each):
            yield prompt, [[own[i] for i in row] for row in rows[first : first + each]]


def empty_bins(size: BinSize, terms: Terms) -> Bins:
    """Bins that hold no segment yet."""
    shape = (size.capacity, size.rows, size.tokens)
    shared = bool(size.prompts)

    def zeros(wanted: bool = True, dtype: Any = np.float32) -> np.ndarray | None:
        return np.zeros(shape, dtype) if wanted else None

    return Bins(
        count=np.int32(0),
        token_ABT=zeros(dtype=np.int32),
        position_ABT=zeros(dtype=np.int32),
        segment_ABT=zeros(dtype=np.int32),
        target_ABT=zeros(dtype=np.int32),
        scored_ABT=zeros(dtype=bool),
        refined_ABT=zeros(dtype=bool),
        pg_ABT=zeros(),
        ce_ABT=zeros(terms.ce),
        ent_ABT=zeros(terms.ent),
        kl_ABT=zeros(terms.kl),
        sampler_logp_ABT=zeros(terms.sampler),
        prompt_AQS=np.zeros((size.capacity, size.prompts, size.prompt_slots), np.int32) if shared else None,
        prompt_length_AQ=np.zeros((size.capacity, size.prompts), np.int32) if shared else None,
    )


def _fill(bins: Bins, place: tuple[int, int], first: int, number: int, segment: Segment, own_prompt: bool) -> int:
    """Writes a segment into row `place` from token `first` on; returns where the next one may begin."""
    text = np.asarray([*segment.prompt_ids, *segment.ids], np.int32)
    begin = 0 if own_prompt else len(segment.prompt_ids) - 1
    last = first + len(text) - 1 - begin
    sampled = slice(None) if segment.sampled_T is None else segment.sampled_T
    everything, ids = (*place, slice(first, last)), (*place, np.arange(last - len(segment.ids), last)[sampled])
    bins.token_ABT[everything] = text[begin:-1]
    bins.position_ABT[everything] = np.arange(begin, len(text) - 1)
    bins.segment_ABT[everything] = number
    bins.target_ABT[everything] = text[begin + 1 :]
    bins.scored_ABT[ids] = True
    bins.refined_ABT[ids] = segment.refined
    weights = (
        (bins.pg_ABT, segment.pg_T),
        (bins.ce_ABT, segment.ce_T),
        (bins.ent_ABT, segment.ent_T),
        (bins.kl_ABT, segment.kl_T),
        (bins.sampler_logp_ABT, segment.sampler_logp_T),
    )
    for array, values in weights:
        if array is not None:
            array[ids] = np.nan if values is None else values[sampled]  # None: nobody sampled it
    return last


def pack(segments: Sequence[Segment], size: BinSize, terms: Terms) -> Bins:
    """Bins of the segments that have any weight; none at all are bins whose count is 0.

    Raises:
      PackingError: a segment does not fit, or the segments do not.
    """
    bins = empty_bins(size, terms)
    each = size.rows // max(1, size.prompts) if size.prompts else 1  # rows of a unit that is placed as a whole
    units = size.rows // each  # of a bin
    placed = 0
    for prompt, rows in _rows_of([segment for segment in segments if not segment.silent], size):
        a, unit = divmod(placed, units)
        if a >= size.capacity:
            raise PackingError(f"the segments of an update do not fit {size.capacity} bins of {size.rows} rows")
        if bins.prompt_AQS is not None and bins.prompt_length_AQ is not None:
            if len(prompt) - 1 > size.prompt_slots:
                raise PackingError(f"a prompt of {len(prompt)} tokens does not fit {size.prompt_slots} slots")
            bins.prompt_AQS[a, unit, : len(prompt) - 1] = prompt[:-1]
            bins.prompt_length_AQ[a, unit] = len(prompt) - 1
        for r, row in enumerate(rows):
            first = 0
            for number, segment in enumerate(row, 1):
                needed = len(segment.ids) + (0 if size.prompts else len(segment.prompt_ids) - 1)
                if first + needed > size.tokens:
                    raise PackingError(f"a segment of {needed} tokens does not fit rows of {size.tokens}")
                first = _fill(bins, (a, unit * each + r), first, number, segment, not size.prompts)
        placed += 1
    return bins._replace(count=np.int32(-(-placed // units)))


def pack_smallest(segments: Sequence[Segment], sizes: Sequence[BinSize], terms: Terms) -> Bins:
    """`pack` into the first size that holds all segments. Raises PackingError where not even the last one does."""
    for size in sizes[:-1]:
        with contextlib.suppress(PackingError):
            return pack(segments, size, terms)
    return pack(segments, sizes[-1], terms)
