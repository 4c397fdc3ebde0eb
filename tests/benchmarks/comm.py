"""Compressed communication, measured: codecs against a copy, collectives over links of a known speed.

    python tests/benchmarks/comm.py                       # codecs, and links where the machine lets us make them
    python tests/benchmarks/comm.py --only codec --json F
    python tests/benchmarks/comm.py --only link --ranks 4
    python tests/benchmarks/comm.py --compiled            # programs of torch.compile on a link of 1 Gbit/s

A link is a network namespace for each rank, a veth pair each, a bridge between them, and ``tc tbf`` on every rank's
end: bytes leave a rank at the rate given and not faster. That needs root and iproute2; what was made is removed again.
Bytes are the interface's own count, headers and all. Loopback is the machine's own, at full speed; there
``int8 if it pays`` asks the cost model, with a link that `calibrate_link` measured. Systems take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from benchmarks.measure import Row, print_table, turn, write_json
from distributed.hook_defects import Bucket
from qpass import comm
from qpass.comm.wire.operators import decode_into, encode_into

MIB = 1 << 20
CODECS = ("int8", "int6", "int4", "mxint8", "fp8_e4m3", "int8:128:bf16:hadamard", "int8:128:bf16:stochastic")
LOOPBACK = 0
LINKS = ((2, 1000, 64 * MIB), (4, 200, 16 * MIB), (2, LOOPBACK, 64 * MIB))  # ranks, Mbit/s, bytes of float32
SYSTEMS = {
    (2, 1000): ("dist.all_reduce", "bf16.all_reduce", "int8.all_reduce", "int4.all_reduce", "dist.reduce_scatter",
                "int8.reduce_scatter", "dist.all_gather", "int8.all_gather", "torch bf16.ddp_hook", "int8.ddp_hook"),
    (4, 200): ("dist.all_reduce", "int8.all_reduce", "int4.all_reduce"),
    (2, LOOPBACK): ("dist.all_reduce", "int8.all_reduce", "int8 if it pays.all_reduce"),
}  # fmt: skip
ROUNDS = {1000: 3, 200: 3, LOOPBACK: 15}
COMPILED_ROUNDS = 7


def codec_rows() -> list[Row]:
    """Milliseconds for 64 MiB of float32 on one thread, beside a copy of as many bytes read."""
    torch.set_num_threads(1)
    x = torch.randn(16 * MIB)
    out = torch.empty_like(x)
    rows = [Row("64 MiB", "copy", "latency_median", round(statistics.median(turn(out.copy_, (x,))), 3), "ms")]
    for name in CODECS:
        codec = comm.codec(name)
        payload = torch.empty(codec.payload_bytes(x.numel()), dtype=torch.uint8)
        for what, call in (
            ("encode", lambda codec=codec, payload=payload: encode_into(x, payload, codec)),
            ("decode", lambda codec=codec, payload=payload: decode_into(payload, out, codec)),
        ):
            median = statistics.median(turn(call, ()))
            rows.append(Row("64 MiB", f"{what} {name}", "latency_median", round(median, 3), "ms"))
            rows.append(Row("64 MiB", f"{what} {name}", "speed", round(64 * MIB / median / 1e6, 2), "GB/s of float32"))
    return rows


def link_rows(world: int, mbit: int, size: int) -> list[Row]:
    case = f"{size // MIB} MiB, {world} ranks, " + (f"{mbit} Mbit/s" if mbit else "loopback")
    try:
        lines = on_link(world, mbit, "--size", str(size))
    except RuntimeError as error:
        return [Row(case, "all", "failed", str(error), "")]
    return [
        row
        for system, milliseconds, megabytes in lines
        for row in (
            Row(case, system, "latency_median", float(milliseconds), "ms"),
            Row(case, system, "sent", float(megabytes), "MB a rank"),
        )
    ]


def compiled_rows(world: int, mbit: int, rounds: int) -> list[Row]:
    """Step times of compiled programs, and what of them is communication: see `compiled_comm`."""
    from compiled_comm import SILENT

    try:
        lines = [
            line for transport in ("fake", "gloo")
            for line in on_link(world, mbit, "--compiled", "--transport", transport, "--rounds", str(rounds))
        ]  # fmt: skip
    except RuntimeError as error:
        return [Row(f"{world} ranks, {mbit} Mbit/s", "all", "failed", str(error), "")]
    steps = {(case, system): float(ms) for case, system, ms, _ in lines}
    rows = []
    for case, system, ms, megabytes in lines:
        where = f"{case}, {world} ranks, {mbit} Mbit/s"
        silent = steps[case, f"inductor{SILENT}"]
        if system.endswith(SILENT):
            rows.append(Row(where, system, "step", float(ms), "ms"))
            continue
        if not system.startswith("eager"):
            rows.append(Row(where, system, "step", float(ms), "ms"))
        alone = float(ms) if system.startswith("eager") else float(ms) - silent
        rows.append(Row(where, system, "communication", round(alone, 2), "ms"))
        rows.append(Row(where, system, "sent", float(megabytes), "MB a rank"))
    return rows


def on_link(world: int, mbit: int, *arguments: str) -> list[list[str]]:
    """Run this file with ``arguments`` as every rank; the fields of the lines that rank 0 wrote.

    At 0 Mbit/s the ranks meet on the loopback device.

    Raises:
        RuntimeError: no link can be made here, or a rank failed.
    """
    if mbit and (why_not := no_links()):
        raise RuntimeError(why_not)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        options = ["--rank-of", str(world), "--mbit", str(mbit), "--folder", folder, *arguments]
        command = [sys.executable, __file__, *options]
        inside = [["ip", "netns", "exec", name] for name in stack.enter_context(link(world, mbit))] if mbit else None
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0" if mbit else "lo"}
        ranks = [
            subprocess.Popen([*(inside[rank] if inside else ()), *command, "--rank", str(rank)], env=environment)
            for rank in range(world)
        ]
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            raise RuntimeError(f"exit codes {codes}")
        return [line.split("\t") for line in Path(folder, "figures").read_text().splitlines()]


def rank_main(rank: int, world: int, mbit: int, size: int, folder: str) -> None:
    """What runs on each rank, in its namespace if it has one; rank 0 writes a line for every system."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    x = 1e-9 * torch.randn(size // 4)  # summed up over and over
    part = torch.empty(size // 4 // world)
    calls = {system: system_call(system, x, part, size) for system in SYSTEMS[world, mbit]}
    times: dict[str, list[float]] = {system: [] for system in calls}
    sent = dict.fromkeys(calls, 0)
    for turn_number in range(1 + ROUNDS[mbit]):  # the first compiles and opens connections
        for system, call in calls.items():
            dist.barrier()
            before, start = bytes_sent(), time.perf_counter()
            call()
            if turn_number:
                times[system].append(1e3 * (time.perf_counter() - start))
            sent[system] = bytes_sent() - before
    dist.barrier()
    if rank == 0:
        lines = [f"{system}\t{statistics.median(times[system]):.2f}\t{sent[system] / 1e6:.2f}" for system in calls]
        Path(folder, "figures").write_text("\n".join(lines))
    dist.destroy_process_group()


def system_call(system: str, x: Tensor, part: Tensor, size: int) -> Callable[[], object]:
    """``codec.collective`` over `x`, or between it and this rank's `part` of it; "dist" sends in full."""
    codec, _, collective = system.partition(".")
    if collective == "ddp_hook":
        hook = bf16_compress_hook if codec.startswith("torch") else comm.ddp_hook(format=codec)
        bucket: Any = Bucket(x)
        return lambda: hook(dist.group.WORLD, bucket).wait()
    arguments = {"all_reduce": (x,), "reduce_scatter": (part, x), "all_gather": (x, part)}[collective]
    if codec == "dist":
        plain = {"all_reduce": dist.all_reduce, "reduce_scatter": dist.reduce_scatter_single}
        return functools.partial(plain.get(collective, dist.all_gather_single), *arguments)
    options: dict[str, Any] = {"codec": codec.split()[0]}
    if codec.endswith("if it pays"):
        options["link"] = comm.calibrate_link(codec=options["codec"])
        if dist.get_rank() == 0:
            print(
                comm.decide(collective, size // 4, x.dtype, dist.get_world_size(), comm.codec("int8"), options["link"])
            )
    return functools.partial(getattr(comm, collective), *arguments, **options)


def bytes_sent() -> int:
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def no_links() -> str:
    """Why no links can be made here; "" where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "links need Linux and root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"links need {' and '.join(missing)} of iproute2" if missing else ""


_LINKS = itertools.count()


@contextmanager
def link(world: int, mbit: int) -> Iterator[list[str]]:
    """Names of `world` network namespaces whose `eth0` sends at most `mbit` Mbit/s to the others."""
    number = f"{os.getpid()}.{next(_LINKS)}"  # those of the link before this one may not be gone yet
    bridge, names = f"qpb{number}", [f"qpass-{number}-{rank}" for rank in range(world)]
    try:
        ip(f"link add {bridge} type bridge")
        ip(f"link set {bridge} up")
        for rank, name in enumerate(names):
            ip(f"netns add {name}")
            ip(f"link add qpv{number}-{rank} type veth peer name eth0 netns {name}")
            ip(f"link set qpv{number}-{rank} master {bridge} up")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} addr add 10.77.0.{rank + 1}/24 dev eth0")
            ip(f"netns exec {name} tc qdisc add dev eth0 root tbf rate {mbit}mbit burst 256kb latency 100ms")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", choices=["codec", "link"])
    parser.add_argument("--ranks", type=int, help="only the links of so many ranks")
    parser.add_argument("--compiled", action="store_true", help="programs of torch.compile, and nothing else")
    parser.add_argument("--rounds", type=int, default=COMPILED_ROUNDS, help="steps of each compiled program")
    parser.add_argument("--transport", help=argparse.SUPPRESS)
    for name in ("--rank", "--rank-of", "--size", "--mbit"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of and options.compiled:
        import compiled_comm

        place = (options.rank, options.rank_of, options.folder)
        compiled_comm.rank_main(*place, options.transport, options.rounds, bytes_sent)
        return
    if options.rank_of:
        rank_main(options.rank, options.rank_of, options.mbit, options.size, options.folder)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # through every `finally`: links are removed
    if options.compiled:
        rows = compiled_rows(2, 1000, options.rounds)
        print_table(rows, ratio_of="communication", ratio_to="inductor")
        write_json(options.json, rows)
        return
    rows = []
    if options.only != "link":
        measured = codec_rows()
        print_table(measured, ratio_of="latency_median", ratio_to="copy")
        rows += measured
    if options.only != "codec":
        for world, mbit, size in LINKS:
            if options.ranks not in (None, world):
                continue
            measured = link_rows(world, mbit, size)
            print_table(measured, ratio_of="latency_median", ratio_to="dist.all_reduce")
            rows += measured
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
