"""The whole loop on the embedded model: what it writes, resume, export, refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import datasets
import jax
import numpy as np
import pytest
from conftest import QUICKSTART

from cgrpo_jax import config, convert
from cgrpo_jax.config import options
from cgrpo_jax.config.options import VerifierConfig
from cgrpo_jax.data import sources
from cgrpo_jax.errors import TrainingError
from cgrpo_jax.generating import generate
from cgrpo_jax.grading.verifier import Reading, Verifier
from cgrpo_jax.learning.objective import Tokens, token_loss
from cgrpo_jax.learning.update import make_optimizer
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Attempt, Completion, Kind, Name, Problem
from cgrpo_jax.rollout.client import Answer
from cgrpo_jax.rollout.critics import Brief, OwnCritic
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.rollout.written import SampledCritic, criticised
from cgrpo_jax.run import build, effects
from cgrpo_jax.run.opening import load_data
from cgrpo_jax.run.plugins import open_rewards
from cgrpo_jax.text.prompts import question_messages
from cgrpo_jax.training import train
from cgrpo_jax.workdir.shades import read_widths


def small(**changes):
    """Two problems, three responses, two steps of the quickstart."""
    raw = config.default_config("critique_grpo")
    raw.model.path = "package://quickstart"
    raw.data.source = "arithmetic"
    raw.data.max_prompt_tokens, raw.refine.max_prompt_tokens = 64, 256
    raw.sampling.max_new_tokens, raw.sampler.kv_cache_mb = 64, 8.0
    raw.train.steps, raw.train.prompts, raw.train.samples, raw.train.micro_batch = 2, 2, 3, 1
    raw.optimizer.learning_rate = 1e-3
    raw.checkpoint.every = 1
    raw.verifier.workers = 1
    raw.update_from_flattened_dict(changes)
    return config.from_config_dict(raw)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k and "_per_s" not in k} for row in rows]


def weights(workdir, tmp_path, name):
    convert.convert(str(workdir), "hf", str(tmp_path / name))
    from safetensors.numpy import load_file

    return load_file(tmp_path / name / "model.safetensors")


METRICS = [
    "reward/responses",
    "reward/refinements",
    "refine/rate",
    "refine/success",
    "problems/solve_all",
    "problems/solve_none",
    "policy/entropy",
    "length/responses",
    "truncated/responses",
    "loss/responses",
    "loss/refinements",
    "policy/refined_prob",
    "policy/clipped",
    "policy/clipped_refinements",
    "tokens/trained",
    "policy/grad_norm",
    "sampler/logp_diff_mean",
    "sampler/logp_diff_max",
    "seconds/sample",
    "sampler/slot_use",
    "seconds/update",
    "tokens_per_s/sample",
    "tokens_per_s/update",
    "verifier/timeouts",
]


CHECKING = ("cgrpo_jax.config", "cgrpo_jax.config.options", "cgrpo_jax.run.checks", "cgrpo_jax.run.effects")


def record_reads(monkeypatch, read):
    """Notes each configuration leaf that the program reads, other than to check, compare, hash or print it."""

    def watch(cls: type, prefix: str):
        plain = cls.__getattribute__

        def noting(self, name):
            caller = sys._getframe(1)
            inside = caller.f_globals.get("__name__", "")
            handed_on = caller.f_code.co_name in ("reference_of", "stop_texts")  # to the critic, to the tokenizer
            checks = inside in CHECKING and not handed_on
            if inside.startswith("cgrpo_jax") and not checks and caller.f_code.co_filename != "<string>":
                read.add(prefix + name)
            return plain(self, name)

        monkeypatch.setattr(cls, "__getattribute__", noting)

    watch(config.Config, "")
    for field in dataclasses.fields(config.Config):
        inner = getattr(config.Config(), field.name)
        if dataclasses.is_dataclass(inner):
            watch(type(inner), f"{field.name}.")


EVALUATED = {"eval.every": 1, "eval.problems": 8, "eval.samples": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with evaluation, and which configuration leaves it read."""
    workdir, read = tmp_path_factory.mktemp("run") / "w", set()
    jax.clear_caches()  # what is static is read where a program is traced, which an earlier test may have done
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        jax.numpy_rank_promotion("allow"),
    ):  # Orbax, optax: not ours to judge
        record_reads(monkeypatch, read)
        train(small(**EVALUATED), workdir)
    (workdir / "read.json").write_text(json.dumps(sorted(read)))
    return workdir


