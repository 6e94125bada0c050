"""Results that others have published, to show beside our own: Linf, without extra or generated training data."""

from typing import NamedTuple

_RESNET = "(PreAct)ResNet-18"
_ROBUSTBENCH, _MAIR, _ADR = "RobustBench model_info", "MAIR README", "ADR README"
_LEVELS = 8 / 255
_ABOUT = 0.001  # holds 8/255 and 0.031, which are not the same: each row says which
_IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "tiny_imagenet": 64}


class Result(NamedTuple):
    """As its source gives it, on the whole test split; not measured here."""

    data: str  # the setting prepare.source
    architecture: str
    method: str
    clean: float | None  # accuracy in [0, 1]; None: not given
    autoattack: float  # accuracy in [0, 1] under the standard version
    eps: float
    source: str


_RESULTS = (
    Result("cifar10", "WRN-34-10", "OA-AT", 0.8532, 0.5804, _LEVELS, _ROBUSTBENCH),
    Result("cifar10", "WRN-34-10", "DAJAT", 0.8871, 0.5781, _LEVELS, _ROBUSTBENCH),
    Result("cifar10", "WRN-34-10", "IKL", 0.8531, 0.5709, _LEVELS, _ROBUSTBENCH),
    Result("cifar10", "WRN-34-10", "AWP", 0.8536, 0.5617, _LEVELS, _ROBUSTBENCH),
    Result("cifar10", "WRN-34-10", "TRADES", 0.8492, 0.5308, 0.031, _ROBUSTBENCH),
    Result("cifar10", "WRN-34-10", "LBGAT", 0.8822, 0.5286, 0.031, _ROBUSTBENCH),
    Result("cifar10", _RESNET, "DAJAT", 0.8571, 0.5248, _LEVELS, _ROBUSTBENCH),
    Result("cifar10", _RESNET, "TRADES-AWP", None, 0.5162, _LEVELS, _MAIR),
    Result("cifar10", _RESNET, "OA-AT", 0.8024, 0.5106, _LEVELS, _ROBUSTBENCH),
    Result("cifar10", _RESNET, "TRADES", None, 0.4945, _LEVELS, _MAIR),
    Result("cifar10", _RESNET, "AT", None, 0.4867, _LEVELS, _MAIR),
    Result("cifar100", "WRN-34-10", "IKL", 0.6576, 0.3191, _LEVELS, _ROBUSTBENCH),
    Result("cifar100", "WRN-34-10", "DAJAT", 0.6875, 0.3185, _LEVELS, _ROBUSTBENCH),
    Result("cifar100", "WRN-34-10", "LBGAT", 0.7025, 0.2716, 0.031, _ROBUSTBENCH),
    Result("cifar100", "WRN-34-10", "AWP", 0.6038, 0.2886, _LEVELS, _ROBUSTBENCH),
    Result("cifar100", _RESNET, "DAJAT", 0.6545, 0.2767, _LEVELS, _ROBUSTBENCH),
    Result("cifar100", _RESNET, "OA-AT", 0.6202, 0.2714, _LEVELS, _ROBUSTBENCH),
    Result("cifar100", _RESNET, "Rice", 0.5383, 0.1895, _LEVELS, _ROBUSTBENCH),
    Result("tiny_imagenet", "ResNet-18", "ADR", 0.4819, 0.1947, _LEVELS, _ADR),
    Result("tiny_imagenet", "WRN-34-10", "ADR", 0.5152, 0.2185, _LEVELS, _ADR),
)


def find_published(data: str, image_size: int, norm: str, eps: float) -> list[Result]:
    """The results published on these data at their own size and about this eps, highest AutoAttack figure first."""
    if norm != "Linf" or image_size != _IMAGE_SIZES.get(data) or abs(eps - _LEVELS) >= _ABOUT:
        return []
    results = [result for result in _RESULTS if result.data == data]
    return sorted(results, key=lambda result: -result.autoattack)
