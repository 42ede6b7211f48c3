"""Whether a model is a decoder of Llama's shape, and where its parts are.

The shape is recognised by what the model is made of, not by its name: an embedding, layers of
attention (q, k, v, o) and a gated MLP behind a norm each, a last norm, an output layer. One norm
more in the attention, or in the MLP, is taken for one of what its last product multiplies; the
function between gate and up is found by its numbers. What cannot be seen (constants in `forward`,
the order of things) is left to the probe (decode_probe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lath.formats.decode_step import GATES, DecoderLayer, DecoderStack, Gate, Norm, Product
from lath.formats.packing import PANEL
from lath.formats.qtensor import QTensor
from lath.integration.find import output_layer
from lath.integration.linear import PackedLinear
from lath.verbs.backends import resolve_backend
from lath.verbs.checks import FLOAT_DTYPES

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Their cosines and sines depend on how long the sequence has become.
_CHANGING_ROTATIONS = ("dynamic", "longrope")


class NotFusedError(Exception):
    """Why a model or a call is computed module by module."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a model. head: None where the output layer is not packed."""

    base: Any
    layers: list[Any]
    norm: nn.Module
    rotary: Any
    embedding: nn.Embedding
    head: PackedLinear | None
    query_heads: int
    kv_heads: int
    head_dim: int

    def linears(self) -> Iterator[PackedLinear]:
        for layer in self.layers:
            for parent, names in ((layer.self_attn, _ATTENTION), (layer.mlp, _MLP - {"act_fn"})):
                yield from (getattr(parent, name) for name in sorted(names))
        if self.head is not None:
            yield self.head

    def weights(self) -> Iterator[tuple[nn.Module, str]]:
        """Module and name of every parameter that is read where it lies."""
        for module in [
            self.embedding,
            self.norm,
            *(n for layer in self.layers for n in _norms(layer)),
        ]:
            yield module, "weight"


@dataclass(frozen=True)
class Reading:
    """What a layer asks of its scores, as its own attention asked it. rotate: see DecoderLayer."""

    scale: float
    window: int | None
    rotate: bool = True


def find_decoder(model: Any) -> Decoder:
    """The parts of a Hugging Face model; NotFusedError saying what is not as it must be."""
    base: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise NotFusedError("the model has no list of layers under its base model")
    expected = {"embed_tokens", "layers", "norm", "rotary_emb"}
    _only(base, expected, "the base model")
    head = output_layer(model)
    own = {name for name, child in model.named_children() if child is not base}
    if head is None or [getattr(model, name) for name in own] != [head]:
        raise NotFusedError(f"beside the base model there must be one output layer, not {own}")
    kind = getattr(base.rotary_emb, "rope_type", "default")
    if any(word in str(kind) for word in _CHANGING_ROTATIONS):
        raise NotFusedError(f"RoPE of type {kind!r} changes with the length of the sequence")
    if type(base.embed_tokens) is not nn.Embedding:
        raise NotFusedError(f"the embedding is a {type(base.embed_tokens).__name__}")
    for number, layer in enumerate(layers):
        _check_layer(layer, f"layer {number}")
    first: Any = layers[0].self_attn
    head_dim = int(getattr(first, "head_dim", 0))
    sizes = first.q_proj.out_features, first.k_proj.out_features
    if head_dim <= 0 or any(size % head_dim for size in sizes):
        raise NotFusedError(f"heads of {head_dim} channels do not divide q and k of {sizes}")
    decoder = Decoder(
        base, list(layers), base.norm, base.rotary_emb, base.embed_tokens,
        head if isinstance(head, PackedLinear) and not _why_not_packed(head) else None,
        sizes[0] // head_dim, sizes[1] // head_dim, head_dim,
    )  # fmt: skip
    _check_sizes(model, decoder)
    return decoder


def _check_layer(layer: Any, where: str) -> None:
    _only(layer, _LAYER, where)
    attention, mlp = layer.self_attn, layer.mlp
    _only(attention, _ATTENTION, f"the attention of {where}", _HEAD_NORMS, _output_norm(attention))
    _only(mlp, _MLP, f"the MLP of {where}", set(), _down_norm(mlp))
    for parent, names in ((attention, _ATTENTION), (mlp, _MLP - {"act_fn"})):
        for name in sorted(names):
            why = _why_not_packed(getattr(parent, name))
            if why:
                raise NotFusedError(f"{name} of {where} {why}")
    if _gate_of(mlp.act_fn) is None:
        raise NotFusedError(
            f"the MLP of {where} has {type(mlp.act_fn).__name__}, none of {', '.join(GATES)}"
        )
    for norm in _norms(layer):
        if getattr(norm, "weight", None) is None or _epsilon(norm) is None:
            raise NotFusedError(f"{type(norm).__name__} in {where} is no RMSNorm")


def _only(
    module: nn.Module,
    expected: set[str],
    where: str,
    also: set[str] = frozenset(),  # type: ignore[assignment]
    norm: nn.Module | None = None,
) -> None:
    """norm: a child that may be there too, by whatever name."""
    found = {name for name, child in module._modules.items() if norm is None or child is not norm}
    if not expected <= found <= expected | also:
        missing, unknown = expected - found, found - expected - also
        raise NotFusedError(
            f"{where} " + (f"has no {sorted(missing)}" if missing else f"has {sorted(unknown)} too")
        )


