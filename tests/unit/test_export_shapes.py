"""Picture sizes to the shapes of engines; what the command line may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import RequestError
from sdengine.export.asked import nvidia_ask
from sdengine.export.shapes import Shapes, check, profiles

EMBEDDED = Path(__file__).parents[2] / "models" / "emoji"


@pytest.fixture(scope="module")
def bundle() -> Any:
    return open_bundle(EMBEDDED)


def sizes(bundle: Any, component: str, graph: str = "full", **asked: Any) -> list[dict[str, Any]]:
    one = bundle.components[component]
    found = profiles(Shapes(**asked), bundle, one, one.graphs[graph])
    return [{d: n[1] if len(set(n)) == 1 else n for d, n in dims.items()} for dims in found]


def test_the_models_own_size_by_default(bundle: Any) -> None:
    """128 pixels are 16 cells; both halves of guidance in one call; the VAE takes one picture."""
    assert sizes(bundle, "unet") == [{"B": 2, "T": 77, "h": 16, "w": 16}]
    assert sizes(bundle, "unet", "prologue") == [{"B": 2, "T": 77}]
    assert sizes(bundle, "vae_decoder") == [{"B": 1, "h": 16, "w": 16}]
    assert sizes(bundle, "vae_encoder") == [{"B": 1, "H": 128, "W": 128}]
    assert sizes(bundle, "text_encoder") == [{"B": 2}]


def test_buckets_are_engines_of_their_own(bundle: Any) -> None:
    found = sizes(bundle, "unet", sizes=((128, 128), (64, 192)), batches=(1, 4), halves=(2, 1))
    assert [(d["B"], d["h"], d["w"]) for d in found] == [
        *((b, 16, 16) for b in (2, 1, 8, 4)),
        *((b, 8, 24) for b in (2, 1, 8, 4)),
    ]
    assert sizes(bundle, "unet", "prologue", sizes=((128, 128), (64, 192))) == [{"B": 2, "T": 77}]
    assert len(sizes(bundle, "vae_decoder", batches=(1, 4))) == 1


def test_a_range_holds_all_of_them_and_is_best_at_the_first(bundle: Any) -> None:
    found = sizes(
        bundle, "unet", sizes=((128, 128), (64, 192)), batches=(1, 4), halves=(2, 1), dynamic=True
    )
    assert found == [{"B": (1, 2, 8), "T": 77, "h": (8, 16, 16), "w": (16, 16, 24)}]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sizes": ((100, 128),)}, "an engine for 128x100: sides are multiples of"),
        ({"sizes": ((0, 128),)}, "an engine for 128x0"),
        ({"batches": (0,)}, "a batch of 0"),
    ],
)
def test_sizes_that_the_model_cannot_have(bundle: Any, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(Shapes(**asked), bundle)
    assert words in caught.value.message
    assert "--" in caught.value.hint


def test_what_the_command_line_says() -> None:
    targets, ask = nvidia_ask(
        ["openvino", "trt-rtx"], sm="86,89,120", shapes="512x768, 768X512", batch="1,4",
        halves="2,1", dynamic=True, jobs=3,
    )  # fmt: skip
    assert targets == ["trt-rtx"]
    assert ask.sms == (86, 89, 120)
    assert ask.shapes == Shapes(((768, 512), (512, 768)), (1, 4), (2, 1), True)
    assert ask.jobs == 3
    assert nvidia_ask(["openvino"]) == ([], ask.__class__())


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"sm": "8.9"}, "'8.9' is not a whole number", "--sm 86,89,120"),
        ({"sm": ""}, "'' is not a whole number", "--sm 86,89,120"),
        ({"batch": "1,-2"}, "'-2' is not a whole number", "--batch 1,2"),
        ({"shapes": "512"}, "'512' is not a size", "--shapes 512x512"),
        ({"halves": "3"}, "guidance has two halves", "2 for both"),
        ({"jobs": 0}, "--jobs 0", "--jobs 1"),
    ],
)
def test_what_it_may_not_say(options: dict[str, Any], words: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        nvidia_ask(["trt-rtx"], **options)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_options_of_nvidia_without_its_target() -> None:
    with pytest.raises(RequestError, match="--sm, --dynamic: for engines of NVIDIA") as caught:
        nvidia_ask(["openvino"], sm="89", dynamic=True)
    assert "--target trt-rtx" in caught.value.hint
