"""Memory for what is read at random and in bulk."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
import threading
from typing import Any

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CHUNK = 16 << 20
_SMALLEST = 32 << 10  # of what shares a chunk
_LINE = 64
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # of Linux, <asm-generic/mman-common.h>


def zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """uint8 zeros; on a CPU under Linux in huge pages where the kernel has some to give.

    Records of 17 KB that are read in any order miss the TLB at nearly every page of 4 KB: decoding
    takes about a tenth longer without this, over a few selected pages an eighth.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    return _in_huge_pages(math.prod(shape)).view(shape).zero_()


class Packing:
    """Memory in huge pages for many tensors that are read one after another, as the weights of a
    model are: each alone is too small for a page of 2 MB.

    Pieces of a chunk lie behind each other; a chunk is freed when the last of them is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """uint8, not initialised, on the CPU. Small tensors have memory of their own, so that none
        of them keeps a chunk."""
        nbytes = math.prod(shape)
        if not _SMALLEST <= nbytes <= _CHUNK:
            return _in_huge_pages(nbytes).view(shape)
        with self._lock:
            start = -(-self._used // _LINE) * _LINE
            if start + nbytes > self._chunk.numel():
                self._chunk, start = _in_huge_pages(_CHUNK), 0
            self._used = start + nbytes
            return self._chunk[start : start + nbytes].view(shape)


WEIGHTS = Packing()


def _in_huge_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes], not initialised. It begins where a huge page does: what lies before the first
    or behind the last one is in pages of 4 KB, of a matrix of 4 MB that would often be half."""
    if nbytes < _HUGE_PAGE or _advice() is None:
        return torch.empty(nbytes, dtype=torch.uint8)
    room = torch.empty(nbytes + _HUGE_PAGE, dtype=torch.uint8)
    # The allocator may have given memory that others had before: without contents, none of it
    # counts before it is written, and the part that is skipped never does.
    _advise(room, mmap.PAGESIZE, _MADV_DONTNEED)
    start = -room.data_ptr() % _HUGE_PAGE
    tensor = room[start : start + nbytes]
    # Advice: where it is refused the memory is what it would have been.
    _advise(tensor, _HUGE_PAGE, _MADV_HUGEPAGE)
    return tensor


def _advise(tensor: Tensor, page: int, what: int) -> None:
    """On the whole pages inside a tensor's memory."""
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    advise = _advice()
    if advise is not None and last > first:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), what)


def give_back() -> None:
    """Freed memory back to the system: GNU's allocator keeps pieces of some MB for later."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


@functools.cache
def _advice() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
