"""Tables and plots of the results of evaluations, and the differences of several runs on the same problems."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgrpo_jax.config.options import drawn
from cgrpo_jax.data.told import public_name
from cgrpo_jax.errors import ReportError
from cgrpo_jax.evaluation.intervals import paired, scores_by_content

Results = Mapping[str, Any]  # the content of results.json, or the entry of one of its tasks

VERSION = 4  # of results.json
DIGESTS = ("weights", "files", "prompt")  # settings that are digests
DIGITS_SHOWN = 12  # hexadecimal digits of a digest in messages and tables
# Settings that two runs should share where their models are to be compared.
SAMPLED = ("max_new_tokens", "temperature", "top_p", "samples", "thinking", "dtype", "prompt")
# Okabe and Ito's colours, which the colour-blind can tell apart, each with a marker of its own.
MARKERS = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
ACROSS = 3  # panels side by side
PERCENT = (-2, 102)  # limits of an axis in per cent, so that markers at both ends are whole


def read(workdir: pathlib.Path) -> Results:
    """The results of a run. Raises ReportError where there are none, or none that this version reads."""
    path = workdir / "results.json"
    if not path.exists():
        raise ReportError(f"{path}: no such file; run configs/eval.py with this workdir first")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not valid JSON ({error})") from error
    version = results.get("version") if isinstance(results, dict) else None
    if version != VERSION:
        raise ReportError(
            f"{path}: version {version!r}, this reads version {VERSION}; grade again: the same eval command takes the "
            "stored answers, or says why it cannot"
        )
    try:  # what tables and comparisons read, so that damage is found here
        table(results)
        asked(results)
        _other_settings(results, results)
        for of in results["tasks"].values():
            scores_by_content(of)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{path}: damaged ({type(error).__name__}: {error}); the same eval command grades again what is stored"
        ) from error
    return results


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _accuracy(of: Results) -> str:
    return f"{_share(of['pass@1'])} [{_share(of['pass@1/low'])}, {_share(of['pass@1/high'])}]"


def setting_text(name: str, value: Any) -> str:
    """The value of a setting as people read it; of a digest, its first digits."""
    return str(value)[:DIGITS_SHOWN] if name in DIGESTS else str(value)


def _count(of: Results) -> str:
    """The number of distinct problems, of rows where several rows hold one problem, and of samples of a row."""
    copies = set(Counter(of["content"]).values())
    if copies == {1}:
        return f"{of['problems']} x {of['samples']}"
    if len(copies) == 1:
        return f"{of['problems']} x {copies.pop()} copies x {of['samples']}"
    return f"{of['problems']} in {of['rows']} rows x {of['samples']}"


class Table(NamedTuple):
    """A table and the notes below it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def markdown(self) -> str:
        """The table without its notes."""
        lines = (self.columns, ["---"] * len(self.columns), *self.rows)
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(results: Results) -> Table:
    """A row for each task and each set of problems in it, and the mean of several tasks; shares in per cent."""
    accuracy = f"pass@1 [95 %], {drawn_of(results)}"
    columns = ["task", "n", accuracy, "avg@r", "maj@r", "pass@k", "tokens", "cut", "no answer", "no verdict"]
    rows = []
    for name, of in results["tasks"].items():
        k = max(of["pass@k"], key=int)
        several = [_share(of["pass@1"]), _share(of["maj@G"]), f"{_share(of['pass@k'][k])} (k={k})"]
        several = several if of["samples"] > 1 else ["", "", ""]
        rows.append([name, _count(of), _accuracy(of), *several, *_tail(of)])
        for source, part in of.get("sources", {}).items():
            rows.append([f"{name}: {source}", str(part["problems"]), _accuracy(part), *[""] * (len(columns) - 3)])
    if len(results["tasks"]) > 1:
        mean = results["mean"]
        rows.append(["mean", str(len(results["tasks"])), _accuracy(mean), "", "", "", *_tail(mean)])
    meaning = (
        "n: distinct problems, copies where a problem stands in several rows, samples a row. Accuracies are means over "
        "distinct problems, copies averaged first. Intervals: Wilson over distinct problems; of the mean, from those "
        "of the tasks. No verdict: answers whose grading ended at a limit; they count as wrong."
    )
    of = results["sampling"]  # of the whole evaluation: its tasks share one queue, so they have no time each
    speed = "" if of["tokens_per_s"] is None else f", {of['tokens_per_s']:.0f} tokens/s"
    time = f"Sampling, with loading and compiling: {of['seconds']:.0f} s, {of['tokens']} tokens{speed}."
    return Table(columns, rows, [meaning, time, *results["notes"]])


