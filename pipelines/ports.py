"""Which ports the local services listen on: those they had before, else those that are given, else free ones."""

from collections.abc import Collection, Mapping

from pipelines import processes
from pipelines.services import HOST, Service
from pipelines.state import Entry, StackError


def choose_ports(
    known: Mapping[str, Entry], starting: Collection[str], fixed: dict[str, int], services: Mapping[str, Service]
) -> dict[str, dict[str, int]]:
    """The ports of the known services and those ``starting``; raises StackError when one of them cannot be had.

    ``fixed`` gives a service's first port.
    """
    _check_fixed(known, starting, fixed, services)
    chosen = {name: entry.ports for name, entry in known.items()}
    fresh = processes.free_ports(sum(len(services[name].ports) for name in starting))
    taken = {port for name, entry in known.items() if name not in starting for port in entry.ports.values()}
    taken |= set(fixed.values())
    for name in starting:
        old = known[name].ports if name in known else {}
        chosen[name] = {
            port: old[port] if port in old else next(number for number in fresh if number not in taken)
            for port in services[name].ports
        }
        if name in fixed:
            chosen[name][services[name].ports[0]] = fixed[name]
        for number in chosen[name].values():
            if not processes.is_free(number, HOST):
                raise StackError(
                    f"{name} cannot listen on {HOST}:{number}: the port is in use by {processes.owner(number)}",
                    "stop that process, or choose another port: `onerec down`, then `onerec up`"
                    + (f" --port {name}=PORT" if name in fixed else ""),
                )
    return chosen


def _check_fixed(
    known: Mapping[str, Entry], starting: Collection[str], fixed: Mapping[str, int], services: Mapping[str, Service]
) -> None:
    """Raises StackError for a port that nobody would listen on: of a service that runs elsewhere, or is not started."""
    unknown = sorted(set(fixed) - set(services))
    if unknown:
        raise StackError(f"a port is given for the unknown service {', '.join(unknown)}")
    for name in set(fixed) - set(starting):
        address = known[name].address if name in known and known[name].recorded.process() else ""
        if address != f"{HOST}:{fixed[name]}":
            what = f"it runs at {address} already" if address else "it is not among those to start"
            raise StackError(
                f"port {fixed[name]} is given for {name}, but {what}",
                f"`onerec down --only {name}` stops it first" if address else f"leave it out, or name {name} in --only",
            )
