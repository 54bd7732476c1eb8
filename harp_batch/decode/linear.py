"""Linear layers on the CPU with their weights packed once for oneDNN.

`torch.nn.functional.linear` hands a plain weight to the BLAS library, which arranges it anew for every product. At the
few dozen rows of a decode step that costs about a third of the time (docs/performance.md). Here the weight is arranged
once. oneDNN also gave a row the same bits in every batch of two rows or more that was tried, on one thread and on two:
what the engine's promise of identical answers rests on (docs/design.md). `row_block` says how rows must come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 64  # the batch size that the packing is made for; others run nearly as fast
_VECTOR = (
    32  # float32 elements that an elementwise function takes at once; it computes a remainder in another way
)


class PackedLinear(nn.Module):
    """Stands in for an ``nn.Linear``; holds the only copy of its weight, unless the weight is shared."""

    def __init__(self, linear: nn.Linear, *, shared: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = linear.bias
        self._linear = [linear]  # in a list, so that it is no submodule
        if not shared:
            linear.weight.data = linear.weight.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    @property
    def weight(self) -> Tensor:
        """The plain weight [out, in], for code that reads it; unpacked anew each time, unless it is kept."""
        kept: Tensor = self._linear[0].weight
        return kept if kept.numel() else self.packed.to_dense()

    def unpacked(self) -> nn.Linear:
        """The layer that this one stands in for, with its weight."""
        linear = self._linear[0]
        if not linear.weight.numel():
            linear.weight.data = self.packed.to_dense()
        return linear


@torch.no_grad()
def pack(model: Any) -> None:
    """Replace the model's linear layers, where oneDNN can run them; what is packed already stays."""
    if not _packable(model):
        return
    shared = _shared_weights(model)
    packed: dict[nn.Linear, PackedLinear] = {}  # one layer may stand in several places
    for parent, name, linear in _children(model, nn.Linear):
        if linear not in packed:
            packed[linear] = PackedLinear(linear, shared=id(linear.weight) in shared)
        setattr(parent, name, packed[linear])
    for (
        parameter
    ) in model.parameters():  # a mapped weight file stays mapped as long as one tensor points into it
        parameter.data = parameter.data.clone()


@torch.no_grad()
def unpack(model: Any) -> None:
    """Give the model its own linear layers back."""
    for parent, name, packed in _children(model, PackedLinear):
        setattr(parent, name, packed.unpacked())


def row_block(model: Any) -> int:
    """Forwards whose row counts are multiples of this give a row the same bits in any of them.

    Four where all layers are packed and no row leaves a vector remainder: oneDNN's bits would allow two, but its
    products of two rows take longer than those of four. Otherwise eight: a plain float32 product on two threads gives
    other bits where a thread is left with fewer than 4 rows (batches of 5-7 and 9-11), and a remainder must lie within
    the rows of padding.
    """
    widths = [m.out_features for m in model.modules() if type(m) is PackedLinear]
    plain = any(
        parameter is not None and parameter.dim() > 1
        for module in model.modules()
        if not isinstance(module, PackedLinear | nn.Embedding)
        for parameter in module._parameters.values()
    )
    return 8 if plain or any(width % _VECTOR for width in widths) else 4


def _packable(model: Any) -> bool:
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if model.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(model.dtype == torch.float32)


def _children(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Every submodule of exactly this type, with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if type(child) is kind
    ]


def _shared_weights(model: nn.Module) -> set[int]:
    """Weights that more than one module holds, such as an embedding that is tied to the output layer."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
