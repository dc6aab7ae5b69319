"""Models with lazy heads, and LazyLogits, through pickle: users send and save them so.

The only file of the tests that may pickle, since test_house.py forbids it: bytes made here, read
here.
"""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import onepass
from onepass import LazyLogits

pytest.importorskip("transformers", reason="the models are those of transformers")

from support.tiny_models import batch_of, tiny


@pytest.mark.parametrize("name", ["llama", "gpt2_tied"])
def test_pickled_whole(name: str, device: str) -> None:
    model, batch = onepass.lazy_head(tiny(name, device)), batch_of(name, device)
    twin = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert onepass.report(other).fused
        with torch.no_grad():
            model_loss, other_loss = model(**batch).loss, other(**batch).loss
            assert torch.equal(model_loss, other_loss)
            other.get_output_embeddings().weight.zero_()
            assert torch.equal(model(**batch).loss, model_loss)


def test_lazy_logits_become_what_they_stand_for(device: str) -> None:
    hidden, weight = torch.randn(3, 4, device=device), torch.randn(7, 4, device=device)
    back = pickle.loads(pickle.dumps(LazyLogits(hidden, weight)))
    assert type(back) is Tensor
    torch.testing.assert_close(back, functional.linear(hidden, weight))
