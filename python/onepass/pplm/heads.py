"""Classifier heads: made, saved, and read from files that anybody may have written.

A head is kept as safetensors whose header holds its metadata too; a .json beside repeats it for
readers. Files of torch.save are read with weights_only, which runs no code of theirs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cli.errors import MAX_LISTED, nearest, one_line
from ..cli.files import replace, replace_text, strict_json
from .names import FOLDER, HEAD, KNOWN, TORCH, TRAIN, find_head

FORMAT = "onepass.pplm.ClassificationHead/1"
CLASSES = ("class_vocab", "default_class")
Meta = dict[str, Any]


class ClassificationHead(nn.Module):
    """One linear layer from a hidden state to classes, Uber's `ClassificationHead`.

    Args:
        class_size: C; 1 is a head of one logit, class 1 against class 0.
        embed_size: D, of the model's last hidden state.
    """

    def __init__(self, class_size: int, embed_size: int) -> None:
        super().__init__()
        for name, size in (("class_size", class_size), ("embed_size", embed_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1: got {size!r}")
        self.class_size, self.embed_size = class_size, embed_size
        self.mlp = nn.Linear(embed_size, class_size)

    @property
    def linear_layer(self) -> nn.Linear:
        """`mlp`, by PPLM.jl's name."""
        return self.mlp

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Logits [..., C] of hidden states [..., D], in the dtype of the head."""
        logits: Tensor = self.mlp(hidden_state.to(self.mlp.weight.dtype))
        return logits


def class_logps(logits: Tensor) -> Tensor:
    """Log-probabilities [..., max(C, 2)] of logits [..., C]; of one logit those of classes 0 and 1,
    so that its nll_loss is the binary cross-entropy."""
    if logits.shape[-1] == 1:
        return F.logsigmoid(torch.cat([-logits, logits], dim=-1))
    return logits.log_softmax(-1)


def ClassifierHead(
    class_size: int = 1,
    embed_size: int = 768,
    *,
    load_from_pretrained: bool = False,
    discrim: str | None = None,
    file_name: str | None = None,
    path: str | Path | None = None,
) -> tuple[ClassificationHead, Meta | None]:
    """(head, config_metadata), as PPLM.jl's constructor.

    Args:
        class_size, embed_size: of a head of random weights (load_from_pretrained=False), whose
            metadata is None.
        load_from_pretrained: read a file.
        discrim: a name: of a file in ./pretrained_discriminators, where `save_discriminator` puts
            them, or one of Uber's (clickbait, sentiment, toxicity), whose file must lie there too.
        path: the file, or its folder; `file_name` is the file in it.

    Raises:
        ValueError: load_from_pretrained with neither; a file that `load_head` refuses.
        FileNotFoundError: there is none.
    """
    if not load_from_pretrained:
        return ClassificationHead(class_size, embed_size), None
    if not path and not file_name:
        if not discrim:
            raise ValueError("load_from_pretrained: discrim is not given, nor a path: wanted one")
        return load_head(find_head(discrim), defaults=_classes(discrim))
    where = Path(path or FOLDER)
    return load_head(where / file_name if file_name else where, defaults=_classes(discrim))


def head_by_name(
    name: str,
    weights: str | Path | None = None,
    meta: str | Path | Mapping[str, Any] | None = None,
) -> tuple[ClassificationHead, Meta]:
    """(head, metadata). Arguments and errors as of `get_classifier`."""
    if weights is None and name == "generic":
        raise ValueError("the head 'generic': wanted weights with it (--discrim_weights)")
    return load_head(find_head(name) if weights is None else weights, meta, defaults=_classes(name))


def _classes(name: str | None) -> Meta:
    """The classes of a head of Uber's."""
    known = KNOWN.get(name or "", {})
    return {key: known[key] for key in ("class_size", *CLASSES) if key in known}


