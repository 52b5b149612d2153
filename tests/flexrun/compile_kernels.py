"""Compiles the attention kernels for GPUs that need not be there, and prints what came out as JSON.

A script, for Triton's compiler and its interpreter do not go together in one process.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexrun.attention.kernel_gpu import attention_kernel
from flexrun.attention.packed_gpu import packed_kernel
from flexrun.attention.tiles_gpu import Heads, Tiles, plan_tiles

STRIDES = ("query_row", "query_head", "key_page", "value_page")
TYPES = dict.fromkeys(("query", "keys", "values"), "*bf16") | dict.fromkeys(("out", "lse"), "*fp32")
TYPES |= dict.fromkeys(("num_spans", "piece", *STRIDES), "i32")
TYPES |= dict.fromkeys(("factor", "inner"), "fp32")


def build(capability: int, heads: Heads, tiles: Tiles, variant: bool) -> dict[str, Any]:
    """What the compiler makes of one launch; `variant`: with all that an option adds."""
    source = packed_kernel if heads.packed else attention_kernel
    names, blocks = source.arg_names, tiles.blocks
    constants: dict[str, Any] = {
        "D": heads.key_dim,
        "V": heads.value_dim,
        "G": heads.group,
        "HEADS": heads.count,
        "PAGE_TOKENS": 16,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.keys,
        "TILE_ROWS": tiles.rows,
        "LEAST_ROWS": tiles.least_rows,
        "WINDOW": 1000 if variant else 0,
        "CHUNK": 0,
        "CAPPED": variant,
        "FLAT": tiles.flat,
        "SPLIT": variant,
        "UPCAST": False,
    }
    types = dict(TYPES)
    if heads.packed:
        sizes = *heads.groups(heads.key_dim), *heads.groups(heads.value_dim)
        places = "KEY_GROUPS", "KEY_HALF", "VALUE_GROUPS", "VALUE_HALF"
        constants |= {"GROUP": heads.packed, "FLOAT16": False, **dict(zip(places, sizes))}
        types |= dict.fromkeys(("keys", "values"), "*u8") | {"nibble": "i32"}
    else:
        constants |= {"BLOCK_D": heads.block_d, "BLOCK_V": heads.block_v}
    if heads.element_size == 4:
        types |= dict.fromkeys(("query", "keys", "values"), "*fp32")
    signature = {n: "constexpr" if n in constants else types.get(n, "*i32") for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in STRIDES]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    kernel = triton.compile(
        ASTSource(source, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    # Packed rows lie at no multiples of 16 bytes: 4 or 8 at a time is all there is.
    copies = "cp.async.ca" if heads.packed else "cp.async.cg"
    return {
        "case": f"sm{capability} {heads} {tiles} {variant}",
        "capability": capability,
        "shared": kernel.metadata.shared,
        "wide_copies": kernel.asm["ptx"].count(f"{copies}.shared.global"),
    }


def main() -> None:
    """One line a kernel."""
    shapes = [Heads(32, 8, 128, 128, 2), Heads(9, 3, 64, 64, 2), Heads(16, 8, 256, 256, 2)]
    shapes += [Heads(32, 32, 80, 80, 2), Heads(8, 8, 128, 128, 4), Heads(8, 8, 256, 256, 4)]
    for capability in (80, 86, 90):
        for heads in shapes:
            for tiles in plan_tiles(heads, 5000, 2, 4000, capability == 90):
                for variant in (False, True):
                    print(json.dumps(build(capability, heads, tiles, variant)), flush=True)
        for heads in (Heads(32, 8, 128, 128, 2, 64), Heads(32, 32, 80, 80, 2, 32)):
            for tiles in plan_tiles(heads, 5000, 2, 60, capability == 90):
                print(json.dumps(build(capability, heads, tiles, False)), flush=True)


if __name__ == "__main__":
    main()
