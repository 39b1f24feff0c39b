"""Where the files of a model are: a local Hugging Face folder, one from the hub, or one that the package carries."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from typing import Any

import huggingface_hub

from cgrpo_jax.config.options import ModelSource
from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.model.hf_config import read_json, write_json
from cgrpo_jax.workdir.places import cache_folder, expanded

PACKAGE = "package://"


def _workdir_of(folder: pathlib.Path) -> pathlib.Path | None:
    """The workdir or Orbax folder that a folder is or that it lies in as a checkpoint; None for every other folder."""
    if any(folder.glob("*.safetensors")):
        return None
    if folder.name.isdigit() and folder.parent.name == "checkpoints":
        return folder.parent.parent
    if folder.name == "checkpoints":
        return folder.parent
    return folder if (folder / "checkpoints").is_dir() or (folder / "params").is_dir() else None


def model_folder(path: str, revision: str = "main", key: str = "model.path") -> pathlib.Path:
    """The Hugging Face folder of a path, a hub id or `package://NAME`. Only files that hold no code are downloaded.

    Args:
      key: the option that holds `path`, which an error names.

    Raises:
      CheckpointError: there is no such folder, it holds a run's checkpoints instead, or the hub does not give it.
    """
    if path.startswith(PACKAGE):
        return pathlib.Path(__file__).parents[1] / path.removeprefix(PACKAGE)
    folder = expanded(path)
    if path.strip() and folder.is_dir():
        if run := _workdir_of(folder):
            raise CheckpointError(
                f"{key} = {path!r} is of a run or of Orbax, not a Hugging Face folder: "
                f"python -m cgrpo_jax.convert --from={run} --to=hf --out={run}_model writes one"
            )
        return folder.absolute()
    if not path.strip() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise CheckpointError(
            f"{key} = {path!r}: no such folder; give a Hugging Face folder or a hub id "
            f"(--config.{key}={PACKAGE}quickstart is the embedded model)"
        )
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise CheckpointError(f"{key} = {path!r}: no such folder, and not to be had from the hub ({line})") from error


def shape_folder(path: str, key: str = "model.path") -> pathlib.Path:
    """A folder with the `config.json` of the model that an option such as `model.path` names; the hub is not asked.

    Raises:
      CheckpointError: neither a folder nor the name of a model whose shape the package carries; names those.
    """
    if path.startswith(PACKAGE) or (path.strip() and expanded(path).is_dir()):
        return model_folder(path, key=key)
    shapes = pathlib.Path(__file__).parents[1] / "shapes"
    name = re.sub(r"[-.]", "_", path.rpartition("/")[2].lower())
    name = re.sub(r"_(base|instruct|\d{4})", "", name)
    if name and (shapes / name / "config.json").is_file():
        return shapes / name
    carried = ", ".join(sorted(folder.name for folder in shapes.iterdir()))
    raise CheckpointError(
        f"{key} = {path!r}: no such folder, and no shape of that name; give a folder with a config.json, or one "
        f"of {carried}"
    )


def widened(folder: pathlib.Path, source: ModelSource) -> pathlib.Path:
    """A model's folder whose `config.json` has the rope base and the window that the options ask for.

    Where they ask for none it is `folder` itself. Else it is a folder in the cache with links to the files and a
    `config.json` of its own, so that training, resuming, evaluation and export read the same model. Its name is a
    digest of the content.

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
