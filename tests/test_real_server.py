"""A critic behind a URL against a server that others wrote: `transformers serve` with SmolLM2, on loopback."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest

from cgrpo_jax.config.options import ApiConfig, RefineConfig
from cgrpo_jax.records import Attempt, Problem
from cgrpo_jax.rollout.collect import Posed
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.written import by_server
from cgrpo_jax.text import prompts
from cgrpo_jax.text.tokenizer import Tokenizer

NEEDED = ("torch", "fastapi", "uvicorn", "accelerate", "transformers.cli")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
LISTENING = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
SECONDS = 120.0  # until it listens or answers, at most; on a busy machine
TOKENS = 8  # of a critique
QUESTION = "What is 23+46?"
PROBLEM = Problem(QUESTION, "69", prompts.question_messages(QUESTION), "exact")
WRONG = [(g, Attempt(None, f"It is {g}.", 0.0, False, None, "ok")) for g in range(3)]


@contextlib.contextmanager
def serving(model, folder):
    """The base URL of `transformers serve`, which runs until the context is left; it chooses its port."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", "0"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},  # threads that spin starve what else runs
        )
    try:
        until, found = time.monotonic() + SECONDS, None
        while found is None:
            said = (folder / "server.log").read_text(errors="replace")
            assert server.poll() is None and time.monotonic() < until, said[-2000:]
            found = LISTENING.search(said)
            time.sleep(0.1)
        yield f"http://127.0.0.1:{found[1]}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture
def sampled(smollm2, tmp_path):
    """SmolLM2 as a folder whose own settings say that it is sampled: without them the server takes the likeliest."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in smollm2.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"do_sample": True}
    path.unlink()
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_a_real_server_criticises(sampled, tmp_path):
    """It reads the prompt as the model's own template has it; what it said stays on file when it is gone."""
    tokenizer = Tokenizer(sampled)
    read = sum(len(tokenizer.encode_chat(prompts.critique_messages(QUESTION, a.text, None, True))) for _, a in WRONG)
    cache = tmp_path / "critiques"

    def criticised(url, attempts):
        cfg = ApiConfig(base_url=url, model=str(sampled), key_variable="", tokens=TOKENS, seconds=SECONDS, retries=0)
        with Server(cfg, cache) as server:
            brief = Brief(RefineConfig(critique="api", critique_tries=1))
            story = by_server(server, brief, Posed(PROBLEM, 0, 0), attempts)
            with pytest.raises(StopIteration) as end:
                story.send(next(story).call())
            return end.value.value, server.take_totals()

    with serving(sampled, tmp_path) as url:
        found, totals = criticised(url, WRONG)
    assert (totals.requests, totals.cached, totals.faults) == (3, 0, 0), totals.last_fault
    assert read + len(WRONG) <= totals.tokens <= read + len(WRONG) * TOKENS
    assert sum(critique.tokens for critique in found) == totals.tokens - read
    kept = [json.loads(path.read_text())["text"] for path in cache.glob("*/*.json")]
    assert len(kept) == 3 and all(text.strip() for text in kept)
    for critique in found:  # whether this small model concludes is its own affair
        assert critique.fallback is (not critique.agrees) and critique.text

    again, totals = criticised(url, WRONG)
    assert again == found and (totals.requests, totals.cached) == (0, 3)
    other = [(0, Attempt(None, "It is 9.", 0.0, False, None, "ok"))]
    (critique,), totals = criticised(url, other)
    assert critique.fallback and totals.faults == 1 and "connection" in totals.last_fault.lower()
