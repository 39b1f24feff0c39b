"""Opens what the leader needs before a run: data, prompts, the user's functions. All faults are raised in one error."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from cgrpo_jax.config import Config, shows_truth
from cgrpo_jax.config.options import DataConfig, VerifierConfig, generated
from cgrpo_jax.data.checking import Parsable, prompt_fault
from cgrpo_jax.data.files import local_file
from cgrpo_jax.data.sources import Problems, hold_out, load_problems, load_targets, mends
from cgrpo_jax.data.tasks import NamedProblem, load_task, parse_names
from cgrpo_jax.errors import CheckpointError, ConfigError, DataError, MeshError, PromptError
from cgrpo_jax.grading.functions import Functions
from cgrpo_jax.grading.verifier import Verifier
from cgrpo_jax.process.user import UserProcess
from cgrpo_jax.records import Problem
from cgrpo_jax.rollout.critics import OwnCritic
from cgrpo_jax.run import build
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.checks import check, holds_out
from cgrpo_jax.run.folders import model_folder
from cgrpo_jax.run.plugins import open_critic, open_rewards, open_texts, try_on_rows
from cgrpo_jax.text.prompts import TaskPrompt, Texts, question_messages
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.workdir.tracking import check_tracker

T = TypeVar("T")
Log = Callable[[str], None]
Loaded = tuple[Problems, dict[str, list[Problem]], int]  # see `load_data`
NO_REWARD, NO_CRITIC = "--config.reward.fn=", "--config.refine.critique=indicative_gt --config.refine.critique_fn="
WARM_START_PROMPT = 64  # tokens of a question of the warm start without a refinement's context, at most
REFUSALS = (ConfigError, DataError, CheckpointError, MeshError, PromptError)


class Refused(ConfigError):
    """Several faults that keep a run from starting, in one error."""

    def __init__(self, errors: Sequence[Exception]):
        self.errors = tuple(errors)
        told = [f"{number}. {error}" for number, error in enumerate(errors, 1)]
        super().__init__("\n".join([f"{len(errors)} things keep this run from starting:", *told]))


class Together:
    """Collects the errors of a start: each part is tried, whether or not those before it failed."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def __call__(self, part: Callable[[], T], without: str = "") -> T | None:
        """The value of `part()`; None where it raises an error of the user's making, which is kept.

        Args:
          without: options under which the run does without this part.
        """
        try:
            return part()
        except REFUSALS as error:
            if without:
                error.args = (f"{error} ({without} does without)",)
            known = set(map(str, self.errors))  # one source that is trained on and evaluated is told once
            found = error.errors if isinstance(error, Refused) else [error]
            self.errors += [one for one in found if str(one) not in known]
            return None

    def settle(self) -> None:
        """Raises what was kept: a single error as it is, several as `Refused`."""
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else Refused(self.errors) from self.errors[0]


class Opened(NamedTuple):
    """The data, prompts and functions of a run."""

    texts: Texts
    functions: Functions | None  # of reward.fn
    own_critic: OwnCritic | None  # of critique=function
    loaded: Loaded


def prompt_length(tokenizer: Tokenizer | None, problem: Problem) -> int:
    """Tokens of a problem's prompt; 0 without a tokenizer."""
    return len(tokenizer.encode_chat(problem.messages)) if tokenizer else 0


def load_tasks(
    cfg: Config, tokenizer: Tokenizer | None, parsable: Parsable, log: Log, task_prompt: TaskPrompt
) -> dict[str, list[NamedProblem]]:
    """The problems of each task that eval.tasks names.

    Args:
      tokenizer: None: it is not to be had, and no prompt has a length.
    """
    measure = functools.partial(prompt_length, tokenizer)
    fault = functools.partial(prompt_fault, prompt_tokens=measure, most=cfg.data.max_prompt_tokens)
    load = functools.partial(
        load_task, limit=cfg.eval.problems, cfg=cfg.data, fault=fault, log=log, parsable=parsable,
        task_prompt=task_prompt,
    )  # fmt: skip
    return {name: load(name, where) for name, where in parse_names(cfg.eval.tasks)}


