"""Facts about the summary's account of time."""

from __future__ import annotations

import pytest

from flexrun.report import RunCounters, report_text
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.links import Link
from offload.tiers import MemoryAccount
from offload.timeline import COMPUTE
from offload.transfer_engine import TransferEngine


@pytest.mark.parametrize(
    ("compute", "read", "bound"), [(9.0, 4.0, "compute"), (4.0, 9.5, "disk->host")]
)
def test_the_bound_is_what_was_busy_longest(compute, read, bound):
    """Shares are busy seconds of the run's; a link's speed is its bytes by its busy seconds."""
    transfers = TransferEngine(EmulatedBackend(MemoryAccount(), EmulatedMachine()))
    transfers.timeline.add(COMPUTE, "unit 0", 0.0, compute)
    transfers.timeline.add("disk->host", "weights", 0.0, read)
    transfers.counters[Link.DISK_TO_HOST].count("weights", 19 * 10**9)
    counters = RunCounters()
    counters.sweep(rows=3, sequences=2, seconds=6.0)
    counters.sweep(rows=3, sequences=2, seconds=4.0)
    summary = counters.summary(transfers, MemoryAccount(), {Link.DISK_TO_HOST: 4e9})
    transfers.close()
    assert summary["bound"] == bound
    assert summary["compute_share"] == compute / 10
    assert summary["links"] == {
        "disk->host": {
            "busy_share": read / 10,
            "gb_per_s": pytest.approx(19 / read, abs=1e-4),
            "raw_gb_per_s": 4.0,
        }
    }
    text = report_text(summary)
    assert text.startswith(f"bound by {bound}")
    assert "4.00 GB/s reached by a raw copy" in text


def test_a_run_of_nothing_has_no_bound():
    """Without a sweep there is nothing to report."""
    transfers = TransferEngine(EmulatedBackend(MemoryAccount(), EmulatedMachine()))
    summary = RunCounters().summary(transfers, MemoryAccount(), {})
    transfers.close()
    assert summary["bound"] is None
    assert summary["links"] == {}
    assert report_text(summary) == ""
