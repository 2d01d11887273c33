"""The emulator itself, on kernels of a few instructions: numbers, ways that part and meet, and each kind of fault."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.emulation.floats import (
    Approximation,
    bfloat16_bits,
    coarse,
    flush,
    fma,
    fma_double,
    from_bfloat16,
    truncated_bfloat16_bits,
)
from tests.emulation.instructions import UnknownInstruction
from tests.emulation.machine import Machine
from tests.emulation.memory import Fault, GlobalMemory
from tests.emulation.planted import KINDS, planted
from tests.emulation.ptx import Address, Immediate, Program, Register, SyntaxFault, Vector, parse

#: out[thread] of the grid is at %rd2, in[thread] at %rd1; %r1 is the thread's number in its block.
KERNEL = """
.version 8.8
.target sm_90a
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 in,
    .param .u64 .ptr .global .align 1 out
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .loc 1 7 3 // a.py:7:3
    ld.param.b64 %rd1, [in];
    ld.param.b64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, {threads}, %r1;
    mul.wide.u32 %rd3, %r3, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    ld.global.b32 {{ %r4 }}, [ %rd1 + 0 ];
{body}
    ret;
}}
"""
STORE = "st.global.b32 [ %rd2 + 0 ], { %r5 };"


def program(body: str, threads: int = 32) -> Program:
    return parse(KERNEL.format(body=body, threads=threads))


def execute(
    body: str, values: object = None, *, threads: int = 32, blocks: int = 1, shared: int = 0, **options
) -> np.ndarray:
    """What each thread stores (``STORE``), as the dtype of the values that it loads."""
    given = (
        np.zeros(threads * blocks, np.float32) if values is None else np.resize(np.asarray(values), threads * blocks)
    )
    source, out = torch.from_numpy(given.copy()), torch.zeros(threads * blocks, dtype=torch.int32)
    memory = GlobalMemory([source.untyped_storage(), out.untyped_storage()])
    kernel = program(body, threads)
    Machine(kernel, (blocks, 1, 1), [source.data_ptr(), out.data_ptr()], memory, shared, **options).run()
    return out.numpy().view(given.dtype)


# Reading.


def test_a_kernel_is_read():
    kernel = program(
        f"$L1:\n @!%p1 bra $L1;\n /* no */ {STORE} // or\n ld.global.v2.b32 {{ %r5, %r6 }}, [ %rd1 + -8 ];"
    )
    assert (kernel.name, kernel.threads, kernel.parameters) == ("kernel", 32, {"in": 8, "out": 8})
    assert kernel.shared == {"memory": 0}
    jump, store, load, end = kernel.code[-4:]
    assert (jump.predicate, jump.negated, kernel.labels["$L1"]) == (Register("%p1"), True, len(kernel.code) - 4)
    assert store.operands == (Address(Register("%rd2"), 0), Vector((Register("%r5"),)))
    assert load.parts == ("ld", "global", "v2", "b32") and load.operands[1].offset == -8 and end.parts == ("ret",)
    assert store.where == "a.py:7:3"
    assert program("mov.b32 %r5, 0f3F800000;").code[-2].operands[1] == Immediate(0x3F800000, is_float=True)


def test_text_that_is_no_kernel_is_refused():
    for text, message in ((".version 8.8", "no kernel"), (KERNEL.format(body="", threads=1)[:-3], "does not end")):
        with pytest.raises(SyntaxFault, match=message):
            parse(text)
    with pytest.raises(UnknownInstruction, match="wgmma"):
        execute("wgmma.mma %r5, %r4;")


# Numbers.


@pytest.mark.parametrize(
    ("body", "values", "expected"),
    [
        ("add.f32 %r5, %r4, 0f3F800000;", [1.5, -0.25], [2.5, 0.75]),
        ("max.f32 %r5, %r4, 0f3F800000;", [np.nan, 2.0], [1.0, 2.0]),
        ("max.NaN.f32 %r5, %r4, 0f3F800000;", [np.nan, 2.0], [np.nan, 2.0]),
        ("ex2.approx.ftz.f32 %r5, %r4;", [3.0, -200.0], [8.0, 0.0]),
        ("mul.ftz.f32 %r5, %r4, 0f3F800000;", [1e-39, -1e-39], [0.0, -0.0]),
        ("setp.neu.f32 %p1, %r4, %r4; selp.f32 %r5, 0f3F800000, 0f00000000, %p1;", [np.nan, 1.0], [1.0, 0.0]),
        ("setp.ne.f32 %p1, %r4, 0f00000000; selp.f32 %r5, 0f3F800000, 0f00000000, %p1;", [np.nan, 1.0], [0.0, 1.0]),
        ("div.full.f32 %r5, 0f3F800000, %r4;", [0.0, 4.0], [np.inf, 0.25]),
        ("mul.f32 %r5, %r4, 0f3F800000; @%p2 add.f32 %r5, %r4, %r4;", [1.0], None),  # %p2 was never set
    ],
)
def test_floats(body, values, expected):
    values = np.array(values, np.float32)
    if expected is None:
        with pytest.raises(Fault, match="unwritten: register %p2"):
            execute(f"{body} {STORE}", values)
        return
    found = execute(f"{body} {STORE}", values)
    np.testing.assert_array_equal(found.view(np.uint32), np.resize(np.array(expected, np.float32), 32).view(np.uint32))


@pytest.mark.parametrize(
    ("body", "values", "expected"),
    [
        ("add.s32 %r5, %r4, -1;", [0, -(2**31)], [-1, 2**31 - 1]),
        ("mul.wide.s32 %rd5, %r4, 65536; shr.s64 %rd6, %rd5, 32; cvt.u32.u64 %r5, %rd6;", [-65536, 65536], [-1, 1]),
        ("shr.u32 %r5, %r4, 1;", [-2, 4], [2**31 - 1, 2]),
        ("shl.b32 %r5, %r4, 32;", [7, -1], [0, 0]),
        ("setp.lt.u32 %p1, %r4, 5; selp.b32 %r5, 1, 0, %p1;", [-1, 4], [0, 1]),
        ("mov.b32 {%rs1, %rs2}, %r4; mov.b32 %r5, {%rs2, %rs1};", [0x00010002], [0x00020001]),
        ("cvt.rn.f32.s32 %r6, %r4; cvt.rzi.s32.f32 %r5, %r6;", [-7, 12], [-7, 12]),
        ("mov.b32 %r7, %r4; cvt.u16.u32 %rs1, %r7; cvt.s32.s16 %r5, %rs1;", [65535, 3], [-1, 3]),
    ],
)
def test_integers(body, values, expected):
    found = execute(f"{body} {STORE}", np.array(values, np.int32))
    np.testing.assert_array_equal(found, np.resize(np.array(expected, np.int32), 32))


def test_bfloat16_is_rounded_as_pytorch_rounds_it():
    values = torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,))
    values[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf])  # two ties
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16_bits(values.numpy()), bits)
    assert (truncated_bfloat16_bits(values.numpy()) != bits).mean() > 0.4
    np.testing.assert_array_equal(from_bfloat16(bits), values.bfloat16().float().numpy())
    assert bfloat16_bits(np.array([np.nan], np.float32)) == 0x7FFF
    assert execute(f"cvt.rn.bf16.f32 %rs1, %r4; cvt.f32.bf16 %r5, %rs1; {STORE}", np.float32(1 + 2**-8))[0] == 1


def test_fma_rounds_once():
    generator = np.random.default_rng(0)
    x, y, z = (generator.standard_normal(500).astype(np.float32) for _ in range(3))
    z = np.where(np.arange(500) % 2, -x * y, z * np.float32(2**-30))  # near cancellation, and near a tie
    for found, *exact in zip(fma(x, y, z), x, y, z, strict=True):
        a, b, c = (Fraction(float(v)) for v in exact)
        error = abs(Fraction(float(found)) - (a * b + c))
        for neighbour in (np.nextafter(found, np.float32(-np.inf)), np.nextafter(found, np.float32(np.inf))):
            assert error <= abs(Fraction(float(neighbour)) - (a * b + c))
    assert flush(np.array([-1e-40, 1e-30], np.float32)).tolist() == [0, np.float32(1e-30)]


def test_fma_of_float64_rounds_once():
    """Where the sum cancels, too; what is not finite stays so."""
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 500))
    z = np.concatenate([-x[:250] * y[:250], generator.standard_normal(250)])
    for found, *given in zip(fma_double(x, y, z), x, y, z, strict=True):
        a, b, c = (Fraction(value) for value in given)
        assert abs(Fraction(found) - (a * b + c)) <= abs(a * b + c) * Fraction(2**-52)
    with np.errstate(all="ignore"):
        found = fma_double(np.array([np.inf, 1e300, 0.0]), np.array([1.0, 1e300, np.inf]), np.ones(3))
    assert found[0] == found[1] == np.inf and np.isnan(found[2])


def test_float64_in_two_registers():
    """Its words are taken apart in a register that a block of the text names; a reciprocal has no lower word."""
    body = f"""
    cvt.f64.f32 %rd5, %r4;
    rcp.approx.ftz.f64 %rd6, %rd5;
    fma.rn.f64 %rd6, %rd6, 0d4008000000000000, 0dBFF0000000000000;
    {{ .reg .b32 tmp; mov.b64 {{tmp, %r7}}, %rd6; }}
    mov.b32 %r6, 0;
    mov.b64 %rd7, {{%r6, %r7}};
    cvt.rn.f32.f64 %r5, %rd7; {STORE}"""
    found = execute(body, np.array([7.0, -0.5, 3.0, 1e-3], np.float32))
    np.testing.assert_allclose(found[:4], [3 / 7 - 1, -7, 0, 2999], 1e-5, 1e-5)
    third = coarse(np.array(1 / 3))
    assert third != 1 / 3 and abs(third * 3 - 1) < 1e-6


def test_an_approximation_is_off_by_two_ulp_and_repeats_itself():
    exact = np.random.default_rng(0).uniform(0.1, 100, 2000)
    found, again = (Approximation(3)(exact) for _ in range(2))
    off = np.abs(found.view(np.int32).astype(int) - exact.astype(np.float32).view(np.int32))
    assert set(off) == {0, 1, 2} and (found == again).all()
    assert (Approximation(None)(exact) == exact.astype(np.float32)).all()
    assert (Approximation(4)(exact) != found).any()


# Threads.


def test_ways_part_and_meet():
    """A loop that each thread leaves after as many rounds as its number says."""
    body = f"""
    mov.b32 %r5, 0;
    setp.eq.s32 %p1, %r1, 0;
    @%p1 bra $end;
    mov.b32 %r6, 0;
