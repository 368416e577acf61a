"""The Lua library with one deliberate fault each. The simulation must notice all but the equivalents.

Not listed because nobody could notice them while replicas are right, and why:

    renew without a fence             who was replaced prolongs another's lease: leases are liveness
    checkpoint does not compare       an owner sends the same tokens again; see the replica's mutants
    fence without the epoch           nonces differ; only a very late repetition of a claim brings one
                                      back, which tests/store_checker.py does and a connection does not
    replay ids one token short        twice a window is kept, and a toy sees but one
    losses forgotten with the turn    who has seen an owner die comes back before its lease is over, and
                                      nobody gets in between; tests/store_checker.py notices
    begin knows its own nonce no more its sender finds itself busy, and takes over from itself
"""

from __future__ import annotations

from tests.sim.mutants import Edit, Mutant

STORE_MUTANTS: dict[str, Mutant] = {
    "checkpoint without a fence": Mutant(
        ("pause",),
        edit=Edit("checkpoint", "if state ~= 'running' then", "if not fields.run_nonce then"),
    ),
    "commit without a fence": Mutant(
        ("pause",),
        edit=Edit("commit", "if state == 'running' then", "if fields.run_nonce then"),
        start=60,
    ),
    "takeover without a new nonce": Mutant(
        ("pause", "crash"),
        edit=Edit(
            "begin",
            "'HSET', keys[1], 'epoch', next_epoch(fields, now), 'run_nonce', args[4],\n"
            "      'run_owner', args[2], 'run_attempts', attempts, 'run_lapses', lapses, 'run_r",
            "'HSET', keys[1], 'epoch', next_epoch(fields, now),\n"
            "      'run_owner', args[2], 'run_attempts', attempts, 'run_lapses', lapses, 'run_r",
        ),
    ),
    "epoch stays at a takeover": Mutant(
        ("crash",),
        edit=Edit("next_epoch", "math.max(tonumber(fields.epoch) + 1, now)", "fields.epoch"),
    ),
    "epoch is a plain counter": Mutant(
        ("storm",),
        edit=Edit(
            "next_epoch", "math.max(tonumber(fields.epoch) + 1, now)", "tonumber(fields.epoch) + 1"
        ),
    ),
    "commit is not idempotent": Mutant(
        ("calm",), edit=Edit("commit", "elseif state ~= 'commit' then", "else")
    ),
    "committed key is forgotten": Mutant(
        ("calm",), edit=Edit("begin", "if known then", "if known and known[1] ~= 'DONE' then")
    ),
    "committed request is not compared": Mutant(
        ("calm",), edit=Edit("recall", "result[HASH] ~= hash", "false")
    ),
    "running request is not compared": Mutant(
        ("calm",), edit=Edit("begin", "fields.run_hash ~= args[6]", "false")
    ),
    "steal takes any key": Mutant(
        ("pause", "crash"),
        edit=Edit("begin", "elseif live then", "elseif live and args[7] ~= '1' then"),
    ),
    "lease is ignored": Mutant(
        ("calm",), edit=Edit("begin", "elseif live then", "elseif live and false then")
    ),
    "lease never ends": Mutant(
        ("crash",), edit=Edit("is_live", " and now < tonumber(fields.run_until)", "")
    ),
    "takeover forgets the output": Mutant(
        ("crash",),
        edit=Edit(
            "begin",
            "'run_resumed', 1",
            "'run_resumed', 1, 'run_output', '', 'run_tail', '', 'run_folded', 0",
        ),
    ),
    "expectation is ignored": Mutant(
        ("calm",),
        edit=Edit("begin", "if turn_is_stale or (args[11] ~= ''", "if false and (args[11] ~= ''"),
    ),
    "stranger is let in": Mutant(
        ("calm",), edit=Edit("owned", "if fields.tenant == tenant then", "if fields.tenant then")
    ),
    "poison is never given up": Mutant(
        ("crash", "churn"),
        edit=Edit("count_loss", "attempts >= tonumber(args[12])", "false"),
    ),
    "attempts are never forgiven": Mutant(
        ("crash", "churn"),
        edit=Edit(
            "checkpoint",
            "'run_tail', tail .. ids, 'run_attempts', 0, 'run_lapses', 0",
            "'run_tail', tail .. ids",
        ),
    ),
    "a lapse counts like a death": Mutant(
        ("pause", "clock"),
        edit=Edit("count_loss", "lapses >= tonumber(args[16] or args[12])", "lapses >= 2"),
    ),
    "no tombstone": Mutant(
        ("delete",), edit=Edit("delete", "redis.call('HSET', keys[1], 'gone', fields.epoch)", "")
    ),
    "no time for recovery": Mutant(
        ("rollback",),
        edit=Edit("wake", "recovered = woken + tonumber(args[2])", "recovered = woken"),
    ),
    "restart is not told": Mutant(
        ("rollback",), edit=Edit("pulse", "return { 'OK', life }", "return { 'OK', 'one' }")
    ),
    "repair accepts what is older": Mutant(
        ("rollback", "storm"), edit=Edit("repair", "if order >= 0 then", "if order == 0 then")
    ),
    "repair refuses tokens that were lost": Mutant(
        ("rollback",), edit=Edit("compare", "return tokens < given_tokens and -1 or 1", "return 0")
    ),
    "repair forgets the running turn": Mutant(
        ("rollback",), edit=Edit("repair", "if running then\n    redis", "if false then\n    redis")
    ),
    "repair forgets the results": Mutant(
        ("rollback",),
        edit=Edit("repair", "keep_results(keys[1], results,", "keep_results(keys[1], {},"),
    ),
    "checkpoint skips a gap": Mutant(
        ("rollback",),
        edit=Edit("checkpoint", "if first > folded + #tail then", "if false then"),
        start=80,
    ),
    "input is not replayed": Mutant(
        ("crash",),
        edit=Edit(
            "commit", "advance(keys[1], fields.run_input .. args[5])", "advance(keys[1], args[5])"
        ),
    ),
    "sinks are never kept": Mutant(
        ("crash",), edit=Edit("advance", "if missing > 0 then", "if false then"), noisy=False
    ),
    "recent ids are the oldest": Mutant(
        ("crash",),
        edit=Edit(
            "advance",
            "recent:sub(-4 * tonumber(fields.recent_tokens))",
            "recent:sub(1, 4 * tonumber(fields.recent_tokens))",
        ),
        noisy=False,
    ),
}
