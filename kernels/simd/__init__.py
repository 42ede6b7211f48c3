"""512-bit vectors for compiled CPU kernels: one vocabulary, lowered for each instruction set."""

from lath.kernels.simd.isa import host_isa

__all__ = ["host_isa"]
