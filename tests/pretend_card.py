"""A CUDA device that is none: its tensors say "cuda:0", hold values and compute them on the CPU.

It refuses what a card refuses: operands on two devices and, while a graph is being captured, what
the host would wait for. As on a card, an operation that is captured is not carried out, and replay
carries out what was captured, on the same memory, whatever the host has done since. Of a capture it
counts the launches, measures their longest chain, and notes every two accesses to one place of
memory, one of them a write, that no event orders.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal}
COPIES, INDEXED = {aten._to_copy, aten.copy_}, {aten.index, aten.index_put_}
VIEWS = {aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view}
EMPTY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
CARD = torch.device("cuda", 0)
PROPERTIES = {torch.Tensor.device.__get__: CARD, torch.Tensor.is_cuda.__get__: True}


class OnCard(torch.Tensor):
    """A tensor on the card; `held` is its memory. Below Python it says "meta": torch asks real
    drivers for "cuda"."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        make = torch.Tensor._make_wrapper_subclass
        self = make(cls, held.shape, **layout, dtype=held.dtype, device="meta")
        self.held = held
        return self

    def __repr__(self) -> str:
        return f"OnCard({self.held})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in PROPERTIES:
            return PROPERTIES[function]
        if function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs or {})
        if function == torch.Tensor.data.__set__:
            args[0].held = args[1].held
        return result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Card.here.carry_out(function, args, kwargs or {})


