#!lua name=@library@

-- The protocol between gateways, Redis and workers: every step is one atomic function.
--
-- Written for Lua 5.1 on Redis >= 7.0 and Valkey. KEYS[1] is the partition's clock key; all other
-- keys share its prefix and so its hash tag and its Cluster slot. Arguments are one msgpack array
-- (ARGV[1]); what is binary comes as arguments of its own, because cmsgpack knows no bin type.
-- All times are milliseconds of TIME. Each function reads and checks first and writes afterwards:
-- an error in the middle would leave the writes before it. No loop runs over anything unbounded.
--
-- Keys behind the prefix, and how long each lives:
--   gen:<id>            hash    one generation                          set at admit; retention at close
--   spec:<request>      hash    prompt and parameters {body, left}      as gen; gone when the last choice ended
--   log:<id>            stream  token log, ids <end>-0 and <end>-1      run limit + retention; retention at close
--   doc:<request>       string  what a response says beside its tokens  as gen
--   idem:<n>:<tenant>:<key>     string: fingerprint and request         as gen; gone when cancelled
--   lane:<lane>         zset    fresh waiting generations by tag        1 day
--   again:<version|any> zset    handed back, rank * 10^13 + enqueue ms; suspects behind the others    1 day
--   due                 zset    id -> next moment to look at it         1 day
--   held:<worker>       zset    id -> turn of the claim call            1 day
--   subs:<gateway>      set     ids that the gateway reads              1 day
--   leases, gateways    zset    process -> end of its lease             1 day
--   versions            zset    model version -> last beat              1 day
--   tenants, backlog    hash    finish tags; waiting work, drain rate   1 day
--   quota:<key id>      hash    what is left in a key's buckets         3 min: full by then
--   using:<key id>      zset    its open requests -> end of their limit 1 day
--   clock               hash    run id, last sight, end of settling     1 day
--   secret              string  what stream tokens are signed with      1 day
--   ended, dead         stream  one record per end; quarantined ones    1 day, 7 days
--   worker:<worker>     hash    presence                                15 s
--   gateway:<gateway>   string  presence                                15 s
--   loading             zset    worker without its model -> when it must have spoken again    1 day
--   drain:<worker>      string  who asked it to rest                    1 day
--   lost                stream  workers and gateways that left without a word    1 day
--   dead:<id>           hash    a quarantined one, with its prompt; where it went    1 day
--   inbox:<gateway>     stream  packed records                          30 s
--   bell, bell:<lane>   list    wakes workers; of lanes that give way   1 min
--   told                string  up to where `ended` became webhooks        2 days
--   overview:seconds, overview:rows   stream: what the pool looked like     30 min
--   overview:lease      string  who says so                             5 s
--   errors:<code>       list    requests that lately failed with it     1 day
--   mark                string  written to wait for the disk behind it  4 s

local PROTOCOL = 1
local LANES = { 'priority', 'default', 'flex', 'batch' }
local RANK = { priority = 0, default = 1, flex = 2, batch = 3 }
local CLASS = { priority = 0, default = 0, flex = 1, batch = 2 }   -- a lane gives way to those of a lower class
local RANK_WIDTH = 1e13            -- above any time in ms, exact in a double with four ranks
local SUSPECTS_FROM = 5e12         -- behind any time in ms of this century, in the same rank
local HEAD_LIMIT_MS = { priority = 5000, default = 5000, flex = 60000, batch = 1800000 }
local TAG_SCALE = 1000             -- tags are integers: thousandths of a token at weight 1
local WORKER_LEASE_MS = 5000       -- used when leases are re-based; beats name their own
local GATEWAY_LEASE_MS = 15000
local SETTLE_MS = 2000             -- after Redis went back nobody claims: the survivors put back what it lost
local SLEPT_MS = 5000              -- nobody looked at the clock for so long: the machine slept
local RESERVE_AFTER_MS = 2000      -- a large head that waits longer gets a worker emptied for it
local SUSPECT_DEATHS = 2           -- in a row without progress: from then on it runs on probation
local POISON_DEATHS = 2            -- on probation
local PROGRESS_TOKENS = 8          -- who came so much further was hardly the cause of the next death
local SUSPECT_PATIENCE_MS = 5000   -- so long a suspect waits for a worker that happens to be clear; then one becomes so
local MAX_DEATHS = 10              -- however far it came
local VERSION_SILENCE_MS = 60000   -- after this without a beat a model version counts as gone
local NO_WORKER_GRACE_MS = 30000   -- a pool whose worker just restarts still accepts
local TOMBSTONE_MS = 60000
local FORGOTTEN_MS = 3600000       -- what was removed on purpose is not put back by who still has it
local MAX_CANDIDATES = 64
local MAX_LOOKAHEAD = 16
local MAX_MOVES = 64
local MAX_LEASES = 1024
local MAX_LOST = 100
local LOST_SHOWN_MS = 600000
local PRESENCE_MS = 15000
local INLINE_BODY_BYTES = 32768
local MAX_ANSWER_BYTES = 1048576
local PAGE_ENTRIES = 256
local PAGE_BYTES = 65536
local INBOX_RECORDS = 2048
local MINUTE_MS, DAY_MS = 60000, 86400000
local RETRYABLE = { QUEUE_TIMEOUT = true, ENGINE_ERROR = true }

-- tostring keeps only 14 digits; HINCRBY refuses "-0", and -0 + 0 is 0.
local function number(x) return string.format('%.0f', x + 0) end

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function prefix_of(keys) return string.sub(keys[1], 1, -6) end   -- '…clock' without 'clock'

local function keep(key) redis.call('PEXPIRE', key, DAY_MS) end

local function request_of(id) return string.match(id, '^(.*)%.[^.]*$') or id end

