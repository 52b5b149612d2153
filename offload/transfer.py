"""The transfer engine: the only place that copies bytes between tiers.

One queue and one thread per link. A transfer starts when everything it depends on has happened, in
the order of priority and submission; the thread that computes never waits for a copy it does not
need.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload.backend import DeviceBackend, Source, Target
    from offload.links import Link


class Transfer:
    """Bytes on their way; `wait` orders the device's compute after their arrival."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self._issued = threading.Event()
        self._error: BaseException | None = None
        self.event: Any = None

    @property
    def issued(self) -> bool:
        """Whether the copy was handed to the device (on the CPU: whether it is over)."""
        return self._issued.is_set()

    def wait(self) -> None:
        """Compute submitted from now on sees the bytes. Raises what the copy raised."""
        self._issued.wait()
        if self._error is not None:
            raise self._error
        self._backend.order_after(self.event)

    def synchronize(self) -> None:
        """Block until the bytes have arrived. Raises what the copy raised."""
        self.wait()
        self._backend.synchronize(self.event)

    def finish(self, event: Any = None, error: BaseException | None = None) -> None:
        """Called once by the link's thread."""
        self.event, self._error = event, error
        self._issued.set()


@dataclass(slots=True)
class LinkCounters:
    """What crossed a link so far."""

    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes by what they are: weights, embedding, kv."""
    busy_seconds: float = 0.0
    transfers: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(order=True, slots=True)
class _Job:
    priority: int
    number: int
    source: Source = field(compare=False)
    target: Target = field(compare=False)
    kind: str = field(compare=False)
    after: Sequence[Any] = field(compare=False)
    transfer: Transfer | None = field(compare=False)


class TransferEngine:
    """Queues, threads and counters of every link of a backend."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self._numbers = itertools.count()
        self._queues: dict[Link, queue.PriorityQueue[_Job]] = {}
        self._threads: list[threading.Thread] = []
        self.counters = {link: LinkCounters() for link in backend.links}
        for link in backend.links:
            self._queues[link] = queue.PriorityQueue()
            thread = threading.Thread(
                target=self._serve, args=(link,), name=f"flexrun {link}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def submit(
        self,
        link: Link,
        source: Source,
        target: Target,
        *,
        kind: str,
        after: Sequence[Any] = (),
        priority: int = 1,
    ) -> Transfer:
        """Queue a copy of `source` to `target`; `after` holds transfers and device events.

        Lower `priority` goes first. A transfer may only depend on ones submitted before it.
        """
        transfer = Transfer(self._backend)
        job = _Job(priority, next(self._numbers), source, target, kind, after, transfer)
        self._queues[link].put(job)
        return transfer

    def _serve(self, link: Link) -> None:
        # Tensors made in inference mode can only be written in inference mode, in any thread.
        with torch.inference_mode():
            while True:
                job = self._queues[link].get()
                if job.transfer is None:
                    return
                try:
                    job.transfer.finish(self._run(link, job))
                except BaseException as error:  # handed to whoever waits for the bytes
                    job.transfer.finish(error=error)
                del job

    def _run(self, link: Link, job: _Job) -> Any:
        events = []
        for dependency in job.after:
            if isinstance(dependency, Transfer):
                dependency._issued.wait()
                if dependency._error is not None:
                    raise dependency._error
                events.append(dependency.event)
            else:
                events.append(dependency)
        counters = self.counters[link]
        start = time.perf_counter()
        event = self._backend.copy(link, job.source, job.target, events)
        counters.busy_seconds += time.perf_counter() - start
        nbytes = job.source.nbytes
        counters.bytes[job.kind] = counters.bytes.get(job.kind, 0) + nbytes
        counters.transfers += 1
        return event

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        for jobs in self._queues.values():
            jobs.put(_Job(2**31, next(self._numbers), None, None, "", (), None))  # type: ignore[arg-type]
        for thread in self._threads:
            thread.join()
        self._threads.clear()
