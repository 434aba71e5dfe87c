"""The command line of the serving process, and what it says to the engine."""

import argparse
import json
from pathlib import Path
from typing import Any

from runtime.clock import Clock
from runtime.errors import InvalidKnob
from runtime.knobs import knob_named


def parser() -> argparse.ArgumentParser:
    about = "Serve one model over the OpenAI HTTP API."
    options = argparse.ArgumentParser("python -m runtime.server", description=about)
    add = options.add_argument
    add("--model", type=Path, required=True, help="folder with config.json, a tokenizer and *.safetensors")
    add("--host", default="127.0.0.1", help="address for clients (the control routes stay on 127.0.0.1)")
    add("--api-key-file", type=Path, help="file whose first line is the key that clients must bring")
    add("--insecure", action="store_true", help="serve other machines without asking for a key")
    add("--port", type=_port, default=8000, help="port for clients; 0 takes a free one")
    add("--control-port", type=_port, default=0, help="port of the control routes; 0 takes a free one")
    add(
        "--run-dir",
        type=Path,
        required=True,
        help="folder for runtime.json, the control key and the engine's socket",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto")
    add("--config", metavar="JSON", help='knobs to start with, such as {"max_num_seqs": 32}')
    add(
        "--kv-tokens",
        type=_positive_int,
        help="size of the KV cache in tokens; found by the engine if not given",
    )
    add("--max-model-len", type=_positive_int, help="longest prompt and answer together, tokens")
    add("--served-model-name", help="name that clients use; the folder's if not given")
    add("--drain-s", type=_seconds, default=30.0, help="time for requests in flight at shutdown (default 30)")
    add(
        "--request-timeout-s",
        type=_seconds,
        default=600.0,
        help="time for a request from its arrival (default 600)",
    )
    add(
        "--engine-silence-s",
        type=_seconds,
        default=60.0,
        help="restart a ready engine silent for longer (default 60)",
    )
    add("--clock-anchor", type=Clock.of_text, metavar="EPOCH:MONOTONIC", help=argparse.SUPPRESS)
    add(
        "--replica-keep-s",
        type=_seconds,
        default=300.0,
        help="stop an engine that no configuration has needed for so long (default 300)",
    )
    add(
        "--engine-module", default="runtime.engine", help=argparse.SUPPRESS
    )  # any module that speaks the link
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return options


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 65536:
        raise argparse.ArgumentTypeError(f"a port must be in [0, 65535], but got {text}")
    return number


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {text}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds, at least 0, but got {text}")
    return number


def asked_config(text: str | None) -> dict[str, Any]:
    """Raises InvalidKnob where --config is no JSON object, or a knob in it breaks its rule."""
    try:
        asked = json.loads(text) if text else {}
    except ValueError as error:
        raise InvalidKnob(
            f"`--config` must be a JSON object of knobs, but it does not parse: {error}."
        ) from None
    if not isinstance(asked, dict):
        raise InvalidKnob("`--config` must be a JSON object of knobs.")
    return {name: knob_named(name).check(value) for name, value in asked.items()}


def engine_arguments(options: argparse.Namespace, device: str) -> list[str]:
    arguments = [
        "--model",
        str(options.model.resolve()),
        "--device",
        device,
        "--dtype",
        options.dtype,
    ]
    for flag, value in (("--kv-tokens", options.kv_tokens), ("--max-model-len", options.max_model_len)):
        if value is not None:
            arguments += [flag, str(value)]
    return [*arguments, "--log-level", options.log_level]
