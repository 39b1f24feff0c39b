"""Rewards, critics and tasks by dotted path: TRL's signature, faults that are said and counted, and a run of them."""

import dataclasses
import functools
import json
import pathlib

import jax
import pytest
from test_data import Parsable, own_cache, write_jsonl  # noqa: F401
from test_rollout import completion
from test_train import lines, small

from cgrpo_jax.config import ConfigError
from cgrpo_jax.data.checking import DataError
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.data.tasks import load_task, parse_names
from cgrpo_jax.grading import rewards
from cgrpo_jax.options import DataConfig, RefineConfig, RewardConfig
from cgrpo_jax.plugins import open_critic, open_rewards, try_on_rows
from cgrpo_jax.records import Attempt
from cgrpo_jax.training import train
from cgrpo_jax.workdir.metrics import group_metrics

OWN = """
import math, sys, time
import numpy as np

calls = []

def note(**given):
    calls.append(given)
    return [0.25] * len(given["completions"])

def by_length(completions, **kwargs):
    return [len(text) / 100 for text in completions]

def wish(completions, wished, **kwargs):
    return [value for value in wished]

def as_array(completions, **kwargs):
    return np.arange(len(completions), dtype=np.float32)

def fragile(completions, **kwargs):
    return [explode(text) for text in completions]

def explode(text):
    if "bad" in text:
        raise RuntimeError("there is bad in it")
    return -2.0

def leaves(completions, **kwargs):
    sys.exit(3)

def hangs(completions, **kwargs):
    if "bad" in completions[0]:
        time.sleep(60)
    return [1.0] * len(completions)

def few(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good"] * len(completions)

def number(completions, **kwargs):
    return 1.0

def no_kwargs(completions):
    return [1.0] * len(completions)

def critic(prompts, completions, rewards, correct, **kwargs):
    return [None if right else f"CRITIC {reward} of {text}" for text, reward, right in zip(completions, rewards, correct)]

def deaf(completions, **kwargs):
    raise KeyError("nothing")

def answers(completions, **kwargs):
    return [3] * len(completions)

def rows():
    for i in range(3):
        yield {"question": f"What is {i}+1?", "answer": i + 1}

def nothing():
    return []
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_plugins.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_plugins

    own_plugins.calls.clear()
    return own_plugins


def problems_of(tmp_path, rows, **changes):
    source = DataConfig(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    return load_problems(source, 0, Parsable(), lambda problem: 1, own=True, **changes)


def functions(*names, log=print, **changes):
    fn = ",".join(f"own_plugins:{name}" for name in names)
    return open_rewards(small(**{"reward.fn": fn} | changes), log)


def scored(tokenizer, own_functions, problem, texts, cfg=rewards.WHOLE):
    items = [(problem, completion(tokenizer, text), text) for text in texts]
    return rewards.score(items, None, cfg, own_functions)


TEXT = {"question": "Why?", "answer": "so #### 7", "wished": 0.5, "level": [3]}
CHAT = {"prompt": [{"role": "user", "content": "Why?"}], "answer": "7", "completion": "unused"}


def test_the_signature_is_that_of_trl(tmp_path, tokenizer, own):
    """Columns come as they are in the data; text rows have texts, chat rows turns; `completion` is not passed on."""
    problems, noting = problems_of(tmp_path, [TEXT, CHAT]), functions("note")
    noting.step = 4
    for index in range(2):
        scored(tokenizer, noting, problems.get(index), ["One.", "Two."])
    text, chat = own.calls
    assert {name: text[name] for name in TEXT} == {name: [value] * 2 for name, value in TEXT.items()}
    assert (text["prompts"], text["completions"]) == (["Why?"] * 2, ["One.", "Two."])
    assert text["completion_ids"] == [completion(tokenizer, one).ids.tolist() for one in ("One.", "Two.")]
    assert text["trainer_state"].global_step == 4
    assert chat["prompts"] == [CHAT["prompt"]] * 2 and chat["answer"] == ["7", "7"]
    assert chat["completions"] == [[{"role": "assistant", "content": one}] for one in ("One.", "Two.")]
    assert not {"prompt", "completion"} & set(chat)


def test_rewards_are_what_the_functions_say(tmp_path, tokenizer, own):
    """They are added; None and NaN are left out; from correct_at on an attempt is correct."""
    problem = problems_of(tmp_path, [TEXT]).get(0)
    made = scored(tokenizer, functions("by_length", "wish"), problem, ["ab", "x" * 60], RewardConfig(correct_at=1.1))
    assert [(a.reward, a.correct, a.status) for a in made] == [(0.52, False, "ok"), (1.1, True, "ok")]
    assert made[1].parts == {"by_length": 0.6, "wish": 0.5}
    for value in (None, float("nan"), float("inf")):
        half = dataclasses.replace(problem, row={**TEXT, "wished": value})
        (attempt,) = scored(tokenizer, functions("by_length", "wish"), half, ["ab"])
        assert (attempt.reward, attempt.status, attempt.parts) == (0.02, "ok", {"by_length": 0.02})
        (attempt,) = scored(tokenizer, functions("wish"), half, ["ab"])
        assert (attempt.reward, attempt.correct, attempt.status) == (0.0, False, "no_reward")
    made = scored(tokenizer, functions("as_array"), problem, ["a", "b", "c"])
    assert [a.reward for a in made] == [0.0, 1.0, 2.0] and all(type(a.reward) is float for a in made)


@pytest.mark.parametrize(("name", "status", "good"), [("fragile", "error", -2.0), ("hangs", "timeout", 1.0)])
def test_a_fault_costs_its_own_reward_and_is_said_once(tmp_path, tokenizer, own, name, status, good):
    """With the user's own frames and the row. A failing completion costs the others nothing, and never pays."""
    problem, said = problems_of(tmp_path, [TEXT]).get(0), []
    failing = functions(name, log=said.append, **{"reward.seconds": 0.5})
    made = scored(tokenizer, failing, problem, ["bad", "fine"])
    if name == "fragile":
        assert [(a.reward, a.status) for a in made] == [(good, status), (good, "ok")]
    else:  # the call as a whole does not end
        assert [(a.reward, a.status) for a in made] == [(0.0, status)] * 2
    scored(tokenizer, failing, problem, ["bad"])
    (line,) = said
    assert (
        line.startswith(f"reward.fn own_plugins:{name}: ") and "'wished': 0.5" in line and "'completion': 'bad'" in line
    )
    assert "own_plugins.py" in line and "cgrpo_jax" not in line.replace("cgrpo_jax_tests", "")
    assert ("in explode" in line and "RuntimeError: there is bad in it" in line) or "in hangs" in line
    assert [a.reward for a in scored(tokenizer, failing, problem, ["fine"])] == [good]


