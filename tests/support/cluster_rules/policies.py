"""Rules every pod and every role of the platform keeps, each as a function that lists what breaks it, in sentences.

``check`` applies all of them to a set of objects; the single rules are for pods that come from elsewhere (a compiled
pipeline). Pod Security follows the *restricted* profile of https://kubernetes.io/docs/concepts/security/pod-security-standards/
with the host fields of probes that 1.34 added. Windows' fields are left out: no image of ours runs there.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from cluster_rules.objects import Object, Workload, containers, name_of, workloads

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SECRET_NAME = re.compile(r"(password|passwd|secret|token|api_?key|access_?key|private_?key|credential)", re.IGNORECASE)
NOT_SECRET_NAME = re.compile(r"(_?name|_?file|_?path|_?ref|mount|audience|_?length|_?count|tokens)$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|\bhf_[A-Za-z0-9]{30,}"
    r"|[a-z][a-z0-9+.-]*://[^\s/:@]*:[^\s/:@$]+@|--[a-z_-]*(?:password|secret[_-]key|token)[= ][^\s$-]",
)
MOVING_TAG = re.compile(r"^\D*$")
"""A tag without a digit ("latest", "main", "stable") names another image tomorrow."""


def check(objects: Iterable[Object]) -> list[str]:
    """Everything wrong with ``objects`` as a whole: pods, roles, secrets, networks, scaling."""
    objects = list(objects)
    found = [f"{each.where}: {problem}" for each in workloads(objects) for problem in of_workload(each)]
    return found + rbac(objects) + secret_literals(objects) + unmatched(objects) + owned_twice(objects)


def of_workload(workload: Workload) -> list[str]:
    """What is wrong with the pods of one workload."""
    pod = workload.spec
    rules = [pod_security, read_only_root, images, resources, duplicate_env, *([probes] if workload.serves else [])]
    return [problem for rule in rules for problem in rule(pod)]


# Pod Security ------------------------------------------------------------------------------------------------------


def pod_security(pod: Object) -> list[str]:
    """What keeps a pod out of a namespace that enforces Pod Security *restricted*."""
    own = pod.get("securityContext") or {}
    found = [f"sets {name}: true" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [f"sets sysctl {each['name']}" for each in own.get("sysctls") or [] if each["name"] not in SYSCTLS]
    found += [f"mounts volume {each['name']} of type {kind}" for each, kind in _foreign_volumes(pod)]
    found += _identity(own, "its pod", required=False)
    for each in containers(pod):
        found += _container_security(each, own)
    return found


def _foreign_volumes(pod: Object) -> Iterator[tuple[Object, str]]:
    for each in pod.get("volumes") or []:
        yield from ((each, kind) for kind in each if kind != "name" and kind not in VOLUMES)


def _container_security(container: Object, of_pod: Object) -> list[str]:
    name, own = f"container {container['name']}", container.get("securityContext") or {}
    dropped = (own.get("capabilities") or {}).get("drop") or []
    added = set((own.get("capabilities") or {}).get("add") or []) - {"NET_BIND_SERVICE"}
    ports = [each["hostPort"] for each in container.get("ports") or [] if each.get("hostPort")]
    found = [f"{name} asks for host port {port}" for port in ports]
    found += [f"{name} is privileged"] if own.get("privileged") else []
    found += [f"{name} adds capabilities {sorted(added)}"] if added else []
    found += [] if "ALL" in dropped else [f"{name} does not drop ALL capabilities"]
    found += [] if own.get("allowPrivilegeEscalation") is False else [f"{name} leaves allowPrivilegeEscalation on"]
    found += [] if own.get("procMount", "Default") == "Default" else [f"{name} sets procMount {own['procMount']}"]
    found += [f"{name} names a host in {each}" for each in _hosts(container)]
    inherited = {key: of_pod[key] for key in ("runAsNonRoot", "seccompProfile") if key in of_pod}
    return found + _identity({**inherited, **own}, name, required=True)


def _identity(context: Object, name: str, *, required: bool) -> list[str]:
    """Rules that hold for a pod's own context when set there, and must hold for what each container ends up with."""
    found = []
    if context.get("runAsNonRoot") is not True and (required or "runAsNonRoot" in context):
        found.append(f"{name} lacks runAsNonRoot: true")
    if context.get("runAsUser") == 0:
        found.append(f"{name} runs as user 0")
    seccomp = (context.get("seccompProfile") or {}).get("type")
    if seccomp not in ("RuntimeDefault", "Localhost") and (required or seccomp):
        found.append(f"{name} lacks seccompProfile RuntimeDefault")
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        found.append(f"{name} is unconfined by AppArmor")
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        found.append(f"{name} sets SELinux options {selinux}")
    return found


