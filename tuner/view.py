"""The live view in the terminal: a value in, a picture out. Where there is no terminal, plain lines instead.

`render` and `plain_line` are pure; `show` refreshes the one twice a second or prints the other every 10 s.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

REFRESH_S = 0.5
PLAIN_EVERY_S = 10.0
WIDE_COLUMNS = 130
SPARKS = "▁▂▃▄▅▆▇█"
ABSENT = "–"  # a value that is not known is not zero


@dataclass(frozen=True)
class LatencyView:
    """One latency over the last minute, and its p95 over time, oldest first; a gap is None."""

    p50_s: float | None = None
    p95_s: float | None = None
    history_s: Sequence[float | None] = ()


@dataclass(frozen=True)
class ExperimentView:
    """The experiment under way. Ratios are changes of the objective: -0.25 is a quarter less."""

    kind: str
    change: str
    num_pairs: int = 0
    max_pairs: int = 1
    arm: str | None = None
    effect_ratio: float | None = None
    low_ratio: float | None = None
    high_ratio: float | None = None
    level: float | None = None
    next_look_pairs: int | None = None


@dataclass(frozen=True)
class ProbeView:
    """One candidate that was probed, or waits for it."""

    change: str
    state: str
    effect_ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class StoryLine:
    at: float
    text: str


@dataclass(frozen=True)
class GainView:
    """One latency before the tuner changed anything and now, both p95 in seconds."""

    name: str
    before_s: float
    after_s: float


@dataclass(frozen=True)
class ViewState:
    """Everything the view shows. `doing` says what the tuner does and why, in one sentence."""

    now: float
    api_url: str
    model: str
    device: str
    mode: str
    uptime_s: float
    doing: str
    engine: str = "ready"
    dashboard_url: str | None = None
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    error_ratio: float | None = None
    num_running: int | None = None
    num_waiting: int | None = None
    ttft: LatencyView = LatencyView()
    tpot: LatencyView = LatencyView()
    e2e: LatencyView = LatencyView()
    champion_id: str = ABSENT
    champion_changes: Sequence[str] = ()  # knobs that differ from the default, such as "max_num_seqs 16 → 8"
    experiment: ExperimentView | None = None
    probes: Sequence[ProbeView] = ()
    gains: Sequence[GainView] = ()
    waiting_for_person: str | None = None
    story: Sequence[StoryLine] = ()

    @property
    def latencies(self) -> tuple[tuple[str, LatencyView], ...]:
        return ("TTFT", self.ttft), ("TPOT", self.tpot), ("E2E", self.e2e)


# --- numbers --------------------------------------------------------------------------------------


def told_seconds(seconds: float | None) -> str:
    """`12.3 ms`, `123 ms`, `1.23 s`, `123 s`."""
    if seconds is None:
        return ABSENT
    if seconds < 0.0995:
        return f"{1e3 * seconds:.1f} ms"
    if seconds < 0.9995:
        return f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 99.5 else f"{seconds:.0f} s"


def told_change(ratio: float | None) -> str:
    """`-25.0 %` for a ratio of -0.25."""
    return ABSENT if ratio is None else f"{100 * ratio:+.1f} %"


def told_number(value: float | None, digits: int = 0) -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}"


def sparkline(values: Sequence[float | None], columns: int) -> str:
    """The newest values as bars from zero to the highest of them; a gap stays empty."""
    shown = list(values)[-columns:] if columns > 0 else []
    highest = max((value for value in shown if value is not None), default=0.0)
    if highest <= 0.0:
        return ""
    top = len(SPARKS) - 1
    return "".join(
        " " if value is None else SPARKS[round(top * max(0.0, value) / highest)] for value in shown
    )


# --- sections -------------------------------------------------------------------------------------


def header(state: ViewState) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    line.add_column(justify="right", no_wrap=True)
    name = Text.assemble(("tuner ", "bold cyan"), (state.model, "bold"), f" on {state.device}")
    up = timedelta(seconds=int(state.uptime_s))
    line.add_row(name, Text(f"engine {state.engine} · mode {state.mode} · up {up}"))
    where = f"API {state.api_url}"
    line.add_row(Text(where), Text("" if state.dashboard_url is None else f"dashboard {state.dashboard_url}"))
    return line


def traffic(state: ViewState, columns: int) -> RenderableType:
    counts = (
        f"{told_number(state.requests_per_s, 1)} requests/s · {told_number(state.tokens_per_s)} tokens/s · "
        f"{told_number(state.num_running)} running · {told_number(state.num_waiting)} waiting"
    )
    if state.error_ratio is not None:
        counts += f" · {100 * state.error_ratio:.1f} % errors"
    return Group(
        Rule("traffic, last minute", align="left", style="dim"),
        Text(counts, no_wrap=True, overflow="ellipsis"),
        latency_table(state, columns),
    )


def latency_table(state: ViewState, columns: int) -> Table:
    """p50 and p95 of the last minute, what p95 was before the first change, and p95 over time."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True, min_width=4)
    names = ["p50", "p95", *(["p95 at start", "change"] if state.gains else [])]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=8)
    table.add_column("p95 over time", no_wrap=True)
    gains = {gain.name: gain for gain in state.gains}
    for name, latency in state.latencies:
        cells = [name, told_seconds(latency.p50_s), told_seconds(latency.p95_s)]
        if state.gains:
            gain = gains.get(name)
            cells += [ABSENT, ABSENT] if gain is None else [told_seconds(gain.before_s), told_gain(gain)]
        bars = sparkline(latency.history_s, max(0, columns - (52 if state.gains else 26)))
        table.add_row(*cells, Text(bars, "cyan"))
    return table


