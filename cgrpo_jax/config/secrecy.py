"""Secrets that a configuration leads to, and values without them: what is kept, shown or sent on holds none."""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
from collections.abc import Iterable
from typing import Any

HIDDEN = "***"
# Characters of a secret that is looked for in any text. A server that wants no key is given "none", "EMPTY" or "dummy".
SHORTEST = 6
SHOWN = ("api-version",)  # parameters of a URL that are no secret
ACCESS = re.compile(r"//(.*)@")  # USER:PASSWORD, also of a password that should have been percent-encoded


def key_of(variable: str) -> str:
    """What an environment variable holds, less the line end that a shell may have left there; "" without one."""
    return os.environ.get(variable, "").strip() if variable else ""


def secrets_of(url: str, key_variable: str) -> tuple[str, ...]:
    """The secrets in a URL and in an environment variable, in each form in which they may come back; longest first."""
    found = {key_of(key_variable)}
    for access in ACCESS.findall(url):
        plain = urllib.parse.unquote(access)
        found |= {access, plain, plain.partition(":")[2], access.partition(":")[2]}
        found.add(base64.b64encode(plain.encode("utf-8", "replace")).decode())
    query = urllib.parse.parse_qsl(url.partition("?")[2])
    found |= {value for name, value in query if name not in SHOWN}
    found |= {urllib.parse.quote(secret, safe="") for secret in found}
    return tuple(sorted((secret for secret in found if len(secret) >= SHORTEST), key=len, reverse=True))


def public_url(url: str) -> str:
    """A URL without user, password and the values of its parameters."""
    place, mark, query = ACCESS.sub(f"//{HIDDEN}@", url).partition("?")
    pairs = [part.partition("=") for part in query.split("&") if part]
    return place + mark + "&".join(f"{name}={value if name in SHOWN else HIDDEN}" for name, _, value in pairs)


def without(secrets: Iterable[str], value: Any) -> Any:
    """A tree of dicts, lists and texts in which each secret is replaced."""
    if isinstance(value, dict):
        return {key: without(secrets, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without(secrets, part) for part in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
    return value
