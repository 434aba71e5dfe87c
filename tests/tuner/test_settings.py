"""Settings: precedence, and errors that say what to change."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from tuner.errors import SettingsError
from tuner.settings import Settings, load_settings, load_settings_with_origins

CONFIGS = Path(__file__).parents[2] / "configs"


def problems_of(
    tmp_path: Path, text: str | bytes, flags: dict | None = None, environ: dict | None = None
) -> str:
    """What is said of a settings file; the folder is cut off so that texts can be compared."""
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as caught:
        load_settings(path, flags, environ or {})
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_settings(path, environ={}).mode in ("auto", "approve")


def test_demo_starts_poorly_and_makes_its_own_traffic() -> None:
    demo = load_settings(CONFIGS / "demo.yaml", environ={})
    assert demo.mode == "auto"
    assert demo.knobs.start == {"max_num_seqs": 2, "batch_wait_ms": 50.0, "max_batched_tokens": 64}
    assert demo.traffic is not None and demo.traffic.utilisation == 0.87
    assert (demo.experiment.slice_s, demo.experiment.burn_in_s) == (15.0, 4.0)
    assert Path(demo.model.location, "config.json").is_file()


def test_default_mode_asks_a_person() -> None:
    assert load_settings(environ={}).mode == "approve"


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("experiment: {slice_s: 20, burn_in_s: 4, settle_s: 5}\nserver: {port: 9000}\n")
    environ = {"TUNER_EXPERIMENT__SLICE_S": "30", "TUNER_EXPERIMENT__BURN_IN_S": "6", "TUNER_MODEL__NAME": ""}
    loaded = load_settings_with_origins(path, {"experiment.slice_s": 40}, environ)
    experiment = loaded.value.experiment
    assert (experiment.slice_s, experiment.burn_in_s, experiment.settle_s, experiment.look_every) == (
        40,
        6,
        5,
        5,
    )
    assert loaded.origins == {
        "experiment.slice_s": "command line",
        "experiment.burn_in_s": "TUNER_EXPERIMENT__BURN_IN_S",
        "experiment.settle_s": str(path),
        "server.port": str(path),
    }


def test_environment_carries_lists_mappings_and_nothing() -> None:
    environ = {
        "TUNER_SLOS": '[{"metric": "ttft_s", "statistic": "p95", "limit": 2}]',
        "TUNER_KNOBS__START__MAX_NUM_SEQS": "4",
        "TUNER_KNOBS__DENY": '["policy"]',
        "TUNER_MODEL__KV_TOKENS": "null",
        "TUNER_SEARCH__ENABLED": "false",
        "TUNER_DATA_DIR": "var/elsewhere",
        "TUNER_PORT_8000_TCP": "tcp://10.0.0.1:8000",  # set by Kubernetes beside a service called tuner
        "TUNER_SERVICE_HOST": "10.0.0.1",
    }
    settings = load_settings(environ=environ)
    assert settings.slos[0].limit == 2.0
    assert settings.knobs.start == {"max_num_seqs": 4}
    assert settings.knobs.deny == ("policy",)
    assert not settings.search.enabled
    assert settings.data_dir == Path("var/elsewhere")


def test_empty_file_and_empty_section_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# nothing yet\n")
    assert load_settings(path, environ={}) == Settings()
    path.write_text("experiment:\n  # slice_s: 20\ntraffic:\n")
    assert load_settings(path, environ={}) == Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().mode = "auto"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "experiment: {slice_s: -3}",
            "x.yaml: `experiment.slice_s` must be greater than 0, but got -3. The default is 12.0.",
        ),
        (
            "experiment: {slice_s: .nan}",
            "x.yaml: `experiment.slice_s` must be a finite number, but got nan. The default is 12.0.",
        ),
        (
            "experiment: {slice_s: long}",
            "x.yaml: `experiment.slice_s` must be a number, but got 'long'. The default is 12.0.",
        ),
        (
            "experiment: {max_pairs: 10.5}",
            "x.yaml: `experiment.max_pairs` must be a whole number, but got 10.5. The default is 30.",
        ),
        (
            "experiment: {max_pairs: yes}",
            "x.yaml: `experiment.max_pairs` must not be a yes or no, but got True. Put text in quotes.",
        ),
        (
            "experiment: {lease_s: 6}",
            "x.yaml: `experiment.lease_s` must be at most 5, but got 6. The default is 5.0.",
        ),
        (
            "experiment: {max_pairs: 31}",
            "x.yaml: `experiment.max_pairs` must be a multiple of `experiment.look_every` (5), but got 31. Take 30.",
        ),
        (
            "experiment: {burn_in_s: 6}",
            "x.yaml: `experiment.burn_in_s` must be less than half of `experiment.slice_s` (12), but got 6. "
            "Lengthen the slice or shorten the burn-in.",
        ),
        (
            "server: {port: 80000}",
            "x.yaml: `server.port` must be at most 65535, but got 80000. The default is 8000.",
        ),
        (
            "mode: aproove",
            "x.yaml: `mode` must be one of auto, approve, observe, but got 'aproove'. Did you mean `approve`?",
        ),
        ("mode: off", "x.yaml: `mode` must not be a yes or no, but got False. Put text in quotes."),
        ("model: {name: 5}", "x.yaml: `model.name` must be text (put it in quotes), but got 5."),
        (
            "model: ./folder",
            "x.yaml: `model` must be a mapping, but got './folder'. "
            "Its keys are: path, name, device, dtype, max_model_len, kv_tokens.",
        ),
        (
            "holdback: {share: 0.2}",
            "x.yaml: `holdback.share` must be at most 0.1, but got 0.2. The default is 0.05.",
        ),
        ("slos: {metric: ttft_s}", "x.yaml: `slos` must be a list, but got a mapping of 1."),
        (
            "slos: [{metric: ttft_s, statistic: p95}]",
            "x.yaml: `slos.0.limit` must be given, but got nothing.",
        ),
        (
            "slos: [{metric: errors, statistic: p95, limit: 0.1}]",
            "x.yaml: `slos.statistic` of `errors` must be `share`, but got 'p95'.",
        ),
        (
            "traffic: {kind: poisson}",
            "x.yaml: `traffic.rate_per_s` must be given, or `traffic.utilisation` (such as 0.7), but got neither.",
        ),
        (
            "traffic: {kind: replay}",
            "x.yaml: `traffic.trace` must name a CSV file when `traffic.kind` is replay, but got nothing.",
        ),
        (
            "knobs: {bounds: {max_num_seqs: [8, 2]}}",
            "x.yaml: `knobs.bounds.max_num_seqs` must be [low, high], but got [8, 2]. Swap the two.",
        ),
        (
            "knobs: {start: {max_num_seqs: 5000}}",
            "x.yaml: `knobs.start`: `max_num_seqs` must be in [1, 1024] requests, but got 5000.",
        ),
        (
            "knobs: {bounds: {policy: [lifo]}}",
            "x.yaml: `knobs.bounds`: `policy` must be one of fcfs, shortest_prefill, longest_prefix, priority, "
            "but got 'lifo'.",
        ),
        (
            "knobs: {start: {max_num_seqs: 2}, bounds: {max_num_seqs: [4, 8]}}",
            "x.yaml: `knobs.start.max_num_seqs` must lie inside `knobs.bounds.max_num_seqs` [4, 8], but got 2. "
            "Widen the bounds or start inside them.",
        ),
        (
            "knobs: {allow: [policy], deny: [policy]}",
            "x.yaml: `knobs.deny` must not name what `knobs.allow` names, but both name policy.",
        ),
    ],
)
def test_wrong_value_is_named_with_rule_and_fix(tmp_path: Path, text: str, said: str) -> None:
    assert problems_of(tmp_path, text) == said


def test_unknown_key_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    said = problems_of(tmp_path, "experiment: {slice: 10}\nsearhc: {}\n")
    assert "`experiment.slice` is unknown. Did you mean `slice_s`? Known here: slice_s, burn_in_s" in said
    assert "`searhc` is unknown. Did you mean `search`?" in said
    assert "Did you mean `max_num_seqs`?" in problems_of(tmp_path, "knobs: {deny: [max_num_seq]}")
    assert "`slos.0.limt` is unknown. Did you mean `limit`?" in problems_of(
        tmp_path, "slos: [{metric: ttft_s, statistic: p95, limit: 1, limt: 1}]"
    )


def test_error_names_the_layer_that_must_be_edited(tmp_path: Path) -> None:
    good = "server: {port: 8000}"
    assert problems_of(tmp_path, good, {"server.port": -1}).startswith(
        "command line: `server.port` must be at least 0"
    )
    assert problems_of(tmp_path, good, environ={"TUNER_SERVER__PORT": "x"}).startswith(
        "TUNER_SERVER__PORT: `server.port`"
    )
    assert "Did you mean `port`?" in problems_of(tmp_path, good, environ={"TUNER_SERVER__PROT": "1"})
    assert (
        problems_of(tmp_path, good, environ={"TUNER_MODEE": "auto"})
        == "TUNER_MODEE: is unknown. Did you mean TUNER_MODE?"
    )
    assert "written as JSON" in problems_of(tmp_path, good, environ={"TUNER_SLOS": "[{"})


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    said = problems_of(tmp_path, "server: {port: -1}\nmode: never\ncollect: {interval_s: 0}\n")
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "mode: auto\nmode: approve\n",
            "x.yaml, line 2: `mode` is given twice, first in line 1. Remove one of the two.",
        ),
        (
            "server:\n\tport: 1\n",
            "x.yaml, line 2: must be indented with spaces, but got a tab. Replace the tab by spaces.",
        ),
        (b"mode: \xff\xfe", "x.yaml: must be UTF-8 text, but byte 6 is 0xff. Save it as UTF-8."),
        (
            "- a\n- b\n",
            "x.yaml: must hold a mapping such as `mode: approve`, one key a line, but got a list of 2.",
        ),
        (
            "just words",
            "x.yaml: must hold a mapping such as `mode: approve`, one key a line, but got 'just words'.",
        ),
        ("a: &x [1]\nb: *x\n", "x.yaml, line 2: aliases (`*name`) are not read. Write the value out."),
        ("a: !!python/object:os.system x", "x.yaml, line 1: is not YAML"),
        ("a: [1\nb: 2", "x.yaml, line 2: is not YAML"),
        ("mode: \x00", "x.yaml: is not YAML text"),
        ("model: {name: 2024-02-31}", "x.yaml: a value cannot be read"),
    ],
)
def test_unreadable_file_is_named_with_its_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert problems_of(tmp_path, text).startswith(said)


def test_missing_file_lists_those_beside_it() -> None:
    with pytest.raises(
        SettingsError, match=r"single\.yaml: no such file\. The settings files in .*: demo\.yaml, multi-gpu"
    ):
        load_settings(CONFIGS / "single.yaml", environ={})


def test_schema_for_editors_documents_every_key() -> None:
    schema = Settings.model_json_schema()
    undocumented = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, told in section["properties"].items()
        if "description" not in told
        and "$ref" not in told
        and name not in ("PromptShare", "OutputTokens", "BurstSettings")
    ]
    assert undocumented == []
    assert schema["additionalProperties"] is False
