"""Peers: in turn with ours on workers with known answers; environments and models on a fake pip."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest

from sdengine.bench import interleave, pace, reference, report, results
from sdengine.bench.pace import Pace
from sdengine.bench.peers import catalogue, envs, models
from sdengine.bench.peers.catalogue import Peer
from sdengine.engine.errors import BackendUnavailable, RequestError, StorageError, UnknownName

FAKE = str(Path(__file__).parents[1] / "fake_worker.py")
REQUEST = {"seed": 1, "prompt": "x", "sampler": "ddim", "steps": 2, "guidance": 7.5,
           "width": 16, "height": 16}  # fmt: skip


@pytest.fixture
def home(tmp_path):
    """With one environment, `fake`, whose Python is this one, and one model."""
    python = tmp_path / "home" / "envs" / "fake" / catalogue.SCRIPTS / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "home" / "models").mkdir()
    (tmp_path / "home" / "models" / "form.safetensors").write_text("")
    return tmp_path / "home"


@pytest.fixture
def setup(home, monkeypatch):
    """`setup(ours, peers)`: each name with the seconds that a picture takes."""

    def make(ours, peers):
        def runners(seconds):
            return {
                name: Peer("as it is", "fake", FAKE, "form", {"seconds": s})
                for name, s in seconds.items()
            }

        standard = Peer("", "fake", FAKE, "form", {"precision": "f32"})
        monkeypatch.setattr(catalogue, "OURS", {"f32": standard})
        return interleave.Setup("bundle", home, runners(ours), runners(peers))

    return make


def silent(*_):
    pass


def test_ratios_of_known_times(setup, tmp_path):
    out = tmp_path / "peers.json"
    asked = setup({"exact": 2.0, "high": 1.0}, {"slow": 6.0, "quick": 0.5})
    found = interleave.run(asked, REQUEST, out, silent, Pace(3))
    ratios = {(p["peer"], p["ours"]): p["ratio"]["median"] for p in found.ratios}
    assert ratios == pytest.approx({
        ("slow", "sdengine exact"): 3.0, ("slow", "sdengine high"): 6.0,
        ("quick", "sdengine exact"): 0.25, ("quick", "sdengine high"): 0.5})  # fmt: skip
    first = found.ratios[0]
    assert first["seconds"]["peer"]["samples"] == [6.0] * 3, "the warm-up does not count"
    assert first["quality"]["peer"]["psnr_db"] is None, "the same grey as the reference"
    assert first["settings"] == "as it is"
    assert first["peak_bytes"]["peer"] > 10e6
    assert results.load(out) == found


@pytest.fixture
def order(monkeypatch):
    """Which worker was asked for each picture, and which were running then."""
    asked = []
    ask = interleave.Runner.ask

    def noted(self, *args):
        asked.append(self.worker)
        return ask(self, *args)

    monkeypatch.setattr(interleave.Runner, "ask", noted)
    return asked


def test_they_take_turns(setup, tmp_path, order):
    interleave.run(setup({"ours": 1.0}, {"peer": 1.0}), REQUEST, tmp_path / "r", silent, Pace(3))
    reference, ours, peer, *measured = order
    assert len({reference, peer, ours}) == 3
    assert measured == [ours, peer] * 3 + [ours]


def test_what_is_not_measured_is_stopped(setup, tmp_path, monkeypatch):
    """The kernel's own word: T, stopped by a signal."""
    states = []
    pause = interleave.Worker.pause

    def noted(self):
        pause(self)
        status = Path(f"/proc/{self._process.pid}/stat")
        end = monotonic() + 10
        while (state := status.read_text().rpartition(")")[2].split()[0]) != "T":
            if monotonic() > end:
                break
            sleep(0.001)
        states.append(state)

    if not Path("/proc/self/stat").exists():
        pytest.skip("only Linux tells a process's state in /proc")
    monkeypatch.setattr(interleave.Worker, "pause", noted)
    interleave.run(setup({"ours": 1.0}, {"peer": 1.0}), REQUEST, tmp_path / "r", silent, Pace(2))
    # reference; after its load: each; a warm-up: each; then ours, peer, ours, peer, ours
    assert states == ["T"] * (2 + 2 * 2 + 5)


