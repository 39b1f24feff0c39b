"""Metrics of a step, and the files they are written to: `metrics.jsonl`, TensorBoard, `rollouts/STEP.jsonl`."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from cgrpo_jax.records import Attempt, Group
from cgrpo_jax.workdir.places import write_whole, writing
from cgrpo_jax.workdir.shades import write_logp, write_widths
from cgrpo_jax.workdir.tracking import Tracker

Widths = Callable[[Sequence[int], str], list[int] | None]  # ids and their text -> characters of each token
# Explanations that TensorBoard and the HTML report show beside the name of a metric.
NOTES = {
    "loss/total": (
        "With one update per rollout each importance ratio is 1, so the responses' part is minus the sum of their "
        "weighted advantages and says nothing about progress: it can be 0 while the gradient is not. Read rewards, "
        "evaluations and grad_norm."
    ),
    "policy/kl_clamped": "Share of tokens whose k3 is clamped (objective.kl_limit), where the KL term has no gradient.",
    "policy/entropy": (
        "Estimated from all sampled tokens of the responses, with or without a loss: minus the mean of their "
        "log-probabilities in the distribution that they were drawn from; its expectation is the entropy."
    ),
    "policy/entropy_refinements": "As policy/entropy, for the refinements of the policy, under their own prompts.",
    "policy/entropy_trained": "Exact, over the tokens that were trained on: those of problems with an advantage.",
    "update/skipped": "Updates of the step in which no row had a loss: weights and optimizer moments did not change.",
    "problems/undivided": (
        "Problems whose responses all have the same reward while a refinement has another: there is no standard "
        "deviation to divide by, so advantages are not divided (objective.baseline=responses, objective.divide_by_std)."
    ),
}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _entropy(attempts: Sequence[Attempt]) -> float | None:
    """Unbiased estimate in nats per token: minus the mean log-probability that sampled tokens were drawn with."""
    done = [attempt.completion for attempt in attempts]
    tokens = sum(one.tokens for one in done)
    surprise = sum(float((np.log(one.kept) - one.logp)[one.has_loss_T].sum(dtype=np.float64)) for one in done)
    return surprise / tokens if tokens else None


def _without_room(group: Group) -> int:
    """How many responses with a critique were not refined, because the refinement prompt would be too long."""
    criticised = [a for a in group.responses if a.critique is not None and a.critique.text is not None]
    return max(0, len(criticised) - len(group.refinements))


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Statistics of the rollout of a step, over problems or attempts, as the name of the metric says.

    A mean over nothing (say, over refinements where there is none) is left out.
    """
    responses = [attempt for group in groups for attempt in group.responses]
    refinements = [attempt for group in groups for attempt in group.refinements]
    refined_groups = [group for group in groups if group.refinements]
    attempts = responses + refinements
    critiques = [one for attempt in attempts if (one := attempt.evaluation or attempt.critique) is not None]
    written = [critique for critique in critiques if critique.tries]
    agreeing = [critique.agrees for critique in written if critique.agrees is not None]
    own = [attempt.parts for attempt in attempts if attempt.parts is not None]
    values = {f"reward/{name}": _mean([parts[name] for parts in own if name in parts]) for name in _names(own)}
    values |= {
        "reward/responses": _mean([a.reward for a in responses]),
        "reward/refinements": _mean([a.reward for a in refinements]),
        "reward/trained": _mean([a.reward for group in groups for a, _ in group.rows()]),
        "problems/solve_all": _mean([all(a.correct for a in group.responses) for group in groups]),
        "problems/solve_none": _mean([not any(a.correct for a in group.responses) for group in groups]),
        "refine/rate": len(refined_groups) / len(groups),
        "refine/success": _mean([any(a.correct for a in group.refinements) for group in refined_groups]),
        "critique/valid": _mean([critique.verdict is not None for critique in written]),
        "critique/agreement": _mean(agreeing),
        "critique/first_valid": _mean([critique.first_agrees is not None for critique in written]),
        "critique/first_agreement": _mean([one.first_agrees for one in written if one.first_agrees is not None]),
        "critique/fallback": _mean([critique.fallback for critique in written]),
        "critique/unusable": _mean([critique.text is None for critique in critiques]),
        "critique/tries": _mean([critique.tries for critique in written]),
        "tokens/critiques": float(sum(critique.tokens for critique in critiques)),
        "refine/no_room": float(sum(map(_without_room, groups))),
        "policy/entropy": _entropy(responses),
        "policy/entropy_refinements": _entropy([a for a in refinements if a.prompt_ids is not None]),
        "length/responses": _mean([a.completion.tokens for a in responses]),
        "length/refinements": _mean([a.completion.tokens for a in refinements]),
        "truncated/responses": _mean([not a.completion.finished for a in responses]),
        "truncated/refinements": _mean([not a.completion.finished for a in refinements]),
        "verifier/no_answer": _mean([a.extracted is None for a in attempts]),
        "verifier/timeouts": float(sum(a.status == "timeout" for a in attempts)),
        "verifier/failures": float(sum(a.status in ("memory", "died", "error") for a in attempts)),
        "verifier/no_reward": float(sum(a.status == "no_reward" for a in attempts)) if own else None,
        "tokens/responses": float(sum(a.completion.tokens for a in responses)),
        "tokens/refinements": float(sum(a.completion.tokens for a in refinements)),
    }
    return {name: value for name, value in values.items() if value is not None}


