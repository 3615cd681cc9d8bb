"""The registry: methods by name, helpful errors, and methods from outside this repository."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from models import register
from models.backbones import FrameMethod
from models.base import Episode, FewShotModel
from models.clip_method import ClipMethod
from tests.helpers.outside_method import OUTSIDE, OutsideMethod, OutsideOptions
from utils import method_options
from utils.errors import UserError
from utils.schema import ModelOptions


@pytest.fixture
def registry(monkeypatch):
    """Removes from the registry what a test adds."""
    models.available()
    monkeypatch.setattr(models, "_METHODS", dict(models._METHODS))


def test_every_method_is_a_few_shot_model_with_options():
    assert "clipspm" in models.available()
    assert models.available() == sorted(models.available())
    for name in models.available():
        assert issubclass(models.method_class(name), FewShotModel)
        assert issubclass(models.options_of(name), ModelOptions)
        assert models.options_of(name) is models.method_class(name).Options


def test_an_unknown_name_lists_methods_and_suggests_the_nearest():
    with pytest.raises(UserError, match=r"MODEL\.NAME: unknown method 'clipspn'") as refused:
        models.method_class("clipspn")
    assert ", ".join(models.available()) in str(refused.value)
    assert str(refused.value).endswith("did you mean clipspm?")


def test_a_dissimilar_name_gets_no_suggestion():
    with pytest.raises(UserError, match="known are") as refused:
        models.options_of("zzz")
    assert "did you mean" not in str(refused.value)


@pytest.mark.usefixtures("registry")
def test_a_registered_class_is_built_by_name():
    register("another")(OutsideMethod)
    assert "another" in models.available()
    model = models.build(OutsideOptions(NAME="another", SHARPNESS=3.0), 32)
    assert isinstance(model, OutsideMethod)
    assert (model.options.SHARPNESS, model.image_size) == (3.0, 32)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("base", [ClipMethod, FrameMethod])
def test_a_method_without_options_of_its_own_has_those_of_its_base_class(base):
    mine = type("Mine", (base,), {"match": OutsideMethod.match})
    register("mine")(mine)
    model = models.build("mine", image_size=32, BACKBONE="tiny", CLIP_WEIGHTS="random")
    assert model.encode(torch.rand(1, 2, 3, 32, 32)).shape[:2] == (1, 2)


@pytest.mark.usefixtures("registry")
def test_a_second_method_of_the_same_name_is_refused():
    first = models.method_class("clipspm")
    with pytest.raises(ValueError, match="two methods are called 'clipspm'"):
        register("clipspm")(OutsideMethod)
    assert models.method_class("clipspm") is first


@pytest.mark.usefixtures("registry")
def test_a_class_of_the_same_name_in_another_module_is_refused():
    same_name = type("ClipSpm", (OutsideMethod,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"models\.model_clipspm and elsewhere"):
        register("clipspm")(same_name)


@pytest.mark.usefixtures("registry")
def test_reimporting_a_module_replaces_its_class():
    register("another")(OutsideMethod)
    again = type("OutsideMethod", (OutsideMethod,), {"__module__": OutsideMethod.__module__})
    register("another")(again)
    assert models.method_class("another") is again


class TransposedMethod(OutsideMethod):
    """Its scores have classes where queries belong."""

    def match(self, support: Tensor, query: Tensor, class_text: Tensor) -> Tensor:
        return super().match(support, query, class_text).mT


class TransposedTransductiveMethod(TransposedMethod):
    transductive = True


@pytest.mark.parametrize("method", [TransposedMethod, TransposedTransductiveMethod])
@pytest.mark.parametrize("protocol", ["transductive", "inductive"])
def test_scores_of_the_wrong_shape_are_refused(method, protocol):
    model = method(OutsideOptions(NAME="x"), 8)
    episode = Episode(torch.zeros(2, 3, 1, 4, 5), torch.zeros(2, 6, 4, 5), torch.zeros(2, 3, 1))
    with pytest.raises(UserError, match=r"expected \[B, Q, N\], here \[\d+, \d, 3\]") as refused:
        model.score(*episode, protocol)
    assert str(refused.value).startswith(f"{method.__name__}.match returned scores of shape [")


def test_a_method_file_with_an_error_is_reported_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "mistaken_method.py").write_text("def (\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot import 'mistaken_method:X' .*mistaken_method\.py, line 1"):
        models.method_class("mistaken_method:X")


BROKEN = {
    "syntax": ("\ndef (\n", "line 2: SyntaxError"),
    "null bytes": ("x = 1\0\n", "SyntaxError"),
    "missing package": ("import torch\nimport no_such_package\n", "line 2: ModuleNotFoundError"),
    "missing class": ("from models.base import NoSuchClass\n", "line 1: ImportError"),
    "own mistake": ("x = 1\ny = undefined\n", "line 2: NameError"),
    "mistake in a library's function": ("import torch\n\ntorch.zeros(-1)\n", "line 3: RuntimeError"),
    "mistake deep in a library": ("import json\n\njson.loads('{')\n", "line 3: JSONDecodeError"),
    "it ends Python": ("import sys\nsys.exit()\n", "line 2: SystemExit"),
    "a copy under the old name": (
        "from models import register\nfrom models.model_otam import Otam\n\n\n"
        "@register('otam')\nclass Mine(Otam):\n    pass\n",
        "write @register('broken')",
    ),
    "unfinished": (
        "from models import register\nfrom models.base import FewShotModel\n\n\n"
        "@register('broken')\nclass Mine(FewShotModel):\n    pass\n",
        "Mine has no encode, match",
    ),
    "not a method": ("from models import register\n\n\n@register('broken')\nclass Mine:\n    pass\n", "FewShotModel"),
    "other options": (
        "from models import register\nfrom models.model_otam import Otam\n\n\n"
        "@register('broken')\nclass Mine(Otam):\n    Options = dict\n",
        "ModelOptions",
    ),
}


@pytest.fixture(params=BROKEN.values(), ids=BROKEN)
def broken(request, registry, tmp_path, monkeypatch) -> tuple[Path, str]:
    """Writes `model_broken.py` before the other methods; returns the parts of its error that a message must contain."""
    content, because = request.param
    file = add_file("model_broken.py", content, tmp_path, monkeypatch)
    monkeypatch.delitem(sys.modules, "models.model_broken", raising=False)
    return file, because


def add_file(name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adds a file to the package `models` as the tests see it; returns its path."""
    folder = tmp_path / "models"
    folder.mkdir()
    for path in method_options.MODELS.glob("*.py"):
        (folder / path.name).symlink_to(path)
    (folder / name).write_text(content)
    monkeypatch.setattr(models, "__path__", [str(folder), *models.__path__])
    monkeypatch.setattr(method_options, "MODELS", folder)
    return folder / name


