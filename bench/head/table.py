"""The figures of one mode as text."""

from typing import Any

from bench.head.floor import FLOOR
from bench.head.problem import MODES
from bench.timing import spread


def _ratio(row: dict[str, Any], name: str) -> str:
    """A percentile of the ratios to the floor; older records have none."""
    return f" {row['floors_spread'][name]:7.3f}" if "floors_spread" in row else f"{'-':>8}"


def _seconds(times: dict[str, float]) -> str:
    return "".join(f"{times[name]:9.4f}" for name in ("median", "p20", "p80"))


def table(mode: str, result: dict[str, Any]) -> str:
    """One mode's figures as text."""

    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / 2**20:.0f}"

    floor = spread(result["floor_s"])
    titles = f"{'least s':>9}{'median':>9}{'p20':>9}{'p80':>9}{'GEMMs':>8}{'MiB':>8}{'seen MiB':>10}{'off by':>9}"
    lines = [
        f"{mode:18}{'x floor':>9}{'p20':>8}{'p80':>8}{titles}",
        f"{FLOOR:18}{1:9.3f}{'':16}{min(result['floor_s']):9.4f}{_seconds(floor)}{1 + len(MODES[mode]):8.2f}",
    ]
    for name, row in result["contenders"].items():
        units = "-" if row["gemm_units"] is None else f"{row['gemm_units']:.2f}"
        off = "-" if row["errors"]["logps"] is None else f"{row['errors']['logps']:.0e}"
        ratio = f"{row['floors']:9.3f}{_ratio(row, 'p20')}{_ratio(row, 'p80')}"
        lines.append(
            f"{name:18}{ratio}{min(row['seconds']):9.4f}{_seconds(spread(row['seconds']))}"
            f"{units:>8}{mib(row['counted_bytes']):>8}{mib(row['seen_bytes']):>10}{off:>9}"
            + (f"  WRONG: {row['wrong']}" if row["wrong"] else "")
        )
    return "\n".join(lines + [f"{name:18} did not run: {reason}" for name, reason in result["failed"].items()])
