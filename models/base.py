"""The base class of all few-shot methods: `encode` one video, `match` one episode.

Shapes: B episodes, N ways, K shots, Q queries of an episode, V videos, T frames, D width of the text
features, F the method's own feature shape of one frame: (D,) for one vector, (L, D) for spatial tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.explanation import Explanation
from models.released import ReleasedNames
from utils.errors import UserError
from utils.schema import DataOptions, ModelOptions

ProtocolName = Literal["transductive", "inductive"]
Match = Callable[[Tensor, Tensor, Tensor], Tensor]  # (support, query, class_text) -> scores


class Episode(NamedTuple):
    """The features of B episodes, without labels of queries; call `model.score(*episode, protocol)`.

    support: float [B, N, K, T, *F], ordered by class.
    query: float [B, Q, T, *F], in an order that does not depend on their classes.
    class_text: float [B, N, D], the text feature of each of the N classes.
    """

    support: Tensor
    query: Tensor
    class_text: Tensor


@dataclass(frozen=True)
class EpisodeLabels:
    """The labels of B training episodes, which only losses may read.

    query: int64 [B, Q], the position of each query's class among the episode's N classes.
    class_ids: int64 [B, N], the position of each of the N classes among all training classes.
    all_text: float [C, D], the text features of all C training classes.
    """

    query: Tensor
    class_ids: Tensor
    all_text: Tensor


@dataclass(frozen=True)
class EpisodeOutput:
    """The scores and losses of B training episodes.

    scores: float32 [B, Q, N], higher is better.
    losses: name -> scalar, already weighted; training minimises their sum.
    """

    scores: Tensor
    losses: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of the losses, a scalar."""
        return sum(self.losses.values(), start=self.scores.new_zeros(()))


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike.

    name: used in messages and checkpoints. parameters: trained or frozen. lr_factor: multiplies SOLVER.LR.
    weight_decay: replaces SOLVER.WEIGHT_DECAY, unless it is None.
    """

    name: str
    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    weight_decay: float | None = None


def all_others(name: str, model: nn.Module, groups: Iterable[ParameterGroup]) -> ParameterGroup:
    """Returns the group of all parameters of a model that are in none of the given groups."""
    known = {id(parameter) for group in groups for parameter in group.parameters}
    return ParameterGroup(name, [parameter for parameter in model.parameters() if id(parameter) not in known])


class FewShotModel(nn.Module, ABC):
    """Base class of all methods; a method is `encode`, `match` and, if it has extra losses, `training_losses`.

    Attributes:
        Options: the typed section of the YAML file, `MODEL`, that this method reads.
        transductive: whether a query's score can depend on the other queries of its episode.
        trains: whether the method has parameters to train; if not, a run only tests it.
        training_only: prefixes of the parameters that only losses use; a model for testing does not have them.
        released: names of the weights in the authors' checkpoints, for methods that can load these.
        needs_frames: whether `encode_for_training` requires the frames.
        pixel_mean, pixel_std: normalisation of the pixels that the backbone's weights expect.
        data: how clips are prepared for this model; set by `models.build` and `models.load`.
    """

    Options: ClassVar[type[ModelOptions]] = ModelOptions
    transductive: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    training_only: ClassVar[tuple[str, ...]] = ()
    released: ClassVar[ReleasedNames] = ReleasedNames({})
    needs_frames: bool = False
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]
    data: DataOptions = DataOptions()

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Returns the features of each video, independently of the others: float [V, T, 3, H, W] -> float [V, T, *F].

        A method may replace T by another axis, since only its `match` reads it.
        """

    def backbone_features(self, frames: Tensor) -> Tensor:
        """Returns the output of the backbone, the first part of `encode`: float [V, T, 3, H, W] -> float [V, ...].

        A method with layers after the backbone overrides this and `encode_features`, so that the backbone can process
        fewer videos at a time (TRAIN.CHUNK), or only once for all episodes (TRAIN.CACHED_FEATURES).
        """
        return self.encode(frames)

    def encode_features(self, features: Tensor) -> Tensor:
        """Applies the rest of `encode` to the output of `backbone_features`: float [V, ...] -> float [V, T, *F]."""
        return features

    def set_training_classes(self, count: int) -> None:
        """Builds the layers that depend on the number of training classes, such as the classifier of a loss.

        Only training runs call this, once, before they build the optimizer. The prefixes of such layers belong in
        `training_only`.

        Args:
            count: number of training classes; `class_ids` of the labels are smaller.
        """

    def parameter_groups(self) -> list[ParameterGroup]:
        """Returns all parameters, each in one group, for an optimizer with a learning rate for each group.

        Called once, after `set_training_classes`. Names, number and sizes of the groups depend only on the config.
        """
        return [ParameterGroup("all", list(self.parameters()))]

    def weights_to_test(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights of a checkpoint without those of `training_only` layers that this model does not have."""
        known = self.state_dict()
        prefixes = tuple(f"{prefix}." for prefix in self.training_only)
        return {name: value for name, value in weights.items() if name in known or not name.startswith(prefixes)}

    def encode_for_training(self, features: Tensor, frames: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns `encode_features` in a training step, and losses of individual videos (by default an empty dict).

        Args:
            features: float [V, ...] of all videos of an episode, from `backbone_features`.
            frames: float [V, T, 3, H, W], the normalised frames of these videos, if `needs_frames`.

        Returns:
            features float [V, T, *F]; losses, name -> scalar, already weighted, each averaged over the V videos.
        """
        return self.encode_features(features), {}

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        """Returns the text features of C classes from their prompt names: float32 [C, D]; called once, before training.

        By default, for methods without text, these are zeros, float32 [C, 1], which `match` ignores.
        """
        return torch.zeros(len(prompt_names), 1, device=next(self.parameters()).device)

    def text_source(self, prompt_names: Sequence[str]) -> tuple[list[Tensor], dict[str, Any]] | None:
        """Returns all weights and plain values that `class_text` depends on; they identify its cached result.

        With None, the default, the result is computed at each start.
        """
        return None

    def cut_prompts(self, prompt_names: Sequence[str]) -> list[bool]:
        """Returns for each of C prompt names whether it is too long, so that `class_text` ignores its end."""
        return [False] * len(prompt_names)

    def drop_text_tower(self) -> None:
        """Frees the weights that only `class_text` needs; called after `class_text`."""

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Computes the part of `match` that depends on one support video and its class text, once per video.

        Args:
            support: float [B, N, K, T, *F], from `encode`.
            class_text: float [B, N, D].

        Returns:
            [B, N, K, ...], the `support` of `match`; by default `support` itself. Videos precomputed one by one
            (N = K = 1) and then joined give the same scores.
        """
        return support

    def precompute_query(self, query: Tensor) -> Tensor:
        """Computes the part of `match` that depends on one query video, once per video.

        Args:
            query: float [B, Q, T, *F], from `encode`.

        Returns:
            [B, Q, ...], the `query` of `match`; by default `query` itself. The result for a video does not depend on
            the others.
        """
        return query

    @abstractmethod
    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Returns the scores of the queries of each episode; no argument contains a label of a query.

        This expects precomputed videos. Use `score` for the output of `encode`.

        Args:
            support: [B, N, K, ...], from `precompute_support`.
            query: [B, Q, ...], from `precompute_query`.
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N], higher is better.
        """

    def score(self, support: Tensor, query: Tensor, class_text: Tensor, protocol: ProtocolName = "inductive") -> Tensor:
        """Returns the scores of the queries from the output of `encode`.

        Args:
            support: float [B, N, K, T, *F].
            query: float [B, Q, T, *F].
            class_text: float [B, N, D].
            protocol: inductive gives `match` each query alone; transductive gives it all queries of an episode.

        Returns:
            float32 [B, Q, N], higher is better.

        Raises:
            UserError: `match` returned a wrong shape.
        """
        support = self.precompute_support(support, class_text)
        return self.score_precomputed(support, self.precompute_query(query), class_text, protocol)

    def score_precomputed(
        self, support: Tensor, query: Tensor, class_text: Tensor, protocol: ProtocolName = "inductive"
    ) -> Tensor:
        """Returns the same as `score`, from the outputs of `precompute_support` and `precompute_query`."""
        # If no query depends on another, both protocols give the same scores, and one call is cheaper.
        alone = self.transductive and protocol == "inductive"
        return self._checked(self.match_alone if alone else self.match, support, query, class_text)

    def match_alone(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Returns the scores of `match` with each query as the only one of its episode: the inductive protocol.

        This scores B * Q episodes of one query each, so that no score can depend on another query. A transductive
        method may override this to compute shared results only once.

        Args:
            support, query, class_text: as for `match`.

        Returns:
            float32 [B, Q, N].
        """
        queries = query.shape[1]
        scores = self._checked(
            self.match,
            repeat(support, "b ... -> (b q) ...", q=queries),
            rearrange(query, "b q ... -> (b q) 1 ..."),
            repeat(class_text, "b ... -> (b q) ...", q=queries),
        )
        return rearrange(scores, "(b q) 1 n -> b q n", q=queries)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns the probability of each class: the softmax of the scores, as in training with cross-entropy.

        A method whose loss uses other logits overrides this.

        Args:
            scores: float [..., N], from `score`.

        Returns:
            float32 [..., N], which sums to 1.
        """
        return scores.float().softmax(dim=-1)

    def _checked(self, match: Match, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Calls `match` and checks the shape of the scores: a wrong one could broadcast later without an error."""
        scores = match(support, query, class_text)
        expected = (*query.shape[:2], class_text.shape[1])
        if scores.shape != expected:
            raise UserError(
                f"{type(self).__name__}.match returned scores of shape {list(scores.shape)}: expected [B, Q, N], here "
                f"{list(expected)}, a score for each query and class of its episode"
            )
        return scores

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Explains the scores of `score`, for the figures of a report; optional.

        Args:
            support: float [B, N, K, T, *F], from `encode`.
            query: float [B, Q, T, *F], from `encode`; under the inductive protocol one query, Q = 1.
            class_text: float [B, N, D].

        Returns:
            pairings of frames, features after modules, and further measures; empty by default.
        """
        return Explanation()

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Returns the scores and named losses of training episodes; a method with further losses extends this.

        Args:
            episode: features from `encode`, with gradients.
            labels: labels of the queries and classes, for losses only.
            protocol: see `score`.

        Returns:
            scores float32 [B, Q, N], and losses, each averaged over the B episodes.
        """
        scores = self.score(*episode, protocol)
        return EpisodeOutput(scores, {"cross_entropy": cross_entropy(scores, labels.query)})


def cross_entropy(scores: Tensor, query_labels: Tensor) -> Tensor:
    """Returns the mean over all queries of -log softmax(scores)[label]: float [B, Q, N], int64 [B, Q] -> scalar."""
    return F.cross_entropy(scores.flatten(0, 1), query_labels.flatten())


def training_class_of_videos(episode: Episode, labels: EpisodeLabels) -> Tensor:
    """Returns the training class of each video, support videos by class, then queries: int64 [B, N*K + Q]."""
    support = repeat(labels.class_ids, "b n -> b (n k)", k=episode.support.shape[2])
    return torch.cat([support, labels.class_ids.gather(1, labels.query)], dim=1)


def videos_of(episode: Episode) -> Tensor:
    """Returns the features of all videos in the order of `training_class_of_videos`: float [B, N*K + Q, T, *F]."""
    return torch.cat([episode.support.flatten(1, 2), episode.query], dim=1)


def texts_of_queries(class_text: Tensor, query_labels: Tensor) -> Tensor:
    """Returns the text of each query's true class, for losses only: [B, N, D], int64 [B, Q] -> float [B, Q, D]."""
    index = repeat(query_labels, "b q -> b q d", d=class_text.shape[-1])
    return class_text.gather(1, index)


def parameter_count(module: nn.Module) -> int:
    """Returns the number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
