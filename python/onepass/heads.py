"""lazy_head: a model whose output head gives LazyLogits, and nothing else about it changed.

The head's instance gets a `forward` of its own; parameters, names, state_dict, ties, saving and
generation stay. What stands in the way is said before anything is changed.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .lazy_logits import GATHER, LazyLogits, autocasts
from .lazy_probs import LazyProbs
from .ops._check import FLOATS
from .ops._dtensor import is_dtensor, sharded_mesh_dim
from .zero3 import is_released, is_sharded, shape_of

Model = TypeVar("Model", bound=nn.Module)
# by name: the cast and what it was made of, neither kept alive, and how often that was written to
Casts = dict[str, tuple[Callable[[], "Tensor | None"], Callable[[], "Tensor | None"], int]]

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
# What replaces a model's forward or torch's loss, and how to go without.
RIVALS = {
    "axolotl": "switch its cut_cross_entropy, liger and chunked_cross_entropy off",
    "cut_cross_entropy": "load the model without cce_patch",
    "liger_kernel": "load the model without apply_liger_kernel_to_* (use_liger_kernel=False)",
    "trl": "call onepass.lazy_head on a model without add_fused_lm_head",
    "unsloth": "load the model with transformers",
}


class LazyForward:
    """In the place of a linear module's `forward`: hidden states [..., D] to LazyLogits [..., V].

    It knows its module weakly, and reads the parameters when called. What is copied with its module
    (deepcopy, pickle) belongs to the copy.
    """

    def __init__(self, module: nn.Module, options: Mapping[str, Any], former: Any = None) -> None:
        self._module, self._options = weakref.ref(module), options
        self.former = former  # forward of the instance, where it had one: tensor parallelism's
        self._casts: Casts = {}
        self._run = graph_breaking()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._run(self._module, self._options, self._casts, hidden)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyForward:
        module = self._module()
        assert module is not None
        return LazyForward(memo.get(id(module), module), self._options, self.former)

    def __reduce__(self) -> Any:
        return LazyForward, (self._module(), self._options, self.former)

    def belongs_to(self, module: nn.Module) -> bool:
        return self._module() is module


@functools.cache
def graph_breaking() -> Callable[..., Tensor]:
    """`run_head`, where torch.compile breaks the graph, as it then must at what LazyLogits do too.
    Here, since it loads torch._dynamo, a second that `import onepass` does not cost."""
    from torch._dynamo import disable

    for kind in (LazyLogits, LazyProbs):
        handle = kind.__torch_function__.__func__  # type: ignore[attr-defined]
        kind.__torch_function__ = classmethod(disable(handle))  # type: ignore[assignment]
    run: Callable[..., Tensor] = disable(run_head)
    return run


def run_head(
    of: Callable[[], nn.Module | None], options: Mapping[str, Any], casts: Casts, hidden: Tensor
) -> Tensor:
    """A linear module's LazyLogits, cast as torch.nn.functional.linear casts under autocast."""
    module = of()
    if module is None:
        raise RuntimeError("the head of this forward is gone: it was copied without its module")
    weight: Any = module.weight
    bias = getattr(module, "bias", None)
    parts = [t for t in (hidden, weight, bias) if t is not None]
    for name, part in zip(("hidden states", "weight", "bias"), (hidden, weight, bias), strict=True):
        plain = type(part) in (Tensor, nn.Parameter) or (is_dtensor(part) and is_dtensor(weight))
        if part is not None and not plain:
            kind = type(part).__name__
            mend = GATHER if kind == "DTensor" else "call onepass.unlazy_head for this model"
            raise TypeError(f"the head's {name} came as {kind}, not as a plain tensor: {mend}")
    device = hidden.device
    if weight.device != device:
        raise RuntimeError(
            f"the head's weight is on {weight.device}, its hidden states on {device}: torch.nn."
            "DataParallel copies modules without their lazy head; use DistributedDataParallel"
        )
    if autocasts(device) and all(t.dtype != torch.float64 for t in parts):
        dtype = torch.get_autocast_dtype(device.type)
        hidden, weight = hidden.to(dtype), cast_once(casts, "weight", weight, dtype)
        bias = None if bias is None else cast_once(casts, "bias", bias, dtype)
    return LazyLogits(hidden, weight, bias, **options)


