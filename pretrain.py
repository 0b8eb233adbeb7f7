"""Stage 2: dense pre-training to step t_r on a subset of the data, watched closely.

What the other stages do by themselves, as a file for `imp.py --init` and `lmc.py --parent`, with
the paper's view of the phase: learning curves on the test, training and easy examples (Figure 7a of
the later version), gradient coherence (7b), minibatch gradient norms (Figure 7/8).

    python pretrain.py
    python pretrain.py --dataset cifar10 --subset all --rewind 1600 --every 10 --replicate 0-3

Writes results/pretrain/<data>-<model>/<subset>-rewind<t_r>/rep<k>/: pretrained.pt (w_tr);
subset.npy; log.csv, a row every --every steps; gradient_norm.npy (t_r,), norm of each minibatch
gradient; coherence.npy (rows of the log, 16), cosine of each of 16 minibatch gradients with their
mean; result.json.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import common
import engine
import options
import runs

KINDS = ("accuracy", "gradient-norm", "coherence")
BATCHES = 16  # whose gradients are compared


def kinds(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(KINDS)}")
    return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.Pretraining):
    """Settings of pretrain.py."""

    always_scored = True

    rewind: int = options.option("t_r, the steps of pre-training", parse=options.positive)
    track: tuple[str, ...] = options.option(f"what to log, of {','.join(KINDS)}", KINDS, kinds)
    every: int = options.option("steps between rows of the log", 10, options.positive)
    easy_size: int = options.option(
        "easy examples whose accuracy is logged; those of --size", 0, options.count
    )
    easy_balance: bool = options.option("take these within each class, as with --balance", False)

    @classmethod
    def check(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        super().check(given, values)
        options.check_rewind(values["rewind"], values["steps"])

    @property
    def watched(self) -> tuple[int, bool]:
        """How many easy examples are watched, and whether within each class: by default those that
        --subset easy would take, so that curves of all data tell of the same examples."""
        return self.easy_size or self.size or self.usual.size, self.easy_balance or self.balance


def flags() -> options.SettingsParser:
    return options.SettingsParser(Settings, __doc__)


def coherence(t: engine.Training, row: int, keys: engine.Stream, step: int) -> torch.Tensor:
    """(16,) cosines of minibatch gradients at the weights of a row with their mean; unaugmented
    examples of its subset, BatchNorm in eval mode, drawn anew at each step."""
    networks, size, gradients = t.networks, t.settings.batch_size, []
    module, gradient = networks.modules[row].eval(), networks.gradient[row]
    for i in engine.batch_indices(keys, BATCHES * step, BATCHES * (step + 1), size):
        x = networks.arrange(engine.normalise(t.data, t.data.train_images[i]))
        F.cross_entropy(module(x), keys.labels[i]).backward()
        gradients.append(gradient.clone())
        gradient.zero_()
    module.train()
    each = torch.stack(gradients)
    return F.cosine_similarity(each, each.mean(0, keepdim=True))


def easy_examples(study: common.Study) -> torch.Tensor:
    """Indices of the easy examples whose accuracy is logged."""
    scores = common.read_scores(study) if study.scores is None else study.scores
    size, balance = study.settings.watched
    if size > len(scores):
        n = f"{study.data.name} has {len(scores)} training images"
        raise runs.UserError(f"--easy-size {size}: {n}")
    order = common.easiest(scores, study.data.train_labels.cpu().numpy(), balance)
    return torch.from_numpy(order[:size]).to(study.device)


def tracker(study: common.Study) -> common.Track:
    """What a pre-training of this stage reports: gives the observer that writes the log."""
    s, data = study.settings, study.data
    easy = easy_examples(study) if "accuracy" in s.track else None

    def track(t: engine.Training, group: list[runs.Run]) -> Callable[[int], None]:
        networks, samples = t.networks, []
        t.at = frozenset([*range(0, s.rewind, s.every), s.rewind])
        position = {step: k for k, step in enumerate(sorted(t.at))}
        if "gradient-norm" in s.track:
            norms = torch.zeros(networks.rows, s.rewind, device=study.device)
            t.extra["gradient_norm"] = norms
            t.watch = lambda networks, row, step, indices, logits: norms[row].index_copy_(
                0, step, networks.gradient[row].norm()[None]
            )
        if "coherence" in s.track:
            shape = (networks.rows, len(position), BATCHES)
            t.extra["coherence"] = torch.zeros(shape, device=study.device)
        for run, stream in zip(group, t.streams, strict=True):
            key = engine.philox_key(s.seed, "sample", run.replicate)
            samples.append(dataclasses.replace(stream, order=key))

        def observe(step: int) -> None:
            rows = [{} for _ in group]
            if easy is not None:
                test, _ = engine.accuracy_and_loss(networks, data)
                errors = engine.evaluate(networks, data, data.train_images, data.train_labels)[1]
                right = (errors == 0).double()
                for r, row in enumerate(rows):
                    row["test_accuracy"], row["train_accuracy"] = test[r], right[r].mean().item()
                    row["easy_accuracy"] = right[r, easy].mean().item()
            if "coherence" in s.track:
                for r, row in enumerate(rows):
                    cosines = coherence(t, r, samples[r], step)
                    t.extra["coherence"][r, position[step]] = cosines
                    row["coherence"] = cosines.mean().item()
            for run, row in zip(group, rows, strict=True):
                run.log("pretrain", step, **row)

        return observe

    return track


def name_of(s: Settings) -> str:
    size, balance = s.watched
    own = s.easy_size or s.easy_balance
    watched = f"easy{size}" + "balanced" * balance if own else ""
    return options.run_name(s, options.subset_name(s), f"rewind{s.rewind}", watched)


def plan(s: Settings) -> list[options.Planned]:
    """The runs of the command; reads no data."""
    folder = options.run_folder(s, "pretrain", name_of(s))
    return options.planned(folder, s.replicate, s.rewind, 1)


def main(s: Settings, handed_in: options.HandedIn = options.NOTHING) -> list[dict] | None:
    """Pre-trains, prints the accuracy and the paths; returns the results, one a replicate; None
    after --dry-run."""
    study = common.prepare(s, __file__, handed_in)
    s, name = study.settings, name_of(s)
    what = f"{s.rewind} steps on {options.subset_name(s)}"
    if not common.announce(study, what, str(study.folder("pretrain", name))):
        return None
    study = common.rank(study)
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "track", "every")
    settings = study.describe(*keys, "easy_size", "easy_balance")
    with study.runs("pretrain", name, settings, s.replicate) as group:
        todo = [run for run in group if run.result is None]
        with runs.progress_bar(len(todo) * s.rewind, s.quiet) as progress:
            track = tracker(study) if todo else lambda t, group: None
            common.pretrain(study, s.rewind, todo, progress, track)
        for run in todo:
            for kind, values in run.load("pretrained.pt")["tracked"].items():
                runs.write_array(run.folder / f"{kind}.npy", values.numpy())
            run.finish({"pretrain": common.about_start(run), "ended": run.ended})
        results = [run.result for run in group]
        accuracies = [r["pretrain"]["test_accuracy"] for r in results if not r["ended"]]
        if accuracies and not s.quiet:
            runs.say(f"test accuracy at step {s.rewind}: {options.mean_std(accuracies)}")
        options.report(s, group)
    return results


pretrain = options.as_function(
    main, flags, 'pretrain(dataset="digits", subset="easy", replicate=range(4))'
)

if __name__ == "__main__":
    runs.run_stage(main, flags())
