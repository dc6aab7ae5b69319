"""The tests' own tools, each shown to catch what it is there for and to pass what is right.

A guard that never fires, a counter that is off by one, or a reader of machine code that overlooks
narrow loads would let everything else in this folder pass by seeing nothing.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support import aot
from support.environment import ACCELERATOR, INTERPRETING, NO_TRITON
from support.guard import Elements, OutOfBounds, Race, count_bytes, guard
from support.poison import poison_value

interpreted = pytest.mark.usefixtures("interpreter_only")


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    if NO_TRITON:
        pytest.skip(NO_TRITON)
    from support import toy_kernels

    return toy_kernels


# ---------------------------------------------------------------- where the tests run


def test_interpreter_is_chosen_only_where_no_gpu_can_run_the_kernels(device: str) -> None:
    assert INTERPRETING == (os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))
    assert device == ("cpu" if INTERPRETING or ACCELERATOR is None else ACCELERATOR)
    assert INTERPRETING or ACCELERATOR is not None or NO_TRITON


def test_kernels_are_compiled_or_interpreted_as_chosen(toys: ModuleType) -> None:
    kind = type(toys.copy_rows).__name__
    assert kind == ("InterpretedFunction" if INTERPRETING else "JITFunction")


def test_impl_fixture_gives_both(impl: str, request: pytest.FixtureRequest) -> None:
    assert f"[{impl}]" in request.node.name
    assert impl in ("torch", "triton")


# ---------------------------------------------------------------- poison


DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.complex64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
]
MAKERS: dict[str, Callable[[torch.dtype, str], torch.Tensor]] = {
    "empty": lambda dtype, device: torch.empty(3, 5, dtype=dtype, device=device),
    "empty_like": lambda dtype, device: torch.empty_like(
        torch.zeros(3, 5, device=device), dtype=dtype
    ),
    "empty_strided": lambda dtype, device: torch.empty_strided(
        (3, 5), (8, 1), dtype=dtype, device=device
    ).as_strided((21,), (1,)),
    "new_empty": lambda dtype, device: torch.zeros(1, device=device).new_empty(3, 5, dtype=dtype),
    "new_empty_strided": lambda dtype, device: (
        torch.zeros(1, device=device)
        .new_empty_strided((3, 5), (8, 1), dtype=dtype)
        .as_strided((21,), (1,))
    ),
    "resize_": lambda dtype, device: torch.zeros(0, dtype=dtype, device=device).resize_(3, 5),
}


def is_poison(tensor: torch.Tensor) -> bool:
    value = poison_value(tensor.dtype)
    if tensor.dtype.is_complex:
        return bool(tensor.isnan().all())
    if tensor.dtype.is_floating_point:
        return bool(tensor.float().isnan().all())  # fp8 has no isnan of its own
    return bool((tensor == value).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("maker", MAKERS)
def test_fresh_memory_is_poison(maker: str, dtype: torch.dtype, device: str) -> None:
    fresh = MAKERS[maker](dtype, device)
    assert fresh.numel() >= 15
    assert is_poison(fresh)


def test_resize_poisons_only_what_is_new(device: str) -> None:
    x = torch.arange(4.0, device=device)
    assert x.resize_(7) is x
    assert x[:4].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert is_poison(x[4:])
    assert x.resize_(3).tolist() == [0.0, 1.0, 2.0]


def test_poison_keeps_the_arguments_of_empty(device: str) -> None:
    leaf = torch.empty(2, 3, requires_grad=True, device=device)
    assert leaf.is_leaf and leaf.requires_grad
    assert torch.empty((), dtype=torch.int32).item() == 0x7A7A7A7A
    assert torch.empty(0).shape == (0,)
    assert torch.empty(2, device="meta").is_meta
    out = torch.zeros(3, device=device)
    assert torch.empty(3, out=out) is out
    assert torch.empty(2, 2, layout=torch.sparse_coo).is_sparse


def test_poison_can_be_compiled() -> None:
    """Ops are compiled with fullgraph=True elsewhere: the replacements must not break the graph."""

    def fresh(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch.empty(3, 5),
            torch.empty_like(x),
            torch.empty_strided((3, 5), (8, 1)),
            x.new_empty(3, 5),
            x.new_empty((3, 5), dtype=torch.float64),
            x.new_empty_strided((3, 5), (8, 1)),
        )

    x = torch.randn(3, 5)
    for compiled, eager in zip(
        torch.compile(fresh, fullgraph=True, backend="eager")(x), fresh(x), strict=True
    ):
        assert is_poison(compiled)
        assert (compiled.dtype, compiled.stride()) == (eager.dtype, eager.stride())


def test_poison_is_taken_away_again() -> None:
    from support import poison

    assert torch.empty is poison._poisoned_empty
    before = [getattr(owner, name) for owner, name, _ in poison._PATCHES]
    with poison.poisoned_memory():
        pass
    assert before == [getattr(owner, name) for owner, name, _ in poison._PATCHES]
    assert poison._empty.__module__ != poison.__name__


# ---------------------------------------------------------------- guard


def padded(rows: int, width: int, stride: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A view whose rows lie `stride` apart in a larger buffer, NaN between them."""
    buffer = torch.full((rows * stride,), float("nan"), dtype=dtype)
    view = buffer.as_strided((rows, width), (stride, 1))
    view.copy_(torch.randn(rows, width))
    return view


