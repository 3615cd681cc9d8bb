"""What every few-shot method is: `encode` one video, `match` one episode.

Shapes: B episodes, N ways, K shots, Q queries of an episode, V videos, T frames, D width of the text
features, F the method's own feature shape of one frame: (D,) for one vector, (L, D) for spatial tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.explanation import Explanation
from models.released import ReleasedNames
from utils.errors import UserError
from utils.schema import DataOptions, ModelOptions

ProtocolName = Literal["transductive", "inductive"]


class Episode(NamedTuple):
    """The features of B episodes, without any label of a query; `model.score(*episode, protocol)` takes its parts.

    support: float [B, N, K, T, *F], ordered by class.
    query: float [B, Q, T, *F], in an order that does not depend on their classes.
    class_text: float [B, N, D], the text feature of each of the N classes.
    """

    support: Tensor
    query: Tensor
    class_text: Tensor


@dataclass(frozen=True)
class EpisodeLabels:
    """What only the losses of B training episodes may know.

    query: int64 [B, Q], the position of each query's class among the episode's N classes.
    class_ids: int64 [B, N], the position of each of the N classes among all training classes.
    all_text: float [C, D], the text features of all C training classes.
    """

    query: Tensor
    class_ids: Tensor
    all_text: Tensor


@dataclass(frozen=True)
class EpisodeOutput:
    """What a method returns in training.

    scores: float32 [B, Q, N], higher is better.
    losses: name -> scalar, already weighted; their sum is what is minimised.
    """

    scores: Tensor
    losses: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of the losses, a scalar."""
        return sum(self.losses.values(), start=self.scores.new_zeros(()))


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike.

    name: in messages and checkpoints. parameters: of the model, trained or frozen. lr_factor: multiplies SOLVER.LR.
    weight_decay: takes the place of SOLVER.WEIGHT_DECAY; None: that one.
    """

    name: str
    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    weight_decay: float | None = None


class FewShotModel(nn.Module, ABC):
    """Base class of all methods; a method is `encode`, `match` and, if it has extra losses, `training_losses`.

    Attributes:
        Options: the typed section of the YAML file, `MODEL`, that this method reads.
        transductive: a query's score depends on the other queries of its episode.
        trains: whether anything can be trained; if not, a run tests the method as it is.
        training_only: prefixes of entries that only losses read; a model that is only tested may be without them.
        released: how the published code calls the weights, for methods whose published checkpoints can be read.
        needs_frames: whether `encode_for_training` requires the frames.
        pixel_mean, pixel_std: what the backbone's weights expect the pixels to be normalised with.
        data: how clips are made for this model; `models.build` and `models.load` set it.
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
        """Features of each video on its own: float [V, T, 3, H, W] -> float [V, T, *F].

        A method may have another axis in place of T, which then only its `match` reads.
        """

    def backbone_features(self, frames: Tensor) -> Tensor:
        """`encode` up to where the backbone ends: float [V, T, 3, H, W] -> float [V, ...], each video on its own.

        A method whose `encode` has more layers behind the backbone splits it here, so that the backbone may take
        fewer videos at a time (TRAIN.CHUNK), or may be left out once its features are known (TRAIN.CACHED_FEATURES).
        """
        return self.encode(frames)

    def encode_features(self, features: Tensor) -> Tensor:
        """The rest of `encode`: what `backbone_features` returned -> float [V, T, *F]."""
        return features

    def set_training_classes(self, count: int) -> None:
        """Builds what needs the number of training classes, such as a classifier that only a loss reads.

        Called once after the model is built, before the optimizer, by training runs alone; `class_ids` of the labels
        are below `count`. The names of such layers belong in `training_only`.
        """

    def parameter_groups(self) -> list[ParameterGroup]:
        """Returns all parameters, each in one group, for an optimizer with a learning rate for each group.

        Called once, after `set_training_classes`. Names, number and sizes of the groups depend on the config alone.
        """
        return [ParameterGroup("all", list(self.parameters()))]

    def weights_to_test(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights of a checkpoint without those below `training_only` that this model has no layer for."""
        own = self.state_dict()
        prefixes = tuple(f"{prefix}." for prefix in self.training_only)
        return {name: value for name, value in weights.items() if name in own or not name.startswith(prefixes)}

    def encode_for_training(self, features: Tensor, frames: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """`encode_features` in a training step, with the losses of single videos, if a method has some.

        Args:
            features: float [V, ...] of all videos of an episode, from `backbone_features`.
            frames: float [V, T, 3, H, W], the normalised frames that they were made of, if `needs_frames`.

        Returns:
            float [V, T, *F]; and name -> scalar, already weighted, each averaged over the V videos.
        """
        return self.encode_features(features), {}

    def class_text(self, prompt_names: Sequence[str]) -> Tensor:
        """Returns the text features of C classes from their prompt names: float32 [C, D]. Called before training only.

        A method without text keeps this default: zeros, float32 [C, 1], which its `match` does not read.
        """
        return torch.zeros(len(prompt_names), 1, device=next(self.parameters()).device)

    def cut_prompts(self, prompt_names: Sequence[str]) -> list[bool]:
        """Returns for each of C prompt names whether `class_text` leaves out the end of it, since it is too long."""
        return [False] * len(prompt_names)

    def drop_text_tower(self) -> None:
        """Frees what only `class_text` needs; called once all text features are there."""

    def precompute_support(self, support: Tensor, class_text: Tensor) -> Tensor:
        """Returns what depends on one support video and its class text alone, so that it is computed once per video.

        Args:
            support: float [B, N, K, T, *F], from `encode`.
            class_text: float [B, N, D].

        Returns:
            what `match` takes as `support`: [B, N, K, ...], the rest as the method needs it; `support` itself where
            there is nothing to precompute. Videos precomputed one by one (N = K = 1) and then joined give the same
            scores.
        """
        return support

    def precompute_query(self, query: Tensor) -> Tensor:
        """Returns what depends on one query video alone, so that it is computed once per video.

        Args:
            query: float [B, Q, T, *F], from `encode`.

        Returns:
            what `match` takes as `query`: [B, Q, ...], the rest as the method needs it; `query` itself where there is
            nothing to precompute. The result for a video does not depend on the others.
        """
        return query

    @abstractmethod
    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """Returns the scores of the queries of each episode; no argument carries a label of a query.

        `score` calls it. Call `score` with what `encode` returned: this method expects precomputed videos.

        Args:
            support: [B, N, K, ...], from `precompute_support`.
            query: [B, Q, ...], from `precompute_query`.
            class_text: float [B, N, D].

        Returns:
            float32 [B, Q, N], higher is better.
        """

    def score(self, support: Tensor, query: Tensor, class_text: Tensor, protocol: ProtocolName = "inductive") -> Tensor:
        """Returns the scores of queries: the public entry, for what `encode` returned.

        Args:
            support: float [B, N, K, T, *F].
            query: float [B, Q, T, *F].
            class_text: float [B, N, D].
            protocol: inductive gives `match` each query alone; transductive gives it all queries of an episode.

        Returns:
            float32 [B, Q, N], higher is better.

        Raises:
            UserError: `match` returned another shape.
        """
        support = self.precompute_support(support, class_text)
        return self.score_precomputed(support, self.precompute_query(query), class_text, protocol)

    def score_precomputed(
        self, support: Tensor, query: Tensor, class_text: Tensor, protocol: ProtocolName = "inductive"
    ) -> Tensor:
        """Returns what `score` does, for videos that went through `precompute_support` and `precompute_query`."""
        # Where no query depends on another, both protocols give the same scores, and one call is cheaper.
        protocol = protocol if self.transductive else "transductive"
        return match_under(protocol, self._checked_match, support, query, class_text)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns the softmax of the scores over the classes, which is what training with cross-entropy fits.

        A method whose scores are not the logits of its training overrides this.

        Args:
            scores: float [..., N], from `score`.

        Returns:
            float32 [..., N], which sum to 1.
        """
        return scores.float().softmax(dim=-1)

    def _checked_match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        """`match`, whose shape is checked: a wrong one may broadcast later without an error."""
        scores = self.match(support, query, class_text)
        expected = (*query.shape[:2], class_text.shape[1])
        if scores.shape != expected:
            raise UserError(
                f"{type(self).__name__}.match returned scores of shape {list(scores.shape)}: expected [B, Q, N], here "
                f"{list(expected)}, a score of each query for each class of its episode"
            )
        return scores

    def explain(self, support: Tensor, query: Tensor, class_text: Tensor) -> Explanation:
        """Returns how the scores of `score` came about, for the figures of a report; optional.

        Args:
            support: float [B, N, K, T, *F], from `encode`.
            query: float [B, Q, T, *F], from `encode`; under the inductive protocol one query, Q = 1.
            class_text: float [B, N, D].

        Returns:
            pairings of frames, features behind modules and further measures; by default none of them.
        """
        return Explanation()

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Scores and named losses of training episodes; a method with further losses extends this.

        Args:
            episode: features from `encode`, carrying gradients.
            labels: what the scores cannot see.
            protocol: see `score`.

        Returns:
            scores float32 [B, Q, N] and the losses, each averaged over the B episodes.
        """
        scores = self.score(*episode, protocol)
        return EpisodeOutput(scores, {"cross_entropy": cross_entropy(scores, labels.query)})


def match_under(
    protocol: ProtocolName,
    match: Callable[[Tensor, Tensor, Tensor], Tensor],
    support: Tensor,
    query: Tensor,
    class_text: Tensor,
) -> Tensor:
    """Returns the scores of `match` under a protocol; the only implementation of the inductive one.

    Inductive: every query becomes a separate episode, B * Q episodes of one query each, so that by construction no
    score depends on another query.

    Args:
        protocol: inductive or transductive.
        match: (support [B, N, K, ...], query [B, Q, ...], class_text [B, N, D]) -> [B, Q, N].
        support, query, class_text: its arguments.

    Returns:
        float32 [B, Q, N].
    """
    if protocol == "transductive":
        return match(support, query, class_text)
    queries = query.shape[1]
    scores = match(
        repeat(support, "b ... -> (b q) ...", q=queries),
        rearrange(query, "b q ... -> (b q) 1 ..."),
        repeat(class_text, "b ... -> (b q) ...", q=queries),
    )
    return rearrange(scores, "(b q) 1 n -> b q n", q=queries)


def cross_entropy(scores: Tensor, query_labels: Tensor) -> Tensor:
    """Mean over all queries of -log softmax(scores)[label]: float [B, Q, N], int64 [B, Q] -> scalar."""
    return F.cross_entropy(scores.flatten(0, 1), query_labels.flatten())


def training_class_of_videos(episode: Episode, labels: EpisodeLabels) -> Tensor:
    """Training class of each video of B episodes, supports by class and then queries: int64 [B, N*K + Q]."""
    of_support = repeat(labels.class_ids, "b n -> b (n k)", k=episode.support.shape[2])
    return torch.cat([of_support, labels.class_ids.gather(1, labels.query)], dim=1)


def videos_of(episode: Episode) -> Tensor:
    """The features of all videos in the order of `training_class_of_videos`: float [B, N*K + Q, T, *F]."""
    return torch.cat([episode.support.flatten(1, 2), episode.query], dim=1)


def texts_of_queries(class_text: Tensor, query_labels: Tensor) -> Tensor:
    """The text of each query's true class, for losses only: [B, N, D], int64 [B, Q] -> float [B, Q, D]."""
    index = repeat(query_labels, "b q -> b q d", d=class_text.shape[-1])
    return class_text.gather(1, index)


def parameter_count(module: nn.Module) -> int:
    """Number of values that training changes."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
