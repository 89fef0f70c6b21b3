"""How far apart the ticks of a schedule lie: the five fields of cron as Kubernetes reads them."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise

_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_NAMES = {
    name: number
    for first, names in ((1, "jan feb mar apr may jun jul aug sep oct nov dec"), (0, "sun mon tue wed thu fri sat"))
    for number, name in enumerate(names.split(), first)
}
_FIRST, _DAYS = date(2024, 1, 1), 8 * 366  # with two 29ths of February


def longest_gap(cron: str) -> float | None:
    """Seconds between the two neighbouring ticks that lie farthest apart, summer time left out. None: it never ticks twice, or is
    not what Kubernetes takes."""
    texts = cron.split()
    try:
        minutes, hours, days, months, weekdays = (_values(text, *span) for text, span in zip(texts, _FIELDS, strict=True))
    except ValueError:
        return None
    times = sorted(60 * hour + minute for hour in hours for minute in minutes)
    # Where both kinds of day are restricted, one of them is enough.
    enough = any if not {"*", "?"} & {texts[2], texts[4]} else all
    calendar = enumerate(_FIRST + timedelta(number) for number in range(_DAYS))
    ticking = [
        number for number, day in calendar if day.month in months and enough((day.day in days, day.isoweekday() % 7 in weekdays))
    ]
    over_night = [1440 * (later - earlier) + times[0] - times[-1] for earlier, later in pairwise(ticking)]
    within = [later - earlier for earlier, later in pairwise(times)]
    return 60.0 * max(over_night + within) if over_night else None


def _values(text: str, low: int, high: int) -> set[int]:
    """What a field stands for. Raises ValueError."""
    return {number for item in text.split(",") for number in _item(item, low, high)}


def _item(text: str, low: int, high: int) -> range:
    span, slash, step = text.partition("/")
    first, dash, last = span.partition("-")
    if span in ("*", "?"):
        start, stop = low, high
    else:
        start = _number(first)
        stop = _number(last) if dash else high if slash else start
    if not low <= start <= stop <= high:
        raise ValueError(text)
    return range(start, stop + 1, int(step) if slash else 1)


def _number(word: str) -> int:
    name = _NAMES.get(word.lower())
    return int(word) if name is None else name
