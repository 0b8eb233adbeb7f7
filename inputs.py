"""What users hand in as files: networks, masks, indices and scores.

Each reader raises a UserError of one line that says what it found and what was expected. `source`
names the flag and the file in these lines, as in "--init weights.pt".
"""

import argparse
import collections
import contextlib
import pathlib
import re
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import engine
import runs
from runs import UserError, one_line

# ---- what a file is ------------------------------------------------------------------------------

TORCH, NPY, NPZ, TEXT = "a torch.save file", "an .npy array", "an .npz archive", "a text file"
SAFETENSORS, TORCHSCRIPT = "a safetensors file", "a TorchScript archive"
FIRST_BYTES = {
    b"\x93NUMPY": NPY,
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": TORCH,  # of torch before 1.6
    b"\x80": "a pickle that torch.save did not write",
    b"\x1f\x8b": "a gzip archive",
    b"\xff\xfe": "a text file in UTF-16, not UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<": "a web page, not the file itself",
}

# Plain values that scripts keep beside the weights (numpy 1 and Python 3.13 name some differently).
# torch.load(weights_only=True) refuses them by default; building them runs no code.
ARRAYS = {n: getattr(np._core.multiarray, n) for n in ("scalar", "_reconstruct")}
HARMLESS = [argparse.Namespace, types.SimpleNamespace, collections.defaultdict]
HARMLESS += [pathlib.PosixPath, (pathlib.PosixPath, "pathlib._local.PosixPath")]
HARMLESS += [np.ndarray, np.dtype, *{type(np.dtype(c)) for c in "?bhilqBHILQefdUS"}]
HARMLESS += [*ARRAYS.values(), *((f, f"numpy.core.multiarray.{n}") for n, f in ARRAYS.items())]


def kind_of(path: Path, source: str) -> str:
    """What a file is, by its content; its name decides nothing."""
    if not path.is_file():  # a pipe would wait for its writer
        problem = "is a folder" if path.is_dir() else "is not a regular file"
        raise UserError(f"{source} {problem if path.exists() else 'does not exist'}")
    with open(path, "rb") as f:
        head = f.read(512)
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.split("/")[-1] for name in archive.namelist()}
        except Exception:  # zipfile has one for each kind of damage; torch.load will say so
            return TORCH
        if "data.pkl" in names:
            return TORCHSCRIPT if "constants.pkl" in names else TORCH
        return NPZ if names and all(n.endswith(".npy") for n in names) else "a zip archive"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return SAFETENSORS
    for first, kind in FIRST_BYTES.items():
        if head.startswith(first):
            return kind
    if head and not re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        return TEXT
    return "damaged, or of an unknown kind" if head else "an empty file"


def load(path: Path, source: str, *more_kinds: str) -> tuple[Any, bool]:
    """What a torch.save file or a .safetensors holds, or an .npz where `more_kinds` has it, and
    whether these scripts wrote it (then its checksum is right)."""
    kind = kind_of(path, source)
    if kind == TORCHSCRIPT:
        instead = f'torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pt")'
        raise UserError(f"{source} is {kind}; save only the weights: {instead}")
    if kind not in (TORCH, SAFETENSORS, *more_kinds):
        remedy = '; expected a file written by torch.save(model.state_dict(), "weights.pt")'
        raise UserError(f"{source} is {kind}{remedy * (':' not in kind)}")
    try:
        if kind == NPZ:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays), False
        if kind == SAFETENSORS:
            from safetensors.torch import load_file

            return load_file(path), False
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(HARMLESS):
            content = runs.load_tensors(path)
        ours = isinstance(content, dict) and "sha256" in content
        return runs.checked_tensors(path, content) if ours else content, ours
    except ImportError as e:
        raise UserError(f"{source} is {kind}: pip install safetensors") from e
    except UserError as e:
        problem = refused_class(path, e) or str(e).removeprefix(str(path)).strip()
        raise type(e)(f"{source} {problem}") from e
    except Exception as e:  # zipfile, numpy and safetensors have an exception each for damage
        raise UserError(f"{source} is damaged ({one_line(e)[:80]})") from e


