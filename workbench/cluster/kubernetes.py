"""Manifests for Kubernetes: ``kubectl apply -f FILE``.

A PyTorchJob (``kubeflow.org/v1``) and the ConfigMap that carries the run: its config and what it was given. PyTorchJob rather
than the newer TrainJob (``trainer.kubeflow.org/v1alpha1``): that one is alpha, wants a runtime installed beside it, and has no
elastic policy yet, so that a lost pod ends the job. Kueue queues either.
"""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import Field, model_validator

from workbench.cluster.config import Cluster
from workbench.config import hint
from workbench.errors import RunError
from workbench.run import Run

GIVEN = "/etc/workbench"
"""Where pods find the run as it was prepared."""
LARGEST = 1_000_000
"""Bytes that a ConfigMap holds (1 MiB), with some room for the manifest around them."""

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
"""A name as RFC 1123 has it."""


class _Plain(yaml.SafeDumper):
    """Text of several lines as it is; what occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Plain.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


class Kubernetes(Cluster):
    """Pods of Kubeflow's training operator."""

    carries: ClassVar[bool] = True

    image: str = Field(
        "workbench:latest",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$",
        description="Container image that has workbench installed.",
    )
    namespace: Label = Field("default", description="Namespace of the job.")
    claim: Label = Field("runs", description="PersistentVolumeClaim for run folders, ReadWriteMany: every pod writes to it.")
    mount: str = Field("/runs", pattern=r"^(/[A-Za-z0-9._-]+)+$", description="Where pods see that volume.")
    min_hosts: int | None = Field(
        None, ge=1, description="Fewest pods to go on with when others are lost for good; by default all must come back."
    )
    cpus: int = Field(8, ge=1, le=1024, description="CPU cores a process, its loaders included.")
    memory_gib: int = Field(64, ge=1, description="Main memory a pod, GiB.")
    shared_gib: int = Field(
        16,
        ge=1,
        description="Of it, shared memory at most, GiB: loaders and NCCL need it.",
        json_schema_extra=hint(advanced=True),
    )
    gpu: str = Field(
        "nvidia.com/gpu",
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$",
        description="Resource that a GPU is.",
        json_schema_extra=hint(advanced=True),
    )
    queue: Label | None = Field(None, description="Kueue's local queue; by default the job starts at once.")
    account: Label | None = Field(None, description="Service account of the pods.", json_schema_extra=hint(advanced=True))
    pull_secret: Label | None = Field(None, description="Secret to pull the image with.", json_schema_extra=hint(advanced=True))
    node_selector: dict[str, str] = Field({}, description="Labels that nodes must have.", json_schema_extra=hint(advanced=True))
    hours: float | None = Field(None, gt=0, description="End the job after so many hours; by default never.")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.min_hosts is not None and self.min_hosts > self.hosts:
            raise ValueError(f"min_hosts={self.min_hosts} must be at most hosts={self.hosts}")
        if self.shared_gib > self.memory_gib:
            raise ValueError(f"shared_gib={self.shared_gib} must be at most memory_gib={self.memory_gib}, of which it is a part")
        return self

    def folder(self, run: Run) -> str:
        return f"{self.mount}/{run.id}"

    def script(self, run: Run) -> str:
        """The two manifests."""
        given = _packed(run)
        manifests = [self._config_map(run, given), self._job(run, given)]
        return "---\n".join(yaml.dump(manifest, Dumper=_Plain, sort_keys=False) for manifest in manifests)

    def _config_map(self, run: Run, given: dict[str, bytes]) -> dict[str, Any]:
        text, binary = {}, {}
        for index, content in enumerate(given.values()):
            try:
                text[f"file-{index}"] = content.decode()
            except UnicodeDecodeError:
                binary[f"file-{index}"] = base64.b64encode(content).decode()
        manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(run), "data": text}
        return manifest | ({"binaryData": binary} if binary else {})

    def _metadata(self, run: Run) -> dict[str, Any]:
        labels = {"app.kubernetes.io/name": "workbench"}
        if self.queue is not None:
            labels["kueue.x-k8s.io/queue-name"] = self.queue
        return {"name": job_name(run), "namespace": self.namespace, "labels": labels}

    def _job(self, run: Run, given: dict[str, bytes]) -> dict[str, Any]:
        policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": self.restarts}
        if self.hours is not None:
            policy["activeDeadlineSeconds"] = round(self.hours * 3600)
        return {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": self._metadata(run),
            "spec": {
                "nprocPerNode": str(self.nproc),
                # The operator tells torchrun of this by PET_ variables; the rendezvous is at the first worker's service.
                "elasticPolicy": {
                    "minReplicas": self.min_hosts or self.hosts,
                    "maxReplicas": self.hosts,
                    "maxRestarts": self.restarts,
                    "rdzvBackend": "c10d",
                    "rdzvId": job_name(run),
                    "rdzvPort": self.port,
                },
                "runPolicy": policy,
                "pytorchReplicaSpecs": {
                    "Worker": {
                        "replicas": self.hosts,
                        "restartPolicy": "OnFailure",
                        "template": {
                            # A service mesh's proxy would outlive the ranks, and stand between them.
                            "metadata": {"annotations": {"sidecar.istio.io/inject": "false"}},
                            "spec": self._pod(run, given),
                        },
                    }
                },
            },
        }

    def _pod(self, run: Run, given: dict[str, bytes]) -> dict[str, Any]:
        resources: dict[str, Any] = {"cpu": self.cpus * self.nproc, "memory": f"{self.memory_gib}Gi"}
        if run.config.device != "cpu":
            resources[self.gpu] = self.nproc
        items = [{"key": f"file-{index}", "path": path} for index, path in enumerate(given)]
        worker = ["-m", "workbench.worker", self.folder(run), "--given", GIVEN]
        pod: dict[str, Any] = {
            "containers": [
                {
                    "name": "pytorch",  # the operator knows the container by this name
                    "image": self.image,
                    "command": ["torchrun", *worker],
                    "env": [{"name": name, "value": value} for name, value in self.variables().items()],
                    "ports": [{"name": "pytorchjob-port", "containerPort": self.port}],
                    "resources": {"requests": resources, "limits": resources},
                    "volumeMounts": [
                        {"name": "runs", "mountPath": self.mount},
                        {"name": "given", "mountPath": GIVEN, "readOnly": True},
                        {"name": "shared", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}},
                {"name": "given", "configMap": {"name": job_name(run), "items": items}},
                {"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": f"{self.shared_gib}Gi"}},
            ],
        }
        if self.account is not None:
            pod["serviceAccountName"] = self.account
        if self.pull_secret is not None:
            pod["imagePullSecrets"] = [{"name": self.pull_secret}]
        if self.node_selector:
            pod["nodeSelector"] = self.node_selector
        return pod


def job_name(run: Run) -> str:
    """The run's name as one of a service: RFC 1035, short enough for ``-worker-99999`` behind it."""
    return re.sub(r"[^a-z0-9]+", "-", f"wb-{run.id}".lower())[:50].strip("-")


def _packed(run: Run) -> dict[str, bytes]:
    """Files of a prepared run, by their path in its folder.

    Raises:
        RunError: more than a ConfigMap holds.
    """
    files = {str(path.relative_to(run.path)): path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}
    # Bytes that are no text grow by a third.
    size = sum(len(content) * 4 // 3 for content in files.values())
    if size > LARGEST:
        largest = max(files, key=lambda path: len(files[path]))
        raise RunError(
            f"The run takes {size:,} bytes, of which a ConfigMap holds {LARGEST:,}; the largest file is {largest}.",
            "Put it on the volume: save the model or the data there, and name the path in the config.",
        )
    return files
