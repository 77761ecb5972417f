"""Numbers as people read them: sizes in GiB, durations, ages, counts, losses. Pure."""

from datetime import datetime, timedelta

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(num_bytes: float) -> str:
    """`2.4 MiB`, `813 B`, `116 GiB`."""
    value, unit = _scaled(num_bytes)
    return f"{value} {unit}"


def sizes(items: list[tuple[str, int]]) -> str:
    """`weights 4.1 · logits 0.9 GiB`: several sizes in the unit of the largest."""
    if not items:
        return ""
    power = _power(max(num_bytes for _, num_bytes in items))
    parts = [f"{name} {num_bytes / 1024**power:,.{0 if power == 0 else 1}f}" for name, num_bytes in items]
    return f"{' · '.join(parts)} {_SIZES[power]}"


def count(number: float) -> str:
    """`7,248,023,552`."""
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `2 min 11 s`, `1 h 52 min`, `3 d 4 h`; the two largest units."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    for name, unit, small_name, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= unit:
            rest = whole % unit // small
            return f"{whole // unit} {name} {rest} {small_name}" if rest else f"{whole // unit} {name}"
    return f"{whole} s"


def clock(seconds: float) -> str:
    """`1:05`, `2:03:09`: what is left of a run."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def age(since: datetime, now: datetime) -> str:
    """`41 s`, `12 min`, `5 h`, `3 d`: one unit, for tables."""
    seconds = max((now - since) / timedelta(seconds=1), 0)
    for name, unit in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds:.0f} s"


def loss(value: float) -> str:
    """A loss, to four significant digits: `2.813`, `0.0412`, `nan`."""
    return f"{value:.4g}"


def rate(value: float) -> str:
    """A learning rate: `2e-4`, `1.4e-5`, `0`."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def share(part: float, whole: float) -> str:
    """`0.19 %`, `58 %`."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def spark(values: list[float], width: int = 24) -> str:
    """A curve in one line of text, from the first value to the last: `█▆▄▃▂▁`."""
    blocks = "▁▂▃▄▅▆▇█"
    if len(values) > width:
        values = [_mean(values[len(values) * i // width : len(values) * (i + 1) // width]) for i in range(width)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if not high > low:  # flat, empty, or not a number
        return ""
    return "".join(blocks[int((value - low) / (high - low) * (len(blocks) - 1))] for value in values)


def _power(num_bytes: float) -> int:
    power = 0
    while num_bytes >= 1024 and power < len(_SIZES) - 1:
        num_bytes /= 1024
        power += 1
    return power


def _scaled(num_bytes: float) -> tuple[str, str]:
    power = _power(num_bytes)
    value = num_bytes / 1024**power
    return (f"{value:.0f}" if power == 0 or value >= 100 else f"{value:.1f}"), _SIZES[power]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
