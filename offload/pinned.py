"""Pinned host memory of exact size: map anonymous memory, then register it with CUDA.

torch's own pinned allocator rounds every block up to a power of two, which can cost almost twice
the memory asked for.
"""

from __future__ import annotations

import contextlib
import logging
import mmap

import torch

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of the process."""


class PinnedMemory:
    """Allocates page-locked tensors; falls back to pageable ones where pinning is refused."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._registered: set[int] = set()
        self._warned = False

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor [nbytes], page-locked if the system allows it."""
        mapping = mmap.mmap(-1, max(nbytes, 1))
        tensor = torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes) if nbytes else None
        if tensor is None:
            return torch.empty(0, dtype=torch.uint8)
        self._maps[tensor.data_ptr()] = mapping
        code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes, _PORTABLE))
        if code == 0:
            self._registered.add(tensor.data_ptr())
        else:
            self._refused(code)
        return tensor

    def _refused(self, code: int) -> None:
        # CUDA keeps the error for whichever kernel is launched next: one that does not matter.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        if not self._warned:
            self._warned = True
            logger.warning(
                "pinning host memory was refused (CUDA error %d): copies will be slower; "
                "raise the locked-memory limit (ulimit -l)",
                code,
            )

    def free(self, tensor: torch.Tensor) -> None:
        """Unpin `tensor`; its memory goes with the last reference to it."""
        pointer = tensor.data_ptr()
        if pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
            self._registered.discard(pointer)
        self._maps.pop(pointer, None)

    def close(self) -> None:
        """Unpin everything that is left."""
        for pointer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._registered.clear()
        self._maps.clear()
