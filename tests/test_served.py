"""A critic behind a URL, against a server that behaves, and one that does not."""

import base64
import contextlib
import dataclasses
import gzip
import http.server
import json
import math
import threading
import time
import tracemalloc

import pytest

from cgrpo_jax.config import Config, public
from cgrpo_jax.config.options import ApiConfig, RefineConfig
from cgrpo_jax.config.secrecy import public_url
from cgrpo_jax.errors import CriticError
from cgrpo_jax.records import Attempt, Problem
from cgrpo_jax.rollout import client
from cgrpo_jax.rollout.collect import Posed
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.written import by_server
from cgrpo_jax.text import prompts

PROBLEM = Problem(
    "What is 23+46?", "69", prompts.question_messages("What is 23+46?"), "exact", columns={"solution": "20+40+9"}
)
WRONG = Attempt(None, "It is 70.", 0.0, False, None, "ok")
GOOD = "<think>70?</think>Add the tens again. Conclusion: incorrect [END] bye"
KEY = "sk-very-secret-123"


def said(text):
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the script of its server, one entry a request; the last one for ever."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body, time.monotonic()))
            what = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(0.3 if what == "slow" else 0.0)
        with self.server.lock:
            self.server.now -= 1
        status, headers, text = 200, {}, None
        if isinstance(what, tuple):  # refused, in these words
            status, text = what[0], json.dumps({"error": {"message": what[1]}})
        elif isinstance(what, bytes):
            text = what.decode()
        elif isinstance(what, int):
            status, headers, text = (
                what,
                {"Retry-After": "0.3"},
                json.dumps({"error": {"message": f"no {KEY} for you"}}),
            )
        elif what == "hang":
            time.sleep(1.5)
            return
        elif callable(what):  # writes what it likes
            what(self)
            return
        elif what == "cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        else:
            text = what if what in ("", "[]", "<html>") else json.dumps(said(GOOD if what == "slow" else what))
        self.send_response(status)
        for name, value in (
            {"content-type": "application/json", "content-length": str(len(text.encode()))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """(script) -> a running server, and its configuration."""
    running = []
    monkeypatch.setenv("CRITIC_KEY", KEY)

    def start(*script, **changes):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # a client that hangs up
        server.script, server.asked, server.lock, server.now, server.most = list(script), [], threading.Lock(), 0, 0
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        url = f"http://127.0.0.1:{server.server_port}/v1"
        defaults = {"base_url": url, "model": "m", "key_variable": "CRITIC_KEY", "seconds": 20.0, "retries": 0}
        return server, ApiConfig(**defaults | changes)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def criticise(cfg, folder, attempts=1, **refine):
    with Server(cfg, folder) as server:
        brief = Brief(RefineConfig(critique="api", **refine), cfg.reference)
        story = by_server(server, brief, Posed(PROBLEM, 0, 0), [(g, WRONG) for g in range(attempts)])
        wish = next(story)
        assert wish.remote
        with pytest.raises(StopIteration) as end:
            story.send(wish.call())
        return end.value.value, server.take_totals(), server.spent


def test_a_critique_is_asked_for_once(serve, tmp_path):
    """What came is free the second time; the key is sent, and stands in no file."""
    server, cfg = serve(GOOD, price_read=1.0, price_written=10.0)
    for again in (False, True):
        (critique,), totals, spent = criticise(cfg, tmp_path)
        assert critique.text == "Add the tens again. Conclusion: incorrect"
        assert (critique.verdict, critique.agrees, critique.tries, critique.fallback) == (False, True, 1, False)
        assert (totals.requests, totals.cached) == ((0, 1) if again else (1, 0))
        assert spent == pytest.approx(300e-6)
    path, headers, body, _ = server.asked[0]
    assert len(server.asked) == 1 and path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert body["max_tokens"] == 1024 and "It is 70." in body["messages"][1]["content"]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 1 and KEY not in files[0].read_text()


@pytest.mark.parametrize(("reference", "shown"), [("none", None), ("gt", "69"), ("solution", "20+40+9")])
def test_what_the_critic_is_shown(serve, tmp_path, reference, shown):
    server, cfg = serve(GOOD, reference=reference)
    criticise(cfg, tmp_path)
    text = server.asked[0][2]["messages"][1]["content"]
    assert ("Ground truth" in text) is (shown is not None) and (shown or "") in text


@pytest.mark.parametrize("trouble", [500, 429, 401, "hang", "cut", "", "[]", "<html>", "   ", "x" * 10_000_000])
def test_whatever_the_server_does_the_run_goes_on(serve, tmp_path, trouble, capfd):
    """By the fallback, and it is counted; nothing that failed is kept, and the key is in no message."""
    _, cfg = serve(trouble, seconds=0.5 if trouble == "hang" else 20.0)
    (critique,), totals, _ = criticise(cfg, tmp_path)
    assert critique.fallback and critique.text == "The generated solution is incorrect."
    assert totals.faults == totals.requests == 1 and totals.last_fault and KEY not in totals.last_fault
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert KEY not in "".join(capfd.readouterr())
    (critique,), _, _ = criticise(cfg, tmp_path, critique_fallback="drop")
    assert critique.text is None


def test_a_busy_server_is_asked_again_when_it_says(serve, tmp_path):
    server, cfg = serve(429, GOOD, retries=1)
    (critique,), totals, _ = criticise(cfg, tmp_path)
    assert not critique.fallback and totals.faults == 0
    assert server.asked[1][3] - server.asked[0][3] >= 0.3


def test_a_verdict_against_the_rule_is_asked_for_anew(serve, tmp_path):
    server, cfg = serve("Fine. Conclusion: correct [END]", GOOD)
    (critique,), totals, _ = criticise(cfg, tmp_path)
    assert critique.agrees and critique.tries == 2 and totals.requests == 2 and not critique.first_agrees
    assert critique.tokens == 40 and totals.tokens == 240  # written, as of every critic; and what was read beside
    assert server.asked[0][2] == server.asked[1][2]
    again, totals, _ = criticise(cfg, tmp_path)
    assert again[0] == critique and totals.cached == 2  # each try has its own place


def test_no_more_is_spent_than_the_cap(serve, tmp_path):
    """The budget is that of the run: also after it was resumed."""
    server, cfg = serve(GOOD, price_written=1e6, spend_cap=30.0, concurrent=1)  # 20 a request
    _, _, spent = criticise(cfg, tmp_path)
    assert spent == 20
    other = Problem("Other?", "1", (), "exact")
    with Server(cfg, tmp_path) as again:
        assert again.spent == 20
        for number in range(4):
            again.ask(prompts.critique_messages(other.question, f"{number}", None, True), 0)
        assert (
            again.spent == 40
            and len(server.asked) == 2
            and again.take_totals().last_fault == "api.spend_cap is reached"
        )


def test_requests_run_together_up_to_the_bound(serve, tmp_path):
    server, cfg = serve("slow", concurrent=4)
    attempts = [(g, dataclasses.replace(WRONG, text=f"It is {g}.")) for g in range(8)]
    with Server(cfg, tmp_path) as reached, pytest.raises(StopIteration) as end:
        story = by_server(reached, Brief(RefineConfig(critique="api")), Posed(PROBLEM, 0, 0), attempts)
        story.send(next(story).call())
    assert len(end.value.value) == 8 and all(critique.agrees for critique in end.value.value)
    assert 1 < server.most <= 4


def test_what_is_missing_is_said_before_anything_is_asked(serve, tmp_path, monkeypatch):
    _, cfg = serve(GOOD)
    monkeypatch.delenv("CRITIC_KEY")
    with pytest.raises(CriticError, match="'CRITIC_KEY': the environment holds no such variable"):
        Server(cfg, tmp_path)
    with pytest.raises(CriticError, match=r"needs api.base_url and api.model"):
        Server(ApiConfig(key_variable=""), tmp_path)


def test_an_azure_url_keeps_its_version(serve, tmp_path):
    server, cfg = serve(GOOD)
    criticise(dataclasses.replace(cfg, base_url=cfg.base_url + "?api-version=2024-10-21"), tmp_path)
    assert server.asked[0][0] == "/v1/chat/completions?api-version=2024-10-21"


# ---- What a server may send ----


def reply(content, **changes):
    return json.dumps(said(content) | changes).encode()


def usage(value):
    return reply(GOOD, usage=value)


def tokens(read, written=20):
    return usage({"prompt_tokens": read, "completion_tokens": written})


HUGE = b'{"choices": [{"message": {"content": "' + GOOD.encode() + b'"}, "finish_reason": "stop"}], "usage": %s}'


@pytest.mark.parametrize(
    "body",
    [
        usage("many"), usage(None), usage(7), usage([]), tokens("100"), tokens(None), tokens(-(10**9)), tokens(0),
        tokens(1e9), tokens(True), tokens(10**400), HUGE % b'{"prompt_tokens": NaN, "completion_tokens": Infinity}',
    ],
)  # fmt: skip
def test_no_report_of_tokens_makes_a_reply_free(serve, tmp_path, body):
    """What is reported as no number, or as none that can be, counts as the most that it can be: the cap still binds."""
    server, cfg = serve(body, price_read=1e6, price_written=1e6, spend_cap=1.0)
    (critique,), totals, spent = criticise(cfg, tmp_path)
    assert critique.agrees and totals.guessed == 1 and totals.faults == 0
    assert math.isfinite(spent) and spent > len(prompts.CRITIC)
    with Server(cfg, tmp_path) as again:
        assert again.spent == spent
        assert again.ask(prompts.question_messages("Other?"), 0).fault == "api.spend_cap is reached"
    assert len(server.asked) == 1


DEEP = b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    "body",
    [DEEP, b'{"error": ' * 100_000, reply("\ud800 half"), reply(["x"]), reply(None), reply(7), b"null", b"7", b'"x"',
     b'{"choices": {"0": 1}}', b'{"choices": [7]}', b'{"choices": [{"message": []}]}', b"1" * 5000],
    ids=lambda body: body[:24].decode(),
)  # fmt: skip
def test_a_reply_of_any_form_is_a_fault_at_most(serve, tmp_path, body):
    """It is on file in no form, so that the same command asks again."""
    _, cfg = serve(body)
    (critique,), totals, _ = criticise(cfg, tmp_path)
    assert critique.fallback and totals.faults == 1 and totals.last_fault.isprintable()
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("status", [400, 500])
def test_a_refusal_of_any_form_is_a_fault_at_most(serve, tmp_path, status):
    def refuse(handler):
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(DEEP)

    _, cfg = serve(refuse)
    (critique,), totals, _ = criticise(cfg, tmp_path)
    assert critique.fallback and totals.faults == 1


def dripping(head, part):
    def drip(handler):
        handler.wfile.write(head)
        try:
            for _ in range(100):
                handler.wfile.write(part)
                time.sleep(0.1)
        except OSError:
            pass

    return drip


@pytest.mark.parametrize(
    "drip",
    [
        dripping(b"HTTP/1.0 200 OK\r\n", b"X-A: b\r\n"),
        dripping(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n", b" "),
        dripping(b"HTTP/1.0 400 No\r\n\r\n", b"x"),
    ],
    ids=["headers", "body", "refusal"],
)
def test_a_server_that_drips_has_a_deadline(serve, tmp_path, drip):
    """Each byte comes in time; the reply does not."""
    _, cfg = serve(drip, seconds=0.4)
    began = time.monotonic()
    (critique,), totals, _ = criticise(cfg, tmp_path)
    assert time.monotonic() - began < 3.0 and critique.fallback
    assert "no whole reply within 0.4 s" in totals.last_fault


def test_a_flood_is_not_read(serve, tmp_path):
    """Neither as it comes nor unpacked: 64 MB of zeros are 64 kB of gzip."""
    sent, packed = [], gzip.compress(b" " * (1 << 26))

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(400):
                sent.append(handler.wfile.write(b" " * (1 << 18)))
        except OSError:
            pass

    def bomb(handler):
        handler.send_response(200)
        handler.send_header("content-encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(packed)

    _, cfg = serve(flood)
    tracemalloc.start()
    _, totals, _ = criticise(cfg, tmp_path)
    assert totals.last_fault == "the reply is too long" and sum(sent) < 50 << 20
    server, cfg = serve(bomb)
    _, totals, _ = criticise(cfg, tmp_path)
    assert "compressed" in totals.last_fault and server.asked[0][1]["accept-encoding"] == "identity"
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_a_refusal_lasts_unless_another_time_may_bring_an_answer(serve):
    """Busy, too many, too early, a fault of the server: the same request may do later. A wrong one is wrong again."""
    statuses = (408, 409, 425, 429, 500, 503, 400, 401, 404, 422)
    _, cfg = serve(*((status, "no") for status in statuses))
    with contextlib.closing(client.Client(cfg, KEY, ())) as asking:
        answers = [asking.send({"model": "m", "messages": []}) for _ in statuses]
    assert [(answer.status, answer.lasting) for answer in answers] == [(s, s in statuses[6:]) for s in statuses]


def test_what_is_exactly_at_a_limit_is_within_it():
    """Characters of a critique, bytes of a reply, tokens that a server reports; one more is beyond."""

    def reply(text, tokens=1):
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return client.read_reply(json.dumps({"choices": [choice], "usage": {"prompt_tokens": tokens}}).encode())

    at, over = (reply("x" * (client.LONGEST + more)) for more in (0, 1))
    assert at.text == "x" * client.LONGEST and over.text is None and "more than 65536 characters" in over.fault
    assert reply("x", client.MOST_TOKENS).read == client.MOST_TOKENS and reply("x", client.MOST_TOKENS + 1).read is None
    at, over = (client.read_reply(b" " * (client.MOST_BYTES + more)) for more in (0, 1))
    assert "no chat completion" in at.fault and at.lasting and "too long" in over.fault and not over.lasting


def test_a_critique_that_a_limit_cut_concludes_nothing(serve, tmp_path):
    cut = said("Step 1 is wrong.\nConclusion: incorrect")
    cut["choices"][0]["finish_reason"] = "length"
    _, cfg = serve(json.dumps(cut).encode())
    (critique,), totals, _ = criticise(cfg, tmp_path, critique_tries=2)
    assert critique.verdict is None and critique.fallback and (totals.requests, totals.faults) == (2, 0)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"text": 7}', b"\xff\xfe", DEEP, b'"cost": NaN', b'"cost": -9', b'"text": "\\ud800"']
)
def test_a_damaged_critique_on_file_is_asked_for_anew(serve, tmp_path, damage):
    server, cfg = serve(GOOD, price_read=1.0)
    (first,), _, spent = criticise(cfg, tmp_path)
    (path,) = tmp_path.rglob("*.json")
    if damage.startswith(b'"'):  # one value of it
        name, _, value = damage.decode().partition(": ")
        kept = json.loads(path.read_text())
        kept[name[1:-1]] = json.loads(value)
        damage = json.dumps(kept).encode()
    path.write_bytes(damage)
    (again,), totals, spent_again = criticise(cfg, tmp_path)
    assert again == first and (totals.requests, totals.cached, totals.damaged) == (1, 0, 1)
    assert spent_again == spent and len(server.asked) == 2
    (_,), totals, _ = criticise(cfg, tmp_path)
    assert totals.cached == 1


def test_what_a_useless_reply_cost_is_remembered(serve, tmp_path):
    server, cfg = serve("   ", price_written=1e6, spend_cap=30.0)  # 20 a reply
    assert criticise(cfg, tmp_path)[2] == 20
    assert criticise(cfg, tmp_path)[2] == 40
    _, totals, _ = criticise(cfg, tmp_path)
    assert totals.last_fault == "api.spend_cap is reached" and len(server.asked) == 2


# ---- What is asked before step 1 ----

NO_LIMIT = (400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.")
NO_TEMPERATURE = (400, "Unsupported value: 'temperature' does not support 0.7 with this model.")
NO_TOP_P = (400, "Unsupported parameter: 'top_p' is not supported with this model.")


def test_a_server_is_asked_as_it_wants_to_be(serve, tmp_path):
    """Each known alternative once, before step 1; from then on every request has that form."""
    server, cfg = serve(NO_LIMIT, NO_TOP_P, NO_TEMPERATURE, GOOD, price_written=1e6)
    with Server(cfg, tmp_path) as critic:
        assert critic.check(prompts.critique_messages("1+1?", "2", None, True)).fault is None
        assert (
            critic.form == "api.temperature and api.top_p without effect; max_tokens is sent as max_completion_tokens"
        )
        critic.ask(prompts.critique_messages("1+2?", "3", None, True), 0)
    wanted = {"model": "m", "max_completion_tokens": 1024}
    for _, _, body, _ in server.asked[3:]:
        assert {name: value for name, value in body.items() if name != "messages"} == wanted
    assert len(server.asked) == 5
    with Server(cfg, tmp_path) as again:  # it may be another server by now, so each start asks, and pays
        again.check(prompts.critique_messages("1+1?", "2", None, True))
        assert again.spent == 60 and len(server.asked) == 6
    with Server(cfg, tmp_path) as third:
        assert third.spent == 60


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(404, "The model `m` does not exist")], "The model `m` does not exist"),
        ([(401, f"Incorrect API key provided: {KEY}")], r"Incorrect API key provided: \*\*\*"),
        ([NO_TEMPERATURE, NO_TEMPERATURE], "'temperature' does not support 0.7"),
        ([NO_LIMIT, (400, "max_tokens is too large: 1024")], "max_tokens is too large"),
        ([b"<html>Welcome</html>"], "is no chat completion"), ([302], "302"),
    ],
)  # fmt: skip
def test_a_server_that_will_refuse_everything_is_refused(serve, tmp_path, answers, words):
    server, cfg = serve(*answers, retries=2)
    with Server(cfg, tmp_path) as critic, pytest.raises(CriticError, match=words) as error:
        critic.check(prompts.critique_messages("1+1?", "2", None, True))
    assert len(str(error.value).splitlines()) == 1 and KEY not in str(error.value)
    assert len(server.asked) == len(answers)