def champion(state: ViewState, is_short: bool) -> RenderableType:
    changes = ", ".join(state.champion_changes) or "every knob at its default"
    title = Rule(f"champion {state.champion_id}", align="left", style="dim")
    return Group(title, Text(changes, no_wrap=is_short, overflow="ellipsis"))


def told_gain(gain: GainView) -> str:
    return told_change(gain.after_s / gain.before_s - 1.0) if gain.before_s > 0.0 else ABSENT


def doing(state: ViewState) -> RenderableType:
    rows: list[RenderableType] = [Rule("now", align="left", style="dim"), Text(state.doing, "bold")]
    if state.waiting_for_person is not None:
        rows.append(Text(f"Waits for you: {state.waiting_for_person}", "yellow"))
    if state.experiment is not None:
        rows.extend(experiment(state.experiment))
    return Group(*rows)


def experiment(running: ExperimentView) -> Iterable[RenderableType]:
    progress = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(4):
        progress.add_column(no_wrap=True)
    serving = "" if running.arm is None else f"the {running.arm} serves"
    told = f"pair {running.num_pairs} of {running.max_pairs}"
    bar = ProgressBar(total=max(1, running.max_pairs), completed=running.num_pairs, width=20)
    progress.add_row(Text(running.kind), bar, told, Text(serving))
    yield progress
    if running.effect_ratio is None:
        return
    evidence = f"effect {told_change(running.effect_ratio)}"
    if running.low_ratio is not None and running.high_ratio is not None:
        evidence += f" [{told_change(running.low_ratio)}, {told_change(running.high_ratio)}]"
    if running.level is not None:
        evidence += f" · level {running.level:.2%}"
    if running.next_look_pairs is not None:
        evidence += f" · next look at pair {running.next_look_pairs}"
    yield Text(evidence, no_wrap=True, overflow="ellipsis")


def probes(found: Sequence[ProbeView], num_rows: int) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("candidate", no_wrap=True, overflow="ellipsis", ratio=3)
    table.add_column("effect", no_wrap=True, justify="right", min_width=8)
    table.add_column("state", no_wrap=True, min_width=8)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=2)
    for probe in found[-num_rows:]:
        table.add_row(
            Text(probe.change), told_change(probe.effect_ratio), Text(probe.state.lower()), Text(probe.note)
        )
    return Group(Rule("probes", align="left", style="dim"), table)


def story(lines: Sequence[StoryLine], num_rows: int) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for line in lines[-num_rows:] if num_rows > 0 else []:
        table.add_row(told_time(line.at), Text(line.text))
    return Group(Rule("story", align="left", style="dim"), table)


