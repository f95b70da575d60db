"""Depth network, image tower, statistics and small-picture schedule: what is read, what refused."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sdengine.engine.bundle import STATISTICS
from sdengine.engine.errors import (
    BadConfig,
    NotACheckpoint,
    RequestError,
    TensorMismatch,
    UnknownFact,
    UnsafeCheckpoint,
)
from sdengine.export.checkpoint import fingerprint, open_checkpoint
from sdengine.export.companions import companion_configs, squared_cosine
from sdengine.export.components import parts
from sdengine.export.modules.depth import DepthConfig
from sdengine.export.modules.image_encoder import ImageConfig

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def arrays(make_checkpoint):
    made = {}
    return lambda v: made.setdefault(v, load_file(make_checkpoint(v)))


@pytest.fixture
def changed(make_checkpoint, arrays, tmp_path):
    """`changed(variant, edit, **params)`: the tiny model after `edit(arrays)`, its yaml with other
    `params`."""

    def make(variant, edit=lambda tensors: None, **params):
        tensors = dict(arrays(variant))
        edit(tensors)
        path = tmp_path / f"{variant}.safetensors"
        save_file(tensors, path)
        facts = json.loads(make_checkpoint(variant).with_suffix(".yaml").read_text())
        facts["model"]["params"] |= params
        path.with_suffix(".yaml").write_text(json.dumps(facts))
        return path

    return make


def without(*starts):
    def edit(tensors):
        for name in [n for n in tensors if n.startswith(starts)]:
            del tensors[name]

    return edit


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ("depth", {"depth": DepthConfig()}),
        ("unclip-h", {"image_encoder": ImageConfig()}),
        (
            "unclip-l",
            {
                "image_encoder": ImageConfig(
                    width=1024, layers=24, embedding=768, activation="quick_gelu"
                )
            },
        ),
        ("x4-upscaler", {}),
        ("inpainting", {}),
    ],
)
def test_published_sizes_need_no_config(golden_file, variant, wanted):
    """References: reference-spec 1.9 and 1.10, which the classes' defaults repeat."""
    listed = json.loads(golden_file(f"keys/{variant}.json").read_text())["tensors"]
    shapes = {name: tuple(t["shape"]) for name, t in listed.items()}
    found = companion_configs(shapes, {}, variant)
    kinds = {"depth": DepthConfig, "image_encoder": ImageConfig}
    assert {n: kinds[n].from_dict(c) for n, c in found.items()} == wanted


@pytest.mark.parametrize(
    ("variant", "prefix", "idle"),
    [
        (
            "depth",
            "depth_model.",
            ("pretrained.model.head.", "pretrained.model.norm.", "refinenet4.resConfUnit1."),
        ),
        ("unclip-h", "embedder.model.visual.", ()),
        ("unclip-l", "embedder.model.visual.", ()),
    ],
)
def test_every_tensor_of_a_companion_is_used(
    make_checkpoint, embedding_stats, variant, prefix, idle
):
    stats = embedding_stats if variant == "unclip-l" else None
    checkpoint = open_checkpoint(make_checkpoint(variant), embedding_stats=stats)
    used = {n for p in parts(checkpoint.facts, checkpoint.configs) for n in p.tensor_names()}
    rest = {n for n in checkpoint.tensors if n.startswith(prefix)} - used
    assert not {n for n in rest if not any(i in n for i in idle)}
    assert all(any(i in n for n in rest) for i in idle)


def test_depth_network_may_be_absent(changed):
    checkpoint = open_checkpoint(changed("depth", without("depth_model.")))
    assert "depth" not in {p.name for p in parts(checkpoint.facts, checkpoint.configs)}


def test_half_a_depth_network_is_refused(changed):
    gone = "depth_model.model.scratch.refinenet2.out_conv.weight"
    with pytest.raises(TensorMismatch, match=f"1 missing: {gone}"):
        open_checkpoint(changed("depth", without(gone)))


def test_an_unclip_model_without_its_tower(changed):
    with pytest.raises(TensorMismatch, match="no image tower") as caught:
        open_checkpoint(changed("unclip-h", without("embedder.model.visual.")))
    assert "whole model file" in caught.value.hint


def test_a_tower_of_another_model(changed):
    def narrow(tensors):
        name = "embedder.model.visual.proj"
        tensors[name] = np.ascontiguousarray(tensors[name][:, :16])

    with pytest.raises(TensorMismatch, match=r"class vector of 64.*embedding of 16") as caught:
        open_checkpoint(changed("unclip-h", narrow))
    assert "belong together" in caught.value.hint


@pytest.mark.parametrize(
    ("variant", "section", "part"),
    [
        ("depth", "depth_stage_config", "depth"),
        ("unclip-h", "embedder_config", "image_encoder"),
    ],
)
def test_heads_of_a_small_companion_must_be_stated(changed, variant, section, part):
    with pytest.raises(UnknownFact, match=f"heads of the {part} of width 64") as caught:
        open_checkpoint(changed(variant, **{section: {}}))
    assert "--config" in caught.value.hint


@pytest.mark.parametrize(
    ("section", "params", "message"),
    [
        ("embedder_config", {"heads": 5}, "image_encoder.heads.*5, which does not divide 64"),
        ("embedder_config", {"heads": 4, "activation": "relu"}, "activation.*'relu'"),
        (
            "noise_aug_config",
            {"noise_schedule_config": {"beta_schedule": "linear"}},
            "beta_schedule is 'linear', expected 'squaredcos_cap_v2'",
        ),
    ],
)
def test_a_config_that_cannot_be(changed, section, params, message):
    with pytest.raises(BadConfig, match=message) as caught:
        open_checkpoint(changed("unclip-h", **{section: {"params": params}}))
    assert "config" in caught.value.hint or "yaml" in caught.value.hint


