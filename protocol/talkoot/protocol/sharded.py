"""Weights of a local transformers directory, one tensor at a time, however many files hold them.

``model.safetensors``, or ``model.safetensors.index.json`` with its shards (the ``weight_map`` of
Hugging Face's save_pretrained). The directory is the operator's own, so files are mapped by the
safetensors library; nothing is unpickled. Memory is that of one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from talkoot.protocol.errors import ConfigError
from talkoot.protocol.limits import MAX_JSON_ARTIFACT

if TYPE_CHECKING:
    from torch import Tensor

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


class ShardedWeights:
    """The tensors of a directory by name.

    Raises :class:`ConfigError` (code ``no-model``) when there are none, or a shard is missing,
    named outside the directory, or no safetensors file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}
        index = directory / INDEX
        if index.exists():
            for name, shard in self._weight_map(index).items():
                if Path(shard).name != shard:
                    raise self._bad(f"{INDEX} names {shard[:80]!r}, which is not beside it")
                self._files[name] = directory / shard
        else:
            self._files = dict.fromkeys(self._names_of(directory / SINGLE), directory / SINGLE)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor, from the headers alone."""
        from safetensors import SafetensorError, safe_open

        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        if self._files.get(name) == path:
                            found[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as err:
                raise self._bad(f"{path.name}: {err}") from err
        missing = self._files.keys() - found.keys()
        if missing:
            raise self._bad(f"{INDEX} names {min(missing)}, and its shard has no such tensor")
        return found

    def holds(self, wanted: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether every wanted tensor is there under its name, in its shape.

        It is not when transformers renames or joins tensors as it loads them, as it does for some
        families of experts; then only it can load the directory. A tied head may be there as well.
        """
        shapes = self.shapes()
        return all(shapes.get(name) == shape for name, shape in wanted.items())

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU, in the dtype of the file."""
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as err:
            raise self._bad(f"{path.name}: {err}") from err

    def _weight_map(self, index: Path) -> dict[str, str]:
        try:
            if index.stat().st_size > MAX_JSON_ARTIFACT:
                raise self._bad(f"{INDEX} is too big")
            found = json.loads(index.read_bytes())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise self._bad(f"{INDEX} is not the index of a sharded model") from err
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise self._bad(f"{INDEX} is not the index of a sharded model")
        return found

    def _names_of(self, path: Path) -> list[str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except (OSError, SafetensorError) as err:
            raise self._bad(f"{path.name}: {err}") from err

    def _bad(self, what: str) -> ConfigError:
        return ConfigError(
            f"The weights in {self._directory} cannot be loaded ({what}): export the model again "
            "as safetensors.",
            code="no-model",
        )
