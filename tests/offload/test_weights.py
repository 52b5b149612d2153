"""Facts about the weight store and the embedding table: homes, slabs, rings and what is bound."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexrun.zigzag import Action, Step, zigzag
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.embedding import EmbeddingTable
from offload.errors import CapacityError
from offload.links import FileExtent, Link
from offload.prepared import PreparedStore, prepare
from offload.slabs import DiskSlab, Slab, Weight
from offload.tiers import MemoryAccount, Tier
from offload.transfer_engine import TransferEngine
from offload.weights import WeightStore

LAYERS = 5


def make_weight(
    name: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
) -> Weight:
    return Weight(name, torch.Size(shape), dtype, ((torch.nn.Module(), name),), compute)


def make_units(draw: random.Random, compute: torch.dtype | None = None) -> list[list[Weight]]:
    """Layers of odd sizes and a larger head; a norm is float32, the rest bfloat16."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "compute": compute}
    units = [
        [
            make_weight(f"{layer}.norm", 7),
            make_weight(f"{layer}.up", draw.randint(1, 9), 33, **half),
            make_weight(f"{layer}.down", 33, 5, **half),
        ]
        for layer in range(LAYERS)
    ]
    return [*units, [make_weight("head", 101, 33, **half)]]


def make_backend(name: str, limits: dict[Tier, int | None] | None = None) -> DeviceBackend:
    account = MemoryAccount(limits or {})
    return CpuBackend(account) if name == "cpu" else EmulatedBackend(account, EmulatedMachine())


