"""`onepass dpo pairs`: the pairs' properties, the rewards, the draws, what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.cli import main
from onepass.cli.errors import Failed, UsageError
from onepass.dpo.pairs import draw_pairs
from onepass.dpo.reward import Reward, RewardFlags, code_shares, keyword_counts, parse_reward

pytest.importorskip("transformers")
from onepass.dpo import PreferenceDataset  # noqa: E402
from onepass.dpo.examples import read_pairs  # noqa: E402
from onepass.dpo.generate import Sampling, sample_answers, texts_of  # noqa: E402
from support import tiny_reward  # noqa: E402
from support.tiny_language_model import BENIGN, CHAT, HARMFUL, tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FUNCTION = "support.tiny_reward:letters"
DRAW = ("--num_answers", "6", "--max_new_tokens", "5", "--pairs_per_prompt", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    tiny_reward.save(folder)
    tiny_reward.save_classifier(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def model(files: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(files / "model").eval()


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["dpo", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


# -- pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_different_answers_to_one_prompt_and_the_better_is_chosen(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [f"p{n}" for n in range(4)]
    answers = [[draw.choice("abcdef ") for _ in range(12)] for _ in prompts]
    score = {text: draw.randrange(4) / 2 for text in "abcdef "}
    scores = [[score[text] for text in texts] for texts in answers]
    pairs, counts = draw_pairs(prompts, answers, scores, 5, seed)
    for pair in pairs:
        assert {pair.chosen, pair.rejected} <= set(answers[prompts.index(str(pair.prompt))])
        assert pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected
        assert pair.chosen_score > pair.rejected_score
        assert (pair.chosen_score, pair.rejected_score) == (
            score[pair.chosen],
            score[pair.rejected],
        )
    assert len(set(pairs)) == len(pairs) == counts["pairs"]
    assert max(Counter(pair.prompt for pair in pairs).values()) <= 5
    assert counts["answers"] == 48 and counts["prompts"] == 4


def test_what_is_left_out_is_counted() -> None:
    answers = [["a", "a", " ", "b", "c"], ["x", "y"], ["z"]]
    scores = [[1.0, 1.0, 9.0, 1.0, 2.0], [3.0, 3.0], [1.0]]
    pairs, counts = draw_pairs(["p", "q", "r"], answers, scores, 3, 0)
    assert sorted(pairs) == [("p", "c", "a", 2.0, 1.0), ("p", "c", "b", 2.0, 1.0)]
    assert counts == {
        "prompts": 3,
        "answers": 8,
        "blank_answers": 1,
        "repeated_answers": 1,
        "tied_pairs": 2,
        "pairs": 2,
        "prompts_without_pairs": 2,
        "prompts_with_fewer_pairs": 1,
    }


def test_as_many_pairs_as_asked_for_and_the_same_of_one_seed() -> None:
    answers, scores = [[f"a{n}" for n in range(50)]], [[float(n) for n in range(50)]]
    pairs, counts = draw_pairs(["p"], answers, scores, 50, 0)
    assert len(pairs) == 50 and counts["prompts_with_fewer_pairs"] == 0
    assert draw_pairs(["p"], answers, scores, 50, 0).pairs == pairs
    assert draw_pairs(["p"], answers, scores, 50, 1).pairs != pairs
    assert len(draw_pairs(["p"], answers, scores, 5000, 0).pairs) == 50 * 49 // 2


# -- rewards ----------------------------------------------------------------------------------


def test_keywords_are_whole_words_of_any_case() -> None:
    score = keyword_counts(("good", "c++"))
    texts = ["Good, GOOD and goodness", "c++ is good", "", "ungood"]
    assert score(texts) == [2.0, 2.0, 0.0, 0.0]


def test_keywords_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("Good bad\nGOOD\n")
    reward = parse_reward(RewardFlags(f"keyword:@{tmp_path / 'words'}"))
    assert reward == Reward("keyword", ("good", "bad"))
    assert reward.scores(reward.load(), ["a bad good", "?"]) == [2.0, 0.0]


def test_code_scores_above_prose() -> None:
    assert min(code_shares(HARMFUL)) > 0.15 > 0.01 >= max(code_shares(BENIGN))
    assert code_shares(["a=b\n  c", ""]) == [4 / 7, 0.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_classifier_gives_the_logit_of_its_label(files: Path, sign: int) -> None:
    from transformers import AutoModelForSequenceClassification

    where = files / "classifier"
    flags = RewardFlags(f"classifier:{where}", reward_sign=sign, reward_label=2)
    reward = parse_reward(flags)
    texts = ["the old barn", "x", "def f(x): return x"]
    found = reward.scores(reward.load(), texts)
    whole = AutoModelForSequenceClassification.from_pretrained(where).eval()
    for text, value in zip(texts, found, strict=True):
        with torch.no_grad():
            ids = tokenizer()(text, return_tensors="pt")["input_ids"]
            assert value == pytest.approx(sign * float(whole(ids).logits[0, 2]), abs=1e-5)


def test_a_label_that_the_classifier_lacks_fails(files: Path) -> None:
    reward = parse_reward(RewardFlags(f"classifier:{files / 'classifier'}", reward_label=3))
    with pytest.raises(Failed, match="--reward_label: got 3, but .* has 3 labels"):
        reward.load()


def test_a_causal_model_is_no_classifier(files: Path) -> None:
    with pytest.raises(Failed, match="not a classifier"):
        parse_reward(RewardFlags(f"classifier:{files / 'model'}")).load()


def test_a_function_of_anyones() -> None:
    reward = parse_reward(RewardFlags(FUNCTION, reward_sign=-1))
    assert reward.scores(reward.load(), ["ab1", ""]) == [-2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", "fails: KeyError"),
        ("too_few", "got 1 numbers for 2 texts"),
        ("not_finite", "got nan for"),
        ("PROMPTS", "is no function"),
        ("nothing_of_this_name", "cannot load"),
    ],
)
def test_a_function_that_is_no_reward_fails(name: str, told: str) -> None:
    reward = parse_reward(RewardFlags(f"support.tiny_reward:{name}"))
    with pytest.raises(Failed, match=f"--reward: .*{told}"):
        reward.scores(reward.load(), ["a", "b"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (None, "got nothing"),
        ("keyword", "got 'keyword'"),
        ("keyword:", "got 'keyword:'"),
        ("keyword:,", "no word in ','"),
        ("keyword:@nowhere", "cannot read 'nowhere'"),
        ("classifier:./nowhere", "no such folder"),
        ("no_module_of_this_name:f", "no module 'no_module_of_this_name'"),
        ("support.tiny_reward:not a name", "got 'support.tiny_reward:not a name'"),
    ],
)
def test_rewards_that_are_refused(asked: str | None, told: str) -> None:
    with pytest.raises(UsageError, match=f"--reward: {told}"):
        parse_reward(RewardFlags(asked))


# -- answers ----------------------------------------------------------------------------------


def test_answers_are_without_their_prompt_and_the_same_of_one_seed(model: Any) -> None:
    sampling = Sampling(num_answers=3, max_new_tokens=6, batch_size=4, seed=5)
    state = torch.get_rng_state()
    answers = sample_answers(model, tokenizer(), tiny_reward.PROMPTS, sampling)
    assert torch.equal(torch.get_rng_state(), state)
    assert [a.prompt for a in answers] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(1 <= len(a.ids) <= 6 for a in answers)
    for answer in answers:
        assert answer.text == tokenizer().decode(answer.ids, skip_special_tokens=True)
    assert sample_answers(model, tokenizer(), tiny_reward.PROMPTS, sampling) == answers
    assert len({a.text for a in answers}) > 3


def test_padding_changes_no_answer(model: Any) -> None:
    prompts = ["a", "the old barn near the river"]
    how = {"num_answers": 1, "max_new_tokens": 8, "top_k": 1}  # the likeliest token
    together = sample_answers(model, tokenizer(), prompts, Sampling(batch_size=2, **how))
    alone = sample_answers(model, tokenizer(), prompts, Sampling(batch_size=1, **how))
    assert together == alone


def test_an_answer_ends_with_its_eos(model: Any) -> None:
    eos = tokenizer().eos_token_id
    bias = torch.zeros(260)
    bias[eos] = 4.0
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    sampling = Sampling(num_answers=40, max_new_tokens=9)
    answers = sample_answers(model, tokenizer(), ["a"], sampling)
    hook.remove()
    ended = [a for a in answers if eos in a.ids]
    assert ended and all(a.ids.index(eos) == len(a.ids) - 1 for a in ended)
    assert all(eos not in a.content(frozenset([eos])) for a in answers)


def test_the_draws_are_those_of_the_model(model: Any) -> None:
    n = 4000
    sampling = Sampling(num_answers=n, max_new_tokens=1, batch_size=n)
    answers = sample_answers(model, tokenizer(), ["the old"], sampling)
    with torch.no_grad():
        p = (
            model(tokenizer()("the old", return_tensors="pt")["input_ids"])
            .logits[0, -1]
            .softmax(-1)
        )
    found = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=260) / n
    assert float((found - p).abs().max()) < 5 * float((p * (1 - p) / n).sqrt().max())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_models_own_settings_do_not_count(files: Path, adapted: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GenerationConfig

    own = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    if adapted:
        own = get_peft_model(own, LoraConfig(target_modules=["q_proj"])).eval()
    sampling = Sampling(num_answers=4, max_new_tokens=8)
    plain = sample_answers(own, tokenizer(), ["the old"], sampling)
    settings = GenerationConfig(
        repetition_penalty=3.0, min_p=0.9, no_repeat_ngram_size=1, do_sample=True, eos_token_id=2
    )
    own.generation_config = settings
    if adapted:
        own.get_base_model().generation_config = settings
    assert sample_answers(own, tokenizer(), ["the old"], sampling) == plain
    assert own.generation_config is settings


# -- the command ------------------------------------------------------------------------------


def test_pairs_are_written(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "pairs.jsonl"
    args = ("pairs", "--model", files / "model", "--prompts", files / "prompts.txt", *DRAW)
    code, table, err = cli(capsys, *args, "--reward", FUNCTION, "--output", out)
    assert code == 0, err
    assert "blank answers" in table and "pairs of 18 answers to 3 prompts" in err
    assert [path.name for path in out.parent.iterdir()] == ["pairs.jsonl"]
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score"]
        assert row["prompt"] in tiny_reward.PROMPTS and row["chosen_score"] > row["rejected_score"]
        assert not row["chosen"].startswith(row["prompt"])
        assert [row["chosen_score"], row["rejected_score"]] == tiny_reward.letters(
            [row["chosen"], row["rejected"]]
        )
    from onepass.dpo import read_pairs

    assert len(read_pairs(out)) == len(rows)

    before = out.read_bytes()
    code, _, err = cli(capsys, *args, "--reward", FUNCTION, "--output", out)
    assert code == 2 and "--overwrite replaces it" in err
    again = (*args, "--reward", FUNCTION, "--output", out, "--overwrite", "--json")
    code, text, _ = cli(capsys, *again)
    assert code == 0 and out.read_bytes() == before
    assert json.loads(text)["counts"]["pairs"] == len(rows)


def test_a_config_file_says_the_rest(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "pairs.yaml"
    lines = {"model": files / "model", "prompts": files / "prompts.txt", "reward": FUNCTION}
    config.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    code, _, err = cli(capsys, "pairs", "--config", config, *DRAW, "--output", tmp_path / "p.jsonl")
    assert code == 0, err
    config.write_text("num_anwsers: 3\n")
    code, _, err = cli(capsys, "pairs", "--config", config)
    assert code == 2 and "unknown key 'num_anwsers'" in err and "num_answers" in err
    config.write_text("learning_rate: 3\n")  # of a training
    code, _, err = cli(capsys, "pairs", "--config", config)
    assert code == 2 and "unknown key 'learning_rate'" in err


def test_a_reward_that_tells_nothing_apart_fails(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", files / "model", "--prompts", files / "prompts.txt", *DRAW)
    reward = ("--reward", "support.tiny_reward:constant")
    code, out, err = cli(capsys, "pairs", *args, *reward, "--output", tmp_path / "pairs.jsonl")
    assert (code, out) == (1, "") and "no pair: all answers" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("pairs", "--model: got nothing"),
        ("pairs --model ./nowhere", "--model: no such folder"),
        ("pairs --model {model}", "--reward: got nothing"),
        ("pairs --model {model} --reward code", "--prompts: got nothing"),
        ("pairs --model {model} --reward code --prompts nowhere.txt", "--prompts: nowhere.txt"),
        ("pairs {all}", "--output: got nothing"),
        ("pairs {all} --output x.csv", "--output: got 'x.csv', wanted a name that ends in .jsonl"),
        ("pairs {all} --num_answers 1", "--num_answers: got 1"),
        ("pairs {all} --temperature 0", "--temperature: got 0.0"),
        ("pairs {all} --top_p 1.5", "--top_p: got 1.5"),
        ("pairs {all} --min_new_tokens 99", "--min_new_tokens: got 99"),
        ("pairs {all} --pairs_per_prompt 0", "--pairs_per_prompt: got 0"),
        ("pairs {all} --seed -1", "--seed: got -1"),
        ("pairs {all} --learning_rate 1", "unknown option '--learning_rate'"),
        ("pairs {all} --output {folder}/a.jsonl --max_new_tokens 5000", "more than the"),
        ("pair", "did you mean pairs?"),
    ],
)
def test_what_is_refused(
    args: str, told: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = "--model {model} --reward code --prompts {prompts}"
    line = args.replace("{all}", whole)
    where = {"model": files / "model", "prompts": files / "prompts.txt", "folder": tmp_path}
    code, out, err = cli(capsys, *line.format(**where).split())
    assert (code, out) == (2, ""), err
    assert told in err and err.startswith("onepass dpo") and len(err.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def chat(folder: Path, files: Path, *turns: dict[str, str]) -> tuple[Path, Path]:
    """(a model whose tokenizer has a chat template, a file of this conversation)."""
    shutil.copytree(files / "model", folder / "chat")
    tokenizer(CHAT).save_pretrained(folder / "chat")
    prompts = folder / "chat.jsonl"
    prompts.write_text(2 * (json.dumps({"messages": turns}) + "\n"))
    return folder / "chat", prompts


def test_conversations_are_answered(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs of them are conversations, which the trainer makes the same tokens of."""
    asked = {"role": "user", "content": "the old?"}
    own, prompts = chat(tmp_path, files, asked)
    args = ["--model", own, "--reward", "code", "--prompts", prompts, "--num_answers", 4]
    args += ["--max_new_tokens", 8, "--device", "cpu"]
    code, out, err = cli(capsys, "pairs", *args, "--output", tmp_path / "x.jsonl")
    assert code == 0, err
    assert "of 4 answers to 1 prompts" in err  # each once
    rows = read_pairs(tmp_path / "x.jsonl")
    assert rows and all(row["prompt"] == [asked] for row in rows)
    assert all(row["chosen"][0]["role"] == "assistant" for row in rows)
    [text] = texts_of([[asked]], tokenizer(CHAT))
    assert text == "<user>the old?</s><assistant>"
    item = PreferenceDataset(tokenizer(CHAT), rows)[0]
    assert item["prompt_input_ids"] == tokenizer()(text, add_special_tokens=False)["input_ids"]
    code, out, err = cli(capsys, "evaluate", *args, "--json")
    assert code == 0, err
    assert json.loads(out)["samples"][0]["prompt"] == text


