"""method=generate: what a policy samples, criticises and refines becomes rows to imitate (arXiv 2506.03106, baselines).

    python -m cgrpo_jax.main --config=quickstart:raft --workdir=runs/raft_rows
    python -m cgrpo_jax.main --config=quickstart:sft --workdir=runs/raft \\
        --config.data.source=runs/raft_rows/rows.jsonl --config.eval.source=arithmetic

    sft                         nothing is generated: data.source has a column `target`
    raft                        task prompt -> own correct response
    refinement_ft               task prompt -> correct refinement of a wrong response
    citl_ft                     both
    critique_ft                 critic's prompt with own response -> critique whose verdict is that of the rule
    grpo_then_refinement_sft    as refinement_ft, of problems that a checkpoint of `grpo` never solves (model.path)

Critiques are those of refine.critique. The rows of each train.prompts problems are a file, `rows/STEP.jsonl`, which is
there whole or not at all: the same command goes on behind the last one, and `rows.jsonl` is all of them.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cgrpo_jax.config import Config, public
from cgrpo_jax.errors import DataError, TrainingError
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.process.stopping import Stopped
from cgrpo_jax.records import Attempt, Group, Message
from cgrpo_jax.rollout.critics import END, verdict_of
from cgrpo_jax.rollout.stories import Stories, run_stories
from cgrpo_jax.run import build, resuming
from cgrpo_jax.run.beginning import begun
from cgrpo_jax.run.leader import Desk, open_desk
from cgrpo_jax.sampling.pool import Stats
from cgrpo_jax.text.prompts import CriticPrompt, critique_messages
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.changes import check_changes, flat
from cgrpo_jax.workdir.places import writing


def kept_rows(
    group: Group, rows: str, asked: CriticPrompt = critique_messages
) -> Iterator[tuple[str, Sequence[Message], str]]:
    """(kind, chat turns, text to learn) of a problem, as generate.rows says.

    Args:
      asked: writes the critic's prompt.
    """

    def correct(attempts: Sequence[Attempt], kind: str) -> Iterator[tuple[str, Sequence[Message], str]]:
        for attempt in attempts:
            if attempt.correct and attempt.completion.finished and attempt.text.strip():
                yield kind, group.problem.messages, attempt.text

    if rows in ("responses", "both"):
        yield from correct(group.responses, "response")
    if rows in ("refinements", "both"):
        yield from correct(group.refinements, "refinement")
    if rows == "critiques":
        for attempt in group.responses:
            critique = attempt.critique
            if critique is None or critique.text is None or critique.fallback:
                continue
            if verdict_of(critique.text, finished=True) == attempt.correct:
                text = critique.text if critique.text.endswith(END) else f"{critique.text} {END}"
                yield "critique", asked(group.problem.question, attempt.text, None, True), text


def _write(path: pathlib.Path, lines: Sequence[str]) -> None:
    """A file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    with writing(partial):
        partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(path)


def _lines(groups: Sequence[Group], first: int, rows: str, asked: CriticPrompt) -> list[str]:
    made = []
    for number, group in enumerate(groups, first):
        for kind, messages, text in kept_rows(group, rows, asked):
            row = {"problem": number, "kind": kind, "answer": group.problem.answer, "prompt": messages, "target": text}
            made.append(json.dumps(row) + "\n")
    return made


def _check_begun(run: build.Run, workdir: pathlib.Path, step: int, log: Callable[[str], None]) -> None:
    """Writes what is generated from what; raises ConfigError where the rows on file come from something else."""
    path, now = (
        workdir / "generated.json",
        {"config": public(run.cfg), "contents": resuming.contents_of(run)},
    )
    if step:
        if not path.exists():
            raise DataError(
                f"{path}: not there, so nobody knows what the rows beside it come from; take another workdir"
            )
        try:
            old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            before = flat(old["config"]) | old["contents"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}); take another workdir") from None
        after = flat(now["config"]) | now["contents"]
        check_changes(before, after, run.cfg.train.accept_changes, step, log)
        log(f"going on after step {step}")
    _write(path, [json.dumps(now, indent=1) + "\n"])


