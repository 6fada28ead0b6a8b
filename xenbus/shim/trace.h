/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Trace points: /sys/kernel/tracing/events/xen_blkback_rs. xenbus/src/linux/trace.rs has their calls.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM xen_blkback_rs

#if !defined(XBR_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define XBR_TRACE_H

#include <linux/tracepoint.h>
#include <linux/types.h>

/* A request, or a piece of one, is given to the disk. Sectors are 512 bytes. */
TRACE_EVENT(xbr_submit,
	TP_PROTO(unsigned int domain, unsigned int device, unsigned int queue,
		 unsigned int tag, unsigned int operation, u64 sector, u64 sectors),
	TP_ARGS(domain, device, queue, tag, operation, sector, sectors),
	TP_STRUCT__entry(
		__field(unsigned int, domain)
		__field(unsigned int, device)
		__field(unsigned int, queue)
		__field(unsigned int, tag)
		__field(unsigned int, operation)
		__field(u64, sector)
		__field(u64, sectors)
	),
	TP_fast_assign(
		__entry->domain = domain;
		__entry->device = device;
		__entry->queue = queue;
		__entry->tag = tag;
		__entry->operation = operation;
		__entry->sector = sector;
		__entry->sectors = sectors;
	),
	TP_printk("vbd-%u-%u queue=%u tag=%u op=%s sector=%llu sectors=%llu",
		  __entry->domain, __entry->device, __entry->queue, __entry->tag,
		  __print_symbolic(__entry->operation, { 0, "read" }, { 1, "write" },
				   { 2, "flush" }, { 3, "flush-write" },
				   { 4, "barrier-write" }, { 5, "discard" }),
		  __entry->sector, __entry->sectors)
);

/* The disk is through with it. */
TRACE_EVENT(xbr_complete,
	TP_PROTO(unsigned int domain, unsigned int device, unsigned int queue,
		 unsigned int tag, int status),
	TP_ARGS(domain, device, queue, tag, status),
	TP_STRUCT__entry(
		__field(unsigned int, domain)
		__field(unsigned int, device)
		__field(unsigned int, queue)
		__field(unsigned int, tag)
		__field(int, status)
	),
	TP_fast_assign(
		__entry->domain = domain;
		__entry->device = device;
		__entry->queue = queue;
		__entry->tag = tag;
		__entry->status = status;
	),
	TP_printk("vbd-%u-%u queue=%u tag=%u status=%d",
		  __entry->domain, __entry->device, __entry->queue, __entry->tag,
		  __entry->status)
);

/* A pass over the ring: requests that it took and answered, and whether the guest was sent an event. */
TRACE_EVENT(xbr_pass,
	TP_PROTO(unsigned int domain, unsigned int device, unsigned int queue,
		 unsigned int taken, unsigned int answered, bool notify),
	TP_ARGS(domain, device, queue, taken, answered, notify),
	TP_STRUCT__entry(
		__field(unsigned int, domain)
		__field(unsigned int, device)
		__field(unsigned int, queue)
		__field(unsigned int, taken)
		__field(unsigned int, answered)
		__field(bool, notify)
	),
	TP_fast_assign(
		__entry->domain = domain;
		__entry->device = device;
		__entry->queue = queue;
		__entry->taken = taken;
		__entry->answered = answered;
		__entry->notify = notify;
	),
	TP_printk("vbd-%u-%u queue=%u taken=%u answered=%u notify=%u",
		  __entry->domain, __entry->device, __entry->queue, __entry->taken,
		  __entry->answered, __entry->notify)
);

#endif /* XBR_TRACE_H */

/* This part must be outside of the protection. */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
