"""Plans: names of slices, shapes of models, what lives together, the most that fits, and the command itself."""

import collections
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from test_train import small

from cgrpo_jax.errors import CheckpointError, ConfigError
from cgrpo_jax.learning.packing import BinSize
from cgrpo_jax.model import hf
from cgrpo_jax.model.hf_config import config_from_hf
from cgrpo_jax.plan import asked_topology
from cgrpo_jax.planner import chips, making, printed
from cgrpo_jax.planner.ahead import preflight
from cgrpo_jax.planner.chips import GIB
from cgrpo_jax.planner.figures import Figures, Leaf, Seconds, refused, total_bytes
from cgrpo_jax.planner.memory import DECODING, SAMPLING, Resident, largest_part, occupied, residents
from cgrpo_jax.planner.most import most, scaled
from cgrpo_jax.planner.programs import Program, largest, programs
from cgrpo_jax.planner.step import ideal_seconds, step
from cgrpo_jax.run import build
from cgrpo_jax.run.folders import shape_folder
from cgrpo_jax.workdir.progress import Progress

SHAPES = pathlib.Path(build.__file__).parents[1] / "shapes"
# Parameters as the model cards and technical reports tell them, in billions.
PUBLISHED = {
    "llama_3_2_3b": 3.21, "qwen2_5_0_5b": 0.49, "qwen2_5_7b": 7.61, "qwen2_5_math_7b": 7.62,
    "qwen3_0_6b": 0.60, "qwen3_32b": 32.8, "qwen3_8b": 8.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "chip", "count", "links"),
    [
        ("v4-8", "v4", 4, 2),
        ("v4-32", "v4", 16, 3),
        ("v4-128", "v4", 64, 6),
        ("v5litepod-1", "v5e", 1, 0),
        ("v5litepod-64", "v5e", 64, 2),
        ("v5litepod-256", "v5e", 256, 4),
        ("v5p-32", "v5p", 16, 3),
        ("v5p-512", "v5p", 256, 6),
        ("v6e-16", "v6e", 16, 2),
        ("v4:2x2x4", "v4", 16, 3),
        ("v5e:4x4", "v5e", 16, 2),
    ],
)
def test_names_of_slices(name, chip, count, links):
    found = chips.topology(name)
    assert (found.chip.name, jnp.prod(jnp.array(found.shape)), found.links) == (chip, count, links)
    assert found.ici == links * chips.CHIPS[chip].link


