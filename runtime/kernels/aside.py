"""Kernels compiled in a process beside, so that no other thread of this one waits for the interpreter meanwhile.

Triton compiles for about a second, of which it holds the interpreter for up to a tenth at a time: steps that another
thread launches would be late by as much. The child compiles what it is told into Triton's cache on disk, from where the
thread that wants the kernel loads it in some milliseconds.
"""

import contextlib
import importlib
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

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
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.name)
        source = ASTSource(kernel, dict(self.signature), dict(self.constants), dict(self.attributes))
        triton.compile(source, target=GPUTarget(*self.target), options=dict(self.options))


class Child:
    """The process that compiles: one job after the other, until it is closed or this process ends. As nice as the
    thread that starts it."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtime.kernels.aside"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def compile(self, job: Job) -> None:
        """Raises RuntimeError where the child could not, or is no more."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        told = pickle.dumps(job)
        try:
            process.stdin.write(told)
            process.stdin.flush()
            answer = process.stdout.readline().decode()
        except OSError as error:
            raise RuntimeError(f"the process that compiles is gone: {error}") from error
        if answer != "done\n":
            raise RuntimeError(answer.strip() or "the process that compiles has ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


_aside: ContextVar[list[Child] | None] = ContextVar(
    "the process that compiles, once there is one", default=None
)


@contextlib.contextmanager
def compiled_aside() -> Iterator[None]:
    """Within it, what this thread launches is compiled in a process beside where that was not done yet. Where the
    process cannot, in this one, as ever."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    before, children = knobs.runtime.jit_cache_hook, list[Child]()

    def hook(**told: Any) -> Any:
        if (mine := _aside.get()) is not None:
            _compile(told, mine)
        return before(**told) if before is not None else None

    token = _aside.set(children)
    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
        _aside.reset(token)
        for child in children:
            child.close()


def _compile(told: Mapping[str, Any], children: list[Child]) -> None:
    try:
        job = Job.of_hook(told)
        if not children:
            children.append(Child())
        children[0].compile(job)
    except Exception:  # whatever Triton's inside has become: it compiles without us
        log.info("a kernel is compiled here and not aside", exc_info=True)


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Reads jobs, and answers each with a line; ends with its parent, whose end closes stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
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
