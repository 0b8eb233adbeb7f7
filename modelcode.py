"""The function that makes a model of one's own: loaded from a file, and what its code says.

A function of `--model FILE.py:FUNCTION` is known by its file and what that imports from beside it;
one handed to a call, as from a notebook, by its compiled code and the values that this refers to.
"""

import contextlib
import difflib
import dis
import functools
import hashlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import options
import runs
from inputs import listed
from runs import UserError, one_line


def find_function(spec: str, given: Any) -> tuple[Callable, str, str]:
    """The function of --model, or that of a call; its name; a fingerprint of its code."""
    if isinstance(given, nn.Module):
        kind = f"model: a {type(given).__name__} is a module, which has weights already"
        raise UserError(f"{kind}: give a function of channels and classes that makes one")
    if given is not None:
        return given, getattr(given, "__name__", "model"), runs.fingerprint(meaning(given))
    function, file = load_function(spec)
    return function, function.__name__, options.code_hash(file, *runs.imported(file))


PLAIN = int | float | complex | str | bytes | None | np.generic | torch.dtype | torch.device


def meaning(value: Any) -> list:
    """What `value` makes, as far as its code tells: the compiled code of functions and of methods,
    and the same of what these refer to; of what is installed the name, of values the value. One
    record for each thing, in which others are named by position."""
    found: list[Any] = []  # kept, so that no other takes its id
    positions: dict[int, int] = {}

    def refer(to: Any) -> Any:
        if isinstance(to, PLAIN):
            return repr(to)
        if isinstance(to, tuple):  # whether equal ones are one object tells nothing
            return [*map(refer, to)]
        if isinstance(to, set | frozenset):
            return [refer(x) for x in sorted(to, key=lambda x: str(getattr(x, "__qualname__", x)))]
        if positions.setdefault(id(to), len(found)) == len(found):
            found.append(to)
        return positions[id(to)]

    return [refer(value), *(record(v, refer) for v in found)]


def record(value: Any, refer: Callable) -> Any:
    """Of `meaning`, one of what is found."""
    if isinstance(value, Tensor | np.ndarray):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # a sparse one, say
            return runs.fingerprint(value)
        return repr(value)
    if isinstance(value, dict):
        return [[refer(k), refer(v)] for k, v in value.items()]
    if isinstance(value, list):
        return [refer(v) for v in value]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), refer(value.co_names), refer(value.co_consts)]
    if isinstance(value, functools.partial):
        return refer((value.func, value.args, value.keywords))
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        return refer((value.__func__, getattr(value, "__self__", None)))
    if isinstance(value, property):
        return refer((value.fget,))
    if hasattr(type(value), "cache_info"):  # of functools.cache
        return refer((value.__wrapped__,))
    kind = value if inspect.getattr_static(value, "__qualname__", None) else type(value)
    module = str(getattr(kind, "__module__", ""))
    if is_installed(module):
        own = isinstance(value, nn.Module)
        return [f"{module}.{kind.__qualname__}", *([refer(vars(value))] if own else ())]
    name = kind.__qualname__  # a script is __main__ here, and another module there
    if isinstance(value, types.FunctionType):
        cells = tuple(c.cell_contents for c in value.__closure__ or () if c != types.CellType())
        if is_installed(str(value.__globals__.get("__name__"))):  # made by a decorator
            return [name, refer(cells)]
        parts = value.__code__, cells, value.__defaults__, value.__kwdefaults__
        return [name, refer(parts), refer(referred(value.__code__, value.__globals__))]
    if isinstance(value, type):
        parts = {k: v for k, v in vars(value).items() if k[:2] != "__" or callable(v)}
        return [name, refer(value.__bases__), refer(parts)]
    if hasattr(value, "__dict__") and kind is type(value):
        return [name, refer(kind), refer(vars(value))]
    return name


KNOWN = {*sys.stdlib_module_names, *runs.OWN_MODULES, "numpy", "torch"}


def is_installed(module: str) -> bool:
    """Whether a module is of Python, of a package, or of this project, which has a hash of its
    own."""
    top = module.partition(".")[0]
    parts = Path(getattr(sys.modules.get(top), "__file__", None) or "").parts
    if top in ("__main__", "__mp_main__"):  # a script or a notebook, also in a process of its own
        return False
    return top in KNOWN or bool({"site-packages", "dist-packages"} & {*parts})


