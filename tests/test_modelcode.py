"""The function of a model of one's own: its file, its code, what it refers to."""

import copy
import functools
import pickle
import sys
import types
from pathlib import Path

import conftest  # noqa: F401  before torch
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelcode
import runs
from runs import UserError

MODEL = """
import dataclasses
import helper
from torch import nn

@dataclasses.dataclass
class Settings:
    width: int = helper.WIDTH

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.head, self.settings = nn.Linear(channels, classes), Settings()

def make_small(channels, classes):
    return Net(channels, classes)

built = Net(1, 1)
number = 3
"""


def test_a_function_of_a_file(tmp_path):
    (tmp_path / "helper.py").write_text("WIDTH = 5\n")
    path = tmp_path / "my-model.v2.py"
    path.write_text(MODEL)
    before = list(sys.path)
    make, found = modelcode.load_function(f"{path}:make_small")
    assert found == path.resolve() and sys.path == before
    model = make(2, 3)
    assert model.head.weight.shape == (3, 2) and model.settings.width == 5
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin.head.weight, model.head.weight)
    assert modelcode.load_function(f"{path}:make_small")[0] is make  # one class, not a twin of it
    assert modelcode.load_function(f"{path}:Net")[0] is type(model)
    path.write_text(MODEL.replace("number = 3", "number = 4"))  # as long, in the same second
    again, _ = modelcode.load_function(f"{path}:make_small")
    assert again is not make and again.__globals__["number"] == 4
    assert not list(tmp_path.glob("__pycache__/my-model*"))


def test_what_is_no_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("helper.py").write_text("WIDTH = 5\n")
    Path("m.py").write_text(MODEL)
    Path("syntax.py").write_text("a = 1\n\ndef f(:\n")
    Path("raises.py").write_text("import torch\n\ntorch.ones(2) @ torch.ones(3)\n")
    Path("lacks.py").write_text("\nimport no_such_package_at_all\n")
    Path("exits.py").write_text("import argparse\nraise SystemExit(2)\n")
    Path("bytes.py").write_bytes(b"a = '\xe9'\n")
    Path("empty.py").touch()
    Path("folder").mkdir()
    for spec, line in {
        "m.py": "m.py: expected FILE.py:FUNCTION",
        "m.py:": "m.py:: expected FILE.py:FUNCTION",
        "nothing.py:f": "nothing.py:f: nothing.py does not exist",
        "folder:f": "folder:f: folder is a folder",
        "m.py:make_smal": "m.py:make_smal: no function make_smal; the file defines Settings, Net, "
        "make_small; did you mean make_small?",
        "m.py:built": "m.py:built: built is a Net, not a function; the file defines",
        "m.py:number": "m.py:number: number is a int, not a function; the file defines",
        "empty.py:f": "empty.py:f: no function f; the file defines none",
        "syntax.py:f": "syntax.py:f: line 3: SyntaxError: ",
        "raises.py:f": "raises.py:f: line 3: RuntimeError: ",
        "lacks.py:f": "lacks.py:f: line 2: ModuleNotFoundError: No module named",
        "exits.py:f": "exits.py:f: line 2: SystemExit: 2",
        "bytes.py:f": "bytes.py:f: ",
    }.items():
        with pytest.raises(UserError) as e:
            modelcode.load_function(spec)
        assert str(e.value).startswith(f"--model {line}") and "\n" not in str(e.value)
    files = [getattr(m, "__file__", None) for m in sys.modules.values()]
    assert str(Path("m.py").resolve()) in files and str(Path("raises.py").resolve()) not in files


# ---- what a function makes -----------------------------------------------------------------------


def names(source: str, **known) -> dict:
    exec(source, known := {"torch": torch, "nn": nn, "F": F, **known, "__name__": "__main__"})
    return known


def code_of(make) -> str:
    return modelcode.find_function("", make)[2]


NET = """
class Net(nn.Module):
    def forward(self, x):
        return F.{}(x) * SCALE
def make(channels, classes):
    return Net()
"""


