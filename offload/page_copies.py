"""What has to be copied between pages before a sweep's rows read them (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.page_table import Page, PageCopy


@dataclass(slots=True)
class PageCopies:
    """Copies that wait for the next sweep, and pages that nobody may have before it is over."""

    waiting: list[PageCopy] = field(default_factory=list)
    """That no sweep has taken yet."""
    being_read: list[Page] = field(default_factory=list)
    """Pages in no table that a copy of this sweep reads."""
    _read: list[Page] = field(default_factory=list)
    """The same of copies that wait."""
    _tails_being_read: list[int] = field(default_factory=list)
    _read_tails: list[int] = field(default_factory=list)

    def add(self, copy: PageCopy) -> None:
        """Make `copy` in the next sweep, if need be from where its source is now."""
        for earlier in self.waiting:
            # What is at a tail is there, unless a copy brings it.
            chained = copy.from_tail is None or earlier.to_tail is not None
            if chained and earlier.target == copy.source:  # which is not there yet
                copy = copy._replace(source=earlier.source, from_tail=earlier.from_tail)
        self.waiting.append(copy)

    @property
    def pages(self) -> set[Page]:
        """That copies which wait read or fill."""
        return {page for copy in self.waiting for page in (copy.source, copy.target)}

    def let_go(self, page: Page) -> bool:
        """`page` is in no table any more; whether others may have it at once."""
        self.waiting = [copy for copy in self.waiting if copy.target != page]
        if any(copy.source == page for copy in self.waiting):
            self._read.append(page)
            return False
        return True

    def keep(self, page: Page) -> None:
        """A copy that waits reads `page`, which is in no table any more."""
        self._read.append(page)

    def let_go_of_tail(self, tail: int) -> bool:
        """The same of a tail."""
        if any(copy.from_tail == tail for copy in self.waiting):
            self._read_tails.append(tail)
            return False
        return True

    def take(self) -> list[PageCopy]:
        """What the sweep that begins has to copy."""
        copies, self.waiting = self.waiting, []
        self.being_read += self._read
        self._tails_being_read += self._read_tails
        self._read, self._read_tails = [], []
        return copies

    def settle(self) -> tuple[list[Page], list[int]]:
        """The sweep is over: pages and tails that its copies have read."""
        free = self.being_read, self._tails_being_read
        self.being_read, self._tails_being_read = [], []
        return free
