"""Trains and tests the few-shot method of a YAML file, or only tests a checkpoint.

python run/run.py --cfg configs/clipspm/demo.yaml
python run/run.py --cfg configs/clipspm/hmdb51.yaml TRAIN.SHOT=5 MODEL.BACKBONE=ViT-B/16
python run/run.py --cfg configs/clipspm/hmdb51.yaml TEST.ONLY_TEST=true TEST.TEST_MODEL_PATH=best.pt
python run/run.py --cfg configs/clipspm/hmdb51.yaml --print-config
python run/run.py --cfg configs/clipspm/hmdb51.yaml --profile 3
python run/run.py --replay checkpoints/clipspm_hmdb51/replay_4000.pt
torchrun --nproc_per_node=2 run/run.py --cfg configs/clipspm/hmdb51.yaml
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from run.command import has_several_processes, number, run_command

if TYPE_CHECKING:
    from utils.schema import Config

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, loads the config, trains and tests; PyTorch is imported as late as possible."""
    options = parse_arguments(arguments)
    if has_several_processes():  # before anything can fail, so that an error in all processes is reported once
        from utils import distributed

        distributed.start()
    if options.replay:
        from run.replay import replay
        from utils.logs import set_up_logging

        set_up_logging()
        print("\n".join(replay(Path(options.replay), options.overrides)), flush=True)
        return

    from utils.config import format_config, load_config

    loaded = load_config(options.cfg, options.overrides, warn=lambda _: None)  # reported below

    from utils import distributed
    from utils.logs import set_up_logging

    set_up_logging()
    for warning in loaded.warnings:
        logger.warning(warning)
    if options.print_config:
        print(format_config(loaded) if distributed.is_main() else "", end="")
        return

    from run.main_run import Learner
    from run.stopping import signals_handled

    with signals_handled():
        learner = Learner(shortened(loaded.config) if loaded.config.DEBUG else loaded.config)
        if options.profile:
            from run.profiler import write_profile

            write_profile(learner, options.profile)
            return
        if loaded.config.TEST.ONLY_TEST:
            learner.data.log_splits()
        else:
            learner.train()
        if loaded.config.tests:
            learner.test()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line; `--resume` becomes an override."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--cfg", metavar="FILE", help="the experiment's YAML file")
    mode.add_argument("--replay", metavar="FILE", help="repeat a step with NaN or inf, show where they are, and stop")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the run directory")
    parser.add_argument("--print-config", action="store_true", help="print every value and its origin, and stop")
    parser.add_argument(
        "--profile", type=number(int, 1), metavar="N", help="write a trace of N training steps, and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the config")
    options = parser.parse_intermixed_args(arguments)
    if options.resume and options.cfg:
        options.overrides.append("CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    return options


def shortened(config: "Config") -> "Config":
    """Returns the config with only a few episodes, for a quick check that everything runs (DEBUG: true)."""
    limits = {"TRAIN_EPISODES": 4, "TASKS_PER_BATCH": 2, "VAL_FREQ": 4, "VAL_EPISODES": 4}
    train = config.TRAIN.model_copy(
        update={key: min(getattr(config.TRAIN, key), value) for key, value in limits.items()}
    )
    test = config.TEST.model_copy(update={"TEST_EPISODES": min(config.TEST.TEST_EPISODES, 8)})
    return config.model_copy(update={"TRAIN": train, "TEST": test})


if __name__ == "__main__":
    run_command(main)