@torch.inference_mode(False)  # its weights take part in gradients
def get_classifier(
    name: Any,
    class_label: str | int | None = None,
    device: Any = "cpu",
    verbosity_level: int = 1,
    *,
    weights: str | Path | None = None,
    meta: str | Path | Mapping[str, Any] | None = None,
) -> tuple[ClassificationHead | None, int | None]:
    """(head on `device`, number of the class), as Uber's; (None, None) for no name. A head that is
    read is in eval mode.

    Args:
        name: clickbait, sentiment or toxicity; "generic"; what `find_head` takes; or a head, an
            nn.Linear, a discriminator.
        class_label: a class by name or number, 0-based; None and -1 are the head's default.
        verbosity_level: not looked at; Uber's takes it.
        weights: the file of a known or generic head.
        meta: metadata, as a mapping or a JSON file, over what the file says itself.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that `load_head` refuses, a class that
            the head does not have.
    """
    if name is None:
        return None, None
    if isinstance(name, str | Path):
        head, found = head_by_name(str(name), weights, meta)
        head.eval()
    else:
        head = head_of(name)
        told = getattr(name, "metadata", {}) | read_meta(meta)
        found = checked_meta(told, head, "the head")
    return head.to(device), label_id(found, class_label)


def head_of(classifier: Any) -> ClassificationHead:
    """The head of a discriminator, or on an nn.Linear; a head itself.

    Raises:
        TypeError: none of these.
    """
    head = getattr(classifier, "cl_head", classifier)
    if isinstance(head, nn.Linear):
        linear = head
        with torch.device("meta"):
            head = ClassificationHead(linear.out_features, linear.in_features)
        head.mlp = linear
    if not isinstance(head, ClassificationHead):
        raise TypeError(
            "a discriminator is a name, a file, a ClassificationHead, an nn.Linear or what"
            f" train_discriminator returns: got {type(classifier).__name__}"
        )
    return head


def label_id(
    meta: Mapping[str, Any], class_label: str | int | None, name: str = "class_label"
) -> int:
    """The number of a class, 0-based; None and -1 are the default. `name` is the argument's.

    Raises:
        ValueError: no such class; none named, and no default.
    """
    vocab, n = meta.get("class_vocab") or {}, max(int(meta["class_size"]), 2)
    named = [one_line(f"{word} ({number})", 60) for word, number in [*vocab.items()][:MAX_LISTED]]
    named += ["..."] if len(vocab) > MAX_LISTED else []
    wanted = f"wanted {', '.join([*named, f'a number from 0 to {n - 1}'])}"
    if isinstance(class_label, str):
        if class_label in vocab:
            return int(vocab[class_label])
        if class_label.removeprefix("-").isdecimal():
            class_label = int(class_label)
    if class_label is None or class_label == -1:
        if meta.get("default_class") is None:
            raise ValueError(f"{name}: the head has no default class: {wanted}")
        return int(meta["default_class"])
    if isinstance(class_label, int) and not isinstance(class_label, bool) and 0 <= class_label < n:
        return class_label
    meant = nearest(class_label, vocab) if isinstance(class_label, str) else None
    mend = f"; did you mean {meant}?" if meant else ""
    raise ValueError(f"{name}: no class {class_label!r}: {wanted}{mend}")


