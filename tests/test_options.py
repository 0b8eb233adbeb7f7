"""Settings: flags, presets, names of folders, and what a run was made from."""

import importlib
import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, parse, study_of

import common
import imp
import options
import runs
from runs import UserError

STAGES = ("el2n", "pretrain", "imp", "lmc", "warmup")
TINY = ("--width", 2, "--subset", "random", "--size", 64, "--rewind", 3, "--steps", 6)


# ---- flags and presets ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_settings_written_as_words_are_read_back(stage):
    parser = __import__(stage).flags()
    settings = parser.parse_args([])
    given = {k: v for k, v in vars(settings).items() if v not in ("", ())}
    assert parser.parse_args(options.as_words(parser, given)) == settings
    changed = {"seed": 7, "lr": 0.25, "milestones": (3, 9), "flip": True, "out": Path("~/x")}
    read = parser.parse_args(options.as_words(parser, changed))
    changed["out"] = Path.home() / "x"
    assert {k: getattr(read, k) for k in changed} == changed


def test_presets_are_table_1():
    """Paul et al. 2022, Table 1; K and its step are of Appendix A, sizes and levels of Figure 2."""
    names = "depth batch_size steps milestones lr pretrain_lr momentum weight_decay networks "
    names += "score_step size levels"
    for dataset, values in {
        "cifar10": (20, 128, 62400, (31200, 46800), 0.1, 0.4, 0.9, 1e-4, 10, 7800, 3200, 20),
        "cifar100": (32, 128, 62400, (31200, 46800), 0.1, 0.4, 0.9, 1e-4, 10, 7800, 2048, 20),
        "cinic10": (56, 256, 31250, (15625, 23440), 0.1, 0.1, 0.9, 1e-4, 10, 8000, 51200, 12),
    }.items():
        s = parse("imp", "--dataset", dataset)
        assert tuple(getattr(s, name) for name in names.split()) == values


def test_milestones_keep_their_share_of_the_steps():
    def of(*flags):
        return parse("imp", "--dataset", "cifar10", *flags).milestones

    assert of("--steps", 31200) == (15600, 23400) and of("--steps", 400) == (200, 300)
    assert of("--steps", 400, "--milestones", "7,8") == (7, 8)


# ---- names of folders ----------------------------------------------------------------------------


def test_a_run_is_named_by_what_differs_from_its_preset(tmp_path):
    for flags, model, name in (
        ((), "resnet8", "easy256-rewind20"),
        (("--width", 4, "--depth", 14), "resnet14x4", "easy256-rewind20"),
        (("--subset", "random", "--seed", 3), "resnet8", "random256-rewind20-seed3"),
        (("--subset", "hard", "--offset", 9), "resnet8", "hard256+9-rewind20"),
        (("--size", 64, "--balance"), "resnet8", "easy64balanced-rewind20"),
        (("--scores", tmp_path / "mine.npy"), "resnet8", "easy256-mine-rewind20"),
        (("--indices", tmp_path / "own.npy"), "resnet8", "indices-own-rewind20"),
        (("--label-noise", 0.1, "--name", "b"), "resnet8", "easy256-rewind20-noise0.1-b"),
        (("--steps", 300), "resnet8", "easy256-rewind20-steps300"),  # 150, 225 follow
        (("--milestones", "9,99"), "resnet8", "easy256-rewind20-drops9+99"),
        (("--model", "a.py:Net"), "net", "easy256-rewind20"),
    ):
        s = parse("imp", "--out", tmp_path, *flags)
        folder = options.run_folder(s, "imp", imp.name_of(s))
        assert folder == tmp_path / "imp" / f"digits-{model}" / name


def test_augmentation_is_in_the_folders_name_and_done(stage, tmp_path):
    """--pad and --flip reach the batches: other weights, each in a folder of its own."""
    ways = {"": (), "-pad0": ("--pad", 0), "-pad2-flip1": ("--pad", 2, "--flip")}
    weights = []
    for name, flags in ways.items():
        stage("imp", *TINY, "--levels", 0, *flags)
        folder = tmp_path / f"results/imp/digits-resnet8x2/random64-rewind3-steps6{name}/rep0"
        weights.append(runs.read_tensors(folder / "level00.pt")["model"]["stem.0.weight"])
    for a, b in itertools.combinations(weights, 2):
        assert not torch.equal(a, b)


# ---- identity ------------------------------------------------------------------------------------


def test_config_json_says_what_a_run_was_made_from(stage, tmp_path):
    stage("imp", *TINY, "--levels", 0)
    config = runs.read_json(next(tmp_path.rglob("config.json")))
    made_from, settings = config["made_from"], config["settings"]
    assert made_from["model"]["name"] == settings["model"] == "resnet8x2"
    data = common.load_data(parse("imp"), torch.device("cpu"))
    arrays = data.train_images, data.train_labels, data.test_images, data.test_labels
    assert settings["data"] == runs.fingerprint(*(a.numpy() for a in arrays))
    assert {"common.py", "options.py", "engine.py", "stage"} <= made_from["code"].keys()
    assert config["about"]["data"].startswith("digits: 1,437 training and 360 test images")


