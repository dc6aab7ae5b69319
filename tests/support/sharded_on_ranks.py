"""What processes do with heads in shards of their vocabulary: DTensors, process groups, tensor
parallelism of transformers. The single-process truth is worked out in each."""

from __future__ import annotations

import copy
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import onepass
from onepass import LazyLogits

from .processes import answer, device, join, leave

D, V = 8, 1013  # a prime: no layout is even
ROWS = (2, 5)


class Payloads(TorchDispatchMode):
    """The largest tensor, in elements, that goes into each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            leaves, _ = torch.utils._pytree.tree_flatten(args)
            sizes = [t.numel() for t in leaves if isinstance(t, Tensor)]
            self.seen.append((func._opname, max(sizes, default=0)))
        return func(*args, **kwargs or {})


@contextmanager
def nothing_grows_with_the_vocabulary(most: int) -> Iterator[None]:
    """`most`: elements that a collective may carry."""
    assert most < V // 4
    with Payloads() as payloads:
        yield
    assert payloads.seen, "no collective was seen"
    large = [seen for seen in payloads.seen if seen[1] > most]
    assert not large, large


def here(tensor: Tensor) -> Tensor:
    return tensor.to(device())


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    hidden = torch.randn(*ROWS, D, generator=gen)
    weight, bias = torch.randn(V, D, generator=gen), torch.randn(V, generator=gen)
    labels = torch.randint(0, V, ROWS, generator=gen)
    labels[0, 1] = -100
    labels[1] = torch.tensor([0, V - 1, V // 2, V // 4, 3 * V // 4])
    return here(hidden), here(weight), here(bias), here(labels)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    loss = onepass.masked_cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-3)
    stats = onepass.vocab_stats(logits, labels, want=("entropy", "logp"))
    return loss + 0.1 * stats.entropy.mean() + stats.logp.square().mean()


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def truth(lazy: bool = True) -> tuple[Tensor, list[Tensor]]:
    hidden, weight, bias, labels = parts()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    logits = LazyLogits(*leaves) if lazy else hidden @ weight.T + bias
    loss = loss_of(logits, labels)
    loss.backward()
    return loss.detach(), [whole(t.grad) for t in leaves]


def check(loss: Tensor, grads: list[Tensor | None], wanted: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(loss.detach(), wanted[0], rtol=1e-6, atol=0)
    for grad, of_one in zip(grads, wanted[1], strict=True):
        size = float(of_one.abs().max())
        torch.testing.assert_close(whole(grad), of_one, rtol=1e-5, atol=2e-6 * size)


def mesh_of_all(name: str = "tp") -> DeviceMesh:
    return init_device_mesh(device().type, (dist.get_world_size(),), mesh_dim_names=(name,))


# ---------------------------------------------------------------- 2 and 4 processes


def process_group() -> None:
    """This rank's rows and the group; offsets given or found, with collectives counted."""
    n, rank = dist.get_world_size(), dist.get_rank()
    sizes = [V - 10 * (n - 1)] + [10] * (n - 1)
    start = sum(sizes[:rank])
    for offset in (None, start):
        hidden, weight, bias, labels = parts()
        leaves = [hidden, *(t[start : start + sizes[rank]].clone() for t in (weight, bias))]
        leaves = [t.requires_grad_() for t in leaves]
        group = dist.group.WORLD
        with nothing_grows_with_the_vocabulary(most=200):
            logits = LazyLogits(*leaves, process_group=group, vocab_offset=offset)
            loss = loss_of(logits, labels)
            loss.backward()
        assert logits.shape == (*ROWS, V)
        of_all = [torch.zeros_like(t) for t in (weight, bias)]
        for t, leaf in zip(of_all, leaves[1:], strict=True):
            t[start : start + sizes[rank]] = whole(leaf.grad)
            dist.all_reduce(t)
        check(loss, [leaves[0].grad, *of_all], truth())


def dtensor() -> None:
    """Hidden states plain, as a replicated DTensor, and in shards of rows."""
    mesh, wanted = mesh_of_all(), truth()
    for layout in ("plain", Replicate(), Shard(0), Shard(1)):
        for mesh_dim in (None, "tp", 0):
            hidden, weight, bias, labels = parts()
            if not isinstance(layout, str):
                hidden = distribute_tensor(hidden, mesh, [layout])
            leaves = [hidden, *(distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias))]
            leaves = [t.detach().requires_grad_() for t in leaves]
            with nothing_grows_with_the_vocabulary(most=200):
                loss = loss_of(LazyLogits(*leaves, mesh_dim=mesh_dim), labels)
                loss.backward()
            check(loss, [t.grad for t in leaves], wanted)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.25


