from tuner.daemon import MAX_BACK_OFF_S, BackOff


def failures_within(seconds, fails):
    """How often a stage that is called once a second and fails by `fails(call)` is let fail."""
    back_off, calls, failures = BackOff(), 0, 0
    for now in range(seconds):
        if now < back_off.until_at:
            continue
        calls += 1
        if fails(calls):
            failures += 1
            back_off.failed(float(now))
        else:
            back_off.succeeded(float(now))
    return failures


def test_stage_that_always_fails_waits_up_to_a_minute():
    assert failures_within(600, lambda call: True) < 6 + 600 / MAX_BACK_OFF_S + 1


def test_stage_that_fails_every_other_time_backs_off_as_well():
    assert failures_within(600, lambda call: call % 2 == 1) < 20


def test_stage_that_went_well_for_long_starts_from_a_second_again():
    back_off = BackOff()
    for _ in range(5):
        back_off.failed(0.0)
    back_off.succeeded(20.0)
    assert back_off.delay_s == 16.0
    back_off.succeeded(40.0)
    back_off.failed(50.0)
    assert back_off.delay_s == 1.0
