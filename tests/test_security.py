"""Files that come from anywhere: no code in them runs, and none of them is trusted."""

import ast
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from pycocotools import mask as rle_tools

from la.backbone.vit import load_backbone
from la.data.coco import Annotation, decode, find_splits, load_coco
from la.data.photos import read_photo
from la.data.rle import MAX_OUTLINE, MAX_PIXELS, compress, run_lengths
from la.errors import InputError
from pipelines.cluster import ray_session
from pipelines.runs.official_files import import_official
from pipelines.tracking.mlflow_runs import ui_command
from pipelines.workspace import Workspace
from tests.conftest import TINY
from tools.plan_check.rehearsal import some_photos

ROOT = Path(__file__).parents[1]
PRODUCT = [p for folder in ("la", "pipelines", "sweeps", "commands") for p in sorted((ROOT / folder).rglob("*.py"))]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
LOADERS = {"load", "unsafe_load", "full_load", "load_all"}  # of yaml


def breaches(source: str) -> list[str]:
    """Calls and imports by which a file could run code: unpickling, eval, a shell, an unsafe loader."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
        if (
            called in ("eval", "exec", "os.system", "pd.read_pickle", "pandas.read_pickle")
            or (called == "torch.load" and given.get("weights_only") is not True)
            or given.get("allow_pickle", False) is not False
            or (called.startswith("yaml.") and called.removeprefix("yaml.") in LOADERS)
            or given.get("shell", False) is not False
            or given.get("trust_remote_code", False) is not False
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", [*PRODUCT, ROOT / "cli.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_of_a_file_is_run(path):
    assert not breaches(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(file)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_for_such_code_finds_it(line):
    assert breaches(line)
    assert not breaches("np.load(file)\ntorch.load(file, weights_only=True)\nyaml.safe_load(file)\nmodel.eval()")


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 2))])
def test_weights_that_carry_code_are_refused_and_it_does_not_run(tmp_path, write):
    file, trace = tmp_path / "weights.pth", tmp_path / "ran"
    write({"model": Bomb(trace)}, file)
    with pytest.raises(InputError, match=r"weights.pth cannot be read .*expected tensors alone"):
        load_backbone(TINY["backbone"], TINY["image_size"], file)
    with pytest.raises(InputError, match=r"pickled code is never run|cannot be read"):
        import_official(str(file), 0, tmp_path / "out.pt")
    assert not trace.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_damaged_weights_are_named(tmp_path, tiny_weights, suffix):
    whole = tiny_weights.read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2], struct.pack("<Q", 1 << 60) + whole[8:]):
        (tmp_path / f"w.{suffix}").write_bytes(content)
        with pytest.raises(InputError, match=rf"w.{suffix} cannot be read"):
            load_backbone(TINY["backbone"], TINY["image_size"], tmp_path / f"w.{suffix}")


def png(path: Path, width: int, height: int) -> Path:
    """A PNG of some bytes that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])  # from Pillow's warning on, and beyond its error
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side, monkeypatch):
    assert side * side > MAX_PIXELS
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(InputError, match=r"bomb.png (says it is 9500x9500|cannot be decoded .*decompression bomb)"):
        read_photo(png(tmp_path / "bomb.png", side, side), 32)


def test_a_photo_of_another_size_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(InputError, match=r"is 8000x8000 pixels, but the annotations say 640x480"):
        read_photo(png(tmp_path / "a.png", 8000, 8000), 32, (480, 640))


@pytest.mark.parametrize("suffix", ["eps", "tiff", "pdf", "gif"])
def test_formats_that_no_photo_folder_needs_are_not_opened(tmp_path, suffix):
    Image.new("RGB", (8, 8)).save(tmp_path / f"x.{suffix}")
    (tmp_path / f"x.{suffix}").rename(tmp_path / "x.jpg")
    with pytest.raises(InputError, match=r"x.jpg cannot be decoded .*expected a whole JPEG or PNG"):
        read_photo(tmp_path / "x.jpg", 32)