def test_an_edited_stage_does_not_continue_a_folder(stage, tmp_path, monkeypatch, capsys):
    """A copy of imp.py with another statement: refused in one line; --name keeps both."""
    stage("imp", *TINY, "--levels", 0)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "edited").mkdir()
    script = tmp_path / "edited/imp.py"
    script.write_text((ROOT / "imp.py").read_text().replace("REINIT = 1 << 17", "REINIT = 1 << 18"))
    flags = ("--levels", 0, "--device", "cpu", "--quiet", "--out", tmp_path / "results")

    def command(*more):
        monkeypatch.setattr(sys, "argv", [str(x) for x in (script, *TINY, *flags, *more)])
        runpy.run_path(str(script), run_name="__main__")

    with pytest.raises(SystemExit) as e:
        command()
    out, err = capsys.readouterr()
    assert (e.value.code, out, err.count("\n")) == (2, "", 1)
    assert "was begun by other code (the stage edited since): --name TAG" in err
    command("--name", "edited")
    names = {p.name for p in tmp_path.glob("results/imp/digits-resnet8x2/*")}
    assert names == {"random64-rewind3-steps6", "random64-rewind3-steps6-edited"}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_other_code_continues_if_released_or_allowed(monkeypatch):
    def continues(known, *flags, model="a", **changed):
        monkeypatch.setattr(options, "released", lambda: set(known))
        code = {"engine.py": "b", "stage": "c"}
        before, now = {"model": "a", "code": code}, {"model": model, "code": code | changed}
        return options.compare_origin(parse("imp", *flags), before, now)

    for known in ("", "c", "d"):  # at least one of the two is no release
        with pytest.raises(UserError, match=r"other code \(the stage edited since\).*--allow-edit"):
            continues(known, stage="d")
    assert continues("cd", stage="d") == "continued by another release: stage"
    assert continues("", "--allow-edited", stage="d") == "continued by edited code: stage"
    assert continues("", csrc="z") is None  # there is a compiler here
    with pytest.raises(UserError, match=r"something else \(model a, now b\): --name TAG"):
        continues("cd", "--allow-edited", model="b")


MODEL = """
from torch import nn

def make(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 8), nn.ReLU(), nn.Linear(8, 10))
"""


def test_a_changed_model_does_not_continue_a_folder(tmp_path):
    file = tmp_path / "net.py"
    flags = ("--subset", "random", "--model", f"{file}:make", "--out", tmp_path)

    def begin(*more):
        study = study_of("imp", *flags, *more)
        name = options.run_name(study.settings, "t")
        with study.runs("imp", name, study.describe(), [0]) as group:
            return group[0].folder

    file.write_text(MODEL)
    first = begin()
    assert first == tmp_path / "imp/digits-make/t/rep0"
    file.write_text(MODEL.replace("\n\n", "\n# of two layers\n"))
    assert begin() == first
    file.write_text(MODEL.replace("ReLU", "Tanh"))  # of the same shapes
    with pytest.raises(UserError, match=rf"^{first} was made from .*\(model\.code .*--name TAG"):
        begin("--allow-edited")  # of the project's code only
    assert begin("--name", "tanh") == tmp_path / "imp/digits-make/t-tanh/rep0"


def test_this_release_is_recorded(tmp_path, monkeypatch):
    """Its hashes are those of the files; after an edit of a release: python options.py."""
    recorded = json.loads(options.RELEASES.read_text())[options.VERSION]
    monkeypatch.setattr(options, "RELEASES", tmp_path / "releases.json")
    options.record_release()
    assert json.loads(options.RELEASES.read_text()) == {options.VERSION: recorded}


def test_a_hash_leaves_out_comments_of_the_files_language(tmp_path):
    def code(name, text):
        (tmp_path / name).write_text(text)
        return options.code_hash(tmp_path / name)

    assert code("a.py", "x = (7\n     // 2)\n") != code("a.py", "x = (7\n     // 3)\n")
    assert code("a.h", "#define EPS 1\n") != code("a.h", "#define EPS 2\n")
    assert code("a.py", "x = 1\n# a\n\n") == code("a.py", "x = 1\n# b\n")
    assert code("a.h", "int x;\n// a\n") == code("a.h", "int x;\n// b\n\n")


def test_what_a_stage_imports_from_beside_it_is_its_code(tmp_path):
    stage = tmp_path / "imp.py"
    stage.write_text("import common\nimport rule\n")
    hashes = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "rule.py").write_text(text)
        options.code_identity.cache_clear()
        hashes.append(options.code_identity(stage))
    assert hashes[0].pop("stage") != hashes[1].pop("stage") and hashes[0] == hashes[1]
    options.code_identity.cache_clear()


def test_a_stage_that_is_reloaded_has_the_code_of_its_file(tmp_path, monkeypatch):
    stage, text = tmp_path / "mine.py", (ROOT / "imp.py").read_text()
    monkeypatch.syspath_prepend(tmp_path)
    stage.write_text(text)
    module = importlib.import_module("mine")
    before = options.code_identity(stage)["stage"]
    stage.write_text(text + "\nedited = True\n")
    assert options.code_identity(stage)["stage"] == before  # what runs is what was loaded
    importlib.reload(module)
    assert options.code_identity(stage)["stage"] != before


@pytest.mark.parametrize("name", ["indices", "scores", "init", "mask"])
def test_values_in_place_of_a_file_are_refused(name):
    problem = rf"^{name}: expected the path of a file, not a list: save it \(np.save, torch.save\)"
    with pytest.raises(UserError, match=problem):
        imp.search(**{name: [0, 1]})


@pytest.mark.parametrize(
    ("stage", "words"),
    [("imp", ["--rewind", "0"]), ("lmc", ["--rewind", "0"]), ("warmup", ["--warmup", "0"])],
)
def test_a_subset_that_nothing_is_trained_on_is_said(stage, words, capsys):
    parse(stage, *words, "--subset", "all")
    assert capsys.readouterr().err == ""
    assert parse(stage, *words, "--subset", "hard", "--label-noise", "0.5").subset == "all"
    assert "for which --subset, --label-noise would be" in capsys.readouterr().err
