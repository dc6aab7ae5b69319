"""What `onepass dpo evaluate` measures, against closed forms and unfused torch; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.cli import main

pytest.importorskip("transformers")
pytest.importorskip("peft")
from onepass.dpo.evaluate import (  # noqa: E402
    distinct,
    kl_of_answers,
    kl_rows,
    mean_and_error,
    measure,
    token_entropy,
)
from onepass.dpo.generate import Answer, Sampling, prompt_ids, sample_answers  # noqa: E402
from onepass.dpo.logps import sequence_logps  # noqa: E402
from onepass.dpo.reward import RewardFlags, parse_reward  # noqa: E402
from support import tiny_reward  # noqa: E402
from support.tiny_language_model import tokenizer  # noqa: E402
from support.tiny_models import SIZES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SAMPLING = Sampling(num_answers=4, max_new_tokens=6, batch_size=8, seed=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, adapter/ of it, merged/ (the model with the adapter in its weights), small/
    (another model)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dpo")
    tiny_reward.save(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(0)
    made = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    made.save_pretrained(folder / "run" / "adapter")
    made.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer().save_pretrained(folder / "merged")
    other = LlamaConfig(**SIZES | {"hidden_size": 16})
    LlamaForCausalLM(other).save_pretrained(folder / "small")
    tokenizer().save_pretrained(folder / "small")
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["dpo", "evaluate", *map(str, args), "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


# -- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "entropy"),
    [
        ([[7] * 5, [7]], 0.0),
        ([[1, 2], [3, 4]], math.log(4)),
        ([[1, 1, 1], [2]], -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
        ([[], [1, 2]], math.log(2)),
        ([[]], 0.0),
    ],
)
def test_token_entropy_in_nats(answers: list[list[int]], entropy: float) -> None:
    assert token_entropy(answers) == pytest.approx(entropy, abs=1e-12)


def test_token_entropy_does_not_depend_on_the_order_of_answers() -> None:
    answers = [[n % 5, n % 3, 9] for n in range(20)]  # as the notebook's does
    assert token_entropy(answers) == pytest.approx(token_entropy(answers[::-1]), abs=1e-12)
    assert token_entropy(answers) == pytest.approx(token_entropy(answers * 7), abs=1e-12)


def test_distinct() -> None:
    answers = [[1, 2, 1, 2], [1, 2]]
    assert distinct(answers, 1) == 2 / 6
    assert distinct(answers, 2) == 2 / 4  # (1, 2) and (2, 1); none across answers
    assert distinct(answers, 3) == 2 / 2
    assert distinct(answers, 5) is None


def test_the_error_is_that_of_the_prompts_means() -> None:
    assert mean_and_error([3.0], [0]) == (3.0, None)
    mean, error = mean_and_error([1.0, 2.0, 3.0], [0, 0, 0])
    assert mean == 2.0 and error == pytest.approx(1 / math.sqrt(3))
    mean, error = mean_and_error([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1])  # two units, not four
    assert mean == 2.0 and error == pytest.approx(1.0)


def test_kl_of_rows_that_are_known() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    logits, other = p.log().expand(1, 2, 3), q.log().expand(1, 2, 3) + 3
    found = kl_rows(logits, other, torch.tensor([[True, False]]))
    torch.testing.assert_close(found, torch.tensor([[0.25 * math.log(2), 0.0]]))


# -- of models --------------------------------------------------------------------------------


def naive(policy: Any, reference: Any, prompts: list[list[int]], answers: list[Answer]) -> Any:
    """KL of each answer, one at a time, over the whole vocabulary."""
    sums = []
    for answer in answers:
        before = prompts[answer.prompt]
        ids = torch.tensor([[*before, *answer.ids]])
        with torch.no_grad():
            log_p, log_q = (m(ids).logits[0].double().log_softmax(-1) for m in (policy, reference))
        rows = slice(len(before) - 1, len(before) + len(answer.ids) - 1)
        sums.append(float((log_p.exp() * (log_p - log_q))[rows].sum()))
    return sums


def test_kl_of_answers_is_that_of_unfused_torch(files: Path) -> None:
    from peft import PeftModel

    base, merged = load(files / "model"), load(files / "merged")
    policy = PeftModel.from_pretrained(load(files / "model"), files / "run" / "adapter").eval()
    ids = prompt_ids(base, tokenizer(), tiny_reward.PROMPTS, 6)
    answers = sample_answers(policy, tokenizer(), tiny_reward.PROMPTS, SAMPLING)
    answers[0] = answers[0]._replace(ids=answers[0].ids[:1])  # of other lengths
    expected = naive(merged, base, ids, answers)
    assert min(expected) > 0.01
    under_adapter = kl_of_answers(policy, None, ids, answers, 0, batch_size=5)
    assert under_adapter == pytest.approx(expected, rel=1e-3)
    of_two = kl_of_answers(merged, base, ids, answers, 0, batch_size=5)
    assert of_two == pytest.approx(expected, rel=1e-3)
    assert kl_of_answers(base, load(files / "model"), ids, answers, 0) == [0.0] * len(answers)


def test_kl_estimates_the_mean_log_ratio_of_own_answers(files: Path) -> None:
    policy, reference = load(files / "merged"), load(files / "model")
    n = 1500
    sampling = Sampling(num_answers=n, max_new_tokens=2, batch_size=n)
    answers = sample_answers(policy, tokenizer(), ["a"], sampling)
    ids = prompt_ids(policy, tokenizer(), ["a"], 2)
    exact = torch.tensor(kl_of_answers(policy, reference, ids, answers, 0, batch_size=n))
    labels = torch.full((n, len(ids[0]) + 2), -100)
    for row, answer in zip(labels, answers, strict=True):
        row[len(ids[0]) : len(ids[0]) + len(answer.ids)] = torch.tensor(answer.ids)
    whole = labels.clamp(min=0)
    whole[:, : len(ids[0])] = torch.tensor(ids[0])
    with torch.no_grad():
        now, before = (sequence_logps(m(whole).logits, labels).logps for m in (policy, reference))
    found = now - before
    assert abs(float(exact.mean() - found.mean())) < 4 * float(found.std()) / math.sqrt(n)
    assert float(exact.var()) < float(found.var())


def test_measure(files: Path) -> None:
    model = load(files / "model")
    reward = parse_reward(RewardFlags("support.tiny_reward:letters"))
    facts = measure(
        model, tokenizer(), tiny_reward.PROMPTS, SAMPLING, reward, reward.load(), reference=model
    )
    answers = sample_answers(model, tokenizer(), tiny_reward.PROMPTS, SAMPLING)
    rewards = tiny_reward.letters([a.text for a in answers])
    assert facts["reward"] == pytest.approx(sum(rewards) / 12)
    assert (facts["answers"], facts["prompts"]) == (12, 3)
    special = frozenset(tokenizer().all_special_ids)
    assert facts["token_entropy"] == token_entropy([a.content(special) for a in answers])
    assert facts["kl_per_token"] == facts["kl_per_sequence"] == 0.0
    assert [s["prompt"] for s in facts["samples"]] == tiny_reward.PROMPTS
    whole = measure(
        model, tokenizer(), tiny_reward.PROMPTS, SAMPLING, reward, reward.load(), score_prompt=True
    )
    more = 4 * sum(tiny_reward.letters(tiny_reward.PROMPTS)) / 12
    assert whole["reward"] == pytest.approx(facts["reward"] + more)
    assert whole["kl_per_token"] is None


# -- the command ------------------------------------------------------------------------------


def test_evaluate(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--prompts", files / "prompts.txt", "--reward", "code", "--max_new_tokens", 6)
    model = ("--model", files / "model", "--adapter", files / "run")
    code, table, err = cli(capsys, *model, *args, "--output", tmp_path / "a.json")
    assert code == 0, err
    assert "token entropy, nats" in table and "9 answers to 3 prompts" in table
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["kl_per_token"] > 0 and facts["kl_per_sequence_error"] > 0

    merged = ("--model", files / "merged", "--reference", files / "model", "--json")
    code, text, err = cli(capsys, *merged, *args)
    assert code == 0, err
    other = json.loads(text)
    assert other["reward"] == facts["reward"]
    assert other["kl_per_sequence"] == pytest.approx(facts["kl_per_sequence"], rel=1e-3)
    code, table, _ = cli(capsys, "--model", files / "model", *args)
    assert code == 0 and any(
        line.startswith("KL to the reference, a token") and line.endswith(" -")
        for line in table.splitlines()
    )


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        ("--adapter {model}", 2, "--adapter: no adapter_config.json"),
        ("--reference ./nowhere", 2, "--reference: no such folder"),
        ("--output a.jsonl", 2, "wanted a name that ends in .json"),
        ("--reference {small}", 1, "--reference: "),
        ("--adapter {adapter} --model {small}", 1, "--adapter: "),
        ("--output {model}/config.json", 2, "--overwrite replaces it"),
        ("--num_answers 0", 2, "--num_answers: got 0"),
    ],
)
def test_what_is_refused(
    args: str,
    code: int,
    told: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = {"model": files / "model", "small": files / "small", "adapter": files / "run"}
    always = f"--model {where['model']} --reward code --prompts {files / 'prompts.txt'}"
    found, out, err = cli(capsys, *always.split(), *args.format(**where).split())
    assert (found, out) == (code, ""), err
    assert told in err and len(err.splitlines()) <= 3
