"""What the stages share: presets, randomness, data, ResNet, Networks, training, run directories.

Copy this file with any one stage and it runs; `csrc/` beside it makes it faster. Section numbers in
comments are those of Paul et al. 2022, "Lottery Tickets on a Data Diet".
"""

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import fcntl
import functools
import glob
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
VERSION = 1  # of the files in a run directory


class UserError(Exception):
    """A mistake of the user's, or a disk that refuses: one line on stderr, exit status 2."""


class NewerVersion(UserError):
    """A file that only a later version of these scripts may touch."""


# ---- presets: Table 1 ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of one data set, each of them a flag; `digits` is ours, the rest Table 1."""

    depth: int
    batch_size: int
    steps: int
    milestones: tuple[int, ...]
    pretrain_lr: float
    rewind: int  # the step at which easy examples suffice: half of the paper's t*
    size: int  # of the subset in Figure 2
    levels: int
    subset: str = "easy"
    networks: int = 10  # K of Definition 2.1
    score_step: int = 7800
    lr: float = 0.1
    width: int = 16
    momentum: float = 0.9
    weight_decay: float = 1e-4
    pad: int = 4
    flip: bool = True


PRESETS = {
    "digits": Preset(
        8, 64, 600, (300, 450), 0.1, 20, 256, 8, networks=4, score_step=60, pad=1, flip=False
    ),
    "cifar10": Preset(20, 128, 62400, (31200, 46800), 0.4, 200, 3200, 20),
    "cifar100": Preset(32, 128, 62400, (31200, 46800), 0.4, 400, 2048, 20),
    "cinic10": Preset(56, 256, 31250, (15625, 23440), 0.1, 400, 51200, 12, score_step=8000),
}


# ---- randomness ----------------------------------------------------------------------------------

SCORERS = 1 << 16  # scoring network k is replicate SCORERS + k: no network that IMP prunes
PURPOSES = ("init", "order", "augment", "subset", "noise", "sample")
WORD = 0xFFFFFFFF  # 32 bits


def seeds(seed: int, purpose: str, replicate: int = 0, child: int = 0) -> np.random.SeedSequence:
    """The root of one random stream: (seed, replicate, child, purpose), nothing global."""
    return np.random.SeedSequence([seed, replicate, child, PURPOSES.index(purpose)])


def generator(seed: int, purpose: str, replicate: int = 0, child: int = 0) -> np.random.Generator:
    """A NumPy generator for draws that are made once: initialisation, subsets, label noise."""
    return np.random.default_rng(seeds(seed, purpose, replicate, child))


def philox_key(seed: int, purpose: str, replicate: int = 0, child: int = 0) -> tuple[int, int]:
    """Two 32-bit words that key `philox` for draws made at every step: data order, augmentation."""
    k0, k1 = seeds(seed, purpose, replicate, child).generate_state(2, np.uint32)
    return int(k0), int(k1)


def philox(key: Tensor | tuple[int, int], counter: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011): key (2,) and counter (..., 4) int64 that hold 32-bit
    words -> (..., 4) int64 random words. The same on every device, and in csrc/math.h."""
    k0, k1 = key[0], key[1]
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products: wrap-around keeps every bit
        c0, c1 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD
        c2, c3 = (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return torch.stack([c0, c1, c2, c3], -1)


# ---- the four operations that csrc/ fuses: their definitions -------------------------------------


def fused(definition: Any) -> Any:
    """Calls the compiled form of `definition` where csrc/ is there and built, else `definition`."""

    @functools.wraps(definition)
    def call(*args, **kwargs):
        ops = csrc_ops()
        return (
            getattr(ops, definition.__name__)(*args, **kwargs)
            if ops
            else definition(*args, **kwargs)
        )

    call.definition = definition
    return call


@functools.cache
def csrc_ops() -> Any:
    """`torch.ops.datadiet`, or None without csrc/ or without a compiler."""
    try:
        import csrc
    except ImportError:
        return None
    return csrc.load()


@fused
def masked_sgd_(
    weights: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    mask: Tensor,
    lr: Tensor,
    mu: float,
    weight_decay: float,
    low: Tensor | None = None,
) -> None:
    """One SGD step of every row, in place; pruned weights and their velocities become exactly 0.

    weights, momentum (R, D) float32; gradient (R, D) float32 or bfloat16, zeroed behind the step;
    mask (R, P) bool over the first P <= D columns; lr (1,) or (R,) float32 on the same device; low
    (R, D) bfloat16 receives a rounded copy of the new weights.
    """
    prunable = mask.shape[1]
    lr = lr[:, None]
    step = gradient.to(weights.dtype) + weight_decay * weights
    momentum.mul_(mu).add_(step)
    momentum[:, :prunable].masked_fill_(~mask, 0)
    weights.sub_(lr * momentum)
    weights[:, :prunable].masked_fill_(~mask, 0)
    gradient.zero_()
    if low is not None:
        low.copy_(weights)


@fused
def example_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, 0-1 error and EL2N norm ||softmax - onehot||_2 (Definition 2.1) per example.

    logits (N, C) float, labels (N,) int64 in [0, C) -> three (N,) float32 (float64 for float64
    logits). Ties for the largest logit go to the lowest class; a NaN counts as an error.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = logits.log_softmax(-1)
    picked = labels[:, None]
    loss = -log_p.gather(1, picked)[:, 0]
    wrong = logits.argmax(-1) != labels  # argmax takes the first of equals
    error = wrong | logits.isnan().any(-1)
    residual = log_p.exp().scatter_add(1, picked, torch.full_like(loss, -1.0)[:, None])
    return loss, error.to(loss.dtype), residual.norm(dim=-1)


@fused
def loss_barrier(
    middle: Tensor, first: Tensor, second: Tensor, labels: Tensor, alphas: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Barrier of every example between two networks: loss at (1 - a) first + a second minus the
    same mixture of the losses at the two ends (not clipped), likewise for the 0-1 error.

    middle (A, N, C) logits of the interpolated networks, first and second (N, C) of the ends,
    labels (N,) int64, alphas (A,) float32 -> loss (A, N), error (A, N), and their suprema over a,
    each (N,).
    """
    ends = [example_losses.definition(x, labels)[:2] for x in (first, second)]
    mids = [example_losses.definition(x, labels)[:2] for x in middle]
    a = alphas.to(ends[0][0].dtype)[:, None]
    loss, error = (
        torch.stack([m[i] for m in mids]) - ((1 - a) * ends[0][i] + a * ends[1][i]) for i in (0, 1)
    )
    return loss, error, loss.amax(0), error.amax(0)


