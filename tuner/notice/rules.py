"""Layer A: the rules, each declared once. Deterministic, without learning, at work from the first seconds on.

    Signals ──a rule's signal: (label, value) now──▶ Hold (hysteresis) ──▶ opened / closed

A fault (host, device, missing data) freezes tuning until it is over; one that spoils a slice without any doing
of the challenger also voids the pair under way. A condition (SLO, saturation, load) may start a study.
Source of the thresholds: the operators' wish list; the cautions behind each are in its words or beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from store import metrics
from store.metrics import Metric
from tuner.notice.hysteresis import Band
from tuner.notice.signals import Limit, Signals

Kind = Literal["fault", "condition"]
Severity = Literal["page", "ticket"]
Unit = Literal["", "ratio", "times"]

# NVML's clock event reasons that mean trouble: HW slowdown, SW thermal, HW thermal, HW power brake.
# Source: nvml.h, nvmlClocksEventReason*. The software power cap is daily life of a busy GPU, and not among them.
THROTTLE_BITS = 0x8 | 0x20 | 0x40 | 0x80
MIN_RATE_PER_S = 0.05  # below it a request more or less is any percentage


class Reading(NamedTuple):
    """A signal's value for one label. `counts` False: known, and not beyond whatever its value is."""

    label: str
    value: float
    counts: bool = True
    told: Callable[[], str] | None = None  # words of its own, where the value alone does not say it


Signal = Callable[[Signals, float], Iterator[Reading]]


@dataclass(frozen=True)
class Rule:
    """What is watched, when it fires, when it is over, and what follows.

    metric: what the anomaly is filed under. sees: what the value is, for people.
    unit: of the value where it is not the metric's own: a share ("ratio") or a multiple ("times").
    cool_down_s: firing again this soon continues the same anomaly.
    voids_pair: what no challenger can cause and no slice survives. starts_study: what other knobs can help.
    champion_only: is not asked while a challenger serves; the guardrails watch that one.
    """

    name: str
    metric: str
    kind: Kind
    severity: Severity
    band: Band
    sees: str
    words: str
    signal: Signal
    unit: Unit = ""
    cool_down_s: float = 600.0
    voids_pair: bool = False
    starts_study: bool = False
    champion_only: bool = False

    def reason(self, reading: Reading) -> str:
        if reading.told is not None:
            return reading.told()
        of = f" of {reading.label}" if reading.label else ""
        return self.words.format(of=of, label=reading.label, value=reading.value, limit=self.band.trigger)


# --- signals --------------------------------------------------------------------------------------


def _gauge(metric: Metric, signals: Signals, now: float) -> Iterator[Reading]:
    value = signals.value(metric)
    if value is not None:
        yield Reading("", value)


def _mean_of(metric: Metric, label: str, span_s: float, signals: Signals, now: float) -> Iterator[Reading]:
    value = signals.mean(metric, label, now, span_s)
    if value is not None:
        yield Reading("all" if label == "all" else "", value)


def _share_of(used: Metric, total: Metric, signals: Signals, now: float) -> Iterator[Reading]:
    for (metric, label), value in signals.latest.items():
        whole = signals.latest.get((total, label))
        if metric is used and whole:
            yield Reading(label, value / whole)


def _gpu_util(needs: Callable[[Signals, float], bool], signals: Signals, now: float) -> Iterator[Reading]:
    for label in signals.labels(metrics.GPU_UTIL_RATIO):
        value = signals.mean(metrics.GPU_UTIL_RATIO, label, now, 60.0)
        if value is not None:
            yield Reading(label, value, needs(signals, now))


def _has_work(signals: Signals, now: float) -> bool:
    running = signals.mean(metrics.REQUESTS_RUNNING, "", now, 60.0) or 0.0
    waiting = signals.mean(metrics.REQUESTS_WAITING, "", now, 60.0) or 0.0
    return running + waiting >= 1.0