def _hosts(container: Object) -> Iterator[str]:
    lifecycle = container.get("lifecycle") or {}
    checks = {key: container.get(key) for key in ("livenessProbe", "readinessProbe", "startupProbe")} | lifecycle
    for name, handler in checks.items():
        if isinstance(handler, dict):
            yield from (name for kind in ("httpGet", "tcpSocket") if (handler.get(kind) or {}).get("host"))


def read_only_root(pod: Object) -> list[str]:
    """Containers that may write to their image's file system; all state belongs in a volume."""
    return [
        f"container {each['name']} lacks readOnlyRootFilesystem: true"
        for each in containers(pod)
        if (each.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True
    ]


# What a container must say -----------------------------------------------------------------------------------------


def pinned(image: str) -> bool:
    """Whether ``image`` names a digest, or a tag that looks like a version."""
    if "@" in image:
        return re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", image) is not None
    _, colon, tag = image.rpartition("/")[2].partition(":")
    return bool(colon and tag) and not MOVING_TAG.match(tag)


def images(pod: Object) -> list[str]:
    """Containers whose image may be another one tomorrow."""
    return [
        f"container {each['name']} uses image {each.get('image')!r}, which is not pinned"
        for each in containers(pod)
        if not pinned(each.get("image") or "")
    ]


def resources(pod: Object) -> list[str]:
    """Containers without requests of processor and memory or a memory limit, or with a GPU count nobody can give."""
    found = []
    for each in containers(pod):
        asked, limit = ((each.get("resources") or {}).get(key) or {} for key in ("requests", "limits"))
        missing = [f"requests.{name}" for name in ("cpu", "memory") if name not in asked]
        missing += [] if "memory" in limit else ["limits.memory"]
        found += [f"container {each['name']} lacks resources.{name}" for name in missing]
        for name in [key for key in {**asked, **limit} if key.endswith("/gpu")]:
            if str(limit.get(name, "0")) == "0" or str(asked.get(name, limit.get(name))) != str(limit.get(name)):
                found.append(f"container {each['name']} needs limits of {name} above 0 and equal to its requests")
    return found


def probes(pod: Object) -> list[str]:
    """Containers that serve and that nobody asks whether they are ready and alive."""
    sidecars = [each for each in pod.get("initContainers") or [] if each.get("restartPolicy") == "Always"]
    model = [each for each in containers(pod) if "model" in pod and each["name"] == "kserve-container"]
    return [
        f"container {each['name']} lacks a {name}"
        for each in [*sidecars, *(pod.get("containers") or []), *model]
        for name in ("readinessProbe", "livenessProbe")
        if name not in each
    ]


def duplicate_env(pod: Object) -> list[str]:
    """Variables set twice: server-side apply refuses them."""
    found = []
    for each in containers(pod):
        names = [variable["name"] for variable in each.get("env") or []]
        twice = sorted({name for name in names if names.count(name) > 1})
        found += [f"container {each['name']} sets {name} twice" for name in twice]
    return found


# Between objects ---------------------------------------------------------------------------------------------------


def rbac(objects: Iterable[Object]) -> list[str]:
    """Roles that grant more than is named, and bindings to everybody or to cluster-admin."""
    found = []
    for item in objects:
        if item["kind"] in ("Role", "ClusterRole"):
            found += [f"{name_of(item)}: {problem}" for rule in item.get("rules") or [] for problem in _grants(rule)]
        if item["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            subjects = {each["name"] for each in item.get("subjects") or []}
            broad = {each for each in subjects if each.startswith("system:") and not each.startswith("system:node")}
            found += [f"{name_of(item)}: binds to {each}, which is everybody" for each in sorted(broad)]
            if item["roleRef"]["name"] in ("cluster-admin", "admin", "edit"):
                found.append(f"{name_of(item)}: binds the broad role {item['roleRef']['name']}; grant what is needed")
    return found


def _grants(rule: Object) -> Iterator[str]:
    for key in ("apiGroups", "resources", "verbs", "nonResourceURLs"):
        if any("*" in each for each in rule.get(key) or []):
            yield f"has a wildcard in {key}"
    for verb in sorted({"bind", "escalate", "impersonate"} & set(rule.get("verbs") or [])):
        yield f"grants {verb}"
    reads = {"get", "list", "watch"} & set(rule.get("verbs") or [])
    if reads and "secrets" in (rule.get("resources") or []) and not rule.get("resourceNames"):
        yield "grants all secrets; name them in resourceNames"


def secret_literals(objects: Iterable[Object]) -> list[str]:
    """Secrets written down: Secret objects with content, secret-looking names with a value, shapes of known keys."""
    found = []
    for item in objects:
        where = name_of(item)
        if item["kind"] == "Secret" and (item.get("data") or item.get("stringData")):
            found.append(f"{where}: holds a secret; refer to an existing one")
        if item["kind"] == "ConfigMap":
            data = item.get("data") or {}
            found += [f"{where}: key {key} belongs in a Secret" for key, text in data.items() if _secret(key, text)]
        found += [f"{where}: {problem}" for problem in _literals(item)]
    return found


def _literals(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        name, value = node.get("name"), node.get("value")
        if isinstance(name, str) and isinstance(value, str) and _secret(name, value):
            yield f"{name} is written down at {path}; use valueFrom.secretKeyRef"
        yield from chain.from_iterable(_literals(value, f"{path}.{key}".lstrip(".")) for key, value in node.items())
    elif isinstance(node, list):
        yield from chain.from_iterable(_literals(value, f"{path}[{number}]") for number, value in enumerate(node))
    elif isinstance(node, str) and (hit := SECRET_VALUE.search(node)):
        yield f"{path} holds what looks like a secret ({hit.group()[:12]}...)"


def _secret(name: str, value: str) -> bool:
    return bool(SECRET_NAME.search(name) and not NOT_SECRET_NAME.search(name) and value and not value.startswith("$("))


def unmatched(objects: Iterable[Object]) -> list[str]:
    """Workloads that no NetworkPolicy but a default names, in either direction."""
    objects = list(objects)
    rules = [each for each in objects if each["kind"] == "NetworkPolicy" and _selector(each)]
    found = []
    for each in workloads(objects):
        mine = [rule for rule in rules if rule["metadata"].get("namespace", "") == each.namespace]
        matching = [rule for rule in mine if selects(_selector(rule), each.labels)]
        directions = {way for rule in matching for way in rule["spec"].get("policyTypes") or []}
        missing = sorted({"Ingress", "Egress"} - directions)
        found += [f"{each.where}: no NetworkPolicy selects its pods for {' and '.join(missing)}"] if missing else []
    return found


def _selector(policy: Object) -> Object:
    return policy["spec"].get("podSelector") or {}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes an object with ``labels``."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for each in selector.get("matchExpressions") or []:
        value, values = labels.get(each["key"]), each.get("values") or []
        kept = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not kept[each["operator"]]:
            return False
    return True


def owned_twice(objects: Iterable[Object]) -> list[str]:
    """Workloads that fix their replicas although an autoscaler owns the number."""
    objects = list(objects)
    targets = {
        (target.get("kind", "Deployment"), target["name"]): each
        for each in objects
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
        for target in [each["spec"]["scaleTargetRef"]]
    }
    return [
        f"{name_of(each)}: sets replicas, which {name_of(targets[key])} owns"
        for each in objects
        if (key := (each["kind"], each["metadata"]["name"])) in targets and "replicas" in each["spec"]
    ]
