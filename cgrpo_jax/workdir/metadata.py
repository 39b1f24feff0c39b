"""What stands beside the arrays of a checkpoint, and what vouches for it: a digest over all of it.

Where the run stood, its configuration, its metrics and the digest of each array are one JSON object. A bit of it that
changes, or a folder that stands under the number of another step, is noticed where it is read.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from cgrpo_jax.errors import CheckpointError

SEAL = "seal"


def _digest(meta: Mapping[str, Any]) -> str:
    """32 hex digits over names and values, whatever order they stand in."""
    text = json.dumps({name: value for name, value in meta.items() if name != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back, with the digest over it."""
    plain = json.loads(json.dumps(meta))
    return plain | {SEAL: _digest(plain)}


def write_meta(folder: pathlib.Path, meta: Mapping[str, Any]) -> None:
    """Into a folder of arrays that is no step of a run, laid out as there."""
    (folder / "meta").mkdir()
    (folder / "meta" / "metadata").write_text(json.dumps(sealed(meta)), encoding="utf-8")


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The metadata of a checkpoint folder.

    Raises:
      CheckpointError: it cannot be read, is not what was written, is that of another step, or of a version that wrote
        no digests.
    """
    path = folder / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read ({line})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("digests"), dict) or SEAL not in meta:
        raise CheckpointError(f"{path}: no digests in it, so nothing can vouch for the checkpoint")
    if meta[SEAL] != _digest(meta):
        raise CheckpointError(f"{path}: not what was saved (its digest differs)")
    if str(meta.get("step", folder.name)) != folder.name:
        raise CheckpointError(f"{folder}: holds step {meta['step']}; was the folder renamed?")
    return meta
