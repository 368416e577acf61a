"""Who claimed a conversation's turns, in what order, and what follows from that.

Claims overtake each other on their way to the store, and answers get lost: what is concluded here is
concluded only where the order is certain. A *run* of a turn is everything from a `begin` that was
given a new turn to its end, whoever goes on with it; all who show tokens of one run show the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.conversation import BeginTurn, Checkpoint, Fence, Ownership
from cluster.store import StoreLimits
from tests.sim.virtual import report_failure

LIMITS = StoreLimits()


class Violation(Exception):
    """A promise was broken. Known to the loop at once: who causes one may catch whatever it meets."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        report_failure(self)


@dataclass(slots=True, eq=False)
class Run:
    """Tokens by number: what the store has acknowledged, what clients were shown."""

    stored: list[int] = field(default_factory=list)
    shown: dict[int, int] = field(default_factory=dict)
    may_end: bool = False
    """Something was sent that may have ended it, so that its key may begin anew."""


@dataclass(slots=True, eq=False)
class Claim:
    """One `begin`. `overlapped` when another one was under way at the same time."""

    number: int
    turn: BeginTurn
    sent_s: float
    overlapped: bool
    known: bool = False
    ending: bool = False
    aborted: bool = False
    run: Run | None = None
    fence: Fence | None = None
    lease_s: float = 0.0


