"""What figures mean: a model's evaluation, curves over eps and steps, self-checks of the attacks, intervals and tests.

Imports d2r_core.attacks and the shared files of d2r_core; knows nothing of training.
"""

from d2r_core.evaluation.evaluate_model import ModelEvaluation, evaluate_model

__all__ = ["ModelEvaluation", "evaluate_model"]
