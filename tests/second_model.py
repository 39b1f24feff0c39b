"""A second checkpoint for tests: the embedded model with its ids in another order, so that it writes the same texts."""

import json
import shutil

import numpy as np
from conftest import QUICKSTART
from safetensors.numpy import load_file, save_file


def write_twin(folder, layers=3):
    """The same texts under other ids; with fewer layers another, smaller model."""
    shutil.copytree(QUICKSTART, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab, first = content["model"]["vocab"], len(content["added_tokens"])
    order = np.concatenate([np.arange(first), first + np.random.default_rng(0).permutation(len(vocab) - first)])
    content["model"]["vocab"] = {token: int(order[i]) for token, i in vocab.items()}
    path.write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors")
    for name, array in tensors.items():
        if len(array) == len(vocab):
            tensors[name] = np.empty_like(array)
            tensors[name][order] = array
    kept = {name: a for name, a in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
