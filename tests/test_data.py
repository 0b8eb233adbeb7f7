"""Loading of data: folders as ImageFolder's users have them, CIFAR and CINIC-10 from archives in
their makers' layout, .npz files, arrays and data sets of a function call. Expected values are made
with PIL and numpy by hand."""

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import common
import loading
import runs
from common import load_digits, normalisation
from loading import as_arrays, load_arrays, peek_size, resized
from runs import UserError

DATA = common.options.HERE / "data"
DRAW = np.random.default_rng(0)


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(*shape):
    return DRAW.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """folder(**{"train/cat/a.png": pixels or PIL image}): a data set of two classes, cat and dog,
    each with two gray 4x4 images to train on and one to test, and the given files."""

    def make(files=(), size=(4, 4)):
        root = tmp_path / "pictures"
        for path in ("train/cat/1", "train/cat/2", "train/dog/1", "train/dog/2"):
            put(root / f"{path}.png", pixels(*size))
        for c in ("cat", "dog"):
            put(root / f"test/{c}/1.png", pixels(*size))
        for path, content in dict(files).items():
            put(root / path, content)
        return root

    return make


def put(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        image = content if isinstance(content, Image.Image) else Image.fromarray(content)
        image.save(path, **options)


def load(root, resize=None):
    return load_arrays(str(root), root.parent / "cache", resize, quiet=True)


def refused(root, match, **options):
    with pytest.raises(UserError, match=match) as e:
        load(root, **options)
    assert "\n" not in str(e.value)
    str(e.value).encode()  # no surrogates


def opened(path):
    return np.asarray(Image.open(path))


def err(capsys):
    return capsys.readouterr().err


def same(a, b):
    assert a.classes == b.classes
    for x, y in zip(a[:4], b[:4], strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


# ---- folders: which files ------------------------------------------------------------------------


def test_a_folder_gives_its_images_in_the_order_of_classes_and_names(folder):
    root = folder()
    a = load(root)
    assert a.classes == ["cat", "dog"]
    assert a.train_labels.tolist() == [0, 0, 1, 1] and a.test_labels.tolist() == [0, 1]
    assert a.train_labels.dtype == np.int64
    paths = ("train/cat/1", "train/cat/2", "train/dog/1", "train/dog/2")
    expected = np.stack([opened(root / f"{p}.png") for p in paths])[..., None]
    assert np.array_equal(a.train_images, expected) and a.train_images.flags.c_contiguous
    assert np.array_equal(a.test_images[1, ..., 0], opened(root / "test/dog/1.png"))
    assert peek_size(str(root)) == (4, 4)
    (root / "train").rename(root / "Training"), (root / "test").rename(root / "TEST")
    same(load(root), a)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_validation_images_join_the_training_images(folder, name, capsys):
    """Also of a class that train/ lacks. Without a test set the remedy is to rename them."""
    root = folder({f"{name}/dog/1.png": (image := pixels(4, 4)), f"{name}/ant/1.png": image})
    a = load(root)
    assert a.classes == ["ant", "cat", "dog"] and len(a.test_labels) == 2
    assert a.train_labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert np.array_equal(a.train_images[5, ..., 0], image)  # after those of train/
    assert f"2 images of {name}/ join the training images" in err(capsys)
    (root / "test").rename(root / "elsewhere")
    refused(root, rf"no images in test/CLASS/.*{name}/ joins the training.*rename it to test")


def test_hidden_files_and_folders_are_no_part_of_it(folder, capsys):
    root = folder()
    plain = load(root)
    capsys.readouterr()
    for path in (
        "train/.ipynb_checkpoints/1-checkpoint.png",
        "train/cat/.ipynb_checkpoints/1-checkpoint.png",
        "train/cat/._1.png",
        "test/.DS_Store",
        "train/cat/.DS_Store",
        "__MACOSX/train/cat/._1.png",
        "train/__MACOSX/cat/1.png",
        "train/cat/Thumbs.db",
        "train/cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
    ):
        put(root / path, b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100))
    same(load(root), plain)
    assert err(capsys) == ""


def test_files_of_other_kinds_are_counted_and_named(folder, capsys):
    root = folder({"train/cat/a.heic": b"x", "train/cat/b.heic": b"x", "test/dog/README": b"x"})
    put(root / "train/montage.png", pixels(4, 4))
    assert len(load(root).train_labels) == 4
    said = err(capsys)
    assert "ignored (2 .heic, 1 no extension)" in said
    assert "1 images outside class folders ignored" in said


def test_every_extension_of_pillow_in_either_case(folder):
    formats = ["PNG", "bmp", "GIF", "tga", "pcx", "Tiff", "ppm", "pgm", "webp", "jp2", "dds"]
    formats += ["ico", "sgi", "jfif", "jpe"]
    root = folder({f"train/cat/x.{s}": pixels(16, 16) for s in formats}, size=(16, 16))
    put(root / "train/cat/x.qoi", pixels(16, 16, 3))
    assert (load(root).train_labels == 0).sum() == 2 + len(formats) + 1
    assert not loading.image_suffixes() & {".pdf", ".mpg", ".h5", ".txt", ".npz", ".eps"}


def test_sub_folders_of_classes_are_taken(folder):
    """As torchvision's ImageFolder, and as Tiny ImageNet has them: train/CLASS/images/*."""
    root = folder({"train/cat/images/deep/0.png": (image := pixels(4, 4))})
    a = load(root)
    assert a.train_labels.tolist() == [0, 0, 0, 1, 1] and a.classes == ["cat", "dog"]
    assert np.array_equal(a.train_images[2, ..., 0], image)  # "images/..." after "1.png", "2.png"


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    root = folder()
    plain = load(root)
    (root / "train/dog").rename(tmp_path / "elsewhere")
    (root / "train/dog").symlink_to(tmp_path / "elsewhere")
    (root / "train/cat/1.png").rename(tmp_path / "one.png")
    (root / "train/cat/1.png").symlink_to(tmp_path / "one.png")
    (root / "train/cat/round").symlink_to(root / "train/cat")
    same(load(root), plain)
    (root / "train/cat/gone.png").symlink_to(tmp_path / "nothing.png")
    refused(root, r"cannot read .*train/cat/gone\.png: No such file")


def test_classes_without_images(folder, capsys):
    root = folder({"train/cow/1.png": pixels(4, 4)})
    (root / "train/ant").mkdir()
    a = load(root)
    assert a.classes == ["cat", "cow", "dog"] and a.test_labels.tolist() == [0, 2]
    said = err(capsys)
    assert "no test images of 1 classes (cow)" in said
    assert "1 class folders without images (train/ant)" in said
    put(root / "test/ant/1.png", pixels(4, 4))
    refused(root, "test images of class ant, but no training images")


def test_two_spellings_one_class_and_pipes(folder, capsys):
    root = folder()
    os.mkfifo(root / "train/cat/0.png")
    load(root)
    assert "1 not a regular file" in err(capsys) and peek_size(str(root)) == (4, 4)
    shutil.copytree(root / "test", root / "Testing")
    refused(root, "Testing and test are both test: rename one")
    shutil.rmtree(root / "Testing")
    for split in ("train", "test"):
        (root / split).rename(root / "images")
        (root / split).mkdir()
        (root / "images").rename(root / split / "images")
    refused(root, r"all images are of one class \(images\)")


def test_what_is_no_data_set_is_refused_with_what_is_there(folder, tmp_path):
    root = folder()
    refused(tmp_path / "nowhere", "none of digits, cifar10, cifar100, cinic10, no folder")
    refused(root / "train", r"no images in train/CLASS/ \(found cat/, dog/\)")
    refused(tmp_path, r"no images in train/CLASS/ \(found pictures/\)")
    put(tmp_path / "flat/train/cat/1.png", pixels(4, 4))
    put(tmp_path / "flat/test/1.png", pixels(4, 4))
    refused(tmp_path / "flat", "no images in test/CLASS/.*1 images lie in no class folder")
    put(tmp_path / "notes.txt", b"x")
    refused(tmp_path / "notes.txt", "no folder of images and no .npz file")
    with pytest.raises(UserError, match="did you mean cifar10"):
        load_arrays("CIFAR-10", tmp_path)
    assert peek_size(str(tmp_path)) is peek_size("nowhere") is peek_size("digits") is None


def test_names_that_are_not_utf8_can_be_printed(folder, capsys):
    root = folder()
    for split in ("train", "test"):
        os.rename(
            bytes(root) + f"/{split}/cat".encode(),
            bytes(root) + f"/{split}/caf\xe9".encode("latin-1"),
        )
    (root / "test/dog/1.png").rename(root / "test/x.png")
    put(root / "test/dog/1.png", Image.fromarray(pixels(4, 4, 4)))
    os.rename(root, bytes(root) + b"\xe9")
    root = root.with_name(os.fsdecode(b"pictures\xe9"))
    for _ in range(2):  # decoded, and from the cache
        a = load(root)
        assert a.classes == ["caf\\xe9", "dog"]
        (err(capsys) + str(a.classes)).encode()
    bad = bytes(root) + b"/train/dog/\xff.png"
    with open(bad, "wb") as f:
        f.write(b"\x89PNG")
    refused(root, r"cannot read 1 of 7 images: .*train/dog/\\xff\.png")


# ---- folders: what the pixels are ----------------------------------------------------------------


def test_colour_if_any_image_has_colour(folder):
    """Gray ones first and last: each channel of theirs is the gray. A test image is enough."""
    root = folder({"train/cat/3.png": (colour := pixels(4, 4, 3))})
    a = load(root)
    assert a.train_images.shape == (5, 4, 4, 3) and a.test_images.shape[3] == 3
    gray = opened(root / "train/cat/1.png")
    assert np.array_equal(a.train_images[0], np.stack([gray] * 3, -1))
    assert np.array_equal(a.train_images[2], colour)
    (root / "train/cat/3.png").rename(root / "test/cat/3.png")
    assert load(root).train_images.shape == (4, 4, 4, 3)


def test_every_way_to_store_a_gray_comes_back_exactly(folder, capsys):
    """16 bits in both usual ways (PGM opens as mode I), floats of whole levels, a palette of grays,
    alpha, the first of two frames; EXIF's orientation is left alone, as by ImageFolder."""
    gray, other, exif = LEVELS, pixels(16, 16), Image.Exif()
    wide, image, palette = gray.astype(np.uint16), Image.fromarray(gray), Image.fromarray(gray)
    palette.putpalette([k for k in range(256) for _ in "rgb"])
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.fromarray(other)]}
    root = folder(size=(16, 16))
    ways = {
        "257.png": (wide * 257, {}),
        "257.tif": (wide * 257, {}),
        "256.png": (wide * 256, {}),
        "257.pgm": (b"P5 16 16 65535\n" + (wide * 257).astype(">u2").tobytes(), {}),
        "float.tif": (Image.fromarray(gray.astype(np.float32) / 255), {}),
        "palette.png": (palette, {}),
        "alpha.png": (Image.merge("LA", [image, Image.fromarray(other)]), {}),
        "exif.png": (image, {"exif": exif}),
        "frames.tif": (image, frames),
        "frames.gif": (image, frames),
    }
    for name, (content, options) in ways.items():
        put(root / "train/dog" / name, content, **options)
    put(root / "train/cat/bits.png", Image.fromarray(gray > 127))
    for again in (False, True):
        a = load(root)
        assert a.train_images.shape == (5 + len(ways), 16, 16, 1)
        assert np.array_equal(a.train_images[2, ..., 0], (gray > 127) * 255)
        assert all(np.array_equal(x[..., 0], gray) for x in a.train_images[5:])
        said = err(capsys)
        assert "2 images of several frames" in said  # also when it comes from the cache
        assert again or "1 images with transparency" in said
        assert again or "1 images with an orientation in EXIF, which is left out" in said
        assert again or "4 16-bit images reduced to their high 8 bits" in said


