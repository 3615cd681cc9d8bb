"""Evaluation from features encoded once equals the literal one for every method and feature location."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from episodes.dataset import ClipOptions, ClipReader, VideoDataset
from episodes.sampler import EpisodeSampler
from episodes.splits import SplitIndex, load_splits
from models.base import Episode, FewShotModel, ProtocolName
from models.layers import SharedWidthOptions
from run import features
from run.encoder import Encoder
from run.evaluation import evaluate, precompute_queries, precompute_supports, score_episodes
from run.feature_cache import FeatureCache, FeatureFile
from run.features import Allocate, FeatureBank, encode_videos, rows_of
from tests.helpers.methods import IMAGE_SIZE, PROTOCOLS, build, small_options
from tests.helpers.shipped import METHODS
from tests.helpers.tiny_runs import tiny_config

CPU = torch.device("cpu")
OPTIONS = ClipOptions(length=4, sampling="linspace", size=IMAGE_SIZE, short_side=IMAGE_SIZE, flip=False)
READER = ClipReader(OPTIONS, workers=0)
EPISODES = 5
ROUNDINGS = 8  # by which a weight may be wrong, each of them half a unit in the last place of float32


@pytest.fixture(scope="module")
def index(tiny_dataset) -> SplitIndex:
    return load_splits(tiny_dataset.splits, tiny_dataset.videos, ["test"])["test"]


@pytest.fixture(scope="module")
def sampler(index) -> EpisodeSampler:
    return EpisodeSampler(index, way=3, shot=2, query_per_class=1, seed=1)


@pytest.fixture(scope="module", params=METHODS)
def model(request) -> FewShotModel:
    return build(request.param).eval()


def encoder_of(model: FewShotModel) -> Encoder:
    return Encoder(model, CPU, normalise_pixels=True, amp=False)


def text_of(model: FewShotModel, index: SplitIndex) -> Tensor:
    with torch.no_grad():
        return model.class_text(index.prompts)


@torch.no_grad()
def literal_scores(model: FewShotModel, sampler: EpisodeSampler) -> dict[ProtocolName, Tensor]:
    """Returns scores with every video of every episode encoded by itself: float32 [E, Q, N] for each protocol."""
    encoder, text = encoder_of(model), text_of(model, sampler.index)
    scores: dict[ProtocolName, list[Tensor]] = {protocol: [] for protocol in PROTOCOLS}

    def features(videos: Sequence[int]) -> Tensor:
        return torch.stack([encoder(VideoDataset(sampler.index, OPTIONS, [video])[0][None])[0] for video in videos])

    for i in range(EPISODES):
        spec = sampler.episode(i)
        support = torch.stack([features(videos) for videos in spec.support.tolist()])
        episode = Episode(
            support[None], features(spec.query.tolist())[None], text[torch.from_numpy(spec.class_ids)][None]
        )
        for protocol, found in scores.items():
            found.append(model.score(*episode, protocol))
    return {protocol: torch.cat(found) for protocol, found in scores.items()}


def scores_from_bank(
    model: FewShotModel, sampler: EpisodeSampler, allocate: Allocate | None = None
) -> dict[ProtocolName, Tensor]:
    index, text = sampler.index, text_of(model, sampler.index)
    videos = range(len(index))
    bank = encode_videos(encoder_of(model), index, videos, READER, allocate)
    supports = precompute_supports(model, bank, index, videos, text)
    queries = precompute_queries(model, bank, videos, CPU)
    specs = [sampler.episode(i) for i in range(EPISODES)]
    scores = score_episodes(model, specs, supports, queries, text, PROTOCOLS, batch_episodes=2)
    return {protocol: torch.cat(batches) for protocol, batches in scores.items()}


@torch.no_grad()
def moved_by_rounding(
    model: FewShotModel, sampler: EpisodeSampler, scores: dict[ProtocolName, Tensor]
) -> dict[ProtocolName, Tensor]:
    """Returns how far the scores of each protocol change when every weight is rounded differently, float32 [].

    A sum in another order is the exact sum for weights that differ in their last digits. How much of that reaches the
    scores depends on the method: A2M2's are 50 times a small difference of numbers near 1. HyRSM's are such a
    difference too, so the roundings of numbers near 1 are added.
    """
    rounded, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in rounded.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter *= 1 + ROUNDINGS * torch.finfo(torch.float32).eps / 2 * noise
    moved = literal_scores(rounded, sampler)
    near_one = ROUNDINGS * torch.finfo(torch.float32).eps / 2
    return {protocol: (moved[protocol] - scores[protocol]).abs().max() + near_one for protocol in PROTOCOLS}


def test_scores_and_answers_equal_encoding_every_episode(model, sampler):
    scores, expected = scores_from_bank(model, sampler), literal_scores(model, sampler)
    moved = moved_by_rounding(model, sampler, expected)
    for protocol in PROTOCOLS:
        assert (scores[protocol] - expected[protocol]).abs().max() <= moved[protocol]
        assert torch.equal(scores[protocol].argmax(-1), expected[protocol].argmax(-1))


@pytest.mark.parametrize("method", ["tsfsar", "empnet"])
def test_features_above_half_of_free_memory_are_stored_in_bf16(method, sampler, monkeypatch, caplog):
    kept, model = [], build(method).eval()

    def allocate(shape: Sequence[int]) -> Tensor:
        kept.append(features.bank_memory(shape, CPU))
        return kept[-1]

    expected = scores_from_bank(model, sampler, allocate)["inductive"]
    needed = kept[0].nbytes
    monkeypatch.setattr(features, "free_memory", lambda device: 2 * needed)
    assert torch.equal(scores_from_bank(model, sampler, allocate)["inductive"], expected)
    monkeypatch.setattr(features, "free_memory", lambda device: 2 * needed - 1)
    with caplog.at_level("WARNING"):
        found = scores_from_bank(model, sampler, allocate)["inductive"]
    assert [bank.dtype for bank in kept] == [torch.float32, torch.float32, torch.bfloat16]
    assert "bf16" in caplog.text
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_features_too_large_for_a_gpu_stay_in_host_memory(monkeypatch):
    monkeypatch.setattr(features, "free_memory", lambda device: 40)  # half of it holds ten numbers in bf16
    kept = features.bank_memory((11, 1), torch.device("cuda"))
    assert (kept.dtype, kept.device.type) == (torch.bfloat16, "cpu")


def test_available_memory_is_converted_to_bytes(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(features, "MEMINFO", meminfo)
    assert features.free_memory(CPU) is None
    meminfo.write_text("MemTotal:        9000 kB\nMemFree:          100 kB\nMemAvailable:    2048 kB\nBuffers:  7 kB\n")
    assert features.free_memory(CPU) == 2048 * 1024


def test_free_memory_is_known_or_unlimited():
    assert features.free_memory(CPU) is None or features.free_memory(CPU) > 1e6
    assert features.free_memory(torch.device("meta")) is None


def test_evaluation_disables_dropout(sampler):
    dropout = {"DROPOUT": 0.5, "HIDDEN_DROPOUT": 0.5}
    model = build("clipfsar", TRANSFORMER=small_options(SharedWidthOptions, **dropout))
    scores: dict[bool, list[Tensor]] = {True: [], False: []}
    match = model.match
    model.match = lambda *parts: scores[was_training].append(match(*parts)) or scores[was_training][-1]  # type: ignore[method-assign]
    for was_training in scores:
        model.train(was_training)
        evaluate(encoder_of(model), sampler, text_of(model, sampler.index), EPISODES, ["inductive"], READER, 2)
        assert model.training is was_training
    assert all(torch.equal(found, expected) for found, expected in zip(*scores.values(), strict=True))


def test_correct_answers_are_counted_by_episode_and_class(sampler):
    model, classes = build("otam").eval(), len(sampler.index.classes)
    found = evaluate(encoder_of(model), sampler, text_of(model, sampler.index), EPISODES, ["inductive"], READER, 2)
    answers = scores_from_bank(model, sampler)["inductive"].argmax(-1).tolist()
    query_counts, right, shares = [0] * classes, [0] * classes, []
    for i in range(EPISODES):
        spec = sampler.episode(i)
        hits = [answer == label for answer, label in zip(answers[i], spec.query_labels, strict=True)]
        for label, hit in zip(spec.query_labels, hits, strict=True):
            query_counts[spec.class_ids[label]] += 1
            right[spec.class_ids[label]] += hit
        shares.append(sum(hits) / len(hits))
    assert 0 < sum(right) < sum(query_counts)
    result = found["inductive"]
    assert (result.query_counts.tolist(), result.right.tolist()) == (query_counts, right)
    assert result.per_episode.tolist() == pytest.approx(shares)


def test_features_on_disk_are_bit_exact(model, sampler, tmp_path):
    file = FeatureFile(tmp_path, "test", {})
    on_disk, in_memory = scores_from_bank(model, sampler, file.allocate), scores_from_bank(model, sampler)
    assert file.temporary.exists()
    assert all(torch.equal(on_disk[protocol], in_memory[protocol]) for protocol in PROTOCOLS)


class RefuseToBlock(TorchDispatchMode):
    """Fails at copies to another device that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func.overloadpacket is torch.ops.aten._to_copy
        assert not copies or kwargs.get("non_blocking"), "the host waits for a copy"
        return func(*args, **(kwargs or {}))