def refused_class(path: Path, error: UserError) -> str:
    """What a file has pickled that torch.load(weights_only=True) refuses, and what to run instead;
    "" for any other error."""
    if not (refused := re.search(r"GLOBAL (\S+)", str(error.__cause__))):
        return ""
    if b"torch.nn.modules." in path.read_bytes():  # the pickle itself is not compressed
        what, instead = "is a pickled module", "model.state_dict()"
    else:
        what = "contains pickled objects"
        instead = f'torch.load("{path.name}", weights_only=False)["state_dict"]'
    remedy = f'save only the weights: torch.save({instead}, "weights.pt")'
    return f"{what} ({refused[1]}), which can run code when loaded; if you trust it, {remedy}"


def listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


# ---- networks ------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A network from a file: `state` float32 under the names wanted; `masks` bool by layer, or None
    for a dense one; `about`, what else one of our own files says, {} for others."""

    state: dict[str, Tensor]
    masks: dict[str, Tensor] | None
    about: dict[str, Any]


class Group(NamedTuple):
    """Tensors of one dict in a file under one prefix of their names: `where` is their dotted
    keys and prefix, `keys` their names in the dict, `outside` the other names there."""

    where: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    outside: list[str]


# What DataParallel, torch.compile, FSDP, checkpointing and Fabric insert, anywhere in a name.
WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module"}
WRAPPERS |= {"_checkpoint_wrapped_module"}
# Counters, no weights: of BatchNorm, AveragedModel and a profiler (thop).
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
AVERAGED = re.compile(r"(?i)(^|[\W_])(ema|swa|avg|averaged?|shadow)([\W_]|$)|^ema|ema$")


def canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def dicts_of_tensors(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Every dict that has tensors (or arrays) under names, however nested, and its dotted keys."""
    if not isinstance(content, dict | list | tuple) or len(keys) > 8:
        return
    items = list(content.items() if isinstance(content, dict) else enumerate(content))
    arrays = {k: v for k, v in items if isinstance(v, np.ndarray) and v.dtype.kind in "fiub"}
    arrays = {k: v for k, v in arrays.items() if v.itemsize <= 8}  # no long double
    native = {k: v.astype(v.dtype.newbyteorder("="), order="C") for k, v in arrays.items()}
    tensors = {k: v.detach() for k, v in items if isinstance(v, Tensor) and not v.is_meta}
    tensors = {k: v if v.layout == torch.strided else v.to_dense() for k, v in tensors.items()}
    tensors |= {k: torch.from_numpy(v) for k, v in native.items()}
    if named := {k: v for k, v in tensors.items() if isinstance(k, str)}:
        yield ".".join(keys), {k: v for k, v in named.items() if k.split(".")[-1] not in COUNTERS}
    for key, value in items:
        yield from dicts_of_tensors(value, (*keys, str(key)))


def groups(where: str, tensors: dict[str, Tensor], wanted: dict) -> list[Group]:
    """The tensors under each dotted prefix below which any of the wanted names stands, by the
    names wanted where they have one."""
    plain, names = {canonical(n): n for n in wanted}, {canonical(n): n for n in tensors}
    if len(names) < len(tensors) or len(plain) < len(wanted):  # "module" tells names apart here
        plain, names = {n: n for n in wanted}, {n: n for n in tensors}
    prefixes: collections.Counter[str] = collections.Counter()
    for parts in (name.split(".") for name in names):
        for k in range(len(parts)):
            prefixes["".join(f"{p}." for p in parts[:k])] += ".".join(parts[k:]) in plain
    found = []
    for prefix in [p for p, n in prefixes.items() if n] or [""]:
        inside = {n.removeprefix(prefix): k for n, k in names.items() if n.startswith(prefix)}
        keys = {plain.get(n, n): k for n, k in inside.items()}
        outside = [k for n, k in names.items() if not n.startswith(prefix)]
        full = ".".join(filter(None, (where, prefix[:-1])))
        found.append(Group(full, {n: tensors[k] for n, k in keys.items()}, keys, outside))
    return found


