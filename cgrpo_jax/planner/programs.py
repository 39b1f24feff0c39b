"""Lists the programs of a run before anything runs. Training lowers exactly these programs.

No weights are needed, and the devices may be those of a topology that is not here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cgrpo_jax.learning.packing import BinSize, empty_bins
from cgrpo_jax.learning.update import bin_shardings, make_init, make_logps, make_update
from cgrpo_jax.model.sharding import with_shardings
from cgrpo_jax.run import build
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.models import Model
from cgrpo_jax.sampling import engine as engines
from cgrpo_jax.sampling import programs as sampling
from cgrpo_jax.sampling.draw import step_key
from cgrpo_jax.sampling.pool import EngineSetup, drawing_of
from cgrpo_jax.sampling.room import PREFILL_CHUNK, Ring, grown_rows, prefill_size, prefix_sizes, ring_size
from cgrpo_jax.workdir.digests import checking_programs


class Program(NamedTuple):
    """A jitted function and the arguments that it is called with: abstract arrays and static arguments."""

    name: str  # with its sizes
    function: Any
    arguments: tuple
    static: Mapping[str, Any] = MappingProxyType({})

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.static)


SECOND = "local_"  # prefix of the programs of the second model
SMALL = ("step_key",)  # kinds that take no memory, and whose arguments name no devices


def kind_of(name: str) -> str:
    """`decode` of `decode/256x8192/1,0,1`."""
    return name.partition("/")[0]


def programs(run: Run, sizes: Sequence[BinSize]) -> list[Program]:
    """All programs that a run may compile; which of the sampler's it does compile depends on the lengths.

    Args:
      sizes: of the bins of an update, see build.bin_sizes.
    """
    made = list(learning_programs(run, sizes))
    if run.policy.load.samplings:
        made.append(Program("step_key", step_key, (np.uint32(0), np.int32(0))))
        made += sampler_programs(run.policy)
    if run.second is not None:
        weights = run.second.abstract_weights()
        own = [*_checks("params", weights, run.mesh), *sampler_programs(run.second)]
        made += [program._replace(name=SECOND + program.name) for program in own]
    return made


def _weight(program: Program) -> tuple[float, float, int]:
    """The key of `largest`: bytes of the arguments, the product of static sizes (rows, slots), the longest axis.

    The last decides between prompts with the same total of tokens: few long ones need more memory than many short ones.
    """
    leaves = jax.tree.leaves(program.arguments)
    held = float(sum(math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8) for leaf in leaves))
    static = math.prod(value for value in program.static.values() if type(value) is int and value > 0)
    own = [axis for leaf in leaves if isinstance(leaf, np.ndarray) for axis in leaf.shape]
    return held, static, max(own, default=0)


def largest(programs: Iterable[Program]) -> dict[str, Program]:
    """Kind -> its largest program, in the order of the kinds in `programs`."""
    chosen: dict[str, tuple[Any, Program]] = {}
    for program in programs:
        weight = _weight(program)
        if program.kind not in SMALL and (program.kind not in chosen or weight > chosen[program.kind][0]):
            chosen[program.kind] = (weight, program)
    return {kind: program for kind, (_, program) in chosen.items()}


def _checks(name: str, tree: Any, mesh: Mesh) -> Iterator[Program]:
    """The programs for digests of a tree, and for finding a NaN or an infinity in it."""
    for function, leaves in checking_programs(tree, mesh):
        yield Program(f"{function.__name__.strip('_')}/{name}", function, (leaves,))


def learning_programs(run: Run, sizes: Sequence[BinSize]) -> Iterator[Program]:
    """The fresh optimizer state, checks of arrays, and for each size of bins the update and log-probabilities."""
    cfg, params, state = run.cfg, run.policy.abstract_weights(), run.abstract_state()
    trained, frozen = state.params, run.policy.abstract_weights(run.policy.frozen)
    yield Program("init", make_init(run.learner, run.mesh, trained), (trained,))
    yield from _checks("params", params, run.mesh)
    if frozen:
        yield from _checks("trained", trained, run.mesh)
        yield from _checks("frozen", frozen, run.mesh)
    yield from _checks("state", state._asdict(), run.mesh)
    several, kl = cfg.train.updates_per_rollout > 1, cfg.objective.kl_coef > 0
    for size in sizes:
        bins = empty_bins(size, build.terms(cfg))
        bins = with_shardings(bins, bin_shardings(run.mesh, bins))
        logps = make_logps(run.learner, run.mesh)
        name = "x".join(map(str, size))
        logp_ABT = jax.eval_shape(logps, params, bins)
        logp_ABT = with_shardings(logp_ABT, NamedSharding(run.mesh, P(None, sampling.ROW_AXES)))
        if several:
            yield Program(f"logps/{name}", logps, (params, bins))
            bins = bins._replace(old_logp_ABT=logp_ABT)
        if kl:
            yield Program(f"logps/{name}/reference", logps, (params, bins))
            bins = bins._replace(ref_logp_ABT=logp_ABT)
        yield Program(f"update/{name}", make_update(run.learner, run.mesh, trained), (state, frozen, bins))


def row_counts(model: Model) -> list[int]:
    """The numbers of rows that a sampler may decode together, where they are not fixed."""
    least = model.sampler.least_rows
    most = grown_rows(model.load.requests, least, model.sampler.room.rows)
    return sorted({min(most, least << i) for i in range(most.bit_length() + 1)})  # `most` need be no power of two


def _sampler_weights(model: Model) -> tuple[Program | None, Any]:
    """The program that makes the sampler's weights (None where it uses the parameters unchanged), and these weights."""
    setup, params = model.sampler, model.abstract_weights()
    layout: dict[str, Any] = {"dtype": setup.dtype, "mesh": setup.mesh, "unrolled": setup.unrolled}
    stale = engines.stale_weights(params, **layout)
    if not stale:
        return None, params
    static: dict[str, Any] = {"dtype": setup.dtype, "unrolled": setup.unrolled}
    sync = engines.make_sync(stale, **layout)
    synced = jax.eval_shape(lambda tree: engines.synced(tree, **static), stale)

    def placed(key_path: tuple, leaf: Any) -> Any:
        sharding = engines.weight_sharding(setup.mesh, key_path, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    weights = params | jax.tree_util.tree_map_with_path(placed, synced)
    return Program("synced", sync, (stale,), static), weights


def sampler_programs(model: Model) -> Iterator[Program]:
    """All programs that the sampler of a model may need: each number of rows with each ring, each prefill."""
    setup, longest, fixed = model.sampler, model.load.prompt_tokens, model.sampler.room.fixed
    layout: dict[str, Any] = {"dtype": setup.dtype, "mesh": setup.mesh}
    sync, weights = _sampler_weights(model)
    prefills_with = engines.weights_to_prefill(model.abstract_weights(), weights, **layout)
    key = jax.eval_shape(step_key, np.uint32(0), np.int32(0))
    if sync:
        yield sync
    prefills = fixed.prefills if fixed else sorted({prefill_size(n) for n in range(longest)})
    prompts = {}
    batches = [(size, count) for size in prefills for count in setup.room.counts(size, setup.least_rows)]
    for size, count in batches:
        tokens_QT = np.zeros((count * setup.least_rows, size), np.int32)
        static = {"cfg": model.shape, "attend": setup.attend} | layout
        program = Program(f"prefill/{len(tokens_QT)}x{size}", sampling.prefill, (prefills_with, tokens_QT), static)
        prompts[size] = jax.eval_shape(lambda p, t, s=static: sampling.prefill(p, t, **s), prefills_with, tokens_QT)[0]
        prompts[size] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sampling.prompt_sharding(setup.mesh, x.shape)),
            prompts[size],
        )
        yield program
    if not fixed:
        yield from _prefills_behind(model, longest - 1, prefills_with, prompts)
    if fixed:
        for ring in fixed.rings:
            yield from _programs_of_slots(model, ring, [], weights, prompts, key)
        return
    slots = sorted({ring_size(n) for n in range(1, longest + model.sampling.max_new_tokens + 1)})
    rings = [Ring(slots_, rows) for rows, slots_ in itertools.product(row_counts(model), slots)]
    for ring in rings:
        yield from _programs_of_slots(model, ring, [other for other in rings if other != ring], weights, prompts, key)


