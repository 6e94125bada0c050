"""The training loop, and what varies in it: methods, losses, schedules, weight perturbation and averaging.

Imports d2r_core.attacks and the shared files of d2r_core; architectures are passed in.
"""
