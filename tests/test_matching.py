"""OTAM equals the recursion written out cell by cell, the published numbers, and stays finite."""

from typing import get_args

import pytest
import torch

from models.matching import (
    Matcher,
    bi_mhm,
    cosine_distances,
    distance_matrices,
    mean_distances,
    otam,
    sequence_distances,
    video_distances,
)
from tests.helpers.commands import in_process
from tests.helpers.literal_distances import (
    literal_bi_mhm,
    literal_cosine_distances,
    literal_distance_correlation,
    literal_otam,
)

EXAMPLE = torch.tensor([[0.1, 0.9, 0.8], [0.7, 0.2, 0.9], [0.6, 0.8, 0.3]])
STEPS = torch.arange(12).reshape(3, 4) / 12


@pytest.mark.parametrize(
    ("distances", "smoothing", "forward", "backward"),
    [
        (EXAMPLE, 0.1, 0.598914, 0.598507),
        (EXAMPLE, 0.5, -0.073661, -0.052585),
        (EXAMPLE, 0.01, 0.600000, 0.600000),
        (STEPS, 0.1, 0.427050, 0.854354),
        (STEPS, 0.5, -0.272649, -0.586775),
        (torch.tensor([[0.37]]), 0.5, 0.37, 0.37),
        (torch.zeros(8, 8), 0.1, -0.84, -0.84),
        (torch.zeros(8, 8), 0.5, -4.22, -4.22),
    ],
)
def test_otam_equals_the_released_function(distances, smoothing, forward, backward):
    tolerance = 5e-3 if not distances.any() else 2e-6  # the zero rows are published with two decimals
    assert otam(distances, smoothing, both_directions=False).item() == pytest.approx(forward, abs=tolerance)
    assert otam(distances.T, smoothing, both_directions=False).item() == pytest.approx(backward, abs=tolerance)
    assert otam(distances, smoothing).item() == pytest.approx(forward + backward, abs=2 * tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (8, 8), (3, 7), (16, 16)])
@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.5, 2.0])
def test_otam_equals_the_literal_recursion(shape, smoothing):
    distances = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)) * 2
    expected = [literal_otam(matrix, smoothing) for matrix in distances]
    assert otam(distances, smoothing, both_directions=False).tolist() == pytest.approx(expected, abs=2e-5)
    precise = otam(distances.double(), smoothing, both_directions=False)
    assert precise.dtype == torch.float64
    assert precise.tolist() == pytest.approx(expected, abs=1e-12)


def test_an_empty_batch_has_no_costs():
    distances = torch.zeros(0, 3, 8, 8, requires_grad=True)
    costs = otam(distances, 0.1)
    costs.sum().backward()
    assert (costs.shape, distances.grad.shape) == ((0, 3), (0, 3, 8, 8))


@pytest.mark.parametrize("distance", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.01, 0.1])
def test_gradients_stay_finite_where_exponentials_would_vanish(distance, smoothing):
    distances = torch.full((16, 16), distance, requires_grad=True)
    value = otam(distances, smoothing, both_directions=False)
    value.backward()
    assert value.isfinite()
    assert distances.grad.isfinite().all()
    # Every soft path crosses each column once; only in the first can it visit several rows.
    torch.testing.assert_close(distances.grad.sum(dim=0)[1:], torch.ones(15), rtol=1e-4, atol=0)


def test_overflow_cases_of_the_released_form_are_exact():
    assert otam(torch.full((8, 8), 2.0), 0.1, both_directions=False).item() == pytest.approx(15.2508, abs=1e-3)
    assert otam(torch.full((16, 16), 1.0), 0.1, both_directions=False).item() == pytest.approx(14.6202, abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (5, 5), (3, 6)])
@pytest.mark.parametrize("smoothing", [0.02, 0.3])
@pytest.mark.parametrize("both_directions", [True, False])
def test_the_gradient_equals_finite_differences(shape, smoothing, both_directions):
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: otam(d, smoothing, both_directions), distances)


def test_a_second_derivative_is_refused():
    distances = torch.rand(3, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(otam(distances, 0.1), distances, create_graph=True)


@pytest.mark.parametrize("both_directions", [True, False])
def test_the_gradient_of_100000_matrices_has_bounded_memory(both_directions):
    distances = torch.rand(100_000, 8, 8).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        otam(distances, 0.1, both_directions)
    table, result = 2 if both_directions else 1, 1 / 32
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) <= (table + 2 * result) * distances.nbytes


