"""The training loop of Critique-GRPO and of its special case without refinements."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax

from cgrpo_jax import build, config, resuming
from cgrpo_jax.build import Run
from cgrpo_jax.config import Config
from cgrpo_jax.data.sources import DataError, Problems, load_problems, prompt_fault
from cgrpo_jax.data.tasks import load_task, parse_names
from cgrpo_jax.evaluation.sample import accuracies, sample_and_grade
from cgrpo_jax.grading import equivalence, rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.learning import packing
from cgrpo_jax.learning.update import Batch, make_logps, make_update, put_batch
from cgrpo_jax.options import SamplingConfig
from cgrpo_jax.records import Group, Problem
from cgrpo_jax.rollout import collect
from cgrpo_jax.rollout.critics import CRITICS
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.checkpoints import Checkpointer
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.metrics import Writer, group_metrics, update_metrics
from cgrpo_jax.workdir.progress import Progress


class TrainingError(RuntimeError):
    """Training cannot go on."""


def _load_data(run: Run, verifier: Verifier, log) -> tuple[Problems, dict[str, list[Problem]]]:
    """The training stream, and what is evaluated: metric name -> problems (none without eval.every)."""
    cfg = run.cfg
    prompt_tokens = lambda problem: len(run.tokenizer.encode_chat(problem.messages))
    load = functools.partial(
        load_problems,
        seed=cfg.seed,
        parsable=lambda golds: equivalence.readable(golds, verifier),
        prompt_tokens=prompt_tokens,
        log=log,
    )
    if not cfg.eval.every:
        return load(cfg.data), {}
    fault = functools.partial(prompt_fault, prompt_tokens=prompt_tokens, most=cfg.data.max_prompt_tokens)
    tasks = {
        f"eval/{name}": [named.problem for named in load_task(name, where, cfg.eval.problems, cfg.data, fault, log)]
        for name, where in parse_names(cfg.eval.tasks)
    }
    if tasks and not cfg.eval.source:
        return load(cfg.data), tasks
    test = dataclasses.replace(cfg.data, split=cfg.eval.split)
    if cfg.eval.source:
        test = dataclasses.replace(test, source=cfg.eval.source, revision=cfg.eval.revision)
        test = dataclasses.replace(test, question_column="", answer_column="")
    opened, faults = [], []
    for source in (cfg.data, test):
        try:
            opened.append(load(source))
        except DataError as error:
            faults.append(str(error))
    if faults:  # of both at once
        raise DataError("\n".join(faults))
    problems, held_out = opened
    count = cfg.eval.problems if held_out.size is None else min(cfg.eval.problems or held_out.size, held_out.size)
    return problems, {"eval": [held_out.get(index) for index in range(count)]} | tasks


def make_batches(groups: list[Group], cfg: Config) -> list[Batch]:
    """One batch per update of this rollout, each with its own share of the problems."""
    share = len(groups) // cfg.train.updates_per_rollout
    batches = []
    for first in range(0, len(groups), share):
        prompted = packing.group_rows(groups[first : first + share], cfg.objective)
        # Those without any advantage together: their micro-batches need no backward pass.
        prompted.sort(key=lambda item: all(row.advantage == 0 for row in item.rows))
        shape = {"rows_per_prompt": config.rows_per_group(cfg), "micro_batch": cfg.train.micro_batch}
        batches.append(packing.make_batch(prompted, **shape))
    return batches


def train(cfg: Config, workdir: pathlib.Path) -> None:
    """Trains from the newest checkpoint of `workdir` (or from the start) to `cfg.train.steps`.

    Order of a step, never changed: problems, rollout, update, log, evaluate, save.
    """
    # ---- Build: everything that can be refused is refused here ----
    run = build.open_run(cfg)
    cfg, steps, compiled = run.cfg, cfg.train.steps, compilation.watch()
    with (
        exclusive(workdir),
        Verifier(cfg.verifier) as verifier,
        Progress(0, steps) as progress,
        Checkpointer(workdir, cfg.checkpoint, progress.log) as checkpointer,
    ):
        past = resuming.look_back(run, checkpointer, progress.log)
        if resuming.all_done(run, past, progress.log):
            return
        progress.resume_at(past.step)
        problems, evaluations = _load_data(run, verifier, progress.log)

        # ---- Restore ----
        state, past = resuming.initial_state(run, checkpointer, past)
        reference = resuming.reference_params(run, past) if cfg.objective.kl_coef else None
        resuming.start_workdir(run, past, workdir, progress.log)
        first_step, problems_seen = past.step, past.problems_seen
        update = make_update(run.learner, run.mesh, state.params)
        logps = make_logps(run.learner, run.mesh)
        writer = Writer(workdir, first_step, progress.log)
        score = functools.partial(rewards.score, verifier=verifier)
        eval_sampling = SamplingConfig(cfg.eval.temperature, 0, cfg.eval.top_p, cfg.sampling.max_new_tokens)

        def run_evaluation(step: int) -> dict[str, float]:
            values: dict[str, float] = {}
            with progress.phase("evaluate"):
                generate = run.generator.bind(state.params, step, eval_sampling)
                sets = list(evaluations.values())
                graded = sample_and_grade(sets, cfg.eval.samples, generate, score, run.tokenizer)
                for (name, asked), attempts in zip(evaluations.items(), graded, strict=True):
                    values |= accuracies(asked, attempts, name)
            writer.scalars(step, values | {"seconds/evaluate": progress.take_seconds()["evaluate"]})
            for name in [name for name in values if f"{name}/low" in values]:
                low, high = values[f"{name}/low"], values[f"{name}/high"]
                progress.log(f"step {step}  {name} {values[name]:.3f}  [{low:.3f}, {high:.3f}]")
            return values

        if first_step == 0 and evaluations:
            run_evaluation(0)
        for step in range(first_step, steps):
            checkpointer.check()  # a save that failed behind the last step
            # ---- Rollout ----
            generate = run.generator.bind(state.params, step, cfg.sampling)
            groups = collect.collect_groups(
                problems.batch(cfg.seed, problems_seen, cfg.train.prompts),
                cfg.train.samples,
                generate,
                score,
                CRITICS[cfg.refine.critique],
                run.tokenizer,
                cfg.refine,
                seed=cfg.seed,
                step=step,
                phase=progress.phase,
            )
            stats = generate.stats
            del generate  # and its copy of the weights, before the update

            # ---- Update ----
            with progress.phase("update"):
                batches = [put_batch(run.mesh, host) for host in make_batches(groups, cfg)]
                if len(batches) > 1:  # the trainer's own log-probabilities, before the first update
                    batches = [b._replace(old_logp_ABT=logps(state.params, b)) for b in batches]
                if reference is not None:
                    batches = [b._replace(ref_logp_ABT=logps(reference, b)) for b in batches]
                sums_of_updates = []
                for update_batch in batches:
                    state, sums = update(state, update_batch)
                    sums_of_updates.append({name: float(value) for name, value in jax.device_get(sums).items()})
                    if sums_of_updates[-1]["notfinite_in_a_row"] >= cfg.train.max_nonfinite:
                        raise TrainingError(
                            f"step {step + 1}: {cfg.train.max_nonfinite} non-finite gradients in a row "
                            "(train.max_nonfinite); they changed nothing, the last checkpoint is sound"
                        )

            # ---- Log, evaluate, save ----
            done, problems_seen = step + 1, problems_seen + cfg.train.prompts
            seconds = progress.take_seconds()
            if step == first_step:
                progress.log(f"compiled {compiled}")
            values = group_metrics(groups) | update_metrics(sums_of_updates)
            values |= {f"seconds/{name}": value for name, value in seconds.items()}
            values |= {"sampler/slot_use": stats.slot_use, "tokens/prefilled": float(stats.prefilled)}
            tokens = {
                "sample": stats.tokens,
                "update": sum(sums["tokens"] for sums in sums_of_updates),
            }
            values |= {f"tokens_per_s/{name}": count / seconds[name] for name, count in tokens.items() if count}
            writer.rollout(done, groups)
            writer.scalars(done, values)
            progress.step_done(
                done,
                {
                    "reward": values["reward/responses"],
                    "refined": values["refine/rate"],
                    "fixed": values.get("refine/success", 0.0),
                    "tok/s": values["tokens_per_s/sample"],
                    "s": sum(seconds.values()),
                },
            )
            evaluated = None
            if evaluations and (done % cfg.eval.every == 0 or done == steps):
                evaluated = run_evaluation(done)
            if done % cfg.checkpoint.every == 0 or done == steps:
                checkpointer.save(done, state, resuming.checkpoint_meta(run, past, done, problems_seen), evaluated)
        writer.close()
        checkpointer.wait()
        progress.log(f"compiled {compiled}")
        progress.log(
            f"done: step {steps} is in {workdir}/checkpoints; metrics.jsonl, rollouts/, tensorboard/ beside it"
        )
        progress.log(f"export: python -m cgrpo_jax.convert --from={workdir} --to=hf --out={workdir}/model")
