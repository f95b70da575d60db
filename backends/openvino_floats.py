"""What of a step's network stays in float32 when OpenVINO computes it in bfloat16.

Left to itself OpenVINO multiplies the time by the embedding's frequencies in bfloat16, where 999 is
1000 and the angle of the fast waves is off by radians. It also rounds before and after every norm,
and what goes from block to block. Guidance makes these errors up to ten times larger. Here the way
of the time, the norms, the sums between blocks and the last convolution are marked as its own
passes mark what they keep; other convolutions, linear layers and attention stay as fast as they
are. Where nothing is in int8, so are the convolutions that cost least for what they round: that
which reads the picture, and those of single cells, which skips go through.
docs/numerics.md has the figures.

checked by  tests/unit/test_openvino_floats.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .openvino_pairs import is_double

TIME = "timestep"  # the input that tells a step's network from the others
WAYS = {"Add", "Concat", "Interpolate", "Multiply", "Sigmoid"}  # of pictures: rank 4
RECIPE = "time, norms, sums, last convolution; without int8 first and skips: 5"
# OpenVINO's attribute has no constructor in Python: it is read from a graph that has it.
_MARKED = """<?xml version="1.0"?><net name="mark" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1" element_type="f32"/>
<rt_info><attribute name="DisablePrecisionConversion" version="0" value="dynamic:f16"/></rt_info>
<output><port id="0" precision="FP32"><dim>1</dim></port></output></layer>
<layer id="1" name="y" type="Result" version="opset1">
<input><port id="0" precision="FP32"><dim>1</dim></port></input></layer></layers>
<edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


def of_a_step(model: Any) -> bool:
    """Whether an openvino.Model is a step's network."""
    return any(TIME in port.names for port in model.inputs)


def keep_float32(
    core: Any, model: Any, also: Iterable[Any] = (), *, convolutions: bool = False
) -> int:
    """Mark the nodes of an openvino.Model; returns how many.

    model           any; one without a timestep is left as it is
    also            nodes of it that are marked too
    convolutions    more of them than the last: beside layers in int8 they change too little
    """
    if not of_a_step(model):
        return 0
    marked = core.read_model(_MARKED.encode(), b"").get_parameters()[0].get_rt_info()
    attributes = list(marked.items())
    nodes = [*also, *(_shaped(node) for node in list(_kept(model, convolutions)))]
    for node in nodes:
        for key, value in attributes:
            node.set_rt_info(value, key)
    return len(nodes)


def _shaped(node: Any) -> Any:
    """An Unsqueeze as a Reshape in its place: OpenVINO makes one of it, and drops the mark."""
    shape = node.output(0).partial_shape
    if node.get_type_name() != "Unsqueeze" or shape.is_dynamic:
        return node
    from openvino import opset13  # type: ignore[import-untyped]

    made = opset13.reshape(node.input_value(0), list(shape.to_shape()), special_zero=False)
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(made.output(0))
    return made


def _kept(model: Any, convolutions: bool) -> Iterator[Any]:
    cheap = _cheap(model) if convolutions else set()
    timed: set[str] = set()
    kept: set[str] = set()
    for node in model.get_ordered_ops():
        if node.friendly_name == TIME:
            timed.add(TIME)
            continue
        if _from(node, timed):
            timed.add(node.friendly_name)
        elif is_double(node):
            if _sources(node)[0].friendly_name not in kept:
                continue
        elif not (
            _of_a_norm(node) or _on_the_way(node) or _last(node) or node.friendly_name in cheap
        ):
            continue
        kept.add(node.friendly_name)
        yield node


def _from(node: Any, timed: set[str]) -> bool:
    """Whether all that it computes with comes from these: it ends where time meets picture."""
    computed = [s for s in _sources(node) if not _constant(s)]
    if not computed or node.get_type_name() in ("ShapeOf", "Result"):
        return False
    return all(s.friendly_name in timed for s in computed)


def _of_a_norm(node: Any) -> bool:
    """The norm, and for groups the changes of shape before and after it."""
    kind = node.get_type_name()
    if kind != "Reshape":
        return bool(kind == "MVN")
    after = [user.get_type_name() for user in _users(node)]
    return "MVN" in after or _sources(node)[0].get_type_name() == "MVN"


def _on_the_way(node: Any) -> bool:
    """Sums, skips and what scales a norm; not the way to 8 bits and back, nor what
    openvino_upsampling puts together."""
    sources = _sources(node)
    if _joins_places(node) or _is_rounded(node):
        return False
    if node.get_type_name() == "Add" and not any(map(_constant, sources)):
        return True
    if node.get_type_name() not in WAYS or node.output(0).partial_shape.rank.get_length() != 4:
        return False
    return not any(s.get_type_name() in ("Convert", "Subtract") for s in sources)


def _joins_places(node: Any) -> bool:
    return [user.get_type_name() for user in _users(node)] == ["DepthToSpace"]


def _is_rounded(node: Any) -> bool:
    """A sum that only goes, divided or not, to 8 bits: OpenVINO 2026.4 compiles no marked one."""
    users = _users(node)
    if node.get_type_name() != "Add" or len(users) != 1:
        return False
    after = users if users[0].get_type_name() != "Multiply" else _users(users[0])
    return [user.get_type_name() for user in after] == ["FakeQuantize"]


def _last(node: Any) -> bool:
    """A convolution whose result, its bias added, leaves the graph."""
    if node.get_type_name() != "Convolution":
        return False
    after = _users(node)
    after += [user for n in after if n.get_type_name() == "Add" for user in _users(n)]
    return any(n.get_type_name() == "Result" for n in after)


def _cheap(model: Any) -> set[str]:
    """Names of the convolutions that round most for their products."""
    kernels = {
        node.friendly_name: list(node.input_value(1).partial_shape.to_shape())[2:]
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Convolution"
    }
    wide = [name for name, kernel in kernels.items() if kernel != [1, 1]]
    return kernels.keys() - set(wide[1:])


def _users(node: Any) -> list[Any]:
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def _sources(node: Any) -> list[Any]:
    return [value.get_node() for value in node.input_values()]


def _constant(node: Any) -> bool:
    """A constant, or one behind a change of type."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