def test_a_function_that_ends_the_process_does_not(tmp_path, tokenizer, own):
    (attempt,) = scored(
        tokenizer, functions("leaves", log=lambda line: None), problems_of(tmp_path, [TEXT]).get(0), ["a"]
    )
    assert (attempt.reward, attempt.status) == (0.0, "error")


BAD = [
    ("fn", "own_plugins:few", "ValueError: 1 rewards for 2 completions"), ("fn", "own_plugins:words", "TypeError: a number or None"),
    ("fn", "own_plugins:number", "TypeError: a list of numbers is needed, not float"),
    ("fn", "own_plugins:no_kwargs", "TypeError: no_kwargs() got an unexpected keyword argument"),
    ("fn", "own_plugins:leaves", "SystemExit: 3"), ("fn", "own_plugins:deaf", "KeyError: 'nothing'"),
    ("critique_fn", "own_plugins:deaf", "KeyError: 'nothing'"), ("critique_fn", "own_plugins:answers", "TypeError: text or None"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "path", "cause"), [bad for bad in BAD if "few" not in bad[1]])
def test_what_fails_on_the_first_rows_is_one_line(tmp_path, tokenizer, own, key, path, cause):
    """Key, path, cause and row; the user's own error is behind it, for --debug."""
    problems = problems_of(tmp_path, [TEXT, TEXT])
    changes = {"fn": {"reward.fn": path}}.get(key, {"refine.critique": "function", "refine.critique_fn": path})
    cfg, where = small(**changes), "reward" if key == "fn" else "refine"
    with pytest.raises(ConfigError) as error:
        try_on_rows(open_rewards(cfg, print), open_critic(cfg, print), problems, tokenizer)
    line = str(error.value)
    assert line.startswith(f"config.{where}.{key} = {path!r}: {cause}") and "\n" not in line and "'wished': 0.5" in line
    assert type(error.value.__cause__).__name__ == cause.partition(":")[0]


def test_too_few_rewards_for_several(tmp_path, tokenizer, own):
    """Alone each has one, so the first rows do not show it: it is said, and the rewards are those of each alone."""
    said = []
    made = scored(tokenizer, functions("few", log=said.append), problems_of(tmp_path, [TEXT]).get(0), ["a", "b"])
    assert [(a.reward, a.status) for a in made] == [(1.0, "ok")] * 2
    assert len(said) == 1 and "ValueError: 1 rewards for 2 completions" in said[0]


