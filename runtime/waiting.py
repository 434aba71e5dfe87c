"""The queue of requests that are not admitted, which knows how many tokens their prompts have."""

from collections import deque

from runtime.request import Request


class Waiting(deque[Request]):
    """Preempted requests in front, then in order of arrival. `prompt_tokens`: of all of them; kept as they come and go,
    since a step asks for it and the queue may be long."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt_tokens = 0

    @property
    def queued_tokens(self) -> int:
        """Tokens of prompts that wait for one another: none where there is a single one, however long."""
        return self.prompt_tokens if len(self) > 1 else 0

    def append(self, request: Request) -> None:
        super().append(request)
        self.prompt_tokens += request.prompt_tokens

    def appendleft(self, request: Request) -> None:
        super().appendleft(request)
        self.prompt_tokens += request.prompt_tokens

    def remove(self, request: Request) -> None:
        super().remove(request)
        self.prompt_tokens -= request.prompt_tokens
