"""Wrong command lines and files: exit status 2, one line that names the flag or the file, nothing
begun. Then made-up ones, by hypothesis: never a traceback."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
from common import UserError

N = 1437  # training images of the embedded digits


class Hostile:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files that do not fit, each for a reason that its name tells."""
    place = tmp_path_factory.mktemp("files")
    data = common.load_data("digits", common.HERE / "data", torch.device("cpu"))
    networks = common.Networks(common.ResNet(8, 16, 1, 10), 1, torch.device("cpu"))
    start = networks.snapshot(0)
    start |= {"fingerprint": "0", "step": 20, "data": data.fingerprint, "network": [8, 16]}
    start |= {"diverged": -1, "test_accuracy": 0.1, "seconds": 1.0, "tracked": {}}

    def tensors(name, **changes):
        common.write_tensors(place / name, start | changes)

    tensors("good.pt")
    tensors("other-data.pt", data="of-cifar10")
    tensors("other-network.pt", network=[20, 16])
    tensors("diverged.pt", diverged=7)
    tensors("long.pt", step=600)
    common.write_tensors(place / "level00.pt", {"mask": torch.ones(3), "weights": torch.ones(3)})
    whole = (place / "good.pt").read_bytes()
    (place / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (place / "flipped.pt").write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    (place / "empty.pt").write_bytes(b"")
    torch.save({"weights": Hostile()}, place / "hostile.pt")
    torch.save(start, place / "foreign.pt")
    torch.save([1, 2], place / "list.pt")
    state = {"weights": torch.zeros(1).expand(10**12), "version": 1, "sha256": ""}
    torch.save(state, place / "huge.pt")
    torch.save({**start, "version": 99, "sha256": "0"}, place / "newer.pt")
    (place / "folder").mkdir()
    (place / "no-images" / "train" / "cat").mkdir(parents=True)
    (place / "text.txt").write_text("hello")
    os.mkfifo(place / "pipe")

    good = np.linspace(0, 1, N).astype(np.float32)
    for name, scores in {
        "good": good,
        "short": good[:-1],
        "square": good[None],
        "nan": np.where(good == good[7], np.nan, good),
        "bool": good > 0.5,
        "text": good.astype(str),
        "complex": good.astype(complex),
        "others-labels": good,
        "others-data": good,
        "altered": good,
        "of-newer": good,
        "json-damaged": good,
        "json-foreign": good,
    }.items():
        np.save(place / f"{name}.npy", scores)
    sha = common.fingerprint(good)
    about = {"metric": "el2n", "label_noise": [0.0, 0], "data": data.fingerprint}
    about |= {"sha256_of_scores": sha}
    for name, changes in {
        "others-labels": {"label_noise": [0.1, 0]},
        "others-data": {"data": "of-cifar10"},
        "altered": {"sha256_of_scores": "0" * 16},
        "json-foreign": {},
    }.items():
        common.write_json(place / f"{name}.json", about | changes)
    common.write_json(place / "json-foreign.json", {"levels": []})
    (place / "json-damaged.json").write_text((place / "altered.json").read_text()[:-9] + "}")
    newer = about | {"version": 99}
    newer["sha256"] = common.fingerprint(newer)
    (place / "of-newer.json").write_text(json.dumps(newer))
    np.save(place / "hostile.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    np.savez(place / "archive.npz", scores=good)
    (place / "archive.npy").write_bytes((place / "archive.npz").read_bytes())
    content = (place / "good.npy").read_bytes()
    (place / "cut.npy").write_bytes(content[: len(content) // 2])
    (place / "header.npy").write_bytes(content[:80])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999,), }"
    lying = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (place / "lying.npy").write_bytes(lying)
    (place / "no-text.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"\xff" * 16)
    return place


SHARED = [  # of every stage
    (["--dataset", "mnist"], "--dataset mnist: neither digits, .* nor a folder"),
    (["--preset", "mnist"], "--preset mnist: not one of digits"),
    (["--lr", "0"], "argument --(peak-)?lr.*: '0' is not a number above 0"),
    (["--depth", "21"], r"--depth 21: a ResNet has 8, 14, 20"),
    (["--batch-size", "2000"], "--batch-size 2000: digits has 1437"),
    (["--device", "cuda:77"], "--device cuda:77: "),
    (["--flag-that-is-not"], "unrecognized arguments: --flag-that-is-not"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--out", "text.txt"], "--out text.txt: File exists"),
]
TABLE = [
    ("imp", ["--subset", "easiest"], "argument --subset: invalid choice: 'easiest'"),
    ("imp", ["--size", "5000"], "--size 5000: digits has 1437 training images"),
    ("imp", ["--size", "0"], "argument --size: '0' is not a whole number at least 1"),
    ("imp", ["--size", "-3"], "argument --size: '-3' is not"),
    ("imp", ["--size", "many"], "argument --size: 'many' is not"),
    ("imp", ["--size", "12.5"], "argument --size: '12.5' is not a whole number"),
    ("imp", ["--size", "63"], "--size 63: smaller than a batch"),
    ("imp", ["--size", "9" * 5000], "argument --size: '9999"),
    (
        "imp",
        ["--size", "1400", "--subset", "hard", "--offset", "38"],
        "--size 1400 from --offset 38: digits has 1437",
    ),
    ("imp", ["--subset", "all", "--size", "64"], "--size goes with --subset random, easy or hard"),
    ("imp", ["--subset", "random", "--offset", "5"], "--offset goes with --subset easy or hard"),
    ("imp", ["--subset", "all", "--offset", "5"], "--offset goes with --subset easy or hard"),
    ("imp", ["--subset", "random", "--balance"], "--balance goes with --subset easy or hard"),
    ("imp", ["--offset", "-1"], "argument --offset: '-1' is not a whole number at least 0"),
    ("imp", ["--rewind", "600"], r"--rewind 600: not before the end of training \(--steps 600\)"),
    ("imp", ["--rewind", "-1"], "argument --rewind: '-1' is not a whole number"),
    ("imp", ["--rewind", "0-3"], "argument --rewind: '0-3' is not a whole number"),
    ("imp", ["--label-noise", "1.5"], "--label-noise: '1.5' is not a number at least 0 and"),
    ("imp", ["--label-noise", "nan"], "argument --label-noise: 'nan' is not a number"),
    ("imp", ["--label-noise", "10%"], "argument --label-noise: '10%' is not a number"),
    ("imp", ["--lr", "inf"], "argument --lr: 'inf' is not"),
    ("imp", ["--lr", "1e999"], "argument --lr: '1e999' is not"),
    ("imp", ["--pretrain-lr", "-0.1"], "argument --pretrain-lr: '-0.1' is not a number above 0"),
    ("imp", ["--momentum", "2"], "argument --momentum"),
    ("imp", ["--momentum", "nan"], "argument --momentum"),
    ("imp", ["--weight-decay", "-1"], "argument --weight-decay"),
    ("imp", ["--depth", "2"], "--depth 2: a ResNet has 8"),
    ("imp", ["--depth", "9002"], "argument --depth: '9002' is not .* at most 1202"),
    ("imp", ["--width", "0"], "argument --width: '0' is not"),
    ("imp", ["--width", "1000000000"], "argument --width: .* at most 1024"),
    ("imp", ["--steps", "0"], "argument --steps: '0' is not"),
    ("imp", ["--steps", "1e3"], "argument --steps: '1e3' is not a whole number"),
    ("imp", ["--batch-size", "0"], "argument --batch-size"),
    ("imp", ["--milestones", "450,300"], "'450,300' is not an ascending list"),
    ("imp", ["--milestones", "half"], "argument --milestones: 'half'"),
    ("imp", ["--milestones", "1,,2"], "argument --milestones: '1,,2'"),
    ("imp", ["--replicate", "2-1"], "argument --replicate: '2-1'"),
    ("imp", ["--replicate", "x"], "argument --replicate: 'x'"),
    ("imp", ["--replicate", ""], "argument --replicate: ''"),
    ("imp", ["--replicate", "0,0"], "argument --replicate: '0,0'"),
    ("imp", ["--replicate", "0-99999999999"], "argument --replicate"),
    ("imp", ["--replicate", "65536"], "--replicate 65536: at most 65535"),
    ("imp", ["--seed", "-1"], "argument --seed"),
    ("imp", ["--seed", str(2**32)], "argument --seed: '4294967296' is not .* at most"),
    ("imp", ["--prune-fraction", "1"], "argument --prune-fraction"),
    ("imp", ["--prune-fraction", "0"], "argument --prune-fraction"),
    ("imp", ["--levels", "many"], "argument --levels: 'many' is not a whole number"),
    ("imp", ["--levels", "-1"], "argument --levels: '-1' is not"),
    ("imp", ["--levels", "1000000000"], "argument --levels: .* at most"),
    ("imp", ["--device", "abacus"], "--device abacus: "),
    ("imp", ["--device", "meta"], "--device meta: "),
    ("imp", ["--device", ""], "--device : "),
    ("imp", ["--engine", "warp"], "argument --engine: invalid choice: 'warp'"),
    ("imp", ["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
    ("imp", ["--checkpoint-every", "-1"], "argument --checkpoint-every"),
    ("imp", ["--checkpoint-every", "soon"], "argument --checkpoint-every: 'soon'"),
    ("imp", ["--s", "5"], "ambiguous option: --s could match"),
    ("imp", ["go"], "unrecognized arguments: go"),
    ("imp", ["--fresh=yes"], "argument --fresh: ignored explicit argument 'yes'"),
    ("imp", ["--dataset", "mnist\nor so"], "--dataset mnist or so: neither"),
    ("imp", ["--dataset", "text.txt"], "--dataset text.txt: neither digits, .* nor a folder"),
    ("imp", ["--dataset", "folder"], "--dataset folder: no images in folder/train/CLASS/"),
    ("imp", ["--dataset", "no-images"], "no images in no-images/train/CLASS/"),
    (
        "imp",
        ["--data-dir", "text.txt", "--dataset", "cifar10"],
        "cannot get cifar10 .*text.txt",
    ),
    ("imp", ["--out", "text.txt/x"], "--out text.txt/x: Not a directory"),
    # files: w_tr
    ("imp", ["--init", "nothing.pt"], "nothing.pt does not exist"),
    ("imp", ["--init", "folder"], "folder/rep0/pretrained.pt does not exist"),
    ("imp", ["--init", "pipe"], "pipe is no file"),
    ("imp", ["--init", "good.pt", "--subset", "easy"], "--init brings its own pre-training"),
    ("imp", ["--init", "good.pt", "--label-noise", "0.1"], "--init brings its own pre-training"),
    ("imp", ["--init", "good.pt", "--rewind", "9"], "--rewind 9: good.pt was trained for 20 steps"),
    ("imp", ["--init", "good.pt", "--depth", "14"], r"its network is \[8, 16\], this run's \[14"),
    ("imp", ["--init", "good.pt", "--steps", "20"], "trained to step 20 of --steps 20"),
    (
        "imp",
        ["--init", "other-data.pt"],
        "--init other-data.pt: its data is of-cifar10, this run's",
    ),
    ("imp", ["--init", "other-network.pt"], r"other-network.pt: its network is \[20, 16\], this"),
    ("imp", ["--init", "diverged.pt"], "--init diverged.pt: diverged at step 7"),
    ("imp", ["--init", "long.pt"], "long.pt: trained to step 600 of --steps 600"),
    ("imp", ["--init", "level00.pt"], "--init level00.pt: not a pretrained.pt"),
    ("imp", ["--init", "cut.pt"], "cut.pt is damaged or not one of ours"),
    ("imp", ["--init", "flipped.pt"], "flipped.pt is damaged"),
    ("imp", ["--init", "empty.pt"], "empty.pt is damaged or not one of ours"),
    ("imp", ["--init", "text.txt"], "text.txt is damaged or not one of ours"),
    ("imp", ["--init", "hostile.pt"], "hostile.pt is damaged or not one of ours"),
    ("imp", ["--init", "foreign.pt"], "foreign.pt is damaged or not one of ours"),
    ("imp", ["--init", "list.pt"], "list.pt is damaged or not one of ours"),
    ("imp", ["--init", "huge.pt"], "huge.pt is damaged .*larger than the file"),
    ("imp", ["--init", "newer.pt"], r"newer.pt was written by a newer version.* \(99, this is 1\)"),
    # files: scores
    ("imp", ["--scores", "nothing.npy"], "--scores nothing.npy: .*No such file"),
    ("imp", ["--scores", "folder"], "--scores folder: no file"),
    ("imp", ["--scores", "pipe"], "--scores pipe: no file"),
    ("imp", ["--scores", "text.txt"], "--scores text.txt is not an .npy"),
    ("imp", ["--scores", "hostile.npy"], "--scores hostile.npy is not an .npy"),
    ("imp", ["--scores", "hostile.pt"], "--scores hostile.pt is not an .npy"),
    ("imp", ["--scores", "archive.npy"], "--scores archive.npy is not an .npy"),
    ("imp", ["--scores", "cut.npy"], "--scores cut.npy is not an .npy, or damaged"),
    ("imp", ["--scores", "header.npy"], "--scores header.npy is not an .npy, or damaged"),
    ("imp", ["--scores", "lying.npy"], "--scores lying.npy is not an .npy, or damaged"),
    ("imp", ["--scores", "no-text.npy"], "--scores no-text.npy is not an .npy, or damaged"),
    ("imp", ["--scores", "short.npy"], r"float32 \(1436,\), but digits has 1437 training images"),
    ("imp", ["--scores", "square.npy"], r"float32 \(1, 1437\), but digits has 1437 training"),
    ("imp", ["--scores", "nan.npy"], r"nan.npy: example 7 has no score \(NaN\)"),
    ("imp", ["--scores", "bool.npy"], r"bool.npy: bool \(1437,\)"),
    ("imp", ["--scores", "text.npy"], r"text.npy: <U\d+ \(1437,\)"),
    ("imp", ["--scores", "complex.npy"], r"complex.npy: complex128"),
    ("imp", ["--scores", "altered.npy"], "altered.npy: damaged, its checksum in altered.json"),
    ("imp", ["--scores", "others-data.npy"], "made from other data than digits"),
    ("imp", ["--scores", "others-labels.npy"], "made under other labels"),
    ("imp", ["--scores", "json-damaged.npy"], "json-damaged.json cannot be read|is damaged"),
    ("imp", ["--scores", "json-foreign.npy"], "json-foreign.json is another file, without metric"),
    ("imp", ["--scores", "of-newer.npy"], "of-newer.json was written by a newer version"),
    # the other stages
    ("el2n", ["--networks", "0"], "argument --networks: '0' is not"),
    ("el2n", ["--networks", "ten"], "argument --networks: 'ten' is not"),
    ("el2n", ["--score-step", "0"], "argument --score-step: '0' is not"),
    ("el2n", ["--metric", "margin"], "argument --metric: invalid choice: 'margin'"),
    ("el2n", ["--replicate", "0"], "unrecognized arguments: --replicate 0"),
    ("el2n", ["--size", "64"], "unrecognized arguments: --size 64"),
    ("pretrain", ["--rewind", "0"], "--rewind 0: there is nothing to pre-train"),
    ("pretrain", ["--track", "speed"], "argument --track: 'speed' is not some of"),
    ("pretrain", ["--track", ""], "argument --track: '' is not some of"),
    ("pretrain", ["--every", "0"], "argument --every: '0' is not"),
    ("pretrain", ["--levels", "3"], "unrecognized arguments: --levels 3"),
    ("pretrain", ["--scores", "hostile.npy"], "--scores hostile.npy is not an .npy"),
    ("lmc", ["--alphas", "4"], "--alphas 4: an odd number"),
    ("lmc", ["--alphas", "0"], "argument --alphas: '0' is not"),
    ("lmc", ["--children", "1"], "argument --children: '1' is not"),
    ("lmc", ["--children", "65"], "argument --children: .* at most 64"),
    ("lmc", ["--batchnorm", "forget"], "argument --batchnorm: invalid choice: 'forget'"),
    ("lmc", ["--rewind", "20,0"], "argument --rewind: '20,0' is not an ascending list"),
    ("lmc", ["--rewind", "0,600"], "--rewind 600: not before the end of training"),
    ("lmc", ["--parent", "good.pt", "--size", "64"], "--parent brings its own pre-training"),
    ("lmc", ["--parent", "good.pt", "--rewind", "0,20"], "--parent is one spawn point"),
    ("lmc", ["--parent", "nothing.pt"], "nothing.pt does not exist"),
    ("lmc", ["--parent", "hostile.pt"], "hostile.pt is damaged or not one of ours"),
    ("lmc", ["--parent", "other-network.pt"], r"its network is \[20, 16\], this run's \[8, 16\]"),
    ("lmc", ["--scores", "archive.npy", "--rewind", "20"], "archive.npy is not an .npy"),
    ("warmup", ["--warmup", "301"], "--warmup 301: longer than --steps 300"),
    ("warmup", ["--warmup", "x"], "argument --warmup: 'x' is not"),
    ("warmup", ["--peak-lr", "0"], "argument --peak-lr: '0' is not a number above 0"),
    ("warmup", ["--sharpness-every", "-1"], "argument --sharpness-every: '-1' is not"),
    ("warmup", ["--sharpness-sample", "1"], "argument --sharpness-sample: '1' is not"),
    (
        "warmup",
        ["--sharpness-sample", "5000", "--subset", "all"],
        "--sharpness-sample 5000: digits has 1437",
    ),
    ("warmup", ["--rewind", "5"], "unrecognized arguments: --rewind 5"),
    ("figures", ["fig99"], "fig99: not one of fig2"),
    ("figures", ["--compare", "one"], "argument --compare: expected 2 arguments"),
    ("figures", ["--compare", "one", "two"], "--compare one: no such run"),
    ("figures", ["--levels", "last"], "argument --levels: 'last' is not an ascending list"),
    ("figures", ["--paper", "mnist"], "argument --paper: invalid choice: 'mnist'"),
    *(
        (stage, flags, match)
        for stage in ("imp", "el2n", "pretrain", "lmc", "warmup")
        for flags, match in SHARED
    ),
]


def refuse(stage, words, capsys, monkeypatch):
    """Runs a command line as a program would: its one line on stderr, after status 2."""
    module = __import__(stage)
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *words])
    monkeypatch.setattr(common.signals, "install", lambda: None)  # those of pytest stay
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        common.run_stage(module.main, module.flags())
    told = capsys.readouterr()
    assert (e.value.code, told.out, told.err.count("\n")) == (2, "", 1), told
    assert told.err.startswith(f"{stage}.py: error: "), told.err
    return told.err


@pytest.mark.parametrize(
    ("stage", "flags", "match"), TABLE, ids=[f"{s} {' '.join(f)[:40]}" for s, f, _ in TABLE]
)
def test_mistakes_get_one_clear_line(files, tmp_path, capsys, monkeypatch, stage, flags, match):
    monkeypatch.chdir(files)
    words = flags if "--out" in flags else [*flags, "--out", str(tmp_path / "results")]
    if stage != "figures":
        words = [*words, "--quiet"]
        if "--data-dir" not in flags:
            words += ["--data-dir", str(common.HERE / "data")]
        if stage != "warmup" and "--subset" not in flags and not {"--scores", "--init"} & {*flags}:
            words += ["--subset", "random"] if stage in ("imp", "pretrain") else []
    err = refuse(stage, words, capsys, monkeypatch)
    assert re.search(match, err), err
    left = [p for p in tmp_path.rglob("*") if p != tmp_path / "results"]
    assert not left and not (files / "pwned").exists()  # nothing was begun, nothing executed


def test_the_table_is_long_enough():
    assert len(TABLE) >= 80 and len({stage for stage, *_ in TABLE}) == 6


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
    ],
)
def test_mistakes_of_run_all(files, flags, match):
    words = ["bash", str(common.HERE / "run_all.sh"), *flags]
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
STAGES = ("el2n", "pretrain", "imp", "lmc", "warmup", "figures")


def names_of(stage):
    return sorted(k for a in __import__(stage).flags()._actions for k in a.option_strings)


WORDS = st.one_of(
    st.sampled_from(["0", "-1", "1e9", "nan", "inf", "0-3", "1,2", "", "-", "--", "=", "all", "٣"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)


@pytest.mark.parametrize("stage", STAGES)
@settings(BOUNDED, max_examples=150)
@given(data=st.data())
def test_any_words_parse_or_are_refused_in_one_line(stage, data):
    flag = st.sampled_from([n for n in names_of(stage) if n not in ("-h", "--help")])
    words = data.draw(st.lists(st.one_of(flag, WORDS), max_size=8))
    if any(w.startswith(("-h", "--h")) for w in words):
        return
    try:
        args = __import__(stage).flags().parse_args(words)
    except UserError as e:
        assert str(e)
    else:
        for value in vars(args).values():
            assert not isinstance(value, float) or np.isfinite(value)
            assert not isinstance(value, int) or -1 < value <= 2**32


def mutations(whole: bytes):
    """`whole` with a few bytes changed, cut out or put in."""
    place = st.integers(0, len(whole))
    change = st.tuples(place, st.integers(0, 64), st.binary(max_size=64))

    def apply(changes):
        value = whole
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
        checked = {"version": 1, "sha256": common.fingerprint(*common.flat(state))}
        torch.save(state | checked, f)
    else:
        value = {"version": 1, "metric": "el2n", "levels": [{"level": 0, "x": 0.5}, None, "é"]}
        f.write(json.dumps(value | {"sha256": common.fingerprint(value)}).encode())
    return f.getvalue()


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "json"])
def test_altered_files_are_refused_or_read_as_they_were(tmp_path, kind):
    path, whole = tmp_path / f"x.{kind}", example(kind)
    read = {
        "npy": common.read_npy,
        "npz": lambda p: common.read_npz(p, "images", "labels"),
        "pt": common.read_tensors,
        "json": lambda p: common.read_json(p, "metric"),
    }[kind]
    path.write_bytes(whole)
    good = read(path)

    @settings(BOUNDED, max_examples=300)
    @given(mutations(whole))
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
        common.load_data("digits", tmp_path, torch.device("cpu"))


@settings(BOUNDED)
@given(st.binary(max_size=300))
def test_any_log_is_read_or_begun_anew(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("run")
    (folder / "log.csv").write_bytes(content)
    run = common.Run(folder, 0, {"replicate": 0}, {"torch": "x"})
    run.log("level00", 3, loss=1.5)
    run.held.close()
    assert (folder / "log.csv").read_bytes().decode().splitlines()[-1].startswith("level00,3")