def hidden_size_of(model: nn.Module) -> int:
    """D of the hidden state that the model's language-model head reads."""
    inner: Any = model
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    weight = getattr(output, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        return int(weight.shape[1])
    return int(inner.config.get_text_config().hidden_size)


def check_fits(head: ClassificationHead, model: nn.Module, meta: Meta | None = None) -> None:
    """ValueError unless the head reads hidden states of the model's size."""
    size = hidden_size_of(model)
    if head.embed_size != size:
        own = (meta or {}).get("pretrained_model")
        of = f", those of {one_line(own, 100)}" if own else ""
        raise ValueError(
            f"the head reads hidden states of {head.embed_size} numbers{of}, but the model's have"
            f" {size}: wanted a head trained on this model ({TRAIN})"
        )


# -- files --------------------------------------------------------------------------------------


def save_discriminator(
    discrim: Any,
    *,
    file_name: str = "custom_discrim.safetensors",
    path: str | Path = FOLDER,
    args: Any = None,
    discrim_name: str = "",
) -> Path:
    """Write the head and its metadata; returns its file.

    Args:
        discrim: a discriminator, whose `cl_head` is kept, or a head.
        file_name, path: where, by default in ./pretrained_discriminators, where
            ClassifierHead(load_from_pretrained=True, discrim=NAME) looks for NAME.safetensors.
        args: metadata as a mapping (class_vocab, default_class, pretrained_model, ...), or
            HyperParams.
        discrim_name: NAME, in place of `file_name`.

    The file is whole at every instant. Its header holds the metadata, and a .json beside repeats
    it: {"class_size", "embed_size", "class_vocab", "default_class", "pretrained_model", ...}.
    """
    from safetensors.torch import save

    head = getattr(discrim, "cl_head", discrim)
    file = Path(path) / (f"{discrim_name}.safetensors" if discrim_name else file_name)
    if file.suffix != ".safetensors":
        raise ValueError(f"file_name: got {file.name!r}, wanted a name that ends in .safetensors")
    own = dict(getattr(discrim, "metadata", {}))
    told = asdict(args) if is_dataclass(args) and not isinstance(args, type) else dict(args or {})
    meta = checked_meta(own | told, head, "args")
    config = strict_json(meta, indent=1)
    tensors = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    raw = save(tensors, {FORMAT: config})  # one entry: of several the order changes from run to run
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, lambda new: new.write_bytes(raw))
    replace_text(file.with_suffix(".json"), config + "\n")
    return file


