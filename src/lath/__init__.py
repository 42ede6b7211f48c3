"""lath: low-bit GEMM and 8-bit attention for language models, in NumPy, Triton and on CPUs.

    w = lath.quantize(weight, "int4-g128")      # [N, K] → QTensor; quantizer="gptq", "hqq"
    y = lath.linear(x, w)                       # [..., K] → [..., N]
    o = lath.attention(q, k, v, causal=True)    # int8 scores
    kv = lath.PagedKV(num_kv_heads, head_dim)   # a quantised cache
    kv.append(k, v)
    o = lath.decode_attention(q, kv)
    ids = lath.select(q, kv, "quest", budget=1024)
    o = lath.decode_attention(q, kv, pages=ids, repair=True)
    with lath.patch(model, weights="int4-g64") as report:
        model.generate(...)
    model = lath.load(folder, "int4-g64")       # packed while it is read

Importing this touches no GPU and needs neither triton, numba nor transformers.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.device import DeviceDescription
from lath.formats.families import load_weight
from lath.formats.families import weight_codec as codec
from lath.formats.packed_weight import PackedWeight
from lath.formats.pages import PageCodec
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.formats.quantizer import AWQ, GPTQ, HQQ, RTN, quantizer
from lath.formats.selection import IndexList
from lath.formats.sum_tensor import SumTensor
from lath.selectors import Selector, double_sparsity_channels, selector
from lath.verbs.attention import attention
from lath.verbs.budgets import TopMass
from lath.verbs.channel_scales import key_channel_scales
from lath.verbs.decode import decode_attention
from lath.verbs.eviction import PagedEviction, Scope
from lath.verbs.index_lists import index_list
from lath.verbs.layer_budgets import prefix_kv_budgets, scale_kv_budgets
from lath.verbs.linear import linear
from lath.verbs.merge import merge
from lath.verbs.misses import captured_mass, recall
from lath.verbs.paged_kv import PagedKV
from lath.verbs.planning import describe_device, plan, plan_attention
from lath.verbs.quantize import quantize
from lath.verbs.quantizers import Hessian, awq_scales
from lath.verbs.sdpa import scaled_dot_product_attention
from lath.verbs.select import select
from lath.verbs.selection import Selection
from lath.verbs.tequila import tequila

if TYPE_CHECKING:
    from lath.integration.cache import LathCache
    from lath.integration.calibration import Calibration
    from lath.integration.load import load
    from lath.integration.pairs import mean_square_inputs, sort_pairs
    from lath.integration.patch import patch
    from lath.integration.report import PatchReport

__version__ = "0.1.0"

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "RTN",
    "ActivationFormat",
    "Calibration",
    "Codec",
    "DeviceDescription",
    "Hessian",
    "IndexList",
    "LathCache",
    "PackedWeight",
    "PageCodec",
    "PagedEviction",
    "PagedKV",
    "PatchReport",
    "Plan",
    "QTensor",
    "Scope",
    "Selection",
    "Selector",
    "SumTensor",
    "TopMass",
    "attention",
    "awq_scales",
    "captured_mass",
    "codec",
    "decode_attention",
    "describe_device",
    "double_sparsity_channels",
    "index_list",
    "key_channel_scales",
    "linear",
    "load",
    "load_weight",
    "mean_square_inputs",
    "merge",
    "patch",
    "plan",
    "plan_attention",
    "prefix_kv_budgets",
    "quantize",
    "quantizer",
    "recall",
    "scale_kv_budgets",
    "scaled_dot_product_attention",
    "select",
    "selector",
    "sort_pairs",
    "tequila",
]

logging.getLogger("lath").addHandler(logging.NullHandler())

# Names of the fourth floor, imported on first use: they may need optional packages.
_INTEGRATION = {
    "Calibration": "lath.integration.calibration",
    "LathCache": "lath.integration.cache",
    "load": "lath.integration.load",
    "mean_square_inputs": "lath.integration.pairs",
    "sort_pairs": "lath.integration.pairs",
    "patch": "lath.integration.patch",
    "PatchReport": "lath.integration.report",
}


def __getattr__(name: str) -> Any:
    if name in _INTEGRATION:
        return getattr(import_module(_INTEGRATION[name]), name)
    raise AttributeError(f"module 'lath' has no attribute {name!r}")
