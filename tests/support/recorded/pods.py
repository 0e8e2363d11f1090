"""The pods that KFP's backend makes of a compiled pipeline, as far as the specification decides them.

The backend itself forbids privilege escalation, drops all capabilities and sets seccomp's RuntimeDefault on every user
container (kfp-kubernetes' ``set_security_context`` says so); everything else comes from the specification.
"""

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]
BACKEND = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pods(spec: Object, platform: Object) -> Iterator[Object]:
    """One Pod for each executor, by its name."""
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in spec["deploymentSpec"]["executors"].items():
        config = configs.get(name, {})
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": _pod(executor["container"], config),
        }


def _pod(container: Object, config: Object) -> Object:
    given = config.get("securityContext", {})
    identity = {key: int(value) if key != "runAsNonRoot" else value for key, value in given.items()}
    volumes = [
        {"name": each["volumeName"], "emptyDir": {"medium": each.get("medium", "")}}
        for each in config.get("emptyDirMounts", [])
    ]
    volumes += [{"name": each["configMapName"], "configMap": {}} for each in config.get("configMapAsVolume", [])]
    made = {
        "name": "main",
        "image": container["image"],
        "args": [*container.get("command", []), *container.get("args", [])],
        "env": [*container.get("env", []), *_references(config)],
        "resources": _resources(container.get("resources", {})),
        "securityContext": {**BACKEND, **identity},
    }
    return {
        "containers": [made],
        "volumes": volumes,
        "nodeSelector": config.get("nodeSelector", {}).get("labels", {}),
        "tolerations": config.get("tolerations", []),
        "activeDeadlineSeconds": int(config.get("activeDeadlineSeconds", 0)),
    }


def _references(config: Object) -> Iterator[Object]:
    for each in config.get("secretAsEnv", []):
        for pair in each["keyToEnv"]:
            reference = {"name": each["secretName"], "key": pair["secretKey"]}
            reference |= {"optional": True} if each.get("optional") else {}
            yield {"name": pair["envVar"], "valueFrom": {"secretKeyRef": reference}}
    for each in config.get("configMapAsEnv", []):
        for pair in each["keyToEnv"]:
            reference = {"name": each["configMapName"], "key": pair["configMapKey"]}
            yield {"name": pair["envVar"], "valueFrom": {"configMapKeyRef": reference}}
    for each in config.get("fieldPathAsEnv", []):
        yield {"name": each["name"], "valueFrom": {"fieldRef": {"fieldPath": each["fieldPath"]}}}


def _resources(given: Object) -> Object:
    names = {
        "requests": {"cpu": "resourceCpuRequest", "memory": "resourceMemoryRequest"},
        "limits": {"cpu": "resourceCpuLimit", "memory": "resourceMemoryLimit"},
    }
    made = {part: {key: given[name] for key, name in keys.items() if name in given} for part, keys in names.items()}
    if accelerator := given.get("accelerator"):
        kind, count = accelerator["resourceType"], accelerator["resourceCount"]
        made["limits"][kind] = made["requests"][kind] = count
    return made
