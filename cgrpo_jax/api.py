"""The calls for notebooks and scripts; `cgrpo_jax.train` and the like are these.

Each imports what it needs when it is called, so that reading a configuration or a finished run waits for no jax. They
raise the project's own errors and never end the process.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from cgrpo_jax.config import Config, from_config_dict
from cgrpo_jax.config.files import get_config
from cgrpo_jax.config.options import drawn
from cgrpo_jax.errors import ConfigError, RunError
from cgrpo_jax.process import stopping
from cgrpo_jax.report_page.live import Curves
from cgrpo_jax.workdir.places import expanded, local_folder
from cgrpo_jax.workdir.reading import RunTables, last_metrics, load_run

__all__ = [
    "Curves", "Graded", "RunError", "RunTables", "evaluate", "export", "generate", "get_config", "grade", "load_run",
    "make_plan", "train", "write_report",
]  # fmt: skip


class Graded(NamedTuple):
    """What is thought of a response. `status` is "ok", or why there is no verdict: timeout, memory, died, error."""

    correct: bool
    answer: str | None  # what was found in the text
    status: str


def _settled(config: Config | Mapping[str, Any], methods: Sequence[str]) -> Config:
    """The strict configuration. Raises ConfigError for an unknown key, and for a method that is not among `methods`."""
    if isinstance(config, (config_dict.ConfigDict, Mapping)):
        config = from_config_dict(config)
    if not isinstance(config, Config):
        raise ConfigError(f"config is of type {type(config).__name__}; get_config(NAME) makes one")
    if config.method not in methods:
        other = {"rl": "train", "sft": "train", "generate": "generate", "eval": "evaluate"}.get(config.method)
        mend = f"; cgrpo_jax.{other} runs it" if other else ""
        raise ConfigError(f"method = {config.method!r}; here: {', '.join(methods)}{mend}")
    return config


@functools.cache
def _keep_programs() -> None:
    """Compiled programs go to disk, as from the command line; once a process."""
    from cgrpo_jax.workdir import compilation

    compilation.keep_on_disk()


def train(
    config: Config | Mapping[str, Any],
    workdir: str | os.PathLike,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains as `config` says (method rl or sft) and returns the metrics of the end; resumes what `workdir` holds.

    They are those of the last step, and those of the last evaluation where there is one (`eval/...`). What was not
    finite is None.

    Args:
      on_step: is given the metrics of each step, and of each evaluation, when they are there; `Curves()` draws them.

    Raises: ConfigError, DataError, CheckpointError, MeshError, VerifierError, and OSError where another process works
      in `workdir`, before anything is compiled; TrainingError where training cannot go on; Stopped, a
      KeyboardInterrupt that says what was saved, where an interrupt (Ctrl-C, or of the kernel) asked it to leave.
    """
    cfg, folder = _settled(config, ("rl", "sft")), local_folder(workdir, "workdir")
    from cgrpo_jax import training

    _keep_programs()
    if isinstance(on_step, Curves):
        on_step.drawn = drawn(cfg.eval.temperature, cfg.eval.top_p)
    with stopping.for_this_call():
        training.train(cfg, folder, on_row=on_step)
    return last_metrics(folder)


