"""The flag `--config`, for every command that takes a configuration: named or a file, any leaf of it can be set."""

from __future__ import annotations

import functools
import operator
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import config_dict, config_flags

from cgrpo_jax.config import files as config_files
from cgrpo_jax.config import keys, options
from cgrpo_jax.config.names import suggested, unknown
from cgrpo_jax.errors import ConfigError

COMMANDS = """Train the embedded model, in about two minutes on two cores:
    python -m cgrpo_jax.main --config=quickstart --workdir=runs/quickstart
Train a model of yours on your questions (.jsonl with question and answer, or a hub id):
    python -m cgrpo_jax.main --config=smollm2_cpu --workdir=runs/own --config.model.path=MODEL --config.data.source=DATA
cgrpo_jax.plan, .report, .eval_report, .convert and .bench are the other commands; each says more under --help."""
HELP = {"-h", "-help", "--help"}
WIDTH = 100


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


CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"Name of a configuration ({', '.join(config_files.names())}), NAME:ARGUMENT, or a .py file."
)
_PARSER = _ConfigParser()
flags.FLAGS["config"].parser = _PARSER
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
KEY = f"Sets any leaf of the configuration, as --config.train.steps=12; all are in {options.__file__}."


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
    known = keys()
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        key = name.removeprefix("config.")
        if name == key and argument.startswith("--") and name not in flags.FLAGS:
            if name in known:
                return f"unknown option --{name}; did you mean --config.{name}?"
            if meant := _flags_of(suggested(name, known)):
                return f"unknown option --{name}; did you mean {meant}?"
        if argument.startswith("-") and name != key and not any(f"{leaf}.".startswith(f"{key}.") for leaf in known):
            return f"unknown key config.{key}; {unknown(key, known)}"
    return None


def _flags_of(names: Sequence[str]) -> str:
    """Keys of the configuration as options of a command, and those as they are."""
    return " or ".join(name if name.startswith("--") else f"--config.{name}" for name in names)


def help_text(program: str) -> str:
    """What --help says of a command: its docstring, then its options.

    Args:
      program: `sys.argv[0]`, by which absl knows the module that was started.
    """
    said = {"--config.KEY=VALUE": KEY}
    for flag in flags.FLAGS.get_key_flags_for_module(program):
        value = "" if flag.boolean else f"={flag.name.upper()}"
        default = f" Default: {flag.default_as_str}." if flag.default not in (None, False, []) else ""
        name = f"--[no]{flag.name}" if flag.boolean and flag.default else f"--{flag.name}"
        said[f"{name}{value}"] = f"{flag.help or ''}{'' if flag.boolean else default}"
    gap = max(map(len, said)) + 4
    listed = [
        textwrap.fill(text, WIDTH, initial_indent=f"  {name}".ljust(gap), subsequent_indent=" " * gap)
        for name, text in sorted(said.items())
    ]
    return "\n".join([(sys.modules["__main__"].__doc__ or "").strip(), "", "Options:", *listed])


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does it, but --help reads like help, and whatever is wrong is one line."""
    if HELP & set(argv):
        print(help_text(argv[0]))
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        sys.exit(f"error: {_bad_value(error)}")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {_unknown_key(argv) or (error.args[0] if error.args else error)}")
