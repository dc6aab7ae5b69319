"""What two processes do with lazy heads under DeepSpeed; each works out one process's truth."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
warnings.simplefilter("ignore")  # torch's, of what DeepSpeed calls
import deepspeed  # noqa: E402

import onepass  # noqa: E402
from onepass import LazyLogits  # noqa: E402

from .heads_on_two import LOSSES, loss_in_model, raised, share_of  # noqa: E402
from .processes import answer, join, leave  # noqa: E402
from .tiny_models import V, tiny  # noqa: E402

# What DeepSpeed would compile as it starts, for a minute.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

Grads = dict[str, Tensor]
Loss = Callable[..., Tensor]
LR = 0.1
# The head is taken away between its forward and its backward, in every step.
RELEASED = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


class Run(NamedTuple):
    """Losses of each micro-step, gradients of the last step, and gathers of each step."""

    losses: list[float]
    grads: Grads
    gathers: list[list[tuple[str, ...]]]


def engine_of(model: Any, stage: int = 3, config: Any = None, **zero: Any) -> Any:
    learns = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0} | zero,
    }
    optimizer = torch.optim.SGD(learns, lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings | (config or {}))[
        0
    ]


@contextlib.contextmanager
def gathers_told(engine: Any) -> Iterator[list[tuple[str, ...]]]:
    """The parameters of each gather, as they come."""
    told: list[tuple[str, ...]] = []
    names = {p.ds_id: name for name, p in engine.module.named_parameters() if hasattr(p, "ds_id")}
    before = {}

    def telling(gather: Callable[..., Any], own: Any) -> Callable[..., Any]:
        def run(params: Any = None, *args: Any, **kwargs: Any) -> Any:
            given = [own] if params is None else list(params)
            moved = [p for p in given if p.ds_status.name == "NOT_AVAILABLE"]
            if moved:
                told.append(tuple(sorted(names[p.ds_id] for p in moved)))
            return gather(given, *args, **kwargs)

        return run

    for p in engine.module.parameters():
        for name in ("all_gather", "all_gather_coalesced"):
            if hasattr(p, name):
                before[p, name] = getattr(p, name)
                setattr(p, name, telling(before[p, name], p))
    try:
        yield told
    finally:
        for (p, name), gather in before.items():
            setattr(p, name, gather)


class Sizes(TorchDispatchMode):
    """The shapes of what is made, in the backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (t for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        self.seen |= {tuple(t.shape) for t in made if not t.is_meta and type(t) is not LazyLogits}
        return out


def trained(
    engine: Any,
    rank: int,
    loss_of: Loss = loss_in_model,
    steps: int = 3,
    micro: int = 1,
    own_backward: bool = True,
    strict: bool = True,
) -> Run:
    losses, gathers = [], []
    grads: Grads = {}
    for _ in range(steps):
        with gathers_told(engine) as told:
            for at in range(micro):
                with onepass.strict(strict):
                    loss = loss_of(engine, share_of((rank + at) % 2))
                losses.append(loss.item())
                engine.backward(loss) if own_backward else loss.backward()
                if at == micro - 1:
                    grads = grads_of(engine)
                engine.step()
        gathers.append(told)
    return Run(losses, grads, gathers)


def grads_of(engine: Any) -> Grads:
    named = engine.module.named_parameters()
    get = deepspeed.utils.safe_get_full_grad
    return {name: get(p).detach().clone() for name, p in named if p.requires_grad}


def truth(model: Any, rank: int, loss_of: Loss = loss_in_model, steps: int = 3) -> Run:
    """The same steps in one process: the mean of both shares; losses are those of the rank."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for share in range(2):
            loss = loss_of(model, share_of(share))
            if share == rank:
                losses.append(loss.item())
            (loss / 2).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return Run(losses, grads, [])


def check(got: Run, wanted: Run, rtol: float = 2e-5) -> None:
    torch.testing.assert_close(got.losses, wanted.losses, rtol=rtol, atol=0.0)
    assert got.grads.keys() == wanted.grads.keys()
    size = max(float(grad.abs().max()) for grad in wanted.grads.values())
    for name, grad in wanted.grads.items():
        found = got.grads[name].view_as(grad)
        torch.testing.assert_close(found, grad, rtol=rtol, atol=rtol * size, msg=name)


def of_head(run: Run, head: str = "lm_head.weight") -> list[int]:
    """How often the head was gathered, step by step."""
    return [sum(head in names for names in step) for step in run.gathers]


# ---------------------------------------------------------------- the cases


def zero3(rank: int) -> None:
    """Trained heads, tied, with a bias or without; the loss in the model or outside."""
    for family in ("llama", "qwen2_tied", "phi_bias"):
        for name, loss_of in LOSSES.items():
            wanted = truth(tiny(family), rank, loss_of)
            if name == "model":
                engine = engine_of(onepass.lazy_head(tiny(family)))
            else:
                engine = onepass.lazy_head(engine_of(tiny(family)))
            report = onepass.report(engine)
            assert report.fused and f"weight [{V}, 32] float32" in str(report), report
            check(trained(engine, rank, loss_of), wanted)


def gathers(rank: int) -> None:
    """The same gathers, in the same order, as without lazy heads, however many the slabs."""
    for zero, loss_of in zip(({}, RELEASED), LOSSES.values(), strict=True):
        with Sizes() as whole:
            plain = trained(engine_of(tiny("llama"), **zero), rank, loss_of, strict=False)
        model = onepass.lazy_head(tiny("llama"), max_slab_bytes=V * 4)
        with Sizes() as sizes:
            lazy = trained(engine_of(model, **zero), rank, loss_of)
        of_logits = {(1, 9, V), (9, V), (8, V)}
        assert whole.seen & of_logits and not sizes.seen & of_logits
        assert lazy.gathers == plain.gathers, (lazy.gathers, plain.gathers)
        # From the second step on DeepSpeed knows that the backward begins with the head.
        assert of_head(lazy) == ([2, 2, 2] if zero else [2, 1, 1]), of_head(lazy)
        check(lazy, plain)


def stages_1_and_2(rank: int) -> None:
    for stage in (1, 2):
        for loss_of in LOSSES.values():
            wanted = truth(tiny("llama"), rank)
            engine = engine_of(onepass.lazy_head(tiny("llama")), stage)
            assert onepass.report(engine).fused
            check(trained(engine, rank, loss_of), wanted)


def accumulation(rank: int) -> None:
    """Micro-steps, by the engine's backward and by the loss's own, which DeepSpeed scales where it
    leaves the model: at the loss, or at the logits."""
    config = {"gradient_accumulation_steps": 2}
    for stage in (2, 3):
        for loss_of in LOSSES.values():
            wanted = truth(tiny("llama"), rank, loss_of, steps=2)
            for own in (True, False) if stage == 3 else (False,):
                engine = engine_of(onepass.lazy_head(tiny("llama")), stage, config)
                got = trained(engine, rank, loss_of, 2, micro=2, own_backward=own)
                check(got._replace(losses=got.losses[::2]), wanted)


def frozen_head(rank: int) -> None:
    def model() -> Any:
        made = tiny("llama")
        made.lm_head.requires_grad_(False)
        return made

    for loss_of in LOSSES.values():
        got = trained(engine_of(onepass.lazy_head(model()), **RELEASED), rank, loss_of)
        check(got, truth(model(), rank, loss_of))
        assert of_head(got) == [2, 2, 2], of_head(got)


def head_alone(rank: int) -> None:
    """Only the head learns: no gradient comes to its hidden states."""

    def model() -> Any:
        made = tiny("llama").requires_grad_(False)
        made.lm_head.requires_grad_(True)
        return made

    for loss_of in LOSSES.values():
        wanted = truth(model(), rank, loss_of)
        check(trained(engine_of(onepass.lazy_head(model())), rank, loss_of), wanted)


def lora(rank: int) -> None:
    """Adapters on the body, and on the head too: a head of two terms."""
    import peft

    def model(*targets: str) -> Any:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets))
        made = peft.get_peft_model(tiny("llama"), config)
        torch.manual_seed(2)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        return made

    both = ("q_proj", "lm_head")
    for targets, of in ((("q_proj",), "logits"), (both, "logits"), (both, "model")):
        wanted = truth(model(*targets), rank, LOSSES[of])
        engine = engine_of(onepass.lazy_head(model(*targets)))
        check(trained(engine, rank, LOSSES[of]), wanted)


def checkpointing(rank: int) -> None:
    for reentrant in (True, False):

        def model(reentrant: bool = reentrant) -> Any:
            made = tiny("llama")
            given = {"use_reentrant": reentrant}
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
            made.enable_input_require_grads()
            return made

        for zero, loss_of in zip(({}, RELEASED), LOSSES.values(), strict=True):
            wanted = truth(tiny("llama"), rank, loss_of)
            engine = engine_of(onepass.lazy_head(model()), **zero)
            check(trained(engine, rank, loss_of), wanted)


def checkpointed_head(rank: int) -> None:
    """The head and its loss themselves recomputed in the backward."""
    from torch.utils.checkpoint import checkpoint

    class WithLoss(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = tiny("llama"), reentrant

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            def last(hidden: Tensor) -> Tensor:
                rows = self.inner.lm_head(hidden)[:, :-1].reshape(-1, V)
                return functional.cross_entropy(rows, labels[:, 1:].reshape(-1))

            hidden = self.inner.model(input_ids=input_ids).last_hidden_state
            return checkpoint(last, hidden, use_reentrant=self.reentrant)

    for reentrant in (True, False):
        wanted = truth(WithLoss(reentrant), rank, lambda m, batch: m(**batch))
        model = WithLoss(reentrant)
        onepass.lazy_head(model, "inner.lm_head")
        check(trained(engine_of(model), rank, lambda m, batch: m(**batch)), wanted)


def own_module(rank: int) -> None:
    """A module that takes another's weight, which DeepSpeed then gathers for it."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("llama")

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            hidden = self.inner.model(input_ids=input_ids).last_hidden_state[:, :-1]
            given = hidden.reshape(-1, hidden.shape[-1]), self.inner.lm_head.weight
            return onepass.linear_cross_entropy(*given, labels[:, 1:].reshape(-1))

    def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch)
        return loss

    for zero in ({}, RELEASED):
        got = trained(engine_of(Fused(), **zero), rank, loss_of)
        check(got, truth(Fused(), rank, loss_of))


