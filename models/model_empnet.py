"""EMP-Net: efficient few-shot action recognition via multi-level post-reasoning (Wu et al., ECCV 2024).

    frames -> CLIP's ViT, frozen -> y_1, y_2, y_3, all tokens after the blocks 4, 8 and 12, in the space of the texts
      skip fusion    z = R_3( R_2( R_1(y_1) + y_2 ) + y_3 )
      three levels   token  a = Transformer( class tokens of z )                                  among the frames
                     patch  b = Transformer( [a; patches of z] ), without a                       within a frame
                     frame  c = Transformer( mean of the patches b + mean of the patches of z )   among the frames
    class names -> CLIP text tower -> w [D]
      fusion         support: x^ = Transformer( x + w attends to [x; w] )     query: x^ = Transformer(x)
                     among the frames, for x = a, c, and each patch of b; the patches x^ of a frame are then averaged
      by video       d = OTAM( mean of the shots' x^, x^ of the query )                           for a, c, b
      by text        mean_t cos(a_t, w),  mean of the 2 best cos(c_t, w),  mean of the 49 best mean_t cos(b_tl, w)
    score = logarithm of the mean of the six probabilities softmax(-d), softmax(cos) over the classes of the episode
    loss  = sum of the six CE(probability), those by text over support videos too

In R the class tokens attend to each other across frames, the patches within their frame, and a feed-forward block
without norm follows. A query is scored without the other queries of its episode, so the method is not transductive.

As in the release (github.com/cong-wu/EMP-Net), the losses treat the probabilities as logits, so the softmax is applied
twice (`SOFTMAX_TWICE`), and a training episode uses one random template for all its classes (`RANDOM_TEMPLATE`). Not
copied: the release takes the class texts of the first five support videos, so with more shots in any order a class may
get the text of another class.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, L patches, S sentences, D width of CLIP's features.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor, nn

from models import register
from models.base import Episode, EpisodeLabels, EpisodeOutput, ProtocolName, cross_entropy
from models.clip_method import ClipMethod, ClipMethodOptions
from models.explanation import Explanation, Measure, frame_pairing
from models.layers import (
    ONE_HEAD,
    Attention,
    TransformerLayer,
    TransformerOptions,
    feed_forward,
    layer_rows,
    released_attention_names,
    released_layer_names,
)
from models.matching import Matcher, sequence_distances
from models.released import ReleasedNames
from models.text import mean_features
from models.tower_plugin import ProjectedLevels
from utils.schema import HEAD_ONLY

LEVELS = ("token", "frame", "patch")


class EmpTransformerOptions(TransformerOptions):
    """Sizes of all layers of EMP-Net; the defaults are those of the release for ViT-B/16."""

    HEADS: int = Field(4, ge=1, description="attention heads")
    HEAD_DIM: int | None = Field(64, ge=1, description="width of each head; null: the features' width / HEADS")
    HIDDEN: int = Field(128, ge=1, description="width of the feed-forward block's hidden layer")


class EmpNetOptions(ClipMethodOptions):
    """The `MODEL` section of EMP-Net; the defaults are those of the release."""

    BACKBONE: str = Field("ViT-B/16", min_length=1, description="one of CLIP's ViTs")
    TRAINABLE: str = Field(HEAD_ONLY, description="what to train of CLIP's tower besides the head; head: nothing")
    TAPS: list[int] | None = Field(
        None, min_length=1, description="blocks whose tokens are read, from 1; null: after each third (4, 8, 12)"
    )
    TRANSFORMER: EmpTransformerOptions = EmpTransformerOptions()
    MERGE_BEFORE: bool = Field(
        False, description="average the shots before the fusion, not after it (released for five shots: true)"
    )
    MATCHER: Matcher = Field("otam", description="distance of a query to a prototype: otam, bi-mhm or mean")
    OTAM_LAMBDA: float = Field(0.5, gt=0, description="smoothing of OTAM's softmin")
    OTAM_BOTH_DIRECTIONS: bool = Field(True, description="add the alignment with the roles exchanged")
    BEST_FRAMES: int = Field(2, ge=1, description="number of best frames in the cosine with a text")
    BEST_PATCHES: int = Field(49, ge=1, description="number of best patches in the cosine with a text")
    RANDOM_TEMPLATE: bool = Field(True, description="train each episode with one sentence of the classes, not the mean")
    SOFTMAX_TWICE: bool = Field(True, description="released: losses of the probabilities; false: of their logits")


class Levels(NamedTuple):
    """The parts of the output of `encode`: token and frame [..., T, D], patch [..., T, L, D]."""

    token: Tensor
    frame: Tensor
    patch: Tensor


def levels_of(videos: Tensor) -> Levels:
    """Splits the output of `encode`: [..., T, 2+L, D]."""
    return Levels(videos[..., 0, :], videos[..., 1, :], videos[..., 2:, :])


class Reasoning(nn.Module):
    """The reasoning block R."""

    def __init__(self, width: int, options: TransformerOptions) -> None:
        super().__init__()
        self.over_time, self.over_space = Attention(width, options), Attention(width, options)
        self.feed_forward = feed_forward(width, options.HIDDEN, options.HIDDEN_DROPOUT)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps float [V, T, 1+L, D] -> float [V, T, 1+L, D]."""
        class_tokens, patches = tokens[:, :, 0], tokens[:, :, 1:]
        class_tokens = class_tokens + self.over_time(class_tokens)
        patches = patches + self.over_space(patches.flatten(0, 1)).view_as(patches)
        tokens = torch.cat([class_tokens.unsqueeze(2), patches], dim=2)
        return tokens + self.feed_forward(tokens)


