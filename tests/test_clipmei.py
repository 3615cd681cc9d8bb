"""CLIP-MEI equals its equations written out one number at a time; each of its modules can be off.

The parts that it shares with CLIP-SPM are written out in `test_clipspm.py`.
"""

import math

import pytest
import torch
from torch import Tensor

import models
from benchmarks.released_fixtures import FakeTowers, build_head
from models.model_clipmei import ClipMei, ClipMeiOptions
from tests.helpers.literal_clipspm import PROTOCOLS, SMALL_TRANSFORMER, LiteralClipSpm, labels_of
from tests.helpers.literal_layers import Video, literal_transformer
from tests.helpers.methods import random_episode

WIDTH = 6


def head(**options) -> ClipMei:
    """Returns CLIP-MEI for features of WIDTH, in evaluation mode."""
    torch.manual_seed(0)
    options.setdefault("QSA", {"GENERATOR_HIDDEN": 7})
    return build_head("clipmei", FakeTowers(WIDTH), TRANSFORMER=SMALL_TRANSFORMER, **options).eval()


class LiteralClipMei(LiteralClipSpm):
    """The equations, on the weights of a model and a single episode; without gates, losses of queries alone."""

    def __init__(self, model: ClipMei) -> None:
        super().__init__(model)
        self.model.HSMR, self.model.SPM, self.model.PADM = self.model.MIC, self.model.QSA, self.model.TFE

    def fuse(self, prompt: Tensor, frames: Video) -> Video:
        """SF: [p^; x^], the prompt first."""
        added = [frame + self.options.QSA.ADDED * prompt for frame in frames]
        return literal_transformer([prompt, *added], self.model.fusion.temporal)

    def episode(self, support: Tensor, query: Tensor, text: Tensor, labels: list[int], protocol: str) -> tuple:
        """Returns scores [Q][N] and losses of one episode: support [N, K, T, D], query [Q, T, D], text [N, D]."""
        support_videos = [[list(video.double()) for video in videos] for videos in support]
        queries, texts = [list(video.double()) for video in query], list(text.double())
        of_queries = [texts[label] for label in labels]  # as released: the mean goes over the queries' true classes
        refined = [[self.fuse(texts[c], video)[1:] for video in videos] for c, videos in enumerate(support_videos)]
        prompts = [self.generate(video, of_queries) for video in queries]
        fake = [self.fuse(prompt, video) for prompt, video in zip(prompts, queries, strict=True)]
        real = [self.fuse(text, video) for text, video in zip(of_queries, queries, strict=True)]
        together = [fake] if protocol == "transductive" else [[tokens] for tokens in fake]
        scores = [row for group in together for row in self.compare(refined, [tokens[1:] for tokens in group])]

        auxiliary, qsa = self.options.AUXILIARY_WEIGHT, self.options.QSA
        flat = [video for videos in support_videos for video in videos]
        of_prompts, of_tokens = self.imitation(of_queries, prompts, real, fake)
        entropies = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(scores, labels, strict=True)]
        return scores, {
            "cross_entropy": sum(entropies) / len(entropies),
            "motion": auxiliary * self.options.MIC.WEIGHT * (self.motion_loss(queries) + self.motion_loss(flat)),
            "text": auxiliary * qsa.TEXT_WEIGHT * of_prompts,
            "consistency": auxiliary * qsa.CONSISTENCY_WEIGHT * of_tokens,
        }


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "options",
    [
        {"AUXILIARY_WEIGHT": 1.0},
        {
            "AUXILIARY_WEIGHT": 0.3,
            "MIC": {"WEIGHT": 1.7},
            "QSA": {"GENERATOR_HIDDEN": 7, "ADDED": 0.6, "TEXT_WEIGHT": 0.2, "CONSISTENCY_WEIGHT": 0.4},
        },
    ],
    ids=["released", "other"],
)
def test_scores_and_losses_equal_the_equations_on_balanced_episodes(options, protocol):
    model, generator = head(**options), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    support, query = (torch.randn(shape, generator=generator) for shape in ((1, 3, 2, 4, WIDTH), (1, 6, 4, WIDTH)))
    text, labels = torch.randn(1, 3, WIDTH, generator=generator), [0, 1, 2, 2, 0, 1]
    output = model.training_losses((support, query, text), labels_of(torch.tensor([labels])), protocol)
    scores, losses = LiteralClipMei(model).episode(support[0], query[0], text[0], labels, protocol)
    torch.testing.assert_close(output.scores[0].double(), torch.tensor(scores).double(), rtol=1e-4, atol=1e-4)
    assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("module", ["MIC", "QSA", "TFE"])
def test_each_module_can_be_disabled(module):
    torch.manual_seed(0)
    model = models.build("clipmei", 32, BACKBONE="tiny", CLIP_WEIGHTS="random", **{module: {"ENABLED": False}}).eval()
    assert not [name for name in model.state_dict() if name.startswith(module)]
    episode = random_episode(model)
    output = model.training_losses(episode, labels_of(torch.tensor([[0, 1, 2]])), "inductive")
    assert output.total.isfinite()
    missing = {"MIC": {"motion"}, "QSA": {"text", "consistency"}, "TFE": set()}[module]
    assert {"cross_entropy", "motion", "text", "consistency"} - output.losses.keys() == missing


def test_the_released_values_are_the_defaults():
    options = ClipMeiOptions()
    assert (options.TEXT_TEMPLATES, options.QSA.ADDED, options.AUXILIARY_WEIGHT) == ("photo", 0.1, 0.001)
    assert (options.QSA.TEXT_WEIGHT, options.QSA.CONSISTENCY_WEIGHT, options.MIC.POOL) == (0.5, 1.0, "mean")
