"""The figures of one mode as text."""

from typing import Any

from bench.head.floor import FLOOR
from bench.head.problem import MODES
from bench.timing import spread


def table(mode: str, result: dict[str, Any]) -> str:
    """One mode's figures as text."""

    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / 2**20:.0f}"

    floor = spread(result["floor_s"])
    lines = [
        f"{mode:18}{'x floor':>9}{'least s':>9}{'median':>9}{'p20':>9}{'p80':>9}{'GEMMs':>8}{'MiB':>8}{'seen MiB':>10}"
        f"{'off by':>9}",
        f"{FLOOR:18}{1:9.2f}{min(result['floor_s']):9.4f}{floor['median']:9.4f}{floor['p20']:9.4f}{floor['p80']:9.4f}"
        f"{1 + len(MODES[mode]):8.2f}",
    ]
    for name, row in result["contenders"].items():
        step = spread(row["seconds"])
        units = "-" if row["gemm_units"] is None else f"{row['gemm_units']:.2f}"
        off = "-" if row["errors"]["logps"] is None else f"{row['errors']['logps']:.0e}"
        lines.append(
            f"{name:18}{row['floors']:9.2f}{min(row['seconds']):9.4f}{step['median']:9.4f}{step['p20']:9.4f}"
            f"{step['p80']:9.4f}{units:>8}{mib(row['counted_bytes']):>8}{mib(row['seen_bytes']):>10}{off:>9}"
            + (f"  WRONG: {row['wrong']}" if row["wrong"] else "")
        )
    return "\n".join(lines + [f"{name:18} did not run: {reason}" for name, reason in result["failed"].items()])
