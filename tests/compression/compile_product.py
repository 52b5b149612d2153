"""Compiles the kernel of packed products for GPUs that need not be there, and prints JSON.

A script, for Triton's compiler and its interpreter do not go together in one process.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compression.product_gpu import MOST_ROWS, plan_product
from compression.product_kernels_gpu import product_kernel
from compression.spec import GroupFormat

TYPES = {"x": "*{}", "packed": "*u8", "numbers": "*bf16", "bias": "*{}", "out": "*{}"}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ALIGNED = (*TYPES, "x_row", "code_bytes", "outputs")


def build(capability: int, spec: GroupFormat, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """What the compiler makes of a matrix with 4096 inputs."""
    plan = plan_product((rows, 4096, 4096), spec, dtype, torch.device("cpu"), 0)
    constants: dict[str, Any] = plan.constants | {"BIAS": True, "UPCAST": False}
    names = product_kernel.arg_names
    types = {name: type_.format(NAMES[dtype]) for name, type_ in TYPES.items()}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED}
    kernel = triton.compile(
        ASTSource(product_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
    )
    ptx = kernel.asm["ptx"]
    return {
        "case": f"sm{capability} {spec} {dtype} {rows}",
        "capability": capability,
        "shared": kernel.metadata.shared,
        "spilled": spilled(kernel.asm["cubin"]),
        "wide_copies": ptx.count("cp.async.cg.shared.global"),
        "narrow_copies": ptx.count("cp.async.ca.shared.global"),
    }


def spilled(cubin: bytes) -> int:
    """Bytes of a thread's values that registers have no room for."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout)[1])  # type: ignore[index]


def main() -> None:
    """One line a kernel."""
    formats = [GroupFormat(4, group) for group in (32, 64, 128)] + [GroupFormat(8, 128)]
    for capability, spec, dtype in itertools.product((80, 86, 90), formats, NAMES):
        rows = 16 if dtype == torch.float16 else MOST_ROWS
        print(json.dumps(build(capability, spec, dtype, rows)), flush=True)


if __name__ == "__main__":
    main()
