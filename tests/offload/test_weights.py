"""Facts about the weight store and the embedding table: homes, slabs, rings and what is bound."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch

from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.embedding import EmbeddingTable
from offload.errors import CapacityError
from offload.links import Link
from offload.offload_file import OffloadFile
from offload.tiers import MemoryAccount, Tier
from offload.transfer import TransferEngine
from offload.weights import Slab, Weight, WeightStore

LAYERS = 5


def make_weight(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Weight:
    return Weight(name, torch.Size(shape), dtype, ((torch.nn.Module(), name),))


def make_units(draw: random.Random) -> list[list[Weight]]:
    """Layers of odd sizes and a larger head; a norm is float32, the rest bfloat16."""
    units = [
        [
            make_weight(f"{layer}.norm", 7),
            make_weight(f"{layer}.up", draw.randint(1, 9), 33, dtype=torch.bfloat16),
            make_weight(f"{layer}.down", 33, 5, dtype=torch.bfloat16),
        ]
        for layer in range(LAYERS)
    ]
    return [*units, [make_weight("head", 101, 33, dtype=torch.bfloat16)]]


def make_backend(name: str, limits: dict[Tier, int | None] | None = None) -> DeviceBackend:
    account = MemoryAccount(limits or {})
    return CpuBackend(account) if name == "cpu" else EmulatedBackend(account, EmulatedMachine())


class Rig:
    """A weight store with random values at home."""

    def __init__(self, backend: DeviceBackend, directory: Path, seed: int, depth: int = 2) -> None:
        draw = random.Random(seed)
        self.backend, self.units = backend, make_units(draw)
        self.norm, self.table = make_weight("norm", 33), make_weight("table", 101, 33)
        everything = [*(w for unit in self.units for w in unit), self.norm, self.table]
        self.values = {w.name: torch.randn(w.shape).to(w.dtype) for w in everything}
        self.tiers = {w.name: draw.choice(list(Tier)) for w in everything}
        self.transfers = TransferEngine(backend)
        self.file = OffloadFile(directory, 2**20)
        self.store = WeightStore(
            self.units,
            [self.norm],
            [self.table],
            self.tiers,
            backend,
            self.transfers,
            self.file,
            depth,
        )
        for name, value in self.values.items():
            self.store.load(name, value)

    def bound(self, weight: Weight) -> torch.Tensor:
        module, attribute = weight.users[0]
        parameter = module._parameters[attribute]
        assert parameter is not None
        return parameter

    def is_right(self, weight: Weight) -> bool:
        return torch.equal(self.bound(weight), self.values[weight.name])

    def close(self) -> None:
        self.transfers.close()
        self.store.close()
        self.file.close()


@pytest.mark.parametrize("name", ["cpu", "emulated"])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bound_weights_have_the_loaded_values(tmp_path, name, seed, depth):
    """In two sweeps with any placement, every unit has its own values from bind to release."""
    rig = Rig(make_backend(name), tmp_path, seed, depth)
    units = LAYERS + 1
    for _ in range(2):
        for ahead in range(min(depth - 1, units)):
            rig.store.prefetch(ahead)
        for unit in range(units):
            if unit + depth - 1 < units:
                rig.store.prefetch(unit + depth - 1)
            rig.store.bind(unit)
            assert all(rig.is_right(weight) for weight in rig.units[unit])
            assert rig.is_right(rig.norm)
            rig.store.release(unit)
    rig.close()


def padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@pytest.mark.parametrize("name", ["cpu", "emulated"])
@pytest.mark.parametrize("seed", range(10))
def test_streamed_bytes_cross_their_link_once(tmp_path, name, seed):
    """A sweep moves each unit's streamed weights once, as one slab of padded tensors per tier."""
    rig = Rig(make_backend(name), tmp_path, seed)
    for unit in range(LAYERS + 1):
        rig.store.prefetch(unit)
        rig.store.bind(unit)
        rig.store.release(unit)
    weights = [weight for unit in rig.units for weight in unit]
    on = {t: sum(padded(w.nbytes) for w in weights if rig.tiers[w.name] is t) for t in Tier}
    moved = {link: counters.total_bytes for link, counters in rig.transfers.counters.items()}
    if name == "cpu":
        assert moved == {Link.DISK_TO_DEVICE: on[Tier.DISK], Link.HOST_TO_DISK: 0}
        assert rig.store.streamed_bytes == on[Tier.DISK]
    else:
        assert moved[Link.DISK_TO_HOST] == on[Tier.DISK]
        assert moved[Link.HOST_TO_DEVICE] == on[Tier.DISK] + on[Tier.HOST]
        assert rig.store.streamed_bytes == on[Tier.DISK] + on[Tier.HOST]
    slabs = {
        (number, rig.tiers[weight.name])
        for number, unit in enumerate(rig.units)
        for weight in unit
        if rig.tiers[weight.name] is Tier.DISK
    }
    assert rig.transfers.counters[rig.backend.disk_in].transfers == len(slabs)
    rig.close()


