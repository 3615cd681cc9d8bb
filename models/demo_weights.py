"""The trained weights of the tiny CLIP, `MODEL.CLIP_WEIGHTS: demo`: `tiny_clip.safetensors` beside this file.

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

DEMO_WEIGHTS = Path(__file__).with_name("tiny_clip.safetensors")
DEMO_BACKBONE, DEMO_IMAGE_SIZE = "tiny", 64  # pixels
# Most of the vocabulary does not occur in captions. The file contains only the rows of the tokens seen in training, and
# their ids; the other rows keep the random values of `tiny_clip`.
ALL_ROWS, ROWS, TOKENS = "token_embedding.weight", "token_embedding.rows", "token_embedding.tokens"


def demo_clip(backbone: str, image_size: int, path: Path = DEMO_WEIGHTS) -> nn.Module:
    """Loads a small CLIP with the trained weights of a file.

    Raises:
        UserError: the weights were trained with another backbone or image size.
    """
    if (backbone, image_size) != (DEMO_BACKBONE, DEMO_IMAGE_SIZE):
        raise UserError(
            f"MODEL.CLIP_WEIGHTS demo is for MODEL.BACKBONE {DEMO_BACKBONE} and DATA.IMG_SIZE {DEMO_IMAGE_SIZE}, found "
            f"{backbone} and {image_size}: change these, or set MODEL.CLIP_WEIGHTS to random"
        )
    clip = untrained_clip()
    weights = safetensors.torch.load_file(path)
    table = clip.state_dict()[ALL_ROWS].clone()
    table[weights.pop(TOKENS).long()] = weights.pop(ROWS).to(table.dtype)
    clip.load_state_dict({**weights, ALL_ROWS: table})
    return clip


def untrained_clip() -> nn.Module:
    """Builds the towers before `run/pretrain_demo.py` trains them, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_clip(DEMO_BACKBONE, DEMO_IMAGE_SIZE, quick_gelu=False)


def save_demo_weights(clip: nn.Module, tokens: Tensor, path: Path, note: Mapping[str, str]) -> None:
    """Writes weights for `demo_clip`.

    Args:
        clip: the trained towers.
        tokens: int64, the ids of the tokens that training saw.
        path: the file.
        note: description of the training; `safetensors.safe_open(path).metadata()` reads it.
    """
    weights = {name: _halved(value.contiguous()) for name, value in clip.state_dict().items()}
    weights[ROWS], weights[TOKENS] = weights.pop(ALL_ROWS)[tokens], tokens.int()
    write_atomically(path, safetensors.torch.save(weights, dict(note)))


def _halved(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value