def cast_once(casts: Casts, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen parameter in `dtype`: one tensor for as long as something holds it, so that logits
    of two forwards (a teacher's, a student's) are known to have one head."""
    if tensor.dtype == dtype or tensor.requires_grad or torch.is_inference_mode_enabled():
        return tensor.to(dtype)
    if tensor.is_inference():
        return tensor.to(dtype)
    made, source, version = casts.get(name, (lambda: None, lambda: None, -1))
    found = made()
    if found is not None and source() is tensor and version == tensor._version:
        if found.dtype == dtype and not found.is_inference():
            return found
    cast = tensor.to(dtype)
    casts[name] = weakref.ref(cast), weakref.ref(tensor), tensor._version
    return cast


# ---------------------------------------------------------------- where the head is


class Part(NamedTuple):
    """One linear module whose forward is to become lazy."""

    name: str
    module: nn.Module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile, DDP, FSDP1 or DeepSpeed wraps."""
    while True:
        inside = getattr(model, "_modules", {})
        if "_orig_mod" in inside:
            model = inside["_orig_mod"]
        elif type(model).__name__ in WRAPPERS and "module" in inside:
            model = inside["module"]
        else:
            return model


def find_head(model: object, head: nn.Module | str | None) -> tuple[str, nn.Module]:
    """The name and the module of the output head; "" where it is the model. Raises where there is
    none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    kind = type(model).__name__
    if kind == "DataParallel":
        raise ValueError(
            "torch.nn.DataParallel copies modules without their lazy head: pass its .module and "
            "train with DistributedDataParallel"
        )
    if isinstance(head, str):
        try:
            return head, unwrapped(model).get_submodule(head)
        except AttributeError as error:
            raise ValueError(f"head={head!r} names no module of {kind}: {error}") from None
    if head is None:
        find = getattr(unwrapped(model), "get_output_embeddings", None)
        try:
            head = find() if callable(find) else None
        except (AttributeError, NotImplementedError):
            head = None
        if head is None:
            raise ValueError(
                f"{kind} has no output head (get_output_embeddings() gives none): pass head=, a "
                "module or its name"
            )
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"head must be a torch.nn.Module of the model or its name: got {type(head).__name__}"
        )
    for name, module in unwrapped(model).named_modules():
        if module is head:
            return name, head
    raise ValueError(f"head ({type(head).__name__}) is no module of {kind}")


def parts_of(name: str, head: nn.Module) -> list[Part]:
    """The linear modules that a head is made of: itself, or what PEFT wrapped it in. Raises for an
    adapter that is more than a sum of linear terms."""
    inside = head._modules
    copies = inside.get("modules_to_save")
    if "original_module" in inside and copies is not None:
        found = parts_of(f"{name}.original_module", _module(inside["original_module"]))
        for key, copy in copies.named_children():
            found += parts_of(f"{name}.modules_to_save.{key}", copy)
        return found
    if "original_module" in inside:
        raise ValueError(
            f"{name} is wrapped in PEFT's {type(head).__name__}, which changes its weight at every "
            "forward: not fused"
        )
    if "base_layer" not in inside:
        return [Part(name or type(head).__name__, head)]
    variants = sorted({type(v).__name__ for v in getattr(head, "lora_variant", {}).values()})
    ups = inside.get("lora_B")
    if ups is None or variants:
        kind = ", ".join(variants) or type(head).__module__.split(".")[-2]
        raise ValueError(
            f"{name} has an adapter of kind {kind}, which is no sum of linear terms: use plain "
            "LoRA on the head, or leave the head out of target_modules"
        )
    found = parts_of(f"{name}.base_layer", _module(inside["base_layer"]))
    return found + [Part(f"{name}.lora_B.{key}", up) for key, up in ups.named_children()]


def _module(found: nn.Module | None) -> nn.Module:
    assert found is not None
    return found


# ---------------------------------------------------------------- what stands in its way


def is_lazy(module: nn.Module) -> bool:
    return slot_of(module) is not None


def slot_of(module: nn.Module) -> str | None:
    """The attribute that holds the module's LazyForward."""
    for slot in ("forward", "_old_forward"):
        if isinstance(module.__dict__.get(slot), LazyForward):
            return slot
    return None


def obstacle(part: Part, managed: bool) -> str:
    """Why a module cannot give LazyLogits; empty where it can. `managed`: FSDP2 makes its weight
    whole when it is called."""
    module = part.module
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if type(module).__module__.split(".")[0] in ("bitsandbytes", "awq", "gptqmodel", "torchao"):
        return f"is quantised ({type(module).__module__}.{kind}): its weight is no plain matrix"
    if not isinstance(weight, Tensor):
        quantised = "quantized" in type(module).__module__ or hasattr(module, "qweight")
        return f"is quantised ({kind})" if quantised else f"({kind}) has no weight [V, D]"
    kind_of_weight = type(weight).__name__
    if is_dtensor(weight):
        try:
            if not managed:
                sharded_mesh_dim("it", weight, 0)
        except ValueError as error:
            return f"has a weight sharded as DTensor: {error}"
        return not_its_own(module) or not_linear(module, weight)
    if weight.is_quantized or weight.dtype not in FLOATS:
        return f"is quantised ({weight.dtype} {kind_of_weight}): float32, bfloat16, float16 needed"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"has a weight of type {kind_of_weight}, not a plain tensor (quantised or sharded?)"
    shape = shape_of(weight)
    if len(shape) != 2 or not shape.numel():
        sharded = "; FSDP1 shards it: call lazy_head before wrapping" if len(shape) == 1 else ""
        return f"has a weight of shape {tuple(shape)}, not [V, D]{sharded}"
    return not_its_own(module) or not_linear(module, weight)


def is_tensor_parallel(forward: Any) -> bool:
    """Whether it is what transformers' tensor parallelism puts around a module's own."""
    return forward is not None and origin(forward).startswith("transformers.distributed.")


def not_its_own(module: nn.Module) -> str:
    """Why a module's forward cannot be replaced; empty where it can."""
    hook = module.__dict__.get("_hf_hook")
    if any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ()))):
        return "is offloaded by accelerate, which takes its weight away after the forward"
    of_instance = module.__dict__.get("_old_forward" if hook is not None else "forward")
    if isinstance(of_instance, (LazyForward, type(None))) or is_tensor_parallel(of_instance):
        return ""
    if getattr(of_instance, "__func__", None) is not type(module).forward:
        return f"has a forward of its own already, from {origin(of_instance)}: undo that first"
    return ""


