"""The models that a server offers: names, and what their manifests say. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.bundle import Bundle, ModelFacts, open_bundle
from ..engine.errors import BundleError, NotFound, RequestError
from .shelf import Mark, mark_of


@dataclass(frozen=True)
class Model:
    name: str
    path: Path
    bundle: Bundle
    mark: Mark | None

    @property
    def facts(self) -> ModelFacts:
        return self.bundle.facts

    @property
    def title(self) -> str:
        """As AUTOMATIC1111 names a checkpoint: `name [first ten digits of its hash]`."""
        return f"{self.name} [{self.hash}]"

    @property
    def hash(self) -> str:
        return self.facts.source.sha256[:10]


class Models:
    """paths    name -> bundle; the first is meant where none is named"""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """Raises BundleError, StorageError for one that cannot be opened."""
        self._models = {name: _read(name, path) for name, path in paths.items()}
        self.default = next(iter(paths))

    def __iter__(self) -> Iterator[Model]:
        """Read anew where a bundle has changed."""
        return iter([self._fresh(name) for name in self._models])

    def find(self, name: str | None) -> Model:
        """By name, title or hash; None is the default. Only of the list. Raises NotFound."""
        if name is None or name in self._models:
            return self._fresh(self.default if name is None else name)
        for model in self._models.values():
            if name in (model.title, model.hash, model.facts.source.sha256):
                return self._fresh(model.name)
        raise NotFound(
            f"there is no model {name[:80]!r} here", hint=f"it has {', '.join(self._models)}"
        )

    def _fresh(self, name: str) -> Model:
        """A bundle that is gone, or broken, is still what its worker has open."""
        model = self._models[name]
        mark = mark_of(model.path)
        if mark is not None and mark != model.mark:
            try:
                self._models[name] = _read(name, model.path)
            except BundleError:
                return model
        return self._models[name]


def _read(name: str, path: Path) -> Model:
    mark = mark_of(path)
    return Model(name, path, open_bundle(path), mark)


def split(option: str) -> tuple[str | None, str]:
    """`NAME=PLACE` -> both; a place alone, even one with = in it, has no name yet."""
    name, given, place = option.partition("=")
    if not given or "/" in name or Path(option).exists():
        return None, option
    return name, place


def named(options: Sequence[str], find: Mapping[str, Path]) -> dict[str, Path]:
    """`NAME=PLACE` or `PLACE` -> name -> bundle.

    find        place -> its bundle
    raises      RequestError when two have one name
    """
    paths: dict[str, Path] = {}
    for option in options:
        name, place = split(option)
        found = find[place]
        name = found.name if name is None else name
        if name in paths:
            raise RequestError(
                f"two models are called {name!r}",
                hint=f"give one another name: --model other={place}",
            )
        paths[name] = found
    return paths
