"""The README's figures, rewritten from bench/results.

python -m bench.readme              # after a benchmark has recorded something
python -m bench.readme --check      # exit code 1 where they are stale; tests/test_docs.py does the same
"""

import argparse
import sys
from pathlib import Path

from bench.markdown import evidence_table, summary

README = Path(__file__).parent.parent / "README.md"
PARTS = {"summary": summary, "evidence": evidence_table}


def refreshed(text: str) -> str:
    """Return the README's text with the content between each pair of markers regenerated.

    Raises:
        ValueError: a marker of a part does not occur exactly once.
    """
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}: python -m bench.readme -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md: expected {begin} and {end}, once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0, or 1 for --check and a stale text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    text = README.read_text("utf-8")
    fresh = refreshed(text)
    if check and fresh != text:
        print("README.md is stale: python -m bench.readme", file=sys.stderr)
        return 1
    if not check:
        README.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
