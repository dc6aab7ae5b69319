"""One token of text steered by PPLM, on a model of GPT-2's make with random weights.

`eager` is Uber's loop written down plainly (plain_pplm.py). Both start in the middle of a text:
what they keep of the tokens before is made beforehand and not timed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from .schema import Case, NotHere, Provider, Size

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from .schema import Function, Inputs, Outputs

N_CLASSES, LABEL = 2, 1
STEPSIZE = 0.02  # generate_text_pplm's, as its other defaults


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    import torch

    assert size.V is not None and size.D is not None
    device, dtype = generator.device, getattr(torch, size.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    n_words = max(1, min(200, size.V // 5))
    words = torch.randperm(size.V, generator=generator, device=device)[:n_words]
    return {
        "input_ids": torch.randint(size.V, (1, size.N), generator=generator, device=device),
        "bag": words if size.inputs == "bag" else words[:0],
        "head": normal(N_CLASSES, size.D).mul_(size.D**-0.5),  # a class that is not certain yet
        "sizes": torch.tensor([size.V, size.layers], device=device),
    }


@functools.lru_cache(maxsize=2)
def _model(vocab_size: int, width: int, layers: int, dtype: Any, device: Any) -> Any:
    """The same random weights in every dtype."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    heads = max(1, width // 64)
    config = GPT2Config(vocab_size=vocab_size, n_embd=width, n_layer=layers, n_head=heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(config)
    return model.to(device, dtype).eval().requires_grad_(False)


class _Text:
    """What a step needs of a text: made once, not timed."""

    def __init__(self, inputs: Inputs) -> None:
        import torch

        from ..pplm.heads import ClassificationHead
        from . import plain_pplm

        head = inputs["head"]
        self.ids = inputs["input_ids"]
        vocab_size, layers = inputs["sizes"].tolist()
        self.model = _model(vocab_size, head.shape[1], layers, head.dtype, head.device)
        with torch.no_grad():
            before = plain_pplm.run(self.model, None, input_ids=self.ids[:, :-1])
        self.past = before[1]
        self.hidden_sum = before[2].sum(1)
        self.bag, self.classifier = None, None
        if len(inputs["bag"]):
            rows = head.new_zeros(len(inputs["bag"]), vocab_size)
            self.bag = rows.scatter_(1, inputs["bag"][:, None], 1.0)
        else:
            self.classifier = ClassificationHead(N_CLASSES, head.shape[1]).to(head)
            self.classifier.requires_grad_(False)
            self.classifier.mlp.weight.copy_(head)
            self.classifier.mlp.bias.zero_()


def _with_text(step: Callable[[_Text], torch.Tensor]) -> Function:
    """`step` on the text of the inputs; the last text stays, so that calls time the step alone."""
    kept: list[tuple[Inputs, _Text]] = []

    def function(inputs: Inputs) -> Outputs:
        import torch

        if not kept or kept[0][0] is not inputs:
            kept[:] = [(inputs, _Text(inputs))]
        with torch.enable_grad():
            return (step(kept[0][1]),)

    return function


def _eager(text: _Text) -> torch.Tensor:
    from . import plain_pplm

    kind = plain_pplm.BOW if text.bag is not None else plain_pplm.DISCRIM
    walk = plain_pplm.Walk(
        text.model, text.ids, past=text.past, stepsize=STEPSIZE, loss_type=kind,
        one_hot_bows_vectors=[text.bag], classifier=text.classifier, class_label=LABEL,
    )  # fmt: skip
    return walk.step(top_k=0).log()


def _onepass(text: _Text) -> torch.Tensor:
    from ..pplm.bags import bag_weights
    from ..pplm.cache import pack
    from ..pplm.perturb import Goal, Steps
    from ..pplm.walk import Choice, Walk

    bags = () if text.bag is None else (bag_weights(text.bag),)
    goal = Goal(bags, text.classifier, LABEL)
    walk = Walk(text.model, text.ids[:, -1:], goal, Steps(stepsize=STEPSIZE), 1)
    walk.ids, walk.past = text.ids, pack(text.past)
    walk.unpert_past, walk.hidden_sum = walk.past, text.hidden_sum
    return Choice().fused(walk.next())


def _provider(name: str, step: Callable[[_Text], torch.Tensor]) -> Provider:
    def load() -> Function:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise NotHere(f"{error}: pip install 'onepass[train]'") from None
        return _with_text(step)

    return Provider(name, load)


def _sizes(*lengths: int, **model: Any) -> tuple[Size, ...]:
    return tuple(
        Size(length, **model, inputs=kind) for length in lengths for kind in ("bag", "classifier")
    )


GPT2: dict[str, Any] = {"V": 50257, "D": 768, "layers": 12, "dtype": "float32"}
GPT2_MEDIUM: dict[str, Any] = {"V": 50257, "D": 1024, "layers": 24}

PPLM_CASE = Case(
    name="steered_token",
    what="one token of text steered by PPLM: three iterations, N tokens before it and with it",
    inputs=_inputs,
    wrt=(),
    providers=(_provider("onepass", _onepass), _provider("eager", _eager)),
    sizes={"cuda": _sizes(64, **GPT2_MEDIUM), "cpu": _sizes(52, **GPT2)},
    more={"cuda": _sizes(16, 128, **GPT2_MEDIUM), "cpu": _sizes(16, 102, **GPT2)},
    modes=("forward",),
    has_roofline=False,
)