def told_time(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


# --- the whole ------------------------------------------------------------------------------------


def render(state: ViewState, columns: int = 80, rows: int = 24) -> RenderableType:
    """The picture for a terminal of that size: at most `rows - 1` lines where 16 are given.

    The story takes what the rest leaves; where that is less than two lines, the probes make room.
    """
    measure = Console(width=columns, height=rows, force_terminal=False)
    for num_probes in (8, 4, 2, 1, 0):
        parts = sections(state, columns, rows, num_probes)
        left = rows - 1 - sum(height(measure, part) for part in parts)
        if left >= 3:
            break
    return Group(*parts, story(state.story, left - 1)) if left >= 2 else Group(*parts)


def sections(state: ViewState, columns: int, rows: int, num_probes: int) -> list[RenderableType]:
    """All but the story, beside one another where the terminal is wide."""
    is_short = rows < 30
    listed = [probes(state.probes, num_probes)] if state.probes and num_probes > 0 else []
    if columns < WIDE_COLUMNS:
        return [header(state), traffic(state, columns), champion(state, is_short), doing(state), *listed]
    halves = Table.grid(expand=True, padding=(0, 2, 0, 0))
    halves.add_column(ratio=1)
    halves.add_column(ratio=1)
    left = Group(traffic(state, columns // 2 - 2), doing(state))
    halves.add_row(left, Group(champion(state, is_short), *listed))
    return [header(state), halves]


def height(console: Console, part: RenderableType) -> int:
    return len(console.render_lines(part, console.options))


def plain_line(state: ViewState) -> str:
    """One line for a log."""
    latencies = " ".join(f"{name} p95 {told_seconds(latency.p95_s)}" for name, latency in state.latencies)
    return (
        f"{told_time(state.now)} {told_number(state.requests_per_s, 1)} requests/s, {latencies}, "
        f"{told_number(state.num_running)} running, {told_number(state.num_waiting)} waiting. {state.doing}"
    )


def where_line(state: ViewState) -> str:
    """What serves and where, for a log."""
    dashboard = "" if state.dashboard_url is None else f" Dashboard: {state.dashboard_url}."
    return f"{told_time(state.now)} {state.model} is served at {state.api_url} ({state.device}).{dashboard}"


def show(
    read: Callable[[], ViewState],
    stop: threading.Event,
    *,
    plain: bool = False,
    console: Console | None = None,
) -> None:
    """Shows what `read` returns until `stop` is set; then leaves one plain line and the gains on the screen."""
    console = console or Console()
    if console.is_terminal and not plain:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            drawn: tuple[ViewState, ConsoleDimensions] | None = None
            while not stop.is_set():
                state, size = read(), console.size
                if drawn != (state, size):  # drawing takes some 10 ms of a core that the engine may want
                    live.update(render(state, size.width, size.height), refresh=True)
                    drawn = state, size
                stop.wait(REFRESH_S)
    else:
        show_plain(read, stop, console)
    last = read()
    print_plain(console, plain_line(last))
    for gain in last.gains:
        before, after = told_seconds(gain.before_s), told_seconds(gain.after_s)
        print_plain(console, f"{gain.name} p95 since the start: {before} → {after} ({told_gain(gain)})")


def show_plain(read: Callable[[], ViewState], stop: threading.Event, console: Console) -> None:
    """Where it is served, each line of the story as it is written, and a plain line every 10 s."""
    told_until_at, next_line = 0.0, time.monotonic()
    told_where: tuple[str | None, ...] = ()
    while not stop.is_set():
        state = read()
        where = (state.api_url, state.dashboard_url)
        if where != told_where:  # also where a runtime or a dashboard began anew elsewhere
            print_plain(console, where_line(state))
            told_where = where
        for line in state.story:
            if line.at > told_until_at:
                print_plain(console, f"{told_time(line.at)} {line.text}")
                told_until_at = line.at
        if time.monotonic() >= next_line:
            print_plain(console, plain_line(state))
            next_line += PLAIN_EVERY_S
        stop.wait(1.0)


def print_plain(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
