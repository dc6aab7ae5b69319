"""linear_cross_entropy: torch's function of that name, without its logits.

What the losses that start from hidden states share is here too: `lazy_product`, the LazyLogits of
checked arguments, which every drop-in for another package's function is built on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lazy_logits import LazyLogits, autocasts, check_head
from .losses import check_class_weights, cross_entropy, reduce_classes
from .ops._check import IGNORED, check_choice, check_floating
from .ops._dtensor import is_dtensor
from .ops._launch import accumulation_dtype
from .reduce import REDUCTIONS

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

NAMES = ("input", "linear_weight", "linear_bias")


def as_under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as autocast would hand them to a matrix product; unchanged where it is off."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocasts(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(value: Any) -> Any:
        narrow = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if narrow and value.dtype != torch.float64 else value

    return tuple(cast(value) for value in tensors)


def lazy_product(
    hidden: Any,
    weight: Any,
    bias: Any,
    names: tuple[str, str, str],  # of the caller's arguments, for what the errors say
    **options: Any,
) -> LazyLogits:
    """LazyLogits(hidden, weight, bias, **options), in autocast's dtype where that is on."""
    hidden, weight, bias = as_under_autocast(hidden, weight, bias)
    if not is_dtensor(weight):
        check_head(hidden, weight, bias, names)
    return LazyLogits(hidden, weight, bias, **options)


def slab_bytes(options: object, hidden: Tensor, vocab_size: int) -> int | None:
    """The memory for logits that torch's chunking options ask for; None where they leave it."""
    if options is None:
        return None
    known = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if known is None or not isinstance(options, known):
        raise TypeError(
            "options must be a torch.nn.LinearCrossEntropyOptions (torch 2.13 or newer) or None: "
            f"got {type(options).__name__}"
        )
    given: Any = options
    wide = accumulation_dtype(hidden.dtype)
    if given.acc_dtype not in (None, wide):
        raise ValueError(
            f"options.acc_dtype must be None or {wide}, which sums are always held in: "
            f"got {given.acc_dtype}"
        )
    n_rows = hidden.shape[:-1].numel()
    rows, method = given.batch_chunk_size, given.chunking_method
    if method == "auto":
        if rows is None:
            return None
    elif method is None:
        rows = n_rows if rows is None else rows
    else:
        # The rule that torch documents for "aspect_ratio:parts".
        target = math.ceil(n_rows / math.ceil(vocab_size / hidden.shape[-1]))
        power = 1 << max(target - 1, 0).bit_length()
        ruled = min(power // int(method.partition(":")[2] or 1), n_rows)
        if rows not in (None, ruled):
            raise ValueError(
                f"options.batch_chunk_size is {rows} and chunking_method={method!r} gives {ruled}: "
                "pass one of them"
            )
        rows = ruled
    width = as_under_autocast(hidden)[0].element_size()
    return max(rows, 1) * vocab_size * width


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13) without its logits: same arguments,
    same results, whatever the installed torch; 0-dim, or [N, d1, ...] for "none".

    As in `onepass.cross_entropy`, a mean over rows that are all ignored is 0 with zero gradients,
    and the result is float32 (float64 for float64). Under autocast the product is in its dtype.

    Args:
        input: [D] or [N, D]; float32, bfloat16, float16, float64.
        linear_weight: [C, D], or [C, d1, ..., D] for a loss at every position d1, ...
        target: class indices [], [N] or [N, d1, ...]; or probabilities, [C] and so on with the
            classes second: as large as the logits, which are still not made whole.
        linear_bias: [C] or [C, d1, ...].
        weight: [C] class weights.
        reduction: "mean" (over the weights of the counted labels), "sum" or "none".
        ignore_index: a label that does not count, None for -100; only for class indices.
        label_smoothing: share of the target spread evenly over the classes.
        options: torch's LinearCrossEntropyOptions. How many rows a chunk holds becomes
            LazyLogits' max_slab_bytes. Sums are float32 here, so that no acc_policy is less exact
            than it says, and a graph may always be retained.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not a tensor, options of another kind. ValueError: shapes, dtypes, devices or
        options that do not fit. IndexError: a label outside the classes.

    Formula: cross_entropy(input linear_weight^T + linear_bias, target).
    """
    check_floating("input", input)
    check_floating("linear_weight", linear_weight)
    check_choice("reduction", reduction, REDUCTIONS)
    if input.dim() not in (1, 2):
        raise ValueError(f"input must be [D] or [N, D]: got {tuple(input.shape)}")
    index = IGNORED if ignore_index is None else ignore_index
    if ignore_index is not None and isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(
            f"ignore_index={ignore_index} has no meaning for probabilities: leave it at None"
        )
    given: dict[str, Any] = {
        "weight": weight,
        "ignore_index": index,
        "label_smoothing": label_smoothing,
        "impl": impl,
    }
    slab = slab_bytes(options, input, linear_weight.shape[0])
    if linear_weight.dim() <= 2:
        logits = lazy_product(input, linear_weight, linear_bias, NAMES, max_slab_bytes=slab)
        return cross_entropy(logits, target, reduction=reduction, **given)

    classes, *places = linear_weight.shape[:-1]
    if input.dim() != 2:
        raise ValueError(
            f"input must be [N, D] for linear_weight {tuple(linear_weight.shape)}: "
            f"got {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias must be {tuple(linear_weight.shape[:-1])}: got {tuple(linear_bias.shape)}"
        )
    of_classes = isinstance(target, Tensor) and target.is_floating_point()
    wanted = (input.shape[0], *([classes] if of_classes else []), *places)
    if not isinstance(target, Tensor) or target.shape != wanted:
        came = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target must be {wanted}: got {came}")
    # One head after the other: positions share the hidden states, never a softmax.
    heads = linear_weight.flatten(1, -2)
    biases = None if linear_bias is None else linear_bias.flatten(1)
    labels = target.flatten(2) if of_classes else target.flatten(1)
    losses = torch.stack(
        [
            cross_entropy(
                lazy_product(
                    input,
                    heads[:, place],
                    None if biases is None else biases[:, place],
                    NAMES,
                    max_slab_bytes=slab,
                ),
                labels[..., place],
                reduction="none",
                **given,
            )
            for place in range(heads.shape[1])
        ],
        dim=-1,
    ).view(input.shape[0], *places)
    if not of_classes:
        target = torch.where(target == index, IGNORED, target)
    weights = check_class_weights("weight", weight, heads[:, 0, 0])
    return reduce_classes(losses, target, weights, reduction)