def _queue_grows(signals: Signals, now: float) -> bool:
    """Queue or TTFT rise. NVML's utilisation says "a kernel ran": a busy decode loop is at 100 % in health."""
    waiting = (metrics.REQUESTS_WAITING, "")
    ttft = (metrics.TTFT_S, "p95")
    late, early = (signals.mean(*waiting, now, 60.0, back_s) for back_s in (0.0, 240.0))
    if late is not None and late >= 1.0 and (early is None or late > 1.1 * early):
        return True
    late, early = (signals.mean(*ttft, now, 60.0, back_s) for back_s in (0.0, 240.0))
    return late is not None and early is not None and late > 1.2 * early


def _slow_steps(signals: Signals, now: float) -> Iterator[Reading]:
    ratio, size = signals.third_slowest_step(now)
    words = (
        f"Three steps within a minute took over {signals.slow_step_ratio:g} times the p99 of steps of their size; "
        f"the third slowest {ratio:.1f} times, with {size} requests."
    )
    yield Reading("", ratio, told=lambda: words)


def _fragmentation(signals: Signals, now: float) -> Iterator[Reading]:
    back = (0.0, 60.0, 120.0, 180.0, 240.0)
    minutes = [signals.mean(metrics.KV_FRAGMENTATION_RATIO, "", now, 60.0, back_s) for back_s in back]
    known = sorted((minute for minute in minutes if minute is not None), reverse=True)
    if len(known) >= 3:
        yield Reading("", known[2])


def _slo(signals: Signals, now: float) -> Iterator[Reading]:
    for window in signals.slos:
        burn = window.burn(now)
        if burn is None:
            continue
        limit = window.limit

        def told(window=window, limit=limit, span_s=burn.span_s, ratio=burn.ratio) -> str:  # type: ignore[no-untyped-def]
            unit = "" if limit.metric == "errors" else " s"
            return (
                f"{limit.statistic} of {limit.metric} over the last {span_s:g} s is "
                f"{window.observed(now, span_s):.3g}{unit}, limit {limit.limit:g}{unit}: "
                f"its budget is used up {ratio:.1f} times as fast as it may be."
            )

        yield Reading(limit.label, burn.ratio, told=told)


def _rate_shift(signals: Signals, now: float) -> Iterator[Reading]:
    rate = signals.rate()
    if rate is None or max(rate.now, rate.expected) < MIN_RATE_PER_S:
        return
    off = abs(rate.now - rate.expected)
    words = (
        f"{rate.now:.2f} requests arrive a second where the hour before lets expect {rate.expected:.2f}, "
        f"give or take {rate.sd:.2f}: off by more than 5 % and three times that spread for 3 minutes."
    )
    yield Reading("", off / max(rate.expected, MIN_RATE_PER_S), off > 3 * rate.sd, lambda: words)


def quality_off(signals: Signals, now: float) -> Iterator[Reading]:
    """From the last two rounds of the canary set: the smaller disagreement, and whether both rounds failed."""
    if signals.quality is not None:
        _, disagreement, num_failed = signals.quality
        yield Reading("", disagreement, num_failed >= 2)


def _missing(signals: Signals, now: float) -> Iterator[Reading]:
    for name, num_ticks in signals.missing.items():
        yield Reading(name, float(num_ticks))


def _engine_down(signals: Signals, now: float) -> Iterator[Reading]:
    if signals.engine is None or signals.missing.get("runtime"):
        return
    is_down = signals.engine != "ready" or signals.has_restarted
    words = "The engine process ended and was started again."
    if signals.engine != "ready":
        words = f"The engine does not serve: it is {signals.engine}."
    yield Reading("", float(is_down), told=lambda: words)


def _size_of(metric: Metric, signals: Signals, now: float) -> Iterator[Reading]:
    value = signals.value(metric)
    if value is not None:
        yield Reading("", abs(value), told=None)


def _throttle(signals: Signals, now: float) -> Iterator[Reading]:
    for (metric, label), value in signals.latest.items():
        if metric is metrics.GPU_THROTTLE_REASONS:
            yield Reading(label, float(int(value) & THROTTLE_BITS))


def _ecc(signals: Signals, now: float) -> Iterator[Reading]:
    for label, growth in signals.ecc_growth.items():
        yield Reading(label, growth)


# --- the table ------------------------------------------------------------------------------------

