"""OTAM: few-shot video classification via temporal alignment (Cao et al., CVPR 2020).

    frames -> image network -> f [T, D]
    D(l, m) = 1 - cos(f_query[l], f_support[m])             every frame of one video against every frame of the other
    phi(D)  = cost of the best ordered alignment, with a soft minimum; added: phi(D transposed)
    score   = -(mean over the shots of phi);  loss: softmax cross-entropy of the scores

With FRAME_SIMILARITY: distance-correlation, f is instead a matrix of distances between the channels of a frame's map,
of unit length, whose cosine is the distance correlation of two frames; a linear layer first reduces the channels.

The recursion behind phi is `models.matching.otam`. There is no head; only the image network is trained.
No text is used, and queries do not see each other.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width.
"""

from typing import Any, Literal

import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import register
from models.adapters import AdapterChoice
from models.backbones import FrameEncoderOptions, FrameMethod
from models.explanation import Explanation, frame_pairing
from models.matching import Matcher, distance_matrices, sequence_distances
from models.side_network import SideNetwork


class OtamOptions(FrameEncoderOptions, AdapterChoice):
    """The `MODEL` section of OTAM.

    As published: lambda 0.1 and, for OTAM, distances averaged over the shots. The published baselines that ignore the
    order, Bi-MHM (HyRSM's five-shot head) and the mean, average features into one prototype; averaging distances is
    worse.
    """

    MATCHER: Matcher = Field(
        "otam", description="otam: frames in order; bi-mhm: in any order; mean: features averaged over time"
    )
    OTAM_LAMBDA: float = Field(0.1, gt=0, description="smoothing of OTAM's softmin")
    OTAM_BOTH_DIRECTIONS: bool = Field(True, description="add the alignment with the roles exchanged")
    FRAME_SIMILARITY: Literal["cosine", "distance-correlation"] = Field(
        "cosine",
        description="similarity of two frames: cosine of features, or distance correlation of the maps' channels",
    )
    DC_WIDTH: int | None = Field(
        64, ge=2, description="channels to which maps are reduced for distance correlation; null: all"
    )
    DC_ALPHA: float = Field(
        0.5, gt=0, lt=1, description="power of the squared distances between channels (TS-FSAR: 0.4)"
    )
    SHOT_POOL: Literal["distances", "features"] = Field(
        "distances",
        description="mean over the shots of the distances, or of the features into one prototype (default of "
        "bi-mhm and mean)",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_shot_pool(cls, data: Any) -> Any:
        """Sets the default of SHOT_POOL, which depends on the matcher."""
        if isinstance(data, dict) and data.get("MATCHER", "otam") != "otam":
            return {"SHOT_POOL": "features", **data}
        return data


@register("otam")
class Otam(FrameMethod):
    """OTAM, or with another MATCHER one of the published baselines."""

    Options = OtamOptions

    def __init__(self, options: OtamOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.matching = options.MATCHER, options.OTAM_LAMBDA, options.OTAM_BOTH_DIRECTIONS
        self.reduce: nn.Linear | None = None
        if options.FRAME_SIMILARITY == "distance-correlation":
            width = self._width_of_patches()
            if options.DC_WIDTH and width > options.DC_WIDTH:
                self.reduce = nn.Linear(width, options.DC_WIDTH, bias=False)

    def encode(self, frames: Tensor) -> Tensor:
        """Computes f: float [V, T, 3, H, W] -> float [V, T, D]."""
        return self.encode_features(self.backbone_features(frames))

    def backbone_features(self, frames: Tensor) -> Tensor:
        """Returns the feature of each frame, [V, T, D], or its L patches for distance correlation, [V, T, L, C]."""
        if self.options.FRAME_SIMILARITY == "cosine" or isinstance(self.adapter, SideNetwork):
            return self.encoder(frames)
        return self.encoder.feature_maps(frames).flatten(2, 3)

    def encode_features(self, features: Tensor) -> Tensor:
        """Computes f: float [V, T, D], or float [V, T, L, C] -> float32 [V, T, d (d + 1) / 2]."""
        if self.options.FRAME_SIMILARITY == "cosine":
            return features
        patches = self.reduce(features) if self.reduce else features
        return F.normalize(distance_matrices(patches, self.options.DC_ALPHA), dim=-1)

    def _width_of_patches(self) -> int:
        """Makes the encoder return patches; returns C."""
        if not isinstance(self.adapter, SideNetwork):
            return self.encoder.drop_pooling()
        self.adapter.reads_patches = True
        return self.adapter.width

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes score = -(distance of the query to the class); the texts are not used.

        Args:
            support: float [B, N, K, T, D].
            query: float [B, Q, T, D].
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        if self.options.SHOT_POOL == "features":
            return -sequence_distances(query, support.mean(dim=2), *self.matching)
        to_each_video = sequence_distances(query, rearrange(support, "b n k t d -> b (n k) t d"), *self.matching)
        return -reduce(to_each_video, "b q (n k) -> b q n", "mean", n=support.shape[1])

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the pairing of the frames, averaged over the shots if these are compared individually."""
        by_features = self.options.SHOT_POOL == "features"
        videos = support.mean(dim=2) if by_features else rearrange(support, "b n k t d -> b (n k) t d")
        pairing = frame_pairing(query, videos, *self.matching)
        if pairing is not None:
            pairing = reduce(pairing, "b q (n k) t s -> b q n t s", "mean", n=support.shape[1])
        return Explanation({self.options.MATCHER: pairing})
