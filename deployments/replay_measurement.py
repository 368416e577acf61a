"""Replay measured on a running engine: one long conversation, its cache rebuilt again and again.

    live      |-- turn --|-- turn --| ... far past the window ... |-- measured turn --| ...
    floor     all of the conversation's tokens, in full chunks    |   the same turn,  |
    1 window  sinks, the last R, and                              |   token by token  |
    2 windows sinks, the last 2R, and                             |   beside the live |

At a measured turn the conversation is taken for cold: every depth is rebuilt by the plan that a replica
would run (`cluster.restore`), in a kv_slot of its own. The live cache then writes the reply; the others
are fed the same tokens in the same steps, so all they differ by is how their cache was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.conversation import ReplayLog, TokenIds
from cluster.restore import RestorePlan, plan_restore, retained_ids
from engine.protocol import Engine, Logits, Row, RowResult, SampleRequest, StepPlan, TurnFailed
from engine.replay_quality import ReplayQuality, ReplyComparison, kl_divergence, summarise
from engine.sampling import SamplingParams, sample_rows
from engine.window import SinkWindow

WARM_WINDOWS = 2
"""Windows of the conversation that not even the deepest replay sees."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What is talked about. `inputs` are the turns' input ids, without end; a reply ends after one of
    `eos_ids`, which is not kept, and is followed by `closing`. Replies are drawn with `sampling`."""

    inputs: Iterator[TokenIds]
    sampling: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    closing: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """`depths` in windows, rising; `replies` measured of each kind, sampled and greedy, of at most
    `reply_tokens` tokens. `sink_tokens` are pinned.

    Raises ValueError for depths that do not rise from 1 on or counts below 1.
    """

    depths: tuple[int, ...] = (1, 2, 4, 8)
    replies: int = 8
    reply_tokens: int = 64
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        if not self.depths or list(self.depths) != sorted({max(1, d) for d in self.depths}):
            raise ValueError("depths must be rising numbers of windows, 1 or more")
        if min(self.replies, self.reply_tokens) < 1 or self.sink_tokens < 0:
            raise ValueError("replies and reply_tokens must be at least 1")

    @property
    def num_slots(self) -> int:
        """kv_slots needed: the live cache, the noise floor and one for each depth."""
        return 2 + len(self.depths)


@dataclass(frozen=True, slots=True)
class MeasuredReply:
    """Where a measured turn lies in the conversation, token counts, and what each depth made of it."""

    greedy: bool
    base_tokens: int
    input_tokens: int
    comparisons: tuple[ReplyComparison, ...]


@dataclass(frozen=True, slots=True)
class RestoreCost:
    """Of one depth, per restore: tokens run before the turn's own, and seconds (mean)."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """`depths` and `costs` in the order of the options, `floor` is the replay of everything.

    `conversation` are all its token ids, int32. In `replies`, comparisons are those of the depths,
    then that of the floor.
    """

    depths: tuple[ReplayQuality, ...]
    floor: ReplayQuality
    costs: tuple[RestoreCost, ...]
    conversation: TokenIds
    replies: tuple[MeasuredReply, ...]


@dataclass(slots=True)
class _Cache:
    """A kv_slot and what it holds: `length` tokens, of the window those from `window_start` on."""

    kv_slot: int
    length: int = 0
    window_start: int = 0


def measure(
    engine: Engine, dialogue: Dialogue, options: MeasureOptions, progress: Progress
) -> Measurement:
    """Run it all. `progress` gets what is being done and the fraction of the work that is done.

    Raises ValueError for an engine with too few kv_slots or a window without room for the sinks, and
    TurnFailed for logits that are not finite.
    """
    return _Measuring(engine, dialogue, options, progress).run()


class _Measuring:
    def __init__(
        self, engine: Engine, dialogue: Dialogue, options: MeasureOptions, progress: Progress
    ) -> None:
        spec, sinks = engine.spec, options.sink_tokens
        if sinks > spec.max_sink_tokens:
            raise ValueError(
                f"{sinks} tokens are pinned, a window of {spec.capacity} has room for "
                f"{spec.max_sink_tokens}"
            )
        if engine.max_resident < options.num_slots:
            raise ValueError(
                f"{options.num_slots} kv_slots are needed (live, floor, one a depth) and the engine "
                f"has {engine.max_resident}: measure fewer depths or give it more memory"
            )
        self._engine, self._dialogue, self._options = engine, dialogue, options
        self._progress = progress
        self._window = SinkWindow(sinks, spec.capacity - sinks, spec.slot_tokens - sinks)
        self._caches = [_Cache(slot) for slot in range(options.num_slots)]
        self._live, *self._rebuilt, self._floor = self._caches
        self._ids = np.zeros(0, np.int32)
        self._turn = 0
        self._seconds = [0.0 for _ in options.depths]
        window = self._window.window_tokens
        self._warm_tokens = sinks + (options.depths[-1] + WARM_WINDOWS) * window
        self._work_tokens = 2 * self._warm_tokens
        self._work_tokens += 2 * options.replies * (sum(options.depths) + 1) * window
        self._done_tokens = 0

    def run(self) -> Measurement:
        options, window = self._options, self._window.window_tokens
        replies = list[MeasuredReply]()
        measure_at = self._warm_tokens
        while len(replies) < 2 * options.replies:
            if len(self._ids) < measure_at:
                self._turn_of(self._dialogue.sampling, measured=False)
                continue
            # Half a window on, other tokens are in sight.
            measure_at = len(self._ids) + window // 2
            replies.append(self._measured_turn(greedy=len(replies) % 2 == 1))
            self._report(f"{len(replies)} of {2 * options.replies} replies measured")
        return self._result(replies)

    def _result(self, replies: Sequence[MeasuredReply]) -> Measurement:
        options = self._options

        def quality(place: int, windows: int | None) -> ReplayQuality:
            sampled = [reply.comparisons[place] for reply in replies if not reply.greedy]
            greedy = [reply.comparisons[place] for reply in replies if reply.greedy]
            return summarise(windows, sampled, greedy)

        costs = [
            RestoreCost(
                self._window.sink_tokens + windows * self._window.window_tokens,
                seconds / len(replies),
            )
            for windows, seconds in zip(options.depths, self._seconds, strict=True)
        ]
        return Measurement(
            depths=tuple(quality(place, windows) for place, windows in enumerate(options.depths)),
            floor=quality(len(options.depths), None),
            costs=tuple(costs),
            conversation=self._ids,
            replies=tuple(replies),
        )

    # Turns.

    def _measured_turn(self, greedy: bool) -> MeasuredReply:
        base = len(self._ids)
        sampling = SamplingParams(temperature=0.0) if greedy else self._dialogue.sampling
        input_tokens, comparisons = self._turn_of(sampling, measured=True)
        return MeasuredReply(greedy, base, input_tokens, comparisons)

    def _turn_of(
        self, sampling: SamplingParams, measured: bool
    ) -> tuple[int, tuple[ReplyComparison, ...]]:
        """One turn of the live cache; of the rebuilt ones too if `measured`."""
        self._turn += 1
        input_ids = next(self._dialogue.inputs)
        whole = self._log(len(self._ids))
        logits = [
            self._prefill(self._live, plan_restore(whole, input_ids, self._resident(self._live)))
        ]
        if measured:
            for number, (windows, cache) in enumerate(
                zip(self._options.depths, self._rebuilt, strict=True)
            ):
                self._report(f"rebuilding the cache, depth {windows}")
                cache.length = 0
                began_s = time.perf_counter()
                log = self._log(windows * self._window.window_tokens)
                logits.append(self._prefill(cache, plan_restore(log, input_ids, None)))
                self._seconds[number] += time.perf_counter() - began_s
            self._report("the noise floor: running the whole conversation")
            plan = plan_restore(whole, input_ids, self._resident(self._floor))
            logits.append(self._prefill(self._floor, plan))
        self._ids = np.concatenate([self._ids, input_ids])
        caches = self._caches if measured else [self._live]
        comparisons = self._reply(caches, logits, sampling)
        if not measured:
            self._report(f"a conversation of {len(self._ids):,} tokens")
        return len(input_ids), comparisons

    def _log(self, recent_tokens: int) -> ReplayLog:
        """What the store would hold of the conversation so far."""
        empty = np.zeros(0, np.int32)
        return ReplayLog(empty, empty, 0).advanced(
            self._ids, self._window.sink_tokens, recent_tokens
        )

    @staticmethod
    def _resident(cache: _Cache) -> int | None:
        return cache.length or None

    def _reply(
        self, caches: Sequence[_Cache], logits: Sequence[Logits], sampling: SamplingParams
    ) -> tuple[ReplyComparison, ...]:
        """Let the first cache write the reply and the others follow, from their `logits` on; the
        conversation grows by it."""
        log = self._log(self._options.depths[-1] * self._window.window_tokens)
        history = retained_ids(log, np.zeros(0, np.int32))
        history = history[~np.isin(history, list(self._dialogue.eos_ids))]
        kl = list[list[float]]()
        same_top = list[list[bool]]()
        reply = list[int]()
        while True:
            live, *others = logits
            kl.append([kl_divergence(live, other) for other in others])
            same_top.append([int(live.argmax()) == int(other.argmax()) for other in others])
            seen = np.concatenate([history, np.array(reply, np.int32)])
            request = SampleRequest(sampling, self._turn, len(reply), seen)
            (drawn,) = sample_rows(live[None], [request])
            if drawn.token_id is None:
                raise TurnFailed(drawn.failed)
            if drawn.token_id in self._dialogue.eos_ids:
                break
            reply.append(drawn.token_id)
            if len(reply) == self._options.reply_tokens:
                break
            logits = self._follow(caches, np.array([drawn.token_id], np.int32))
        self._ids = np.concatenate([self._ids, np.array(reply, np.int32), self._dialogue.closing])
        columns = np.array(kl), np.array(same_top)
        return tuple(
            ReplyComparison(columns[0][:, n], columns[1][:, n]) for n in range(len(caches) - 1)
        )

    # Steps.

    def _prefill(self, cache: _Cache, plan: RestorePlan) -> Logits:
        """Run a plan chunk by chunk; logits after its last token, float32 [vocab]."""
        if plan.recovery != "none":
            cache.window_start = plan.window_start
        size = self._engine.spec.max_chunk
        chunks = [
            (segment.start + offset, segment.tokens[offset : offset + size])
            for segment in plan.segments
            for offset in range(0, len(segment.tokens), size)
        ]
        *all_but_last, (last_start, last) = chunks
        for start, tokens in all_but_last:
            cache.length = start
            row = Row(cache.kv_slot, start, tokens, self._window, cache.window_start)
            self._run([row])
        cache.length = last_start
        return self._follow([cache], last)[0]

    def _follow(self, caches: Sequence[_Cache], tokens: TokenIds) -> list[Logits]:
        """The same tokens for each cache, in one step; the logits after the last, float32 [vocab]."""
        results = self._run(
            Row(
                cache.kv_slot,
                cache.length,
                tokens,
                self._window,
                cache.window_start,
                logits="last",
            )
            for cache in caches
        )
        found = [result.logits[-1] for result in results if result.logits is not None]
        if len(found) != len(caches):
            raise TurnFailed("the engine returned no logits")
        for cache in caches:
            cache.length += len(tokens)
        return found

    def _run(self, rows: Iterable[Row]) -> tuple[RowResult, ...]:
        plan = StepPlan(tuple(rows))
        results = self._engine.step(plan).rows
        for result in results:
            if result.failed is not None:
                raise TurnFailed(result.failed)
        self._done_tokens += sum(len(row.tokens) for row in plan.rows)
        return results

    def _report(self, what: str) -> None:
        self._progress(what, min(1.0, self._done_tokens / self._work_tokens))
