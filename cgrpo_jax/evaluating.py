"""method=eval: a checkpoint on named tasks. Responses are stored once; grading can be repeated without sampling."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cgrpo_jax import report
from cgrpo_jax.config import Config
from cgrpo_jax.config.options import drawn
from cgrpo_jax.data.checking import prompt_fault
from cgrpo_jax.data.tasks import Named, load_task, parse_names
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.evaluation import tables
from cgrpo_jax.evaluation.identity import contents, problem_digest
from cgrpo_jax.evaluation.intervals import cluster_problems, mean_of_tasks, summarise
from cgrpo_jax.evaluation.sample import Exam, accuracies
from cgrpo_jax.evaluation.store import Answers
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.model.hf import SIDE_FILES
from cgrpo_jax.process.hosts import ONE_HOST
from cgrpo_jax.process.stopping import Stopped
from cgrpo_jax.records import Attempt, Problem, Request
from cgrpo_jax.rollout.loop import run_stories
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.leader import begun
from cgrpo_jax.run.plugins import open_texts
from cgrpo_jax.sampling.engine import Engine, weights_of
from cgrpo_jax.sampling.room import room_for
from cgrpo_jax.text.prompts import Task, question_messages
from cgrpo_jax.text.stop import going_on
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.places import writing
from cgrpo_jax.workdir.progress import Progress


def _contents_of(run: Run) -> dict[str, str]:
    """Digests of the model's files; random weights follow from seed and configuration, which are settings too."""
    drawn = {"weights": "drawn from the seed"} if run.cfg.model.random_init else {}
    return contents(run.policy.folder, SIDE_FILES) | drawn


def _prompt_digest(tokenizer: Tokenizer, task: Task) -> str:
    """SHA-256 of the text around a question: system prompt, instruction and chat template, as the model reads them."""
    text = tokenizer.hf.decode(tokenizer.encode_chat(task("?")))
    return hashlib.sha256(str(text).encode()).hexdigest()


