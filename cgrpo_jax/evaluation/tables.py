"""Tables and plots of results.json; several runs side by side, with what they differ by on the same problems."""

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
from cgrpo_jax.evaluation.identity import SHOWN
from cgrpo_jax.evaluation.intervals import paired, scores_by_content

Results = Mapping[str, Any]  # of results.json

VERSION = 4  # of results.json
COLUMNS = (
    "task",
    "n",
    "pass@1 [95 %], {drawn}",
    "avg@r",
    "maj@r",
    "pass@k",
    "tokens",
    "cut",
    "no answer",
    "no verdict",
)
DIGESTS = ("weights", "files", "prompt")  # settings that are digests
# Settings that two runs should share where their models are to be compared.
SAMPLED = ("max_new_tokens", "temperature", "top_p", "samples", "thinking", "dtype", "prompt")
# Okabe and Ito's colours: told apart by the colour-blind, and with a marker each.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
ACROSS = 3  # panels side by side
PERCENT = (-2, 102)  # of an axis: whole markers at both ends


def read(workdir: pathlib.Path) -> Results:
    """The results of a run. Raises ReportError where there are none that this version reads."""
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
    try:
        _try(results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{path}: damaged ({type(error).__name__}: {error}); the same eval command grades again what is stored"
        ) from error
    return results


def _try(results: Results) -> None:
    """Reads all that a table or a comparison reads. Raises whatever that raises where something is not there."""
    table(results)
    asked(results)
    _other_settings(results, results)
    for of in results["tasks"].values():
        scores_by_content(of)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def shown(name: str, value: Any) -> str:
    """A setting as people read it: of a digest, the first digits."""
    return str(value)[:SHOWN] if name in DIGESTS else str(value)


def _count(of: Results) -> str:
    """Distinct problems, the rows that hold them where these are more, and samples a row."""
    copies = set(Counter(of["content"]).values())
    if copies == {1}:
        return f"{of['problems']} x {of['samples']}"
    if len(copies) == 1:
        return f"{of['problems']} x {copies.pop()} copies x {of['samples']}"
    return f"{of['problems']} in {of['rows']} rows x {of['samples']}"


def _sampling(of: Results) -> str:
    """A sentence on time: of the whole evaluation, as its tasks share one queue."""
    speed = "" if of["tokens_per_s"] is None else f", {of['tokens_per_s']:.0f} tokens/s"
    return f"Sampling, with loading and compiling: {of['seconds']:.0f} s, {of['tokens']} tokens{speed}."


class Table(NamedTuple):
    """A table and what is said below it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def markdown(self) -> list[str]:
        """Its lines, without the notes."""
        lines = (self.columns, ["---"] * len(self.columns), *self.rows)
        return ["| " + " | ".join(line) + " |" for line in lines]


def table(results: Results) -> Table:
    """A row per task, and the plain mean over several tasks (in percent where nothing else is said)."""
    rows = []
    for name, of in results["tasks"].items():
        k = max(of["pass@k"], key=int)
        interval = f"{_share(of['pass@1'])} [{_share(of['pass@1/low'])}, {_share(of['pass@1/high'])}]"
        several = [_share(of["pass@1"]), _share(of["maj@G"]), f"{_share(of['pass@k'][k])} (k={k})"]
        several = several if of["samples"] > 1 else ["", "", ""]
        rows.append([name, _count(of), interval, *several, *_tail(of)])
        for source, part in of.get("sources", {}).items():
            interval = f"{_share(part['pass@1'])} [{_share(part['pass@1/low'])}, {_share(part['pass@1/high'])}]"
            rows.append([f"{name}: {source}", str(part["problems"]), interval, *[""] * (len(COLUMNS) - 3)])
    mean = results["mean"]
    if len(results["tasks"]) > 1:
        of_mean = f"{_share(mean['pass@1'])} [{_share(mean['pass@1/low'])}, {_share(mean['pass@1/high'])}]"
        rows.append(["mean", str(len(results["tasks"])), of_mean, "", "", "", *_tail(mean)])
    meaning = (
        "n: distinct problems, copies where a problem stands in several rows, samples a row. Accuracies are means over "
        "distinct problems, copies averaged first. Intervals: Wilson over distinct problems; of the mean, from those "
        "of the tasks. No verdict: answers whose grading ended at a limit; they count as wrong."
    )
    columns = [column.format(drawn=drawn_of(results)) for column in COLUMNS]
    return Table(columns, rows, [meaning, _sampling(results["sampling"]), *results["notes"]])


def drawn_of(results: Results) -> str:
    """How the answers of an evaluation were drawn: "greedy", "sampled, T=1"."""
    return drawn(results["settings"]["temperature"], results["settings"]["top_p"])


def asked(results: Results) -> str:
    """The settings of an evaluation, in a line."""
    return ", ".join(f"{name} {shown(name, value)}" for name, value in results["settings"].items())


def _tail(of: Results) -> list[str]:
    return [f"{of['length']:.0f}", _share(of["truncated"]), _share(of["no_answer"]), _share(of["no_verdict"])]


def _other_settings(first: Results, second: Results) -> str:
    """What the two runs were not sampled alike in: "temperature 0.0 / 1.0, ..."."""
    pairs = [(name, first["settings"][name], second["settings"][name]) for name in SAMPLED]
    return ", ".join(f"{name} {shown(name, a)} / {shown(name, b)}" for name, a, b in pairs if a != b)


def differences(runs: Mapping[str, Results]) -> Table:
    """pass@1 of each later run less the first one's, on the problems that both have (by content).

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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(ACROSS, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.6), squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def _curve(by_k: Mapping[str, float], ks: Sequence[int]) -> list[float]:
    return [100 * by_k[str(k)] for k in ks]


