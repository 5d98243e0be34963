#!/usr/bin/env python3
"""A soak: clients that attach, chat, close, crash and freeze at random, while SIGKILL and SIGSTOP are thrown
at serves, runners and clients. Linux, standard library only.

    python .ci/soak.py --minutes 30 [--seed N] [--clients N] [--provider FOLDER]

All serves are echo serves. With --provider (a folder with @qvac/ai-sdk-provider in node_modules) some of the
clients are JavaScript ones that share them. Checked all along: answers are right; errors are typed or those
that a killed serve explains; one live serve for each key; in calm spells, when nothing is thrown, nothing
fails. At the end: no process, no file but guard, logs and errors, no API key outside the files that may hold
one. Prints counts; exits 1 if anything was violated.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Dict, List, Optional, Set

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULE = os.path.join(ROOT, "qvac_managed.py")
TAG = "QVAC_SOAK_TAG"
MODELS = ("qwen3.5-2b", "qwen3.5-4b", "gpt-oss-20b")
IDLE = 2.0  # seconds: short, so that reaps race attaches all the time
CALM_EVERY, CALM_FOR, SETTLE = 60.0, 14.0, 7.0  # seconds; what fails after SETTLE of a calm spell is a violation
DOUBLE_FOR = 8.0  # seconds two live serves of one key are explained by a runner that was killed or frozen
LAST_WAIT = 60.0  # seconds until everything has to be gone

PYTHON_CLIENT = r"""
import json, os, random, signal, socket, sys, threading, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import qvac_managed as q
serve, seed, models, idle = sys.argv[2], int(sys.argv[3]), sys.argv[4].split(","), float(sys.argv[5])
r = random.Random(seed)
def say(**event):
    sys.stdout.write(json.dumps(dict(event, at=time.time())) + "\n"); sys.stdout.flush()
def name(error):
    reason = getattr(error, "reason", None)
    return type(reason if isinstance(reason, BaseException) else error).__name__
def stall(client):
    body = json.dumps({"model": client.models()[0]["id"], "stream": True, "messages": [
        {"role": "user", "content": "w " * 50000}]}).encode()
    with socket.create_connection(("127.0.0.1", client.port)) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
                     b"Content-Length: %d\r\n\r\n" % (client.api_key.encode(), len(body)) + body)
        time.sleep(r.random() * 3)
    say(event="stalled")
def chat(client):
    words = " ".join("w%d" % r.randrange(1000) for _ in range(r.randrange(1, 6)))
    try:
        how = r.random()
        if how < 0.1:  # a reader that goes away in the middle
            with client.stream_chat(words) as stream:
                next(iter(stream), "")
            return say(event="aborted")
        if how < 0.15:  # one that does not read
            return stall(client)
        got = client.chat(words) if how < 0.6 else "".join(client.stream_chat(words))
        say(event="chat" if got == words else "wrong", got=got, wanted=words)
    except Exception as error:
        say(event="chat-error", error=name(error), text=str(error)[:300])
for _ in range(r.randrange(5, 40)):
    began = time.time()
    try:
        client = q.create_qvac("managed", models=[r.choice(models)], serve_bin_path=serve, serve_idle_timeout=idle,
                               serve_sleep_timeout=r.choice((0.05, 0.3, 900)), serve_start_timeout=30,
                               reuse=None if r.random() < 0.9 else False)
    except q.QvacManagedModeError as error:
        say(event="create-error", error=name(error), text=str(error)[:300], took=time.time() - began)
        continue
    except BaseException as error:
        say(event="untyped", error=name(error), text=repr(error)[:300])
        continue
    say(event="create", reused=client.reused, took=time.time() - began)
    threads = [threading.Thread(target=chat, args=(client,)) for _ in range(r.randrange(0, 4))]
    [t.start() for t in threads]
    for _ in range(r.randrange(0, 5)):
        chat(client)
        time.sleep(r.random() * r.choice((0.01, 0.5)))
    [t.join() for t in threads]
    how = r.random()
    if how < 0.08:
        say(event="crash"); os._exit(1)
    if how < 0.12:
        say(event="crash"); os.kill(os.getpid(), signal.SIGKILL)
    if how < 0.2:
        say(event="forked")
        if os.fork() == 0:
            chat(client)
            os._exit(0)
        os.wait()
    if how < 0.9:
        client.close()
    time.sleep(r.choice((0, 0, 0.05, idle, idle + 0.1)) * r.random())
