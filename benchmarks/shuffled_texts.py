"""Measures how much a method relies on the right class texts: its test episodes with exchanged texts.

    python benchmarks/shuffled_texts.py checkpoints/clipspm_demo_actions checkpoints/clipfsar_demo_actions

Each class of an episode gets the text of the next class, for support videos and queries; everything else stays the
same. A method that uses texts loses accuracy. Runs with the same label (several seeds) are one row of the table.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import load_weights_from
from run.command import run_command
from run.encoder import BackboneEncoder
from run.features import FeatureBank, encode_videos
from run.main_run import Learner
from utils.config import config_from_dict
from utils.statistics import sign_flip_p

EPISODES_PER_BATCH = 50


@torch.no_grad()
def accuracies(run: Path, episodes: int) -> tuple[str, float, float]:
    """Returns the label of a run, and its accuracy in percent with the right texts and with exchanged texts."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    weights = run / "checkpoint_best.pt"
    overrides = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={weights}"]
    learner = Learner(config_from_dict(results["config"], str(run), overrides))
    load_weights_from(weights, learner.model, learner.config)
    model, sampler, class_text = learner.model.eval(), learner.data.samplers["test"], learner.text["test"]
    bank = bank_of(learner)

    def features(videos: np.ndarray) -> Tensor:
        flat = learner.encoder.finish(bank.take(bank.rows(videos.ravel())).to(learner.device))
        return flat.unflatten(0, videos.shape)

    right: list[list[np.ndarray]] = [[], []]
    for start in range(0, episodes, EPISODES_PER_BATCH):
        specs = [sampler.episode(i) for i in range(start, min(start + EPISODES_PER_BATCH, episodes))]
        support, query = (
            features(np.stack(videos)) for videos in zip(*((s.support, s.query) for s in specs), strict=True)
        )
        own = class_text[torch.from_numpy(np.stack([spec.class_ids for spec in specs])).to(learner.device)]
        labels = np.stack([spec.query_labels for spec in specs])
        for answers, text in zip(right, (own, own.roll(1, dims=1)), strict=True):
            answers.append(model.score(support, query, text).argmax(dim=-1).cpu().numpy() == labels)
    own_texts, other_texts = (100 * float(np.concatenate(answers).mean()) for answers in right)
    return results["label"], own_texts, other_texts


def bank_of(learner: Learner) -> FeatureBank:
    """Returns the backbone's features of all test videos of a run."""
    index, reader = learner.data.samplers["test"].index, learner.data.reader()
    backbone = BackboneEncoder(learner.model, learner.device, learner.config.DATA.IMG_NORM, learner.config.USE_AMP)
    if learner.cache:
        return learner.cache.bank(backbone, index, reader)
    return encode_videos(backbone, index, range(len(index)), reader)


def table(by_label: dict[str, list[tuple[float, float]]]) -> str:
    """Returns the Markdown table of the accuracies by label."""
    lines = ["| method | runs | right texts | exchanged texts | difference | by chance |", "|---|---|---|---|---|---|"]
    for label, pairs in by_label.items():
        own, others = np.array(pairs).T
        difference, several = others - own, len(pairs) > 1
        error = f" ± {difference.std(ddof=1) / len(pairs) ** 0.5:.2f}" if several else ""
        chance = f"{sign_flip_p(difference):.3f}" if several else ""
        lines.append(
            f"| {label} | {len(pairs)} | {own.mean():.2f} | {others.mean():.2f} | {difference.mean():+.2f}{error} "
            f"| {chance} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table for the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with results.json and checkpoint_best.pt")
    parser.add_argument("--episodes", type=int, default=1000, help="(default: %(default)s)")
    options = parser.parse_args()
    by_label: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in options.runs:
        label, own, others = accuracies(run, options.episodes)
        by_label[label].append((own, others))
    print(table(by_label))


if __name__ == "__main__":
    run_command(main)
