"""`rlinf doctor`: checks whether this machine, and the cluster that is up on it, are ready for a run. Prints one line for each finding,
with the remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from rlinf import device
from rlinf.checks.finding import FAIL, OK, WARN, Finding
from rlinf.checks.preflight import check_files, check_models
from rlinf.checks.toolchain import compilers, driver_version, glibc, locks, proxies, python, triton
from rlinf.cluster.node_probe import NodeView, SilentNode, look_at_nodes
from rlinf.cluster.state import default_port, listens, state_folder
from rlinf.config.load import ROOT, Resolved
from rlinf.config.model import planned_model_config, read_config
from rlinf.config.schema import Config
from rlinf.config.validate import validate, validate_sft
from rlinf.errors import UserError
from rlinf.hardware import PORTS, cpu_flags, has_gpu, triton_lacks
from rlinf.kernels.cpu import VARIANTS, kernels
from rlinf.rollout.sglang_server import find_interpreter
from rlinf.scheduling.memory import BYTES, rank_parameters
from rlinf.weights.architecture import read_architecture

GIB = 2**30
OPTIONAL = {"sglang": "the embedded engine does without it", "transformer-engine": "the actor's local layers do without it"}
EXACT = {
    "megatron-core": "rlinf/training/cpu.py rewrites this very version where there is no CUDA",
    "ray": "nodes of one cluster need one version",
}
DRIVER_OF_CUDA = {12: 525, 13: 580}  # the oldest driver branch that runs a CUDA major version
SKEW_WARN, SKEW_FAIL = 1.0, 60.0  # seconds


def examine(resolved: Resolved | None) -> Iterator[Finding]:
    """Check this machine, then the cluster that is up, then the configuration."""
    config = resolved.config if resolved else None
    cuda = config.cluster.device == "cuda" if config and config.cluster.device != "auto" else has_gpu()
    output = Path(config.runner.output_dir if config else ".").expanduser().resolve()
    parameters = _parameters(config) if config else 0
    size = BYTES[config.actor.model.precision] if config else 2
    yield python(sys.version_info[:2], cuda)
    yield from packages(pins("base"), installed_version)
    yield compiled_code(cpu_flags(), compiled.name if (compiled := kernels()) else None)
    if cuda:
        yield from packages({name: pin for name, pin in pins("gpu").items() if name not in pins("base")}, installed_version)
    yield from devices(cuda, has_gpu(), device.usable(), torch.version.cuda, driver_version())
    if has_gpu():
        yield from surroundings(config)
    if resolved:
        yield configuration(resolved)
        yield from unseen_gpus(resolved.config, has_gpu())
        yield from sglang(resolved.config, cuda)
    if cuda and config:
        yield enough_gpus(device.gpu_count(), config.cluster.num_gpus_per_node)
    yield collectives(cuda)
    yield proxies(os.environ)
    yield shared_memory(shutil.disk_usage("/dev/shm").total, parameters * size)
    yield disk(
        output,
        shutil.disk_usage(_existing(output)).free,
        14 * parameters * (kept_checkpoints(config) if config else 0),
    )
    yield writable(output)
    yield locks(_existing(output))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1], config.cluster.num_nodes if config else 1)
    if Path("/dev/infiniband").exists():
        yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield ephemeral_ports(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text())
    yield ray_node(state_folder(), listens)
    yield from cluster(_look(output))
    if config:
        yield from files(config)


def surroundings(config: Config | None) -> Iterator[Finding]:
    """On a machine with a GPU, check what Triton needs, and what SGLang needs besides its packages if it is installed or is the engine."""
    engine = config is not None and config.rollout.rollout_backend == "sglang" and not config.trains_alone
    yield glibc(os.confstr("CS_GNU_LIBC_VERSION") or "unknown")
    yield triton(triton_lacks(), engine)
    if engine or installed_version("sglang"):
        yield from compilers(os.environ, engine)


def compiled_code(flags: Set[str], found: str | None) -> Finding:
    """Check the compiled CPU code. found: the variant with which this process computes."""
    best = next((name for name, needed in VARIANTS.items() if needed <= flags), None)
    if found == best:
        return Finding("compiled code", OK, f"for {best}" if best else "none for this CPU; torch's products and numpy's sums do without")
    if found:
        text = f"for {found}, while this CPU could have {best}: the compiler did not know it, or the kernel does not allow it"
        return Finding(
            "compiled code", WARN, text, "install a newer C compiler (GCC 11 or later), then pip install --no-deps -e . in the checkout"
        )
    text = "rlinf/kernels/c was not compiled, or has changed since; weights are copied and reordered, and most operations are slower"
    return Finding("compiled code", WARN, text, "install a C compiler, then pip install --no-deps -e . in the checkout")


def pins(name: str) -> dict[str, str]:
    """Package -> version in requirements/<name>.txt, for this Python."""
    found = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;#]+)\s*(?:;\s*python_version\s*(>=|<)\s*\"3\.(\d+)\")?", line)
        if match and (not match[3] or (sys.version_info[1] >= int(match[4])) == (match[3] == ">=")):
            found[match[1]] = match[2]
    return found


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(wanted: Mapping[str, str], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """One line for all packages whose version agrees, and one for each whose version does not."""
    good = 0
    for name, version in wanted.items():
        have = installed(name)
        base = have.split("+")[0] if have else None
        remedy = f"pip install '{name}=={version}', or bash toolkits/setup/venv.sh"
        if base == version:
            good += 1
        elif have is None:
            yield Finding(
                name, WARN if name in OPTIONAL else FAIL, f"is not installed; {OPTIONAL.get(name, f'the pin is {version}')}", remedy
            )
        else:
            text = f"{have} is installed, the pin is {version}"
            yield Finding(name, FAIL if name in EXACT else WARN, f"{text}; {EXACT[name]}" if name in EXACT else text, remedy)
    yield Finding("packages", OK, f"{good} of {len(wanted)} at their pins")


def devices(wanted: bool, present: bool, usable: bool, cuda: str | None, driver: str | None) -> Iterator[Finding]:
    """Check that a GPU that is asked for exists, and that the installed torch can use it."""
    if not present:
        text = "no GPU on this machine"
        yield (
            Finding("gpu", FAIL, text, "set cluster.device: cpu, or start on a machine with a GPU")
            if wanted
            else Finding("gpu", OK, f"{text}; CPU it is")
        )
        return
    if cuda is None:
        yield Finding("gpu", FAIL, "there is a GPU, but this torch is a build for CPU", "RLINF_DEVICE=gpu bash toolkits/setup/venv.sh")
        return
    needed = DRIVER_OF_CUDA.get(int(cuda.split(".")[0]), 0)
    if driver and int(driver.split(".")[0]) < needed:
        yield Finding("driver", FAIL, f"{driver} is too old for CUDA {cuda}", f"install driver {needed} or newer")
    elif not usable:
        yield Finding(
            "gpu",
            FAIL,
            f"torch (CUDA {cuda}) cannot use the GPU",
            "does nvidia-smi work here? in a container: --gpus all; CUDA_VISIBLE_DEVICES?",
        )
    else:
        yield Finding("gpu", OK, f"{device.gpu_count()} x {device.gpu_name()}, driver {driver}, CUDA {cuda}")


def configuration(resolved: Resolved) -> Finding:
    """Check whether a run of this configuration would start."""
    try:
        (validate_sft if resolved.config.trains_alone else validate)(resolved.config, resolved.provenance)
    except UserError as error:
        return Finding("configuration", FAIL, str(error), "fix the keys that are named")
    return Finding("configuration", OK, "its keys fit each other")


def unseen_gpus(config: Config, present: bool) -> Iterator[Finding]:
    """A warning when the configuration is made for GPUs, and cluster.device: auto finds none, as in a container without access to them."""
    if config.cluster.device == "auto" and not present and config.actor.model.precision == "fp16":
        yield Finding(
            "gpu", WARN, "no GPU can be seen, and actor.model.precision: fp16 is of a recipe for GPUs; the run would use the CPU",
            "does nvidia-smi work here? in a container: --gpus all; if the CPU is meant, set cluster.device: cpu and precision: auto",
        )  # fmt: skip


def sglang(config: Config, cuda: bool) -> Iterator[Finding]:
    """Check the interpreter that has SGLang, where SGLang is the engine."""
    if config.rollout.rollout_backend != "sglang" or config.trains_alone:
        return
    try:
        yield Finding("sglang", OK, find_interpreter(config.rollout.sglang_python, cuda))
    except UserError as error:
        yield Finding("sglang", FAIL, str(error), "see docs/sglang.md")


def enough_gpus(there: int, wanted: int) -> Finding:
    if there < wanted:
        return Finding(
            "gpus",
            FAIL,
            f"{there} here, cluster.num_gpus_per_node is {wanted}",
            "lower the key, or look at nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    return Finding("gpus", OK, f"{there} here, {wanted} wanted")


def collectives(cuda: bool) -> Finding:
    """Check that the library of the process groups is there and can sum a number."""
    backend = "nccl" if cuda and device.usable() else "gloo"
    available = dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available()
    if not available:
        return Finding(backend, FAIL, "this torch was built without it", "install the pinned torch: bash toolkits/setup/venv.sh")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    value = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(value)
    dist.destroy_process_group()
    version = " " + ".".join(map(str, device.nccl_version())) if backend == "nccl" else ""
    return Finding(backend, OK, f"works{version}")


def shared_memory(total: int, weights: int) -> Finding:
    """Check the size of /dev/shm. Weights go to the engines through it, twice while a new version replaces the old one; Ray's object store
    is there too."""
    needed = max(2 * weights + GIB, GIB)
    text = f"{total / GIB:.1f} GiB, {needed / GIB:.1f} needed"
    remedy = "in a container --ipc=host or --shm-size; else: mount -o remount,size=64G /dev/shm"
    return Finding("/dev/shm", OK, text) if total >= needed else Finding("/dev/shm", FAIL, text, remedy)


def kept_checkpoints(config: Config) -> int:
    """How many checkpoints there may be at once: those that are kept, and the one that is being written."""
    validates = bool(config.data.val_data_paths) and config.runner.val_check_interval != 0
    return config.runner.keep_checkpoints + 1 + (config.runner.keep_best and validates)


def disk(output: Path, free: int, checkpoints: int) -> Finding:
    """Check the free space. A checkpoint takes 14 bytes for each parameter: master weights, two moments, and the weights in 16 bits."""
    text = f"{free / GIB:.0f} GiB free at {output}" + (f", {checkpoints / GIB:.0f} for checkpoints" if checkpoints else "")
    if free < max(checkpoints, GIB):
        return Finding("disk", FAIL, text, "free space, set runner.output_dir elsewhere, or lower runner.keep_checkpoints")
    return (
        Finding("disk", WARN, text, "a run of a 1.5B model writes about 60 GiB")
        if free < max(2 * checkpoints, 20 * GIB)
        else Finding("disk", OK, text)
    )


def writable(output: Path) -> Finding:
    folder = _existing(output)
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(
            "output folder", FAIL, f"{folder} cannot be written by user {os.getuid()}", "set runner.output_dir, or change the owner"
        )
    return Finding("output folder", OK, f"{folder} can be written")


def open_files(limit: int, nodes: int) -> Finding:
    """Check the limit of open files: Ray keeps a connection to every worker, and the driver one for every call in flight. limit: the hard
    limit, with which Ray is started."""
    needed = 4096 if nodes == 1 else 65536
    text = f"at most {limit} open files" if limit != resource.RLIM_INFINITY else "any number of open files"
    if limit != resource.RLIM_INFINITY and limit < needed:
        remedy = f"raise the hard limit to {needed}: LimitNOFILE, /etc/security/limits.conf, or docker --ulimit nofile={needed}"
        return Finding("ulimit", FAIL if limit < 1024 else WARN, text, remedy)
    return Finding("ulimit", OK, text)


def locked_memory(limit: int) -> Finding:
    if limit != resource.RLIM_INFINITY:
        return Finding(
            "memlock", WARN, f"{limit // 1024} KiB, and there is InfiniBand: NCCL cannot register its buffers", "ulimit -l unlimited"
        )
    return Finding("memlock", OK, "unlimited")


def ephemeral_ports(text: str) -> Finding:
    """Check that the ports of hardware.PORTS, from which rendezvous ports are taken, are not used for outgoing connections."""
    first, last = map(int, text.split())
    if first < PORTS.stop and last >= PORTS.start:
        return Finding("ports", WARN,
                       f"the kernel gives {first}-{last} to outgoing connections; runs listen on {PORTS.start}-{PORTS.stop - 1}",
                       "sysctl -w net.ipv4.ip_local_port_range='32768 60999'")  # fmt: skip
    return Finding("ports", OK, f"{PORTS.start}-{PORTS.stop - 1} are left alone")


def ray_node(state: Path, answers: Callable[[str], bool]) -> Finding:
    """Check what start_ray.sh left on this node, or whether its port is free."""
    if (state / "address").exists():
        address, rank = (state / "address").read_text().strip(), (state / "rank").read_text()
        if answers(address):
            return Finding("ray", OK, f"this is node {rank} of the cluster at {address}")
        return Finding(
            "ray",
            FAIL,
            f"this was node {rank} of a cluster at {address}, which does not answer",
            "ray_utils/start_ray.sh --stop, then start again",
        )
    if answers(f"127.0.0.1:{default_port()}"):
        return Finding(
            "ray", WARN, f"something else listens on port {default_port()}", "export RLINF_RAY_PORT=6380 on all nodes before start_ray.sh"
        )
    return Finding("ray", OK, "no cluster is up here; a run on one node starts its own")


def cluster(views: Iterable[NodeView | SilentNode]) -> Iterator[Finding]:
    """Check that all nodes answer, their clocks, which logs and time-outs compare, and that all see the shared folder."""
    for view in views:
        who = f"node {view.rank} ({view.host})"
        if isinstance(view, SilentNode):
            remedy = "see there whether its memory or disk is full or its processes hang; then start_ray.sh --stop and start_ray.sh on it"
            yield Finding("node", FAIL, f"{who} {view.reason}", remedy)
            continue
        off = max(0.0, abs(view.ahead) - view.within)
        if off > SKEW_WARN:
            yield Finding(
                "clock",
                FAIL if off > SKEW_FAIL else WARN,
                f"{who} is off by {view.ahead:+.1f} s",
                "start chrony or systemd-timesyncd on it",
            )
        else:
            yield Finding("clock", OK, f"{who} agrees within {view.within + abs(view.ahead):.2f} s")
        if view.sees:
            yield Finding("shared folder", OK, f"{who} sees the output folder")
        else:
            yield Finding(
                "shared folder", FAIL, f"{who} does not see what this node writes", "put runner.output_dir on a folder that all nodes mount"
            )


def files(config: Config) -> Iterator[Finding]:
    """Check that models and data of the configuration are there."""
    unfit, absent = [], check_files(config, planned=True)
    try:
        absent = check_models(config, planned=True)[1] + absent
    except UserError as error:
        unfit = [str(error)]
    for text in unfit:
        yield Finding("model", FAIL, text, "fix what is named, or name another model")
    for text in absent:
        yield Finding("files", FAIL, text, "copy it to where every node sees it, or name another path")
    if not unfit and not absent:
        yield Finding("files", OK, "model and data are here")


def _look(output: Path) -> list[NodeView | SilentNode]:
    """Let the nodes look for a marker file in the output folder."""
    folder = _existing(output)
    if not os.access(folder, os.W_OK | os.X_OK):
        return []
    with tempfile.NamedTemporaryFile(prefix=".rlinf-doctor-", dir=folder) as marker:
        return look_at_nodes(Path(marker.name))


def _existing(path: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _parameters(config: Config) -> int:
    folder = Path(config.rollout.model_dir)
    try:
        if not folder.is_dir():
            hf, _ = planned_model_config(config.rollout.model_dir)
        else:
            hf = read_config(folder / "config.json") if (folder / "config.json").is_file() else None
        return rank_parameters(read_architecture(hf), 1, 1, 0) if hf else 0
    except UserError:  # files() says so
        return 0


def main(resolved: Resolved | None, as_json: bool) -> int:
    """Print the findings as they come. Returns 1 when one is FAIL."""
    findings = []
    for finding in examine(resolved):
        findings.append(finding)
        if not as_json:
            sys.stdout.write(finding.line() + "\n")
            sys.stdout.flush()
    if as_json:
        sys.stdout.write(json.dumps([asdict(f) for f in findings], indent=1) + "\n")
    return 1 if any(f.status == FAIL for f in findings) else 0
