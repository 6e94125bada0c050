"""Intervals and tests of counts, against published values, scipy and repeated draws."""

import numpy as np
import pytest
import torch
from scipy import stats

from d2r_core.evaluation import statistics


@pytest.mark.parametrize(("correct", "images"), [(0, 10), (1, 10), (10, 10), (81, 263), (5248, 10_000), (1, 1)])
def test_wilson_is_scipys(correct: int, images: int) -> None:
    expected = stats.binomtest(correct, images).proportion_ci(method="wilson")
    assert statistics.wilson(correct, images) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_is_newcombes_published_value() -> None:
    """Newcombe 1998, table I: 81 of 263, and 0 of 20."""
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_paired_bootstrap_agrees_with_the_normal_approximation_on_many_images() -> None:
    a, b = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.6], [0.5]])
    difference = a.double() - b.double()
    half = 1.96 * float(difference.std()) / 4000**0.5
    low, high = statistics.paired_bootstrap(a, b, seed=0)
    assert (low, high) == pytest.approx((float(difference.mean()) - half, float(difference.mean()) + half), abs=2e-3)
    assert statistics.paired_bootstrap(a, b, seed=0) == (low, high)
    assert statistics.paired_bootstrap(b, a, seed=1) == pytest.approx((-high, -low), abs=2e-3)


def test_paired_bootstrap_knows_that_the_images_are_the_same() -> None:
    """Two models that agree on all but 4 of 1000 images differ by little, however uncertain either accuracy is."""
    a = torch.arange(1000) < 500
    b = torch.arange(1000) < 496
    low, high = statistics.paired_bootstrap(a, b, seed=0)
    assert -1e-12 <= low < 0.004 < high < 0.01
    assert statistics.paired_bootstrap(a, a, seed=0) == (0.0, 0.0)


def test_intervals_cover_what_they_estimate() -> None:
    """95 of 100 times, give or take: models right on 60 % and 50 % of the images, which they find hard alike."""
    generator = torch.Generator().manual_seed(0)
    wilson = bootstrap = 0
    for seed in range(300):
        hardness = torch.rand(200, generator=generator)
        a, b = hardness < 0.6, (hardness + 0.3 * torch.rand(200, generator=generator)) < 0.65
        low, high = statistics.wilson(int(a.sum()), 200)
        wilson += low <= 0.6 <= high
        low, high = statistics.paired_bootstrap(a, b, seed=seed)
        bootstrap += low - 1e-12 <= 0.1 <= high + 1e-12
    assert 0.92 <= wilson / 300 <= 0.98
    assert 0.91 <= bootstrap / 300 <= 0.98


def test_a_higher_confidence_widens_the_bootstrap_interval() -> None:
    a, b = torch.arange(1000) < 520, (torch.arange(1000) < 470) | (torch.arange(1000) >= 980)
    widths = [
        high - low
        for low, high in (statistics.paired_bootstrap(a, b, seed=0, confidence=level) for level in (0.8, 0.95, 0.99))
    ]
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_the_score_interval_has_its_published_values() -> None:
    """Fagerland, Lydersen, Laake 2014: airway hyper-responsiveness, 1 and 7 of 21 discordant."""
    assert statistics.paired_score_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("only_a", "only_b", "images"), [(0, 0, 20), (20, 0, 20), (30, 12, 359), (3, 200, 10_000)])
def test_the_score_interval_inverts_its_test(only_a: int, only_b: int, images: int) -> None:
    low, high = statistics.paired_score_interval(only_a, only_b, images)
    assert -1 <= low <= (only_a - only_b) / images <= high <= 1
    mirrored = statistics.paired_score_interval(only_b, only_a, images)
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)
    # At a difference of 0 the test is McNemar's without correction.
    z = stats.norm.ppf(0.975)
    significant = abs(only_a - only_b) > z * (only_a + only_b) ** 0.5
    assert (low > 0 or high < 0) == significant
    if only_a + only_b == 0:
        assert high == pytest.approx(z * z / (images + z * z))


def test_equality_of_few_images_shows_no_non_inferiority() -> None:
    assert not statistics.non_inferior(0, 0, 20, margin=0.02, confidence=0.95)
    assert statistics.non_inferior(0, 0, 359, margin=0.02, confidence=0.95)
    assert statistics.non_inferior(100, 100, 10_000, margin=0.02, confidence=0.95)
    assert not statistics.non_inferior(0, 200, 10_000, margin=0.02, confidence=0.95)


def test_a_model_worse_by_the_margin_is_rarely_shown_non_inferior() -> None:
    """At the margin the error is at most about 1 - confidence."""
    draws = np.random.default_rng(0).multinomial(359, [0.09, 0.11, 0.8], size=4000)
    shown = [statistics.non_inferior(int(a), int(b), 359, margin=0.02, confidence=0.95) for a, b, _ in draws]
    assert 0.03 < np.mean(shown) < 0.065


def test_the_worst_class_is_compared_within_classes() -> None:
    labels = torch.arange(1000) % 2
    b = torch.ones(1000, dtype=torch.bool)
    a = b.clone()
    a[labels == 1] = torch.arange(500) < 100  # one class falls to 20 %
    low, high = statistics.worst_class_bootstrap(a, b, labels, seed=0)
    assert low < -0.8 < high
    assert (low, high) == pytest.approx((-0.8 - 0.035, -0.8 + 0.035), abs=3e-3)
    assert statistics.worst_class_bootstrap(a, a, labels, seed=0) == (0.0, 0.0)


@pytest.mark.parametrize(("exceptions", "others"), [(0, 0), (0, 5), (7, 0), (3, 4), (30, 12)])
def test_sign_test_is_scipys(exceptions: int, others: int) -> None:
    images = exceptions + others
    expected = stats.binomtest(exceptions, images, 0.5, alternative="greater").pvalue if images else 1.0
    assert statistics.sign_test(exceptions, others) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("exceptions", "others", "images", "holds"),
    [
        (9, 0, 20, True),  # 1 in 512 by chance
        (10, 0, 20, False),  # 1 in 1024
        (10, 1, 20, True),
        (30, 90, 200, True),  # the stronger one has its own images
        (60, 20, 10_000, True),  # beyond chance, and too few to matter
        (160, 40, 10_000, False),
    ],
)
def test_two_attacks_differ_beyond_chance_and_by_what_matters(
    exceptions: int, others: int, images: int, holds: bool
) -> None:
    image = torch.arange(images)
    first, second = image >= exceptions, (image < exceptions) | (image >= exceptions + others)
    compared = statistics.Comparison.of(first, second)
    assert compared == (exceptions, others, images)
    assert compared.holds() == holds
    assert compared.holds(0.3) == (holds or images > 20)