def train(root: Path, change: Callable[[dict], object]):
    """The train split after `change` of its annotation file."""
    file, photos = find_splits(root)["train"]
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return load_coco(file, photos, "train")


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/b.jpg", "..\\secret.jpg", "C:\\x.jpg", "..", "."])
def test_a_file_name_that_leaves_the_photo_folder_is_refused(tiny_coco, name):
    Image.new("RGB", (64, 48)).save(tiny_coco / "secret.jpg")
    with pytest.raises(InputError, match=r"2017.json: image 100 has file_name .*may lead out of the photo folder"):
        train(tiny_coco, lambda c: c["images"][0].update(file_name=name))


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\x00.jpg", "\x1b[2J.jpg", "\ud800.jpg", "", 7, None, ["a.jpg"]])
def test_a_file_name_that_is_no_plain_text_is_refused(tiny_coco, name):
    with pytest.raises(InputError, match=r"image 100 lacks a usable .*: `file_name` is .*; expected text"):
        train(tiny_coco, lambda c: c["images"][0].update(file_name=name))


def test_a_link_out_of_the_photo_folder_is_refused_but_the_folder_may_be_one(tiny_coco, tmp_path):
    photos = tiny_coco / "train2017"
    first, second = sorted(photos.iterdir())[:2]
    first.rename(tmp_path / "elsewhere.jpg")
    first.symlink_to(second.name)
    train(tiny_coco, lambda c: None)
    first.unlink()
    first.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(InputError, match=r"image 100 names .*, which is a link that leads out of .*train2017"):
        train(tiny_coco, lambda c: None)
    first.unlink()
    os.link(tmp_path / "elsewhere.jpg", first)
    photos.rename(tmp_path / "photos")
    photos.symlink_to(tmp_path / "photos")
    assert len(train(tiny_coco, lambda c: None).images) == 20


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_opened(tiny_coco, make):
    first = min((tiny_coco / "train2017").iterdir())
    first.unlink()
    make(first)
    with pytest.raises(InputError, match=r"image 100 names .*, which is not a file"):
        train(tiny_coco, lambda c: None)


@pytest.mark.parametrize("size", [(1 << 20, 1 << 20), (MAX_PIXELS, 2), (0, 64), (-48, -64), (4.5, 64), ("48", 64)])
def test_an_announced_size_that_no_photo_has_is_refused(tiny_coco, size):
    with pytest.raises(InputError, match=r"image 100 .*(`height` is|pixels; expected at most)"):
        train(tiny_coco, lambda c: c["images"][0].update(height=size[0], width=size[1]))


@pytest.mark.parametrize("listed", ["images", "annotations", "categories"])
def test_ids_that_collide_are_told(tiny_coco, listed):
    with pytest.raises(InputError, match=r"2017.json: \w+ \d+ has the same id as an entry before it"):
        train(tiny_coco, lambda c: c[listed].append(c[listed][1]))


@pytest.mark.parametrize("listed", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [-1, True, 1.5, "7", None, [7], {}, 2**63, 10**400])
def test_an_id_that_is_no_whole_number_is_told(tiny_coco, listed, value):
    with pytest.raises(InputError, match=rf"2017.json: \w+ ?\S* .*`id` is .*expected a whole number|{listed}\[0\]"):
        train(tiny_coco, lambda c: c[listed][0].update(id=value))


@pytest.mark.parametrize("listed", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_an_entry_that_is_no_object_is_told(tiny_coco, listed, value):
    with pytest.raises(InputError, match=rf"2017.json: {listed}\[1\] is .*; expected an object"):
        train(tiny_coco, lambda c: c[listed].__setitem__(1, value))


def test_a_file_nested_without_end_is_told(tiny_coco):
    (tiny_coco / "annotations/instances_train2017.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not a COCO instances file"):
        load_coco(*find_splits(tiny_coco)["train"], "train")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("bbox", "told"),
    [
        ([NAN, 0, 5, 5], "none below 0"),
        ([0, 0, INF, 5], "none below 0"),
        ([0, 0, -5, 5], "none below 0"),
        ([0, 0, 10**400, 5], "none below 0"),
        ([0, 0, 5], "none below 0"),
        ([0, 0, 5, 5, 5], "none below 0"),
        (["0", 0, 5, 5], "none below 0"),
        ("0055", "none below 0"),
        ({"x": 1}, "none below 0"),
        ([0, 0, 5, 60], "outside the photo of 64x48"),
        ([-10, 0, 5, 5], "outside the photo"),
        ([66, 0, 1, 1], "outside the photo"),
    ],
)
def test_a_box_that_cannot_be_is_told(tiny_coco, bbox, told):
    with pytest.raises(InputError, match=rf"2017.json: annotation 1000: bbox .*{told}.*or remove it"):
        train(tiny_coco, lambda c: c["annotations"][0].update(bbox=bbox))


@pytest.mark.parametrize(
    ("polygon", "told"),
    [
        ([1, 1, 9, 1, 9], "has 5 numbers; expected an even count from 6 on"),
        ([1, 1, 9, 9], "has 4 numbers"),
        ([], "has 0 numbers"),
        ([1, 1, 9, 1, 9, NAN], "outside the photo"),
        ([NAN, 1, 9, 1, 9, 9], "outside the photo"),
        ([1, 1, INF, 1, 9, 9], "outside the photo"),
        ([1, 1, 9e9, 1, 9, 9], "outside the photo of 64x48 pixels"),
        ([1, 1, 10**400, 1, 9, 9], "outside the photo"),
        ([70, 50, 80, 50, 80, 60], "outside the photo"),
        ([65, 1, 70, 1, 70, 9], "outside the photo"),  # near, but wholly outside
        ([1, 1, "9", 1, 9, 9], "is not a flat list of numbers"),
        ([1, 1, True, 1, 9, 9], "is not a flat list of numbers"),
        ([[1, 1], [9, 1], [9, 9]], "is not a flat list of numbers"),
        (None, "is not a flat list of numbers"),
    ],
)
def test_a_polygon_that_cannot_be_is_told(tiny_coco, polygon, told):
    good = [5, 5, 11, 5, 11, 11]
    with pytest.raises(InputError, match=rf"annotation 1000: polygon 1 of `segmentation` .*{told}.*or remove it"):
        train(tiny_coco, lambda c: c["annotations"][0].update(segmentation=[good, polygon]))


def test_a_polygon_may_reach_a_tenth_beyond_the_photo_and_is_clipped():
    beyond = [-6, -4, 70, -4, 70, 52, -6, 52]
    mask = rle_tools.decode({"size": [48, 64], "counts": compress([beyond], 48, 64)})
    assert mask.all()
    touching = rle_tools.decode({"size": [48, 64], "counts": compress([[0, 0, 64, 0, 64, 48, 0, 48]], 48, 64)})
    assert touching.all()
    with pytest.raises(ValueError, match="outside the photo"):
        compress([[-6, -4, 71, -4, 71, 52, -6, 52]], 48, 64)


def test_a_polygon_that_would_take_all_memory_is_refused():
    zigzag = [0, 0, 9000, 0] * 1000
    assert MAX_OUTLINE < 9000 * 2000
    with pytest.raises(ValueError, match=f"pixels long; expected at most {MAX_OUTLINE}"):
        compress([zigzag], 9000, 9000)


@pytest.mark.parametrize(
    ("rle", "told"),
    [
        ({"size": [48, 64], "counts": [48 * 64 - 1]}, "add up to 3071 pixels; expected 3072"),
        ({"size": [48, 64], "counts": [0, 2**32 + 48 * 64]}, "add up to"),
        ({"size": [48, 64], "counts": [-5, 48 * 64 + 5]}, "have a run of -5 pixels"),
        ({"size": [48, 64], "counts": []}, "add up to 0 pixels"),
        ({"size": [48, 64], "counts": [3072.0]}, "are list; expected a list of whole numbers"),
        ({"size": [48, 64], "counts": None}, "are NoneType; expected"),
        ({"size": [48, 64], "counts": ""}, "add up to 0 pixels"),
        ({"size": [48, 64], "counts": "O"}, "have a run of -1 pixels"),
        ({"size": [48, 64], "counts": "o" * 50}, "no compressed run lengths|longer than any photo"),
        ({"size": [48, 64], "counts": "o" * 50 + "0"}, "longer than any photo"),
        ({"size": [48, 64], "counts": "\u00fc\u20ac"}, "no compressed run lengths"),
        ({"size": [64, 48], "counts": [48 * 64]}, r"is for size \[64, 48\], but the photo's height and width are"),
        ({"size": [1 << 40, 1 << 40], "counts": [1]}, "is for size"),
        ({"size": "x", "counts": [1]}, "is for size x"),
        ({"counts": [1]}, "is for size None"),
    ],
)
def test_run_lengths_that_cannot_be_are_told(tiny_coco, rle, told):
    with pytest.raises(InputError, match=rf"annotation 1000: its RLE .*({told})"):
        train(tiny_coco, lambda c: c["annotations"][0].update(segmentation=rle))
    with pytest.raises(InputError, match=rf"image 101, `void_rle`: its RLE .*({told})"):
        train(tiny_coco, lambda c: (c["annotations"].pop(0), c["images"][1].update(void_rle=rle)))


def test_empty_runs_change_nothing():
    """pycocotools' union ends early where empty runs of two masks meet."""
    runs = [10, 0, 5, 0, 0, 7, 0, 3, 23]
    plain = np.repeat(np.arange(len(runs)) % 2, runs).reshape(8, 6).T
    counts = compress({"size": [6, 8], "counts": runs}, 6, 8)
    assert 0 not in run_lengths(counts)
    assert np.array_equal(rle_tools.decode({"size": [6, 8], "counts": counts}), plain)
    twice = [Annotation(i, 1, 1, False, int(plain.sum()), (0, 0, 1, 1), counts) for i in (1, 2)]
    assert np.array_equal(decode(twice, 6, 8), plain)


@pytest.mark.parametrize("counts", [b"", b"0", b"P", b"\x00\xff", b"o" * 40, b"`0`0"])
def test_a_stored_mask_that_does_not_cover_its_photo_is_never_decoded(counts):
    with pytest.raises(InputError, match=r"annotation 7 of image 3 is damaged: .*run `featurize` again"):
        decode([Annotation(7, 3, 1, False, 5, (0, 0, 1, 1), counts)], 6, 8)


@pytest.mark.parametrize("value", [2, -1, "0", None, [1]])
def test_a_crowd_flag_that_is_none_is_told(tiny_coco, value):
    with pytest.raises(InputError, match=r"annotation 1000: `iscrowd` is .*; expected 0 or 1"):
        train(tiny_coco, lambda c: c["annotations"][0].update(iscrowd=value))


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_real_files_lose_nothing_to_the_checks(real_coco, name):
    root = real_coco.parent / name
    if not root.is_dir():
        pytest.skip(f"no real {name} photos at {root}")
    for split, (file, photos) in find_splits(root).items():
        content = json.loads(file.read_text())
        data = load_coco(file, photos, split)
        found = {a.id: a for annotations in data.annotations.values() for a in annotations if a.id >= 0}
        assert set(found) == {raw["id"] for raw in content["annotations"]}
        for raw in content["annotations"][::50]:
            image = data.images[raw["image_id"]]
            shape, size = raw["segmentation"], (image.height, image.width)
            if isinstance(shape, list) or isinstance(shape["counts"], list):
                shape = rle_tools.frPyObjects(shape, *size)
            plain = rle_tools.decode(shape).reshape(*size, -1).any(-1)
            assert np.array_equal(decode([found[raw["id"]]], *size) > 0, plain)


def test_the_web_pages_are_served_to_this_machine_alone_unless_asked(tmp_path):
    (tmp_path / "mlflow.db").touch()

    def host(*asked: str) -> str:
        command = ui_command(Workspace(tmp_path), *asked)
        return command[command.index("--host") + 1]

    assert host() == "127.0.0.1"
    assert host("0.0.0.0") == "0.0.0.0"


def test_a_rehearsal_writes_nothing_outside_its_folder(tiny_coco, tmp_path):
    Image.new("RGB", (64, 48)).save(tiny_coco / "secret.jpg")
    file, _ = find_splits(tiny_coco)["train"]
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "../secret.jpg"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="may lead out of the photo folder"):
        some_photos(tiny_coco, tmp_path / "rehearsal", 9)
    assert not (tmp_path / "rehearsal").exists()


def test_a_ray_of_this_machine_has_no_dashboard(monkeypatch):
    """Where there is a cluster, its dashboard is its own affair, and Ray refuses to be told."""
    started = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for address in (None, "local", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", address) if address else monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with ray_session():
            pass
    assert [options.get("include_dashboard") for options in started] == [False, False, None]
    assert all("dashboard_host" not in options for options in started)
