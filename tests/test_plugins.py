"""Rewards, critics and tasks by dotted path: TRL's signature, faults that are said and counted, and a run of them."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import traceback

import jax
import pytest
from conftest import tiny_config
from test_data import Parsable, own_cache, write_jsonl  # noqa: F401
from test_rollout import completion
from test_train import lines, small

from cgrpo_jax.config.options import DataConfig, RefineConfig, RewardConfig
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.data.tasks import load_task, parse_names
from cgrpo_jax.errors import ConfigError, DataError
from cgrpo_jax.grading import grader, rewards
from cgrpo_jax.grading.verifier import Graded
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Attempt, Verdict
from cgrpo_jax.rollout.collect import Posed
from cgrpo_jax.rollout.critics import Brief, OwnCritic
from cgrpo_jax.rollout.written import by_function
from cgrpo_jax.run.checks import check
from cgrpo_jax.run.plugins import open_critic, open_rewards, try_on_rows
from cgrpo_jax.training import train
from cgrpo_jax.workdir.metrics import group_metrics

OWN = """
import json, math, multiprocessing, os, pathlib, signal, sys, time
import numpy as np

NOTES = pathlib.Path(__file__).with_name("notes.jsonl")  # it runs in another process

def note(**given):
    with NOTES.open("a") as file:
        file.write(json.dumps(given | {"trainer_state": given["trainer_state"].global_step}) + "\\n")
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

def accuracy(completions, answer, **kwargs):
    return [float("7" in text) for text in completions]

def well_formed(completions, **kwargs):
    return [float(text.startswith("<think>")) for text in completions]

def huge(completions, **kwargs):
    return [1.7e308] * len(completions)

def exits(completions, **kwargs):
    return [os._exit(3) if "bad" in text else 1.0 for text in completions]

def forks(completions, **kwargs):
    if os.fork() == 0 and os.fork():
        return [9.0] * len(completions)  # a child that comes back
    return [1.0] * len(completions)

def generator_exit(completions, **kwargs):
    raise GeneratorExit

def interrupts(completions, **kwargs):
    raise KeyboardInterrupt("by the function")

