"""EMP-Net: the terms of the released code, and its equations written out video by video.

Shapes: N ways, K shots, Q queries, T frames, L patches, D width of CLIP's features.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from benchmarks.released_fixtures import Fixtures, SmallClip
from benchmarks.released_heads import HEADS
from models.base import Episode, EpisodeLabels
from models.matching import cosine_distances, otam
from models.model_empnet import EmpNet, EmpNetOptions, by_text, for_texts, levels_of
from models.tower_plugin import ProjectedLevels
from run.feature_cache import ClassTexts
from tests.helpers.methods import build, random_episode
from utils.errors import UserError

FOLDER = Path(__file__).parent / "fixtures" / "zoo"
LEVELS = ("token", "frame", "patch")
SENTENCES = 16


@pytest.fixture(scope="module")
def model() -> EmpNet:
    return build("empnet").eval()


def text_of(model: EmpNet, *shape: int) -> Tensor:
    """Class texts with sentences that differ: [..., (1+S) D]."""
    return torch.randn(*shape, (1 + SENTENCES) * model.clip.width, generator=torch.Generator().manual_seed(5))


# --- against the release ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_six_score_terms_equal_the_released_code():
    fixtures = Fixtures(FOLDER, HEADS["empnet"])
    model = fixtures.build()
    episode, _ = fixtures.episode("s1q1", "eval")
    videos = model.encode(torch.cat([episode.support.flatten(0, 2), episode.query[0]]))
    support, query = videos[:5].unflatten(0, (1, 5, 1)), videos[None, 5:]
    terms = model.explain(support, query, episode.class_text).measures["terms"].values[0]
    names = [f"{level}_{kind}" for kind in ("logits", "class_logits") for level in LEVELS]
    for number, name in enumerate(names):
        released = fixtures.tensor(f"s1q1.eval.{name}")[-5:]  # terms by text are those of supports and queries
        torch.testing.assert_close(terms[..., number], released, rtol=1e-4, atol=1e-6)
    in_order = fixtures.labels("s1q1.sl").argsort()
    of_supports = by_text(for_texts(levels_of(support[:, :, 0])), episode.class_text, model.options).softmax(dim=-1)
    for level, found in zip(LEVELS, of_supports[:, 0], strict=True):
        released = fixtures.tensor(f"s1q1.eval.{level}_class_logits")[:5][in_order]
        torch.testing.assert_close(found, released, rtol=1e-4, atol=1e-6)


# --- equations ----------------------------------------------------------------------------------------------


def literal_layer(layer: torch.nn.Module, tokens: list[Tensor], context: list[Tensor] | None = None) -> list[Tensor]:
    """Computes a transformer layer, token by token and head by head."""
    return [y + layer.feed_forward(y) for y in literal_attention(layer.attention, tokens, context)]


def literal_attention(attention: torch.nn.Module, tokens: list[Tensor], context: list[Tensor] | None) -> list[Tensor]:
    """Returns residual plus attention: each of the tokens [D] attends to the context, or to all tokens."""
    keys = [attention.norm(x) for x in (tokens if context is None else context)]
    out = []
    for x in tokens:
        heads = []
        for h in range(attention.heads):
            part = slice(h * 8, (h + 1) * 8)
            query = attention.to_query(attention.norm(x))[part]
            weights = torch.stack([query @ attention.to_key(k)[part] / 8**0.5 for k in keys]).softmax(dim=0)
            heads.append(sum(w * attention.to_value(k)[part] for w, k in zip(weights, keys, strict=True)))
        out.append(x + attention.project(torch.cat(heads)))
    return out


def literal_video(model: EmpNet, taps: Tensor) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Returns a and c of each frame, and b of each frame and patch, from tokens after the taps [T, taps, 1+L, D]."""
    frames = len(taps)
    z = [[torch.zeros_like(x) for x in frame[0]] for frame in taps]
    for number, reason in enumerate(model.reason):
        z = [[x + y for x, y in zip(z[t], taps[t, number], strict=True)] for t in range(frames)]
        class_tokens = literal_attention(reason.over_time, [frame[0] for frame in z], None)
        z = [[class_tokens[t], *literal_attention(reason.over_space, z[t][1:], None)] for t in range(frames)]
        z = [[x + reason.feed_forward(x) for x in frame] for frame in z]
    a = literal_layer(model.relate["token"], [frame[0] for frame in z])
    b = [literal_layer(model.relate["patch"], [a[t], *z[t][1:]])[1:] for t in range(frames)]
    means = [torch.stack(b[t]).mean(dim=0) + torch.stack(z[t][1:]).mean(dim=0) for t in range(frames)]
    return a, literal_layer(model.relate["frame"], means), b


