"""The peers of `lath bench linear`: those that are here multiply, the others are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lath.integration import benchmark, ggml_peer
from lath.integration.peers import PEERS, PeerMissingError, PeerSetting, make_peer

TWO = PeerSetting(lambda nbytes: 2)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "COLD_BYTES", 1)
    monkeypatch.setattr(benchmark, "BLOCK_SECONDS", 1e-4)


@pytest.mark.parametrize("name", ["torch-bf16", "torch-fp32", "torch-int8"])
def test_a_peer_multiplies_in_its_own_numbers(name: str) -> None:
    """|error| of an int8 product: half a step of each operand times the other, summed over K."""
    dense, x = torch.randn(32, 128), torch.randn(3, 128)
    call, nbytes = make_peer(name, dense, x, TWO)
    steps = {"torch-bf16": 2.0**-8, "torch-fp32": 2.0**-24, "torch-int8": 1 / 254}[name]
    # oneDNN's activations have 7 bits: twice the step. The result is rounded as the operands are.
    largest = x.abs().max() * dense.abs().max()
    bound = 128 * 3 * steps * largest + 2 * steps * (x @ dense.T).abs().max()
    for i in range(3):  # the third is the first again
        y = call(i)
        assert isinstance(y, torch.Tensor)
        assert (y.float() - x @ dense.T).abs().max() <= bound
    assert nbytes == 32 * 128 * {"torch-bf16": 2, "torch-fp32": 4, "torch-int8": 1}[name]


def test_missing_peers_are_named(tmp_path: Path) -> None:
    rows, missing = benchmark.bench_linear(
        128, 32, 1, "int8", ["torch-fp32", "ggml-q4_0"], rounds=3, ggml=tmp_path
    )
    assert [row.peer for row in rows] == ["torch-fp32"]
    assert rows[0].ratio == rows[0].peer_median_us / rows[0].median_us > 0
    assert list(missing) == ["ggml-q4_0"]
    assert str(tmp_path) in missing["ggml-q4_0"]
    text = benchmark.rows_as_markdown(rows, "a command", ["Not measured: ggml-q4_0."])
    assert text.count("\n|") == 3
    assert text.endswith("Not measured: ggml-q4_0.\n")


def test_peers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"peers must be among .* got 'numpy'"):
        benchmark.bench_linear(128, 32, 1, "int8", ["numpy"], rounds=3)
    with pytest.raises(PeerMissingError, match="K of 128s and N of 16s"):
        make_peer("torch-int4", torch.randn(32, 100), torch.randn(1, 100), TWO)
    assert {f"ggml-{kind}" for kind in ggml_peer.TYPES} <= set(PEERS)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "tq2_0"])
def test_ggml_multiplies(kind: str) -> None:
    """Where ggml is: the call itself checks the product."""
    if ggml_peer.find_libraries() is None:
        pytest.skip("neither llama-cpp-python nor LATH_GGML: no ggml here")
    _, nbytes = make_peer(f"ggml-{kind}", torch.randn(32, 256), torch.randn(1, 256), TWO)
    bits = {"q4_0": 4.5, "q8_0": 8.5, "tq2_0": 2.0625}[kind]
    assert nbytes == 32 * 256 * bits / 8
