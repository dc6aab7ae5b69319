"""The folder of a run: claimed without harm, resumed only as it was begun, whole after a kill -9.

run.json says whose it is and with what it was made. transformers writes trainer_state.json last
into a checkpoint and removes older ones only after that: a checkpoint where it parses is complete,
and until it does the one before is there. Others removed from here are renamed first.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli.errors import UsageError
from ..cli.files import replace_text, strict_json
from ..cli.folder import check_writable
from .flags import Flags, RunFlags

PROGRAM, SCHEMA = "onepass train", 1
RUN, METRICS, SUMMARY, CURVES = "run.json", "metrics.jsonl", "summary.json", "curves.png"
STATE = "trainer_state.json"
TOKENIZER = (  # what save_pretrained of one may write
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
DISCARDED, PARTIAL = ".discarded-", ".partial-"
# What a resumed run may be told anew: it changes no parameter. Not max_steps: the learning rate
# and the coefficients are schedules over it.
FREE = frozenset(
    "output_dir overwrite resume_from_checkpoint config accelerate_config logging_steps"
    " logging_first_step save_steps save_total_limit report_to run_name project trackio_space_id"
    " push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision log_level"
    " log_level_replica disable_tqdm dataloader_num_workers dataloader_pin_memory"
    " dataloader_prefetch_factor skip_memory_metrics".split()
)


def digest(raw: bytes) -> str:
    """What tells contents apart."""
    return hashlib.sha256(raw).hexdigest()[:16]


def fingerprints(files: Mapping[str, str | Path | None]) -> dict[str, str]:
    """A digest of each file that is named, so that a resumed run is known to read the same."""
    return {name: digest(Path(f).read_bytes()) for name, f in files.items() if f is not None}


def is_main_process() -> bool:
    """Whether this process writes and prints; its launcher says which it is."""
    return int(os.environ.get("RANK", "0")) == 0


def n_processes() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def tell(line: str) -> None:
    """A line to stderr, from the main process."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a run of ours; None where there is none, or another program's."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("program") == PROGRAM else None


def recorded_flags(folder: Path, system: str) -> dict[str, Any]:
    """The flags that the run in `folder` was begun with.

    Raises:
        UsageError: it is of another system.
    """
    run = read_run(folder) or {}
    if run.get("system", system) != system:
        made = f"the run in {str(folder)!r} is one of {run['system']}"
        raise UsageError(f"--resume_from_checkpoint: {made}, wanted one of {system}")
    found = run.get("flags")
    return found if isinstance(found, dict) else {}


def hold(folder: Path) -> Callable[[], object]:
    """Keep other processes from the folder until what is returned is called, or this one ends.

    Raises:
        UsageError: another one holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing holds a folder
        return lambda: None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(
            f"--output_dir: another run is writing to {str(folder)!r}",
            hint="wait for it, or name another folder with --output_dir DIR",
        ) from None
    except OSError:  # a file system without locks
        pass
    return functools.partial(os.close, handle)


def checkpoints(folder: Path) -> Iterator[tuple[int, Path, bool]]:
    """(step, folder, whether it is complete) of each checkpoint-N."""
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            yield int(step), path, _is_complete(path, int(step))


def _is_complete(path: Path, step: int) -> bool:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step."""
    found = [(step, path) for step, path, complete in checkpoints(folder) if complete]
    return max(found)[1] if found else None


