"""Services of a few lines for tests of the local platform: one listens on its port and closes what it accepts."""

import socket
import sys
from pathlib import Path

import psutil

from pipelines import processes
from pipelines.services import HOST, Service, Site

LISTEN = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""


def listens(site: Site, name: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, site.ports[name]["port"])) == 0


def small(name: str, script: str = LISTEN, needs: tuple[str, ...] = (), patience: float = 20) -> Service:
    return Service(
        name=name,
        ports=("port",),
        command=lambda site: [sys.executable, "-c", script, str(site.ports[name]["port"])],
        healthy=lambda site: listens(site, name),
        needs=needs,
        patience=patience,
    )


def named(*services: Service) -> dict[str, Service]:
    return {service.name: service for service in services}


def left(home: Path) -> list[psutil.Process]:
    """Processes that still carry the mark of ``home``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(processes.MARKER, "").endswith(f"@{home}"):
                found.append(process)
        except psutil.Error:
            continue
    return found
