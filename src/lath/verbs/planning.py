"""`lath.plan`: which loop an operation would run, and why, on this device or an invented one."""

from __future__ import annotations

import functools

import torch

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.formats.device import KNOWN_DEVICES, DeviceDescription, describe_gpu, known_device
from lath.formats.plan import Plan
from lath.kernels.linear.plan import plan_linear
from lath.verbs.backends import is_installed
from lath.verbs.checks import FLOAT_DTYPES, check_size


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
    architecture = "portable"
    if is_installed("numba"):
        from lath.kernels.simd import host_isa

        architecture = host_isa()
    like = known_device(architecture)
    return DeviceDescription(
        "cpu", like.name, architecture, threads, bandwidth=like.bandwidth, threads=threads
    )


def plan(
    M: int,
    N: int,
    K: int,
    codec: str | Codec,
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
    return plan_linear(
        check_size("M", M),
        check_size("N", N),
        check_size("K", K),
        parse_codec(codec),
        activation_format(activations),
        dtype,
        describe_device(device),
    )
