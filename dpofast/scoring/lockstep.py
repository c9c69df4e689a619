"""Lockstep: passes without gradients of a model whose forwards are collectives, over rows that ranks share unequally.

Where FSDP2 or ZeRO-3 has sharded a model, a forward gathers weights from all processes, so all of them must run equally
many. A process announces each of its forwards, which costs one number on the CPU; one that has none left runs the model
on two tokens instead, until nobody has any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from dpofast.common.output import is_told, mark_as_told
from dpofast.common.ranks import Ranks
from dpofast.model.checks.images import images_refused
from dpofast.model.vision.idle import idle_image, with_idle_image
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import pack

# What a process without rows runs.
IDLE_EXAMPLE = {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0, 0]}
# What a process announces; the largest number of all decides.
_DONE, _FORWARD, _WITH_IMAGES, _FAILED = range(4)


class Lockstep:
    """Keeps the forwards of all processes equally many.

    Args:
        ranks: the processes whose forwards are collectives; all of them call the same methods.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Run nothing yet."""
        self._ranks = ranks.everyone

    def announced(self, batch: PackedBatch, model: Any) -> PackedBatch:
        """Wait until all processes are about to run a forward, or are done. Returns the batch to run, on the CPU.

        It has an idle image where another process has images, as calls of the vision tower are collectives too.

        Raises:
            Exception: that of another process that has failed.
        """
        with_images = batch.media is not None
        joined, _ = self._agree(_WITH_IMAGES if with_images else _FORWARD, batch, model)
        return joined

    @contextlib.contextmanager
    def until_all_are_done(self, model: Any, run: Callable[[PackedBatch], Any]) -> Iterator[None]:
        """Inside, this process announces and runs its forwards; at the end it runs idle ones while others have some.

        Args:
            model: decides whether idle batches can have an image.
            run: runs all models of the pass on a batch on the CPU, as it is run on the announced ones.

        Raises:
            Exception: that of another process that has failed.
        """
        try:
            yield
        except Exception as error:
            if not is_told(error):
                self._ranks.all_reduce_max(_FAILED)
                self._ranks.all_gather(error)
            raise
        idle = pack([IDLE_EXAMPLE], share="none")[0]
        while True:
            batch, most = self._agree(_DONE, idle, model)
            if most == _DONE:
                return
            run(batch)

    def _agree(self, own: int, batch: PackedBatch, model: Any) -> tuple[PackedBatch, int]:
        """The batch as the others need it, and the most that any process announced."""
        most = int(self._ranks.all_reduce_max(own))
        if most == _FAILED:
            raise mark_as_told(next(error for error in self._ranks.all_gather(None) if error is not None))
        if most == _WITH_IMAGES and batch.media is None and images_refused(model) is None:
            batch = with_idle_image(batch, idle_image(model))
        return batch, most
