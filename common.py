"""What the stages share: presets, randomness, data, scores, ResNet, networks as rows, training.

Copy this file and runs.py with any one stage and it runs; `csrc/` beside them makes it faster.
Section numbers in comments are those of Paul et al. 2022, "Lottery Tickets on a Data Diet".
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import math
import os
import platform
import re
import shutil
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

import runs
from runs import (
    Parser,
    Run,
    UserError,
    count,
    fingerprint,
    number,
    numbers,
    one_line,
    positive,
    signals,
    skip,
    warn,
)

HERE = Path(__file__).resolve().parent

# ---- presets: Table 1 ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of one data set, each of them a flag; `digits` is ours, the rest Table 1, but
    for K and step of EL2N (Appendix A) and the levels (Figure 2)."""

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
REINIT = 1 << 17  # the other initialisation of replicate k is that of replicate REINIT + k
PURPOSES = ("init", "order", "augment", "subset", "noise", "sample", "shuffle")
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
    words -> (..., 4) int64 random words. The same on every device."""
    k0, k1 = key[0], key[1]
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products: wrap-around keeps every bit
        c0, c1 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD
        c2, c3 = (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return torch.stack([c0, c1, c2, c3], -1)


def draw_crops(
    key: tuple[int, int], first: int, last: int, batch: int, pad: int, flip: bool, device
) -> Tensor:
    """The augmentation of steps [first, last): (last - first, batch, 3) int64 of up and left, the
    corner of a random crop out of a border of `pad` pixels, in [-pad, pad], and 1 for a flip. Slot
    b of step s draws from the Philox counter (b, s, 0, 0)."""
    slot = torch.arange(batch, device=device).expand(last - first, -1)
    step = torch.arange(first, last, device=device)[:, None].expand_as(slot)
    zero = torch.zeros_like(slot)
    words = philox(key, torch.stack([slot, step, zero, zero], -1))
    corner = (words[..., :2] * (2 * pad + 1) >> 32) - pad
    return torch.cat([corner, words[..., 2:3] & int(flip)], -1)


# ---- the operations that csrc/ fuses: their definitions ------------------------------------------

DEFINITIONS: dict[str, Callable] = {}


def fused(definition: Callable) -> Callable:
    """Calls the compiled form of `definition` where csrc/ is there and built, else `definition`."""
    name = definition.__name__
    DEFINITIONS[name] = definition

    @functools.wraps(definition)
    def call(*args, **kwargs):
        return getattr(operations(), name)(*args, **kwargs)

    call.definition = definition
    return call


@functools.cache
def operations() -> Any:
    """A namespace of the operations: compiled, or as defined without csrc/ or a compiler."""
    try:
        import csrc
    except ImportError:
        return argparse.Namespace(**DEFINITIONS)
    return csrc.load(DEFINITIONS) or argparse.Namespace(**DEFINITIONS)


def are_compiled() -> bool:
    return operations().masked_sgd_ is not DEFINITIONS["masked_sgd_"]


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

    weights, momentum, gradient (R, D) float32, the gradient zeroed behind the step; mask (R, P)
    bool over the first P <= D columns; lr (1,) float32 on the same device; low (R, D) bfloat16
    receives a rounded copy of the new weights.
    """
    prunable = mask.shape[1]
    momentum.mul_(mu).add_(gradient + weight_decay * weights)
    momentum[:, :prunable].masked_fill_(~mask, 0)
    weights.sub_(lr * momentum)
    weights[:, :prunable].masked_fill_(~mask, 0)
    gradient.zero_()
    if low is not None:
        low.copy_(weights)


@fused
def example_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, 0-1 error and EL2N norm ||softmax - onehot||_2 (Definition 2.1) per example.

    logits (N, C) float32, labels (N,) int64 in [0, C) -> three (N,) float32. Ties for the largest
    logit go to the lowest class; a NaN counts as an error.
    """
    log_p = logits.log_softmax(-1)
    picked = labels[:, None]
    loss = -log_p.gather(1, picked)[:, 0]
    wrong = logits.argmax(-1) != labels  # argmax takes the first of equals
    error = wrong | logits.isnan().any(-1)
    residual = log_p.exp().scatter_add(1, picked, torch.full_like(loss, -1.0)[:, None])
    return loss, error.to(loss.dtype), residual.norm(dim=-1)


@fused
def loss_barrier(
    middle: Tensor, first: Tensor, second: Tensor, labels: Tensor, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Barrier of every example between two networks: the loss at (1 - alpha) first + alpha second
    minus the same mixture of the losses at the two ends (not clipped), likewise for the 0-1 error.

    middle, first, second (N, C) float32 logits of the interpolated network and of the ends, labels
    (N,) int64 -> loss (N,), error (N,).
    """
    ends = [example_losses.definition(x, labels)[:2] for x in (first, second)]
    a = torch.tensor(alpha, dtype=middle.dtype, device=middle.device)
    at_middle = example_losses.definition(middle, labels)[:2]
    loss, error = (m - ((1 - a) * x + a * y) for m, x, y in zip(at_middle, *ends, strict=True))
    return loss, error


