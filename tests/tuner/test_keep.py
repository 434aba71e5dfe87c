"""Room, ageing, backups and lost journals, as the daemon meets them: the loop in virtual time."""

from pathlib import Path

import pytest

from runtime.knobs import EngineConfig
from store.backups import daily_backups
from store.database import Store
from store.errors import DamagedStore, StoreFull
from store.last_good import LAST_GOOD_FILE
from store.recovery import open_store
from store.tables import Anomaly, Champion, Change, Note, Sample, Slice
from tests.simulated_runtime import SimulatedRuntime
from tests.tuner.test_daemon import FAST, World
from tuner import confirmed, keep
from tuner.confirmed import confirmed_config, last_good_or_none
from tuner.keep import KeepStage
from tuner.run import start_values, tell_recovered
from tuner.settings import KeepSettings, Settings, load_settings

MB = 1_000_000


class Disk:
    def __init__(self) -> None:
        self.free_bytes = 1000 * MB

    def __call__(self, folder: Path) -> int:
        return self.free_bytes


def world_on(disk: Disk, data_dir: Path) -> World:
    settings = Settings(mode="auto", data_dir=data_dir, **FAST)
    world = World(data_dir, SimulatedRuntime(5.0), settings).start()
    world.daemon.keeping.room._measure = disk
    return world


def rows(world: World, noun: type, which: str = "journal") -> list:
    with getattr(world.store, which)() as session:
        return session.query(noun).all()


def test_a_full_disk_freezes_tuning_serves_on_and_all_goes_on_with_room(tmp_path: Path) -> None:
    disk = Disk()
    world = world_on(disk, tmp_path)
    world.run(60)
    num_samples, num_slices = len(rows(world, Sample, "metrics")), len(rows(world, Slice))
    assert num_samples > 0
    disk.free_bytes = 10 * MB
    world.run(60)
    (fault,) = [row for row in rows(world, Anomaly) if row.rule == "store_full"]
    assert (fault.kind, fault.severity, fault.ended_at) == ("fault", "page", None)
    assert "has 10 MB left" in fault.reason and "No metrics are written" in fault.reason
    assert len(rows(world, Sample, "metrics")) <= num_samples + 100, "but those of the tick before the look"
    assert len(rows(world, Slice)) <= num_slices + 2
    assert "Frozen until this is over: The disk" in world.daemon.doing
    assert world.daemon.num_failures == {}
    frozen_samples = len(rows(world, Sample, "metrics"))
    num_requests = world.runtime._num_requests
    world.run(20)
    assert world.runtime._num_requests > num_requests, "the engine serves meanwhile"
    disk.free_bytes = 1000 * MB
    world.run(90)
    (fault,) = [row for row in rows(world, Anomaly) if row.rule == "store_full"]
    assert fault.ended_at is not None
    assert len(rows(world, Sample, "metrics")) > frozen_samples
    assert len(rows(world, Slice)) > num_slices
    told = [row.text for row in rows(world, Note) if row.stage == "keep"]
    assert [text.split(":")[0] for text in told] == ["Page, fault", "There is room again"]
    world.daemon.close()


def stage_on(store: Store, disk: Disk, **kept: object) -> KeepStage:
    stage = KeepStage(store, KeepSettings(**kept))
    stage.room._measure = disk
    return stage


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "store") as opened:
        yield opened


