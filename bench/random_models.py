"""Models of a given shape with random weights, as Hugging Face folders and as GGUF files.

They are written piece by piece: no more than one matrix is ever in memory. What a model says is
noise, but its speed and its memory are those of a trained one of that shape.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

_ROPE, _EPSILON, _CONTEXT = 500000.0, 1e-5, 4096


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's shape; ternary: BitNet's, its linear layers packed in their folder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    ternary: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a layer: [N, K] by the last part of their names."""
        kv = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    def norms(self) -> dict[str, int]:
        own = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
        if self.ternary:
            own |= {"self_attn.attn_sub_norm": self.hidden, "mlp.ffn_sub_norm": self.inner}
        return own


SHAPES = {
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128256),
    "bitnet-2b": Shape(2560, 30, 20, 5, 6912, 128256, ternary=True),
    "llama-small": Shape(1024, 12, 16, 4, 4096, 32000),
    "bitnet-small": Shape(1280, 12, 20, 5, 3328, 32000, ternary=True),
}  # fmt: skip


def write_folder(shape: Shape, folder: Path, seed: int = 0) -> None:
    """config.json and a file of bf16 or, of ternary layers, packed safetensors for each layer."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(shape, folder)
    where: dict[str, str] = {}

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    embedding = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16)
    for piece in embedding.split(4096):
        piece.copy_(torch.randn(piece.shape, generator=generator) * 0.02)
    write(
        "model-embedding.safetensors",
        {"model.embed_tokens.weight": embedding, "model.norm.weight": _ones(shape.hidden)},
    )
    del embedding
    for number in range(shape.layers):
        prefix, tensors = f"model.layers.{number}.", {}
        for name, (rows, columns) in shape.matrices().items():
            if shape.ternary:
                tensors |= _ternary(f"{prefix}{name}", rows, columns, generator)
            else:
                weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
                tensors[f"{prefix}{name}.weight"] = weight.bfloat16()
        for name, size in shape.norms().items():
            tensors[f"{prefix}{name}.weight"] = _ones(size)
        write(f"model-{number:03d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def _ternary(name: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    packed = torch.zeros(-(-rows // 4), columns, dtype=torch.uint8)
    for field in range(4):
        codes = torch.randint(0, 3, packed.shape, generator=generator, dtype=torch.uint8)
        packed |= codes << (2 * field)
    # "autobitlinear" multiplies by its scale: numbers of variance 1 / K.
    scale = torch.tensor([(1.5 / columns) ** 0.5], dtype=torch.bfloat16)
    return {f"{name}.weight": packed, f"{name}.weight_scale": scale}


def _write_config(shape: Shape, folder: Path) -> None:
    from transformers import BitNetConfig, LlamaConfig

    kind = BitNetConfig if shape.ternary else LlamaConfig
    config = kind(
        architectures=["BitNetForCausalLM" if shape.ternary else "LlamaForCausalLM"],
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=_CONTEXT,
        rms_norm_eps=_EPSILON, rope_parameters={"rope_type": "default", "rope_theta": _ROPE},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    if shape.ternary:
        written = json.loads((folder / "config.json").read_text())
        written["quantization_config"] = {
            "quant_method": "bitnet", "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(written))


# GGUF


@dataclass(frozen=True)
class _Type:
    """A tensor type of ggml: its number, values and bytes of a block."""

    number: int
    block: int
    nbytes: int


_TYPES = {
    "F32": _Type(0, 1, 4), "Q4_0": _Type(2, 32, 18), "Q8_0": _Type(8, 32, 34),
    "TQ2_0": _Type(35, 256, 66),
}  # fmt: skip
_ALIGNMENT = 32
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}  # fmt: skip


def write_gguf(shape: Shape, file: Path, layers: str, head: str, seed: int = 0) -> None:
    """A model without a vocabulary. layers, head: types of the linear layers and of the embedding,
    which is the output layer too. Its architecture is "bitnet" where the shape is ternary: that
    has the sub-norms, with SiLU in the place of the squared ReLU."""
    random = np.random.default_rng(seed)
    table: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (shape.vocabulary, shape.hidden), head),
        ("output_norm.weight", (shape.hidden,), "F32"),
    ]
    for number in range(shape.layers):
        for name, size in shape.norms().items():
            table.append((f"blk.{number}.{_GGUF_NAMES[name]}.weight", (size,), "F32"))
        for name, sizes in shape.matrices().items():
            table.append((f"blk.{number}.{_GGUF_NAMES[name]}.weight", sizes, layers))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        _write_header(shape, out, table)
        for _, sizes, kind in table:
            _pad(out)
            for piece in _blocks(sizes, kind, random):
                out.write(piece.tobytes())


def _blocks(
    sizes: tuple[int, ...], kind: str, random: np.random.Generator
) -> Iterator[NDArray[Any]]:
    """Random blocks of a tensor with variance 1 / K, a few thousand at once."""
    if kind == "F32":
        yield np.ones(sizes, np.float32)
        return
    layout, columns = _TYPES[kind], sizes[-1]
    count = sizes[0] * columns // layout.block
    for start in range(0, count, 1 << 16):
        some = min(1 << 16, count - start)
        yield _MAKERS[kind](some, columns, random)


def _halves(value: float, count: int) -> NDArray[np.uint8]:
    return np.full((count, 1), value, np.float16).view(np.uint8)


def _q4_0(count: int, columns: int, random: np.random.Generator) -> NDArray[np.uint8]:
    codes = random.integers(0, 256, (count, 16), np.uint8)
    return np.concatenate([_halves((columns * 21.5) ** -0.5, count), codes], axis=1)


def _q8_0(count: int, columns: int, random: np.random.Generator) -> NDArray[np.uint8]:
    codes = random.integers(0, 256, (count, 32), np.uint8)
    return np.concatenate([_halves((columns * 5461.0) ** -0.5, count), codes], axis=1)


def _tq2_0(count: int, columns: int, random: np.random.Generator) -> NDArray[np.uint8]:
    fields = random.integers(0, 3, (4, count, 64), np.uint8)
    codes = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    return np.concatenate([codes, _halves((1.5 / columns) ** 0.5, count)], axis=1)


_MAKERS: dict[str, Callable[[int, int, np.random.Generator], NDArray[np.uint8]]] = {
    "Q4_0": _q4_0, "Q8_0": _q8_0, "TQ2_0": _tq2_0,
}  # fmt: skip


def _write_header(
    shape: Shape, out: BinaryIO, table: list[tuple[str, tuple[int, ...], str]]
) -> None:
    name = "bitnet" if shape.ternary else "llama"
    entries: dict[str, int | float | str] = {
        "general.architecture": name, f"{name}.block_count": shape.layers,
        f"{name}.context_length": _CONTEXT, f"{name}.embedding_length": shape.hidden,
        f"{name}.feed_forward_length": shape.inner, f"{name}.attention.head_count": shape.heads,
        f"{name}.attention.head_count_kv": shape.kv_heads,
        f"{name}.attention.layer_norm_rms_epsilon": _EPSILON,
        f"{name}.rope.freq_base": _ROPE, f"{name}.rope.dimension_count": shape.head_dim,
        f"{name}.vocab_size": shape.vocabulary, "tokenizer.ggml.model": "no_vocab",
        "general.alignment": _ALIGNMENT,
    }  # fmt: skip
    out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(table), len(entries)))
    for key, value in entries.items():
        out.write(_text(key))
        if isinstance(value, str):
            out.write(struct.pack("<I", 8) + _text(value))
        else:
            form = "<If" if isinstance(value, float) else "<II"
            out.write(struct.pack(form, 6 if isinstance(value, float) else 4, value))
    offset = 0
    for tensor, sizes, kind in table:
        layout = _TYPES[kind]
        out.write(_text(tensor) + struct.pack("<I", len(sizes)))
        out.write(struct.pack(f"<{len(sizes)}Q", *sizes[::-1]))
        out.write(struct.pack("<IQ", layout.number, offset))
        nbytes = int(np.prod(sizes)) // layout.block * layout.nbytes
        offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % _ALIGNMENT))
