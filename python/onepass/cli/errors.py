"""Wrong invocations in at most three lines: what came, what is allowed, what was probably meant.

`Parser` is argparse without its usage block; `UsageError` is what it raises, and what a command
raises itself for a request that cannot be served. The dispatcher turns either into exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

MAX_LISTED = 24  # a longer list of allowed values hides the one that was meant
WANTED = {"int": "a whole number", "float": "a number"}


# What people type for a value of another spelling, and never for the one spelt most like it.
MEANT = {"gpu": "cuda", "rocm": "cuda"}


class Failed(Exception):
    """A failure that its message tells in full, mend included: one line, exit code 1."""


class UsageError(Exception):
    """A request that cannot be served as written: up to three lines, exit code 2."""

    def __init__(
        self,
        message: str,
        *,
        allowed: Iterable[str] = (),
        meant: str | None = None,
        hint: str | None = None,
        prog: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.allowed, self.meant = message, list(allowed), meant
        self.hint, self.prog = hint, prog

    def lines(self) -> list[str]:
        """The lines for stderr, at most three."""
        lines = [f"{self.prog or 'onepass'}: {one_line(self.message)}"]
        if self.allowed:
            listed = ", ".join(self.allowed[:MAX_LISTED])
            rest = len(self.allowed) - MAX_LISTED
            lines.append(f"  allowed: {listed}" + (f", ... ({rest} more)" if rest > 0 else ""))
        if self.meant:
            lines.append(f"  did you mean {self.meant}?")
        elif self.hint:
            lines.append(f"  {one_line(self.hint)}")
        return lines


def one_line(text: object, limit: int = 300) -> str:
    """The first non-empty line of `text`, cut at `limit` characters."""
    first = next((line.strip() for line in str(text).splitlines() if line.strip()), "")
    return first if len(first) <= limit else first[: limit - 3] + "..."


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that `word` was probably meant to be, or None."""
    import difflib

    by_key = {a.lower().lstrip("-").replace("_", "-"): a for a in allowed}
    key = word.lower().lstrip("-").replace("_", "-")
    if MEANT.get(key) in by_key:
        return by_key[MEANT[key]]
    match = difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)
    if match:
        return by_key[match[0]]
    starts = [a for k, a in by_key.items() if key and k.startswith(key)]
    return starts[0] if len(starts) == 1 else None


def unknown(
    kind: str,
    word: str,
    allowed: Iterable[str],
    *,
    prog: str | None = None,
    also: Iterable[str] = (),
) -> UsageError:
    """A UsageError for a `word` that is none of the `allowed` ones: got, allowed, nearest.

    A command calls it for values that only it can judge: `raise unknown("case", name, CASES)`.
    What is `also` meant at times is suggested, not listed.
    """
    listed = list(allowed)
    hint = f"see {prog} --help" if prog else None
    meant = nearest(word, [*listed, *also])
    return UsageError(f"unknown {kind} {word!r}", allowed=listed, meant=meant, hint=hint, prog=prog)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError with got, allowed and nearest; no abbreviations.

    Abbreviated flags are refused since the next release's flag could change what one means.
    """

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("exit_on_error", False)
        super().__init__(*args, **kwargs)

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        tokens = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown_flags(tokens)
        parsed, extras = self.parse_known_args(tokens, namespace)
        if extras:
            self._refuse_extra(extras[0])
        return parsed

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            raise self._explain(error) from error

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help", prog=self.prog)

    def _parsers(self) -> list[Parser]:
        found: list[Parser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in dict.fromkeys(action.choices.values()):
                    found += child._parsers()
        return found

    def _flags(self) -> list[str]:
        seen: dict[str, None] = {}
        for parser in self._parsers():
            for action in parser._actions:
                if action.help != argparse.SUPPRESS:
                    seen.update(dict.fromkeys(action.option_strings))
        return list(seen)

    def _refuse_unknown_flags(self, tokens: Sequence[str]) -> None:
        """A misspelt flag is named before anything that follows from it (its value, a lack)."""
        known = {f for p in self._parsers() for a in p._actions for f in a.option_strings}
        for token in tokens:
            if token == "--":
                return
            if token.startswith("--") and token.split("=", 1)[0] not in known:
                self._refuse_extra(token)

    def _refuse_extra(self, token: str) -> NoReturn:
        if token.startswith("-") and token != "-":
            raise unknown("option", token.split("=", 1)[0], self._flags(), prog=self.prog)
        raise UsageError(
            f"unexpected argument {token!r}", hint=f"see {self.prog} --help", prog=self.prog
        )

    def _explain(self, error: argparse.ArgumentError) -> UsageError:
        message, name = str(error.message), error.argument_name
        action = next((a for a in self._actions if _name(a) == name), None)
        hint = f"see {self.prog} --help"
        if action is None or name is None:
            return UsageError(message, hint=hint, prog=self.prog)
        choices = [str(c) for c in action.choices] if action.choices is not None else []
        label = name if action.option_strings else action.metavar or action.dest
        if bad := re.match(r"invalid choice: (.+?) \((?:choose from|maybe)", message, re.DOTALL):
            word = bad[1].strip("'\"")
            told = f"{label}: unknown value" if action.option_strings else f"no {action.dest}"
            return UsageError(
                f"{told} {word!r}",
                allowed=choices,
                meant=nearest(word, choices),
                hint=hint,
                prog=self.prog,
            )
        if bad := re.match(r"invalid (.+?) value: (.+)", message, re.DOTALL):
            text = f"{label}: got {bad[2]}, wanted {WANTED.get(bad[1], bad[1])}"
            return UsageError(text, allowed=choices, hint=hint, prog=self.prog)
        if message.startswith("expected"):
            wanted = {"expected one argument": "a value"}.get(message, message[len("expected ") :])
            text = f"{label}: got nothing, wanted {wanted}"
            return UsageError(text, allowed=choices, hint=hint, prog=self.prog)
        if bad := re.match(r"ignored explicit argument (.+)", message, re.DOTALL):
            text = f"{label}: takes no value, got {bad[1]}"
            return UsageError(text, hint=hint, prog=self.prog)
        return UsageError(f"{label}: {message}", allowed=choices, hint=hint, prog=self.prog)


def _name(action: argparse.Action) -> str | None:
    """The name that argparse gives an action in its errors."""
    return argparse.ArgumentError(action, "").argument_name
