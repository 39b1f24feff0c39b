"""Two steps of the quickstart whose numbers are on file. To renew them: `python tests/golden_run.py`."""

import json
import os
import pathlib
import tempfile
import zlib

import conftest  # noqa: F401  first: it sets the flags
import jax
import numpy as np
from test_train import EVALUATED, lines, small, without_times

from cgrpo_jax import training
from cgrpo_jax.learning import credit

FILE = pathlib.Path(__file__).with_name("golden_run.json")


def checksum(groups):
    """Of all ids that were sampled in a step, response by response."""
    attempts = [attempt for group in groups for attempt in (*group.responses, *group.refinements)]
    rows = [[len(attempt.completion.ids), *map(int, attempt.completion.ids)] for attempt in attempts]
    return zlib.crc32(json.dumps(rows).encode())


def golden_run(workdir):
    """The metrics of each line, and a checksum of the sampled ids a step."""
    sampled, of_updates = [], credit.of_updates

    def noting(groups, *rest):
        sampled.append(checksum(groups))
        return of_updates(groups, *rest)

    credit.of_updates = noting
    try:
        with jax.numpy_rank_promotion("allow"):
            training.train(small(**EVALUATED), workdir)
    finally:
        credit.of_updates = of_updates
    return {"sampled": sampled, "metrics": without_times(lines(workdir / "metrics.jsonl"))}


def differences(found, wanted):
    """(step, metric, found, wanted) of all that is not equal to the last bit."""
    pairs = zip(found["metrics"], wanted["metrics"], strict=True)
    return [
        (row["step"], name, row.get(name), other.get(name))
        for row, other in pairs
        for name in sorted(row.keys() | other.keys())
        if row.get(name) != other.get(name)
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = golden_run(pathlib.Path(folder) / "w")
    if FILE.exists():
        for line in differences(found, json.loads(FILE.read_text())):
            print(*line)
    made_with = {"jax": jax.__version__, "numpy": np.__version__, "XLA_FLAGS": os.environ["XLA_FLAGS"].strip()}
    FILE.write_text(json.dumps({"made_with": made_with} | found, indent=1) + "\n")
    print(f"wrote {FILE}")
