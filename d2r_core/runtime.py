"""Seeds, device, precision and compilation."""

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from d2r_core.errors import UserError

Precision = Literal["fp32", "tf32", "bf16"]
Compile = Literal["auto", "on", "off"]


def device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, else the CPU. Raises UserError for an absent GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is 'cuda', but PyTorch sees no GPU here. Set it to 'auto' or 'cpu'.")
    return torch.device(name)


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A random generator on `device` that starts at `seed`."""
    return torch.Generator(device).manual_seed(seed)


def derive_seed(*key: int) -> int:
    """A seed for the random stream that `key` names, such as (seed, epoch, step); streams of two keys are unrelated."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def set_precision(precision: Precision) -> None:
    """Allow TF32 in convolutions and matrix products unless `precision` is "fp32"; PyTorch's own default is mixed."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Run the networks' passes in bf16 if `precision` is "bf16"; losses and images stay fp32 (see at_least_fp32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def at_least_fp32(logits: Tensor) -> Tensor:
    """Half-precision logits as fp32; others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def compile_models(method: nn.Module, *, compile: Compile, device: torch.device) -> None:
    """Compile the forward and backward passes of the method's models in place; state dicts keep their names.

    "auto" compiles on a GPU if a C compiler is installed, and warns if none is. On a CPU it stays eager: compilation
    takes minutes, calls the same convolutions, and excludes Winograd's. "on" always compiles.

    Attack, update and validation differ in mode, gradients and frozen parameters, so each is compiled separately.

    Raises:
        UserError: "on" without a C compiler.
    """
    if compile == "off" or (compile == "auto" and device.type == "cpu"):
        return
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        if compile == "on":
            raise UserError("runtime.compile is 'on', but there is no C compiler here. Install gcc, or set 'auto'.")
        warnings.warn("no C compiler found: training runs eagerly, and slower", RuntimeWarning, stacklevel=2)
        return
    for model in method.children():
        # Fixed shapes: the smaller last batch of an epoch runs eagerly (Trainer.train_epoch): nothing compiles twice.
        model.compile(dynamic=False)


@contextmanager
def eager(when: bool) -> Iterator[None]:
    """Run compiled models eagerly inside the block if `when`: for batch sizes that are not worth a compilation."""
    if not when:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_compiled(model: nn.Module) -> bool:
    """Whether compile_models has compiled `model`."""
    return model._compiled_call_impl is not None
