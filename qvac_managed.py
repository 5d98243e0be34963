"""Use local QVAC models from Python: one file, no dependencies, copy it into your project.

It starts `qvac serve --openai` when it is first needed, shares one warm serve among all processes
that want the same models, keeps it alive while anybody uses it, brings it back when it dies, and
stops it when nobody is left.

    import qvac_managed

    with qvac_managed.create_qvac("managed", models=["qwen3.5-2b"]) as qvac:
        print(qvac.chat("Say hello in five words."))

Who is who; every `====` is the border of a process:

    caller (your program)            runner (one per serve)             serve (`qvac serve`)
    ====================  spawns  ===========================  spawns  =======================
    create_qvac()         ------> this very file, re-executed  ------> HTTP on 127.0.0.1:PORT
      marker, record, lock          writes and owns the record           its own process group,
      open() ------------------------- HTTP, bearer key -------------->  with its `bare` worker
    ====================          detached: outlives caller            ends with its runner

A caller registers a marker, reads the record and attaches; if there is no live serve, it takes the
spawn lock and starts a runner. The runner starts the serve, publishes the record, restarts a serve
that dies in use, and reaps it once nobody has used it for the idle timeout. A second caller with
the same models (from Python or from the JavaScript provider, npm @qvac/ai-sdk-provider) finds the
record and shares the serve.

File in ~/.qvac/managed-serves/     what it is                    who writes it    who deletes it
($QVAC_MANAGED_DIR)
KEY.json                            record of a running serve     runner [1]       runner, a sweep, a stop
KEY.consumers/PID.RAND              marker of a live consumer     the consumer     it; who finds it dead
KEY.lock                            spawn lock                    spawner, runner  same; a stealer, a sweep
KEY.error                           why the last start failed     runner           the next spawner [2]
KEY.PID.RAND.runner-params.json     hand-off to the runner        spawner          runner, spawners, a sweep
KEY.RAND.d/                         serve's config and key file   spawner, runner  runner, spawners, a sweep
KEY.log                             output of serve and runner    serve, runner    a sweep, when old [3]
KEY.*.tmp, KEY.*.stale              on its way in, or out         anybody          its maker, a sweep
registry.guard                      held for short sections       anybody          nobody
[1] A client that wants a longer idle timeout writes it into the record; the longest wish wins.
[2] And who was told of the failure, if nobody else waits to read it; a sweep, when old.
[3] A private serve's by its runner, unless it failed.

Index: create_qvac create_qvac_async Qvac ManagedQvac ManagedModel Progress show_progress ECHO
       Answer Piece Stream AsyncStream
       list_serves stop_serve sweep_serves serve_info ServeInfo find_cli
       QVAC_CATALOG find_catalog_entry is_catalog_id resolve_model_constant all_models
       catalog_entries_with_unknown_constant, the errors (section 3), main

Sections: 1 header, 2 constants, 3 errors, 4 catalog and model specs, 5 serve config and fleet key,
6 platform, 7 registry, 8 guard and spawn lock, 9 HTTP, 10 serve process, 11 runner, 12 clients and
public verbs, 13 echo serve, 14 command line, 15 model table, 16 main guard. Each uses only what
stands above it. Section 4 alone looks further, when it is called: into the generated model table,
and with find_cli into the installed SDK for a constant that the table lacks. (The command that
starts a runner, in section 6, names its entry in section 16, for another process.)

Names outside the index are internal even without an underscore: sections share them. Five are not used
here (is_process_alive, remove_consumer, health_check, allocate_free_port, find_reusable_serve): they are
the provider's names for what we do in another way, for whoever compares the two.

Heavy modules (urllib, json, subprocess ...) are imported inside the functions that need them:
importing this file has to stay cheap, and the runner, which lives long, has to stay small.
"""
# SPDX-License-Identifier: Apache-2.0
# Copyright qvac_managed contributors. Licence: https://www.apache.org/licenses/LICENSE-2.0

from __future__ import annotations

import _thread
import errno
import os
import sys
import time
from collections import namedtuple

TYPE_CHECKING = False  # read as True by type checkers; `typing` itself is never imported
if TYPE_CHECKING:
    import asyncio, atexit, binascii, ctypes, difflib, fnmatch, functools, hashlib, http.client, itertools, json, logging, msvcrt  # noqa: E401
    import pwd, queue, re, select, shlex, shutil, signal, socket, struct, subprocess, tempfile, termios, threading  # noqa: E401
    import types, urllib.error, urllib.parse, urllib.request  # noqa: E401
    from ctypes import wintypes
    from typing import (Any, BinaryIO, Callable, Dict, Iterator, List, Literal, Mapping, NamedTuple,
                        Optional, Protocol, Sequence, Set, Tuple, TypeVar, Union, overload)  # fmt: skip

    Client = TypeVar("Client", bound="Qvac")
    Models = Sequence[Union[str, Mapping[str, Any]]]
    Path = Union[str, os.PathLike[str], None]
    Prompt = Union[str, Mapping[str, Any], Sequence[Mapping[str, Any]], Iterator[Mapping[str, Any]]]

    class Opener(Protocol):
        def open(self, fullurl: urllib.request.Request, /, *, timeout: Optional[float] = None) -> Any: ...

if not TYPE_CHECKING:

    class _Lazy:
        """A module, imported when it is first used. It then takes the place of this name, but for a package."""

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, attribute: str) -> Any:
            if self.__name__ in ("http", "urllib"):
                found = self.__dict__[attribute] = __import__("%s.%s" % (self.__name__, attribute), fromlist=["*"])
                return found
            module = __import__(self.__name__, fromlist=["*"])
            globals()[self.__name__.rpartition(".")[2]] = module
            return getattr(module, attribute)

    for _name in (
        "asyncio atexit binascii ctypes difflib fnmatch functools hashlib http itertools json logging msvcrt "
        "pwd queue re select shlex shutil signal socket struct subprocess tempfile termios "
        "threading types urllib ctypes.wintypes"
    ).split():
        globals()[_name.rpartition(".")[2]] = _Lazy(_name)

    class _TypingName:
        """`Optional` and the like: `typing` is imported when somebody evaluates an annotation (get_type_hints)."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self) -> Any:
            return getattr(__import__("typing"), self.name)

        def __getitem__(self, key: Any) -> Any:
            def real(part: Any) -> Any:
                if isinstance(part, (tuple, list)):
                    return type(part)(map(real, part))
                return part() if isinstance(part, _TypingName) else part

            return self()[real(key)]

    Client = Models = OnProgress = Opener = Path = Prompt = object  # said better where checkers look
    for _name in "Any Callable Dict Iterator List Literal Mapping NoReturn Optional Sequence Tuple Union".split():
        globals()[_name] = _TypingName(_name)

__version__ = "0.1.0"

__all__ = [
    # starting and using
    "create_qvac", "create_qvac_async", "Qvac", "ManagedQvac", "ManagedModel", "Progress", "show_progress", "ECHO",
    # answers
    "Answer", "Piece", "Stream", "AsyncStream",
    # looking after serves
    "list_serves", "stop_serve", "sweep_serves", "serve_info", "ServeInfo", "find_cli",
    # the catalog
    "QVAC_CATALOG", "find_catalog_entry", "is_catalog_id", "resolve_model_constant", "all_models",
    "catalog_entries_with_unknown_constant",
    # errors
    "QvacManagedModeError", "UnknownManagedModelError", "DuplicateManagedModelError",
    "MultipleDefaultManagedModelsError", "InvalidManagedModelError", "CliNotFoundError",
    "ServeSpawnFailedError", "ServeStartTimeoutError", "ServeExitedError",
    "PortAllocationFailedError", "ModelLoadFailedError", "RegistryError", "ServeHTTPError", "AnswerCutShortError",
    # the command line
    "main",
]  # fmt: skip


# ==================================================================================================
# 2. Constants
# ==================================================================================================

DEFAULT_BASE_URL = "http://127.0.0.1:11434/v1"  # where `qvac serve --openai` listens by default
DEFAULT_API_KEY = "qvac"  # external mode: OpenAI-shaped clients want some key
DEFAULT_HOST = "127.0.0.1"
DEFAULT_START_TIMEOUT = 180.0  # seconds without progress: a cold model may load for minutes
DEFAULT_IDLE_TIMEOUT = 300.0  # seconds a serve outlives its last user, so that the next finds it warm
DEFAULT_SLEEP_TIMEOUT = 900.0  # seconds without a request after which a serve in use gives its memory back
DEFAULT_CONTEXT = 1024  # tokens, when a model's config has no ctx_size: the CLI's own default
CONTEXT_STEP = 256  # tokens: the engine rounds a context up to a multiple of this
PROMPT_FRAME = 300  # tokens that a chat template may add to what is sent: a system prompt of its own, marks
SILENT_STREAM = 3.0  # seconds without a word after which a stream is suspected to have died of its prompt's length
ECHO = "qvac-managed:echo"  # as serve_bin_path: the built-in echo serve (section 13)

FLEET_PROTOCOL_VERSION = 2  # the provider's; in every fleet key
NEVER_MS = 2**53 - 1  # idleTimeoutMs for "until stopped": the largest integer of a JSON double
CONFIG_NAME, KEY_FILE_NAME, STOP_NAME = "qvac.config.json", "serve-api-key", "stop"  # in KEY.RAND.d
MAX_FILE_BYTES = 64 * 1024  # a larger file in the registry is nobody's record
MAX_BODY_BYTES = 4 * 1024 * 1024  # a longer answer to GET /v1/models is no model list
MAX_SDK_REGISTRY_BYTES = 64 * 1024 * 1024  # of the SDK's list of models; the real one is 1 MB
LOG_READ_BYTES = 64 * 1024  # how much of the end of a log is looked at at once
READ_BYTES = 64 * 1024  # of an answer at once
STILL_DOWNLOAD = 20.0  # seconds after which a download that does not grow is called that
_PLAIN_INTERVAL = 10.0  # seconds between two progress lines where they cannot be drawn over
_RATE_WINDOW = 5.0  # seconds a download rate is averaged over: steady to look at, and soon right again
MAX_ANSWER_BYTES = 256 * 1024 * 1024  # a longer answer is cut, and so no JSON
MAX_LOG_BYTES = 4 * 1024 * 1024  # KEY.log is cut to its newest quarter beyond this
TAIL_CHARS = 4000  # how much of the log goes into an error

HEALTH_TIMEOUT = 2.0  # seconds for one health check; no answer by then means busy, not dead
SWEEP_LIMIT = 1.0  # seconds for which a sweep delays a start: to read records, and again for orphans to answer
CLOSING_WAIT = 10.0  # seconds a live serve may refuse connections (its end or restart) before it is a miss
CLIENT_MARGIN = 10.0  # seconds a client waits for its own runner beyond the start timeout, which that one keeps
WAITER_MARGIN = 2.0  # seconds beyond it for the runner of another client to say why it failed
GUARD_TIMEOUT = 10.0  # seconds; sections under the guard take milliseconds, so its holder is stopped
UNWATCHED_START = 30.0  # seconds a first start goes on for nobody: without a marker none can know of it
LOCK_STALE = 30.0  # seconds after which a lock whose owner cannot be read may be stolen
LOCK_REREAD = 0.25  # seconds after which a provider that stole our lock has shown itself; a start looks that often
HEARTBEAT = 20.0  # seconds between touches of lock and record: other namespaces see only these
FOREIGN_LOCK_STALE = 3 * HEARTBEAT  # seconds without one after which another namespace's lock is dead
UNUSABLE_REAP = 180.0  # seconds beyond the idle timeout after which a serve is reaped though its folder is unusable
FOREIGN_STALE = 180.0  # seconds without a heartbeat after which another namespace's file is dead
PARAMS_STALE = 360.0  # seconds after which no runner can still be about to read its parameters
LEFTOVER_STALE = 3600.0  # seconds after which folders, temp files and errors without owner are swept
LOG_STALE = 7 * 24 * 3600.0  # seconds a log outlives its serve
CLOCK_SLACK = 2 * 3600.0  # seconds the wall clock may have been set by, when file times must do

RUNNER_TICK = 0.5  # seconds between looks at the consumers: bounds how late a reap can be
CONNECTIONS_TICK = 5.0  # seconds between looks at connections, at most: one takes 0.5 ms, with `netstat` 20
PARENT_TICK = 1.0  # seconds between looks at the parent for close_on_parent_exit
STOP_GRACE = 5.0  # seconds between SIGTERM and SIGKILL, the provider's own
GROUP_GRACE = 1.0  # seconds the serve's worker gets to follow it; the real one needs 0.05
WITHDRAW_PAUSE = 0.15  # seconds between withdrawing a record and the last look for provider clients
RESTART_BACKOFF = (0.0, 0.25, 1.0, 3.0, 3.0)  # seconds before the 1st, 2nd ... restart of a crash loop
STABLE_AFTER = 10.0  # seconds of service after which a crash starts a new loop
PORT_ATTEMPTS = 3  # ports tried when another program takes the chosen one


# ==================================================================================================
# 3. Errors
# ==================================================================================================


_OUTPUT_MARK = "--- its output ---\n"  # in messages and in KEY.error, where _error_from_text() looks for it


class QvacManagedModeError(Exception):
    """Base of every error of this module. `code` is stable; facts are attributes."""

    code = "QVAC_MANAGED"


class UnknownManagedModelError(QvacManagedModeError):
    """Model names that are neither catalog ids nor constants: all of them in `unknown_models`."""

    code = "UNKNOWN_MODEL"

    def __init__(self, unknown_models: Sequence[str], hints: Mapping[str, Sequence[str]] = {}) -> None:
        super().__init__(list(unknown_models), dict(hints))
        self.unknown_models = list(unknown_models)
        self.hints = {name: list(names) for name, names in hints.items()}

    def __str__(self) -> str:
        if not self.unknown_models:
            return "No models given: name at least one, such as models=['qwen3.5-2b']."
        shown = []
        for name in self.unknown_models:
            near = self.hints.get(name)
            shown.append(_shorten(repr(name), 120) + (" (did you mean %s?)" % " or ".join(near) if near else ""))
        return "Unknown QVAC model%s: %s. `python -m qvac_managed models` lists what there is." % (
            "s" if len(shown) > 1 else "", ", ".join(shown))  # fmt: skip


class DuplicateManagedModelError(QvacManagedModeError):
    """The same name twice: each name becomes one alias of the serve. See `duplicate_models`."""

    code = "DUPLICATE_MODEL"

    def __init__(self, duplicate_models: Sequence[str]) -> None:
        super().__init__(list(duplicate_models))
        self.duplicate_models = list(duplicate_models)

    def __str__(self) -> str:
        return "Duplicate model name: %s. List each name once; to load a model twice, give one a custom `name`." % (
            ", ".join(self.duplicate_models))  # fmt: skip


class MultipleDefaultManagedModelsError(QvacManagedModeError):
    """More than one model with `default: True`. See `default_models`."""

    code = "MULTIPLE_DEFAULTS"

    def __init__(self, default_models: Sequence[str]) -> None:
        super().__init__(list(default_models))
        self.default_models = list(default_models)

    def __str__(self) -> str:
        return "More than one default model: %s. Mark one, or none and the first is the default." % (
            ", ".join(self.default_models))  # fmt: skip


class InvalidManagedModelError(QvacManagedModeError):
    """A model spec or an option of the wrong shape, or a value that JSON cannot carry."""

    code = "INVALID_MODEL"


class CliNotFoundError(QvacManagedModeError):
    """No `qvac` command. `looked_in` lists where it was looked for."""

    code = "CLI_NOT_FOUND"

    def __init__(self, message: str, looked_in: Sequence[str] = ()) -> None:
        super().__init__(message, list(looked_in))
        self.looked_in = list(looked_in)

    def __str__(self) -> str:
        return str(self.args[0])


class ServeSpawnFailedError(QvacManagedModeError):
    """The serve or its runner could not be started, or what was started is no QVAC serve."""

    code = "SERVE_SPAWN_FAILED"


class ServeStartTimeoutError(QvacManagedModeError):
    """The serve was not ready in time: `seconds` without progress. Raise serve_start_timeout for a large model."""

    code = "SERVE_START_TIMEOUT"

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message, seconds)
        self.seconds = float(seconds)

    def __str__(self) -> str:
        return str(self.args[0])


class ServeExitedError(QvacManagedModeError):
    """The serve ended before it was ready, or again and again: `exit_code`, `signal`, `tail` (of its log)."""

    code = "SERVE_EXITED"

    def __init__(self, exit_code: Optional[int], signal: Optional[int], tail: str, what: str = "") -> None:
        super().__init__(exit_code, signal, tail, what)
        self.exit_code, self.signal, self.tail, self.what = exit_code, signal, tail, what

    def __str__(self) -> str:
        how = "by signal %d" % self.signal if self.signal else "with exit code %s" % self.exit_code
        text = "%s %s." % (self.what or "qvac serve ended before it was ready,", how)
        return text + ("\n" + _OUTPUT_MARK + self.tail if self.tail else " It printed nothing.")


class PortAllocationFailedError(QvacManagedModeError):
    """No free port, or the pinned one is taken by another program."""

    code = "PORT_ALLOCATION_FAILED"


class ModelLoadFailedError(QvacManagedModeError):
    """The serve listens, but could not load the default model. `model`, `reason` (from the serve's log)."""

    code = "MODEL_LOAD_FAILED"

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    def __str__(self) -> str:
        return "Model %s failed to load: %s" % (self.model, self.reason)


class RegistryError(QvacManagedModeError):
    """The folder of managed serves cannot be used: not ours, not writable, or something in the way."""

    code = "REGISTRY"


class ServeHTTPError(QvacManagedModeError):
    """The serve answered a request with an error: `status`, `message` (its own words), `body`."""

    code = "SERVE_HTTP"

    def __init__(self, status: int, message: str, body: bytes = b"") -> None:
        super().__init__(status, message, body)
        self.status, self.message, self.body = status, message, body

    def __str__(self) -> str:
        return "The serve answered %d: %s" % (self.status, self.message)


class AnswerCutShortError(QvacManagedModeError):
    """There is no answer, because a limit ended it before it began.

    `limit` names what to raise: "ctx_size" (the model's context) or "max_tokens". `answer` is what there is: empty,
    but with `reasoning` and `usage`. Also for a prompt that does not fit the context.
    """

    code = "CUT_SHORT"

    def __init__(self, answer: Answer, limit: str, message: str) -> None:
        super().__init__(answer, limit, message)
        self.answer, self.limit = answer, limit

    def __str__(self) -> str:
        return str(self.args[2])


class _Cancelled(QvacManagedModeError):
    """close() or a cancelled task ended a resolution: never seen outside this module."""

    code = "CANCELLED"


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fits_into_a_header(text: Any) -> bool:
    """Whether http.client takes it; what it refuses, it shows in its error, a key for instance."""
    return isinstance(text, str) and all((" " <= c <= "\xff" and c != "\x7f") or c == "\t" for c in text)


def _error_to_json(error: BaseException) -> Dict[str, Any]:
    """What the runner sends of an error to the client that started it: class and arguments."""
    name = type(error).__name__
    if isinstance(error, QvacManagedModeError) and name in globals():
        return {"error": name, "args": list(error.args)}
    return {"error": "ServeSpawnFailedError", "args": ["The runner failed: %s: %s" % (name, error)]}


def _error_from_json(data: Mapping[str, Any]) -> QvacManagedModeError:
    found = globals().get(str(data.get("error")))
    try:
        if isinstance(found, type) and issubclass(found, QvacManagedModeError):
            return found(*data["args"])
    except (KeyError, TypeError, ValueError):
        pass
    return ServeSpawnFailedError("The runner failed: %s" % (data,))


# ==================================================================================================
# 4. Catalog and model specs
# ==================================================================================================

CatalogEntry = namedtuple("CatalogEntry", ["id", "constant", "name"])
ModelInfo = namedtuple("ModelInfo", ["name", "endpoint", "size"])

# Friendly ids, the provider's. The drift test holds them against the model table.
QVAC_CATALOG = (
    CatalogEntry("qwen3.5-0.8b", "QWEN3_5_0_8B_MULTIMODAL_Q4_K_M", "Qwen3.5 0.8B"),
    CatalogEntry("qwen3.5-2b", "QWEN3_5_2B_MULTIMODAL_Q4_K_M", "Qwen3.5 2B"),
    CatalogEntry("qwen3.5-4b", "QWEN3_5_4B_MULTIMODAL_Q4_K_M", "Qwen3.5 4B"),
    CatalogEntry("qwen3.5-9b", "QWEN3_5_9B_MULTIMODAL_Q4_K_M", "Qwen3.5 9B"),
    CatalogEntry("qwen3.6-27b", "QWEN3_6_27B_MULTIMODAL_Q4_K_XL", "Qwen3.6 27B"),
    CatalogEntry("qwen3.6-35b-a3b", "QWEN3_6_35B_A3B_MULTIMODAL_Q4_K_M", "Qwen3.6 35B A3B"),
    CatalogEntry("gpt-oss-20b", "GPT_OSS_20B_INST_Q4_K_M", "GPT-OSS 20B"),
    CatalogEntry("gemma4-31b", "GEMMA4_31B_MULTIMODAL_Q4_K_M", "Gemma4 31B"),
)

_DEFAULT_GGUF_TYPE = "llamacpp-completion"
_SPEC_FIELDS = ("name", "config", "preload", "default", "model", "src", "type")


class ManagedModel(Dict[str, Any] if TYPE_CHECKING else dict):  # type: ignore[misc]
    """A model spec. Any mapping with the same keys will do.

    `name` is the alias the serve answers to: a catalog id, a constant, or, with `model` or `src`,
    any name. `config` goes to the engine as it is (`ctx_size`, `temp` ...). `preload` loads the model
    before the serve is ready; without it the first request does. `default` marks the model that is
    used when none is named. `model` is a constant or catalog id behind a custom alias; `src` a model
    file of one's own (absolute path or URL) and `type` its engine, which a `.gguf` need not name.
    """

    def __init__(self, name: str, *, config: Optional[Mapping[str, Any]] = None, preload: bool = True,
                 default: Optional[bool] = None, model: Optional[str] = None, src: Optional[str] = None,
                 type: Optional[str] = None) -> None:  # fmt: skip
        given = {"name": name, "config": config, "preload": preload, "default": default,
                 "model": model, "src": src, "type": type}  # fmt: skip
        super().__init__({field: value for field, value in given.items() if value is not None})


def find_catalog_entry(id_or_constant: str) -> Optional[CatalogEntry]:
    """The catalog entry of a friendly id or of its constant; None if there is none."""
    for entry in QVAC_CATALOG:
        if id_or_constant in (entry.id, entry.constant):
            return entry
    return None


def is_catalog_id(name: str) -> bool:
    """True for a friendly id such as `qwen3.5-9b`, not for a constant."""
    return any(entry.id == name for entry in QVAC_CATALOG)


def resolve_model_constant(id_or_constant: str) -> str:
    """The constant behind a friendly id; anything else comes back unchanged."""
    entry = find_catalog_entry(id_or_constant)
    return entry.constant if entry else id_or_constant


def all_models() -> List[ModelInfo]:
    """Every model a serve can load by name: `(name, endpoint, size)`, from the CLI release in MODEL_TABLE_SOURCE.

    `endpoint` is `chat`, `embedding`, `transcription` ...; `size` is in bytes. A newer CLI may know more.
    """
    models, size = [], 0
    for line in _MODEL_TABLE.splitlines():  # ENDPOINT PREFIX SIZE:REST REST ...: a name is PREFIX + REST
        endpoint, prefix, *items = line.split(" ")
        for item in items:
            given, colon, rest = item.rpartition(":")
            size = int(given) if colon else size
            models.append(ModelInfo(prefix.strip("-") + rest, endpoint, size))
    return models


def catalog_entries_with_unknown_constant() -> List[CatalogEntry]:
    """Catalog entries whose constant the model table lacks: empty unless the catalog has drifted."""
    return [entry for entry in QVAC_CATALOG if not _in_model_table(entry.constant)]


def close_matches(name: str) -> List[str]:
    """Up to three known names that resemble this one, best first."""
    known = {entry.id.lower(): entry.id for entry in QVAC_CATALOG}
    known.update((info.name.lower(), info.name) for info in all_models())
    wanted = _shorten(name, 80).lower()
    near = difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.6)
    near += [low for low in known if len(wanted) >= 4 and wanted.replace("-", "_") in low and low not in near]
    return [known[low] for low in near[:3]]


def _in_model_table(constant: str) -> bool:
    return any(info.name == constant for info in all_models())


def _in_installed_sdk(constant: str, serve_bin_path: Optional[str]) -> bool:
    """True if the SDK beside the CLI knows a constant that the model table lacks.

    One look into the SDK's registry file (1 MB), so that a newer CLI's models can be used before the
    table is. False when the CLI or that file is not where npm puts it.
    """
    if not constant or not all(c.isupper() or c.isdigit() or c == "_" for c in constant):
        return False
    try:
        entry_point = os.path.realpath(find_cli(serve_bin_path)[-1])
    except CliNotFoundError:
        return False
    folder, inside = os.path.dirname(entry_point), ("@qvac", "inference", "dist", "models", "registry", "models.js")
    while folder != os.path.dirname(folder):
        for modules in (folder, os.path.join(folder, "node_modules")):
            try:
                with open(os.path.join(modules, *inside), "rb") as file:
                    return ('"%s"' % constant).encode() in file.read(MAX_SDK_REGISTRY_BYTES).replace(b"'", b'"')
            except OSError:
                pass
        folder = os.path.dirname(folder)
    return False


def _normalize_model(model: Any) -> Dict[str, Any]:
    """A model in any accepted form as a dict of the given fields; raises InvalidManagedModelError."""
    if isinstance(model, (str, os.PathLike)):
        name = os.fsdecode(model)
        if name is not model or name.lower().endswith(".gguf") or "://" in name:
            raise InvalidManagedModelError(
                "%r is a model file, not a name: write {\"name\": %r, \"src\": os.path.abspath(%r)}."
                % (name, os.path.splitext(os.path.basename(name))[0] or "mine", name))  # fmt: skip
        return {"name": name}
    try:
        spec = {field: value for field, value in dict(model).items() if value is not None}
    except (TypeError, ValueError):
        raise InvalidManagedModelError(
            "A model is a name or a mapping with a `name`, not %s." % _shorten(repr(model), 80)) from None  # fmt: skip
    if isinstance(spec.get("src"), os.PathLike):
        spec["src"] = os.fsdecode(spec["src"])
    if not isinstance(spec.get("name"), str):
        raise InvalidManagedModelError(
            "A model spec needs a `name`, the one the serve answers to (`model` only says what is behind a name of "
            "your own): %s." % _shorten(repr(model), 120))  # fmt: skip
    _check_spec_fields(spec)
    return spec


def _check_spec_fields(spec: Mapping[str, Any]) -> None:
    def refuse(what: str) -> InvalidManagedModelError:
        return InvalidManagedModelError("Model %s: %s." % (_shorten(repr(spec["name"]), 80), what))

    unknown = [_shorten(repr(field), 40) for field in spec if field not in _SPEC_FIELDS]
    if unknown:
        raise refuse("unknown field %s; a spec has %s, and what is for the engine, like ctx_size, stands in `config`, "
                     "{\"config\": {\"ctx_size\": 8192}}" % (", ".join(unknown), ", ".join(_SPEC_FIELDS)))
    for field in ("preload", "default"):
        if not isinstance(spec.get(field, False), bool):
            raise refuse("`%s` is True or False" % field)
    for field in ("model", "src", "type"):
        if not isinstance(spec.get(field, "x"), str) or not spec.get(field, "x"):
            raise refuse("`%s` is a non-empty string" % field)
    if "config" in spec and not isinstance(spec["config"], dict):
        raise refuse("`config` is a dict")
    if "src" in spec and "model" in spec:
        raise refuse("give `model` or `src`, not both")
    if "type" in spec and "src" not in spec:
        raise refuse("`type` goes with `src`")
    if ("src" in spec or "model" in spec) and not _is_sane_alias(spec["name"]):
        raise refuse("a custom name is 1 to 128 printable characters without spaces at its ends")
    if "src" in spec:
        _check_source(spec, refuse)


def _check_source(spec: Mapping[str, Any], refuse: Callable[[str], InvalidManagedModelError]) -> None:
    src = spec["src"]
    is_url = "://" in src
    if "type" not in spec and not src.lower().split("?")[0].endswith(".gguf"):
        raise refuse("`src` is no .gguf, so it needs a `type` such as %r" % _DEFAULT_GGUF_TYPE)
    if not all(c.isprintable() for c in src) or src != src.strip():
        raise refuse("`src` has characters that no path or URL has")
    if is_url:
        return
    if not os.path.isabs(src):
        raise refuse("`src` is an absolute path or a URL; for a relative path use os.path.abspath()")
    if os.path.isdir(src):
        raise refuse("`src` is a folder, not a model file: %s" % src)
    if not os.path.exists(src):
        raise refuse("`src` does not exist: %s" % src)


def _is_sane_alias(name: str) -> bool:
    return 0 < len(name) <= 128 and name == name.strip() and name.isprintable() and name != "__proto__"


# ==================================================================================================
# 5. Serve config and fleet key
# ==================================================================================================


def synthesize_serve_config(models: Sequence[Any], serve_bin_path: Optional[str] = None) -> Dict[str, Any]:
    """The serve's config for a list of models: `{"serve": {"models": {alias: entry}}}`, the provider's.

    Pure but for a look for `src` files and for constants newer than the model table. Raises
    UnknownManagedModelError (naming all unknown ones), DuplicateManagedModelError,
    MultipleDefaultManagedModelsError, InvalidManagedModelError.
    """
    if isinstance(models, (str, bytes)) or not hasattr(models, "__iter__") or isinstance(models, dict):
        raise InvalidManagedModelError("`models` is a list of names or specs, such as ['qwen3.5-2b'].")
    specs = [_normalize_model(model) for model in models]
    if not specs:
        raise UnknownManagedModelError([])
    _refuse_unknown(specs, serve_bin_path)
    names = [spec["name"] for spec in specs]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise DuplicateManagedModelError(duplicates)
    defaults = [spec["name"] for spec in specs if spec.get("default")]
    if len(defaults) > 1:
        raise MultipleDefaultManagedModelsError(defaults)
    entries = {}
    for index, spec in enumerate(specs):
        # The provider's rule, fleet keys depend on it: an explicit `default: false` on the first
        # model leaves the serve without a default.
        is_default = spec.get("default", not defaults and index == 0)
        entries[spec["name"]] = _config_entry(spec, is_default)
    return {"serve": {"models": entries}}


def _refuse_unknown(specs: Sequence[Mapping[str, Any]], serve_bin_path: Optional[str]) -> None:
    unknown = []
    for spec in specs:
        constant = resolve_model_constant(spec.get("model", spec["name"]))
        if "src" not in spec and not _in_model_table(constant) and not _in_installed_sdk(constant, serve_bin_path):
            unknown.append(str(spec.get("model", spec["name"])))
    if unknown:
        raise UnknownManagedModelError(unknown, {name: close_matches(name) for name in unknown})


def _config_entry(spec: Mapping[str, Any], is_default: bool) -> Dict[str, Any]:
    if "src" in spec:
        entry: Dict[str, Any] = {"src": spec["src"], "type": spec.get("type", _DEFAULT_GGUF_TYPE)}
    else:
        entry = {"model": resolve_model_constant(spec.get("model", spec["name"]))}
    entry["preload"] = spec.get("preload", True)
    if is_default:
        entry["default"] = True
    if "config" in spec:
        entry["config"] = _checked_json(spec["config"], "config of model %s" % spec["name"])
    return entry


def _checked_json(value: Any, where: str, depth: int = 0) -> Any:
    """The value as plain JSON types; InvalidManagedModelError for what JSON cannot carry."""
    if depth > 100:
        raise InvalidManagedModelError("The %s is nested more than 100 levels deep, or contains itself." % where)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        if not abs(value) <= 1.7976931348623157e308:  # the largest double; false for NaN too
            raise InvalidManagedModelError("JSON cannot carry the number %s in the %s." % (
                _shorten(repr(value) if isinstance(value, float) else hex(value), 40), where))  # fmt: skip
        return value
    if isinstance(value, (list, tuple)):
        return [_checked_json(item, where, depth + 1) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise InvalidManagedModelError("JSON has only strings as keys: see the %s." % where)
        return {key: _checked_json(item, where, depth + 1) for key, item in value.items()}
    raise InvalidManagedModelError("JSON cannot carry a %s in the %s." % (type(value).__name__, where))


def compute_fleet_key(
    config: Mapping[str, Any], host: str, serve_bin_path: Optional[str] = None, serve_port: Optional[int] = None
) -> str:
    """The 16 hex digits that name a serve; equal keys share one. Byte for byte the provider's.

    It hashes exactly what the serve was asked to be: the models and their config, the host, and, if
    given, the binary and the pinned port.
    """
    models = config["serve"]["models"]
    canonical = [[alias, _js_json(models[alias], sort=True)] for alias in sorted(models, key=_utf16)]
    payload = _js_json(
        {
            "protocolVersion": FLEET_PROTOCOL_VERSION,
            "host": host,
            "serveBinPath": serve_bin_path,
            "servePort": serve_port,
            "models": canonical,
        }
    )
    return hashlib.sha256(payload.encode("utf-8")).hexdigest()[:16]


def is_private_key(key: str) -> bool:
    """True for the fleet key of a private serve."""
    return "-priv-" in key


def is_valid_fleet_key(text: str) -> bool:
    """True for `HEX16` and for a private serve's `HEX16-priv-PID-HEX8`: nothing else is a file name here."""

    def is_hex(part: str, length: int) -> bool:
        return len(part) == length and all(c in "0123456789abcdef" for c in part)

    parts = text.split("-")
    if len(parts) == 1:
        return is_hex(text, 16)
    return (len(parts) == 4 and is_hex(parts[0], 16) and parts[1] == "priv" and is_hex(parts[3], 8)
            and 0 < len(parts[2]) < 20 and all(c in "0123456789" for c in parts[2]))  # fmt: skip


def _utf16(text: str) -> List[int]:
    """Sorts as JavaScript does, by UTF-16 code unit: U+1F600 comes before U+FB01. The codec would be an import."""
    units = []
    for code in map(ord, text):
        units += [code] if code < 0x10000 else [0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF)]
    return units


def _js_json(value: Any, sort: bool = False) -> str:
    """The text that JavaScript's JSON.stringify gives (ECMA-262, 25.5.2), keys sorted on request."""
    if isinstance(value, str):
        return _js_string(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return _js_number(float(value))
    if isinstance(value, (list, tuple)):
        return "[%s]" % ",".join(_js_json(item, sort) for item in value)
    keys = sorted(value, key=_utf16) if sort else list(value)
    return "{%s}" % ",".join("%s:%s" % (_js_string(key), _js_json(value[key], sort)) for key in keys)


def _js_string(text: str) -> str:
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return json.dumps(text, ensure_ascii=False)
    # A Python string may hold a surrogate pair as two characters, which in JavaScript is one; what is
    # left alone after pairing is escaped, as JSON.stringify has done since ES2019.
    paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    quoted = json.dumps(paired, ensure_ascii=False)
    return "".join("\\u%04x" % ord(c) if "\ud800" <= c <= "\udfff" else c for c in quoted)


def _js_number(number: float) -> str:
    """A double as JavaScript writes it (ECMA-262, Number::toString): the same digits, another layout."""
    if number == 0:
        return "0"
    mantissa, _, exponent = ("%r" % abs(number)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))  # value = 0.DIGITS * 10**point
    digits = digits.rstrip("0")
    sign = "-" if number < 0 else ""
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return sign + digits[:point] + "." + digits[point:]
    if -6 < point <= 0:
        return sign + "0." + "0" * -point + digits
    scientific = digits[0] + ("." + digits[1:] if len(digits) > 1 else "")
    return "%s%se%s%d" % (sign, scientific, "+" if point > 0 else "-", abs(point - 1))


# ==================================================================================================
# 6. Platform: all that differs between systems. Same names in every bank; nothing below asks which.
# ==================================================================================================

OURS, STRANGER, NOBODY, UNKNOWN = "ours", "stranger", "nobody", "unknown"  # who listens on a port
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
NONBLOCK = getattr(os, "O_NONBLOCK", 0)
BINARY = getattr(os, "O_BINARY", 0)

# What the runner's interpreter executes: `-I` keeps a `json.py` beside this file out of its imports,
# and importing by name (not running by path) takes the compiled file from __pycache__. What the top
# of this file imports is imported first, so that this folder need not be on the path for long.
_BOOT = (
    "import sys,os,collections,%s;%s;sys.path.insert(0,sys.argv[1]);m=__import__(sys.argv[2]);"
    "del sys.path[0];sys.exit(m._reexecuted(sys.argv[3:]))"
)


def _machine_id() -> str:
    """Tells machines apart that share a home: host name and machine id, as a short hash."""
    return "%08x" % binascii.crc32((host_name() + _read_text("/etc/machine-id")).encode("utf-8", "replace"))


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""


def _netstat_rows(text: str, port: int) -> List[Tuple[str, str, str]]:
    """`(state, remote, last column)` of each TCP row of `netstat` output whose local port is `port`."""
    rows = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4 or not fields[0].lower().startswith("tcp"):
            continue
        # macOS: tcp4 0 0 127.0.0.1.8080 127.0.0.1.51000 ESTABLISHED; Windows: TCP local remote STATE pid
        local, remote, state = (fields[3:6] if len(fields) > 5 else fields[1:4]) + [""] * (3 if len(fields) < 4 else 0)
        if local.replace(":", ".").rpartition(".")[2] == str(port):
            rows.append((state, remote, fields[-1]))
    return rows


def is_thread_id(_pid: int) -> bool:
    """Only Linux answers for the id of a thread as for a process's."""
    return False


Process = namedtuple("Process", ["start", "started_at", "uid", "parent"])
Process.__doc__ = """What the system says of a live process. `start`: a token that tells it from a later one with its pid, "" where it
cannot be had. `started_at`: of the wall clock. The others are None where they cannot be had."""
_UNREADABLE = Process("", None, None, None)


if sys.platform == "win32":  # pragma: no cover - checked by mypy and by tests with injected calls
    _BOOT_IMPORT, _BOOT_DETACH = "time", "0"

    def detach() -> None:
        """Nothing to do: the runner was started with flags that detach it."""

    _QUERY, _SYNCHRONIZE = 0x1000, 0x100000  # PROCESS_* access rights (winnt.h)
    _STILL_ACTIVE = 259

    def _kernel32() -> Any:
        """kernel32 with its handle-returning functions declared: a handle is a pointer, which ctypes would cut."""
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        for function in (kernel32.OpenProcess, kernel32.CreateJobObjectW, kernel32.CreateToolhelp32Snapshot):
            function.restype = wintypes.HANDLE
        return kernel32

    def this_place() -> str:
        return "%s::0" % _machine_id()  # no id of the boot: start times are of the wall clock, so none is needed

    def look_at(pid: int) -> Optional[Process]:
        """The process with this pid; None if there is none."""
        kernel32, code, times = _kernel32(), wintypes.DWORD(), [wintypes.FILETIME() for _ in range(4)]
        handle = wintypes.HANDLE(kernel32.OpenProcess(_QUERY, False, pid))
        if not handle:
            return _UNREADABLE if ctypes.get_last_error() == 5 else None  # ERROR_ACCESS_DENIED: it exists
        try:
            if kernel32.GetExitCodeProcess(handle, ctypes.byref(code)) and code.value != _STILL_ACTIVE:
                return None
            if not kernel32.GetProcessTimes(handle, *[ctypes.byref(t) for t in times]):
                return _UNREADABLE
            start, facts = (times[0].dwHighDateTime << 32) + times[0].dwLowDateTime, (ctypes.c_void_p * 6)()
            ctypes.WinDLL("ntdll").NtQueryInformationProcess(handle, 0, facts, ctypes.sizeof(facts), None)
            return Process(str(start), start / 1e7 - 11644473600.0, None, facts[5])  # FILETIME counts 100 ns from 1601
        finally:
            kernel32.CloseHandle(handle)

    def host_name() -> str:
        return os.environ.get("COMPUTERNAME", "")

    def home_folder() -> str:
        return os.path.expanduser("~")

    def shares_network(_pid: int) -> bool:
        """There are no network namespaces."""
        return True

    def _parents() -> Dict[int, int]:
        """Each process's parent, as it was when the process was made (tlhelp32.h)."""
        class Entry(ctypes.Structure):  # PROCESSENTRY32W
            _fields_ = [
                ("dwSize", wintypes.DWORD), ("cntUsage", wintypes.DWORD), ("th32ProcessID", wintypes.DWORD),
                ("th32DefaultHeapID", ctypes.c_size_t), ("th32ModuleID", wintypes.DWORD),
                ("cntThreads", wintypes.DWORD), ("th32ParentProcessID", wintypes.DWORD),
                ("pcPriClassBase", wintypes.LONG), ("dwFlags", wintypes.DWORD), ("szExeFile", wintypes.WCHAR * 260),
            ]  # fmt: skip

        kernel32, parents, entry = _kernel32(), {}, Entry()
        entry.dwSize = ctypes.sizeof(entry)
        snapshot = wintypes.HANDLE(kernel32.CreateToolhelp32Snapshot(0x2, 0))  # TH32CS_SNAPPROCESS
        found = kernel32.Process32FirstW(snapshot, ctypes.byref(entry))
        while found:
            parents[int(entry.th32ProcessID)] = int(entry.th32ParentProcessID)
            found = kernel32.Process32NextW(snapshot, ctypes.byref(entry))
        kernel32.CloseHandle(snapshot)
        return parents

    def _descends(pid: int, ancestor: int, parents: Mapping[int, int]) -> bool:
        seen: Set[int] = set()
        while pid != ancestor and pid in parents and pid not in seen:
            seen.add(pid)
            pid = parents[pid]
        return pid == ancestor

    def command_line(pid: int) -> Optional[List[str]]:
        return None

    def is_ours(status: os.stat_result) -> bool:
        return True  # the profile folder is private to its user by its access list

    def lock_fd(fd: int) -> bool:
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise

    def make_private(_fd: int) -> None:
        """A profile is private here."""

    def unlock_fd(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

    def call_after_fork(function: Callable[[], None]) -> None:
        """There is no fork here."""

    def replace_file(source: str, target: str) -> None:
        _while_in_use(lambda: os.replace(source, target))

    def remove_file(path: str) -> None:
        _while_in_use(lambda: os.unlink(path))

    def _while_in_use(action: Callable[[], None]) -> None:
        """A file that somebody is just reading can be neither replaced nor removed here: try again for a moment."""
        def works() -> bool:
            try:
                action()
            except PermissionError:
                return False
            return True

        if not wait_until(works, 0.5, 0.005):
            action()

    class RunnerChannel:
        """The client's end of a starting runner: what it reports, line by line, and whether it lives."""

        def __init__(self, argv: Sequence[str], log_fd: int) -> None:
            flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
            self._child = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log_fd, creationflags=flags,
                env=runner_environ())  # fmt: skip
            self._lines: queue.Queue[bytes] = queue.Queue()  # an empty one is the end
            threading.Thread(target=self._drain, daemon=True).start()

        def _drain(self) -> None:
            assert self._child.stdout is not None
            with self._child.stdout as pipe:
                for line in pipe:
                    self._lines.put(line)
            self._lines.put(b"")

        def read(self, timeout: float) -> Tuple[bytes, bool]:
            try:
                line = self._lines.get(timeout=timeout)
            except queue.Empty:
                return b"", False
            if not line:
                self._lines.put(line)  # for the next one who asks
            return line, not line

        def close(self) -> Optional[int]:
            code = self._child.poll()
            if code is None:
                self._child.returncode = 0  # it outlives us on purpose: no ResourceWarning
            return code

    def report_channel() -> int:
        """The runner's end of the channel: its standard output, which becomes the null device."""
        fd = os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.close(null)
        return fd

    class ServeProcess:
        """The serve and, through a job object that ends with this runner, all that it starts."""

        def __init__(self, argv: Sequence[str], environ: Mapping[str, str], log_fd: int, folder: str) -> None:
            # Ctrl-Break reaches only who shares the sender's console: the runner's, which has no window. A runner
            # under pythonw has no console to share, and its serve would open one with a window.
            flags = subprocess.CREATE_NEW_PROCESS_GROUP
            flags |= 0 if _kernel32().GetConsoleCP() else subprocess.CREATE_NO_WINDOW
            self._job = _kill_on_close_job()
            self._child = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd, creationflags=flags,
                env=dict(environ), cwd=folder)  # fmt: skip
            self.pid = self._child.pid
            handle = wintypes.HANDLE(int(self._child._handle))  # type: ignore[attr-defined]
            _kernel32().AssignProcessToJobObject(self._job, handle)

        def ended(self) -> Optional[Tuple[Optional[int], Optional[int]]]:
            code = self._child.poll()
            return None if code is None else (code, None)

        def terminate(self) -> None:
            # A process group of its own ignores Ctrl-C, but not Ctrl-Break.
            try:
                self._child.send_signal(signal.CTRL_BREAK_EVENT)
            except OSError:
                self._child.terminate()

        def group_is_empty(self) -> bool:
            return self._child.poll() is not None

        def kill_group(self) -> None:
            _kernel32().TerminateJobObject(self._job, 1)

        def check_watchdog(self) -> None:
            """The job object needs no looking after."""

        def reap(self) -> None:
            self._child.wait()
            _kernel32().CloseHandle(self._job)

    def _kill_on_close_job() -> Any:
        kernel32 = _kernel32()
        job = wintypes.HANDLE(kernel32.CreateJobObjectW(None, None))
        # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, class 9; LimitFlags is its third field (offset 16), and
        # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE is 0x2000.
        size = 144 if ctypes.sizeof(ctypes.c_void_p) == 8 else 112
        info = ctypes.create_string_buffer(size)
        ctypes.c_uint32.from_buffer(info, 16).value = 0x2000
        kernel32.SetInformationJobObject(job, 9, info, size)
        return job

    def watch_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK):
            signal.signal(number, _note_stop)

    def watch_folder(folder: str) -> int:
        return -1

    def wait_for_event(timeout: float) -> None:
        time.sleep(min(timeout, 0.1))

    def ask_to_stop(pid: int, folders: Sequence[str]) -> None:
        """Windows has no SIGTERM: a file in the serve's folder asks the runner to stop."""
        for folder in folders:
            with open(os.path.join(folder, STOP_NAME), "w"):
                pass

    def terminate_process(pid: int) -> None:
        os.kill(pid, 15)  # TerminateProcess: there is nothing gentler

    kill_process = terminate_process

    def was_asked_to_stop(folder: str) -> bool:
        return _stop_signals != [] or os.path.exists(os.path.join(folder, STOP_NAME))

    def group_members(pgid: int) -> List[int]:
        return [pgid] if process_start(pgid) is not None else []

    def group_of(pid: int) -> int:
        return pid

    def kill_group_of(pgid: int) -> None:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(pgid)], stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=False)  # fmt: skip

    def rss_bytes(pids: Sequence[int]) -> Optional[int]:
        return None

    def _netstat() -> str:
        flags = subprocess.CREATE_NO_WINDOW
        done = subprocess.run(["netstat", "-ano"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                              creationflags=flags, timeout=10, check=False)  # fmt: skip
        return done.stdout.decode("ascii", "replace")

    def who_listens(host: str, port: int, pid: int) -> str:
        if not _accepts_connections(host, port):
            return NOBODY
        # The names of the states are in the language of the system, so other columns have to tell them apart:
        # a listener has no remote port, and what is in TIME_WAIT no process.
        listeners = {row[2] for row in _netstat_rows(_netstat(), port) if row[1].endswith(":0")}
        if not listeners or not all(owner.isdigit() for owner in listeners):
            return UNKNOWN
        parents = _parents()  # a wrapper's child may be the one that listens
        return OURS if all(_descends(int(owner), pid, parents) for owner in listeners) else STRANGER

    def connections_to(host: str, port: int) -> Tuple[int, Set[str]]:
        rows = [row for row in _netstat_rows(_netstat(), port) if not row[1].endswith(":0")]
        return sum(row[2] != "0" for row in rows), {row[1] for row in rows if row[2] == "0"}

    def reserve_port(host: str, port: int) -> Tuple[Any, int]:
        with _bound_socket(socket.socket, host, port) as sock:
            return None, int(sock.getsockname()[1])

    def parent_handle() -> Any:
        """A handle on the parent, opened while it lives: a pid alone may later be another process."""
        return _kernel32().OpenProcess(_SYNCHRONIZE, False, os.getppid())

    def parent_has_gone(handle: Any) -> bool:
        return bool(_kernel32().WaitForSingleObject(wintypes.HANDLE(handle), 0) == 0)  # WAIT_OBJECT_0

    def command_for(path: str) -> List[str]:
        """How to start a found CLI: npm's .cmd shims cannot be started safely, so their script is."""
        shims = os.path.dirname(os.path.abspath(path))
        for modules in (os.path.join(shims, "node_modules"), os.path.dirname(shims)):
            script = os.path.join(modules, "@qvac", "cli", "dist", "index.js")
            if path.lower().endswith((".cmd", ".ps1")) and os.path.exists(script):
                return ["node", script]
        return [path]

    CLI_NAMES = ("qvac.cmd", "qvac.exe")

    def start_without_signals(start: Callable[[], None]) -> None:
        """Start a thread; signals are for the main thread in any case here."""
        start()

    def quoted_word(text: str) -> str:
        """A word as it is typed at a prompt: as it is, for cmd and PowerShell quote differently."""
        return text

    def default_env_shell() -> str:
        """The shell `env` writes for when nobody names one."""
        return "powershell"

    def stop_signals() -> List[int]:
        """The signals that ask a command to end, besides Ctrl-C."""
        return [signal.SIGTERM, signal.SIGBREAK]

    def enable_ansi(stream: Any) -> bool:
        """Whether escape sequences reach a person through STREAM; switches the console to them."""
        if not stream.isatty():
            return False
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        handle, mode = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno())), ctypes.c_uint32()
        if not kernel.GetConsoleMode(handle, ctypes.byref(mode)):
            return False
        enable_virtual_terminal_processing = 0x0004
        return bool(kernel.SetConsoleMode(handle, mode.value | enable_virtual_terminal_processing))

    def folder_exposure(path: str) -> Optional[str]:
        """Why others can reach into PATH; always None: a profile is private here."""
        return None

    def run_instead(argv: List[str], env: Dict[str, str]) -> int:
        """Run ARGV as a child; return its exit code. The console gives Ctrl-C to it as well. Raises OSError."""
        for number in (signal.SIGINT, signal.SIGBREAK):
            signal.signal(number, lambda *_: None)
        return subprocess.Popen(argv, env=env).wait()

else:
    import fcntl

    _BOOT_IMPORT, _BOOT_DETACH = "fcntl", "os.fork()and os._exit(0);os.setsid()"
    _SIGTERM, _SIGKILL = 15, 9

    def detach() -> None:
        """What _BOOT_DETACH does, for a file that cannot be imported by name."""
        if os.fork():
            os._exit(0)
        os.setsid()

    def host_name() -> str:
        return os.uname().nodename

    def home_folder() -> str:
        """$HOME, as Node.js sees it too; without it, what the user database says."""
        return os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir

    def _answers_signals(pid: int) -> Optional[Process]:
        """For a process of which nothing else can be had here."""
        try:
            os.kill(pid, 0)
        except PermissionError:
            return _UNREADABLE
        except (OSError, OverflowError):
            return None
        return _UNREADABLE

    def is_ours(status: os.stat_result) -> bool:
        return status.st_uid == os.geteuid()

    def lock_fd(fd: int) -> bool:
        """Take the lock if it is free. True, too, on a file system without flock: there KEY.lock has to do alone."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR)
        return True

    replace_file, remove_file = os.replace, os.unlink

    def call_after_fork(function: Callable[[], None]) -> None:
        os.register_at_fork(after_in_child=function)

    def make_private(fd: int) -> None:
        """The mode 0600 for a file of ours."""
        try:
            os.fchmod(fd, 0o600)
        except OSError:
            pass  # another user's, or a file system without modes

    def unlock_fd(fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)  # not left to close(): a forked child shares the open file
        except OSError:
            pass

    class RunnerChannel:
        """The client's end of a starting runner: what it reports, line by line, and whether it lives.

        The channel is a pipe in the place of the runner's standard input. Its end is the runner's end
        or its word that it needs no client any more. The runner itself is a grandchild: the child
        forks and exits at once, so that no zombie of it is left while this client lives.
        """

        def __init__(self, argv: Sequence[str], log_fd: int) -> None:
            self._poll = select.poll() if hasattr(select, "poll") else None  # eventlet takes it away
            self._fd, write_end = os.pipe()
            ends = [write_end]
            try:
                # Above 2, lest a program with a closed standard stream sees them overwritten.
                ends += [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (write_end, log_fd)]
                actions = [(os.POSIX_SPAWN_DUP2, ends[1], 0), (os.POSIX_SPAWN_DUP2, ends[2], 1),
                           (os.POSIX_SPAWN_DUP2, ends[2], 2)]  # fmt: skip
                self._child = os.posix_spawn(argv[0], list(argv), runner_environ(), file_actions=actions)
            except BaseException:
                os.close(self._fd)
                raise
            finally:
                for fd in ends:
                    os.close(fd)
            self._code: Optional[int] = None
            if self._poll is not None:
                self._poll.register(self._fd, select.POLLIN | select.POLLHUP)

        def read(self, timeout: float) -> Tuple[bytes, bool]:
            """`(bytes, ended)`; no bytes and not ended when nothing came within `timeout` seconds."""
            is_ready = self._poll.poll(timeout * 1000) if self._poll else select.select([self._fd], [], [], timeout)[0]
            if not is_ready:
                return b"", False
            data = os.read(self._fd, 65536)
            return data, not data

        def close(self) -> Optional[int]:
            """Let go of the channel; the exit code of the child if it failed before it could fork."""
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                try:
                    status = self._wait_for_child()
                    self._code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
                except ChildProcessError:
                    pass  # the host program reaps all its children
            return self._code

        def _wait_for_child(self) -> int:
            """Its wait status. It ends as soon as it has forked, unless somebody has stopped it."""
            deadline = time.monotonic() + 1.0
            while True:
                pid, status = os.waitpid(self._child, os.WNOHANG)
                if pid:
                    return status
                if time.monotonic() > deadline:
                    os.kill(self._child, _SIGKILL)
                time.sleep(0.001)

    def report_channel() -> int:
        """The runner's end of the channel: its standard input, which becomes the null device.

        All else but output that the caller left inheritable is closed: it would stay open as long as the serve.
        """
        _close_inherited()
        fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        return fd

    def _close_inherited() -> None:
        try:
            names = os.listdir("/proc/self/fd")
        except OSError:
            return os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 65536))
        for name in names:
            try:
                if int(name) > 2:
                    os.close(int(name))
            except OSError:
                pass  # the one that listed the folder

    # `sh`, leader of the group in which the serve is started, holding the reading end of a pipe whose only writing end is
    # the runner's: when the runner is gone, however it ended, the read ends and the whole group is killed, the worker
    # included. It stands before the serve does, and as long as it is not reaped the group's id is nobody else's.
    _WATCHDOG_SCRIPT = 'trap "" TERM INT HUP; read _; kill -s KILL 0'

    class ServeProcess:
        """The serve, in a process group that a watchdog leads, and that ends with this runner."""

        def __init__(self, argv: Sequence[str], environ: Mapping[str, str], log_fd: int, _folder: str) -> None:
            self.pid, self._group, self._watchdog, self._pipe = 0, 0, 0, -1
            self._status: Optional[Tuple[Optional[int], Optional[int]]] = None
            self._start_watchdog()
            self._group = self._watchdog
            actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, log_fd, 1),
                       (os.POSIX_SPAWN_DUP2, log_fd, 2)]  # fmt: skip
            ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python; what is ignored stays so through exec
            try:
                self.pid = os.posix_spawnp(argv[0], list(argv), dict(environ), setpgroup=self._group,
                                           setsigdef=ignored, file_actions=actions)  # fmt: skip
            except BaseException:
                self.reap()
                raise

        def _start_watchdog(self) -> None:
            read_end, self._pipe = os.pipe()
            null = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0)
            try:
                self._watchdog = os.posix_spawn(
                    "/bin/sh", ["sh", "-c", _WATCHDOG_SCRIPT, "qvac-watchdog"], os.environ, setpgroup=self._group,
                    file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0), null, (os.POSIX_SPAWN_DUP2, 1, 2)])  # fmt: skip
            finally:
                os.close(read_end)

        def check_watchdog(self) -> None:
            """Start another if somebody killed it: it joins the group of the serve, which is still there."""
            if os.waitpid(self._watchdog, os.WNOHANG)[0]:
                os.close(self._pipe)
                self._start_watchdog()

        def ended(self) -> Optional[Tuple[Optional[int], Optional[int]]]:
            """`(exit code, signal)` once the serve has ended."""
            if self._status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    exited = os.WIFEXITED(status)
                    self._status = (os.WEXITSTATUS(status), None) if exited else (None, os.WTERMSIG(status))
            return self._status

        def terminate(self) -> None:
            """SIGTERM to the serve alone: it has to release its own worker and the worker's lock."""
            if self._status is None:
                os.kill(self.pid, _SIGTERM)

        def group_is_empty(self) -> bool:
            return not set(group_members(self._group)) - {self._watchdog}

        def kill_group(self) -> None:
            kill_group_of(self._group)

        def reap(self) -> None:
            """End the watchdog, and with it the group's id."""
            os.close(self._pipe)
            kill_process(self._watchdog)  # it may have been stopped, and would not see the pipe's end
            os.waitpid(self._watchdog, 0)

    def group_of(pid: int) -> int:
        """The process group of a serve, ours (its watchdog's) or the provider's (its own)."""
        try:
            return os.getpgid(pid)
        except OSError:
            return pid

    def watch_signals() -> None:
        """From a clean slate (a blocked or ignored signal is inherited), note what asks the runner to stop."""
        read_end, write_end = os.pipe()
        for fd in (read_end, write_end):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        _wakeup.append(read_end)
        for number in range(1, signal.NSIG):
            try:
                if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
                    signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, _note_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wake-up is what counts
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    _wakeup: List[int] = []

    def wait_for_event(timeout: float) -> None:
        """Wait for a signal (a child's end, a request to stop, a watched folder), `timeout` seconds at most."""
        if select.select(_wakeup, [], [], max(0.0, timeout))[0]:
            try:
                os.read(_wakeup[0], 4096)
            except BlockingIOError:
                pass

    def ask_to_stop(pid: int, folders: Sequence[str]) -> None:
        os.kill(pid, _SIGTERM)

    def terminate_process(pid: int) -> None:
        os.kill(pid, _SIGTERM)

    def kill_process(pid: int) -> None:
        os.kill(pid, _SIGKILL)

    def was_asked_to_stop(folder: str) -> bool:
        return _stop_signals != []

    def kill_group_of(pgid: int) -> None:
        try:
            os.killpg(pgid, _SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def parent_handle() -> Any:
        return os.getppid()

    def parent_has_gone(handle: Any) -> bool:
        return parent_is_gone(handle, os.getppid())

    def command_for(path: str) -> List[str]:
        return [path]

    CLI_NAMES = ("qvac",)

    def start_without_signals(start: Callable[[], None]) -> None:
        """Start a thread that is given no signals. Of two that come at once, as SIGHUP and SIGCONT do when a terminal
        closes, the kernel would give it the second, and the main thread would wait on without having seen it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def quoted_word(text: str) -> str:
        """A word as it is typed at a prompt."""
        return shlex.quote(text)

    def default_env_shell() -> str:
        """The shell `env` writes for when nobody names one."""
        return "sh"

    def stop_signals() -> List[int]:
        """The signals that ask a command to end, besides Ctrl-C."""
        return [signal.SIGTERM, signal.SIGHUP]

    def enable_ansi(stream: Any) -> bool:
        """Whether escape sequences reach a person through STREAM."""
        return os.environ.get("TERM", "dumb") != "dumb" and bool(stream.isatty())

    def folder_exposure(path: str) -> Optional[str]:
        """Why others can reach into the folder or file PATH, in words; None if they cannot."""
        info = os.lstat(path)
        if info.st_uid != os.geteuid():
            return "it belongs to user %d, you are user %d" % (info.st_uid, os.geteuid())
        if info.st_mode & 0o077:
            return "its mode is %04o: others can reach it" % (info.st_mode & 0o7777)
        return None

    def run_instead(argv: List[str], env: Dict[str, str]) -> int:
        """Become ARGV, with our pid: the marker of this process is then the command's. Raises OSError."""
        for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these; what is ignored stays so through exec
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
        os.execvpe(argv[0], argv, env)

    if sys.platform == "linux":

        def this_place() -> str:
            """Machine, boot and pid namespace: where a pid means what it means here."""
            boot = _read_text("/proc/sys/kernel/random/boot_id")[:8]
            try:
                namespace = os.stat("/proc/self/ns/pid").st_ino
                if os.readlink("/proc/self") != str(os.getpid()):
                    namespace = -namespace  # /proc shows another namespace's processes: see process_start
            except OSError:
                boot, namespace = "", 0  # it could be any container of this machine
            return "%s:%s:%d" % (_machine_id(), boot, namespace)

        def _stat_fields(pid: Union[int, str]) -> List[bytes]:
            """The fields of /proc/PID/stat from the state on (proc(5): the name before may hold anything)."""
            with open("/proc/%s/stat" % pid, "rb") as file:
                return file.read().rpartition(b")")[2].split()

        def look_at(pid: int) -> Optional[Process]:
            """The process with this pid; None if there is none.

            A zombie is dead, and so is a process on its way out: its port may take connections for as long
            as the kernel needs to free its memory, and resets them then. The token is the start in clock
            ticks after boot, which no change of the wall clock moves.
            """
            try:
                fields = _stat_fields(pid)
                if place().rpartition(":")[2].startswith("-"):
                    raise ValueError("/proc is another namespace's")
                if int(fields[6]) & 0x4 or int(fields[28]) & 1 << 8 or fields[0] in (b"Z", b"X", b"x"):
                    return None  # PF_EXITING; SIGKILL is pending
                ago = float(_read_text("/proc/uptime").split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
                return Process(
                    fields[19].decode(), time.time() - ago, os.stat("/proc/%d" % pid).st_uid, int(fields[1]))  # fmt: skip
            except (OSError, ValueError, IndexError):
                return _answers_signals(pid)

        def shares_network(pid: int) -> bool:
            """Whether its loopback is ours; True where that cannot be told."""
            try:
                return os.stat("/proc/%d/ns/net" % pid).st_ino == os.stat("/proc/self/ns/net").st_ino
            except OSError:
                return True

        def command_line(pid: int) -> Optional[List[str]]:
            """A process's arguments; None where they cannot be had."""
            try:
                with open("/proc/%d/cmdline" % pid, "rb") as file:
                    return file.read().decode("utf-8", "replace").split("\0")
            except OSError:
                return None

        def is_thread_id(pid: int) -> bool:  # noqa: F811
            """Linux answers for a thread's id as for a process's, so a recycled pid may be a thread."""
            for line in _read_text("/proc/%d/status" % pid).splitlines():
                if line.startswith("Tgid:"):
                    return int(line.split()[1]) != pid
            return False

        def group_members(pgid: int) -> List[int]:
            """The pids of a process group, zombies left out."""
            members = []
            for name in os.listdir("/proc"):
                try:
                    if name.isdigit():
                        fields = _stat_fields(name)
                        if fields[2] == b"%d" % pgid and fields[0] not in (b"Z", b"X", b"x"):
                            members.append(int(name))
                except (OSError, IndexError):
                    pass
            return members

        def rss_bytes(pids: Sequence[int]) -> Optional[int]:
            """The resident memory of these processes together, shared pages counted in each."""
            pages = 0
            for pid in pids:
                try:
                    pages += int(_read_text("/proc/%d/statm" % pid).split()[1])
                except (IndexError, ValueError):
                    pass
            return pages * os.sysconf("SC_PAGE_SIZE") if pages else None

        _LISTEN, _ESTABLISHED, _CLOSE_WAIT, _TIME_WAIT = 10, 1, 8, 6  # net/tcp_states.h

        def _tcp_rows(host: str, port: int, *states: int) -> Iterator[Tuple[int, bool, bytes, int]]:
            """`(state, port is the local one, the other end, inode)` of the TCP sockets that concern us."""
            tail, address = port.to_bytes(2, "big"), _packed_address(host)
            try:
                table = list(_ask_sock_diag(states))
            except (OSError, AttributeError):  # a kernel, a sandbox or a Python without it
                table = list(_read_proc_net(states))
            for state, local, remote, inode in table:
                for here, there in ((local, remote), (remote, local)):
                    if here[16:] == tail and _reaches(address, here[:16]):
                        yield state, here is local, there, inode

        # An end of a connection is 18 bytes: its IPv6 address, or its IPv4 address as IPv6 writes it
        # (::ffff:a.b.c.d, as a socket for both has it), and its port.
        _IPV4, _ANY_IPV4, _ANY_IPV6 = bytes(10) + b"\xff\xff", bytes(10) + b"\xff\xff" + bytes(4), bytes(16)

        def _packed_address(host: str) -> bytes:
            """Of a name, or what else is no address, the wildcard: then the port alone has to do."""
            try:
                if ":" in host:
                    return socket.inet_pton(socket.AF_INET6, host.strip("[]"))
                return _IPV4 + socket.inet_pton(socket.AF_INET, host)
            except OSError:
                return _ANY_IPV6

        def _reaches(address: bytes, end: bytes) -> bool:
            """Whether a connection to ADDRESS may be one to END, where each may be a wildcard."""
            if address == _ANY_IPV6 or end in (address, _ANY_IPV6):
                return True
            return end.startswith(_IPV4) and (address == _ANY_IPV4 or (end == _ANY_IPV4 and address.startswith(_IPV4)))

        def _ask_sock_diag(states: Sequence[int]) -> Iterator[Tuple[int, bytes, bytes, int]]:
            """`(state, local end, remote end, inode)` of all TCP sockets in these states: sock_diag(7).

            Listeners take 0.05 ms, connections 0.4 ms, and the files in /proc/net 7 ms each: they walk a
            hash table that has room for a hundred thousand connections, with a lock for each place in it.
            """
            # A nlmsghdr (TCPDIAG_GETSOCK: both tables; NLM_F_REQUEST | NLM_F_DUMP) and an inet_diag_req.
            mask = sum(1 << state for state in states)
            request = struct.pack("=IHHII52xII", 76, 18, 0x301, 0, 0, mask, 0)
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:  # NETLINK_SOCK_DIAG
                kernel.sendto(request, (0, 0))
                while True:
                    data, at = kernel.recv(65536), 0
                    while at < len(data):
                        size, kind = struct.unpack_from("=IH", data, at)
                        if kind in (2, 3):  # NLMSG_ERROR, NLMSG_DONE
                            code = struct.unpack_from("=i", data, at + 16)[0]
                            if code < 0:
                                raise OSError(-code, os.strerror(-code))
                            return
                        row = data[at + 16 : at + size]  # inet_diag_msg
                        is_ipv4 = row[0] == socket.AF_INET
                        local, remote = (_IPV4 + row[i : i + 4] if is_ipv4 else row[i : i + 16] for i in (8, 24))
                        yield row[1], local + row[4:6], remote + row[6:8], struct.unpack_from("=I", row, 68)[0]
                        at += (size + 3) & ~3

        def _read_proc_net(states: Sequence[int]) -> Iterator[Tuple[int, bytes, bytes, int]]:
            """As _ask_sock_diag, from the files that are there where that is not."""
            for table in ("tcp", "tcp6"):
                try:
                    with open("/proc/net/" + table, "rb") as file:
                        lines = file.read().split(b"\n")[1:-1]
                except OSError:
                    continue
                for line in lines:
                    fields = line.split()
                    if int(fields[3], 16) in states:
                        yield int(fields[3], 16), _end_of(fields[1]), _end_of(fields[2]), int(fields[9])

        def _end_of(text: bytes) -> bytes:
            """proc(5) writes an address as 32-bit numbers in the machine's byte order, the port as a number."""
            digits, _, port = text.partition(b":")
            words = [int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8)]
            return (_IPV4 if len(words) == 1 else b"") + b"".join(words) + int(port, 16).to_bytes(2, "big")

        def who_listens(host: str, port: int, pid: int) -> str:
            """Whether all that listens on the port belongs to PID's process group; NOBODY, too, if PID is dead.

            This is what stands between the key and another program that has taken the port.
            """
            if not os.access("/proc/net/tcp", os.R_OK):
                return UNKNOWN
            wanted = {b"socket:[%d]" % inode for _, is_local, _, inode in _tcp_rows(host, port, _LISTEN) if is_local}
            if not wanted:
                return NOBODY
            wanted -= _open_sockets(pid)
            if wanted:  # a wrapper script's child may be the one that listens
                for member in group_members(group_of(pid)):
                    wanted -= _open_sockets(member)
            if not wanted:
                return OURS
            # While a process dies its descriptors are not to be seen any more, and its socket listens still.
            return STRANGER if process_start(pid) is not None else NOBODY

        def _open_sockets(pid: int) -> Set[bytes]:
            folder, sockets = b"/proc/%d/fd" % pid, set()
            try:
                for name in os.listdir(folder):
                    try:
                        sockets.add(os.readlink(folder + b"/" + name))
                    except OSError:
                        pass
            except OSError:
                pass
            return sockets

        def watch_folder(folder: str) -> int:
            """A write to a file in the folder ends wait_for_event(), until the descriptor is closed (-1: never)."""
            try:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | CLOEXEC)
            except OSError:
                return -1
            try:
                signal.signal(signal.SIGIO, lambda *_: None)
                fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_MODIFY | fcntl.DN_MULTISHOT)
            except (AttributeError, OSError):
                pass  # a C library or a kernel without dnotify
            return fd

        def connections_to(host: str, port: int) -> Tuple[int, Set[str]]:
            """`(open connections to the port, the other ends of those closed in the last minute)`."""
            opened, closed = 0, set()
            for state, is_local, other, inode in _tcp_rows(host, port, _ESTABLISHED, _CLOSE_WAIT, _TIME_WAIT):
                # One that its client has closed counts while the serve may work on it: once it is accepted.
                opened += is_local and (state == _ESTABLISHED or (state == _CLOSE_WAIT and inode != 0))
                if state == _TIME_WAIT:
                    closed.add(other.hex())
            return opened, closed

        def reserve_port(host: str, port: int) -> Tuple[Any, int]:
            """`(socket, port)`: the port (0: any free one) is held for the serve until the socket is closed.

            The socket is bound and does not listen: a plain bind of another program fails, a
            connection is refused, and the serve, which sets SO_REUSEADDR as servers do, can still
            listen. Another program that sets it too can as well: who_listens() is the proof.
            """
            sock = _bound_socket(socket.socket, host, port, reuse=True)
            return sock, int(sock.getsockname()[1])

    else:  # pragma: no cover - macOS and other POSIX: checked by mypy and by tests with injected calls

        def _libproc() -> Any:
            return ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)

        def _info(kind: int, pid: int, size: int) -> bytes:
            """proc_pidinfo() of libproc, sys/proc_info.h; empty if there is no such process."""
            buffer = ctypes.create_string_buffer(size)
            libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
            return buffer.raw if libproc.proc_pidinfo(pid, kind, ctypes.c_uint64(0), buffer, size) == size else b""

        def this_place() -> str:
            boot = _run_tool("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid").strip()[:8]
            return "%s:%s:0" % (_machine_id(), boot)

        def look_at(pid: int) -> Optional[Process]:
            """The process with this pid; None if there is none, or a zombie."""
            try:
                info = _info(3, pid, 136)  # PROC_PIDTBSDINFO
            except (OSError, AttributeError):
                info = b""
            if info:
                status, parent, uid = (struct.unpack_from("=I", info, at)[0] for at in (4, 16, 20))
                seconds, micros = struct.unpack_from("=QQ", info, 120)
                start = seconds * 1000000 + micros
                return None if status == 5 else Process(str(start), start / 1e6, uid, parent)  # SZOMB
            # libproc knows no zombies; `ps` does.
            found = _answers_signals(pid)
            return None if found and _run_tool("/bin/ps", "-o", "state=", "-p", str(pid)).strip().startswith("Z") else found

        def shares_network(_pid: int) -> bool:
            """There are no network namespaces."""
            return True

        def command_line(pid: int) -> Optional[List[str]]:
            return _run_tool("/bin/ps", "-ww", "-o", "command=", "-p", str(pid)).split() or None

        def group_members(pgid: int) -> List[int]:
            pids = (ctypes.c_int32 * 4096)()
            size = _libproc().proc_listpids(2, pgid, pids, ctypes.sizeof(pids))  # PROC_PGRP_ONLY
            return [pid for pid in pids[: max(0, size) // 4] if pid and process_start(pid) is not None]

        def rss_bytes(pids: Sequence[int]) -> Optional[int]:
            infos = filter(None, (_info(4, pid, 96) for pid in pids))  # PROC_PIDTASKINFO
            return sum(struct.unpack_from("=Q", info, 8)[0] for info in infos) or None

        def watch_folder(folder: str) -> int:
            return -1

        def _run_tool(*argv: str) -> str:
            null = subprocess.DEVNULL
            try:
                done = subprocess.run(argv, stdout=subprocess.PIPE, stdin=null, stderr=null, timeout=10, check=False)
            except (OSError, subprocess.SubprocessError):
                return ""
            return done.stdout.decode("ascii", "replace")

        def who_listens(host: str, port: int, pid: int) -> str:
            """Whether all that listens on the port belongs to PID's process group, as far as `lsof` sees."""
            if not _accepts_connections(host, port):
                return NOBODY
            listeners = _run_tool("lsof", "-nP", "-t", "-iTCP:%d" % port, "-sTCP:LISTEN").split()
            if not listeners:
                return UNKNOWN  # perhaps another user's process, which lsof does not show
            members = {str(member) for member in [pid, *group_members(group_of(pid))]}
            return OURS if set(listeners) <= members else STRANGER

        def connections_to(host: str, port: int) -> Tuple[int, Set[str]]:
            rows = _netstat_rows(_run_tool("netstat", "-an", "-p", "tcp"), port)
            return (sum(row[0] == "ESTABLISHED" for row in rows), {row[1] for row in rows if row[0] == "TIME_WAIT"})

        def reserve_port(host: str, port: int) -> Tuple[Any, int]:
            with _bound_socket(socket.socket, host, port) as sock:
                return None, int(sock.getsockname()[1])


_stop_signals: List[int] = []


def wait_until(condition: Callable[[], Any], seconds: float = float("inf"), pause: float = 0.02, wait: Any = None) -> Any:
    """The condition's first true value, or its last false one once so many seconds are over."""
    deadline = time.monotonic() + seconds
    while True:
        value, left = condition(), deadline - time.monotonic()
        if value or left <= 0:
            return value
        (wait or time.sleep)(min(pause, left))


def _accepts_connections(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=HEALTH_TIMEOUT).close()
    except OSError:
        return False
    return True


def _note_stop(number: int, _frame: Any) -> None:
    _stop_signals.append(number)


def lookup_name(host: str) -> Any:
    """The host as socket functions take it without loading the tables of IDNA: 2 ms, 0.4 MB, and a lock
    that a fork may find held."""
    return host.encode() if host.isascii() else host


def _bound_socket(make_socket: Any, host: str, port: int, reuse: bool = False) -> Any:
    """A socket bound to host and port; PortAllocationFailedError with what to do if that cannot be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(lookup_name(host), port, type=socket.SOCK_STREAM)[0]
        sock = make_socket(family, kind, proto)
        try:
            if reuse:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        if port and error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "is taken by another program" if error.errno == errno.EADDRINUSE else "needs privileges"
            text = "Port %d on %s %s: choose another serve_port, or none for a free one." % (port, host, why)
        else:
            text = "No port could be had on %s: %s." % (host, error.strerror or error)
        raise PortAllocationFailedError(text) from None


_places: Dict[int, str] = {}


def place() -> str:
    """`this_place()`, once per process."""
    found = _places.get(os.getpid())
    if found is None:
        found = _places[os.getpid()] = this_place()
    return found


def process_start(pid: int) -> Optional[str]:
    """The token of the process with this pid; None: dead; "": cannot tell."""
    found = look_at(pid)
    return found.start if found else None


def process_alive(pid: int) -> bool:
    """True if a process, not a zombie, has this pid now; False for what cannot be a pid."""
    return type(pid) is int and 0 < pid < 2**31 and look_at(pid) is not None and not is_thread_id(pid)


is_process_alive = process_alive  # the provider's name for it

ALIVE, DEAD, FOREIGN = "alive", "dead", "foreign"


def judge_place(where: str) -> str:
    """ALIVE: it is here. DEAD: an earlier boot of this machine. FOREIGN: elsewhere, or it cannot be told.

    No two boots have the same id, so a machine that has got another name since (laptops do) is still here.
    """
    if where == place():
        return ALIVE
    machine, boot, namespace = where.split(":") if where.count(":") == 2 else ("", "", "")
    my_machine, my_boot, my_namespace = place().split(":")
    if not boot or not my_boot:
        return FOREIGN
    if boot == my_boot:
        return ALIVE if namespace == my_namespace else FOREIGN
    return DEAD if machine == my_machine else FOREIGN


def judge_process(pid: int, start: str, where: str) -> str:
    """Whether the process that wrote its identity still lives: ALIVE, DEAD, or FOREIGN.

    Its start time settles it, for pids are used again; where that cannot be told, a live pid counts as ALIVE.
    One from another machine or pid namespace sharing the folder is FOREIGN: neither to be trusted nor to be
    cleared away.
    """
    if not 0 < pid < 2**31:
        return DEAD  # to the kernel, 0 and the negative ones are groups
    verdict = judge_place(where)
    if verdict != ALIVE:
        return verdict
    now = process_start(pid)
    if now is None:
        return DEAD
    return ALIVE if now == start or not now or not start else DEAD


def judge_bare_pid(pid: int, since: float, uid: Optional[int]) -> str:
    """ALIVE or DEAD for a pid without identity, as the provider writes it into a file.

    The file's time and owner have to do: a process of another user, or started (by more than any
    change of the clock) after the file was written, is not the one that wrote it.
    """
    if not process_alive(pid):
        return DEAD
    found = look_at(pid) or _UNREADABLE
    is_anothers = uid is not None and found.uid not in (None, uid)
    return DEAD if is_anothers or (found.started_at or 0.0) > since + CLOCK_SLACK else ALIVE


def parent_is_gone(original: int, current: int) -> bool:
    """True once the parent has changed. A parent that is pid 1 from the start is an ordinary parent."""
    return current != original


def runner_environ() -> Dict[str, str]:
    """What runner and serve inherit: all of the first caller's environment but the key of another serve (see
    Qvac.environ, which has it under both names)."""
    key, names = os.environ.get("QVAC_API_KEY"), ("QVAC_API_KEY", "OPENAI_API_KEY")
    return {name: value for name, value in os.environ.items() if name not in names or value != key}


_THIS_FILE = os.path.abspath(__file__)  # now: the program may change its folder


def reexec_argv(*args: str, detach: bool = False) -> List[str]:
    """The command that runs this very file in another interpreter (`_reexecuted` gets the arguments).

    With `detach` the interpreter forks as early as can be and goes on in the child, in a session of
    its own. Raises ServeSpawnFailedError where there is no interpreter: in an embedded or frozen Python.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        raise ServeSpawnFailedError(
            "Managed mode re-executes this module with sys.executable, which is %s here: run it from an ordinary "
            "Python, or start `qvac serve --openai` yourself and use external mode."
            % ("a frozen program" if sys.executable else "empty"))  # fmt: skip
    folder, name = os.path.split(_THIS_FILE)
    stem, extension = os.path.splitext(name)
    flags = ["-I", "-S"] + (["-B"] if sys.dont_write_bytecode else [])
    if extension not in (".py", ".pyc") or not stem.isidentifier() or stem == "__main__" or _is_of_python(stem):
        script = _THIS_FILE if os.path.isfile(_THIS_FILE) else folder  # a zip that is run by its __main__.py
        return [sys.executable, *flags, script, "--reexecuted", *(["--detach"] if detach else []), *args]
    boot = _BOOT % (_BOOT_IMPORT, _BOOT_DETACH if detach else "0")
    return [sys.executable, *flags, "-c", boot, folder, stem, *args]


def _is_of_python(name: str) -> bool:
    """Whether an import of that name gives a module of Python's own in place of this file, copied as types.py."""
    import _imp

    if name in sys.builtin_module_names or _imp.is_frozen(name):
        return True
    path = getattr(sys.modules.get(name), "__file__", None)
    if name not in sys.modules or path == _THIS_FILE:
        return False
    return path is None or path.startswith(os.path.dirname(os.__file__) + os.sep)


# ==================================================================================================
# 7. Registry: paths, records, consumers. Files are read as data of an enemy.
# ==================================================================================================


def qvac_home() -> str:
    """`~/.qvac`, as the CLI and the provider see it. RegistryError without a usable home."""
    try:
        home = home_folder()
    except KeyError:
        home = ""
    if not os.path.isabs(home):
        raise RegistryError("No home folder (%r is none): set HOME or QVAC_MANAGED_DIR to an absolute path." % home)
    return os.path.join(home, ".qvac")


def models_folder() -> str:
    """Where the CLI puts the models that it downloads; "" for a user without a home, who has a QVAC_MANAGED_DIR."""
    try:
        return os.path.join(qvac_home(), "models")
    except RegistryError:
        return ""


def managed_serves_dir() -> str:
    """The folder with all files about managed serves, as an absolute path; it need not exist yet."""
    chosen = os.environ.get("QVAC_MANAGED_DIR")
    if not chosen:
        return os.path.join(qvac_home(), "managed-serves")
    if not os.path.isabs(chosen):
        raise RegistryError("QVAC_MANAGED_DIR is %r: it has to be an absolute path." % chosen)
    return chosen.rstrip(os.sep) or os.sep


def record_path(key: str) -> str:
    return _registry_path(key, ".json")


def consumers_dir(key: str) -> str:
    return _registry_path(key, ".consumers")


def lock_path(key: str) -> str:
    return _registry_path(key, ".lock")


def error_path(key: str) -> str:
    return _registry_path(key, ".error")


def log_path(key: str) -> str:
    return _registry_path(key, ".log")


def _registry_path(key: str, suffix: str) -> str:
    if not is_valid_fleet_key(key):
        raise RegistryError("%s is no fleet key." % _shorten(repr(key), 80))
    return os.path.join(managed_serves_dir(), key + suffix)


def ensure_managed_serves_dir() -> str:
    """Make the folder if need be and put its mode right (0700); RegistryError if it is not ours to use."""
    folder = managed_serves_dir()
    try:
        try:
            status = os.lstat(folder)
        except FileNotFoundError:
            _make_private_folders(folder)
            status = os.lstat(folder)
        if status.st_mode & 0o1000 and status.st_mode & 0o022:  # sticky and writable for others, as /tmp is
            raise RegistryError("%s is for all users: set QVAC_MANAGED_DIR to a folder of your own." % folder)
        if not _is_directory(status) or not is_ours(status):
            raise RegistryError("%s is %s. Remove it, or set QVAC_MANAGED_DIR to a folder of your own." % (
                folder, "not a folder" if not _is_directory(status) else "owned by another user"))  # fmt: skip
        if status.st_mode & 0o777 != 0o700:
            os.chmod(folder, 0o700)
    except OSError as error:
        raise _registry_trouble("use", folder, error) from None
    return folder


def _make_private_folders(path: str) -> None:
    """makedirs() with mode 0700 whatever the umask, ~/.qvac too: programs that are run lie there."""
    parent = os.path.dirname(path)
    if parent != path and not os.path.isdir(parent):
        _make_private_folders(parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    try:
        os.chmod(path, 0o700)
    except OSError:
        pass  # a file system without modes


def _is_directory(status: os.stat_result) -> bool:
    return status.st_mode & 0o170000 == 0o040000


def _is_regular(status: os.stat_result) -> bool:
    return status.st_mode & 0o170000 == 0o100000


_TROUBLE_HINTS = {
    errno.ENOSPC: "The disk is full: make room.",
    errno.EROFS: "The file system is read-only: set QVAC_MANAGED_DIR to a writable folder.",
    errno.EACCES: "Make it writable for you, or set QVAC_MANAGED_DIR to another folder.",
    errno.EMFILE: "This process has too many open files: close some.",
    errno.EAGAIN: "No more processes may be started: end some.",
}


def _registry_trouble(verb: str, path: str, error: OSError) -> RegistryError:
    hint = _TROUBLE_HINTS.get(error.errno or 0, "")
    return RegistryError("Cannot %s %s: %s. %s" % (verb, _shorten(path, 300), error.strerror or error, hint))


def _read_registry_file(path: str) -> Optional[Tuple[bytes, os.stat_result]]:
    """Content and status of a file that is regular, ours, no link and not over 64 kB; else None."""
    try:
        fd = os.open(path, os.O_RDONLY | NOFOLLOW | NONBLOCK | CLOEXEC | BINARY)
    except ValueError:  # a record's path to its config may be none that a system has
        return None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise _registry_trouble("read", path, error) from None
        return None
    try:
        status = os.fstat(fd)
        if not _is_regular(status) or not is_ours(status) or status.st_size > MAX_FILE_BYTES:
            return None
        return os.read(fd, MAX_FILE_BYTES + 1)[:MAX_FILE_BYTES], status
    except OSError:
        return None
    finally:
        os.close(fd)


def _write_new_file(path: str, content: bytes, replace: bool = False) -> None:
    """Make a 0600 file; if that fails (a full disk), nothing of it is left.

    With `replace`, by temp file and rename: a reader sees the old content or all of the new. Without it the
    file must not exist yet (FileExistsError), and a reader may see it before its content is complete.
    """
    target = "%s.%d.%s.tmp" % (path, os.getpid(), os.urandom(4).hex()) if replace else path
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW | CLOEXEC | BINARY, 0o600)
    try:
        try:
            make_private(fd)  # whatever the umask
            while content:
                content = content[os.write(fd, content):]  # fmt: skip
        finally:
            os.close(fd)
        if replace:
            replace_file(target, path)
    except BaseException:
        _unlink(target)
        raise


def _version(status: os.stat_result) -> Tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def file_version(path: str) -> Optional[Tuple[int, int, int]]:
    """Tells one version of a file from another, by inode, time and size; None if there is no file."""
    try:
        return _version(os.lstat(path))
    except OSError:
        return None


def _unlink(path: str) -> bool:
    try:
        remove_file(path)
        return True
    except OSError:
        return False


def _strict_json(data: bytes) -> Any:
    """The JSON value, or None: also for NaN, for nesting that overflows the stack, for digits without end."""
    def refuse(_: str) -> None:
        raise ValueError("no JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


# One table for the record: (JSON name, attribute, type). The first ten are the provider's, the rest ours.
_RECORD_FIELDS = (
    ("fleetKey", "fleet_key", str),
    ("servePid", "serve_pid", int),
    ("runnerPid", "runner_pid", int),
    ("port", "port", int),
    ("host", "host", str),
    ("baseURL", "base_url", str),
    ("configPath", "config_path", str),
    ("startedAt", "started_at", str),
    ("idleTimeoutMs", "idle_timeout_ms", float),
    ("apiKey", "api_key", str),
    ("serveStart", "serve_start", str),  # identities: see judge_process
    ("runnerStart", "runner_start", str),
    ("place", "place", str),
    ("restarts", "restarts", int),
    ("idleSince", "idle_since", float),  # monotonic seconds; 0 while in use
    ("readyAt", "ready_at", float),  # monotonic seconds
    ("serveBinPath", "serve_bin_path", str),
    ("pinnedPort", "pinned_port", int),
)
_REQUIRED_FIELDS = 9  # of the provider's ten all but `apiKey`, which an old provider's record lacks


class ServeRecord:
    """What is known of a running serve: frozen. Fields as in _RECORD_FIELDS; ours are "" or 0 when absent.

    `version`, `mtime` and `uid` are the file's: the first tells this version of it from another; all three are
    None for a record that was not read from a file. The API key is in no repr.
    """

    fleet_key: str
    serve_pid: int
    runner_pid: int
    port: int
    host: str
    base_url: str
    config_path: str
    started_at: str
    idle_timeout_ms: float
    api_key: str
    serve_start: str
    runner_start: str
    place: str
    restarts: int
    idle_since: float
    ready_at: float
    serve_bin_path: str
    pinned_port: int
    version: Any
    mtime: Optional[float]
    uid: Optional[int]

    __slots__ = (*(field[1] for field in _RECORD_FIELDS), "version", "mtime", "uid")

    def __init__(self, **fields: Any) -> None:
        for _, attribute, kind in _RECORD_FIELDS:
            object.__setattr__(self, attribute, fields.get(attribute, kind()))
        for extra in ("version", "mtime", "uid"):
            object.__setattr__(self, extra, fields.get(extra))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a record is frozen")

    def __repr__(self) -> str:
        return "<ServeRecord %s pid=%d runner=%d %s>" % (self.fleet_key, self.serve_pid, self.runner_pid, self.base_url)

    def __reduce__(self) -> Any:
        raise TypeError("a ServeRecord holds an API key and cannot be pickled")

    def with_fields(self, **changes: Any) -> ServeRecord:
        return ServeRecord(**{**{field[1]: getattr(self, field[1]) for field in _RECORD_FIELDS}, **changes})

    def judge_serve(self) -> str:
        return self._judge(self.serve_pid, self.serve_start)

    def judge_runner(self) -> str:
        return self._judge(self.runner_pid, self.runner_start)

    def _judge(self, pid: int, start: str) -> str:
        if self.place:
            verdict = judge_process(pid, start, self.place)
            stale = verdict == FOREIGN and _heartbeat_age(self.mtime) > FOREIGN_STALE
            return DEAD if stale else verdict
        return judge_bare_pid(pid, self.mtime if self.mtime is not None else time.time(), self.uid)

    @property
    def has_identities(self) -> bool:
        """It tells its processes from later ones with their pids: ours does, a provider's does not."""
        return bool(self.place and self.serve_start and self.runner_start)

    @property
    def names_its_serve(self) -> bool:
        """Whether the serve's pid, if alive, is a serve's, as far as can be told here. A bare pid may be another
        program's by now, so the command line has to name the port (true where none can be read). Attaching
        does not ask for this, as who_listens() does then; sending a signal and giving way to a record do."""
        words = [] if self.has_identities else command_line(self.serve_pid)
        return self.has_identities or words is None or ("--port", str(self.port)) in zip(words, words[1:])

    @property
    def is_restarting(self) -> bool:
        """The runner has put its own pid in the place of the serve's while it brings the serve back."""
        return self.serve_pid == self.runner_pid

    @property
    def is_private(self) -> bool:
        return is_private_key(self.fleet_key)


def _heartbeat_age(mtime: Optional[float]) -> float:
    """Seconds since a file was touched, either way: a clock set back must not make it young for ever."""
    return abs(time.time() - mtime) if mtime is not None else 0.0


def _encode_record(record: ServeRecord) -> bytes:
    data = {}
    for name, attribute, kind in _RECORD_FIELDS:
        value = getattr(record, attribute)
        # A number that is whole goes out as an integer, as JavaScript writes it.
        data[name] = int(value) if kind is float and value == int(value) else value
    return (json.dumps(data, indent=2) + "\n").encode("ascii")


def _is_exactly(value: Any, kind: type) -> bool:
    """`true` is no integer; a number may be whole, but not without end."""
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is kind


def _decode_record(data: bytes, key: str, **extra: Any) -> Optional[ServeRecord]:
    """The record in a file, or None if it is not exactly one: types, ranges, and the address it names.

    A record of an old provider comes back with an empty `api_key`.
    """
    raw = _strict_json(data)
    if not isinstance(raw, dict):
        return None
    fields: Dict[str, Any] = {}
    for index, (name, attribute, kind) in enumerate(_RECORD_FIELDS):
        value = raw.get(name)
        if _is_exactly(value, kind):
            fields[attribute] = value
        elif index < _REQUIRED_FIELDS:
            return None
    record = ServeRecord(**fields, **extra)
    sane = (
        record.fleet_key == key
        and all(0 < pid < 2**31 for pid in (record.serve_pid, record.runner_pid))
        and 0 < record.port < 65536
        and _fits_into_a_header(record.api_key)
        and _destination(record.base_url) == (record.host.strip("[]").lower(), record.port)
    )
    return record if sane else None


def _destination(base_url: str) -> Optional[Tuple[str, int]]:
    """Host and port of a plain http URL without anything that could lead elsewhere."""
    if not base_url.startswith("http://") or not base_url.endswith("/v1") or not base_url.isprintable():
        return None
    host, _, port = base_url[len("http://") : -len("/v1")].rpartition(":")
    if not host or any(c in host for c in "/\\@?#% ") or not (port.isascii() and port.isdigit()) or len(port) > 5:
        return None
    return host.strip("[]").lower(), int(port)


def base_url_of(host: str, port: int) -> str:
    return "http://%s:%d/v1" % ("[%s]" % host if ":" in host else host, port)


def read_record(key: str) -> Optional[ServeRecord]:
    """The record of a key; None if there is none that can be used (an old provider's has no key)."""
    record = _read_any_record(key)
    return record if record is not None and record.api_key else None


def _read_any_record(key: str) -> Optional[ServeRecord]:
    found = _read_registry_file(record_path(key))
    if found is None:
        return None
    data, status = found
    return _decode_record(data, key, version=_version(status), mtime=status.st_mtime, uid=status.st_uid)


def read_all_records() -> List[ServeRecord]:
    """Every usable record, in no order."""
    return [record for record in _each_record() if record.api_key]


def _each_record() -> Iterator[ServeRecord]:
    for name in _listdir(managed_serves_dir()):
        if name.endswith(".json") and is_valid_fleet_key(name[: -len(".json")]):
            record = _read_any_record(name[: -len(".json")])
            if record is not None:
                yield record


def _listdir(folder: str) -> List[str]:
    """The names in a folder, none if there is no folder. A folder that cannot be read is not an empty one."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _registry_trouble("list", folder, error) from None


def _listdir_own(folder: str) -> List[str]:
    """The names in a real folder of ours; none behind a link, which could lead a deletion elsewhere."""
    return _listdir(folder) if _is_own_folder(folder) else []


def _is_own_folder(path: str) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return _is_directory(status) and is_ours(status)


def write_record(record: ServeRecord) -> Any:
    """Publish a record whole, by temp file and rename. Returns its version. Its runner calls this, under the
    guard; a client only to lengthen the idle timeout (see _Resolver._wish_to_keep)."""
    path = record_path(record.fleet_key)
    ensure_managed_serves_dir()
    try:
        _write_new_file(path, _encode_record(record), replace=True)
        return _version(os.lstat(path))
    except OSError as error:
        raise _registry_trouble("write", path, error) from None


def remove_record(key: str, preserve_consumers: bool = False) -> None:
    """Remove a record and, unless told to preserve them, the markers of consumers that are dead.

    Unlike the provider's, it never removes the marker of a live consumer.
    """
    _unlink(record_path(key))
    if not preserve_consumers:
        remove_dead_consumers(key)


def _rmdir(path: str) -> bool:
    try:
        os.rmdir(path)
        return True
    except OSError:
        return False


# -- consumers


def add_consumer(key: str, consumer_id: Union[str, int]) -> None:
    """Write the marker of a consumer. `consumer_id` is `PID.RAND`, one for each client object, or a bare pid.

    The provider reads the pid in its name; we add the identity of the process in its content.
    """
    ensure_managed_serves_dir()
    folder, path = consumers_dir(key), os.path.join(consumers_dir(key), str(consumer_id))
    content = ("%s %s\n" % (process_start(os.getpid()) or "", place())).encode()
    for attempt in range(5):
        try:
            if attempt:  # the first consumer; or a runner that ends, or a provider, has just removed the folder
                _make_private_folders(folder)
            if os.path.lexists(folder) and not _is_own_folder(folder):
                raise RegistryError("%s is in the way: it is no folder of yours. Remove it." % folder)
            _write_new_file(path, content)
            return
        except FileExistsError as caught:
            if os.path.isfile(path):
                return
            error: OSError = caught
        except FileNotFoundError as caught:
            error = caught
        except OSError as caught:
            raise _registry_trouble("write", path, caught) from None
    raise _registry_trouble("write", path, error)


def remove_consumer(key: str, consumer_id: Union[str, int]) -> None:
    """Remove the marker of a consumer; no error if it is gone. The folder stays, for whoever finds it empty."""
    _unlink(os.path.join(consumers_dir(key), str(consumer_id)))


def remove_dead_consumers(key: str) -> None:
    """Remove the markers of dead processes, and the folder if nothing is left in it."""
    live_consumers(key)
    _rmdir(consumers_dir(key))


def live_consumers(key: str) -> List[int]:
    """The pids of the live consumers, one for each marker; markers of dead processes are removed.

    A marker from another machine or pid namespace is neither counted nor removed.
    """
    return [int(name.partition(".")[0]) for name in _live_markers(key)]


def _live_markers(key: str) -> List[str]:
    live, folder = [], consumers_dir(key)
    for name in _listdir_own(folder):
        verdict = _judge_marker(os.path.join(folder, name), name)
        if verdict == ALIVE:
            live.append(name)
        elif verdict == DEAD:
            _unlink(os.path.join(folder, name))
    return live


def _judge_marker(path: str, name: str) -> str:
    digits = name.partition(".")[0]
    found = _read_registry_file(path)
    if not digits.isdigit() or len(digits) > 10 or found is None or not digits.isascii():
        # Not a marker. One we may be looking at while it is removed is gone anyway.
        return DEAD if found is not None else FOREIGN
    words = found[0].decode("ascii", "replace").split()
    if len(words) == 2:
        return judge_process(int(digits), words[0], words[1])
    return judge_bare_pid(int(digits), found[1].st_mtime, found[1].st_uid)


# ==================================================================================================
# 8. Guard and spawn lock
# ==================================================================================================


class guard:
    """Hold `registry.guard`: `with guard(): ...` around what must be seen as one step.

    The kernel frees it when its holder dies, so it is never stale. It is only held for short sections,
    never over a wait or a request; a holder that does not let go has been stopped (SIGSTOP, a
    debugger), and after `timeout` seconds that is a RegistryError. Each holder touches the file: a crowd
    on a busy machine may take longer for its turns, but somebody has one.
    """

    def __init__(self, timeout: float = GUARD_TIMEOUT) -> None:
        self._timeout, self._fd, self._is_held = timeout, -1, False

    def __enter__(self) -> None:
        _let_go_of_guard()
        path = os.path.join(ensure_managed_serves_dir(), "registry.guard")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW | CLOEXEC | NONBLOCK, 0o600)
        except OSError as error:
            raise _registry_trouble("open", path, error) from None
        _guards[_thread.get_ident()] = self
        try:
            make_private(self._fd)
            self._wait_for_lock(path)
            self._is_held = True
            _guards[_thread.get_ident()] = self  # again: a signal handler may have used a guard while we waited
        except BaseException:
            self._close()
            raise

    def _wait_for_lock(self, path: str) -> None:
        deadline, touched, pause = 0.0, None, 0.001  # type: float, Optional[int], float
        while not lock_fd(self._fd):
            before, touched = touched, os.fstat(self._fd).st_mtime_ns
            if touched != before:
                deadline = time.monotonic() + self._timeout
            elif time.monotonic() > deadline:
                raise RegistryError("%s has been held for %.0f s: is a process that uses QVAC stopped? "
                                    "Let it go on (kill -CONT) or end it." % (path, self._timeout))  # fmt: skip
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        try:
            os.utime(path)
        except OSError:
            pass

    def __exit__(self, *_: Any) -> None:
        if self._fd >= 0:  # else a signal handler that used the guard, too, has taken it for a leftover
            unlock_fd(self._fd)
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        _guards.pop(_thread.get_ident(), None)


def _let_go_of_guard() -> None:
    """Ctrl-C right before or after the block of a `with guard()` leaves it locked: free what this thread still has."""
    leftover = _guards.get(_thread.get_ident())
    if leftover is not None and leftover._is_held:
        leftover._close()


RUNNER_MARK = "runner-"  # begins the nonce of a lock that a runner holds
_guards: Dict[int, guard] = {}  # by thread
# (fleet key, thread): the text it has in the lock. One table for all copies of this file in the process: to
# another copy, a lock with this process's identity that it does not know would be a leftover.
_held_locks: Dict[Tuple[str, int], str] = vars(sys).setdefault("_qvac_managed_held_locks", {})


def try_lock(key: str, timeout: float = GUARD_TIMEOUT) -> bool:
    """Take the spawn lock of a key; False while its owner lives. Release it with release_lock().

    The lock is the provider's: a file made with O_EXCL that begins with the owner's pid. A dead
    owner's is stolen at once, one whose owner cannot be read after 30 s. Two of us never both win;
    a provider that steals the same dead lock at the same moment may overwrite ours, which the runner
    sees when it reads the lock again (see _Runner._has_lost_the_lock).
    """
    text, taken = _lock_text(os.urandom(8).hex()), False
    with guard(timeout):
        if held_lock(key) and _read_lock(key) == held_lock(key):
            return False
        # Noted first: Ctrl-C between two steps must not leave a lock that nobody would release.
        _held_locks[key, _thread.get_ident()] = text
        written = "%s.%d.%s.tmp" % (lock_path(key), os.getpid(), os.urandom(4).hex())
        try:
            taken = _make_lock(key, text, written)
            return taken
        finally:
            _unlink(written)  # again, in case Ctrl-C came right before the first time
            if not taken:
                _release_lock(key)


def _make_lock(key: str, text: str, written: str) -> bool:
    path = lock_path(key)
    try:
        _write_new_file(written, text.encode())
        for _ in range(3):
            found = file_version(path)
            try:
                _link_or_write(written, path, text.encode())
            except FileExistsError:
                if _judge_lock(key) != DEAD or not _move_stale_lock_away(key, found):
                    return False
            else:
                # At once: a provider's client that waits spins while it sees an error and a held lock.
                _unlink(error_path(key))
                return True
    except OSError as error:
        raise _registry_trouble("make", path, error) from None
    finally:
        _unlink(written)
    return False


def _link_or_write(written: str, path: str, content: bytes) -> None:
    """Make a file that must not exist yet appear with its content: a kill between two steps would leave it empty,
    and all others wait half a minute. A file system without links has to take that risk."""
    try:
        os.link(written, path)
    except FileExistsError:
        raise
    except OSError:
        _write_new_file(path, content)


def release_lock(key: str) -> None:
    """Release the spawn lock if it is still this thread's; somebody else's is left alone."""
    if held_lock(key):
        with guard():
            _release_lock(key)


def _release_lock(key: str) -> None:
    """As release_lock, for a holder of the guard."""
    if held_lock(key) and _read_lock(key) == held_lock(key):
        _unlink(lock_path(key))
    _held_locks.pop((key, _thread.get_ident()), None)


def held_lock(key: str) -> str:
    """The text that this thread has in the spawn lock; "" if it does not hold it."""
    return _held_locks.get((key, _thread.get_ident()), "")


def _lock_text(nonce: str) -> str:
    return "%d %s %s %s\n" % (os.getpid(), process_start(os.getpid()) or "?", place(), nonce)


def _read_lock(key: str) -> Optional[str]:
    found = _read_registry_file(lock_path(key))
    return found[0].decode("utf-8", "replace") if found else None


def _judge_lock(key: str) -> str:
    """ALIVE: held. DEAD: its owner is gone, or cannot be read and it is old. FOREIGN: another namespace's."""
    path = lock_path(key)
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return DEAD
    if not _is_regular(status) or not is_ours(status):
        raise RegistryError("%s is in the way: it is no lock file of yours. Remove it." % path)
    text = _read_lock(key) or ""
    words = text.split()
    is_number = bool(words) and words[0].isascii() and words[0].isdigit() and len(words[0]) <= 10
    pid = int(words[0]) if is_number else 0
    if not 0 < pid < 2**31:
        return DEAD if _heartbeat_age(status.st_mtime) > LOCK_STALE else ALIVE
    if len(words) != 4:
        # A provider's. One with our own pid was left by whoever had it before us.
        return DEAD if pid == os.getpid() else judge_bare_pid(pid, status.st_mtime, status.st_uid)
    verdict = judge_process(pid, "" if words[1] == "?" else words[1], words[2])
    if verdict == ALIVE and pid == os.getpid() and text not in _held_locks.values():
        return DEAD
    if verdict == FOREIGN and _heartbeat_age(status.st_mtime) > FOREIGN_LOCK_STALE:
        return DEAD
    return verdict


def _move_stale_lock_away(key: str, judged: Any) -> bool:
    """Steal under the guard: rename, then make sure that it was the stale one (`judged`) that was renamed.

    A provider knows no guard: between our look and our rename it may have replaced the stale lock by
    its own fresh one. That one is put back (the link fails if yet another has appeared).
    """
    path = lock_path(key)
    aside = "%s.%d.%s.stale" % (path, os.getpid(), os.urandom(4).hex())
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _registry_trouble("replace", path, error) from None
    same = bool(file_version(aside) == judged)
    if not same:
        try:
            os.link(aside, path)
        except OSError:
            pass
    _unlink(aside)
    return same


def _remove_dead_lock(key: str) -> None:
    """For a sweep: of a key that is never asked for again, nobody steals the lock."""
    with guard():
        found = file_version(lock_path(key))
        if found is not None and _judge_lock(key) == DEAD:
            _move_stale_lock_away(key, found)


def take_over_lock(key: str, expected: str) -> Optional[str]:
    """Put this process's identity in the place of `expected`; the new text, or None if it is not there.

    So the lock stays held while a runner works, though the client that took it may be dead by now.
    """
    text = _lock_text(RUNNER_MARK + os.urandom(8).hex())
    with guard():
        if _read_lock(key) != expected:
            return None
        _write_new_file(lock_path(key), text.encode(), replace=True)
    _held_locks[key, _thread.get_ident()] = text
    return text


def _forget_after_fork() -> None:
    """In a forked child: what the parent holds is the parent's. A child that keeps an open guard would
    keep it locked, were its parent to die in that moment."""
    for held in list(_guards.values()):
        try:
            os.close(held._fd)
        except OSError:
            pass
    _guards.clear()
    _held_locks.clear()


# ==================================================================================================
# 9. HTTP
# ==================================================================================================


def _openers() -> Any:
    """`(for requests, for health checks)`, made once; the latter has a deadline for the whole call, and no https."""
    global _opener_cache
    if _opener_cache is None:
        _opener_cache = _make_openers()
    return _opener_cache


_opener_cache: Any = None
_under_way: Any = _thread._local()  # `.call`: the _Call of the request that this thread makes


class _Call:
    """What is waited for under it (`with call:`), so that another thread can end the wait."""

    def __init__(self) -> None:
        self.ended = False
        self._undo: Dict[str, Callable[[], Any]] = {}

    def __enter__(self) -> None:
        self._outer = getattr(_under_way, "call", None)
        _under_way.call = self

    def __exit__(self, *_: object) -> None:
        _under_way.call = self._outer

    def end(self) -> None:
        """For good. Of a request the connection is closed, so that the serve stops its work for it."""
        self.ended = True
        for undo in list(self._undo.values()):
            try:
                undo()
            except OSError:
                pass  # it is over

    @staticmethod
    def note(kind: str, undo: Callable[[], Any]) -> None:
        """Tell the call of this thread, if any, how to end what it waits for now."""
        call = getattr(_under_way, "call", None)
        if call is not None:
            call._undo[kind] = undo
            if call.ended:  # before there was anything to end
                call.end()


def _make_openers() -> Tuple[Any, Any]:
    """urllib's machinery without proxies, redirects and cookies.

    By itself urllib sends loopback requests, key included, to $http_proxy, and follows redirects with
    the Authorization header to wherever they lead (CPython issue 77842).
    """
    class DeadlineSocket(socket.socket):
        """Receives until a deadline for the whole call; a socket's own timeout is for each packet."""

        deadline = 0.0

        def recv_into(self, *args: Any) -> int:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout("timed out")
            self.settimeout(left)
            return super().recv_into(*args)

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.host = lookup_name(self.host)
            super().connect()
            _Call.note("connection", functools.partial(self.sock.shutdown, socket.SHUT_RDWR))

    class DeadlineConnection(Connection):
        def connect(self) -> None:
            deadline = time.monotonic() + (self.timeout or HEALTH_TIMEOUT)
            super().connect()
            self.sock = DeadlineSocket(fileno=self.sock.detach())
            self.sock.settimeout(self.timeout)
            self.sock.deadline = deadline

    class HTTPHandler(urllib.request.HTTPHandler):
        def __init__(self, connection: Any) -> None:
            super().__init__()
            self.connection = connection

        def http_open(self, request: Any) -> Any:
            return self.do_open(self.connection, request)

    class HTTPSHandler(urllib.request.AbstractHTTPHandler):
        """urllib's own reads all certificates as it is made: 30 ms, and a lock that a fork may find held."""

        https_request = urllib.request.AbstractHTTPHandler.do_request_

        def https_open(self, request: Any) -> Any:
            class SecureConnection(http.client.HTTPSConnection):
                def connect(self) -> None:
                    super().connect()
                    _Call.note("connection", functools.partial(self.sock.shutdown, socket.SHUT_RDWR))

            return self.do_open(SecureConnection, request)

    def build(*handlers: Any) -> Any:
        opener = urllib.request.OpenerDirector()
        for handler in (*handlers, urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()):
            opener.add_handler(handler)
        return opener

    return build(HTTPHandler(Connection), HTTPSHandler()), build(HTTPHandler(DeadlineConnection))


# What a health check found; check_serve() may answer STRANGER (section 6) as well.
REFUSED, BUSY, WRONG, HEALTHY = "refused", "busy", "wrong", "healthy"


class Health:
    """The outcome of a health check: `state`, `models` ([{"id", "state"}]) if healthy, else `detail`."""

    def __init__(self, state: str, models: Sequence[Dict[str, str]] = (), detail: str = "") -> None:
        self.state, self.models, self.detail = state, list(models), detail
        self.address = ""  # where check_serve() has found the serve


def check_health(base_url: str, api_key: str, timeout: float = HEALTH_TIMEOUT) -> Health:
    """One GET of `base_url`/models, `timeout` seconds in all; never raises.

    REFUSED: nothing listens. BUSY: no answer in time, or one that another try may better (5xx, a
    connection that broke). WRONG: an answer that no serve with this key gives. HEALTHY: a model list.
    """
    request = urllib.request.Request(base_url + "/models")
    if api_key:
        request.add_unredirected_header("Authorization", "Bearer " + api_key)
    try:
        with _openers()[1].open(request, timeout=timeout) as response:
            body = response.read(MAX_BODY_BYTES + 1)
            if response.length and len(body) <= MAX_BODY_BYTES:  # what is still to come never came
                raise http.client.IncompleteRead(body, response.length)
    except urllib.error.HTTPError as error:
        with error:
            state = BUSY if error.code >= 500 or error.code == 429 else WRONG
            return Health(state, detail="it answers GET /v1/models with %d" % error.code)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if is_refused(error):
            return Health(REFUSED, detail="it refuses connections")
        return Health(BUSY, detail="it does not answer GET /v1/models (%s)" % (getattr(error, "reason", "") or error))
    models = _parse_models(body)
    if models is None:
        return Health(WRONG, detail="it answers GET /v1/models with something that is no model list")
    return Health(HEALTHY, models)


def _parse_models(body: bytes) -> Optional[List[Dict[str, str]]]:
    answer = _strict_json(body) if len(body) <= MAX_BODY_BYTES else None
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in data):
        return None
    return [{"id": m["id"], "state": m["state"] if isinstance(m.get("state"), str) else "unknown"} for m in data]


def health_check(base_url: str, api_key: str, timeout: float = HEALTH_TIMEOUT) -> bool:
    """True if a serve answers there with a model list. Slow is not dead: see check_health."""
    return check_health(base_url, api_key, timeout).state == HEALTHY


def check_serve(record: ServeRecord, timeout: float = HEALTH_TIMEOUT) -> Health:
    """check_health of a record's serve, whose key goes to nobody else: STRANGER if another listens in its place."""
    listener, address = find_listener(record.host, record.port, record.serve_pid)
    if listener == STRANGER:
        return Health(STRANGER, detail="another program listens on its port")
    if listener == NOBODY:
        return Health(REFUSED, detail="nothing listens on its port")
    health = check_health(base_url_of(address, record.port), record.api_key, timeout)
    health.address = address
    return health


def find_listener(host: str, port: int, pid: int) -> Tuple[str, str]:
    """`(who_listens() there, address)` for the address of HOST at which the serve PID listens.

    A name may have several, as localhost has: the serve listens at one, and at another with the same
    port anybody may. The address is for all that is sent to the serve.
    """
    found = [(who_listens(address, port, pid), address) for address in _addresses_of(host)]
    for wanted in (OURS, UNKNOWN, STRANGER):
        for verdict, address in found:
            if verdict == wanted:
                return verdict, address
    return NOBODY, host


def _addresses_of(host: str) -> List[str]:
    """The addresses of a name; what is one, or has none, comes back as it is."""
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.strip("[]"))
        return [host.strip("[]")]
    except OSError:
        pass
    try:
        found = socket.getaddrinfo(lookup_name(host), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return [host]
    return list(dict.fromkeys(str(row[4][0]) for row in found))


def is_refused(error: BaseException) -> bool:
    """True only for a refused connection: the request has never reached a serve, so it may be sent again."""
    reason = getattr(error, "reason", None)
    return isinstance(error, ConnectionRefusedError) or isinstance(reason, ConnectionRefusedError)


def _serve_error(error: Any) -> ServeHTTPError:
    """An HTTP error answer (urllib.error.HTTPError) as ServeHTTPError, with the serve's own message."""
    with error:
        try:
            body = error.read(MAX_FILE_BYTES)
        except (OSError, http.client.HTTPException):
            body = b""  # the connection broke, but its status was there
    answer = _strict_json(body)
    inner = answer.get("error") if isinstance(answer, dict) else None
    message = inner.get("message") if isinstance(inner, dict) else inner
    if not isinstance(message, str):
        message = _shorten(body.decode("utf-8", "replace").strip(), 300) or str(error.reason)
    return ServeHTTPError(error.code, message, body)


# ==================================================================================================
# 10. Serve process: find the CLI, start, wait for ready, stop
# ==================================================================================================


def find_cli(serve_bin_path: Optional[str] = None) -> List[str]:
    """The command that starts the CLI, as a list; CliNotFoundError, saying what to type, if there is none.

    Looked for: `serve_bin_path`; $QVAC_BIN; node_modules/.bin from the working folder upwards; PATH;
    ~/.qvac/cli, where `install-cli` puts it. The first two are a path, or a name that is on PATH.
    """
    if serve_bin_path == ECHO:
        return reexec_argv("echo")
    for name, chosen in (("serve_bin_path", serve_bin_path), ("QVAC_BIN", os.environ.get("QVAC_BIN"))):
        if chosen:
            try:
                path = _on_path(chosen) or os.path.abspath(chosen)
            except FileNotFoundError:  # the working folder is gone
                path = chosen
            if not os.path.isfile(path) or not os.access(path, os.X_OK):
                problem = "is not an executable file" if os.path.exists(path) else "does not exist"
                raise CliNotFoundError("%s is %s, which %s." % (name, _shorten(chosen, 300), problem), [path])
            return command_for(path)
    looked_in = []
    for folder in _cli_folders():
        looked_in.append(folder)
        for name in CLI_NAMES:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return command_for(path)
    raise CliNotFoundError(
        "No `qvac` command found. Install it with `npm install -g @qvac/cli` or "
        "`python -m qvac_managed install-cli`, or name it with serve_bin_path or QVAC_BIN.", looked_in)  # fmt: skip


def _on_path(name: str) -> Optional[str]:
    """Where on PATH a bare name is that is no file in the working folder: a shell and Node.js look there, too."""
    if os.path.dirname(name) or os.path.exists(name):
        return None
    return shutil.which(name, path=os.pathsep.join(_path_folders()))


def _path_folders() -> List[str]:
    """The folders of PATH, without those that depend on where we are: whose files would those be?"""
    return [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(folder)]


def _cli_folders() -> Iterator[str]:
    try:
        folder = os.getcwd()
        while True:
            yield os.path.join(folder, "node_modules", ".bin")
            if folder == os.path.dirname(folder):
                break
            folder = os.path.dirname(folder)
    except OSError:
        pass  # the working folder has been removed
    yield from _path_folders()
    try:
        yield os.path.join(qvac_home(), "cli", "node_modules", ".bin")
    except RegistryError:
        pass


def allocate_free_port(host: str) -> int:
    """A port that was free a moment ago. PortAllocationFailedError if there is none."""
    sock, port = reserve_port(host, 0)
    if sock is not None:
        sock.close()
    return port


def open_log(key: str) -> int:
    """KEY.log for appending, as a descriptor."""
    path = log_path(key)
    ensure_managed_serves_dir()
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NOFOLLOW | NONBLOCK | CLOEXEC | BINARY, 0o600)
    except OSError as error:
        raise _registry_trouble("open", path, error) from None
    status = os.fstat(fd)
    if _is_regular(status) and is_ours(status):
        make_private(fd)
        return fd
    os.close(fd)
    raise RegistryError("%s is in the way: it is no log file of yours. Remove it." % path)


def read_log(fd: int, start: int, limit: int = LOG_READ_BYTES) -> bytes:
    """The last `limit` bytes of a log from offset `start` on (from 0 if it has been cut since)."""
    size = os.fstat(fd).st_size
    start = max(start if start <= size else 0, size - limit)
    os.lseek(fd, start, os.SEEK_SET)
    return os.read(fd, limit)


def cut_log(fd: int) -> None:
    """Keep the newest quarter of a log that has grown too large; what is written meanwhile may be lost."""
    if os.fstat(fd).st_size > MAX_LOG_BYTES:
        newest = read_log(fd, 0, MAX_LOG_BYTES // 4)
        os.ftruncate(fd, 0)
        os.write(fd, newest[newest.find(b"\n", 0, TAIL_CHARS) + 1 :])


def redact(text: str, secret: str) -> str:
    return text.replace(secret, "[key]") if secret else text


def log_tail(fd: int, start: int, secret: str) -> str:
    """The end of what a serve printed, for an error: bytes that are no UTF-8 replaced, the key taken out."""
    text = read_log(fd, start).decode("utf-8", "replace").replace("\0", "")
    return redact(text, secret).strip()[-TAIL_CHARS:]


def model_files(folder: str) -> Dict[str, int]:
    """Path and size of each downloaded model file: the serve prints no progress, but they grow."""
    sizes: Dict[str, int] = {}
    folders = [folder]
    while folders and len(sizes) < 10000:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        sizes[entry.path] = entry.stat().st_size
        except OSError:
            pass
    return sizes


def serve_argv(command: Sequence[str], config: str, host: str, port: int, key_argument: Sequence[str]) -> List[str]:
    return [*command, "serve", "--openai", "--no-default", "--config", config, "--port", str(port), "--host", host,
            *key_argument]  # fmt: skip


def stop_serve_process(serve: ServeProcess, grace: float = STOP_GRACE) -> None:
    """The stop ladder. When it returns, nothing of the serve's group is left, but for a worker that hangs in the
    kernel; for a serve that hangs there it waits without end.

    1. SIGTERM to the serve alone.  2. Wait up to `grace` seconds for its end.  3. SIGKILL to the
    group if it is still there.  4. Then finish_group().
    """
    if serve.ended() is None:
        serve.terminate()
        if not wait_until(serve.ended, grace, 0.1, wait_for_event):
            serve.kill_group()
    wait_until(serve.ended, pause=0.05, wait=wait_for_event)
    finish_group(serve)


def finish_group(serve: ServeProcess) -> None:
    """After every end of a serve: its worker gets a short grace, then SIGKILL, then the zombie is reaped.

    In this order: until it is reaped the zombie keeps the group's id from being used again.
    """
    if not wait_until(serve.group_is_empty, GROUP_GRACE, 0.01):
        # Not even SIGKILL ends a process that hangs in the kernel: not for ever.
        wait_until(lambda: serve.kill_group() or serve.group_is_empty(), GROUP_GRACE, 0.05)
    serve.kill_group()
    serve.reap()


def stop_stray_group(pid: int, is_still_it: Callable[[], bool], grace: float = STOP_GRACE) -> bool:
    """The stop ladder for a serve that is not our child (an orphan's); True when its group is gone."""
    group = group_of(pid)
    try:
        terminate_process(pid)
    except OSError:
        pass
    wait_until(lambda: not is_still_it(), grace)
    wait_until(lambda: is_still_it() or not group_members(group), GROUP_GRACE)
    return bool(wait_until(lambda: not group_members(group) or kill_group_of(group), 1.0))


# ==================================================================================================
# 11. Runner: the detached process that owns one serve
# ==================================================================================================


OLD_CLI = (
    "This qvac CLI knows no --api-key-file: the key is on its command line, which every user of this machine "
    "can read. Update @qvac/cli."
)


LOGGED_MODELS = " with models "  # in the log's line about a start, before their names


class _Superseded(Exception):
    """Another runner serves this key, or another spawner has the lock: give way without a trace."""


class _Runner:
    """One serve's owner, from its start to its end. It writes the record; a client only its longer idle wish.

    run() in short: take over the lock, bring the serve up, publish the record, tell the client; then
    watch: restart the serve if it dies in use, reap it if nobody uses it; whatever happens, end with
    _end(), which leaves no serve, record, lock, key or folder behind.
    """

    def __init__(self, params: Mapping[str, Any], report_fd: int) -> None:
        self.key: str = params["fleetKey"]
        self.api_key: str = params["apiKey"]
        self.host: str = params["host"]
        self.port: int = params["port"]  # 0: any free one
        self.pinned: bool = params["pinned"]
        self.config_path: str = params["configPath"]
        self.command: List[str] = params["command"]
        self.start_timeout: float = params["startTimeoutMs"] / 1000
        self.idle_timeout_ms: float = params["idleTimeoutMs"]
        self.models_folder: str = params["modelsFolder"]
        self.client_lock: str = params["lock"]
        self.serve_bin_path: str = params["serveBinPath"] or ""
        self.folder = os.path.dirname(self.config_path)
        self.config = b""  # what is in config_path
        self.log_fd = 2  # KEY.log: the client opened it for us
        self.log_start = 0  # offset of this serve's first line
        self.log_seen = 0  # offset up to which the log has been looked at for requests
        self.report_fd = report_fd
        self.serve: Optional[ServeProcess] = None
        self.reservation: Any = None
        self.holds_port = True  # False for a serve that sets no SO_REUSEADDR: it cannot listen on a port that is held
        self.record: Optional[ServeRecord] = None  # as published last
        self.record_version: Any = None
        self.old_cli = False  # it takes the key on its command line only
        self.called_off = False  # by those who wanted the serve
        self.superseded = False  # another owner's record stands where ours was: finish requests, then go
        self.crashes = self.restarts = 0
        self.started_at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.ready_at = self.used_at = 0.0  # monotonic
        self.empty_since: Optional[float] = None
        self.closed_connections: Set[str] = set()
        self.open_connections, self.next_look = 0, 0.0
        self.looks_under_way = 0  # requests for the list of models whose connections may still be open
        self.touched_at = 0.0

    def run(self) -> int:
        failure: Optional[BaseException] = None
        try:
            if take_over_lock(self.key, self.client_lock) is None or self._another_owner() is not None:
                raise _Superseded
            self._bring_up()
            self._publish()
            self._tell({"ready": os.getpid(), "warning": OLD_CLI if self.old_cli else ""})
            self._close_channel()
            self._watch()
        except _Superseded:
            pass
        except BaseException as error:  # whatever it is: the serve must not outlive this process
            failure = error
        finally:
            self._end(failure)
        return 0 if failure is None else 1

    # -- bringing a serve up

    def _bring_up(self) -> None:
        """Start the serve and return once it listens; raises one of the typed errors."""
        wanted = self.port
        for attempt in range(PORT_ATTEMPTS):
            self._choose_port(wanted)
            try:
                self._start_serve()
                return self._wait_until_it_listens()
            except ServeExitedError as error:
                if _refuses_key_file(error.tail) and not self.old_cli:
                    self.old_cli = True
                    self._log(OLD_CLI)
                    return self._bring_up()
                if not ("EADDRINUSE" in error.tail or "address already in use" in error.tail.lower()):
                    raise
                listener, _ = find_listener(self.host, self.port, os.getpid())
                is_held = self.reservation is not None and listener == NOBODY
                if (self.pinned and not is_held) or attempt == PORT_ATTEMPTS - 1:
                    raise PortAllocationFailedError("Port %d was taken by another program." % self.port) from None
                self.holds_port = self.holds_port and not is_held
                wanted = self.port if is_held else 0
                self._log("port %d was taken: trying %s" % (self.port, "without holding it" if is_held else "another"))

    def _choose_port(self, wanted: int) -> None:
        """Reserve the port that is wanted, 0 for any; if it is taken, any other unless it is pinned."""
        if self.reservation is not None and self.holds_port and wanted:
            return  # a restart: the port has been ours all along
        self._free_port()
        try:
            self.reservation, self.port = reserve_port(self.host, wanted)
        except PortAllocationFailedError:
            if self.pinned or not wanted:
                raise
            self.reservation, self.port = reserve_port(self.host, 0)
        if not self.holds_port:
            self._free_port()

    def _free_port(self) -> None:
        if self.reservation is not None:
            self.reservation.close()
            self.reservation = None

    def _start_serve(self) -> None:
        self._keep_config()
        key_argument = ["--api-key", self.api_key] if self.old_cli else ["--api-key-file", self._key_file()]
        argv = serve_argv(self.command, self.config_path, self.host, self.port, key_argument)
        self._log("starting %s on port %d%s%s" % (self.command[-1], self.port, LOGGED_MODELS, self._aliases()))
        self.log_start = os.fstat(self.log_fd).st_size
        try:
            # A neutral folder: the CLI loads qvac/worker.entry.mjs from the one it is started in, and a
            # shared serve must not depend on who was first to start it.
            self.serve = ServeProcess(argv, runner_environ(), self.log_fd, os.path.abspath(os.sep))
        except OSError as error:
            raise ServeSpawnFailedError(
                "Could not start %s: %s." % (self.command[0], error.strerror or error)) from None  # fmt: skip

    def _aliases(self) -> str:
        """The names its models answer to, as JSON: for `logs MODEL` when the config is gone."""
        return json.dumps(list(_strict_json(self.config)["serve"]["models"]))

    def _keep_config(self) -> None:
        """For a restart: a provider that sees a dead serve's record deletes the folder of its config."""
        if not self.config:
            with open(self.config_path, "rb") as file:
                self.config = file.read()
        elif not os.path.exists(self.config_path):
            _make_private_folders(self.folder)
            _write_new_file(self.config_path, self.config, replace=True)

    def _key_file(self) -> str:
        path = os.path.join(self.folder, KEY_FILE_NAME)
        _write_new_file(path, self.api_key.encode(), replace=True)
        return path

    def _wait_until_it_listens(self) -> None:
        """Until the port has a listener of the serve's own group. A growing model file resets the clock."""
        watch = watch_folder(managed_serves_dir())  # a serve logs that it listens
        try:
            self._look_until_it_listens()
        finally:
            if watch >= 0:
                os.close(watch)

    def _look_until_it_listens(self) -> None:
        assert self.serve is not None
        began = moved = time.monotonic()
        looked, unwatched_since, sizes = began, None, model_files(self.models_folder)
        while True:
            self._fail_if_ended()
            who, _ = find_listener(self.host, self.port, self.serve.pid)
            if who in (OURS, UNKNOWN):
                return
            if who == STRANGER:
                self._stop_serve()
                raise ServeExitedError(None, None, "EADDRINUSE: another program listens on the port")
            now = time.monotonic()
            if now - looked >= LOCK_REREAD or now - moved >= self.start_timeout:
                looked = now
                cut_log(self.log_fd)
                sizes, before = model_files(self.models_folder), sizes
                moved = now if sizes != before else moved
                unwatched_since = self._fail_if_unwatched(unwatched_since, now)
                self._heartbeat(lock_path(self.key))
                if self.record is None and (self._has_lost_the_lock() or self._another_owner() is not None):
                    raise _Superseded
            if now - moved >= self.start_timeout:
                tail = self._tail()
                self._stop_serve()
                raise ServeStartTimeoutError(
                    "qvac serve was not ready on port %d after %g s without progress. Raise serve_start_timeout "
                    "for a large model.%s" % (self.port, self.start_timeout, _output(tail)),
                    self.start_timeout)  # fmt: skip
            # A write of the serve into its log ends the wait; the 2 ms are for a serve that fills it. If it writes
            # nothing we look again after a fiftieth of the time so far, at most 0.05 s: 0.6 % of a processor.
            time.sleep(0.002)
            wait_for_event(min(0.05, (now - began) / 50))

    def _fail_if_ended(self) -> None:
        assert self.serve is not None
        if was_asked_to_stop(self.folder):
            raise self._call_off("its runner was told to stop")
        ended = self.serve.ended()
        if ended is not None:
            self._stop_serve()
            raise ServeExitedError(ended[0], ended[1], self._tail())

    def _fail_if_unwatched(self, since: Optional[float], now: float) -> Optional[float]:
        """Call the start off when nobody has waited for it for the idle timeout (UNWATCHED_START at most, the first
        time); returns since when nobody does."""
        if live_consumers(self.key):
            return None
        since = now if since is None else since
        patience = self._idle_timeout() if self.record is not None else min(self._idle_timeout(), UNWATCHED_START)
        if now - since >= patience:
            raise self._call_off("nobody waits for it any more")
        return since

    def _call_off(self, why: str) -> ServeSpawnFailedError:
        """A failure of this start only: who has come meanwhile is to try another, so it goes into no KEY.error."""
        self.called_off = True
        return ServeSpawnFailedError("The start was called off: %s." % why)

    def _has_lost_the_lock(self) -> bool:
        """A provider that stole the same stale lock as our client did may have removed ours as stale."""
        return _read_lock(self.key) not in (None, held_lock(self.key)) and _judge_lock(self.key) == ALIVE

    # -- the record

    def _publish(self) -> None:
        """Write the record and release the lock, in one step for whoever holds the guard."""
        assert self.serve is not None
        self.ready_at = self.used_at = time.monotonic()
        self.empty_since = None
        with guard():
            if self._another_owner() is not None:
                raise _Superseded
            self._write_record(self.serve.pid)
            _release_lock(self.key)
        self._log("ready (pid %d)" % self.serve.pid)
        self.log_seen = os.fstat(self.log_fd).st_size

    def _another_owner(self) -> Optional[ServeRecord]:
        """The record of another live runner whose serve listens; not one that only says so."""
        other = _read_any_record(self.key)
        if other is None or self._is_mine(other) or DEAD in (other.judge_runner(), other.judge_serve()):
            return None
        if FOREIGN in (other.judge_runner(), other.judge_serve()):
            return other
        if other.is_restarting:
            return other if other.has_identities else None
        is_there = find_listener(other.host, other.port, other.serve_pid)[0] in (OURS, UNKNOWN)
        return other if is_there and other.names_its_serve else None

    @staticmethod
    def _is_mine(record: ServeRecord) -> bool:
        me = os.getpid()
        return (record.runner_pid, record.runner_start, record.place) == (me, process_start(me), place())

    def _write_record(self, serve_pid: int) -> None:
        """Under the guard."""
        me = os.getpid()
        self._hear_wishes()
        self.record = ServeRecord(
            fleet_key=self.key, api_key=self.api_key, serve_pid=serve_pid, runner_pid=me, port=self.port,
            host=self.host, base_url=base_url_of(self.host, self.port), config_path=self.config_path,
            started_at=self.started_at,
            idle_timeout_ms=self.idle_timeout_ms, serve_start=process_start(serve_pid) or "",
            runner_start=process_start(me) or "", place=place(), restarts=self.restarts,
            idle_since=self.empty_since or 0.0, ready_at=self.ready_at, serve_bin_path=self.serve_bin_path,
            pinned_port=self.port if self.pinned else 0)  # fmt: skip
        self.record_version = write_record(self.record)

    def _hear_wishes(self) -> None:
        """Under the guard. A client may have written a longer life into our record: the longest wish wins."""
        current = _read_any_record(self.key)
        if current is not None and self._is_mine(current):
            self.idle_timeout_ms = max(self.idle_timeout_ms, current.idle_timeout_ms)

    def _keep_record(self) -> None:
        """Publish the record again if others removed it; give way to another live owner's."""
        assert self.record is not None
        path = record_path(self.key)
        found = file_version(path)
        if found is not None and found == self.record_version:
            if self._heartbeat(path):
                self.record_version = file_version(path)  # None if others remove it in this moment
            return
        with guard(timeout=1.0):
            if self._another_owner() is not None:
                self.superseded = True
            else:
                self._write_record(self.record.serve_pid)

    def _heartbeat(self, path: str) -> bool:
        """Now and then touch a file of ours, which shows other pid namespaces that we live."""
        now = time.monotonic()
        if now - self.touched_at < HEARTBEAT:
            return False
        self.touched_at = now
        try:
            os.utime(path)
        except OSError:
            return False
        return True

    # -- watching

    def _watch(self) -> None:
        """Until the serve is reaped, told to stop, or given up."""
        trouble = ""
        while not was_asked_to_stop(self.folder):
            assert self.serve is not None
            if self.serve.ended() is not None:
                if not self._is_wanted_since(self.used_at) or self._home_is_gone():
                    return
                self._restart()
            try:
                if self._tick():
                    return
                trouble = ""
            except (OSError, RegistryError) as error:
                # The folder is unusable for now (full, read-only, its guard held): the serve is not.
                if trouble != str(error):
                    trouble = str(error)
                    self._log("will look again: %s" % trouble)
            wait_for_event(RUNNER_TICK)

    def _tick(self) -> bool:
        """One look at everything; True when the serve is to end."""
        assert self.serve is not None
        self.serve.check_watchdog()
        cut_log(self.log_fd)
        release_lock(self.key)  # one that _reap() could not release, because another process held the guard
        users, recently_used = self._look_for_users(len(live_consumers(self.key)))
        if self.superseded:
            return connections_to(self.host, self.port)[0] == 0
        was_idle, now = self.empty_since is not None, time.monotonic()
        if users or recently_used:
            self.used_at = now
        self.empty_since, reap = decide_reap(
            users or recently_used, self.empty_since or self.used_at, now, self._idle_timeout())  # fmt: skip
        if self._home_is_gone():
            return reap
        if reap:
            return self._reap()
        self._keep_record()  # last: it fails while a folder stands at KEY.json, which must not prevent the reaping
        if was_idle != (self.empty_since is not None):
            with guard(timeout=1.0):
                self._write_record(self.serve.pid)  # `ps` tells how long it has left
        return False

    @staticmethod
    def _home_is_gone() -> bool:
        """The user's home, or the folder above QVAC_MANAGED_DIR, has been removed: not ours to bring back."""
        try:
            place = managed_serves_dir() if os.environ.get("QVAC_MANAGED_DIR") else qvac_home()
            return not os.path.isdir(os.path.dirname(place))
        except RegistryError:
            return False

    def _idle_timeout(self) -> float:
        return float("inf") if self.idle_timeout_ms >= NEVER_MS else self.idle_timeout_ms / 1000

    def _look_for_users(self, consumers: int) -> Tuple[int, bool]:
        """`(consumers, else open connections; whether there was a request since the last look)`.

        Connections are looked at as soon as the last consumer has gone, again when the idle timeout is over, and in
        between each fiftieth of it (CONNECTIONS_TICK at most): so much too late may a request's end be noted.
        """
        now = time.monotonic()
        if consumers:
            self.log_seen, self.next_look = os.fstat(self.log_fd).st_size, 0.0
            return consumers, False
        if now < self.next_look and now - self.used_at < self._idle_timeout():
            return self.open_connections, False
        self.next_look = now + min(CONNECTIONS_TICK, self._idle_timeout() / 50)
        opened, closed = connections_to(self.host, self.port)
        self.open_connections = opened
        news, self.closed_connections = len(closed - self.closed_connections), closed
        size = os.fstat(self.log_fd).st_size  # after the connections: the serve has logged what the closed ones asked
        requests, looks = _requests_in(read_log(self.log_fd, self.log_seen) if size != self.log_seen else b"")
        self.log_seen = size
        unexplained = news - looks - self.looks_under_way
        self.looks_under_way = max(0, looks - news)
        return opened, requests > 0 or unexplained > 0

    def _reap(self) -> bool:
        """Withdraw the record unless somebody has come; True if it is withdrawn and stays so.

        A client of ours registers and reads the record under the guard, so it either stops us here or
        finds no record. A provider's client knows no guard: it has a moment to show itself. The spawn lock
        is ours until the serve is gone: whoever comes meanwhile waits, and gets either this one or the next.
        """
        try:
            if not try_lock(self.key, timeout=1.0):
                return False  # a client is about to look again
        except RegistryError:
            if time.monotonic() - self.used_at < self._idle_timeout() + UNUSABLE_REAP:
                raise
            return True  # nobody has been able to come for minutes
        withdrawn = False
        try:
            with guard(timeout=1.0):
                self._hear_wishes()
                if live_consumers(self.key) or time.monotonic() - self.used_at < self._idle_timeout():
                    return False
                self._remove_own_record()
            time.sleep(WITHDRAW_PAUSE)
            withdrawn = not any(self._look_for_users(len(live_consumers(self.key))))
            if not withdrawn:
                self._keep_record()
        finally:
            if not withdrawn:
                release_lock(self.key)
        if withdrawn:
            self._log("nobody has used it for %g s: stopping" % self._idle_timeout())
        return withdrawn

    def _restart(self) -> None:
        """Bring a serve that died in use back: same port, same key, so that plain URLs work again."""
        assert self.serve is not None and self.record is not None
        ended = self.serve.ended() or (None, None)
        crash = ServeExitedError(ended[0], ended[1], self._tail())
        self._log("the serve ended (%s)" % ("signal %s" % ended[1] if ended[1] else "exit code %s" % ended[0]))
        # In this order: a provider's client that sees our own pid as the serve's leaves the record alone,
        # and waits as long as we hold the lock.
        self._insist(self._lock_for_restart)
        self._insist(self._announce_restart)
        finish_group(self.serve)
        self.serve = None
        if time.monotonic() - self.ready_at > STABLE_AFTER:
            self.crashes = 0
        while True:
            if self.crashes >= len(RESTART_BACKOFF):
                what = "qvac serve crashed %d times in a row; at last it ended" % (self.crashes + 1)
                raise ServeExitedError(crash.exit_code, crash.signal, crash.tail, what)
            self._pause_before_restart(RESTART_BACKOFF[self.crashes])
            self.crashes += 1
            self.restarts += 1
            try:
                self._insist(self._bring_up_whole)
                return self._insist(self._publish)
            except ServeExitedError as error:
                crash = error

    def _bring_up_whole(self) -> None:
        """_bring_up() that can be tried again: trouble with a file in the middle of it leaves no serve that loads."""
        try:
            self._bring_up()
        except (OSError, RegistryError):
            self._stop_serve()
            raise

    def _lock_for_restart(self) -> None:
        if not try_lock(self.key):
            raise _Superseded

    def _announce_restart(self) -> None:
        with guard():
            if self._another_owner() is not None:
                raise _Superseded
            self._write_record(os.getpid())

    def _insist(self, step: Callable[[], None]) -> None:
        """Do a step of a restart, again and again while the folder cannot be used (full, its guard held) and
        the serve is wanted."""
        told, used_at = False, self.used_at
        while True:
            try:
                return step()
            except (OSError, RegistryError) as error:
                if was_asked_to_stop(self.folder) or not self._is_wanted_since(used_at):
                    raise
                if not told:
                    told = True
                    self._log("will try again: %s" % error)
                wait_for_event(RUNNER_TICK)

    def _is_wanted_since(self, used_at: float) -> bool:
        try:
            return bool(live_consumers(self.key)) or time.monotonic() - used_at < self._idle_timeout()
        except (OSError, RegistryError):
            return True  # nobody can tell now

    def _pause_before_restart(self, seconds: float) -> None:
        wait_until(lambda: was_asked_to_stop(self.folder), seconds, seconds, wait_for_event)

    # -- ending

    def _end(self, failure: Optional[BaseException]) -> None:
        """Take the lock, withdraw the record, stop the serve, free its port and folder, leave KEY.error, release
        the lock, tell the client.

        In this order. The lock first: nobody is to start a second serve beside one that ends. The record before
        the serve: nobody is to be handed one that is being stopped. KEY.error late, as a provider's client spins
        while it sees it beside a held lock; before the release, as clients of ours read it then. The client last:
        it may start another at once. Each step may fail (a full disk, a folder that is gone); the later ones
        are done all the same.
        """
        report = {"superseded": True} if failure is None else _error_to_json(failure)
        steps: List[Callable[[], Any]] = [
            self._keep_spawners_out, self._withdraw, self._stop_serve, self._free_port, self._remove_folder,
            lambda: self._leave_error(failure, report) if failure is not None and not self.called_off else None,
            lambda: release_lock(self.key), lambda: self._tell(report)]  # fmt: skip
        if self._home_is_gone():
            steps = [self._stop_serve, self._free_port, lambda: self._tell(report)]
        for step in steps:
            try:
                step()
            except Exception as error:
                self._log("while ending: %s: %s" % (type(error).__name__, error))
        self._log("runner ends%s" % (": " + str(failure).split("\n")[0] if failure else ""))
        if is_private_key(self.key) and failure is None:
            _unlink(log_path(self.key))

    def _keep_spawners_out(self) -> None:
        """Who comes while the serve ends waits for its end: a large model twice is too much for many machines."""
        if self.serve is not None and not held_lock(self.key):
            try_lock(self.key, timeout=2.0)

    def _withdraw(self) -> None:
        with guard(timeout=2.0):
            if self._remove_own_record():
                remove_dead_consumers(self.key)
        self.record = None

    def _remove_own_record(self) -> bool:
        """Under the guard. False if another's record stands there."""
        current = _read_any_record(self.key)
        if current is not None and self._is_mine(current):
            _unlink(record_path(self.key))
        return current is None or self._is_mine(current)

    def _stop_serve(self) -> None:
        if self.serve is not None:
            serve, self.serve = self.serve, None
            stop_serve_process(serve)

    def _remove_folder(self) -> None:
        remove_serve_folder(self.key, self.folder)

    def _leave_error(self, failure: BaseException, report: Dict[str, Any]) -> None:
        _write_new_file(error_path(self.key), _error_text(failure, report, self.api_key), replace=True)

    # -- telling

    def _tail(self) -> str:
        return log_tail(self.log_fd, self.log_start, self.api_key)

    def _log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        line = "[qvac_managed %s] %s\n" % (stamp, redact(text, self.api_key))
        try:
            os.write(self.log_fd, line.encode("utf-8", "replace"))
        except OSError:
            pass

    def _tell(self, message: Mapping[str, Any]) -> None:
        """One JSON line to the client that waits for us, which may be gone."""
        if self.report_fd >= 0:
            text = redact(json.dumps(message), self.api_key)
            try:
                os.write(self.report_fd, text.encode() + b"\n")
            except OSError:
                pass

    def _close_channel(self) -> None:
        if self.report_fd >= 0:
            os.close(self.report_fd)
            self.report_fd = -1


def decide_reap(
    live_consumer_count: int, empty_since: Optional[float], now: float, idle_timeout: float
) -> Tuple[Optional[float], bool]:
    """`(empty_since, reap)`: since when nobody has used the serve, and whether that is long enough."""
    if live_consumer_count > 0:
        return None, False
    since = now if empty_since is None else empty_since
    return since, now - since >= idle_timeout


def _requests_in(lines: bytes) -> Tuple[int, int]:
    """`(requests, looks)` in new lines of the serve's log. Listing the models is looking, not using."""
    requests, looks = 0, {b"\xe2\x86\x92 ": 0, b"\xe2\x86\x90 ": 0}  # the arrows right and left: asked, answered
    for line in lines.split(b"\n"):
        arrow = line[:4]
        if arrow in looks:
            is_look = b" GET /v1/models" in line
            requests += not is_look
            looks[arrow] += is_look
    return requests, max(looks.values())


def _output(tail: str) -> str:
    return "\n" + _OUTPUT_MARK + tail if tail else ""


def remove_serve_folder(key: str, folder: str) -> None:
    """Remove this key's KEY.RAND.d: the known files, then the folder, nothing recursively and no other place."""
    parent, name = os.path.split(folder)
    # As bytes: an interpreter in another locale writes the same path with other characters.
    try:
        is_in_registry = os.fsencode(parent) == os.fsencode(managed_serves_dir())
    except ValueError:  # a record may name what no system has
        return
    if is_in_registry and is_serve_folder_name(name) and name.startswith(key + "."):
        for inside in _listdir_own(folder):
            if inside.startswith((CONFIG_NAME, KEY_FILE_NAME, STOP_NAME)):
                _unlink(os.path.join(folder, inside))
        _rmdir(folder)


def serve_folders(key: str) -> List[str]:
    """The folders of a key's serves: one, but for what a dead runner has left."""
    folder = managed_serves_dir()
    names = [name for name in _listdir(folder) if is_serve_folder_name(name) and name.startswith(key + ".")]
    return [os.path.join(folder, name) for name in names]


def is_serve_folder_name(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[2] == "d" and is_valid_fleet_key(parts[0]) and parts[1].isalnum()


def _refuses_key_file(output: str) -> bool:
    """Whether an old CLI says that it does not know the option; not one that names it and fails for another reason:
    the key would go on the command line, where every user can read it."""
    return any("--api-key-file" in line and any("%s %s" % words in line for words in (
        ("unknown", "option"), ("unknown", "argument"), ("unrecognized", "option"), ("unrecognized", "argument")))
        for line in output.lower().splitlines())  # fmt: skip


def _error_text(failure: BaseException, report: Mapping[str, Any], api_key: str) -> bytes:
    """KEY.error: a text (a provider's client shows it as it is), and a last line for clients of ours."""
    brief = {**report, "args": [_shorten(arg, 300) if isinstance(arg, str) else arg for arg in report["args"]]}
    text = "%s\n%s\n" % (redact(str(failure), api_key), redact(json.dumps(brief), api_key))
    return text.encode("utf-8", "replace")


def _error_from_text(data: bytes) -> QvacManagedModeError:
    """The typed error behind a KEY.error, ours or the provider's."""
    text, _, last = data.decode("utf-8", "replace").rstrip().rpartition("\n")
    report = _strict_json(last.encode())
    if not isinstance(report, dict):
        return ServeSpawnFailedError("qvac serve failed to start: %s" % data.decode("utf-8", "replace").strip())
    error = _error_from_json(report)
    if isinstance(error, ServeExitedError):
        return ServeExitedError(error.exit_code, error.signal, text.partition(_OUTPUT_MARK)[2], error.what)
    return error


def _run_runner(params_path: str) -> int:
    report_fd = report_channel()
    watch_signals()
    os.umask(0o077)
    os.chdir(os.path.abspath(os.sep))
    found = _read_registry_file(params_path)
    _unlink(params_path)
    params = _strict_json(found[0]) if found else None
    if not isinstance(params, dict):
        return 1  # swept, or another user's: the client sees the channel end
    return _Runner(params, report_fd).run()


# ==================================================================================================
# 12. Clients and public verbs
# ==================================================================================================

if TYPE_CHECKING:
    OnProgress = Union[Literal["auto"], Callable[["Progress"], object], None]

    class Progress(NamedTuple):
        phase: str
        elapsed_s: float
        bytes_done: Optional[int] = None
        bytes_total: Optional[int] = None
        still_s: float = 0.0
        models: Sequence[str] = ()

else:
    Progress = namedtuple(
        "Progress", "phase elapsed_s bytes_done bytes_total still_s models", defaults=(None, None, 0.0, ()))
    Progress.__doc__ = """What on_progress gets. `phase`: starting, downloading, loading or ready. `elapsed_s`: seconds
    since the start (or recovery) was asked for. `bytes_done`: size of the model files that have grown since, None
    while none has. `bytes_total`: what the start has to download, None if unknown. `still_s`: seconds since anything
    moved. `models`: the names of those that are downloaded."""


def progress_words(phase: str, bytes_done: Optional[int] = None, bytes_total: Optional[int] = None,
                   still_s: float = 0.0, names: Sequence[str] = ()) -> str:  # fmt: skip
    """What a start is doing, for lines and errors: its phase, unless that is a download that stands still."""
    if phase != "downloading" or still_s < STILL_DOWNLOAD:
        return phase
    sizes = " of ".join(_size(count) for count in (bytes_done, bytes_total) if count)
    what = "the download of %s%s" % (" and ".join(names) or "the model", " (%s)" % sizes if sizes else "")
    return what + " does not move: is this machine online?"


def last_words(output: str) -> str:
    """The last line of a program's output that says something, which no bracket or stack trace does; else ""."""
    for line in reversed(output.splitlines()):
        if re.search(r"[^\W\d_]{3}", line) and not re.match(r"\s*(at .*[:(]|Node\.js v\d)", line):
            return line.strip()
    return ""


def _err(text: str, end: str = "\n") -> None:
    """Write to stderr, if there is one: a message is never worth another failure."""
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass


def _is_notebook(stream: Any) -> bool:
    """Whether the stream is ipykernel's: no terminal, but what it shows can be drawn over."""
    return type(stream).__module__.startswith("ipykernel.")


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _columns(stream: Any) -> int:
    """The width of the terminal behind STREAM; 0, which is no limit, without one."""
    return shutil.get_terminal_size().columns if _is_terminal(stream) else 0


class _ProgressLine:
    """What a start is doing, on stderr: one line drawn over on a terminal, else a plain line now and then."""

    def __init__(self, quiet: bool = False, after: float = 0.0, plain: bool = True) -> None:
        self.quiet, self.after = quiet, after  # `after`: seconds of a start of which nothing is said
        self.live = not quiet and (_is_terminal(sys.stderr) or _is_notebook(sys.stderr))
        self.plain = plain
        self.elapsed = 0.0
        self.samples: List[Tuple[float, int]] = []  # (elapsed seconds, bytes), for the rate
        self.next_plain = _PLAIN_INTERVAL
        self.drawn = 0  # characters of the line that stands on the terminal

    def __call__(self, progress: Any) -> None:
        if self.quiet or progress.elapsed_s < self.after:
            return
        self._sample(progress)
        if self.live and progress.phase == "ready":
            self.clear()
        elif self.live:
            self._draw(self._text(progress, max((_columns(sys.stderr) or 80) - 1, 20)))
        elif self.plain and progress.elapsed_s >= self.next_plain:
            self.next_plain = progress.elapsed_s + _PLAIN_INTERVAL
            _err(self._text(progress, 0))

    def clear(self) -> None:
        """Take the line off the terminal, so that something else can be said."""
        if self.drawn:
            self.drawn += len("^C")  # what the terminal may have echoed behind it
            self._draw("")
            _err("\r", end="")

    def _draw(self, text: str) -> None:
        _err("\r" + text + " " * (self.drawn - len(text)), end="")
        self.drawn = len(text)

    def _text(self, progress: Any, width: int) -> str:
        words = progress_words(
            progress.phase, progress.bytes_done, progress.bytes_total, progress.still_s, progress.models)  # fmt: skip
        head = f"{words:11} {_span(progress.elapsed_s):>5}"
        if progress.bytes_done is None or words != progress.phase:
            return head[:width] if width else head
        facts = self._download_facts(progress)
        room = width - len(head) - len(facts) - 6
        if progress.bytes_total and room >= 5:
            facts = f"{_bar(progress.bytes_done / progress.bytes_total, min(room, 30))}  {facts}"
        text = head + "  " + facts
        return text[:width] if width else text

    def _sample(self, progress: Any) -> None:
        if progress.bytes_done is None:
            return
        if self.samples and progress.bytes_done < self.samples[-1][1]:
            self.samples = []  # the next file
        self.samples.append((progress.elapsed_s, progress.bytes_done))
        while len(self.samples) > 2 and self.samples[1][0] < progress.elapsed_s - _RATE_WINDOW:
            del self.samples[0]

    def _download_facts(self, progress: Any) -> str:
        (begin, first), (end, last) = self.samples[0], self.samples[-1]
        rate = (last - first) / (end - begin) if end > begin else 0.0
        done, total = progress.bytes_done, progress.bytes_total
        parts = [_size(done)]
        if total:
            parts = [f"{min(100 * done // total, 100):3}%", f"{_size(done)} of {_size(total)}"]
        if rate > 0:
            parts.append(_size(rate) + "/s")
            if total and total > done:
                parts.append(_span((total - done) / rate) + " left")
        return "  ".join(parts)


def _bar(part: float, width: int) -> str:
    full, empty = "█", "░"
    try:
        (full + empty).encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except UnicodeError:
        full, empty = "#", "-"
    filled = int(min(max(part, 0.0), 1.0) * width)
    return full * filled + empty * (width - filled)


def _size(count: Optional[float]) -> str:
    """Bytes as people say them: 812 MB, 2.6 GB."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 10 and unit in ("MB", "GB") else f"{count:.0f} {unit}"
        count /= 1000.0
    return f"{count:.1f} TB"


def _span(seconds: Optional[float]) -> str:
    """Seconds as people say them: 42s, 4m12s, 2h05m, 3d04h."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    for unit, size, small, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // small_size
            return f"{whole // size}{unit}" + (f"{rest:02}{small}" if rest else "")
    return f"{whole}s"


def show_progress(progress: Progress) -> None:
    """For on_progress: one live line on stderr if that is a terminal or a notebook, once a start takes longer than a
    second. "auto" is this."""
    global _shown_progress
    if _shown_progress is None or progress.elapsed_s < _shown_progress.elapsed:
        _shown_progress = _ProgressLine(after=1.0, plain=False)  # a new start, and perhaps another stderr
    _shown_progress(progress)
    _shown_progress.elapsed = progress.elapsed_s


_shown_progress: Any = None


class _Target:
    """Where a serve is, what its key is, and which process it is. The key is in no repr."""

    __slots__ = ("api_key", "base_url", "fleet_key", "place", "port",
                 "reused", "runner_pid", "serve_pid", "serve_start")  # fmt: skip

    def __init__(self, base_url: str, api_key: str, record: Optional[ServeRecord] = None, reused: bool = False) -> None:
        self.base_url, self.api_key, self.reused = base_url, api_key, reused
        self.port, self.serve_pid, self.runner_pid, self.fleet_key = 0, 0, 0, ""
        self.serve_start, self.place = "", ""
        if record is not None:
            self.port, self.fleet_key, self.runner_pid = record.port, record.fleet_key, record.runner_pid
            self.serve_pid, self.place = record.serve_pid, record.place or place()
            self.serve_start = record.serve_start or process_start(record.serve_pid) or ""

    def has_gone(self) -> bool:
        """True once the serve's process is dead: its port may be another program's by now."""
        return judge_process(self.serve_pid, self.serve_start, self.place) == DEAD


class Qvac:
    """A client of one OpenAI-compatible serve. Made by create_qvac().

    `base_url` ends in /v1. `headers` go with every request, except an Authorization header: any key but
    the default one replaces it. Threads may share a client. It cannot be pickled: it holds a key.
    """

    # What it holds is in slots, so that vars() shows no key; `__dict__` is for what others hang onto it.
    __slots__ = ("__dict__", "__weakref__", "_default_model", "_opener", "_target", "headers")

    def __init__(self, base_url: str, api_key: str, headers: Optional[Mapping[str, str]] = None,
                 opener: Any = None) -> None:  # fmt: skip
        self._target = _Target(base_url.rstrip("/"), api_key)
        self._default_model: Optional[str] = None
        self._opener = opener
        self.headers = dict(headers or {})

    @property
    def base_url(self) -> str:
        return self._target.base_url

    @property
    def api_key(self) -> str:
        return self._target.api_key

    def __repr__(self) -> str:
        return "<%s %s>" % (type(self).__name__, self.base_url)

    def __reduce__(self) -> Any:
        raise TypeError("a %s holds an API key and cannot be pickled: create one in each process" % type(self).__name__)

    def open(
        self, target: Union[str, urllib.request.Request], data: Union[bytes, Dict[str, Any], List[Any], None] = None,
        timeout: Optional[float] = None) -> http.client.HTTPResponse:  # fmt: skip
        """urllib.request.urlopen, aimed at this serve: returns its response, raises its errors.

        `target` is a path, joined to base_url (`open("/models")`), a URL, or a urllib.request.Request;
        of the latter two the path is kept and the address replaced. `data` is bytes, or a dict or list
        that is sent as JSON. `timeout` is urlopen's, in seconds for each wait on the network; None waits
        as long as the serve takes. No proxies, no redirects.
        """
        return self._send(self._target, target, data, timeout)

    def _send(self, aim: _Target, target: Any, data: Any, timeout: Optional[float]) -> http.client.HTTPResponse:
        request = _aimed_request(aim, target, data, self.headers)
        opener: Any = self._opener if self._opener is not None else _openers()[0]
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
        return response

    def models(self) -> List[Dict[str, Any]]:
        """The serve's models as it lists them: dicts with `id` and, on a QVAC serve, `state`."""
        models: List[Dict[str, Any]] = self._json("/models", None, None, lambda answer: [
            {**model, "id": str(model["id"])} for model in answer["data"]])  # fmt: skip
        return models

    def chat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
             **params: object) -> Answer:  # fmt: skip
        """The answer to a prompt (a string), to one OpenAI-style message, or to a list of them; `params` go into the
        request (temperature, max_tokens, tools ...).

        Raises AnswerCutShortError if a limit ended the answer before it began, or the prompt does not fit the model's
        context; ServeHTTPError with the serve's own message; urllib's errors when it cannot be reached. An answer
        that a limit ended in its middle has the `finish_reason` "length".
        """
        reading = _Reading(self, prompt_or_messages, model, params)
        try:
            self._json("/chat/completions", reading.body, timeout,
                       lambda answer: (reading.take(answer), answer["choices"][0]))  # fmt: skip
        except ServeHTTPError as error:
            raise reading.reason(error) from None
        return reading.whole()

    def stream_chat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
                    reasoning: bool = False, **params: object) -> Stream:  # fmt: skip
        """chat(), piece by piece, each as soon as the serve sends it: see Stream. With `reasoning`, what the model
        thinks comes too. An answer that breaks off is a ConnectionResetError, never a short answer.
        """
        return Stream(_Reading(self, prompt_or_messages, model, params, stream=True, stream_options={
            "include_usage": True}), timeout, reasoning)  # fmt: skip

    async def achat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
                    **params: object) -> Answer:  # fmt: skip
        """chat() in a thread of its own: the event loop goes on, and cancelling ends the request at the serve."""
        answer: Answer = await _Worker().do(
            lambda: self.chat(prompt_or_messages, model, timeout=timeout, **params), is_last=True)  # fmt: skip
        return answer

    def astream_chat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
                     reasoning: bool = False, **params: object) -> AsyncStream:  # fmt: skip
        """stream_chat() for `async for`, without `await` before it; the request is made with the first step."""
        return AsyncStream(lambda: self.stream_chat(
            prompt_or_messages, model, timeout=timeout, reasoning=reasoning, **params))  # fmt: skip

    async def aembed(self, texts: Union[str, Sequence[str]], model: Optional[str] = None, *,
                     timeout: Optional[float] = None) -> List[List[float]]:  # fmt: skip
        """embed(), as achat() is chat()."""
        vectors: List[List[float]] = await _Worker().do(
            lambda: self.embed(texts, model, timeout=timeout), is_last=True)  # fmt: skip
        return vectors

    def embed(self, texts: Union[str, Sequence[str]], model: Optional[str] = None, *,
              timeout: Optional[float] = None) -> List[List[float]]:  # fmt: skip
        """One vector for each text; a single string gives a list with one vector."""
        inputs = [texts] if isinstance(texts, str) else list(texts)
        body = {"model": self._model(model), "input": inputs}

        def pick(answer: Any) -> List[List[float]]:
            items = sorted(answer["data"], key=lambda item: item.get("index", 0))
            if len(items) != len(inputs) or not all(isinstance(item["embedding"], list) for item in items):
                raise ValueError
            return [item["embedding"] for item in items]

        vectors: List[List[float]] = self._json("/embeddings", body, timeout, pick)
        return vectors

    def environ(self) -> Dict[str, str]:
        """The variables that lead OpenAI and QVAC tools to this serve, its key among them."""
        names = ("OPENAI_BASE_URL", "OPENAI_API_BASE", "QVAC_BASE_URL")
        return {**dict.fromkeys(names, self.base_url), "OPENAI_API_KEY": self.api_key, "QVAC_API_KEY": self.api_key}

    def close(self) -> None:
        """Nothing to do for a client in external mode."""

    def __enter__(self: Client) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self: Client) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _context(self, _model: str) -> Optional[int]:
        """The model's context in tokens, None where that is not known."""
        return None

    def _model(self, model: Optional[str]) -> str:
        if model is None and self._default_model is None:
            listed = self.models()
            if not listed:
                raise ServeHTTPError(404, "The serve at %s has no models." % self.base_url)
            self._default_model = str(listed[0]["id"])
        return model or self._default_model or ""

    def _open_json(self, path: str, body: Any, timeout: Optional[float]) -> Any:
        try:
            return self.open(path, body, timeout)
        except urllib.error.HTTPError as error:
            refusal = _serve_error(error)
            if refusal.status == 404 and not self.base_url.endswith("/v1"):
                refusal = ServeHTTPError(404, "%s (base_url ends in /v1 as a rule; %s does not)" % (
                    refusal.message, self.base_url), refusal.body)  # fmt: skip
            raise refusal from None
        except http.client.HTTPException as error:
            raise error if isinstance(error, OSError) else _broken_off() from None

    def _json(self, path: str, body: Any, timeout: Optional[float], pick: Callable[[Any], Any]) -> Any:
        """What `pick` takes out of the JSON answer; an answer of another shape is a ServeHTTPError, too."""
        with self._open_json(path, body, timeout) as response:
            try:
                # In pieces: Python 3.8 makes room first for as much as it is told to read.
                pieces = iter(lambda: response.read(READ_BYTES), b"")
                data = b"".join(itertools.islice(pieces, MAX_ANSWER_BYTES // READ_BYTES))
            except http.client.HTTPException:
                raise _broken_off() from None
            if len(data) < MAX_ANSWER_BYTES and getattr(response, "length", None):  # what is still to come never came
                raise _broken_off()
        return _picked(data, "answer to " + path, pick)


def _picked(data: bytes, what: str, pick: Callable[[Any], Any]) -> Any:
    """What `pick` takes out of the JSON; what is none, or of another shape, is a ServeHTTPError that shows it."""
    try:
        return pick(json.loads(data))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        data = data[:MAX_FILE_BYTES]
        shown = _shorten(data.decode("utf-8", "replace"), 300)
        raise ServeHTTPError(200, "this is no %s: %s" % (what, shown), data) from None


def _broken_off() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the serve broke off its answer")


_MORE_CONTEXT = "config={\"ctx_size\": 8192}"


def _as_messages(prompt: Any) -> List[Dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    try:
        messages = [prompt] if hasattr(prompt, "keys") else [dict(message) for message in prompt]
    except (TypeError, ValueError):
        messages = []
    if not messages or not all("role" in message for message in messages):
        raise InvalidManagedModelError(
            "A prompt is a string, a message such as {\"role\": \"user\", \"content\": \"hi\"}, or a list of messages: "
            "not %s." % _shorten(repr(prompt), 80))  # fmt: skip
    return messages


def _text_of(content: Any) -> str:
    """The text of a message's content, which is a string or a list of parts; TypeError if neither."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part.get("text") or "") for part in content)


class Piece(str):
    """A piece of a streamed answer; `kind` is "content" or "reasoning"."""

    kind: str = "content"


class _Thought(Piece):
    kind = "reasoning"


class Answer(str):
    """What a model answered: a string, with what came beside it.

    `reasoning` is what the model thought before ("" if nothing), `finish_reason` why it ended ("stop", "length",
    "tool_calls"), `usage` the serve's count of tokens, `tool_calls` what it wants called, as OpenAI writes them,
    `model` the name it answered to.
    """

    reasoning: str = ""
    finish_reason: Optional[str] = None
    usage: Mapping[str, Any] = {}
    tool_calls: Sequence[Dict[str, Any]] = ()
    model: str = ""


class _Reading:
    """An answer as it is read: out of the events of a stream, or of the one JSON object of an answer in one piece."""

    def __init__(self, client: Qvac, prompt: Any, model: Optional[str], params: Mapping[str, Any], **more: Any) -> None:
        if "stream" in params:
            raise InvalidManagedModelError("There is no option `stream`: stream_chat() streams, chat() does not.")
        messages = _as_messages(prompt)
        self.client, self.model = client, client._model(model)
        self.body = {"model": self.model, "messages": messages, **more, **params}
        self.content: List[str] = []
        self.reasoning: List[str] = []
        self.refusal = ""
        self.finish_reason: Optional[str] = None
        self.usage: Dict[str, Any] = {}
        self.tool_calls: Dict[int, Dict[str, Any]] = {}
        self.context = client._context(self.model)
        # A token is a byte at least, in any tokenizer in use, and a word at most; only the serve knows more.
        self.may_overflow = len(json.dumps(self.body, default=str)) + PROMPT_FRAME > (self.context or DEFAULT_CONTEXT // 2)
        words = len(json.dumps(messages, default=str, separators=(",", ":")).split())
        if self.context and words > -(-self.context // CONTEXT_STEP) * CONTEXT_STEP:
            raise self._overflow(f"The prompt has {words:,} words, each a token at least, and so is longer than")

    def take(self, event: Any) -> List[Piece]:
        """The pieces of text in an event; LookupError, TypeError ... for what is none, ServeHTTPError for an error."""
        error = event.get("error") or (event if event.get("object") == "error" or "detail" in event else None)
        if error:
            message = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
            raise ServeHTTPError(200, str(message or error), json.dumps(event).encode())
        if "choices" not in event and "usage" not in event:
            raise LookupError
        self.usage = dict(event.get("usage") or self.usage)
        pieces: List[Piece] = []
        for choice in event.get("choices") or ():
            if (choice.get("index") or 0) == 0:  # of several answers the first
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                self._take_delta(choice.get("delta") or choice.get("message") or {}, pieces)
        return pieces

    def _take_delta(self, delta: Any, pieces: List[Piece]) -> None:
        self.refusal += delta.get("refusal") or ""
        for text, kept, kind in (
            (delta.get("reasoning_content") or delta.get("reasoning"), self.reasoning, _Thought),
            (delta.get("content"), self.content, Piece),
        ):
            if text:
                kept.append(_text_of(text))
                pieces.append(kind(kept[-1]))
        for call in delta.get("tool_calls") or ():
            index = call.get("index")
            if index is None:  # a new one has an id; what has none goes on with the last
                index = len(self.tool_calls) - (0 if call.get("id") or not self.tool_calls else 1)
            whole = self.tool_calls.setdefault(
                index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})  # fmt: skip
            whole["id"] = call.get("id") or whole["id"]
            for name, text in (call.get("function") or {}).items():
                whole["function"][name] = whole["function"].get(name, "") + (text or "")

    def answer(self) -> Answer:
        """What has come so far."""
        answer = Answer("".join(self.content))
        answer.reasoning, answer.model = "".join(self.reasoning), self.model
        answer.finish_reason, answer.usage = self.finish_reason, self.usage
        answer.tool_calls = [self.tool_calls[index] for index in sorted(self.tool_calls)]
        return answer

    def whole(self) -> Answer:
        """answer(), once it is over; an error if there is none and somebody is to blame."""
        answer = self.answer()
        if self.refusal:
            raise ServeHTTPError(200, "the model refuses to answer: %s" % self.refusal)
        text = answer.strip() if answer.reasoning else answer
        if text or answer.tool_calls or self.finish_reason in (None, "stop"):
            return answer
        if self.finish_reason != "length":
            raise ServeHTTPError(200, "the answer is empty, for the reason %r" % self.finish_reason)
        limit = self.limit()
        raise AnswerCutShortError(answer, limit, "The answer was cut before it began by %s: %s. %s" % (
            "max_tokens=%d" % self._most() if limit == "max_tokens" else self._named_context(),
            "all of it went into thinking" if answer.reasoning else "nothing was left for it",
            "Raise that." if limit == "max_tokens" else "Give it more, as in %s." % _MORE_CONTEXT))  # fmt: skip

    def limit(self) -> str:
        """Which limit ended an answer with the finish_reason "length"."""
        most, made = self._most(), _count(self.usage.get("completion_tokens"))
        return "max_tokens" if most and (made >= most or not made) else "ctx_size"

    def _most(self) -> int:
        return _count(self.body.get("max_completion_tokens") or self.body.get("max_tokens"))

    def _named_context(self) -> str:
        size = f"{self.context:,} tokens" if self.context else f"{DEFAULT_CONTEXT:,} tokens unless set"
        return f"the context of {self.model} ({size})"

    def reason(self, error: ServeHTTPError) -> QvacManagedModeError:
        """The error that stands behind the serve's: CLI 0.13.1 says of an overflow that it is an internal error."""
        if error.status == 500 and "internal error" in error.message.lower() and self.may_overflow:
            return self._overflow(f"The serve failed ({error.message}), probably as the prompt is longer than")
        return error

    def _overflow(self, what: str) -> AnswerCutShortError:
        return AnswerCutShortError(Answer(), "ctx_size", "%s %s: shorten it, or give the model more, as in %s." % (
            what, self._named_context(), _MORE_CONTEXT))  # fmt: skip


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def tokens_used(usage: Mapping[str, Any]) -> int:
    """How much of the context an answer and all before it take, 0 if the serve does not say.

    CLI 0.13.1 counts as prompt_tokens only what it has not read before, and as cached_tokens all that stands in the
    context after the answer; elsewhere cached_tokens are a part of prompt_tokens.
    """
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return max(cached, _count(usage.get("prompt_tokens")) + _count(usage.get("completion_tokens")))


class Stream:
    """An answer as it comes: iterate over its pieces (strings with a `kind`, see Piece).

    `answer` is the whole, once it is over; before, what has come so far. `close()`, the end of a `with` block, or
    dropping it ends the request. Raises what chat() raises, at the end too: an AnswerCutShortError if a limit ended the
    answer before it began.
    """

    def __init__(self, reading: _Reading, timeout: Optional[float], reasoning: bool) -> None:
        self._reading, self._reasoning, self._is_over = reading, reasoning, False
        self._ready: List[Piece] = []
        self._call = getattr(_under_way, "call", None) or _Call()
        with self._call:
            try:
                self._response = reading.client._open_json("/chat/completions", reading.body, timeout)
            except ServeHTTPError as error:
                raise reading.reason(error) from None
        self._events = _events_of(self._response)
        self._watch = _SilenceWatch(reading, self._call) if reading.may_overflow else None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        while not self._ready:
            if self._is_over:
                raise StopIteration
            try:
                self._advance()
            except BaseException:
                self.close()
                raise
        return self._ready.pop(0)

    def _advance(self) -> None:
        data: Optional[bytes] = None
        broken: OSError = _broken_off()
        try:
            data = next(self._events, None)
        except OSError as error:
            broken = error
        if data is not None and data.strip() != b"[DONE]":
            pieces = _picked(data, "part of an answer", self._reading.take)
            if pieces and self._watch is not None:
                self._watch.end()
            self._ready = [piece for piece in pieces if self._reasoning or piece.kind == "content"]
            return
        if self._is_over:  # another thread has closed it
            return
        self.close()
        if self._watch is not None and self._watch.found is not None:  # then the watch has ended it
            raise self._watch.found
        if data is None and not self._reading.finish_reason:  # of a broken chunked answer http.client sees no end
            raise broken
        self._reading.whole()

    @property
    def answer(self) -> Answer:
        return self._reading.answer()

    def close(self) -> None:
        """End the request, if it is not over, also from another thread than the one that reads. Idempotent."""
        self._is_over = True
        if self._watch is not None:
            self._watch.end()
        self._call.end()  # first: closing alone would wait for whoever reads
        self._response.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_watch", None) is not None:
            self.close()


class _SilenceWatch:
    """Finds out whether a stream without a word will ever have one.

    CLI 0.13.1 sends no event for a prompt longer than the context, for ever. So after some silence the same is asked
    for in one piece, one token of it: while the model still reads the first, this waits behind it, and is called off
    with its first word; if the first has died, this is told so at once.
    """

    def __init__(self, reading: _Reading, call: _Call) -> None:
        self.found: Optional[QvacManagedModeError] = None
        self._reading, self._watched, self._own, self._is_over = reading, call, _Call(), threading.Event()
        try:
            _started_thread("qvac_managed silence", self._run)
        except ServeSpawnFailedError:
            pass  # no more threads here: then nobody watches

    def end(self) -> None:
        self._is_over.set()
        self._own.end()

    def _run(self) -> None:
        client, body = self._reading.client, {**self._reading.body, "stream": False, "max_tokens": 1}
        for name in ("stream_options", "max_completion_tokens"):
            body.pop(name, None)
        while not self._is_over.wait(SILENT_STREAM):
            try:
                with self._own:
                    client._send(client._target, "/chat/completions", body, None).close()
            except urllib.error.HTTPError as error:
                refusal = _serve_error(error)
                if refusal.status == 500 and not self._is_over.is_set():
                    self.found = self._reading.reason(refusal)
                    return self._watched.end()
            except (OSError, http.client.HTTPException):
                return None  # the stream will see for itself


def _events_of(response: Any) -> Iterator[bytes]:
    """The data of each event of an event stream, read as its standard says, and of one that lacks its end."""
    data: List[bytes] = []
    for number, line in enumerate(_lines_of(response)):
        if number == 0 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value[1:] if value.startswith(b" ") else value)
        elif not line:
            if any(data):
                yield b"\n".join(data)
            data = []
    if any(data):
        yield b"\n".join(data)


def _lines_of(response: Any) -> Iterator[bytes]:
    """The lines of an answer as they come, ended by CR, LF or both; ConnectionResetError where it is broken."""
    begun: List[bytes] = []
    read, size, after_cr = getattr(response, "read1", response.read), 0, False
    while True:
        try:
            data = read(READ_BYTES)
        except (http.client.HTTPException, ValueError):
            raise _broken_off() from None
        if not data:
            break
        if after_cr and data.startswith(b"\n"):
            data = data[1:]
        after_cr = data.endswith(b"\r")
        *ended, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in ended:
            yield b"".join([*begun, line])
            begun, size = [], 0
        begun.append(rest)
        size += len(rest)
        if size > MAX_ANSWER_BYTES:
            raise ServeHTTPError(200, "this is no part of an answer: a line without end")
    yield b"".join(begun)


# -- asynchronous requests


class AsyncStream:
    """Stream for `async for` and `async with`. Cancelling the task that reads it, or aclose(), ends the request."""

    def __init__(self, start: Callable[[], Stream]) -> None:
        self._start, self._worker = start, _Worker()
        self._stream: Optional[Stream] = None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        piece: Optional[Piece] = None if self._worker.call.ended else await self._worker.do(self._next)
        if piece is None:
            self._worker.end()
            raise StopAsyncIteration
        return piece

    def _next(self) -> Optional[Piece]:
        if self._stream is None:
            self._stream = self._start()
        return next(self._stream, None)

    @property
    def answer(self) -> Answer:
        return self._stream.answer if self._stream is not None else Answer()

    async def aclose(self) -> None:
        """End the request, if it is not over. Idempotent."""
        self._worker.end()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._worker.end()

    def __del__(self) -> None:
        self._worker.end()


class _Worker:
    """A thread that does what blocks for a coroutine. When that is cancelled, what the thread waits for is ended."""

    def __init__(self) -> None:
        self.call = _Call()
        self._jobs: Any = None
        self.thread: Any = None

    async def do(self, function: Callable[[], Any], is_last: bool = False) -> Any:
        done = asyncio.get_running_loop().create_future()
        if self.thread is None:
            self._jobs = queue.SimpleQueue()
            self.thread = _started_thread("qvac_managed request", self._work)
        self._jobs.put((done, function))
        try:
            return await done
        except BaseException:
            is_last = True
            raise
        finally:
            if is_last:
                self.end()

    def end(self) -> None:
        self.call.end()
        if self._jobs is not None:
            self._jobs.put(None)

    def _work(self) -> None:
        with self.call:
            for done, function in iter(self._jobs.get, None):
                result, error = None, None
                try:
                    result = function()
                except BaseException as caught:
                    error = caught
                try:
                    done.get_loop().call_soon_threadsafe(_settle, done, result, error)
                except RuntimeError:  # the loop has been closed meanwhile
                    _settle(None, result, None)
                del done, function, result, error


def _aimed_request(aim: _Target, target: Any, data: Any, headers: Mapping[str, str]) -> Any:
    """A new urllib Request for the serve; the caller's own object is left as it is."""
    if isinstance(data, (dict, list)):
        data = json.dumps(data).encode()
    if isinstance(target, urllib.request.Request):
        url, given, method = target.full_url, dict(target.header_items()), target.get_method()
        data = target.data if data is None else data
    else:
        url, given, method = str(target), {"Content-Type": "application/json"} if data is not None else {}, None
    merged = {name.title(): value for name, value in (*headers.items(), *given.items())}
    merged.pop("Authorization", None)
    merged.pop("Host", None)
    request = urllib.request.Request(_retarget(url, aim.base_url), data, merged, method=method)
    authorization = "Bearer " + aim.api_key
    if aim.api_key == DEFAULT_API_KEY:  # nobody has named a key; a Request's own may be for another server
        authorization = {name.title(): value for name, value in headers.items()}.get("Authorization", authorization)
    request.add_unredirected_header("Authorization", authorization)
    return request


def _retarget(url: str, base_url: str) -> str:
    """A path joined to base_url, or the path and query of a URL at base_url's address."""
    scheme, found, rest = url.partition("://")
    if not found or not scheme.isalpha():
        return "%s/%s" % (base_url, url.lstrip("/"))
    ends = [rest.index(c) for c in "/?#" if c in rest]
    path = rest[min(ends) :] if ends else "/"
    origin = "/".join(base_url.split("/", 3)[:3])
    return origin + (path if path.startswith("/") else "/" + path)


def _live(read: Any, doc: str) -> Any:
    return property(read, doc=doc)


class ManagedQvac(Qvac):
    """A client of a managed serve: create_qvac("managed", ...). Also a context manager, `async with` too.

    `base_url`, `api_key`, `port`, `pid`, `runner_pid` are read live: after a recovery they are the new
    serve's. While it is open, its process counts as a consumer, which keeps the serve alive. close()
    detaches and never stops a serve that others use; so does the end of the process, however it ends.
    """

    __slots__ = ("_failed_at", "_failure", "_is_recovering", "_recovery_lock", "_resolver")

    def __init__(self, resolver: _Resolver, target: _Target, headers: Optional[Mapping[str, str]], opener: Any) -> None:
        super().__init__(target.base_url, target.api_key, headers, opener)
        self._target = target
        self._default_model = resolver.default_alias
        self._resolver = resolver
        self._recovery_lock = _thread.RLock()  # on_progress or a signal handler may make a request in the middle of it
        self._is_recovering = False
        self._failure: Optional[Tuple[_Target, BaseException]] = None
        self._failed_at = 0.0

    port: int = _live(lambda self: self._target.port, "The serve's TCP port.")
    pid: int = _live(lambda self: self._target.serve_pid, "The serve's process id.")
    runner_pid: int = _live(lambda self: self._target.runner_pid, "The process id of the serve's runner.")
    fleet_key: str = _live(lambda self: self._resolver.key, "The key that names the serve: see compute_fleet_key().")
    reused: bool = _live(lambda self: self._target.reused, "True if the serve was there before this client.")
    closed: bool = _live(lambda self: self._resolver.cancelled, "True after close().")

    def open(
        self, target: Union[str, urllib.request.Request], data: Union[bytes, Dict[str, Any], List[Any], None] = None,
        timeout: Optional[float] = None) -> http.client.HTTPResponse:  # fmt: skip
        """As Qvac.open. If the serve is gone, it is brought back (or another started) and the request sent.

        Only a refused connection is tried again, once: after a reset the serve may have begun the work.
        """
        aim = self._target
        if not self._resolver.cancelled:
            self._resolver.register_again_if_lost()
            if aim.has_gone():
                aim = self._recover(aim, None)
        elif aim.has_gone():
            raise _refused_error()
        try:
            return self._send(aim, target, data, timeout)
        except OSError as error:
            if not is_refused(error) or self._resolver.cancelled:
                raise
            return self._send(self._recover(aim, error), target, data, timeout)

    def ensure(self) -> None:
        """Make sure that a live serve stands behind `base_url`; cheap while the present one lives.

        For a process that holds a serve for others: call it now and then. Raises what a start raises.
        """
        if not self._resolver.cancelled:
            self._resolver.register_again_if_lost()
            if self._target.has_gone():
                self._recover(self._target, None)

    def _recover(self, failed: _Target, original: Optional[BaseException]) -> _Target:
        """Resolve again, once for all threads that saw the same serve fail, and share what came of it."""
        asked_at = time.monotonic()
        with self._recovery_lock:
            if self._target is not failed:
                return self._target
            if self._failure is not None and self._failure[0] is failed and asked_at < self._failed_at:
                raise self._failure[1]
            if self._is_recovering:
                raise original or _refused_error()
            self._is_recovering = True
            try:
                self._target = self._resolver.resolve(failed)
            except _Cancelled:
                raise (original or _refused_error()) from None
            except QvacManagedModeError as error:
                self._failure = (failed, error)
                self._failed_at = time.monotonic()
                raise
            finally:
                self._is_recovering = False
            self._failure = None
            return self._target

    def close(self) -> None:
        """Detach. Idempotent, quick, and final: nothing resolves, registers or spawns afterwards."""
        self._resolver.cancel()
        _open_clients.pop(id(self), None)

    def _context(self, model: str) -> Optional[int]:
        entry = self._resolver.config["serve"]["models"].get(model, {"config": {"ctx_size": None}})
        default = None if self._resolver.serve_bin_path == ECHO else DEFAULT_CONTEXT  # the echo serve has no limit
        size = entry.get("config", {}).get("ctx_size", default)
        return size if type(size) is int and size > 0 else None


def _refused_error() -> OSError:
    return urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "the serve is gone"))


class _Foreign(Exception):
    """The key's record or lock is of another machine, pid or network namespace that shares the folder."""


MISS, PENDING = "miss", "pending"


class _Resolver:
    """Finds or starts the serve for one client, again and again over the client's life.

    Its states are on disk, not here: a registered marker, a record that is attached to, a spawn lock
    that is held. `_close_lock` is held for the moments in which close() must not come between.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.config = synthesize_serve_config(options["models"], options["serve_bin_path"])
        entries = self.config["serve"]["models"]
        self.aliases: List[str] = list(entries)
        self.default_alias: str = next((alias for alias in entries if entries[alias].get("default")), self.aliases[0])
        self.host: str = options["serve_host"]
        self.pinned_port: Optional[int] = options["serve_port"]
        self.serve_bin_path: Optional[str] = options["serve_bin_path"]
        self.start_timeout: float = options["serve_start_timeout"]
        self.require_ready: bool = options["require_ready"]
        self.on_progress: Optional[Callable[[Progress], Any]] = options["on_progress"]
        self.shared_key = compute_fleet_key(self.config, self.host, self.serve_bin_path, self.pinned_port)
        reuse = self.pinned_port is None if options["reuse"] is None else options["reuse"]
        idle_timeout = options["serve_idle_timeout"]
        self.idle_timeout_ms: float = NEVER_MS if idle_timeout is None else idle_timeout * 1000
        self.key = self.shared_key
        if not reuse:
            self._use_private_key()
        self.consumer_id = _new_consumer_id()
        self.marker = ""  # where it is: the program may change HOME afterwards
        self.cancelled = False
        self._close_lock = _thread.RLock()  # a signal handler of the host may close the client in the middle of it
        self._pending: Tuple[Any, float] = (None, 0.0)  # which record has refused connections since when
        self._saw_a_kill = False  # another's start failed because its serve was killed
        self._spawned = False  # this resolution has started the serve: if it fails, it is ours to stop

    def _use_private_key(self) -> None:
        self.key = "%s-priv-%d-%s" % (self.shared_key, os.getpid(), os.urandom(4).hex())
        self.idle_timeout_ms = 0

    # -- being a consumer

    def cancel(self) -> None:
        with self._close_lock:
            if not self.cancelled or os.path.exists(self.marker):  # not again out of a __del__ in a dying interpreter
                self.cancelled = True
                self._withdraw_marker()

    def forget_parent(self) -> None:
        """In a forked child: the marker is the parent's; a request of the child will write its own."""
        self._close_lock = _thread.RLock()
        self.consumer_id, self.marker = _new_consumer_id(), ""

    def register_again_if_lost(self) -> None:
        """A provider's runner that ends removes all markers; a forked child has none yet."""
        if not os.path.exists(self.marker):
            with self._close_lock:
                if not self.cancelled:
                    self._write_marker()
                if self.cancelled:  # by a signal handler in this thread, which the lock does not keep out
                    self._withdraw_marker()

    def _register(self) -> Optional[ServeRecord]:
        """Write the marker, then read the record, as one step: see _Runner._reap for the other side."""
        with guard(), self._close_lock:  # in this order: close() must not wait for the guard
            self._check_cancelled()
            if self.marker != self._marker_path():
                _unlink(self.marker)
            if not os.path.exists(self._marker_path()):
                self._write_marker()
            return read_record(self.key)

    def _marker_path(self) -> str:
        return os.path.join(consumers_dir(self.key), self.consumer_id)

    def _write_marker(self) -> None:
        self.marker = self._marker_path()  # noted first: Ctrl-C must not leave one that nobody would remove
        add_consumer(self.key, self.consumer_id)

    def _wish_to_keep(self, record: ServeRecord) -> None:
        """The longest idle timeout wins: the runner sees that its record says more than it wrote.

        Only once we are attached, or a client that gives up would leave its wish to a serve it never used.
        """
        if record.idle_timeout_ms >= self.idle_timeout_ms or judge_place(record.place) != ALIVE:
            return
        with guard(), self._close_lock:
            self._check_cancelled()
            current = read_record(self.key)
            if current is not None and current.idle_timeout_ms < self.idle_timeout_ms:
                write_record(current.with_fields(idle_timeout_ms=self.idle_timeout_ms))

    def _check_cancelled(self) -> None:
        if self.cancelled:
            raise _Cancelled("the client has been closed")

    # -- resolving

    def resolve(self, previous: Optional[_Target] = None) -> _Target:
        """A live serve to talk to: attached, or started. On any failure nothing of ours is left behind."""
        self._spawned = self._saw_a_kill = False
        try:
            while True:
                try:
                    return self._resolve(_Patience(self), previous)
                except _Foreign:
                    _warn("The serve %s belongs to another machine or container that shares %s: "
                          "starting a private one.", self.key, managed_serves_dir())  # fmt: skip
                    self._withdraw_marker()
                    self._use_private_key()
        except BaseException:
            _let_go_of_guard()
            release_lock(self.key)
            self._withdraw_marker()
            if self._spawned:
                self._stop_if_unused()
            raise

    def _withdraw_marker(self) -> None:
        try:
            _unlink(self.marker)
            if not os.path.exists(record_path(self.key)) and not os.path.exists(lock_path(self.key)):
                _rmdir(consumers_dir(self.key))
        except RegistryError:
            pass

    def _stop_if_unused(self) -> None:
        """What this resolution has started is stopped, ready or not, unless others wait for it. Its KEY.error goes
        too: nobody is left to read it."""
        try:
            if not live_consumers(self.key):
                stop_serve(self.key)
                _unlink(error_path(self.key))
        except (OSError, RegistryError):
            pass

    def _resolve(self, patience: _Patience, previous: Optional[_Target]) -> _Target:
        errors_before, waited, command = file_version(error_path(self.key)), False, None
        while True:
            found = self._attach(self._register(), patience, reused=True)
            if isinstance(found, _Target):
                return found
            being_started = found == MISS and self._is_being_started()
            patience.margin = WAITER_MARGIN if being_started else 0.0
            if found == MISS and not being_started:
                error = file_version(error_path(self.key))
                if waited and error not in (None, errors_before):
                    failure = self._adopted_failure()
                    if not self._may_do_better(failure):
                        raise failure
                    errors_before = error  # which try_lock() removes
                if command is None:  # the first miss: what a hit need not do
                    command = find_cli(self.serve_bin_path)
                    sweep_serves(SWEEP_LIMIT)
                if try_lock(self.key):
                    try:
                        started = self._start(command, patience, previous)
                    finally:
                        release_lock(self.key)
                    if started is not None:
                        return started
            waited = True
            _openers()  # 30 ms of imports that the health check needs, while there is nothing else to do
            patience.wait()

    def _may_do_better(self, failure: QvacManagedModeError) -> bool:
        """Whether the failure of another's start says nothing of ours: its starter had less patience, or somebody
        killed its serve (once: a system that is out of memory does it again)."""
        if isinstance(failure, ServeStartTimeoutError):
            return failure.seconds < self.start_timeout
        was_killed = isinstance(failure, ServeExitedError) and failure.signal == 9
        is_first, self._saw_a_kill = was_killed and not self._saw_a_kill, was_killed
        return is_first

    def _is_being_started(self) -> bool:
        """Whether somebody alive holds the spawn lock."""
        if not os.path.lexists(lock_path(self.key)):
            return False
        verdict = _judge_lock(self.key)
        if verdict == FOREIGN:
            raise _Foreign
        return verdict == ALIVE

    def _adopted_failure(self) -> QvacManagedModeError:
        """We waited for a start by another process and it failed: so would ours."""
        found = _read_registry_file(error_path(self.key))
        return _error_from_text(found[0]) if found else ServeSpawnFailedError("qvac serve failed to start.")

    def _attach(self, record: Optional[ServeRecord], patience: _Patience, reused: bool) -> Any:
        """A _Target if the record's serve is alive, proved to be ours, and healthy; else MISS or PENDING.

        A ladder, each rung one more guarantee: record, runner, serve, listener, answer, models.
        PENDING: alive, but slow, or between two lives; never a reason to start a second one.
        """
        if record is None:
            return MISS
        serve, runner = record.judge_serve(), record.judge_runner()
        if FOREIGN in (serve, runner) or not shares_network(record.runner_pid):
            raise _Foreign
        if runner == DEAD:
            return MISS
        if record.is_restarting:
            return PENDING if self._lock_is_held_by(record.runner_pid) else MISS
        if serve == DEAD:
            return self._pending_while_closing(record)
        if record.host.strip("[]").lower() != self.host.strip("[]").lower():
            return MISS
        health = check_serve(record, min(HEALTH_TIMEOUT, max(0.1, patience.left())))
        if health.state == STRANGER:
            return MISS
        if health.state == REFUSED:
            return self._pending_while_closing(record)
        if health.state == BUSY:
            patience.trouble = "process %d does not answer (%s); `python -m qvac_managed stop %s` ends it" % (
                record.serve_pid, health.detail, self.key)  # fmt: skip
            return PENDING
        missing = [alias for alias in self.aliases if alias not in [model["id"] for model in health.models]]
        if health.state == WRONG or missing:
            if not record.names_its_serve:
                return MISS
            raise ServeSpawnFailedError(
                "What runs on port %d is not the serve that was asked for: %s." % (
                    record.port, health.detail or "it lacks the model %s" % ", ".join(missing)))  # fmt: skip
        return self._accept(record, health, reused)

    def _accept(self, record: ServeRecord, health: Health, reused: bool) -> Any:
        failed = [model["id"] for model in health.models if model["state"] == "error" and model["id"] in self.aliases]
        if self.require_ready and self.default_alias in failed:
            reason = load_failure_reason(self.key, self.default_alias, record.api_key)
            if reused and not self._others_use_it() and not self._has_connections(record):
                # Its failure may be of yesterday (a file that is there now): nobody minds a fresh start.
                stop_serve(self.key)
                return MISS
            raise ModelLoadFailedError(self.default_alias, reason)
        for alias in failed:
            _warn("Model %s failed to load: %s", alias, load_failure_reason(self.key, alias, record.api_key))
        self._wish_to_keep(record)
        # Of a host name the address at which the serve listens: at another, a stranger may.
        is_name = health.address not in ("", record.host.strip("[]"))
        base_url = base_url_of(health.address, record.port) if is_name else record.base_url
        return _Target(base_url, record.api_key, record, reused)

    def _others_use_it(self) -> bool:
        return any(name != self.consumer_id for name in _live_markers(self.key))

    def _has_connections(self, record: ServeRecord) -> bool:
        """Somebody uses it by its URL; our own health check's connection is closed in a moment."""
        return not wait_until(lambda: connections_to(record.host, record.port)[0] == 0, 0.2)

    def _lock_is_held_by(self, pid: int) -> bool:
        return (_read_lock(self.key) or "").split()[:1] == [str(pid)] and _judge_lock(self.key) == ALIVE

    def _pending_while_closing(self, record: ServeRecord) -> str:
        """A live runner without a listening serve is about to end it or to bring it back: give it a while."""
        now = time.monotonic()
        if self._pending[0] != record.version:
            self._pending = (record.version, now)
        return PENDING if now - self._pending[1] < CLOSING_WAIT else MISS

    # -- starting

    def _start(self, command: List[str], patience: _Patience, previous: Optional[_Target]) -> Optional[_Target]:
        """With the spawn lock held: look again, then start a runner and wait for it. None: another got there."""
        found = self._attach(self._register(), patience, reused=True)
        if found == PENDING:
            return None
        if isinstance(found, _Target):
            return found
        # A serve that comes back on the port and with the key it had lets plain URLs recover too.
        api_key, port = (previous.api_key, previous.port) if previous else (_new_api_key(), 0)
        channel, params_path, folder = self._start_runner(command, api_key, port)
        self._spawned, patience.margin, heard = True, CLIENT_MARGIN, b""
        try:
            _openers()  # 30 ms of imports that the health check needs, in the runner's time
            while True:
                data, ended = channel.read(min(0.25, max(0.0, patience.left())))
                heard += data
                if b"\n" in heard:
                    return self._act_on_report(_strict_json(heard.partition(b"\n")[0]), patience, api_key)
                if ended:
                    raise ServeSpawnFailedError(_runner_died(self.key, channel.close(), api_key))
                patience.look()
        finally:
            channel.close()
            if _unlink(params_path):  # no runner has read them, so none will clear up
                remove_serve_folder(self.key, folder)

    def _act_on_report(self, report: Any, patience: _Patience, api_key: str) -> Optional[_Target]:
        """What the runner has to say, once: its error, that another serves this key (None), or that it is ready."""
        if "error" in report:
            raise _error_from_json(report)
        if "superseded" in report:
            self._spawned, patience.margin = False, 0.0
            return None
        if report.get("warning"):
            _warn("%s", report["warning"])
        return self._attach_to_started(patience, api_key, report["ready"])

    def _start_runner(self, command: List[str], api_key: str, port: int) -> Tuple[RunnerChannel, str, str]:
        """Write the serve's config and the runner's parameters, start the runner; nothing stays if that fails.

        Returns its channel, the file with its parameters, and the serve's folder.
        """
        folder = os.path.join(managed_serves_dir(), "%s.%s.d" % (self.key, os.urandom(4).hex()))
        config_path = os.path.join(folder, CONFIG_NAME)
        params_path = os.path.join(managed_serves_dir(), "%s.%d.%s.runner-params.json" % (
            self.key, os.getpid(), os.urandom(8).hex()))  # fmt: skip
        params = {
            "fleetKey": self.key, "apiKey": api_key, "port": self.pinned_port or port,
            "pinned": self.pinned_port is not None, "host": self.host, "configPath": config_path, "command": command,
            "serveBinPath": self.serve_bin_path, "startTimeoutMs": self.start_timeout * 1000,
            "idleTimeoutMs": self.idle_timeout_ms, "lock": held_lock(self.key),
            "modelsFolder": models_folder(),
        }  # fmt: skip
        config = {"serve": {**self.config["serve"], "load": {"cancelOnDisconnect": False}}}
        log_fd = -1
        _clear_before_start(self.key)
        try:
            log_fd = open_log(self.key)
            _make_private_folders(folder)
            _write_new_file(config_path, json.dumps(config, indent=2).encode())
            _write_new_file(params_path, json.dumps(params).encode())
            argv = reexec_argv("runner", params_path, detach=True)
            with self._close_lock:
                self._check_cancelled()
                return _started_runner(argv, log_fd), params_path, folder
        except BaseException as error:
            _unlink(params_path)
            remove_serve_folder(self.key, folder)
            if isinstance(error, OSError):
                raise _registry_trouble("start a runner from", managed_serves_dir(), error) from None
            raise
        finally:
            if log_fd >= 0:
                os.close(log_fd)

    def _attach_to_started(self, patience: _Patience, api_key: str, runner_pid: int) -> _Target:
        runner_start = process_start(runner_pid)
        while True:
            found = self._attach(self._register(), patience, reused=False)
            if isinstance(found, _Target):
                patience.report("ready")
                return found
            # While the runner lives, a record that is not there has been removed by others: it publishes again.
            if found == MISS and (runner_start is None or process_start(runner_pid) != runner_start):
                if os.path.exists(error_path(self.key)):  # of this start: taking the lock has removed any other
                    raise self._adopted_failure()
                raise ServeSpawnFailedError(_runner_died(self.key, None, api_key))
            patience.wait()


class _Patience:
    """How long a resolution may still wait, and what it tells its caller meanwhile.

    The clock runs only while nothing moves: a model file that grows is progress.
    """

    def __init__(self, resolver: _Resolver) -> None:
        self.resolver = resolver
        self.began = self.moved = self.looked = time.monotonic()
        self.reported = 0.0
        self.margin = 0.0  # CLIENT_MARGIN while a runner of ours starts: it is to report a timeout before we do
        self.files: List[Any] = []
        self.trouble = ""
        self.sizes: Optional[Dict[str, int]] = None
        self.first_sizes: Dict[str, int] = {}

    def left(self) -> float:
        return self.moved + self.resolver.start_timeout + self.margin - time.monotonic()

    def wait(self) -> None:
        """Until a file of the key changes, or for a tenth of the time waited so far (at most 0.5 s).

        A look at the files costs 0.02 ms, one at everything 0.4: two hundred processes may be waiting.
        """
        elapsed = time.monotonic() - self.began
        until = time.monotonic() + min(0.5, elapsed / 10)
        while True:
            self.look()
            time.sleep(min(0.05, max(0.004, elapsed / 50)))
            before, self.files = self.files, [
                file_version(path(self.resolver.key)) for path in (record_path, lock_path, error_path)]  # fmt: skip
            if before != self.files or time.monotonic() >= until:
                return

    def look(self) -> None:
        """Note progress and pass it on; ServeStartTimeoutError when there has been none for too long."""
        self.resolver._check_cancelled()
        now = time.monotonic()
        if self.sizes is None or now - self.looked >= 0.5:
            before, self.looked = self.sizes, now
            self.sizes = model_files(models_folder())
            if before is None:
                self.first_sizes = self.sizes
            elif before != self.sizes:
                self.moved = now
        if self.left() <= 0:
            raise ServeStartTimeoutError(
                "No serve was ready after %g s without progress%s. Raise serve_start_timeout for a large model, "
                "or see the log: %s" % (self.resolver.start_timeout, ": " + self.trouble if self.trouble else "",
                                        log_path(self.resolver.key)), self.resolver.start_timeout)  # fmt: skip
        if self.resolver.on_progress is not None and now - self.reported >= 0.25:
            self.reported = now
            self.report(None)

    def report(self, phase: Optional[str]) -> None:
        if self.resolver.on_progress is None:
            return
        growing = {path: size for path, size in (self.sizes or {}).items() if self.first_sizes.get(path) != size}
        done = sum(growing.values()) if growing else None
        total = _download_size(self.resolver.config, self.first_sizes) if growing else None
        if phase is None:
            began = os.path.exists(log_path(self.resolver.key)) and time.monotonic() - self.began > 0.5
            downloading = growing and time.monotonic() - self.moved < 3.0
            phase = "downloading" if downloading else "loading" if growing or began else "starting"
        total = total if total is not None and done is not None and total >= done else None
        self.resolver.on_progress(Progress(phase, time.monotonic() - self.began, done, total))


def _download_size(config: Mapping[str, Any], present: Mapping[str, int]) -> Optional[int]:
    """Bytes that a start has to download: what its models weigh, less those that lie there whole already."""
    sizes = {info.name: info.size for info in all_models()}
    total, there = 0, set(present.values())
    for entry in config["serve"]["models"].values():
        if entry["preload"] and ("model" in entry or "://" in entry["src"]):
            size = sizes.get(entry["model"]) if "model" in entry else _remote_size(entry["src"])
            if size is None:
                return None
            total += 0 if size in there else size
    return total


_remote_sizes: Dict[str, Optional[int]] = {}


def _remote_size(url: str) -> Optional[int]:
    """What a web server says of a file's length; asked once."""
    if url not in _remote_sizes and url.startswith(("http://", "https://")):
        _remote_sizes[url] = None
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HEALTH_TIMEOUT) as response:
                _remote_sizes[url] = int(response.headers["Content-Length"])
        except (OSError, http.client.HTTPException, ValueError, TypeError):
            pass
    return _remote_sizes.get(url)


def _new_consumer_id() -> str:
    return "%d.%s" % (os.getpid(), os.urandom(4).hex())


def _new_api_key() -> str:
    import base64

    return base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()


def _started_runner(argv: Sequence[str], log_fd: int) -> RunnerChannel:
    try:
        return RunnerChannel(argv, log_fd)
    except OSError as error:
        hint = _TROUBLE_HINTS[error.errno] if error.errno in (errno.EMFILE, errno.EAGAIN) else ""
        text = "Could not start a runner with %s: %s. %s" % (argv[0], error.strerror or error, hint)
        raise ServeSpawnFailedError(text) from None


def _runner_died(key: str, code: Optional[int], api_key: str) -> str:
    try:
        fd = open_log(key)
        try:
            tail = log_tail(fd, 0, api_key)
        finally:
            os.close(fd)
    except RegistryError:
        tail = ""
    how = " with exit code %d" % code if code else ""
    return "The runner ended%s before the serve was ready.%s" % (how, _output(tail[-1500:]))


def load_failure_reason(key: str, alias: str, secret: str) -> str:
    """Why a model failed to load, in the serve's own words from its log."""
    found = None
    try:
        fd = open_log(key)
        try:
            lines = redact(read_log(fd, 0, 16 * LOG_READ_BYTES).decode("utf-8", "replace"), secret).splitlines()
        finally:
            os.close(fd)
    except (OSError, RegistryError):
        lines = []
    for index, line in enumerate(lines):
        if line.startswith('Failed to preload "%s": ' % alias):
            found = line.partition('": ')[2].strip()
            for more in lines[index + 1 : index + 7]:  # "  caused by: ...", or what a config check objects to
                if not more.startswith(("  ", "\u2716")):  # not the arrow: with that a request begins
                    break
                found += " " + more.strip()
    return found or "the serve does not say why (its log: %s)" % log_path(key)


def _warn(text: str, *args: Any) -> None:
    logging.getLogger("qvac_managed").warning(text, *args)


# -- making clients

_open_clients: Dict[int, ManagedQvac] = {}
_hooks_installed: List[int] = []


def _install_hooks() -> None:
    """Once, with the first managed client: detach at exit, and own nothing of the parent's after a fork."""
    if not _hooks_installed:
        _hooks_installed.append(1)
        atexit.register(_detach_all)
        call_after_fork(_after_fork)


def _detach_all() -> None:
    for client in list(_open_clients.values()):
        client.close()


def _after_fork() -> None:
    _forget_after_fork()
    for client in list(_open_clients.values()):
        client._resolver.forget_parent()
        client._recovery_lock, client._is_recovering = _thread.RLock(), False


if TYPE_CHECKING:

    @overload
    def create_qvac(mode: Literal["external"] = ..., *, base_url: Optional[str] = ..., api_key: Optional[str] = ...,
                    headers: Optional[Mapping[str, str]] = ..., opener: Optional[Opener] = ...) -> Qvac: ...

    @overload
    def create_qvac(mode: Literal["managed"], *, models: Models, serve_host: str = ..., serve_port: Optional[int] = ...,
                    serve_bin_path: Path = ..., serve_args: Sequence[str] = ...,
                    serve_start_timeout: float = ..., serve_idle_timeout: Optional[float] = ...,
                    serve_sleep_timeout: Optional[float] = ..., reuse: Optional[bool] = ...,
                    close_on_parent_exit: bool = ..., require_ready: bool = ...,
                    headers: Optional[Mapping[str, str]] = ..., opener: Optional[Opener] = ...,
                    on_progress: OnProgress = ...) -> ManagedQvac: ...  # fmt: skip


def create_qvac(
    mode: str = "external",
    *,
    base_url: Optional[str] = None,
    api_key: Optional[str] = None,
    models: Optional[Models] = None,
    serve_host: str = DEFAULT_HOST,
    serve_port: Optional[int] = None,
    serve_bin_path: Path = None,
    serve_args: Sequence[str] = (),
    serve_start_timeout: float = DEFAULT_START_TIMEOUT,
    serve_idle_timeout: Optional[float] = DEFAULT_IDLE_TIMEOUT,
    serve_sleep_timeout: Optional[float] = DEFAULT_SLEEP_TIMEOUT,
    reuse: Optional[bool] = None,
    close_on_parent_exit: bool = False,
    require_ready: bool = True,
    headers: Optional[Mapping[str, str]] = None,
    opener: Optional[Opener] = None,
    on_progress: OnProgress = "auto",
) -> Qvac:
    """A client of a QVAC serve: a `Qvac` in external mode, a `ManagedQvac` in managed mode.

    External: you run the serve; nothing is started and no request is made. `base_url` defaults to
    $QVAC_BASE_URL or http://127.0.0.1:11434/v1, `api_key` to $QVAC_API_KEY or "qvac".

    Managed: attaches to a live serve with the same models and config, host, binary and pinned port,
    or starts one; returns when it is ready. Its address and key are chosen for it. Times are seconds.
      models               names (catalog ids or constants) or specs, see ManagedModel
      serve_host, _port    where it listens; a pinned port makes the serve private unless reuse=True
      serve_bin_path       the `qvac` command; ECHO for the built-in echo serve
      serve_args           more arguments for `qvac serve`
      serve_start_timeout  how long a start may take while nothing moves (a growing download moves)
      serve_idle_timeout   how long the serve stays after its last use; None: until stopped. With
                           several consumers the longest wish wins
      serve_sleep_timeout  how long without a request until the models leave memory, though the serve is
                           still wanted; the next request wakes it. None: never. The longest wish wins
      reuse                share the serve (default), or False for a private one that ends with us
      close_on_parent_exit close, and end this process, when its parent has gone
      require_ready        raise ModelLoadFailedError if the default model failed to load
      headers, opener      for requests; an opener is an object like urllib's OpenerDirector
      on_progress          called with a Progress some four times a second while a start is waited for;
                           "auto": show_progress, None: nothing

    An option of the other mode is an InvalidManagedModelError. Raises the errors of this module (base:
    QvacManagedModeError); then nothing is left behind.
    """
    return _create(mode, locals())


def _create(mode: Any, options: Dict[str, Any]) -> Qvac:
    headers, opener = _checked_headers(options["headers"]), options["opener"]
    if opener is not None and not callable(getattr(opener, "open", None)):
        raise InvalidManagedModelError("An opener has a method open(), as urllib's have; %r has none." % (opener,))
    if mode not in ("external", "managed"):
        raise InvalidManagedModelError("The mode is 'external' or 'managed', not %r." % (mode,))
    for name, default in (create_qvac.__kwdefaults__ or {}).items():
        is_managed = name not in ("base_url", "api_key")
        if name not in ("headers", "opener") and is_managed != (mode == "managed") and options[name] is not default:
            raise InvalidManagedModelError("%s goes with %s." % (
                name, 'create_qvac("managed", ...)' if is_managed else "external mode; a managed serve has its own"))
    if mode == "external":
        return Qvac(*_checked_address(options["base_url"], options["api_key"]), headers, opener)
    options = {**options, "models": options["models"] if options["models"] is not None else []}
    if isinstance(options["serve_bin_path"], os.PathLike):
        options["serve_bin_path"] = os.fsdecode(options["serve_bin_path"])
    _check_options(options)
    if options["on_progress"] == "auto":
        options["on_progress"] = show_progress
    resolver = _Resolver(options)
    _install_hooks()
    _Call.note("start", resolver.cancel)
    if options["close_on_parent_exit"]:
        _watch_parent(resolver)  # before resolving: a parent may die during a long first download
    try:
        client = ManagedQvac(resolver, resolver.resolve(), headers, opener)
        _open_clients[id(client)] = client
        _Call.note("start", lambda: None)  # it has begun: what ends the call no longer ends it
        return client
    except BaseException:
        resolver.cancel()  # and with it the watch on the parent
        raise
    finally:
        if options["on_progress"] is show_progress and _shown_progress is not None:
            _shown_progress.clear()


def _checked_address(base_url: Any, api_key: Any) -> Tuple[str, str]:
    url = base_url or os.environ.get("QVAC_BASE_URL") or DEFAULT_BASE_URL
    if not isinstance(url, str) or not url.lower().startswith(("http://", "https://")):
        raise InvalidManagedModelError("base_url begins with http:// or https://, unlike %r." % (url,))
    if not url.isprintable() or " " in url:
        raise InvalidManagedModelError("base_url has a character that no URL has, a line break perhaps: %r." % (url,))
    key = api_key if api_key is not None else os.environ.get("QVAC_API_KEY") or DEFAULT_API_KEY
    if not _fits_into_a_header(key):
        raise InvalidManagedModelError("api_key is a string of characters that a header can carry: no line breaks.")
    return url, key


def _checked_headers(headers: Any) -> Dict[str, str]:
    """Before anything is started, not when it is done."""
    refusal = InvalidManagedModelError(
        "`headers` is a mapping of names to values, both strings of characters that a header can carry.")  # fmt: skip
    try:
        checked = dict(headers or {})
    except (TypeError, ValueError):
        raise refusal from None
    if not all(_fits_into_a_header(text) for pair in checked.items() for text in pair):
        raise refusal
    if not all(name and name.isascii() and name == name.strip() and ":" not in name for name in checked):
        raise refusal
    return checked


def _check_options(options: Mapping[str, Any]) -> None:
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value

    port, host = options["serve_port"], options["serve_host"]
    if port is not None and (type(port) is not int or not 0 < port < 65536):
        raise InvalidManagedModelError("serve_port is a port number from 1 to 65535, not %r." % (port,))
    if not isinstance(host, str) or not 0 < len(host) < 254 or not all(c.isalnum() or c in ".:-_" for c in host):
        raise InvalidManagedModelError("serve_host is an address or a host name, not %s." % _shorten(repr(host), 80))
    start, args = options["serve_start_timeout"], options["serve_args"]
    if not is_number(start) or not 0 < start <= 1e7:
        raise InvalidManagedModelError("serve_start_timeout is a number of seconds above 0, not %r." % (start,))
    for name in ("serve_idle_timeout", "serve_sleep_timeout"):
        seconds = options[name]
        if seconds is not None and (not is_number(seconds) or not 0 <= seconds <= 1e9):
            raise InvalidManagedModelError("%s is None or a number of seconds from 0: not %r." % (name, seconds))
    if not isinstance(args, (list, tuple)) or not all(isinstance(arg, str) and "\0" not in arg for arg in args):
        raise InvalidManagedModelError("serve_args is a list of strings, one for each argument: not %r." % (args,))
    _check_other_options(options)


def _check_other_options(options: Mapping[str, Any]) -> None:
    path = options["serve_bin_path"]
    if path is not None and (not isinstance(path, str) or not path):
        raise InvalidManagedModelError("serve_bin_path is a path, or left out to search for `qvac`: not %r." % (path,))
    for name in ("require_ready", "close_on_parent_exit"):
        if not isinstance(options[name], bool):
            raise InvalidManagedModelError("%s is True or False, not %r." % (name, options[name]))
    if not isinstance(options["reuse"], (bool, type(None))):
        raise InvalidManagedModelError("reuse is True, False, or None for the default, not %r." % (options["reuse"],))
    if options["on_progress"] not in (None, "auto") and not callable(options["on_progress"]):
        raise InvalidManagedModelError("on_progress is a function, 'auto' or None: not %r." % (options["on_progress"],))


if TYPE_CHECKING:

    @overload
    async def create_qvac_async(
        mode: Literal["external"] = ..., *, base_url: Optional[str] = ..., api_key: Optional[str] = ...,
        headers: Optional[Mapping[str, str]] = ..., opener: Optional[Opener] = ...) -> Qvac: ...  # fmt: skip

    @overload
    async def create_qvac_async(
        mode: Literal["managed"], *, models: Models, serve_host: str = ..., serve_port: Optional[int] = ...,
        serve_bin_path: Path = ..., serve_args: Sequence[str] = ...,
        serve_start_timeout: float = ..., serve_idle_timeout: Optional[float] = ...,
        serve_sleep_timeout: Optional[float] = ..., reuse: Optional[bool] = ...,
        close_on_parent_exit: bool = ..., require_ready: bool = ..., headers: Optional[Mapping[str, str]] = ...,
        opener: Optional[Opener] = ..., on_progress: OnProgress = ...) -> ManagedQvac: ...  # fmt: skip


async def create_qvac_async(mode: str = "external", **options: Any) -> Qvac:
    """create_qvac() that never blocks the event loop. Cancelling it calls the start off and leaves nothing.

    The client it gives is the same; achat(), astream_chat() and aembed() never block the loop either.
    """
    worker, create = _Worker(), functools.partial(create_qvac, mode, **options)
    try:
        client: Qvac = await worker.do(create, is_last=True) if mode == "managed" else create()
        return client
    except asyncio.CancelledError:
        deadline = time.monotonic() + STOP_GRACE
        while worker.thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)  # the program may end with its loop, and leave a runner that loads for nobody
        raise


def _settle(done: Optional[asyncio.Future[Any]], result: Any, error: Optional[BaseException]) -> None:
    if done is None or done.done():
        if isinstance(result, ManagedQvac):
            result.close()  # cancelled in the moment in which it succeeded
    elif isinstance(error, StopIteration):  # out of on_progress: a future takes any exception but this one
        done.set_exception(RuntimeError("on_progress raised StopIteration"))
    elif error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)


def _watch_parent(resolver: _Resolver) -> None:
    """close_on_parent_exit: a thread that ends the process once the parent is gone, for hosts that live
    only for it."""
    parent = parent_handle()

    def watch() -> None:
        while not resolver.cancelled:
            if parent_has_gone(parent):
                resolver.cancel()
                _detach_all()
                os._exit(0)
            time.sleep(PARENT_TICK)

    _started_thread("qvac_managed parent watch", watch)


def _started_thread(name: str, work: Callable[[], None]) -> Any:
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        start_without_signals(thread.start)
    except RuntimeError as error:
        raise ServeSpawnFailedError("Could not start a thread: %s." % error) from None
    return thread


# -- looking after serves


class ServeInfo:
    """What can be said of one serve on disk, at one moment. Unknown values are None.

    `state`: ready, starting, restarting, hung (alive, no answer), orphaned (its runner is dead), dead,
    or foreign (another machine or container's). `models` are [{"id", "state"}]; of a serve that does not
    answer they are what it was started with, in state "unknown". `connections` are open ones.
    `idle_timeout_s` is None for one that stays until stopped, and for one that is starting.
    `time_left_s` counts down while nobody uses it. `reused` is False only from serve_info(), for a client
    that started its serve.
    """

    FIELDS = ("fleet_key", "base_url", "host", "port", "pid", "runner_pid", "models", "reused", "private", "state",
              "consumers", "connections", "uptime_s", "idle_timeout_s", "restarts", "rss_bytes", "started_at",
              "time_left_s")  # fmt: skip
    fleet_key: str
    base_url: str
    host: Optional[str]
    port: Optional[int]
    pid: Optional[int]
    runner_pid: int
    models: List[Dict[str, str]]
    reused: bool
    private: bool
    state: str
    consumers: int
    connections: int
    uptime_s: Optional[float]
    idle_timeout_s: Optional[float]
    restarts: int
    rss_bytes: Optional[int]
    started_at: str
    time_left_s: Optional[float]

    def __init__(self, **fields: Any) -> None:
        for name in self.FIELDS:
            setattr(self, name, fields.get(name))

    def __repr__(self) -> str:
        return "<ServeInfo %s %s %s>" % (self.fleet_key, self.state, self.base_url)

    def as_dict(self) -> Dict[str, Any]:
        """The fields as a dict that JSON can carry, for `--json`."""
        return {name: getattr(self, name) for name in self.FIELDS}


def list_serves() -> List[ServeInfo]:
    """The serves on disk, ours or the provider's, oldest first, those that are still starting last.

    All are asked for their models at the same time, so hung ones cost one health timeout altogether. Of several
    serves, one that takes much longer still is left out: absence is no proof. Asking does not count as use.
    RegistryError if the folder cannot be read.
    """
    records = sorted(_each_record(), key=lambda record: (record.started_at, record.fleet_key))
    described = _in_parallel(_describe, records, HEALTH_TIMEOUT + 1.0 + 0.05 * len(records))
    return described + _starting_serves({record.fleet_key for record in records})


def _starting_serves(known: Set[str]) -> List[ServeInfo]:
    """Serves whose runner holds the spawn lock and has not published a record yet."""
    starting = []
    for name in _listdir(managed_serves_dir()):
        key = name[: -len(".lock")]
        if name.endswith(".lock") and is_valid_fleet_key(key) and key not in known:
            runner_pid = _starting_runner(key)
            if runner_pid:
                models = _unknown(_starting_models(key))
                starting.append(ServeInfo(
                    fleet_key=key, runner_pid=runner_pid, models=models, reused=True, private=is_private_key(key),
                    state="starting", consumers=len(live_consumers(key)), connections=0, restarts=0))  # fmt: skip
    return starting


def _starting_runner(key: str) -> int:
    """The pid of the live runner that holds the spawn lock of a key; 0 if none does."""
    words = (_read_lock(key) or "").split()
    held = len(words) == 4 and words[3].startswith(RUNNER_MARK) and _judge_lock(key) == ALIVE
    return int(words[0]) if held else 0


def _starting_models(key: str) -> Optional[Dict[str, Any]]:
    """The `models` part of the config of a serve that has no record yet; None if it cannot be read."""
    configs = (_config_models(os.path.join(folder, CONFIG_NAME)) for folder in serve_folders(key))
    return next((models for models in configs if models is not None), None)


def _unknown(aliases: Optional[Mapping[str, Any]]) -> List[Dict[str, str]]:
    return [{"id": alias, "state": "unknown"} for alias in aliases or {}]


def serve_info(client: ManagedQvac) -> ServeInfo:
    """What list_serves() says of the serve behind a client. ServeSpawnFailedError if it has just ended."""
    record = _read_any_record(client.fleet_key)
    if record is None:
        raise ServeSpawnFailedError("The serve %s has just ended." % client.fleet_key)
    info = _describe(record)
    info.reused = client.reused
    return info


def _record_models(record: Optional[ServeRecord]) -> Optional[Dict[str, Any]]:
    """The `models` part of the config a serve was started with; None if it cannot be read."""
    return _config_models(record.config_path) if record else None


def _config_models(path: str) -> Optional[Dict[str, Any]]:
    found = _read_registry_file(path)
    config = _strict_json(found[0]) if found else None
    try:
        models = config["serve"]["models"] if config else None
    except (LookupError, TypeError):
        return None
    return models if isinstance(models, dict) and all(isinstance(m, dict) for m in models.values()) else None


def _describe(record: ServeRecord) -> ServeInfo:
    now, models = time.monotonic(), []
    state = _state_of(record)
    is_here = state not in ("dead", "foreign")
    # Before the health check: the serve may close that connection a moment after we have.
    connections = connections_to(record.host, record.port)[0] if is_here else 0
    if state in ("ready", "orphaned") and record.api_key:
        health = check_serve(record)
        models = health.models
        state = "hung" if state == "ready" and health.state != HEALTHY else state
    models = models or _unknown(_record_models(record))
    never = record.idle_timeout_ms >= NEVER_MS
    left = record.idle_timeout_ms / 1000 - (now - record.idle_since) if record.idle_since and not never else None
    return ServeInfo(
        fleet_key=record.fleet_key, base_url=record.base_url, host=record.host, port=record.port,
        pid=record.serve_pid, runner_pid=record.runner_pid, models=models, reused=True, private=record.is_private,
        state=state, consumers=len(live_consumers(record.fleet_key)), connections=connections,
        uptime_s=round(now - record.ready_at, 1) if record.ready_at and is_here else None,
        idle_timeout_s=None if never else record.idle_timeout_ms / 1000, restarts=record.restarts,
        rss_bytes=rss_bytes(group_members(group_of(record.serve_pid))) if is_here and not record.is_restarting else None,
        started_at=record.started_at,
        time_left_s=round(max(0.0, left), 1) if left is not None and is_here else None)  # fmt: skip


def _state_of(record: ServeRecord) -> str:
    serve, runner = record.judge_serve(), record.judge_runner()
    if FOREIGN in (serve, runner):
        return "foreign"
    if runner == ALIVE:
        return "restarting" if record.is_restarting or serve == DEAD else "ready"
    return "orphaned" if serve == ALIVE else "dead"


def _in_parallel(function: Callable[[Any], Any], items: Sequence[Any], timeout: float) -> List[Any]:
    """The function's results for all items, each in a thread; those that take longer are left out."""
    if len(items) < 2:
        return [function(item) for item in items]
    results: Dict[int, Any] = {}

    def work(index: int) -> None:
        results[index] = function(items[index])

    threads, deadline = [], time.monotonic() + timeout
    for index in range(len(items)):
        thread = threading.Thread(target=work, args=(index,), daemon=True)
        try:
            start_without_signals(thread.start)
        except RuntimeError:
            break  # this process may have no more threads
        threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [results[index] for index in sorted(results)]


def stop_serve(fleet_key: str) -> bool:
    """Stop a serve now, whoever uses it, and return when it is gone. False: there is none with that key.

    Its consumers keep their markers, and start another when they next make a request. RegistryError
    for one that belongs to another machine or container, or that cannot be proved to be a serve.
    """
    record = _read_any_record(fleet_key)
    if record is None:
        if _stop_starting(fleet_key):
            return True
        record = _read_any_record(fleet_key)  # it may have become ready in between
    if record is None:
        return False
    serve, runner = record.judge_serve(), record.judge_runner()
    if FOREIGN in (serve, runner):
        raise RegistryError("%s belongs to another machine or container that shares this folder." % fleet_key)
    if runner == ALIVE and _is_runner_of(record):
        start = process_start(record.serve_pid) if serve == ALIVE else None
        _stop_runner(fleet_key, record.runner_pid, record.runner_start)
        if start and process_start(record.serve_pid) == start:  # a provider's runner that had to be killed leaves it
            stop_stray_group(record.serve_pid, lambda: process_start(record.serve_pid) == start)
    elif serve == ALIVE and not _stop_orphan(record, None if record.has_identities else HEALTH_TIMEOUT):
        raise RegistryError("Process %d does not answer as the serve %s: not stopped." % (record.serve_pid, fleet_key))
    _drop_record(record)
    return True


def _is_runner_of(record: ServeRecord) -> bool:
    """Proof enough to signal the runner: its start time, or, in a provider's record, that it is the serve's parent."""
    return record.has_identities or (record.names_its_serve and (look_at(record.serve_pid) or _UNREADABLE).parent == record.runner_pid)


def _stop_runner(key: str, pid: int, start: str) -> None:
    """SIGTERM, and after the time its own stop ladder may take, SIGKILL: its watchdog then kills the serve."""
    start = start or process_start(pid) or ""  # a provider's record does not tell it
    try:
        ask_to_stop(pid, serve_folders(key))
        patience = STOP_GRACE + 3 * GROUP_GRACE
        while not wait_until(lambda: process_start(pid) != start, patience, 0.01):
            kill_process(pid)
            patience = STOP_GRACE
    except OSError:
        pass  # it has gone in between


def _stop_starting(fleet_key: str) -> bool:
    """Stop a runner whose serve is not ready yet: it holds the spawn lock."""
    runner_pid = _starting_runner(fleet_key)
    if runner_pid:
        _stop_runner(fleet_key, runner_pid, "")
    return bool(runner_pid)


def _stop_orphan(record: ServeRecord, patience: Optional[float] = None) -> bool:
    """Stop a serve whose runner is dead, with the whole ladder; False if it is not proved to be ours.

    With PATIENCE it must also answer, within so many seconds.
    """
    if not record.names_its_serve or (patience is not None and check_serve(record, patience).state != HEALTHY):
        return False
    if find_listener(record.host, record.port, record.serve_pid)[0] == STRANGER:
        return False
    start = process_start(record.serve_pid)
    if start is None or (record.serve_start and record.serve_start != start):
        return start is None
    return stop_stray_group(record.serve_pid, lambda: process_start(record.serve_pid) == start)


def _drop_record(record: ServeRecord) -> bool:
    """Remove a record and its folder if it is still the one that was judged: it may have been published anew."""
    with guard():
        current = _read_any_record(record.fleet_key)
        if current is None or (current.version[0], current.serve_pid) != (record.version[0], record.serve_pid):
            return False
        remove_record(record.fleet_key, preserve_consumers=True)
        _rmdir(consumers_dir(record.fleet_key))  # if it is empty: nobody else is going to
    remove_serve_folder(record.fleet_key, os.path.dirname(record.config_path))
    return True


def sweep_serves(limit: float = float("inf")) -> List[str]:
    """Clear what the dead have left behind; returns the fleet keys of the records that were dropped.

    A dead serve's record goes, live markers stay. A live serve whose runner is dead is stopped if it
    answers as ours, else kept for a later sweep. A live serve with a live runner is never touched.
    Records are read for at most `limit` seconds; the rest is left to the next sweep. Hung orphans cost one health
    timeout altogether, at most `limit` seconds again. RegistryError if the folder cannot be read.
    """
    swept, orphans, deadline = [], [], time.monotonic() + limit
    for record in _each_record():
        if time.monotonic() > deadline:
            break
        serve, runner = record.judge_serve(), record.judge_runner()
        if FOREIGN in (serve, runner):
            continue
        if serve == DEAD and (runner == DEAD or not record.runner_start):
            # A runner of ours that lives will restart it or clear it away itself.
            swept += [record.fleet_key] if _drop_record(record) else []
        elif serve == ALIVE and runner == DEAD:
            orphans.append(record)
    patience = min(HEALTH_TIMEOUT, limit)
    stopped = _in_parallel(lambda orphan: _stop_orphan(orphan, patience) and orphan, orphans, patience + STOP_GRACE + 1)
    swept += [orphan.fleet_key for orphan in stopped if orphan and _drop_record(orphan)]
    _sweep_leftovers()
    return swept


def _sweep_leftovers() -> None:
    for name in leftovers():
        key, _, rest = name.partition(".")
        path = os.path.join(managed_serves_dir(), name)
        try:
            if rest == "lock":
                _remove_dead_lock(key)
            elif rest == "consumers":
                _rmdir(path)
            elif is_serve_folder_name(name):
                remove_serve_folder(key, path)
            else:
                _unlink(path)
        except RegistryError:
            pass  # unreadable: not a reason for every start to fail


def leftovers() -> List[str]:
    """Names of the files whose makers died before they could remove them, once too old to be in the making."""
    folder = managed_serves_dir()
    names, found = set(_listdir(folder)), []
    for name in sorted(names):
        key, _, rest = name.partition(".")
        if not is_valid_fleet_key(key):
            continue
        try:
            age = _heartbeat_age(os.lstat(os.path.join(folder, name)).st_mtime)
            is_locked = key + ".lock" in names and _judge_lock(key) != DEAD
            stale_after = _stale_after(name, rest, is_locked, key + ".json" in names)
            if stale_after is not None and age > stale_after and not (rest == "consumers" and _live_markers(key)):
                found.append(name)
        except (OSError, RegistryError):
            pass
    return found


def _clear_before_start(key: str) -> None:
    """With the spawn lock held: what killed starts of this serve have left, keys among it, however young it is.

    Nobody else can be starting it, and a runner that still serves has read its files. The temp files that live
    processes make here are made under the guard (record, lock) or under the spawn lock (KEY.error).
    """
    folder = managed_serves_dir()
    with guard():
        for name in _listdir(folder):
            if name.startswith(key + ".") and name.endswith((".runner-params.json", ".tmp", ".stale")):
                _unlink(os.path.join(folder, name))
            elif name.startswith(key + ".") and is_serve_folder_name(name):
                remove_serve_folder(key, os.path.join(folder, name))


def _stale_after(name: str, rest: str, is_locked: bool, has_record: bool) -> Optional[float]:
    """The age in seconds at which a file of the registry is swept; None: never, or only with its serve."""
    if rest.endswith(".runner-params.json"):
        return PARAMS_STALE
    if rest.endswith((".tmp", ".stale")):
        return LEFTOVER_STALE
    if is_locked:
        return None
    if rest == "lock":
        return LEFTOVER_STALE  # whoever wants the serve steals it at once
    if has_record:
        return None
    if rest == "log":
        return LOG_STALE
    return LEFTOVER_STALE if rest in ("error", "consumers") or is_serve_folder_name(name) else None


def find_reusable_serve(key: str) -> Optional[ServeRecord]:
    """The record of a serve that is alive, listens itself, and answers as ours; None without it."""
    record = read_record(key)
    if record is None or (record.judge_serve(), record.judge_runner()) != (ALIVE, ALIVE) or record.is_restarting:
        return None
    return record if check_serve(record).state == HEALTHY else None


# ==================================================================================================
# 13. Echo serve
# ==================================================================================================


# Plain sockets: http.server would nearly double the start-up time, and cannot send chunks. The main thread
# loads, listens and accepts; each connection has a thread of its own.

_ECHO_USAGE = "usage: serve --openai --no-default --config FILE --port N --host H --api-key-file FILE"
_ECHO_HEAD_LIMIT = 64 * 1024  # bytes of request line and header fields
_ECHO_BODY_LIMIT = 100 * 1024 * 1024  # bytes, as the real serve
_ECHO_KEEP_ALIVE = 72.0  # seconds a silent connection stays open, as the real serve
_ECHO_LAST_WORDS = 1.0  # seconds for answers under way at SIGTERM, and for the rest of a refused body


def run_echo_serve(argv: List[str]) -> int:
    """Do what `qvac serve` does, with models that answer their input; return the exit code once stopped.

    argv is the CLI's: `serve --openai --no-default --config FILE --port N --host H --api-key-file FILE`, or
    `--api-key KEY`; without a key nobody is asked for one. SIGTERM and Ctrl-C stop it with 0; 1 is a serve
    that cannot start, 2 a usage error. Every model chats, completes and embeds. For trying things out, a
    model's `config` may hold

    - `echo_load_seconds`: how long it takes to load
    - `echo_token_seconds`: the pause between two pieces of a streamed answer
    - `echo_fail`: why it cannot be loaded; every attempt fails with this reason
    - `ctx_size`: the longest prompt in words. For a longer one it does what the real serve does: an internal
      error, or, streamed, silence

    What follows `<think>` at the beginning of a prompt, up to `</think>`, is thought (`reasoning_content`), and
    `max_tokens` words end an answer.

    Must run in the main thread, whose SIGTERM and SIGINT it takes.
    """
    options, words = {"port": "11434", "host": "127.0.0.1", "api-key": ""}, iter(argv)
    for word in words:
        if word in ("--config", "--port", "--host", "--api-key", "--api-key-file"):
            options[word[2:]] = next(words, "")
        elif word not in ("serve", "--openai", "--no-default"):
            _echo_log(f"error: unknown option '{word}'; {_ECHO_USAGE}", stream=2)
            return 2
    if not options.get("config") or not options["port"].isdecimal():
        _echo_log(f"error: --config needs a file, --port a number; {_ECHO_USAGE}", stream=2)
        return 2
    try:
        serve = _EchoServe(options)
        serve.preload()
        serve.listen(options["host"], int(options["port"]))
    except (OSError, ValueError, OverflowError) as error:
        # With its symbol, EADDRINUSE, as Node.js does: whoever reads the log looks for that.
        symbol = errno.errorcode.get(error.errno or 0) if isinstance(error, OSError) else None
        _echo_log(f"error: {symbol}: {error}" if symbol else f"error: {error}", stream=2)
        return 1
    return 0


def _echo_log(line: str, stream: int = 1) -> None:
    """Straight to the descriptor: a thread that holds sys.stdout's lock at exit would abort the process."""
    try:
        os.write(stream, (line + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody reads the log any more: no reason to stop answering


class _EchoError(Exception):
    """An answer that is not 200: HTTP status, OpenAI's error code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status, self.body = status, {"error": {"message": message, "type": kind, "code": code}}
        super().__init__(message)


class _EchoModel:
    """One alias of `serve.models`. `state` is one of the real serve's: idle, loading, ready, error."""

    def __init__(self, alias: str, entry: Any) -> None:
        entry = {"model": entry} if isinstance(entry, str) else entry
        config = entry.get("config") or {}
        self.alias, self.state, self.created = alias, "idle", int(time.time())
        self.source = entry["model"] if "model" in entry else entry["src"]
        self.preload = bool(entry.get("preload", "model" in entry))  # the real serve's two defaults
        self.load_seconds, self.token_seconds = (
            float(config.get("echo_%s_seconds" % name, 0)) for name in ("load", "token"))  # fmt: skip
        self.fail = config.get("echo_fail")
        self.context = config["ctx_size"] if type(config.get("ctx_size")) is int else 0  # in words; 0: no limit

    def listing(self) -> Dict[str, Any]:
        return {"id": self.alias, "object": "model", "created": self.created, "owned_by": "qvac", "state": self.state}

    def facts(self, prefix: str, kind: str) -> Dict[str, Any]:
        """What every answer begins with, plain or a piece of a stream."""
        return {"id": f"{prefix}-{os.urandom(5).hex()}", "object": kind, "created": int(time.time()), "model": self.alias}


class _EchoRequest:
    """One request. While its body is `unread`, the connection can carry no other one."""

    def __init__(self, lines: List[str]) -> None:
        self.method, self.target, self.version = (lines[0].split() + ["", "", ""])[:3]
        self.path = self.target.partition("?")[0]
        fields = (line.partition(":") for line in lines[1:])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        self.unread = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"
        self.body = b""

    def keeps_open(self) -> bool:
        asked_to = self.version == "HTTP/1.1" and self.headers.get("connection", "").lower() != "close"
        return asked_to and not self.unread

    def read_body(self, stream: BinaryIO) -> None:
        digits = self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers or not digits.isdecimal():
            raise _EchoError(411, "length_required", "The request body needs a Content-Length.")
        if len(digits) > len(str(_ECHO_BODY_LIMIT)) or int(digits) > _ECHO_BODY_LIMIT:
            raise _EchoError(413, "request_too_large", "Request body is too large")
        self.body = stream.read(int(digits))
        if len(self.body) < int(digits):
            raise ConnectionError("the client went away")
        self.unread = False

    def json(self) -> Dict[str, Any]:
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _EchoError(415, "unsupported_media_type", "Content-Type must be application/json.")
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            raise _EchoError(400, "invalid_json", "Request body must be valid JSON.") from None
        if not isinstance(body, dict):
            raise _EchoError(400, "invalid_request", "Request body must be a JSON object.")
        return body


def _echo_head(stream: BinaryIO) -> List[str]:
    """The lines before the empty one; none if the client has closed, or sends more than it may."""
    lines: List[str] = []
    room = _ECHO_HEAD_LIMIT
    while True:
        line = stream.readline(room)
        room -= len(line)
        if not line.endswith(b"\n"):
            return []
        if line.strip():
            lines.append(line.decode("latin-1"))
        elif lines:
            return lines


def _echo_text(message: Any) -> str:
    """The text of a chat message, whose content is a string or a list of parts."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _echo_strings(body: Dict[str, Any], name: str, code: str) -> List[str]:
    """A field that is a string or a list of strings, as a list."""
    values = body.get(name) if isinstance(body.get(name), list) else [body.get(name)]
    if not values or not all(isinstance(one, str) for one in values):
        raise _EchoError(400, code, f'"{name}" must be a string or a list of strings.')
    return values


def _echo_words(text: str) -> List[str]:
    """The text in pieces of one word each that add up to it."""
    return re.findall(r"\s*\S+|\s+", text)


def _echo_thinking(text: str, most: Any) -> Tuple[List[str], List[str], str]:
    """`(thoughts, words, finish_reason)`: what follows <think> is thought, up to a </think>; no more than max_tokens."""
    thought, content = "", text
    if text.startswith("<think>"):
        thought, _, content = text[len("<think>") :].partition("</think>")
    thoughts, words = _echo_words(thought), _echo_words(content)
    if type(most) is not int or most < 1 or len(thoughts) + len(words) <= most:
        return thoughts, words, "stop"
    return thoughts[:most], words[: max(most - len(thoughts), 0)], "length"


def _echo_usage(asked: List[str], answered: List[str]) -> Dict[str, int]:
    prompt, completion = (sum(len(text.split()) for text in texts) for texts in (asked, answered))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _EchoServe:
    """The models, the key, and who is being answered."""

    def __init__(self, options: Dict[str, str]) -> None:
        try:
            with open(options["config"], encoding="utf-8") as file:
                entries = json.load(file)["serve"]["models"]
            self.models = {alias: _EchoModel(alias, entry) for alias, entry in entries.items()}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{options['config']} is no serve config ({type(error).__name__}: {error})") from error
        self.api_key = options["api-key"]
        if "api-key-file" in options:
            with open(options["api-key-file"], encoding="utf-8") as file:
                self.api_key = file.read().strip()
            if not self.api_key:
                raise ValueError(f"the API key file {options['api-key-file']} is empty")
        self.loading = threading.Lock()  # one load at a time, as the real serve
        self.busy: Set[_EchoRequest] = set()
        # A signal makes `stop` readable, for good. To raise from a handler would lose the signal that comes
        # right before accept() blocks, or that the system hands to another thread.
        self.stop, self.stopper = socket.socketpair()
        self.stopper.setblocking(False)
        signal.set_wakeup_fd(self.stopper.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def pause(self, seconds: float) -> bool:
        """Wait, but not beyond the time to stop; return whether that has come."""
        return bool(select.select([self.stop], [], [], seconds)[0])

    def preload(self) -> None:
        wanted = [model for model in self.models.values() if model.preload]
        names = ", ".join(model.alias for model in wanted)
        _echo_log(f"Preloading {len(wanted)} model(s): {names}" if wanted else "No models configured for preload.")
        for model in wanted:
            try:
                self.load(model)
            except _EchoError as error:
                _echo_log(f'Failed to preload "{model.alias}": {model.fail or error}', stream=2)

    def load(self, model: _EchoModel) -> None:
        with self.loading:
            if model.state == "ready":
                return
            _echo_log(f'Loading model "{model.alias}" from {model.source}...')
            model.state = "loading"
            if self.pause(model.load_seconds):
                raise _EchoError(503, "model_not_ready", "The serve is stopping.")
            model.state = "error" if model.fail else "ready"
            if model.fail:
                raise _EchoError(503, "model_load_failed", f'Model "{model.alias}" failed to load: {model.fail}')
            _echo_log(f'Model "{model.alias}" loaded (echo).')

    def listen(self, host: str, port: int) -> None:
        """Accept until it is time to stop, then give the answers under way a moment."""
        host = host.strip("[]")
        family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # Where there is SO_EXCLUSIVEADDRUSE, SO_REUSEADDR would let another program take the port over.
            option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
            if self.pause(0):
                return
            listener.bind((host, port))
            listener.listen(511)  # as Node.js
            _echo_log(f"QVAC API server listening on http://{shown}:{listener.getsockname()[1]}")
            listener.setblocking(False)  # a client that is gone again must not leave us in accept()
            while self.stop not in select.select([listener, self.stop], [], [])[0]:
                try:
                    client = listener.accept()[0]
                    threading.Thread(target=self.converse, args=(client,), daemon=True).start()
                except (OSError, RuntimeError):  # out of descriptors or threads: some come back
                    self.pause(0.05)
        wait_until(lambda: not self.busy, _ECHO_LAST_WORDS, 0.01)

    def converse(self, client: socket.socket) -> None:
        """Answer what comes on one connection until either side closes it."""
        try:
            with client, client.makefile("rb") as stream:
                client.settimeout(_ECHO_KEEP_ALIVE)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self.exchange(client, stream):
                    pass
                # Closing over bytes that nobody read would reset the connection before the answer is seen.
                client.shutdown(socket.SHUT_WR)
                client.settimeout(_ECHO_LAST_WORDS)
                wait_until(lambda: not client.recv(65536), _ECHO_LAST_WORDS, 0)
        except OSError:
            pass  # the client is gone, or was silent for too long

    def exchange(self, client: socket.socket, stream: BinaryIO) -> bool:
        """Answer one request; return whether there may be another."""
        lines = _echo_head(stream)
        if not lines:
            return False
        started, request = time.monotonic(), _EchoRequest(lines)
        self.busy.add(request)
        try:
            try:
                status, answer = 200, self.handle(request, stream)
            except _EchoError as error:
                status, answer = error.status, error.body
            self.send(client, request, status, answer)
        finally:
            self.busy.discard(request)
        seconds = time.monotonic() - started
        took = f"{seconds * 1000:.0f}ms" if seconds < 1 else f"{seconds:.2f}s"
        _echo_log(f"← {status} {request.method} {request.path} ({took})")
        return request.keeps_open()

    def handle(self, request: _EchoRequest, stream: BinaryIO) -> Any:
        """The answer: a JSON object, or the events of a stream as a list."""
        if request.version != "HTTP/1.1":
            raise _EchoError(400, "bad_request", "This is not an HTTP/1.1 request.")
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise _EchoError(401, "invalid_api_key", "Invalid or missing API key.")
        _echo_log(f"→ {request.method} {request.path}")
        request.read_body(stream)
        posts = {"/v1/chat/completions": self.chat, "/v1/completions": self.complete, "/v1/embeddings": self.embed,
                 "/v1/responses": self.respond}  # fmt: skip
        if request.method == "POST" and request.path in posts:
            return posts[request.path](request.json())
        if request.method in ("GET", "HEAD") and request.path == "/v1/models":
            return {"object": "list", "data": [model.listing() for model in self.models.values()]}
        if request.method in ("GET", "HEAD") and request.path.startswith("/v1/models/"):
            return self.find(urllib.parse.unquote(request.path[len("/v1/models/") :])).listing()
        raise _EchoError(404, "not_found", f"Unknown endpoint: {request.method} {request.target}")

    def send(self, client: socket.socket, request: _EchoRequest, status: int, answer: Any) -> None:
        kept = "keep-alive" if request.keeps_open() else "close"
        head = f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nConnection: {kept}\r\n"
        if isinstance(answer, dict):
            data = json.dumps(answer).encode()
            head += f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(data)}\r\n\r\n"
            client.sendall(head.encode() + (b"" if request.method == "HEAD" else data))
            return
        head += "Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for event in answer:
            if event is None:  # the real serve says no more of a prompt that is longer than the context
                select.select([client, self.stop], [], [])
                return
            if event is not answer[0]:
                self.pause(self.models[event["model"]].token_seconds)
            data = f"data: {json.dumps(event)}\n\n".encode()
            client.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        client.sendall(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def find(self, name: str) -> _EchoModel:
        if name not in self.models:
            raise _EchoError(404, "model_not_found", f'Model "{name}" is not available. Check serve.models config.')
        return self.models[name]

    def ready_model(self, body: Dict[str, Any]) -> _EchoModel:
        """The model that the request names, loaded if it was not."""
        name = body.get("model")
        if not isinstance(name, str) or not name.strip():
            raise _EchoError(400, "missing_model", '"model" is required.')
        model = self.find(name.strip())
        if model.state != "ready":
            self.load(model)
        return model

    def chat(self, body: Dict[str, Any]) -> Any:
        messages = body.get("messages")
        if not isinstance(messages, list):
            raise _EchoError(400, "missing_messages", '"messages" must be a list.')
        model = self.ready_model(body)
        users = [one for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        thoughts, words, finish = _echo_thinking(_echo_text(users[-1]) if users else "", most)
        usage = _echo_usage([_echo_text(one) for one in messages], thoughts + words)
        overflows = 0 < model.context <= usage["prompt_tokens"]
        if not body.get("stream"):
            if overflows:
                raise _EchoError(500, "internal_error", "An internal error occurred.")
            message = {"role": "assistant", "content": "".join(words) or None}
            if thoughts:
                message["reasoning_content"] = "".join(thoughts)
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return dict(model.facts("chatcmpl", "chat.completion"), choices=[choice], usage=usage)
        facts = model.facts("chatcmpl", "chat.completion.chunk")
        deltas = [{"role": "assistant", "content": ""}, *({"reasoning_content": word} for word in thoughts),
                  *({"content": word} for word in words), {}]  # fmt: skip
        events: List[Any] = [dict(facts, choices=[{"index": 0, "delta": d, "finish_reason": None}]) for d in deltas]
        events[-1]["choices"][0]["finish_reason"] = finish
        if overflows:
            return [events[0], None]
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") is True:
            events.append(dict(facts, choices=[], usage=usage))
        return events

    def respond(self, body: Dict[str, Any]) -> Any:
        """The Responses API, whose `input` is a string or a list of messages. No reasoning, as in the real serve."""
        asked = body.get("input")
        if not isinstance(asked, (str, list)):
            raise _EchoError(400, "missing_input", '"input" must be a string or a list of messages.')
        model, text = self.ready_model(body), asked if isinstance(asked, str) else _echo_text((asked or [None])[-1])
        count = len(text.split())
        item: Dict[str, Any] = {"type": "message", "id": f"msg_{os.urandom(5).hex()}", "role": "assistant"}
        part: Dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
        begun = {**item, "status": "in_progress", "content": []}
        facts = model.facts("resp", "response")
        facts.update(created_at=facts.pop("created"), parallel_tool_calls=True, tool_choice="auto", tools=[])
        done = {**facts, "status": "completed", "output_text": text,
                "usage": {"input_tokens": count, "output_tokens": count, "total_tokens": 2 * count},
                "output": [{**item, "status": "completed", "content": [{**part, "text": text}]}]}  # fmt: skip
        if not body.get("stream"):
            return done
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        events: List[Dict[str, Any]] = [
            {"type": "response.created", "response": {**facts, "status": "in_progress", "output": []}},
            {"type": "response.output_item.added", "output_index": 0, "item": begun},
            {"type": "response.content_part.added", "part": part, **place},
            *({"type": "response.output_text.delta", "delta": word, **place} for word in _echo_words(text)),
            {"type": "response.output_text.done", "text": text, **place},
            {"type": "response.completed", "response": done},
        ]
        return [{**event, "sequence_number": number, "model": model.alias} for number, event in enumerate(events)]

    def complete(self, body: Dict[str, Any]) -> Any:
        prompts = _echo_strings(body, "prompt", "invalid_prompt")
        if body.get("stream") and len(prompts) > 1:
            raise _EchoError(400, "unsupported_streaming", "Several prompts cannot be streamed at once.")
        facts, usage = self.ready_model(body).facts("cmpl", "text_completion"), _echo_usage(prompts, prompts)

        def choice(index: int, text: str, finish: Optional[str]) -> Dict[str, Any]:
            return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}

        if not body.get("stream"):
            return dict(facts, choices=[choice(i, prompt, "stop") for i, prompt in enumerate(prompts)], usage=usage)
        events = [dict(facts, choices=[choice(0, word, None)]) for word in _echo_words(prompts[0])]
        return [*events, dict(facts, choices=[choice(0, "", "stop")], usage=usage)]

    def embed(self, body: Dict[str, Any]) -> Any:
        """Unit vectors of 32 dimensions that depend on nothing but the text."""
        texts, data = _echo_strings(body, "input", "missing_input"), []
        model, usage = self.ready_model(body), _echo_usage(texts, [])
        del usage["completion_tokens"]
        for index, text in enumerate(texts):
            raw = [byte - 127.5 for byte in hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()]
            length = sum(value * value for value in raw) ** 0.5
            data.append({"object": "embedding", "index": index, "embedding": [value / length for value in raw]})
        return {"object": "list", "data": data, "model": model.alias, "usage": usage}


# ==================================================================================================
# 14. Command line
# ==================================================================================================


EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_SERVE = 3
EXIT_NOT_EXECUTABLE = 126  # these two as a shell has them
EXIT_NOT_FOUND = 127
EXIT_SIGNAL = 128  # plus the number of the signal
EXIT_INTERRUPTED = 130

_HOLD_INTERVAL = 1.0  # seconds between two looks of a holder at its serve: a restart is repaired this soon
_WATCH_INTERVAL = 2.0  # seconds between two pictures of `ps --watch`
_FOLLOW_INTERVAL = 0.25  # seconds between two looks of `logs -f` at the file
_TOOL_TIMEOUT = 20.0  # seconds `node --version` and the like may take, on a machine that is busy
_MIN_NODE = 20  # major version that the CLI asks for
_SHORT_KEY = 8  # hex digits of a fleet key in a narrow table; more where that is ambiguous
_LOG_LINES = 100  # shown by `logs` unless told otherwise
_AGENT_CONFIG = {"ctx_size": 32768, "tools": True}
_LOW_DISK, _LITTLE_DISK = 2 * 10**9, 12 * 10**9  # bytes: room for a small model; for a middling one
_CLI_PACKAGE = "@qvac/cli"


class _CommandError(Exception):
    """Ends a command with one line on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        Exception.__init__(self, message)
        self.exit_code = exit_code


class _ReaderGone(Exception):
    """Nobody reads our stdout any more (`| head -1`): no failure, but nothing is left to do."""


class _Stopped(KeyboardInterrupt):
    """A polite signal: unwinds like Ctrl-C, and keeps its own exit code."""

    def __init__(self, signum: int) -> None:
        KeyboardInterrupt.__init__(self)
        self.signum = signum


def _usage_error(message: str) -> _CommandError:
    return _CommandError(message, EXIT_USAGE)


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command line (default: this process's own) and return its exit code."""
    words, previous = list(sys.argv[1:] if argv is None else argv), []  # type: List[str], List[Tuple[int, Any]]
    try:
        return _run_to_code(words, previous)
    finally:
        _put_handlers_back(previous)


def _run_to_code(words: List[str], previous: List[Tuple[int, Any]]) -> int:
    """The one place where an error becomes a message and an exit code. PREVIOUS takes the handlers replaced."""
    try:
        _prepare_streams()
        _install_stop_handlers(previous)
        return _dispatch(words)
    except _ReaderGone:
        _discard_stdout()
        return EXIT_DONE
    except _Stopped as stop:
        _complain(f"stopped by {_signal_name(stop.signum)}")
        return EXIT_SIGNAL + stop.signum
    except KeyboardInterrupt:
        if _is_terminal(sys.stderr):
            _err("")  # the terminal has echoed ^C
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except _CommandError as error:
        _complain(str(error))
        return error.exit_code
    except Exception as error:
        message = _expected_failure(error)
        if message is None:
            raise  # a defect of ours: the traceback is what helps
        _complain(message)
        return EXIT_FAILED


def _expected_failure(error: Exception) -> Optional[str]:
    """What a failure of the serve, the network or the disk says; None for anything else."""
    if isinstance(error, QvacManagedModeError):
        return _in_words_of_the_command_line(_one_line(str(error)))
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, http.client.HTTPException):
        return "the serve broke off its answer (%s); try again" % (error or type(error).__name__)
    return None


def _in_words_of_the_command_line(text: str) -> str:
    """What an error of the API says to do, as it is typed here."""
    for api, typed in (
        ("python -m qvac_managed", _program()), ("serve_bin_path", "--bin"), ("serve_port", "--port"),
        ("serve_host", "--host"), ("serve_start_timeout", "--start-timeout"), ("serve_idle_timeout", "--idle-timeout"),
        ('config={"ctx_size": 8192}', "--ctx-size 8192"), ("max_tokens", "--max-tokens"),
        ("give one a custom `name`", "give one an alias, as in ALIAS=NAME"),
    ):  # fmt: skip
        text = re.sub(r"(?<![\w/.-])%s(?![\w/-])" % re.escape(api), typed.replace("\\", r"\\"), text)
    return text


def _one_line(text: str) -> str:
    """An error with the output of a serve behind it, cut down to that output's last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["failed"]
    said = last_words("\n".join(lines[1:]))
    return f"{lines[0]} Its last words: {_shorten(said, 200)}" if said else lines[0]


def _dispatch(words: List[str]) -> int:
    if not words:
        raise _usage_error(f"no command; {_program()} demo shows what this does, --help lists all")
    if words[0] in ("-h", "--help", "help"):
        topic = words[1] if len(words) > 1 and words[0] == "help" else ""
        _out(_command_help(topic) if topic in _COMMANDS else _overview())
        return EXIT_DONE
    if words[0] in ("-V", "--version"):
        _out(f"qvac-managed {__version__}")
        return EXIT_DONE
    if words[0] == "__complete":
        return _complete(words[1:])
    if words[0] not in _COMMANDS:
        kind = "option" if words[0].startswith("-") else "command"
        raise _usage_error(f"no {kind} {words[0]!r}{_or_did_you_mean(words[0], _COMMANDS)} (--help lists all)")
    args = _parse(words[0], words[1:])
    if args.help:
        _out(_command_help(words[0]))
        return EXIT_DONE
    code: int = _COMMANDS[words[0]].run(args)
    return code


# What other tools call it.
_ELSEWHERE = {
    "ls": "ps", "list": "ps", "status": "ps", "rm": "stop", "kill": "stop", "down": "stop", "start": "up", "pull": "up",
    "log": "logs", "exec": "run", "show": "explain", "check": "doctor", "install": "install-cli", "ask": "chat",
}  # fmt: skip


def _or_did_you_mean(word: str, known: Any) -> str:
    close = [name for name in known if word.strip("-") and name.startswith(word)]
    close = close or [name for name in (_ELSEWHERE.get(word),) if name in known]
    close = close or difflib.get_close_matches(word, list(known), n=2, cutoff=0.7)
    return "; did you mean {}?".format(" or ".join(close)) if close else ""


# -- streams and signals


def _prepare_streams() -> None:
    # A name that the locale cannot write, or bytes that it cannot read, are no reason to crash.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _out(text: str, end: str = "\n") -> None:
    """Write to stdout now. Raise _ReaderGone if nobody is there, _CommandError if it cannot be written."""
    if sys.stdout is None:  # `>&-`
        return
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
            raise _ReaderGone() from None
        _discard_stdout()
        raise _CommandError(f"cannot write the output: {error.strerror}") from None


def _discard_stdout() -> None:
    # What is still buffered would be flushed at exit, and fail again with a traceback.
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


def _complain(message: str) -> None:
    _err(_paint("qvac-managed:", "red", sys.stderr) + " " + " ".join(message.split()))


def _note(args: Any, text: str) -> None:
    if not args.quiet:
        _err(text)


def _print_json(value: Any) -> None:
    _out(json.dumps(value, indent=2 if _is_terminal(sys.stdout) else None))


_COLOURS = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}


def _paint(text: str, colour: str, stream: Any) -> str:
    if os.environ.get("NO_COLOR") or not _is_terminal(stream):
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m" if enable_ansi(stream) else text


def _install_stop_handlers(previous: List[Tuple[int, Any]]) -> None:
    def stop(signum: int, _frame: Any) -> None:
        raise _Stopped(signum)

    for signum in stop_signals():
        # One that is ignored stays so: that is how nohup works. Only the main thread may ask for others.
        try:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous.append((signum, signal.signal(signum, stop)))
        except ValueError:
            break


def _put_handlers_back(previous: List[Tuple[int, Any]]) -> None:
    for signum, handler in previous:
        signal.signal(signum, handler)


def _signal_name(signum: int) -> str:
    return signal.Signals(signum).name


# -- arguments: a converter takes the text behind a flag; its ValueError says what to give instead


def _number(what: str, least: int, most: int = 10**9) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise ValueError("give " + what)
        return int(text)

    return convert


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise ValueError("give a number from 0, such as 0.7")
    return value


def _seconds(text: str) -> float:
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h", "d") else (text, "s")
    if not number.isascii() or not number.replace(".", "", 1).isdigit():
        raise ValueError("give seconds, or a time like 90s, 5m, 2h, 1d")
    return float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]


def _seconds_above_0(text: str) -> float:
    if _seconds(text) <= 0:
        raise ValueError("give a time above 0")
    return _seconds(text)


def _seconds_or_never(text: str) -> Optional[float]:
    try:
        return None if text == "never" else _seconds(text)
    except ValueError as error:
        raise ValueError(f"{error}, or never") from None


def _setting(text: str) -> Tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError("write it as KEY=VALUE, like ctx_size=8192")
    try:
        return key, json.loads(value, parse_constant=str)
    except (ValueError, RecursionError):
        return key, value


def _specs(flag: str, text: str) -> List[Any]:
    source, where = text, flag
    if not text.lstrip().startswith(("[", "{")):
        where = f"{flag} {text}"
        try:
            with open(text, encoding="utf-8") as file:
                source = file.read()
        except (OSError, ValueError) as error:
            raise _usage_error("{}: {}".format(where, getattr(error, "strerror", None) or error)) from None
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _usage_error(f"{where} is not JSON: {error}") from None
    if not isinstance(value, (dict, list)):
        raise _usage_error(f"{where}: one model spec, or a list of them")
    return value if isinstance(value, list) else [value]


def _package_version(text: str) -> str:
    # It becomes part of what npm installs: a URL, a path or an option has no business there.
    if not text or not all(c.isalnum() or c in ".-+" for c in text) or text[0] in ".-+":
        raise ValueError("give a version like 0.13.1, or latest")
    return text


def _shell(text: str) -> str:
    if text not in _SHELLS:
        raise ValueError("give one of " + ", ".join(_SHELLS))
    return text


_SHELLS = ("sh", "bash", "zsh", "fish", "powershell", "cmd")

# name: flags, what its value is called ("" for a switch), converter, default ([]: may be repeated), help
_FLAGS: Dict[str, Tuple[str, str, Optional[Callable[[str], Any]], Any, str]] = {
    "ctx_size": ("--ctx-size", "N", _number("a whole number above 0", 1), None, "context length in tokens"),
    "set": ("--set", "KEY=VALUE", _setting, [], "one config value, JSON or text; may be repeated"),
    "agent": ("--agent", "", None, False, "for coding agents: ctx_size 32768, tools true"),
    "spec": ("--spec", "JSON|FILE", lambda text: _specs("--spec", text), [], "models as JSON: one spec, or a list of them"),
    "echo": ("--echo", "", None, False, "the built-in echo serve: no Node.js, no model"),
    "bin": ("--bin", "PATH", None, None, "the qvac command to use (default: found)"),
    "host": ("--host", "ADDRESS", None, DEFAULT_HOST, f"address to listen on (default {DEFAULT_HOST})"),
    "port": ("--port", "N", _number("a port between 1 and 65535", 1, 65535), None, "port to listen on (default: any free one)"),
    "private": ("--private", "", None, False, "a serve of one's own, shared with nobody"),
    "idle_timeout": ("--idle-timeout", "T", _seconds_or_never, DEFAULT_IDLE_TIMEOUT,
                     "90s, 2h or never after the last use (default 5m)"),
    "start_timeout": ("--start-timeout", "T", _seconds_above_0, DEFAULT_START_TIMEOUT,
                      "give up a start that stands still (default 3m)"),
    "json": ("--json", "", None, False, "print JSON"),
    "quiet": ("-q --quiet", "", None, False, "no progress and no notes on stderr"),
    "shell": ("--shell", "NAME", _shell, None, "sh, bash, zsh, fish, powershell or cmd"),
    "watch": ("-w --watch", "", None, False, "draw it again every 2 seconds, until Ctrl-C"),
    "all": ("--all", "", None, False, "every serve"),
    "lines": ("-n --lines", "N", _number("a whole number from 0", 0), _LOG_LINES, f"how many lines (default {_LOG_LINES})"),
    "follow": ("-f --follow", "", None, False, "go on with what is added, until Ctrl-C"),
    "endpoint": ("--endpoint", "NAME", None, None, "only models for this endpoint, like chat"),
    "system": ("--system", "TEXT", None, None, "the system message"),
    "temperature": ("--temperature", "T", _temperature, None, "how freely it chooses its words; 0: not at all"),
    "max_tokens": ("--max-tokens", "N", _number("a whole number above 0", 1), None, "the longest answer, with what it thinks"),
    "no_think": ("--no-think", "", None, False, "do not show what the model thinks"),
    "stats": ("--stats", "", None, False, "say tokens per second afterwards, on stderr"),
    "fix": ("--fix", "", None, False, "remove what is stale, put file modes right"),
    "version": ("--version", "V", _package_version, "latest", "which version (default latest)"),
}

_START = "ctx_size set agent spec echo bin host port private idle_timeout start_timeout "  # what a serve is started with
_Command = namedtuple("_Command", ["run", "words", "most", "flags", "about", "examples"])
_COMMANDS: Dict[str, _Command] = {}


def _command(words: str, most: Optional[int], flags: str, about: str, *examples: str) -> Any:
    """Make `_do_NAME` a command: its words as in the usage line, how many it takes at most, its flags and help."""

    def register(run: Callable[[Any], int]) -> Any:
        name = run.__name__[len("_do_") :].replace("_", "-")
        _COMMANDS[name] = _Command(run, words, most, flags.split(), about, examples)
        return run

    return register


def _parse(name: str, words: List[str]) -> Any:
    """The flags of one command, with `.words` (what is no flag) and `.tail` (what follows `--`, or None)."""
    command, left = _COMMANDS[name], list(words)
    known = {flag: key for key in command.flags for flag in _FLAGS[key][0].split()}
    args = types.SimpleNamespace(command=name, typed=words, words=[], tail=None, help=False)
    vars(args).update((key, default) for key, (_f, _v, _c, default, _h) in _FLAGS.items())
    while left:
        word = left.pop(0)
        if word == "--":
            args.tail, left = left, []
            args.words += [] if name == "run" else args.tail
        elif word in ("-h", "--help"):
            args.help = True
        elif word.startswith("-") and word != "-":
            _take_flag(args, known, word, left)
        else:
            args.words.append(word)
    if not args.help and command.most is not None and len(args.words) > command.most:
        raise _usage_error(f"{name}: {args.words[command.most]!r} is too much; see {name} --help")
    return args


def _take_flag(args: Any, known: Mapping[str, str], word: str, left: List[str]) -> None:
    flag, given, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
    if flag not in known:
        raise _usage_error(f"{args.command}: no option {word}{_or_did_you_mean(word, known)}")
    key = known[flag]
    flags, takes, convert, default, _help = _FLAGS[key]
    long_name = flags.split()[-1]
    if not takes:
        if given and flag == long_name:
            raise _usage_error(f"{args.command}: {flag} takes no value")
        left[:0] = ["-" + value] if given else []  # several short ones in a word
        return setattr(args, key, True)
    if not given:
        if not left:
            raise _usage_error(f"{args.command}: {flag}: expected one argument")
        value = left.pop(0)
    try:
        value = convert(value) if convert else value
    except ValueError as error:
        raise _usage_error(f"{long_name} {value}: {error}") from None
    setattr(args, key, [*getattr(args, key), value] if default == [] else value)


def _is_model_file(text: str) -> bool:
    return "://" in text or "/" in text or os.sep in text or text.endswith(".gguf")


def _model_spec(text: str, config: Dict[str, Any]) -> Any:
    """What a MODEL word asks for, as `create_qvac` takes it."""
    alias, equals, name = text.partition("=")
    if not equals or _is_model_file(alias):
        alias, equals, name = "", "", text
    if not name.strip() or (equals and not alias.strip()):
        raise _usage_error(f"{text!r} is no model: give NAME, ALIAS=NAME or ALIAS=/path/model.gguf")
    if _is_model_file(name) and not equals:
        stem = os.path.splitext(os.path.basename(name))[0] or "mine"
        raise _usage_error(f"a model file needs a name to be asked for by: write {stem}={name}")
    if _is_model_file(name):
        spec: Dict[str, Any] = {"name": alias, "src": _model_source(name)}
    else:
        spec = {"name": alias, "model": name} if equals else {"name": name}
    if config:
        spec["config"] = dict(config)
    return spec


def _model_source(name: str) -> str:
    if "://" in name:
        return name
    path = os.path.abspath(os.path.expanduser(name))
    if os.path.isdir(path):
        raise _CommandError(f"{path} is a folder; give the model file in it")
    if not os.path.exists(path):
        raise _CommandError(f"{path}: there is no such model file")
    return path


def _models(args: Any, words: Sequence[str]) -> List[Any]:
    config: Dict[str, Any] = dict(_AGENT_CONFIG) if args.agent else {}
    if args.ctx_size is not None:
        config["ctx_size"] = args.ctx_size
    config.update(args.set or [])
    specs = [spec for group in args.spec or [] for spec in group]
    if config and not words:
        raise _usage_error("--ctx-size, --set and --agent are for a MODEL; a --spec has its own \"config\"")
    if not words and not specs:
        raise _usage_error(f"{args.command}: name a model, like {_sample_model()}; `models` lists them")
    return [_model_spec(word, config) for word in words] + specs


def _sample_model() -> str:
    name: str = QVAC_CATALOG[0].id
    return name


def _serve_bin_path(args: Any) -> Optional[str]:
    if args.echo and args.bin:
        raise _usage_error("--echo and --bin exclude each other")
    path: Optional[str] = args.bin
    if path and (os.sep in path or "/" in path):
        return os.path.abspath(os.path.expanduser(path))
    return ECHO if args.echo else path


def _attach(args: Any, words: Sequence[str]) -> ManagedQvac:
    """Attach to the serve that the arguments ask for, or start it, with progress on stderr."""
    options: Dict[str, Any] = {
        "models": _models(args, words),
        "serve_host": args.host,
        "serve_port": args.port,
        "serve_bin_path": _serve_bin_path(args),
        "serve_idle_timeout": args.idle_timeout,
        "serve_start_timeout": args.start_timeout,
        # Not left open: for the API a pinned port means a private serve, but `up --port N` must outlive `up`.
        "reuse": not args.private,
    }
    progress = _ProgressLine(args.quiet)
    try:
        client: ManagedQvac = create_qvac("managed", on_progress=progress, **options)
    except ServeExitedError as error:
        progress.clear()
        said = _in_words_of_the_command_line(_one_line(str(error)))
        raise _CommandError(f"{said} (all of them: {_program()} logs {_key(args, words)})") from None
    finally:
        progress.clear()
        progress.quiet = True  # a later recovery must not draw into an answer, or another program's screen
    return client


def _key(args: Any, words: Sequence[str]) -> str:
    """The fleet key that the arguments make."""
    bin_path = _serve_bin_path(args)
    config = synthesize_serve_config(_models(args, words), bin_path)
    return compute_fleet_key(config, args.host, serve_bin_path=bin_path, serve_port=args.port)


def _refuse_private(args: Any) -> None:
    if args.private:
        raise _usage_error(f"{args.command}: a private serve ends with its owner; use serve or run")


# -- tables


def _table(rows: List[List[str]], flexible: int, width: int, right: Sequence[int] = ()) -> List[str]:
    """ROWS, the heading first, aligned; the column FLEXIBLE gives way where WIDTH (0: any) is too little."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    if width and excess > 0:
        widths[flexible] = max(len(rows[0][flexible]), widths[flexible] - excess)
    lines = []
    for row in rows:
        cells = [_clip(cell, widths[i]) for i, cell in enumerate(row)]
        padded = (c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(cells))
        lines.append("  ".join(padded).rstrip())
    return lines


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


# -- serve, up, run, env


@_command(
    "MODEL...", None, _START + "json quiet",
    "Start or attach to a serve, print its URL, hold it till Ctrl-C.\n"
    "SIGTERM detaches and exits with 0, Ctrl-C with 130.",
    "serve qwen3.5-9b", "serve gpt-4o-mini=qwen3.5-9b --ctx-size 8192 --port 11434")  # fmt: skip
def _do_serve(args: Any) -> int:
    with _attach(args, args.words) as client:
        try:
            _announce(args, client)
            _note(args, "Ctrl-C detaches")
            _hold(args, client)
        except _Stopped as stop:
            # Ended by its supervisor, as it should be: systemd and docker take 143 for a failure.
            if _signal_name(stop.signum) == "SIGTERM":
                return EXIT_DONE
            raise
    return EXIT_DONE


def _hold(args: Any, client: ManagedQvac) -> None:
    url = client.base_url
    while True:
        time.sleep(_HOLD_INTERVAL)
        client.ensure()
        if client.base_url != url:
            url = client.base_url
            _note(args, f"the serve was lost; another one is at {url}")


def _announce(args: Any, client: ManagedQvac) -> None:
    how = "attached to the running serve" if client.reused else "started a serve"
    _note(args, f"{how} (key {client.fleet_key}, pid {client.pid})")
    if args.json:
        _print_json(serve_info(client).as_dict())
    else:
        _out(client.base_url)


@_command(
    "MODEL...", None, _START + "json quiet",
    "Start or attach to a serve, print its URL, return.\n"
    "It lives while it is used, and for the idle timeout after that.",
    "up qwen3.5-9b", "up qwen3.5-9b --idle-timeout 2h", "up tiny=./tiny.gguf --set device=cpu")  # fmt: skip
def _do_up(args: Any) -> int:
    _refuse_private(args)
    with _attach(args, args.words) as client:
        _announce(args, client)
        _note_longer_life(args, client)
    return EXIT_DONE


def _note_longer_life(args: Any, client: ManagedQvac) -> None:
    record, wish = read_record(client.fleet_key), args.idle_timeout
    if not any(word.startswith("--idle-timeout") for word in args.typed):
        return
    if record is not None and wish is not None and wish * 1000 < record.idle_timeout_ms:
        is_for_ever = record.idle_timeout_ms >= NEVER_MS
        kept = "stays until it is stopped" if is_for_ever else f"keeps its {_span(record.idle_timeout_ms / 1000)}"
        _note(args, f"somebody asked for a longer idle timeout: it {kept}")


@_command(
    "MODEL...", None, "shell " + _START + "json quiet",
    "Start or attach to a serve, print its variables for a shell.",
    'eval "$(PROGRAM env qwen3.5-9b)"', "env --shell fish qwen3.5-9b | source")  # fmt: skip
def _do_env(args: Any) -> int:
    _refuse_private(args)
    with _attach(args, args.words) as client:
        variables = client.environ()
    if args.json:
        _print_json(variables)
        return EXIT_DONE
    shell = args.shell or default_env_shell()
    for name, value in variables.items():
        _out(_assignment(shell, name, value))
    if _is_terminal(sys.stdout):
        command = " ".join([_program(), "env", *map(shlex.quote, args.typed)])
        _note(args, "# to set them in this shell: " + _eval_hint(shell, command))
    return EXIT_DONE


def _assignment(shell: str, name: str, value: str) -> str:
    """A line that sets a variable to exactly VALUE in SHELL."""
    if shell == "fish":
        return f"set -gx {name} {_quote_for_fish(value)}"
    if shell == "powershell":
        return "$env:{} = '{}'".format(name, value.replace("'", "''"))
    if shell == "cmd":
        return f'set "{name}={value}"'
    return f"export {name}={_quote_for_sh(value)}"


def _quote_for_sh(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _quote_for_fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _eval_hint(shell: str, command: str) -> str:
    return {
        "fish": f"{command} --shell fish | source",
        "powershell": f"{command} --shell powershell | Invoke-Expression",
        "cmd": f"for /f \"delims=\" %i in ('{command} --shell cmd') do @%i",
    }.get(shell, f'eval "$({command})"')


@_command(
    "MODEL... -- COMMAND...", None, _START + "quiet",
    "Run a command, and hold a serve for as long as it runs.\n"
    "The command finds it in OPENAI_BASE_URL, OPENAI_API_KEY, QVAC_BASE_URL...\n"
    "Exit code: the command's, 128+n for signal n, 127 if there is no such command.",
    "run --agent qwen3.5-9b -- aider", "run tiny=./tiny.gguf -- python app.py")  # fmt: skip
def _do_run(args: Any) -> int:
    if not args.tail:
        raise _usage_error(f"run: put the command after --, like: run {_sample_model()} -- aider")
    _models(args, args.words)  # what is wrong with the words comes before what is wrong with the command
    _refuse_command(args.tail[0])
    with _attach(args, args.words) as client:
        try:
            return run_instead(args.tail, dict(os.environ, **client.environ()))
        except OSError as error:
            code = EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_NOT_EXECUTABLE
            raise _CommandError(f"{args.tail[0]}: {error.strerror}", code) from None


def _refuse_command(name: str) -> None:
    # Before anything is started: a typing error must not load a model.
    if shutil.which(name):
        return
    folders = [""] if os.path.dirname(name) else os.environ.get("PATH", os.defpath).split(os.pathsep)
    for folder in folders:
        path = os.path.join(folder, name)
        if name and os.path.isfile(path):
            raise _CommandError(f"{path}: not executable; try chmod +x", EXIT_NOT_EXECUTABLE)
        if name and os.path.isdir(path) and folder == "":
            raise _CommandError(f"{path}: a folder, not a command", EXIT_NOT_EXECUTABLE)
    raise _CommandError("%s: command not found" % (name or "''"), EXIT_NOT_FOUND)


# -- ps, stop, logs


@_command(
    "", 0, "watch json quiet",
    "List every serve with its state, models, users and times.\n"
    "A model that is not loaded has its state behind it. IDLE/LEFT: how long the\n"
    "serve stays when unused, and what is left of that. MEM: serve and worker.",
    "ps", "ps --watch", "ps --json")  # fmt: skip
def _do_ps(args: Any) -> int:
    if not args.watch:
        _show_serves(args)
        return EXIT_DONE
    redraw = _is_terminal(sys.stdout) and enable_ansi(sys.stdout) and not args.json
    while True:
        _show_serves(args, redraw)
        time.sleep(_WATCH_INTERVAL)


def _show_serves(args: Any, redraw: bool = False) -> None:
    serves = list_serves()
    if args.json:
        _print_json([serve.as_dict() for serve in serves])
        return
    lines = _serve_lines(serves, _columns(sys.stdout))
    if redraw:
        # Home, clear to the end of each line and of the screen: no flicker, as nothing is blanked first.
        _out("\033[H" + "".join(line + "\033[K\n" for line in lines[: _rows() - 1]) + "\033[J", end="")
    elif serves or args.watch:
        _out("\n".join(lines))
    else:
        _note(args, f"no serve is running; start one: {_program()} up {_sample_model()}")


def _rows() -> int:
    return max(shutil.get_terminal_size().lines, 3)


def _serve_lines(serves: Sequence[ServeInfo], width: int) -> List[str]:
    """The table of `ps`: as much of it as WIDTH takes (0: all)."""
    keys = [serve.fleet_key for serve in serves]
    full = [["KEY", "STATE", "MODELS", "PORT", "PID", "USERS", "CONNS", "UP", "IDLE/LEFT", "MEM"]]
    full += [_serve_row(serve, serve.fleet_key) for serve in serves]
    wide = _table(full, 2, 0)
    if width and max(len(line) for line in wide) > width:
        short = [[cell for i, cell in enumerate(row) if i not in (4, 6)] for row in full]
        for row, key in zip(short[1:], keys):
            row[0] = _short_key(key, keys)
        wide = _table(short, 2, width)
    return [_paint(wide[0], "bold", sys.stdout), *map(_paint_state, serves, wide[1:])]


def _serve_row(serve: ServeInfo, key: str) -> List[str]:
    is_known = serve.idle_timeout_s is not None or serve.state == "starting"
    idle = _span(serve.idle_timeout_s) if is_known else "never"
    left = "" if serve.time_left_s is None else "/" + _span(serve.time_left_s)
    cells = [key, serve.state, _model_list(serve), serve.port, serve.pid, serve.consumers, serve.connections]
    return ["-" if cell is None else str(cell) for cell in cells] + [
        _span(serve.uptime_s),
        idle + left,
        _size(serve.rss_bytes),
    ]


def _model_list(serve: ServeInfo) -> str:
    """Aliases; one that is not loaded has its state behind it."""
    words = []
    for model in serve.models or []:
        state = model.get("state")
        words.append(model["id"] if state in (None, "ready", "unknown") else "{}({})".format(model["id"], state))
    return ",".join(words) or "-"


def _paint_state(serve: ServeInfo, line: str) -> str:
    colours = {"ready": "green", "starting": "yellow", "restarting": "yellow", "foreign": "dim"}
    painted = _paint(serve.state, colours.get(serve.state, "red"), sys.stdout)
    return line.replace(" " + serve.state, " " + painted, 1)


def _short_key(key: str, keys: Sequence[str]) -> str:
    """As little of KEY as `stop` and `logs` can tell from the other KEYS."""
    if is_private_key(key):
        return "priv-" + key.rsplit("-", 1)[1]
    for length in range(_SHORT_KEY, len(key)):
        if sum(other.startswith(key[:length]) and not is_private_key(other) for other in keys) == 1:
            return key[:length]
    return key


def _named_keys(text: str, aliases: Mapping[str, Sequence[str]]) -> List[str]:
    """The keys of ALIASES (key: its models' names) that TEXT, a key, part of one, or a model, stands for."""
    if text in aliases:
        return [text]
    for fits in (_is_short_for, lambda word, key: word in aliases[key]):
        found = [key for key in aliases if fits(text, key)]
        if found:
            return found
    return []


def _is_short_for(text: str, key: str) -> bool:
    if is_private_key(key):
        return (key.startswith(text) and "-" in text) or text == "priv-" + key.rsplit("-", 1)[1]
    return text != "" and key.startswith(text)


def _one_key(text: str, aliases: Mapping[str, Sequence[str]]) -> str:
    found = _named_keys(text, aliases)
    if len(found) > 1:
        what = "give more of the key" if _is_short_for(text, found[0]) else "give one of these keys"
        raise _CommandError(f"{text} could be any of {', '.join(sorted(found))}; {what}")
    if not found:
        known = _some(sorted(aliases)) or "none is running"
        raise _CommandError(f"no serve {text!r} (known: {known}); see {_program()} ps", EXIT_NO_SERVE)
    return found[0]


def _aliases_by_key(*more: str) -> Dict[str, List[str]]:
    """The serves on disk, also those that just start, and the names they answer to, without asking them.

    MORE are endings of other files that a key is to be found by, like `.log`.
    """
    keys = (name.rpartition(".") for name in sorted(_listdir(managed_serves_dir())))
    found = [key for key, dot, ending in keys if dot + ending in (".json", ".lock", *more) and is_valid_fleet_key(key)]
    logged = _logged_models if ".log" in more else lambda _key: []
    return {key: sorted(_record_models(read_record(key)) or _starting_models(key) or logged(key)) for key in found}


@_command(
    "KEY|MODEL...", None, "all json quiet",
    "Stop serves now, whoever uses them; returns when they are gone.\n"
    "A key may be cut short. Exit code 3: no such serve.",
    "stop qwen3.5-9b", "stop ff42c973", "stop --all")  # fmt: skip
def _do_stop(args: Any) -> int:
    if args.words and args.all:
        raise _usage_error("stop: name serves, or say --all, not both")
    if not args.words and not args.all:
        raise _usage_error(f"stop: name a serve by key or model, or say --all; see {_program()} ps")
    aliases = _aliases_by_key()
    keys, missing = (list(aliases), None) if args.all else _stop_targets(args.words, aliases)
    failure: Optional[Exception] = missing
    results = []
    for key in keys:
        try:
            results.append({"fleet_key": key, "stopped": stop_serve(key)})
        except QvacManagedModeError as error:
            failure = failure or error  # the others are stopped all the same
            continue
        if not args.json:
            _out("{} {}".format("stopped" if results[-1]["stopped"] else "was gone already:", key))
    if args.json:
        _print_json(results)
    elif not keys and failure is None:
        _note(args, "no serve is running")
    if failure is not None:
        raise failure
    return EXIT_DONE


def _stop_targets(
    words: Sequence[str], aliases: Mapping[str, Sequence[str]]
) -> Tuple[List[str], Optional[_CommandError]]:
    """The keys to stop, and the first word that names none: that one is said after the others are stopped."""
    keys: List[str] = []
    missing = None
    for word in words:
        try:
            key = _one_key(word, aliases)
            keys += [key] if key not in keys else []
        except _CommandError as error:
            missing = missing or error
    return keys, missing


@_command(
    "KEY|MODEL", 1, "lines follow",
    "Show what a serve printed; also that of one which is gone.",
    "logs qwen3.5-9b", "logs -n 20 -f ff42c973")  # fmt: skip
def _do_logs(args: Any) -> int:
    if not args.words:
        raise _usage_error(f"logs: name a serve by key or model; see {_program()} ps")
    key = _key_of_log(args.words[0])
    path = log_path(key)
    if not os.path.exists(path):
        raise _CommandError(f"{key} keeps no log: the JavaScript provider started it")
    log = _LogReader(path)
    log.copy_last_lines(args.lines)
    if args.follow and not os.path.exists(record_path(key)) and not os.path.exists(lock_path(key)):
        _note(args, "(this serve has ended; waiting for the next with its key, Ctrl-C ends)")
    while args.follow:
        time.sleep(_FOLLOW_INTERVAL)
        log.copy_growth()
    return EXIT_DONE


def _key_of_log(word: str) -> str:
    """The key of a serve that is there, or of the last one that WORD stands for: its log outlives it."""
    running = _aliases_by_key()
    if _named_keys(word, running):
        return _one_key(word, running)
    past = _aliases_by_key(".log")
    by_model = [key for key in past if word in past[key]]
    if by_model:
        return max(by_model, key=lambda key: os.stat(log_path(key)).st_mtime)
    return _one_key(word, past)


def _logged_models(key: str) -> List[str]:
    """The models of the last start in a log, as its runner has noted them."""
    try:
        with open(log_path(key), "rb") as file:
            lines = [line for line in file.read(MAX_LOG_BYTES).split(b"\n") if line.startswith(b"[qvac_managed ")]
    except OSError:
        return []
    for line in reversed(lines):
        names = _strict_json(line.partition(LOGGED_MODELS.encode())[2])
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return []


class _LogReader:
    """Copies a log to stdout, and goes on with it when its runner cuts it or another file takes its place."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.inode = 0
        self.position = 0
        self.last = b""  # the end of what was copied: found again in a log that was cut, copying goes on there

    def copy_last_lines(self, count: int) -> None:
        with open(self.path, "rb") as file:
            data = file.read()
            self.inode = os.fstat(file.fileno()).st_ino
        lines = data.splitlines(True)
        _out_bytes(b"".join(lines[max(len(lines) - count, 0) :]))
        self._note(data)

    def copy_growth(self) -> None:
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size < self.position or status.st_ino != self.inode:
                    self.inode, self.position = status.st_ino, 0
                file.seek(self.position)
                data = file.read()
        except FileNotFoundError:
            return  # being replaced, or swept
        if data:
            known = data.rfind(self.last) if self.position == 0 and self.last else -1
            _out_bytes(data[known + len(self.last) :] if known >= 0 else data)
            self._note(data)

    def _note(self, data: bytes) -> None:
        self.position += len(data)
        self.last = (self.last + data)[-4096:]


def _out_bytes(data: bytes) -> None:
    # A log is bytes: a character cut in half at the end of a piece must not be mangled on the way.
    if sys.stdout is None or not hasattr(sys.stdout, "buffer"):
        _out(data.decode("utf-8", "replace"), end="")
        return
    try:
        sys.stdout.buffer.write(data)
    except BrokenPipeError:
        raise _ReaderGone() from None
    _out("", end="")


# -- models, chat


@_command(
    "[PATTERN]", 1, "endpoint json quiet",
    "List the models that can be named, with their sizes.\n"
    "PATTERN is part of a name, or has * and ? in it.",
    "models", "models qwen3", "models --endpoint embedding")  # fmt: skip
def _do_models(args: Any) -> int:
    pattern = args.words[0] if args.words else ""
    rows = [row for row in _model_rows() if _model_fits(row, pattern, args.endpoint)]
    if args.json:
        _print_json(rows)
        return EXIT_DONE
    endpoints = {row["endpoint"] for row in _model_rows() if row["endpoint"]}
    if args.endpoint and args.endpoint.lower() not in endpoints:
        raise _usage_error(f"--endpoint {args.endpoint}: give one of {', '.join(sorted(endpoints))}")
    if not rows:
        close = close_matches(pattern) if pattern else []
        hint = "; did you mean {}?".format(" or ".join(close[:3])) if close else ""
        raise _CommandError("no model fits {}{}".format(pattern or f"--endpoint {args.endpoint}", hint))
    shown = rows
    if _is_terminal(sys.stdout) and not pattern and not args.endpoint:
        shown = [row for row in rows if row["catalog_id"]]  # the constants would push them off the screen
    _print_models(shown)
    if len(shown) < len(rows):
        hidden = len(rows) - len(shown)
        _note(args, f"and {hidden} constants: give a PATTERN, an --endpoint, or pipe this into a pager")
    return EXIT_DONE


def _model_rows() -> List[Dict[str, Any]]:
    """Every model that can be asked for, the catalog ids first."""
    table = {info.name: info for info in all_models()}
    names = [(entry.id, entry.constant) for entry in QVAC_CATALOG] + [("", name) for name in sorted(table)]
    rows = []
    for catalog_id, constant in names:
        info = table.get(constant)
        row: Dict[str, Any] = {"name": catalog_id or constant, "constant": constant}
        row["catalog_id"] = catalog_id or None
        row["endpoint"] = info.endpoint if info else None
        row["size_bytes"] = info.size if info else None
        rows.append(row)
    return rows


def _model_fits(row: Dict[str, Any], pattern: str, endpoint: Optional[str]) -> bool:
    if endpoint and (row["endpoint"] or "").lower() != endpoint.lower():
        return False
    glob = pattern.lower() if any(c in pattern for c in "*?[") else f"*{pattern.lower()}*"
    return any(fnmatch.fnmatchcase((row[key] or "").lower(), glob) for key in ("name", "constant"))


def _print_models(rows: List[Dict[str, Any]]) -> None:
    lines = [["NAME", "ENDPOINT", "SIZE"]]
    lines += [[row["name"], row["endpoint"] or "-", _size(row["size_bytes"])] for row in rows]
    text = _table(lines, 0, _columns(sys.stdout), right=(2,))
    _out("\n".join([_paint(text[0], "bold", sys.stdout), *text[1:]]))


@_command(
    "MODEL [PROMPT]", None, "system temperature max_tokens no_think stats " + _START + "json quiet",
    "Answer one prompt, or hold a conversation.\n"
    "Text on standard input is the prompt, or is added to PROMPT. Other users can\n"
    "read PROMPT in the list of processes, standard input not.",
    "chat qwen3.5-9b 'Why is the sky blue?'", "git diff | PROGRAM chat qwen3.5-9b 'Review this.'")  # fmt: skip
def _do_chat(args: Any) -> int:
    words = list(args.words)
    models = [] if args.spec else words[:1]
    prompt = " ".join(word for word in words[len(models) :] if word != "-")
    is_asked = len(words) > len(models) or not _is_terminal(sys.stdin)
    if "-" in words[len(models) :] or not _is_terminal(sys.stdin):
        prompt = "\n\n".join(text for text in (prompt, _read_stdin(args)) if text.strip())
    if is_asked and not prompt.strip():
        raise _usage_error("chat: the prompt is empty")
    if not is_asked and args.json:
        raise _usage_error("chat: --json is for one PROMPT, not for a conversation")
    with _attach(args, models) as client:
        conversation = _Conversation(args, client)
        if not is_asked:
            return conversation.hold()
        _answer(args, client, [*conversation.system, {"role": "user", "content": prompt}])
    return EXIT_DONE


def _read_stdin(args: Any) -> str:
    """All of it. Whoever has given a pipe that nobody ends is told what is waited for."""
    waiting = threading.Timer(3.0, _note, (args, "waiting for the end of standard input (</dev/null if there is none)"))
    waiting.daemon = True
    waiting.start()
    try:
        return sys.stdin.read() if sys.stdin else ""
    finally:
        waiting.cancel()


def _answer(args: Any, client: Any, messages: List[Dict[str, str]]) -> Answer:
    """Stream one answer to stdout and return it; Ctrl-C ends it early, in a conversation only."""
    began, first, pieces = time.monotonic(), 0.0, 0
    asked = {name: getattr(args, name) for name in ("temperature", "max_tokens") if getattr(args, name) is not None}
    thoughts = _Thoughts(args)
    last = "\n"
    with client.stream_chat(messages, reasoning=True, **asked) as stream:
        try:
            for piece in stream:
                first, pieces = first or time.monotonic(), pieces + 1
                if piece.kind == "reasoning":
                    thoughts.show(piece)
                    continue
                thoughts.end()
                if not args.json:
                    last = piece
                    _out(_printable(piece, sys.stdout), end="")
        finally:
            thoughts.end()
            if not last.endswith("\n"):
                _out("")
    answer: Answer = stream.answer
    stats = _answer_stats(answer.usage.get("completion_tokens") or pieces, began, first or began)
    if args.json:
        _print_json({"content": answer, "reasoning": answer.reasoning, "finish_reason": answer.finish_reason,
                     "model": answer.model, "usage": answer.usage, **stats})  # fmt: skip
    if args.stats:
        _err(_stats_line(stats))
    if answer.finish_reason == "length":
        flag = "--max-tokens" if stream._reading.limit() == "max_tokens" else "--ctx-size"
        _note(args, f"(cut short: a higher {flag} lets the answer go on)")
    elif not answer.strip():
        _note(args, "(the model said nothing)")
    return answer


class _Thoughts:
    """What a model thinks, on stderr: dim where there are colours, else how long it took."""

    def __init__(self, args: Any) -> None:
        self.shown = not (args.no_think or args.quiet or args.json)
        self.dim = _paint("x", "dim", sys.stderr) != "x"
        self.began = 0.0

    def show(self, piece: str) -> None:
        if self.shown and not self.began and not self.dim:
            _err("thinking", end="")
        self.began = self.began or time.monotonic()
        if self.shown and self.dim:
            _err(_paint(_printable(piece, sys.stderr), "dim", sys.stderr), end="")

    def end(self) -> None:
        if self.shown and self.began:
            _err("" if self.dim else f" {time.monotonic() - self.began:.0f} s")
        self.began = 0.0


def _printable(text: str, stream: Any) -> str:
    """TEXT without what a terminal would take for a command: a model may say anything."""
    if not _is_terminal(stream):
        return text
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c < "\xa0"))


def _answer_stats(tokens: int, began: float, first: float) -> Dict[str, Any]:
    # The first token has waited for the whole prompt, so the rate leaves it out.
    spent = time.monotonic() - first
    rate = (tokens - 1) / spent if tokens > 1 and spent > 0 else None
    first_s = round(first - began, 3)
    return {"tokens": tokens, "first_token_s": first_s, "tokens_per_s": rate and round(rate, 1)}


def _stats_line(stats: Dict[str, Any]) -> str:
    rate = "-" if stats["tokens_per_s"] is None else "{:.1f}".format(stats["tokens_per_s"])
    return f"{stats['tokens']} tokens, the first after {stats['first_token_s']:.2f} s, {rate} tokens/s"


_CHAT_HELP = """\
/clear         forget what was said
/system TEXT   the system message from now on; without TEXT, none
/stats         say tokens per second after each answer, or stop saying it
/bye           leave; so do exit, quit and Ctrl-D
\"""            begins and ends a prompt of several lines; a paste is one prompt anyway
Ctrl-C cuts an answer short."""


class _Conversation:
    """The turns of a conversation, each with what it takes of the context; the oldest go when that is full."""

    def __init__(self, args: Any, client: Any) -> None:
        self.args, self.client = args, client
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.turns: List[Tuple[Dict[str, str], Dict[str, str], int]] = []  # (prompt, answer, tokens)
        self.context: Optional[int] = None

    def hold(self) -> int:
        model = self.client._model(None)
        self.context = self.client._context(model)
        size = f", {self.context:,} tokens of context (--ctx-size)" if self.context else ""
        _note(self.args, f"{model}{size}; /help lists the commands")
        while True:
            try:
                prompt = _read_prompt()
            except _Stopped:
                raise
            except KeyboardInterrupt:
                _err("\n(/bye or Ctrl-D ends)")
                continue
            if prompt is None or prompt.strip() in ("/bye", "exit", "quit"):
                return EXIT_DONE
            if re.match(r"/\w+(\s|$)", prompt):
                self.obey(*(prompt.split(None, 1) + [""])[:2])
            elif prompt.strip():
                self.take_turn(prompt)

    def obey(self, command: str, text: str) -> None:
        if command == "/clear":
            self.turns = []
        elif command == "/system":
            self.system = [{"role": "system", "content": text.strip()}] if text.strip() else []
        elif command == "/stats":
            self.args.stats = not self.args.stats
        else:
            _err(_CHAT_HELP if command == "/help" else f"there is no {command}; /help lists the commands")

    def take_turn(self, prompt: str) -> None:
        asked = {"role": "user", "content": prompt}
        self.make_room(prompt)
        while True:
            messages = [*self.system, *(message for turn in self.turns for message in turn[:2]), asked]
            try:
                answer = _answer(self.args, self.client, messages)
            except _Stopped:
                raise
            except KeyboardInterrupt:
                return _err("(cut short)")
            except AnswerCutShortError as error:
                if error.limit != "ctx_size" or not self.turns:
                    return _complain(str(_expected_failure(error)))
                self.leave_out((len(self.turns) + 1) // 2)  # the count was wrong: be quick about it
                continue
            except (QvacManagedModeError, OSError) as error:  # the serve may be back for the next one
                return _complain(str(_expected_failure(error)))
            before = sum(tokens for _, _, tokens in self.turns)
            tokens = tokens_used(answer.usage) - before if answer.usage else _guessed_tokens(prompt + answer)
            self.turns.append((asked, {"role": "assistant", "content": str(answer)}, max(tokens, 0)))
            return None

    def make_room(self, prompt: str) -> None:
        """Leave out so many of the oldest turns that the prompt fits, with a quarter of the context for the answer."""
        def taken(count: int) -> int:
            return sum(tokens for _, _, tokens in self.turns[count:]) + _guessed_tokens(prompt)

        count = 0
        if self.context and taken(0) > self.context * 3 // 4:
            # To a half at once: each time that the beginning changes, the model reads all of it again.
            while count < len(self.turns) and taken(count) > self.context // 2:
                count += 1
        self.leave_out(count)

    def leave_out(self, count: int) -> None:
        if count:
            del self.turns[:count]
            what = "the oldest turn is" if count == 1 else f"the {count} oldest turns are"
            _note(self.args, f"(the context is full: {what} left out; a higher --ctx-size keeps more)")


def _guessed_tokens(text: str) -> int:
    return len(text.encode("utf-8", "replace")) // 3 + 16


def _read_prompt() -> Optional[str]:
    """What a person has typed or pasted next; None at the end of the input."""
    text = _read_line(">>> ")
    if text is None or not text.lstrip().startswith('"""'):
        return text
    text = text.lstrip()[3:]
    while not text.rstrip().endswith('"""'):
        line = _read_line("... ")
        if line is None:
            return text
        text += "\n" + line
    return text.rstrip()[:-3].strip("\n")


def _read_line(prompt: str) -> Optional[str]:
    """One line, or a whole paste: the terminal is asked to mark where one begins and ends."""
    begin, end = "\033[200~", "\033[201~"
    try:
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")  # it then gives a paste as one line
        own_marks = False
    except ImportError:
        own_marks = _is_terminal(sys.stdout)
    try:
        if own_marks:
            _out("\033[?2004h", end="")
        text = input(prompt)
        while begin in text and end not in text:
            text += "\n" + input()
        return text.replace(begin, "").replace(end, "").replace("\r", "\n")
    except EOFError:
        _out("")
        return None
    finally:
        if own_marks:
            _out("\033[?2004l", end="")


# -- explain, doctor


@_command(
    "MODEL...", None, _START + "json quiet",
    "Show the config and key these arguments make; start nothing.\n"
    "Also whether a serve has that key, and in what each other one differs.",
    "explain qwen3.5-9b --agent")  # fmt: skip
def _do_explain(args: Any) -> int:
    key, bin_path = _key(args, args.words), _serve_bin_path(args)
    config = synthesize_serve_config(_models(args, args.words), bin_path)
    wanted = _fleet_inputs(config["serve"]["models"], args.host, bin_path, args.port)
    records = read_all_records()
    others = [(r, _differences(wanted, r, args)) for r in records if r.fleet_key != key]
    running = next((record for record in records if record.fleet_key == key), None)
    if args.private:
        running = None  # it would be that key with its owner behind it, and nobody else's
    is_starting = running is None and not args.private and _starting_runner(key) != 0
    if args.json:
        _print_json(_explanation(key, config, args, running, is_starting, others))
    else:
        _print_explanation(key, config, args, running, is_starting, others)
    return EXIT_DONE


def _fleet_inputs(models: Mapping[str, Any], host: str, bin_path: Optional[str], port: Any) -> Dict[str, Any]:
    """Everything that goes into a fleet key, as one flat table: field name to value."""
    fields: Dict[str, Any] = {"host": host, "serve_bin_path": bin_path, "serve_port": port}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        else:
            fields[name] = value

    for alias, entry in models.items():
        add("models." + alias, entry)
    return fields


def _differences(wanted: Dict[str, Any], record: ServeRecord, args: Any) -> Optional[List[Dict[str, Any]]]:
    """The inputs in which RECORD's serve differs from WANTED; None if its config cannot be read."""
    models = _record_models(record)
    if models is None:
        return None
    bin_path, port = _record_place(record, models, args)
    actual = _fleet_inputs(models, record.host, bin_path, port)
    result = []
    for field in sorted(set(wanted) | set(actual)):
        # As JSON: 1 and true are equal in Python, and are two different serves.
        mine, theirs = (s.get(field, "(not set)") for s in (wanted, actual))
        if json.dumps(mine, sort_keys=True) != json.dumps(theirs, sort_keys=True):
            result.append({"field": field, "wanted": mine, "running": theirs})
    return result


def _record_place(record: ServeRecord, models: Mapping[str, Any], args: Any) -> Tuple[Any, Any]:
    """The CLI path and the pinned port in RECORD's key: ours say so; a provider's are tried out."""
    known = record.serve_bin_path or None, record.pinned_port or None
    bins = dict.fromkeys((known[0], None, _serve_bin_path(args)))
    ports = dict.fromkeys((known[1], None, record.port))
    config = {"serve": {"models": dict(models)}}
    for bin_path, port in [(bin_path, port) for bin_path in bins for port in ports]:
        key = compute_fleet_key(config, record.host, serve_bin_path=bin_path, serve_port=port)
        if key == record.fleet_key[:16]:
            return bin_path, port
    return known if any(known) else ("(another)", None)


def _explanation(key: str, config: Any, args: Any, running: Any, is_starting: bool, others: Any) -> Dict[str, Any]:
    return {
        "fleet_key": key,
        "private": args.private,
        "host": args.host,
        "serve_bin_path": _serve_bin_path(args),
        "serve_port": args.port,
        "config": config,
        "running": None if running is None else {"base_url": running.base_url, "pid": running.serve_pid},
        "starting": is_starting,
        "others": [{"fleet_key": record.fleet_key, "differences": found} for record, found in others],
    }


def _print_explanation(key: str, config: Any, args: Any, running: Any, is_starting: bool, others: Any) -> None:
    _out("key     " + key + (" (and the owner behind it: private)" if args.private else ""))
    _out("cli     " + _cli_text(args))
    _out("config  " + json.dumps(config, indent=2, ensure_ascii=False).replace("\n", "\n        "))
    if is_starting:
        _out("serve   one with this key is just starting; up would wait for it")
    elif running is None:
        _out("serve   none has this key; up would start one")
    else:
        _out(f"serve   {running.base_url} (pid {running.serve_pid})")
    for record, found in others:
        _out(f"\nother   {record.fleet_key} at {record.base_url}")
        for line in _difference_lines(found):
            _out("        " + line)


def _cli_text(args: Any) -> str:
    if _serve_bin_path(args) == ECHO:
        return "the built-in echo serve"
    try:
        return " ".join(find_cli(_serve_bin_path(args)))
    except QvacManagedModeError as error:
        return f"none: {_in_words_of_the_command_line(str(error))}"


def _difference_lines(found: Optional[List[Dict[str, Any]]]) -> List[str]:
    if found is None:
        return ["its config cannot be read"]
    if not found:
        return ["the same, but private"]

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    rows = [["DIFFERS IN", "WANTED", "RUNNING"]]
    rows += [[item["field"], text(item["wanted"]), text(item["running"])] for item in found]
    return _table(rows, 1, 0)


@_command(
    "", 0, "fix json quiet",
    "Check what serves need, and say what to type.\n"
    "Changes nothing without --fix. With --quiet only what is not ok. Exit code 1:\n"
    "a check failed.",
    "doctor", "doctor --fix")  # fmt: skip
def _do_doctor(args: Any) -> int:
    findings = []
    for check in (_check_programs, _check_folder, _check_serves, _check_disk, _check_network):
        try:
            for finding in check(args):  # status (ok, warn, fail), check, what was found, what to type
                findings.append(dict(zip(("status", "check", "detail", "todo"), finding)))
                if not args.json and not (args.quiet and finding[0] == "ok"):
                    _print_finding(*finding)
        except QvacManagedModeError as error:
            todo = "export HOME=..." if "HOME" in str(error) else "put that right first"
            findings.append({"status": "fail", "check": check.__name__[len("_check_") :], "detail": _one_line(str(error)), "todo": todo})
            if not args.json:
                _print_finding(*findings[-1].values())
    if args.json:
        _print_json(findings)
    return EXIT_FAILED if any(finding["status"] == "fail" for finding in findings) else EXIT_DONE


def _print_finding(status: str, check: str, detail: str, todo: str) -> None:
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}[status]
    _out(f"{_paint(status.ljust(4), colour, sys.stdout)}  {check:9} {detail}")
    if todo:
        _out("                -> " + todo)


def _check_programs(_args: Any) -> Iterator[Tuple[str, str, str, str]]:
    yield "ok", "module", f"{__version__} at {_THIS_FILE}", ""
    yield "ok", "python", "%s at %s" % (".".join(map(str, sys.version_info[:3])), sys.executable), ""
    try:
        yield "ok", "node", _node_version(), ""
    except _CommandError as error:
        problem, _, todo = str(error).partition("; ")
        yield "fail", "node", problem, todo
    try:
        argv = find_cli()
        lines = _tool_output([*argv, "--version"]).splitlines() or ["no version"]
        yield "ok", "qvac", f"{lines[-1]} at {argv[-1]}", ""
    except (QvacManagedModeError, _CommandError) as error:
        yield "fail", "qvac", str(error).partition(". ")[0], f"{_program()} install-cli"


def _tool_output(argv: Sequence[str]) -> str:
    """What a command prints, stripped. Raise _CommandError with its last line if it fails."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TOOL_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise _CommandError(f"{argv[0]} does not answer") from None
    except OSError as error:
        raise _CommandError(f"{argv[0]}: {error.strerror}") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise _CommandError(f"{argv[0]} failed with {done.returncode}: {lines[-1]}")
    return done.stdout.decode("utf-8", "replace").strip()


def _node_version() -> str:
    """What `node --version` says. Raise _CommandError, which says what to do, if it is missing or too old."""
    get_it = f"install Node.js {_MIN_NODE} or newer: https://nodejs.org"
    node = shutil.which("node")
    if not node:
        raise _CommandError("Node.js is not on PATH; " + get_it)
    text = _tool_output([node, "--version"])
    major = text.lstrip("v").split(".")[0]
    if not major.isdigit() or int(major) < _MIN_NODE:
        raise _CommandError(f"Node.js {text} is too old; {get_it}")
    return text


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _check_folder(args: Any) -> Iterator[Tuple[str, str, str, str]]:
    folder, exposed = managed_serves_dir(), 0
    if not os.path.lexists(folder):
        place = _existing(os.path.dirname(folder))
        if os.access(place, os.W_OK | os.X_OK):
            yield "ok", "folder", f"{folder}: not there yet", ""
        else:
            todo = "export QVAC_MANAGED_DIR=/a/folder/of/your/own"
            yield "fail", "folder", f"{folder} cannot be made: {place} is not writable", todo
        return
    path = folder
    try:
        for path in [folder] + [os.path.join(folder, name) for name in sorted(os.listdir(folder))]:
            why = folder_exposure(path) if os.path.lexists(path) else None
            exposed += bool(why)
            if why and args.fix:
                os.chmod(path, 0o700 if os.path.isdir(path) else 0o600)
                yield "ok", "folder", f"{path}: now yours alone", ""
            elif why:
                yield "warn", "folder", f"{path}: {why}", f"{_program()} doctor --fix"
    except OSError as error:
        yield "fail", "folder", f"{path}: {error.strerror}", f"chown -R $(id -un) {path}"
    if not exposed:
        yield "ok", "folder", f"{folder}: yours alone", ""


def _check_serves(args: Any) -> Iterator[Tuple[str, str, str, str]]:
    fix, stale = f"{_program()} doctor --fix", leftovers()
    swept = sweep_serves() if args.fix else []
    for key in swept:
        yield "ok", "serves", f"{key}: removed", ""
    serves = list_serves()
    advice = {"dead": fix, "orphaned": fix, "hung": f"{_program()} stop %s"}
    sick = [serve for serve in serves if serve.state in advice]
    for serve in sick:
        yield "warn", "serves", f"{serve.fleet_key} is {serve.state}", advice[serve.state].replace("%s", serve.fleet_key)
    if not sick and not swept:
        yield "ok", "serves", f"{len(serves)} on disk, none stale", ""
    left = leftovers()
    removed = sorted(set(stale) - set(left))
    if removed:
        yield "ok", "files", f"removed: {_some(removed)}", ""
    if left:
        yield "warn", "files", f"left behind by killed programs: {_some(left)}", fix
    if not stale and not left:
        yield "ok", "files", "nothing left behind by killed programs", ""


def _some(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_disk(_args: Any) -> Iterator[Tuple[str, str, str, str]]:
    folder = os.path.join(qvac_home(), "models")
    free = shutil.disk_usage(_existing(folder)).free
    status = "fail" if free < _LOW_DISK else "warn" if free < _LITTLE_DISK else "ok"
    todo = "make room: a model of 9 billion parameters takes 6 GB" if status != "ok" else ""
    yield status, "disk", f"{_size(free)} free for models in {folder}", todo


def _check_network(_args: Any) -> Iterator[Tuple[str, str, str, str]]:
    try:
        with socket.socket() as probe:
            probe.bind((DEFAULT_HOST, 0))
        yield "ok", "loopback", f"{DEFAULT_HOST} can be listened on", ""
    except OSError as error:
        yield "fail", "loopback", f"{DEFAULT_HOST}: {error.strerror}", "allow programs to listen there"
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if not proxies or DEFAULT_HOST in spared or spared.strip() == "*":
        yield "ok", "proxy", f"none in the way of {DEFAULT_HOST}", ""
    else:
        found = f"{proxies[0]} is set: this module goes past it, other clients send the key there"
        yield "warn", "proxy", found, f"export NO_PROXY={DEFAULT_HOST},localhost"


# -- install-cli, demo


@_command(
    "", 0, "version json quiet",
    "Install the qvac command under ~/.qvac/cli, with npm.\n"
    f"For those who have Node.js {_MIN_NODE} or newer and nothing else.",
    "install-cli", "install-cli --version 0.13.1")  # fmt: skip
def _do_install_cli(args: Any) -> int:
    _node_version()
    npm = shutil.which("npm")
    if not npm:
        raise _CommandError("npm is not on PATH; it comes with Node.js: https://nodejs.org")
    staging = _staging_folder()
    try:
        _npm_install(npm, staging, args)
        version = _installed_version(staging)
        target = _put_in_place(staging)
    finally:
        _remove_tree(staging)
    if args.json:
        _print_json({"path": target, "version": version})
    else:
        _out(f"qvac {version} is in {target}")
    return EXIT_DONE


def _staging_folder() -> str:
    """A new folder beside the final one, under a name that nobody takes for a CLI."""
    home = qvac_home()
    try:
        _make_private_folders(home)
        staging = tempfile.mkdtemp(prefix="cli.", dir=home)
        with open(os.path.join(staging, "package.json"), "w") as file:
            file.write('{"private": true}\n')  # else npm looks for a project further up
    except OSError as error:
        raise _CommandError(f"cannot write to {home}: {error.strerror}") from None
    return staging


def _npm_install(npm: str, staging: str, args: Any) -> None:
    package = f"{_CLI_PACKAGE}@{args.version}"
    logs = os.path.join(staging, "npm-logs")
    argv = [npm, "install", "--prefix", staging, "--logs-dir", logs, "--no-audit", "--no-fund", package]
    # Its own descriptors, not a pipe: npm draws its progress only on a terminal. Our stdout stays ours.
    shown: Any = subprocess.DEVNULL if args.quiet or sys.stderr is None else sys.stderr
    child = subprocess.Popen(argv, cwd=staging, stdin=subprocess.DEVNULL, stdout=shown, stderr=shown)
    try:
        code = child.wait()
    except BaseException:
        child.terminate()  # Ctrl-C has reached it too; a signal for us alone has not
        child.wait()
        raise
    if code:
        raise _CommandError(f"npm could not install {package}, nothing was changed: {_npm_reason(logs)}")


def _npm_reason(logs: str) -> str:
    """What npm complained about, out of its log: on the terminal it may be screens away."""
    said = []
    for name in sorted(os.listdir(logs) if os.path.isdir(logs) else []):
        with open(os.path.join(logs, name), encoding="utf-8", errors="replace") as file:
            parts = [line.strip().split(" ", 2) for line in file]
        said += [part[2] for part in parts if len(part) == 3 and part[1] == "error"]
    dull = ("complete log", "code ", "errno ", "A complete")
    said = [line for line in said if line.strip() and not line.startswith(dull) and "complete log" not in line] or said
    return "; ".join(said[:2]) or "it gave no reason"


def _installed_version(staging: str) -> str:
    """Prove that the new CLI runs, and return its version."""
    qvac = shutil.which("qvac", path=os.path.join(staging, "node_modules", ".bin"))
    if not qvac:
        raise _CommandError(f"npm installed {_CLI_PACKAGE}, but there is no qvac command in it")
    lines = _tool_output([qvac, "--version"]).splitlines()
    return lines[-1] if lines else "of unknown version"


def _put_in_place(staging: str) -> str:
    """Make STAGING the CLI. Between the renames there is none; if the second fails the old one comes back."""
    target = os.path.join(qvac_home(), "cli")
    old = staging + ".old"
    try:
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(staging, target)
    finally:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        _remove_tree(old)
    return target


def _remove_tree(path: str) -> None:
    # npm's helpers may still be writing for a moment after it was stopped.
    wait_until(lambda: shutil.rmtree(path, ignore_errors=True) or not os.path.lexists(path), 2.0, 0.1)


@_command(
    "", 0, "",
    "Show the whole life of a serve in seconds, without a model.",
    "demo")  # fmt: skip
def _do_demo(args: Any) -> int:
    before, began, idle = os.environ.get("QVAC_MANAGED_DIR"), time.monotonic(), 2.0
    folder = os.environ["QVAC_MANAGED_DIR"] = tempfile.mkdtemp(prefix="qvac-demo.")

    def say(text: str) -> None:
        _out(f"{time.monotonic() - began:5.1f} s  {text}")

    def files() -> List[str]:
        return [name for name in sorted(os.listdir(folder)) if not name.endswith((".log", ".guard"))]

    try:
        say(f"asking for {_sample_model()} on the built-in echo serve: no model is loaded")
        with create_qvac("managed", models=[_sample_model()], serve_bin_path=ECHO, serve_idle_timeout=idle) as client:
            say(f"a serve runs at {client.base_url} (pid {client.pid}, its runner {client.runner_pid})")
            say("it says: " + client.chat("hello"))
            words = ["up", "--echo", "--json", "--quiet", "--idle-timeout", str(idle), _sample_model()]
            pid = json.loads(_tool_output([*_own_command(), *words]))["pid"]
            say(f"a second process asked for the same and got {'the same' if pid == client.pid else 'ANOTHER'} serve (pid {pid})")
            kill_process(client.pid)
            say(f"killed the serve (pid {pid})")
            say("the same client asked again, and waited: " + client.chat("are you back?"))
            say(f"a serve runs at {client.base_url} (pid {client.pid})")
        say(f"the last user is gone; idle for {idle:.0f} s, then it ends")
        if not wait_until(lambda: not files(), idle + 10.0, 0.05):
            raise _CommandError(f"left behind in {folder}: {', '.join(files())}")
        say("it is gone, and so is every file of it but the log")
    finally:
        for serve in list_serves():
            stop_serve(serve.fleet_key)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("QVAC_MANAGED_DIR")
        os.environ.update({"QVAC_MANAGED_DIR": before} if before else {})
    return EXIT_DONE


def _own_command() -> List[str]:
    """What runs this command line again: this file, or, where it is inside a zip, an import of it."""
    if os.path.isfile(_THIS_FILE):
        return [sys.executable, _THIS_FILE]
    folder, name = os.path.split(_THIS_FILE)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import %s as m; sys.exit(m.main())"
    return [sys.executable, "-c", code % os.path.splitext(name)[0], folder]


# -- completion

# In each the words up to the cursor go to `__complete`, which prints what the last one may become. Where
# there is no qvac-managed command (this file was copied, not installed), SELF makes one out of it.
_COMPLETION_SCRIPTS = {
    "bash": """\
command -v qvac-managed >/dev/null || qvac-managed() { SELF "$@"; }
_qvac_managed() {
    local IFS=$'\\n' words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    [ "${words[COMP_CWORD-1]}" = "=" ] && words[COMP_CWORD-1]=""
    COMPREPLY=($(qvac-managed __complete "${words[@]}" 2>/dev/null))
}
complete -o default -F _qvac_managed qvac-managed
""",
    "zsh": """\
#compdef qvac-managed
command -v qvac-managed >/dev/null || qvac-managed() { SELF "$@"; }
_qvac_managed() {
    local -a found
    found=("${(@f)$(qvac-managed __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -- "${found[@]}"; else _files; fi
}
compdef _qvac_managed qvac-managed
""",
    "fish": """\
type -q qvac-managed; or function qvac-managed; SELF $argv; end
function __qvac_managed
    qvac-managed __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c qvac-managed -f -a '(__qvac_managed)'
complete -c qvac-managed -n '__fish_seen_argument -l spec -l bin' -F
complete -c qvac-managed -n '__fish_seen_subcommand_from run; and contains -- -- (commandline -opc)' -F
""",
}


@_command(
    "bash|zsh|fish", 1, "",
    "Print a script that completes commands, models and keys.\n"
    "For the command `qvac-managed`, which it defines if there is none.",
    'eval "$(PROGRAM completion bash)"', "completion fish | source")  # fmt: skip
def _do_completion(args: Any) -> int:
    if len(args.words) != 1 or args.words[0] not in _COMPLETION_SCRIPTS:
        raise _usage_error("completion: say for which shell: {}".format(", ".join(_COMPLETION_SCRIPTS)))
    quote = _quote_for_fish if args.words[0] == "fish" else _quote_for_sh
    _out(_COMPLETION_SCRIPTS[args.words[0]].replace("SELF", " ".join(map(quote, _own_command()))), end="")
    return EXIT_DONE


def _complete(words: List[str]) -> int:
    """Print what the last of WORDS, which may be empty, can become; nothing where file names are wanted."""
    current = words[-1] if words else ""
    if len(words) < 2:
        choices = [*list(_COMMANDS), "--help", "--version"]
    elif words[0] in _COMMANDS and "--" not in words[:-1]:
        choices = _choices(words[0], words[-2], current)
    else:
        choices = []
    for choice in choices:
        if choice.startswith(current):
            _out(choice)
    return EXIT_DONE


def _choices(name: str, before: str, current: str) -> List[str]:
    command = _COMMANDS[name]
    for key in command.flags:
        flags, value, _convert, _default, _help = _FLAGS[key]
        if value and before in flags.split():
            return _flag_values(key)
    if current.startswith("-"):
        return ["--help"] + [_FLAGS[key][0].split()[-1] for key in command.flags]
    if "KEY" in command.words:
        aliases = _aliases_by_key(*([".log"] if name == "logs" else []))
        return sorted(aliases) + sorted({alias for names in aliases.values() for alias in names})
    if name == "completion":
        return list(_COMPLETION_SCRIPTS)
    if "MODEL" in command.words or "PATTERN" in command.words:
        prefix = current[: current.find("=") + 1]
        return [prefix + model for model in _model_names()]
    return []


def _model_names() -> List[str]:
    return [entry.id for entry in QVAC_CATALOG] + [info.name for info in all_models()]


def _flag_values(key: str) -> List[str]:
    if key == "shell":
        return list(_SHELLS)
    if key == "endpoint":
        return sorted({info.endpoint for info in all_models() if info.endpoint})
    return ["5m", "2h", "never"] if key == "idle_timeout" else []


# -- help, out of the table of commands


_WORD_HELP = {
    "MODEL": "NAME, ALIAS=NAME or ALIAS=/path/model.gguf (see `models`)",
    "KEY|MODEL": "a key or the start of one, or a model of the serve (see `ps`)",
}


def _program() -> str:
    """How this command line was called, so that what a message says to type works."""
    name = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else ""
    if not name.endswith((".py", ".pyz", ".zip")):
        return "qvac-managed"
    python = os.path.basename(sys.executable or "python3").replace(".exe", "")
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec:
        return f"{python} -m {spec.name}"
    return f"{python} {quoted_word(sys.argv[0])}"


def _overview() -> str:
    lines = [f"usage: {_program()} COMMAND [options]", ""]
    lines += ["Local model servers that start when needed and end when unused. Try: demo", ""]
    lines += [f"  {name:12} {command.about.splitlines()[0]}" for name, command in _COMMANDS.items()]
    lines += ["", "COMMAND --help says more, with examples. --version prints the version."]
    return "\n".join(lines)


def _command_help(name: str) -> str:
    command = _COMMANDS[name]
    options = " [options]" if command.flags else ""
    words = command.words.split(" -- ")
    usage = words[0] + options + "".join(" -- " + word for word in words[1:])
    word = words[0].replace("...", "").split(" ")[0]
    rows = [(word, _WORD_HELP[word])] if word in _WORD_HELP else []
    for key in command.flags:
        flags, value, _convert, _default, text = _FLAGS[key]
        rows.append((flags.replace(" ", ", ") + (" " + value if value else ""), text))
    left = max([len(row[0]) for row in rows] or [0])
    lines = [f"usage: {_program()} {name} {usage.strip()}", "", command.about, ""]
    lines += [f"  {row[0].ljust(left)}  {row[1]}" for row in rows]
    lines += [""] if rows else []
    return "\n".join(lines + ["  " + _example(text) for text in command.examples])


def _example(text: str) -> str:
    return text.replace("PROGRAM", _program()) if "PROGRAM" in text else f"{_program()} {text}"


# ==================================================================================================
# 15. Model table (generated)
# ==================================================================================================

# --- model table: generated by .ci/catalog.py, do not edit ---
MODEL_TABLE_SOURCE = "@qvac/cli 0.13.1"
_MODEL_TABLE = """\
audiogen AUDIOGEN_ 337420928:VAE_BF16 709846656:ACESTEP_5HZ_LM_0_6B_Q8_0 784144960:QWEN3_EMBEDDING_0_6B_Q8_0
audiogen AUDIOGEN_ 1445710272:ACESTEP_V15_TURBO_Q4_K_M 2549527936:ACESTEP_V15_SFT_Q8_0
audiogen AUDIOGEN_ 2549528000:ACESTEP_V15_TURBO_Q8_0
bci BCI_ 25028476:EMBEDDER 87756577:WINDOWED
chat BITNET_ 217082208:0_7B_INST_TQ2_0 834553152:1B_INST_TQ2_0 1923554016:B1_58_3B_INST_TQ2_0
chat DOLPHIN_MIXTRAL_2X7B_MOE_Q2_K_ 7791:TENSORS 4760823808:SHARD
chat GEMMA4_ 3462678272:2B_MULTIMODAL_Q4_K_M 3898484480:2B_MULTIMODAL_Q6_K 4967495424:2B_MULTIMODAL_Q8_0
chat GEMMA4_ 5405168384:4B_MULTIMODAL_Q4_K_M 6329953024:4B_MULTIMODAL_Q6_K 19598488192:31B_MULTIMODAL_Q4_K_M
chat GEMMA4_ 26726720128:31B_MULTIMODAL_Q6_K
chat GPT_OSS_ 16529:120B_INST_Q4_K_M_TENSORS 11624759488:20B_INST_Q4_K_M 62768723552:120B_INST_Q4_K_M_SHARD
chat HEALTHCARE_ 888064192:1_7B_MEDICAL_IQ3_XXS 1029365952:1_7B_MEDICAL_IQ3_M 1175689408:1_7B_MEDICAL_IQ4_XS
chat HEALTHCARE_ 1229453504:1_7B_MEDICAL_IQ4_NL 1282439360:1_7B_MEDICAL_Q4_K_M 1471805632:1_7B_MEDICAL_Q5_K_M
chat HEALTHCARE_ 1837317920:4B_MEDICAL_IQ3_XXS 2130025760:4B_MEDICAL_IQ3_M 2165039040:1_7B_MEDICAL_Q8_0
chat HEALTHCARE_ 2477384480:4B_MEDICAL_IQ4_XS 2600131360:4B_MEDICAL_IQ4_NL 2716068640:4B_MEDICAL_Q4_K_M
chat HEALTHCARE_ 3156921120:4B_MEDICAL_Q5_K_M 4069679040:1_7B_MEDICAL_BF16 4693670944:4B_MEDICAL_Q8_0
chat HEALTHCARE_ 8829197344:4B_MEDICAL_BF16
chat LLAMA_ 3213:3_2_1B_INST_Q4_0_TENSORS 773025824:3_2_1B_INST_Q4_0 773026848:3_2_1B_INST_Q4_0_SHARD
chat LLAMA_ 807691648:TOOL_CALLING_1B_INST_Q4_K
chat MEDGEMMA_4B_IT_ 10685:Q4_1_TENSORS 2564052800:Q4_1 2564053312:Q4_1_SHARD 4130402880:Q8_0 4130403424:Q8_0_SHARD
chat MMPROJ_ 108782144:VISIONPSY_NANO_460M_MULTIMODAL_Q8_0 VISIONPSY_NANO_460M_MULTIMODAL_Q8_0_1
chat MMPROJ_ 108785184:SMOLVLM2_500M_MULTIMODAL_Q8_0 115923680:QWEN3_5_0_8B_MULTIMODAL_Q8_0
chat MMPROJ_ 199470624:SMOLVLM2_500M_MULTIMODAL_F16 204987232:QWEN3_5_0_8B_MULTIMODAL_F16
chat MMPROJ_ 207346528:QWEN3_5_0_8B_MULTIMODAL_BF16 364664384:QWEN3_5_2B_MULTIMODAL_Q8_0
chat MMPROJ_ 366894656:QWEN3_5_4B_MULTIMODAL_Q8_0 445053216:QWEN3VL_2B_MULTIMODAL_Q4_K
chat MMPROJ_ 461225856:OCR_3B_MULTIMODAL_Q8_0 557367776:GEMMA4_2B_MULTIMODAL_Q8_0 668227264:QWEN3_5_2B_MULTIMODAL_F16
chat MMPROJ_ 671372992:QWEN3_5_2B_MULTIMODAL_BF16 672423616:QWEN3_5_4B_MULTIMODAL_F16
chat MMPROJ_ 675569344:QWEN3_5_4B_MULTIMODAL_BF16 819313056:OCR_0_6B_MULTIMODAL_F16 825245568:OCR_3B_MULTIMODAL_F16
chat MMPROJ_ 899283680:QWEN3_6_35B_A3B_MULTIMODAL_F16 902822624:QWEN3_6_35B_A3B_MULTIMODAL_BF16
chat MMPROJ_ 904004000:QWEN3_8_FLASH_NEXT_177B_MULTIMODAL_F16 918166080:QWEN3_5_9B_MULTIMODAL_F16
chat MMPROJ_ 921705024:QWEN3_5_9B_MULTIMODAL_BF16 927607360:QWEN3_6_27B_MULTIMODAL_F16
chat MMPROJ_ 927607488:QWEN3_8_27B_MULTIMODAL_F16 931146304:QWEN3_6_27B_MULTIMODAL_BF16
chat MMPROJ_ 985653760:GEMMA4_2B_MULTIMODAL_F16 986833408:GEMMA4_2B_MULTIMODAL_BF16 990372352:GEMMA4_4B_MULTIMODAL_F16
chat MMPROJ_ 991552000:GEMMA4_4B_MULTIMODAL_BF16 1198956736:GEMMA4_31B_MULTIMODAL_F16
chat MMPROJ_ 1200726208:GEMMA4_31B_MULTIMODAL_BF16
chat MOE_35B_INST_ 9778452896:IQ2_XXS 21391448480:Q4_K_M 36914690464:Q8_0
chat OCR_ 396701664:0_6B_MULTIMODAL_Q4_K_M 1701896608:3B_MULTIMODAL_Q4_0
chat QWEN3_ 7067:1_7B_INST_Q4_TENSORS 9107:4B_INST_Q4_TENSORS 382156480:600M_INST_Q4
chat QWEN3_ 532517120:5_0_8B_MULTIMODAL_Q4_K_M 639029504:5_0_8B_MULTIMODAL_Q6_K 811843840:5_0_8B_MULTIMODAL_Q8_0
chat QWEN3_ 1056782912:1_7B_INST_Q4 1056783456:1_7B_INST_Q4_SHARD 1280835840:5_2B_MULTIMODAL_Q4_K_M
chat QWEN3_ 1574961408:5_2B_MULTIMODAL_Q6_K 2012012800:5_2B_MULTIMODAL_Q8_0 2497280256:4B_INST_Q4_K_M
chat QWEN3_ 2497280864:4B_INST_Q4_SHARD 2497281312:4B_Q4_K_M 2740937888:5_4B_MULTIMODAL_Q4_K_M
chat QWEN3_ 3525956768:5_4B_MULTIMODAL_Q6_K 5027783488:8B_INST_Q4_K_M 5680522464:5_9B_MULTIMODAL_Q4_K_M
chat QWEN3_ 7458301152:5_9B_MULTIMODAL_Q6_K 17612564704:6_27B_MULTIMODAL_Q4_K_XL
chat QWEN3_ 17923394624:8_27B_MULTIMODAL_UD_Q4_K_XL 22134528992:6_35B_A3B_MULTIMODAL_Q4_K_M
chat QWEN3_ 25636485344:6_27B_MULTIMODAL_Q6_K_XL 31457991680:8_27B_MULTIMODAL_UD_Q8_K_XL
chat QWEN3_ 31843777504:6_35B_A3B_MULTIMODAL_Q6_K_XL 78869128864:8_FLASH_NEXT_177B_MULTIMODAL_UD_Q2_K_XL_SHARD
chat QWEN3_ 111334654784:8_FLASH_NEXT_177B_MULTIMODAL_UD_Q4_K_XL_SHARD
chat SALAMANDRATA_2B_INST_ 4833:Q4_TENSORS 1517617504:Q4 1517617856:Q4_SHARD 2401075552:Q8 2401076000:Q8_SHARD
chat SMOLVLM2_500M_MULTIMODAL_ 436808704:Q8_0 820424704:F16
chat VISIONPSY_NANO_460M_MULTIMODAL_ 303143488:Q4_K_M Q4_K_M_1 436676000:Q8_0 Q8_0_1
embedding EMBEDDINGGEMMA_300M_ 277852192:Q4_0 328577056:Q8_0 612429792:BF16 1217982432:F32
embedding GTE_LARGE_ 8966:335M_FP16_TENSORS 669603712:FP16 669604320:335M_FP16_SHARD
image ABOT_WORLD_0_5B_ 22844832:LF_VAE 1409493568:LF_VAE_F16 5885489920:Q8_0
image FLUX_2_KLEIN_4B_ 168120878:VAE 2460394048:Q4_0 2604311104:Q4_K_M 3409273408:Q6_K 4300644928:Q8_0
image LTX_2_3_ 364853140:VAE 1452256522:VAE_1 2312144712:22B_DISTILLED_EMBEDDINGS_CONNECTORS 12408656544:22B_Q2_K
image LTX_2_3_ 19388448416:22B_Q5_K_M
image REALESRGAN_ 17938799:X4PLUS_ANIME_6B 67040989:X4PLUS
image SDXL_BASE_1_0_3B_ 3940010720:Q4_0 5040957760:Q8_0
image SD_V2_1_1B_ 2185459424:Q4_0 2322705024:Q8_0
image UMT5_XXL_ 6035988320:ENC_Q8_0 11366399385:FP16
image WAN2_ 2838303560:1_T2V_1_3B_FP16 3564739296:2_TI2V_5B_Q5_K_S 11341184384:1_I2V_14B_Q4_K_M 1_I2V_14B_Q4_K_M_1
image WAN2_ 15879461504:1_T2V_14B_Q8_0
image WAN_2_ 253815318:1_COMFYUI_REPACKAGED_VAE 1409400960:2_COMFYUI_REPACKAGED_VAE
ocr OCR_ 4198144:DOCTR 8352640:DOCTR_1 15396512:LATIN 83133856:CRAFT
speech TTS_ 57664:COSYVOICE3_VOICE_COSYVOICE_2 179584:COSYVOICE3_VOICE_COSYVOICE 223456:COSYVOICE3_VOICE_COSYVOICE_1
speech TTS_ 262496:MECAB_IPADIC_CHATTERBOX 505696:DENOISER_LAVASR_FP16 722528:DENOISER_LAVASR_FP32
speech TTS_ 1337109:CANGJIE_ZH_CHATTERBOX 1402109:COSYVOICE3_TOKENIZER_COSYVOICE
speech TTS_ 2776833:COSYVOICE3_TOKENIZER_COSYVOICE_1 27530656:COSYVOICE3_CAMPPLUS_COSYVOICE_FP32
speech TTS_ 28051008:ENHANCER_LAVASR_FP16 55946816:ENHANCER_LAVASR_FP32 83087520:COSYVOICE3_HIFT_COSYVOICE_FP32
speech TTS_ 84658368:MULTILINGUAL_SUPERTONIC3_Q4_0 126745792:MULTILINGUAL_SUPERTONIC3_Q8_0
speech TTS_ 131956256:EN_SUPERTONIC_Q4_0 132008192:MULTILINGUAL_SUPERTONIC2_Q4_0
speech TTS_ 206631232:MULTILINGUAL_SUPERTONIC3_FP16 210631616:CODEC_DECODER_AUDIO8_Q8_0 251818336:EN_SUPERTONIC_Q8_0
speech TTS_ 251845952:MULTILINGUAL_SUPERTONIC2_Q8_0 262241216:CODEC_DECODER_AUDIO8_FP16
speech TTS_ 263631712:CODEC_ENCODER_AUDIO8_Q8_0 275421536:COSYVOICE3_S3TOK_COSYVOICE_Q8_0
speech TTS_ 332605120:T3_TURBO_EN_CHATTERBOX_Q4_0 344985408:T3_MULTILINGUAL_CHATTERBOX_Q4_0
speech TTS_ 372095040:T3_TURBO_EN_CHATTERBOX_Q5_0 398497088:MULTILINGUAL_SUPERTONIC3_FP32
speech TTS_ 409819968:T3_MULTILINGUAL_CHATTERBOX_Q5_0 416985952:CODEC_ENCODER_AUDIO8_FP16
speech TTS_ 487091392:T3_TURBO_EN_CHATTERBOX_Q8_0 496605536:COSYVOICE3_S3TOK_COSYVOICE_FP16
speech TTS_ 604323648:T3_MULTILINGUAL_CHATTERBOX_Q8_0 777277440:T3_TURBO_EN_CHATTERBOX_FP16
speech TTS_ 788432672:S3GEN_MULTILINGUAL_CHATTERBOX_Q4_0 789672256:S3GEN_EN_CHATTERBOX_Q4_0
speech TTS_ 798178080:S3GEN_MULTILINGUAL_CHATTERBOX_Q5_0 799679808:S3GEN_EN_CHATTERBOX_Q5_0
speech TTS_ 827414304:S3GEN_MULTILINGUAL_CHATTERBOX_Q8_0 829702464:S3GEN_EN_CHATTERBOX_Q8_0
speech TTS_ 839106752:LM_MULTILINGUAL_AUDIO8_Q8_0 968464736:COSYVOICE3_S3TOK_COSYVOICE_FP32
speech TTS_ 973496000:COSYVOICE3_LLM_COSYVOICE_Q8_0 1056431360:S3GEN_MULTILINGUAL_CHATTERBOX
speech TTS_ 1064879936:S3GEN_EN_CHATTERBOX 1099495744:T3_MULTILINGUAL_CHATTERBOX_FP16
speech TTS_ 1162597856:MINI_V1_EN_PARLER_TTS_Q8_0 1230479552:LM_MULTILINGUAL_AUDIO8_FP16
speech TTS_ 1287330656:INDIC_MULTILINGUAL_PARLER_TTS_Q8_0 1333857632:COSYVOICE3_FLOW_COSYVOICE_FP32
speech TTS_ 2511459808:MINI_V1_EN_PARLER_TTS_FP16 2636192608:INDIC_MULTILINGUAL_PARLER_TTS_FP16
speech TTS_ 2770947648:LARGE_V1_EN_PARLER_TTS_Q8_0 3422690784:MINI_V1_EN_PARLER_TTS_FP32
speech TTS_ 3667407712:INDIC_MULTILINGUAL_PARLER_TTS_FP32 7190761024:LARGE_V1_EN_PARLER_TTS_FP16
speech TTS_ 9243376192:LARGE_V1_EN_PARLER_TTS_FP32
transcription PARAKEET_ 74110976:EOU_120M_V1_Q4_0 75458048:SORTFORMER_4SPK_V2_1_Q4_0 79031136:SORTFORMER_4SPK_V1_Q4_0
transcription PARAKEET_ 138051456:EOU_120M_V1_Q8_0 140717952:SORTFORMER_4SPK_V2_1_Q8_0
transcription PARAKEET_ 147436704:SORTFORMER_4SPK_V1_Q8_0 257939840:EOU_120M_V1_F16 263080256:SORTFORMER_4SPK_V2_1_F16
transcription PARAKEET_ 275697312:SORTFORMER_4SPK_V1_F16 389648768:CTC_0_6B_Q4_0 391389696:INDIC_CONFORMER_CTC_Q4_0
transcription PARAKEET_ 395029120:UNIFIED_0_6B_Q4_0 398735040:TDT_0_6B_V3_Q4_0 731222912:CTC_0_6B_Q8_0
transcription PARAKEET_ 735323136:INDIC_CONFORMER_CTC_Q8_0 741330176:UNIFIED_0_6B_Q8_0 749625216:TDT_0_6B_V3_Q8_0
transcription PARAKEET_ 1371674432:CTC_0_6B_F16 1380198336:INDIC_CONFORMER_CTC_F16 1390644608:UNIFIED_0_6B_F16
transcription PARAKEET_ 1407544256:TDT_0_6B_V3_F16
transcription WHISPER_ 43537433:FRENCH_TINY_Q8_0 GERMAN_TINY_Q8_0 ITALIAN_TINY_Q8_0 JAPANESE_TINY_Q8_0
transcription WHISPER_ 43537433:RUSSIAN_TINY_Q8_0 SPANISH_TINY_Q8_0 TINY_Q8_0 43537450:PORTUGUESE_TINY_Q8_0 Q8_0
transcription WHISPER_ 43550795:EN_TINY_Q8_0 Q8_0_1 63798666:ITALIAN_BASE_Q8_0 77691713:FRENCH_TINY_F16
transcription WHISPER_ 77691713:GERMAN_TINY_F16 ITALIAN_TINY_F16 JAPANESE_TINY_F16 RUSSIAN_TINY_F16 SPANISH_TINY_F16
transcription WHISPER_ 77691713:TINY 77691730:NORWEGIAN_TINY PORTUGUESE_TINY_F16 77704715:EN_TINY_Q0F16
transcription WHISPER_ 81768585:BASE_Q8_0 GERMAN_BASE_Q8_0 JAPANESE_BASE_Q8_0 RUSSIAN_BASE_Q8_0
transcription WHISPER_ 81768602:FRENCH_BASE_Q8_0 PORTUGUESE_BASE_Q8_0 81781811:EN_BASE_Q8_0 114252906:ITALIAN_BASE_F16
transcription WHISPER_ 147951465:BASE_Q0F16 GERMAN_BASE_F16 JAPANESE_BASE_F16 RUSSIAN_BASE_F16
transcription WHISPER_ 147951482:FRENCH_BASE_F16 PORTUGUESE_BASE_F16 147964211:EN_BASE_Q0F16 264464607:SMALL_Q8_0
transcription WHISPER_ 264477561:EN_SMALL_Q8_0 487601967:SMALL_Q0F16 487614201:EN_SMALL_Q0F16
transcription WHISPER_ 1624555275:LARGE_V3_TURBO
translation MARIAN_ 126980520:HI_EN_INDIC_200M_Q4_0 127339617:EN_HI_INDIC_200M_Q4_0 193106987:HI_HI_INDIC_320M_Q4_0
translation MARIAN_ 430985320:HI_EN_INDIC_200M_F16 431338529:EN_HI_INDIC_200M_F16 584815722:HI_EN_INDIC_1B_Q4_0
translation MARIAN_ 637229091:EN_HI_INDIC_1B_Q4_0 653915115:HI_HI_INDIC_320M_F16 693697483:HI_HI_INDIC_1B_Q4_0
translation MARIAN_ 2054322154:HI_EN_INDIC_1B_F16 2239757219:EN_HI_INDIC_1B_F16 2429270859:HI_HI_INDIC_1B_F16
vla GROOT_ 2739467616:Q5_VF16 3045175648:MULTI_Q5_VF16 3759519072:Q8_VF16 4065227104:MULTI_Q8_VF16
chat - 386404992:SMOLLM2_360M_INST_Q8 1107409952:QWEN3VL_2B_MULTIMODAL_Q4_K 2867473376:AFRICAN_4B_TRANSLATION_Q4_K_M
chat - 4760823264:LASER_DOLPHIN_2X7B_INST_Q2_K 90926928288:DEEPSEEK_V4_304B_INST_UD_IQ2_M_SHARD
image - 67040989:REALESRNET_X4PLUS 1264219396:CLIP_VISION_H 7432229216:GEMMA_3_12B_Q4_K_XL
transcription - 885098:VAD_SILERO_5_1_2
translation - 12980780:BERGAMOT_NB_EN BERGAMOT_NN_EN 17140836:BERGAMOT_MT_EN BERGAMOT_TR_EN 17140899:BERGAMOT_HU_EN
translation - 17141051:BERGAMOT_AZ_EN BERGAMOT_BE_EN BERGAMOT_BN_EN BERGAMOT_BS_EN BERGAMOT_DA_EN BERGAMOT_EL_EN
translation - 17141051:BERGAMOT_EN_AZ BERGAMOT_EN_BN BERGAMOT_EN_DA BERGAMOT_EN_EL BERGAMOT_EN_FA BERGAMOT_EN_GU
translation - 17141051:BERGAMOT_EN_HE BERGAMOT_EN_HI BERGAMOT_EN_ID BERGAMOT_EN_KN BERGAMOT_EN_ML BERGAMOT_EN_MS
translation - 17141051:BERGAMOT_EN_NB BERGAMOT_EN_NO BERGAMOT_EN_RO BERGAMOT_EN_SQ BERGAMOT_EN_SV BERGAMOT_EN_TA
translation - 17141051:BERGAMOT_EN_TE BERGAMOT_EN_TR BERGAMOT_FA_EN BERGAMOT_GU_EN BERGAMOT_HE_EN BERGAMOT_HI_EN
translation - 17141051:BERGAMOT_HR_EN BERGAMOT_ID_EN BERGAMOT_KN_EN BERGAMOT_LT_EN BERGAMOT_LV_EN BERGAMOT_ML_EN
translation - 17141051:BERGAMOT_MS_EN BERGAMOT_NO_EN BERGAMOT_RO_EN BERGAMOT_RU_EN BERGAMOT_SK_EN BERGAMOT_SQ_EN
translation - 17141051:BERGAMOT_SR_EN BERGAMOT_SV_EN BERGAMOT_TA_EN BERGAMOT_TE_EN BERGAMOT_UK_EN BERGAMOT_VI_EN
translation - 31561787:BERGAMOT BERGAMOT_AR_EN BERGAMOT_BG_EN BERGAMOT_CA_EN BERGAMOT_CS_EN BERGAMOT_DE_EN
translation - 31561787:BERGAMOT_EN_AR BERGAMOT_EN_BG BERGAMOT_EN_BS BERGAMOT_EN_CA BERGAMOT_EN_CS BERGAMOT_EN_DE
translation - 31561787:BERGAMOT_EN_ES BERGAMOT_EN_ET BERGAMOT_EN_FI BERGAMOT_EN_FR BERGAMOT_EN_HR BERGAMOT_EN_HU
translation - 31561787:BERGAMOT_EN_IS BERGAMOT_EN_IT BERGAMOT_EN_LT BERGAMOT_EN_LV BERGAMOT_EN_NL BERGAMOT_EN_PL
translation - 31561787:BERGAMOT_EN_PT BERGAMOT_EN_RU BERGAMOT_EN_SK BERGAMOT_EN_SL BERGAMOT_EN_SR BERGAMOT_EN_TH
translation - 31561787:BERGAMOT_EN_UK BERGAMOT_EN_VI BERGAMOT_ES_EN BERGAMOT_ET_EN BERGAMOT_FI_EN BERGAMOT_FR_EN
translation - 31561787:BERGAMOT_IS_EN BERGAMOT_IT_EN BERGAMOT_NL_EN BERGAMOT_PL_EN BERGAMOT_PT_EN BERGAMOT_SL_EN
translation - 31561787:BERGAMOT_TH_EN 43849787:BERGAMOT_EN_JA BERGAMOT_EN_KO BERGAMOT_EN_ZH 43977787:BERGAMOT_JA_EN
translation - 43977787:BERGAMOT_KO_EN BERGAMOT_ZH_EN
vla - 1981051936:SMOLVLA_LIBERO_VISION_Q8 3929675872:PI05_BASE_Q_AGGRESSIVE
"""
# --- end of the model table ---


# ==================================================================================================
# 16. Main guard
# ==================================================================================================


def _reexecuted(argv: List[str]) -> int:
    """Entry of the processes that are this file again: `runner PARAMS` and `echo ARGUMENTS...`."""
    if argv[0] == "--detach":
        detach()
        argv = argv[1:]
    if argv[0] == "echo":
        return run_echo_serve(argv[1:])
    return _run_runner(argv[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reexecuted"]:
        sys.exit(_reexecuted(sys.argv[2:]))
    sys.exit(main())
