"""The most rows that fit, of the sampler and of a bin: extrapolated from two compiled programs, then compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.planner.memory import Occupied
from cgrpo_jax.planner.programs import Program, largest, learning_programs, row_counts, sampler_programs
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.models import Model
from cgrpo_jax.sampling.room import row_devices

Occupy = Callable[[Program], Occupied]  # compiles, and returns the memory of a chip


class Most(NamedTuple):
    """The most that fits."""

    number: int  # 0: not even the fewest
    bytes: float  # of a chip then; extrapolated to the fewest where none fits


def _guess(seen: Mapping[int, float], least: int, hbm: float) -> tuple[int, float]:
    """(the most that fits, bytes of `least`), by the line through the two numbers that are closest to the limit."""
    near = sorted((number for number in seen if math.isfinite(seen[number])), key=lambda n: abs(seen[n] - hbm))[:2]
    if len(near) < 2 or not (seen[max(near)] > seen[min(near)]):
        return max((number for number, size in seen.items() if size <= hbm), default=0), seen[min(seen)]
    slope = (seen[max(near)] - seen[min(near)]) / (max(near) - min(near))
    end = min(near) + (hbm - seen[min(near)]) / slope
    return int(end + 1e-9) // least * least, seen[min(near)] + slope * (least - min(near))


def most(planned: int, known: float, least: int, hbm: float, occupy: Callable[[int], tuple[int, float]]) -> Most:
    """Finds the largest multiple of `least` that fits, and has compiled it.

    Args:
      planned, known: a number, and the bytes of a chip with that number.
      occupy: compiles with a number; returns the number that was used instead (never more), and the bytes of a chip.
    """
    seen = {planned: known}

    def look(number: int) -> float:
        made, size = occupy(number)
        seen[made] = size
        return size

    look(planned // 2 // least * least or 2 * planned)
    for _ in range(2):  # once more, as memory is not quite linear
        guess, _ = _guess(seen, least, hbm)
        if guess < least or guess in seen or look(guess) <= hbm:
            break
    fitting = max((number for number, size in seen.items() if size <= hbm), default=0)
    return Most(fitting, seen[fitting] if fitting else _guess(seen, least, hbm)[1])


def with_rows(model: Model, rows: int, slots: int) -> Model:
    """The model with `rows` rows decoded together, as if there were always enough requests.

    Args:
      slots: of the rings whose rows are changed, where rings are fixed.
    """
    room = model.sampler.room
    if fixed := room.fixed:
        rings = tuple(ring._replace(rows=rows) if ring.slots == slots else ring for ring in fixed.rings)
        fixed = dataclasses.replace(fixed, rings=rings)
    sampler = dataclasses.replace(model.sampler, room=dataclasses.replace(room, rows=rows, fixed=fixed))
    return dataclasses.replace(model, sampler=sampler, load=model.load._replace(requests=rows))


def most_rows(model: Model, planned: Occupied, hbm: float, occupy: Occupy) -> Most:
    """The most rows of the sampler, in the longest rings, or in the largest of fixed rings."""
    first, slots = map(int, planned.figures.name.split("/")[1].split("x"))

    def made(rows: int) -> tuple[int, float]:
        other = with_rows(model, rows, slots)
        if other.sampler.room.fixed:
            decodes = (p for p in sampler_programs(other) if p.name.startswith(f"decode/{rows}x{slots}/"))
            return rows, occupy(next(decodes)).bytes
        allowed = max(count for count in row_counts(other) if count <= rows)
        program = largest(sampler_programs(with_rows(model, allowed, slots)))["decode"]
        return allowed, occupy(program).bytes

    return most(first, planned.bytes, model.sampler.least_rows, hbm, made)


def scaled(size: BinSize, prompts_or_rows: int) -> BinSize:
    """A bin with another number of prompts and their rows, where bins share prompts, else of rows."""
    if not size.prompts:
        return size._replace(rows=prompts_or_rows)
    return size._replace(prompts=prompts_or_rows, rows=prompts_or_rows * size.rows // size.prompts)


def most_in_a_bin(run: Run, size: BinSize, planned: Occupied, hbm: float, occupy: Occupy) -> Most:
    """The most rows of a bin over all chips, or the most prompts, where rows share them."""

    def made(number: int) -> tuple[int, float]:
        program = largest(learning_programs(run, [scaled(size, number)]))["update"]
        return number, occupy(program).bytes

    return most(size.prompts or size.rows, planned.bytes, row_devices(run.mesh), hbm, made)
