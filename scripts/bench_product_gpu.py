"""Speed of products with 4-bit matrices on a GPU, packed, against its memory and expanding first.

Few rows are bound by memory: what counts is the bytes of packed matrices per second, compared with
the fastest of a copy and a sum over a large tensor, and the time of expanding and multiplying over
that of multiplying packed. `micro_batches`: how many it takes until expanding once for all of them
is faster; null: never. All is replayed from CUDA graphs, so that launches by Python cost nothing on
either side. The last line on stdout is one JSON object. Exit code 1: below the target; 2: no GPU or
no Triton.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_attention_gpu import memory_speed, seconds

from compression.expansion import expand
from compression.product_gpu import multiply, works
from compression.spec import GroupFormat
from flexrun.attention.gpu import triton_available

SPEC = GroupFormat(4, 64)
TYPE = torch.bfloat16
TARGET, TARGET_ROWS = 1.5, 16
"""Of the time of expanding and multiplying, for so many rows and fewer."""
ROWS = (1, 4, 8, 16, 32)
SIZES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
"""Outputs and inputs: those of a Llama of 8B parameters."""
IN_TURN = 256 << 20
"""Bytes of matrices that are read in turn, so that no cache keeps one until its next turn."""


class Case(NamedTuple):
    """Matrices of one size, and rows."""

    outputs: int
    inputs: int
    rows: int


def random_matrices(case: Case) -> list[torch.Tensor]:
    """Packed matrices with values of about 1, as many as are read in turn."""
    row_bytes = SPEC.row_bytes(case.inputs)
    count = max(2, -(-IN_TURN // (case.outputs * row_bytes)))
    packed = torch.empty(count, case.outputs, row_bytes, dtype=torch.uint8, device="cuda")
    packed.random_(0, 256)
    numbers = packed[..., SPEC.code_bytes(case.inputs) :].view(torch.bfloat16)
    groups = SPEC.groups(case.inputs)
    numbers[..., :groups], numbers[..., groups:] = 0.25, 0.0  # scales and centres
    return list(packed)


def bench(case: Case, memory: float, repeats: int) -> dict[str, Any]:
    """One product packed, and by expanding: once for it alone, and as if it had been before."""
    matrices = random_matrices(case)
    x = torch.randn(case.rows, case.inputs, dtype=TYPE, device="cuda")
    made = {"dtype": TYPE, "device": "cuda"}
    expanded = [torch.empty(case.outputs, case.inputs, **made) for _ in range(2)]
    room = expanded[0].view(-1).view(torch.uint8)

    def expand_and_multiply(packed: torch.Tensor) -> None:
        expand(packed, SPEC, expanded[0])
        torch.nn.functional.linear(x, expanded[0])

    packed_seconds = seconds([partial(multiply, x, m, SPEC, None, room) for m in matrices], repeats)
    both = seconds([partial(expand_and_multiply, m) for m in matrices], repeats)
    plain = seconds([partial(torch.nn.functional.linear, x, m) for m in expanded], repeats)
    more = packed_seconds - plain
    return {
        "case": f"{case.outputs} x {case.inputs}",
        "rows": case.rows,
        "microseconds": packed_seconds * 1e6,
        "expand_and_multiply_microseconds": both * 1e6,
        "plain_microseconds": plain * 1e6,
        "share_of_memory_speed": matrices[0].nbytes / packed_seconds / memory,
        "times_faster": both / packed_seconds,
        "micro_batches": math.ceil((both - plain) / more) if more > 0 else None,
        "target": TARGET if case.rows <= TARGET_ROWS else None,
    }


def main() -> int:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="runs that a median is taken of")
    repeats = parser.parse_args().repeats
    missing = "CUDA GPU" if not torch.cuda.is_available() else "Triton"
    if missing == "CUDA GPU" or not triton_available():
        print(f"error: no {missing} here\nhint: run this on an NVIDIA GPU", file=sys.stderr)
        return 2
    right = works(SPEC, TYPE, torch.device("cuda"))
    memory = memory_speed(repeats)
    name = torch.cuda.get_device_name()
    print(f"{name}: memory {memory / 1e9:.0f} GB/s, the kernel is {'right' if right else 'WRONG'}")
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for count in ROWS:
            row = bench(Case(*size, count), memory, repeats)
            rows.append(row)
            target = f" (target {TARGET})" if row["target"] else ""
            print(
                f"{row['case']:<15} {count:3} rows {row['microseconds']:8.1f} us "
                f"{row['share_of_memory_speed']:4.0%} of memory speed, "
                f"{row['times_faster']:.2f}x expanding and multiplying{target}, "
                f"expanding once pays from {row['micro_batches']} micro-batches"
            )
    reached = right and all(row["times_faster"] >= (row["target"] or 0) for row in rows)
    report: dict[str, Any] = {"benchmark": "product_gpu", "gpu": name, "torch": torch.__version__}
    report |= {"memory_gb_per_s": memory / 1e9, "right": right, "reached": reached, "rows": rows}
    print(json.dumps(report))
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
