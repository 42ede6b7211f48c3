"""Writing pages on a CPU: a compiled kernel (cpu_write.py), pages and heads shared by threads."""

from __future__ import annotations

import functools
from array import array

import torch
from torch import Tensor

from lath.formats.pages import PAGE, PageFormat

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.pages.cpu_arguments import FIELDS, INDEX
from lath.kernels.pages.cpu_write import emit_write
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import BF16, FP16, FP32
from lath.kernels.simd.workers import Slots, run_units

DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
_SLOTS = Slots(INDEX["task"], INDEX["thread_number"], INDEX["thread_count"])


def write_pages(
    keys: Tensor, values: Tensor, fmt: PageFormat, records: Tensor, index: Tensor, jobs: Tensor
) -> None:
    """Quantise tokens into records[page, head] and index[page, head] for every KV head, in place.

    keys [B, Hkv, L, D], values [B, Hkv, L, E] of one dtype, last stride 1. jobs: int32 [J, 4], each
    (row b, first token, count 1 .. 64, page number); no page number twice. TypeError for other
    dtypes than float32, float16 and bfloat16.
    """
    _check_sources(keys, values)
    if len(jobs) == 0 or keys.shape[1] == 0:
        return
    units = len(jobs) * keys.shape[1]
    writer = BoundWriter(fmt, keys.dtype, jobs.contiguous(), units, torch.get_num_threads())
    writer.move(keys, values, records, index)
    run_units(writer.kernel, writer.block, writer.address, units, _SLOTS)


def _check_sources(keys: Tensor, values: Tensor) -> None:
    if keys.dtype not in DTYPES or keys.dtype != values.dtype:
        raise TypeError(
            "keys and values must both be float32, float16 or bfloat16, "
            f"got {keys.dtype} and {values.dtype}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.stride(3) != 1:
            raise ValueError(f"{name} must have last stride 1, got strides {tensor.stride()}")


class BoundWriter:
    """A writing of pages, to be run again and again over what then lies in its sources.

    jobs: int32, contiguous; kept, and read anew at each run. units: jobs times KV heads.
    """

    def __init__(
        self, fmt: PageFormat, dtype: torch.dtype, jobs: Tensor, units: int, threads: int
    ) -> None:
        self.jobs, self.units = jobs, units
        template, slot = _layout(fmt)
        self.block = array("q", template)
        self.address = self.block.buffer_info()[0]
        self._scratch = torch.empty(min(threads, units) * slot, dtype=torch.uint8)
        self.block[INDEX["jobs"]], self.block[INDEX["units"]] = jobs.data_ptr(), units
        self.block[INDEX["kv_heads"]] = units // len(jobs)
        self.block[INDEX["scratch"]] = self._scratch.data_ptr()
        self.kernel = compile_kernel(emit_write, fmt.key.name, fmt.value.name, DTYPES[dtype])

    def move(self, keys: Tensor, values: Tensor, records: Tensor, index: Tensor) -> None:
        """Read from these tokens and write into these records and index rows, none of them kept
        alive."""
        for name, tensor in (("source_keys", keys), ("source_values", values)):
            size, at = tensor.element_size(), INDEX[name]
            batch, head, row, _ = tensor.stride()
            self.block[at], self.block[at + 1] = tensor.data_ptr(), batch * size
            self.block[at + 2], self.block[at + 3] = head * size, row * size
        for name, tensor in (("records", records), ("index", index)):
            at = INDEX[name]
            page, head, _ = tensor.stride()
            self.block[at], self.block[at + 1] = tensor.data_ptr(), page
            self.block[at + 2] = head

    def switch(self, on: bool) -> None:
        """Whether a run writes anything."""
        self.block[INDEX["units"]] = self.units if on else 0


@functools.lru_cache(maxsize=64)
def _layout(fmt: PageFormat) -> tuple[list[int], int]:
    """What a page format settles: an argument block, and bytes of scratch of a thread."""
    numbers = 4 * PAGE * max(fmt.padded_key_dim, fmt.padded_value_dim)
    values = {
        "key_dim": fmt.key_dim, "value_dim": fmt.value_dim,
        "stored_keys": fmt.padded_key_dim, "stored_values": fmt.padded_value_dim,
        "record_bytes": fmt.record_bytes, "slot": numbers + 4 * PAGE, "at_inverse": numbers,
        "record_end": max(field.end for field in fmt.fields.values()),
        **{name: field.offset for name, field in (fmt.fields | fmt.index_fields).items()},
    }  # fmt: skip
    return [values.get(name, 0) for name in FIELDS], numbers + 4 * PAGE
