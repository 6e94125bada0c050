"""What figures mean: curves over eps and steps, self-checks of the attacks, intervals and tests.

Imports d2r_core.attacks and the shared files of d2r_core; knows nothing of training.
"""
