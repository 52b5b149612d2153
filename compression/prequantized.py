"""Checkpoints that come quantized: which are known, and what their tensors mean (no torch).

Layouts, eight codes in an int32, the first in the lowest bits, where nothing else is said:

    gptq                qweight [in / 8, out], qzeros [groups, out / 8] less one (not in gptq_v2),
                        scales [groups, out], g_idx [in]: the group of each input
    awq                 qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; of
                        eight outputs, the codes of 0, 2, 4, 6, 1, 3, 5, 7 follow each other
    compressed-tensors  weight_packed [out, in / 8], weight_scale [out, groups], and if zeros are
                        not all 8, weight_zero_point [out / 8, groups]; weight_shape [2]

A value is scale * (code - zero). Codes that are floats of 8 bits, a byte each, are multiplied with
a scale, which is that of a block of 128 by 128, of an output, or of the matrix:

    fp8                 weight [out, in], weight_scale_inv [out / 128, in / 128], or [] or [1]
    compressed-tensors  (float-quantized) weight [out, in], weight_scale [out, 1], [1] or []

Floats of 4 bits, two to a byte, the first in its low half, have a scale of 8 bits for 32 inputs. A
layer's experts are stacked; the model has their inputs first, [experts, in, out]:

    mxfp4               NAME_blocks [experts, out, in / 32, 16], NAME_scales [experts, out, in / 32]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compression.errors import QuantizationError
from compression.spec import GROUPS, GroupFormat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
    "fp8": ("weight", "weight_scale_inv"),
    "float-quantized": ("weight", "weight_scale"),
    "mxfp4": ("blocks", "scales"),
}
"""Ends of the names of what a matrix is stored as; the first is there for each."""
USE_ANOTHER = (
    "use the unquantized checkpoint, or one in GPTQ, AWQ, FP8, MXFP4 or compressed-tensors W4A16"
)


@dataclass(frozen=True, slots=True)
class Prequantized:
    """How the matrices of a checkpoint are quantized."""

    method: str
    spec: GroupFormat
    zero_offset: int = 0
    """To be added to stored zeros."""

    @property
    def parts(self) -> tuple[str, ...]:
        """See `_PARTS`."""
        return _PARTS[self.method]

    def part_of(self, key: str, dtype: str) -> tuple[str, str] | None:
        """The matrix that the tensor `key` is a part of, and which part; None if of none."""
        module, _, part = key.rpartition("_" if self.spec.float4 else ".")
        plain = self.spec.float8 and part == "weight" and "float8" not in dtype
        if part not in self.parts or plain:
            return None
        return (module if self.spec.float4 else f"{module}.weight"), part

    @property
    def plain(self) -> str:
        """The type of what is not quantized, where config.json names none."""
        return "bfloat16" if self.spec.float4 else "float32"

    @property
    def codes(self) -> str:
        """The part that every quantized matrix has."""
        return self.parts[0]

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """In the model, of a matrix whose codes have the shape `stored`: outputs, inputs.

        Raises `QuantizationError`.
        """
        whole = len(stored) == 4 and stored[3] == 16 if self.spec.float4 else len(stored) == 2
        if not whole:
            raise QuantizationError(f"its codes have the shape {tuple(stored)}", hint=USE_ANOTHER)
        first, second = stored[:2]
        shapes = {
            "gptq": (second, 8 * first),
            "awq": (8 * second, first),
            "compressed-tensors": (first, 8 * second),
            "mxfp4": (first, self.spec.group * stored[-2], second),
        }
        return shapes.get(self.method, (first, second))

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise `QuantizationError` if `name`, of this `shape` in the model, cannot be stored."""
        inputs = self.spec.as_rows(shape)[-1]
        if self.spec.float4 and inputs % self.spec.group:
            raise QuantizationError(
                f"{name} has {inputs} inputs, which is no whole number of groups of "
                f"{self.spec.group}, as {self.method} has them",
                hint="check that config.json belongs to this checkpoint",
            )


def prequantized(settings: Mapping[str, Any]) -> Prequantized:
    """What the `quantization_config` of a checkpoint means.

    Raises `QuantizationError` with the name of a format that is not handled.
    """
    method = settings.get("quant_method", "unnamed")
    method = str(getattr(method, "value", method))
    if method == "mxfp4":
        return Prequantized(method, GroupFormat(4, 32, "e8m0"))
    if method == "fp8" or settings.get("format") == "float-quantized":
        return _of_float8(method, settings)
    if method == "compressed-tensors":
        bits, group = _of_compressed_tensors(settings)
    elif method in ("gptq", "awq"):
        bits, group = settings.get("bits"), settings.get("group_size")
    else:
        raise QuantizationError(f"method {method} is not supported", hint=USE_ANOTHER)
    version = settings.get("version", "gemm")
    if method == "awq" and str(getattr(version, "value", version)).lower() != "gemm":
        raise QuantizationError(f"method awq, version {version}, is not supported", USE_ANOTHER)
    if bits != 4 or group not in GROUPS:
        raise QuantizationError(
            f"method {method} with {bits} bits in groups of {group} is not supported",
            hint=f"4 bits in groups of {', '.join(map(str, GROUPS))} are",
        )
    older = method == "gptq" and settings.get("checkpoint_format", "gptq") != "gptq_v2"
    return Prequantized(method, GroupFormat(4, group, "float16"), zero_offset=int(older))


def _of_float8(method: str, settings: Mapping[str, Any]) -> Prequantized:
    block = settings.get("weight_block_size")
    if block not in (None, [128, 128], (128, 128)):
        raise QuantizationError(
            f"method {method} with blocks of {block} is not supported",
            hint="blocks of 128 by 128, or one scale for an output or a matrix, are",
        )
    return Prequantized(
        "fp8" if method == "fp8" else "float-quantized", GroupFormat(8, 128, "float32")
    )


def _of_compressed_tensors(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Bits and group, if all that is quantized is packed alike."""
    kind, groups = settings.get("format"), settings.get("config_groups") or {}
    weights = [each.get("weights") or {} for each in groups.values()]
    inputs = [each.get("input_activations") for each in groups.values()]
    if kind != "pack-quantized" or len(weights) != 1 or any(inputs):
        raise QuantizationError(
            f"method compressed-tensors, format {kind}, is not supported", hint=USE_ANOTHER
        )
    return weights[0].get("num_bits"), weights[0].get("group_size")
