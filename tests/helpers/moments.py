"""Texts of which second moments are collected."""

from __future__ import annotations

from tiny import TEXT

TEXTS = [line[:80] for line in TEXT.splitlines() if line]
