"""Pixels, sizes and saving; nothing may be lost or half written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdengine.engine import images
from sdengine.engine.errors import NumericsError, RequestError, StorageError
from sdengine.engine.metadata import Metadata, read_metadata

ABOUT = Metadata("a fox\nSteps: 1, Seed: 2, Size: 8x8", {"prompt": "a fox"}, {"model": "m"})


@pytest.fixture
def image() -> Image.Image:
    """40 x 24, smooth, not the same upside down or with colours exchanged."""
    y, x = np.mgrid[:24, :40]
    return Image.fromarray(np.stack([x * 6, y * 10, 40 + x + y], -1).astype(np.uint8))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_pixels_are_truncated_and_clamped():
    """Closed form: v in 0..1 becomes floor(255 v), and everything outside lands on the ends."""
    unit = np.array([0, 0.5, 254.999 / 255, 1, -0.2, 1.7, 1 / 255 + 1e-4, 2 / 255 - 1e-4])
    picture = np.broadcast_to(unit * 2 - 1, (3, 2, 8)).astype(np.float32)
    pixels = images.to_uint8(picture)
    assert (pixels.shape, pixels.dtype) == ((2, 8, 3), np.uint8)
    assert pixels[1, :, 2].tolist() == [0, 127, 254, 255, 0, 255, 1, 1]


def test_channels_stay_apart():
    picture = np.full((3, 4, 5), -1, np.float32)
    picture[1, 2, 3] = 1
    assert np.argwhere(images.to_uint8(picture)).tolist() == [[2, 3, 1]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_never_a_black_picture(bad):
    picture = np.zeros((3, 4, 5), np.float32)
    picture[0, 1, 1:3] = bad
    with pytest.raises(NumericsError, match="in 2 of 60 values") as caught:
        images.to_uint8(picture)
    assert "float32" in caught.value.hint


@pytest.mark.parametrize(
    ("size", "padded"), [((64, 64), (64, 64)), ((65, 1), (128, 64)), ((500, 333), (512, 384))]
)
def test_padded_size(size, padded):
    assert images.padded_size(*size, 64) == padded


def test_crop_keeps_the_centre():
    pixels = np.zeros((9, 8, 3), np.uint8)
    pixels[4, 3:5] = 255
    cut = images.crop_centre(pixels, 3, 4)
    assert cut.shape == (3, 4, 3)
    assert np.argwhere(cut[..., 0]).tolist() == [[1, 1], [1, 2]]
    assert images.crop_centre(pixels, 9, 8).tobytes() == pixels.tobytes()
    with pytest.raises(AssertionError, match="cannot crop"):
        images.crop_centre(pixels, 10, 8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_saved_by_suffix(tmp_path, image, suffix):
    path = images.save(image, tmp_path / "deep" / "er" / f"a{suffix}", ABOUT)
    assert names(path.parent) == [path.name]
    with Image.open(path) as back:
        kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
        assert back.format == kinds.get(suffix, "PNG")
        difference = np.asarray(back, np.int16) - np.asarray(image, np.int16)
    assert np.abs(difference).mean() <= (0 if suffix.lower() == ".png" else 3)
    assert read_metadata(path) == ABOUT


def test_saving_replaces_and_leaves_nothing_beside(tmp_path, image):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    images.save(image, path)
    assert names(tmp_path) == ["a.png"]
    assert read_metadata(path) == Metadata()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["a.bmp", "a", "a.png.txt"])
def test_unknown_format(tmp_path, image, name):
    for call in (lambda p: images.save(image, p), images.check_output):
        with pytest.raises(RequestError, match="not a known picture format") as caught:
            call(tmp_path / "new" / name)
        assert ".png, .jpg, .jpeg, .webp" in caught.value.hint
        assert repr(name) in caught.value.message
    assert names(tmp_path) == []


def test_names_are_never_taken_twice(tmp_path, image):
    paths = [images.save_new(image, tmp_path / "out", "fox.7", ".png", ABOUT) for _ in range(3)]
    assert [p.name for p in paths] == ["fox.7.png", "fox.7-2.png", "fox.7-3.png"]
    assert all(read_metadata(p) == ABOUT for p in paths)
    paths[1].unlink()
    assert images.unique_path(tmp_path / "out", "fox.7", ".png") == paths[1]


def claim_many(folder: str, results) -> None:
    results.put([str(images.unique_path(Path(folder), "a", ".png")) for _ in range(40)])


def test_two_processes_get_different_names(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    results = context.Queue()
    workers = [context.Process(target=claim_many, args=(tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    claimed = [name for _ in workers for name in results.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert len(set(claimed)) == 80 == len(names(tmp_path))


def all_writers(image: Image.Image, folder: Path):
    yield lambda: images.save(image, folder / "a.png")
    yield lambda: images.save_new(image, folder, "a", ".png")
    yield lambda: images.check_output(folder / "a.png")


def test_a_file_where_a_folder_should_be(tmp_path, image):
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        for write in all_writers(image, folder):
            with pytest.raises(StorageError, match="a file is where a folder should be") as caught:
                write()
            assert "name another folder" in caught.value.hint
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_where_the_file_should_be(tmp_path, image):
    (tmp_path / "a.png").mkdir()
    for write in (lambda p: images.save(image, p), images.check_output):
        with pytest.raises(StorageError, match="a folder is where the file should be") as caught:
            write(tmp_path / "a.png")
        assert "name of a file" in caught.value.hint
    assert names(tmp_path) == ["a.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_a_folder_without_permission(tmp_path, image, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere: let the system's call say what it would
        refuse(monkeypatch, folder, errno.EACCES)
    for write in all_writers(image, folder):
        with pytest.raises(StorageError, match="no permission to write there") as caught:
            write()
        assert "a folder that you may write" in caught.value.hint


def refuse(monkeypatch, folder: Path, number: int) -> None:
    """Opening for writing below `folder` fails as the system would make it fail."""
    real_open, real_touch = open, Path.touch

    def fail(path) -> None:
        if folder in Path(path).parents:
            raise OSError(number, os.strerror(number), str(path))

    def guarded_open(path, mode="r", *rest, **more):
        if "x" in mode:
            fail(path)
        return real_open(path, mode, *rest, **more)

    def guarded_touch(path, *rest, **more):
        fail(path)
        real_touch(path, *rest, **more)

    monkeypatch.setattr("builtins.open", guarded_open)
    monkeypatch.setattr(Path, "touch", guarded_touch)


class FullDisk:
    """A file on a disk with room for 100 bytes."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def write(self, data) -> None:
        self.stream.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_space_left(tmp_path, image, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"the old picture")
    monkeypatch.setattr(images, "open", lambda *a: FullDisk(open(*a)), raising=False)
    for write in (
        lambda: images.save(image, path),
        lambda: images.save_new(image, tmp_path, "b", ".png"),
    ):
        with pytest.raises(StorageError, match="no space left on the disk") as caught:
            write()
        assert "free some space" in caught.value.hint
        assert str(tmp_path) in caught.value.message
    assert names(tmp_path) == ["a.png"]
    assert path.read_bytes() == b"the old picture"


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
def test_a_real_refusal_in_the_middle_of_the_file(tmp_path, image):
    """The kernel itself stops the writing half way: a limit on the size of files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageError, match="larger than allowed") as caught:
            images.save_new(image, tmp_path, "a", ".png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in caught.value.hint
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path, image, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        images.save_new(image, tmp_path, "a", ".png")
    assert names(tmp_path) == []


def test_a_name_that_is_too_long(tmp_path, image):
    for write in (
        lambda: images.save(image, tmp_path / f"{'a' * 300}.png"),
        lambda: images.save_new(image, tmp_path, "a" * 300, ".png"),
    ):
        with pytest.raises(StorageError, match="the name is too long") as caught:
            write()
        assert "shorter file name" in caught.value.hint
    images.save(image, tmp_path / f"{'a' * 251}.png")  # 255 bytes, what most file systems take


def test_trouble_without_a_name_of_its_own(tmp_path, image, monkeypatch):
    (tmp_path / "dying").mkdir()
    refuse(monkeypatch, tmp_path / "dying", errno.EIO)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        images.save(image, tmp_path / "dying" / "a.png")
    assert "another folder" in caught.value.hint


def test_metadata_too_long_for_jpeg(tmp_path, image):
    """Said before the run by check_output; PNG and WebP take it."""
    long = Metadata("x" * 40_000 + "\nSteps: 1, Seed: 2, Size: 8x8", {"prompt": "x" * 40_000}, {})
    for call in (lambda p: images.save(image, p, long), lambda p: images.check_output(p, long)):
        with pytest.raises(RequestError, match="at most 65533 fit") as caught:
            call(tmp_path / "a.jpg")
        assert "save as .png or .webp" in caught.value.hint
    for name in ("a.png", "a.webp"):
        images.check_output(tmp_path / name, long)
        assert read_metadata(images.save(image, tmp_path / name, long)) == long


def test_check_output_makes_the_folder_and_nothing_else(tmp_path):
    images.check_output(tmp_path / "new" / "a.png", ABOUT)
    assert names(tmp_path / "new") == []
