"""Attacks on a model: how one perturbs a batch, and how it runs over a whole split, on any number of processes.

Imports only the shared files of d2r_core; knows neither models nor training.
"""

from d2r_core.attacks.pgd import PGD, Clean, cw, fgsm, pgd

__all__ = ["PGD", "Clean", "cw", "fgsm", "pgd"]
