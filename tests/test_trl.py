"""The contract with TRL: its trainers give the same losses and gradients with our head as with
theirs, and a TRL that has moved what is replaced is told apart before anything changes."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from support.environment import DEVICE

trl = pytest.importorskip(
    "trl",
    minversion="1.16.0",
    reason="TRL is optional, and before 1.16 its trainers call lm_head.forward: nothing to replace",
    exc_type=ImportError,
)
bridge: Any = onepass.integrations.trl
home = importlib.import_module("trl.trainer.utils")
THEIRS = home._ChunkedLogProbFunction

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))]
V, D = len(WORDS), 16


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No ping from TRL's trainers, one thread for their small tensors, and TRL's own head before
    and after every test."""
    monkeypatch.setenv("CI", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert home._ChunkedLogProbFunction is THEIRS
    yield
    torch.set_num_threads(threads)
    bridge.disable()
    assert home._ChunkedLogProbFunction is THEIRS


# ---------------------------------------------------------------- the function itself


def head_inputs(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"hidden": (rows, D), "weight": (V, D), "bias": (V,)}
    made = {name: torch.randn(shape).to(DEVICE, dtype) for name, shape in shapes.items()}
    return {name: t.requires_grad_(True) for name, t in made.items()}


ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SETTINGS = {
    "plain": ((1.0, 32, None, 1.0), ("log_probs", *ALL)),
    "granite-scale": ((1.0, 32, None, 1 / 8), ("log_probs", *ALL)),
    "gemma-cap": ((1.0, 32, 3.0, 1.0), ("log_probs", *ALL)),
    "cap-scale-temperature": ((0.7, 16, 2.0, 1.5), ("log_probs", *ALL)),
    "reference-model": ((1.0, 32, None, 1.0), ("log_probs",)),
    "sft": ((1.0, 32, None, 1.0), ("log_probs", "entropy", "is_top1")),
    "no-rows": ((1.0, 32, None, 1.0), ("log_probs", *ALL)),
}


@pytest.mark.parametrize("with_bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("name", SETTINGS)
def test_apply_gives_what_theirs_gives(name: str, with_bias: bool) -> None:
    (temperature, chunk, cap, scale), outputs = SETTINGS[name]
    given = head_inputs(0 if name == "no-rows" else 9)
    bias = given["bias"] if with_bias else None
    targets = torch.randint(0, V, (given["hidden"].shape[0],)).to(DEVICE)
    if name != "no-rows":  # one target that is the best, so that is_top1 says both
        with torch.no_grad():
            given["hidden"][0] = given["weight"][targets[0]] * 4
    facts = ("log_probs", *ALL)
    upstream = torch.randn(2, *targets.shape).to(DEVICE)
    leaves = [given["hidden"], given["weight"], *([bias] if bias is not None else [])]

    def run(function: Any) -> tuple[dict[str, Tensor | None], list[Tensor]]:
        told = dict(
            zip(
                facts,
                function.apply(
                    given["hidden"], given["weight"], bias, targets, temperature, chunk, cap, scale,
                    outputs,
                ),
                strict=True,
            )
        )  # fmt: skip
        loss = (told["log_probs"] * upstream[0]).sum()
        if told["entropy"] is not None:
            loss = loss + (told["entropy"] * upstream[1]).sum()
        return told, list(torch.autograd.grad(loss, leaves))

    (ours, our_grads), (theirs, their_grads) = run(bridge.HeadLogProbs), run(THEIRS)
    for fact in facts:
        got, expected = ours[fact], theirs[fact]
        if expected is None:
            assert got is None, fact
            continue
        assert got is not None and got.dtype == expected.dtype, fact
        assert got.requires_grad == expected.requires_grad, fact
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=fact)
    for got, expected in zip(our_grads, their_grads, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast_over_a_float32_head() -> None:
    given = head_inputs(40)
    targets = torch.randint(0, V, (40,)).to(DEVICE)
    leaves = [given["hidden"], given["weight"]]
    exact = torch.nn.functional.linear(given["hidden"].double(), given["weight"].double())
    truth = exact.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    true_grads = torch.autograd.grad(truth.sum(), leaves)
    truth = truth.detach()

    def errors(function: Any) -> list[float]:
        with torch.autocast(DEVICE, torch.bfloat16):
            logp, *_ = function.apply(
                given["hidden"], given["weight"], None, targets, 1.0, 32, None, 1.0, ("log_probs",)
            )
        assert logp.dtype == torch.float32
        grads = torch.autograd.grad(logp.sum(), leaves)
        assert [grad.dtype for grad in grads] == [torch.float32] * 2
        pairs = [(logp, truth), *zip(grads, true_grads, strict=True)]
        return [float((got.detach() - want).norm() / want.norm()) for got, want in pairs]

    for ours, theirs in zip(errors(bridge.HeadLogProbs), errors(THEIRS), strict=True):
        assert ours <= 1.1 * theirs + 2**-9  # the one rounding of a cast weight's gradient


# ---------------------------------------------------------------- the trainers


def tiny_model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def sentences(least: int, before: str = "") -> list[str]:
    """Eight of them, of `least` to `least + 5` words."""
    pick = torch.Generator().manual_seed(least)
    lengths = torch.randint(least, least + 6, (8,), generator=pick).tolist()
    return [
        before + " ".join(WORDS[i] for i in torch.randint(3, V, (n,), generator=pick).tolist())
        for n in lengths
    ]


def train(
    kind: str, folder: Path, tokenizer: Any, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of every step and the gradients before each of the optimizer's, of a fresh run."""
    from datasets import Dataset
    from transformers import TrainerCallback

    others: dict[str, Any] = {}
    rows: dict[str, list[Any]] = {"prompt": sentences(2)}
    if kind == "DPO":
        rows |= {"chosen": sentences(3, " "), "rejected": sentences(4, " ")}
    else:
        rows |= {"completion": sentences(3, " ")}
    if kind == "KTO":
        rows["label"] = [True, False] * 4
    if kind != "SFT":
        others["ref_model"] = tiny_model(1)
    model = tiny_model(0)
    losses: list[Tensor] = []
    grads: list[Tensor] = []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            grads.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)

    class Recording(getattr(trl, f"{kind}Trainer")):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach().clone())
            return loss

    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", report_to="none", save_strategy="no",
        bf16=False, use_cpu=DEVICE == "cpu", disable_tqdm=True, gradient_checkpointing=False,
        dataloader_pin_memory=False, logging_steps=1, seed=0, **options,
    )  # fmt: skip
    trainer = Recording(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[Record()],
        **others,
    )
    trainer.train()
    return losses, grads


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("DPO", {"loss_type": "sigmoid"}),
    "ipo": ("DPO", {"loss_type": "ipo"}),
    "hinge": ("DPO", {"loss_type": "hinge"}),
    "reverse_kl": ("DPO", {"f_divergence_type": "reverse_kl", "beta": 0.5}),
    "js_divergence": ("DPO", {"f_divergence_type": "js_divergence"}),
    "alpha_divergence": (
        "DPO",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
    ),
    "weighted": ("DPO", {"use_weighting": True}),
    "kto": ("KTO", {}),
    "sft": ("SFT", {}),
    "sft-dft": ("SFT", {"loss_type": "dft"}),
}


@pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own, which are not under test
@pytest.mark.parametrize("name", RUNS)
def test_trainer_learns_the_same(name: str, tmp_path: Path, tokenizer: Any) -> None:
    kind, options = RUNS[name]
    losses, grads = train(kind, tmp_path / "theirs", tokenizer, **options)
    calls = itertools.count()
    with bridge.enabled(), pytest.MonkeyPatch.context() as patch:
        ours = bridge.HeadLogProbs.apply
        patch.setattr(
            bridge.HeadLogProbs,
            "apply",
            staticmethod(lambda *given: (next(calls), ours(*given))[1]),
        )
        our_losses, our_grads = train(kind, tmp_path / "ours", tokenizer, **options)
    assert next(calls) >= 3, "the trainer went past the head"
    assert len(losses) == len(our_losses) == 3 and len(grads) == len(our_grads) > 0
    assert float(torch.stack(grads[-1:]).abs().max()) > 0
    for got, expected in zip([*our_losses, *our_grads], [*losses, *grads], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- our losses under its DPOTrainer


@pytest.fixture(scope="module")
def dpo_batches(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What makes, of options, the loss, gradients and metrics of one batch of 4 pairs."""
    from datasets import Dataset

    rows = {"prompt": sentences(2), "chosen": sentences(3, " "), "rejected": sentences(4, " ")}
    folder = tmp_path_factory.mktemp("dpo")

    def run(far: bool = False, **options: Any) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        # A near reference has log-ratios of about 1, a far one of about 30.
        reference = tiny_model(int(far))
        pick = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=pick)
        config = trl.DPOConfig(
            output_dir=str(folder), per_device_train_batch_size=4, report_to="none", bf16=False,
            use_cpu=DEVICE == "cpu", disable_tqdm=True, gradient_checkpointing=False,
            dataloader_pin_memory=False, seed=0, **options,
        )  # fmt: skip
        model = tiny_model(0)
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=reference,
            args=config,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return loss.detach(), grads, dict(trainer._metrics["train"])

    return run


THEIR_LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
OF_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in THEIR_LOSS_TYPES},
    **{
        f"{name}-{divergence}": {"loss_type": name, "f_divergence_type": divergence}
        for name in OF_SCORES
        for divergence in DIVERGENCES
    },
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "weighted": {"loss_type": ["sigmoid", "ipo"], "use_weighting": True},
    "length-desensitized": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "length-desensitized-sft": {"loss_type": ["ipo", "sft"], "ld_alpha": 0.3},
    "precomputed": {"loss_type": "sigmoid", "precompute_ref_log_probs": True},
    "without a prompt left": {
        "loss_type": ["ipo", "sigmoid_norm"],
        "max_length": 4,
        "truncation_mode": "keep_end",
    },
    "alpha-above-1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.3},
    "alpha-limit": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOSSES)
def test_our_losses_are_theirs(name: str, dpo_batches: Any) -> None:
    # Ours honours the smoothing of sigmoid, which TRL leaves out: under its trainer it stays out.
    options = {"beta": 0.3, "label_smoothing": 0.1} | LOSSES[name]
    expected, expected_grads, their_metrics = dpo_batches(**options)
    with bridge.enabled(losses=True), pytest.MonkeyPatch.context() as patch:
        calls: list[str] = []

        def watched(*args: Any, loss_type: str, **kwargs: Any) -> Any:
            calls.append(loss_type)
            return onepass.dpo.dpo_loss(*args, loss_type=loss_type, **kwargs)

        patch.setattr(bridge, "dpo_loss", watched)
        got, grads, metrics = dpo_batches(**options)
    kinds = options.get("loss_type", "sigmoid")
    assert calls == ([kinds] if isinstance(kinds, str) else kinds)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert len(grads) == len(expected_grads) and sum(float(g.abs().sum()) for g in grads) > 0
    size = max(1.0, *(float(g.abs().max()) for g in expected_grads))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * size)
    assert metrics.keys() == their_metrics.keys()
    for key, value in their_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.filterwarnings("ignore")
def test_finite_where_theirs_overflow(dpo_batches: Any) -> None:
    options = {"far": True, "beta": 100.0, "loss_type": "discopop"}
    theirs, *_ = dpo_batches(**options)
    assert theirs.isnan(), "TRL has mended it: migrate.md says otherwise"
    with bridge.enabled(losses=True):
        got, grads, _ = dpo_batches(**options)
    assert got.isfinite() and all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["slic_hf", "JSD", "FKL", "RKL", "alpha"])
def test_loss_types_that_they_have_not(name: str, dpo_batches: Any) -> None:
    with pytest.raises(ValueError, match="Unknown loss type"):
        dpo_batches(loss_type=name)
    options = {
        "JSD": {"f_divergence_type": "js_divergence"},
        "FKL": {"f_divergence_type": "forward_kl"},
        "RKL": {},
        "alpha": {"f_divergence_type": "alpha_divergence"},
    }
    with bridge.enabled(losses=True):
        got, grads, _ = dpo_batches(loss_type=name)
    assert float(grads[0].abs().sum()) > 0
    if name in options:
        expected, *_ = dpo_batches(loss_type="sigmoid", **options[name])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_our_losses_learn_the_same(tmp_path: Path, tokenizer: Any) -> None:
    options = {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.5]}
    losses, grads = train("DPO", tmp_path / "theirs", tokenizer, **options)
    with bridge.enabled(losses=True):
        our_losses, our_grads = train("DPO", tmp_path / "ours", tokenizer, **options)
    for got, expected in zip([*our_losses, *our_grads], [*losses, *grads], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def tiny_mixture() -> Any:
    """A mixture of experts whose router has a loss of its own."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=2, num_local_experts=4,
        num_attention_heads=2, num_key_value_heads=2, output_router_logits=True,
        router_aux_loss_coef=0.5, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).to(DEVICE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "mixture"])
