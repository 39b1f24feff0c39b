"""Texts by dotted path: imported and tried before anything else, and used wherever a prompt is written."""

import dataclasses
import functools
from typing import ClassVar

import jax
import pytest
from test_data import Parsable, own_cache, write_jsonl  # noqa: F401
from test_rollout import PROBLEM, QUESTION, WRONG, Table, completion, groups_from, method_of
from test_train import small

from cgrpo_jax.config.options import DataConfig, RefineConfig, TextsConfig
from cgrpo_jax.data.sources import load_problems
from cgrpo_jax.data.tasks import load_task
from cgrpo_jax.errors import ConfigError, DataError, PromptError
from cgrpo_jax.records import Attempt, Kind
from cgrpo_jax.rollout.critics import Brief
from cgrpo_jax.rollout.served import Reply
from cgrpo_jax.rollout.written import critic_and_scorer, criticised
from cgrpo_jax.run import build
from cgrpo_jax.run.answers import settings_of
from cgrpo_jax.run.plugins import open_texts
from cgrpo_jax.text.prompts import INSTRUCTION, SYSTEM, Texts
from cgrpo_jax.training import train

OWN = """
written = []

def user(text):
    return [{"role": "user", "content": text}]

def task(question):
    written.append(("task", question))
    return user(f"TASK {question}")

def critique(question, solution, truth, verdict):
    written.append(("critique", question))
    return user(f"CRITIC {question} {solution} {truth} {verdict}")

def refinement(question, attempts):
    written.append(("refinement", question))
    return user("REFINE " + question + "".join(f" [{solution} {critique}]" for solution, critique in attempts))

def fails(*arguments):
    return {}["missing"]

def plain(*arguments):
    return "text"

def number(*arguments):
    return [{"role": "user", "content": 3}]

def answers(*arguments):
    return [{"role": "assistant", "content": "I"}]

def narrow(question):
    return user(question) if question.startswith("What is 2+3") else user(1 / 0)

constant = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of somebody's, importable as `own_texts`, and one that fails."""
    (tmp_path / "own_texts.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return TextsConfig("own_texts:task", "own_texts:critique", "own_texts:refinement")


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("own_texts", "give package.module:function"), ("own_texts:", "give package.module:function"),
        ("own_texts:tusk", "AttributeError"), ("own_text:task", "ModuleNotFoundError: No module named 'own_text'"),
        ("own_broken:task", "No module named 'nothing_of_that_name'"), ("own_texts:constant", "a int is no function"),
        ("own_texts:fails", "KeyError: 'missing'"), ("own_texts:plain", "TypeError: chat turns are needed"),
        ("own_texts:number", "ValueError: each turn needs text"), ("own_texts:answers", "must be the user's"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["task", "critique", "refinement"])
def test_what_cannot_be_used_is_one_line_with_key_and_cause(tokenizer, own, key, path, cause):
    with pytest.raises(ConfigError, match=cause) as error:
        open_texts(dataclasses.replace(own, **{key: path}), tokenizer.encode_chat)
    assert str(error.value).startswith(f"config.texts.{key} = {path!r}: ") and "\n" not in str(error.value)


def test_the_defaults_are_the_papers_and_what_the_template_refuses_is_said(tokenizer):
    assert open_texts(TextsConfig(), tokenizer.encode_chat) == Texts()

    def refuse(turns):
        raise PromptError("the chat template leaves out a turn")

    with pytest.raises(ConfigError, match=r"config\.texts\.task = .*PromptError: the chat template leaves out"):
        open_texts(TextsConfig(), refuse)


def test_the_task_text_asks_wherever_the_papers_would(tmp_path, tokenizer, own):
    """In training and in evaluation, of any source; chat turns that a row has of its own stay."""
    task = open_texts(own, tokenizer.encode_chat).task
    paper = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Why?\n{INSTRUCTION}"}]
    rows = [
        {"question": "Why?", "answer": "1"}, {"prompt": paper, "answer": "1"},
        {"prompt": [{"role": "user", "content": "Why?"}], "answer": "1"},
    ]  # fmt: skip
    source = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    load = functools.partial(load_problems, seed=0, parsable=Parsable(), prompt_tokens=lambda problem: 1)
    asked = [load(source, task=task).get(i).messages[-1]["content"] for i in range(3)]
    assert asked == ["TASK Why?", "TASK Why?", "Why?"]
    assert load(DataConfig(source="arithmetic"), task=task).get(0).messages[0]["content"].startswith("TASK What is")
    named = load_task("mine", source.source, 0, source, lambda problem: None, print, task_prompt=task)
    assert [one.problem.messages[-1]["content"] for one in named] == asked
    run = build.open_run(small())
    assert settings_of(run, task)["prompt"] != settings_of(run)["prompt"]
    narrow = open_texts(dataclasses.replace(own, task="own_texts:narrow"), tokenizer.encode_chat).task
    with pytest.raises(DataError, match=r"row 1, column 'question': texts\.task: ZeroDivisionError"):
        load(source, task=narrow)


@pytest.mark.parametrize("context", ["each", "together"])
def test_critics_and_refinements_are_asked_by_them(tokenizer, own, context):
    texts, asked = open_texts(own, tokenizer.encode_chat), []
    cfg = RefineConfig(critique="no_verdict", context=context)
    method = method_of(tokenizer, cfg, 2)
    critic, _ = critic_and_scorer(Brief(cfg, prompt=texts.critique), tokenizer, method.scorer)

    def answer(request):
        return completion(tokenizer, "Hm." if request.name.kind == Kind.CRITIQUE else WRONG)

    method = dataclasses.replace(method, criticise=critic, texts=texts)
    groups_from(Table(answer, asked), [PROBLEM], method)
    prompts = {kind: [tokenizer.hf.decode(r.prompt_ids) for r in asked if r.name.kind == kind] for kind in Kind}
    assert all(f"CRITIC {QUESTION} {WRONG} None False" in prompt for prompt in prompts[Kind.CRITIQUE])
    attempts = f" [{WRONG} Hm.]" * (2 if context == "together" else 1)
    assert len(prompts[Kind.REFINEMENT]) == len(prompts[Kind.CRITIQUE]) == 2
    assert all(f"REFINE {QUESTION}{attempts}<" in prompt for prompt in prompts[Kind.REFINEMENT])


def test_a_server_is_asked_by_them(tokenizer, own):
    class Quiet:
        """A server that writes down what it was asked."""

        asked: ClassVar = []

        def ask(self, messages, attempt):
            self.asked.append(messages)
            return Reply(None, False, "busy", 0, 0, 0.0)

    texts, attempt = open_texts(own, tokenizer.encode_chat), Attempt(None, WRONG, 0.0, False, None, "ok")
    criticised(Quiet(), Brief(RefineConfig(critique="api"), "gt", texts.critique), PROBLEM, attempt)
    assert Quiet.asked == [texts.critique(QUESTION, WRONG, "69", True)]


def test_a_run_asks_by_them(tmp_path, own):
    """What was tried in the beginning is not counted."""
    import own_texts

    changes = {f"texts.{name}": path for name, path in dataclasses.asdict(own).items()}
    changes |= {"refine.trigger": "always", "refine.critique": "no_verdict", "refine.critique_tokens": 4}
    own_texts.written.clear()
    changes |= {"train.steps": 1, "train.samples": 2, "train.prompts": 1}
    with jax.numpy_rank_promotion("allow"):
        train(small(**changes), tmp_path / "w")
    used = [name for name, question in own_texts.written if question != "What is 2+3?"]
    assert used.count("task") >= 9 and used.count("critique") >= 2 and used.count("refinement") >= 1
