"""CLIP, the base model of all CLIP methods: image tower, text tower, weights and tokenizer.

Built on open_clip, which uses the same names of weights as every released checkpoint.
"""

import difflib
import functools
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from models.frame_tower import FrameTower
from models.sentences import ClassSentences
from models.text import mean_features, sentence_features
from models.tiny_clip import TINY_BACKBONES, TINY_FEATURES, TINY_MAP_FEATURES, TinyImageTower, demo_clip, tiny_clip
from utils.checkpoint import check_archive
from utils.errors import UserError, reason_of
from utils.files import raise_if_lfs_pointer
from utils.schema import ModelOptions
from utils.weights import load_exactly, raise_if_not_finite, read_weights

# Entries that are not weights: in OpenAI's archives, and in models from older versions of transformers.
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids"}
# Entries whose shape depends on the size of the frames and the length of the texts.
POSITIONS = {"visual.positional_embedding", "positional_embedding", "text.positional_embedding"}
TEMPERATURES = {"logit_scale", "logit_bias"}
NUMPY_SUFFIXES = (".npz", ".npy")  # big_vision's weights, which only open_clip reads
# Names of the weights on the hub, for tags without a file name.
HUB_FILE_NAMES = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
HUB_TIMEOUT = 10.0  # seconds
RESNET_STRIDE = 32  # pixels between two positions of the last map

logger = logging.getLogger(__name__)


class ClipTowers(FrameTower):
    """CLIP's trainable image tower and its text tower, which is frozen and dropped after use.

    Attributes:
        width: D, the length of the feature of a frame or of a class text.
    """

    def __init__(self, options: ModelOptions, image_size: int) -> None:
        """Builds the towers and loads their weights.

        Args:
            options: provides BACKBONE, CLIP_WEIGHTS, QUICK_GELU and the options of `FrameTower`.
            image_size: height and width of the frames in pixels.

        Raises:
            UserError: the backbone is unknown, its weights or tokenizer are missing or unreadable, or the frames are
                too small for it.
        """
        tokenize = _tokenizer(options.BACKBONE)
        clip: Any = _build_clip(options, image_size)
        _check_image_size(clip.visual, options.BACKBONE, image_size)
        clip.requires_grad_(False).eval()
        super().__init__(clip.visual.requires_grad_(True), options)
        self.width = _feature_width(options.BACKBONE)
        self.pixel_mean = getattr(clip.visual, "image_mean", OPENAI_DATASET_MEAN)
        self.pixel_std = getattr(clip.visual, "image_std", OPENAI_DATASET_STD)
        # In a list, not a child module: it is not part of the method's parameters and checkpoints.
        self._text_tower: list[Any] = [clip]
        self._tokenize = tokenize

    def text_projection(self) -> nn.Linear:
        """Returns a layer from the mean of the feature maps to the space of the texts; call it before `drop_pooling`.

        Its weights are those of the linear part of the tower's pooling: an attention pool that attends to all positions
        equally, or the projection of a ViT. The tiny tower has no such layer, so its weights are random.
        """
        visual: Any = self.visual
        if isinstance(visual, ModifiedResNet):
            value, last = visual.attnpool.v_proj, visual.attnpool.c_proj
            weight, bias = last.weight @ value.weight, last.weight @ value.bias + last.bias
        elif isinstance(visual, VisionTransformer) and visual.attn_pool is None:
            weight, bias = visual.proj.T, torch.zeros(self.width)
        else:
            return nn.Linear(TINY_MAP_FEATURES, self.width)
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return layer

    def _drop_pooling(self) -> int:
        """See `FrameTower`."""
        visual: Any = self.visual
        if isinstance(visual, TinyImageTower):
            del visual.project
            return TINY_MAP_FEATURES
        if isinstance(visual, ModifiedResNet):
            width = visual.attnpool.c_proj.in_features
            del visual.attnpool
            return width
        if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
            del visual.proj
            return visual.transformer.width
        raise UserError("MODEL.BACKBONE: this method needs feature maps; only tiny, CLIP's ResNets and ViTs have them")

    def image_maps(self, images: Tensor) -> Tensor:
        """See `FrameTower`."""
        visual: Any = self.visual
        if isinstance(visual, TinyImageTower):
            return visual.convolutions(images)
        # The normalisation comes before a ViT's projection; a ResNet ignores it.
        output = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, intermediates_only=True)
        return output["image_intermediates"][-1]

    def class_text(self, sentences: ClassSentences, prompt_names: Sequence[str]) -> Tensor:
        """Returns the text features of C classes: float32 [C, D] on the towers' device, without gradients."""
        return mean_features(self.sentence_features(sentences, prompt_names), sentences.options.TEXT_NORMALISE)

    def sentence_features(self, sentences: ClassSentences, prompt_names: Sequence[str]) -> list[Tensor]:
        """Returns the text features of the M sentences of each of C classes: float32 [M, D] each; see `class_text`."""
        assert self._text_tower, "the text tower was already removed"
        clip = self._text_tower[0]
        device = next(self.visual.parameters()).device
        clip.to(device)
        return sentence_features(
            lambda batch: clip.encode_text(self._tokenize(batch).to(device)),
            sentences.of(prompt_names),
            sentences.options.TEXT_NORMALISE,
        )

    def text_source(
        self, sentences: ClassSentences, prompt_names: Sequence[str]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Returns everything that `class_text` depends on: the text tower's weights, and plain values."""
        weights = self._text_tower[0].state_dict().items()
        options = sentences.options.model_dump(include={"BACKBONE", "QUICK_GELU", "TEXT_NORMALISE"})
        values = {"sentences": sentences.of(prompt_names), "options": options}
        return [value for name, value in weights if not name.startswith("visual.")], values

    def cut_prompts(self, sentences: ClassSentences, prompt_names: Sequence[str]) -> list[bool]:
        """Returns for each of C classes whether a sentence has more tokens than the text tower reads (77)."""
        limit = self._tokenize.context_length
        classes = sentences.of(prompt_names)
        texts = [sentence for class_sentences in classes for sentence in class_sentences]
        tokens = self._tokenize([*texts, ""], context_length=limit + 1)  # the last token of a text that fits is padding
        is_cut = tokens[:-1, -1] != tokens[-1, -1]
        return [bool(part.any()) for part in is_cut.split([len(class_sentences) for class_sentences in classes])]

    def drop_text_tower(self) -> None:
        """Frees the text tower; `class_text` cannot be called afterwards."""
        self._text_tower.clear()


def _open_clip_name(backbone: str) -> str | None:
    """Returns open_clip's spelling of a backbone (`ViT-B/16` -> `ViT-B-16`), or None for the tiny ones."""
    if backbone in TINY_BACKBONES:
        return None
    name = backbone.replace("/", "-")
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, [*TINY_BACKBONES, *known], n=3)
        hint = f", for example {', '.join(close)}" if close else ""
        raise UserError(
            f"MODEL.BACKBONE: {backbone!r} is neither tiny, tiny-vit nor a model of open_clip {open_clip.__version__}; "
            f"write RN50, ViT-B/16 or another of its names{hint}"
        )
    return name


