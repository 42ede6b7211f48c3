"""`lath.key_channel_scales`: commutes with RoPE where it says so, and lowers the error of int4."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lath.formats.pages import PageCodec, PageFormat
from lath.reference import pages
from lath.verbs.channel_scales import key_channel_scales


def rotate(x: Tensor, pairs: str) -> Tensor:
    """RoPE of x [B, H, L, D] at positions 0 .. L - 1."""
    channels = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * frequency
    first, second = x.chunk(2, dim=-1) if pairs == "half" else (x[..., 0::2], x[..., 1::2])
    turned = (
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
    )
    if pairs == "half":
        return torch.cat(turned, dim=-1)
    return torch.stack(turned, dim=-1).flatten(-2)


def outlier_keys() -> Tensor:
    keys = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    keys[..., ::9] *= 20
    return keys


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_scales_of_pairs_commute_with_rope(pairs: str) -> None:
    keys = outlier_keys()
    scales = key_channel_scales(keys.float(), rotary_pairs=pairs).double()[None, :, None]
    torch.testing.assert_close(rotate(keys / scales, pairs), rotate(keys, pairs) / scales)
    unpaired = key_channel_scales(keys.float()).double()[None, :, None]
    difference = rotate(keys / unpaired, pairs) - rotate(keys, pairs) / unpaired
    assert difference.abs().max() > 0.1  # without shared scales it does not


def test_scales_lower_the_error_of_int4_keys() -> None:
    keys = rotate(outlier_keys(), "half").float()
    fmt = PageFormat(PageCodec("int4"), PageCodec("int4"), 32, 32, 4)
    scales = key_channel_scales(keys)

    def score_error(scales: Tensor) -> float:
        query = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).double()
        stored = (keys[0, 0] / scales).numpy()
        read = torch.from_numpy(pages.read_page(*pages.write_page(stored, stored, fmt), fmt).keys)
        error = query @ (read * scales - keys[0, 0]).T
        return float(error.abs().mean())

    assert score_error(scales[0]) < 0.7 * score_error(torch.ones(32))


def test_mean_power_and_zero_channels() -> None:
    keys = outlier_keys().float()
    keys[..., 5] = 0
    scales = key_channel_scales(keys)
    used = torch.arange(32) != 5
    assert (scales[:, 5] == 1).all()
    assert scales[:, used].log().sum(dim=1).abs().max() < 1e-4
    assert (key_channel_scales(keys, power=0.0) == 1).all()
    assert key_channel_scales(keys[:, :, :0]).shape == (3, 32)


def test_bad_input_is_named() -> None:
    keys = outlier_keys().float()
    with pytest.raises(ValueError, match="keys must be"):
        key_channel_scales(keys[0])
    with pytest.raises(ValueError, match="rotary_pairs must be"):
        key_channel_scales(keys, rotary_pairs="third")
    with pytest.raises(ValueError, match="power must be"):
        key_channel_scales(keys, power=2.0)
    with pytest.raises(ValueError, match="finite"):
        key_channel_scales(keys * math.inf)
    with pytest.raises(ValueError, match="even D"):
        key_channel_scales(keys[..., :31], rotary_pairs="half")
    with pytest.raises(TypeError, match="keys must be"):
        key_channel_scales("keys")  # type: ignore[arg-type]
