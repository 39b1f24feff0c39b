"""The command line of a plan; `cgrpo_jax/plan.py` starts it."""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags

from cgrpo_jax.config import flags as command_line
from cgrpo_jax.config import from_config_dict
from cgrpo_jax.errors import ConfigError, UserError
from cgrpo_jax.planner import chips, making, report
from cgrpo_jax.workdir.places import local_folder
from cgrpo_jax.workdir.progress import Progress

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, f"What to compile for: {chips.known()}; or v4:2x2x4 and the like; or {chips.LOCAL}, this machine."
)
_ONLY = flags.DEFINE_list("only", [], "Kinds of programs, such as update,decode,prefill; none: all.")
_MOST = flags.DEFINE_bool("most", True, "Look for the most rows that fit: up to four more programs are compiled.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_HLO = flags.DEFINE_string("hlo", None, "Folder for the texts of the compiled programs.")
flags.adopt_module_key_flags(command_line)


def main(argv: list[str]) -> None:
    """Exit code: 0 all fits, 1 something does not, 2 no plan could be made."""
    try:
        if len(argv) > 1:
            raise ConfigError(f"{argv[1]!r} is no option; they are written --NAME=VALUE")
        if command_line.CONFIG.value is None or _TOPOLOGY.value is None:
            raise ConfigError("--config=NAME and --topology=NAME are both needed; --help says more")
        topology, cfg = chips.topology(_TOPOLOGY.value), from_config_dict(command_line.CONFIG.value)
        hlo = None if _HLO.value is None else local_folder(_HLO.value, "--hlo")
        if hlo is not None:
            hlo.mkdir(parents=True, exist_ok=True)
        with Progress(0, 1, "program") as progress:
            plan = making.make(cfg, topology, making.Wanted(tuple(_ONLY.value), _MOST.value, hlo), progress)
        print(report.text(plan))
        if _JSON.value is not None:
            made = json.dumps(report.as_json(plan), indent=1) + "\n"
            pathlib.Path(_JSON.value).expanduser().write_text(made, encoding="utf-8")
    except (UserError, OSError) as error:
        if command_line.DEBUG.value:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped")
    sys.exit(1 if plan.unfit else 0)


def start() -> None:
    """Parses the flags, makes the plan, prints it, and ends the process."""
    app.run(main, flags_parser=command_line.parse_flags)
