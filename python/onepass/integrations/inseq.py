"""inseq's step functions and the head of its models replaced by ours, between `install()` and
`uninstall()`.

An unchanged `inseq.load_model(...).attribute(...)` then runs the output head on the last position
alone, and takes all scores of a step from one pass over its logits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from torch import nn

from ..heads import is_lazy, lazy_head_within, switch_off, switch_on
from ..lazy_logits import LazyLogits, with_head
from ._installed import installed_version

LEAST = (0, 7, 1)
SCORES, NAME = "inseq.attr.step_functions", "STEP_SCORES_MAP"
MODELS, FORWARD = "inseq.models", "get_forward_output"
KINDS = ("DecoderOnlyAttributionModel", "EncoderDecoderAttributionModel")
FORWARD_ARGUMENTS = ("self", "batch", "use_embeddings", "kwargs")

_their_functions: dict[str, tuple[Any, Any]] = {}  # by id: what stood there, and ours in its place
_their_forwards: dict[str, tuple[Any, Any]] = {}  # by name of the class
# by model: its head when it was searched, and what is lazy there
_heads: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[nn.Module]]]
_heads = weakref.WeakKeyDictionary()


def lazily(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """What `install()` puts in the place of an AttributionModel's get_forward_output: the output of
    theirs, whose logits are LazyLogits where the model's head can be lazy."""

    @functools.wraps(theirs)
    def get_forward_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lazy_where_possible(self.model):
            output = theirs(self, *args, **kwargs)
        logits = getattr(output, "logits", None)
        if isinstance(logits, LazyLogits):
            # Attribution differentiates with respect to inputs: a gradient of the head's weight is
            # [V, D] of work and memory at every step, and thrown away.
            head = logits.onepass_head
            bias = None if head.bias is None else head.bias.detach()
            weight = tuple(each.detach() for each in head.weight)
            output.logits = with_head(logits, weight=weight, bias=bias)
        return output

    return get_forward_output


@contextlib.contextmanager
def lazy_where_possible(model: nn.Module) -> Iterator[None]:
    """`lazy_head_within`, which searches the model once and not at every forward. A head that
    cannot be lazy stays whole, and a warning says why, once for each model."""
    found: Any = getattr(model, "get_output_embeddings", None)
    head = None if found is None else found()
    if model not in _heads or _heads[model][0] is not head:  # resized since, or under LoRA
        _heads[model] = head, heads_of(model)
    changed = [module for module in _heads[model][1] if not is_lazy(module)]
    for module in changed:
        switch_on(module, {})
    try:
        yield
    finally:
        for module in changed:
            switch_off(module)


def heads_of(model: nn.Module) -> list[nn.Module]:
    """What `lazy_head` makes lazy, or has made."""
    if found := lazy_modules(model):
        return found
    try:
        with lazy_head_within(model):
            return lazy_modules(model)
    except (TypeError, ValueError) as error:
        warnings.warn(f"inseq runs the head on every position: {error}", stacklevel=5)
        return []


def lazy_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_lazy(module)]


def install(overwrite: bool = True) -> None:
    """Puts onepass's step functions under the same ids into inseq's registry, and a lazy head under
    the models that inseq attributes; a second call changes nothing but what it adds.

    Served: all step functions of inseq 0.7.1, as `step_scores` and as `attributed_fn`, under every
    attribution method that asks inseq's models for their output, for models loaded already too.
    Values and attributions are inseq's, but where it gives NaN or fails (docs/migrate.md). A
    function that the user registered stays under its own id, and gets LazyLogits as
    `forward_output.logits`; one that was registered with onepass alone is there too, under an id
    that inseq has not. Outside of inseq's forwards the model is as before. The head's own
    weight and bias get no gradient.

    Args:
        overwrite: False leaves a function that the user registered under one of inseq's ids.

    Raises:
        ImportError: inseq is missing or older than 0.7.1. RuntimeError: this inseq has moved what
        is replaced, or changed its arguments. Nothing is changed then.
    """
    version = installed_version("inseq", LEAST)
    from ..step_functions import STEP_SCORES_MAP, functions
    from ..step_functions.core import SCORES as NAMES

    registry = getattr(import_module(SCORES), NAME, None)
    if not isinstance(registry, dict):
        raise _moved(f"{SCORES}.{NAME}", registry, version)
    placed = {name: fn for name, fn in STEP_SCORES_MAP.items() if name not in {*NAMES, *registry}}
    for score in NAMES:
        function, current = getattr(functions, f"{score}_fn"), registry.get(score)
        if current is function:
            continue
        if getattr(current, "__module__", None) == SCORES or current is None:
            if current is None or not set(arguments(current)) <= set(arguments(function)):
                raise _moved(f"{SCORES}'s {score!r}", current, version)
        elif not overwrite:
            continue
        placed[score] = function
    kinds = {}
    for name in KINDS:
        kind = getattr(import_module(MODELS), name, None)
        theirs = getattr(kind, FORWARD, None)
        if theirs is None or theirs is not _their_forwards.get(name, (None, None))[1]:
            if theirs is None or arguments(theirs) != FORWARD_ARGUMENTS:
                raise _moved(f"{MODELS}.{name}.{FORWARD}", theirs, version)
            kinds[name] = kind
    for score, function in placed.items():
        _their_functions[score] = registry.get(score), function
        registry[score] = function
    for name, kind in kinds.items():
        theirs = getattr(kind, FORWARD)
        _their_forwards[name] = theirs, lazily(theirs)
        setattr(kind, FORWARD, _their_forwards[name][1])


def uninstall() -> None:
    """Puts inseq's own functions back, the same objects; changes nothing where ours are not
    there."""
    scores, models = sys.modules.get(SCORES), sys.modules.get(MODELS)
    for score, (theirs, ours) in _their_functions.items():
        if scores is not None and getattr(scores, NAME).get(score) is ours:
            getattr(scores, NAME)[score] = theirs
            if theirs is None:
                del getattr(scores, NAME)[score]
    for name, (theirs, ours) in _their_forwards.items():
        kind = getattr(models, name, None)
        if getattr(kind, FORWARD, None) is ours:
            setattr(kind, FORWARD, theirs)
    _their_functions.clear()
    _their_forwards.clear()
    _heads.clear()


def arguments(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _moved(name: str, value: object, version: str) -> RuntimeError:
    came = f"takes ({', '.join(arguments(value))})" if callable(value) else "is not there"
    return RuntimeError(
        f"{name}, which onepass.integrations.inseq replaces, {came} in inseq {version}: "
        "nothing was changed; use inseq 0.7.1"
    )
