"""The recipes of the paper's tables, and the subsets they train on; no network."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import QUICKSTART
from test_train import small

from cgrpo_jax import convert
from cgrpo_jax.config import METHODS, asks_local, from_config_dict
from cgrpo_jax.config import files as config_files
from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.rows import parse_row
from cgrpo_jax.errors import CheckpointError, ConfigError, DataError
from cgrpo_jax.model.hf_config import config_from_hf, read_json
from cgrpo_jax.run import build
from cgrpo_jax.run.checks import check, check_local
from cgrpo_jax.run.folders import shape_folder, widened
from cgrpo_jax.subset import subset
from cgrpo_jax.text.prompts import question_messages

PAPER = config_files._function(config_files.find("paper")).__globals__
COMBINED = [(model, row) for model in PAPER["MODELS"] for row in dict.fromkeys([*METHODS, *PAPER["ROWS"]])]


def shape_of(cfg):
    """Of the model as the run has it."""
    return config_from_hf(widened(shape_folder(cfg.model.path), cfg.model))


@pytest.mark.parametrize(("model", "row"), COMBINED)
def test_each_recipe_fits_its_model(model, row):
    cfg = from_config_dict(config_files.get_config(f"paper:{model},{row}"))
    shape = shape_of(cfg)
    check(cfg, shape)
    if asks_local(cfg):
        check_local(cfg, config_from_hf(shape_folder(cfg.local.path, "local.path")))
    assert cfg.data.grader == "math_verify" and cfg.eval.every == 50 and cfg.model.revision == "main"
    assert cfg.data.source.endswith("4k.parquet") and cfg.train.steps in (188, 400, 1500)
    trains = cfg.method in ("rl", "sft")
    assert cfg.checkpoint.best == ("eval/validation/pass@1" if trains else "")
    assert (cfg.eval.tasks.count(",") == 7) == (cfg.method == "eval")


def test_limits_and_epochs_are_those_of_the_paper():
    """Lengths of the release (2,048 and 6,144), of LUFFY (8,192), of critiques (1,024), of evaluations (8,192).

    Rows are 4,000 annotated ones, and at most eight for each of these problems where they are generated: three epochs.
    """
    for row, prompt, new, critique, rows in (
        ("critique_grpo", 2048, 6144, 0, 0), ("critique_grpo_cot", 2048, 6144, 0, 0), ("grpo", 2048, 6144, 0, 0),
        ("luffy", 2048, 8192, 0, 0), ("self_critique", 2048, 6144, 1024, 0), ("self_evaluation", 2048, 6144, 1024, 0),
        ("sft", 2048, 8192, 0, 4_000), ("sft_generated", 2048, 8192, 0, 32_000), ("sft_critiques", 9216, 6144, 0, 4_000),
        ("eval", 2048, 8192, 0, 0),
    ):  # fmt: skip
        cfg = from_config_dict(config_files.get_config(f"paper:qwen2_5_7b,{row}"))
        assert (cfg.data.max_prompt_tokens, cfg.sampling.max_new_tokens) == (prompt, new), row
        assert cfg.refine.critique_tokens == critique, row
        if rows:
            assert cfg.train.steps == -(-3 * rows // cfg.train.prompts), row
            assert cfg.optimizer.warmup_updates == round(cfg.train.steps / 10), row
        if row.startswith("critique_grpo"):  # a response of full length is shown whole, with question and critique
            assert cfg.refine.max_prompt_tokens >= prompt + new + 1024
        if row.endswith("cot"):
            api = cfg.api
            assert (api.tokens, api.temperature, api.top_p, cfg.refine.critique_tries) == (1024, 0.7, 0.75, 3)
    assert from_config_dict(config_files.get_config("eval")).sampling.max_new_tokens == 8192


def test_only_the_mathematical_model_is_widened():
    """As LUFFY does it; without that its window holds no prompt of the recipe."""
    for model in PAPER["MODELS"]:
        cfg = from_config_dict(config_files.get_config(f"paper:{model},critique_grpo"))
        own, used = config_from_hf(shape_folder(cfg.model.path)), shape_of(cfg)
        if model != "qwen2_5_math_7b":
            assert used == own
            continue
        assert (own.rope_theta, own.max_positions) == (10_000, 4096)
        assert (used.rope_theta, used.max_positions) == (40_000, 16_384)
        with pytest.raises(ConfigError, match="exceeds the model's 4096 positions"):
            check(cfg, own)


def test_what_is_not_known_is_refused_by_name():
    for name in ("paper:qwen3_9b,grpo", "paper:qwen3_8b,gpro", "paper:qwen3_8b"):
        with pytest.raises(ConfigError, match=r"MODEL,ROW of qwen2_5_7b, .*critique_grpo"):
            config_files.get_config(name)


def test_a_widened_model_is_one_everywhere(tmp_path):
    """The run computes with it, and what it exports says it; the folder it came from is as it was."""
    cfg = small(**{"model.rope_theta": 40_000.0, "model.max_positions": 1024})
    run = build.open_run(cfg)
    assert (run.policy.shape.rope_theta, run.policy.shape.max_positions) == (40_000, 1024)
    assert run.learner.model == run.policy.sampler.model == run.policy.shape
    assert read_json(run.policy.folder / "config.json") != read_json(QUICKSTART / "config.json")
    again = build.open_run(cfg)
    assert again.policy.folder == run.policy.folder and run.policy.tokenizer.eos_ids == again.policy.tokenizer.eos_ids
    convert.convert(str(run.policy.folder), "hf", str(tmp_path / "out"))
    assert config_from_hf(tmp_path / "out").rope_theta == 40_000
    assert config_from_hf(QUICKSTART).rope_theta == 10_000
    llama = small(**{"model.path": "llama_3_2_3b", "model.max_positions": 1024})
    with pytest.raises(CheckpointError, match="replace no scaling"):
        shape_of(llama)


LONG = "Your task is to follow a systematic, thorough reasoning process before providing the final solution."


def open_row(number):
    """As in OpenR1-Math-46k: nested columns, its own system prompt, a trace as the target."""
    asked = [{"content": LONG, "role": "system"}, {"content": f"What is {number}+1?", "role": "user"}]
    return {
        "data_source": "math",
        "prompt": asked,
        "target": [{"content": f"<think>\nhm\n</think>\n\n\\boxed{{{number + 1}}}", "role": "assistant"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(number + 1), "style": "rule"},
        "extra_info": {"index": number, "split": "default"},
    }


def written(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return DataConfig(source=str(path))


def test_a_subset_nests_and_follows_from_its_seed(tmp_path):
    source = written(tmp_path / "open.parquet", [open_row(number) for number in range(60)])
    small_, large = subset(source, 8, 0), subset(source, 16, 0)
    assert small_ == large[:8] == subset(source, 8, 0) and small_ != subset(source, 8, 1)
    numbers = [row["extra_info"]["index"] for row in large]
    assert len(set(numbers)) == 16 and numbers != sorted(numbers) and max(numbers) > 16
    for row in large:
        number = row["extra_info"]["index"] - 1
        parsed = parse_row(row, DataConfig()).problem
        assert parsed.question == f"What is {number}+1?" and parsed.answer == str(number + 1)
        assert parsed.messages == question_messages(parsed.question)
        assert row["target"] == open_row(number)["target"]


def test_a_subset_of_what_is_no_such_data_is_refused(tmp_path):
    good = [open_row(number) for number in range(4)]
    for name, change, words in (
        ("few", {}, "4 rows; a subset of 5"),
        ("target", {"target": None}, r"row \d, column 'target'"),
        ("empty", {"target": [{"content": " ", "role": "assistant"}]}, "column 'target': empty"),
        ("gold", {"reward_model": {"ground_truth": None, "style": "rule"}}, "row"),
        ("prompt", {"prompt": [{"content": "a", "role": "assistant"}]}, "column 'prompt': the last chat turn"),
    ):
        source = written(tmp_path / f"{name}.parquet", [row | change for row in good])
        with pytest.raises(DataError, match=words) as error:
            subset(source, 5 if name == "few" else 4, 0)
        assert len(str(error.value).splitlines()) == 1


def command(tmp_path, *arguments):
    line = [sys.executable, "-m", "cgrpo_jax.subset", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=120)


@pytest.mark.thorough
def test_the_command(tmp_path):
    """4,000 rows in a file that training reads; one line where something is wrong, and nothing is left behind."""
    written(tmp_path / "open.parquet", [open_row(number) for number in range(4100)])
    done = command(tmp_path, "--size=4k", "--source=open.parquet", "--out=data/4k.parquet")
    assert done.stdout == "wrote 4000 rows to data/4k.parquet\n", done.stderr
    rows = pyarrow.parquet.read_table(tmp_path / "data/4k.parquet").to_pylist()
    expected = subset(DataConfig(source=str(tmp_path / "open.parquet")), 4000, 0)
    assert json.dumps(rows, sort_keys=True) == json.dumps(expected, sort_keys=True)
    for arguments, words in (
        (["--size=8k", "--source=open.parquet", "--out=8k.parquet"], "4100 rows; a subset of 8000"),
        (["--size=4k", "--source=open.parquet", "--out=data/4k.parquet"], "not there yet"),
        (["--size=4k", "--source=none.parquet", "--out=a.parquet"], "no such file"),
    ):
        done = command(tmp_path, *arguments)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "open.parquet"]
