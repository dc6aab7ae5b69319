"""Steering inside transformers' generate: its own arguments keep their meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from onepass.demo.train import one_thread
from onepass.pplm import generate_text_pplm, steered
from support import tiny_pplm

BAG = " ".join(tiny_pplm.BAG)


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def setting(tmp_path: Any) -> tuple[Any, Any, str]:
    """A model, a tokenizer of whole words, the path of a bag."""
    (tmp_path / "bag.txt").write_text("\n".join(tiny_pplm.BAG), "utf-8")
    model = tiny_pplm.model()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, tiny_pplm.tokenizer(), str(tmp_path / "bag.txt")


def goal(bag: str, **more: Any) -> dict[str, Any]:
    return {"bag_of_words": bag, "stepsize": 0.3, **more}


def test_greedy_equals_generate_text_pplm(setting: Any) -> None:
    model, tokenizer, bag = setting
    inputs = tokenizer(["w1 w2 w3 w4"], return_tensors="pt", return_token_type_ids=False)
    out = model.generate(
        **inputs, custom_generate=steered(tokenizer, **goal(bag)), max_new_tokens=8
    )
    indices = [[tokenizer.encode(word) for word in tiny_pplm.BAG]]
    wanted, _, _ = generate_text_pplm(
        model, tokenizer, inputs["input_ids"], bow_indices=indices, stepsize=0.3, length=8
    )
    assert out.tolist() == wanted.tolist()
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.tolist() != plain.tolist()


def test_padded_prompts_are_each_as_alone(setting: Any) -> None:
    model, tokenizer, bag = setting
    prompts = ["w1 w2 w3 w4 w5", "w9 w8"]
    tokenizer.padding_side = "left"
    how = {"custom_generate": steered(tokenizer, **goal(bag)), "max_new_tokens": 6}
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    both = model.generate(**batch, **how)
    for row, prompt in zip(both, prompts, strict=True):
        one = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
        alone = model.generate(**one, **how)
        assert row[-6:].tolist() == alone[0, -6:].tolist()


def test_processors_see_the_fused_log_probabilities(setting: Any) -> None:
    model, tokenizer, bag = setting
    inputs = tokenizer(["w1 w2 w3 w4"], return_tensors="pt", return_token_type_ids=False)
    out = model.generate(
        **inputs,
        custom_generate=steered(tokenizer, **goal(bag)),
        max_new_tokens=3,
        do_sample=True,
        top_k=5,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(out.scores) == len(out.logits) == 3
    for scores, logits in zip(out.scores, out.logits, strict=True):
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1))
        assert scores.isfinite().sum() == 5
        assert torch.equal(scores[scores.isfinite()], logits[scores.isfinite()])


def test_draws_are_seeded_and_of_several_samples(setting: Any) -> None:
    model, tokenizer, bag = setting
    inputs = tokenizer(["w1 w2 w3 w4"], return_tensors="pt", return_token_type_ids=False)

    def draw(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            **inputs,
            custom_generate=steered(tokenizer, **goal(bag), generator=generator),
            max_new_tokens=6,
            do_sample=True,
            num_return_sequences=3,
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len({tuple(row) for row in draw(1).tolist()}) == 3


def test_ends_and_streams(setting: Any) -> None:
    model, tokenizer, bag = setting

    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []
            self.ended = False

        def put(self, ids: Any) -> None:
            self.got.append(ids.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    inputs = tokenizer(["w1 w2 w3 w4"], return_tensors="pt", return_token_type_ids=False)

    def run(**options: Any) -> list[int]:
        steering = {k: options.pop(k) for k in ("stop_strings", "streamer") if k in options}
        how = steered(tokenizer, **goal(bag), **steering)
        out = model.generate(**inputs, custom_generate=how, max_new_tokens=8, **options)
        return [int(token) for token in out[0, 4:]]

    whole, streamer = run(), Streamer()
    third = next(n for n in range(1, 8) if whole[n] not in whole[:n])
    assert run(eos_token_id=whole[third]) == whole[: third + 1]
    word = tokenizer.decode(whole[third])
    assert run(stop_strings=word, streamer=streamer) == whole[: third + 1]
    assert streamer.ended
    assert streamer.got == [inputs["input_ids"][0].tolist(), *([t] for t in whole[: third + 1])]


def test_what_is_refused(setting: Any) -> None:
    model, tokenizer, bag = setting
    inputs = tokenizer(["w1 w2"], return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match="neither a bag of words nor a discriminator"):
        steered(tokenizer)
    with pytest.raises(TypeError, match="top_k is generate's to say"):
        steered(tokenizer, bag_of_words=bag, top_k=3)
    with pytest.raises(TypeError, match="no option 'step_size'.*did you mean stepsize"):
        steered(tokenizer, bag_of_words=bag, step_size=3)
    with pytest.raises(ValueError, match="num_beams must be 1"):
        model.generate(
            **inputs,
            custom_generate=steered(tokenizer, bag_of_words=bag),
            num_beams=2,
            max_new_tokens=2,
        )
