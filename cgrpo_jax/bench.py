"""Measures sampling, the update, or a whole Dr.GRPO step on real weights.

    python -m cgrpo_jax.bench --mode=sample --model=CHECKPOINT --prompts=4 --samples=8 --new_tokens=64 --json=FILE

sample  every row makes exactly new_tokens tokens (end-of-sequence is ignored)
update  one optimizer update on prompts x samples rows of full length
step    sampling with end-of-sequence, scoring and update
refill  sampling of recorded lengths (--lengths=FILE) in --rows rows: who ends makes room for who waits
static  the same in batches of --rows, each as long as its longest row, through the same programs
        (both are long: no warm-up, and the seconds of compiling are taken off)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cgrpo_jax import config
from cgrpo_jax.errors import ConfigError, UserError
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.packing import pack_smallest
from cgrpo_jax.learning.update import init_state, make_update, put_bins
from cgrpo_jax.records import Kind, Name, Problem, Request, Segment
from cgrpo_jax.rollout.collect import Method, by_rule, groups_of, stories_of
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.stories import run_stories, sample_all
from cgrpo_jax.rollout.written import critic_and_scorer
from cgrpo_jax.run import build
from cgrpo_jax.run.build import Run
from cgrpo_jax.sampling.engine import Engine, weights_of
from cgrpo_jax.sampling.pool import summed
from cgrpo_jax.text.prompts import question_messages
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.places import expanded
from cgrpo_jax.workdir.progress import Progress


def bench_run(args: argparse.Namespace) -> Run:
    """A Dr.GRPO run of the asked size."""
    raw = config.default_config("dr_grpo")
    raw.model.path, raw.model.dtype = args.model, args.dtype
    raw.train.prompts, raw.train.samples, raw.train.micro_batch = args.prompts, args.samples, args.micro_batch
    raw.sampling.max_new_tokens = args.new_tokens
    raw.data.max_prompt_tokens = 256
    return build.open_run(config.from_config_dict(raw))


def sums(count: int, round_: int) -> list[Problem]:
    """Short questions whose answers are known; other ones each round."""
    rng = np.random.default_rng((7, round_))
    pairs = [tuple(int(x) for x in rng.integers(10, 100, 2)) for _ in range(count)]
    texts = [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]
    return [Problem(text, answer, question_messages(text), "exact") for text, answer in texts]


class Round(NamedTuple):
    """What a round of work did."""

    tokens: int  # that somebody asked for
    row_steps: int | None = None  # of decoding
    prefilled: int | None = None  # prompt tokens


Work = Callable[[int], Round]  # its argument is the number of the round


def sample_work(run: Run, verifier: Verifier, args: argparse.Namespace) -> Work:
    """No row ends early."""
    params = run.policy.weights()
    endless = dataclasses.replace(run.policy.sampler, eos_ids=(), stop=None)
    P, G = run.cfg.train.prompts, run.cfg.train.samples
    prompts = [run.policy.tokenizer.encode_chat(problem.messages) for problem in sums(P, 0)]
    requests = [Request(Name(Kind.RESPONSE, p, g), prompts[p]) for p in range(P) for g in range(G)]

    def work(round_: int) -> Round:
        engine = Engine(endless, weights_of(endless, params), round_, run.cfg.sampling)
        sample_all(engine, requests)
        return Round(engine.stats.tokens, engine.stats.row_steps, engine.stats.prefilled)

    return work


def recorded(path: pathlib.Path, problems: int, vocab: int) -> list[list[Request]]:
    """Requests of each problem, of the recorded lengths; the prompts are random ids.

    Raises: ConfigError for a file that is no such record, OSError where there is none.
    """
    rng = np.random.default_rng(0)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        lengths_P = list(zip(record["prompt_tokens"], record["response_tokens"], strict=True))[:problems]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--lengths={path}: no record of lengths ({error!r})") from error
    asked = []
    for p, (count, limits) in enumerate(lengths_P):
        prompt = rng.integers(0, vocab, count).tolist()
        asked.append([Request(Name(Kind.RESPONSE, p, g), prompt, limit) for g, limit in enumerate(limits)])
    return asked


def refill_work(run: Run, verifier: Verifier, args: argparse.Namespace) -> Work:
    """Recorded lengths; static batches where the mode says so."""
    params = run.policy.weights()
    room = dataclasses.replace(run.policy.sampler.room, rows=args.rows)
    endless = dataclasses.replace(run.policy.sampler, eos_ids=(), stop=None, room=room)
    asked = [request for row in recorded(args.lengths, args.prompts, run.policy.shape.vocab) for request in row]
    useful = sum(request.limit or 0 for request in asked)
    batches = [asked]
    if args.mode == "static":
        batches = [asked[first : first + args.rows] for first in range(0, len(asked), args.rows)]
        batches = [[r._replace(limit=max(r.limit or 0 for r in batch)) for r in batch] for batch in batches]

    def work(round_: int) -> Round:
        weights, did = weights_of(endless, params), []
        with Progress(0, len(asked), "answer") as progress:
            for requests in batches:
                engine = Engine(endless, weights, round_, run.cfg.sampling)
                sample_all(engine, requests, progress.answered, more=True)
                did.append(engine.stats)
        return Round(useful, summed(did).row_steps, summed(did).prefilled)

    return work


def update_work(run: Run, verifier: Verifier, args: argparse.Namespace) -> Work:
    """Rows of random ids and full length, every one with an advantage."""
    state = init_state(run.learner, run.mesh, run.policy.weights())
    update = make_update(run.learner, run.mesh, state.params)
    cfg, rng = run.cfg, np.random.default_rng(0)
    prompt, new = run.policy.tokenizer.encode_chat(sums(1, 0)[0].messages), cfg.sampling.max_new_tokens
    P, G = cfg.train.prompts, cfg.train.samples
    ids = rng.integers(0, run.policy.shape.vocab_used or run.policy.shape.vocab, (P * G, new)).astype(np.int32)
    quiet, none_T = np.zeros(new, np.float32), np.zeros(new)

    def segment(row: int) -> Segment:
        pg_T = np.full(new, (-1.0) ** row / (G * P * new))
        return Segment([*prompt[:-1], row // G, prompt[-1]], ids[row], False, pg_T, none_T, none_T, none_T, quiet)

    sizes = build.bin_sizes(run, len(prompt) + 1)
    bins = put_bins(run.mesh, pack_smallest([segment(row) for row in range(P * G)], sizes, build.terms(cfg)))

    def work(round_: int) -> Round:
        nonlocal state
        state, _ = jax.block_until_ready(update(state, {}, bins))
        return Round(P * G * new)

    return work


def step_work(run: Run, verifier: Verifier, args: argparse.Namespace) -> Work:
    """A whole step: tokens sampled, scored and trained on."""
    state = init_state(run.learner, run.mesh, run.policy.weights())
    update = make_update(run.learner, run.mesh, state.params)
    cfg, tokenizer = run.cfg, run.policy.tokenizer
    rule = functools.partial(by_rule, functools.partial(rewards.score, verifier=verifier), tokenizer)
    criticise, scorer = critic_and_scorer(Brief(cfg.refine), tokenizer, rule)
    method = Method(cfg.train.samples, scorer, criticise, tokenizer, cfg.refine, cfg.seed)
    longest = max(len(tokenizer.encode_chat(problem.messages)) for problem in sums(64, 0))
    sizes = build.bin_sizes(run, longest)

    def work(round_: int) -> Round:
        nonlocal state
        with stories_of(sums(cfg.train.prompts, round_), method, round_) as stories:
            stats = run_stories(stories, run.policy.engines(state.params, None, None, round_))
        limit, updates = float(cfg.sampling.max_new_tokens), cfg.train.updates_per_rollout
        for segments in credit.of_updates(groups_of(stories), cfg.objective, limit, updates):
            bins = pack_smallest(segments, sizes, build.terms(cfg))
            state, _ = jax.block_until_ready(update(state, {}, put_bins(run.mesh, bins)))
        return Round(stats.tokens, stats.row_steps, stats.prefilled)

    return work


MODES = {
    "sample": sample_work,
    "update": update_work,
    "step": step_work,
    "refill": refill_work,
    "static": refill_work,
}


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def measure(work: Work, repeats: int, warm_up: bool = True) -> dict[str, Any]:
    """Times the rounds after a warm-up that compile nothing; without a warm-up, all, less the seconds of compiling."""
    seconds: list[float] = []
    rounds: list[Round] = []
    compiled = compilation.watch()
    for round_ in range(3 * repeats + 1):
        before, compiling, began = compiled.programs, compiled.seconds, time.perf_counter()
        done, taken = work(round_), time.perf_counter() - began
        clean = compiled.programs == before and round_ > 0
        if not warm_up:
            taken, clean = taken - (compiled.seconds - compiling), True
        if clean:
            seconds.append(taken)
            rounds.append(done)
        note = "" if clean else f" (not counted: {compiled.programs - before} programs compiled or loaded)"
        print(f"round {round_}: {taken:.2f} s, {done.tokens} tokens{note}", file=sys.stderr, flush=True)
        if len(seconds) == repeats:
            break
    if not seconds:
        raise ConfigError("every round compiled something: the work has no steady shape")
    last = rounds[-1]
    sampled = {} if last.row_steps is None else {
        "slot_use": last.tokens / last.row_steps, "row_steps": last.row_steps, "prefilled_tokens": last.prefilled
    }  # fmt: skip
    return sampled | {
        "step_s": spread(seconds),
        "tokens_per_s": spread([done.tokens / s for done, s in zip(rounds, seconds, strict=True)]),
        "compile_s": compiled.seconds,
        "programs": compiled.programs,
        "programs_from_disk": compiled.from_disk,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cgrpo_jax.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", required=True, choices=list(MODES))
    parser.add_argument("--model", required=True, help="Hugging Face folder, hub id, or package://quickstart")
    parser.add_argument("--prompts", type=int, default=4, help="problems (refill, static: the first of the record)")
    parser.add_argument("--samples", type=int, default=8, help="rows per prompt")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--micro_batch", type=int, default=2, help="problems at once in the gradient")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the computation")
    parser.add_argument("--lengths", type=expanded, help="refill, static: JSON with prompt_tokens, response_tokens")
    parser.add_argument("--rows", type=int, default=32, help="refill, static: rows decoded together")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds")
    parser.add_argument("--json", type=expanded, help="also write the result here")
    args = parser.parse_args()
    if (args.mode in ("refill", "static")) != (args.lengths is not None):
        parser.error("--lengths goes with --mode=refill and --mode=static")
    for name in ("prompts", "samples", "new_tokens", "micro_batch", "rows", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        if args.json and not args.json.absolute().parent.is_dir():  # before the work, not after it
            raise ConfigError(f"--json={args.json}: no such folder")
        compilation.keep_on_disk()
        run = bench_run(args)
        with Verifier(run.cfg.verifier) as verifier:
            result = measure(MODES[args.mode](run, verifier, args), args.repeats, warm_up=args.lengths is None)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    asked = {name: getattr(args, name) for name in ("mode", "model", "prompts", "samples", "new_tokens", "micro_batch")}
    result = (
        asked
        | result
        | {
            "dtype": str(run.learner.dtype),
            "devices": run.mesh.size,
            "platform": run.mesh.devices.flat[0].platform,
            "peak_memory_gib": peak_memory_gib(run),
        }
    )
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def peak_memory_gib(run: Run) -> float:
    """The largest over the devices where the backend counts it, else the process's own peak."""
    stats = [device.memory_stats() for device in run.mesh.devices.flat]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats if s) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
