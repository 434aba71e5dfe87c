"""What one more engine takes, and how many of them a machine holds. Pure: free memory is a parameter."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from runtime.errors import PrepareFailed
from runtime.knobs import knob_named

Identity = Mapping[str, Any]

PROCESS_BYTES = 400_000_000  # Python with torch loaded and no model, resident; seen on the CPU build
MEMORY_SHARE = 0.8  # of free memory that new engines may take; the rest is the system's


class Footprint(NamedTuple):
    """Bytes of one engine: host memory, and memory of its device (0 on a CPU)."""

    host: int
    device: int


def footprint(identity: Identity, gauges: Mapping[str, Any]) -> Footprint:
    """What an engine like the one that told these takes. A pool that was never filled is counted whole."""
    weights = int(identity.get("model", {}).get("weight_bytes", 0))
    pool = int(identity.get("kv_total_tokens", 0)) * int(identity.get("kv_bytes_per_token", 0))
    seen = int(gauges.get("rss_bytes", 0))
    if _on_gpu(identity):
        device = max(int(gauges.get("device_memory_bytes", 0)), weights + pool)
        return Footprint(max(seen, PROCESS_BYTES), device)
    return Footprint(max(seen, PROCESS_BYTES + weights + pool), 0)


def max_replicas(identity: Identity, free_bytes: int) -> int:
    """How many engines fit beside one another, the first included: a core each, and the memory. At least 1."""
    one = footprint(identity, {})
    by_memory = 1 + int(MEMORY_SHARE * free_bytes) // one.host
    by_cores = int(identity.get("hardware", {}).get("num_cores", 1))
    return max(1, min(int(knob_named("replicas").high), by_cores, by_memory))


def check_room(
    num_more: int, replicas: int, identity: Identity, gauges: Mapping[str, Any], free_bytes: int
) -> None:
    """Raises PrepareFailed, with the numbers, where `num_more` engines do not fit into free memory.

    `gauges` are those of one engine. A device of its own for each engine is not looked at: an engine that does
    not fit on its device says so itself as it starts.
    """
    one = footprint(identity, gauges)
    _check("memory", num_more, replicas, one.host, free_bytes)
    shares_device = replicas > int(identity.get("hardware", {}).get("num_devices", 1))
    if one.device and shares_device and "device_free_bytes" in gauges:
        _check("device memory", num_more, replicas, one.device, int(gauges["device_free_bytes"]))


def device_of(index: int, asked: str, identity: Identity) -> str:
    """Where engine `index` runs: on a GPU of its own where there are as many, else they share in turn."""
    num_devices = int(identity.get("hardware", {}).get("num_devices", 1))
    if index == 0 or not _on_gpu(identity) or num_devices < 2:
        return asked
    return f"cuda:{index % num_devices}"


def _on_gpu(identity: Identity) -> bool:
    return bool(identity.get("hardware", {}).get("device") == "cuda")


def _check(what: str, num_more: int, replicas: int, each: int, free: int) -> None:
    if num_more * each > MEMORY_SHARE * free:
        raise PrepareFailed(
            f"`replicas` = {replicas} needs {num_more} more engine(s) of {each / 1e6:,.0f} MB of {what}, "
            f"but {MEMORY_SHARE:.0%} of the {free / 1e6:,.0f} MB that are free is all they may take. "
            "Lower `replicas` or `kv_tokens`."
        )
