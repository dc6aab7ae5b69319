"""What several processes do with rows that they share; the single-process truth is worked out in
each."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional

import onepass
from onepass.compat import cce, liger

from .processes import answer, join, leave

ROWS = (3, 0, 5, 2)  # of each rank
V, D = 13, 8


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own_part(rank: int, size: int) -> tuple[slice, int]:
    start = sum(ROWS[:rank])
    return slice(start, start + ROWS[rank]), sum(ROWS[:size])


def counted(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and its collectives by name, the backward's too."""
    with CommDebugMode() as found:
        result = call()
    counts = {str(op): n for op, n in found.get_comm_counts().items()}
    return result, [op for op, n in counts.items() for _ in range(n)]


def masks(n: int, size: int) -> Iterator[tuple[str, Tensor | None]]:
    bits = seeded(n, seed=3) > 0
    yield "none", None
    yield "bool", bits
    yield "int", bits.long() * 3
    yield "float", seeded(n, seed=4).abs()
    first = torch.ones(n, dtype=torch.bool)
    first[: ROWS[0]] = False
    yield "first rank all masked", first
    yield "all ranks all masked", torch.zeros(n, dtype=torch.bool)


def means(rank: int, size: int) -> None:
    """Values and gradients of global_mean, and its one collective."""
    mine, n = own_part(rank, size)
    every_rank = dist.new_group(list(range(size)))
    same = itertools.cycle([None, every_rank, init_device_mesh("cpu", (size,))])
    kinds = itertools.product(
        (torch.float32, torch.bfloat16, torch.float64),
        masks(n, size),
        (None, torch.tensor(7), 4.5, torch.tensor(0)),
        (("averaged", size), ("summed", 1)),
    )
    for dtype, (name, mask), items, (gradients, factor) in kinds:
        every = seeded(n, dtype=dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        wanted = onepass.reduce_rows(every.to(wide), mask, num_items=items)
        (grad,) = torch.autograd.grad(wanted, every)
        rows = every.detach()[mine].clone().requires_grad_()
        part, group = None if mask is None else mask[mine].clone(), next(same)
        options: Any = {"num_items": items, "gradients": gradients}
        got, collectives = counted(
            functools.partial(onepass.global_mean, rows, part, group, **options)
        )
        assert collectives == ["c10d.allreduce_"], (name, collectives)
        assert got.dtype == wide and got.requires_grad
        torch.testing.assert_close(got, wanted, msg=name)
        _, collectives = counted(got.backward)
        assert collectives == [], collectives
        close(rows.grad, factor * grad[mine], name)


def close(got: Tensor | None, wanted: Tensor, name: str) -> None:
    assert got is not None, f"{name}: no gradient"
    torch.testing.assert_close(got, wanted, msg=lambda text: f"{name}: {text}")


def counts(rank: int, size: int) -> None:
    mine, n = own_part(rank, size)
    labels = torch.arange(n) % 4
    labels[labels == 3] = -100
    for name, mask in masks(n, size):
        part = None if mask is None else mask[mine]
        weights = torch.ones(n) if mask is None else mask if name == "float" else mask != 0
        for own, kept in ((None, weights), (labels[mine], weights * (labels != -100))):
            if own is None and part is None:
                continue
            got, collectives = counted(functools.partial(onepass.count_items, own, part))
            assert collectives == ["c10d.allreduce_"]
            assert got.dtype == (torch.float32 if name == "float" else torch.int64), name
            torch.testing.assert_close(got.double(), kept.double().sum(), msg=name)
    got = onepass.count_items(labels[mine], ignore_index=0)
    assert int(got) == int((labels != 0).sum())


def losses(rank: int, size: int) -> None:
    """Each loss on this rank's rows, against one process with all of them: the value, and every
    gradient summed over the ranks."""
    mine, n = own_part(rank, size)
    labels = torch.arange(n) % V
    labels[1::4] = -100
    cap = functools.partial(onepass.masked_cross_entropy, max_loss=4.0)

    def of_rows(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        def mean(*tensors: Tensor, mask: Tensor) -> Tensor:
            rows = loss(*tensors, mask != 0, reduction="none", **options)
            return onepass.global_mean(rows, mask, gradients="summed")

        return mean

    def capped(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        rows = onepass.masked_cross_entropy(logits, target, mask != 0, reduction="none")
        return 4.0 * onepass.global_mean(rows, mask, gradients="summed").sigmoid()

    def shared(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        items = onepass.count_items(target, mask)
        return onepass.masked_cross_entropy(logits, target, mask, num_items=items)

    def added(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        share = shared(logits, target, mask)
        return onepass.global_mean(share, num_items=1, gradients="summed")

    lazy = onepass.LazyLogits
    other = seeded(n, D, seed=7)
    of_labels: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "mean": (onepass.masked_cross_entropy, of_rows(onepass.masked_cross_entropy)),
        "smoothed": (
            functools.partial(onepass.masked_cross_entropy, label_smoothing=0.1, z_loss=1e-3),
            of_rows(onepass.masked_cross_entropy, label_smoothing=0.1, z_loss=1e-3),
        ),
        "tokens capped": (
            functools.partial(cap, cap_scope="token"),
            of_rows(cap, cap_scope="token"),
        ),
        "mean capped": (cap, capped),
        "shares by num_items": (onepass.masked_cross_entropy, shared),
        "shares added": (onepass.masked_cross_entropy, added),
    }
    of_states: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "l2": (onepass.masked_normalized_l2, of_rows(onepass.masked_normalized_l2)),
        "cosine": (
            functools.partial(onepass.masked_inner_product, relu=True),
            of_rows(onepass.masked_inner_product, relu=True),
        ),
    }

    def liger_of(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Any:
        return liger.LigerFusedLinearCrossEntropyLoss(reduction=reduction)(weight, hidden, target)

    of_head: dict[str, Callable[..., Tensor]] = {
        "linear_cross_entropy": onepass.linear_cross_entropy,
        "cce": cce.linear_cross_entropy,
        "liger": liger_of,
    }
    for case, loss in of_head.items():
        for way in ("rows", "sum"):
            whole, own = leaves("auto"), leaves("auto")
            wanted = loss(whole[0][:n], whole[1], labels, reduction="mean")
            wanted.backward()
            target, states = labels[mine], own[0][:n][mine]
            if way == "rows":
                rows = loss(states, own[1], target, reduction="none")
                got = onepass.global_mean(rows, target != -100, gradients="summed")
            else:
                share = loss(states, own[1], target, reduction="sum") / onepass.count_items(target)
                got = onepass.global_mean(share, num_items=1, gradients="summed")
            check_shares(f"{case} {way}", got, own, wanted, whole)
    for name, mask in masks(n, size):
        mask = torch.ones(n, dtype=torch.bool) if mask is None else mask
        kept = torch.where(labels != -100, mask, 0)
        for mode in ("logits", "auto", "ahead", "recompute", "frozen"):
            for case, (single, many) in of_labels.items():
                if mode == "ahead" and "share" not in case:
                    continue  # rows have weights that none knows ahead
                whole = leaves(mode)
                wanted = single(made(whole, slice(None), mode, lazy), labels, kept)
                wanted.backward()
                own = leaves(mode)
                got = many(made(own, mine, mode, lazy), labels[mine], mask=kept[mine])
                check_shares(f"{case} {mode} {name}", got, own, wanted, whole, many is shared)
        for case, (single, many) in of_states.items():
            whole, own = [seeded(n, D).requires_grad_()], [seeded(n, D).requires_grad_()]
            wanted = single(whole[0], other, mask)
            wanted.backward()
            got = many(own[0][mine], other[mine], mask=mask[mine])
            check_shares(f"{case} {name}", got, own, wanted, whole)


def leaves(mode: str) -> list[Tensor]:
    hidden, weight = seeded(sum(ROWS), D, seed=1), seeded(V, D, seed=2)
    return [hidden.requires_grad_(), weight.requires_grad_(mode != "frozen")]


def made(parts: list[Tensor], rows: slice, mode: str, lazy: Any) -> Tensor:
    n = sum(ROWS[: dist.get_world_size()])
    hidden = parts[0][:n][rows]
    if mode == "logits":
        return hidden @ parts[1].t()
    logits: Tensor = lazy(hidden, parts[1], mode="auto" if mode == "frozen" else mode)
    return logits


def check_shares(
    name: str,
    got: Tensor,
    own: list[Tensor],
    wanted: Tensor,
    whole: list[Tensor],
    is_share: bool = False,
) -> None:
    assert got.requires_grad, f"{name}: no graph"
    got.backward()
    value = got.detach().clone()
    if is_share:
        dist.all_reduce(value)
    close(value, wanted.detach(), name)
    for mine, theirs in zip(own, whole, strict=True):
        if theirs.requires_grad:
            assert mine.grad is not None and theirs.grad is not None, f"{name}: no gradient"
            total = mine.grad.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(
                total, theirs.grad, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}"
            )


def groups(rank: int, size: int) -> None:
    """One dimension of a mesh, a group of some, and what is neither."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "cp"))
    row, column = divmod(rank, size // 2)
    rows = torch.tensor([float(rank)])
    assert float(onepass.global_mean(rows, None, mesh["dp"])) == column + size / 4
    beside = [row * (size // 2) + i for i in range(size // 2)]
    assert float(onepass.global_mean(rows, None, mesh["cp"])) == sum(beside) / len(beside)
    assert int(onepass.count_items(mask=rows >= 0, process_group=mesh["cp"])) == size // 2
    said = raised(lambda: onepass.global_mean(rows, None, mesh))
    assert "of one dimension: got ('dp', 'cp'); name one, as mesh['cp']" in said, said
    first = dist.new_group([0])
    inner = init_device_mesh("cpu", (size,))  # a mesh of its own, to be sure of its group's ranks
    assert int(onepass.count_items(mask=rows >= 0, process_group=inner)) == size
    for call in (
        lambda: onepass.global_mean(rows, None, first),
        lambda: onepass.count_items(rows.long(), None, first),
    ):
        if rank == 0:
            call()
            dist.barrier()
        else:
            said = raised(call)
            assert said == f"process_group must hold this rank: rank {rank} is not in it", said
    said = raised(lambda: onepass.global_mean(rows, None, "cp"))  # type: ignore[arg-type]
    assert said.startswith("process_group must be a ProcessGroup, a DeviceMesh or None: got str")
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole = distribute_tensor(rows, inner, [Replicate()])
    said = raised(lambda: onepass.global_mean(whole))
    assert "rows must be this rank's own: got a DTensor; rows.to_local()" in said, said


def refused(rank: int, size: int) -> None:
    """What one rank refuses is an error on all, before the group's patience ends."""
    rows = torch.ones(3)
    for bad in range(2):
        mask = torch.ones(2 if rank == bad else 3)
        for call in (
            lambda m=mask: onepass.global_mean(rows, m),
            lambda m=mask: onepass.count_items(rows.long(), m),
            lambda m=mask: onepass.count_items(None, m * torch.nan if len(m) == 2 else m),
        ):
            said = raised(call)
            if rank == bad:
                assert said.startswith("mask "), said
            else:
                wanted = f"rank {rank}: 1 other rank(s) of the group refused their arguments"
                assert said.startswith(wanted), said
    assert float(onepass.global_mean(rows)) == 1.0


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        dist.barrier()
        return str(error)
    return "nothing was raised"


# ---------------------------------------------------------------- models


def texts(rank: int) -> dict[str, Tensor]:
    """A row of tokens for each rank; the second has no label that counts, the first few."""
    from .tiny_models import batch_of

    ids = batch_of("llama")["input_ids"][rank % 2 : rank % 2 + 1].clone()
    labels = ids.clone()
    labels[:, : (3, 9, 5, 1)[rank % 4]] = -100
    return {"input_ids": ids, "labels": labels}


def own_loss(model: Any, batch: dict[str, Tensor], items: Tensor) -> Tensor:
    """transformers' way: a share of the whole, times the ranks that are averaged over."""
    loss: Tensor = model(**batch, num_items_in_batch=items).loss
    return loss * dist.get_world_size()


def loss_of_rows(model: Any, batch: dict[str, Tensor], items: Tensor) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    labels = onepass.shift_labels(batch["labels"])
    rows = onepass.masked_cross_entropy(logits, labels, reduction="none")
    return onepass.global_mean(rows, labels != -100, num_items=items)


def wrapped(kind: str, model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def check_grads(model: Any, wanted: dict[str, Tensor | None], name: str) -> None:
    size = max(float(grad.abs().max()) for grad in wanted.values() if grad is not None)
    for parameter_name, parameter in model.named_parameters():
        theirs = wanted[parameter_name.removeprefix("module.")]
        grad = parameter.grad
        if theirs is None:
            assert grad is None
            continue
        assert grad is not None, f"{name}: {parameter_name} has no gradient"
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(whole, theirs, rtol=1e-5, atol=1e-5 * size, msg=name)


def masked_rank(kind: str, rank: int, size: int) -> None:
    """A rank without labels, and all ranks without, under DDP and FSDP2: no hang, the gradient of
    one process with all rows; two micro-batches whose items are counted once."""
    from .tiny_models import tiny

    for frozen in (False, True):
        for nothing in (False, True):
            every = [texts(r) for r in range(size)]
            if nothing:
                for batch in every:
                    batch["labels"][:] = -100
            single = tiny("llama")
            single.lm_head.requires_grad_(not frozen)
            n_items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in every)
            for batch in every * 2:  # each twice: two micro-batches
                logits = single(input_ids=batch["input_ids"]).logits[:, :-1].float()
                target = batch["labels"][:, 1:].flatten()
                loss = functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum")
                (loss / max(2 * n_items, 1)).backward()
            wanted = {name: p.grad for name, p in single.named_parameters()}
            for loss_of in (own_loss, loss_of_rows):
                if nothing and loss_of is own_loss:
                    continue  # transformers divides by the 0 that it was given
                model = tiny("llama")
                model.lm_head.requires_grad_(not frozen)
                model = wrapped(kind, onepass.lazy_head(model))
                shifted = onepass.shift_labels(every[rank]["labels"])
                items = onepass.count_items(torch.cat([shifted, shifted]))
                assert int(items) == 2 * n_items
                with onepass.strict():
                    for _ in range(2):
                        loss_of(model, every[rank], items).backward()
                check_grads(model, wanted, f"{kind} frozen={frozen} nothing={nothing}")


def trainer(folder: Path, rank: int, size: int) -> None:
    """transformers' Trainer, which counts the items of all ranks and multiplies by their number:
    its num_items_in_batch is ours, and a bare share is what its compute_loss_func gives."""
    import transformers

    from .tiny_models import tiny

    every = [{key: value[0] for key, value in texts(r).items()} for r in range(2 * size)]
    found = []

    def share(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        found.append(num_items_in_batch)
        shifted = onepass.shift_labels(labels)
        return onepass.masked_cross_entropy(outputs.logits, shifted, num_items=num_items_in_batch)

    model = onepass.lazy_head(tiny("llama"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=every, compute_loss_func=share).train()
    labels = onepass.shift_labels(torch.stack([text["labels"] for text in every]))
    ids = torch.stack([text["input_ids"] for text in every])
    items = onepass.count_items(labels[rank::size])
    assert [int(n) for n in found] == [int(items)] * 2 and int(items) == int((labels != -100).sum())
    single = tiny("llama")
    logits = single(input_ids=ids).logits.float()
    functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for name, parameter in single.named_parameters():
        moved = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


class Gathered(torch.autograd.Function):
    """Keys or values of a group's ranks, one after the other along the sequence."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, own.shape[2]
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(2)]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.length, 2)[dist.get_rank(ctx.group)], None


def attention_over(group: Any) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        key, value = Gathered.apply(key, group), Gathered.apply(value, group)
        length = query.shape[2]
        places = torch.arange(length) + dist.get_rank(group) * length
        seen = places[:, None] >= torch.arange(key.shape[2])
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=options["scaling"], enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    return attention


def context_parallel(rank: int, size: int) -> None:
    """Five steps with the sequence split in two (and the batch over the rest) make the curve of one
    process, whether gradients are summed by hand or averaged by FSDP2."""
    import transformers

    from .tiny_models import V as vocab
    from .tiny_models import tiny

    n_texts = 2
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "cp"))
    place = mesh["cp"].get_local_rank()
    mine = slice(mesh["dp"].get_local_rank() * n_texts, (mesh["dp"].get_local_rank() + 1) * n_texts)
    transformers.AttentionInterface.register("over_ranks", attention_over(mesh["cp"].get_group()))
    shape = (size // 2 * n_texts, 12)
    ids = torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(5)).expand(
        5, -1, -1
    )
    labels = ids.clone()
    labels[:, :, :2] = -100
    labels[1, :, :7] = -100  # a step in which the first half of every text has no label
    labels[3] = -100  # and one without any
    single = tiny("llama")
    optimizer = torch.optim.AdamW(single.parameters(), lr=1e-2)
    curve = []
    for tokens, target in zip(ids, labels, strict=True):
        logits = single(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, target[:, 1:].flatten(), reduction="sum")
        loss = loss / max(int((target[:, 1:] != -100).sum()), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert curve[3] == 0 and 0 < curve[4] < curve[0] - 0.5, curve

    here = slice(6 * place, 6 * place + 6)
    for engine in ("by hand", "fsdp2"):
        for way in ("rows", "model"):
            model = tiny("llama")
            model.set_attn_implementation("over_ranks")
            model = onepass.lazy_head(model)
            if engine == "fsdp2":
                model = wrapped(engine, model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            found = []
            for tokens, target in zip(ids, labels, strict=True):
                shifted = onepass.shift_labels(target)[mine, here].contiguous()
                inputs = {
                    "input_ids": tokens[mine, here],
                    "position_ids": torch.arange(6 * place, 6 * place + 6)[None],
                    "use_cache": False,
                }
                with onepass.strict():
                    if way == "rows":
                        rows = onepass.masked_cross_entropy(
                            model(**inputs).logits, shifted, reduction="none"
                        )
                        gradients = "averaged" if engine == "fsdp2" else "summed"
                        loss = onepass.global_mean(rows, shifted != -100, gradients=gradients)
                        value = loss.detach()
                    else:
                        items = onepass.count_items(shifted).clamp_min(1)
                        loss = model(
                            **inputs, labels=shifted, shift_labels=shifted, num_items_in_batch=items
                        ).loss
                        value = loss.detach().clone()
                        dist.all_reduce(value)
                        loss = loss * size if engine == "fsdp2" else loss
                    optimizer.zero_grad()
                    loss.backward()
                if engine == "by hand":
                    for parameter in model.parameters():
                        dist.all_reduce(parameter.grad)
                optimizer.step()
                found.append(float(value))
            said = f"{engine}, {way}: {found}, wanted {curve}"
            pair = torch.tensor([found, curve])
            torch.testing.assert_close(*pair, rtol=2e-6, atol=1e-6, msg=said)


CASES: dict[str, Callable[[int, int], None]] = {
    "means": means,
    "counts": counts,
    "losses": losses,
    "groups": groups,
    "refused": refused,
    "ddp": functools.partial(masked_rank, "ddp"),
    "fsdp2": functools.partial(masked_rank, "fsdp2"),
    "context_parallel": context_parallel,
}


def main(rank: int, rendezvous: str, cases: list[str], answers: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate asks, in vain
    join(rank, rendezvous)
    size = dist.get_world_size()
    CASES["trainer"] = functools.partial(trainer, answers)
    answer({case: functools.partial(CASES[case], rank, size) for case in cases}, answers, rank)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3].split(), Path(sys.argv[4]))
