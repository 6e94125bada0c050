"""How often the champion would change under the former rule and under the gate's, on drawn outcomes of each image.

No training: both models answer each image correctly with a probability of its own, easy for one as for the other. The
figures are printed (`pytest -s`) and in docs/registry.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from d2r_core.evaluation import statistics
from tasks.config.settings import Promote, Settings
from tasks.registry import gate_rules

pytestmark = pytest.mark.slow

SEED, REFRESHES, IMAGES, CLASSES = 0, 200, 359, 10  # as many images as the digits have


class Rates(NamedTuple):
    """Shares of the refreshes in which the challenger became champion."""

    former: float  # robust accuracy >= the champion's
    robust_rule: float  # the rule about robust accuracy alone
    gate: float  # every rule about the champion


def simulate(limits: Promote, gain: float, *, new_data: bool) -> Rates:
    """Refreshes by challengers whose robust accuracy is expected to differ by `gain`."""
    generator = np.random.default_rng(SEED)
    promoted = np.array([_refresh(generator, limits, gain, new_data=new_data) for _ in range(REFRESHES)])
    rates = Rates(*(float(rate) for rate in promoted.mean(axis=0)))
    print(f"gain {gain:+.0%}, {'new' if new_data else 'same'} data: {rates}")
    return rates


def _refresh(
    generator: np.random.Generator, limits: Promote, gain: float, *, new_data: bool
) -> tuple[bool, bool, bool]:
    # 97 % clean, 65 % robust. Two trainings of one recipe differ on 2.6 % of the clean images and 20 % under attack.
    clean, robust = (generator.beta(0.8 * accuracy, 0.8 * (1 - accuracy), IMAGES) for accuracy in (0.97, 0.65))
    champion = _answers(generator, clean, robust)
    # The gain is among the images that are not robust yet; a loss among those that are.
    shifted = robust + gain * ((1 - robust) / 0.35 if gain > 0 else robust / 0.65)
    challenger = _answers(generator, clean, shifted)
    evidence = gate_rules.Evidence(
        pairs={
            attack: pd.DataFrame({"challenger": challenger[attack], "champion": champion[attack]})
            for attack in ("clean", "worst")
        },
        labels=pd.Series(np.arange(IMAGES) % CLASSES),
        new_data=new_data,
        champion="version 1, recorded",
        seed=SEED,
    )
    rules = gate_rules.against_champion(evidence, limits)
    return (
        bool(challenger["worst"].mean() >= champion["worst"].mean()),
        next(rule for rule in rules if rule.name == "robust_accuracy").verdict == "passed",
        all(rule.verdict != "failed" for rule in rules),
    )


def _answers(
    generator: np.random.Generator, clean: npt.NDArray[np.float64], robust: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[np.bool_]]:
    correct = generator.random(IMAGES) < clean
    return {"clean": correct, "worst": generator.random(IMAGES) < robust}


@pytest.fixture
def limits(tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Promote:
    # The bootstraps are nearly all of the time, and a tenth of their resamples decides the same in these refreshes.
    monkeypatch.setattr(statistics, "_RESAMPLES", 1000)
    return tiny_settings(promote={"confidence": 0.95, "margin": 0.02}).promote


def test_equally_good_models_rarely_replace_the_champion(limits: Promote) -> None:
    rates = simulate(limits, 0.0, new_data=False)
    # Three standard errors of 200 draws.
    assert rates.gate <= rates.robust_rule <= 1 - limits.confidence + 3 * (0.05 * 0.95 / REFRESHES) ** 0.5
    assert rates.former > 0.4


def test_a_better_model_is_promoted(limits: Promote) -> None:
    rates = simulate(limits, 0.08, new_data=False)
    assert rates.robust_rule > 0.8
    assert rates.gate > 0.5


def test_on_new_data_no_gain_is_needed_but_a_loss_is_refused(limits: Promote) -> None:
    equal, worse = simulate(limits, 0.0, new_data=True), simulate(limits, -0.08, new_data=True)
    assert 0.1 < equal.robust_rule < 0.6
    assert worse.robust_rule <= 0.02
