"""A model folder becomes a model in memory, or an error that says what is wrong with the folder.

Weights are read from safetensors only and code that comes with a model is never run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.bare_model import BareConfig, BareModel
from runtime.errors import ModelError, RuntimeFault
from runtime.weight_files import are_weights_of, weight_files
from runtime.weight_stream import Reading, WeightStream, json_object, raw_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModel:
    """`identity` is the `model` part of the runtime's identity. `eos_token_ids` end a text unless told not to."""

    model: "PreTrainedModel | BareModel"
    identity: dict[str, Any]
    eos_token_ids: frozenset[int]
    max_model_len: int


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"--device {name} was asked for, but PyTorch sees no CUDA device. Use --device cpu.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"--device must be auto, cpu, cuda or cuda:N, but got {name!r}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"--device {name} was asked for, but PyTorch sees {torch.cuda.device_count()}, counted from cuda:0."
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU and bfloat16 on CUDA."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError(f"--dtype must be auto or one of {', '.join(DTYPES)}, but got {name!r}.")
    return DTYPES[name]


def load_model(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int | None = None,
    reading: Reading | None = None,
    may_be_bare: bool = False,
) -> LoadedModel:
    """Reads the folder and places the model on the device. `reading`: of this folder, where it has begun.
    `may_be_bare`: the model may be one without code, for our decoder, where that is possible: transformers is not
    loaded then. Otherwise it is transformers' own.

    Raises:
        ModelError: the folder is missing, incomplete or damaged, or its architecture is not known.
    """
    folder = Path(path)
    raw = checked_config(folder)
    bare = BareConfig.of(raw) if may_be_bare else None
    try:
        model: PreTrainedModel | BareModel | None = None
        if bare is not None:
            model, reading = _bare_model(folder, bare, device, dtype, reading)
        if model is None:
            from runtime.pretrained import load_pretrained

            model, reading = load_pretrained(folder, device, dtype, reading)
        model = model.to(device)
    except Exception as error:  # a foreign folder: whatever transformers' many checks raise
        if reading is not None:
            reading.abandon()
        if isinstance(error, RuntimeFault):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(f"{folder.name} does not fit in the memory of {device}: {error}") from error
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error
    assert reading is not None
    length = _max_model_len(model.config, max_model_len)
    identity = {
        "name": folder.resolve().name, "path": str(folder.resolve()), **description_of(model),
        "max_model_len": length, "weights_sha256": reading.digest.result(),
    }  # fmt: skip
    return LoadedModel(model.eval(), identity, _eos_token_ids(folder, model), length)


def checked_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises ModelError where there is none, or no such folder."""
    if not folder.is_dir():
        raise ModelError(f"There is no model folder at {folder}. Give a folder with config.json and weights.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    return raw_config(folder)


def _bare_model(
    folder: Path, config: BareConfig, device: torch.device, dtype: torch.dtype, reading: Reading | None
) -> tuple[BareModel | None, Reading | None]:
    """None where the files hold anything but the weights of such a model.

    Raises:
        ModelError: they are another model's, or lack some.
    """
    model = BareModel(config)
    if not are_weights_of(folder, model.shapes, config.architectures[0]):
        return None, reading
    reading = reading or Reading.begin(folder, device)
    stream = reading.stream or WeightStream(weight_files(folder), device)
    weights = stream.take()
    if weights is None:  # of types that only transformers knows
        return None, Reading(reading.digest, None)
    return model.put_in(weights, dtype), reading


def description_of(model: "PreTrainedModel | BareModel") -> dict[str, Any]:
    """What an identity tells of the model in memory, wherever its weights came from."""
    text_config: Any = model.config.get_text_config()
    return {
        "architecture": (model.config.architectures or [type(model).__name__])[0],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "num_layers": text_config.num_hidden_layers,
        "hidden_size": text_config.hidden_size,
        "vocab_size": text_config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _max_model_len(config: Any, asked: int | None) -> int:
    """Raises ModelError if more is asked for than the model was made for."""
    trained: int = getattr(config.get_text_config(), "max_position_embeddings", None) or asked or 4096
    if asked is None:
        return trained
    if not 16 <= asked <= trained:
        raise ModelError(
            f"--max-model-len must be in [16, {trained}] tokens for this model, but got {asked}."
        )
    return asked


def _eos_token_ids(folder: Path, model: "PreTrainedModel | BareModel") -> frozenset[int]:
    eos = json_object(folder / "generation_config.json").get("eos_token_id")
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
