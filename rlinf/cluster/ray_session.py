"""The driver's connection to Ray: to a cluster that is up (RAY_ADDRESS, or ray_utils/start_ray.sh), or to a private one of this run.

A private Ray listens on the loopback interface only, keeps its token, sockets and logs in a folder of its own under the temporary
directory, writes nothing to the user's home, carries the run id in the environment of all its processes, and dies with the driver.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import ray
from ray._private import parameter, ray_constants, worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled code

from rlinf.cluster.processes import RUN_ID
from rlinf.cluster.state import STORE_REMEDY, listens, object_store_bytes, state_folder, token_variables
from rlinf.errors import RunFailed, UserError

LONGEST_TMP = 40  # characters: a unix socket's path has at most 107, and Ray appends 60
PRIVATE_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own switch for "this machine only": everything binds to 127.0.0.1
    "RAY_enable_worker_prestart": "0",  # every worker here has an environment of its own; spare ones are never used
    "RAY_prestart_worker_first_driver": "0",
}
RAY_PARAMS = parameter.RayParams


class RaySession:
    """An open connection to Ray. folder: of a private Ray; None when another one was joined. close() restores the environment variables."""

    def __init__(self, run_id: str, log_dir: Path) -> None:
        self.run_id = run_id
        self.log_dir = log_dir
        self.folder: Path | None = None
        self.saved: dict[str, str | None] = {}
        self.messages: IO[str] | None = None

    def join(self) -> bool:
        """Join the cluster that is up; False when there is none."""
        address, token = os.environ.get("RAY_ADDRESS"), None
        if not address and (state_folder() / "address").exists():
            address, token = (state_folder() / "address").read_text().strip(), state_folder() / "token"
            if not listens(address):
                return False
        if not address:
            return False
        self.set_environment({RUN_ID: self.run_id} | (token_variables(token) if token else {}))
        self.prepare(on_loopback=False)
        try:
            with own_signals():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise UserError(
                f"cannot join the Ray cluster at {address}: {error}\nIs it up (ray_utils/check_ray.sh)? "
                "To run on this machine alone, unset RAY_ADDRESS and run ray_utils/start_ray.sh --stop"
            ) from error
        return True

    def start(self, slots: int, cuda: bool) -> None:
        """Start a private Ray with `slots` CPU slots, or with this machine's GPUs. Raises UserError when its object store does not fit."""
        store, base = object_store_bytes(), tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="rlinf-", dir=base if len(base) <= LONGEST_TMP else "/tmp"))
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.set_environment({RUN_ID: self.run_id} | token_variables(token) | PRIVATE_ENVIRONMENT)
        self.prepare(on_loopback=True)
        # Not started: the autoscaler's process, and the one that sends logs to drivers. Each costs a CPU second and nothing here needs it.
        setattr(parameter, "RayParams", partial(RAY_PARAMS, no_monitor=True, include_log_monitor=False))  # type: ignore[arg-type]  # a bool
        try:
            with own_signals(), self.time_told():
                ray.init(
                    address="local",
                    num_cpus=None if cuda else slots,
                    num_gpus=None if cuda else 0,
                    include_dashboard=False,
                    object_store_memory=store,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(self.folder),
                    _system_config={"enable_metrics_collection": False},
                )
        except ValueError as error:
            if "object store" not in str(error):
                raise
            self.close(keep_logs=False)
            raise UserError(f"Ray was not started, for its object store of {store / 2**30:.1f} GiB: {error}\n{STORE_REMEDY}") from error

    @contextmanager
    def time_told(self) -> Iterator[None]:
        """Explain the error that Ray raises when its processes are not up after the 30 s that it gives them, as on a busy machine. The
        error has no class of its own, so its text is compared."""
        try:
            yield
        finally:
            error = sys.exc_info()[1]
            if type(error) is Exception and "timed out during startup" in str(error):
                self.close(keep_logs=True)
                load, cores = os.getloadavg()[0], os.cpu_count()
                raise RunFailed(
                    f"Ray's own processes were not up within the 30 s that Ray gives them; the load of this machine is {load:.0f} on "
                    f"{cores} cores. Start the run again when it is less busy; Ray's logs are in {self.log_dir / 'ray'}"
                ) from error

    def prepare(self, on_loopback: bool) -> None:
        """Have Ray, which reads its environment when imported, look again; its notices go to ray.log, not between the progress lines."""
        ray_constants.ENABLE_RAY_CLUSTER = not on_loopback
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.messages = open(self.log_dir / "ray.log", "a")
        worker.print_to_stdstream = self.keep_message

    def keep_message(self, data: dict[str, Any], ignore_prefix: bool) -> None:
        if self.messages is not None:
            self.messages.write("\n".join(data["lines"]) + "\n")
            self.messages.flush()

    def set_environment(self, values: Mapping[str, str | None]) -> None:
        """Set variables, or remove those whose value is None, until close()."""
        self.saved |= {name: os.environ.get(name) for name in values if name not in self.saved}
        put(values)

    def close(self, keep_logs: bool) -> None:
        """Disconnect (and stop a private Ray). keep_logs: save a private Ray's own logs in the run's folder."""
        ray.shutdown()
        if self.folder is not None:
            if keep_logs:
                skip = shutil.ignore_patterns("event*", "export_events")
                for source in self.folder.glob("session_2*/logs"):
                    shutil.copytree(source, self.log_dir / "ray", dirs_exist_ok=True, ignore=skip)
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.messages is not None:
            self.messages.close()
            self.messages = None
        put(self.saved)
        self.saved = {}


def put(variables: Mapping[str, str | None]) -> None:
    """Set environment variables of this process; None removes one."""
    for name, value in variables.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep the program's own handler of SIGTERM: Ray's would end Ray's processes under a run that is about to end in order."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():  # another thread sets none, nor does Ray there
            signal.signal(signal.SIGTERM, before)
