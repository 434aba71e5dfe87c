"""Looks at the dashboard in a headless Chromium: how fast pages come, what a refresh costs, and pictures of them.

    python -m tests.benchmarks.dashboard --data-dir var/demo [--pictures docs/dashboard] [--watch 60]

Starts a dashboard of its own on the folder, and Chromium (`apt-get install chromium`) beside it; speaks the
DevTools protocol over a WebSocket. Prints one JSON document. A page counts as shown when its last heading stands
and no script of it runs any more. The folder is only read.
"""

import argparse
import base64
import contextlib
import io
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from tuner.dashboard_process import command, environment, free_port

WIDTH, HEIGHT = 1440, 1000
LIMIT_S = 180.0  # for a machine that is busy with other things
PAGES = {  # path -> a text that stands near its end
    "": "What happened last",
    "history": "Changes",
    "experiments": "Levels of all tests",
    "recommendations": "Audit trail",
}
SHOWN = """(() => {
    const app = document.querySelector('[data-testid="stApp"]');
    const busy = !app || app.getAttribute('data-test-script-state') === 'running'
        || document.querySelector('[data-testid="stStatusWidget"]');
    const waits = document.querySelectorAll('[data-testid="stVegaLiteChart"]:not(:has(canvas, svg))').length;
    return !busy && !waits && document.body.innerText.includes(%s);
})()"""


class Page:
    """One tab, driven over the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.console: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=False,
        )

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(timeout=LIMIT_S))
            self._note(told)
            if told.get("id") == self._number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']['message']}")
                return told["result"]

    def _note(self, told: dict[str, Any]) -> None:
        if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
            self.console.append(told["params"]["entry"]["text"])
        if told.get("method") == "Runtime.exceptionThrown":
            self.console.append(told["params"]["exceptionDetails"]["text"])
        if told.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["params"]["request"]["url"])

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, url: str, text: str, limit_s: float = LIMIT_S) -> float:
        """Seconds from the request until the page is shown."""
        began = time.monotonic()
        self.call("Page.navigate", url=url)
        self.wait(text, limit_s)
        return time.monotonic() - began

    def switch(self, path: str, text: str, limit_s: float = LIMIT_S) -> float:
        """Seconds from the click in the navigation until the page is shown."""
        began = time.monotonic()
        self.evaluate(
            "[...document.querySelectorAll('[data-testid=\"stTopNavLink\"]')]"
            f".find(link => new URL(link.href).pathname === '/{path}').click()"
        )
        self.wait(text, limit_s)
        return time.monotonic() - began

    def wait(self, text: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not self.evaluate(SHOWN % json.dumps(text)):
            if time.monotonic() > deadline:
                shown = self.evaluate("document.body.innerText")
                raise TimeoutError(f"{text!r} did not appear within {limit_s:g} s; the page says: {shown!r}")
            time.sleep(0.02)

    def picture(self, path: Path) -> None:
        """The whole page, as high as it is."""
        height = self.evaluate(
            "Math.ceil(Math.max(...[...document.querySelectorAll('[data-testid=\"stMain\"]')]"
            ".map(one => one.scrollHeight)))"
        )
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=max(HEIGHT, int(height or 0)),
            deviceScaleFactor=1,
            mobile=False,
        )
        time.sleep(1.5)
        data = self.call("Page.captureScreenshot", format="png")["data"]
        # 256 colours are plenty for charts and text, and a third of the bytes.
        Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").quantize(
            256, dither=Image.Dither.NONE
        ).save(path, optimize=True)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=False,
        )

    def scheme(self, name: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("No Chromium was found. Install it: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        words = [
            found, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--remote-debugging-port=0",
            f"--user-data-dir={profile}", "--no-first-run", "--hide-scrollbars", "about:blank",
        ]  # fmt: skip
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = devtools_port(Path(profile))
            tabs = httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            with connect(url, max_size=None, ping_interval=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            child.terminate()
            child.wait(10)


def devtools_port(profile: Path) -> int:
    for _ in range(300):
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int((profile / "DevToolsActivePort").read_text().split()[0])
        time.sleep(0.1)
    raise SystemExit("Chromium did not open its DevTools port within 30 s.")


@contextlib.contextmanager
def dashboard(data_dir: Path) -> Iterator[tuple[str, psutil.Process, float]]:
    """Its address, its process, and how long it took until it answered."""
    port, began = free_port(0), time.monotonic()
    child = subprocess.Popen(
        command(port), env=environment(data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_up(url):
            if child.poll() is not None or time.monotonic() - began > LIMIT_S:
                raise SystemExit("The dashboard did not start.")
            time.sleep(0.05)
        yield url, psutil.Process(child.pid), time.monotonic() - began
    finally:
        child.terminate()
        child.wait(10)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/_stcore/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def watched(process: psutil.Process, seconds: float) -> dict[str, float]:
    """The share of a core that the server takes while a page refreshes, and its memory."""
    before, began = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(seconds)
    used = sum(process.cpu_times()[:2]) - before
    return {
        "cpu_share_of_a_core": round(used / (time.monotonic() - began), 4),
        "rss_mib": round(process.memory_info().rss / 2**20, 1),
    }


def take_pictures(page: Page, url: str, folder: Path, query: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        for path, text in PAGES.items():
            page.open(f"{url}/{path}{query if path == 'history' else ''}", text)
            time.sleep(1.0)
            page.picture(folder / f"{path or 'overview'}-{scheme}.png")
    page.scheme("light")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="folder for PNG files of every page, light and dark")
    parser.add_argument("--history", default="?range=1h", help="query of the history page in the pictures")
    parser.add_argument("--watch", type=float, default=60.0, help="seconds for which each page is watched")
    args = parser.parse_args()
    with dashboard(args.data_dir) as (url, process, start_s), chromium() as page:
        report: dict[str, Any] = {"load_average": psutil.getloadavg()[0], "start_s": round(start_s, 2)}
        report["rss_idle_mib"] = round(process.memory_info().rss / 2**20, 1)
        report["cold_first_page_s"] = round(page.open(url, PAGES[""]), 2)
        report["server_cpu_until_first_page_s"] = round(sum(process.cpu_times()[:2]), 2)
        first = {path: round(page.switch(path, text), 2) for path, text in PAGES.items() if path}
        report["first_visit_s"] = first
        switches: dict[str, list[float]] = {}
        for _ in range(3):
            for path, text in PAGES.items():
                switches.setdefault(path or "overview", []).append(round(page.switch(path, text), 2))
        report["warm_switch_s"] = switches
        for path, text in PAGES.items():
            if args.watch > 0:
                page.switch(path, text)
                report[f"watch_{path or 'overview'}"] = watched(process, args.watch)
        if args.pictures is not None:
            take_pictures(page, url, args.pictures, args.history)
        report["console_errors"] = page.console
        report["requests_elsewhere"] = sorted(
            {one for one in page.requests if not one.startswith((url, "data:", "blob:", "about:", "ws:"))}
        )
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
