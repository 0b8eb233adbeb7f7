"""The nouns of the paper, which all stages share: networks, data, subsets, scores, pre-training.

Copy this file, options.py, engine.py, runs.py and data/ with any one stage and it runs; other data
need loading.py, files of one's own inputs.py, a model of one's own modelcode.py; csrc/ makes it
faster. Sections in comments are those of Paul et al. 2022, "Lottery Tickets on a Data Diet".
"""

import contextlib
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import engine
import options
import runs
from engine import Data, Networks, Stream, Training, batch_norm_relu, generator
from engine import are_compiled as are_compiled  # for notebooks
from options import PRESETS, HandedIn, Settings, optional
from runs import Run, UserError, fingerprint, one_line, skip, warn

options.code_identity.cache_clear()  # a notebook may have reloaded this file

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


# ---- data ----------------------------------------------------------------------------------------


def load_data(s: Settings, device: torch.device, handed_in: Any = None) -> Data:
    """The data of --dataset, or those of a function call, on the device. UserError where something
    is missing, unreadable or of another size, by name."""
    if handed_in is None and s.dataset != "digits":
        arrays = optional("loading").load_arrays(s.dataset, s.data_dir, s.resize, s.quiet)
    else:
        arrays = load_digits(s.data_dir) if handed_in is None else handed_in
        arrays = optional("loading").resized(arrays, s.resize) if s.resize else arrays
    *arrays, classes = arrays
    return Data(
        options.data_name(s.dataset),
        *(torch.from_numpy(a).to(device) for a in arrays),
        classes,
        fingerprint(*arrays),
        *(torch.tensor(v, dtype=torch.float32, device=device) for v in normalisation(arrays[0])),
    )


def load_digits(folder: Path) -> tuple:
    """UCI optdigits: 1,797 handwritten 8x8 digits; the last 360, by other writers, are the test."""
    path = folder / "digits.npz"
    path = path if path.exists() else options.HERE / "data/digits.npz"
    images, labels = runs.read_npz(path, "images", "labels").values()
    if (images.dtype, images.ndim, labels.shape) != (np.uint8, 3, (max(len(images), 361),)):
        raise UserError(f"{path}: not images (N, H, W) uint8 and labels (N,), N above 360")
    images, labels = images[..., None], labels.astype(np.int64)
    return images[:-360], labels[:-360], images[-360:], labels[-360:], [str(c) for c in range(10)]


