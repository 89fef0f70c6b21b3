"""Would an API server take Kubernetes objects as they are: KubeRay's definitions made strict, and Pod Security's rules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

CRDS = ROOT.parent / "shared" / "kuberay_crds"
KUBERNETES = "1.37"


@cache
def kuberay_schema(kind: str) -> dict[str, Any]:
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip("../shared/kuberay_crds is absent")
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """A field that the schema does not know is dropped in silence by the API server; here it is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


def rules(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """Where `x-kubernetes-validations`, which jsonschema does not know, would be asked about what is set."""
    if "x-kubernetes-validations" in schema:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from rules(schema.get("properties", {}).get(key, {}), inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from rules(schema.get("items", {}), inner, f"{path}[]")


def check(thing: dict[str, Any]) -> None:
    """Raises ValidationError for an object that the API server would refuse, or would not take as it is."""
    if thing["apiVersion"] == "ray.io/v1":
        check_kuberay(thing)
        for template in templates(thing):
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


def check_kuberay(thing: dict[str, Any]) -> None:
    schema = kuberay_schema(thing["kind"])
    jsonschema.Draft7Validator(schema).validate(thing)
    asked = list(rules(schema, thing))
    assert not asked, f"rules that nobody has checked: {asked}"


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in an object."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        for inner in value.values():
            yield from templates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from templates(inner)


def unrestricted(spec: dict[str, Any]) -> list[str]:
    """What the level "restricted" of the Pod Security Standards would refuse in a pod, for the fields that our pods can have."""
    pod = spec.get("securityContext", {})
    wrong = [f"pod: {field}" for field in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if spec.get(field)]
    wrong += [f"volume {volume['name']}" for volume in spec["volumes"] if not {"emptyDir", "configMap"} & set(volume)]
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        own = container.get("securityContext", {})
        name = container["name"]
        effective = {**pod, **own}
        if effective.get("runAsNonRoot") is not True or effective.get("runAsUser", 1) == 0:
            wrong.append(f"{name}: may be root")
        if effective.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            wrong.append(f"{name}: seccompProfile")
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            wrong.append(f"{name}: privileges")
        if "ALL" not in own.get("capabilities", {}).get("drop", []) or own["capabilities"].get("add"):
            wrong.append(f"{name}: capabilities")
        if any("hostPort" in port for port in container.get("ports", ())):
            wrong.append(f"{name}: hostPort")
    return wrong