@torch.no_grad()
def test_the_features_of_a_video_equal_the_method_written_out(model):
    taps = torch.randn(1, 2, 3, 5, model.clip.width, generator=torch.Generator().manual_seed(0))
    found = levels_of(model.encode_features(taps)[0])
    a, c, b = literal_video(model, taps[0])
    torch.testing.assert_close(found.token, torch.stack(a), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.frame, torch.stack(c), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.patch, torch.stack([torch.stack(frame) for frame in b]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("merge_before", [False, True])
def test_scores_equal_the_method_written_out_query_by_query(merge_before):
    model = build("empnet", MERGE_BEFORE=merge_before, BEST_PATCHES=3).eval()
    generator = torch.Generator().manual_seed(1)
    support = torch.randn(3, 2, 3, 2 + 4, model.clip.width, generator=generator)
    query = torch.randn(2, 3, 2 + 4, model.clip.width, generator=generator)
    text = text_of(model, 3)
    found = model.score(support[None], query[None], text[None])[0]

    def fused(video: Tensor, w: Tensor | None) -> list[Tensor]:
        sequences = [[video[:, 0]], [video[:, 1]], [video[:, 2 + patch] for patch in range(4)]]
        results = []
        for level, of_level in zip(LEVELS, sequences, strict=True):
            outputs = []
            for x in of_level:
                tokens = list(x) if w is None else [frame + w for frame in x]
                outputs.append(torch.stack(literal_layer(model.fuse[level], tokens, None if w is None else [*x, w])))
            results.append(torch.stack(outputs).mean(dim=0))
        return results

    for j, video in enumerate(query):
        logits = []
        for c in range(3):
            w = text[c, : model.clip.width]
            if merge_before:
                prototypes = fused(support[c].mean(dim=0), w)
            else:
                shots = [fused(shot, w) for shot in support[c]]
                prototypes = [(first + second) / 2 for first, second in zip(*shots, strict=True)]
            pairs = zip(fused(video, None), prototypes, strict=True)
            by_video = [-otam(cosine_distances(of_query, of_class), 0.5) for of_query, of_class in pairs]
            token, frame, *patches = (F.cosine_similarity(x, w, dim=-1) for x in video.unbind(dim=1))
            best_patches = torch.stack([patch.mean() for patch in patches]).sort(descending=True).values[:3]
            words = [token.mean(), frame.sort(descending=True).values[:2].mean(), best_patches.mean()]
            logits.append(torch.stack([*by_video, *words]))
        expected = torch.stack(logits).softmax(dim=0).mean(dim=1).log()
        torch.testing.assert_close(found[j], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_losses_use_probabilities_as_logits_by_default(model):
    episode = random_episode(model, ways=3, shots=2, queries=2, frames=3)
    labels = EpisodeLabels(torch.tensor([[2, 0]]), torch.tensor([[0, 1, 2]]), episode.class_text[0])
    terms = model.explain(*episode).measures["terms"].values[0]  # [Q, N, 6]
    text = episode.class_text[..., : model.clip.width]
    of_supports = by_text(for_texts(levels_of(episode.support.flatten(1, 2))), text, model.options)[:, 0]
    of_supports = of_supports.softmax(dim=-1)  # [3, N K, N]
    for twice in (True, False):
        again = build("empnet", SOFTMAX_TWICE=twice).eval()
        found = again.training_losses(episode, labels, "inductive").losses

        def cost(p: Tensor, label: int, twice: bool = twice) -> float:
            return float(-(p.log_softmax(dim=0) if twice else p.log())[label])

        by_video = [(cost(terms[0, :, i], 2) + cost(terms[1, :, i], 0)) / 2 for i in range(3)]
        words = []
        for i in range(3):
            of_queries = [cost(terms[0, :, 3 + i], 2), cost(terms[1, :, 3 + i], 0)]
            words.append(sum([*(cost(of_supports[i, v], v // 2) for v in range(6)), *of_queries]) / 8)
        assert found["cross_entropy"].item() == pytest.approx(sum(by_video), rel=1e-4)
        assert found["video_text"].item() == pytest.approx(sum(words), rel=1e-4)


# --- class texts --------------------------------------------------------------------------------------------


def test_training_samples_one_sentence_and_tests_use_the_mean():
    model = build("empnet")
    width = model.clip.width
    text = model.class_text(["clap", "ride a bike"])
    assert text.shape == (2, (1 + SENTENCES) * width)
    mean, *sentences = text.split(width, dim=1)
    torch.testing.assert_close(mean, torch.stack(sentences).mean(dim=0))
    assert torch.equal(build("empnet", RANDOM_TEMPLATE=False).class_text(["clap", "ride a bike"]), mean)
    episode = random_episode(model.eval(), episodes=1, ways=2)
    episode = episode._replace(class_text=text[None])
    labels = EpisodeLabels(torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1]]), text)

    def score(own: Tensor, training: bool, seed: int) -> Tensor:
        torch.manual_seed(seed)
        given = Episode(episode.support, episode.query, own[None])
        return model.train(training).training_losses(given, labels, "inductive").scores

    assert torch.equal(score(text, False, 0), score(mean, False, 0))
    found = {}
    for seed in range(4):
        torch.manual_seed(seed)
        picked = int(torch.randint(SENTENCES, (1,)))
        found[picked] = score(text, True, seed)
        torch.testing.assert_close(found[picked], score(sentences[picked], True, seed))
    assert len({tuple(scores.flatten().tolist()) for scores in found.values()}) == len(found) > 1


def test_classes_with_fewer_sentences_repeat_them(tmp_path):
    file = tmp_path / "texts.yaml"
    file.write_text("clap: [two hands meet]\nwave: [a hand waves, hello]\njump: [a jump, up and down, high]\n")
    model = build("empnet", TEXT_FILE=str(file))
    width = model.clip.width
    clap, wave, jump = model.class_text(["clap", "wave", "jump"]).unflatten(1, (4, width))
    assert torch.equal(clap, clap[:1].expand(4, width))
    assert torch.equal(wave[3], wave[1])  # in order: first, second, first
    torch.testing.assert_close(wave[0], wave[1:3].mean(dim=0))
    torch.testing.assert_close(jump[0], jump[1:].mean(dim=0))


def test_stored_text_features_depend_on_method_and_options():
    models_of_one_tower = (
        build("empnet"),
        build("empnet", RANDOM_TEMPLATE=False),
        build("clipfsar", BACKBONE="tiny-vit", TEXT_TEMPLATES="actionclip16"),
    )
    keys = [json.dumps(ClassTexts(each).describe(["clap", "jump"]), sort_keys=True) for each in models_of_one_tower]
    assert len(set(keys)) == 3


# --- the tower ----------------------------------------------------------------------------------------------


def test_taps_follow_each_third_of_the_blocks_without_later_blocks():
    visual = SmallClip({"tower": {"image": 32, "patch": 16, "width": 64, "layers": 12, "heads": 1, "out": 8}}).visual
    plugin = ProjectedLevels(visual, None)
    assert plugin.blocks == [4, 8, 12]
    computed = []

    def levels():
        for number in range(13):
            computed.append(number)
            yield torch.full((1, 2, 5, 64), float(number))

    early = ProjectedLevels(visual, [1, 3])
    assert early.read(visual, levels()).shape == (1, 2, 2, 5, 8)
    assert computed == [0, 1, 2, 3]


@pytest.mark.parametrize("taps", [[0, 3], [1, 4]])
def test_taps_missing_from_the_backbone_are_refused(taps):
    with pytest.raises(UserError, match=r"MODEL\.TAPS.*1 to 3"):
        models.build("empnet", 32, BACKBONE="tiny-vit", CLIP_WEIGHTS="random", TAPS=taps)


def test_the_frozen_tower_has_no_gradient_and_taps_can_be_stored(model):
    assert EmpNetOptions(NAME="empnet").TRAINABLE == "head"
    frames = torch.rand(1, 2, 3, 32, 32)
    assert not model.backbone_features(frames).requires_grad
    assert model.encode(frames).requires_grad
    torch.testing.assert_close(model.backbone_features(frames)[:, :, -1, 0], tower_feature(model, frames))


def tower_feature(model: EmpNet, frames: Tensor) -> Tensor:
    """Returns CLIP's feature of each frame, [1, T, D]."""
    return model.clip.visual(frames[0])[None]
