"""Benchmarks of the engine: python -m runtime.bench warm | engine | gpu | http | reconfigure | speculation (--help)."""

import sys
from collections.abc import Callable, Sequence

from runtime.bench import engine, gpu, over_http, reconfigure, speculation, warm

BENCHMARKS: dict[str, Callable[[Sequence[str]], int]] = {
    "warm": warm.main,
    "engine": engine.main,
    "gpu": gpu.main,
    "reconfigure": reconfigure.main,
    "http": over_http.main,
    "speculation": speculation.main,
}


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in BENCHMARKS:
        print(f"usage: python -m runtime.bench {{{','.join(BENCHMARKS)}}} ...", file=sys.stderr)
        return 2
    return BENCHMARKS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