"""

NODE_CLIENT = r"""
import { createQvac } from '@qvac/ai-sdk-provider'
const [serve, models, idle] = process.argv.slice(2)
const say = (e) => process.stdout.write(JSON.stringify({ ...e, at: Date.now() / 1000 }) + '\n')
const pick = (list) => list[Math.floor(Math.random() * list.length)]
for (let i = 0; i < 15; i++) {
  try {
    const qvac = await createQvac({ mode: 'managed', models: [pick(models.split(','))], serveBinPath: serve,
      serveIdleTimeout: Number(idle) * 1000, serveStartTimeout: 30000 })
    say({ event: 'node-create' })
    for (let j = 0; j < 3; j++) {
      try {
        const r = await fetch(qvac.baseURL + '/models', { headers: { authorization: 'Bearer ' + qvac.apiKey } })
        say({ event: r.ok ? 'node-get' : 'node-error', error: String(r.status) })
      } catch (e) { say({ event: 'node-error', error: e?.cause?.code ?? String(e) }) }
      await new Promise((r) => setTimeout(r, Math.random() * 800))
    }
    if (Math.random() < 0.2) process.kill(process.pid, 'SIGKILL')
    await qvac.close()
  } catch (e) { say({ event: 'node-error', error: e?.code ?? String(e) }) }
}
"""

# What a client may see when its serve, its runner or the start it waits for has been killed or frozen.
EXPLAINED = {
    "ConnectionResetError", "RemoteDisconnected", "IncompleteRead", "BrokenPipeError", "ConnectionRefusedError",
    "ServeExitedError", "ServeSpawnFailedError", "ServeStartTimeoutError",
}  # fmt: skip


def tagged(tag: str) -> Dict[int, List[str]]:
    """Pid and argv of every live process that carries the tag; a frozen one is live."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open("/proc/%s/environ" % name, "rb") as file:
                    if tag.encode() not in file.read():
                        continue
                with open("/proc/%s/stat" % name, "rb") as file:
                    if file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X"):
                        continue
                with open("/proc/%s/cmdline" % name, "rb") as file:
                    found[int(name)] = file.read().decode("utf-8", "replace").split("\0")
            except OSError:
                pass
    return found


def kind_of(argv: List[str]) -> str:
    if any(arg.endswith(".runner-params.json") for arg in argv):
        return "runner"
    if "--config" in argv:
        return "serve"
    return "client" if any("serve_idle_timeout" in arg or arg.endswith("soak-client.mjs") for arg in argv) else ""


