"""AutoAttack (Croce & Hein 2020): its four attacks by its authors' own classes, made independent of the batch.

The authors' loops carry a batch to its end and draw its randomness from one stream. Here every draw that belongs to an
image comes from that image's own noise, and an image that is misclassified is queried no more. What an image goes
through is otherwise theirs to the letter: the same steps, losses, restarts, targets and queries as
`version="standard"`.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from d2r_core.attacks import norms
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import Noise, under_attack
from d2r_core.attacks.run import Attack
from d2r_core.runtime import at_least_fp32

Level = Literal["quick", "standard"]

_TARGETS = 9  # the best other classes, each a target of APGD-T and FAB-T; all of them where there are fewer
_STEPS = 100
_QUERIES = 5000
_SILENT = logging.Logger("auto-attack", logging.CRITICAL)  # the self-checks ask for what it warns of


def attacks(level: Level, *, eps: float, norm: Norm, seed: int, classes: int) -> list[Attack]:
    """The attacks of a level in the order of the cascade.

    With two or three classes the targeted DLR loss is undefined: APGD-T then ascends its numerator alone, and says so
    in its name.

    Args:
        seed: of what Square draws for all images alike: places and colours of its squares.
    """
    targets = min(_TARGETS, classes - 1)
    dlr = classes > 3
    targeted = _apgd("dlr" if dlr else "unscaled", eps, norm)
    quick: list[Attack] = [
        _GradientAttack("APGD-CE", 2 * _STEPS, _apgd("ce", eps, norm), 1),
        _GradientAttack("APGD-T" if dlr else "APGD-T (unscaled)", 2 * _STEPS * targets, targeted, targets),
    ]
    if level == "quick":
        return quick
    fab = _GradientAttack("FAB-T", 3 * _STEPS * targets, _fab(eps, norm), targets, norm=norm, eps=eps)
    return [*quick, fab, Square(eps=eps, norm=norm, seed=seed, queries=_QUERIES)]


class _FilteredModel(nn.Module):
    """The model as an attack sees it: queried about those images of its batch alone that are still robust.

    An image's path depends on its own logits alone. A misclassified one gets constant logits that are right: its path
    ends there, at no cost, and what misled the model stays in `x_adv`.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, *, norm: Norm = "Linf", eps: float = math.inf
    ) -> None:
        """x, y: clean images that the model is right about, and its logits. What lies beyond eps does not count."""
        super().__init__()
        self.model = model
        self.x, self.y, self.logits = x, y, logits
        self.norm, self.eps = norm, eps
        self.x_adv = x.clone()
        self.robust = torch.arange(len(x), device=x.device)
        self.constant = F.one_hot(y, logits.shape[1]).to(logits.dtype)

    def forward(self, x_adv: Tensor) -> Tensor:
        if not len(self.robust):
            raise _AllMisclassifiedError
        if not x_adv.requires_grad and torch.equal(x_adv, self.x):  # FAB asks for them twice for every target
            return self.logits.clone()
        whole = len(self.robust) == len(self.x)
        queried = x_adv if whole else x_adv[self.robust]
        logits = at_least_fp32(self.model(queried))
        output = logits if whole else self.constant.index_put((self.robust,), logits)
        if x_adv.requires_grad and not output.requires_grad:  # a model that autograd cannot follow
            output = output + 0.0 * x_adv.sum()
        misclassified = logits.argmax(1) != self.y[self.robust]
        if misclassified.any():
            with torch.no_grad():
                misclassified &= norms.norm(queried - self.x[self.robust], self.norm) <= self.eps
                self.x_adv[self.robust[misclassified]] = queried[misclassified]
                self.robust = self.robust[~misclassified]
        return output


class _AllMisclassifiedError(Exception):
    """There is nothing left to attack."""


# What is run on the robust images, with their noise and the rank of the target (1: the best other class). Returns for
# those that are robust to its end images that came close.
_Run = Callable[[_FilteredModel, Tensor, int], Tensor]


@dataclass(frozen=True)
class _GradientAttack:
    """The targets in turn, each on the images that are still robust; norm and eps are _FilteredModel's."""

    name: str
    passes: int
    run: _Run
    targets: int
    norm: Norm = "Linf"
    eps: float = math.inf

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        x = x.contiguous()  # their code takes views of it
        x_adv = x.clone()
        with _under_attack(model):
            logits = at_least_fp32(model(x))
            robust = (logits.argmax(1) == y).nonzero().squeeze(1)
            for target in range(1, self.targets + 1):
                if not len(robust):
                    break
                filtered = _FilteredModel(model, x[robust], y[robust], logits[robust], norm=self.norm, eps=self.eps)
                with suppress(_AllMisclassifiedError):
                    close = self.run(filtered, noise(target - 1)[robust], target)
                    filtered.x_adv[filtered.robust] = close[filtered.robust]
                x_adv[robust] = filtered.x_adv
                robust = robust[filtered.robust]
        return x_adv


