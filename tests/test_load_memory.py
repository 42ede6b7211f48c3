"""How much memory `lath.load` and decoding behind it take, at the most, in a process of their own.

A model of 236 MB when packed. What a process imports and compiles once is there before, from a
model of one layer that was loaded and generated first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lath.integration.checkpoint import Checkpoint
from lath.integration.load import load

SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip
CHILD = """
import json, sys
import torch
import lath
from lath.integration.cache import cache_argument
from lath.integration.measure import generate, peak_bytes, reset_peak, resident_bytes
from lath.integration.report import model_bytes

torch.set_grad_enabled(False)

def run(folder, keep):
    model = lath.load(folder, "int4-g32", keep_codes=keep)
    patched = lath.patch(model, None, attention="int8", kv="int8", decode="fused")
    cache = patched.new_cache()
    ids = torch.arange(3, 67)[None]
    generate(model, ids, 16, min_new_tokens=16, **{cache_argument(model): cache})
    assert patched.decode.counts["fused"] == 15
    return model, cache

small, folder, keep = sys.argv[1:]
run(small, keep == "keep")
reset_peak()
before = resident_bytes()
model, cache = run(folder, keep == "keep")
print(json.dumps([peak_bytes() - before, model_bytes(model), cache.nbytes]))
"""


def write_model(folder: Path, layers: int, vocabulary: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=vocabulary)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names: dict[str, str] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        tensor = torch.ones(parameter.shape)
        if parameter.dim() == 2:
            tensor.normal_(std=parameter.shape[1] ** -0.5)
        names[name] = f"{number}.safetensors"
        save_file({name: tensor.bfloat16()}, folder / names[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def measured(small: Path, folder: Path, keep: str) -> tuple[int, int, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(folder), keep],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak, packed, cache = json.loads(done.stdout)
    return peak, packed, cache


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_the_packed_model(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    small, folder = tmp_path / "small", tmp_path / "large"
    write_model(small, 1, 512)
    write_model(folder, 16, 32000)
    peak, packed, cache = measured(small, folder, "")
    assert packed > 200e6
    assert peak <= 1.15 * (packed + cache)
    peak, packed, cache = measured(small, folder, "keep")
    assert peak > 1.5 * (packed + cache)  # negative control: codes beside the views


def test_no_more_than_a_piece_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is gone before the next piece is."""
    write_model(tmp_path, 1, 2048)
    alive: list[Any] = []
    most = 0

    def watched(real: Any) -> Any:
        def read(self: Checkpoint, name: str, *rows: int) -> Tensor:
            nonlocal most
            tensor: Tensor = real(self, name, *rows)
            storage = tensor.untyped_storage()
            alive.append((torch.UntypedStorage._weak_ref(storage), storage.nbytes()))
            alive[:] = [one for one in alive if not torch.UntypedStorage._expired(one[0])]
            most = max(most, sum(nbytes for _, nbytes in alive))
            return tensor

        return read

    for name in ("read", "rows"):
        monkeypatch.setattr(Checkpoint, name, watched(getattr(Checkpoint, name)))
    load(tmp_path, "int4-g32", backend="reference")
    assert most <= 2 * (1 << 19) * 2 + 8192  # two pieces: one is dropped after the next is there
