"""The released heads that `parity.py` compares, one entry each: scores, loss terms and hyper-parameters by name."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.released_fixtures import Fixtures, Head, SmallClip, Terms, encoded
from models.base import EpisodeLabels, EpisodeOutput, FewShotModel


def cross_entropy(scores: Tensor, labels: Tensor) -> float:
    """Returns the mean cross-entropy over the queries."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten()).item()


def losses(fixtures: Fixtures, name: str, batched: bool, **options: object) -> dict[str, float]:
    """Returns our training losses on an episode, or on the batch with its copy, which does not change the means."""
    output, _ = training_output(fixtures, name, batched, **options)
    return {key: value.item() for key, value in output.losses.items()}


def training_output(
    fixtures: Fixtures, name: str, batched: bool, **options: object
) -> tuple[EpisodeOutput, EpisodeLabels]:
    """Returns the output of our method in training for an episode, or for the batch with its copy, and the labels."""
    episode, labels, _ = fixtures.batch(name, "train", batched)
    model = fixtures.build(**options)
    return model.training_losses(encoded(model, episode), labels, "transductive"), labels


def clipspm_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Computes the terms; weights of 0 and 1 separate the parts of queries and supports."""
    query_losses = losses(
        fixtures, name, batched, AUXILIARY_WEIGHT=1.0, HSMR={"LEARNABLE_WEIGHT": True},
        SPM={"TEXT_QUERY_WEIGHT": 0.5, "CONSISTENCY_QUERY_WEIGHT": 1.0},
    )  # fmt: skip
    support_losses = losses(
        fixtures, name, batched, AUXILIARY_WEIGHT=1.0, SPM={"TEXT_QUERY_WEIGHT": 0.0, "CONSISTENCY_QUERY_WEIGHT": 0.0}
    )

    def released(term: str) -> float:
        return fixtures.value(f"{name}.train.{term}")

    _, labels = fixtures.episode(name, "train")
    return {
        "hsmr": (support_losses["motion"], released("hsmr")),
        "cross_entropy": (query_losses["cross_entropy"], cross_entropy(fixtures.scores(name, "train"), labels.query)),
        "weighted_hsmr": (query_losses["motion"], released("dists")),
        "text_q": (2 * query_losses["text"], released("text_q")),
        "text_s": (2 * support_losses["text"], released("text_s")),
        "cons_q": (query_losses["consistency"], released("cons_q")),
        "cons_s": (support_losses["consistency"], released("cons_s")),
    }


def clipfsar_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the cross-entropies of the released logits."""
    ours = losses(fixtures, name, batched, VIDEO_TEXT_WEIGHT=1.0)
    _, labels = fixtures.episode(name, "train")
    return {
        "cross_entropy": (ours["cross_entropy"], cross_entropy(fixtures.scores(name, "train"), labels.query)),
        "video_text": (ours["video_text"], released_video_text(fixtures, name, labels)),
    }


def cpm2c_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns two terms from logits, and the released consistency."""
    ours = losses(fixtures, name, batched, LOSSES={"VIDEO_TEXT": 1.0, "GLOBAL": 1.0, "CONSISTENCY": 1.0})
    _, labels = fixtures.episode(name, "train")

    def released_loss(term: str) -> float:
        return cross_entropy(fixtures.tensor(f"{name}.train.{term}"), labels.query)

    return {
        "cross_entropy": (ours["cross_entropy"], released_loss("logits_local")),
        "global": (ours["global"], released_loss("logits_global")),
        "video_text": (ours["video_text"], released_video_text(fixtures, name, labels)),
        "consistency": (ours["consistency"], fixtures.value(f"{name}.train.target_consist_distance")),
    }


def released_video_text(fixtures: Fixtures, name: str, labels: EpisodeLabels) -> float:
    """Returns the cross-entropy of the released class logits: first the support videos, then the queries."""
    support_labels = fixtures.labels(f"{name}.sl")
    classes = labels.class_ids[0][torch.cat([support_labels, labels.query[0]])]
    return cross_entropy(fixtures.tensor(f"{name}.train.class_logits")[0], classes)


def trx_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Computes the loss from the scores in float64, since in float32 the loss of 1e-5 has only three digits."""
    output, labels = training_output(fixtures, name, batched)
    _, released_labels = fixtures.episode(name, "train")
    released = cross_entropy(fixtures.scores(name, "train").double(), released_labels.query)
    return {"cross_entropy": (cross_entropy(output.scores.double(), labels.query), released)}


