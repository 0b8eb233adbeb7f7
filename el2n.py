"""Stage 1: a score per training example, by which easy and hard subsets are ranked.

EL2N (Definition 2.1): the mean over K networks, early in training, of ||softmax - onehot||_2 on the
unaugmented training images, BatchNorm in eval mode. Forgetting (Toneva et al. 2019): how often an
example turned from right to wrong between two of its presentations in a minibatch, over a whole
training; one that no network got right at any presentation ranks behind all others.

    python el2n.py --dataset cifar10
    python el2n.py --dataset cifar10 --metric forgetting --networks 4

Writes results/el2n/<data>-<model>/<metric>/: scores.npy (N,) float32 in the order of the training
images; scores.json: data, model, settings, how far the networks agree, classes from easy to hard;
for forgetting never_learned.npy (N,), the fraction of the networks that never got an example right.
Other stages make the EL2N scores that they need and do not find.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

import common
import engine
import options
import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.Scoring):
    """Settings of el2n.py."""

    metric: str = options.option("what is scored", "el2n", str, choices=("el2n", "forgetting"))

    @classmethod
    def check(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        super().check(given, values)
        if values["metric"] == "forgetting" and "score_step" not in given:
            values["score_step"] = values["steps"]


def flags() -> options.SettingsParser:
    return options.SettingsParser(Settings, __doc__)


def count_forgetting(training: engine.Training) -> None:
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


def score_forgetting(training: engine.Training, run: runs.Run) -> torch.Tensor:
    """(K, N) of the K networks; writes never_learned.npy."""
    never = 1 - training.extra["learned"].float().mean(0)
    runs.write_array(run.folder / "never_learned.npy", never.cpu().numpy())
    return forgetting_scores(training.extra)


def name_of(s: Settings) -> str:
    """The folder of the scores below OUT/el2n/<data>-<model>/."""
    return options.el2n_name(s) if s.metric == "el2n" else options.run_name(s, "forgetting")


def plan(s: Settings) -> list[options.Planned]:
    """What the command makes; reads no data."""
    folder = options.run_folder(s, "el2n", name_of(s))
    done = runs.finished_result(folder) is not None and (folder / "scores.npy").exists()
    return [options.Planned(folder, s.networks * s.score_step, done, 0)]


def main(s: Settings, handed_in: options.HandedIn = options.NOTHING) -> dict[str, Any] | None:
    """Makes the scores unless they are there; returns scores.json, with `scores` (N,) and their
    `path`; None after --dry-run."""
    study = common.prepare(s, __file__, handed_in)
    s = study.settings
    making = f"{s.metric}: {s.networks} networks of {s.score_step} steps"
    if not common.announce(study, making, str(study.folder("el2n", name_of(s)))):
        return None
    if s.metric == "el2n":
        if (s.steps, s.milestones) != (s.usual.steps, s.usual.milestones):
            runs.warn(f"EL2N scores are of step {s.score_step} (--score-step), whatever --steps")
        path = common.make_el2n(study, s.fresh)
    else:
        settings = study.describe("metric", "networks", "score_step", "label_noise")
        how = score_forgetting, s.milestones, count_forgetting
        path = common.make_scores(study, name_of(s), settings, *how)
    about = runs.read_json(path.with_suffix(".json"), "metric")
    if not s.quiet:
        runs.say(f"{common.describe_scores(about)}\n{path}")
    return about | {"scores": np.load(path), "path": path}


score = options.as_function(main, flags, 'score(dataset="digits", metric="forgetting")')

if __name__ == "__main__":
    runs.run_stage(main, flags())
