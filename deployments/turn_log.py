"""What a turn has said so far, for whoever reads it: from the start, or from where a reader stood.

    engine -> gate -> show -> | 0 1 2 3 4 5 6 |  <- a reader that is up to date
                                    ^------------ a reader that stalls finds the rest in one piece

All tokens in it are stored already, as far as the configuration asks for that. A reader that has been
shown tokens before, elsewhere, is given none that contradict them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence

from deployments.errors import ErrorInfo
from deployments.turn_call import TurnAccepted, TurnDone, TurnItem, TurnRefused, TurnTokens
from engine.sampling import TokenLogprob

Logprob = tuple[TokenLogprob, tuple[TokenLogprob, ...]]

CONTRADICTED = ErrorInfo(
    "turn_conflict",
    "The reply is not the one that was shown before; read the conversation again.",
    "conversation",
)


class TurnLog:
    """One turn's. Use it from one event loop."""

    def __init__(self) -> None:
        self.accepted: TurnAccepted | None = None
        self.end: TurnDone | TurnRefused | None = None
        self._token_ids: list[int] = []
        self._logprobs: list[Logprob] = []
        # Tokens sampled by an earlier owner come first and have no logprobs.
        self._num_bare = 0
        self._readers: set[asyncio.Event] = set()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything shown so far."""
        return tuple(self._token_ids)

    def __len__(self) -> int:
        return len(self._token_ids)

    def accept(self, accepted: TurnAccepted) -> None:
        """Readers are told once, by the first of these."""
        if self.accepted is None:
            self.accepted = accepted
            self._wake()

    def show(self, token_ids: Sequence[int], logprobs: Sequence[Logprob] = ()) -> None:
        """The next tokens of the reply; with a logprob each, or with none."""
        if not token_ids:
            return
        self._token_ids.extend(token_ids)
        self._logprobs.extend(logprobs)
        if not logprobs:
            self._num_bare = len(self._token_ids)
        self._wake()

    def finish(self, end: TurnDone | TurnRefused) -> None:
        """The last item; a second one is ignored."""
        if self.end is None:
            self.end = end
            self._wake()

    async def items(self, shown_ids: Sequence[int] = ()) -> AsyncGenerator[TurnItem, None]:
        """TurnAccepted, the tokens after `shown_ids`, then the end."""
        woken = asyncio.Event()
        self._readers.add(woken)
        k, checked, told = len(shown_ids), 0, False
        try:
            while True:
                woken.clear()
                if self.accepted is not None and not told:
                    told = True
                    yield self.accepted
                known = min(len(shown_ids), len(self._token_ids))
                if self._token_ids[checked:known] != list(shown_ids[checked:known]):
                    yield TurnRefused(CONTRADICTED)
                    return
                checked = known
                for tokens in self._after(k):
                    k += len(tokens.token_ids)
                    yield tokens
                # While this waited at a `yield`, more may have come.
                if self.end is not None and k >= len(self._token_ids):
                    yield self.end
                    return
                await woken.wait()
        finally:
            self._readers.discard(woken)

    def _after(self, k: int) -> Iterator[TurnTokens]:
        bare, count = self._num_bare, len(self._token_ids)
        if k < bare:
            yield TurnTokens(k, tuple(self._token_ids[k:bare]))
            k = bare
        if k < count:
            yield TurnTokens(
                k, tuple(self._token_ids[k:count]), tuple(self._logprobs[k - bare : count - bare])
            )

    def _wake(self) -> None:
        for woken in self._readers:
            woken.set()
