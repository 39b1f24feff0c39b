"""The memory of a chip while a program runs: the peak of the program, and tensors that are not its arguments."""

from __future__ import annotations

import collections
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from cgrpo_jax.planner.figures import Figures, Leaf, leaves_of, total_bytes
from cgrpo_jax.planner.programs import SECOND, Program, abstract_slots
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.models import Model

ROWS = "rows of the sampler"
SYNC = "synced"  # the kind of program that makes the sampler's weights, before there are rows
LEARNING = ("init", "sums", "nonfinite", "logps", "update")  # kinds that run without a sampler
ALWAYS, SAMPLING, DECODING = range(3)  # when tensors exist: always, with a sampler, once it has rows


class Resident(NamedTuple):
    """A class of tensors of the run."""

    name: str
    leaves: collections.Counter[Leaf]
    knob: str  # the option that makes them smaller
    there: int = ALWAYS
    of: str = ""  # the prefix of the programs of their model: "", or SECOND


def residents(run: Run, chosen: Mapping[str, Program]) -> list[Resident]:
    """All classes of tensors of a run, those of training first.

    Args:
      chosen: kind -> its largest program, of programs.largest.
    """
    state = run.abstract_state()
    params, across = leaves_of(run.policy.abstract_weights()), "more chips along mesh.fsdp, which divides them"
    found = [
        Resident("parameters", params, across),
        Resident("optimizer state", leaves_of(state.opt_state), across),
    ]
    if run.cfg.objective.kl_coef > 0:
        own = leaves_of(state.params)  # the frozen parameters are shared with the policy
        found.append(Resident("reference parameters", own, "objective.kl_coef = 0, or " + across))
    found += _of_sampler(run.policy, chosen, params)
    if run.second is not None:  # of its parameters only those that its sampler uses stay
        found += _of_sampler(run.second, chosen, collections.Counter(), SECOND, " of the second model")
    return found


def _of_sampler(
    model: Model, chosen: Mapping[str, Program], kept: collections.Counter[Leaf], of: str = "", whose: str = ""
) -> Iterator[Resident]:
    """Weights, rows and waiting prompts of the sampler of a model.

    Args:
      kept: parameters of the model that stay in memory; those that the sampler uses unchanged are not counted twice.
      of, whose: prefix of the model's programs, suffix of its classes.
    """
    if of + "decode" not in chosen:
        return
    weights, slots = chosen[of + "decode"].arguments[:2]
    fixed, tensor, cache = model.sampler.room.fixed, "a larger sampler.tensor", "a smaller sampler.kv_cache_mb"
    fewer = "fewer rows in sampler.rings" if fixed else cache
    less, there = (f"a smaller local.path, or {tensor}", ALWAYS) if of else (tensor, SAMPLING)
    yield Resident("sampler weights" + whose, leaves_of(weights) - kept, less, there, of)
    yield Resident(ROWS + whose, leaves_of(slots), fewer, DECODING, of)
    others = [ring for ring in fixed.rings if ring.slots != slots.ring] if fixed else []
    if leaves := sum((leaves_of(abstract_slots(model.sampler, ring)) for ring in others), collections.Counter[Leaf]()):
        yield Resident("rows with other rings" + whose, leaves, fewer, DECODING, of)
    if of + "enter" in chosen:
        yield Resident("waiting prompts" + whose, _waiting(model, chosen[of + "enter"]), cache, DECODING, of)


def _waiting(model: Model, enter: Program) -> collections.Counter[Leaf]:
    """Prefilled prompts that wait for a row, as many as the sampler keeps."""
    prompt = leaves_of(enter.arguments[1])
    tokens = max(leaf.shape[-2] for leaf in jax.tree.leaves(enter.arguments[1]))
    kept = max(1, model.sampler.room.prompt_tokens // tokens)
    return collections.Counter({leaf: count * kept for leaf, count in prompt.items()})


class Occupied(NamedTuple):
    """The memory of a chip while a program runs."""

    figures: Figures
    held: dict[str, int]  # class -> bytes that are the program's arguments or outputs
    beside: dict[str, int]  # class -> bytes that are not

    @property
    def bytes(self) -> float:
        return self.figures.peak_bytes + sum(self.beside.values())


def occupied(figures: Figures, classes: Sequence[Resident]) -> Occupied:
    """Matches the tensors of the run with the arguments and outputs of a program.

    A program is matched with tensors of its own model only, even if those of the other have the same shapes.
    """
    handed = collections.Counter(figures.holds)
    held, beside = dict[str, int](), dict[str, int]()
    kind, of = figures.kind.removeprefix(SECOND), SECOND if figures.kind.startswith(SECOND) else ""
    there = ALWAYS if kind in LEARNING else SAMPLING if kind == SYNC else DECODING
    for resident in classes:
        own = resident.leaves & handed if resident.of == of else collections.Counter()
        handed -= own
        if own:
            held[resident.name] = total_bytes(own)
        if resident.there <= there and (rest := total_bytes(resident.leaves - own)):
            beside[resident.name] = rest
    return Occupied(figures, held, beside)


TEMPORARY = {
    "update": "a smaller train.micro_batch, or train.remat=full",
    "logps": "a smaller train.micro_batch",
    "prefill": "a smaller data.max_prompt_tokens or refine.max_prompt_tokens",
    "prefill_after": "a smaller data.max_prompt_tokens or refine.max_prompt_tokens",
}


def largest_part(place: Occupied, classes: Sequence[Resident]) -> tuple[str, float, str]:
    """(class, bytes, the option that makes it smaller) of the tensors that take most memory while a program runs."""
    knobs = {resident.name: resident.knob for resident in classes}
    parts = collections.Counter(place.held) + collections.Counter(place.beside)
    temporary = place.figures.peak_bytes - sum(place.held.values())
    shown = [(name, float(size), knobs[name]) for name, size in parts.items()]
    knob = TEMPORARY.get(place.figures.kind, "a smaller sampler.kv_cache_mb")
    shown.append((f"temporaries of {place.figures.kind}", temporary, knob))
    return max(shown, key=operator.itemgetter(1))


def checkpoint_bytes(run: Run) -> int:
    """Bytes of one checkpoint: parameters and optimizer state, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state()))
