"""How far counted accuracies can be trusted: intervals, and whether one attack fools more images than another."""

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Z = 1.959963984540054  # the normal distribution's 97.5 % point
_RESAMPLES = 10_000
_CHANCE = 1e-3  # two attacks differ where chance alone would make as much of a difference less often than this,
RESOLUTION = 0.01  # and where it concerns more than this share of the images: less changes no figure that matters


def wilson(correct: int, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, 0 to 1 (Wilson 1927): of use at 0 % and 100 % too, and for few images."""
    assert 0 <= correct <= images > 0
    share, spread = correct / images, _Z * _Z / images
    centre = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / images + spread / images / 4)
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    # Exact at the ends, where rounding would leave 1e-17.
    return (0.0 if correct == 0 else low), (1.0 if correct == images else high)


def accuracy_with_interval(correct: Tensor) -> dict[str, Any]:
    """What is recorded of an accuracy: itself, its 95 % interval, and the counts that they rest on; of bool (N,)."""
    right, images = int(correct.sum()), len(correct)
    return {"accuracy": right / images, "interval": list(wilson(right, images)), "correct": right, "images": images}


def accuracy_per_class(correct: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Accuracy among the images of each class, 0 to 1; None for a class without images."""
    members = (correct[labels == label] for label in range(classes))
    return [float(part.double().mean()) if len(part) else None for part in members]


def paired_bootstrap(a: Tensor, b: Tensor, *, seed: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided percentile interval of mean(a) - mean(b), resampling the images (Efron 1979).

    Args:
        a, b: bool (N,), two models' answers (right or not) to the same images. Paired, because an image that is hard
            for one is hard for the other: the interval is narrower than that of two unrelated samples.

    Where no image tells the two apart, the interval is [0, 0] however few the images are.
    """
    assert a.shape == b.shape
    assert len(a) > 0
    difference = a.int() - b.int()
    images = len(difference)
    # A resample of the images is a multinomial draw of how many are won, lost and equal.
    won, lost = int((difference == 1).sum()), int((difference == -1).sum())
    shares = np.array([won, lost, images - won - lost]) / images
    draws = np.random.default_rng(seed).multinomial(images, shares, size=_RESAMPLES)
    return _percentiles((draws[:, 0] - draws[:, 1]) / images, confidence)


def worst_class_bootstrap(
    a: Tensor, b: Tensor, labels: Tensor, *, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The two-sided percentile interval of a's lowest accuracy in any class minus b's, resampling within each class.

    Args:
        a, b: bool (N,), two models' answers (right or not) to the same images.
        labels: (N,). A class without images is left out. The two lowest accuracies may be of different classes.
    """
    assert a.shape == b.shape == labels.shape
    assert len(a) > 0
    generator = np.random.default_rng(seed)
    lowest = np.ones((2, _RESAMPLES))
    for label in labels.unique():
        x, y = a[labels == label], b[labels == label]
        cells = np.array([int((x & y).sum()), int((x & ~y).sum()), int((~x & y).sum()), int((~x & ~y).sum())])
        both, only_a, only_b, _ = generator.multinomial(len(x), cells / len(x), size=_RESAMPLES).T
        lowest = np.minimum(lowest, np.stack([both + only_a, both + only_b]) / len(x))
    return _percentiles(lowest[0] - lowest[1], confidence)


def _percentiles(draws: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_score_interval(only_a: int, only_b: int, images: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided score interval of mean(a) - mean(b) for two models on the same images (Tango 1998).

    Unlike the bootstrap it has a width where no image tells the two apart, so few images cannot show equality.

    Args:
        only_a, only_b: images that only one of the two classifies correctly.
        images: all of them.
    """
    assert 0 <= only_a + only_b <= images > 0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return _score_bound(only_a, only_b, images, z), -_score_bound(only_b, only_a, images, z)


def _score_bound(only_a: int, only_b: int, images: int, z: float) -> float:
    """The smallest difference that the score test does not reject at z: its statistic falls as the difference rises."""
    low, high = -1.0, (only_a - only_b) / images
    for _ in range(60):  # bisection to the resolution of a float
        difference = (low + high) / 2
        # The probability that only b is right, at its most likely under this difference.
        linear = -only_a - only_b + (2 * images - only_a + only_b) * difference
        constant = -only_b * difference * (1 - difference)
        root = math.sqrt(max(0.0, linear * linear - 8 * images * constant))
        probability = (root - linear) / (4 * images)
        variance = images * (2 * probability + difference * (1 - difference))
        if only_a - only_b - images * difference > z * math.sqrt(max(0.0, variance)):
            low = difference
        else:
            high = difference
    return high


def non_inferior(only_a: int, only_b: int, images: int, *, margin: float, confidence: float) -> bool:
    """Whether a is shown to be worse than b by less than `margin`, at the one-sided `confidence` (above 0.5).

    The lower bound of the paired difference (the lower end of the two-sided interval at 2 confidence - 1) exceeds
    -margin.
    """
    low, _ = paired_score_interval(only_a, only_b, images, confidence=2 * confidence - 1)
    return low > -margin


def sign_test(exceptions: int, others: int) -> float:
    """How likely chance alone makes so many exceptions, 0 to 1: the exact one-sided McNemar test (McNemar 1947).

    Args:
        exceptions: images that only the attack fools which should be the weaker one.
        others: images that only the stronger attack fools.

    Returns:
        The probability of `exceptions` or more among these images, were each as likely to be one as the other.
    """
    images = exceptions + others
    return sum(math.comb(images, count) for count in range(exceptions, images + 1)) / 2**images


class Comparison(NamedTuple):
    """Two attacks on the same images; the second is expected to be at least as strong."""

    exceptions: int  # images that only the first fools
    others: int  # images that only the second fools
    images: int

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "Comparison":
        """From the images that are robust to each, bool (N,)."""
        return cls(int((~first & second).sum()), int((first & ~second).sum()), len(first))

    @property
    def chance(self) -> float:
        """The probability of so many exceptions, were both equally strong."""
        return sign_test(self.exceptions, self.others)

    def holds(self, share: float = RESOLUTION) -> bool:
        """Unless the first is stronger beyond chance, and its surplus more than this share of the images."""
        return self.chance >= _CHANCE or self.exceptions - self.others <= share * self.images