def pruned_name(key: str) -> str:
    """The parameter of which a buffer `key` is the mask, for torch.nn.utils.prune, for torch.ao and
    for plain dicts; any other name as it is."""
    return re.sub(r"parametrizations\.(\w+)\.0\.mask$|[_.]mask$", r"\1", key)


def merge_pruning(source: str, tensors: dict[str, Tensor]) -> tuple[dict, dict]:
    """torch's pruning buffers as weights, zero where pruned; and their masks, bool, by weight."""
    merged, masks = dict(tensors), {}
    for key, mask in tensors.items():
        name = pruned_name(key)
        for original in (f"{name}_orig", key.removesuffix("0.mask") + "original"):
            if name != key and original in tensors:
                if problem := mask_problem(mask, tensors[original].shape):
                    raise UserError(f"{source}: {key} {problem}")
                masks[name] = mask.bool()
                merged[name] = torch.where(masks[name], merged.pop(original), 0)
                del merged[key]
    return merged, masks


def misfit(found: dict[str, Tensor], wanted: dict[str, torch.Size]) -> str:
    """What is wrong with tensors that should be the network wanted, in words; "" if nothing is."""
    lacking, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    other = [n for n in wanted if n in found and found[n].shape != wanted[n]]
    holds, shapes = f"has {len(found)} tensors", {n: t.shape for n, t in found.items()}
    theirs, ours = describe_resnet(shapes), describe_resnet(wanted)
    if not (lacking or extra or other):
        return ""
    if theirs and ours and theirs != ours:
        flags = [f"--{f} {theirs[f]}" for f in ("depth", "width") if theirs[f] != ours[f]]
        text = "ResNet-{depth} of width {width}, {channels} channels, {classes} classes".format_map
        remedy = f": give {' '.join(flags)}" if flags else ""
        return f"contains a {text(theirs)}; this network is a {text(ours)}{remedy}"
    if len(lacking) == len(wanted):
        return f"{holds} ({listed(found)}), none of this network's {len(wanted)} ({listed(wanted)})"
    for name in other[:1]:
        a, b = tuple(found[name].shape), tuple(wanted[name])
        head = name == [n for n, s in wanted.items() if len(s) > 1][-1] and a[1:] == b[1:]
        outputs = f": a classifier with {a[0]} outputs instead of {b[0]}" if head else ""
        return f"{holds}, of which {name} is {a}, this network's {b}{outputs}"
    for name in lacking:
        module, _, leaf = name.rpartition(".")
        stems = (f"{module}.parametrizations.{leaf}.", f"{name}_")
        if inner := [n for n in extra if n.startswith(stems)]:
            remedy = "torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm"
            return f"has {name} parametrized as {listed(inner)}: before saving, run {remedy}"
    problems = [f"missing {listed(lacking)}"] * bool(lacking)
    problems += [f"unexpected {listed(extra)}"] * bool(extra)
    return f"{holds}, this network has {len(wanted)}: {'; '.join(problems)}"


def describe_resnet(shapes: dict[str, torch.Size]) -> dict[str, int] | None:
    """Depth, width, channels and classes of our ResNet, by its names and shapes; else None."""
    blocks = sum(bool(re.fullmatch(r"blocks\.\d+\.conv1\.weight", n)) for n in shapes)
    stem, head = shapes.get("stem.0.weight", ()), shapes.get("head.weight", ())
    if len(stem) != 4 or len(head) != 2 or not blocks:
        return None
    known = {"depth": 2 * blocks + 2, "width": stem[0], "channels": stem[1], "classes": head[0]}
    return known if head[1] == 4 * stem[0] else None


def only_one(source: str, fitting: list[Group], what: str) -> Group:
    """The only candidate: equal ones count once, and averaged weights (EMA, SWA) are passed over
    for the trained ones, with a line; UserError where several remain."""
    different: list[Group] = []
    for g in fitting:
        pairs = ([(t, d.tensors.get(n, t)) for n, t in g.tensors.items()] for d in different)
        if not any(all(torch.equal(a, b) for a, b in pair) for pair in pairs):
            different.append(g)
    trained = [g for g in different if not AVERAGED.search(g.where)]
    if len(different) > 1 and len(trained) == 1:
        left = listed(g.where for g in different if g not in trained)
        runs.warn(f'{source}: using "{trained[0].where}", not the averaged weights "{left}"')
        return trained[0]
    if len(different) > 1:
        names = listed((g.where or "the outermost" for g in different), 6)
        raise UserError(
            f"{source} contains several matching {what} ({names}): save only the intended one"
        )
    return different[0]


