"""transformers.Trainer and the one line that changes: model = onepass.lazy_head(model).

A tiny Llama from random numbers takes the same steps with and without. Printed are its losses and
the most bytes that torch held at one time during training. A CPU takes about twenty seconds.

    python examples/lazy_head_trainer.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import onepass

VOCAB_SIZE = 32_000
WINDOW = 128
ROWS = 8  # with 32,000 logits for each of 8 x 128 tokens: 131 MB in float32
STEPS = 3


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB_SIZE, num_attention_heads=4, num_key_value_heads=4, **sizes)
    )


def train(model: LlamaForCausalLM, folder: str) -> tuple[list[float], int]:
    """The loss of every step, and the most bytes held at one time."""
    ids = torch.randint(VOCAB_SIZE, (ROWS, WINDOW), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        log_level="error",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trace = Path(folder, "trace.json")
    profiler.export_chrome_trace(str(trace))
    held = peak = 0
    events = json.loads(trace.read_text())["traceEvents"]
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return losses, peak


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        before, bytes_before = train(tiny_llama(), folder)
        model = onepass.lazy_head(tiny_llama())  # the one line
        after, bytes_after = train(model, folder)
    print(f"{'step':>5}  {'without':>8}  {'lazy_head':>9}")
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        print(f"{step:>5}  {old:>8.4f}  {new:>9.4f}")
    print(f"{'peak':>5}  {bytes_before / 1e6:>5.0f} MB  {bytes_after / 1e6:>6.0f} MB")


if __name__ == "__main__":
    main()
