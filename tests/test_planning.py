"""Programs are a list: what training lowers is what was planned, and nothing else compiles."""

import collections
import logging
import re

import jax
import pytest
from test_train import small

from cgrpo_jax.learning import steps
from cgrpo_jax.learning import update as learning
from cgrpo_jax.planner.programs import programs
from cgrpo_jax.run import build, models
from cgrpo_jax.sampling import engine as engines
from cgrpo_jax.sampling import programs as sampling
from cgrpo_jax.training import train

CHANGES = {
    "eval.every": 1,
    "eval.problems": 4,
    "eval.samples": 1,
    "train.updates_per_rollout": 2,
    "objective.kl_coef": 0.1,
    "sampling.stop": '["="]',
}
COMPILING = re.compile(r"Compiling jit\((\w+)\) with global shapes and types \((.*)\)\. Argument mapping")


class Compiled(logging.Handler):
    """Notes name and argument shapes of each program that is compiled."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.seen = []

    def emit(self, record):
        if match := COMPILING.match(record.getMessage()):
            self.seen.append((match[1], re.findall(r"ShapedArray\((.*?\])\)", match[2])))


@pytest.fixture
def compiled():
    handler, logger = Compiled(), logging.getLogger("jax._src.interpreters.pxla")
    level, cached = logger.level, jax.config.jax_compilation_cache_dir
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    jax.clear_caches()
    yield handler.seen
    logger.removeHandler(handler)
    logger.setLevel(level)
    assert jax.config.jax_compilation_cache_dir == cached


def shapes(program):
    """As jax spells them, of all arguments."""
    return [f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(program.arguments)]


def is_within(few, many):
    """Whether `few` is `many` with some left out: jit does not pass what a program does not use."""
    rest = iter(many)
    return all(item in rest for item in few)


def planned(cfg):
    run = build.open_run(cfg)
    return programs(run, build.bin_sizes(run, 64))


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{}, CHANGES])
def test_no_program_compiles_that_is_not_listed(tmp_path, compiled, changes):
    cfg = small(**changes)
    listed = collections.defaultdict(list)
    for program in planned(cfg):
        listed[program.function.__name__].append(shapes(program))
    compiled.clear()
    with jax.numpy_rank_promotion("allow"):
        train(cfg, tmp_path / "w")
    names = {name for name, _ in compiled}
    assert {"update", "decode", "prefill", "enter", "init"} <= names and ("halt" in names) == bool(cfg.sampling.stop)
    for name, found in compiled:
        assert any(is_within(found, of) for of in listed[name]), f"{name} {found}"


@pytest.mark.thorough
def test_what_training_lowers_is_what_was_planned(tmp_path, monkeypatch):
    """The StableHLO of each program that a run calls, letter by letter."""
    lowered = {}

    def watch(owner, name, function=None):
        function = function or getattr(owner, name)

        def call(*arguments, **static):
            text = function.lower(*arguments, **static).as_text()
            lowered.setdefault(name, set()).add(text)
            return function(*arguments, **static)

        call.lower = function.lower
        return call

    for name in ("prefill", "enter", "decode", "resize", "empty_slots"):
        monkeypatch.setattr(sampling, name, watch(sampling, name))
    for name in ("make_update", "make_logps"):
        made = getattr(steps, name)
        called = name.removeprefix("make_")
        monkeypatch.setattr(steps, name, lambda *args, made=made, called=called: watch(None, called, made(*args)))
    sync = engines.make_sync
    monkeypatch.setattr(engines, "make_sync", lambda *args, **layout: watch(None, "synced", sync(*args, **layout)))
    init = learning.make_init
    monkeypatch.setattr(learning, "make_init", lambda *args: watch(None, "init", init(*args)))
    cfg = small(**CHANGES)
    with jax.numpy_rank_promotion("allow"):  # a trace remembers under which setting it was made
        train(cfg, tmp_path / "w")
        monkeypatch.undo()
        texts = collections.defaultdict(set)
        for program in planned(cfg):
            texts[program.function.__name__].add(program.lower().as_text())
    assert set(lowered) == {"synced", "prefill", "enter", "decode", "empty_slots", "update", "logps", "init"} | (
        {"resize"} & set(lowered)
    )
    for name, found in lowered.items():
        assert found <= texts[name], name


def test_a_plan_needs_no_weights(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(models.hf, "load_params", forbidden)
    names = [program.name for program in planned(small(**CHANGES))]
    assert len(names) == len(set(names)) and len(names) > 20
    assert sum(name.startswith("update/") for name in names) == 1