def as_float32(source: str, name: str, values: Tensor) -> Tensor:
    """A copy in float32; buffers of whole numbers (an index table) stay what they are."""
    weight = re.search(r"(weight|bias|running_)\w*$", name) or values.is_quantized
    if weight and (values.is_quantized or not values.is_floating_point()):
        raise UserError(f"{source}: {name} is {values.dtype}, expected floating-point weights")
    values = values.float() if values.is_floating_point() else values
    if not values.isfinite().all():
        worst = "NaN" if values.isnan().any() else "infinite values (as float32)"
        raise UserError(f"{source}: {name} contains {worst}")
    return values.clone(memory_format=torch.contiguous_format)


def read_network(
    path: Path, wanted: dict[str, torch.Size], prunable: dict[str, str], source: str = ""
) -> Network:
    """The network of a .pt or .safetensors, ours or anyone's.

    It is the dict of tensors in the file, under whatever keys and prefix, that has just the names
    and shapes `wanted` (a state_dict's without num_batches_tracked); `only_one` decides between
    several. `prunable` gives the parameter of each of our layers. Masks come from our files, from a
    dict under a key like "mask", or from torch's pruning buffers; weights outside become zero.
    """
    source = source or str(path)
    content, ours = load(path, source)
    about = {}
    if ours:
        about = {k: v for k, v in content.items() if k not in ("model", "mask", "file")}
        content = {k: content[k] for k in ("model", "mask") if k in content}
    for key in ("mask", "masks"):
        value = content.get(key) if isinstance(content, dict) else None
        if value and not isinstance(value, dict):
            raise UserError(f'{source}: "{key}" is not a dict of masks by layer')
    candidates, pruned, masks, mask_dicts = [], {}, {}, []
    layers = {layer: wanted[name] for layer, name in prunable.items()}
    for where, tensors in dicts_of_tensors(content):
        if is_mask(where) or names_masks(tensors, layers):
            mask_dicts.append((where, tensors))
            continue
        if not any(n.endswith(("_orig", ".original")) for n in wanted):
            tensors, masks = merge_pruning(source, tensors)
        for g in groups(where, tensors, wanted):
            candidates.append(g)
            pruned[g.where] = {n: masks[k] for n, k in g.keys.items() if k in masks}
    if not candidates:
        problem = f"contains no network (found {contents(content)})"
        if ours:
            problem = "is not pretrained.pt or levelNN.pt of a run, which contain networks"
        raise UserError(f"{source} {problem}")
    fitting = [g for g in candidates if not misfit(g.tensors, wanted)]
    if not fitting:
        best = max(candidates, key=lambda g: len(g.tensors.keys() & wanted.keys()))
        where = f': "{best.where}"' if best.where else ""
        raise UserError(f"{source}{where} {misfit(best.tensors, wanted)}")
    fitting.sort(key=lambda g: not pruned[g.where])  # of equal ones the one that has masks
    chosen = only_one(source, fitting, "networks")
    if chosen.outside:
        runs.warn(f"{source}: ignoring tensors outside the network: {listed(chosen.outside)}")
    if any(chosen.tensors[n].dtype == torch.float64 for n in wanted):
        runs.warn(f"{source}: float64 weights are rounded to float32")
    state = {n: as_float32(source, n, chosen.tensors[n]) for n in wanted}
    buffers = pruned[chosen.where]
    masks = None
    if mask_dicts:
        masks = choose_masks(source, mask_dicts, layers)
    elif buffers:
        ones = {layer: torch.ones(shape, dtype=torch.bool) for layer, shape in layers.items()}
        masks = ones | {k: buffers[n] for k, n in prunable.items() if n in buffers}
        if others := buffers.keys() - {*prunable.values()}:
            runs.warn(
                f"{source}: {listed(sorted(others))} masked in the file but not prunable here"
            )
    apply_masks(source, state, masks, prunable)
    return Network(state, masks, about)


