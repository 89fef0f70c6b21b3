"""An API server in a thread of the tests: kmock's emulator, and a hand that plays KubeRay's operator."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import kmock
import yaml

RAYJOBS = "ray.io/v1/rayjobs"


class ApiServer:
    """Use as a context manager. `server` is kmock's emulator; touch it only before requests come, or by `call`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> ApiServer:
        self._thread.start()
        self._run(self._open())
        self.port = self._front.port
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=120)

    async def _open(self) -> None:
        self.server = kmock.KubernetesEmulator()
        await self.server.__aenter__()
        self._front = kmock.Server(self.server)
        await self._front.__aenter__()
        self.server["put"] << self._replace
        for resource in (RAYJOBS, "ray.io/v1/raycronjobs", "batch/v1/cronjobs", "v1/configmaps", "v1/serviceaccounts", "v1/pods"):
            self.server.resources[resource] = {
                "namespaced": True,
                "verbs": {"create", "get", "list", "watch", "delete", "update"},
            }
        for resource in ("roles", "rolebindings"):
            self.server.resources[f"rbac.authorization.k8s.io/v1/{resource}"] = {"namespaced": True}

    def _replace(self, request: kmock.Request) -> dict[str, Any]:
        """What kmock leaves out: the object becomes what is sent, whole."""
        standing = self.server.objects[request.resource, request.namespace, request.name]
        standing.delete()
        standing.create(request.data)
        return dict(request.data)

    async def _close(self) -> None:
        await self._front.__aexit__(None, None, None)
        await self.server.__aexit__(None, None, None)

    def away(self) -> None:
        """Nobody listens on the port any more; what is stored stays."""
        self._run(self._front.__aexit__(None, None, None))

    def back(self) -> None:
        async def reopen() -> None:
            self._front = kmock.Server(self.server, port=self.port)
            await self._front.__aenter__()

        self._run(reopen())

    def kubeconfig(self, path: Path) -> str:
        cluster = {"name": "test", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        context = {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "default"}}
        user = {"name": "test", "user": {"token": "t"}}
        config = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context], "users": [user]}
        path.write_text(yaml.safe_dump(config | {"current-context": "test"}))
        return str(path)

    def objects(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(plural, name) → what is stored, with what is deleted left out."""
        return {(key[0].plural, key[2]): value.raw for key, value in self.server.objects.items() if not value.deleted}

    def status(self, name: str, state: str, **fields: Any) -> None:
        """The operator tells how a RayJob of the namespace `labelling` stands."""

        async def patch() -> None:
            path = f"/apis/ray.io/v1/namespaces/labelling/rayjobs/{name}"
            status = {"jobDeploymentStatus": state, "rayClusterName": f"{name}-abcde", **fields}
            await self.server.patch(path, json={"status": status})

        self._run(patch())
