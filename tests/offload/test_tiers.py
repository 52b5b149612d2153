"""Facts about splits, sizes and the account of all budgets."""

from __future__ import annotations

import pytest

from offload.backend_emulated import EmulatedMachine
from offload.errors import CapacityError, SplitError
from offload.links import Link
from offload.tiers import MemoryAccount, Split, Tier, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("device=100", Split(device=100)),
        ("device=20,host=80", Split(device=20, host=80)),
        (" disk=50 , host=50", Split(host=50, disk=50)),
        ("device=33.4,host=33.3,disk=33.3", Split(device=33.4, host=33.3, disk=33.3)),
    ],
)
def test_splits_are_read_and_written(text, split):
    """A split is read from a text, and its own text is read back."""
    assert Split.parse(text) == split
    assert Split.parse(str(split)) == split


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read ''"),
        ("device", "cannot read 'device'"),
        ("device=20,gpu=80", "cannot read 'gpu=80'"),
        ("device=20,device=80", "cannot read 'device=80'"),
        ("device=100,", "cannot read ''"),
        ("device=many", "'many' in the split 'device=many' is not a number"),
        ("device=20,host=70", "sums to 90, not 100"),
        ("device=120,host=-20", "between 0 and 100"),
        ("device=nan", "between 0 and 100"),
    ],
)
def test_unreadable_splits_are_explained(text, words):
    """A split that cannot be read names the part that is wrong."""
    with pytest.raises(SplitError) as caught:
        Split.parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1048576", 2**20),
        ("16GiB", 16 * 2**30),
        ("16G", 16 * 10**9),
        ("1.5 MB", 1_500_000),
        (".5KiB", 512),
        ("2ki", 2048),
        ("3tb", 3 * 10**12),
        ("0", 0),
    ],
)
def test_sizes_are_read(text, nbytes):
    """Binary and decimal units, with or without a B."""
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1iB", "-1", "1e9", "1XB", "1 G B", "1,5G", "inf"])
def test_unreadable_sizes_are_refused(text):
    """What is not a size is an error that shows one."""
    with pytest.raises(SplitError, match="cannot read the size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (-(2**20), "-1.00 MiB"),
        (2**40, "1.00 TiB"),
    ],
)
def test_sizes_are_written_for_people(nbytes, text):
    """The largest unit that leaves a number of at least one."""
    assert format_size(nbytes) == text


def test_the_account_counts_and_refuses():
    """Charges add up, the peak stays, and a charge over the limit changes nothing."""
    account = MemoryAccount({Tier.DEVICE: 1000, Tier.HOST: None})
    account.charge(Tier.DEVICE, 600, "weights")
    account.refund(Tier.DEVICE, 200)
    account.charge(Tier.DEVICE, 600, "the KV cache")
    with pytest.raises(CapacityError) as caught:
        account.charge(Tier.DEVICE, 1, "one byte more")
    assert (account.used[Tier.DEVICE], account.peak[Tier.DEVICE]) == (1000, 1000)
    assert "one byte more needs 1 B on device, but 1 B is missing" in str(caught.value)
    assert "raise --device-memory" in str(caught.value)
    account.charge(Tier.HOST, 10**15, "no limit is no limit")
    assert account.available(Tier.HOST) is None
    assert (account.available(Tier.DEVICE), account.available(Tier.DISK)) == (0, None)


@pytest.mark.parametrize(
    ("tier", "flag"),
    [(Tier.DEVICE, "device-memory"), (Tier.HOST, "host-memory"), (Tier.DISK, "disk-space")],
)
def test_the_flag_that_helps_is_named(tier, flag):
    """A budget that is too small names the missing bytes and the flag that raises it."""
    account = MemoryAccount({tier: 1024})
    with pytest.raises(CapacityError, match=r"1.00 KiB is missing") as caught:
        account.charge(tier, 2048, "weights")
    assert f"raise --{flag}" in str(caught.value)


def test_an_emulated_machine_is_read():
    """Capacity and the speed of links, in any order, each optional."""
    machine = EmulatedMachine.parse("host-to-device=2GB/s, capacity=256MiB,disk-read=1GB/s")
    assert machine.capacity == 256 * 2**20
    assert machine.speeds == {Link.HOST_TO_DEVICE: 2 * 10**9, Link.DISK_TO_HOST: 10**9}
    assert EmulatedMachine.parse("device-to-host=1GB/s").capacity is None


@pytest.mark.parametrize(
    "text", ["", "capacity", "capacity=big", "host-to-device=2GB", "disk-read=0/s", "nvlink=1GB/s"]
)
def test_an_unreadable_machine_is_refused(text):
    """What is not an emulated machine is an error."""
    with pytest.raises(SplitError):
        EmulatedMachine.parse(text)
