"""Layer A: at its threshold, one sample before and one after; quiet where it must be."""

import numpy as np
import pytest

from store import metrics
from tuner.bench.anomalies import RULE_FAULTS, Second, quiet_second
from tuner.notice.hysteresis import Band, Hold
from tuner.notice.rule_book import RuleBook
from tuner.notice.rules import RULES, limits_for, rules_for
from tuner.notice.signals import Limit, Signals, StepBucket
from tuner.settings import Settings

HOLD = Band(trigger=50.0, clear=25.0, hold_s=30.0, clear_s=10.0, min_samples=20)


def feed(hold, band, values, start=0):
    return [hold.advance(band, value, float(start + index)) for index, value in enumerate(values)]


@pytest.mark.parametrize(("num", "opens"), [(30, False), (31, True), (32, True)])
def test_opens_at_the_sample_that_completes_its_time(num, opens):
    """31 samples a second apart span 30 s; the next one after that changes nothing."""
    assert ("opened" in feed(Hold(), HOLD, [51.0] * num)) is opens


@pytest.mark.parametrize(("value", "opens"), [(49.0, False), (50.0, False), (51.0, True)])
def test_at_the_threshold_is_not_beyond(value, opens):
    assert ("opened" in feed(Hold(), HOLD, [value] * 60)) is opens


@pytest.mark.parametrize(("value", "closes"), [(24.0, True), (25.0, True), (26.0, False)])
def test_closes_at_another_threshold_than_it_opens(value, closes):
    hold = Hold()
    feed(hold, HOLD, [60.0] * 40)
    assert ("closed" in feed(hold, HOLD, [value] * 30, start=40)) is closes


def test_one_sample_below_starts_the_time_again():
    assert "opened" not in feed(Hold(), HOLD, ([51.0] * 29 + [49.0]) * 4)


def test_too_few_samples_are_no_evidence_however_long_they_span():
    sparse = Hold()
    events = [sparse.advance(HOLD, 60.0, 5.0 * index) for index in range(19)]
    assert "opened" not in events  # 90 s, but 19 samples where 20 are asked for
    assert sparse.advance(HOLD, 60.0, 95.0) == "opened"


def test_a_rule_that_watches_for_too_little_fires_below():
    low = Band(trigger=0.3, clear=0.33, hold_s=2.0, clear_s=0.0, rises=False)
    assert feed(Hold(), low, [0.29] * 3)[-1] == "opened"
    assert "opened" not in feed(Hold(), low, [0.30] * 9)


class World:
    """Signals and rules, a second at a time."""

    def __init__(self, rules=RULES, limits=()):
        self.rng = np.random.default_rng(5)
        self.signals, self.book = Signals(limits_for(list(limits), 0.1)), RuleBook(rules)
        self.now = 1000.0

    def run(self, seconds, bend=lambda second, since_s: None):
        """rule -> seconds after which it opened, and the words it had."""
        opened = {}
        for since_s in range(seconds):
            second = quiet_second(self.now, self.rng)
            bend(second, since_s)
            self.signals.feed(self.now, second.readings, second.records, second.state)
            for found in self.book.step(self.signals, self.now):
                if found.event == "opened":
                    opened.setdefault(found.rule.name, (since_s + 1, found.rule.reason(found.reading)))
            self.now += 1.0
        return opened


def test_healthy_machine_breaks_no_rule_for_an_hour():
    assert World().run(3600) == {}


