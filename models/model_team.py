"""TEAM: temporal alignment-free video matching for few-shot action recognition (Lee et al., CVPR 2025).

    frames -> image network -> f [T, D];   y = LayerNorm(f + pos), sinusoids of size 0.1
    A [M, D]: learned pattern tokens, the same for all videos and any number of frames
      o(f)  = softmax( LayerNorm(A) y^T / sqrt(D / 8) ) y                         attention of each token to the frames
      m(x)  = relu( x + W_o relu( W_i x + b_i ) + b_o )
      q+    = m(A + o_q),      q-   = m(A - o_q)                                  positive and negative patterns
      p+_c  = m(A + o_c),      p-_c = m(A - o_c)         o_c: of the frames averaged over the shots of class c
    adaptation, for both signs, with t+_c = A + o_c and t-_c = A - o_c: away from what class c shares with the others
      s_c   = mean over j != c of m( t_c + E_cj (t_c - t_j) ),   E_cj = cos(p_c, p_j), one number for each token
    d(x, z) = sum over the tokens of 1 - cos
      PD_c  = d(s+_c, q+)
      ND_c  = ( max over j != c of d(s+_j, q-)  +  max over j != c of d(s-_j, q+) ) / 2
    score   = -(PD + ND);  loss: softmax cross-entropy of -PD plus that of -ND, not of their sum

No text is used, frames are not compared, and queries do not see each other. Paper and release
(github.com/leesb7426/TEAM) agree; the attention has one head with the temperature of 8 heads.

W_i is linear and the factors of t_c and t_j add up to 1, so W_i t_c + b_i is computed once for each class and mixed
like the tokens. The patterns of a query depend only on that query, but are not precomputed: the 2 M tokens of a video
need 15 times the memory of its 8 frames, and storing them would save only a quarter of the time of an episode.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, M tokens, D feature width. The signs + and - are an
axis of size 2 before the tokens.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models import register
from models.adapters import AdapterChoice
from models.backbones import FrameEncoderOptions, FrameMethod
from models.base import Episode, EpisodeLabels, EpisodeOutput, ProtocolName, cross_entropy
from models.explanation import Explanation, Measure
from models.layers import sinusoid_positions
from models.released import ReleasedNames, sequential_resnet


class TeamOptions(FrameEncoderOptions, AdapterChoice):
    """The `MODEL` section of TEAM; the defaults are those of the release for one shot and ResNet-50."""

    TOKENS: int = Field(60, ge=1, description="M, pattern tokens (released: 50 to 80, by data set, shots and backbone)")
    POSITION_SCALE: float = Field(0.1, ge=0, description="size of the sinusoids that are added to the frames")
    TEMPERATURE_HEADS: int = Field(8, ge=1, description="the attention has the temperature of this many heads")
    DROPOUT: float = Field(0.1, ge=0, lt=1, description="dropout on the attention's weights and on its result")
    NEGATIVE: bool = Field(True, description="negative patterns and ND; off: score = -PD and its cross-entropy alone")
    ADAPTATION: Literal["similarity", "plain", "none"] = Field(
        "similarity", description="similarity: E = cos(p_c, p_j), as released; plain: E = 1; none: s_c = p_c"
    )


class PatternTokens(nn.Module):
    """A, o and m: the attention o of M tokens to a video, added to them and subtracted, then refined."""

    def __init__(self, width: int, options: TeamOptions) -> None:
        super().__init__()
        self.position_scale = options.POSITION_SCALE
        self.scale = math.sqrt(options.TEMPERATURE_HEADS / width)
        self.tokens = nn.Parameter(torch.randn(1, options.TOKENS, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.DROPOUT)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def attention(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the attention of each token to each frame, and y: [..., T, D] -> [..., M, T], [..., T, D]."""
        positions = sinusoid_positions(frames.shape[-2], frames.shape[-1], self.position_scale, device=frames.device)
        placed = self.norm(frames.float() + positions)
        similarity = self.scale * self.norm(self.tokens[0]) @ placed.mT
        return similarity.softmax(dim=-1), placed

    def signed(self, frames: Tensor) -> Tensor:
        """Computes A + o and A - o: float [..., T, D] -> float32 [..., 2, M, D]."""
        weights, placed = self.attention(frames)
        attended = self.dropout(self.dropout(weights) @ placed)
        return torch.stack([self.tokens[0] + attended, self.tokens[0] - attended], dim=-3)

    def refine(self, tokens: Tensor, inner: Tensor) -> Tensor:
        """Computes m(x) from x and W_i x + b_i, both float [..., D] -> float [..., D]."""
        return F.relu(tokens + self.outer(F.relu(inner)))

    def forward(self, frames: Tensor) -> Tensor:
        """Computes positive and negative patterns of unit length: float [..., T, D] -> float32 [..., 2, M, D]."""
        tokens = self.signed(frames)
        return F.normalize(self.refine(tokens, self.inner(tokens)), dim=-1)

    def adapted(self, frames: Tensor, adaptation: str) -> Tensor:
        """Computes the patterns s of unit length of each episode's classes: [B, N, T, D] -> float32 [B, N, 2, M, D].

        The other classes are processed one at a time, so a test run holds N sets of tokens in memory instead of N^2.
        """
        tokens = self.signed(frames)
        inner = self.inner(tokens)
        patterns = F.normalize(self.refine(tokens, inner), dim=-1)
        if adaptation == "none":
            return patterns
        total = torch.zeros_like(tokens)
        for shift in range(1, frames.shape[1]):
            other, other_inner, other_patterns = (x.roll(shift, dims=1) for x in (tokens, inner, patterns))
            shared = (patterns * other_patterns).sum(dim=-1, keepdim=True) if adaptation == "similarity" else 1.0
            away = tokens + shared * (tokens - other), inner + shared * (inner - other_inner)
            total = total + self.refine(*away)
        return F.normalize(total, dim=-1)


