"""Numbers as a reader wants them: six digits, a true minus sign, powers of ten, intervals rounded outward."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PLAIN = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "−0123456789")  # from superscripts back to digits, for the typesetters


def number(value: float, digits: int = 6, rounding: str = ROUND_HALF_EVEN) -> str:
    """Return `value` with at most `digits` significant digits and no trailing zeros.

    >>> number(-0.125), number(2 / 3), number(1e-6), number(1.5e-17), number(4096)
    ('−0.125', '0.666667', '10⁻⁶', '1.5 × 10⁻¹⁷', '4096')
    >>> number(float("inf")), number(float("nan"))
    ('∞', 'undefined')
    """
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = Context(prec=digits, rounding=rounding).create_decimal_from_float(float(value))
    if rounded == 0:
        return "0"
    exponent = rounded.adjusted()
    if -4 <= exponent < max(digits, 7):
        whole, _, decimals = f"{abs(rounded):f}".partition(".")
        decimals = decimals.rstrip("0")
        text = _grouped(whole) + ("." + decimals if decimals else "")
    else:
        mantissa = f"{abs(rounded).scaleb(-exponent):f}"
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        power = "10" + str(exponent).translate(_SUPERSCRIPT)
        text = power if mantissa == "1" else f"{mantissa} × {power}"
    return ("−" if rounded < 0 else "") + text


def interval(lower: float, upper: float, digits: int = 3) -> str:
    """Return `[lower, upper]` rounded outward, so that the printed interval contains the measured one.

    >>> interval(-0.00123449, 0.0009991)
    '[−0.00124, 0.001]'
    >>> interval(0.0, 0.0)
    '0'
    """
    if lower == upper:
        return number(lower, digits)
    return f"[{number(lower, digits, ROUND_FLOOR)}, {number(upper, digits, ROUND_CEILING)}]"


def duration(seconds: float) -> str:
    """Return a time span in the unit that a person would choose.

    >>> duration(0.0004), duration(2.345), duration(95), duration(7500)
    ('< 1 ms', '2.3 s', '1 min 35 s', '2 h 5 min')
    """
    if seconds < 0.001:
        return "< 1 ms"
    if seconds < 1:
        return f"{number(seconds * 1000, 2)} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(amount: int) -> str:
    r"""Return an integer with thin spaces between thousands.

    >>> count(1234567)
    '1\u2009234\u2009567'
    """
    return _grouped(str(amount))


def _grouped(digits: str) -> str:
    return f"{int(digits):,}".replace(",", "\N{THIN SPACE}") if len(digits) > 4 else digits
