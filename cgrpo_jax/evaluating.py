"""method=eval: a checkpoint on named tasks. Responses are stored once; grading can be repeated without sampling."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from typing import Any

from cgrpo_jax import report
from cgrpo_jax.config import Config
from cgrpo_jax.config.options import drawn
from cgrpo_jax.evaluation import tables
from cgrpo_jax.evaluation.exam import Exam, task_entry, write_grades
from cgrpo_jax.evaluation.intervals import mean_of_tasks
from cgrpo_jax.evaluation.store import Answers
from cgrpo_jax.grading import rewards
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.process.stopping import Stopped
from cgrpo_jax.rollout.stories import Stories, run_stories
from cgrpo_jax.run.answers import check_settings, engine_for, settings_of
from cgrpo_jax.run.beginning import begun
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.opening import load_tasks
from cgrpo_jax.run.plugins import open_texts
from cgrpo_jax.text.stop import going_on
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.places import write_whole
from cgrpo_jax.workdir.progress import Silence


def _sample(run: Run, hosts: Hosts, exam: Exam | None = None, weights: str = "") -> None:
    """Samples the answers that are not stored yet, on every host.

    Args:
      exam, weights: of the leader: what is asked, and the digest of the model's weights in the settings.
    """
    longest, weights = hosts.share(lambda: (exam.longest_prompt if exam else 0, weights))
    if longest:
        engine = engine_for(run, longest, weights)
        with exam.stories() if exam else Stories([]) as stories:
            run_stories(stories, [engine], hosts)


def evaluate_tasks(cfg: Config, workdir: pathlib.Path, hosts: Hosts = ONE_HOST) -> None:
    """Samples what is not stored yet, grades everything, and writes results.json, results.md and the plots.

    Args:
      hosts: of a run of several processes, each of which calls this function; the leader grades and writes.

    Raises:
      ConfigError: the workdir holds answers of another model or of other settings.
      DataError: a task cannot be read, or a stored answer is damaged or to another prompt.
      CheckpointError: the model cannot be read, or what it computes is not finite.
    """
    with contextlib.ExitStack() as stack:
        run, progress = stack.enter_context(begun(cfg, workdir, hosts, "answer"))
        if isinstance(progress, Silence):
            return _sample(run, hosts)
        verifier = stack.enter_context(Verifier(cfg.verifier))
        cfg, folder, compiled = run.cfg, workdir / "eval", compilation.watch()
        tokenizer = run.policy.tokenizer
        task_prompt = open_texts(cfg.texts, tokenizer.encode_chat).task
        tasks = load_tasks(cfg, tokenizer, verifier.readable, progress.log, task_prompt)
        settings = settings_of(run, task_prompt)
        check_settings(folder, settings)
        answers = Answers(folder, tasks)
        progress.expect(sum(len(task) for task in tasks.values()) * cfg.eval.samples)
        score = functools.partial(rewards.score, verifier=verifier)
        with progress.phase("sample"):
            asked = [[named.problem for named in task] for task in tasks.values()]
            exam = Exam(asked, cfg.eval.samples, tokenizer, answers, progress.answered)
            try:
                _sample(run, hosts, exam, settings["weights"])
                graded = exam.graded(score)
            except Stopped:
                raise Stopped(f"stopped; {answers.count} answers are in {folder}, the same command goes on") from None
        entries: dict[str, Any] = {}
        for (name, task), attempts in zip(tasks.items(), graded, strict=True):
            with progress.phase(name):
                write_grades(folder / name / "graded.jsonl", task, attempts)
                entries[name] = of = task_entry(task, attempts, verifier, cfg.seed)
            interval = f"[{of['pass@1/low']:.3f}, {of['pass@1/high']:.3f}]"
            how = drawn(cfg.eval.temperature, cfg.eval.top_p)
            progress.log(f"{name}  pass@1 {of['pass@1']:.3f}  {interval}  of {of['problems']}  {how}")
        texts = [attempt.text for attempts_PG in graded for attempts in attempts_PG for attempt in attempts]
        notes = [note for note in (answers.resumed(settings["dtype"]), going_on(texts)) if note]
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
        write_whole(workdir / "results.json", json.dumps(results) + "\n")
        tables.write(workdir)
        progress.log(f"compiled {compiled}")
        progress.log(f"done: results.json, results.md and plots are in {workdir}; answers and verdicts in {folder}")
        report.leave(workdir, progress.log)
