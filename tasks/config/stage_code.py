"""The code that a stage's result depends on, as `dvc.yaml` lists it: the one definition, for DVC and for caches."""

import yaml

from d2r_core import files


def stage_code(stage: str) -> list[str]:
    """The rooms and files of code among a stage's dependencies, as `files.code_fingerprint` takes them.

    `dvc.yaml` is the one beside the code, whatever the current folder. An installed package has none: there it is all
    the code.
    """
    graph = files.CODE / "dvc.yaml"
    if not graph.is_file():
        return ["d2r_core", "tasks"]
    deps: list[str] = yaml.safe_load(graph.read_text(encoding="utf-8"))["stages"][stage]["deps"]
    return [dep for dep in deps if dep.startswith(("d2r_core/", "tasks/"))]