def launch(kernel: Any, x: torch.Tensor, out: torch.Tensor, width: int, **changed: int) -> None:
    strides = {"row_stride": x.stride(0), "out_stride": out.stride(0), **changed}
    kernel[(x.shape[0],)](x, out, width=width, BLOCK=16, **strides)


@interpreted
class TestGuard:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("width", [1, 7, 16, 33])
    def test_passes_what_is_right(self, toys: ModuleType, width: int, dtype: torch.dtype) -> None:
        x, out = padded(3, width, 40, dtype), padded(3, width, 37, dtype)
        with guard(x, out):
            launch(toys.copy_rows, x, out, width)
        assert torch.equal(x, out)

    def test_missing_tail_mask_in_the_last_row(self, toys: ModuleType) -> None:
        x, out = torch.randn(3, 7), torch.zeros(3, 7)
        with (
            pytest.raises(OutOfBounds, match=r"program \(1, 0, 0\): load of 2 elements"),
            guard(x, out),
        ):
            launch(toys.copy_without_load_mask, x, out, 7)

    def test_missing_tail_mask_reads_padding(self, toys: ModuleType) -> None:
        x, out = padded(3, 7, 16), torch.zeros(3, 7)
        with pytest.raises(OutOfBounds, match="between the elements of float32"), guard(x, out):
            launch(toys.copy_without_load_mask, x, out, 7)

    def test_write_into_padding(self, toys: ModuleType) -> None:
        x, out = torch.randn(3, 7), padded(3, 7, 16)
        before = out.clone()
        with pytest.raises(OutOfBounds, match="store of 9 elements of 4 bytes"), guard(x, out):
            launch(toys.copy_without_store_mask, x, out, 7)
        assert torch.equal(out, before), "the store has to be stopped, not only reported"

    def test_wrong_row_stride(self, toys: ModuleType) -> None:
        x, out = padded(3, 7, 12), torch.zeros(3, 7)
        with pytest.raises(OutOfBounds, match=r"program \(1, 0, 0\)"), guard(x, out):
            launch(toys.copy_rows, x, out, 7, row_stride=7)

    @pytest.mark.parametrize("label", [-1, 7, 10**6])
    def test_label_out_of_range(self, toys: ModuleType, label: int) -> None:
        """Of the last row (7, 10**6) or the first (-1): elsewhere it stays inside the tensor."""
        x, out = torch.randn(3, 7), torch.zeros(3)
        labels = torch.tensor([label if label < 0 else 0, 0, label if label > 0 else 0])
        with pytest.raises(OutOfBounds, match="load of 1 elements"), guard(x, labels, out):
            toys.pick_label[(3,)](x, labels, out, 7)
        with guard(x, labels.clamp_(0, 6), out):
            toys.pick_label[(3,)](x, labels, out, 7)
        assert torch.equal(out, x.gather(1, labels[:, None])[:, 0])

    def test_int32_offsets(self, toys: ModuleType, tmp_path: Path) -> None:
        """Rows 2^30 + 8 apart over a sparse file: a few kilobytes on disk, as far as 2^31."""
        stride = 2**30 + 8
        file = tmp_path / "sparse"
        buffer = torch.from_file(str(file), shared=True, size=2 * stride + 100, dtype=torch.float16)
        x = buffer.as_strided((3, 100), (stride, 1))
        x.copy_(torch.randn(3, 100))
        out = torch.zeros(3, 100, dtype=torch.float16)
        with guard(x, out):
            toys.copy_rows[(3,)](x, out, stride, 100, 100, BLOCK=128)
        assert torch.equal(x, out)
        with pytest.raises(OutOfBounds, match=r"program \(2, 0, 0\): load of 100"), guard(x, out):
            toys.copy_rows_in_int32[(3,)](x, out, stride, 100, 100, BLOCK=128)

    def test_addresses_from_a_table(self, toys: ModuleType) -> None:
        rows, out = [torch.randn(5) for _ in range(3)], torch.zeros(3)
        table = torch.tensor([row.data_ptr() for row in rows])
        with guard(table, rows, out):
            toys.sum_rows_through_table[(3,)](table, out, 5, BLOCK=8)
        assert torch.allclose(out, torch.stack([row.sum() for row in rows]))
        with (
            pytest.raises(OutOfBounds, match="load of 1 elements of 4 bytes"),
            guard(table, rows, out),
        ):
            toys.sum_rows_through_table[(3,)](table, out, 6, BLOCK=8)

    def test_two_programs_write_one_address(self, toys: ModuleType) -> None:
        out = torch.zeros(1)
        with pytest.raises(Race, match=r"\(0, 0, 0\) and \(1, 0, 0\) both write"), guard(out):
            toys.write_one_place[(2,)](out)
        with guard(out):
            toys.write_one_place[(1,)](out)

    def test_one_program_reads_what_another_writes(self, toys: ModuleType) -> None:
        out = torch.zeros(4)
        with pytest.raises(Race, match=r"\(0, 0, 0\) reads what \(1, 0, 0\) writes"), guard(out):
            toys.read_neighbour[(3,)](out)

    def test_atomics_do_not_race_with_each_other(self, toys: ModuleType) -> None:
        out = torch.zeros(1)
        with guard(out):
            toys.add_atomically[(3,)](out)
        assert out.item() == 3.0
        with (
            pytest.raises(OutOfBounds, match="atomic of 1 elements"),
            guard(out, arguments_too=False),
        ):
            toys.add_atomically[(3,)](torch.zeros(1))

    def test_one_program_needs_a_barrier_to_read_back(self, toys: ModuleType) -> None:
        out = torch.zeros(16)
        with pytest.raises(Race, match="reads back 8 addresses"), guard(out):
            toys.write_then_read[(1,)](out, BLOCK=8, BARRIER=False)
        with guard(out):
            toys.write_then_read[(1,)](out, BLOCK=8, BARRIER=True)

    def test_lanes_that_disagree(self, toys: ModuleType) -> None:
        out = torch.zeros(1)
        with pytest.raises(Race, match="lanes of one store"), guard(out):
            toys.write_lanes_to_one_place[(1,)](out, 1, BLOCK=4)
        with guard(out):
            toys.write_lanes_to_one_place[(1,)](out, 0, BLOCK=4)

    def test_a_second_launch_may_read_the_first(self, toys: ModuleType) -> None:
        x, out = torch.randn(2, 30), torch.zeros(2)
        with guard(x, out):
            partial = torch.empty(2, 4)  # allocated within: its maker may hand it to kernels
            toys.partial_sums[(2, 4)](x, partial, 30, SEGMENT=8)
            toys.merge_sums[(2,)](partial, out, SEGMENTS=4)
        assert torch.allclose(out, x.sum(1))

    def test_a_base_pointer_stands_for_its_storage(self, toys: ModuleType) -> None:
        """Launchers pass one element as the base; what the test gave stays as narrow as it is."""
        x, out = padded(3, 7, 12), torch.zeros(3, 7)
        copy = x.contiguous()
        for base, stride in ((copy, 7), (x, 12)):
            with guard(x, out):
                launch(toys.copy_rows, base.as_strided((3, 1), (0, 1)), out, 7, row_stride=stride)
            assert torch.equal(out, x)
        base = copy.as_strided((3, 1), (0, 1))
        with pytest.raises(OutOfBounds, match=r"\(2, 0, 0\): load of 3"), guard(x, out):
            launch(toys.copy_rows, base, out, 8, row_stride=8, out_stride=0)
        base = x.as_strided((3, 1), (0, 1))
        with pytest.raises(OutOfBounds, match=r"\(0, 0, 0\): load of 1"), guard(x, out):
            launch(toys.copy_rows, base, out, 8, row_stride=12)

    def test_strict_guard_knows_only_the_given(self, toys: ModuleType) -> None:
        x, out = torch.randn(2, 4), torch.zeros(2, 4)
        with guard(x, out, arguments_too=False):
            launch(toys.copy_rows, x, out, 4)
        with pytest.raises(OutOfBounds, match="store of 4"), guard(x, arguments_too=False):
            launch(toys.copy_rows, x, out, 4)

    def test_a_swallowed_fault_still_fails(self, toys: ModuleType) -> None:
        out = torch.zeros(1)
        with pytest.raises(Race, match="both write"), guard(out):
            try:
                toys.write_one_place[(2,)](out)
            except Race:
                pass

    def test_nothing_stays_behind(self, toys: ModuleType) -> None:
        from support import interpreter

        out = torch.zeros(1)
        with pytest.raises(Race), guard(out):
            toys.write_one_place[(2,)](out)
        assert not interpreter._observers
        toys.write_one_place[(2,)](out)  # unguarded again

    @pytest.mark.parametrize(
        ("shape", "strides", "offset"),
        [
            ((3, 4), (4, 1), 0),
            ((3, 4), (7, 1), 2),
            ((4, 3), (1, 7), 1),  # transposed
            ((2, 3, 4), (40, 1, 9), 0),  # permuted with gaps
            ((3, 4), (0, 2), 1),  # expanded
            ((1, 4), (1, 3), 0),  # a stride that says nothing
            ((5, 4), (2, 1), 3),  # windows that overlap
            ((2, 3), (3, 3), 0),  # the same step twice
            ((), (), 5),
            ((0, 4), (4, 1), 0),
        ],
    )
    def test_ownership_is_that_of_an_index_by_index_walk(
        self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> None:
        buffer = torch.zeros(120, dtype=torch.int16)
        view = buffer.as_strided(shape, strides, offset)
        view.fill_(1)
        addresses = torch.arange(-4, 124).mul(2).add(buffer.data_ptr()).numpy().astype("uint64")
        expected = torch.cat([torch.zeros(4), buffer, torch.zeros(4)]).bool()
        elements = Elements(view)
        assert elements.owns(addresses, 2).tolist() == expected.tolist()
        wide = expected & expected.roll(-1)  # 4 bytes need two elements
        assert elements.owns(addresses[:-1], 4).tolist() == wide[:-1].tolist()


# ---------------------------------------------------------------- byte counts


@interpreted
class TestCountBytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_counts_active_lanes_exactly(self, toys: ModuleType, dtype: torch.dtype) -> None:
        x, out = padded(3, 33, 40, dtype), padded(3, 33, 37, dtype)
        with count_bytes() as moved:
            launch(toys.copy_rows, x, out, 33)
        size = 3 * 33 * dtype.itemsize
        assert (moved.read(x), moved.written(x)) == (size, 0)
        assert (moved.read(out), moved.written(out)) == (0, size)
        assert (moved.read(), moved.written()) == (size, size)
        assert (moved.distinct_read(x), moved.distinct_written(out)) == (size, size)
        assert moved.read(x[:1]) == size // 3
        assert moved.launches == ["copy_rows"]

    def test_reading_twice_counts_twice(self, toys: ModuleType) -> None:
        x, out = torch.randn(2, 5), torch.zeros(2, 5)
        with count_bytes() as moved:
            for _ in range(2):
                launch(toys.copy_rows, x, out, 5)
        assert (moved.read(x), moved.distinct_read(x)) == (80, 40)
        assert (moved.written(out), moved.distinct_written(out)) == (80, 40)

    def test_scalars_tables_and_atomics(self, toys: ModuleType) -> None:
        rows, out = [torch.randn(5) for _ in range(3)], torch.zeros(3)
        table = torch.tensor([row.data_ptr() for row in rows])
        with count_bytes() as moved:
            toys.sum_rows_through_table[(3,)](table, out, 5, BLOCK=8)
            toys.add_atomically[(2,)](out)
        assert moved.read(table) == 3 * 8
        assert [moved.read(row) for row in rows] == [20, 20, 20]
        assert moved.written(out) == 3 * 4 + 2 * 4

    def test_a_temporary_is_kept_while_counting(self, toys: ModuleType) -> None:
        """Freed, its addresses would come again and be counted for another tensor."""
        x, out = torch.randn(2, 5), torch.zeros(2, 5)
        alive = weakref.ref(x)
        with count_bytes() as moved:
            launch(toys.copy_rows, x, out, 5)
            del x
            gc.collect()
            assert alive() is not None
        del moved
        gc.collect()
        assert alive() is None

    def test_nests_with_the_guard(self, toys: ModuleType) -> None:
        x, out = torch.randn(2, 5), torch.zeros(2, 5)
        with guard(x, out), count_bytes() as outer, count_bytes() as inner:
            launch(toys.copy_rows, x, out, 5)
        assert outer.read(x) == inner.read(x) == 40


# ---------------------------------------------------------------- compiled code

ALIGNED = ("x_ptr", "out_ptr", "row_stride", "width")
TWO = ("sm_90", "gfx942")  # one of each maker, where four would only cost time


def targets(names: tuple[str, ...]) -> list[Any]:
    """Parameters with the reason why a target cannot be compiled for here."""
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(bool(aot.why_not(name)), reason=aot.why_not(name))
        )
        for name in names
    ]


