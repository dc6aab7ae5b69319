"""A frozen language model with a classifier head on its pooled hidden states, and its training.

The model never makes logits, and where representations are cached it reads each text once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.generation import padding_of
from ..training.hidden_states import blocks_of, capture, no_logits, training_mode
from ..training.token_texts import quoted
from .forward import places_of
from .heads import ClassificationHead, ClassifierHead, check_fits, class_logps, hidden_size_of

logger = logging.getLogger("onepass")
TYPES = ("Multiclass", "Binary")
ENCODED_AT_ONCE = 32  # texts
Told = Callable[[int], object]  # how many texts more are encoded


@dataclass
class HyperParams:
    """PPLM.jl's settings of a training, with its defaults, as `train_discriminator` takes them in
    place of its own arguments.

    eos_token is put before each text and pad_token after the shorter ones, where they are masked;
    where None they are the tokenizer's. PPLM.jl has 50527 and 0, and takes 0 for padding wherever
    it stands. embed_size is checked against the model where it is not None. target_class is the
    class that is steered to unless another one is named.
    """

    batchsize: int = 8
    eos_token: int | None = None
    pad_token: int | None = None
    embed_size: int | None = None
    classification_type: str = "Binary"
    target_class: int = 1
    num_classes: int = 2
    cached: bool = True
    lr: float = 1e-6
    epochs: int = 20
    log_interval: int = 100

    def check(self) -> None:
        """ValueError for what cannot be."""
        if self.classification_type not in TYPES:
            wanted = " or ".join(TYPES)
            raise ValueError(
                f"classification_type must be {wanted}: got {self.classification_type!r}"
            )
        for name in ("batchsize", "epochs", "log_interval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1: got {value!r}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be above 0: got {self.lr}")
        if self.classification_type == "Binary" and self.num_classes != 2:
            raise ValueError(f"num_classes must be 2 for Binary: got {self.num_classes}")


class Report(NamedTuple):
    """What a training brought."""

    history: list[dict[str, Any]]  # an epoch: step, epoch, loss, held_out_loss, held_out_accuracy
    accuracy: float | None  # on the held-out texts; None where there are none
    confusion: Tensor  # [C, C] int64, held-out texts by class (rows) and predicted class
    n_train: int
    n_held_out: int


class DiscriminatorV2(nn.Module):
    """A head on the mean over the tokens of a model's last hidden states, as Uber trains it.

    Args:
        cl_head: a ClassificationHead of the model's hidden size.
        model: a causal language model; it is not trained, nor moved or saved with this module.
        embed_size: that of the head.

    Attributes:
        metadata: what `save_discriminator` keeps with the head.
        report: of the training, or None.
    """

    pool = "mean"

    def __init__(
        self, cl_head: ClassificationHead, model: nn.Module, embed_size: int | None = None
    ) -> None:
        super().__init__()
        check_fits(cl_head, model)
        self.embed_size = cl_head.embed_size if embed_size is None else embed_size
        if self.embed_size != cl_head.embed_size:
            raise ValueError(
                f"embed_size={embed_size}, but the head reads {cl_head.embed_size} numbers"
            )
        self.cl_head = cl_head
        self._model = (model,)  # not a submodule
        self.metadata: dict[str, Any] = {"pool": self.pool}
        self.report: Report | None = None

    @property
    def model(self) -> nn.Module:
        """The encoder."""
        return self._model[0]

    def avg_representation(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """fp32 [B, D] of ids [B, S]: the hidden states pooled over the tokens that `mask` [B, S]
        counts (all where None). No gradient."""
        return pooled(self.model, input_ids, mask, self.pool)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, cached: bool = False) -> Tensor:
        """Logits [B, C] of ids [B, S], or where `cached` of representations [B, D]."""
        logits: Tensor = self.cl_head(x if cached else self.avg_representation(x, mask))
        return logits

    @torch.no_grad()
    def predict(self, texts: Sequence[str], tokenizer: Any, **how: Any) -> Tensor:
        """Probabilities [N, max(C, 2)] of the classes of each text; `how` as `representations`."""
        x = representations(self.model, tokenizer, texts, pool=self.pool, **how)
        weight = self.cl_head.mlp.weight
        return class_logps(self(x.to(weight.device), cached=True)).exp().float().cpu()


class DiscriminatorV1(DiscriminatorV2):
    """A head on the sum over the tokens, PPLM.jl's first version. Without a mask what is padded is
    summed too, as there."""

    pool = "sum"


def get_discriminator(
    model: nn.Module,
    *,
    load_from_pretrained: bool = False,
    discrim: str | None = None,
    file_name: str | None = None,
    path: str | Path | None = None,
    version: int | None = None,
    class_size: int = 1,
    embed_size: int | None = None,
) -> DiscriminatorV2:
    """A discriminator on `model`, of random weights or of a file; see `ClassifierHead`.

    Args:
        version: 1 pools by the sum, 2 by the mean; where None, as the file says, else 2.
        embed_size: where None, the model's.
    """
    if version not in (None, 1, 2):
        raise ValueError(f"version must be 1 or 2: got {version!r}")
    head, meta = ClassifierHead(
        class_size,
        hidden_size_of(model) if embed_size is None else embed_size,
        load_from_pretrained=load_from_pretrained,
        discrim=discrim,
        file_name=file_name,
        path=path,
    )
    check_fits(head, model, meta)
    pool = (meta or {}).get("pool") if version is None else {1: "sum", 2: "mean"}[version]
    made = (DiscriminatorV1 if pool == "sum" else DiscriminatorV2)(head, model)
    made.metadata = (meta or {}) | made.metadata
    return made


# -- representations ----------------------------------------------------------------------------


@torch.no_grad()
def pooled(
    model: nn.Module, input_ids: Tensor, mask: Tensor | None = None, pool: str = "mean"
) -> Tensor:
    """fp32 [B, D]: the last hidden states (after the final norm) of ids [B, S], their mean or sum
    over the tokens that `mask` counts. The model runs without its head, in eval mode."""
    last = len(blocks_of(model))
    with (
        training_mode(model, False),
        no_logits(model),
        capture(model, [last], "hf_hidden_states") as found,
    ):
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    hidden = found[last].float()
    if mask is None:
        return hidden.mean(1) if pool == "mean" else hidden.sum(1)
    counts = mask.to(hidden.dtype).unsqueeze(-1)
    # not times 0: what stands at padding may be anything
    total = hidden.masked_fill(counts == 0, 0.0).sum(1)
    return total / counts.sum(1).clamp(min=1) if pool == "mean" else total


def token_ids(
    tokenizer: Any,
    texts: Sequence[str],
    model: nn.Module,
    *,
    max_length: int | None = 256,
    eos_token: int | None = None,
    name: str = "text",
) -> list[list[int]]:
    """Ids of each text after the token that generation begins with: `eos_token`, or where None the
    tokenizer's BOS or else EOS token, if it has one. What is beyond `max_length` (None: nothing)
    is left out.

    Raises:
        ValueError: an empty text, by its number from 1, or one longer than the model takes.
    """
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise TypeError(f"{name} {number}: got {type(text).__name__}, wanted a string")
        if not text.strip():
            raise ValueError(f"{name} {number}: is empty")
    starts = (eos_token, tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = [int(token) for token in starts if token is not None][:1]
    most = places_of(model)
    found, n_cut = [], 0
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    for number, own in enumerate(encoded, 1):
        ids = (start if list(own[:1]) != start else []) + list(own)
        if max_length is not None:
            at_most = min(max_length, most or max_length)
            n_cut += len(ids) > at_most
            ids = ids[:at_most]
        elif most is not None and len(ids) > most:
            raise ValueError(f"{name} {number}: {len(ids)} tokens, the model takes {most}")
        if not ids:
            raise ValueError(f"{name} {number}: has no tokens: {quoted(texts[number - 1])}")
        found.append(ids)
    if n_cut:
        told = "%d of %d texts have more than %d tokens and lose their end"
        logger.warning(told, n_cut, len(found), at_most)
    return found


def representations(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pool: str = "mean",
    max_length: int | None = 256,
    eos_token: int | None = None,
    batch_size: int = ENCODED_AT_ONCE,
    told: Told = lambda n: None,
) -> Tensor:
    """fp32 [N, D] on the CPU: `pooled` of each text, those of like length together."""
    ids = token_ids(tokenizer, texts, model, max_length=max_length, eos_token=eos_token)
    return _encode(model, ids, padding_of(tokenizer), pool, batch_size, told)


def _encode(
    model: nn.Module,
    ids: Sequence[Sequence[int]],
    padding: int,
    pool: str,
    batch_size: int = ENCODED_AT_ONCE,
    told: Told = lambda n: None,
) -> Tensor:
    inner: Any = model
    out = torch.empty(len(ids), hidden_size_of(model))
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        longest = len(ids[rows[-1]])
        batch = torch.tensor([[*ids[n], *[padding] * (longest - len(ids[n]))] for n in rows])
        lengths = torch.tensor([len(ids[n]) for n in rows])
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        batch, mask = batch.to(inner.device), mask.to(inner.device)
        out[rows] = pooled(model, batch, mask, pool).cpu()
        told(len(rows))
    return out


# -- training -----------------------------------------------------------------------------------


def train_discriminator(
    text: Sequence[str],
    labels: Sequence[int] | Sequence[str],
    batchsize: int = 64,
    classification_type: str = "Multiclass",
    num_classes: int | None = None,
    *,
    model: Any = "gpt2",
    cached: bool = True,
    discrim: DiscriminatorV2 | None = None,
    tokenizer: Any = None,
    truncate: bool = True,
    max_length: int = 256,
    train_size: float = 0.9,
    lr: float = 1e-4,
    epochs: int = 10,
    args: HyperParams | None = None,
    held_out: tuple[Sequence[str], Sequence[int] | Sequence[str]] | None = None,
    version: int = 2,
    seed: int = 0,
    told: Told = lambda n: None,
) -> DiscriminatorV2:
    """Train a head on a frozen language model, with Adam on the cross-entropy of the classes.

    Args:
        text, labels: N texts and their classes: names, or numbers from 0.
        batchsize, lr, epochs: by default Uber's (run_pplm_discrim_train.py).
        classification_type: "Multiclass", a logit a class; "Binary", one logit for two classes
            (PPLM.jl's default).
        num_classes: of labels that are numbers; where None, the largest plus one.
        model: a causal language model of transformers, with `tokenizer`, or its name or folder.
        cached: run the model once a text; else once an epoch, which gives the same and takes less
            memory.
        discrim: one to go on with; by default one of random weights.
        truncate, max_length: leave out the tokens of a text beyond so many.
        train_size: the share trained on, of each class; the rest is held out.
        args: PPLM.jl's settings in place of batchsize, classification_type, num_classes, cached,
            lr and epochs.
        held_out: other texts and labels to measure on; then all of `text` is trained on.
        version: of the discriminator that is made, see `get_discriminator`.
        seed: of the weights, the split and the order.
        told: called with the number of texts encoded since the last call.

    Returns: the discriminator, with `report` and with the classes in `metadata`. The model's
    weights, modes and requires_grad are as before.

    Raises:
        ValueError: no texts, fewer labels or more, an empty text, one class only, a label that is
            none, nothing left to train on.
    """
    given = (
        args
        if args is not None
        else HyperParams(
            batchsize=batchsize,
            classification_type=classification_type,
            num_classes=2,
            cached=cached,
            lr=lr,
            epochs=epochs,
            target_class=0,
        )
    )
    given.check()
    asked = num_classes if args is None else given.num_classes
    classes, y = numbered(text, labels, asked)
    n_classes = len(classes)
    if given.classification_type == "Binary" and n_classes != 2:
        raise ValueError(f"classification_type Binary: got {n_classes} classes, wanted 2")
    if not 0 <= given.target_class < n_classes:
        raise ValueError(f"target_class is {given.target_class}, of {n_classes} classes from 0 on")
    generator = torch.Generator().manual_seed(seed)
    if held_out is None:
        train, test = _split(y, train_size, generator)
        texts = list(text)
    else:
        other, other_y = numbered(*held_out, n_classes, known=classes)
        train, test = torch.arange(len(y)), torch.arange(len(y), len(y) + len(other_y))
        texts, y = [*text, *held_out[0]], torch.cat([y, other_y])
    if isinstance(model, str | Path):
        model, tokenizer = _loaded(str(model), tokenizer)
    elif tokenizer is None:
        raise ValueError("tokenizer: got none, wanted that of the model")
    if given.embed_size not in (None, hidden_size_of(model)):
        size = hidden_size_of(model)
        raise ValueError(f"embed_size is {given.embed_size}, but the model's states have {size}")
    if discrim is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = 1 if given.classification_type == "Binary" else n_classes
            discrim = get_discriminator(model, version=version, class_size=size)
        discrim.cl_head.to(model.device)
    if max(discrim.cl_head.class_size, 2) != n_classes:
        raise ValueError(
            f"discrim has {discrim.cl_head.class_size} classes, the labels {n_classes}"
        )
    ids = token_ids(
        tokenizer,
        texts,
        model,
        max_length=max_length if truncate else None,
        eos_token=given.eos_token,
    )
    padding = padding_of(tokenizer) if given.pad_token is None else given.pad_token
    pool = discrim.pool
    cache = _encode(model, ids, padding, pool, told=told) if given.cached else None

    def features(rows: Tensor) -> Tensor:
        if cache is not None:
            return cache[rows]
        return _encode(model, [ids[n] for n in rows.tolist()], padding, pool)

    history = _fit(discrim.cl_head, features, y, train, test, given, generator)
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for rows in test.split(given.batchsize):
        predicted = _logps(discrim.cl_head, features(rows)).argmax(-1)
        pairs = (y[rows], predicted)
        confusion.index_put_(pairs, torch.ones_like(predicted), accumulate=True)
    discrim.report = Report(
        history=history,
        accuracy=int(confusion.trace()) / len(test) if len(test) else None,
        confusion=confusion,
        n_train=len(train),
        n_held_out=len(test),
    )
    discrim.metadata |= {
        "class_vocab": {word: number for number, word in enumerate(classes)},
        "default_class": given.target_class,
        "pretrained_model": getattr(model.config, "name_or_path", None) or None,
    }
    return discrim


def _fit(
    head: ClassificationHead,
    features: Callable[[Tensor], Tensor],
    y: Tensor,
    train: Tensor,
    test: Tensor,
    asked: HyperParams,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Train; returns what each epoch came to, epoch 0 being the head as it was."""
    weight = head.mlp.weight
    optimizer = torch.optim.Adam(head.requires_grad_(True).parameters(), lr=asked.lr)
    measured = _held_out(head, features, y, test, asked)
    history: list[dict[str, Any]] = [{"step": 0, "epoch": 0, "loss": None} | measured]
    step = 0
    for epoch in range(1, asked.epochs + 1):
        total = 0.0
        order = train[torch.randperm(len(train), generator=generator)]
        for rows in order.split(asked.batchsize):
            logps = class_logps(head(features(rows).to(weight.device)))
            loss = F.nll_loss(logps, y[rows].to(weight.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total += loss.item() * len(rows)
            if step % asked.log_interval == 0:
                logger.info("epoch %d, step %d: loss %.4f", epoch, step, loss.item())
        measured = _held_out(head, features, y, test, asked)
        history.append({"step": step, "epoch": epoch, "loss": total / len(train)} | measured)
    optimizer.zero_grad()
    return history


def _held_out(
    head: ClassificationHead,
    features: Callable[[Tensor], Tensor],
    y: Tensor,
    test: Tensor,
    asked: HyperParams,
) -> dict[str, float]:
    """Mean loss and accuracy on the held-out texts; nothing where there are none."""
    if not len(test):
        return {}
    loss, n_right = 0.0, 0
    for rows in test.split(asked.batchsize):
        logps = _logps(head, features(rows))
        loss += F.nll_loss(logps, y[rows], reduction="sum").item()
        n_right += int((logps.argmax(-1) == y[rows]).sum())
    return {"held_out_loss": loss / len(test), "held_out_accuracy": n_right / len(test)}


@torch.no_grad()
def _logps(head: ClassificationHead, x: Tensor) -> Tensor:
    return class_logps(head(x.to(head.mlp.weight.device))).float().cpu()


def numbered(
    text: Sequence[str],
    labels: Sequence[Any],
    num_classes: int | None = None,
    known: Sequence[str] | None = None,
) -> tuple[list[str], Tensor]:
    """(names of the classes, the class of each text [N] int64). Labels that are names are numbered
    by the alphabet (those that are digits by their value), or as `known` has them.

    Raises:
        ValueError: see `train_discriminator`.
    """
    if isinstance(text, str) or len(text) != len(labels) or not len(text):
        told = "one string" if isinstance(text, str) else f"{len(text)} texts"
        raise ValueError(
            f"got {told} and {len(labels)} labels, wanted a label for each of the texts"
        )
    found: list[Any] = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    kinds = {type(label) for label in found}
    numbers: dict[Any, int]
    if kinds <= {str}:
        as_numbers = all(label.isdecimal() for label in found)
        named = sorted(set(found), key=int if as_numbers else str)
        classes = named if known is None else list(known)
        if num_classes is not None and len(classes) != num_classes:
            raise ValueError(f"the labels have {len(classes)} names, but num_classes={num_classes}")
        numbers = {word: number for number, word in enumerate(classes)}
    elif kinds <= {int, bool}:
        n = max(*found, 0) + 1 if num_classes is None else num_classes
        classes = [str(number) for number in range(n)]
        numbers = {number: number for number in range(n)}
    else:
        told = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"labels must be all names or all numbers from 0: got {told}")
    for number, label in enumerate(found, 1):
        if label not in numbers:
            raise ValueError(f"label {number}: got {label!r}, wanted one of {', '.join(classes)}")
    if known is None and len(set(found)) < 2:
        raise ValueError(f"all {len(found)} labels are {found[0]!r}: wanted two classes or more")
    return classes, torch.tensor([numbers[label] for label in found])


def _split(y: Tensor, train_size: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to train on and held out: of each class its share, one at least of either kind where it
    has two."""
    if not 0 < train_size <= 1:
        raise ValueError(f"train_size must be above 0 and at most 1: got {train_size}")
    train, test = [], []
    for number in y.unique():
        rows = (y == number).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n = round(len(rows) * train_size)
        if train_size < 1 and len(rows) > 1:
            n = min(n, len(rows) - 1)
        train.append(rows[: max(n, 1)])
        test.append(rows[max(n, 1) :])
    return torch.cat(train), torch.cat(test)


def _loaded(name: str, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name), tokenizer
