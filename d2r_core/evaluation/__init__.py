"""The evaluation of a model: figures under attack, curves, and self-checks."""

from d2r_core.evaluation.evaluate_model import ModelEvaluation, evaluate_model

__all__ = ["ModelEvaluation", "evaluate_model"]
