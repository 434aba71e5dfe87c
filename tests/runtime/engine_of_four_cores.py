"""The engine as shipped, told that this machine has four cores: `replicas` may then be up to four."""

from runtime import host

NUM_CORES = 4


def num_cores() -> int:
    return NUM_CORES


host.num_cores = num_cores  # before the engine's modules take it from there

if __name__ == "__main__":
    from runtime.engine import _exit

    _exit()