def _sample_steps(
    run: build.Run, hosts: Hosts, steps: range, count: int, folder: pathlib.Path, desk: Desk | None
) -> None:
    """Samples the problems of these steps on every host; the leader writes the rows of each.

    Args:
      count: problems in all.
      folder: of the rows.
      desk: of the leader.
    """
    params, each = run.policy.weights(), run.cfg.train.prompts
    second = run.second.synced() if run.second else None
    for step in steps:
        with desk.progress.phase("sample") if desk else contextlib.nullcontext():
            engines = run.policy.engines(params, run.second, second, step)
            left = min(each, count - step * each)
            with desk.stories(step, step * each, left) if desk else Stories([]) as stories:
                stats = run_stories(stories, engines, hosts)
        if nonfinite := stats.nonfinite:
            raise TrainingError(f"step {step + 1}: {nonfinite} tokens were sampled from numbers that are not finite")
        if desk is not None:
            _write_step(run, desk, folder, step, stories, stats)


def _write_step(run: build.Run, desk: Desk, folder: pathlib.Path, step: int, stories: Stories, stats: Stats) -> None:
    """Writes the rows of a step, with its rollout and metrics."""
    assert desk.log.writer is not None
    groups, cfg = desk.groups(stories), run.cfg
    lines = _lines(groups, step * cfg.train.prompts, cfg.generate.rows, desk.method.texts.critique)
    values = desk.log.rollout_metrics(step + 1, groups, stats) | {"rows/kept": float(len(lines))}
    desk.log.writer.rollout(step + 1, groups, desk.log.pieces.widths)
    desk.log.writer.scalars(step + 1, values)
    _write(folder / f"{step + 1:06d}.jsonl", lines)  # last: what is there is not made again
    desk.progress.step_done(step + 1, {"rows": len(lines), "s": values["seconds/sample"]})


def _begin(run: build.Run, desk: Desk, workdir: pathlib.Path) -> tuple[int, int, int]:
    """Steps that are made already, steps in all, and problems in all."""
    cfg, folder = run.cfg, workdir / "rows"
    most, size = cfg.train.steps * cfg.train.prompts, desk.problems.size
    count = most if size is None else min(size, most)
    steps = -(-count // cfg.train.prompts)
    folder.mkdir(parents=True, exist_ok=True)
    made_before = len(list(folder.glob("[0-9]*.jsonl")))  # they are made one after another
    _check_begun(run, workdir, made_before, desk.progress.log)
    desk.progress.expect(steps)
    desk.progress.resume_at(made_before)
    if made_before < steps:
        desk.log.open_files(workdir, made_before)
    return made_before, steps, count


def generate(cfg: Config, workdir: pathlib.Path, hosts: Hosts = ONE_HOST) -> None:
    """Writes `WORKDIR/rows.jsonl` from one pass over the problems, at most train.steps x train.prompts of them.

    Args:
      hosts: of a run of several processes, each of which calls this function; the leader writes.

    Raises:
      ConfigError: the workdir holds rows of another model or of other settings.
      TrainingError: the model's numbers are not finite.
    """
    with contextlib.ExitStack() as stack:
        run, progress = stack.enter_context(begun(cfg, workdir, hosts))
        desk = stack.enter_context(open_desk(run, progress, workdir))  # None on hosts that do not lead
        folder, compiled = workdir / "rows", compilation.watch()
        made_before, steps, count = hosts.share(lambda: _begin(run, desk, workdir) if desk else (0, 0, 0))
        if made_before < steps:
            try:
                _sample_steps(run, hosts, range(made_before, steps), count, folder, desk)
            except Stopped:
                there = f"the rows of {len(list(folder.glob('[0-9]*.jsonl')))} of {steps} steps are in {folder}"
                raise Stopped(f"stopped; {there}, the same command goes on") from None
        if hosts.leader:
            made = [(folder / f"{step + 1:06d}.jsonl").read_text(encoding="utf-8") for step in range(steps)]
            _write(workdir / "rows.jsonl", made)
            progress.log(f"compiled {compiled}")
            kept = sum(text.count("\n") for text in made)
            progress.log(f"done: {kept} rows of {count} problems are in {workdir}/rows.jsonl")
