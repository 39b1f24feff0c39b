"""Weights from one form to another.

python -m cgrpo_jax.convert --from=WORKDIR --to=hf --out=FOLDER     # the newest checkpoint of a run
python -m cgrpo_jax.convert --from=HF_FOLDER --to=orbax --out=FOLDER
python -m cgrpo_jax.convert --from=ORBAX_FOLDER --to=hf --out=FOLDER --dtype=bfloat16
python -m cgrpo_jax.convert --from=WORKDIR --to=hf --out=FOLDER --push=OWNER/REPO --license=apache-2.0

--push also writes a model card from the run (README.md, curves.png) and uploads the folder to the Hugging Face hub, to
a private repository unless --public is said. With --dry-run the folder is written as it would go, and nothing is sent.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cgrpo_jax.errors import CheckpointError, HubError, UserError
from cgrpo_jax.model import hf, sharding
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.model.hf_config import config_from_hf
from cgrpo_jax.run.build import whole_mesh
from cgrpo_jax.run.folders import model_folder
from cgrpo_jax.run.models import check_frozen, initial_weights
from cgrpo_jax.sharing import card as model_card
from cgrpo_jax.sharing import hub
from cgrpo_jax.sharing.card import Card
from cgrpo_jax.workdir.checkpoints import read_meta, restore_params, save_params
from cgrpo_jax.workdir.places import expanded, local_folder


def checkpoint_step(folder: pathlib.Path, step: int | None) -> int:
    """The step of a workdir's checkpoint: this one, or the newest. Raises CheckpointError where it is not there."""
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(f"{folder}: no checkpoint{f' of step {step}' if steps else ''}; there: {steps or 'none'}")
    return steps[-1] if step is None else step


def load(source: str, step: int | None) -> tuple[Params, pathlib.Path]:
    """Parameters in the dtype they have on file, and the folder with their configuration and tokenizer."""
    if not source.strip():
        raise CheckpointError("--from is empty; name a folder or a hub id")
    mesh = whole_mesh()
    sharding_of = functools.partial(sharding.param_sharding, mesh)
    folder = expanded(source)
    if (folder / "checkpoints").is_dir():
        saved = folder / "checkpoints" / str(checkpoint_step(folder, step))
        try:
            params, meta = restore_params(saved, sharding_of), read_meta(saved)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --step=STEP takes another checkpoint of this run") from error
        return _with_frozen(params, meta, folder / "hf", mesh), folder / "hf"
    if (folder / "params").is_dir():
        return restore_params(folder, sharding_of), folder / "hf"
    folder = model_folder(source)
    return hf.load_params(folder, config_from_hf(folder), sharding_of), folder


def _with_frozen(params: Params, meta: Mapping[str, Any], side: pathlib.Path, mesh: Mesh) -> Params:
    """The parameters of a checkpoint with those that the run does not train, from where it began.

    Args:
      meta: of the checkpoint; side: the folder with the model's configuration.
    """
    if "frozen" not in meta:
        return params
    source, seed = meta["config"]["model"], meta["config"]["seed"]
    try:
        base = model_folder(source["path"], source["revision"])
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the run trains a part of it, and its checkpoints hold no other") from error
    trained = {sharding.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    seed = seed if source["random_init"] else None
    frozen = initial_weights(base, config_from_hf(side), mesh, seed, lambda path: path not in trained)
    check_frozen(source["path"], frozen, meta["frozen"])
    return sharding.joined(params, frozen)


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


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Where a model is pushed to, and what its card says beside the run."""

    repo: str  # OWNER/REPO of the hub
    license: str = model_card.UNKNOWN
    public: bool = False
    evaluated: pathlib.Path | None = None  # workdir of an evaluation
    dry_run: bool = False  # the folder is written as it would go, and nothing is sent


def card_of(workdir: pathlib.Path, step: int | None, sharing: Sharing) -> Card:
    """The card of what will be pushed, after all has been asked that can fail before the weights are read.

    Raises: HubError, CheckpointError, RunError, ReportError.
    """
    hub.check_name(sharing.repo)
    hub.check_license(sharing.license)
    if not (workdir / "checkpoints").is_dir():
        raise HubError("--push: --from=WORKDIR is needed, the run that the model card is written from")
    step = checkpoint_step(workdir, step)
    card = model_card.of_run(workdir, step, sharing.repo, sharing.license, sharing.evaluated)
    if not sharing.dry_run:
        hub.check_access(sharing.repo, sharing.public)
    return card


def share(
    source: str, out: str, sharing: Sharing, dtype: str = "keep", step: int | None = None, shard_gb: float = 5.0
) -> None:
    """Writes the newest checkpoint of a run with its card and pushes it; says what went, or would go.

    Raises: HubError, RunError, ReportError, and what `convert` raises; nothing was sent then.
    """
    folder = local_folder(out, "--out")
    hf.check_vacant(folder)
    card = card_of(expanded(source), step, sharing)
    convert(source, "hf", out, dtype, step, shard_gb)
    print(f"wrote {out}")
    if sharing.evaluated is not None:
        model_card.check_evaluated(sharing.evaluated, folder)
    card.write(folder)
    if sharing.license == model_card.UNKNOWN:
        print("the card says that the licence is unknown; --license=apache-2.0 would name one")
    if sharing.dry_run:
        for path in sorted(folder.iterdir()):
            print(f"{path.stat().st_size:>14,}  {path.name}")
        print(
            f"nothing was sent; without a dry run this is {sharing.repo}, {'public' if sharing.public else 'private'}"
        )
        return
    print(f"pushed to {hub.push(folder, sharing.repo, sharing.public, f'Written by cgrpo_jax from {folder.name}')}")


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
    parser.add_argument("--push", metavar="OWNER/REPO", help="of the Hugging Face hub, to upload the result to")
    parser.add_argument("--public", action="store_true", help="everyone may see what is pushed")
    parser.add_argument("--license", default=model_card.UNKNOWN, help="of the weights, for the card, as apache-2.0")
    parser.add_argument(
        "--evaluated", type=expanded, metavar="WORKDIR", help="of an evaluation whose table the card shows"
    )
    parser.add_argument("--dry-run", action="store_true", help="write what would be pushed, and send nothing")
    args = parser.parse_args()
    if args.push is None and (args.public or args.dry_run or args.evaluated or args.license != model_card.UNKNOWN):
        parser.error("--public, --license, --evaluated and --dry-run are for --push")
    if args.push is not None and args.to != "hf":
        parser.error("--push goes with --to=hf")
    absl.logging.set_verbosity(absl.logging.WARNING)
    try:
        if args.push is None:
            convert(args.source, args.to, args.out, args.dtype, args.step, args.shard_gb)
            print(f"wrote {args.out}")
        else:
            sharing = Sharing(args.push, args.license, args.public, args.evaluated, args.dry_run)
            share(args.source, args.out, sharing, args.dtype, args.step, args.shard_gb)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