def _apgd(loss: Literal["ce", "dlr", "unscaled"], eps: float, norm: Norm) -> _Run:
    """APGD from a random start on the border of the ball; with all losses but "ce" towards the target."""

    def run(model: _FilteredModel, noise: Tensor, target: int) -> Tensor:
        kind = {"ce": APGDAttack, "dlr": APGDAttack_targeted, "unscaled": _Unscaled}[loss]
        apgd = kind(model, n_iter=_STEPS, norm=norm, eps=eps, rho=0.75, device=model.x.device, logger=_SILENT)
        apgd.init_hyperparam(model.x)
        apgd.y_target = model.logits.sort(dim=1)[1][:, -1 - target]
        start = model.x + eps * norms.unit(noise if norm == "Linf" else norms.normal(noise), norm)
        return apgd.attack_single_run(model.x, model.y, x_init=start)[0]

    return run


class _Unscaled(APGDAttack_targeted):  # type: ignore[misc]  # pyautoattack has no types
    """The targeted DLR loss without its scale, which takes four classes."""

    def dlr_loss_targeted(self, logits: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(logits))
        return logits[rows, self.y_target] - logits[rows, y]


def _fab(eps: float, norm: Norm) -> _Run:
    """FAB towards the target. It has no random start, and looks for the nearest image that misleads."""

    def run(model: _FilteredModel, noise: Tensor, target: int) -> Tensor:
        fab = FABAttack_PT(model, norm=norm, n_iter=_STEPS, eps=eps, targeted=True, device=model.x.device)
        fab.target_class = target + 1
        fab.attack_single_run(model.x, model.y, is_targeted=True)
        return model.x  # its images of those that are robust lie outside the ball

    return run


class _SquareAttack(SquareAttack):  # type: ignore[misc]  # pyautoattack has no types
    """Square with each image's signs from its own noise; places and colours come from torch's stream, as they do there.

    Nothing else is drawn from that stream, once a query for all images alike: which of them are in the batch, and which
    are still robust, changes nothing for the rest.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], noise: Noise, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.noise = noise  # of the images in the batch
        self.draw = self.position = 0  # how far it is used up
        self.drawn = noise(0)
        self.robust = torch.arange(len(self.drawn), device=self.drawn.device)

    def random_choice(self, shape: list[int]) -> Tensor:
        """Signs of that shape: (c, 1, 1) for all images alike, or (robust images, c, 1, width or 1)."""
        if len(shape) == 3:
            return super().random_choice(shape)
        if shape[3] > 1:  # the stripes that it starts from
            return self.drawn[:, :, :1].sign()
        columns = self.drawn.flatten(2)
        if self.position == columns.shape[2]:
            self.draw, self.position = self.draw + 1, 0
            self.drawn = self.noise(self.draw)
            columns = self.drawn.flatten(2)
        signs = columns[self.robust, :, self.position].sign()[:, :, None, None]
        self.position += 1
        return signs

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        margin, loss = super().margin_and_loss(x, y)
        self.robust = self.robust[margin > 0]  # the loop asks about these alone from now on
        return margin, loss


@dataclass(frozen=True, kw_only=True)
class Square:
    """The score-based Square attack (Andriushchenko et al. 2020): no gradient, but many queries."""

    eps: float
    norm: Norm
    seed: int
    queries: int
    name: str = "Square"

    @property
    def passes(self) -> int:
        return self.queries

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        x = x.contiguous()  # their code takes views of it
        x_adv = x.clone()
        with _under_attack(model):
            robust = (at_least_fp32(model(x)).argmax(1) == y).nonzero().squeeze(1)
            if len(robust):
                torch.manual_seed(self.seed)
                square = _SquareAttack(
                    lambda images: at_least_fp32(model(images)),
                    lambda draw: noise(draw)[robust],
                    norm=self.norm,
                    n_queries=self.queries,
                    eps=self.eps,
                    resc_schedule=False,
                    device=x.device,
                )
                square.init_hyperparam(x)
                x_adv[robust] = square.attack_single_run(x[robust], y[robust])[1]
        return x_adv


@contextmanager
def _under_attack(model: nn.Module) -> Iterator[None]:
    """As under_attack; torch's stream, on which the authors' code draws, is as before on return."""
    with under_attack(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        yield
