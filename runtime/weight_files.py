"""The safetensors files of a model folder: which they are, whether they are whole, what lies where, their digest.

Needs neither torch nor transformers, so it can begin before these are loaded.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from runtime.errors import ModelError
from runtime.host import num_cores

DIGEST_PIECE_BYTES = 2**26
_READ_BYTES = 2**22
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library itself
MAX_THREADS = 8
OFTEN_TIED = ("model.embed_tokens.weight", "lm_head.weight")


class StoredTensor(NamedTuple):
    """One tensor in a file. `dtype`: as safetensors names it; `offset`: of its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


def num_threads() -> int:
    """For reading beside other work."""
    return min(MAX_THREADS, max(1, num_cores() // 2))


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


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """Of a file that was found whole."""
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_bytes))
    for name, told in header.items():
        if name != "__metadata__":
            start, end = told["data_offsets"]
            yield StoredTensor(
                name, told["dtype"], tuple(told["shape"]), file, 8 + header_bytes + start, end - start
            )


def are_weights_of(folder: Path, own: Mapping[str, tuple[int, ...]], architecture: str) -> bool:
    """Whether the files hold these tensors and nothing else: names and shapes are compared before anything is read.
    False where only transformers knows.

    Raises:
        ModelError: weights of another model, or not all of them.
    """
    found = [one for file in weight_files(folder) for one in stored_tensors(file)]
    stored = {one.name: one.shape for one in found}
    if len(stored) < len(found):  # another model's weights lie beside: which are meant, transformers knows
        return False
    lacking = [name for name in own if name not in stored]
    if all(name.removeprefix("model.") in stored or name in OFTEN_TIED for name in lacking):
        lacking = []  # the bare model's, or tied another way: transformers knows
    if lacking:
        raise ModelError(
            f"The weights in {folder} lack {len(lacking)} of the tensors that {architecture} needs "
            f"({', '.join(lacking[:3])}, ...). Download the model again."
        )
    for name, shape in own.items():
        if stored.get(name, shape) != shape:
            raise ModelError(
                f"The weights in {folder} are of another model than its config.json: {name} must be of shape {shape}, "
                f"but is {stored[name]}. Download the model again."
            )
    return stored.keys() == own.keys()


class WeightsDigest:
    """Hashes the weights beside the loading, in several threads: SHA-256 over the SHA-256 of each piece of
    DIGEST_PIECE_BYTES, file by file in order of their names. Of one piece alone it is that of the file."""

    def __init__(self, files: list[Path]) -> None:
        self._pool = ThreadPoolExecutor(num_threads(), "weights-digest")
        self._pieces: list[Future[bytes]] = [
            self._pool.submit(_piece_digest, file, start)
            for file in files
            for start in range(0, max(1, file.stat().st_size), DIGEST_PIECE_BYTES)
        ]
        self._pool.shutdown(wait=False)

    @classmethod
    def begin(cls, folder: Path) -> "WeightsDigest | None":
        """None where the folder is at fault, which loading it will say."""
        try:
            return cls(weight_files(folder))
        except ModelError:
            return None

    def abandon(self) -> None:
        """Nobody wants it any more: pieces that were not begun are left."""
        for piece in self._pieces:
            piece.cancel()

    def result(self) -> str:
        digests = [piece.result() for piece in self._pieces]
        return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def _piece_digest(file: Path, start: int) -> bytes:
    digest, left, buffer = hashlib.sha256(), DIGEST_PIECE_BYTES, memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left and (count := opened.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()
