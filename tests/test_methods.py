"""The contract of every method, tested for each method of `tests/helpers/shipped.py`.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, F a method's own feature shape.
"""

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor, nn

import models
from models.base import Episode, EpisodeLabels, FewShotModel
from tests.helpers.methods import IMAGE_SIZE, PROTOCOLS, WITHOUT_TRAINING, build, random_episode
from tests.helpers.shipped import METHODS

# B, N, K, Q, T
SIZES = {
    "5-way 1-shot": (1, 5, 1, 5, 8),
    "5-shot": (1, 2, 5, 2, 4),
    "one query": (2, 3, 2, 1, 3),
    "7-way": (1, 7, 1, 3, 5),
    "16 frames": (1, 2, 1, 2, 16),
    "one frame": (1, 2, 1, 2, 1),
}
# Parameters that no loss can move: part of the name -> the reason. None so far.
WITHOUT_GRADIENT: dict[str, str] = {}


@pytest.fixture(scope="module", params=METHODS)
def model(request) -> FewShotModel:
    """Returns each method, in evaluation mode; a test that changes it builds its own."""
    return build(request.param).eval()


@pytest.fixture(scope="module")
def name(model) -> str:
    return next(known for known in METHODS if type(model) is models.method_class(known))


def labels_of(episode: Episode, shift: int = 0) -> EpisodeLabels:
    """Returns each query's class in turn; the episode's classes are the last of some more training classes."""
    batch, queries = episode.query.shape[:2]
    ways, width = episode.class_text.shape[1:]
    query = ((torch.arange(queries) + shift) % ways).expand(batch, queries).contiguous()
    other_classes = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    class_ids = 4 + torch.arange(batch * ways).view(batch, ways)
    return EpisodeLabels(query, class_ids, torch.cat([other_classes, episode.class_text.flatten(0, 1)]))


def one_of(labels: EpisodeLabels, index: int) -> EpisodeLabels:
    part = slice(index, index + 1)
    return EpisodeLabels(labels.query[part], labels.class_ids[part], labels.all_text)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Asserts equality up to the order of float32 additions."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def one_episode(episodes: Episode, index: int) -> Episode:
    part = slice(index, index + 1)
    return Episode(episodes.support[part], episodes.query[part], episodes.class_text[part])


