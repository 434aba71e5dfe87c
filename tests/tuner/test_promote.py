import pytest

from runtime.knobs import EngineConfig
from store import decisions
from store.database import Store
from store.tables import Config
from tuner.promote import describe, rollback_target
from tuner.rows import ensure_config


@pytest.mark.parametrize(
    ("history", "to", "target"),
    [
        ([], "previous", None),
        (["a"], "previous", None),
        (["a", "b"], "previous", "a"),
        (["a", "b", "c"], "previous", "b"),
        (["a", "b", "c", "b"], "previous", "a"),  # c was rolled back: once more walks further back
        (["a", "b", "a"], "previous", None),
        (["a", "b", "b"], "previous", "a"),  # put back in force after a restart
        (["a", "b", "c"], "initial", "a"),
        (["a", "b", "a"], "initial", None),
    ],
)
def test_rollback_walks_back_and_never_to_and_fro(history, to, target):
    assert rollback_target(history, to) == target


def test_difference_names_the_knobs_that_moved():
    assert describe({"a": 2, "b": 1}, {"a": 1, "b": 1}) == "a 1 -> 2"
    assert describe({"a": 1}, {"a": 1}) == "no difference"


def test_a_row_of_an_earlier_version_had_the_later_knobs_at_their_defaults():
    now, then = EngineConfig.of({"max_num_seqs": 4}).values(), {"max_num_seqs": 2}
    assert describe(now, then) == "max_num_seqs 2 -> 4"
    assert describe(then, {**now, "kv_watermark": 0.1}) == "max_num_seqs 4 -> 2, kv_watermark 0.1 -> 0.0"


def test_a_row_of_an_earlier_version_is_found_again_and_then_names_the_later_knobs(tmp_path):
    config = EngineConfig.of({"max_num_seqs": 2})
    stored = {name: value for name, value in config.values().items() if name != "kv_watermark"}
    with Store.open(tmp_path) as store:
        with store.journal() as session:
            session.add(Config(config.config_id, 1.0, 2, stored))
        with store.journal() as session:
            assert EngineConfig.of(decisions.config_values(session, config.config_id)) == config
            ensure_config(session, config, 2.0)
        with store.journal() as session:
            row = session.get(Config, config.config_id)
            assert (row.values, row.created_at) == (config.values(), 1.0)
