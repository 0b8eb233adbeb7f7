"""Stage 1: a score per training example, by which easy and hard subsets are ranked.

EL2N (Definition 2.1): the mean over K networks, early in training, of ||softmax - onehot||_2 on the
unaugmented training images, BatchNorm in eval mode. Forgetting (Toneva et al. 2019): how often an
example turned from right to wrong between two of its presentations in a minibatch, over a whole
training; one that no network got right at any presentation ranks behind all others.

    python el2n.py --dataset cifar10
    python el2n.py --dataset cifar10 --metric forgetting --networks 4

Writes results/el2n/<data>-<network>/<metric>/: scores.npy (N,) float32 in the order of the training
images; scores.json: data, settings, classes from easy to hard; for forgetting never_learned.npy
(N,), the fraction of the networks that never got an example right. Other stages run this one when
the EL2N scores they need are missing.
"""

import argparse

import numpy as np
import torch

import common


def flags() -> common.Parser:
    parser = common.flags(__doc__, "noise")
    parser.add_argument("--metric", choices=("el2n", "forgetting"), default="el2n")
    parser.add_argument("--networks", type=common.positive, help="K [the preset's]")
    told = "steps before scoring [the preset's; for forgetting: --steps]"
    parser.add_argument("--score-step", type=common.positive, help=told)
    return parser


def arguments(args: argparse.Namespace) -> argparse.Namespace:
    """This stage's flags when a stage run with `args` lacks its scores: the shared ones are that
    stage's, but for the length of its training, on which scores do not depend."""
    mine = vars(flags().parse_args([]))
    apart = ("steps", "milestones", "engine", "fresh")
    shared = {k: v for k, v in vars(args).items() if k in mine and k not in apart}
    return argparse.Namespace(**mine | shared)


def count_forgetting(training: common.Training) -> None:
    """Has a training count, per network and example (K, N), turns from right to wrong."""
    labels = training.streams[0].labels
    empty = torch.zeros(
        training.networks.rows, len(labels), dtype=torch.int32, device=labels.device
    )
    state = {k: empty.bool() for k in ("right", "learned")}
    state |= {k: empty.clone() for k in ("seen", "forgotten")}

    def watch(networks, step, indices, logits) -> None:
        for r, i in indices.items():
            right = logits[r].argmax(-1) == labels[i]
            state["forgotten"][r, i] += state["right"][r, i] & ~right
            state["learned"][r, i] |= right
            state["right"][r, i] = right
            state["seen"][r, i] += 1

    training.watch, training.extra = watch, state


def forgetting_scores(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """(K, N) events; what was never learned counts its presentations, more than any events."""
    return torch.where(state["learned"], state["forgotten"], state["seen"].amax(1, keepdim=True))


def run_networks(args: argparse.Namespace, data: common.Data, run: common.Run) -> None:
    """Trains the K networks side by side and leaves scores.npy and scores.json in the run."""
    labels = common.noisy_labels(data, args.label_noise, args.seed)
    networks = common.Networks(common.make_model(args, data), args.networks, args.device)
    streams = []
    for k, module in enumerate(networks.modules):
        common.initialise(module, common.generator(args.seed, "init", common.SCORERS + k))
        streams.append(common.make_stream(args, data, common.SCORERS + k, labels=labels))
    forgetting = args.metric == "forgetting"
    schedule = common.step_schedule(args.lr, args.milestones if forgetting else ())
    training = common.Training(args, data, networks, streams, 0, args.score_step, schedule)
    if forgetting:
        count_forgetting(training)
    with common.progress_bar(args, args.score_step * args.networks) as progress:
        common.fit(training, [run], args.metric, progress)
    if (bad := networks.diverged.tolist()) != [-1] * args.networks:
        k = next(k for k, s in enumerate(bad) if s >= 0)
        raise common.UserError(f"network {k} diverged at step {bad[k]}: lower --lr ({args.lr:g})")
    if forgetting:
        each = forgetting_scores(training.extra)
        never = 1 - training.extra["learned"].float().mean(0)
        common.write(run.folder / "never_learned.npy", lambda f: np.save(f, never.cpu().numpy()))
    else:
        each = common.evaluate(networks, data, data.train_images, labels)[2]
    scores = each.double().mean(0).float().cpu().numpy()
    if not np.isfinite(scores).all():
        raise common.UserError(f"scores are not finite: lower --lr ({args.lr:g})")
    told = {k: getattr(args, k) for k in ("metric", "networks", "score_step")}
    told["made_with"] = common.scores_settings(args)
    common.write_scores(run.folder, scores, labels, args, data, **told)
    run.finish({"scores": "scores.npy", "seconds": run.seconds})


def main(args: argparse.Namespace) -> dict:
    """Makes the scores unless they are there; returns scores.json."""
    early, asked = args.metric == "el2n", args.score_step
    data = common.prepare(args)
    if not early and asked is None:
        args.score_step = args.steps
    settings = common.settings_of(args, data, "metric", "networks", "score_step", "label_noise")
    if early:  # networks early in training: nothing depends on how it would have gone on
        del settings["steps"], settings["milestones"]
        name = common.scores_path(args, data).parent.name
    else:
        name = common.run_name(args, args.metric)
    with common.open_runs(args, data, "el2n", name, settings) as [run]:
        path = run.folder / "scores.npy"
        if run.result is None or not path.exists() or not path.with_suffix(".json").exists():
            run_networks(args, data, run)
        told = common.read_json(path.with_suffix(".json"), "metric")
    order = " ".join(told["classes_from_easy_to_hard"])
    print(f"{args.metric} of {data.name}, {args.networks} networks; from easy to hard: {order}")
    print(path)
    return told


if __name__ == "__main__":
    common.run_stage(main, flags())
