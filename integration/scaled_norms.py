"""Norms whose weights hold AWQ's scales, beside the model's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from lath.integration.report import Place


def norm_places(model: nn.Module, norms: Mapping[str, Mapping[str, Tensor]]) -> list[Place]:
    """For each norm that was scaled, its place and a copy of it that has these parameters."""
    places = []
    for path, parameters in norms.items():
        parent, _, attribute = path.rpartition(".")
        original = model.get_submodule(path)
        scaled = copy.deepcopy(original)
        for name, value in parameters.items():
            own = scaled.get_parameter(name)
            own.data = value.to(own)
        places.append(
            Place(model.get_submodule(parent), attribute, path, original=original, packed=scaled)
        )
    return places
