"""Gradients accumulated over groups of episodes equal the steps written out by hand."""

import torch

from episodes.dataset import EpisodeDataset
from run.main_run import Learner
from run.meter import Meter
from run.solver import Solver
from run.training_step import TrainingStep
from tests.helpers.tiny_runs import tiny_config, trained


def test_every_episode_counts_once_including_the_last_group(tiny_dataset, tmp_path):
    """5 episodes in groups of 2, 2 and 1 equal the steps written out by hand with mean gradients."""
    overrides = (
        "TRAIN.TRAIN_EPISODES=5", "TRAIN.VAL_FREQ=0", "SOLVER.OPTIM_METHOD=sgd", "SOLVER.LR=0.01", "SOLVER.LR_SCH=none",
        "SOLVER.WARMUP_EPISODES=0", "SOLVER.MOMENTUM=0", "SOLVER.WEIGHT_DECAY=0", "MODEL.SPM.GENERATOR_DROPOUT=0",
    )  # fmt: skip
    learner = trained(tiny_dataset, tmp_path / "groups", *overrides)
    by_hand = Learner(tiny_config(tiny_dataset, tmp_path / "by_hand", *overrides))
    by_hand.model.train()
    solver = Solver(by_hand.model, by_hand.config.SOLVER, 5)
    meter = Meter(by_hand.device)
    step = TrainingStep(by_hand.model, by_hand.encoder, solver, meter, by_hand.text["train"], by_hand.config)
    dataset = EpisodeDataset(by_hand.data.samplers["train"], by_hand.data.clip_options, range(5))
    parameters = [p for p in by_hand.model.parameters() if p.requires_grad]
    for group in ([0, 1], [2, 3], [4]):
        sums = [torch.zeros_like(p) for p in parameters]
        for i in group:
            output, _ = step.forward(dataset[i])
            for total, gradient in zip(sums, torch.autograd.grad(output.total, parameters), strict=True):
                total += gradient
        with torch.no_grad():
            for parameter, total in zip(parameters, sums, strict=True):
                parameter -= 0.01 * total / len(group)
    for found, expected in zip(learner.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
