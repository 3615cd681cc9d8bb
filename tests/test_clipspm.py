"""CLIP-SPM equals its equations written out one number after the other; each of its modules can be off."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import models.clip_fsar
from benchmarks.released_fixtures import NoTowers
from models.base import Episode, EpisodeLabels
from models.clip_prompts import MotionOptions
from models.layers import Attention, TransformerLayer
from models.model_clipspm import ClipSpm, ClipSpmOptions
from tests.test_matching import literal_otam

SMALL_TRANSFORMER = {"HEADS": 2, "HEAD_DIM": 5, "HIDDEN": 9}
PROTOCOLS = ["transductive", "inductive"]


def labels_of(query_labels: Tensor) -> EpisodeLabels:
    """Returns labels int64 [B, Q] of the queries; CLIP-SPM's losses do not use other training classes."""
    return EpisodeLabels(query_labels, torch.empty(0), torch.empty(0))


@pytest.fixture
def head(monkeypatch):
    """Builds CLIP-SPM without CLIP, for features of a given width, in evaluation mode: no dropout."""

    def build(width: int, **options) -> ClipSpm:
        monkeypatch.setattr(models.clip_fsar, "ClipTowers", lambda *_: NoTowers(width))
        torch.manual_seed(0)
        return ClipSpm(ClipSpmOptions(**options), 224).eval()

    return build


# CLIP-SPM from its equations: one video, frame and class at a time, in float64.
# A vector is a Tensor [D], a video a list of T vectors; only the weights of the module are used.

Video = list[Tensor]


def literal_linear(vector: Tensor, layer: nn.Linear) -> Tensor:
    product = torch.stack([(row * vector).sum() for row in layer.weight])
    return product if layer.bias is None else product + layer.bias


def literal_attention(tokens: Video, block: Attention) -> Video:
    """Returns W_o MHA(LN(q) W_q, LN(k) W_k, LN(v) W_v), without the residual."""
    normalised = []
    for token in tokens:
        centred = token - token.mean()
        unit = centred / torch.sqrt((centred**2).mean() + block.norm.eps)
        normalised.append(unit * block.norm.weight + block.norm.bias)
    queries, keys, values = (
        [literal_linear(token, layer) for token in normalised]
        for layer in (block.to_query, block.to_key, block.to_value)
    )
    size = len(queries[0]) // block.heads
    mixed = []
    for query in queries:
        heads = []
        for head in range(block.heads):
            part = slice(head * size, (head + 1) * size)
            weights = [math.exp((query[part] @ key[part]).item() / math.sqrt(size)) for key in keys]
            heads.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)) / sum(weights))
        mixed.append(torch.cat(heads))
    return [literal_linear(token, block.project) for token in mixed]


def literal_feed_forward(vector: Tensor, layers: nn.Sequential) -> Tensor:
    hidden = literal_linear(vector, layers[0])
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return literal_linear(gelu, layers[3])


def literal_transformer(tokens: Video, layer: TransformerLayer) -> Video:
    """Tr(x) = y + FFN(y), y = A(x, x, x) + x."""
    attended = [x + a for x, a in zip(tokens, literal_attention(tokens, layer.attention), strict=True)]
    return [y + literal_feed_forward(y, layer.feed_forward) for y in attended]


