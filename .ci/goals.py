#!/usr/bin/env python3
"""How far the promises of the README hold under faults: counts and worst times, not pass or fail.

    .ci/goals.py [--rounds N] [GOAL...]

Linux and the standard library. Each goal runs in a home of its own with the fake serve of the tests, and is a
line: what was done, how often, the worst that was seen, the target. Exit code 1 if a target was missed. What
a target says about time is meant for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)

import qvac_managed as q  # noqa: E402
import test_qvac_managed as t  # noqa: E402

# A process that attaches once for each line `MODELS MOMENT`, all at that moment of the monotonic clock.
CONTENDER = """
for line in sys.stdin:
    models, moment = eval(line)
    while time.monotonic() < moment:
        pass
    try:
        with q.create_qvac("managed", models=models, serve_bin_path=sys.argv[1], serve_idle_timeout=0.3,
                           serve_start_timeout=30) as client:
            print(client.pid, client.chat("hi"), flush=True)
    except Exception as error:
        print(0, getattr(error, "code", repr(error)), flush=True)
"""


class Line(NamedTuple):
    what: str
    count: int
    worst: float
    unit: str
    target: float


class Home(t.OrphanCase):
    """A test case's fixture without a test."""

    IDLE = 1.0

    def runTest(self) -> None:
        """unittest asks for it."""

    def processes(self) -> Dict[int, str]:
        """Without the process that stands for a stranger."""
        return {pid: line for pid, line in super().processes().items() if pid != self.canary.pid}

    def stop_all(self) -> None:
        for record in q.read_all_records():
            q.stop_serve(record.fleet_key)
        t.wait_until(lambda: not self.processes())


@contextlib.contextmanager
def home() -> Iterator[Home]:
    case = Home()
    case.setUp()
    try:
        yield case
    finally:
        case.tearDown()
        case.doCleanups()


