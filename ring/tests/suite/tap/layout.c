/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Prints the layout of xentap.h as assembler text, one line `->name value` each, as layout.c of
 * this suite does for the headers of Xen.
 */
#include <stddef.h>
#include <sys/ioctl.h>
#include "../../../include/xentap.h"

#define SHOW(name, value) __asm__ volatile("\n->" name " %c0" : : "i"((long long)(value)))
#define FIELD(type, field) \
	SHOW(#type "." #field, offsetof(struct xentap_##type, field)); \
	SHOW(#type "." #field ".size", sizeof(((struct xentap_##type *)0)->field))
#define SIZE(type) SHOW(#type ".size", sizeof(struct xentap_##type))
/* An operand has 32 bits. */
#define NUMBER(name) \
	SHOW(#name, XENTAP_##name & 0x7fffffff); \
	SHOW(#name ".high", (uint64_t)XENTAP_##name >> 31)

void layout(void);
void layout(void)
{
	SIZE(desc);
	FIELD(desc, op);
	FIELD(desc, flags);
	FIELD(desc, segments);
	FIELD(desc, generation);
	FIELD(desc, sector);
	FIELD(desc, sectors);
	FIELD(desc, sequence);
	FIELD(desc, arrived_ns);
	FIELD(desc, tag);
	FIELD(desc, queue);
	FIELD(desc, deliveries);
	FIELD(desc, reserved);

	SIZE(segment);
	FIELD(segment, offset);
	FIELD(segment, len);

	SIZE(completion);
	FIELD(completion, tag);
	FIELD(completion, flags);
	FIELD(completion, generation);
	FIELD(completion, result);
	FIELD(completion, reserved);

	SIZE(info);
	FIELD(info, version);
	FIELD(info, minor);
	FIELD(info, features);
	FIELD(info, epoch);
	FIELD(info, tags);
	FIELD(info, max_segments);
	FIELD(info, descriptors_len);
	FIELD(info, segments_offset);
	FIELD(info, arena_len);
	FIELD(info, state);
	FIELD(info, pid);
	FIELD(info, waiting);
	FIELD(info, delivered);
	FIELD(info, committed);
	FIELD(info, replayed);
	FIELD(info, refused);
	FIELD(info, oldest_ns);
	FIELD(info, domain);
	FIELD(info, device);
	FIELD(info, sectors);
	FIELD(info, poison_sector);
	FIELD(info, poison_sectors);
	FIELD(info, poison_op);
	FIELD(info, poisoned);
	FIELD(info, isolated);
	FIELD(info, memory_kib);
	FIELD(info, lacking);
	FIELD(info, direct);
	FIELD(info, backings);
	FIELD(info, executing);
	FIELD(info, failed_flushes);
	FIELD(info, reserved);

	SIZE(claims);
	FIELD(claims, size);
	FIELD(claims, fence);
	FIELD(claims, operations);
	FIELD(claims, features);
	FIELD(claims, settle_ms);
	FIELD(claims, reserved);

	SIZE(create);
	FIELD(create, version);
	FIELD(create, minor);
	FIELD(create, arena_kib);
	FIELD(create, fail_after_s);
	FIELD(create, max_deaths);
	FIELD(create, reserved0);
	FIELD(create, reserved);

	SIZE(destroy);
	FIELD(destroy, minor);
	FIELD(destroy, flags);

	SIZE(buffer);
	FIELD(buffer, addr);
	FIELD(buffer, len);
	FIELD(buffer, reserved);

	SIZE(exchange);
	FIELD(exchange, commits);
	FIELD(exchange, tags);

	SIZE(param_head);
	FIELD(param_head, kind);
	FIELD(param_head, len);

	SIZE(geometry);
	FIELD(geometry, sectors);
	FIELD(geometry, logical_block);
	FIELD(geometry, physical_block);
	FIELD(geometry, flags);
	FIELD(geometry, reserved);

	SIZE(discard_limits);
	FIELD(discard_limits, granularity);
	FIELD(discard_limits, alignment);
	FIELD(discard_limits, secure);
	FIELD(discard_limits, reserved);

	SIZE(map_op);
	FIELD(map_op, op);
	FIELD(map_op, flags);
	FIELD(map_op, backing);
	FIELD(map_op, generation);
	FIELD(map_op, sector);
	FIELD(map_op, sectors);
	FIELD(map_op, offset);
	FIELD(map_op, reserved);

	SIZE(maps);
	FIELD(maps, ops);
	FIELD(maps, generation);
	FIELD(maps, backings);
	FIELD(maps, refused);
	FIELD(maps, reserved);

	SIZE(backing_add);
	FIELD(backing_add, minor);
	FIELD(backing_add, number);
	FIELD(backing_add, fd);
	FIELD(backing_add, flags);
	FIELD(backing_add, reserved);

	SIZE(backing_remove);
	FIELD(backing_remove, minor);
	FIELD(backing_remove, number);
	FIELD(backing_remove, reserved);

	SIZE(mapped);
	FIELD(mapped, minor);
	FIELD(mapped, room);
	FIELD(mapped, missed);
	FIELD(mapped, evicted);
	FIELD(mapped, refused);
	FIELD(mapped, recalled);
	FIELD(mapped, express);
	FIELD(mapped, reserved);

	NUMBER(VERSION);
	NUMBER(MAX_TAGS);
	NUMBER(NO_TAG);
	NUMBER(MAX_COMMANDS);
	NUMBER(MAX_SEGMENTS);
	NUMBER(MMAP_DESCRIPTORS);
	NUMBER(MMAP_ARENA);
	NUMBER(OP_READ);
	NUMBER(OP_WRITE);
	NUMBER(OP_FLUSH);
	NUMBER(OP_DISCARD);
	NUMBER(OP_WRITE_ZEROES);
	NUMBER(OP_SECURE_DISCARD);
	NUMBER(DESC_FUA);
	NUMBER(DESC_PREFLUSH);
	NUMBER(DESC_REPLAY);
	NUMBER(COMPLETION_RETURNED);
	NUMBER(FEATURE_URING_CMD);
	NUMBER(FEATURE_MAPS);
	NUMBER(FEATURE_CLAIM);
	NUMBER(FEATURE_COMMANDS);
	NUMBER(FEATURE_WIDEN);
	NUMBER(FEATURES);
	NUMBER(OPERATIONS);
	NUMBER(FENCE_LOCAL);
	NUMBER(FENCE_SESSION);
	NUMBER(FENCE_NONE);
	NUMBER(MAX_SETTLE_MS);
	NUMBER(CLAIMS_FIRST_SIZE);
	NUMBER(CLAIMS_MAX_SIZE);
	NUMBER(STATE_IDLE);
	NUMBER(STATE_OPEN);
	NUMBER(STATE_LIVE);
	NUMBER(STATE_FENCING);
	NUMBER(STATE_RECOVERING);
	NUMBER(PARAM_GEOMETRY);
	NUMBER(PARAM_DISCARD);
	NUMBER(GEOMETRY_READ_ONLY);
	NUMBER(GEOMETRY_WRITE_CACHE);
	NUMBER(GEOMETRY_MAY_SHRINK);

	NUMBER(OP_MAP_MISS);
	NUMBER(OP_RECALLED);
	NUMBER(OP_QUIESCE);
	NUMBER(OP_IO_DONE);
	NUMBER(COMPLETION_RETRY_LATER);
	NUMBER(FEATURE_HANDOFF);
	NUMBER(FEATURE_RETRY_LATER);
	NUMBER(PARAM_MAPPING);
	NUMBER(HANDOFF);
	NUMBER(SESSION_OVER);

	NUMBER(MAX_BACKINGS);
	NUMBER(MAP_SET);
	NUMBER(MAP_RECALL);
	NUMBER(MAP_COLLECT);
	NUMBER(MAP_FLUSH);
	NUMBER(MAP_READ);
	NUMBER(MAP_WRITE);
	NUMBER(MAP_ZERO);
	NUMBER(MAP_TRACK);
	NUMBER(MAP_NO_BACKING);
	NUMBER(MAX_MAP_OPS);
	NUMBER(BACKING_WRITE);
	NUMBER(MISS_UNMAPPED);
	NUMBER(MISS_PARTIAL);
	NUMBER(MISS_READ_ONLY);
	NUMBER(MISS_UNALIGNED);
	NUMBER(MISS_PIECES);
	NUMBER(MISS_BACKINGS);
	NUMBER(MISS_NEVER);
	NUMBER(MISS_QUEUE);
	NUMBER(MISSES);

	NUMBER(CREATE);
	NUMBER(DESTROY);
	NUMBER(QUERY);
	NUMBER(BACKING_ADD);
	NUMBER(BACKING_REMOVE);
	NUMBER(MAPPED);
	NUMBER(INFO);
	NUMBER(SET_PARAMS);
	NUMBER(START);
	NUMBER(CLAIM);
	NUMBER(EXCUSE);
	NUMBER(EXCHANGE);
	NUMBER(MAP);
}
