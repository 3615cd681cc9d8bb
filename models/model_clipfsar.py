"""CLIP-FSAR: CLIP-guided prototype modulating (IJCV 2024, arXiv 2303.02982).

    frames -> CLIP image tower -> f [T, D]          class names -> CLIP text tower -> w [D]
      video-text contrast   p_vt(c | v) = softmax_c( scale * cos(mean_t f, w_c) ) over all training classes   (loss)
      prototype modulation  support: s^ = Transformer([s_1 .. s_T; w])[:T]        query: q^ = Transformer(q)
    score = -OTAM(mean of the shots' s^, q^)                                       (or Bi-MHM, or time averages)

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, L tokens, C training classes, D feature width.

Where the paper and the released code differ, this file follows the code:

    loss          paper L_vt + alpha * L_fs; code L_fs + VIDEO_TEXT_WEIGHT * L_vt, the weight on the other term
    temperature   paper cos / tau; code a learned factor that starts at 1, `scale`
    five shots    by default the shots are averaged after the transformer; the released five-shot configs average
                  the frames before it (MERGE_BEFORE) and train with one shot, where the two orders are the same
    distance      the paper allows any; the code has only OTAM, so bi-mhm and mean are additions

A query is scored without the other queries of its episode, so the method is not transductive.
"""

import torch
from einops import repeat
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import register
from models.adapter_aim import AimChoice
from models.base import Episode, EpisodeLabels, EpisodeOutput, ProtocolName
from models.clip_method import ClipMethod, ClipMethodOptions, video_text_logits, video_text_loss
from models.explanation import Explanation, frame_pairing, text_measure
from models.layers import ONE_HEAD, SharedWidthOptions, TransformerLayer, layer_rows, released_layer_names
from models.matching import Matcher, sequence_distances
from models.released import ReleasedNames
from models.text import TemplateSet

# The names of the weights in the released code.
RELEASED = ReleasedNames(
    used={"scale": "scale", **released_layer_names("context2", "modulation")},
    fixed=ONE_HEAD,
    rows=layer_rows("modulation"),
)


class ClipFsarOptions(ClipMethodOptions, AimChoice):
    """The `MODEL` section of CLIP-FSAR."""

    TRANSFORMER: SharedWidthOptions = SharedWidthOptions()
    MERGE_BEFORE: bool = Field(False, description="average the shots before the transformer, not after it")
    MATCHER: Matcher = Field("otam", description="distance of a query to a prototype: otam, bi-mhm or mean")
    OTAM_LAMBDA: float = Field(0.5, gt=0, description="smoothing of OTAM's softmin")
    OTAM_BOTH_DIRECTIONS: bool = Field(True, description="add the alignment with the roles exchanged")
    TEXT_TEMPLATES: TemplateSet = Field("photo", description="sentences averaged into a class text")
    VIDEO_TEXT_WEIGHT: float = Field(1.5, ge=0, description="weight of the video-text loss")
    EVAL_TEXT: bool = Field(False, description="test with class texts alone, without the support videos")
    COMBINE: bool = Field(False, description="test with class texts and support videos together")
    TEXT_COFF: float = Field(0.9, ge=0, le=1, description="share of the texts in COMBINE")

    @model_validator(mode="after")
    def _check_test_mode(self) -> "ClipFsarOptions":
        if self.EVAL_TEXT and self.COMBINE:
            raise ValueError(
                "MODEL.EVAL_TEXT and MODEL.COMBINE are both true: set MODEL.COMBINE to false to test with texts alone, "
                "or MODEL.EVAL_TEXT to false to test with texts and support videos together."
            )
        return self


