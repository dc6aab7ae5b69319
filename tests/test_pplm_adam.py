"""PPLM.jl's perturbations against plain transcriptions: Adam of torch.optim on a copy of all hidden
states, of all keys and values, of the probabilities, with whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import onepass.pplm as PPLM
from onepass.demo.train import one_thread
from onepass.pplm.cache import as_cache, pack
from support import tiny_pplm
from support.tiny_pplm import BAG, OTHER, V

FAMILIES = ("gpt2_tied", "llama")


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def bags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("bags")
    for name, words in (("war", (*BAG, BAG[0])), ("space", OTHER)):  # one word twice
        (folder / f"{name}.txt").write_text("\n".join(words), encoding="utf-8")
    return [str(folder / "war.txt"), str(folder / "space.txt")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_pplm.tokenizer()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, device) -> Any:
    return tiny_pplm.model(request.param, device).requires_grad_(False)


@pytest.fixture(scope="module")
def gpt2(device) -> Any:
    return tiny_pplm.model("gpt2_tied", device).requires_grad_(False)


def ids_of(rows: int, length: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(12, V, (rows, length), generator=generator).to(device)


def settings(bags, n_classes: int | None, **options: Any) -> Any:
    how = {"stepsize": 0.02, "num_iterations": 3, "fusion_kl_scale": 0.05, **options}
    if n_classes is None:
        return PPLM.pplm(method="BoW", bow_list=bags, **how)
    head = tiny_pplm.head(n_classes)
    return PPLM.pplm(method="Discrim", discrim=head, **{"target_class_id": 1, **how})


# -- the transcription --------------------------------------------------------------------------


def plain_loss(logits, u, pooled, tokenizer, args, per_row) -> Tensor:
    """Of all logits [B, S, V] and the unperturbed probabilities of the last position."""
    rows = []
    probs = F.softmax(logits[:, -1] / args.temperature, -1)
    for b in range(len(probs)) if per_row else [slice(None)]:
        p = probs[b].reshape(-1, V)
        if args.method == "BoW":
            words = [
                w for bag in PPLM.get_bag_of_words_indices(args.bow_list, tokenizer) for w in bag
            ]
            ids = torch.tensor([w[0] for w in words], device=p.device)
            loss = -p[:, ids].sum().log()
        else:
            head = args.discrim.to(p.device)
            out = head(pooled[b].reshape(-1, head.embed_size))
            target = torch.full_like(out, args.target_class_id)
            loss = F.binary_cross_entropy_with_logits(out, target)
            if head.class_size > 1:
                loss = F.cross_entropy(out, target[:, 0].long())
        q = u[b].reshape(-1, V)
        kl = (q * (q / p).log()).sum(-1).mean()
        rows.append(loss + args.fusion_kl_scale * kl)
    return torch.stack(rows).sum()


def plain_hidden(hidden, model, tokenizer, args, per_row=False) -> Tensor:
    new = hidden.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([new], lr=args.stepsize)
    u = F.softmax(model.lm_head(hidden)[:, -1] / args.temperature, -1).detach()
    for _ in range(args.num_iterations):
        optimizer.zero_grad()
        pooled = new.sum(1) if args.pool == "sum" else new.mean(1)
        plain_loss(model.lm_head(new), u, pooled, tokenizer, args, per_row).backward()
        optimizer.step()
    return new.detach()


def plain_past(model, prev, past, original_probs, tokenizer, args, per_row=False) -> Tensor:
    """[L, 2, B, H, T, d]; original_probs None: those after `prev`."""
    layers = [layer.detach().clone().requires_grad_() for layer in pack(past)]
    optimizer = torch.optim.Adam(layers, lr=args.stepsize)
    u = original_probs
    for _ in range(args.num_iterations):
        optimizer.zero_grad()
        cache = as_cache(torch.stack(layers))
        out = model(prev, past_key_values=cache, output_hidden_states=True, use_cache=True)
        if u is None:
            u = F.softmax(out.logits[:, -1] / args.temperature, -1).detach()
        pooled = out.hidden_states[-1].sum(1)
        plain_loss(out.logits, u, pooled, tokenizer, args, per_row).backward()
        optimizer.step()
    return torch.stack(layers).detach()


def perturbed(hidden, model, tokenizer, args, **options) -> Tensor:
    if args.method == "BoW":
        return PPLM.perturb_hidden_bow(hidden, model, tokenizer, args, **options)
    return PPLM.perturb_hidden_discrim(hidden, model, tokenizer, args, **options)


def perturbed_past(model, prev, past, probs, tokenizer, args, **options) -> Any:
    if args.method == "BoW":
        return PPLM.perturb_past_bow(model, prev, past, probs, tokenizer, args, **options)
    return PPLM.perturb_past_discrim(model, prev, past, probs, args, **options)


OPTIONS = [
    {},
    {"fusion_kl_scale": 0.0},
    {"fusion_kl_scale": 2.0, "temperature": 1.0},
    {"pool": "mean", "num_iterations": 1},
]
CLASSES = [None, 3, 1]
CASES = [
    pytest.param(n, options, (row + at) % 2 == 1, id=f"{n}-{at}-{(row + at) % 2}")
    for row, n in enumerate(CLASSES)
    for at, options in enumerate(OPTIONS)
]


# -- hidden states ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_classes", "options", "per_row"), CASES)
def test_hidden_states_equal_adam_on_all_of_them(
    model, tokenizer, bags, device, n_classes, options, per_row
):
    args = settings(bags, n_classes, **options)
    ids = ids_of(3, 7, device)
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    before = hidden.detach().clone()
    wanted = plain_hidden(hidden, model, tokenizer, args, per_row)
    got = perturbed(hidden, model, tokenizer, args, per_row=per_row)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert not got.requires_grad and torch.equal(hidden, before)
    assert (got - before).abs().max() > 0.01
    if n_classes is None:
        assert torch.equal(got[:, :-1], before[:, :-1])


@pytest.mark.parametrize("options", [{"stepsize": 0.0}, {"num_iterations": 0}])
@pytest.mark.parametrize("n_classes", CLASSES)
def test_no_step_moves_nothing(gpt2, tokenizer, bags, device, n_classes, options):
    args = settings(bags, n_classes, **options)
    ids = ids_of(2, 5, device)
    out = gpt2(ids, output_hidden_states=True, use_cache=True)
    hidden = out.hidden_states[-1]
    assert torch.equal(perturbed(hidden, gpt2, tokenizer, args), hidden)
    past = perturbed_past(gpt2, ids[:, -1:], out.past_key_values, None, tokenizer, args)
    assert torch.equal(pack(past), pack(out.past_key_values))


def test_padding_neither_counts_nor_moves(gpt2, tokenizer, bags, device):
    args = settings(bags, 3)
    hidden = gpt2(ids_of(2, 6, device), output_hidden_states=True).hidden_states[-1].detach()
    mask = torch.ones(2, 6, dtype=torch.int64, device=device)
    mask[1, :2] = 0
    how = {"per_row": True}
    got = perturbed(hidden, gpt2, tokenizer, args, attention_mask=mask, **how)
    torch.testing.assert_close(got[:1], perturbed(hidden[:1], gpt2, tokenizer, args, **how))
    alone = perturbed(hidden[1:, 2:], gpt2, tokenizer, args, **how)
    torch.testing.assert_close(got[1:, 2:], alone)
    assert torch.equal(got[1:, :2], hidden[1:, :2])


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_a_logit_of_class_1(gpt2, tokenizer, bags, device, label):
    args = settings(bags, 1, target_class_id=label, fusion_kl_scale=0.0)
    hidden = gpt2(ids_of(1, 6, device), output_hidden_states=True).hidden_states[-1].detach()
    moved = perturbed(hidden, gpt2, tokenizer, args)
    before, after = (args.discrim(h.sum(1)).item() for h in (hidden, moved))
    assert (after > before) == (label == 1)


class Shapes(TorchDispatchMode):
    """All shapes that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


