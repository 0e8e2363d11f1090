"""Builds the Dockerfile's targets for real, without a container engine or a registry, and runs them as a cluster would.

Debian's buildah builds in a chroot; the base image is made by debootstrap (Debian 12, whose Python is 3.11) under the
name that the Dockerfile gives. A container here is the image mounted read-only with /tmp and /data writable, in a mount
namespace of its own, as user 10001. It shares the host's network and processes: no isolation, only the file system.

ONEREC_IMAGE_STORE (default build/images) keeps layers from run to run, some 15 GB; ONEREC_IMAGES names the targets to
test (default: pipelines serve). Needs root, buildah and debootstrap.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
STORE = Path(os.environ.get("ONEREC_IMAGE_STORE") or PROJECT / "build" / "images")
TARGETS = (os.environ.get("ONEREC_IMAGES") or "pipelines serve").split()
VERSION = "0.0.0.test"
USER = "10001:10001"

ENTER = """
root=$1; shift
mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o uid=10001,gid=10001 tmpfs "$root/data"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero random urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
mkdir "$root/dev/shm"; mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
exec chroot --userspec={user} "$root" "$@"
""".replace("{user}", USER)


def buildah(*arguments: str, **options: Any) -> str:
    """Runs buildah on the store; fails with what it printed."""
    place = ["--root", str(STORE / "root"), "--runroot", str(STORE / "run"), "--storage-driver", driver()]
    done = subprocess.run(["buildah", *place, *arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"buildah {arguments[0]}:\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout.strip()


def driver() -> str:
    """Overlay where the store's file system can carry it; vfs, which copies every layer, inside other containers."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(STORE)], capture_output=True, text=True, check=True).stdout
    return "vfs" if "overlay" in kind else "overlay"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A built image, mounted."""

    target: str
    root: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the image says about itself: User, Env, Entrypoint, Labels ..."""
        return json.loads(buildah("inspect", "--type", "image", name(self.target)))["OCIv1"]["config"]

    @property
    def environment(self) -> dict[str, str]:
        """The image's variables."""
        return dict(each.split("=", 1) for each in self.config["Env"])

    def enter(self, *command: str, env: dict[str, str] | None = None) -> list[str]:
        """The command line that runs ``command`` inside."""
        values = [f"{key}={value}" for key, value in {**self.environment, **(env or {})}.items()]
        inside = ["env", "-i", f"--chdir={self.config['WorkingDir']}", *values, *command]
        return ["unshare", "--mount", "sh", "-ec", ENTER, "sh", str(self.root), *inside]

    def run(self, *command: str, env: dict[str, str] | None = None, timeout: float = 300) -> str:
        """What ``command`` prints inside; fails when it does."""
        entered = self.enter(*command, env=env)
        done = subprocess.run(entered, capture_output=True, text=True, check=False, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}"
        return done.stdout.strip()

    @contextmanager
    def started(self, command: list[str], env: dict[str, str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        """``command`` running inside until the block ends, which stops it as a kubelet does: SIGTERM, then patience."""
        with subprocess.Popen(self.enter(*command, env=env), stdout=log, stderr=log) as child:
            try:
                yield child
            finally:
                child.terminate()
                child.wait(60)


def name(target: str) -> str:
    """The image's name in the store."""
    return f"localhost/onerec-{target}:{VERSION}"


def base() -> str:
    """The base image's name, as the Dockerfile gives it."""
    found = re.search(r"^ARG BASE=(\S+)$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def make_base() -> None:
    """A Debian 12 with Python under the base image's name, unless the store has it."""
    if base() in buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        return
    folder = STORE / "debian"
    shutil.rmtree(folder, ignore_errors=True)
    packages = "--include=python3,python3-pip,python3-venv,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", str(folder)], check=True, timeout=900)
    (folder / "usr/local/bin/python3").symlink_to("/usr/bin/python3")
    for litter in [*folder.glob("var/cache/apt/archives/*.deb"), *folder.glob("var/lib/apt/lists/*_*")]:
        litter.unlink()
    container = buildah("from", "scratch")
    buildah("add", container, str(folder), "/")
    buildah("commit", "--rm", container, base())
    shutil.rmtree(folder)


def machine() -> list[str]:
    """Bind mounts that bring this machine's certificates and pip settings into a build; the Dockerfile has none."""
    settings: dict[str, str] = {}
    for line in subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True).splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = value.strip("'").replace("\\n", "\n")
    constraint = settings.pop("constraint", "")  # the Dockerfile brings the project's own
    (STORE / "pip.conf").write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    words = re.split(r"[\s']+", " ".join(settings.values()).replace("file://", ""))
    folders = {Path("/", *Path(word).parts[1:3]) for word in words if word.startswith("/") and Path(word).exists()}
    mounts = {"/etc/ssl/certs", *(str(each) for each in folders if not str(each).startswith("/etc"))} - {constraint}
    volumes = [f"{each}:{each}:ro" for each in sorted(mounts) if Path(each).exists()]
    return [f"--volume={each}" for each in [*volumes, f"{STORE / 'pip.conf'}:/etc/pip.conf:ro"]]


