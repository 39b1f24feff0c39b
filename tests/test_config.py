"""Strict configuration: unknown, mistyped, clashing and unread keys."""

import ast
import pathlib

import pytest
from conftest import tiny_config

import cgrpo_jax
from cgrpo_jax import config
from cgrpo_jax.config import Config, ConfigError, check, from_config_dict

ROOT = pathlib.Path(cgrpo_jax.__file__).parent


def make(**changes):
    raw = config.default_config()
    fitting = {"data.max_prompt_tokens": 64, "refine.max_prompt_tokens": 128, "train.micro_batch": 1}
    raw.update_from_flattened_dict(fitting | changes)
    raw.sampling.max_new_tokens = changes.get("sampling.max_new_tokens", 64)
    return from_config_dict(raw)


def test_defaults_are_the_newest_paper():
    cfg = from_config_dict(config.default_config("critique_grpo"))
    assert cfg == Config()
    assert (cfg.train.samples, cfg.refine.k, cfg.refine.trigger, cfg.refine.select) == (
        7,
        1,
        "none_correct",
        "correct_then_random",
    )
    assert (cfg.refine.group, cfg.objective.gamma, cfg.objective.clip_eps, cfg.objective.weights) == (
        "append",
        0.1,
        0.2,
        "per_kind",
    )
    assert cfg.objective.clip_responses and cfg.objective.clip_refinements and not cfg.objective.divide_by_std
    assert (cfg.objective.aggregation, cfg.objective.kl_coef, cfg.objective.entropy_coef) == ("constant", 0.0, 0.0)
    assert (cfg.sampling.temperature, cfg.sampling.top_p, cfg.optimizer.learning_rate) == (1.0, 1.0, 1e-6)


def test_unknown_keys_suggest_the_nearest():
    raw = config.default_config().to_dict()
    raw["refine"]["triger"] = "always"
    with pytest.raises(ConfigError, match=r"config\.refine\.triger; did you mean 'trigger'"):
        from_config_dict(raw)
    with pytest.raises(ConfigError, match="did you mean 'dr_grpo'"):
        config.default_config("drgrpo")


@pytest.mark.parametrize("value", ["3", 2.5, True, None])
def test_types_are_checked(value):
    raw = config.default_config().to_dict()
    raw["train"]["steps"] = value
    with pytest.raises(ConfigError, match=r"config\.train\.steps"):
        from_config_dict(raw)


IMPOSSIBLE = [
    ({"refine.k": 0}, "refine.k"),
    ({"refine.k": 9, "train.samples": 7}, "refine.k"),
    ({"refine.trigger": "sometimes"}, "refine.trigger"),
    ({"sampling.max_new_tokens": 1000}, "exceeds the model's 1024 positions"),
    ({"train.updates_per_rollout": 3}, "train.updates_per_rollout"),
    ({"train.micro_batch": 5}, "train.micro_batch"),
    ({"refine.max_prompt_tokens": 64}, "refine.max_prompt_tokens"),
    ({"refine.critique": "worked"}, "worked"),
    ({"sampling.temperature": 0.0}, "sampling.temperature"),
    ({"train.samples": -1}, "train.samples"),
    ({"refine.group": "replace", "refine.k": 7}, "leaves no response"),
    ({"sampling.top_p": 0.0}, "top_p"),
    ({"eval.every": 5, "data.source": "a.jsonl"}, "eval.source"),
    ({"seed": -1}, "seed"),
    ({"objective.aggregation": "token_mean"}, "needs objective.weights=uniform"),
    ({"method": "sft", "eval.every": 1}, "method=sft has no evaluation"),
    ({"objective.clip_eps": 1.5}, "clip_eps"),
    ({"objective.entropy_coef": float("nan")}, "entropy_coef"),
]


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE)
def test_impossible_values_are_refused(changes, words):
    check(make(), tiny_config(), 1)
    with pytest.raises(ConfigError, match=words):
        check(make(**changes), tiny_config(), 1)


def test_all_faults_in_one_message():
    with pytest.raises(ConfigError) as error:
        check(make(**{"refine.k": 0, "optimizer.b2": 5.0, "refine.trigger": "sometimes"}), tiny_config(), 1)
    assert len(str(error.value).splitlines()) == 4  # the heading and the three


def test_modules_import_only_downwards():
    """objective imports no project module, rollout no jax; nothing imports train but its callers."""
    levels = [
        {
            "types",
            "model",
            "objective",
            "answers",
            "normalise",
            "statistics",
            "verifier",
            "verifier_worker",
            "progress",
            "sharding",
            "drawing",
            "shapes",
            "compilation",
        },
        {"hf_config", "prompts", "hf", "sampler", "equivalence", "eval_report"},
        {"tokenizer", "arithmetic", "learner", "choices"},
        {"critiques", "theoremqa", "batch", "checkpoints", "embedded_model", "metrics"},
        {"rewards"},
        {"rollout", "data", "generation"},
        {"evaluate", "tasks"},
        {"config"},
        {"setup"},
        {"train", "sft", "convert", "eval_tasks"},
        {"main", "bench"},
    ]
    level_of = {name: level for level, names in enumerate(levels) for name in names}
    inside_one_level = {("hf", "hf_config")}
    for path in ROOT.glob("*.py"):
        if path.stem == "__init__":
            continue
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cgrpo_jax"):
                names = (
                    [alias.name for alias in node.names] if node.module == "cgrpo_jax" else [node.module.split(".")[1]]
                )
                for name in names:
                    lower = level_of[name] < level_of[path.stem] or (path.stem, name) in inside_one_level
                    assert lower, f"{path.stem} imports {name}"
    assert "cgrpo_jax" not in (ROOT / "objective.py").read_text().replace("cgrpo_jax/", "").split('"""')[2]
    assert "import jax" not in (ROOT / "rollout.py").read_text()


def test_files_and_functions_stay_small():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 350, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (path.stem, node.name) != ("train", "train"):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
