import time

import pytest

from runtime.clock import Clock


def test_stepped_system_clock_moves_nothing(monkeypatch):
    clock = Clock.started_now()
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: before - 3600.0)
    assert 0.0 <= clock.now() - before < 60.0


def test_anchor_goes_from_process_to_process_without_losing_a_digit():
    first = Clock.started_now()
    second = Clock.of_text(f"{first.boot_epoch!r}:{first.boot_monotonic!r}")
    assert second == first


def test_anchor_from_before_the_host_booted_is_not_taken_over():
    late = Clock.of_text(f"1700000000.0:{time.monotonic() + 1e6}")
    assert abs(late.now() - time.time()) < 60.0


@pytest.mark.parametrize("text", ["", "1", "1:2:3", "a:b", "nan:1", "-1:2", "1:inf"])
def test_anchor_that_is_none_is_refused(text):
    with pytest.raises(ValueError):
        Clock.of_text(text)
