"""The argument block of the CPU kernel that writes pages: int64 fields, strides in bytes."""

from __future__ import annotations

from typing import Any

from lath.kernels.simd.arguments import ArgumentBlock, load_index
from lath.kernels.simd.emitter import Emitter

FIELDS = (
    "source_keys", "source_key_batch", "source_key_head", "source_key_row",
    "source_values", "source_value_batch", "source_value_head", "source_value_row",
    "records", "record_page", "record_head", "record_bytes", "record_end",
    "index", "index_page", "index_head",
    "jobs",  # int32 [J, 4]: batch row, first token, count, page
    "kv_heads", "units",
    "key_dim", "value_dim", "stored_keys", "stored_values",
    # offsets in a record and in an index row
    "keys", "keys_low", "values", "values_low", "value_scales", "key_scales", "token_scales",
    "mean", "max", "min", "numbers", "deviation", "value_mean",
    # of a thread: fp32 [64, channels]; fp32 [64] inverse scales
    "scratch", "slot", "at_inverse",
    "task", "thread_number", "thread_count",
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(FIELDS)}


class Arguments(ArgumentBlock):
    """The fields above as values in a kernel."""

    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, INDEX)

    def job(self, number: Any, column: int) -> Any:
        """An entry of a job, as int64."""
        at = self._e.add(self._e.offset(self["jobs"], number, 16), 4 * column)
        return load_index(self._e, at)
