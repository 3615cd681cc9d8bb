"""Chooses the threshold of `predict.py --reject` on 1,000 validation episodes, and reports its error rates.

    python run/calibrate.py --checkpoint checkpoints/clipspm_demo/checkpoint_best.pt --way 5 --shot 1 --out reject.json
    python run/calibrate.py --checkpoint checkpoints/clipspm_demo/checkpoint_best.pt --test

A query is rejected if the score of its best class is below the threshold. Each episode has `--way` known classes with
examples, and up to `--way` unknown classes without. The threshold rejects `--false-reject` percent of the queries of
known classes. `--test` measures the same threshold on the test classes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

from run.command import checkpoint, number, run_command
from utils.files import raise_if_not_new, write_atomically, writing

FALSE_REJECT = 5.0  # percent, as usual in open-set recognition


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, scores the episodes, writes and prints the result."""
    options = parse_arguments(arguments)
    raise_if_not_new(options.out)

    import torch

    import models
    from run import rejection
    from run.results import as_json
    from utils.checkpoint import file_digest
    from utils.logs import set_up_logging
    from utils.utils import choose_device

    set_up_logging()
    config = models.config_of(options.checkpoint, options.cfg, options.overrides)
    model = models.load(options.checkpoint, options.cfg, options.overrides).to(choose_device(config.DEVICE.DEVICE))
    test_way, test_shot, _ = config.test_task
    way, shot = options.way or test_way, options.shot or test_shot
    indexes = rejection.open_splits(config, ["val", "test"] if options.test else ["val"], way, shot)
    with torch.inference_mode():
        scores = {split: rejection.best_scores(model, config, index, way, shot) for split, index in indexes.items()}
    threshold = float(torch.from_numpy(scores["val"].known).quantile(options.false_reject / 100))
    result: dict[str, Any] = {
        "threshold": threshold, "way": way, "shot": shot, "episodes": rejection.EPISODES,
        "checkpoint_sha256": file_digest(options.checkpoint), "features_stored_in": scores["val"].stored_in,
        **{split: best.rates(threshold) for split, best in scores.items()},
    }  # fmt: skip
    if options.out:
        with writing(options.out):
            write_atomically(options.out, as_json(result))
    print("\n".join(format_result(result)))


def format_result(result: dict[str, Any]) -> list[str]:
    """Returns the result as lines of text."""
    task = f"{result['way']}-way {result['shot']}-shot, {result['episodes']:,} episodes"
    return [f"threshold {result['threshold']:.4f} ({task})"] + [
        f"{split}: {result[split]['false_reject_percent']:.1f} % of the known queries are rejected, "
        f"{result[split]['false_accept_percent']:.1f} % of the unknown ones accepted, "
        f"area under the ROC {result[split]['area_under_roc']:.3f}"
        for split in ("val", "test")
        if split in result
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=checkpoint, required=True, metavar="FILE", help="the trained checkpoint")
    parser.add_argument("--cfg", metavar="FILE", help="config for a checkpoint without one")
    parser.add_argument(
        "--way", type=number(int, 2), metavar="N", help="known classes per episode (default: as in the test run)"
    )
    parser.add_argument(
        "--shot", type=number(int, 1), metavar="K", help="examples per class (default: as in the test run)"
    )
    parser.add_argument(
        "--false-reject", type=_percent, default=FALSE_REJECT, metavar="PERCENT",
        help="share of the known validation queries to reject (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--test", action="store_true", help="measure the threshold on the test classes too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the threshold to this JSON file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the config")
    return parser.parse_intermixed_args(arguments)


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"expected a percentage between 0 and 100, found {text!r}")
    return value


if __name__ == "__main__":
    run_command(main)
