"""The command line: parse, call, print. Nothing heavy is imported before a command needs it.

Reading commands (status, history, explain, export) open the store read-only and work without a daemon;
acting ones (pause, resume, rollback, approve, reject) go through the daemon's API.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tuner.cli_store import store_app

ENGINE_BENCHMARKS = ("engine", "gpu", "http", "warm", "reconfigure", "speculation")

app = typer.Typer(
    name="tuner",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serves a language model and tunes it while it serves. Exit codes: 0 ok, 2 usage or settings, "
    "65 file damaged or foreign, 66 model missing or damaged, 69 nothing answers, 70 internal error, "
    "75 busy (port, store or folder in use).",
)
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="Settings file (YAML).")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", "-d", help="Folder of the store; overrides the settings.")
]
ExpectedChampion = Annotated[
    str | None,
    typer.Option(help="The champion's config_id as you saw it; refused where another serves by then."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def main() -> None:
    """Runs a command; every expected error is one line on stderr and a documented exit code."""
    from runtime.errors import ModelError, RuntimeFault
    from store.errors import BadExport, DamagedStore, StoreError
    from tuner.errors import TunerError

    try:
        app()
    except TunerError as error:
        fail(str(error), error.exit_code)
    except (DamagedStore, BadExport) as error:
        fail(str(error), 65)
    except StoreError as error:
        fail(str(error), 75)
    except ModelError as error:
        fail(str(error), 66)
    except RuntimeFault as error:
        fail(str(error), 69)


def fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def data_dir_of(config: Path | None, data_dir: Path | None) -> Path:
    if data_dir is not None:
        return data_dir
    from tuner.settings import load_settings

    return load_settings(config).data_dir


@app.command()
def run(
    config: ConfigOption = None,
    model: Annotated[str | None, typer.Option(help="Model folder, or `demo`.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the OpenAI API.")] = None,
    mode: Annotated[str | None, typer.Option(help="auto, approve or observe.")] = None,
    data_dir: DataDir = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, any setting; may be repeated.")
    ] = None,
) -> None:
    """Serve a model, watch it, search, prove and apply. Ctrl-C drains and stops everything it started."""
    from tuner.live import watch
    from tuner.run import run as run_daemon
    from tuner.settings import load_settings

    flags: dict[str, Any] = dict(pair(item) for item in set_ or [])
    flags |= {
        key: value
        for key, value in {
            "model.path": model,
            "server.port": port,
            "mode": mode,
            "data_dir": data_dir,
        }.items()
        if value is not None
    }
    run_daemon(
        load_settings(config, flags=flags), lambda daemon, stop: watch(daemon, stop, plain), say=typer.echo
    )


def pair(item: str) -> tuple[str, Any]:
    from tuner.errors import SettingsError

    key, separator, value = item.partition("=")
    if not separator:
        raise SettingsError(f"--set must be section.key=value, but got {item!r}.")
    return key, value


@app.command()
def status(config: ConfigOption = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """What serves, what is being tried, what waits for approval."""
    from tuner.report import status_report

    show(status_report(data_dir_of(config, data_dir)), as_json)


@app.command()
def history(
    config: ConfigOption = None,
    data_dir: DataDir = None,
    limit: Annotated[int, typer.Option(min=1, help="How many lines.")] = 40,
    as_json: AsJson = False,
) -> None:
    """The story: probes, tests, verdicts and changes, newest last."""
    from tuner.report import history_report

    show(history_report(data_dir_of(config, data_dir), limit), as_json)


@app.command()
def explain(
    change: Annotated[
        str | None,
        typer.Argument(help="A change's number or an experiment's id; the last promotion if absent."),
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Why a configuration won or lost: cause, probe, pairs, verdict, change."""
    from tuner.report import explain_report

    show(explain_report(data_dir_of(config, data_dir), change), as_json)


class Form(StrEnum):
    """Of an export."""

    YAML = "yaml"
    JSON = "json"
    VLLM = "vllm"
    SGLANG = "sglang"
    ENV = "env"


@app.command()
def export(
    config: ConfigOption = None,
    data_dir: DataDir = None,
    form: Annotated[Form, typer.Option("--format", "-f", help="What reads it.")] = Form.YAML,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output if absent.")
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option("--evidence", help="Writes all that the verdict was made of, for `tuner verify`."),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="With --evidence: another than the last promotion's.")
    ] = None,
) -> None:
    """The champion with its evidence: as settings, as arguments of vLLM or SGLang, as environment variables."""
    from tuner.report import evidence_text, export_text

    folder = data_dir_of(config, data_dir)
    if experiment is not None and evidence is None:
        fail("--experiment names whose evidence to write: give --evidence FILE too.", 2)
    if evidence is not None:
        write_out(evidence_text(folder, experiment), evidence)
        print(f"Check it with `tuner verify {evidence}`.")
    if evidence is None or output is not None:
        write_out(export_text(folder, form.value), output)


