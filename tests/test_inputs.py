"""Networks, masks, indices and scores in the forms in which people save them, each
against the tensors they were made from; and the one line for what cannot be read."""

import argparse
import collections
import copy
import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401  before torch
import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import inputs
import runs
from runs import UserError


def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, by its specification; skips the test without the package to read it."""
    pytest.importorskip("safetensors")
    names = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
    header, data = {}, b""
    for k, v in tensors.items():
        span = [len(data), len(data) + v.nbytes]
        header[k] = {"dtype": names[v.dtype], "shape": [*v.shape], "data_offsets": span}
        data += v.contiguous().numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


class Net(nn.Module):
    """Conv1d and LSTM weights, a frozen scale, BatchNorm statistics, a head."""

    def __init__(self, width=3, classes=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(2, width, 3), nn.BatchNorm1d(width))
        self.lstm = nn.LSTM(width, 2)
        self.head = nn.Linear(2, classes)


PRUNABLE = {"features.0": "features.0.weight", "lstm.weight_ih_l0": "lstm.weight_ih_l0"}
PRUNABLE |= {"lstm.weight_hh_l0": "lstm.weight_hh_l0", "head": "head.weight"}


def weights(seed: int, **more) -> dict[str, torch.Tensor]:
    """A state_dict with no zero and no two equal numbers, none of them a module's initial ones."""
    draw, state = np.random.default_rng(seed), Net(**more).state_dict()
    return {k: torch.tensor(draw.random(v.shape) + 0.5).to(v.dtype) for k, v in state.items()}


STATE = weights(0)
WANTED = {k: v.shape for k, v in STATE.items() if not k.endswith("num_batches_tracked")}
SHAPES = {layer: WANTED[name] for layer, name in PRUNABLE.items()}
MASKS = {
    layer: torch.tensor(np.random.default_rng(k).random(shape) < 0.5)
    for k, (layer, shape) in enumerate(SHAPES.items())
}
PRUNED = STATE | {n: STATE[n] * MASKS[k] for k, n in PRUNABLE.items()}
BEGUN = weights(1)


def with_prefix(prefix: str, state: dict = STATE) -> dict:
    return {prefix + k: v for k, v in state.items()}


def renamed(old: str, new: str) -> dict:
    return {k.replace(old, new): v for k, v in STATE.items()}


def optimizer() -> dict:
    model = Net()
    model.load_state_dict(STATE)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    sgd.step()
    return sgd.state_dict()


def torch_pruned(*layers: str) -> dict:
    """A state_dict of torch.nn.utils.prune with MASKS, whose originals are STATE."""
    model = Net()
    model.load_state_dict(STATE)
    for layer in layers:
        module, _, leaf = PRUNABLE[layer].rpartition(".")
        mask = MASKS[layer].float()
        torch.nn.utils.prune.custom_from_mask(model.get_submodule(module), leaf, mask)
    state = model.state_dict()
    assert not layers or f"{PRUNABLE[layers[0]]}_orig" in state
    return state


def averaged() -> dict:
    """torch.optim.swa_utils.AveragedModel's state_dict, of one update: the weights themselves."""
    model = Net()
    model.load_state_dict(STATE)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average.state_dict()


def sparsified() -> dict:
    """A state_dict of torch.ao.pruning: parametrizations that hold a mask."""
    state = dict(STATE)
    for layer, name in PRUNABLE.items():
        module, _, leaf = name.rpartition(".")
        state[f"{module}.parametrizations.{leaf}.original"] = state.pop(name)
        state[f"{module}.parametrizations.{leaf}.0.mask"] = MASKS[layer].float()
    return state


