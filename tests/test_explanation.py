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