def _why_not_packed(module: Any) -> str:
    if not isinstance(module, PackedLinear):
        return f"is a {type(module).__name__}, not packed"
    device = module.device
    if device.type != "cpu" or resolve_backend(module.backend, device) != "cpu":
        return "does not run on the compiled CPU kernels"
    return ""


_FUNCTIONS: dict[Gate, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: nn.functional.relu(x).square(),
}


def _gate_of(function: Any) -> Gate | None:
    """Which function a module computes, by its numbers: GELU and its form with tanh are 4e-4 apart
    there."""
    x = torch.linspace(-6, 6, 49)
    with torch.no_grad():
        y = function(x)
        same = [name for name, own in _FUNCTIONS.items() if torch.allclose(y, own(x), atol=1e-6)]
    return same[0] if same else None


def _sub_norm(parent: nn.Module, known: set[str]) -> Any:
    """The child beside the known ones, where it is the only one and looks like a norm, or None."""
    others = [child for name, child in parent._modules.items() if name not in known]
    if len(others) != 1 or others[0] is None or others[0]._modules:
        return None
    return others[0] if getattr(getattr(others[0], "weight", None), "ndim", 0) == 1 else None


def _output_norm(attention: Any) -> Any:
    return _sub_norm(attention, _ATTENTION | _HEAD_NORMS)


def _down_norm(mlp: Any) -> Any:
    return _sub_norm(mlp, _MLP)


def _norms(layer: Any) -> list[nn.Module]:
    heads = [getattr(layer.self_attn, name, None) for name in sorted(_HEAD_NORMS)]
    inner = [*heads, _output_norm(layer.self_attn), _down_norm(layer.mlp)]
    return [
        layer.input_layernorm, layer.post_attention_layernorm,
        *(norm for norm in inner if norm is not None),
    ]  # fmt: skip


def _epsilon(norm: Any) -> float | None:
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(value) if isinstance(value, int | float) else None


def _check_sizes(model: Any, decoder: Decoder) -> None:
    hidden = decoder.embedding.weight.shape[1]
    for what, size in (("hidden size", hidden), ("head_dim", decoder.head_dim)):
        if size % PANEL:
            raise NotFusedError(f"the {what}, {size}, is no multiple of {PANEL}")
    if decoder.query_heads % decoder.kv_heads:
        raise NotFusedError(f"{decoder.query_heads} heads for {decoder.kv_heads} KV heads")
    dtypes = {getattr(module, name).dtype for module, name in decoder.weights()}
    if len(dtypes) != 1 or not dtypes <= set(FLOAT_DTYPES):
        raise NotFusedError(f"embedding and norms must have one float dtype, not {dtypes}")
    for layer in decoder.layers:
        attention = layer.self_attn
        sizes = (attention.q_proj.out_features, attention.k_proj.out_features)
        heads = (decoder.query_heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim)
        if sizes != heads or attention.v_proj.out_features != heads[1]:
            raise NotFusedError("layers differ in their heads")
        for name in _HEAD_NORMS:
            norm = getattr(attention, name, None)
            if norm is not None and tuple(norm.weight.shape) != (decoder.head_dim,):
                raise NotFusedError(f"{name} is of {[*norm.weight.shape]}, not of one head")
        inner = (
            (_output_norm(attention), attention.o_proj),
            (_down_norm(layer.mlp), layer.mlp.down_proj),
        )
        for norm, product in inner:
            width = product.in_features
            if norm is not None and (norm.weight.shape[0] != width or width % PANEL):
                raise NotFusedError(
                    f"a norm of {norm.weight.shape[0]} before a product of {width}: they must be "
                    f"the same multiple of {PANEL}"
                )


def stack_of(decoder: Decoder, readings: list[Reading]) -> DecoderStack:
    """The step of a decoder; readings: of each layer."""
    return DecoderStack(
        decoder.embedding.weight.detach(),
        tuple(_layer(layer, own) for layer, own in zip(decoder.layers, readings, strict=True)),
        _norm(decoder.norm),
        None if decoder.head is None else _product(decoder.head),
        decoder.query_heads, decoder.kv_heads, decoder.head_dim, decoder.embedding.weight.dtype,
    )  # fmt: skip


def _layer(layer: Any, reading: Reading) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    optional = [
        getattr(attention, "q_norm", None), getattr(attention, "k_norm", None),
        _output_norm(attention), _down_norm(mlp),
    ]  # fmt: skip
    query_norm, key_norm, output_norm, down_norm = (
        None if norm is None else _norm(norm) for norm in optional
    )
    function = _gate_of(mlp.act_fn)
    assert function is not None
    return DecoderLayer(
        _norm(layer.input_layernorm), _product(attention.q_proj), _product(attention.k_proj),
        _product(attention.v_proj), _product(attention.o_proj), query_norm, key_norm,
        reading.rotate, reading.scale, reading.window, _norm(layer.post_attention_layernorm),
        _product(mlp.gate_proj), _product(mlp.up_proj), _product(mlp.down_proj),
        output_norm, down_norm, function,
    )  # fmt: skip


def _norm(module: Any) -> Norm:
    epsilon = _epsilon(module)
    assert epsilon is not None
    return Norm(module.weight.detach(), epsilon)


def _product(module: PackedLinear) -> Product:
    bias = None if module.bias is None else module.bias.detach()
    weight = module.qtensor
    if not isinstance(weight, QTensor):
        raise NotFusedError(f"weights in {weight.codec}, which only modules multiply")
    return Product(weight, bias, module.activations)