def test_rows_are_copied_without_blocking():
    bank = FeatureBank(torch.empty(3, 2, device="meta"), np.arange(3))
    with RefuseToBlock():
        assert bank.rows(np.array([2, 1])).device.type == "meta"


def test_a_bank_may_be_empty():
    assert rows_of([], 3).tolist() == [-1, -1, -1]


def test_each_video_is_encoded_once_for_any_number_of_episodes(sampler):
    model, frames = build("otam").eval(), []
    backbone, count = model.backbone_features, frames.append
    model.backbone_features = lambda clips: count(clips.shape[:2].numel()) or backbone(clips)  # type: ignore[method-assign]
    evaluate(encoder_of(model), sampler, text_of(model, sampler.index), 60, ["inductive"], READER, 50)
    assert sum(frames) == len(sampler.index) * OPTIONS.length


def test_each_support_video_is_prepared_once_for_both_protocols(sampler, monkeypatch):
    model, prepared = build("clipspm").eval(), []
    prepare = type(model).precompute_support

    def counted(self: FewShotModel, support: Tensor, class_text: Tensor) -> Tensor:
        prepared.append(support.shape[:3].numel())
        return prepare(self, support, class_text)

    monkeypatch.setattr(type(model), "precompute_support", counted)
    evaluate(encoder_of(model), sampler, text_of(model, sampler.index), 60, list(PROTOCOLS), READER, 50)
    assert sum(prepared) == len(sampler.index)


