"""The persistent compilation cache, whose unreadable entries are removed, and counts of compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
import sys
import warnings

import jax

from cgrpo_jax.workdir.places import cache_folder, expanded, writable

UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(?P<program>[^']+)'")

UNWRITABLE = "Error writing persistent compilation cache entry"


@dataclasses.dataclass
class Compilations:
    """Counts of this process."""

    programs: int = 0
    from_disk: int = 0  # of these, found in the cache on disk
    seconds: float = 0.0  # spent compiling or loading

    def __str__(self) -> str:
        return f"{self.programs} programs in {self.seconds:.1f} s, {self.from_disk} of them from the cache on disk"


@functools.cache
def watch() -> Compilations:
    """Counts from the first call on; each call returns the same object."""
    counts = Compilations()

    def count_hit(event: str, **_) -> None:
        counts.from_disk += event == "/jax/compilation_cache/cache_hits"

    def duration(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts.programs += 1
            counts.seconds += duration_secs

    jax.monitoring.register_event_listener(count_hit)
    jax.monitoring.register_event_duration_secs_listener(duration)
    return counts


def keep_on_disk() -> pathlib.Path | None:
    """Turns the persistent compilation cache on and returns its folder; None, with a warning, where none is writable.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. An entry
    that cannot be read (a run was killed while it wrote) is removed, so that the program compiled instead takes its
    place; jax alone would keep it for ever. Of the entries that cannot be written, only the first is reported.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR", "").strip()
    folder = writable(expanded(named)) if named else cache_folder("programs")
    if folder is None:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("always", message=UNREADABLE.pattern)  # every one, not only the first of each text
    warnings.filterwarnings("always", message=UNWRITABLE)
    show, told = warnings.showwarning, False

    def remove_unreadable(message, category, filename, lineno, file=None, line=None) -> None:
        nonlocal told
        found = UNREADABLE.match(str(message))
        if str(message).startswith(UNWRITABLE):
            if not told:
                print(f"compilation cache: {str(message).splitlines()[0][:300]}", file=sys.stderr)
            told = True
            return None
        if found is None:
            return show(message, category, filename, lineno, file, line)
        for entry in folder.glob(f"{found['program']}-*-cache"):
            entry.unlink(missing_ok=True)
        print(f"compilation cache: removed unreadable entries of {found['program']} in {folder}", file=sys.stderr)

    warnings.showwarning = remove_unreadable
    return folder