def test_only_the_last_position_has_logits(gpt2, tokenizer, bags, device):
    hidden = gpt2(ids_of(2, 11, device), output_hidden_states=True).hidden_states[-1].detach()
    for n_classes in (None, 3):
        with Shapes() as shapes:
            perturbed(hidden, gpt2, tokenizer, settings(bags, n_classes))
        assert (2, V) in shapes.seen
        assert not [s for s in shapes.seen if 11 in s and V in s]
    prompt = "the w1 w2 w3 w4 w5 w6 w7 w8 w9"
    for perturb in ("hidden", "past"):
        args = settings(bags, None, perturb=perturb, max_length=2)
        with Shapes() as shapes:
            PPLM.sample_pplm(args, tokenizer=tokenizer, model=gpt2, prompt=prompt, seed=0)
        assert not [s for s in shapes.seen if V in s and {10, 11} & set(s)]


# -- the past -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_classes", "options", "per_row"), CASES)
def test_past_equals_adam_on_all_keys_and_values(
    model, tokenizer, bags, device, n_classes, options, per_row
):
    args = settings(bags, n_classes, **options)
    ids = ids_of(2, 6, device)
    past = model(ids[:, :-1], use_cache=True).past_key_values
    before = pack(past)
    wanted = plain_past(model, ids[:, -1:], past, None, tokenizer, args, per_row)
    got = perturbed_past(model, ids[:, -1:], past, None, tokenizer, args, per_row=per_row)
    # where a gradient all but vanishes (a bag alone: the first key), Adam's 0 / 0 is rounding
    close = torch.isclose(pack(got), wanted, atol=1e-5, rtol=1e-5)
    assert close.float().mean() > 0.999
    assert (pack(got) - before).abs().max() > 0.01
    assert torch.equal(pack(past), before) and type(got) is type(past)