@torch.inference_mode(False)  # its weights take part in gradients
def load_head(
    path: str | Path,
    meta: str | Path | Mapping[str, Any] | None = None,
    device: Any = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[ClassificationHead, Meta]:
    """(head, metadata) of a file, or of the folder of `onepass pplm train-discriminator`.

    Args:
        path: safetensors, or a file of torch.save with a state_dict (Uber's) or with
            {"config_metadata", "weights"} (PPLM.jl's names), one weight [C, D] and one bias [C].
        meta: over what the file says of itself, a mapping or a JSON file.
        defaults: class_vocab and default_class where neither has any, for a head of the
            class_size among them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds anything else than numbers, or sizes that do not agree.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / HEAD
    if not file.is_file():
        raise FileNotFoundError(f"no head in {str(file)!r}: no such file")
    if file.suffix.lower() == ".safetensors":
        tensors, own = _safetensors(file)
    elif file.suffix.lower() in TORCH:
        tensors, own = _torch_file(file)
    else:
        raise ValueError(
            f"{file}: wanted a head as .safetensors, or of torch.save as {', '.join(TORCH)}"
        )
    weight, bias = _layer(file, tensors)
    with torch.device("meta"):
        head = ClassificationHead(*weight.shape)
    told = own | read_meta(meta)
    lent = dict(defaults or {})
    if lent.pop("class_size", head.class_size) == head.class_size and not _names_classes(told):
        told |= lent
    found = checked_meta(told, head, str(file))
    head.load_state_dict({"mlp.weight": weight, "mlp.bias": bias}, assign=True)
    return head.to(device=device), found


def _names_classes(meta: Meta) -> bool:
    return bool(meta.get("class_vocab")) or meta.get("default_class") is not None


def read_meta(meta: str | Path | Mapping[str, Any] | None) -> Meta:
    """Metadata of a JSON file, or as it is.

    Raises:
        FileNotFoundError, ValueError: no such file, or not one JSON object.
    """
    if meta is None or isinstance(meta, Mapping):
        return dict(meta or {})
    file = Path(meta).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of metadata: {str(meta)!r}")
    try:
        return _object(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: {one_line(error)}") from error


def checked_meta(meta: Mapping[str, Any], head: ClassificationHead, place: str) -> Meta:
    """The metadata with the head's sizes.

    Raises:
        ValueError: others than the head's, classes that it does not have, or no names of classes.
    """
    found = dict(meta)
    for name in ("class_size", "embed_size"):
        size = getattr(head, name)
        if found.setdefault(name, size) != size:
            raise ValueError(f"{place}: {name} is {found[name]!r}, but the weights have {size}")
    n = max(head.class_size, 2)  # of one logit: 0 and 1
    vocab = found.setdefault("class_vocab", {})
    if not isinstance(vocab, dict) or not all(isinstance(word, str) for word in vocab):
        raise ValueError(f'{place}: class_vocab must be {{"name": number}}: got {_short(vocab)}')
    default = found.get("default_class")
    numbers = {f"class_vocab[{word!r}]": number for word, number in vocab.items()}
    for name, number in (numbers | ({} if default is None else {"default_class": default})).items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < n:
            raise ValueError(f"{place}: {name} is {_short(number)}, wanted from 0 to {n - 1}")
    return found


def _safetensors(file: Path) -> tuple[dict[str, Any], Meta]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: no safetensors, or damaged: {one_line(error, 120)}") from error
    try:
        return tensors, _object(header[FORMAT]) if FORMAT in header else {}
    except ValueError as error:
        raise ValueError(f"{file}: its metadata are damaged: {one_line(error)}") from error


def _torch_file(file: Path) -> tuple[dict[str, Any], Meta]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of archives that are no state_dict, refused below
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file makes of the reader
        raise ValueError(
            f"{file}: refused: it is damaged, or holds more than tensors, which loading could run"
            f" as code ({type(error).__name__}); wanted a state_dict, better as .safetensors"
        ) from error
    own: Any = {}
    if isinstance(found, dict) and "weights" in found:
        found, own = found["weights"], found.get("config_metadata") or {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file}: got {_short(found)}, wanted a state_dict: weight and bias")
    if not isinstance(own, dict):
        raise ValueError(f"{file}: config_metadata is {_short(own)}, wanted a dict")
    return found, own


def _layer(file: Path, tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]) in at least fp32, checked."""
    by_end = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    if sorted(by_end) != ["bias", "weight"] or len(tensors) != 2:
        names = one_line(", ".join(map(repr, sorted(tensors)[:4])), 120) or "nothing"
        more = ", ..." if len(tensors) > 4 else ""
        raise ValueError(f"{file}: has {names}{more}, wanted one linear layer: weight and bias")
    made = []
    for name, dims in (("weight", 2), ("bias", 1)):
        value = by_end[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{file}: {name} is {_short(value)}, wanted a dense tensor")
        if value.dim() != dims or not value.numel() or not value.is_floating_point():
            shape = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            wanted = "[classes, hidden size]" if dims == 2 else "[classes]"
            raise ValueError(f"{file}: {name} is {shape}, wanted floats {wanted}")
        if value.numel() > file.stat().st_size:  # a small file can claim to hold any size
            raise ValueError(f"{file}: {name} claims more numbers than the file has bytes")
        value = value.detach() if value.dtype == torch.float64 else value.detach().float()
        if not value.isfinite().all():
            raise ValueError(f"{file}: {name} holds NaN or inf")
        made.append(value.contiguous())
    weight, bias = made
    if len(bias) != len(weight):
        raise ValueError(f"{file}: weight has {len(weight)} classes, bias {len(bias)}")
    return weight, bias


def _object(text: str) -> Meta:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {one_line(error, 120)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"got {_short(found)}, wanted one JSON object")
    return found


def _short(value: object) -> str:
    if isinstance(value, str | int | float | bool | None):
        return one_line(repr(value), 60)
    return f"a {type(value).__name__}"