@fused
def augment(
    images: Tensor,
    indices: Tensor,
    crops: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A training batch: cropped out of a black border, flipped, normalised.

    images (N, H, W, C) uint8, indices (B,) int64, crops (B, 3) int64 of `draw_crops`, scale and
    shift (C,) float32 with pixel * scale + shift the normalised value -> (B, C, H, W)
    channels-last, float32 or bfloat16.
    """
    height, width = images.shape[1:3]
    up, left, mirrored = crops.unbind(-1)
    x = torch.arange(width, device=images.device).expand(len(indices), width)
    x = torch.where(mirrored[:, None] > 0, width - 1 - x, x) + left[:, None]
    y = torch.arange(height, device=images.device) + up[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = images[indices[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return (pixels * scale + shift).to(dtype).permute(0, 3, 1, 2)


@fused
def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """BatchNorm in training mode, plus `residual`, then ReLU: y (N, C, H, W).

    x, residual and y (N, C, H, W) float32 or bfloat16, weight, bias and the running statistics
    (C,) float32, the latter two updated in place.
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


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
    arrays = [np.ascontiguousarray(a) for a in arrays]  # torchvision's CIFAR is a transposed view
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
        with contextlib.redirect_stdout(sys.stderr), runs.lock(folder / f".{name}.lock", wait=True):
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


def extract_cinic10(folder: Path) -> Path:
    """The folder of CINIC-10's images, downloaded if need be, its MD5 checked, unpacked."""
    from torchvision.datasets.utils import download_and_extract_archive

    root = folder / "CINIC-10"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            download_and_extract_archive(download_root=folder, extract_root=root, **CINIC10)
    except (OSError, RuntimeError, tarfile.TarError) as e:
        remedy = f"put CINIC-10.tar.gz (MD5 {CINIC10['md5']}) into {folder}"
        raise UserError(f"cannot get cinic10 ({one_line(e)}): {remedy}") from e
    return root


def load_images(name: str, folder: Path, quiet: bool) -> tuple:
    """NAME/{train,valid,test}/CLASS/IMAGE, or CINIC-10's archive of the same layout, decoded once.

    valid/ joins train/. The arrays are kept in `folder` under a name made from the name, size and
    time of every image (for CINIC-10 from its MD5), so that changed images are decoded again.
    """
    files = None if name == "cinic10" else list_images(Path(name))
    known = [(f[0], f[1], os.path.basename(f[2]), *f[3:]) for f in files] if files else CINIC10
    stamp = hashlib.sha256(repr(known).encode()).hexdigest()[:12]
    cache = folder / f"{Path(name).resolve().name}-{stamp}.npz"
    keys = ("train_images", "train_labels", "test_images", "test_labels", "classes")
    with runs.lock(folder / f".{cache.stem}.lock", wait=True):
        if cache.exists():
            try:
                *arrays, classes, made_from = read_npz(cache, *keys, "stamp")
                if made_from != stamp:
                    raise UserError(f"{cache} is of other images")
                return *arrays, classes.tolist()
            except UserError as e:
                warn(f"{e}: decoding again")
        for left in folder.glob(f".{glob.escape(cache.name)}.*.tmp"):  # by a process that died
            left.unlink()
        *arrays, classes = decode(files or list_images(extract_cinic10(folder)), quiet)
        if not files:
            shutil.rmtree(folder / "CINIC-10")  # 270,000 small files
        arrays_by_key = dict(zip(keys, [*arrays, np.array(classes)], strict=True))
        runs.write(cache, lambda f: np.savez(f, **arrays_by_key, stamp=np.array(stamp)))
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


def decode(files: list[tuple], quiet: bool) -> tuple:
    """Records of `list_images` -> train and test arrays in class order, class names."""
    from multiprocessing.pool import ThreadPool  # PIL decodes without the interpreter's lock

    classes = sorted({f[1] for f in files})
    if missing := set(classes) - {f[1] for f in files if f[0] != "test"}:
        raise UserError(f"--dataset: class {min(missing)} has test images and no training images")
    files = sorted(files, key=lambda f: (f[0] == "test", f[1], f[0], f[2]))
    paths = [f[2] for f in files]
    read = functools.partial(decode_image, gray=decode_image(paths[0]).shape[2] == 1)
    with ThreadPool(len(os.sched_getaffinity(0))) as pool:
        decoded = pool.imap(read, paths, chunksize=64)
        images = list(tqdm(decoded, "decoding", len(paths), unit=" images", disable=quiet))
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            size = "x".join(map(str, image.shape[1::-1]))
            raise UserError(f"--dataset: images differ in size: {path} is {size}")
    labels = np.array([classes.index(f[1]) for f in files])
    images, cut = np.stack(images), sum(f[0] != "test" for f in files)
    return images[:cut], labels[:cut], images[cut:], labels[cut:], classes


def decode_image(path: str, gray: bool | None = None) -> np.ndarray:
    """(H, W, 1 or 3) uint8 of an image file; `gray` None: as it is."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            gray = image.mode in ("1", "L") if gray is None else gray
            pixels = np.asarray(image.convert("L" if gray else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"--dataset: cannot read the image {path}: {one_line(e)}") from e
    return pixels.reshape(*pixels.shape[:2], -1)


def read_npz(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz, whose zip checksums are verified; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return [f[n] for n in names]
    except Exception as e:  # zipfile, zlib and numpy have an exception each for damage
        raise UserError(f"{path} is damaged ({one_line(e)})") from e


# ---- which examples a row trains on --------------------------------------------------------------


def noisy_labels(data: Data, fraction: float, seed: int) -> Tensor:
    """Training labels of which ceil(fraction N) are redrawn uniformly over all classes, their own
    included (Section 3, Appendix A); depends on the seed alone. (N,) int64."""
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
        even = args.size - args.size % len(data.classes)  # what is over goes to random classes
        order = np.concatenate([order[:even], draw.permutation(order[even:])])
    else:
        ranking = data.scores if args.subset == "easy" else -data.scores.astype(np.float64)
        order = np.argsort(ranking, kind="stable")
        order = rank_by_class(order, y) if args.balance else order
    first = args.offset if args.subset in ("easy", "hard") else 0
    size = len(y) if args.subset == "all" else args.size
    return torch.from_numpy(np.sort(order[first : first + size])).to(labels.device)


# ---- scores --------------------------------------------------------------------------------------

SCORE_KEYS = ("batch_size", "lr", "momentum", "weight_decay", "pad", "flip")
SCORE_KEYS += ("networks", "score_step")


def scoring(args: argparse.Namespace) -> argparse.Namespace:
    """The settings under which a stage's EL2N scores are made: its own, but Table 1's where the
    stage as such departs from it, as warmup does."""
    table1, own = vars(PRESETS[args.preset]), vars(args.defaults)
    same = {k: getattr(args, k) for k in table1 if hasattr(args, k) and own[k] == table1[k]}
    values = {**vars(args), **table1, **same, "defaults": PRESETS[args.preset]}
    return argparse.Namespace(**values)


def scores_path(args: argparse.Namespace) -> Path:
    """Where EL2N scores lie; what they do not depend on is not in the name."""
    args = scoring(args)
    return run_folder(args, "el2n", run_name(args, "el2n", keys=SCORE_KEYS)) / "scores.npy"


def score_settings(args: argparse.Namespace) -> dict:
    """What EL2N scores depend on, beside data, labels and the precision they were made in."""
    args = scoring(args)
    return {k: getattr(args, k) for k in ("depth", "width", "seed", *SCORE_KEYS)}


def save_scores(
    folder: Path,
    each: np.ndarray,
    labels: Tensor,
    args: argparse.Namespace,
    data: Data,
    **about: Any,
) -> None:
    """scores.npy, (N,) float32, the mean over rows of `each` (K, N) for the training examples under
    `labels`, and scores.json with what they were made from and `about`."""
    scores, y = each.mean(0, dtype=np.float64).astype(np.float32), labels.cpu().numpy()
    if not np.isfinite(scores).all():
        raise UserError(f"scores are not finite: lower --lr ({args.lr:g})")
    by_class = {c: float(scores[y == k].mean()) for k, c in enumerate(data.classes)}
    about |= {
        "data": data.fingerprint,
        "label_noise": [args.label_noise, args.seed if args.label_noise else 0],
        "sha256_of_scores": fingerprint(scores),
        "classes_from_easy_to_hard": sorted(data.classes, key=by_class.get),
        "mean_by_class": by_class,
    }
    runs.write_array(folder / "scores.npy", scores)
    runs.write_json(folder / "scores.json", about)


def make_scores(
    args: argparse.Namespace,
    data: Data,
    name: str,
    settings: dict,
    score: Callable[["Training", Run], Tensor],
    milestones: tuple[int, ...] = (),
    count_events: Callable[["Training"], None] = lambda t: None,
) -> Path:
    """Scores by `settings["metric"]`, made in the run folder `name` unless they are there; their
    path. The K networks of Definition 2.1 train side by side for --score-step steps, and
    `score(training, run)` gives theirs (K, N)."""
    with open_runs(args, "el2n", name, settings, [None]) as [run]:
        if run.result is None or not run.has("scores.npy") or not run.has("scores.json"):
            labels = noisy_labels(data, args.label_noise, args.seed)
            networks = Networks(make_model(args, data), args.networks, args.device)
            streams = []
            for k in range(args.networks):
                networks.load(k, fresh_state(args, data, SCORERS + k))
                streams.append(make_stream(args, data, SCORERS + k, labels=labels))
            schedule = step_schedule(args.lr, milestones)
            training = Training(args, data, networks, streams, 0, args.score_step, schedule)
            count_events(training)
            with runs.progress_bar(args.score_step * args.networks, args.quiet) as progress:
                fit(training, [run], settings["metric"], progress)
            for k, step in enumerate(networks.diverged.tolist()):
                if step >= 0:
                    problem = f"network {k} diverged at step {step}"
                    raise UserError(f"{problem}: lower --lr ({args.lr:g})")
            about = {k: settings[k] for k in ("metric", "networks", "score_step")}
            about["made_with"] = score_settings(args)
            each = score(training, run).cpu().numpy()
            save_scores(run.folder, each, labels, args, data, **about)
            run.finish({"scores": "scores.npy", "seconds": run.seconds, "ended": None})
        about = runs.read_json(run.folder / "scores.json", "metric")
    order = " ".join(about["classes_from_easy_to_hard"])
    made = f"{about['metric']} of {data.name}, {about['networks']} networks"
    print(f"{made}; from easy to hard: {order}")
    return run.folder / "scores.npy"


def make_el2n(args: argparse.Namespace, data: Data) -> Path:
    """EL2N scores (Definition 2.1, Appendix A), made unless they are there; their path."""
    args = scoring(args)
    settings = settings_of(args, data, "networks", "score_step", "label_noise")
    del settings["steps"], settings["milestones"]  # networks early in training: no matter how long

    def score(t: Training, run: Run) -> Tensor:
        return evaluate(t.networks, data, data.train_images, t.streams[0].labels)[2]

    name = scores_path(args).parent.name
    return make_scores(args, data, name, settings | {"metric": "el2n"}, score)


def read_scores(args: argparse.Namespace, data: Data) -> np.ndarray:
    """The scores of --scores (N,), checked against the data; EL2N, made if missing, without."""
    path, remedy = args.scores, ""
    if not path:
        path, remedy = scores_path(args), ": el2n.py --fresh makes the scores again"
        if not (path.exists() and path.with_suffix(".json").exists()):
            make_el2n(args, data)
    beside = path.with_suffix(".json")
    try:
        scores = runs.read_npy(path)
        about = runs.read_json(beside, "metric") if beside.exists() else {}
    except runs.FormatError:
        raise
    except UserError as e:
        raise UserError(f"--scores {e}{remedy}") from e
    n, noise = len(data.train_labels), [args.label_noise, args.seed if args.label_noise else 0]
    problem = None
    if scores.shape != (n,) or scores.dtype.kind not in "fiu":
        problem = f"{scores.dtype} {scores.shape}, but {data.name} has {n} training images"
    elif np.isnan(scores).any():
        problem = f"example {np.isnan(scores).argmax()} has no score (NaN)"
    elif about and about.get("sha256_of_scores") != fingerprint(scores):
        problem = f"damaged, its checksum in {beside.name} differs{remedy}"
    elif about and about.get("data") != data.fingerprint:
        problem = f"made from other data than {data.name}"
    elif about and about.get("label_noise", noise) != noise:
        problem = "made under other labels (--label-noise, --seed)"
    elif not args.scores and about.get("made_with") != score_settings(args):
        problem = f"those of other settings, put there by hand{remedy}"
    if problem:
        raise UserError(f"--scores {path}: {problem}")
    return scores


# ---- ResNet (He et al. 2016, for small images) ---------------------------------------------------


def norm_relu(
    x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """BatchNorm, plus `residual`, then ReLU: in one pass while statistics are being taken."""
    if norm.training and norm.track_running_stats:
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        return batch_norm_relu(x, *tensors, residual, norm.momentum, norm.eps, relu)
    y = norm(x)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


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
        y, residual = norm_relu(self.conv1(x), self.bn1), x
        if isinstance(self.shortcut, nn.Sequential):
            conv, norm = self.shortcut
            residual = norm_relu(conv(x), norm, relu=False)
        return norm_relu(self.conv2(y), self.bn2, residual)


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
        x = norm_relu(self.stem[0](x), self.stem[1])
        return self.head(self.blocks(x).mean((2, 3)))


def fresh_state(args: argparse.Namespace, data: Data, replicate: int) -> dict[str, Tensor]:
    """The initialisation of a replicate, a state_dict: Kaiming normal conv and linear weights,
    BatchNorm scales U[0, 1) and shifts 0, as the authors have it; all else as the module
    initialises itself, from the replicate's stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds(args.seed, "init", replicate).generate_state(1)[0]))
        model = make_model(args, data)
    draw = generator(args.seed, "init", replicate)
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fan_in = m.weight[0].numel()
            assign(m.weight, draw.standard_normal(m.weight.shape) * math.sqrt(2 / fan_in))
            if m.bias is not None:
                assign(m.bias, draw.uniform(-1, 1, m.bias.shape) / math.sqrt(fan_in))
        elif isinstance(m, nn.BatchNorm2d) and m.affine:
            assign(m.weight, draw.uniform(0, 1, m.weight.shape))
            assign(m.bias, np.zeros(m.bias.shape))
    return model.state_dict()


@torch.no_grad()
def assign(tensor: Tensor, value: np.ndarray) -> None:
    tensor.copy_(torch.from_numpy(value))


def check_model(args: argparse.Namespace, data: Data) -> None:
    """UserError, by name, for a module that rows cannot keep exact: one that draws at random in its
    forward pass, has parameters that are not float32, or does not give a logit for each class."""
    model, names = make_model(args, data).train(), []
    for name, p in model.named_parameters():
        if p.dtype != torch.float32:
            raise UserError(f"{name} is {p.dtype}: parameters must be float32")
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        for name, m in model.named_modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None:
                raise UserError(
                    f"{name}: BatchNorm with momentum=None counts its batches; give one"
                )

            def note(module, inputs, output, name=name):
                if not torch.equal(torch.get_rng_state(), state):
                    names.append(f"{name or 'the module'} ({type(module).__name__})")

            m.register_forward_hook(note)
        x = (data.train_images[:2].cpu() * data.scale.cpu() + data.shift.cpu()).permute(0, 3, 1, 2)
        shape = tuple(model(x).shape)
    if names:
        raise UserError(f"{names[0]} draws at random in its forward pass: no exact resume with it")
    if shape != (2, len(data.classes)):
        raise UserError(f"make_model gives {shape} for 2 images of {len(data.classes)} classes")


# ---- networks as rows ----------------------------------------------------------------------------


def padded(n: int) -> int:
    return -(-n // 128) * 128  # rows start on 512 bytes: no kernel is chosen by a row's place


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a parameter or floating buffer of a module lies in a row."""

    name: str
    shape: torch.Size
    columns: slice

    def of(self, row: Tensor) -> Tensor:
        """The part of a row in its own shape; conv weights lie as (out, kh, kw, in):
        channels-last."""
        if len(self.shape) != 4:
            return row[self.columns].view(self.shape)
        out, channels, kh, kw = self.shape
        return row[self.columns].view(out, kh, kw, channels).permute(0, 3, 1, 2)


def slots(tensors: Iterable[tuple[str, Tensor]], start: int = 0) -> list[Slot]:
    places = []
    for name, t in tensors:
        places.append(Slot(name, t.shape, slice(start, start + t.numel())))
        start += t.numel()
    return places


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU."""
    return {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


class Networks:
    """R networks of one architecture, each a row of a few matrices.

    weights, momentum, gradient (R, D) float32, prunable weights (conv and linear) in the first P
    columns; mask (R, P) bool, True where a weight is alive; batchnorm (R, B) float32 running
    statistics and other floating buffers; diverged (R,) int64, the step at which the loss stopped
    being finite, or -1. `modules[r]` is an ordinary nn.Module whose parameters, gradients and
    buffers view row r. Outside the process a network is a state_dict: `state`, `load`.
    """

    def __init__(self, model: nn.Module, rows: int, device: torch.device):
        owners = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        parameters = list(model.named_parameters())
        prunable = slots((n, p) for n, p in parameters if id(p) in owners)
        width = prunable[-1].columns.stop if prunable else 0
        rest = slots(((n, p) for n, p in parameters if id(p) not in owners), width)
        buffers = slots((n, b) for n, b in model.named_buffers() if b.is_floating_point())
        self.parameters, self.buffers = [*prunable, *rest], buffers
        self.layers = {s.name.removesuffix(".weight"): s for s in prunable}
        total, statistics = (x[-1].columns.stop if x else 0 for x in (self.parameters, buffers))
        self.weights = torch.zeros(rows, padded(total), device=device)
        self.momentum = torch.zeros_like(self.weights)
        self.gradient = torch.zeros_like(self.weights)
        self.mask = torch.ones(rows, width, dtype=torch.bool, device=device)
        self.batchnorm = torch.zeros(rows, padded(statistics), device=device)
        self.low: Tensor | None = None
        self.diverged = torch.full((rows,), -1, device=device)
        self.template = model
        self.modules = [self.view(r) for r in range(rows)]

    def view(self, row: int, low: bool = False) -> nn.Module:
        """A module whose tensors are views of a row; with `low`, all parameters but those of
        BatchNorm are views of `self.low`."""
        module = copy.deepcopy(self.template).to(self.weights.device)
        batchnorm = nn.modules.batchnorm._BatchNorm
        norms = [m for m in module.modules() if isinstance(m, batchnorm)]
        full = {id(p) for m in norms for p in m.parameters()}
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        for slot in self.parameters:
            p = parameters[slot.name]
            p.data = slot.of((self.low if low and id(p) not in full else self.weights)[row])
            p.grad = None if low else slot.of(self.gradient[row])
        for slot in self.buffers:
            buffers[slot.name].data = slot.of(self.batchnorm[row])
        for m in norms:
            m.num_batches_tracked = None  # the momentum of the statistics is fixed: nothing counts
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

    def put(self, rows: slice, state: dict[str, Tensor]) -> None:
        for k in STATE:
            getattr(self, k)[rows] = state[k].to(self.weights.device)

    def state(self, row: int) -> dict[str, Tensor]:
        """The state_dict of a row: copies on the CPU under the module's names and shapes."""
        return on_cpu(self.modules[row].state_dict())

    @torch.no_grad()
    def load(self, row: int, state: dict[str, Tensor]) -> None:
        """Row `row` becomes the network of a state_dict that fits: all alive, no velocity."""
        mine = self.modules[row].state_dict()
        for k, v in mine.items():
            v.copy_(state[k])
        self.mask[row], self.diverged[row] = True, -1
        self.momentum[row], self.gradient[row] = 0, 0

    def rewind(self, row: int, state: dict[str, Tensor], mask: Tensor | None = None) -> None:
        """Row `row` becomes w_tr under a mask (P,): weights and BatchNorm of `state`, no
        velocity."""
        self.load(row, state)
        if mask is not None:
            self.mask[row] = mask.to(self.mask.device)
            self.weights[row, : len(mask)].masked_fill_(~self.mask[row], 0)

    def momentum_state(self, row: int) -> dict[str, Tensor]:
        """The velocities of a row by parameter, on the CPU."""
        return on_cpu({s.name: s.of(self.momentum[row]) for s in self.parameters})

    def set_momentum(self, row: int, state: dict[str, Tensor]) -> None:
        for slot in self.parameters:
            slot.of(self.momentum[row]).copy_(state[slot.name])

    def masks(self, row: int) -> dict[str, Tensor]:
        """The mask of a row by layer, in the shapes of the weights, on the CPU."""
        return on_cpu({name: slot.of(self.mask[row]) for name, slot in self.layers.items()})

    def flat_mask(self, masks: dict[str, Tensor]) -> Tensor:
        """(P,) on the device of masks by layer; UserError where they are another network's."""
        check_shapes("masks", {name: slot.shape for name, slot in self.layers.items()}, masks)
        flat = torch.ones_like(self.mask[0])
        for name, slot in self.layers.items():
            slot.of(flat).copy_(masks[name])
        return flat


STATE = ("weights", "momentum", "batchnorm", "diverged")


def check_shapes(source: str, wanted: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    """UserError where anything is missing, too many, or of another shape."""
    for name in [*wanted, *tensors]:
        if name not in tensors or name not in wanted:
            problem = "is missing" if name not in tensors else "is not in this network"
            raise UserError(f"{source}: {name} {problem}: another network, or --depth, --width")
        if tensors[name].shape != wanted[name]:
            shapes = f"{tuple(tensors[name].shape)}, this network's {tuple(wanted[name])}"
            raise UserError(f"{source}: {name} has shape {shapes}")


def check_fits(source: str, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, of `read_network`, if it is a network like `model`; else UserError."""
    wanted = model.state_dict()
    wanted = {k: v.shape for k, v in wanted.items() if not k.endswith("num_batches_tracked")}
    check_shapes(source, wanted, state)
    return state


def read_network(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict of a .pt, ours or anyone's, without counts of batches, and what else one of
    ours says."""
    content = runs.load_tensors(path)
    ours = isinstance(content, dict) and "sha256" in content
    if ours:
        content = runs.checked_tensors(path, content)
    about = content if isinstance(content, dict) else {}
    state = next(
        (about[k] for k in ("model", "state_dict") if isinstance(about.get(k), dict)), about
    )
    named = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not state or not named:
        raise UserError(f'{path} holds no network: neither a state_dict nor one as "model"')
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return state, about if ours else {}


# ---- training and evaluation ---------------------------------------------------------------------


@dataclasses.dataclass
class Stream:
    """What one row trains on: the labels (N,), the training examples it may draw (M,), and the
    Philox keys of its data order and of its augmentation."""

    labels: Tensor
    indices: Tensor
    order: tuple[int, int]
    augment: tuple[int, int]


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
        philox_key(args.seed, "augment", replicate, child),
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


Watch = Callable[["Networks", int, Tensor, Tensor, Tensor], None]


@dataclasses.dataclass
class Training:
    """Rows that train side by side from step `start` to step `stop` at the rate `lr_at(step)`.

    `at` names steps to report at. `watch(networks, row, step, indices, logits)` is called for every
    row between backward and update; tensors of its own, rows first, go into `extra`.
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


@functools.cache
def cuda_streams(device: torch.device) -> list[Any]:
    """All streams that training uses, made once: torch deals 32 in turn, and a later one could be
    the capture stream itself. The first captures and warms up, the others are branches."""
    with torch.cuda.device(device):
        return [torch.cuda.Stream() for _ in range(32)]


class Captured:
    """A function of nothing but the device's state, as a CUDA graph: called three times to warm
    up, then recorded, then replayed, each call a step that counts. Runs on as it is where it cannot
    be recorded."""

    failed: ClassVar[list] = []  # keep failed graphs alive: torch 2.11's allocator refers to them

    def __init__(self, function: Callable[[], None], stream: Any):
        self.function, self.stream, self.calls, self.graph = function, stream, 0, None

    def __call__(self) -> None:
        if self.calls == 3:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # The outer context puts the stream back where a failed capture does not.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
                ):
                    self.function()
                self.graph = graph
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self.failed.append(graph)
                warn(f"CUDA graph failed, going on without: {one_line(e)}")
        self.calls += 1
        if self.graph:
            return self.graph.replay()
        with beside(self.stream):  # warming up on the main stream is not allowed
            self.function()
        torch.cuda.current_stream().wait_stream(self.stream)


@contextlib.contextmanager
def beside(stream: Any) -> Iterator[None]:
    """Puts work on another stream, after what the current one has in hand; None: nothing new."""
    if stream is None:
        yield
    else:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


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

    A row whose loss stops being finite computes on in its own row; `networks.diverged` says from
    which step on. A step reads and writes the device's memory only (its rate, batches, crops and
    losses lie in tables there) and never waits for it, so that a CUDA graph of one step is every
    step. In a graph the rows are parallel branches.
    """
    args, networks, streams, data = t.args, t.networks, t.streams, t.data
    step, device = t.start if start is None else start, networks.weights.device
    rows, cuda, graph = networks.rows, device.type == "cuda", args.engine == "graph"
    longest, size = 128 if cuda else 16, args.batch_size  # of the tables, in steps
    low = args.precision == "bf16"
    modules = networks.lowered() if low else networks.modules
    dtype = torch.bfloat16 if low else torch.float32
    leaves = [leaves_by_type(*pair) for pair in zip(modules, networks.modules, strict=True)]
    rates = torch.tensor([t.lr_at(s) for s in range(t.start, t.stop)], device=device)
    table = functools.partial(torch.zeros, dtype=torch.int64, device=device)
    batches, targets = table(rows, longest, size), table(rows, longest, size)
    crops, losses = table(rows, longest, size, 3), torch.zeros(rows, longest, device=device)
    rate, steps_, place = torch.zeros(longest, device=device), table(longest), table(1)
    pool = cuda_streams(device) if graph else [None] * 2
    branches = [pool[1 + r % (len(pool) - 1)] for r in range(rows)]

    def one_step() -> None:
        indices, labels, crop = (x.index_select(1, place)[:, 0] for x in (batches, targets, crops))
        now = steps_.index_select(0, place)
        for r in range(rows):
            with beside(branches[r]):
                x = augment(data.train_images, indices[r], crop[r], data.scale, data.shift, dtype)
                logits = modules[r](x)
                loss = F.cross_entropy(logits.float(), labels[r])
                backward(loss, leaves[r])
                losses[r].index_copy_(0, place, loss.detach()[None])
                if t.watch:
                    t.watch(networks, r, now, indices[r], logits.detach())
        for stream in set(branches) - {None}:
            torch.cuda.current_stream().wait_stream(stream)
        matrices = networks.weights, networks.momentum, networks.gradient, networks.mask
        lr = rate.index_select(0, place)
        masked_sgd_(*matrices, lr, args.momentum, args.weight_decay, networks.low)
        place.add_(1)

    take = Captured(one_step, pool[0]) if graph else one_step
    in_flight: collections.deque = collections.deque()
    while step < t.stop:
        begin, end = step, min([t.stop, step + longest, *(s for s in t.at if s > step)])
        with signals.deferred():
            for r, stream in enumerate(streams):
                batches[r, : end - begin] = batch_indices(stream, begin, end, size)
                targets[r, : end - begin] = stream.labels[batches[r, : end - begin]]
                drawn = begin, end, size, args.pad, args.flip, device
                crops[r, : end - begin] = draw_crops(stream.augment, *drawn)
            rate[: end - begin] = rates[begin - t.start : end - t.start]
            torch.arange(begin, begin + longest, out=steps_)
            place.zero_()
            while step < end and not signals.number:
                take()
                step += 1
            note_divergence(networks.diverged, losses[:, : step - begin], begin)
            if cuda:  # two tables in flight at most: the host sleeps, a signal is answered soon
                in_flight.append(torch.cuda.Event(blocking=True))
                in_flight[-1].record()
                if len(in_flight) > 2:
                    in_flight.popleft().synchronize()
            if cuda and (step == t.stop or signals.number):
                torch.cuda.synchronize()  # the clocks of the callers stop here
        yield step
    networks.low = None


def note_divergence(diverged: Tensor, losses: Tensor, first: int) -> None:
    """Writes into `diverged` (R,) the first step at which the losses (R, S) of steps `first`,
    `first` + 1, ... are not finite, for rows where none was."""
    if losses.shape[1]:
        bad = ~losses.isfinite()
        step = first + bad.to(torch.int32).argmax(1)  # the first of equals
        diverged.copy_(torch.where(bad.any(1) & (diverged < 0), step, diverged))


def normalise(data: Data, images: Tensor) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32, channels-last, unaugmented."""
    return (images * data.scale + data.shift).permute(0, 3, 1, 2)


def evaluated_at_once(device: torch.device) -> int:
    """Images of one forward pass; 100 are what a CPU's caches hold."""
    return 1000 if device.type == "cuda" else 100


@torch.inference_mode()
def predict(networks: Networks, data: Data, images: Tensor) -> Tensor:
    """Logits (R, N, classes) float32 of unaugmented images (N, H, W, C) uint8, BatchNorm in eval
    mode (running statistics)."""
    logits = []
    for module in networks.modules:
        module.eval()
        for x in images.split(evaluated_at_once(images.device)):
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


# ---- training that can be stopped ----------------------------------------------------------------


def fit(
    t: Training,
    group: list[Run],
    phase: str,
    progress: tqdm,
    observe: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains to the end, with checkpoints, from where the last checkpoint of `phase` stands.

    The rows of `t` belong to the runs of the group in equal parts. `observe(step)` is called at
    each step of `t.at`, `t.start` included: once or, after a resume, again.
    """
    networks, share = t.networks, t.networks.rows // len(group)
    parts = [slice(i * share, (i + 1) * share) for i in range(len(group))]
    step, began = t.start, time.perf_counter()
    for run, rows in zip(group, parts, strict=True):
        run.seconds = 0.0
        if saved := run.resume(phase):
            step, run.seconds = saved["step"], saved["seconds"]
            networks.put(rows, saved["networks"])
            for k, v in t.extra.items():
                v[rows] = saved["extra"][k].to(v.device)
    before, saved_at = [run.seconds for run in group], began
    progress.set_description(phase, refresh=False)
    skip(progress, (step - t.start) * networks.rows)
    if step in t.at:
        observe(step)
    for done in train(t, step):
        progress.update((done - step) * networks.rows)
        step, now = done, time.perf_counter()
        for run, seconds in zip(group, before, strict=True):
            run.seconds = seconds + now - began
        if signals.number or now - saved_at > t.args.checkpoint_every:
            for run, rows in zip(group, parts, strict=True):
                extra = {k: v[rows].cpu().clone() for k, v in t.extra.items()}
                run.checkpoint(phase, step, {"networks": networks.get(rows), "extra": extra})
            saved_at = now
        if signals.number:
            raise runs.Interrupted(signals.number)
        if step in t.at:
            observe(step)
    # The last update may be the one that goes wrong, and no loss is taken after it.
    finite = networks.weights.isfinite().all(1) & networks.batchnorm.isfinite().all(1)
    networks.diverged[~finite & (networks.diverged < 0)] = t.stop


def side_by_side(group: list[Run], phase: str) -> list[list[Run]]:
    """Runs that stand at the same step of a phase: these train together."""
    by_step: dict[int, list[Run]] = {}
    for run in group:
        saved = run.resume(phase)
        by_step.setdefault(saved["step"] if saved else -1, []).append(run)
    return list(by_step.values())


Track = Callable[[Training, list[Run]], Callable[[int], None] | None]


def pretrain(
    args: argparse.Namespace,
    data: Data,
    group: list[Run],
    progress: tqdm,
    track: Track = lambda t, group: None,
) -> None:
    """Stage 2 (Section 3): pretrained.pt, w_tr of every run that lacks it: the initialisation after
    --rewind steps at --pretrain-lr on the subset. `track(training, group)` may set what a training
    reports and watches, and returns its observer."""
    todo = [run for run in group if run.load("pretrained.pt") is None]
    skip(progress, args.rewind * (len(group) - len(todo)))
    labels = noisy_labels(data, args.label_noise, args.seed)
    for part in side_by_side(todo, "pretrain"):
        networks = Networks(make_model(args, data), len(part), args.device)
        streams = []
        for r, run in enumerate(part):
            networks.load(r, fresh_state(args, data, run.replicate))
            indices = choose_subset(args, data, labels, run.replicate)
            streams.append(make_stream(args, data, run.replicate, 0, indices, labels))
        constant = step_schedule(args.pretrain_lr, ())
        training = Training(args, data, networks, streams, 0, args.rewind, constant)
        observe = track(training, part) or (lambda step: None)
        fit(training, part, "pretrain", progress, observe)
        test_accuracy = accuracy(networks, data)
        for r, run in enumerate(part):
            diverged = networks.diverged[r].item()
            known = {"diverged": diverged, "seconds": run.seconds}
            known["test_accuracy"] = test_accuracy[r] if diverged < 0 else None
            known["tracked"] = {k: v[r].cpu().clone() for k, v in training.extra.items()}
            start = start_from(networks.state(r), data, args.rewind, **known)
            run.save("pretrained.pt", start)
    for run in group:
        if (step := run.load("pretrained.pt")["diverged"]) >= 0:
            run.ended = (
                f"pre-training diverged at step {step}: lower --pretrain-lr ({args.pretrain_lr:g})"
            )


def about_start(run: Run) -> dict[str, Any]:
    """What result.json says of w_tr."""
    start = run.load("pretrained.pt")
    return {k: start[k] for k in ("step", "test_accuracy", "fingerprint", "seconds")}


def start_from(model: dict[str, Tensor], data: Data, step: int | None, **more: Any) -> dict:
    """The content of pretrained.pt: w_tr as `model`, and what is known of it."""
    about = {"step": step, "data": data.fingerprint, "diverged": -1}
    about |= {"test_accuracy": None, "seconds": 0.0}
    return {"model": model, "fingerprint": fingerprint(model), **about, **more}


def adopt(run: Run, start: dict[str, Any]) -> None:
    """Takes another's w_tr as the run's own; UserError if it has a different one."""
    mine = run.load("pretrained.pt")
    if mine and mine["fingerprint"] != start["fingerprint"]:
        raise UserError(f"{run.folder} began from another w_tr: --fresh starts it over")
    if not mine:
        run.save("pretrained.pt", start)


def read_starts(
    flag: str, path: Path | None, args: argparse.Namespace, data: Data, rewind: int | None
) -> dict[int, dict[str, Any]]:
    """By replicate, w_tr from a pretrained.pt, or rep<k>/pretrained.pt in a folder, or a .pt with
    anyone's state_dict and the step `rewind` it was trained to; UserError where one does not fit
    the data, the network, the step or the others. Without a path, none."""
    starts = {}
    for replicate in args.replicate if path else ():
        file = path / f"rep{replicate}" / "pretrained.pt" if path.is_dir() else path
        state, about = read_network(file)
        state = check_fits(f"{flag} {file}", make_model(args, data), state)
        start = start_from(state, data, rewind)
        start |= {k: about[k] for k in start.keys() & about.keys() - {"model", "fingerprint"}}
        if start["step"] is None:
            raise UserError(f"{flag} {file}: give --rewind, the step it was trained to")
        if start["data"] != data.fingerprint:
            raise UserError(f"{flag} {file}: made from other data than {data.name}")
        if rewind not in (None, start["step"]):
            raise UserError(f"--rewind {rewind}: {file} was trained for {start['step']} steps")
        if start["diverged"] >= 0:
            raise UserError(f"{flag} {file}: diverged at step {start['diverged']}")
        if start["step"] >= args.steps:
            problem = f"trained to step {start['step']} of --steps {args.steps}"
            raise UserError(f"{flag} {file}: {problem}")
        starts[replicate], rewind = start, start["step"]
    return starts


# ---- flags ---------------------------------------------------------------------------------------


def preset_table() -> str:
    """What a preset gives for each data set, for --help."""
    names = [f.name for f in dataclasses.fields(Preset)]
    lines = [
        "what a preset gives for each data set:",
        f"  {'':13}" + "".join(f"{p:>14}" for p in PRESETS),
    ]
    for name in names:
        values = (getattr(p, name) for p in PRESETS.values())
        cells = (",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
        lines.append(f"  {name.replace('_', '-'):13}" + "".join(f"{c:>14}" for c in cells))
    return "\n".join(lines)


def flags(description: str, *groups: str) -> Parser:
    """A parser with the flags that all stages share and those of the named groups: replicate,
    noise, subset, rewind. Where a default is None, the preset of the data set gives it."""
    parser = Parser(description, epilog=preset_table())
    rate, fraction = number(float, 0, 1e6, open_low=True), number(float, 0, 1)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    names = ", ".join(PRESETS)
    add("--dataset", default="digits", help=f"{names}, or a folder: train/CLASS/*, test/CLASS/*")
    add("--preset", help="the settings of another data set (a folder's: by the size of its images)")
    add("--data-dir", type=Path, default=Path("data"), help="where data are kept [data]")
    if "noise" in groups:
        add("--label-noise", type=fraction, default=0.0, help="part of the labels redrawn [0]")
    if "subset" in groups:
        add = parser.add_argument_group("subset to pre-train on").add_argument
        add("--subset", choices=("all", "random", "easy", "hard"), help="[easy]")
        add("--size", type=positive, help="examples in it [preset]")
        add("--offset", type=count, default=0, help="examples of the ranking to skip [0]")
        add("--balance", action="store_true", help="easy or hard within each class")
        add("--scores", type=Path, help="scores as .npy [EL2N, made if missing]")

    add = parser.add_argument_group("training").add_argument
    add("--depth", type=number(int, 1, 1202), help="of the ResNet, 6n+2 [preset]")
    add("--width", type=number(int, 1, 1024), help="channels of its first group [preset]")
    add("--steps", type=positive, help="of a training, pre-training included [preset]")
    add("--batch-size", type=positive, help="examples a step [preset]")
    add("--lr", type=rate, help="learning rate [preset]")
    add("--milestones", type=numbers, help="steps at which the rate drops tenfold [preset]")
    add("--momentum", type=fraction, help="of SGD [preset]")
    add("--weight-decay", type=number(float, 0, 1e6), help="of all parameters [preset]")
    add("--pad", type=number(int, 0, 1024), help="border of random crops, pixels [preset]")
    add("--flip", action=switch, help="random horizontal flips [preset]")
    if "rewind" in groups:
        add("--rewind", type=count, help="t_r, the steps of pre-training [preset]")
    if "subset" in groups:
        add("--pretrain-lr", type=rate, help="constant learning rate of pre-training [preset]")

    add = parser.add_argument_group("run").add_argument
    if "replicate" in groups:
        add("--replicate", type=numbers, default=(0,), help="trained side by side: 0-3, 0,2 [0]")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of everything random [0]")
    add("--out", type=Path, default=Path("results"), help="where results go [results]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto: a GPU if there is one]")
    engines, precisions = ("auto", "eager", "graph"), ("auto", "fp32", "bf16")
    add("--engine", choices=engines, default="auto", help="[auto: a CUDA graph, on a GPU]")
    add("--precision", choices=precisions, default="auto", help="[auto: bf16 on a GPU]")
    add("--fast", action="store_true", help="on a GPU: TF32, and bits that vary from run to run")
    add("--checkpoint-every", type=number(float, 0), default=60.0, help="seconds [60]")
    add("--fresh", action="store_true", help="start the run's folder over")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def fill(args: argparse.Namespace, presets: dict[str, Preset] = PRESETS, side: int = 32) -> None:
    """What was not given comes from the preset of the data set; `side` is that of a folder's
    images, in pixels."""
    if args.preset not in (None, *PRESETS):
        raise UserError(f"--preset {args.preset}: not one of {', '.join(PRESETS)}")
    own = args.dataset if args.dataset in PRESETS else None
    args.preset = args.preset or own or ("cifar10" if side == 32 else "digits")
    args.defaults = presets[args.preset]
    if getattr(args, "subset", None) in ("all", "random"):
        for flag in ("offset", "balance"):
            if getattr(args, flag):
                raise UserError(f"--{flag} goes with --subset easy or hard")
    if getattr(args, "subset", None) == "all" and args.size:
        raise UserError("--size goes with --subset random, easy or hard")
    for name, value in vars(args.defaults).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    if getattr(args, "rewind", None) == 0:
        args.subset, args.label_noise = "all", 0.0  # nothing is trained on them


def check(args: argparse.Namespace, data: Data) -> None:
    """UserError for settings that cannot work together or with the data."""
    n = len(data.train_labels)
    if max(getattr(args, "replicate", (0,))) >= SCORERS:
        raise UserError(f"--replicate {args.replicate[-1]}: at most {SCORERS - 1}")
    if (args.depth - 2) % 6 or args.depth < 8:
        raise UserError(f"--depth {args.depth}: a ResNet has 8, 14, 20, ... (6n+2) layers")
    if args.batch_size > n:
        raise UserError(f"--batch-size {args.batch_size}: {data.name} has {n} training images")
    check_rewind(getattr(args, "rewind", 0), args.steps)
    if getattr(args, "subset", "all") != "all":
        if args.size < args.batch_size:
            problem = f"smaller than a batch (--batch-size {args.batch_size})"
            raise UserError(f"--size {args.size}: {problem}")
        if args.offset + args.size > n:
            window = f"--size {args.size}" + f" from --offset {args.offset}" * bool(args.offset)
            raise UserError(f"{window}: {data.name} has {n} training images")
    check_model(args, data)


def with_steps(args: argparse.Namespace, name: str, steps: int) -> argparse.Namespace:
    """The settings with `name` (rewind, warmup) at `steps`; at 0 no subset is trained on."""
    one = argparse.Namespace(**{**vars(args), name: steps})
    if steps == 0:
        one.subset, one.label_noise = "all", 0.0
    return one


def check_start(args: argparse.Namespace, *names: str) -> None:
    """UserError where one of these flags brings its own w_tr, and a subset is given too."""
    for name in names:
        if getattr(args, name) and (args.subset or args.size or args.label_noise):
            remedy = "leave out --subset, --size and --label-noise"
            raise UserError(f"--{name} brings its own pre-training: {remedy}")


def check_rewind(step: int, steps: int) -> None:
    if step >= steps:
        raise UserError(f"--rewind {step}: not before the end of training (--steps {steps})")


def choose_engine(args: argparse.Namespace) -> None:
    """Engine, precision and numerics of the device; cuDNN gives the same bits each time unless
    --fast. fp32 is float32 throughout; beside training in bf16 the convolutions of an evaluation,
    on float32 weights, round their factors to TF32 (11 bits)."""
    cuda = args.device.type == "cuda"
    if args.engine == "auto":
        args.engine = "graph" if cuda else "eager"
    if args.engine == "graph" and not cuda:
        raise UserError(f"--engine graph needs a CUDA device, not {args.device}")
    if args.precision == "auto":
        args.precision = "bf16" if cuda else "fp32"
    if args.fast and not cuda:
        warn("--fast: changes nothing on a CPU")
        args.fast = False
    torch.backends.cudnn.deterministic = not args.fast
    torch.backends.cudnn.benchmark = args.fast
    torch.backends.cudnn.allow_tf32 = args.precision == "bf16" or args.fast
    torch.backends.cuda.matmul.allow_tf32 = args.fast


def prepare(
    args: argparse.Namespace,
    presets: dict[str, Preset] = PRESETS,
    check_more: Callable[[argparse.Namespace, Data], None] = lambda args, data: None,
) -> Data:
    """Loads the data, fills `args` from the preset, refuses what cannot work, finds scores."""
    args.device = find_device(args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: {e.strerror}") from e
    fill(argparse.Namespace(**vars(args)), presets)  # mistakes first, before data are read
    data = load_data(args.dataset, args.data_dir, args.device, args.quiet)
    height, width = data.train_images.shape[1:3]
    fill(args, presets, height if height == width else 0)
    check(args, data)
    check_more(args, data)
    choose_engine(args)
    if getattr(args, "subset", "all") in ("easy", "hard"):
        data.scores = read_scores(args, data)
    return data


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


# ---- run folders of the stages -------------------------------------------------------------------


def data_name(dataset: str) -> str:
    return dataset if dataset in PRESETS else Path(dataset).resolve().name


def run_folder(args: argparse.Namespace, stage: str, name: str) -> Path:
    """results/<stage>/<data>-<network>/<name>."""
    wide = f"x{args.width}" if args.width != args.defaults.width else ""
    return args.out / stage / f"{data_name(args.dataset)}-resnet{args.depth}{wide}" / name


SHORT = {"steps": "steps", "milestones": "drops", "batch_size": "batch", "lr": "lr"}
SHORT |= {"momentum": "momentum", "weight_decay": "decay", "pad": "pad", "flip": "flip"}
SHORT |= {"pretrain_lr": "prelr", "networks": "networks", "score_step": "step"}


def run_name(args: argparse.Namespace, *parts: str, keys: Iterable[str] = SHORT) -> str:
    """A folder's name: what the run is about, then every setting that is not the preset's."""
    words = [p for p in parts if p]
    for key in keys:
        usual = getattr(args.defaults, key)
        value = getattr(args, key, usual)
        if value != usual:
            words.append(SHORT[key] + "+".join(f"{v:g}" for v in np.atleast_1d(value)))
    if getattr(args, "label_noise", 0):
        words.append(f"noise{args.label_noise:g}")
    return "-".join(words + ["fast"] * args.fast + [f"seed{args.seed}"] * bool(args.seed))


def subset_name(args: argparse.Namespace) -> str:
    """easy3200, easy3200+1000 (an offset), hard512balanced, all."""
    if args.subset == "all":
        return "all"
    offset = f"+{args.offset}" if args.offset else ""
    name = f"{args.subset}{args.size}{offset}" + "balanced" * args.balance
    if args.subset == "random" or not args.scores:
        return name
    by = score_name(args.scores)
    return name if by == "el2n" else f"{name}-{by}"


def score_name(path: Path) -> str:
    """el2n, forgetting, lmc800 (of children spawned at step 800); before they are made, the same
    from the folder that a stage will write them to."""
    stage, folder = path.absolute().parts[-4:-3], path.absolute().parent.name
    if path.with_suffix(".json").exists():
        about = runs.read_json(path.with_suffix(".json"), "metric")
        return f"{about['metric']}{about.get('rewind', '')}"
    if stage == ("lmc",) and (spawned := re.search(r"-rewind(\d+)", folder)):
        return f"lmc{spawned[1]}"
    return folder.split("-")[0] if stage == ("el2n",) else path.stem


def planned(
    folder: Path,
    replicates: Iterable[int],
    steps: int,
    done: Callable[[dict | None], bool] = bool,
) -> list[tuple[Path, int, bool]]:
    """(folder, network-steps, done) of each replicate; `done` judges result.json, or None."""
    places = [folder / f"rep{k}" for k in replicates]
    return [(place, steps, done(runs.finished_result(place))) for place in places]


def settings_of(args: argparse.Namespace, data: Data, *more: str) -> dict:
    """What a run's numbers depend on: config.json holds it, and another such run is refused."""
    keys = ("depth", "width", "steps", "batch_size", "lr", "momentum", "weight_decay", "milestones")
    keys += ("pad", "flip", "seed", "precision", "fast", *more)
    settings = {k: getattr(args, k) for k in keys}
    if "subset" in more:
        used = ("size", "offset", "balance") if args.subset != "all" else ()
        settings |= {k: getattr(args, k) for k in used}
        ranked = args.subset in ("easy", "hard")
        settings["scores"] = fingerprint(data.scores) if ranked else None
    return {"dataset": data.name, "data": data.fingerprint, **settings}


def environment(args: argparse.Namespace) -> dict:
    """What the bits of a result depend on, beside the settings."""
    git = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cuda = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if cuda else cpu_name()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "engine": args.engine,
        "csrc": are_compiled(),
    }


def cpu_name() -> str:
    """The processor, and what its libraries are held to: kernels are chosen by these."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    limits = (os.environ.get(k, "") for k in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"))
    return " ".join([model, torch.backends.cpu.get_cpu_capability(), *filter(None, limits)])


@contextlib.contextmanager
def open_runs(
    args: argparse.Namespace,
    stage: str,
    name: str,
    settings: dict,
    replicates: Iterable[int | None],
) -> Iterator[list[Run]]:
    """The run folders of all replicates (None: of a stage without), made or resumed, and locked
    until the end."""
    folder, here = run_folder(args, stage, name), environment(args)
    with contextlib.ExitStack() as held:
        opened = []
        for r in replicates:
            place = folder if r is None else folder / f"rep{r}"
            opened.append(Run(place, r, settings | {"replicate": r}, here, args.fresh))
            held.enter_context(opened[-1].held)
        yield opened


def report(finished: list[Run]) -> None:
    """Prints where the results are; UserError, now that all is done, for runs that ended early."""
    for run in finished:
        print(run.folder / "result.json")
    ended = [(run.replicate, run.result["ended"]) for run in finished if run.result["ended"]]
    if ended:
        raise UserError("; ".join(f"replicate {r}: {why}" for r, why in ended))


def mean_std(values: list[float], digits: int = 4) -> str:
    """ "0.9132 ± 0.0021" (sample deviation), or the value alone."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
