"""The `sinkserve` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from deployments.local.home import Home
from engine_build.spec import TARGET_FORMATS, Target, WeightFormat

CONSOLE = Console(highlight=False)
ERRORS = Console(stderr=True, highlight=False)


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(("Examples:", *(f"[bold]{command}[/bold]" for command in commands)))


def _formats() -> str:
    """The formats of every target, for the help."""
    return "; ".join(f"{target}: {', '.join(of)}" for target, of in TARGET_FORMATS.items())


app = typer.Typer(
    name="sinkserve",
    help="Endless conversations with a language model: constant memory, constant time per token.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="SINKSERVE_URL", help="A service elsewhere. Default: the one here."
    ),
]
ApiKey = Annotated[
    str, typer.Option("--api-key", envvar="SINKSERVE_API_KEY", help="If the service asks for keys.")
]


def main() -> None:
    """Entry point of the `sinkserve` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would ask for torch
    app()


@app.command(
    epilog=examples(
        "sinkserve up",
        "sinkserve up --detach --replicas 1",
        "sinkserve up --config my.yaml --redis redis://db:6379/0",
    )
)
def up(
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it serves; it goes on behind.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines, each with its own conversations.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with fields of the service's configuration.")
    ] = None,
    redis: Annotated[
        str | None, typer.Option(help="Keep conversations in this Redis or Valkey instead.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")] = None,
    capacity: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a conversation the model sees.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Engine directory, or the name of a built-in model.")
    ] = None,
    behind: Annotated[bool, typer.Option("--behind", hidden=True)] = False,
) -> None:
    """Start the service on this machine and stay until Ctrl-C.

    The first start downloads the demo model (about 90 MB) and builds its engine. Conversations are kept on
    disk under $SINKSERVE_HOME (default ~/.sinkserve) and are there again at the next start.
    """
    from deployments.local import up as up_command

    given = {
        "replicas": replicas,
        "redis_url": redis,
        "host": host,
        "port": port,
        "capacity": capacity,
        "model": model,
    }
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = up_command.read_config(config, overrides)
    home = Home.from_env()
    if detach:
        code = up_command.run_detached(home, CONSOLE, sys.argv[1:])
    else:
        code = up_command.run_foreground(home, settings, CONSOLE, behind=behind)
    raise typer.Exit(code)


@app.command()
def status(url: Url = "", api_key: ApiKey = "") -> None:
    """Show whether the service is well, what it holds and how much it has done."""
    from deployments.local import status as status_command

    raise typer.Exit(status_command.show(Home.from_env(), CONSOLE, url, api_key))


@app.command(
    epilog=examples(
        "sinkserve chat",
        "sinkserve chat --system 'Answer in rhyme.'",
        "echo Hello | sinkserve chat",
    )
)
def chat(
    conversation: Annotated[
        str | None, typer.Option(help="Go on with this conversation instead of a new one.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt; the model sees it for ever.")
    ] = None,
    url: Url = "",
    api_key: ApiKey = "",
) -> None:
    """Talk to the model. Reads lines from a terminal or from a pipe.

    Ctrl-C stops the reply that is being written. /help lists the commands.
    """
    from deployments.local.chat import Chat, piped_lines, terminal_lines
    from deployments.local.client import ApiClient, ApiError

    if conversation and system:
        give_up("a conversation keeps the system prompt it began with: leave out --system")
    home = Home.from_env()
    on_terminal = sys.stdin.isatty()
    read_line = terminal_lines(home.chat_history) if on_terminal else piped_lines
    try:
        with ApiClient(service_url(home, url), api_key) as client:
            if on_terminal:
                CONSOLE.print("/help lists the commands, Ctrl-D leaves", style="dim")
            talk = Chat(client, CONSOLE, read_line, conversation, system)
            talk.run()
    except ApiError as error:
        give_up(f"{error} ({error.code})", *advice_for(error.code))
    raise typer.Exit(1 if talk.failed_turns and not on_terminal else 0)


@app.command()
def down() -> None:
    """Stop the service on this machine. Running turns end first; conversations stay on disk."""
    from deployments.local import up as up_command

    raise typer.Exit(up_command.stop_running(Home.from_env(), CONSOLE))


@app.command()
def doctor() -> None:
    """Check this machine: versions, memory, disk, ports, the store, and the service if it runs."""
    from deployments.local import status as status_command

    raise typer.Exit(status_command.doctor(Home.from_env(), CONSOLE))


@app.command(
    epilog=examples(
        "sinkserve build ./Qwen3-0.6B --out ./qwen",
        "sinkserve build ./Llama-3-8B --out ./llama --target cuda --capacity 2048 --max-chunk 256",
        "sinkserve up --model ./qwen",
    )
)
def build(
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Hugging Face folder (safetensors) or GGUF file."),
    ],
    out: Annotated[Path, typer.Option(help="Engine directory to write.")],
    target: Annotated[
        Target,
        typer.Option(
            help="What runs it. cpu: ONNX Runtime. cuda: torch and Triton, any NVIDIA GPU from "
            "compute capability 8.0. tensorrt, tensorrt-rtx: a TensorRT plan."
        ),
    ] = "cpu",
    weights: Annotated[
        WeightFormat | None,
        typer.Option(help=f"Number format of the weights, default first. {_formats()}."),
    ] = None,
    capacity: Annotated[
        int,
        typer.Option(min=8, help="Tokens of a conversation the model sees: sinks and window."),
    ] = 512,
    max_chunk: Annotated[
        int,
        typer.Option(min=1, help="Tokens of one prefill step. GPUs want more: 256 or 512."),
    ] = 64,
) -> None:
    """Turn a checkpoint into an engine directory that `sinkserve up --model` can serve.

    Llama, Mistral, Qwen2 and Qwen3 decoders; what is not supported is refused by the name of its field.
    The same files with the same options are not built twice, and another window reuses the weights.
    An engine for GPUs is served once `sinkserve verify` has passed it, on the machine that serves it.
    """
    from deployments.local import build as build_command
    from engine_build.build import BuildOptions

    options = BuildOptions(
        capacity=capacity, max_chunk=max_chunk, weight_format=weights, target=target
    )
    raise typer.Exit(build_command.run(source, out, options, CONSOLE))


