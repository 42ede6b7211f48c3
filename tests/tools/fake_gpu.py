"""Run our launchers without a GPU and keep what each launch would have compiled.

    with fake_gpu("sm_90") as recording:
        linear(x, weight, ...)                       # CPU tensors; nothing is executed
    for specialisation in recording.specialisations():
        kernel = compile_recorded(specialisation)    # a triton CompiledKernel

Inside the block `kernel[grid](...)` stops where Triton would compile: arguments are specialised by
Triton's own rules (types, constexprs, divisibility by 16), so that what gets compiled later is what
a GPU would run. Outputs stay unwritten. `fake_gpu(..., compile=True)` compiles at once.
The process must not have TRITON_INTERPRET=1: interpreted kernels never reach the compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from lath.formats.device import DeviceDescription, known_device
from tools.cache import triton_cache

KNOWN_VERSIONS = ("3.9.",)


class CompileError(RuntimeError):
    """A specialisation that does not compile: says which, for what, and the compiler's reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Specialisation:
    """One thing to compile. Equal to another one exactly if Triton would reuse its binary.

    kernel: the JITFunction. signature: argument name -> type ("*fp16", "i32", "constexpr", ...).
    constexprs and attributes: by path, a tuple of positions: (3,) is the fourth argument.
    options: what the launch asked for (num_warps, num_stages, ...).
    """

    kernel: Any
    architecture: str
    signature: Mapping[str, Any]
    constexprs: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def named_constexprs(self) -> dict[str, Any]:
        """Argument name -> value, for the constexpr arguments that are not inside a tuple."""
        names = self.kernel.arg_names
        return {names[path[0]]: v for path, v in self.constexprs.items() if len(path) == 1}

    @functools.cached_property
    def key(self) -> str:
        """sha256 of all that decides the binary, the kernel's source included."""
        parts = [self.kernel.cache_key, self.architecture, dict(self.signature)]
        parts += [sorted((p, _identity(v)) for p, v in self.constexprs.items())]
        parts += [sorted(self.attributes.items()), sorted(self.options.items())]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Specialisation) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        values = {**self.named_constexprs, **self.options}
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in values.items())
        return f"{self.name} for {self.architecture} ({shown})"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: what it runs, its grid (x, y, z), and the binary if it was compiled at once."""

    specialisation: Specialisation
    grid: tuple[int, int, int]
    kernel: Any = None


@dataclasses.dataclass
class Recording:
    """The launches of a `fake_gpu` block, in order."""

    device: DeviceDescription
    launches: list[Launch] = dataclasses.field(default_factory=list)

    def specialisations(self) -> list[Specialisation]:
        """Each different thing to compile once, in the order of its first launch."""
        return list(dict.fromkeys(launch.specialisation for launch in self.launches))


@contextlib.contextmanager
def fake_gpu(device: str | DeviceDescription, compile: bool = False) -> Iterator[Recording]:
    """Turn each launch in this block into a record; everything is restored at its end.

    device: an architecture that `known_device` knows ("sm_90", "gfx942", ...) or a description.
    compile: also compile each specialisation, once; `Launch.kernel` holds the result.
    """
    _check_process()
    if isinstance(device, str):
        device = known_device(device)
    target = target_of(device.architecture)
    recording = Recording(device)
    compiled: dict[Specialisation, Any] = {}

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        for hook in self.pre_run_hooks:
            hook(*arguments, **keywords)
        specialisation, bound = _specialise(self, device.architecture, arguments, keywords)
        kernel = None
        if compile:
            if specialisation not in compiled:
                compiled[specialisation] = compile_recorded(specialisation)
            kernel = compiled[specialisation]
        sizes = tuple(grid(bound) if callable(grid) else grid)
        launched = Launch(specialisation, (*sizes, *(1,) * (3 - len(sizes))), kernel)
        recording.launches.append(launched)
        return kernel

    stock = jit.JITFunction.run
    with _active_driver(target, device):
        jit.JITFunction.run = run
        try:
            yield recording
        finally:
            jit.JITFunction.run = stock


def compile_recorded(specialisation: Specialisation, architecture: str | None = None) -> Any:
    """The triton CompiledKernel of a specialisation (from Triton's cache if it is there).

    architecture: compile for another one of the same vendor than was recorded.
    Raises CompileError, with the compiler's reason in its message.
    """
    _check_process()
    device = known_device(architecture or specialisation.architecture)
    if target_of(device.architecture).backend != target_of(specialisation.architecture).backend:
        raise ValueError(
            f"architecture must be of the vendor of {specialisation.architecture}, for which the "
            f"arguments were specialised; got {architecture!r}"
        )
    target = target_of(device.architecture)
    source = ASTSource(
        specialisation.kernel,
        dict(specialisation.signature),
        dict(specialisation.constexprs),
        dict(specialisation.attributes),
    )
    # Triton 3.10 turns fusion of multiply and add off by default: say what we want.
    options = {"enable_fp_fusion": True, **specialisation.options}
    with _active_driver(target, device), triton_cache(), _compiler_messages() as messages:
        try:
            return triton.compile(source, target=target, options=options)
        except Exception as error:
            subject = dataclasses.replace(specialisation, architecture=device.architecture)
            reason = _reason(error, messages())
            raise CompileError(f"{subject} does not compile: {reason}") from error


@contextlib.contextmanager
def _compiler_messages() -> Iterator[Callable[[], str]]:
    """Keep what the compiler's C++ part prints on stderr (whole modules, when it fails)."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(original, 2)
            os.close(original)


def _reason(error: Exception, messages: str) -> str:
    """The compiler's reason in one line: its own exception, then its first printed error."""
    causes = [str(error.__cause__)] if error.__cause__ is not None else []
    printed = [line.split("error: ", 1)[1] for line in messages.splitlines() if "error: " in line]
    text = "; ".join([*causes, str(error), *printed[:1]])
    return " ".join(text.split())[:1500]


def target_of(architecture: str) -> GPUTarget:
    """Triton's target for "sm_90", "gfx942" and the like."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    raise ValueError(f"architecture must be sm_NN or gfxNNN, got {architecture!r}")


def _check_process() -> None:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("this process interprets kernels: start it with LATH_AOT=1 to compile")
    if not triton.__version__.startswith(KNOWN_VERSIONS):
        raise RuntimeError(
            f"tools.fake_gpu knows Triton {', '.join(v + 'x' for v in KNOWN_VERSIONS)}, "
            f"got {triton.__version__}: check JITFunction.run, then extend the list"
        )


@functools.cache
def _binder(function: Any, architecture: str) -> tuple[Any, Any]:
    """Triton's backend for an architecture and its generated argument binder for a kernel.

    Not JITFunction.device_caches: it keeps one binder per device number, whatever the target.
    """
    backend = make_backend(target_of(architecture))
    return backend, jit.create_function_from_signature(function.signature, function.params, backend)


def _specialise(
    function: Any, architecture: str, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Specialisation, dict[str, Any]]:
    backend, bind = _binder(function, architecture)
    bound, specialised, _ = bind(*arguments, **keywords)
    names = {parameter.name for parameter in function.params}
    options = {k: v for k, v in keywords.items() if k not in names and v is not None}
    _, signature, constexprs, attributes = function._pack_args(
        backend, {"enable_fp_fusion": True, **keywords}, bound, specialised, options
    )
    found = Specialisation(function, architecture, signature, constexprs, attributes, options)
    return found, bound


def _identity(value: Any) -> str:
    """A text that differs when a constexpr value means different code."""
    return str(getattr(value, "cache_key", None) or repr(value))


def _shown(value: Any) -> str:
    return str(getattr(value, "__name__", value))


class _FakeDriver:
    """The few things that Triton asks of a driver before it would launch."""

    def __init__(self, target: GPUTarget, device: DeviceDescription) -> None:
        self.target = target
        properties = {
            "max_shared_mem": device.shared_memory,
            "multiprocessor_count": device.compute_units,
            "warpSize": device.lanes,
        }
        self.utils = types.SimpleNamespace(get_device_properties=lambda index=0: properties)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def _active_driver(target: GPUTarget, device: DeviceDescription) -> Iterator[None]:
    configuration = triton.runtime.driver
    before = configuration._active
    configuration.set_active(_FakeDriver(target, device))
    try:
        yield
    finally:
        configuration._active = before