def torch_index() -> list[str]:
    """The index of torch's CPU builds where it can be reached; else what this machine's pip settings give."""
    try:
        socket.getaddrinfo("download.pytorch.org", 443)
    except OSError:
        return ["--build-arg=TORCH_INDEX=https://pypi.org/simple"]
    return []


def build(target: str) -> Image:
    """Builds ``target`` (layers are kept) and mounts it."""
    options = ["--layers", "--isolation=chroot", "--pull-never", "--network=host", f"--target={target}", *machine()]
    options += [f"--build-arg=VERSION={VERSION}", f"--build-arg=REVISION={'0' * 40}", f"--tag={name(target)}"]
    options += torch_index()
    environment = {**os.environ, "TMPDIR": str(STORE)}
    buildah("bud", *options, "--file=Dockerfile", ".", cwd=PROJECT, timeout=3600, env=environment)
    container = buildah("from", "--pull-never", name(target))
    return Image(target=target, root=Path(buildah("mount", container)))


@pytest.fixture(scope="session")
def builder() -> None:
    """Everything a build needs, or a skip that says what is missing."""
    missing = [tool for tool in ("buildah", "debootstrap", "unshare") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; apt-get install buildah debootstrap util-linux")
    if os.geteuid():
        pytest.skip("building in a chroot needs root")
    STORE.mkdir(parents=True, exist_ok=True)
    for each in buildah("containers", "--quiet").split():  # left by a run that was killed
        buildah("rm", each)
    make_base()


@pytest.fixture(scope="session", params=TARGETS)
def image(request: pytest.FixtureRequest, built: dict[str, Image]) -> Image:
    """Each image in turn."""
    return of(built, request.param)


@pytest.fixture(scope="session")
def built(builder: None) -> Iterator[dict[str, Image]]:
    """The images made so far, by target."""
    images: dict[str, Image] = {}
    yield images
    for each in buildah("containers", "--quiet").split():
        buildah("rm", each)


def of(images: dict[str, Image], target: str) -> Image:
    """The image of ``target``, built when first asked for; skips what this run leaves out."""
    if target not in TARGETS:
        pytest.skip(f"ONEREC_IMAGES leaves {target} out")
    if target not in images:
        images[target] = build(target)
    return images[target]


@pytest.fixture(scope="session")
def pipelines(built: dict[str, Image]) -> Image:
    """The image without torch."""
    return of(built, "pipelines")


@pytest.fixture(scope="session")
def serve(built: dict[str, Image]) -> Image:
    """The model servers' image."""
    return of(built, "serve")


@pytest.fixture(scope="session")
def train(built: dict[str, Image]) -> Image:
    """The image of components and Ray nodes."""
    return of(built, "train")
