"""What a system needs of any transformers model: its blocks, hidden states, head and modes.

Forward hooks keep the layers that are asked for and no others. Models run through their own
wrappers (PEFT, DDP, FSDP).
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import is_lazy, lazy_head, lazy_head_within, unwrapped

logger = logging.getLogger("onepass")


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks of a model, in order.

    Those in its attribute `blocks` or `unregistered_blocks` (Infinity, which has the second alone
    where it runs them in chunks), else the outermost list of as many modules as its config has
    layers.

    Raises:
        ValueError: none found.
    """
    return _home_of_blocks(model)[2]


def _home_of_blocks(model: nn.Module) -> tuple[Any, str, Any]:
    """The module that runs the blocks, its attribute for them, and the blocks."""
    inner = without_adapter(model)
    for name in ("blocks", "unregistered_blocks"):
        if len(getattr(inner, name, ())):
            return inner, name, getattr(inner, name)
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    n_layers = getattr(config, "num_hidden_layers", None)
    for path, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            home, _, name = path.rpartition(".")
            return inner.get_submodule(home), name, module
    raise ValueError(
        f"no transformer blocks found in {type(inner).__name__}: wanted a list of modules `blocks`,"
        " or one as long as config.num_hidden_layers"
    )


def without_adapter(model: nn.Module) -> Any:
    """The model inside wrappers of training and of PEFT."""
    inner: Any = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def check_language_model(model: object) -> None:
    """Raises for what cannot say the next token, as far as a model tells.

    Raises:
        TypeError: not a model. ValueError: one without a language-model head, or whose attention
        sees what comes after a token.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    inner = without_adapter(model)
    kind = type(inner).__name__
    if getattr(inner, "get_output_embeddings", lambda: inner)() is None:
        raise ValueError(
            f"{kind} has no language-model head: wanted one as AutoModelForCausalLM loads it"
        )
    seen = {m.is_causal for m in inner.modules() if hasattr(m, "is_causal")}
    sees_all = seen == {False} or (not seen and kind.endswith("ForMaskedLM"))
    if sees_all and not hasattr(getattr(inner, "config", None), "vision_config"):
        raise ValueError(f"{kind} sees what comes after a token: wanted a causal model")


def make_lazy(model: nn.Module) -> None:
    """Let the head make no logits; where it cannot, a line that says why they are made."""
    base = without_adapter(model)
    if any(is_lazy(module) for module in base.modules()):
        return
    try:
        lazy_head(base)
    except (ValueError, RuntimeError, TypeError) as error:
        logger.warning("training with whole logits: %s", error)


@contextlib.contextmanager
def lazy_within(model: nn.Module, doing: str | None, **options: Any) -> Iterator[None]:
    """No logits inside where the head can be fused, else a line that says why they are made, unless
    `doing` is None. `options` as of `lazy_head`, for a head that is not lazy yet."""
    base = without_adapter(model)
    with contextlib.ExitStack() as stack:
        if not any(is_lazy(module) for module in base.modules()):
            try:
                stack.enter_context(lazy_head_within(base, **options))
            except (ValueError, RuntimeError, TypeError) as error:
                if doing is not None:
                    logger.warning("%s with whole logits: %s", doing, error)
        yield


@contextlib.contextmanager
def only_blocks(model: nn.Module, n_blocks: int) -> Iterator[None]:
    """Let a model end after its first `n_blocks` blocks; undone after.

    What follows the blocks (the final norm) runs on the last of them. A model that keeps its blocks
    in chunks runs whole.
    """
    home, name, blocks = _home_of_blocks(model)
    if n_blocks >= len(blocks) or hasattr(home, "block_chunks"):
        yield
        return
    config: Any = getattr(home, "config", None)
    n_layers = getattr(config, "num_hidden_layers", None)
    setattr(home, name, blocks[:n_blocks])
    if n_layers is not None:
        config.num_hidden_layers = n_blocks
    try:
        yield
    finally:
        setattr(home, name, blocks)
        if n_layers is not None:
            config.num_hidden_layers = n_layers


@contextlib.contextmanager
def capture(
    model: nn.Module, layers: Sequence[int], convention: str, final: int | None = None
) -> Iterator[dict[int, Any]]:
    """Hidden states of `layers` by number, once the model has run inside.

    "hf_hidden_states" counts as transformers does: 0 are the embeddings, l the output of l blocks,
    `final` (where None, all blocks) what follows the last norm. "block" counts blocks from 0; a
    block's own `get_hidden_states()` or tensor `output_hidden_states`, where it has one, is its
    hidden state.
    """
    home, _, blocks = _home_of_blocks(model)
    final = len(blocks) if final is None else final
    found: dict[int, Any] = {}

    # Kept once: a recomputation in the backward is not another forward.
    def keep_input(layer: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(layer, args[0] if args else kwargs["hidden_states"])

        return keep

    def keep_output(layer: int) -> Callable[..., None]:
        def keep(block: nn.Module, _: object, output: Any) -> None:
            if convention == "block":
                output = told_by(block, output)
            found.setdefault(layer, output if isinstance(output, Tensor) else output[0])

        return keep

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            if convention == "hf_hidden_states" and layer == 0:
                hook = blocks[0].register_forward_pre_hook(keep_input(layer), with_kwargs=True)
            elif convention == "hf_hidden_states" and layer == final:
                hook = home.register_forward_hook(keep_output(layer))
            else:
                block = blocks[layer - (convention == "hf_hidden_states")]
                hook = block.register_forward_hook(keep_output(layer))
            hooks.callback(hook.remove)
        yield found
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise RuntimeError(
            f"the model ran without calling its blocks for layers {missing}: hidden states are"
            " taken by forward hooks on them (a compiled model runs none that come later)"
        )


def told_by(block: Any, output: Any) -> Any:
    """The hidden state that a block offers by itself, else its output."""
    if callable(getattr(block, "get_hidden_states", None)):
        return block.get_hidden_states()
    own = getattr(block, "output_hidden_states", None)
    return own if isinstance(own, Tensor) else output


@contextlib.contextmanager
def no_logits(model: nn.Module) -> Iterator[None]:
    """Let the head of a language model, or the `head` of an image model, return logits of no
    vocabulary; undone after."""
    inner = without_adapter(model)
    if hasattr(inner, "get_output_embeddings"):
        head = inner.get_output_embeddings()
    else:
        head = getattr(inner, "head", None)
    if not isinstance(head, nn.Module):
        yield
        return
    before = vars(head).get("forward")
    head.forward = lambda hidden, *_, **__: hidden[..., :0]
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


@contextlib.contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """model.train(training) inside; each module's own mode after."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextlib.contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Leave the random state as it was: what runs inside takes no draw from the training's."""
    python_state = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """A model of PEFT's, or the one that PEFT has put its layers into, without its adapter inside;
    with it, and its weights trained as before, after.

    Raises:
        ValueError: the model has none.
    """
    inner: Any = unwrapped(model)
    if not has_adapter(model):
        raise ValueError(f"{type(inner).__name__} has no PEFT adapter to switch off")
    # PEFT turns the gradients of all adapter weights on as it leaves, whatever they were.
    trained = {p: p.requires_grad for p in inner.parameters()}
    try:
        with contextlib.ExitStack() as stack:
            if hasattr(inner, "disable_adapter"):
                stack.enter_context(inner.disable_adapter())
            else:
                for layer in _layers_of_adapter(inner):
                    if not layer.disable_adapters:
                        layer.enable_adapters(False)
                        stack.callback(layer.enable_adapters, True)
            yield
    finally:
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def has_adapter(model: nn.Module) -> bool:
    """Whether there is an adapter of PEFT's to switch off."""
    inner = unwrapped(model)
    return hasattr(inner, "disable_adapter") or bool(_layers_of_adapter(inner))


def trained_beside_adapter(model: nn.Module) -> str | None:
    """The name of a trained parameter that PEFT's switch does not turn off; None where there is
    none."""
    own = {
        id(parameter)
        for layer in _layers_of_adapter(model)
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    }
    trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return next((name for name, parameter in trained if id(parameter) not in own), None)


def _layers_of_adapter(model: nn.Module) -> list[Any]:
    """PEFT's layers tell whether they are off by a property; transformers' models have a method of
    that name."""
    name = "disable_adapters"
    return [m for m in model.modules() if isinstance(getattr(type(m), name, None), property)]
