"""Which of all programs are compiled for a plan: the largest of each kind."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from cgrpo_jax.planner.figures import kind_of
from cgrpo_jax.planning import Program

SMALL = ("step_key",)  # holds nothing, and no argument says on which devices


def _weight(program: Program) -> tuple[float, float, int]:
    """By the bytes of the arguments, then by the numbers that are static (rows, slots), then by the longest axis.

    The last decides between prompts of as many tokens: long ones need more than many.
    """
    leaves = jax.tree.leaves(program.arguments)
    held = float(sum(math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8) for leaf in leaves))
    static = math.prod(value for value in program.static.values() if type(value) is int and value > 0)
    own = [axis for leaf in leaves if isinstance(leaf, np.ndarray) for axis in leaf.shape]
    return held, static, max(own, default=0)


def largest(programs: Iterable[Program]) -> dict[str, Program]:
    """Kind -> its largest program, in the order in which the kinds come."""
    chosen: dict[str, tuple[Any, Program]] = {}
    for program in programs:
        kind, weight = kind_of(program.name), _weight(program)
        if kind not in SMALL and (kind not in chosen or weight > chosen[kind][0]):
            chosen[kind] = (weight, program)
    return {kind: program for kind, (_, program) in chosen.items()}
