"""`lath.plan` and `lath.plan_attention`: which loop would run, and why, on any device."""

from __future__ import annotations

import functools

import torch

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.attention import ScoreOptions
from lath.formats.device import KNOWN_DEVICES, DeviceDescription, describe_gpu, known_device
from lath.formats.families import weight_codec
from lath.formats.packed_weight import WeightCodec
from lath.formats.pages import PAGE, PageCodec, PageFormat, page_codec
from lath.formats.plan import Plan
from lath.verbs.backends import is_installed
from lath.verbs.checks import FLOAT_DTYPES, check_flag, check_size
from lath.verbs.kinds import kind_of


def describe_device(device: str | torch.device | DeviceDescription) -> DeviceDescription:
    """What a plan knows of a device.

    device: a torch device of this machine ("cpu", "cuda:0"), an architecture that need not be here
    ("sm_90", "gfx942", "avx2"), or a DeviceDescription, returned as it is.
    """
    if isinstance(device, DeviceDescription):
        return device
    if isinstance(device, str) and device in KNOWN_DEVICES:
        return known_device(device)
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be a torch device, a DeviceDescription or one of {sorted(KNOWN_DEVICES)},"
            f" got {device!r}"
        ) from error
    if target.type == "cpu":
        return describe_cpu(torch.get_num_threads())
    if target.type == "cuda":
        return describe_gpu(torch.cuda.current_device() if target.index is None else target.index)
    raise ValueError(f"device must be a 'cpu' or 'cuda' device, got {str(target)!r}")


@functools.cache
def describe_cpu(threads: int) -> DeviceDescription:
    """This machine's CPU with `threads` threads."""
    architecture, wide_look_up, quick_permutation = "portable", False, False
    if is_installed("numba"):
        from lath.kernels.simd.isa import has_quick_permutation, has_wide_look_up, host_isa

        architecture = host_isa()
        wide_look_up = has_wide_look_up(host_isa())
        quick_permutation = has_quick_permutation(host_isa())
    like = known_device(architecture)
    return DeviceDescription(
        "cpu", like.name, architecture, threads, bandwidth=like.bandwidth, threads=threads,
        wide_look_up=wide_look_up, quick_permutation=quick_permutation,
    )  # fmt: skip


def plan(
    M: int,
    N: int,
    K: int,
    codec: str | WeightCodec,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device | DeviceDescription = "cpu",
    activations: str | ActivationFormat = "float",
) -> Plan:
    """The plan of `linear` for x [M, K] of `dtype` and a weight [N, K] in `codec`.

    Pure: the same arguments give the same plan, on any machine when `device` is an architecture or
    a DeviceDescription. The plan carries its reason, predicted bytes and operations.
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    parsed = weight_codec(codec)
    made: Plan = kind_of(parsed).function("plan", "plan_linear")(
        check_size("M", M),
        check_size("N", N),
        check_size("K", K),
        parsed,
        activation_format(activations),
        dtype,
        describe_device(device),
    )
    return made


def plan_attention(
    *,
    sequences: int = 1,
    query_heads: int,
    kv_heads: int,
    queries: int = 1,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
    key_codec: str | PageCodec = "int8",
    value_codec: str | PageCodec = "int8",
    precision: str = "auto",
    causal: bool = True,
    window: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device | DeviceDescription = "cpu",
    lists: int | None = None,
    tokens: bool = False,
    subpages: int | None = None,
    draft: bool = False,
) -> Plan:
    """The plan of `attention` (value_codec "float") or `decode_attention` over `keys` keys.

    queries, keys: of the longest sequence; after a selection keys are those of its longest list,
    the first 64 and the unfilled page included. precision: of P·V, as in `decode_attention`. lists:
    after a selection, how many lists a sequence has, kv_heads or query_heads; None where all heads
    read the same pages. tokens: the lists hold tokens, not whole pages; subpages: 16 tokens side by
    side of which a list holds one, at most (of others no codes are read); None: all. draft: the
    draft view of "int8-planes" is read. Pure, as `plan` is, and with a reason: how rows are packed
    and into how many pieces the keys are split.
    """
    from lath.kernels.attention.plan import plan_attention as make_plan
    from lath.verbs.attention_options import choose_precision, choose_query

    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    sizes = {
        name: check_size(name, size)
        for name, size in (
            ("sequences", sequences), ("query_heads", query_heads), ("kv_heads", kv_heads),
            ("queries", queries), ("keys", keys),
        )
    }  # fmt: skip
    if not kv_heads or not query_heads or query_heads % kv_heads:
        raise ValueError(
            f"query_heads must be a multiple of kv_heads, got {query_heads} and {kv_heads}"
        )
    check_size("head_dim", head_dim)
    codecs = page_codec(key_codec, "key_codec"), page_codec(value_codec, "value_codec")
    value_dim = head_dim if value_dim is None else check_size("value_dim", value_dim)
    fmt = PageFormat(*codecs, head_dim, value_dim, dtype.itemsize)
    options = ScoreOptions(
        scale=max(head_dim, 1) ** -0.5, causal=causal, window=window,
        query=choose_query("auto", fmt), precision=choose_precision(precision, fmt),
    )  # fmt: skip
    if lists is not None:
        check_size("lists", lists)
    if subpages is not None:
        check_size("subpages", subpages)
    if check_flag("draft", draft) and max(fmt.key.planes, fmt.value.planes) < 2:
        raise ValueError(f"draft needs the codec 'int8-planes' for keys or values, got {fmt}")
    description = describe_device(device)
    first = min(keys, PAGE)  # they and, beside codes, those of the unfilled page stay floats
    last = (keys - first) % PAGE if fmt.value.map != "float" else 0
    return make_plan(
        **sizes, fmt=fmt, dtype=dtype, options=options, device=description,
        backend="cpu" if description.kind == "cpu" else "triton", lists=lists,
        tokens=check_flag("tokens", tokens), subpages=subpages, float_keys=first + last,
        draft=draft,
    )  # fmt: skip
