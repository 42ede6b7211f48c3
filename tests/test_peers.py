"""The peers of `lath bench linear`: those that are here multiply, the others are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lath.formats.activations import activation_format
from lath.integration import benchmark, bitnet_peer, ceilings, ggml_peer, onnx_peer, peers
from lath.integration.peers import PEERS, PeerMissingError, PeerSetting, make_peer

TWO = PeerSetting(lambda nbytes: 2)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COLD_BYTES", 1)
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
        128, 32, 1, "int8", ["torch-fp32", "ggml-q4_0"], rounds=3, paths={"ggml": tmp_path}
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


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("kind", ggml_peer.VLUT_TYPES)
def test_vlut_multiplies(kind: str, tokens: int) -> None:
    """Where vlut.cpp is; more than one of its tiles of 32 tokens may be refused, with the error."""
    if ggml_peer.find_vlut() is None:
        pytest.skip("LATH_VLUT gives no folder: no vlut.cpp here")
    dense, x = torch.randn(32, 320), torch.randn(tokens, 320)
    try:
        _, nbytes = make_peer(f"vlut-{kind}", dense, x, TWO)
    except PeerMissingError as error:
        assert tokens > 32
        assert "product is off by" in str(error)  # noqa: PT017
        return
    assert nbytes == 32 * 320 * (1.6 if kind.startswith("i1") else 2) / 8


@pytest.mark.parametrize("tokens", [1, 5])
def test_bitnet_multiplies(tokens: int) -> None:
    """Exactly, where x is whole numbers of which the largest of each token is 127."""
    if bitnet_peer.find_library() is None:
        pytest.skip("LATH_BITNET gives no library: no bitnet.cpp here")
    ternary = torch.randint(-1, 2, (37, 256)).float()
    x = torch.randint(-126, 127, (tokens, 256)).float()
    x[:, 3] = 127
    path = bitnet_peer.find_library()
    assert path is not None
    call, nbytes = bitnet_peer.bitnet_call(ternary, x, 2, path, 1)
    for i in range(3):
        assert torch.equal(call(i), x @ ternary.T)
    assert nbytes == 37 * 256 // 4 + bitnet_peer.TAIL


@pytest.mark.parametrize(("block", "tokens"), [(32, 1), (128, 7)])
def test_onnxruntime_multiplies(block: int, tokens: int) -> None:
    """Within what int8 activations in blocks lose: half a step of 127 in each product."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    dense, x = torch.randn(48, 256), torch.randn(tokens, 256)
    call, nbytes = make_peer(f"onnxruntime-g{block}", dense, x, TWO)
    codes, scales = onnx_peer.pack_blocks(dense, block)
    assert nbytes == 48 * 256 // 2 + 48 * (256 // block) * 4
    whole = torch.from_numpy(codes).int()
    wide = torch.stack([whole & 15, whole >> 4], dim=-1).reshape(48, 256) - onnx_peer.ZERO
    steps = torch.from_numpy(scales).reshape(48, -1).repeat_interleave(block, dim=1)
    weight = wide * steps
    assert (weight - dense).abs().max() <= steps.max() / 2 * (1 + 1e-5)
    error = x.abs().max() / 127 / 2 * weight.abs().sum(dim=1)
    for i in range(3):
        y = call(i)
        assert isinstance(y, torch.Tensor)
        assert ((y - x @ weight.T).abs() <= error + 1e-4).all()
        assert not ((y - x @ weight.flip(0).T).abs() <= error + 1e-4).all()


def test_each_peer_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a path, with a wrong one, with a file that is no library, without a package."""
    for name in ("LATH_GGML", "LATH_VLUT", "LATH_BITNET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(ggml_peer.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "library.so"
    file.write_text("no library")
    (tmp_path / "libggml-cpu.so").write_text("no library")
    (tmp_path / "libggml-base.so").write_text("no library")
    nowhere = tmp_path / "nowhere"
    cases = [
        ("onnxruntime-g32", {}, "onnxruntime and onnx not installed: pip install"),
        ("ggml-q4_0", {}, "llama-cpp-python is not installed"),
        ("ggml-q4_0", {"ggml": nowhere}, str(nowhere)),
        ("ggml-q4_0", {"ggml": tmp_path}, "libggml-base.so"),
        ("vlut-i2_v", {}, "--vlut gives no path"),
        ("vlut-i2_v", {"vlut": nowhere}, f"none at {nowhere}"),
        ("bitnet-i2_s", {}, "--bitnet gives no path; bench/bitnet_i2_s.cpp"),
        ("bitnet-i2_s", {"bitnet": nowhere}, f"none at {nowhere}"),
        ("bitnet-i2_s", {"bitnet": file}, "library.so"),
    ]
    for name, paths, message in cases:
        setting = PeerSetting(lambda nbytes: 2, 1, paths)
        with pytest.raises(PeerMissingError) as raised:
            make_peer(name, torch.randn(32, 256), torch.randn(1, 256), setting)
        assert message in str(raised.value)


def test_a_wrong_product_is_a_missing_peer() -> None:
    x, dense = torch.randn(2, 64), torch.randn(8, 64)
    ggml_peer.check_product(x @ dense.T, dense, x, 1e-5, "a")
    with pytest.raises(ggml_peer.WrongProductError, match="a product is off by"):
        ggml_peer.check_product((x @ dense.T).flip(0), dense, x, 0.9, "a")
    with pytest.raises(ggml_peer.WrongProductError):
        peers._checked(lambda i: torch.zeros(2, 8), dense, x, 0.9, "a")


def test_shares_of_what_the_machine_can_do() -> None:
    """A row without peers; shares are the row's own figures over its ceilings."""
    rows, missing = benchmark.bench_linear(128, 64, 2, "int8", [], rounds=3)
    assert not missing
    (row,) = rows
    assert row.peer == ""
    assert row.of_dots == row.gops / row.ceilings.gops
    view = row.of_read * row.ceilings.gb_per_s * row.median_us * 1e3
    assert 128 * 64 <= view <= 1.2 * 128 * 64  # codes of int8, their scales and padding
    text = benchmark.rows_as_markdown(rows, "a command")
    assert f"{row.of_dots:.2f} ({row.ceilings.gops:.0f}) |" in text
    (row,) = benchmark.bench_linear(128, 64, 2, "int8", [], activation_format("float"), rounds=3)[0]
    assert row.of_dots is None
