"""Numbers, instants and recorded texts as a person reads them. Pure."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any

ABSENT = "–"  # a value that is not known is not zero

OUTCOMES = {
    "PROMOTE": "Proven better",
    "REJECT": "Not taken",
    "INCONCLUSIVE": "Not proven",
}
KINDS = {
    "probe": "Probe: one pair, to rank candidates",
    "test": "Test: pairs until the evidence is enough",
    "holdback": "Holdback: the former champion serves a slice, to see whether the gain stays",
    "aa": "A/A: the champion against itself, to see how often chance alone would win",
}
CHANGES = {
    "start": "put in force at a start",
    "promote": "promoted after a proof",
    "rollback": "rolled back",
    "restore": "restored after an edit from outside",
}
APPLY = {
    "live": "LIVE: at the next step of the engine, no request waits",
    "warm": "WARM: prepared beside the running engine, then swapped at a step",
    "cold": "COLD: a new worker takes over",
}

# What Markdown, Streamlit's directives (:red[...], :material/...:) and its formulas ($...$) would act on.
# Addresses become links by themselves, after escapes are gone: a word joiner, which nobody sees, keeps them apart.
LINKS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)
JOINER = "\u2060"
ACTIVE = re.compile(r"([\\`*_{}\[\]()<>#+.!|~$:&-])")


def escaped(text: object) -> str:
    """The text as Markdown that shows just this text: what the store holds is never read as markup."""
    return ACTIVE.sub(r"\\\1", LINKS.sub(JOINER, " ".join(str(text).split())))


def told_seconds(seconds: float | None) -> str:
    """`12.3 ms`, `123 ms`, `1.23 s`, `123 s`."""
    if seconds is None:
        return ABSENT
    if seconds < 0.0995:
        return f"{1e3 * seconds:.1f} ms"
    if seconds < 0.9995:
        return f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 99.5 else f"{seconds:.0f} s"


def told_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def told_percent(ratio: float | None, digits: int = 1) -> str:
    """`-25.0 %` for a ratio of -0.25."""
    return ABSENT if ratio is None else f"{100 * ratio:+.{digits}f} %".replace("-", "−")


def told_share(ratio: float | None) -> str:
    """`25 %` for 0.25; small shares keep a digit."""
    if ratio is None:
        return ABSENT
    return f"{100 * ratio:.0f} %" if ratio == 0 or ratio >= 0.0995 else f"{100 * ratio:.2g} %"


def told_interval(low: float | None, high: float | None) -> str:
    """`−83.3 % to −25.6 %`; in words where it is still unbounded."""
    if low is None or high is None:
        return "no interval yet: too few pairs"
    return f"{told_percent(low)} to {told_percent(high)}"


def told_number(value: float | None, digits: int = 0) -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}"


def told_bytes(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def told_times(value: float) -> str:
    """`6.3 ×`"""
    return f"{value:.3g} ×"


def told_value(value: float | None, unit: str) -> str:
    """A measured value with its unit, scaled for reading."""
    if value is None:
        return ABSENT
    told = {"s": told_seconds, "ratio": told_share, "bytes": told_bytes, "times": told_times}.get(unit)
    if told is not None:
        return told(value)
    digits = 1 if abs(value) < 100 and not float(value).is_integer() else 0
    return f"{told_number(value, digits)} {unit}"


def told_knob(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def told_at(at: float | None, zone: tzinfo, now: float | None = None) -> str:
    """Local time; the date too where it is not today's."""
    if at is None:
        return ABSENT
    local = datetime.fromtimestamp(at, zone)
    is_today = now is not None and datetime.fromtimestamp(now, zone).date() == local.date()
    return local.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M:%S")


def told_utc(at: float | None) -> str:
    return ABSENT if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def told_changes(changed: Mapping[str, Sequence[object]]) -> str:
    """`max_num_seqs 2 → 16, batch_wait_ms 50 → 0`."""
    parts = [f"{name} {told_knob(before)} → {told_knob(after)}" for name, (before, after) in changed.items()]
    return ", ".join(parts) or "no difference"


def told_effect(metric: str, ratio: float | None) -> str:
    """What an effect on a latency means, in words."""
    if ratio is None:
        return f"The change of {metric} is not known yet."
    if abs(ratio) < 0.0005:
        return f"{metric} stayed the same."
    return f"{metric} {'fell' if ratio < 0 else 'rose'} by {100 * abs(ratio):.1f} %."


def told_odds(level: float) -> str:
    """`1 in 400` for 0.0025: a share that a newcomer can picture."""
    return f"1 in {max(1, round(1 / level)):,}" if level > 0 else "never"


def told_verdict(verdict: Any, metric: str) -> list[str]:
    """A verdict in sentences for somebody who has not read about tests."""
    lines = [f"{OUTCOMES.get(verdict.outcome, verdict.outcome)}. {told_effect(metric, verdict.effect_ratio)}"]
    if verdict.interval_low_ratio is not None:
        lines.append(
            "Judged from these pairs the true change lies between "
            f"{told_interval(verdict.interval_low_ratio, verdict.interval_high_ratio)} (95 % interval, valid at "
            "whatever pair it is looked at)."
        )
    lines.append(
        f"{verdict.num_pairs} pairs of slices were compared; a coin chose which side went first in each."
    )
    if verdict.outcome == "PROMOTE":
        lines.append(
            f"A change that does nothing is promoted in at most {told_odds(verdict.level)} such tests, "
            f"because that is the level this test was given ({100 * verdict.level:.3g} %)."
        )
    elif verdict.outcome == "INCONCLUSIVE":
        lines.append(
            "That is not a proof of no difference: luck with the coins could have given this result."
        )
    return lines
