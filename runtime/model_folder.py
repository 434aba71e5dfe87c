"""What the front end must know of a model without loading it: read from the folder's small files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from runtime.errors import ModelError

ASSUMED_CONTEXT_TOKENS = 2048  # of a model that does not say
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json, a tokenizer and safetensors, as Hugging Face lays it out."""

    path: Path
    name: str
    vocab_size: int
    context_tokens: int
    end_token_ids: tuple[int, ...]
    created_at: int  # epoch s of config.json

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ModelError where a part is missing or does not parse."""
        path = path.resolve()
        if not path.is_dir():
            raise ModelError(f"The model must be a folder on this machine, but {path} is none.")
        config = _read_json(path / "config.json")
        text_config = config.get("text_config") or config
        vocab_size = text_config.get("vocab_size")
        if not isinstance(vocab_size, int) or vocab_size < 1:
            raise ModelError(
                f"{path / 'config.json'} must give `vocab_size` as a positive number, but got {vocab_size!r}."
            )
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise ModelError(f"{path} has no tokenizer: one of {', '.join(TOKENIZER_FILES)} must be there.")
        _check_weights(path)
        return cls(
            path=path,
            name=path.name,
            vocab_size=vocab_size,
            context_tokens=int(text_config.get("max_position_embeddings") or ASSUMED_CONTEXT_TOKENS),
            end_token_ids=_end_token_ids(path, config),
            created_at=int((path / "config.json").stat().st_mtime),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ModelError(f"{path} is damaged, it must be JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged, it must hold a JSON object.")
    return value


def _check_weights(path: Path) -> None:
    """Names only: the engine reads the bytes."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(_read_json(index).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise ModelError(
                f"{path} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}."
            )
    elif not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no weights: a *.safetensors file must be there (other formats are not read)."
        )


def _end_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = path / "generation_config.json"
    sources = [config, _read_json(generation) if generation.is_file() else {}]
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    return tuple(sorted(ids))