def test_palettes_four_channels_and_cmyk_in_colour(folder, capsys):
    gray, colour = LEVELS // 64, pixels(16, 16, 3)
    table = np.array([[0, 0, 0], [90, 0, 90], [180, 180, 180], [255, 255, 255]], np.uint8)
    palette = Image.fromarray(gray)
    palette.putpalette(table.tobytes())
    root = folder({"train/cat/3.png": palette}, size=(16, 16))
    put(root / "train/cat/4.png", np.dstack([colour, LEVELS]))
    put(root / "train/cat/5.png", np.dstack([colour, np.full_like(LEVELS, 255)]))  # opaque
    put(root / "train/cat/6.tif", Image.fromarray(np.zeros((16, 16, 4), np.uint8), "CMYK"))
    images = load(root).train_images
    for image, expected in zip(images[2:], (table[gray], colour, colour, 255), strict=False):
        assert (image == expected).all()
    assert "1 images with transparency" in err(capsys)


def tif(value) -> Image.Image:
    return Image.fromarray(np.full((4, 4), value))


REFUSED = {
    r"none is brighter than 4095 of 65535 .*3\.png": {
        "train/cat/3.png": np.full((4, 4), 4095, np.uint16)
    },
    r"3\.tif \(integers": {"train/cat/3.tif": tif(np.int32(70000))},
    r"1 of 7 are not 4x4: .*train/cat/0\.png is 5x3; --resize N": {"train/cat/0.png": pixels(5, 3)},
    r"cannot read 3 of 9 images: .*cat/3\.png .*dog/3\.jpg .*test/dog/2\.png": {
        "train/cat/3.png": b"", "train/dog/3.jpg": b"<html>", "test/dog/2.png": b"\x89PNG",
    },
    **{
        rf"3\.tif \(float32 {said}.*convert": {"train/cat/3.tif": tif(np.float32(x))}
        for x, said in ((0.3, "that are"), (200, "from 200"), (-1, "from -1"), (np.nan, "from nan"))
    },
}  # fmt: skip


