"""Kernels compiled in a process beside, so that no other thread of this one waits for the interpreter meanwhile.

Triton compiles for about a second, of which it holds the interpreter for up to a tenth at a time: steps that another
thread launches would be late by as much. The child compiles what it is told into Triton's cache on disk, from where the
thread that wants the kernel loads it in some milliseconds.
"""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from runtime.child import python_path

LIMIT_S = 60.0  # for one kernel, which takes a second or two, and the imports before the first

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """All that Triton tells kernels apart by. `signature`, `constants`, `attributes`, `options`: as it keeps them;
    `target`: the backend, the architecture, and threads of a warp."""

    module: str
    name: str
    signature: Mapping[str, Any]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Mapping[str, Any]
    target: tuple[Any, ...]

    @classmethod
    def of_hook(cls, told: Mapping[str, Any]) -> "Job":
        """What Triton tells the hook that is called before it compiles."""
        from triton.runtime import driver

        kernel, compiled, target = told["fn"], told["compile"], driver.active.get_current_target()
        options = json.loads(compiled["specialization_data"])["options"]
        return cls(
            kernel.module, kernel.name, compiled["signature"], compiled["constants"], compiled["configs"][0],
            {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()},
            (target.backend, target.arch, target.warp_size),
        )  # fmt: skip

    def compile(self) -> None:
        """Into Triton's cache, without a GPU."""
        import triton

        triton.compile(self._program(), target=self._gpu(), options=dict(self.options))

    def is_compiled(self) -> bool:
        """Whether it lies in Triton's cache, under the name that `triton.compile` gives it (3.6 to 3.7)."""
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key, get_cache_manager

        source, backend = self._program(), make_backend(self._gpu())
        options = backend.parse_options({**self.options, **source.parse_options()})
        key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
        place = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return place.get_group(f"{source.name[:150]}.json") is not None

    def _program(self) -> Any:
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.name)
        return ASTSource(kernel, dict(self.signature), dict(self.constants), dict(self.attributes))

    def _gpu(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self.target)


class Child:
    """The process that compiles: one job after the other, until it is closed or this process ends. As nice as the
    thread that starts it."""

    def __init__(self) -> None:
        answers, given = os.pipe()  # not its stdout, on which whoever it imports may print
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "runtime.child", str(os.getpid()), "runtime.kernels.aside", str(given),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(given,),
                start_new_session=True, env={**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        except BaseException:
            os.close(answers)
            raise
        finally:
            os.close(given)
        self._answers = os.fdopen(answers)

    def compile(self, job: Job) -> None:
        """Raises RuntimeError where the child could not, or is no more, or takes longer than LIMIT_S."""
        assert self._process.stdin is not None
        told = pickle.dumps(job)
        try:
            self._process.stdin.write(told)
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(f"the process that compiles is gone: {error}") from error
        answered = select.poll()
        answered.register(self._answers, select.POLLIN)
        if not answered.poll(1000 * LIMIT_S):
            raise RuntimeError(f"the process that compiles has not answered within {LIMIT_S:g} s")
        answer = self._answers.readline()
        if answer != "done\n":
            raise RuntimeError(answer.strip() or "the process that compiles has ended")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the assembler that it may be waiting for
        self._process.wait()
        self._answers.close()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()


class Aside:
    """Where one thread's kernels are compiled. After a failure it is left alone: they are compiled in this process."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._has_failed = False

    def compile(self, told: Mapping[str, Any]) -> None:
        """`told`: as the hook is."""
        if self._has_failed:
            return
        try:
            job = Job.of_hook(told)
            if job.is_compiled():
                return
            self._child = self._child or Child()
            self._child.compile(job)
        except Exception as error:  # whatever Triton's inside has become: it compiles without us
            log.warning("kernels are compiled in this process, where steps may wait for that: %s", error)
            self._has_failed = True
            self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


_aside: ContextVar[Aside | None] = ContextVar("where kernels of this thread are compiled", default=None)


@contextlib.contextmanager
def compiled_aside() -> Iterator[None]:
    """Within it, what this thread launches is compiled in a process beside where that was not done yet. Where the
    process cannot, in this one, as ever. One thread at a time."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    before, aside = knobs.runtime.jit_cache_hook, Aside()

    def hook(**told: Any) -> Any:
        if (mine := _aside.get()) is not None:
            mine.compile(told)
        return before(**told) if before is not None else None

    token = _aside.set(aside)
    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
        _aside.reset(token)
        aside.close()


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Reads jobs, and answers each with a line on the descriptor given; ends with its parent."""
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        while True:
            try:
                job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                job.compile()
                answer = "done"
            except Exception as error:
                answer = f"{type(error).__name__}: {error}".replace("\n", " ")
            print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
