"""Where a job stands on Kubernetes: the `cluster.kubernetes` section. It holds names only, never a credential."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.job.fields import like
from pipeline.job.quantity import Bytes, Count, Model, Seconds

_ENDS = "a letter or a digit at either end"
#: A name by RFC 1123, as namespaces, service accounts and Secrets have.
DnsLabel = Annotated[
    str, *like(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", f"1 to 63 lower case letters, digits and dashes, {_ENDS}")
]
LabelKey = Annotated[
    str,
    *like(
        r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$",
        f"a label's name such as zone or example.com/zone: at most 63 letters, digits, dots, dashes and underscores, {_ENDS}",
    ),
]
LabelValue = Annotated[
    str,
    *like(
        r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$",
        f"at most 63 letters, digits, dots, dashes and underscores, {_ENDS}",
    ),
]
Image = Annotated[
    str, *like(r"^[a-z0-9][A-Za-z0-9._:/@-]*$", "an image's name such as ghcr.io/you/nightlabel, with @sha256: and its digest")
]


class Kubernetes(Model):
    """How the job stands on Kubernetes; read by `render` and `apply`."""

    image: Image | None = None
    """Container image with nightlabel, by digest (`name@sha256:…`); `--image` stands in for it."""
    allow_tags: bool = False
    """Take an image by tag too, which may be another one tomorrow."""
    namespace: DnsLabel = "default"
    """Namespace of everything that is made."""
    service_account: DnsLabel = "default"
    """Whose rights the pods have on the stores."""
    service_account_annotations: dict[LabelKey, str] = Field(default={})
    """Make the account, with these: `eks.amazonaws.com/role-arn` or `iam.gke.io/gcp-service-account`."""
    labels: dict[LabelKey, LabelValue] = Field(default={})
    """More labels for every object, such as `kueue.x-k8s.io/queue-name`."""
    pod_labels: dict[LabelKey, LabelValue] = Field(default={})
    """More labels for every pod, such as `azure.workload.identity/use: "true"`."""
    secrets: tuple[DnsLabel, ...] = ()
    """Secrets whose keys become environment variables of the pods; by name, the values never stand in a job file."""
    pull_secrets: tuple[DnsLabel, ...] = ()
    """Secrets to pull the image with."""
    node_selector: dict[LabelKey, LabelValue] = Field(default={})
    """Labels that every node must have."""
    gpu_label: LabelKey = "cloud.google.com/gke-accelerator"
    """Node label that holds `workers.gpu_type`; off GKE `nvidia.com/gpu.product` or `karpenter.k8s.aws/instance-gpu-name`."""
    spot: dict[LabelKey, LabelValue] = Field(default={})
    """Labels of spot nodes, such as `karpenter.sh/capacity-type: spot`. Workers are placed there, also where nodes are tainted by
    these names; the head is not."""
    attempts: Count = 2
    """How often KubeRay may try, each time with a new cluster and a whole `limits.deadline`. Two that overlap share the work."""
    scratch: Bytes = 16 * 2**30
    """Disk of a pod for /tmp: Ray's logs, and blocks that do not fit into shared memory."""
    ttl: Seconds = 300.0
    """How long a finished cluster stays, for a look at it. By then logs and report are in the output."""
    suspend: bool = False
    """Create it suspended: a queue such as Kueue, or a person, lets it start."""
