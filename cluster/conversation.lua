#!lua name=sinkserve
-- The conversation store as Redis functions. cluster/memory_store.py says the same in Python and is
-- easier to read; tests/store_contract.py holds both to one contract.
--
-- A conversation is a hash `sinkserve:{id}:rec` and a list `sinkserve:{id}:log` (transcript). Two
-- kinds of index live under keys of their own, because they belong to other hash slots:
-- `sinkserve:history:...` (a string) and `sinkserve:tenant:...` (a sorted set by creation).
--
-- Fields of the hash. Times are microseconds of the server's clock, ids packed little-endian int32.
--   fixed    tenant fingerprint sink_tokens window_tokens recent_tokens metadata identity created
--   state    turn token_count head history owner epoch updated result sinks recent
--   log      log_start log_bytes
--   running  run_nonce run_owner run_from run_until run_input       (only between begin and its end)
--   ended    end_epoch end_nonce end_how                            (how the last claim ended)
--
-- Answers start with a status word. Errors of the protocol are answers, so that error replies mean
-- trouble with the server alone.

local VERSION = 1
local DIGEST = '@DIGEST@'
local RUNNING = { 'run_nonce', 'run_owner', 'run_from', 'run_until', 'run_input' }
local VIEW = {
  'tenant', 'fingerprint', 'sink_tokens', 'window_tokens', 'turn', 'token_count', 'head', 'history',
  'owner', 'epoch', 'created', 'updated', 'metadata', 'result',
}

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
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
    values[15] = 1
  else
    values[15] = 0
  end
  return values
end

local function expire(keys, at)
  local milliseconds = int(math.ceil(at / 1000))
  redis.call('PEXPIREAT', keys[1], milliseconds)
  redis.call('PEXPIREAT', keys[2], milliseconds)
end

local function extend_lease(keys, now, lease, ttl)
  redis.call('HSET', keys[1], 'run_from', int(now), 'run_until', int(now + lease))
  expire(keys, now + lease + ttl)
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
    bytes = bytes - #redis.call('LPOP', keys[2])
    length = length - 1
    start = start + 1
  end
  redis.call('HSET', keys[1], 'log_start', int(start), 'log_bytes', int(bytes))
end

local function end_claim(keys, epoch, nonce, how, now, ttl)
  redis.call('HDEL', keys[1], unpack(RUNNING))
  redis.call('HSET', keys[1], 'end_epoch', epoch, 'end_nonce', nonce, 'end_how', how)
  expire(keys, now + ttl)
end

-- 'running' when (epoch, nonce) holds the conversation, how it ended when it was the last to end.
local function standing(fields, epoch, nonce)
  if fields.run_nonce == nonce and fields.epoch == epoch then
    return 'running'
  elseif fields.end_nonce == nonce and fields.end_epoch == epoch then
    return fields.end_how
  end
end

-- args: tenant fingerprint sink_tokens window_tokens recent_tokens metadata history identity
--       ttl max_messages max_bytes message...
local function create(keys, args)
  local now = clock()
  local known = read(keys[1], { 'tenant', 'identity', 'epoch' })
  if known.tenant then
    if known.tenant == args[1] and known.identity == args[8] and known.epoch == '0' then
      return { 'OK', view(keys[1], now) }
    end
    return { 'EXISTS' }
  end
  redis.call(
    'HSET', keys[1],
    'tenant', args[1], 'fingerprint', args[2], 'sink_tokens', args[3], 'window_tokens', args[4],
    'recent_tokens', args[5], 'metadata', args[6], 'history', args[7], 'identity', args[8],
    'turn', 0, 'token_count', 0, 'head', string.rep('0', 64), 'owner', '', 'epoch', 0,
    'created', int(now), 'updated', int(now), 'result', '{}', 'sinks', '', 'recent', '',
    'log_start', 0, 'log_bytes', 0
  )
  append(keys, args, 12, tonumber(args[10]), tonumber(args[11]))
  expire(keys, now + tonumber(args[9]))
  return { 'OK', view(keys[1], now) }
end

-- args: tenant
local function get(keys, args)
  if not owned(keys[1], args[1]) then
    return { 'NOT_FOUND' }
  end
  return { 'OK', view(keys[1], clock()) }
end

-- args: tenant limit before|''
local function transcript(keys, args)
  local fields = owned(keys[1], args[1], 'log_start')
  if not fields then
    return { 'NOT_FOUND' }
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