@register("clipfsar")
class ClipFsar(ClipMethod):
    """CLIP-FSAR. EVAL_TEXT and COMBINE apply in evaluation mode only; training always matches videos."""

    Options = ClipFsarOptions
    released = RELEASED

    def __init__(self, options: ClipFsarOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.matching = options.MATCHER, options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS
        width = self.clip.width
        self.modulation = TransformerLayer(width, options.TRANSFORMER)
        self.scale = nn.Parameter(torch.ones(1))  # 1 / tau; the released code starts at 1, not at CLIP's 100

    # --- prototype modulation -----------------------------------------------------------------------------

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Modulates support videos by their class text: [B, N, K, T, D] -> the same shape.

        With MERGE_BEFORE, this only averages the K shots into one, [B, N, 1, T, D]. `match` modulates it, since videos
        that are precomputed one by one must be averaged first.
        """
        if self.options.MERGE_BEFORE:
            return support.mean(dim=2, keepdim=True)
        return self._modulate(support, class_text)

    def precompute_query(self, query: Tensor) -> Tensor:
        """Returns query videos unchanged and after the transformer layer, without text: float [B, Q, 2, T, D]."""
        return torch.stack([query, self._temporal(query)], dim=2)

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Scores the queries in the mode that the options select.

        Args:
            support: float [B, N, K, T, D], from `precompute_support`.
            query: float [B, Q, 2, T, D], from `precompute_query`.
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N]: -distance, or in evaluation mode with EVAL_TEXT or COMBINE values in [0, 1].
        """
        plain, refined = query.unbind(dim=2)
        if self.options.EVAL_TEXT and not self.training:
            return self._text_probabilities(plain, class_text)
        scores = self._visual_scores(support, refined, class_text)
        return self._combine(scores, plain, class_text) if self.options.COMBINE and not self.training else scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns the softmax of -distance; scores of EVAL_TEXT and COMBINE are probabilities, divided by their sum."""
        if self.options.EVAL_TEXT or self.options.COMBINE:
            return scores.float() / scores.float().sum(dim=-1, keepdim=True)
        return super().probabilities(scores)

    def _visual_scores(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes -distance of queries to prototypes: precomputed [B, N, K, T, D], [B, Q, T, D] -> [B, Q, N]."""
        return -sequence_distances(query, self._prototypes(support, class_text), *self.matching)

    def _prototypes(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Averages the shots' modulated frames: precomputed [B, N, K, T, D] -> [B, N, T, D]."""
        prototypes = support.mean(dim=2, keepdim=True)
        if self.options.MERGE_BEFORE:
            prototypes = self._modulate(prototypes, class_text)
        return prototypes.squeeze(2)

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the pairing of refined frames, the refined queries, and their similarity to the class texts."""
        refined = self._temporal(query)
        prototypes = self._prototypes(self.precompute_support(support, class_text), class_text)
        return Explanation(
            pairings={self.options.MATCHER: frame_pairing(refined, prototypes, *self.matching)},
            features={"modulation": refined},
            measures={"video and class texts": text_measure(query.mean(dim=2), class_text, "mean encoded frame")},
        )

    def _modulate(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Computes s^ = Transformer([s_1 .. s_T; w])[:T]: [B, N, K, T, D] with [B, N, D] -> [B, N, K, T, D].

        The layer has no positions, so the text could also come before the frames.
        """
        text = repeat(class_text, "b n d -> b n k 1 d", k=support.shape[2])
        return self._temporal(torch.cat([support, text], dim=-2))[..., :-1, :]

    def _temporal(self, tokens: Tensor) -> Tensor:
        """Applies the transformer layer to the tokens of each video: [..., L, D] -> [..., L, D]."""
        return self.modulation(tokens.flatten(0, -3)).unflatten(0, tokens.shape[:-2])

    # --- video-text contrast ------------------------------------------------------------------------------

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes L = CE of the scores + VIDEO_TEXT_WEIGHT * L_vt.

        Args:
            episode: features from `encode`, [B, N, K, T, D] and [B, Q, T, D].
            labels: of the B episodes, with the texts of all training classes.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy and video_text.
        """
        output = super().training_losses(episode, labels, protocol)
        video_text = self.options.VIDEO_TEXT_WEIGHT * video_text_loss(episode, labels, self.scale)
        return EpisodeOutput(output.scores, output.losses | {"video_text": video_text})

    # --- the two other test modes -------------------------------------------------------------------------

    def _text_probabilities(self, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes p_vt over the episode's own classes: [B, Q, T, D], [B, N, D] -> float32 [B, Q, N]."""
        return video_text_logits(query, class_text, self.scale).softmax(dim=-1)

    def _combine(self, scores: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes p_vt^TEXT_COFF * p_fs^(1 - TEXT_COFF), where p_fs = softmax((T - distance) / T).

        Args:
            scores: -distance, float32 [B, Q, N].
            query: float [B, Q, T, D].
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N] in [0, 1]; not normalised over the classes.
        """
        frames = query.shape[-2]
        by_video = ((frames + scores) / frames).softmax(dim=-1)
        share = self.options.TEXT_COFF
        return self._text_probabilities(query, class_text) ** share * by_video ** (1 - share)
