"""Text to token ids and back: UTF-8 bytes, or any tokenizer of ``transformers``.

``transformers`` and ``tokenizers`` are imported when they are needed and not before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from talkoot.protocol import limits
from talkoot.protocol.errors import ConfigError

TokenizerKind = Literal["bytes", "hf"]

MAX_TOKENIZER_FILE: Final = 256 * limits.MIB
"""One ``tokenizer.json``; the largest in use are some 35 MB."""


class Tokenizer(Protocol):
    """What a corpus, a trainer and an export need of a tokenizer."""

    @property
    def kind(self) -> TokenizerKind:
        """Which family this is: what :func:`load_tokenizer` takes."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every id is below this; the model's embedding has at least as many rows."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def digest(self) -> str | None:
        """SHA-256 of the tokenizer's file, or ``None`` where the kind says it all."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without any special token."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte; the id is the byte's value. Needs no file and knows every text."""

    kind: Final[TokenizerKind] = "bytes"
    bos_id: Final = 256
    eos_id: Final = 257
    pad_id: Final = 258
    vocab_size: Final = 260  # a multiple of 4; 259 is never produced
    digest: Final[str | None] = None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; a lone surrogate, which UTF-8 cannot say, becomes ``?``."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")


class HfTokenizer:
    """A ``transformers`` tokenizer from a local directory, never from the network."""

    kind: Final[TokenizerKind] = "hf"

    def __init__(self, directory: Path) -> None:
        """Load it; code that comes with a tokenizer is never run.

        Raises:
            ConfigError: no usable tokenizer there, or one without an end-of-sequence token.
        """
        if not directory.is_dir():
            raise ConfigError(
                f"There is no tokenizer directory {directory}: name the folder that holds "
                "tokenizer.json.",
                code="tokenizer",
            )
        file = directory / "tokenizer.json"
        self.digest: Final = _file_digest(file) if file.is_file() else None
        from transformers import AutoTokenizer

        try:
            self.inner: Final[Any] = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as err:
            reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
            raise ConfigError(
                f"{directory} holds no tokenizer that transformers can load ({reason}): "
                "give a folder written by save_pretrained.",
                code="tokenizer",
            ) from err
        eos = self.inner.eos_token_id
        ids = self.inner.get_vocab().values()
        if not isinstance(eos, int) or not ids:
            raise ConfigError(
                f"The tokenizer in {directory} has no end-of-sequence token: set eos_token in "
                "its tokenizer_config.json, since documents are joined with it.",
                code="tokenizer",
            )
        self.eos_id: Final[int] = eos
        # A vocabulary may have holes, so its length is not what bounds an id.
        self.vocab_size: Final[int] = max(eos, *ids) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without any special token."""
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return [int(i) for i in self.inner.encode(clean, add_special_tokens=False, verbose=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(kind: str, path: Path | None = None) -> Tokenizer:
    """The tokenizer of ``kind``: ``bytes``, or ``hf`` from the local directory ``path``.

    Raises:
        ConfigError: unknown kind, or nothing usable at ``path``.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "hf":
        if path is None:
            raise ConfigError("An hf tokenizer needs a local directory: name it.", code="tokenizer")
        return HfTokenizer(path)
    raise ConfigError(f"No tokenizer kind is called {kind!r}: use bytes or hf.", code="tokenizer")


def save_for_export(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write ``tokenizer`` so that ``AutoTokenizer.from_pretrained(out_dir)`` gives the same ids.

    One exception, for bytes: beside a ``config.json`` of model type ``qwen2``, transformers 5.23
    insists on its own class, which composes Unicode (NFC) first; load such a folder with
    ``PreTrainedTokenizerFast.from_pretrained``.
    """
    if isinstance(tokenizer, ByteTokenizer):
        _byte_level_hf(tokenizer).save_pretrained(str(out_dir))
    elif isinstance(tokenizer, HfTokenizer):
        tokenizer.inner.save_pretrained(str(out_dir))
    else:
        raise ConfigError(
            f"A tokenizer of kind {tokenizer.kind} cannot be exported: use bytes or hf.",
            code="tokenizer",
        )


def _byte_level_hf(tokenizer: ByteTokenizer) -> Any:
    """:class:`ByteTokenizer` as a BPE of 256 bytes and no merge, in the ``tokenizers`` library.

    Special tokens written out in a text stay text (``split_special_tokens``), as they do in
    :class:`ByteTokenizer`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|eos|>", "<|pad|>", "<|unused|>"]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if [core.token_to_id(name) for name in specials] != list(range(256, tokenizer.vocab_size)):
        raise ConfigError(
            "This release of the tokenizers library numbers special tokens otherwise: "
            "install one that talkoot was tested with.",
            code="tokenizer",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[2],
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in byte-level BPE.

    Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2), section 2.2: a
    printable Latin-1 character stands for itself, the others for U+0100 and on, in order.
    """
    symbols: list[str] = []
    moved = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(256 + moved))
            moved += 1
    return symbols


def _file_digest(path: Path) -> str:
    """SHA-256 of a tokenizer file that is not absurdly large."""
    try:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_FILE:
            raise ConfigError(
                f"{path} has {size} bytes, over the cap of {MAX_TOKENIZER_FILE}: "
                "this is not a tokenizer.",
                code="tokenizer",
            )
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise ConfigError(
            f"Cannot read {path} ({err.strerror or err}): make it readable or name another folder.",
            code="tokenizer",
        ) from err