_FIVE_MINUTES = Band(trigger=0.90, clear=0.85, hold_s=300.0, clear_s=60.0, min_samples=180)
_hardware = partial(
    Rule, kind="condition", severity="page", band=_FIVE_MINUTES, unit="ratio", cool_down_s=3600.0
)
_fault = partial(Rule, kind="fault", severity="page", cool_down_s=0.0)
_condition = partial(Rule, kind="condition", severity="page", champion_only=True, starts_study=True)

RULES: tuple[Rule, ...] = (
    _fault(
        "missing_data", metrics.REQUESTS_RUNNING, band=Band(2.0, 0.0, 0.0, 5.0), signal=_missing,
        sees="samples in a row that did not come, of the runtime, the host or a GPU",
        words="The {label} was not sampled for {value:.0f} intervals.",
    ),
    _fault(
        "engine_down", metrics.ENGINE_RESTARTS_TOTAL, band=Band(0.5, 0.5, 0.0, 5.0), signal=_engine_down,
        sees="whether the engine is not ready, or was started again", words="The engine does not serve.",
    ),
    _fault(
        "clock_step", metrics.CLOCK_STEP_S, band=Band(0.5, 0.1, 0.0, 30.0), voids_pair=True,
        signal=partial(_size_of, metrics.CLOCK_STEP_S), sees="s by which the system clock was set",
        words="The system clock was set by {value:.1f} s.",
    ),
    _fault(
        "host_suspended", metrics.SUSPENDED_S, band=Band(1.0, 0.5, 0.0, 30.0), voids_pair=True,
        signal=partial(_size_of, metrics.SUSPENDED_S), sees="s for which the host was suspended",
        words="The host was suspended for {value:.0f} s.",
    ),
    _fault(
        "cpu_steal", metrics.CPU_STEAL_RATIO, band=Band(0.20, 0.15, 20.0, 20.0, 15), voids_pair=True, unit="ratio",
        signal=partial(_mean_of, metrics.CPU_STEAL_RATIO, "", 10.0), sees="mean share of 10 s that went to others",
        words="The hypervisor gave {value:.0%} of our cores' time to others.",
    ),
    _fault(
        "thermal_throttle", metrics.GPU_THROTTLE_REASONS, band=Band(0.0, 0.0, 10.0, 30.0, 8), voids_pair=True,
        signal=_throttle, sees="NVML's reasons for holding clocks down, those of heat and power brake",
        words="GPU {label} holds its clocks down because of heat or power (reasons {value:.0f}).",
    ),
    _fault(
        "ecc_errors", metrics.GPU_ECC_UNCORRECTED_TOTAL, band=Band(0.0, 0.0, 0.0, 600.0), voids_pair=True,
        signal=_ecc, sees="new memory errors that could not be corrected",
        words="GPU {label} reported {value:.0f} memory errors that could not be corrected.",
    ),
    _condition(
        "slo", metrics.E2E_S, band=Band(1.0, 0.9, 30.0, 60.0, 15), signal=_slo, unit="times",
        sees="error budget of an SLO over the last minute, as a multiple of what may be used",
        words="An SLO's budget is used up {value:.1f} times as fast as it may be.",
    ),
    _condition(
        "queue", metrics.REQUESTS_WAITING, band=Band(50.0, 25.0, 30.0, 30.0, 15),
        signal=partial(_gauge, metrics.REQUESTS_WAITING), sees="requests that wait",
        words="{value:.0f} requests wait for their first step, and over {limit:.0f} did for 30 s.",
    ),
    _condition(
        "request_rate", metrics.REQUESTS_PER_S, severity="ticket", band=Band(0.05, 0.045, 180.0, 60.0, 100),
        unit="ratio", champion_only=False, signal=_rate_shift, cool_down_s=3600.0,
        sees="distance of the last minute's request rate from its hour's line; counts beyond 3 sd of such minutes",
        words="The request rate is off by {value:.0%}.",
    ),
    _condition(
        "quality", "top1_agreement", band=Band(0.05, 0.045, 0.0, 0.0), signal=quality_off, starts_study=False,
        unit="ratio", sees="share of known positions with another likeliest token; counts after two failed rounds",
        words="The champion answers {value:.1%} of the known positions otherwise than its reference, twice in a row.",
    ),
    _condition(
        "gpu_idle", metrics.GPU_UTIL_RATIO, severity="ticket", unit="ratio",
        band=Band(0.30, 0.33, 300.0, 60.0, 150, rises=False), signal=partial(_gpu_util, _has_work), cool_down_s=3600.0,
        sees="mean utilisation of 60 s; counts while requests are there",
        words="GPU {label} is {value:.0%} busy although requests are there.",
    ),
    _condition(
        "gpu_saturated", metrics.GPU_UTIL_RATIO, unit="ratio", band=Band(0.95, 0.90, 300.0, 60.0, 150),
        signal=partial(_gpu_util, _queue_grows), cool_down_s=3600.0,
        sees="mean utilisation of 60 s; counts while the queue or the TTFT grows",
        words="GPU {label} is {value:.0%} busy, and the queue or the TTFT grows.",
    ),
    _condition(
        "slow_steps", metrics.STEP_S, severity="ticket", starts_study=False, band=Band(2.0, 1.8, 0.0, 60.0),
        unit="times", signal=_slow_steps,
        sees="third slowest step of a minute, as a multiple of the p99 of its batch size",
        words="Steps take {value:.1f} times their p99.",
    ),
    _condition(
        "fragmentation", metrics.KV_FRAGMENTATION_RATIO, severity="ticket", unit="ratio",
        band=Band(0.15, 0.135, 0.0, 60.0), signal=_fragmentation, cool_down_s=3600.0,
        sees="unfilled share of the KV cache in the third worst of the last five minutes",
        words="{value:.0%} of the KV cache lies in blocks that are held and not filled.",
    ),
    _hardware(
        "memory_full", metrics.MEMORY_USED_BYTES,
        signal=partial(_share_of, metrics.MEMORY_USED_BYTES, metrics.MEMORY_TOTAL_BYTES),
        sees="share of the host's memory", words="{value:.0%} of the host's memory is in use.",
    ),
    _hardware(
        "cpu_full", metrics.CPU_UTIL_RATIO, severity="ticket", starts_study=True,
        signal=partial(_mean_of, metrics.CPU_UTIL_RATIO, "all", 10.0),
        sees="mean share of 10 s in which the cores were busy", words="The cores are {value:.0%} busy.",
    ),
    _hardware(
        "disk_full", metrics.DISK_USED_RATIO, signal=partial(_gauge, metrics.DISK_USED_RATIO),
        sees="share of the data folder's disk", words="{value:.0%} of the disk of the data folder is used.",
    ),
    _hardware(
        "gpu_power", metrics.GPU_POWER_WATTS, severity="ticket",
        signal=partial(_share_of, metrics.GPU_POWER_WATTS, metrics.GPU_POWER_LIMIT_WATTS),
        sees="power drawn over the limit in force", words="GPU {label} draws {value:.0%} of its power limit.",
    ),
    _hardware(
        "gpu_hot", metrics.GPU_TEMPERATURE_CELSIUS,
        signal=partial(_share_of, metrics.GPU_TEMPERATURE_CELSIUS, metrics.GPU_TEMPERATURE_LIMIT_CELSIUS),
        sees="temperature over the one at which the GPU slows down",
        words="GPU {label} is at {value:.0%} of the temperature at which it slows itself down.",
    ),
)  # fmt: skip


def rules_for(disabled: Sequence[str] = (), triggers: dict[str, float] | None = None) -> tuple[Rule, ...]:
    """The rules in force: without the disabled ones, and with other triggers where they are given.

    The clear threshold keeps its proportion to the trigger.
    """
    found = []
    for rule in RULES:
        wanted = (triggers or {}).get(rule.name)
        if rule.name in disabled:
            continue
        if wanted is not None:
            scale = wanted / rule.band.trigger if rule.band.trigger else 1.0
            rule = replace(rule, band=replace(rule.band, trigger=wanted, clear=rule.band.clear * scale))
        found.append(rule)
    return tuple(found)


def limits_for(slos: Sequence[Limit], itl_p99_s: float | None) -> list[Limit]:
    """The SLOs that rules watch: those of the settings, and the gap between two tokens, which everybody feels."""
    limits = list(slos)
    if itl_p99_s is not None:
        limits.append(Limit("itl_s", "p99", itl_p99_s, min_count=500))
    return limits