def test_the_gradient_can_be_computed_twice():
    distances = torch.rand(4, 5, 5).requires_grad_()
    costs = otam(distances, 0.1).sum()
    first, second = (torch.autograd.grad(costs, distances, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_otam_prefers_the_same_order_to_the_reverse():
    frames = torch.eye(8)
    same = otam(cosine_distances(frames, frames), 0.1)
    reversed_order = otam(cosine_distances(frames, frames.flip(0)), 0.1)
    assert same < reversed_order - 5


def test_cosine_distances_equal_the_formula_frame_by_frame():
    generator = torch.Generator().manual_seed(0)
    query, prototypes = (
        torch.randn(2, 3, 4, 6, generator=generator),
        torch.randn(2, 5, 7, 6, generator=generator),
    )
    distances = video_distances(query, prototypes)
    assert distances.shape == (2, 3, 5, 4, 7)
    x, y = query[1, 2, 3], prototypes[1, 4, 6]
    expected = 1 - (x @ y) / (x.norm() * y.norm() + 0.01)
    torch.testing.assert_close(distances[1, 2, 4, 3, 6], expected)


# The other distances and their selection


def random_videos(batch: int = 2, queries: int = 3, ways: int = 4, frames: int = 5, support_frames: int = 7):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, queries, frames, 6, generator=generator),
        torch.randn(batch, ways, support_frames, 6, generator=generator),
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (8, 8), (3, 7)])
def test_bi_mhm_equals_the_literal_search(shape):
    distances = torch.rand(4, 2, *shape, generator=torch.Generator().manual_seed(0))
    found = bi_mhm(distances)
    assert found.shape == (4, 2)
    expected = [literal_bi_mhm(matrix) for matrix in distances.flatten(0, 1)]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_bi_mhm_equals_an_example_worked_by_hand():
    assert bi_mhm(EXAMPLE).item() == pytest.approx((0.1 + 0.2 + 0.3) + (0.1 + 0.2 + 0.3))
    assert bi_mhm(STEPS).item() == pytest.approx((0 + 4 + 8) / 12 + (0 + 1 + 2 + 3) / 12)


def test_mean_distances_equal_cosine_distances_of_the_averages():
    query, prototypes = random_videos()
    found = mean_distances(query, prototypes)
    assert found.shape == (2, 3, 4)
    for b, q, n in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        x, y = sum(query[b, q].double()) / 5, sum(prototypes[b, n].double()) / 7
        assert found[b, q, n].item() == pytest.approx(literal_cosine_distances(x[None], y[None]).item(), abs=1e-5)


@pytest.mark.parametrize(("smoothing", "both_directions"), [(0.1, True), (0.5, False)])
@pytest.mark.parametrize("matcher", get_args(Matcher))
def test_each_matcher_returns_distances_of_every_query_and_class(matcher, smoothing, both_directions):
    query, prototypes = random_videos()
    found = sequence_distances(query, prototypes, matcher, smoothing, both_directions)
    assert (found.shape, found.dtype) == ((2, 3, 4), torch.float32)
    for b, q, n in [(0, 0, 0), (1, 2, 3), (1, 0, 1)]:
        distances = literal_cosine_distances(query[b, q], prototypes[b, n])
        expected = {
            "otam": literal_otam(distances, smoothing) + both_directions * literal_otam(distances.T, smoothing),
            "bi-mhm": literal_bi_mhm(distances),
            "mean": mean_distances(query, prototypes)[b, q, n].item(),
        }
        assert found[b, q, n].item() == pytest.approx(expected[matcher], abs=2e-5)


@pytest.mark.parametrize("matcher", get_args(Matcher))
def test_every_matcher_is_symmetric(matcher):
    query, prototypes = random_videos()
    there, back = sequence_distances(query, prototypes, matcher), sequence_distances(prototypes, query, matcher)
    torch.testing.assert_close(there, back.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("matcher", "sees_order"), [("otam", True), ("bi-mhm", False), ("mean", False)])
def test_only_otam_depends_on_the_order_of_the_frames(matcher, sees_order):
    query, prototypes = random_videos()
    shuffled = query[:, :, [3, 0, 4, 2, 1]]
    found, other = (sequence_distances(frames, prototypes, matcher) for frames in (query, shuffled))
    assert torch.allclose(found, other, atol=1e-5) != sees_order


@pytest.mark.parametrize("matcher", get_args(Matcher))
def test_every_matcher_has_finite_gradients_in_half_precision(matcher):
    query, prototypes = (videos.bfloat16().requires_grad_() for videos in random_videos())
    found = sequence_distances(query, prototypes, matcher)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert query.grad.isfinite().all()
    assert query.grad.any()


@pytest.mark.parametrize("matcher", get_args(Matcher))
def test_every_matcher_computes_in_float32_under_autocast(matcher):
    query, prototypes = random_videos()
    with torch.autocast("cpu", torch.bfloat16):
        inside = sequence_distances(query, prototypes, matcher)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sequence_distances(query, prototypes, matcher))


def test_the_default_is_the_otam_of_the_clip_methods():
    query, prototypes = random_videos()
    expected = otam(video_distances(query, prototypes), smoothing=0.5)
    torch.testing.assert_close(sequence_distances(query, prototypes), expected)


def test_both_sides_of_the_benchmark_agree():
    finished = in_process("benchmarks/matching.py", "--device", "cpu", "--repeats", "1", "--matrices", "10")
    assert finished.returncode == 0, finished.stderr
    assert "CLIP-SPM" in finished.stdout


@pytest.mark.parametrize("power", [0.5, 0.4])
def test_distance_correlation_is_the_cosine_of_distance_matrices(power):
    tokens = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))  # videos, frames, positions, channels
    v = distance_matrices(tokens, power)
    assert v.shape == (2, 3, 15)
    found = 1 - cosine_distances(v[0], v[1], epsilon=0.0)
    for t in range(3):
        for s in range(3):
            expected = literal_distance_correlation(tokens[0, t], tokens[1, s], power)
            assert found[t, s].item() == pytest.approx(expected, abs=1e-4)


def test_distance_matrices_of_equal_channels_have_finite_gradients():
    tokens = torch.ones(2, 4, 3, requires_grad=True)
    distance_matrices(tokens, 0.4).square().sum().backward()
    assert tokens.grad.isfinite().all()