# -- the small picture of the upscaler ---------------------------------------------------------


def test_low_scale_facts(make_checkpoint):
    """reference-spec 1.11"""
    low = open_checkpoint(make_checkpoint("x4-upscaler")).facts.low_scale
    s = low.schedule
    assert (s.kind, s.beta_start, s.beta_end, s.timesteps) == ("scaled_linear", 0.0001, 0.02, 1000)
    assert low.max_level == 350
    assert open_checkpoint(make_checkpoint("base")).facts.low_scale is None


def test_low_scale_facts_that_contradict_the_file(changed):
    other = {"params": {"noise_schedule_config": {"linear_start": 0.0005, "linear_end": 0.02}}}
    with pytest.raises(BadConfig, match=r"0\.0005 to 0\.02; the file's own"):
        open_checkpoint(changed("x4-upscaler", low_scale_config=other))


def test_a_level_that_is_none(changed):
    with pytest.raises(BadConfig, match="highest noise level of 1000, expected 0 to 999"):
        open_checkpoint(
            changed("x4-upscaler", low_scale_config={"params": {"max_noise_level": 1000}})
        )


# -- the image's embedding ---------------------------------------------------------------------


def test_squared_cosine_is_the_reference_s(golden):
    case, _ = golden("schedules")
    wanted = np.array(case["beta_schedules"]["squaredcos_cap_v2"]["betas_float64"])
    np.testing.assert_allclose(squared_cosine(1000), wanted, rtol=1e-12)


def test_image_facts(make_checkpoint):
    """reference-spec 1.9"""
    image = open_checkpoint(make_checkpoint("unclip-h")).facts.image_conditioning
    assert image.mean == (0.48145466, 0.4578275, 0.40821073)
    assert image.std == (0.26862954, 0.26130258, 0.27577711)
    assert (image.size, image.embedding, image.statistics) == (224, 32, False)
    assert (image.noise.kind, image.noise.timesteps) == ("squaredcos_cap_v2", 1000)


def test_noise_of_another_law(changed):
    def linear(tensors):
        tensors["noise_augmentor.betas"] = np.linspace(1e-4, 0.02, 1000, dtype=np.float32)

    with pytest.raises(UnknownFact, match=r"noise of the image embedding.*1000 betas") as caught:
        open_checkpoint(changed("unclip-h", linear))
    assert "squaredcos_cap_v2" in caught.value.hint


def vectors(checkpoint):
    return [checkpoint.tensors[name].torch().numpy() for name in STATISTICS]


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_statistics_from_a_file(make_checkpoint, embedding_stats, tmp_path, kind):
    wanted = [v.numpy() for v in torch.load(embedding_stats)]
    file = embedding_stats
    if kind == "safetensors":
        file = tmp_path / "stats.safetensors"
        save_file(dict(zip(("mean", "std"), wanted, strict=True)), file)
    checkpoint = open_checkpoint(make_checkpoint("unclip-l"), embedding_stats=file)
    assert checkpoint.facts.image_conditioning.statistics
    for found, want in zip(vectors(checkpoint), wanted, strict=True):
        assert np.array_equal(found, want)
    (tower,) = [p for p in parts(checkpoint.facts, checkpoint.configs) if p.name == "image_encoder"]
    assert set(STATISTICS) <= set(tower.tensor_names())


def test_statistics_make_another_model(make_checkpoint, embedding_stats, tmp_path):
    """Of content and of cached exports: two files of statistics are two bundles."""
    path, other = make_checkpoint("unclip-l"), tmp_path / "other.th"
    torch.save((torch.zeros(32), torch.ones(32)), other)
    ids = {open_checkpoint(path, embedding_stats=f).sha256 for f in (embedding_stats, other)}
    prints = {fingerprint(path, embedding_stats=f) for f in (None, embedding_stats, other)}
    assert (len(ids), len(prints)) == (2, 3)


def test_missing_statistics_are_asked_for_by_option(make_checkpoint):
    with pytest.raises(UnknownFact, match=r"unclip-l model.*a file of their own") as caught:
        open_checkpoint(make_checkpoint("unclip-l"))
    assert "--embedding-stats" in caught.value.hint
    assert "ViT-L-14_stats.th" in caught.value.hint


def test_statistics_for_a_model_without_an_embedding(make_checkpoint, embedding_stats):
    with pytest.raises(RequestError, match="base model, which has no embedding") as caught:
        open_checkpoint(make_checkpoint("base"), embedding_stats=embedding_stats)
    assert "--embedding-stats" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ((torch.zeros(31), torch.ones(31)), r"two vectors of 32.*\(31,\), \(31,\)"),
        ((torch.zeros(32),), "two vectors of 32"),
        ({"a": torch.zeros(32)}, "found dict"),
        ((torch.zeros(32), torch.zeros(32)), "above 0"),
        ((torch.full((32,), float("nan")), torch.ones(32)), "finite"),
    ],
)
def test_files_that_are_no_statistics(make_checkpoint, tmp_path, content, shown):
    file = tmp_path / "stats.th"
    torch.save(content, file)
    with pytest.raises(NotACheckpoint, match=shown) as caught:
        open_checkpoint(make_checkpoint("unclip-l"), embedding_stats=file)
    assert "mean and std" in caught.value.hint


class Hostile:
    def __reduce__(self):
        return shutil.rmtree, ("nowhere",)


def test_hostile_statistics_are_not_run(make_checkpoint, tmp_path):
    file = tmp_path / "stats.th"
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises((UnsafeCheckpoint, NotACheckpoint)):
        open_checkpoint(make_checkpoint("unclip-l"), embedding_stats=file)
