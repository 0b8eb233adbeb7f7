"""How many networks, and how many steps, an EL2N score needs.

    python bench/scores.py --dataset cifar10 --networks 8 --at 100,200,400,800

Trains K networks once and scores the training images with each of them at every step of --at. By
step and by number of networks: Spearman's rank correlation of the means of two halves, that of the
mean of all by Spearman and Brown, the share of the --easiest examples that both halves name (means
over ten splits, as `common.reliability` has it), and the correlation of the mean with that of all K
at the last step. The scores (steps, K, N) are kept in --save.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import engine
import options
import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.Scoring):
    at: tuple[int, ...] = options.option("steps to score at", (100, 200), options.numbers)
    easiest: int = options.option("easiest examples to compare", 3200, options.positive)
    save: str = options.option("an .npy for the scores", "el2n-by-step.npy", str)


def flags() -> options.SettingsParser:
    return options.SettingsParser(Settings, __doc__)


def main(s: Settings) -> None:
    study = common.prepare(s, __file__)
    s, data, labels = study.settings, study.data, study.data.train_labels
    networks, streams = study.networks(s.networks), []
    for k in range(s.networks):
        networks.load(k, study.initial_state_dict(common.SCORERS + k))
        streams.append(study.stream(common.SCORERS + k))
    lr_at, at = engine.step_schedule(s.lr, s.milestones), frozenset(s.at)
    scores = []
    for step in engine.train(study.training(networks, streams, 0, s.at[-1], lr_at, at)):
        if step in at:
            norms = engine.evaluate(networks, data, data.train_images, labels)[2]
            scores.append(norms.cpu().numpy())
            np.save(s.save, np.stack(scores))
            print(f"step {step} is scored", file=sys.stderr)
    heading = ("step", "K", "split-half", "all K", "shared", "chance", "end")
    print("".join(f"{x:>11}" for x in heading))
    last = scores[-1].mean(0)
    for step, each in zip(s.at, scores, strict=True):
        for k in (2, 4, 8, 16):
            if k <= len(each):
                r = common.reliability(each[:k], s.easiest, labels.cpu().numpy())
                end = spearmanr(each[:k].mean(0), last).statistic
                numbers = (r["split_half"], r["spearman_brown"], r["shared_by_halves"])
                numbers += (r["shared_by_chance"], end)
                print(f"{step:11}{k:11}" + "".join(f"{x:11.3f}" for x in numbers))


if __name__ == "__main__":
    runs.run_stage(main, flags())
