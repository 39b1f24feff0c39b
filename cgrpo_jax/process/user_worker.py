"""The process in which functions of the user run (`user.py`): a file of its own, started as one.

    python user_worker.py REQUESTS REPLIES      two descriptors

One JSON request a line: {"load": path, "value": a pickled function or null, "path": sys.path} or {"call": path,
"arguments": {...}}, each with its "seconds". One JSON reply a line: {"found": ...} or {"fault": [type and message,
traceback, [file, line] or null]}. A call that takes longer ends the process, and its traceback is the reply.
"""

import base64
import contextlib
import faulthandler
import importlib
import json
import math
import numbers
import os
import pickle
import resource
import signal
import sys
import traceback
import types
from collections.abc import Mapping
from typing import Any

NOT_THEIRS = (os.path.dirname(os.path.abspath(__file__)), importlib.__file__, "<frozen importlib")


def plain(found: Any) -> Any:
    """What a function returned, in the types of JSON: a list of numbers, texts and None, a scalar array as its number.

    Of anything else {"type": its name}, as the whole or in its place.
    """
    if isinstance(found, (str, bytes, Mapping)) or not hasattr(found, "__len__"):
        return {"type": type(found).__name__}
    return [_element(value) for value in found]


def _element(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of numpy, torch, jax
        value = value.item()
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, numbers.Real):
        return {"type": type(value).__name__}
    try:
        return float(value)
    except OverflowError:
        return math.copysign(sys.float_info.max, value)


def fault(error: BaseException) -> tuple[str, str, tuple[str, int | None] | None]:
    """Type and message in a line, the traceback from the user's first frame on, and where it was raised."""
    at = error.__traceback__
    while at is not None and at.tb_frame.f_code.co_filename.startswith(NOT_THEIRS):
        at = at.tb_next
    frames = traceback.extract_tb(at)
    try:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        trace = "".join(traceback.format_exception(type(error), error, at, chain=False)).rstrip()
    except Exception:  # of its own __str__
        said = trace = type(error).__name__
    return said, trace, (frames[-1].filename, frames[-1].lineno) if frames else None


def answer(request: dict[str, Any], functions: dict[str, Any]) -> Any:
    """Loads a function, or calls one."""
    if "load" in request:
        sys.path[:] = request["path"]
        from cgrpo_jax.process.calling import function_of

        value = request["value"]
        functions[request["load"]] = pickle.loads(base64.b64decode(value)) if value else function_of(request["load"])
        return None
    arguments = request["arguments"]
    if "trainer_state" in arguments:
        arguments["trainer_state"] = types.SimpleNamespace(**arguments["trainer_state"])
    return plain(functions[request["call"]](**arguments))


def main(requests: int, replies: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for descriptor in (requests, replies):
        os.set_inheritable(descriptor, False)
    own, functions = os.getpid(), dict[str, Any]()
    for line in os.fdopen(requests, "rb"):
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["seconds"], exit=True, file=replies)
        try:
            reply = {"found": answer(request, functions)}
        except BaseException as error:  # whatever it is, it is a fault of the function
            reply = {"fault": fault(error)}
        if os.getpid() != own:  # a fork that came back
            os._exit(0)
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that it left behind
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        data = json.dumps(reply).encode() + b"\n"
        while data:
            data = data[os.write(replies, data) :]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