@functools.cache
def _tokenizer(backbone: str) -> Any:
    """Returns the tokenizer of a backbone: CLIP's, which is part of open_clip, or one from the hub, as for SigLIP."""
    try:
        return open_clip.get_tokenizer(_open_clip_name(backbone) or "ViT-B-16")
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"MODEL.BACKBONE: the tokenizer of {backbone} is not part of open_clip and cannot be loaded "
            f"({reason_of(error)}); install transformers and run once with a network, or choose a model of CLIP such "
            "as ViT-B/16"
        ) from error


def _feature_width(backbone: str) -> int:
    name = _open_clip_name(backbone)
    return TINY_FEATURES if name is None else open_clip.get_model_config(name)["embed_dim"]


def _check_image_size(visual: Any, backbone: str, image_size: int) -> None:
    """Raises UserError if a frame is smaller than a patch of a ViT or the stride of a ResNet."""
    smallest = RESNET_STRIDE if isinstance(visual, ModifiedResNet) else max(getattr(visual, "patch_size", (1,)))
    if image_size < smallest:
        raise UserError(
            f"DATA.IMG_SIZE is {image_size}, but the backbone {backbone} needs frames of {smallest} pixels or more: "
            f"set it to at least {smallest}"
        )


def _build_clip(options: ModelOptions, image_size: int) -> nn.Module:
    if options.CLIP_WEIGHTS == "demo":
        return demo_clip(options.BACKBONE, image_size)
    name = _open_clip_name(options.BACKBONE)
    if name is None:
        if options.CLIP_WEIGHTS != "random":
            raise UserError(
                f"MODEL.CLIP_WEIGHTS is {options.CLIP_WEIGHTS!r}, but {options.BACKBONE} has no such weights: "
                "set MODEL.CLIP_WEIGHTS to random or demo, or choose another MODEL.BACKBONE"
            )
        return tiny_clip(options.BACKBONE, image_size, options.QUICK_GELU)
    if options.CLIP_WEIGHTS == "random":
        device = torch.get_default_device()  # "meta" if only names and shapes matter
        return open_clip.create_model(
            name, device=device, force_image_size=image_size, force_quick_gelu=options.QUICK_GELU
        )
    if options.CLIP_WEIGHTS not in open_clip.list_pretrained_tags_by_model(name):
        return _load_clip(options, name, image_size, _local_file(options, name), {"quick_gelu": options.QUICK_GELU})
    pretrained = open_clip.get_pretrained_cfg(name, options.CLIP_WEIGHTS)
    return _load_clip(options, name, image_size, _download(options, pretrained), pretrained)


