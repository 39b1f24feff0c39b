"""The reader of compiled programs, against numbers worked by hand, and against another reader where it is there."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED

from cgrpo_jax.planner.cost import cost_of, group_size
from cgrpo_jax.planner.hlo import bytes_of, parse, trip_count

HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=4\n\n"
# A loop of 5 turns, told by nothing but its condition and its step; its body holds one product and one gather.
LOOP = """
%cond (s: (s32[], bf16[8,16], s32[])) -> pred[] {
  %s = (s32[], bf16[8,16]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s), index=0
  %n.1 = s32[] get-tuple-element(%s), index=2
  ROOT %less = pred[] compare(%i.1, %n.1), direction=LT
}

%stepped (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%p, %two)
}

%body (s.1: (s32[], bf16[8,16], s32[])) -> (s32[], bf16[8,16], s32[]) {
  %s.1 = (s32[], bf16[8,16]{1,0}, s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.1), index=0
  %x.2 = bf16[8,16]{1,0} get-tuple-element(%s.1), index=1
  %n.2 = s32[] get-tuple-element(%s.1), index=2
  %next = s32[] fusion(%i.2), kind=kLoop, calls=%stepped, backend_config={"window_config":{"estimated_cycles":"3"}}
  %gathered = bf16[32,16]{1,0} all-gather(%x.2), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %cut = bf16[8,16]{1,0} fusion(%gathered), kind=kOutput, calls=%stepped, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], bf16[8,16]{1,0}, s32[]) tuple(%next, %cut, %n.2)
}