class Soak:
    def __init__(self, args: Any) -> None:
        self.args, self.random = args, random.Random(args.seed)
        self.home = tempfile.mkdtemp(prefix="qvac-soak-")
        self.registry = os.path.join(self.home, ".qvac", "managed-serves")
        self.tag = "%s=%s" % (TAG, os.path.basename(self.home))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("QVAC_")}
        self.environ = {**clean, "HOME": self.home, **dict([self.tag.split("=")])}
        self.serve = os.path.join(self.home, "serve")
        with open(self.serve, "w") as file:
            file.write('#!/bin/sh\nexec "%s" -I -S "%s" --reexecuted echo "$@"\n' % (sys.executable, MODULE))
        os.chmod(self.serve, 0o755)
        self.counts: Dict[str, int] = collections.Counter()
        self.errors: Dict[str, int] = collections.Counter()
        self.violations: List[str] = []
        self.keys: Set[str] = set()
        self.doubles: Dict[str, float] = {}
        self.last_throw = 0.0
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    # -- clients

    def client_slot(self, number: int) -> None:
        """One after another, clients of one kind, until the end."""
        is_node = self.args.provider and number % 3 == 2
        while not self.stopping.is_set():
            with self.lock:
                seed = self.random.randrange(2**31)
            if is_node:
                node = os.path.join(self.args.provider, "node_modules", ".bin", "node")
                command = [node, self.node_script, self.serve, ",".join(MODELS), str(IDLE)]
            else:
                command = [sys.executable, "-c", PYTHON_CLIENT, MODULE, self.serve, str(seed)]
                command += [",".join(MODELS), str(IDLE)]
            child = subprocess.Popen(command, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     stdin=subprocess.DEVNULL, text=True)  # fmt: skip
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                self.note(line)
            trouble = child.stderr.read()
            if child.wait() not in (0, 1, -9) or "Traceback" in trouble:
                self.violate("a client ended with %d: %s" % (child.returncode, trouble[-1500:]))

    def note(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # it was killed in the middle of a line
        with self.lock:
            self.counts[event["event"]] += 1
            if event["event"] in ("wrong", "untyped"):
                self.violate("%s: %s" % (event["event"], event))
            elif event["event"] in ("chat-error", "create-error"):
                self.errors[event["error"]] += 1
                if event["error"] not in EXPLAINED:
                    self.violate("unexplained: %s" % event)
                elif event["at"] - self.last_throw > SETTLE + event.get("took", 0):
                    self.violate("in a calm spell: %s" % event)

    def violate(self, text: str) -> None:
        self.violations.append(text)
        print("VIOLATION %s" % text, flush=True)

    # -- throwing

    def throw(self) -> None:
        processes = tagged(self.tag)
        wanted = self.random.choice(("serve", "serve", "runner", "client"))
        pids = [pid for pid, argv in processes.items() if kind_of(argv) == wanted]
        if not pids:
            return
        pid = self.random.choice(pids)
        try:
            if self.random.random() < 0.6:
                self.last_throw = time.time()
                os.kill(pid, signal.SIGKILL)
                self.counts["killed a %s" % wanted] += 1
                return
            self.counts["froze a %s" % wanted] += 1
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.random.choice((0.1, 0.5, 3.0)))
            self.last_throw = time.time()
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    def look(self) -> None:
        """One live serve for each key; and remember the API keys, to look for them later."""
        serves: Dict[str, List[int]] = collections.defaultdict(list)
        for pid, argv in tagged(self.tag).items():
            if kind_of(argv) == "serve" and "--config" in argv:
                folder = os.path.basename(os.path.dirname(argv[argv.index("--config") + 1]))
                serves[folder.partition(".")[0]].append(pid)
        for key in list(self.doubles):
            if len(serves.get(key, ())) < 2:
                del self.doubles[key]
        for key, pids in serves.items():
            is_ours = not key.startswith("qvac-managed-")
            if len(pids) > 1 and is_ours and time.time() - self.doubles.setdefault(key, time.time()) > DOUBLE_FOR:
                self.violate("%d serves of %s: %s" % (len(pids), key, pids))
                self.doubles[key] = time.time() + 1e9
        for name in os.listdir(self.registry) if os.path.isdir(self.registry) else []:
            if name.endswith(".json"):
                try:
                    with open(os.path.join(self.registry, name), encoding="utf-8") as file:
                        key_of_serve = json.load(file).get("apiKey")
                    self.keys.add(key_of_serve or "")
                except (OSError, ValueError):
                    pass

    def run(self) -> int:
        began = time.time()
        until = began + 60 * self.args.minutes
        self.node_script = os.path.join(self.args.provider or self.home, "soak-client.mjs")
        if self.args.provider:
            with open(self.node_script, "w") as file:
                file.write(NODE_CLIENT)
        slots = [threading.Thread(target=self.client_slot, args=(n,), daemon=True) for n in range(self.args.clients)]
        for slot in slots:
            slot.start()
        next_report = began + 60
        try:
            while time.time() < until:
                if (time.time() - began) % CALM_EVERY < CALM_EVERY - CALM_FOR:
                    self.throw()
                self.look()
                time.sleep(self.random.random() * 1.2)
                if time.time() > next_report:
                    next_report += 60
                    self.report("after %d min" % ((time.time() - began) // 60))
        except KeyboardInterrupt:
            print("interrupted")
        self.finish(slots)
        self.report("in %.1f min" % ((time.time() - began) / 60))
        print("%d violations" % len(self.violations))
        return 1 if self.violations else 0

    def finish(self, slots: List[threading.Thread]) -> None:
        self.stopping.set()
        for pid, argv in tagged(self.tag).items():
            if kind_of(argv) == "client":
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
        for slot in slots:
            slot.join(10)
        deadline = time.time() + LAST_WAIT
        while tagged(self.tag) and time.time() < deadline:
            time.sleep(0.1)
        for pid, argv in tagged(self.tag).items():
            self.violate("still there: %d %s" % (pid, " ".join(argv)[:200]))
            os.kill(pid, signal.SIGKILL)
        self.check_files()
        shutil.rmtree(self.home, ignore_errors=True)
        if self.args.provider:
            os.unlink(self.node_script)

    def check_files(self) -> None:
        secret_holders = (".json", "serve-api-key")
        for folder, _, names in os.walk(self.registry):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    content = file.read()
                found = any(key and key.encode() in content for key in self.keys)
                if found and not name.endswith(secret_holders):
                    self.violate("an API key in %s" % name)
                # A start whose client and runner were both killed leaves its files to the next sweep.
                self.counts["leftover %s" % name.partition(".")[2].rpartition(".")[2]] += 1

    def report(self, when: str) -> None:
        with self.lock:
            counts = ", ".join("%s %d" % item for item in sorted(self.counts.items()))
            errors = ", ".join("%s %d" % item for item in sorted(self.errors.items()))
        print("%s: %s; errors: %s; API keys %d" % (when, counts, errors or "none", len(self.keys)), flush=True)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--provider", default=os.environ.get("QVAC_TEST_PROVIDER", ""))
    args = parser.parse_args(argv)
    kinds = "with the provider" if args.provider else "Python only"
    print("seed %d, %d clients, %s" % (args.seed, args.clients, kinds))
    return Soak(args).run()


if __name__ == "__main__":
    sys.exit(main())