class LiteralClipSpm:
    """The equations, on the weights of a model and a single episode."""

    def __init__(self, model: ClipSpm) -> None:
        self.model = copy.deepcopy(model).double()
        self.options = model.options

    def gate(self, vector: Tensor, layers: nn.Sequential) -> Tensor:
        hidden = literal_linear(vector, layers[0])
        slope = self.options.SPM.NEGATIVE_SLOPE
        leaky = torch.stack([value if value > 0 else slope * value for value in hidden])
        return 1 / (1 + torch.exp(-literal_linear(leaky, layers[2])))

    def fuse(self, prompt: Tensor, frames: Video) -> Video:
        """SF: [p^; x^], the prompt first."""
        fusion = self.model.fusion
        gated = self.options.SPM.ALPHA * (prompt * self.gate(prompt, fusion.prompt_gate))
        fused = [gated + frame * self.gate(frame, fusion.frame_gate) for frame in frames]
        return literal_transformer([prompt, *fused], fusion.temporal)

    def motion(self, frames: Video) -> Tensor:
        smoothed = frames
        for convolution in self.model.HSMR.smooth:
            result = []
            for t in range(len(smoothed)):
                value = convolution.bias.clone()
                for tap in range(3):
                    if 0 <= t + tap - 1 < len(smoothed):
                        value = value + convolution.weight[:, :, tap] @ smoothed[t + tap - 1]
                result.append(value)
            smoothed = result
        total = torch.zeros_like(frames[0])
        for t in range(len(frames) - 1):
            forward = smoothed[t + 1] - frames[t]
            backward = smoothed[t] - frames[t + 1]
            total = total + 0.5 * (forward + backward)
        return total / (len(frames) - 1)

    def motion_loss(self, videos: list[Video]) -> float:
        """Returns d(deep motion, refined motion prompt) of some videos."""
        total = 0.0
        for frames in videos:
            refined_prompt, *refined_frames = self.fuse(self.motion(frames), frames)
            total += ((self.motion(refined_frames) - refined_prompt) ** 2).sum().item()
        return total / len(videos)

    def generate(self, frames: Video, texts: list[Tensor]) -> Tensor:
        """p_gen = MLP(tau r): tau the mean of the texts, r the mean of all activations of the video."""
        token = sum(texts) / len(texts)
        response = sum(frame.sum() for frame in frames) / (len(frames) * len(frames[0]))
        return literal_feed_forward(token * response, self.model.SPM.generator)

    def distance(self, query: Video, prototype: Video) -> float:
        """Returns OTAM of 1 - x.y / (|x||y| + 0.01) in both directions."""
        rows = [[1 - (x @ y) / (x.norm() * y.norm() + 0.01) for y in prototype] for x in query]
        matrix = torch.tensor(rows, dtype=torch.float64)
        return literal_otam(matrix, 0.5) + literal_otam(matrix.T, 0.5)

    def compare(self, support: list[list[Video]], queries: list[Video]) -> list[list[float]]:
        """-(0.5 D1 + D2 + D3) of refined support videos [N][K] and queries [Q] that are matched together."""
        frames, ways, shots = len(queries[0]), len(support), len(support[0])
        prototypes = [[sum(video[t] for video in videos) / shots for t in range(frames)] for videos in support]
        anchors = [
            [sum(video[t] for video in [*videos, *queries]) / (shots + len(queries)) for t in range(frames)]
            for videos in support
        ]
        global_anchor = [sum(anchor[t] for anchor in anchors) / ways for t in range(frames)]

        flat = [video for videos in support for video in videos]
        support_side, query_side = [], []  # [T][samples]
        for t in range(frames):
            samples = [video[t] for video in [*anchors, *flat]]
            support_side.append(literal_transformer(samples, self.model.PADM.among_samples))
            samples = [global_anchor[t]] + [video[t] for video in queries]
            query_side.append(literal_transformer(samples, self.model.PADM.among_samples))

        scores = []
        for j, query in enumerate(queries):
            row = []
            for c in range(ways):
                own = range(ways + c * shots, ways + (c + 1) * shots)
                modulated = [sum(support_side[t][i] for i in own) / shots for t in range(frames)]
                modulated_query = [query_side[t][1 + j] for t in range(frames)]
                anchor, anchor_of_all = ([support_side[t][c] for t in range(frames)], [s[0] for s in query_side])
                row.append(
                    -0.5 * self.distance(query, prototypes[c])
                    - self.distance(modulated_query, modulated)
                    - self.distance(anchor_of_all, anchor)
                )
            scores.append(row)
        return scores

    def episode(self, support: Tensor, query: Tensor, text: Tensor, labels: list[int], protocol: str) -> tuple:
        """Returns scores [Q][N] and losses of one episode: support [N, K, T, D], query [Q, T, D], text [N, D]."""
        support_videos = [[list(video.double()) for video in videos] for videos in support]
        queries = [list(video.double()) for video in query]
        texts = list(text.double())
        # As released: the mean goes over the true class of every query and support video. With equally many queries
        # of each class that is the mean over the class texts, which a method that sees no label has to use.
        of_samples = [texts[label] for label in labels] + [texts[c] for c, videos in enumerate(support) for _ in videos]

        flat = [(c, video) for c, videos in enumerate(support_videos) for video in videos]
        support_real = [self.fuse(texts[c], video) for c, video in flat]
        support_prompts = [self.generate(video, of_samples) for _, video in flat]
        support_fake = [self.fuse(prompt, video) for prompt, (_, video) in zip(support_prompts, flat, strict=True)]
        query_real = [self.fuse(texts[label], video) for label, video in zip(labels, queries, strict=True)]
        query_prompts = [self.generate(video, of_samples) for video in queries]
        query_fake = [self.fuse(prompt, video) for prompt, video in zip(query_prompts, queries, strict=True)]

        shots = len(support_videos[0])
        refined = [[tokens[1:] for tokens in support_real[c * shots : (c + 1) * shots]] for c in range(len(support))]
        if protocol == "transductive":
            scores = self.compare(refined, [tokens[1:] for tokens in query_fake])
        else:
            scores = [self.compare(refined, [tokens[1:]])[0] for tokens in query_fake]

        losses = {"cross_entropy": 0.0}
        for row, label in zip(scores, labels, strict=True):
            losses["cross_entropy"] -= (row[label] - math.log(sum(map(math.exp, row)))) / len(scores)
        spm, auxiliary = self.options.SPM, self.options.AUXILIARY_WEIGHT
        motion = self.motion_loss(queries) + self.motion_loss([video for _, video in flat])
        losses["motion"] = auxiliary * self.options.HSMR.WEIGHT * motion
        of_query = self.imitation([texts[label] for label in labels], query_prompts, query_real, query_fake)
        of_support = self.imitation([texts[c] for c, _ in flat], support_prompts, support_real, support_fake)
        share = spm.TEXT_QUERY_WEIGHT
        losses["text"] = auxiliary * (share * of_query[0] + (0.5 - share) * of_support[0])
        share = spm.CONSISTENCY_QUERY_WEIGHT
        losses["consistency"] = auxiliary * (share * of_query[1] + (1 - share) * of_support[1])
        return scores, losses

    @staticmethod
    def imitation(texts: Video, prompts: Video, real: list[Video], fake: list[Video]) -> tuple[float, float]:
        """Returns d(w, p_gen) + d(p^ real, p^ fake), and d of all tokens."""

        def d(first: list[Video], second: list[Video]) -> float:
            squares = [
                ((x - y) ** 2).sum() for xs, ys in zip(first, second, strict=True) for x, y in zip(xs, ys, strict=True)
            ]
            return sum(squares).item() / len(first)

        refined_prompts = d([tokens[:1] for tokens in real], [tokens[:1] for tokens in fake])
        return d([[text] for text in texts], [[prompt] for prompt in prompts]) + refined_prompts, d(real, fake)


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("shots", [1, 3])
def test_scores_and_losses_equal_the_equations_written_out(head, protocol, shots):
    options = {
        "TRANSFORMER": SMALL_TRANSFORMER,
        "SPM": {"GENERATOR_HIDDEN": 8, "NEGATIVE_SLOPE": 0.05, "ALPHA": 0.7},
        "HSMR": {"WEIGHT": 1.7},
        "AUXILIARY_WEIGHT": 0.3,
    }
    model = head(6, **options)
    generator = torch.Generator().manual_seed(shots)
    episodes, ways, per_class, frames = 2, 3, 2, 4
    support = torch.randn(episodes, ways, shots, frames, 6, generator=generator)
    query = torch.randn(episodes, ways * per_class, frames, 6, generator=generator)
    text = torch.randn(episodes, ways, 6, generator=generator)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])

    output = model.training_losses(Episode(support, query, text), labels_of(labels), protocol)
    literal = LiteralClipSpm(model)
    expected = [literal.episode(support[b], query[b], text[b], labels[b].tolist(), protocol) for b in range(episodes)]
    torch.testing.assert_close(output.scores, torch.tensor([scores for scores, _ in expected]), rtol=1e-4, atol=1e-4)
    assert output.losses.keys() == {"cross_entropy", "motion", "text", "consistency"}
    for key, loss in output.losses.items():
        assert loss.item() == pytest.approx(sum(losses[key] for _, losses in expected) / episodes, rel=1e-4), key


