"""A random subset of OpenR1-Math-46k as training data: 4k, 8k, 16k or 32k rows, each the beginning of the next.

    python -m cgrpo_jax.subset --size=4k --out=data/openr1_math_4k.parquet
    ... --source=openr1.parquet      # a local file instead of the hub's Elliott/Openr1-Math-46k-8192

Rows get the task prompt of the paper and `reward_model.question`, which the refinement prompt needs; `target` (the
annotated solution) stays. The order follows from --seed alone, so a smaller subset lies within a larger one. The rows
of the paper's own subset are not public.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.cells import TRACE, RowError, solution_text
from cgrpo_jax.data.rows import parse_row
from cgrpo_jax.data.sources import open_rows
from cgrpo_jax.errors import ConfigError, DataError, UserError
from cgrpo_jax.text.prompts import question_messages
from cgrpo_jax.workdir.places import expanded

HUB = "Elliott/Openr1-Math-46k-8192"
SIZES = {"4k": 4_000, "8k": 8_000, "16k": 16_000, "32k": 32_000}


def training_row(row: Mapping[str, Any] | RowError, number: int, split: str) -> dict[str, Any]:
    """A row in the authors' schema. Raises RowError naming the column."""
    if isinstance(row, RowError):
        raise row
    problem = parse_row(row, DataConfig()).problem
    return {
        "data_source": str(row.get("data_source") or "openr1"),
        "prompt": list(question_messages(problem.question)),
        "target": [{"role": "assistant", "content": solution_text(row.get(TRACE), TRACE)}],
        "ability": "math",
        "reward_model": {"ground_truth": problem.answer, "question": problem.question, "style": "rule"},
        "extra_info": {"index": number, "split": split},
    }


def subset(source: DataConfig, size: int, seed: int) -> list[dict[str, Any]]:
    """The first `size` rows of the seeded order of a source; `extra_info.index` is the row's number there, from 1.

    Raises:
      DataError: no such source, too few rows, or a row without what training needs.
    """
    rows = open_rows(source)
    if len(rows) < size:
        raise DataError(f"{source.source}: {len(rows)} rows; a subset of {size} needs as many")
    made = []
    for place in np.random.default_rng(seed).permutation(len(rows))[:size]:
        number, row = rows[place]
        try:
            made.append(training_row(row, number, source.split))
        except RowError as error:
            raise DataError(f"{source.source}, row {number}, {error}") from None
    return made


def _write(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """A parquet file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cgrpo_jax.subset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", required=True, choices=list(SIZES))
    parser.add_argument("--out", required=True, help="new .parquet file")
    parser.add_argument("--source", default=HUB, help="hub id or local file; default: %(default)s")
    parser.add_argument("--revision", default="main", help="of a hub id")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        out = expanded(args.out)
        if out.suffix != ".parquet" or out.exists():
            raise ConfigError(f"--out = {args.out!r}: a .parquet file that is not there yet is needed")
        if args.seed < 0:
            raise ConfigError(f"--seed = {args.seed}: must not be negative")
        rows = subset(DataConfig(source=args.source, revision=args.revision), SIZES[args.size], args.seed)
        _write(rows, out)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {len(rows)} rows to {out}")


if __name__ == "__main__":
    main()