def apply_masks(source: str, state: dict, masks: dict | None, prunable: dict[str, str]) -> None:
    """Sets weights outside the masks to zero; warns of those, and of zeros that no mask keeps."""
    weights = [state[n] for n in prunable.values()]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    if masks is None and zeros > total / 100:
        runs.warn(
            f"{source}: {zeros} of {total} prunable weights are zero, but no mask keeps them so"
        )
    cut = 0
    for layer, mask in (masks or {}).items():
        w = state[prunable[layer]]
        cut += int((w[~mask] != 0).sum())
        w[~mask] = 0
    if cut:
        runs.warn(f"{source}: {cut} nonzero weights outside the mask were set to zero")


def contents(value: Any) -> str:
    kind, size = type(value).__name__, f" of length {len(value)}" * hasattr(value, "__len__")
    keys = f" with {listed(map(str, value))}" if isinstance(value, dict) and value else ""
    return f"a {kind}{size}{keys}"


# ---- masks ---------------------------------------------------------------------------------------


def is_mask(where: str) -> bool:
    """Whether a dict at these dotted keys, or one around it, is called masks."""
    *around, key = where.lower().split(".")
    return "mask" in key or not {"mask", "masks"}.isdisjoint(around)


def by_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"(^|\.)weight$", "", pruned_name(k)): t for k, t in tensors.items()}