def test_every_accelerator_type_has_the_chips_that_it_says():
    for name, (chip, _) in chips.SLICES.items():
        size, count = int(name.rpartition("-")[2]), 1
        for length in chips.topology(name).shape:
            count *= length
        assert count == (size // 2 if chip in ("v4", "v5p") else size), name


@pytest.mark.parametrize("name", ["v4-33", "v7-8", "", "v4:4x4", "v5e:2x2x2", "v4:0x2x2", "v4:2x2x4 "])
def test_an_unknown_slice_gets_one_line_with_the_known(name):
    with pytest.raises(ConfigError) as error:
        chips.topology(name)
    said = str(error.value)
    assert "\n" not in said and "v5litepod-{1,4,8" in said and "local" in said


def test_the_topology_is_known_before_any_flag():
    assert asked_topology(["plan", "--config=x", "--topology=v4-8"]) == "v4-8"
    assert asked_topology(["plan", "-topology", "v4-8", "--json=f"]) == "v4-8"
    assert asked_topology(["plan", "--topology"]) == "" == asked_topology(["plan", "topology=v4-8"])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shapes_have_the_published_number_of_parameters(name):
    params = hf.abstract_params(config_from_hf(SHAPES / name))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    rounding = 0.05 if PUBLISHED[name] > 8 else 0.006  # of the published number
    assert abs(count / 1e9 - PUBLISHED[name]) <= rounding
    assert (SHAPES / name / "config.json").stat().st_size < 1100


def test_every_shape_is_known_by_the_names_of_the_hub():
    assert sorted(folder.name for folder in SHAPES.iterdir()) == sorted(PUBLISHED)
    for path, name in [
        ("Qwen/Qwen3-8B", "qwen3_8b"),
        ("Qwen/Qwen3-8B-Base", "qwen3_8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2_5_7b"),
        ("meta-llama/Llama-3.2-3B-Instruct", "llama_3_2_3b"),
        ("qwen3_0_6b", "qwen3_0_6b"),
    ]:
        assert shape_folder(path) == SHAPES / name
    for path in ("Qwen/Qwen3-9B", ""):
        with pytest.raises(CheckpointError, match="qwen3_32b, qwen3_8b"):
            shape_folder(path)


def test_a_shape_has_the_programs_of_the_run():
    """Letter by letter, but for the ids that only a tokenizer knows to be none."""
    run, shape = build.open_run(small()), build.plan_run(small())
    assert dataclasses.replace(shape.policy.shape, vocab_used=run.policy.shape.vocab_used) == run.policy.shape
    ours, theirs = ({p.name: p for p in programs(of, build.bin_sizes(of, 64))} for of in (run, shape))
    assert ours.keys() == theirs.keys()
    for kind, program in largest(theirs.values()).items():
        assert ours[program.name].lower().as_text() == program.lower().as_text(), kind


def test_the_largest_of_each_kind_are_chosen():
    run = build.plan_run(small())
    listed = programs(run, build.bin_sizes(run, 64))
    chosen = largest(listed)
    assert list(chosen) == list(dict.fromkeys(p.name.partition("/")[0] for p in listed if p.name != "step_key"))
    assert chosen["decode"].name.startswith("decode/8x384/") and chosen["prefill"].name == "prefill/4x128"
    assert chosen["resize"].name.startswith("resize/8x384/")


def leaves(**sizes):
    return collections.Counter({Leaf((size,), name, (size,), size): 1 for name, size in sizes.items()})


CLASSES = [
    Resident("parameters", leaves(w=100), "more chips"),
    Resident("optimizer state", leaves(m=200), "more chips"),
    Resident("sampler weights", leaves(b=50), "mesh.tensor", SAMPLING),
    Resident("rows of the sampler", leaves(s=700), "kv_cache_mb", DECODING),
]


@pytest.mark.parametrize(
    ("name", "holds", "beside"),
    [
        ("decode/8x640/1", {"b": 50, "s": 700}, 300),
        ("prefill/1x64", {"w": 100}, 950),
        ("update/1", {"w": 100, "m": 200}, 0),
        ("logps/1", {"w": 100}, 200),
        ("synced", {"w": 100, "b": 50}, 200),
    ],
)
def test_what_a_program_is_not_handed_lives_beside_it(name, holds, beside):
    place = occupied(Figures(name, peak_bytes=1000, holds=leaves(**holds)), CLASSES)
    assert sum(place.beside.values()) == beside and place.bytes == 1000 + beside
    assert sum(place.held.values()) == sum(holds.values())


def test_equal_tensors_are_counted_as_often_as_they_are():
    """Both moments of Adam look like their parameter: one of three is handed on, two stay."""
    three = [Resident("parameters", leaves(w=100), ""), Resident("optimizer state", leaves(w=100) + leaves(w=100), "")]
    place = occupied(Figures("logps/1", holds=leaves(w=100)), three)
    assert place.held == {"parameters": 100} and place.beside == {"optimizer state": 200}


def test_all_that_lives_on_a_chip_is_counted_in_bytes():
    """By hand: weights, both moments, rows of each ring, prompts that wait, and all of it of a second model as well."""
    sizes = {"sampler.rings": "128x4,384x2", "sampler.prefills": "64,256"}
    run = build.plan_run(small(**{"refine.critique": "local", "local.path": "package://quickstart"} | sizes))
    found = {one.name: one for one in residents(run, largest(programs(run, build.bin_sizes(run, 64))))}
    model = run.policy.shape
    abstract = hf.abstract_params(model)
    weights, layers = (4 * sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (abstract, abstract["layers"]))
    token = 2 * 4 * model.layers * model.kv_heads * model.head_dim  # keys and values, float32

    def rows(slots, count):
        return slots * count * token + count * (4 * 4 + 8 + 1) + 4  # four numbers, a key and a flag each; the clock

    sampler = {"rows of the sampler": rows(384, 2), "rows with other rings": rows(128, 4)}
    sampler |= {"waiting prompts": 2 * 256 * token}
    expected = {"parameters": weights, "optimizer state": 2 * weights + 4 * 4 + 1} | sampler  # four counts and a flag
    expected |= {"sampler weights": layers, "sampler weights of the second model": weights}  # which keeps no others
    expected |= {f"{name} of the second model": size for name, size in sampler.items()}
    assert {name: total_bytes(one.leaves) for name, one in found.items()} == expected


def test_what_takes_most_is_named_with_its_knob():
    place = occupied(Figures("decode/8x640/1", peak_bytes=800, holds=leaves(b=50, s=700)), CLASSES)
    assert largest_part(place, CLASSES) == ("rows of the sampler", 700, "kv_cache_mb")
    place = occupied(Figures("update/1", peak_bytes=9000, holds=leaves(w=100, m=200)), CLASSES)
    name, size, knob = largest_part(place, CLASSES)
    assert (name, size) == ("temporaries of update", 8700) and "train.micro_batch" in knob


def program(*arguments):
    return Program("update/1", jax.jit(lambda *x: x), arguments)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 47.05G of 15.75G hbm. Exceeded by 31.29G.", 47.05),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (3.00G) exceeds available HBM.", 4),
        ("Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.", float("inf")),
    ],
)
def test_what_a_refused_program_would_have_used(message, gib):
    """Arguments are beside its temporaries: here 1 GiB."""
    one = program(jax.ShapeDtypeStruct((1 << 28,), jnp.float32))
    found = refused(one, f"\nRESOURCE_EXHAUSTED: XLA:TPU compile permanent error. {message}", 1.0)
    assert found.peak_bytes == pytest.approx(gib * GIB) and found.refused.startswith("RESOURCE_EXHAUSTED")
    with pytest.raises(ConfigError, match="update/1: XLA makes no program of it: No such compile option"):
        refused(one, "No such compile option: 'xla_foo'", 1.0)


