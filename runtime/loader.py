"""A model folder becomes a model in memory, or an error that says what is wrong with the folder.

Weights are read from safetensors only and code that comes with a model is never run.
"""

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from runtime.errors import ModelError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library itself


@dataclass(frozen=True)
class LoadedModel:
    """`identity` is the `model` part of the runtime's identity. `eos_token_ids` end a text unless told not to."""

    model: PreTrainedModel
    identity: dict[str, Any]
    eos_token_ids: frozenset[int]
    max_model_len: int


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"--device {name} was asked for, but PyTorch sees no CUDA device. Use --device cpu.")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU and bfloat16 on CUDA."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError(f"--dtype must be auto or one of {', '.join(DTYPES)}, but got {name!r}.")
    return DTYPES[name]


def load_model(
    path: str | Path, device: torch.device, dtype: torch.dtype, max_model_len: int | None = None
) -> LoadedModel:
    """Reads the folder and places the model on the device.

    Raises:
        ModelError: the folder is missing, incomplete or damaged, or its architecture is not known.
    """
    folder = Path(path)
    config = read_config(folder)
    files = weight_files(folder)
    digest = _DigestThread(files)  # reads the files while they are loaded
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{folder.name} does not fit in the memory of {device}: {error}") from error
    except Exception as error:  # a foreign folder: whatever transformers' many checks raise
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]) + [str(key) for key in report.get("mismatched_keys", ())]:
        raise ModelError(
            f"The weights in {folder} lack {len(missing)} of the tensors that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}, ...). Download the model again."
        )
    length = _max_model_len(config, max_model_len)
    identity = {**_identity(folder, model), "max_model_len": length, "weights_sha256": digest.result()}
    return LoadedModel(model.eval(), identity, _eos_token_ids(model), length)


def _identity(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    text_config = model.config.get_text_config()
    return {
        "name": folder.resolve().name,
        "path": str(folder.resolve()),
        "architecture": (model.config.architectures or [type(model).__name__])[0],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "num_layers": text_config.num_hidden_layers,
        "hidden_size": text_config.hidden_size,
        "vocab_size": text_config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def read_config(folder: Path) -> PretrainedConfig:
    """Raises ModelError if there is no such folder, or no configuration of a known causal LM in it."""
    if not folder.is_dir():
        raise ModelError(f"There is no model folder at {folder}. Give a folder with config.json and weights.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a foreign file: whatever transformers' many checks raise
        raise ModelError(
            f"config.json in {folder} describes no model that transformers knows: {error}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"{folder} holds a {config.model_type} model, which is not a causal language model of transformers. "
            "Code that comes with a model is never run."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, each checked to be whole.

    Raises:
        ModelError: none, one that is named in the index is missing, or one is truncated or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is damaged: {error!r}. Download the model again.") from error
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no .safetensors weights. Other formats are not read; convert the model first."
        )
    for file in files:
        _check_whole(file)
    return files


def _check_whole(file: Path) -> None:
    """A safetensors file is 8 bytes of header length, the header, then exactly the bytes it announces."""
    if not file.is_file():
        raise ModelError(f"{file} is named in the index but missing. Download the model again.")
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            if size < 8 or header_bytes > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"its header announces {header_bytes} bytes")
            header = json.loads(opened.read(header_bytes))
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        announced = 8 + header_bytes + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} is damaged: {error}. Download the model again.") from error
    if announced != size:
        raise ModelError(
            f"{file} is truncated: {announced} bytes announced, {size} found. Download the model again."
        )


class _DigestThread:
    """Hashes the weights beside the loading: SHA-256 over the files' bytes in order of their names."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._digest = hashlib.sha256()
        self._thread = threading.Thread(target=self._run, name="weights-digest", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for file in self._files:
            with file.open("rb") as opened:
                while chunk := opened.read(2**24):
                    self._digest.update(chunk)

    def result(self) -> str:
        self._thread.join()
        return self._digest.hexdigest()


def _max_model_len(config: PretrainedConfig, asked: int | None) -> int:
    """Raises ModelError if more is asked for than the model was made for."""
    trained: int = getattr(config.get_text_config(), "max_position_embeddings", None) or asked or 4096
    if asked is None:
        return trained
    if not 16 <= asked <= trained:
        raise ModelError(
            f"--max-model-len must be in [16, {trained}] tokens for this model, but got {asked}."
        )
    return asked


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
