import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlinf import hardware
from rlinf.errors import RunFailed

AVX512 = "processor\t: 0\nmodel name\t: A CPU @ 2.50GHz bf16\nflags\t\t: fpu avx2 avx512f avx512vl\n"


@pytest.mark.parametrize(
    ("text", "multiplies"),
    [
        (AVX512, False),
        (AVX512.replace("avx512vl", "avx512vl avx512_bf16"), True),
        (AVX512.replace("avx512vl", "amx_bf16 amx_tile"), True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_a_cpu_multiplies_bf16_when_its_flags_say_so(text: str, multiplies: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert hardware.cpu_multiplies_bf16(file) is multiplies
    assert not hardware.cpu_multiplies_bf16(tmp_path / "absent")


@pytest.mark.parametrize(
    ("device", "gpu", "bf16", "precision"),
    [
        ("cpu", True, False, "fp32"),
        ("cpu", False, True, "bf16"),
        ("cuda", False, False, "bf16"),
        ("auto", True, False, "bf16"),
        ("auto", False, False, "fp32"),
    ],
)
def test_the_fast_precision_is_that_of_the_device(
    device: str, gpu: bool, bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_gpu", lambda: gpu)
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: bf16)
    assert hardware.fast_precision(device) == precision


@pytest.mark.parametrize(("quota", "cores"), [("max 100000\n", 6), ("250000 100000\n", 2), ("50000 100000\n", 1), (None, 6)])
def test_cores_are_those_of_the_affinity_within_the_quota(
    quota: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of 64 cores lends a container what its control group says."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert hardware.cores(tmp_path / "cpu.max") == cores


def test_free_ports_are_below_the_ephemeral_ones() -> None:
    assert all(20000 <= hardware.free_port("127.0.0.1") < 32000 for _ in range(20))


def test_servers_of_a_node_have_no_port_in_common() -> None:
    slices = [hardware.MEETING_PORTS, *(hardware.ports_of(rank) for rank in range(hardware.SLICES))]
    assert sorted(port for ports in slices for port in ports) == list(hardware.PORTS)
    assert hardware.ports_of(hardware.SLICES + 3) == hardware.ports_of(3)


@pytest.mark.parametrize("host", ["127.0.0.1", hardware.EVERYWHERE, "192.0.2.1"], ids=["loopback", "everywhere", "translated"])
def test_a_port_is_free_when_it_can_be_bound(host: str) -> None:
    """One that is bound and does not listen yet refuses connections as a free one does."""
    with socket.socket() as starting:
        starting.bind(("127.0.0.1", hardware.free_port(hardware.EVERYWHERE)))
        taken = starting.getsockname()[1]
        with pytest.raises(RunFailed, match=f"between {taken} and {taken} is free: `ss -tlnp`"):
            hardware.free_port(host, range(taken, taken + 1))
    assert hardware.free_port(host, range(taken, taken + 1)) == taken


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ((1024, 524288), (524288, 524288)),
        ((1024, 1 << 30), (1 << 20, 1 << 30)),
        ((1024, resource.RLIM_INFINITY), (1 << 20, resource.RLIM_INFINITY)),
        ((4096, 4096), None),
        ((1 << 21, 1 << 22), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_the_soft_limit_of_open_files_is_raised(
    limits: tuple[int, int], raised: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: asked.append(wanted))
    hardware.allow_open_files()
    assert asked == ([] if raised is None else [raised])


def test_a_process_gets_all_the_open_files_that_this_user_may_have() -> None:
    """In a process of its own: what a hard limit was lowered to stays."""
    code = (
        "import resource; from rlinf.hardware import allow_open_files; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048));"
        "allow_open_files(); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "2048 2048\n"


def test_the_address_of_an_interface() -> None:
    assert hardware.address_of("lo") == "127.0.0.1"
    with pytest.raises(OSError):
        hardware.address_of("no such one")


@pytest.mark.parametrize(
    ("environment", "headers", "lacks"),
    [
        ({"PATH": "bin"}, True, None),
        ({"PATH": "nowhere", "CC": "/opt/icx"}, True, None),
        ({"PATH": "nowhere"}, True, "C compiler"),
        ({}, True, "C compiler"),
        ({"PATH": "bin"}, False, "include/Python.h"),
    ],
)
def test_what_triton_does_not_find_is_named(environment: dict[str, str], headers: bool, lacks: str | None, tmp_path: Path) -> None:
    for file, there in ((tmp_path / "bin" / "gcc", True), (tmp_path / "include" / "Python.h", headers)):
        file.parent.mkdir()
        if there:
            file.touch(mode=0o755)
    if "PATH" in environment:
        environment = environment | {"PATH": str(tmp_path / environment["PATH"])}
    found = hardware.triton_lacks(environment, tmp_path / "include")
    assert found is None if lacks is None else lacks in found


def test_triton_takes_the_headers_of_this_python() -> None:
    """Those with which the compiled code of this project was made, where it was."""
    import sysconfig

    found = hardware.triton_lacks({"CC": "gcc"})
    assert (found is None) == (Path(sysconfig.get_path("include")) / "Python.h").is_file()
