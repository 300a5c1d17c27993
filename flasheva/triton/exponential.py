"""Exponentials: the instruction's for half precision, nearly exact ones for float32.

`ex2.approx`, which exp and exp2 become on a GPU, errs by up to 2^-22: four times the unit roundoff
of float32, but nothing beside the rounding of bfloat16 or float16.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# ln 2 in two parts; the first has so few digits that its products with integers are exact.
_LN_2_HIGH: tl.constexpr = tl.constexpr(0.693359375)
_LN_2_LOW: tl.constexpr = tl.constexpr(-2.1219444005469057e-4)


@triton.jit
def _scaled_exp(f, n):
    """e^f * 2^n for |f| <= ln(2) / 2 and whole n >= -126, by eight terms of the series."""
    y = f * (1.0 / 5040.0) + (1.0 / 720.0)
    y = f * y + (1.0 / 120.0)
    y = f * y + (1.0 / 24.0)
    y = f * y + (1.0 / 6.0)
    y = f * y + 0.5
    y = f * y + 1.0
    y = f * y + 1.0
    power = (n.to(tl.int32) + 127) << 23
    return y * power.to(tl.float32, bitcast=True)


@triton.jit
def exp2(x, EXACT: tl.constexpr):
    """2^x for x < 127, -inf included; EXACT: to about a unit roundoff of float32."""
    if EXACT:
        n = tl.floor(x + 0.5)
        return tl.where(x < -125.0, 0.0, _scaled_exp((x - n) * _LN_2, n))
    else:
        return tl.exp2(x)


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """e^x for x < 88, -inf included; see `exp2`."""
    if EXACT:
        n = tl.floor(x * LOG2_E + 0.5)
        f = (x - n * _LN_2_HIGH) - n * _LN_2_LOW
        return tl.where(x < -86.0, 0.0, _scaled_exp(f, n))
    else:
        return tl.exp(x)
