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
    if keys.dtype not in DTYPES or keys.dtype != values.dtype:
        raise TypeError(
            "keys and values must both be float32, float16 or bfloat16, "
            f"got {keys.dtype} and {values.dtype}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.stride(3) != 1:
            raise ValueError(f"{name} must have last stride 1, got strides {tensor.stride()}")
    units = len(jobs) * keys.shape[1]
    if units == 0:
        return
    template, slot = _layout(fmt)
    block = array("q", template)
    jobs = jobs.contiguous()
    threads = min(torch.get_num_threads(), units)
    scratch = torch.empty(threads * slot, dtype=torch.uint8)
    for name, tensor in (("source_keys", keys), ("source_values", values)):
        size, at = tensor.element_size(), INDEX[name]
        batch, head, row, _ = tensor.stride()
        block[at] = tensor.data_ptr()
        block[at + 1], block[at + 2], block[at + 3] = batch * size, head * size, row * size
    for name, tensor in (("records", records), ("index", index)):
        at = INDEX[name]
        page, head, _ = tensor.stride()
        block[at], block[at + 1], block[at + 2] = tensor.data_ptr(), page, head
    block[INDEX["jobs"]], block[INDEX["units"]] = jobs.data_ptr(), units
    block[INDEX["kv_heads"]], block[INDEX["scratch"]] = keys.shape[1], scratch.data_ptr()
    kernel = compile_kernel(emit_write, fmt.key.name, fmt.value.name, DTYPES[keys.dtype])
    run_units(kernel, block, block.buffer_info()[0], units, _SLOTS)


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
