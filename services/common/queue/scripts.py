"""What must happen all or nothing: Lua scripts, run by the queue server."""

from __future__ import annotations

from services.common.contract.jobs import JobState

ENDED = frozenset(state.value for state in JobState if state.ended)
ENDED_LUA = "{" + ", ".join(f"{state} = true" for state in sorted(ENDED)) + "}"

# KEYS stream; ARGV capacity, body -> 1, or 0 if there is no room
PUT = """
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('XADD', KEYS[1], '*', 'data', ARGV[2])
return 1
"""

# KEYS prompts, job; ARGV capacity, body, round, cursor field, expected position -> fed | full | moved | closed
FEED = """
local job = redis.call('HMGET', KEYS[2], 'state', 'round', ARGV[4])
if job[1] ~= 'generating' or job[2] ~= ARGV[3] then return 'closed' end
if (job[3] or '0') ~= ARGV[5] then return 'moved' end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 'full' end
redis.call('XADD', KEYS[1], '*', 'data', ARGV[2])
redis.call('HINCRBY', KEYS[2], ARGV[4], 1)
return 'fed'
"""

# KEYS stream, job, targets…; ARGV group, consumer, entry, capacity and body of each target…, field and increment of each count…
# -> done | lost (the claim is another's now) | dropped (the job has ended) | full
HAND_OVER = f"""
local group, consumer, entry = ARGV[1], ARGV[2], ARGV[3]
if #redis.call('XPENDING', KEYS[1], group, entry, entry, 1, consumer) == 0 then return 'lost' end
local ended = {ENDED_LUA}
local dropped = ended[redis.call('HGET', KEYS[2], 'state')]
if not dropped then
  for i = 3, #KEYS do
    if redis.call('XLEN', KEYS[i]) >= tonumber(ARGV[2 * i - 2]) then return 'full' end
  end
  for i = 3, #KEYS do redis.call('XADD', KEYS[i], '*', 'data', ARGV[2 * i - 1]) end
  for i = 2 * #KEYS, #ARGV, 2 do redis.call('HINCRBY', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
redis.call('XACK', KEYS[1], group, entry)
redis.call('XDEL', KEYS[1], entry)
return dropped and 'dropped' or 'done'
"""

# Takes over what nobody holds: one message that was tried before, alone, or else up to so many that were only handed back.
# KEYS stream; ARGV group, consumer, visibility in ms, how many -> [[entry, fields, tries], …]
TAKE_OVER = """
local group, consumer, idle = ARGV[1], ARGV[2], ARGV[3]
local taken = {}
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], group, 'IDLE', idle, '-', '+', ARGV[4])) do
  local entry, tried = pending[1], pending[4]
  if tried > 0 and #taken > 0 then break end
  for _, claimed in ipairs(redis.call('XCLAIM', KEYS[1], group, consumer, idle, entry)) do
    table.insert(taken, {claimed[1], claimed[2], tried + 1})
  end
  if tried > 0 then break end
end
return taken
"""

# Sets how long messages have been left alone, if they are still the consumer's: 0 holds them, the visibility gives them back.
# KEYS stream; ARGV group, consumer, ms, tries ('' leaves them), entries… -> entries that are another's now
HOLD = """
local lost = {}
for i = 5, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) == 0 then
    table.insert(lost, ARGV[i])
  elseif ARGV[4] == '' then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'JUSTID')
  else
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'RETRYCOUNT', ARGV[4], 'JUSTID')
  end
end
return lost
"""

# Deleting a consumer forgets what it holds, so only one that holds nothing goes. KEYS stream; ARGV group, consumer
LEAVE = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
"""

# KEYS stream, dead; ARGV capacity, entry, body -> 1, or 0 if another was faster or there is no room
REQUEUE = """
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) or redis.call('XDEL', KEYS[2], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[1], '*', 'data', ARGV[3])
return 1
"""

# KEYS stream; ARGV group, entry
DISCARD = """
redis.pcall('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
"""
