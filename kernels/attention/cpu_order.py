"""The order in which the lines of a record are asked for while another one is multiplied.

It decides how fast memory answers (one thread, 32k keys, 8 KV heads, D 128, int8; medians over five
processes, each against the order of addresses, where a list holds an eighth of a head's pages / all
are read): the first two lines of every 4 KB at once, 7 % / 4 % faster, because their translations
are looked up while there is time; keys and values in turn 8 % / 5 %; both 9 % / 6 %. Half of the
lines, the rest left to memory's own prefetchers, took 1.5 times as long.

The second-level cache of a Zen 4 waits for 48 lines at once and forgets what else it is asked for;
what is forgotten is waited for in full. Hence lines are asked for as evenly as the work allows,
beside the softmax too, and each of them again one record later (`cpu_ask.ask`). While many are on
their way the first-level cache answers late, and a page's mean, which scores wait for, is fetched
there beforehand. The three together: 20 % faster, any one alone 0 to 8 %.
"""

from __future__ import annotations

import itertools

from lath.formats.pages import PageFormat
from lath.kernels.attention.cpu_arguments import Kind

LINE = 64
_PAGE_OF_MEMORY = 4096
_FIRST = 2  # lines of each that are asked for at once; the second is the first's neighbour
_RUN = 8  # lines of keys, then of values


def asked_lines(fmt: PageFormat, kind: Kind) -> tuple[list[int], int]:
    """Offsets in a record, and how many of them are asked for before values; the rest beside them.

    They are the lines that the integer loops read. `integer_scores` asks for three quarters as many
    as it reads, `softmax` for the rest of these, `integer_values` for as many as it reads.
    """
    keys = _lines(fmt, "keys", kind.key) if kind.integer_scores else []
    values = _lines(fmt, "values", kind.value) if kind.integer_values else []
    first = []
    for _, block in itertools.groupby(keys + values, lambda offset: offset // _PAGE_OF_MEMORY):
        first += list(block)[:_FIRST]
    early = set(first)
    runs = [
        [lines[i : i + _RUN] for i in range(0, len(lines), _RUN)]
        for lines in ([line for line in side if line not in early] for side in (keys, values))
    ]
    turns = itertools.zip_longest(*runs, fillvalue=[])
    return first + [line for turn in turns for run in turn for line in run], len(keys)


def _lines(fmt: PageFormat, side: str, codec: str) -> list[int]:
    planes = (side, f"{side}_low") if codec == "int8-planes" else (side,)
    fields = [fmt.fields[plane] for plane in planes]
    return [line for field in fields for line in range(field.offset, field.end, LINE)]
