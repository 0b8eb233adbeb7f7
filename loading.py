"""Loading of data sets: CIFAR, CINIC-10, folders of images, .npz files, arrays and data sets."""

import contextlib
import difflib
import functools
import glob
import hashlib
import operator
import os
import shutil
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import runs
from runs import UserError, one_line, warn

# ---- data: what options.py needs of it to choose a preset ----------------------------------------

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "valid", "valid": "valid", "validation": "valid"}
SYSTEM_NAMES = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}


def is_hidden(name: str) -> bool:
    """Names that are no part of a data set: .ipynb_checkpoints, ._x.png, __MACOSX and the like."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The file name extensions, in lower case, of the formats whose pixels Pillow reads by itself
    (EPS and WMF need other programs; the others left out are only identified or only written)."""
    from PIL import Image

    formats = Image.registered_extensions().items()
    left_out = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
    return frozenset(suffix.lower() for suffix, name in formats if name not in left_out)


def entries(folder: str | Path) -> list[os.DirEntry]:
    """What a folder holds, by name, without what is hidden."""
    with os.scandir(folder) as scan:
        return sorted((e for e in scan if not is_hidden(e.name)), key=lambda e: e.name)


def files_below(folder: str, above: tuple = ()) -> Iterator[os.DirEntry]:
    """The files of a folder and of its sub-folders; links are followed, but not in circles."""
    status = os.stat(folder)
    if (inode := (status.st_dev, status.st_ino)) not in above:
        for entry in entries(folder):
            if entry.is_dir():
                yield from files_below(entry.path, (*above, inode))
            else:
                yield entry


def split_folders(root: Path) -> list[tuple[str, os.DirEntry]]:
    """("train", "valid" or "test", its folder) of a folder of images."""
    found = [(SPLITS.get(e.name.lower()), e) for e in entries(root)]
    return [(split, e) for split, e in found if split and e.is_dir()]


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def peek_size(dataset: str) -> tuple[int, int] | None:
    """Height and width of the first training image of a folder or .npz file, without reading the
    rest. None for other data sets, and where `load_arrays` will say what is wrong."""
    root = Path(dataset).expanduser()
    try:
        if root.is_file():
            with np.load(root, allow_pickle=False) as f, f.zip.open("train_images.npy") as member:
                version, _ = np.lib.format.read_magic(member)
                headers = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
                shape = headers[version - 1](member)[0]
            return (shape[1], shape[2]) if len(shape) in (3, 4) else None
        from PIL import Image

        for folder in (f for split, f in split_folders(root) if split == "train"):
            for file in files_below(folder.path):
                inside = os.path.dirname(file.path) != folder.path
                if inside and suffix_of(file.name) in image_suffixes() and file.is_file():
                    with Image.open(file.path) as image:
                        return image.height, image.width
    except Exception:  # whatever is wrong with it is named when it is loaded
        return None
    return None


# ---- data ----------------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """A data set in memory. Images are (N, H, W, C) uint8, C-contiguous; labels (N,) int64."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]


KEYS = Arrays._fields[:4]
CIFAR = {  # torchvision's class, its archive, the archive's MD5
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}
CINIC10 = {
    "url": "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
    "md5": "6ee4d0c996905fe93221de577967a372",
}
NAMES = ("digits", *CIFAR, "cinic10")
FOLDER_RULES = 4  # increased whenever the same files decode to other arrays


