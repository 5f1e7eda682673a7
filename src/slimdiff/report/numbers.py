"""Numbers as the report writes them."""

from __future__ import annotations

import math

ARROW = " \N{RIGHTWARDS ARROW} "
SPACE = "\N{NO-BREAK SPACE}"
COUNTS = ((1e12, f"{SPACE}T"), (1e9, f"{SPACE}G"), (1e6, f"{SPACE}M"), (1e3, f"{SPACE}k"), (1, ""))
BYTES = ((1e9, f"{SPACE}GB"), (1e6, f"{SPACE}MB"), (1e3, f"{SPACE}kB"), (1, f"{SPACE}B"))
SECONDS = ((1, f"{SPACE}s"), (1e-3, f"{SPACE}ms"), (1e-6, f"{SPACE}µs"))


def count(number: float) -> str:
    """A count with a unit: 9850000 as 9.85 M."""
    return _scaled(number, COUNTS)


def size(number: float) -> str:
    """Bytes with a unit: 39344400 as 39.3 MB."""
    return _scaled(number, BYTES)


def duration(seconds: float) -> str:
    """Seconds with a unit: 0.0123 as 12.3 ms."""
    return _scaled(seconds, SECONDS)


def percent(share: float) -> str:
    """A share in percent: 0.412 as 41.2 %, and 1 as 100 %."""
    if not math.isfinite(share):
        return str(share)
    return f"{100 * share:.1f}".removesuffix(".0") + SPACE + "%"


def error(value: float) -> str:
    """A relative error: 2.0e-7; zero as 0."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def times(factor: float) -> str:
    """A speed-up: 1.08 ×."""
    return f"{factor:.2f}{SPACE}\N{MULTIPLICATION SIGN}"


def interval(low_high: tuple[float, float] | list[float]) -> str:
    """An interval of shares: 94.3 to 100 %."""
    low, high = low_high
    return f"{percent(low).removesuffix(f'{SPACE}%')} to {percent(high)}"


def change(dense: object, slim: object) -> str:
    """From dense to slim; one value where nothing changed."""
    return str(dense) if dense == slim else f"{dense}{ARROW}{slim}"


def _scaled(number: float, units: tuple[tuple[float, str], ...]) -> str:
    """In the first unit that is not larger than the number, or else in the last one."""
    size, unit = next((pair for pair in units if number >= pair[0]), units[-1])
    value = number / size
    return f"{value:.0f}{unit}" if value >= 99.95 else f"{value:.3g}{unit}"
