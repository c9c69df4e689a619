"""Constants that several packages share."""

from __future__ import annotations

IGNORE_INDEX = -100
