"""A pack is made, and installs itself without an index: a real virtual environment and real pip,
with small wheels in the place of the real ones."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sdengine.cli import app
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import PackError, RequestError, StorageError
from sdengine.serve import installer, pack, wheels

VERSION = "0.1.0"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
STAND_IN = """
import json, sys
def main():
    words = sys.argv[1:]
    if words[0] == "run":
        open(words[words.index("--out") + 1], "w").close()
    print(json.dumps(words))
"""


def make_wheel(folder: Path, name: str, files: dict[str, str], metadata: str = "") -> Path:
    """A wheel by PEP 427, written from the page."""
    info = f"{name}-{VERSION}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n{metadata}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    place = folder / f"{name}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(place, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record.append(f"{path},sha256={digest.decode().rstrip('=')},{len(text)}\n")
        wheel.writestr(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]))
    return place


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: pip's own, and one dependency."""
    folder = tmp_path_factory.mktemp("index")
    wheels.repack(importlib.metadata.distribution("pip"), folder)
    make_wheel(folder, "needed", {"needed.py": "HERE = True\n"})
    return folder


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    """The wheel of sdengine itself: building it takes setuptools and time."""

    def own(folder: Path, source: object) -> Path:
        scripts = {f"sdengine-{VERSION}.dist-info/entry_points.txt": "[console_scripts]\n"
                   "sdengine = stand_in:main\n"}  # fmt: skip
        return make_wheel(
            folder, "sdengine", {"stand_in.py": STAND_IN, **scripts}, "Requires-Dist: needed\n"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "_own_wheel", own)
        patch.setattr(wheels, "__version__", VERSION)
        yield


