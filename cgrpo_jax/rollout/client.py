"""Sends a request to a critic's server, within a deadline and a limit of bytes; the reply may hold anything.

Imported only where a server is asked, for `openai` and `httpx2` are an extra.
"""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.parse
from collections.abc import Awaitable, Mapping
from typing import Any, NamedTuple

import httpx2
import openai

from cgrpo_jax.config.options import ApiConfig
from cgrpo_jax.config.secrecy import without

LONGEST = 1 << 16  # characters of a critique; a longer text is refused
MOST_BYTES = 1 << 22  # of a reply, which holds more than the critique
MOST_TOKENS = 10_000_000  # read or written by a request; a server that reports more is not believed
LINE = 200  # characters of a fault
OF_THE_WIRE = ("content-length", "transfer-encoding")  # headers that are wrong for a body that has been decoded
PASSING = (408, 409, 425, 429)  # refusals after which the same request may succeed


class Answer(NamedTuple):
    """What a server answered to a request."""

    replied: bool = False  # there is a reply, which may have to be paid for
    text: str | None = None
    finished: bool = False  # the model ended the text; else a limit did
    fault: str | None = None  # why there is no text
    lasting: bool = False  # of a fault: the same request will be refused again
    status: int = 0  # of HTTP, where the server refused
    read: int | None = None  # tokens; None: not reported, or no possible number
    written: int | None = None


class _Bounded(httpx2.AsyncClient):
    """Reads each reply whole and uncompressed, within `seconds` from the first byte sent to the last one received."""

    def __init__(self, seconds: float):
        super().__init__(timeout=seconds, headers={"accept-encoding": "identity"}, limits=httpx2.Limits())
        self.seconds = seconds

    async def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:  # type: ignore[override]
        """Raises httpx2.ReadTimeout after the deadline, and httpx2.DecodingError for a compressed reply."""
        try:
            async with asyncio.timeout(self.seconds):
                response = await super().send(request, **kwargs | {"stream": True})
                try:
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise httpx2.DecodingError("the reply is compressed, which was not asked for", request=request)
                    body = bytearray()
                    async for part in response.aiter_raw():
                        body += part
                        if len(body) > MOST_BYTES:  # the rest is not read, so it will be no JSON
                            break
                finally:
                    await response.aclose()
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole reply within {self.seconds:g} s", request=request) from None
        headers = {name: value for name, value in response.headers.items() if name not in OF_THE_WIRE}
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)


class Client:
    """A connection to one model behind a URL, for any number of threads. Close it at the end."""

    def __init__(self, cfg: ApiConfig, key: str, secrets: tuple[str, ...]):
        parts = urllib.parse.urlsplit(cfg.base_url)
        self._secrets, self._loop = secrets, asyncio.new_event_loop()
        self._openai = openai.AsyncOpenAI(
            base_url=parts._replace(query="").geturl(),
            api_key=key,
            max_retries=cfg.retries,
            timeout=cfg.seconds,
            default_query=dict(urllib.parse.parse_qsl(parts.query)),  # Azure's api-version
            default_headers={"api-key": key} if ".azure.com" in parts.netloc else None,
            http_client=_Bounded(cfg.seconds),
        )
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="critic")
        self._thread.start()

    def close(self) -> None:
        self._run(self._openai.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Awaitable[Any]) -> Any:
        async def waited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(waited(), self._loop).result()

    def send(self, asked: Mapping[str, Any]) -> Answer:
        """Blocks, for at most `api.seconds` per try. Whatever the server does is told in the answer, never raised."""
        try:
            reply = self._run(self._openai.chat.completions.with_raw_response.create(**asked))
        except openai.APIStatusError as error:
            passing = error.status_code >= 500 or error.status_code in PASSING
            lasting = not passing or error.code == "insufficient_quota"
            return self._fault(error, str(error), lasting, error.status_code)
        except openai.APITimeoutError as error:
            return self._fault(error, str(error.__cause__ or error), False)
        except Exception as error:  # no connection, or any error that a library has with these bytes
            cause = error.__cause__ or error
            return self._fault(error, f"{type(cause).__name__}: {cause}", True)
        answer = read_reply(reply.content)
        return answer._replace(text=without(self._secrets, answer.text), fault=self._line(answer.fault or "") or None)

    def _fault(self, error: Exception, said: str, lasting: bool, status: int = 0) -> Answer:
        return Answer(fault=self._line(f"{type(error).__name__}: {said}"), lasting=lasting, status=status)

    def _line(self, text: str) -> str:
        """The beginning of a text as one line of printable characters, without the secrets."""
        line = " ".join(without(self._secrets, text).split())[:LINE]
        return "".join(character if character.isprintable() else "?" for character in line)


def read_reply(body: bytes) -> Answer:
    """The critique in the body of a reply, which may hold anything."""
    try:
        tree: dict[str, Any] = json.loads(body)
        choice: dict[str, Any] = tree["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        what = "is too long" if len(body) > MOST_BYTES else f"is no chat completion ({type(error).__name__})"
        return Answer(True, fault=f"the reply {what}", lasting=len(body) <= MOST_BYTES)
    usage = tree.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    answer = Answer(True, read=_count(usage.get("prompt_tokens")), written=_count(usage.get("completion_tokens")))
    if text is None or (isinstance(text, str) and not text.strip()):
        return answer._replace(fault="the reply is empty")
    if not isinstance(text, str):
        return answer._replace(fault=f"the reply holds {type(text).__name__} where text belongs")
    if len(text) > LONGEST:
        return answer._replace(fault=f"the reply has more than {LONGEST} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        return answer._replace(fault="the reply holds half a character (a lone surrogate)")
    return answer._replace(text=text, finished=choice.get("finish_reason") == "stop")


def _count(value: Any) -> int | None:
    """A number of tokens as a server reports it; None where it is no possible one."""
    return value if type(value) is int and 0 < value <= MOST_TOKENS else None