def strm_scores(fixtures: Fixtures, name: str, mode: str) -> Tensor:
    """Adds a tenth of the projection's score, as the released code does."""
    logits, projection = (fixtures.tensor(f"{name}.{mode}.{key}") for key in ("logits", "logits_post_pat"))
    return logits + 0.1 * projection


def strm_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the sum of two cross-entropies, which the release sums over the queries."""
    ours = sum(losses(fixtures, name, batched).values())
    return {"loss": (ours, fixtures.value(f"{name}.train.loss_sum") / len(fixtures.labels(f"{name}.ql")))}


TRX = {"temp_set": ("TUPLES",), "trans_linear_out_dim": ("TUPLE_WIDTH",), "pe_scale": ("POSITION_SCALE",)}


def team_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the two cross-entropies."""
    ours = losses(fixtures, name, batched)
    return {
        "positive": (ours["cross_entropy"], fixtures.value(f"{name}.train.L_pos")),
        "negative": (ours["negative_cross_entropy"], fixtures.value(f"{name}.train.L_neg")),
    }


def clipmei_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the auxiliary terms, and their sum with the learned weight of the motion."""
    ours = losses(fixtures, name, batched, AUXILIARY_WEIGHT=1.0)
    unweighted = losses(fixtures, name, batched, AUXILIARY_WEIGHT=1.0, MIC={"LEARNABLE_WEIGHT": False})["motion"]
    _, labels = fixtures.episode(name, "train")
    return {
        "cross_entropy": (ours["cross_entropy"], cross_entropy(fixtures.scores(name, "train"), labels.query)),
        "motion": (unweighted, fixtures.value(f"{name}.train.motion")),
        "text": (ours["text"], fixtures.value(f"{name}.train.text")),
        "consistency": (ours["consistency"], fixtures.value(f"{name}.train.consistency")),
        "sum": (ours["motion"] + ours["text"] + ours["consistency"], fixtures.value(f"{name}.train.dists")),
    }


def set_training_classes(model: FewShotModel, fixtures: Fixtures) -> None:
    """Builds the classifier over the training classes of the fixtures."""
    model.set_training_classes(len(fixtures.texts("train")))


def hyrsm_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the losses, and the output of the released one-shot head on the same episode."""
    every = {"CLASS_WEIGHT": 1.0, "COHERENCE": {"WEIGHT": 1.0}}
    ours = losses(fixtures, name, batched, **every)
    by_video = losses(fixtures, name, batched, **every, SHOT_POOL="distances")
    released = {
        term: (ours[loss], fixtures.value(f"{name}.train.{key}"))
        for term, loss, key in (
            ("cross_entropy", "cross_entropy", "cross_entropy"),
            ("class", "class", "class_cross_entropy"),
            ("coherence", "coherence", "temporal"),
        )
        if f"{name}.train.{key}" in fixtures.arrays
    }
    _, labels = fixtures.episode(name, "train")
    one_shot_loss = cross_entropy(fixtures.tensor(f"{name}.one_shot_head.logits"), labels.query[0])
    released["one_shot_head"] = (by_video["cross_entropy"], one_shot_loss)
    if "coherence" in released:
        temporal = fixtures.value(f"{name}.one_shot_head.temporal")
        released["one_shot_head_coherence"] = (by_video["coherence"], temporal)
    return released


