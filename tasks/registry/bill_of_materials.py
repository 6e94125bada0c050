"""The bill of materials of a version (CycloneDX 1.6): model, data, code and packages, with hashes and versions."""

import re
import uuid
from datetime import datetime
from importlib import metadata
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Commit, Component, ComponentType, Pedigree
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from tasks.evaluation.report_schema import RobustnessReport

FILE = "bom.json"
_PACKAGE = "d2r"


def render(name: str, described: dict[str, Any], robustness: RobustnessReport, trained: datetime) -> str:
    """The bill as JSON; the same model, evaluation and installed packages give the same text.

    The library cannot express CycloneDX' `modelCard`, so figures and architecture are properties of the model.

    Args:
        name: of the registered model.
        described: the checkpoint's JSON.
        trained: when the training began, with a time zone; the bill's timestamp.
    """
    model = _model(name, described, robustness)
    data = Component(
        name=f"{name} data",
        type=ComponentType.DATA,
        bom_ref="data",
        version=robustness.identity.data_hash[:12],
        description="Prepared images and labels. The hash is of their content, not of a file.",
        hashes=[_sha256(robustness.identity.data_hash)],
        properties=[Property(name="d2r:source", value=robustness.data.source)],
    )
    code, packages = _code(described), _packages()
    bom = Bom(
        metadata=BomMetaData(component=model, timestamp=trained),
        components=[data, code, *packages],
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, "/".join(robustness.identity.model_dump().values())),
    )
    bom.register_dependency(model, [data, code])
    bom.register_dependency(code, packages)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _model(name: str, described: dict[str, Any], robustness: RobustnessReport) -> Component:
    properties = {
        **{f"architecture.{key}": value for key, value in described["architecture"].items()},
        **{f"accuracy.{key}": figures.accuracy for key, figures in robustness.target.attacks.items()},
        "norm": robustness.norm,
        "eps": robustness.target.attacks["worst"].eps,
        "seed": robustness.seed,
        "settings_hash": described["settings_hash"],
        "evaluation_hash": robustness.identity.evaluation_hash,
        "mlflow_run_id": described["mlflow_run_id"],
    }
    return Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        version=robustness.identity.weights_sha256[:12],
        description="Image classifier, trained to be robust to adversarial perturbations.",
        hashes=[_sha256(robustness.identity.weights_sha256)],
        properties=[Property(name=f"d2r:{key}", value=str(value)) for key, value in properties.items()],
    )


def _code(described: dict[str, Any]) -> Component:
    """This package, at the commit that trained the model."""
    commit, dirty = described["git_commit"], described["git_dirty"]
    notes = "with uncommitted changes" if dirty else None
    return Component(
        name=_PACKAGE,
        type=ComponentType.APPLICATION,
        bom_ref=_PACKAGE,
        version=metadata.version(_PACKAGE),
        pedigree=None if commit == "unknown" else Pedigree(commits=[Commit(uid=commit)], notes=notes),
    )


def _packages() -> list[Component]:
    """The installed packages that this one requires directly."""
    required = [line for line in metadata.requires(_PACKAGE) or [] if "extra ==" not in line]
    installed = sorted({re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required})
    purls = [PackageURL("pypi", name=name, version=metadata.version(name)) for name in installed]
    return [
        Component(name=purl.name, version=purl.version, purl=purl, bom_ref=purl.to_string(), type=ComponentType.LIBRARY)
        for purl in purls
    ]


def _sha256(content: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=content)