def test_a_peer_that_cannot_run_is_an_entry_with_its_reason(setup, home, tmp_path):
    asked = setup({"ours": 1.0}, {"good": 2.0})
    bad = {
        "absent": Peer("", "nowhere", FAKE, "form"),
        "broken": Peer("", "broken", FAKE, "form"),
        "formless": Peer("", "fake", FAKE, "other"),
    }
    (home / "envs" / "broken.failed").write_text("pip install x\nno matching distribution")
    found = interleave.run(
        replace(asked, peers={**bad, **asked.peers}), REQUEST, tmp_path / "r", silent, Pace(2)
    )
    told = {p["peer"]: p.get("failure", {}).get("error") for p in found.ratios}
    assert told == {
        "absent": "its environment nowhere is not there",
        "broken": "its environment broken could not be made: no matching distribution",
        "formless": "the model in the form 'other' is not there",
        "good": None,
    }
    assert found.ratios[0]["failure"]["hint"].endswith("peers.envs " + f"{home} nowhere")
    assert "peers.models" in found.ratios[2]["failure"]["hint"]


def test_a_variant_of_ours_that_fails_does_not_spoil_the_others(setup, tmp_path):
    asked = setup({"good": 1.0}, {"peer": 2.0})
    ours = {"lost": Peer("", "nowhere", FAKE, "form"), **asked.ours}
    found = interleave.run(replace(asked, ours=ours), REQUEST, tmp_path / "r", silent, Pace(2))
    assert [p["ok"] for p in found.ratios] == [False, True]
    assert "nowhere" in found.ratios[0]["failure"]["error"]


def test_slow_peers_take_fewer_turns_and_ours_are_spread(setup, tmp_path, order):
    paced = Pace(2, {"slow": 1, "b": 2}, warmups=0)
    asked = setup({"a": 1.0, "b": 2.0}, {"quick": 3.0, "slow": 8.0})
    found = interleave.run(asked, REQUEST, tmp_path / "r", silent, paced)
    # slots 0..3 around quick, quick, slow: a in all of them, b in the first and the last
    _, a, b, quick, *_ = order
    slow = next(w for w in order[1:] if w not in (a, b, quick))
    assert order[1:] == [a, b, quick, a, quick, a, slow, a, b]
    figures = {(p["peer"], p["ours"][9:]): p for p in found.ratios}
    assert figures["slow", "a"]["ratio"]["median"] == pytest.approx(8)
    assert figures["slow", "b"]["ratio"]["median"] == pytest.approx(4)
    assert figures["slow", "b"]["seconds"]["peer"]["n"] == 1
    assert figures["quick", "b"]["seconds"]["ours"]["n"] == 1, "no later turn of b lies nearby"
    assert "2 rounds, slow 1, b 2" in found.notes[0]


def test_a_picture_of_fewer_steps_is_composed(setup, tmp_path, order):
    """The worker says 10 s a picture and half a second a step: two of six steps are missing."""
    asked = setup({"ours": 1.0}, {"peer": 10.0})
    found = interleave.run(
        asked, {**REQUEST, "steps": 6}, tmp_path / "r", silent, Pace(1, steps={"peer": 4})
    )
    (pair,) = found.ratios
    assert pair["seconds"]["peer"]["median"] == pytest.approx(11)
    assert pair["composed_of"] == 4
    assert pair["quality"]["peer"] is None, "it is not the picture that was asked for"
    assert pair["quality"]["ours"] is not None
    assert "peer ran 4 steps" in found.notes[0]
    assert len(order) == 1 + 1 + 3, "reference, our warm-up, ours, peer, ours"
    assert "composed of 4 steps" in report.markdown(found)


def test_a_picture_without_steps_cannot_be_composed():
    with pytest.raises(RequestError, match="told the time of no step") as caught:
        pace.composed({"seconds": 1.0, "rows": []}, 3)
    assert "--fewer" in caught.value.hint


