"""PPLM.jl's sample_pplm and sample_normal: the loops of its documentation, written in Python almost
word for word, give the same texts; limits, batches, seeds, the seed's offset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

import onepass.pplm as PPLM
from onepass.demo.train import one_thread
from onepass.pplm.forward import steady
from onepass.pplm.sample import AdamWalk
from support import tiny_pplm
from support.tiny_models import tiny
from support.tiny_pplm import BAG

PROMPT = "the w1 w2 war w3 w4"


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("bags") / "war.txt"
    file.write_text("\n".join(BAG), encoding="utf-8")
    return [str(file)]


@pytest.fixture(scope="module")
def head_file(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("heads")
    head = tiny_pplm.head(2)
    return str(PPLM.save_discriminator(head, path=folder, file_name="toxicity.safetensors"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_pplm.tokenizer()


@pytest.fixture(scope="module")
def model(device) -> Any:
    return tiny_pplm.model("gpt2_tied", device)


def seeded(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


def walk_of(model, args, tokenizer) -> AdamWalk:
    return AdamWalk(model, args.temperature, args, args.goal(args.method, model, tokenizer))


def steered(bag, **options: Any) -> Any:
    """Arguments of a bag, or, bag None, of a head."""
    how = {"stepsize": 0.05, "max_length": 6, **options}
    if bag is not None:
        return PPLM.pplm(method="BoW", bow_list=bag, **how)
    return PPLM.pplm(method="Discrim", discrim=tiny_pplm.head(3), target_class_id=1, **how)


# -- source document 002 ------------------------------------------------------------------------


def test_the_crude_loop_over_hidden_states(model, tokenizer, head_file, device):
    generator = seeded(device)  # to compare with
    input_ = [tokenizer.eos_token_id, *tokenizer(PROMPT)["input_ids"]]

    args = PPLM.pplm(method="Discrim", perturb="hidden", discrim="toxicity", path=head_file,
                     target_class_id=1, stepsize=0.008, fusion_kl_scale=0.05,
                     max_length=8)  # fmt: skip

    for _ in range(args.max_length):
        input_ids = torch.tensor([input_], device=device)
        outputs = model(input_ids, output_attentions=False,
                        output_hidden_states=True,
                        use_cache=False)  # fmt: skip
        original_logits = outputs.logits[0, -1]
        original_probs = PPLM.temp_softmax(original_logits, t=args.temperature)

        hidden = outputs.hidden_states[-1]
        modified_hidden = PPLM.perturb_hidden_discrim(hidden, model, tokenizer, args)
        pert_logits = model.lm_head(modified_hidden)[0, -1]
        pert_probs = PPLM.temp_softmax(pert_logits, t=args.temperature)

        gm_scale = args.fusion_gm_scale
        pert_probs = original_probs ** (1 - gm_scale) * pert_probs**gm_scale
        new_token = PPLM.top_k_sample(pert_probs, k=args.top_k, generator=generator)[0]
        input_.append(new_token)

    text = tokenizer.decode(input_)
    same = PPLM.sample_pplm(args, tokenizer=tokenizer, model=model, prompt=PROMPT, seed=7)
    assert text == tokenizer.eos_token + " " + same


def test_the_crude_loop_over_the_past(model, tokenizer, head_file, device):
    """Its off-by-one included (D-C5): what it calls original is of the position before."""
    generator = seeded(device)
    input_ = [tokenizer.eos_token_id, *tokenizer(PROMPT)["input_ids"]]

    args = PPLM.pplm(method="Discrim", perturb="past", discrim="toxicity", path=head_file,
                     target_class_id=1, stepsize=0.008, fusion_kl_scale=0.05,
                     seed_compat_offset=True)  # fmt: skip

    for _ in range(8):
        input_ids = torch.tensor([input_], device=device)
        inp = input_ids[:, :-1]
        prev = input_ids[:, -1:]
        outputs = model(inp, output_attentions=False,
                        output_hidden_states=True,
                        use_cache=True)  # fmt: skip
        past = outputs.past_key_values
        original_logits = outputs.logits[0, -1]
        original_probs = PPLM.temp_softmax(original_logits, t=args.temperature)

        new_past = PPLM.perturb_past_discrim(model, prev, past, original_probs, args)
        assert not torch.equal(new_past.layers[0].values, past.layers[0].values)
        output_new = model(prev, past_key_values=new_past,
                           output_attentions=False,
                           output_hidden_states=True,
                           use_cache=True)  # fmt: skip
        pert_logits = output_new.logits[0, -1]
        pert_probs = PPLM.temp_softmax(pert_logits, t=args.temperature)

        gm_scale = args.fusion_gm_scale
        pert_probs = original_probs ** (1 - gm_scale) * pert_probs**gm_scale
        new_token = PPLM.top_k_sample(pert_probs, k=args.top_k, generator=generator)[0]
        input_.append(new_token)

    text = tokenizer.decode(input_)
    assert text.startswith(f"{tokenizer.eos_token} {PROMPT} ") and len(text.split()) == 7 + 8


# -- the same walked with a cache ---------------------------------------------------------------


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("of", ["bag", "head"])
def test_steps_over_the_past_equal_the_loop_without_a_cache(
    model, tokenizer, bag, device, of, offset
):
    """PPLM.jl's sample_pplm, which mixes with what follows the last token, and takes the KL to what
    follows the one before (offset) or, D-C5, to the same."""
    how = {"perturb": "past", "seed_compat_offset": offset, "fusion_kl_scale": 0.5}
    args = steered(bag if of == "bag" else None, **how)
    ids = tokenizer(PROMPT)["input_ids"]
    walk, found, wanted = walk_of(model, args, tokenizer), [], []
    with steady(model):
        found.append(walk.start(torch.tensor([ids[:3]], device=device), None))
        found += [walk.step(torch.tensor([[token]], device=device)) for token in ids[3:]]
    for n in range(3, len(ids) + 1):
        tokens = torch.tensor([ids[:n]], device=device)
        before = model(tokens[:, :-1], use_cache=True)
        probs = PPLM.temp_softmax(before.logits[:, -1], t=args.temperature)
        call = (model, tokens[:, -1:], before.past_key_values, probs)
        if of == "bag":
            past = PPLM.perturb_past_bow(*call, tokenizer, args)
        else:
            past = PPLM.perturb_past_discrim(*call, args)
        log_p = model(tokens[:, -1:], past_key_values=past).logits[:, -1] / args.temperature
        log_u = model(tokens).logits[:, -1] / args.temperature
        wanted.append(PPLM.fuse(log_p, log_u, args.fusion_gm_scale))
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("of", "perturb"),
    [("bag", "hidden"), ("bag", "past"), ("bag", "probs"), ("head", "hidden"), ("head", "past")],
)
def test_a_row_in_a_batch_is_the_row_alone(model, tokenizer, bag, device, of, perturb):
    args = steered(bag if of == "bag" else None, perturb=perturb, top_k=1)
    prompts = [PROMPT, "w5", "w6 w7 w8 w9 w10 w11 w12 w13 w14"]
    how = {"tokenizer": tokenizer, "model": model}
    together = PPLM.sample_pplm(args, prompt=prompts, **how)
    alone = [PPLM.sample_pplm(args, prompt=prompt, **how) for prompt in prompts]
    assert together == alone
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    tokens = torch.zeros(3, 9, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, 9 - len(ids) :] = torch.tensor(ids)
        mask[row, 9 - len(ids) :] = 1
    with steady(model):
        walk = walk_of(model, args, tokenizer)
        batch = [walk.start(tokens.to(device), mask.to(device))]
        batch += [walk.step(torch.full((3, 1), n, device=device)) for n in (20, 21)]
        for row, ids in enumerate(rows):
            walk = walk_of(model, args, tokenizer)
            single = [walk.start(torch.tensor([ids], device=device), None)]
            single += [walk.step(torch.full((1, 1), n, device=device)) for n in (20, 21)]
            for one, of_batch in zip(single, batch, strict=True):
                torch.testing.assert_close(of_batch[row], one[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("perturb", ["hidden", "past", "probs"])
@pytest.mark.parametrize(
    "limit", [{"stepsize": 0.0}, {"num_iterations": 0}, {"fusion_gm_scale": 0.0}]
)
def test_limits_are_the_unsteered_model(model, tokenizer, bag, limit, perturb):
    args = steered(bag, perturb=perturb, top_k=20, temperature=1.3, **limit)
    how = {"tokenizer": tokenizer, "model": model, "prompt": [PROMPT, "w5 w6"], "seed": 3}
    plain = PPLM.sample_normal(max_length=6, k=20, t=1.3, **how)
    assert PPLM.sample_pplm(args, **how) == plain
    moved = steered(
        bag, perturb=perturb, top_k=20, temperature=1.3, stepsize=0.5, fusion_gm_scale=1.0
    )
    assert PPLM.sample_pplm(moved, **how) != plain


@pytest.mark.parametrize("family", ["gemma2_softcap", "cohere_scale", "granite_scale"])
def test_caps_and_scales_after_the_head_count(tokenizer, device, family):
    """Without a step, the perturbed logits are the model's own."""
    model = tiny(family, device).eval()
    args = steered(None, num_iterations=0, fusion_gm_scale=1.0)
    tokens = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=device)
    with steady(model):
        found = walk_of(model, args, tokenizer).start(tokens, None)
    wanted = (model(tokens).logits[:, -1] / args.temperature).log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers deprecated
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gemma2_softcap"])
@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_an_adapter_counts(tokenizer, device, target, family):
    peft = pytest.importorskip("peft")
    base = tiny(family, device)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[target]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    model.eval()
    tokens = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=device)
    wanted = model(input_ids=tokens).logits[:, -1]
    for perturb in ("hidden", "past"):
        args = steered(None, perturb=perturb, num_iterations=0, fusion_gm_scale=1.0)
        with steady(model):
            found = walk_of(model, args, tokenizer).start(tokens, None)
        log_p = (wanted / args.temperature).log_softmax(-1)
        torch.testing.assert_close(found, log_p, atol=1e-5, rtol=1e-5)
        args = steered(None, perturb=perturb, max_length=2)
        PPLM.sample_pplm(args, tokenizer=tokenizer, model=model, prompt=PROMPT, seed=0)


