"""Tests of dpofast/common."""
