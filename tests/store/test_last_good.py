import stat
from pathlib import Path

import pytest

from store.errors import DamagedStore
from store.last_good import LastGood, read_last_good, write_last_good

GOOD = LastGood({"max_num_seqs": 16, "policy": "fcfs"}, "c1", "s1", 3, 1.5)


def test_what_is_written_is_read_back_and_replaces_what_was(tmp_path: Path) -> None:
    assert read_last_good(tmp_path) is None
    write_last_good(tmp_path, LastGood({}, "c0", "s1", 2, 1.0))
    write_last_good(tmp_path, GOOD)
    assert read_last_good(tmp_path) == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["last_good.json"]
    assert stat.S_IMODE((tmp_path / "last_good.json").stat().st_mode) == 0o600


def test_a_write_that_died_half_way_leaves_the_old_content(tmp_path: Path) -> None:
    write_last_good(tmp_path, GOOD)
    (tmp_path / "last_good.tmp").write_text('{"values": {"max')
    assert read_last_good(tmp_path) == GOOD
    write_last_good(tmp_path, GOOD)
    assert read_last_good(tmp_path) == GOOD


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"values": 3}', '{"values', '{"config_id": "c"}'])
def test_a_file_that_is_something_else_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "last_good.json").write_text(content)
    with pytest.raises(DamagedStore, match="Remove it to start from the default knobs") as caught:
        read_last_good(tmp_path)
    assert caught.value.path.endswith("last_good.json")


def test_bytes_that_are_no_text_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "last_good.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedStore, match="cannot be read"):
        read_last_good(tmp_path)