$loop:
    add.s32 %r5, %r5, %r1;
    add.s32 %r6, %r6, 1;
    setp.lt.s32 %p2, %r6, %r1;
    @%p2 bra $loop;
$end:
    add.s32 %r5, %r5, 1;
    {STORE}"""
    np.testing.assert_array_equal(execute(body, np.zeros(1, np.int32), blocks=2), np.tile(np.arange(32) ** 2 + 1, 2))


def test_what_a_masked_thread_has_not_loaded_is_no_number():
    body = f"setp.lt.s32 %p1, %r1, 3; @%p1 mov.b32 %r5, 0f3F800000; {STORE}"
    found = execute(body)
    assert (found[:3] == 1).all() and np.isnan(found[4]) and found[5] > 1e20


def test_a_warp_sums_by_shuffles():
    steps = "".join(f"shfl.sync.bfly.b32 %r6, %r4, {d}, 31, -1; add.s32 %r4, %r4, %r6;\n" for d in (16, 8, 4, 2, 1))
    assert set(execute(f"{steps} mov.b32 %r5, %r4; {STORE}", np.arange(64, dtype=np.int32), threads=64)) == {496, 1520}
    with pytest.raises(Fault, match="some threads of a warp"):
        execute("setp.lt.s32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;")


def test_a_warp_sums_in_one_step():
    body = f"mov.b32 %r6, -1; redux.sync.add.s32 %r5, %r4, %r6; {STORE}"
    found = execute(body, np.arange(-32, 32, dtype=np.int32), threads=64)
    assert set(found[:32]) == {-528} and set(found[32:]) == {496}
    with pytest.raises(Fault, match="some threads of a warp"):
        execute("mov.b32 %r6, -1; setp.lt.s32 %p1, %r1, 3; @%p1 redux.sync.add.s32 %r5, %r4, %r6;")


def test_blocks_exchange_through_shared_memory():
    """Each thread reads what its neighbour of the other warp wrote."""
    body = f"""
    mov.b32 %r6, memory;
    shl.b32 %r7, %r1, 2;
    add.s32 %r8, %r6, %r7;
    st.shared.b32 [ %r8 + 0 ], %r4;
    bar.sync 0;
    xor.b32 %r9, %r7, 128;
    add.s32 %r9, %r6, %r9;
    ld.shared.b32 %r5, [ %r9 ];
    {STORE}"""
    found = execute(body, np.arange(128, dtype=np.int32), threads=64, blocks=2, shared=256)
    np.testing.assert_array_equal(found, np.arange(128).reshape(2, 2, 32)[:, ::-1].reshape(-1))
    for text, message in (
        (body.replace("bar.sync 0;", ""), "race: read of what another thread wrote"),
        (body.replace("st.shared", "@!%p1 st.shared").replace("mov", "setp.gt.s32 %p1, %r1, 40; mov", 1), "unwritten"),
        (body.replace("%r6, memory", "%r6, 4"), "out of bounds: shared"),
        (body.replace("%r6, memory", "%r6, 2"), "misaligned: shared"),
        (body.replace("bar.sync", "setp.lt.s32 %p1, %r1, 40; @%p1 bar.sync"), "some threads of a block"),
        (body.replace("shl.b32 %r7, %r1, 2", "mov.b32 %r7, 0"), "different values to one place"),
    ):
        with pytest.raises(Fault, match=message):
            execute(text, np.arange(64, dtype=np.int32), threads=64, shared=256)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "ld.global.b32 { %r5 }, [ %rd1 + 4 ];",
            r"a.py:7:3: out of bounds: 1 accesses, the first at byte 128 of a storage of 128",
        ),
        ("add.s64 %rd1, %rd1, 1; ld.global.b32 { %r5 }, [ %rd1 + 0 ];", "misaligned"),
        ("ld.global.v2.b32 { %r5, %r6 }, [ %rd1 + 0 ];", "misaligned: an access of 8 bytes"),
        ("ld.param.b64 %rd2, [out]; st.global.b32 [ %rd2 + 0 ], { %r1 };", "different values to one place"),
        (
            "st.global.b32 [ %rd1 + 0 ], { %r1 }; ld.param.b64 %rd1, [in]; ld.global.b32 { %r5 }, [ %rd1 + 0 ];",
            "race: read",
        ),
        (
            "ld.param.b64 %rd4, [in]; ld.global.b32 { %r5 }, [ %rd4 + 8 ]; st.global.b32 [ %rd1 + 0 ], { %r1 };",
            "race: write",
        ),
        ("add.s32 %r5, %r99, 1;", "unwritten: register %r99"),
        ("ld.param.b32 %r5, [in];", "parameter in is read as b32"),
        ("$again: bra $again;", "does not end"),
    ],
)
def test_faults_in_global_memory(body, message):
    with pytest.raises(Fault, match=message):
        execute(body, limit=1000)


def test_a_race_between_blocks_is_none_between_barriers():
    """A barrier puts the threads of a block into an order, and no other's."""
    body = (
        "st.global.b32 [ %rd1 + 0 ], { %r1 }; bar.sync 0; ld.param.b64 %rd1, [in]; ld.global.b32 { %r5 }, [ %rd1 + 0 ];"
    )
    execute(body)
    with pytest.raises(Fault, match="race: read"):
        execute(body, blocks=2)


