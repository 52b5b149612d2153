"""The transfer engine: the only place that copies bytes between tiers.

Every link has a queue, threads and counters of its own. A copy is cut into requests of a few MiB,
which wait outside the queue until what they depend on has happened and are then taken by deadline:
a small urgent copy overtakes a layer's weights, and nothing ever waits behind a copy that cannot
run. The thread that computes never waits for a copy it does not need.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from offload.cut import cut
from offload.lane import Lane
from offload.links import FileExtent, HostWork, Link
from offload.staging import KEPT
from offload.timeline import Timeline
from offload.transfer import URGENT, LinkCounters, Part, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload.backend import DeviceBackend, Source, Target
    from offload.staging import StagingBuffers

URGENT_THREADS = {Link.DISK_TO_HOST: KEPT}
"""A disk needs several reads under way. To a device one thread issues all that is urgent: staging
that rows are gathered into relies on their order."""


class TransferEngine:
    """Queues, threads and counters of every link of a backend."""

    def __init__(self, backend: DeviceBackend, timeline: Timeline | None = None) -> None:
        self._backend = backend
        self.timeline = timeline or Timeline(backend)
        self._numbers = itertools.count()
        self._staging: StagingBuffers | None = None
        self._under_way = 0
        self._closing = False
        self._all_done = threading.Condition()
        self.counters = {link: LinkCounters() for link in backend.links}
        self._lanes = {
            link: Lane(f"flexrun {link}", backend.requests_in_flight(link), self._run)
            for link in backend.links
        }
        # Where a thread may block on the device, what is urgent must find one that is free.
        self._urgent_lanes = {
            link: Lane(f"flexrun {link}, urgent", URGENT_THREADS.get(link, 1), self._run)
            for link in backend.blocking_links
        }

    @property
    def _all_lanes(self) -> list[Lane]:
        return [*self._lanes.values(), *self._urgent_lanes.values()]

    def _lane_of(self, part: Part) -> Lane:
        lane = self._lanes[part.link]
        return self._urgent_lanes.get(part.link, lane) if part.urgent else lane

    def use_staging(self, staging: StagingBuffers) -> None:
        """Let what goes from disk to a separate device pass through these buffers."""
        self._staging = staging

    def submit(
        self,
        link: Link,
        source: Source,
        target: Target,
        *,
        kind: str,
        after: Sequence[Any] = (),
        priority: int = 1,
        padding: int = 0,
    ) -> Transfer:
        """Queue a copy of `source` to `target`; `after` holds transfers and device events.

        Lower `priority` goes first. A transfer may only depend on ones submitted before it. Of the
        bytes, `padding` are counted as such and not as `kind`.
        """
        requests = self._requests(link, source, target)
        return self._submit(link, requests, kind, after, priority, padding)

    def submit_to_disk(
        self,
        copies: Sequence[tuple[torch.Tensor, FileExtent]],
        *,
        kind: str,
        after: Sequence[Any] = (),
        priority: int = 1,
    ) -> Transfer:
        """Write pieces of RAM (uint8, at least one) to a file."""
        link = Link.HOST_TO_DISK
        requests = [part for pair in copies for part in self._requests(link, *pair)]
        return self._submit(link, requests, kind, after, priority, padding=0)

    def submit_from_disk(
        self,
        copies: Sequence[tuple[FileExtent, torch.Tensor]],
        *,
        kind: str,
        after: Sequence[Any] = (),
        priority: int = 1,
        padding: int = 0,
    ) -> Transfer:
        """Read extents (at least one) into DEVICE memory, over HOST where that is another one."""
        link, relayed = self._backend.disk_in, not self._backend.unified
        requests = [part for pair in copies for part in self._requests(link, *pair)]
        return self._submit(link, requests, kind, after, priority, padding, relayed)

    def submit_work(
        self, link: Link, work: HostWork, *, kind: str, after: Sequence[Any] = ()
    ) -> Transfer:
        """Queue work of the processor under `link`, which is none of the backend's.

        It runs in one thread, one after another, once all of `after` is over.
        """
        if link not in self._lanes:
            self.counters[link] = LinkCounters()
            self._lanes[link] = Lane(f"flexrun {link}", 1, self._run)
        return self._submit(link, [(work, None)], kind, after, URGENT, padding=0)

    def _requests(self, link: Link, source: Source, target: Target) -> list[tuple[Source, Target]]:
        size = self._backend.request_bytes(link)
        if link is Link.DISK_TO_HOST and self._staging is not None:
            size = min(size, self._staging.size)
        return list(cut(source, target, size))

    def _submit(
        self,
        link: Link,
        requests: Sequence[tuple[Source | HostWork, Target | None]],
        kind: str,
        after: Sequence[Any],
        priority: int,
        padding: int,
        relayed: bool = False,
    ) -> Transfer:
        with self._all_done:
            self._under_way += 1
        transfer = Transfer(self._backend, len(requests), then=self._one_done)
        self.counters[link].transfers += 1
        waits = [each for each in after if isinstance(each, Transfer)]
        events = [each for each in after if each is not None and not isinstance(each, Transfer)]
        parts = [
            Part(priority, next(self._numbers), link, *request, kind, events, transfer)
            for request in requests
        ]
        parts[0].padding = padding
        for part in parts:
            part.relayed = relayed
            part.urgent = priority == URGENT
        if pending := [each for each in waits if not each.issued]:
            _when_all_issued(pending, lambda: self._start(parts, waits))
        else:
            self._start(parts, waits)
        return transfer

    def _start(self, parts: list[Part], waits: list[Transfer]) -> None:
        error = next((each.error for each in waits if each.error is not None), None)
        if error is not None:
            for part in parts:
                part.transfer.finish_part(error=error)
            return
        arrived = [event for each in waits for event in each.events]
        for part in parts:
            part.after = [*part.after, *arrived]
        self._lane_of(parts[0]).put(parts)

    def _run(self, part: Part) -> None:
        """In a link's thread: one request."""
        event = None
        try:
            if part.transfer.error is not None:
                raise part.transfer.error  # the rest of a copy that failed
            if part.relayed:
                self._relay(part)
                return
            event = self._copy(part)
        except BaseException as error:  # handed to whoever waits for the bytes
            part.transfer.finish_part(error=error)
        else:
            part.transfer.finish_part(event)
        finally:
            if part.staged is not None:
                assert self._staging is not None
                self._staging.release(part.staged, event)

    def _relay(self, part: Part) -> None:
        """Read into a staging buffer, then queue its copy to the device."""
        assert self._staging is not None
        buffer = self._staging.acquire(urgent=part.urgent)
        part.staged = buffer
        nbytes = part.source.nbytes
        target, part.target = part.target, buffer[:nbytes]
        after, part.after = part.after, ()
        self._copy(part)
        part.staged = None  # now the next part's
        onward = Part(
            # Before anything else: while it waits it holds a buffer that the disk could fill.
            URGENT,
            part.number,
            Link.HOST_TO_DEVICE,
            buffer[:nbytes],
            target,
            part.kind,
            after,
            part.transfer,
            padding=part.padding,
            staged=buffer,
            urgent=part.urgent,
        )
        self._lane_of(onward).put([onward])

    def _copy(self, part: Part) -> Any:
        if isinstance(part.source, HostWork):
            for each in part.after:
                self._backend.synchronize(each)
            start, event = time.perf_counter(), None
            part.source.run()
        else:
            start = time.perf_counter()
            assert part.target is not None
            event = self._backend.copy(
                part.link, part.source, part.target, part.after, urgent=part.urgent
            )
        nbytes, link = part.source.nbytes, str(part.link)
        if event is None:
            self.timeline.add(link, part.kind, start, time.perf_counter(), nbytes)
        else:
            self.timeline.add_marks(link, part.kind, *self._backend.marks_of(event), nbytes)
        counters = self.counters[part.link]
        counters.count(part.kind, nbytes - part.padding)
        if part.padding:
            counters.count("padding", part.padding)
        return event

    def _one_done(self) -> None:
        with self._all_done:
            self._under_way -= 1
            if not self._under_way:
                self._all_done.notify_all()

    def drain(self) -> None:
        """Wait until nothing is queued or under way."""
        with self._all_done:
            while self._under_way:
                in_time = self._all_done.wait(0.5)
                if not in_time and self._closing and self._stuck():
                    return

    def _stuck(self) -> bool:
        """Whether nothing can run: what is under way was lost when an interrupt hit `submit`."""
        # Twice: a link that was asleep may have been handed a part by one that was not, yet.
        return all(lane.idle for _ in range(2) for lane in self._all_lanes)

    def close(self) -> None:
        """Finish what is queued and end the threads; may be called again."""
        if not self._closing:
            self._closing = True
            self.drain()
        for lane in self._all_lanes:
            lane.close()


def _when_all_issued(transfers: Sequence[Transfer], then: Callable[[], None]) -> None:
    """Call `then` once, when the last of `transfers` (at least one) is issued."""
    left = itertools.count(len(transfers), -1)
    next(left)

    def one_less() -> None:
        if next(left) == 0:
            then()

    for transfer in transfers:
        transfer.when_issued(one_less)