@app.command(
    epilog=examples(
        "sinkserve verify ./llama",
        "sinkserve verify ./llama --model ./Llama-3-8B --layers",
        "sinkserve verify ./llama --tokens 20000 --text war-and-peace.txt --out report.json",
    )
)
def verify(
    engine_dir: Annotated[Path, typer.Argument(metavar="ENGINE_DIR", help="What was built.")],
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to run in all. Default: 6 times the capacity.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The checkpoint that was built: says what rounding its weights costs."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="That for each layer; needs --model.")
    ] = False,
    mistakes: Annotated[
        bool,
        typer.Option(
            "--mistakes/--no-mistakes", help="Look for windows that are wrong by one, too."
        ),
    ] = True,
    capacity: Annotated[
        int | None, typer.Option(min=8, help="Of the service, if it overrules the engine's.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="What is run. Default: Python's documentation.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of a CPU engine. Default: all cores.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The report, JSON. Default: verify.json in ENGINE_DIR, for the service."),
    ] = None,
) -> None:
    """Run a built engine beside a float reference, on the machine that is to serve it.

    Conversations in chunks of many sizes, side by side, past several windows, one of them restored by a
    bounded replay; every logit is compared, then the trace of wrong windows is looked for in what is left.
    The service refuses an engine for GPUs without a report that passed, and any engine with one that
    failed. Exit status 1 if it fails. The reference runs on the CPU: minutes for large models.
    """
    from deployments.local import verify as verify_command

    request = verify_command.VerifyRequest(
        tokens=tokens,
        capacity=capacity,
        threads=threads or os.cpu_count() or 1,
        model=model,
        layers=layers,
        mistakes=mistakes,
        text=text,
        out=out,
    )
    raise typer.Exit(verify_command.run(engine_dir, request, CONSOLE))


@app.command(
    name="measure-replay",
    epilog=examples(
        "sinkserve measure-replay",
        "sinkserve measure-replay --model ./qwen --text my-conversations.txt --out report",
        "sinkserve measure-replay --config my.yaml --depths 2,4,8,16",
    ),
)
def measure_replay(
    model: Annotated[
        str | None, typer.Option(help="Engine directory, or the name of a built-in model.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML of the service, to measure what it serves.")
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a conversation the model sees.")
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Windows to replay, rising.", metavar="N,N,...")
    ] = "1,2,4,8",
    replies: Annotated[
        int, typer.Option(min=1, help="Replies compared of each kind, sampled and greedy.")
    ] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Longest reply, tokens.")] = 64,
    floor_factor: Annotated[
        float, typer.Option(min=1.0, help="A mean KL within this many noise floors is good enough.")
    ] = 1.5,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="So is a mean KL of at most this many nats a token.")
    ] = 1e-6,
    text: Annotated[
        Path | None,
        typer.Option(help="What users say is cut from this file. Default: Python's documentation."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled replies.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the CPU engine. Default: all cores.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON and, with matplotlib, the plot.")
    ] = None,
) -> None:
    """Measure how many windows of token ids restore a cold conversation.

    Runs one long conversation on the model, far past its window. At several
    turns its cache is rebuilt, as after a failure, from 1, 2, 4... windows
    and compared with the live one: KL divergence, likeliest token, how long
    greedy text stays the same. All of it run again in other chunks gives the
    noise floor: what rounding alone does. Recommends `replay_windows`.

    Needs no service; takes some minutes for the demo model. Exit status 1 if
    no measured depth will do.
    """
    from deployments.local import measure_replay as measure_command
    from deployments.local.up import read_config
    from engine.replay_quality import Bar

    given = {"model": model, "capacity": capacity, "threads_per_replica": threads}
    settings = read_config(config, {k: v for k, v in given.items() if v is not None})
    try:
        windows = tuple(int(depth) for depth in depths.split(","))
    except ValueError:
        give_up(f"--depths {depths}: not numbers with commas between", "example: --depths 1,2,4,8")
    request = measure_command.MeasureRequest(
        depths=windows,
        replies=replies,
        reply_tokens=tokens,
        bar=Bar(floor_factor, threshold),
        threads=settings.threads_of(1),
        seed=seed,
        text=text,
        out=out,
    )
    raise typer.Exit(measure_command.run(settings, request, CONSOLE))


def service_url(home: Home, url: str) -> str:
    """`url`, or that of the service on this machine; exits when there is none."""
    if url:
        return url
    state = home.read_state()
    if state is None or not home.is_running():
        give_up("the service is not up", "start it: sinkserve up", "or name another: --url URL")
    return state.url


def advice_for(code: str) -> tuple[str, ...]:
    """What to do next about an error of the service."""
    advice = {
        "unreachable": ("see: sinkserve status",),
        "invalid_api_key": ("give a key: --api-key KEY, or set SINKSERVE_API_KEY",),
        "conversation_not_found": ("start a new one: sinkserve chat",),
        "not_ready": ("it may still be starting: sinkserve status",),
    }
    return advice.get(code, ())


def give_up(problem: str, *next_steps: str) -> NoReturn:
    """Print an error with what to do next, and exit with status 1."""
    ERRORS.print(f"[red]error:[/red] {escape(problem)}", soft_wrap=True)
    for step in next_steps:
        ERRORS.print(f"  {escape(step)}", style="dim", soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