def ask_critics(folder):
    """The policy as a critic, and a server that says nothing of use."""
    run, refine = build.open_run(small()), options.RefineConfig(critique="self_gt")
    asking = small(**{"refine.critique": "api"})
    problem, attempt = asked_problem(), Attempt(None, "It is 70.", 0.0, False, None, "ok")
    writer = SampledCritic(Brief(refine, "gt"), run.policy.tokenizer)
    assert writer.request(problem, Name(Kind.CRITIQUE, 0, 0), attempt.text) is not None
    with Server(options.ApiConfig("http://127.0.0.1:9/v1", "m", key_variable=""), folder / "critiques") as server:
        client, server._client = server._client, SimpleNamespace(send=lambda _: Answer(True, "Who knows."))
        assert criticised(server, Brief(asking.refine, config.reference_of(asking)), problem, attempt).fallback
        server._client = client
    empty = Completion(np.zeros(0, np.int32), *[np.zeros(0, np.float32)] * 2, True)
    with UserProcess() as process:
        process.load("math:sqrt")
        fails = OwnCritic(process.call, dataclasses.replace(refine, critique_fn="math:sqrt"), print)
        assert fails.texts(problem, [dataclasses.replace(attempt, completion=empty)], 0) == [None]
        open_rewards(small(**{"reward.fn": "math:sqrt"}), process, print).grade([(problem, empty, "")])


def asked_problem():
    return Problem("What is 23+46?", "69", question_messages("What is 23+46?"), "exact")


