"""The CUDA path of the engine and of every stage without a GPU, on simulated_cuda.py."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from simulated_cuda import DEVICE, Stream
from test_gpu import finish, training
from torture import pictures

import engine
import runs

SMALL = ("--width", 4, "--batch-size", 32, "--steps", 12, "--milestones", 9)
SUBSET = ("--subset", "random", "--size", 32)


@pytest.fixture
def gpu(simulated_cuda):
    return simulated_cuda


# ---- stages --------------------------------------------------------------------------------------

STAGES = {
    "imp": "imp --rewind 4 --levels 1 --control shuffle",
    "imp in bf16": "imp --rewind 4 --levels 1 --precision bf16",
    "lmc": "lmc --rewind 4 --children 2 --alphas 3 --batchnorm recompute",
    "warmup": "warmup --peak-lr 0.4 --warmup 5 --sharpness-every 100 --sharpness-sample 8",
    "pretrain": "pretrain --subset easy --rewind 8 --every 4",
    "el2n": "el2n --networks 2 --score-step 6",
    "forgetting": "el2n --networks 2 --metric forgetting",
}


@pytest.mark.parametrize("case", STAGES)
def test_every_stage_gives_the_numbers_of_the_cpu(gpu, stage, tmp_path, capsys, case):
    name, *flags = STAGES[case].split()
    flags = [*SMALL, *(SUBSET if name != "el2n" else ()), "--precision", "fp32", *flags]
    flags += ["--dataset", pictures(tmp_path), "--data-dir", tmp_path]
    if name == "pretrain":
        np.save(tmp_path / "mine.npy", np.random.default_rng(0).random(80, np.float32))
        flags += ["--scores", tmp_path / "mine.npy", "--track", "gradient-norm,coherence,accuracy"]
    for device in ("cuda:0", "cpu"):
        stage(name, *flags, "--device", device, out=tmp_path / device[:4])
    assert "continuing without" not in capsys.readouterr().err
    assert gpu.replays and not any(graph.races for graph in gpu.graphs)
    files = [p.relative_to(tmp_path / "cpu") for p in (tmp_path / "cpu").rglob("*.*")]
    for file in (f for f in files if f.suffix in (".pt", ".npy", ".json")):
        agree(*(read(tmp_path / device / file) for device in ("cuda", "cpu")), str(file))


def read(path):
    kinds = {".npy": np.load, ".pt": runs.read_tensors, ".json": runs.read_json}
    return kinds[path.suffix](path)


def agree(a, b, name: str) -> None:
    """An evaluation sums in batches of another size; training gives the same bits."""
    if name in ("file", "environments") or name.startswith(("run", "sec", "steps_", "sha", "fin")):
        return
    if isinstance(b, dict | list):
        assert len(a) == len(b), name
        for k in b if isinstance(b, dict) else range(len(b)):
            agree(a[k], b[k], str(k) if isinstance(b, dict) else name)
    elif isinstance(b, torch.Tensor | np.ndarray):
        one, other = torch.as_tensor(a), torch.as_tensor(b)
        torch.testing.assert_close(one, other, equal_nan=True, msg=name)
    else:
        assert a == (pytest.approx(b, rel=1e-4, abs=1e-6) if isinstance(b, float) else b), name


# ---- the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("simulated_cuda", "first", "further"),
    [("csrc", 118, 111), ("definitions", 195, 177)],
    indirect=["simulated_cuda"],
)
def test_launches_of_a_step_do_not_creep_up(simulated_cuda, first, further):
    """ResNet-20 in bfloat16: operations that are not views, each a launch or more."""
    for rows in (1, 2):
        finish(training(precision="bf16", rows=range(rows), stop=4, depth=20))
    counts = [len(graph.launches) for graph in simulated_cuda.graphs]
    assert counts[0] <= first and counts[1] - counts[0] <= further, counts


def test_rows_are_parallel_branches_of_streams_made_once(gpu):
    for rows in (1, 4, 4):
        finish(training(precision="bf16", rows=range(rows), stop=4))
        assert gpu.made <= 32
    one, *others = gpu.graphs
    for graph in others:
        assert len(graph.launches) > 3 * one.depth and graph.depth == one.depth
        assert not graph.races
    pool = engine.cuda_streams(DEVICE)
    assert len({stream.id for stream in pool}) == len(pool)  # the first captures: no branch's


HOST_READS = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "from the host": lambda x: torch.tensor([1.0], device=x.device),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("kind", HOST_READS)
def test_a_step_that_waits_for_the_device_is_noticed(gpu, capsys, kind):
    def watch(networks, row, step, indices, logits):
        HOST_READS[kind](logits)

    finish(training(stop=5, watch=watch))
    assert "CUDA graph failed, continuing without" in capsys.readouterr().err
    assert gpu.replays == 0


def test_operands_on_two_devices_are_noticed(gpu):
    t = training(stop=2)
    t.data.shift = t.data.shift.cpu()
    with pytest.raises(RuntimeError, match="operands on two devices"):
        finish(t)


def test_accesses_that_no_event_orders_are_noticed(gpu):
    x, streams = torch.zeros(4, device=DEVICE), [Stream(1), Stream(2)]
    for second, races in (((slice(0, 2)), 1), (slice(2, 4), 0)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=gpu.pool[0]):
            for stream, part in zip(streams, (slice(0, 2), second), strict=True):
                with engine.on_stream(stream):
                    x[part].add_(1)
        assert len(graph.races) >= races and bool(graph.races) == bool(races)


def test_the_convolutions_of_a_step_are_timed_in_graphs(gpu, monkeypatch, capsys):
    """bench/conv.py: every pass of every layer, exact and fast, but the gradient of the images."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    import conv

    words = "--depth 8 --width 4 --batch-size 2 --side 8 --repeats 1 --device cuda:0"
    sums = conv.main(conv.flags().parse_args(words.split()))
    assert sums.keys() == {"exact", "fast"} and all(min(x.values()) > 0 for x in sums.values())
    lines = capsys.readouterr().out.splitlines()
    assert [int(x.split()[0]) for x in lines[2:-2]] == [1, 2, 1, 1, 1, 1, 1, 1]
    assert len(gpu.graphs) == 2 * 3 * 8 and not any(graph.races for graph in gpu.graphs)
    backward, seen = "aten.convolution_backward.default", []
    for graph in gpu.graphs:
        seen.append({(str(function), str(args[-1])) for function, args, *_ in graph.tape})
    one_layer = [{("aten.convolution.default", "1")}]  # of one group, its last argument
    one_layer += [{(backward, mask)} for mask in ("[True, False, False]", "[False, True, False]")]
    assert seen == 2 * 8 * one_layer


