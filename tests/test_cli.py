"""The command line, against a small HTTP server that is not ours where one is needed."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
import typer
from rich.console import Console
from typer.testing import CliRunner

from cluster import embedded
from deployments.cli import app
from deployments.config import load_config
from deployments.local.chat import Chat, printable, summary
from deployments.local.client import ApiClient, ApiError, Reply, Unreachable
from deployments.local.home import (
    Home,
    HomeBusy,
    ProcessMark,
    ServiceState,
    end_processes,
    this_process,
)
from deployments.local.progress import Steps
from deployments.local.service import LocalService
from deployments.local.status import token_counts
from deployments.local.up import read_config
from engine_build.spec import TARGET_FORMATS

CONVERSATION = "conv_" + "a" * 32


@dataclass
class FakeService:
    """What the fake server was asked, and how it answers the next turns."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    turns: list[Callable[[], Iterator[dict[str, Any]]]] = field(default_factory=list)
    refusal: tuple[int, dict[str, Any]] | None = None


def reply_events(text: str, turn: int = 1) -> Iterator[dict[str, Any]]:
    conversation = {"id": CONVERSATION, "turn": turn}
    yield {"choices": [{"delta": {"content": ""}}], "conversation": conversation}
    for word in text.split(" "):
        yield {"choices": [{"delta": {"content": word + " "}, "finish_reason": None}]}
    yield {
        "choices": [{"delta": {}, "finish_reason": "stop"}],
        "conversation": {**conversation, "etag": "0" * 64},
    }
    yield {
        "choices": [],
        "usage": {
            "total_tokens": 5321,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 500},
            "sinkserve": {"evicted_tokens": 4809, "prefill_tokens": 12, "recovery": "replay"},
        },
    }


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            fake.paths.append(self.path)
            if self.path == "/v1/models":
                self._json(200, {"data": [{"id": "fake"}]})
            elif "/transcript" in self.path:
                data = [{"role": "user", "content": "old \x1b[31mnews"}]
                self._json(200, {"data": data, "first_position": 7})
            else:
                self._json(
                    200,
                    {"id": CONVERSATION, "turn": 3, "token_count": 900}
                    | {"sink_tokens": 4, "window_tokens": 508},
                )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.paths.append(self.path)
            fake.bodies.append(body)
            if fake.refusal is not None:
                self._json(*fake.refusal)
            elif self.path == "/v1/conversations":
                self._json(200, {"id": CONVERSATION})
            else:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for event in fake.turns.pop(0)():
                    head = f"id: {event.pop('event_id')}\n" if "event_id" in event else ""
                    self.wfile.write(f"{head}data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")

        def _json(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield fake
        server.shutdown()
        thread.join()


def talk(
    service: FakeService, lines: list[str | type[BaseException]], **options: Any
) -> tuple[Chat, str]:
    """Run a chat over these lines; what it printed."""
    waiting = iter(lines)

    def read_line() -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    console = Console(file=io.StringIO(), width=200)
    with ApiClient(service.url) as client:
        chat = Chat(client, console, read_line, **options)
        chat.run()
    output = console.file
    assert isinstance(output, io.StringIO)
    return chat, output.getvalue()


def test_chat_creates_one_conversation_and_sends_only_new_messages(service: FakeService) -> None:
    service.turns = [lambda: reply_events("Hello there"), lambda: reply_events("again", 2)]
    chat, shown = talk(service, ["Hi", "", "And now?"], system="Be brief.")
    assert service.bodies[0] == {"system": "Be brief."}
    assert [body["messages"] for body in service.bodies[1:]] == [
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "And now?"}],
    ]
    assert {body["conversation"] for body in service.bodies[1:]} == {CONVERSATION}
    assert "Hello there" in shown
    assert f"--conversation {CONVERSATION}" in shown
    assert chat.failed_turns == 0


