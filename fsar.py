"""The public Python API: build or load a few-shot model and classify clips with it.

    import fsar

    model = fsar.load("checkpoints/clipspm_demo/checkpoint_best.pt")
    classifier = fsar.Classifier(model).fit({"wave": ["wave/1.mp4"], "clap": ["clap/1.mp4"]})
    print(classifier.predict(["query.mp4"]).labels)

Shapes: N classes, K shots, Q queries, V videos, T frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from episodes.decoding import read_frames
from models import available, build, load
from models.base import Explanation, FewShotModel
from run.encoder import Encoder
from run.feature_cache import ClassTexts
from utils.errors import UserError
from utils.utils import choose_device
from videotransforms.video_transforms import TestTransform, resize_short_side
from videotransforms.volume_transforms import FrameChoice

__all__ = ["Classifier", "Clip", "Prediction", "UserError", "available", "build", "load"]

Clip = str | Path | np.ndarray  # a video file, a folder of frames, or the frames of a video, uint8 [T, H, W, 3]
CLIPS_PER_BATCH = 16


@dataclass(frozen=True)
class Prediction:
    """The scores of Q queries for N classes.

    classes: names of the N classes, in the order of `fit`.
    scores: float32 [Q, N] on the CPU, higher is better.
    probabilities: float32 [Q, N] on the CPU; each row sums to 1, see `FewShotModel.probabilities`.
    """

    classes: tuple[str, ...]
    scores: Tensor
    probabilities: Tensor

    @property
    def labels(self) -> list[str]:
        """The class with the highest score for each query."""
        return [self.classes[best] for best in self.scores.argmax(dim=-1).tolist()]

    @property
    def margins(self) -> Tensor:
        """The probability of the best class minus that of the second for each query: float32 [Q]."""
        best = self.probabilities.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]

    @classmethod
    def joined(cls, parts: "Sequence[Prediction]") -> "Prediction":
        """Joins the predictions of several groups of queries for the same classes."""
        scores, probabilities = ([getattr(part, name) for part in parts] for name in ("scores", "probabilities"))
        return cls(parts[0].classes, torch.cat(scores), torch.cat(probabilities))


class Classifier:
    """A classifier of clips with a few examples of each class, under the inductive protocol."""

    def __init__(self, model: FewShotModel, device: str = "auto") -> None:
        """Moves the model to a device.

        Args:
            model: from `build` or `load`.
            device: auto, cuda or cpu.

        Raises:
            UserError: cuda is requested but not available.
        """
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()
        self._encoder = Encoder(self.model, self.device, model.data.IMG_NORM, amp=False)
        self.choice = FrameChoice(model.data.SEQ_LEN, model.data.SAMPLING, None)
        self.classes: tuple[str, ...] = ()

    @torch.no_grad()
    def fit(self, support: Mapping[str, Sequence[Clip]], texts: Mapping[str, str] | None = None) -> "Classifier":
        """Encodes the examples of each class.

        If classes have different numbers of examples, those of the smaller classes are repeated in order, so that all
        classes have the same number of shots.

        Args:
            support: class name -> clips, for two or more classes.
            texts: class name -> the name that prompts use for the class; by default the class name.

        Returns:
            this classifier.

        Raises:
            UserError: fewer than two classes, a class without clips, a name or a text that is not a string, a text of
                an unknown class, an unreadable clip, an empty text, or two texts with the same feature.
        """
        texts = dict(texts or {})
        for clips in support.values():
            _refuse_single_clip(clips)
        if len(support) < 2 or not all(len(clips) for clips in support.values()):
            counts = ", ".join(f"{name}: {len(clips)}" for name, clips in support.items()) or "none"
            raise UserError(f"expected two or more classes with at least one clip each, found {counts}")
        if no_name := [name for name in support if not isinstance(name, str)]:
            raise UserError(f"expected a text as the name of each class, found {no_name[0]!r}; use its words")
        if no_text := [name for name, text in texts.items() if not isinstance(text, str)]:
            raise UserError(f"expected a text for class {no_text[0]!r}, found {texts[no_text[0]]!r}")
        if unknown := sorted(texts.keys() - support.keys()):
            raise UserError(f"texts contains {unknown[0]!r}, which is not one of the classes {', '.join(support)}")
        shots = max(len(clips) for clips in support.values())
        encoded = [self._encode(clips) for clips in support.values()]
        repeated = [videos[torch.arange(shots, device=self.device) % len(videos)] for videos in encoded]
        prompts = {name: texts.get(name, name) for name in support}
        class_text = ClassTexts(self.model).features(prompts, "texts")[None]
        stacked = torch.stack(repeated)[None]
        self._support = self.model.precompute_support(stacked, class_text)
        self.classes, self._shots, self._class_text = tuple(support), stacked, class_text  # together, after all checks
        return self

    @torch.no_grad()
    def predict(self, queries: Sequence[Clip]) -> Prediction:
        """Scores clips against the classes of `fit`.

        Args:
            queries: Q clips; the scores of a clip do not depend on the others.

        Returns:
            scores [Q, N] and the best class of each query.

        Raises:
            UserError: `fit` was not called, there are no queries or only one that is not in a list, or a clip is
                unreadable.
        """
        self._raise_if_not_fitted()
        _refuse_single_clip(queries)
        if not len(queries):
            raise UserError("expected at least one clip to classify, found none")
        query = self.model.precompute_query(self._encode(queries)[None])
        scores = self.model.score_precomputed(self._support, query, self._class_text)[0].float()
        return Prediction(self.classes, scores.cpu(), self.model.probabilities(scores).cpu())

    @torch.no_grad()
    def explain(self, query: Clip) -> Explanation:
        """Explains the scores of one clip, see `FewShotModel.explain`; call `fit` first."""
        self._raise_if_not_fitted()
        return self.model.explain(self._shots, self._encode([query])[None], self._class_text)

    def read(self, clip: Clip) -> np.ndarray:
        """Reads the frames that the model uses of a clip, resized but not cropped.

        `fit` and `predict` accept the result in place of the clip and compute the same scores.

        Args:
            clip: a path or an array.

        Returns:
            uint8 [T, h, w, 3].

        Raises:
            UserError: the clip is unreadable, or an array has the wrong type or shape.
        """
        if isinstance(clip, str | Path):
            frames, _ = read_frames(Path(clip).absolute(), self.choice)
        elif not isinstance(clip, np.ndarray):
            raise UserError(f"expected a path, or frames as uint8 [T, H, W, 3], found {type(clip).__name__}")
        elif clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[-1] == 3 and clip.size:
            frames = clip[self.choice(len(clip))]
        else:
            raise UserError(f"expected frames as uint8 [T, H, W, 3], found {clip.dtype} {list(clip.shape)}")
        return self.shrink(frames)

    def shrink(self, frames: np.ndarray) -> np.ndarray:
        """Resizes frames, without cropping them: uint8 [T, H, W, 3] -> uint8 [T, h, w, 3]."""
        resized = resize_short_side(torch.from_numpy(frames).permute(0, 3, 1, 2), self.model.data.SHORT_SIDE)
        return resized.permute(0, 2, 3, 1).numpy()

    def _raise_if_not_fitted(self) -> None:
        if not self.classes:
            raise UserError("the classifier has no classes yet: call fit with examples of each class first")

    def _encode(self, clips: Sequence[Clip]) -> Tensor:
        """Returns the features of clips: float32 [V, T, *F] on the device."""
        data = self.model.data
        crop = TestTransform(data.SHORT_SIDE, data.IMG_SIZE)
        starts = range(0, len(clips), CLIPS_PER_BATCH)
        batches = ([crop(self.read(clip)) for clip in clips[start : start + CLIPS_PER_BATCH]] for start in starts)
        return torch.cat([self._encoder(torch.stack(batch)) for batch in batches])


def _refuse_single_clip(clips: Sequence[Clip]) -> None:
    """Raises UserError for a path in place of a list of clips: a text is a sequence too, of its letters."""
    if isinstance(clips, str | Path):
        raise UserError(f"expected a list of clips, found the path {str(clips)!r}; write [{str(clips)!r}]")
