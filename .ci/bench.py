#!/usr/bin/env python3
"""How fast qvac_managed is, beside the JavaScript provider: same machine, same run, same stub serve.

    .ci/bench.py [--provider DIR] [--only ROW...] [--runs N] [--quick] [--markdown]

Linux and the standard library; pip needs the network once, for the build tool. The provider is looked for in
$QVAC_TEST_PROVIDER. To get it, in a folder outside this project:

    npm install @qvac/ai-sdk-provider@0.7.0 ai @ai-sdk/openai-compatible node@22

Without it no ratio is printed, for there is nothing to divide by. Both sides run alternately, each in a home of
its own, against the same stub: an executable that takes the arguments of `qvac serve` and listens after 70 ms.
Ours runs in a new virtual environment with the module installed by pip. A row is a median with the 10th and
90th percentile behind it. All processes and folders are gone at the end, on Ctrl-C too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODEL = "qwen3.5-2b"
HOST = "127.0.0.1"
STUB_DELAY = 0.05  # seconds of sleep in the stub; with its interpreter it is up in 70 ms
SLOW_DELAY = 20.0  # seconds a model loads in the row `slow`
FOREVER = 3600.0  # seconds of idle timeout for serves that a row must not lose
PATIENCE = 60.0  # seconds for anything to happen that should
RETRY_PAUSE = 0.002  # seconds
KILL_PAUSE = 3.0  # seconds between kills of a serve: five in quick succession are a crash loop, and it is given up
MARK = "QVAC_BENCH_MARK"  # in the environment of every process of a run, so that it can be ended

STUB = """#!%(python)s -IS
import _thread, socket, sys, time

def answer(connection):
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        data = connection.recv(65536)
        if not data:
            return
        head += data
    head, _, body = head.partition(b"\\r\\n\\r\\n")
    lines = head.lower().split(b"\\r\\n")
    length = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
    missing = length[0] - len(body) if length else 0
    body = body[:65536] + connection.recv(min(missing, 65536), socket.MSG_WAITALL) if missing > 0 else body
    missing = length[0] - len(body) if length else 0
    while missing > 0:  # a large upload is counted, not kept
        missing -= len(connection.recv(min(missing, 1 << 18))) or missing
    if b"authorization: bearer " + key.lower() not in lines:
        return connection.sendall(b"HTTP/1.1 401 Unauthorized\\r\\nConnection: close\\r\\n\\r\\n")
    if b" /health " in head:
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
        return answer(connection)
    if b"/paced/" in head:
        count, rate, size = map(int, head.split(b" ")[1].rpartition(b"/paced/")[2].split(b"-"))
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Type: text/event-stream\\r\\n\\r\\n")
        event, began = b"data: " + b"x" * size + b"\\n\\n", time.monotonic()
        for index in range(count):
            connection.sendall(event)
            ahead = began + index / rate - time.monotonic()
            if ahead > 0.002:
                time.sleep(ahead)
        return
    if head.startswith(b"POST") and b'"stream"' in body and b"true" in body:
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Type: text/event-stream\\r\\n\\r\\n")
        for _ in range(3):
            piece = '{"choices": [{"index": 0, "delta": {"content": "%%r"}}]}' %% time.monotonic()
            connection.sendall(b"data: " + piece.encode() + b"\\n\\n")
            time.sleep(0.1)
        return connection.sendall(b"data: [DONE]\\n\\n")
    if head.startswith(b"POST"):
        text = '{"id": "1", "object": "chat.completion", "created": 1, "model": "%(model)s", "choices": [' \\
               '{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}]}'
    else:
        looks.append(1)
        text = '{"data": [{"id": "%(model)s", "state": "ready"}], "listening": %%r, "looks": %%d}' %% (
            listening, len(looks))
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Type: application/json\\r\\n"
                       b"Content-Length: %%d\\r\\n\\r\\n" %% len(text) + text.encode())

def serve(connection):
    with connection:
        try:
            answer(connection)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass

looks = []
given = dict(zip(sys.argv, sys.argv[1:]))
key = given["--api-key"].encode() if "--api-key" in given else open(given["--api-key-file"], "rb").read()
time.sleep(%(delay)r)
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((given["--host"], int(given["--port"])))
listener.listen(512)
listening = time.monotonic()
while True:
    _thread.start_new_thread(serve, (listener.accept()[0],))
"""

# Whole processes: what a program needs that attaches, says where (and when), and lets go.
ATTACH_PY = """
import time, qvac_managed
qvac = qvac_managed.create_qvac("managed", **%r)
print(qvac.base_url, time.monotonic())
qvac.close()
"""
ATTACH_JS = """
import { createQvac } from '@qvac/ai-sdk-provider'
const qvac = await createQvac({ mode: 'managed', ...JSON.parse(process.argv[2]) })
console.log(qvac.baseURL, Number(process.hrtime.bigint()) / 1e9)
await qvac.close()
"""

# Clients that stay, and do what a line on their standard input says: each answers with a line of JSON. What an
# attach imports is imported before the clock starts.
CLIENT_PY = """
import json, sys, time, urllib.request
import qvac_managed
options, modules = json.loads(sys.argv[1])
for name in modules:
    __import__(name)
clock = time.perf_counter

def say(**facts):
    print(json.dumps(facts), flush=True)

began = clock()
qvac = qvac_managed.create_qvac("managed", **options)
say(inside=clock() - began, ready=time.monotonic(), url=qvac.base_url, key=qvac.api_key, pid=qvac.pid)

def timed(action):
    began = clock()
    action()
    return clock() - began

def plain():
    headers = {"Authorization": "Bearer " + qvac.api_key}
    with urllib.request.urlopen(urllib.request.Request(qvac.base_url + "/models", headers=headers)) as response:
        response.read()

def through_client():
    with qvac.open("/models") as response:
        response.read()

for line in sys.stdin:
    order = line.strip()
    if order == "close":
        say(seconds=timed(qvac.close))
    elif order == "chat":
        say(seconds=timed(lambda: qvac.chat("x")))
    elif order == "request":
        say(client=timed(through_client), plain=timed(plain))
    elif order == "again":
        say(seconds=timed(lambda: qvac_managed.create_qvac("managed", **options).close()))
    elif order == "stream":
        say(delays=[time.monotonic() - float(piece) for piece in qvac.stream_chat("x")])
