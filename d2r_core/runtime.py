"""Seeds and device."""

import torch

from d2r_core.errors import UserError


def device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. Raises UserError for an absent GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device is 'cuda', but PyTorch sees no GPU here. Set it to 'auto' or 'cpu'.")
    return torch.device(name)


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A random generator on `device` that starts at `seed`."""
    return torch.Generator(device).manual_seed(seed)
