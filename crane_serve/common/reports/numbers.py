"""Numbers as text for readers."""

from crane_serve.common.numbers.bootstrap import Estimate

_LARGE = 1e6  # from here on, powers of ten


def number_text(value: float, digits: int = 2, *, signed: bool = False) -> str:
    """A rounded number, without a minus sign before zeros; from a million on as a power of ten."""
    sign = "+" if signed else ""
    if abs(value) >= _LARGE:
        return f"{value:{sign}.2e}"
    rounded = round(value, digits) + 0.0
    return f"{rounded:{sign},.{digits}f}"


def interval_text(estimate: Estimate, digits: int = 2, *, signed: bool = False) -> str:
    """[low, high]; empty where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{number_text(estimate.low, digits, signed=signed)}, {number_text(estimate.high, digits, signed=signed)}]"


def percent_text(fraction: float) -> str:
    """A fraction in percent, three significant digits."""
    return f"{100 * fraction:.3g} %"
