/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The ABI between the kernel and the process that serves a Xen disk, version 1, for C.
 *
 * What everything means is said in ring/src/ring/tap/abi.rs, of which this is the same in C; a
 * test compares both.
 */
#ifndef XENTAP_H
#define XENTAP_H

#include <stdint.h>

#define XENTAP_VERSION 1
#define XENTAP_MAX_TAGS 4096
#define XENTAP_NO_TAG 0xffff
#define XENTAP_MAX_COMMANDS 64
#define XENTAP_MAX_SEGMENTS 512
#define XENTAP_MMAP_DESCRIPTORS 0x0ULL
#define XENTAP_MMAP_ARENA 0x100000000ULL

#define XENTAP_OP_READ 0
#define XENTAP_OP_WRITE 1
#define XENTAP_OP_FLUSH 2
#define XENTAP_OP_DISCARD 3
#define XENTAP_OP_WRITE_ZEROES 5
#define XENTAP_OP_SECURE_DISCARD 6

#define XENTAP_DESC_FUA 1
#define XENTAP_DESC_PREFLUSH 2
#define XENTAP_DESC_REPLAY 4

struct xentap_desc {
	uint8_t op;
	uint8_t flags;
	uint16_t segments;
	uint32_t generation;
	uint64_t sector;
	uint64_t sectors;
	uint64_t sequence;
	uint64_t arrived_ns;
	uint16_t tag;
	uint16_t queue;
	uint32_t deliveries;
	uint32_t reserved[4];
};

struct xentap_segment {
	uint32_t offset;
	uint32_t len;
};

#define XENTAP_COMPLETION_RETURNED 1

struct xentap_completion {
	uint16_t tag;
	uint16_t flags;
	uint32_t generation;
	int32_t result;
	uint32_t reserved;
};

#define XENTAP_FEATURE_URING_CMD 1
#define XENTAP_FEATURE_MAPS 2
#define XENTAP_FEATURE_CLAIM 4
#define XENTAP_FEATURE_COMMANDS 8
#define XENTAP_FEATURE_WIDEN 64
#define XENTAP_FEATURES \
	(XENTAP_FEATURE_URING_CMD | XENTAP_FEATURE_MAPS | XENTAP_FEATURE_CLAIM | XENTAP_FEATURE_COMMANDS | \
	 XENTAP_FEATURE_WIDEN)

#define XENTAP_STATE_IDLE 0
#define XENTAP_STATE_OPEN 1
#define XENTAP_STATE_LIVE 2
#define XENTAP_STATE_FENCING 3
#define XENTAP_STATE_RECOVERING 4

struct xentap_info {
	uint32_t version;
	uint32_t minor;
	uint64_t features;
	uint64_t epoch;
	uint32_t tags;
	uint32_t max_segments;
	uint64_t descriptors_len;
	uint64_t segments_offset;
	uint64_t arena_len;
	uint32_t state;
	uint32_t pid;
	uint32_t waiting;
	uint32_t delivered;
	uint64_t committed;
	uint64_t replayed;
	uint64_t refused;
	uint64_t oldest_ns;
	uint32_t domain;
	uint32_t device;
	uint64_t sectors;
	uint64_t poison_sector;
	uint64_t poison_sectors;
	uint32_t poison_op;
	uint32_t poisoned;
	uint32_t isolated;
	uint32_t memory_kib;
	uint64_t lacking;
	uint64_t direct;
	uint32_t backings;
	uint32_t executing;
	uint32_t failed_flushes;
	uint32_t reserved;
};

#define XENTAP_FENCE_LOCAL 1
#define XENTAP_FENCE_SESSION 2
#define XENTAP_FENCE_NONE 3
#define XENTAP_MAX_SETTLE_MS 600000

/* One bit for each XENTAP_OP_ of this version. */
#define XENTAP_OPERATIONS 0x6f
#define XENTAP_CLAIMS_FIRST_SIZE 32
#define XENTAP_CLAIMS_MAX_SIZE 4096

struct xentap_claims {
	uint32_t size;
	uint32_t fence;
	uint64_t operations;
	uint64_t features;
	uint32_t settle_ms;
	uint32_t reserved;
};

struct xentap_create {
	uint32_t version;
	uint32_t minor;
	uint32_t arena_kib;
	uint32_t fail_after_s;
	uint32_t max_deaths;
	uint32_t reserved0;
	uint64_t reserved[3];
};

struct xentap_destroy {
	uint32_t minor;
	uint32_t flags;
};

struct xentap_buffer {
	uint64_t addr;
	uint32_t len;
	uint32_t reserved;
};

struct xentap_exchange {
	struct xentap_buffer commits;
	struct xentap_buffer tags;
};