def drawn_of(results: Results) -> str:
    """How the answers of an evaluation were drawn: "greedy", "sampled, T=1"."""
    return drawn(results["settings"]["temperature"], results["settings"]["top_p"])


def asked(results: Results) -> str:
    """The settings of an evaluation, in a line."""
    return ", ".join(f"{name} {setting_text(name, value)}" for name, value in results["settings"].items())


def _tail(of: Results) -> list[str]:
    return [f"{of['length']:.0f}", _share(of["truncated"]), _share(of["no_answer"]), _share(of["no_verdict"])]


def _other_settings(first: Results, second: Results) -> str:
    """The settings of `SAMPLED` in which two runs differ, as in "temperature 0.0 / 1.0, ..."."""
    pairs = [(name, first["settings"][name], second["settings"][name]) for name in SAMPLED]
    return ", ".join(f"{name} {setting_text(name, a)} / {setting_text(name, b)}" for name, a, b in pairs if a != b)


def differences(runs: Mapping[str, Results]) -> Table:
    """pass@1 of each later run less that of the first, on the problems that both have (by content).

    Raises:
      ReportError: two runs without a common task, or without a common problem of a task that both name.
    """
    (base, first), *others = runs.items()
    header = ("task", "run", "n", "difference in points [95 %]", "p", "sampled otherwise")
    rows, notes = [], []
    for name, results in others:
        tasks = [task for task in first["tasks"] if task in results["tasks"]]
        if not tasks:
            raise ReportError(f"{base} and {name} have no task in common")
        if alone := sorted(first["tasks"].keys() ^ results["tasks"].keys()):
            notes.append(f"Not compared, as only one of {base} and {name} has it: {', '.join(alone)}.")
        for task in tasks:
            ours, theirs = (scores_by_content(of["tasks"][task]) for of in (first, results))
            shared = [content for content in ours if content in theirs]
            if not shared:
                raise ReportError(f"{base} and {name} have no problem of {task} in common")
            if not len(shared) == len(ours) == len(theirs):
                counts = f"{len(ours)} problems of {base} and the {len(theirs)} of {name}"
                notes.append(f"{task}: {len(shared)} are among both the {counts}; the others are left out.")
            a_Z, b_Z = (np.array([scores[content] for content in shared]) for scores in (ours, theirs))
            found = paired(a_Z, b_Z, seed=0)
            points = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            other = _other_settings(first, results)
            rows.append([task, name, str(len(shared)), points, f"{found.p:.3g}", other])
    how = ", ".join(f"{name} {drawn_of(of)}" for name, of in runs.items())
    meaning = (
        f"pass@1: {how}. Against {base}. n: distinct problems, paired by content. Interval: bootstrap over problems; "
        "where all differ alike (one problem, say), as many others as Wilson's interval allows may differ by anything. "
        "p: two-sided sign-flip test, for one task at a time. Sampled otherwise: settings of the two runs that differ; "
        "a difference may come from them."
    )
    return Table(header, rows, [meaning, *notes])