ENTRY %main (a: bf16[8,16], k: s32[]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %zero = s32[] constant(0)
  %nine = s32[] constant(9)
  %state = (s32[], bf16[8,16]{1,0}, s32[]) tuple(%zero, %a, LIMIT)
  %loop = (s32[], bf16[8,16]{1,0}, s32[]) while(%state), condition=%cond, body=%body
  ROOT %end = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
GATHER = 32 * 16 * 2 * 3 / 4  # bytes that each of 4 devices sends


def test_bytes_of_types():
    assert bytes_of("bf16[8,16]{1,0:T(8,128)(2,1)}") == 256
    assert bytes_of("(f32[], s4[3]{0}, (pred[5]{0}, token[]))") == 4 + 1.5 + 5


def test_a_loop_is_multiplied_by_its_turns():
    module = parse(HEAD + LOOP.replace("LIMIT", "%nine"))
    main = module.computations["main"]
    assert (module.entry, module.partitions) == ("main", 4)
    assert trip_count(module, main, main.of_name["loop"]) == 5  # 0 2 4 6 8
    cost = cost_of(HEAD + LOOP.replace("LIMIT", "%nine"))
    assert (cost.cycles, cost.wire_bytes, cost.again) == (5 * 103, 5 * GATHER, None)
    assert cost.times == {("all-gather", "bf16", 4): 5}


def test_chains_of_calls_are_followed_once():
    """40 fusions in a row, each with the last one as both of its operands: 2^40 paths, a step of 80."""
    chain = ["  %next.0 = s32[] fusion(%i.2, %i.2), kind=kLoop, calls=%stepped"]
    chain += [
        f"  %next.{n} = s32[] fusion(%next.{n - 1}, %next.{n - 1}), kind=kLoop, calls=%stepped" for n in range(1, 40)
    ]
    (line,) = [line for line in LOOP.splitlines() if line.startswith("  %next = ")]
    text = LOOP.replace(line, "\n".join(chain)).replace("tuple(%next,", "tuple(%next.39,")
    module = parse(HEAD + text.replace("constant(9)", "constant(800)").replace("LIMIT", "%nine"))
    main = module.computations[module.entry]
    assert trip_count(module, main, main.of_name["loop"]) == 10


def test_a_loop_that_data_decide_is_counted_once_and_told_apart():
    cost = cost_of(HEAD + LOOP.replace("LIMIT", "%k"))
    assert (cost.cycles, cost.wire_bytes) == (103, GATHER)
    assert (cost.again.cycles, cost.again.wire_bytes) == (103, GATHER)


def test_a_number_of_turns_in_the_text_comes_first():
    known = ', backend_config={"known_trip_count":{"n":"7"}}'
    text = (HEAD + LOOP.replace("LIMIT", "%k")).replace("body=%body", "body=%body" + known)
    assert cost_of(text).cycles == 7 * 103


def entry(lines, before=""):
    return f"{HEAD}{before}\nENTRY %main (a: f32[64]) -> f32[64] {{\n  %a = f32[64]{{0}} parameter(0)\n{lines}\n}}\n"


@pytest.mark.parametrize(
    ("line", "wire"),
    [
        ("ROOT %r = f32[64]{0} all-reduce(%a), replica_groups=[2,2]<=[4], to_apply=%a", 2 * 256 / 2),
        ("ROOT %r = f32[16]{0} reduce-scatter(%a), replica_groups=[1,4]<=[4], dimensions={0}", 256 * 3 / 4),
        ("ROOT %r = f32[64]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}", 256),
        ("ROOT %r = f32[64]{0} all-to-all(%a), replica_groups={{0,1},{2,3}}", 128),
        ("ROOT %r = (f32[64]{0}, f32[256]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}", 1024 * 3 / 4),
        ("ROOT %r = f32[256]{0} all-gather-done(%a)", 0),
    ],
)
def test_bytes_of_a_collective(line, wire):
    assert cost_of(entry("  " + line)).wire_bytes == wire


def test_groups_of_devices_in_every_spelling():
    assert group_size("replica_groups=[4,16]<=[64]", 64) == 16
    assert group_size("replica_groups={{0,4},{1,5}}", 8) == 2
    assert group_size("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 8) == 4
    assert group_size("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(1)2,'axis_1'}", 8) == 4
    assert group_size("replica_groups={}", 8) == 8


def test_an_all_reduce_that_is_a_reduce_scatter_counts_as_one():
    fused = """
%all-reduce-scatter.3 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%p), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %own = f32[16]{0} dynamic-slice(%sum), dynamic_slice_sizes={16}
}
"""
    cost = cost_of(entry("  ROOT %r = f32[16]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3", fused))
    assert cost.wire == {("reduce-scatter", "f32", 4): 256 * 3 / 4}


def test_clones_of_one_asynchronous_collective_count_once():
    piece = """
%async_WHICH (p.WHICH: f32[64]) -> f32[256] {
  %p.WHICH = f32[64]{0} parameter(0)
  ROOT %g.WHICH = f32[256]{0} all-gather(%p.WHICH), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}
"""
    lines = "\n".join(f"  %f{which} = f32[256]{{0}} fusion(%a), calls=%async_{which}" for which in (1, 2, 3))
    before = "".join(piece.replace("WHICH", str(which)) for which in (1, 2, 3))
    assert cost_of(entry(lines, before)).wire_bytes == 1024 * 3 / 4
    other = before.replace("channel_id=5", "channel_id=6", 1)
    assert cost_of(entry(lines, other)).wire_bytes == 2 * 1024 * 3 / 4
    assert not +cost_of(entry(lines, before)).behind
    named = lines.replace("%f1 =", "%async-collective-start.1 =")
    assert cost_of(entry(named, before)).behind == {("all-gather", "f32", 4): 1024 * 3 / 4}


def test_the_dearest_branch_counts():
    branches = "".join(
        f"%b{n} (p{n}: f32[64]) -> f32[64] {{\n  %p{n} = f32[64]{{0}} parameter(0)\n"
        f'  ROOT %c{n} = f32[64]{{0}} copy(%p{n}), backend_config={{"estimated_cycles":"{n}"}}\n}}\n\n'
        for n in (10, 30, 20)
    )
    line = "  ROOT %r = f32[64]{0} conditional(%a, %a, %a, %a), branch_computations={%b10, %b30, %b20}"
    assert cost_of(entry(line, branches)).cycles == 30


KERNEL = (
    '  ROOT %mine.2 = f32[64]{0} custom-call(%a), custom_call_target="tpu_custom_call", '
    'frontend_attributes={kernel_metadata={\n"x":"y"\n}}, backend_config={"custom_call_config":{"body":"a}b",'
    '"cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"2e3"}}}'
)


def test_kernels_are_what_they_declare():
    (name, kernel), *more = cost_of(entry(KERNEL)).kernels.items()
    assert (name, kernel.runs, kernel.flops, kernel.bytes, kernel.declared, more) == ("mine", 1, 1000, 2000, True, [])


def test_splash_kernels_are_told_by_their_shapes():
    """Causal: half of 2 and of 5 products of [T, S] for each head."""
    operands = "  %q = bf16[8,256,128]{2,1,0} copy(%a)\n  %k = bf16[2,512,128]{2,1,0} copy(%a)\n"
    call = 'custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"'
    forward = f"{operands}  ROOT %splash_mha_fwd_residuals.1 = bf16[8,256,128]{{2,1,0}} {call}"
    back = f"{operands}  ROOT %splash_mha_dkv_no_residuals.1 = (bf16[4,8,256,128]{{3,2,1,0}}, bf16[2,512,128]) {call}"
    (kernel,) = cost_of(entry(forward)).kernels.values()
    product = 2 * 8 * 256 * 512 * 128
    assert kernel.flops == 2 * product / 2 and not kernel.declared
    assert kernel.bytes == 2 * 128 * (2 * 8 * 256 + 2 * 2 * 512)
    assert next(iter(cost_of(entry(back)).kernels.values())).flops == 5 * product / 2


def test_loops_of_a_program_of_this_machine():
    """The CPU's compiler writes no cycles, but loops and their turns are there: one in another, one that data decide."""

    def f(x, n):
        def inner(_, x):
            return jnp.sin(x) @ x

        def outer(_, x):
            return jax.lax.fori_loop(0, 3, inner, x)

        return jax.lax.fori_loop(0, n, inner, jax.lax.fori_loop(0, 7, outer, x))

    text = jax.jit(f).lower(np.zeros((64, 64), np.float32), np.int32(2)).compile().as_text()
    module, turns = parse(text), []
    for inside in module.computations.values():
        turns += [trip_count(module, inside, made) for made in inside if made.op == "while"]
    assert sorted(turns, key=str) == [3, 7, None]


@pytest.fixture(scope="module")
def other_reader():
    path = SHARED / "tools/hlo_cycles.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    spec = importlib.util.spec_from_file_location("hlo_cycles", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("limit", ["%nine", "%k"])
def test_another_reader_agrees(other_reader, limit):
    text = HEAD + LOOP.replace("LIMIT", limit)
    theirs, own = other_reader.analyze(text), cost_of(text)
    assert theirs["estimated_cycles"] == own.cycles
    assert theirs["collective_wire_bytes_per_device"] == own.wire_bytes
