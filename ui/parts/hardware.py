"""The hardware strip: what this machine has and how busy it is, in one line."""

from __future__ import annotations

from ui.parts.words import safe


def hardware_strip(reading: dict) -> str:
    """Return the machine's load as small labelled bars; says plainly that no GPU was found."""
    memory = reading["memory_used_gb"] / reading["memory_gb"]
    parts = [
        _meter("CPU", reading["cpu_percent"] / 100, f"{reading['cores']} cores, {reading['cpu_percent']:.0f} %"),
        _meter("Memory", memory, f"{reading['memory_used_gb']:.1f} of {reading['memory_gb']:.0f} GB"),
    ]
    for gpu in reading["gpus"]:
        used = f"{gpu['memory_used_gb']:.1f} of {gpu['memory_gb']:.0f} GB, {gpu['utilisation']} % busy"
        parts.append(_meter(gpu["name"], gpu["memory_used_gb"] / gpu["memory_gb"], used))
    parts.append(f"<span><b>Disk</b> {reading['disk_free_gb']:.0f} GB free</span>")
    if not reading["gpus"]:
        parts.append("<span>no GPU found</span>")
    return f'<div class="clm-strip" aria-label="This machine: {safe(reading["sentence"])}">{"".join(parts)}</div>'


def _meter(name: str, share: float, said: str) -> str:
    full = ' class="full"' if share > 0.9 else ""
    bar = f'<i{full} style="--share:{min(share, 1):.3f}" aria-hidden="true"></i>'
    return f"<span><b>{safe(name)}</b>{bar}{safe(said)}</span>"