struct xentap_param_head {
	uint32_t kind;
	uint32_t len;
};

#define XENTAP_PARAM_GEOMETRY 1
#define XENTAP_PARAM_DISCARD 2

#define XENTAP_GEOMETRY_READ_ONLY 1
#define XENTAP_GEOMETRY_WRITE_CACHE 2
#define XENTAP_GEOMETRY_MAY_SHRINK 4

struct xentap_geometry {
	uint64_t sectors;
	uint32_t logical_block;
	uint32_t physical_block;
	uint32_t flags;
	uint32_t reserved;
};

struct xentap_discard_limits {
	uint32_t granularity;
	uint32_t alignment;
	uint32_t secure;
	uint32_t reserved;
};

#define XENTAP_MAX_BACKINGS 16
#define XENTAP_MAP_SET 1
#define XENTAP_MAP_RECALL 2
#define XENTAP_MAP_COLLECT 3
#define XENTAP_MAP_FLUSH 4
#define XENTAP_MAP_READ 1
#define XENTAP_MAP_WRITE 2
#define XENTAP_MAP_ZERO 4
#define XENTAP_MAP_TRACK 8
#define XENTAP_MAP_NO_BACKING 0xffff
#define XENTAP_MAX_MAP_OPS 256

struct xentap_map_op {
	uint8_t op;
	uint8_t flags;
	uint16_t backing;
	uint32_t generation;
	uint64_t sector;
	uint64_t sectors;
	uint64_t offset;
	uint64_t reserved[2];
};

struct xentap_maps {
	struct xentap_buffer ops;
	uint32_t generation;
	uint32_t backings;
	uint64_t refused;
	uint64_t reserved[2];
};

#define XENTAP_BACKING_WRITE 1

struct xentap_backing_add {
	uint32_t minor;
	uint32_t number;
	int32_t fd;
	uint32_t flags;
	uint64_t reserved[2];
};

struct xentap_backing_remove {
	uint32_t minor;
	uint32_t number;
	uint64_t reserved;
};

#define XENTAP_MISS_UNMAPPED 0
#define XENTAP_MISS_PARTIAL 1
#define XENTAP_MISS_READ_ONLY 2
#define XENTAP_MISS_UNALIGNED 3
#define XENTAP_MISS_PIECES 4
#define XENTAP_MISS_BACKINGS 5
#define XENTAP_MISS_NEVER 6
#define XENTAP_MISS_QUEUE 7
#define XENTAP_MISSES 8

struct xentap_mapped {
	uint32_t minor;
	uint32_t room;
	uint64_t missed[XENTAP_MISSES];
	uint64_t evicted;
	uint64_t refused;
	uint64_t recalled;
	uint64_t express;
	uint64_t reserved[3];
};

/* Kept for later: refused with EOPNOTSUPP. */
#define XENTAP_OP_MAP_MISS 32
#define XENTAP_OP_RECALLED 33
#define XENTAP_OP_QUIESCE 34
#define XENTAP_OP_IO_DONE 35
#define XENTAP_COMPLETION_RETRY_LATER 2
#define XENTAP_FEATURE_HANDOFF 16
#define XENTAP_FEATURE_RETRY_LATER 32
#define XENTAP_PARAM_MAPPING 3
#define XENTAP_HANDOFF 0x17
#define XENTAP_SESSION_OVER 0x18

/* These need <sys/ioctl.h> where they are used. */
#define XENTAP_CREATE _IOWR('x', 0x00, struct xentap_create)
#define XENTAP_DESTROY _IOW('x', 0x01, struct xentap_destroy)
#define XENTAP_QUERY _IOWR('x', 0x02, struct xentap_info)
#define XENTAP_BACKING_ADD _IOW('x', 0x03, struct xentap_backing_add)
#define XENTAP_BACKING_REMOVE _IOW('x', 0x04, struct xentap_backing_remove)
#define XENTAP_MAPPED _IOWR('x', 0x05, struct xentap_mapped)
#define XENTAP_INFO _IOR('x', 0x10, struct xentap_info)
#define XENTAP_SET_PARAMS _IOW('x', 0x11, struct xentap_buffer)
#define XENTAP_START _IO('x', 0x12)
/* Its number says nothing of the size, which the structure carries. */
#define XENTAP_CLAIM _IOC(_IOC_WRITE, 'x', 0x15, 0)
#define XENTAP_EXCUSE _IO('x', 0x14)
#define XENTAP_EXCHANGE _IOWR('x', 0x13, struct xentap_exchange)
#define XENTAP_MAP _IOWR('x', 0x16, struct xentap_maps)

#endif