def _panels(count: int, width: float = 4.2, height: float = 3.4):
    from matplotlib.figure import Figure  # without pyplot, whose backend is the notebook's

    columns = min(ACROSS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.6))
    axes = figure.subplots(rows, columns, squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def _told_apart(runs: Mapping[str, Results]) -> tuple[list[str], list[tuple[str, Results, str, str]], str]:
    """All tasks; each run with its label, colour and marker; and what an axis says of how the answers were drawn.

    Where that differs between the runs, it is in their labels and not on the axis.
    """
    tasks = list(dict.fromkeys(task for results in runs.values() for task in results["tasks"]))
    said = {drawn_of(results) for results in runs.values()}
    labels = [name if len(said) == 1 else f"{name} ({drawn_of(results)})" for name, results in runs.items()]
    styled = [(*pair, *MARKERS[i % len(MARKERS)]) for i, pair in enumerate(zip(labels, runs.values(), strict=True))]
    return tasks, styled, f"\n{said.pop()}" if len(said) == 1 else ""


def plot_pass_at_k(runs: Mapping[str, Results], path: pathlib.Path) -> None:
    """A panel for each task, with a curve and its interval for each run."""
    tasks, styled, beside = _told_apart(runs)
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        ticks: set[int] = set()
        for label, results, colour, marker in styled:
            if (of := results["tasks"].get(task)) is None:
                continue
            ks = sorted(map(int, of["pass@k"]))
            ticks |= set(ks)
            keys = ("pass@k", "pass@k/low", "pass@k/high")
            mean, low, high = ([100 * of[key][str(k)] for k in ks] for key in keys)
            axis.plot(ks, mean, color=colour, marker=marker, markersize=4, label=label)
            axis.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=task, xscale="log", xlabel="k", ylabel=f"pass@k (%){beside}", ylim=PERCENT)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
        axis.grid(alpha=0.3)
    _finish(figure, axes, len(runs), path)


def plot_pass_at_1(runs: Mapping[str, Results], path: pathlib.Path) -> None:
    """One panel with pass@1 and its interval for each task and run."""
    tasks, styled, beside = _told_apart(runs)
    figure, (axis,) = _panels(1, width=2.5 + 0.9 * len(tasks))
    for index, (label, results, colour, marker) in enumerate(styled):
        own = [task for task in tasks if task in results["tasks"]]
        place = [tasks.index(task) + 0.6 * ((index + 0.5) / len(runs) - 0.5) for task in own]
        keys = ("pass@1", "pass@1/low", "pass@1/high")
        mean, low, high = (np.array([100 * results["tasks"][task][key] for task in own]) for key in keys)
        error = np.abs(np.stack([mean - low, high - mean]))
        axis.errorbar(place, mean, error, fmt=marker, color=colour, capsize=3, label=label)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axis.set(ylabel=f"pass@1 (%){beside}", xlim=(-0.5, len(tasks) - 0.5), ylim=PERCENT)
    axis.grid(axis="y", alpha=0.3)
    _finish(figure, [axis], len(runs), path)


def _finish(figure, axes, runs: int, path: pathlib.Path) -> None:
    if runs > 1:
        lines: dict[str, Any] = {}  # by run; a run need not be in every panel
        for axis in axes:
            handles, labels = axis.get_legend_handles_labels()
            lines |= dict(zip(labels, handles, strict=True))
        figure.legend(list(lines.values()), list(lines), loc="upper center", ncols=min(runs, 3), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93 if runs > 1 else 1))
    figure.savefig(path, dpi=120)


def write(workdir: pathlib.Path) -> None:
    """results.md, pass_at_1.png and, where problems have several answers, pass_at_k.png, beside results.json."""
    results = read(workdir)
    found = table(results)
    title = f"# {public_name('model.path', results['model'])}"
    text = "\n\n".join([title, asked(results), found.markdown(), *found.notes]) + "\n"
    (workdir / "results.md").write_text(text, encoding="utf-8")
    _plots({workdir.name: results}, workdir)


def _plots(runs: Mapping[str, Results], out: pathlib.Path) -> None:
    plot_pass_at_1(runs, out / "pass_at_1.png")
    if any(of["samples"] > 1 for results in runs.values() for of in results["tasks"].values()):
        plot_pass_at_k(runs, out / "pass_at_k.png")


def names_of(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """Names of runs: their folders, with as many of the folders above as are needed to tell them apart."""
    parts = [path.resolve().parts for path in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-count:]) for of in parts]
        if len(set(names)) == len(names):
            break
    return names


def compare(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> str:
    """Writes a table of differences and plots of all runs to `out`; returns the table."""
    runs = dict(zip(names_of(workdirs), map(read, workdirs), strict=True))
    found = differences(runs)
    text = "\n\n".join([found.markdown(), *found.notes]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "compared.md").write_text(text, encoding="utf-8")
    _plots(runs, out)
    return text
