"""All that an openvino.Model is rewritten in before it is compiled, and how the cache tells.

checked by  tests/unit/test_backend_openvino.py, and the tests of each rewrite
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import openvino_attention as attention
from . import openvino_floats as floats
from . import openvino_gates as gates
from . import openvino_layout as layout
from . import openvino_padding as padding
from . import openvino_pairs as pairs
from . import openvino_upsampling as upsampling


@dataclass(frozen=True)
class Rewrites:
    """What a network is rewritten in.

    processor   it is compiled for the processor, whose plugin the rewrites are made for
    int8        its layers are in int8, those of them that are
    half        the others in bfloat16
    paired      see Profile
    """

    processor: bool
    int8: bool
    half: bool
    paired: bool = False

    def recipes(self) -> dict[str, str]:
        """Which versions of them made a compiled network; it is not taken for another's."""
        here, whole = self.processor, self.processor and self.int8
        made = {
            "rows": here and self.paired and pairs.RECIPE,
            "in float32": self.half and floats.RECIPE,
            "layout": here and self.half and layout.RECIPE,
            "attention": here and attention.RECIPE,
            "upsampling": here and upsampling.RECIPE,
            "gates": whole and gates.RECIPE,
            "padding": whole and padding.RECIPE,
        }
        return {name: recipe or "as it is" for name, recipe in made.items()}

    def apply(self, core: Any, model: Any) -> None:
        """Rewrite an openvino.Model of the shapes that it will be compiled for."""
        made: list[Any] = []
        if self.processor:
            if self.paired:
                pairs.compute_once(model)
            attention.split_queries(model)
            upsampling.convolve_before(model)
            if self.int8:
                gates.halve_gates(model)
                padding.pad_with_zero_points(model)
            if self.half and floats.of_a_step(model):
                made = layout.rearrange(model, self.int8)
        if self.half:
            convolutions = self.processor and not self.int8
            floats.keep_float32(core, model, made, convolutions=convolutions)
