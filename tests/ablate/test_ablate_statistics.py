"""Intervals over seeds, against values worked out by hand or printed in tables."""

import math

import pytest

from fastrm.ablate.statistics import Estimate, estimate, paired_difference, t_quantile


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_t_quantile_is_the_one_of_printed_tables(degrees, printed):
    assert t_quantile(degrees) == pytest.approx(printed, abs=5e-5)


def test_t_quantile_has_its_closed_forms():
    # One degree: Cauchy's tangent. Two: (2p - 1) * sqrt(2 / (1 - (2p - 1)^2)).
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-9)


def test_estimate_is_the_mean_with_its_t_interval():
    found = estimate([0.8, 0.9, 0.7])
    # The standard deviation is 0.1, that of the mean 0.1 / sqrt(3); t of two degrees of freedom.
    assert found.mean == pytest.approx(0.8)
    assert found.half == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3), rel=1e-9)
    assert found.num == 3


def test_one_value_has_no_interval_and_none_is_an_error():
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert not estimate([0.5]).excludes_zero
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_paired_difference_uses_shared_seeds_and_removes_what_a_seed_does_to_both():
    values, reference = {0: 0.5, 1: 0.7, 2: 0.9, 5: 0.1}, {0: 0.4, 1: 0.6, 2: 0.8, 7: 0.0}
    found = paired_difference(values, reference)
    assert found.mean == pytest.approx(0.1) and found.half == pytest.approx(0.0, abs=1e-12) and found.num == 3
    assert found.excludes_zero
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_interval_that_holds_zero_does_not_exclude_it():
    assert not Estimate(0.01, 0.02, 3).excludes_zero
    assert Estimate(-0.03, 0.02, 3).excludes_zero
