"""The rules of the house, read from the syntax trees: layers, imports, banned calls, loads, syncs.

Each rule runs over the files it binds, and over a snippet that breaks it, so that none can pass by
seeing nothing. The second half starts fresh interpreters: what `import onepass` costs and touches.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "ops", "bench")
PACKAGE = ("kernels", "ops", "python")
EVERYWHERE = (*PACKAGE, "bench", "tests", "examples")

Found = Iterator[tuple[int, str]]
Rule = Callable[[ast.Module, str], Found]


def python_files(*folders: str) -> list[str]:
    """Paths in these folders (or files) of the root, without following the package's symlinks."""
    found = [ROOT / file for file in folders if file.endswith(".py")]
    for folder in folders:
        for where, _, names in os.walk(ROOT / folder, followlinks=False):
            found += [Path(where, name) for name in names if name.endswith(".py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


# -- reading a tree ---------------------------------------------------------------------------


def home_package(path: str) -> list[str]:
    """The package that a file's relative imports start from: `ops/head.py` -> onepass, ops."""
    parts = list(Path(path).parent.parts)
    return parts[1:] if parts[0] == "python" else ["onepass", *parts]


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported; relative names resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = []
            if node.level:
                home = home_package(path)
                base = home[: len(home) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def is_below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with its dotted name; what is called on an expression is `.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            names: list[str] = []
            target: ast.expr = node.func
            while isinstance(target, ast.Attribute):
                names.append(target.attr)
                target = target.value
            names.append(target.id if isinstance(target, ast.Name) else "")
            yield node, ".".join(reversed(names))


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((item.value for item in call.keywords if item.arg == name), None)


def is_text(node: ast.expr | None, start: str) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(start)
    )


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


# -- the rules --------------------------------------------------------------------------------


def kernels_are_triton_only(tree: ast.Module, path: str) -> Found:
    for line, name in imports(tree, path):
        if not is_below(name, "triton", "onepass.kernels", "__future__"):
            yield line, f"a kernel imports {name}: triton and other kernels only"


def ops_know_no_users(tree: ast.Module, path: str) -> Found:
    for line, name in imports(tree, path):
        ours = is_below(name, "onepass.kernels", "onepass.ops")
        outside = is_below(name, "torch", "triton") or name.split(".")[0] in sys.stdlib_module_names
        if not ours and not outside:
            yield line, f"an op imports {name}: torch, kernels, ops and the standard library only"


def triton_waits_for_a_launch(tree: ast.Module, path: str) -> Found:
    inside = {found for function in functions(tree) for found in imports(function, path)}
    for line, name in imports(tree, path):
        if is_below(name, "triton", "onepass.kernels") and (line, name) not in inside:
            yield line, f"{name} at module level: import it in the launcher, Triton may be missing"


def users_know_no_kernels(tree: ast.Module, path: str) -> Found:
    for line, name in imports(tree, path):
        if is_below(name, "triton", "onepass.kernels"):
            yield line, f"a user file imports {name}: go through ops"


SYSTEMS = {"attribution", "circuit_breaker", "dpo", "jigsaw"}


def systems_know_no_other(tree: ast.Module, path: str) -> Found:
    own = set(Path(path).parts) & SYSTEMS
    for line, name in imports(tree, path):
        if own and is_below(name, *(f"onepass.{other}" for other in SYSTEMS - own)):
            yield line, f"a system imports {name}: what several need lies in training/"


def absolute_imports(tree: ast.AST) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""


def own_imports_are_relative(tree: ast.Module, path: str) -> Found:
    for line, name in absolute_imports(tree):
        if is_below(name, "onepass"):
            yield line, f"absolute import of {name}: write it relative"


def nothing_comes_in_twice(tree: ast.Module, path: str) -> Found:
    for line, name in absolute_imports(tree):
        if is_below(name, *LINKS):
            yield line, f"import of {name}: a second copy of onepass.{name}"


def opens_with_its_idea(tree: ast.Module, path: str) -> Found:
    lines = [line for line in (ast.get_docstring(tree) or "").splitlines() if line.strip()]
    most = 20 if path.startswith("tests/") else 6  # a test file may list what it guards
    if not 1 <= len(lines) <= most:
        yield 1, f"a docstring of {len(lines)} lines: up to {most} tell what the file is"


def defers_annotations(tree: ast.Module, path: str) -> Found:
    has_code = len(tree.body) > 1 or ast.get_docstring(tree) is None
    if has_code and "__future__.annotations" not in {name for _, name in imports(tree, path)}:
        yield 1, "from __future__ import annotations is missing"


UNSAFE_MODULES = ("pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib")
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"),
    *("torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load"),
}
UNSAFE_SWITCHES = ("shell", "trust_remote_code", "allow_pickle")


def runs_no_foreign_code(tree: ast.Module, path: str) -> Found:
    for line, name in imports(tree, path):
        if is_below(name, *UNSAFE_MODULES):
            yield line, f"imports {name}"
    for call, name in calls(tree):
        safe = name == "torch.load" and is_true(keyword(call, "weights_only"))
        if (name in UNSAFE_CALLS and not safe) or name.endswith(".extractall"):
            yield call.lineno, f"calls {name}"
        for switch in UNSAFE_SWITCHES:
            value = keyword(call, switch)
            if value is not None and not (isinstance(value, ast.Constant) and not value.value):
                yield call.lineno, f"passes {switch}"


NETWORK = ("socket", "urllib.request", "http.client", "requests", "httpx", "aiohttp", "ftplib")


def opens_no_socket(tree: ast.Module, path: str) -> Found:
    for line, name in imports(tree, path):
        if is_below(name, *NETWORK):
            yield line, f"imports {name}: the package talks to nobody"


def device_is_a_fixture(tree: ast.Module, path: str) -> Found:
    for call, name in calls(tree):
        first = call.args[0] if call.args else None
        literal = is_text(keyword(call, "device"), "cuda")
        literal |= name.endswith(".cuda") or (
            name.endswith((".to", "torch.device")) and is_text(first, "cuda")
        )
        if literal:
            yield call.lineno, f"{name}(cuda): take the device from the fixture"


def masked_loads_say_what_else(tree: ast.Module, path: str) -> Found:
    for call, name in calls(tree):
        masked = keyword(call, "mask") is not None or len(call.args) > 1
        filled = keyword(call, "other") is not None or len(call.args) > 2
        if name == "tl.load" and masked and not filled:
            yield call.lineno, "tl.load with a mask and no other=: masked lanes hold anything"


def no_retired_or_tuned_triton(tree: ast.Module, path: str) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in ("make_block_ptr", "advance", "autotune"):
                yield node.lineno, f"{node.attr}: block pointers are gone, tuning is a table"


HOT_PATH = (
    "ops",
    *(f"python/onepass/{file}.py" for file in ("losses", "parallel", "reduce")),
)
# Functions that are there to read values: free to do so, so a call of one counts as a read.
# Checks that their callers ask `values_checked` about, and what only the torch path calls.
VALUE_READERS = {"check_labels", "check_probabilities", "kept_rows", "_kept_slabs", "_pairs"}
TORCH_PATH = {"sum_beside_one", "beside_one", "divergence", "jensen_shannon"}
WAITS = (".item", ".tolist", ".cpu", ".numpy", ".nonzero", ".synchronize", ".masked_select")


def may_read_values(tree: ast.Module) -> Iterator[ast.AST]:
    """Where a read costs no wait for a device, or one that was asked for.

    The torch path (a CPU has no queue), double backward, and what `values_checked` stands before.
    """
    for function in functions(tree):
        if function.name in {"_twice_differentiable", *VALUE_READERS, *TORCH_PATH}:
            yield function
        elif function.name.endswith("_torch"):
            yield function
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "values_checked" in {name for _, name in calls(node.test)}:
            yield from (node.test, *node.body)


def waits_for_no_device(tree: ast.Module, path: str) -> Found:
    allowed = {id(node) for place in may_read_values(tree) for node in ast.walk(place)}
    tests = [
        node.test
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert)
    ]
    in_tests = {id(node) for test in tests for node in ast.walk(test)}
    for call, name in calls(tree):
        reads = name.endswith(WAITS) or name.split(".")[-1] in VALUE_READERS
        reads |= name in ("bool", "torch.equal", "torch.allclose")
        reads |= name.endswith((".any", ".all")) and id(call) in in_tests
        if reads and id(call) not in allowed:
            yield call.lineno, f"{name}() waits for the device: ask values_checked first"


# rule, the folders it binds, a path, and a file of that path that breaks it
RULES: list[tuple[Rule, tuple[str, ...], str, str]] = [
    (kernels_are_triton_only, ("kernels",), "kernels/a.py", "from ..ops import head"),
    (kernels_are_triton_only, ("kernels",), "kernels/a.py", "def f():\n    import torch"),
    (ops_know_no_users, ("ops",), "ops/a.py", "from ..losses import cross_entropy"),
    (ops_know_no_users, ("ops",), "ops/a.py", "from .. import losses"),
    (ops_know_no_users, ("ops",), "ops/a.py", "import numpy as np"),
    (triton_waits_for_a_launch, ("ops",), "ops/a.py", "import triton"),
    (triton_waits_for_a_launch, ("ops",), "ops/a.py", "from ..kernels.row_moments import k"),
    (users_know_no_kernels, ("python",), "python/onepass/a.py", "from . import kernels"),
    (users_know_no_kernels, ("python",), "python/onepass/cli/a.py", "from ..kernels.x import k"),
    (users_know_no_kernels, ("python",), "python/onepass/a.py", "def f():\n    import triton"),
    (systems_know_no_other, ("python",), "python/onepass/dpo/a.py", "from ..jigsaw.x import y"),
    (own_imports_are_relative, PACKAGE, "ops/a.py", "from onepass.ops import head"),
    (own_imports_are_relative, PACKAGE, "python/onepass/a.py", "import onepass"),
    (nothing_comes_in_twice, EVERYWHERE, "ops/a.py", "import kernels.row_moments"),
    (nothing_comes_in_twice, EVERYWHERE, "bench/a.py", "from bench import cases"),
    (opens_with_its_idea, EVERYWHERE, "ops/a.py", "x = 1"),
    (opens_with_its_idea, EVERYWHERE, "ops/a.py", '"""' + "word\n" * 7 + '"""'),
    (defers_annotations, EVERYWHERE, "ops/a.py", "from __future__ import division"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "from pickle import loads"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "torch.load('a')"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "torch.load('a', weights_only=False)"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "torch.load('a', weights_only=safe)"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "eval('1')"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "tarfile.open('a').extractall()"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "subprocess.run('ls', shell=True)"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "yaml.load(text)"),
    (runs_no_foreign_code, EVERYWHERE, "ops/a.py", "os.system('ls')"),
    (opens_no_socket, (*PACKAGE, "bench", "examples"), "ops/a.py", "import urllib.request"),
    (device_is_a_fixture, ("tests",), "tests/a.py", "torch.ones(3, device='cuda:0')"),
    (device_is_a_fixture, ("tests",), "tests/a.py", "x.to('cuda')"),
    (masked_loads_say_what_else, ("kernels",), "kernels/a.py", "tl.load(p, mask=m)"),
    (masked_loads_say_what_else, ("kernels",), "kernels/a.py", "tl.load(p, m)"),
    (
        no_retired_or_tuned_triton,
        ("kernels", "ops"),
        "kernels/a.py",
        "@triton.autotune\ndef f(): 1",
    ),
    (waits_for_no_device, HOT_PATH, "ops/a.py", "n = mask.sum().item()"),
    (waits_for_no_device, HOT_PATH, "ops/a.py", "if mask.any(): pass"),
    (waits_for_no_device, HOT_PATH, "ops/a.py", "bool(mask.sum())"),
    (waits_for_no_device, HOT_PATH, "ops/a.py", "def f(y):\n    check_labels(y)"),
]
BOUND = list({rule: folders for rule, folders, _, _ in RULES}.items())
# The fixture itself has to name the device that everybody else takes from it.
EXEMPT = {
    (device_is_a_fixture, "tests/conftest.py"),
    (device_is_a_fixture, "tests/support/processes.py"),  # a process has no fixture
    # once, to leave rows out of the matrix products
    (waits_for_no_device, "ops/head.py"),
    (waits_for_no_device, "ops/head_pair.py"),
    (waits_for_no_device, "ops/_shards.py"),  # ranks see that they do the same before they do it
    (runs_no_foreign_code, "tests/test_heads_pickled.py"),  # reads what it pickled itself
    (runs_no_foreign_code, "tests/test_pplm_heads.py"),  # makes what is to be refused
}


@pytest.mark.parametrize(("rule", "folders"), BOUND, ids=[rule.__name__ for rule, _ in BOUND])
def test_rule(rule: Rule, folders: tuple[str, ...]) -> None:
    paths = python_files(*folders)
    assert paths, f"no Python file in {folders}"
    broken = [
        f"{path}:{line}: {what}"
        for path in paths
        if (rule, path) not in EXEMPT
        for line, what in rule(ast.parse((ROOT / path).read_text("utf-8")), path)
    ]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [(rule, path, source) for rule, _, path, source in RULES],
    ids=[f"{rule.__name__}-{source[:30]!r}" for rule, _, _, source in RULES],
)
def test_rule_sees_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    assert list(rule(ast.parse(source), path))


def test_links() -> None:
    for name in LINKS:
        link = ROOT / "python" / "onepass" / name
        assert link.is_symlink(), (
            f"python/onepass/{name} is no symlink: git config core.symlinks true, check out again"
        )
        assert Path(os.readlink(link)).as_posix() == f"../../{name}"


def test_installed_kernels_package_wins(tmp_path: Path) -> None:
    # Hugging Face's `kernels`, which transformers imports: see docs/layout.md.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n", "utf-8")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels"
    command = [sys.executable, "-I", "-c", code + "; print(kernels.whose)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "theirs\n", done.stderr


# -- the public names -------------------------------------------------------------------------

PUBLIC = [
    "GaussianStats",
    "LazyLogits",
    "MaterializedError",
    "MaterializedWarning",
    "Report",
    "RowMoments",
    "VocabPairStats",
    "VocabStats",
    "__version__",
    "cloak",
    "count_items",
    "cross_entropy",
    "gaussian_stats",
    "global_mean",
    "lazy_head",
    "lazy_head_within",
    "linear_cross_entropy",
    "masked_cross_entropy",
    "masked_inner_product",
    "masked_mean",
    "masked_normalized_l2",
    "reduce_rows",
    "report",
    "row_moments",
    "shift_labels",
    "strict",
    "unlazy_head",
    "vocab_pair_stats",
    "vocab_stats",
]


def test_public_names() -> None:
    import onepass

    assert sorted(onepass.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(onepass))
    for name in set(PUBLIC) - {"__version__"}:
        public = getattr(onepass, name)
        assert public.__module__.startswith("onepass."), name
        assert public.__doc__ and public.__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(onepass, "no_such_name")  # noqa: B009 -- mypy knows there is none


def test_one_version() -> None:
    import onepass

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "onepass.__version__"}
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert citation and citation[1] == onepass.__version__
    newest = re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert newest and newest[1] == onepass.__version__


# -- a fresh interpreter ----------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[str], str]:
    """Runs code with warnings as errors in an empty folder and home; gives its stdout.

    The run must say nothing on stderr and leave both folders as empty as they were.
    """

    def run(code: str) -> str:
        folders = [tmp_path / "cwd", tmp_path / "home"]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ONEPASS_IMPL")}
        env |= {"PYTHONPATH": str(ROOT / "python"), "HOME": str(folders[1])}
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(
            command, cwd=folders[0], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert not [left for folder in folders for left in folder.iterdir()]
        return done.stdout

    return run


def test_import_is_fast_and_without_torch(fresh: Callable[[str], str]) -> None:
    code = """
import sys, time
start = time.perf_counter()
import onepass
spent = time.perf_counter() - start
heavy = {"torch", "triton", "numpy", "transformers", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
dir(onepass)
assert "torch" not in sys.modules, "dir() loads torch"
print(spent)
"""
    assert min(float(fresh(code)) for _ in range(5)) <= 0.05


def test_import_prints_and_patches_nothing(fresh: Callable[[str], str]) -> None:
    code = """
import builtins, logging, os, signal, sys, threading, warnings
def world():
    return (
        sys.excepthook, sys.displayhook, sys.stdout, sys.stderr, tuple(sys.path), dict(os.environ),
        tuple(sys.meta_path), tuple(sys.path_hooks), tuple(warnings.filters), warnings.showwarning,
        dict(vars(builtins)), tuple(logging.root.handlers), logging.root.level,
        threading.active_count(), signal.getsignal(signal.SIGINT),
    )
before = world()
import onepass
assert world() == before
assert not logging.getLogger("onepass").handlers
"""
    assert fresh(code) == ""


def test_ops_patch_nothing_in_torch(fresh: Callable[[str], str]) -> None:
    # torch._dynamo is a second of start-up that no eager user asked for.
    code = """
import sys
import torch
def world():
    places = (torch, torch.Tensor, torch.nn.functional, torch.nn, torch.autograd)
    return [{k: id(v) for k, v in vars(place).items()} for place in places]
torch.nn.functional.cross_entropy(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, dtype=int))
before = world()
state = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import onepass
logits = torch.randn(2, 5, requires_grad=True)
state = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
onepass.cross_entropy(logits, torch.tensor([1, 4])).backward()
assert logits.grad is not None
assert world() == before
assert torch.equal(torch.get_rng_state(), state[0])
assert (torch.get_num_threads(), torch.get_default_dtype()) == state[1:]
assert "torch._dynamo" not in sys.modules, "torch._dynamo is loaded"
assert "transformers" not in sys.modules, "transformers is loaded"
"""
    assert fresh(code) == ""


def test_works_without_triton(fresh: Callable[[str], str]) -> None:
    code = """
import sys
sys.modules["triton"] = None
import onepass
for name in onepass.__all__:
    getattr(onepass, name)
import torch
logits = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.0, -3.0]], requires_grad=True)
labels = torch.tensor([2, 0])
stats = onepass.vocab_stats(logits, labels, want=("logp", "entropy"))
every = logits.log_softmax(-1)
torch.testing.assert_close(stats.logp, every[[0, 1], labels])
torch.testing.assert_close(stats.entropy, -(every.exp() * every).sum(-1))
stats.logp.sum().backward()
torch.testing.assert_close(logits.grad, torch.eye(3)[labels] - logits.detach().softmax(-1))
print("done")
"""
    assert fresh(code) == "done\n"
