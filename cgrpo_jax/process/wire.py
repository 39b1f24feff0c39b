"""Plain data as bytes, for the other hosts of a run."""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
from typing import Any

_NUMPY = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}


class _Plain(pickle.Unpickler):
    """Reads Python's containers, numpy arrays and this package's records (named tuples, dataclasses, enumerations).

    A pickle of anything else could run code of its own.
    """

    def find_class(self, module: str, name: str) -> Any:
        own = module.startswith("cgrpo_jax.") and "." not in name
        if not own and not (module.split(".")[0] == "numpy" and name in _NUMPY):
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        found = super().find_class(module, name)
        record = isinstance(found, type) and (issubclass(found, tuple | enum.Enum) or dataclasses.is_dataclass(found))
        if own and not record:
            raise pickle.UnpicklingError(f"{module}.{name} is no record")
        return found


def packed(value: Any) -> bytes:
    """The bytes of a value; see `unpacked`."""
    return pickle.dumps(value, protocol=5)


def unpacked(data: bytes) -> Any:
    """The value of these bytes. Raises pickle.UnpicklingError where they hold anything but plain data."""
    return _Plain(io.BytesIO(data)).load()
