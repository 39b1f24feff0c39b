"""Trains as a configuration file says; the same command on the same workdir resumes.

    python -m cgrpo_jax.main --config=quickstart --workdir=runs/quickstart

--config is the name of a configuration that the package carries, or a file: --config=configs/quickstart.py. Any leaf
of it can be set: --config.train.steps=12. Some take an argument: --config=quickstart:dr_grpo. --preflight runs the
longest case first, so that what does not fit fails in the beginning (cgrpo_jax.plan tells it without the machine).
"""

from cgrpo_jax.errors import ConfigError, UserError
from cgrpo_jax.process import stopping

if __name__ == "__main__":
    stopping.for_this_process()  # before the imports, which take seconds: a Ctrl-C in them would be lost

import errno
import pathlib
import sys
import traceback
from collections.abc import Callable

import jax
import jaxlib
from absl import app, flags, logging

from cgrpo_jax.config import Config, from_config_dict, public
from cgrpo_jax.config import flags as command_line
from cgrpo_jax.evaluating import evaluate_tasks
from cgrpo_jax.generating import generate
from cgrpo_jax.planner.ahead import preflight
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.process.pod import joined
from cgrpo_jax.run.opening import open_run
from cgrpo_jax.training import train
from cgrpo_jax.workdir import compilation
from cgrpo_jax.workdir.changes import files_digest, flat
from cgrpo_jax.workdir.places import local_folder

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, rollouts.")
_PREFLIGHT = flags.DEFINE_bool(
    "preflight", False, "First run the longest case of every program on zeros: what does not fit fails at once."
)
_HOSTS = flags.DEFINE_string(
    "hosts",
    "",
    "ADDRESS:PORT,COUNT,INDEX of a run of several hosts: where its first host listens, how many there are, and which "
    "of them this one is, from 0. Not needed on the hosts of a TPU slice, where JAX finds all three.",
)
flags.adopt_module_key_flags(command_line)


def unforeseen(error: Exception, workdir: str) -> str:
    """What to say of an error that no message was written for: what, where, the mend. Its traceback goes to a file."""
    frames, folder = traceback.extract_tb(error.__traceback__), pathlib.Path(workdir).expanduser()
    own = [frame for frame in frames if frame.filename.startswith(str(pathlib.Path(__file__).parent))] or frames
    text = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {text} ({pathlib.Path(own[-1].filename).name}, line {own[-1].lineno})"
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        what += "; lower sampler.kv_cache_mb or train.micro_batch, --preflight says early what fits"
    if not workdir.strip() or not folder.is_dir():
        return f"{what}; --debug shows the traceback"
    path = folder / "traceback.txt"
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{what}; the traceback is in {path}"


def facts(cfg: Config) -> dict[str, str]:
    """What the hosts of a run must have alike, as name -> value or digest."""
    folder = pathlib.Path(__file__).parent
    code = files_digest(path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".json"))
    settings = {f"--config.{key}": str(value) for key, value in flat(public(cfg)).items()}
    return {"code of cgrpo_jax": code, "jax": jax.__version__, "jaxlib": jaxlib.__version__} | settings


def _show(hosts: Hosts) -> None:
    """Under --debug, shows the traceback of the error that is being handled: raises it again where one host runs."""
    if command_line.DEBUG.value and hosts is ONE_HOST:
        raise
    if command_line.DEBUG.value:
        traceback.print_exc()


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells its life story at INFO
    if len(sys.argv) == 1:
        sys.exit(f"error: --config and --workdir are both needed\n{command_line.COMMANDS}")
    hosts = ONE_HOST
    try:
        if len(argv) > 1:
            raise ConfigError(f"{argv[1]!r} is no option; they are written --NAME=VALUE")
        if command_line.CONFIG.value is None or _WORKDIR.value is None:
            raise ConfigError("--config=NAME and --workdir=FOLDER are both needed; --help says more")
        cfg, workdir = from_config_dict(command_line.CONFIG.value), local_folder(_WORKDIR.value, "--workdir")
        stopping.look()
        compilation.keep_on_disk()
        verbs: dict[str, Callable[..., None]] = {"generate": generate, "eval": evaluate_tasks}
        verbs |= dict.fromkeys(("rl", "sft"), train)
        if cfg.method not in verbs:
            raise ConfigError(f"method = {cfg.method!r}; known: {', '.join(verbs)}")
        hosts = joined(_HOSTS.value)
        hosts.check_alike(lambda: facts(cfg))
        if _PREFLIGHT.value:
            preflight(open_run(cfg), print if hosts.leader else lambda line: None)
        verbs[cfg.method](cfg, workdir, hosts)
        hosts.part()
    except (UserError, OSError) as error:
        _show(hosts)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        hosts.leave(1, f"error: {error}{'; make room on that disk, and the same command goes on' if full else ''}")
    except Exception as error:
        _show(hosts)
        said = f"error: {unforeseen(error, _WORKDIR.value or '')}"
        hosts.leave(1, said, by_device=isinstance(error, jax.errors.JaxRuntimeError))
    except KeyboardInterrupt as stopped:
        hosts.leave(stopping.exit_code(), str(stopped) or "stopped before it began; the workdir is as it was")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
