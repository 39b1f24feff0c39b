"""Strict configuration: unknown, mistyped, clashing and unread keys."""

import ast
import graphlib
import itertools
import pathlib
import re

import pytest
from config_reference import FILE, PAGE, coming, page_with, reference
from conftest import tiny_config

import cgrpo_jax
from cgrpo_jax import config
from cgrpo_jax.config import Config, from_config_dict
from cgrpo_jax.config.critics import CRITICS
from cgrpo_jax.errors import ConfigError
from cgrpo_jax.run.checks import check

ROOT = pathlib.Path(cgrpo_jax.__file__).parent


def make(**changes):
    raw = config.default_config()
    fitting = {"data.max_prompt_tokens": 64, "refine.max_prompt_tokens": 128, "train.micro_batch": 1}
    raw.update_from_flattened_dict(fitting | changes)
    raw.sampling.max_new_tokens = changes.get("sampling.max_new_tokens", 64)
    return from_config_dict(raw)


def test_defaults_are_the_newest_paper():
    cfg = from_config_dict(config.default_config("critique_grpo"))
    assert cfg == Config()
    assert (cfg.train.samples, cfg.refine.k, cfg.refine.trigger, cfg.refine.select) == (
        7,
        1,
        "none_correct",
        "correct_then_random",
    )
    assert (cfg.refine.group, cfg.objective.gamma, cfg.objective.clip_eps, cfg.objective.weights) == (
        "append",
        0.1,
        0.2,
        "per_kind",
    )
    assert cfg.objective.clip_responses and cfg.objective.clip_refinements and not cfg.objective.divide_by_std
    assert (cfg.objective.aggregation, cfg.objective.kl_coef, cfg.objective.entropy_coef) == ("constant", 0.0, 0.0)
    assert (cfg.sampling.temperature, cfg.sampling.top_p, cfg.optimizer.learning_rate) == (1.0, 1.0, 1e-6)


def test_unknown_keys_suggest_the_nearest():
    raw = config.default_config().to_dict()
    raw["refine"]["triger"] = "always"
    with pytest.raises(ConfigError, match=r"config\.refine\.triger; did you mean config\.refine\.trigger\?"):
        from_config_dict(raw)
    with pytest.raises(ConfigError, match="did you mean 'dr_grpo'"):
        config.default_config("drgrpo")


@pytest.mark.parametrize("value", ["3", 2.5, True, None])
def test_types_are_checked(value):
    raw = config.default_config().to_dict()
    raw["train"]["steps"] = value
    with pytest.raises(ConfigError, match=r"config\.train\.steps"):
        from_config_dict(raw)


IMPOSSIBLE = [
    ({"refine.k": 0}, "refine.k"),
    ({"refine.k": 9, "train.samples": 7}, "refine.k"),
    ({"refine.trigger": "sometimes"}, "refine.trigger"),
    ({"refine.refiner": "target", "objective.refined_shape": "ratio_to_sampler"}, "nobody sampled"),
    ({"refine.own_group": True}, "refine.own_group needs refine.context=together"),
    ({"refine.k": 2, "refine.refiner": "target"}, "one trace for each problem"),
    ({"sampling.max_new_tokens": 1000}, "exceeds the model's 1024 positions"),
    ({"train.updates_per_rollout": 3}, "train.updates_per_rollout"),
    ({"train.micro_batch": -1}, "train.micro_batch"),
    ({"refine.max_prompt_tokens": 64}, "refine.max_prompt_tokens"),
    ({"refine.critique": "worked"}, "worked"),
    ({"sampling.temperature": 0.0}, "sampling.temperature"),
    ({"train.samples": -1}, "train.samples"),
    ({"refine.group": "replace", "refine.k": 7}, "leaves no response"),
    ({"sampling.top_p": 0.0}, "top_p"),
    ({"eval.every": 5, "data.source": "a.jsonl", "eval.source": "a.jsonl"}, "is the file that is trained on"),
    ({"seed": -1}, "seed"),
    ({"objective.aggregation": "token_mean"}, "needs objective.weights=uniform"),
    ({"method": "sft", "train.updates_per_rollout": 2}, "method=sft has one update"),
    ({"method": "sft", "data.source": "reasoning_gym:lcm"}, "a generated task has none"),
    ({"method": "generate", "refine.k": 0}, "refine.k"),
    ({"refine.refiner": "local", "local.path": "a", "objective.refined_shape": "ratio_to_sampler"}, "not sampled from"),
    (
        {"refine.refiner": "local", "local.path": "a", "refine.own_group": True, "refine.context": "together"},
        "is not the policy's",
    ),
    ({"method": "generate", "generate.rows": "both", "refine.trigger": "never"}, "trigger not never"),
    ({"method": "generate", "generate.rows": "critiques"}, "end in a verdict"),
    ({"objective.correction_limit": 0.5}, "correction_limit"),
    ({"objective.clip_eps": 1.5}, "clip_eps"),
    ({"objective.entropy_coef": float("nan")}, "entropy_coef"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate"),
    ({"optimizer.clip_norm": float("nan")}, "optimizer.clip_norm"),
    ({"sampling.temperature": float("inf")}, "sampling.temperature"),
]


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE)
def test_impossible_values_are_refused(changes, words):
    check(make(), tiny_config())
    with pytest.raises(ConfigError, match=words):
        check(make(**changes), tiny_config())


def test_all_faults_in_one_message():
    with pytest.raises(ConfigError) as error:
        check(make(**{"refine.k": 0, "optimizer.b2": 5.0, "refine.trigger": "sometimes"}), tiny_config())
    assert len(str(error.value).splitlines()) == 4  # the heading and the three