@pytest.mark.thorough
def test_every_key_is_read(finished, tmp_path, monkeypatch):
    """By the run, or where the run has no use for it: a file, the hub, another source of evaluation, a cosine, a KL."""
    read = set(json.loads((finished / "read.json").read_text()))
    record_reads(monkeypatch, read)
    make_optimizer(options.OptimizerConfig(schedule="cosine"), 5)
    one, yes = np.ones((1, 1), np.float32), np.ones((1, 1), bool)
    token_loss(one, one, Tokens(yes, yes, one, kl_BT=one, ref_logp_BT=one), options.ObjectiveConfig())
    corrected = Tokens(yes, yes, one, sampler_logp_BT=one, segment_BT=yes.astype(np.int32))
    token_loss(one, one, corrected, options.ObjectiveConfig(correction="token"))
    ask_critics(tmp_path)
    second = {"refine.critique": "local", "refine.trigger": "always", "local.path": str(QUICKSTART)}
    rows = {"method": "generate", "generate.rows": "refinements", "train.steps": 1, "train.prompts": 1}
    generate(small(**second | rows | {"refine.critique_tokens": 8}), tmp_path / "rows")
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1"}\n{}\n')
    source = sources.DataConfig(source=f"{tmp_path}/a.jsonl", on_bad_row="drop")
    sources.load_problems(source, 0, lambda golds: [Reading(True, "ok")] * len(golds), lambda problem: 1)
    loaded = datasets.Dataset.from_list([{"question": "q", "answer": "1"}])
    monkeypatch.setattr("datasets.load_dataset", lambda *args, split, revision: loaded)
    assert len(list(sources._hub_rows(sources.DataConfig(source="some/set")))) == 1
    with Verifier(VerifierConfig(workers=1)) as verifier:
        run = build.open_run(small(**{"eval.every": 1, "eval.source": "arithmetic"}))
        load_data(run.cfg, run.policy.tokenizer, verifier, print)
    leaves = []
    for field in dataclasses.fields(config.Config):
        value = getattr(config.Config(), field.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else None
        leaves += [field.name] if inner is None else [f"{field.name}.{leaf.name}" for leaf in inner]
    unread = [name for name in leaves if name not in read]
    assert len(leaves) > 50 and not unread, unread


def test_what_is_said_to_have_no_effect_is_not_read(finished):
    """And what is said to have one is. Beside: defaults that are handed on, bad rows, checks, functions of nobody."""
    read, cfg = set(json.loads((finished / "read.json").read_text())), small(**EVALUATED)
    holds = {key: row.holds(cfg) for row in effects.TABLE for key in row.keys.split()}
    assert {key for key in holds if holds[key]} - read == {"data.on_bad_row", "refine.critique_fn"}
    assert {key for key in holds if not holds[key]} & read == {
        "data.revision", "model.revision", "objective.clip_high", "objective.clip_responses", "objective.entropy_mean",
        "reward.correct_at", "reward.correct_by", "reward.partial", "texts.critique",
    }  # fmt: skip


def test_what_a_run_writes(finished):
    rows = lines(finished / "metrics.jsonl")
    trained = [row for row in rows if "reward/responses" in row]
    assert [row["step"] for row in trained] == [1, 2]
    refining = [row for row in trained if row["refine/rate"]]
    assert refining and all(name in row for row in refining for name in METRICS)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert max(row["sampler/logp_diff_max"] for row in trained) < 1e-3
    evaluated = [row for row in rows if "eval/pass@1" in row]
    assert [row["step"] for row in evaluated] == [0, 1, 2]
    for row in evaluated:
        np.testing.assert_allclose(row["eval/pass@1"], (row["eval/pass@1/easy"] + row["eval/pass@1/hard"]) / 2)
        assert row["eval/pass@1/low"] <= row["eval/pass@1"] <= row["eval/pass@1/high"]
    assert list((finished / "tensorboard").iterdir())
    groups = lines(finished / "rollouts/000001.jsonl")
    assert len(groups) == 2
    for group in groups:
        assert len(group["responses"]) == 3 and group["question"] and group["answer"]
        solved = any(r["reward"] == 1 for r in group["responses"])
        assert len(group["refinements"]) == (0 if solved else 3)
        assert all(("critique" in r) != solved for r in group["responses"])
        for attempt in group["responses"] + group["refinements"]:
            widths = read_widths(attempt["widths"])
            assert sum(widths) == len(attempt["text"]) and len(widths) == len(attempt["logp"]) == attempt["tokens"]
            assert attempt["correct"] == (attempt["reward"] == 1)
    assert (finished / "report.html").stat().st_size > 250_000
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 2


def test_named_tasks_are_evaluated_in_training(tmp_path, capsys):
    """Beside the evaluation source, and alone; the metrics carry the name of the task."""
    (tmp_path / "sums.jsonl").write_text('{"question": "What is 23+46?", "answer": 69}\n' * 2)
    asked = {"eval.every": 1, "eval.samples": 2, "eval.problems": 2, "eval.tasks": f"sums={tmp_path}/sums.jsonl"}
    for source, names in (("", {"eval/sums"}), ("arithmetic", {"eval", "eval/sums"})):
        run = build.open_run(small(**asked, **{"eval.source": source}))
        with Verifier(VerifierConfig(workers=1)) as verifier:
            _, evaluations, _ = load_data(run.cfg, run.policy.tokenizer, verifier, print)
        assert set(evaluations) == names and [p.answer for p in evaluations["eval/sums"]] == ["69", "69"]
    with jax.numpy_rank_promotion("allow"):
        train(small(**asked, **{"train.steps": 1}), tmp_path / "w")
    evaluated = [row for row in lines(tmp_path / "w/metrics.jsonl") if "eval/sums/pass@1" in row]
    assert [row["step"] for row in evaluated] == [0, 1] and all("eval/pass@1" not in row for row in evaluated)
    assert capsys.readouterr().err.count("]  sampled, T=1\n") == 2
    assert all(0 <= row["eval/sums/pass@1/low"] <= row["eval/sums/pass@1"] <= 1 for row in evaluated)


def test_a_stopped_run_resumes_to_the_same_end(finished, tmp_path):
    """One step, then the same command for two: as if never stopped. A second call finds nothing to do."""
    changes = EVALUATED
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes, **{"train.steps": 1}), tmp_path / "w")
        train(small(**changes), tmp_path / "w")
        before = (tmp_path / "w/metrics.jsonl").read_text()
        train(small(**changes), tmp_path / "w")
    assert (tmp_path / "w/metrics.jsonl").read_text() == before
    assert without_times(lines(tmp_path / "w/metrics.jsonl")) == without_times(lines(finished / "metrics.jsonl"))
    for step in ("000001", "000002"):
        assert (tmp_path / f"w/rollouts/{step}.jsonl").read_bytes() == (
            finished / f"rollouts/{step}.jsonl"
        ).read_bytes()
    one, other = weights(tmp_path / "w", tmp_path, "a"), weights(finished, tmp_path, "b")
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    start = weights(QUICKSTART, tmp_path, "c")
    assert any(one[name].tobytes() != start[name].tobytes() for name in one)


