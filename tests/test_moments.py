"""Cells of a video, their moments with matrix square roots, and optimal transport equal their literal forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.moments import cells, normalised_square_root, second_moment, sinkhorn, upper_triangle, windows
from tests.helpers.a2m2 import literal_bounds, literal_moment, literal_sinkhorn, random_tensor


def random_masses(*shape: int, seed: int = 0) -> Tensor:
    return random_tensor(*shape, seed=seed).softmax(dim=-1)


def random_moments(count: int, size: int) -> Tensor:
    features = random_tensor(count, 4 * size, size)
    return features.mT @ features / (4 * size)


# Cells


def test_windows_of_eight_frames_equal_the_documented_ones():
    assert windows(8, 1) == [slice(0, 8)]
    assert windows(8, 4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert windows(8, 8) == [slice(t, t + 1) for t in range(8)]


@pytest.mark.parametrize(("length", "parts"), [(7, 2), (5, 3), (16, 8), (3, 8), (1, 4), (11, 4)])
def test_windows_cover_the_axis_and_are_equally_long(length, parts):
    found = [range(length)[window] for window in windows(length, parts)]
    assert found == literal_bounds(length, parts)
    assert set().union(*found) == set(range(length))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_each_time_window_is_combined_with_each_region():
    found = cells((8, 4, 4), [1, 2, 4, 8], [1, 2])
    assert len(found) == len({str(cell) for _, cell in found}) == (1 + 2 + 4 + 8) * (1 + 4)
    assert (5, (slice(4, 6), slice(0, 2), slice(2, 4))) in found  # the third of four windows of time, and four regions
    assert [number for number, _ in found] == sorted(number for number, _ in found)
    assert {number for number, _ in found} == set(range(4 * 2))


@pytest.mark.parametrize(("shape", "count"), [((1, 4, 4), 5), ((8, 1, 1), 15), ((1, 1, 1), 1), ((3, 2, 1), 6 * 3)])
def test_scales_finer_than_the_map_are_used_once(shape, count):
    assert len(cells(shape, [1, 2, 4, 8], [1, 2])) == count


# Moments and their roots


def test_the_covariance_equals_numpys():
    features = random_tensor(2, 9, 4) + 3
    found = second_moment(features, centred=True)
    for video, expected in zip(features, found, strict=True):
        np.testing.assert_allclose(np.cov(video.T, bias=True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_a_moment_equals_its_literal_sum(centred):
    features = random_tensor(2, 7, 3) + 1
    for video, found in zip(features, second_moment(features, centred), strict=True):
        np.testing.assert_allclose(literal_moment(list(video.double().numpy()), centred), found, rtol=1e-4, atol=1e-5)


def test_moments_ignore_order_and_covariances_ignore_the_mean():
    features = random_tensor(1, 6, 3)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for centred in (True, False):
        torch.testing.assert_close(second_moment(features[:, order], centred), second_moment(features, centred))
    torch.testing.assert_close(second_moment(features + 5, True), second_moment(features, True), rtol=1e-4, atol=1e-4)


def test_newton_schulz_converges_to_the_matrix_square_root():
    matrices = random_moments(3, 5)
    normalised = matrices / matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]
    values, vectors = torch.linalg.eigh(normalised.double())
    expected = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    errors = [(normalised_square_root(matrices, count) - expected).abs().max().item() for count in (1, 3, 5, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    torch.testing.assert_close(normalised_square_root(matrices, 15).flatten(1).norm(dim=1), torch.ones(3))


def test_the_root_does_not_depend_on_feature_scale():
    matrices = random_moments(2, 4)
    torch.testing.assert_close(normalised_square_root(100 * matrices, 3), normalised_square_root(matrices, 3))


def test_the_upper_triangle_is_read_row_by_row():
    matrix = torch.arange(9.0).view(3, 3)
    assert upper_triangle(matrix).tolist() == [0, 1, 2, 4, 5, 8]


# Optimal transport


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_the_plan_has_the_given_marginals(epsilon):
    cost, rows, columns = random_tensor(2, 4, 6).sigmoid(), random_masses(2, 4), random_masses(2, 6, seed=1)
    plan = sinkhorn(cost, rows.log(), columns.log(), epsilon, 2000)
    torch.testing.assert_close(plan.sum(dim=-1), rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.sum(dim=-2), columns, rtol=1e-4, atol=1e-5)


def test_the_plan_equals_scaling_without_logarithms():
    cost, rows, columns = random_tensor(4, 6).sigmoid(), random_masses(4), random_masses(6, seed=1)
    for iterations in (1, 7, 50):
        expected = literal_sinkhorn(*(x.double().numpy() for x in (cost, rows, columns)), 0.1, iterations)
        found = sinkhorn(cost, rows.log(), columns.log(), 0.1, iterations)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_large_epsilons_ignore_the_cost_and_small_ones_find_the_matching():
    rows, columns = random_masses(3), random_masses(3, seed=1)
    plan = sinkhorn(random_tensor(3, 3), rows.log(), columns.log(), 1e4, 5)
    torch.testing.assert_close(plan, rows[:, None] * columns, rtol=1e-3, atol=1e-4)

    permutation = torch.eye(3)[[2, 0, 1]]
    uniform = torch.full((3,), 1 / 3).log()
    plan = sinkhorn(1 - permutation, uniform, uniform, 1e-3, 5)  # exp(-1 / epsilon) is zero in float32
    torch.testing.assert_close(plan, permutation / 3)
