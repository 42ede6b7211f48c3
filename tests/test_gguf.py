"""The GGUF reader on files written here, and the conversion of a Llama from one."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lath
from lath.integration import models, skeleton, smollm2
from lath.integration.gguf import read_gguf
from lath.integration.gguf_llama import LAYER_NAMES, GgufCheckpoint
from lath.integration.linear import PackedLinear
from lath.integration.store import ModelError

pytest.importorskip("transformers")

STRING, UINT32, FLOAT32, BOOL, ARRAY, INT32 = 8, 4, 6, 7, 9, 5
F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    kind = STRING if isinstance(value[0], str) else INT32
    items = b"".join(_string(v) if kind == STRING else struct.pack("<i", v) for v in value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + items


Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]


def write_gguf(metadata: dict[str, Any], tensors: Tensors) -> bytes:
    """A GGUF file of tensors given as (type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % 32) + data


def test_gguf_blocks_and_metadata() -> None:
    rng = np.random.default_rng(0)
    d, m = np.float16(0.125), np.float16(-1.5)
    codes = rng.integers(0, 16, 32).astype(np.uint8)
    signed = rng.integers(-128, 128, 32).astype(np.int8)
    q4_1 = d.tobytes() + m.tobytes() + (codes[:16] | codes[16:] << 4).astype(np.uint8).tobytes()
    q8_0 = d.tobytes() + signed.tobytes()
    plain = rng.standard_normal((3, 5)).astype(np.float32)
    metadata = {"a": "é", "b": 7, "c": 0.5, "d": True, "e": ["x", "yz"], "f": [1, -2]}
    file = read_gguf(
        write_gguf(
            metadata,
            {
                "four": (Q4_1, (1, 32), q4_1),
                "eight": (Q8_0, (2, 32), q8_0 * 2),
                "plain": (F32, (3, 5), plain.tobytes()),
                "half": (F16, (3, 5), plain.astype(np.float16).tobytes()),
            },
        )
    )
    assert file.metadata == metadata
    np.testing.assert_array_equal(file.tensors["four"].values()[0], codes * 0.125 - 1.5)
    np.testing.assert_array_equal(file.tensors["eight"].values()[1], signed * 0.125)
    np.testing.assert_array_equal(file.tensors["plain"].values(), plain)
    np.testing.assert_array_equal(file.tensors["half"].values(), plain.astype(np.float16))


def test_gguf_that_is_cut_short_or_unknown_is_refused() -> None:
    whole = write_gguf({"a": "text", "b": [1, 2]}, {"t": (F32, (2, 2), b"\0" * 16)})
    read_gguf(whole)
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="GGUF"):
            read_gguf(whole[:length])
    with pytest.raises(ValueError, match="version"):
        read_gguf(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(ValueError, match="type number 77"):
        read_gguf(write_gguf({}, {"t": (77, (2, 2), b"\0" * 16)}))
    with pytest.raises(ValueError, match="whole blocks"):
        read_gguf(write_gguf({}, {"t": (Q4_1, (3, 5), b"\0" * 20)}))


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of GGUF: the two halves of each head in turn."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _as_gguf(model: Any) -> bytes:
    """The tiny model as a GGUF file of fp32 tensors with a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    config = model.config
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "Ġth"]
    metadata = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(words) - 3),
        "tokenizer.ggml.merges": ["t h", "Ġ th"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    names = {new: old for old, new in LAYER_NAMES.items()}
    tensors = {}
    for key, value in model.state_dict().items():
        array, parts = value.numpy(), key.removesuffix(".weight").split(".")
        if key == "lm_head.weight":
            continue
        if parts[1] == "layers":
            part = names[".".join(parts[3:])]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            array = _interleaved(array, heads[part]) if part in heads else array
            name = f"blk.{parts[2]}.{part}.weight"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
        tensors[name] = (F32, array.shape, np.ascontiguousarray(array).tobytes())
    return write_gguf(metadata, tensors)


def test_q4_0_blocks() -> None:
    codes = np.random.default_rng(0).integers(0, 16, 64).astype(np.uint8).reshape(2, 32)
    half = np.full((2, 1), 0.25, np.float16).view(np.uint8)
    blocks = np.concatenate([half, codes[:, :16] | codes[:, 16:] << 4], axis=1)
    file = read_gguf(write_gguf({}, {"t": (Q4_0, (2, 32), blocks.tobytes())}))
    np.testing.assert_array_equal(file.tensors["t"].values(), 0.25 * (codes.astype(np.float32) - 8))


@pytest.mark.parametrize("pieces", [1 << 19, 96 * 16])
def test_a_file_is_loaded_packed(
    tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 16 rows are whole heads of the tiny model, and then two or more."""
    monkeypatch.setattr(skeleton, "_CHUNK_WEIGHTS", pieces)
    model, _ = models.tiny_model()
    file = tmp_path / "tiny.gguf"
    file.write_bytes(_as_gguf(model))
    loaded = lath.load(file, "int4-g32", head=None, backend="reference")
    lath.patch(model, "int4-g32", backend="reference")
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            found = loaded.get_submodule(name)
            assert found.qtensor.digest() == module.qtensor.digest(), name
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_rows_of_any_piece_of_a_head(tmp_path: Path) -> None:
    model, _ = models.tiny_model()
    file = tmp_path / "tiny.gguf"
    file.write_bytes(_as_gguf(model))
    checkpoint = GgufCheckpoint(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    for start, stop in ((0, 96), (3, 4), (5, 33), (90, 96)):
        piece = checkpoint.rows(name, start, stop)
        assert torch.equal(piece, model.get_parameter(name)[start:stop])


@pytest.mark.parametrize(
    ("metadata", "tensor", "match"),
    [
        ({"general.architecture": "gemma"}, "token_embd.weight", "architecture is 'gemma'"),
        ({"llama.rope.scaling.type": "yarn"}, "token_embd.weight", "scaled by 'yarn'"),
        ({}, "rope_freqs.weight", "rope_freqs.weight, which a plain Llama has not"),
        ({}, "token_embd.weight", "has no 'llama.attention.head_count'"),
    ],
)
def test_files_that_are_no_plain_llama(
    tmp_path: Path, metadata: dict[str, Any], tensor: str, match: str
) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(write_gguf(metadata, {tensor: (F32, (2, 2), b"\0" * 16)}))
    with pytest.raises(ModelError, match=match):
        lath.load(file, backend="reference")
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot read"):
        lath.load(file, backend="reference")


def test_a_converted_llama_is_the_same_model(tmp_path: Path) -> None:
    model, _ = models.tiny_model()
    smollm2.convert_llama(read_gguf(_as_gguf(model)), tmp_path)
    loaded, tokenizer = models.load_model(str(tmp_path))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.float32
    text = "<|im_start|>the 12  34 é\n日本"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode(i) for i in tokenizer("the 12 th").input_ids]
    assert pieces == ["th", "e", " ", "1", "2", " th"]
    bfloat, _ = models.load_model(str(tmp_path), "bfloat16")
    assert bfloat.dtype == torch.bfloat16
