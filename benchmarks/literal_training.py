"""A straightforward training loop, the baseline of benchmarks/training.py.

The loader converts frames one by one from PIL to normalised float32 tensors, support and queries pass the backbone in
two calls, and every step reads its loss and accuracy. Random numbers are those of the framework, so both sides see the
same pixels.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from episodes.dataset import ClipOptions
from episodes.sampler import EpisodeSampler, generator
from models.base import Episode, EpisodeLabels, FewShotModel
from run.training_step import dropout_seed
from utils.schema import Config
from videotransforms.video_transforms import FLIP_PROBABILITY
from videotransforms.volume_transforms import FrameChoice


class LiteralEpisodes(Dataset):
    """Training episodes as float32 tensors, from folders of JPEGs whose short side already has the requested size."""

    def __init__(self, sampler: EpisodeSampler, options: ClipOptions, model: FewShotModel, episodes: range) -> None:
        self.sampler, self.options, self.episodes = sampler, options, episodes
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (model.pixel_mean, model.pixel_std))

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """Returns support float32 [N*K, T, 3, H, W], query float32 [Q, T, 3, H, W], class_ids [N], query_labels [Q]."""
        spec = self.sampler.episode(self.episodes[item])
        videos = [*spec.support.ravel(), *spec.query]
        clips = torch.stack([self._clip(int(video), spec.index, position) for position, video in enumerate(videos)])
        return {
            "support": clips[: spec.support.size],
            "query": clips[spec.support.size :],
            "class_ids": torch.from_numpy(spec.class_ids),
            "query_labels": torch.from_numpy(spec.query_labels),
        }

    def _clip(self, video: int, episode: int, position: int) -> Tensor:
        options, index = self.options, self.sampler.index
        rng = generator(self.sampler.seed, index.split, episode, position + 1)
        files = sorted(index.path(video).iterdir())
        chosen = FrameChoice(options.length, options.sampling, rng)(len(files))
        images = [Image.open(files[frame]).convert("RGB") for frame in chosen]
        width, height = images[0].size
        top = int(rng.integers(0, height - options.size, endpoint=True))
        left = int(rng.integers(0, width - options.size, endpoint=True))
        mirrored = rng.random() < FLIP_PROBABILITY and options.flip
        frames = []
        for image in images:
            image = image.crop((left, top, left + options.size, top + options.size))
            if mirrored:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            frames.append((pixels - self.mean) / self.std)
        return torch.stack(frames)


def literal_losses(
    model: FewShotModel,
    class_text: Tensor,
    sampler: EpisodeSampler,
    clip_options: ClipOptions,
    config: Config,
    episodes: range,
) -> Iterator[float]:
    """Trains on one episode after the other, with one step each, and yields the loss of each."""
    device, ways = class_text.device, config.TRAIN.WAY
    optimizer = torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.SOLVER.LR, betas=(config.SOLVER.BETAS[0], config.SOLVER.BETAS[1]),
        weight_decay=config.SOLVER.WEIGHT_DECAY, fused=False, foreach=False,
    )  # fmt: skip
    loader = DataLoader(
        LiteralEpisodes(sampler, clip_options, model, episodes), batch_size=1, num_workers=config.DATA.NUM_WORKERS
    )
    for index, batch in zip(episodes, loader, strict=True):
        torch.manual_seed(dropout_seed(config.MODEL.SEED, index))  # so that dropout is the same too
        batch = {name: value.to(device) for name, value in batch.items()}
        support = model.encode(batch["support"].squeeze(0)).unflatten(0, (1, ways, -1))
        query = model.encode(batch["query"].squeeze(0)).unsqueeze(0)
        episode = Episode(support, query, class_text[batch["class_ids"]])
        labels = EpisodeLabels(batch["query_labels"], batch["class_ids"], class_text)
        output = model.training_losses(episode, labels, config.TRAIN.PROTOCOL)
        optimizer.zero_grad()
        output.total.backward()
        if config.TRAIN.CLIP_GRAD:
            nn.utils.clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD)
        optimizer.step()
        accuracy = (output.scores.argmax(dim=-1) == batch["query_labels"]).float().mean().item()
        assert 0 <= accuracy <= 1
        yield output.total.item()
