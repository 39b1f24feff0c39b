"""Critiques from a server that speaks OpenAI's protocol (vLLM, `transformers serve`, OpenAI, Azure, ...).

A problem's critiques are asked for together, in threads, while other problems are decoded. Nothing is paid twice: what
a server said is kept in a file named by request and attempt number. A request that fails (time-out, cut line, refusal)
is tried again by the client, which honours Retry-After; then the run goes on with the fallback, and counts it.
The key comes from the environment only; neither it nor a password of the URL stands in any log, cache, dump or error.
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

Names = dict[str, str | None]  # parameter of a request -> its name on the wire; None: it is not sent
NO_KEY = "none"  # what a server that wants no key is sent


class Reply(NamedTuple):
    """What a server said to one request; no text: why."""

    text: str | None
    finished: bool  # the model ended the text; else a limit did
    fault: str | None
    read: int  # tokens; where the server does not say, as many as can be
    written: int
    cost: float  # in the currency of the prices


OVER = Reply(None, False, "api.spend_cap is reached", 0, 0, 0.0)


@dataclasses.dataclass
class Totals:
    """Of all requests since the last look; taken and reset by the leader, a step."""

    requests: int = 0
    cached: int = 0
    faults: int = 0
    tokens: int = 0  # read and written
    cost: float = 0.0
    guessed: int = 0  # replies whose tokens were not reported: counted as the most that they can be
    damaged: int = 0  # cached replies that could not be read
    last_fault: str | None = None


def _checked(cfg: ApiConfig) -> str:
    """The key. Raises CriticError for what cannot be asked at all; no message holds a key or a password."""
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
    """One model behind a URL. Use as a context manager: leaving waits for requests under way."""

    def __init__(self, cfg: ApiConfig, cache: pathlib.Path):
        """Raises CriticError where the key or the client is missing, before anything is asked."""
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
        self._client.__exit__()

    def check(self, messages: Sequence[Message]) -> Reply:
        """Asks once, before anything else is done, and learns how this server wants to be asked.

        What a server is known to refuse (`max_tokens`, a temperature) is left out or renamed, once each. The reply is
        not kept: another start asks again, for the server may be another one by then.

        Raises:
          CriticError: the server refuses for good (a wrong name of a model, no access), is not there, or sends what is
            no chat completion. A failure that may pass, as a server that is busy, is a fault of the reply.
        """
        asked = self._asked(messages)
        if self._over():
            return OVER
        while True:
            reply, answer = self._sent(asked)
            self._keep(self._path(asked, "check"), reply._replace(fault=reply.fault or "asked before step 1"))
            self._count(requests=1, reply=reply)
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
        """What is asked otherwise than api.* says; "" for nothing."""
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
        """Blocks; any number of threads may ask. Never raises what a server does: that is a fault of the reply."""
        asked = self._asked(messages)
        path = self._path(asked, attempt)
        if path.exists():
            kept = _stored(path)
            if kept is not None and kept.fault is None:
                self._count(cached=1)
                return kept
            self._count(damaged=1)
        over = self._over()
        reply = OVER if over else self._sent(asked)[0]
        self._keep(path, reply)
        self._count(requests=int(not over), reply=reply)
        return reply

    def _over(self) -> bool:
        with self._lock:
            return 0 < self.cfg.spend_cap <= self.spent

    def _sent(self, asked: dict[str, Any]) -> tuple[Reply, Answer]:
        wire = {sent: value for name, value in asked.items() if (sent := self._names.get(name, name)) is not None}
        answer = self._client.send(wire)
        if not answer.replied:
            return Reply(None, False, answer.fault, 0, 0, 0.0), answer
        # A text has no more tokens than bytes, but for those of the chat template; a server that reports nothing, or
        # what cannot be, is taken to have read and written as much as it can: no reply is free.
        most = len(json.dumps(asked["messages"], ensure_ascii=False).encode())
        read = most if answer.read is None else answer.read
        written = self.cfg.tokens if answer.written is None else answer.written
        cost = (read * self.cfg.price_read + written * self.cfg.price_written) / 1e6
        with self._lock:
            self.totals.guessed += None in (answer.read, answer.written)
        return Reply(answer.text, answer.finished, answer.fault, read, written, cost), answer

    def _keep(self, path: pathlib.Path, reply: Reply) -> None:
        """On file: a critique, to be used again; of a reply that is no critique what it cost, for the budget."""
        if reply.fault is not None:
            path = path.with_suffix(f".{time.time_ns()}.json")
        if reply.fault is None or reply.cost:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{threading.get_ident()}")
            partial.write_text(json.dumps(reply._asdict()), encoding="utf-8")
            partial.replace(path)

    def _count(self, requests: int = 0, cached: int = 0, damaged: int = 0, reply: Reply | None = None) -> None:
        with self._lock:
            totals = self.totals
            totals.requests, totals.cached = totals.requests + requests, totals.cached + cached
            totals.damaged += damaged
            if reply is not None:
                self.spent += reply.cost
                totals.tokens, totals.cost = totals.tokens + reply.read + reply.written, totals.cost + reply.cost
                if reply.fault is not None:
                    totals.faults, totals.last_fault = totals.faults + 1, reply.fault

    def take_totals(self) -> Totals:
        """What has been counted since the last call."""
        with self._lock:
            taken, self.totals = self.totals, Totals()
        return taken


def _otherwise(names: Names, answer: Answer) -> Names | None:
    """How a server may take a request that it has refused; None where no other way is known, or none is needed.

    Newer models take no `max_tokens` but `max_completion_tokens`, and some neither temperature nor top_p.
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
