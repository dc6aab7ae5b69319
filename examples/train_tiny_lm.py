"""A bare training loop and the one line that changes: F.cross_entropy -> onepass.cross_entropy.

A byte-level language model learns Python's own documentation twice from the same start, once with
either loss, and the two runs are printed side by side. A CPU takes about ten seconds.

    python examples/train_tiny_lm.py
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onepass

VOCAB_SIZE = 256  # bytes
WINDOW = 64
ROWS = 16
STEPS = 60


class TinyLanguageModel(nn.Module):
    """Bytes -> logits of the next byte, through one recurrent layer."""

    def __init__(self, hidden_size: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.recur = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, VOCAB_SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recur(self.embed(ids))[0])  # [B, T, V]


def documentation() -> Tensor:
    """The language reference as help() prints it, as bytes."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()


def train(loss_function: Callable[[Tensor, Tensor], Tensor], text: Tensor) -> list[float]:
    """Losses of all steps; the same weights and batches every time."""
    torch.manual_seed(0)
    model = TinyLanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(text) - WINDOW, (ROWS,))
        batch = text[starts[:, None] + torch.arange(WINDOW + 1)]
        logits = model(batch[:, :-1])
        loss = loss_function(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.set_num_threads(1)  # on tensors this small more threads wait longer than they work
    text = documentation()
    before = train(F.cross_entropy, text)
    after = train(onepass.cross_entropy, text)  # the one line
    print(f"{'step':>4}  {'torch':>8}  {'onepass':>8}")
    for step in (*range(0, STEPS, 20), STEPS - 1):
        print(f"{step:>4}  {before[step]:>8.4f}  {after[step]:>8.4f}")
    print(f"largest difference: {max(abs(a - b) for a, b in zip(after, before, strict=True)):.1e}")


if __name__ == "__main__":
    main()