def molo_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the losses, and the reconstruction of the frames with stored statistics and with those of the episode."""
    ours = losses(fixtures, name, batched, CLASS_WEIGHT=1.0, CONTRAST_WEIGHT=1.0)
    keys = {"cross_entropy": "cross_entropy", "class": "class_cross_entropy", "contrast": "contrast"}
    terms: Terms = {term: (ours[term], fixtures.value(f"{name}.train.{key}")) for term, key in keys.items()}
    if batched:  # it has no labels, so a batch of episodes is only more videos
        return terms
    videos, frames = (
        torch.cat([fixtures.tensor(f"{name}.{part}{suffix}") for part in ("support", "query")])
        for suffix in ("", "_frames")
    )
    model = fixtures.build()
    frames = frames.repeat_interleave(56, dim=-1).repeat_interleave(56, dim=-2)
    for training, key in ((False, "loss_recons"), (True, "loss_recons_batch")):
        copied = deepcopy(model).train(training)  # running statistics change in training
        for module in copied.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        _, video_losses = copied.encode_for_training(copied.backbone_features(videos), frames)
        terms[key] = (video_losses["reconstruction"].item(), fixtures.value(f"{name}.train.{key}"))
    return terms


def d2st_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the two cross-entropies."""
    ours = losses(fixtures, name, batched, CLASS_WEIGHT=1.0)
    keys = {"cross_entropy": "cross_entropy", "class": "class_ce"}
    return {term: (ours[term], fixtures.value(f"{name}.train.{key}")) for term, key in keys.items()}


def tsfsar_scores(fixtures: Fixtures, name: str, mode: str) -> Tensor:
    """Returns the logarithm of three weighted probabilities; in training they come from the logits of all classes."""
    if mode == "eval":
        return fixtures.tensor(f"{name}.eval.fused").log()
    classes, queries = fixtures.labels(f"{name}.classes"), len(fixtures.labels(f"{name}.ql"))
    terms = {"fuse_vision": fixtures.tensor(f"{name}.train.score")}
    for exponent, key in (("fuse_clip", "clip_text_logits"), ("fuse_side", "lsn_text_logits")):
        terms[exponent] = fixtures.tensor(f"{name}.train.{key}")[-queries:, classes]
    return torch.stack([fixtures.parameters[key] * term.log_softmax(dim=-1) for key, term in terms.items()]).sum(dim=0)


