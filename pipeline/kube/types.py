"""What Kubernetes objects are made of, as typed dictionaries: a misspelt field is an error of the type checker.

Only the fields that we set; their meaning stands in the API reference of Kubernetes.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

Strings = dict[str, str]


class Meta(TypedDict):
    name: str
    namespace: str
    labels: Strings
    annotations: NotRequired[Strings]


class PodMeta(TypedDict):
    labels: Strings


class Named(TypedDict):
    name: str


class FieldPath(TypedDict):
    fieldPath: str


class EnvSource(TypedDict):
    fieldRef: FieldPath


class EnvVar(TypedDict):
    name: str
    value: NotRequired[str]
    valueFrom: NotRequired[EnvSource]


class EnvFrom(TypedDict):
    secretRef: Named


class Port(TypedDict):
    name: str
    containerPort: int


class Demand(TypedDict):
    requests: Strings
    limits: Strings


class Capabilities(TypedDict):
    drop: list[str]


class Seccomp(TypedDict):
    type: Literal["RuntimeDefault"]


class ContainerSecurity(TypedDict):
    runAsNonRoot: bool
    allowPrivilegeEscalation: bool
    readOnlyRootFilesystem: bool
    capabilities: Capabilities
    seccompProfile: Seccomp


class PodSecurity(TypedDict):
    runAsNonRoot: bool
    runAsUser: int
    runAsGroup: int
    fsGroup: int
    seccompProfile: Seccomp


class Mount(TypedDict):
    name: str
    mountPath: str
    readOnly: NotRequired[bool]


class EmptyDir(TypedDict):
    sizeLimit: str
    medium: NotRequired[Literal["Memory"]]


class Volume(TypedDict):
    name: str
    emptyDir: NotRequired[EmptyDir]
    configMap: NotRequired[Named]


class Container(TypedDict):
    name: str
    image: str
    command: NotRequired[list[str]]
    env: list[EnvVar]
    envFrom: NotRequired[list[EnvFrom]]
    ports: NotRequired[list[Port]]
    resources: Demand
    securityContext: ContainerSecurity
    volumeMounts: list[Mount]


class Toleration(TypedDict):
    key: str
    operator: Literal["Exists"]


class Expression(TypedDict):
    key: str
    operator: Literal["NotIn"]
    values: list[str]


class NodeTerm(TypedDict):
    matchExpressions: list[Expression]


class NodeTerms(TypedDict):
    nodeSelectorTerms: list[NodeTerm]


class NodeAffinity(TypedDict):
    requiredDuringSchedulingIgnoredDuringExecution: NodeTerms


class Affinity(TypedDict):
    nodeAffinity: NodeAffinity


class PodSpec(TypedDict):
    serviceAccountName: str
    automountServiceAccountToken: bool
    restartPolicy: NotRequired[Literal["Never"]]
    securityContext: PodSecurity
    imagePullSecrets: NotRequired[list[Named]]
    nodeSelector: NotRequired[Strings]
    affinity: NotRequired[Affinity]
    tolerations: NotRequired[list[Toleration]]
    containers: list[Container]
    volumes: list[Volume]


class PodTemplate(TypedDict):
    metadata: PodMeta
    spec: PodSpec


class ConfigMap(TypedDict):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Meta
    data: Strings


class ServiceAccount(TypedDict):
    apiVersion: Literal["v1"]
    kind: Literal["ServiceAccount"]
    metadata: Meta
    automountServiceAccountToken: bool
