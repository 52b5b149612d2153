"""What datasheets say of machines: sizes, and speeds that are peaks. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Datasheet:
    """Bytes, and bytes and operations per second."""

    device_memory: int
    """Of the GPU, as its driver counts it; 0: a CPU computes."""
    device_bandwidth: float = 0.0
    flops: float
    """Of dense products of 16-bit values that are summed in 32 bits."""
    link: float = 0.0
    """Between RAM and the GPU, in one direction."""
    ram: int
    ram_bandwidth: float
    disk: int
    disk_read: float
    disk_write: float
    source: str


def _pcie(generation: int, lanes: int) -> float:
    """One direction: 8 GT/s a lane in PCIe 3.0, doubled by each later one, 128 bits of 130."""
    return lanes * 2 ** (generation - 3) * 8e9 * (128 / 130) / 8


def _ddr(channels: int, megatransfers: int) -> float:
    """Eight bytes a transfer in each channel."""
    return channels * 8 * megatransfers * 1e6


_SERVER_DISK: dict[str, Any] = {"disk": 3840 * 10**9, "disk_read": 6.8e9, "disk_write": 4.0e9}
"""A Samsung PM9A3 of PCIe 4.0."""
_DESKTOP_DISK: dict[str, Any] = {"disk": 2000 * 10**9, "disk_read": 7.45e9, "disk_write": 6.9e9}
"""A Samsung 990 Pro of PCIe 4.0."""
_HOPPER = "989 TFLOP/s in bf16"
_HOST = "assumed beside it:"

DATASHEETS = {
    "t4": Datasheet(
        device_memory=15 * _GIB,  # what error correction leaves of 16
        device_bandwidth=320e9,
        flops=65e12,
        link=_pcie(3, 16),
        ram=208 * _GIB,
        ram_bandwidth=_ddr(6, 2666),
        disk=1500 * 10**9,
        disk_read=2.65e9,
        disk_write=1.4e9,
        source="NVIDIA T4 datasheet: 16 GB, 320 GB/s, 65 TFLOP/s in fp16, PCIe 3.0 x16. The "
        "machine of FlexGen's paper (ICML 2023): Google's n1 with 32 virtual CPUs, 208 GB of RAM "
        f"and four local SSDs, 1.5 TB; {_HOST} one socket's six channels of DDR4-2666",
    ),
    "3090": Datasheet(
        device_memory=24 * _GIB,
        device_bandwidth=936e9,
        flops=71e12,
        link=_pcie(4, 16),
        ram=128 * _GIB,
        ram_bandwidth=_ddr(2, 3200),
        **_DESKTOP_DISK,
        source="NVIDIA GA102 whitepaper, GeForce RTX 3090: 24 GB, 936 GB/s, 71 TFLOP/s in fp16 "
        f"with sums in fp32, PCIe 4.0 x16; {_HOST} 128 GB of DDR4-3200 in two channels, one NVMe "
        "disk of 2 TB (7.5 GB/s)",
    ),
    "4090": Datasheet(
        device_memory=24 * _GIB,
        device_bandwidth=1008e9,
        flops=165.2e12,
        link=_pcie(4, 16),
        ram=96 * _GIB,
        ram_bandwidth=_ddr(2, 5600),
        **_DESKTOP_DISK,
        source="NVIDIA Ada whitepaper, GeForce RTX 4090: 24 GB, 1008 GB/s, 165 TFLOP/s in fp16 "
        f"with sums in fp32, PCIe 4.0 x16; {_HOST} 96 GB of DDR5-5600 in two channels, one NVMe "
        "disk of 2 TB (7.5 GB/s)",
    ),
    "a10g": Datasheet(
        device_memory=int(22.4 * _GIB),  # what error correction leaves of 24
        device_bandwidth=600e9,
        flops=70e12,
        link=_pcie(4, 16),
        ram=128 * _GIB,
        ram_bandwidth=_ddr(8, 3200) / 3,
        disk=900 * 10**9,
        disk_read=2.0e9,
        disk_write=1.0e9,
        source="NVIDIA A10G: 24 GB, 600 GB/s, 70 TFLOP/s in fp16, PCIe 4.0 x16; Amazon's "
        f"g5.8xlarge: 128 GB of RAM, a disk of 900 GB; {_HOST} a third of a socket's eight "
        "channels of DDR4-3200, 2 GB/s of the disk",
    ),
    "l4": Datasheet(
        device_memory=int(22.4 * _GIB),
        device_bandwidth=300e9,
        flops=121e12,
        link=_pcie(4, 16),
        ram=128 * _GIB,
        ram_bandwidth=_ddr(6, 2933) * 2 / 3,
        disk=375 * 10**9,
        disk_read=0.66e9,
        disk_write=0.35e9,
        source="NVIDIA L4 datasheet: 24 GB, 300 GB/s, 121 TFLOP/s in fp16 (242 with sparsity), "
        "PCIe 4.0 x16; Google's g2-standard-32: 128 GB of RAM, one local SSD of 375 GB (0.66 "
        f"GB/s); {_HOST} two thirds of a socket's six channels of DDR4-2933",
    ),
    "a100": Datasheet(
        device_memory=int(79.2 * _GIB),
        device_bandwidth=2039e9,
        flops=312e12,
        link=_pcie(4, 16),
        ram=256 * _GIB,
        ram_bandwidth=_ddr(8, 3200),
        **_SERVER_DISK,
        source="NVIDIA A100 80GB datasheet, SXM: 2039 GB/s, 312 TFLOP/s in bf16, PCIe 4.0 x16 to "
        f"the host; {_HOST} 256 GB of DDR4-3200 in a socket's eight channels, one NVMe disk of "
        "3.84 TB (6.8 GB/s)",
    ),
    "h100": Datasheet(
        device_memory=int(79.6 * _GIB),
        device_bandwidth=3350e9,
        flops=989e12,
        link=_pcie(5, 16),
        ram=512 * _GIB,
        ram_bandwidth=_ddr(8, 4800),
        **_SERVER_DISK,
        source=f"NVIDIA H100 datasheet, SXM: 80 GB, 3.35 TB/s, {_HOPPER}, PCIe 5.0 x16 to the "
        f"host; {_HOST} 512 GB of DDR5-4800 in a socket's eight channels, one NVMe disk of 3.84 "
        "TB (6.8 GB/s)",
    ),
    "h200": Datasheet(
        device_memory=int(140.4 * _GIB),
        device_bandwidth=4800e9,
        flops=989e12,
        link=_pcie(5, 16),
        ram=512 * _GIB,
        ram_bandwidth=_ddr(8, 4800),
        **_SERVER_DISK,
        source=f"NVIDIA H200 datasheet, SXM: 141 GB, 4.8 TB/s, {_HOPPER}, PCIe 5.0 x16 to the "
        f"host; {_HOST} 512 GB of DDR5-4800 in a socket's eight channels, one NVMe disk of 3.84 "
        "TB (6.8 GB/s)",
    ),
    "gh200": Datasheet(
        device_memory=int(95.5 * _GIB),
        device_bandwidth=4000e9,
        flops=989e12,
        link=450e9,
        ram=480 * 10**9,
        ram_bandwidth=384e9,
        **_SERVER_DISK,
        source=f"NVIDIA GH200 datasheet: 96 GB of HBM3, 4 TB/s, {_HOPPER}, NVLink-C2C of 900 GB/s "
        "in both directions, 480 GB of LPDDR5X at 384 GB/s (Grace tuning guide; smaller ones have "
        f"512); {_HOST} one NVMe disk of 3.84 TB (6.8 GB/s)",
    ),
    "laptop": Datasheet(
        device_memory=8 * _GIB,
        device_bandwidth=256e9,
        flops=40.1e12,
        link=_pcie(4, 8),
        ram=32 * _GIB,
        ram_bandwidth=_ddr(2, 5600),
        disk=1000 * 10**9,
        disk_read=7.0e9,
        disk_write=5.0e9,
        source="GeForce RTX 4070 Laptop GPU: 8 GB of GDDR6 at 16 Gbit/s on 128 bits, 256 GB/s, "
        "321 AI TOPS (8 bits, sparse), an eighth of them in fp16 with sums in fp32, PCIe 4.0 x8; "
        f"{_HOST} 32 GB of DDR5-5600 in two channels, one NVMe disk of 1 TB (7 GB/s)",
    ),
    "cpu": Datasheet(
        device_memory=0,
        flops=64 * 3.1e9 * 64,
        ram=384 * _GIB,
        ram_bandwidth=_ddr(12, 4800),
        **_SERVER_DISK,
        source="AMD EPYC 9554, one socket without a GPU: 64 cores of 3.1 GHz with 64 operations "
        "on bfloat16 a cycle, twelve channels of DDR5-4800, 461 GB/s; assumed: 384 GB of RAM, "
        "one NVMe disk of 3.84 TB (6.8 GB/s)",
    ),
}
