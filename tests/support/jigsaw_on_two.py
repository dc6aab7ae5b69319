"""A jigsaw pair on two processes under DDP, each with noise of its own, against one's truth."""

from __future__ import annotations

import sys
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from onepass import lazy_head
from onepass.jigsaw import JigsawArguments, JigsawModel, TransformerCloak
from onepass.jigsaw.trainer import lora_config
from onepass.training.flags import LoraFlags

from .processes import join, leave
from .tiny_language_model import model


def pair() -> Any:
    from peft import get_peft_model

    base = model(2)
    torch.manual_seed(1)
    jigsaw = JigsawArguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = lora_config(base, LoraFlags(lora_r=4, lora_dropout=0.0), jigsaw)
        adapted: Any = get_peft_model(base, config)
    made = JigsawModel(adapted, TransformerCloak.from_model(adapted), jigsaw)
    lazy_head(adapted.get_base_model())
    with torch.no_grad():  # from a lora_B and heads of 0 half of the gradients would be 0
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def loss_of(wrapped: Any, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(4, 260, (2, 9), generator=generator)
    mask = (torch.arange(9) < 7).long().expand(2, 9)
    torch.manual_seed(rank)  # of the noise
    loss: Tensor = wrapped(input_ids=ids, attention_mask=mask)["loss"]
    return loss


def main(rank: int, rendezvous: str) -> None:
    join(rank, rendezvous)
    whole = pair()
    for share in range(2):
        with mock.patch.object(dist, "get_rank", lambda share=share: share):  # whose noise it is
            (loss_of(whole, share) / 2).backward()
    wanted = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
    wrapped = DistributedDataParallel(pair())
    for _ in range(2):  # what a first step left behind would show in the second
        wrapped.zero_grad()
        loss_of(wrapped, rank).backward()
    size = max(float(grad.abs().max()) for grad in wanted.values() if grad is not None)
    for name, parameter in wrapped.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            torch.testing.assert_close(
                parameter.grad, wanted[name], rtol=1e-4, atol=1e-5 * size, msg=name
            )
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
