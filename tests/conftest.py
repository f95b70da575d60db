"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

# The networks here are tiny: a second thread costs more than it brings, and thread pools of several
# engines that spin on the same two cores are slower a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `import openvino` sends an event over the network unless this package is missing.
sys.modules.setdefault("openvino_telemetry", None)

# pytest (since 9.1) puts its log capture on loggers that do not propagate too. torch's trace log
# then finds a handler and writes every step of a trace into it: pages under each failing export.
logging.getLogger("torch.__trace").addHandler = lambda handler: None

ROOT = Path(__file__).parents[1]
GOLDEN = [
    *([Path(os.environ["SDENGINE_GOLDEN"])] if "SDENGINE_GOLDEN" in os.environ else []),
    ROOT / "tests" / "golden" / "data",
    ROOT.parent / "shared" / "spec" / "golden",
]


def golden_path(relative: str) -> Path:
    """A file of the golden data. The large cases are not in the repository: in CI their absence is
    a failure, elsewhere a skip with the reason."""
    for root in GOLDEN:
        if (root / relative).is_file():
            return root / relative
    message = f"golden file {relative} is in none of {', '.join(map(str, GOLDEN))}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(f"{message}; set SDENGINE_GOLDEN to the folder that holds cases/ and keys/")


@functools.cache
def _case(name: str):
    case = json.loads(golden_path(f"cases/{name}.json").read_text())
    if "tensors" not in case and "weights" not in case:
        return case, {}
    from safetensors.numpy import load_file

    return case, load_file(golden_path(f"cases/{name}.safetensors"))


@pytest.fixture(scope="session")
def golden():
    """`golden(name) -> (case, arrays)`: a reference case of tests/golden/data or its full set."""
    return _case


@pytest.fixture(scope="session")
def golden_file():
    """`golden_file("keys/base.json") -> Path`."""
    return golden_path


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """`make_checkpoint(variant, scale="tiny", seed=11, dtype="fp16", suffix=".safetensors")`: Path
    of a random checkpoint with the original names, and its sidecar yaml in LDM's layout."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make(variant="base", scale="tiny", seed=11, dtype="fp16", suffix=".safetensors") -> Path:
        keys = f"keys/{variant}.tiny.json" if scale == "tiny" else f"keys/{variant}.json"
        config = json.loads(golden_path(keys).read_text())["config"]
        script = golden_path("make_checkpoint.py")
        if not (script.parent / keys).is_file():
            script = golden_path(keys).parents[1] / "make_checkpoint.py"
        path = folder / f"{variant}-{scale}-{seed}-{dtype}{suffix}"
        command = [sys.executable, script, "--variant", variant, "--out", path, "--quiet"]
        options = ["--scale", scale, "--seed", str(seed), "--dtype", dtype]
        subprocess.run([*command, *options], check=True)
        path.with_suffix(".yaml").write_text(json.dumps(ldm_yaml(config)))  # JSON is YAML
        return path

    return make


def ldm_yaml(config: dict) -> dict:
    """The facts of a key list as the config file that lies beside an original checkpoint."""
    vae = {k: v for k, v in config["vae"].items() if k not in ("embed_dim", "attn_type")}
    params = {
        "parameterization": config["prediction"],
        "linear_start": config["linear_start"],
        "linear_end": config["linear_end"],
        "timesteps": config["timesteps"],
        "scale_factor": config["scale_factor"],
        "unet_config": {"params": config["unet"]},
        "first_stage_config": {
            "params": {"embed_dim": config["vae"]["embed_dim"], "ddconfig": vae}
        },
        "cond_stage_config": {"params": config["text"]},
    }
    companions = {
        "depth_stage_config": "depth_model",
        "embedder_config": "image_embedder",
        "low_scale_config": "low_scale",
        "noise_aug_config": "noise_aug",
    }
    params |= {to: {"params": config[of]} for to, of in companions.items() if of in config}
    return {"model": {"params": params}}


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory):
    """`exported_once(name, make)`: the Path that `make(Path)` fills, made by one of the processes
    that run the tests side by side (pytest-xdist), and used by all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make) -> Path:
        place, claim = root / "exported" / name, root / f"exported-{name}.claim"
        failed = claim.with_suffix(".failed")
        place.parent.mkdir(exist_ok=True)
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            for _ in range(1200):
                if (place / "manifest.json").is_file():
                    return place
                assert not failed.exists(), f"the export of {name} failed in another process"
                time.sleep(1)
            pytest.fail(f"waited 20 minutes for the export of {name}")
        try:
            make(place)
        except BaseException:
            failed.touch()
            raise
        return place

    return get


@pytest.fixture(scope="session")
def tiny_bundle(make_checkpoint, exported_once) -> Path:
    """The tiny random eps model as a bundle with OpenVINO float32 and bfloat16 proved. An
    environment that holds one backend alone is given it in $SDENGINE_TINY_BUNDLE (.ci/ipex)."""
    if "SDENGINE_TINY_BUNDLE" in os.environ:
        return Path(os.environ["SDENGINE_TINY_BUNDLE"])
    from sdengine.export import export_bundle
    from sdengine.export.checkpoint import open_checkpoint

    def make(out: Path) -> None:
        export_bundle(open_checkpoint(make_checkpoint("base")), out, cuts=(0, 1, 2), tiles=False)

    return exported_once("tiny", make)


@pytest.fixture(scope="session")
def embedding_stats(tmp_path_factory) -> Path:
    """Statistics for the tiny unclip-l checkpoint, as Karlo's file holds them: a pickled pair."""
    import torch

    generator = torch.Generator().manual_seed(4)
    mean = 0.3 * torch.randn(32, generator=generator)
    std = 0.5 + torch.rand(32, generator=generator)
    path = tmp_path_factory.mktemp("statistics") / "ViT-L-14_stats.th"
    torch.save((mean, std), path)
    return path


@pytest.fixture(scope="session")
def variant_bundle(make_checkpoint, embedding_stats, exported_once, tmp_path_factory):
    """`variant_bundle("inpainting")`: Path of that variant's tiny random model as a bundle, proved
    on OpenVINO in float32; each is exported once. Its native latent is 16x16: tracing is slow
    enough without large pictures."""
    from sdengine.export import export_bundle
    from sdengine.export.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("variants")

    @functools.cache
    def get(variant: str) -> Path:
        def make(out: Path) -> None:
            stats = embedding_stats if variant == "unclip-l" else None
            path = make_checkpoint(variant)
            facts = json.loads(path.with_suffix(".yaml").read_text())
            facts["model"]["params"]["image_size"] = 16
            config = folder / f"{variant}.yaml"
            config.write_text(json.dumps(facts))
            checkpoint = open_checkpoint(path, config=config, embedding_stats=stats)
            export_bundle(checkpoint, out, precisions=("f32",), cuts=(), tiles=False)

        return exported_once(variant, make)

    return get


@pytest.fixture
def rng():
    return np.random.default_rng(20261123)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Compiled networks and exported bundles of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def handmade():
    """The module tests/handmade.py: a small network as graphs, and its answer in numpy."""
    spec = importlib.util.spec_from_file_location("handmade", ROOT / "tests" / "handmade.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """File names that are not text reach the captured log; between processes a report must be."""
    outcome = yield
    report = outcome.get_result()
    report.sections = [(n, t.encode("utf-8", "replace").decode()) for n, t in report.sections]
