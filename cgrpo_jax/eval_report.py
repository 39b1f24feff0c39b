"""Tables and plots of evaluations; several runs side by side, with what they differ by on the same problems.

    python -m cgrpo_jax.eval_report runs/eval_base runs/eval_trained --out=runs/compared

Each run is a workdir with a results.json (method=eval). The first one is what the others are compared with.
"""

from __future__ import annotations

import argparse
import sys

from cgrpo_jax.errors import UserError
from cgrpo_jax.evaluation import tables
from cgrpo_jax.workdir.places import expanded, local_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cgrpo_jax.eval_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=expanded, help="workdirs; the first is the base")
    parser.add_argument("--out", help="folder for the comparison (needed with several runs)")
    args = parser.parse_args()
    if len(args.runs) > 1 and args.out is None:
        parser.error("--out is needed with several runs")
    try:
        if len(args.runs) == 1:
            tables.write(args.runs[0])
            print((args.runs[0] / "results.md").read_text(encoding="utf-8"))
        else:
            print(tables.compare(args.runs, local_folder(args.out, "--out")))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