@pytest.fixture(scope="module")
def compiled(toys: ModuleType) -> dict[tuple[str, str], aot.Compiled]:
    """All toys for all targets in one subprocess, by name and target."""
    rows = {"x_ptr": "*bf16", "out_ptr": "*fp32", "row_stride": "i32", "width": "i32"}
    blocks = {**rows, "x_ptr": "*fp32", "n_rows": "i32"}
    turns = {"x_ptr": "*fp32", "out_ptr": "*fp32", "turns": "i32"}
    jobs = {}
    for target in aot.TARGETS:
        if aot.why_not(target):
            continue
        size = {"BLOCK": 2048}
        jobs["wide", target] = aot.Job(toys.sum_rows, rows, size, ALIGNED, target)
        if target in TWO:
            jobs["narrow", target] = aot.Job(toys.sum_rows, rows, size, ALIGNED[:2], target)
            constants = {"scale_ptr": None, "FUNCTION": toys.double}
            jobs["nested", target] = aot.Job(
                toys.map_row_blocks, blocks, constants, ALIGNED, target
            )
            size = {"BLOCK": 16384 if target == "sm_90" else 32768}
            jobs["spilling", target] = aot.Job(
                toys.needs_too_many_registers, turns, size, ALIGNED[:2], target
            )
    return dict(zip(jobs, aot.compile_kernels(list(jobs.values())), strict=True))