def settings_of(run: Run, task: Task = question_messages) -> dict[str, Any]:
    """What decides the responses: stored ones may be used again only where this agrees.

    The model is known by its content, not by its path: what lies there can be replaced.
    """
    cfg = run.cfg
    return {
        **_contents_of(run),
        "prompt": _prompt_digest(run.policy.tokenizer, task),
        "eos_ids": list(run.policy.tokenizer.eos_ids),
        "stop": list(run.policy.tokenizer.stops),
        "dtype": str(run.learner.dtype),
        "thinking": cfg.model.thinking,
        "temperature": cfg.eval.temperature,
        "top_p": cfg.eval.top_p,
        "max_new_tokens": cfg.sampling.max_new_tokens,
        "seed": cfg.seed,
    }


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError where `folder` holds responses of other settings, or of a model that is not named."""
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        partial.rename(path)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); take another workdir") from None
    if missing := [name for name in settings if name not in old]:
        raise ConfigError(
            f"{path}: no {', '.join(missing)} in it (an older version wrote it), so the stored answers may be another "
            "model's; take another workdir"
        )
    changed = [name for name in settings if old[name] != settings[name]]
    if changed:
        told = [
            f"{name} = {tables.shown(name, settings[name])} (was {tables.shown(name, old[name])})" for name in changed
        ]
        raise ConfigError(f"{folder} holds responses of other settings: {', '.join(told)}; take another workdir")


def _write_grades(path: pathlib.Path, task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]]) -> None:
    """One line an answer: what was found in the text, and the verdict."""
    with writing(path), path.open("w", encoding="utf-8") as file:
        for named, row in zip(task, attempts_PG, strict=True):
            for g, attempt in enumerate(row):
                record = {
                    "id": named.id, "sample": g, "gold": named.problem.answer, "answer": attempt.extracted,
                    "correct": attempt.correct, "status": attempt.status, "question": named.problem.question,
                    "text": attempt.text, "tokens": len(attempt.completion.ids),
                    "finished": attempt.completion.finished,
                }  # fmt: skip
                file.write(json.dumps(record) + "\n")


def entry(
    task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]], verifier: Verifier, seed: int
) -> dict[str, Any]:
    """A task's figures for `results.json`; answers vote by equivalence (options by their letter)."""

    def same(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [verdict.correct for verdict in verifier.compare(pairs)]

    def of(value: Callable[[Attempt], Any]) -> np.ndarray:
        return np.array([[value(attempt) for attempt in row] for row in attempts_PG])

    pairs = [(one.problem, a.extracted) for one, row in zip(task, attempts_PG, strict=True) for a in row]
    votes = iter(rewards.votes(pairs, verifier))
    of_task = summarise(
        [named.id for named in task],
        [problem_digest(named.problem) for named in task],
        correct_PG=of(lambda a: a.correct),
        cluster_PG=cluster_problems([[next(votes) for _ in row] for row in attempts_PG], same),
        length_PG=of(lambda a: len(a.completion.ids)),
        finished_PG=of(lambda a: a.completion.finished),
        answered_PG=of(lambda a: a.extracted is not None),
        judged_PG=of(lambda a: a.status == "ok"),
        seed=seed,
    )
    return of_task | _of_sources(task, attempts_PG)


def _of_sources(task: Sequence[Named], attempts_PG: Sequence[Sequence[Attempt]]) -> dict[str, Any]:
    """pass@1 and its interval of each set of which the task's file has rows; nothing of a file of one."""
    problems = [named.problem for named in task]
    values, sources = accuracies(problems, attempts_PG, ""), sorted({problem.tag for problem in problems} - {""})
    figures = {
        source: {f"pass@1{end}": values[f"/pass@1/{source}{end}"] for end in ("", "/low", "/high")}
        | {"problems": len({problem_digest(problem) for problem in problems if problem.tag == source})}
        for source in sources
    }
    return {"sources": figures} if figures else {}


def _load_tasks(run: Run, verifier: Verifier, log: Callable[[str], None], task: Task) -> dict[str, list[Named]]:
    cfg = run.cfg

    def prompt_tokens(problem: Problem) -> int:
        return len(run.policy.tokenizer.encode_chat(problem.messages))

    fault = functools.partial(prompt_fault, prompt_tokens=prompt_tokens, most=cfg.data.max_prompt_tokens)
    load = functools.partial(
        load_task, limit=cfg.eval.problems, cfg=cfg.data, fault=fault, log=log, parsable=verifier.readable,
        task_prompt=task,
    )  # fmt: skip
    return {name: load(name, where) for name, where in parse_names(cfg.eval.tasks)}


def evaluate_tasks(cfg: Config, workdir: pathlib.Path) -> None:
    """Samples what is not stored yet, grades everything, and writes results.json, results.md and the plots.

    Raises:
      ConfigError: the workdir holds answers of another model or of other settings.
      DataError: a task cannot be read, or a stored answer is damaged or to another prompt.
      CheckpointError: the model cannot be read, or what it computes is not finite.
    """
    with begun(cfg, workdir, ONE_HOST, "answer") as (run, progress), Verifier(cfg.verifier) as verifier:
        assert isinstance(progress, Progress)  # of the leader, who is alone
        cfg, folder, compiled = run.cfg, workdir / "eval", compilation.watch()
        task_prompt = open_texts(cfg.texts, run.policy.tokenizer.encode_chat).task
        tasks = _load_tasks(run, verifier, progress.log, task_prompt)
        settings = settings_of(run, task_prompt)
        _check_settings(folder, settings)
        answers = Answers(folder, tasks)
        progress.expect(sum(len(task) for task in tasks.values()) * cfg.eval.samples)
        score = functools.partial(rewards.score, verifier=verifier)
        with progress.phase("sample"):
            asked = [[named.problem for named in task] for task in tasks.values()]
            exam = Exam(asked, cfg.eval.samples, run.policy.tokenizer, answers, progress.answered)
            try:
                if exam.requests:
                    engine = _engine(run, exam.requests, settings["weights"])
                    with exam.stories() as stories:
                        run_stories(stories, [engine])
                graded = exam.graded(score)
            except Stopped:
                stored = sum(len(store.lines) for store in answers.stores)
                raise Stopped(f"stopped; {stored} answers are in {folder}, the same command goes on") from None
        entries: dict[str, Any] = {}
        for (name, task), attempts in zip(tasks.items(), graded, strict=True):
            with progress.phase(name):
                _write_grades(folder / name / "graded.jsonl", task, attempts)
                entries[name] = of = entry(task, attempts, verifier, cfg.seed)
            interval = f"[{of['pass@1/low']:.3f}, {of['pass@1/high']:.3f}]"
            how = drawn(cfg.eval.temperature, cfg.eval.top_p)
            progress.log(f"{name}  pass@1 {of['pass@1']:.3f}  {interval}  of {of['problems']}  {how}")
        texts = [attempt.text for attempts_PG in graded for attempts in attempts_PG for attempt in attempts]
        notes = [note for note in (answers.runs.resumed(settings["dtype"]), going_on(texts)) if note]
        for note in notes:
            progress.log(note)
        results = {
            "version": tables.VERSION,
            "model": cfg.model.path,
            "settings": settings | {"samples": cfg.eval.samples},
            "sampling": answers.summary(),
            "notes": notes,
            "tasks": entries,
            "mean": mean_of_tasks(entries, cfg.seed),
        }
        partial = workdir / "results.json.partial"
        partial.write_text(json.dumps(results) + "\n", encoding="utf-8")
        partial.rename(workdir / "results.json")
        tables.write(workdir)
        progress.log(f"compiled {compiled}")
        progress.log(f"done: results.json, results.md and plots are in {workdir}; answers and verdicts in {folder}")
        report.leave(workdir, progress.log)


def _engine(run: Run, requests: Sequence[Request], weights: str) -> Engine:
    """Loads the weights, with as many rows as fit the prompts that are asked.

    Args:
      weights: of `_contents_of` the run.

    Raises:
      ConfigError: the files are others now that they are loaded.
    """
    cfg, policy = run.cfg, run.policy
    longest = max(len(request.prompt_ids) for request in requests)
    slots = longest + cfg.sampling.max_new_tokens
    room = room_for(policy.shape, policy.sampler.mesh, cfg.sampler, slots, longest, policy.sampler.dtype)
    setup = dataclasses.replace(policy.sampler, room=room)
    engine = Engine(setup, weights_of(setup, policy.weights()), 0, run.evaluation)
    if _contents_of(run)["weights"] != weights:
        raise ConfigError(f"{policy.folder}: the weights were replaced while they were read; give the command again")
    return engine