def _prefills_behind(model: Model, longest: int, weights: Any, prompts: dict[int, Any]) -> Iterator[Program]:
    """Prefills of prompts with a cached prefix (`room.prefix_sizes`).

    Args:
      longest: most tokens of a prompt that are prefilled.
      prompts: size -> the KV cache of a prefill of this size.
    """
    setup, sizes = model.sampler, set[tuple[int, int, int]]()
    for length in range(2, longest + 1):
        for before in prefix_sizes(length):
            if length - before <= PREFILL_CHUNK:
                sizes.add((before, prefill_size(length - before), prefill_size(length)))
    for before, rest, whole in sorted(sizes):
        for count in setup.room.counts(before + whole, setup.least_rows):
            Q = count * setup.least_rows
            static = {"cfg": model.shape, "attend": setup.attend, "dtype": setup.dtype, "mesh": setup.mesh}
            static |= {"before": before, "whole": whole}
            arguments = (weights, np.zeros((Q, rest), np.int32), (prompts[prefill_size(before)],) * Q)
            yield Program(f"prefill_after/{Q}x{rest}/{before}/{whole}", sampling.prefill, arguments, static)


def abstract_slots(setup: EngineSetup, ring: Ring) -> Any:
    """Shapes, dtypes and shardings of the rows of a ring."""
    static = {"rows": ring.rows, "slots": ring.slots} | setup.of_slots
    slots = jax.eval_shape(lambda: sampling.empty_slots(**static))
    return with_shardings(slots, sampling.slot_shardings(setup.mesh, slots))


