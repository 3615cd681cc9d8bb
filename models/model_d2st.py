"""D2ST-Adapter: disentangled-and-deformable spatio-temporal adapter for few-shot recognition (Pei et al., ICCV 2025).

    frames -> CLIP's ViT, frozen, an adapter after every block -> f [T, D]                    models/adapter_d2st.py
              or an ImageNet ResNet, an adapter after every stage
    P_c   = mean over the shots of class c of f                                               frame by frame
    score = -( sum_t min_l D(t, l) + sum_l min_t D(t, l) ),   D(t, l) = 1 - cos( f_t, P_c,l )                Bi-MHM
    loss  = CE(scores) + CLASS_WEIGHT * CE( W mean_t f, training class of the video )

The adapters process one video at a time and start as the identity, so the untrained method is Bi-MHM on CLIP's class
tokens. No text is used; queries do not see each other. `MODEL.ADAPTER: d2st` adds these adapters to other methods.

As in the release (github.com/qizhongtan/D2ST-Adapter), weight decay applies to everything except the norms before the
offsets, and a model trained with one shot is tested with one and with five.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D width of the tower.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from models import register
from models.adapter_d2st import DeformableAttention
from models.adapters import AdapterChoice
from models.backbones import FrameEncoderOptions, FrameMethod
from models.base import (
    Episode,
    EpisodeLabels,
    EpisodeOutput,
    ParameterGroup,
    ProtocolName,
    all_others,
    cross_entropy,
    training_class_of_videos,
    videos_of,
)
from models.explanation import Explanation, pair_weights
from models.matching import bi_mhm, video_distances
from models.released import ReleasedNames

SMALLEST_NORM = 1e-12  # for the product of two norms, as in `F.normalize`; the other methods add 0.01


class D2stOptions(FrameEncoderOptions, AdapterChoice):
    """The `MODEL` section of D2ST-Adapter."""

    BACKBONE: str = Field(
        "ViT-B/16", min_length=1, description="one of CLIP's ViTs with 7 x 7 patches or more, or resnet18 to resnet50"
    )
    ADAPTER: Literal["none", "aim", "d2st"] = Field("d2st", description="layers within the tower")
    CLASS_WEIGHT: float = Field(
        2.0, ge=0, description="weight of the loss over training classes; 0: none (released: 0 to 2.5)"
    )


def released_adapters() -> dict[str, str | Sequence[str]]:
    """Returns the names of the adapters in the released code, which keeps each within its block."""
    released, renamed = "transformer.resblocks.*.Adapter", "adapter.adapters.*"
    names: dict[str, str | Sequence[str]] = {
        f"{released}.down": f"{renamed}.down",
        f"{released}.up": f"{renamed}.up",
        f"{released}.pos_embed": f"{renamed}.place",
    }
    parts = {"proj_q": "to_query", "proj_k": "to_key", "proj_v": "to_value", "proj_out": "project"}
    parts |= {"conv_offset.0": "look", "conv_offset.1.norm": "norm", "conv_offset.3": "move"}
    for letter, pathway in (("s", "spatial"), ("t", "temporal")):
        names[f"{released}.{letter}_ln"] = f"{renamed}.{pathway}_norm"
        names |= {f"{released}.{letter}_attn.{part}": f"{renamed}.{pathway}.{name}" for part, name in parts.items()}
    return names


TOWER = (
    "conv1",
    "positional_embedding",
    "ln_pre",
    *(f"transformer.resblocks.*.{p}" for p in ("attn", "ln_1", "ln_2", "mlp")),
)
RELEASED = ReleasedNames(
    used={
        "class_embedding": "adapter.class_token",
        "temporal_embedding": "adapter.time.embedding",
        "ln_post": "adapter.norm",
        **released_adapters(),
    },
    unused=("classification_layer",),
    backbone={name: f"encoder.visual.{name}" for name in TOWER},
    rows={"D2ST.FRAMES": "adapter.time.embedding"},
    ratios={"D2ST.RATIO": "adapter.adapters.0.down.weight"},
)


@register("d2st")
class D2st(FrameMethod):
    """D2ST-Adapter; each query is scored alone."""

    Options = D2stOptions
    training_only = ("classify",)
    released = RELEASED

    def __init__(self, options: D2stOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        self.classify: nn.Linear | None = None

    def set_training_classes(self, count: int) -> None:
        """Builds the classifier of videos, if its loss has a weight."""
        if self.options.CLASS_WEIGHT:
            self.classify = nn.Linear(self.encoder.width, count)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Excludes the norms before the offsets from weight decay."""
        attentions = [module for module in self.modules() if isinstance(module, DeformableAttention)]
        parameters = [parameter for attention in attentions for parameter in attention.norm.parameters()]
        norms = ParameterGroup("norms of the offsets", parameters, weight_decay=0.0)
        return [all_others("all others", self, [norms]), norms]

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes score = -Bi-MHM of the query and the prototype; the texts are not used.

        Args:
            support: float [B, N, K, T, D].
            query: float [B, Q, T, D].
            class_text: float [B, N, 1], not used.

        Returns:
            float32 [B, Q, N].
        """
        return -bi_mhm(self._frame_distances(support, query))

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns the nearest frames of the query and the prototype."""
        return Explanation({"bi-mhm": pair_weights(bi_mhm, self._frame_distances(support, query))})

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes CE(scores) and CE over the training classes.

        Args:
            episode: features from `encode`.
            labels: of the B episodes.
            protocol: has no effect, since queries do not see each other.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy and class, the latter if it has a weight.
        """
        scores = self.score(*episode, protocol)
        losses = {"cross_entropy": cross_entropy(scores, labels.query)}
        if self.classify is not None:
            logits = self.classify(videos_of(episode).mean(dim=2))
            classes = training_class_of_videos(episode, labels)
            losses["class"] = self.options.CLASS_WEIGHT * cross_entropy(logits, classes)
        return EpisodeOutput(scores, losses)

    def _frame_distances(self, support: Tensor, query: Tensor) -> Tensor:
        """Computes D of the queries and the prototypes: [B, N, K, T, D] and [B, Q, T, D] -> float32 [B, Q, N, T, T]."""
        return video_distances(query, support.mean(dim=2), SMALLEST_NORM)