def not_linear(module: nn.Module, weight: Tensor) -> str:
    """Why a module is not x W^T + b, by trying it on one row; empty where it is."""
    kind = type(module)
    own = kind.forward
    if own is nn.Linear.forward or is_dtensor(weight) or weight.is_meta or is_released(weight):
        return "" if own is nn.Linear.forward else f"({kind.__name__}) is not torch.nn.Linear"
    row = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad(), torch.random.fork_rng(_gpus(weight)):
        try:
            got = own(module, row)
            wanted = functional.linear(row, weight, getattr(module, "bias", None))
            tolerance = 1e-5 if weight.dtype.itemsize >= 4 else 2e-2
            size = float(wanted.abs().max())
            same = got.shape == wanted.shape and torch.allclose(
                got.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance * size
            )
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            return f"({kind.__name__}) is not x @ weight.T + bias: {str(error).splitlines()[0]}"
    return "" if same else f"({kind.__name__}) does more than x @ weight.T + bias"


def _gpus(tensor: Tensor) -> list[Any]:
    return [tensor.device] if tensor.device.type == "cuda" else []


def origin(function: Any) -> str:
    """The module where a function was written, whatever functools.wraps says."""
    plain = getattr(function, "__func__", function)
    found = getattr(plain, "__globals__", {}).get("__name__")
    return str(found or getattr(function, "__module__", None) or type(function).__module__)


def layers_of(function: Any) -> Iterator[Any]:
    """A function, what it wraps, what that wraps ..."""
    found, seen = [function], set()
    while found:
        layer = found.pop()
        if id(layer) not in seen:
            yield layer
        seen.add(id(layer))
        inner = (getattr(layer, name, None) for name in ("func", "__wrapped__"))
        found += [each for each in inner if callable(each) and id(each) not in seen]


