"""Tables and plots of evaluations; several runs side by side, with what they differ by on the same problems.

    python -m cgrpo_jax.eval_report runs/eval_base runs/eval_trained --out=runs/compared

Each run is a workdir with a results.json (method=eval). The first one is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cgrpo_jax.evaluation.intervals import paired

COLUMNS = ("task", "n", "pass@1 [95 %]", "avg@r", "maj@r", "pass@k", "tokens", "cut", "no answer", "tokens/s")
# Okabe and Ito's colours: told apart by the colour-blind, and with a marker each.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
ACROSS = 3  # panels side by side


class ReportError(ValueError):
    """Runs that cannot be reported."""


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """The results of a run. Raises ReportError where there are none that this version reads."""
    path = workdir / "results.json"
    if not path.exists():
        raise ReportError(f"{path}: no such file; run configs/eval.py with this workdir first")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: not valid JSON ({error})") from error
    if results.get("version") != 1:
        raise ReportError(f"{path}: version {results.get('version')!r}, this reads version 1")
    return results


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row per task, and the plain mean over the tasks (in percent where nothing else is said)."""
    rows = []
    for name, of in results["tasks"].items():
        samples, k = of["samples"], max(of["pass@k"], key=int)
        interval = f"{_share(of['pass@1'])} [{_share(of['pass@1/low'])}, {_share(of['pass@1/high'])}]"
        several = [_share(of["pass@1"]), _share(of["maj@G"]), f"{_share(of['pass@k'][k])} (k={k})"]
        several = several if samples > 1 else ["", "", ""]
        speed = "" if of["tokens_per_s"] is None else f"{of['tokens_per_s']:.0f}"
        tail = [f"{of['length']:.0f}", _share(of["truncated"]), _share(of["no_answer"]), speed]
        rows.append([name, f"{of['problems']} x {samples}", interval, *several, *tail])
    mean = results["mean"]
    low, high = mean["pass@1/bootstrap"]
    of_mean = f"{_share(mean['pass@1'])} [{_share(low)}, {_share(high)}]"
    speed = f"{mean['tokens_per_s']:.0f}" if "tokens_per_s" in mean else ""
    ends = [f"{mean['length']:.0f}", _share(mean["truncated"]), _share(mean["no_answer"]), speed]
    rows.append(["**mean**", str(len(results["tasks"])), of_mean, "", "", "", *ends])
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    asked = ", ".join(f"{name} {value}" for name, value in results["settings"].items() if name != "model")
    notes = "Intervals: Wilson over problems; of the mean, bootstrap over problems within each task."
    return "\n".join([f"# {results['model']}", "", asked, "", *lines, "", notes, ""])


def differences(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: pass@1 of each later run less the first one's, on the problems that both have."""
    (base, first), *others = runs.items()
    lines = ["| task | run | n | difference in points [95 %] | p |", "|---|---|---|---|---|"]
    for name, results in others:
        shared = [task for task in first["tasks"] if task in results["tasks"]]
        if not shared:
            raise ReportError(f"{base} and {name} have no task in common")
        for task in shared:
            scores = [dict(zip(r["tasks"][task]["ids"], np.mean(r["tasks"][task]["correct"], axis=1), strict=True))
                      for r in (first, results)]  # fmt: skip
            ids = [i for i in scores[0] if i in scores[1]]
            if not ids:
                raise ReportError(f"{base} and {name} have no problem of {task} in common")
            ours, theirs = (np.array([score[i] for i in ids]) for score in scores)
            found = paired(ours, theirs, seed=0)
            points = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            lines.append(f"| {task} | {name} | {len(ids)} | {points} | {found.p:.3g} |")
    notes = f"Against {base}. Interval: bootstrap over problems; p: two-sided sign-flip test, for one task at a time."
    return "\n".join([*lines, "", notes, ""])


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


def plot_pass_at_k(runs: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """A panel a task, a curve a run, with its interval."""
    tasks = list(dict.fromkeys(task for results in runs.values() for task in results["tasks"]))
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for (name, results), (colour, marker) in zip(runs.items(), STYLES * len(runs), strict=False):
            if (of := results["tasks"].get(task)) is None:
                continue
            ks = sorted(map(int, of["pass@k"]))
            curve = lambda key, of=of, ks=ks: [100 * of[key][str(k)] for k in ks]
            axis.plot(ks, curve("pass@k"), color=colour, marker=marker, markersize=4, label=name)
            axis.fill_between(ks, curve("pass@k/low"), curve("pass@k/high"), color=colour, alpha=0.15, linewidth=0)
        axis.set(title=task, xscale="log", xlabel="k", ylabel="pass@k (%)", ylim=(0, 100))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.grid(alpha=0.3)
    _finish(figure, axes, len(runs), path)


def plot_pass_at_1(runs: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """All tasks in one panel: pass@1 with its interval."""
    tasks = list(dict.fromkeys(task for results in runs.values() for task in results["tasks"]))
    figure, (axis,) = _panels(1, width=2.5 + 0.9 * len(tasks))
    for index, ((name, results), (colour, marker)) in enumerate(zip(runs.items(), STYLES * len(runs), strict=False)):
        own = [task for task in tasks if task in results["tasks"]]
        place = [tasks.index(task) + 0.6 * ((index + 0.5) / len(runs) - 0.5) for task in own]
        get = lambda key, own=own, results=results: np.array([100 * results["tasks"][task][key] for task in own])
        mean = get("pass@1")
        error = np.abs(np.stack([mean - get("pass@1/low"), get("pass@1/high") - mean]))
        axis.errorbar(place, mean, error, fmt=marker, color=colour, capsize=3, label=name)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axis.set(ylabel="pass@1 (%)", ylim=(0, 100))
    axis.grid(axis="y", alpha=0.3)
    _finish(figure, [axis], len(runs), path)


def _finish(figure, axes, runs: int, path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    if runs > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=min(runs, 3), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93 if runs > 1 else 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(workdir: pathlib.Path) -> None:
    """results.md, pass_at_1.png and, where problems have several answers, pass_at_k.png, beside results.json."""
    results = read(workdir)
    (workdir / "results.md").write_text(table(results))
    _plots({workdir.name: results}, workdir)


def _plots(runs: Mapping[str, Mapping[str, Any]], out: pathlib.Path) -> None:
    plot_pass_at_1(runs, out / "pass_at_1.png")
    if any(of["samples"] > 1 for results in runs.values() for of in results["tasks"].values()):
        plot_pass_at_k(runs, out / "pass_at_k.png")


def compare(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> str:
    """Writes one table of differences and one figure of all runs to `out`; returns the table."""
    names = [path.resolve().name for path in workdirs]
    if len(set(names)) != len(names):
        names = [str(path) for path in workdirs]
    runs = dict(zip(names, map(read, workdirs), strict=True))
    text = differences(runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compared.md").write_text(text)
    _plots(runs, out)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cgrpo_jax.eval_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="workdirs; the first is the base")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the comparison (needed with several runs)")
    args = parser.parse_args()
    if len(args.runs) > 1 and args.out is None:
        parser.error("--out is needed with several runs")
    try:
        if len(args.runs) == 1:
            write(args.runs[0])
            print((args.runs[0] / "results.md").read_text())
        else:
            print(compare(args.runs, args.out))
    except (ReportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
