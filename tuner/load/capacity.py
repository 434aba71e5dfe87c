"""How much the server can do: a closed loop in which there is always more to do."""

import asyncio
from typing import NamedTuple

from tuner.errors import Unavailable
from tuner.load.arrivals import at_rate
from tuner.load.report import CUT, Outcome
from tuner.load.send import Load, Sender, ServedModel
from tuner.load.stream_client import Target
from tuner.settings import TrafficSettings

# After a failure a worker rests: a server that refuses at once is not asked in a tight loop.
REST_S = 0.2


class Capacity(NamedTuple):
    """What the server does when there is always more to do. Tokens count prompts and answers."""

    requests_per_s: float
    tokens_per_s: float
    output_tokens_per_s: float
    concurrency: int
    window_s: float
    num_errors: int


def measure_capacity(
    url: str,
    settings: TrafficSettings,
    model: ServedModel,
    *,
    concurrency: int = 32,
    warm_up_s: float = 5.0,
    measure_s: float = 20.0,
    api_key: str | None = None,
) -> Capacity:
    """What the server does with `concurrency` requests of the mix always open.

    That should be at least twice what its batch holds, so that requests always wait.

    Raises:
        Unavailable: no request succeeded.
    """
    load = Load(Target.of(url, api_key), at_rate(settings, 1.0), model)
    outcomes, window_s = asyncio.run(saturate(load, concurrency, warm_up_s, measure_s))
    return capacity_of(outcomes, concurrency, window_s)


class Window(NamedTuple):
    from_at: float
    until_at: float


async def saturate(
    load: Load, concurrency: int, warm_up_s: float, measure_s: float
) -> tuple[list[Outcome], Window]:
    """Keeps `concurrency` requests open for both spans, then cuts them off."""
    outcomes: list[Outcome] = []
    sender = Sender(load, outcomes.append)
    numbered = enumerate(load.arrivals())

    async def worker() -> None:
        for index, arrival in numbered:
            num_before = len(outcomes)
            await sender.send(index, arrival, sender.clock(), load.body(index, arrival))
            if any(not outcome.ok for outcome in outcomes[num_before:]):
                await asyncio.sleep(REST_S)

    window = Window(sender.clock() + warm_up_s, sender.clock() + warm_up_s + measure_s)
    workers = {asyncio.create_task(worker()) for _ in range(concurrency)}
    await asyncio.sleep(warm_up_s + measure_s)
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    sender.client.close()
    return outcomes, window


def capacity_of(outcomes: list[Outcome], concurrency: int, window: Window) -> Capacity:
    """Counts what finished inside the window: what was begun before it stands for what is cut at its end."""
    window_s = window.until_at - window.from_at
    done = [
        o
        for o in outcomes
        if o.ok and o.finished_at is not None and window.from_at <= o.finished_at < window.until_at
    ]
    failed = [outcome for outcome in outcomes if not outcome.ok and outcome.error_kind != CUT]
    if not done:
        told = (
            f"{len(failed)} failed, the last with {failed[-1].error_kind}: {failed[-1].detail}"
            if failed
            else "none finished"
        )
        raise Unavailable(
            f"At least one request must succeed to measure the capacity, but {told}. Measure for longer."
        )
    output_tokens = sum(outcome.output_tokens for outcome in done)
    return Capacity(
        requests_per_s=len(done) / window_s,
        tokens_per_s=(output_tokens + sum(outcome.prompt_tokens for outcome in done)) / window_s,
        output_tokens_per_s=output_tokens / window_s,
        concurrency=concurrency,
        window_s=window_s,
        num_errors=len(failed),
    )
