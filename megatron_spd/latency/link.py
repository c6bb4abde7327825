"""Links of a set speed between ranks on one machine: every node, of one rank or several, in a network namespace.

The first rank of each node leaves the machine's network for an empty namespace, and the others of the node follow it:
they talk over its loopback interface, which nothing slows down. Rank 0 makes a bridge in its own, and for every node
(its own included) a pair of virtual cables from that bridge to an interface ``eth0`` in the node's namespace. Each node
shapes what it sends (``tc tbf``), as a full-duplex port of a switch would; what it receives was shaped by the sender.

Nothing has to be cleaned up. The namespaces have no names: they, the bridge and the cables live as long as the rank
processes and the kernel removes them with the last one, however it ends. The machine's own network is never touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch.distributed as dist

from megatron_spd.errors import UserError
from megatron_spd.runtime.rank_status import STATUS_DIR

#: The interface of every node, and the first three numbers of its address; node n is at .(n + 1).
INTERFACE = "eth0"
_NETWORK = "10.213.57"
_CLONE_NEWNET = 0x40000000
#: Seconds that ranks wait for one another to set up: importing torch on a busy machine takes long.
_PATIENCE = 120.0
#: Largest packet that the ranks' stacks hand to the shaper, in bytes: a bucket cannot be smaller than a packet.
_PACKET = 16_384
#: Seconds of sending at full speed that the bucket may save up while the link is idle, and its least size in bytes.
_BUCKET_SECONDS, _LEAST_BUCKET = 0.00015, 20_000


def check_links_possible() -> None:
    """Raise UserError where links cannot be shaped: not root, no `ip` or `tc`, ranks started by another launcher."""
    if os.geteuid() != 0:
        raise UserError(
            "--link-rates makes network namespaces, which only root may; run it as root or leave it out"
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"--link-rates needs `{'` and `'.join(missing)}`; install iproute2 (Debian: apt-get install iproute2)"
        )
    if STATUS_DIR not in os.environ:
        raise UserError(
            "--link-rates starts its own ranks: give --ranks 2 or more, and use no other launcher"
        )


def enter_network(rank: int, ranks: int, ranks_per_node: int = 1) -> None:
    """Move this rank into the namespace of its node, wired to the others', before any process group exists. A node is
    ``ranks_per_node`` ranks in a row.

    Called on all ranks, on the main thread: a namespace belongs to a thread and to those that it starts. Raises
    UserError where the system refuses, RuntimeError if another rank does not follow.
    """
    check_links_possible()
    if dist.is_initialized():
        raise RuntimeError(
            "the process groups exist already; their connections would stay outside the namespace"
        )
    folder = Path(os.environ[STATUS_DIR])
    node = rank // ranks_per_node
    if rank % ranks_per_node == 0:
        _leave_network()
        _write(folder / f"network-{node}", str(os.getpid()))
        if node == 0:
            pids = [int(_read(folder / f"network-{n}")) for n in range(ranks // ranks_per_node)]
            _wire(pids)
            _write(folder / "network-wired", "")
        _read(folder / "network-wired")
        _plug_in(node)
        _write(folder / f"network-{node}-up", "")
    else:
        _read(folder / f"network-{node}-up")
        _follow(int(_read(folder / f"network-{node}")))
    # NCCL would otherwise talk through the device or shared memory, past the link.
    nccl = {
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
    }
    os.environ |= {"MASTER_ADDR": f"{_NETWORK}.1", "GLOO_SOCKET_IFNAME": INTERFACE, **nccl}
    # As torchrun would say it.
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)


def set_rate(gigabits: float, ranks_per_node: int = 1) -> None:
    """Shape what this rank's node sends to ``gigabits`` per second (10^9 bits), from now on (after the ranks' next
    barrier). Called on all ranks."""
    if dist.get_rank() % ranks_per_node:
        return
    bucket = max(_LEAST_BUCKET, round(gigabits * 1e9 / 8 * _BUCKET_SECONDS))
    shape = ["rate", f"{round(gigabits * 1e9)}bit", "burst", str(bucket), "latency", "50ms"]
    _command("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *shape)


def _leave_network() -> None:
    """``unshare(CLONE_NEWNET)``: os.unshare needs Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise UserError(
            f"--link-rates: the system refuses a network namespace ({reason}); leave the option out here"
        )


def _follow(pid: int) -> None:
    """Into the namespace of process ``pid``: os.setns needs Python 3.12 as well."""
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise UserError(f"--ranks-per-node: the system refuses to share a network namespace ({reason})")


def _plug_in(node: int) -> None:
    """Give this namespace its address and take its interfaces into use."""
    _ip("address", "add", f"{_NETWORK}.{node + 1}/24", "dev", INTERFACE)
    _ip("link", "set", INTERFACE, "gso_max_size", str(_PACKET), "up")
    _ip("link", "set", "lo", "up")


def _wire(pids: list[int]) -> None:
    """A bridge in this namespace, and a cable from it to :data:`INTERFACE` in the namespace of every process."""
    _ip("link", "add", "bridge", "type", "bridge")
    _ip("link", "set", "bridge", "up")
    for rank, pid in enumerate(pids):
        port = f"port{rank}"
        _ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(pid))
        _ip("link", "set", port, "master", "bridge", "gso_max_size", str(_PACKET), "up")


def _ip(*arguments: str) -> None:
    _command("ip", *arguments)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise UserError(f"--link-rates: `{' '.join(words)}` failed here: {reason}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read(path: Path) -> str:
    """The text that another rank writes to ``path``, as soon as it is there."""
    deadline = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"no {path.name} after {_PATIENCE:.0f} s: another rank did not enter its network"
            )
        time.sleep(0.02)
    return path.read_text(encoding="utf-8")
