"""Protocol version and every byte cap, in one place. Sizes are bytes unless the name says more.

A cap is checked *before* memory is allocated for what it bounds. What a peer says about a size is a
claim; the cap is what holds.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 2
"""Raised by every change that an older peer would misread. Peers of another version are refused."""

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# Control plane ----------------------------------------------------------------------
MAX_CONTROL_MESSAGE: Final = 64 * KIB
"""One message through the SuperLink, and one request or reply body of the gateway."""
MAX_UPDATE_CHAIN: Final = 256
"""Updates that one version reference names; with the blocks of a lease they fit a message."""
MAX_MIRRORS: Final = 16
MAX_URL_CHARS: Final = 512
MAX_NAME_CHARS: Final = 64
MAX_CSR: Final = 8 * KIB
MAX_AUTHORITIES: Final = 3
"""CAs that a node trusts at once: two while one follows another."""
MAX_SENTENCE_CHARS: Final = 2_000
"""Any human-readable sentence that crosses the wire."""

# Data plane ----------------------------------------------------------------------
TRANSFER_CHUNK: Final = 1 * MIB
"""Bytes in one streamed gRPC message."""
MAX_TRANSFER_MESSAGE: Final = TRANSFER_CHUNK + 64 * KIB
"""Largest gRPC message that either side accepts."""
PIECE: Final = 16 * MIB
"""Bytes that are verified at a time while an artifact streams in (``pieces.py``)."""
MAX_ARTIFACT: Final = 64 * GIB
"""Any single artifact: a dense fp32 checkpoint of a 7B-class model (28 GB) and room to grow."""
MAX_JSON_ARTIFACT: Final = 16 * MIB
"""A JSON artifact (model config, manifest, corpus manifest), which is read into memory whole."""
MAX_SAFETENSORS_HEADER: Final = 32 * MIB
"""The JSON header of a safetensors file: thousands of tensors need a few MiB."""

# Model ----------------------------------------------------------------------
MAX_TENSORS: Final = 65_536
MAX_TENSOR_DIMS: Final = 8
MAX_TENSOR_NAME_CHARS: Final = 256
MAX_TENSOR_ELEMENTS: Final = 2**34
MAX_PARAMETERS: Final = 2**37

# Codec ----------------------------------------------------------------------
MAX_CHUNK: Final = 65_536
MAX_VALUE_BITS: Final = 8

# Data ----------------------------------------------------------------------
MAX_BLOCK: Final = 16 * MIB
"""One block of tokens."""
MAX_BLOCKS: Final = 2**26
MAX_LEASE_BLOCKS: Final = 512
"""Blocks in one lease; with 64 KiB a control message this keeps a task well inside its cap."""
