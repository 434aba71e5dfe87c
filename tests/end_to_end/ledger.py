"""An independent client that keeps its own book of every request it sent: what the store says is held against it.

    python -m tests.end_to_end.ledger --url http://127.0.0.1:8000 --out ledger.jsonl --rate 3 --seed 1

One line when a request is sent and one when it came to its end, whatever the end. SIGTERM stops the sending, waits
for what is open, and writes a last line. Nothing of the tuner is imported here.
"""

import argparse
import asyncio
import hashlib
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import httpx

REQUEST_LIMIT_S = 120.0
CONNECT_LIMIT_S = 10.0
END_LIMIT_S = REQUEST_LIMIT_S + 10.0  # until each has had its own time
NUM_PROMPTS = 12  # each is sent again and again, and must be answered in the same words


class Ledger:
    """Sends at random instants of a fixed rate; `book` is the open file."""

    def __init__(self, url: str, book: TextIO, rate_per_s: float, seed: int, first: int = 0) -> None:
        self._book, self._rate_per_s, self._random = book, rate_per_s, random.Random(seed)
        timeout = httpx.Timeout(REQUEST_LIMIT_S, connect=CONNECT_LIMIT_S)
        limits = httpx.Limits(
            max_connections=None
        )  # a queue in the client would look like silence of the server
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False)
        self._first = first
        self.stop = asyncio.Event()

    async def run(self) -> None:
        open_requests: set[asyncio.Task[None]] = set()
        number = self._first
        while not self.stop.is_set():
            task = asyncio.create_task(self._send(number, self._body(number)))
            open_requests.add(task)
            task.add_done_callback(open_requests.discard)
            number += 1
            try:
                async with asyncio.timeout(self._random.expovariate(self._rate_per_s)):
                    await self.stop.wait()
            except TimeoutError:
                pass
        if open_requests:
            await asyncio.wait(open_requests, timeout=END_LIMIT_S)
        self._write({"end": True, "num_sent": number - self._first, "num_open": len(open_requests)})
        for task in list(open_requests):
            task.cancel()
        await self._http.aclose()

    def _body(self, number: int) -> dict[str, Any]:
        which = self._random.randrange(NUM_PROMPTS)
        words = random.Random(which)
        prompt = [words.randrange(5, 4000) for _ in range(words.choice([16, 40, 90, 160]))]
        body = {
            "prompt": prompt,
            "max_tokens": words.choice([6, 12, 24]),
            "temperature": 0.0,
            "ignore_eos": True,
        }
        if self._random.random() < 0.6:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    async def _send(self, number: int, body: dict[str, Any]) -> None:
        told: dict[str, Any] = {"n": number, "sent_at": time.time(), "streamed": "stream" in body}
        told |= {"asked": body["max_tokens"], "prompt": hash_of(body["prompt"])}
        self._write(told)
        try:
            told |= await (self._streamed(body) if told["streamed"] else self._whole(body))
        except (httpx.ConnectError, httpx.ConnectTimeout):
            told["outcome"] = "no connection"
        except httpx.TimeoutException:
            told["outcome"] = "silent"
        except httpx.HTTPError as error:
            told |= {"outcome": "broken", "detail": type(error).__name__}
        self._write({**told, "done_at": time.time()})

    async def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return refusal(answer.status_code, answer.text)
        value = answer.json()
        return self._judged(
            value["id"], body, value["usage"]["completion_tokens"], value["choices"][0]["text"]
        )

    async def _streamed(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return refusal(answer.status_code, (await answer.aread()).decode(errors="replace"))
            told: dict[str, Any] = {"outcome": "cut", "id": None, "tokens": 0}
            text, usage = "", None
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return self._judged(told["id"], body, usage, text)
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return {**told, "outcome": "stream error", "detail": event["error"].get("code")}
                told["id"] = event["id"]
                if event.get("usage"):
                    usage = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    text += choice["text"]
                    told["tokens"] += 1
            return told  # the stream ended without [DONE]

    def _judged(self, id: str | None, body: dict[str, Any], tokens: int | None, text: str) -> dict[str, Any]:
        outcome = "ok" if tokens == body["max_tokens"] else "short"
        return {"outcome": outcome, "id": id, "tokens": tokens, "text": hash_of(text)}

    def _write(self, line: dict[str, Any]) -> None:
        self._book.write(json.dumps(line) + "\n")


def refusal(status: int, text: str) -> dict[str, Any]:
    try:
        code = json.loads(text)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = text[:80]
    return {"outcome": "refused", "status": status, "detail": code}


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


async def main() -> None:
    options = argparse.ArgumentParser("python -m tests.end_to_end.ledger")
    options.add_argument("--url", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--rate", type=float, default=3.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--first", type=int, default=0, help="number of the first request")
    asked = options.parse_args()
    with open(asked.out, "a", buffering=1) as book:
        ledger = Ledger(asked.url, book, asked.rate, asked.seed, asked.first)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ledger.stop.set)
        await ledger.run()


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)
