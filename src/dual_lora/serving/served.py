"""The adapter that a vLLM server has, the ones that it knows by name, and how another takes the place of the loaded
one.

Only the factors are new. The base model's weights are read again from its own file, so that no swap leaves a trace:
back on an earlier adapter, the weights are what they were, bit for bit.
"""

import asyncio
import copy
import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .compose import ComposedWeights
from .files import AdapterError, checkpoint_of, version_of, version_of_files
from .turns import Turns
from .vllm import KEY, LIMIT, LOAD_FORMAT, Settings

logger = logging.getLogger(__name__)
LONGEST = 200  # characters of a name, which stands in lists, answers and logs
_NO_PART = {"", ".", ".."}  # of a name between slashes: paths of requests are shortened on their way
_CHECKING = threading.Lock()  # what makes a model without weights changes settings of the whole process meanwhile


class Adapter(NamedTuple):
    """A folder, and its files as they were when they were checked. kept: a temporary folder goes with its last use."""

    folder: str
    version: Any
    kept: Any = None


class ServedAdapters:
    """The adapters of one server, and whose turn it is.

    Attributes:
        main: the adapter that the server's own names have; None: the base model alone.
        named: further adapters by the names that requests give in `model`.
        loaded: the one whose weights the server has now.
        whole: False where its weights are those of no one model.
    """

    def __init__(self) -> None:
        self.turns = Turns(self._prepare)
        self.engine: Any = None
        self.main: Adapter | None = None
        self.named: dict[str, Adapter] = {}
        self.loaded: Adapter | None = None
        self.whole = True
        self.swapping = False
        self.limit_bytes = 0  # of composed weights, for each of the server's processes
        self._alone = True  # whether one process takes all requests
        self._base: Any = None  # the base's files as they were at the start
        self._cards: list[Any] = []  # vLLM's list of the names that it serves; the first one stands in answers
        self._own: list[Any] = []  # those that it began with
        self._loras: Mapping[str, Any] = {}  # vLLM's own adapters, by name
        self._shown: str | None = None
        self._listing: asyncio.Task[None] | None = None  # the loop itself holds no task

    async def start(self, engine: Any, models: Any, processes: int = 1) -> None:
        """Take what the server was started with. models: vLLM's list of its models. processes: that take requests."""
        self.engine, self._alone = engine, processes == 1
        self._cards, self._loras = models.base_model_paths, models.lora_requests
        self._own = list(self._cards)
        load = engine.vllm_config.load_config
        if load.load_format != LOAD_FORMAT:
            return
        self._base = _version_of_base(engine.vllm_config.model_config)
        settings = Settings.read(load.model_loader_extra_config)
        if settings.adapter is not None:
            self.main = self.loaded = Adapter(settings.adapter, version_of(settings.adapter))
        if settings.named or settings.limit_bytes:
            await self.give_names(settings.named, settings.limit_bytes)

    def left(self) -> str:
        """Say which adapter the server has."""
        if not self.whole:
            return "The server has parts of two models and answers nothing until a swap works."
        return f"The server has {_last_two_parts(self.main.folder) if self.main else 'the base model'}."

    async def swap(self, folder: str | None, kept: Any = None) -> None:
        """Swap the adapter of the server's own names; None: the base model alone. Waits for running requests.

        kept: held as long as the adapter is in use. Raises AdapterError with the server as it was.
        """
        self.check_start()
        wanted = None if folder is None else await self._checked(folder, kept)
        await self.turns.enter(object())
        try:
            try:
                self._check_files(wanted)
                await self._replace_adapter(wanted)
            except Exception:
                if self.whole and self.loaded is None:  # nor could the main adapter be loaded again
                    self.main = None
                raise
            self.main = wanted
        finally:
            self.turns.leave()

    async def give_names(
        self, named: Mapping[str, str | None], limit_bytes: int | None = None, kept: Any = None
    ) -> None:
        """Let requests ask for adapters by name; None takes a name away. All of them or, with AdapterError, none.

        limit_bytes: None leaves the limit as it is. kept: held as long as one of these adapters is in use.
        """
        self.check_names(named)
        adapters = {}
        for name, folder in named.items():
            try:
                if folder is not None:
                    adapters[name] = await self._checked(folder, kept)
            except AdapterError as error:
                raise AdapterError(f"{name}: {error}") from error
        for name in named:
            self.named.pop(name, None)
        self.named.update(adapters)
        self.limit_bytes = self.limit_bytes if limit_bytes is None else limit_bytes
        self.turns.forget_prepared()
        if not self.turns.running:
            self._show(self._shown)
            return
        # A running request may name a new one, which it came before: vLLM has to refuse it.
        listed = {card.name for card in self._cards}
        self._show(self._shown, [name for name in self.named if name in listed])
        self._listing = asyncio.ensure_future(self._list_all())

    async def _list_all(self) -> None:
        """Let vLLM list all names once the present requests have ended."""
        await self.turns.enter(object())
        self._show(self._shown)
        self.turns.leave()

    async def _prepare(self, name: Any) -> None:
        """Prepare for the requests that give this name; None: one of the server's own. An object(): for a swap."""
        if not isinstance(name, str | None):
            return
        if not self.whole:
            raise AdapterError(self.left())
        if name is not None and name not in self.named:
            raise AdapterError(f"The server no longer knows an adapter {name}.")
        wanted = self.main if name is None else self.named[name]
        if wanted != self.loaded:
            self._check_files(wanted)
            try:
                await self._replace_adapter(wanted)
            except Exception as error:
                raise RuntimeError(f"{wanted.folder if wanted else 'The base'} cannot be loaded: {error}") from error
        self._show(name)

    def _show(self, name: str | None, names: Iterable[str] | None = None) -> None:
        """Let vLLM list the names, that of the running requests first. names: of adapters; None: all."""
        self._shown = name if name in self.named else None
        if self._own:
            card = type(self._own[0])
            cards = [card(n, self.named[n].folder) for n in (self.named if names is None else names)]
            named = sorted(cards, key=lambda c: c.name != self._shown)
            self._cards[:] = [*named, *self._own] if self._shown else [*self._own, *named]

    async def _replace_adapter(self, wanted: Adapter | None) -> None:
        """Pause, load, resume. Where that fails, the server has what `_load_fallback` found."""
        await self.engine.pause_generation(mode="wait", clear_cache=True)
        self.whole, self.swapping = False, True
        try:
            await self._load(wanted)
        except Exception:
            await self._load_fallback()
            raise
        finally:
            self.swapping = False
            if self.whole:
                await self.engine.reset_prefix_cache()
                await self.engine.resume_generation()

    async def _load_fallback(self) -> None:
        """Load, after a failed swap, the adapter as before, or else the base model. If both fail, the server stays
        paused."""
        for known in dict.fromkeys((self.loaded, self.main, None)):
            try:
                await self._load(known)
            except Exception:
                logger.exception("%s cannot be loaded", known.folder if known else "The base model")
            else:
                return

    async def _load(self, adapter: Adapter | None) -> None:
        """Load the adapter. Raises AdapterError where the files are no longer those that were checked, or change while
        they are read."""
        self._check_files(adapter)
        extra = self.engine.vllm_config.load_config.model_loader_extra_config
        extra = {**extra, KEY: adapter and adapter.folder, LIMIT: self.limit_bytes}
        await self.engine.collective_rpc("update_config", args=({"load_config": {"model_loader_extra_config": extra}},))
        await self.engine.collective_rpc("reload_weights")
        self._check_files(adapter)
        self.loaded, self.whole = adapter, True

    def _check_files(self, adapter: Adapter | None) -> None:
        if adapter is not None and version_of(adapter.folder) != adapter.version:
            raise AdapterError(f"The files in {adapter.folder} have changed since they were checked: post it again.")
        if _version_of_base(self.engine.vllm_config.model_config) != self._base:
            raise AdapterError("The base model's files have changed since the server started: start it again.")

    def check_names(self, names: Iterable[str]) -> None:
        """Raise AdapterError for what cannot be the name of an adapter, or where no adapter can have one."""
        self.check_start()
        taken = {card.name for card in self._own} | set(self._loras)
        for name in names:
            if name in taken:
                raise AdapterError(f"{name!r} cannot be an adapter's name: the base model or a LoRA has it.")
            parts = name.split("/")
            if not name.isprintable() or len(name) > LONGEST or any(p.strip() != p or p in _NO_PART for p in parts):
                raise AdapterError(
                    f"{name[:LONGEST]!r} cannot be an adapter's name: expected up to {LONGEST} printable characters "
                    "without blanks at the ends, and between slashes neither nothing nor dots alone."
                )

    def check_start(self) -> None:
        """Raise AdapterError where the server cannot take an adapter at all."""
        if self.engine.vllm_config.load_config.load_format != LOAD_FORMAT:
            raise AdapterError(f"The server was started without --load-format {LOAD_FORMAT}.")
        if not self._alone:
            raise AdapterError(
                "Requests come in several processes, none of which knows what another has loaded: --api-server-count 1."
            )

    async def _checked(self, folder: str, kept: Any = None) -> Adapter:
        """Check a folder completely, before anything is changed."""
        version = version_of(folder)
        await asyncio.to_thread(_check, self.engine.vllm_config.model_config, folder)
        return Adapter(folder, version, kept)


def _last_two_parts(folder: str) -> str:
    """Shorten a folder to its last two parts: vLLM replaces whole paths in answers by <path>."""
    return "/".join(Path(folder).parts[-2:])


def _check(model_config: Any, folder: str) -> None:
    with _CHECKING:
        composed = ComposedWeights(copy.deepcopy(model_config.hf_config), folder)
    composed.check(checkpoint_of(_folder_of_base(model_config)))


def _folder_of_base(model_config: Any) -> Path:
    base = Path(model_config.model)
    if not base.is_dir():
        from huggingface_hub import snapshot_download

        base = Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
    return base


def _version_of_base(model_config: Any) -> Any:
    """Return what tells a base's files from others that have come in their place; None where there are none in a
    folder."""
    try:  # without the time of their last change of rights or links
        return [state[:-1] for state in version_of_files(_folder_of_base(model_config).glob("*.safetensors"))]
    except (OSError, ValueError):  # a name that no folder has; the hub's errors are of these kinds
        return None
