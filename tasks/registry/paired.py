"""Two models' answers to the same images under the same attacks: for the gate and for the report."""

import pandas as pd
import torch
from torch import Tensor

from d2r_core.evaluation.statistics import paired_bootstrap
from tasks.evaluation.report_schema import AttackComparison


def pair(challenger: pd.DataFrame, champion: pd.DataFrame, test_images: int) -> dict[str, pd.DataFrame]:
    """For each attack, the images on which both targets were attacked: bool columns `challenger` and `champion`.

    "worst" are the images that withstand every attack that ran on all `test_images`.
    """
    sides = [
        examples.loc[examples["model"] == "target", ["attack", "index", "correct"]].set_index(["attack", "index"])
        for examples in (challenger, champion)
    ]
    both = pd.concat(sides, axis=1, keys=["challenger", "champion"], join="inner").droplevel(1, axis=1)
    pairs = {str(attack): rows.droplevel("attack") for attack, rows in both.groupby("attack", sort=False)}
    on_all = pd.concat([rows for rows in pairs.values() if len(rows) == test_images])
    return {**pairs, "worst": on_all.groupby("index").all()}


def compare_attack(name: str, pairs: pd.DataFrame, seed: int) -> AttackComparison:
    """The figures of one attack, out of the rows that `pair` makes."""
    challenger, champion = tensors(pairs)
    images = len(pairs)
    only_challenger, only_champion = int((challenger & ~champion).sum()), int((~challenger & champion).sum())
    return AttackComparison(
        name=name,
        images=images,
        challenger=int(challenger.sum()) / images,
        champion=int(champion.sum()) / images,
        difference=(only_challenger - only_champion) / images,
        interval=paired_bootstrap(challenger, champion, seed=seed),
        only_challenger=only_challenger,
        only_champion=only_champion,
    )


def tensors(pairs: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """The challenger's and the champion's answers, bool (N,)."""
    challenger, champion = (torch.from_numpy(pairs[side].to_numpy(copy=True)) for side in ("challenger", "champion"))
    return challenger, champion