def test_each_kind_of_fault_changes_its_instruction():
    kernel = program(
        f"""
    setp.lt.s32 %p1, %r1, 3;
    @%p1 ld.global.b32 {{ %r6 }}, [ %rd1 + 0 ];
    st.shared.b32 [ %r1 + 0 ], %r4;
    bar.sync 0;
    shfl.sync.bfly.b32 %r7, %r4, 16, 31, -1;
    sub.f32 %r8, %r7, %r4;  div.full.f32 %r8, %r7, %r4;  max.f32 %r8, %r7, %r4;  add.f32 %r8, %r7, %r4;
    mul.f32 %r8, %r7, 0f3FB8AA3B;  ex2.approx.ftz.f32 %r8, %r8;  selp.f32 %r8, %r7, %r4, %p1;
    cvt.rn.bf16.f32 %rs1, %r8;
    @%p1 {STORE}""",
        threads=64,
    )
    found = list(planted(kernel))
    assert {fault.kind for fault in found} == set(KINDS)
    for fault in found:
        changed = fault(kernel)
        assert [i for i, (x, y) in enumerate(zip(kernel.code, changed.code, strict=True)) if x != y] == [fault.at]


def test_a_warp_reads_one_place_once():
    kernel = program("ld.param.b64 %rd4, [in];\nld.global.b32 { %r5 }, [ %rd4 + 0 ];", threads=64)
    memory = torch.zeros(64)
    pointer = memory.data_ptr()
    counts = Machine(kernel, (1, 1, 1), [pointer, pointer], GlobalMemory([memory.untyped_storage()])).run()
    assert counts.loaded == 64 * 4 + 2 * 4  # each thread's own number, and one for both warps