# HSMR's options


@pytest.mark.parametrize("frames", [2, 5, 8])
def test_sum_pooling_is_two_times_the_steps_times_the_mean(head, frames):
    videos = torch.randn(3, frames, 6, generator=torch.Generator().manual_seed(0))
    mean, total = (
        head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"POOL": pool}).HSMR.motion(videos) for pool in ("mean", "sum")
    )
    torch.testing.assert_close(total, 2 * (frames - 1) * mean)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_one_frame_has_no_motion(head, pool):
    motion = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"POOL": pool}).HSMR.motion(torch.randn(3, 1, 6))
    assert torch.equal(motion, torch.zeros(3, 6))


def test_a_learnable_weight_starts_at_the_configured_value(head):
    learnable = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"LEARNABLE_WEIGHT": True, "WEIGHT": 0.25})
    fixed = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"WEIGHT": 0.25})
    assert dict(learnable.named_parameters())["HSMR.weight"].item() == 0.25
    assert fixed.HSMR.weight == 0.25
    assert "HSMR.weight" not in fixed.state_dict()
    assert not MotionOptions().LEARNABLE_WEIGHT

    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 1, 4, 6), (1, 2, 4, 6), (1, 2, 6))
    episode = Episode(*(torch.randn(shape, generator=generator) for shape in shapes))
    labels = labels_of(torch.tensor([[0, 1]]))
    loss, same = (model.training_losses(episode, labels, "inductive").losses["motion"] for model in (learnable, fixed))
    torch.testing.assert_close(loss, same)
    loss.backward()
    assert learnable.HSMR.weight.grad > 0


