"""One training step of each method."""

from pathlib import Path

import models
from episodes.dataset import EpisodeDataset
from run.main_run import Learner
from run.meter import Meter
from run.solver import Solver
from run.training_step import TrainingStep
from tests.helpers import shipped
from tests.helpers.methods import WITHOUT_TRAINING, small_options
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config

METHODS = [name for name in shipped.METHODS if name not in WITHOUT_TRAINING]
FROZEN = "MODEL.FREEZE_BN=true"


def step_and_data(
    method: str, data: TinyDataset, directory: Path, checkpointing: bool, chunk: int, *overrides: str
) -> tuple[TrainingStep, EpisodeDataset]:
    """Returns a step of a small method without dropout, and two episodes of clips cut and mirrored at random."""
    options_class = models.options_of(method)
    own = {**shipped.tiny_options(method), "SEED": 1, "ACTIVATION_CHECKPOINTING": checkpointing}
    options = options_class(**small_options(options_class, NAME=method, **own))
    config = tiny_config(data, directory, FROZEN, f"TRAIN.CHUNK={chunk}", *overrides).model_copy(
        update={"MODEL": options}
    )
    learner = Learner(config)
    model, solver, meter = learner.model.train(), Solver(learner.model, config.SOLVER, 10), Meter(learner.device)
    step = TrainingStep(model, learner.encoder, solver, meter, learner.text["train"], config)
    return step, EpisodeDataset(learner.data.samplers["train"], learner.data.clip_options, range(2))