def mapped(function: Callable, tree):
    """`tree`, of tuples, lists and dicts, with each tensor x replaced by function(x)."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(function, x) for x in tree)
    return {k: mapped(function, x) for k, x in tree.items()} if isinstance(tree, dict) else tree


def tensors_in(tree) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(found.append, tree)
    return found


def held(tree):
    return mapped(lambda x: x.held if isinstance(x, OnCard) else x, tree)


def written(function, args, kwargs) -> list[OnCard]:
    """The tensors that a call writes into: marked in its schema, or running statistics."""
    arguments = function._schema.arguments
    given = [*zip(arguments, args, strict=False)]
    given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
    unmarked = ("running_mean", "running_var") if "batch_norm" in function.__name__ else ()
    marked = [x for a, x in given if (a.alias_info and a.alias_info.is_write) or a.name in unmarked]
    return [x for x in tensors_in(marked) if isinstance(x, OnCard)]


class Stream:
    def __init__(self, number: int | str):
        self.id, self.depth, self.known = number, 0, defaultdict(int)

    def wait_stream(self, other: "Stream") -> None:
        self.depth = max(self.depth, other.depth)
        for stream, n in other.known.items():
            self.known[stream] = max(self.known[stream], n)


class Event:
    def __init__(self, **_):
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Card.here.synchronize()


class Graph:
    def __init__(self):
        self.tape, self.launches, self.races, self.depth = [], [], [], 0

    def replay(self) -> None:
        Card.here.replays += 1
        for function, args, kwargs, fresh in self.tape:
            again = tensors_in(function(*args, **kwargs))
            for k, place in fresh.items():
                place.copy_(again[k])


class Card(TorchDispatchMode):
    """The device. `wait` is called wherever the host waits for work in hand; `made` counts streams,
    of which torch has 32 that it deals in turn."""

    here: "Card"

    def __init__(self, monkeypatch):
        super().__init__()
        Card.here = self
        self.wait: Callable[[], None] = lambda: None
        self.pool, self.made, self.replays = [Stream(k) for k in range(32)], 0, 0
        self.current, self.capturing, self.strict = Stream("main"), None, False
        self.graphs: list[Graph] = []
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "get_device_name": lambda *_: "a pretended card",
            "set_device": lambda *_: None,
            "device": lambda *_: contextlib.nullcontext(),
            "synchronize": self.synchronize,
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "current_stream": lambda *_: self.current,
            "stream": self.on_stream,
            "graph": self.capture,
            "Stream": self.deal,
            "Event": Event,
            "CUDAGraph": Graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) reaches this mode
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def deal(self, *_, **__) -> Stream:
        self.made += 1
        return self.pool[(self.made - 1) % 32]

    def set_sync_debug_mode(self, mode: str) -> None:
        self.strict = mode == "error"

    def synchronize(self, *_) -> None:
        self.refuse_in_capture("synchronize")
        self.wait()

    def refuse_in_capture(self, what: str) -> None:
        if self.capturing or self.strict:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    @contextlib.contextmanager
    def on_stream(self, stream: Stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def capture(self, graph: Graph, stream: Stream, **_):
        for s in self.pool:
            s.depth, s.known = 0, defaultdict(int)
        self.capturing, self.accesses = graph, defaultdict(list)
        self.graphs.append(graph)
        try:
            with self.on_stream(stream):
                yield
            graph.depth = stream.depth
        finally:
            self.capturing = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.carry_out(function, args, kwargs or {})

    def carry_out(self, function, args, kwargs):
        """What an operation gives, if it is allowed where its operands lie."""
        if torch.is_inference_mode_enabled():  # a wrapper has no version counter to share there
            with torch.inference_mode(False), torch.no_grad():
                return self.carry_out(function, args, kwargs)
        packet, tensors = function.overloadpacket, tensors_in((args, kwargs))
        ours = [x for x in tensors if isinstance(x, OnCard)]
        device = kwargs.get("device") or ("cuda" if ours else "cpu")
        to_card = torch.device(device).type != "cpu"
        if not ours and not to_card:
            return function(*args, **kwargs)
        strangers = [x for x in tensors if x.dim() and not isinstance(x, OnCard)]
        if ours and strangers and packet not in COPIES | INDEXED:
            raise RuntimeError(f"{function}: operands on two devices, cuda:0 and cpu")
        crosses = packet in COPIES and (not to_card or len(ours) < len(tensors))
        masked = packet in INDEXED and any(x.dtype == torch.bool for x in tensors_in(args[1]))
        if packet in WAITS or crosses or masked or (packet in INDEXED and strangers):
            self.refuse_in_capture(str(function))
        if packet is aten.copy_ and not isinstance(args[0], OnCard):
            return args[0].copy_(args[1].held)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        changed = written(function, args, kwargs)
        instead = {id(x): x.held.clone() if self.capturing else x.held for x in changed}
        call = mapped(lambda x: instead.get(id(x), x), (args, kwargs))
        found = function(*held(call[0]), **held(call[1]))
        same = {id(instead[id(x)]): x for x in changed}
        if self.capturing and not function.is_view and packet not in VIEWS:
            fresh = {k: x for k, x in enumerate(tensors_in(found)) if id(x) not in same}
            self.note(function, *held((args, kwargs)), fresh, packet in EMPTY, held(changed))
        if not to_card:
            return found
        return mapped(lambda x: same[id(x)] if id(x) in same else OnCard(x), found)

    def note(self, function, args, kwargs, fresh, empty, changed) -> None:
        """An operation for replay, and how it stands to the others of its capture."""
        graph, stream = self.capturing, self.current
        graph.tape.append((function, args, kwargs, fresh))
        if empty:
            return
        graph.launches.append(str(function))
        stream.depth += 1
        stream.known[stream.id] += 1
        writes = [*changed, *fresh.values()]
        for x in [*tensors_in((args, kwargs)), *writes]:
            reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
            span = x.data_ptr(), x.data_ptr() + reach * x.element_size()
            self.access(x, *span, any(x is w for w in writes), str(function))

    def access(self, x, first: int, last: int, writes: bool, name: str) -> None:
        known, here = self.current.known, self.current.id
        others = self.accesses[x.untyped_storage().data_ptr()]
        for start, stop, wrote, stream, n, before in others:
            if (wrote or writes) and start < last and first < stop and known[stream] < n:
                self.capturing.races.append(f"{before} on {stream}, {name} on {here}")
        others.append((first, last, writes, here, known[here], name))