# Training


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_parameter_has_a_finite_gradient_in_training(name, protocol):
    model = build(name).train()
    model.set_training_classes(7)
    for parameter in model.parameters():  # a layer that starts at 0 would let no gradient through
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    ways, shots, queries, frames = 3, 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(ways * shots + queries, frames, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    class_text = model.class_text(["clap", "ride a bike", "jump"])[None]
    model.drop_text_tower()

    features = model.encode(videos)
    support = features[: ways * shots].unflatten(0, (1, ways, shots))
    episode = Episode(support, features[ways * shots :][None], class_text)
    output = model.training_losses(episode, labels_of(episode), protocol)
    assert output.total.requires_grad == (name not in WITHOUT_TRAINING)
    if output.total.requires_grad:
        output.total.backward()

    assert output.scores.shape == (1, queries, ways)
    assert output.scores.dtype == torch.float32
    assert all(loss.shape == () and loss.isfinite() for loss in output.losses.values())
    torch.testing.assert_close(output.total, sum(output.losses.values()))
    gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert bool(gradients) == (name not in WITHOUT_TRAINING)
    without = {key for key, gradient in gradients.items() if gradient is None or not gradient.any()}
    assert {key for key in without if not any(known in key for known in WITHOUT_GRADIENT)} == set()
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_are_equal_in_training_and_test(model, protocol):
    episode = random_episode(model, episodes=2)
    output = model.training_losses(episode, labels_of(episode), protocol)
    assert_same(output.scores, model.score(*episode, protocol))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_and_losses_are_finite_for_any_episode_size(model, size, protocol):
    episodes, ways, shots, queries, frames = SIZES[size]
    episode = random_episode(model, episodes, ways, shots, queries, frames)
    scores = model.score(*episode, protocol)
    assert scores.shape == (episodes, queries, ways)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert model.training_losses(episode, labels_of(episode), protocol).total.isfinite()


# Labels cannot leak


@pytest.mark.parametrize(
    "method", ["encode", "match", "score", "score_precomputed", "precompute_support", "precompute_query", "class_text"]
)
def test_scoring_functions_have_no_label_argument(model, method):
    arguments = inspect.signature(getattr(model, method)).parameters
    assert not [argument for argument in arguments if "label" in argument or "target" in argument]
    # Nor through unnamed arguments.
    assert not [a for a in arguments.values() if a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]


def test_an_encoded_episode_has_no_label():
    assert list(inspect.signature(Episode).parameters) == ["support", "query", "class_text"]


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_query_labels_change_losses_but_not_scores(model, protocol):
    episode = random_episode(model)
    outputs = [model.training_losses(episode, labels_of(episode, shift), protocol) for shift in range(3)]
    for output in outputs[1:]:
        assert torch.equal(output.scores, outputs[0].scores)
        assert output.losses["cross_entropy"] != outputs[0].losses["cross_entropy"]


# Order carries no meaning


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_permuting_the_classes_permutes_the_scores(model, protocol):
    episode = random_episode(model, ways=4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = Episode(episode.support[:, order], episode.query, episode.class_text[:, order])
    assert_same(model.score(*permuted, protocol), model.score(*episode, protocol)[..., order])


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_permuting_the_queries_permutes_the_scores(model, protocol):
    episode = random_episode(model, queries=4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = Episode(episode.support, episode.query[:, order], episode.class_text)
    assert_same(model.score(*permuted, protocol), model.score(*episode, protocol)[:, order])


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_permuting_the_shots_keeps_the_scores(model, protocol):
    episode = random_episode(model, shots=3)
    permuted = Episode(episode.support[:, :, [2, 0, 1]], episode.query, episode.class_text)
    assert_same(model.score(*permuted, protocol), model.score(*episode, protocol))


# Protocols


@torch.no_grad()
def test_inductive_scores_do_not_depend_on_other_queries(model):
    episode = random_episode(model, episodes=2, queries=3)
    scores = model.score(*episode, "inductive")
    others = random_episode(model, episodes=2, queries=3, seed=1).query
    for position in range(3):
        query = episode.query[:, position : position + 1]
        other_queries = others.clone()
        other_queries[:, position] = query[:, 0]
        for queries, place in ((query, 0), (other_queries, position)):
            found = model.score(episode.support, queries, episode.class_text, "inductive")
            assert_same(found[:, place], scores[:, position])


@torch.no_grad()
def test_fast_inductive_scoring_equals_the_plain_one(model):
    episode = random_episode(model, episodes=2, queries=3)
    support = model.precompute_support(episode.support, episode.class_text)
    precomputed = support, model.precompute_query(episode.query), episode.class_text
    assert_same(model.match_alone(*precomputed), FewShotModel.match_alone(model, *precomputed))


@torch.no_grad()
def test_protocols_agree_for_a_single_query(model):
    episode = random_episode(model, queries=1)
    assert_same(model.score(*episode, "transductive"), model.score(*episode, "inductive"))


@torch.no_grad()
def test_the_protocol_matters_only_for_transductive_methods(model):
    episode = random_episode(model)
    together, alone = (model.score(*episode, protocol) for protocol in PROTOCOLS)
    if model.transductive:
        assert (together - alone).abs().max() > 1e-3
    else:
        assert_same(together, alone)
        losses = [model.training_losses(episode, labels_of(episode), protocol).losses for protocol in PROTOCOLS]
        assert losses[0].keys() == losses[1].keys()
        for key in losses[0]:
            assert_same(losses[0][key], losses[1][key])


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_preparing_videos_one_by_one_keeps_the_scores(model, protocol):
    episode = random_episode(model)
    prepared = torch.stack(
        [
            model.precompute_support(
                episode.support[:, way : way + 1, shot : shot + 1], episode.class_text[:, way : way + 1]
            )
            for way in range(3)
            for shot in range(2)
        ],
        dim=1,
    )
    support = prepared.flatten(1, 3).unflatten(1, (3, 2))
    query = torch.cat([model.precompute_query(one) for one in episode.query.split(1, dim=1)], dim=1)
    found = model.score_precomputed(support, query, episode.class_text, protocol)
    assert_same(found, model.score(*episode, protocol))


# Batches of episodes, and videos


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_of_episodes_equals_single_episodes(model, protocol):
    episodes = random_episode(model, episodes=3)
    queries = torch.cat([labels_of(one_episode(episodes, index), shift=index).query for index in range(3)])
    labels = dataclasses.replace(labels_of(episodes), query=queries)
    together = model.training_losses(episodes, labels, protocol)
    each = [model.training_losses(one_episode(episodes, i), one_of(labels, i), protocol) for i in range(3)]
    assert_same(together.scores, torch.cat([output.scores for output in each]))
    assert_same(model.score(*episodes, protocol), together.scores)
    for key, loss in together.losses.items():
        assert_same(loss, torch.stack([output.losses[key] for output in each]).mean())


@torch.no_grad()
def test_a_videos_features_do_not_depend_on_the_other_videos(model):
    videos = torch.rand(3, 4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    together = model.encode(videos)
    assert together.shape[0] == 3
    for video, expected in zip(videos, together, strict=True):
        assert_same(model.encode(video[None])[0], expected)


@torch.no_grad()
def test_encoding_is_equal_in_training_and_test(model):
    videos = torch.rand(3, 4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    features, losses = model.encode_for_training(
        model.backbone_features(videos), videos if model.needs_frames else None
    )
    assert_same(features, model.encode(videos))
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())


@torch.no_grad()
def test_class_texts_do_not_depend_on_the_other_classes(model):
    together = model.class_text(["clap", "ride a bike", "jump"])
    assert together.dtype == torch.float32
    assert_same(model.class_text(["ride a bike"])[0], together[1])


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bf16_and_float32_agree_on_a_clear_episode(model, name, protocol):
    generator = torch.Generator().manual_seed(0)
    ways, shots, frames = 3, 2, 4
    line = torch.linspace(-1, 1, IMAGE_SIZE)
    light, waves = torch.ones(IMAGE_SIZE, IMAGE_SIZE), torch.sin(8 * line)[:, None].expand(IMAGE_SIZE, IMAGE_SIZE)
    # Light and dark differ in strength too, so that the waves are not equally far from both.
    patterns = 3 * torch.stack([2 * light, -light, waves])[:, None, None, None]
    shape = (ways, shots + 1, frames, 3, IMAGE_SIZE, IMAGE_SIZE)
    videos = patterns + 0.05 * torch.randn(shape, generator=generator)
    class_text = model.class_text(["clap", "ride a bike", "jump"])[None]
    if name in WITHOUT_TRAINING:  # it uses only texts, and those of an untrained tower are unrelated to the videos
        class_text = model.encode(videos[:, 0]).mean(dim=1)[None]
    scores = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = model.encode(videos.flatten(0, 1)).float().unflatten(0, (1, ways, shots + 1))
        episode = Episode(features[:, :, :shots], features[:, :, shots], class_text)
        scores.append(model.score(*episode, protocol))
    full, half_precision = scores
    gaps = full.sort(dim=-1).values.diff(dim=-1)
    assert (full - half_precision).abs().max() < 0.25 * gaps.min()
    assert torch.equal(full.argsort(dim=-1), half_precision.argsort(dim=-1))


# Explaining


def test_an_explanation_has_valid_shapes_and_no_gradient(model):
    videos = torch.rand(10, 4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    class_text = random_episode(model, ways=3).class_text
    with torch.no_grad():
        features = model.encode(videos)
        explanation = model.explain(features[:6].unflatten(0, (1, 3, 2)), features[6:][None], class_text)
    pairings = [pairing for pairing in explanation.pairings.values() if pairing is not None]
    for pairing in pairings:
        assert pairing.shape[:3] == (1, 4, 3)
        assert pairing.ndim == 5
        assert (pairing >= -1e-6).all()
        assert (pairing.sum(dim=(-2, -1)) > 0).all()
    for features in explanation.features.values():
        assert features.shape[:2] == (1, 4)
    for measure in explanation.measures.values():
        assert measure.values.ndim == 4
        assert measure.values.shape[1] == 4
        assert measure.values.shape[2] in (1, 3)
        expected = {"class": 3, "part": len(measure.parts)}
        assert measure.values.shape[3] == expected.get(measure.axis, measure.values.shape[3])
    tensors = [*pairings, *explanation.features.values(), *(m.values for m in explanation.measures.values())]
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in tensors)


@torch.no_grad()
def test_the_same_clip_as_several_shots_is_explained_like_one_shot(model):
    features = model.encode(torch.rand(5, 4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)))
    support, others = features[:3].unflatten(0, (1, 3, 1)), (features[3:][None], random_episode(model).class_text)
    expected, found = (model.explain(support.repeat_interleave(shots, dim=2), *others) for shots in (1, 3))
    for name, pairing in expected.pairings.items():
        if pairing is not None and name not in ("PADM", "TFE"):  # anchors are means over support videos and queries
            torch.testing.assert_close(found.pairings[name], pairing, rtol=0.01, atol=1e-3)
    for name, measure in expected.measures.items():
        torch.testing.assert_close(found.measures[name].values, measure.values, rtol=0.01, atol=1e-3)
