"""Fills memory that torch leaves uninitialised: NaN for floats, a large number for integers.

A kernel or an op that reads what nobody wrote then fails its test instead of passing by luck on
fresh zero pages. The replacements are module-level functions, so that torch.compile sees the same
objects in every test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_empty = torch.empty
_empty_like = torch.empty_like
_empty_strided = torch.empty_strided
_new_empty = torch.Tensor.new_empty
_new_empty_strided = torch.Tensor.new_empty_strided
_resize_ = torch.Tensor.resize_


def poison_value(dtype: torch.dtype) -> Any:
    """What an uninitialised element of this type holds: NaN, True, or 0x7A in every byte."""
    if dtype.is_complex:
        return complex("nan+nanj")
    if dtype.is_floating_point:
        return float("nan")
    if dtype == torch.bool:
        return True
    return int.from_bytes(b"\x7a" * dtype.itemsize, "little")


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout == torch.strided and not tensor.is_quantized:
        with torch.no_grad():
            tensor.fill_(poison_value(tensor.dtype))
    return tensor


def _poisoned_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
    return _fill(_empty(*args, **kwargs))


def _poisoned_empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
    return _fill(_empty_like(*args, **kwargs))


def _poisoned_empty_strided(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The gaps between the strides are uninitialised too, so the whole storage is filled."""
    tensor = _empty_strided(*args, **kwargs)
    _fill_storage(tensor, 0)
    return tensor


def _poisoned_new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _poisoned_empty(*args, **_like(self, kwargs))
    return _fill(_new_empty(self, *args, **kwargs))


def _poisoned_new_empty_strided(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _poisoned_empty_strided(*args, **_like(self, kwargs))
    tensor = _new_empty_strided(self, *args, **kwargs)
    _fill_storage(tensor, 0)
    return tensor


def _poisoned_resize_(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Only what the storage grew by is new; the elements it had are kept by contract."""
    before = self.untyped_storage().nbytes()
    _resize_(self, *args, **kwargs)
    _fill_storage(self, -(-before // self.element_size()))
    return self


def _like(tensor: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for torch.empty in place of a method, which torch.compile traces only unpatched."""
    return {"dtype": tensor.dtype, "device": tensor.device, **kwargs}


def _fill_storage(tensor: torch.Tensor, first: int) -> None:
    if torch.compiler.is_compiling():  # a storage is nothing that a graph can hold
        _fill(tensor)
        return
    grown = tensor.untyped_storage().nbytes() // tensor.element_size() - first
    if grown > 0:
        with torch.no_grad():
            _fill(tensor.as_strided((grown,), (1,), first))


_PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (torch, "empty", _poisoned_empty),
    (torch, "empty_like", _poisoned_empty_like),
    (torch, "empty_strided", _poisoned_empty_strided),
    (torch.Tensor, "new_empty", _poisoned_new_empty),
    (torch.Tensor, "new_empty_strided", _poisoned_new_empty_strided),
    (torch.Tensor, "resize_", _poisoned_resize_),
)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, fresh memory is poison; afterwards torch's own functions are back."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _PATCHES]
    for owner, name, replacement in _PATCHES:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
