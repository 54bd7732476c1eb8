"""Entropy, masks and combination, against definitions written out in plain Python."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harp_batch.decode import harp
from harp_batch.decode.harp import dropout_mask

_64 = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Vigna's reference algorithm in unbounded integers."""
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _64
    return z ^ (z >> 31)


def plain_bit(seed: int, key: str, step: int, position: int, channel: int, delta: float) -> bool:
    """One mask bit, element by element."""
    digest = hashlib.blake2b(
        f"{seed}\x1f{key}\x1f{step}".encode(), digest_size=8, person=b"harp-mask"
    ).digest()
    gamma = 0x9E3779B97F4A7C15
    row = splitmix64((int.from_bytes(digest, "little") + (position + 1) * gamma) & _64)
    draw = splitmix64((row + (channel + 1) * gamma) & _64) >> 11
    return draw / 2**53 >= delta


@given(
    st.integers(0, 2**40),
    st.text(max_size=20),
    st.integers(0, 5000),
    st.integers(0, 10_000),
    st.floats(0, 1),
)
def test_mask_equals_the_plain_definition(seed: int, key: str, step: int, start: int, delta: float) -> None:
    mask = dropout_mask(seed=seed, request_key=key, step=step, start=start, length=3, hidden=5, delta=delta)
    expected = [[plain_bit(seed, key, step, start + p, c, delta) for c in range(5)] for p in range(3)]
    assert mask.tolist() == expected


def test_mask_bits_never_change_between_releases() -> None:
    mask = dropout_mask(seed=0, request_key="doc-0", step=17, start=0, length=40, hidden=576, delta=0.2)
    assert mask.dtype == torch.bool
    assert mask.shape == (40, 576)
    bits = bytes(mask.flatten().to(torch.uint8).tolist())
    assert hashlib.sha256(bits).hexdigest() == (
        "7f7091e2fd2f3f51dddd7db6ad7f0bf4e8c088e19ee9b3a20b4312d1511b735c"
    )


def test_a_part_of_a_mask_is_that_part() -> None:
    whole = dropout_mask(seed=1, request_key="a", step=2, start=0, length=50, hidden=64, delta=0.3)
    part = dropout_mask(seed=1, request_key="a", step=2, start=20, length=7, hidden=64, delta=0.3)
    assert torch.equal(part, whole[20:27])


@pytest.mark.parametrize("delta", [0.01, 0.2, 0.5])
def test_dropped_share_is_delta(delta: float) -> None:
    mask = dropout_mask(seed=3, request_key="k", step=0, start=0, length=1000, hidden=576, delta=delta)
    n = mask.numel()
    spread = 5 * math.sqrt(delta * (1 - delta) / n)
    assert abs((~mask).sum().item() / n - delta) < spread
    for dim in (0, 1):  # no row and no channel is special
        shares = (~mask).double().mean(dim=dim)
        assert (shares - delta).abs().max() < 6 * math.sqrt(delta * (1 - delta) / mask.shape[dim])


def test_nothing_and_everything_dropped() -> None:
    assert dropout_mask(seed=0, request_key="", step=0, start=0, length=9, hidden=9, delta=0.0).all()
    assert not dropout_mask(seed=0, request_key="", step=0, start=0, length=9, hidden=9, delta=1.0).any()


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"request_key": "b"}, {"step": 1}, {"start": 1}],
    ids=["seed", "request", "step", "position"],
)
def test_masks_of_different_names_are_independent(other: dict[str, object]) -> None:
    name = {"seed": 0, "request_key": "a", "step": 0, "start": 0, "length": 200, "hidden": 200, "delta": 0.5}
    a = dropout_mask(**name)  # type: ignore[arg-type]
    b = dropout_mask(**{**name, **other})  # type: ignore[arg-type]
    assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / 200


def test_masks_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    dropout_mask(seed=0, request_key="a", step=0, start=0, length=5, hidden=5, delta=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_kept_elements_are_not_rescaled() -> None:
    e = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[True, False, True, True]] * 3)
    assert torch.equal(harp.reframe(e, keep)[:, [0, 2, 3]], e[:, [0, 2, 3]])
    assert not harp.reframe(e, keep)[:, 1].any()


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=30))
def test_entropy_is_in_bits_over_the_whole_vocabulary(values: list[float]) -> None:
    weights = [math.exp(v - max(values)) for v in values]
    p = [w / math.fsum(weights) for w in weights]
    expected = -math.fsum(x * math.log2(x) for x in p if x > 0)
    assert harp.entropy_bits(torch.tensor([values])).item() == pytest.approx(expected, abs=1e-5)


def test_entropy_of_a_uniform_vocabulary_and_of_a_forbidden_token() -> None:
    assert harp.entropy_bits(torch.zeros(1, 1024)).item() == pytest.approx(10.0)
    forbidden = torch.tensor([[0.0, 0.0, float("-inf")]])
    assert harp.entropy_bits(forbidden).item() == pytest.approx(1.0)


def test_combination_is_on_logits() -> None:
    a, b = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 8.0]])
    mixed = harp.combine(a, b, torch.tensor([0.25, 0.5]))
    assert mixed.tolist() == [[2.5, 0.5], [2.0, 4.0]]