def seconds(function: Callable[[], Any]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


def chat_of(case: Home, serve: str) -> Callable[[], None]:
    """A new client's whole life: attach or start, one answer, close.

    One that comes while the start of another is being killed shares that failure, and asks again.
    """

    def life() -> None:
        try:
            client = case.create(serve_bin_path=serve)
        except (q.ServeExitedError, q.ServeSpawnFailedError):
            client = case.create(serve_bin_path=serve)
        assert client.chat("hi") == "hi"
        client.close()

    return life


def usual_cold_start(case: Home, serve: str) -> float:
    """The median of five, in seconds."""
    times = []
    for _ in range(5):
        times.append(seconds(chat_of(case, serve)))
        case.stop_all()
    return statistics.median(times)


def one_serve(rounds: int) -> Iterator[Line]:
    """G1: six processes at once, on the lock of a dead process."""
    with home() as case:
        serve = case.fake()
        contenders = [case.python(CONTENDER, serve) for _ in range(6)]
        failures, extra = 0, 0
        for number in range(rounds):
            models = [{"name": t.MODEL, "config": {"round": number}}]
            key = q.compute_fleet_key(q.synthesize_serve_config(models), "127.0.0.1", serve)
            dead, recycled = "%d 1 %s 00" % (case.dead_pid, q.place()), "%d 1 %s 00" % (os.getpid(), q.place())
            case.write(key + ".lock", ("%d" % case.dead_pid, dead, recycled)[number % 3])
            before = len(case.fake_events("start"))
            moment = time.monotonic() + 0.05
            for child in contenders:
                child.stdin.write(repr((models, moment)) + "\n")
                child.stdin.flush()
            answers = [child.stdout.readline().split() for child in contenders]
            failures += sum(answer[1:] != ["hi"] for answer in answers)
            extra += len(case.fake_events("start")) - before - 1
            assert len({answer[0] for answer in answers}) == 1, answers
        yield Line("6 processes start at once over a stale lock: serves too many", rounds, extra, "", 0)
        yield Line("    clients without an answer", rounds * 6, failures, "", 0)


def slow_is_not_dead(rounds: int) -> Iterator[Line]:
    """G2: the serve frozen for 10 s, five clients come meanwhile."""
    with home() as case:
        serve = case.fake()
        client = case.create(serve_bin_path=serve)
        os.kill(client.pid, signal.SIGSTOP)
        waiting = [t.in_thread(case.create, serve_bin_path=serve) for _ in range(5)]
        time.sleep(10)
        os.kill(client.pid, signal.SIGCONT)
        pids = {attach().pid for attach in waiting}
        assert pids == {client.pid}, pids
        yield Line("serve frozen 10 s, 5 clients attach: serves too many", 5, len(case.fake_events("start")) - 1, "", 0)


def no_orphan(rounds: int) -> Iterator[Line]:
    """G3 and G4: the runner killed at any instant; then the next client."""
    chance, ends, nexts = random.Random(1), [], []
    with home() as case:
        serve = case.fake(preload_s=0.2, grandchildren=["plain", "ignore_term", "stopped"])
        cold = usual_cold_start(case, serve)
        for _ in range(max(10, rounds // 5)):
            starting = t.in_thread(case.create, serve_bin_path=serve)
            t.wait_until(lambda: case.signal_all(0, "detach runner"))
            time.sleep(chance.uniform(0, 0.8))
            case.signal_all(signal.SIGKILL, "detach runner")
            ends.append(seconds(lambda: t.wait_until(lambda: not case.processes())))
            with contextlib.suppress(q.QvacManagedModeError):
                starting().close()
            nexts.append(seconds(chat_of(case, serve)) - cold)
            case.stop_all()
        yield Line("runner killed at any instant: until serve and workers are gone", len(ends), max(ends), "s", 2)
        yield Line("    the next client, beyond a cold start", len(nexts), max(nexts), "s", 2)


def no_wedge(rounds: int) -> Iterator[Line]:
    """G4: serve, starting client, or all of it killed."""
    chance, delays = random.Random(2), []  # type: Any, List[float]
    with home() as case:
        serve = case.fake(preload_s=0.2)
        cold = usual_cold_start(case, serve)
        for number in range(max(12, rounds // 5)):
            child = case.python(t.HOLDER, repr([t.MODEL]), serve, "1")
            time.sleep(chance.uniform(0.05, 1.0))
            if number % 3 != 1:
                child.kill()
            if number % 3 != 0:
                case.signal_all(signal.SIGKILL, "fake")
            if number % 3 == 2:
                case.signal_all(signal.SIGKILL, "")
            delays.append(seconds(chat_of(case, serve)) - cold)
            child.kill()
            case.stop_all()
        yield Line("client, serve, or all killed at any instant: the next client, beyond a cold start",
                   len(delays), max(delays), "s", 2)  # fmt: skip


def hung_orphans(rounds: int) -> Iterator[Line]:
    """G5: twenty serves that hang and have no runner."""
    with home() as case:
        usual = seconds(lambda: case.create(serve_idle_timeout=60))
        deaf = case.python(t.DEAF, "20", start_new_session=True)
        for port in deaf.stdout.readline().split():
            case.publish(case.new_key(), deaf.pid, int(port))
        warm = [seconds(lambda: case.create().close()) for _ in range(20)]
        cold = [seconds(lambda: case.create(reuse=False).close()) - usual for _ in range(3)]
        yield Line("20 hung orphans: a warm attach", len(warm), max(warm), "s", 0.5)
        yield Line("    a cold start, beyond a usual one", len(cold), max(cold), "s", 2)


def shared_failure(rounds: int) -> Iterator[Line]:
    """G6: twenty wait for a serve that fails after 1.5 s; a runner that cannot run."""
    told, spawns, cannot = [], [], []
    for _ in range(5):
        with home() as case:
            found: List[Dict[str, Any]] = case.herd(20, case.fake(exit=7, exit_after_s=1.5))
            assert {result.get("code") for result in found} == {"SERVE_EXITED"}, found
            told.append(max(result["seconds"] for result in found))
            spawns.append(len(case.fake_events("start")))
    yield Line("20 wait for a serve that fails after 1.5 s: until the last is told", len(told), max(told), "s", 4)
    yield Line("    serves started", len(spawns), max(spawns), "", 2)
    for _ in range(10):
        with home() as case, t.mock.patch.object(q, "reexec_argv", lambda *_, **__: ["/no/such/python"]):
            began = time.monotonic()
            try:
                case.create()
            except q.ServeSpawnFailedError:
                cannot.append(time.monotonic() - began)
    yield Line("a runner that cannot run: until its client is told", len(cannot), max(cannot), "s", 1)


GOALS = [one_serve, slow_is_not_dead, no_orphan, no_wedge, hung_orphans, shared_failure]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("goals", nargs="*", metavar="GOAL", help=", ".join(goal.__name__ for goal in GOALS))
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    missed = 0
    for goal in GOALS:
        if args.goals and goal.__name__ not in args.goals:
            continue
        for line in goal(args.rounds):
            missed += line.worst > line.target
            worst = ("%.2f s" if line.unit else "%d") % line.worst
            verdict = "MISSED" if line.worst > line.target else ""
            print("%-84s %4d times  worst %-7s target %g%s  %s" % (
                line.what, line.count, worst, line.target, line.unit and " s", verdict), flush=True)  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
