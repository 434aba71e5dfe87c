import math

from store.tables import Trial
from tuner.study import candidates


def trial(number, value, config_id, constraints=None):
    one = Trial(1, number, config_id, "COMPLETE", 0.0, value=value, constraints=constraints or {})
    one.trial_id = number
    return one


def order(trials, predicted=None, surprise=None, tie_log=0.1):
    predicted = predicted or {}
    surprise = surprise or {one.config_id: 1 for one in trials}
    return [one.config_id for one in candidates(trials, 0.03, predicted, surprise, tie_log)]


def test_largest_probed_gain_comes_first():
    assert order([trial(1, -0.2, "a"), trial(2, -0.9, "b"), trial(3, -0.5, "c")]) == ["b", "c", "a"]


def test_gain_below_the_minimum_effect_and_harm_are_no_candidates():
    trials = [
        trial(1, math.log(0.98), "small"),
        trial(2, -0.5, "harmful", {"harm": 1.0}),
        trial(3, 0.4, "worse"),
    ]
    assert order(trials) == []


def test_lucky_probe_is_tempered_by_the_replay():
    trials = [trial(1, -1.2, "lucky"), trial(2, -0.9, "solid")]
    assert order(trials, {1: -0.2, 2: -0.9}) == ["solid", "lucky"]


def test_tie_goes_to_the_configuration_nearest_to_the_default():
    trials = [trial(1, -0.95, "odd"), trial(2, -0.90, "default"), trial(3, -0.50, "far behind")]
    surprise = {"odd": 3, "default": 0, "far behind": 0}
    assert order(trials, surprise=surprise) == ["default", "odd", "far behind"]


def test_noisy_traffic_widens_the_tie():
    trials = [trial(1, -1.35, "odd"), trial(2, -1.05, "default")]
    surprise = {"odd": 1, "default": 0}
    assert order(trials, surprise=surprise) == ["odd", "default"]
    assert order(trials, surprise=surprise, tie_log=0.31) == ["default", "odd"]
