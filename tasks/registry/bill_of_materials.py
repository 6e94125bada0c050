"""The bill of materials of a version (CycloneDX 1.6): model, data, code and packages, with hashes and licences.

With a `modelCard`, CycloneDX calls it an ML-BOM. The library cannot express model cards: it is added to the JSON.
"""

import json
import uuid
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Commit, Component, ComponentType, Pedigree
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from tasks.evaluation.report_schema import RobustnessReport
from tasks.registry.provenance import Provenance
from tasks.tracking.environment import locked_packages

FILE = "bom.json"
_PACKAGE = "d2r"
_DATA_LICENCES = {"digits": "CC-BY-4.0"}  # by source; UCI Machine Learning Repository, data set 80
_MAX_LICENCE = 100  # characters; some packages give the whole text where its name belongs


def render(
    name: str,
    described: dict[str, Any],
    robustness: RobustnessReport,
    provenance: Provenance,
    started: datetime,
    lock: Path,
) -> str:
    """The bill as JSON; the same model, evaluation and installed packages give the same text.

    Args:
        name: of the registered model.
        described: the target checkpoint's JSON.
        started: when the training began, with a time zone; the bill's timestamp.
        lock: requirements.lock; its packages that are installed here are listed, none without the file.
    """
    model, code = _model(name, robustness), _code(described, provenance)
    data, packages = list(_data(name, provenance)), list(_packages(lock))
    guidance = list(_guidance(name, provenance))
    bom = Bom(metadata=BomMetaData(component=model, timestamp=started), components=[*guidance, *data, code, *packages])
    bom.register_dependency(model, [*guidance, data[0], code])
    for each in guidance:
        bom.register_dependency(each, [data[0], code])
    bom.register_dependency(data[0], data[1:])
    bom.register_dependency(code, packages)
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    content["metadata"]["component"]["modelCard"] = _model_card(
        described, robustness, [each.bom_ref.value for each in data]
    )
    del content["serialNumber"]  # random; of the content instead
    content["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(content, sort_keys=True)).urn
    return json.dumps(content, indent=2) + "\n"


def _model(name: str, robustness: RobustnessReport) -> Component:
    return Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        version=robustness.identity.weights_sha256[:12],
        description="Image classifier, trained to be robust to adversarial perturbations. The hash is of its weights.",
        hashes=[_sha256(robustness.identity.weights_sha256)],
    )


def _guidance(name: str, provenance: Provenance) -> Iterator[Component]:
    if provenance.guidance is not None:
        weights = provenance.guidance.weights_sha256
        yield Component(
            name=f"{name} guidance",
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref="guidance",
            version=weights[:12],
            description="Guidance model of the training. The hash is of its weights.",
            hashes=[_sha256(weights)],
        )


def _data(name: str, provenance: Provenance) -> Iterator[Component]:
    """The prepared data, and where `dvc.lock` has them, the raw data that they were prepared from."""
    prepared, raw = provenance.data, provenance.raw_data
    licence = _DATA_LICENCES.get(prepared.source)
    yield Component(
        name=f"{name} data",
        type=ComponentType.DATA,
        bom_ref="data",
        version=prepared.hash[:12],
        description="Prepared images and labels of all splits. The hash is of their content, not of a file.",
        hashes=[_sha256(prepared.hash)],
        licenses=[_licence(licence)] if licence else None,
        properties=_properties(
            source=prepared.source,
            classes=prepared.classes,
            **{f"images.{split}": count for split, count in prepared.images.items()},
        ),
    )
    if raw is not None and raw.md5 is not None:
        yield Component(
            name=raw.path,
            type=ComponentType.DATA,
            bom_ref="raw-data",
            description="Raw data, hashed as DVC does: a folder by the list of its files' hashes.",
            hashes=[HashType(alg=HashAlgorithm.MD5, content=raw.md5.removesuffix(".dir"))],
        )


def _code(described: dict[str, Any], provenance: Provenance) -> Component:
    """This package, at the commit that trained the model."""
    commit, dirty = described["git_commit"], described["git_dirty"]
    notes = "with uncommitted changes" if dirty else None
    environment = provenance.registration.environment
    locked = {} if environment is None else {"python": environment.python, "lock_sha256": environment.requirements_lock}
    return Component(
        name=_PACKAGE,
        type=ComponentType.APPLICATION,
        bom_ref=_PACKAGE,
        version=metadata.version(_PACKAGE),
        licenses=_licences(metadata.metadata(_PACKAGE)),
        pedigree=None if commit == "unknown" else Pedigree(commits=[Commit(uid=commit)], notes=notes),
        properties=_properties(**locked),
    )


def _packages(lock: Path) -> Iterator[Component]:
    """The packages of requirements.lock, in the version that is installed; the others belong to other platforms."""
    for name, pins in locked_packages(lock).items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        purl = PackageURL("pypi", name=name, version=installed.version)
        # "+cpu" and the like say where a package was built, not what it is.
        as_locked = installed.version.partition("+")[0] in {pin.partition("+")[0] for pin in pins}
        yield Component(
            name=name,
            version=installed.version,
            purl=purl,
            bom_ref=purl.to_string(),
            type=ComponentType.LIBRARY,
            licenses=_licences(installed.metadata),
            properties=None if as_locked else _properties(locked=" or ".join(pins)),
        )


def _licences(described: Any) -> list[License]:
    """What a package says of its licence: an SPDX expression, else a short text, else its classifiers."""
    stated = described.get("License-Expression") or described.get("License") or ""
    if stated and stated != "UNKNOWN" and "\n" not in stated and len(stated) <= _MAX_LICENCE:
        return [_licence(stated)]
    classifiers = described.get_all("Classifier") or []
    names = {each.rpartition(" :: ")[2] for each in classifiers if each.startswith("License :: ")}
    return [LicenseFactory().make_with_name(each) for each in sorted(names - {"OSI Approved"})]


def _licence(stated: str) -> License:
    return LicenseFactory().make_from_string(stated)


def _model_card(described: dict[str, Any], robustness: RobustnessReport, data: list[str | None]) -> dict[str, Any]:
    """CycloneDX' `modelCard`: the architecture, and the figures with the identity of their evaluation."""
    architecture = described["architecture"]
    size, classes = architecture["image_size"], architecture["num_classes"]
    low, high = described["image_range"]
    figures = [
        {
            "type": "accuracy",
            "value": str(each.accuracy),
            "slice": f"{key}: {each.name}, {each.norm} eps {each.eps}, {each.images} images, seed {each.seed}",
            "confidenceInterval": dict(zip(("lowerBound", "upperBound"), map(str, each.interval), strict=True)),
        }
        for key, each in robustness.target.attacks.items()
    ]
    properties = {
        **robustness.identity.model_dump(),
        "precision": robustness.precision,
        "settings_hash": described["settings_hash"],
        "mlflow_run_id": described["mlflow_run_id"],
        **{f"architecture.{key}": value for key, value in architecture.items()},
    }
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image classification",
            "architectureFamily": "residual neural network",
            "modelArchitecture": architecture["name"],
            "datasets": [{"ref": ref} for ref in data],
            "inputs": [{"format": f"float32 (N, 3, {size}, {size}) in [{low}, {high}]"}],
            "outputs": [{"format": f"float32 (N, {classes}), logits"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": figures},
        "properties": [{"name": f"d2r:{key}", "value": str(value)} for key, value in properties.items()],
    }


def _properties(**values: object) -> list[Property]:
    return [Property(name=f"d2r:{key}", value=str(value)) for key, value in values.items()]


def _sha256(content: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=content)
