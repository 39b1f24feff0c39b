"""Another rope base and another window than a checkpoint's `config.json` has, as LUFFY gives Qwen2.5-Math-7B."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from cgrpo_jax.model.hf_config import CheckpointError, read_json, write_json
from cgrpo_jax.options import ModelSource
from cgrpo_jax.workdir.places import cache_folder


def widened(folder: pathlib.Path, source: ModelSource) -> pathlib.Path:
    """The folder itself where nothing else is asked for; else one of links to its files, with its own `config.json`.

    So all that reads the folder agrees: training, resuming, evaluation, and an export. It lies in the cache, and its
    name follows from the content.

    Raises:
      CheckpointError: the configuration scales its positions otherwise, or the cache cannot be written.
    """
    asked = {"rope_theta": source.rope_theta, "max_position_embeddings": source.max_positions}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value}
    if not changes:
        return folder
    raw = read_json(folder / "config.json")
    rope = raw.get("rope_parameters") or {}  # the form of transformers 5
    if raw.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{folder}: model.rope_theta and model.max_positions replace no scaling of positions")
    if rope and source.rope_theta:
        changes["rope_parameters"] = rope | {"rope_theta": source.rope_theta}
    cache, files = cache_folder("widened"), sorted(path for path in folder.iterdir() if path.is_file())
    if cache is None:
        raise CheckpointError("model.rope_theta and model.max_positions need a cache folder that can be written")
    told = json.dumps([raw | changes, [str(path.resolve()) for path in files]], sort_keys=True)
    made = cache / hashlib.sha256(told.encode()).hexdigest()[:16] / folder.name
    if not made.exists():
        partial = made.with_name(f"{os.getpid()}.partial")
        partial.mkdir(parents=True)
        for path in files:
            if path.name != "config.json":
                (partial / path.name).symlink_to(path.resolve())
        write_json(partial / "config.json", raw | changes)
        partial.rename(made)
    return made
