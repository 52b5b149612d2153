"""Checkpoints that come quantized to 4 bits: which, and what their tensors mean (no torch).

Layouts, eight codes in an int32, the first in the lowest bits, where nothing else is said:

    gptq                qweight [in / 8, out], qzeros [groups, out / 8] less one (not in gptq_v2),
                        scales [groups, out], g_idx [in]: the group of each input
    awq                 qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; of
                        eight outputs, the codes of 0, 2, 4, 6, 1, 3, 5, 7 follow each other
    compressed-tensors  weight_packed [out, in / 8], weight_scale [out, groups], and if zeros are
                        not all 8, weight_zero_point [out / 8, groups]; weight_shape [2]

A value is scale * (code - zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compression.errors import QuantizationError
from compression.spec import GROUPS, GroupFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

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
}
"""Ends of the names of what a matrix is stored as; the first is there for each."""
USE_ANOTHER = "use the unquantized checkpoint, or one in GPTQ, AWQ or compressed-tensors W4A16"


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

    @property
    def codes(self) -> str:
        """The part that every quantized matrix has."""
        return self.parts[0]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs of a matrix whose codes have the shape `stored`."""
        first, second = stored
        shapes = {
            "gptq": (second, 8 * first),
            "awq": (8 * second, first),
            "compressed-tensors": (first, 8 * second),
        }
        return shapes[self.method]


def prequantized(settings: Mapping[str, Any]) -> Prequantized:
    """What the `quantization_config` of a checkpoint means.

    Raises `QuantizationError` with the name of a format that is not handled.
    """
    method = settings.get("quant_method", "unnamed")
    method = str(getattr(method, "value", method))
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