def bypass(model: nn.Module, name: str) -> str:
    """What keeps the model from calling its head, or its loss from being torch's, as far as names
    tell; empty where nothing does."""
    model = unwrapped(model)
    above = ["", *(name[:at] for at, letter in enumerate(name) if letter == ".")]
    for path in above:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        of_instance = module.__dict__.get("forward")
        kind = type(module).__name__
        places = [(f"{kind}.forward", f) for f in (of_instance, type(module).forward) if f]
        places.append((f"{kind}.loss_function", getattr(module, "_loss_function", None)))
        for place, function in places:
            rival = rival_of(function)
            if rival:
                return f"{place} is {rival}'s, which does without the head: {RIVALS[rival]}"
    rival = rival_of(functional.cross_entropy)
    if rival:
        return f"torch.nn.functional.cross_entropy is {rival}'s: {RIVALS[rival]}"
    return ""


def rival_of(function: Any) -> str:
    for layer in layers_of(function):
        package = origin(layer).split(".")[0]
        for rival in RIVALS:
            if package == rival or package.startswith(f"{rival}_"):
                return rival
    return ""


def managed_by_fsdp2(model: nn.Module, name: str) -> bool:
    above = ["", *(name[:at] for at, letter in enumerate(name) if letter == "."), name]
    model = unwrapped(model)
    kinds = (type(model.get_submodule(path)) for path in above)
    return any(base.__name__ == "FSDPModule" for kind in kinds for base in kind.__mro__)


# ---------------------------------------------------------------- on, off, how it stands


def lazy_head(
    model: Model,
    head: nn.Module | str | None = None,
    *,
    max_slab_bytes: int | None = None,
    compact: bool = True,
    mode: str = "auto",
) -> Model:
    """The model itself, whose output head gives `LazyLogits` in the place of logits from now on.

    The model's own forward and loss, `transformers.Trainer`, PEFT, accelerate and a loop of one's
    own then run as before and never make the logits in training. Only the `forward` of the head's
    instance changes (with LoRA on the head: those of its base layer and of each lora_B):
    parameters, their names, ties, state_dict, saving and `generate` stay. `unlazy_head` undoes it;
    `lazy_head_within` undoes it by itself; `report` says how it stands.

    Args:
        model: a transformers model, a PEFT model, or any module; also inside torch.compile,
            DistributedDataParallel or FSDP2.
        head: the head, or its name, where `model.get_output_embeddings()` does not give it.
        max_slab_bytes, compact, mode: those of `LazyLogits` (docs/head.md).

    Raises:
        ValueError: no head; a head that is lazy already, quantised, sharded, or no linear map; a
            model whose forward another package replaced. Nothing has been changed then.
        TypeError: not a module.
    """
    name, top = find_head(model, head)
    parts = parts_of(name, top)
    if all(is_lazy(part.module) for part in parts):
        raise ValueError(f"{parts[0].name} is lazy already: onepass.unlazy_head(model) undoes it")
    managed = managed_by_fsdp2(model, name)
    for part in parts:
        why_not = obstacle(part, managed)
        if why_not:
            raise ValueError(f"{part.name} {why_not}; nothing was changed")
    why_not = bypass(model, name)
    if why_not:
        raise ValueError(f"{why_not}; nothing was changed")
    options = {"max_slab_bytes": max_slab_bytes, "compact": compact, "mode": mode}
    changed = [part.module for part in parts if not is_lazy(part.module)]
    for module in changed:
        switch_on(module, options)
    try:
        probe(parts[0].name, top, parts[0].module)
    except BaseException:
        for module in changed:
            switch_off(module)
        raise
    return model


def switch_on(module: nn.Module, options: Mapping[str, Any]) -> None:
    # accelerate's hooks stand in `forward` and call `_old_forward`.
    slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    found = module.__dict__.get("forward")
    former = found if slot == "forward" and is_tensor_parallel(found) else None
    setattr(module, slot, LazyForward(module, options, former))


def switch_off(module: nn.Module) -> None:
    slot = slot_of(module)
    if slot == "forward":
        former = module.__dict__[slot].former
        del module.forward
        if former is not None:
            module.forward = former
    elif slot is not None:
        setattr(module, slot, type(module).forward.__get__(module))


