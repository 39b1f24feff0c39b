"""One HTML file on runs: curves, evaluations, configuration, and a browser of their rollouts. It needs no network.

    python -m cgrpo_jax.report runs/quickstart                                    # runs/quickstart/report.html
    python -m cgrpo_jax.report runs/quickstart runs/dr_grpo --out=compared.html   # several side by side

A run of training or evaluation leaves one in its workdir when it ends. Whatever a model wrote is shown as text and
never runs. A report that would grow too large leaves rollouts out and says which.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

from cgrpo_jax.errors import UserError
from cgrpo_jax.report_page import page
from cgrpo_jax.workdir.places import expanded

NAME = "report.html"


def leave(workdir: pathlib.Path, log: Callable[[str], None]) -> None:
    """The report of a run that has ended, in its workdir. What goes wrong with it is said and never fails the run."""
    began = time.perf_counter()
    try:
        page.write([workdir], workdir / NAME)
    except Exception as error:
        log(f"no report: {type(error).__name__}: {error}; python -m cgrpo_jax.report {workdir} tries again")
    else:
        log(f"report: {workdir / NAME} ({time.perf_counter() - began:.1f} s)")


def renew(workdir: pathlib.Path, log: Callable[[str], None]) -> None:
    """Leaves the report of a run that is done, where it lacks one or has metrics that are newer."""
    path, metrics = workdir / NAME, workdir / "metrics.jsonl"
    if not path.exists() or (metrics.exists() and path.stat().st_mtime < metrics.stat().st_mtime):
        leave(workdir, log)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cgrpo_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=expanded, help="workdirs, also of runs that still work")
    parser.add_argument("--out", type=expanded, help=f"the file (default: {NAME} in the workdir, where it is one)")
    parser.add_argument("--megabytes", type=float, default=page.MEGABYTES, help="of rollouts (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=page.CHARACTERS, help="of a text (default: %(default)s)")
    args = parser.parse_args()
    if len(args.runs) > 1 and args.out is None:
        parser.error("--out is needed with several runs")
    if not 0 <= args.megabytes < 400 or args.characters < 2:
        parser.error("--megabytes is from 0 to 400, --characters 2 at least")
    out = args.out or args.runs[0] / NAME
    try:
        left_out = page.write(args.runs, out, args.megabytes, args.characters)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join([*filter(None, [left_out]), f"{out}  {out.stat().st_size / 1e6:.1f} MB"]))


if __name__ == "__main__":
    main()
