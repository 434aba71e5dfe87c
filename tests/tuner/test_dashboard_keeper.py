from tuner.dashboard_keeper import DashboardKeeper
from tuner.errors import PortInUse, Unavailable


class Paper:
    """A dashboard without a process."""

    def __init__(self, pid, port):
        self.pid, self.url, self.is_running, self.is_stopped = pid, f"http://127.0.0.1:{port}", True, False

    def stop(self, data_dir):
        self.is_stopped = True


class World:
    def __init__(self, tmp_path, refusal=None):
        self.now_s, self.started, self.refusal = 0.0, [], refusal
        self.keeper = DashboardKeeper(tmp_path, 8501, clock=lambda: self.now_s, start=self.start)

    def start(self, data_dir, port):
        if self.refusal is not None and port != 0:
            raise self.refusal
        self.started.append(Paper(100 + len(self.started), port or 40_000))
        return self.started[-1]

    def die(self):
        """Returns what was said of it, and after how many seconds the next one ran."""
        self.started[-1].is_running = False
        said, since_s, num = self.keeper.check(), self.now_s, len(self.started)
        while len(self.started) == num and self.now_s < since_s + 100:
            self.now_s += 0.5
            self.keeper.check()
        return said, self.now_s - since_s


def test_dead_dashboard_starts_again_on_its_port_after_a_growing_wait(tmp_path):
    world = World(tmp_path)
    world.keeper.start()
    waits = [world.die()[1] for _ in range(4)]
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert {one.url for one in world.started} == {"http://127.0.0.1:8501"} == {world.keeper.url}


def test_dashboard_that_dies_too_often_is_left_alone_and_said_so_once(tmp_path):
    world = World(tmp_path)
    world.keeper.start()
    for _ in range(5):
        world.die()
    said, _ = world.die()
    assert "6 times" in said and "not started any more" in said
    assert len(world.started) == 6 and world.keeper.url is None and world.keeper.check() is None


def test_person_who_insists_is_told_of_a_dashboard_that_runs(tmp_path):
    world = World(tmp_path)
    assert world.keeper.left_running() == ""
    world.keeper.start()
    assert world.keeper.left_running() == "The dashboard (pid 100) goes on at http://127.0.0.1:8501."
    world.started[-1].is_running = False
    assert world.keeper.left_running() == ""


def test_taken_port_is_answered_with_another_one(tmp_path):
    world = World(tmp_path, PortInUse("taken"))
    world.keeper.start()
    assert world.keeper.url == "http://127.0.0.1:40000"


def test_what_keeps_a_dashboard_from_starting_keeps_nothing_else(tmp_path, caplog):
    world = World(tmp_path, Unavailable("The package `dashboard` is not installed."))
    world.keeper.start()
    assert world.keeper.url is None and world.keeper.check() is None
    assert "not installed" in caplog.text
    world.keeper.stop()