@pytest.fixture(scope="module")
def made(fake_bundle: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "box.pyz"
    return pack.pack(open_bundle(fake_bundle), out, links=index)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wheel, and no pip."""

    def gather(folder: Path, *_: object) -> str:
        make_wheel(folder, "needed", {"needed.py": "HERE = True\n"})
        return f"sdengine=={VERSION}"

    monkeypatch.setattr(pack, "gather", gather)


def facts_of(path: Path) -> dict[str, object]:
    with zipfile.ZipFile(path) as opened:
        found: dict[str, object] = json.loads(opened.read("pack.json"))
    return found


def changed(path: Path, to: Path, **facts: object) -> Path:
    """A copy of a pack that says something else of itself."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == "pack.json":
                content = json.dumps({**json.loads(content), **facts}).encode()
            new.writestr(entry, content)
    return to


def test_it_installs_itself_without_an_index(made: Path, fake_bundle: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    command = [sys.executable, made, "--prefix", prefix]
    nowhere = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=nowhere, umask=0o077
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    model = prefix / "models" / "tiny"
    assert told == {"sdengine": str(prefix / "bin" / "sdengine"), "model": str(model)}
    ran = subprocess.run([told["sdengine"], "doctor"], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == ["doctor"]
    (environment,) = prefix.glob("env-*")
    assert list(environment.glob("lib/*/site-packages/needed.py"))
    assert open_bundle(model, verify=True).id == open_bundle(fake_bundle).id
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o222 for path in (model, *model.rglob("*"))}
    assert modes == {0}, "the bundle is read-only"
    shut = [path for path in (prefix, *prefix.rglob("*")) if not path.stat().st_mode & 0o004]
    assert not shut, "another user, as of the unit, reads all of it"
    unit = (prefix / "share" / "sdengine.service").read_text()
    assert f"ExecStart={prefix}/bin/sdengine serve " in unit
    assert f"SDENGINE_ARGS=--model={model}\n" in unit
    assert "/opt/sdengine" not in unit.replace(str(prefix), "")
    assert not list(prefix.glob(".pack-*"))


def test_an_update_that_fails_leaves_what_ran(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binaries = tmp_path / "opt" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "sdengine").symlink_to("../env-before/bin/sdengine")
    other = changed(made, tmp_path / "other.pyz", requirement="absent")
    assert installer.main(["--prefix", str(tmp_path / "opt")], other) == 1
    said = capsys.readouterr().err
    assert "filling it failed" in said
    assert "absent" in said
    assert "hint: to see it again: " in said
    assert os.readlink(binaries / "sdengine") == "../env-before/bin/sdengine"


def test_the_same_pack_again_leaves_what_runs_until_all_is_there(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environments are files with a number in the place of Python's."""
    prefix, fails = tmp_path / "100%", False
    program, count = prefix / "bin" / "sdengine", iter(range(9))

    def call(command: list[str], what: str) -> None:
        if what == "making it":
            own = Path(command[-1]) / "bin" / "sdengine"
            own.parent.mkdir(parents=True)
            own.write_text(str(next(count)))
        if fails and what == "a first picture":
            raise installer.Trouble("it makes none", "none")

    def install() -> int:
        return installer.main(["--prefix", str(prefix)], made)

    monkeypatch.setattr(installer, "call", call)
    assert install() == 0
    assert program.read_text() == "0"
    unit = prefix / "share" / "sdengine.service"
    assert f"ExecStart={tmp_path}/100%%/bin/sdengine serve" in unit.read_text()
    unit.write_text("of what runs")
    fails = True
    assert install() == 1
    assert (program.read_text(), unit.read_text()) == ("0", "of what runs")
    fails = False
    for number in ("2", "3"):
        assert install() == 0
        assert program.read_text() == number
    assert len(list(prefix.glob("env-*"))) == 2
    assert unit.read_text() != "of what runs"


def test_an_engine_that_makes_no_picture_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sdengine"
    program.write_text("#!/bin/sh\necho no engine fits this processor >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(installer.Trouble, match=r"first picture failed.*no engine") as caught:
        installer.check_picture(tmp_path, tmp_path / "model")
    assert f"{program} run" in caught.value.hint


@pytest.mark.parametrize(
    ("facts", "message", "hint"),
    [
        ({"python": "2.7"}, f"python is {PYTHON}, not 2.7", "--python"),
        ({"machine": "riscv128"}, "not riscv128", "--machine"),
        ({"installed_bytes": 2**62}, "MiB free", "--prefix"),
    ],
)
def test_a_box_that_does_not_fit_is_told_why(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, object],
    message: str,
    hint: str,
) -> None:
    prefix = tmp_path / "opt"
    other = changed(made, tmp_path / "other.pyz", **facts)
    assert installer.main(["--prefix", str(prefix)], other) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert hint in said.partition("hint: ")[2]
    assert not (prefix / "bin").exists()


def test_a_damaged_pack_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = facts_of(made)["files"]
    assert isinstance(files, dict)
    name = "bundle/unet/weights.safetensors"
    wrong = {**files, name: {**files[name], "sha256": "0" * 64}}
    damaged = changed(made, tmp_path / "damaged.pyz", files=wrong)
    assert installer.main(["--prefix", str(tmp_path / "opt")], damaged) == 1
    said = capsys.readouterr().err
    assert f"{name} of the pack is damaged" in said
    assert "copy the pack again" in said
    assert not (tmp_path / "opt" / "models").exists()


def test_another_bundle_of_that_name_stays(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "opt" / "models" / "tiny"
    there.mkdir(parents=True)
    (there / "manifest.json").write_text("{}")
    assert installer.main(["--prefix", str(tmp_path / "opt")], made) == 1
    said = capsys.readouterr().err
    assert "another bundle is at" in said
    assert "--name tiny-2" in said
    assert (there / "manifest.json").read_text() == "{}"


@pytest.mark.usefixtures("quick")
def test_a_tar_holds_what_is_said(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(fake_bundle)
    out = pack.pack(bundle, tmp_path / "box.tar", name="other")
    with tarfile.open(out) as opened:
        opened.extractall(tmp_path / "box", filter="data")
    box = tmp_path / "box"
    files = json.loads((box / "pack.json").read_text())["files"]
    inside = {f"bundle/{name}" for name in (*bundle.files, "manifest.json")}
    assert files.keys() == {
        *inside, f"wheels/needed-{VERSION}-py3-none-any.whl", "share/sdengine.service"
    }  # fmt: skip
    for name, known in files.items():
        assert hashlib.sha256((box / name).read_bytes()).hexdigest() == known["sha256"]
    result = subprocess.run(
        [sys.executable, "install.py", "--facts"], cwd=box, capture_output=True, text=True
    )
    told = json.loads(result.stdout)
    assert told["bundle"]["name"] == "other"
    assert (told["python"], told["machine"]) == (PYTHON, platform.machine())
    assert told["requirement"] == f"sdengine=={VERSION}"
    assert told["installed_bytes"] > sum(known["size"] for known in files.values())
    assert installer.main(["--facts"], box) == 0
    assert json.loads(capsys.readouterr().out) == told


def shell(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["pack", *map(str, words)])


def test_the_command(fake_bundle: Path, index: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "box.pyz"
    result = shell(fake_bundle, "--out", out, "--wheels", index, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == {
        "pack": str(out),
        "bytes": out.stat().st_size,
        "bundle": open_bundle(fake_bundle).id,
    }
    assert os.listdir(out.parent) == ["box.pyz"]


@pytest.mark.parametrize("name", ["box", "box.zip"])
def test_a_name_that_says_no_kind(fake_bundle: Path, name: str) -> None:
    with pytest.raises(RequestError, match="no kind of pack") as caught:
        pack.pack(open_bundle(fake_bundle), Path(name))
    assert ".pyz" in caught.value.hint


def test_a_wheel_that_cannot_be_had(fake_bundle: Path, index: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor"
    shutil.copytree(index, poor)
    next(poor.glob("needed-*")).unlink()
    result = shell(fake_bundle, "--out", tmp_path / "box.pyz", "--wheels", poor)
    assert result.exit_code == 1
    assert "pip download failed" in result.stderr
    assert "needed" in result.stderr
    assert f"hint: put what is missing into {poor}" in result.stderr
    assert not (tmp_path / "box.pyz").exists()


def test_without_internet_it_says_what_to_do(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PackError, match="pip download failed") as caught:
        pack.pack(open_bundle(fake_bundle), tmp_path / "box.tar")
    assert "on a machine that has it" in caught.value.hint
    assert "--wheels wheels" in caught.value.hint


@pytest.mark.usefixtures("quick")
def test_too_much_for_one_that_runs_by_itself(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "LARGEST_PYZ", 1000)
    with pytest.raises(PackError, match=r"do not fit into a \.pyz") as caught:
        pack.pack(open_bundle(fake_bundle), tmp_path / "box.pyz")
    assert "box.tar" in caught.value.hint


@pytest.mark.usefixtures("quick")
def test_no_room_for_it(fake_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is where a folder should be"):
        pack.pack(open_bundle(fake_bundle), tmp_path / "file" / "box.pyz")


def test_what_no_wheel_was_of_cannot_be_one(tmp_path: Path) -> None:
    info = tmp_path / "odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    odd = importlib.metadata.Distribution.at(info)
    with pytest.raises(PackError, match="not installed from a wheel") as caught:
        wheels.repack(odd, tmp_path)
    assert "source tree" in caught.value.hint


def test_a_box_of_another_kind() -> None:
    assert wheels.Target().options() == []
    options = wheels.Target("3.12", "aarch64").options()
    assert options[:4] == ["--python-version", "3.12", "--implementation", "cp"]
    assert "manylinux2014_aarch64" in options
    assert "manylinux_2_28_aarch64" in options
    assert wheels.Target(machine="aarch64").options()[1] == PYTHON
