"""CLIP's zero-shot classifier (Radford et al., ICML 2021), the baseline that a few-shot method has to beat.

    frames -> CLIP image tower -> f [T, D]          class names -> CLIP text tower -> w [D]
    score = cos(mean over the frames of f, w);  probability = softmax( 100 score )

Support videos are not used and nothing is trained: `TRAIN.TRAIN_EPISODES` is treated as 0.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width.
"""

import torch.nn.functional as F
from torch import Tensor

from models import register
from models.clip_method import ClipMethod, ClipMethodOptions

LOGIT_SCALE = 100.0  # 1 / temperature of every published CLIP model: the largest that its training allows


@register("zeroshot")
class ZeroShot(ClipMethod):
    """CLIP as loaded: no parameters are trained, and no statistics are updated."""

    Options = ClipMethodOptions
    trains = False

    def __init__(self, options: ClipMethodOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.clip.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ZeroShot":
        """Stays in evaluation mode, so that batch norms and dropout behave as in a test run for any FREEZE_BN."""
        super().train(False)
        return self

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Computes the cosine similarity of each query's mean frame with each class text.

        Args:
            support: float [B, N, K, T, D], not used.
            query: float [B, Q, T, D].
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N], in [-1, 1].
        """
        videos = query.float().mean(dim=2)
        return F.cosine_similarity(videos.unsqueeze(2), class_text.float().unsqueeze(1), dim=-1)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns CLIP's softmax of the cosines times its logit scale: float [..., N] -> float32 [..., N]."""
        return super().probabilities(LOGIT_SCALE * scores)