def test_a_fingerprint_of_what_a_function_refers_to():
    """Of classes, globals, closures, defaults, partials, bound methods, in any process alike."""
    relu, tanh = (names(NET.format(f), SCALE=1)["make"] for f in ("relu", "tanh"))
    assert code_of(relu) == code_of(names(NET.format("relu"), SCALE=1, unused=3)["make"])
    scaled = names(NET.format("relu"), SCALE=2)["make"]
    closed = [
        names(f"def by(f): return lambda *_: f\nmake = by(F.{f})")["make"] for f in ("relu", "silu")
    ]
    default = [names(f"make = lambda c, k, n={n}: n")["make"] for n in (1, 2)]
    partial = [functools.partial(relu, width=n) for n in (1, 2)]
    bound = "class A:\n def make(self, *_): return self.n\na = A(); a.n = {}; make = a.make"
    bound = [names(bound.format(n))["make"] for n in (1, 2)]
    attribute = "class A:\n act = F.{}\nmake = functools.cache(lambda *_: A())"
    attribute = [names(attribute.format(f), functools=functools)["make"] for f in ("relu", "silu")]
    module = nn.Linear(2, 2), nn.Linear(2, 2)
    held = [names("make = lambda *_: net", net=m)["make"] for m in module]
    every = [relu, tanh, scaled, *closed, *default, *partial, *bound, *attribute, *held]
    assert len({code_of(f) for f in every}) == len(every)
    assert code_of(torch.relu) and code_of(nn.ReLU)


def test_a_fingerprint_of_what_a_function_does_not_make(tmp_path, monkeypatch):
    """Neither the name of its module, nor what its module and those that it imports hold besides;
    and however far it leads, whatever the values."""
    (tmp_path / "beside_1.py").write_text("import os\nSTART = os.urandom(8)\nwide = lambda n: n")
    monkeypatch.syspath_prepend(tmp_path)
    source = "import beside_1\ndef make(*_): return beside_1.wide(KINDS), sparse, unready"
    known = {"KINDS": {nn.Linear, nn.Conv2d, "a"}, "sparse": torch.eye(2).to_sparse()}
    known["unready"] = type("Unready", (), {"__getattr__": lambda self, name: 1 / 0})()
    first = code_of(names(source, **known)["make"])
    monkeypatch.delitem(sys.modules, "beside_1")
    again = names(source, **known, START=1)
    again["make"].__module__ = "__mp_main__"
    assert code_of(again["make"]) == first
    monkeypatch.setattr(sys.modules["beside_1"], "wide", lambda n: n + 1)
    assert code_of(again["make"]) != first
    chain = "\n".join(f"def f{k}(): return f{k + 1}()" for k in range(3000))
    makes = [names(f"{chain}\ndef f3000(): return {n}")["f0"] for n in (1, 2)]
    assert code_of(makes[0]) != code_of(makes[1])


def test_a_module_is_no_function():
    with pytest.raises(UserError, match=r"^model: a Linear is a module.*: give a function of chan"):
        modelcode.find_function("", nn.Linear(2, 2))


def test_a_model_file_may_import_within_its_function(tmp_path, monkeypatch):
    (tmp_path / "layer_1.py").write_text("def layer(): return 1")
    (tmp_path / "m.py").write_text(
        "import layer_1\ndef make():\n    from layer_1 import layer\n    return layer()"
    )
    assert modelcode.load_function(f"{tmp_path}/m.py:make")[0]() == 1
    (tmp_path / "layer_1.py").write_text("def layer(): return 2")
    assert modelcode.load_function(f"{tmp_path}/m.py:make")[0]() == 2
    mine = types.ModuleType("layer_1")  # of a notebook, say
    monkeypatch.setitem(sys.modules, "layer_1", mine)
    (tmp_path / "layer_1.py").write_text("def layer(): return 3")
    modelcode.load_function(f"{tmp_path}/m.py:make")
    assert sys.modules["layer_1"] is mine


def test_what_a_model_file_imports_from_beside_it(tmp_path):
    (tmp_path / "parts").mkdir()
    for name, text in {
        "model.py": "import torch, helper, common\nfrom parts import layer\n",
        "helper.py": "from other import x\n",
        "other.py": "import missing",
        "parts/__init__.py": "",
        "parts/layer.py": "from . import deep\n",
        "parts/deep.py": "",
        "common.py": "",
        "unused.py": "",
    }.items():
        (tmp_path / name).write_text(text)
    found = {str(p.relative_to(tmp_path)) for p in runs.imported(tmp_path / "model.py")}
    parts = {"parts/__init__.py", "parts/layer.py", "parts/deep.py"}
    assert found == {"helper.py", "other.py"} | parts
    (tmp_path / "helper.py").write_text("def make(*_): return 1")
    (tmp_path / "model.py").write_text("from helper import make")
    first = modelcode.find_function(f"{tmp_path}/model.py:make", None)[2]
    (tmp_path / "helper.py").write_text("def make(*_): return 2")
    assert modelcode.find_function(f"{tmp_path}/model.py:make", None)[2] != first