@pytest.mark.parametrize("kind", ["tensors", "pairs"])
def test_past_of_older_spellings(gpt2, tokenizer, bags, device, kind):
    args = settings(bags, 3)
    ids = ids_of(1, 5, device)
    cache = gpt2(ids[:, :-1], use_cache=True).past_key_values
    packed = pack(cache)
    past = tuple(packed) if kind == "tensors" else [(layer[0], layer[1]) for layer in packed]
    got = perturbed_past(gpt2, ids[:, -1:], past, None, tokenizer, args)
    assert type(got) is type(past)
    wanted = perturbed_past(gpt2, ids[:, -1:], cache, None, tokenizer, args)
    assert torch.equal(pack(got), pack(wanted))


def test_a_mask_of_something_else_than_padding_on_the_left(gpt2, tokenizer, bags, device):
    ids = ids_of(1, 5, device)
    past = gpt2(ids[:, :-1], use_cache=True).past_key_values
    given = (gpt2, ids[:, -1:], past, None, tokenizer, settings(bags, None))
    mask = torch.tensor([[1, 1, 1, 1, 0]], device=device)
    with pytest.raises(ValueError, match="attention_mask must be 0 where a row is padded"):
        perturbed_past(*given, attention_mask=mask)


def test_offset_of_the_seed_is_an_option(gpt2, tokenizer, bags, device):
    """D-C5: the KL is to the unperturbed probabilities after `prev`, or to those given."""
    ids = ids_of(2, 6, device)
    out = gpt2(ids[:, :-1], use_cache=True)
    given = PPLM.temp_softmax(out.logits[:, -1], t=1.1).detach()
    how = {"fusion_kl_scale": 2.0, "stepsize": 0.05}
    found = {}
    for offset in (False, True):
        args = settings(bags, None, seed_compat_offset=offset, **how)
        past = perturbed_past(gpt2, ids[:, -1:], out.past_key_values, given, tokenizer, args)
        target = given if offset else None
        past_wanted = plain_past(gpt2, ids[:, -1:], out.past_key_values, target, tokenizer, args)
        assert torch.isclose(pack(past), past_wanted, atol=1e-5).float().mean() > 0.999
        found[offset] = pack(past)
    assert (found[True] - found[False]).abs().max() > 0.01
    with pytest.raises(ValueError, match="original_probs"):
        perturbed_past(gpt2, ids[:, -1:], out.past_key_values, None, tokenizer, args)


def test_weights_and_modes_stay_and_get_no_gradient(tokenizer, bags, device):
    gpt2 = tiny_pplm.model("gpt2_tied", device).train()
    ids = ids_of(2, 6, device)
    out = gpt2(ids, output_hidden_states=True, use_cache=True)
    before = {k: v.clone() for k, v in gpt2.state_dict().items()}
    for n_classes in (None, 3):
        args = settings(bags, n_classes)
        perturbed(out.hidden_states[-1], gpt2, tokenizer, args)
        with torch.inference_mode():
            past = gpt2(ids[:, :-1], use_cache=True).past_key_values
            perturbed_past(gpt2, ids[:, -1:], past, None, tokenizer, args)
        if n_classes is not None:
            assert all(p.grad is None for p in args.discrim.parameters())
    assert all(module.training for module in gpt2.modules())
    assert all(p.grad is None and p.requires_grad for p in gpt2.parameters())
    assert all(torch.equal(v, before[k]) for k, v in gpt2.state_dict().items())