def test_a_server_that_is_not_there_is_refused_and_one_that_is_busy_is_not(serve, tmp_path):
    server, cfg = serve(503)
    with Server(cfg, tmp_path) as critic:
        assert "503" in critic.check(prompts.question_messages("1+1?")).fault
    server.shutdown()
    server.server_close()
    with Server(cfg, tmp_path) as critic, pytest.raises(CriticError, match="ConnectError"):
        critic.check(prompts.question_messages("1+1?"))


# ---- Secrets ----


def test_no_secret_stands_anywhere(serve, tmp_path):
    """A password of the URL, a key among its parameters, and a server that echoes whatever it was sent."""

    def echo(handler):
        sent = f"{handler.headers['authorization']} {handler.path} {handler.headers.get('api-key')}"
        body = json.dumps(said(f"You sent {sent}, and {KEY}. Conclusion: incorrect [END]")).encode()
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    server, cfg = serve(echo)
    url = cfg.base_url.replace("http://", "http://ann:pass-word-7@") + "?api-version=2024-10-21&code=query-secret"
    cfg = dataclasses.replace(cfg, base_url=url)
    (critique,), _, _ = criticise(cfg, tmp_path)
    assert critique.agrees and "***" in critique.text
    assert server.asked[0][0] == "/v1/chat/completions?api-version=2024-10-21&code=query-secret"
    basic = base64.b64encode(b"ann:pass-word-7").decode()
    assert f"Basic {basic}" in server.asked[0][1].values()
    shown = json.dumps(public(dataclasses.replace(Config(), api=cfg)))
    assert "api-version=2024-10-21" in shown and "127.0.0.1" in shown
    for secret in (KEY, "pass-word-7", "query-secret", basic):
        assert secret not in critique.text and secret not in shown
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_text()]


@pytest.mark.parametrize(
    "url", ["http://ann:pass/word@host/v1", "http://ann:p%23w@host:1/v1", "http://ann:x@[host/v1", "x"]
)
def test_a_url_that_cannot_be_is_refused_without_its_password(tmp_path, url):
    cfg = ApiConfig(base_url=url, model="m", key_variable="")
    if "%23" in url:
        assert public_url(url) == "http://***@host:1/v1"
        return
    with pytest.raises(CriticError, match=r"api.base_url = .*is needed") as error:
        Server(cfg, tmp_path)
    assert "word" not in str(error.value) and "ann:x" not in str(error.value)


def test_a_key_in_the_place_of_its_name_is_not_repeated(tmp_path):
    with pytest.raises(CriticError, match="name of an environment variable") as error:
        Server(ApiConfig(base_url="http://host/v1", model="m", key_variable=KEY), tmp_path)
    assert KEY not in str(error.value)


def test_a_server_without_a_key_keeps_its_words(serve, tmp_path):
    """What such a server is sent in the place of a key is an ordinary word, and no secret."""
    _, cfg = serve((400, "there is none of that"), key_variable="")
    _, totals, _ = criticise(cfg, tmp_path)
    assert "there is none of that" in totals.last_fault
