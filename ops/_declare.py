"""The only registration code: one torch operator from its schema, implementation, fake and
backward.

`torch.library.Library` rather than `custom_op`: the first call of a custom_op loads torch._dynamo,
a second of start-up time that a user of eager mode never wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "onepass"
_library = torch.library.Library(NAMESPACE, "DEF")


def declare(
    schema: str,
    *,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Registers `schema` ("name(Tensor x) -> Tensor") and returns the callable operator."""
    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_library
        )
    return getattr(getattr(torch.ops, NAMESPACE), name).default