def test_chat_shows_what_a_turn_cost(service: FakeService) -> None:
    service.turns = [lambda: reply_events("Hello there")]
    _, shown = talk(service, ["Hi"])
    assert "turn 1 · 5,321 tokens old · 4,809 out of the window · 12 prefilled" in shown
    assert "restored (replay)" in shown


def test_chat_resumes_with_the_last_messages_and_without_control_characters(
    service: FakeService,
) -> None:
    _, shown = talk(service, [], conversation_id=CONVERSATION)
    assert "7 earlier messages" in shown
    assert "old [31mnews" in shown
    assert "\x1b[31m" not in shown


def test_chat_commands(service: FakeService) -> None:
    service.turns = [lambda: reply_events("a"), lambda: reply_events("b")]
    _, shown = talk(service, ["/info", "one", "/info", "/new", "two", "/what", "/quit", "three"])
    assert "nothing has been said yet" in shown
    assert "900 tokens old, of which the model sees 512" in shown
    assert "no command /what" in shown
    assert service.paths.count("/v1/conversations") == 2
    assert [body["messages"][0]["content"] for body in service.bodies if "messages" in body] == [
        "one",
        "two",
    ]


def test_ctrl_c_ends_the_reply_and_not_the_program(service: FakeService) -> None:
    def interrupted() -> Iterator[dict[str, Any]]:
        yield from list(reply_events("never finished"))[:2]
        raise ConnectionAbortedError  # what the server sees

    service.turns = [interrupted, lambda: reply_events("fine")]
    original = Reply.apply
    calls = 0

    def apply(self: Reply, event: dict[str, Any], elapsed_s: float) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(self, event, elapsed_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reply, "apply", apply)
        chat, shown = talk(service, ["one", KeyboardInterrupt, "two"])
    assert "stopped; this turn is forgotten" in shown
    assert "fine" in shown
    assert chat.failed_turns == 0


@pytest.mark.parametrize("how", ["broken", "replica_lost"])
def test_a_chat_does_not_notice_that_its_stream_broke(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("deployments.local.client._PAUSE_S", 0.0)

    def cut() -> Iterator[dict[str, Any]]:
        opening, first, *_ = reply_events("Hello there")
        yield opening | {"event_id": "1.0"}
        yield first | {"event_id": "1.6"}
        if how == "broken":
            raise ConnectionAbortedError
        yield {"error": {"code": "replica_lost", "message": "gone"}}

    def rest() -> Iterator[dict[str, Any]]:
        opening, _, *others = reply_events("Hello there")
        yield opening | {"event_id": "1.6"}
        yield from others

    service.turns = [cut, rest]
    chat, shown = talk(service, ["Hi"], conversation_id=CONVERSATION)
    assert "\nHello there \n" in shown
    assert chat.failed_turns == 0
    first, second = service.bodies
    assert "last_event_id" not in first
    assert second == first | {"last_event_id": "1.6"}
    assert len(first["idempotency_key"]) == 32


def test_a_chat_gives_up_in_the_end(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.local.client._PAUSE_S", 0.0)
    monkeypatch.setattr("deployments.local.client.PATIENCE_S", -1.0)
    service.turns = [lambda: iter([{"error": {"code": "replica_lost", "message": "gone"}}])]
    chat, shown = talk(service, ["Hi"], conversation_id=CONVERSATION)
    assert "(replica_lost)" in shown
    assert chat.failed_turns == 1


def test_a_refused_turn_is_explained_and_counted(service: FakeService) -> None:
    body = {"error": {"code": "overloaded", "message": "Every slot is busy."}}
    service.refusal = (429, body)
    chat, shown = talk(service, ["Hi"])
    assert "Every slot is busy. (overloaded)" in shown
    assert chat.failed_turns == 1


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([{"error": {"code": "replica_lost", "message": "gone"}}], "replica_lost"),
        ([{"error": "?"}], "unknown"),
    ],
)
def test_errors_inside_a_stream_are_raised(
    service: FakeService, events: list[dict[str, Any]], code: str
) -> None:
    service.turns = [lambda: iter(events)]
    with ApiClient(service.url) as client, pytest.raises(ApiError) as caught:
        list(client.stream({"messages": []}, Reply()))
    assert caught.value.code == code


