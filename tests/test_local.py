"""A second model beside the policy: as critic and as refiner, with a tokenizer of its own."""

import itertools
import shutil

import jax
import numpy as np
import pytest
from conftest import QUICKSTART, engine_of
from second_model import write_twin
from test_hosts import Follower, Recorder, watched
from test_planning import compiled, is_within, shapes  # noqa: F401
from test_train import lines, small, without_times

from cgrpo_jax.errors import CheckpointError, ConfigError
from cgrpo_jax.generating import generate
from cgrpo_jax.model.hf_config import read_json, write_json
from cgrpo_jax.planner.programs import programs
from cgrpo_jax.records import LOCAL, POLICY, Kind, Name, Request
from cgrpo_jax.rollout import critics
from cgrpo_jax.rollout.collect import as_sampled
from cgrpo_jax.rollout.critics import verdict_of
from cgrpo_jax.rollout.stories import sample_all
from cgrpo_jax.run import build, resuming
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.training import train

BOTH = {"refine.critique": "local", "refine.refiner": "local", "refine.trigger": "always", "refine.critique_tokens": 24}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return write_twin(tmp_path_factory.mktemp("twin") / "model")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    return write_twin(tmp_path_factory.mktemp("shallow") / "model", layers=2)


def greedy(workdir, **changes):
    """What one step samples without chance: (text, reward, critique) of each problem, and the metrics."""
    fixed = {"method": "generate", "sampling.temperature": 0.0, "local.temperature": 0.0, "train.steps": 1}
    with jax.numpy_rank_promotion("allow"):
        generate(
            small(**fixed | {"refine.trigger": "always", "train.prompts": 4, "train.samples": 1} | changes), workdir
        )
    groups = lines(workdir / "rollouts/000001.jsonl")
    texts = [[(a["text"], a["reward"], a.get("critique")) for a in g["responses"] + g["refinements"]] for g in groups]
    return texts, lines(workdir / "metrics.jsonl")[0]


def test_a_twin_refines_as_the_policy_does(twin, tmp_path):
    """Its ids are in another order: read or written with the policy's tokenizer nothing would be right."""
    assert Tokenizer(twin).encode_text("1+2") != Tokenizer(QUICKSTART).encode_text("1+2")
    own, one = greedy(tmp_path / "own")
    others, other = greedy(tmp_path / "twin", **{"refine.refiner": "local", "local.path": str(twin)})
    assert others == own and [len(group) for group in own] == [2] * 4 and any(group[1][1] for group in own)
    assert other["tokens/refinements"] == one["tokens/refinements"]


def test_a_twin_criticises_as_the_policy_does(twin, tmp_path, monkeypatch):
    """Shown the ground truth as `self_gt` is. It is not trained for that: no verdict, so a template stands in."""
    texts = []

    def noted(text, finished):
        texts.append(text)
        return verdict_of(text, finished)

    monkeypatch.setattr(critics, "verdict_of", noted)
    changes = {"refine.critique_tokens": 24, "refine.critique_tries": 2}
    own, one = greedy(tmp_path / "own", **changes | {"refine.critique": "self_gt"})
    local = {"refine.critique": "local", "local.reference": "gt", "local.path": str(twin)}
    others, other = greedy(tmp_path / "twin", **changes | local)
    assert others == own and other["tokens/critiques"] == one["tokens/critiques"] > 0
    assert one["critique/tries"] == 2 and one["critique/fallback"] == 1
    half = len(texts) // 2
    assert sorted(texts[:half]) == sorted(texts[half:]) and half >= 8 and len(set(texts)) > 2


@pytest.mark.thorough
def test_the_policy_samples_the_same_beside_a_second_model(shallow, tmp_path):
    """Tokens follow from names: who else decodes changes none. And every row is of the model it was asked of."""
    seen = []
    with jax.numpy_rank_promotion("allow"), pytest.MonkeyPatch.context() as patched:
        train(small(**{"refine.trigger": "always", "train.steps": 1}), tmp_path / "alone")
        watched(patched, seen)
        train(small(**BOTH | {"local.path": str(shallow), "train.steps": 1}), tmp_path / "beside")
    one, other = (lines(tmp_path / name / "rollouts/000001.jsonl") for name in ("alone", "beside"))
    for a, b in zip(one, other, strict=True):
        assert [r["text"] for r in a["responses"]] == [r["text"] for r in b["responses"]]
    tokenizers = {POLICY: Tokenizer(QUICKSTART), LOCAL: Tokenizer(shallow)}
    asked = [row[1:3] for row in seen if row[0] == "request"]
    for name, ids in asked:
        reader = tokenizers[POLICY if name[0] == Kind.RESPONSE else LOCAL]
        assert reader.hf.decode(ids).startswith("<|im_start|>system\nYou are a ")
    assert {name[0] for name, _ in asked} == {Kind.RESPONSE, Kind.CRITIQUE, Kind.REFINEMENT}


