"""Weights from one form to another.

python -m cgrpo_jax.convert --from=WORKDIR --to=hf --out=FOLDER     # the newest checkpoint of a run
python -m cgrpo_jax.convert --from=HF_FOLDER --to=orbax --out=FOLDER
python -m cgrpo_jax.convert --from=ORBAX_FOLDER --to=hf --out=FOLDER --dtype=bfloat16
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys

import absl.logging
import jax
import jax.numpy as jnp

from cgrpo_jax.build import model_folder, whole_mesh
from cgrpo_jax.config import ConfigError
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.model.hf_config import CheckpointError, config_from_hf
from cgrpo_jax.workdir.checkpoints import restore_params, save_params
from cgrpo_jax.workdir.places import expanded, local_folder


def load(source: str, step: int | None) -> tuple[Params, pathlib.Path]:
    """Parameters in the dtype they have on file, and the folder with their configuration and tokenizer."""
    if not source.strip():
        raise CheckpointError("--from is empty; name a folder or a hub id")
    mesh = whole_mesh()
    sharding_of = functools.partial(sharding.param_sharding, mesh)
    folder = expanded(source)
    if (folder / "checkpoints").is_dir():
        steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(
                f"{folder}: no checkpoint{f' of step {step}' if steps else ''}; there: {steps or 'none'}"
            )
        chosen = steps[-1] if step is None else step
        return restore_params(folder / "checkpoints" / str(chosen), sharding_of), folder / "hf"
    if (folder / "params").is_dir():
        return restore_params(folder, sharding_of), folder / "hf"
    folder = model_folder(source)
    return hf.load_params(folder, config_from_hf(folder), sharding_of), folder


def convert(
    source: str, to: str, out: str, dtype: str = "keep", step: int | None = None, shard_gb: float = 5.0
) -> None:
    """Writes `out` whole or not at all.

    Raises:
      CheckpointError: the source cannot be read, does not match its configuration, or `out` exists already.
    """
    out = str(local_folder(out, "--out"))
    hf.check_vacant(pathlib.Path(out))
    params, side = load(source, step)
    cfg = config_from_hf(side)
    hf.check_params(cfg, params)
    target = None if dtype == "keep" else jnp.dtype(dtype)
    if to == "hf":
        hf.save_hf(out, cfg, params, side, target, int(shard_gb * 1e9))
        return
    with hf.whole_folder(out) as folder:
        (folder / "hf").mkdir()
        hf.copy_side_files(side, folder / "hf")
        cast = params if target is None else jax.tree.map(lambda x: x.astype(target), params)
        save_params(folder, cast)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cgrpo_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="source", required=True, help="Hugging Face folder, hub id, Orbax folder or workdir"
    )
    parser.add_argument("--to", required=True, choices=["hf", "orbax"])
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--dtype", default="keep", choices=["keep", "float32", "bfloat16"], help="of the result")
    parser.add_argument("--step", type=int, help="of a workdir; default: the newest")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="largest safetensors file")
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.WARNING)
    try:
        convert(args.source, args.to, args.out, args.dtype, args.step, args.shard_gb)
    except (CheckpointError, ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
