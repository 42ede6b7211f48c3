"""The argument block of the CPU kernels of `linear`: int64 fields at an address.

One layout for every kernel, so that one driver runs them all. What depends on the layer alone is
written once when it is prepared; a driver copies the block and fills in the rest for each call.
"""

from __future__ import annotations

from typing import Any

from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.emitter import Emitter

FIELDS = (
    # set when a layer is prepared
    "prepare",  # address of the kernel that turns x into codes (or fp32)
    "kernel",  # address of the kernel that multiplies
    "records",  # address of the weight's view (cpu_view.py)
    "rows",  # N
    "columns",  # K
    "panels",  # of 16 rows
    "groups",  # along K
    "group",  # columns of one, padding included
    "shared",  # columns that share one scale of the activations
    "largest",  # code of the largest of them
    "tile",  # tokens side by side in `codes`
    "unit",  # panels that a thread takes at a time
    "item",  # bytes of one prepared activation
    "y_type",  # FP32, FP16 or BF16
    "table",  # address of fp32 [16] or [256], for codes that stand for its entries, or of a book
    "outer",  # address of the fp32 scale of E4M3 scales, of those of the rows, or all of vectors
    "starts",  # address of int64 [panels]: the byte of `records` where a sparse panel begins
    "expanded",  # bytes that a thread needs to expand the panels of a tile
    "residual_records",  # address of indices into a second book (cpu_vectors.py)
    "residual_table",  # address of that book
    "x_runs",  # address of int32: where in x each sixteen columns begin; 0: one after another
    "row_scales",  # address of fp32 [16 * panels], where scales do not lie beside codes
    # set for each call
    "x",  # address
    "x_stride",  # bytes from a token to the next
    "bias",  # address of fp32 [16 * panels]
    "y",  # address
    "tokens",  # M
    "codes",  # address of prepared activations [M / tile, groups * group / quad, tile, quad]
    "scales",  # address of their fp32 scales [M / tile, groups, tile]
    "sums",  # address of the sums over each group, same shape
    "scratch",  # address of `expanded` bytes for each thread
    # set for a team of threads: the kernel to run, and how its units are dealt out
    "task",  # address
    "task_first",  # first unit of work
    "task_limit",  # one past the last
    "task_step",  # units that belong together
    "thread_number",  # address of a function
    "thread_count",  # address of a function
)
INDEX = {name: index for index, name in enumerate(FIELDS)}


class Arguments(ArgumentBlock):
    """The fields above as values in a kernel."""

    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, INDEX)
