"""How every verb begins: the run is opened, its workdir locked, its progress shown.

The first lines of the progress name versions, devices and memory, caches and the access to the hub; no value of a
secret.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import cast

import huggingface_hub
import jax

from cgrpo_jax.config import Config
from cgrpo_jax.process.hosts import Hosts
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.effects import without_effect
from cgrpo_jax.run.opening import open_run
from cgrpo_jax.run.resuming import model_contents
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.workdir.places import cache_root, exclusive
from cgrpo_jax.workdir.progress import Progress, Silence

GIB = 1 << 30


@contextlib.contextmanager
def begun(
    cfg: Config, workdir: pathlib.Path, hosts: Hosts, unit: str = "step"
) -> Iterator[tuple[Run, Progress | Silence]]:
    """Opens a run; its leader holds the lock of the workdir and shows the progress.

    Args:
      unit: what the progress counts.

    Raises:
      ConfigError, CheckpointError, MeshError, DataError, PromptError: all that is wrong, at once. ConfigError also
        where the hosts have other models or do not share the workdir.
      BusyError: another process works in the workdir.
    """
    run = open_run(cfg)
    hosts.check_alike(lambda: model_contents(run))  # each host loads its own part of the weights
    if not hosts.leader:
        hosts.check_folder(workdir)
        yield run, Silence(hosts.does)
        return
    with exclusive(workdir), Progress(0, run.cfg.train.steps, unit, hosts.does) as progress:
        hosts.check_folder(workdir)
        progress.log("\n".join(lines(run)))
        yield run, progress


def lines(run: Run) -> list[str]:
    """Four lines, and more of a model without a chat template and of options without effect; asks no network."""
    policy = run.policy
    versions = "  ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "transformers"))
    return [
        f"Python {platform.python_version()}  {versions}  on {_devices(run)}",
        f"model {policy.folder}  {policy.shape.layers} layers of width {policy.shape.width}  computed in "
        f"{run.learner.dtype}",
        *_ends(policy.tokenizer),
        f"caches {_caches()}  hub {_hub()}",
        *without_effect(run.cfg),
    ]


def _ends(tokenizer: Tokenizer) -> list[str]:
    """What ends a response, and that a model without a chat template may not know it."""
    tokens = map(repr, cast(list[str], tokenizer.hf.convert_ids_to_tokens(list(tokenizer.eos_ids))))
    lines = [f"a response ends at {', '.join([*tokens, *map(repr, tokenizer.stops)])}"]
    if tokenizer.plain:
        lines.append("the model has no chat template: prompts are plain text")
    if tokenizer.plain and not tokenizer.stops:
        lines[-1] += (
            ", and a base model may go on with the next question itself, whose answer would be graded; sampling.stop "
            "says at which texts a response ends"
        )
    return lines


def _devices(run: Run) -> str:
    first = run.mesh.local_devices[0]  # others are asked of their memory on their own hosts
    limit = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    memory = f"{limit / GIB:.1f} GiB each" if limit else f"{_host_memory():.1f} GiB of the host"
    return f"{run.mesh.size} x {first.device_kind} ({first.platform}), {memory}"


def _host_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _caches() -> str:
    programs = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None  # type: ignore[attr-defined]
    return f"{programs or 'none for programs'}, {cache_root()}"


def _hub() -> str:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "is not asked (HF_HUB_OFFLINE)"
    token = "with a token" if huggingface_hub.get_token() else "without a token"
    return f"{huggingface_hub.constants.ENDPOINT} {token}"