-- Splits the subscriber field; it holds a few names of 12 characters.
local function names(text)
  local found = {}
  for name in string.gmatch(text or '', '%S+') do found[#found + 1] = name end
  return found
end

local function without(text, name)
  local rest = {}
  for _, other in ipairs(names(text)) do
    if other ~= name then rest[#rest + 1] = other end
  end
  return table.concat(rest, ' ')
end

local function has(text, name) return string.find(' ' .. (text or '') .. ' ', ' ' .. name .. ' ', 1, true) end

-- The generation as a table with numbers where numbers are stored, or nil.
local function load(P, id)
  local flat = redis.call('HGETALL', P .. 'gen:' .. id)
  if #flat == 0 then return nil end
  local g = {}
  for i = 1, #flat, 2 do g[flat[i]] = flat[i + 1] end
  if tonumber(g.v) > PROTOCOL then error({ err = 'PROTOCOL_TOO_NEW generation ' .. id .. ' has version ' .. g.v }) end
  for _, field in ipairs({ 'epoch', 'next', 'deaths', 'died_at', 'fruitless', 'cost', 'room', 'hold', 'bytes', 'tag', 'grace', 't0', 't1', 't2',
                           'deadline', 'run_limit', 'retention', 'weight' }) do
    g[field] = tonumber(g[field]) or 0
  end
  return g
end

-- The last moment of a generation: its queue deadline before the first claim, then its run limit.
local function limit_of(g)
  if g.t1 == 0 then return g.deadline end
  return g.t1 + g.run_limit
end

-- Workers and gateways that ended without taking leave: for people.
local function note_lost(P, role, name, cause, presence)
  redis.call('XADD', P .. 'lost', 'MAXLEN', MAX_LOST, '*', 'role', role, 'name', name, 'cause', cause, 'blob', presence or '')
  keep(P .. 'lost')
end

-- It killed, or stood beside, and was not seen to come further: the next worker takes nothing beside it.
local function is_suspect(g) return g.fruitless >= SUSPECT_DEATHS and g.next < g.died_at + PROGRESS_TOKENS end

-- A suspect is on probation under the fence that it was claimed with as one: who knows no probation draws another.
local function is_on_probation(g) return g.st == 'R' and g.probation == g.fence and is_suspect(g) end

local function is_unread(g) return g.mode == 'attached' and g.subs == '' end

local function ring(P, lane)
  local bell = CLASS[lane] == 0 and P .. 'bell' or P .. 'bell:' .. lane
  if redis.call('LLEN', bell) < math.max(1, redis.call('ZCARD', P .. 'leases')) then redis.call('LPUSH', bell, '1') end
  redis.call('PEXPIRE', bell, MINUTE_MS)
end

-- Waiting ---------------------------------------------------------------------------------------

local function count_backlog(P, g, sign)
  local key = P .. 'backlog'
  redis.call('HINCRBY', key, g.lane .. '.tokens', number(sign * g.cost))
  redis.call('HINCRBY', key, g.lane .. '.bytes', number(sign * g.bytes))
  keep(key)
end

local function enqueue(P, id, g, queue, score)
  g.q = queue
  redis.call('ZADD', P .. queue, number(score), id)
  keep(P .. queue)
  redis.call('HSET', P .. 'gen:' .. id, 'st', 'Q', 'q', queue, 'fence', '', 'own', '')
  count_backlog(P, g, 1)
  ring(P, g.lane)
end

local function dequeue(P, id, g)
  redis.call('ZREM', P .. g.q, id)
  count_backlog(P, g, -1)
end

-- Tokens of work that wait: by lane, and in all.
local function waiting_tokens(P)
  local found, total = redis.call('HMGET', P .. 'backlog', 'priority.tokens', 'default.tokens', 'flex.tokens', 'batch.tokens'), 0
  for rank = 1, #LANES do
    found[rank] = tonumber(found[rank]) or 0
    total = total + found[rank]
  end
  return found, total
end

-- R -> Q. What has shown tokens may only be continued by its own model version; a suspect stays out
-- of the lane, so that it never blocks its head, and behind all else that was handed back.
local function hand_back(P, id, g, now)
  redis.call('ZREM', P .. 'held:' .. g.own, id)
  if g.next == 0 and not is_suspect(g) then
    enqueue(P, id, g, 'lane:' .. g.lane, g.tag)
  else
    local score = RANK[g.lane] * RANK_WIDTH + (is_suspect(g) and SUSPECTS_FROM or 0) + g.t0
    enqueue(P, id, g, g.next > 0 and ('again:' .. g.ver) or 'again:any', score)
    if g.next > 0 then   -- a version that was forgotten already is noted once more, or nobody would end this
      redis.call('ZADD', P .. 'versions', 'NX', number(now - NO_WORKER_GRACE_MS), g.ver)
      keep(P .. 'versions')
    end
  end
  g.st = 'Q'
end

-- Delivery --------------------------------------------------------------------------------------

-- An outbox gathers, per gateway, what one call has to tell it; it becomes one inbox record each.
local function post(outbox, subscribers, id, record, timing)
  if subscribers == '' then return end
  -- [id, record, timing or nil]; the id as a msgpack str 8, packed by hand: this runs per token.
  local item = '\147\217' .. string.char(#id) .. id .. record .. (timing or '\192')
  for gateway in string.gmatch(subscribers, '%S+') do
    local items = outbox[gateway]
    if not items then
      items = {}
      outbox[gateway] = items
    end
    items[#items + 1] = item
  end
end

local function array_header(n)
  if n < 16 then return string.char(144 + n) end
  return string.char(220, math.floor(n / 256), n % 256)
end

local function deliver(P, outbox)
  for gateway, items in pairs(outbox) do
    redis.call('XADD', P .. 'inbox:' .. gateway, 'NOMKSTREAM', 'MAXLEN', '~', INBOX_RECORDS, '*',
      'r', array_header(#items) .. table.concat(items))
  end
end

-- Quotas ----------------------------------------------------------------------------------------

-- A key's two buckets hold a minute's worth, of requests and of tokens, and fill at that rate; one
-- that is not there is full. A choice holds the tokens that it may use until it has ended.

local function filled(level, limit, since, now)
  return math.min(limit, (tonumber(level) or limit) + limit * math.max(0, now - since) / MINUTE_MS)
end

-- [key id, requests a minute, tokens a minute, requests at once, what this one counts as] -> what
-- is left; nil without a key. A limit of 0 is none.
local function quota_of(P, now, limits)
  local id = limits[1]
  if id == '' then return nil end
  local stored = redis.call('HMGET', P .. 'quota:' .. id, 'requests', 'tokens', 'at')
  local since = tonumber(stored[3]) or now
  return {
    id = id, max_requests = limits[2], max_tokens = limits[3], max_open = limits[4], count = limits[5],
    requests = filled(stored[1], limits[2], since, now), tokens = filled(stored[2], limits[3], since, now),
    open = limits[4] > 0 and redis.call('ZCOUNT', P .. 'using:' .. id, '(' .. number(now), '+inf') or 0,
  }
end

local function ms_until(level, wanted, limit)
  if limit == 0 or level >= wanted then return 0 end
  return math.ceil((wanted - level) * MINUTE_MS / limit)
end

-- Why a request for so many tokens has to wait: code, ms and cause; nil: it need not.
local function over_quota(quota, tokens)
  if quota.max_tokens > 0 and tokens > quota.max_tokens then return 'QUOTA_EXHAUSTED', 0, 'tokens' end
  if quota.max_open > 0 and quota.open >= quota.max_open then return 'RATE_LIMITED', 1000, 'streams' end
  local requests_ms = ms_until(quota.requests, quota.count, quota.max_requests)
  local tokens_ms = ms_until(quota.tokens, tokens, quota.max_tokens)
  if requests_ms == 0 and tokens_ms == 0 then return nil end
  return 'RATE_LIMITED', math.max(requests_ms, tokens_ms), requests_ms > tokens_ms and 'requests' or 'tokens'
end

local function charge(P, now, quota, request, tokens, last_moment)
  local buckets, using = P .. 'quota:' .. quota.id, P .. 'using:' .. quota.id
  quota.requests, quota.tokens = quota.requests - quota.count, quota.tokens - tokens
  redis.call('HSET', buckets, 'requests', string.format('%.3f', quota.requests),
    'tokens', string.format('%.3f', quota.tokens), 'at', number(now))
  redis.call('PEXPIRE', buckets, 3 * MINUTE_MS)
  redis.call('ZREMRANGEBYSCORE', using, '-inf', number(now))   -- should an end ever have been lost
  redis.call('ZADD', using, number(last_moment), request)
  keep(using)
end

-- [left, ms until full] of requests and of tokens.
local function shown(quota)
  if not quota then return '' end
  return { math.max(0, math.floor(quota.requests)), ms_until(quota.requests, quota.max_requests, quota.max_requests),
    math.max(0, math.floor(quota.tokens)), ms_until(quota.tokens, quota.max_tokens, quota.max_tokens) }
end

-- Gives back what an ended choice held and did not use; a prompt that no worker read cost nothing.
local function settle(P, id, g, is_last)
  if not g.quota then return end
  if is_last then redis.call('ZREM', P .. 'using:' .. g.quota, request_of(id)) end
  local used = g.next + (g.t1 > 0 and g.hold - g.room or 0)
  local buckets = P .. 'quota:' .. g.quota
  if used < g.hold and redis.call('EXISTS', buckets) == 1 then
    redis.call('HINCRBYFLOAT', buckets, 'tokens', number(g.hold - used))
  end
end

-- Ending ----------------------------------------------------------------------------------------

local function timing_of(g, now)
  return '\153' .. cmsgpack.pack(g.t0) .. cmsgpack.pack(g.t1) .. cmsgpack.pack(g.t2) .. cmsgpack.pack(now) .. cmsgpack.pack(g.epoch) .. cmsgpack.pack(g.deaths)
    .. cmsgpack.pack(g.ver or '') .. cmsgpack.pack(g.own or '') .. cmsgpack.pack(g.lane)
end

-- [start, chain, [], [], nil, [reason, code, message]]: an end without tokens.
local function end_record(g, reason, code, message)
  return '\150' .. cmsgpack.pack(g.next) .. cmsgpack.pack(g.chain) .. '\144\144\192'
    .. '\147' .. cmsgpack.pack(reason) .. cmsgpack.pack(code) .. cmsgpack.pack(message)
end

local function refund_tag(P, g)
  local unused = (g.t1 == 0 and g.cost or g.room) - g.next   -- a prompt that no worker read cost nothing either
  if unused <= 0 then return end
  local field = 't.' .. g.lane .. '.' .. g.tenant
  local tags = redis.call('HMGET', P .. 'tenants', field, 'v.' .. g.lane)
  if not tags[1] then return end
  local floor = tonumber(tags[2]) or 0
  redis.call('HSET', P .. 'tenants', field,
    number(math.max(floor, tonumber(tags[1]) - math.floor(unused * TAG_SCALE / g.weight))))
end

-- With the length of the tenant's name, lest a colon in it made it a key of another tenant.
local function idem_of(P, tenant, key) return P .. 'idem:' .. #tenant .. ':' .. tenant .. ':' .. key end

-- The idempotency key of a request that ended. What failed for a while and showed nothing, or was
-- cancelled, for want of a reader too, is made anew under the same key; all else is answered from
-- the log. While choices are left they live under the key.
local function settle_key(P, id, g, reason, code, is_last)
  if g.idem == '' then return end
  local idem, request = idem_of(P, g.tenant, g.idem), request_of(id)
  local known = redis.call('GET', idem)
  if not known or string.match(known, ' (.*)$') ~= request then return end   -- freed, and used again
  if reason == 'cancelled' or (is_last and RETRYABLE[code] and g.next == 0) then
    redis.call('DEL', idem)
  elseif is_last then
    redis.call('PEXPIRE', idem, g.retention)
  end
end

-- Q or R -> T, with the one terminal entry. `record` is given by publish together with the last
-- tokens (g.next and g.chain then already stand behind them); everybody else ends without tokens.
local function close(P, id, g, now, outbox, reason, code, message, record)
  record = record or end_record(g, reason, code, message or '')
  if g.st == 'Q' then dequeue(P, id, g) else redis.call('ZREM', P .. 'held:' .. g.own, id) end
  local timing = timing_of(g, now)
  local log = P .. 'log:' .. id
  redis.call('XADD', log, number(g.next) .. '-1', 'r', record, 'm', timing)
  redis.call('PEXPIRE', log, g.retention)
  local gen = P .. 'gen:' .. id
  redis.call('HSET', gen, 'st', 'T', 'next', number(g.next), 'chain', g.chain, 't2', number(g.t2), 'own', '', 'q', '',
    'subs', '', 'end', code ~= '' and code or reason, 't3', number(now))
  redis.call('PEXPIRE', gen, g.retention)
  local spec = P .. 'spec:' .. request_of(id)
  local is_last = redis.call('EXISTS', spec) == 0 or redis.call('HINCRBY', spec, 'left', -1) <= 0
  if is_last then
    redis.call('UNLINK', spec)
    redis.call('PEXPIRE', P .. 'doc:' .. request_of(id), g.retention)   -- it holds a prompt: no longer than its answer
  end
  redis.call('ZREM', P .. 'due', id)
  refund_tag(P, g)
  settle(P, id, g, is_last)
  post(outbox, g.subs, id, record, timing)
  for _, gateway in ipairs(names(g.subs)) do redis.call('SREM', P .. 'subs:' .. gateway, id) end
  local as = cmsgpack.unpack(g.out)   -- api, …, and eighth whether it is a response in the background
  redis.call('XADD', P .. 'ended', 'MAXLEN', '~', 100000, '*', 'id', id, 'tenant', g.tenant, 'lane', g.lane,
    'in', number(g.cost - g.room), 'out', number(g.next), 'reason', reason, 'code', code, 'quota', g.quota or '', 'api', as[1],
    'background', as[8] and '1' or '0')
  keep(P .. 'ended')
  settle_key(P, id, g, reason, code, is_last)
  g.st = 'T'
end

local function unsubscribe(P, id, g, gateway, now, outbox)
  g.subs = without(g.subs, gateway)
  redis.call('SREM', P .. 'subs:' .. gateway, id)
  if g.st == 'T' then return end
  redis.call('HSET', P .. 'gen:' .. id, 'subs', g.subs)
  if not is_unread(g) then return end
  if g.grace == 0 then
    close(P, id, g, now, outbox, 'cancelled', '')
  else
    redis.call('ZADD', P .. 'due', 'LT', number(math.min(now + g.grace, limit_of(g))), id)
  end
end

-- The clock -------------------------------------------------------------------------------------

local function rebase(key, now, lease)
  for _, process in ipairs(redis.call('ZRANGE', key, 0, MAX_LEASES - 1)) do
    redis.call('ZADD', key, number(now + lease), process)
  end
end

local function shift(key, by)
  for _, member in ipairs(redis.call('ZRANGE', key, 0, MAX_LEASES - 1)) do
    redis.call('ZINCRBY', key, number(by), member)
  end
end

-- For how many ms more what a server without memory lost may be put back: it has just been started.
local function settle_of_a_blank(server)
  local up_ms = 1000 * tonumber(string.match(server, 'uptime_in_seconds:(%d+)'))
  local keeps = string.match(redis.call('INFO', 'persistence'), 'aof_enabled:(%d)') == '1'
  if keeps then return 0 end   -- nothing was ever there
  return SETTLE_MS - up_ms
end

-- Nobody has died of a restart of Redis, a clock that was set, or a machine that slept: in these
-- cases every lease starts again, and what was heard of a model version keeps its age. A server that
-- is another one than before, or whose clock went back, may have lost its last second: for a while
-- nothing is claimed, so that its owner can put it back. Returns how long, in ms.
local function guard(P, now)
  local key = P .. 'clock'
  local server = redis.call('INFO', 'server')
  local run = string.match(server, 'run_id:(%x+)')
  local stored = redis.call('HMGET', key, 'run', 'seen', 'settle')
  local seen, settle = tonumber(stored[2]), tonumber(stored[3]) or 0
  if not seen then
    settle = now + settle_of_a_blank(server)
  elseif stored[1] ~= run or now < seen - 1000 then
    settle = now + SETTLE_MS
  end
  if stored[1] ~= run or not seen or now < seen - 1000 or now - seen > SLEPT_MS then
    rebase(P .. 'leases', now, WORKER_LEASE_MS)
    rebase(P .. 'gateways', now, GATEWAY_LEASE_MS)
    if seen then shift(P .. 'versions', now - seen) end
  end
  redis.call('HSET', key, 'run', run, 'seen', number(now), 'settle', number(settle))
  keep(key)
  return math.max(0, settle - now)
end

-- Admission -------------------------------------------------------------------------------------

local function newest_version(P) return redis.call('ZRANGE', P .. 'versions', 0, 0, 'REV')[1] or '' end

-- Why the pool cannot take this cost: a failure code, or nil.
local function unservable(P, now, cost)
  local live = redis.call('ZRANGE', P .. 'leases', number(now), '+inf', 'BYSCORE', 'LIMIT', 0, MAX_LEASES)
  if #live == 0 then
    local last = redis.call('ZRANGE', P .. 'versions', 0, 0, 'REV', 'WITHSCORES')
    if last[2] and now - tonumber(last[2]) < NO_WORKER_GRACE_MS then return nil end
    return 'NO_WORKERS'
  end
  for _, worker in ipairs(live) do
    local max_cost = tonumber(redis.call('HGET', P .. 'worker:' .. worker, 'max_cost'))
    if not max_cost or cost <= max_cost then return nil end
  end
  return 'CONTEXT_LENGTH_EXCEEDED'
end

-- Tokens per second that leave the queue: measured while something waited, else what workers say.
local function drain_rate(P)
  local measured = tonumber(redis.call('HGET', P .. 'backlog', 'rate'))
  if measured and measured > 0 then return measured end
  local sum = 0
  for _, worker in ipairs(redis.call('ZRANGE', P .. 'leases', 0, MAX_CANDIDATES - 1)) do
    sum = sum + (tonumber(redis.call('HGET', P .. 'worker:' .. worker, 'rate')) or 0)
  end
  return sum
end

local function wait_ms(P, lane)
  local ahead = 0
  for rank = 0, RANK[lane] do
    ahead = ahead + (tonumber(redis.call('HGET', P .. 'backlog', LANES[rank + 1] .. '.tokens')) or 0)
  end
  local rate = ahead > 0 and drain_rate(P) or 0
  return rate > 0 and math.floor(ahead * 1000 / rate) or 0
end

-- Start tag and finish tag of a tenant's next generation (self-clocked fair queueing). The lift to
-- the lane's head as well as to `v` keeps a newcomer from starting at 0 after `tenants` expired.
local function next_tag(P, lane, tenant)
  local tags = redis.call('HMGET', P .. 'tenants', 'v.' .. lane, 't.' .. lane .. '.' .. tenant)
  local head = redis.call('ZRANGE', P .. 'lane:' .. lane, 0, 0, 'WITHSCORES')
  return math.max(tonumber(tags[1]) or 0, tonumber(head[2]) or 0, tonumber(tags[2]) or 0)
end

-- The answer to a request that cannot be queued now; else nil, and the wait.
local function refusal_of(P, now, quota, want)
  local unserved = unservable(P, now, want.cost)
  if unserved then return { unserved, 0, '' } end
  if quota then
    local code, wait_for, cause = over_quota(quota, want.tokens)
    if code then return { code, wait_for, cause, shown(quota) } end
  end
  local held = redis.call('HMGET', P .. 'backlog', want.lane .. '.tokens', want.lane .. '.bytes')
  local wait = wait_ms(P, want.lane)
  if (tonumber(held[1]) or 0) + want.total > want.cap_tokens then return { 'QUEUE_FULL', wait, 'tokens' } end
  if (tonumber(held[2]) or 0) + want.bytes > want.cap_bytes then return { 'QUEUE_FULL', wait, 'bytes' } end
  if wait > want.queue_limit then return { 'QUEUE_FULL', wait - want.queue_limit, 'wait' } end
  return nil, wait
end

-- The choices of a request that are to be queued: all or none. Any that is known says that it was
-- admitted before: another may have ended and expired, or been cancelled ahead. Only where Redis went
-- back, and workers have put back those known, are the others still to be queued.
local function unknown_choices(P, request, choices, resubmit)
  local missing, is_put_back = {}, true
  for choice = 0, choices - 1 do
    local known = redis.call('HMGET', P .. 'gen:' .. request .. '.' .. choice, 'st', 'put_back')
    if not known[1] then missing[#missing + 1] = choice end
    is_put_back = is_put_back and (not known[1] or known[2] == '1')
  end
  if #missing < choices and not (resubmit and is_put_back) then return {} end
  return missing
end

-- A reader whose lease is over is given one, or nobody would notice its death. What its inbox was to
-- hold meanwhile went elsewhere, so its next beat makes a new one, and has everything attached again.
local function ensure_reader(P, gateway, now)
  if redis.call('ZADD', P .. 'gateways', 'NX', number(now + GATEWAY_LEASE_MS), gateway) == 0 then return end
  keep(P .. 'gateways')
  redis.call('DEL', P .. 'inbox:' .. gateway)
end

-- What admit would say to the smallest of requests, before anybody works on a larger one.
-- ARGV: [lane, tenant, idem, queue limit, cap tokens, cap bytes, limits]
local function foresee(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local a = cmsgpack.unpack(args[1])
  if a[3] ~= '' and redis.call('EXISTS', idem_of(P, a[2], a[3])) == 1 then return { 'known' } end
  local refusal = refusal_of(P, now, quota_of(P, now, a[7]), { lane = a[1], cost = 1, tokens = 1, total = 1,
    bytes = 1, cap_tokens = a[5], cap_bytes = a[6], queue_limit = a[4] })
  return refusal or { 'free' }
end

-- ARGV: [request, choices, cost, room, lane, tenant, weight, attached, grace, queue limit, run limit,
--        retention, cap tokens, cap bytes, idem, fingerprint, gateway, resubmit, limits],
--       body, out
local function admit(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local a, body, out = cmsgpack.unpack(args[1]), args[2], args[3]
  local request, choices, cost, room, lane, tenant, weight = a[1], a[2], a[3], a[4], a[5], a[6], a[7]
  local idem, fingerprint, gateway, resubmit = a[15], a[16], a[17], a[18]
  local quota = quota_of(P, now, a[19])
  local idem_key = idem_of(P, tenant, idem)

  if idem ~= '' then
    local known = redis.call('GET', idem_key)
    if known then
      local print, other = string.match(known, '^(%S*) (.*)$')
      if print ~= fingerprint then return { 'IDEMPOTENCY_CONFLICT', 0, '' } end
      if other ~= request then return { 'existing', other, 0, 0, newest_version(P), shown(quota) } end
    end
  end
  local missing = unknown_choices(P, request, choices, resubmit)
  if #missing == 0 then return { 'existing', request, 0, 0, newest_version(P), shown(quota) } end
  local total, wait = cost * choices, 0
  local tokens = cost + (choices - 1) * room   -- a prompt counts once, however many answers it has
  if not resubmit then
    local refusal
    refusal, wait = refusal_of(P, now, quota, { lane = lane, cost = cost, tokens = tokens, total = total,
      bytes = #body, cap_tokens = a[13], cap_bytes = a[14], queue_limit = a[10] })
    if refusal then return refusal end
  end

  local ttl = a[10] + a[11] + a[12] + 5 * MINUTE_MS
  local spec, tag = P .. 'spec:' .. request, next_tag(P, lane, tenant)
  local position = redis.call('ZCARD', P .. 'lane:' .. lane)
  redis.call('HSET', spec, 'body', body)
  redis.call('HINCRBY', spec, 'left', #missing)
  redis.call('PEXPIRE', spec, ttl)
  for _, choice in ipairs(missing) do
    local id = request .. '.' .. choice
    local gen = P .. 'gen:' .. id
    local g = { lane = lane, cost = cost, bytes = math.floor(#body / choices) }
    -- What publish reads stands first: a small hash is a list that is searched from its front.
    redis.call('HSET', gen, 'st', 'Q', 'fence', '', 'next', 0, 'chain', '', 'subs', gateway, 'v', PROTOCOL,
      'epoch', 0, 'deaths', 0, 'lane', lane, 'tenant', tenant, 'weight', weight, 'cost', number(cost),
      'room', number(room), 'bytes', g.bytes, 'tag', number(tag), 'ver', '',
      'mode', a[8] and 'attached' or 'detached', 'grace', number(a[9]), 't0', number(now), 't1', 0, 't2', 0,
      'deadline', number(now + a[10]), 'run_limit', number(a[11]), 'retention', number(a[12]), 'out', out, 'idem', idem)
    if quota then redis.call('HSET', gen, 'quota', quota.id, 'hold', number(choice == 0 and cost or room)) end
    redis.call('PEXPIRE', gen, ttl)
    enqueue(P, id, g, 'lane:' .. lane, tag)
    -- After a rollback a client may have left already: then only its grace time is granted.
    local patience = (resubmit and gateway == '' and a[8]) and math.min(a[9], a[10]) or a[10]
    redis.call('ZADD', P .. 'due', number(now + patience), id)
    if gateway ~= '' then redis.call('SADD', P .. 'subs:' .. gateway, id) end
    tag = tag + math.max(1, math.floor(cost * TAG_SCALE / weight))
  end
  if gateway ~= '' then
    keep(P .. 'subs:' .. gateway)
    ensure_reader(P, gateway, now)
  end
  keep(P .. 'due')
  redis.call('HSET', P .. 'tenants', 't.' .. lane .. '.' .. tenant, number(tag))
  keep(P .. 'tenants')
  if idem ~= '' then redis.call('SET', idem_key, fingerprint .. ' ' .. request, 'PX', ttl) end
  if quota then charge(P, now, quota, request, tokens, now + a[10] + a[11]) end
  return { 'accepted', request, position, wait, newest_version(P), shown(quota) }
end

-- Claiming --------------------------------------------------------------------------------------

-- A moving average of claimed cost per second, over windows in which something always waited.
local function measure_drain(P, now, taken)
  local key = P .. 'backlog'
  local _, waiting = waiting_tokens(P)
  if waiting <= 0 then
    redis.call('HDEL', key, 'since', 'sum')
    return
  end
  local window = redis.call('HMGET', key, 'since', 'sum', 'rate')
  local since, sum = tonumber(window[1]), (tonumber(window[2]) or 0) + taken
  if not since then
    redis.call('HSET', key, 'since', number(now), 'sum', 0)
  elseif now - since < 1000 then
    redis.call('HSET', key, 'sum', number(sum))
  else
    local sample = sum * 1000 / (now - since)
    local old = tonumber(window[3])
    local rate = old and (0.7 * old + 0.3 * sample) or sample
    redis.call('HSET', key, 'since', number(now), 'sum', 0, 'rate', string.format('%.3f', rate))
  end
end

-- All of a generation but where it stands: what it takes to make it again.
local HEAD = { 'lane', 'tenant', 'weight', 'cost', 'room', 'bytes', 'tag', 'mode', 'grace', 't0', 't1', 'deadline',
               'run_limit', 'retention', 'out', 'idem', 'quota', 'hold', 'deaths', 'died_at', 'fruitless', 'probation_deaths' }

local function head_of(g)
  local head = {}
  for i, field in ipairs(HEAD) do head[i] = g[field] or '' end
  return cmsgpack.pack(head)
end

-- A call of a worker may come when its lease has ended: without one nobody would notice its death,
-- and under an old one the next reap would take back from the living what it holds.
local function ensure_lease(P, worker, now)
  keep(P .. 'held:' .. worker)
  local lease = tonumber(redis.call('ZSCORE', P .. 'leases', worker))
  if not lease or lease <= now then redis.call('ZADD', P .. 'leases', number(now + WORKER_LEASE_MS), worker) end
  keep(P .. 'leases')
end

local function epoch_of(fence) return tonumber(string.match(fence, '^%d+')) end

-- To R: from here on it is this worker's, under this fence. `turn` is that of its claim call.
local function hand_to(P, id, g, worker, turn, fence, version, now)
  if g.t1 == 0 then g.t1 = now end
  redis.call('HSET', P .. 'gen:' .. id, 'st', 'R', 'q', '', 'epoch', number(epoch_of(fence)), 'fence', fence, 'own', worker,
    'ver', version, 't1', number(g.t1))
  if g.next > 0 then redis.call('HSET', P .. 'gen:' .. id, 'from', number(g.next)) end
  redis.call('ZADD', P .. 'held:' .. worker, number(turn), id)
end

-- Whether all that this worker holds has come further since it was claimed: of the next death nobody
-- but the suspect beside them would be the cause.
local function is_clear(P, worker)
  for _, id in ipairs(redis.call('ZRANGE', P .. 'held:' .. worker, 0, MAX_LEASES - 1)) do
    local h = redis.call('HMGET', P .. 'gen:' .. id, 'next', 'from')
    if (tonumber(h[1]) or 0) < (tonumber(h[2]) or 0) + PROGRESS_TOKENS then return false end
  end
  return true
end

-- This worker's presence names a suspect, on probation there or waiting until it is clear: it is given
-- nothing else, in this call and until that has come to an end.
local function devote(P, id, picker)
  local presence = P .. 'worker:' .. picker.worker
  redis.call('HSET', presence, 'probation', id)
  redis.call('PEXPIRE', presence, PRESENCE_MS)
  picker.suspect, picker.max = id, 0
end

-- Whether this call may take this suspect: only beside nobody who may yet kill. One that never finds
-- such a worker gets one that becomes so; should that not call again, another one.
local function may_try(P, id, g, picker)
  if #picker.found == 0 then
    if picker.is_clear == nil then picker.is_clear = is_clear(P, picker.worker) end
    if picker.is_clear then return true end
  end
  local since = math.max(tonumber(g.died_ms) or 0, tonumber(g.awaits_ms) or 0)
  if picker.now - since > SUSPECT_PATIENCE_MS then
    redis.call('HSET', P .. 'gen:' .. id, 'awaits', picker.worker, 'awaits_ms', number(picker.now))
    devote(P, id, picker)
  end
  return false
end

-- One claim call: what it may still take, and what it took.
local function take(P, id, g, picker)
  if g.q == 'lane:' .. g.lane then   -- what was handed back, or passed over, has an old tag: time never goes back
    local v = redis.call('HGET', P .. 'tenants', 'v.' .. g.lane)
    redis.call('HSET', P .. 'tenants', 'v.' .. g.lane, number(math.max(g.tag, tonumber(v) or 0)))
    keep(P .. 'tenants')
  end
  dequeue(P, id, g)
  local fence = number(g.epoch + 1) .. '.' .. picker.nonce
  hand_to(P, id, g, picker.worker, picker.turn, fence, g.next > 0 and g.ver or picker.version, picker.now)
  if is_unread(g) then   -- its grace time goes on, but not beyond the run limit
    redis.call('ZADD', P .. 'due', 'LT', number(limit_of(g)), id)
  else
    redis.call('ZADD', P .. 'due', number(limit_of(g)), id)
  end
  for lane, room in pairs(picker.rooms) do   -- who gives way to it loses its room, not the other way round
    if CLASS[lane] >= CLASS[g.lane] then room.slots, room.tokens = room.slots - 1, room.tokens - g.cost end
  end
  picker.taken = picker.taken + g.cost
  local spec = P .. 'spec:' .. request_of(id)
  local size, body = redis.call('HSTRLEN', spec, 'body'), ''
  if size <= INLINE_BODY_BYTES and picker.bytes + size <= MAX_ANSWER_BYTES then body = redis.call('HGET', spec, 'body') or '' end
  picker.bytes = picker.bytes + #body
  local clear_at = 0   -- the position at which its probation ends
  if is_suspect(g) then
    clear_at = g.died_at + PROGRESS_TOKENS
    redis.call('HSET', P .. 'gen:' .. id, 'probation', fence)
    devote(P, id, picker)
  end
  picker.found[#picker.found + 1] = { id, fence, g.next, g.chain, g.deaths, g.lane, g.t0, g.t1, size, body, head_of(g), clear_at }
end

-- Looks at one candidate. Returns false when the call must stop: full, or room is being reserved;
-- nil when it must leave this queue, in which nobody but suspects is left.
local function consider(P, queue, id, is_head, picker, is_starved)
  if #picker.found >= picker.max or picker.looked >= MAX_CANDIDATES then return false end
  picker.looked = picker.looked + 1
  local g = load(P, id)
  if not g or g.st ~= 'Q' or g.q ~= queue then
    redis.call('ZREM', P .. queue, id)
    return true
  end
  if picker.now >= limit_of(g) then
    close(P, id, g, picker.now, picker.outbox, 'failed', g.t1 == 0 and 'QUEUE_TIMEOUT' or 'GENERATION_TIMEOUT')
    return true
  end
  if g.cost <= picker.rooms[g.lane].tokens then
    if is_suspect(g) and not may_try(P, id, g, picker) then return nil end
    take(P, id, g, picker)
  elseif is_head and picker.now - g.t0 > RESERVE_AFTER_MS and g.cost <= picker.max_cost then
    -- Nobody of its lane or behind it is taken meanwhile; if its lane starves, nobody at all.
    picker.reserve = { g.cost, g.lane, is_starved and 1 or 0 }
    return false
  end
  return true
end

local function pick_from(P, queue, lane, ids, picker)
  for i, id in ipairs(ids) do
    if picker.rooms[lane].slots <= 0 then return true end
    local goes_on = consider(P, queue, id, i == 1, picker)
    if not goes_on then return goes_on == nil end
  end
  return true
end

-- The lowest lane whose head has waited beyond its limit gets one pick: strict order cannot starve
-- it, and promotion cannot take over. A worker with one free slot at a time makes one of two calls
-- such a pick.
local function pick_starved(P, picker)
  for rank = #LANES, 1, -1 do
    local lane = LANES[rank]
    local room = picker.rooms[lane]
    local id = room.slots > 0 and redis.call('ZRANGE', P .. 'lane:' .. lane, 0, 0)[1]
    local since = id and tonumber(redis.call('HGET', P .. 'gen:' .. id, 't0'))
    if since and picker.now - since > HEAD_LIMIT_MS[lane] then
      local takes_all = CLASS[lane] == 0 and room.slots == 1
      if takes_all and redis.call('HDEL', P .. 'backlog', 'promoted') == 1 then return true end
      if takes_all then redis.call('HSET', P .. 'backlog', 'promoted', 1) end
      return consider(P, 'lane:' .. lane, id, true, picker, true)
    end
  end
  return true
end

local function pick_by_rank(P, picker)
  for rank, lane in ipairs(LANES) do
    local from, to = number((rank - 1) * RANK_WIDTH), '(' .. number(rank * RANK_WIDTH)
    for _, queue in ipairs({ 'again:' .. picker.version, 'again:any' }) do
      local ids = redis.call('ZRANGE', P .. queue, from, to, 'BYSCORE', 'LIMIT', 0, MAX_LOOKAHEAD)
      if not pick_from(P, queue, lane, ids, picker) then return end
    end
    while true do   -- a lane is read in slices, as long as whole slices are taken
      local before = #picker.found
      local ids = redis.call('ZRANGE', P .. 'lane:' .. lane, 0, MAX_LOOKAHEAD - 1)
      if not pick_from(P, 'lane:' .. lane, lane, ids, picker) then return end
      if #picker.found == before or #ids < MAX_LOOKAHEAD then break end
    end
  end
end

-- The suspect that a worker's presence names: nothing else is claimed while it is on probation there,
-- nor while it waits for this worker to be clear; once it is, that one is taken.
local function see_through(P, id, picker)
  local g = load(P, id)
  if g and g.own == picker.worker and is_on_probation(g) then
    picker.suspect = id
    return
  end
  local awaits_us = g and g.st == 'Q' and g.awaits == picker.worker and is_suspect(g)
  if awaits_us and picker.now - tonumber(g.awaits_ms) <= SUSPECT_PATIENCE_MS then
    picker.suspect = id
    if picker.rooms[g.lane].slots > 0 then consider(P, g.q, id, false, picker) end
    return
  end
  if awaits_us then   -- somebody here takes long to come further: as long again for others
    redis.call('HSET', P .. 'gen:' .. id, 'awaits', '', 'awaits_ms', number(picker.now))
  end
  redis.call('HDEL', P .. 'worker:' .. picker.worker, 'probation')
end

-- Beside what was claimed it answers which suspect the worker has to see through first.
-- ARGV: [worker, nonce, turn, max, version, [[slots, tokens] by rank of the lane]]
local function claim(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local settling = guard(P, now)
  if settling > 0 then return { {}, {}, settling, '' } end
  local a = cmsgpack.unpack(args[1])
  local picker = {
    worker = a[1], nonce = a[2], turn = a[3], max = a[4], version = a[5], rooms = {},
    now = now, taken = 0, looked = 0, bytes = 0, reserve = {}, found = {}, outbox = {},
  }
  for rank, lane in ipairs(LANES) do picker.rooms[lane] = { slots = a[6][rank][1], tokens = a[6][rank][2] } end
  local presence = redis.call('HMGET', P .. 'worker:' .. picker.worker, 'max_cost', 'probation')
  picker.max_cost = tonumber(presence[1]) or picker.rooms.priority.tokens
  if presence[2] then see_through(P, presence[2], picker) end
  if not picker.suspect and pick_starved(P, picker) then pick_by_rank(P, picker) end
  if #picker.found > 0 then ensure_lease(P, picker.worker, now) end
  measure_drain(P, now, picker.taken)
  deliver(P, picker.outbox)
  return { picker.reserve, picker.found, 0, picker.suspect or '' }
end

-- Publishing ------------------------------------------------------------------------------------

-- One item of a publish call: nil when accepted, else the refusal {id, kind, next, chain}. Under a
-- fence that was drawn later than anything known here, Redis went back: `forgotten`.
local function append(P, now, outbox, item, record)
  local id, fence, start, n, prev, chain, reason, code, message = unpack(item)
  local gen, log = P .. 'gen:' .. id, P .. 'log:' .. id
  local h = redis.call('HMGET', gen, 'st', 'fence', 'next', 'chain', 'subs')
  local st, at = h[1], tonumber(h[3])
  if not st then return { id, 'unknown', 0, '' } end
  if st == 'T' then
    if h[2] == fence and reason ~= '' and start + n == at then return nil end
    return { id, 'gone', at, h[4] }
  end
  if st ~= 'R' or h[2] ~= fence then
    local is_behind = tonumber(redis.call('HGET', gen, 'epoch')) < epoch_of(fence)
    return { id, is_behind and 'forgotten' or 'lost', at, h[4] }
  end
  local repeated = start + n <= at
  if repeated and reason == '' then return nil end
  if repeated and start + n == at and chain == h[4] then
    record, n = start == at and record or nil, 0   -- its tokens are in the log, its end is not
  elseif start ~= at or prev ~= h[4] then
    return { id, 'realign', at, h[4] }
  end
  if reason ~= '' then
    local g = load(P, id)
    g.next, g.chain = start + n > at and start + n or at, chain
    if g.t2 == 0 and g.next > 0 then g.t2 = now end
    close(P, id, g, now, outbox, reason, code, message, record)
    return nil
  end
  if start == 0 then
    local added = redis.pcall('XADD', log, number(n) .. '-0', 'r', record)
    if added.err then return { id, 'realign', at, h[4] } end
    local limits = redis.call('HMGET', gen, 'run_limit', 'retention')
    redis.call('PEXPIRE', log, number(tonumber(limits[1]) + tonumber(limits[2])))
    redis.call('HSET', gen, 'next', number(n), 'chain', chain, 't2', number(now))
  else
    local added = redis.pcall('XADD', log, 'NOMKSTREAM', number(start + n) .. '-0', 'r', record)
    if not added or type(added) == 'table' then   -- the log was removed under a running generation
      close(P, id, load(P, id), now, outbox, 'failed', 'STREAM_EXPIRED')
      return { id, 'gone', at, h[4] }
    end
    redis.call('HSET', gen, 'next', number(start + n), 'chain', chain)
  end
  post(outbox, h[5], id, record)
  return nil
end

-- ARGV: [worker, lease, [[id, fence, start, n, prev chain, chain, reason, code, message]…]], record…
local function publish(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local a = cmsgpack.unpack(args[1])
  local outbox, refusals = {}, {}
  for i, item in ipairs(a[3]) do
    local refusal = append(P, now, outbox, item, args[i + 1])
    if refusal then refusals[#refusals + 1] = refusal end
  end
  deliver(P, outbox)
  redis.call('ZADD', P .. 'leases', 'XX', number(now + a[2]), a[1])
  local waiting = waiting_tokens(P)
  return { waiting, refusals }
end

-- A generation that is not known any more, made again where its log begins. Nobody reads it until
-- gateways attach again, which they have to, and the time of one gateway's lease for.
local function make_again(P, id, head, body, now)
  local g = { next = 0, chain = '', subs = '', st = 'R', q = '' }
  for i, value in ipairs(cmsgpack.unpack(head)) do g[HEAD[i]] = value end
  local gen, spec = P .. 'gen:' .. id, P .. 'spec:' .. request_of(id)
  local ttl = g.run_limit + g.retention + 5 * MINUTE_MS
  redis.call('HSET', gen, 'st', 'R', 'fence', '', 'next', 0, 'chain', '', 'subs', '', 'v', PROTOCOL, 't2', 0, 'ver', '',
    'put_back', '1')
  for _, field in ipairs(HEAD) do
    local value = g[field]
    if value ~= '' or (field ~= 'quota' and field ~= 'hold') then
      redis.call('HSET', gen, field, type(value) == 'number' and field ~= 'weight' and number(value) or value)
    end
  end
  redis.call('PEXPIRE', gen, number(ttl))
  redis.call('HSET', spec, 'body', body)
  redis.call('HINCRBY', spec, 'left', 1)
  redis.call('PEXPIRE', spec, number(ttl))
  if g.quota ~= '' then
    redis.call('ZADD', P .. 'using:' .. g.quota, number(limit_of(g)), request_of(id))
    keep(P .. 'using:' .. g.quota)
  end
  return g
end

-- One item of a restore call: nil when it is the worker's again, else the refusal. Only a claim
-- that Redis has forgotten is put back, never over a later one; and only where the log, as far as it
-- goes, is that worker's own. What comes behind is published as ever.
local function put_back(P, worker, now, item, body, head)
  local id, fence, at, chain, version = unpack(item)
  local g = load(P, id)
  if not g then
    if at > 0 or head == '' or body == '' then return { id, 'unknown', 0, '' } end
    g = make_again(P, id, head, body, now)
  elseif g.st == 'R' and g.fence == fence then
    return nil   -- the answer to this very call was lost
  elseif g.st == 'T' or g.epoch >= epoch_of(fence) or g.next ~= at or g.chain ~= chain then
    return { id, g.st == 'T' and 'gone' or 'lost', g.next, g.chain }
  elseif g.st == 'Q' then
    dequeue(P, id, g)
  else
    redis.call('ZREM', P .. 'held:' .. g.own, id)
  end
  hand_to(P, id, g, worker, 0, fence, version, now)
  local look_at = limit_of(g)
  if is_unread(g) then look_at = math.min(look_at, now + GATEWAY_LEASE_MS + g.grace) end
  redis.call('ZADD', P .. 'due', number(look_at), id)
  keep(P .. 'due')
  return nil
end

-- ARGV: [worker, [[id, fence, position, chain, version]…]], then body and head of each
local function restore(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local a = cmsgpack.unpack(args[1])
  local refusals = {}
  for i, item in ipairs(a[2]) do
    local refusal = put_back(P, a[1], now, item, args[2 * i], args[2 * i + 1])
    if refusal then refusals[#refusals + 1] = refusal end
  end
  if #refusals < #a[2] then ensure_lease(P, a[1], now) end
  return refusals
end

-- ARGV: [worker, [[id, fence]…]]
local function release(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local released = 0
  for _, item in ipairs(cmsgpack.unpack(args[1])[2]) do
    local g = load(P, item[1])
    if g and g.st == 'R' and g.fence == item[2] then
      hand_back(P, item[1], g, now)
      released = released + 1
    end
  end
  return released
end

-- An end without anything before it: nobody reads it, and nothing makes it live.
local function entomb(P, id, tenant, ttl, why)
  local gen = P .. 'gen:' .. id
  redis.call('HSET', gen, 'v', PROTOCOL, 'st', 'T', 'tenant', tenant, 'next', 0, 'chain', '', 'subs', '', 'out', '',
    'fence', '', 'end', why)
  redis.call('PEXPIRE', gen, ttl)
end

-- ARGV: [id, tenant]
local function cancel(keys, args)
  local P, now, outbox = prefix_of(keys), now_ms(), {}
  local a = cmsgpack.unpack(args[1])
  local id, tenant = a[1], a[2]
  local g = load(P, id)
  if not g then   -- an admit that is still in the network must find this and not revive it
    entomb(P, id, tenant, TOMBSTONE_MS, 'cancelled')
    return { 'unknown', '' }
  end
  if g.tenant ~= tenant or g['end'] == 'forgotten' then return { 'unknown', '' } end
  if g.st == 'T' then return { 'ended', g['end'] or '' } end
  close(P, id, g, now, outbox, 'cancelled', '')
  deliver(P, outbox)
  return { 'cancelled', '' }
end

-- Ends a generation and removes all there is of it at once, its document too: nobody can ask for it again.
-- ARGV: [id, tenant, for good: its id is not used again]
local function forget(keys, args)
  local P, now, outbox = prefix_of(keys), now_ms(), {}
  local a = cmsgpack.unpack(args[1])
  local id = a[1]
  local g, letter = load(P, id), P .. 'dead:' .. id
  local has_letter = redis.call('HGET', letter, 'tenant') == a[2]
  if has_letter then
    local entry = redis.call('HGET', letter, 'entry')
    if entry then redis.call('XDEL', P .. 'dead', entry) end
    redis.call('UNLINK', letter)
  end
  if not g or g.tenant ~= a[2] or g['end'] == 'forgotten' then return { has_letter and 'forgotten' or 'unknown', '' } end
  if g.st ~= 'T' then
    close(P, id, g, now, outbox, 'cancelled', '')
    deliver(P, outbox)
  end
  settle_key(P, id, g, 'cancelled', '', true)   -- nothing is left to be answered with
  redis.call('UNLINK', P .. 'gen:' .. id, P .. 'log:' .. id, P .. 'doc:' .. request_of(id))
  if a[3] then entomb(P, id, g.tenant, FORGOTTEN_MS, 'forgotten') end   -- or its worker would put it back
  return { 'forgotten', '' }
end

-- Reading ---------------------------------------------------------------------------------------

-- Log entries that end at or behind the cursor: the first tells the chain at the cursor.
local function page(P, id, cursor)
  local from = cursor == 0 and '0-1' or (number(cursor) .. '-0')
  local entries, bytes = {}, 0
  for _, entry in ipairs(redis.call('XRANGE', P .. 'log:' .. id, from, '+', 'COUNT', PAGE_ENTRIES)) do
    local fields = entry[2]
    bytes = bytes + #fields[2]
    if bytes > PAGE_BYTES and #entries > 1 then break end   -- the first may end at the cursor
    entries[#entries + 1] = { fields[2], fields[4] or '' }
  end
  return entries
end

-- A log that expired, or was removed, while its generation says that it showed tokens.
local function is_log_gone(P, id, g) return g.next > 0 and redis.call('EXISTS', P .. 'log:' .. id) == 0 end

-- ARGV: [gateway, id, tenant, cursor]
local function attach(keys, args)
  local P = prefix_of(keys)
  local a = cmsgpack.unpack(args[1])
  local gateway, id = a[1], a[2]
  local g = load(P, id)
  if not g or g.tenant ~= a[3] or g.out == '' or is_log_gone(P, id, g) then return false end
  if g.st ~= 'T' then
    if not has(g.subs, gateway) then
      g.subs = g.subs == '' and gateway or (g.subs .. ' ' .. gateway)
      redis.call('HSET', P .. 'gen:' .. id, 'subs', g.subs)
    end
    redis.call('SADD', P .. 'subs:' .. gateway, id)
    keep(P .. 'subs:' .. gateway)
    ensure_reader(P, gateway, now_ms())
    redis.call('ZADD', P .. 'due', number(limit_of(g)), id)   -- ends a grace time
    keep(P .. 'due')
  end
  return { g.st, g.next, g.chain, g.ver, g.out, g.mode == 'attached' and 1 or 0, g.retention, page(P, id, a[4]) }
end

-- ARGV: [gateway, id]
local function detach(keys, args)
  local P, now, outbox = prefix_of(keys), now_ms(), {}
  local a = cmsgpack.unpack(args[1])
  local g = load(P, a[2])
  if g and has(g.subs, a[1]) then
    unsubscribe(P, a[2], g, a[1], now, outbox)
    deliver(P, outbox)
  else
    redis.call('SREM', P .. 'subs:' .. a[1], a[2])
  end
  return 'OK'
end

-- ARGV: [id, cursor]
local function read(keys, args)
  local P = prefix_of(keys)
  local a = cmsgpack.unpack(args[1])
  local g = load(P, a[1])
  if not g or is_log_gone(P, a[1], g) then return false end
  return { g.st, g.next, g.chain, page(P, a[1], a[2]) }
end

-- What waits in the lanes before this one, and in it: counts and tokens.
local function queue_of(P, lane)
  local found = { count_before = 0, tokens_before = 0 }
  for rank = 0, RANK[lane] do
    local name = LANES[rank + 1]
    found.count = redis.call('ZCARD', P .. 'lane:' .. name)
    found.tokens = tonumber(redis.call('HGET', P .. 'backlog', name .. '.tokens')) or 0
    if name ~= lane then
      found.count_before = found.count_before + found.count
      found.tokens_before = found.tokens_before + found.tokens
    end
  end
  return found
end

-- How many wait ahead of a place in a queue, and for how many ms (-1: no rate is known). Within a
-- lane the tokens count as evenly spread: the costs of all ahead are too many to be added up.
local function ahead_of(queue, is_lane, place, rate)
  local tokens = queue.tokens_before
  if is_lane then tokens = tokens + queue.tokens * place / math.max(1, queue.count) end
  if tokens == 0 then return queue.count_before + place, 0 end
  return queue.count_before + place, rate > 0 and math.floor(tokens * 1000 / rate) or -1
end

-- ARGV: [gateway, [id…]]
local function look(keys, args)
  local P = prefix_of(keys)
  local a = cmsgpack.unpack(args[1])
  local answers, queues, rate = {}, {}, nil
  for i, id in ipairs(a[2]) do
    local h = redis.call('HMGET', P .. 'gen:' .. id, 'st', 'next', 'subs', 'q', 'lane')
    local place = h[1] == 'Q' and redis.call('ZRANK', P .. h[4], id)
    local ahead, wait = -1, -1
    if place then
      rate = rate or drain_rate(P)
      queues[h[5]] = queues[h[5]] or queue_of(P, h[5])
      ahead, wait = ahead_of(queues[h[5]], h[4] == 'lane:' .. h[5], place, rate)
    end
    answers[i] = { h[1] or '', tonumber(h[2]) or 0, has(h[3], a[1]) and 1 or 0, ahead, wait }
  end
  return answers
end

-- What stream tokens are signed with: drawn once, and kept while any is asked for. False for a
-- generation that this tenant does not have.
-- ARGV: [candidate, id or empty, tenant]
local function stream_secret(keys, args)
  local P = prefix_of(keys)
  local a = cmsgpack.unpack(args[1])
  if a[2] ~= '' then
    local g = redis.call('HMGET', P .. 'gen:' .. a[2], 'tenant', 'out')
    if g[1] ~= a[3] or g[2] == '' then return false end
  end
  redis.call('SET', P .. 'secret', a[1], 'NX', 'PX', DAY_MS)
  keep(P .. 'secret')
  return redis.call('GET', P .. 'secret')
end

-- ARGV: [request]
local function spec(keys, args)
  return redis.call('HGET', prefix_of(keys) .. 'spec:' .. cmsgpack.unpack(args[1])[1], 'body')
end

-- Leases ----------------------------------------------------------------------------------------

-- Answers what was handed back, and who asked this worker to rest.
-- ARGV: [worker, lease, seen, version, max cost, rate, [id…]], presence
local function beat_worker(keys, args)
  local P, now = prefix_of(keys), now_ms()
  guard(P, now)
  local a = cmsgpack.unpack(args[1])
  local worker, presence, held = a[1], P .. 'worker:' .. a[1], P .. 'held:' .. a[1]
  redis.call('ZADD', P .. 'leases', number(now + a[2]), worker)
  redis.call('ZADD', P .. 'versions', number(now), a[4])
  redis.call('HSET', presence, 'max_cost', number(a[5]), 'rate', string.format('%.3f', a[6]), 'blob', args[2], 'beat', number(now))
  redis.call('PEXPIRE', presence, PRESENCE_MS)
  redis.call('ZREM', P .. 'loading', worker)
  keep(P .. 'leases')
  keep(P .. 'versions')
  local holding, back = {}, {}
  for _, id in ipairs(a[7]) do holding[id] = true end
  for _, id in ipairs(redis.call('ZRANGE', held, '-inf', number(a[3]), 'BYSCORE', 'LIMIT', 0, MAX_LEASES)) do
    if not holding[id] then
      local g = load(P, id)
      if g and g.st == 'R' and g.own == worker then
        hand_back(P, id, g, now)
        back[#back + 1] = id
      else
        redis.call('ZREM', held, id)
      end
    end
  end
  local asked_by = redis.call('GET', P .. 'drain:' .. worker)
  if asked_by then keep(P .. 'drain:' .. worker) end
  return { back, asked_by or '' }
end

-- A worker that has no model yet, and so no lease: nothing may be queued for it.
-- ARGV: [worker], presence
local function announce_worker(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local worker = cmsgpack.unpack(args[1])[1]
  redis.call('ZADD', P .. 'loading', number(now + PRESENCE_MS), worker)
  keep(P .. 'loading')
  redis.call('HSET', P .. 'worker:' .. worker, 'blob', args[2], 'beat', number(now))
  redis.call('PEXPIRE', P .. 'worker:' .. worker, PRESENCE_MS)
  return 'OK'
end

-- Asks a worker to rest, or no longer to; it hears of it with its next beat. False: no such worker.
-- ARGV: [worker, who asks, or empty]
local function drain_worker(keys, args)
  local P = prefix_of(keys)
  local a = cmsgpack.unpack(args[1])
  if not redis.call('ZSCORE', P .. 'leases', a[1]) then return false end
  if a[2] == '' then
    redis.call('DEL', P .. 'drain:' .. a[1])
  else
    redis.call('SET', P .. 'drain:' .. a[1], a[2], 'PX', DAY_MS)
  end
  return 'OK'
end

-- ARGV: [worker, somebody saw it die, for which nothing that it held is to blame]
local function leave_worker(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local worker, has_died = unpack(cmsgpack.unpack(args[1]))
  if has_died then note_lost(P, 'worker', worker, 'seen', redis.call('HGET', P .. 'worker:' .. worker, 'blob')) end
  for _, id in ipairs(redis.call('ZRANGE', P .. 'held:' .. worker, 0, MAX_LEASES - 1)) do
    local g = load(P, id)
    if g and g.st == 'R' and g.own == worker then hand_back(P, id, g, now) end
  end
  redis.call('DEL', P .. 'held:' .. worker, P .. 'worker:' .. worker, P .. 'drain:' .. worker)
  redis.call('ZREM', P .. 'leases', worker)
  redis.call('ZREM', P .. 'loading', worker)
  return 'OK'
end

-- ARGV: [worker]
local function bury(keys, args)
  local P = prefix_of(keys)
  return redis.call('ZADD', P .. 'leases', 'XX', 'CH', 0, cmsgpack.unpack(args[1])[1])
end

-- ARGV: [gateway, lease, [[id, prolong ms]…]], presence or empty
local function beat_gateway(keys, args)
  local P, now = prefix_of(keys), now_ms()
  guard(P, now)
  local a = cmsgpack.unpack(args[1])
  local gateway, inbox = a[1], P .. 'inbox:' .. a[1]
  local known = redis.call('ZSCORE', P .. 'gateways', gateway)
  redis.call('ZADD', P .. 'gateways', number(now + a[2]), gateway)
  keep(P .. 'gateways')
  local recreated, last = false, ''
  if redis.call('EXISTS', inbox) == 0 then
    recreated, last = true, redis.call('XADD', inbox, '*', 'r', '\144')
  elseif not known then
    local tail = redis.call('XREVRANGE', inbox, '+', '-', 'COUNT', 1)
    recreated, last = true, tail[1] and tail[1][1] or '0-0'
  end
  redis.call('PEXPIRE', inbox, 30000)
  if args[2] ~= '' then redis.call('SET', P .. 'gateway:' .. gateway, args[2], 'PX', PRESENCE_MS) end
  for _, item in ipairs(a[3]) do
    redis.call('PEXPIRE', P .. 'log:' .. item[1], item[2], 'GT')
    redis.call('PEXPIRE', P .. 'gen:' .. item[1], item[2], 'GT')
  end
  return { recreated and 1 or 0, last }
end

-- Detaches up to `limit` streams of a gateway; true when none is left.
local function abandon(P, gateway, now, outbox, limit, moved)
  local subs = P .. 'subs:' .. gateway
  for _, id in ipairs(redis.call('SPOP', subs, limit)) do
    local g = load(P, id)
    if g and has(g.subs, gateway) then
      unsubscribe(P, id, g, gateway, now, outbox)
      moved[#moved + 1] = { id, g.st == 'T' and 'closed' or 'detached', gateway, '' }
    end
  end
  return redis.call('EXISTS', subs) == 0
end

-- ARGV: [gateway]
local function leave_gateway(keys, args)
  local P, now, outbox = prefix_of(keys), now_ms(), {}
  local gateway = cmsgpack.unpack(args[1])[1]
  redis.call('DEL', P .. 'inbox:' .. gateway, P .. 'gateway:' .. gateway)
  if abandon(P, gateway, now, outbox, MAX_LEASES, {}) then redis.call('ZREM', P .. 'gateways', gateway) end
  deliver(P, outbox)
  return 'OK'
end

local function reap_gateways(P, now, outbox, moved)
  for _, gateway in ipairs(redis.call('ZRANGE', P .. 'gateways', '-inf', number(now), 'BYSCORE', 'LIMIT', 0, 4)) do
    if abandon(P, gateway, now, outbox, MAX_MOVES / 4, moved) then
      redis.call('ZREM', P .. 'gateways', gateway)
      note_lost(P, 'gateway', gateway, 'lease', redis.call('GET', P .. 'gateway:' .. gateway))
    end
  end
end

-- Ends what has killed too many. What it takes to ask it anew is kept for a day.
local function quarantine(P, id, g, worker, now, outbox)
  local entry = redis.call('XADD', P .. 'dead', 'MAXLEN', '~', 10000, '*', 'id', id, 'tenant', g.tenant, 'lane', g.lane,
    'worker', worker, 'deaths', number(g.deaths), 'next', number(g.next), 'version', g.ver)
  redis.call('PEXPIRE', P .. 'dead', 7 * DAY_MS)
  local letter = P .. 'dead:' .. id
  redis.call('HSET', letter, 'entry', entry, 'tenant', g.tenant, 'lane', g.lane, 'weight', g.weight, 'cost', number(g.cost),
    'died_on', g.died_on or worker, 'deaths', number(g.deaths), 'next', number(g.next), 'version', g.ver, 't0', number(g.t0),
    't1', number(g.t1), 't2', number(g.t2), 't3', number(now), 'queue_limit', number(g.deadline - g.t0),
    'run_limit', number(g.run_limit), 'retention', number(g.retention), 'out', g.out,
    'body', redis.call('HGET', P .. 'spec:' .. request_of(id), 'body') or '',
    'doc', redis.call('GET', P .. 'doc:' .. request_of(id)) or '')
  keep(letter)
  close(P, id, g, now, outbox, 'failed', 'POISON_REQUEST')
end

-- Counts a death of the generation's worker; true when it must not kill another one. All that a worker
-- held is under suspicion when it stood there before at the last death, too; but innocents die with
-- their neighbours, so only who runs on probation can be found guilty.
local function count_death(P, id, g, worker, now)
  local has_come_on = g.deaths > 0 and g.next >= g.died_at + PROGRESS_TOKENS
  local failed = has_come_on and 0 or (tonumber(g.probation_deaths) or 0) + (is_on_probation(g) and 1 or 0)
  g.deaths = g.deaths + 1
  g.fruitless = has_come_on and 1 or g.fruitless + 1
  g.died_on = g.died_on and (g.died_on .. ' ' .. worker) or worker
  g.died_at = g.next
  redis.call('HSET', P .. 'gen:' .. id, 'deaths', number(g.deaths), 'died_at', number(g.next), 'died_ms', number(now),
    'fruitless', number(g.fruitless), 'probation_deaths', number(failed), 'died_on', g.died_on)
  return failed >= POISON_DEATHS or g.deaths >= MAX_DEATHS
end

local function reap_workers(P, now, outbox, moved)
  redis.call('ZREMRANGEBYSCORE', P .. 'loading', '-inf', number(now))
  for _, worker in ipairs(redis.call('ZRANGE', P .. 'leases', '-inf', number(now), 'BYSCORE', 'LIMIT', 0, 4)) do
    local held = P .. 'held:' .. worker
    for _, id in ipairs(redis.call('ZRANGE', held, 0, MAX_MOVES / 4 - 1)) do
      local g = load(P, id)
      if g and g.st == 'R' and g.own == worker then
        if count_death(P, id, g, worker, now) then
          quarantine(P, id, g, worker, now, outbox)
          moved[#moved + 1] = { id, 'closed', worker, 'POISON_REQUEST' }
        else
          hand_back(P, id, g, now)
          moved[#moved + 1] = { id, 'requeued', worker, '' }
        end
      else
        redis.call('ZREM', held, id)
      end
    end
    if redis.call('EXISTS', held) == 0 then
      local is_seen = redis.call('ZSCORE', P .. 'leases', worker) == '0'   -- buried
      note_lost(P, 'worker', worker, is_seen and 'seen' or 'lease', redis.call('HGET', P .. 'worker:' .. worker, 'blob'))
      redis.call('ZREM', P .. 'leases', worker)
      redis.call('DEL', P .. 'worker:' .. worker)
    end
  end
end

local function reap_due(P, now, outbox, moved)
  for _, id in ipairs(redis.call('ZRANGE', P .. 'due', '-inf', number(now), 'BYSCORE', 'LIMIT', 0, MAX_MOVES)) do
    local g = load(P, id)
    if not g or g.st == 'T' then
      redis.call('ZREM', P .. 'due', id)
    elseif is_unread(g) then
      close(P, id, g, now, outbox, 'cancelled', '')
      moved[#moved + 1] = { id, 'closed', 'unread', '' }
    elseif now >= limit_of(g) then
      local code = g.t1 == 0 and 'QUEUE_TIMEOUT' or 'GENERATION_TIMEOUT'
      close(P, id, g, now, outbox, 'failed', code)
      moved[#moved + 1] = { id, 'closed', 'due', code }
    else
      redis.call('ZADD', P .. 'due', number(limit_of(g)), id)
    end
  end
end

local function reap_versions(P, now, outbox, moved)
  for _, version in ipairs(redis.call('ZRANGE', P .. 'versions', '-inf', number(now - VERSION_SILENCE_MS), 'BYSCORE', 'LIMIT', 0, 4)) do
    local queue = P .. 'again:' .. version
    for _, id in ipairs(redis.call('ZRANGE', queue, 0, MAX_MOVES / 4 - 1)) do
      local g = load(P, id)
      if g and g.st == 'Q' then
        close(P, id, g, now, outbox, 'failed', 'MODEL_VERSION_GONE')
        moved[#moved + 1] = { id, 'closed', version, 'MODEL_VERSION_GONE' }
      else
        redis.call('ZREM', queue, id)
      end
    end
    if redis.call('EXISTS', queue) == 0 then redis.call('ZREM', P .. 'versions', version) end
  end
end

-- A tenant whose finish tag its lane has passed starts where a newcomer starts: its tag can go.
local function forget_idle_tenants(P)
  local key = P .. 'tenants'
  local scan = redis.call('HSCAN', key, redis.call('HGET', P .. 'clock', 'scan') or '0', 'COUNT', MAX_MOVES)
  redis.call('HSET', P .. 'clock', 'scan', scan[1])
  for i = 1, math.min(#scan[2], 8 * MAX_MOVES), 2 do
    local lane = string.match(scan[2][i], '^t%.(%a+)%.')
    local passed = lane and tonumber(redis.call('HGET', key, 'v.' .. lane))
    if passed and tonumber(scan[2][i + 1]) <= passed then redis.call('HDEL', key, scan[2][i]) end
  end
end

local function is_empty(P, lane)
  if redis.call('EXISTS', P .. 'lane:' .. lane) == 1 then return false end
  local from, to = number(RANK[lane] * RANK_WIDTH), '(' .. number((RANK[lane] + 1) * RANK_WIDTH)
  if redis.call('ZCOUNT', P .. 'again:any', from, to) > 0 then return false end
  for _, version in ipairs(redis.call('ZRANGE', P .. 'versions', 0, MAX_CANDIDATES - 1)) do
    if redis.call('ZCOUNT', P .. 'again:' .. version, from, to) > 0 then return false end
  end
  return true
end

-- What expired while no process was alive left its queue without being counted out: an empty lane
-- weighs nothing, or the pool would refuse for ever what it has room for.
local function forget_expired_backlog(P)
  local key = P .. 'backlog'
  for _, lane in ipairs(LANES) do
    local tokens = redis.call('HGET', key, lane .. '.tokens')
    if tokens and tokens ~= '0' and is_empty(P, lane) then redis.call('HDEL', key, lane .. '.tokens', lane .. '.bytes') end
  end
end

local function reap(keys)
  local P, now, outbox, moved = prefix_of(keys), now_ms(), {}, {}
  guard(P, now)
  reap_gateways(P, now, outbox, moved)
  reap_workers(P, now, outbox, moved)
  reap_due(P, now, outbox, moved)
  reap_versions(P, now, outbox, moved)
  forget_idle_tenants(P)
  forget_expired_backlog(P)
  deliver(P, outbox)
  return moved
end

-- One look at the whole partition, for people and for /ready.
local function state(keys)
  local P, now = prefix_of(keys), now_ms()
  local workers, gateways, lanes, oldest, again = {}, {}, {}, now, 0
  local leases = redis.call('ZRANGE', P .. 'leases', 0, MAX_LEASES - 1, 'WITHSCORES')
  for i = 1, #leases, 2 do
    workers[#workers + 1] = { leases[i], tonumber(leases[i + 1]) - now,
      redis.call('HGET', P .. 'worker:' .. leases[i], 'blob') or '', redis.call('ZRANGE', P .. 'held:' .. leases[i], 0, MAX_LEASES - 1) }
  end
  local living = redis.call('ZRANGE', P .. 'gateways', 0, MAX_LEASES - 1, 'WITHSCORES')
  for i = 1, #living, 2 do
    gateways[#gateways + 1] = { living[i], tonumber(living[i + 1]) - now, redis.call('SCARD', P .. 'subs:' .. living[i]) }
  end
  for i, lane in ipairs(LANES) do
    local head = redis.call('ZRANGE', P .. 'lane:' .. lane, 0, 0)[1]
    local since = head and tonumber(redis.call('HGET', P .. 'gen:' .. head, 't0'))
    if since then oldest = math.min(oldest, since) end
    lanes[i] = { redis.call('ZCARD', P .. 'lane:' .. lane), tonumber(redis.call('HGET', P .. 'backlog', lane .. '.tokens')) or 0 }
  end
  again = redis.call('ZCARD', P .. 'again:any')
  for _, version in ipairs(redis.call('ZRANGE', P .. 'versions', 0, MAX_CANDIDATES - 1)) do
    again = again + redis.call('ZCARD', P .. 'again:' .. version)
  end
  return { workers, gateways, lanes, again, now - oldest, redis.call('HGET', P .. 'backlog', 'rate') or '0' }
end

-- How many wait in a lane, with those handed back to it; their tokens; and for how long the oldest
-- of the next few has waited, since a lane is in the order of fairness, not of time.
local function lane_of(P, now, rank, versions)
  local lane = LANES[rank]
  local depth, again, oldest = redis.call('ZCARD', P .. 'lane:' .. lane), 0, now
  for _, id in ipairs(redis.call('ZRANGE', P .. 'lane:' .. lane, 0, MAX_LOOKAHEAD - 1)) do
    oldest = math.min(oldest, tonumber(redis.call('HGET', P .. 'gen:' .. id, 't0')) or now)
  end
  local from, to = number((rank - 1) * RANK_WIDTH), '(' .. number(rank * RANK_WIDTH)
  for _, version in ipairs(versions) do
    local queue = P .. 'again:' .. version
    again = again + redis.call('ZCOUNT', queue, from, to)
    for _, since in ipairs({ 0, SUSPECTS_FROM }) do
      local start = (rank - 1) * RANK_WIDTH + since
      local first = redis.call('ZRANGE', queue, number(start), to, 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')
      if first[2] then oldest = math.min(oldest, (tonumber(first[2]) - start) % SUSPECTS_FROM) end
    end
  end
  local tokens = tonumber(redis.call('HGET', P .. 'backlog', lane .. '.tokens')) or 0
  return { depth + again, tokens, now - oldest, wait_ms(P, lane), again }
end

-- What a picture of the pool is made of, once a second: counts, and no id of what is held.
local function census(keys)
  local P, now = prefix_of(keys), now_ms()
  local workers, gateways, lanes, lost = {}, {}, {}, {}
  for _, key in ipairs({ 'leases', 'loading' }) do
    local found = redis.call('ZRANGE', P .. key, 0, MAX_LEASES - 1, 'WITHSCORES')
    for i = 1, #found, 2 do
      local told = redis.call('HMGET', P .. 'worker:' .. found[i], 'blob', 'beat', 'probation')
      workers[#workers + 1] = { found[i], tonumber(found[i + 1]) - now, told[2] and now - tonumber(told[2]) or -1,
        redis.call('ZCARD', P .. 'held:' .. found[i]), redis.call('GET', P .. 'drain:' .. found[i]) or '', told[1] or '', told[3] or '' }
    end
  end
  local found = redis.call('ZRANGE', P .. 'gateways', 0, MAX_LEASES - 1, 'WITHSCORES')
  for i = 1, #found, 2 do
    gateways[#gateways + 1] = { found[i], tonumber(found[i + 1]) - now, redis.call('SCARD', P .. 'subs:' .. found[i]),
      redis.call('GET', P .. 'gateway:' .. found[i]) or '' }
  end
  local versions = redis.call('ZRANGE', P .. 'versions', 0, MAX_CANDIDATES - 1)
  versions[#versions + 1] = 'any'
  for rank = 1, #LANES do lanes[rank] = lane_of(P, now, rank, versions) end
  for _, entry in ipairs(redis.call('XREVRANGE', P .. 'lost', '+', number(now - LOST_SHOWN_MS), 'COUNT', MAX_LOST)) do
    lost[#lost + 1] = { entry[1], entry[2] }
  end
  return { now, workers, gateways, lanes, redis.call('XLEN', P .. 'dead'), lost,
    redis.call('HGET', P .. 'backlog', 'rate') or '0' }
end

-- Generations that run, some of each worker, then those that wait; no more than the limit.
-- ARGV: [limit]
local function live(keys, args)
  local P, now = prefix_of(keys), now_ms()
  local limit, found = cmsgpack.unpack(args[1])[1], {}
  local function list(ids, worker)
    for _, id in ipairs(ids) do
      if #found >= limit then return end
      local g = redis.call('HMGET', P .. 'gen:' .. id, 'lane', 't0', 't1', 'next', 'cost', 'room', 'deaths')
      if g[1] then
        local since = function(ms) return tonumber(ms) > 0 and now - tonumber(ms) or -1 end
        found[#found + 1] = { id, worker, g[1], since(g[2]), since(g[3]), tonumber(g[4]), tonumber(g[5]) - tonumber(g[6]), tonumber(g[7]) }
      end
    end
  end
  local workers = redis.call('ZRANGE', P .. 'leases', 0, MAX_LEASES - 1)
  local share = math.max(1, math.floor(limit / math.max(1, #workers)))
  for _, worker in ipairs(workers) do list(redis.call('ZRANGE', P .. 'held:' .. worker, 0, share - 1), worker) end
  for _, worker in ipairs(workers) do
    if #found < limit then list(redis.call('ZRANGE', P .. 'held:' .. worker, share, share + limit - #found - 1), worker) end
  end
  for _, lane in ipairs(LANES) do
    if #found < limit then list(redis.call('ZRANGE', P .. 'lane:' .. lane, 0, limit - #found - 1), '') end
  end
  return found
end

-- Dead letters ----------------------------------------------------------------------------------

-- All of a quarantined generation, and the id under which it is asked anew, which is drawn once.
-- ARGV: [id, new request]
local function take_letter(keys, args)
  local a = cmsgpack.unpack(args[1])
  local letter = prefix_of(keys) .. 'dead:' .. a[1]
  if redis.call('EXISTS', letter) == 0 then return false end
  redis.call('HSETNX', letter, 'again', a[2])
  return redis.call('HGETALL', letter)
end

-- It was asked anew, or is not to be: its prompt goes. Who asks once more is told where it went.
-- ARGV: [id, stream entry, was asked anew]
local function drop_letter(keys, args)
  local P, a = prefix_of(keys), cmsgpack.unpack(args[1])
  local letter = P .. 'dead:' .. a[1]
  local entry = redis.call('HGET', letter, 'entry') or a[2]
  local removed = entry ~= '' and redis.call('XDEL', P .. 'dead', entry) or 0
  if a[3] then
    redis.call('HDEL', letter, 'body', 'doc', 'entry')
  else
    removed = removed + redis.call('DEL', letter)
  end
  return removed
end

local function register(name, callback, flags)
  redis.register_function({ function_name = '@library@_' .. name, callback = callback, flags = flags })
end

-- Over the memory limit Redis refuses admit, claim and attach whole, while running streams go on.
register('admit', admit, {})
register('claim', claim, {})
register('attach', attach, {})
register('publish', publish, { 'allow-oom' })
register('restore', restore, { 'allow-oom' })
register('release', release, { 'allow-oom' })
register('cancel', cancel, { 'allow-oom' })
register('forget', forget, { 'allow-oom' })
register('detach', detach, { 'allow-oom' })
register('beat_worker', beat_worker, { 'allow-oom' })
register('beat_gateway', beat_gateway, { 'allow-oom' })
register('leave_worker', leave_worker, { 'allow-oom' })
register('bury', bury, { 'allow-oom' })
register('announce_worker', announce_worker, { 'allow-oom' })
register('drain_worker', drain_worker, { 'allow-oom' })
register('take_letter', take_letter, { 'allow-oom' })
register('drop_letter', drop_letter, { 'allow-oom' })
register('leave_gateway', leave_gateway, { 'allow-oom' })
register('stream_secret', stream_secret, { 'allow-oom' })
register('reap', reap, { 'allow-oom' })
register('read', read, { 'no-writes' })
register('look', look, { 'no-writes' })
register('foresee', foresee, { 'no-writes' })
register('spec', spec, { 'no-writes' })
register('state', state, { 'no-writes' })
register('census', census, { 'no-writes' })
register('live', live, { 'no-writes' })