def probe(name: str, head: nn.Module, first: nn.Module) -> None:
    """One row through the head must come back lazy. Raises where it does not."""
    weight = first.weight
    assert isinstance(weight, Tensor)
    if is_dtensor(weight) or is_sharded(weight) or weight.is_meta:
        return  # a row would need all ranks; or is not there yet
    row = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad(), torch.random.fork_rng(_gpus(weight)):
        got = head(row)
    if not isinstance(got, LazyLogits):
        place = f"{type(head).__module__}.{type(head).__name__}"
        hooks = ", or one of its forward hooks," if head._forward_hooks else ""
        raise ValueError(
            f"{name} gives {type(got).__name__} for a row, not LazyLogits: {place}{hooks} goes "
            "past it; nothing was changed"
        )


def unlazy_head(model: Model) -> Model:
    """The model itself, with the forwards that `lazy_head` replaced put back everywhere in it.

    Raises:
        ValueError: no head of it is lazy. TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    lazy = [module for module in model.modules() if is_lazy(module)]
    if not lazy:
        raise ValueError(
            f"no head of {type(model).__name__} is lazy: onepass.lazy_head makes it so"
        )
    for module in lazy:
        switch_off(module)
    return model


@contextlib.contextmanager
def lazy_head_within(
    model: Model, head: nn.Module | str | None = None, **options: Any
) -> Iterator[Model]:
    """`lazy_head` for the length of a with block: `with onepass.lazy_head_within(model): ...`.

    Arguments as of `lazy_head`. Raises as it does, for a model that is lazy already too.
    """
    lazy_head(model, head, **options)
    try:
        yield model
    finally:
        if any(is_lazy(module) for module in model.modules()):
            unlazy_head(model)


@dataclass(frozen=True)
class HeadState:
    """One part of a head: its name, whether it is fused, and what there is to say."""

    name: str
    fused: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {'fused' if self.fused else 'not fused'}, {self.why}"


@dataclass(frozen=True, repr=False)
class Report:
    """How a model's heads stand, one line each; `fused` where all of them are."""

    model: str
    heads: tuple[HeadState, ...]

    @property
    def fused(self) -> bool:
        return all(state.fused for state in self.heads)

    def __repr__(self) -> str:
        return "\n".join(f"{self.model}: {state}" for state in self.heads)


def report(model: nn.Module, head: nn.Module | str | None = None) -> Report:
    """Whether each part of a model's head gives LazyLogits, or why not; printed, a line each.

    Changes nothing and runs nothing. Arguments as of `lazy_head`.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    kind = type(unwrapped(model)).__name__
    try:
        name, top = find_head(model, head)
        parts = parts_of(name, top)
    except ValueError as error:
        modules = unwrapped(model).named_modules()
        parts = [Part(name, module) for name, module in modules if is_lazy(module)]
        if not parts or head is not None:
            return Report(kind, (HeadState("head", False, str(error)),))
        name = parts[0].name
    past = bypass(model, name)
    managed = managed_by_fsdp2(model, name)
    return Report(kind, tuple(state_of(part, past, managed, model) for part in parts))


def state_of(part: Part, past: str, managed: bool, model: nn.Module) -> HeadState:
    slot = slot_of(part.module)
    why_not = obstacle(part, managed) or past
    if not why_not and slot is None:
        other = part.module.__dict__.get("forward")
        why_not = f"its forward is {origin(other)}'s" if other else "onepass.lazy_head makes it so"
    elif slot is not None and not part.module.__dict__[slot].belongs_to(part.module):
        why_not = "its forward is another module's (a shallow copy?): call onepass.unlazy_head"
    if why_not:
        return HeadState(part.name, False, why_not)
    weight = part.module.weight
    assert isinstance(weight, Tensor)
    said = f"weight {list(shape_of(weight))} {str(weight.dtype).removeprefix('torch.')}"
    if is_dtensor(weight) and not managed and sharded_mesh_dim("it", weight, 0) is not None:
        said += " in shards of its vocabulary"
    ties = [
        name
        for name, tensor in unwrapped(model).named_parameters(remove_duplicate=False)
        if tensor is weight and name != f"{part.name}.weight"
    ]
    return HeadState(part.name, True, f"{said} tied to {ties[0]}" if ties else said)