def test_neighbours():
    """Turn n of a peer lies between our turns n and n + 1."""
    assert pace.neighbours([0, 1, 2], [0, 1, 2, 3]) == [
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 2),
        (2, 2),
        (2, 3),
    ]
    assert pace.neighbours([1], [0, 3]) == [(1, 0), (1, 3)]
    assert pace.neighbours([2], [0, 1]) == [(2, 1)]


@pytest.mark.parametrize("text", ["genai", "genai=", "=2", "genai=0", "genai=x"])
def test_counts_that_are_none(text):
    assert pace.counts("--turns", "a=1, b=20") == {"a": 1, "b": 20}
    with pytest.raises(RequestError, match="--turns holds") as caught:
        pace.counts("--turns", text)
    assert "--turns genai=2" in caught.value.hint


def test_a_count_for_a_name_that_does_not_run():
    with pytest.raises(UnknownName, match="name in --fewer 'genay'") as caught:
        pace.check_names("--fewer", {"genay": 2}, ["genai", "onnxruntime"])
    assert "'genai'" in caught.value.hint


def test_a_peer_that_takes_too_long_is_an_entry(setup, tmp_path, home):
    asked = replace(setup({"ours": 1.0}, {}), limit=2.0)
    script = tmp_path / "hang.py"
    script.write_text(
        f"import runpy, sys\nsys.argv = ['', 'hang']\nrunpy.run_path({FAKE!r}, run_name='__main__')"
    )
    asked = replace(asked, peers={"stuck": Peer("", "fake", str(script), "form")})
    found = interleave.run(asked, REQUEST, tmp_path / "r", silent, Pace(1))
    assert found.ratios[0]["failure"]["error"] == "no answer to 'run' within 2 s"
    assert found.ratios[0]["failure"]["stage"] == "run"


def test_the_reference_is_kept(tmp_path):
    keep, model, notes = tmp_path / "r.npz", {"sha256": "1"}, []
    made = []

    def make():
        made.append(1)
        return np.full((4, 4, 3), len(made), np.uint8)

    def get(model, request):
        return int(reference.picture(keep, model, request, make, notes)[0, 0, 0])

    assert [get(model, REQUEST) for _ in range(2)] == [1, 1]
    assert get(model, {**REQUEST, "seed": 2}) == 2, "another request"
    assert get({"sha256": "2"}, {**REQUEST, "seed": 2}) == 3, "another checkpoint"
    keep.write_text("not numpy's")
    assert get(model, REQUEST) == 4
    keep = tmp_path / "nowhere" / "r.npz"
    with pytest.raises(StorageError, match="cannot be kept") as caught:
        get(model, REQUEST)
    assert "--reference" in caught.value.hint
    assert notes == []


def test_without_a_reference_there_is_a_note(setup, tmp_path, monkeypatch):
    asked = setup({"ours": 1.0}, {"peer": 1.0})
    monkeypatch.setattr(catalogue, "OURS", {"f32": Peer("", "nowhere", FAKE, "form")})
    found = interleave.run(asked, REQUEST, tmp_path / "r", silent, Pace(2))
    assert found.notes[1] == "no float32 reference: its environment nowhere is not there"
    assert found.ratios[0]["quality"] == {"peer": None, "ours": None}


@pytest.mark.ov
def test_our_own_worker_speaks_the_protocol(setup, tmp_path):
    """The embedded model in two steps against a peer that says it took 1000 s."""
    asked = setup({}, {"slow": 1000.0})
    ours = {"f32": Peer("", None, None, "bundle", {"precision": "f32", "threads": 1})}
    request = {**REQUEST, "width": 64, "height": 64}
    found = interleave.run(
        replace(asked, bundle="emoji", ours=ours), request, tmp_path / "r", silent, Pace(2)
    )
    (pair,) = found.ratios
    assert pair["ok"], pair
    assert pair["ratio"]["median"] > 100
    assert pair["about"]["ours"]["precision"] == "f32"
    assert pair["step_s"]["ours"]["n"] == 3 * 2, "three turns around two of the peer"


def test_names_that_nobody_knows():
    with pytest.raises(UnknownName, match="peer 'genay'") as caught:
        interleave.setup("emoji", Path(), ["exact"], ["genay"], None)
    assert "'genai'" in caught.value.hint
    with pytest.raises(UnknownName, match="variant of ours"):
        interleave.setup("emoji", Path(), ["exat"], ["genai"], None)