@pytest.mark.parametrize("name", ["cpu", "emulated"])
def test_homes_are_charged_and_given_back(tmp_path, name):
    """DEVICE holds weights, two slots for the widest layer and one for the head, until close."""
    rig = Rig(make_backend(name), tmp_path, seed=3)
    stays = (Tier.DEVICE,) if name == "emulated" else (Tier.DEVICE, Tier.HOST)

    def streamed(unit: list[Weight]) -> int:
        return sum(padded(w.nbytes) for w in unit if rig.tiers[w.name] not in stays)

    everything = [*(w for unit in rig.units for w in unit), rig.table]
    at_home = sum(padded(w.nbytes) for w in everything if rig.tiers[w.name] is Tier.DEVICE)
    ring = 2 * max(streamed(unit) for unit in rig.units[:-1]) + streamed(rig.units[-1])
    assert ring > 0
    account = rig.backend.account
    assert account.used[Tier.DEVICE] == at_home + ring + padded(rig.norm.nbytes)
    rig.close()
    assert set(account.used.values()) == {0}


def test_a_tied_weight_is_bound_everywhere():
    """All modules that share a tensor share one parameter."""
    modules = [torch.nn.Module(), torch.nn.Module()]
    users = ((modules[0], "weight"), (modules[1], "table"))
    weight = Weight("head", torch.Size((3, 4)), torch.float32, users)
    data = torch.arange(12, dtype=torch.float32).view(torch.uint8).flatten()
    weight.bind(data)
    bound = modules[0]._parameters["weight"]
    assert bound is modules[1]._parameters["table"]
    assert bound is not None
    assert bound.data_ptr() == data.data_ptr()
    assert bound.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_tensors_in_a_slab_start_on_cache_lines():
    """A slab's tensors do not overlap and begin at multiples of 64 bytes."""
    slab = Slab([make_weight("a", 3), make_weight("b", 33), make_weight("c", 16)])
    assert (slab.offsets, slab.nbytes) == ([0, 64, 256], 320)
    sizes = [view.nbytes for _, view in slab.views(torch.zeros(320, dtype=torch.uint8))]
    assert sizes == [12, 132, 64]


@pytest.mark.parametrize("share", [0, 50, 100])
def test_a_full_device_is_refused(share):
    """Homes and rings alike are refused when they do not fit, and the error names the tier."""
    units = make_units(random.Random(0))
    names = [weight.name for unit in units for weight in unit]
    on_device = names[: len(names) * share // 100]
    tiers = {name: Tier.DEVICE if name in on_device else Tier.HOST for name in names}
    backend = make_backend("emulated", {Tier.DEVICE: 4000})
    missing = pytest.raises(CapacityError, match=r"on device, but .* is missing")
    with contextlib.closing(TransferEngine(backend)) as transfers, missing:
        WeightStore(units, [], [], tiers, backend, transfers, None, 2)
    assert backend.account.peak[Tier.DEVICE] <= 4000


@pytest.mark.parametrize(
    ("name", "tier"), [("cpu", Tier.DISK), ("emulated", Tier.DISK), ("emulated", Tier.HOST)]
)
def test_embedding_rows_travel_instead_of_the_table(tmp_path, name, tier):
    """Only the distinct rows that occur cross the link, and lookups give the table's own rows."""
    backend = make_backend(name)
    rig = Rig(backend, tmp_path, seed=0)
    home = rig.file.extent(rig.table.nbytes) if tier is Tier.DISK else None
    memory = None if home else backend.allocate(Tier.HOST, rig.table.nbytes, "table")
    data = rig.values["table"].view(-1).view(torch.uint8)
    if home:
        rig.file.write(home.offset, data)
    else:
        assert memory is not None
        memory.copy_(data)
    table = EmbeddingTable(rig.table, home or memory, backend, rig.transfers)  # type: ignore[arg-type]
    module = torch.nn.Embedding(101, 33, padding_idx=5, device="meta")
    for ids in ([5, 100, 5, 0], list(range(101)), [7]):
        local = table.bind(torch.tensor(ids), module)
        assert torch.equal(module(local), rig.values["table"][ids])
        assert len(module.weight) == len(set(ids))
    link = backend.disk_in if tier is Tier.DISK else Link.HOST_TO_DEVICE
    assert rig.transfers.counters[link].bytes == {"embedding": (3 + 101 + 1) * 132}
    table.close()
    if memory is not None:
        backend.free(Tier.HOST, memory)
    rig.close()
    assert set(backend.account.used.values()) == {0}
