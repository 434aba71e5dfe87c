"""What every test may rely on: the `gpu` marker skips with a reason, or fails where a GPU was promised."""

import os
import shutil
import subprocess

import pytest

REQUIRE_GPU = "TUNER_REQUIRE_GPU"


def why_no_gpu() -> str | None:
    """The reason why tests of the GPU cannot run here, or None."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver (nvidia-smi is not on the path)"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    if listed.returncode != 0 or "GPU" not in listed.stdout:
        return f"nvidia-smi lists no GPU: {(listed.stdout + listed.stderr).strip()[:200]}"
    import torch

    return None if torch.cuda.is_available() else "a GPU is there, but this build of torch does not use it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    reason = why_no_gpu()
    if reason is None:
        return
    if os.environ.get(REQUIRE_GPU) == "1":
        raise pytest.UsageError(f"{REQUIRE_GPU}=1 asks for the tests of the GPU, but {reason}.")
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))
