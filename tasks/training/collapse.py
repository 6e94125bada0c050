"""A training whose accuracy stays at chance: said once while it runs, and recorded with the weights."""

import math
from collections.abc import Mapping, Sequence

from tasks.training.metrics_log import MetricsLog

EPOCHS = 3  # in a row at chance: the first alone may be slow to begin


class CollapseWatch:
    """The Trainer's logger: passes everything to `log`, and warns once if the training has collapsed.

    Args:
        accuracy: the name of the accuracy on unperturbed validation images. Under attack it may be at chance in a
            training that is well (standard training, or the first epochs of an adversarial one).
        images: of the validation split.
    """

    def __init__(self, log: MetricsLog, accuracy: str, *, images: int, classes: int) -> None:
        self.log, self.accuracy, self.images, self.classes = log, accuracy, images, classes
        self.warned = False

    def log_epoch(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.log.log_epoch(metrics, epoch)
        if not self.warned and self.collapsed():
            self.warned = True
            print(
                f"warning: {self.log.stage}: {self.accuracy} has been at chance (1 in {self.classes}) for the last "
                f"{EPOCHS} epochs. What helps: a lower learning_rate, train.gradient_clip: 1.0, or a pretrained "
                "guidance (pretrain.epochs above 0). The gate does not promote the result.",
                flush=True,
            )

    def log_step(self, means: Mapping[str, float], epoch: int, step: int, steps: int) -> None:
        self.log.log_step(means, epoch, step, steps)

    def collapsed(self) -> bool:
        """Whether the last epochs, at least `EPOCHS` of them, are at chance."""
        return is_collapsed([row[self.accuracy] for row in self.log.epochs()], images=self.images, classes=self.classes)


def is_collapsed(accuracies: Sequence[float], *, images: int, classes: int) -> bool:
    """Whether the last `EPOCHS` accuracies are all within two standard deviations of guessing, or below.

    Args:
        accuracies: of each epoch so far, 0 to 1, on `images` images.
    """
    chance = 1 / classes
    limit = chance + 2 * math.sqrt(chance * (1 - chance) / images)
    return len(accuracies) >= EPOCHS and max(accuracies[-EPOCHS:]) <= limit
