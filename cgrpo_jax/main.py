"""Trains as a configuration file says; the same command on the same workdir resumes.

    python -m cgrpo_jax.main --config=quickstart --workdir=runs/quickstart

--config is the name of a configuration that the package carries, or a file: --config=configs/quickstart.py. Any leaf
of it can be set: --config.train.steps=12. Some take an argument: --config=quickstart:dr_grpo.
"""

import difflib
import functools
import operator
import re
import sys
import traceback
from collections.abc import Mapping, Sequence

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from cgrpo_jax import config_files
from cgrpo_jax.config import ConfigError, from_config_dict
from cgrpo_jax.data.sources import DataError
from cgrpo_jax.evaluating import evaluate_tasks
from cgrpo_jax.grading.verifier import VerifierError
from cgrpo_jax.learning.finite import TrainingError
from cgrpo_jax.model.hf_config import CheckpointError
from cgrpo_jax.model.sharding import MeshError
from cgrpo_jax.supervised import sft
from cgrpo_jax.text.tokenizer import PromptError
from cgrpo_jax.training import train
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.places import local_folder

ERRORS = (ConfigError, MeshError, DataError, CheckpointError, PromptError, TrainingError, VerifierError)


class _ConfigParser(flags.ArgumentParser):
    """A name or path, perhaps with an argument -> its `ConfigDict`. One line and the end where there is none."""

    parsed: config_dict.ConfigDict | None = None

    def parse(self, argument: str) -> config_dict.ConfigDict:
        try:
            self.parsed = config_files.get_config(argument).lock()
        except ConfigError as error:  # absl would wrap it into three lines
            if any(name in sys.argv for name in ("--debug", "-debug", "--debug=true", "--debug=1")):  # not parsed yet
                traceback.print_exc()
            sys.exit(f"error: {error}")
        return self.parsed


_CONFIG = config_flags.DEFINE_config_file("config", None, "Name or file of a configuration, see configs/.")
_PARSER = _ConfigParser()
flags.FLAGS["config"].parser = _PARSER
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, rollouts.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells its life story at INFO
    try:
        if len(argv) > 1:
            raise ConfigError(f"{argv[1]!r} is no option; they are written --NAME=VALUE")
        if _CONFIG.value is None or _WORKDIR.value is None:
            raise ConfigError("--config=NAME and --workdir=FOLDER are both needed; --help says more")
        cfg, workdir = from_config_dict(_CONFIG.value), local_folder(_WORKDIR.value, "--workdir")
        compilation.keep_on_disk()
        run = {"rl": train, "sft": sft, "eval": evaluate_tasks}.get(cfg.method)
        if run is None:
            raise ConfigError(f"method = {cfg.method!r}; known: rl, sft, eval")
        run(cfg, workdir)
    except (*ERRORS, OSError) as error:
        if _DEBUG.value:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes from the last checkpoint")


def _leaves(config: Mapping, prefix: str = "") -> list[str]:
    """Dotted names of all leaves."""
    found = []
    for name, value in config.items():
        inner = isinstance(value, (Mapping, config_dict.ConfigDict))
        found += _leaves(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


def nearest_key(key: str, known: Sequence[str]) -> str:
    """Of dotted names the most similar: the same leaf elsewhere, else a leaf of the same part, else any."""
    part, _, leaf = key.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    inside = [name for name in known if part and name.rpartition(".")[0] == part]
    return difflib.get_close_matches(key, same or inside or known, n=1, cutoff=0.0)[0]


def _bad_value(error: flags.IllegalFlagValueError) -> str:
    """What to say of an option that is there, and whose value cannot be read."""
    match = re.fullmatch(r"flag --(config\.)?([\w.]+)=(.*?): .*", str(error), re.DOTALL)
    if match is None or not match[1] or _PARSER.parsed is None:
        return str(error)
    held = functools.reduce(operator.getitem, match[2].split("."), _PARSER.parsed)
    if isinstance(held, config_dict.ConfigDict):
        return f"config.{match[2]} holds {', '.join(held)}: set one of these"
    return f"config.{match[2]} = {match[3]!r}: {type(held).__name__} is needed"


def _unknown_key(argv: Sequence[str]) -> str | None:
    """What to say of the first `--config.KEY` that the configuration does not have."""
    if _PARSER.parsed is None:
        return None
    known = _leaves(_PARSER.parsed)
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        key = name.removeprefix("config.")
        if argument.startswith("--") and name in known:
            return f"unknown option --{name}; did you mean --config.{name}?"
        if argument.startswith("-") and name != key and not any(f"{leaf}.".startswith(f"{key}.") for leaf in known):
            return f"unknown key config.{key}; did you mean config.{nearest_key(key, known)}?"
    return None


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does it, but whatever is wrong is one line."""
    try:
        return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        sys.exit(f"error: {_bad_value(error)}")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {_unknown_key(argv) or (error.args[0] if error.args else error)}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
