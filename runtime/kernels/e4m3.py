"""Rounding to e4m3 within a kernel, as `runtime.rounded_cache` has it."""

import triton
import triton.language as tl


@triton.jit
def rounding_step(largest: tl.tensor) -> tl.tensor:
    """The scale of values of which this is the largest, float32: a power of two."""
    exponent = tl.maximum(largest, 7.888609052210118e-31).to(tl.int32, bitcast=True) & 0x7F800000  # 2^-100
    return exponent.to(tl.float32, bitcast=True) * 0.0078125  # 2^-7


@triton.jit
def e4m3(x: tl.tensor) -> tl.tensor:
    """Bits of the nearest e4m3 number, ties to even, of float32 values below 448; 0x7F for what is no number. Written
    out, since older GPUs have no such conversion, and Triton's interpreter forgets to carry into the exponent."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents count from -7 instead of -127
    # In steps of 2^-9, as 2^23 has no fractions.
    small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    found = tl.minimum(tl.where(size < 0.015625, small, normal), 0x7F)
    return (found | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
