"""What everybody asked, sent and saw, kept for ever; and the checks that it makes sense.

The ledger is told what really happened (it is no part of the system under test) and raises Violation
at the first thing that a promise of docs/guarantees.md forbids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.conversation import (
    GENESIS,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    TurnCommit,
    chain_head,
)
from deployments.turn_call import TurnCall, TurnDone
from tests.sim.claims import Claim, Claims, Violation
from tests.sim.toy import EOS, close_reply, oracle_reply

Oracle = Callable[[tuple[int, int], Sequence[int], TurnCall, int], list[int]]
"""What the deterministic toy must say: see `oracle_reply`."""

Name = tuple[str, str]
"""(conversation_id, key)"""


@dataclass(frozen=True, slots=True)
class Proposed:
    """A commit that some replica has sent; whether it was executed, only the chain can tell."""

    turn: int
    before: str
    key: str
    input_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    messages: tuple[Message, ...]


@dataclass(slots=True)
class Known:
    """One conversation as the ledger knows it."""

    new: NewConversation
    claims: Claims
    deleted: bool = False
    may_be_gone: bool = False
    proposed: dict[str, Proposed] = field(default_factory=dict)
    acknowledged: dict[int, tuple[str, str]] = field(default_factory=dict)
    """turn -> (head, key) of every reply that a client was told to be final."""
    at_risk: list[tuple[int, str, str]] = field(default_factory=list)
    """Acknowledged before a store roll-back that nobody may have survived: (turn, head, key)."""


class Ledger:
    """`noisy`: replies depend on who computed them, so that they cannot be recomputed. `keeps_leases`:
    no clock jumps and nothing is rolled back, so that leases last as long as they say. `durable`: tokens
    are stored before they are shown."""

    def __init__(
        self,
        noisy: bool,
        keeps_leases: bool,
        oracle: Oracle = oracle_reply,
        durable: bool = True,
    ) -> None:
        self.known: dict[str, Known] = {}
        self.counts: Counter[str] = Counter()
        self.last_owner = ""
        self._noisy = noisy
        self._oracle = oracle
        self._keeps_leases = keeps_leases
        self._durable = durable
        self._asked: dict[Name, TurnCall] = {}
        self._victims: Counter[Name] = Counter()
        self._unblamed: Counter[Name] = Counter()

    # --- what clients do and see ------------------------------------------------------------------

    def created(self, new: NewConversation) -> None:
        self.known[new.conversation_id] = Known(new, Claims(self._keeps_leases, self._durable))

    def deleted(self, conversation_id: str) -> None:
        self.known[conversation_id].deleted = True

    def asked(self, call: TurnCall) -> None:
        """A client is about to send this."""
        self._asked.setdefault((call.conversation_id, call.key), call)

    def shown(self, replica: str, call: TurnCall, k: int, tokens: tuple[int, ...]) -> None:
        """`replica` has sent tokens `k`, `k` + 1, ... to the client of `call`."""
        self.counts["shown"] += len(tokens)
        known = self.known[call.conversation_id]
        known.claims.shown(replica, call.key, k, tokens, known.may_be_gone)

    def done(self, call: TurnCall, seen: list[int], done: TurnDone, streamed: bool) -> None:
        """A client was told that its turn is committed, after having seen these tokens of it, the last
        of them in the same call if `streamed`."""
        reply = done.output_ids.tolist()
        known, name = self.known[call.conversation_id], (call.conversation_id, call.key)
        if reply[: len(seen)] != seen:
            if streamed or not known.may_be_gone:
                raise Violation(f"{name}: streamed {seen}, committed {reply}")
            # Somebody else went on with an older store. The ingress makes a 409 of it.
            self.counts["contradicted"] += 1
            return
        entry = known.proposed.get(done.head)
        if entry is None or entry.turn != done.turn or entry.key != call.key:
            raise Violation(f"{name}: told of a commit that nobody made: turn {done.turn}")
        if list(entry.output_ids) != [*reply, EOS]:
            raise Violation(f"{name}: told {reply}, committed {entry.output_ids}")
        if call.expect_head is not None and entry.before != call.expect_head:
            raise Violation(f"{name}: went on from another state than the client expected")
        first = known.acknowledged.setdefault(done.turn, (done.head, call.key))
        if first != (done.head, call.key) and known.may_be_gone:
            # One of the two was answered in a life of the store that has ended since.
            known.at_risk.append((done.turn, done.head, call.key))
        elif first != (done.head, call.key):
            raise Violation(f"{name}: turn {done.turn} was acknowledged for {first} before")
        self.counts["acknowledged"] += 1

    # --- what the store is told and answers -------------------------------------------------------

    def claims(self, conversation_id: str) -> Claims:
        return self.known[conversation_id].claims

    def may_be_gone(self, conversation_id: str) -> bool:
        return self.known[conversation_id].may_be_gone

    def died(self, replica: str) -> None:
        for known in self.known.values():
            known.claims.died(replica)

    def granted(self, claim: Claim, ownership: Ownership, now_s: float) -> None:
        """The store gave the claim's replica the turn, until now."""
        turn, record = claim.turn, ownership.conversation
        known, name = self.known[turn.conversation_id], (turn.conversation_id, turn.key)
        self.last_owner = turn.replica
        self.counts["begun"] += 1
        self.counts["resumed"] += ownership.resumed
        again = name in self._unblamed
        self._unblamed[name] += again and (turn.blameless or not turn.steal)
        if not ownership.resumed:
            if turn.expect_head is not None and record.head != turn.expect_head:
                raise Violation(f"{turn.key}: begun at another hash than expected")
        elif ownership.input_ids.tolist() != self._asked[name].input_ids.tolist():
            raise Violation(f"{turn.key}: resumed with another input")
        if known.new.tenant != turn.tenant:
            raise Violation(f"{turn.key}: begun for a foreign tenant")
        known.claims.granted(claim, ownership, now_s, known.may_be_gone)

    def fenced(self, conversation_id: str, fence: Fence, commits: bool = False) -> None:
        """The store has called this fence of a checkpoint, or of a commit, an old one."""
        if not self.known[conversation_id].may_be_gone:
            self.claims(conversation_id).fenced(fence, commits)

    def proposed(self, commit: TurnCommit, turn: int, before: str) -> None:
        """A replica is about to send this commit of turn number `turn` after hash `before`."""
        self.counts["proposed"] += 1
        claims = self.claims(commit.conversation_id)
        key = claims.by_fence(commit.fence).turn.key
        asked = self._asked[commit.conversation_id, key]
        if commit.head != chain_head(before, asked.input_ids, commit.output_ids):
            raise Violation(f"{key}: the commit's hash is not that of its ids")
        claims.ends(commit.fence, aborts=False)
        self.known[commit.conversation_id].proposed[commit.head] = Proposed(
            turn,
            before,
            key,
            tuple(asked.input_ids.tolist()),
            tuple(commit.output_ids.tolist()),
            commit.messages,
        )

    def quarantined(self, claim: Claim) -> None:
        """The store refused to give the turn to yet another replica."""
        self.counts["quarantined"] += 1
        known = self.known[claim.turn.conversation_id]
        known.claims.quarantined(claim, known.may_be_gone)

    def poisoned(self, call: TurnCall) -> None:
        """The turn has killed a replica."""
        self.counts["poisoned"] += 1
        name = (call.conversation_id, call.key)
        self._victims[name] += 1
        # Its first run, one after a death that was seen, and those after other losses.
        allowed = 2 + self._unblamed[name]
        if self._victims[name] > allowed and not self.known[call.conversation_id].may_be_gone:
            raise Violation(f"{call.key}: has killed {self._victims[name]} replicas")

    def key_reused(self, call: TurnCall) -> None:
        """The store said that the key came with another request before."""
        first = self._asked[call.conversation_id, call.key]
        if first.request_hash == call.request_hash:
            raise Violation(f"{call.key}: its own retry was called another request")
        self.counts["key_reused"] += 1

    # --- faults that excuse -----------------------------------------------------------------------

    def excuse_losses(self) -> None:
        """The store has lost writes and their owners may be dead: what was acknowledged may be gone,
        but only with a refusal that says so."""
        for known in self.known.values():
            known.at_risk += [(turn, *what) for turn, what in known.acknowledged.items()]
            known.acknowledged.clear()
            known.may_be_gone = True

    # --- the verdict ------------------------------------------------------------------------------

    def verify(self, record: Conversation, transcript: tuple[int, list[Message]]) -> None:
        """Compare a record with all that was asked and said about it."""
        known = self.known[record.conversation_id]
        chain = self._chain(known, record)
        heads = [head for head, _ in chain]
        for turn, (head, key) in known.acknowledged.items():
            if heads[turn - 1 : turn] != [head] and known.may_be_gone:
                self.counts["lost"] += 1
            elif heads[turn - 1 : turn] != [head]:
                raise Violation(f"{key}: acknowledged as turn {turn}, but lost")
        for turn, head, key in known.at_risk:
            self.counts["lost"] += heads[turn - 1 : turn] != [head]
            if heads.count(head) > 1:
                raise Violation(f"{key}: committed twice")
        keys = [entry.key for _, entry in chain]
        if len(set(keys)) != len(keys):
            raise Violation(f"{record.conversation_id}: a key was committed twice: {keys}")
        self._verify_replies(known, [entry for _, entry in chain])
        tokens = sum(len(entry.input_ids) + len(entry.output_ids) for _, entry in chain)
        if record.token_count != tokens:
            raise Violation(f"token_count {record.token_count}, but {tokens} were committed")
        messages = [message for _, entry in chain for message in entry.messages]
        first, tail = transcript
        if messages[first:] != tail and known.may_be_gone:
            # An owner knows the end of a transcript: what comes before may be of what the store went on to.
            self.counts["mixed_transcripts"] += 1
        elif messages[first:] != tail:
            raise Violation(f"transcript from {first}: {tail} instead of {messages[first:]}")
        self.counts["committed"] += len(chain)

    def _chain(self, known: Known, record: Conversation) -> list[tuple[str, Proposed]]:
        """Committed turns, oldest first, found by walking back the hashes."""
        chain: list[tuple[str, Proposed]] = []
        head = record.head
        while head != GENESIS:
            entry = known.proposed.get(head)
            if entry is None:
                raise Violation(f"{record.conversation_id}: a hash that no commit made")
            chain.append((head, entry))
            head = entry.before
        chain.reverse()
        turns = [entry.turn for _, entry in chain]
        if turns != list(range(1, len(chain) + 1)) or record.turn != len(chain):
            raise Violation(f"{record.conversation_id}: turn {record.turn}, chain of {turns}")
        return chain

    def _verify_replies(self, known: Known, chain: list[Proposed]) -> None:
        """What was shown of a turn is what was committed of it; and the toy would say it again."""
        window = (known.new.sink_tokens, known.new.window_tokens)
        context: list[int] = []
        for entry in chain:
            name = (known.new.conversation_id, entry.key)
            asked = self._asked[name]
            context += entry.input_ids
            if not self._noisy:
                due = close_reply(self._oracle(window, context, asked, entry.turn))
                if list(entry.output_ids) != due[0] + due[1]:
                    raise Violation(f"{name}: committed {entry.output_ids}, due was {due[0]}")
            context += entry.output_ids
