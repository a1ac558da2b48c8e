"""Where every rank lives: config + node inventory -> Plan. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine of the run: its rank among the nodes and the number of its devices (GPUs, or process slots on a CPU machine)."""

    rank: int
    devices: int


@dataclass(frozen=True)
class Seat:
    """One process of the run and the devices it uses on one node."""

    component: str
    rank: int
    node: int
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All seats, ordered by component, then rank. `mode` says how components share devices: collocated, disaggregated or hybrid."""

    seats: tuple[Seat, ...]
    mode: str

    def of(self, component: str) -> tuple[Seat, ...]:
        return tuple(s for s in self.seats if s.component == component)

    def shares_device(self, a: str, b: str) -> bool:
        taken = {(s.node, d) for s in self.of(a) for d in s.devices}
        return any((s.node, d) in taken for s in self.of(b) for d in s.devices)


@dataclass(frozen=True)
class WorkerAddress:
    """Who a worker is, known before its constructor runs. rank and world_size within its component; devices on its node."""

    component: str
    rank: int
    world_size: int
    node: int
    devices: tuple[int, ...]
    master_addr: str
    master_port: int
    run_id: str
    threads: int