def evaluate(config: Config | Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
    """Asks a checkpoint the named tasks (method eval) and returns what `results.json` holds.

    Its `tasks` have an entry each (pass@1 with its interval, pass@k, avg@k, maj@k, lengths), `mean` is over them. What
    `workdir` holds of an earlier call is not sampled again.

    Raises: ConfigError, DataError, CheckpointError, MeshError, VerifierError.
    """
    cfg, folder = _settled(config, ("eval",)), local_folder(workdir, "workdir")
    from cgrpo_jax import evaluating
    from cgrpo_jax.evaluation import tables

    _keep_programs()
    with stopping.for_this_call():
        evaluating.evaluate_tasks(cfg, folder)
    return dict(tables.read(folder))


def make_plan(
    config: Config | Mapping[str, Any], topology: str, only: Sequence[str] = (), largest: bool = False
) -> dict[str, Any]:
    """Whether a run fits a TPU that need not be here (or "local", the machine at hand), and how long it may take.

    What `python -m cgrpo_jax.plan --json` writes: `fits`, `programs.NAME.peak_bytes`, `steps`, ...; and `text`, as it
    prints.

    Args:
      only: kinds of programs, as in ["update", "decode"]; none: all.
      largest: also looks for the most rows that fit, which compiles several programs more.

    Raises: ConfigError, CheckpointError, MeshError.
    """
    cfg = _settled(config, ("rl", "sft"))
    from cgrpo_jax.planner import chips, making, printed
    from cgrpo_jax.workdir.progress import Progress

    with Progress(0, 1, "program") as progress:
        plan = making.make(cfg, chips.topology(topology), progress, only, largest)
    return printed.as_json(plan) | {"text": printed.text(plan)}


def export(workdir: str | os.PathLike, out: str | os.PathLike, dtype: str = "keep") -> pathlib.Path:
    """Writes the newest checkpoint of a run as a Hugging Face folder that transformers opens, and returns it.

    Args:
      out: a new folder.
      dtype: keep, float32 or bfloat16.

    Raises: CheckpointError, and OSError where it cannot be written; then nothing is left of it.
    """
    from cgrpo_jax.convert import convert

    convert(str(workdir), "hf", str(out), dtype)
    return expanded(out)


def push(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    repo: str,
    *,
    license: str = "unknown",
    public: bool = False,
    evaluated: str | os.PathLike | None = None,
    dry_run: bool = False,
) -> pathlib.Path:
    """Exports the newest checkpoint of a run, writes a model card from it and uploads both to the Hugging Face hub.

    Args:
      out: a new folder, returned; it stays whatever becomes of the upload.
      repo: OWNER/REPO, made if it is not there, private unless `public`.
      license: of the weights, an identifier of the hub as apache-2.0.
      evaluated: workdir of an evaluation, whose table goes into the card.
      dry_run: nothing is sent, and no token is needed.

    Raises: HubError, CheckpointError, RunError, ReportError, OSError.
    """
    from cgrpo_jax.convert import Sharing, share

    table = None if evaluated is None else expanded(evaluated)
    share(str(workdir), str(out), Sharing(repo, license, public, table, dry_run))
    return expanded(out)


def write_report(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike) -> pathlib.Path:
    """One HTML file on runs, side by side: curves, evaluations, rollouts (`python -m cgrpo_jax.report`). Returns it.

    Raises: RunError where a workdir holds no run, OSError.
    """
    from cgrpo_jax.report_page import page

    page.write([expanded(workdir) for workdir in workdirs], expanded(out))
    return expanded(out)


def generate(config: Config | Mapping[str, Any], workdir: str | os.PathLike) -> pathlib.Path:
    """Samples rows to imitate (method generate) and returns their file, a `data.source` of method sft.

    What `workdir` holds of an earlier call is not sampled again.

    Raises: ConfigError, DataError, CheckpointError, MeshError, VerifierError, TrainingError.
    """
    cfg, folder = _settled(config, ("generate",)), local_folder(workdir, "workdir")
    from cgrpo_jax import generating

    _keep_programs()
    with stopping.for_this_call():
        generating.generate(cfg, folder)
    return folder / "rows.jsonl"


def grade(golds: Sequence[str], texts: Sequence[str]) -> list[Graded]:
    """Whether each whole response gives its gold answer, by mathematical equivalence. Loads no jax.

    Texts are parsed in worker processes, which start with each call (a second, or several where an answer needs a
    computer algebra system): grade many at once.

    Raises: ValueError for lists of different lengths, or of anything but strings.
    """
    for name, given in (("golds", golds), ("texts", texts)):
        if isinstance(given, str) or not all(isinstance(value, str) for value in given):
            raise ValueError(f"{name}: a list of strings is needed")
    if len(golds) != len(texts):
        raise ValueError(f"{len(golds)} golds for {len(texts)} texts: one each is needed")
    import numpy as np

    from cgrpo_jax.config.options import VerifierConfig
    from cgrpo_jax.grading import rewards
    from cgrpo_jax.grading.verifier import Verifier
    from cgrpo_jax.records import Completion, Problem

    no_tokens = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32), True)
    asked = [(Problem("", gold, (), "math"), no_tokens, text) for gold, text in zip(golds, texts, strict=True)]
    with Verifier(VerifierConfig()) as verifier:
        attempts = rewards.score(asked, verifier)
    return [Graded(attempt.correct, attempt.extracted, attempt.status) for attempt in attempts]