class Claims:
    """Of one conversation. `keeps_leases`: no clock jumps, no roll-back. `durable`: tokens are stored
    before they are shown."""

    def __init__(self, keeps_leases: bool, durable: bool = True) -> None:
        self._keeps_leases = keeps_leases
        self._durable = durable
        self._all: list[Claim] = []
        self._under_way: list[Claim] = []
        self._losses: dict[str, tuple[int, int]] = {}
        self._runs: dict[str, tuple[Run, Claim]] = {}
        self._epochs: dict[int, str] = {}
        self._holder: Claim | None = None
        self._ever_shown: set[tuple[str, int, int]] = set()

    def sent(self, turn: BeginTurn, now_s: float) -> Claim:
        claim = Claim(len(self._all), turn, now_s, bool(self._under_way))
        for other in self._under_way:
            other.overlapped = True
        self._all.append(claim)
        self._under_way.append(claim)
        deaths, others = self._losses.get(turn.key, (0, 0))
        is_dead = turn.steal and not turn.blameless
        self._losses[turn.key] = deaths + is_dead, others + (not is_dead)
        for key, (run, _) in self._runs.items():
            run.may_end |= key != turn.key
        return claim

    def returned(self, claim: Claim, known: bool) -> None:
        """With an answer (`known`) or without."""
        claim.known = known
        self._under_way.remove(claim)

    def died(self, replica: str) -> None:
        """Its claims are on their way no more."""
        self._under_way = [claim for claim in self._under_way if claim.turn.replica != replica]

    def granted(self, claim: Claim, ownership: Ownership, now_s: float, may_lack: bool) -> None:
        """The store gave it the turn. `may_lack`: the store may have lost what it acknowledged."""
        turn, fence = claim.turn, ownership.fence
        if self._epochs.setdefault(fence.epoch, fence.nonce) != fence.nonce:
            raise Violation(f"{turn.key}: epoch {fence.epoch} was given out twice")
        self._check_lease(claim, ownership, now_s)
        claim.run, claim.fence = self._run_of(claim, ownership, may_lack), fence
        claim.run.may_end |= any(other.turn.key != turn.key for other in self._under_way)
        claim.lease_s = claim.sent_s + turn.lease_s
        stored, resumed = claim.run.stored, ownership.output_ids.tolist()
        if may_lack and resumed[: len(stored)] != stored[: len(resumed)]:
            self._branch_off(claim, resumed)
        elif self._is_late(claim, fence) and resumed == stored[: len(resumed)]:
            return
        elif not may_lack and resumed[: len(stored)] != stored:
            raise Violation(f"{turn.key}: resumed with {resumed}, stored were {stored}")
        else:
            stored.extend(resumed[len(stored) :])

    def busy(self, claim: Claim, stored: list[int]) -> None:
        """The turn runs elsewhere, and this much of it is in the store."""
        run, _ = self._runs.get(claim.turn.key, (None, claim))
        if run is not None and stored[: len(run.stored)] == run.stored:
            run.stored.extend(stored[len(run.stored) :])

    def stored(self, checkpoint: Checkpoint, sent_s: float, may_lack: bool) -> None:
        """The store has acknowledged these tokens, sent at this time."""
        claim, tokens = self.by_fence(checkpoint.fence), checkpoint.token_ids.tolist()
        if tokens and claim is self._all[-1]:
            self._losses[claim.turn.key] = 0, 0
        # The store writes a lease anew once a quarter of it is used up.
        if claim.lease_s >= 0.0:
            claim.lease_s = max(claim.lease_s, sent_s + 0.75 * checkpoint.lease_s)
        stored = self.run_of(claim).stored
        known = stored[checkpoint.k : checkpoint.k + len(tokens)]
        if checkpoint.k <= len(stored) and known != tokens[: len(known)] and may_lack:
            self._branch_off(claim, [*stored[: checkpoint.k], *tokens])
            return
        if checkpoint.k > len(stored) or known != tokens[: len(known)]:
            raise Violation(f"{claim.turn.key}: {tokens} at {checkpoint.k} of {stored}")
        stored.extend(tokens[len(known) :])

    def ends(self, fence: Fence, aborts: bool) -> None:
        """A commit or an abort is about to be sent."""
        claim = self._by_nonce(fence)
        # An answer that comes late says nothing about its lease any more.
        claim.lease_s = -1.0
        claim.ending = True
        claim.aborted |= aborts
        if aborts and claim.run is not None:
            claim.run.may_end = True

    def fenced(self, fence: Fence, commits: bool) -> None:
        """The store has called this fence an old one: there must have been a later claim, or an end of
        its own."""
        claim = self.by_fence(fence)
        mine = claim.aborted or (claim.ending and not commits)
        if not claim.overlapped and not mine and claim is self._all[-1]:
            raise Violation(f"{claim.turn.key}: the latest claim of all was fenced")

    def quarantined(self, claim: Claim, may_lack: bool) -> None:
        """Refused, as the turn had lost too many owners that stored no token."""
        if self._holder is not None:
            self._holder.lease_s = -1.0
        deaths, others = self._losses[claim.turn.key]
        if deaths < LIMITS.max_attempts and others <= LIMITS.max_lapses and not may_lack:
            raise Violation(f"{claim.turn.key}: quarantined after {deaths} deaths")

    def shown(
        self, replica: str, key: str, k: int, tokens: tuple[int, ...], may_lack: bool
    ) -> None:
        """`replica` has shown a client tokens `k`, `k` + 1, ... of the turn. What the store has lost
        since it was shown may be shown again."""
        owned = [c for c in self._all if c.run and (c.turn.replica, c.turn.key) == (replica, key)]
        if not owned and key not in self._runs:
            raise Violation(f"{replica} streams {key}, which nobody was given")
        run = self._runs[key][0] if key in self._runs else self.run_of(owned[-1])
        if owned and run.stored[k : k + len(tokens)] != list(tokens):
            # Not what the turn's present owner has stored: then what this replica has.
            run = self.run_of(owned[-1])
        for place, token in enumerate(tokens, k):
            if run.shown.setdefault(place, token) != token:
                was = run.shown[place]
                raise Violation(f"{key}: token {place} is {token}, but was shown as {was}")
            again = may_lack and (key, place, token) in self._ever_shown
            self._ever_shown.add((key, place, token))
            if self._durable and run.stored[place : place + 1] != [token] and not again:
                raise Violation(f"{key}: token {place} was shown before it was stored")

    def by_fence(self, fence: Fence) -> Claim:
        return next(claim for claim in self._all if claim.fence == fence)

    def _by_nonce(self, fence: Fence) -> Claim:
        """Also of a claim whose answer was lost."""
        return next(claim for claim in reversed(self._all) if claim.turn.nonce == fence.nonce)

    @staticmethod
    def run_of(claim: Claim) -> Run:
        if claim.run is None:
            raise LookupError(f"claim {claim.number} was given nothing")
        return claim.run

    def _is_late(self, claim: Claim, fence: Fence) -> bool:
        """Whether the turn was taken over again before this answer came."""
        later = (c.fence for c in self._all if c.run is claim.run and c.fence is not None)
        return any(other.epoch > fence.epoch for other in later)

    def _branch_off(self, claim: Claim, stored: list[int]) -> None:
        """A store that went back under a lost owner lets an older one go on, with tokens of its own."""
        claim.run = Run(list(stored))
        self._runs[claim.turn.key] = (claim.run, claim)

    def _check_lease(self, claim: Claim, ownership: Ownership, now_s: float) -> None:
        holder = self._holder
        if holder is not None and claim.number < holder.number:
            return
        self._holder = claim
        certain = holder is not None and not (holder.overlapped or claim.overlapped)
        if holder is None or not certain or not self._keeps_leases or ownership.resumed:
            return
        if now_s < holder.lease_s:
            raise Violation(f"{claim.turn.key}: begun while {holder.turn.key} was running")

    def _run_of(self, claim: Claim, ownership: Ownership, may_lack: bool) -> Run:
        """The run that this claim goes on with, or a new one."""
        key = claim.turn.key
        run, began = self._runs.get(key, (None, claim))
        lacks = may_lack and run is not None and len(ownership.output_ids) < len(run.stored)
        certain = not (lacks or self._may_hide_a_run(began, claim))
        if run is not None and ownership.resumed and certain:
            return run
        late = claim.number < began.number
        lost = run is not None and run.shown and not run.may_end
        if lost and not (ownership.resumed or late or may_lack):
            raise Violation(f"{key}: begun anew, although some of it was shown")
        fresh = Run()
        if not late:
            self._runs[key] = (fresh, claim)
        return fresh

    def _may_hide_a_run(self, began: Claim, claim: Claim) -> bool:
        """Whether a claim without an answer may have begun the turn anew since."""
        since = self._all[began.number + 1 :]
        return any(not other.known for other in since if other is not claim)
