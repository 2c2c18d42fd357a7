"""A SLURM cluster of one node, on the loopback, with a configuration of its own; stops what it started.

``python tests/cluster/one_node.py start DIR`` starts it and prints what to export; ``... stop DIR`` stops it. Nothing
is left behind but DIR. Needs root, and Debian's ``slurm-wlm`` and ``munge``.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
DAEMONS = ("slurmd", "slurmctld", "munged")
"""In the order in which they are stopped."""

CONFIGURATION = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize={array}
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=short Nodes={host} MaxTime=5 State=UP PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=5 State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why a cluster can't be started here; None if it can."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "a SLURM of one node is started as root, on Linux"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)" if absent else None


def start(folder: Path, cpus: int = 2, array: int = 1001) -> dict[str, str]:
    """Start the daemons; return the environment for SLURM's commands. Raises RuntimeError if the node stays away."""
    folder = folder.resolve()
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    munge = folder / "munge"
    key = munge / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host = socket.gethostname()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(host=host, folder=folder, ports=_free_ports(2), array=array, cpus=cpus)
    )
    environment = {"SLURM_CONF": str(configuration)}
    whole = os.environ | environment | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    places = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
    options = [f"--{name}={munge / file}" for name, file in (places | {"seed-file": "munged.seed"}).items()]
    try:
        for command in (
            ["munged", "--force", *options],
            ["slurmctld", "-f", configuration],
            ["slurmd", "-f", configuration],
        ):
            subprocess.run(command, env=whole, check=True, capture_output=True, timeout=60)
        deadline = time.monotonic() + 60
        while True:
            seen = subprocess.run(["sinfo", "-h", "-o", "%T"], env=whole, capture_output=True, text=True)
            if "idle" in seen.stdout:
                return environment
            if time.monotonic() > deadline:
                raise RuntimeError(f"the node did not come up: {seen.stdout}{seen.stderr}")
            time.sleep(0.3)
    except BaseException:
        stop(folder)
        raise


def stop(folder: Path) -> None:
    """Cancel all jobs and stop the daemons, by the process ids that they wrote."""
    folder = folder.resolve()
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["scancel", "--partition=debug,short,urgent"], env=environment, timeout=10, capture_output=True)
        for _ in range(40):
            seen = subprocess.run(["squeue", "-h"], env=environment, timeout=10, capture_output=True, text=True)
            if seen.returncode or not seen.stdout.strip():
                break
            time.sleep(0.25)
    for daemon in DAEMONS:
        file = folder / ("munge/munged.pid" if daemon == "munged" else f"{daemon}.pid")
        with contextlib.suppress(OSError, ValueError):
            _end(int(file.read_text()), daemon)


def _end(process: int, daemon: str) -> None:
    """End a daemon, and wait until it has ended."""
    name = Path(f"/proc/{process}/comm")
    for attempt in range(100):
        if not name.exists() or daemon not in name.read_text():
            return
        os.kill(process, signal.SIGKILL if attempt == 80 else signal.SIGTERM if attempt == 0 else 0)
        time.sleep(0.1)


def submit_nothing(folder: Path) -> None:
    """Submit a job that does nothing, and wait until it has ended. Raises SubprocessError if it does not."""
    environment = os.environ | {"SLURM_CONF": str(folder.resolve() / "slurm.conf")}
    words = ["sbatch", "--wait", "--output=/dev/null", "--wrap", "true"]
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=90)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    action, place = sys.argv[1:]
    if action == "stop":
        stop(Path(place))
    elif reason := missing():
        sys.exit(reason)
    else:
        print("".join(f"export {name}={value}\n" for name, value in start(Path(place)).items()), end="")