def no_linear_heads() -> None:
    """A DTensor's head is looked at as another's is, though no row can be tried."""
    for change, said in (
        (lambda head: setattr(head, "forward", lambda x: 3 * x), "has a forward of its own"),
        (lambda head: setattr(head, "__class__", Scaled), "(Scaled) is not torch.nn.Linear"),
    ):
        model: Any = Tiny().to(device())
        sharded = distribute_tensor(model.lm_head.weight.detach(), mesh_of_all(), [Shard(0)])
        model.lm_head.weight = nn.Parameter(sharded)
        change(model.lm_head)
        try:
            onepass.lazy_head(model, "lm_head")
        except ValueError as error:
            assert said in str(error) and "nothing was changed" in str(error), error
        else:
            raise AssertionError(f"nothing was raised: {said}")


def two_forwards() -> None:
    """Joined logits of one DTensor head stay lazy, trained or frozen."""
    hidden, weight, bias, labels = parts()
    for frozen in (False, True):
        head = nn.Parameter(distribute_tensor(weight, mesh_of_all(), [Shard(0)]), not frozen)
        states = hidden.detach().requires_grad_()
        with onepass.strict():
            z = torch.cat([LazyLogits(states[:1], head), LazyLogits(states[1:], head)])
            loss = loss_of(z, labels)
            loss.backward()
        one = [t.detach().requires_grad_() for t in (hidden, weight)]
        wanted = loss_of(LazyLogits(*one), labels)
        wanted.backward()
        grads = [states.grad] if frozen else [states.grad, head.grad]
        check(loss, grads, (wanted.detach(), [whole(t.grad) for t in one][: len(grads)]))


def linear_losses() -> None:
    """The functions that take a head's weight."""
    hidden, weight, _, labels = parts()
    head = distribute_tensor(weight, mesh_of_all(), [Shard(0)])
    flat, target = hidden.view(-1, D), labels.view(-1)
    for loss in (
        onepass.linear_cross_entropy,
        onepass.compat.cce.linear_cross_entropy,
        lambda x, w, y: onepass.compat.liger.LigerFusedLinearCrossEntropyLoss()(w, x, y),
    ):
        torch.testing.assert_close(loss(flat, head, target), loss(flat, weight, target))


