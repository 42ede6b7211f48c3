"""A step of decoding on a CPU as one program: the kernels of `linear`, `pages` and `attention` over
one token, with small ones between them (cpu_vectors.py, cpu_heads.py).

A DecodeStep belongs to a model: weights, scratch, numbers of the step. A BoundStep (cpu_bound.py)
belongs to a cache besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.decode_step import DecoderLayer, DecoderStack, Norm, Product

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.decode_step.cpu_arguments import (
    HEAD,
    STATE_FIELDS,
    VECTOR,
    block_of,
    float_bits,
)
from lath.kernels.decode_step.cpu_heads import LONGEST_HEAD, emit_heads
from lath.kernels.decode_step.cpu_vectors import (
    emit_add,
    emit_embed,
    emit_gate,
    emit_normalise,
)
from lath.kernels.linear.cpu import CpuLinear, prepare
from lath.kernels.linear.cpu_arguments import INDEX as LINEAR
from lath.kernels.linear.cpu_kernels import FLOAT_KINDS
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import FP32, ITEM_BYTES, LANES
from lath.kernels.simd.program import Output, Program, Row, Share, row
from lath.kernels.simd.team import TALLY_FIELDS

Block = NDArray[np.int64]


class DecodeStep:
    """What all caches share.

    ValueError for sizes that are no multiples of 16. The stack's tensors are kept; a weight's codes
    are read from the view that was made of them here.
    """

    def __init__(self, stack: DecoderStack) -> None:
        for name in ("hidden_size", "head_dim"):
            if getattr(stack, name) % LANES or getattr(stack, name) == 0:
                raise ValueError(
                    f"{name} must be a multiple of {LANES}, got {getattr(stack, name)}"
                )
        if stack.head_dim > LONGEST_HEAD:
            raise ValueError(f"head_dim must be at most {LONGEST_HEAD}, got {stack.head_dim}")
        self.stack = stack
        self.kind = FLOAT_KINDS[stack.dtype]
        self.state: Block = np.zeros(len(STATE_FIELDS), np.int64)
        self.tally: Block = np.zeros(len(TALLY_FIELDS), np.int64)  # of all programs of the step
        self.memory: dict[tuple[int, int], Tensor] = {}  # of helpers, for shares of rows
        self._kept: list[Any] = []
        queries, kept = stack.query_heads * stack.head_dim, stack.kv_heads * stack.head_dim
        wide = max(layer.gate.weight.shape[0] for layer in stack.layers)
        self.residual, self.hidden = _floats(stack.hidden_size), _floats(stack.hidden_size)
        self.query, self.key, self.value = _floats(queries), _floats(kept), _floats(kept)
        self.gate, self.up = _floats(wide), _floats(wide)
        shape = (1, stack.query_heads, 1, stack.head_dim)
        self.q, self.o = (
            torch.zeros(shape, dtype=stack.dtype),
            torch.zeros(shape, dtype=stack.dtype),
        )
        self.lse = torch.zeros(shape[:3])
        self.one = torch.ones(1, dtype=torch.int32)
        self._blocks: list[Block] = []  # whose prepared activations are still to be placed
        self._write_rows(stack)
        self._place_activations()

    def _write_rows(self, stack: DecoderStack) -> None:
        self.before = [self._products_of(layer) for layer in stack.layers]
        self.after = [self._mlp_of(layer) for layer in stack.layers]
        embed = self._vector(weight=stack.embedding.data_ptr(), y=self.residual.data_ptr())
        self._kept.append(stack.embedding)
        self.first_row = row(compile_kernel(emit_embed, self.kind), 1, embed)
        self.last_rows = [self._norm_row(stack.norm)]
        self._head: Share | None = None
        if stack.head is not None:
            output = [(stack.head, self.hidden, None)]
            rows = self._products(self.hidden, FP32, output, self.kind)
            self._head = rows[-1][4]
            self.last_rows += rows

    def _products_of(self, layer: DecoderLayer) -> list[Row]:
        """Up to queries, keys and values."""
        outputs = [
            (layer.query, self.query, None), (layer.key, self.key, None),
            (layer.value, self.value, None),
        ]  # fmt: skip
        return [
            self._norm_row(layer.attention_norm), *self._products(self.hidden, FP32, outputs)
        ]  # fmt: skip

    def _mlp_of(self, layer: DecoderLayer) -> list[Row]:
        """From attention's output on."""
        rows, x, kind = [], self.o, self.kind
        if layer.output_norm is not None:  # queries are done with
            rows.append(self._norm_row(layer.output_norm, x, self.query, kind))
            x, kind = self.query, FP32
        rows += self._added(layer.output, x, kind)
        rows.append(self._norm_row(layer.mlp_norm))
        outputs = [(layer.gate, self.gate, None), (layer.up, self.up, None)]
        rows += self._products(self.hidden, FP32, outputs)
        gate = self._vector(
            x=self.gate.data_ptr(), second=self.up.data_ptr(), y=self.gate.data_ptr()
        )
        vectors = -(-layer.gate.weight.shape[0] // LANES)
        rows.append(row(compile_kernel(emit_gate, layer.function), vectors, gate))
        if layer.down_norm is not None:
            rows.append(self._norm_row(layer.down_norm, self.gate, self.gate))
        return rows + self._added(layer.down, self.gate, FP32)

    def _added(self, product: Product, x: Tensor, kind: int) -> list[Row]:
        """residual += product of x: the residual stands in the place of the bias."""
        rows = self._products(x, kind, [(product, self.residual, self.residual)])
        if product.bias is not None:
            bias = _floats(self.stack.hidden_size)
            bias[: len(product.bias)] = product.bias.detach().float()
            self._kept.append(bias)
            stream = self.residual.data_ptr()
            block = self._vector(x=stream, second=bias.data_ptr(), y=stream)
            rows.append(row(compile_kernel(emit_add), self.stack.hidden_size // LANES, block))
        return rows

    def _norm_row(
        self, norm: Norm, x: Tensor | None = None, y: Tensor | None = None, x_kind: int = FP32
    ) -> Row:
        """y = norm of x; by default hidden = norm of the residual."""
        x, y = self.residual if x is None else x, self.hidden if y is None else y
        columns = len(norm.weight)
        if columns % LANES:
            raise ValueError(f"a norm must be over a multiple of {LANES} numbers, got {columns}")
        self._kept.append(norm.weight)
        block = self._vector(
            columns, x=x.data_ptr(), weight=norm.weight.data_ptr(), y=y.data_ptr(),
            epsilon=float_bits(norm.epsilon),
        )  # fmt: skip
        kernel = compile_kernel(emit_normalise, FLOAT_KINDS[norm.weight.dtype], x_kind)
        return row(kernel, 1, block)

    def _vector(self, columns: int | None = None, **fields: int) -> int:
        columns = self.stack.hidden_size if columns is None else columns
        block = block_of(VECTOR, state=self.state.ctypes.data, columns=columns, **fields)
        self._kept.append(block)
        return int(block.ctypes.data)

    def _products(
        self,
        x: Tensor,
        kind: int,
        outputs: Sequence[tuple[Product, Tensor, Tensor | None]],
        y_type: int = FP32,
    ) -> list[Row]:
        """Rows that multiply one vector x by several weights; x is rounded once where it can be."""
        rows: list[Row] = []
        prepared = None
        for product, y, offsets in outputs:
            layer = prepare(product.weight, product.bias, product.activations)
            block = layer.block_of_one(kind)
            bias = layer.offsets if offsets is None else offsets
            _enter(block, x=x, y=y, bias=bias)
            block[LINEAR["y_type"]], block[LINEAR["tokens"]] = y_type, 1
            self._kept += [layer, block]
            way = _preparation(block)
            if way != prepared:
                rows.append(row(int(block[LINEAR["prepare"]]), 1, block.ctypes.data))
                prepared = way
            elif rows:  # nothing is between it and the product before: they are divided as one
                rows[-1] = (*rows[-1][:5], 0)
            share = self._share(layer, block, ITEM_BYTES[y_type])
            kernel, panels = int(block[LINEAR["kernel"]]), int(block[LINEAR["panels"]])
            rows.append(row(kernel, panels, block.ctypes.data, share))
            self._blocks.append(block)
        return rows

    def _share(self, layer: CpuLinear, block: Block, item: int) -> Share:
        """The panels of a product, divided by what they read of its weight."""
        panels, unit = int(block[LINEAR["panels"]]), int(block[LINEAR["unit"]])
        output = Output(LINEAR["y"], LANES * item, layer.rows * item)
        return Share(block, output, panels, unit, layer.panel_bytes * panels, memory=self.memory)

    def _place_activations(self) -> None:
        """One scratch for the prepared activations of every product: they run one by one."""
        sizes = [_activation_bytes(block) for block in self._blocks]
        self._scratch = torch.zeros(max(a + 2 * b for a, b in sizes) + LANES, dtype=torch.uint8)
        start = self._scratch.data_ptr()
        for block, (codes, side) in zip(self._blocks, sizes, strict=True):
            block[LINEAR["codes"]] = start
            block[LINEAR["scales"]] = start + codes
            block[LINEAR["sums"]] = start + codes + side

    def run_embedding(self) -> None:
        """residual = the row of the token that the state names."""
        Program([self.first_row]).run()

    def run_end(self, logits: Tensor) -> None:
        """hidden and, with a head, logits [V] of the stack's dtype, of the residual."""
        if self._head is not None:
            self.set_logits(logits)
        Program(self.last_rows, self.tally).run(self)

    def heads_row(self, layer: DecoderLayer) -> tuple[Row, Block]:
        """Heads rotated and stored; the cache's side of the block is still to be entered."""
        stack = self.stack
        block = block_of(
            HEAD, state=self.state.ctypes.data, query=self.query.data_ptr(),
            key=self.key.data_ptr(), value=self.value.data_ptr(), q=self.q.data_ptr(),
            query_heads=stack.query_heads, kv_heads=stack.kv_heads, head_dim=stack.head_dim,
        )  # fmt: skip
        for side, norm in (("query", layer.query_norm), ("key", layer.key_norm)):
            if norm is not None:
                if norm.weight.dtype != stack.dtype:
                    raise TypeError(
                        f"{side}_norm must be {stack.dtype} like the model, got {norm.weight.dtype}"
                    )
                block[HEAD[f"{side}_weight"]] = norm.weight.data_ptr()
                block[HEAD[f"{side}_epsilon"]] = float_bits(norm.epsilon)
        kernel = compile_kernel(
            emit_heads, self.kind, int(layer.rotate), int(layer.query_norm is not None),
            int(layer.key_norm is not None),
        )  # fmt: skip
        return row(kernel, stack.query_heads + 2 * stack.kv_heads, block.ctypes.data), block

    def set_logits(self, logits: Tensor) -> None:
        """Where the head writes: [.., V] of the stack's dtype. It is not kept alive."""
        assert self._head is not None
        self._head.move(logits.data_ptr())


def _enter(block: Block, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        block[LINEAR[name]] = tensor.data_ptr()


def _preparation(block: Block) -> tuple[int, ...]:
    """What settles the prepared activations of an x."""
    names = ("prepare", "columns", "groups", "group", "shared", "tile", "item", "x")
    return tuple(int(block[LINEAR[name]]) for name in names)


def _activation_bytes(block: Block) -> tuple[int, int]:
    groups, tile = int(block[LINEAR["groups"]]), int(block[LINEAR["tile"]])
    codes = groups * int(block[LINEAR["group"]]) * tile * int(block[LINEAR["item"]])
    return -(-codes // 64) * 64, -(-4 * groups * tile // 64) * 64


def _floats(count: int) -> Tensor:
    """fp32 zeros, whole panels of 16 rows."""
    return torch.zeros(-(-count // LANES) * LANES)