def test_each_query_video_is_precomputed_once_for_any_number_of_episodes(sampler, monkeypatch):
    model, prepared = build("clipfsar").eval(), []
    prepare = type(model).precompute_query

    def counted(self: FewShotModel, query: Tensor) -> Tensor:
        prepared.append(query.shape[:2].numel())
        return prepare(self, query)

    monkeypatch.setattr(type(model), "precompute_query", counted)
    evaluate(encoder_of(model), sampler, text_of(model, sampler.index), 60, ["inductive"], READER, 50)
    assert sum(prepared) == len(sampler.index)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_bit_exact_for_any_way_of_reading_videos(sampler, monkeypatch, workers):
    encoder, videos = encoder_of(build("otam").eval()), list(range(11))
    monkeypatch.setattr(features, "FRAMES_PER_BATCH", 8 * OPTIONS.length)
    expected = encode_videos(encoder, sampler.index, videos, READER).features
    monkeypatch.setattr(features, "VIDEOS_PER_READ", 2)
    assert torch.equal(encode_videos(encoder, sampler.index, videos, ClipReader(OPTIONS, workers)).features, expected)


def test_a_bank_finds_videos_in_any_order(index):
    encoder = encoder_of(build("otam").eval())
    some = encode_videos(encoder, index, [7, 3, 20], READER)
    every = encode_videos(encoder, index, range(len(index)), READER)
    for video in (3, 7, 20):
        torch.testing.assert_close(some.features[some.row_of_video[video]], every.features[video])
    with pytest.raises(AssertionError, match="not encoded"):
        some.rows(every.row_of_video[[4]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_scores_from_mapped_features(model, sampler, tiny_dataset, tmp_path):
    expected = scores_from_bank(model, sampler)
    model, device = model.cuda(), torch.device("cuda")
    cache = FeatureCache(tiny_config(tiny_dataset, tmp_path / "run", f"TEST.FEATURE_CACHE={tmp_path}"))
    encoder, text = Encoder(model, device, normalise_pixels=True, amp=False), text_of(model, sampler.index)
    written, read = (evaluate(encoder, sampler, text, EPISODES, PROTOCOLS, READER, 2, cache) for _ in range(2))
    model.cpu()
    for protocol in PROTOCOLS:
        answers = expected[protocol].argmax(-1).numpy()
        labels = [sampler.episode(i).query_labels for i in range(EPISODES)]
        shares = [(a == b).mean() for a, b in zip(answers, labels, strict=True)]
        assert written[protocol].per_episode.tolist() == read[protocol].per_episode.tolist() == shares
