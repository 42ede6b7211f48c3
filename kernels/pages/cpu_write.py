"""The kernel that writes pages: one page of one KV head at a time, 16 channels side by side."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.formats.pages import PAGE, SUBPAGE, UNIT, PageCodec
from lath.kernels.pages import cpu_numbers as numbers
from lath.kernels.pages.cpu_arguments import Arguments
from lath.kernels.simd import lanes, mathematics
from lath.kernels.simd.copy import copy_row
from lath.kernels.simd.emitter import (
    BF16,
    BYTES,
    F32,
    FLOATS,
    FP32,
    I8,
    I32,
    INTS,
    ITEM_BYTES,
    LANES,
    Emitter,
)

_VECTOR = 64


def emit_write(
    e: Emitter, thread: Any, threads: Any, arguments: Any, key: str, value: str, dtype: int
) -> None:
    """The units thread, thread + threads, …; a unit is one KV head of one job."""
    a = Arguments(e, arguments)
    steps = e.divide(e.add(e.subtract(a["units"], thread), e.subtract(threads, 1)), threads)
    with e.loop(steps) as i:
        unit = e.add(thread, e.multiply(i, threads))
        page = _Page(e, a, thread, unit, dtype)
        _KeyWriter(page, PageCodec(key)).write()
        _ValueWriter(page, PageCodec(value)).write()
        page.clear(
            e.add(page.record, a["record_end"]), e.subtract(a["record_bytes"], a["record_end"])
        )


class _Page:
    """Where one page of one head comes from and goes to."""

    def __init__(self, e: Emitter, a: Arguments, thread: Any, unit: Any, dtype: int) -> None:
        self.e, self.a, self.dtype = e, a, dtype
        job = e.divide(unit, a["kv_heads"])
        self.head = e.remainder(unit, a["kv_heads"])
        self.batch, self.first = a.job(job, 0), a.job(job, 1)
        self.count, number = a.job(job, 2), a.job(job, 3)
        self.record = self._place("record", "records", number)
        self.index = self._place("index", "index", number)
        self.wide = e.add(a["scratch"], e.multiply(thread, a["slot"]))
        self.inverse = e.add(self.wide, a["at_inverse"])
        self.tail, self.block, self.low_block = e.buffer(1), e.buffer(4), e.buffer(4)

    def _place(self, name: str, base: str, number: Any) -> Any:
        e, a = self.e, self.a
        page = e.add(a[base], e.multiply(number, a[f"{name}_page"]))
        return e.add(page, e.multiply(self.head, a[f"{name}_head"]))

    def token(self, side: str, token: Any) -> Any:
        """The address of a token's numbers as they came; side: "key" or "value"."""
        e, a = self.e, self.a
        address = e.add(a[f"source_{side}s"], e.multiply(self.batch, a[f"source_{side}_batch"]))
        address = e.add(address, e.multiply(self.head, a[f"source_{side}_head"]))
        return e.add(address, e.multiply(e.add(self.first, token), a[f"source_{side}_row"]))

    def widen(self, side: str) -> None:
        """Tokens as fp32 [count, stored channels] in scratch, zeros in padded channels."""
        e, a = self.e, self.a
        stored = a[f"stored_{side}s"]
        with e.loop(self.count) as token:
            target = e.add(self.wide, e.multiply(e.multiply(token, stored), 4))
            source = self.token(side, token)
            copy_row(e, self.tail, source, self.dtype, a[f"{side}_dim"], target, FP32, stored)

    def copy_floats(self, side: str) -> None:
        """Tokens as they came, zeros in padded channels and in slots behind the last."""
        e, a = self.e, self.a
        stored = a[f"stored_{side}s"]
        with e.loop(e.integer(PAGE)) as token:
            exists = e.less(token, self.count)
            channels = e.builder.select(exists, a[f"{side}_dim"], e.integer(0))
            step = e.multiply(stored, ITEM_BYTES[self.dtype])
            target = e.add(e.add(self.record, a[f"{side}s"]), e.multiply(token, step))
            source = self.token(side, token)
            copy_row(e, self.tail, source, self.dtype, channels, target, self.dtype, stored)

    def number(self, token: Any, channel: Any, stored: Any) -> Any:
        """The address in scratch of a token's channel."""
        return self.e.offset(self.wide, self.e.add(self.e.multiply(token, stored), channel), 4)

    def clear(self, address: Any, nbytes: Any) -> None:
        with self.e.loop(nbytes) as i:
            self.e.store(self.e.add(address, i), ir.Constant(I8, 0))

    def clear_channels(self, address: Any, first: Any, stored: Any, size: int) -> None:
        """Zeros for the padded channels of a row of numbers of `size` bytes."""
        e = self.e
        self.clear(e.offset(address, first, size), e.multiply(e.subtract(stored, first), size))

    def float_count(self) -> Any:
        return self.e.splat(self.e.builder.sitofp(self.count, F32))