def load_arrays(
    dataset: str, folder: Path, resize: int | None = None, quiet: bool = False
) -> Arrays:
    """`cifar10`, `cifar100`, `cinic10`, a folder of images or an .npz file.

    A folder holds train/CLASS/* and test/CLASS/*; val/, valid/ or validation/ join train/. An .npz
    holds train_images, train_labels, test_images, test_labels and perhaps classes. Downloads and
    decoded arrays are kept in `folder`. With `resize` images become that many pixels high and wide,
    by PIL's bilinear filter with antialiasing, as torchvision's Resize. Raises UserError where
    something is missing, unreadable or ambiguous, by name.
    """
    path = Path(dataset).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"--data-dir {printable(folder)}: not a folder")
    if dataset in CIFAR:
        make = functools.partial(fetch_cifar, dataset, folder, resize)
        return cached(folder, dataset, (CIFAR[dataset][2], resize), make)
    if dataset == "cinic10":
        known = (CINIC10, resize) if resize else CINIC10
        return cached(folder, dataset, known, lambda: fetch_cinic10(folder, resize, quiet))
    if dataset and path.is_dir():
        try:
            files, remarks = list_images(path)
        except OSError as e:
            name = printable(e.filename or path)
            raise UserError(f"--dataset: cannot read {name}: {e.strerror}") from e
        for remark in remarks:
            warn(f"{printable(path)}: {remark}")
        inside = [(*f[:2], f[2].removeprefix(str(path)), *f[3:]) for f in files]
        known = (FOLDER_RULES, resize, inside, sample_of(files))

        def make() -> tuple[Arrays, list[str]]:
            arrays, remarks = decode(files, resize, quiet)
            return arrays, remarks + shared_images(arrays)

        return cached(folder, path.resolve().name, known, make)
    if path.is_file() and path.suffix.lower() == ".npz":
        values = runs.read_npz(path)
        if unused := [k for k in values if k not in Arrays._fields]:
            warn(f"{printable(path)}: {', '.join(unused)} not used")
        arrays = as_arrays(values, printable(path))
        for remark in shared_images(arrays):
            warn(f"{printable(path)}: {remark}")
        return resized(arrays, resize)
    close = difflib.get_close_matches(dataset.lower().replace("-", ""), NAMES, 1, 0.8)
    hint = f" (did you mean {close[0]}?)" if close and not path.exists() else ""
    known = f"none of {', '.join(NAMES)}, no folder of images and no .npz file"
    raise UserError(f"--dataset {printable(dataset)}: {known}{hint}")


def shared_images(arrays: Arrays) -> list[str]:
    """What has to be said of test images that are training images as well."""
    known = {hash(image.tobytes()) for image in arrays.train_images}
    shared = sum(hash(image.tobytes()) in known for image in arrays.test_images)
    said = f"{shared:,} of {len(arrays.test_images):,} test images are also training images"
    return [f"{said}, pixel by pixel"] * bool(shared)


def printable(text: Any) -> str:
    """A name with the bytes that are no UTF-8 written as \\xe9."""
    return os.fsencode(str(text)).decode("utf-8", "backslashreplace")


# ---- data: arrays that are handed in, and .npz files ---------------------------------------------

ACCEPTED = f"a mapping with {', '.join(KEYS)}, these four in a tuple, or (train, test) data sets"


