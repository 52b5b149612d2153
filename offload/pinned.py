"""Pinned host memory of exact size: map anonymous memory, then register it with CUDA.

torch's own pinned allocator rounds every block up to a power of two, which can cost almost twice
the memory asked for.
"""

from __future__ import annotations

import contextlib
import logging

import torch

from offload.ram import map_memory
from offload.tiers import format_size

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of the process."""


class PinnedMemory:
    """Allocates page-locked tensors; falls back to pageable ones where pinning is refused."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        self._registered: set[int] = set()
        self._warned = False

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor [nbytes], page-locked if the system allows it. Raises `OSError`."""
        tensor = map_memory(nbytes)
        if not nbytes:
            return tensor
        pointer = tensor.data_ptr()
        self._tensors[pointer] = tensor
        code = int(torch.cuda.cudart().cudaHostRegister(pointer, nbytes, _PORTABLE))
        if code == 0:
            self._registered.add(pointer)
        else:
            self._refused(code, nbytes)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor`, or the slab that it is a view of, is page-locked."""
        return tensor.untyped_storage().data_ptr() in self._registered

    def _refused(self, code: int, nbytes: int) -> None:
        # CUDA keeps the error for whichever kernel is launched next: one that does not matter.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        if not self._warned:
            self._warned = True
            logger.warning(
                "pinning %s of host memory was refused (CUDA error %d): its copies go through a "
                "small pinned buffer and are slower; raise the locked-memory limit (ulimit -l), or "
                "lower --host-memory",
                format_size(nbytes),
                code,
            )

    def free(self, tensor: torch.Tensor) -> None:
        """Unpin `tensor`; its memory goes with the last reference to it."""
        pointer = tensor.data_ptr()
        if pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
            self._registered.discard(pointer)
        self._tensors.pop(pointer, None)

    def close(self) -> None:
        """Unpin everything that is left."""
        for pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._registered.clear()
        self._tensors.clear()
