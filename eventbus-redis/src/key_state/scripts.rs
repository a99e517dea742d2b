//! What the server does with held keys, each in one step.

/// What a script begins with that a server lets run when its memory is full: all but what holds more.
pub(super) const IN_NEED: &str = "#!lua flags=allow-oom\n";

/// What all scripts have in front: whose place it is, and where a name is noted that is tried some time.
pub(super) const COMMON: &str = "
    local fences, base = KEYS[1], KEYS[2]
    local names, due, decided = base .. ':names', base .. ':due', base .. ':decided'
    local place, fence = ARGV[1], ARGV[2]
    local function is_mine() return redis.call('HGET', fences, place) == fence end
    local function about(name) return base .. ':n:' .. name end
    local function messages(name) return base .. ':m:' .. name end
    local function note(name)
        local state = redis.call('HMGET', about(name), 'action', 'at', 'until')
        redis.call('ZREM', due, name)
        redis.call('ZREM', decided, name)
        if state[1] then
            redis.call('ZADD', decided, state[2], name)
        elseif state[3] ~= '' then
            redis.call('ZADD', due, state[3], name)
        end
    end
    local function waits(name, from)
        redis.call('HSET', about(name), 'until', ARGV[from], 'attempts', ARGV[from + 1],
            'first_failed', ARGV[from + 2], 'cause', ARGV[from + 3], 'error', ARGV[from + 4])
    end
    local function forget_decision(name)
        redis.call('HDEL', about(name), 'action', 'by', 'because', 'at')
    end
    local function told(name)
        return redis.call('HMGET', about(name), 'until', 'attempts', 'first_failed', 'cause',
            'error', 'action', 'by', 'because', 'at', 'since')
    end
";

/// The fence is above all that a server gave which lost this key.
pub(super) const CLAIM: &str = "
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local later = math.max(tonumber(redis.call('HGET', fences, place) or '0') + 1, now)
    redis.call('HSET', fences, place, string.format('%.0f', later))
    return {later, redis.call('ZRANGE', names, 0, -1)}
";

/// Given: most names; for each message its name, position, wait (5) and itself.
pub(super) const HOLD: &str = "
    if not is_mine() then return -1 end
    local new, seen = 0, {}
    for i = 4, #ARGV, 8 do
        local name = ARGV[i]
        if not seen[name] and redis.call('EXISTS', about(name)) == 0 then
            new = new + 1
            seen[name] = true
        end
    end
    if redis.call('ZCARD', names) + new > tonumber(ARGV[3]) then return -2 end
    local time = redis.call('TIME')
    local now = string.format('%.0f', time[1] * 1000000 + time[2])
    for i = 4, #ARGV, 8 do
        local name, position = ARGV[i], ARGV[i + 1]
        if redis.call('EXISTS', about(name)) == 0 then
            redis.call('HSET', about(name), 'since', now, 'number', 0, 'position', '')
            waits(name, i + 2)
            redis.call('ZADD', names, 0, name)
            note(name)
        end
        if position == '' or position > redis.call('HGET', about(name), 'position') then
            local number = redis.call('HINCRBY', about(name), 'number', 1)
            redis.call('RPUSH', messages(name), string.format('%020.0f', number) .. ARGV[i + 7])
            if position ~= '' then redis.call('HSET', about(name), 'position', position) end
        end
    end
    return 1
";

/// Given: the name, and which number is done.
pub(super) const ADVANCE: &str = "
    if not is_mine() then return -1 end
    local name, done = ARGV[3], ARGV[4]
    if redis.call('EXISTS', about(name)) == 0 then return {} end
    local first = redis.call('LINDEX', messages(name), 0)
    if first and done ~= '' and string.sub(first, 1, 20) == done then
        redis.call('LPOP', messages(name))
        first = redis.call('LINDEX', messages(name), 0)
        redis.call('HSET', about(name), 'until', 0, 'attempts', 0, 'first_failed', '',
            'cause', '', 'error', '')
        if redis.call('HGET', about(name), 'action') ~= 'discard' then forget_decision(name) end
        note(name)
    end
    if not first then
        redis.call('DEL', about(name), messages(name))
        for _, key in ipairs({names, due, decided}) do redis.call('ZREM', key, name) end
        return {}
    end
    local state = told(name)
    return {first, state[2], state[3]}
";

/// Given: the name, its wait (5), and whether what was decided is done.
pub(super) const WAIT: &str = "
    if not is_mine() then return -1 end
    local name = ARGV[3]
    if redis.call('EXISTS', about(name)) == 0 then return 1 end
    waits(name, 4)
    if ARGV[9] == '1' then forget_decision(name) end
    note(name)
    return 1
";

/// Given: the time, and most names. Answers names with what is told of them, and when the next is due.
pub(super) const DUE: &str = "
    if not is_mine() then return -1 end
    local found = {}
    local function add(all)
        for _, name in ipairs(all) do
            found[#found + 1] = name
            found[#found + 1] = told(name)
        end
    end
    local now, most = ARGV[3], ARGV[4]
    add(redis.call('ZRANGEBYSCORE', decided, '-inf', '+inf', 'LIMIT', 0, most))
    add(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, most))
    local later = redis.call('ZRANGEBYSCORE', due, '(' .. now, '+inf', 'LIMIT', 0, 1)[1]
    return {found, later and redis.call('HGET', about(later), 'until') or ''}
";

/// Given: behind which name, and most names.
pub(super) const LIST: &str = "
    local from = ARGV[3] == '' and '-' or '(' .. ARGV[3]
    local found = {}
    for _, name in ipairs(redis.call('ZRANGEBYLEX', names, from, '+', 'LIMIT', 0, ARGV[4])) do
        found[#found + 1] = name
        found[#found + 1] = told(name)
        found[#found + 1] = redis.call('LLEN', messages(name))
    end
    return found
";

/// Given: the name, behind which number, and most messages. Answers how the first fared, whether it is
/// among them, and them.
pub(super) const MESSAGES: &str = "
    local name, after, most = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
    local first = redis.call('LINDEX', messages(name), 0)
    if not first or most < 1 then return {} end
    local from = math.max(after + 1 - tonumber(string.sub(first, 1, 20)), 0)
    local state = told(name)
    return {state[2], state[3], from,
        redis.call('LRANGE', messages(name), from, from + most - 1)}
";

/// Given: the name, and the decision. The group hears of it.
pub(super) const DECIDE: &str = "
    local name = ARGV[3]
    if redis.call('EXISTS', about(name)) == 0 then return 0 end
    if redis.call('HEXISTS', about(name), 'action') == 1 then return 0 end
    redis.call('HSET', about(name), 'action', ARGV[4], 'by', ARGV[5], 'because', ARGV[6],
        'at', ARGV[7])
    note(name)
    redis.call('INCR', KEYS[3])
    redis.call('XADD', KEYS[4], 'MAXLEN', 1, '*', 'decided', ARGV[7])
    return 1
";
