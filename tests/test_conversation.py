"""The control plane's records: ids, hashes, messages and the arithmetic of replay."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.conversation import (
    CONVERSATION_ID,
    GENESIS,
    Message,
    NewConversation,
    ReplayLog,
    TokenIds,
    chain_head,
    history_hash,
    new_conversation_id,
    new_nonce,
)

NOTHING = np.empty(0, dtype=np.int32)
token_ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30).map(
    lambda values: np.array(values, dtype=np.int32)
)


def test_ids_and_nonces_are_random_and_well_formed() -> None:
    made = {new_conversation_id() for _ in range(100)}
    assert len(made) == 100
    assert all(CONVERSATION_ID.match(one) for one in made)
    assert len({new_nonce() for _ in range(100)}) == 100


@pytest.mark.parametrize("bad", ["conv_", "conv_" + "A" * 32, "conv_" + "a" * 32 + "\n", "x" * 37])
def test_other_strings_are_no_ids(bad: str) -> None:
    assert not CONVERSATION_ID.match(bad)


def test_chain_head_is_the_documented_hash() -> None:
    # SHA-256 over 32 zero bytes, then each list preceded by its length (8 bytes little-endian).
    preimage = bytes(32) + (2).to_bytes(8, "little") + b"\x01\0\0\0\xff\xff\xff\xff" + bytes(8)
    expected = hashlib.sha256(preimage).hexdigest()
    assert chain_head(GENESIS, np.array([1, -1], dtype=np.int32), NOTHING) == expected


@given(token_ids, token_ids)
def test_moving_a_token_between_input_and_output_changes_the_head(
    fed: TokenIds, replied: TokenIds
) -> None:
    whole = np.concatenate([fed, replied])
    cuts = {chain_head(GENESIS, whole[:cut], whole[cut:]) for cut in range(len(whole) + 1)}
    assert len(cuts) == len(whole) + 1


@given(token_ids)
def test_chain_head_does_not_depend_on_the_layout_of_the_array(ids: TokenIds) -> None:
    spread = np.zeros(2 * len(ids), dtype=">i4")
    spread[::2] = ids
    assert chain_head(GENESIS, spread[::2], NOTHING) == chain_head(GENESIS, ids, NOTHING)


def test_history_hash_is_the_documented_hash() -> None:
    canonical = json.dumps([GENESIS, "user", "grüß"], separators=(",", ":"))
    assert history_hash(GENESIS, "user", "grüß") == hashlib.sha256(canonical.encode()).hexdigest()


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=2, max_size=2))
def test_history_hash_separates_role_and_content(pair: list[tuple[str, str]]) -> None:
    hashes = [history_hash(GENESIS, role, content) for role, content in pair]
    assert (hashes[0] == hashes[1]) == (pair[0] == pair[1])


@given(st.text(alphabet=st.characters(), max_size=20), st.text(max_size=5))
def test_messages_survive_encoding(content: str, role: str) -> None:
    message = Message(role, content)
    assert Message.decode(message.encode()) == message


def test_messages_keep_lone_surrogates() -> None:
    message = Message("user", "\ud800 and \udfff")
    assert Message.decode(message.encode()) == message


@given(st.lists(token_ids, max_size=8), st.integers(0, 9), st.integers(1, 20))
def test_replay_log_keeps_both_ends(parts: list[TokenIds], sinks: int, recent: int) -> None:
    log = ReplayLog(NOTHING, NOTHING, 0)
    for part in parts:
        log = log.advanced(part, sinks, recent)
    everything = np.concatenate([NOTHING, *parts])
    past_sinks = everything[sinks:]
    kept = past_sinks[max(0, len(past_sinks) - recent) :]
    np.testing.assert_array_equal(log.sink_ids, everything[:sinks])
    np.testing.assert_array_equal(log.recent_ids, kept)
    assert log.token_count == len(everything)
    assert log.is_whole == (len(past_sinks) <= recent)
    if len(kept):
        assert log.recent_start == len(everything) - len(kept)
    assert log.sink_ids.dtype == log.recent_ids.dtype == np.int32


@pytest.mark.parametrize("sizes", [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_impossible_windows_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="need at least 0, 1 and 1"):
        NewConversation("conv", "tenant", "model", *sizes)
