"""What a user may get wrong at the command line: one clear line on stderr, a documented exit code, no traceback."""

import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from store.lock import DataDirLock
from tuner.settings import BUNDLED_MODEL_PATH


def tuner(*words: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuner.cli", *words], capture_output=True, text=True, timeout=timeout_s
    )


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return tuner("run", "--plain", "--data-dir", str(tmp_path / "data"), "--port", "0", *words)


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_unknown_knob_is_refused_with_the_nearest_name(tmp_path):
    done = run(tmp_path, "--set", "knobs.start.max_num_seq=4")
    assert_refused(done, 2, "max_num_seq", "Did you mean `max_num_seqs`")


def test_knob_out_of_range_is_refused_with_rule_and_value(tmp_path):
    assert_refused(run(tmp_path, "--set", "knobs.start.max_num_seqs=5000"), 2, "[1, 1024]", "5000")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("experiment: {slice_s: -3}", ("experiment.slice_s", "-3")),
        ("experiment: {slice_sec: 12}", ("experiment.slice_sec", "slice_s")),
        ("experiment: {slice_s: quick}", ("experiment.slice_s", "quick")),
        ("mode: automatic", ("mode", "automatic")),
        ("model: [demo", ("settings.yaml",)),
        ("- a\n- b", ("settings.yaml",)),
    ],
)
def test_bad_settings_file_is_refused_with_file_key_rule_and_value(tmp_path, text, parts):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert_refused(run(tmp_path, "--config", str(path)), 2, "settings.yaml", *parts)


def test_missing_settings_file_is_refused(tmp_path):
    assert_refused(run(tmp_path, "--config", str(tmp_path / "none.yaml")), 2, "none.yaml")


def test_missing_model_folder_is_refused(tmp_path):
    assert_refused(run(tmp_path, "--model", str(tmp_path / "no-model")), 66, "no-model")


def test_corrupt_weights_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL_PATH, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert_refused(run(tmp_path, "--model", str(folder)), 66, "safetensors")


def test_port_in_use_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = tuner("run", "--plain", "--data-dir", str(tmp_path / "data"), "--port", str(port))
    assert_refused(done, 75, str(port))


def test_second_daemon_on_the_same_store_is_refused(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    lock = DataDirLock(data_dir)
    lock.acquire()
    try:
        assert_refused(run(tmp_path), 75, "data")
    finally:
        lock.release()


def test_newer_store_is_refused_and_left_as_it_is(tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    journal = sqlite3.connect(data_dir / "journal.db")
    journal.execute("PRAGMA user_version = 99")
    journal.commit()
    journal.close()
    assert_refused(run(tmp_path), 75, "99")
    assert sqlite3.connect(data_dir / "journal.db").execute("PRAGMA user_version").fetchone() == (99,)


@pytest.mark.parametrize("words", [("status",), ("history",), ("explain",), ("export",)])
def test_reading_a_folder_without_a_store_says_so(tmp_path, words):
    assert_refused(tuner(*words, "--data-dir", str(tmp_path)), 75, "no store")


@pytest.mark.parametrize("words", [("pause",), ("rollback",), ("approve", "1")])
def test_acting_without_a_daemon_says_so(tmp_path, words):
    assert_refused(tuner(*words, "--data-dir", str(tmp_path)), 69, "No daemon runs")


def test_help_imports_nothing_heavy(tmp_path):
    code = "import sys, tuner.cli; sys.argv = ['tuner', '--help']\n"
    code += "try: tuner.cli.app()\nexcept SystemExit: pass\n"
    code += (
        "heavy = {'torch', 'transformers', 'optuna', 'prophet', 'scipy', 'sqlalchemy', 'numpy', 'pandas'}\n"
    )
    code += "print(sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("[]"), done.stdout[-300:] + done.stderr


def test_doctor_names_what_is_wrong(tmp_path):
    done = tuner("doctor", "--data-dir", str(tmp_path / "data"))
    assert "python" in done.stdout and "SQLite" in done.stdout
    wrong = tmp_path / "settings.yaml"
    wrong.write_text("model: {path: /nowhere/at/all}")
    done = tuner("doctor", "--config", str(wrong))
    assert done.returncode == 69 and "FAIL model" in done.stdout


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\x00\xff\xfe no text", "is not JSON"),
        (b'{"format": "tuner-evid', "is not JSON"),
        (b"[]", "is not evidence"),
        (b'{"format": "something else"}', "is not evidence"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_unreadable_evidence_is_refused_and_says_what_to_do(tmp_path, content, part):
    path = tmp_path / "evidence.json"
    path.write_bytes(content)
    assert_refused(tuner("verify", str(path)), 65, "evidence.json", part, "xport")


def test_missing_evidence_is_refused(tmp_path):
    assert_refused(tuner("verify", str(tmp_path / "none.json")), 2, "none.json")


def test_serving_other_machines_without_a_key_is_refused(tmp_path):
    done = run(tmp_path, "--set", "server.host=0.0.0.0")
    assert_refused(done, 2, "--insecure", "server.api_key_file")


def test_client_key_file_that_is_missing_is_refused(tmp_path):
    done = run(tmp_path, "--set", "server.host=0.0.0.0", "--set", f"server.api_key_file={tmp_path / 'none'}")
    assert_refused(done, 2, "none")
