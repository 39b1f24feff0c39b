"""A critic that is slow to answer keeps nobody else waiting: what is decoded meanwhile, and how well rows are used."""

import dataclasses
import functools
import threading

import jax
import pytest
from conftest import engine_of
from test_served import GOOD, serve  # noqa: F401
from test_train import small

from cgrpo_jax.config.options import RefineConfig
from cgrpo_jax.data import arithmetic
from cgrpo_jax.records import Attempt, Critique, Kind
from cgrpo_jax.rollout.collect import Method, by_rule, groups_of, stories_of
from cgrpo_jax.rollout.critics import TEMPLATES, Brief, templated
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.stories import run_stories
from cgrpo_jax.rollout.written import by_server
from cgrpo_jax.run import build
from cgrpo_jax.sampling.room import Room

SAMPLES, PROBLEMS, ROWS, SECONDS = 2, 6, 4, 60.0


class Watched:
    """Stories that write down what is asked and what ended, and call `idle` when nothing is left to decode."""

    def __init__(self, stories, idle):
        self.stories, self.idle, self.events, self.late = stories, idle, [], 0

    def ended(self, done):
        self.events += [("ended", request.name) for request, _ in done]
        self.stories.ended(done)

    def due(self, idle):
        if idle and self.events:
            self.idle()
        asked = self.stories.due(idle)
        self.events += [("asked", request.name) for request in asked.requests]
        return asked


def wrong(items, step):
    return [Attempt(c, text, 0.0, False, None, "ok") for _, c, text in items]


def only_first(critic):
    """`critic` for the first problem; the others are told at once that they are wrong."""
    at_once = functools.partial(templated, TEMPLATES["indicative"])

    def either(posed, attempts):
        return (critic if posed.number == 0 else at_once)(posed, attempts)

    return either


def nobody(posed, attempts):
    yield from ()
    return [Critique(None) for _ in attempts]


@pytest.fixture(scope="module")
def run():
    return build.open_run(small())


def decoded(run, critic, idle):
    """Events, groups and counts of one rollout of the quickstart model; `idle` is also given the counts by then."""
    refine = RefineConfig(trigger="always", critique="api", max_prompt_tokens=256)
    scorer = functools.partial(by_rule, wrong, run.policy.tokenizer)
    method = Method(SAMPLES, scorer, only_first(critic), run.policy.tokenizer, refine, seed=0)
    problems = [arithmetic.problem(0, "train", index) for index in range(PROBLEMS)]
    setup = dataclasses.replace(run.policy.sampler, room=Room(ROWS, 4096), chunk=8)
    with jax.numpy_rank_promotion("allow"):
        engine = engine_of(setup, run.policy.weights(), 0, run.cfg.sampling)
        with stories_of(problems, method, 0) as stories:
            watched = Watched(stories, lambda: idle(dataclasses.replace(engine.stats)))
            run_stories(watched, [engine])
    return watched.events, groups_of(stories), stories.late


def test_a_slow_critic_slows_no_other_problem(run, serve, tmp_path):  # noqa: F811
    """Its answer comes when there is nothing else to decode, however long that takes; until then each row-step is as
    without that critic, and the refinements that it allows are decoded after it."""
    nothing_left, waits, used = threading.Event(), [], []
    _, cfg = serve(GOOD)

    class Slow(Server):
        def ask(self, messages, attempt):
            waits.append(nothing_left.wait(SECONDS))
            return super().ask(messages, attempt)

    def idle(stats):
        used.append(stats)
        nothing_left.set()

    with Slow(cfg, tmp_path) as server:
        events, groups, late = decoded(
            run, functools.partial(by_server, server, Brief(RefineConfig(critique="api"))), idle
        )
    assert waits == [True] * SAMPLES and late == 0
    assert [len(group.refinements) for group in groups] == [SAMPLES] * PROBLEMS

    own = {("asked", name) for _, name in events if name.problem == 0 and name.kind == Kind.REFINEMENT}
    first = min(i for i, event in enumerate(events) if event in own)
    last_response = max(
        i for i, (what, name) in enumerate(events) if what == "ended" and name[:2] == (Kind.RESPONSE, 0)
    )
    meanwhile = [name for what, name in events[last_response + 1 : first] if what == "ended"]
    assert len(own) == SAMPLES and len(events[:first]) == 2 * (2 * PROBLEMS - 1) * SAMPLES
    assert len(meanwhile) > 2 * SAMPLES and all(name.problem for name in meanwhile)

    plain = []
    decoded(run, nobody, plain.append)
    assert used[0] == plain[0] and used[0].slot_use > 0.7 and used[0].tokens > 100
