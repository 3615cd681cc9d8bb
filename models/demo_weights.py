"""The trained weights of the small CLIPs, `MODEL.CLIP_WEIGHTS: demo`: the `.safetensors` files beside this file.

They are stored in half precision; `run/pretrain_demo.py` creates them.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from models.tiny_clip import tiny_clip
from utils.errors import UserError
from utils.files import write_atomically

DEMO_WEIGHTS = {
    "tiny": Path(__file__).with_name("tiny_clip.safetensors"),
    "tiny-vit": Path(__file__).with_name("tiny_vit_clip.safetensors"),
}
DEMO_IMAGE_SIZE = 64  # pixels
# Most of the vocabulary does not occur in captions. A file contains only the rows of the tokens that training changed,
# and their ids; the other rows keep the random values of `tiny_clip`.
ALL_ROWS, ROWS, TOKENS = "token_embedding.weight", "token_embedding.rows", "token_embedding.tokens"


def demo_clip(backbone: str, image_size: int, path: Path | None = None) -> nn.Module:
    """Loads a small CLIP with its trained weights, or with those of another file of `save_demo_weights`.

    Raises:
        UserError: there are no trained weights for the backbone, or they were trained with another image size.
    """
    if backbone not in DEMO_WEIGHTS or image_size != DEMO_IMAGE_SIZE:
        raise UserError(
            f"MODEL.CLIP_WEIGHTS demo is for MODEL.BACKBONE {' or '.join(DEMO_WEIGHTS)} and DATA.IMG_SIZE "
            f"{DEMO_IMAGE_SIZE}, found {backbone} and {image_size}: change these, or set MODEL.CLIP_WEIGHTS to random"
        )
    clip = untrained_clip(backbone)
    weights = safetensors.torch.load_file(path or DEMO_WEIGHTS[backbone])
    table = clip.state_dict()[ALL_ROWS].clone()
    table[weights.pop(TOKENS).long()] = weights.pop(ROWS).to(table.dtype)
    clip.load_state_dict({**weights, ALL_ROWS: table})
    return clip


def untrained_clip(backbone: str) -> nn.Module:
    """Builds the towers before `run/pretrain_demo.py` trains them, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_clip(backbone, DEMO_IMAGE_SIZE, quick_gelu=False)


def save_demo_weights(clip: nn.Module, backbone: str, path: Path, note: Mapping[str, str]) -> None:
    """Writes weights for `demo_clip`.

    Args:
        clip: the trained towers.
        backbone: one of DEMO_WEIGHTS.
        path: the file.
        note: description of the training; `safetensors.safe_open(path).metadata()` reads it.
    """
    weights = {name: _halved(value.contiguous()) for name, value in clip.state_dict().items()}
    changed = (clip.state_dict()[ALL_ROWS] != untrained_clip(backbone).state_dict()[ALL_ROWS]).any(dim=1)
    weights[ROWS], weights[TOKENS] = weights.pop(ALL_ROWS)[changed], changed.nonzero().flatten().int()
    write_atomically(path, safetensors.torch.save(weights, dict(note)))


def _halved(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value