class Data:
    """Loads the sources of problems that a configuration names.

    Args:
      tokenizer: None: it is not to be had, and no prompt has a length.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer | None, verifier: Verifier, log: Log, task: TaskPrompt):
        self.cfg, self.tokenizer, self.log, self.task, self.longest = cfg, tokenizer, log, task, 1
        self.parsable = verifier.readable
        self.load = functools.partial(
            load_problems, seed=cfg.seed, parsable=self.parsable, log=log, task=task, own=bool(cfg.reward.fn),
            answerless=not shows_truth(cfg),
        )  # fmt: skip

    def prompt_tokens(self, problem: Problem) -> int:
        return prompt_length(self.tokenizer, problem)

    def measured(self, problem: Problem) -> int:
        count = self.prompt_tokens(problem)
        self.longest = max(self.longest, count)
        return count

    def target_tokens(self, problem: Problem) -> int:
        return len(self.tokenizer.encode_answer(problem.answer)) if self.tokenizer else 0

    def _mendable(self, option: str, cfg: DataConfig, load: Callable[[], Problems]) -> Problems:
        """Calls `load`; adds to a DataError the options that may mend it."""
        try:
            return load()
        except DataError as error:
            found = mends(cfg, option)
            raise DataError(f"{option}: {error}" + (f"\n  {' '.join(found)}" if found else "")) from error

    def training(self) -> Problems:
        """The stream of training problems."""
        return self._mendable("data.source", self.cfg.data, self._training)

    def _training(self) -> Problems:
        cfg = self.cfg
        if cfg.method == "sft" and cfg.data.source != "arithmetic":
            most = cfg.sampling.max_new_tokens
            return load_targets(cfg.data, most, self.measured, self.target_tokens, self.log, self.task)
        traced = cfg.refine.trigger != "never" and cfg.refine.refiner == "target"
        problems = self.load(cfg.data, prompt_tokens=self.measured, traced=traced)
        if cfg.method == "sft":  # of the warm start, whose plain rows and refinements are not looked at beforehand
            self.longest = WARM_START_PROMPT
        return problems

    def tasks(self) -> dict[str, list[Problem]]:
        """The problems of each task of eval.tasks, by the name of its metrics."""
        tasks = load_tasks(self.cfg, self.tokenizer, self.parsable, self.log, self.task)
        return {f"eval/{name}": [named.problem for named in task] for name, task in tasks.items()}

    def test(self) -> Problems:
        """The held-out problems: those of eval.source, or else of data.source with the split eval.split."""
        cfg = self.cfg
        test = dataclasses.replace(cfg.data, split=cfg.eval.split)
        if cfg.eval.source:
            test = dataclasses.replace(test, source=cfg.eval.source, revision=cfg.eval.revision)
            test = dataclasses.replace(test, question_column="", answer_column="")
        load = functools.partial(self.load, test, prompt_tokens=self.prompt_tokens)
        return self._mendable("eval.source" if cfg.eval.source else "data.source", test, load)

    def split(self, whole: Problems) -> tuple[Problems, Problems]:
        """Divides a file that has no split into problems to train on and problems to evaluate."""
        asked = whole
        if self.cfg.method == "sft":  # whose answers are texts to learn
            asked = self.load(dataclasses.replace(self.cfg.data, answer_column=""), prompt_tokens=self.prompt_tokens)
        return hold_out(whole, asked, self.cfg.data.source, self.cfg.seed, self.log)


def load_data(
    cfg: Config, tokenizer: Tokenizer | None, verifier: Verifier, log: Log, task: TaskPrompt = question_messages
) -> Loaded:
    """The training stream, what is evaluated, and the tokens of the longest prompt of training that was looked at."""
    data, together = Data(cfg, tokenizer, verifier, log, task), Together()
    problems, tasks, test = together(data.training), {}, None
    if cfg.eval.every and cfg.method != "generate":
        tasks = together(data.tasks) or {}
        if holds_out(cfg) and problems is not None:
            whole = problems
            problems, test = together(lambda: data.split(whole)) or (None, None)
        elif not holds_out(cfg) and (cfg.eval.source or not cfg.eval.tasks):
            test = together(data.test)
    together.settle()
    assert problems is not None
    if test is not None:
        count = cfg.eval.problems or test.size or 0
        count = count if test.size is None else min(count, test.size)
        tasks = {"eval": [test.get(index) for index in range(count)]} | tasks
    return problems, tasks, data.longest


def open_all(cfg: Config, tokenizer: Tokenizer | None, verifier: Verifier, process: UserProcess, log: Log) -> Opened:
    """Opens everything that a run needs beside model and devices.

    Args:
      tokenizer: None: it is not to be had; lengths are not measured and functions not tried on rows.

    Raises:
      ConfigError, DataError, PromptError: what is wrong, all of it at once.
    """
    together = Together()
    together(lambda: check_tracker(cfg.train.tracker), "--config.train.tracker=")
    encode = tokenizer.encode_chat if tokenizer else lambda turns: []
    usual = " ".join(f"--config.texts.{field.name}={field.default}" for field in dataclasses.fields(cfg.texts))
    texts = together(lambda: open_texts(cfg.texts, encode), usual) or Texts()
    own = together(lambda: open_rewards(cfg, process, log), NO_REWARD)
    critic = together(lambda: open_critic(cfg, process, log), NO_CRITIC)
    loaded = together(lambda: load_data(cfg, tokenizer, verifier, log, texts.task))
    problems = loaded[0] if loaded else _whatever_is_good(cfg, tokenizer, verifier, texts.task)
    if problems is not None and tokenizer is not None:
        together(lambda: try_on_rows(own, None, problems, tokenizer, cfg.train.samples), NO_REWARD)
        together(lambda: try_on_rows(None, critic, problems, tokenizer, cfg.train.samples), NO_CRITIC)
    together.settle()
    assert loaded is not None
    return Opened(texts, own, critic, loaded)


def _whatever_is_good(
    cfg: Config, tokenizer: Tokenizer | None, verifier: Verifier, task: TaskPrompt
) -> Problems | None:
    """The valid rows of a training source that also has invalid ones, to try the user's functions on."""
    lenient = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, on_bad_row="drop"))
    with contextlib.suppress(*REFUSALS):
        return Data(lenient, tokenizer, verifier, lambda line: None, task).training()
    return None


def open_run(cfg: Config) -> Run:
    """`build.open_run`; where that is refused, what else is wrong with the run is found, too, and raised with it.

    Raises:
      ConfigError, CheckpointError, MeshError, DataError, PromptError.
    """
    try:
        return build.open_run(cfg)
    except REFUSALS as error:
        together = Together()
        together.errors.append(error)
        tokenizer = None
        if isinstance(error, CheckpointError):  # then nothing else was checked
            together(lambda: check(cfg, None))
        else:
            tokenizer = Tokenizer(model_folder(cfg.model.path, cfg.model.revision), cfg.model.thinking)
        here = local_file(cfg.data.source) or generated(cfg.data.source)  # a hub set is not fetched for that
        if here and cfg.method != "eval":
            with Verifier(VerifierConfig()) as verifier, UserProcess() as process:
                together(lambda: open_all(cfg, tokenizer, verifier, process, lambda line: None))
        together.settle()
        raise
