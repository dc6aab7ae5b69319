"""Steering inside `model.generate`: its prompts, processors, criteria and outputs, our next token.

`model.generate(**inputs, custom_generate=steered(tokenizer, bag_of_words="military"))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .generate import Ends, chosen, goal_by_name
from .sampling import draw
from .walk import Walk


def steered(
    tokenizer: Any,
    *,
    bag_of_words: str | Sequence[str] | None = None,
    discrim: Any = None,
    class_label: str | int | None = None,
    discrim_weights: Any = None,
    discrim_meta: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """What `generate` takes as `custom_generate`: greedy search or sampling among the fused
    log-probabilities, which its logits processors (top_k, top_p, temperature, ...) see as scores.

    Args:
        bag_of_words, discrim, class_label, discrim_weights, discrim_meta: see
            `full_text_generation`.
        stop_strings, streamer: `generate` passes neither its streamer nor its tokenizer to a
            `custom_generate`: give them here. EOS tokens, lengths and stopping_criteria are its.
        generator: of the draws with do_sample=True; None is torch's own.
        options: fields of `perturb.Steps` (stepsize is 0.02 here), gm_scale, `grad_length`, and
            `temperature` of the perturbed logits alone, as Uber's.

    Raises:
        ValueError: neither bag nor discriminator; in `generate` beams, embeddings in the place of
            ids, a model that does not fit. FileNotFoundError: a bag or head that is not there.
    """
    for name in ("top_k", "sample"):
        if name in options:
            raise TypeError(f"{name} is generate's to say: pass it top_k= and do_sample=")
    how, choice, grad_length = chosen(options)
    of_head = (discrim, class_label, discrim_weights, discrim_meta)
    goal = goal_by_name("cpu", tokenizer, bag_of_words, *of_head)
    own = streamer

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        from transformers.generation import GenerateDecoderOnlyOutput

        if generation_config.num_beams > 1:
            raise ValueError("num_beams must be 1: a beam has no past of its own to perturb")
        if model_kwargs.get("inputs_embeds") is not None or not input_ids.shape[1]:
            raise ValueError("steering needs ids: got inputs_embeds, or no token")
        if streamer is None and own is not None:
            streamer = own
            streamer.put(input_ids.cpu())
        mask, width = model_kwargs.get("attention_mask"), input_ids.shape[1]
        if goal.classifier is not None:
            with torch.inference_mode(False):
                goal.classifier.to(model.device)
        length = generation_config.max_length - width
        walk = Walk(model, input_ids, goal, how, length, mask=mask, grad_length=grad_length)
        padding = generation_config.pad_token_id
        if padding is None:
            ends = generation_config.eos_token_id
            padding = (ends[0] if isinstance(ends, list) else ends) or 0
        ends = Ends(tokenizer, len(input_ids), None, stop_strings)
        running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        scores: list[Tensor] = []
        raw: list[Tensor] = []
        while bool(running.any()):
            fused = choice.fused(walk.next())
            of_step = logits_processor(walk.ids, fused.clone())
            if generation_config.output_scores:
                scores.append(of_step)
            if generation_config.output_logits:
                raw.append(fused)
            if generation_config.do_sample:
                tokens = draw(of_step.softmax(-1), generator)[:, 0]
            else:
                tokens = of_step.argmax(-1)
            tokens = tokens.masked_fill(~running, padding)
            walk.append(tokens)
            if streamer is not None:
                streamer.put(tokens.cpu())
            running = running & ~stopping_criteria(walk.ids, tuple(scores))
            if stop_strings:
                ends.take(tokens)
                running = running & ~tokens.new_tensor(ends.ended, dtype=torch.bool)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return walk.ids
        return GenerateDecoderOnlyOutput(
            sequences=walk.ids,
            scores=tuple(scores) if generation_config.output_scores else None,
            logits=tuple(raw) if generation_config.output_logits else None,
        )

    return decode