@torch.no_grad()
def test_motion_changes_no_score_of_a_fixed_model(head):
    """HSMR affects scores only by training shared weights."""
    model = head(6, TRANSFORMER=SMALL_TRANSFORMER)
    episode = Episode(torch.randn(1, 3, 2, 4, 6), torch.randn(1, 3, 4, 6), torch.randn(1, 3, 6))
    before = [model.score(*episode, protocol) for protocol in PROTOCOLS]
    without = head(6, TRANSFORMER=SMALL_TRANSFORMER, HSMR={"ENABLED": False})
    without.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("HSMR.")})
    for parameter in model.HSMR.parameters():
        parameter.normal_()
    for protocol, expected in zip(PROTOCOLS, before, strict=True):
        assert torch.equal(model.score(*episode, protocol), expected)
        assert torch.equal(without.score(*episode, protocol), expected)


@torch.no_grad()
def test_a_generated_prompt_depends_on_one_number_of_the_video(head):
    """Permuting the channels of a query leaves its prompt as it is."""
    spm = head(6, TRANSFORMER=SMALL_TRANSFORMER).SPM
    videos, text = torch.randn(1, 2, 4, 6), torch.randn(1, 3, 6)
    torch.testing.assert_close(spm(videos.flip(-1), text), spm(videos, text))
    torch.testing.assert_close(spm(videos.flip(-2), text), spm(videos, text))
    assert not torch.allclose(spm(2 * videos, text), spm(videos, text))


