"""Options without effect: each has its row, what a row says is so, and a run says it."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import QUICKSTART
from test_train import small

from cgrpo_jax import config
from cgrpo_jax.learning import credit
from cgrpo_jax.learning.objective import Tokens, token_loss
from cgrpo_jax.records import Attempt, Completion, Group, Problem
from cgrpo_jax.run import beginning, build
from cgrpo_jax.run.effects import TABLE, without_effect
from cgrpo_jax.workdir.changes import flat


def test_each_option_stands_in_one_row():
    listed = [key for row in TABLE for key in row.keys.split()]
    assert sorted(listed) == sorted(flat(dataclasses.asdict(config.Config())))
    assert [row.needs for row in TABLE].count("") == 1


def made(**changes):
    raw = config.default_config()
    with raw.ignore_type():
        raw.update_from_flattened_dict({"data.source": "openai/gsm8k:main"} | changes)
    return config.from_config_dict(raw)


SILENT = [  # an option, what makes it idle, what gives it its effect
    ("api.model", "m", {}, {"refine.critique": "api"}),
    ("api.spend_cap", 5.0, {"refine.critique": "api"}, {"refine.critique": "api", "api.price_written": 1.0}),
    ("local.path", "a/b", {}, {"refine.critique": "local"}),
    ("local.top_p", 0.9, {"refine.refiner": "local", "local.temperature": 0.0}, {"refine.refiner": "local"}),
    ("objective.gamma", 0.3, {"objective.refined_shape": "ratio"}, {}),
    ("objective.clip_high", 0.28, {}, {"train.updates_per_rollout": 2}),
    ("objective.kl_limit", 10.0, {}, {"objective.kl_coef": 0.1}),
    ("eval.source", "a/b", {"eval.every": 0}, {"eval.every": 5}),
    ("eval.split", "dev", {"eval.every": 5, "eval.source": "a.jsonl"}, {"eval.every": 5}),
    ("eval.tasks", "gsm8k", {"eval.every": 0}, {"eval.every": 5}),
    ("eval.top_p", 0.9, {"eval.every": 5, "eval.temperature": 0.0}, {"eval.every": 5}),
    ("refine.k", 3, {"refine.trigger": "never"}, {}),
    ("refine.critique_tries", 5, {}, {"refine.critique": "self_gt"}),
    ("refine.critique_fallback", "drop", {"refine.critique": "self_eval"}, {"refine.critique": "self_gt"}),
    ("reward.partial", True, {"data.source": "reasoning_gym:lcm", "reward.fn": "a:b"}, {"data.source": "reasoning_gym:lcm"}),
    ("reward.correct_at", 0.5, {}, {"reward.fn": "a:b"}),
    ("reward.seconds", 5.0, {}, {"reward.fn": "a:b"}),
    ("data.split", "dev", {"data.source": "a.jsonl"}, {}),
    ("data.grader", "math_verify", {"data.source": "arithmetic"}, {}),
    ("data.grader", "math_verify", {"reward.fn": "a:b"}, {"reward.fn": "a:b", "eval.every": 5, "eval.tasks": "aime24"}),
    ("data.source", "a.jsonl", {"method": "eval"}, {}),
    ("model.revision", "abc", {"model.path": str(QUICKSTART)}, {"model.path": "a/b"}),
    ("optimizer.final_fraction", 0.1, {}, {"optimizer.schedule": "cosine"}),
    ("optimizer.learning_rate", 1e-3, {"method": "generate"}, {}),
    ("generate.rows", "both", {}, {"method": "generate"}),
    ("sampling.top_k", 5, {"method": "sft"}, {}),
    ("train.replacements", 5, {"method": "generate"}, {}),
    ("texts.critique", "a:b", {}, {"refine.critique": "self_gt"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "idle", "read"), SILENT)
def test_what_was_silent_is_said(key, value, idle, read):
    assert not without_effect(made())
    told = [line for line in without_effect(made(**idle | {key: value})) if f"{key} = {value!r}" in line]
    assert len(told) == 1 and told[0].startswith("without effect: ") and "needed for that: " in told[0]
    assert not [line for line in without_effect(made(**read | {key: value})) if key in line]


def test_what_a_named_method_sets_is_not_held_against_it():
    for method in config.METHODS:
        cfg = config.from_config_dict(config.default_config(method))
        assert not without_effect(cfg), method
    assert "objective.kl_limit = 10.0" in "".join(without_effect(made(**{"objective.kl_limit": 10.0})))


def test_a_run_says_it():
    said = beginning.lines(build.open_run(small(**{"api.model": "m", "api.tokens": 5, "local.path": "x"})))
    assert [line for line in said if line.startswith("without effect: api.model = 'm', api.tokens = 5; needed")]
    assert [line for line in said if line.startswith("without effect: local.path = 'x'; needed")]


T = 6


def group_of(rewards, refined, rng):
    def attempt(reward):
        logp = rng.uniform(-3.0, -0.02, T).astype(np.float32)
        done = Completion(np.arange(T), logp, np.ones(T, np.float32), True)
        return Attempt(done, "", reward, reward == 1, None, "ok")

    responses, refinements = tuple(map(attempt, rewards)), tuple(map(attempt, refined))
    return Group(
        Problem("", "", ()), [1], responses, refinements, tuple(range(len(rewards))), tuple(range(len(refined)))
    )


def loss_of(cfg):
    """Value and gradient of the loss on two groups; of several updates, of the second."""
    rng = np.random.default_rng(0)
    never = cfg.refine.trigger == "never"
    groups = [group_of([1, 0, 0], [] if never else [1], rng), group_of([1, 1, 0], [] if never else [0], rng)]
    segments = credit.segments(groups, cfg.objective, 16.0)
    terms, rows = build.terms(cfg), len(segments)
    logp, old, ref = (rng.uniform(-3.0, -0.02, (rows, T)).astype(np.float32) for _ in range(3))

    def stacked(name, there=True):
        return np.stack([getattr(one, name) for one in segments]).astype(np.float32) if there else None

    tokens = Tokens(
        np.ones((rows, T), bool), np.stack([np.full(T, one.refined) for one in segments]), stacked("pg_T"),
        stacked("ce_T", terms.ce), stacked("ent_T", terms.ent), stacked("kl_T", terms.kl),
        old if cfg.train.updates_per_rollout > 1 else None, ref if terms.kl else None,
        stacked("sampler_logp_T"), np.ones((rows, T), np.int32),
    )  # fmt: skip
    entropy = rng.uniform(0.1, 2.0, (rows, T)).astype(np.float32)
    value, slope = jax.value_and_grad(lambda x: token_loss(x, entropy, tokens, cfg.objective)[0])(logp)
    return np.append(np.asarray(slope), float(value))


SEVERAL, NEVER = {"train.updates_per_rollout": 2}, {"refine.trigger": "never"}
SHAPES = [
    {"objective.refined_shape": shape} for shape in ("probability", "ratio", "log_probability", "ratio_to_sampler")
]
OTHERS = {
    "objective.gamma": 0.4, "objective.clip_eps": 0.05, "objective.clip_high": 0.4, "objective.clip_responses": False,
    "objective.clip_refinements": False, "objective.kl_limit": 0.5, "objective.correction_limit": 1.2,
    "objective.entropy_mean": "token_mean", "objective.baseline": "responses", "objective.refined_shape": "probability",
}  # fmt: skip
BASES = [
    {}, SEVERAL, NEVER, NEVER | SEVERAL, *SHAPES, *[shape | SEVERAL for shape in SHAPES],
    {"objective.kl_coef": 0.1}, {"objective.entropy_coef": 0.1}, {"objective.correction": "token"},
]  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_the_loss_does_what_the_table_says(base):
    """An option is called idle exactly where another value of it leaves loss and gradient as they are, to the bit."""
    before = loss_of(made(**base))
    for key, value in OTHERS.items():
        if base.get(key) == value:
            continue
        cfg = made(**base | {key: value})
        idle = any(f"{key} = " in line for line in without_effect(cfg))
        assert idle == np.array_equal(loss_of(cfg), before), key
