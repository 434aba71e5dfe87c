"""A fake engine that makes a token for every request at fixed instants, and notes them: for stream_cost.

FAKE_STEP_S is the time between two of them. The first is there once TICK_REQUESTS requests are, and TICK_FILE gets
the instants, by the monotonic clock, when all have ended.
"""

import json
import os
import time
from pathlib import Path

from tests import fakes


class TickingEngine(fakes.FakeEngine):
    _instants: list[float]
    _num_wanted = int(os.environ.get("TICK_REQUESTS", "1"))

    def _step(self) -> None:
        if len(self.requests) == self._num_wanted and all(
            one.num_made == 0 for one in self.requests.values()
        ):
            self._instants = []
            self._next_at = time.monotonic() + 0.1
        elif not self.requests or len(self.requests) < self._num_wanted:
            return
        time.sleep(max(0.0, self._next_at - time.monotonic()))
        self._next_at += self.step_s
        started_at, now = self.clock.now() - self.step_s, self.clock.now()
        self._instants.append(time.monotonic())
        for request in self.requests.values():
            request.admitted_at = request.admitted_at or started_at
        num = len(self.requests)
        items = [self._advance(request) for request in list(self.requests.values())]
        self._send(op="tokens", at=now, config_id=self.config.config_id, slice_id=self.slice_id, items=items,
                   stream_interval=self.config.stream_interval)  # fmt: skip
        self._send(op="step", record=self._record(now, self.step_s, num))
        if not self.requests:
            Path(os.environ["TICK_FILE"]).write_text(json.dumps(self._instants))

    def _used_tokens(self) -> int:
        return 0


fakes.FakeEngine = TickingEngine  # type: ignore[misc]

if __name__ == "__main__":
    fakes.main()