def test_the_trained_model_answers_in_transformers(finished, tmp_path):
    """The export generates, greedily, what our sampler generates."""
    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert.convert(str(finished), "hf", str(tmp_path / "model"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    from cgrpo_jax.data.arithmetic import problem

    question = problem(0, "test", 0)
    prompt = tokenizer.apply_chat_template(
        list(question.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert f"\\boxed{{{question.answer}}}" in text


VARIANTS = {
    "dr_grpo": {"refine.trigger": "never", "train.samples": 8},
    "release": {
        "train.samples": 4, "refine.trigger": "always", "refine.group": "replace", "refine.select": "correct_first",
        "objective.clip_responses": False, "objective.clip_refinements": False, "objective.weights": "uniform",
        "objective.divide_by_std": True, "objective.entropy_coef": 0.001, "train.updates_per_rollout": 2,
        "refine.critique": "indicative",
    },
    "grpo": {
        "refine.trigger": "never", "train.samples": 8, "objective.aggregation": "sequence_mean",
        "objective.kl_coef": 0.04, "objective.divide_by_std": True,
    },
    "ablation": {
        "train.samples": 8, "refine.trigger": "any_wrong", "refine.k": 1, "refine.select": "random",
        "objective.refined_shape": "ratio", "refine.critique": "worked", "objective.aggregation": "token_mean",
        "objective.weights": "uniform", "train.remat": "full", "sampling.top_p": 0.9,
    },
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_of_the_tables_trains(tmp_path, name):
    with jax.numpy_rank_promotion("allow"):
        train(small(**VARIANTS[name], **{"train.steps": 1}), tmp_path / "w")
    (row,) = lines(tmp_path / "w/metrics.jsonl")
    assert np.isfinite(list(row.values())).all() and row["policy/grad_norm"] > 0
    assert (row["refine/rate"] == 0) == (VARIANTS[name]["refine.trigger"] == "never")


def test_non_finite_gradients_stop_the_run(tmp_path, monkeypatch):
    """By the third step in a row, which is logged and not saved; the weights are still those of the beginning."""
    monkeypatch.setattr(
        "cgrpo_jax.learning.credit.group_advantages", lambda reward_G, refined_G, **_: reward_G * np.nan
    )
    words = "step 3: 3 steps in a row were not finite, in this one 1 gradients;"
    with jax.numpy_rank_promotion("allow"), pytest.raises(TrainingError, match=words):
        train(small(**{"train.steps": 9}), tmp_path / "w")
    rows = lines(tmp_path / "w/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["policy/nonfinite_total"] == 3
    assert all(row["policy/nonfinite_tokens"] == 0 for row in rows)  # of the gradient alone
    assert sorted(path.name for path in (tmp_path / "w/checkpoints").iterdir()) == ["1", "2"]
    one, start = weights(tmp_path / "w", tmp_path, "a"), weights(QUICKSTART, tmp_path, "b")
    assert all(one[name].tobytes() == start[name].tobytes() for name in one)


def test_parameters_that_overflow_are_never_saved(tmp_path):
    """Every gradient is finite; weight decay alone multiplies each weight by -1e30 a step."""
    changes = {"train.steps": 4, "optimizer.learning_rate": 1e20, "optimizer.weight_decay": 1e10}
    changes |= {"objective.entropy_coef": 0.001}  # so that each step has an update
    with jax.numpy_rank_promotion("allow"), pytest.raises(TrainingError, match=r"step 2: \d+ parameters are no finite"):
        train(small(**changes), tmp_path / "w")
    assert [path.name for path in (tmp_path / "w/checkpoints").iterdir()] == ["1"]
    assert all(np.isfinite(leaf).all() for leaf in weights(tmp_path / "w", tmp_path, "a").values())


def run_main(*arguments):
    command = [sys.executable, "-m", "cgrpo_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))


ERRORS = [
    ("--config.train.stepz=3", "steps", 1),
    ("--config.data.source=nowhere.jsonl", "data.source: nowhere.jsonl: no such file", 1),
    ("--config.data.source=reasoning_gym:countdown", "not on the list", 1),  # of training and evaluation
    ("--config.refine.k=0", "refine.k must be at least 1", 1),
    ("--config.model.path=/no/such/folder", "/no/such/folder", 1),
    ("--config.texts.refinement=nowhere:text", "texts.refinement = 'nowhere:text': ModuleNotFoundError", 1),
    ("--config.mesh.data=3", "mesh.data = 3", 1),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("argument", "words", "count"), ERRORS)
def test_errors_name_the_fault_and_cost_nothing(tmp_path, argument, words, count):
    """As many lines as faults, no traceback, nothing compiled, no checkpoint begun."""
    done = run_main("--config=configs/quickstart.py", f"--workdir={tmp_path}/w", "--config.train.steps=1", argument)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    told = done.stderr[done.stderr.index("error: ") :]  # before it stands what the run found to work with
    assert len(told.strip().splitlines()) == count and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "w/metrics.jsonl").exists() and not list(tmp_path.glob("w/checkpoints/*"))
