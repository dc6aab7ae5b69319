"""The demo's text: English prose and Python source, both brought along by the interpreter.

Prose is `pydoc_data.topics` (the language reference as `help()` prints it) less its headings,
grammar and code blocks; code is the standard library's modules less comments and docstrings,
which are English again. Both are cut into documents, a share of which is held out.
"""

from __future__ import annotations

import ast
import importlib
import random
import re
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

from ..cli.errors import Failed

PROSE_PARAGRAPH_CHARS = 40  # shorter ones are headings and signatures
PROSE_LETTER_SHARE = 0.85  # grammar, tables and code have fewer letters and spaces
CODE_FILE_CHARS = 20_000  # of each file, so that one big module does not stand for all


@dataclass(frozen=True)
class Split:
    """Documents of one kind; no paragraph or file is in both parts."""

    train: list[str]
    held_out: list[str]


class CorpusMissing(Failed):
    """This interpreter came without its documentation or without its source files."""


def is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) >= PROSE_PARAGRAPH_CHARS
        and letters >= PROSE_LETTER_SHARE * len(paragraph)
        and paragraph[-1] in ".:;!?)"
    )


def prose_documents(at_most_chars: int) -> list[str]:
    """One document a topic, one line a paragraph; a paragraph that several topics share
    (whole sections do) is kept once, else held-out text would have been trained on."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise CorpusMissing(
            "this Python has no pydoc_data.topics to train on; install the full standard library"
            " (Debian: libpython3-stdlib) or use a python.org build"
        ) from None
    seen: set[str] = set()
    documents: list[str] = []
    for name in sorted(topics):
        if sum(map(len, documents)) >= at_most_chars:
            break
        paragraphs = []
        for block in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(block.split())
            text = re.sub(r"\*{1,2}(\w[^*]*)\*{1,2}", r"\1", text)  # reST emphasis
            if is_prose(text) and text not in seen:
                seen.add(text)
                paragraphs.append(text)
        if paragraphs:
            documents.append("\n".join(paragraphs) + "\n")
    return documents


def without_docstrings(source: str) -> str:
    """Source less docstrings, comment lines and blank lines, the rest byte for byte."""
    english: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                english.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    kept = [
        line
        # not splitlines(): form feeds do not end a line for `ast`
        for number, line in enumerate(source.split("\n"), start=1)
        if number not in english and line.strip() and not line.lstrip().startswith("#")
    ]
    return "\n".join(kept) + "\n"


def code_documents(shuffle: random.Random, at_most_chars: int) -> list[str]:
    """One document a module of the standard library, in shuffled order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata* is a dump of build flags and paths, not code that someone wrote.
    files = sorted(f for f in folder.glob("*.py") if not f.name.startswith("_sysconfigdata"))
    shuffle.shuffle(files)
    documents: list[str] = []
    chars = 0
    for file in files:
        if chars >= at_most_chars:
            break
        try:
            with tokenize.open(file) as stream:
                source = without_docstrings(stream.read())
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        source = source[:CODE_FILE_CHARS].rpartition("\n")[0] + "\n"
        if len(source) > 200:
            documents.append(source)
            chars += len(source)
    if not documents:
        raise CorpusMissing(
            f"no Python source files in {folder}; use an interpreter that comes with them"
        )
    return documents


def split(documents: list[str], shuffle: random.Random, share: float) -> Split:
    """Hold out whole documents, drawn at random, for at most `share` of the text; at least one."""
    shuffle.shuffle(documents)
    room = share * sum(map(len, documents))
    train: list[str] = []
    held_out: list[str] = []
    for document in documents:
        if len(document) <= room:  # a long one goes to training, where it does no harm
            held_out.append(document)
            room -= len(document)
        else:
            train.append(document)
    if not held_out:
        held_out.append(train.pop(train.index(min(train, key=len))))
    return Split(train, held_out)
