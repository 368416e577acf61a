"""The one configuration of the service: validated once, on the driver, before anything starts.

`ServiceConfig` fixes what a replica is; changing it restarts replicas. `Tunables` may change while they
run: Ray Serve hands them to `reconfigure` as `user_config`, with `serve deploy` of an edited file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.redis_servers import url_problem
from engine.open_engine import CPU_BUDGET_BYTES
from engine.sampling import SamplingParams
from engine_build.spec import EngineSpec

TOY_MODEL = "toy"
DEMO_MODEL = "smollm2-135m-instruct"
EMBEDDED = "embedded"

MAX_INPUT_TOKENS = 1 << 20
MIB = 1 << 20
GIB = 1 << 30


class ConfigError(ValueError):
    """The configuration cannot be used. Each problem names a field and says what to do."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(_Strict):
    """What one request may ask for, and how long things may take."""

    max_input_tokens: int = Field(
        default=8000,
        ge=1,
        le=MAX_INPUT_TOKENS,
        description="Input of one turn, tokens. May exceed the window.",
    )
    max_output_tokens: int = Field(
        default=4096, ge=1, le=1 << 20, description="Reply of one turn, tokens."
    )
    default_max_tokens: int = Field(
        default=512,
        ge=1,
        le=1 << 20,
        description="Reply length when the request names none, tokens.",
    )
    max_body_bytes: int = Field(
        default=4 * MIB, ge=1024, le=GIB, description="HTTP request body, bytes."
    )
    turn_timeout_s: float = Field(
        default=600.0, gt=0, le=86_400, description="A turn from acceptance to commit, seconds."
    )


class SamplingDefaults(_Strict):
    """Sampling of requests that do not say otherwise. Names and meanings as in the OpenAI API, plus
    top_k, min_p and repetition_penalty as in Hugging Face's generation config and dry_* as in llama.cpp."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1 << 20, description="0 keeps every token.")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    dry_multiplier: float = Field(default=0.0, ge=0, le=5, description="0 lets text repeat.")
    dry_base: float = Field(default=1.75, ge=1, le=4)
    dry_allowed_length: int = Field(default=2, ge=1, le=64, description="Tokens.")

    def params(self) -> SamplingParams:
        """The same as the engine's parameters, with no seed."""
        return SamplingParams(**self.model_dump())


# Measured over hundreds of turns: without DRY a model this small soon copies its own replies.
_DEMO_SAMPLING = SamplingDefaults(
    temperature=0.6, top_p=0.9, repetition_penalty=1.1, dry_multiplier=0.8, dry_allowed_length=4
)


class Tunables(_Strict):
    """What may change without restarting a replica: Ray Serve's `user_config`."""

    limits: Limits = Limits()
    default_sampling: SamplingDefaults | None = Field(
        default=None,
        description="None: what suits the model (the demo model: 0.6, top_p 0.9, penalty 1.1, DRY).",
    )
    lease_s: float = Field(
        default=10.0,
        ge=1,
        le=300,
        description="A running turn's claim on its conversation, seconds.",
    )
    durability: Literal["token", "turn"] = Field(
        default="token",
        description="What is stored before it is shown: every token, or nothing before the commit.",
    )
    store_hold_s: float = Field(
        default=2.0,
        ge=0.1,
        le=60,
        description="Output waits this long for a store that is away, seconds.",
    )


class Autoscaling(_Strict):
    """Between how many replicas Ray Serve scales; takes the place of `replicas`."""

    min_replicas: int = Field(default=1, ge=1, le=1024)
    max_replicas: int = Field(default=2, ge=1, le=1024)
    target_ongoing_requests: float = Field(
        default=8.0, gt=0, le=4096, description="Running turns per replica to aim at."
    )
    upscale_delay_s: float = Field(
        default=30.0, ge=0, le=86_400, description="Load above the aim for so long adds replicas."
    )
    downscale_delay_s: float = Field(
        default=600.0,
        ge=0,
        le=86_400,
        description="Load below it for so long takes some away; their conversations are replayed elsewhere.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas}). "
                "Raise max_replicas"
            )
        return self


