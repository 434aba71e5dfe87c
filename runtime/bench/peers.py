"""The engines that are compared. Each serves a load whole, greedily, to the lengths asked for.

They share nothing but the weights' values: each holds a copy of its own, in the same type.
"""

import inspect
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from runtime.batch import Batch
from runtime.bench.loads import Load
from runtime.executor import Executor
from runtime.knobs import EngineConfig
from runtime.loader import LoadedModel
from runtime.request import Request
from runtime.scheduler import Scheduler
from runtime.weights import linear_layers

PAGE_TOKENS = 256
NEVER = -1  # a token id that nothing ends at
OPENVINO_CHILD = Path(__file__).with_name("openvino_child.py")


class Served(NamedTuple):
    """`outputs`: [requests][tokens]. `ttft_s`, by request, of an engine that tells its tokens as they come."""

    seconds: float
    outputs: list[list[int]]
    ttft_s: list[float] | None = None


class Engine(Protocol):
    name: str

    def serve(self, load: Load) -> Served: ...


def steps_of(
    executor: Executor,
    scheduler: Scheduler,
    config: EngineConfig,
    said: Callable[[Batch], list[int]] | None = None,
) -> Iterator[Batch]:
    """Serves all that is queued as the engine does, and yields each step when it has landed. `said`: what is taken for
    drawn, where it is not what the model drew."""
    began, under_way = time.perf_counter(), None
    while True:
        batch = scheduler.schedule(0.0)
        launched = None
        if batch is not None:
            launched = executor.launch(batch, scheduler.pack(batch), config)
            scheduler.advance(batch)
        ready = [under_way, None if config.overlap_depth and scheduler.may_overlap else launched]
        for one in ready:
            if one is not None:
                tokens = [token or 0 for token in executor.land(one).tokens]
                tokens = tokens if said is None else said(one.batch)
                scheduler.settle(one.batch, tokens, time.perf_counter() - began)
                yield one.batch
        under_way = launched if ready[1] is None else None
        if batch is None and under_way is None:
            return


class Ours:
    """The scheduler and executor of the serving engine, without processes around them."""

    name = "tuner"

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, kv_tokens: int | None = None, tiers: str = "AB"
    ) -> None:
        self.config = config
        self.executor = Executor(loaded, kv_tokens, config, tiers=tiers)
        self.is_on_cpu = next(loaded.model.parameters()).device.type == "cpu"
        if tiers == "B":
            self.name = "tuner, tier B"

    def serve(self, load: Load) -> Served:
        executor, config = self.executor, self.config.patched({"max_num_seqs": load.num_at_once})
        scheduler = Scheduler(
            executor.pool, config, executor.max_model_len, attention_cost=executor.attention_cost
        )
        asked = zip(load.prompts, load.output_tokens, strict=True)
        requests = [Request.of_tokens(str(at), ids, num, 0.0) for at, (ids, num) in enumerate(asked)]
        started = time.perf_counter()
        for request in requests:
            scheduler.add(request)
        for _ in steps_of(executor, scheduler, config):
            pass
        seconds = time.perf_counter() - started
        ttft_s = [request.first_token_at for request in requests if request.first_token_at is not None]
        return Served(seconds, [request.output_ids.tolist() for request in requests], ttft_s)

    def products_share(self, load: Load) -> float:
        """Of the time that serving the load once more takes: the share in products with the weights of linear layers.
        Whoever multiplies as fast is not faster than by the rest. On a CPU, where products end before they return."""
        seconds = 0.0

        def timed(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
            def call(x: torch.Tensor) -> torch.Tensor:
                nonlocal seconds
                started = time.perf_counter()
                out = forward(x)
                seconds += time.perf_counter() - started
                return out

            return call

        layers = {layer: layer.forward for layer in linear_layers(self.executor.module)}
        for layer, forward in layers.items():
            object.__setattr__(layer, "forward", timed(forward))
        try:
            served = self.serve(load)
        finally:
            for layer, forward in layers.items():
                object.__setattr__(layer, "forward", forward)
        return seconds / served.seconds


class Generate:
    """`model.generate`: as many requests as fit at once, padded on the left, until the longest has ended."""

    name = "generate"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.generation_config = _greedy(1)  # what a call leaves open is taken from here

    @torch.inference_mode()
    def serve(self, load: Load) -> Served:
        outputs: list[list[int]] = []
        started = time.perf_counter()
        for at in range(0, len(load.prompts), load.num_at_once):
            prompts = load.prompts[at : at + load.num_at_once]
            wanted = load.output_tokens[at : at + load.num_at_once]
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts], device=self.model.device)
            mask = torch.tensor(
                [[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=self.model.device
            )
            out = self.model.generate(ids, attention_mask=mask, generation_config=_greedy(max(wanted)))
            outputs += [row[width : width + num] for row, num in zip(out.tolist(), wanted, strict=True)]
        return Served(time.perf_counter() - started, outputs)


class ContinuousBatching:
    """transformers' own. Its configuration is fixed when it begins, so each load begins it anew, outside the time."""

    name = "transformers CB"

    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        self.model, self.config = model, config

    @torch.inference_mode()
    def serve(self, load: Load) -> Served:
        from transformers import ContinuousBatchingConfig

        totals = [len(ids) + num for ids, num in zip(load.prompts, load.output_tokens, strict=True)]
        num_blocks = sum(sorted(-(-total // PAGE_TOKENS) + 1 for total in totals)[-load.num_at_once :])
        known = inspect.signature(ContinuousBatchingConfig).parameters
        page = {"page_size" if "page_size" in known else "block_size": PAGE_TOKENS}  # renamed after 5.17
        fixed = ContinuousBatchingConfig(
            **page, num_blocks=num_blocks, max_batch_tokens=max(self.config.max_batched_tokens, 64),
            max_requests_per_batch=load.num_at_once, allow_block_sharing=False,
        )  # fmt: skip
        manager = self.model.init_continuous_batching(
            generation_config=_greedy(max(load.output_tokens)), continuous_batching_config=fixed
        )
        manager.start()
        try:
            self._ask(manager, [load.prompts[0]], [2])  # it is ready when this one is answered
            started = time.perf_counter()
            outputs = self._ask(manager, load.prompts, load.output_tokens)
            return Served(time.perf_counter() - started, outputs)
        finally:
            manager.stop(block=True)

    def _ask(self, manager: Any, prompts: Sequence[list[int]], wanted: Sequence[int]) -> list[list[int]]:
        ids = [
            manager.add_request(prompt, max_new_tokens=num, eos_token_id=NEVER)
            for prompt, num in zip(prompts, wanted, strict=True)
        ]
        found: dict[str, list[int]] = {}
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before it had answered.")
        return [found[id] for id in ids]


class OpenVino:
    """openvino-genai in an environment of its own, which need not hold anything of ours."""

    name = "openvino-genai"

    def __init__(self, python: Path, folder: Path, threads: int, config: EngineConfig) -> None:
        step_tokens = max(config.max_batched_tokens, 64)
        words = [str(python), str(OPENVINO_CHILD), str(folder), str(threads), str(step_tokens)]
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def serve(self, load: Load) -> Served:
        assert self.child.stdin is not None
        print(json.dumps(load._asdict()), file=self.child.stdin, flush=True)
        answer = self._answer()
        return Served(answer["seconds"], answer["outputs"])

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            with self.child:  # closes its pipes
                raise RuntimeError(f"openvino-genai ended with {self.child.wait()}; its words are above.")
        return json.loads(line)


def _greedy(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
