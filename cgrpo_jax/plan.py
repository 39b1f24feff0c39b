"""Tells whether a run fits TPUs that are not here, and how long it may take: compiles its programs, runs none.

    python -m cgrpo_jax.plan --config=tpu_v4 --topology=v4-32
    ... --config.sampler.kv_cache_mb=9000        # any leaf of the configuration can be set, as for training
    ... --only=update,decode --most=false        # two programs, without looking for the most rows that fit
    ... --json=plan.json --hlo=DIR               # the figures, and the texts of the compiled programs

Needs libtpu (pip install 'cgrpo_jax[tpu]'), no TPU, no weights, no tokenizer and no network: model.path is a folder
with a config.json, or the name of a model whose shape the package carries (cgrpo_jax/shapes). Exit code: 0 all fits,
1 something does not, 2 no plan could be made.
"""

import json
import pathlib
import sys

from absl import app, flags

from cgrpo_jax.config import flags as command_line
from cgrpo_jax.config import from_config_dict
from cgrpo_jax.errors import ConfigError, UserError
from cgrpo_jax.planner import chips
from cgrpo_jax.workdir.places import local_folder

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, f"What to compile for: {chips.known()}; or v4:2x2x4 and the like; or {chips.HERE}, this machine."
)
_ONLY = flags.DEFINE_list("only", [], "Kinds of programs, such as update,decode,prefill; none: all.")
_MOST = flags.DEFINE_bool("most", True, "Look for the most rows that fit: up to four more programs are compiled.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_HLO = flags.DEFINE_string("hlo", None, "Folder for the texts of the compiled programs.")


def asked_topology(argv: list[str]) -> str:
    """The value of `--topology`, before the flags are parsed: parsing runs the configuration, which may import jax."""
    for index, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "topology":
            return value if equals else "".join(argv[index + 1 : index + 2])
    return ""


def main(argv: list[str]) -> None:
    """Prints a plan. Exit code: 0 all fits, 1 something does not, 2 no plan could be made."""
    from cgrpo_jax.planner import making, printed  # import jax, which reads what `prepare` sets
    from cgrpo_jax.workdir.progress import Progress

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
            plan = making.make(cfg, topology, progress, _ONLY.value, _MOST.value, hlo)
        print(printed.text(plan))
        if _JSON.value is not None:
            made = json.dumps(printed.as_json(plan), indent=1) + "\n"
            pathlib.Path(_JSON.value).expanduser().write_text(made, encoding="utf-8")
    except (UserError, OSError) as error:
        if command_line.DEBUG.value:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped")
    sys.exit(1 if plan.unfit else 0)


if __name__ == "__main__":
    chips.prepare(asked_topology(sys.argv))
    app.run(main, flags_parser=command_line.parse_flags)
