"""PackedLinear: the module that takes the place of nn.Linear and holds one packed weight.

Two ways lead to the kernel. A plain tensor on the CPU that needs no gradient goes straight to the
compiled kernel, prepared once and kept on the module: a custom op alone would cost 20 to 40 µs a
call there. Everything else (another device, gradients, torch.compile, torch.export) goes through
`lath.linear`, which knows what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.families import load_weight, weight_class, weight_codec
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.qtensor import QTensor
from lath.formats.viewed import ViewedTensor
from lath.verbs.backends import BACKENDS, resolve_backend
from lath.verbs.kinds import kind_of
from lath.verbs.linear import linear
from lath.verbs.quantize import quantize

# Tensor of the packed weight → parameter of the module, where it is not "weight_" and its name.
_PARAMETERS = {"codes": "weight", "scales": "weight_scale", "zeros": "weight_zero"}
META = "weight_meta"


def _parameter_of(tensor: str) -> str:
    return _PARAMETERS.get(tensor, f"weight_{tensor}")


def tensor_of(parameter: str) -> str:
    """The tensor of a packed weight that a parameter of a module holds; of META, "meta"."""
    names = {own: tensor for tensor, own in _PARAMETERS.items()}
    return names.get(parameter, parameter.removeprefix("weight_"))


class PackedLinear(nn.Module):
    """y = x Wᵀ + bias with W packed: x [..., in_features] → [..., out_features] of x's dtype.

    Parameters, none of which takes a gradient: `weight` (packed codes), the other tensors of the
    packed weight (`weight_scale`; `weight_zero`, `weight_outer`, `weight_table`, ... if the codec
    has them) and `bias` (or None). The state_dict holds `weight_meta` besides: codec, shape and a
    digest, checked when it is loaded.

    Casting the module (`model.half()`, `.to(dtype)`) leaves the packed numbers as they are; moving
    it moves them. Gradients reach x (the rounding of activations counts as the identity), never the
    weight. The module follows x's dtype, torch.autocast included: it computes in fp32 inside.
    Parameters that are loaded, moved, assigned or written in place take effect at once, but for
    what torch does not count: numbers written through `.data`, or into tensors of inference mode.

    On a CPU the compiled kernel reads a view, repacked from the codes and as large: `compact()`
    keeps that alone. The parameters of the packed weight are on the meta device then.
    """

    weight: Tensor
    bias: Tensor | None
    # How the codes were chosen, where `lath.patch` made this module.
    quantizer: str = "rtn"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codec: str | WeightCodec = "int4-g64",
        activations: str | ActivationFormat = "float",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty module, to be filled by `load_state_dict`. dtype: of the bias."""
        super().__init__()
        device = torch.get_default_device() if device is None else device
        parsed = weight_codec(codec)
        packed = weight_class(parsed).empty(parsed, (out_features, in_features), device)
        values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self._set_up(packed, values, activations, backend, dtype or torch.get_default_dtype())

    @classmethod
    def from_qtensor(
        cls,
        weight: PackedWeight,
        bias: Tensor | None = None,
        *,
        activations: str | ActivationFormat = "float",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """The module of a packed weight [N, K] and a bias [N]; both are kept, not copied.

        dtype: what a dense weight would have; by default the bias's or torch's default.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
        known = torch.get_default_dtype() if bias is None else bias.dtype
        module._set_up(weight, bias, activations, backend, dtype or known)
        return module

    @classmethod
    def from_linear(
        cls,
        source: nn.Linear,
        codec: str | WeightCodec,
        activations: str | ActivationFormat = "float",
        backend: str = "auto",
        search: bool = False,
    ) -> PackedLinear:
        """The packed form of an nn.Linear, whose weight is read and whose bias is copied."""
        module = cls.from_qtensor(
            quantize(source.weight.detach(), codec, search=search),
            None if source.bias is None else source.bias.detach().clone(),
            activations=activations,
            backend=backend,
            dtype=source.weight.dtype,
        )
        return module.train(source.training)

    def _set_up(
        self,
        packed: PackedWeight,
        bias: Tensor | None,
        activations: str | ActivationFormat,
        backend: str,
        dtype: torch.dtype,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.out_features, self.in_features = packed.shape
        self._last = (self.in_features,)
        self.codec = packed.codec
        self.activations = activation_format(activations)
        self.backend = backend
        # What `weight.dtype` would be if the weight were dense: followed through casts, so that
        # the module which this one replaced can be given the same dtype when it comes back.
        self.dense_dtype = dtype
        self._packed: PackedWeight | None = None
        self._kernel: Callable[[Tensor], Tensor] | None = None
        # Parameter → tensor of the packed weight.
        self._parts = {_parameter_of(name): name for name in packed.tensors}
        for name, part in self._parts.items():
            self.register_parameter(name, _frozen(getattr(packed, part)))
        self.register_parameter("bias", _frozen(bias))
        self._written = self._writes()

    def _writes(self) -> list[tuple[int, int]]:
        """Where each parameter lies, and how often it was written in place as torch counts it."""
        own = [p for p in self._parameters.values() if p is not None]
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in own]

    def _notice(self) -> None:
        """Forget what was made of parameters that were written in place since."""
        writes = self._writes()
        if writes != self._written:
            self._written, self._kernel = writes, None
            self._packed = self._packed if self.is_compact else None

    @property
    def qtensor(self) -> PackedWeight:
        """The weight; its tensors are this module's parameters."""
        if not torch.compiler.is_compiling():
            self._notice()
        packed = self._packed
        if packed is None:
            packed = self._of_parameters()
            if not torch.compiler.is_compiling():
                self._packed = packed
        return packed

    @property
    def device(self) -> torch.device:
        """Where the packed numbers are."""
        packed = self._packed
        return packed.device if isinstance(packed, ViewedTensor) else self.weight.device

    @property
    def is_compact(self) -> bool:
        """Whether the weight is kept as a view alone."""
        return isinstance(self._packed, ViewedTensor)

    def compact(self) -> bool:
        """Keep the weight once, in the view that the CPU multiplies by, if that is the same numbers
        bit for bit: True then, or where it is so already; False, with nothing changed, where it is
        not (another device or backend, sums, sparse weights, vectors, 6-bit floats, `-dq`).

        All else works as before and pays for codes that are made anew: `qtensor`, saving, gradients
        in x. A copy, and a module that was moved to another device or into which something was
        loaded, keeps its codes again, as after `restore()`. torch.compile needs `restore()` first.
        """
        if self.is_compact:
            return True
        own = self.qtensor
        if not isinstance(own, QTensor) or self.device.type != "cpu":
            return False
        if resolve_backend(self.backend, self.device) != "cpu":
            return False
        viewed: ViewedTensor | None = kind_of(own).function("cpu", "only_view")(
            own, self.activations
        )
        if viewed is None:
            return False
        for name in self._parts:
            self._parameters[name] = _frozen(getattr(self, name).detach().to("meta"))
        self._packed, self._kernel = viewed, None
        return True

    def restore(self) -> None:
        """Undo `compact()`: the packed codes are parameters again."""
        packed = self._packed
        if isinstance(packed, ViewedTensor):
            for name, tensor in self._restored(packed).items():
                self._parameters[name] = _frozen(tensor)
            self._packed = self._kernel = None

    def _restored(self, packed: ViewedTensor) -> dict[str, Tensor]:
        tensors = packed.tensors
        return {name: tensors[part] for name, part in self._parts.items()}

    def _of_parameters(self) -> PackedWeight:
        tensors = {part: getattr(self, name) for name, part in self._parts.items()}
        shape = (self.out_features, self.in_features)
        return weight_class(self.codec).from_tensors(self.codec, shape, tensors)

    def forward(self, x: Tensor) -> Tensor:
        if (
            type(x) is not Tensor
            or torch.compiler.is_compiling()
            or (x.requires_grad and torch.is_grad_enabled())
            or not x.is_cpu
            # The compiled kernel trusts the shape it is given; the verb names what is wrong.
            or x.shape[-1:] != self._last
        ):
            return self._through_verb(x)
        self._notice()
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = self._prepare()
        return kernel(x)

    def _through_verb(self, x: Tensor) -> Tensor:
        if self.is_compact and torch.compiler.is_compiling():
            raise RuntimeError("a compact PackedLinear cannot be compiled: call restore() first")
        return linear(
            x, self.qtensor, self.bias, activations=self.activations, backend=self.backend
        )

    def _prepare(self) -> Callable[[Tensor], Tensor]:
        """The call that computes this module on CPU tensors, ready to run."""
        if self.device.type == "cpu" and resolve_backend(self.backend, self.device) == "cpu":
            prepare = kind_of(self.qtensor).function("cpu", "prepare")
            prepared: Callable[[Tensor], Tensor] = prepare(
                self.qtensor, self.bias, self.activations
            )
            return prepared
        return self._through_verb

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codec={self.codec}, activations={self.activations}, "
            f"backend={self.backend}"
        )

    def _forget(self) -> None:
        """Drop what was derived from the parameters; it is made again when needed."""
        self.restore()
        self._packed = self._kernel = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Tying code assigns an embedding's weight to its output layer without asking.
        parts = self.__dict__.get("_parts", ())
        if name in parts:
            self.restore()
        if name in parts and isinstance(value, Tensor):
            current = self._parameters[name]
            if current is None or value.dtype != current.dtype or value.shape != current.shape:
                raise TypeError(
                    f"{name} of a {self.codec} PackedLinear holds packed numbers and cannot become "
                    f"a {value.dtype} tensor {list(value.shape)}: undo the patch first"
                )
        if name in parts or name == "bias":
            self._kernel = None
            self._packed = self._packed if self.is_compact else None
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move or cast. A cast of the model's floats must not round packed scales."""
        example = fn(torch.empty(0, dtype=self.dense_dtype))
        if self.is_compact and example.device.type == "cpu" and not example.is_shared():  # type: ignore[no-untyped-call]
            # A cast, of the bias alone.
            parts = {name: self._parameters.pop(name) for name in self._parts}
            try:
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            finally:
                self._parameters = {**parts, **self._parameters}
            self.dense_dtype, self._kernel = example.dtype, None
            return self
        self.restore()
        kept = {name: p.data for name in self._parts if (p := self._parameters[name]) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.dense_dtype = example.dtype
        self._forget()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = self._packed
        if isinstance(packed, ViewedTensor):
            made = self._restored(packed)
            destination.update({prefix + name: tensor for name, tensor in made.items()})
            destination[prefix + META] = packed.metadata()
        elif self.weight.is_meta:
            # No contents, no digest: the key alone, for code that asks what a checkpoint holds.
            destination[prefix + META] = torch.empty(0, dtype=torch.uint8, device="meta")
        else:
            destination[prefix + META] = self.qtensor.metadata()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load or refuse: a damaged or different weight leaves this module as it was."""
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        meta = own.pop(prefix + META, None)
        names = [name for name in self._parts if prefix + name in own]
        if meta is None and names:
            missing_keys.append(prefix + META)
            error_msgs.append(
                f"{prefix}{META} is missing: what is saved there is not a packed weight"
            )
            return
        self.restore()
        if meta is not None:
            saved = {self._parts[name]: own[prefix + name] for name in names}
            try:
                loaded = load_weight({**saved, "meta": meta})
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
            if (loaded.codec, loaded.shape) != (self.codec, self.qtensor.shape):
                error_msgs.append(
                    f"{prefix}weight: the saved weight is {loaded.codec} {loaded.shape}, this "
                    f"module holds {self.codec} {self.qtensor.shape}"
                )
                return
            self._make_room(loaded)
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._forget()

    def _make_room(self, loaded: PackedWeight) -> None:
        """Parameters of the sizes that are loaded, where a kind's sizes depend on the numbers."""
        for name, part in self._parts.items():
            saved, own = getattr(loaded, part), getattr(self, name)
            if own.shape != saved.shape:
                self._parameters[name] = _frozen(torch.empty_like(saved, device=own.device))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the kernel holds addresses of this module's memory."""
        state = {**self.__dict__, "_packed": None, "_kernel": None}
        if isinstance(self._packed, ViewedTensor):
            made = {name: _frozen(t) for name, t in self._restored(self._packed).items()}
            state["_parameters"] = {**self._parameters, **made}
        return state


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter without gradient; one that is so already stays itself, and tied modules tied."""
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return tensor
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
