"""Wrong command lines and files: exit status 2, one line that names the flag or the file, nothing
begun. Then made-up ones, by hypothesis: never a traceback."""

import io
import json
import re
import shlex
import subprocess
import sys
import zipfile

import conftest  # before torch
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
import runs
from runs import UserError

N = 1437  # training images of the embedded digits
DATA = conftest.ROOT / "data"
BEGUN = conftest.ROOT / "tests/runs/format2/begun"  # a folder of results


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files that do not fit, each for a reason that its name tells."""
    place = tmp_path_factory.mktemp("files")
    data = conftest.digits()
    model = common.ResNet(8, 16, 1, 10).state_dict()
    start = {"model": model, "step": 20, "data": data.fingerprint, "diverged": -1}
    start |= {"test_accuracy": 0.1, "seconds": 1.0}
    for name, changes in {
        "good": {},
        "other-data": {"data": "of-cifar10"},
        "other-width": {"model": common.ResNet(8, 8, 1, 10).state_dict()},
        "diverged": {"diverged": 7},
        "long": {"step": 600},
    }.items():
        runs.write_tensors(place / f"{name}.pt", start | changes)

    torch.save(model, place / "foreign.pt")
    for folder in ("folder", "no-images/train/cat"):
        (place / folder).mkdir(parents=True)
    (place / "text.txt").write_text("hello")
    (place / "few.txt").write_text("3\n1\n")
    (place / "model.py").write_text("def small(channels, classes):\n    return 3\n")

    scores = np.linspace(0, 1, N).astype(np.float32)
    about = {"metric": "el2n", "label_noise": [0.0, 0], "data": data.fingerprint}
    about["sha256_of_scores"] = runs.fingerprint(scores)
    for name, changes in {
        "others-labels": {"label_noise": [0.1, 0]},
        "others-data": {"data": "of-cifar10"},
        "altered": {"sha256_of_scores": "0" * 16},
        "of-newer": {"format": 99},
    }.items():
        np.save(place / f"{name}.npy", scores)
        runs.write_json(place / f"{name}.json", about | changes)
    np.save(place / "short.npy", scores[:-1])

    return place


VALUES = f"""
imp --subset easiest
imp --size 0 -3 many 12.5 {"9" * 5000}
imp --offset -1
imp --rewind -1 0-3
imp --label-noise 1.5 nan 10%
imp --lr inf 1e999
imp --pretrain-lr -0.1
imp --momentum 2 nan
imp --weight-decay -1
imp --depth 9002
imp --width 0 1000000000
imp --steps 0 1e3
imp --batch-size 0
imp --pad -1
imp --milestones 450,300 half 1,,2
imp --replicate 2-1 x '' 0,0 0-99999999999
imp --seed -1 4294967296
imp --prune-fraction 1 0
imp --levels many -1 1000000000
imp --resize 4097
imp --control shuffled
imp --engine warp compiled
imp --precision fp8
imp --checkpoint-every -1 soon
el2n --networks 0 ten
el2n --score-step 0
el2n --metric margin
pretrain --track speed ''
pretrain --every 0
pretrain --easy-size -1
lmc --alphas 0
lmc --children 1 65
lmc --batchnorm forget
lmc --rewind 20,0
warmup --warmup x 5,0
warmup --peak-lr 0
warmup --sharpness-every -1
warmup --sharpness-sample 1
figures --levels last
figures --paper mnist
"""  # stage, flag, values that argparse refuses
WRITTEN = {  # stage -> words -> what the line says
    "imp": {
        "--size 5000": "--size 5000: digits has 1437 training images",
        "--size 63": r"--size 63: fewer than a batch \(--batch-size 64\)",
        "--size 1400 --subset hard --offset 38": "--size 1400 from --offset 38: digits has 1437",
        "--subset all --size 64": "--size goes with --subset random, easy or hard",
        "--subset random --offset 5": "--offset goes with --subset easy or hard",
        "--subset all --balance": "--balance goes with --subset easy or hard",
        "--subset random --networks 3": "--networks goes with --subset easy or hard",
        "--subset random --scores short.npy": "--scores goes with --subset easy or hard",
        "--indices few.txt --size 2": "--indices is the subset: leave out --size",
        "--indices few.txt": "--indices few.txt: 2, fewer than --batch-size 64",
        "--rewind 600": r"--rewind 600: not before the end of training \(--steps 600\)",
        "--width 1025": "'1025' is not a whole number at least 1 and at most 1024",
        "--depth 2": "--depth 2: a ResNet has 8",
        "--replicate 65536": "--replicate 65536: at most 65535",
        "--name a/b": "--name a/b: letters, digits and",
        "--device abacus": "--device abacus: ",
        "--device meta": "--device meta: ",
        "--device ''": "--device : ",
        "--engine graph --device cpu": "--engine graph needs a CUDA device, not cpu",
        "go": "unknown: go",
        "--fresh=yes": "argument --fresh: ignored explicit argument 'yes'",
        "--levles 3": r"unknown: --levles \(did you mean --levels\?\)",
        "--prune_fraction=0.1": r"unknown: --prune_fraction=0.1 \(did you mean --prune-fraction",
        "--s 5": "unknown: --s",  # no abbreviations
        "--lev 3": r"unknown: --lev \(did you mean --levels\?\)",
        "--dataset 'mnist\nor so'": "--dataset mnist.*or so: none of digits, ",
        "--dataset cifra10": r"--dataset cifra10: none of .* \(did you mean cifar10\?\)",
        "--dataset text.txt": "--dataset text.txt: none of digits, .* no folder of images and no",
        "--dataset folder": "no images in train/CLASS/",
        "--dataset no-images": "no images in train/CLASS/",
        "--data-dir text.txt --dataset cifar10": "--data-dir text.txt: not a folder",
        "--out text.txt/x": "text.txt/x.*: Not a directory",
        # the network
        "--model model.py:small --depth 8": "--depth belongs to the ResNet: leave it out with --mo",
        "--model model.py:small": "--model model.py:small: ",
        # w_tr and masks
        "--init nothing.pt": "--init nothing.pt does not exist",
        "--init folder": "--init folder/rep0/pretrained.pt does not exist",
        "--init good.pt --subset easy": "--init brings its own pre-training: leave out --subset",
        "--init good.pt --label-noise 0.1": "--init brings its own pre-training: leave out --label",
        "--init good.pt --pretrain-lr 1": "--init brings its own .* leave out --pretrain-lr",
        "--replicate 0-": "argument --replicate: '0-' is not an ascending list",
        "--scores=": "argument --scores: an empty path",
        "--dataset=": "--dataset : none of digits, ",
        "--init good.pt --rewind 9": "--init good.pt: trained for 20 steps, not --rewind 9",
        "--init good.pt --depth 14": "--init good.pt: .*: give --depth 8",
        "--init good.pt --steps 20": "good.pt: trained to step 20 of --steps 20",
        "--init other-data.pt": "--init other-data.pt: made from other data than digits",
        "--init other-width.pt": "--init other-width.pt: .*: give --width 8",
        "--init diverged.pt": "--init diverged.pt: diverged at step 7",
        "--init long.pt": "long.pt: trained to step 600 of --steps 600",
        "--init foreign.pt": "--init foreign.pt: give --rewind, the step it was trained to",
        "--init good.pt --mask good.pt": "--mask good.pt has .* stem.0 that is not a mask",
        "--mask good.pt --control shuffle": "--control makes masks of its own: leave out --mask",
        "--verify folder": "--verify folder: no config.json there",
        # scores
        "--scores short.npy": r"float32 \(1436,\), expected one score for each of 1437 examples",
        "--scores altered.npy": "altered.npy: damaged, its checksum in altered.json",
        "--scores others-data.npy": "made from other data than digits",
        "--scores others-labels.npy": "made under other labels",
        "--scores of-newer.npy": "of-newer.json was written by a newer version",
    },
    "el2n": {
        "--replicate 0": "unknown: --replicate",
        "--size 64": "unknown: --size",
    },
    "pretrain": {
        "--rewind 600": "--rewind 600: not before the end of training",
        "--levels 3": "unknown: --levels",
        "--scores others-data.npy": "made from other data than digits",
    },
    "lmc": {
        "--alphas 4": "--alphas 4: an odd number",
        "--rewind 0,600": "--rewind 600: not before the end of training",
        "--parent good.pt --size 64": "--parent brings its own pre-training: leave out --size",
        "--parent good.pt --rewind 0,20": "--parent is one spawn point",
        "--parent good.pt --rewind 9": "--parent good.pt: trained for 20 steps, not --rewind 9",
        "--parent nothing.pt": "--parent nothing.pt does not exist",
        "--between good.pt": "--between takes two files or more",
        "--between good.pt good.pt --children 2": "saved networks: leave out --children",
        "--between good.pt --between other-data.pt": "--between other-data.pt: trained on other",
        "--between good.pt other-data.pt": "--between other-data.pt: trained on other data",
        "--between good.pt other-width.pt": "--between other-width.pt: .*: give --width 8",
    },
    "warmup": {
        "--warmup 301": "--warmup 301: longer than --steps 300",
        "--sharpness-sample 5000 --subset all": "--sharpness-sample 5000: digits has 1437",
        "--rewind 5": "unknown: --rewind",
    },
    "figures": {
        "fig99": "fig99: not one of fig2",
        "fig22": r"fig22: not one of .* \(did you mean fig2\?\)",
        "--compare one": "argument --compare: expected 2 arguments",
        "--compare one two --compare one six": "--compare takes two names or patterns, once",
        "fig2 --compare one two": "--compare .* draws no figure",
        f"--compare one two --out {BEGUN}": "--compare one: no such run",
    },
}
SHARED = {  # of every stage
    "--dataset mnist": "--dataset mnist: none of digits, .* no folder of images and no .npz",
    "--preset mnist": "--preset mnist: not one of digits",
    "--lr 0": "argument --lr.*: '0' is not a number above 0",
    "--depth 21": "--depth 21: a ResNet has 8, 14, 20",
    "--batch-size 2000": "--batch-size 2000: digits has 1437",
    "--device cuda:77": "--device cuda:77: ",
    "--flag-that-is-not": "unknown: --flag-that-is-not",
    "--step 5": r"unknown: --step \(did you mean --steps\?\)",
    "--steps": "argument --steps: expected one argument",
    "--out text.txt": "text.txt.*: (File exists|Not a directory)",
}
BRINGS = {"--verify", "--subset", "--scores", "--init", "--indices"}  # a subset of its own
STAGES = ("el2n", "pretrain", "imp", "lmc", "warmup")
TABLE = [(s, shlex.split(w), match) for s, rows in WRITTEN.items() for w, match in rows.items()]
TABLE += [(s, shlex.split(words), match) for s in STAGES for words, match in SHARED.items()]
TABLE += [
    (stage, [flag, v], rf"argument (\S+/)?{flag}: (invalid choice: )?'{v[:9]}")
    for stage, flag, *values in map(shlex.split, VALUES.strip().splitlines())
    for v in values
]


def refuse(stage, words, capsys, monkeypatch):
    """Runs a command line as a program would: its one line on stderr, after status 2."""
    module = __import__(stage)
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        runs.run_stage(module.main, module.flags())
    out, err = capsys.readouterr()
    assert (e.value.code, out, err.count("\n")) == (2, "", 1), (out, err)
    assert err.startswith(f"{stage}.py: error: "), err
    return err


@pytest.mark.parametrize(
    ("stage", "flags", "match"), TABLE, ids=[f"{s} {' '.join(f)[:40]}" for s, f, _ in TABLE]
)
def test_mistakes_get_one_clear_line(files, tmp_path, capsys, monkeypatch, stage, flags, match):
    monkeypatch.chdir(files)
    words = flags if "--out" in flags else [*flags, "--out", str(tmp_path / "results")]
    if stage != "figures":
        words = [*words, "--quiet"]
        if "--data-dir" not in flags:
            words += ["--data-dir", str(DATA)]
        if stage in ("imp", "pretrain") and not BRINGS & {*flags}:
            words += ["--subset", "random"]
    err = refuse(stage, words, capsys, monkeypatch)
    assert re.search(match, err), err
    assert not [p for p in tmp_path.rglob("*") if p != tmp_path / "results"]  # nothing was begun


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--quik"], "--quik: unknown"),
        (["--out"], "--out: unknown, or its value is missing"),
        (["--dataset", "mnist"], "--dataset mnist: neither digits"),
        (["--dataset", "$(touch pwned)"], "--dataset .*: neither digits"),
        (["--jobs", "two"], "--jobs two: not a whole number"),
        (["--jobs", "0"], "--jobs 0: not a whole number"),
        (["--only", "fig99"], "no run is for fig99"),
        (["--grid", "nothing.sh"], "--grid nothing.sh: no such file"),
        (["--dataset", "folder", "--preset", "mnist"], "--preset mnist: not one of digits"),
        (["--list", "--only", "fig2,fig99"], "no run is for fig99"),
        (["--list", "--only", "fig7", "--dataset", "cifar10"], "no run is for"),
        (["--list", "--out", "two\nlines"], "--out"),
        (["--list", "--wave", "5"], "argument --wave: invalid choice: 5"),
        (["--list", "--slurm"], "--slurm beside --list: one at a time"),
        (["--list", "--rate", "0"], "--rate 0"),
        (["--list", "--partition", "gpu"], "--partition=gpu: for --slurm"),
        (["--list", "--gpus", "0-3"], "--gpus 0-3: not a list"),
        (["--list", "--out", ""], "--out: its value is empty"),
        (["--list", "--only="], "--only: its value is empty"),
        (["--list", "--quick", "--dataset", "cifar10"], "--quick is of the digits"),
        (["--list", "--preset", "cifar100"], "--preset goes with --dataset"),
    ],
)
def test_mistakes_of_run_all(files, flags, match):
    words = ["bash", str(conftest.ROOT / "run_all.sh"), *flags]
    out = [] if "--out" in flags else ["--out", "results-of-mistakes"]
    done = subprocess.run([*words, *out], cwd=files, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert re.search(match, done.stderr), done.stderr
    assert not {"pwned", "results-of-mistakes"} & {p.name for p in files.iterdir()}


# ---- fuzzing -------------------------------------------------------------------------------------

BOUNDED = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


HELP = ("-h", "--help", "--version")  # print and end well


def names_of(stage):
    return sorted(k for a in __import__(stage).flags()._actions for k in a.option_strings)


WORDS = st.one_of(
    st.sampled_from(["0", "-1", "1e9", "nan", "inf", "0-3", "1,2", "", "-", "--", "=", "all", "٣"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)


@pytest.mark.parametrize("stage", [*STAGES, "figures"])
@settings(BOUNDED, max_examples=75)
@given(data=st.data())
def test_any_words_parse_or_are_refused_in_one_line(stage, data):
    flag = st.sampled_from([n for n in names_of(stage) if n not in HELP])
    words = data.draw(st.lists(st.one_of(flag, WORDS), max_size=8))
    if any(w.startswith(HELP) for w in words):
        return
    try:
        args = __import__(stage).flags().parse_args(words)
    except UserError as e:
        assert str(e)
    else:
        for value in vars(args).values():
            assert not isinstance(value, float) or np.isfinite(value)
            assert not isinstance(value, int) or -1 < value <= 2**32


def mutations(intact: bytes):
    """`intact` with a few bytes changed, cut out or put in."""
    place = st.integers(0, len(intact))
    change = st.tuples(place, st.integers(0, 64), st.binary(max_size=64))

    def apply(changes):
        value = intact
        for start, length, fresh in changes:
            value = value[:start] + fresh + value[start + length :]
        return value

    return st.one_of(st.binary(max_size=200), st.lists(change, min_size=1, max_size=3).map(apply))


def example(kind: str) -> bytes:
    f = io.BytesIO()
    if kind == "npy":
        np.save(f, np.arange(40.0))
    elif kind == "npz":
        np.savez(f, images=np.arange(40), labels=np.arange(4))
    elif kind == "pt":
        state = {"weights": torch.arange(40.0), "step": 3, "deep": {"name": "level00"}}
        torch.save({**state, "format": 2, "sha256": runs.fingerprint(state)}, f)
    else:
        value = {"format": 2, "metric": "el2n", "levels": [{"level": 0, "x": 0.5}, None, "é"]}
        f.write(json.dumps(value | {"sha256": runs.fingerprint(value)}).encode())
    return f.getvalue()


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "json"])
def test_altered_files_are_refused_or_read_as_they_were(tmp_path, kind):
    path, intact = tmp_path / f"x.{kind}", example(kind)
    read = {
        "npy": runs.read_npy,
        "npz": lambda p: runs.read_npz(p, "images", "labels"),
        "pt": runs.read_tensors,
        "json": lambda p: runs.read_json(p, "metric"),
    }[kind]
    path.write_bytes(intact)
    good = read(path)

    @settings(BOUNDED, max_examples=150)
    @given(mutations(intact))
    def attempt(content):
        path.write_bytes(content)
        try:
            value = read(path)
        except UserError as e:
            assert path.name in str(e)
        else:  # .npy has no checksum of its own: scores.json has it
            assert kind == "npy" or same(value, good)

    attempt()


def test_a_bomb_in_an_archive_is_not_unpacked(tmp_path):
    """Compressed zeros that claim to be 8 GB of pixels."""
    with zipfile.ZipFile(tmp_path / "digits.npz", "w", zipfile.ZIP_DEFLATED) as f:
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (8000000000,), }"
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        f.writestr("images.npy", content + bytes(10**6))
        f.writestr("labels.npy", content + bytes(10**6))
    with pytest.raises(UserError, match=r"digits\.npz is damaged"):
        common.load_digits(tmp_path)