def released_names() -> ReleasedNames:
    """Returns the names of the weights in the released code, which has three taps."""
    used: dict[str, str | Sequence[str]] = {}
    for i in range(3):
        released, renamed = f"spatialtemporal_reasion_{i + 1}.layers.0", f"reason.{i}"
        used |= released_attention_names(f"{released}.0", f"{renamed}.over_space")
        used |= released_attention_names(f"{released}.1", f"{renamed}.over_time")
        used[f"{released}.2.net"] = f"{renamed}.feed_forward"
    for level in LEVELS:
        used |= released_layer_names(f"inter_reasion_{level}", f"relate.{level}")
        used |= released_layer_names(f"fusion_{level}", f"fuse.{level}")
    return ReleasedNames(used=used, fixed=ONE_HEAD, rows=layer_rows("fuse.token"))


@register("empnet")
class EmpNet(ClipMethod):
    """EMP-Net; each query is scored alone."""

    Options = EmpNetOptions
    released = released_names()

    def __init__(self, options: EmpNetOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.matching = options.MATCHER, options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS
        self.taps = self.clip.attach(partial(ProjectedLevels, blocks=options.TAPS))
        sizes = self.clip.width, options.TRANSFORMER
        self.relate, self.fuse = (
            nn.ModuleDict({level: TransformerLayer(*sizes) for level in LEVELS}) for _ in range(2)
        )
        self.reason = nn.ModuleList(Reasoning(*sizes) for _ in self.taps.blocks)

    def encode(self, frames: Tensor) -> Tensor:
        """Computes a, c and b of each frame: float [V, T, 3, H, W] -> float [V, T, 2+L, D]."""
        return self.encode_features(self.backbone_features(frames))

    def backbone_features(self, frames: Tensor) -> Tensor:
        """Computes y: float [V, T, 3, H, W] -> float [V, T, taps, 1+L, D]."""
        return self.clip(frames)

    def encode_features(self, features: Tensor) -> Tensor:
        """Maps float [V, T, taps, 1+L, D] -> float [V, T, 2+L, D]."""
        tokens = torch.zeros_like(features[:, :, 0])
        for reason, level in zip(self.reason, features.unbind(dim=2), strict=True):
            tokens = reason(tokens + level)
        token, patches = self.relate["token"](tokens[:, :, 0]), tokens[:, :, 1:]
        with_token = torch.cat([token.unsqueeze(2), patches], dim=2)
        patch = self.relate["patch"](with_token.flatten(0, 1)).view_as(with_token)[:, :, 1:]
        frame = self.relate["frame"](patch.mean(dim=2) + patches.mean(dim=2))
        return torch.cat([token.unsqueeze(2), frame.unsqueeze(2), patch], dim=2)

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        """Returns the mean over the sentences of each class, followed by each sentence: float32 [C, (1+S) D].

        S is the largest number of sentences of a class; the others repeat theirs. Without RANDOM_TEMPLATE [C, D].
        """
        classes = self.clip.sentence_features(self.sentences, prompt_names)
        mean = mean_features(classes, self.options.TEXT_NORMALISE)
        if not self.options.RANDOM_TEMPLATE:
            return mean
        most = max(map(len, classes))
        repeated = [features[torch.arange(most) % len(features)].flatten() for features in classes]
        return torch.cat([mean, torch.stack(repeated)], dim=1)

    def text_source(self, prompt_names: Sequence[str]) -> tuple[list[Tensor], dict[str, Any]]:
        """Returns the result of `ClipMethod`, with whether each sentence is kept."""
        weights, values = super().text_source(prompt_names)
        return weights, {**values, "each sentence": self.options.RANDOM_TEMPLATE}

    def _mean_text(self, class_text: Tensor) -> Tensor:
        """Returns w in a test run, the mean over the sentences: [B, N, (1+S) D] -> [B, N, D]."""
        return class_text[..., : self.clip.width]

    def _training_text(self, class_text: Tensor) -> Tensor:
        """Draws w for training: [B, N, (1+S) D] -> [B, N, D], the same sentence for all classes of an episode."""
        mean, *sentences = class_text.split(self.clip.width, dim=-1)
        if not (self.training and sentences):
            return mean
        picked = torch.randint(len(sentences), (len(class_text),)).tolist()
        return torch.stack([sentences[number][episode] for episode, number in enumerate(picked)])

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Computes x^ of support videos: [B, N, K, T, 2+L, D] -> [B, N, K, 3 T, D]; unchanged with MERGE_BEFORE."""
        if self.options.MERGE_BEFORE:
            return support
        text = repeat(self._mean_text(class_text), "b n d -> b n k d", k=support.shape[2])
        return self._fused(levels_of(support), text)

    def precompute_query(self, query: Tensor) -> Tensor:
        """Computes x^ of queries, and the input of their terms by text: [B, Q, T, 2+L, D] -> [B, Q, 5 T + L, D]."""
        levels = levels_of(query)
        return torch.cat([self._fused(levels), *for_texts(levels)], dim=2)

    def _fused(self, levels: Levels, text: Tensor | None = None) -> Tensor:
        """Computes x^ of token, frame and mean patch, joined: [..., T, D], with w [..., D] -> [..., 3 T, D]."""
        patch_text = None if text is None else repeat(text, "... d -> ... l d", l=levels.patch.shape[-2])
        patches = among_frames(self.fuse["patch"], rearrange(levels.patch, "... t l d -> ... l t d"), patch_text)
        token, frame = (among_frames(self.fuse[name], getattr(levels, name), text) for name in ("token", "frame"))
        return torch.cat([token, frame, patches.mean(dim=-3)], dim=-2)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Returns the logarithm of the mean of the six probabilities.

        Args:
            support: float [B, N, K, 3 T, D], from `precompute_support`; [B, N, K, T, 2+L, D] with MERGE_BEFORE.
            query: float [B, Q, 5 T + L, D], from `precompute_query`.
            class_text: float [B, N, (1+S) D].

        Returns:
            float32 [B, Q, N].
        """
        text = self._mean_text(class_text)
        return self._logits(self._prototypes(support, text), query, text).softmax(dim=-1).mean(dim=0).log()

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the six probabilities, and the pairings of frames of each level."""
        text, precomputed = self._mean_text(class_text), self.precompute_query(query)
        prototypes = self._prototypes(self.precompute_support(support, class_text), text)
        terms = self._logits(prototypes, precomputed, text).softmax(dim=-1).movedim(0, -1)
        names = tuple(f"{level} by {source}" for source in ("video", "text") for level in LEVELS)
        meaning = "probabilities of a class; the score is the logarithm of their mean"
        pairs = zip(LEVELS, precomputed.split(query.shape[2], dim=2), prototypes.chunk(3, dim=2), strict=False)
        return Explanation(
            pairings={level: frame_pairing(videos, classes, *self.matching) for level, videos, classes in pairs},
            measures={"terms": Measure(terms, meaning, "part", names)},
        )

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes the three cross-entropies by video, and the three by text.

        Args:
            episode: features from `encode`.
            labels: of the B episodes.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy and video_text, a sum of three each.
        """
        text = self._training_text(episode.class_text)
        prototypes = self._prototypes(self.precompute_support(episode.support, text), text)
        logits = self._logits(prototypes, self.precompute_query(episode.query), text)
        support_logits = by_text(for_texts(levels_of(episode.support.flatten(1, 2))), text, self.options)
        class_numbers = torch.arange(text.shape[1], device=text.device)
        support_labels = repeat(class_numbers, "n -> b (n k)", b=len(text), k=episode.support.shape[2])
        targets = [labels.query] * 3 + [torch.cat([support_labels, labels.query], dim=1)] * 3
        terms = [*logits[:3], *torch.cat([support_logits, logits[3:]], dim=2)]
        if self.options.SOFTMAX_TWICE:
            terms = [term.softmax(dim=-1) for term in terms]
        costs = [cross_entropy(term, target) for term, target in zip(terms, targets, strict=True)]
        losses = {"cross_entropy": torch.stack(costs[:3]).sum(), "video_text": torch.stack(costs[3:]).sum()}
        return EpisodeOutput(logits.softmax(dim=-1).mean(dim=0).log(), losses)

    def _logits(self, prototypes: Tensor, query: Tensor, text: Tensor) -> Tensor:
        """Computes the six terms before their softmax, by video and then by text: float32 [6, B, Q, N]."""
        frames = prototypes.shape[2] // 3
        fused, *texts = query.split([3 * frames, frames, frames, query.shape[2] - 5 * frames], dim=2)
        videos, classes = (rearrange(x, "b n (level t) d -> (level b) n t d", level=3) for x in (fused, prototypes))
        distances = sequence_distances(videos, classes, *self.matching)
        return torch.cat([-distances.unflatten(0, (3, len(query))), by_text(texts, text, self.options)])

    def _prototypes(self, support: Tensor, text: Tensor) -> Tensor:
        """Averages x^ over the shots: from `precompute_support` -> float [B, N, 3 T, D]."""
        mean = support.mean(dim=2)
        return self._fused(levels_of(mean), text) if self.options.MERGE_BEFORE else mean


def among_frames(layer: nn.Module, frames: Tensor, text: Tensor | None) -> Tensor:
    """Applies a layer across the frames of each video: [..., T, D], with a text [..., D] -> [..., T, D]."""
    videos = frames.flatten(0, -3)
    if text is None:
        return layer(videos).view_as(frames)
    words = text.reshape(-1, 1, text.shape[-1])
    return layer(videos + words, torch.cat([videos, words], dim=1)).view_as(frames)


def for_texts(levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the input of the terms by text: unit a and c [B, V, T, D], mean over time of unit b [B, V, L, D]."""
    token, frame, patch = (F.normalize(level.float(), dim=-1) for level in levels)
    return token, frame, patch.mean(dim=2)


def by_text(videos: Sequence[Tensor], text: Tensor, options: EmpNetOptions) -> Tensor:
    """Computes the three cosines with each text: from `for_texts`, and w [B, N, D] -> float32 [3, B, V, N]."""
    words = F.normalize(text.float(), dim=-1).mT.unsqueeze(1)
    token, frame, patch = (features @ words for features in videos)  # [B, V, T or L, N]
    return torch.stack([token.mean(dim=2), best(frame, options.BEST_FRAMES), best(patch, options.BEST_PATCHES)])


def best(cosines: Tensor, count: int) -> Tensor:
    """Averages the `count` highest values, or all if there are fewer: float [B, V, L, N] -> float [B, V, N]."""
    return cosines.topk(min(count, cosines.shape[2]), dim=2).values.mean(dim=2)
