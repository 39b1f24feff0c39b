"""method=eval: a checkpoint on named tasks. Responses are stored once; grading can be repeated without sampling."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cgrpo_jax import build, eval_report
from cgrpo_jax.build import Run
from cgrpo_jax.config import Config, ConfigError
from cgrpo_jax.data.sources import prompt_fault
from cgrpo_jax.data.tasks import Named, load_task, parse_names
from cgrpo_jax.evaluation.intervals import cluster_problems, mean_of_tasks, summarise
from cgrpo_jax.evaluation.sample import Store, sample_and_grade
from cgrpo_jax.grading import equivalence, rewards
from cgrpo_jax.grading.choices import chosen
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.options import SamplingConfig
from cgrpo_jax.records import Attempt, Done, Problem, Request, Source
from cgrpo_jax.sampling.sampler import room_for
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.lock import exclusive
from cgrpo_jax.workdir.progress import Progress


def settings_of(run: Run) -> dict[str, Any]:
    """What decides the responses: stored ones may be used again only where this agrees."""
    cfg = run.cfg
    return {
        "model": cfg.model.path,
        "revision": cfg.model.revision,
        "dtype": str(run.learner.dtype),
        "thinking": cfg.model.thinking,
        "temperature": cfg.eval.temperature,
        "top_p": cfg.eval.top_p,
        "max_new_tokens": cfg.sampling.max_new_tokens,
        "seed": cfg.seed,
    }


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError where `folder` holds responses that were sampled otherwise."""
    path = folder / "settings.json"
    if path.exists():
        old = json.loads(path.read_text())
        changed = [f"{k} = {v!r} (was {old.get(k)!r})" for k, v in settings.items() if old.get(k) != v]
        if changed:
            raise ConfigError(f"{folder} holds responses of other settings: {', '.join(changed)}; take another workdir")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def _write_grades(path: pathlib.Path, task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]]) -> None:
    """One line an answer: what was found in the text, and the verdict."""
    with path.open("w") as file:
        for named, row in zip(task, attempts_PG, strict=True):
            for g, attempt in enumerate(row):
                record = {
                    "id": named.id, "sample": g, "gold": named.problem.answer, "answer": attempt.extracted,
                    "correct": attempt.correct, "status": attempt.status, "question": named.problem.question,
                    "text": attempt.text,
                }  # fmt: skip
                file.write(json.dumps(record) + "\n")


def _vote(problem: Problem, attempt: Attempt) -> str | None:
    """What an attempt votes for: its answer, or the letter of the option that it names."""
    if problem.grader == "choice" and attempt.extracted is not None:
        return chosen(attempt.extracted, (problem.entry or {})["options"])
    return attempt.extracted


def entry(
    task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]], verifier: Verifier, seconds: float, seed: int
):
    """A task's figures for `results.json`; answers vote by equivalence (options by their letter)."""
    of = lambda value: np.array([[value(attempt) for attempt in row] for row in attempts_PG])
    same = lambda pairs: [verdict.correct for verdict in equivalence.compare(pairs, verifier)]
    votes = [[_vote(named.problem, attempt) for attempt in row] for named, row in zip(task, attempts_PG, strict=True)]
    clusters = cluster_problems(votes, same)
    return summarise(
        [named.id for named in task],
        of(lambda a: a.correct),
        clusters,
        of(lambda a: len(a.completion.ids)),
        of(lambda a: a.completion.finished),
        of(lambda a: a.extracted is not None),
        seconds,
        seed,
    )


def evaluate_tasks(cfg: Config, workdir: pathlib.Path) -> None:
    """Samples what is not stored yet, grades everything, and writes results.json, results.md and the plots."""
    run = build.open_run(cfg)
    cfg, folder = run.cfg, workdir / "eval"
    names = parse_names(cfg.eval.tasks)
    prompt_tokens = lambda problem: len(run.tokenizer.encode_chat(problem.messages))
    fault = functools.partial(prompt_fault, prompt_tokens=prompt_tokens, most=cfg.data.max_prompt_tokens)
    compiled = compilation.watch()
    with exclusive(workdir), Verifier(cfg.verifier) as verifier, Progress(0, 0, "answer") as progress:
        if run.tokenizer.plain:
            progress.log("the model has no chat template: prompts are plain text")
        tasks = {
            name: load_task(name, where, cfg.eval.problems, cfg.data, fault, progress.log) for name, where in names
        }
        settings = settings_of(run)
        _check_settings(folder, settings)
        stores = {name: Store(folder / name / "responses.jsonl") for name in tasks}
        progress.expect(sum(len(task) for task in tasks.values()) * cfg.eval.samples)
        score = functools.partial(rewards.score, verifier=verifier)
        generate = _run_when_needed(run)
        with progress.phase("sample"):
            asked = [[named.problem for named in task] for task in tasks.values()]
            whose = (run.tokenizer, list(stores.values()), progress.answered)
            graded = sample_and_grade(asked, cfg.eval.samples, generate, score, *whose)
        entries: dict[str, Any] = {}
        for (name, task), attempts in zip(tasks.items(), graded, strict=True):
            with progress.phase(name):
                _write_grades(folder / name / "graded.jsonl", task, attempts)
                entries[name] = entry(task, attempts, verifier, stores[name].seconds, cfg.seed)
            low, high = entries[name]["pass@1/low"], entries[name]["pass@1/high"]
            progress.log(f"{name}  pass@1 {entries[name]['pass@1']:.3f}  [{low:.3f}, {high:.3f}]  of {len(task)}")
        settings |= {"samples": cfg.eval.samples}
        results = {"version": 1, "model": cfg.model.path, "settings": settings, "tasks": entries}
        results["mean"] = mean_of_tasks(entries, cfg.seed)
        partial = workdir / "results.json.partial"
        partial.write_text(json.dumps(results) + "\n")
        partial.rename(workdir / "results.json")
        eval_report.write(workdir)
        progress.log(f"compiled {compiled}")
        progress.log(f"done: results.json, results.md and plots are in {workdir}; answers and verdicts in {folder}")


def _run_when_needed(run: Run) -> Callable[[Source], None]:
    """Loads the weights only where there is something to ask, with as many rows as fit the prompts that are asked."""
    cfg = run.cfg

    def sample(source: Source) -> None:
        requests = source.poll(idle=True)
        if not requests:
            return
        sampling = SamplingConfig(cfg.eval.temperature, 0, cfg.eval.top_p, cfg.sampling.max_new_tokens)
        longest = max(len(request.prompt_ids) for request in requests)
        setup = run.sampler
        slots = longest + sampling.max_new_tokens
        room = room_for(run.model, run.mesh, cfg.sampler, slots, longest, setup.dtype)
        sampler = dataclasses.replace(setup, room=room).bind(build.initial_params(run), 0, sampling)
        sampler.run(Polled(requests, source))

    return sample


class Polled:
    """A source whose first requests were asked for already."""

    def __init__(self, requests: Sequence[Request], source: Source):
        self.requests, self.source = requests, source

    def ended(self, done: Done) -> None:
        self.source.ended(done)

    def poll(self, idle: bool) -> Sequence[Request]:
        asked, self.requests = self.requests, []
        return asked or self.source.poll(idle)

    def pending(self) -> bool:
        return self.source.pending()