"""
CLIENT_JS = """
import { createInterface } from 'node:readline'
import { createQvac } from '@qvac/ai-sdk-provider'
const clock = () => performance.now() / 1000
const say = (facts) => process.stdout.write(JSON.stringify(facts) + '\\n')
let began = clock()
const qvac = await createQvac({ mode: 'managed', ...JSON.parse(process.argv[2]) })
const ready = Number(process.hrtime.bigint()) / 1e9
say({ inside: clock() - began, ready, url: qvac.baseURL, key: qvac.apiKey, pid: qvac.pid })
const prompt = [{ role: 'user', content: [{ type: 'text', text: 'x' }] }]
for await (const order of createInterface({ input: process.stdin })) {
  began = clock()
  if (order === 'close') await qvac.close()
  else if (order === 'again') await (await createQvac({ mode: 'managed', ...JSON.parse(process.argv[2]) })).close()
  else await qvac.languageModel('%s').doGenerate({ prompt })
  say({ seconds: clock() - began })
}
process.exit(0)
"""

# A process that listens on many ports and never accepts: what hung orphans look like.
HUNG_PY = """
import socket, sys, time
listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*[listener.getsockname()[1] for listener in listeners], flush=True)
time.sleep(3600)
"""


class BenchError(Exception):
    """A measurement could not be made; the text says why."""


class Row(NamedTuple):
    """One line of the table. `limit` bounds the ratio of the medians, or our median where `is_ratio` is false."""

    what: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    limit: Optional[float] = None
    is_ratio: bool = False
    note: str = ""

    @property
    def ratio(self) -> Optional[float]:
        if not self.ours or not self.theirs:
            return None
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def verdict(self) -> str:
        value = self.ratio if self.is_ratio else statistics.median(self.ours)
        if self.limit is None or value is None:
            return "-"
        return "ok" if value <= self.limit else "MISS"


# --- processes ---


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(RETRY_PAUSE)
    raise BenchError("waited %.0f s in vain for %s" % (PATIENCE, what))


def wait_until_ended(pid: int, what: str) -> None:
    wait_until(lambda: not is_alive(pid), what)


def read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    return read_file("/proc/%d/stat" % pid).rpartition(b")")[2].split()[:1] not in ([], [b"Z"], [b"X"])


def processes_with(*variables: str) -> List[int]:
    """Processes with all these NAME=VALUE in their environment."""
    wanted = {variable.encode() for variable in variables}
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if wanted <= set(read_file("/proc/%d/environ" % pid).split(b"\0"))]


def start_of(pid: int) -> str:
    """When a process started, in ticks after boot; "" if it is gone."""
    return b" ".join(read_file("/proc/%d/stat" % pid).rpartition(b")")[2].split()[19:20]).decode()


def end_all(mark: str) -> None:
    """Kill what carries the mark, until nothing does: a runner may be starting a serve this moment."""
    for _ in range(50):
        left = processes_with("%s=%s" % (MARK, mark))
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    """Time on a processor, of all threads, in nanosecond steps."""
    threads = os.listdir("/proc/%d/task" % pid)
    return sum(int(read_file("/proc/%d/task/%s/schedstat" % (pid, thread)).split()[0]) for thread in threads) / 1e9


def wake_ups(pid: int) -> int:
    lines = [line for thread in os.listdir("/proc/%d/task" % pid)
             for line in read_file("/proc/%d/task/%s/status" % (pid, thread)).splitlines()]  # fmt: skip
    return sum(int(line.split()[1]) for line in lines if line.startswith(b"voluntary_ctxt_switches"))


def memory(pid: int) -> Tuple[float, float]:
    """Resident and proportional set size in MB."""
    sizes = dict(line.split()[:2] for line in read_file("/proc/%d/smaps_rollup" % pid).splitlines()[1:])
    return int(sizes[b"Rss:"]) / 1024, int(sizes[b"Pss:"]) / 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def get_models(url: str, key: str) -> Dict[str, Any]:
    request = urllib.request.Request(url + "/models", headers={"Authorization": "Bearer " + key})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as response:
        answer: Dict[str, Any] = json.loads(response.read())
        return answer


# --- the two sides ---


class Home:
    """A home folder for one side, and the serves in it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.registry = os.path.join(folder, ".qvac", "managed-serves")
        os.makedirs(self.registry, mode=0o700)

    def record(self, url: str) -> Dict[str, Any]:
        for name in os.listdir(self.registry):
            if name.endswith(".json") and "params" not in name:
                record: Dict[str, Any] = json.loads(read_file(os.path.join(self.registry, name)) or "{}")
                if record.get("baseURL") == url:
                    return record
        raise BenchError("no record of %s in %s" % (url, self.registry))

    def stop(self, url: str) -> None:
        """End the serve with all that belongs to it."""
        record = self.record(url)
        os.kill(record["runnerPid"], signal.SIGTERM)
        for name in ("runnerPid", "servePid"):
            wait_until_ended(record[name], "the end of a " + name)

    def add_records(self, like: Dict[str, Any], serve_pid: int, runner_pid: int, ports: Sequence[int]) -> None:
        """Records of other serves, written as by the side whose record is `like`."""
        for index, port in enumerate(ports):
            key = "%016x" % index
            record = {**like, "fleetKey": key, "servePid": serve_pid, "runnerPid": runner_pid, "port": port,
                      "baseURL": "http://%s:%d/v1" % (HOST, port), "configPath": ""}  # fmt: skip
            if "serveStart" in like:
                record.update(serveStart=start_of(serve_pid), runnerStart=start_of(runner_pid) or "1")
            path = os.path.join(self.registry, key + ".json")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
                json.dump(record, file, indent=2)


