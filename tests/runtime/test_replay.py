"""A replay equals what a person works out by hand, whole or in pieces."""

import math
from dataclasses import replace

import numpy as np
import pytest

from runtime.errors import InvalidRequest
from runtime.knobs import EngineConfig
from runtime.replay import Arrival, Decoding, Replay
from runtime.step_model import StepModel

# One second a step, and a tenth for each row.
SECOND = StepModel(
    a=0.0,
    b=0.0,
    c=0.0,
    d=1.0,
    e=0.1,
    weight_bytes=1,
    flop_per_token=1,
    attention_flop_per_pair=0,
    kv_bytes_per_token=1,
)
PER_TOKEN = replace(SECOND, a=0.01, d=0.0, e=0.0)


def replay(model: StepModel = SECOND, **knobs: object) -> Replay:
    return Replay(EngineConfig.of(knobs), model, kv_blocks=256, block_tokens=16, max_model_len=2048)


def test_two_requests_worked_out_by_hand():
    engine = replay(max_num_seqs=4)
    engine.advance([Arrival("a", 10.0, 20, 3), Arrival("b", 10.5, 20, 1)], until=math.inf)
    # a's prompt 10 to 11.1; then a's second token beside b's prompt to 12.3; then a's third to 13.4.
    done = {request.id: request for request in engine.finished}
    assert done["a"].first_token_at == pytest.approx(11.1)
    assert done["b"].first_token_at == done["b"].finished_at == pytest.approx(12.3)
    assert done["a"].finished_at == pytest.approx(13.4)
    assert engine.busy_s == pytest.approx(3.4) and engine.num_steps == 3 and engine.backlog == 0


def test_one_seat_serves_one_after_the_other():
    engine = replay(max_num_seqs=1)
    engine.advance([Arrival("a", 0.0, 20, 2), Arrival("b", 0.0, 20, 2)], until=math.inf)
    assert [request.finished_at for request in engine.finished] == pytest.approx([2.2, 4.4])


def test_long_prompt_is_computed_in_chunks():
    engine = replay(PER_TOKEN, prefill_chunk=100, max_batched_tokens=100)
    engine.advance([Arrival("a", 0.0, 250, 1)], until=math.inf)
    assert engine.num_steps == 3 and engine.finished[0].first_token_at == pytest.approx(2.5)


def test_batch_wait_holds_the_first_until_others_join():
    engine = replay(batch_wait_ms=200.0)
    engine.advance([Arrival("a", 0.0, 20, 1), Arrival("b", 0.15, 20, 1)], until=math.inf)
    assert [request.first_token_at for request in engine.finished] == pytest.approx([1.4, 1.4])


def test_idle_time_is_not_busy_time():
    engine = replay()
    engine.advance([Arrival("a", 5.0, 20, 1), Arrival("b", 100.0, 20, 1)], until=math.inf)
    assert engine.busy_s == pytest.approx(2.2) and engine.finished[1].finished_at == pytest.approx(101.1)


def test_advancing_in_pieces_equals_advancing_at_once():
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(0.5, 200))
    arrivals = [
        Arrival(str(i), float(at), int(rng.integers(1, 900)), int(rng.integers(1, 60)))
        for i, at in enumerate(times)
    ]
    model = StepModel(1e-3, 0.0, 1e-6, 0.01, 1e-3, 1, 1, 0, 1)
    whole, pieces = replay(model), replay(model)
    whole.advance(arrivals, until=math.inf)
    until = 0.0
    while until < times[-1] + 1:
        pieces.advance(
            [arrival for arrival in arrivals if until <= arrival.arrived_at < until + 7], until + 7
        )
        until += 7
    pieces.advance([], math.inf)
    assert pieces.finished == whole.finished and len(whole.finished) == 200


def test_backlog_stays_between_calls():
    engine = replay(max_num_seqs=1)
    engine.advance([Arrival(str(i), 0.0, 20, 5) for i in range(3)], until=1.0)
    assert engine.backlog == 3 and not engine.finished
    engine.advance([], math.inf)
    assert engine.backlog == 0 and len(engine.take_finished()) == 3 and not engine.finished


def test_resumes_in_the_middle_of_answers():
    engine = replay(max_num_seqs=2)
    decoding = [
        Decoding(Arrival("a", 0.0, 100, 10), num_done=8),
        Decoding(Arrival("b", 0.0, 100, 5), num_done=1),
    ]
    engine.resume(50.0, decoding, waiting=[Arrival("c", 1.0, 10, 1)])
    engine.advance([], math.inf)
    # a needs two more steps of 1.2 s; then c has its seat, beside b's third step; b ends after its fourth.
    assert {r.id: round(r.finished_at, 6) for r in engine.finished} == {"a": 52.4, "c": 53.6, "b": 54.7}


def test_request_that_fits_no_engine_is_refused():
    with pytest.raises(InvalidRequest, match="must fit"):
        replay().advance([Arrival("a", 0.0, 5000, 1)], until=math.inf)


def test_a_replay_keeps_to_the_budget_of_steps_in_which_somebody_decodes():
    model = replace(PER_TOKEN, attention_flop_per_pair=0.001)

    def longest_step_s(**knobs):
        engine = replay(model, max_batched_tokens=512, prefill_chunk=512, **knobs)
        engine.advance([Arrival("a", 0.0, 8, 40), Arrival("b", 0.2, 900, 2)], until=0.2)
        longest, before = 0.0, engine.busy_s
        while engine.backlog or engine.now < 0.2:
            engine.advance([], until=engine.now + 1e-9)
            longest, before = max(longest, engine.busy_s - before), engine.busy_s
        return longest, engine.scheduler.attention_cost

    large_s, cost = longest_step_s()
    small_s, _ = longest_step_s(mixed_step_tokens=128)
    assert cost == pytest.approx(0.001)
    assert large_s > 5.0 > 2.0 > small_s
