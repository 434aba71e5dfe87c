"""Linear layers of a CPU model with weights laid out for small batches.

oneDNN multiplies a few rows much faster when the weights are stored in its own blocked layout. Measured on one
Zen core in float32, plain against packed, µs a layer:

    weight        1 row      4 rows     16 rows    256 rows
    704 x 256     111 / 68   166 / 65   215 / 103  1144 / 907
    4096 x 256    533 / 298  761 / 241  1022 / 482 6522 / 5141

The packed copy stands beside the original, so it is made only where memory is plentiful.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

log = logging.getLogger(__name__)

PACKED_FOR_ROWS = 16  # the layout chosen for 16 rows was best or equal at every other number too
MAX_RELATIVE_ERROR = 1e-4  # float32, another order of summation


def pack_linears(model: nn.Module, memory_bytes: int) -> int:
    """Replaces the forward of float32 linear layers on a CPU by the packed one, while the copies fit in
    `memory_bytes`. Returns how many were replaced. A layer whose packed result differs is left as it is.
    """
    num_packed = 0
    for module in model.modules():
        if (
            type(module) is not nn.Linear
            or module.weight.device.type != "cpu"
            or module.weight.dtype != torch.float32
        ):
            continue
        memory_bytes -= module.weight.nbytes
        if memory_bytes < 0:
            break
        packed = _packed(module)
        if packed is None:
            break
        if not _agrees(module, packed):
            log.warning(
                "a %s layer gave other results when packed; it stays plain", tuple(module.weight.shape)
            )
            continue
        object.__setattr__(module, "forward", packed.forward)
        num_packed += 1
    return num_packed


class PackedLinear:
    """The forward of one linear layer over packed weights."""

    def __init__(self, module: nn.Linear) -> None:
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), PACKED_FOR_ROWS)
        self._bias = module.bias.detach() if module.bias is not None else None
        self._out_features = module.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]. Returns [..., out_features]."""
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self._out_features))
        out: Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return out


def _packed(module: nn.Linear) -> PackedLinear | None:
    """None where this build of PyTorch has no such layout."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return PackedLinear(module)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.info("linear layers stay plain: %s", str(error).splitlines()[0])
        return None


@torch.inference_mode()
def _agrees(module: nn.Linear, packed: PackedLinear) -> bool:
    for num_rows in (1, 5):
        x = torch.randn(1, num_rows, module.in_features, generator=torch.Generator().manual_seed(0))
        expected = linear(x, module.weight, module.bias)
        error = (packed.forward(x) - expected).abs().max()
        if not error <= MAX_RELATIVE_ERROR * expected.abs().max().clamp(min=1e-6):
            return False
    return True
