#!lua name=sinkserve
-- The conversation store as Redis functions. cluster/memory_store.py says the same in Python and is
-- easier to read; tests/store_contract.py holds both to one contract.
--
-- A conversation is a hash `sinkserve:{id}:rec` and two lists: `sinkserve:{id}:log` (transcript), and
-- `sinkserve:{id}:sys`, where the system messages go that the transcript began with and has dropped. Two
-- kinds of index live under keys of their own, because they belong to other hash slots:
-- `sinkserve:history:...` (a string) and `sinkserve:tenant:...` (a sorted set by creation).
--
-- Fields of the hash. Times are microseconds of the server's clock, ids packed little-endian int32.
--   fixed    tenant fingerprint sink_tokens window_tokens recent_tokens metadata identity created born
--   state    turn token_count head history previous older owner epoch updated result sinks recent
--   results  what is remembered of turns under their keys, see RESULTS
--   log      log_start log_end log_bytes
--   running  see RUNNING                                    (only between begin and its end)
--   lost     lost_key lost_attempts lost_lapses             (the last turn that another key put an end to)
--   ended    end_epoch end_nonce end_how                    (how the last claim ended)
--   gone     the epoch of a conversation that was deleted   (nothing else is left of it)
-- What versions 1 and 2 did not write (run_key, results, born, run_lapses, ...) counts as none. Replicas
-- of version 2 go on for a while under this library, in the midst of an update: arguments and keys that
-- they do not send come last.
--
-- Answers start with a status word. Errors of the protocol are answers, so that error replies mean
-- trouble with the server alone.

local VERSION = 3
local DIGEST = '@DIGEST@'
-- Output ids are run_output and then run_tail: a token rewrites the short tail alone.
local RUNNING = {
  'run_nonce', 'run_key', 'run_hash', 'run_owner', 'run_from', 'run_until', 'run_input',
  'run_output', 'run_tail', 'run_folded', 'run_attempts', 'run_lapses', 'run_resumed',
}
local LOST = { 'lost_key', 'lost_attempts', 'lost_lapses' }
local VIEW = {
  'tenant', 'fingerprint', 'sink_tokens', 'window_tokens', 'turn', 'token_count', 'head', 'history',
  'owner', 'epoch', 'created', 'updated', 'metadata', 'result', 'recent_tokens', 'log_end',
}
local ENDED = { 'end_epoch', 'end_nonce', 'end_how' }
local MAX_TAIL_BYTES = 1024
local MIN_TAIL_BYTES = 512
-- A result, newest first: key, request hash, turn, head, token_index of its reply, bytes of the reply,
-- the reply itself unless it is among the replay ids, result as JSON, 1 if it was given up.
local KEY, HASH, TURN, HEAD, START, BYTES, REPLY, JSON, GIVEN_UP = 1, 2, 3, 4, 5, 6, 7, 8, 9

-- One life of this server's memory. A restart, another library and a promotion to primary end it:
-- these variables are not stored, and the replication id changes.
local life, origin, woken, recovered

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function replication_id()
  return string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
end

local function is_awake()
  return life ~= nil and replication_id() == origin
end

-- How long owners still have for repairs, or nil.
local function recovering(now)
  if woken <= now and now < recovered then
    return recovered - now
  end
end

-- Lua prints large numbers as 1.7e+15.
local function int(number)
  return string.format('%.0f', number)
end

local function read(key, names)
  local values = redis.call('HMGET', key, unpack(names))
  local fields = {}
  for i, name in ipairs(names) do
    fields[name] = values[i]
  end
  return fields
end

local function owned(key, tenant, ...)
  local fields = read(key, { 'tenant', ... })
  if fields.tenant == tenant then
    return fields
  end
end

-- A clock that went back before the lease's start voids it.
local function is_live(fields, now)
  return fields.run_nonce and tonumber(fields.run_from) <= now and now < tonumber(fields.run_until)
end

