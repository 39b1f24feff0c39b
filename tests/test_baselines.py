"""The supervised baselines: what is kept, how it is generated and resumed, and that it is what is then learnt."""

import json

import jax
import numpy as np
import pytest
from test_train import lines, small

from cgrpo_jax.config import METHODS
from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data.sources import load_targets
from cgrpo_jax.errors import ConfigError, DataError
from cgrpo_jax.generating import generate, kept_rows
from cgrpo_jax.records import Attempt, Completion, Critique, Group, Problem
from cgrpo_jax.run import leader
from cgrpo_jax.text.prompts import critique_messages, question_messages
from cgrpo_jax.training import train

GENERATING = [name for name, changes in METHODS.items() if changes.get("method") == "generate"]
SMALL = {"train.samples": 3, "train.steps": 2, "sampler.kv_cache_mb": 4.0}


def made(workdir, **changes):
    with jax.numpy_rank_promotion("allow"):
        generate(small(**SMALL | changes), workdir)
    return lines(workdir / "rows.jsonl")


def learnt(workdir, rows, **changes):
    fitting = {"data.source": str(rows), "data.max_prompt_tokens": 256, "train.samples": 1, "checkpoint.every": 2}
    with jax.numpy_rank_promotion("allow"):
        train(small(method="sft", **{"refine.trigger": "never", **fitting, **changes}), workdir)
    return lines(workdir / "metrics.jsonl")


def attempt(text, correct, finished=True, critique=None):
    none = np.zeros(0)
    return Attempt(Completion(none, none, none, finished), text, float(correct), correct, None, "ok", critique)


RIGHT, WRONG = "All is well. Conclusion: correct", "No. Conclusion: incorrect"
GROUP = Group(
    Problem("2+2?", "4", question_messages("2+2?")),
    (),
    (
        attempt("four", True, critique=Critique(RIGHT)),
        attempt("5", False, critique=Critique(f"{WRONG} [END]")),
        attempt("4 and", True, finished=False, critique=Critique(WRONG)),  # cut; and its critic is mistaken
        attempt("6", False, critique=Critique(WRONG, fallback=True)),
        attempt("7", False, critique=Critique(None)),
        attempt("8", False),
    ),
    (attempt("4!", True), attempt("9", False), attempt("4.", True, finished=False)),
    (0, 1, 2, 3, 4, 5),
    (0,),
)


def test_what_is_kept_of_a_problem():
    """Correct and whole attempts under the task prompt; model-written critiques that agree, without the answer."""
    task = GROUP.problem.messages
    assert list(kept_rows(GROUP, "responses")) == [("response", task, "four")]
    assert list(kept_rows(GROUP, "refinements")) == [("refinement", task, "4!")]
    assert list(kept_rows(GROUP, "both")) == [("response", task, "four"), ("refinement", task, "4!")]
    asked = [critique_messages("2+2?", text, None, True) for text in ("four", "5")]
    found = list(kept_rows(GROUP, "critiques"))
    assert found == [("critique", asked[0], f"{RIGHT} [END]"), ("critique", asked[1], f"{WRONG} [END]")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "raft" else pytest.mark.thorough) for name in GENERATING]
)
def test_each_baseline_generates_and_is_learnt(tmp_path, name):
    """Two steps of each; the rows are those that the rollouts on file say, and all of them have been trained on."""
    changes = dict(METHODS[name]) | ({"refine.critique": "worked"} if name == "critique_ft" else {})
    rows = made(tmp_path / "rows", **SMALL | changes | {"train.samples": 3, "train.prompts": 4})
    groups = [g for step in (1, 2) for g in lines(tmp_path / f"rows/rollouts/{step:06d}.jsonl")]
    kinds = {"responses": "response", "refinements": "refinement", "critiques": "critique"}
    wanted = changes.get("generate.rows", "responses")
    assert {row["kind"] for row in rows} == ({"response", "refinement"} if wanted == "both" else {kinds[wanted]})
    for row in rows:
        group = groups[row["problem"]]
        texts = [a["text"] for a in group["responses"] + group["refinements"] if a["reward"] == 1 and a["finished"]]
        assert (row["kind"] == "critique") == (row["target"] not in texts)
        assert group["question"] in row["prompt"][-1]["content"] and row["answer"] == group["answer"]
    refined = any(group["refinements"] for group in groups)
    assert refined == (wanted in ("refinements", "both"))
    found = learnt(
        tmp_path / "learnt",
        tmp_path / "rows/rows.jsonl",
        **{"train.prompts": len(rows), "optimizer.learning_rate": 1e-5},
    )
    tokens = {row["tokens/trained"] for row in found}
    assert len(found) == 2 and len(tokens) == 1 and found[1]["loss/total"] < found[0]["loss/total"]