Kernels = dict[tuple[str, str], aot.Compiled]


@pytest.mark.parametrize("target", targets(aot.TARGETS))
def test_wide_loads_are_seen_in_the_main_loop(compiled: Kernels, target: str) -> None:
    kernel = compiled["wide", target]
    assert len(kernel.loops) == 1
    assert {access.bits for access in kernel.main_loop.loads} == {128}, str(kernel)
    assert not kernel.main_loop.stores and len(kernel.stores) == 1
    assert 8 < kernel.registers < 128
    assert not kernel.spills and kernel.stack_bytes == kernel.vgpr_spills == 0
    assert kernel.shared_bytes > 0  # the sum crosses warps


@pytest.mark.parametrize("target", targets(TWO))
def test_narrow_loads_are_seen_in_the_main_loop(compiled: Kernels, target: str) -> None:
    """An odd width: 2048 bf16 over 4 warps are 16 elements a thread, 8 on AMD's wider warps."""
    kernel = compiled["narrow", target]
    bits = [access.bits for access in kernel.main_loop.loads]
    assert bits == [16] * (16 if target.startswith("sm_") else 8), str(kernel)


@pytest.mark.parametrize("target", targets(TWO))
def test_nested_loops_none_pointers_and_functions(compiled: Kernels, target: str) -> None:
    kernel = compiled["nested", target]
    assert [(loop.depth, loop.innermost) for loop in kernel.loops] == [(1, False), (2, True)]
    inner = kernel.main_loop
    assert {access.bits for access in inner.accesses} == {128}, str(kernel)
    assert len(inner.loads) == len(inner.stores) > 0
    assert len(inner.opcodes) < len(kernel.loops[0].opcodes) < len(kernel.opcodes)


