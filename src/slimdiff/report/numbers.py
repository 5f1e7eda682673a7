"""Numbers as the report writes them."""

from __future__ import annotations

import math
import re

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
    return _plain(f"{value:g}" if value == 0 or not math.isfinite(value) else f"{value:.1e}")


def short(value: float) -> str:
    """Three digits: 0.0123, 6.03e-7."""
    return _plain(f"{value:.3g}")


def times(factor: float) -> str:
    """A factor: 1.08 ×."""
    return f"{factor:.2f}{SPACE}\N{MULTIPLICATION SIGN}"


def faster(speedup: float) -> str:
    """A speed-up in words: 1.16 × faster, or what is below 1 as slower."""
    return f"{times(speedup)} faster" if speedup >= 1 else f"{times(1 / speedup)} slower"


def removed(dense: float, slim: float) -> str:
    """How much less the slim model has: 8.3 % removed; of a larger one, how much more."""
    share = 1 - slim / dense if dense else 0.0
    return f"{percent(abs(share))} {'removed' if share >= 0 else 'more'}"


def product(width: int, heads: int) -> str:
    """A width of each of several heads: 24 × 8."""
    return f"{width}{SPACE}\N{MULTIPLICATION SIGN}{SPACE}{heads}"


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


def _plain(number: str) -> str:
    """An exponent without the zero before it: 2.0e-07 as 2.0e-7."""
    return re.sub(r"e([+-])0*(?=\d)", lambda found: "e" + found[1].strip("+"), number)
