"""The values that options of circuit breakers take, apart from torch: a command lists them."""

from __future__ import annotations

RETAIN_REDUCTIONS = ("all", "unmasked")
RELU_SCOPES = ("token", "total")
SCHEDULES = ("linear_converge", "constant", "readme_text")
CONVENTIONS = ("hf_hidden_states", "block")
ADAPTER_OFF, FROZEN_COPY, PRECOMPUTED = "adapter_off", "frozen_copy", "precomputed"
REFERENCES = (ADAPTER_OFF, FROZEN_COPY, PRECOMPUTED)