LOOKS_FOR_DEVICES = ("devices", "local_devices", "device_count", "local_device_count", "default_backend")
NO_JAX = (
    "records.py",
    "report.py",
    "config",
    "report_page",
    "rollout",
    "data",
    "grading",
    "text",
    "evaluation",
    "process",
)


def imported(path):
    """Dotted names a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def places():
    """What each place imports, a place being a folder or a module on the top level: {place: {place: [import, ...]}}."""
    found = {}
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own in ("__init__", "configs"):
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "cgrpo_jax" and len(parts) > 1 and parts[1] != own:
                found.setdefault(own, {}).setdefault(parts[1], []).append(f"{path.name}: {name}")
    return found


def test_no_place_imports_one_that_imports_it():
    """Neither by way of others: then the places lie on floors, and each imports only from below."""
    found = places()
    try:
        floors = list(graphlib.TopologicalSorter(found).static_order())
    except graphlib.CycleError as error:
        around = error.args[1][::-1]
        pytest.fail("\n".join(f"{a} -> {b}: {found[a][b]}" for a, b in itertools.pairwise(around)))
    assert len(floors) > 15 and floors.index("config") < floors.index("rollout") < floors.index("main")


def test_the_top_level_is_what_a_user_can_do():
    """Nouns lie in folders."""
    assert len([path for path in ROOT.glob("*.py") if path.name != "__init__.py"]) <= 16


def test_the_host_side_imports_no_jax():
    files = [f for name in NO_JAX for f in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))]
    assert len(files) > 20
    for path in files:
        if path.name != "pod.py":  # which is JAX's coordination service, as this package sees it
            assert not [name for name in imported(path) if name.split(".")[0] in ("jax", "flax", "optax")], path


def test_only_what_builds_a_run_looks_for_devices():
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            of_jax = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax"
            if of_jax and node.attr in LOOKS_FOR_DEVICES:
                found.add(path.name)
    assert found == {"build.py"}


def test_each_folder_says_what_it_is_for_and_imports_what_it_says():
    folders = [path.parent for path in ROOT.glob("*/__init__.py")]
    assert len(folders) >= 9
    for folder in folders:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert "In: " in said and "Out: " in said, folder
        allowed = set(" ".join(said.split("May import: ")[1].split()).rstrip(".").split(", ")) | {folder.name}
        names = [name.split(".") for path in folder.glob("*.py") for name in imported(path)]
        assert {parts[1] for parts in names if parts[0] == "cgrpo_jax"} <= allowed, folder


def test_letters_of_axes_are_those_of_the_legend():
    legend = ast.get_docstring(ast.parse((ROOT / "records.py").read_text()))
    letters = re.findall(r"(?:^| {2,})([A-Z]) (?=[a-z])", legend.split("everywhere:")[1], re.MULTILINE)
    assert len(letters) == len(set(letters)) > 20
    names = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
            if isinstance(name, str) and (found := re.fullmatch(r"[a-z0-9_]+_([A-Z0-9]+)", name)):
                names |= {(letter, name) for letter in found[1] if letter.isalpha()}
    assert len(names) > 200 and {name for letter, name in names if letter not in letters} == set()


def test_files_and_functions_stay_small():
    for path in [*ROOT.rglob("*.py"), *ROOT.parent.glob("configs/*.py")]:
        text = path.read_text()
        assert text.count("\n") <= 400, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (path.stem, node.name) != ("training", "train"):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_the_reference_is_of_these_options():
    """Else: `python tests/config_reference.py`."""
    assert FILE.read_text() == reference()
    keys = re.findall(r"^\| `([\w.]+)` \|", reference(), re.MULTILINE)
    assert sorted(keys) == sorted(_flat(config.default_config()))


def test_the_names_of_other_frameworks_on_the_page_are_those_of_the_table():
    """Else: `python tests/config_reference.py`."""
    assert PAGE.read_text() == page_with(coming())


def _flat(config, prefix=""):
    for key, value in config.items():
        yield from _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else [f"{prefix}{key}"]


# critic: sees the truth, may be inverted, can end rows of generate.rows=critiques, is asked anew, what stands in
CRITIC_FACTS = {
    "indicative": (False, True, False, False, None), "indicative_gt": (True, True, False, False, None),
    "worked": (False, True, True, False, None), "offline": (False, True, True, False, None),
    "self_gt": (True, True, True, True, "indicative_gt"), "self_eval": (False, True, True, False, None),
    "no_verdict": (False, False, False, True, "drop"), "api": (False, True, True, True, "indicative"),
    "local": (False, True, True, True, "indicative"), "function": (False, True, False, False, "indicative"),
}  # fmt: skip


def test_what_each_critic_is_and_what_a_run_makes_of_it():
    """By hand, for all of the table; a server that is shown the truth makes the run need it."""
    assert list(CRITIC_FACTS) == list(CRITICS)
    for name, (truth, inverts, concludes, anew, stands_in) in CRITIC_FACTS.items():
        critic, cfg = CRITICS[name], make(**{"refine.critique": name})
        assert config.shows_truth(cfg) is truth, name
        assert (critic.judges, critic.concludes, critic.retries) == (inverts, concludes, anew), name
        assert (config.fallback(cfg) if critic.falls_back else None) == stands_in, name
    shown = make(**{"refine.critique": "api", "api.reference": "gt"})
    assert config.shows_truth(shown) and config.fallback(shown) == "indicative_gt"
    assert not config.shows_truth(make(**{"refine.critique": "self_gt", "refine.trigger": "never"}))