def test_a_stream_that_breaks_off_is_an_error(service: FakeService) -> None:
    def cut() -> Iterator[dict[str, Any]]:
        yield from list(reply_events("half of it"))[:2]
        raise ConnectionAbortedError

    service.turns = [cut]
    with ApiClient(service.url) as client, pytest.raises(ApiError) as caught:
        list(client.stream({"messages": []}, Reply()))
    assert caught.value.code == "stream_cut"


def test_nothing_listening_is_unreachable() -> None:
    with ApiClient(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(Unreachable):
        client.model()


def test_printable_keeps_text_and_drops_steering() -> None:
    assert printable("a\tb\nc é 漢 👍\x1b[2J\x07\r\x9b31m") == "a\tb\nc é 漢 👍[2J31m"


def test_summary_of_an_unfinished_turn_is_short() -> None:
    reply = Reply(turn=1, finish_reason="length", usage={"total_tokens": 9})
    assert summary(reply) == (
        "turn 1 · 9 tokens old · 0 out of the window · 0 prefilled · cut at max_tokens"
    )


def test_token_counts_sum_over_ingresses() -> None:
    exposition = (
        "# HELP sinkserve_tokens_total x\n"
        'sinkserve_tokens_total{ingress="0",kind="input"} 12.0\n'
        'sinkserve_tokens_total{ingress="1",kind="input"} 30.0\n'
        'sinkserve_tokens_created{ingress="1",kind="input"} 1.7e9\n'
        'sinkserve_tokens_total{ingress="0",kind="output"} 5.0\n'
    )
    assert token_counts(exposition) == {"input": 42, "output": 5}


# --- configuration ------------------------------------------------------------------------------


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: toy\nport: 1234\nreplicas: 3\n")
    config = read_config(file, {"port": 4321})
    assert (config.model, config.port, config.replicas) == ("toy", 4321, 3)


def test_an_engine_directory_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_config(None, {"model": "engine"}).model == str(tmp_path / "engine")


def test_a_serve_config_file_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "serve_config.yaml"
    file.write_text("applications:\n- name: sinkserve\n  args:\n    model: toy\n")
    assert read_config(file, {}).model == "toy"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replicsa: 2", "Did you mean 'replicas'?"),
        ("- a\n- b", "field: value"),
        ("a: [", "is not YAML"),
        ("applications: []", "field: value"),
    ],
)
def test_a_bad_configuration_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(typer.Exit) as caught:
        read_config(file, {})
    assert caught.value.exit_code == 2
    assert expected in capsys.readouterr().err


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit):
        read_config(tmp_path / "none.yaml", {})


# --- the home, its lock and its processes -------------------------------------------------------


def state_of(process: ProcessMark, **changes: Any) -> ServiceState:
    fields: dict[str, Any] = {
        "process": process,
        "phase": "ready",
        "url": "http://127.0.0.1:1",
        "redis_url": "embedded",
        "ray_address": "",
        "started_s": 1.0,
    }
    return ServiceState(**(fields | changes))