local function view(key, now)
  local fields = read(key, RUNNING)
  local values = redis.call('HMGET', key, unpack(VIEW))
  if is_live(fields, now) then
    values[9] = fields.run_owner
    values[#VIEW + 1] = 1
  else
    values[#VIEW + 1] = 0
  end
  return values
end

local function expire(keys, at)
  local milliseconds = int(math.ceil(at / 1000))
  for _, key in ipairs(keys) do
    redis.call('PEXPIREAT', key, milliseconds)
  end
end

local function extend_lease(keys, now, lease, ttl)
  redis.call('HSET', keys[1], 'run_from', int(now), 'run_until', int(now + lease))
  expire(keys, now + lease + ttl)
end

local function is_system(message)
  return message and message:sub(1, 10) == '["system",'
end

-- Takes the message at position `start` off the transcript, and answers its size. The system messages
-- that a conversation began with are set aside: with them it would be restarted for another model.
local function drop_oldest(keys, start)
  local message = redis.call('LPOP', keys[2])
  if keys[3] and is_system(message) and redis.call('LLEN', keys[3]) == start then
    redis.call('RPUSH', keys[3], message)
  end
  return #message
end

-- Appends messages args[first..] to the transcript and drops the oldest beyond the limits.
local function append(keys, args, first, max_messages, max_bytes)
  local fields = read(keys[1], { 'log_start', 'log_bytes' })
  local start, bytes = tonumber(fields.log_start), tonumber(fields.log_bytes)
  local length = redis.call('LLEN', keys[2])
  for i = first, #args do
    length = redis.call('RPUSH', keys[2], args[i])
    bytes = bytes + #args[i]
  end
  while length > max_messages or bytes > max_bytes do
    bytes = bytes - drop_oldest(keys, start)
    length = length - 1
    start = start + 1
  end
  redis.call(
    'HSET', keys[1],
    'log_start', int(start), 'log_end', int(start + length), 'log_bytes', int(bytes)
  )
end

local function forget_running(key)
  redis.call('HDEL', key, unpack(RUNNING))
end

-- Forgets a turn whose lease is over, but not how many owners it has lost.
local function set_aside(key, fields)
  forget_running(key)
  if fields.run_key then
    redis.call(
      'HSET', key, 'lost_key', fields.run_key,
      'lost_attempts', fields.run_attempts or 0, 'lost_lapses', fields.run_lapses or 0
    )
  end
end

local function end_claim(keys, epoch, nonce, how, now, ttl)
  forget_running(keys[1])
  redis.call('HSET', keys[1], 'end_epoch', epoch, 'end_nonce', nonce, 'end_how', how)
  expire(keys, now + ttl)
end

-- 'running' when (epoch, nonce) holds the conversation, how it ended when it was the last to end,
-- 'unknown' when this server has forgotten it.
local function standing(fields, epoch, nonce)
  if fields.run_nonce == nonce and fields.epoch == epoch then
    return 'running'
  elseif fields.end_nonce == nonce and fields.end_epoch == epoch then
    return fields.end_how
  elseif tonumber(epoch) > tonumber(fields.epoch) then
    return 'unknown'
  end
end

local function refusal(state)
  return { state == 'unknown' and 'ROLLED_BACK' or 'FENCED' }
end

-- For clients: what is missing may have been lost, and is about to come back.
local function missing(key)
  if redis.call('HEXISTS', key, 'gone') == 1 then
    return { 'NOT_FOUND' }
  elseif not is_awake() then
    return { 'RESTARTED' }
  end
  local remaining = recovering(clock())
  if remaining then
    return { 'RECOVERING', remaining }
  end
  return { 'NOT_FOUND' }
end

-- For owners: what is missing and was not deleted is lost.
local function lost(key)
  return { redis.call('HEXISTS', key, 'gone') == 1 and 'NOT_FOUND' or 'ROLLED_BACK' }
end

local function output_of(fields)
  return (fields.run_output or '') .. (fields.run_tail or '')
end

-- Fields for these output ids.
local function split(output)
  local folded = 0
  if #output > MAX_TAIL_BYTES then
    folded = #output - MIN_TAIL_BYTES
  end
  return 'run_output', output:sub(1, folded), 'run_tail', output:sub(folded + 1),
    'run_folded', folded
end

-- `bytes` of ids from token_index `start` on, if they are all among the replay ids.
local function retained(fields, start, bytes)
  if bytes == 0 then
    return ''
  end
  local ids, first = fields.recent, tonumber(fields.token_count) - #fields.recent / 4
  if first <= #fields.sinks / 4 then
    ids, first = fields.sinks .. ids:sub(#fields.sinks + 1 - 4 * first), 0
  end
  local from = 4 * (start - first)
  if start >= 0 and from >= 0 and from + bytes <= #ids then
    return ids:sub(from + 1, from + bytes)
  end
end

-- The replay ids and results of a record, the results' replies filled in; nil where they are lost.
local function results_of(key)
  local fields = read(key, { 'sinks', 'recent', 'token_count', 'results' })
  local results = fields.results and cmsgpack.unpack(fields.results) or {}
  for _, result in ipairs(results) do
    if result[REPLY] == '' then
      result[REPLY] = retained(fields, result[START], result[BYTES]) or ''
    end
  end
  return results
end

-- Stores results, whole ones, newest first. The first always stays; older ones as long as they are
-- within `max_bytes` and their replies among the replay ids.
local function keep_results(key, results, max_bytes)
  local fields = read(key, { 'sinks', 'recent', 'token_count' })
  local kept, size = {}, 0
  for i, result in ipairs(results) do
    size = size + #result[JSON] + #result[KEY] + #result[HASH] + 100
    if i > 1 and size > max_bytes then
      break
    end
    local known = retained(fields, result[START], result[BYTES]) == result[REPLY]
    if i == 1 or known then
      local copy = { unpack(result) }
      copy[REPLY] = known and '' or result[REPLY]
      kept[#kept + 1] = copy
    end
  end
  redis.call('HSET', key, 'results', cmsgpack.pack(kept))
end

local function add_result(key, result, max_bytes)
  local results = results_of(key)
  table.insert(results, 1, result)
  keep_results(key, results, max_bytes)
end


-- args: tenant fingerprint sink_tokens window_tokens recent_tokens metadata history identity
--       ttl max_messages max_bytes message...
local function create(keys, args)
  local now = clock()
  local known = read(keys[1], { 'tenant', 'identity', 'epoch', 'born', 'gone' })
  if known.tenant then
    local fresh = known.epoch == (known.born or '0')
    if known.tenant == args[1] and known.identity == args[8] and fresh then
      return { 'OK', view(keys[1], now) }
    end
    return { 'EXISTS' }
  end
  -- Above every epoch of an earlier life, so that nobody of then can write or repair.
  local born = known.gone and int(tonumber(known.gone) + 1) or 0
  redis.call('DEL', keys[1])
  redis.call(
    'HSET', keys[1],
    'tenant', args[1], 'fingerprint', args[2], 'sink_tokens', args[3], 'window_tokens', args[4],
    'recent_tokens', args[5], 'metadata', args[6], 'history', args[7], 'identity', args[8],
    'turn', 0, 'token_count', 0, 'head', string.rep('0', 64), 'owner', '', 'epoch', born,
    'born', born, 'created', int(now), 'updated', int(now), 'result', '{}', 'sinks', '',
    'recent', '', 'log_start', 0, 'log_bytes', 0
  )
  append(keys, args, 12, tonumber(args[10]), tonumber(args[11]))
  expire(keys, now + tonumber(args[9]))
  return { 'OK', view(keys[1], now) }
end

-- args: tenant
local function get(keys, args)
  if not owned(keys[1], args[1]) then
    return missing(keys[1])
  elseif not is_awake() then
    return { 'RESTARTED' }
  end
  local now = clock()
  local remaining = recovering(now)
  if remaining then
    return { 'RECOVERING', remaining }
  end
  return { 'OK', view(keys[1], now) }
end

-- args: tenant. The system messages that the conversation began with.
local function system_messages(keys, args)
  local fields = owned(keys[1], args[1], 'log_start')
  if not fields then
    return missing(keys[1])
  end
  local messages = redis.call('LRANGE', keys[3], 0, -1)
  local aside, i = #messages, 0
  while tonumber(fields.log_start) == aside and is_system(redis.call('LINDEX', keys[2], i)) do
    messages[#messages + 1] = redis.call('LINDEX', keys[2], i)
    i = i + 1
  end
  return { 'OK', messages }
end

-- args: tenant limit before|''
local function transcript(keys, args)
  local fields = owned(keys[1], args[1], 'log_start')
  if not fields then
    return missing(keys[1])
  end
  local oldest = tonumber(fields.log_start)
  local stop = oldest + redis.call('LLEN', keys[2])
  if args[3] ~= '' then
    stop = math.min(math.max(tonumber(args[3]), oldest), stop)
  end
  local first = math.max(oldest, stop - tonumber(args[2]))
  if first >= stop then
    return { 'OK', first, {} }
  end
  return { 'OK', first, redis.call('LRANGE', keys[2], first - oldest, stop - oldest - 1) }
end

local function ownership(keys, now, lease, ttl)
  extend_lease(keys, now, lease, ttl)
  local fields = read(keys[1], { 'sinks', 'recent', unpack(RUNNING) })
  return {
    'OK', view(keys[1], now), fields.sinks, fields.recent, fields.run_input, output_of(fields),
    tonumber(fields.run_attempts or 0) + tonumber(fields.run_lapses or 0),
    tonumber(fields.run_resumed or 0),
  }
end

local function next_epoch(fields, now)
  return int(math.max(tonumber(fields.epoch) + 1, now))
end

-- What is remembered of the turn of this key, as an answer to `begin`.
local function recall(key, run_key, hash)
  for _, result in ipairs(results_of(key)) do
    if result[KEY] == run_key then
      if result[HASH] ~= hash then
        return { 'KEY_REUSED' }
      elseif result[GIVEN_UP] == 1 then
        return { 'QUARANTINED' }
      end
      return { 'DONE', result[TURN], result[HEAD], result[REPLY], result[JSON] }
    end
  end
end

-- Gives up a turn that has lost its last owner without getting anywhere.
local function quarantine(keys, fields, run_key, hash, max_bytes)
  add_result(keys[1], {
    run_key, hash, tonumber(fields.turn), fields.head, 0, 0, '', '{}', 1,
  }, max_bytes)
  return { 'QUARANTINED' }
end

-- The counts of a turn that has lost one more owner, and whether they are too many. Of owners that were
-- seen dead the turn may be the death; of those that let go, or whose lease ran out, mostly not.
local function count_loss(attempts, lapses, args)
  local is_dead = args[7] == '1' and args[15] ~= '1'
  attempts = tonumber(attempts or 0) + (is_dead and 1 or 0)
  lapses = tonumber(lapses or 0) + (is_dead and 0 or 1)
  local too_many = attempts >= tonumber(args[12]) or lapses >= tonumber(args[16] or args[12])
  return attempts, lapses, too_many
end

-- args: tenant replica fingerprint nonce key hash steal lease ttl expect_turn|'' expect_head|''
--       max_attempts max_result_bytes input blameless max_lapses
local function begin(keys, args)
  local fields = owned(
    keys[1], args[1], 'fingerprint', 'turn', 'head', 'epoch', 'end_nonce', 'lost_key',
    'lost_attempts', 'lost_lapses', unpack(RUNNING)
  )
  if not fields then
    return missing(keys[1])
  end
  local now = clock()
  local remaining = recovering(now)
  if remaining then
    return { 'RECOVERING', remaining }
  end
  local lease, ttl = tonumber(args[8]), tonumber(args[9])
  if fields.run_nonce == args[4] then
    return ownership(keys, now, lease, ttl)
  elseif fields.end_nonce == args[4] then
    return { 'FENCED' }
  end
  local known = recall(keys[1], args[5], args[6])
  if known then
    return known
  end
  local live = is_live(fields, now)
  local model_changed = fields.fingerprint ~= args[3]
  if fields.run_key == args[5] then
    if fields.run_hash ~= args[6] then
      return { 'KEY_REUSED' }
    elseif live and args[7] ~= '1' then
      local turn = tonumber(fields.turn) + 1
      return { 'BUSY', fields.run_owner, turn, output_of(fields), tonumber(fields.run_until) - now }
    elseif model_changed then
      return { 'MODEL_CHANGED' }
    end
    local attempts, lapses, too_many = count_loss(fields.run_attempts, fields.run_lapses, args)
    if too_many then
      end_claim(keys, fields.epoch, fields.run_nonce, 'abort', now, ttl)
      return quarantine(keys, fields, args[5], args[6], tonumber(args[13]))
    end
    redis.call(
      'HSET', keys[1], 'epoch', next_epoch(fields, now), 'run_nonce', args[4],
      'run_owner', args[2], 'run_attempts', attempts, 'run_lapses', lapses, 'run_resumed', 1
    )
    return ownership(keys, now, lease, ttl)
  elseif model_changed then
    return { 'MODEL_CHANGED' }
  end
  local turn_is_stale = args[10] ~= '' and args[10] ~= fields.turn
  if turn_is_stale or (args[11] ~= '' and args[11] ~= fields.head) then
    return { 'TURN_CONFLICT', tonumber(fields.turn), fields.head }
  elseif live then
    return { 'CONFLICT', tonumber(fields.run_until) - now }
  end
  local attempts, lapses, too_many = 0, 0, false
  if fields.lost_key == args[5] then
    attempts, lapses, too_many = count_loss(fields.lost_attempts, fields.lost_lapses, args)
    redis.call('HDEL', keys[1], unpack(LOST))
  end
  set_aside(keys[1], fields)
  if too_many then
    return quarantine(keys, fields, args[5], args[6], tonumber(args[13]))
  end
  redis.call(
    'HSET', keys[1], 'epoch', next_epoch(fields, now), 'run_nonce', args[4],
    'run_key', args[5], 'run_hash', args[6], 'run_owner', args[2], 'run_attempts', attempts,
    'run_lapses', lapses, 'run_input', args[14]
  )
  return ownership(keys, now, lease, ttl)
end

-- args: tenant epoch nonce lease ttl k ids
local function checkpoint(keys, args)
  local fields = owned(
    keys[1], args[1], 'epoch', 'run_nonce', 'run_from', 'run_until', 'run_tail', 'run_folded'
  )
  if not fields then
    return lost(keys[1])
  end
  local state = standing(fields, args[2], args[3])
  if state ~= 'running' then
    return refusal(state)
  end
  local tail, folded = fields.run_tail or '', tonumber(fields.run_folded or 0)
  local first, ids = 4 * tonumber(args[6]), args[7]
  if first > folded + #tail then
    return { 'ROLLED_BACK' }
  elseif first < folded + #tail then
    local stored = (redis.call('HGET', keys[1], 'run_output') or '') .. tail
    local again = stored:sub(first + 1, first + #ids)
    if again ~= ids:sub(1, #again) then
      return { 'FENCED' }
    end
    ids = ids:sub(#again + 1)
  end
  if #ids > 0 and #tail + #ids <= MAX_TAIL_BYTES then
    redis.call('HSET', keys[1], 'run_tail', tail .. ids, 'run_attempts', 0, 'run_lapses', 0)
  elseif #ids > 0 then
    local output = (redis.call('HGET', keys[1], 'run_output') or '') .. tail .. ids
    redis.call('HSET', keys[1], 'run_attempts', 0, 'run_lapses', 0, split(output))
  end
  local now, lease = clock(), tonumber(args[4])
  if not is_live(fields, now) or tonumber(fields.run_until) - now < 0.75 * lease then
    extend_lease(keys, now, lease, tonumber(args[5]))
  end
  return { 'OK' }
end

-- args: tenant epoch nonce lease ttl
local function renew(keys, args)
  local fields = owned(keys[1], args[1], 'epoch', 'run_nonce')
  if not fields then
    return lost(keys[1])
  end
  local state = standing(fields, args[2], args[3])
  if state ~= 'running' then
    return refusal(state)
  end
  extend_lease(keys, clock(), tonumber(args[4]), tonumber(args[5]))
  return { 'OK' }
end

-- Moves the replay ids past `ids`: the first sink_tokens of all are sinks, of the rest the last
-- recent_tokens stay.
local function advance(key, ids)
  local fields = read(key, { 'sinks', 'recent', 'sink_tokens', 'recent_tokens', 'token_count' })
  local missing = math.max(0, 4 * tonumber(fields.sink_tokens) - #fields.sinks)
  if missing > 0 then
    redis.call('HSET', key, 'sinks', fields.sinks .. ids:sub(1, missing))
  end
  local recent = fields.recent .. ids:sub(missing + 1)
  redis.call(
    'HSET', key,
    'recent', recent:sub(-4 * tonumber(fields.recent_tokens)),
    'token_count', int(tonumber(fields.token_count) + #ids / 4)
  )
end

-- args: tenant epoch nonce ttl output reply_bytes head history result max_result_bytes
--       max_messages max_bytes message...
local function commit(keys, args)
  local fields = owned(
    keys[1], args[1], 'epoch', 'turn', 'token_count', 'history', 'previous', 'older',
    'end_epoch', 'end_nonce', 'end_how', unpack(RUNNING)
  )
  if not fields then
    return lost(keys[1])
  end
  local now = clock()
  local state = standing(fields, args[2], args[3])
  if state == 'running' then
    local turn = tonumber(fields.turn) + 1
    fields.older = fields.previous or ''
    advance(keys[1], fields.run_input .. args[5])
    redis.call(
      'HSET', keys[1],
      'turn', int(turn), 'head', args[7], 'history', args[8], 'previous', fields.history,
      'older', fields.older,
      'result', args[9], 'owner', fields.run_owner, 'updated', int(now)
    )
    append(keys, args, 13, tonumber(args[11]), tonumber(args[12]))
    end_claim(keys, args[2], args[3], 'commit', now, tonumber(args[4]))
    local start, reply = tonumber(fields.token_count) + #fields.run_input / 4, tonumber(args[6])
    add_result(keys[1], {
      fields.run_key or args[3], fields.run_hash or '', turn, args[7], start, reply,
      args[5]:sub(1, reply), args[9], 0,
    }, tonumber(args[10]))
  elseif state ~= 'commit' then
    return refusal(state)
  end
  return { 'OK', view(keys[1], now), fields.older or '' }
end

-- args: tenant epoch nonce ttl
local function abort(keys, args)
  local fields = owned(keys[1], args[1], 'epoch', 'run_nonce', unpack(ENDED))
  if not fields then
    return lost(keys[1])
  end
  local state = standing(fields, args[2], args[3])
  if state == 'running' then
    end_claim(keys, args[2], args[3], 'abort', clock(), tonumber(args[4]))
  elseif state ~= 'abort' then
    return refusal(state)
  end
  return { 'OK' }
end

local REPAIR = {
  'tenant', 'epoch', 'turn', 'fingerprint', 'sink_tokens', 'window_tokens', 'recent_tokens',
  'metadata', 'token_count', 'head', 'history', 'owner', 'created', 'updated', 'result', 'sinks',
  'recent', 'ttl', 'max_result_bytes', 'max_messages', 'max_bytes', 'run_nonce', 'run_key',
  'run_hash', 'run_input', 'run_output', 'lease', 'first_message', 'results',
}

-- Negative when the record is older than what an owner brings, 0 when it says the same.
local function compare(record, given)
  local tokens = record.run_nonce and #output_of(record) or math.huge
  local given_tokens = given.run_nonce ~= '' and #given.run_output or math.huge
  if record.epoch ~= given.epoch then
    return tonumber(record.epoch) - tonumber(given.epoch)
  elseif record.turn ~= given.turn then
    return tonumber(record.turn) - tonumber(given.turn)
  elseif tokens ~= given_tokens then
    return tokens < given_tokens and -1 or 1
  end
  return 0
end

-- Keeps of the transcript what comes before position `first`, if that follows on it.
local function cut_transcript(keys, fields, first)
  local start, bytes = tonumber(fields.log_start or 0), tonumber(fields.log_bytes or 0)
  local length = redis.call('LLEN', keys[2])
  if first < start or first > start + length then
    while is_system(redis.call('LINDEX', keys[2], 0)) do
      drop_oldest(keys, start)
      start = start + 1
    end
    redis.call('DEL', keys[2])
    return first, 0
  end
  for _ = first - start + 1, length do
    bytes = bytes - #redis.call('RPOP', keys[2])
  end
  return start, bytes
end

-- args: REPAIR, its last one the number of results, then their parts, then the last messages
local function repair(keys, args)
  local given = {}
  for i, name in ipairs(REPAIR) do
    given[name] = args[i]
  end
  local now, ttl = clock(), tonumber(given.ttl)
  local record = read(keys[1], {
    'tenant', 'epoch', 'turn', 'owner', 'history', 'gone', 'log_start', 'log_bytes', unpack(RUNNING),
  })
  local running = given.run_nonce ~= ''
  if record.gone or (record.tenant and record.tenant ~= given.tenant) then
    return { 'NOT_FOUND' }
  elseif not record.tenant and not running and tonumber(given.updated) + ttl <= now then
    return { 'NOT_FOUND' }
  end
  local order = record.tenant and compare(record, given) or -1
  if order >= 0 then
    return { order > 0 and 'FENCED' or 'OK', '' }
  end
  local results, next_arg = {}, #REPAIR + 1
  local given_keys = {}
  for _ = 1, tonumber(given.results) do
    local reply = args[next_arg + 5]
    results[#results + 1] = {
      args[next_arg], args[next_arg + 1], tonumber(args[next_arg + 2]), args[next_arg + 3],
      tonumber(args[next_arg + 4]), #reply, reply, args[next_arg + 6],
      tonumber(args[next_arg + 7]),
    }
    given_keys[args[next_arg]] = true
    next_arg = next_arg + 8
  end
  local known_results = record.tenant and results_of(keys[1]) or {}
  local start, bytes = cut_transcript(keys, record, tonumber(given.first_message))
  redis.call('HDEL', keys[1], 'identity', unpack(RUNNING))
  redis.call('HDEL', keys[1], unpack(ENDED))
  for i = 1, 17 do
    redis.call('HSET', keys[1], REPAIR[i], given[REPAIR[i]])
  end
  redis.call('HSET', keys[1], 'born', -1, 'log_start', int(start), 'log_bytes', int(bytes))
  if running then
    redis.call(
      'HSET', keys[1], 'owner', record.owner or given.owner, 'run_owner', given.owner,
      'run_nonce', given.run_nonce, 'run_key', given.run_key, 'run_hash', given.run_hash,
      'run_input', given.run_input, 'run_attempts', 0, split(given.run_output)
    )
  end
  -- A store that went back may have gone on to another end: its results must fit this one.
  for _, result in ipairs(known_results) do
    local fits = result[HEAD] == given.head
    if result[TURN] < tonumber(given.turn) then
      fits = retained(given, result[START], result[BYTES]) == result[REPLY]
    end
    if fits and not given_keys[result[KEY]] then
      results[#results + 1] = result
    end
  end
  keep_results(keys[1], results, tonumber(given.max_result_bytes))
  append(keys, args, next_arg, tonumber(given.max_messages), tonumber(given.max_bytes))
  if running then
    extend_lease(keys, now, tonumber(given.lease), ttl)
  else
    expire(keys, now + ttl)
  end
  return { 'OK', record.history or '' }
end

-- args: tenant expect_head fingerprint sink_tokens window_tokens recent_tokens ttl
local function rebase(keys, args)
  local fields = owned(
    keys[1], args[1], 'head', 'turn', 'epoch', 'fingerprint', 'sink_tokens', 'window_tokens',
    'recent_tokens', unpack(RUNNING)
  )
  if not fields then
    return missing(keys[1])
  end
  local now = clock()
  local remaining = recovering(now)
  if remaining then
    return { 'RECOVERING', remaining }
  elseif fields.head ~= args[2] then
    return { 'TURN_CONFLICT', tonumber(fields.turn), fields.head }
  end
  local same = fields.fingerprint == args[3] and fields.sink_tokens == args[4]
    and fields.window_tokens == args[5] and fields.recent_tokens == args[6]
  if not same then
    if is_live(fields, now) then
      return { 'CONFLICT', tonumber(fields.run_until) - now }
    end
    local results = results_of(keys[1])
    set_aside(keys[1], fields)
    redis.call(
      'HSET', keys[1],
      'fingerprint', args[3], 'sink_tokens', args[4], 'window_tokens', args[5],
      'recent_tokens', args[6], 'sinks', '', 'recent', '', 'token_count', 0, 'owner', '',
      'epoch', next_epoch(fields, now)
    )
    -- Token indices start anew: the newest reply is kept by itself.
    if results[1] then
      results[1][START] = -1
      keep_results(keys[1], { results[1] }, 0)
    end
    expire(keys, now + tonumber(args[7]))
  end
  return { 'OK', view(keys[1], now) }
end

-- args: tenant ttl
local function delete(keys, args)
  local fields = owned(keys[1], args[1], 'epoch')
  if not fields then
    return missing(keys[1])
  end
  redis.call('DEL', unpack(keys))
  redis.call('HSET', keys[1], 'gone', fields.epoch)
  expire(keys, clock() + tonumber(args[2]))
  return { 'OK' }
end

-- keys: a history key. args: entry ttl
local function remember(keys, args)
  local at = int(math.ceil((clock() + tonumber(args[2])) / 1000))
  redis.call('SET', keys[1], args[1], 'PXAT', at)
  return { 'OK' }
end

-- keys: a history key. args: how its entry begins if it is still this conversation's; then it goes.
local function forget(keys, args)
  local entry = redis.call('GET', keys[1])
  if entry and entry:sub(1, #args[1]) == args[1] then
    redis.call('DEL', keys[1])
  end
  return { 'OK' }
end

-- keys: a tenant key. args: conversation_id ttl. Answers a few ids to look at: those whose record is
-- gone are garbage, and looking at three for each one added keeps garbage below a third.
local function enlist(keys, args)
  local now = clock()
  local sample = redis.call('ZRANDMEMBER', keys[1], 3)
  local newest = redis.call('ZRANGE', keys[1], 0, 0, 'REV', 'WITHSCORES')
  local score = math.max(now, newest[2] and tonumber(newest[2]) + 1 or 0)
  redis.call('ZADD', keys[1], 'NX', int(score), args[1])
  redis.call('PEXPIREAT', keys[1], int(math.ceil((now + tonumber(args[2])) / 1000)))
  return { 'OK', sample }
end

-- keys: a tenant key. args: ttl
local function keep(keys, args)
  redis.call('PEXPIREAT', keys[1], int(math.ceil((clock() + tonumber(args[1])) / 1000)))
  return { 'OK' }
end

-- keys: a tenant key. args: min_age conversation_id... Forgets ids that are older than that: a
-- younger one may be about to get its record.
local function delist(keys, args)
  local newest = clock() - tonumber(args[1])
  for i = 2, #args do
    local score = redis.call('ZSCORE', keys[1], args[i])
    if score and tonumber(score) <= newest then
      redis.call('ZREM', keys[1], args[i])
    end
  end
  return { 'OK' }
end

-- keys: a tenant key. args: limit after|''. Ids from newest to oldest.
local function page(keys, args)
  local start = '+inf'
  if args[2] ~= '' then
    local score = redis.call('ZSCORE', keys[1], args[2])
    if not score then
      return { 'NOT_FOUND' }
    end
    start = '(' .. score
  end
  local ids = redis.call(
    'ZRANGE', keys[1], start, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, tonumber(args[1])
  )
  return { 'OK', ids }
end

-- Names this life.
local function pulse()
  if not is_awake() then
    return { 'RESTARTED' }
  end
  return { 'OK', life }
end

-- args: a name for this life if it has none, time for owners to repair, '1' if the caller knew another.
-- A server that holds nothing and that nobody knows has nothing to be repaired.
local function wake(_, args)
  if not is_awake() then
    life, origin, woken = args[1], replication_id(), clock()
    recovered = woken
    if args[3] == '1' or redis.call('DBSIZE') > 0 then
      recovered = woken + tonumber(args[2])
    end
  end
  return { 'OK', life }
end

local function version()
  return { 'OK', VERSION, DIGEST }
end

local function register(name, callback, ...)
  redis.register_function({
    function_name = 'sinkserve_' .. name, callback = callback, flags = { ... },
  })
end

-- Writes to conversations start by finding out whether this is the life that the caller knows of.
local function register_write(name, callback, ...)
  local function write(keys, args)
    if not is_awake() then
      return { 'RESTARTED' }
    end
    return callback(keys, args)
  end
  register(name, write, ...)
end

-- A running turn can always finish and a conversation can always be deleted, also when memory is full.
register('version', version, 'no-writes')
register('pulse', pulse, 'no-writes')
-- Not 'no-writes': a server that may not write has no life of its own.
register('wake', wake, 'allow-oom')
register('get', get, 'no-writes')
register('transcript', transcript, 'no-writes')
register('system_messages', system_messages, 'no-writes')
register_write('create', create)
register_write('begin', begin)
register_write('checkpoint', checkpoint, 'allow-oom')
register_write('renew', renew, 'allow-oom')
register_write('commit', commit, 'allow-oom')
register_write('abort', abort, 'allow-oom')
register_write('repair', repair, 'allow-oom')
register_write('rebase', rebase)
register_write('delete', delete, 'allow-oom')
register('remember', remember)
register('forget', forget, 'allow-oom')
register('enlist', enlist)
register('keep', keep, 'allow-oom')
register('delist', delist, 'allow-oom')
register('page', page, 'no-writes')