@fused
def augment(
    images: Tensor,
    indices: Tensor,
    key: Tensor,
    step: Tensor,
    scale: Tensor,
    shift: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A training batch: random crop out of a border of `pad` black pixels, random flip, normalise.

    images (N, H, W, C) uint8, indices (B,) int64, key (2,) int64 and step (1,) int64 for `philox`
    (slot b of the batch draws from counter (b, step, 0, 0): words 0 and 1 crop, word 2 flips),
    scale and shift (C,) float32 with pixel * scale + shift the normalised value -> (B, C, H, W)
    channels-last, float32 or bfloat16.
    """
    height, width = images.shape[1:3]
    slot = torch.arange(len(indices), device=images.device)
    zero = torch.zeros_like(slot)
    words = philox(key, torch.stack([slot, step.expand_as(slot), zero, zero], -1))
    up, left = (words[:, :2] * (2 * pad + 1) >> 32).sub_(pad).unbind(-1)
    x = torch.arange(width, device=images.device).expand(len(indices), width)
    if flip:
        x = torch.where((words[:, 2] & 1)[:, None] > 0, width - 1 - x, x)
    x = x + left[:, None]
    y = torch.arange(height, device=images.device) + up[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = images[indices[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return (pixels * scale + shift).to(dtype).permute(0, 3, 1, 2)


# ---- data ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """A data set on the device. Images are (N, H, W, C) uint8, labels (N,) int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    fingerprint: str  # of all pixels and labels
    scale: Tensor  # (C,) float32: pixel * scale + shift has mean 0 and deviation 1
    shift: Tensor  # over the training images
    scores: np.ndarray | None = None  # (N,) by which subsets are ranked


def load_data(name: str, folder: Path, device: torch.device, quiet: bool = False) -> Data:
    """`digits`, `cifar10`, `cifar100`, `cinic10`, or a folder of class folders of images.

    Downloads what it may into `folder`, decodes once and keeps the arrays there. UserError where
    something is missing, unreadable or of another size, by name.
    """
    if name == "digits":
        *arrays, classes = load_digits(folder)
    elif name in ("cifar10", "cifar100"):
        *arrays, classes = load_cifar(name, folder)
    else:
        *arrays, classes = load_images(name, folder, quiet)
    train = arrays[0]
    # Sums through histograms are exact: the same bits on every machine.
    counts = np.array(
        [np.bincount(train[..., c].ravel(), minlength=256) for c in range(train.shape[3])]
    )
    value, total = np.arange(256), counts.sum(1)
    mean = counts @ value / total
    deviation = np.sqrt(np.maximum(counts @ value**2 / total - mean**2, 1e-12))
    scale, shift = 1 / deviation, -mean / deviation
    images, labels, test_images, test_labels = (torch.from_numpy(a).to(device) for a in arrays)
    return Data(
        name if name in PRESETS else Path(name).resolve().name,
        *(images, labels, test_images, test_labels),
        classes,
        fingerprint(*arrays),
        *(torch.tensor(v, dtype=torch.float32, device=device) for v in (scale, shift)),
    )


DIGITS = "abecfd0572dbb442"  # fingerprint of the project's file


def load_digits(folder: Path) -> tuple:
    """UCI optdigits: 1,797 handwritten 8x8 digits; the last 360, by other writers, are the test."""
    path = next((p for p in (folder / "digits.npz", HERE / "data/digits.npz") if p.exists()), None)
    if path is None:
        raise UserError(f"no {folder / 'digits.npz'}: copy the project's there, or give --dataset")
    images, labels = read_npz(path, "images", "labels")
    if fingerprint(images, labels) != DIGITS:
        raise UserError(f"{path} is not the project's digits.npz: put that one there, or remove it")
    images, labels = images[..., None], labels.astype(np.int64)
    return images[:-360], labels[:-360], images[-360:], labels[-360:], [str(c) for c in range(10)]


def load_cifar(name: str, folder: Path) -> tuple:
    """CIFAR through torchvision, which checks the MD5 of every file before it opens it."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        with contextlib.redirect_stdout(sys.stderr), lock(folder / f".{name}.lock", wait=True):
            train, test = (kind(folder, train=t, download=True) for t in (True, False))
    except (OSError, RuntimeError) as e:
        remedy = f"put {kind.filename} (MD5 {kind.tgz_md5}) into {folder}"
        raise UserError(f"cannot get {name} ({one_line(e)}): {remedy}") from e
    arrays = (a for d in (train, test) for a in (d.data, np.array(d.targets)))
    return *arrays, list(train.classes)


CINIC10 = {
    "url": "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
    "md5": "6ee4d0c996905fe93221de577967a372",
}


def load_images(name: str, folder: Path, quiet: bool) -> tuple:
    """NAME/{train,valid,test}/CLASS/IMAGE, or CINIC-10's archive of the same layout, decoded once.

    valid/ joins train/. The arrays are kept in `folder` under a name made from the name, size and
    time of every image, so that changed images are decoded again.
    """
    files = None if name == "cinic10" else list_images(Path(name))
    known = [(f[0], f[1], os.path.basename(f[2]), *f[3:]) for f in files] if files else CINIC10
    stamp = hashlib.sha256(repr(known).encode()).hexdigest()[:12]
    cache = folder / f"{Path(name).resolve().name}-{stamp}.npz"
    keys = ("train_images", "train_labels", "test_images", "test_labels", "classes")
    with lock(folder / f".{cache.stem}.lock", wait=True):
        if cache.exists():
            try:
                *arrays, classes, made_from = read_npz(cache, *keys, "stamp")
                if made_from != stamp:
                    raise UserError(f"{cache} is of other images")
                return *arrays, classes.tolist()
            except UserError as e:
                print(f"{e}: decoding again", file=sys.stderr)
        for left in folder.glob(f".{glob.escape(cache.name)}.*.tmp"):  # by a process that died
            left.unlink()
        *arrays, classes = decode(files or archived_images(folder), quiet)
        arrays_by_key = dict(zip(keys, [*arrays, np.array(classes)], strict=True))
        write(cache, lambda f: np.savez(f, **arrays_by_key, stamp=np.array(stamp)))
    return *arrays, classes


IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


def list_images(root: Path) -> list[tuple]:
    """(split, class, path, bytes, modified) of every image below a folder."""
    if not root.is_dir():
        raise UserError(f"--dataset {root}: neither {', '.join(PRESETS)} nor a folder")
    files = []
    for split in ("train", "valid", "test"):
        if (root / split).is_dir():
            for entry in os.scandir(root / split):
                for f in os.scandir(entry) if entry.is_dir() else ():
                    if os.path.splitext(f.name)[1].lower() in IMAGES:
                        s = f.stat()
                        files.append((split, entry.name, f.path, s.st_size, s.st_mtime_ns))
    for split in ("train", "test"):
        if split not in {f[0] for f in files}:
            raise UserError(f"--dataset {root}: no images in {root / split}/CLASS/")
    return sorted(files)


def archived_images(folder: Path) -> list[tuple]:
    """(split, class, name, content) of every image of CINIC-10, downloaded if need be, checked."""
    from torchvision.datasets.utils import check_integrity, download_url

    path = folder / "CINIC-10.tar.gz"
    try:
        if not path.exists():
            with contextlib.redirect_stdout(sys.stderr):
                download_url(CINIC10["url"], str(folder), path.name, CINIC10["md5"])
    except (OSError, RuntimeError) as e:
        raise UserError(
            f"cannot download CINIC-10 ({one_line(e)}): put {path.name} into {folder}"
        ) from e
    if not check_integrity(str(path), CINIC10["md5"]):
        raise UserError(
            f"{path} is damaged (its MD5 is not {CINIC10['md5']}): remove it, or download it again"
        )
    with tarfile.open(path) as tar:  # read in memory: nothing is unpacked to disk
        named = ((m, m.name.removeprefix("./").split("/")) for m in tar if m.name.endswith(".png"))
        return [(n[0], n[1], n[2], tar.extractfile(m).read()) for m, n in named if len(n) == 3]


def decode(files: list[tuple], quiet: bool) -> tuple:
    """(split, class, name, ...) records -> train and test arrays in class order, class names."""
    from multiprocessing.pool import ThreadPool  # PIL decodes without the interpreter's lock

    classes = sorted({f[1] for f in files})
    if missing := set(classes) - {f[1] for f in files if f[0] != "test"}:
        raise UserError(f"--dataset: class {min(missing)} has test images and no training images")
    files = sorted(files, key=lambda f: (f[0] == "test", f[1], f[0], f[2]))
    gray = decode_image(files[0]).shape[2] == 1
    with (
        ThreadPool(len(os.sched_getaffinity(0))) as pool,
        tqdm(desc="decoding", total=len(files), unit=" images", disable=quiet) as bar,
    ):
        images = []
        for image in pool.imap(functools.partial(decode_image, gray=gray), files, chunksize=64):
            if images and image.shape != images[0].shape:
                name, size = files[len(images)][2], "x".join(map(str, image.shape[1::-1]))
                raise UserError(f"--dataset: images differ in size: {name} is {size}")
            images.append(image)
            bar.update()
    labels = np.array([classes.index(f[1]) for f in files])
    images, cut = np.stack(images), sum(f[0] != "test" for f in files)
    return images[:cut], labels[:cut], images[cut:], labels[cut:], classes


def decode_image(file: tuple, gray: bool | None = None) -> np.ndarray:
    """(H, W, 1 or 3) uint8 of a (split, class, path[, content]) record; `gray` None: as it is."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file[3]) if isinstance(file[3], bytes) else file[2]) as image:
            gray = image.mode in ("1", "L") if gray is None else gray
            pixels = np.asarray(image.convert("L" if gray else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"--dataset: cannot read the image {file[2]}: {one_line(e)}") from e
    return pixels.reshape(*pixels.shape[:2], -1)


# ---- which examples a row trains on --------------------------------------------------------------


def noisy_labels(data: Data, fraction: float, seed: int) -> Tensor:
    """Training labels of which ceil(fraction N) are redrawn uniformly over all classes, their own
    included (Section 3.2); depends on the seed alone. (N,) int64."""
    labels = data.train_labels.clone()
    if fraction:
        draw = generator(seed, "noise")
        picked = draw.permutation(len(labels))[: math.ceil(Fraction(str(fraction)) * len(labels))]
        fresh = draw.integers(len(data.classes), size=len(picked))
        labels[torch.from_numpy(picked)] = torch.from_numpy(fresh).to(labels.device)
    return labels


def rank_by_class(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`order` rearranged so that the first of every class come first, then the second, ..."""
    rank = np.empty(len(order), np.int64)
    for c in np.unique(labels):
        rank[labels[order] == c] = np.arange((labels == c).sum())
    return order[np.lexsort((labels[order], rank))]


def choose_subset(args: argparse.Namespace, data: Data, labels: Tensor, replicate: int) -> Tensor:
    """Sorted indices (M,) of --subset, --size, --offset, --balance. Random ones are class-balanced
    and differ by replicate; easy and hard ones are the ends of the ranking, ties by index."""
    y = labels.cpu().numpy()
    if args.subset == "all":
        order = np.arange(len(y))
    elif args.subset == "random":
        draw = generator(args.seed, "subset", replicate)
        shuffled = draw.permutation(len(y))
        order = rank_by_class(shuffled, y)
        whole = args.size - args.size % len(data.classes)  # what is over goes to random classes
        order = np.concatenate([order[:whole], draw.permutation(order[whole:])])
    else:
        ranking = data.scores if args.subset == "easy" else -data.scores.astype(np.float64)
        order = np.argsort(ranking, kind="stable")
        order = rank_by_class(order, y) if args.balance else order
    first = args.offset if args.subset in ("easy", "hard") else 0
    size = len(y) if args.subset == "all" else args.size
    return torch.from_numpy(np.sort(order[first : first + size])).to(labels.device)


def read_scores(args: argparse.Namespace, data: Data) -> np.ndarray:
    """The scores of --scores (N,), checked against the data; made by `el2n.py` where none exist."""
    path = Path(args.scores) if args.scores else scores_path(args, data)
    about = path.with_suffix(".json")
    if not args.scores and not (path.exists() and about.exists()):
        try:
            import el2n
        except ImportError as e:
            raise UserError(
                f"--subset {args.subset} needs scores: no {path}; give --scores FILE"
            ) from e
        el2n.main(el2n.arguments(args))
    try:
        scores = read_npy(path)
        told = read_json(about, "metric") if about.exists() else {}
    except NewerVersion:
        raise
    except UserError as e:
        remedy = "" if args.scores else ": el2n.py --fresh makes the scores again"
        raise UserError(f"--scores {e}{remedy}") from e
    n = len(data.train_labels)
    if scores.shape != (n,) or scores.dtype.kind not in "fiu":
        told = f"{scores.dtype} {scores.shape}"
        raise UserError(f"--scores {path}: {told}, but {data.name} has {n} training images")
    if np.isnan(scores).any():
        raise UserError(f"--scores {path}: example {np.isnan(scores).argmax()} has no score (NaN)")
    if told and told.get("sha256_of_scores") != fingerprint(scores):
        raise UserError(
            f"--scores {path}: damaged, its checksum in {about.name} differs: el2n.py --fresh "
            "makes EL2N scores again"
        )
    if told and told.get("data") != data.fingerprint:
        raise UserError(f"--scores {path}: made from other data than {data.name}")
    noise = [args.label_noise, args.seed if args.label_noise else 0]
    if told and told.get("label_noise", noise) != noise:
        raise UserError(f"--scores {path}: made under other labels (--label-noise, --seed)")
    if not args.scores and told.get("made_with") != scores_settings(args):
        remedy = "el2n.py --fresh makes these"
        raise UserError(f"--scores {path}: those of other settings, put there by hand: {remedy}")
    return scores


SCORES_KEYS = ("batch_size", "lr", "momentum", "weight_decay", "pad", "flip")
SCORES_KEYS += ("networks", "score_step")


def scores_settings(args: argparse.Namespace) -> dict:
    """What EL2N scores depend on, beside data, labels and the precision they were made in."""
    keys = ("depth", "width", "seed", *SCORES_KEYS)
    return {k: getattr(args, k, getattr(PRESETS[args.preset], k, None)) for k in keys}


def write_scores(
    folder: Path,
    scores: np.ndarray,
    labels: Tensor,
    args: argparse.Namespace,
    data: Data,
    **more: Any,
) -> None:
    """scores.npy, (N,) float32 of the training examples under `labels`, and scores.json with what
    they were made from and `more`."""
    y = labels.cpu().numpy()
    by_class = {c: float(scores[y == k].mean()) for k, c in enumerate(data.classes)}
    told = {
        **more,
        "data": data.fingerprint,
        "label_noise": [args.label_noise, args.seed if args.label_noise else 0],
        "sha256_of_scores": fingerprint(scores),
        "classes_from_easy_to_hard": sorted(data.classes, key=by_class.get),
        "mean_by_class": by_class,
    }
    write(folder / "scores.npy", lambda f: np.save(f, scores))
    write_json(folder / "scores.json", told)


def scores_path(args: argparse.Namespace, data: Data) -> Path:
    """Where `el2n.py` leaves EL2N scores; what they do not depend on is not in the name."""
    name = run_name(args, "el2n", keys=SCORES_KEYS)
    return args.out / "el2n" / model_name(args, data) / name / "scores.npy"


# ---- ResNet (He et al. 2016, for small images) ---------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-(6n+2): three groups of n blocks, `width`, 2 `width` and 4 `width` channels wide."""

    def __init__(self, depth: int, width: int, channels: int, classes: int):
        super().__init__()
        n = (depth - 2) // 6
        conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        blocks = [Block(width, width, 1) for _ in range(n)]
        for k in (1, 2):
            blocks += [Block(width << (k - 1), width << k, 2)]
            blocks += [Block(width << k, width << k, 1) for _ in range(n - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def initialise(module: nn.Module, draw: np.random.Generator) -> None:
    """Kaiming normal conv and linear weights; BatchNorm scales U[0, 1) and shifts 0, as the authors
    have it; linear biases as torch has them."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fan_in = m.weight[0].numel()
            assign(m.weight, draw.standard_normal(m.weight.shape) * math.sqrt(2 / fan_in))
            if m.bias is not None:
                assign(m.bias, draw.uniform(-1, 1, m.bias.shape) / math.sqrt(fan_in))
        elif isinstance(m, nn.BatchNorm2d):
            assign(m.weight, draw.uniform(0, 1, m.weight.shape))
            assign(m.bias, np.zeros(m.bias.shape))
            assign(m.running_mean, np.zeros(m.bias.shape))
            assign(m.running_var, np.ones(m.bias.shape))


@torch.no_grad()
def assign(tensor: Tensor, value: np.ndarray) -> None:
    tensor.copy_(torch.from_numpy(value))


# ---- networks as rows ----------------------------------------------------------------------------


def padded(n: int) -> int:
    return -(-n // 128) * 128  # rows start on 256 bytes: no kernel is chosen by a row's place


class Networks:
    """R networks of one architecture, each a row of a few matrices.

    weights, momentum, gradient (R, D) float32, prunable weights (conv and linear) in the first P
    columns; mask (R, P) bool, True where a weight is alive; batchnorm (R, B) float32 running
    statistics; diverged (R,) int64, the step at which the loss stopped being finite, or -1.
    `modules[r]` is an ordinary nn.Module whose parameters, gradients and buffers view row r.
    """

    def __init__(self, model: nn.Module, rows: int, device: torch.device):
        kinds = (nn.Conv2d, nn.Linear)
        named = [
            (m, k, p) for m in model.modules() for k, p in m._parameters.items() if p is not None
        ]
        prunable = [isinstance(m, kinds) and k == "weight" for m, k, _ in named]
        sizes = [p.numel() for *_, p in named]
        stats = [b.numel() for m in model.modules() for b in m._buffers.values() if is_statistic(b)]
        self.weights = torch.zeros(rows, padded(sum(sizes)), device=device)
        self.momentum = torch.zeros_like(self.weights)
        self.gradient = torch.zeros_like(self.weights)
        count = sum(n for n, p in zip(sizes, prunable, strict=True) if p)
        self.mask = torch.ones(rows, count, dtype=torch.bool, device=device)
        self.batchnorm = torch.zeros(rows, padded(sum(stats)), device=device)
        self.low: Tensor | None = None
        self.diverged = torch.full((rows,), -1, device=device)
        self.layers: dict[str, slice] = {}  # name -> columns, prunable layers only
        self.template = model
        self.modules = [self.view(r) for r in range(rows)]

    def view(self, row: int, low: bool = False) -> nn.Module:
        """A module whose tensors are views of a row; with `low`, conv and linear parameters are
        views of `self.low`."""
        module = copy.deepcopy(self.template).to(self.weights.device)
        tail, head, stat = self.mask.shape[1], 0, 0
        for name, m in module.named_modules():
            matters = isinstance(m, nn.Conv2d | nn.Linear)
            for key, p in m._parameters.items():
                if p is None:
                    continue
                if matters and key == "weight":
                    columns, head = slice(head, head + p.numel()), head + p.numel()
                    self.layers[name] = columns
                else:
                    columns, tail = slice(tail, tail + p.numel()), tail + p.numel()
                matrix = self.low if low and matters else self.weights
                q = nn.Parameter(shaped(matrix[row, columns], p.shape))
                if not low:
                    q.grad = shaped(self.gradient[row, columns], p.shape)
                m._parameters[key] = q
            for key, b in m._buffers.items():
                if is_statistic(b):
                    m._buffers[key] = self.batchnorm[row, stat : stat + b.numel()].view(b.shape)
                    stat += b.numel()
            if isinstance(m, nn.BatchNorm2d):
                m._buffers["num_batches_tracked"] = None  # its momentum is fixed, so nothing counts
        return module

    def lowered(self) -> list[nn.Module]:
        """Modules that compute in bfloat16, BatchNorm in float32, on a copy of the weights `low`
        (R, D) that the update writes anew at every step, so that no step casts."""
        self.low = self.weights.bfloat16()
        return [self.view(r, low=True) for r in range(self.rows)]

    @property
    def rows(self) -> int:
        return len(self.weights)

    def get(self, rows: slice) -> dict[str, Tensor]:
        """Copies on the CPU of the state of some rows: all that a step reads and writes."""
        return {k: getattr(self, k)[rows].cpu().clone() for k in STATE}

    def snapshot(self, row: int) -> dict[str, Tensor]:
        """What a trained network is, on the CPU: weights (D,) and BatchNorm statistics (B,)."""
        return {k: getattr(self, k)[row].cpu().clone() for k in ("weights", "batchnorm")}

    def put(self, rows: slice, state: dict[str, Tensor]) -> None:
        for k in STATE:
            getattr(self, k)[rows] = state[k].to(self.weights.device)

    def rewind(self, row: int, start: dict, mask: Tensor | None = None) -> None:
        """Row `row` becomes w_tr under a mask: weights and BatchNorm of `start`, no velocity."""
        self.mask[row] = True if mask is None else mask.to(self.mask.device)
        self.weights[row] = start["weights"].to(self.weights.device)
        self.weights[row, : self.mask.shape[1]].masked_fill_(~self.mask[row], 0)
        self.batchnorm[row] = start["batchnorm"].to(self.weights.device)
        self.momentum[row], self.gradient[row], self.diverged[row] = 0, 0, -1


STATE = ("weights", "momentum", "batchnorm", "diverged")


def is_statistic(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point()


def shaped(row: Tensor, shape: torch.Size) -> Tensor:
    """A part of a row as a parameter; conv weights lie as (out, kh, kw, in): channels-last."""
    if len(shape) != 4:
        return row.view(shape)
    out, channels, kh, kw = shape
    return row.view(out, kh, kw, channels).permute(0, 3, 1, 2)


# ---- training and evaluation ---------------------------------------------------------------------


@dataclasses.dataclass
class Stream:
    """What one row trains on: the labels (N,), the training examples it may draw (M,), and the
    keys of its data order and of its augmentation."""

    labels: Tensor
    indices: Tensor
    order: tuple[int, int]
    augment: Tensor


def make_stream(
    args: argparse.Namespace,
    data: Data,
    replicate: int,
    child: int = 0,
    indices: Tensor | None = None,
    labels: Tensor | None = None,
) -> Stream:
    """The stream of a replicate: all training data unless `indices` and `labels` say otherwise.
    Children of one replicate differ in order and augmentation and in nothing else."""
    device = data.train_images.device
    return Stream(
        data.train_labels if labels is None else labels,
        torch.arange(len(data.train_labels), device=device) if indices is None else indices,
        philox_key(args.seed, "order", replicate, child),
        torch.tensor(philox_key(args.seed, "augment", replicate, child), device=device),
    )


@functools.lru_cache(maxsize=32)
def permutation(key: tuple[int, int], epoch: int, n: int, device: torch.device) -> Tensor:
    """A random order of n examples, the same on every device: argsort of 63-bit Philox draws."""
    i = torch.arange(n, device=device)
    counter = torch.stack(
        [i, torch.full_like(i, epoch), torch.zeros_like(i), torch.zeros_like(i)], -1
    )
    words = philox(key, counter)
    return (words[:, 0] << 31 | words[:, 1] >> 1).argsort(stable=True)


def batch_indices(stream: Stream, first: int, last: int, batch_size: int) -> Tensor:
    """Batches of steps [first, last): (last - first, batch_size) indices of training examples. A
    fresh permutation each pass; what is left of a pass after its last full batch is dropped."""
    n = len(stream.indices)
    per_pass = n // batch_size
    passes = range(first // per_pass, (last - 1) // per_pass + 1)
    orders = [permutation(stream.order, e, n, stream.indices.device) for e in passes]
    batches = torch.cat([o[: per_pass * batch_size].view(per_pass, batch_size) for o in orders])
    skip = passes.start * per_pass
    return stream.indices[batches[first - skip : last - skip]]


def step_schedule(lr: float, milestones: tuple[int, ...]) -> Callable[[int], float]:
    """Divides the rate by 10 at each milestone, from the update with that 0-based index on."""
    return lambda step: lr * 0.1 ** sum(step >= m for m in milestones)


@functools.cache
def forward_loss(engine: str) -> Callable:
    """(module, images (B, C, H, W), labels (B,)) -> mean cross-entropy, logits (B, classes)."""

    def forward(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = module(x)
        return F.cross_entropy(logits.float(), y), logits

    if engine == "eager":
        return forward
    from torch._inductor import config

    # Without the option kernels are chosen by timing them, and another start may choose otherwise.
    options = {"deterministic": True} if hasattr(config, "deterministic") else None
    compiled = torch.compile(forward, dynamic=False, options=options)

    def call(*batch) -> tuple[Tensor, Tensor]:
        nonlocal compiled
        try:
            return compiled(*batch)
        except Exception as e:  # whatever a compiler fails with costs speed only
            recording = batch[1].is_cuda and torch.cuda.is_current_stream_capturing()
            if compiled is forward or recording or isinstance(e, torch.OutOfMemoryError):
                raise
            print(f"torch.compile failed, going on eagerly: {one_line(e)}", file=sys.stderr)
            compiled = forward
            return forward(*batch)

    return call


Watch = Callable[[Networks, Tensor, dict[int, Tensor], dict[int, Tensor]], None]


@dataclasses.dataclass
class Training:
    """Rows that train side by side from step `start` to step `stop` at the rate `lr_at(step)`.

    `at` names steps to report at. `watch(networks, step, indices, logits)` is called between
    backward and update, the latter two by row; tensors of its own, rows first, go into `extra`.
    """

    args: argparse.Namespace
    data: Data
    networks: Networks
    streams: list[Stream]
    start: int
    stop: int
    lr_at: Callable[[int], float]
    at: frozenset[int] = frozenset()
    watch: Watch | None = None
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Captured:
    """A function of nothing but the device's state, as a CUDA graph: called three times to warm
    up, then recorded, then replayed, each call a step that counts. Runs on as it is where it cannot
    be recorded."""

    failed: ClassVar[list] = []  # torch 2.11's allocator goes on asking a graph that failed

    def __init__(self, function: Callable[[], None]):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self) -> None:
        if self.calls == 3:
            torch.cuda.synchronize()
            try:
                graph = torch.cuda.CUDAGraph()
                # The outer context puts the stream back where a failed capture does not.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, capture_error_mode="thread_local"),
                ):
                    self.function()
                self.graph = graph
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self.failed.append(graph)
                print(f"CUDA graph failed, going on without: {one_line(e)}", file=sys.stderr)
        self.calls += 1
        if self.graph:
            return self.graph.replay()
        with beside(torch.cuda.Stream()) as stream:  # warming up on the main one is not allowed
            self.function()
        torch.cuda.current_stream().wait_stream(stream)


@contextlib.contextmanager
def beside(stream: Any) -> Iterator[Any]:
    """Puts work on another stream, after what the current one has in hand; None: nothing new."""
    if stream is None:
        yield None
    else:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream


Leaves = list[tuple[list[Tensor], list[Tensor]]]  # parameters, where their gradients go


def leaves_by_type(module: nn.Module, full: nn.Module) -> Leaves:
    """The parameters of `module`, by type, with the gradients of its float32 twin: gradients of one
    type are copied in one launch."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for p, q in zip(module.parameters(), full.parameters(), strict=True):
        parameters, places = groups.setdefault(p.dtype, ([], []))
        parameters.append(p)
        places.append(q.grad)
    return list(groups.values())


def backward(loss: Tensor, leaves: Leaves) -> None:
    gradients = list(torch.autograd.grad(loss, [p for group, _ in leaves for p in group]))
    for _, places in leaves:
        torch._foreach_copy_(places, gradients[: len(places)])
        del gradients[: len(places)]


def train(t: Training, start: int | None = None) -> Iterator[int]:
    """Takes one masked SGD step of every row after the other; yields the number of steps done at
    each step of `t.at` and now and then between.

    A row whose loss stops being finite is left where it is (`networks.diverged`). A step reads and
    writes the device's memory only (its number, rate and batches lie in tables there) and never
    waits for it, so that a CUDA graph of one step is every step. In a graph the rows are parallel
    branches.
    """
    args, networks, streams = t.args, t.networks, t.streams
    images, scaling = t.data.train_images, (t.data.scale, t.data.shift, args.pad, args.flip)
    step, device = t.start if start is None else start, networks.weights.device
    cuda, graph = device.type == "cuda", args.engine == "graph"
    longest = 128 if cuda else 16
    compute = forward_loss(args.engine)
    low = args.precision == "bf16"
    modules = networks.lowered() if low else networks.modules
    dtype = torch.bfloat16 if low else torch.float32
    leaves = [leaves_by_type(*pair) for pair in zip(modules, networks.modules, strict=True)]
    rates = [t.lr_at(s) for s in range(t.start, t.stop)]
    rates = torch.tensor(rates, dtype=torch.float32, device=device)
    batches = torch.zeros(networks.rows, longest, args.batch_size, dtype=torch.int64, device=device)
    place = torch.zeros(1, dtype=torch.int64, device=device)  # in the table of batches
    now = torch.full((1,), step, device=device)
    branches = [torch.cuda.Stream() if graph else None for _ in streams]

    def one_step(active: list[int]) -> None:
        chosen, seen = {}, {}
        for r in active:
            with beside(branches[r]):
                indices = batches[r].index_select(0, place)[0]
                x = augment(images, indices, streams[r].augment, now, *scaling, dtype)
                loss, logits = compute(modules[r], x, streams[r].labels[indices])
                backward(loss, leaves[r])
                chosen[r], seen[r] = indices, logits.detach()
                finite = loss.detach().isfinite() | (networks.diverged[r] >= 0)
                networks.diverged[r] = torch.where(finite, networks.diverged[r], now[0])
        for r in active if graph else ():
            torch.cuda.current_stream().wait_stream(branches[r])
        if t.watch:
            t.watch(networks, now, chosen, seen)
        rate = rates.index_select(0, now - t.start)
        matrices = networks.weights, networks.momentum, networks.gradient, networks.mask
        masked_sgd_(*matrices, rate, args.momentum, args.weight_decay, networks.low)
        place.add_(1)
        now.add_(1)

    active, pending = None, collections.deque()
    while step < t.stop:
        end = min([t.stop, step + longest, *(s for s in t.at if s > step)])
        # On a GPU the table of the next steps is made while the last ones still run: what has
        # diverged is then known a table later, and the host sleeps instead of waiting in a loop.
        flags = networks.diverged
        if cuda:
            copied = torch.empty_like(flags, device="cpu", pin_memory=True)
            pending.append(
                (copied.copy_(flags, non_blocking=True), torch.cuda.Event(blocking=True))
            )
            pending[-1][1].record()
            flags, event = pending.popleft() if len(pending) > 1 else pending[0]
            event.synchronize()
        well = [r for r, diverged in enumerate(flags.tolist()) if diverged < 0]
        if well != active:
            active, take = well, functools.partial(one_step, well)
            take = Captured(take) if graph else take
        for r in active:
            batches[r, : end - step] = batch_indices(streams[r], step, end, args.batch_size)
        place.zero_()
        signals.training = True
        while step < end and not signals.number:
            take()
            step += 1
        signals.training = False
        if cuda and step == t.stop:
            torch.cuda.synchronize()  # the clocks of the callers stop here
        yield step
    networks.low = None


def normalise(data: Data, images: Tensor) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32, channels-last, unaugmented."""
    return (images * data.scale + data.shift).permute(0, 3, 1, 2)


@torch.inference_mode()
def predict(networks: Networks, data: Data, images: Tensor) -> Tensor:
    """Logits (R, N, classes) float32 of unaugmented images (N, H, W, C) uint8, BatchNorm in eval
    mode (running statistics)."""
    logits, batch_size = [], 1000 if images.is_cuda else 100  # what a CPU's caches hold
    for module in networks.modules:
        module.eval()
        for x in images.split(batch_size):
            logits.append(module(normalise(data, x)))
        module.train()
    return torch.cat(logits).view(networks.rows, len(images), -1)


def evaluate(
    networks: Networks, data: Data, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, 0-1 error and EL2N norm, each (R, N), of every row on every example."""
    rows = [example_losses(row, labels) for row in predict(networks, data, images)]
    loss, error, norm = (torch.stack(x) for x in zip(*rows, strict=True))
    return loss, error, norm


def accuracy(networks: Networks, data: Data) -> list[float]:
    """Test accuracy of every row, a fraction."""
    _, error, _ = evaluate(networks, data, data.test_images, data.test_labels)
    return (error == 0).double().mean(1).tolist()


# ---- files: whole or not at all, and checked when read -------------------------------------------


def write(path: Path, fill: Callable[[io.BufferedWriter], Any]) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as e:  # by the name that a user knows
        raise OSError(e.errno, e.strerror or one_line(e), str(path)) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fingerprint(*values: Any) -> str:
    """sha256 (first 16 hex digits) of arrays, tensors and plain values, by content."""
    h = hashlib.sha256()
    for v in values:
        if isinstance(v, Tensor):
            v = v.detach().cpu().contiguous().numpy()
        if isinstance(v, np.ndarray):
            h.update(f"{v.dtype}{v.shape}".encode())
            h.update(np.ascontiguousarray(v).view(np.uint8).data)
        else:
            h.update(json.dumps(v, sort_keys=True).encode())
    return h.hexdigest()[:16]


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values as a .pt that `torch.load(weights_only=True)` reads."""
    checked = state | {"version": VERSION, "sha256": fingerprint(*flat(state))}
    buffer = io.BytesIO()
    torch.save(checked, buffer)
    write(path, lambda f: f.write(buffer.getbuffer()))


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote; UserError if it is not that, whole."""
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        told, version = state.pop("sha256"), int(state.pop("version"))
        values = list(flat(state))
        if sum(v.nbytes for v in values if isinstance(v, Tensor)) > path.stat().st_size:
            raise ValueError("tensors larger than the file")
        intact = told == fingerprint(*values)
    except Exception as e:  # whatever a damaged or hostile file provokes
        raise UserError(f"{path} is damaged or not one of ours ({one_line(e)[:80]})") from e
    check_version(path, version)
    if not intact:
        raise UserError(f"{path} is damaged (its checksum differs)")
    return state


def check_version(path: Path, version: int) -> None:
    if version > VERSION:
        told = f"was written by a newer version of these scripts ({version}, this is {VERSION})"
        raise NewerVersion(f"{path} {told}: use that one, or another --out")


def flat(state: Any) -> Iterator[Any]:
    """Keys and values of nested dicts, in order."""
    for k, v in state.items():
        yield k
        yield from flat(v) if isinstance(v, dict) else (v,)


def write_json(path: Path, value: dict) -> None:
    checked = {"version": VERSION, **value}
    text = json.dumps({**checked, "sha256": fingerprint(checked)}, indent=1, allow_nan=False)
    write(path, lambda f: f.write(text.encode() + b"\n"))


def read_json(path: Path, *keys: str) -> dict:
    """What `write_json` wrote, with these keys; UserError if it is not that, whole."""
    try:
        value = json.loads(path.read_bytes())
        told, version = value.pop("sha256"), int(value["version"])
        intact = told == fingerprint(value)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({one_line(e)})") from e
    check_version(path, version)
    if not intact:
        raise UserError(f"{path} is damaged (its checksum differs)")
    if lacking := [k for k in keys if k not in value]:
        raise UserError(f"{path} is another file, without {lacking[0]}")
    return value


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy; UserError if it is not that, whole. Nothing is unpickled."""
    if not path.is_file():
        raise UserError(f"{path}: No such file" if not path.exists() else f"{path}: no file")
    try:
        array = np.load(path, allow_pickle=False)
        array.shape  # an .npz has none  # noqa: B018
    except Exception as e:  # numpy, zipfile and tokenize have an exception each for damage
        raise UserError(f"{path} is not an .npy, or damaged ({one_line(e)})") from e
    return array


def read_npz(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz, whose zip checksums are verified; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return [f[n] for n in names]
    except Exception as e:  # zipfile, zlib and numpy have an exception each for damage
        raise UserError(f"{path} is damaged ({one_line(e)})") from e


def unless_damaged(read: Callable[[], Any]) -> Any:
    """What `read` gives; None, with a line on stderr, where it raises UserError for a file that
    can be made again."""
    try:
        return read()
    except NewerVersion:
        raise
    except UserError as e:
        print(f"{e}: left aside", file=sys.stderr)
        return None


def one_line(e: BaseException | str) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds `path` for this process alone; it falls with the process, however that ends. UserError
    says who has it, or waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        f = open(path, "a+", errors="replace")  # noqa: SIM115
    except OSError:
        if os.access(path.parent, os.W_OK):
            raise
        yield  # a folder to read from: nothing in it can change
        return
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            f.seek(0)
            holder = one_line(f.read(200)) if path.stat().st_size else "another process"
            if not wait:
                raise UserError(f"{path.parent} is in use by {holder}") from e
            print(f"waiting for {path.parent}: in use by {holder}", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as e:  # some file systems of clusters have no locks
            told = f"{path.parent}: no locks ({e.strerror}); make sure that one process works on it"
            print(told, file=sys.stderr)
        f.truncate(0)
        f.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
        f.flush()
        yield


# ---- run directories -----------------------------------------------------------------------------


class Run:
    """A run directory, held by this process: config, tensors, checkpoint, log, result. `seconds` is
    what the phase in progress has taken, over all processes that worked on it."""

    def __init__(
        self, folder: Path, replicate: int, settings: dict, here: dict, fresh: bool = False
    ):
        self.folder, self.replicate, self.seconds = folder, replicate, 0.0
        self.ended: str | None = None  # why it cannot go on
        self.held = contextlib.ExitStack()
        # Others need the scores that a process is making, and wait for them; a run is one's own.
        self.held.enter_context(lock(folder / ".lock", wait=settings["replicate"] is None))
        try:
            # config.json goes last: as long as another file is there, so is what it was made with.
            for path in sorted(folder.iterdir(), key=lambda p: p.name == "config.json"):
                if path.name != ".lock" and (fresh or path.suffix == ".tmp"):
                    path.unlink()
            self.enter(settings, here)
        except BaseException:
            self.held.close()
            raise

    def enter(self, settings: dict, here: dict) -> None:
        """Compares the settings with those the folder was made with, or writes them down."""
        path, settings = self.folder / "config.json", json.loads(json.dumps(settings))
        if not path.exists():
            self.config = {"settings": settings, "environments": [here]}
            return write_json(path, self.config)
        try:
            whole = read_json(path, "settings", "environments")
            self.config = {k: whole[k] for k in ("settings", "environments")}
        except NewerVersion:
            raise
        except UserError as e:
            raise UserError(f"{e}: --fresh starts the run over") from e
        then, before = self.config["settings"], self.config["environments"][-1]
        if differ := sorted(k for k in then | settings if then.get(k) != settings.get(k)):
            told = ", ".join(f"{k} {then.get(k)}, now {settings.get(k)}" for k in differ)
            remedy = "--fresh starts it over, --out keeps both"
            raise UserError(f"{self.folder} holds a run of other settings ({told}): {remedy}")
        if differ := sorted(k for k in before | here if before.get(k) != here.get(k)):
            told = ", ".join(f"{k} {before.get(k)}, now {here.get(k)}" for k in differ)
            print(f"{self.folder}: {told}; what is left may differ in bits", file=sys.stderr)
            self.config["environments"].append(here)
            write_json(path, self.config)

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def identity(self, name: str) -> str:
        """What a file of this name holds in this run, so that no other is taken for it."""
        return fingerprint(self.config["settings"], name.replace("-before", ""))

    def save(self, name: str, state: dict[str, Any]) -> None:
        write_tensors(self.folder / name, {**state, "run": self.identity(name)})

    def load(self, name: str) -> dict[str, Any] | None:
        """A file of this run, or None, with a line on stderr, if it is missing, damaged or of
        another run or level."""

        def read() -> dict[str, Any]:
            state = read_tensors(self.folder / name)
            if state.pop("run", None) != self.identity(name):
                raise UserError(f"{self.folder / name} is another run's, or was renamed")
            return state

        return unless_damaged(read) if self.has(name) else None

    def checkpoint(self, phase: str, step: int, state: dict[str, Any]) -> None:
        """Saves the state inside a phase; the one before is kept against damage."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            os.replace(path, self.folder / "checkpoint-before.pt")
        self.save(path.name, {"phase": phase, "step": step, "seconds": self.seconds, **state})

    def resume(self, phase: str) -> dict[str, Any] | None:
        """The last good checkpoint of a phase."""
        for name in ("checkpoint.pt", "checkpoint-before.pt"):
            state = self.load(name)
            if state and state["phase"] == phase:
                return state
        return None

    def log(self, phase: str, step: int, **values: Any) -> None:
        """One row of log.csv; a row of the same phase and step is replaced."""
        path, rows = self.folder / "log.csv", {}
        if path.exists():
            try:
                with open(path, newline="") as f:
                    rows = {(r["phase"], r["step"]): r for r in csv.DictReader(f, strict=True)}
                if any(None in r or None in r.values() for r in rows.values()):
                    raise ValueError("a row of another length")
            except (ValueError, LookupError, csv.Error) as e:
                print(f"{path} is damaged ({one_line(e)}): begun anew", file=sys.stderr)
                rows = {}
        rows[phase, str(step)] = {"phase": phase, "step": step, **values}
        out = io.StringIO()
        names = list(dict.fromkeys(k for r in rows.values() for k in r))
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write(path, lambda f: f.write(out.getvalue().encode()))

    def pretraining(self) -> dict[str, Any]:
        """What result.json says of w_tr."""
        start = self.load("pretrained.pt")
        return {k: start[k] for k in ("step", "test_accuracy", "fingerprint", "seconds")}

    def adopt(self, start: dict[str, Any]) -> None:
        """Takes another run's w_tr as its own; UserError if it has a different one."""
        mine = self.load("pretrained.pt")
        if mine and mine["fingerprint"] != start["fingerprint"]:
            raise UserError(f"{self.folder} began from another w_tr: --fresh starts it over")
        self.save("pretrained.pt", start)

    @property
    def result(self) -> dict | None:
        """result.json, or None where there is none, or it is damaged or another run's."""
        path = self.folder / "result.json"

        def read() -> dict:
            value = read_json(path, "config")
            if value["config"]["settings"] != self.config["settings"]:
                raise UserError(f"{path} is another run's")
            return value

        return unless_damaged(read) if path.exists() else None

    def finish(self, result: dict) -> Path:
        """Writes result.json, whose presence means done."""
        for name in ("checkpoint.pt", "checkpoint-before.pt"):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / "result.json", {"config": self.config, **result})
        return self.folder / "result.json"


def environment(args: argparse.Namespace) -> dict:
    """What the bits of a result depend on, beside the settings."""
    git = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    cuda = args.device.type == "cuda"
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "engine": args.engine,
        "csrc": csrc_ops() is not None,
    }


# ---- training that can be stopped ----------------------------------------------------------------


class Signals:
    """SIGINT and SIGTERM: training stops after the step in hand and saves itself; anything else,
    and a step of over four seconds, is left at once. Exit status 128 + signal, by convention."""

    number, training = 0, False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        again, self.number = self.number, self.number or number
        if again or not self.training:
            raise SystemExit(128 + self.number)
        signal.setitimer(signal.ITIMER_REAL, 4)


signals = Signals()


def fit(
    t: Training,
    runs: list[Run],
    phase: str,
    progress: tqdm,
    observe: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains to the end, with checkpoints, from where the runs' last checkpoint of `phase` stands.

    The rows of `t` belong to the runs in equal parts. `observe(step)` is called at each step of
    `t.at`, `t.start` included: once or, after a resume, again.
    """
    networks, share = t.networks, t.networks.rows // len(runs)
    parts = [slice(i * share, (i + 1) * share) for i in range(len(runs))]
    step, began = t.start, time.perf_counter()
    for run, rows in zip(runs, parts, strict=True):
        run.seconds = 0.0
        if saved := run.resume(phase):
            step, run.seconds = saved["step"], saved["seconds"]
            networks.put(rows, saved["networks"])
            for k, v in t.extra.items():
                v[rows] = saved["extra"][k].to(v.device)
    before, saved_at = [run.seconds for run in runs], began
    progress.set_description(phase)
    skip(progress, (step - t.start) * networks.rows)
    if step in t.at:
        observe(step)
    for done in train(t, step):
        progress.update((done - step) * networks.rows)
        step, now = done, time.perf_counter()
        for run, seconds in zip(runs, before, strict=True):
            run.seconds = seconds + now - began
        if signals.number or now - saved_at > t.args.checkpoint_every:
            for run, rows in zip(runs, parts, strict=True):
                extra = {k: v[rows].cpu().clone() for k, v in t.extra.items()}
                run.checkpoint(phase, step, {"networks": networks.get(rows), "extra": extra})
            saved_at = now
        if signals.number:
            raise SystemExit(128 + signals.number)
        if step in t.at:
            observe(step)
    # The last update may be the one that goes wrong, and no loss is taken after it.
    whole = networks.weights.isfinite().all(1) & networks.batchnorm.isfinite().all(1)
    networks.diverged[~whole & (networks.diverged < 0)] = t.stop


def skip(progress: tqdm, steps: int) -> None:
    """Steps that an earlier process took: done, but no measure of speed."""
    if not progress.disable:
        progress.initial += steps
        progress.update(steps)


def side_by_side(runs: list[Run], phase: str) -> list[list[Run]]:
    """Runs that stand at the same step of a phase: these train together."""
    groups: dict[int, list[Run]] = {}
    for run in runs:
        saved = run.resume(phase)
        groups.setdefault(saved["step"] if saved else -1, []).append(run)
    return list(groups.values())


def pretrain(
    args: argparse.Namespace,
    data: Data,
    runs: list[Run],
    progress: tqdm,
    track: Callable[[Training, list[Run]], Callable[[int], None] | None] = lambda t, runs: None,
) -> None:
    """Stage 2 (Section 3): pretrained.pt, w_tr of every run that lacks it: the initialisation after
    --rewind steps at --pretrain-lr on the subset. `track(training, runs)` may set what a training
    reports and watches, and returns its observer."""
    todo = [run for run in runs if run.load("pretrained.pt") is None]
    skip(progress, args.rewind * (len(runs) - len(todo)))
    labels = noisy_labels(data, args.label_noise, args.seed)
    for group in side_by_side(todo, "pretrain"):
        networks = Networks(make_model(args, data), len(group), args.device)
        streams = []
        for run, module in zip(group, networks.modules, strict=True):
            initialise(module, generator(args.seed, "init", run.replicate))
            indices = choose_subset(args, data, labels, run.replicate)
            streams.append(make_stream(args, data, run.replicate, 0, indices, labels))
        constant = step_schedule(args.pretrain_lr, ())
        training = Training(args, data, networks, streams, 0, args.rewind, constant)
        observe = track(training, group) or (lambda step: None)
        fit(training, group, "pretrain", progress, observe)
        test_accuracy = accuracy(networks, data)
        for r, run in enumerate(group):
            w, diverged = networks.snapshot(r), networks.diverged[r].item()
            about = {
                "step": args.rewind,
                "data": data.fingerprint,
                "network": [args.depth, args.width],
                "diverged": diverged,
                "test_accuracy": test_accuracy[r] if diverged < 0 else None,
                "seconds": run.seconds,
                "tracked": {k: v[r].cpu().clone() for k, v in training.extra.items()},
            }
            run.save("pretrained.pt", {**w, "fingerprint": fingerprint(*w.values()), **about})
    for run in runs:
        if (step := run.load("pretrained.pt")["diverged"]) >= 0:
            run.ended = (
                f"pre-training diverged at step {step}: lower --pretrain-lr ({args.pretrain_lr:g})"
            )


def read_start(
    flag: str, path: Path, args: argparse.Namespace, data: Data, replicate: int, rewind: int | None
) -> dict:
    """w_tr from a pretrained.pt, or from rep<k>/pretrained.pt in a folder, checked to fit the data,
    the network and, unless None, the step `rewind`; `args.rewind` becomes its step."""
    path = path / f"rep{replicate}" / "pretrained.pt" if path.is_dir() else path
    start = read_tensors(path)
    if not {"weights", "batchnorm", "step", "data", "network"} <= start.keys():
        raise UserError(f"{flag} {path}: not a pretrained.pt")
    here = {"data": data.fingerprint, "network": [args.depth, args.width]}
    for key, value in here.items():
        if start[key] != value:
            raise UserError(f"{flag} {path}: its {key} is {start[key]}, this run's {value}")
    if rewind not in (None, start["step"]):
        raise UserError(f"--rewind {rewind}: {path} was trained for {start['step']} steps")
    if start["diverged"] >= 0:
        raise UserError(f"{flag} {path}: diverged at step {start['diverged']}")
    if start["step"] >= args.steps:
        raise UserError(f"{flag} {path}: trained to step {start['step']} of --steps {args.steps}")
    args.rewind = start["step"]
    return start


# ---- flags ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)

    def parse_args(self, *words) -> argparse.Namespace:
        args = super().parse_args(*words)
        if getattr(args, "subset", None) in ("all", "random"):
            for flag in ("offset", "balance"):
                if getattr(args, flag):
                    self.error(f"--{flag} goes with --subset easy or hard")
        if max(getattr(args, "replicate", (0,))) >= SCORERS:
            self.error(f"--replicate {args.replicate[-1]}: at most {SCORERS - 1}")
        return args


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable:
    """An argparse type: a finite number in [low, high] (or (low, high])."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high or (low == value and not open_low)) or value == math.inf:
            above = "above" if open_low else "at least"
            limit = f" and at most {high:g}" if high < math.inf else ""
            name = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {above} {low:g}{limit}")
        return value

    return parse


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers and ranges: "0-3", "0,2", "31200,46800"."""
    values = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not 0 < len(span) <= 1000:
                raise ValueError
            values += span
    except ValueError:
        values = []
    if not values or sorted(set(values)) != values:
        raise argparse.ArgumentTypeError(f"{text!r} is not an ascending list like 0-3 or 0,2")
    return tuple(values)


positive, whole = number(int, 1, 10**9), number(int, 0, 10**9)
FLAGS = {
    "shared": [
        (
            "dataset",
            str,
            "digits",
            f"{', '.join(PRESETS)}, or a folder: train/CLASS/*, test/CLASS/*",
        ),
        ("preset", str, None, f"settings of another data set: {', '.join(PRESETS)}"),
        ("data-dir", Path, Path("data"), "where data are kept"),
        ("out", Path, Path("results"), "where results go"),
        ("depth", number(int, 1, 1202), None, "of the ResNet, 6n+2"),
        ("width", number(int, 1, 1024), None, "channels of its first group"),
        ("steps", positive, None, "of a whole training, pre-training included"),
        ("batch-size", positive, None, "examples a step"),
        ("lr", number(float, 0, 1e6, True), None, "learning rate"),
        ("momentum", number(float, 0, 1), None, "of SGD"),
        ("weight-decay", number(float, 0, 1e6), None, "of all parameters"),
        ("milestones", numbers, None, "steps at which the rate drops tenfold"),
        ("pad", number(int, 0, 1024), None, "black border that random crops reach into, pixels"),
        ("seed", number(int, 0, 2**32 - 1), 0, "of everything random"),
        ("device", str, "auto", "auto, cpu, cuda, cuda:1"),
        ("checkpoint-every", number(float, 0), 60.0, "seconds"),
    ],
    "replicate": [("replicate", numbers, (0,), "replicates, trained side by side: 0-3, 0,2")],
    "noise": [
        ("label-noise", number(float, 0, 1), 0.0, "of pre-training and scores: part redrawn")
    ],
    "subset": [
        ("size", positive, None, "examples in the subset"),
        ("offset", whole, 0, "examples of the ranking to skip"),
        ("scores", Path, None, "scores as .npy (default: EL2N, made if missing)"),
    ],
    "rewind": [
        ("rewind", whole, None, "t_r, the steps of pre-training"),
        ("pretrain-lr", number(float, 0, 1e6, True), None, "its constant learning rate"),
    ],
}


def flags(description: str, *groups: str) -> Parser:
    """A parser with the shared flags and the named groups of `FLAGS`. Where a default is None, the
    preset of the data set gives it."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = {f.name for f in dataclasses.fields(Preset)}
    for group in ("shared", *groups):
        for name, kind, default, told in FLAGS[group]:
            by = "the preset's" if name.replace("-", "_") in preset else default
            told += "" if by is None else f" [{by}]"
            parser.add_argument(f"--{name}", type=kind, default=default, help=told)
    told, switch = "random horizontal flips [the preset's]", argparse.BooleanOptionalAction
    parser.add_argument("--flip", action=switch, default=None, help=told)
    parser.add_argument("--engine", choices=("auto", "eager", "compiled", "graph"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--fresh", action="store_true", help="start the run's folder over")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    if "subset" in groups:
        kinds = ("all", "random", "easy", "hard")
        parser.add_argument("--subset", choices=kinds, help="to pre-train on [the preset's: easy]")
        parser.add_argument("--balance", action="store_true", help="easy or hard within each class")
    return parser


def prepare(args: argparse.Namespace, data: Data | None = None) -> Data:
    """Loads the data unless given, fills `args` from the preset, refuses what cannot work, finds
    scores."""
    if getattr(args, "subset", None) == "all" and args.size:
        raise UserError("--size goes with --subset random, easy or hard")
    if args.preset not in (None, *PRESETS):
        raise UserError(f"--preset {args.preset}: not one of {', '.join(PRESETS)}")
    args.device = find_device(args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: {e.strerror}") from e
    data = data or load_data(args.dataset, args.data_dir, args.device, args.quiet)
    n, height, width, _ = data.train_images.shape
    own = args.dataset if args.dataset in PRESETS else None
    args.preset = args.preset or own or ("cifar10" if height == width == 32 else "digits")
    for name, value in vars(PRESETS[args.preset]).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    if (args.depth - 2) % 6 or args.depth < 8:
        raise UserError(f"--depth {args.depth}: a ResNet has 8, 14, 20, ... (6n+2) layers")
    if args.batch_size > n:
        raise UserError(f"--batch-size {args.batch_size}: {data.name} has {n} training images")
    if getattr(args, "rewind", None) == 0:
        args.subset, args.label_noise = "all", 0.0  # nothing is trained on them
    if hasattr(args, "rewind") and args.rewind >= args.steps:
        raise UserError(
            f"--rewind {args.rewind}: not before the end of training (--steps {args.steps})"
        )
    if getattr(args, "subset", "all") != "all":
        if args.size < args.batch_size:
            raise UserError(
                f"--size {args.size}: smaller than a batch (--batch-size {args.batch_size})"
            )
        if args.offset + args.size > n:
            window = f"--size {args.size}" + f" from --offset {args.offset}" * bool(args.offset)
            raise UserError(f"{window}: {data.name} has {n} training images")
    # Compiling takes half a minute and saves a third of each step: worth it from about 800 steps of
    # ResNet-20 on 128 images of 32x32. One training decides, whatever else the command does, so
    # that a run that is extended or resumed keeps its engine.
    work = args.steps * args.batch_size * height * width * args.depth
    cuda = args.device.type == "cuda"
    if args.engine == "auto":
        args.engine = "graph" if cuda else "compiled" if work > 2e9 else "eager"
    if args.engine == "graph" and not cuda:
        raise UserError(f"--engine graph needs a CUDA device, not {args.device}")
    if args.precision == "auto":
        args.precision = "bf16" if cuda else "fp32"
    set_numerics(args.precision)
    if getattr(args, "subset", "all") in ("easy", "hard"):
        data.scores = read_scores(args, data)
    return data


def set_numerics(precision: str) -> None:
    """cuDNN gives the same bits each time. fp32 is float32 throughout; beside training in bf16 the
    convolutions of an evaluation, on float32 weights, round their factors to TF32 (11 bits)."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = precision == "bf16"


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs go to the current one
        torch.zeros(1, device=device).item()  # the device "meta" has no values
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {one_line(e)}") from e


def make_model(args: argparse.Namespace, data: Data) -> nn.Module:
    return ResNet(args.depth, args.width, data.train_images.shape[3], len(data.classes))


def model_name(args: argparse.Namespace, data: Data) -> str:
    wide = f"x{args.width}" if args.width != PRESETS[args.preset].width else ""
    return f"{data.name}-resnet{args.depth}{wide}"


SHORT = {
    "steps": "steps",
    "milestones": "drops",
    "batch_size": "batch",
    "lr": "lr",
    "momentum": "momentum",
    "weight_decay": "decay",
    "pad": "pad",
    "flip": "flip",
    "pretrain_lr": "prelr",
    "networks": "networks",
    "score_step": "step",
}


def run_name(args: argparse.Namespace, *parts: str, keys: Iterable[str] = SHORT) -> str:
    """A folder's name: what the run is about, then every setting that is not the preset's."""
    preset, told = PRESETS[args.preset], list(parts)
    for key in keys:
        value = getattr(args, key, getattr(preset, key))
        if value != getattr(preset, key):
            told.append(SHORT[key] + "+".join(f"{v:g}" for v in np.atleast_1d(value)))
    if getattr(args, "label_noise", 0):
        told.append(f"noise{args.label_noise:g}")
    return "-".join(told + ([f"seed{args.seed}"] if args.seed else []))


def subset_name(args: argparse.Namespace) -> str:
    """easy3200, easy3200+1000 (an offset), hard512balanced, all."""
    if args.subset == "all":
        return "all"
    offset = f"+{args.offset}" if args.offset else ""
    name = f"{args.subset}{args.size}{offset}" + "balanced" * args.balance
    about = Path(args.scores).with_suffix(".json") if args.scores else None
    if args.subset == "random" or about is None:
        return name
    told = read_json(about, "metric") if about.exists() else {"metric": Path(args.scores).stem}
    by = f"-{told['metric']}{told.get('rewind', '')}"  # lmc800: children spawned at step 800
    return name + ("" if by == "-el2n" else by)


def settings_of(args: argparse.Namespace, data: Data, *more: str) -> dict:
    """What a run's numbers depend on: config.json holds it, and another such run is refused."""
    keys = ("depth", "width", "steps", "batch_size", "lr", "momentum", "weight_decay", "milestones")
    keys += ("pad", "flip", "seed", "precision", *more)
    settings = {k: getattr(args, k) for k in keys}
    if "subset" in more:
        used = ("size", "offset", "balance") if args.subset != "all" else ()
        settings |= {k: getattr(args, k) for k in used}
        settings["scores"] = None if data.scores is None else fingerprint(data.scores)
    return {"dataset": data.name, "data": data.fingerprint, **settings}


@contextlib.contextmanager
def open_runs(
    args: argparse.Namespace, data: Data, stage: str, name: str, settings: dict
) -> Iterator[list[Run]]:
    """The run directories of all replicates (or the one of a stage without), made or resumed, and
    locked until the end."""
    folder, here = args.out / stage / model_name(args, data) / name, environment(args)
    with contextlib.ExitStack() as held:
        runs = []
        for r in getattr(args, "replicate", [None]):
            place = folder if r is None else folder / f"rep{r}"
            runs.append(Run(place, r or 0, settings | {"replicate": r}, here, args.fresh))
            held.enter_context(runs[-1].held)
        yield runs


def report(runs: list[Run]) -> None:
    """Prints where the results are; UserError, now that all is done, for runs that ended early."""
    for run in runs:
        print(run.folder / "result.json")
    if ended := [
        f"replicate {r.replicate}: {r.result['ended']}" for r in runs if r.result["ended"]
    ]:
        raise UserError("; ".join(ended))


def progress_bar(args: argparse.Namespace, steps: int) -> tqdm:
    """Counts network-steps over the whole command: rate, phase, time left."""
    return tqdm(total=steps, unit=" steps", smoothing=0.02, disable=args.quiet, dynamic_ncols=True)


def mean_std(values: list[float], digits: int = 4) -> str:
    """ "0.9132 ± 0.0021" (sample deviation), or the value alone."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def run_stage(main: Callable[[argparse.Namespace], Any], parser: Parser) -> None:
    """The command line around a `main`: one line and status 2 for what the user can mend."""
    signals.install()
    try:
        main(parser.parse_args())
    except UserError as e:
        problem = str(e)
    except OSError as e:
        problem = f"{e.filename or 'a file'}: {e.strerror or one_line(e)}"
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and "memory" not in str(e):
            raise
        remedy = "a smaller --batch-size, --width, or fewer networks side by side"
        problem = f"not enough memory ({one_line(e)}): {remedy}"
    else:
        return
    print(f"{parser.prog}: error: {' '.join(problem.split())}", file=sys.stderr)
    sys.exit(2)