# ---- signals -------------------------------------------------------------------------------------


def test_a_signal_while_the_host_waits_saves_a_checkpoint(gpu, tmp_path, monkeypatch):
    """SIGTERM in each wait for the device; the command again ends with the same numbers."""
    import pretrain

    waits, at = [], [None]

    def wait():
        waits.append(runs.signals.waits)
        if len(waits) - 1 == at[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(out):
        words = [*map(str, SMALL + SUBSET), "--device", "cuda:0", "--quiet", "--out", str(out)]
        words += ["--rewind", "10", "--every", "2", "--track", "gradient-norm"]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        waits.clear()
        runs.run_stage(pretrain.main, pretrain.flags())
        [path] = out.rglob("result.json")
        return json.loads(path.read_text())["pretrain"]["fingerprint"]

    gpu.wait = wait
    expected, count = run(tmp_path / "undisturbed"), len(waits)
    assert count >= 4 and all(waits)  # before the capture, for tables in flight, at the end
    for number in (0, 1, count - 1):
        at[0] = number
        with pytest.raises(SystemExit) as e:
            run(tmp_path / str(number))
        assert e.value.code == 128 + signal.SIGTERM
        assert list((tmp_path / str(number)).rglob("checkpoint.pt"))
        at[0] = None
        assert run(tmp_path / str(number)) == expected