def _download(options: ModelOptions, pretrained: dict) -> Path:
    """Returns open_clip's weights, from its cache or the hub."""
    try:
        return _cached(pretrained) or Path(_download_from_hub(pretrained))
    except Exception as error:  # the hub's client raises many types of network errors
        logger.debug("open_clip could not load %s", options.BACKBONE, exc_info=error)
        raise UserError(_download_instructions(options, pretrained)) from error


def _cached(pretrained: dict) -> Path | None:
    """Returns the file of a tag if the hub's cache contains it; does not access the network."""
    page, _, file_name = pretrained.get("hf_hub", "").rpartition("/")
    names = [Path(file_name).with_suffix(".safetensors").name, file_name] if file_name else HUB_FILE_NAMES
    paths = [huggingface_hub.try_to_load_from_cache(page, name) for name in names if page]
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _download_from_hub(pretrained: dict) -> str:
    """Downloads the file of a tag and returns its path.

    A request with a timeout comes first: without a network the hub's client would retry for 46 seconds.
    """
    page = pretrained.get("hf_hub", "").rpartition("/")[0]
    if page:
        huggingface_hub.HfApi().model_info(page, timeout=HUB_TIMEOUT)
    return open_clip.download_pretrained(pretrained)


def _download_instructions(options: ModelOptions, pretrained: dict) -> str:
    source = pretrained.get("url") or f"the hub page {pretrained.get('hf_hub', '').strip('/')}"
    file_name = source.rsplit("/", 1)[-1] if pretrained.get("url") else "open_clip_model.safetensors"
    return (
        f"the weights {options.CLIP_WEIGHTS!r} of {options.BACKBONE} are not in open_clip's cache and could not be "
        f"downloaded; get {file_name} from {source} on a machine with a network, put it anywhere here and set "
        f"MODEL.CLIP_WEIGHTS=/path/to/{file_name}; the demo (MODEL.BACKBONE tiny) needs no weights"
    )


def _local_file(options: ModelOptions, name: str) -> Path:
    """Returns the file of CLIP_WEIGHTS."""
    path = Path(options.CLIP_WEIGHTS).expanduser()
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise UserError(
            f"MODEL.CLIP_WEIGHTS: {options.CLIP_WEIGHTS!r} is neither a file nor a set of weights of "
            f"{options.BACKBONE} ({tags}, or random)"
        )
    return path


def _load_clip(options: ModelOptions, name: str, image_size: int, path: Path, pretrained: dict) -> nn.Module:
    """Loads a model with the weights of a file: OpenAI's TorchScript archive, a state dict, or safetensors.

    Args:
        options: used in messages.
        name: open_clip's spelling of the backbone.
        image_size: height and width of the frames in pixels.
        path: the file.
        pretrained: open_clip's settings for the weights: quick_gelu, mean and std of the pixels.
    """
    create = partial(
        open_clip.create_model,
        name,
        force_image_size=image_size,
        force_quick_gelu=pretrained.get("quick_gelu", False),
        force_preprocess_cfg={key: pretrained[key] for key in ("mean", "std") if key in pretrained},
    )
    raise_if_lfs_pointer(path)
    try:
        check_archive(path)
        model = create(pretrained=str(path)) if path.suffix in NUMPY_SUFFIXES else create()
        weights = model.state_dict() if path.suffix in NUMPY_SUFFIXES else read_weights(path)
        raise_if_not_finite(weights, f"MODEL.CLIP_WEIGHTS: {path}", "copy the file again or use another one")
        load_exactly(model, _open_clip_state(weights, model))
    except UserError:
        raise
    except Exception as error:  # a wrong file can raise many types of errors
        raise UserError(
            f"MODEL.CLIP_WEIGHTS: {path} does not contain weights of {options.BACKBONE} for frames of {image_size} "
            f"pixels ({reason_of(error)}); set MODEL.BACKBONE and DATA.IMG_SIZE to those of the saved model"
        ) from error
    return model


def _open_clip_state(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Converts weights in any of open_clip's formats to the names and shapes of this model.

    Positions are resized to the frames; temperatures become scalars or vectors of one, as in the model.
    """
    state = {key: value for key, value in weights.items() if key not in NOT_WEIGHTS}
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    for key in TEMPERATURES & expected.keys() & state.keys():
        state[key] = state[key].reshape(expected[key].shape)
    if "logit_bias" in expected and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(expected["logit_bias"])
    for key in POSITIONS & state.keys():
        state[key] = state[key].float()  # resizing needs more than half precision
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    return state