def test_a_generation_that_is_stopped_ends_with_the_same_file(tmp_path, monkeypatch):
    """What is on file is not sampled again, half a file is not taken for one, and other settings are refused."""
    changes = {"method": "generate", "generate.rows": "both", "refine.trigger": "any_wrong", "train.steps": 3}
    made(tmp_path / "whole", **changes)
    collect, sampled = leader.Desk.stories, []

    def dying(self, step, *args):
        sampled.append(step)
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return collect(self, step, *args)

    monkeypatch.setattr(leader.Desk, "stories", dying)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "w", **changes)
    assert not (tmp_path / "w/rows.jsonl").exists()
    (tmp_path / "w/rows/000002.partial").write_text('{"problem": 2, "ki')
    with pytest.raises(ConfigError, match=r"train.samples = 2 \(was 3\)"):
        made(tmp_path / "w", **changes | {"train.samples": 2})
    made(tmp_path / "w", **changes)
    assert sampled == [0, 1, 1, 2]
    made(tmp_path / "w", **changes)
    assert sampled == [0, 1, 1, 2]
    assert (tmp_path / "w/rows.jsonl").read_bytes() == (tmp_path / "whole/rows.jsonl").read_bytes()
    names = [row["step"] for row in lines(tmp_path / "w/metrics.jsonl")]
    assert names == [1, 2, 3]


def test_a_file_is_gone_through_once(tmp_path):
    """Three problems, two a step: the second step has one."""
    sums = [{"question": f"What is {10 + i}+{20 + i}?", "answer": str(30 + 2 * i)} for i in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    changes = {"method": "generate", "refine.trigger": "never", "data.source": str(tmp_path / "sums.jsonl")}
    rows = made(tmp_path / "w", **changes | {"train.steps": 9, "train.samples": 6})
    asked = [g["question"] for step in (1, 2) for g in lines(tmp_path / f"w/rollouts/{step:06d}.jsonl")]
    assert sorted(asked) == [row["question"] for row in sums] and not (tmp_path / "w/rows/000003.jsonl").exists()
    assert all(asked[row["problem"]] in row["prompt"][-1]["content"] for row in rows)


def test_annotated_solutions_are_learnt_and_evaluated(tmp_path):
    """Preset sft: a column of solutions, nothing generated; the best checkpoint by an evaluation of the same kind."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 1+1?"}]
    rows = [
        {"question": "What is 23+46?", "target": "3+6+0=09;2+4+0=06;\\boxed{69}"},
        {
            "prompt": turns,
            "target": [{"role": "assistant", "content": "\\boxed{2}"}],
            "reward_model": {"ground_truth": "2"},
        },
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"eval.every": 1, "eval.source": "arithmetic", "eval.problems": 4, "eval.samples": 1}
    found = learnt(tmp_path / "w", tmp_path / "rows.jsonl", **changes | {"checkpoint.best": "eval/pass@1"})
    assert [row["step"] for row in found] == [0, 1, 1, 2, 2]
    assert sum("eval/pass@1" in row for row in found) == 3 and (tmp_path / "w/best.json").exists()


def words(tokenizer, rows, tmp_path, **changes):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = DataConfig(source=str(tmp_path / "rows.jsonl"), **changes)
    prompt = {"prompt_tokens": lambda p: len(tokenizer.encode_chat(p.messages))}
    return load_targets(cfg, 8, target_tokens=lambda p: len(tokenizer.encode_answer(p.answer)), **prompt)


def test_rows_that_cannot_be_learnt_are_all_named(tokenizer, tmp_path):
    good = {"question": "a", "target": "b"}
    bad = [{"question": "a"}, {"target": "b"}, {"question": "a", "target": "1 2 3 4 5 6 7 8"}]
    bad += [{"question": "a", "target": [{"role": "user", "content": "b"}]}, {"question": "a", "target": " "}]
    with pytest.raises(DataError) as error:
        words(tokenizer, [good, *bad], tmp_path)
    said = str(error.value).splitlines()
    assert len(said) == 6 and said[0].startswith("bad rows: 5 of 6")
    for line, part in zip(
        said[1:], ("'target': missing", "missing", "text to learn", "no solution", "empty"), strict=True
    ):
        assert part in line
    problems = words(tokenizer, [good, *bad], tmp_path, on_bad_row="drop")
    assert problems.size == 1 and problems.get(0).answer == "b"
    longest = words(tokenizer, [{"question": "a", "target": "1 2 3 4"}], tmp_path)
    assert len(tokenizer.encode_answer(longest.get(0).answer)) == 8  # all that there is room for
    named = words(tokenizer, [{"q": "a", "text": "b"}], tmp_path, question_column="q", answer_column="text")
    assert named.get(0).messages == question_messages("a")


def test_a_learnt_text_ends_as_a_turn_does(tokenizer):
    ids = tokenizer.encode_answer("<|im_end|>1")
    assert ids[-1] == tokenizer.end_id == tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    assert (ids == tokenizer.end_id).sum() == 1  # what the text itself spells is no end