@pytest.mark.parametrize(("hbm", "number"), [(1000, 8), (999, 7), (1e9, 9_999_998), (300, 1), (299, 0)])
def test_the_most_that_fits_lies_on_the_line(hbm, number):
    asked = []

    def occupy(count):
        asked.append(count)
        return count, 200 + 100 * count

    found = most(4, 600, 1, hbm, occupy)
    assert found.number == number and len(asked) <= 2
    assert found.bytes == 200 + 100 * max(number, 1)
    assert number in asked or number in (0, 4)


def test_the_most_that_fits_where_memory_is_no_line():
    """What is told has been compiled, and fits."""

    def cubic(count):
        return 100 * count + count**3

    assert most(4, cubic(4), 1, 1000, lambda count: (count, cubic(count))).number in (6, 7)  # 8: 1312
    assert most(1, 600, 1, 1000, lambda count: (count, float("inf"))) == (1, 600)
    assert most(8, 1600, 8, 3300, lambda count: (count, 200 * count)).number == 16  # multiples of 8
    assert most(8, 1600, 8, 9900, lambda count: (32, 6400) if count == 48 else (count, 200 * count)) == (32, 6400)


def test_bins_grow_by_rows_or_by_prompts_with_their_rows():
    assert scaled(BinSize(4, 0, 0, 16, 128), 32).rows == 32
    assert scaled(BinSize(4, 2, 64, 8, 128), 3)[1:4] == (3, 64, 12)


def test_ideal_seconds_are_those_of_the_products():
    """Qwen3-8B, 16 rows of 8,192 on 16 v5p chips: 0.940 s (spec of the feasibility study)."""
    model = config_from_hf(SHAPES / "qwen3_8b")
    topology = chips.topology("v5p-32")
    assert abs(ideal_seconds(model, BinSize(1, 0, 0, 16, 8192), topology, 16) - 0.940) < 0.002


