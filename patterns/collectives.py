"""Collectives: what is sent as payloads or codes in the place of values; the rules are those of `comm.graph.rules`."""

from __future__ import annotations

from qpass.comm.graph.rules import COLLECTIVES

__all__ = ["COLLECTIVES"]