FORMS = {
    "plain": STATE,
    "ordered": collections.OrderedDict(STATE),
    "dataparallel": with_prefix("module."),
    "compiled": with_prefix("_orig_mod."),
    "ddp of compiled": with_prefix("module._orig_mod."),
    "features wrapped": renamed("features.", "features.module."),
    "fsdp": renamed("head.", "head._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "net": {"net": STATE, "acc": 93.1, "epoch": 7},
    "imagenet": {"epoch": 1, "arch": "x", "state_dict": with_prefix("module."), "best_acc1": 1.0},
    "nanogpt": {"model": with_prefix("_orig_mod."), "optimizer": optimizer(), "iter_num": 5},
    "lightning": {"state_dict": with_prefix("model."), "callbacks": {"a": {"best": 1}}},
    "simclr": {"state_dict": with_prefix("backbone.")},
    "nested": {"state_dict": {"state_dict": STATE}, "state": {"a": [1, {"b": "c"}]}},
    "namespace": {"model": STATE, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "numpy values": {"net": STATE, "acc": np.float64(0.9), "history": np.arange(3.0)},
    "numpy weights": {"w": {k: v.numpy() for k, v in STATE.items()}},
    "parameters": {k: nn.Parameter(v) for k, v in STATE.items() if v.is_floating_point()},
    "profiled": {**STATE, "total_ops": torch.zeros(1), "features.total_params": torch.zeros(1)},
    "ema": {"model": STATE, "model_ema": BEGUN},
    "timm": {"state_dict": STATE, "state_dict_ema": BEGUN, "version": 2},
    "yolo": {"ema": BEGUN, "model": STATE},
    "averaged alone": averaged(),
    "best is last": {"last": STATE, "best": copy.deepcopy(STATE)},
    "list": {"models": [STATE]},
    "double": {k: v.double() for k, v in STATE.items()},
}


def read(path: Path, content=None, **more) -> inputs.Network:
    if content is not None:
        torch.save(content, path)
    return inputs.read_network(path, WANTED, PRUNABLE, "--init it", **more)


def assert_equal(found: dict, expected: dict) -> None:
    assert list(found) == [k for k in WANTED if k in found]
    for k, v in found.items():
        assert v.dtype == torch.float32 and torch.equal(v, expected[k]), k
    assert found.keys() == WANTED.keys()


def assert_masks(found: dict, expected: dict = MASKS) -> None:
    assert list(found) == list(SHAPES)
    for k, v in found.items():
        assert v.dtype == torch.bool and torch.equal(v, expected[k]), k


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_network(tmp_path, form, capsys):
    network = read(tmp_path / "a.pt", FORMS[form])
    assert_equal(network.state, STATE)
    assert network.masks is None and network.about == {}
    line = {"ema": 'using "model", not the averaged weights "model_ema"', "double": "rounded to"}
    line |= {"timm": 'using "state_dict", not', "yolo": 'using "model", not'}
    assert line.get(form, "") in capsys.readouterr().err


def test_format_before_torch_1_6(tmp_path):
    torch.save({"net": STATE}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_equal(read(tmp_path / "a.pt").state, STATE)


def test_safetensors(tmp_path, monkeypatch):
    save_file(with_prefix("model."), tmp_path / "any-name")
    assert_equal(read(tmp_path / "any-name").state, STATE)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="--init it is a safetensors file: pip install safetensors"):
        read(tmp_path / "any-name")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_short_floats_are_exact(tmp_path, dtype):
    short = {k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}
    assert_equal(read(tmp_path / "a.pt", short).state, {k: v.float() for k, v in short.items()})


def test_sparse_layout(tmp_path, capsys):
    sparse = PRUNED | {"head.weight": PRUNED["head.weight"].to_sparse()}
    assert_equal(read(tmp_path / "a.pt", sparse).state, PRUNED)
    masks = torch.cat([m.flatten() for m in MASKS.values()])
    line = f"{int((~masks).sum())} of {len(masks)} prunable weights are zero, but no mask keeps"
    assert f"--init it: {line} them so" in capsys.readouterr().err


# ---- with masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["all", "some", "wrapped", "sparsified"])
def test_torch_pruning_buffers(tmp_path, form, capsys):
    layers = ["head"] if form == "some" else PRUNABLE
    content = sparsified() if form == "sparsified" else torch_pruned(*layers)
    content = {"state_dict": with_prefix("module.", content)} if form == "wrapped" else content
    network = read(tmp_path / "a.pt", content)
    ones = {k: torch.ones(s, dtype=torch.bool) for k, s in SHAPES.items()}
    masks = ones | {k: MASKS[k] for k in layers}
    assert_equal(network.state, STATE | {n: STATE[n] * masks[k] for k, n in PRUNABLE.items()})
    assert_masks(network.masks, masks)
    assert capsys.readouterr().err == ""  # originals are not zero there: that is how torch does it
    if form != "sparsified":
        assert_masks(inputs.read_mask(tmp_path / "a.pt", SHAPES), masks)


def test_pruned_bias_may_regrow(tmp_path, capsys):
    mask = torch.tensor([1.0, 0, 0, 1])
    content = torch_pruned("head") | {"head.bias_orig": STATE["head.bias"], "head.bias_mask": mask}
    del content["head.bias"]
    network = read(tmp_path / "a.pt", content)
    assert torch.equal(network.state["head.bias"], STATE["head.bias"] * mask)
    line = "--init it: head.bias masked in the file but not prunable here"
    assert line in capsys.readouterr().err


def test_equal_networks_keep_the_mask(tmp_path):
    network = read(tmp_path / "a.pt", {"final": PRUNED, "model": torch_pruned(*PRUNABLE)})
    assert_equal(network.state, PRUNED)
    assert_masks(network.masks)


def test_tied_weights_and_tables_of_whole_numbers(tmp_path):
    tied, table = torch.ones(2, 2), torch.arange(3)
    torch.save({"a.weight": tied, "b.weight": tied, "a.table": table}, tmp_path / "a.pt")
    wanted = {"a.weight": tied.shape, "b.weight": tied.shape, "a.table": table.shape}
    state = inputs.read_network(tmp_path / "a.pt", wanted, {"a": "a.weight"}).state
    state["a.weight"].zero_()
    assert (state["b.weight"] == 1).all() and torch.equal(state["a.table"], table)


def test_our_own_files(tmp_path, capsys):
    ours = {"model": PRUNED, "mask": MASKS, "numbers": {"level": 3}, "file": ["run", "a.pt"]}
    runs.write_tensors(tmp_path / "a.pt", ours)
    network = read(tmp_path / "a.pt")
    assert_equal(network.state, PRUNED)
    assert_masks(network.masks)
    assert network.about == {"numbers": {"level": 3}} and capsys.readouterr().err == ""
    assert_masks(inputs.read_mask(tmp_path / "a.pt", SHAPES))

    runs.write_tensors(tmp_path / "b.pt", ours | {"model": STATE})  # regrown: field case 08
    assert_equal(read(tmp_path / "b.pt").state, PRUNED)
    cut = sum(int((~m).sum()) for m in MASKS.values())
    line = f"--init it: {cut} nonzero weights outside the mask were set to zero"
    assert line in capsys.readouterr().err

    w_tr = {"model": STATE, "step": 20, "data": "x", "diverged": -1, "tracked": {"w": BEGUN}}
    runs.write_tensors(tmp_path / "c.pt", w_tr)
    network = read(tmp_path / "c.pt")
    assert_equal(network.state, STATE)
    assert network.masks is None and network.about["step"] == 20 and network.about["data"] == "x"

    runs.write_tensors(tmp_path / "d.pt", {"networks": {"weights": torch.ones(2, 3)}})
    with pytest.raises(UserError, match=r"is not pretrained\.pt or levelNN\.pt of a run"):
        read(tmp_path / "d.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[:1500] + bytes([data[1500] ^ 1]) + data[1501:])
    with pytest.raises(UserError, match="--init it is damaged"):
        read(tmp_path / "a.pt")
    runs.write_tensors(tmp_path / "e.pt", {**ours})
    content = torch.load(tmp_path / "e.pt") | {"format": 99}
    with pytest.raises(runs.FormatError, match="--init it was written by a newer version"):
        read(tmp_path / "e.pt", content)


def test_a_mask_beside_someone_elses_network(tmp_path, capsys):
    masks = {PRUNABLE[k]: v.float() for k, v in MASKS.items()}
    content = {"state_dict": STATE, "masks": masks}
    network = read(tmp_path / "a.pt", content)
    assert_equal(network.state, PRUNED)
    assert_masks(network.masks)
    assert "nonzero weights outside the mask were set to zero" in capsys.readouterr().err
    content["masks"] = {"head.weight": MASKS["head"]}
    with pytest.raises(UserError, match=r"--init it has no mask for features\.0, lstm"):
        read(tmp_path / "a.pt", content)


def test_masks_under_any_key_are_used_or_refused(tmp_path, capsys):
    flipped = {k: ~m for k, m in MASKS.items()}
    sparse = {k: m.float().to_sparse() for k, m in MASKS.items()}
    for masks in ({"alive": MASKS}, {"masks": {"level3": MASKS}}, {"mask": sparse}):
        network = read(tmp_path / "a.pt", {"model": STATE, **masks})
        assert_equal(network.state, PRUNED)
        assert_masks(network.masks)
    nested = {"mask": {"features": {"0": MASKS["features.0"]}, "head": {"weight": MASKS["head"]}}}
    for masks, line in (
        (nested, "has no mask"),
        ({"mask": "other.pt"}, ': "mask" is not a dict of masks by layer'),
        ({"pruned": flipped}, ': "pruned" may be true where a weight is pruned'),
        ({"mask": MASKS | {"head": MASKS["head"] * 0}}, "prunes every weight of head"),
    ):
        with pytest.raises(UserError) as e:
            read(tmp_path / "a.pt", {"model": STATE, **masks})
        assert str(e.value).replace(" :", ":").startswith(f"--init it {line}".replace(" :", ":"))
    other = {"model": STATE, "flags": {"resumed": torch.tensor(True)}}
    assert read(tmp_path / "a.pt", other).masks is None
    with pytest.raises(UserError, match="--init it contains no network"):
        read(tmp_path / "a.pt", {k: v.to("meta") for k, v in STATE.items()})
    np.savez(tmp_path / "a.npz", **{k: m.numpy().astype(np.longdouble) for k, m in MASKS.items()})
    with pytest.raises(UserError, match="contains no mask"):
        inputs.read_mask(tmp_path / "a.npz", SHAPES)


def test_a_models_own_parametrizations_are_weights(tmp_path):
    """A network that is itself weight-normed, or pruned by torch, has just these names."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    state = model.state_dict()
    torch.save({"model": state}, tmp_path / "a.pt")
    wanted = {k: v.shape for k, v in state.items()}
    found = inputs.read_network(tmp_path / "a.pt", wanted, {}).state
    assert all(torch.equal(found[k], state[k]) for k in state) and len(found) == 3
    model = nn.Sequential(nn.Linear(3, 2))
    torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    state = model.state_dict()
    torch.save(state, tmp_path / "b.pt")
    wanted = {k: v.shape for k, v in state.items()}
    found = inputs.read_network(tmp_path / "b.pt", wanted, {"0": "0.weight_orig"})
    assert torch.equal(found.state["0.weight_orig"], state["0.weight_orig"])


# ---- what is no such network ---------------------------------------------------------------------


def without(*names: str) -> dict:
    return {k: v for k, v in STATE.items() if k not in names}


def but(name: str, value) -> dict:
    return STATE | {name: value}


class Hostile:
    def __reduce__(self):
        return (open, ("pwned", "w"))


NORMED = {"head.weight_g": torch.ones(4, 1), "head.weight_v": STATE["head.weight"]}
NO_MASK = {"head.weight_mask": STATE["head.weight"]}
WRONG = {
    "missing head.bias": without("head.bias"),
    "has 13 tensors, this network has 12: unexpected aux.weight": but("aux.weight", torch.ones(2)),
    r"head.weight is \(7, 2\), this .* \(4, 2\): a classifier with 7": weights(0, classes=7),
    r"features.0.weight is \(5, 2, 3\), this network's \(3, 2, 3\)": {"net": weights(0, width=5)},
    r'"net" has 11 tensors, this network has 12: missing head.bias': {"net": without("head.bias")},
    r"has 2 tensors \(head.weight_g, head.weight_v\), none of this network's 12": NORMED,
    r"matching networks \(model, best_model\): save only": {"model": STATE, "best_model": BEGUN},
    r"several matching networks \(a, b\)": with_prefix("a.") | with_prefix("b.", BEGUN),
    '"mask" is not a dict of masks by layer': {"net": STATE, "mask": [*MASKS.values()]},
    r"\(the outermost, optimizer.momentum\)": but("optimizer", {"momentum": BEGUN}),
    "features.0.weight is torch.int8": but("features.0.weight", STATE["features.0.weight"].char()),
    "head.bias contains NaN": but("head.bias", torch.full((4,), torch.nan)),
    "head.bias contains infinite": but("head.bias", torch.full((4,), 1e39, dtype=torch.double)),
    "1.running_var contains infinite": but("features.1.running_var", torch.full((3,), torch.inf)),
    r"contains no network \(found a list of length 2\)": [1, 2],
    r"contains no network \(found a Tensor of length 3\)": torch.ones(3),
    r"contains no network \(found a dict of length 1 with 1\)": {1: torch.ones(3)},
    "head.weight parametrized as head.weight_g, head.weight_v: before saving, run": without(
        "head.weight"
    )
    | NORMED,
    "head.weight parametrized as head.parametrizations.weight.original: ": renamed(
        "head.weight", "head.parametrizations.weight.original"
    ),
    "head.weight_mask is not a mask": torch_pruned("head") | NO_MASK,
    r"is a pickled module \(test_inputs.Net": Net(),
    r"a pickled module .*only the weights: torch.save\(model.state_dict\(\),": {"net": Net().head},
    r"contains pickled objects \(io.open\), which can run code": {"w": STATE, "x": Hostile()},
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_no_such_network(tmp_path, problem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save(WRONG[problem], "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=problem) as e:
            read(Path("a.pt"))
        assert str(e.value).startswith("--init it") and "\n" not in str(e.value)
        assert not Path("pwned").exists()


def test_another_resnet_is_named(tmp_path):
    import common

    wanted = {k: v.shape for k, v in common.ResNet(8, 16, 1, 10).state_dict().items()}
    wanted = {k: v for k, v in wanted.items() if not k.endswith("num_batches_tracked")}
    ours = "; this network is a ResNet-8 of width 16, 1 channels, 10 classes"
    for other, line in {
        (14, 16, 1, 10): f"ResNet-14 of width 16, 1 channels, 10 classes{ours}: give --depth 14",
        (8, 4, 1, 10): f"ResNet-8 of width 4, 1 channels, 10 classes{ours}: give --width 4",
        (8, 16, 3, 100): f"ResNet-8 of width 16, 3 channels, 100 classes{ours}",
    }.items():
        torch.save({"net": common.ResNet(*other).state_dict()}, tmp_path / "a.pt")
        with pytest.raises(UserError) as e:
            inputs.read_network(tmp_path / "a.pt", wanted, {}, "--init it")
        assert str(e.value) == f'--init it: "net" contains a {line}'


def test_files_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.ones(3))
    np.savez("a.npz", a=np.ones(3))
    Path("a.csv").write_text("index,score\n0,0.5\n")
    Path("lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    Path("page.pt").write_text("<!DOCTYPE html><html></html>")
    Path("empty.pt").touch()
    Path("folder").mkdir()
    Path("a.pkl").write_bytes(pickle.dumps({"model": 1}))
    Path("a.gz").write_bytes(gzip.compress(b"x"))
    torch.save(STATE, "a.pt")
    whole = Path("a.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    save_file({"a": torch.ones(9)}, Path("a.safetensors"))
    Path("cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-4])
    script = "import torch; torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), 'script.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    wanted = "; expected a file written by torch.save(model.state_dict(),"
    for name, line in {
        "a.npy": f"is an .npy array{wanted}",
        "a.npz": f"is an .npz archive{wanted}",
        "a.csv": f"is a text file{wanted}",
        "lfs.pt": "is a Git LFS pointer, not the file itself: run git lfs pull",
        "page.pt": f"is a web page, not the file itself{wanted}",
        "empty.pt": f"is an empty file{wanted}",
        "folder": "is a folder",
        "nothing": "does not exist",
        "/dev/null": "is not a regular file",
        "a.pkl": "is a pickle that torch.save did not write",
        "a.gz": f"is a gzip archive{wanted}",
        "cut.pt": "is damaged",
        "cut.safetensors": "is damaged",
        "script.pt": "is a TorchScript archive; save only the weights: torch.save(torch.jit",
    }.items():
        with pytest.raises(UserError) as e:
            read(Path(name))
        assert str(e.value).startswith(f"--init it {line}")
    Path("cut.npy").write_bytes(Path("a.npy").read_bytes()[:-3])
    for name, line in {
        "a.npz": "is an .npz archive; expected an .npy",
        "a.pt": "is a torch.save file; expected an .npy",
        "nothing": "does not exist",
        "cut.npy": "is .*damaged",
    }.items():
        with pytest.raises(UserError, match=f"^--indices {name} {line}"):
            inputs.read_indices(Path(name), 10, f"--indices {name}")
        with pytest.raises(UserError, match=f"^--scores {name} {line}"):
            inputs.check_scores_file(Path(name), 10)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", ["layer", ".weight", ".weight_mask", "_mask", ".mask", "module."]
)
@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors"])
def test_forms_of_masks(tmp_path, suffix, kind):
    parameter = {".weight": "", ".weight_mask": "_mask", "module.": "_mask"}
    prefix = suffix * (suffix == "module.")
    if suffix in parameter:
        named = {prefix + PRUNABLE[k] + parameter[suffix]: m for k, m in MASKS.items()}
    else:
        named = {k + suffix * (suffix != "layer"): m for k, m in MASKS.items()}
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save({"mask": {k: m.byte() for k, m in named.items()}, "model": STATE}, path)
    elif kind == "npz":
        np.savez(path, **{k: m.numpy().astype(float) for k, m in named.items()})
    else:
        save_file(named, path)
    assert_masks(inputs.read_mask(path, SHAPES))


def test_what_is_no_mask(tmp_path):
    bias = {"head.bias": torch.ones(4)}
    torch.save(MASKS | bias, tmp_path / "a.pt")
    assert_masks(inputs.read_mask(tmp_path / "a.pt", SHAPES))  # all ones prune nothing
    for content, line in [
        (MASKS | {"head.bias": torch.zeros(4)}, "has a mask for head.bias, which is not prunable"),
        ({k: m for k, m in MASKS.items() if k != "head"}, "has no mask for head"),
        (
            MASKS | {"head": MASKS["head"] * 0.5},
            "has a tensor for head that is not a mask: it has values other than 0 and 1",
        ),
        (
            MASKS | {"head": MASKS["head"].T},
            "has a tensor for head that is (2, 4), its weight (4, 2)",
        ),
        (MASKS | {"head": MASKS["head"] * 0}, "prunes every weight of head"),
        (STATE, "has a tensor for features.0 that is not a mask: it has values other than 0 and 1"),
        ({"conv": torch.ones(3)}, "has no mask of this network: it has conv, not features.0"),
        (
            {"mask": MASKS, "old_mask": {k: ~m for k, m in MASKS.items()}},
            "contains several matching masks",
        ),
        ([1], "contains no mask (found a list of length 1)"),
    ]:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError) as e:
            inputs.read_mask(tmp_path / "a.pt", SHAPES, "--mask it")
        assert str(e.value).startswith(f"--mask it {line}")


# ---- indices and scores --------------------------------------------------------------------------


def saved(path: Path, value) -> Path:
    if isinstance(value, str):
        path.write_text(value)
    elif isinstance(value, bytes):
        path.write_bytes(value)
    else:
        with open(path, "wb") as f:
            np.save(f, value)
    return path


@pytest.mark.parametrize(
    "value",
    [
        np.array([7, 0, 9]),
        np.array([0, 9, 7], ">u2"),
        np.isin(np.arange(10), [0, 7, 9]),
        "9\n0\n7\n",
        "# of seed 3\n0\n\n 7 # seven\r\n9",
        "\ufeff7\n9\n0",
    ],
)
def test_indices(tmp_path, value):
    found = inputs.read_indices(saved(tmp_path / "a", value), 10)
    assert found.dtype == np.int64 and found.tolist() == [0, 7, 9]


@pytest.mark.parametrize(
    "value, line",
    [
        (np.array([1.0, 2.0]), " is float64, expected integers"),
        (np.array([3, 1, 3]), " contains index 3 2 times"),
        (np.array([1, 0] * 5), " contains index 0 5 times: a mask must be saved as bool"),
        (np.array([-1, 3]), " contains index -1; valid indices are 0 to 9"),
        (np.array([1, 10]), " contains index 10; valid indices are 0 to 9"),
        (np.array([2**64 - 1], np.uint64), " contains index 18446744073709551615; valid"),
        (np.array([], int), " contains no indices"),
        (np.zeros(10, bool), " contains no indices"),
        (np.ones(9, bool), " is a boolean mask of length 9, but there are 10 examples"),
        (np.ones((3, 1), int), " is an array of shape (3, 1), expected (M,)"),
        (np.array(3), " is an array of shape (), expected (M,)"),
        (np.array(["a"]), " is <U1, expected integers"),
        ("# nothing\n", " contains no indices"),
        ("", " is an empty file; expected an .npy, or text"),
        ("index,label\n3,1\n", ": line 1 is 'index,label', not an integer"),
        ("0\n1.000000e+00\n", ": line 2 is '1.000000e+00', not an integer (np.savetxt needs"),
        ("1\n".encode("utf-16"), " is a text file in UTF-16"),
    ],
)
def test_what_are_no_indices(tmp_path, value, line):
    with pytest.raises(UserError) as e:
        inputs.read_indices(saved(tmp_path / "a", value), 10, "--indices it")
    assert str(e.value).startswith(f"--indices it{line}")


def test_scores(tmp_path):
    for values in (np.linspace(0, 1, 10), np.array([3, 0] * 5), np.full(10, -np.inf, ">f4")):
        found = inputs.check_scores_file(saved(tmp_path / "a.npy", values), 10)
        assert np.array_equal(found, values) and found.dtype.isnative
    for value, line in [
        ("0,0.5\n", " is a text file; expected an .npy with a score for each example"),
        (np.arange(4), " is int64 (4,), expected one score for each of 10 examples; pass"),
        (np.ones((10, 2)), " is float64 (10, 2), expected one score for each of 10 examples"),
        (np.array(["a"] * 10), " is <U1 (10,), expected one score for each of 10 examples"),
        (np.where(np.arange(10) == 4, np.nan, 1), ": example 4 has no score (NaN)"),
        (
            np.arange(10)[::-1],
            " is a permutation (int64), like the result of argsort; expected scores",
        ),
    ]:
        with pytest.raises(UserError) as e:
            inputs.check_scores_file(path := saved(tmp_path / "a", value), 10)
        assert str(e.value).startswith(f"--scores {path}{line}")