# -- probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kl_scale", [0.0, 0.05])
def test_probabilities_equal_adam_on_them(tokenizer, bags, device, kl_scale, per_row):
    args = settings(bags, None, perturb="probs", fusion_kl_scale=kl_scale, stepsize=0.003)
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).to(device)
    probs = logits.softmax(-1)
    new = probs.clone().requires_grad_()
    optimizer = torch.optim.Adam([new], lr=args.stepsize)
    ids = torch.tensor([tokenizer.vocab[w] for w in (*BAG, BAG[0], *OTHER)], device=device)
    for _ in range(args.num_iterations):
        optimizer.zero_grad()
        mass, kl = new[:, ids].sum(-1), (probs * (probs / new).log()).sum(-1)
        loss = -mass.log().sum() + kl_scale * kl.sum()
        if not per_row:
            loss = -mass.sum().log() + kl_scale * kl.mean()
        loss.backward()
        optimizer.step()
    got = PPLM.perturb_probs(probs, tokenizer, args, per_row=per_row)
    torch.testing.assert_close(got, new.detach().clamp_min(0), atol=1e-5, rtol=1e-5)
    alone = PPLM.perturb_probs(probs[0], tokenizer, args, per_row=per_row)
    assert alone.shape == (V,)
    assert (alone >= 0).all()


def test_probabilities_of_0_make_no_nan(tokenizer, bags, device):
    args = settings(bags, None, perturb="probs")
    probs = torch.zeros(V, device=device)
    probs[50:] = 1 / (V - 50)  # none of the bag
    got = PPLM.perturb_probs(probs, tokenizer, args)
    assert got.isfinite().all()


@pytest.mark.parametrize("n_classes", [None, 3])
def test_masked_vocabulary_makes_no_nan(tokenizer, bags, device, n_classes):
    class Masked(torch.nn.Linear):
        """A head whose last tokens have logits of -inf."""

        def forward(self, hidden: Tensor) -> Tensor:
            inside = torch.arange(V, device=hidden.device) < V - 9
            return torch.where(inside, super().forward(hidden), -float("inf"))

    masked = tiny_pplm.model("gpt2_tied", device)
    masked.lm_head = Masked(32, V, bias=False).to(device)
    ids, args = ids_of(2, 5, device), settings(bags, n_classes)
    out = masked(ids, output_hidden_states=True, use_cache=True)
    got = perturbed(out.hidden_states[-1], masked, tokenizer, args)
    assert got.isfinite().all() and not torch.equal(got, out.hidden_states[-1])
    past = perturbed_past(masked, ids[:, -1:], out.past_key_values, None, tokenizer, args)
    assert pack(past).isfinite().all()


# -- what it is for -----------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["hidden", "past"])
def test_bags_and_classes_become_more_probable(gpt2, tokenizer, bags, device, perturb):
    ids = ids_of(20, 6, device)
    out = gpt2(ids, output_hidden_states=True)
    past = gpt2(ids[:, :-1], use_cache=True).past_key_values
    words = [tokenizer.vocab[w] for w in (*BAG, *OTHER)]

    def after(args) -> Any:
        if perturb == "past":
            moved = perturbed_past(gpt2, ids[:, -1:], past, None, tokenizer, args, per_row=True)
            return gpt2(ids[:, -1:], past_key_values=moved, output_hidden_states=True)
        hidden = perturbed(out.hidden_states[-1], gpt2, tokenizer, args, per_row=True)
        return type(out)(logits=gpt2.lm_head(hidden), hidden_states=(hidden,))

    args = settings(bags, None)
    before, moved = (o.logits[:, -1].softmax(-1)[:, words].sum(-1) for o in (out, after(args)))
    assert (moved > before).sum() >= 18
    args = settings(bags, 3)
    shown = slice(-1, None) if perturb == "past" else slice(None)
    losses = [
        F.cross_entropy(
            args.discrim(o.hidden_states[-1][:, shown].sum(1)),
            torch.ones(20, dtype=torch.int64, device=device),
            reduction="none",
        )
        for o in (out, after(args))
    ]
    assert losses[1].mean() < losses[0].mean()