def names_masks(tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> bool:
    """Whether a dict under any key has booleans for our layers, and nothing else."""
    found = groups("", by_layer(tensors), shapes)
    named = any(g.tensors.keys() & shapes.keys() for g in found)
    return named and all(t.dtype == torch.bool for t in tensors.values())


def mask_problem(mask: Tensor, shape: torch.Size | None) -> str:
    """What is wrong with a mask, in words; "" for values of 0 and 1 in the right shape."""
    if shape is not None and mask.shape != shape:
        return f"is {tuple(mask.shape)}, its weight {tuple(shape)}"
    good = mask.dtype == torch.bool or ((mask == 0) | (mask == 1)).all()
    return "" if good else "is not a mask: it has values other than 0 and 1"


def masks_misfit(found: dict[str, Tensor], shapes: dict[str, torch.Size]) -> str:
    """What is wrong with tensors that should be the masks of all layers; "" if nothing is."""
    lacking = [n for n in shapes if n not in found]
    if len(lacking) == len(shapes):
        return f"has no mask of this network: it has {listed(found)}, not {listed(shapes)}"
    if lacking:
        return f"has no mask for {listed(lacking)}"
    for name, mask in found.items():
        if problem := mask_problem(mask, shapes.get(name)):
            return f"has a tensor for {name} that {problem}"
        if name not in shapes and not mask.bool().all():
            return f"has a mask for {name}, which is not prunable"
    return ""


def choose_masks(source: str, dicts: list, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Masks (bool) by layer, from dicts that have them by layer or weight; see `masks_misfit`."""
    found = []
    for where, tensors in dicts:
        found += groups(where, by_layer(tensors), shapes)
    fitting = [g for g in found if not masks_misfit(g.tensors, shapes)]
    if not fitting:
        best = max(found, key=lambda g: len(g.tensors.keys() & shapes.keys()))
        raise UserError(f"{source} {masks_misfit(best.tensors, shapes)}")
    where, chosen, *_ = only_one(source, fitting, "masks")
    if re.search(r"(?i)(^|[._])(pruned|dead|removed)$", where):
        problem = f'"{where}" may be true where a weight is pruned'
        raise UserError(
            f'{source}: {problem}: save masks that are true where it is alive as "mask"'
        )
    if dead := [layer for layer in shapes if not chosen[layer].any()]:
        raise UserError(f"{source} prunes every weight of {listed(dead)}")
    return {layer: chosen[layer].bool().clone() for layer in shapes}


def read_mask(path: Path, shapes: dict[str, torch.Size], source: str = "") -> dict[str, Tensor]:
    """Masks (bool, True where a weight is alive) by layer from our levelNN.pt, a .pt, .safetensors
    or .npz of 0s and 1s by layer or weight, or torch's pruning buffers."""
    source = source or str(path)
    content, _ = load(path, source, NPZ)
    dicts, chosen = list(dicts_of_tensors(content)), []
    for where, tensors in dicts:  # beside buffers, a weight that has none is dense
        names = [k for k in tensors if k.endswith("mask")]
        ones = {k: torch.ones(t.shape, dtype=torch.bool) for k, t in tensors.items()}
        chosen += [(where, ones | {k: tensors[k] for k in names})] * bool(names)
    chosen = [d for d in dicts if is_mask(d[0])] or chosen or dicts
    if not chosen:
        raise UserError(f"{source} contains no mask (found {contents(content)})")
    return choose_masks(source, chosen, shapes)


# ---- for a study ---------------------------------------------------------------------------------


def read_starts(
    study: Any,
    flag: str,
    path: Path,
    replicates: Iterable[int],
    rewind: int | None,
    mask: Path | None = None,
) -> dict[int, dict[str, Any]]:
    """By replicate, w_tr from a pretrained.pt, or rep<k>/pretrained.pt in a folder, or a file with
    anyone's network and the step `rewind` it was trained to, under the file's own mask or `mask`;
    UserError where one does not fit the data, the model, the step or the others."""
    s, data, starts = study.settings, study.data, {}
    for replicate in replicates:
        file = start_file(path, replicate)
        source = f"{flag} {file}"
        networks = study.networks(1)
        network = network_of(study, file, source)
        about = network.about
        step, problem = about.get("step", rewind), ""
        if step is None:
            problem = "give --rewind, the step it was trained to"
        elif about.get("data", data.fingerprint) != data.fingerprint:
            problem = f"made from other data than {data.name}"
        elif rewind not in (None, step):
            problem = f"trained for {step} steps, not --rewind {rewind}"
        elif about.get("diverged", -1) >= 0:
            problem = f"diverged at step {about['diverged']}"
        elif step >= s.steps:
            problem = f"trained to step {step} of --steps {s.steps}"
        if problem:
            raise UserError(f"{source}: {problem}")
        masks = mask_of(mask, networks) if mask else network.masks
        networks.load(0, network.state, masks)
        accuracy = about.get("test_accuracy") if not mask else None
        if accuracy is None:
            accuracy = engine.accuracy_and_loss(networks, data)[0][0]
        start = study.start_from(networks.state(0), step, masks, test_accuracy=accuracy)
        starts[replicate], rewind = start | {"seconds": about.get("seconds", 0.0)}, step
    return starts


def start_file(path: Path, replicate: int) -> Path:
    """What holds w_tr of a replicate: of a folder its rep<k>/pretrained.pt."""
    return path / f"rep{replicate}" / "pretrained.pt" if path.is_dir() else path


def step_of(path: Path, replicate: int) -> int:
    """The step that one of our pretrained.pt was trained to."""
    return runs.read_tensors(start_file(path, replicate))["step"]


def mask_of(path: Path, networks: engine.Networks) -> dict[str, Tensor]:
    """The masks by layer of --mask."""
    shapes = {name: view.shape for name, view in networks.layers.items()}
    return read_mask(path, shapes, f"--mask {path}")


def network_of(study: Any, file: Path, source: str) -> Network:
    """The network of a file, ours or anyone's, under the names of the study's model."""
    module = study.model.build()
    wanted = {k: v.shape for k, v in module.state_dict().items()}
    wanted = {k: v for k, v in wanted.items() if not k.endswith("num_batches_tracked")}
    prunable = {engine.layer_name(k): k for k in engine.prunable_parameters(module)}
    network = read_network(file, wanted, prunable, source)
    with contextlib.suppress(UserError):  # a level or a child: its run says what it was trained on
        if network.about and "data" not in network.about:
            settings = runs.read_json(file.with_name("config.json"), "settings")["settings"]
            network.about["data"] = settings["data"]
    return network


# ---- indices and scores --------------------------------------------------------------------------


def read_array(path: Path, source: str, kind: str, wanted: str) -> np.ndarray:
    if kind != NPY:
        raise UserError(f"{source} is {kind}; expected {wanted}")
    try:
        array = runs.read_npy(path)
    except UserError as e:
        raise UserError(f"{source} {str(e).removeprefix(str(path)).strip()}") from e
    return array.astype(array.dtype.newbyteorder("="), order="C")


def read_indices(path: Path, n: int, source: str = "") -> np.ndarray:
    """Indices (M,) int64, ascending, of training examples among `n`: from an .npy of whole numbers
    or of n booleans, or from text with one index a line and comments after #."""
    source, kind = source or str(path), kind_of(path, source or str(path))
    if kind == TEXT:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        words = [line.split("#")[0].strip() for line in lines]
        for number, word in enumerate(words, 1):
            if word and not re.fullmatch(r"[+-]?[0-9]{1,18}", word):
                problem = f"line {number} is {word[:40]!r}, not an integer"
                raise UserError(f'{source}: {problem} (np.savetxt needs fmt="%d")')
        values = np.array([int(word) for word in words if word], np.int64)
    else:
        values = read_array(path, source, kind, "an .npy, or text with one index a line")
    if values.ndim != 1:
        raise UserError(f"{source} is an array of shape {values.shape}, expected (M,)")
    if values.dtype == bool:
        if len(values) != n:
            raise UserError(
                f"{source} is a boolean mask of length {len(values)}, but there are {n} examples"
            )
        values = np.flatnonzero(values)
    if values.dtype.kind not in "iu":
        raise UserError(f"{source} is {values.dtype}, expected integers")
    if not len(values):
        raise UserError(f"{source} contains no indices")
    if values.min() < 0 or values.max() >= n:
        bad = values[(values < 0) | (values >= n)][0]
        raise UserError(f"{source} contains index {bad}; valid indices are 0 to {n - 1}")
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) < len(values):
        hint = ": a mask must be saved as bool" if len(values) == n and unique[-1] <= 1 else ""
        repeated = f"index {unique[counts.argmax()]} {counts.max()} times"
        raise UserError(f"{source} contains {repeated}{hint}")
    return unique.astype(np.int64)


def check_scores_file(path: Path, n: int) -> np.ndarray:
    """Scores (n,) of the training examples from an .npy; larger is harder, infinite is allowed."""
    source = f"--scores {path}"
    kind = kind_of(path, source)
    scores = read_array(path, source, kind, "an .npy with a score for each example")
    whole = scores.dtype.kind in "iu" and scores.ndim == 1
    if scores.dtype.kind not in "fiu" or scores.shape != (n,):
        hint = "; pass indices with --indices" if whole else ""
        expected = f"expected one score for each of {n} examples{hint}"
        raise UserError(f"{source} is {scores.dtype} {scores.shape}, {expected}")
    if np.isnan(scores).any():
        raise UserError(f"{source}: example {np.isnan(scores).argmax()} has no score (NaN)")
    if whole and n > 1 and np.array_equal(np.sort(scores), np.arange(n)):
        problem = f"is a permutation ({scores.dtype}), like the result of argsort; expected scores"
        raise UserError(f"{source} {problem} (save ranks as float32)")
    return scores


def scores_of(study: Any, path: Path) -> np.ndarray:
    """The scores of --scores (N,), and what scores.json beside them says, checked for a study."""
    s, data = study.settings, study.data
    noise = [s.label_noise, s.seed if s.label_noise else 0]
    scores = check_scores_file(path, len(data.train_labels))
    beside, problem = path.with_suffix(".json"), None
    if not beside.exists():
        return scores
    about = runs.read_json(beside, "metric")
    if about.get("sha256_of_scores") != runs.fingerprint(scores):
        problem = f"damaged, its checksum in {beside.name} differs"
    elif about.get("data") != data.fingerprint:
        problem = f"made from other data than {data.name}"
    elif about.get("label_noise", noise) != noise:
        problem = "made under other labels (--label-noise, --seed)"
    if problem:
        raise UserError(f"--scores {path}: {problem}")
    if about.get("model", study.model.about)["structure"] != study.model.about["structure"]:
        runs.warn(f"--scores {path}: made by {about['model']['name']}, not by {study.model.name}")
    return scores
