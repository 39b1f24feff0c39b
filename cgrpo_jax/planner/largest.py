"""The most rows that fit, of the sampler and of a bin: a line through two compiled programs, and a third to verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from cgrpo_jax import planning
from cgrpo_jax.build import Outline
from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.planner.choosing import largest
from cgrpo_jax.planner.memory import Occupied
from cgrpo_jax.planning import Program
from cgrpo_jax.sampling.sampler import Room

Occupy = Callable[[Program], Occupied]  # compiles, and says what a chip then holds


class Most(NamedTuple):
    """How many fit."""

    number: int  # 0: not even the fewest
    bytes: float  # what a chip then holds
    compiled: bool  # False: told by the line alone, for the program that should have verified it does not fit


def most(planned: int, known: float, least: int, hbm: float, occupy: Callable[[int], tuple[int, float]]) -> Most:
    """The largest multiple of `least` whose memory fits.

    Args:
      planned, known: a number, and the bytes of a chip with so many.
      occupy: compiles with a number; the number that it was really made with (rows may be rounded down), and its bytes.
    """
    seen = {planned: known}
    other = planned // 2 if planned // 2 >= least else 2 * planned
    made, size = occupy(-(-other // least) * least)
    seen[made] = size
    (few, low), (many, high) = sorted(seen.items())[:1][0], sorted(seen.items())[-1]
    if few == many or not low < high < float("inf"):
        fitting = [number for number, size in seen.items() if size <= hbm]
        return Most(max(fitting, default=0), seen[max(fitting)] if fitting else known, True)
    slope = (high - low) / (many - few)
    guess = int((hbm - low) / slope + few) // least * least
    if guess < least:
        return Most(0, low + slope * (least - few), False)
    if guess not in seen:
        made, size = occupy(guess)
        seen[made] = size
        if size > hbm:  # not quite a line
            return Most(made - least, size - slope * least, False)
    number = max(number for number, size in seen.items() if size <= hbm)
    return Most(number, seen[number], True)


def with_rows(run: Outline, rows: int) -> Outline:
    """The same run with so many rows decoded together, as if there were always enough to decode."""
    room = Room(rows, run.sampler.room.prompt_tokens)
    train = dataclasses.replace(run.cfg.train, prompts=rows, samples=1)
    cfg = dataclasses.replace(run.cfg, train=train)
    return dataclasses.replace(run, cfg=cfg, sampler=dataclasses.replace(run.sampler, room=room))


def most_rows(run: Outline, planned: Occupied, hbm: float, occupy: Occupy) -> Most:
    """Of the sampler, with the longest rings."""

    def made(rows: int) -> tuple[int, float]:
        program = largest(planning.sampler_programs(with_rows(run, rows)))["decode"]
        return rows_of(program), occupy(program).bytes

    first = int(planned.figures.name.split("/")[1].partition("x")[0])
    return most(first, planned.bytes, run.sampler.least_rows, hbm, made)


def rows_of(decode: Program) -> int:
    return len(decode.arguments[1].token_R)


def scaled(size: BinSize, prompts_or_rows: int) -> BinSize:
    """Another number of prompts with their rows, where bins have such, else of rows."""
    if not size.prompts:
        return size._replace(rows=prompts_or_rows)
    return size._replace(prompts=prompts_or_rows, rows=prompts_or_rows * size.rows // size.prompts)


def most_in_a_bin(run: Outline, size: BinSize, planned: Occupied, hbm: float, occupy: Occupy) -> Most:
    """Rows of a bin (prompts, where they are shared), over all chips."""

    def made(number: int) -> tuple[int, float]:
        program = largest(planning.learning_programs(run, [scaled(size, number)]))["update"]
        return number, occupy(program).bytes

    return most(size.prompts or size.rows, planned.bytes, run.sampler.least_rows, hbm, made)
