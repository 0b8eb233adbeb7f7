"""Stage 1: a score per training example, by which easy and hard subsets are ranked.

EL2N (Definition 2.1): the mean over K networks, early in training, of ||softmax - onehot||_2 on the
unaugmented training images, BatchNorm in eval mode. Forgetting (Toneva et al. 2019): how often an
example turned from right to wrong between two of its presentations in a minibatch, over a whole
training; one that no network got right at any presentation ranks behind all others.

    python el2n.py --dataset cifar10
    python el2n.py --dataset cifar10 --metric forgetting --networks 4

Writes results/el2n/<data>-<network>/<metric>/: scores.npy (N,) float32 in the order of the training
images; scores.json: data, settings, classes from easy to hard; for forgetting never_learned.npy
(N,), the fraction of the networks that never got an example right. Other stages make the EL2N
scores that they need and do not find.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import common
import runs


def flags() -> runs.Parser:
    parser = common.flags(__doc__, "noise")
    add = parser.add_argument_group("scores").add_argument
    add("--metric", choices=("el2n", "forgetting"), default="el2n", help="[el2n]")
    add("--networks", type=runs.positive, help="K [preset]")
    add("--score-step", type=runs.positive, help="steps before scoring [preset; forgetting: all]")
    return parser


def count_forgetting(training: common.Training) -> None:
    """Has a training count, per network and example (K, N), turns from right to wrong."""
    labels = training.streams[0].labels
    empty = torch.zeros(
        training.networks.rows, len(labels), dtype=torch.int32, device=labels.device
    )
    state = {k: empty.bool() for k in ("right", "learned")}
    state |= {k: empty.clone() for k in ("seen", "forgotten")}

    def watch(networks, k, step, indices, logits) -> None:
        right = logits.argmax(-1) == labels[indices]
        state["forgotten"][k, indices] += state["right"][k, indices] & ~right
        state["learned"][k, indices] |= right
        state["right"][k, indices] = right
        state["seen"][k, indices] += 1

    training.watch, training.extra = watch, state


def forgetting_scores(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """(K, N) events; what was never learned counts its presentations, more than any events."""
    return torch.where(state["learned"], state["forgotten"], state["seen"].amax(1, keepdim=True))


def score_forgetting(training: common.Training, run: runs.Run) -> torch.Tensor:
    """(K, N) of the K networks; leaves never_learned.npy in the run."""
    never = 1 - training.extra["learned"].float().mean(0)
    runs.write_array(run.folder / "never_learned.npy", never.cpu().numpy())
    return forgetting_scores(training.extra)


def run_name(args: argparse.Namespace) -> str:
    """The folder of the scores below results/el2n/<data>-<network>/."""
    if args.metric == "el2n":
        return common.scores_path(args).parent.name
    return common.run_name(args, "forgetting")


def plan(args: argparse.Namespace) -> list[tuple[Path, int, bool]]:
    """(folder, network-steps, done) of what the command makes; reads no data."""
    to_the_end = args.metric == "forgetting" and args.score_step is None
    common.fill(args)
    args.score_step = args.steps if to_the_end else args.score_step
    folder = common.run_folder(args, "el2n", run_name(args))
    done = runs.finished_result(folder) is not None and (folder / "scores.npy").exists()
    return [(folder, args.networks * args.score_step, done)]


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the scores unless they are there; returns scores.json."""
    to_the_end = args.metric == "forgetting" and args.score_step is None
    data = common.prepare(args)
    if args.metric == "el2n":
        path = common.make_el2n(args, data)
    else:
        args.score_step = args.steps if to_the_end else args.score_step
        settings = common.settings_of(args, data, "metric", "networks", "score_step", "label_noise")
        how = score_forgetting, args.milestones, count_forgetting
        path = common.make_scores(args, data, run_name(args), settings, *how)
    print(path)
    return runs.read_json(path.with_suffix(".json"), "metric")


def score(**settings: Any) -> dict[str, Any]:
    """The command as a function: score(dataset="digits", metric="forgetting")."""
    return runs.call(main, flags(), settings)


if __name__ == "__main__":
    runs.run_stage(main, flags())
