"""The model's chat template, rendered in a child of its own that ends itself when a rendering overruns.

A template is a program out of the model's folder, and the messages are a stranger's: together they may loop, or
multiply a string until memory is gone, also inside one call of C code that no other thread could interrupt. The
child arms a timer of the kernel before each rendering and has a cap on its memory, so that the worst conversation
costs one child and one second.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from runtime.child import python_path
from runtime.errors import InvalidRequest, RequestFailed

RENDER_LIMIT_S = 1.0  # a usual rendering takes less than a millisecond; this leaves room for a busy machine
MAX_CHILD_BYTES = 2 * 2**30  # of address space, of which libraries reserve some hundred MB without using it


class ChatTemplate:
    """Renders conversations. Its methods may run in any thread; one conversation is rendered at a time."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._told = json.dumps({"template": template, "special_tokens": dict(special_tokens)})
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the child if there is none, and does not wait for it: its imports take a second."""
        with self._lock:
            self._start()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt's text, up to where the answer begins.

        Raises:
            InvalidRequest: the template refuses the conversation, or overruns its time or memory on it.
            RequestFailed: the child cannot be started.
        """
        with self._lock:
            child = self._start()
            if self._ask(child, None) != "ready\n":
                self._forget(child)
                raise RequestFailed("The chat template cannot be rendered here.", "chat_template")
            answer = self._ask(child, json.dumps([dict(message) for message in messages]))
            if not answer.endswith("\n"):
                self._forget(child)
                raise InvalidRequest(
                    f"The model's chat template did not finish on these messages within {RENDER_LIMIT_S:g} s.",
                    "messages",
                )
        told: dict[str, str] = json.loads(answer)
        if "refused" in told:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {told['refused']}.", "messages"
            )
        return told["text"]

    def close(self) -> None:
        with self._lock:
            if self._child is not None:
                self._forget(self._child)

    # -- inside, under the lock ----------------------------------------------------------------------------

    def _start(self) -> "subprocess.Popen[str]":
        if self._child is not None and self._child.poll() is not None:
            self._forget(self._child)
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "runtime.chat_template"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, "PYTHONPATH": python_path()}, start_new_session=True,
            )  # fmt: skip
            self._ask(self._child, self._told, is_read=False)
        return self._child

    def _ask(self, child: "subprocess.Popen[str]", line: str | None, is_read: bool = True) -> str:
        """What the child answers to the line, or to an empty one; less than a whole line where it has ended."""
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write((line or "") + "\n")
            child.stdin.flush()
            return child.stdout.readline() if is_read else ""
        except (BrokenPipeError, ConnectionResetError):
            return ""

    def _forget(self, child: "subprocess.Popen[str]") -> None:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._child = None


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Reads the template, then conversations, one JSON value a line; ends with its parent, whose end closes stdin."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # see `prompts.without_torch`
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    told = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (MAX_CHILD_BYTES, MAX_CHILD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends this process, whatever it computes
    for line in sys.stdin:
        if not line.strip():
            print("ready", flush=True)
            continue
        signal.setitimer(signal.ITIMER_REAL, RENDER_LIMIT_S)
        try:
            (text,), _ = render_jinja_template(
                conversations=[json.loads(line)], chat_template=told["template"], add_generation_prompt=True,
                **told["special_tokens"],
            )  # fmt: skip
            answer = json.dumps({"text": text})
        except MemoryError:
            answer = json.dumps({"refused": "it needs too much memory for them"})
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, ArithmeticError) as error:
            # `raise_exception` in a template raises exactly TemplateError with a sentence for the client.
            reason = str(error)[:200] if type(error) is jinja2.TemplateError else "it failed on them"
            answer = json.dumps({"refused": reason})
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
