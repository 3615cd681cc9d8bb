"""Counts in messages have the right number of their noun."""

from pathlib import Path

import pytest
import torch

from utils.errors import UserError, counted
from utils.weights import differences, raise_if_not_finite


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "video", "0 videos"),
        (1, "video", "1 video"),
        (2, "video", "2 videos"),
        (1, "class", "1 class"),
        (1234, "class", "1,234 classes"),
        (1, "entry", "1 entry"),
        (2, "entry", "2 entries"),
        (2, "query", "2 queries"),
        (2, "key", "2 keys"),
    ],
)
def test_a_count_and_its_noun_agree(number, noun, text):
    assert counted(number, noun) == text


def test_messages_on_a_single_weight_are_in_the_singular():
    with pytest.raises(UserError, match="in 1 of 1 weight, for example in w"):
        raise_if_not_finite({"w": torch.full((1,), float("nan"))}, str(Path("x.pt")), "")
    assert differences({"w": torch.zeros(1)}, {}) == ["1 missing, for example w"]