@pytest.mark.parametrize("match", REFUSED)
def test_images_that_do_not_fit_are_refused_by_name(folder, match):
    refused(folder(REFUSED[match]), match)


def test_resize(folder):
    """Antialiased bilinear, aspect ratio not kept; images of any size, and data sets of one."""
    root = folder({"train/cat/0.png": pixels(9, 5), "train/cat/00.png": pixels(6, 6, 3)})
    a = load(root, resize=3)
    assert a.train_images.shape == (6, 3, 3, 3)
    for k, name in enumerate(("0", "00", "1")):
        with Image.open(root / f"train/cat/{name}.png") as image:
            expected = image.resize((3, 3), Image.Resampling.BILINEAR).convert("RGB")
        assert np.array_equal(a.train_images[k], np.asarray(expected))
    small = resized(load_digits(DATA), 4)
    first = Image.fromarray(load_digits(DATA)[0][0, ..., 0])
    expected = np.asarray(first.resize((4, 4), Image.Resampling.BILINEAR))
    assert np.array_equal(small.train_images[0, ..., 0], expected)
    assert small.test_images.shape == (360, 4, 4, 1)
    refused(root, "images differ in size")  # the cache of the other size is not taken


# ---- the cache -----------------------------------------------------------------------------------


def test_a_folder_is_decoded_once_but_damage_and_other_images_are_noticed(
    folder, monkeypatch, capsys
):
    root = folder()
    first = load(root)
    with monkeypatch.context() as m:
        m.setattr(loading, "decode", None)
        same(load(root), first)
        assert load(root).train_images.flags.writeable
    assert err(capsys) == ""
    [cache] = (root.parent / "cache").glob("pictures-*.npz")
    content = cache.read_bytes()
    where = content.index(first.train_images.tobytes())
    flipped = content[: where + 3] + bytes([content[where + 3] ^ 16]) + content[where + 4 :]
    for damaged in (flipped, content[:-40], b""):
        cache.write_bytes(damaged)
        same(load(root), first)
        assert "decoding again" in err(capsys)
        assert cache.read_bytes() == content
    cache.rename(left := cache.with_name(f".{cache.name}.123.tmp"))  # of a killed process
    load(root)
    assert cache.exists() and not left.exists()
    put(root / "train/cat/1.png", pixels(4, 4))
    assert not np.array_equal(load(root).train_images, first.train_images)
    assert "was decoded from other files or settings: decoding again" in err(capsys)


