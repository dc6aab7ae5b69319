"""Every kernel, compiled for GPUs that are not here, and its code read.

No spills, registers that leave two programs to a multiprocessor, and 16-byte accesses to the big
tensors in the main loop whatever the vocabulary's size and the row stride: no integer is promised
to be a multiple of anything here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from support.aot import TARGETS, Compiled, Job, compile_kernels, function_arguments, why_not

triton = pytest.importorskip("triton", reason="kernels cannot be compiled without Triton")

# Of 65,536 registers, 256 threads of a program: two programs at 128 hide each other's loads.
TWO_PROGRAMS = 128
# What may be narrower, and why: vocabulary weights are fp32 and stay in the L2 cache; four rows
# that share a target spread that one row over all threads; a table holds one address a layer; a
# mask of features has a byte for each; rows that are summed each bring one upstream gradient.
NARROW_IS_RIGHT = ("weights", "4 rows", "table", "features", "summed")


def job(
    fn: Any,
    target: str,
    off: Any = (),
    types: Any = None,
    known: Any = (),
    warps: Any = 8,
    **constexprs: Any,
) -> Job:
    """A configuration of a kernel: pointers in `off` are None, others aligned as allocations are.

    No integer is promised to be a multiple of anything, save those in `known`. (Any: the callers
    unpack dictionaries of constexprs.)
    """
    if "EXP" in function_arguments(fn):
        module = importlib.import_module("onepass.kernels.online_softmax")
        # What the launchers pass: the flushing exponential where there is CUDA.
        constexprs["EXP"] = module.flushed_exp if target.startswith("sm_") else module.plain_exp
    off = set(off)
    names = [n for n in function_arguments(fn) if n not in constexprs and n not in off]
    pointers = [n for n in names if n.endswith(("_ptr", "_out"))]
    kinds = {n: "*fp32" if n in pointers else "i32" for n in names}
    return Job(
        fn,
        {**kinds, **{n: t for n, t in (types or {}).items() if n in names}},
        {**dict.fromkeys(off), **constexprs},
        multiples_of_16=[*pointers, *known],
        target=target,
        num_warps=warps if target.startswith("sm_") else max(1, warps // 2),  # as many threads
    )


def with_ones(job: Job) -> Job:
    """The same launch where every size and stride is 1, which Triton makes constants of."""
    sizes = [name for name, kind in job.signature.items() if kind == "i32"]
    kept = {name: kind for name, kind in job.signature.items() if name not in sizes}
    aligned = [name for name in job.multiples_of_16 if name not in sizes]
    return replace(
        job,
        signature=kept,
        constexprs={**job.constexprs, **dict.fromkeys(sizes, 1)},
        multiples_of_16=aligned,
    )


def bare(job: Job) -> Job:
    """The same launch without labels, masks, weights or upstream gradients."""
    optional = {"labels_ptr", "contrast_ptr", "weights_ptr", "mask_ptr", "at_label_ptr"}
    optional |= {"on_label_ptr", "on_contrast_ptr", "label_logit_out", "logp_out"}
    optional |= {"contrast_logit_out", "on_weight_ptr", "on_p_weight_ptr", "bag_ptr"}
    optional |= {"bag_mass_out", "dx_ptr", "dlogits_ptr"} - (
        {"dlogits_ptr"}
        if "row_max_ptr" in job.signature and "dtarget_ptr" not in job.signature
        else set()
    )
    off = [name for name in job.signature if name in optional]
    kept = {name: kind for name, kind in job.signature.items() if name not in off}
    return replace(
        job,
        signature=kept,
        constexprs={**job.constexprs, **dict.fromkeys(off)},
        multiples_of_16=[name for name in job.multiples_of_16 if name not in off],
    )


def configurations(target: str) -> dict[str, Job]:
    """All kernels as the launchers call them, by a name that says how."""
    jobs: dict[str, Job] = {}
    for dtype, bits in (("bf16", 16), ("fp32", 32)):
        full = dtype == "bf16"
        jobs |= stats_jobs(target, dtype, 128 // bits, full)
        jobs |= pair_jobs(target, dtype, 128 // bits, full)
        jobs |= moments_jobs(target, dtype)
        jobs |= gaussian_jobs(target, dtype)
    return jobs


CAP = ("softcap", "logit_scale")


def stats_jobs(target: str, dtype: str, vec: int, full: bool) -> dict[str, Job]:
    kernels = importlib.import_module("onepass.kernels.vocab_stats")
    meta = {"VEC": vec, "SEGMENT": 16384, "BLOCK": vec * 128, "warps": 4}
    types = {"logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}", "index_ptr": "*i32"}
    types |= dict.fromkeys(("labels_ptr", "contrast_ptr", "argmax_out"), "*i64")
    types |= dict.fromkeys(CAP, "fp32")
    sums = {
        "index_ptr": "argmax_out",
        "heat_ptr": "entropy_out",
        "squares_ptr": "sum_sq_probs_out",
        "logit_sum_ptr": "logit_sum_out",
        "bag_ptr": "bag_mass_out",
        "offsets_ptr": "logp_sum_out",
    }
    wants = {"logp": (), "logp+entropy": ("heat_ptr",), "smoothed": ("offsets_ptr",)}
    jobs = {}
    for want, kept in (wants if full else {"logp": ()}).items():
        off = [n for n in sums if n not in kept] + ["weights_ptr", *CAP]
        off += [] if "offsets_ptr" in kept else ["seen_ptr"]
        jobs[f"vocab_stats {dtype} {want}"] = job(
            kernels.vocab_stats_kernel, target, off, types, **meta
        )
    every = dict.fromkeys(("on_p_gap_ptr", "on_p_squared_ptr", "on_p_weight_ptr", "on_one_ptr"))
    every |= dict.fromkeys(("on_weight_ptr", "on_label_ptr", "on_contrast_ptr"))
    backward: Any = partial(
        job, kernels.vocab_stats_backward_kernel, target, types=types, SAME_SHIFT=True,
        VEC=vec, SEGMENT=16384, BLOCK=2 * vec * 256,
    )  # fmt: skip
    plain = ["weights_ptr", "contrast_ptr", *CAP]
    jobs[f"vocab_stats_backward {dtype} logp"] = backward([*every, *plain])
    if full:
        off = [*sums, "weights_ptr", "seen_ptr"]
        jobs[f"vocab_stats {dtype} logp, capped"] = job(
            kernels.vocab_stats_kernel, target, off, types, **meta
        )
        jobs[f"vocab_stats_backward {dtype} logp, capped"] = backward([*every, *plain[:2]])
        jobs[f"vocab_stats {dtype} all, weights"] = job(
            kernels.vocab_stats_kernel, target, (), types, **meta
        )
        jobs[f"vocab_stats_merge {dtype} all"] = job(
            kernels.vocab_stats_merge_kernel, target, (), types, warps=1, VEC=vec, LANES=32
        )
        entropy = [n for n in every if n != "on_p_gap_ptr"]
        jobs[f"vocab_stats_backward {dtype} logp+entropy"] = backward([*entropy, *plain])
        jobs[f"vocab_stats_backward {dtype} all, weights"] = backward([])
    return jobs


def pair_jobs(target: str, dtype: str, vec: int, full: bool) -> dict[str, Job]:
    kernels = importlib.import_module("onepass.kernels.vocab_pair_stats")
    types = dict.fromkeys(("logits_ptr", "target_ptr", "dlogits_ptr", "dtarget_ptr"), f"*{dtype}")
    types |= {"mask_ptr": "*i1", "beta": "fp32"}
    meta = {"VEC": vec, "SEGMENT": 16384}
    wants = {
        "cross_entropy": {"PROBS": False, "CROSS": True, "KL": False, "REVERSE_KL": False},
        "kl": {"PROBS": False, "CROSS": True, "KL": True, "REVERSE_KL": True},
        "probs": {"PROBS": True, "CROSS": True, "KL": False, "REVERSE_KL": False},
    }
    jobs = {}
    for want, flags in (wants if full else {"kl": wants["kl"]}).items():
        jobs[f"vocab_pair_stats {dtype} {want}"] = job(
            kernels.vocab_pair_stats_kernel,
            target,
            (),
            types,
            **flags,
            **meta,
            PAIRS=1,
            BLOCK=64 * vec,
            warps=2,
        )
    backward: Any = partial(
        job, kernels.vocab_pair_stats_backward_kernel, target, types=types, **meta
    )
    jobs[f"vocab_pair_stats_backward {dtype} all"] = backward(
        (), PROBS=False, PAIRS=1, BLOCK=256 * vec
    )
    if not full:
        return jobs
    cross_only = ["on_q_ptr", "on_kl_ptr", "on_reverse_ptr", "on_jsd_ptr"]
    jobs[f"vocab_pair_stats {dtype} cross_entropy, 4 rows"] = job(
        kernels.vocab_pair_stats_kernel,
        target,
        (),
        types,
        **wants["cross_entropy"],
        **meta,
        PAIRS=4,
        BLOCK=256,
        warps=4,
    )
    jobs[f"vocab_pair_stats {dtype} kl, 4 rows"] = job(
        kernels.vocab_pair_stats_kernel,
        target,
        (),
        types,
        **wants["kl"],
        **meta,
        PAIRS=4,
        BLOCK=128,
        warps=4,
    )
    jobs[f"vocab_pair_stats_backward {dtype} all, 4 rows"] = backward(
        (), PROBS=False, PAIRS=4, BLOCK=512
    )
    jobs[f"vocab_pair_stats_backward {dtype} cross_entropy, 4 rows"] = backward(
        [*cross_only, "dtarget_ptr"], PROBS=False, PAIRS=4, BLOCK=512
    )
    jobs[f"vocab_pair_stats_backward {dtype} probs"] = backward(
        cross_only, PROBS=True, PAIRS=1, BLOCK=2048
    )
    jobs[f"vocab_pair_stats_merge {dtype} kl"] = job(
        kernels.vocab_pair_stats_merge_kernel,
        target,
        (),
        types,
        warps=1,
        VEC=vec,
        LANES=32,
        **wants["kl"],
    )
    jobs[f"vocab_jsd {dtype}"] = job(
        kernels.vocab_jsd_kernel, target, (), types, **meta, BLOCK=2048
    )
    return jobs


def moments_jobs(target: str, dtype: str) -> dict[str, Job]:
    kernels = importlib.import_module("onepass.kernels.row_moments")
    jobs = {}
    for layers in ("one", "table"):
        pointer = f"*{dtype}" if layers == "one" else "*i64"
        types = dict.fromkeys(("x_ptr", "y_ptr", "dx_ptr", "dy_ptr"), pointer)
        # All moments and both gradients, and what a loss of distances alone has.
        others = ("xx", "yy", "xy", "difference")
        for name, what, off in (
            ("row_moments", "", ()),
            ("row_moments", "dd ", [f"{other}_ptr" for other in others]),
            ("row_moments_backward", "", ()),
            ("row_moments_backward", "dd ", ["dy_ptr", *(f"on_{other}_ptr" for other in others)]),
        ):
            jobs[f"{name} {dtype} {what}{layers}"] = job(
                getattr(kernels, f"{name}_kernel"),
                target,
                off,
                {**types, "mask_ptr": "*i1"},
                # Hidden sizes are multiples of 16, unlike vocabularies.
                known=("hidden_size", "x_stride", "y_stride"),
                warps=4,
                TABLE=layers == "table",
                DTYPE=triton.language.dtype(dtype),
                BLOCK=1024,
            )
    return jobs


def gaussian_jobs(target: str, dtype: str) -> dict[str, Job]:
    kernels = importlib.import_module("onepass.kernels.gaussian")
    sides = ("x_ptr", "mean_ptr", "location_ptr", "std_ptr", "grad_ptr", "out_ptr")
    types = dict.fromkeys((*sides, *(f"d{side}" for side in sides)), f"*{dtype}")
    types |= {"mask_ptr": "*i1", "seed_ptr": "*i64"}
    ones = dict.fromkeys(("size_i", "summed_i", "summed_j", "summed_k"), 1)
    jobs = {}
    for name, what, off, meta in (
        # Everything of rows; what a log-determinant alone needs; a mask of features.
        ("gaussian_stats", "one", (), {}),
        ("gaussian_stats", "log_det one", (*sides[:3], "mahalanobis_ptr", "mask_ptr"), {}),
        ("gaussian_stats", "features", (), {"FEATURES": True}),
        ("gaussian_stats_backward", "one", (), {"SUMMED": False, **ones}),
        ("gaussian_stats_backward", "features", (), {"SUMMED": False, "FEATURES": True, **ones}),
        ("gaussian_stats_backward", "summed", (), {"SUMMED": True}),
        ("cloak", "one", (), {"ALIGNED": True}),
        ("cloak", "features", (), {"ALIGNED": True, "FEATURES": True}),
        ("cloak_backward", "one", (), {"ALIGNED": True}),
        ("cloak_backward", "features", (), {"ALIGNED": True, "FEATURES": True}),
    ):
        fn = getattr(kernels, f"{name}_kernel")
        steps = [n for n in function_arguments(fn) if n.endswith(("_i", "_j", "_k"))]
        jobs[f"{name} {dtype} {what}"] = job(
            fn,
            target,
            off,
            types,
            known=("hidden_size", *(n for n in steps if not n.startswith(("size", "sum")))),
            warps=4,
            **{"FEATURES": False, "BLOCK": 1024, **meta},
        )
    return jobs


@pytest.fixture(scope="module")
def all_compiled() -> Iterator[dict[str, Future[dict[str, Compiled]]]]:
    """What came out for every target; two compile at a time, each in a process of its own."""

    def compile_for(target: str) -> dict[str, Compiled]:
        jobs = configurations(target)
        return dict(zip(jobs, compile_kernels(list(jobs.values())), strict=True))

    with ThreadPoolExecutor(2) as pool:
        yield {t: pool.submit(compile_for, t) for t in TARGETS if not why_not(t)}


@pytest.fixture(scope="module", params=TARGETS)
def compiled(
    request: pytest.FixtureRequest, all_compiled: dict[str, Future[dict[str, Compiled]]]
) -> dict[str, Compiled]:
    if request.param not in all_compiled:
        pytest.skip(why_not(request.param))
    return all_compiled[request.param].result()


def test_other_specialisations_compile() -> None:
    """What a launch on a GPU also meets, and the interpreter does not: sizes of 1 become constants
    (K = 1 target rows, one segment, N = 1), absent pointers meet each other."""
    if why_not("sm_90"):
        pytest.skip(why_not("sm_90"))
    jobs = stats_jobs("sm_90", "bf16", 8, True) | pair_jobs("sm_90", "bf16", 8, True)
    jobs |= moments_jobs("sm_90", "bf16") | gaussian_jobs("sm_90", "bf16")
    odd = {
        name: replace(job, constexprs={**job.constexprs, "ALIGNED": False}, multiples_of_16=[])
        for name, job in jobs.items()
        if name.startswith("cloak")
    }
    jobs |= {f"{name}, odd D": job for name, job in odd.items()}
    variants = [with_ones(job) for job in jobs.values()]
    variants += [bare(job) for name, job in jobs.items() if "features" not in name]
    assert all(kernel.registers for kernel in compile_kernels(variants))


def test_nothing_spills(compiled: dict[str, Compiled]) -> None:
    """Not a byte on sm_80, sm_90 and gfx942. For sm_100 ptxas puts up to three registers of a whole
    program aside, outside of any loop, to fit a third program on a multiprocessor."""
    allowed = 16 if next(iter(compiled.values())).target == "sm_100" else 0
    spilled = {name: kernel.stack_bytes for name, kernel in compiled.items() if kernel.spills}
    assert {name: size for name, size in spilled.items() if size > allowed} == {}
    for name in spilled:
        for loop in compiled[name].innermost_loops:
            assert not any(loop.count(spill) for spill in ("LDL", "STL", "scratch_")), name


def test_registers_leave_room_for_two_programs(compiled: dict[str, Compiled]) -> None:
    """The common configurations; those of every fact at once trade occupancy for one pass."""
    common = ("logp", "logp+entropy", "cross_entropy", "one", "table", "features", "summed")
    over = {
        name: kernel.registers
        for name, kernel in compiled.items()
        if name.endswith(common) and kernel.registers > TWO_PROGRAMS
    }
    assert over == {}


def test_big_tensors_move_in_16_bytes(compiled: dict[str, Compiled]) -> None:
    """Every access inside a loop, whatever the vocabulary's size and the row stride."""
    narrow = {}
    for name, kernel in compiled.items():
        if "merge" in name or any(reason in name for reason in NARROW_IS_RIGHT):
            continue  # a merge has no loop
        accesses = [a for loop in kernel.innermost_loops for a in loop.accesses]
        assert accesses, f"{name}: no access inside a loop was found"
        slim = sorted({a.opcode for a in accesses if a.bits != 128})
        if slim:
            narrow[name] = slim
    assert narrow == {}


def test_exceptions_still_load_their_rows_wide(compiled: dict[str, Compiled]) -> None:
    for name, kernel in compiled.items():
        if any(reason in name for reason in NARROW_IS_RIGHT):
            widths = [a.bits for loop in kernel.innermost_loops for a in loop.loads]
            # Many sums of four rows leave room for half a tile only.
            assert (64 if "kl, 4 rows" in name else 128) in widths, name
