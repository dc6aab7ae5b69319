"""Prompt files: every format, the category filter, what is refused and how it is said, speed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onepass.training.prompts import Prompt, read_prompts

ROOT = Path(__file__).resolve().parents[1]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file: text as it is, a list a JSON row each into .jsonl, all else as JSON."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, "utf-8")
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
        else:
            path.write_text(json.dumps(content), "utf-8")
        return path

    return write


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


# -- formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", ["one", "two"]),
        ("p.json", [{"prompt": "one"}, {"prompt": "two", "category": "x"}]),
        ("p.json", {"prompts": ["one", {"prompt": "two"}], "category": "x"}),
        ("p.json", {"prompts": [{"original_prompt": "one"}, {"sanitized_prompt": "two"}]}),
        ("p.JSON", ["one", "two"]),
        ("p.json", "\ufeff" + json.dumps(["one", "two"])),  # what Windows editors put in front
        ("p.jsonl", [{"prompt": "one"}, "two"]),
        ("p.jsonl", '{"text": "one"}\r\n\r\n  \n{"text": "two"}'),
        ("p.ndjson", '"one"\n"two"\n'),
        ("p.txt", "one\r\n\n  two  \n"),
    ],
)
def test_formats(write: Write, name: str, content: Any) -> None:
    path = write(name, content)
    prompts = read_prompts(path)
    assert texts(prompts) == ["one", "two"]
    assert all(prompt.file == path for prompt in prompts)


def test_a_record_stays_whole(write: Write) -> None:
    rows = [
        {"prompt": "hello", "response": "no", "n": 1},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "c"}], "completion": "d"},
        {"text": "e\u2028f"},  # a line separator inside a string is no new line
    ]
    path = write("p.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    prompts = read_prompts(path)
    assert texts(prompts) == ["hello", "a\nb", "c", "e\u2028f"]
    assert [prompt.record for prompt in prompts] == rows
    assert [prompt.line for prompt in prompts] == [1, 2, 3, 4]


def test_lines_are_those_of_the_file(write: Write) -> None:
    assert [p.line for p in read_prompts(write("p.jsonl", '"a"\n\n"b"'))] == [1, 3]
    assert [p.line for p in read_prompts(write("p.txt", "a\n\nb"))] == [1, 3]
    assert [p.line for p in read_prompts(write("p.json", ["a", "b"]))] == [None, None]


def test_the_first_field_counts(write: Write) -> None:
    pair = {"original_prompt": "bad", "sanitized_prompt": "good"}
    path = write("p.json", [pair])
    assert texts(read_prompts(path)) == ["good"]
    assert texts(read_prompts(path, fields=("prompt", "original_prompt"))) == ["bad"]


def test_a_folder_is_searched_in_order(write: Write, tmp_path: Path) -> None:
    names = ("x_prompts.json", "prompts.json")
    write("prompts.json", ["third"])
    assert texts(read_prompts(tmp_path, names=names)) == ["third"]
    write("x_prompts.jsonl", ["second"])
    assert texts(read_prompts(str(tmp_path), names=names)) == ["second"]
    write("x_prompts.json", ["first"])
    assert texts(read_prompts(tmp_path, names=names)) == ["first"]


def test_category(write: Write) -> None:
    rows = [
        {"prompt": "a", "category": "x"},
        {"prompt": "b", "category": "y"},
        {"prompt": "c"},
        {"prompt": "d", "category": None},
        "e",
    ]
    for path in (write("p.json", rows), write("p.jsonl", rows)):
        assert texts(read_prompts(path)) == list("abcde")
        kept = read_prompts(path, category="x")
        assert texts(kept) == list("acde")
        assert [prompt.category for prompt in kept] == ["x", None, None, None]
    around = write("q.json", {"category": "x", "prompts": ["a", {"prompt": "b", "category": "y"}]})
    assert texts(read_prompts(around, category="x")) == ["a"]
    assert texts(read_prompts(around, category="y")) == ["b"]


# -- what is refused --------------------------------------------------------------------------

REFUSED: list[tuple[str, Any, str]] = [
    ("p.json", "", "p.json: holds no prompt"),
    ("p.json", " \n", "p.json: holds no prompt"),
    ("p.json", [], "p.json: holds no prompt"),
    ("p.json", {"prompts": []}, "p.json: holds no prompt"),
    ("p.jsonl", "\n\n", "p.jsonl: holds no prompt"),
    ("p.txt", "\n", "p.txt: holds no prompt"),
    ("p.json", '["a",\n "b"\n "c"]', "p.json:3:2: not JSON"),
    ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "p.json:2:1: not JSON: .*p.jsonl"),
    ("p.json", "[" * 100_000, "p.json: not JSON that can be read"),
    ("p.jsonl", '"a"\n\n{"prompt": b}', "p.jsonl:3:12: not JSON"),
    ("p.jsonl", '"a"\n' + "[" * 100_000, "p.jsonl:2: not JSON that can be read"),
    ("p.json", {"data": ["a"]}, "p.json: got an object with data, wanted a list or"),
    ("p.json", {}, "p.json: got an object with no keys, wanted a list or"),
    ("p.json", "7", "p.json: got a number, wanted a list"),
    ("p.json", {"prompts": "a"}, "p.json: got a string, wanted a list"),
    ("p.json", ["a", 7], "p.json: entry 2: got a number, wanted a string or an object"),
    ("p.json", ["a", None], "p.json: entry 2: got null, wanted a string or an object"),
    ("p.json", [{"query": "a"}], "p.json: entry 1: got an object with query, wanted one with"),
    ("p.jsonl", ["a", {"prompt": 3}], "p.jsonl:2: got a number as 'prompt', wanted a string"),
    ("p.jsonl", [{"messages": ["a"]}], "p.jsonl:1: got a list as 'messages', wanted a string"),
    ("p.jsonl", [{"messages": [{"role": "user"}]}], "p.jsonl:1: got a list as 'messages'"),
    ("p.jsonl", [{"messages": []}], "p.jsonl:1: got an empty prompt"),
    ("p.jsonl", ["a", " "], "p.jsonl:2: got an empty prompt"),
    ("p.jsonl", ["a", "\U0001f600", "\ud83d"], "p.jsonl:3: got half a surrogate pair"),
    ("p.json", [{"prompt": "a", "category": 1}], "p.json: entry 1: got a number as 'category'"),
    ("p.json", {"prompts": ["a"], "category": []}, "p.json: got a list as 'category'"),
    ("p.jsonl", b'"a"\n"\xff"', "p.jsonl:2: not UTF-8 text"),
    ("p.csv", "a,b", "p.csv: got a .csv file, wanted .json"),
    ("p", "a", "p: got a nameless file, wanted .json"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), REFUSED, ids=[message[:50] for _, _, message in REFUSED]
)
def test_refused(write: Write, name: str, content: Any, message: str) -> None:
    path = write(name, content)
    with pytest.raises(ValueError, match=re.escape(str(path.parent)) + "/" + message) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_unknown_category_names_those_found(write: Write) -> None:
    rows = [{"prompt": "a", "category": "weapons"}, {"prompt": "b", "category": "drugs"}]
    with pytest.raises(ValueError, match="no prompt of category 'cats', found drugs, weapons"):
        read_prompts(write("p.json", rows), category="cats")


def test_missing(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"q\.json: no such file"):
        read_prompts(tmp_path / "q.json")
    with pytest.raises(FileNotFoundError, match=r"found no prompt file, wanted a\.json or b\.json"):
        read_prompts(tmp_path, names=("a.json", "b.json"))
    write("c.json", ["a"])
    with pytest.raises(FileNotFoundError, match=r"found c\.json, wanted a\.json"):
        read_prompts(tmp_path, names=("a.json",))
    with pytest.raises(ValueError, match="got a folder, wanted a file"):
        read_prompts(tmp_path)


# -- cost -------------------------------------------------------------------------------------


def test_many_rows_are_read_fast(write: Write) -> None:
    rows = [{"prompt": f"prompt number {n}", "category": "x", "id": n} for n in range(100_000)]
    path = write("p.jsonl", rows)
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(read_prompts(path, category="x")) == len(rows)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 2


def test_loads_without_torch() -> None:
    code = """
import sys
import onepass.training.prompts
heavy = {"torch", "numpy", "transformers", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    env = {"PYTHONPATH": str(ROOT / "python")}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env, timeout=60)
