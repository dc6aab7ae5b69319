"""LazyLogits stay lazy under what code does to logits, and give what those would have given."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import onepass
from onepass.lazy_logits import LazyLogits, MaterializedError, MaterializedWarning, strict

V, D = 37, 8
LABELS = torch.tensor([[1, 5, -100, 36], [0, -100, 7, 2], [3, 4, 5, 6]])
MASK = LABELS != -100


def parts(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((3, 4, D), (V, D), (V,))
    return [torch.randn(shape, dtype=dtype).to(device).requires_grad_(True) for shape in shapes]


def close(got: Tensor, expected: Tensor, *, dtype: torch.dtype = torch.float32) -> None:
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        got, expected, rtol=4 * tolerance, atol=tolerance * size, check_dtype=True
    )


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda z: z[:, :-1],
    "slice_all": lambda z: z[..., :-1, :],
    "contiguous": lambda z: z[:, 1:, :].contiguous(),
    "integer": lambda z: z[0],
    "last_position": lambda z: z[:, -1, :],
    "new_axis": lambda z: z[None],
    "mask": lambda z: z[MASK.to(z.device)],
    "rows_by_index": lambda z: z[torch.tensor([2, 0], device=z.device)],
    "columns": lambda z: z[..., :20],
    "view": lambda z: z.view(-1, z.size(-1)),
    "view_shape": lambda z: z.view(torch.Size((12, V))),
    "reshape": lambda z: z.reshape(2, 6, V),
    "flatten": lambda z: z.flatten(0, 1),
    "torch_flatten": lambda z: torch.flatten(z, end_dim=-2),
    "unsqueeze": lambda z: z.unsqueeze(0).squeeze(0),
    "transpose": lambda z: z.transpose(0, 1),
    "chunk": lambda z: z.chunk(3, dim=0)[1],
    "split": lambda z: z.split([1, 3], dim=1)[1],
    "iterate": lambda z: list(z)[2],
    "unbind": lambda z: z.unbind(1)[0],
    "cat": lambda z: torch.cat([z[:1], z[2:]], dim=0),
    "stack": lambda z: torch.stack([z[0], z[1]]),
    "index_select": lambda z: z.index_select(1, torch.tensor([3, 1], device=z.device)),
    "float": lambda z: z.float(),
    "double": lambda z: z.to(torch.float64),
    "to_device": lambda z: z.to(z.device),
    "clone": lambda z: z.clone(),
    "to_a_copy": lambda z: z.to(copy=True, dtype=torch.float32, device=z.device),
    "to_another": lambda z: z.to(z).type_as(z),
    "scaled": lambda z: z * 0.25,
    "scaled_from_left": lambda z: 3 * z,
    "divided": lambda z: z / 2.5,
    "temperatures": lambda z: z / torch.linspace(0.5, 2, 12, device=z.device).view(3, 4, 1),
    "softcap": lambda z: 4.0 * torch.tanh(z / 4.0),
    "softcap_and_scale": lambda z: (torch.tanh(z * 2 / 3) * 3) / 0.7,
    "negative_softcap": lambda z: torch.tanh(z / -5) * 5,
    "minus": lambda z: -z,
    "by_name": lambda z: torch.reshape(input=z, shape=(12, V)),
    "transpose_by_name": lambda z: torch.transpose(input=z, dim0=1, dim1=0),
    "select_by_name": lambda z: torch.index_select(
        input=z, dim=0, index=torch.tensor([2, 0], device=z.device)
    ),
    "clamp_by_name": lambda z: torch.clamp(input=z, min=torch.finfo(z.dtype).min),
    "detach_by_name": lambda z: torch.detach(input=z) * 2 + z,
    "mul_by_name": lambda z: torch.mul(z, other=2.0),
    "add_by_name": lambda z: torch.add(input=z, other=torch.ones(V, device=z.device), alpha=2),
    "sections_by_name": lambda z: torch.tensor_split(z, sections=2)[1],
    "chunks_by_axis": lambda z: z.split(split_size=2, dim=-2)[0],
    "plus_bias": lambda z: z + torch.linspace(-1, 1, V, device=z.device),
    "plus_row": lambda z: torch.linspace(-1, 1, V, device=z.device)[None] + z,
    "sum": lambda z: z[0] * 0.5 + z[1] - 2 * z[2],
}


@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("name", CHANGES)
def test_stays_lazy_and_stands_for_the_same(name: str, bias: bool, device: str) -> None:
    hidden, weight, b = parts(device)
    used = b if bias else None
    with strict():
        lazy = CHANGES[name](LazyLogits(hidden, weight, used))
    whole = CHANGES[name](functional.linear(hidden, weight, used))
    assert isinstance(lazy, LazyLogits) and type(whole) is Tensor
    assert (lazy.shape, lazy.dtype, lazy.device) == (whole.shape, whole.dtype, whole.device)
    close(lazy.materialize(), whole)
    leaves = [hidden, weight, *([b] if bias else [])]
    upstream = torch.randn_like(whole)
    lazy_grads = torch.autograd.grad(lazy.materialize(), leaves, upstream, allow_unused=True)
    for got, expected in zip(
        lazy_grads, torch.autograd.grad(whole, leaves, upstream, allow_unused=True), strict=True
    ):
        if expected is None:
            assert got is None
        else:
            assert got is not None
            close(got, expected)


def rows(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[-1])


def labels_of(z: Tensor) -> Tensor:
    return LABELS.reshape(-1).to(z.device)


def gathered(z: Tensor) -> Tensor:
    ids = labels_of(z).clamp_min(0)[:, None]
    return rows(z).log_softmax(-1).gather(-1, ids).squeeze(-1)


def smoothed(losses: Tensor) -> Tensor:
    """As the label smoothing of transformers.Trainer takes it."""
    ids = labels_of(losses).clamp_min(0)[:, None]
    nll = losses.gather(dim=-1, index=ids)
    return (0.9 * nll + 0.1 * losses.sum(dim=-1, keepdim=True, dtype=torch.float32)).sum()


FUSED: dict[str, Callable[[Any], Tensor]] = {
    "cross_entropy": lambda z: functional.cross_entropy(rows(z), labels_of(z)),
    "cross_entropy_sum": lambda z: functional.cross_entropy(
        rows(z.float()), labels_of(z), ignore_index=-100, reduction="sum"
    ),
    "cross_entropy_smooth": lambda z: functional.cross_entropy(
        rows(z), labels_of(z), label_smoothing=0.1
    ),
    "cross_entropy_none": lambda z: functional.cross_entropy(
        rows(z), labels_of(z), reduction="none"
    ).sum(),
    "nll_of_log_softmax": lambda z: functional.nll_loss(
        functional.log_softmax(rows(z), dim=-1), labels_of(z)
    ),
    "log_softmax_gather": lambda z: gathered(z).mean(),
    "gather": lambda z: rows(z).gather(1, labels_of(z).clamp_min(0)[:, None]).sum(),
    "logsumexp": lambda z: z.logsumexp(-1).square().sum(),
    "logsumexp_keepdim": lambda z: torch.logsumexp(z, dim=-1, keepdim=True).sum(),
    "sum": lambda z: z.sum(-1).square().sum() + z.sum(dim=-1, keepdim=True).sum(),
    "smoothed_by_hand": lambda z: smoothed(-functional.log_softmax(rows(z), dim=-1)),
    "gather_by_name": lambda z: torch.gather(
        input=rows(z), dim=-1, index=labels_of(z).clamp_min(0)[:, None]
    ).sum(),
    "sum_by_axis": lambda z: z.sum(axis=-1).square().sum(),
    "logsumexp_by_name": lambda z: torch.logsumexp(input=z, dim=-1).sum(),
    "sum_by_old_names": lambda z: z.sum(axis=-1, keepdims=True).square().sum(),
    "own_logsumexp": lambda z: (
        (z.float() - z.float().logsumexp(-1, keepdim=True))
        .gather(-1, LABELS.to(z.device).clamp_min(0)[..., None])
        .sum()
    ),
    "module": lambda z: torch.nn.CrossEntropyLoss()(rows(z), labels_of(z)),
}


@pytest.mark.parametrize("change", ["plain", "softcap", "two_heads"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_functions(name: str, change: str, device: str) -> None:
    hidden, weight, bias = parts(device)
    second = torch.randn(3, 4, 2, device=device, requires_grad=True)
    adapter = torch.randn(V, 2, device=device, requires_grad=True)

    def changed(z: Tensor, more: Tensor) -> Tensor:
        if change == "softcap":
            return 5 * torch.tanh(z / 5)
        return z + more if change == "two_heads" else z

    with strict():
        lazy = changed(LazyLogits(hidden, weight, bias), LazyLogits(second, adapter))
        got = FUSED[name](lazy)
    logits = functional.linear(hidden, weight, bias)
    expected = FUSED[name](changed(logits, functional.linear(second, adapter)))
    assert type(got) is Tensor
    close(got, expected)
    leaves = [hidden, weight, bias, *([second, adapter] if change == "two_heads" else [])]
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        close(a, b)


def test_argmax(device: str) -> None:
    hidden, weight, bias = parts(device)
    logits = functional.linear(hidden, weight, bias)
    with strict():
        lazy: Any = LazyLogits(hidden, weight, bias)
        assert torch.equal(lazy.argmax(-1), logits.argmax(-1))
        assert torch.equal(lazy.argmax(axis=-1), logits.argmax(-1))
        assert torch.equal(lazy.argmax(dim=2, keepdim=True), logits.argmax(-1, keepdim=True))


def shifted(z: Tensor) -> Tensor:
    z = z.detach()
    lse = z.logsumexp(-1, keepdim=True)
    lse += 3
    return z - lse


def held(z: Tensor) -> Tensor:
    with torch.no_grad():
        lse = z.logsumexp(-1, keepdim=True)
    return (z - lse).gather(-1, LABELS.to(z.device).clamp_min(0)[..., None])


def with_nan(z: Tensor) -> Tensor:
    z = z + torch.where(torch.arange(V, device=z.device) == 2, torch.nan, 0.0)
    return z == z  # noqa: PLR0124


NOT_SERVED: dict[str, Callable[[Any], Tensor]] = {
    "written_logsumexp": shifted,
    "held_logsumexp": held,
    "alpha_0": lambda z: torch.add(torch.ones(V, device=z.device), z, alpha=0),
    "nan": with_nan,
    "max_by_name": lambda z: torch.max(z, other=torch.zeros(V, device=z.device)),
}


@pytest.mark.filterwarnings("ignore::onepass.MaterializedWarning")
@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served_and_right(name: str, inference: bool, device: str) -> None:
    hidden, weight, _ = parts(device)
    with torch.inference_mode(inference):
        got: Any = NOT_SERVED[name](LazyLogits(hidden, weight))
        expected = NOT_SERVED[name](functional.linear(hidden, weight))
    if isinstance(got, onepass.lazy_logits.Lazy):
        got = got.materialize()
    if expected.dtype == torch.bool:
        assert torch.equal(got, expected)
        return
    close(got, expected)
    if expected.requires_grad:
        grads = (torch.autograd.grad(t.sum(), (hidden, weight)) for t in (got, expected))
        for a, b in zip(*grads, strict=True):
            close(a, b)


@pytest.mark.filterwarnings("ignore::onepass.MaterializedWarning")
def test_a_scale_of_zero(device: str) -> None:
    hidden, weight, bias = parts(device)
    lazy = LazyLogits(hidden, weight, scale=0.0)
    assert torch.equal(lazy + bias, bias.expand(3, 4, V))
    assert not lazy.tanh().any()
    assert not LazyLogits(hidden, weight, scale=0.0, softcap=3.0).sum(-1).any()


def test_a_logsumexp_keeps_nothing_alive(device: str) -> None:
    lazy = LazyLogits(*parts(device)[:2])
    gone = weakref.ref(lazy)
    lse = lazy.detach().logsumexp(-1)
    del lazy
    assert gone() is None and lse.shape == (3, 4)


@pytest.mark.parametrize("rows", [lambda z: z, lambda z: z[:, :-1].detach(), lambda z: z * 2])
def test_hidden_states_written_to(rows: Callable[[Tensor], Any], device: str) -> None:
    hidden, weight, _ = parts(device)
    hidden = hidden.detach()
    lazy = rows(LazyLogits(hidden, weight))
    copy: Any = LazyLogits(hidden, weight)[MASK.to(device)]
    wanted = hidden[MASK.to(device)] @ weight.T
    hidden.mul_(3)
    with pytest.raises(RuntimeError, match="hidden states or weights were written to"):
        lazy.logsumexp(-1)
    with pytest.raises(RuntimeError, match="hidden states or weights were written to"):
        lazy[..., :1, :]
    close(copy.materialize(), wanted)


def test_one_number_a_row_widens_as_in_torch(device: str) -> None:
    hidden, weight, _ = parts(device, torch.bfloat16)
    temperatures = torch.linspace(0.5, 2, 12, device=device).view(3, 4, 1)
    for by in (temperatures, temperatures.bfloat16(), temperatures[0, 0, 0]):
        got: Any = LazyLogits(hidden, weight) / by
        wanted = functional.linear(hidden, weight) / by
        assert got.dtype == wanted.dtype
        close(got.materialize(), wanted, dtype=torch.bfloat16)


OUT_OF_RANGE: dict[str, Callable[[Tensor], Any]] = {
    "transpose": lambda z: z.transpose(-4, 0),
    "unbind": lambda z: z.unbind(-4),
    "split": lambda z: z.split(1, dim=3),
    "index_select": lambda z: z.index_select(-4, torch.tensor([0], device=z.device)),
    "cat": lambda z: torch.cat([z, z], dim=-4),
    "stack": lambda z: torch.stack([z, z], dim=-5),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_dimensions_out_of_range(name: str, device: str) -> None:
    hidden, weight, _ = parts(device)
    for z in (functional.linear(hidden, weight), LazyLogits(hidden, weight)):
        with pytest.raises(IndexError, match="Dimension out of range"):
            OUT_OF_RANGE[name](z)


def test_gather_ignores_no_row(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = parts(device)
    monkeypatch.setenv("ONEPASS_STRICT", "1")
    for z in (LazyLogits(hidden, weight), LazyLogits(hidden, weight).softmax(-1)):
        with pytest.raises(IndexError, match=r"index must be in \[0, 37\)"):
            z.gather(-1, LABELS.to(device)[..., None])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: onepass.cross_entropy(rows(z), labels_of(z)),
        lambda z: onepass.masked_cross_entropy(z, LABELS.to(z.device), z_loss=1e-3, max_loss=9.0),
        lambda z: onepass.masked_cross_entropy(z, LABELS.to(z.device), label_smoothing=0.1),
        lambda z: onepass.vocab_stats(z, want="entropy").entropy.sum(),
    ],
    ids=["cross_entropy", "capped", "smoothed", "entropy"],
)
def test_losses_of_this_package(loss: Callable[[Tensor], Tensor], device: str) -> None:
    hidden, weight, bias = parts(device)
    with strict():
        got = loss(LazyLogits(hidden, weight, bias))
    expected = loss(functional.linear(hidden, weight, bias))
    close(got, expected)
    leaves = [hidden, weight, bias]
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        close(a, b)


def test_anything_else_is_made_whole_and_said(device: str) -> None:
    hidden, weight, _ = parts(device)
    lazy, logits = LazyLogits(hidden, weight), functional.linear(hidden, weight)
    with pytest.warns(MaterializedWarning, match=r"softplus at .*test_lazy_logits.py:\d+"):
        close(functional.softplus(lazy), functional.softplus(logits))
    with pytest.warns(MaterializedWarning, match="exp at"):
        close(lazy.exp(), logits.exp())
    with strict(), pytest.raises(MaterializedError, match=r"topk at .*test_lazy_logits.py"):
        lazy.topk(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(lazy.materialize(), logits)


def test_reads_as_what_it_stands_for(device: str) -> None:
    hidden, weight, bias = parts(device)
    text = repr(LazyLogits(hidden, weight, bias, softcap=30.0, scale=0.5)[:, 1:])
    assert text.startswith("LazyLogits([3, 3, 37], torch.float32, ")
    assert "hidden[3, 3, 8] weight[37, 8]^T, bias, softcap=60, scale=0.5" in text  # 30 tanh(u / 60)


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"softcap": 4.0}, lambda z: 4 * torch.tanh(z / 4)),
        ({"scale": 0.5, "softcap": 4.0}, lambda z: 4 * torch.tanh(z * 0.5 / 4)),
        ({"temperature": 0.7}, lambda z: z / 0.7),
        ({"softcap": 2.0, "temperature": 3.0}, lambda z: 2 * torch.tanh(z / 2) / 3),
    ],
)
def test_constructor(
    options: dict[str, Any], whole: Callable[[Tensor], Tensor], device: str
) -> None:
    hidden, weight, bias = parts(device)
    lazy = LazyLogits(hidden, weight, bias, **options)
    close(lazy.materialize(), whole(functional.linear(hidden, weight, bias)))


def test_keeps_a_graph_only_where_there_is_one(device: str) -> None:
    hidden, weight, bias = parts(device)
    assert LazyLogits(hidden, weight, bias).requires_grad
    assert not LazyLogits(hidden, weight, bias).detach().requires_grad
    assert LazyLogits(hidden.detach(), weight.detach(), bias).requires_grad
    states = hidden * 2
    place = LazyLogits(states, weight).grad_fn
    assert place is not None and place.next_functions[0][0] is states.grad_fn
    with torch.no_grad():
        made = LazyLogits(states, weight)
    # as of logits: what was made without a graph has none later
    assert not made.requires_grad and not made.logsumexp(-1).requires_grad


BAD: dict[str, tuple[Callable[[list[Tensor]], Any], type[Exception], str]] = {
    "width": (
        lambda p: LazyLogits(p[0], p[1][:, 1:]),
        ValueError,
        r"got \(3, 4, 8\) and \(37, 7\)",
    ),
    "weight_shape": (
        lambda p: LazyLogits(p[0], p[2]),
        ValueError,
        r"weight \[V, D\]: got .*\(37,\)",
    ),
    "dtype": (lambda p: LazyLogits(p[0].double(), p[1]), ValueError, "float64 and torch.float32"),
    "device": (lambda p: LazyLogits(p[0], p[1].to("meta")), ValueError, "weight is on meta"),
    "bias": (lambda p: LazyLogits(p[0], p[1], p[2][1:]), ValueError, r"\(37,\).*got \(36,\)"),
    "integers": (lambda p: LazyLogits(p[0].int(), p[1]), ValueError, "hidden must be float32"),
    "softcap_0": (
        lambda p: LazyLogits(p[0], p[1], softcap=0.0),
        ValueError,
        "softcap must be above",
    ),
    "softcap": (lambda p: LazyLogits(p[0], p[1], softcap=-3.0), ValueError, "softcap must be"),
    "temperature": (
        lambda p: LazyLogits(p[0], p[1], temperature=0.0),
        ValueError,
        "temperature must be above 0: got 0",
    ),
    "scale": (lambda p: LazyLogits(p[0], p[1], scale=float("nan")), ValueError, "must be finite"),
    "slab": (
        lambda p: LazyLogits(p[0], p[1], max_slab_bytes="512MB"),
        TypeError,
        "max_slab_bytes must be an int, or None: got str",
    ),
    "compact": (
        lambda p: LazyLogits(p[0], p[1], compact="yes"),
        TypeError,
        "compact must be True or False: got str",
    ),
    "meta": (
        lambda p: LazyLogits(p[0].to("meta"), p[1].to("meta")),
        ValueError,
        r"hidden is on meta, without numbers: load it first; got \(3, 4, 8\) and \(37, 8\)",
    ),
    "list": (lambda p: LazyLogits([1.0], p[1]), TypeError, "hidden must be a torch.Tensor"),
}


def test_a_sharded_head_is_refused(device: str) -> None:
    """DTensor is in test_heads_distributed.py, where there are processes."""
    hidden, weight, _ = (t.detach() for t in parts(device))
    sharded = torch.nn.Parameter(weight[:0])
    sharded.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"sharded by ZeRO-3; gather it first \(.*Gathered"):
        LazyLogits(hidden, sharded)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, device: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call([t.detach() for t in parts(device)])


WRITES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "mul_": (lambda z: z.mul_(2), "mul_ cannot write into LazyLogits.* out-of-place mul,"),
    "div_": (lambda z: z.div_(2.0), "out-of-place div,"),
    "masked_fill_": (lambda z: z.masked_fill_(z[..., :1].argmax(-1) > 0, 0), "masked_fill,"),
    "copy_": (lambda z: z.copy_(torch.zeros(z.shape)), "copy_ cannot write .* the other tensor,"),
    "zero_": (lambda z: z.zero_(), "torch.zeros_like,"),
    "clamp_": (lambda z: torch.clamp_(z, min=0), "out-of-place clamp,"),
    "setitem": (lambda z: z.__setitem__((..., 0), 0.0), "__setitem__ cannot .* torch.where,"),
    "imul": (lambda z: z.__imul__(2), "mul_ cannot .* out-of-place mul,"),
    "itruediv": (lambda z: z.__itruediv__(2), "out-of-place div,"),
    "ipow": (lambda z: z.__ipow__(2), "out-of-place pow,"),
    "out": (lambda z: torch.add(torch.zeros(z.shape), 1, out=z), r"add\(out=...\) cannot write"),
    "inplace": (lambda z: functional.relu(z, inplace=True), r"relu\(..., inplace=False\),"),
    "data": (lambda z: setattr(z, "data", torch.zeros(z.shape)), "have no data to set"),
    "requires_grad_": (lambda z: z.requires_grad_(False), "requires_grad_ cannot write"),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_names_the_out_of_place_operation(name: str, device: str) -> None:
    hidden, weight, _ = parts(device)
    lazy = LazyLogits(hidden, weight)
    call, message = WRITES[name]
    with pytest.raises((RuntimeError, TypeError), match=message):
        call(lazy)
    close(lazy.materialize(), functional.linear(hidden, weight))


def test_written_from_into_a_tensor(device: str) -> None:
    hidden, weight, _ = parts(device)
    room = torch.zeros(3, 4, V, device=device)
    with pytest.warns(MaterializedWarning, match="copy_ at"):
        room.copy_(LazyLogits(hidden, weight).detach())
    close(room, functional.linear(hidden, weight).detach())


def test_a_warning_comes_once_for_an_operation_and_a_line(device: str) -> None:
    hidden, weight, _ = parts(device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            lazy = LazyLogits(hidden, weight)
            lazy.exp(), lazy.sigmoid()
        lazy.exp()
    assert [str(w.message).split()[0] for w in said] == ["exp", "sigmoid", "exp"]


def test_hooks(device: str) -> None:
    hidden, weight, _ = parts(device)
    lazy = LazyLogits(hidden, weight)
    with pytest.raises(RuntimeError, match="register_hook wants the gradient"):
        lazy.register_hook(lambda grad: None)
    started: list[int] = []

    def when(grad: Tensor) -> None:
        started.append(1)

    when.__module__ = "torch.distributed.fsdp"  # which asks when, not what
    for leaf in (lazy, LazyLogits(hidden.detach(), weight), LazyLogits(hidden * 2, weight)):
        leaf.register_hook(when)
        leaf.logsumexp(-1).sum().backward()
    assert len(started) == 3
    LazyLogits(hidden, weight).logsumexp(-1).sum().backward()
    assert len(started) == 3  # none was left on a leaf


def test_a_gradient_that_comes_another_way_is_refused(device: str) -> None:
    hidden, weight, _ = parts(device)

    class Below(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.detach().logsumexp(-1)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return torch.ones(3, 4, V, device=device)

    out: Any = Below.apply(LazyLogits(hidden, weight))
    with pytest.raises(RuntimeError, match="a gradient came to LazyLogits by another way"):
        out.sum().backward()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_terms_of_two_dtypes(half: torch.dtype, device: str) -> None:
    hidden, weight, _ = parts(device, half)
    low = torch.randn(3, 4, 2, device=device, requires_grad=True)
    up = torch.randn(V, 2, device=device, requires_grad=True)
    with strict():
        lazy: Any = LazyLogits(hidden, weight) + LazyLogits(low, up) * 0.5
    whole = functional.linear(hidden, weight) + functional.linear(low, up) * 0.5
    assert lazy.dtype == whole.dtype == torch.float32
    assert lazy.onepass_head.weight[0] is weight  # the large matrix has no second copy
    close(lazy.materialize(), whole, dtype=half)
    grads = torch.autograd.grad(lazy.logsumexp(-1).sum(), (low, up))
    for a, b in zip(grads, torch.autograd.grad(whole.logsumexp(-1).sum(), (low, up)), strict=True):
        close(a, b, dtype=half)