@pytest.mark.parametrize("target", targets(TWO))
def test_spills_are_seen(compiled: Kernels, target: str) -> None:
    kernel = compiled["spilling", target]
    assert kernel.spills
    if target == "sm_90":
        assert kernel.registers == 255 and kernel.stack_bytes > 0 and kernel.spill_instructions > 0
    else:
        assert kernel.vgpr_spills > 0
    with pytest.raises(ValueError, match="has no loop over global memory"):
        _ = kernel.main_loop


def test_a_job_names_every_argument(toys: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"unknown \['x'\], without a type or value \['x_ptr'\]"):
        aot.compile_kernel(
            toys.sum_rows,
            {"x": "*bf16", "out_ptr": "*fp32", "row_stride": "i32", "width": "i32"},
            {"BLOCK": 64},
        )


@pytest.mark.parametrize("target", targets(("sm_80",)))
def test_a_kernel_that_does_not_compile_is_named(toys: ModuleType, target: str) -> None:
    types = {"x_ptr": "*bf16", "out_ptr": "*fp32", "row_stride": "i32", "width": "i32"}
    with pytest.raises(RuntimeError, match="sum_rows for sm_80: .*"):
        aot.compile_kernel(toys.sum_rows, types, {"BLOCK": 100}, target=target)  # not 2^n


