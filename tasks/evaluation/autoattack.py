"""AutoAttack (Croce & Hein 2020): its four attacks by its authors' own classes, made independent of the batch.

The authors' loops carry a batch to its end and draw its randomness from one stream. Here every draw that belongs to an
image comes from that image's own noise, and an image that has fallen is asked about no more. What an image goes through
is otherwise theirs to the letter: the same steps, losses, restarts, targets and queries as `version="standard"`.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from d2r_core.attacks import norms
from d2r_core.attacks.norms import Norm
from d2r_core.attacks.pgd import under_attack
from d2r_core.attacks.run import Attack, Noise
from d2r_core.runtime import at_least_fp32

Level = Literal["quick", "standard"]

_TARGETS = 9  # the best other classes, each a target of APGD-T and FAB-T; all of them where there are fewer
_STEPS = 100
_QUERIES = 5000
_SILENT = logging.Logger("auto-attack", logging.CRITICAL)  # what it warns of is asked by the self-checks


def attacks(level: Level, *, eps: float, norm: Norm, seed: int, classes: int) -> dict[str, Attack]:
    """The attacks of a level in the order of the cascade, under their names.

    With two or three classes the targeted DLR loss is undefined: APGD-T then ascends its numerator alone, and says so
    in its name.

    Args:
        seed: of what Square draws for all images alike: places and colours of its squares.
    """
    targets = min(_TARGETS, classes - 1)
    dlr = classes > 3
    found = {
        "APGD-CE": _by_gradient(_apgd("ce", eps, norm), 1),
        "APGD-T" if dlr else "APGD-T (unscaled)": _by_gradient(_apgd("dlr" if dlr else "unscaled", eps, norm), targets),
    }
    if level == "standard":
        found["FAB-T"] = _by_gradient(_fab(eps, norm), targets, norm=norm, eps=eps)
        found["Square"] = square(eps, norm, seed)
    return found


def passes(name: str, classes: int) -> int:
    """About how many forward passes an image costs that stands to the end; a backward pass counts as one more."""
    targets = min(_TARGETS, classes - 1)
    match name:
        case "APGD-CE":
            return 2 * _STEPS
        case "FAB-T":
            return 3 * _STEPS * targets
        case "Square":
            return _QUERIES
    return 2 * _STEPS * targets


class _Asked(nn.Module):
    """The model as an attack sees it: asked only about the images of its batch that still stand.

    An image's path depends on its own logits alone. One that has fallen gets constant logits that are right: its path
    ends there, at no cost, and what misled the model is kept in `found`.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, *, norm: Norm = "Linf", eps: float = math.inf
    ) -> None:
        """x, y: clean images that the model is right about, and its answer. What lies beyond eps does not count."""
        super().__init__()
        self.model = model
        self.x, self.y, self.logits = x, y, logits
        self.norm, self.eps = norm, eps
        self.found = x.clone()
        self.standing = torch.arange(len(x), device=x.device)
        self.right = F.one_hot(y, logits.shape[1]).to(logits.dtype)

    def forward(self, x_adv: Tensor) -> Tensor:
        if not len(self.standing):
            raise _AllFallenError
        if not x_adv.requires_grad and torch.equal(x_adv, self.x):  # FAB asks for them twice for every target
            return self.logits.clone()
        whole = len(self.standing) == len(self.x)
        asked = x_adv if whole else x_adv[self.standing]
        logits = at_least_fp32(self.model(asked))
        answer = logits if whole else self.right.index_put((self.standing,), logits)
        fell = logits.argmax(1) != self.y[self.standing]
        if fell.any():
            with torch.no_grad():
                fell &= norms.size(asked - self.x[self.standing], self.norm) <= self.eps
                self.found[self.standing[fell]] = asked[fell]
                self.standing = self.standing[~fell]
        return answer


class _AllFallenError(Exception):
    """There is nothing left to attack."""


# What is run on the images that stand, with their noise and the rank of the target (1: the best other class). Returns
# for those that stand to its end images that came close.
_Run = Callable[[_Asked, Tensor, int], Tensor]


