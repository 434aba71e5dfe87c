"""kill -9 of every process at random instants, under load: what was lost, what was doubled, how long until well again.

    python -m tests.end_to_end.kill_matrix --kills 20
    python -m tests.end_to_end.kill_matrix --kills 5 --only daemon,engine --folder var/kills

`tuner run` with the demo model, short slices and short learning, so that a probe, a test or a search is always under
way; a client with its own ledger outside of the store. Each victim's figures are written to FOLDER/<victim>.json when
it is done, and a victim that has its file is not run again (`--again` does). The table at the end is of all files.
Recovery times are those of this machine under this load: read them on one that does nothing else.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import select, text

from store.connection import sqlite_library
from store.database import Store, StoreReader
from store.tables import Experiment, RequestTiming, SampleRollup, Slice
from tests.end_to_end.accounts import Kill, read_ledger, settle
from tests.end_to_end.deployment import Deployment
from tests.end_to_end.victims import VICTIMS, Mark, Victim, engine_outlives, num_told
from tests.servers import ROOT
from tuner.notice.watched import FORECAST_LABELS

RECOVERY_LIMIT_S = 180.0
SLACK_S = 3.0  # a request may have been on its way when all was well again
SETTLE_S = 8.0  # the daemon drains once a second
MORE = "notice: {forecast: {min_history_s: 0, refit_s: 600}}\ndashboard: {enabled: true, port: 0}\n"
OVERDUE_S = 60.0  # a slice that ended this long ago must be scored or void


class Matrix:
    """One deployment, and one victim after the other."""

    def __init__(self, site: Deployment, rate_per_s: float, rng: random.Random) -> None:
        self.site, self.rate_per_s, self.rng = site, rate_per_s, rng
        self._client: subprocess.Popen[bytes] | None = None

    def run(self, victim: Victim, num_kills: int) -> dict[str, Any]:
        """Kills it so often and returns the figures. The deployment is up before and after."""
        kills: list[Kill] = []
        breaches: list[str] = []
        book = self.site.folder / f"{victim.name.replace(' ', '-')}.jsonl"
        book.write_text("")
        self._up()
        told_before, began_at = num_told(self.site, victim) or 0, time.time()
        self._begin(book)
        for number in range(num_kills):
            if number and number % victim.kills_a_life == 0:
                self._end()
                self.site.stop()
                self._up()
                self._begin(book)
            kills.append(self._kill(victim, breaches))
            print(f"{victim.name} {number + 1}/{num_kills}: {told_of(kills[-1])}", flush=True)
        time.sleep(2.0)
        self._end()
        time.sleep(SETTLE_S)
        return self._figures(victim, book, kills, breaches, told_before, began_at)

    # -- one kill ------------------------------------------------------------------------------------------

    def _kill(self, victim: Victim, breaches: list[str]) -> Kill:
        site = self.site
        time.sleep(self.rng.uniform(*victim.pause_s))
        pid = site.wait(lambda: victim.find(site), f"there is a {victim.name} to kill")
        if victim.pause_s[0] == 0.0:  # short-lived: any instant of its life
            time.sleep(self.rng.uniform(0.0, 1.5))
            pid = site.wait(lambda: victim.find(site), f"there is a {victim.name} to kill")
        mark, before, engine = Mark(pid, victim.mark(site)), site.state() or {}, site.engine_pid()
        details = {
            "slice": before.get("slice_id"),
            "was_trial": before.get("config_id") != before.get("champion_config_id"),
        }
        at, killed_at = time.time(), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        if victim.name == "daemon":
            assert site.daemon is not None
            site.daemon.wait()
            details["champion_back_s"] = self._champion_back_s(killed_at)
        victim.after(site)
        if victim.name == "front end" and engine_outlives(site, engine):
            breaches.append(f"engine {engine} outlived its front end {pid} by more than 5 s")
        try:
            site.wait(lambda: victim.is_well(site, mark), "well again", RECOVERY_LIMIT_S)
        except TimeoutError:
            breaches.append(f"{victim.name} {pid}: not well again within {RECOVERY_LIMIT_S:g} s")
            return Kill(at, pid, None, details)
        return Kill(at, pid, time.monotonic() - killed_at, details)

    def _champion_back_s(self, killed_at: float) -> float | None:
        """Nobody renews the lease: the engine goes back to its champion by itself."""
        while time.monotonic() - killed_at < 30.0:
            state = self.site.state()
            if state is not None and state["config_id"] == state["champion_config_id"]:
                return time.monotonic() - killed_at
            time.sleep(0.05)
        return None

    # -- the client ----------------------------------------------------------------------------------------

    def _up(self) -> None:
        if self.site.daemon_pid() is None:
            self.site.start()
        self.site.wait_up()

    def _begin(self, book: Path) -> None:
        words = ["--url", self.site.url, "--out", str(book), "--rate", str(self.rate_per_s)]
        words += ["--seed", str(self.rng.randrange(2**31))]
        # Numbers go on where the ledger of the life before stopped.
        words += [
            "--first",
            str(1 + max((line["n"] for line in read_ledger(book) if "n" in line), default=-1)),
        ]
        self._client = subprocess.Popen([sys.executable, "-m", "tests.end_to_end.ledger", *words], cwd=ROOT)
        time.sleep(3.0)

    def _end(self) -> None:
        assert self._client is not None
        self._client.terminate()
        self._client.wait(240)
        self._client = None

    def close(self) -> None:
        if self._client is not None:
            self._client.kill()
            self._client.wait()
        self.site.clear()

    # -- the reckoning -------------------------------------------------------------------------------------

    def _figures(
        self,
        victim: Victim,
        book: Path,
        kills: list[Kill],
        breaches: list[str],
        told_before: int,
        began_at: float,
    ) -> dict[str, Any]:
        found = settle(
            read_ledger(book), stored_ids(self.site.data_dir, began_at), victim.excuses, kills, SLACK_S
        )
        breaches += store_breaches(self.site.data_dir, kills)
        told = num_told(self.site, victim)
        if told is not None and told - told_before < len(kills):
            breaches.append(f"the store explains {told - told_before} of {len(kills)} kills")
        if found.lost:
            breaches.append(f"{len(found.lost)} requests without an end: {found.lost[:5]}")
        if found.not_allowed:
            breaches.append(
                f"{len(found.not_allowed)} failures without an excuse, as {dict(found.not_allowed[0])}"
            )
        if found.doubled:
            breaches.append(f"{len(found.doubled)} rows doubled")
        if found.missing:
            breaches.append(f"{len(found.missing)} answers are not in the store: {found.missing[:3]}")
        accounts = {
            key: value
            for key, value in asdict(found).items()
            if key not in ("missing", "doubled", "not_allowed")
        }
        return {
            "victim": victim.name, "kills": [asdict(kill) for kill in kills], "breaches": breaches,
            "num_missing": len(found.missing), "num_doubled": len(found.doubled), **accounts,
        }  # fmt: skip


def seed_past(data_dir: Path) -> None:
    """Two hours of minutes of every metric that has a forecast, so that there is something to fit from the start."""
    noise, end_at = random.Random(0), time.time() // 60 * 60
    with closing(Store.open(data_dir)) as store, store.metrics() as session:
        for metric, label in FORECAST_LABELS.items():
            for number in range(120, 0, -1):
                mean = noise.lognormvariate(0.0, 0.1)
                session.add(SampleRollup(metric, label, 60, end_at - 60.0 * number, 60, mean, mean, mean))


def stored_ids(data_dir: Path, since_at: float) -> list[str]:
    with StoreReader(data_dir).metrics() as session:
        finished = select(RequestTiming.request_id).where(
            RequestTiming.arrived_at >= since_at - 1.0, RequestTiming.finish_reason.in_(("stop", "length"))
        )
        return list(session.scalars(finished))


def store_breaches(data_dir: Path, kills: Sequence[Kill]) -> list[str]:
    """Both files are whole, and nothing that a killed process left open is open still."""
    breaches, reader = [], StoreReader(data_dir)
    for name in ("journal", "metrics"):
        with closing(
            sqlite_library().module.connect(f"file:{data_dir / name}.db?mode=ro", uri=True)
        ) as connection:
            found = connection.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            breaches.append(f"{name}.db: {found}")
    with reader.journal() as session:
        assert session.scalar(text("PRAGMA query_only")) is not None
        running = session.scalars(
            select(Experiment).where(Experiment.state.in_(("PLANNED", "RUNNING")))
        ).all()
        if len(running) > 1:
            breaches.append(f"{len(running)} experiments are open at once")
        overdue = select(Slice).where(
            Slice.state == "PLANNED", Slice.planned_end_at < time.time() - OVERDUE_S
        )
        if late := session.scalars(overdue).all():
            breaches.append(
                f"{len(late)} slices ended more than {OVERDUE_S:g} s ago and are neither scored nor void"
            )
        closed = session.scalars(select(Experiment).where(Experiment.state == "STOPPED")).all()
        if silent := [one.experiment_id for one in closed if not one.reason]:
            breaches.append(f"experiments closed without a reason: {silent}")
        void = session.scalars(select(Slice).where(Slice.state == "VOID")).all()
        if silent := [one.slice_id for one in void if not one.void_reason]:
            breaches.append(f"void slices without a reason: {silent[:3]}")
    return breaches


def told_of(kill: Kill) -> str:
    where = f" in {kill.details['slice']}" if kill.details.get("slice") else ""
    well = "never well again" if kill.recovered_s is None else f"well again after {kill.recovered_s:.1f} s"
    back = kill.details.get("champion_back_s")
    return f"pid {kill.pid} killed{where}, {well}" + (
        f", champion back after {back:.1f} s" if back is not None else ""
    )


# --- the table ------------------------------------------------------------------------------------

HEADER = (
    "| victim | kills | requests | answered | failed, allowed | lost | rows missing | rows doubled "
    "| recovery median / max, s | breaches |"
)


def table(figures: Sequence[dict[str, Any]]) -> str:
    load = f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[1]:.1f} over the last five minutes"
    lines = [f"Machine: {load}.", "", HEADER, "|" + " --- |" * 10]
    for one in figures:
        times = sorted(kill["recovered_s"] for kill in one["kills"] if kill["recovered_s"] is not None)
        recovery = f"{median(times):.1f} / {times[-1]:.1f}" if times else "–"
        failed = ", ".join(f"{count} {kind}" for kind, count in sorted(one["failed"].items())) or "0"
        lines.append(
            f"| {one['victim']} | {len(one['kills'])} | {one['num_sent']} | {one['num_ok']} | {failed} "
            f"| {len(one['lost'])} | {one['num_missing']} | {one['num_doubled']} | {recovery} "
            f"| {len(one['breaches'])} |"
        )
    backs = [kill["details"].get("champion_back_s") for one in figures for kill in one["kills"]]
    if known := sorted(back for back in backs if back is not None):
        lines.append(
            f"\nDaemon killed: champion back after {median(known):.1f} s (median), {known[-1]:.1f} s (longest)."
        )
    lines += [
        f"Answers in other words than the first to the same prompt: {sum(one['other_words'] for one in figures)}."
    ]
    lines += [f"BREACH {one['victim']}: {breach}" for one in figures for breach in one["breaches"]]
    return "\n".join(lines)


def main() -> int:
    options = argparse.ArgumentParser("python -m tests.end_to_end.kill_matrix")
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--only", default=",".join(VICTIMS), help=f"of: {', '.join(VICTIMS)}")
    options.add_argument("--folder", type=Path, default=Path("var/kills"))
    options.add_argument(
        "--rate",
        type=float,
        default=1.0,
        help="requests a second; what is too much for the machine reads as silence",
    )
    options.add_argument("--seed", type=int, help="of the instants; drawn and printed if not given")
    options.add_argument("--again", action="store_true", help="also what has its figures already")
    asked = options.parse_args()
    names = [name.strip() for name in asked.only.split(",")]
    if unknown := [name for name in names if name not in VICTIMS]:
        options.error(f"unknown: {', '.join(unknown)}; known: {', '.join(VICTIMS)}")
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(2**31)
    print(f"seed {seed}, folder {asked.folder}", flush=True)
    folder = asked.folder.resolve()
    site = Deployment(folder, MORE)
    if not site.data_dir.exists():
        seed_past(site.data_dir)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so through `finally`
    matrix = Matrix(site, asked.rate, random.Random(seed))
    try:
        for name in names:
            path = folder / f"{name.replace(' ', '-')}.json"
            if asked.again or not path.exists():
                path.write_text(json.dumps(matrix.run(VICTIMS[name], asked.kills), indent=1))
        matrix.site.stop()
    finally:
        matrix.close()
    paths = [folder / f"{name.replace(' ', '-')}.json" for name in VICTIMS]
    figures = [json.loads(path.read_text()) for path in paths if path.exists()]
    print(table(figures))
    return int(any(one["breaches"] for one in figures))


if __name__ == "__main__":
    sys.exit(main())