@pytest.mark.parametrize(
    ("opcode", "kind", "bits"),
    [
        ("LDG.E", "load", 32),
        ("LDG.E.U16", "load", 16),
        ("LDG.E.EF.128", "load", 128),
        ("LDG.E.LTC256B.64.CONSTANT", "load", 64),
        ("LDG.E.ENL2.256", "load", 256),
        ("LDGSTS.E.BYPASS.128", "load", 128),
        ("STG.E.U8", "store", 8),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomic", 0),
        ("global_load_dwordx4", "load", 128),
        ("global_load_dword", "load", 32),
        ("global_load_short_d16_hi", "load", 16),
        ("global_load_ubyte", "load", 8),
        ("buffer_load_dwordx2", "load", 64),
        ("global_store_b128", "store", 128),
        ("global_store_short", "store", 16),
        ("global_store_d16_hi_b16", "store", 16),
        ("global_atomic_add_f32", "atomic", 0),
    ],
)
def test_widths_by_opcode(opcode: str, kind: str, bits: int) -> None:
    assert aot._access(opcode) == aot.Access(kind, opcode, bits)


@pytest.mark.parametrize("opcode", ["LDS.128", "LDC.64", "LDL", "STS", "ds_read_b128", "v_add_f32"])
def test_other_memory_is_not_global(opcode: str) -> None:
    assert aot._access(opcode) is None


SASS = """
.text.{name}:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/              @!P1 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0070*/                   BRA `(.L_x_4) ;
        /*0080*/                   NOP ;
"""


def test_a_loop_body_moved_out_of_line_is_found() -> None:
    """The load stands after EXIT, past the loop's only backward branch to its head."""
    kernel = aot.Compiled("k", "sm_90", 32, 0, 0, 0, 0, SASS.format(name="k"))
    assert len(kernel.loops) == 1
    opcodes = [access.opcode for access in kernel.main_loop.accesses]
    assert opcodes == ["STG.E.64", "LDG.E.128"]
    assert aot.Compiled("other", "sm_90", 32, 0, 0, 0, 0, SASS.format(name="k")).opcodes == ()
