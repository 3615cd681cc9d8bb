"""Names of classes and of a method's measures in a report: none is a formula or a path."""

import numpy as np
import pytest
import torch

from models.explanation import Measure
from run.reporting import figures
from run.reporting.model_sections import measures_section
from run.reporting.numbers import ClassAccuracy
from run.reporting.page import write_report
from run.reporting.replayed import ExplainedVideos

pytest.importorskip("matplotlib", reason="pip install -r requirements-report.txt")


def test_dollar_signs_in_names_of_classes_are_not_formulas():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = ["win $^$ 5", "pay $5 or $6"]
    with figures.style():
        figure = figures.class_accuracy([ClassAccuracy(name, 50, 40, 60, 9, 3) for name in names], 20)
        FigureCanvasAgg(figure).draw()
        labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == names
    assert not any(label.get_parse_math() for label in labels)


def test_a_measure_of_a_users_method_may_have_any_name(tmp_path):
    names = ["norm / frame (mean)", "gates"]
    measures = {name: Measure(torch.rand(2, 1, 3), "Meaning.", "frame") for name in names}
    explained = ExplainedVideos(np.zeros((2, 4)), {}, measures)
    with figures.style():
        section = measures_section(explained, np.array([0, 1]), ["a", "b"], np.array([0, 1]))
        page = write_report(tmp_path, "title", "line", [section], []).read_text(encoding="utf-8")
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {
        f"measure_{name}.{kind}" for name in ("norm_frame_mean", "gates") for kind in ("png", "svg", "csv")
    }
    assert 'href="report/measure_norm_frame_mean.png"' in page