def alarmed(completions, **kwargs):
    def ring(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(30)
    except TimeoutError:
        return [1.0] * len(completions)

def of_math_verify(completions, **kwargs):  # whose own time limit needs signals; what fails is 0, as users write it
    from math_verify import parse, verify
    found = []
    for text in completions:
        try:
            found.append(float(verify(parse("$7$"), parse(text))))
        except Exception:
            found.append(0.0)
    return found

def catches(completions, **kwargs):
    try:
        raise ValueError("no threads")
    except ValueError:
        return [0.0] * len(completions)

def at_step(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(completions)

def critic(prompts, completions, rewards, correct, trainer_state, **kwargs):
    step = trainer_state.global_step
    return [None if right else f"CRITIC {reward} of {text} in step {step}" for text, reward, right in zip(completions, rewards, correct)]

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_plugins.py").write_text(OWN)
    return folder


@pytest.fixture
def own(folder, monkeypatch):
    """What `note` writes down of its calls."""
    monkeypatch.syspath_prepend(str(folder))
    notes = folder / "notes.jsonl"
    notes.unlink(missing_ok=True)
    return notes


@pytest.fixture(scope="module")
def process():
    with UserProcess() as running:
        yield running


def problems_of(tmp_path, rows, **changes):
    source = DataConfig(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    return load_problems(source, 0, Parsable(), lambda problem: 1, own=True, **changes)


@pytest.fixture
def functions(own, process):
    def of(*names, log=print, **changes):
        fn = ",".join(f"own_plugins:{name}" for name in names)
        return open_rewards(small(**{"reward.fn": fn} | changes), process, log)

    return of


class Finds:
    """In place of a verifier: the functions decide, and the answer is found in this process."""

    def grade(self, jobs):
        return [Graded(grader.extract(job), Verdict.of(False)) for job in jobs]


def scored(tokenizer, own_functions, problem, texts, step=0):
    items = [(problem, completion(tokenizer, text), text) for text in texts]
    return rewards.score(items, Finds(), rewards.WHOLE, own_functions, step)


TEXT = {"question": "Why?", "answer": "so #### 7", "wished": 0.5, "level": [3]}
CHAT = {"prompt": [{"role": "user", "content": "Why?"}], "answer": "7", "completion": "unused"}


def test_the_signature_is_that_of_trl(tmp_path, tokenizer, own, functions):
    """Columns come as they are in the data; text rows have texts, chat rows turns; `completion` is not passed on."""
    problems, noting = problems_of(tmp_path, [TEXT, CHAT]), functions("note")
    for index in range(2):
        scored(tokenizer, noting, problems.get(index), ["One.", "Two."], step=4)
    text, chat = lines(own)
    assert {name: text[name] for name in TEXT} == {name: [value] * 2 for name, value in TEXT.items()}
    assert (text["prompts"], text["completions"]) == (["Why?"] * 2, ["One.", "Two."])
    assert text["completion_ids"] == [completion(tokenizer, one).ids.tolist() for one in ("One.", "Two.")]
    assert text["trainer_state"] == 4
    assert chat["prompts"] == [CHAT["prompt"]] * 2 and chat["answer"] == ["7", "7"]
    assert chat["completions"] == [[{"role": "assistant", "content": one}] for one in ("One.", "Two.")]
    assert not {"prompt", "completion"} & set(chat)


def test_rewards_are_what_the_functions_say(tmp_path, tokenizer, functions):
    """They are added; None and NaN are left out; from correct_at on an attempt is correct."""
    problem = problems_of(tmp_path, [TEXT]).get(0)
    both = functions("by_length", "wish", **{"reward.correct_by": "sum", "reward.correct_at": 1.1})
    made = scored(tokenizer, both, problem, ["ab", "x" * 60])
    assert [(a.reward, a.correct, a.status) for a in made] == [(0.52, False, "ok"), (1.1, True, "ok")]
    assert made[1].parts == {"by_length": 0.6, "wish": 0.5}
    for value in (None, float("nan"), float("inf")):
        half = dataclasses.replace(problem, row={**TEXT, "wished": value})
        (attempt,) = scored(tokenizer, both, half, ["ab"])
        assert (attempt.reward, attempt.status, attempt.parts) == (0.02, "ok", {"by_length": 0.02})
        (attempt,) = scored(tokenizer, functions("wish"), half, ["ab"])
        assert (attempt.reward, attempt.correct, attempt.status) == (0.0, False, "no_reward")
    made = scored(tokenizer, functions("as_array"), problem, ["a", "b", "c"])
    assert [a.reward for a in made] == [0.0, 1.0, 2.0] and all(type(a.reward) is float for a in made)


@pytest.mark.parametrize(("name", "status", "good"), [("fragile", "error", -2.0), ("hangs", "timeout", 1.0)])
def test_a_fault_costs_its_own_reward_and_is_said_once(tmp_path, tokenizer, functions, name, status, good):
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


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("leaves", "error", "SystemExit: 3"), ("generator_exit", "error", "GeneratorExit"), ("exits", "died", "ended, code 3"),
        ("interrupts", "error", "KeyboardInterrupt: by the function"), ("huge", "error", "1.7e+308 is too large"),
    ],
)  # fmt: skip
def test_whatever_a_function_does_it_is_named_and_counted(tmp_path, tokenizer, functions, name, status, said):
    """What would end a process, or overflow a sum, costs a reward; two at 1.7e308 ended the run."""
    told, names = [], [name, "accuracy"] + ["as_array"] * (name == "huge")
    failing = functions(*names, log=told.append, **{"reward.correct_by": "own_plugins:accuracy"})
    (attempt,) = scored(tokenizer, failing, problems_of(tmp_path, [TEXT]).get(0), ["bad 7"])
    assert (attempt.reward, attempt.correct, attempt.status) == (0.0, False, status)
    assert len(told) == 1 and told[0].startswith(f"reward.fn own_plugins:{name}: ") and said in told[0]


def test_signals_work_and_forks_do_no_harm(tmp_path, tokenizer, functions):
    """In the main thread of a process of its own. What it prints, forks or leaves behind is no reply."""
    problem = problems_of(tmp_path, [TEXT]).get(0)
    for name in ("alarmed", "forks", "alarmed", "of_math_verify"):
        made = scored(tokenizer, functions(name), problem, ["\\boxed{7}", "\\boxed{7}"])
        assert [(a.reward, a.status) for a in made] == [(1.0, "ok")] * 2, name
    made = scored(tokenizer, functions("exits", log=lambda line: None), problem, ["bad", "fine"])  # asked one by one
    assert [(a.reward, a.status) for a in made] == [(0.0, "died"), (1.0, "ok")]


def test_what_a_call_started_is_killed_with_it(tmp_path):
    (tmp_path / "own_forks.py").write_text(
        "import os, time\ndef f(pid, **kwargs):\n    if os.fork() == 0:\n        open(pid, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
    )
    call = "import sys; from cgrpo_jax.process.user import UserProcess\nwith UserProcess() as p:\n    sys.path.append(sys.argv[1])\n"
    call += "    p.load('own_forks:f')\n    p.call('own_forks:f', {'pid': sys.argv[1] + '/pid'}, 0.5)"
    done = subprocess.run([sys.executable, "-c", call, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "not back after 0.5 s" in done.stderr and "in f" in done.stderr
    stat = pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


OF_A_NOTEBOOK = """
import threading
most, lock = 10, threading.Lock()
def short(completions, **kwargs):
    return [most - len(text) for text in completions]
def held(completions, **kwargs):
    with lock:
        return [1.0] * len(completions)
"""


def test_a_function_of_a_notebook_is_sent_by_value(tmp_path, tokenizer, process, monkeypatch):
    """With what it refers to; one that cannot be sent is refused by its name."""
    exec(OF_A_NOTEBOOK, made := {"__name__": "__main__"})
    for name in ("short", "held"):
        monkeypatch.setattr(sys.modules["__main__"], name, made[name], raising=False)
    short = open_rewards(small(**{"reward.fn": "__main__:short"}), process, print)
    assert [a.reward for a in scored(tokenizer, short, problems_of(tmp_path, [TEXT]).get(0), ["abc", ""])] == [7, 10]
    with pytest.raises(ConfigError) as error:
        open_rewards(small(**{"reward.fn": "__main__:held"}), process, print)
    assert str(error.value).startswith(
        "config.reward.fn = '__main__:held': TypeError: it cannot be sent to the process"
    )


def test_what_decides_correctness_is_named(tmp_path, tokenizer, functions):
    """Of several functions; their sum made a well-formed wrong answer correct."""
    problem, texts = problems_of(tmp_path, [TEXT]).get(0), ["<think> 8", "7", "<think> 7", "8"]
    names = ("accuracy", "well_formed")
    made = scored(tokenizer, functions(*names, **{"reward.correct_by": "own_plugins:accuracy"}), problem, texts)
    assert [(a.reward, a.correct) for a in made] == [(1.0, False), (1.0, True), (2.0, True), (0.0, False)]
    made = scored(tokenizer, functions(*names, **{"reward.correct_by": "sum"}), problem, texts)
    assert [a.correct for a in made] == [True, True, True, False]
    several = {"reward.fn": "own_plugins:accuracy,own_plugins:well_formed"}
    for changes, words in (
        (
            several,
            r"\(--config.reward.correct_by=own_plugins:accuracy or reward.correct_by=own_plugins:well_formed or",
        ),
        (several | {"reward.correct_by": "accurate"}, "'accurate' is none of them"),
        ({"reward.correct_by": "own_plugins:accuracy"}, "which is not set"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(small(**changes), tiny_config())


def test_gold_answers_without_a_reward_are_said(tmp_path, tokenizer, functions):
    problems, said = problems_of(tmp_path, [TEXT] * 5), []
    for name in ("catches", "accuracy", "by_length"):
        try_on_rows(functions(name, log=said.append), None, problems, tokenizer, 4)
    (line,) = said
    assert line.startswith(
        "reward.fn own_plugins:catches: 0 for the gold answers of all rows tried (3); the last one was"
    )


BAD = [
    ("fn", "own_plugins:few", "WrongNumber: 1 rewards for 4 completions"), ("fn", "own_plugins:words", "TypeError: a number or None"),
    ("fn", "own_plugins:number", "TypeError: a list of rewards is needed, not float"),
    ("fn", "own_plugins:no_kwargs", "TypeError: no_kwargs() got an unexpected keyword argument"),
    ("fn", "own_plugins:leaves", "SystemExit: 3"), ("fn", "own_plugins:deaf", "KeyError: 'nothing'"),
    ("fn", "own_plugins:huge", "ValueError: a reward of 1.7e+308 is too large"), ("fn", "own_plugins:interrupts", "KeyboardInterrupt"),
    ("critique_fn", "own_plugins:deaf", "KeyError: 'nothing'"), ("critique_fn", "own_plugins:answers", "TypeError: text or None"),
    ("critique_fn", "own_plugins:few", "WrongNumber: 1 critiques for 4 completions"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "path", "cause"), BAD)
def test_what_fails_on_the_first_rows_is_one_line(tmp_path, tokenizer, own, process, key, path, cause):
    """Key, path, cause and row; the user's own error is behind it, for --debug."""
    problems = problems_of(tmp_path, [TEXT, TEXT])
    changes = {"fn": {"reward.fn": path}}.get(key, {"refine.critique": "function", "refine.critique_fn": path})
    cfg, where = small(**changes), "reward" if key == "fn" else "refine"
    with pytest.raises(ConfigError) as error:
        try_on_rows(open_rewards(cfg, process, print), open_critic(cfg, process, print), problems, tokenizer, 4)
    line = str(error.value)
    assert line.startswith(f"config.{where}.{key} = {path!r}: {cause}") and "\n" not in line and "'wished': 0.5" in line
    assert cause.partition(":")[0] in "".join(traceback.format_exception(error.value.__cause__))


def test_a_wrong_number_of_rewards_is_counted_and_said(tmp_path, tokenizer, functions):
    """Nobody knows whose they are: asked one by one each had one, and the run trained on them."""
    said = []
    made = scored(tokenizer, functions("few", log=said.append), problems_of(tmp_path, [TEXT]).get(0), ["a", "b"])
    assert [(a.reward, a.status) for a in made] == [(0.0, "error")] * 2
    assert len(said) == 1 and "1 rewards for 2 completions" in said[0]


@pytest.mark.parametrize(
    ("fn", "cause"),
    [
        ("own_plugins", "ValueError: give package.module:function"), ("own_plugins:none_such", "AttributeError"),
        ("no_such_module:f", "ModuleNotFoundError"), ("own_plugins:note,own_plugins:note", "names a function twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_line(own, process, fn, cause):
    with pytest.raises(ConfigError, match=cause) as error:
        open_rewards(small(**{"reward.fn": fn}), process, print)
    assert "config.reward.fn = 'own_plugins" in str(error.value) or "no_such_module" in str(error.value)


def test_three_rows_are_tried(tmp_path, tokenizer, own, functions):
    """As many completions as a step has, and one alone; the first one is right."""
    try_on_rows(functions("note"), None, problems_of(tmp_path, [TEXT] * 5), tokenizer, 4)
    asked = [call["completions"] for call in lines(own)]
    assert [len(texts) for texts in asked] == [1, 4, 4, 4] and {texts[0] for texts in asked} == {
        "The answer is \\boxed{7}."
    }
    assert not any("7" in text for texts in asked for text in texts[1:])


def test_rows_need_no_answer_where_nobody_is_shown_one(tmp_path):
    rows = [{"question": "Write a poem."}, {"question": "Or prose.", "answer": {"no": "text"}}]
    problems = problems_of(tmp_path, rows, answerless=True)
    assert [problems.get(i).answer for i in range(2)] == ["", ""]
    with pytest.raises(DataError, match="row 1, column 'answer/"):
        problems_of(tmp_path, rows)


def test_what_a_critic_concludes_is_compared_with_the_rule(tmp_path, tokenizer):
    texts = ["Conclusion: correct", "Conclusion: correct", "Look again."]
    critic = OwnCritic(lambda *_: texts, RefineConfig(critique="function"), print)
    posed = Posed(problems_of(tmp_path, [TEXT]).get(0), 0, 0)
    attempts = [Attempt(completion(tokenizer, "a"), "a", 0.0, right, None, "ok") for right in (True, False, True)]
    story = by_function(critic, Brief(RefineConfig(critique="function")), posed, list(enumerate(attempts)))
    with pytest.raises(StopIteration) as end:
        story.send(next(story).call())
    found = [(one.verdict, one.agrees, one.first_agrees) for one in end.value.value]
    assert found == [(True, True, True), (True, False, False), (None, None, None)]


def test_what_a_critic_says_is_the_critique(tmp_path, tokenizer, own, process):
    """Where it fails or says nothing the fallback stands in; what fails is said once."""
    problem, said = problems_of(tmp_path, [TEXT]).get(0), []
    attempts = [
        Attempt(completion(tokenizer, text), text, reward, reward == 1, None, "ok")
        for text, reward in (("a", 0.5), ("b", 1.0))
    ]
    cfg = functools.partial(small, **{"refine.critique": "function", "refine.critique_fallback": "drop"})
    critic = open_critic(cfg(**{"refine.critique_fn": "own_plugins:critic"}), process, said.append)
    posed, chosen = Posed(problem, 0, 7), list(enumerate(attempts))

    def criticised(function, fallback):
        brief = Brief(RefineConfig(critique="function", critique_fallback=fallback))
        story = by_function(function, brief, posed, chosen)
        with pytest.raises(StopIteration) as end:
            story.send(next(story).call())
        return end.value.value

    assert [critique.text for critique in criticised(critic, "drop")] == ["CRITIC 0.5 of a in step 7", None]
    failing = open_critic(
        small(**{"refine.critique": "function", "refine.critique_fn": "own_plugins:deaf"}), process, said.append
    )
    for _ in range(2):
        made = criticised(failing, "auto")
        assert [critique.text for critique in made if critique.fallback] == [
            "The generated solution is incorrect.",
            "The generated solution is correct.",
        ]
    assert len(said) == 1 and "KeyError: 'nothing'" in said[0] and "'completions': ['a', 'b']" in said[0]
    assert open_critic(small(**{"refine.critique": "function", "refine.trigger": "never"}), process, print) is None


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
        "data.source": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "reward.fn": "own_plugins:by_length, own_plugins:wish, own_plugins:at_step",
        "reward.correct_at": 5.0, "reward.correct_by": "sum", "refine.critique": "function", "refine.critique_fn": "own_plugins:critic",
        "refine.critique_fallback": "indicative", "train.steps": 2, "train.samples": 2,
    }  # fmt: skip
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), tmp_path / "w")
    row, _ = lines(tmp_path / "w/metrics.jsonl")
    steps = [(number, group) for number in (0, 1) for group in lines(tmp_path / f"w/rollouts/00000{number + 1}.jsonl")]
    for step, group in steps:
        wished = 0.125 * int(group["question"][4])
        for response in group["responses"]:
            assert response["parts"] == {"by_length": len(response["text"]) / 100, "wish": wished, "at_step": step}
            assert (
                response["reward"] == pytest.approx(len(response["text"]) / 100 + wished + step)
                and not response["correct"]
            )
            assert response["critique"].startswith("CRITIC ") and response["critique"].endswith(f" in step {step}")
    assert row["refine/rate"] == 1 and row["verifier/no_reward"] == 0
    assert row["reward/responses"] > row["reward/by_length"] * 0.5 > 0 and "reward/wish" in row


def test_rewards_that_are_missing_are_counted(tmp_path, tokenizer, functions):
    from cgrpo_jax.records import Group

    problem = problems_of(tmp_path, [{**TEXT, "wished": None}]).get(0)
    group = Group(problem, [1], tuple(scored(tokenizer, functions("wish"), problem, ["a", "b"])), (), (0, 1), ())
    assert group_metrics([group])["verifier/no_reward"] == 2
    assert json.dumps(group.responses[0].parts) == "{}"
    assert RefineConfig().critique_fn == RewardConfig().fn == ""


def test_the_example_in_the_readme_works(tmp_path, tokenizer, monkeypatch, process):
    page = (pathlib.Path(__file__).parent.parent / "configs/README.md").read_text()
    (tmp_path / "own_example.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    example = open_rewards(small(**{"reward.fn": "own_example:length_and_format"}), process, print)
    for row in (TEXT, CHAT):
        problem = problems_of(tmp_path, [row | {"target_length": 10}]).get(0)
        made = scored(tokenizer, example, problem, ["\\boxed{69}", "x" * 30])
        assert [attempt.reward for attempt in made] == [1.0, -0.02]