def test_our_losses_with_an_adapter(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """The reference is the same model with its adapter off: two forwards of one module. Virtual
    tokens stand before the real ones; a router's loss is added."""
    from datasets import Dataset

    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if kind == "prompt tuning":
        adapter = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    rows = {"prompt": sentences(2), "chosen": sentences(3, " "), "rejected": sentences(4, " ")}

    def run() -> tuple[Tensor, list[Tensor]]:
        config = trl.DPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, report_to="none", bf16=False,
            use_cpu=DEVICE == "cpu", disable_tqdm=True, gradient_checkpointing=False, seed=0,
            dataloader_pin_memory=False, f_divergence_type="js_divergence", beta=2.0,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = trl.DPOTrainer(
            model=tiny_mixture() if kind == "mixture" else tiny_model(0),
            args=config,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            peft_config=adapter,
        )
        pick = torch.Generator().manual_seed(0)
        for parameter_name, parameter in trainer.model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=pick).to(DEVICE)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss, _ = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
        return loss.detach(), [p.grad for p in trainer.model.parameters() if p.grad is not None]

    expected, expected_grads = run()
    with bridge.enabled(losses=True):
        got, grads = run()
    assert abs(float(got) - 0.6931) > 0.01, "policy and reference are one"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_losses_on_and_off() -> None:
    trainer, theirs = trl.DPOTrainer, trl.DPOTrainer._compute_loss
    bridge.enable()
    assert trainer._compute_loss is theirs, "only on request"
    bridge.enable(losses=True)
    bridge.enable(losses=True)
    assert trainer._compute_loss is bridge.dpo_compute_loss
    with bridge.enabled():
        assert trainer._compute_loss is bridge.dpo_compute_loss
    assert trainer._compute_loss is bridge.dpo_compute_loss, "the outer one still holds"
    bridge.disable()
    assert trainer._compute_loss is theirs and home._ChunkedLogProbFunction is THEIRS
    bridge.enable()
    with bridge.enabled(losses=True):
        assert trainer._compute_loss is bridge.dpo_compute_loss
    assert trainer._compute_loss is theirs
    assert home._ChunkedLogProbFunction is bridge.HeadLogProbs, "it was there before"