def tsfsar_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns all loss terms without weights."""
    ours = losses(fixtures, name, batched, LOSSES={"FRAMES": 1.0, "CLASS": 1.0, "SIDE": 1.0, "ADAPTED": 1.0})
    keys = {
        "cross_entropy": "tsdcm",
        "class": "glac_adc_ce",
        "side_text": "lsn_text_ce",
        "adapted_text": "glac_text_ce",
        "divergence": "glac_kl",
    }
    return {term: (ours[term], fixtures.value(f"{name}.train.{key}")) for term, key in keys.items()}


def empnet_scores(fixtures: Fixtures, name: str, mode: str) -> Tensor:
    """Returns the logarithm of the released score, which is our score."""
    return fixtures.tensor(f"{name}.{mode}.total").log()


def empnet_terms(fixtures: Fixtures, name: str, batched: bool) -> Terms:
    """Returns the loss, and the cross-entropies by video and by text that it sums."""
    ours = losses(fixtures, name, batched)
    _, labels = fixtures.episode(name, "train")
    video_labels = torch.cat([fixtures.labels(f"{name}.sl"), labels.query[0]])
    released = {"cross_entropy": 0.0, "video_text": 0.0}
    for level in ("patch", "frame", "token"):
        by_video, by_text = (fixtures.tensor(f"{name}.train.{level}_{key}") for key in ("logits", "class_logits"))
        released["cross_entropy"] += cross_entropy(by_video, labels.query[0])
        released["video_text"] += cross_entropy(by_text, video_labels)
    terms: Terms = {term: (ours[term], value) for term, value in released.items()}
    return terms | {"loss": (sum(ours.values()), fixtures.value(f"{name}.train.loss"))}


PLACES = {"position_A": ("POSITIONS", "DIVISOR"), "position_B": ("POSITIONS", "SCALE")}
HYRSM = PLACES | {"window_size": ("COHERENCE", "WINDOW"), "temporal_balance": ("COHERENCE", "SIGMA")}
HYRSM |= {"balance_coefficient": ("COHERENCE", "BETA")}
CLASSIFIER = {"classification_layer": "classify"}

GATES = {"alpha": "ALPHA", "mid_dim_text": "TEXT_HIDDEN", "mid_dim_vision": "VISION_HIDDEN"}
GATES |= {"negative_slope": "NEGATIVE_SLOPE"}

ALL = (
    Head("clipspm", "logits", clipspm_terms, parameters={name: ("SPM", ours) for name, ours in GATES.items()}),
    Head("clipfsar", "logits", clipfsar_terms),
    Head(
        "cpm2c",
        "logits_local",
        cpm2c_terms,
        parameters={
            **{name: ("GATES", ours) for name, ours in GATES.items()},
            "motion_residual_ratio": ("MOTION_RESIDUAL",),
        },
    ),
    Head("trx", "logits", trx_terms, parameters=TRX),
    Head(
        "strm",
        strm_scores,
        strm_terms,
        parameters={**TRX, "post_pat_weight": ("PROXIMITY_WEIGHT",)},
        hidden={"new_dist_loss_post_pat.0.clsW": "projections.0"},
    ),
    Head("clipmei", "logits", clipmei_terms, options={"MIC": {"LEARNABLE_WEIGHT": True}}),
    Head(
        "team",
        "logits",
        team_terms,
        parameters={
            "agg_num": ("TOKENS",),
            "heads_in_temperature": ("TEMPERATURE_HEADS",),
            "pe_scale": ("POSITION_SCALE",),
        },
    ),
    Head("hyrsm", "logits", hyrsm_terms, HYRSM, hidden=CLASSIFIER, prepare=set_training_classes),
    Head("hyrsmpp", "logits", hyrsm_terms, HYRSM, hidden=CLASSIFIER, method="hyrsm", prepare=set_training_classes),
    Head(
        "d2st",
        "logits",
        d2st_terms,
        parameters={"adapter_scale": ("D2ST", "RATIO")},
        hidden=CLASSIFIER,
        prepare=set_training_classes,
        backbone=lambda fixtures: SmallClip(fixtures.rule),
        from_tower=("adapter.class_token", "adapter.norm.weight", "adapter.norm.bias"),
    ),
    Head(
        "tsfsar",
        tsfsar_scores,
        tsfsar_terms,
        parameters={
            "output_dim": ("SIDE", "WIDTH"),
            "temp_layers": ("SIDE", "TEMPORAL_BLOCKS"),
            "gate_T": ("SIDE", "GATE_TEMPERATURE"),
            "dc_alpha": ("DC_ALPHA",),
            "res_alpha": ("ADAPTER_SHARE",),
            "kd_t": ("TEMPERATURE",),
            "temp_clip": ("ADAPTED_SCALE",),
            "temp_side": ("SIDE_SCALE",),
            "fuse_vision": ("FUSION", "FRAMES"),
            "fuse_clip": ("FUSION", "ADAPTED"),
            "fuse_side": ("FUSION", "SIDE"),
        },
        hidden={"model.Linear": "classify"},
        prepare=set_training_classes,
        backbone=lambda fixtures: SmallClip(fixtures.rule),
    ),
    Head(
        "empnet",
        empnet_scores,
        empnet_terms,
        parameters={
            "heads": ("TRANSFORMER", "HEADS"),
            "dim_head": ("TRANSFORMER", "HEAD_DIM"),
            "mlp": ("TRANSFORMER", "HIDDEN"),
            "topk_patch": ("BEST_PATCHES",),
            "topk_frame": ("BEST_FRAMES",),
        },
        options={"MERGE_BEFORE": True},  # no effect with one shot
        backbone=lambda fixtures: SmallClip(fixtures.rule),
    ),
    Head(
        "molo",
        "logits",
        molo_terms,
        parameters={
            **PLACES,
            "heads": ("TRANSFORMER", "HEADS"),
            "mlp_dim": ("TRANSFORMER", "HIDDEN"),
            "motion_reduction": ("MOTION_REDUCTION",),
            "logit_balance": ("MOTION_WEIGHT",),
        },
        options={"RECONSTRUCTION_WEIGHT": 1.0},
        hidden=CLASSIFIER,
        prepare=set_training_classes,
    ),
)
HEADS = {head.name: head for head in ALL}
