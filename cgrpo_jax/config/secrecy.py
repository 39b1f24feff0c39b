"""Finds the secrets a configuration refers to and removes them from whatever is stored, shown or sent to others."""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
from collections.abc import Iterable
from typing import Any

HIDDEN = "***"
# Shorter keys are not looked for: a server without keys is given "none", "EMPTY" or "dummy", which are common words.
SHORTEST = 6
SHOWN = ("api-version",)  # parameters of a URL that are no secret
ACCESS = re.compile(r"//(.*)@")  # USER:PASSWORD, also of a password that should have been percent-encoded


def key_of(variable: str) -> str:
    """The value of an environment variable without white space at its ends; "" if it is not set or not named."""
    return os.environ.get(variable, "").strip() if variable else ""


def secrets_of(url: str, key_variable: str) -> tuple[str, ...]:
    """The secrets in a URL and in an environment variable, in every form an answer may repeat them; longest first."""
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
    """A tree of dicts, lists and texts, with `HIDDEN` in place of each secret."""
    if isinstance(value, dict):
        return {key: without(secrets, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without(secrets, part) for part in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
    return value
