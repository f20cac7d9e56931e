"""Settings of a reply that need no other module."""

from __future__ import annotations

# The length of a reply where neither the call nor the checkpoint sets one: the usual default of 20
# tokens would cut every answer off.
DEFAULT_MAX_NEW_TOKENS = 1024
