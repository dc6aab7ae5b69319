"""Ranks of a process group as threads of one process, which run in turn: whoever waits for the
others in a collective hands on.

What a sharded call does on each rank, interpreter and all, without the seconds that processes take
to start. Real process groups: test_sharded_processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from onepass.ops import _shards

T = TypeVar("T")
NAME = "threads"


class Alone(Exception):
    """A rank waits for others that are gone."""


class Ranks:
    """A group of n ranks; `counted` holds the shape and dtype of every collective's payload."""

    def __init__(self, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = n
        self.group_name = NAME  # what LazyLogits ask of a process group
        self.counted: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        self._own = threading.local()
        monkeypatch.setattr(_shards, "rank_in", lambda group: self._own.rank)
        monkeypatch.setattr(_shards, "this_rank", lambda: f"rank {self._own.rank}")
        monkeypatch.setattr(_shards, "ranks_in", lambda group: list(range(n)))
        monkeypatch.setattr(_shards, "all_gathered", self._gathered)
        monkeypatch.setattr(_shards, "all_summed", self._summed)

    def run(self, call: Callable[[int], T]) -> list[T]:
        """call(rank) on every rank; what each returns. Raises what one of them raised."""
        self._turn = threading.Lock()
        self._met = threading.Condition()
        self._arrived, self._meeting, self._left = 0, 0, False
        self._slots: list[Any] = [None] * self.n
        results: list[Any] = [None] * self.n
        self.raised: list[BaseException | None] = [None] * self.n
        grad = torch.is_grad_enabled()

        def body(rank: int) -> None:
            self._own.rank = rank
            with self._turn, torch.set_grad_enabled(grad):
                try:
                    results[rank] = call(rank)
                except BaseException as error:
                    self.raised[rank] = error
            with self._met:  # nobody waits for a rank that is gone
                self._left = True
                self._met.notify_all()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [error for error in self.raised if error is not None]
        errors.sort(key=lambda error: isinstance(error, Alone))
        if errors:
            raise errors[0]
        return results

    def _exchange(self, kind: str, mine: Tensor) -> list[Tensor]:
        rank = self._own.rank
        if rank == 0:
            self.counted.append((kind, tuple(mine.shape), mine.dtype))
        self._slots[rank] = mine.detach().clone()
        self._wait()
        found = [slot.clone() for slot in self._slots]
        self._wait()
        assert len({(t.shape, t.dtype) for t in found}) == 1, "ranks came with unlike tensors"
        return found

    def _wait(self) -> None:
        self._turn.release()
        try:
            with self._met:
                meeting = self._meeting
                self._arrived += 1
                if self._arrived == self.n:
                    self._arrived, self._meeting = 0, meeting + 1
                    self._met.notify_all()
                self._met.wait_for(lambda: self._meeting != meeting or self._left, timeout=60)
                if self._meeting == meeting:
                    raise Alone("the other ranks do not come to this collective")
        finally:
            self._turn.acquire()

    def _gathered(self, mine: Tensor, group: str) -> Tensor:
        assert group == NAME
        return torch.stack(self._exchange("all_gather", mine))

    def _summed(self, mine: Tensor, group: str) -> Tensor:
        return torch.stack(self._exchange("all_reduce", mine)).sum(0)