class Client:
    """A process that holds a serve and takes orders."""

    def __init__(self, argv: Sequence[str], environ: Dict[str, str]) -> None:
        # Not in the folder of the project: what is imported is what has been installed.
        self.process = subprocess.Popen(argv, env=environ, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self.process.pid
        self.facts: Dict[str, Any] = {}

    def wait(self) -> Dict[str, Any]:
        self.facts = self._answer()
        return self.facts

    def ask(self, order: str) -> Dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(order.encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError("a client ended with exit code %s" % self.process.wait())
        answer: Dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Side:
    """Ours or theirs: how to run a program that uses it."""

    name = ""

    def __init__(self, work: str, mark: str) -> None:
        self.work, self.mark = work, mark
        self.homes = 0
        self._warm: Optional[Home] = None
        self.warm_record: Dict[str, Any] = {}

    def attach_argv(self, stub: str, idle: float) -> List[str]:
        raise NotImplementedError

    def client_argv(self, stub: str, idle: float) -> List[str]:
        raise NotImplementedError

    def new_home(self) -> Home:
        self.homes += 1
        return Home(os.path.join(self.work, "%s-%d" % (self.name, self.homes)))

    def environ(self, home: Home) -> Dict[str, str]:
        """As on a user's machine: what is compiled is kept, and no setting of whoever runs this leaks in."""
        return {"HOME": home.folder, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", MARK: self.mark}

    def run(self, argv: Sequence[str], home: Home) -> Tuple[float, str]:
        """Seconds and output of a whole process."""
        began = time.perf_counter()
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        environ = self.environ(home)
        done = subprocess.run(argv, env=environ, cwd="/", stdin=null, stdout=pipe, stderr=pipe, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            text = done.stderr.decode("utf-8", "replace")[-1000:]
            raise BenchError("%s: exit code %d\n%s" % (" ".join(argv)[:200], done.returncode, text))
        return seconds, done.stdout.decode().strip()

    def attach(self, home: Home, stub: str, idle: float = FOREVER) -> Tuple[float, str]:
        seconds, output = self.run(self.attach_argv(stub, idle), home)
        return seconds, output.split()[0]

    def client(self, home: Home, stub: str, idle: float = FOREVER) -> Client:
        return Client(self.client_argv(stub, idle), self.environ(home))

    def warm_home(self, stub: str) -> Home:
        """A home with a serve that lasts."""
        if self._warm is None:
            self._warm = self.new_home()
            self.warm_record = self._warm.record(self.attach(self._warm, stub)[1])
        return self._warm


class Ours(Side):
    name = "ours"

    def __init__(self, work: str, mark: str, module: str) -> None:
        super().__init__(work, mark)
        self.python = os.path.join(work, "venv", "bin", "python")
        self.module = module
        self.modules: List[str] = []  # what an attach imports
        self._install()

    def _install(self) -> None:
        """A copy of the project, so that nothing is written into it, built and installed as users do."""
        source = os.path.join(self.work, "source")
        os.mkdir(source)
        shutil.copy(self.module, os.path.join(source, "qvac_managed.py"))
        for name in ("pyproject.toml", "LICENSE"):
            shutil.copy(os.path.join(PROJECT, name), source)
        open(os.path.join(source, "README.md"), "w").close()
        environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", MARK: self.mark}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        for argv in ([sys.executable, "-m", "venv", os.path.join(self.work, "venv")],
                     [self.python, "-m", "pip", "install", "--quiet", source]):  # fmt: skip
            if subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, check=False).returncode:
                raise BenchError("the environment could not be made: %s" % " ".join(argv))

    def options(self, stub: str, idle: float) -> Dict[str, Any]:
        return {"models": [MODEL], "serve_bin_path": stub, "serve_idle_timeout": idle}

    def attach_argv(self, stub: str, idle: float) -> List[str]:
        return [self.python, "-c", ATTACH_PY % self.options(stub, idle)]

    def client_argv(self, stub: str, idle: float) -> List[str]:
        return [self.python, "-c", CLIENT_PY, json.dumps([self.options(stub, idle), self.modules])]

    def find_modules(self, stub: str) -> None:
        """What is imported in a process that attaches, to import it ahead where only the attaching is timed."""
        code = ATTACH_PY % self.options(stub, FOREVER) + "import sys; print(*sys.modules)"
        names = self.run([self.python, "-c", code], self.warm_home(stub))[1].split("\n")[1].split()
        self.modules = [name for name in names if name != "__main__"]


class Copied(Side):
    """Ours where nothing may be compiled to disk: a copy of the file, whole or up to the cut."""

    def __init__(self, work: str, mark: str, ours: Ours, is_cut: bool) -> None:
        super().__init__(work, mark)
        self.name, self.ours, self.folder = "cut" if is_cut else "plain", ours, os.path.join(work, "copy-%d" % is_cut)
        os.mkdir(self.folder)
        with open(ours.module, encoding="utf-8") as file:
            text = file.read()
        with open(os.path.join(self.folder, "qvac_managed.py"), "w", encoding="utf-8") as file:
            file.write(text[: text.index("# -- The library ends here")] if is_cut else text)

    def environ(self, home: Home) -> Dict[str, str]:
        return {**super().environ(home), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": self.folder}

    def attach_argv(self, stub: str, idle: float) -> List[str]:
        # The environment's own copy is compiled, so it must not be found first: PYTHONPATH is.
        return self.ours.attach_argv(stub, idle)

    def client_argv(self, stub: str, idle: float) -> List[str]:
        return self.ours.client_argv(stub, idle)


class Theirs(Side):
    name = "theirs"

    def __init__(self, work: str, mark: str, folder: str) -> None:
        super().__init__(work, mark)
        modules = os.path.join(os.path.abspath(folder), "node_modules")
        self.node = os.path.realpath(os.path.join(modules, ".bin", "node"))
        manifest = os.path.join(modules, "@qvac", "ai-sdk-provider", "package.json")
        if not os.path.exists(self.node) or not os.path.exists(manifest):
            raise BenchError("%s has no provider; to get it:\n%s" % (folder, (__doc__ or "").split("\n\n")[3]))
        self.version = json.loads(read_file(manifest))["version"]
        os.symlink(modules, os.path.join(work, "node_modules"))  # found beside the scripts
        self.scripts = [self._write("attach.mjs", ATTACH_JS), self._write("client.mjs", CLIENT_JS % MODEL)]

    def _write(self, name: str, text: str) -> str:
        path = os.path.join(self.work, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def _argv(self, script: str, stub: str, idle: float) -> List[str]:
        options = {"models": [{"name": MODEL}], "serveBinPath": stub, "serveIdleTimeout": idle * 1000}
        return [self.node, script, json.dumps(options)]

    def attach_argv(self, stub: str, idle: float) -> List[str]:
        return self._argv(self.scripts[0], stub, idle)

    def client_argv(self, stub: str, idle: float) -> List[str]:
        return self._argv(self.scripts[1], stub, idle)


# --- rows ---


class Bench:
    """The measurements. Each method is a row of the same name, and yields one or more lines of the table."""

    def __init__(self, work: str, mark: str, ours: Ours, theirs: Optional[Theirs], runs: int, quick: bool) -> None:
        self.work, self.mark = work, mark
        self.ours, self.theirs = ours, theirs
        self.sides: List[Side] = [ours, theirs] if theirs else [ours]
        self.plain, self.cut = Copied(work, mark, ours, False), Copied(work, mark, ours, True)
        self.runs, self.quick = runs, quick
        self.stub = self._write_stub("qvac", STUB_DELAY)
        self._raw: List[float] = []

    def _write_stub(self, name: str, delay: float) -> str:
        path = os.path.join(self.work, name)
        # Not the environment's: its interpreter would look for the base installation first.
        python = os.path.realpath(sys.executable)
        with open(path, "w", encoding="utf-8") as file:
            file.write(STUB % {"python": python, "model": MODEL, "delay": delay})
        os.chmod(path, 0o755)
        return path

    def alternate(self, measure: Callable[[Side], float], runs: Optional[int] = None, *more: Side,
                  ) -> Dict[str, List[float]]:  # fmt: skip
        """The measurements of each side, taken in turns; each turn another side is first."""
        sides = [*self.sides, *more]
        found: Dict[str, List[float]] = {"ours": [], "theirs": [], **{side.name: [] for side in more}}
        for side in sides:
            measure(side)  # what is cold but once: the file cache, the compiled files
        for turn in range(runs or self.runs):
            for side in sides if turn % 2 else sides[::-1]:
                found[side.name].append(measure(side))
        return found

    def raw_start(self) -> float:
        """Seconds from the stub's spawn to its listening, without anybody to manage it."""
        port, key = free_port(), "raw"
        argv = [self.stub, "serve", "--config", "/dev/null", "--port", str(port), "--host", HOST, "--api-key", key]
        began = time.monotonic()
        process = subprocess.Popen(argv, env=self.ours.environ(self.ours.warm_home(self.stub)))

        def listening() -> Any:
            try:
                return get_models("http://%s:%d/v1" % (HOST, port), key)["listening"]
            except OSError:
                return None

        try:
            return float(wait_until(listening, "the stub")) - began
        finally:
            process.kill()
            process.wait()

    def raw(self) -> float:
        if not self._raw:
            self._raw = [self.raw_start() for _ in range(self.runs + 1)][1:]
        return statistics.median(self._raw)

    def attach(self) -> Iterator[Row]:
        times = self.alternate(
            lambda side: side.attach(side.warm_home(self.stub), self.stub)[0], None, self.plain, self.cut)
        yield ratio("warm attach, whole process", "ms", times, 0.33)
        yield ratio("... plain", "ms", times, 0.62, "plain")
        yield ratio("... plain, the library alone", "ms", times, 0.50, "cut")
        home = self.ours.warm_home(self.stub)
        url = self.ours.attach(home, self.stub)[1]
        key = home.record(url)["apiKey"]
        before = get_models(url, key)["looks"]
        self.ours.attach(home, self.stub)
        yield Row("requests that a warm attach makes", "", [get_models(url, key)["looks"] - before - 1], limit=1)

    def inside(self) -> Iterator[Row]:
        self.ours.find_modules(self.stub)

        def measure(side: Side) -> float:
            client = side.client(side.warm_home(self.stub), self.stub)
            seconds = client.wait()["inside"]
            client.end()
            return float(seconds)

        yield absolute("warm attach, create_qvac alone, imports apart", "ms", self.alternate(measure), 0.010)
        clients = {side.name: side.client(side.warm_home(self.stub), self.stub) for side in self.sides}
        for client in clients.values():
            client.wait()
        times = self.alternate(lambda side: float(clients[side.name].ask("again")["seconds"]))
        yield ratio("a second attach in one process, and its close", "ms", times, 0.60)
        for client in clients.values():
            client.end()

    def file(self) -> Iterator[Row]:
        """The command line on a warm serve: compiled anew each time, or from what is compiled."""
        home = self.ours.warm_home(self.stub)
        path = os.path.join(self.work, "copied", "qvac_managed.py")
        os.mkdir(os.path.dirname(path))
        shutil.copy(self.ours.module, path)
        command = ["up", MODEL, "--bin", self.stub, "--idle-timeout", "%d" % FOREVER]
        for what, start in (("python -m qvac_managed up, warm", ["-m", "qvac_managed"]),
                            ("python qvac_managed.py up, warm: compiled anew", [path])):  # fmt: skip
            argv = [self.ours.python, *start, *command]

            def measure(side: Side, argv: List[str] = argv) -> float:
                if side is self.ours:
                    return side.run(argv, home)[0]
                return side.attach(side.warm_home(self.stub), self.stub)[0]

            yield ratio(what, "ms", self.alternate(measure), None)

    def cold(self) -> Iterator[Row]:
        homes = {side.name: side.new_home() for side in [*self.sides, self.plain]}
        raw: List[float] = []
        inside: Dict[str, List[float]] = {"ours": [], "theirs": []}

        def whole(side: Side) -> float:
            raw.append(self.raw_start())
            seconds, url = side.attach(homes[side.name], self.stub)
            homes[side.name].stop(url)
            return seconds

        def within(side: Side) -> float:
            client = side.client(homes[side.name], self.stub)
            facts = client.wait()
            client.end()
            homes[side.name].stop(facts["url"])
            return float(facts["inside"])

        times, inside = self.alternate(whole, None, self.plain), self.alternate(within)
        base = statistics.median(raw)
        yield Row("raw serve, spawn to listening", "ms", raw)
        yield ratio("cold start over the raw serve, whole process", "ms", less(times, base), None)
        yield ratio("... plain", "ms", less(times, base), 0.22, "plain")
        yield ratio("cold start over the raw serve, create_qvac alone", "ms", less(inside, base), 0.12)

    def slow(self) -> Iterator[Row]:
        """How soon all know that a serve is up after it has loaded for long, and what the waiting costs."""
        delay = SLOW_DELAY / 5 if self.quick else SLOW_DELAY
        stub = self._write_stub("slow-qvac", delay)
        lags: Dict[str, List[float]] = {"ours": [], "theirs": []}
        late: Dict[str, List[float]] = {"ours": [], "theirs": []}
        busy: Dict[str, List[float]] = {"ours": [], "theirs": []}
        for _ in range(1 if self.quick else 3):
            for side in self.sides:
                home = side.new_home()
                clients = [side.client(home, stub), side.client(home, stub)]
                time.sleep(delay / 2)
                pids = [pid for pid in processes_with("%s=%s" % (MARK, self.mark), "HOME=" + home.folder)
                        if stub.encode() not in read_file("/proc/%d/cmdline" % pid).split(b"\0")[:2]]  # fmt: skip
                before, began = [cpu_seconds(pid) for pid in pids], time.monotonic()
                time.sleep(delay / 4)
                spent = sum(cpu_seconds(pid) for pid in pids) - sum(before)
                busy[side.name].append(100 * spent / (time.monotonic() - began))
                ready = sorted(client.wait()["ready"] for client in clients)
                listening = get_models(clients[0].facts["url"], clients[0].facts["key"])["listening"]
                lags[side.name].append(ready[0] - listening)
                late[side.name].append(ready[1] - listening)
                for client in clients:
                    client.end()
                home.stop(clients[0].facts["url"])
        what = "%.0f s of loading: listening to attached, the " % delay
        yield Row(what + "first", "ms", lags["ours"], lags["theirs"], 0.1)
        yield Row(what + "last", "ms", late["ours"], late["theirs"], 0.1)
        yield Row("... CPU of runner and both waiting clients", "%", busy["ours"], busy["theirs"], 2.0)

    def memory(self) -> Iterator[Row]:
        found: Dict[str, List[List[float]]] = {"ours": [], "theirs": [], "plain": []}
        for _ in range(3):
            for side in [*self.sides, self.plain]:
                home = side.new_home()
                client = side.client(home, self.stub)
                client.wait()
                time.sleep(3.0)  # three ticks and more: what it needs in the long run
                runner = home.record(client.facts["url"])["runnerPid"]
                children = [pid for pid in self._children(runner) if pid != client.facts["pid"]]
                resident, proportional = memory(runner)
                found[side.name].append([resident, proportional, proportional + sum(memory(c)[1] for c in children)])
                client.end()
                home.stop(client.facts["url"])
        labels = ("runner, resident", "runner, proportional share", "... with its watchdog")
        for index, label in enumerate(labels):
            columns = {name: [sizes[index] for sizes in samples] for name, samples in found.items()}
            yield Row(label, "MB", columns["ours"], columns["theirs"], 0.30 if index else 0.24, True)
            if not index:
                yield Row("... plain", "MB", columns["plain"], columns["theirs"], 0.27, True)

    @staticmethod
    def _children(pid: int) -> List[int]:
        return [int(child) for child in read_file("/proc/%d/task/%d/children" % (pid, pid)).split()]

    def idle(self) -> Iterator[Row]:
        """Runners without work, with a client that holds the serve and without, all in the same minute."""
        seconds = 10.0 if self.quick else 60.0
        watched: List[Tuple[Side, bool, List[int]]] = []
        clients = []
        for held in (True, False):
            for side in self.sides:
                home = side.new_home()
                client = side.client(home, self.stub)
                client.wait()
                clients.append(client)
                runner = home.record(client.facts["url"])["runnerPid"]
                others = [pid for pid in self._children(runner) if pid != client.facts["pid"]]
                watched.append((side, held, [runner, *others]))
                if not held:
                    client.ask("close")
        time.sleep(3.0)
        before = [(sum(map(cpu_seconds, pids)), sum(map(wake_ups, pids))) for _, _, pids in watched]
        time.sleep(seconds)
        for held in (True, False):
            usage: Dict[str, List[float]] = {"ours": [], "theirs": []}
            wakes: Dict[str, List[float]] = {"ours": [], "theirs": []}
            for (side, is_held, pids), (cpu, wakings) in zip(watched, before):
                if is_held == held:
                    usage[side.name].append(100 * (sum(map(cpu_seconds, pids)) - cpu) / seconds)
                    wakes[side.name].append((sum(map(wake_ups, pids)) - wakings) / seconds)
            how = "with a client" if held else "without clients"
            yield Row("runner at rest for %.0f s, %s" % (seconds, how), "%", usage["ours"], usage["theirs"], 0.1)
            yield Row("... wake-ups per second", "", wakes["ours"], wakes["theirs"])
        for client in clients:
            client.end()

    def many(self) -> Iterator[Row]:
        """So many processes start at once: when the last of them is ready, from the spawn of the first."""
        single = self.alternate(self._cold_once, 7)
        yield Row("1 process, cold", "ms", single["ours"], single["theirs"])
        for count in (50, 200):
            bare: List[float] = []
            last: Dict[str, List[float]] = {"ours": [], "theirs": []}
            for _ in range(1 if self.quick or count > 50 else 5):
                bare.append(self._bare_at_once(count))
                for side in self.sides:
                    if side is self.ours or count == 50:
                        last[side.name].append(self._many_at_once(side, count))
            limit = 2 * statistics.median(single["ours"]) + statistics.median(bare) if count == 50 else None
            yield Row("%d interpreters at once, with their imports" % count, "ms", bare)
            yield Row("%d processes at once: the last is ready, one serve, no failure" % count, "ms",
                      last["ours"], last["theirs"], limit,
                      note="twice a single start + the interpreters" if limit else "")  # fmt: skip

    def _cold_once(self, side: Side) -> float:
        home = side.new_home()
        seconds, url = side.attach(home, self.stub)
        home.stop(url)
        return seconds

    def _bare_at_once(self, count: int) -> float:
        code = "import time, urllib.request, qvac_managed; print('', time.monotonic())"
        return self._at_once([self.ours.python, "-c", code], count, self.ours.new_home())[0]

    def _many_at_once(self, side: Side, count: int) -> float:
        home = side.new_home()
        seconds, urls = self._at_once(side.attach_argv(self.stub, FOREVER), count, home)
        if len(set(urls)) != 1:
            raise BenchError("%s: %d processes have got %d serves" % (side.name, count, len(set(urls))))
        home.stop(urls[0])
        return seconds

    def _at_once(self, argv: Sequence[str], count: int, home: Home) -> Tuple[float, List[str]]:
        """Seconds until the last of so many processes was ready, and the URLs they print; each must end well."""
        environ = self.ours.environ(home)
        began = time.monotonic()
        processes = [subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                     for _ in range(count)]  # fmt: skip
        words = [process.communicate()[0].decode().split(" ") for process in processes]
        failed = sum(process.returncode != 0 for process in processes)
        if failed:
            raise BenchError("%d of %d processes failed" % (failed, count))
        return max(float(ready) for _, ready in words) - began, [url for url, _ in words]

    def records(self) -> Iterator[Row]:
        homes = {}
        for side in self.sides:
            # Alive on paper, so that nobody sweeps them: serve and runner are this process.
            homes[side.name] = side.new_home()
            side.warm_home(self.stub)
            homes[side.name].add_records(side.warm_record, os.getpid(), os.getpid(), range(20000, 21000))

        few: List[float] = []

        def measure(side: Side) -> float:
            if side is self.ours:
                few.append(side.attach(side.warm_home(self.stub), self.stub)[0])
            return side.attach(homes[side.name], self.stub)[0]

        times = self.alternate(measure)
        yield ratio("warm attach among 1,000 records, whole process", "ms", times, 0.40)
        more = [many - one for one, many in zip(few[1:], times["ours"])]
        yield Row("... more than among one, pairwise", "ms", more, limit=0.002)

    def orphans(self) -> Iterator[Row]:
        """50 live serves without a runner that never answer, met by a cold start."""
        ended = subprocess.Popen(["/bin/true"])
        ended.wait()
        delays: Dict[str, List[float]] = {"ours": [], "theirs": []}
        usual = statistics.median(self._cold_once(self.ours) for _ in range(5))
        for _ in range(1 if self.quick else 3):
            delays["ours"].append(self._cold_among_orphans(self.ours, 50, ended.pid) - usual)
        yield Row("50 hung orphans: delay of a cold start", "ms", delays["ours"], limit=2.2,
                  note="one health timeout, 2 s, and a tenth")  # fmt: skip
        if self.theirs:
            delays["theirs"].append(self._cold_among_orphans(self.theirs, 5, ended.pid) - self._cold_once(self.theirs))
            few = self._cold_among_orphans(self.ours, 5, ended.pid) - usual
            yield Row("5 hung orphans (50 would take the provider 100 s)", "ms", [few], delays["theirs"])

    def _cold_among_orphans(self, side: Side, count: int, dead_pid: int) -> float:
        side.warm_home(self.stub)
        home = side.new_home()
        hung = subprocess.Popen([sys.executable, "-IS", "-c", HUNG_PY, str(count)], env=side.environ(home),
                                stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
        assert hung.stdout is not None
        with hung.stdout as pipe:
            home.add_records(side.warm_record, hung.pid, dead_pid, [int(port) for port in pipe.readline().split()])
        seconds, url = side.attach(home, self.stub)
        hung.kill()
        hung.wait()
        home.stop(url)
        return seconds

    def reap(self) -> Iterator[Row]:
        timeout = 1.0

        def measure(side: Side) -> float:
            home = side.new_home()
            client = side.client(home, self.stub, timeout)
            client.wait()
            client.ask("close")
            closed = time.monotonic()
            wait_until_ended(client.facts["pid"], "a reap")
            client.end()
            return time.monotonic() - closed - timeout

        times = self.alternate(measure, 3 if self.quick else 7)
        yield absolute("serve gone after its idle timeout", "ms", times, 1.5)

    def close(self) -> Iterator[Row]:
        def measure(side: Side) -> float:
            client = side.client(side.warm_home(self.stub), self.stub)
            client.wait()
            seconds = client.ask("close")["seconds"]
            client.end()
            return float(seconds)

        yield absolute("close()", "ms", self.alternate(measure), 0.001)

    def restart(self) -> Iterator[Row]:
        """The serve is killed; a client asks at once and is made to wait for the next."""
        back: List[float] = []
        raw = self.raw()

        def measure(side: Side) -> float:
            home = side.new_home()
            client = side.client(home, self.stub)
            facts = client.wait()
            time.sleep(0.3)
            killed = time.monotonic()
            os.kill(facts["pid"], signal.SIGKILL)
            if side is self.theirs:
                # Its runner has to notice first: while it has not, its client attaches to a corpse or waits for it.
                time.sleep(0.1)
            seconds = client.ask("chat")["seconds"]
            if side is self.ours:
                back.append(get_models(facts["url"], facts["key"])["listening"] - killed - raw)
            client.end()
            end_all_of(self.mark, home)
            return float(seconds)

        times = self.alternate(measure, 5 if self.quick else 15)
        yield Row("restarted serve, same URL, back over a raw start", "ms", back[1:], limit=0.15)
        yield Row("... one request of a client meanwhile", "ms", times["ours"], times["theirs"])

    def imports(self) -> Iterator[Row]:
        home = self.ours.new_home()

        def measure(code: str) -> float:
            return self.ours.run([self.ours.python, "-c", code], home)[0]

        pairs = [(measure("pass"), measure("import qvac_managed")) for _ in range(2 * self.runs + 1)][1:]
        yield Row("bare interpreter", "ms", [bare for bare, _ in pairs])
        yield Row("import qvac_managed over it, pairwise", "ms", [full - bare for bare, full in pairs], limit=0.015)

    def request(self) -> Iterator[Row]:
        client = self.ours.client(self.ours.warm_home(self.stub), self.stub)
        client.wait()
        pairs = [client.ask("request") for _ in range(20 * self.runs)][5:]
        client.end()
        yield Row("GET /models with plain urllib", "ms", [pair["plain"] for pair in pairs])
        more = statistics.median(pair["client"] for pair in pairs) - statistics.median(pair["plain"] for pair in pairs)
        yield Row("open() over plain urllib", "ms", [more], limit=0.0003)

    # -- the front

    def _through_and_straight(self, home: Home) -> Tuple[Address, Address]:
        """The public address and key of the warm serve, and its own behind the front."""
        record = home.record(self.ours.attach(home, self.stub)[1])
        argv = read_file("/proc/%d/cmdline" % record["servePid"]).decode().split("\0")
        given = dict(zip(argv, argv[1:]))
        inner = read_file(given["--api-key-file"]).decode().strip()
        return Address(record["port"], record["apiKey"]), Address(int(given["--port"]), inner)

    def front(self) -> Iterator[Row]:
        home = self.ours.warm_home(self.stub)
        through, straight = self._through_and_straight(home)
        runner = home.record("http://%s:%d/v1" % (HOST, through.port))["runnerPid"]
        for body, what, limit in ((b"", "GET /v1/models", 0.0006), (b"{}", "POST, a small answer", 0.0006)):
            path = "/v1/chat/completions" if body else "/v1/models"
            pairs = [(straight.seconds(path, body), through.seconds(path, body)) for _ in range(20 * self.runs)][9:]
            more = statistics.median(b for _, b in pairs) - statistics.median(a for a, _ in pairs)
            yield Row("%s, straight to the serve" % what, "ms", [pair[0] for pair in pairs])
            yield Row("... through the front: more", "ms", [more], limit=limit)
        turns = 3 if self.quick else 9
        for path, body, what, limit in (
            ("/paced/18000-6000-60", b"", "a stream of 6,000 events a second", 1 / 0.95),
            ("/v1/chat/completions", bytes(100 << 20), "100 MB uploaded", 1 / 0.75),
        ):
            pairs = [(straight.seconds(path, body), through.seconds(path, body)) for _ in range(turns)]
            yield Row("%s: through the front, against straight" % what, "ms", [pair[1] for pair in pairs],
                      [pair[0] for pair in pairs], limit, True)  # fmt: skip
        lengths = self._at_once_in_threads(200, lambda: through.read("/paced/300-100-60"))
        yield Row("200 streams at once: broken off", "", [sum(length < 300 * 68 for length in lengths)], limit=0)
        before = memory(runner)[0]
        readers = [through.connect("/paced/100000-1000000-60") for _ in range(200)]
        time.sleep(3.0)
        yield Row("200 readers that do not read: more in the runner", "MB", [memory(runner)[0] - before], limit=110)
        took = [through.seconds("/v1/models", b"") for _ in range(20)]
        yield Row("... a request of another meanwhile", "ms", took)
        for reader in readers:
            reader.close()
        idle = [through.kept() for _ in range(1000)]  # each has shown the key, once
        took = [through.seconds("/v1/models", b"") for _ in range(20)]
        yield Row("1,000 idle connections: a request of another", "ms", took)
        for sock in idle:
            sock.setblocking(False)
        closed = sum(self._is_closed(sock) for sock in idle)
        yield Row("... closed within that time", "", [closed], limit=0)
        for sock in idle:
            sock.close()

    @staticmethod
    def _is_closed(sock: socket.socket) -> bool:
        try:
            return not sock.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @staticmethod
    def _at_once_in_threads(count: int, action: Callable[[], Any]) -> List[Any]:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return [future.result() for future in [pool.submit(action) for _ in range(count)]]

    def killed(self) -> Iterator[Row]:
        """1,000 requests of programs that know nothing but the address, while the serve is killed four times."""
        home = self.ours.new_home()
        client = self.ours.client(home, self.stub)
        url = client.wait()["url"]
        record = home.record(url)
        through, stop = Address(record["port"], record["apiKey"]), threading.Event()
        kills: List[int] = []

        def kill() -> None:
            while not stop.wait(KILL_PAUSE):
                pid = home.record(url)["servePid"]
                if pid != record["runnerPid"]:
                    os.kill(pid, signal.SIGKILL)
                    kills.append(pid)

        def ask(_: int) -> str:
            time.sleep(0.045)
            try:
                return "answered" if b'"ok"' in through.read_all("/v1/chat/completions", b"{}") else "broken off"
            except ConnectionRefusedError:
                return "refused"
            except OSError:
                return "broken off"

        killer = threading.Thread(target=kill)
        killer.start()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(ask, range(1000)))
        stop.set()
        killer.join()
        yield Row("1,000 requests under kills of the serve: refused", "", [results.count("refused")], limit=0)
        yield Row("... broken off", "", [results.count("broken off")], note="%d kills" % len(kills))
        client.end()
        home.stop(url)

    def asleep(self) -> Iterator[Row]:
        """What is left of a serve that sleeps, what that costs, and what a wake takes beyond the serve's own start."""
        home = self.ours.new_home()
        client = self.ours.client(home, self.stub)
        url = client.wait()["url"]
        record = home.record(url)
        runner, through = record["runnerPid"], Address(record["port"], record["apiKey"])
        wakes: List[float] = []
        command = [self.ours.python, "-m", "qvac_managed", "sleep", record["fleetKey"]]
        for _ in range(self.runs):
            self.ours.run(command, home)
            wakes.append(through.seconds("/v1/chat/completions", b"{}") - self.raw_start())
        self.ours.run(command, home)
        time.sleep(3.0)
        cpu, seconds = cpu_seconds(runner), 8.0
        time.sleep(seconds)
        yield Row("asleep: the runner, all that is left", "MB", [memory(runner)[0]], limit=14)
        yield Row("... its children", "", [len(self._children(runner))], limit=0)
        yield Row("... its processor time", "%", [100 * (cpu_seconds(runner) - cpu) / seconds], limit=0.1)
        yield Row("a wake by a request, over the raw serve", "ms", wakes, limit=0.1)
        client.end()
        home.stop(url)

    def stream(self) -> Iterator[Row]:
        client = self.ours.client(self.ours.warm_home(self.stub), self.stub)
        client.wait()
        delays = [client.ask("stream")["delays"] for _ in range(self.runs)]
        client.end()
        yield Row("streamed token: sent to received, the first", "ms", [pieces[0] for pieces in delays], limit=0.005)
        yield Row("... the later ones", "ms", [delay for pieces in delays for delay in pieces[1:]], limit=0.005)


class Address(NamedTuple):
    """Where to send what, by a program that knows nothing else; one connection for each request."""

    port: int
    key: str

    def connect(self, path: str, body: bytes = b"") -> socket.socket:
        sock = socket.create_connection((HOST, self.port), PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = "%s %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nConnection: close\r\n"
        head = head % ("POST" if body else "GET", path, self.key) + "Content-Length: %d\r\n\r\n" % len(body)
        sock.sendall(head.encode() + body)
        return sock

    def kept(self) -> socket.socket:
        """A connection that stays after its first request."""
        sock = socket.create_connection((HOST, self.port), PATIENCE)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % self.key.encode())
        if not sock.recv(65536):
            raise BenchError("a kept connection was closed at its first request")
        return sock

    def read_all(self, path: str, body: bytes = b"") -> bytes:
        with self.connect(path, body) as sock:
            return b"".join(iter(lambda: sock.recv(1 << 18), b""))

    def read(self, path: str) -> int:
        return len(self.read_all(path))

    def seconds(self, path: str, body: bytes) -> float:
        began = time.perf_counter()
        self.read_all(path, body)
        return time.perf_counter() - began


ROWS: Dict[str, Callable[[Bench], Iterator[Row]]] = {
    "attach": Bench.attach, "inside": Bench.inside, "file": Bench.file, "cold": Bench.cold, "slow": Bench.slow,
    "memory": Bench.memory, "idle": Bench.idle, "many": Bench.many, "records": Bench.records,
    "orphans": Bench.orphans, "reap": Bench.reap, "close": Bench.close, "restart": Bench.restart,
    "import": Bench.imports, "request": Bench.request, "stream": Bench.stream, "front": Bench.front,
    "killed": Bench.killed, "asleep": Bench.asleep,
}  # fmt: skip


def ratio(what: str, unit: str, times: Dict[str, List[float]], limit: Optional[float], side: str = "ours") -> Row:
    return Row(what, unit, times[side], times["theirs"], limit, True)


def absolute(what: str, unit: str, times: Dict[str, List[float]], limit: float) -> Row:
    return Row(what, unit, times["ours"], times["theirs"], limit)


def less(times: Dict[str, List[float]], base: float) -> Dict[str, List[float]]:
    return {name: [seconds - base for seconds in samples] for name, samples in times.items()}


def end_all_of(mark: str, home: Home) -> None:
    for pid in processes_with("%s=%s" % (MARK, mark), "HOME=" + home.folder):
        os.kill(pid, signal.SIGKILL)


# --- the table ---

COLUMNS = ("", "ours", "provider", "ratio", "target", "")


def spread(samples: Sequence[float], unit: str) -> str:
    if not samples:
        return ""
    scaled = sorted(1000 * sample if unit == "ms" else sample for sample in samples)
    middle = statistics.median(scaled)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2 if unit else 1
    text = "%.*f%s" % (digits, middle, " " + unit if unit else "")
    if len(scaled) > 2:
        text += " (%.*f-%.*f)" % (digits, scaled[len(scaled) // 10], digits, scaled[-1 - len(scaled) // 10])
    return text


def cells(row: Row) -> List[str]:
    target = ""
    if row.limit is not None:
        target = "<= " + ("%.2f" % row.limit if row.is_ratio else spread([row.limit], row.unit))
    share = "%.2f" % row.ratio if row.ratio is not None else "not measured" if row.is_ratio else ""
    return [row.what, spread(row.ours, row.unit), spread(row.theirs, row.unit), share,
            target + (" (%s)" % row.note if row.note else ""), row.verdict]  # fmt: skip


def machine(theirs: Optional[Theirs]) -> str:
    lines = read_file("/proc/cpuinfo").decode("ascii", "replace").splitlines()
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = ["%d cores %s, %.0f GB, Linux %s" % (os.cpu_count() or 1, (model or [platform.machine()])[0], gigabytes,
                                                platform.release().split("-")[0]),
             "Python %s" % platform.python_version()]  # fmt: skip
    if theirs:
        node = subprocess.run([theirs.node, "--version"], stdout=subprocess.PIPE, check=True).stdout.decode().strip()
        parts.append("Node.js %s, provider %s" % (node[1:], theirs.version))
    else:
        parts.append("provider not installed: no ratios (--help tells how to get it)")
    return "; ".join(parts)


def show(row: Row, as_markdown: bool) -> None:
    if as_markdown:
        print("| %s |" % " | ".join(cells(row)), flush=True)
    else:
        print("%-62s %-26s %-26s %-6s %-10s %s" % tuple(cells(row)), flush=True)


def print_head(theirs: Optional[Theirs], as_markdown: bool) -> None:
    command = " ".join([".ci/bench.py", *sys.argv[1:]])
    print("%s; %s; load %.1f; `%s`\n" % (datetime.date.today(), machine(theirs), os.getloadavg()[0], command))
    if as_markdown:
        print("| %s |\n|%s" % (" | ".join(COLUMNS), "---|" * len(COLUMNS)), flush=True)
    else:
        print("%-62s %-26s %-26s %-6s %-10s %s" % COLUMNS, flush=True)


def measure_all(options: argparse.Namespace, work: str, mark: str) -> int:
    theirs = Theirs(work, mark, options.provider) if options.provider else None
    bench = Bench(work, mark, Ours(work, mark, options.module), theirs, options.runs, options.quick)
    print_head(theirs, options.markdown)
    missed = 0
    for name in options.only or ROWS:
        try:
            for row in ROWS[name](bench):
                show(row, options.markdown)
                missed += row.verdict == "MISS"
        except BenchError as error:
            missed += 1
            print("%s: FAILED: %s" % (name, error), flush=True)
    if not theirs:
        print("\nNo provider, so no ratio was measured. " + (__doc__ or "").split("\n\n")[2])
    return 1 if missed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", metavar="DIR", default=os.environ.get("QVAC_TEST_PROVIDER"))
    parser.add_argument("--only", metavar="ROW", nargs="+", choices=list(ROWS), help="of: " + " ".join(ROWS))
    parser.add_argument("--runs", metavar="N", type=int, help="turns per row, 30 or with --quick 8")
    parser.add_argument("--quick", action="store_true", help="fewer turns, shorter rests")
    parser.add_argument("--markdown", action="store_true", help="a table for the README")
    parser.add_argument("--module", metavar="FILE", default=os.path.join(PROJECT, "qvac_managed.py"))
    options = parser.parse_args(argv)
    options.runs = options.runs or (8 if options.quick else 30)
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    mark = "%d-%s" % (os.getpid(), os.urandom(6).hex())
    work = os.path.realpath(tempfile.mkdtemp(prefix="qvac-bench-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return measure_all(options, work, mark)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # let the cleaning up come to its end
        end_all(mark)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