def test_equal_sizes_and_times_are_not_equal_images(tmp_path):
    found = []
    for value, parent in enumerate(("a", "b")):  # as unpacked from an archive with one time
        root = tmp_path / parent / "pictures"
        for k, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
            put(root / name / "1.bmp", np.full((4, 4), 9 * value + k, np.uint8))
            os.utime(root / name / "1.bmp", (1, 1))
        found.append(load_arrays(str(root), tmp_path / "cache", quiet=True).train_images.max())
    assert found == [1, 10]


def test_two_processes_decode_once(folder, monkeypatch):
    root, calls, decode = folder(), [], loading.decode

    def slowly(*arguments):
        calls.append(1)
        threading.Event().wait(0.3)
        return decode(*arguments)

    monkeypatch.setattr(loading, "decode", slowly)
    threads = [threading.Thread(target=load, args=(root,)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1


def test_a_data_folder_that_can_only_be_read(folder):
    """A folder that is read-only, or whose lock belongs to somebody else; with arrays and without.
    Where the tests run as root, without the rights that root has over permissions."""
    root, line = folder(), "(4, 4, 4, 1)"
    kept = [root.parent / "closed", root.parent / "open"]
    for cache, mode in zip(kept, (0o555, 0o755), strict=True):
        load_arrays(str(root), cache, quiet=True)
        [lock] = cache.glob(".*.lock")
        lock.chmod(0o444), cache.chmod(mode)
    bare = root.parent / "bare"
    bare.mkdir(mode=0o555)
    foreign = root.parent / "foreign"
    foreign.mkdir()
    (foreign / ".pictures.lock").touch(0o444)
    caches = [str(c) for c in (*kept, bare, bare / "below", foreign)]
    code = f"""
import sys; sys.path.insert(0, {str(DATA.parent)!r})
from pathlib import Path
import loading
for cache in {caches!r}:
    print(loading.load_arrays({str(root)!r}, Path(cache), quiet=True).train_images.shape)"""
    rights = "--bounding-set=-dac_override,-dac_read_search,-fowner"
    words = ["setpriv", rights, "--inh-caps=-all"] if os.getuid() == 0 else []
    done = subprocess.run([*words, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [line] * 5, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 2 and all("cannot keep" in s and "Permission denied" in s for s in said)
    assert list(foreign.glob("pictures-*.npz"))  # the folder is writable, though its lock is not


def test_without_sched_getaffinity(folder, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert loading.usable_cpus() == os.cpu_count()
    assert len(load(folder()).train_labels) == 4


# ---- CIFAR and CINIC-10 --------------------------------------------------------------------------


def archive(path, files):
    """A .tar.gz of pickles, as CIFAR's makers wrote them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, value in files.items():
            content = pickle.dumps(value, 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """cifar("cifar10"): its rows, (N, 3072) channels first, and labels, train and test; an archive
    of them lies in tmp_path / "data" and its MD5 is taken for right."""
    import torchvision.datasets.cifar
    import torchvision.datasets.utils

    for module in (torchvision.datasets.cifar, torchvision.datasets.utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))

    def make(name):
        if name == "cifar10":
            batches = {f"data_batch_{k}": 20 for k in range(1, 6)} | {"test_batch": 10}
            meta, key, classes, base = "batches.meta", "labels", 10, "cifar-10-batches-py"
            extra, file = {"label_names": [f"c{i}" for i in range(10)]}, "cifar-10-python.tar.gz"
        else:
            batches, meta, key = {"train": 300, "test": 100}, "meta", "fine_labels"
            classes, base, file = 100, "cifar-100-python", "cifar-100-python.tar.gz"
            extra = {"fine_label_names": [f"c{i}" for i in range(100)]}
        data = {
            b: {"data": pixels(n, 3072), key: [(7 * i) % classes for i in range(n)]}
            for b, n in batches.items()
        }
        archive(
            tmp_path / "data" / file, {f"{base}/{k}": v for k, v in {**data, meta: extra}.items()}
        )
        train = [b for k, b in data.items() if "test" not in k]
        test = next(b for k, b in data.items() if "test" in k)
        rows = np.concatenate([b["data"] for b in train]), test["data"]
        return rows, ([y for b in train for y in b[key]], test[key])

    return make


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_as_its_makers_ship_it(cifar, name, tmp_path, monkeypatch, capsys):
    rows, labels = cifar(name)
    a = load_arrays(name, tmp_path / "data", quiet=True)
    assert a.classes == [f"c{i}" for i in range(len(a.classes))]
    for row, label, images, y in zip(rows, labels, a[0:4:2], a[1:4:2], strict=True):
        n = len(row)
        assert images.flags.c_contiguous and images.dtype == np.uint8 and y.tolist() == label
        for k, (i, j, c) in zip(range(n), DRAW.integers(0, (32, 32, 3), (n, 3)), strict=False):
            assert images[k, i, j, c] == row[k, 1024 * c + 32 * i + j]
    # The next start reads the arrays that were kept, without torchvision and without the archive.
    for path in (tmp_path / "data").iterdir():
        if path.suffix != ".npz" and path.is_file():
            path.unlink()
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it is an error
    capsys.readouterr()
    same(load_arrays(name, tmp_path / "data"), a)
    assert err(capsys) == ""


def test_cifar_resized_is_kept_beside_and_damage_is_made_again(cifar, tmp_path, capsys):
    cifar("cifar10")
    whole, small = (load_arrays("cifar10", tmp_path / "data", n) for n in (None, 16))
    expected = Image.fromarray(whole.train_images[3]).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(small.train_images[3], np.asarray(expected))
    for cache in (tmp_path / "data").glob("cifar10-*.npz"):
        cache.write_bytes(cache.read_bytes()[:-1000])
    for damaged in (True, False):
        same(load_arrays("cifar10", tmp_path / "data"), whole)
        same(load_arrays("cifar10", tmp_path / "data", 16), small)
        assert err(capsys).count("is damaged") == 2 * damaged
    assert len(list((tmp_path / "data").glob("cifar10-*.npz"))) == 2


@pytest.fixture
def no_network(monkeypatch):
    import urllib.request

    def refuse(*a, **k):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cinic10"])
def test_without_a_network_one_line_says_which_file_to_put_where(tmp_path, no_network, name):
    file = loading.CIFAR[name][1] if name in loading.CIFAR else "CINIC-10.tar.gz"
    with pytest.raises(UserError, match=rf"cannot get {name} .*put {file} .* into {tmp_path}") as e:
        load_arrays(name, tmp_path, quiet=True)
    assert "\n" not in str(e.value)


def test_the_archives_are_those_that_torchvision_knows():
    from torchvision import datasets

    for kind, file, md5 in loading.CIFAR.values():
        known = getattr(datasets, kind)
        assert (known.filename, known.tgz_md5) == (file, md5)


@pytest.mark.parametrize("unpacked", [True, False])
def test_pickles_of_cifar_are_checked_before_they_are_opened(tmp_path, no_network, unpacked):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    base, names = "cifar-10-batches-py", [f"data_batch_{k}" for k in range(1, 6)]
    names += ["test_batch", "batches.meta"]
    data = tmp_path / "data"
    files = {f"{base}/{n}": Hostile() for n in names} | {"../escaped": Hostile()}
    archive(data / "cifar-10-python.tar.gz", files)
    if unpacked:
        (data / base).mkdir()
        for n in names:
            (data / base / n).write_bytes(pickle.dumps(Hostile()))
        (data / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match=r"cannot get cifar10 .*put cifar-10-python"):
        load_arrays("cifar10", data)
    assert {p.name for p in tmp_path.iterdir()} == {"data"}


def pack_cinic10(data, root, monkeypatch):
    """The archive of a folder, whose MD5 is taken for right."""
    data.mkdir(exist_ok=True)
    with tarfile.open(data / "CINIC-10.tar.gz", "w:gz") as tar:
        tar.add(root, ".")
    md5 = hashlib.md5((data / "CINIC-10.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(loading.CINIC10, "md5", md5)


def test_cinic10_from_its_archive(folder, tmp_path, monkeypatch, no_network):
    root = folder({"valid/cat/1.png": pixels(4, 4), "train/cat/3.png": pixels(4, 4, 3)})
    expected = load(root)
    data = tmp_path / "data"
    put(data / "CINIC-10/mine.txt", b"the user's own")
    (data / ".cinic10-unpacked/train/cat").mkdir(parents=True)  # left by a process that was killed
    pack_cinic10(data, root, monkeypatch)
    same(load_arrays("cinic10", data, quiet=True), expected)
    assert not (data / ".cinic10-unpacked").exists() and (data / "CINIC-10/mine.txt").exists()
    (data / "CINIC-10.tar.gz").unlink()
    same(load_arrays("cinic10", data, quiet=True), expected)
    monkeypatch.setitem(loading.CINIC10, "md5", "0" * 32)
    with pytest.raises(UserError, match=r"cannot get cinic10 .*CINIC-10\.tar\.gz \(MD5 0000"):
        load_arrays("cinic10", data, quiet=True)


# ---- digits and .npz files -----------------------------------------------------------------------


def test_digits(tmp_path):
    a = loading.Arrays(*load_digits(tmp_path))  # not there: the project's
    with np.load(DATA / "digits.npz") as f:
        images, labels = f["images"], f["labels"]
    assert np.array_equal(np.concatenate([a.train_images, a.test_images])[..., 0], images)
    assert np.array_equal(np.concatenate([a.train_labels, a.test_labels]), labels)
    assert len(a.test_labels) == 360 and a.classes == list("0123456789")
    np.savez(tmp_path / "digits.npz", images=images[::-1], labels=labels[::-1])  # one's own
    assert np.array_equal(load_digits(tmp_path)[0][0, ..., 0], images[-1])
    np.savez(tmp_path / "digits.npz", images=images / 16, labels=labels)
    with pytest.raises(UserError, match=r"digits\.npz: not images \(N, H, W\) uint8 and labels"):
        load_digits(tmp_path)
    (tmp_path / "digits.npz").write_bytes((DATA / "digits.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"digits\.npz is damaged"):
        load_digits(tmp_path)


def four(n=6, m=3, shape=(4, 4, 3), classes=3):
    return {
        "train_images": pixels(n, *shape),
        "train_labels": np.arange(n) % classes,
        "test_images": pixels(m, *shape),
        "test_labels": np.arange(m) % classes,
    }


def test_npz_files(tmp_path, capsys):
    values = four()
    np.savez(path := tmp_path / "own.npz", **values, classes=["a", "b", "c"])
    a = load_arrays(str(path), tmp_path)
    assert all(np.array_equal(x, values[k]) for k, x in zip(values, a, strict=False))
    assert a.classes == ["a", "b", "c"] and peek_size(str(path)) == (4, 4)
    np.savez_compressed(path, **four(shape=(4, 5)))
    a = load_arrays(str(path), tmp_path)
    assert a.train_images.shape == (6, 4, 5, 1) and a.classes == ["0", "1", "2"]
    assert peek_size(str(path)) == (4, 5)
    assert load_arrays(str(path), tmp_path, 2).train_images.shape == (6, 2, 2, 1)
    assert err(capsys) == ""
    np.savez(path, **four(), val_images=pixels(2, 4, 4, 3), val_labels=[0, 1])
    assert len(load_arrays(str(path), tmp_path).train_labels) == 6
    assert "val_images, val_labels not used" in err(capsys)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"test_labels": None},
            r"own\.npz lacks test_labels \(it has train_images, .*test_images\)",
        ),
        ({"train_images": pixels(5, 4, 4, 3)}, "5 train_images and 6 train_labels"),
        ({"test_images": pixels(3, 4, 5, 3)}, r"differ in shape \(4x4x3 and 4x5x3\)"),
        ({"train_images": pixels(6, 4)}, r"train_images has shape \(6, 4\)"),
        ({"train_images": pixels(6, 3, 4, 5)}, "channels first"),
        ({"train_images": pixels(6, 2, 8, 8)}, "channels first"),
        ({"train_images": pixels(6, 13, 8, 8)}, "channels first"),
        ({"train_images": np.full((6, 4, 4, 3), 256)}, "train_images holds int64 from 256 to 256"),
        ({"train_images": np.full((6, 4, 4, 3), -1)}, "train_images holds int64 from -1"),
        ({"train_images": np.full((6, 4, 4, 3), 0.3)}, "no multiples of 1/255"),
        ({"train_images": np.full((6, 4, 4, 3), np.nan)}, "float64 from nan to nan"),
        ({"train_images": np.full((6, 4, 4, 3), "x")}, "train_images has dtype <U1"),
        ({"train_images": np.zeros((6, 4, 4, 3), bool)}, "train_images has dtype bool"),
        ({"train_images": np.full((6, 4, 4, 3), None)}, "is damaged, or no .npz .*pickle"),
        ({"train_labels": np.zeros(6)}, r"train_labels is float64 of shape \(6,\)"),
        ({"train_labels": np.eye(6, 3, dtype=int)}, r"train_labels is int64 of shape \(6, 3\)"),
        ({"train_labels": np.arange(6) % 3 + 1}, "no training image has label 0"),
        ({"train_labels": np.arange(6) % 3 - 1}, "train_labels has the label -1"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, 10**12])}, "no training image has label 3"),
        ({"test_labels": np.array([0, 1, 3])}, "test label 3 is no label of a training image"),
        ({"classes": ["a", "b"]}, "label 2, but only 2 classes"),
        ({"classes": "abc"}, r"classes has shape \(\)"),
        ({"classes": ["a", "b", "a"]}, "two classes are named a"),
        ({k: v * 0 for k, v in four().items() if "labels" in k}, r"are of one class \(0\)"),
        (
            {"train_images": pixels(6, 4, 4, 3) % 2, "test_images": np.ones((3, 4, 4, 3))},
            "are uint8 and float64, 0 to 1: give one dtype",
        ),
        ({"classes": ["a", "b", "c", "d"]}, r"no training image has label 3 \(d\)"),
        ({"test_images": pixels(0, 4, 4, 3), "test_labels": np.zeros(0, int)}, "0 test_images"),
    ],
)
def test_what_an_npz_must_not_hold(tmp_path, change, match):
    values = {k: v for k, v in {**four(), **change}.items() if v is not None}
    np.savez(tmp_path / "own.npz", **values)
    with pytest.raises(UserError, match=match):
        load_arrays(str(tmp_path / "own.npz"), tmp_path)


def test_classes_may_have_several_names():
    """As those of torchvision's ImageNet have."""
    names = [("tench", "Tinca tinca"), ("hen",), ("cock",)]
    assert as_arrays({**four(), "classes": names}).classes == [str(n) for n in names]


def test_test_images_that_are_training_images_are_said(tmp_path, folder, capsys):
    values = four()
    values["test_images"] = values["train_images"][:3]
    np.savez(tmp_path / "own.npz", **values)
    load_arrays(str(tmp_path / "own.npz"), tmp_path)
    assert "3 of 3 test images are also training images, pixel by pixel" in err(capsys)
    root = folder()
    shutil.copy(root / "train/cat/1.png", root / "test/cat/1.png")
    for _ in range(2):  # also from the cache
        load(root)
        assert "1 of 2 test images are also training images" in err(capsys)


def test_a_data_dir_that_is_no_folder(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data-dir .*file: not a folder"):
        load_arrays(str(folder()), tmp_path / "file")


def test_an_npz_that_is_none(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"x\.npz is damaged, or no \.npz"):
        load_arrays(str(tmp_path / "x.npz"), tmp_path)
    np.savez(tmp_path / "y.npz", **four())
    content = bytearray((tmp_path / "y.npz").read_bytes())
    content[200] ^= 1
    (tmp_path / "y.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"y\.npz is damaged.*CRC"):
        load_arrays(str(tmp_path / "y.npz"), tmp_path)


# ---- arrays and data sets of a function call -----------------------------------------------------


def test_arrays_in_each_form():
    values = four()
    a = as_arrays(values)
    same(as_arrays(tuple(values.values())), a)
    same(as_arrays(a), a)
    same(as_arrays({k: torch.from_numpy(v) for k, v in values.items()}), a)
    x, y, u, v = values.values()
    same(as_arrays(((x, y), (u, v))), a)
    same(as_arrays(((x, y[:, None].astype(np.uint8)), (u, v[:, None]))), a)  # Keras
    same(as_arrays((x.astype(np.int32), y.tolist(), u.astype(np.float32) / 255, v)), a)
    view = np.asfortranarray(x)
    assert as_arrays((view, y, u, v)).train_images.flags.c_contiguous
    frozen = x.copy()
    frozen.flags.writeable = False
    assert as_arrays((frozen, y, u, v)).train_images.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int8, np.uint64])
def test_each_level_is_exact_in_each_dtype(dtype):
    levels = np.arange(128 if dtype == np.int8 else 256).reshape(1, 16, -1)
    x = (levels / 255 if np.dtype(dtype).kind == "f" else levels).astype(dtype)
    a = as_arrays((np.repeat(x, 2, 0), [0, 1], np.repeat(x, 2, 0), [0, 1]))
    assert np.array_equal(a.train_images[:1, ..., 0], levels)


class Pairs(torch.utils.data.Dataset):
    """A data set of (image, label), perhaps with classes."""

    def __init__(self, images, labels, transform=None, classes=None):
        self.images, self.labels, self.transform = images, labels, transform
        if classes:
            self.classes = classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        image = self.images[k]
        return self.transform(image) if self.transform else image, self.labels[k]


def test_data_sets_of_torchvision(folder):
    from torchvision import datasets
    from torchvision.transforms import v2

    root = folder({"train/cat/3.png": pixels(4, 4, 3)})
    expected = load(root)
    sets = [datasets.ImageFolder(root / s) for s in ("train", "test")]
    same(as_arrays(sets), expected)  # its loader makes all of them RGB
    tensors = [
        datasets.ImageFolder(root / s, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, True)]))
        for s in ("train", "test")
    ]
    same(as_arrays(tensors), expected)
    part = torch.utils.data.Subset(sets[0], [0, 3, 1])
    a = as_arrays((part, sets[1]))
    assert a.train_labels.tolist() == [0, 1, 0]
    assert np.array_equal(a.train_images[1], expected.train_images[3])


def test_data_and_targets_are_taken_at_once_unless_they_are_transformed():
    class Held(Pairs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.data, self.targets = self.images, self.labels

        def __getitem__(self, k):
            assert self.transform, "it is not read one by one"
            return super().__getitem__(k)

    x, y, u, v = four(shape=(4, 4)).values()
    a = as_arrays((Held(torch.from_numpy(x), y.tolist()), Held(torch.from_numpy(u), v.tolist())))
    assert np.array_equal(a.train_images[..., 0], x) and a.train_labels.tolist() == y.tolist()
    b = as_arrays((Held(x, y, lambda i: 255 - i), Held(u, v, lambda i: 255 - i)))
    assert np.array_equal(b.train_images[..., 0], 255 - x)


def test_data_sets_that_are_refused():
    x, y, u, v = four().values()
    test = Pairs(u, v)

    def refuse(data, match):
        with pytest.raises(UserError, match=match):
            as_arrays(data)

    tensors = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    same(as_arrays((Pairs(tensors, y), test)), as_arrays((x, y, u, v)))
    refuse((Pairs((tensors - 0.5) / 0.25, y), test), "train item 0 .*float32 from .*uint8")
    noise = Pairs(x, y, lambda image: pixels(4, 4, 3))
    refuse((noise, test), "train image 0 is another each time: take off the transform")
    odd = [*x[:5], pixels(7, 4, 3)]
    refuse((Pairs(odd, y), test), "1 of 6 are not 4x4: train image 5 is 7x4")
    refuse((Pairs(x, y / 2), test), "train item 0 is no .image, label")
    refuse((Pairs([{"image": i} for i in x], y), test), "train item 0 is no .image, label")
    loader = torch.utils.data.DataLoader(test)
    refuse((loader, loader), r"DataLoader is not a map-style data set: give its \.dataset")
    classes = list("abc"), list("acb")
    refuse([Pairs(x, y, None, c) for c in classes], "different classes .in another order")
    refuse([Pairs(x, y, None, list("abc")), Pairs(u, v, None, list("abd"))], "classes .c, d.")
    refuse((Pairs(x[:0], y[:0]), test), "0 train_images and 0 train_labels")
    gray = Pairs(x[..., 0], y)
    refuse((gray, test), r"differ in shape \(4x4x1 and 4x4x3\)")
    refuse((test,), "data: tuple is not a mapping with train_images")
    refuse(test, "data: Pairs is not a mapping")
    refuse({}, "data lacks train_images, .*it has nothing")
    refuse({**four(), "train_labels": [[0], [1, 2]]}, "train_labels")


# ---- normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1203, 5, 7, 3), (3, 4, 4, 1), (501, 2, 3, 5)])
def test_normalisation_has_the_bits_of_whole_histograms(shape):
    images = pixels(*shape)
    images[..., 0] = np.minimum(images[..., 0], 17)
    counts = np.array([np.bincount(images[..., c].ravel(), minlength=256) for c in range(shape[3])])
    value, total = np.arange(256), counts.sum(1)
    mean = counts @ value / total
    deviation = np.sqrt(np.maximum(counts @ value**2 / total - mean**2, 1e-12))
    scale, shift = normalisation(images)
    assert scale.dtype == np.float64
    assert np.array_equal(scale, 1 / deviation) and np.array_equal(shift, -mean / deviation)
    constant = normalisation(np.full((2, 3, 3, 1), 9, np.uint8))
    assert constant == (1e6, -9e6)


# ---- through the stages --------------------------------------------------------------------------

TINY = "--depth 8 --width 2 --steps 6 --batch-size 4"
SCORED = f"{TINY} --subset easy --size 4 --networks 2 --score-step 2"
STAGES = {
    "el2n": f"{TINY} --networks 2 --score-step 2".split(),
    "pretrain": f"{SCORED} --rewind 2 --easy-size 4".split(),
    "imp": f"{SCORED} --rewind 2 --levels 1".split(),
    "lmc": f"{SCORED} --rewind 2 --children 2".split(),
    "warmup": f"{TINY} --subset random --size 4 --warmup 2 --sharpness-sample 4".split(),
}


@pytest.mark.parametrize(
    ("kind", "names"),
    [("cifar10", [*STAGES]), *((k, ["imp"]) for k in ("cifar100", "cinic10", "folder", "npz"))],
)
def test_every_stage_in_colour_and_every_kind_of_data(
    kind, names, cifar, folder, tmp_path, monkeypatch, stage
):
    data, dataset = tmp_path / "data", kind
    if kind.startswith("cifar"):
        cifar(kind)
    else:
        dataset = str(root := folder(size=(8, 8)))
        arrays = load(root)
    if kind == "npz":
        np.savez(tmp_path / "own.npz", **arrays._asdict())
        dataset = str(tmp_path / "own.npz")
    elif kind == "cinic10":
        pack_cinic10(data, root, monkeypatch)
        dataset = kind
    for name in names:
        stage(name, "--dataset", dataset, "--data-dir", data, *STAGES[name])
        [path] = (tmp_path / "results" / name).rglob("result.json")
        found = load_arrays(dataset, data, quiet=True)
        if not kind.startswith("cifar"):
            same(found, arrays)
        result = runs.read_json(path, "ended")
        assert result["ended"] is None
        assert result["config"]["settings"]["data"] == runs.fingerprint(*found[:4])