def as_arrays(data: Any, source: str = "data") -> Arrays:
    """What a function call gives as `data=`, checked.

    A mapping with train_images, train_labels, test_images, test_labels and perhaps classes; a tuple
    of the four (and classes); or a pair of map-style data sets, or of (images, labels). Images are
    (N, H, W) or (N, H, W, C): uint8, or other numbers that are exactly representable in it
    (integers 0 to 255, floats k / 255). Labels are integers 0 to C-1. Raises UserError.
    """
    classes = None
    if isinstance(data, Mapping):
        if missing := [k for k in KEYS if k not in data]:
            held = ", ".join(map(str, data)) or "nothing"
            raise UserError(f"{source} lacks {', '.join(missing)} (it has {held})")
        values, classes = [data[k] for k in KEYS], data.get("classes")
    elif isinstance(data, tuple | list) and len(data) in (4, 5):
        values, classes = data[:4], data[4] if len(data) == 5 else None
    elif isinstance(data, tuple | list) and len(data) == 2:
        values = [a for d, s in zip(data, ("train", "test"), strict=True) for a in read_set(d, s)]
        classes, others = (getattr(d, "classes", None) for d in data)
        if classes is not None and others is not None and list(classes) != list(others):
            odd = sorted(map(str, set(classes) ^ set(others)))[:3] or ["in another order"]
            raise UserError(f"{source}: train and test have different classes ({', '.join(odd)})")
    else:
        raise UserError(f"{source}: {type(data).__name__} is not {ACCEPTED}")
    images = [to_numpy(values[k], f"{source}: {KEYS[k]}") for k in (0, 2)]
    whole = [i for i in images if i.dtype.kind in "iu" and i.size]
    if len(whole) == 1 and whole[0].max() <= 1 and {i.dtype.kind for i in images} > {"f"}:
        kinds = " and ".join(str(i.dtype) for i in images)
        raise UserError(f"{source}: training and test images are {kinds}, 0 to 1: give one dtype")
    images = [check_images(i, f"{source}: {KEYS[k]}") for i, k in zip(images, (0, 2), strict=True)]
    labels = [check_labels(values[k], f"{source}: {KEYS[k]}") for k in (1, 3)]
    for name, i, y in zip(("train", "test"), images, labels, strict=True):
        if len(i) != len(y) or not len(i):
            raise UserError(f"{source}: {len(i)} {name}_images and {len(y)} {name}_labels")
    if images[0].shape[1:] != images[1].shape[1:]:
        shapes = " and ".join("x".join(map(str, i.shape[1:])) for i in images)
        raise UserError(f"{source}: training and test images differ in shape ({shapes})")
    used = set(np.unique(labels[0]).tolist())
    count = min(max(used), len(labels[0])) + 1  # with more labels than images one is unused
    if not isinstance(classes, list | tuple | dict | None) and np.ndim(classes) != 1:
        raise UserError(f"{source}: classes has shape {np.shape(classes)}, not a name for each")
    names = [printable(c) for c in (range(count) if classes is None else classes)]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{source}: two classes are named {twice[0]}")
    if unused := set(range(len(names))) - used:
        name = f" ({names[min(unused)]})" if classes is not None else ""
        raise UserError(f"{source}: no training image has label {min(unused)}{name}")
    if extra := used - set(range(len(names))):
        raise UserError(f"{source}: label {min(extra)}, but only {len(names)} classes")
    if unknown := set(np.unique(labels[1]).tolist()) - used:
        raise UserError(f"{source}: test label {min(unknown)} is no label of a training image")
    check_classes(source, names)
    return Arrays(images[0], labels[0], images[1], labels[1], names)


def check_classes(source: str, names: list[str]) -> None:
    if len(names) < 2:
        raise UserError(f"{source}: all images are of one class ({names[0]})")


