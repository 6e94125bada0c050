"""How the project's pages are written: the templates, and how figures, settings and images are put for people."""

import base64
import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from PIL import Image

from tasks.config.settings import Method

_TEMPLATES = Path(__file__).parent / "templates"
_NOTHING = "—"

Pixels = npt.NDArray[np.uint8]  # (3, H, W)


def render(template: str, context: Mapping[str, Any]) -> str:
    """The text of `templates/<template>`; every value is escaped, and one that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (percent, interval, points, distance, value, name, method, markdown)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(template).render(context)


def script(template: str) -> tuple[Markup, str]:
    """A page's own script, and what its Content-Security-Policy calls it: no other script may run."""
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    return Markup(text), f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def picture(image: Pixels, form: str, **options: Any) -> str:
    """A data URI of the image at its own size; `form` and `options` as PIL's `Image.save` takes them."""
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def percent(share: float | None) -> str:
    """An accuracy in [0, 1] as it is printed; None (no images) is a dash."""
    return _NOTHING if share is None else f"{100 * share:.1f}%"


def interval(bounds: tuple[float, float]) -> str:
    """A 95 % interval of an accuracy: "90.1 to 93.4%"."""
    low, high = bounds
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def points(difference: float) -> str:
    """A difference of two accuracies, in percentage points, always with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def distance(eps: float) -> str:
    """A distance in [0, 1] as a decimal and, if it is one, as a number of grey levels: "0.03137 (8/255)"."""
    levels = 255 * eps
    fraction = f" ({round(levels)}/255)" if round(levels) and abs(levels - round(levels)) < 0.01 else ""
    return f"{eps:.4g}{fraction}"


def value(setting: object) -> str:
    """A setting or a metadata value, for people."""
    match setting:
        case None | []:
            return _NOTHING
        case bool():
            return "yes" if setting else "no"
        case float():
            return f"{setting:.4g}"
        case dict():
            return ", ".join(f"{key}: {value(part)}" for key, part in setting.items())
        case list():
            return ", ".join(value(part) for part in setting)
    return str(setting)


def norm_symbol(norm: str) -> str:
    """The name of a norm as it is printed: "L∞", "L2"."""
    return norm.replace("inf", "∞")


def name(architecture: Mapping[str, Any]) -> str:
    """The name that the field uses for an architecture."""
    match architecture["name"]:
        case "wide_resnet":
            return f"WideResNet-{architecture['depth']}-{architecture['widen_factor']}"
        case "dm_wide_resnet":
            return f"WideResNet-{architecture['depth']}-{architecture['widen_factor']} ({architecture['activation']})"
        case "preact_resnet18":
            return "PreActResNet-18"
        case "dm_preact_resnet18":
            return f"PreActResNet-18 ({architecture['activation']})"
        case "resnet18" if "strides" in architecture:
            strides = ", ".join(map(str, architecture["strides"]))
            return f"ResNet-18 (width {architecture.get('width', 64)}, strides {strides})"
    return {"resnet18": "ResNet-18"}.get(architecture["name"], str(architecture["name"]))


def method(settings: Method) -> str:
    """A training method and its weights: "D2R + CAG (clean_weight 20, adv_weight 30)"."""
    attacks = {"cag": "CAG", "trades": "TRADES' examples", "pgd": "PGD"}
    names = {
        "d2r": f"D2R + {attacks[settings.attack]}" if settings.name == "d2r" else "",
        "lbgat": "LBGAT",
        "trades": "TRADES",
        "at": "PGD adversarial training",
        "standard": "standard training",
    }
    options = ", ".join(f"{key} {value(option)}" for key, option in settings if key not in ("name", "attack"))
    return f"{names[settings.name]} ({options})" if options else names[settings.name]


def markdown(text: object) -> Markup:
    """Text as it is, for any place in Markdown: neither HTML nor Markdown in it is interpreted."""
    return Markup(re.sub(r"([\\`*_\[\]|~!#])", r"\\\1", str(escape(" ".join(str(text).split())))))