def normalisation(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C,) float64 scale and shift: pixel * scale + shift has mean 0 and deviation 1 in each
    channel of (N, H, W, C) uint8. Sums through histograms are exact: equal bits on every machine.
    """
    counts = np.zeros((images.shape[3], 256), np.int64)
    for first in range(0, len(images), 500):  # a whole channel at once would be copied as int64
        for channel, count in enumerate(counts):
            values = torch.from_numpy(images[first : first + 500, ..., channel].ravel())
            count += torch.bincount(values, minlength=256).numpy()
    value, total = np.arange(256), counts.sum(1)
    mean = counts @ value / total
    deviation = np.sqrt(np.maximum(counts @ value**2 / total - mean**2, 1e-12))
    return 1 / deviation, -mean / deviation


# ---- a study: settings, data, network ------------------------------------------------------------

SCORERS = 1 << 16  # scoring network k is replicate SCORERS + k: no network that IMP prunes


@dataclasses.dataclass(frozen=True)
class Model:
    """The architecture that a study trains, checked; a network of it is a state_dict."""

    name: str  # in folder names
    build: Callable[[], nn.Module]  # a module as it initialises itself, from torch's generator
    channels_last: bool
    by_paper: bool  # whether it is initialised as the paper's ResNet
    about: dict[str, Any]  # its part of a run's identity


@dataclasses.dataclass(frozen=True)
class Study:
    """What every part of a stage needs: settings, the data on the device, the model, and what a
    result is made from. `scores` (N,) rank easy and hard examples; `indices` (M,) are those of
    --indices."""

    settings: Any  # of the stage
    data: Data
    model: Model
    code: dict[str, str]
    about: dict[str, Any]  # facts for the line at the start and config.json
    scores: np.ndarray | None = None
    indices: np.ndarray | None = None
    on_log: Callable[[dict], None] | None = None

    @property
    def device(self) -> torch.device:
        return self.data.device

    def replace(self, **settings: Any) -> "Study":
        """The same with some settings changed."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **settings))

    def networks(self, rows: int) -> Networks:
        # Seeded for what a module keeps beside its state_dict.
        template = seeded(self.settings.seed, 0, self.model.build)
        return Networks(template, rows, self.device, self.model.channels_last)

    def initial_state_dict(self, replicate: int) -> dict[str, Tensor]:
        """The initialisation of a replicate. That of `make_model`'s ResNet is the paper's: Kaiming
        normal conv and linear weights, BatchNorm scales U[0, 1) and shifts 0, as the authors' code
        has it; any other module initialises itself, from the replicate's stream."""
        s = self.settings
        model = seeded(s.seed, replicate, self.model.build)
        if self.model.by_paper:
            initialise_resnet(model, generator(s.seed, "init", replicate))
        return model.state_dict()

    def stream(
        self,
        replicate: int,
        child: int = 0,
        indices: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Stream:
        """What a row of a replicate trains on: all training data unless `indices` and `labels` say
        otherwise. Children of one replicate differ in data order and augmentation, nothing else."""
        labels = self.data.train_labels if labels is None else labels
        everything = torch.arange(len(labels), device=self.device)
        keys = (
            engine.philox_key(self.settings.seed, purpose, replicate, child)
            for purpose in ("order", "augment")
        )
        return Stream(labels, everything if indices is None else indices, *keys)

    def training(self, networks: Networks, streams: list[Stream], *span: Any) -> Training:
        """`span` is the first step, the last, the rate by step, and steps to report at."""
        return Training(self.settings.step, self.data, networks, streams, *span)

    def start_from(
        self, model: dict[str, Tensor], step: int | None, mask: dict | None = None, **more: Any
    ) -> dict[str, Any]:
        """The content of pretrained.pt: w_tr as `model`, the masks by layer that it starts under,
        if any, and what is known of it."""
        state = {"model": model, "mask": mask} if mask else {"model": model}
        about = {"step": step, "data": self.data.fingerprint, "diverged": -1}
        about |= {"test_accuracy": None, "seconds": 0.0}
        return {**state, "fingerprint": fingerprint(state), **about, **more}

    def folder(self, stage: str, name: str) -> Path:
        return options.run_folder(self.settings, stage, name, self.model.name)

    def describe(self, *keys: str) -> dict[str, Any]:
        """What a run's numbers depend on: config.json holds it, and a run in the same folder that
        differs in it is refused. `keys` are settings of the stage."""
        s = self.settings
        values = {k: getattr(s, k) for k in (*options.COMPARED, *keys)}
        if "subset" in keys:
            ranked = options.is_ranked(s)
            values |= {"size": s.size} if s.subset != "all" else {}
            values |= {"offset": s.offset, "balance": s.balance} if ranked else {}
            values["scores"] = fingerprint(self.scores) if ranked else None
            values["indices"] = fingerprint(self.indices) if s.subset == "indices" else None
        made_from = {"dataset": self.data.name, "data": self.data.fingerprint}
        return made_from | {"model": self.model.name} | values

    @contextlib.contextmanager
    def runs(
        self,
        stage: str,
        name: str,
        settings: dict,
        replicates: Iterable[int | None],
        each: dict[int, dict] | None = None,
    ) -> Iterator[list[Run]]:
        """The run directories of all replicates (None: of a stage without), created or resumed, and
        locked until the end; `each` has settings that differ by replicate."""
        s, folder = self.settings, self.folder(stage, name)
        here = options.environment(self.device, s.step)
        origin = {"model": self.model.about, "code": self.code}
        shared = origin, self.about, here, s.fresh, functools.partial(options.compare_origin, s)
        with contextlib.ExitStack() as held:
            opened = []
            for r in replicates:
                own = settings | {"replicate": r} | (each or {}).get(r, {})
                run = Run(folder if r is None else folder / f"rep{r}", r, own, *shared)
                run.on_log = self.on_log
                opened.append(run)
                held.enter_context(run.held)
            yield opened


def make_model(s: Settings, data: Data) -> nn.Module:
    """The network that is studied. Return another module here, or give --model."""
    return ResNet(s.depth, s.width, data.train_images.shape[3], len(data.classes))


@torch.no_grad()
def initialise_resnet(model: ResNet, draw: np.random.Generator) -> None:
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fan_in = m.weight[0].numel()
            values = draw.standard_normal(m.weight.shape) * math.sqrt(2 / fan_in)
            m.weight.copy_(torch.from_numpy(values))
            if m.bias is not None:
                values = draw.uniform(-1, 1, m.bias.shape) / math.sqrt(fan_in)
                m.bias.copy_(torch.from_numpy(values))
        elif isinstance(m, nn.BatchNorm2d) and m.affine:
            m.weight.copy_(torch.from_numpy(draw.uniform(0, 1, m.weight.shape)))
            m.bias.zero_()


def seeded(seed: int, replicate: int, make: Callable[[], Any]) -> Any:
    """What `make` gives when torch's generator stands at the start of a replicate's stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(engine.seeds(seed, "init", replicate).generate_state(1)[0]))
        return make()


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


def easiest(scores: np.ndarray, labels: np.ndarray, balance: bool) -> np.ndarray:
    """All examples from the lowest score to the highest, ties by index; with `balance` class by
    class in turn."""
    order = np.argsort(scores, kind="stable")
    return rank_by_class(order, labels) if balance else order


def choose_subset(study: Study, labels: Tensor, replicate: int) -> Tensor:
    """Sorted indices (M,) of --subset, --size, --offset, --balance or --indices. Random ones are
    class-balanced and differ by replicate; easy and hard ones are the ends of the ranking."""
    s, y = study.settings, labels.cpu().numpy()
    if s.subset == "all":
        chosen = np.arange(len(y))
    elif s.subset == "indices":
        chosen = study.indices
    elif s.subset == "random":
        draw = generator(s.seed, "subset", replicate)
        order = rank_by_class(draw.permutation(len(y)), y)
        even = s.size - s.size % len(study.data.classes)  # what is over goes to random classes
        chosen = np.concatenate([order[:even], draw.permutation(order[even:])])[: s.size]
    else:
        ranking = study.scores if s.subset == "easy" else -study.scores.astype(np.float64)
        chosen = easiest(ranking, y, s.balance)[s.offset : s.offset + s.size]
    return torch.from_numpy(np.sort(chosen)).to(labels.device)


# ---- scores --------------------------------------------------------------------------------------


def reliability(each: np.ndarray, size: int, labels: np.ndarray) -> dict[str, float]:
    """How far scores `each` (K, N) of K networks agree, over ten splits into halves: Spearman's
    rank correlation of the halves' means, that of the mean of all K by Spearman and Brown, and the
    share of the easiest `size` examples that both halves name, beside that by chance."""
    from scipy.stats import rankdata

    draw, found = np.random.default_rng(0), []
    for _ in range(10):
        order = draw.permutation(len(each))
        halves = [each[order[k::2]].mean(0, dtype=np.float64) for k in (0, 1)]
        r = np.corrcoef(*(rankdata(x) for x in halves))[0, 1]
        first, second = (set(easiest(x, labels, False)[:size]) for x in halves)
        found.append((r, len(first & second) / size))
    r, shared = np.mean(found, 0).tolist()
    return {
        "split_half": r,
        "spearman_brown": 2 * r / (1 + r) if r > 0 else r,
        "easiest": size,
        "shared_by_halves": shared,
        "shared_by_chance": size / each.shape[1],
    }


def save_scores(folder: Path, each: np.ndarray, labels: Tensor, study: Study, **about: Any) -> None:
    """scores.npy, (N,) float32, the mean over rows of `each` (K, N) for the training examples under
    `labels`, and scores.json with what they were made from and `about`."""
    s, data = study.settings, study.data
    scores, y = each.mean(0, dtype=np.float64).astype(np.float32), labels.cpu().numpy()
    if not np.isfinite(scores).all():
        raise UserError(f"scores are not finite: lower --lr ({s.lr:g})")
    by_class = {data.classes[k]: float(scores[y == k].mean()) for k in np.unique(y)}
    size = min(PRESETS[s.preset].size, len(y) // 2)
    about |= {
        "data": data.fingerprint,
        "model": study.model.about,
        "label_noise": [s.label_noise, s.seed if s.label_noise else 0],
        "sha256_of_scores": fingerprint(scores),
        "reliability": reliability(each, size, y) if len(each) > 1 else None,
        "classes_from_easy_to_hard": sorted(by_class, key=by_class.get),
        "mean_by_class": by_class,
    }
    runs.write_array(folder / "scores.npy", scores)
    runs.write_json(folder / "scores.json", about)


def make_scores(
    study: Study,
    name: str,
    settings: dict,
    score: Callable[[Training, Run], Tensor],
    milestones: tuple[int, ...] = (),
    count_events: Callable[[Training], None] = lambda t: None,
) -> Path:
    """Scores by `settings["metric"]`, made in the run folder `name` unless they are there; their
    path. The K networks of Definition 2.1 train side by side for --score-step steps, and
    `score(training, run)` gives theirs (K, N)."""
    s, data = study.settings, study.data
    with study.runs("el2n", name, settings, [None]) as [run]:
        path = run.folder / "scores.npy"
        if run.result is None or not run.has("scores.npy") or not run.has("scores.json"):
            labels = noisy_labels(data, s.label_noise, s.seed)
            networks, streams = study.networks(s.networks), []
            for k in range(s.networks):
                networks.load(k, study.initial_state_dict(SCORERS + k))
                streams.append(study.stream(SCORERS + k, labels=labels))
            schedule = engine.step_schedule(s.lr, milestones)
            training = study.training(networks, streams, 0, s.score_step, schedule)
            count_events(training)
            with runs.progress_bar(s.score_step * s.networks, s.quiet) as progress:
                engine.fit(training, [run], settings["metric"], progress)
            for k, step in enumerate(networks.diverged.tolist()):
                if step >= 0:
                    problem = f"network {k} diverged at step {step}"
                    raise UserError(f"{problem}: lower --lr ({s.lr:g})")
            about = {k: settings[k] for k in ("metric", "networks", "score_step")}
            save_scores(run.folder, score(training, run).cpu().numpy(), labels, study, **about)
            run.finish({"scores": "scores.npy", "seconds": run.seconds, "ended": None})
            if not s.quiet:
                runs.say(describe_scores(runs.read_json(path.with_suffix(".json"))))
    return path


def describe_scores(about: dict[str, Any]) -> str:
    """One line on scores.json: what the scores are, and how far they can be trusted."""
    line = f"{about['metric']} scores: mean of {about['networks']} networks"
    if known := about["reliability"]:
        r, shared = known["spearman_brown"], known["shared_by_halves"]
        line += f", reliability {r:.2f} (Spearman-Brown); halves share {shared:.0%} of the easiest"
        line += f" {known['easiest']} ({known['shared_by_chance']:.0%} by chance)"
        line += "; mostly noise: raise --networks or --score-step" * (r < 0.7)
    return f"{line}; classes from easy to hard: {' '.join(about['classes_from_easy_to_hard'])}"


def make_el2n(study: Study, fresh: bool = False) -> Path:
    """EL2N scores (Definition 2.1, Appendix A), made unless they are there; their path. UserError
    where those that are there were made by another model, other code or other settings."""
    s = options.scoring(study.settings)
    code = {k: v for k, v in study.code.items() if k != "stage"}  # any stage may make them
    study = dataclasses.replace(study, settings=dataclasses.replace(s, fresh=fresh), code=code)
    settings = study.describe("networks", "score_step", "label_noise") | {"metric": "el2n"}
    for k in ("steps", "milestones", "precision"):  # early in training; in either precision
        del settings[k]

    def score(t: Training, run: Run) -> Tensor:
        return engine.evaluate(t.networks, t.data, t.data.train_images, t.streams[0].labels)[2]

    return make_scores(study, options.el2n_name(s), settings, score)


def read_scores(study: Study) -> np.ndarray:
    """The scores of --scores (N,), checked against the data; EL2N, made if missing, without."""
    if given := getattr(study.settings, "scores", None):
        return optional("inputs").scores_of(study, given)
    path = make_el2n(study)
    scores, about = runs.read_npy(path), runs.read_json(path.with_suffix(".json"), "metric")
    made = about.get("sha256_of_scores"), about.get("data")
    if made != (fingerprint(scores), study.data.fingerprint):
        problem = f"damaged, its checksum in {path.stem}.json differs"
        raise UserError(f"--scores {path}: {problem}: el2n.py --fresh makes the scores again")
    return scores


# ---- preparing a study ---------------------------------------------------------------------------

LAYERS = ("kernel_size", "stride", "padding", "dilation", "groups", "eps", "momentum", "num_heads")


def structure(module: nn.Module) -> str:
    """A fingerprint of the names, types and shapes of a module's parts."""
    parts = [
        (name, type(m).__name__, {k: str(getattr(m, k)) for k in LAYERS if hasattr(m, k)})
        for name, m in module.named_modules()
    ]
    return fingerprint([parts, [(k, list(v.shape)) for k, v in module.state_dict().items()]])


def find_model(s: Settings, data: Data, handed_in: HandedIn) -> Model:
    """The model that a study trains: --model, the one of a function call, or `make_model`. It is
    tried on a batch; UserError, in one line, for one that rows of matrices cannot keep exact."""
    shape = data.train_images.shape[3], len(data.classes)
    make, code, called = functools.partial(make_model, s, data), None, ""
    if s.model or handed_in.model:
        function, called, code = optional("modelcode").find_function(s.model, handed_in.model)
        make = functools.partial(function, *shape)
    unused: list[str] = []

    def build() -> nn.Module:
        module = make()
        for name, p in module.named_parameters():
            if name in unused:
                p.requires_grad_(False)
        return module

    flag = f"--model {s.model or called or 'make_model'}"
    try:
        module = seeded(s.seed, 0, make)
        if not isinstance(module, nn.Module):
            raise ValueError(f"gives a {type(module).__name__}, not a torch module")
        channels_last, unused = try_model(module, s, data)
        more = [seeded(s.seed, k, build) for k in (0, 1)]
        first, again, other = (kept(m) | fingerprints(m.state_dict()) for m in (module, *more))
        if odd := [k for k in first | again if first.get(k) != again.get(k)]:
            remedy = "differs when made again with one seed: draw from torch's generator"
            raise ValueError(f"{odd[0]} {remedy}")
    except Exception as e:  # whatever a function or a module of the user's may raise
        problem = one_line(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {one_line(e)}"
        if "deepcopy protocol" in problem:
            problem = "holds a computed weight (weight_norm, prune): use torch's parametrizations"
        raise UserError(f"{flag}: {problem}") from e
    if fixed := again == other:
        warn(f"{flag}: the initial weights are the same in every replicate")
    module = more[0]
    resnet = isinstance(module, ResNet)
    called = called or (options.model_name(s) if resnet else "")
    name = (called if called.isidentifier() else type(module).__name__).lower()
    if by_paper := resnet and not (handed_in.model or s.model or fixed):
        initialise_resnet(module, generator(s.seed, "init"))
    parameters, prunable = dict(module.named_parameters()), engine.prunable_parameters(module)
    trained = {k: p for k, p in parameters.items() if p.requires_grad}
    about = {
        "name": name,
        "parameters": sum(p.numel() for p in parameters.values()),
        "prunable": sum(parameters[k].numel() for k in prunable),
        "dense": [k for k, p in trained.items() if p.ndim > 1 and k not in prunable],
        "untrained": [k for k in parameters if k not in trained],
        "structure": structure(module),
        "weights": fingerprint(engine.on_cpu(module.state_dict())),
        "code": code,
    }
    return Model(name, build, channels_last, by_paper, about)


def kept(module: nn.Module, kinds: Any = bool | int | float | Tensor) -> dict[str, Any]:
    """What a module keeps beside its parameters and buffers, fingerprints by dotted name."""
    parts = ((name, k, v) for name, m in module.named_modules() for k, v in vars(m).items())
    found = {f"{name}.{k}".strip("."): v for name, k, v in parts if isinstance(v, kinds)}
    low = {k: v.float() for k, v in found.items() if getattr(v, "dtype", None) == torch.bfloat16}
    return fingerprints(found | low)  # NumPy has no bfloat16


def fingerprints(values: dict[str, Any]) -> dict[str, str]:
    return {k: fingerprint(v) for k, v in values.items()}


def try_model(module: nn.Module, s: Settings, data: Data) -> tuple[bool, list[str]]:
    """Trains a module on a batch, as rows do; whether it takes channels-last images, and its
    parameters without a gradient. ValueError for what would not be exact or not work."""
    at: dict[int, str] = {}
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(t):
            raise ValueError(f"{name} has no shape yet: lazy modules are not supported")
        weight = isinstance(t, nn.Parameter)
        if (weight or t.is_floating_point()) and t.dtype != torch.float32:
            raise ValueError(f"{name} is {t.dtype}: parameters and buffers must be float32")
        if weight and t.numel() and (other := at.setdefault(t.data_ptr(), name)) != name:
            raise ValueError(f"{name} shares the memory of {other}: make it the same parameter")
    for name, m in module.named_modules():
        if isinstance(m, engine.NORMS) and m.momentum is None:
            raise ValueError(f"{name}: BatchNorm with momentum=None counts its batches: give one")
    size, classes = engine.eval_batch_size(data.device), len(data.classes)
    bf16 = s.precision == "bf16"
    alone = any(len(y) % size == 1 for y in (data.train_labels, data.test_labels))

    def attempt(channels_last: bool, count: int = 2) -> list[str]:
        networks = Networks(module, 1, torch.device("cpu"), channels_last)
        networks.load(0, module.state_dict())
        x = engine.normalise(data, data.train_images[: min(s.batch_size, count)]).cpu()
        unused = try_batch(networks, x, data.train_labels[: len(x)].cpu(), classes, bf16)
        x = x[:1] if alone else x
        with torch.no_grad():
            logits = networks.modules[0].eval()(networks.arrange(x))
        check_logits(logits, len(x), classes, " in eval mode")
        many = unused and count == 2 < s.batch_size  # perhaps other images need them
        return attempt(channels_last, s.batch_size) if many else unused

    problem, plain = None, map(engine.is_plain, filter(engine.overruns, module.modules()))
    for channels_last in (True, False) if all(plain) else (False,):
        try:
            return channels_last, attempt(channels_last)
        except RuntimeError as e:  # `view` of a channels-last tensor, say
            problem = problem or e
    raise problem


def check_logits(logits: Any, count: int, classes: int, mode: str = "") -> None:
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if given != (count, classes):
        problem = f"for {count} images of {classes} classes{mode}, not logits ({count}, {classes})"
        raise ValueError(f"gives {given} {problem}")
    if (logits >= 0).all() and ((logits.float().sum(1) - 1).abs() < 1e-3).all():
        raise ValueError(f"gives probabilities (each row sums to 1){mode}, not logits")


def try_batch(networks: Networks, x: Tensor, labels: Tensor, classes: int, bf16: bool) -> list[str]:
    """The trained parameters of a network that the loss of a batch does not depend on."""
    [tried] = networks.bf16_modules() if bf16 else networks.modules
    saved, flags = tried.state_dict(), kept(tried, bool)
    counts = {k: b for k, b in tried.named_buffers() if not (k in saved and b.is_floating_point())}
    statistics = networks.statistics.clone()
    before = fingerprints(counts)
    others = random.getstate(), str(np.random.get_state())
    with torch.random.fork_rng(devices=[]):
        state, drawn = torch.get_rng_state(), []

        def note(part: nn.Module, inputs: Any, output: Any, name: str) -> None:
            if not torch.equal(torch.get_rng_state(), state):
                drawn.append(f"{name or 'the module'} ({type(part).__name__})")

        for name, part in tried.named_modules():
            part.register_forward_hook(functools.partial(note, name=name))
        images = networks.arrange(x.bfloat16() if bf16 else x)
        logits, once = tried(images), kept(tried)
        networks.statistics.copy_(statistics)  # saved, so that they may change
        again = tried(images)
    drawn += ["the module"] * (others != (random.getstate(), str(np.random.get_state())))
    if drawn:
        raise ValueError(f"{drawn[0]} uses randomness in forward(): exact resume is not supported")
    for k, v in fingerprints(counts).items():
        if v != before[k]:
            remedy = "buffers must be float32" if k in saved else "register it as persistent"
            raise ValueError(f"{k} ({counts[k].dtype}) changes in forward(): {remedy}")
    for k, v in kept(tried).items():
        if v != flags.get(k, v) or v != once.get(k, v):
            raise ValueError(f"{k} changes in forward() but is no buffer: it would not be saved")
    check_logits(logits, len(x), classes)
    if not torch.equal(logits.nan_to_num(), again.nan_to_num()):
        raise ValueError("gives other logits for the same images at a second call")
    trained = {k: p for k, p in tried.named_parameters() if p.requires_grad}
    if not trained or not logits.requires_grad:
        raise ValueError("its logits depend on no parameter that is trained")
    loss, own = F.cross_entropy(logits.float(), labels), {id(p) for p in trained.values()}
    if any(id(leaf) not in own for leaf in leaves(loss)):
        where = "that is none of its own parameters (of a closure, a list, a global)"
        raise ValueError(f"its logits depend on a trained tensor {where}")
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return [k for k, g in zip(trained, gradients, strict=True) if g is None]


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a gradient of `loss` would accumulate in."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


def check_data(s: Settings, data: Data) -> None:
    """UserError for settings that do not go with the data."""
    n, size = len(data.train_labels), getattr(s, "size", None)
    have = f"{data.name} has {n} training images"
    if s.batch_size > n:
        raise UserError(f"--batch-size {s.batch_size}: {have}")
    if options.needs_el2n(s) and options.scoring(s).batch_size > n:
        raise UserError(f"{have}, fewer than a batch of the networks of EL2N: give --scores")
    if size and size < s.batch_size:
        raise UserError(f"--size {size}: fewer than a batch (--batch-size {s.batch_size})")
    if size and s.offset + size > n:
        window = f"--size {size}" + f" from --offset {s.offset}" * bool(s.offset)
        raise UserError(f"{window}: {have}")


def set_numerics(bf16: bool, fast: bool) -> None:
    """cuDNN gives the same bits each time unless `fast`. float32 is float32 throughout; beside
    training in bfloat16 the convolutions of an evaluation round their factors to TF32 (11 bits)."""
    torch.backends.cudnn.deterministic = not fast
    torch.backends.cudnn.benchmark = fast
    torch.backends.cudnn.allow_tf32 = bf16 or fast
    torch.backends.cuda.matmul.allow_tf32 = fast


def prepare(s: Settings, stage: str | Path, handed_in: HandedIn = options.NOTHING) -> Study:
    """Loads the data, tries the model, refuses what cannot work, before anything is trained.
    `stage` is the file of the stage."""
    device = options.find_device(s.device)
    cuda = device.type == "cuda"
    if s.engine == "graph" and not cuda:
        raise UserError(f"--engine graph needs a CUDA device, not {device}")
    if s.fast and not cuda:
        warn("--fast: changes nothing on a CPU")
    auto = {"engine": "graph" if cuda else "eager", "precision": "bf16" if cuda else "fp32"}
    auto = {k: v for k, v in auto.items() if getattr(s, k) == "auto"}
    s = dataclasses.replace(s, device=str(device), fast=s.fast and cuda, **auto)
    set_numerics(s.precision == "bf16", s.fast)
    data = load_data(s, device, handed_in.data)
    check_data(s, data)
    model = find_model(s, data, handed_in)
    about = {"data": describe_data(data), "model": describe_model(model)}
    about |= {k: getattr(data, k).tolist() for k in ("scale", "shift")}
    code = options.code_identity(Path(stage).resolve())
    study = Study(s, data, model, code, about, on_log=handed_in.on_log)
    if getattr(s, "indices", None):
        flag, n = f"--indices {s.indices}", len(data.train_labels)
        indices = optional("inputs").read_indices(s.indices, n, flag)
        study = dataclasses.replace(study, indices=indices)
        if len(indices) < s.batch_size:
            raise UserError(f"{flag}: {len(indices)}, fewer than --batch-size {s.batch_size}")
    return study


def rank(study: Study) -> Study:
    """The study with the scores that its subset needs, made if they are missing."""
    ranked = options.is_ranked(study.settings)
    return dataclasses.replace(study, scores=read_scores(study)) if ranked else study


def describe_data(data: Data) -> str:
    counts = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
    size = "x".join(map(str, data.train_images.shape[1:]))
    return f"{data.name}: {counts} of {size}, {len(data.classes)} classes"


def describe_model(model: Model) -> str:
    about = model.about
    dense = about["dense"] + ["biases and norms"] * (about["prunable"] < about["parameters"])
    line = f"{about['name']}: {about['parameters']:,} parameters, {about['prunable']:,} prunable"
    line += f" (left dense: {', '.join(dense)})" * bool(dense)
    return line + f", not trained: {', '.join(about['untrained'])}" * bool(about["untrained"])


def announce(study: Study, *more: str) -> bool:
    """Prints the line that a stage starts with; whether it goes on (not with --dry-run)."""
    s, about = study.settings, study.about
    plan = f"preset {s.preset}, {s.steps} steps of {s.batch_size}, {s.precision} on {s.device}"
    if options.needs_el2n(s):
        made = options.scoring(s)
        scores = options.run_folder(made, "el2n", options.el2n_name(made), study.model.name)
        if runs.finished_result(scores) is None:
            plan += f"; scores first: {made.networks} networks x {made.score_step} steps"
    if not s.quiet or s.dry_run:
        runs.say("; ".join([about["data"], about["model"], plan, *more]))
    return not s.dry_run


# ---- pre-training: w_tr --------------------------------------------------------------------------

Track = Callable[[Training, list[Run]], Callable[[int], None] | None]


def pretrain(
    study: Study,
    rewind: int,
    group: list[Run],
    progress: tqdm,
    track: Track = lambda t, group: None,
) -> None:
    """Stage 2 (Section 3): pretrained.pt, w_tr of every run that lacks it: the initialisation after
    `rewind` steps at --pretrain-lr on the subset, and subset.npy. `track(training, group)` may set
    what a training reports and watches, and returns its observer."""
    s, data = study.settings, study.data
    todo = [run for run in group if run.load("pretrained.pt") is None]
    skip(progress, rewind * (len(group) - len(todo)))
    labels = noisy_labels(data, s.label_noise, s.seed)
    for part in engine.side_by_side(todo, "pretrain"):
        networks, streams = study.networks(len(part)), []
        for r, run in enumerate(part):
            networks.load(r, study.initial_state_dict(run.replicate))
            indices = choose_subset(study, labels, run.replicate)
            runs.write_array(run.folder / "subset.npy", indices.cpu().numpy())
            streams.append(study.stream(run.replicate, 0, indices, labels))
        training = study.training(networks, streams, 0, rewind, lambda step: s.pretrain_lr)
        observe = track(training, part) or (lambda step: None)
        engine.fit(training, part, "pretrain", progress, observe)
        accuracies, _ = engine.accuracy_and_loss(networks, data)
        for r, run in enumerate(part):
            known = {"diverged": networks.diverged[r].item(), "seconds": run.seconds}
            known["test_accuracy"] = accuracies[r] if known["diverged"] < 0 else None
            known["tracked"] = {k: v[r].cpu().clone() for k, v in training.extra.items()}
            run.save("pretrained.pt", study.start_from(networks.state(r), rewind, **known))
    for run in group:
        if (step := run.load("pretrained.pt")["diverged"]) >= 0:
            lower = f"lower --pretrain-lr ({s.pretrain_lr:g})"
            run.ended = f"pre-training diverged at step {step}: {lower}"


def about_start(run: Run) -> dict[str, Any]:
    """What result.json says of w_tr."""
    start = run.load("pretrained.pt")
    return {k: start[k] for k in ("step", "test_accuracy", "fingerprint", "seconds")}


def adopt(run: Run, start: dict[str, Any]) -> None:
    """Takes another's w_tr as the run's own; UserError if it has a different one."""
    mine = run.load("pretrained.pt")
    if mine and mine["fingerprint"] != start["fingerprint"]:
        raise UserError(f"{run.folder} began from another w_tr: {runs.REMEDIES}")
    if not mine:
        run.save("pretrained.pt", start)


def chance_accuracy(data: Data) -> float:
    """The test accuracy above which a network has learned something: that of always naming the
    most frequent class, and two standard errors."""
    n, share = len(data.test_labels), data.test_labels.bincount().max().item()
    return share / n + 2 * math.sqrt(share / n * (1 - share / n) / n)
