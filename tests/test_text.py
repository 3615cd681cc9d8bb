"""Text features: the plain mean over the templates, for any batches."""

import pytest
import torch

from models.clip_fsar import ClipTowers
from models.sentences import ClassSentences, TextOptions
from models.text import TEMPLATES, TemplateSet, mean_features, sentence_features
from utils.schema import ModelOptions

NAMES = ["ride a bike", "clap", "pour {} water"]


def sentences(templates: TemplateSet = "actionclip16") -> ClassSentences:
    return ClassSentences(TextOptions(TEXT_TEMPLATES=templates))


SIXTEEN = sentences().of(NAMES)


def lengths_and_counts(sentences: list[str]) -> torch.Tensor:
    """Returns a text tower without weights: three numbers per sentence, in half precision."""
    return torch.tensor([[len(s), s.count("a"), 3.0] for s in sentences], dtype=torch.float16)


@pytest.fixture(scope="module")
def towers() -> ClipTowers:
    return ClipTowers(ModelOptions(BACKBONE="tiny", CLIP_WEIGHTS="random"), 32)


def test_the_templates_equal_the_published_sentences():
    """Written out, since all other tests read them from the code."""
    names = [template.format("clap") for template in TEMPLATES["actionclip16"]]
    assert names == [
        "a photo of action clap", "a picture of action clap", "Human action of clap", "clap, an action",
        "clap this is an action", "clap, a video of action", "Playing action of clap", "clap",
        "Playing a kind of action, clap", "Doing a kind of action, clap", "Look, the human is clap",
        "Can you recognize the action of clap?", "Video classification of clap", "A video of clap",
        "The man is clap", "The woman is clap",
    ]  # fmt: skip
    assert TEMPLATES["photo"] == ("a photo of {}",)


@pytest.mark.parametrize("templates", list(TEMPLATES))
def test_a_text_feature_is_the_plain_mean_over_the_templates(templates):
    features = mean_features(sentence_features(lengths_and_counts, sentences(templates).of(NAMES)))
    assert features.dtype == torch.float32
    assert features.shape == (3, 3)
    for name, feature in zip(NAMES, features, strict=True):
        total = torch.zeros(3)
        for template in TEMPLATES[templates]:
            total += lengths_and_counts([template.replace("{}", name)])[0].float()
        torch.testing.assert_close(feature, total / len(TEMPLATES[templates]))


@pytest.mark.parametrize("normalise", ["each", "each+mean"])
def test_features_are_scaled_to_unit_length_before_and_after_the_mean(normalise):
    of_classes = [
        lengths_and_counts([template.replace("{}", name) for template in TEMPLATES["actionclip16"]]).float()
        for name in NAMES
    ]
    expected = torch.stack([(each / each.norm(dim=-1, keepdim=True)).mean(dim=0) for each in of_classes])
    if normalise == "each+mean":
        expected = expected / expected.norm(dim=-1, keepdim=True)
    features = mean_features(sentence_features(lengths_and_counts, SIXTEEN, normalise), normalise)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 48, 1000])
def test_batching_does_not_change_the_features(batch_size):
    expected = torch.cat(sentence_features(lengths_and_counts, SIXTEEN))
    assert torch.equal(torch.cat(sentence_features(lengths_and_counts, SIXTEEN, "none", batch_size)), expected)


def test_batches_respect_the_limit_and_encode_each_sentence_once():
    calls: list[list[str]] = []

    def encode(sentences: list[str]) -> torch.Tensor:
        calls.append(sentences)
        return lengths_and_counts(sentences)

    sentence_features(encode, SIXTEEN, batch_size=10)
    assert [len(call) for call in calls] == [10, 10, 10, 10, 8]
    everything = [sentence for call in calls for sentence in call]
    assert everything == [template.replace("{}", name) for name in NAMES for template in TEMPLATES["actionclip16"]]


@pytest.mark.parametrize("templates", list(TEMPLATES))
def test_clip_features_equal_one_sentence_at_a_time_without_normalisation(towers, templates):
    names = ["ride a bike", "clap"]
    features = towers.class_text(sentences(templates), names)
    clip = towers._text_tower[0]
    for name, feature in zip(names, features, strict=True):
        with torch.no_grad():
            filled = [template.replace("{}", name) for template in TEMPLATES[templates]]
            each = [clip.encode_text(towers._tokenize([sentence]))[0] for sentence in filled]
        torch.testing.assert_close(feature, sum(each) / len(each), rtol=1e-4, atol=1e-5)
    # The tower's own features are far from unit length, so a normalisation anywhere would have shown above.
    assert (features.norm(dim=-1) - 1).abs().min() > 0.1


def test_text_features_have_no_gradient_and_differ_between_classes(towers):
    features = towers.class_text(sentences(), NAMES)
    assert not features.requires_grad
    assert features.shape == (3, towers.width)
    assert torch.cdist(features, features).add(torch.eye(3)).min() > 1e-3


def test_the_seed_changes_only_the_tiny_image_tower():
    built = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        built.append(ClipTowers(ModelOptions(BACKBONE="tiny", CLIP_WEIGHTS="random", SEED=seed), 32))
    first, second = (towers.class_text(sentences(), NAMES) for towers in built)
    assert torch.equal(first, second)
    weights = [next(towers.parameters()) for towers in built]
    assert not torch.equal(*weights)


def test_building_the_tiny_backbone_keeps_the_random_state():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        towers = ClipTowers(ModelOptions(BACKBONE="tiny", CLIP_WEIGHTS="random"), 32)
        drawn.append((next(towers.parameters()).sum().item(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
