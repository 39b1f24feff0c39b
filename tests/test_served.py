"""A critic behind a URL, against a server that behaves, and one that does not."""

import dataclasses
import http.server
import json
import threading
import time

import pytest

from cgrpo_jax.options import ApiConfig, RefineConfig
from cgrpo_jax.records import Attempt, Problem
from cgrpo_jax.rollout.served import CriticError, Server, by_server
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
        if isinstance(what, int):
            status, headers, text = (
                what,
                {"Retry-After": "0.3"},
                json.dumps({"error": {"message": f"no {KEY} for you"}}),
            )
        elif what == "hang":
            time.sleep(1.5)
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
        server.script, server.asked, server.lock, server.now, server.most = list(script), [], threading.Lock(), 0, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
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
        story = by_server(server, RefineConfig(critique="api", **refine))(
            PROBLEM, 0, [(g, WRONG) for g in range(attempts)]
        )
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
    assert critique.fallback and critique.text == "The generated solution is incorrect, the ground truth is 69."
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
    assert critique.agrees and critique.tries == 2 and totals.requests == 2 and critique.tokens == 240
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
    story_of = by_server(reached := Server(cfg, tmp_path), RefineConfig(critique="api"))
    attempts = [(g, dataclasses.replace(WRONG, text=f"It is {g}.")) for g in range(8)]
    with reached, pytest.raises(StopIteration) as end:
        story = story_of(PROBLEM, 0, attempts)
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
