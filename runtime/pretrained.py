"""A model folder as transformers loads it: models with code of their own, for every tier.

Importing this takes seconds: see `runtime.bare_model` for those that can do without.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from runtime.bare_model import BareModel
from runtime.errors import ModelError
from runtime.loader import checked_config
from runtime.weight_files import are_weights_of
from runtime.weight_stream import Reading, is_straight_type, raw_config

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_pretrained(
    folder: Path, device: torch.device, dtype: torch.dtype, reading: Reading | None = None
) -> tuple[PreTrainedModel, Reading]:
    """The model, on the host or already on the device, and the reading of its weights, which has begun if none was
    given.

    Raises:
        ModelError: as `runtime.loader.load_model`; so may whatever else transformers raises.
    """
    config = read_config(folder)
    refuse_foreign(folder, config)
    reading = reading or Reading.begin(folder, device)
    model = None
    if reading.stream is not None:
        model = assembled(folder, config, dtype, reading.stream.take())
    return model or _from_pretrained(folder, config, dtype), reading


def pretrained_of(bare: BareModel, folder: Path) -> PreTrainedModel:
    """transformers' model with the same weights in memory. Raises ModelError where it has others."""
    weights: dict[str, Tensor] = {name: weight.detach() for name, weight in bare.named_parameters()}
    model = assembled(folder, read_config(folder), bare.dtype, weights)
    if model is None:
        raise ModelError(f"The weights of {folder} are not those that transformers' model has.")
    return model.to(bare.device).eval()


def read_config(folder: Path) -> PretrainedConfig:
    """Raises ModelError if there is no such folder, or no configuration of a known causal LM in it."""
    checked_config(folder)
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


def refuse_foreign(folder: Path, config: PretrainedConfig) -> None:
    """Compares names and shapes before anything is read, where files have those of the model's own parameters:
    transformers would read all of them first, and make up what lacks.

    Raises:
        ModelError: weights of another model, or not all of them.
    """
    if not is_straight_type(raw_config(folder)):
        return
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a configuration that makes no model: loading it says why
        return
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    are_weights_of(folder, own, type(model).__name__)


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
    model.tie_weights()
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
