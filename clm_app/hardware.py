"""What this machine has and how busy it is, from psutil and NVIDIA's own library."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

GB = 1024**3
psutil.cpu_percent()  # the first reading is always 0; later ones say the load since the one before


@cache
def _nvml():
    """Return the loaded NVML binding, or None where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def gpus() -> list[dict]:
    """Return name, memory used and whole (GiB) and utilisation (0..100) of each NVIDIA GPU."""
    if (nvml := _nvml()) is None:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory, name = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetName(handle)
        found.append({
            "name": name if isinstance(name, str) else name.decode(), "memory_used_gb": memory.used / GB,
            "memory_gb": memory.total / GB, "utilisation": nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        })  # fmt: skip
    return found


def reading(folder: Path = Path(".")) -> dict:
    """Return the load now, and one sentence for the strip on the page. Memory in GiB, load in percent."""
    memory, disk, cards = psutil.virtual_memory(), psutil.disk_usage(str(folder)), gpus()
    cores, load = psutil.cpu_count() or 1, psutil.cpu_percent()
    gpu = "; ".join(
        f"{c['name']} at {c['utilisation']} %, {c['memory_used_gb']:.1f} of {c['memory_gb']:.0f} GB" for c in cards
    )
    used = (memory.total - memory.available) / GB
    return {
        "cpu_percent": load, "cores": cores, "memory_used_gb": used, "memory_gb": memory.total / GB,
        "disk_free_gb": disk.free / GB, "gpus": cards,
        "sentence": f"{cores} cores at {load:.0f} %, {used:.1f} of {memory.total / GB:.0f} GB memory, "
                    f"{disk.free / GB:.0f} GB disk free, {gpu or 'no GPU found'}",
    }  # fmt: skip


def description() -> dict:
    """Return what a run's row says of its machine: system, processor, cores, memory in GiB, GPUs."""
    return {
        "system": platform.platform(), "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "gpus": [card["name"] for card in gpus()],
    }  # fmt: skip


@cache
def libraries() -> dict[str, str]:
    """Return the versions that decide what a run does, without importing any of them."""
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