@pytest.mark.parametrize("perturb", ["hidden", "past", "probs"])
def test_half_precision_stays(tokenizer, bag, device, perturb):
    model = tiny_pplm.model("llama", device).bfloat16()
    args = steered(bag, perturb=perturb, stepsize=0.1)
    how = {"tokenizer": tokenizer, "model": model, "prompt": [PROMPT, "w5"], "seed": 0}
    assert PPLM.sample_pplm(args, **how) != PPLM.sample_normal(max_length=6, t=1.1, **how)
    if perturb != "probs":
        head = steered(None, perturb=perturb, stepsize=0.1)
        assert len(PPLM.sample_pplm(head, **how)) == 2


def test_bags_are_drawn_more_often(model, tokenizer, bag):
    how = {"tokenizer": tokenizer, "model": model, "prompt": ["w5 w6"] * 32, "seed": 3}
    plain = PPLM.sample_normal(max_length=10, t=1.1, **how)
    for perturb in ("hidden", "past"):
        args = steered(bag, perturb=perturb, stepsize=0.1, num_iterations=3, max_length=10)
        texts = PPLM.sample_pplm(args, **how)
        counts = [sum(w in BAG for t in each for w in t.split()) for each in (plain, texts)]
        assert counts[1] > counts[0] + 10


