"""Critiques from a server that speaks OpenAI's protocol (vLLM, `transformers serve`, OpenAI, Azure, ...).

A problem's critiques are asked for together, in threads, while other problems are decoded. Nothing is paid twice: what
a server said is kept in a file named by request and attempt number. A request that fails (time-out, cut line, refusal)
is tried again by the client, which honours Retry-After; then the run goes on with the fallback, and counts it.
The key comes from the environment only, and stands in no log, cache, dump or error.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import threading
import urllib.parse
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from cgrpo_jax.options import ApiConfig, RefineConfig
from cgrpo_jax.records import Attempt, Critique, Message, Problem
from cgrpo_jax.rollout.collect import Critic
from cgrpo_jax.rollout.critics import shown_truth
from cgrpo_jax.rollout.stories import Sample, Work
from cgrpo_jax.rollout.verdicts import or_fallback, usable, verdict_of
from cgrpo_jax.text.prompts import CriticPrompt, critique_messages

LONGEST = 1 << 16  # characters of a critique; what is longer is no critique


class CriticError(ValueError):
    """A critic that cannot be asked."""


class Reply(NamedTuple):
    """What a server said to one request; no text: why."""

    text: str | None
    fault: str | None
    tokens: int  # read and written
    cost: float  # in the currency of the prices


@dataclasses.dataclass
class Totals:
    """Of all requests since the last look; taken and reset by the leader, a step."""

    requests: int = 0
    cached: int = 0
    faults: int = 0
    tokens: int = 0
    cost: float = 0.0
    last_fault: str | None = None


class Server:
    """One model behind a URL. Use as a context manager: leaving waits for requests under way."""

    def __init__(self, cfg: ApiConfig, cache: pathlib.Path):
        """Raises CriticError where the key or the client is missing, before anything is asked."""
        try:
            import openai  # an extra
        except ImportError as error:
            raise CriticError("refine.critique=api needs the client: pip install 'cgrpo_jax[api]'") from error
        if cfg.key_variable and not os.environ.get(cfg.key_variable):
            raise CriticError(f"api.key_variable = {cfg.key_variable!r}: the environment holds no such variable")
        if not cfg.base_url or not cfg.model:
            raise CriticError("refine.critique=api needs api.base_url and api.model")
        self.cfg, self.cache = cfg, cache
        self._key = os.environ.get(cfg.key_variable, "") if cfg.key_variable else "none"
        url, query = _divided(cfg.base_url)
        self._errors = openai.OpenAIError
        self._client = openai.OpenAI(
            base_url=url,
            api_key=self._key,
            timeout=cfg.seconds,
            max_retries=cfg.retries,
            default_query=query,
            default_headers={"api-key": self._key} if ".azure.com" in url else None,
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(cfg.concurrent)
        self._lock, self.totals, self.spent = threading.Lock(), Totals(), self._spent_before()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _spent_before(self) -> float:
        """What the cached replies cost: a resumed run goes on with the same budget."""
        return sum(json.loads(path.read_text(encoding="utf-8"))["cost"] for path in self.cache.glob("*/*.json"))

    def ask(self, messages: Sequence[Message], attempt: int) -> Reply:
        """Blocks; any number of threads may ask. Never raises what a server does: that is a fault of the reply."""
        asked = {
            "model": self.cfg.model,
            "messages": list(messages),
            "max_tokens": self.cfg.tokens,
            "temperature": self.cfg.temperature,
            "top_p": self.cfg.top_p,
        }
        name = hashlib.sha256(json.dumps([asked, self.cfg.base_url, attempt], sort_keys=True).encode()).hexdigest()
        path = self.cache / name[:2] / f"{name}.json"
        if path.exists():
            self._count(cached=1)
            return Reply(**json.loads(path.read_text(encoding="utf-8")))
        with self._lock:
            over = 0 < self.cfg.spend_cap <= self.spent
        reply = Reply(None, "api.spend_cap is reached", 0, 0.0) if over else self._sent(asked)
        if reply.fault is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{threading.get_ident()}")
            partial.write_text(json.dumps(reply._asdict()), encoding="utf-8")
            partial.replace(path)
        self._count(requests=int(not over), tokens=reply.tokens, cost=reply.cost, fault=reply.fault)
        return reply

    def _sent(self, asked: dict[str, Any]) -> Reply:
        try:
            answer = self._client.chat.completions.create(**asked)
            text = answer.choices[0].message.content if answer.choices else None
            usage = answer.usage
        except (self._errors, AttributeError, TypeError, ValueError) as error:  # also of a reply that is no reply
            line = (str(error).splitlines() or [""])[0][:200]
            return Reply(None, f"{type(error).__name__}: {line}".replace(self._key, "***"), 0, 0.0)
        read, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        cost = (read * self.cfg.price_read + written * self.cfg.price_written) / 1e6
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
            fault = "an empty reply" if not text else "a reply that is too long"
            return Reply(None, fault, read + written, cost)
        return Reply(text, None, read + written, cost)

    def _count(self, requests: int = 0, cached: int = 0, tokens: int = 0, cost: float = 0.0, fault: str | None = None):
        with self._lock:
            self.spent += cost
            totals = self.totals
            totals.requests, totals.cached = totals.requests + requests, totals.cached + cached
            totals.tokens, totals.cost = totals.tokens + tokens, totals.cost + cost
            if fault is not None:
                totals.faults, totals.last_fault = totals.faults + 1, fault

    def take_totals(self) -> Totals:
        """What has been counted since the last call."""
        with self._lock:
            taken, self.totals = self.totals, Totals()
        return taken

    def submit(self, call: Any, *args: Any) -> concurrent.futures.Future:
        return self._threads.submit(call, *args)


def _divided(url: str) -> tuple[str, dict[str, object]]:
    """A base URL without its query, and the query (Azure's api-version)."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(query="").geturl(), dict(urllib.parse.parse_qsl(parts.query))


def _criticised(
    server: Server,
    refine: RefineConfig,
    problem: Problem,
    attempt: Attempt,
    prompt: CriticPrompt = critique_messages,
) -> Critique:
    """One critique, written anew while its verdict is not that of the rule."""
    messages = prompt(problem.question, attempt.text, shown_truth(problem, server.cfg.reference), True)
    found = Critique(None)
    for number in range(refine.critique_tries):
        reply = server.ask(messages, number)
        text = usable(reply.text or "")
        verdict = verdict_of(text)
        agrees = None if verdict is None else verdict == attempt.correct
        good = text if text and agrees else None
        found = Critique(good, verdict, agrees, found.tries + 1, found.tokens + reply.tokens)
        if good is not None or reply.fault is not None:  # the client has tried again already
            break
    return or_fallback(found, problem, attempt, refine)


def by_server(server: Server, refine: RefineConfig, prompt: CriticPrompt = critique_messages) -> Critic:
    """A critic that asks for all critiques of a problem at once, and waits for them beside the decoding."""

    def critic(
        problem: Problem, number: int, attempts: Sequence[tuple[int, Attempt]]
    ) -> Generator[Sample | Work, Any, list[Critique]]:
        futures = [server.submit(_criticised, server, refine, problem, attempt, prompt) for _, attempt in attempts]
        critiques = yield Work(functools.partial(_all, futures), "critique", remote=True)
        return critiques

    return critic


def _all(futures: Sequence[concurrent.futures.Future]) -> list[Critique]:
    return [future.result() for future in futures]
