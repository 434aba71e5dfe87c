"""What the tuner costs beside the model it serves: CPU of one core by stage and by process, memory, length of a tick.

    python -m tests.benchmarks.daemon_cost --minutes 5
    python -m tests.benchmarks.daemon_cost --minutes 5 --idle      # nothing is searched: sampling and noticing alone

`tuner run` as shipped (learning, probes, tests; the dashboard is off) with the demo model under moderate traffic. CPU
seconds are what the kernel charged to each process, so that a busy machine makes nothing look dearer; the length of a
tick does grow with what else runs. The bar is 5 % of one core, on average, for sampling, ticking and forecasting
together. The terminal's view, which is the daemon's main thread and reads the store anew every two seconds, is
printed apart.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.end_to_end.deployment import Deployment, free_port, read_json

SETTINGS = """
model: {path: demo}
mode: auto
data_dir: DATA_DIR
server: {port: PORT, drain_s: 5}
knobs: {start: {max_num_seqs: 2, batch_wait_ms: 20, max_batched_tokens: 64}}
learn: {champion_s: 30}
search: {enabled: SEARCH, rest_s: 0}
dashboard: {enabled: false}
traffic: {kind: poisson, rate_per_s: 2.0}
"""
VIEW = "terminal view"
WARM_UP_S = 60.0  # imports, first rows: their memory is no slope
BAR_RATIO = 0.05
CHILDREN = {
    "tuner.notice.forecast": "forecasts",
    "tuner.propose": "search",
    "tuner.load.traffic": "(traffic)",
}


@dataclass
class Meter:
    """CPU seconds by process, kept also of those that have ended."""

    cpu_s: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    rss: list[tuple[float, int]] = field(default_factory=list)  # monotonic s, bytes

    def look(self, daemon_pid: int) -> None:
        daemon = psutil.Process(daemon_pid)
        self._charge("daemon", daemon)
        (view,) = (one for one in daemon.threads() if one.id == daemon_pid)
        self.cpu_s[VIEW][daemon_pid] = view.user_time + view.system_time
        self.rss.append((time.monotonic(), daemon.memory_info().rss))
        for child in daemon.children():
            with suppress(psutil.Error):
                words = child.cmdline()
                name = next((told for module, told in CHILDREN.items() if module in words), None)
                if name is not None:
                    self._charge(name, child)
                    for one in child.children(recursive=True):  # Stan runs as a child of its own
                        self._charge(name, one)

    def total_s(self, name: str) -> float:
        return sum(self.cpu_s[name].values())

    def rss_slope_bytes_per_h(self) -> float | None:
        """Least squares over what came after the warm-up."""
        began_s = self.rss[0][0] + WARM_UP_S if self.rss else 0.0
        points = [point for point in self.rss if point[0] >= began_s]
        if len(points) < 30:
            return None
        slope, _ = statistics.linear_regression([at for at, _ in points], [value for _, value in points])
        return slope * 3600.0

    def _charge(self, name: str, process: psutil.Process) -> None:
        used = process.cpu_times()
        self.cpu_s[name][process.pid] = used.user + used.system


def measure(folder: Path, minutes: float, is_idle: bool) -> list[str]:
    """Runs the daemon for that long and returns the report's lines."""
    text = SETTINGS.replace("SEARCH", "false" if is_idle else "true").replace("PORT", str(free_port()))
    (folder / "settings.yaml").write_text(text.replace("DATA_DIR", str(folder / "data")))
    site, meter = Deployment(folder), Meter()
    try:
        site.start()
        site.wait_up()
        pid = site.daemon_pid()
        assert pid is not None
        meter.look(pid)
        before = {name: meter.total_s(name) for name in ("daemon", VIEW)}
        began_s, first = time.monotonic(), costs_of(site)
        while time.monotonic() < began_s + 60.0 * minutes:
            time.sleep(0.5)
            meter.look(pid)
        seconds, last = time.monotonic() - began_s, costs_of(site)
    finally:
        site.clear()
    return report(meter, before, seconds, first, last)


def costs_of(site: Deployment) -> dict[str, Any]:
    told = read_json(site.data_dir / "daemon.json")
    assert told is not None
    key = (site.data_dir / "viewer.key").read_text().strip()
    head = {"authorization": f"Bearer {key}"}
    answer = httpx.get(f"{told['url']}/status", headers=head, timeout=30.0, trust_env=False)
    return dict(answer.json()["costs"])


def report(meter: Meter, before: Mapping[str, float], seconds: float, first: Any, last: Any) -> list[str]:
    lines = [f"{seconds:.0f} s measured. Share of one core:"]
    daemon, view = ((meter.total_s(name) - before[name]) / seconds for name in ("daemon", VIEW))
    stages = {}
    for name, cost in last["stages"].items():
        began = first["stages"].get(name, {"cpu_s": 0.0, "num_calls": 0})
        stages[name] = (
            (cost["cpu_s"] - began["cpu_s"]) / seconds,
            cost["num_calls"] - began["num_calls"],
            cost,
        )
    ticking = stages.pop("tick", (0.0, 0, {}))[0]
    for name, (share, num, cost) in sorted(stages.items(), key=lambda item: -item[1][0]):
        longest = 1e3 * cost["max_wall_s"]
        lines.append(f"  {name:<12} {share:7.2%}   {num:5d} calls, longest {longest:7.1f} ms")
    lines.append(f"  all stages of the tick    {ticking:7.2%}")
    lines.append(f"  daemon, with its threads  {daemon:7.2%}")
    lines.append(f"  of that the {VIEW} {view:7.2%}")
    children = {name: meter.total_s(name) / seconds for name in CHILDREN.values()}
    lines += [f"  {name:<25} {share:7.2%}" for name, share in children.items()]
    total = daemon - view + children["forecasts"]
    verdict = "within" if total <= BAR_RATIO else "OVER"
    lines.append(f"  sampling, ticking and forecasting {total:7.2%}   {verdict} the bar of {BAR_RATIO:.0%}")
    lines.append(f"Tick: p50 {ms(last['tick_p50_s'])}, p99 {ms(last['tick_p99_s'])}")
    slope = meter.rss_slope_bytes_per_h()
    grows = (
        "not enough of it for a slope"
        if slope is None
        else f"{slope / 2**20:+.1f} MB/h after {WARM_UP_S:g} s"
    )
    lines.append(
        f"Memory: {meter.rss[0][1] / 2**20:.0f} MB at first, {meter.rss[-1][1] / 2**20:.0f} MB at last, {grows}"
    )
    load_1m = psutil.getloadavg()[0]
    lines.append(f"Machine: {psutil.cpu_count()} cores, load average {load_1m:.1f} at the end")
    return lines


def ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser("python -m tests.benchmarks.daemon_cost")
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--idle", action="store_true", help="search nothing")
    options.add_argument("--folder", type=Path, help="kept there instead of in a temporary folder")
    asked = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tuner-cost-") as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print("\n".join(measure(folder.resolve(), asked.minutes, asked.idle)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
