"""Text features of classes: checked, and kept from the first start for later ones."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.base import FewShotModel
from models.text import class_texts
from run.feature_key import files_digest, tensors_digest
from run.features import FeatureFile
from utils import distributed
from utils.files import cache_folder
from utils.utils import device_name, package_versions

CODE = ("models/**/*.py",)  # between a class and its text feature


class ClassTexts:
    """The text features of one model, whose weights do not change meanwhile.

    A file in `cache_folder()` holds the features of one list of classes. Its name contains a hash of everything that
    they depend on (see `describe`), so any run may read it.
    """

    def __init__(self, model: FewShotModel) -> None:
        """Takes a model; its `class_text` computes the features, and its `text_source` names their origin."""
        self.model, self.device = model, next(model.parameters()).device
        self._weights = ""  # digest of the text tower, once it is known

    def features(self, prompts: Mapping[str, str], source: str) -> Tensor:
        """Returns the text features of C classes, read or computed, float32 [C, D]; see `class_texts`."""
        return class_texts(self.model, prompts, source, self._kept(list(prompts.values())))

    def describe(self, prompts: Sequence[str]) -> dict[str, Any] | None:
        """Returns everything that `class_text` depends on, as plain values; None if that is not known."""
        source, file = self.model.text_source(prompts), _file_of(type(self.model))
        if source is None or file is None:
            return None
        weights, values = source
        self._weights = self._weights or tensors_digest(weights)
        computed_by = type(self.model).class_text
        return {
            **values,
            "function": f"{computed_by.__module__}.{computed_by.__qualname__}",
            "weights": self._weights,
            "device": device_name(self.device),
            "code": files_digest(CODE, file),
            "versions": package_versions(),
        }

    def _kept(self, prompts: Sequence[str]) -> Tensor:
        """Returns the features of C classes, float32 [C, D], from their file, which the first call writes.

        All processes call this together.
        """
        content = self.describe(prompts)
        if content is None:
            return self.model.class_text(prompts)
        file = FeatureFile(cache_folder(), "texts", content)

        def computed() -> Tensor:
            features = self.model.class_text(prompts)
            return file.allocate(features.shape).copy_(features) if distributed.is_main() else features

        return file.read_or(computed, logging.DEBUG).to(self.device, copy=True)


def _file_of(kind: type) -> Path | None:
    """Returns the file of a class, or None for a class from a notebook."""
    try:
        return Path(inspect.getfile(kind))
    except (TypeError, OSError):
        return None