class _KeyWriter:
    def __init__(self, page: _Page, codec: PageCodec) -> None:
        self.p, self.codec = page, codec
        self.e, self.a, self.b = page.e, page.a, page.e.builder
        self.stored = page.a["stored_keys"]

    def write(self) -> None:
        e, a, p = self.e, self.a, self.p
        p.widen("key")
        top = e.variable(e.constant(0))
        with e.loop(e.divide(self.stored, LANES)) as i:
            top.value = e.larger(top.value, self._centre(e.multiply(i, LANES)))
        bits = e.splat(e.largest_lane(top.value))
        unit = numbers.index_unit(e, bits, self.codec)
        if self.codec.map == "float":
            p.copy_floats("key")
            scale = e.floats(1.0)
        elif self.codec.scale_per_token:
            self._scale_tokens()
            scale = e.floats(1.0)
        else:
            by = numbers.scaling(e, bits, self.codec)
            scale = by.scale
        self._store_pair(e.add(p.record, a["key_scales"]), scale, unit)
        self._store_pair(e.add(p.index, a["numbers"]), unit, p.float_count())
        step = self.b.select(self.b.fcmp_unordered("uno", unit, unit), e.floats(1.0), unit)
        if self.codec.map == "float":
            with e.loop(e.divide(self.stored, LANES)) as i:
                self._float_extremes(e.multiply(i, LANES), step)
        elif self.codec.scale_per_token:
            self._write_codes(None, step)
        else:
            self._write_codes(by, step)
        with e.loop(e.divide(self.stored, LANES)) as i:
            self._deviation(e.multiply(i, LANES), step)
        self._clear_padding()

    def _store_pair(self, address: Any, first: Any, second: Any) -> None:
        """fp32 [4]: a lane of each, 0, 0."""
        e = self.e
        pair = e.shuffle(first, second, [0, LANES])
        e.store(address, e.shuffle(pair, ir.Constant(pair.type, None), [0, 1, 2, 3]))

    def _centre(self, channel: Any) -> Any:
        """Mean of 16 channels, taken away from them; the largest magnitude that is left."""
        e, b, p = self.e, self.b, self.p
        total = e.variable(e.floats(0.0))
        with e.loop(p.count) as token:
            value = e.load(p.number(token, channel, self.stored), FLOATS)
            total.value = b.fadd(total.value, value)
        mean = e.round_floats(b.fdiv(total.value, p.float_count()), BF16)
        place = e.offset(e.add(p.index, self.a["mean"]), channel, 2)
        e.store(place, mean)
        removed = e.load_floats(place, BF16)
        top = e.variable(e.constant(0))
        with e.loop(p.count) as token:
            place = p.number(token, channel, self.stored)
            value = b.fsub(e.load(place, FLOATS), removed)
            e.store(place, value)
            top.value = e.larger(top.value, numbers.magnitude_bits(e, value))
        return top.value

    def _scale_tokens(self) -> None:
        """A scale and an inverse for each token; scales of the slots behind the last are 0."""
        e, p = self.e, self.p
        scales = e.add(p.record, self.a["token_scales"])
        p.clear(scales, e.integer(4 * PAGE))
        with e.loop(p.count) as token:
            top = e.variable(e.constant(0))
            with e.loop(e.divide(self.stored, LANES)) as i:
                value = e.load(p.number(token, e.multiply(i, LANES), self.stored), FLOATS)
                top.value = e.larger(top.value, numbers.magnitude_bits(e, value))
            by = numbers.scaling(e, e.splat(e.largest_lane(top.value)), self.codec)
            first = ir.Constant(I32, 0)
            e.store(e.offset(scales, token, 4), self.b.extract_element(by.scale, first))
            e.store(e.offset(p.inverse, token, 4), self.b.extract_element(by.inverse, first))

    def _token_scaling(self, token: Any) -> numbers.Scaling:
        e, p = self.e, self.p
        scale = e.broadcast(e.offset(e.add(p.record, self.a["token_scales"]), token, 4), F32)
        inverse = e.broadcast(e.offset(p.inverse, token, 4), F32)
        return numbers.Scaling(scale, inverse, self.b.fcmp_ordered("ord", scale, scale))

    def _write_codes(self, page_scaling: numbers.Scaling | None, step: Any) -> None:
        """Codes of all tokens, zeros behind the last, and max and min of each channel."""
        e, b, p = self.e, self.b, self.p
        parts = 8 // self.codec.plane_bits
        width = e.divide(self.stored, parts)
        whole = self.codec.name in ("int8", "int8-planes")
        with e.loop(e.divide(width, UNIT)) as unit:
            channels = [
                e.add(e.multiply(width, part), e.multiply(unit, UNIT)) for part in range(parts)
            ]
            most = [e.variable(e.floats(float("-inf"))) for _ in channels]
            least = [e.variable(e.floats(float("inf"))) for _ in channels]
            with e.loop(p.count) as token:
                by = page_scaling or self._token_scaling(token)
                stored = []
                for n, channel in enumerate(channels):
                    value = e.load(p.number(token, channel, self.stored), FLOATS)
                    code, decoded = numbers.encode(e, value, by, self.codec)
                    stored.append(code)
                    # In index units; a group that has NaN counts as 0.
                    if not whole:
                        decoded = numbers.finite_or_zero(e, b.fmul(decoded, by.scale))
                    most[n].value = mathematics.greater(e, decoded, most[n].value)
                    least[n].value = b.fneg(
                        mathematics.greater(e, b.fneg(decoded), b.fneg(least[n].value))
                    )
                self._store_unit(width, unit, token, stored)
            with e.loop(e.subtract(e.integer(PAGE), p.count)) as i:
                blank = [e.constant(0)] * parts
                self._store_unit(width, unit, e.add(p.count, i), blank)
            for n, channel in enumerate(channels):
                self._store_extremes(
                    channel, most[n].value, least[n].value, None if whole else step
                )

    def _store_unit(self, width: Any, unit: Any, token: Any, stored: list[Any]) -> None:
        """16 bytes of one token: [4, width / 16, 16 tokens, 16 bytes]."""
        e, p = self.e, self.p
        subpage = e.divide(token, SUBPAGE)
        within = e.subtract(token, e.multiply(subpage, SUBPAGE))
        at = e.multiply(subpage, e.multiply(width, SUBPAGE))
        at = e.add(e.add(at, e.multiply(unit, SUBPAGE * UNIT)), e.multiply(within, UNIT))
        for name, plane in zip(("keys", "keys_low"), self._planes(stored), strict=False):
            place = e.add(e.add(p.record, self.a[name]), at)
            e.store(place, self.b.trunc(plane, BYTES))

    def _planes(self, stored: list[Any]) -> list[Any]:
        return numbers.planes(self.e, stored, self.codec)

    def _float_extremes(self, channel: Any, step: Any) -> None:
        e, b, p = self.e, self.b, self.p
        most = e.variable(e.floats(float("-inf")))
        least = e.variable(e.floats(float("inf")))
        with e.loop(p.count) as token:
            value = e.load(p.number(token, channel, self.stored), FLOATS)
            value = numbers.finite_or_zero(e, value)
            most.value = mathematics.greater(e, value, most.value)
            least.value = b.fneg(mathematics.greater(e, b.fneg(value), b.fneg(least.value)))
        self._store_extremes(channel, most.value, least.value, step)

    def _store_extremes(self, channel: Any, most: Any, least: Any, step: Any | None) -> None:
        """max and min of 16 channels in units of `step`, rounded outward; None: codes as such."""
        e, b = self.e, self.b
        ceil = e.function("llvm.ceil.v16f32", FLOATS, [FLOATS])
        floor = e.function("llvm.floor.v16f32", FLOATS, [FLOATS])
        for name, value, outward in (("max", most, ceil), ("min", least, floor)):
            number = value
            if step is not None:
                # What fp32 rounds, to a whole number of steps perhaps, must not end inside.
                number = b.fmul(b.fdiv(value, step), e.floats(1 + 2.0**-20))
                number = b.call(outward, [number])
            # Only a page with NaN or infinity, whose unit is 1, exceeds a byte.
            for bound, beyond in ((127.0, ">"), (-128.0, "<")):
                outside = b.fcmp_ordered(beyond, number, e.floats(bound))
                number = b.select(outside, e.floats(bound), number)
            place = e.add(e.add(self.p.index, self.a[name]), channel)
            e.store(place, b.trunc(b.fptosi(number, INTS), BYTES))

    def _deviation(self, channel: Any, step: Any) -> None:
        """Twice the standard deviation of 16 channels in units of `step`."""
        e, b, p = self.e, self.b, self.p
        total, squares = e.variable(e.floats(0.0)), e.variable(e.floats(0.0))
        # In units of the step: numbers whose squares neither overflow nor vanish.
        inverse = b.fdiv(e.floats(1.0), step)
        with e.loop(p.count) as token:
            value = e.load(p.number(token, channel, self.stored), FLOATS)
            value = b.fmul(numbers.finite_or_zero(e, value), inverse)
            total.value = b.fadd(total.value, value)
            squares.value = e.fma(value, value, squares.value)
        count = p.float_count()
        mean = b.fdiv(total.value, count)
        variance = e.fma(b.fneg(mean), mean, b.fdiv(squares.value, count))
        variance = mathematics.greater(e, variance, e.floats(0.0))
        root = e.function("llvm.sqrt.v16f32", FLOATS, [FLOATS])
        twice = b.fmul(b.call(root, [variance]), e.floats(2.0))
        twice = b.select(b.fcmp_ordered("<", twice, e.floats(255.0)), twice, e.floats(255.0))
        place = e.add(e.add(p.index, self.a["deviation"]), channel)
        e.store(place, b.trunc(e.nearest(twice), BYTES))

    def _clear_padding(self) -> None:
        for name, size in (("mean", 2), ("max", 1), ("min", 1), ("deviation", 1)):
            address = self.e.add(self.p.index, self.a[name])
            self.p.clear_channels(address, self.a["key_dim"], self.stored, size)