def test_a_fault_that_finds_no_room_itself_is_recorded_once_there_is_some(
    store: Store, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_on(store, disk)
    stage.look(1.0)
    disk.free_bytes = 0

    def refuses(*arguments: object) -> None:
        raise StoreFull("still full")

    monkeypatch.setattr(keep, "tell", refuses)
    stage.look(2.0)
    stage.look(3.0)
    assert len(stage.open_faults()) == 1
    monkeypatch.undo()
    stage.look(4.0)
    with store.journal() as session:
        assert session.query(Anomaly).one().started_at == 2.0


def test_a_failed_write_is_a_fault_though_the_disk_shows_room(store: Store, disk: Disk) -> None:
    stage = stage_on(store, disk)
    stage.look(1.0)
    with pytest.raises(StoreFull), store.metrics():
        raise StoreFull("a quota")
    assert not stage.has_room()
    stage.look(2.0)
    with store.journal() as session:
        assert [row.ended_at for row in session.query(Anomaly)] in ([], [2.0])
    assert stage.has_room(), "the reserve could be taken, so there is room"


def test_decisions_are_copied_at_the_start_and_each_day_after(
    store: Store, disk: Disk, tmp_path: Path
) -> None:
    stage = stage_on(store, disk, num_backups=2)
    now = 1_790_000_000.0
    for hour in range(24 * 4):
        stage.look(now + 3600 * hour)
        stage.step(now + 3600 * hour)
        if stage._backup is not None:
            stage._backup.join()
    made = [path.name for path in daily_backups(tmp_path / "store")]
    assert made == ["journal-20260924T141320Z.db", "journal-20260923T141320Z.db"]
    restarted = stage_on(store, disk, num_backups=2)
    restarted.look(now + 3600 * 96 - 60)
    restarted.step(now + 3600 * 96 - 60)
    assert restarted._backup is None, "the last copy is younger than a day"


def test_a_copy_that_fails_is_told_and_tried_again_within_the_hour(
    store: Store, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_on(store, disk)
    tries = []

    def fails(data_dir: Path, now: float, num_kept: int) -> Path:
        tries.append(now)
        raise DamagedStore("the journal is damaged", "journal.db")

    monkeypatch.setattr(keep, "make_backup", fails)
    stage.look(1e9)
    for minute in range(90):
        stage.step(1e9 + 60 * minute)
        if stage._backup is not None:
            stage._backup.join()
    assert len(tries) == 2
    with store.journal() as session:
        told = [row.text for row in session.query(Note)]
    assert told == ["No backup of the decisions was made: the journal is damaged"] * len(told)
    assert 1 <= len(told) <= 2


def test_a_copy_from_the_future_keeps_no_new_one_away(store: Store, disk: Disk, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "backups"
    folder.mkdir()
    (folder / "journal-20990101T000000Z.db").touch()
    stage = stage_on(store, disk)
    stage.look(1_790_000_000.0)
    stage.step(1_790_000_000.0)
    stage.close()
    assert (folder / "journal-20260921T141320Z.db").exists()


# --- a journal that is lost -------------------------------------------------------------------------


def lived(tmp_path: Path) -> World:
    world = world_on(Disk(), tmp_path)
    world.run(5)
    with world.store.journal() as session:
        assert session.query(Champion).count() == 1
    target = EngineConfig.of({"prefill_chunk": 64})
    world.daemon.promotion.apply("promote", target, "By a test.", world.clock.now())
    world.daemon.close()
    world.store.close()
    return world


def again(world: World) -> World:
    """The next life of the daemon, on a runtime that was started anew from the poor default."""
    opened, recovered = open_store(world.data_dir, world.clock.now())
    tell_recovered(opened, recovered)
    opened.close()
    restarted = World(world.data_dir, SimulatedRuntime(5.0), world.settings)
    restarted.clock.at = world.clock.at
    restarted.runtime.advance(world.clock.at)
    return restarted.start()


def test_a_lost_journal_is_told_and_the_last_confirmed_configuration_serves(tmp_path: Path) -> None:
    world = lived(tmp_path)
    for copy in daily_backups(tmp_path):
        copy.unlink()
    (tmp_path / "journal.db").write_bytes(b"no database " * 1000)
    restarted = again(world)
    assert restarted.runtime.state()["champion"]["prefill_chunk"] == 64
    (change,) = rows(restarted, Change)
    assert (change.kind, change.reason) == ("restore", confirmed.LOST_REASON)
    told = rows(restarted, Note)
    assert "journal.db could not be used" in told[0].text and "started afresh" in told[0].text
    restarted.daemon.close()


def test_a_journal_restored_from_an_old_copy_is_brought_up_to_the_last_confirmed(tmp_path: Path) -> None:
    world = lived(tmp_path)
    (copy,) = daily_backups(tmp_path)
    (tmp_path / "journal.db").write_bytes(b"no database " * 1000)
    restarted = again(world)
    assert restarted.runtime.state()["champion"]["prefill_chunk"] == 64
    assert [change.kind for change in rows(restarted, Change)] == ["start", "restore"]
    assert any(f"restored from {copy.name}" in note.text for note in rows(restarted, Note))
    restarted.daemon.close()


def test_a_whole_journal_is_believed(tmp_path: Path) -> None:
    world = lived(tmp_path)
    restarted = again(world)
    assert restarted.runtime.state()["champion"]["prefill_chunk"] == 64
    assert confirmed_config(restarted.store, restarted.daemon.snapshot_id) is None
    assert all("could not be used" not in note.text for note in rows(restarted, Note))
    restarted.daemon.close()


def test_a_last_good_of_another_model_or_of_other_knobs_is_not_taken(tmp_path: Path) -> None:
    world = lived(tmp_path)
    with Store.open(tmp_path) as store:
        assert confirmed_config(store, "another-snapshot") is None
        path = tmp_path / LAST_GOOD_FILE
        path.write_text(
            path.read_text().replace('"prefill_chunk": 64', '"warp_factor": 9').replace('"at": 1', '"at": 9')
        )
        assert confirmed_config(store, world.daemon.snapshot_id) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"values": 3}', "\x00\xff"])
def test_a_damaged_last_good_is_set_aside_and_keeps_nothing_from_starting(tmp_path: Path, text: str) -> None:
    with Store.open(tmp_path) as store:
        (tmp_path / LAST_GOOD_FILE).write_text(text)
        settings = load_settings(flags={"knobs.start.prefill_chunk": 32}, environ={})
        assert start_values(settings, store)["prefill_chunk"] == 32
        assert not (tmp_path / LAST_GOOD_FILE).exists()
        assert (tmp_path / f"{LAST_GOOD_FILE}.damaged").read_text() == text
        assert last_good_or_none(store) is None
