"""What lives on a chip while a program runs: its own peak, and the tensors of the run that it is not handed."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from cgrpo_jax import build, planning
from cgrpo_jax.build import Outline
from cgrpo_jax.planner.figures import Figures, Leaf, leaves_of, total_bytes
from cgrpo_jax.planning import Program

ROWS = "rows of the sampler"
OTHER_ROWS = "rows with other rings"
WAITING = "waiting prompts"
LOCAL = "weights of the second model"
LOCAL_ROWS = "rows of the second model"
ALWAYS = ("parameters", "optimizer state", "reference parameters", LOCAL)  # also when no sampler is there
SYNCS = ("synced", "reshard", "local_synced")  # kinds that make the sampler's weights, before it has rows
LEARNING = ("init", "sums", "nonfinite", "logps", "update")  # kinds that run when no sampler is there


class Resident(NamedTuple):
    """Tensors of one class."""

    name: str
    leaves: collections.Counter[Leaf]
    knob: str  # what makes them smaller


def residents(run: Outline, chosen: Mapping[str, Program]) -> list[Resident]:
    """All classes of a run, those of training first.

    Args:
      chosen: kind -> its largest program, of choosing.largest.
    """
    state = build.abstract_state(run)
    across = "more chips along mesh.fsdp, which divides them"
    found = [
        Resident("parameters", leaves_of(state.params), across),
        Resident("optimizer state", leaves_of(state.opt_state), across),
    ]
    if run.cfg.objective.kl_coef > 0:
        found.append(Resident("reference parameters", leaves_of(state.params), "objective.kl_coef = 0, or " + across))
    if "decode" in chosen:
        weights, slots = chosen["decode"].arguments[:2]
        own = leaves_of(weights) - leaves_of(state.params)  # what needs no change is handed on, not copied
        found.append(Resident("sampler weights", own, "a larger sampler.tensor"))
        fewer = "fewer rows in sampler.rings" if run.sampler.room.fixed else "a smaller sampler.kv_cache_mb"
        found.append(Resident(ROWS, leaves_of(slots), fewer))
        if others := _others(run, slots.ring):
            found.append(Resident(OTHER_ROWS, others, fewer))
    if "local_decode" in chosen:
        weights, slots = chosen["local_decode"].arguments[:2]
        found.append(Resident(LOCAL, leaves_of(weights), "a smaller local.path, or a larger sampler.tensor"))
        found.append(Resident(LOCAL_ROWS, leaves_of(slots), "a smaller sampler.kv_cache_mb"))
    if "enter" in chosen:
        found.append(Resident(WAITING, _waiting(run, chosen["enter"]), "a smaller sampler.kv_cache_mb"))
    return found


def _others(run: Outline, ring: int) -> collections.Counter[Leaf]:
    """All rows, where their numbers are fixed, but those with rings of this size."""
    fixed = run.sampler.room.fixed
    rings = [other for other in fixed.rings if other.slots != ring] if fixed else []
    return sum((leaves_of(planning.abstract_slots(run, other)) for other in rings), collections.Counter[Leaf]())


def _waiting(run: Outline, enter: Program) -> collections.Counter[Leaf]:
    """Prefilled prompts that are in no row yet, as many as the sampler keeps."""
    prompt = leaves_of(enter.arguments[1])
    tokens = max(leaf.shape[-2] for leaf in jax.tree.leaves(enter.arguments[1]))
    kept = max(1, run.sampler.room.prompt_tokens // tokens)
    return collections.Counter({leaf: count * kept for leaf, count in prompt.items()})


class Occupied(NamedTuple):
    """A chip's memory while a program runs."""

    figures: Figures
    held: dict[str, int]  # class -> bytes that are the program's arguments or outputs
    beside: dict[str, int]  # class -> bytes that are not

    @property
    def bytes(self) -> float:
        return self.figures.peak_bytes + sum(self.beside.values())


def occupied(figures: Figures, classes: Sequence[Resident]) -> Occupied:
    """Matches the tensors of the run with those of the program; before sampling there are none of the sampler.

    A program of one model is handed nothing of the other, however alike their tensors are.
    """
    handed = collections.Counter(figures.holds)
    held, beside = dict[str, int](), dict[str, int]()
    sampling = figures.kind not in LEARNING
    for resident in classes:
        second = resident.name in (LOCAL, LOCAL_ROWS)
        own = resident.leaves & handed if second == figures.kind.startswith("local_") else collections.Counter()
        handed -= own
        if own:
            held[resident.name] = total_bytes(own)
        if sampling or resident.name in ALWAYS:
            rest = total_bytes(resident.leaves - own)
            if rest and not (figures.kind in SYNCS and resident.name in (ROWS, OTHER_ROWS, WAITING, LOCAL_ROWS)):
                beside[resident.name] = rest
    return Occupied(figures, held, beside)


TEMPORARY = {
    "update": "a smaller train.micro_batch, or train.remat=full",
    "logps": "a smaller train.micro_batch",
    "prefill": "a smaller data.max_prompt_tokens or refine.max_prompt_tokens",
    "prefill_after": "a smaller data.max_prompt_tokens or refine.max_prompt_tokens",
}


def largest_part(place: Occupied, classes: Sequence[Resident]) -> tuple[str, float, str]:
    """(tensor class, its bytes, the knob that makes it smaller) of what takes most while a program runs."""
    knobs = {resident.name: resident.knob for resident in classes}
    parts = collections.Counter[str]()
    for found in (place.held, place.beside):
        parts.update(found)
    temporary = place.figures.peak_bytes - sum(place.held.values())
    shown = [(name, float(size), knobs[name]) for name, size in parts.items()]
    knob = TEMPORARY.get(place.figures.kind, "a smaller sampler.kv_cache_mb")
    shown.append((f"temporaries of {place.figures.kind}", temporary, knob))
    return max(shown, key=_size)


def _size(part: tuple[str, float, str]) -> float:
    return part[1]


def checkpoint_bytes(run: Outline) -> int:
    """Of one checkpoint: parameters and optimizer state, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(build.abstract_state(run)))