def test_state_survives_a_round_trip_and_a_torn_file(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.read_state() is None
    state = state_of(this_process(), processes=(ProcessMark(1, 2.0),))
    home.write_state(state)
    assert home.read_state() == state
    (tmp_path / "service.json").write_text('{"process": {"pid"')
    assert home.read_state() is None


def test_one_holder_at_a_time_and_the_dead_let_go(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert not home.is_running()
    code = (
        "import sys, time; from pathlib import Path; from deployments.local.home import Home\n"
        "with Home(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert home.is_running()
        with pytest.raises(HomeBusy), home.locked():
            pass
        holder.kill()
        holder.wait()
        assert not home.is_running()


def test_end_processes_ends_the_family_and_nobody_else() -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger,
    ):
        assert parent.stdout is not None
        child = ProcessMark.of(psutil_process(int(parent.stdout.readline())))
        mark = ProcessMark.of(psutil_process(parent.pid))
        reused = ProcessMark(stranger.pid, mark.create_time - 1000)
        assert end_processes([mark, reused, ProcessMark(2**22, 1.0)]) == 2
        assert child.find() is None
        assert stranger.poll() is None
        stranger.kill()


def psutil_process(pid: int) -> Any:
    import psutil

    return psutil.Process(pid)


# --- the commands -------------------------------------------------------------------------------

COMMANDS = ["up", "status", "chat", "down", "doctor", "build"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("SINKSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SINKSERVE_URL", raising=False)

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    return invoke


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Callable[..., Any], command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_lists_the_commands(run: Callable[..., Any]) -> None:
    output = run("--help").output
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", ["status", "chat"])
def test_commands_say_that_nothing_is_up(run: Callable[..., Any], command: str) -> None:
    result = run(command)
    assert result.exit_code == 1
    assert "sinkserve up" in result.output


def test_down_without_a_service_is_fine(run: Callable[..., Any]) -> None:
    result = run("down")
    assert result.exit_code == 0
    assert "not up" in result.output


def test_chat_refuses_a_second_system_prompt(run: Callable[..., Any]) -> None:
    result = run("chat", "--conversation", CONVERSATION, "--system", "x")
    assert result.exit_code == 1
    assert "leave out --system" in result.output


def test_chat_reads_a_pipe(run: Callable[..., Any], service: FakeService) -> None:
    service.turns = [lambda: reply_events("Hello there")]
    result = CliRunner().invoke(app, ["chat", "--url", service.url], input="Hi\n")
    assert result.exit_code == 0
    assert "Hello there" in result.output


def test_doctor_names_every_check(run: Callable[..., Any]) -> None:
    result = run("doctor")
    assert "python" in result.output
    assert "embedded store" in result.output


def test_build_of_nothing_is_an_error(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("build", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "does not exist" in result.output


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    from tests.tiny_models import write_hf_folder

    return write_hf_folder(tmp_path / "model", "llama")


def test_build_compiles_the_kernels_too(
    run: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def compiled(home: Path, progress: Callable[[str, float], None]) -> Path:
        assert (tmp_path / "engine" / "manifest.json").is_file()
        progress("compile the CPU kernels", 0.5)
        asked.append(home)
        return home

    monkeypatch.setattr("deployments.local.build.kernel_library", compiled)
    arguments = ("--out", str(tmp_path / "engine"), "--capacity", "32", "--max-chunk", "16")
    result = run("build", str(tiny_model), *arguments)
    assert result.exit_code == 0, result.output
    assert asked == [tmp_path / "home"]
    lines = [line for line in result.output.splitlines() if "CPU kernels" in line]
    assert len(lines) == 1
    assert "serve it" in result.output


def test_build_says_why_the_kernels_do_not_compile(
    run: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "bad.c").write_text("int f( [")
    monkeypatch.setattr("engine.kernels.compile.SOURCES", tmp_path / "sources")
    arguments = ("--out", str(tmp_path / "engine"), "--capacity", "32", "--max-chunk", "16")
    result = run("build", str(tiny_model), *arguments)
    assert result.exit_code == 1
    assert "error: The CPU kernels could not be compiled" in result.output
    assert "bad.c" in result.output  # what the compiler said
    assert "start again" in result.output
    assert "serve it" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_build_refuses_a_format_that_the_target_does_not_run(
    run: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ("--out", str(tmp_path / "engine"), "--target", "cuda", "--weights", "int8")
    result = run("build", str(tiny_model), *arguments)
    assert result.exit_code == 1
    assert "weight_format: cuda does not run int8. Use bfloat16, " in result.output
    assert not (tmp_path / "engine").exists()


def test_build_help_names_the_formats_of_every_target(run: Callable[..., Any]) -> None:
    told = " ".join(run("build", "--help").output.replace("│", " ").split())
    for target, formats in TARGET_FORMATS.items():
        assert f"{target}: {', '.join(formats)}" in told


@pytest.mark.parametrize("detach", [False, True])
def test_up_refuses_a_taken_port_and_says_why(tmp_path: Path, detach: bool) -> None:
    # In a process of its own: `up` takes the signals and, at its end, ends all it has for children.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["up", "--model", "toy", "--port", str(taken.getsockname()[1])]
        result = subprocess.run(
            [sys.executable, "-m", "deployments.cli", *arguments, *["--detach"] * detach],
            env={**os.environ, "SINKSERVE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert result.returncode == 1
    assert "use --port" in result.stdout
    assert ("up.log" in result.stdout) == detach
    assert Home(tmp_path).read_state() is None


def test_up_twice_says_so(run: Callable[..., Any], tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with home.locked():
        home.write_state(state_of(this_process(), url="http://127.0.0.1:4711"))
        result = run("up", "--model", "toy")
    assert result.exit_code == 0
    assert "already up at http://127.0.0.1:4711" in result.output


def test_a_store_that_dies_under_a_running_service_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.local.service.WATCH_EVERY_S", 0.01)
    # pytest's own directories are too long for a unix socket.
    with tempfile.TemporaryDirectory(prefix="ss-") as root:
        shown = io.StringIO()
        steps = Steps(Console(file=shown, width=200))
        home = Home(Path(root))
        service = LocalService(home, load_config({"model": "toy"}), steps)
        watch = threading.Thread(target=service.wait)
        try:
            with steps.step("store") as step:
                service._start_store(step)
            url = service.config.redis_url
            with redis.Redis.from_url(url) as client:
                client.set("turn", 1)
                server = psutil_process(int(client.info("server")["process_id"]))
                watch.start()
                server.kill()
                while "starting it again" not in shown.getvalue():
                    time.sleep(0.01)
                assert client.get("turn") == b"1"
                assert client.info("server")["process_id"] != server.pid
            assert embedded.running_url(home.data) == url
        finally:
            service._stop.set()
            watch.join()
            embedded.stop(home.data)
        assert shown.getvalue().count("starting it again") == 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


# --- the whole, with the toy engine -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
def test_up_survives_a_kill_and_goes_down_without_a_trace(tmp_path: Path) -> None:
    """up, talk, SIGKILL, up again, go on with the conversation, down: nothing is left running."""
    home = Home(tmp_path)
    port = free_port()

    def sinkserve(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deployments.cli", *arguments],
            env={**os.environ, "SINKSERVE_HOME": str(tmp_path)},
            input=text,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def start() -> ServiceState:
        started = sinkserve("up", "--detach", "--model", "toy", "--port", str(port))
        assert started.returncode == 0, started.stdout
        assert "SinkServe is up" in started.stdout
        state = home.read_state()
        assert state is not None
        return state

    try:
        first = start()
        said = sinkserve("chat", "--system", "Short.", text="one\ntwo\n")
        assert said.returncode == 0, said.stdout
        assert "turn 2" in said.stdout
        conversation = said.stdout.split("--conversation ")[1].strip()
        assert "already up" in sinkserve("up").stdout

        killed = first.process.find()
        assert killed is not None
        killed.kill()
        killed.wait(30)
        assert sinkserve("status").returncode == 1
        second = start()
        said = sinkserve("chat", "--conversation", conversation, text="three\n")
        assert said.returncode == 0, said.stdout
        assert "turn 3" in said.stdout
        assert "restored (exact)" in said.stdout
        assert sinkserve("status").returncode == 0

        assert sinkserve("down").returncode == 0
        marks = (*first.processes, *second.processes, first.process, second.process)
        assert [mark for mark in marks if mark.find()] == []
        assert embedded.running_url(home.data) is None
        assert home.read_state() is None
        assert not home.is_running()
    finally:
        sinkserve("down")