def test_the_second_models_weights_serve_every_step():
    run = build.open_run(small(**{"refine.critique": "local", "local.path": str(QUICKSTART), "local.top_p": 1.0}))
    with jax.numpy_rank_promotion("allow"):
        weights = run.second.synced()
        asked = [
            Request(Name(Kind.CRITIQUE, 0, g), run.policy.tokenizer.encode_text("What is 1+1?"), 8) for g in range(4)
        ]
        bound = sample_all(engine_of(run.second.sampler, run.policy.weights(), 5, run.second.sampling), asked)
        first, moved = (sample_all(run.second.engine(weights, step), asked) for step in (0, 5))
    assert [one.ids.tolist() for one in moved] == [one.ids.tolist() for one in bound]
    assert [one.ids.tolist() for one in moved] != [one.ids.tolist() for one in first]


@pytest.mark.thorough
def test_a_run_with_a_second_model_resumes_to_the_bit(shallow, tmp_path):
    changes = BOTH | {"local.path": str(shallow)}
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), tmp_path / "whole")
        train(small(**changes | {"train.steps": 1}), tmp_path / "w")
        train(small(**changes), tmp_path / "w")
    metrics = [without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "w")]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 2 and metrics[0][0]["tokens/critiques"] > 0
    for step in (1, 2):
        name = f"rollouts/{step:06d}.jsonl"
        assert (tmp_path / "w" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    write_twin(tmp_path / "other")
    moved = {"local.path": str(tmp_path / "other"), "train.steps": 3}
    with pytest.raises(ConfigError, match=r"local.weights = .*: another second model, by content"):
        train(small(**changes | moved), tmp_path / "w")


def test_both_models_are_compared_by_their_files(twin, tmp_path):
    """A side file that differs is another second model, and another weight is; neither is another policy."""
    shutil.copytree(twin, tmp_path / "model")
    cfg = small(**BOTH | {"local.path": str(tmp_path / "model")})
    found = [resuming.contents_of(build.open_run(cfg))]
    for name in ("generation_config.json", "other.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
        found.append(resuming.contents_of(build.open_run(cfg)))
    changed = [{key for key in one if one[key] != other[key]} for one, other in itertools.pairwise(found)]
    assert changed == [{"local.files"}, {"local.weights"}]


@pytest.mark.thorough
def test_a_follower_does_what_its_leader_did(shallow, tmp_path, monkeypatch):
    recorder, leader, follower = Recorder(), [], []
    cfg = small(**BOTH | {"local.path": str(shallow)})
    for seen, hosts in ((leader, recorder), (follower, None)):
        with jax.numpy_rank_promotion("allow"), monkeypatch.context() as patched:
            watched(patched, seen)
            train(cfg, tmp_path / str(len(follower)), hosts or Follower(recorder.told))
    assert follower == leader and len(leader) > 20


@pytest.mark.thorough
def test_no_program_compiles_that_is_not_listed(shallow, tmp_path, compiled):  # noqa: F811
    cfg = small(**BOTH | {"local.path": str(shallow)})
    run = build.open_run(cfg)
    listed, names = {}, []
    for program in programs(run, build.bin_sizes(run, 64)):
        listed.setdefault(program.function.__name__, []).append(shapes(program))
        names.append(program.name)
    assert len(names) == len(set(names)) and any(name.startswith("local_decode/") for name in names)
    alone = programs(build.open_run(small()), build.bin_sizes(run, 64))
    assert len(names) > len(alone) and not any(program.name.startswith("local_") for program in alone)
    compiled.clear()
    with jax.numpy_rank_promotion("allow"):
        train(cfg, tmp_path / "w")
    for name, found in compiled:
        assert any(is_within(found, of) for of in listed[name]), f"{name} {found}"


def test_a_text_is_read_anew():
    """The end is the reader's own; what is too long is cut and has none; what was cut gets none."""
    tokenizer = Tokenizer(QUICKSTART)
    text = tokenizer.encode_text("1+2=3")
    whole = as_sampled(tokenizer, "1+2=3", len(text) + 1)
    assert whole.ids.tolist() == [*text, tokenizer.end_id] and whole.finished and whole.ids.dtype == np.int32
    cut = as_sampled(tokenizer, "1+2=3", len(text))
    assert cut.ids.tolist() == text and not cut.finished
    stopped = as_sampled(tokenizer, "1+2=3", 9, ended=False)
    assert stopped.ids.tolist() == text and not stopped.finished and len(stopped.logp) == len(text)


def test_a_second_model_that_cannot_serve_is_refused(twin, tmp_path):
    """In one line that names the key, before any weight is read."""
    short = write_twin(tmp_path / "short")
    write_json(short / "config.json", read_json(short / "config.json") | {"max_position_embeddings": 300})
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, error, words in (
        ("", ConfigError, "need the second model: local.path"),
        (str(tmp_path / "none"), CheckpointError, "local.path = .*: no such folder"),
        (str(empty), CheckpointError, "config.json"),
        (str(short), ConfigError, r"local.path = .* 256 \+ .* 64 exceeds that model's 300 positions"),
    ):
        with pytest.raises(error, match=words) as raised:
            build.open_run(small(**{"refine.critique": "local", "local.path": path}))
        assert len(str(raised.value).splitlines()) == 1
    unused = build.open_run(small(**{"local.path": str(tmp_path / "none")}))
    assert unused.second is None