def partitioned_before(rank: int) -> None:
    """transformers' from_pretrained under a ZeRO-3 configuration: the head is called lazy while it
    is in shards."""
    from transformers.integrations import HfDeepSpeedConfig

    plain = tiny("llama")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    folder = Path(sys.argv[4]) / "model"
    plain.save_pretrained(folder)  # by the first process
    dist.barrier()
    sharding = HfDeepSpeedConfig(config)
    model = type(plain).from_pretrained(folder).train()
    del sharding  # in force for as long as it lived
    assert model.lm_head.weight.shape == (0,)
    onepass.lazy_head(model)
    assert f"weight [{V}, 32]" in str(onepass.report(model))
    check(trained(engine_of(model), rank), truth(plain, rank))
    onepass.unlazy_head(model)
    assert "forward" not in model.lm_head.__dict__


def half_precision(rank: int) -> None:
    """bf16 parameters with fp32 master weights, and autocast: as the plain head's."""
    for config in ({"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True}}):
        model, loss_of = tiny("llama"), LOSSES["logits" if "bf16" in config else "model"]
        plain = trained(engine_of(tiny("llama"), 3, config), rank, loss_of, strict=False)
        lazy = trained(engine_of(onepass.lazy_head(model), 3, config), rank, loss_of)
        check(lazy, plain, rtol=2e-2)


def two_uses(rank: int) -> None:
    """Two losses of the same logits; logits of two forwards, joined; logits made whole."""

    def two_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
        out = model(**batch)
        log_p = out.logits.log_softmax(-1)
        found: Tensor = out.loss - 0.1 * (log_p.exp() * log_p).sum(-1).mean()
        return found

    def joined(model: Any, batch: dict[str, Tensor]) -> Tensor:
        rows = torch.cat([model(input_ids=batch["input_ids"]).logits for _ in range(2)])
        return functional.cross_entropy(rows.reshape(-1, V), batch["labels"].repeat(2, 1).view(-1))

    def whole(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        if isinstance(logits, LazyLogits):
            logits = logits.materialize()
        return functional.cross_entropy(logits.view(-1, V), batch["labels"].view(-1))

    for loss_of, zero in ((two_losses, RELEASED), (joined, {}), (whole, RELEASED)):
        wanted = truth(tiny("llama"), rank, loss_of)
        engine = engine_of(onepass.lazy_head(tiny("llama")), **zero)
        # Logits of a trained head's two gatherings are of two heads.
        check(trained(engine, rank, loss_of, strict=loss_of is not joined), wanted)


def evaluation_and_later(rank: int) -> None:
    """Without gradients; logits kept past a step stay those of their weights, and learn."""
    for zero in ({}, RELEASED, {"stage3_param_persistence_threshold": 10**6}):
        engine = engine_of(onepass.lazy_head(tiny("llama")), **zero)
        batch = share_of(rank)
        with torch.no_grad(), onepass.strict():
            got = engine(**batch)
        wanted = tiny("llama")(**batch)
        torch.testing.assert_close(got.loss, wanted.loss)
        assert torch.equal(got.logits.argmax(-1), wanted.logits.argmax(-1))
        for _ in range(3):
            out, kept = engine(**batch), engine(**batch).logits
            logits = out.logits.materialize().detach().clone()
            engine.backward(out.loss)
            engine.step()
            torch.testing.assert_close(out.logits.logsumexp(-1), logits.logsumexp(-1))
            engine.backward(kept.logsumexp(-1).mean())  # of the older weights, as is its value
            engine.step()
        fresh = engine(**batch).logits.logsumexp(-1)
        assert not torch.allclose(fresh, logits.logsumexp(-1))


def bad_use(rank: int) -> None:
    engine = engine_of(onepass.lazy_head(tiny("llama")))
    head = engine.module.lm_head
    hidden = torch.randn(2, 32)
    wanted = "weight must be a whole tensor: got a weight sharded by ZeRO-3; gather it first"
    error = raised(lambda: LazyLogits(hidden, head.weight))
    assert wanted in error and "\n" not in error, error
    error = raised(lambda: head.forward(hidden))  # past the hooks that gather it
    assert wanted in error, error
    # A second backward finds the graph freed, and the head given back.
    out = engine(**share_of(rank))
    engine.backward(out.loss)
    again = out.logits.logsumexp(-1).mean()
    error = raised(lambda: engine.backward(again))
    assert "the head's gradient came when ZeRO-3 had released its weight" in error, error
    engine = engine_of(onepass.lazy_head(tiny("llama")))
    head = engine.module.lm_head
    with deepspeed.zero.GatheredParameters(head.weight):
        logits = LazyLogits(hidden, head.weight)
        weight = head.weight.detach().clone()
    torch.testing.assert_close(logits.logsumexp(-1), (hidden @ weight.T).logsumexp(-1))
    check(trained(engine, rank), truth(tiny("llama"), rank))  # nothing of it is left behind


def trainer(rank: int) -> None:
    """transformers.Trainer with a DeepSpeed configuration, accumulation and evaluation."""
    import transformers as hf
    from accelerate.state import AcceleratorState

    rows = torch.randint(3, V - 1, (8, 9), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in rows]
    for at, row in enumerate(data):
        row["labels"][: at % 4] = -100

    def logs(lazy: bool, stage: int, folder: str) -> list[dict[str, float]]:
        AcceleratorState._reset_state()
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
        sizes = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        arguments = hf.TrainingArguments(
            folder,
            deepspeed=config | dict.fromkeys(sizes, "auto"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=3,
            optim="sgd",
            learning_rate=LR,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            prediction_loss_only=True,
        )
        model = onepass.lazy_head(tiny("llama")) if lazy else tiny("llama")
        run = hf.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
        with onepass.strict(lazy):
            run.train()
            run.evaluate()
        return run.state.log_history

    with tempfile.TemporaryDirectory() as folder:
        for stage in (2, 3):
            lazy, plain = logs(True, stage, folder), logs(False, stage, folder)
            for key, times in (("loss", 3), ("grad_norm", 3), ("eval_loss", 1)):
                got, wanted = ([e[key] for e in log if key in e] for log in (lazy, plain))
                assert len(got) == times
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def main(rank: int, rendezvous: str, cases: list[str], answers: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, in vain
    join(rank, rendezvous)
    gc.freeze()  # DeepSpeed collects at every start
    answer({case: functools.partial(globals()[case], rank) for case in cases}, answers, rank)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3].split(), Path(sys.argv[4]))
