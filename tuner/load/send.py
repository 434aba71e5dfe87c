"""What the load sends, and the sending of one request of it."""

import asyncio
import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tuner.errors import Unavailable
from tuner.load.arrivals import Arrival, arrivals
from tuner.load.report import CUT, Outcome
from tuner.load.stream_client import Reply, StreamClient, Target
from tuner.settings import TrafficSettings

DEFAULT_TIMEOUT_S = 120.0
# An open loop against a server that has stopped would otherwise open connections without end.
MAX_OPEN_REQUESTS = 2000

# Ids that every vocabulary has, for a server that does not tell how large its own is.
SAFE_VOCAB_SIZE = 256

OnOutcome = Callable[[Outcome], None]


class ServedModel(NamedTuple):
    """What a prompt of token ids must know of the model."""

    name: str
    context_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Load:
    """Everything that decides what is sent."""

    target: Target
    settings: TrafficSettings
    model: ServedModel
    duration_s: float | None = None
    phase: int = 0
    timeout_s: float = DEFAULT_TIMEOUT_S

    def arrivals(self) -> Iterator[Arrival]:
        return arrivals(self.settings, np.random.default_rng(self.settings.seed), self.model.context_tokens)

    def body(self, index: int, arrival: Arrival) -> bytes:
        """The JSON of request number `index`: greedy, ids drawn uniformly from the vocabulary."""
        words = np.random.default_rng([self.settings.seed, self.phase, index])
        request = {
            "model": self.model.name,
            "prompt": words.integers(0, self.model.vocab_size, arrival.prompt_tokens).tolist(),
            "max_tokens": arrival.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(request, separators=(",", ":")).encode()


def epoch_clock() -> Callable[[], float]:
    """UTC epoch seconds that a stepped system clock does not bend."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


@dataclass
class Sender:
    """Sends single requests and tells what became of each."""

    load: Load
    on_outcome: OnOutcome
    clock: Callable[[], float] = field(default_factory=epoch_clock)

    def __post_init__(self) -> None:
        self.client = StreamClient(self.load.target, self.clock)

    async def send(self, index: int, arrival: Arrival, planned_at: float, body: bytes) -> None:
        reply, sent_at = Reply(), self.clock()
        error: tuple[str | None, str | None] = (CUT, None)
        try:
            async with asyncio.timeout(self.load.timeout_s):
                await self.client.complete(body, reply)
            error = error_of(reply, arrival.output_tokens)
        except TimeoutError:
            error = ("timeout", f"no end within {self.load.timeout_s:g} s")
        except OSError as broken:
            error = ("connection", str(broken))
        finally:
            self._tell(index, arrival, planned_at, error, reply, sent_at)

    def skip(self, index: int, arrival: Arrival, planned_at: float) -> None:
        """Counts a request that is not sent because too many are open."""
        self._tell(
            index, arrival, planned_at, ("not_sent", f"{MAX_OPEN_REQUESTS} requests are open"), Reply(), None
        )

    def _tell(
        self,
        index: int,
        arrival: Arrival,
        planned_at: float,
        error: tuple[str | None, str | None],
        reply: Reply,
        sent_at: float | None,
    ) -> None:
        self.on_outcome(
            Outcome(
                index=index,
                length_class=arrival.length_class,
                prompt_tokens=arrival.prompt_tokens,
                asked_tokens=arrival.output_tokens,
                planned_at=planned_at,
                sent_at=sent_at,
                first_token_at=reply.first_token_at,
                last_token_at=reply.last_token_at,
                finished_at=None if sent_at is None else self.clock(),
                output_tokens=reply.output_tokens,
                error_kind=error[0],
                detail=error[1],
            )
        )


def error_of(reply: Reply, asked_tokens: int) -> tuple[str | None, str | None]:
    """(kind, detail) of what is wrong with a response that arrived, or (None, None)."""
    if reply.status != 200:
        return f"http_{reply.status}", reply.error
    if reply.error is not None:
        return "stream", reply.error
    if not reply.finished or reply.output_tokens != asked_tokens:
        return "incomplete", f"{reply.output_tokens} of {asked_tokens} tokens came"
    return None, None


def served_model(
    target: Target, name: str | None, context_tokens: int | None, vocab_size: int | None
) -> ServedModel:
    """Completes what is known of the model by asking GET /v1/models, unless all of it is known.

    Raises:
        Unavailable: the server does not answer, or does not tell what is missing.
    """
    if name is not None and context_tokens is not None and vocab_size is not None:
        return ServedModel(name, context_tokens, vocab_size)
    listed = list_models(target)
    chosen = next((entry for entry in listed if name in (None, entry.get("id"))), None)
    if chosen is None:
        known = ", ".join(str(entry.get("id")) for entry in listed) or "none"
        raise Unavailable(
            f"{target.host}:{target.port} must serve {name or 'a model'}, but the models there are: {known}."
        )
    context_tokens = context_tokens or chosen.get("max_model_len")
    if not context_tokens:
        raise Unavailable(
            f"{target.host}:{target.port} does not tell the model's context. Give --context-tokens."
        )
    vocab_size = vocab_size or chosen.get("vocab_size") or SAFE_VOCAB_SIZE
    return ServedModel(str(chosen["id"]), int(context_tokens), int(vocab_size))


def list_models(target: Target) -> list[dict[str, Any]]:
    """The entries of GET /v1/models. Raises Unavailable."""
    kind = http.client.HTTPSConnection if target.tls else http.client.HTTPConnection
    connection = kind(target.host, target.port, timeout=10.0)
    headers = {} if target.api_key is None else {"Authorization": f"Bearer {target.api_key}"}
    try:
        connection.request("GET", f"{target.prefix}/models", headers=headers)
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise Unavailable(
                f"GET {target.prefix}/models must answer 200, but got {response.status}: {text[:200]!r}."
            )
        return list(json.loads(text)["data"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"A server must answer at {target.host}:{target.port}, but got {error!r}. "
            "Start it, or check the address."
        ) from error
    finally:
        connection.close()