@pytest.mark.parametrize(
    ("fn", "cause"),
    [
        ("own_plugins", "ValueError: give package.module:function"), ("own_plugins:none_such", "AttributeError"),
        ("no_such_module:f", "ModuleNotFoundError"), ("own_plugins:note,own_plugins:note", "names a function twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_line(own, fn, cause):
    with pytest.raises(ConfigError, match=cause) as error:
        open_rewards(small(**{"reward.fn": fn}), print)
    assert "config.reward.fn = 'own_plugins" in str(error.value) or "no_such_module" in str(error.value)


def test_three_rows_are_tried(tmp_path, tokenizer, own):
    try_on_rows(functions("note"), None, problems_of(tmp_path, [TEXT] * 5), tokenizer)
    assert [call["completions"] for call in own.calls] == [["The answer is \\boxed{7}."]] * 3


def test_rows_need_no_answer_where_nobody_is_shown_one(tmp_path):
    rows = [{"question": "Write a poem."}, {"question": "Or prose.", "answer": {"no": "text"}}]
    problems = problems_of(tmp_path, rows, answerless=True)
    assert [problems.get(i).answer for i in range(2)] == ["", ""]
    with pytest.raises(DataError, match="row 1, column 'answer/"):
        problems_of(tmp_path, rows)


def test_what_a_critic_says_is_the_critique(tmp_path, tokenizer, own):
    """Where it fails or says nothing the fallback stands in; what fails is said once."""
    problem, said = problems_of(tmp_path, [TEXT]).get(0), []
    attempts = [
        Attempt(completion(tokenizer, text), text, reward, reward == 1, None, "ok")
        for text, reward in (("a", 0.5), ("b", 1.0))
    ]
    cfg = functools.partial(small, **{"refine.critique": "function", "refine.critique_fallback": "drop"})
    critic = open_critic(cfg(**{"refine.critique_fn": "own_plugins:critic"}), said.append)
    assert [critique.text for critique in critic.criticise(problem, attempts)] == ["CRITIC 0.5 of a", None]
    failing = open_critic(
        small(**{"refine.critique": "function", "refine.critique_fn": "own_plugins:deaf"}), said.append
    )
    for _ in range(2):
        made = failing.criticise(problem, attempts)
        assert [critique.text for critique in made if critique.fallback] == [
            "The generated solution is incorrect.",
            "The generated solution is correct.",
        ]
    assert len(said) == 1 and "KeyError: 'nothing'" in said[0] and "'completions': ['a', 'b']" in said[0]
    assert open_critic(small(**{"refine.critique": "function", "refine.trigger": "never"}), print) is None


def test_rows_of_an_evaluation_from_a_function(own):
    ((name, where),) = parse_names("mine=own_plugins:rows")
    load = functools.partial(load_task, limit=2, cfg=DataConfig(), fault=lambda problem: None, log=print)
    assert [(one.id, one.problem.question, one.problem.answer) for one in load(name, where)] == [
        ("1", "What is 0+1?", "1"), ("2", "What is 1+1?", "2"),
    ]  # fmt: skip
    for path, cause in (
        ("own_plugins:nothing", "rows are needed"),
        ("own_plugins:gone", "AttributeError"),
        ("own_plugins:few", "TypeError"),
    ):
        with pytest.raises(DataError, match=cause) as error:
            load("mine", path)
        assert str(error.value).startswith(f"eval.tasks: mine={path}: ") and "\n" not in str(error.value)


def test_a_run_is_trained_by_them(tmp_path, own):
    """Rewards are fractions, each function has its curve, and what is refined follows from correct_at."""
    rows = [{"question": f"Say {i}.", "wished": 0.125 * i} for i in range(4)]
    changes = {
        "data.source": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "reward.fn": "own_plugins:by_length, own_plugins:wish",
        "reward.correct_at": 5.0, "refine.critique": "function", "refine.critique_fn": "own_plugins:critic",
        "refine.critique_fallback": "indicative", "train.steps": 1, "train.samples": 2,
    }  # fmt: skip
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), tmp_path / "w")
    (row,) = lines(tmp_path / "w/metrics.jsonl")
    groups = lines(tmp_path / "w/rollouts/000001.jsonl")
    for group in groups:
        wished = 0.125 * int(group["question"][4])
        for response in group["responses"]:
            assert response["parts"] == {"by_length": len(response["text"]) / 100, "wish": wished}
            assert response["reward"] == pytest.approx(len(response["text"]) / 100 + wished) and not response["correct"]
            assert response["critique"].startswith("CRITIC ")
    assert row["refine/rate"] == 1 and row["verifier/no_reward"] == 0
    assert row["reward/responses"] > row["reward/by_length"] * 0.5 > 0 and "reward/wish" in row


def test_rewards_that_are_missing_are_counted(tmp_path, tokenizer, own):
    from cgrpo_jax.records import Group

    problem = problems_of(tmp_path, [{**TEXT, "wished": None}]).get(0)
    group = Group(problem, [1], tuple(scored(tokenizer, functions("wish"), problem, ["a", "b"])), (), (0, 1), ())
    assert group_metrics([group])["verifier/no_reward"] == 2
    assert json.dumps(group.responses[0].parts) == "{}"
    assert RefineConfig().critique_fn == RewardConfig().fn == ""


def test_the_example_in_the_readme_works(tmp_path, tokenizer, monkeypatch):
    page = (pathlib.Path(__file__).parent.parent / "configs/README.md").read_text()
    (tmp_path / "own_example.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    example = open_rewards(small(**{"reward.fn": "own_example:length_and_format"}), print)
    for row in (TEXT, CHAT):
        problem = problems_of(tmp_path, [row | {"target_length": 10}]).get(0)
        made = scored(tokenizer, example, problem, ["\\boxed{69}", "x" * 30])
        assert [attempt.reward for attempt in made] == [1.0, -0.02]