def _told_apart(runs: Mapping[str, Results]) -> tuple[Mapping[str, Results], str]:
    """How answers were drawn, where a figure says it: on its axis, or behind each run's name where they differ."""
    said = {drawn_of(results) for results in runs.values()}
    if len(said) == 1:
        return runs, f"\n{said.pop()}"
    return {f"{name} ({drawn_of(results)})": results for name, results in runs.items()}, ""


def plot_pass_at_k(runs: Mapping[str, Results], path: pathlib.Path) -> None:
    """A panel a task, a curve a run, with its interval."""
    tasks = list(dict.fromkeys(task for results in runs.values() for task in results["tasks"]))
    runs, beside = _told_apart(runs)
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        ticks: set[int] = set()
        for (name, results), (colour, marker) in zip(runs.items(), STYLES * len(runs), strict=False):
            if (of := results["tasks"].get(task)) is None:
                continue
            ks = sorted(map(int, of["pass@k"]))
            ticks |= set(ks)
            axis.plot(ks, _curve(of["pass@k"], ks), color=colour, marker=marker, markersize=4, label=name)
            low, high = _curve(of["pass@k/low"], ks), _curve(of["pass@k/high"], ks)
            axis.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=task, xscale="log", xlabel="k", ylabel=f"pass@k (%){beside}", ylim=PERCENT)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
        axis.grid(alpha=0.3)
    _finish(figure, axes, len(runs), path)


def plot_pass_at_1(runs: Mapping[str, Results], path: pathlib.Path) -> None:
    """All tasks in one panel: pass@1 with its interval."""
    tasks = list(dict.fromkeys(task for results in runs.values() for task in results["tasks"]))
    runs, beside = _told_apart(runs)
    figure, (axis,) = _panels(1, width=2.5 + 0.9 * len(tasks))
    for index, ((name, results), (colour, marker)) in enumerate(zip(runs.items(), STYLES * len(runs), strict=False)):
        own = [task for task in tasks if task in results["tasks"]]
        place = [tasks.index(task) + 0.6 * ((index + 0.5) / len(runs) - 0.5) for task in own]
        keys = ("pass@1", "pass@1/low", "pass@1/high")
        mean, low, high = (np.array([100 * results["tasks"][task][key] for task in own]) for key in keys)
        error = np.abs(np.stack([mean - low, high - mean]))
        axis.errorbar(place, mean, error, fmt=marker, color=colour, capsize=3, label=name)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axis.set(ylabel=f"pass@1 (%){beside}", xlim=(-0.5, len(tasks) - 0.5), ylim=PERCENT)
    axis.grid(axis="y", alpha=0.3)
    _finish(figure, [axis], len(runs), path)


def _finish(figure, axes, runs: int, path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    if runs > 1:
        lines: dict[str, Any] = {}  # by run; a run need not be in every panel
        for axis in axes:
            handles, labels = axis.get_legend_handles_labels()
            lines |= dict(zip(labels, handles, strict=True))
        figure.legend(list(lines.values()), list(lines), loc="upper center", ncols=min(runs, 3), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93 if runs > 1 else 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(workdir: pathlib.Path) -> None:
    """results.md, pass_at_1.png and, where problems have several answers, pass_at_k.png, beside results.json."""
    results = read(workdir)
    found = table(results)
    parts = [
        f"# {public_name('model.path', results['model'])}",
        asked(results),
        "\n".join(found.markdown()),
        *found.notes,
    ]
    (workdir / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    _plots({workdir.name: results}, workdir)


def _plots(runs: Mapping[str, Results], out: pathlib.Path) -> None:
    plot_pass_at_1(runs, out / "pass_at_1.png")
    if any(of["samples"] > 1 for results in runs.values() for of in results["tasks"].values()):
        plot_pass_at_k(runs, out / "pass_at_k.png")


def names_of(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """Of runs: the names of their folders, with as many of the folders above as tell them apart."""
    parts = [path.resolve().parts for path in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-count:]) for of in parts]
        if len(set(names)) == len(names):
            break
    return names


def compare(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> str:
    """Writes one table of differences and one figure of all runs to `out`; returns the table."""
    runs = dict(zip(names_of(workdirs), map(read, workdirs), strict=True))
    found = differences(runs)
    text = "\n\n".join(["\n".join(found.markdown()), *found.notes]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "compared.md").write_text(text, encoding="utf-8")
    _plots(runs, out)
    return text