@pytest.mark.parametrize("method", ["top_k", "nucleus"])
def test_seeds_repeat(model, tokenizer, bag, device, method):
    args = steered(bag, top_p=0.95, max_length=12)
    how = {"tokenizer": tokenizer, "model": model, "prompt": PROMPT}
    texts = [PPLM.sample_pplm(args, sample_method=method, seed=s, **how) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    generator = torch.Generator(device).manual_seed(0)
    assert PPLM.sample_pplm(args, sample_method=method, generator=generator, **how) == texts[0]
    plain = [
        PPLM.sample_normal(method=method, p=0.95, max_length=12, seed=s, **how) for s in (0, 0)
    ]
    assert plain[0] == plain[1] and len(plain[0].split()) == 6 + 12


def test_start_is_as_asked(model, tokenizer, bag):
    how = {"tokenizer": tokenizer, "model": model, "prompt": PROMPT, "seed": 0}
    args = steered(bag, top_k=1)
    texts = [PPLM.sample_pplm(args, add_eos_start=a, **how) for a in (True, False)]
    assert all(text.startswith(PROMPT) and len(text.split()) == 6 + 6 for text in texts)
    assert texts[0] != texts[1]


def test_modes_and_flags_are_put_back(tokenizer, bag, device):
    model = tiny_pplm.model("gpt2_tied", device).train()
    PPLM.sample_pplm(steered(bag, max_length=2), tokenizer=tokenizer, model=model, prompt="w5")
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.lm_head)