def one_line(refused: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_broken_method_is_refused_with_file_and_line(broken):
    file, because = broken
    for use in (models.method_class, models.build):
        with pytest.raises(UserError, match=r"^(models\.build.*)?MODEL\.NAME: ") as refused:
            use("broken")
        assert file.name in one_line(refused)
        assert because in one_line(refused)


def test_a_broken_method_does_not_affect_others(broken):
    otam = models.method_class("otam")
    assert "broken" not in models.available()
    assert {"clipspm", "otam"} <= set(models.available())
    assert models.method_class("otam") is otam
    models.build("zeroshot", 32, BACKBONE="tiny", CLIP_WEIGHTS="random")


@pytest.mark.usefixtures("broken")
def test_a_misspelt_name_is_refused_despite_a_broken_method():
    with pytest.raises(UserError, match=r"did you mean clipspm\?$"):
        models.method_class("clipspn")
    with pytest.raises(UserError, match="HSMR"):  # an unknown key reads the options of all methods
        models.build("zeroshot", 32, HSMR={"ENABLED": True})


@pytest.mark.usefixtures("registry")
def test_a_file_without_a_registered_class_is_refused(tmp_path, monkeypatch):
    add_file("model_empty.py", "class Mine:\n    pass\n", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"models/model_empty\.py .*@register\('empty'\)"):
        models.method_class("empty")


def test_a_missing_module_or_class_is_reported_with_the_fix():
    with pytest.raises(UserError, match="PYTHONPATH"):
        models.method_class("no_such_package.module:Method")
    with pytest.raises(UserError, match=r"named package\.module:Class"):
        models.method_class("my_package.my_module")


def test_an_external_class_is_named_by_import_path():
    assert models.method_class(OUTSIDE).__name__ == "OutsideMethod"
    assert models.options_of(OUTSIDE).model_fields.keys() >= {"SHARPNESS", "BACKBONE"}
    options = models.options_of(OUTSIDE)(NAME=OUTSIDE)
    model = models.build(options, 32)
    features = model.encode(torch.rand(3, 4, 3, 8, 8))
    assert model.match(features[None, :2, None], features[None, 2:], torch.zeros(1, 2, 1)).shape == (1, 1, 2)


@pytest.mark.parametrize(
    ("path", "because"),
    [
        ("no_such_package.module:Method", "no_such_package"),
        ("models.base:NoSuchClass", "NoSuchClass"),
        ("models.base:", "cannot import"),
        (":Method", "cannot import"),
        (".base:FewShotModel", "cannot import"),
        ("models.base:FewShotModel", "has no encode, match"),
        ("models.base:Episode", "not a subclass of models.base.FewShotModel"),
        ("models.base:cross_entropy", "not a subclass of models.base.FewShotModel"),
    ],
)
def test_a_bad_import_path_is_reported_in_one_sentence(path, because):
    with pytest.raises(UserError, match=r"^MODEL\.NAME: ") as refused:
        models.method_class(path)
    assert path in str(refused.value)
    assert because in str(refused.value)
    assert "\n" not in str(refused.value)
