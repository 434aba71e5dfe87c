"""CUDA graphs of what launches the same kernels each time: captured once, replayed by one launch."""

import contextlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch

Out = TypeVar("Out")
Size = TypeVar("Size", bound=Hashable)

STEPS_UNDER_WAY = 2  # at most: what was let go before them is done
LET_GO_A_STEP = 4
LET_GO_A_REST = 16
MOST_GOING = 256  # beyond, some go behind a capture too
SPARE_BYTES = 2 * 2**30  # that stay free of graphs which nobody counted on when the pool was sized
NUM_PARTS = 4  # of the layers of a step, where others wait while it is captured: each a graph of its own


class Pools(NamedTuple):
    """What steps read and write. `identity`: that of the dict."""

    identity: int
    kv_dtype: str
    block_tokens: int


class Captured(NamedTuple, Generic[Out]):
    """`memory`: the pool in which its tensors lie, `out` among them."""

    graph: torch.cuda.CUDAGraph
    out: Out
    memory: tuple[int, int]
    seconds: float


class Met(Generic[Size]):
    """The sizes of steps that were met last, so many of them. Iterates from the last one on."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sizes: OrderedDict[Size, None] = OrderedDict()

    def add(self, size: Size) -> None:
        self._sizes[size] = None
        self._sizes.move_to_end(size)
        if len(self._sizes) > self._most:
            self._sizes.popitem(last=False)

    def __iter__(self) -> Iterator[Size]:
        return reversed(self._sizes)


class Captures:
    """Takes captures one after the other, into memory that all of them share: one graph runs at a time.

    Graphs that nobody needs any more go a few a step, when no step that may have replayed them is under way: to destroy
    those of all sizes at once takes tens of milliseconds, and those who are served would wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._index = device, torch.empty(0, device=device).device.index
        self.memory: tuple[int, int] | None = None
        self._num_held: Counter[tuple[int, int]] = Counter()  # by memory, graphs that are not yet destroyed
        self._going: deque[tuple[int, Captured[Any]]] = deque()  # by the steps before them
        self._num_steps = 0
        self.due: Callable[[], object] | None = None  # a capture that can wait for the launch of the step
        self.has_captured = False  # since the last step ended
        self._failed: list[torch.cuda.CUDAGraph] = []  # the allocator may still ask them about its streams
        # Of captures and of nothing else: others wait for theirs. Streams of a high priority are handed out apart, and
        # what is captured on one goes before what is prepared beside.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def capture(self, run: Callable[[], Out]) -> Captured[Out]:
        """Beside what the device does: nothing is waited for, and nothing given back that the allocator holds, as
        `torch.cuda.graph` would have it. Raises RuntimeError where it fails."""
        started, self.has_captured = time.perf_counter(), True
        self.memory = memory = self.memory or torch.cuda.graph_pool_handle()
        graph, out = self._recorded(run, memory)
        self._num_held[memory] += 1
        return Captured(graph, out, memory, time.perf_counter() - started)

    def _recorded(self, run: Callable[[], Out], memory: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Out]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            try:
                graph.capture_begin(memory, capture_error_mode="thread_local")
                out = run()
                graph.capture_end()
            except BaseException:
                self._give_up(graph, memory)
                raise
        return graph, out

    def let_go(self, some: Iterable[Captured[Any]]) -> None:
        """Nobody replays them from now on."""
        self._going.extend((self._num_steps, one) for one in some)

    def has_spare_room(self) -> bool:
        return self._device.type != "cuda" or torch.cuda.mem_get_info(self._device)[0] >= SPARE_BYTES

    def capture_due(self) -> None:
        """A step was launched and the device computes it: what is `due` is captured meanwhile."""
        capture, self.due = self.due, None
        if capture is not None:
            capture()

    def end_step(self, may_destroy: bool = True) -> None:
        """One was launched that may have replayed what was captured: some of those that nobody replays may go, unless
        the host has had enough to do."""
        self._num_steps += 1
        self.has_captured = False
        if not may_destroy and len(self._going) <= MOST_GOING:
            return
        for _ in range(LET_GO_A_STEP):
            if not self._going or self._going[0][0] + STEPS_UNDER_WAY >= self._num_steps:
                return
            self._destroy()

    def rest(self) -> None:
        """No step is under way, but a request may come: some go."""
        for _ in range(min(LET_GO_A_REST, len(self._going))):
            self._destroy()

    def give_back(self) -> None:
        """No step is under way, and their memory is wanted: all go."""
        while self._going:
            self._destroy()

    def _destroy(self) -> None:
        memory = self._going.popleft()[1].memory
        self._num_held[memory] -= 1
        if not self._num_held[memory]:
            del self._num_held[memory]
            if memory == self.memory:
                self.memory = None  # it went with the last of them

    def run_apart(self, run: Callable[[], object], times: int) -> None:
        """Runs it where it is captured later: kernels are compiled and loaded, libraries take their workspace. Then
        there is as much memory as can be: a capture gives nothing back that the allocator holds."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            for _ in range(times):
                run()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def _give_up(self, graph: torch.cuda.CUDAGraph, memory: tuple[int, int]) -> None:
        """One that can be ended, as where memory ran out, gives its memory back. Behind another the allocator is left
        as if it went on (PyTorch 2.11), so the next ones have memory of their own."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._failed.append(graph)
            for give_back in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with contextlib.suppress(RuntimeError):
                    getattr(torch._C, give_back)(self._index, memory)
            self.memory = None
        else:
            graph.reset()
            if not self._num_held[memory]:
                self.memory = None


def reason(error: RuntimeError) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