def write_out(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}. Give another file.", 2)
    print(f"Written to {output}.")


@app.command()
def verify(
    evidence: Annotated[Path, typer.Argument(help="A file that `tuner export --evidence` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Judge an exported verdict again, bit for bit. Exit codes: 0 all holds, 1 something differs, 65 not evidence."""
    from tuner.verify import as_dicts, read_evidence
    from tuner.verify import verify as verify_evidence

    checks = verify_evidence(*read_evidence(evidence))
    if as_json:
        print(json.dumps(as_dicts(checks), indent=2))
    else:
        for check in checks:
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    if not all(check.passed for check in checks):
        sys.exit(1)


@app.command()
def dashboard(
    config: ConfigOption = None,
    data_dir: DataDir = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on loopback; 0 is any free one.")] = 8501,
    viewer: Annotated[
        bool, typer.Option("--viewer", help="Look only: the operator's key is not used.")
    ] = False,
) -> None:
    """Show the store in a browser: overview, history, experiments, recommendations. Works without a daemon."""
    from tuner.dashboard_process import run_here

    sys.exit(run_here(data_dir_of(config, data_dir), port, viewer))


@app.command()
def rollback(
    to: Annotated[str, typer.Option(help="previous or initial.")] = "previous",
    expected_champion: ExpectedChampion = None,
    config: ConfigOption = None,
    data_dir: DataDir = None,
) -> None:
    """Return to the previous champion, or to the first one."""
    if to not in ("previous", "initial"):
        fail(f"--to must be previous or initial, but got {to!r}.", 2)
    act("rollback", {"to": to, **seen(expected_champion)}, config, data_dir)


@app.command()
def pause(config: ConfigOption = None, data_dir: DataDir = None) -> None:
    """Stop experimenting; the champion goes on serving."""
    act("pause", {}, config, data_dir)


@app.command()
def resume(config: ConfigOption = None, data_dir: DataDir = None) -> None:
    """Go on after a pause."""
    act("resume", {}, config, data_dir)


@app.command()
def approve(
    recommendation: int,
    expected_champion: ExpectedChampion = None,
    config: ConfigOption = None,
    data_dir: DataDir = None,
) -> None:
    """Apply an open recommendation (mode approve)."""
    act("approve", {"recommendation_id": recommendation, **seen(expected_champion)}, config, data_dir)


@app.command()
def reject(
    recommendation: int,
    expected_champion: ExpectedChampion = None,
    config: ConfigOption = None,
    data_dir: DataDir = None,
) -> None:
    """Turn an open recommendation down."""
    act("reject", {"recommendation_id": recommendation, **seen(expected_champion)}, config, data_dir)


def seen(expected_champion: str | None) -> dict[str, str]:
    return {} if expected_champion is None else {"expected_champion": expected_champion}


def act(action: str, arguments: dict[str, Any], config: Path | None, data_dir: Path | None) -> None:
    from tuner.api import DaemonClient

    print(DaemonClient(data_dir_of(config, data_dir)).act(action, arguments))


@app.command()
def doctor(config: ConfigOption = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Check the machine, the packages, the model, the ports and the store."""
    from tuner.doctor import examine

    checks = examine(config, data_dir)
    if as_json:
        print(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    if not all(check.passed for check in checks):
        sys.exit(69)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench(context: typer.Context) -> None:
    """Benchmarks: engine (beside others), gpu (against its limits), http (the server against its engine alone), warm
    (knobs that are prepared), reconfigure (knobs that change under load), speculation (drafts), or of the statistics:
    aa, azure --trace FILE, harm, hour, anomalies, quality; each with --help."""
    which = context.args[0] if context.args else ""
    if which in ENGINE_BENCHMARKS:  # in a child: torch is loaded in the runtime only
        from tuner.quality.canary import PASSAGES

        text = ["--text", str(PASSAGES)] if which == "warm" else []
        words = ["-m", "runtime.bench", which, *text, *context.args[1:]]
        sys.exit(subprocess.run([sys.executable, *words], check=False).returncode)
    from tuner.bench.__main__ import main as bench_judge

    sys.exit(bench_judge(context.args))


app.add_typer(store_app, name="store")


def show(report: Any, as_json: bool) -> None:
    printer: Callable[[], str] = report.to_json if as_json else report.to_text
    print(printer())


if __name__ == "__main__":
    main()