@register("team")
class Team(FrameMethod):
    """TEAM; its negative patterns and the adaptation of the classes can be switched off."""

    Options = TeamOptions
    released = ReleasedNames(
        used={
            "DPM.AP": "patterns.tokens",
            "DPM.ln": "patterns.norm",
            "DPM.mlp.inp_fc": "patterns.inner",
            "DPM.mlp.out_fc": "patterns.outer",
        },
        unused=("DPM.pe",),
        backbone=sequential_resnet("backbone"),
        rows={"TOKENS": "patterns.tokens"},
    )

    def __init__(self, options: TeamOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.patterns = PatternTokens(self.encoder.width, options)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes score = -(PD + ND); the texts are not used.

        Args:
            support: float [B, N, K, T, D].
            query: float [B, Q, T, D].
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        positive, negative = self._distances(support, query)
        return -(positive + negative)

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes the cross-entropy of -PD, and of -ND if it is switched on.

        Args:
            episode: features from `encode`, [B, N, K, T, D] and [B, Q, T, D].
            labels: of the B episodes; only the queries' labels are used.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy and, if NEGATIVE is on, negative_cross_entropy.
        """
        positive, negative = self._distances(episode.support, episode.query)
        losses = {"cross_entropy": cross_entropy(-positive, labels.query)}
        if self.options.NEGATIVE:
            losses["negative_cross_entropy"] = cross_entropy(-negative, labels.query)
        return EpisodeOutput(-(positive + negative), losses)

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns PD and ND of each class, and the attention of the tokens to the frames; frames are not compared."""
        distances = zip(("positive distance", "negative distance"), self._distances(support, query), strict=True)
        attention = self.patterns.attention(query)[0].mean(dim=-2)
        meaning = "Share of each frame in the attention of the pattern tokens, mean over the tokens."
        measures = {
            name: Measure(value.unsqueeze(2), f"The {name} of the query and each class.", "class")
            for name, value in distances
        }
        return Explanation(measures={**measures, "attention": Measure(attention.unsqueeze(2), meaning, "frame")})

    def _distances(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Computes PD and ND, each float32 [B, Q, N]; ND is zero if it is switched off."""
        classes = self.patterns.adapted(support.float().mean(dim=2), self.options.ADAPTATION)
        patterns = self.patterns(query)
        positive = token_distances(patterns[:, :, 0], classes[:, :, 0])
        if not self.options.NEGATIVE:
            return positive, torch.zeros_like(positive)
        negative_query = token_distances(patterns[:, :, 1], classes[:, :, 0])
        negative_class = token_distances(patterns[:, :, 0], classes[:, :, 1])
        return positive, (largest_other(negative_query) + largest_other(negative_class)) / 2


def token_distances(query: Tensor, classes: Tensor) -> Tensor:
    """Computes d, the sum over the tokens of 1 - cosine, for tokens of unit length.

    Args:
        query: float [B, Q, M, D].
        classes: float [B, N, M, D].

    Returns:
        float [B, Q, N].
    """
    return query.shape[2] - query.flatten(2) @ classes.flatten(2).mT


def largest_other(distances: Tensor) -> Tensor:
    """Returns the largest distance to a class other than each: float [B, Q, N] -> the same shape."""
    itself = torch.eye(distances.shape[-1], dtype=torch.bool, device=distances.device)
    return distances.unsqueeze(-2).masked_fill(itself, -torch.inf).amax(dim=-1)