# -- settings -----------------------------------------------------------------------------------


def test_defaults_are_those_of_pplm_jl():
    args = PPLM.pplm(bow_list=["military"])
    told = {
        "method": "BoW", "perturb": "hidden", "discrim": "toxicity", "embed_size": 768,
        "target_class_id": -1, "file_name": "", "path": "", "stepsize": 0.01, "max_length": 100,
        "num_iterations": 2, "top_k": 50, "top_p": 0.8, "temperature": 1.1,
        "fusion_gm_scale": 0.9, "fusion_kl_scale": 0.01, "window_length": 0, "gamma": 1.5,
        "pool": "sum", "seed_compat_offset": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in told} == told
    assert hash(args) == hash(PPLM.pplm(bow_list=["military"]))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"method": "bow"}, ValueError, "method must be one of BoW, Discrim: got 'bow'"),
        ({"perturb": "logits"}, ValueError, "perturb must be one of hidden, past, probs"),
        ({"pool": "max"}, ValueError, "pool must be one of sum, mean"),
        ({"stepsize": -1.0}, ValueError, "stepsize must be"),
        ({"temperature": 0}, ValueError, "temperature must be above 0"),
        ({"fusion_gm_scale": 1.1}, ValueError, "fusion_gm_scale must be"),
        ({"top_p": "x"}, TypeError, "top_p must be"),
        ({"top_k": -1}, ValueError, "k must be at least 0"),
        ({"num_iterations": 1.5}, ValueError, "num_iterations must be a whole number from 0"),
        ({"max_length": 0}, ValueError, "max_length must be a whole number from 1"),
        ({"bow_list": ["militry"]}, FileNotFoundError, "did you mean military"),
        ({"bow_list": []}, ValueError, "no bag of words is named"),
        ({"method": "Discrim"}, FileNotFoundError, "train one"),
        ({"method": "Discrim", "discrim": "no"}, FileNotFoundError, "no head 'no'"),
    ],
)  # fmt: skip
def test_settings_refuse(options, error, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=told) as caught:
        PPLM.pplm(**options)
    assert "\n" not in str(caught.value)


def test_settings_of_a_head(tmp_path):
    head = tiny_pplm.head(3)
    with pytest.raises(ValueError, match="probabilities"):
        PPLM.pplm(method="Discrim", discrim=head, target_class_id=0, perturb="probs")
    with pytest.raises(ValueError, match="target_class_id: the head has no default"):
        PPLM.pplm(method="Discrim", discrim=head)
    with pytest.raises(ValueError, match="target_class_id: no class 3"):
        PPLM.pplm(method="Discrim", discrim=head, target_class_id=3)
    meta = {"class_vocab": {"calm": 0, "loud": 2}, "default_class": 2}
    file = PPLM.save_discriminator(head, path=tmp_path, file_name="own.safetensors", args=meta)
    by_default = PPLM.pplm(method="Discrim", discrim="custom", path=str(file))
    assert by_default.target_class_id == 2
    by_name: Any = {"target_class_id": "calm", "path": str(tmp_path)}
    by_name["file_name"] = file.name
    assert PPLM.pplm(method="Discrim", discrim="custom", **by_name).target_class_id == 0


def test_settings_of_the_other_method_are_refused(gpt2, tokenizer, bags, device):
    hidden = torch.zeros(1, 3, 32, device=device)
    with pytest.raises(ValueError, match="wanted method='BoW'"):
        PPLM.perturb_hidden_bow(hidden, gpt2, tokenizer, settings(bags, 3))
    with pytest.raises(ValueError, match="wanted method='Discrim'"):
        PPLM.perturb_hidden_discrim(hidden, gpt2, tokenizer, settings(bags, None))


def test_head_of_another_size_is_refused(gpt2, tokenizer, device):
    args = PPLM.pplm(method="Discrim", discrim=PPLM.ClassificationHead(2, 48), target_class_id=1)
    with pytest.raises(ValueError, match="48 numbers.* have 32"):
        PPLM.perturb_hidden_discrim(torch.zeros(1, 3, 32, device=device), gpt2, tokenizer, args)
