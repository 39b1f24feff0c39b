"""A critic's server with OpenAI's protocol (vLLM, `transformers serve`, OpenAI, Azure, ...), and what was paid for it.

No critique is paid for twice: each is kept in a file that is named by the request and the number of the attempt. The
client retries a request that fails (time-out, broken connection, refusal) and honours Retry-After. If it still fails,
the run uses the fallback, and counts that. The key comes from the environment. Neither the key nor a password in the
URL is in any log, cache, dump or error.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cgrpo_jax.config.options import ApiConfig
from cgrpo_jax.config.secrecy import key_of, public_url, secrets_of
from cgrpo_jax.errors import CriticError
from cgrpo_jax.records import Message

if TYPE_CHECKING:
    from cgrpo_jax.rollout.client import Answer

Names = dict[str, str | None]  # parameter of a request -> the name under which it is sent; None: it is not sent
NO_KEY = "none"  # sent to a server that wants no key


class Reply(NamedTuple):
    """What a server answered to a request, and what that cost."""

    text: str | None
    finished: bool  # the model ended the text; else a limit did
    fault: str | None  # why there is no text
    read: int  # tokens; where the server does not report them, as many as there can be
    written: int
    cost: float  # in the currency of the prices


OVER = Reply(None, False, "api.spend_cap is reached", 0, 0, 0.0)


@dataclasses.dataclass
class Totals:
    """Counts of all requests of a step."""

    requests: int = 0
    cached: int = 0
    faults: int = 0
    tokens: int = 0  # read and written
    cost: float = 0.0
    guessed: int = 0  # replies without a report of their tokens, which count as the most that they can be
    damaged: int = 0  # cached replies that could not be read
    last_fault: str | None = None


def _checked(cfg: ApiConfig) -> str:
    """The key. Raises CriticError where the options name no server; no message holds a key or a password."""
    variable = cfg.key_variable
    if variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise CriticError(
            "api.key_variable is to be the name of an environment variable that holds the key, never the key itself"
        )
    key = key_of(variable)
    if variable and not key:
        raise CriticError(f"api.key_variable = {variable!r}: the environment holds no such variable")
    if not (key.isascii() and key.isprintable()):
        raise CriticError(f"api.key_variable = {variable!r}: its value has characters that no key can have")
    if not cfg.base_url or not cfg.model:
        raise CriticError("refine.critique=api needs api.base_url and api.model")
    try:
        parts = urllib.parse.urlsplit(cfg.base_url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise CriticError(f"api.base_url = {public_url(cfg.base_url)!r}: http://HOST:PORT/v1 or https://... is needed")
    return key or NO_KEY


class Server:
    """One model behind a URL. Use as a context manager: leaving it waits for requests that have been sent."""

    def __init__(self, cfg: ApiConfig, cache: pathlib.Path):
        """Raises CriticError where the key or the client is missing."""
        try:
            from cgrpo_jax.rollout.client import Client  # openai is an extra
        except ImportError as error:
            raise CriticError("refine.critique=api needs the client: pip install 'cgrpo_jax[api]'") from error
        self.cfg, self.cache = cfg, cache
        self._client = Client(cfg, _checked(cfg), secrets_of(cfg.base_url, cfg.key_variable))
        self._names: Names = {name: name for name in ("max_tokens", "temperature", "top_p")}
        self.threads = concurrent.futures.ThreadPoolExecutor(cfg.concurrent)
        self._lock, self.totals, self.spent = threading.Lock(), Totals(), 0.0
        for path in self.cache.glob("*/*.json"):  # a resumed run goes on with the same budget
            self.spent += reply.cost if (reply := _stored(path)) is not None else 0.0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.threads.shutdown(cancel_futures=True)
        self._client.close()

    def check(self, messages: Sequence[Message]) -> Reply:
        """Sends a request before step 1, and finds the form of requests that this server accepts.

        Parameters that some servers refuse (`max_tokens`, a temperature) are left out or renamed, once each. The reply
        is not used again: each start asks anew, for the server may have changed.

        Raises:
          CriticError: the server refuses for good (a wrong name of a model, no access), is not there, or sends no chat
            completion. A failure that may pass, as of a busy server, is a fault of the reply.
        """
        asked = self._asked(messages)
        if self._over():
            return OVER
        while True:
            reply, answer = self._sent(asked)
            self._book(self._path(asked, "check"), reply, kept_fault=reply.fault or "asked before step 1")
            names = _otherwise(self._names, answer)
            if names is None:
                break
            self._names = names
        if answer.lasting:
            where = public_url(self.cfg.base_url)
            raise CriticError(f"api.base_url = {where!r}, api.model = {self.cfg.model!r}: {reply.fault}")
        return reply

    @property
    def form(self) -> str:
        """In what the requests differ from the options api.*; "": in nothing."""
        dropped = [f"api.{name}" for name, sent in self._names.items() if sent is None]
        renamed = [f"{name} is sent as {sent}" for name, sent in self._names.items() if sent not in (None, name)]
        return "; ".join([f"{' and '.join(dropped)} without effect"] * bool(dropped) + renamed)

    def _asked(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {
            "model": self.cfg.model,
            "messages": list(messages),
            "max_tokens": self.cfg.tokens,
            "temperature": self.cfg.temperature,
            "top_p": self.cfg.top_p,
        }

    def _path(self, asked: dict[str, Any], attempt: Any) -> pathlib.Path:
        parts = json.dumps([asked, public_url(self.cfg.base_url), attempt], sort_keys=True)
        name = hashlib.sha256(parts.encode()).hexdigest()
        return self.cache / name[:2] / f"{name}.json"

    def ask(self, messages: Sequence[Message], attempt: int) -> Reply:
        """Blocks; any number of threads may ask. Whatever the server does is a fault of the reply, and never raised."""
        asked = self._asked(messages)
        path = self._path(asked, attempt)
        if path.exists():
            kept = _stored(path)
            usable = kept is not None and kept.fault is None
            with self._lock:
                self.totals.cached += usable
                self.totals.damaged += not usable
            if kept is not None and usable:
                return kept
        reply = OVER if self._over() else self._sent(asked)[0]
        self._book(path, reply, kept_fault=reply.fault)
        return reply

    def _over(self) -> bool:
        with self._lock:
            return 0 < self.cfg.spend_cap <= self.spent

    def _sent(self, asked: dict[str, Any]) -> tuple[Reply, Answer]:
        wire = {sent: value for name, value in asked.items() if (sent := self._names.get(name, name)) is not None}
        answer = self._client.send(wire)
        if not answer.replied:
            return Reply(None, False, answer.fault, 0, 0, 0.0), answer
        # No reply is free: where the server reports no possible number, it is taken to have read as many tokens as the
        # messages have bytes, which are at least as many but for the chat template, and to have written all it may.
        most = len(json.dumps(asked["messages"], ensure_ascii=False).encode())
        read = most if answer.read is None else answer.read
        written = self.cfg.tokens if answer.written is None else answer.written
        cost = (read * self.cfg.price_read + written * self.cfg.price_written) / 1e6
        with self._lock:
            self.totals.guessed += None in (answer.read, answer.written)
        return Reply(answer.text, answer.finished, answer.fault, read, written, cost), answer

    def _book(self, path: pathlib.Path, reply: Reply, kept_fault: str | None) -> None:
        """Counts a reply, and keeps it on file: a critique to be used again, any other one for its cost.

        Args:
          kept_fault: None: the file is that of the critique; else it is one of its own.
        """
        if kept_fault is not None:
            path = path.with_suffix(f".{time.time_ns()}.json")
        if kept_fault is None or reply.cost:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{threading.get_ident()}")
            partial.write_text(json.dumps(reply._replace(fault=kept_fault)._asdict()), encoding="utf-8")
            partial.replace(path)
        with self._lock:
            self.spent += reply.cost
            self.totals.requests += reply is not OVER
            self.totals.tokens += reply.read + reply.written
            self.totals.cost += reply.cost
            if reply.fault is not None:
                self.totals.faults, self.totals.last_fault = self.totals.faults + 1, reply.fault

    def take_totals(self) -> Totals:
        """The counts since the last call."""
        with self._lock:
            taken, self.totals = self.totals, Totals()
        return taken


def _otherwise(names: Names, answer: Answer) -> Names | None:
    """Names under which a server may accept a request that it has refused; None: it has not, or there are no others.

    Newer models take `max_completion_tokens` in the place of `max_tokens`, and some neither temperature nor top_p.
    """
    said = answer.fault or ""
    if answer.status not in (400, 422):
        return None
    if names["max_tokens"] == "max_tokens" and "max_" in said and "tokens" in said:
        return names | {"max_tokens": "max_completion_tokens"}
    for name in ("top_p", "temperature"):  # where the two exclude each other, the temperature stays
        if names[name] is not None and name in said:
            return names | {name: None}
    return None


def _stored(path: pathlib.Path) -> Reply | None:
    """A reply on file; None where the file is damaged."""
    try:
        reply = Reply(**json.loads(path.read_bytes()))
        counts = [count for count in (reply.read, reply.written) if type(count) is int and count >= 0]
        text = reply.text if reply.fault is None else ""
        text.encode()  # type: ignore[union-attr]
        if len(counts) == 2 and type(reply.finished) is bool and math.isfinite(reply.cost) and reply.cost >= 0:
            return reply
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    return None
