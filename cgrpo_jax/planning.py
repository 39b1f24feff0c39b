"""Every program of a run, as a list, before anything runs: what is planned is what training lowers.

No weights are needed, and the devices may be those of a topology that is not here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cgrpo_jax import build
from cgrpo_jax.build import Outline
from cgrpo_jax.config import evaluation_sampling, longest_prompt
from cgrpo_jax.learning.packing import BinSize, empty_bins
from cgrpo_jax.learning.update import bin_shardings, make_init, make_logps, make_update
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.options import SamplingConfig
from cgrpo_jax.sampling import programs as sampling
from cgrpo_jax.sampling import weights as of_sampler
from cgrpo_jax.sampling.draw import step_key
from cgrpo_jax.sampling.pool import drawing_of
from cgrpo_jax.sampling.prefixes import CHUNK, prefix_sizes
from cgrpo_jax.sampling.sizes import Ring, grown_rows, prefill_size, ring_size
from cgrpo_jax.workdir.digests import checking_programs


class Program(NamedTuple):
    """A jitted function with the arguments it is called with: abstract arrays, and what is static."""

    name: str  # with its sizes
    function: Any
    arguments: tuple
    static: Mapping[str, Any] = MappingProxyType({})

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.static)


def abstract(tree: Any, shardings: Any = None) -> Any:
    """Shapes and dtypes of a tree, with where they lie."""
    if shardings is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def abstract_params(run: Outline) -> Any:
    """The float32 parameters of training, where they lie."""
    params = hf.abstract_params(run.model, jnp.float32)
    return abstract(params, sharding.param_shardings(run.mesh, params))


def learning_programs(run: Outline, sizes: Sequence[BinSize]) -> Iterator[Program]:
    """Fresh optimizer state, and per size of bins the update and the log-probabilities where the run needs them."""
    cfg, params, state = run.cfg, abstract_params(run), build.abstract_state(run)
    yield Program("init", make_init(run.learner, run.mesh, params), (params,))
    for name, tree in (("params", params), ("state", state)):
        for function, leaves in checking_programs(tree._asdict() if name == "state" else tree, run.mesh):
            yield Program(f"{function.__name__.strip('_')}/{name}", function, (leaves,))
    several, kl = cfg.train.updates_per_rollout > 1, cfg.objective.kl_coef > 0
    for size in sizes:
        bins = empty_bins(size, build.terms(cfg))
        bins = abstract(bins, bin_shardings(run.mesh, bins))
        logps = make_logps(run.learner, run.mesh)
        name = "x".join(map(str, size))
        logp_ABT = jax.eval_shape(logps, params, bins)
        logp_ABT = abstract(logp_ABT, NamedSharding(run.mesh, P(None, sampling.ROWS)))
        if several:
            yield Program(f"logps/{name}", logps, (params, bins))
            bins = bins._replace(old_logp_ABT=logp_ABT)
        if kl:
            yield Program(f"logps/{name}/reference", logps, (params, bins))
            bins = bins._replace(ref_logp_ABT=logp_ABT)
        yield Program(f"update/{name}", make_update(run.learner, run.mesh, params), (state, {}, bins))


def row_counts(run: Outline) -> list[int]:
    """Numbers of rows that a run may decode together, where they are not fixed."""
    cfg, least = run.cfg, run.sampler.least_rows
    asked = cfg.train.prompts * cfg.train.samples
    if cfg.eval.every or cfg.method == "eval":
        sets = 1 + len([name for name in cfg.eval.tasks.split(",") if name.strip()])
        asked = max(asked, sets * (cfg.eval.problems or 1 << 20) * cfg.eval.samples)
    most = grown_rows(asked, least, run.sampler.room.rows)
    return sorted({min(most, least << i) for i in range(most.bit_length())})


def samplings(run: Outline) -> list[SamplingConfig]:
    """How a run draws tokens: in training, and in evaluation."""
    cfg = run.cfg
    of_training = [cfg.sampling] if cfg.method in ("rl", "generate") else []
    evaluates = cfg.method == "eval" or (cfg.eval.every and cfg.method != "generate")
    asked = of_training + [evaluation_sampling(cfg)] * bool(evaluates)
    return list(dict.fromkeys(drawing_of(sampling) for sampling in asked))


def _sampler_weights(run: Outline, params: Any) -> tuple[Program | None, Any]:
    setup = run.sampler
    layout: dict[str, Any] = {"dtype": setup.dtype, "mesh": setup.mesh, "unrolled": setup.unrolled}
    stale = of_sampler.stale_weights(params, **layout)
    if not stale:
        return None, params
    static: dict[str, Any] = {"dtype": setup.dtype, "unrolled": setup.unrolled}
    sync = of_sampler.make_sync(stale, **layout)
    synced = jax.eval_shape(lambda tree: of_sampler.synced(tree, **static), stale)

    def placed(key_path: tuple, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=of_sampler.weight_sharding(setup.mesh, key_path, leaf)
        )

    weights = params | jax.tree_util.tree_map_with_path(placed, synced)
    return Program("synced", sync, (stale,), static), weights


def sampler_programs(run: Outline) -> Iterator[Program]:
    """All that the sampler may need: every number of rows with every ring, every prefill."""
    setup, params = run.sampler, abstract_params(run)
    layout: dict[str, Any] = {"dtype": setup.dtype, "mesh": setup.mesh}
    sync, weights = _sampler_weights(run, params)
    prefills_with = of_sampler.weights_to_prefill(params, weights, **layout)
    key = jax.eval_shape(step_key, np.uint32(0), np.int32(0))
    yield Program("step_key", step_key, (np.uint32(0), np.int32(0)))
    if sync:
        yield sync
    fixed, longest = setup.room.fixed, longest_prompt(run.cfg)
    prefills = fixed.prefills if fixed else sorted({prefill_size(n) for n in range(longest)})
    prompts = {}
    batches = [(size, count) for size in prefills for count in setup.room.counts(size, setup.least_rows)]
    for size, count in batches:
        tokens_QT = np.zeros((count * setup.least_rows, size), np.int32)
        static = {"cfg": run.model, "attend": setup.attend} | layout
        program = Program(f"prefill/{len(tokens_QT)}x{size}", sampling.prefill, (prefills_with, tokens_QT), static)
        prompts[size] = jax.eval_shape(lambda p, t, s=static: sampling.prefill(p, t, **s), prefills_with, tokens_QT)[0]
        prompts[size] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sampling.prompt_sharding(setup.mesh, x.shape)),
            prompts[size],
        )
        yield program
    if not fixed:
        yield from _prefills_behind(run, longest - 1, prefills_with, prompts)
    if fixed:
        for ring in fixed.rings:
            yield from _programs_of_slots(run, ring, [], weights, prompts, key)
        return
    slots = sorted({ring_size(n) for n in range(1, longest + run.cfg.sampling.max_new_tokens + 1)})
    rings = [Ring(slots_, rows) for rows, slots_ in itertools.product(row_counts(run), slots)]
    for ring in rings:
        yield from _programs_of_slots(run, ring, [other for other in rings if other != ring], weights, prompts, key)


def _prefills_behind(run: Outline, longest: int, weights: Any, prompts: dict[int, Any]) -> Iterator[Program]:
    """Of prompts whose beginning was prefilled before (`prefixes.py`).

    Args:
      longest: tokens of a prompt that are prefilled.
      prompts: of each size, what a prefill makes.
    """
    setup, sizes = run.sampler, set[tuple[int, int, int]]()
    for length in range(2, longest + 1):
        for before in prefix_sizes(length):
            if length - before <= CHUNK:
                sizes.add((before, prefill_size(length - before), prefill_size(length)))
    for before, rest, whole in sorted(sizes):
        for count in setup.room.counts(before + whole, setup.least_rows):
            Q = count * setup.least_rows
            static = {"cfg": run.model, "attend": setup.attend, "dtype": setup.dtype, "mesh": setup.mesh}
            static |= {"before": before, "whole": whole}
            arguments = (weights, np.zeros((Q, rest), np.int32), (prompts[prefill_size(before)],) * Q)
            yield Program(f"prefill_after/{Q}x{rest}/{before}/{whole}", sampling.prefill, arguments, static)


def abstract_slots(run: Outline, ring: Ring) -> Any:
    """The rows of one length, where they lie."""
    static = {"rows": ring.rows, "slots": ring.slots} | run.sampler.of_slots
    slots = jax.eval_shape(lambda: sampling.empty_slots(**static))
    return abstract(slots, sampling.slot_shardings(run.sampler.mesh, slots))


def _programs_of_slots(
    run: Outline, size_: Ring, others: Sequence[Ring], weights: Any, prompts: dict[int, Any], key: Any
) -> Iterator[Program]:
    """Those of rows of one size, which may become others."""
    setup, (ring, rows) = run.sampler, size_
    size, static = f"{rows}x{ring}", {"rows": rows, "slots": ring} | setup.of_slots
    yield Program(f"empty_slots/{size}", sampling.empty_slots, (), static)
    slots = abstract_slots(run, size_)
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
    if run.cfg.sampling.stop:
        yield Program(f"halt/{size}", sampling.halt, (slots, np.zeros(rows, bool)), {"mesh": setup.mesh})
    for drawing in samplings(run):
        static = {"cfg": run.model, "sampling": drawing, "dtype": setup.dtype, "mesh": setup.mesh, "chunk": setup.chunk}
        eos_E = sampling.eos_set(setup.eos_ids)
        name = f"decode/{size}/{drawing.temperature:g},{drawing.top_k},{drawing.top_p:g}"
        yield Program(name, sampling.decode, (weights, slots, eos_E, np.int32(1)), static)


def local_outline(run: Outline) -> Outline:
    """The second model in the place of the policy, as far as it is sampled from."""
    assert run.local is not None
    never = dataclasses.replace(run.cfg.eval, every=0)
    cfg = dataclasses.replace(run.cfg, sampling=build.local_sampling(run.cfg), eval=never)
    return dataclasses.replace(run, cfg=cfg, model=run.local.model, sampler=run.local, local=None)


def local_programs(run: Outline) -> Iterator[Program]:
    """Those of the second model, where one is asked; their names begin with `local_`."""
    if run.local is None:
        return
    second = local_outline(run)
    for function, leaves in checking_programs(abstract_params(second), run.mesh):
        yield Program(f"local_{function.__name__.strip('_')}/params", function, (leaves,))
    for program in sampler_programs(second):
        if program.name != "step_key":
            yield program._replace(name=f"local_{program.name}")


def programs(run: Outline, sizes: Sequence[BinSize]) -> list[Program]:
    """All programs that a run may compile; which of the sampler's it does depends on the lengths that come."""
    made = list(learning_programs(run, sizes))
    samples = run.cfg.method != "sft" or run.cfg.eval.every
    return made + ([*sampler_programs(run), *local_programs(run)] if samples else [])
