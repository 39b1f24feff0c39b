"""What a critic is shown, as it is said before step 1; the release's critic in a run."""

import re

import jax
import pytest
from test_data import Parsable, write_jsonl
from test_served import KEY, serve  # noqa: F401
from test_train import lines, small

from cgrpo_jax.config import METHODS, reference_of
from cgrpo_jax.config.options import DataConfig
from cgrpo_jax.data import arithmetic
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.errors import CriticError
from cgrpo_jax.rollout.critics import Brief, shown_truth
from cgrpo_jax.rollout.written import introduce
from cgrpo_jax.text import prompts
from cgrpo_jax.training import train

AUTHORS = {
    "prompt": [{"role": "user", "content": "What is 2+3?"}],
    "reward_model": {"ground_truth": "5", "style": "rule"},
    "target": [{"role": "assistant", "content": "Two and three make five."}],
}
ROWS = [
    ({"question": "What is 2+3?", "answer": "5", "solution": "2+3=5"}, "solution", "2+3=5"),
    ({"question": "What is 2+3?", "answer": "5", "Solution": "2+3=5"}, "Solution", "2+3=5"),
    ({"question": "What is 2+3?", "answer": "5", "target": "Two and three: 5."}, "target", "Two and three: 5."),
    (AUTHORS, "target", "Two and three make five."),
    ({"question": "What is 2+3?", "answer": "Two and three.\n#### 5"}, "answer", "Two and three.\n#### 5"),
    ({"question": "What is 2+3?", "solution": r"It is \boxed{5}."}, "solution", r"It is \boxed{5}."),
    ({"question": "What is 2+3?", "answer": "5", "solution": " ", "target": "Count: 5."}, "target", "Count: 5."),
]


def opened(tmp_path, rows):
    cfg = DataConfig(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    return load_problems(cfg, 0, Parsable(), prompt_tokens=lambda problem: 1, log=lambda line: None)


def said(problems, **changes):
    heard = []
    cfg = small(**changes)
    introduce(Brief(cfg.refine, reference_of(cfg)), problems, cfg.data.source, None, heard.append)
    return heard


@pytest.mark.parametrize(("row", "column", "text"), ROWS)
def test_a_worked_solution_is_shown_wherever_it_stands(tmp_path, row, column, text):
    """Under each name that the paper's schema, ours and others give it; and the run says which, with the row."""
    problems = opened(tmp_path, [row])
    assert shown_truth(problems.get(0), "solution") == text and problems.get(0).answer == "5"
    (line,) = said(problems, **{"refine.critique": "local", "local.reference": "solution"})
    assert f"the data's `{column}`; of the first row" in line and " ".join(text.split()) in line


def test_data_without_a_solution_are_refused_and_rows_without_one_counted(tmp_path):
    bare = {"question": "What is 2+3?", "answer": "5"}
    changes = {"refine.critique": "local", "local.reference": "solution"}
    with pytest.raises(
        CriticError, match=r"local.reference = 'solution': .* no worked solution in a column `solution`"
    ):
        said(opened(tmp_path, [bare, bare]), **changes)
    (line,) = said(opened(tmp_path, [ROWS[0][0], bare]), **changes)
    assert "1 of 2 rows have none: their final answer alone" in line


@pytest.mark.parametrize(
    ("changes", "words", "truth"),
    [
        ({"refine.critique": "self_gt"}, "the final answer", True),
        ({"refine.critique": "self_eval"}, "nothing else", False),
        ({"refine.critique": "local", "local.reference": "gt"}, "the final answer", True),
        ({"refine.critique": "no_verdict"}, "nothing else", False),
    ],
)
def test_what_each_critic_is_shown_is_said(tmp_path, changes, words, truth):
    (line,) = said(opened(tmp_path, [ROWS[0][0]]), **changes)
    assert f"is shown question, attempt and {words}; of the first row" in line
    assert ("Ground truth: 5" in line) is truth and "What is 2+3?" in line


def test_templates_need_no_introduction(tmp_path):
    assert said(opened(tmp_path, [ROWS[0][0]])) == []


def test_the_critic_of_the_release(tmp_path, serve, capfd):  # noqa: F811
    """It is shown wrong answers alone, beside the trace; whatever it writes counts; right ones are told by a sentence."""
    asked = [arithmetic.problem(0, "train", index) for index in range(12)]
    rows = [
        {"question": one.question, "answer": one.answer, "target": arithmetic.solution(one.question)} for one in asked
    ]
    server, api = serve("Look at the tens.")
    own = {name: getattr(api, name) for name in ("base_url", "model", "key_variable")}
    own["base_url"] = own["base_url"].replace("//", "//ann:pass-word-7@")
    critic = {key: value for key, value in METHODS["critique_grpo_text"].items() if not key.startswith("objective.")}
    changes = critic | {f"api.{name}": value for name, value in own.items()} | {"refine.group": "append"}
    changes |= {"data.source": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "train.steps": 1, "train.samples": 3}
    changes |= {"train.updates_per_rollout": 1}
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), tmp_path / "w")
    groups, (metrics,) = lines(tmp_path / "w/rollouts/000001.jsonl"), lines(tmp_path / "w/metrics.jsonl")
    attempts = [(group, attempt) for group in groups for attempt in group["responses"]]
    told = {(attempt["correct"], re.sub(r"truth is .*", "truth is", attempt["critique"])) for _, attempt in attempts}
    assert told == {(False, "Look at the tens."), (True, "The generated solution is correct, the ground truth is")}
    wrong = [(group["question"], attempt["text"]) for group, attempt in attempts if not attempt["correct"]]
    wanted = [
        list(prompts.release_critique_messages(question, text, arithmetic.solution(question), True))
        for question, text in wrong
    ]
    sent = [body["messages"] for _, _, body, _ in server.asked]
    assert sorted(map(str, sent[1:])) == sorted(map(str, wanted)) and metrics["api/requests"] == len(sent)
    assert all(body["max_tokens"] == 4096 for _, _, body, _ in server.asked)
    log = capfd.readouterr()
    assert "the critic (api) is shown question, attempt and the data's `target`" in " ".join(
        (log.out + log.err).split()
    )
    for path in (tmp_path / "w").rglob("*"):
        for secret in (KEY.encode(), b"pass-word-7"):
            assert not path.is_file() or secret not in path.read_bytes(), path
    assert "pass-word-7" not in log.out + log.err
