"""The fused decode step in several threads, and what comes in between: the same bits, and a cache
that is whole after an interrupt at any point."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_cpu_processes import run_python
from test_hf_decode import decoder, fused_tokens, new_cache, patched, steps
from torch import Tensor

from hf_models import generate, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
from lath.integration import decode_cache
from lath.integration.cache import cache_argument
from lath.kernels.simd import helpers, program
from lath.kernels.simd.helpers import Team, replace_team

PROMPT, STEPS = 150, 70  # a page fills on the way

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of small models are cut as well."""
    monkeypatch.setattr(program, "PIECE_BYTES", 256)


@pytest.fixture
def team() -> Iterator[Team]:
    """Three helpers, whatever the cores and whoever else is there; they come first."""
    own = Team(3, polite=False, handicap=20_000, longest_rest=0)
    before, threads = replace_team(own), torch.get_num_threads()
    yield own
    torch.set_num_threads(threads)
    replace_team(before)
    assert own.stop(20)


KINDS: dict[str, dict[str, Any]] = {
    "floats": {},
    "int8": {"exact": False, "attention": "int8"},
    "rows select": {"select": "quest:64"},
    "asked selection": {"select": "sparq-16:64"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_every_number_of_threads_gives_the_same_bits(name: str, kind: str, team: Team) -> None:
    model = decoder(name)
    with patched(model, "fused", **KINDS[kind]) as report:
        torch.set_num_threads(1)
        expected = steps(model, PROMPT, STEPS)
        assert report.decode is not None
        assert report.decode.threads is None
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            out = steps(model, PROMPT, STEPS)
            assert torch.equal(out, expected)
            assert report.decode.threads is not None
            assert report.decode.threads.threads == threads
        assert report.decode.threads.helped > 0
        assert "threads, " in str(report.decode)
        assert fused_tokens(report) == 4 * STEPS


def test_results_of_helpers_count(team: Team) -> None:
    """Negative control: where helpers write elsewhere, logits are others once one has helped."""
    model = decoder("Llama")
    with patched(model, "fused"):
        torch.set_num_threads(1)
        expected = steps(model, PROMPT, STEPS)
        torch.set_num_threads(4)
        steps(model, PROMPT, 2)
        step = model.__dict__["_lath_decode"]._ready.step
        assert step._head is not None
        spoilt = torch.full((2048,), torch.nan)
        step._head._enter(results=spoilt.data_ptr(), results_stride=0)
        for _ in range(50):
            if not torch.equal(steps(model, PROMPT, STEPS), expected):
                return
    raise AssertionError("no helper ever came")


def test_torch_between_tokens(team: Team) -> None:
    """Nested pools: torch's own threads work between two tokens."""
    model = decoder("Llama")
    x = torch.ones(1 << 17)

    class Streamer:
        def put(self, value: Tensor) -> None:
            assert float((x + x).sum()) == 2 * x.numel()

        def end(self) -> None:
            pass

    with patched(model, "fused"):
        torch.set_num_threads(1)
        expected = generate(model, tokens(1, PROMPT), STEPS)
        torch.set_num_threads(3)
        for options in ({}, {"streamer": Streamer()}):
            assert torch.equal(generate(model, tokens(1, PROMPT), STEPS, **options), expected)


def test_python_threads_at_once(team: Team) -> None:
    """Two models, and one of them twice."""
    models = [decoder("Llama"), decoder("Qwen3")]
    for model in models:
        patched(model, "auto")
    torch.set_num_threads(1)
    expected = [generate(model, tokens(1, PROMPT), STEPS) for model in models]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        torch.set_num_threads(3)
        with torch.no_grad():
            found[number] = generate(models[number % 2], tokens(1, PROMPT), STEPS)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert torch.equal(found[number], expected[number % 2])


def test_a_forked_and_a_spawned_process() -> None:
    code = """
        import multiprocessing, os, sys, torch
        sys.path.insert(0, os.getcwd())
        from lath.kernels.simd import helpers, program
        from hf_models import tokens
        from lath.integration.cache import cache_argument as argument
        from test_hf_decode import decoder, new_cache, patched, steps

        def follow(model, cache):
            ids = tokens(1, 90)
            name = argument(model)
            return torch.stack([
                model(ids[:, i : i + 1], use_cache=True, **{name: cache}).logits[0, -1]
                for i in range(70, 90)
            ])

        def child(queue, model, expected):
            helpers.replace_team(helpers.Team(2))
            program.PIECE_BYTES = 256
            torch.set_grad_enabled(False)
            # In a forked process torch's own operations hang in more: its OpenMP is GNU's.
            torch.set_num_threads(1)
            model = model or made()
            cache = new_cache(model)
            model(tokens(1, 90)[:, :70], use_cache=True, **{argument(model): cache})
            torch.set_num_threads(3)
            out = follow(model, cache)
            team = helpers.team()
            queue.put((torch.equal(out, expected), team.started, team.stop(20)))

        def made():
            model = decoder("Llama")
            patched(model, "fused", exact=False)
            return model

        if __name__ == "__main__":
            torch.set_grad_enabled(False)
            torch.set_num_threads(3)
            program.PIECE_BYTES = 256
            helpers.replace_team(helpers.Team(2))
            model = made()
            expected = steps(model, 70, 20)
            for way in ("fork", "spawn"):
                context = multiprocessing.get_context(way)
                queue = context.SimpleQueue()
                given = model if way == "fork" else None
                process = context.Process(target=child, args=(queue, given, expected))
                process.start()
                process.join(100)
                print(way, "hangs" if process.exitcode is None else queue.get())
            print(torch.equal(steps(model, 70, 20), expected))
    """
    right = ["(True,", "2,", "True)"]
    assert run_file(code).split() == ["fork", *right, "spawn", *right, "True"]


def run_file(code: str) -> str:
    """As `run_python`, of a file: a spawned process imports it."""
    import subprocess
    import tempfile
    import textwrap
    from pathlib import Path

    tests = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main.py"
        path.write_text(textwrap.dedent(code))
        done = subprocess.run(
            [sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=tests,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# Interrupts


class Interrupting:
    """Raises KeyboardInterrupt at the n-th line that Python begins while a step counts and runs
    its token, as a signal's handler might."""

    def __init__(self, line: int) -> None:
        self.left, self.hit = line, False

    def __enter__(self) -> Interrupting:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(None)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
        inside = frame
        while inside is not None:
            if inside.f_code is decode_cache.StepCache.run.__code__:
                return self._line if "_undo" not in name else None
            inside = inside.f_back
        return None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and not self.hit:
            if self.left == 0:
                self.hit = True
                raise KeyboardInterrupt
            self.left -= 1
        return self._line


@pytest.mark.parametrize("select", [None, "sparq-16:64"])
@pytest.mark.parametrize("prompt", [40, 63, PROMPT, 191])  # within parts, and where they fill
def test_an_interrupt_leaves_the_cache_as_it_was(prompt: int, select: Any) -> None:
    """At every line of Python inside a step; then the same tokens, by the step and by modules."""
    model = decoder("Llama")
    ids = tokens(1, prompt + 3)
    name = cache_argument(model)

    def step(cache: Any, place: int) -> Tensor:
        out: Tensor = model(ids[:, place : place + 1], use_cache=True, **{name: cache}).logits
        return out

    def filled() -> Any:
        cache = new_cache(model)
        model(ids[:, :prompt], use_cache=True, **{name: cache})
        return cache

    with patched(model, "fused", select=select) as report:
        cache = filled()
        expected = [step(cache, prompt + n) for n in range(3)]
        hits, line = 0, 0
        while True:
            cache = filled()
            step(cache, prompt)
            with Interrupting(line) as interrupting:
                try:
                    step(cache, prompt + 1)
                except KeyboardInterrupt:
                    hits += 1
            length = cache.get_seq_length()
            assert {layer.slots for layer in cache.layers} == {length}
            assert {len(layer.pages) for layer in cache.layers} == {length}
            if not interrupting.hit:
                break
            assert length in (prompt + 1, prompt + 2)
            for place in range(length, prompt + 3):
                assert torch.equal(step(cache, place), expected[place - prompt]), line
            line += 1 if line < 40 else 7
        assert hits > 20
        assert fused_tokens(report) > 3 * hits


def test_an_interrupt_that_is_not_undone_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the undoing, layers are left with unlike lengths."""
    monkeypatch.setattr(decode_cache.StepCache, "_undo", lambda self: None)
    model = decoder("Llama")
    lengths = set()
    with patched(model, "fused"):
        for line in range(40):
            cache = new_cache(model)
            steps(model, PROMPT, 1, cache)
            with Interrupting(line), pytest.raises(KeyboardInterrupt):
                steps(model, 0, 1, cache)
            lengths.add(len({layer.slots for layer in cache.layers}))
    assert lengths == {1, 2}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_a_signal_in_the_middle_of_tokens(team: Team) -> None:
    """A handler that raises, after as many microseconds: the model and its cache go on."""
    model = decoder("Llama")
    name = cache_argument(model)
    ids = tokens(1, PROMPT)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with patched(model, "fused"):
            torch.set_num_threads(4)
            expected = generate(model, ids, STEPS)
            stopped = 0
            for microseconds in range(500, 40_000, 1500):
                cache = new_cache(model)
                signal.setitimer(signal.ITIMER_REAL, microseconds * 1e-6)
                try:
                    generate(model, ids, STEPS, **{name: cache})
                except KeyboardInterrupt:
                    stopped += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert torch.equal(generate(model, ids, STEPS), expected)
                length = cache.get_seq_length()
                if length > PROMPT:  # else the prompt was interrupted: a matter of the modules
                    rest = generate(model, expected[:, : length + 1], 5, **{name: cache})
                    both = min(rest.shape[1], expected.shape[1])
                    assert torch.equal(rest[:, :both], expected[:, :both])
            assert stopped > 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_two_interrupts_leave_the_undoing_to_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = decoder("Llama")
    with patched(model, "fused"):
        expected = steps(model, PROMPT, 2)
        cache = new_cache(model)
        steps(model, PROMPT, 1, cache)
        ids = tokens(1, PROMPT + 2)
        call = {"use_cache": True, cache_argument(model): cache}
        undo = decode_cache.StepCache._undo

        def interrupted(own: Any) -> None:
            if own._counting is not None:
                raise KeyboardInterrupt

        monkeypatch.setattr(decode_cache.StepCache, "_undo", interrupted)
        with pytest.raises(KeyboardInterrupt), Interrupting(12):
            model(ids[:, -1:], **call)
        monkeypatch.setattr(decode_cache.StepCache, "_undo", undo)
        assert torch.equal(model(ids[:, -1:], **call).logits[0, -1].float(), expected[1])


def test_without_helpers_on_this_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system's calls are missing, two threads are one, and it is said."""
    monkeypatch.setattr(helpers, "_has_calls", lambda: False)
    before, threads = replace_team(Team(3)), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model = decoder("Llama")
        with patched(model, "fused") as report:
            steps(model, PROMPT, 3)
            assert report.decode is not None
            assert report.decode.threads is None
        assert "no helpers on" in helpers.team().obstacle
    finally:
        torch.set_num_threads(threads)
        replace_team(before)


def test_the_file_is_imported_alone() -> None:
    assert run_python("import lath.kernels.simd.helpers; print('ok')").strip() == "ok"