def to_numpy(value: Any, name: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    try:
        return np.asarray(array)
    except ValueError as e:
        raise UserError(f"{name}: {one_line(e)}") from e


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """uint8 of integers 0 to 255 or of floats k / 255, as torchvision's ToTensor makes them;
    ValueError for what cannot be represented."""
    if pixels.dtype == np.uint8 or not pixels.size:
        return pixels.astype(np.uint8, copy=False)
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind in "iu" and low >= 0 and high <= 255:
        return pixels.astype(np.uint8)
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        scaled = np.multiply(pixels, 255, dtype=np.result_type(pixels, np.float32))
        levels = np.rint(scaled)
        if np.abs(scaled - levels).max() < 0.1:  # room for the rounding of float16
            return levels.astype(np.uint8)
        raise ValueError(f"{pixels.dtype} that are no multiples of 1/255: convert them to uint8")
    raise ValueError(f"{pixels.dtype} from {low:g} to {high:g}: convert them to uint8, 0 to 255")


def check_images(value: Any, name: str) -> np.ndarray:
    images = to_numpy(value, name)
    shape = images.shape
    if images.ndim not in (3, 4) or 0 in shape[1:]:
        raise UserError(f"{name} has shape {shape}, not (N, H, W) or (N, H, W, C)")
    # A second dimension that is small, or unlike two equal ones behind it, counts channels.
    if (
        images.ndim == 4
        and shape[3] > 4
        and (shape[1] < min(5, shape[2]) or shape[1] != shape[2] == shape[3])
    ):
        raise UserError(f"{name} has shape {shape}, channels first: transpose it to (N, H, W, C)")
    if images.dtype.kind not in "iuf":
        raise UserError(f"{name} has dtype {images.dtype}: convert them to uint8, 0 to 255")
    try:
        if images.dtype != np.uint8:
            parts = [images[k : k + 1000] for k in range(0, len(images), 1000)]
            images = np.concatenate([to_bytes(p) for p in parts] or [images.astype(np.uint8)])
    except ValueError as e:
        raise UserError(f"{name} holds {one_line(e)}") from e
    images = images[..., None] if images.ndim == 3 else images
    return np.require(images, requirements=["C", "W"])


def check_labels(value: Any, name: str) -> np.ndarray:
    labels = to_numpy(value, name)
    if labels.ndim == 2 and labels.shape[1] == 1:  # Keras, MedMNIST
        labels = labels[:, 0]
    if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
        raise UserError(f"{name} is {labels.dtype} of shape {labels.shape}, not integers (N,)")
    if labels.size and labels.min() < 0:
        raise UserError(f"{name} has the label {labels.min()}")
    return np.require(labels, np.int64, ["C", "W"])


def read_set(data: Any, split: str) -> tuple[Any, Any]:
    """Images and labels of a map-style data set. What it transforms is taken as transformed."""
    if isinstance(data, tuple | list) and len(data) == 2 and hasattr(data[0], "shape"):
        return data[0], data[1]
    transforms = ("transform", "target_transform", "transforms")
    if not any(getattr(data, t, None) for t in transforms):
        images, labels = getattr(data, "data", None), getattr(data, "targets", None)
        if labels is not None and getattr(images, "ndim", 0) in (3, 4):
            return images, labels
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        remedy = ": give its .dataset" if hasattr(data, "dataset") else ""
        raise UserError(f"data: {type(data).__name__} is not a map-style data set{remedy}")

    def item(k: int) -> tuple[str, np.ndarray, dict[str, int], int]:
        try:
            image, label = data[k]
            pixels, remarks = item_pixels(image)
            return f"{split} image {k}", pixels, remarks, operator.index(label)
        except (TypeError, ValueError) as e:
            raise UserError(f"data: {split} item {k} is no (image, label): {one_line(e)}") from e

    for k in range(min(16, len(data))):
        if not np.array_equal(item(k)[1], item(k)[1]):
            raise UserError(f"data: {split} image {k} is another each time: take off the transform")
    labels: list[int] = []

    def items() -> Iterator[tuple[str, np.ndarray, dict[str, int]]]:
        for k in range(len(data)):
            *image, label = item(k)
            labels.append(label)
            yield tuple(image)

    images, remarks = stack_images(len(data), items(), "data")
    for remark in remarks:
        warn(f"data: {remark}")
    return images, labels


def item_pixels(image: Any) -> tuple[np.ndarray, dict[str, int]]:
    if hasattr(image, "getbands"):  # PIL
        return pixels_of(image)
    pixels = to_numpy(image, "image")
    if isinstance(image, torch.Tensor) and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and pixels.shape[2:] != (3,):
        raise ValueError(f"an image of shape {tuple(np.shape(image))}")
    return to_bytes(pixels), {}


# ---- data: made once and kept --------------------------------------------------------------------


def cached(
    folder: Path, name: str, made_from: Any, make: Callable[[], tuple[Arrays, list[str]]]
) -> Arrays:
    """The arrays of `folder`/NAME-STAMP.npz, where the stamp is made from `made_from`; else those
    of `make`, kept there. What has to be said about them is said each time."""
    stamp = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
    cache = folder / f"{name}-{stamp}.npz"

    def read() -> tuple[Arrays, list[str]]:
        values = runs.read_npz(cache)
        return as_arrays(values, printable(cache)), values.get("remarks", np.array([])).tolist()

    made = None
    with contextlib.ExitStack() as held:
        with contextlib.suppress(UserError):
            made = read()  # it is replaced as a whole, so reading needs no lock
        if not made:
            with contextlib.suppress(OSError):  # a folder that can only be read
                held.enter_context(runs.lock(folder / f".{name}.lock", wait=True))
            try:
                made = read() if cache.exists() else None  # made by another process meanwhile
            except UserError as e:
                warn(f"{e}: decoding again")
        if not made:
            others = folder.glob(f"{glob.escape(name)}-{'[0-9a-f]' * 12}.npz")
            if not cache.exists() and any(others):
                warn(f"{printable(name)} was decoded from other files or settings: decoding again")
            made = make()
            keep(cache, *made)
    for remark in made[1]:
        warn(f"{printable(name)}: {remark}")
    return made[0]


def keep(cache: Path, arrays: Arrays, remarks: list[str]) -> None:
    """Writes the arrays, and removes what processes that died while writing them have left."""
    for left in cache.parent.glob(f".{glob.escape(cache.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()
    values = {**arrays._asdict(), "classes": np.array(arrays.classes), "remarks": remarks}
    try:
        runs.write(cache, lambda f: np.savez(f, **values))
    except OSError as e:
        problem = f"cannot keep the decoded arrays in {cache.parent} ({e.strerror})"
        warn(f"{problem}: they will be decoded at each start")


def resized(arrays: tuple, size: int | None) -> Arrays:
    """The images `size` pixels high and wide; the same pixels as when files are decoded so."""
    if not size:
        return arrays
    arrays = Arrays(*arrays)
    if arrays.train_images.shape[3] not in (1, 3):
        raise UserError(f"--resize: images of {arrays.train_images.shape[3]} channels")

    def each(images: np.ndarray) -> np.ndarray:
        plain = images[..., 0] if images.shape[3] == 1 else images
        return np.stack([resize_image(i, size) for i in plain]).reshape(len(images), size, size, -1)

    return arrays._replace(
        train_images=each(arrays.train_images), test_images=each(arrays.test_images)
    )


def resize_image(pixels: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def fetch_cifar(name: str, folder: Path, resize: int | None) -> tuple[Arrays, list[str]]:
    """CIFAR through torchvision, which checks the MD5 of every file before it opens it. Importing
    it takes as long as importing torch, so this is done for the first start only."""
    kind, archive, md5 = CIFAR[name]
    try:
        from torchvision import datasets

        with contextlib.redirect_stdout(sys.stderr):
            sets = [getattr(datasets, kind)(folder, train=t, download=True) for t in (True, False)]
    except (OSError, RuntimeError, ImportError) as e:
        remedy = f"put {archive} (MD5 {md5}) into {folder}"
        raise UserError(f"cannot get {name} ({one_line(e)}): {remedy}") from e
    return resized(as_arrays(sets, name), resize), []


def fetch_cinic10(folder: Path, resize: int | None, quiet: bool) -> tuple[Arrays, list[str]]:
    """CINIC-10, downloaded if need be, its MD5 checked, unpacked, decoded; 270,000 small files."""
    root = folder / ".cinic10-unpacked"  # not the CINIC-10 that a user may have unpacked beside it
    try:
        from torchvision.datasets.utils import download_and_extract_archive

        shutil.rmtree(root, ignore_errors=True)  # of a process that was killed
        with contextlib.redirect_stdout(sys.stderr):
            download_and_extract_archive(download_root=folder, extract_root=root, **CINIC10)
        return decode(list_images(root)[0], resize, quiet)
    except (OSError, RuntimeError, ImportError, tarfile.TarError) as e:
        remedy = f"put CINIC-10.tar.gz (MD5 {CINIC10['md5']}) into {folder}"
        raise UserError(f"cannot get cinic10 ({one_line(e)}): {remedy}") from e
    finally:
        shutil.rmtree(root, ignore_errors=True)


# ---- data: folders of images ---------------------------------------------------------------------


def list_images(root: Path) -> tuple[list[tuple], list[str]]:
    """(split, class, path, bytes, modified) of every image below a folder, in the order of the
    arrays, and what has to be said about the folder. UserError where a split or class is missing.
    """
    where, splits = f"--dataset {printable(root)}", split_folders(root)
    files, ignored, loose, empty = [], Counter(), 0, []
    for split in ("train", "test"):
        if len(named := [folder.name for s, folder in splits if s == split]) > 1:
            raise UserError(f"{where}: {' and '.join(named)} are both {split}: rename one")
    for split, folder in splits:
        filled = set()
        for f in files_below(folder.path):
            name, inside, _ = f.path[len(folder.path) + 1 :].partition(os.sep)
            if (suffix := suffix_of(f.name)) not in image_suffixes():
                ignored[suffix or "no extension"] += 1
            elif not inside:
                loose += 1
            else:
                s = f.stat()
                if not stat.S_ISREG(s.st_mode):  # a pipe would wait for its writer
                    ignored["not a regular file"] += 1
                    continue
                files.append((split, name, f.path, s.st_size, s.st_mtime_ns))
                filled.add(name)
        unfilled = (e.name for e in entries(folder) if e.is_dir() and e.name not in filled)
        empty += [f"{folder.name}/{name}" for name in unfilled]
    valid = ", ".join(f"{f.name}/" for split, f in splits if split == "valid")
    for split in ("train", "test"):
        if split not in {f[0] for f in files}:
            found = [e.name + "/" * e.is_dir() for e in entries(root)]
            found = ", ".join(found[:5] + ["..."] * (len(found) > 5)) or "nothing"
            hint = f"; {loose:,} images lie in no class folder" if loose else ""
            if split == "test" and valid:
                hint += f"; {valid} joins the training images: to test on it, rename it to test"
            message = f"{where}: no images in {split}/CLASS/ (found {found}{hint})"
            raise UserError(printable(message))
    check_classes(where, sorted({printable(f[1]) for f in files}))
    trained, tested = ({f[1] for f in files if (f[0] == "test") == t} for t in (False, True))
    if missing := sorted(tested - trained):
        names = printable(", ".join(missing[:3]))
        raise UserError(f"{where}: test images of class {names}, but no training images")
    remarks = []
    if joined := sum(f[0] == "valid" for f in files):
        remarks.append(f"{joined:,} images of {valid} join the training images")
    if untested := sorted(trained - tested):
        remarks.append(f"no test images of {len(untested)} classes ({', '.join(untested[:3])})")
    if empty:
        remarks.append(f"{len(empty)} class folders without images ({', '.join(empty[:3])})")
    if loose:
        remarks.append(f"{loose:,} images outside class folders ignored")
    if ignored:
        kinds = ", ".join(f"{n:,} {s}" for s, n in ignored.most_common(5))
        remarks.append(f"files that are no images by their extension ignored ({kinds})")
    files.sort(key=lambda f: (f[0] == "test", f[1], f[0], f[2]))
    return files, [printable(r) for r in remarks]


def sample_of(files: list[tuple], most: int = 256) -> str:
    """A hash of how at most `most` of the files begin, evenly spaced: archives unpack with equal
    times, and images without compression have equal sizes, so these alone do not tell two folders
    of one name apart."""
    digest = hashlib.sha256()
    for file in files[:: -(-len(files) // most)]:
        with contextlib.suppress(OSError), open(file[2], "rb") as f:  # decoding names it
            digest.update(f.read(1 << 16))  # photographs may be large
    return digest.hexdigest()


def decode(files: list[tuple], resize: int | None, quiet: bool) -> tuple[Arrays, list[str]]:
    """Arrays of the images that `list_images` gave, and what has to be said about them."""
    from multiprocessing.pool import ThreadPool  # PIL decodes without the interpreter's lock

    def read(file: tuple) -> tuple[str, np.ndarray | str, dict[str, int]]:
        from PIL import Image

        try:
            with Image.open(file[2]) as image:
                pixels, remarks = pixels_of(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            return file[2], one_line(e), {}
        return file[2], resize_image(pixels, resize) if resize else pixels, remarks

    classes = sorted({f[1] for f in files})
    number = {c: k for k, c in enumerate(classes)}
    labels = np.array([number[f[1]] for f in files])
    cut = sum(f[0] != "test" for f in files)
    with (
        ThreadPool(usable_cpus()) as pool,
        runs.progress_bar(len(files), quiet, unit=" images", desc="decoding") as progress,
    ):
        decoded = pool.imap(read, files, chunksize=64)
        counted = (item for item in decoded if progress.update() or True)
        images, remarks = stack_images(len(files), counted, "--dataset")
    names = [printable(c) for c in classes]
    return Arrays(images[:cut], labels[:cut], images[cut:], labels[cut:], names), remarks


def usable_cpus() -> int:
    """CPUs that this process may use; macOS knows only how many there are."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def pixels_of(image: Any) -> tuple[np.ndarray, dict[str, int]]:
    """(H, W) uint8 of a gray PIL image or (H, W, 3) of any other, and what has to be said about it.

    The first frame, without EXIF's orientation and the transparency, as torchvision's ImageFolder.
    16 bits become the high 8 (value >> 8). ValueError for other integers and for floats that are
    not k / 255.
    """
    remarks = {"frames": 1} if getattr(image, "n_frames", 1) > 1 else {}
    mode = image.mode
    if mode.startswith("I"):
        pixels = np.asarray(image)
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65535:
            raise ValueError(f"integers from {low} to {high}: save it with 8 or 16 bits")
        return (pixels >> 8).astype(np.uint8), {**remarks, "deep": high}
    if mode == "F":
        return to_bytes(np.asarray(image)), remarks
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        remarks |= {"transparent": 1} if alpha.min() < 255 else {}
    pixels = np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB"))
    with contextlib.suppress(Exception):  # whatever is wrong with EXIF, the pixels are read
        remarks |= {"turned": 1} if image.getexif().get(0x0112, 1) != 1 else {}
    if mode in ("P", "PA") and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # a palette of grays
    return pixels, remarks


REMARKS = {
    "deep": "16-bit images reduced to their high 8 bits (value >> 8)",
    "transparent": "images with transparency, which is left out, as by torchvision's ImageFolder",
    "turned": "images with an orientation in EXIF, which is left out, as by ImageFolder",
    "frames": "images of several frames, of which the first is taken",
}


def stack_images(
    count: int, items: Iterable[tuple[str, np.ndarray | str, dict[str, int]]], source: str
) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, C) of the `count` items (name, pixels or what is wrong, remarks), where C is 3 if
    any image has colour, and the remarks. UserError if images cannot be read or differ in size."""
    images, unreadable, deepest = np.zeros((count, 1, 1, 1), np.uint8), [], 0
    sizes: dict[tuple, list[str]] = {}
    found: dict[str, list[str]] = {}
    for k, (name, pixels, remarks) in enumerate(items):
        if isinstance(pixels, str):
            unreadable.append(f"{name} ({pixels.replace(name, 'it')})")
            continue
        sizes.setdefault(pixels.shape[:2], []).append(name)
        for remark in remarks:
            found.setdefault(remark, []).append(name)
        deepest = max(deepest, remarks.get("deep", 0))
        if unreadable or len(sizes) > 1:
            images = images[:0]  # the rest is only looked through for what else is wrong
            continue
        if images.shape[1:3] != pixels.shape[:2]:
            images = np.empty((count, *pixels.shape[:2], 3 if pixels.ndim == 3 else 1), np.uint8)
        if pixels.ndim == 3 and images.shape[3] == 1:
            images = np.repeat(images, 3, axis=3)
        images[k] = pixels if pixels.ndim == 3 else pixels[..., None]
    if unreadable:
        names = "; ".join(unreadable[:3] + ["..."] * (len(unreadable) > 3))
        raise UserError(
            printable(f"{source}: cannot read {len(unreadable):,} of {count:,} images: {names}")
        )
    if len(sizes) > 1:
        usual = max(sizes, key=lambda s: len(sizes[s]))
        odd = {names[0]: s for s, names in sizes.items() if s != usual}
        text = f"{count - len(sizes[usual]):,} of {count:,} are not {usual[0]}x{usual[1]}"
        names = ", ".join(f"{n} is {h}x{w}" for n, (h, w) in list(odd.items())[:3])
        message = f"{source}: images differ in size (height x width): {text}: {names}"
        raise UserError(f"{printable(message)}; --resize N makes all of them NxN")
    if found.get("deep") and deepest < 4096:
        message = f"{source}: 16-bit images of which none is brighter than {deepest} of 65535 "
        raise UserError(f"{message}({printable(found['deep'][0])}): scale them to 8 bits")
    lines = [f"{len(n):,} {REMARKS[r]} (first: {printable(n[0])})" for r, n in found.items()]
    return images, lines
