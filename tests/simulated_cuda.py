"""A simulated CUDA device: its tensors say "cuda:0", and are computed on the CPU.

It refuses what CUDA refuses: operands on two devices and, while a graph is being captured, whatever
the host would wait for. As in CUDA, a captured operation is not executed, and replay executes what
was captured, on the same memory, whatever the host has done since. Of a capture it counts the
launches, measures their longest chain, and records every two accesses to the same memory, one of
them a write, that no event orders.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal}
COPIES, INDEXED = {aten._to_copy, aten.copy_}, {aten.index, aten.index_put_}
VIEWS = {aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view}
EMPTY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
NAME, DEVICE = "simulated", torch.device("cuda", 0)
PROPERTIES = {torch.Tensor.device.__get__: DEVICE, torch.Tensor.is_cuda.__get__: True}


class SimulatedTensor(torch.Tensor):
    """A tensor on the device; its values are in `host`. Below Python it says "meta": for "cuda"
    torch asks a real driver."""

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        make = torch.Tensor._make_wrapper_subclass
        self = make(cls, host.shape, **layout, dtype=host.dtype, device="meta")
        self.host = host
        return self

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.host})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in PROPERTIES:
            return PROPERTIES[function]
        if function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs or {})
        if function == torch.Tensor.data.__set__:
            args[0].host = args[1].host
        return result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return SimulatedCuda.active.execute(function, args, kwargs or {})


def tensors_in(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def on_host(tree):
    return tree_map_only(SimulatedTensor, lambda x: x.host, tree)


def written_tensors(function, args, kwargs) -> list[SimulatedTensor]:
    """What a call writes into: marked in its schema, or running statistics."""
    arguments = function._schema.arguments
    given = [*zip(arguments, args, strict=False)]
    given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
    unmarked = ("running_mean", "running_var") if "batch_norm" in function.__name__ else ()
    marked = [x for a, x in given if (a.alias_info and a.alias_info.is_write) or a.name in unmarked]
    return [x for x in tensors_in(marked) if isinstance(x, SimulatedTensor)]


class Stream:
    """`depth` is the longest chain of launches up to here, `known` how many launches of each stream
    this one is ordered after."""

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
        SimulatedCuda.active.synchronize()


class Graph:
    def __init__(self):
        self.tape, self.launches, self.races, self.depth = [], [], [], 0

    def replay(self) -> None:
        SimulatedCuda.active.replays += 1
        for function, args, kwargs, fresh in self.tape:
            again = tensors_in(function(*args, **kwargs))
            for k, memory in fresh.items():
                memory.copy_(again[k])


class SimulatedCuda(TorchDispatchMode):
    """The device. `wait` is called wherever the host waits for it; `made` counts streams, of which
    torch has 32 that it deals in turn."""

    active: "SimulatedCuda"

    def __init__(self, monkeypatch):
        super().__init__()
        SimulatedCuda.active = self
        self.wait: Callable[[], None] = lambda: None
        self.pool, self.made, self.replays = [Stream(k) for k in range(32)], 0, 0
        self.current, self.capturing, self.strict = Stream("main"), None, False
        self.graphs: list[Graph] = []
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "get_device_name": lambda *_: NAME,
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
        return self.execute(function, args, kwargs or {})

    def execute(self, function, args, kwargs):
        """The result of an operation, if it is allowed where its operands are."""
        if torch.is_inference_mode_enabled():  # a wrapper has no version counter to share there
            with torch.inference_mode(False), torch.no_grad():
                return self.execute(function, args, kwargs)
        packet, tensors = function.overloadpacket, tensors_in((args, kwargs))
        here = [x for x in tensors if isinstance(x, SimulatedTensor)]
        to_device = torch.device(kwargs.get("device") or ("cuda" if here else "cpu")).type != "cpu"
        if not here and not to_device:
            return function(*args, **kwargs)
        elsewhere = [x for x in tensors if x.dim() and not isinstance(x, SimulatedTensor)]
        if here and elsewhere and packet not in COPIES | INDEXED:
            raise RuntimeError(f"{function}: operands on two devices, cuda:0 and cpu")
        crosses = packet in COPIES and (not to_device or len(here) < len(tensors))
        masked = packet in INDEXED and any(x.dtype == torch.bool for x in tensors_in(args[1]))
        if packet in WAITS or crosses or masked or (packet in INDEXED and elsewhere):
            self.refuse_in_capture(str(function))
        if packet is aten.copy_ and not isinstance(args[0], SimulatedTensor):
            return args[0].copy_(args[1].host)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        changed = written_tensors(function, args, kwargs)
        instead = {id(x): x.host.clone() if self.capturing else x.host for x in changed}
        call = tree_map_only(torch.Tensor, lambda x: instead.get(id(x), x), (args, kwargs))
        result = function(*on_host(call[0]), **on_host(call[1]))
        same = {id(instead[id(x)]): x for x in changed}
        if self.capturing and not function.is_view and packet not in VIEWS:
            fresh = {k: x for k, x in enumerate(tensors_in(result)) if id(x) not in same}
            arguments = on_host((args, kwargs))
            self.record(function, *arguments, fresh, packet in EMPTY, on_host(changed))
        if not to_device:
            return result
        known = lambda x: same[id(x)] if id(x) in same else SimulatedTensor(x)  # noqa: E731
        return tree_map_only(torch.Tensor, known, result)

    def record(self, function, args, kwargs, fresh, empty, changed) -> None:
        """An operation for replay, and how it is ordered among the others of its capture."""
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
