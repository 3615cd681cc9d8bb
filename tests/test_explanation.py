"""The numbers of an explanation are those that its sentences promise."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.methods import build, random_episode


@pytest.mark.parametrize("name", ["clipfsar", "clipspm"])
def test_text_measures_are_cosines(name):
    model = build(name).eval()
    support, query, class_text = random_episode(model)
    with torch.no_grad():
        measures = model.explain(support, query, class_text).measures
        videos = query.mean(dim=2) if name == "clipfsar" else model.generated_prompts(query, class_text)
        expected = F.cosine_similarity(videos[:, :, None], class_text[:, None], dim=-1)
    (measure,) = (measure for title, measure in measures.items() if title.endswith("class texts"))
    torch.testing.assert_close(measure.values[:, :, 0], expected, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("name", ["tsfsar", "team", "empnet"])
def test_the_terms_of_a_score_give_the_score(name):
    model = build(name).eval()
    episode = random_episode(model)
    with torch.no_grad():
        measures, scores = model.explain(*episode).measures, model.score(*episode)
    if name == "team":
        found = -sum(measures[f"{sign} distance"].values[:, :, 0] for sign in ("positive", "negative"))
        torch.testing.assert_close(measures["attention"].values.sum(dim=-1), torch.ones(1, 3, 1))  # shares of frames
    else:
        terms = measures["terms"].values
        found = terms.sum(dim=-1) if name == "tsfsar" else terms.mean(dim=-1).log()
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)


def test_the_candidates_of_a_scale_weigh_1_on_average():
    model = build("a2m2").eval()
    with torch.no_grad():
        measures = model.explain(*random_episode(model)).measures
    candidates = measures["candidates"]
    for scale in dict.fromkeys(candidates.parts):
        own = candidates.values[..., [part == scale for part in candidates.parts]]
        torch.testing.assert_close(own.mean(dim=-1), torch.ones(own.shape[:-1]))
        assert own.shape[-1] == 1 or own.std() > 0
    torch.testing.assert_close(measures["scales"].values.sum(dim=-1), torch.ones(own.shape[:-1]))


@torch.no_grad()
def test_the_scales_are_named_by_their_windows_and_regions():
    model = build("a2m2", TEMPORAL_SCALES=[1, 2], SPATIAL_SCALES=[1, 2]).eval()
    videos = model.encode(torch.rand(3, 4, 3, 32, 32))
    measures = model.explain(videos[:2].unflatten(0, (1, 2, 1)), videos[None, 2:], model.class_text(["a", "b"])[None])
    parts = measures.measures["scales"].parts, tuple(dict.fromkeys(measures.measures["candidates"].parts))
    assert parts == (("1x1", "1x4", "2x1", "2x4"),) * 2


@torch.no_grad()
def test_gates_are_those_of_the_prompt_and_of_each_frame():
    model = build("clipspm").eval()
    support, query, class_text = random_episode(model, frames=3)
    gates = model.explain(support, query, class_text).measures["gates"]
    prompts = model.generated_prompts(query, class_text)
    opened = [model.fusion.prompt_gate(prompts), *(model.fusion.frame_gate(query[:, :, t]) for t in range(3))]
    assert gates.parts == ("prompt", "frame 1", "frame 2", "frame 3")
    torch.testing.assert_close(gates.values[:, :, 0], torch.stack(opened, dim=-2).mean(dim=-1))