def _by_gradient(run: _Run, targets: int, **counts: Any) -> Attack:
    """The targets in turn, each on the images that still stand; `counts` is what _Asked takes for them."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        x = x.contiguous()  # their code takes views of it
        found = x.clone()
        with _attacked(model):
            logits = at_least_fp32(model(x))
            standing = (logits.argmax(1) == y).nonzero().squeeze(1)
            for target in range(1, targets + 1):
                if not len(standing):
                    break
                asked = _Asked(model, x[standing], y[standing], logits[standing], **counts)
                with suppress(_AllFallenError):
                    close = run(asked, noise(target - 1)[standing], target)
                    asked.found[asked.standing] = close[asked.standing]
                found[standing] = asked.found
                standing = standing[asked.standing]
        return found

    return attack


def _apgd(loss: Literal["ce", "dlr", "unscaled"], eps: float, norm: Norm) -> _Run:
    """APGD from a random start on the border of the ball; with all losses but "ce" towards the target."""

    def run(asked: _Asked, noise: Tensor, target: int) -> Tensor:
        kind = {"ce": APGDAttack, "dlr": APGDAttack_targeted, "unscaled": _Unscaled}[loss]
        apgd = kind(asked, n_iter=_STEPS, norm=norm, eps=eps, rho=0.75, device=asked.x.device, logger=_SILENT)
        apgd.init_hyperparam(asked.x)
        apgd.y_target = asked.logits.sort(dim=1)[1][:, -1 - target]
        start = asked.x + eps * norms.unit(noise if norm == "Linf" else norms.normal(noise), norm)
        return apgd.attack_single_run(asked.x, asked.y, x_init=start)[0]

    return run


class _Unscaled(APGDAttack_targeted):  # type: ignore[misc]  # pyautoattack has no types
    """The targeted DLR loss without its scale, which takes four classes."""

    def dlr_loss_targeted(self, logits: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(logits))
        return logits[rows, self.y_target] - logits[rows, y]


def _fab(eps: float, norm: Norm) -> _Run:
    """FAB towards the target. It has no random start, and looks for the nearest image that misleads."""

    def run(asked: _Asked, noise: Tensor, target: int) -> Tensor:
        fab = FABAttack_PT(asked, norm=norm, n_iter=_STEPS, eps=eps, targeted=True, device=asked.x.device)
        fab.target_class = target + 1
        fab.attack_single_run(asked.x, asked.y, is_targeted=True)
        return asked.x  # what it found for those that stand lies outside the ball

    return run


class _Square(SquareAttack):  # type: ignore[misc]  # pyautoattack has no types
    """Square with each image's signs from its own noise; places and colours come from torch's stream, as they do there.

    Nothing else is drawn from that stream, once a query for all images alike: which of them are in the batch, and which
    still stand, changes nothing for the rest.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], noise: Noise, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.noise = noise  # of the images in the batch
        self.draw = self.position = 0  # how far it is used up
        self.drawn = noise(0)
        self.standing = torch.arange(len(self.drawn), device=self.drawn.device)

    def random_choice(self, shape: list[int]) -> Tensor:
        """Signs of that shape: (c, 1, 1) for all images alike, or (images that stand, c, 1, width or 1)."""
        if len(shape) == 3:
            return super().random_choice(shape)
        if shape[3] > 1:  # the stripes that it starts from
            return self.drawn[:, :, :1].sign()
        columns = self.drawn.flatten(2)
        if self.position == columns.shape[2]:
            self.draw, self.position = self.draw + 1, 0
            self.drawn = self.noise(self.draw)
            columns = self.drawn.flatten(2)
        signs = columns[self.standing, :, self.position].sign()[:, :, None, None]
        self.position += 1
        return signs

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        margin, loss = super().margin_and_loss(x, y)
        self.standing = self.standing[margin > 0]  # the loop asks about these alone from now on
        return margin, loss


def square(eps: float, norm: Norm, seed: int, queries: int | None = None) -> Attack:
    """The score-based Square attack (Andriushchenko et al. 2020): no gradient, but 5000 queries, or as many as said."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        x = x.contiguous()  # their code takes views of it
        found = x.clone()
        with _attacked(model):
            standing = (at_least_fp32(model(x)).argmax(1) == y).nonzero().squeeze(1)
            if len(standing):
                torch.manual_seed(seed)
                square = _Square(
                    lambda images: at_least_fp32(model(images)),
                    lambda draw: noise(draw)[standing],
                    norm=norm,
                    n_queries=queries or _QUERIES,
                    eps=eps,
                    resc_schedule=False,
                    device=x.device,
                )
                square.init_hyperparam(x)
                found[standing] = square.attack_single_run(x[standing], y[standing])[1]
        return found

    return attack


@contextmanager
def _attacked(model: nn.Module) -> Iterator[None]:
    """The model under attack; torch's stream, on which the authors' code draws, as before on return."""
    with under_attack(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        yield
