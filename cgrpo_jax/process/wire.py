"""Plain data as bytes, for the other hosts of a run."""

from __future__ import annotations

import io
import pickle
from typing import Any

_NUMPY = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}
_BUILTINS = {"set", "frozenset", "complex", "slice", "range", "bytearray"}


class _Plain(pickle.Unpickler):
    """Makes records of this package, numpy arrays and Python's containers. A pickle of anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = module.startswith("cgrpo_jax.") and "." not in name
        known |= module.split(".")[0] == "numpy" and name in _NUMPY
        known |= module == "builtins" and name in _BUILTINS
        if not known:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        found = super().find_class(module, name)
        if module.startswith("cgrpo_jax.") and not isinstance(found, type):
            raise pickle.UnpicklingError(f"{module}.{name} is no record")
        return found


def packed(value: Any) -> bytes:
    """The bytes of a value; see `unpacked`."""
    return pickle.dumps(value, protocol=5)


def unpacked(data: bytes) -> Any:
    """The value of these bytes. Raises pickle.UnpicklingError where they hold anything but plain data."""
    return _Plain(io.BytesIO(data)).load()
