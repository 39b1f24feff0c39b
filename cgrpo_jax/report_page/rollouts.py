"""Chooses the rollouts that the report holds: of all steps if they fit, else of some, with a note on the others."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.learning.credit import group_advantages
from cgrpo_jax.workdir import reading
from cgrpo_jax.workdir.shades import read_widths, write_widths

USUAL = {"status": "ok", "finished": True, "tag": ""}  # values of most records, so left out of them
STEPS = 8  # that share the room, at least, where not all fit


def in_order(count: int) -> Iterator[int]:
    """0 ... count - 1 in the order last, first, then always the middle of the widest gap."""
    if not count:
        return
    yield count - 1
    if count > 1:
        yield 0
    gaps = [(0, count - 1)]
    while gaps:
        first, last = gaps.pop(0)
        middle = (first + last) // 2
        if middle != first:
            yield middle
            gaps += [(first, middle), (middle, last)]


def shortened(attempt: Mapping[str, Any], characters: int) -> dict[str, Any]:
    """The attempt without the middle of a long text and its tokens; `cut`: where it was, how many characters."""
    text = attempt["text"]
    if len(text) <= characters:
        return dict(attempt)
    head, tail = characters // 2, len(text) - (characters - characters // 2)
    changed: dict[str, Any] = {}
    if "widths" in attempt:  # whole tokens only
        end_T = np.cumsum(read_widths(attempt["widths"]))
        first, behind = int(np.searchsorted(end_T, head, "right")), int(np.searchsorted(end_T, tail, "left")) + 1
        head, tail = int(end_T[first - 1]) if first else 0, int(end_T[behind - 1])
        widths = np.diff(end_T, prepend=0)
        changed["widths"] = write_widths([*widths[:first].tolist(), *widths[behind:].tolist()])
        changed["logp"] = attempt["logp"][:first] + attempt["logp"][behind:]
    return dict(attempt) | changed | {"text": text[:head] + text[tail:], "cut": [head, tail - head]}


def with_advantages(group: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Adds `advantage` to the attempts that are trained on, computed as the configuration says.

    `own_advantage` is that of a refinement in the group of those that are trained on under their own prompt.
    """
    kept = [group["responses"][i] for i in group["kept"]]
    _advantages(kept, [group["refinements"][i] for i in group["selected"]], config, "advantage")
    _advantages([group["refinements"][i] for i in group.get("own_group", [])], [], config, "own_advantage")


def _advantages(
    first: list[dict[str, Any]], refined: list[dict[str, Any]], config: Mapping[str, Any], name: str
) -> None:
    """Adds the advantages of rows that share a baseline, where the rewards and the configuration are known."""
    rows = first + refined
    if not rows or any(row["reward"] is None for row in rows) or "objective.baseline" not in config:
        return
    refined_G = np.arange(len(rows)) >= len(first)
    reward_G = np.array([row["reward"] for row in rows], np.float64)
    baseline, divide = config["objective.baseline"], config["objective.divide_by_std"]
    advantage_G = group_advantages(reward_G, refined_G, baseline=baseline, divide_by_std=divide)
    for row, advantage in zip(rows, advantage_G, strict=True):
        row[name] = round(float(advantage), 4)


def _unusual(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in USUAL or value != USUAL[key]}


def _record(group: dict[str, Any], characters: int) -> str:
    """JSON of a problem, as the page reads it. Changes the group."""
    for kind in ("responses", "refinements"):
        group[kind] = [_unusual(shortened(attempt, characters)) for attempt in group[kind]]
        for attempt in group[kind]:
            if (left := len(critique := attempt.get("critique") or "") - characters) > 0:
                attempt["critique"] = f"{critique[:characters]}\n[{left} characters are left out here]"
    return json.dumps(_unusual(group), allow_nan=False, separators=(",", ":"))


def answers_of(
    workdir: pathlib.Path, tasks: Sequence[str], room: int, characters: int, say: reading.Say
) -> dict[str, Any]:
    """As `rollouts_of`, for an evaluation: the problems of its tasks with all answers; the step is None."""
    groups, of, left = list[str](), 0, room
    for task in tasks:
        rows = reading.graded(workdir, task, say)
        for _, answers in itertools.groupby(rows, lambda row: row["id"]):
            record = _record(_answered(task, list(answers)), characters)
            of += 1
            left -= len(record)
            if left > 0:
                groups.append(record)
    said = ""
    if len(groups) < of:
        said = f"{len(groups)} of {of} problems are in this file"
        said += ". All are in eval/ of the workdir; --megabytes makes room."
    return {"steps": [{"step": None, "groups": groups}] if groups else [], "said": said}


def _answered(task: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The graded answers to one problem as a group of responses."""
    shown = ("text", "correct", "answer", "status", "tokens", "finished")
    responses = [{key: answer[key] for key in shown if key in answer} for answer in answers]
    first = {"question": answers[0]["question"], "answer": answers[0]["gold"], "tag": task}
    return first | {"responses": responses, "refinements": [], "kept": list(range(len(answers))), "selected": []}


def rollouts_of(
    workdir: pathlib.Path, config: Mapping[str, Any], room: int, characters: int, say: reading.Say
) -> dict[str, Any]:
    """{"steps": [{"step", "groups": JSON of each, "of": problems of the step}], "said": a note on what was left out}.

    Args:
      room: bytes that the records may take.
      characters: of a text, at most.
      say: is given a line on each thing that cannot be read.
    """
    files = reading.rollouts(workdir)
    share = room if sum(path.stat().st_size for path in files) <= room else room // STEPS
    steps, left = list[dict[str, Any]](), room
    for index in in_order(len(files)):
        path, groups = files[index], list[str]()
        lines = reading.groups(path, say)
        budget = min(share, left)
        for group in lines:
            with_advantages(group, config)
            record = _record(group, characters)
            if len(record) > budget:
                break
            budget -= len(record)
            left -= len(record)
            groups.append(record)
        if groups:
            steps.append({"step": int(path.stem), "groups": groups, "of": len(lines)})
        if len(groups) < len(lines) and left < share:
            break
    steps.sort(key=lambda step: step["step"])
    return {"steps": steps, "said": _said(steps, len(files))}


def _said(steps: Sequence[Mapping[str, Any]], of: int) -> str:
    """A sentence on what was left out; "" if nothing was."""
    short = [step for step in steps if len(step["groups"]) < step["of"]]
    if len(steps) == of and not short:
        return ""
    problems = sum(len(step["groups"]) for step in steps)
    parts = f" ({len(short)} of these in part, the first problems of each)" if short else ""
    return (
        f"{problems} problems of {len(steps)} of {of} steps are in this file{parts}; the others are left out, so "
        "counts below are of what is here. All are in rollouts/ of the workdir; --megabytes makes room for more."
    )