def test_refusals(model, tokenizer, bag):
    how: Any = {"tokenizer": tokenizer, "model": model}
    args = steered(bag)
    for call, told in (
        ({"prompt": []}, "got no text"),
        ({"prompt": "", "add_eos_start": False}, "at least a token"),
        ({"prompt": "w1 " * 60}, "61 tokens and 6 new ones need 66 positions: the model has 64"),
        ({"sample_method": "beam"}, "sample_method must be one of top_k, nucleus"),
        ({"seed": 1, "generator": torch.Generator()}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=told):
            PPLM.sample_pplm(args, **how, **call)
    with pytest.raises(ValueError, match="k must be"):
        PPLM.sample_normal(k=-1, **how)
    with pytest.raises(ValueError, match="hidden states of 48"):
        head = PPLM.ClassificationHead(2, 48)
        wide = PPLM.pplm(method="Discrim", discrim=head, target_class_id=0)
        PPLM.sample_pplm(wide, **how)
    with pytest.raises(ValueError, match="wanted a causal language model"):
        PPLM.sample_normal(tokenizer=tokenizer, model=tiny("t5_encoder_decoder"))


WAYS = [("BoW", "hidden"), ("BoW", "past"), ("BoW", "probs"), ("Discrim", "hidden")]


@pytest.mark.parametrize(("method", "perturb"), [*WAYS, ("Discrim", "past")])
def test_within_inference_mode(model, tokenizer, bag, head_file, method, perturb):
    goal: dict[str, Any] = {"method": "BoW", "bow_list": bag}
    if method == "Discrim":
        goal = {"method": method, "discrim": "toxicity", "path": head_file, "target_class_id": 1}

    def text() -> Any:
        args = PPLM.pplm(perturb=perturb, stepsize=0.05, max_length=3, **goal)
        return PPLM.sample_pplm(args, tokenizer=tokenizer, model=model, prompt=PROMPT, seed=1)

    wanted = text()
    with torch.inference_mode():
        assert text() == wanted


def test_a_discriminator_in_the_place_of_its_head(model, tokenizer):
    made = PPLM.DiscriminatorV2(tiny_pplm.head(3), model)
    made.metadata["class_vocab"] = {"calm": 0, "loud": 2}
    args = PPLM.pplm(method="Discrim", discrim=made, target_class_id="loud", max_length=2)
    assert args.classifier is made.cl_head and args.target_class_id == 2
    assert PPLM.sample_pplm(args, tokenizer=tokenizer, model=model, prompt=PROMPT)
    with pytest.raises(TypeError, match="a discriminator is a name.*: got int"):
        PPLM.pplm(method="Discrim", discrim=3, target_class_id=0)
