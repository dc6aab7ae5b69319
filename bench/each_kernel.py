"""Runs every kernel of the package once, forward and backward, on shapes easy to get wrong.

For compute-sanitizer (`bench/on_gpu.sh OUTDIR --sanitize`), which slows a kernel a hundredfold:
the shapes are small, their rows odd, strided, masked and split. Prints what it ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

IGNORED = -100


def main(argv: Sequence[str] | None = None) -> int:
    """Run each op in each dtype; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m onepass.bench.each_kernel")
    parser.add_argument("--impl", default="triton", choices=("triton", "torch"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="sizes for Triton's interpreter")
    args = parser.parse_args(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("each_kernel: --device: got cuda, but torch sees no GPU", file=sys.stderr)
        return 2
    # One short row block, an odd row, one split over several programs.
    shapes = ((3, 19),) if args.small else ((5, 7), (37, 1537), (9, 32001), (1, 50257))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)[: 2 if args.small else 3]
    for dtype in dtypes:
        for rows, columns in shapes:
            generator = torch.Generator(args.device).manual_seed(rows * columns)
            draw = Draw(generator, dtype, args.impl)
            for op in (vocab_stats, vocab_pair_stats, row_moments, gaussian, head):
                total = op(draw, rows, columns)
                if not bool(torch.isfinite(total)):
                    print(f"{op.__name__} {rows}x{columns} {dtype}: {float(total)}")
                    return 1
            print(f"ok {rows}x{columns} {dtype}")
    return 0


class Draw:
    """Makes the tensors of one shape and dtype."""

    def __init__(self, generator: Any, dtype: Any, impl: str) -> None:
        self.generator, self.dtype, self.impl = generator, dtype, impl

    def rows(self, *shape: int, padded: int = 0) -> Any:
        """A leaf of normal numbers whose rows lie `padded` elements further apart than wide."""
        import torch

        *leading, columns = shape
        full = torch.randn(
            (*leading, columns + padded), generator=self.generator, device=self.generator.device
        )
        return full.to(self.dtype)[..., :columns].detach().requires_grad_(True)

    def labels(self, rows: int, columns: int) -> Any:
        """Labels with the last column among them, every third one ignored."""
        import torch

        labels = torch.randint(
            columns, (rows,), generator=self.generator, device=self.generator.device
        )
        labels[0] = columns - 1
        labels[1::3] = IGNORED
        return labels


def backward(outputs: Any, leaves: Sequence[Any]) -> Any:
    """The sum of the outputs and of all gradients: finite if and only if every one of them is."""
    import torch

    scalar = sum(o.float().sum() for o in outputs if o is not None and o.is_floating_point())
    gradients = torch.autograd.grad(scalar, list(leaves))
    return scalar.detach() + sum(g.float().sum() for g in gradients)


def vocab_stats(draw: Draw, rows: int, columns: int) -> Any:
    """Every fact, of padded rows with ignored labels."""
    from .. import VocabStats
    from .. import vocab_stats as op

    logits = draw.rows(rows, columns, padded=3)
    contrast = draw.labels(rows, columns)
    weights = draw.rows(columns).detach().float().abs()
    facts = op(
        logits,
        draw.labels(rows, columns),
        contrast_labels=contrast,
        bag_weights=weights,
        want=VocabStats._fields,
        impl=draw.impl,
    )
    return backward(facts, [logits])


def vocab_pair_stats(draw: Draw, rows: int, columns: int) -> Any:
    """Every fact with gradients to both sides, then two students on one teacher, then probs."""
    from .. import vocab_pair_stats as op

    want = ("cross_entropy", "kl", "reverse_kl", "jsd", "lse")
    logits, target = draw.rows(rows, columns, padded=5), draw.rows(rows, columns)
    total = backward(op(logits, target, want=want, impl=draw.impl), [logits, target])
    students = draw.rows(2, rows, columns)
    shared = op(students, target.detach(), want=("cross_entropy", "jsd"), impl=draw.impl)
    total = total + backward(shared, [students])
    probs = target.detach().float().softmax(-1).to(draw.dtype)
    from_probs = op(logits, target_probs=probs, want=("cross_entropy", "lse"), impl=draw.impl)
    return total + backward(from_probs, [logits])


def row_moments(draw: Draw, rows: int, columns: int) -> Any:
    """Two layers of different strides, one row masked; then one pair, two of its moments."""
    import torch

    from .. import row_moments as op

    x = [draw.rows(rows, columns, padded=1), draw.rows(rows, columns)]
    y = [draw.rows(rows, columns), draw.rows(rows, columns, padded=8)]
    mask = torch.ones(rows, dtype=torch.bool, device=x[0].device)
    mask[-1] = rows == 1
    total = backward(op(x, y, mask, impl=draw.impl), [*x, *y])
    some = op(x[0], y[1], want=("dd", "yy"), impl=draw.impl)
    return total + backward((some.dd, some.yy), [x[0], y[1]])


def gaussian(draw: Draw, rows: int, columns: int) -> Any:
    """Rows of which one is masked, pairs of rows under a mask of features, noise under both."""
    import torch

    from .. import cloak, gaussian_stats

    x, mean = draw.rows(rows, columns, padded=1), draw.rows(rows, columns)
    location = draw.rows(columns)
    std = draw.rows(rows, columns, padded=8).detach().abs().add(0.1).requires_grad_(True)
    leaves = [x, mean, location, std]
    mask = torch.ones(rows, dtype=torch.bool, device=x.device)
    mask[-1] = rows == 1
    stats = gaussian_stats(x, mean, std, mask, location=location, impl=draw.impl)
    total = backward(stats, leaves)
    few = slice(min(rows, 3))  # a row of each side for every one of the other
    features = torch.arange(columns, device=x.device) % 3 != 0
    pairs = gaussian_stats(
        x[few, None], mean[None, few], std[None, few], features[None, None], impl=draw.impl
    )
    total = total + backward(pairs, [x, mean, std])
    for flags in (mask, features.expand(rows, columns)):
        noisy = cloak(x, mean, std, flags, impl=draw.impl)
        total = total + backward([noisy], [x, mean, std])
    return total


def head(draw: Draw, rows: int, columns: int) -> Any:
    """Slabs of two rows: gradients made in the forward, then in the backward, of a capped head."""
    from .. import LazyLogits, cross_entropy
    from .. import vocab_stats as op

    hidden, weight, bias = draw.rows(rows, 16), draw.rows(columns, 16), draw.rows(columns)
    leaves, labels = (hidden, weight, bias), draw.labels(rows, columns)
    slab = 2 * columns * hidden.element_size()
    plain = LazyLogits(hidden, weight, bias, max_slab_bytes=slab)
    total = backward((cross_entropy(plain, labels, impl=draw.impl),), leaves)
    capped = LazyLogits(hidden, weight, bias, softcap=20.0, max_slab_bytes=slab)
    facts = op(capped, labels, want=("logp", "entropy"), impl=draw.impl)
    return total + backward(facts[:5], leaves)


if __name__ == "__main__":
    sys.exit(main())
