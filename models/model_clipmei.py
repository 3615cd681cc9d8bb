"""CLIP-MEI: exploit more effective information for few-shot action recognition (Deng et al., KBS 2025).

    frames -> CLIP image tower -> f [T, D]          class names -> CLIP text tower -> w [D]
    SF(x, p): [p^; x^] = Transformer([p; x + 0.1 p])                          one layer for prompts of every kind
      MIC  the motion m(f) is a prompt; deep motion must agree with the refined prompt (loss only)
             L_mot = d( m(x^), m^ ) of the queries plus that of the supports,   [m^; x^] = SF(f, m(f))
      QSA  supports are refined with their class text, queries with a prompt generated for them
             p_gen = MLP( mean of the texts * mean of f );   L_text = ( d(w, p_gen) + d(p^ true, p^ gen) ) / 2 and
             L_consistency = d( [p^; x^] true, [p^; x^] gen ), of the queries: once with w, once with p_gen
      TFE  at each frame position, class anchors attend to the support videos and a global anchor to the queries
    score = -( 0.5 OTAM(prototype, query) + OTAM(modulated prototype, modulated query) + OTAM(anchor, global anchor) )

It is the ancestor of CLIP-SPM, where QSA, TFE and MIC became SPM, PADM and HSMR; the shared parts are in
`models.clip_prompts`. The released code (github.com/D-XH/CLIP-MEI) takes the mean of the texts of the queries' true
classes. Here it is the mean over the episode's classes, since no label of a query may reach a score. Both are equal if
every class has the same number of queries. All queries enter the anchors: the method is transductive.

Shapes: B episodes, N ways, K shots, Q queries, V videos, T frames, D feature width.
"""

from pydantic import Field, model_validator

from models import register
from models.adapter_aim import AimChoice
from models.base import (
    Episode,
    EpisodeLabels,
    EpisodeOutput,
    ProtocolName,
    cross_entropy,
    texts_of_queries,
)
from models.clip_method import ClipMethodOptions
from models.clip_prompts import (
    AnchorAttention,
    AnchorOptions,
    DistanceOptions,
    MotionOptions,
    MotionPrompt,
    PromptFusion,
    PromptGenerator,
    frames_of,
    prompt_distances,
    raise_if_no_distance,
)
from models.layers import ONE_HEAD, TransformerOptions, layer_rows, released_layer_names
from models.prompt_method import PromptMethod
from models.released import ReleasedNames
from models.text import TemplateSet
from utils.schema import Section


class QsaOptions(Section):
    """Prompts of support videos from their class text, and of queries from all class texts of the episode."""

    ENABLED: bool = Field(True, description="prompts from class text; off: frames refined without a prompt")
    ADDED: float = Field(0.1, ge=0, description="factor on the prompt that is added to the frames (released: 0.1)")
    GENERATOR_HIDDEN: int = Field(2048, ge=1, description="hidden width of the prompt generator")
    GENERATOR_DROPOUT: float = Field(0.05, ge=0, lt=1, description="dropout in the prompt generator")
    TEXT_WEIGHT: float = Field(0.5, ge=0, description="weight of d(w, p_gen) + d(p^ true, p^ gen) (released: 0.5)")
    CONSISTENCY_WEIGHT: float = Field(1.0, ge=0, description="weight of the distance of all tokens (released: 1)")


class ClipMeiOptions(ClipMethodOptions, AimChoice):
    """The `MODEL` section of CLIP-MEI; the defaults are those of the release, except for the fixed weight of MIC."""

    TEXT_TEMPLATES: TemplateSet = Field("photo", description="sentences averaged into a class text")
    MIC: MotionOptions = MotionOptions()
    QSA: QsaOptions = QsaOptions()
    TFE: AnchorOptions = AnchorOptions()
    DISTANCES: DistanceOptions = DistanceOptions()
    TRANSFORMER: TransformerOptions = TransformerOptions()
    CROSS_ENTROPY_WEIGHT: float = Field(1.0, gt=0, description="weight of the cross-entropy, a mean over queries")
    AUXILIARY_WEIGHT: float = Field(0.001, ge=0, description="weight of all auxiliary losses together")

    @model_validator(mode="after")
    def _check_distances(self) -> "ClipMeiOptions":
        raise_if_no_distance(self.DISTANCES, "TFE", self.TFE.ENABLED)
        return self


@register("clipmei")
class ClipMei(PromptMethod):
    """CLIP-MEI with its three modules, each of which can be switched off."""

    Options = ClipMeiOptions
    MODULES = ("MIC", "QSA", "TFE")
    released = ReleasedNames(
        used={
            "mo_alpha1": "MIC.weight",
            "motion_conv1": "MIC.smooth.0",
            "motion_conv2": "MIC.smooth.1",
            "token_tr.mlp.net": "QSA.generator",
            **released_layer_names("context2", "fusion.temporal"),
            **released_layer_names("context1", "TFE.among_samples"),
        },
        unused=("scale",),
        fixed={"MIC.LEARNABLE_WEIGHT": True, **ONE_HEAD},
        rows={"QSA.GENERATOR_HIDDEN": "QSA.generator.0.weight", **layer_rows("fusion.temporal")},
    )

    def __init__(self, options: ClipMeiOptions, image_size: int) -> None:
        super().__init__(options, image_size)
        self.options = options
        width, qsa = self.clip.width, options.QSA
        self.fusion = PromptFusion(width, options.TRANSFORMER, qsa.ADDED, gates=None)
        self.MIC = MotionPrompt(width, options.MIC, weight_shape=(1,)) if options.MIC.ENABLED else None
        self.QSA = PromptGenerator(width, qsa.GENERATOR_HIDDEN, qsa.GENERATOR_DROPOUT) if qsa.ENABLED else None
        self.TFE = AnchorAttention(width, options.TRANSFORMER) if options.TFE.ENABLED else None

    def training_losses(self, episode: Episode, labels: EpisodeLabels, protocol: ProtocolName) -> EpisodeOutput:
        """Computes the cross-entropy and the auxiliary losses.

        L = CROSS_ENTROPY_WEIGHT * CE + AUXILIARY_WEIGHT * (MIC.WEIGHT * L_mot + L_text + L_consistency)

        Args:
            episode: features from `encode`, [B, N, K, T, D] and [B, Q, T, D].
            labels: of the B episodes; only the queries' labels are used.
            protocol: transductive lets TFE see all queries of an episode, inductive one at a time.

        Returns:
            scores float32 [B, Q, N] and the losses cross_entropy, motion, text and consistency.
        """
        support, query, class_text = episode
        prompts = self.generated_prompts(query, class_text)
        query_tokens = self.fusion(query, prompts)
        scores = self.compare(self.precompute_support(support, class_text), frames_of(query_tokens, query), protocol)
        losses = {"cross_entropy": self.options.CROSS_ENTROPY_WEIGHT * cross_entropy(scores, labels.query)}
        auxiliary = self.options.AUXILIARY_WEIGHT
        if self.MIC:
            losses["motion"] = auxiliary * self.MIC.weighted_loss(support, query, self.fusion)
        if self.QSA:
            true_text = texts_of_queries(class_text, labels.query)
            text, consistency = prompt_distances(true_text, prompts, self.fusion(query, true_text), query_tokens)
            losses["text"] = auxiliary * self.options.QSA.TEXT_WEIGHT * text
            losses["consistency"] = auxiliary * self.options.QSA.CONSISTENCY_WEIGHT * consistency
        return EpisodeOutput(scores, losses)