@pytest.mark.parametrize(
    ("template", "turns", "told"),
    [
        (False, [{"role": "user", "content": "a"}], "has no chat template: wanted text"),
        (True, [{"role": "assistant", "content": "a"}], "its last turn is the assistant's"),
        (True, [{"content": "a"}], 'chat.jsonl:1: got a list, wanted text or {"role"'),
    ],
)
def test_conversations_that_are_refused(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    template: bool,
    turns: list[dict[str, str]],
    told: str,
) -> None:
    own, prompts = chat(tmp_path, files, *turns)
    model = own if template else files / "model"
    args = ("--model", model, "--reward", "code", "--prompts", prompts, "--device", "cpu")
    for action, more in (("pairs", ("--output", tmp_path / "x.jsonl")), ("evaluate", ())):
        code, _, err = cli(capsys, action, *args, *more)
        assert code == 2 and told in err and len(err.splitlines()) <= 3, err
    assert not (tmp_path / "x.jsonl").exists()


def test_a_refusal_loads_nothing_heavy(files: Path) -> None:
    script = (
        "import sys; from onepass.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules)\n"
        "print(code, *sorted(heavy))"
    )
    args = ["--model", str(files / "model"), "--reward", "code", "--prompts", "nowhere.txt"]
    root = Path(__file__).resolve().parents[1] / "python"
    for action in ("pairs", "evaluate", "frontier"):
        done = subprocess.run(
            [sys.executable, "-c", script, "dpo", action, *args],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        assert done.stdout == "2\n", done.stderr
