"""What stands in Redis: every key of one partition in one atomic look, and the hand on its clocks.

Tests that would otherwise wait for a lease, a deadline or a grace time let it pass here, by writing
its end into the past.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
from redis import Redis

from common.broker import keys
from common.messages import Timing, TokenRecord

_LOOK = """
local fetch = {
  hash = function(key) return redis.call('HGETALL', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  string = function(key) return redis.call('GET', key) end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
  list = function() return {} end,
}
local time, found = redis.call('TIME'), {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local name, kind = string.sub(key, #ARGV[1] + 1), redis.call('TYPE', key).ok
  found[#found + 1] = { name, kind, redis.call('PTTL', key), fetch[kind](key) }
end
return { time[1] * 1000 + math.floor(time[2] / 1000), found }
"""

_SECOND_MS = 1000
_LONG_MS = 600_000

_record = msgspec.msgpack.Decoder(TokenRecord).decode
_timing = msgspec.msgpack.Decoder(Timing).decode


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a token log with the position and the kind (0 tokens, 1 end) of its id."""

    position: int
    kind: int
    record: TokenRecord
    timing: Timing | None


@dataclass(frozen=True)
class Snapshot:
    """All keys of a partition at ``now_ms``, without their prefix, as text."""

    now_ms: int
    ttl_ms: dict[str, int] = field(default_factory=dict[str, int])
    hashes: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    zsets: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    sets: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    strings: dict[str, str] = field(default_factory=dict[str, str])
    streams: dict[str, list[dict[str, bytes]]] = field(
        default_factory=dict[str, list[dict[str, bytes]]]
    )
    logs: dict[str, list[Entry]] = field(default_factory=dict[str, list[Entry]])

    @property
    def generations(self) -> dict[str, dict[str, str]]:
        """The ``gen`` hashes by id; a tombstone is one without ``t0``."""
        return self.named("gen:", self.hashes)

    def named(self, family: str, values: dict[str, Any]) -> dict[str, Any]:
        """The keys of one family, by what stands behind its name."""
        return {key[len(family) :]: values[key] for key in values if key.startswith(family)}

    def zset(self, key: str) -> dict[str, float]:
        return self.zsets.get(key, {})

    def queues_of(self, generation_id: str) -> list[str]:
        """Lanes and ``again`` queues that hold the generation."""
        return [
            key
            for key, members in self.zsets.items()
            if key.startswith(("lane:", "again:")) and generation_id in members
        ]

    def holders_of(self, generation_id: str) -> list[str]:
        held = self.named("held:", self.zsets)
        return [worker for worker, members in held.items() if generation_id in members]

    def backlog(self, lane: str) -> tuple[int, int]:
        """(tokens, bytes) that Redis counts as waiting in a lane."""
        counted = self.hashes.get("backlog", {})
        return int(counted.get(f"{lane}.tokens", 0)), int(counted.get(f"{lane}.bytes", 0))


class PartitionView:
    """A raw view of partition 0 of ``pool`` on the server behind ``redis``."""

    def __init__(self, redis: Redis, pool: str) -> None:
        self._redis = redis
        self._prefix = keys.prefix(pool)
        self._look = redis.register_script(_LOOK)

    def look(self) -> Snapshot:
        answer: Any = self._look(args=[self._prefix])
        snapshot = Snapshot(int(answer[0]))
        for raw_name, raw_kind, ttl_ms, value in answer[1]:
            name = raw_name.decode()
            snapshot.ttl_ms[name] = ttl_ms
            _sort_in(snapshot, name, raw_kind.decode(), value)
        return snapshot

    # Time ----------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        seconds, micros = self._redis.time()  # pyright: ignore[reportGeneralTypeIssues] redis-py types sync as async
        return int(seconds) * 1000 + int(micros) // 1000

    def look_at_the_clock(self) -> None:
        """As if somebody had beaten just now, however slow this test runs."""
        clock = f"{self._prefix}clock"
        if self._redis.exists(clock):
            self._redis.hset(clock, "seen", str(self.now_ms()))

    def pass_lease(self, *processes: str) -> None:
        """The leases of these workers and gateways have ended; everybody else's have long to go."""
        now = self.now_ms()
        for key in ("leases", "gateways"):
            for raw in self._members(key):
                gone = raw.decode() in processes
                self._redis.zadd(
                    f"{self._prefix}{key}", {raw: now - _SECOND_MS if gone else now + _LONG_MS}
                )
        self.look_at_the_clock()

    def sleep(self, ms: int) -> None:
        """As if the machine had slept: nobody looked at the clock, and all leases have ended."""
        now = self.now_ms()
        for key in ("leases", "gateways"):
            for raw in self._members(key):
                self._redis.zadd(f"{self._prefix}{key}", {raw: now - _SECOND_MS})
        for raw in self._members("versions"):
            self._redis.zincrby(f"{self._prefix}versions", -ms, raw)
        self._redis.hset(f"{self._prefix}clock", "seen", str(now - ms))

    def restart(self) -> None:
        """As if another server process answered now; leases have ended during its start."""
        self.sleep(4 * _SECOND_MS)
        self._redis.hset(f"{self._prefix}clock", "run", "0" * 40)

    def end_settling(self) -> None:
        """As if the time for putting back what the other server lost were over."""
        self._redis.hset(f"{self._prefix}clock", "settle", "0")

    def pass_queue_deadline(self, generation_id: str) -> None:
        self._set(generation_id, deadline=self.now_ms() - _SECOND_MS)
        self._make_due(generation_id)

    def pass_run_limit(self, generation_id: str) -> None:
        self._set(generation_id, run_limit=-_LONG_MS)
        self._make_due(generation_id)

    def pass_grace(self, generation_id: str) -> None:
        self._make_due(generation_id)

    def age(self, generation_id: str, ms: int) -> None:
        """As if it had been admitted ``ms`` ago."""
        self._set(generation_id, t0=self.now_ms() - ms)

    def pass_patience(self, generation_id: str) -> None:
        """A suspect has waited so long that it may run beside anybody."""
        self._set(generation_id, died_ms=self.now_ms() - 6 * _SECOND_MS)

    def silence_version(self, version: str) -> None:
        """No worker of this model version has beaten for more than a minute."""
        self._redis.zadd(
            f"{self._prefix}versions", {version: self.now_ms() - 61 * _SECOND_MS}, xx=True
        )

    # Loss ----------------------------------------------------------------------------------------

    def lose_inbox_records(self, gateway: str) -> None:
        self._redis.xtrim(f"{self._prefix}inbox:{gateway}", maxlen=0, approximate=False)

    def lose_inbox(self, gateway: str) -> None:
        self._redis.delete(f"{self._prefix}inbox:{gateway}")

    def delete(self, *names: str) -> None:
        """As if these keys had expired."""
        self._redis.delete(*(f"{self._prefix}{name}" for name in names))

    def _members(self, key: str) -> list[bytes]:
        members: Any = self._redis.zrange(f"{self._prefix}{key}", 0, -1)
        return members

    def _set(self, generation_id: str, **numbers: int) -> None:
        fields = {name: str(value) for name, value in numbers.items()}
        self._redis.hset(f"{self._prefix}gen:{generation_id}", mapping=fields)

    def _make_due(self, generation_id: str) -> None:
        past = self.now_ms() - _SECOND_MS
        self._redis.zadd(f"{self._prefix}due", {generation_id: past}, xx=True)


def _sort_in(snapshot: Snapshot, name: str, kind: str, value: Any) -> None:
    match kind:
        case "hash":
            snapshot.hashes[name] = {
                field.decode(): content.decode("utf-8", "replace")
                for field, content in zip(value[::2], value[1::2], strict=True)
            }
        case "zset":
            snapshot.zsets[name] = {
                member.decode(): float(score)
                for member, score in zip(value[::2], value[1::2], strict=True)
            }
        case "set":
            snapshot.sets[name] = {member.decode() for member in value}
        case "string":
            snapshot.strings[name] = value.decode()
        case "stream" if name.startswith("log:"):
            snapshot.logs[name[4:]] = [_entry(raw_id, fields) for raw_id, fields in value]
        case "stream":
            snapshot.streams[name] = [
                {field.decode(): text for field, text in zip(row[::2], row[1::2], strict=True)}
                for _, row in value
            ]
        case _:
            pass


def _entry(raw_id: bytes, row: list[bytes]) -> Entry:
    position, _, entry_kind = raw_id.decode().partition("-")
    fields = dict(zip(row[::2], row[1::2], strict=True))
    timing = fields.get(b"m")
    return Entry(
        int(position), int(entry_kind), _record(fields[b"r"]), _timing(timing) if timing else None
    )
