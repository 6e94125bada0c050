"""Attacks, and one of them over a whole split (`run`)."""

from d2r_core.attacks.pgd import PGD, Clean, cw, fgsm, pgd

__all__ = ["PGD", "Clean", "cw", "fgsm", "pgd"]
