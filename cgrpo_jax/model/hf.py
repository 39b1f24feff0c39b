"""Reads and writes Hugging Face folders: safetensors <-> parameters.

The mapping is one table. Every parameter has a row, every tensor of the folder is used exactly once, and
shapes are compared before anything is read. Only safetensors: no pickle, no code from a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cgrpo_jax.errors import CheckpointError
from cgrpo_jax.model.decoder import ModelConfig, Params, init_params
from cgrpo_jax.model.hf_config import read_json, write_json
from cgrpo_jax.model.sharding import Which, every_leaf, part_of, path_of

# Path of ours -> Hugging Face name. Shapes agree: linear weights are [out, in] here as there.
TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attn/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attn/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attn/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attn/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attn/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
}
# Buffers some exporters write; they hold no weights.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
# Everything beside the weights that makes the folder whole: copied as it is.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

GENERIC = "PreTrainedTokenizerFast"  # known to 4 and 5; 5 itself writes TokenizersBackend, which 4 has not
# What transformers notes of the folders of whoever saved a checkpoint.
WHERE_IT_LAY = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")


def abstract_params(cfg: ModelConfig, dtype: DTypeLike = np.float32) -> Params:
    """Shapes and dtypes of the parameters, without any memory."""
    tree = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


@dataclasses.dataclass(frozen=True)
class Source:
    """The Hugging Face tensors of one parameter: one tensor, or one of each layer."""

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]  # of each tensor, as it is on file


def sources(cfg: ModelConfig) -> dict[str, Source]:
    """The whole mapping of a model: parameter path -> tensors."""
    table: dict[str, Source] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg)):
        path = path_of(key_path)
        if path not in TENSORS:
            raise CheckpointError(f"parameter {path!r} has no row in the mapping")
        stacked = path.startswith("layers/")
        names = tuple(TENSORS[path].format(layer) for layer in range(cfg.layers if stacked else 1))
        shape = leaf.shape[1:] if stacked else leaf.shape
        table[path] = Source(names, stacked, shape)
    return table


class TensorFiles:
    """The open safetensors files of a folder, single or sharded, by tensor name."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map is no table from tensors to files")
            names = sorted(set(weight_map.values()))
            if any(pathlib.PurePath(name).name != name for name in names):
                raise CheckpointError(f"{index}: weight_map points outside the folder")
        else:
            names = ["model.safetensors"]
        self.files: dict[str, Any] = {}
        for name in names:
            path = folder / name
            if not path.exists():
                raise CheckpointError(f"{path}: no such file; only safetensors weights are read")
            try:
                opened = stack.enter_context(safe_open(path, "np"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
            for tensor in opened.keys():  # noqa: SIM118, a file handle, not a dict
                if tensor in self.files:
                    raise CheckpointError(f"{path}: tensor {tensor!r} is in two files")
                self.files[tensor] = opened

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.files[name].get_slice(name)[index]

    def dtype(self, names: Sequence[str]) -> np.dtype:
        """The dtype that holds all of these tensors exactly."""
        return np.result_type(*{self.read(name, (slice(0, 1),) * len(self.shape(name))).dtype for name in names})


def check_tensors(folder: pathlib.Path, cfg: ModelConfig, files: TensorFiles, table: dict[str, Source]) -> None:
    """Checks that every tensor is used once and has the right shape; the error names the tensor."""
    wanted = {name: source.shape for source in table.values() for name in source.names}
    present = {name for name in files.files if not name.endswith(IGNORED_SUFFIXES)}
    if cfg.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= present:
        whole = (slice(None), slice(None))
        embedding = files.read("model.embed_tokens.weight", whole)
        if not np.array_equal(files.read("lm_head.weight", whole), embedding):
            raise CheckpointError(f"{folder}: embeddings are tied, yet lm_head.weight differs from the embedding")
        present.remove("lm_head.weight")
    if missing := sorted(wanted.keys() - present):
        raise CheckpointError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(present - wanted.keys()):
        raise CheckpointError(f"{folder}: tensor {extra[0]!r} is not part of {cfg.family} ({len(extra)} in all)")
    for name, shape in wanted.items():
        if files.shape(name) != shape:
            raise CheckpointError(f"{folder}: tensor {name!r} has shape {files.shape(name)}, config.json says {shape}")


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def check_params(cfg: ModelConfig, params: Params) -> None:
    """Compares paths and shapes of parameters with what the configuration asks for."""
    wanted, found = _shapes(abstract_params(cfg)), _shapes(params)
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            raise CheckpointError(f"parameter {path!r}: shape {found.get(path)}, config.json says {wanted.get(path)}")


def _reader(files: TensorFiles, source: Source, dtype: DTypeLike) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """A callback that reads one device's part of one parameter, and nothing else, from the files."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only asked for where nothing is addressable
        if not source.stacked:
            return files.read(source.names[0], index).astype(dtype, copy=False)
        return np.stack([files.read(name, index[1:]).astype(dtype, copy=False) for name in source.names[index[0]]])

    return read


def load_params(
    folder: str | os.PathLike,
    cfg: ModelConfig,
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
    dtype: DTypeLike | None = None,
    chosen: Which = every_leaf,
) -> Params:
    """Streams the weights of a folder into (sharded) arrays, one tensor at a time.

    Args:
      sharding_of: (path, shape) -> sharding; each device receives only its own part.
      dtype: of the result; None keeps the dtype on file.
      chosen: the parameters that are read; the others are left out of the result.

    Raises:
      CheckpointError: a missing or extra tensor, a wrong shape, a truncated file.
    """
    folder, table = pathlib.Path(folder), sources(cfg)
    with contextlib.ExitStack() as stack:
        files = TensorFiles(folder, stack)
        check_tensors(folder, cfg, files, table)

        def load(key_path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            path = path_of(key_path)
            read = _reader(files, table[path], files.dtype(table[path].names) if dtype is None else dtype)
            return jax.make_array_from_callback(leaf.shape, sharding_of(path, leaf.shape), read)

        return jax.tree_util.tree_map_with_path(load, part_of(abstract_params(cfg), chosen))


def hf_tensors(cfg: ModelConfig, params: Params, dtype: DTypeLike | None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every Hugging Face tensor, fetched from the devices one layer at a time."""
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, source in sources(cfg).items():
        for layer, name in enumerate(source.names):
            part = np.asarray(leaves[path][layer] if source.stacked else leaves[path])
            yield name, part.astype(dtype or part.dtype)


def check_vacant(out: pathlib.Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another --out or remove it")


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder that appears under its name only when the block succeeds; refuses to overwrite."""
    out = pathlib.Path(out)
    check_vacant(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_side_files(source: str | os.PathLike, out: pathlib.Path) -> None:
    """Copies configuration, tokenizer and chat template byte for byte."""
    for name in SIDE_FILES:
        if (file := pathlib.Path(source) / name).exists():
            shutil.copyfile(file, out / name)


def both_rope_forms(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the form of transformers 4 beside `rope_parameters`, which only 5 reads.

    What is there already stays. The older form alone is read by both.
    """
    rope, old = dict(raw.get("rope_parameters") or {}), raw.get("rope_scaling") or {}
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type") or rope.get("type") or "default"
    added: dict[str, Any] = {}
    if raw.get("rope_theta") is None and (theta := old.get("rope_theta", theta)) is not None:
        added["rope_theta"] = theta
    if kind != "default" and not old:
        added["rope_scaling"] = {"rope_type": kind} | rope
    return {**raw, **added}


def both_tokenizer_forms(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` under names that both know, with no inputs that a decoder does not take.

    In 4 the generic class makes `token_type_ids` unless it is told not to, and `generate` refuses them.
    """
    raw = dict(raw)
    if raw.get("tokenizer_class") == "TokenizersBackend":
        raw["tokenizer_class"] = GENERIC
    if raw.get("tokenizer_class") == GENERIC and not raw.get("model_input_names"):
        raw["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(raw.get("extra_special_tokens"), list):  # a dict of named ones in 4
        raw["additional_special_tokens"] = raw.pop("extra_special_tokens")
    return raw


def _mend_side_files(folder: pathlib.Path) -> None:
    """Rewrites what the oldest `transformers` admitted (4.56) would not read as the newest does, in an export alone.

    What names somebody's folder (WHERE_IT_LAY) goes, too: nothing reads it. Other files stay byte for byte.
    """
    forms: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "config.json": both_rope_forms,
        "tokenizer_config.json": both_tokenizer_forms,
        "generation_config.json": dict,
    }
    for name, both_forms in forms.items():
        path = folder / name
        if not path.exists():
            continue
        raw = read_json(path)
        mended = {key: value for key, value in both_forms(raw).items() if key not in WHERE_IT_LAY}
        if mended != raw:
            write_json(path, mended)


def _shards(tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors, in order, into dicts of at most `shard_bytes` (a larger tensor stands alone)."""
    shard: dict[str, np.ndarray] = {}
    room = shard_bytes
    for name, array in tensors:
        if shard and array.nbytes > room:
            yield shard
            shard, room = {}, shard_bytes
        shard[name] = array
        room -= array.nbytes
    yield shard


def _readable(file: pathlib.Path) -> None:
    """As any new file by the umask: safetensors makes its own for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def save_hf(
    out: str | os.PathLike,
    cfg: ModelConfig,
    params: Params,
    side_folder: str | os.PathLike,
    dtype: DTypeLike | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `transformers` opens, from 4.56 on: sharded safetensors, config, tokenizer, chat template.

    Args:
      side_folder: where configuration, tokenizer and chat template come from.
      dtype: of the tensors; None keeps that of the parameters.
    """
    with whole_folder(out) as folder:
        copy_side_files(side_folder, folder)
        _mend_side_files(folder)
        sizes: list[dict[str, int]] = []  # tensor name -> bytes, a dict per file
        dtype_on_file = ""  # of the first tensor, the embedding
        for shard in _shards(hf_tensors(cfg, params, dtype), shard_bytes):
            save_file(shard, folder / f"{len(sizes)}.safetensors", metadata={"format": "pt"})
            _readable(folder / f"{len(sizes)}.safetensors")
            sizes.append({name: array.nbytes for name, array in shard.items()})
            dtype_on_file = dtype_on_file or str(next(iter(shard.values())).dtype)
        if len(sizes) == 1:
            (folder / "0.safetensors").rename(folder / "model.safetensors")
        else:
            files = [f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))]
            for i, file in enumerate(files):
                (folder / f"{i}.safetensors").rename(folder / file)
            weight_map = {name: file for file, names in zip(files, sizes, strict=True) for name in names}
            total = sum(sum(names.values()) for names in sizes)
            write_json(
                folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        raw = read_json(folder / "config.json")
        raw.pop("torch_dtype", None)
        write_json(folder / "config.json", raw | {"dtype": dtype_on_file})
