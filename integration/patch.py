"""`lath.patch`: linear layers, attention and cache of a model in low bits, in place, reported.

The linear layers of any torch module: it looks for `nn.Linear` and knows no model. What it knows of
Hugging Face models is how they name an output layer and how they tie it to the embedding; attention
and cache are theirs alone (`patch_attention`).
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.families import weight_codec
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.quantizer import RTN, Quantizer
from lath.formats.quantizer import quantizer as parse_quantizer
from lath.integration.calibrate_layer import relative_error
from lath.integration.calibration import (
    Calibrated,
    CalibratedLinear,
    Calibration,
    calibrate,
    calibration_of,
)
from lath.integration.find import Found, check_selection, find_linears, wrapped
from lath.integration.linear import PackedLinear
from lath.integration.patch_attention import AttentionPatch, attention_options
from lath.integration.patch_decode import DecodePatch, check_decode
from lath.integration.patch_rows import (
    Packed,
    PatchOptions,
    is_to_do,
    report_of,
    why_nothing,
)
from lath.integration.progress import progress_bar, shows_progress
from lath.integration.report import PatchReport, Place
from lath.integration.scaled_norms import norm_places
from lath.integration.tying import untie
from lath.verbs.backends import BACKENDS, resolve_backend
from lath.verbs.checks import check_flag
from lath.verbs.quantize import quantize
from lath.verbs.selection import Selection

logger = logging.getLogger("lath")

# More work than this, in weights, takes more than about two seconds on one CPU core.
_WORTH_A_BAR = 50_000_000
_SEARCH_COST = 40


def patch(
    model: nn.Module,
    weights: str | WeightCodec | None = "int4-g64",
    *,
    attention: str | None = None,
    kv: str | None = None,
    select: str | Selection | None = None,
    repair: bool | str | None = None,
    audit: float | None = None,
    skip: Sequence[str] = ("lm_head",),
    only: Sequence[str] | None = None,
    activations: str | ActivationFormat = "auto",
    backend: str = "auto",
    decode: str = "auto",
    search: bool = False,
    quantizer: str | Quantizer = "rtn",
    calibration: Calibration | Tensor | None = None,
    importance: Mapping[str, Tensor] | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> PatchReport:
    """Replace every plain nn.Linear of `model` by a PackedLinear, and its attention, in place.

    weights: the codec; None leaves the linear layers alone. attention, of a Hugging Face model:
    "int8" is `lath.attention` (int8 scores, 16-bit P·V); "float" or None leaves it as exact as it
    is. kv: the page codecs of the cache that `generate` makes: one for keys and values ("int8",
    "int4", "int8-planes", "e4m3", "float", ...) or "k8v4", "k4v2" and the like; None leaves
    transformers' cache. With kv and without attention="int8" all attention of that cache, a
    prompt's too, reads its pages. select, repair, audit: see below. skip: patterns of modules to
    leave alone; a pattern fits the end of a module's path, with everything below it, and may hold
    `*` and `?` ("lm_head", "layers.0", "*_proj"). "lm_head" also means the model's output layer,
    whatever its name. skip=() packs that too; a head that is tied to the embedding is untied first.
    only: patterns of the layers to pack, so that a second call gives others another codec; None
    packs all. activations: as for `lath.linear`, or "auto": int8 with the weight's group on a
    CPU (but float for vector codebooks), float elsewhere. backend: as for `lath.linear`. search:
    choose each group's range by squared error, slower. importance: by the name of each layer, as
    for `lath.quantize`; `lath.mean_square_inputs` records it. dry_run: only report. progress: show
    a bar; None shows it on a terminal when there is much to do.

    quantizer: how codes are chosen, for every codec that rounds one weight at a time: "rtn"; "hqq"
    (codecs with "-fzero"); "gptq", "awq", "awq+gptq" with `calibration`; or `lath.GPTQ(...)` and
    the like. AWQ scales the norms and linear layers that make the inputs; undo() puts them back;
    where it cannot, the report says why. calibration: token ids [texts, tokens] or
    `lath.Calibration`, which can be resumed; the layers are calibrated one at a time, the ones
    before already rounded.

    decode, with kv on a CPU: "fused" computes each new token of a decoder of Llama's shape in one
    compiled call, or raises ValueError saying why not; "modules" calls the modules; "auto" fuses
    where it can. A call that cannot be fused (a prompt, a batch, padding, hooks, …) goes through
    the modules; the report's `decode` counts both, with the reasons.

    select, with kv: which pages or tokens of the cache a step of decoding reads, "quest:1024" or
    any `lath.Selection`; None: all. The first piece of a prompt is attended as without it; later
    pieces of more than 16 tokens read everything (Selection.chunks: they select too), and so do
    layers with a sliding window, those in Selection.dense_layers, and caches within the budget or
    Selection.dense_below. repair: as for `lath.decode_attention`, in place of the Selection's own;
    not with a softcap of the scores (Gemma 2) or a mask of the caller's. audit: a threshold between
    0 and 1; every step with lists then measures what they miss, for each layer and query head, in
    the report's `misses`. It changes no result, but attends twice more and scores every token.

    Kept, with the reason in the report: subclasses of nn.Linear, modules with hooks, weights on the
    meta device, adapters beside a `base_layer` (PEFT's; a PeftModel may be given, and its base
    layers are packed). A module used in several places is packed once, for all of them. Layers
    packed already with the same options stay; with other options: ValueError, undo that patch
    first. An error leaves the model as it was. Warns if the model has nothing to replace.

    Returns a PatchReport: print it, `undo()` it, or use it in a `with` statement.
    """
    check_flag("dry_run", dry_run)
    options = _parse_options(model, weights, activations, backend, search, quantizer)
    texts = calibration_of(calibration, options.quantizer)
    if importance is not None and texts is not None:
        raise ValueError(
            f"importance is for quantizer 'rtn', which has no calibration; got {quantizer!r}"
        )
    options = dataclasses.replace(options, importance=importance)
    attending = attention_options(attention, kv, backend, select, repair, audit)
    inner = wrapped(model)
    attends = None if attending is None else AttentionPatch.prepare(inner, attending)
    decodes = DecodePatch.of(inner, check_decode(decode), attends)
    found = [] if weights is None else find_linears(model, check_selection(model, skip, only))
    _check_packed(found, options)
    todo = [one for one in found if is_to_do(one)]
    calibrated = None
    if texts is not None and todo and not dry_run:
        calibrated = _calibrate(model, todo, options, texts, progress)
    packed = {} if dry_run else _pack_all(todo, options, progress, calibrated)
    report = report_of(model, found, packed, options, dry_run)
    if weights is None:
        report.weights = "unchanged"
    if attends is not None:
        report.attention = attends.rows(dry_run)
        report.selection = attends.selection_row(dry_run)
        report._attention = None if dry_run else attends
        report._decode = None if dry_run else decodes
    if attends is None and not todo and all(row.action == "kept" for row in report.rows):
        reason = why_nothing(model, report.rows, weights)
        warnings.warn(f"lath.patch replaced nothing: {reason}", stacklevel=2)
    if packed:
        report._places = [
            Place(*place, original=new.dense, packed=new.module)
            for one in todo
            for new in [packed[id(one.module)]]
            for place in one.places
        ]
        if calibrated is not None:
            report._places += norm_places(model, calibrated.norms)
        report._untie = lambda: untie(model, [one.module for one in todo])
    if packed or report._attention:
        report.redo()
    if decode == "fused" and report._decode is not None:
        try:
            report._decode.require()
        except BaseException:
            report.undo()
            raise
    logger.info("%s", report)
    return report


def _parse_options(
    model: nn.Module,
    weights: str | WeightCodec | None,
    activations: str | ActivationFormat,
    backend: str,
    search: bool,
    quantizer: str | Quantizer,
) -> PatchOptions:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    chosen = None if activations == "auto" else activation_format(activations)
    # Without weights no layer is looked for, and the codec is never read.
    codec = weight_codec("int8" if weights is None else weights)
    how = parse_quantizer(quantizer)
    if weights is None and not isinstance(how, RTN):
        raise ValueError(f"quantizer {str(how)!r} needs weights, got weights=None")
    return PatchOptions(codec, chosen, backend, check_flag("search", search), how)


def _check_packed(found: list[Found], options: PatchOptions) -> None:
    """Layers packed before must have been packed with the options asked for now."""
    for one in found:
        module = one.module
        if one.reason or not isinstance(module, PackedLinear):
            continue
        activations = options.activations_on(module.device)
        codec = module.codec
        if options.search:  # which may have settled what the codec left open
            codec = getattr(codec, "opened", codec)
        have = (str(codec), str(module.activations), module.backend, module.quantizer)
        want = (
            str(options.codec), str(activations), options.backend, str(options.quantizer),
        )  # fmt: skip
        if have != want:
            raise ValueError(
                f"{one.name} is packed already as weights={have[0]!r}, activations={have[1]!r}, "
                f"backend={have[2]!r}, quantizer={have[3]!r}; asked for "
                f"{', '.join(map(repr, want))}: call "
                "undo() on the report of the first patch, or skip this layer"
            )


def _calibrate(
    model: nn.Module,
    todo: list[Found],
    options: PatchOptions,
    texts: Calibration,
    progress: bool | None,
) -> Calibrated:
    owners: dict[int, str] = {}
    for one in todo:
        owner = owners.setdefault(id(one.module.weight), one.name)
        if one.also_named or owner != one.name:
            others = [*one.also_named, *([owner] if owner != one.name else [])]
            raise NotImplementedError(
                f"{one.name} is used in several places ({', '.join(others)}): its inputs in one of "
                "them are not those of the others; skip it"
            )
        resolve_backend(options.backend, one.module.weight.device)
    names = [one.name for one in todo]
    return calibrate(
        model, names, options.codec, options.quantizer, texts, options.search, progress
    )


def _pack_all(
    todo: list[Found],
    options: PatchOptions,
    progress: bool | None,
    calibrated: Calibrated | None,
) -> dict[int, Packed]:
    """Quantise every layer before the model is touched; keyed by the id of the dense module."""
    if calibrated is not None:
        return {
            id(one.module): _calibrated(one.module, calibrated.linears[one.name], options)
            for one in todo
        }
    packed: dict[int, Packed] = {}
    weights: dict[int, tuple[PackedWeight, float]] = {}
    total = sum(one.module.weight.numel() for one in todo)
    worth = total * (_SEARCH_COST if options.search else 1) >= _WORTH_A_BAR
    enabled = (worth and shows_progress()) if progress is None else progress
    with progress_bar(f"packing {len(todo)} layers as {options.codec}", total, enabled) as advance:
        for one in todo:
            dense = one.module
            assert isinstance(dense, nn.Linear)
            # Two layers that share a weight share the packed one as well.
            if id(dense.weight) not in weights:
                weights[id(dense.weight)] = _quantize(one.name, dense.weight.detach(), options)
            weight, error = weights[id(dense.weight)]
            made = _packed(dense, weight, dense.bias, error, str(options.quantizer), options)
            weights[id(dense.weight)] = made.module.qtensor, error
            packed[id(dense)] = made
            advance(dense.weight.numel())
    return packed


def _calibrated(dense: nn.Module, one: CalibratedLinear, options: PatchOptions) -> Packed:
    assert isinstance(dense, nn.Linear)
    bias = dense.bias if one.bias is None else one.bias.to(dense.bias)
    return _packed(dense, one.weight, bias, one.error, one.note, options)


def _packed(
    dense: nn.Linear,
    weight: PackedWeight,
    bias: Tensor | None,
    error: float,
    note: str,
    options: PatchOptions,
) -> Packed:
    module = PackedLinear.from_qtensor(
        weight,
        None if bias is None else bias.detach().clone(),
        activations=options.activations_on(dense.weight.device),
        backend=options.backend,
        dtype=dense.weight.dtype,
    )
    module.quantizer = str(options.quantizer)
    return Packed(dense, module, error, note)


def _quantize(name: str, dense: Tensor, options: PatchOptions) -> tuple[PackedWeight, float]:
    """The packed weight and its relative error; checks that its backend can run where it is."""
    resolve_backend(options.backend, dense.device)
    try:
        own = None if options.importance is None else options.importance[name]
        weight = quantize(
            dense, options.codec, quantizer=options.quantizer, search=options.search, importance=own
        )
    except KeyError as error:
        raise ValueError(f"importance must have {name!r}, which is to be packed") from error
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    return weight, relative_error(dense, weight)
