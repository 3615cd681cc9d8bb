"""How tests load episodes, and compare two of them."""

import torch

from episodes.dataset import ClipOptions, EpisodeClips

CPU = torch.device("cpu")
OPTIONS = ClipOptions(length=4, sampling="linspace", size=24, short_side=28, flip=True)


def assert_same_episode(one: EpisodeClips, other: EpisodeClips) -> None:
    assert one.index == other.index
    assert torch.equal(one.clips, other.clips)
    assert one.mirrored == other.mirrored
    assert torch.equal(one.class_ids, other.class_ids)
    assert torch.equal(one.query_labels, other.query_labels)
