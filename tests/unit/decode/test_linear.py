"""Packed linear layers: the same numbers as torch's, the same bits in any batch, and a model that can be given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from harp_batch.decode import linear
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)
DTYPES = [torch.float32, torch.bfloat16]


class Net(nn.Module):
    """Two linear layers, one of them tied to an embedding, and a subclass that must be left alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype, self.device = dtype, torch.device("cpu")
        self.embed = nn.Embedding(97, 48, dtype=dtype)
        self.up = nn.Linear(48, 80, dtype=dtype)
        self.head = nn.Linear(48, 97, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8, dtype=dtype)


def packed(dtype: torch.dtype) -> Net:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 arithmetic for oneDNN")
    net = Net(dtype)
    linear.pack(net)
    return net


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_computes_what_the_layer_computed(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.inference_mode():
        got, expected = packed(dtype).up(x), Net(dtype).up(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["up", "head"])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, name: str, threads: None) -> None:
    layer = getattr(packed(dtype), name)
    x = torch.randn(600, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = layer(x)
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in [*range(2, 80), 128, 256, 512, 600]:
            assert torch.equal(layer(x[:rows]), whole[:rows]), (count, rows)
            assert torch.equal(layer(x[-rows:]), whole[-rows:]), (count, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_restores_every_weight_and_every_tie(dtype: torch.dtype) -> None:
    before, net = Net(dtype), packed(dtype)
    assert torch.equal(net.up.weight, before.up.weight)  # code may still read it
    linear.pack(net)  # twice changes nothing
    linear.unpack(net)
    assert type(net.up) is nn.Linear
    assert net.head.weight is net.embed.weight
    for (name, got), (_, expected) in zip(net.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_one_layer_in_two_places_stays_one_layer() -> None:
    net = Net(torch.float32)
    net.again, net.embed.inside = net.up, net.up
    x = torch.ones(8, 48)
    before = net.up(x)
    linear.pack(net)
    assert net.up is net.again is net.embed.inside
    torch.testing.assert_close(net.up(x), before)
    linear.unpack(net)
    assert torch.equal(net.again(x), before)
    assert net.up is net.again is net.embed.inside


def test_a_packed_weight_is_held_once() -> None:
    net = packed(torch.float32)
    assert [name for name, _ in net.named_parameters()] == [
        "embed.weight",
        "up.bias",
        "special.weight",
        "special.bias",
    ]
    assert net.up._linear[0].weight.numel() == 0


def test_what_is_not_a_plain_float_layer_on_the_cpu_is_left_alone() -> None:
    half = tiny_model("llama").half()
    linear.pack(half)
    assert type(half.lm_head) is nn.Linear
    assert type(packed(torch.float32).special) is nn.modules.linear.NonDynamicallyQuantizableLinear


def test_rows_come_in_fours_where_every_layer_is_packed_and_no_vector_remainder_is_left() -> None:
    """Widths of 80 and 97 leave a remainder; a layer that cannot be packed needs eight rows, whatever its width."""
    assert linear.row_block(packed(torch.float32)) == 8
    plain = nn.Sequential(nn.Embedding(5, 64), nn.Linear(64, 96), nn.LayerNorm(96))
    assert linear.row_block(plain) == 8
    plain.dtype, plain.device = torch.float32, torch.device("cpu")
    linear.pack(plain)
    assert linear.row_block(plain) == 4