# --- the catalogue -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*catalogue.PEERS, *catalogue.OURS])
def test_every_peer_has_its_script_environment_model_and_settings(name):
    peer = {**catalogue.PEERS, **catalogue.OURS}[name]
    assert len(peer.settings) > 10, "its settings are written down"
    if peer.worker is None:
        assert (peer.environment, peer.model) == (None, "bundle")
        return
    assert (catalogue.HERE / peer.worker).is_file()
    assert peer.environment in envs.ENVIRONMENTS
    assert peer.model in models.FORMS


@pytest.mark.parametrize("form", [f for f in models.FORMS.values() if f is not None])
def test_every_form_has_its_script_and_environment(form):
    assert (catalogue.HERE / form.script).is_file()
    assert form.environment in envs.ENVIRONMENTS
    assert form.source is None or form.source in models.FORMS


@pytest.mark.parametrize("script", sorted(catalogue.HERE.glob("worker_*.py")), ids=lambda p: p.name)
def test_a_script_of_a_peer_imports_nothing_of_ours(script):
    """It runs where sdengine is not installed."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {"." * n.level + (n.module or "") for n in nodes if isinstance(n, ast.ImportFrom)}
    assert "protocol" in names
    assert not [n for n in names if n.startswith((".", "sdengine"))]


def test_a_worker_script_starts_outside_of_the_package(tmp_path):
    """And says what its environment lacks."""
    command = [sys.executable, "-I", str(catalogue.HERE / "worker_sdcpp.py")]
    done = subprocess.run(
        command, input='{"op": "load", "options": {}}\n', capture_output=True, text=True, check=True
    )
    assert '"ok": false' in done.stdout
    assert "stable_diffusion_cpp" in done.stdout


def test_steps_of_sdcpp_are_timed_from_the_call_that_says_0(monkeypatch):
    """0.4.7 says (0, steps, 0.0) before the first step."""
    space = runpy.run_path(str(catalogue.HERE / "worker_sdcpp.py"), run_name="worker")
    clock = space["Steps"](2)
    times = iter([10.0, 40.0, 65.0])
    monkeypatch.setattr(space["time"], "perf_counter", lambda: next(times))
    clock(7, 900, 0.1)  # tensors are loaded
    for step, seconds in ((0, 0.0), (1, 30.0), (2, 27.5)):
        clock(step, 2, seconds)
    assert clock.rows == [30.0, 25.0]


# --- environments and models -------------------------------------------------------------------


class FakeShell:
    """Notes commands; those that hold `fails` end with status 1. A venv gets its Python file, a
    script writes its second argument."""

    def __init__(self, fails: str = "\0") -> None:
        self.fails = fails
        self.ran: list[list[str]] = []

    def __call__(self, command):
        self.ran.append(list(command))
        if any(self.fails in part for part in command):
            return subprocess.CompletedProcess(command, 1, "", "Collecting\nno such distribution\n")
        if "venv" in command:
            python = Path(command[-1]) / catalogue.SCRIPTS / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text("")
        if "-P" in command:
            Path(command[4]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")


def test_an_environment_is_made_once(tmp_path):
    shell = FakeShell()
    assert envs.make(tmp_path, ["genai"], shell) == {"genai": ""}
    assert [c[1:4] for c in shell.ran][:2] == [["-m", "venv", "--clear"], ["-m", "pip", "install"]]
    assert any("uninstall" in c for c in shell.ran), "torchvision goes"
    assert envs.make(tmp_path, ["genai"], FakeShell("")) == {"genai": ""}, "nothing runs again"


def test_an_environment_that_cannot_be_made_says_why_and_is_tried_again(tmp_path):
    found = envs.make(tmp_path, ["sdcpp", "genai"], FakeShell("stable-diffusion-cpp-python"))
    assert found == {"sdcpp": "no such distribution", "genai": ""}
    with pytest.raises(BackendUnavailable, match="could not be made: no such distribution"):
        catalogue.command(catalogue.PEERS["sdcpp-f16"], tmp_path)
    assert envs.make(tmp_path, ["sdcpp"], FakeShell()) == {"sdcpp": ""}
    assert not (tmp_path / "envs" / "sdcpp.failed").exists()


def test_an_environment_that_nobody_knows(tmp_path, capsys):
    with pytest.raises(UnknownName, match="'genia'"):
        envs.make(tmp_path, ["genia"], FakeShell())
    assert envs.main([str(tmp_path), "genia"]) == 2
    assert "hint: did you mean 'genai'" in capsys.readouterr().err
    assert envs.main([]) == 2


def test_a_form_is_made_of_its_source(tmp_path):
    (tmp_path / "sd.safetensors").write_text("weights")
    shell = FakeShell()
    made = models.make(tmp_path / "home", tmp_path / "sd.safetensors",
                       ["openvino-int8-full", "checkpoint"], shell)  # fmt: skip
    assert made == {"openvino-int8-full": "", "checkpoint": ""}
    place = tmp_path / "home" / "models"
    assert sorted(p.name for p in place.iterdir()) == [
        "checkpoint.safetensors", "diffusers", "openvino", "openvino-int8-full"]  # fmt: skip
    assert [Path(c[2]).name for c in shell.ran] == ["make_diffusers.py", *["make_openvino.py"] * 2]
    assert shell.ran[2][3:] == [str(place / "openvino"), str(place / ".openvino-int8-full.part"),
                                "full"]  # fmt: skip
    peer = catalogue.PEERS["sdcpp-q8_0"]
    found = catalogue.options(peer, tmp_path / "home", "bundle")
    assert found == {"model": str(place / "checkpoint.safetensors"), "wtype": "q8_0"}


def test_a_form_that_cannot_be_made_says_why(tmp_path, capsys):
    (tmp_path / "sd.safetensors").write_text("weights")
    made = models.make(tmp_path, tmp_path / "sd.safetensors", ["openvino"], FakeShell("diffusers"))
    why = "it is made of diffusers: status 1: no such distribution"
    assert made == {"openvino": why}
    with pytest.raises(BackendUnavailable, match="could not be made: it is made of") as caught:
        catalogue.options(catalogue.PEERS["genai"], tmp_path, "bundle")
    assert "peers.models" in caught.value.hint
    with pytest.raises(UnknownName, match="'openvin'"):
        models.make(tmp_path, tmp_path / "sd.safetensors", ["openvin"], FakeShell())
    assert models.main([str(tmp_path), "x", "openvin"]) == 2
    assert "did you mean 'openvino'" in capsys.readouterr().err
    assert models.main([]) == 2


def test_without_its_environment_a_form_says_so(tmp_path):
    (tmp_path / "sd.safetensors").write_text("weights")
    made = models.make(tmp_path, tmp_path / "sd.safetensors", ["diffusers"])
    assert "make it with peers.envs" in made["diffusers"]


def test_the_configs_follow_the_checkpoints_shapes(golden_file, make_checkpoint):
    """Against the network's own config, which the golden key list holds."""
    import importlib.util
    import json

    pytest.importorskip("safetensors")
    spec = importlib.util.spec_from_file_location("m", catalogue.HERE / "make_diffusers.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.configs(script.shapes_of(make_checkpoint("base")), head=16)
    known = json.loads(golden_file("keys/base.tiny.json").read_text())["config"]
    unet, vae, text = (known[name] for name in ("unet", "vae", "text"))
    first = unet["model_channels"]
    ours = found["unet/config.json"]
    assert ours["block_out_channels"] == [first * m for m in unet["channel_mult"]]
    assert ours["attention_head_dim"] == [c // 16 for c in ours["block_out_channels"]]
    assert ours["cross_attention_dim"] == unet["context_dim"]
    assert found["vae/config.json"]["block_out_channels"] == [
        vae["ch"] * m for m in vae["ch_mult"]]  # fmt: skip
    assert found["text_encoder/config.json"]["num_hidden_layers"] == text["layers_used"]
    assert found["text_encoder/config.json"]["num_attention_heads"] == text["heads"]
    np.testing.assert_allclose(
        found["scheduler/scheduler_config.json"]["beta_end"], known["linear_end"]
    )
