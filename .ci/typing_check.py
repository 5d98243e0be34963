"""Calls of the public API that type checkers must take, and calls that they must refuse.

    python .ci/typing_check.py      checks this very file with `mypy --strict` and with pyright

A line that ends in `# refused` must be an error for both, any other line for neither.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Set

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent

if TYPE_CHECKING:
    import http.client

    from typing_extensions import assert_type

    import qvac_managed as q

    def takes_progress(progress: q.Progress) -> None:
        assert_type(progress.phase, str)
        assert_type(progress.bytes_total, Optional[int])

    def right() -> None:
        assert_type(q.create_qvac(), q.Qvac)
        assert_type(q.create_qvac("external", base_url="http://h/v1", api_key="k", headers={"a": "b"}), q.Qvac)
        managed = q.create_qvac(
            "managed", models=["qwen3.5-2b", {"name": "x", "config": {"ctx_size": 1}}, q.ManagedModel("y", src="/m")],
            serve_port=1, serve_bin_path=Path("/bin/qvac"), serve_args=["--x"], serve_sleep_timeout=None,
            serve_idle_timeout=2, on_progress=takes_progress)  # fmt: skip
        assert_type(managed, q.ManagedQvac)
        q.create_qvac("managed", models=("a",), serve_bin_path=q.ECHO, on_progress="auto")
        q.create_qvac("managed", models=["a"], on_progress=q.show_progress)
        q.create_qvac("managed", models=["a"], on_progress=None)
        with managed as client:
            assert_type(client, q.ManagedQvac)
        with q.create_qvac() as external:
            assert_type(external, q.Qvac)
        assert_type(managed.port, int)
        assert_type(managed.pid, int)
        assert_type(managed.fleet_key, str)
        assert_type(managed.closed, bool)
        answer = managed.chat("hi", temperature=0, max_tokens=5, stop=["x"])
        assert_type(answer, q.Answer)
        assert_type(answer.upper(), str)
        assert_type(answer.reasoning, str)
        assert_type(answer.finish_reason, Optional[str])
        assert_type(answer.tool_calls, Sequence[Dict[str, Any]])
        managed.chat({"role": "user", "content": "hi"}, "m", timeout=5)
        managed.chat([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
        with managed.stream_chat("hi", reasoning=True) as stream:
            for piece in stream:
                assert_type(piece, q.Piece)
                assert_type(piece.kind, str)
        assert_type(stream.answer, q.Answer)
        assert_type(managed.embed("a"), List[List[float]])
        managed.embed(["a", "b"])
        assert_type(managed.open("/models", {"a": 1}), http.client.HTTPResponse)
        assert_type(managed.models(), List[Dict[str, Any]])
        try:
            managed.ensure()
        except q.AnswerCutShortError as error:
            assert_type(error.answer, q.Answer)
            assert_type(error.limit, str)

    async def right_asynchronously() -> None:
        assert_type(await q.create_qvac_async(), q.Qvac)
        async with await q.create_qvac_async("managed", models=["a"]) as client:
            assert_type(client, q.ManagedQvac)
            assert_type(await client.achat("hi", temperature=1), q.Answer)
            async for piece in client.astream_chat("hi"):
                assert_type(piece, q.Piece)
            assert_type(await client.aembed("a"), List[List[float]])

    def wrong(client: q.ManagedQvac) -> None:
        q.create_qvac("other")  # refused
        q.create_qvac(models=["a"])  # refused
        q.create_qvac("external", serve_port=1)  # refused
        q.create_qvac("managed")  # refused
        q.create_qvac("managed", models=["a"], base_url="http://h/v1")  # refused
        q.create_qvac("managed", models=["a"], serve_port="1")  # refused
        q.create_qvac("managed", models=[5])  # refused
        q.create_qvac("managed", models=["a"], on_progress="yes")  # refused
        q.create_qvac("managed", models=["a"], serve_idle="1")  # refused
        q.create_qvac("managed", models=["a"], opener=5)  # refused
        client.chat(5)  # refused
        client.chat("hi", timeout="1")  # refused
        client.embed(5)  # refused
        client.open(5)  # refused
        client.stream_chat("hi").nothing  # refused  # noqa: B018

    async def wrong_asynchronously(client: q.Qvac) -> None:
        await q.create_qvac_async("managed")  # refused
        await q.create_qvac_async("external", models=["a"])  # refused
        await client.achat(5)  # refused
        await client.astream_chat("hi")  # refused


def mypy_lines() -> Set[int]:
    output = output_of("mypy", "--strict", "--config-file", os.devnull, "--no-color-output", str(HERE))
    found = re.findall(r"^(.*?):(\d+)(?::\d+)?: error", output, re.M)
    return {int(line) for path, line in found if os.path.basename(path) == HERE.name}


def pyright_lines() -> Set[int]:
    config = HERE.with_name("pyrightconfig.json")
    config.write_text(json.dumps({"typeCheckingMode": "standard", "include": [HERE.name], "extraPaths": [str(ROOT)]}))
    try:
        found = json.loads(output_of("pyright", "--outputjson", "--project", str(config)))["generalDiagnostics"]
    finally:
        config.unlink()
    errors = [one for one in found if one["severity"] == "error" and os.path.basename(one["file"]) == HERE.name]
    return {one["range"]["start"]["line"] + 1 for one in errors}


def output_of(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    environ = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(command, check=False, stdout=subprocess.PIPE, cwd=ROOT, env=environ, text=True).stdout


def main() -> int:
    with open(HERE, encoding="utf-8") as file:
        refused = {number for number, line in enumerate(file, 1) if re.search(r"  # refused(  #|$)", line.rstrip())}
    status = 0
    for name, lines in (("mypy", mypy_lines()), ("pyright", pyright_lines())):
        for what, wrong in (("takes", refused - lines), ("refuses", lines - refused)):
            for number in sorted(wrong):
                print("%s %s line %d of %s" % (name, what, number, HERE.name))
                status = 1
    print("typing: %d calls refused as they should be" % len(refused) if not status else "typing: FAILED")
    return status


if __name__ == "__main__":
    sys.exit(main())
