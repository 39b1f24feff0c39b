"""Every named method runs, and every option that a method sets has an effect; critics that ask a model, end to end."""

import dataclasses

import jax
import pytest
from conftest import QUICKSTART
from test_served import KEY, serve  # noqa: F401
from test_train import lines, small

from cgrpo_jax.config import METHODS, default_config, from_config_dict
from cgrpo_jax.config.files import get_config
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.model.hf_config import config_from_hf
from cgrpo_jax.run.checks import check
from cgrpo_jax.training import train

# run at length by other tests: the first ones by those of the loop and of its critic, the rest by test_baselines.py
ELSEWHERE = ["critique_grpo", "critique_grpo_text", "dr_grpo"] + [
    name for name, changes in METHODS.items() if "method" in changes
]


def named(name):
    """For a first look one is enough."""
    return pytest.param(name, marks=[] if name == "luffy" else pytest.mark.thorough)


def run(workdir, **changes):
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), workdir)
    return lines(workdir / "metrics.jsonl"), lines(workdir / "rollouts" / "000001.jsonl")


@pytest.mark.parametrize("name", METHODS)
def test_each_method_fits_the_quickstart(name):
    """Its options are all there, none clashes, and each that it sets differs from the default."""
    named = get_config(f"quickstart:{name}")
    named.local.path = str(QUICKSTART)
    cfg = from_config_dict(named)
    check(cfg, config_from_hf(QUICKSTART))
    plain = default_config()
    for key, value in METHODS[name].items():
        holder = plain
        for part in key.split("."):
            holder = holder[part]
        assert holder != value, (name, key)


@pytest.mark.parametrize("name", [named(name) for name in METHODS if name not in ELSEWHERE])
def test_each_method_runs_two_steps(tmp_path, name):
    """The warm-started model with two problems."""
    changes = (
        {"local.path": str(QUICKSTART)}
        | METHODS[name]
        | {"train.samples": 4, "refine.k": min(4, METHODS[name].get("refine.k", 1))}
    )
    if changes.get("refine.own_group"):
        changes |= {"refine.trigger": "any_wrong", "refine.max_prompt_tokens": 448}  # something to refine, and room
    metrics, groups = run(tmp_path, **changes | {"checkpoint.every": 2, "refine.critique_tokens": 32})
    assert [row["step"] for row in metrics] == [1, 2]
    rows = {len(group["kept"]) + len(group["selected"]) for group in groups}
    trigger, replaced = changes.get("refine.trigger"), changes.get("refine.group") == "replace"
    if trigger == "always":
        assert rows == {4 if replaced else 4 + changes["refine.k"]}
        assert all(row["refine/rate"] == 1 for row in metrics)
    if trigger == "never":
        assert rows == {4} and all(row["refine/rate"] == 0 for row in metrics)
    if changes.get("refine.own_group"):
        refined = [group for group in groups if group["refinements"]]
        assert refined and all(len(group["refinements"]) == 4 and len(group["selected"]) == 1 for group in refined)
        assert all(row["refine/no_room"] == 0 for row in metrics)
    if changes.get("objective.kl_coef"):
        assert all("policy/kl" in row for row in metrics)


def test_a_server_criticises_a_run(tmp_path, serve, monkeypatch):  # noqa: F811
    """Refinements stand under its critiques; what it said is on file; a second run pays for the first try alone."""
    server, api = serve("The tens are wrong. Conclusion: incorrect [END]")
    changes = {f"api.{name}": value for name, value in dataclasses.asdict(api).items()}
    changes |= {"refine.critique": "api", "refine.trigger": "any_wrong", "data.source": "arithmetic", "train.steps": 1}
    metrics, groups = run(tmp_path / "a", **changes)
    criticised = [a for group in groups for a in group["responses"] if "critique" in a]
    assert criticised and metrics[0]["api/requests"] == len(server.asked) == len(criticised) + 1  # it is tried first
    assert {a["critique"] for a in criticised} == {"The tens are wrong. Conclusion: incorrect"}
    assert metrics[0]["critique/agreement"] == 1 and metrics[0]["api/faults"] == 0
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "critiques").rename(tmp_path / "b" / "critiques")
    again, _ = run(tmp_path / "b", **changes)
    assert again[0]["api/cached"] == len(criticised) and again[0]["api/requests"] == 1
    assert len(server.asked) == len(criticised) + 2 and again[0]["loss/total"] == metrics[0]["loss/total"]


def test_an_unknown_method_is_named():
    with pytest.raises(ConfigError, match="did you mean 'dr_grpo'"):
        default_config("drgrpo")