class RunFolder:
    """A run's output_dir, judged when made and written to from `begin` on. `free` are flags of the
    system that a resumed run may be told anew, beside FREE.

    Attributes:
        path: the folder.
        checkpoint: the checkpoint to go on from, or None.
        is_main: whether this process writes.
    """

    def __init__(self, system: str, flags: Flags, free: Sequence[str] = ()) -> None:
        run = flags[RunFlags]
        if not run.output_dir:
            raise UsageError("--output_dir: got an empty name, wanted a folder")
        self.system, self.flags, self.free = system, flags.as_dict(), FREE.union(free)
        self.path, self.is_main = Path(run.output_dir), is_main_process()
        self.overwrite = run.overwrite
        self.resumes = run.resume_from_checkpoint not in (None, "false")
        self.earlier = read_run(self.path)
        self._let_go: Callable[[], object] | None = None
        if self.is_main:
            self._check(flags)
        self.checkpoint = self._from(str(run.resume_from_checkpoint)) if self.resumes else None

    def _check(self, flags: Flags) -> None:
        """UsageError where the run would write over what is not its own, or not go on the same."""
        check_writable(self.path, "--output_dir")
        where = repr(str(self.path))
        if self.resumes and self.overwrite:
            raise UsageError("--overwrite and --resume_from_checkpoint exclude each other")
        if self.earlier is None:
            if (self.path / RUN).is_file():
                raise UsageError(
                    f"--output_dir: {where} has a damaged {RUN}, or another program's",
                    hint="name another folder with --output_dir DIR",
                )
            if self.resumes:
                hint = "leave out --resume_from_checkpoint to begin a run"
                raise UsageError(f"--resume_from_checkpoint: no run in {where}", hint=hint)
            if self.path.is_dir() and any(self.path.iterdir()):
                hint = "name another folder with --output_dir DIR"
                if self.overwrite:
                    hint = "--overwrite removes runs of onepass train only; " + hint
                raise UsageError(f"--output_dir: {where} has files of others in it", hint=hint)
        elif self.earlier.get("system") != self.system:
            raise UsageError(
                f"--output_dir: {where} has a run of {self.earlier.get('system')} in it",
                hint="name another folder with --output_dir DIR",
            )
        elif self.resumes:
            self._check_same(self.earlier)
        elif not self.overwrite:
            hint = "--resume_from_checkpoint goes on with it, --overwrite replaces it"
            raise UsageError(f"--output_dir: {where} has an earlier run in it", hint=hint)

    def _check_same(self, earlier: Mapping[str, Any]) -> None:
        if earlier.get("schema") != SCHEMA:
            text = f"{str(self.path)!r} was written by another version of onepass"
            raise UsageError(f"--resume_from_checkpoint: {text}")
        if earlier.get("processes", 1) != n_processes():
            raise UsageError(
                f"--resume_from_checkpoint: {n_processes()} processes, but the run was begun with"
                f" {earlier.get('processes', 1)}: batches would differ"
            )
        before = earlier.get("flags", {})
        now = json.loads(strict_json(self.flags))
        for name in sorted({*before, *now} - self.free):
            if before.get(name) != now.get(name):
                raise UsageError(
                    f"--{name}: got {now.get(name)!r}, but the run was begun with"
                    f" {before.get(name)!r}",
                    hint=f"leave out --{name}, or begin another run",
                )

    def _from(self, asked: str) -> Path | None:
        if asked == "true":
            return latest_checkpoint(self.path)
        for _, path, complete in checkpoints(self.path):
            if path.resolve() == Path(asked).resolve() and complete:
                return path
        found = [path.name for _, path, complete in sorted(checkpoints(self.path)) if complete]
        text = f"--resume_from_checkpoint: no complete checkpoint {asked!r} in {str(self.path)!r}"
        raise UsageError(text, allowed=found)

    def begin(self, data: Mapping[str, str] | None = None, writes: Sequence[str] = ()) -> None:
        """Take the folder: clear away what is not to stay, write run.json.

        Args:
            data: fingerprints; a resumed run must have the same.
            writes: names of files and folders that the system will make here, for --overwrite.
        """
        if self.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._begin(dict(data or {}), writes)
        if n_processes() > 1:  # none takes what the main one is about to remove for its own
            from torch import distributed

            if distributed.is_initialized():
                distributed.barrier()

    def _hold(self) -> None:
        if self._let_go is None:
            self._let_go = hold(self.path)

    def release(self) -> None:
        """Let other processes write to the folder."""
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    def _begin(self, data: dict[str, str], writes: Sequence[str]) -> None:
        if self.resumes and self.earlier is not None:
            self._begin_again(data)
            return
        if self.earlier is not None:
            tell(f"replacing the run of {self.earlier.get('started', '?')} in {self.path}")
            self._remove(self.earlier)
        record = {
            "program": PROGRAM,
            "schema": SCHEMA,
            "system": self.system,
            "flags": self.flags,
            "data": data,
            "processes": n_processes(),
            "writes": sorted({METRICS, SUMMARY, CURVES, *writes}),
            "versions": versions(),
            "started": datetime.datetime.now().isoformat(" ", "seconds"),
        }
        self.write_json(RUN, record)

    def go_on(self, data: Mapping[str, str]) -> None:
        """Take the folder of the earlier run as it stands, for a system without checkpoints."""
        earlier = self.earlier or {}
        before = earlier.get("data", {})
        for name in sorted({*before, *data}):
            if before.get(name) != data.get(name):
                raise UsageError(
                    f"--resume_from_checkpoint: the data ({name}) are not those the run began with:"
                    " put them back, or begin another run in a folder of its own"
                )
        self._hold()
        self._clean()
        now, then = versions(), earlier.get("versions", {})
        other = [f"{n} {then[n]} (now {v})" for n, v in now.items() if then.get(n, v) != v]
        if other:
            tell(f"begun with {', '.join(other)}: numbers may differ in their last digits")

    def _begin_again(self, data: Mapping[str, str]) -> None:
        self.go_on(data)
        step = int(self.checkpoint.name.removeprefix("checkpoint-")) if self.checkpoint else 0
        for found, path, complete in list(checkpoints(self.path)):
            if not complete or found > step:
                tell(f"removing {path}, " + ("which comes after" if complete else "half-written"))
                self._discard(path)
        if self.checkpoint:
            tell(f"going on from {self.checkpoint}")
        else:
            tell(f"no checkpoint in {self.path} yet: beginning at step 0")

    def _remove(self, earlier: Mapping[str, Any]) -> None:
        """Remove what an earlier run wrote; run.json last, for it says whose they are."""
        self._clean()
        for _, path, _ in list(checkpoints(self.path)):
            self._discard(path)
        for name in earlier.get("writes", []):
            if isinstance(name, str) and name == Path(name).name and name not in (".", ".."):
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    self._discard(path)
                else:
                    path.unlink(missing_ok=True)
        (self.path / RUN).unlink()

    def _clean(self) -> None:
        """Clear away what a killed run was writing or removing."""
        for pattern in (f"{DISCARDED}*", f"{PARTIAL}*"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(".*.partial"):
            path.unlink(missing_ok=True)

    def _discard(self, path: Path) -> None:
        gone = path.with_name(f"{DISCARDED}{os.getpid()}-{path.name}")
        path.rename(gone)  # a half-removed checkpoint must not look like one
        shutil.rmtree(gone, ignore_errors=True)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all; nothing but in the main process."""
        if self.is_main:
            replace_text(self.path / name, strict_json(value, indent=1) + "\n")

    def save(self, write: Callable[[Path], object], folder: str | None = None) -> None:
        """Let `write` fill a folder, then move it to `folder`, or its files here one by one."""
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.path))
        try:
            write(temporary)
            temporary.chmod(self.path.stat().st_mode & 0o777)  # mkdtemp's 0700 is for secrets
            if folder is not None:
                if (self.path / folder).exists():
                    self._discard(self.path / folder)
                temporary.rename(self.path / folder)
                return
            for file in sorted(temporary.iterdir()):
                if file.is_file():  # safetensors makes files for the owner alone
                    file.chmod(self.path.stat().st_mode & 0o666)
                file.replace(self.path / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    found = {"python": platform.python_version(), "onepass": __version__}
    for name in ("torch", "transformers", "peft", "accelerate", "tokenizers", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