def meshes_of_two() -> None:
    """Hidden states in shards of rows over one dimension, or parts of a sum there, and the head
    over the other, or whole: weights' gradients are those of all rows, and say so."""
    n = dist.get_world_size()
    mesh = init_device_mesh(device().type, (n // 2, 2), mesh_dim_names=("dp", "tp"))
    hidden, weight, bias, labels = parts()
    row = mesh.get_local_rank("dp")
    rows: list[list[Any]] = [[Shard(0), Replicate()], [Shard(0), Shard(1)], [Replicate(), Shard(0)]]
    for of_hidden in rows if n == 4 else rows[2:]:
        for of_head in (Shard(0), Replicate()):
            over_tp = of_head.is_replicate() and of_hidden[1].is_shard()
            leaves: list[Tensor] = [distribute_tensor(hidden, mesh, of_hidden)]
            leaves += [distribute_tensor(t, mesh, [Replicate(), of_head]) for t in (weight, bias)]
            leaves = [t.detach().requires_grad_() for t in leaves]
            logits = LazyLogits(*leaves)
            own = distribute_tensor(labels, mesh, of_hidden).to_local() if over_tp else labels
            if not over_tp and of_hidden[0].is_shard():
                own = labels.chunk(n // 2)[row]
            # The same, laid out as the hidden states are.
            laid = distribute_tensor(labels, mesh, of_hidden)
            got = onepass.masked_cross_entropy(logits, laid)
            torch.testing.assert_close(got, onepass.masked_cross_entropy(logits, own))
            total = onepass.vocab_stats(logits, own).logp.sum()
            total.backward()
            one = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
            wanted = onepass.vocab_stats(LazyLogits(*one), labels).logp.sum()
            wanted.backward()
            for leaf, of_one in zip(leaves, one, strict=True):
                size = float(whole(of_one.grad).abs().max())
                got = whole(leaf.grad)
                torch.testing.assert_close(got, whole(of_one.grad), rtol=1e-5, atol=2e-6 * size)
    halves = DTensor.from_local(hidden / n, mesh, [Partial(), Partial()])
    head = distribute_tensor(weight, mesh, [Replicate(), Shard(0)])
    lse = LazyLogits(halves, head).logsumexp(-1)
    # A second mesh of the same ranks: policy and reference may have one each.
    again = init_device_mesh(device().type, (n // 2, 2), mesh_dim_names=("dp", "tp"))
    other = LazyLogits(hidden, distribute_tensor(weight, again, [Replicate(), Shard(0)]))
    kl = onepass.vocab_pair_stats(LazyLogits(hidden, head), other, want=("kl",)).kl
    assert float(kl.abs().max()) < 1e-6
    torch.testing.assert_close(lse, LazyLogits(hidden, weight).logsumexp(-1))


def stale() -> None:
    """Logits of a DTensor that was written to since."""
    hidden, weight, _, _ = parts()
    head = nn.Parameter(distribute_tensor(weight, mesh_of_all(), [Shard(0)]))
    logits = LazyLogits(hidden, head)
    head.grad = torch.ones_like(head)
    torch.optim.SGD([head], lr=0.1).step()
    try:
        logits.logsumexp(-1)
    except RuntimeError as error:
        assert "written to after its forward" in str(error), error
    else:
        raise AssertionError("nothing was raised")


def empty_shards() -> None:
    """Logits with fewer columns than ranks, and labels that are the same DTensor's."""
    n = dist.get_world_size()
    mesh = mesh_of_all()
    gen = torch.Generator().manual_seed(3)
    z = here(torch.randn(2, 3, n - 1, generator=gen))
    labels = here(torch.randint(0, n - 1, (2, 3), generator=gen))
    leaf = distribute_tensor(z, mesh, [Shard(2)]).requires_grad_()
    loss = onepass.masked_cross_entropy(leaf, distribute_tensor(labels, mesh, [Replicate()]))
    loss.backward()
    one = z.requires_grad_()
    wanted = onepass.masked_cross_entropy(one, labels)
    wanted.backward()
    check(loss, [leaf.grad], (wanted.detach(), [whole(one.grad)]))


def sharded_logits() -> None:
    """DTensors of logits, as loss_parallel takes them: nothing gathered."""
    mesh = mesh_of_all()
    hidden, weight, bias, labels = parts()
    gen = torch.Generator().manual_seed(2)
    other = here(torch.randn(*ROWS, V, generator=gen))

    def losses(z: Tensor, t: Tensor) -> Tensor:
        pair = onepass.vocab_pair_stats(z, t, want=("kl", "jsd", "reverse_kl", "cross_entropy"))
        flat = onepass.cross_entropy(z.view(-1, V), labels.view(-1))
        return loss_of(z, labels) + flat + sum(f.mean() for f in pair if f is not None)

    whole_logits = (hidden @ weight.T + bias).requires_grad_()
    wanted = losses(whole_logits, other)
    wanted.backward()
    placements = [Shard(2)]
    sharded = distribute_tensor(other, mesh, placements)
    lazy = LazyLogits(hidden, distribute_tensor(weight, mesh, [Shard(0)]), bias)
    kl = onepass.vocab_pair_stats(lazy, sharded, want=("kl",)).kl
    of_one = onepass.vocab_pair_stats(whole_logits.detach(), other, want=("kl",)).kl
    torch.testing.assert_close(kl, of_one)
    for target in (other, sharded):
        z = distribute_tensor(whole_logits.detach(), mesh, placements).requires_grad_()
        with nothing_grows_with_the_vocabulary(most=200):
            loss = losses(z, target)
            loss.backward()
        assert isinstance(z.grad, DTensor) and z.grad.placements == (Shard(2),)
        check(loss, [z.grad], (wanted.detach(), [whole(whole_logits.grad)]))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.body, self.lm_head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.body(x).relu())
        return logits


def torch_plans() -> None:
    """torch's ColwiseParallel, with each output it can be asked for and after sequence
    parallelism; what LazyLogits stand for is all columns, on every rank."""
    n, rank = dist.get_world_size(), dist.get_rank()
    gen = torch.Generator().manual_seed(10)
    x = here(torch.randn(2 * n, D, generator=gen))
    labels = here(torch.randint(0, V, (2 * n,), generator=gen))
    one = Tiny().to(device())
    wanted = functional.cross_entropy(one(x), labels)
    wanted.backward()
    plans: list[dict[str, Any]] = [
        {"output_layouts": Replicate()},
        {"output_layouts": Shard(-1), "use_local_output": False},
        {"input_layouts": Shard(0), "output_layouts": Replicate()},
    ]
    for plan in plans:
        model: Any = Tiny().to(device())
        parallelize_module(model, mesh_of_all(), {"lm_head": ColwiseParallel(**plan)})
        onepass.lazy_head(model, "lm_head")
        by_rows = "input_layouts" in plan
        with onepass.strict():
            loss = functional.cross_entropy(model(x.chunk(n)[rank] if by_rows else x), labels)
            loss.backward()
        grads = [whole(p.grad) for p in model.parameters()]
        if by_rows:
            for grad in grads[:2]:
                dist.all_reduce(grad)
        check(loss, [*grads], (wanted.detach(), [whole(p.grad) for p in one.parameters()]))


def page(folder: Path) -> None:
    """docs/sharded-head.md, as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "sharded-head.md").read_text(encoding="utf-8")
    script = folder.with_suffix(f".{dist.get_rank()}.py")
    script.write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    with onepass.strict():
        held = runpy.run_path(str(script))
    hidden, head, labels = held["hidden"], held["head"], held["labels"]
    leaves = [t.requires_grad_() for t in (hidden.detach(), head.detach().full_tensor())]
    loss = functional.cross_entropy(leaves[0] @ leaves[1].T, labels)
    loss.backward()
    check(held["loss"], [hidden.grad, head.grad], (loss.detach(), [whole(t.grad) for t in leaves]))


def refused() -> None:
    mesh = mesh_of_all()
    rank = dist.get_rank()
    hidden, weight, bias, labels = parts()
    row_wise = distribute_tensor(weight, mesh, [Shard(0)])
    of_columns = distribute_tensor(weight, mesh, [Shard(1)])
    own = row_wise.to_local()
    n = dist.get_world_size()
    odd = torch.float32 if rank else torch.float64
    sharded_z = distribute_tensor(hidden @ weight.T, mesh, [Shard(2)])
    group = dist.group.WORLD
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: LazyLogits(hidden, of_columns), "must be sharded over the vocabulary, Shard(0)"),
        (lambda: LazyLogits(hidden, row_wise, mesh_dim="model"), "no mesh dimension 'model'"),
        (lambda: LazyLogits(hidden, row_wise, process_group=group), "leave process_group and"),
        (
            lambda: LazyLogits(hidden, own, process_group=group, vocab_offset=3 * rank),
            "must cover the vocabulary one after the other",
        ),
        (lambda: LazyLogits(hidden, row_wise, bias.requires_grad_()), "trained bias must be shard"),
        (
            lambda: LazyLogits(hidden[: 1 + rank % 2], row_wise).logsumexp(-1),
            "same number of rows: got 5 on rank 0, 10 on rank 1",
        ),
        (
            lambda: LazyLogits(hidden[: 1 + rank % 2], row_wise).materialize(),
            "same number of rows: got 5 on rank 0, 10 on rank 1",
        ),
        (lambda: LazyLogits(hidden, row_wise, mesh_dim=3), "has no mesh dimension 3: got one of 1"),
        (lambda: LazyLogits(hidden, row_wise, bias.detach()[:5]), "the bias must be [V] = (1013,)"),
        (
            lambda: onepass.masked_cross_entropy(
                LazyLogits(hidden[: 2 - rank % 2], row_wise), labels
            ),
            "another rank of the group refuses this call" if rank % 2 == 0 else "(1, 5)",
        ),
        (
            lambda: functional.cross_entropy(
                LazyLogits(hidden, row_wise).view(10, V), labels.view(-1)[: 10 - rank // (n - 1)]
            ),
            "another rank of the group refuses this call" if rank < n - 1 else "(9,)",
        ),
        (
            lambda: LazyLogits(hidden.to(odd), row_wise).logsumexp(-1),
            "another rank of the group refuses this call" if rank else "must have one dtype",
        ),
        (
            lambda: LazyLogits(hidden, row_wise, mode="ahead" if rank else "back").logsumexp(-1),
            "another rank of the group refuses this call" if rank else "mode must be one of",
        ),
        (
            lambda: LazyLogits(hidden, row_wise, softcap=3.0 + rank).logsumexp(-1),
            "must come with the same call",
        ),
        (
            lambda: onepass.vocab_stats(sharded_z, labels[: 1 + rank % 2], want=("logp",)),
            "another rank of the group refuses this call" if rank % 2 else "(1, 5)",
        ),
    ]
    for call, said in cases:
        try:
            call()
        except (ValueError, RuntimeError, TypeError) as error:
            assert said in str(error), f"wanted {said!r}, got {error}"
            mine = said.startswith(("(", "leave process", "must have", "mode must"))
            assert f"rank {rank}: " in str(error) or mine, error
        else:
            raise AssertionError(f"nothing was raised: {said}")
        dist.barrier()


# ---------------------------------------------------------------- models


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
        tie_word_embeddings=False,
    )  # fmt: skip


def saved(folder: Path) -> Any:
    """A small Llama; the same on every rank, and in `folder`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    model = LlamaForCausalLM(config())
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return model.to(device())


def batches(n: int = 5) -> list[dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(6)
    made = []
    for _ in range(n):
        ids = here(torch.randint(0, V, (2, 7), generator=gen))
        labels = ids.clone()
        labels[:, :2] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def trained(model: Any, share: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> list[float]:
    """A loss before each of five steps of AdamW, and one after."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    losses = []
    for batch in [*batches(), batches(1)[0]]:
        loss = model(**share(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def all_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def parallel(folder: Path, **sizes: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    how = DistributedConfig(tp_plan="auto", **sizes)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=how)


def tensor_parallel(folder: Path) -> None:
    """transformers' tp_plan="auto": the curve of one process, with no logits gathered; and back."""
    one = saved(folder)
    model = parallel(folder)
    ids = batches(1)[0]
    before = model(**ids)
    forward = model.lm_head.forward
    onepass.lazy_head(model)
    assert "fused, weight [1013, 16] float32 in shards" in str(onepass.report(model))
    with onepass.strict():
        logits = model(**ids).logits
        assert isinstance(logits, LazyLogits) and logits.shape == before.logits.shape
        torch.testing.assert_close(logits.materialize(), before.logits)
        with nothing_grows_with_the_vocabulary(most=14 * 16):
            model(**ids).loss.backward()
        model.zero_grad()
        got = trained(model, all_of)
    wanted = trained(copy.deepcopy(one), all_of)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=0)
    assert onepass.unlazy_head(model).lm_head.forward is forward
    assert not isinstance(model(**ids).logits, LazyLogits)


def tensor_parallel_families(folder: Path) -> None:
    """Tied to the embedding, softcapped, scaled; in bfloat16 under autocast."""
    from .tiny_models import batch_of, tiny

    for family in ("qwen2_tied", "gemma2_softcap", "cohere_scale", "granite_scale"):
        one = tiny(family).to(device())
        where = folder / family
        if dist.get_rank() == 0:
            one.save_pretrained(where)
        dist.barrier()
        model, batch = onepass.lazy_head(parallel(where)), batch_of(family)
        batch = {key: here(value) for key, value in batch.items()}
        with onepass.strict():
            loss = model(**batch).loss
            loss.backward()
        wanted = one(**batch).loss
        wanted.backward()
        torch.testing.assert_close(loss.detach(), wanted.detach(), rtol=2e-6, atol=0)
        of_one = {name: p.grad for name, p in one.named_parameters()}
        size = max(float(grad.abs().max()) for grad in of_one.values() if grad is not None)
        for name, p in model.named_parameters():
            got, truth = whole(p.grad), whole(of_one[name])
            torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5 * size, msg=name)
        with torch.autocast(device().type, torch.bfloat16):
            narrow = model(**batch).loss
        torch.testing.assert_close(narrow.detach(), wanted.detach(), rtol=3e-2, atol=0)


def tensor_parallel_lora(folder: Path) -> None:
    """An adapter on the sharded head: its lora_B is sharded as the head is."""
    from peft import LoraConfig, get_peft_model

    one = saved(folder)
    lora = LoraConfig(target_modules=["lm_head", "q_proj"], r=2, init_lora_weights=False)

    def adapted(model: Any) -> Any:
        torch.manual_seed(8)
        return get_peft_model(model, lora)

    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    how = DistributedConfig(tp_plan={"lm_head": "colwise"})
    model = adapted(AutoModelForCausalLM.from_pretrained(folder, distributed_config=how))
    reference = adapted(one)
    given = {name: p.detach() for name, p in reference.named_parameters() if "lora_" in name}
    for name, p in model.named_parameters():
        if name in given:
            with torch.no_grad():
                other = given[name]
                if isinstance(p, DTensor):
                    other = distribute_tensor(other, p.device_mesh, p.placements)
                p.copy_(other)
    onepass.lazy_head(model)
    batch = batches(1)[0]
    with onepass.strict():
        loss = model(**batch).loss
        loss.backward()
    wanted = reference(**batch).loss
    wanted.backward()
    torch.testing.assert_close(loss.detach(), wanted.detach(), rtol=1e-6, atol=0)
    of_one = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            truth = whole(of_one[name].grad)
            size = float(truth.abs().max())
            torch.testing.assert_close(whole(p.grad), truth, rtol=1e-4, atol=1e-5 * size, msg=name)


def tp_and_fsdp(folder: Path) -> None:
    """2 x 2: the batch over FSDP2's ranks, the vocabulary over tensor parallelism's."""
    one = saved(folder)
    model = parallel(folder, tp_size=2, fsdp_size=2)
    onepass.lazy_head(model)
    mesh = model._device_mesh
    row = mesh.get_local_rank("fsdp") if "fsdp" in (mesh.mesh_dim_names or ()) else None
    assert row is not None, mesh

    def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value[row : row + 1] for key, value in batch.items()}

    with onepass.strict():
        got = here(torch.tensor(trained(model, share)))
    dist.all_reduce(got, group=mesh.get_group("fsdp"))
    torch.testing.assert_close((got / 2).tolist(), trained(one, all_of), rtol=2e-5, atol=0)


def tp_and_dp(folder: Path) -> None:
    """2 x 2 by hand: a mesh with names, the head sharded over one of them, gradients averaged over
    the other."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("dp", "tp"))
    hidden, weight, bias, labels = parts()
    row = mesh.get_local_rank("dp")
    wanted = truth_of_rows()
    for placements in ([Replicate(), Shard(0)], None):
        sub = mesh if placements else mesh["tp"]
        leaves = [hidden[row : row + 1]]
        leaves += [distribute_tensor(t, sub, placements or [Shard(0)]) for t in (weight, bias)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with nothing_grows_with_the_vocabulary(most=200):
            logits = LazyLogits(*leaves, mesh_dim="tp")
            loss = loss_of(logits, labels[row : row + 1]) / 2
            loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=mesh.get_group("dp"))
        grads = []
        for leaf in leaves[1:]:
            grad: Any = leaf.grad
            dist.all_reduce(grad.to_local(), group=mesh.get_group("dp"))
            grads.append(whole(grad))
        check(
            total,
            [leaves[0].grad, *grads],
            (wanted[0], [wanted[1][0][row : row + 1], *wanted[1][1:]]),
        )


def truth_of_rows() -> tuple[Tensor, list[Tensor]]:
    """The mean of both rows' losses in one process."""
    hidden, weight, bias, labels = parts()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss: Any = 0.0
    for row in (slice(0, 1), slice(1, 2)):
        loss = loss + loss_of(LazyLogits(hidden[row], weight, bias), labels[row]) / 2
    loss.backward()
    return loss.detach(), [whole(t.grad) for t in leaves]


ON_ANY = (
    process_group, dtensor, meshes_of_two, no_linear_heads, two_forwards, linear_losses, stale,
    empty_shards, sharded_logits, torch_plans, refused,
)  # fmt: skip


def main(rank: int, rendezvous: str, names: list[str], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # transformers asks, in vain
    warnings.filterwarnings("ignore", category=FutureWarning)
    join(rank, rendezvous)
    with_models = (tensor_parallel, tensor_parallel_families, tensor_parallel_lora, tp_and_fsdp)
    in_folders = (page, tp_and_dp, *with_models)
    known: dict[str, Any] = {case.__name__: case for case in ON_ANY}
    known |= {case.__name__: partial(case, folder / case.__name__) for case in in_folders}
    answer({name: known[name] for name in names}, folder, rank)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3].split(), Path(sys.argv[4]))