LOSSES = ("loss/total", "loss/responses", "loss/refinements")


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the updates of a rollout, from each update's sums over tokens.

    Losses are normalised already. Other means are over the tokens that were trained on, and left out where there are
    none; without an update the losses are 0. The log-probabilities of sampler and trainer are compared in the first
    update only: from the second on the policy has changed.
    """
    if not updates:
        return dict.fromkeys([*LOSSES, "tokens/trained", "policy/nonfinite_tokens"], 0.0)
    first, last = updates[0], updates[-1]
    sums = {name: sum(update[name] for update in updates) for name in first}
    values: dict[str, float | None] = {
        "loss/total": sums["loss"] / len(updates),
        "loss/responses": sums["response_loss"] / len(updates),
        "loss/refinements": sums["refined_loss"] / len(updates),
        "policy/grad_norm": sums["grad_norm"] / len(updates),
        "policy/nonfinite_total": last["notfinite_total"],
        "policy/nonfinite_tokens": sums["nonfinite_tokens"],
        "tokens/trained": sums["tokens"],
    }

    def share(name: str, count: str) -> float | None:
        return sums[name] / sums[count] if name in sums and sums[count] else None

    values |= {
        "policy/entropy_trained": share("entropy", "tokens"),
        "policy/logp": share("logp", "tokens"),
        "policy/clipped": share("clipped", "response_tokens"),
        "policy/clipped_refinements": share("refined_clipped", "refined_tokens"),
        "policy/correction": share("correction", "response_tokens"),
        "policy/refined_prob": share("refined_prob", "refined_tokens"),
        "policy/kl": share("kl", "tokens"),
        "policy/kl_clamped": share("kl_clamped", "tokens"),
    }
    if "logp_gap" in first and first["response_tokens"]:
        values["sampler/logp_diff_mean"] = first["logp_gap"] / first["response_tokens"]
        values["sampler/logp_diff_max"] = first["logp_gap_max"]
    return {name: value for name, value in values.items() if value is not None}


def _attempt_record(attempt: Attempt, widths: Widths | None) -> dict[str, Any]:
    """An attempt as JSON. Probabilities of tokens are written for a text that was sampled as a whole.

    Args:
      widths: None for a text that was not sampled.
    """
    completion = attempt.completion
    record = {
        "text": attempt.text,
        "reward": attempt.reward,
        "correct": attempt.correct,
        "answer": attempt.extracted,
        "status": attempt.status,
        "tokens": completion.tokens,
        "finished": completion.finished,
    }
    if attempt.critique is not None:
        record["critique"] = attempt.critique.text
    if (critique := attempt.evaluation or attempt.critique) is not None and critique.tries:
        record["critic"] = {name: getattr(critique, name) for name in ("verdict", "agrees", "tries", "fallback")}
    if attempt.source is not None:
        record["source"] = attempt.source
    if attempt.parts is not None:
        record["parts"] = dict(attempt.parts)
    if widths is None:
        record["sampled"] = False
    elif completion.has_loss_T.all() and (width_T := widths(completion.ids.tolist(), attempt.text)) is not None:
        record |= {"logp": write_logp(completion.logp), "widths": write_widths(width_T)}
    return record


def _names(parts: Sequence[Mapping[str, float]]) -> list[str]:
    """Names of the functions of reward.fn that returned a value."""
    return sorted({name for of_attempt in parts for name in of_attempt})


BEGIN = b'{"step": '  # of a line of metrics.jsonl


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics; None for a line that is not one of this program."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return step if type(step) is int else None


def _named_by_step(file: pathlib.Path) -> bool:
    return file.is_file() and re.fullmatch(r"[0-9]{6,}\.jsonl", file.name) is not None


class Writer:
    """Appends to the files of a workdir; what an interrupted run has written after `first_step` is removed.

    What this program did not write is never removed: such lines of `metrics.jsonl` are moved to `metrics.stray.jsonl`,
    such files of `rollouts/` stay; the log names both. `on_row` and `tracker` are given each line of `metrics.jsonl`
    after it is written; `close` closes the tracker as well.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        first_step: int,
        log: Callable[[str], None],
        on_row: Callable[[dict[str, Any]], None] | None = None,
        tracker: Tracker | None = None,
    ):
        self.workdir, self.on_row, self.tracker = pathlib.Path(workdir), on_row, tracker
        (self.workdir / "rollouts").mkdir(parents=True, exist_ok=True)
        self.path = self.workdir / "metrics.jsonl"
        self._cut_metrics(first_step, log)
        stray = []
        for file in sorted((self.workdir / "rollouts").iterdir()):
            if not _named_by_step(file):
                stray.append(file.name)
            elif int(file.stem) > first_step:
                file.unlink()
        if stray:
            log(f"{self.workdir}/rollouts: not named by a step, left alone: {', '.join(stray)}")
        self.board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=first_step + 1)

    def _cut_metrics(self, first_step: int, log: Callable[[str], None]) -> None:
        """Keeps the lines up to `first_step`, and drops a last line that a kill has cut short."""
        *lines, torn = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        if _step_of(torn) is not None or not (torn.startswith(BEGIN) or BEGIN.startswith(torn)):
            lines.append(torn)
        steps = [_step_of(line) for line in lines]
        stray = [number for number, step in enumerate(steps) if step is None]
        if stray:
            aside = self.path.with_name("metrics.stray.jsonl")
            with aside.open("ab") as file:
                file.writelines(lines[number] + b"\n" for number in stray)
            places = ", ".join(str(number + 1) for number in stray)
            log(f"{self.path}: without a step, moved to {aside.name}: line {places}")
        kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= first_step]
        write_whole(self.path, b"".join(line + b"\n" for line in kept if first_step))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            # JSON has no NaN and no infinity: they are null
            row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps(row) + "\n")
        with writing(self.workdir / "tensorboard"):
            for name, value in values.items():
                self.board.add_scalar(name, value, step, summary_description=NOTES.get(name, ""))
            self.board.flush()
        if self.tracker is not None:
            self.tracker.row(row)
        if self.on_row is not None:
            self.on_row(row)

    def rollout(self, step: int, groups: Sequence[Group], widths: Widths) -> None:
        """Writes one line per problem: question, responses, critiques, refinements, scores, and what was trained on.

        The probability and the characters of each token (`workdir.shades`) are written where tokens match the text.
        """
        path = self.workdir / "rollouts" / f"{step:06d}.jsonl"
        with writing(path), path.open("w", encoding="utf-8") as file:
            for group in groups:
                record = {
                    "question": group.problem.question,
                    "answer": group.problem.answer,
                    "tag": group.problem.tag,
                    "responses": [_attempt_record(attempt, widths) for attempt in group.responses],
                    "refinements": [
                        _attempt_record(attempt, widths if attempt.prompt_ids is not None else None)
                        for attempt in group.refinements
                    ],
                    "kept": list(group.kept),
                    "selected": list(group.selected),
                }
                if group.own_group:
                    record["own_group"] = list(group.own_group)
                file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        with writing(self.workdir / "tensorboard"):
            self.board.close()
        if self.tracker is not None:
            self.tracker.close()