@torch.no_grad()
def test_the_anchor_distance_is_the_same_class_bias_for_every_query_of_an_episode(head):
    """D3 alone does not distinguish queries when they are matched together."""
    only_anchors = {"PROTOTYPE": 0.0, "MODULATED": 0.0}
    model = head(6, TRANSFORMER=SMALL_TRANSFORMER, DISTANCES=only_anchors)
    episode = Episode(torch.randn(1, 3, 2, 4, 6), torch.randn(1, 4, 4, 6), torch.randn(1, 3, 6))
    scores = model.score(*episode, "transductive")
    torch.testing.assert_close(scores, scores[:, :1].expand_as(scores))
    assert (model.score(*episode, "inductive") - scores).abs().max() > 1e-3


# Ablations: each of the three modules on or off


def tiny(motion: bool = True, prompts: bool = True, anchors: bool = True, **spm) -> ClipSpm:
    """Returns CLIP-SPM on the tiny backbone with some of HSMR, SPM and PADM."""
    torch.manual_seed(0)
    options = ClipSpmOptions(
        BACKBONE="tiny",
        CLIP_WEIGHTS="random",
        TRANSFORMER=SMALL_TRANSFORMER,
        HSMR={"ENABLED": motion, "LEARNABLE_WEIGHT": True},
        SPM={"ENABLED": prompts, "GENERATOR_HIDDEN": 8, **spm},
        PADM={"ENABLED": anchors},
    )
    return ClipSpm(options, 32)


def tiny_episode(model: ClipSpm) -> tuple[Episode, Tensor]:
    """Returns an encoded 3-way 2-shot episode with 3 queries, and the labels of the queries."""
    generator = torch.Generator().manual_seed(0)
    features = model.encode(torch.rand(9, 4, 3, 32, 32, generator=generator))
    text = model.class_text(["clap", "jump", "ride a bike"])[None]
    return Episode(features[:6].unflatten(0, (1, 3, 2)), features[6:][None], text), torch.tensor([[0, 1, 2]])


@pytest.mark.parametrize(("motion", "prompts", "anchors"), list(itertools.product([True, False], repeat=3)))
def test_every_ablation_trains_and_scores(motion, prompts, anchors):
    model = tiny(motion, prompts, anchors).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    parts = {name.split(".")[0] for name in before}
    switched = {"HSMR": motion, "SPM": prompts, "PADM": anchors}
    assert parts == {"clip", "fusion"} | {part for part, on in switched.items() if on}
    gates = {name for name in before if "_gate" in name}
    assert bool(gates) == (motion or prompts), "gates exist only where a prompt can flow through them"

    episode, labels = tiny_episode(model)
    output = model.training_losses(episode, labels_of(labels), "inductive")
    switched = {"cross_entropy": True, "motion": motion, "text": prompts, "consistency": prompts}
    assert output.losses.keys() == {key for key, on in switched.items() if on}
    output.total.backward()
    assert {name for name, value in model.named_parameters() if value.grad is None} == set()
    with torch.no_grad():
        for value in model.parameters():
            value -= 0.1 * value.grad
    assert {name for name, value in model.named_parameters() if torch.equal(value, before[name])} == set()

    model.eval()
    with torch.no_grad():
        episode, _ = tiny_episode(model)
        together, alone = (model.score(*episode, protocol) for protocol in PROTOCOLS)
    assert together.isfinite().all()
    assert together.shape == alone.shape == (1, 3, 3)
    if not anchors:  # only PADM lets queries interact
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("text", "consistency"), list(itertools.product([True, False], repeat=2)))
def test_disabled_losses_are_not_reported(text, consistency):
    model = tiny(TEXT_LOSS=text, CONSISTENCY_LOSS=consistency)
    episode, labels = tiny_episode(model)
    losses = model.training_losses(episode, labels_of(labels), "inductive").losses
    switched = {"text": text, "consistency": consistency}
    assert losses.keys() == {"cross_entropy", "motion"} | {key for key, on in switched.items() if on}