class Memory:
    """Tensors in memory, read like a checkpoint."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values

    def load(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self.values[name]) for name in names)


class Rig:
    """A weight store with random values at home."""

    def __init__(
        self,
        backend: DeviceBackend,
        directory: Path,
        seed: int,
        depth: int = 2,
        compute: torch.dtype | None = None,
    ) -> None:
        draw = random.Random(seed)
        self.backend, self.units = backend, make_units(draw, compute)
        self.norm, self.table = make_weight("norm", 33), make_weight("table", 101, 33)
        everything = [*(w for unit in self.units for w in unit), self.norm, self.table]
        self.values = {w.name: torch.randn(w.shape).to(w.dtype) for w in everything}
        self.tiers = {w.name: draw.choice(list(Tier)) for w in everything}
        self.transfers = TransferEngine(backend)
        source = Memory(self.values)
        self.disk: PreparedStore = prepare(
            directory, "test", source, [[self.norm, self.table], *self.units]
        )
        self.store = WeightStore(
            self.units,
            [self.norm],
            [self.table],
            self.tiers,
            backend,
            self.transfers,
            self.disk,
            depth,
        )
        for name, value in self.values.items():
            self.store.load(name, value)
        self.store.finish_loading()

    def bound(self, weight: Weight) -> torch.Tensor:
        module, attribute = weight.users[0]
        parameter = module._parameters[attribute]
        assert parameter is not None
        return parameter

    def is_right(self, weight: Weight) -> bool:
        wanted = self.values[weight.name].to(weight.compute_dtype or weight.dtype)
        return self.bound(weight).dtype == wanted.dtype and torch.equal(self.bound(weight), wanted)

    def close(self) -> None:
        self.transfers.close()
        self.store.close()
        self.disk.close()


def three_sweeps(depth: int) -> list[Step]:
    """Of which the last is known to be it."""
    kinds = [(False, False), (True, False), (True, True)]
    sweeps = [zigzag(LAYERS, 2, depth, warm=warm, last=last) for warm, last in kinds]
    return [step for steps in sweeps for step in steps]


def follow(store: WeightStore, step: Step) -> None:
    """As the executor does."""
    if step.action is Action.PREFETCH:
        store.prefetch(step.unit)
    elif step.action is Action.BIND:
        store.arrive(step.unit)
        store.bind(step.unit)
    elif step.action is Action.RELEASE:
        store.release(step.unit)


@pytest.mark.parametrize("name", ["cpu", "emulated"])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("depth", [1, 2, 3, LAYERS + 2])
def test_bound_weights_have_the_loaded_values(tmp_path, name, seed, depth):
    """Over sweeps with any placement, every unit has its own values from bind to release."""
    rig = Rig(make_backend(name), tmp_path, seed, depth)
    for step in three_sweeps(depth):
        follow(rig.store, step)
        if step.action is Action.COMPUTE:
            assert all(rig.is_right(weight) for weight in rig.units[step.unit])
            assert rig.is_right(rig.norm)
    rig.close()


@pytest.mark.parametrize("depth", [1, 2, 3, LAYERS + 2])
def test_the_unit_that_is_bound_first_travels_first(tmp_path, monkeypatch, depth):
    """A copy's priority is its unit's place among all binds, across the ends of sweeps too."""
    rig = Rig(make_backend("emulated"), tmp_path, 1, depth)
    asked: list[int] = []
    for name in ("submit", "submit_from_disk"):
        submit = getattr(rig.transfers, name)

        def noted(*copy: Any, submit: Any = submit, **options: Any) -> Any:
            asked.append(options["priority"])
            return submit(*copy, **options)

        monkeypatch.setattr(rig.transfers, name, noted)
    due: dict[int, set[int]] = {}
    binds = 0
    for step in three_sweeps(depth):
        follow(rig.store, step)
        if step.action is Action.PREFETCH:
            due[step.unit] = set(asked)
            asked.clear()
        elif step.action is Action.BIND:
            binds += 1
            assert due[step.unit] <= {binds}
    assert sum(map(len, due.values())) > 1
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
        assert rig.store.prefetch(unit) == []  # it is on its way already
        rig.store.arrive(unit)
        rig.store.bind(unit)
        rig.store.release(unit)
    weights = [weight for unit in rig.units for weight in unit]
    host = sum(padded(w.nbytes) for w in weights if rig.tiers[w.name] is Tier.HOST)
    disk = sum(w.nbytes for w in weights if rig.tiers[w.name] is Tier.DISK)
    counted = {link: c.bytes.get("weights", 0) for link, c in rig.transfers.counters.items()}
    blocks = sum(disk_slab(unit, rig).nbytes for unit in rig.units)
    link = rig.backend.disk_in
    assert counted[link] == disk
    assert rig.transfers.counters[link].total_bytes == blocks
    if name == "cpu":
        assert rig.store.streamed_bytes == blocks
    else:
        assert counted[Link.HOST_TO_DEVICE] == disk + host
        assert rig.store.streamed_bytes == blocks + host
    slabs = sum(any(rig.tiers[w.name] is Tier.DISK for w in unit) for unit in rig.units)
    assert rig.transfers.counters[link].transfers == slabs
    rig.close()


def disk_slab(unit: list[Weight], rig: Rig) -> DiskSlab:
    on_disk = [w for w in unit if rig.tiers[w.name] is Tier.DISK]
    return DiskSlab(on_disk, {w.name: rig.disk.extent(w.name) for w in on_disk})


@pytest.mark.parametrize("name", ["cpu", "emulated"])
@pytest.mark.parametrize("seed", range(5))
def test_weights_are_expanded_once_a_sweep(tmp_path, name, seed):
    """Wherever 16-bit weights live, what is bound is their exact value in the computed type."""
    rig = Rig(make_backend(name), tmp_path, seed, depth=3, compute=torch.float32)
    for unit in (*range(LAYERS + 1), *range(LAYERS + 1)):
        rig.store.prefetch(unit)
        rig.store.arrive(unit)
        rig.store.bind(unit)
        assert all(rig.is_right(weight) for weight in rig.units[unit])
        rig.store.release(unit)
    rig.close()
    assert set(rig.backend.account.used.values()) == {0}


def test_what_is_stored_as_it_is_computed_stays_bound(tmp_path):
    """In a unit that is expanded, too: its bytes may have been put in another order since."""
    rig = Rig(make_backend("cpu"), tmp_path, 0, depth=3, compute=torch.float32)
    norms = [unit[0] for unit in rig.units[:-1] if rig.tiers[unit[0].name] is Tier.DEVICE]
    assert norms
    before = [rig.bound(norm) for norm in norms]
    for unit in range(LAYERS + 1):
        rig.store.prefetch(unit)
        rig.store.arrive(unit)
        rig.store.bind(unit)
        rig.store.release(unit)
    assert all(rig.bound(norm) is kept for norm, kept in zip(norms, before))
    rig.close()


@pytest.mark.parametrize("name", ["cpu", "emulated"])
def test_homes_are_charged_and_given_back(tmp_path, name):
    """DEVICE holds weights, two slots for the widest layer and one for the head, until close."""
    rig = Rig(make_backend(name), tmp_path, seed=3)
    stays = (Tier.DEVICE,) if name == "emulated" else (Tier.DEVICE, Tier.HOST)

    def streamed(unit: list[Weight]) -> int:
        host = sum(padded(w.nbytes) for w in unit if rig.tiers[w.name] is Tier.HOST)
        return disk_slab(unit, rig).nbytes + (0 if Tier.HOST in stays else host)

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
    weight.bind(weight.parameter(data))
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
    home: torch.Tensor | FileExtent = rig.disk.extent("table")
    if tier is Tier.HOST:
        home = backend.allocate(Tier.HOST, rig.table.nbytes, "table")
        home.copy_(rig.values["table"].view(-1).view(torch.uint8))
    table = EmbeddingTable(rig.table, home, tier, backend, rig.transfers, rows=101)
    module = torch.nn.Embedding(101, 33, padding_idx=5, device="meta")
    for ids in ([5, 100, 5, 0], list(range(101)), [7]):
        local = table.bind(torch.tensor(ids), module)
        assert torch.equal(module(local), rig.values["table"][ids])
        assert len(module.weight) == len(set(ids))
    link = backend.disk_in if tier is Tier.DISK else Link.HOST_TO_DEVICE
    assert rig.transfers.counters[link].bytes == {"embedding": (3 + 101 + 1) * 132}
    table.close()
    if isinstance(home, torch.Tensor):
        backend.free(Tier.HOST, home)
    rig.close()
    assert set(backend.account.used.values()) == {0}
