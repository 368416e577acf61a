"""`sinkserve chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from deployments.local.client import ApiClient, ApiError, Reply

SHOWN_MESSAGES = 6

HELP = """\
/new    start another conversation        /info   this conversation's figures
/help   this list                         /quit   leave (also Ctrl-D); the conversation stays
Ctrl-C stops the reply that is being written; that turn is then forgotten."""

ReadLine = Callable[[], str]


class Chat:
    """One user's conversation with one service. `read_line` raises EOFError at the end of the input."""

    def __init__(
        self,
        client: ApiClient,
        console: Console,
        read_line: ReadLine,
        conversation_id: str | None = None,
        system: str | None = None,
    ) -> None:
        self._client = client
        self._console = console
        self._read_line = read_line
        self._conversation_id = conversation_id
        self._system = system
        self._model = client.model()
        self.failed_turns = 0
        self._commands: dict[str, Callable[[], None]] = {
            "/help": lambda: console.print(HELP, style="dim"),
            "/new": self._start_over,
            "/info": self._show_info,
        }

    @property
    def conversation_id(self) -> str | None:
        return self._conversation_id

    def run(self) -> None:
        """Read and answer until the input ends or the user leaves."""
        if self._conversation_id is not None:
            self._show_transcript(self._conversation_id)
        while True:
            try:
                line = self._read_line().strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                self._console.print("\n/quit or Ctrl-D leaves", style="dim")
                continue
            if line in ("/quit", "/exit"):
                break
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)
        if self._conversation_id is not None:
            again = f"sinkserve chat --conversation {self._conversation_id}"
            self._console.print(f"\nto go on later: {again}", style="dim", soft_wrap=True)

    def _command(self, line: str) -> None:
        name = line.split(maxsplit=1)[0]
        command = self._commands.get(name)
        if command is None:
            self._console.print(f"no command {escape(name)}\n{HELP}", style="dim")
            return
        try:
            command()
        except ApiError as error:
            self._explain(error)

    def _turn(self, text: str) -> None:
        reply = Reply()
        try:
            body = {
                "model": self._model,
                "messages": [{"role": "user", "content": text}],
                "conversation": self._conversation(),
            }
            with contextlib.closing(self._client.patient_stream(body, reply)) as pieces:
                for piece in pieces:
                    self._write(printable(piece))
        except KeyboardInterrupt:
            self._console.print("\nstopped; this turn is forgotten", style="dim")
            return
        except ApiError as error:
            self.failed_turns += 1
            self._explain(error)
            return
        self._write("\n")
        self._console.print(summary(reply), style="dim", highlight=False)

    def _conversation(self) -> str:
        if self._conversation_id is None:
            body = {"system": self._system} if self._system else {}
            self._conversation_id = str(self._client.post("/v1/conversations", body)["id"])
        return self._conversation_id

    def _start_over(self) -> None:
        self._conversation_id = None
        self._console.print("a new conversation begins with your next line", style="dim")

    def _show_info(self) -> None:
        if self._conversation_id is None:
            self._console.print("nothing has been said yet", style="dim")
            return
        record = self._client.get(f"/v1/conversations/{self._conversation_id}")
        window = record["sink_tokens"] + record["window_tokens"]
        self._console.print(
            f"{record['id']}\n"
            f"turn {record['turn']}, {record['token_count']:,} tokens old, of which the model sees "
            f"{min(record['token_count'], window):,} "
            f"({record['sink_tokens']} pinned at the start + the most recent)",
            style="dim",
            highlight=False,
        )

    def _show_transcript(self, conversation_id: str) -> None:
        page = self._client.get(
            f"/v1/conversations/{conversation_id}/transcript", limit=SHOWN_MESSAGES
        )
        if page["first_position"] > 0:
            self._console.print(f"… {page['first_position']:,} earlier messages", style="dim")
        for message in page["data"]:
            self._console.print(f"{message['role']}>", style="dim", end=" ")
            self._write(printable(message["content"]) + "\n")

    def _explain(self, error: ApiError) -> None:
        self._console.print(f"\n{escape(str(error))} ({escape(error.code)})", style="red")
        if error.code == "unreachable":
            self._console.print("is it up? see `sinkserve status`", style="dim")

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def printable(text: str) -> str:
    """The text without control characters: a reply must not steer the terminal."""
    return "".join(
        character
        for character in text
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
    )


def summary(reply: Reply) -> str:
    """The line under a reply."""
    counts = reply.sink_usage
    age = int(reply.usage.get("total_tokens", 0))
    parts = [f"turn {reply.turn}", f"{age:,} tokens old"]
    parts.append(f"{int(counts.get('evicted_tokens', 0)):,} out of the window")
    parts.append(f"{int(counts.get('prefill_tokens', 0)):,} prefilled")
    if counts.get("recovery") not in (None, "none"):
        parts.append(f"restored ({counts['recovery']})")
    if reply.ttft_s is not None:
        parts.append(f"first token {reply.ttft_s * 1000:.0f} ms")
        writing_s = reply.text_times_s[-1] - reply.text_times_s[0]
        num_tokens = int(reply.usage.get("completion_tokens", 0))
        if writing_s > 0 and num_tokens > 1:
            parts.append(f"{(num_tokens - 1) / writing_s:.0f} tokens/s")
    if reply.finish_reason == "length":
        parts.append("cut at max_tokens")
    return " · ".join(parts)


def terminal_lines(history_file: Path) -> ReadLine:
    """Lines typed at a prompt, with editing and a history kept in `history_file`."""
    with contextlib.suppress(ImportError, OSError):
        import readline

        history_file.parent.mkdir(parents=True, exist_ok=True)
        history_file.touch(mode=0o600)
        readline.read_history_file(history_file)
        readline.set_history_length(1000)
        readline.set_auto_history(True)

        def read_and_remember() -> str:
            line = input("you> ")
            with contextlib.suppress(OSError):
                readline.write_history_file(history_file)
            return line

        return read_and_remember
    return lambda: input("you> ")


def piped_lines() -> str:
    """The next line of standard input."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
