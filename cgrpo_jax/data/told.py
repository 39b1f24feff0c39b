"""What of a run's settings others may be told, in a card, a report or a tracker. `config.json` alone holds all.

Of a local path that is its last part: who works where is nobody's business. Where a critic's server is, is not told.
"""

from __future__ import annotations

import pathlib
import re
import zlib
from collections.abc import Mapping
from typing import Any

from cgrpo_jax.data.files import local_file

PRIVATE = ("api.base_url", "api.key_variable")
# Hub ids or local paths; NAME=PATH, with commas between them, in eval.tasks; of api.model what a server calls it.
PLACES = ("model.path", "local.path", "data.source", "eval.source", "eval.tasks", "api.model")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_id(place: str) -> str | None:
    """`OWNER/NAME` of a hub id, perhaps with `:CONFIGURATION`; None for a local path and all else."""
    name = place.partition(":")[0]
    local = not HUB_ID.fullmatch(name) or local_file(name) is not None or pathlib.Path(name).expanduser().exists()
    return None if local else name


def public_name(key: str, value: str, marked: bool = False) -> str:
    """The value of a setting, without the folders of a local path.

    Args:
      marked: with a checksum of the whole path, so that two that differ are not taken for one.
    """
    if key not in PLACES:
        return value
    if key != "eval.tasks":
        return _last(value, marked)
    named = [part.partition("=") for part in value.split(",")]
    return ",".join(f"{name}{equals}{_last(path, marked)}" for name, equals, path in named)


def _last(path: str, marked: bool) -> str:
    if hub_id(path) or "/" not in path or re.match(r"(package|https?)://", path):
        return path
    return pathlib.PurePath(path).name + (f" #{zlib.crc32(path.encode()):08x}" if marked else "")


def for_others(config: Mapping[str, Any], marked: bool = False, prefix: str = "") -> dict[str, Any]:
    """The settings that others are told: a tree of them, or dotted names with their values; as it is given."""
    said: dict[str, Any] = {}
    for name, value in config.items():
        key = prefix + name
        if isinstance(value, Mapping):
            said[name] = for_others(value, marked, f"{key}.")
        elif key not in PRIVATE:
            said[name] = public_name(key, value, marked) if isinstance(value, str) else value
    return said
