"""The settings of PPLM.jl's functions, by their names and with their defaults.

What they name is read once, when they are made: bags of words, the discriminator's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..ops._check import check_above_0, check_choice, check_number
from .bags import Bag, bag_weights, get_bag_of_words_indices
from .heads import ClassificationHead, ClassifierHead, head_of, label_id
from .names import read_words, split_names
from .perturb import Goal, check_goal
from .sampling import check_k

METHODS = ("BoW", "Discrim")
PERTURBED = ("hidden", "past", "probs")
POOLS = ("sum", "mean")


@dataclass(frozen=True)
class pplm:
    """What is steered to, by what, and how far: `pplm(method="Discrim", perturb="past", ...)`.

    Args:
        method: "BoW", a bag of words, or "Discrim", a class of a discriminator.
        perturb: what Adam moves: the last hidden states ("hidden"), the keys and values of all
            tokens but the last ("past"), or, with a bag, the probabilities themselves ("probs").
        bow_list: names of bags, or paths of files of a word a line; all are one bag.
        discrim: a discriminator's name, or a head, an nn.Linear, a discriminator itself.
        target_class_id: the class by number, counted from 0 (PPLM.jl: from 1), or by name; -1 is
            the default of the head's metadata. A head of one class takes 0 or 1, its two sides.
        file_name, path: of the discriminator's file, as of `ClassifierHead`.
        stepsize: Adam's learning rate. num_iterations: its steps for a token.
        max_length: new tokens of `sample_pplm`.
        top_k, top_p: of `top_k_sample` and `nucleus_sample`.
        temperature: divides the logits of both models.
        fusion_gm_scale: 1 draws from the perturbed model alone, 0 from the unperturbed one.
        fusion_kl_scale: weight of KL(unperturbed || perturbed), nats (the opposite direction of
            `perturb_past`'s).
        cuda: (True, n) lets `sample_pplm` move the model to that GPU; None leaves it where it is.
        embed_size: becomes the head's. window_length, gamma: taken and not used, as upstream.
        pool: what the head sees of the hidden states of all positions: their "sum" (upstream's,
            whose heads are trained on a mean) or "mean".
        seed_compat_offset: `perturb_past_*` take the KL to the `original_probs` they are given,
            those of one position before (upstream's); False: to the unperturbed ones of the same
            position, which they find themselves.

    Raises:
        ValueError, TypeError: a value that is none. FileNotFoundError: an unknown bag, or a
        discriminator without a file.
    """

    method: str = "BoW"
    perturb: str = "hidden"
    bow_list: str | Sequence[str] = ("military",)
    discrim: Any = "toxicity"
    embed_size: int = 768
    target_class_id: int | str = -1
    file_name: str = ""
    path: str = ""
    stepsize: float = 0.01
    max_length: int = 100
    num_iterations: int = 2
    top_k: int = 50
    top_p: float = 0.8
    temperature: float = 1.1
    fusion_gm_scale: float = 0.9
    fusion_kl_scale: float = 0.01
    cuda: tuple[bool, int] | None = None
    window_length: int = 0
    gamma: float = 1.5
    pool: str = "sum"
    seed_compat_offset: bool = False
    classifier: ClassificationHead | None = field(
        default=None, init=False, repr=False, compare=False
    )
    _bags: dict[int, tuple[Any, tuple[Bag, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.bow_list, str):
            self._set("bow_list", tuple(self.bow_list))
        check_choice("method", self.method, METHODS)
        check_choice("perturb", self.perturb, PERTURBED)
        check_choice("pool", self.pool, POOLS)
        if self.perturb == "probs" and self.method != "BoW":
            raise ValueError('perturb="probs" is for method="BoW": a head sees no probabilities')
        for name in ("stepsize", "fusion_kl_scale", "gamma"):
            check_number(name, getattr(self, name), 0.0)
        for name in ("top_p", "fusion_gm_scale"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_above_0("temperature", self.temperature)
        least = {"max_length": 1, "num_iterations": 0, "window_length": 0, "embed_size": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be a whole number from {low}: got {value!r}")
        check_k(self.top_k)
        if self.method == "BoW":
            for name in split_names(self.bow_list):
                read_words(name)
        else:
            self._set("classifier", self._read_head())

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _read_head(self) -> ClassificationHead:
        """The head; the target class becomes one of its own."""
        if isinstance(self.discrim, str):
            head, meta = ClassifierHead(
                load_from_pretrained=True,
                discrim=self.discrim,
                file_name=self.file_name or None,
                path=self.path or None,
            )
        else:
            head, meta = head_of(self.discrim), getattr(self.discrim, "metadata", {})
        found = {"class_size": head.class_size} | (meta or {})
        self._set("target_class_id", label_id(found, self.target_class_id, "target_class_id"))
        self._set("embed_size", head.embed_size)
        return head

    def goal(self, method: str, model: nn.Module | None, tokenizer: Any = None) -> Goal:
        """What the model is steered to: the bags in the tokens of the tokenizer, or the head's
        class. Parts are on the model's device.

        Raises:
            ValueError: args of the other method; a bag or head that does not fit the model.
        """
        if self.method != method:
            raise ValueError(f"args have method={self.method!r}: wanted method={method!r}")
        if self.classifier is not None:
            goal = Goal((), self.classifier, int(self.target_class_id))
        else:
            goal = Goal(self._bags_of(tokenizer))
        if model is not None:
            check_goal(goal, model)
            device = next(model.parameters()).device
            goal = goal.on(device)
            if self.classifier is not None:
                self.classifier.to(device)
        return goal

    def _bags_of(self, tokenizer: Any) -> tuple[Bag, ...]:
        kept = self._bags.get(id(tokenizer))
        if kept is None:
            indices = get_bag_of_words_indices(self.bow_list, tokenizer)
            bags = tuple(bag for bag in map(bag_weights, indices) if len(bag.ids))
            kept = tokenizer, bags  # with the tokenizer, so that no other gets its id
            self._bags[id(tokenizer)] = kept
        return kept[1]
