"""The main command: reads a config, then trains and tests, or tests only.

python run/run.py --cfg configs/clipspm/demo.yaml
python run/run.py --cfg configs/clipspm/hmdb51.yaml TRAIN.SHOT=5 MODEL.BACKBONE=ViT-B/16
python run/run.py --cfg configs/clipspm/hmdb51.yaml TEST.ONLY_TEST=true TEST.TEST_MODEL_PATH=best.pt
python run/run.py --cfg configs/clipspm/hmdb51.yaml --print-config
python run/run.py --cfg configs/clipspm/hmdb51.yaml --profile 3
python run/run.py --replay checkpoints/clipspm_hmdb51/replay_4000.pt
torchrun --nproc_per_node=2 run/run.py --cfg configs/clipspm/hmdb51.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from run.start import start

    start()

from run.command import run_command
from run.main_run import Learner
from run.stopping import signals_handled
from utils import distributed
from utils.config import format_config, load_config
from utils.schema import Config
from utils.utils import set_up_logging


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs what the config says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg", metavar="FILE", help="the experiment's YAML file")
    what.add_argument("--replay", metavar="FILE", help="repeat a step that was not finite, show where, and stop")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the run directory")
    parser.add_argument("--print-config", action="store_true", help="print every value and its origin, and stop")
    parser.add_argument("--profile", type=_steps, metavar="N", help="write a trace of N training steps, and stop")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a value of the config")
    options = parser.parse_intermixed_args(arguments)

    distributed.start()  # first of all, so that a mistake that every process finds is told once
    set_up_logging()
    if options.replay:
        from run.replay import replay

        print("\n".join(replay(Path(options.replay), options.overrides)), flush=True)
        return
    overrides = list(options.overrides)
    if options.resume:
        overrides.append("CHECKPOINT.RESUME_FROM_CHECKPOINT=true")
    loaded = load_config(options.cfg, overrides)
    if options.print_config:
        if distributed.is_main():
            print(format_config(loaded), end="")
        return

    with signals_handled():
        learner = Learner(shortened(loaded.config) if loaded.config.DEBUG else loaded.config)
        if options.profile:
            from run.profiling import write_profile

            write_profile(learner, options.profile)
            return
        if not loaded.config.TEST.ONLY_TEST:
            learner.train()
        learner.test()


def _steps(text: str) -> int:
    """The N of --profile."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def shortened(config: Config) -> Config:
    """The same config with a handful of episodes, for a look at whether everything runs (DEBUG: true)."""
    most = {"TRAIN_EPISODES": 4, "TASKS_PER_BATCH": 2, "VAL_FREQ": 4, "VAL_EPISODES": 4}
    train = config.TRAIN.model_copy(update={key: min(getattr(config.TRAIN, key), value) for key, value in most.items()})
    test = config.TEST.model_copy(update={"TEST_EPISODES": min(config.TEST.TEST_EPISODES, 8)})
    return config.model_copy(update={"TRAIN": train, "TEST": test})


if __name__ == "__main__":
    run_command(main, "interrupted: the same command with --resume continues from the last save")
