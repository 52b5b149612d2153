"""What a thread of the CUDA backend waits for before it reads RAM itself; runs without a GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from offload.backend_cuda import CudaBackend
from offload.copy_stream import Copied
from offload.links import Link, TensorRows


class Event:
    """Notes when it is waited for."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def synchronize(self) -> None:
        self.notes.append(f"thread waited for {self.name}")


class Stream:
    """A copy stream that is never full."""

    stream = None

    def make_room(self) -> None: ...


class NotedRows(TensorRows):
    """Rows that note when they are read."""

    notes: list[str]

    def gather(self, out: torch.Tensor) -> None:
        self.notes.append("thread read RAM")
        super().gather(out)


@pytest.mark.parametrize("to_ram", [True, False])
def test_a_gather_reads_what_a_copy_from_the_device_has_written(
    monkeypatch: pytest.MonkeyPatch, to_ram: bool
) -> None:
    """Such a copy was handed to the device, but RAM has its bytes only at its end.

    For copies to the device the stream waits: the thread is needed for others.
    """
    notes: list[str] = []
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    backend: Any = CudaBackend.__new__(CudaBackend)
    backend._gathers, backend.device = {}, torch.device("cpu")
    backend._rows_in = backend._weights_in = backend._out = Stream()
    backend._issue = lambda *_: notes.append("issued")
    monkeypatch.setattr(NotedRows, "notes", notes, raising=False)
    end: Any = Event("the copy", notes)
    rows = NotedRows(
        torch.zeros(4, 8, dtype=torch.uint8), torch.tensor([1]), torch.empty(64).byte()
    )
    target = torch.empty(1, 8, dtype=torch.uint8)
    after = [Copied(end, end, to_ram=to_ram)]
    backend.copy(Link.HOST_TO_DEVICE, rows, target, after, urgent=True)
    waited = ["thread waited for the copy"] if to_ram else []
    assert notes == [*waited, "thread read RAM", "issued"]