class ServiceConfig(Tunables):
    """Everything `deployments.app:build` needs. Every field has a default that suits one machine."""

    model: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        description=f"An engine directory, {DEMO_MODEL!r} (the demo) or {TOY_MODEL!r} (no weights).",
    )
    served_model_name: str = Field(
        default="",
        max_length=200,
        description="The API's `model`; empty: the engine directory's name.",
    )
    capacity: int = Field(
        default=512,
        ge=8,
        le=1 << 20,
        description="S + R: tokens a query sees. An engine directory brings its own; this overrules.",
    )
    max_chunk: int = Field(
        default=64, ge=1, le=4096, description="Tokens of one conversation that a step may prefill."
    )
    weight_format: Literal["int8", "float32"] = Field(
        default="int8", description="Of a built demo engine."
    )

    replicas: int = Field(
        default=2, ge=1, le=1024, description="Engine replicas, unless autoscaling."
    )
    autoscaling: Autoscaling | None = None
    ingress_replicas: int = Field(default=1, ge=1, le=256)
    cpus_per_replica: float = Field(
        default=0.5, ge=0, le=1024, description="Ray's reservation, not a limit on threads."
    )
    gpus_per_replica: float | None = Field(
        default=None,
        ge=0,
        le=64,
        description="None: what the engine was built for, one for each rank, none on CPUs.",
    )
    threads_per_replica: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Of the CPU engine, its ranks together; None: the machine's cores / replicas.",
    )
    memory_budget_bytes: int | None = Field(
        default=None,
        ge=1024,
        description="For kv_slots, per CPU engine or GPU; sets how many conversations are resident. "
        "None: 1 GiB on a CPU, what is free on a GPU.",
    )
    host_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Host memory per replica for conversations that lost their kv_slot: they are copied "
        "back instead of replayed. For GPUs; 0: none.",
    )
    max_running: int = Field(
        default=16, ge=1, le=1024, description="Turns of a replica that decode in one step."
    )
    max_waiting: int = Field(
        default=64,
        ge=0,
        le=65_536,
        description="Turns of a replica that wait for a kv_slot or a row.",
    )
    prefill_tokens: int = Field(
        default=0,
        ge=0,
        le=65_536,
        description="Prefilled per step beside the decode rows; 0: one chunk.",
    )
    owner_wait_s: float = Field(
        default=5.0,
        ge=0,
        le=600,
        description="Wait for a full owner before 429 overloaded, seconds.",
    )
    drain_s: float = Field(
        default=20.0,
        ge=0,
        le=600,
        description="Time a stopping replica gives its running turns, seconds.",
    )
    step_timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="An engine step that takes longer makes its replica unhealthy, seconds. Tensor-parallel "
        "ranks wait as long for each other in a step.",
    )
    stats_period_s: float = Field(
        default=0.5,
        ge=0.1,
        le=60,
        description="Age of the statistics that place new conversations, seconds.",
    )

    replay_windows: int = Field(
        default=4,
        ge=1,
        le=64,
        description="Windows of token ids kept to restore a cold conversation.",
    )
    on_model_change: Literal["restart", "refuse"] = Field(
        default="restart",
        description="A conversation of another model or window: tokenised anew, or 409 model_changed.",
    )
    redis_url: str = Field(
        default=EMBEDDED,
        description=f"redis://, rediss://, unix://, redis+sentinel://host,host/service, "
        f"redis+cluster://host,host, or {EMBEDDED!r} (one machine).",
    )
    data_dir: str = Field(
        default="",
        description="Of the embedded Redis; empty: $SINKSERVE_HOME/data (~/.sinkserve/data).",
    )
    conversation_ttl_s: float = Field(
        default=30 * 24 * 3600.0,
        ge=60,
        le=3600.0 * 24 * 36_500,
        description="Idle conversations are forgotten after this, seconds.",
    )
    api_keys_file: str = Field(
        default="", description="See deployments/auth.py; empty: one open tenant."
    )
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65_535)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        limits, found = self.limits, []
        if limits.default_max_tokens > limits.max_output_tokens:
            found.append(
                f"limits.default_max_tokens: {limits.default_max_tokens} is above "
                f"limits.max_output_tokens ({limits.max_output_tokens}). Lower it"
            )
        if 0 < self.prefill_tokens < min(self.max_chunk, 8):
            found.append(
                f"prefill_tokens: {self.prefill_tokens} makes every prompt crawl. "
                "Use at least 8, or 0 for one chunk"
            )
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            found.append("replicas: autoscaling sets the number of replicas. Remove one of the two")
        if self.redis_url != EMBEDDED and (problem := url_problem(self.redis_url)):
            found.append(f"redis_url: {problem} or {EMBEDDED!r}")
        if self.is_engine_directory:
            found += [
                f"{name}: the engine directory {self.model!r} fixes it. "
                "Remove it here, or build another engine with `sinkserve build`"
                for name in ("max_chunk", "weight_format")
                if name in self.model_fields_set
            ]
        if self.api_keys_file and not Path(self.api_keys_file).is_file():
            found.append(f"api_keys_file: no file {self.api_keys_file!r}. Create it or remove this")
        return found

    @property
    def is_engine_directory(self) -> bool:
        """Whether `model` is a path rather than the name of a model that can be built here."""
        return self.model not in (TOY_MODEL, DEMO_MODEL)

    @property
    def capacity_override(self) -> int | None:
        """The capacity to run an engine directory with; None: its own."""
        fixed = not self.is_engine_directory or "capacity" in self.model_fields_set
        return self.capacity if fixed else None

    @property
    def model_name(self) -> str:
        """The `model` that requests name and replies carry."""
        return self.served_model_name or Path(self.model).name

    @property
    def max_replicas(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    def threads_of(self, num_replicas: int) -> int:
        """Threads of one CPU engine where this many replicas share the machine."""
        cores = os.cpu_count() or 1
        return self.threads_per_replica or max(1, cores // max(1, num_replicas))

    @property
    def cpu_budget_bytes(self) -> int:
        """`memory_budget_bytes` of an engine on CPUs."""
        return CPU_BUDGET_BYTES if self.memory_budget_bytes is None else self.memory_budget_bytes

    def gpus_for(self, spec: EngineSpec) -> float:
        """GPUs of one replica that runs an engine of this spec. Raises ConfigError.

        A replica gets them all as one actor, which Ray places on one node: so does its TP group.
        """
        ranks, given = spec.tp_size, self.gpus_per_replica
        if spec.target == "cpu":
            if given:
                raise ConfigError(
                    [f"gpus_per_replica: {given:g}, but {self.model!r} runs on CPUs. Remove it"]
                )
            return 0.0
        if given is None or given == ranks:
            return float(ranks)
        if ranks > 1:
            problem = f"{given:g}, but {self.model!r} was built for {ranks} ranks, one GPU each"
            raise ConfigError([f"gpus_per_replica: {problem}. Remove it, or build with --tp"])
        if not 0 < given < 1:
            problem = f"{given:g}, but {self.model!r} runs on one GPU"
            raise ConfigError([f"gpus_per_replica: {problem}. Remove it, or build with --tp"])
        if self.memory_budget_bytes is None:
            problem = f"{given:g}: replicas that share a GPU would each take all its free memory"
            raise ConfigError([f"gpus_per_replica: {problem}. Set memory_budget_bytes"])
        return given

    @property
    def max_ongoing_turns(self) -> int:
        """Turns a replica accepts before the router waits: running, waiting, and one to be told so."""
        return self.max_running + self.max_waiting + 1

    @property
    def sampling(self) -> SamplingDefaults:
        """`default_sampling`, or what suits the model."""
        if self.default_sampling is not None:
            return self.default_sampling
        if self.model == DEMO_MODEL:
            return _DEMO_SAMPLING
        return SamplingDefaults()

    def user_config(self) -> dict[str, Any]:
        """The tunables as Ray Serve's JSON `user_config`; `ServiceConfig.tuned` is the inverse."""
        tunables = self.model_copy(update={"default_sampling": self.sampling})
        return tunables.model_dump(mode="json", include=set(Tunables.model_fields))

    def tuned(self, user_config: Mapping[str, Any]) -> ServiceConfig:
        """This configuration with other tunables. Raises ConfigError."""
        unknown = set(user_config) - set(Tunables.model_fields)
        if unknown:
            raise ConfigError([f"user_config.{name}: not a tunable. Remove it" for name in unknown])
        fields = self.model_dump(mode="json", exclude_unset=True)
        return load_config({**fields, **user_config})


def load_config(fields: Mapping[str, Any]) -> ServiceConfig:
    """Validate a mapping (from YAML, JSON or the command line). Raises ConfigError, every problem at once."""
    try:
        return ServiceConfig.model_validate(dict(fields))
    except ValidationError as error:
        raise ConfigError([line for item in error.errors() for line in _explain(item)]) from None


def _explain(item: Any) -> list[str]:
    """One pydantic error as `field: problem. Fix`."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":
        lines = str(item["ctx"]["error"]).split("\n")
        return [f"{path}: {line}" if path else line for line in lines]
    if item["type"] == "extra_forbidden":
        return [f"{path}: unknown field. {_closest(item['loc'])}"]
    message = str(item["msg"]).removeprefix("Input ")
    return [f"{path}: {item['input']!r} {message}. Change it"]


def _closest(location: tuple[str | int, ...]) -> str:
    models: dict[str, type[BaseModel]] = {
        "limits": Limits,
        "default_sampling": SamplingDefaults,
        "autoscaling": Autoscaling,
    }
    model = models.get(str(location[0]), ServiceConfig) if len(location) > 1 else ServiceConfig
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    return f"Did you mean {close[0]!r}?" if close else "Remove it"