-- args: tenant replica fingerprint nonce lease ttl expect_turn|'' expect_head|'' input
local function begin(keys, args)
  local fields = owned(
    keys[1], args[1], 'fingerprint', 'turn', 'head', 'epoch', 'end_nonce', unpack(RUNNING)
  )
  if not fields then
    return { 'NOT_FOUND' }
  elseif fields.fingerprint ~= args[3] then
    return { 'MODEL_CHANGED' }
  elseif fields.end_nonce == args[4] then
    return { 'FENCED' }
  end
  local now = clock()
  local lease, ttl = tonumber(args[5]), tonumber(args[6])
  if fields.run_nonce ~= args[4] then
    local turn_is_stale = args[7] ~= '' and args[7] ~= fields.turn
    if turn_is_stale or (args[8] ~= '' and args[8] ~= fields.head) then
      return { 'TURN_CONFLICT', tonumber(fields.turn), fields.head }
    elseif is_live(fields, now) then
      return { 'CONFLICT', tonumber(fields.run_until) - now }
    end
    local epoch = int(math.max(tonumber(fields.epoch) + 1, now))
    redis.call(
      'HSET', keys[1],
      'epoch', epoch, 'run_nonce', args[4], 'run_owner', args[2], 'run_input', args[9]
    )
  end
  extend_lease(keys, now, lease, ttl)
  local replay = redis.call('HMGET', keys[1], 'sinks', 'recent')
  return { 'OK', view(keys[1], now), replay[1], replay[2] }
end

-- args: tenant epoch nonce lease ttl
local function renew(keys, args)
  local fields = owned(keys[1], args[1], 'epoch', 'run_nonce')
  if not fields then
    return { 'NOT_FOUND' }
  elseif standing(fields, args[2], args[3]) ~= 'running' then
    return { 'FENCED' }
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

-- args: tenant epoch nonce ttl output head history result max_messages max_bytes message...
local function commit(keys, args)
  local fields = owned(
    keys[1], args[1], 'epoch', 'turn', 'run_nonce', 'run_owner', 'run_input',
    'end_epoch', 'end_nonce', 'end_how'
  )
  if not fields then
    return { 'NOT_FOUND' }
  end
  local now = clock()
  local state = standing(fields, args[2], args[3])
  if state == 'running' then
    advance(keys[1], fields.run_input .. args[5])
    redis.call(
      'HSET', keys[1],
      'turn', int(tonumber(fields.turn) + 1), 'head', args[6], 'history', args[7],
      'result', args[8], 'owner', fields.run_owner, 'updated', int(now)
    )
    append(keys, args, 11, tonumber(args[9]), tonumber(args[10]))
    end_claim(keys, args[2], args[3], 'commit', now, tonumber(args[4]))
  elseif state ~= 'commit' then
    return { 'FENCED' }
  end
  return { 'OK', view(keys[1], now) }
end

-- args: tenant epoch nonce ttl
local function abort(keys, args)
  local fields = owned(keys[1], args[1], 'epoch', 'run_nonce', 'end_epoch', 'end_nonce', 'end_how')
  if not fields then
    return { 'NOT_FOUND' }
  end
  local state = standing(fields, args[2], args[3])
  if state == 'running' then
    end_claim(keys, args[2], args[3], 'abort', clock(), tonumber(args[4]))
  elseif state ~= 'abort' then
    return { 'FENCED' }
  end
  return { 'OK' }
end

-- args: tenant
local function delete(keys, args)
  if not owned(keys[1], args[1]) then
    return { 'NOT_FOUND' }
  end
  redis.call('DEL', keys[1], keys[2])
  return { 'OK' }
end

-- keys: a history key. args: entry ttl
local function remember(keys, args)
  local at = int(math.ceil((clock() + tonumber(args[2])) / 1000))
  redis.call('SET', keys[1], args[1], 'PXAT', at)
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

local function version()
  return { 'OK', VERSION, DIGEST }
end

local function register(name, callback, ...)
  redis.register_function({
    function_name = 'sinkserve_' .. name, callback = callback, flags = { ... },
  })
end

-- A running turn can always finish and a conversation can always be deleted, also when memory is full.
register('version', version, 'no-writes')
register('create', create)
register('get', get, 'no-writes')
register('transcript', transcript, 'no-writes')
register('begin', begin)
register('renew', renew, 'allow-oom')
register('commit', commit, 'allow-oom')
register('abort', abort, 'allow-oom')
register('delete', delete, 'allow-oom')
register('remember', remember)
register('enlist', enlist)
register('keep', keep, 'allow-oom')
register('delist', delist, 'allow-oom')
register('page', page, 'no-writes')
