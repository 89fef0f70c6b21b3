"""A rendered container on this machine, as a node would run it: a root of its own that is read-only, another user without
capabilities or a way to get any, the volumes that the pod mounts, and its environment alone.

Made of mount and process namespaces (`unshare`, `setpriv`), which want root; nothing outside of them is changed, and all of it is
gone with its first process. What is not as on a node: the network and the limits of CPU and memory are this machine's, and no
seccomp profile is loaded.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from conftest import ROOT
from raylets import below

Pod = dict[str, Any]  # a pod's `spec`
_SHARED = ("/usr", "/etc", sys.prefix, sys.base_prefix, str(ROOT))  # in the place of the image's system, environment and code
_DEVICES = ("null", "zero", "full", "random", "urandom")


def without_namespaces() -> str:
    """Why there can be no sandbox here; "" where there can."""
    if missing := [name for name in ("unshare", "setpriv", "mount", "chroot") if shutil.which(name) is None]:
        return f"{missing[0]} is absent"
    tried = ["unshare", "--mount", "--pid", "--fork", "--ipc", "mount", "-t", "tmpfs", "none", "/mnt"]
    if os.geteuid() or subprocess.run(tried, capture_output=True, check=False).returncode:
        return "namespaces are not to be had: not root, or not allowed to mount"
    hidden = [path for path in _SHARED if Path(path).is_relative_to("/tmp")]
    return f"{hidden[0]} is where a pod has its volume" if hidden else ""


def image_environment() -> dict[str, str]:
    """What infra/Dockerfile sets, with the environment of the tests for that of the image, and the code under test."""
    written = (ROOT / "infra/Dockerfile").read_text().replace("\\\n", " ")  # an instruction goes on after a backslash
    (line,) = [line for line in written.splitlines() if line.startswith("ENV PATH=")]
    given = dict(word.split("=", 1) for word in shlex.split(line)[1:])
    given["PATH"] = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return given | {"PYTHONPATH": str(ROOT)}


class Sandbox:
    """Runs containers of pods, below `folder`. The cluster has `secrets`, of each its keys; of each ConfigMap its `files`."""

    def __init__(self, folder: Path, *, secrets: Mapping[str, Mapping[str, str]], files: Mapping[str, Mapping[str, str]]) -> None:
        self._root, self._maps, self._secrets = folder / "root", folder / "maps", secrets
        self._root.mkdir()
        for name, content in files.items():  # as kubelet does it: by way of a folder that it can exchange
            (self._maps / name / "..data").mkdir(parents=True)
            for file, text in content.items():
                (self._maps / name / "..data" / file).write_text(text)
                (self._maps / name / file).symlink_to(f"..data/{file}")

    @contextmanager
    def running(self, pod: Pod, command: list[str] | None = None, **more: str) -> Iterator[subprocess.Popen[str]]:
        """The container with its own command, or another one in its place; killed at the end. `more` is what an operator adds to
        its environment, and what comes from the pod's labels."""
        (container,) = pod["containers"]
        script = "\n".join(["set -e", *self._mounts(pod, container), f'exec {shlex.join(self._enter(pod, container))} "$@"'])
        inner = ["sh", "-c", script, "sh", *(command or container["command"])]
        with subprocess.Popen(
            ["unshare", "--mount", "--pid", "--ipc", "--fork", "--propagation", "private", *inner],
            env=image_environment() | self._environment(container) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                for pid in below(process.pid)[1:] if process.poll() is None else ():  # all others go with the first one
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def run(self, pod: Pod, command: list[str] | None = None, **more: str) -> tuple[int, str]:
        """(exit code, everything it said)."""
        with self.running(pod, command, **more) as process:
            said, _ = process.communicate(timeout=240)
        return process.returncode, said

    def _environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        secrets = [self._secrets[source["secretRef"]["name"]] for source in container.get("envFrom", ())]
        return {name: value for secret in secrets for name, value in secret.items()} | {
            item["name"]: item["value"] for item in container["env"] if "value" in item
        }

    def _mounts(self, pod: Pod, container: Mapping[str, Any]) -> Iterator[str]:
        """Lines of shell that make the root and go there."""
        yield f"mount -t tmpfs -o mode=755 none {shlex.quote(str(self._root))}"
        yield f"cd {shlex.quote(str(self._root))}"
        yield "mkdir -p proc sys dev tmp var/tmp && chmod 1777 tmp var/tmp"  # as in every image of Debian
        yield "ln -s usr/bin bin && ln -s usr/sbin sbin && ln -s usr/lib lib && ln -s usr/lib64 lib64"
        for path in sorted(set(_SHARED)):
            yield from _bound(path, path)
        yield "mount -t proc none proc && mount -t sysfs -o ro none sys && mount -t tmpfs -o mode=755 none dev"
        for name in _DEVICES:
            yield f"touch dev/{name} && mount --bind /dev/{name} dev/{name}"
        yield "ln -s /proc/self/fd dev/fd && mkdir dev/shm && mount -t tmpfs -o mode=1777,size=64m none dev/shm"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            volume, target = volumes[mount["name"]], mount["mountPath"]
            if "configMap" in volume:
                yield from _bound(str(self._maps / volume["configMap"]["name"]), target)
            else:  # with fsGroup a volume is its group's, and so are the folders in it
                options = f"mode=2777,gid={pod['securityContext']['fsGroup']},size={_kibibytes(volume['emptyDir']['sizeLimit'])}k"
                yield f"mkdir -p .{target} && mount -t tmpfs -o {options} none .{target}"
        if container["securityContext"]["readOnlyRootFilesystem"]:
            yield "mount -o remount,ro dev && mount -o remount,bind,ro ."

    def _enter(self, pod: Pod, container: Mapping[str, Any]) -> list[str]:
        who, own = pod["securityContext"], container["securityContext"]
        words = ["chroot", ".", "/usr/bin/env", "--chdir=/tmp", "setpriv"]  # WORKDIR of the image
        words += [f"--reuid={who['runAsUser']}", f"--regid={who['runAsGroup']}", f"--groups={who['fsGroup']}"]
        words += ["--inh-caps=-all", "--bounding-set=-all"] if own["capabilities"]["drop"] == ["ALL"] else []
        return [*words, *(["--no-new-privs"] if own["allowPrivilegeEscalation"] is False else []), "--"]


def _bound(source: str, target: str) -> Iterator[str]:
    where = shlex.quote(f".{target}")
    yield f"mkdir -p {where} && mount --bind {shlex.quote(source)} {where} && mount -o remount,bind,ro {where}"


def _kibibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Ti": 2**30, "Gi": 2**20, "Mi": 2**10, "Ki": 1}[quantity[-2:]]
