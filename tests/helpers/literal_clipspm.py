"""The equations of CLIP-SPM, written out for one episode."""

import copy
import math

import torch
from torch import Tensor, nn

from models.base import EpisodeLabels
from models.model_clipspm import ClipSpm
from tests.helpers.literal_distances import literal_otam
from tests.helpers.literal_layers import Video, literal_feed_forward, literal_gate, literal_transformer

SMALL_TRANSFORMER = {"HEADS": 2, "HEAD_DIM": 5, "HIDDEN": 9}
PROTOCOLS = ["transductive", "inductive"]


def labels_of(query_labels: Tensor) -> EpisodeLabels:
    """Returns labels int64 [B, Q] of the queries; CLIP-SPM's losses do not use other training classes."""
    return EpisodeLabels(query_labels, torch.empty(0), torch.empty(0))


class LiteralClipSpm:
    """The equations, on the weights of a model and a single episode."""

    def __init__(self, model: ClipSpm) -> None:
        self.model = copy.deepcopy(model).double()
        self.options = model.options

    def gate(self, vector: Tensor, layers: nn.Sequential) -> Tensor:
        return literal_gate(vector, layers, self.options.SPM.NEGATIVE_SLOPE)

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
                anchor, shared_anchor = ([support_side[t][c] for t in range(frames)], [s[0] for s in query_side])
                row.append(
                    -0.5 * self.distance(query, prototypes[c])
                    - self.distance(modulated_query, modulated)
                    - self.distance(shared_anchor, anchor)
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
