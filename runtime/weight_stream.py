"""Weights from their files straight to the device, in several threads, beside whatever else a start does.

    file ──preadv──▶ pinned buffer of a thread ──copy──▶ tensor on the device

Pageable memory would be copied to a GPU at a few GB/s; out of pinned buffers, two a thread so that reading and copying
overlap, the link itself is the limit. On a CPU the files are read into the tensors themselves.
"""

import json
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from runtime.errors import ModelError
from runtime.weight_files import StoredTensor, WeightsDigest, num_threads, stored_tensors, weight_files

CHUNK_BYTES = 2**24
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


# Their own names are those of their files, and nothing is unpacked on the way: so they may be read before the model is
# made.
STRAIGHT_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class Chunk(NamedTuple):
    """A part of a tensor: where it lies in the file, and [bytes] uint8 on the device."""

    file: Path
    offset: int
    target: Tensor


class WeightStream:
    """Begins at once. `take` waits for the end."""

    def __init__(self, files: list[Path], device: torch.device) -> None:
        self._files, self._device = files, device
        self._chunks: deque[Chunk] = deque()
        self._made: Future[dict[str, Tensor]] = Future()
        self._is_wanted = True
        threading.Thread(target=self._run, args=(self._made,), name="weights", daemon=True).start()

    def take(self) -> dict[str, Tensor] | None:
        """Tensors by name, in the files' own types, which are not kept here; None where a type is not known.

        Raises:
            ModelError: a file changed while it was read, or cannot be.
            torch.OutOfMemoryError: they do not fit.
        """
        made, self._made = self._made, Future()
        try:
            return made.result()
        except KeyError:
            return None
        except OSError as error:
            raise ModelError(f"The weights cannot be read: {error}") from error

    def abandon(self) -> None:
        self._is_wanted = False

    def _run(self, made: Future[dict[str, Tensor]]) -> None:
        """`made`: the one that `take` waits for, and does not keep."""
        try:
            made.set_result(self._read())
        except BaseException as error:
            made.set_exception(error)

    def _read(self) -> dict[str, Tensor]:
        stored = [tensor for file in self._files for tensor in stored_tensors(file)]
        made = {
            one.name: torch.empty(one.shape, dtype=DTYPES[one.dtype], device=self._device) for one in stored
        }
        for one in stored:
            self._chunks.extend(chunks_of(one, made[one.name]))
        with ThreadPoolExecutor(num_threads(), "weights") as pool:
            for done in [pool.submit(self._work) for _ in range(num_threads())]:
                done.result()
        return made

    def _work(self) -> None:
        if self._device.type == "cuda":
            self._copy_through_pinned()
            return
        while (chunk := self._next()) is not None:
            read_into(chunk, chunk.target)

    def _copy_through_pinned(self) -> None:
        stream = torch.cuda.Stream(self._device)
        # Whoever had the tensors' memory before may not be done with it.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event() for _ in buffers]
        turn = 0
        with torch.cuda.stream(stream):
            while (chunk := self._next()) is not None:
                copied[turn].synchronize()
                shown = buffers[turn][: len(chunk.target)]
                read_into(chunk, shown)
                chunk.target.copy_(shown, non_blocking=True)
                copied[turn].record()
                turn = 1 - turn
        stream.synchronize()

    def _next(self) -> Chunk | None:
        try:
            return self._chunks.popleft() if self._is_wanted else None
        except IndexError:
            return None


def chunks_of(stored: StoredTensor, tensor: Tensor) -> list[Chunk]:
    """Raises ModelError where the file has room for more or less than the tensor."""
    if stored.num_bytes != tensor.nbytes:
        raise ModelError(
            f"{stored.file} is damaged: {stored.name} of shape {stored.shape} takes {tensor.nbytes} bytes, but "
            f"{stored.num_bytes} are announced. Download the model again."
        )
    if not stored.num_bytes:
        return []
    parts = tensor.flatten().view(torch.uint8).split(CHUNK_BYTES)
    return [Chunk(stored.file, stored.offset + at * CHUNK_BYTES, part) for at, part in enumerate(parts)]


def read_into(chunk: Chunk, target: Tensor) -> None:
    """target: [bytes] uint8 on the host. Raises ModelError where the file is shorter."""
    left, offset = memoryview(target.numpy()), chunk.offset
    with chunk.file.open("rb", buffering=0) as opened:
        while left:
            count = os.preadv(opened.fileno(), [left], offset)
            if not count:
                raise ModelError(f"{chunk.file} ended while it was read. Download the model again.")
            left, offset = left[count:], offset + count


@dataclass(frozen=True)
class Reading:
    """Weights on their way, and their digest. `stream`: None where transformers reads them itself."""

    digest: WeightsDigest
    stream: WeightStream | None

    @classmethod
    def begin(cls, folder: Path, device: torch.device, digest: WeightsDigest | None = None) -> Self:
        """`digest`: of these files, where it has begun. Raises ModelError where files are missing or damaged."""
        files = weight_files(folder)
        is_straight = device.type == "cuda" and is_straight_type(raw_config(folder))
        return cls(digest or WeightsDigest(files), WeightStream(files, device) if is_straight else None)

    def abandon(self) -> None:
        """Stops reading soon: nobody wants these weights."""
        self.digest.abandon()
        if self.stream is not None:
            self.stream.abandon()


def raw_config(folder: Path) -> dict[str, Any]:
    """What config.json says; empty where it cannot be read, which whoever needs it will say."""
    return json_object(folder / "config.json")


def json_object(path: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_straight_type(config: dict[str, Any]) -> bool:
    return config.get("model_type") in STRAIGHT_TYPES and "quantization_config" not in config