class _ValueWriter:
    def __init__(self, page: _Page, codec: PageCodec) -> None:
        self.p, self.codec = page, codec
        self.e, self.a, self.b = page.e, page.a, page.e.builder
        self.stored = page.a["stored_values"]

    def write(self) -> None:
        e, a, p = self.e, self.a, self.p
        p.widen("value")
        if self.codec.map == "float":
            p.copy_floats("value")
            with e.loop(e.divide(self.stored, LANES)) as i:
                self._float_side(e.multiply(i, LANES))
        else:
            self._write_codes()
        scales = e.add(p.record, a["value_scales"])
        with e.loop(e.subtract(self.stored, a["value_dim"])) as i:
            place = e.offset(scales, e.add(a["value_dim"], i), 4)
            e.store(place, ir.Constant(F32, 1.0))
        means = e.add(p.index, a["value_mean"])
        p.clear_channels(means, a["value_dim"], self.stored, 2)

    def _scaling(self, channel: Any) -> numbers.Scaling:
        """Of 16 channels over the tokens; their scales are stored."""
        e, p = self.e, self.p
        top = e.variable(e.constant(0))
        with e.loop(p.count) as token:
            value = e.load(p.number(token, channel, self.stored), FLOATS)
            top.value = e.larger(top.value, numbers.magnitude_bits(e, value))
        by = numbers.scaling(e, top.value, self.codec)
        e.store(e.offset(e.add(p.record, self.a["value_scales"]), channel, 4), by.scale)
        return by

    def _store_mean(self, channel: Any, total: Any) -> None:
        """total: of 16 channels, in real units."""
        e, p = self.e, self.p
        place = e.offset(e.add(p.index, self.a["value_mean"]), channel, 2)
        e.store(place, e.round_floats(self.b.fdiv(total, p.float_count()), BF16))

    def _float_side(self, channel: Any) -> None:
        e, p = self.e, self.p
        scales = e.offset(e.add(p.record, self.a["value_scales"]), channel, 4)
        e.store(scales, e.floats(1.0))
        total = e.variable(e.floats(0.0))
        with e.loop(p.count) as token:
            value = e.load(p.number(token, channel, self.stored), FLOATS)
            total.value = self.b.fadd(total.value, value)
        self._store_mean(channel, total.value)

    def _write_codes(self) -> None:
        e, p = self.e, self.p
        parts = 8 // self.codec.plane_bits
        width = e.divide(self.stored, parts)
        with e.loop(e.divide(width, LANES)) as block:
            channels = [
                e.add(e.multiply(width, part), e.multiply(block, LANES)) for part in range(parts)
            ]
            scalings = [self._scaling(channel) for channel in channels]
            totals = [e.variable(e.floats(0.0)) for _ in channels]
            with e.loop(e.integer(PAGE // SUBPAGE)) as subpage:
                self._encode_subpage(subpage, channels, scalings, totals)
                at = e.add(e.multiply(subpage, width), e.multiply(block, LANES))
                for name, buffer in (("values", p.block), ("values_low", p.low_block)):
                    if name == "values" or self.codec.planes == 2:
                        target = e.add(e.add(p.record, self.a[name]), e.multiply(at, SUBPAGE))
                        self._transpose(buffer, target)
            for channel, by, total in zip(channels, scalings, totals, strict=True):
                self._store_mean(channel, self.b.fmul(total.value, by.scale))

    def _encode_subpage(
        self, subpage: Any, channels: list[Any], scalings: list[numbers.Scaling], totals: list[Any]
    ) -> None:
        """Bytes of 16 tokens by 16 channels into the buffers, zeros behind the last token."""
        e, b, p = self.e, self.b, self.p
        first = e.multiply(subpage, SUBPAGE)
        count = e.clip(e.subtract(p.count, first), e.integer(SUBPAGE))
        for i in range(4):
            for buffer in (p.block, p.low_block):
                e.store(e.add(buffer, _VECTOR * i), e.constant(0))
        with e.loop(count) as i:
            stored = []
            for channel, by, total in zip(channels, scalings, totals, strict=True):
                value = e.load(p.number(e.add(first, i), channel, self.stored), FLOATS)
                code, decoded = numbers.encode(e, value, by, self.codec)
                stored.append(code)
                total.value = b.fadd(total.value, decoded)
            planes = numbers.planes(e, stored, self.codec)
            for buffer, plane in zip((p.block, p.low_block), planes, strict=False):
                e.store(e.offset(buffer, i, LANES), b.trunc(plane, BYTES))

    def _transpose(self, buffer: Any, target: Any) -> None:
        """[16 tokens, 16 channels] → [16 channels, 16 tokens]."""
        e = self.e
        rows = [e.load(e.add(buffer, LANES * i), BYTES) for i in range(LANES)]
        for i, column in enumerate(lanes.transpose(e, rows)):
            e.store(e.add(target, LANES * i), column)