def test_says_so_when_their_loss_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trl.DPOTrainer, "_compute_loss", lambda self, model, batch: None)
        with pytest.raises(RuntimeError, match="self, model, batch") as caught:
            bridge.enable(losses=True)
        one_sentence(caught)
        assert home._ChunkedLogProbFunction is THEIRS
        patch.delattr(trl.DPOTrainer, "_compute_loss")
        with pytest.raises(RuntimeError, match="is not there"):
            bridge.enable(losses=True)


# ---------------------------------------------------------------- putting it there, and back


def test_on_and_off_and_on() -> None:
    bridge.disable()
    assert home._ChunkedLogProbFunction is THEIRS
    bridge.enable()
    bridge.enable()
    assert home._ChunkedLogProbFunction is bridge.HeadLogProbs
    bridge.disable()
    assert home._ChunkedLogProbFunction is THEIRS
    with bridge.enabled():
        with bridge.enabled():
            assert home._ChunkedLogProbFunction is bridge.HeadLogProbs
        assert home._ChunkedLogProbFunction is bridge.HeadLogProbs, "the outer one still holds"
    assert home._ChunkedLogProbFunction is THEIRS
    with pytest.raises(KeyError), bridge.enabled():
        raise KeyError
    assert home._ChunkedLogProbFunction is THEIRS


def test_another_patch_on_top_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.enable()
    other = object()
    with monkeypatch.context() as patch:
        patch.setattr(home, bridge.NAME, other)
        bridge.disable()
        assert home._ChunkedLogProbFunction is other


def one_sentence(caught: pytest.ExceptionInfo[BaseException]) -> str:
    said = str(caught.value)
    assert "\n" not in said and len(said) < 200, said
    return said


def test_says_so_when_the_name_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(home, bridge.NAME)
        before = dict(vars(home))
        with pytest.raises(RuntimeError) as caught:
            bridge.enable()
        said = one_sentence(caught)
        assert "_ChunkedLogProbFunction" in said and "is not there" in said and "1.16" in said
        assert dict(vars(home)) == before


def test_says_so_when_the_arguments_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer:
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, labels: Any) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(home, bridge.NAME, Newer)
        with pytest.raises(RuntimeError, match="hidden, weight, labels") as caught:
            bridge.enable()
        one_sentence(caught)
        assert home._ChunkedLogProbFunction is Newer


@pytest.mark.parametrize("version", ["1.10.0", "0.29.1", None], ids=str)
def test_says_which_version_it_wants(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def told(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", told)
    with pytest.raises(ImportError, match="1.16") as caught:
        bridge.enable()
    assert (version or "none found") in one_sentence(caught)
    assert home._ChunkedLogProbFunction is THEIRS


def test_enabled_before_the_trainers_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everywhere else in this file TRL came first.
    monkeypatch.setattr(importlib.import_module("trl.trainer"), "utils", home)  # to be put back
    monkeypatch.delitem(sys.modules, bridge.HOME)
    bridge.enable()
    fresh = importlib.import_module(bridge.HOME)
    assert fresh is not home
    head = fresh.add_fused_lm_head.__globals__[bridge.NAME]
    assert head is bridge.HeadLogProbs
    bridge.disable()
    assert fresh._ChunkedLogProbFunction is THEIRS


def test_stays_with_theirs_under_zero_3() -> None:
    given = head_inputs(4)
    given["weight"].ds_id = 1  # type: ignore[attr-defined]
    targets = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    bridge.enable()
    args = (given["hidden"], given["weight"], None, targets, 1.0, 32, None, 1.0, ("log_probs",))
    with pytest.warns(UserWarning, match="ZeRO-3"):
        logp, *rest = home._ChunkedLogProbFunction.apply(*args)
    assert rest == [None] * 4
    assert torch.equal(logp, THEIRS.apply(*args)[0])