def nested(code: types.CodeType) -> list[types.CodeType]:
    """A code and those within it."""
    inside = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return [code, *(x for c in inside for x in nested(c))]


def referred(code: types.CodeType, known: dict[str, Any]) -> tuple:
    """The global names and values that code refers to; of a module that is not installed, what the
    code names of it."""
    codes = nested(code)
    steps = (x for c in codes for x in dis.get_instructions(c))
    names = {x.argval for x in steps if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    used, seen, spaces = [], [], [known]
    for space in spaces:
        for k in sorted(names & space.keys()):
            v = space[k]
            if not isinstance(v, types.ModuleType) or is_installed(v.__name__):
                used.append((k, v.__name__ if isinstance(v, types.ModuleType) else v))
            elif v not in seen:
                seen.append(v)
                spaces.append(vars(v))
        names = {k for c in codes for k in c.co_names}
    return tuple(used)


def load_function(spec: str, source: str = "--model") -> tuple[Callable, Path]:
    """The function or class of "FILE.py:FUNCTION", and the file.

    The file is run once for each content, as a module under a private name, which stays in
    sys.modules: what it defines can be pickled and copied. While it runs, its folder is first on
    sys.path. Its bytes are compiled here, so that an edited file never runs from a stale .pyc.
    """
    source = f"{source} {spec}"
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise UserError(f"{source}: expected FILE.py:FUNCTION")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{source}: {file} {problem}")
    code, beside = path.read_bytes(), runs.imported(path)
    digest = hashlib.sha256(bytes(path) + b"\0" + code + options.code_hash(*beside).encode())
    digest = digest.hexdigest()[:16]
    module = sys.modules.get(f"modelcode_{digest}") or run_file(path, code, digest, source)
    value = getattr(module, name, None)
    if isinstance(value, nn.Module) or not callable(value):
        found = {k: v for k, v in vars(module).items() if callable(v) and k[0] != "_"}
        found = {k: v for k, v in found.items() if not isinstance(v, nn.Module)}
        own = [k for k, v in found.items() if getattr(v, "__module__", "") == module.__name__]
        close = difflib.get_close_matches(name, found, 1)
        hint = f"; did you mean {close[0]}?" if close and close != [name] else ""
        has = f"the file defines {listed(own, 6)}" if own else "the file defines none"
        problem = (
            f"{name} is a {type(value).__name__}, not a function"
            if name in vars(module)
            else f"no function {name}"
        )
        raise UserError(f"{source}: {problem}; {has}{hint}")
    return value, path


BESIDE: dict[int, types.ModuleType] = {}  # what files of models imported, by id


def run_file(path: Path, code: bytes, digest: str, source: str) -> types.ModuleType:
    """A file as a module; UserError, with the line, for whatever it raises."""
    module = types.ModuleType(f"modelcode_{digest}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # before it runs: dataclasses look for it there
    sys.path.insert(0, str(path.parent))
    # What it imports from beside it is run with it, whatever has that name already, and stays, for
    # imports within functions, unless the name is of a module that something else imported.
    names = {f.relative_to(path.parent).parts[0].removesuffix(".py") for f in runs.imported(path)}

    def named(tops: set[str]) -> dict[str, types.ModuleType]:
        return {k: m for k, m in sys.modules.items() if k.split(".")[0] in tops}

    for k in (before := named(names)):
        del sys.modules[k]
    try:
        exec(compile(code, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as e:
        del sys.modules[module.__name__]
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        lines += [e.lineno] if isinstance(e, SyntaxError) and e.filename == str(path) else []
        where = f"line {lines[-1]}: " if lines and lines[-1] else ""
        raise UserError(f"{source}: {where}{type(e).__name__}: {one_line(e)}") from e
    finally:
        others = {k: m for k, m in before.items() if id(m) not in BESIDE}
        BESIDE.update({id(m): m for m in named(names).values()})
        for k in named({k.split(".")[0] for k in others}):
            del sys.modules[k]
        sys.modules.update(others)
        with contextlib.suppress(ValueError):  # the file may have removed it
            sys.path.remove(str(path.parent))
    return module
