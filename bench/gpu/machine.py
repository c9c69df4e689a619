"""The GPU that is measured: its name and driver, and its clocks, power and temperature while a part runs.

`python -m bench.gpu.machine` prints the first as JSON: asking takes a CUDA context, which ends with that process.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of nvidia-smi, sampled twice a second.
SAMPLED = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
    "busy_percent": "utilization.gpu",
}
INTERVAL_MS = 500
ROOT = Path(__file__).resolve().parents[2]


def query(*fields: str, device: str) -> list[str]:
    """The command that asks nvidia-smi for these fields of a device."""
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", device]


def described() -> dict[str, Any]:
    """What `gpu` returns, asked by another process; where that fails, `name` says why."""
    try:
        said = subprocess.run(
            [sys.executable, "-m", "bench.gpu.machine"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        return json.loads(said.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"name": f"not known: {error}"}


def gpu() -> dict[str, Any]:
    """The device that torch uses by default, and its driver; `driver` says why where nvidia-smi cannot be asked."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts = {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda or torch.version.hip,
        "id": f"GPU-{properties.uuid}",
    }
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    try:
        said = subprocess.run(query(*fields, device=facts["id"]), capture_output=True, text=True, timeout=20)
        values = said.stdout.strip().split(", ")
        if said.returncode or len(values) != len(fields):
            raise OSError((said.stdout + said.stderr).strip()[:200])
    except (OSError, subprocess.TimeoutExpired) as error:
        return {**facts, "driver": f"not known: {error}"}
    return {**facts, **dict(zip(("driver", "most_sm_mhz", "most_memory_mhz", "most_watts"), values, strict=True))}


@contextlib.contextmanager
def watched(device: str | None) -> Iterator[dict[str, Any]]:
    """Sample the device while the body runs; the yielded dict is filled afterwards, or says why it is not.

    Args:
        device: nvidia-smi's name of it; None: nothing is sampled.
    """
    figures: dict[str, Any] = {}
    if device is None:
        yield figures
        return
    with tempfile.TemporaryFile("w+") as stream:
        command = [*query(*SAMPLED.values(), device=device), "-lms", str(INTERVAL_MS)]
        try:
            sampler = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        except OSError as error:
            figures["absent"] = str(error)
            yield figures
            return
        try:
            yield figures
        finally:
            sampler.kill()
            sampler.wait()
            stream.seek(0)
            figures |= clocks(stream.read())


def clocks(said: str) -> dict[str, Any]:
    """Spreads of what nvidia-smi sampled while the GPU was at least half busy, and how many samples these are."""
    from bench.timing import spread

    samples = []
    for line in said.splitlines():
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError:  # cut while it was written, or a field that this device does not have
            continue
        if len(values) == len(SAMPLED):
            samples.append(dict(zip(SAMPLED, values, strict=True)))
    busy = [sample for sample in samples if sample["busy_percent"] >= 50]
    if not busy:
        last = said.strip().splitlines()[-1:] or ["nvidia-smi said nothing"]
        return {"absent": f"no sample of a busy GPU among {len(samples)}; the last: {last[0][:200]}"}
    names = [name for name in SAMPLED if name != "busy_percent"]
    return {"samples": len(busy), **{name: spread([sample[name] for sample in busy]) for name in names}}


def clocks_line(figures: dict[str, Any]) -> str:
    """A part's clocks in one line."""
    if "absent" in figures:
        return f"clocks not known: {figures['absent']}"
    if not figures:
        return "clocks not sampled"
    values = (
        f"{name} {figures[name]['median']:.0f} ({figures[name]['p20']:.0f} to {figures[name]['p80']:.0f})"
        for name in SAMPLED
        if name in figures
    )
    return f"{', '.join(values)}; {figures['samples']} samples"


if __name__ == "__main__":
    print(json.dumps(gpu()))