def _programs_of_slots(
    model: Model, size_: Ring, others: Sequence[Ring], weights: Any, prompts: dict[int, Any], key: Any
) -> Iterator[Program]:
    """The programs for rows of one size, and those that resize them to `others`."""
    setup, (ring, rows) = model.sampler, size_
    size, static = f"{rows}x{ring}", {"rows": rows, "slots": ring} | setup.of_slots
    yield Program(f"empty_slots/{size}", sampling.empty_slots, (), static)
    slots = abstract_slots(setup, size_)
    row_R = np.zeros(rows, np.int32)
    entry = sampling.Entry(np.int32(0), row_R, row_R, np.zeros((rows, 4), np.int32))
    for length, prompt in prompts.items():
        if setup.room.fixed and length > ring:
            continue
        arguments = (slots, prompt, np.int32(0), np.int32(0), entry, key)
        yield Program(f"enter/{size}/{length}", sampling.enter, arguments, {"mesh": setup.mesh})
    for ring_to, rows_to in others:
        static = {"slots_to": ring_to, "mesh": setup.mesh}
        row_of_R = np.zeros(rows_to, np.int32)
        yield Program(f"resize/{size}/{rows_to}x{ring_to}", sampling.resize, (slots, row_of_R), static)
    if model.sampling.stop:
        yield Program(f"halt/{size}", sampling.halt, (slots, np.zeros(rows, bool)), {"mesh": setup.mesh})
    for drawing in dict.fromkeys(map(drawing_of, model.load.samplings)):
        static = {"cfg": model.shape, "sampling": drawing, "dtype": setup.dtype, "mesh": setup.mesh}
        static |= {"chunk": setup.chunk}
        eos_E = sampling.eos_set(setup.eos_ids)
        name = f"decode/{size}/{drawing.temperature:g},{drawing.top_k},{drawing.top_p:g}"
        yield Program(name, sampling.decode, (weights, slots, eos_E, np.int32(1)), static)
