"""A GGUF file of the architecture "llama" as the Hugging Face model that it stands for: its config,
the names of its tensors, the order of its rows; read a piece at a time, for `lath.load`."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.integration.gguf import GgufTensor, read_gguf
from lath.integration.store import ModelError

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def hugging_face_name(name: str) -> str:
    """ "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"; KeyError for a tensor that
    a Llama does not have."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"{OTHER_NAMES[parts[0]]}.{parts[1]}"


def rotated_heads(metadata: dict[str, Any], name: str) -> int:
    """The heads of a tensor whose rows GGUF interleaves; 0 of any other."""
    keys = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    parts = name.split(".")
    key = keys.get(parts[2]) if parts[0] == "blk" else None
    return int(metadata[key]) if key else 0


def rows_in_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the row order of GGUF, which interleaves the two halves that the rotation pairs."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def llama_config(metadata: dict[str, Any], tied: bool) -> Any:
    """The LlamaConfig of a file. tied: it has no output layer of its own."""
    from transformers import LlamaConfig

    heads = metadata["llama.attention.head_count"]
    tokens = {
        field: metadata[f"tokenizer.ggml.{name}_token_id"]
        for name, field in _TOKENS.items()
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.embedding_length"] // heads,
        max_position_embeddings=metadata["llama.context_length"],
        # The file holds 1e-5 as fp32; the shortest decimal of that number is what was meant.
        rms_norm_eps=float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={
            "rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        },
        tie_word_embeddings=tied,
        **tokens,
    )  # fmt: skip


class GgufCheckpoint:
    """The tensors of a file by their Hugging Face names, as `Checkpoint` has those of a folder; all
    are fp32. ModelError for a file that is damaged, of another architecture, or has tensors or a
    rotation that a plain Llama does not have."""

    folder = None  # what else there is beside it

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as opened:
                # Only the header is ever touched: what is mapped counts once it was.
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            found = read_gguf(memoryview(self._map))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {file}: {error}") from error
        self.metadata = found.metadata
        self._base = np.frombuffer(self._map, np.uint8).ctypes.data
        architecture = self.metadata.get("general.architecture", "llama")
        scaling = self.metadata.get("llama.rope.scaling.type", "none")
        if architecture != "llama" or scaling != "none":
            raise ModelError(
                f"{file} must be a plain Llama; its architecture is {architecture!r}, its rotation "
                f"is scaled by {scaling!r}"
            )
        self._tensors: dict[str, tuple[GgufTensor, int]] = {}
        for name, tensor in found.tensors.items():
            try:
                heads = rotated_heads(self.metadata, name)
                self._tensors[hugging_face_name(name)] = (tensor, heads)
            except (KeyError, IndexError) as error:
                raise ModelError(f"{file} has {name}, which a plain Llama has not") from error

    @property
    def config(self) -> Any:
        """ModelError where the metadata lack something."""
        try:
            return llama_config(self.metadata, "lm_head.weight" not in self._tensors)
        except KeyError as error:
            raise ModelError(f"{self.file} has no {error}") from error

    @property
    def names(self) -> KeysView[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][0].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of a tensor."""
        tensor, heads = self._tensors[name]
        if heads == 0:
            return torch.from_numpy(self._values(tensor, start, stop))
        size = tensor.shape[0] // heads
        first, last = start // size, -(-stop // size)  # of the heads that are touched
        values = rows_in_halves(self._values(tensor, first * size, last * size), last - first)
        return torch.from_numpy(values[start - first * size : stop - first * size])

    def _values(self, tensor: GgufTensor, start: int, stop: int) -> NDArray[np.float32]:
        row = tensor.raw.nbytes // tensor.shape[0]
        raw = np.empty((stop - start) * row, np.uint8)
        try:
            with self.file.open("rb") as opened:
                opened.seek(tensor.raw.ctypes.data - self._base + start * row)
                got = opened.readinto(raw.data)
        except OSError as error:
            raise ModelError(f"cannot read {self.file}: {error}") from error
        if got != raw.nbytes:
            raise ModelError(f"cannot read {self.file}: it is cut short")
        shape = (stop - start, *tensor.shape[1:])
        return dataclasses.replace(tensor, shape=shape, raw=raw).values()