def test_a_step_is_the_sum_of_its_programs():
    run = build.plan_run(small(**{"train.prompts": 4, "train.samples": 2, "refine.trigger": "never"}))
    size = BinSize(6, 0, 0, 4, 128)
    figures = {
        "decode": Figures("decode/8x640/1", seconds=Seconds(3.0), turn=Seconds(1.0)),
        "prefill": Figures("prefill/2x64", seconds=Seconds(1.0, wire=1.0)),
        "update": Figures("update/1", seconds=Seconds(5.0), turn=Seconds(2.0, kernels=0.5)),
        "synced": Figures("synced", seconds=Seconds(0.25)),
    }
    full, half = (step(run, size, figures, share) for share in (1.0, 0.5))
    assert full.tokens == 4 * 2 * 64 and half.tokens == full.tokens / 2
    assert full.sample == 3 + 63 and half.sample == 3 + 31
    assert full.prefill == 2.0 * 4 * 64 / 128
    assert full.update == 5 + 5 * 2.5 and half.update == 5 + 2 * 2.5
    assert full.others == 0.25 and full.seconds == full.sample + full.prefill + full.update + full.others


def local_plan(**changes):
    with Progress(0, 1) as progress:
        return making.make(small(**changes), chips.topology("local"), progress, ("update", "decode"), most=False)


def test_a_plan_of_this_machine():
    plan = local_plan()
    made, said = printed.as_json(plan), printed.text(plan)
    assert made["fits"] is True and made["programs"].keys() == {"update", "decode"}
    for program in made["programs"].values():
        assert program["peak_bytes"] >= program["argument_bytes"] > 0 and program["wire_bytes"] == 0
    assert made["checkpoint_bytes"] > 3 * 4 * 0.99 * made["parameters"]
    assert "fits: " in said and "a checkpoint: " in said
    json.dumps(made, allow_nan=False)


def test_what_a_program_does_not_use_is_not_handed_to_it():
    """Fresh moments need the shapes of the parameters only: these lie beside it, whatever the signature says."""
    with Progress(0, 1) as progress:
        plan = making.make(small(), chips.topology("local"), progress, ("init", "update"), most=False)
    init, update = plan.places["init"], plan.places["update"]
    (own,) = [total_bytes(c.leaves) for c in plan.classes if c.name == "parameters"]
    assert sum(init.beside.values()) == own and sum(init.held.values()) == pytest.approx(2 * own, rel=1e-3)
    assert not update.beside and sum(update.held.values()) == pytest.approx(3 * own, rel=1e-3)


def test_the_most_rows_beside_a_second_model():
    """Its rows are as large as those of the policy, and yet no program of the policy is handed them."""
    found = {}
    for who, changes in (("one", {}), ("two", {"refine.critique": "local", "local.path": "package://quickstart"})):
        with Progress(0, 1) as progress:
            found[who] = making.make(small(**changes), chips.topology("local"), progress, ("decode",))
    one, two = (found[who].places["decode"] for who in ("one", "two"))
    own = {c.name: total_bytes(c.leaves) for c in found["two"].classes if "second model" in c.name}
    assert two.held == one.held and {name: two.beside[name] for name in own} == own
    one, two = (found[who].rows.number for who in ("one", "two"))
    assert 0.99 * one < two < one and two > 1000  # fewer by what the second model holds


def test_what_does_not_fit_is_told_with_class_and_knob():
    plan = local_plan(**{"sampler.kv_cache_mb": 64.0, "train.prompts": 64})
    plan.hbm = 20e6
    lines = [line for line in printed.text(plan).splitlines() if line.startswith("does not fit: ")]
    assert len(lines) == len(plan.unfit) and not printed.as_json(plan)["fits"]
    assert any("rows of the sampler" in line and "sampler.kv_cache_mb" in line for line in lines)


def command(*arguments, folder, **environment):
    call = [sys.executable, "-m", "cgrpo_jax.plan", *arguments]
    own = os.environ | {"PYTHONPATH": os.pathsep.join([str(SHAPES.parent.parent), os.environ.get("PYTHONPATH", "")])}
    own.pop("JAX_PLATFORMS", None)
    return subprocess.run(call, capture_output=True, text=True, cwd=folder, env=own | environment, timeout=1700)


def test_mistakes_are_one_line_and_exit_2(tmp_path):
    done = command("--config=quickstart", "--topology=v4-33", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --topology=v4-33; did you mean 'v4-32'")
    assert len(done.stderr.splitlines()) == 1


def test_the_longest_case_runs_first(capsys):
    preflight(build.open_run(small()), print)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("preflight: update/") and "planned" in lines[0] and "does not count" in lines[0]
    assert any(line.startswith("preflight: decode/") for line in lines)