QUICK = {
    "missing_data": 3, "engine_down": 1, "clock_step": 1, "host_suspended": 1, "ecc_errors": 1,
    "thermal_throttle": 11, "queue": 31, "cpu_steal": 40, "slo": 60, "slow_steps": 40,
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_fault_is_named_in_time_and_in_words(name):
    world = World()
    world.run(300)
    opened = world.run(120, lambda second, since_s: RULE_FAULTS[name](second, since_s, world.rng))
    assert opened[name][0] <= QUICK[name]
    assert "{" not in opened[name][1] and opened[name][1].endswith(".")


def test_every_rule_has_a_benchmark_and_an_order_of_thresholds():
    assert set(RULE_FAULTS) == {rule.name for rule in RULES}
    for rule in RULES:
        assert rule.band.is_beyond(rule.band.trigger, rule.band.clear) or rule.band.trigger == rule.band.clear


def test_idle_gpu_is_no_news_without_work():
    def no_work(second: Second, since_s):
        second.readings[metrics.GPU_UTIL_RATIO, "0"] = 0.0
        second.readings[metrics.REQUESTS_RUNNING, ""] = second.readings[metrics.REQUESTS_WAITING, ""] = 0.0

    assert "gpu_idle" not in World().run(600, no_work)


def test_busy_gpu_is_no_news_while_nobody_waits():
    def busy(second: Second, since_s):
        second.readings[metrics.GPU_UTIL_RATIO, "0"] = 1.0
        second.readings[metrics.REQUESTS_WAITING, ""] = 0.0

    assert World().run(900, busy) == {}


def test_what_a_challenger_does_is_not_held_against_the_champion():
    def challenger(second: Second, since_s):
        second.state["config_id"] = "challenger"
        second.readings[metrics.REQUESTS_WAITING, ""] = 500.0
        for record in second.records:
            record.update(config_id="challenger", step_s=1.0)

    assert World().run(200, challenger) == {}


def test_missing_data_needs_three_intervals_in_a_row():
    def stutter(second: Second, since_s):
        if since_s % 3 != 2:
            RULE_FAULTS["missing_data"](second, since_s, None)

    assert "missing_data" not in World().run(60, stutter)


def test_restart_of_the_engine_between_two_samples_is_noticed():
    def restarted(second: Second, since_s):
        second.state["num_engine_restarts"] = 1 if since_s >= 3 else 0

    assert World().run(10, restarted)["engine_down"][0] == 4


def test_slo_counts_the_share_beyond_its_limit():
    world = World(limits=[Limit("e2e_s", "p95", 1.0)])

    def requests(share):
        def bend(second: Second, since_s):
            for index in range(10):
                slow = (since_s * 10 + index) % 100 < share
                second.records.append({
                    "kind": "request", "config_id": "c", "arrived_at": 0.0, "finished_at": 2.0 if slow else 0.5,
                    "first_token_at": 0.1, "output_tokens": 5, "finish_reason": "stop", "error_kind": None,
                })  # fmt: skip

        return bend

    assert "slo" not in world.run(200, requests(4))
    opened = world.run(200, requests(8))
    assert "p95 of e2e_s over the last 60 s is 2 s, limit 1 s" in opened["slo"][1]


def test_busy_morning_is_carried_on_and_a_jump_is_not():
    world = World()

    def rising(second: Second, since_s):
        rate = 200.0 * (1 + 0.13 * (world.now - 1000.0) / 3600)  # 13 % an hour: the steepest of a day of 50 %
        second.readings[metrics.REQUESTS_PER_S, ""] = float(world.rng.poisson(rate))

    assert "request_rate" not in world.run(5400, rising)

    def jump(second: Second, since_s):
        second.readings[metrics.REQUESTS_PER_S, ""] = float(world.rng.poisson(280.0))

    assert world.run(400, jump)["request_rate"][0] <= 250


def test_slow_steps_are_judged_within_their_size_and_do_not_teach():
    bucket = StepBucket()
    for _ in range(400):
        bucket.ratio(0.02, 2.0)
    for _ in range(50):
        assert bucket.ratio(0.05, 2.0) == pytest.approx(2.5, rel=0.06)
    for _ in range(400):
        bucket.ratio(0.05, 2.0)
    assert bucket.ratio(0.05, 2.0) < 1.1  # a hundred in a row are the new normal


def test_settings_name_rules_that_exist():
    settings = Settings(notice={"disabled": ["queue"], "triggers": {"gpu_idle": 0.2}})
    rules = {rule.name: rule for rule in rules_for(settings.notice.disabled, settings.notice.triggers)}
    assert "queue" not in rules
    assert rules["gpu_idle"].band.trigger == 0.2 and rules["gpu_idle"].band.clear == pytest.approx(0.22)
    with pytest.raises(ValueError, match="The rules are: missing_data"):
        Settings(notice={"disabled": ["cue"]})
