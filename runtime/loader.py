"""A model folder becomes a model in memory, or an error that says what is wrong with the folder.

Weights are read from safetensors only and code that comes with a model is never run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from runtime.errors import ModelError, RuntimeFault
from runtime.weight_files import stored_tensors, weight_files
from runtime.weight_stream import Reading, is_straight_type, raw_config

OFTEN_TIED = ("model.embed_tokens.weight", "lm_head.weight")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


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
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int | None = None,
    reading: Reading | None = None,
) -> LoadedModel:
    """Reads the folder and places the model on the device. `reading`: of this folder, where it has begun.

    Raises:
        ModelError: the folder is missing, incomplete or damaged, or its architecture is not known.
    """
    folder = Path(path)
    config = read_config(folder)
    try:
        refuse_foreign(folder, config)
    except ModelError:
        if reading is not None:
            reading.abandon()
        raise
    reading = reading or Reading.begin(folder, device)
    try:
        model = None
        if reading.stream is not None:
            model = assembled(folder, config, dtype, reading.stream.take())
        if model is None:
            model = _from_pretrained(folder, config, dtype)
        model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{folder.name} does not fit in the memory of {device}: {error}") from error
    except RuntimeFault:
        raise
    except Exception as error:  # a foreign folder: whatever transformers' many checks raise
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error
    length = _max_model_len(config, max_model_len)
    identity = {
        "name": folder.resolve().name, "path": str(folder.resolve()), **description_of(model),
        "max_model_len": length, "weights_sha256": reading.digest.result(),
    }  # fmt: skip
    return LoadedModel(model.eval(), identity, _eos_token_ids(model), length)


def refuse_foreign(folder: Path, config: PretrainedConfig) -> None:
    """Compares names and shapes before anything is read, where files have those of the model's own parameters:
    transformers would read all of them first, and make up what lacks.

    Raises:
        ModelError: weights of another model, or not all of them.
    """
    if not is_straight_type(raw_config(folder)):
        return
    found = [one for file in weight_files(folder) for one in stored_tensors(file)]
    stored = {one.name: one.shape for one in found}
    if len(stored) < len(found):  # another model's weights lie beside: which are meant, transformers knows
        return
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a configuration that makes no model: loading it says why
        return
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    lacking = [name for name in own if name not in stored]
    if all(name.removeprefix("model.") in stored or name in OFTEN_TIED for name in lacking):
        lacking = []  # the bare model's, or tied another way: transformers knows
    if lacking:
        raise ModelError(
            f"The weights in {folder} lack {len(lacking)} of the tensors that {type(model).__name__} needs "
            f"({', '.join(lacking[:3])}, ...). Download the model again."
        )
    for name, shape in own.items():
        if stored.get(name, shape) != shape:
            raise ModelError(
                f"The weights in {folder} are of another model than its config.json: {name} must be of shape {shape}, "
                f"but is {stored[name]}. Download the model again."
            )


def _from_pretrained(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """As transformers reads it, on the host."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
        output_loading_info=True,
    )  # fmt: skip
    if missing := sorted(report["missing_keys"]) + [str(key) for key in report.get("mismatched_keys", ())]:
        raise ModelError(
            f"The weights in {folder} lack {len(missing)} of the tensors that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}, ...). Download the model again."
        )
    loaded: PreTrainedModel = model
    return loaded


def assembled(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, tensors: dict[str, Tensor] | None
) -> PreTrainedModel | None:
    """The model with these tensors for its weights, where they are exactly those that it has; None otherwise.

    Its buffers are computed on the host, as transformers does, so that they are the same to the last bit.
    """
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    own = dict(model.named_parameters())
    persistent = model.state_dict().keys() - {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    if tensors is None or own.keys() != tensors.keys() or persistent:
        return None
    if any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
        return None
    for name in list(tensors):
        place, _, leaf = name.rpartition(".")
        tensor = tensors.pop(name).to(own[name].dtype)  # of another type, the one read is let go at once
        setattr(model.get_submodule(place), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def description_of(model: PreTrainedModel) -> dict[str, Any]:
    """What an identity tells of the model in memory, wherever its weights came from."""
    text_config = model.config.get_text_config()
    return {
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
