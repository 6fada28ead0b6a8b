/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Prints the layout of Xen's public headers as assembler text, one line `->name value` each. It is
 * compiled to assembler and never run, so the compiler needs neither a C library nor the right CPU
 * for the layout in question.
 *
 * With PACK defined, 8-byte fields are aligned as on 32-bit x86, whatever the compiler targets.
 */
#include <stdint.h>
#include <stddef.h>
#ifdef PACK
#pragma pack(push, 4)
#endif
#include <xen/io/blkif.h>
#include <xen/event_channel.h>
#ifdef PACK
#pragma pack(pop)
#endif

#define SHOW(name, value) __asm__ volatile("\n->" name " %c0" : : "i"((long)(value)))
#define FIELD(name, type, field) SHOW(name "." #field, offsetof(type, field))
#define SIZE(name, type) SHOW(name ".size", sizeof(type))

void layout(void);
void layout(void)
{
	SIZE("segment", struct blkif_request_segment);
	FIELD("segment", struct blkif_request_segment, gref);
	FIELD("segment", struct blkif_request_segment, first_sect);
	FIELD("segment", struct blkif_request_segment, last_sect);

	SIZE("rw", blkif_request_t);
	FIELD("rw", blkif_request_t, operation);
	FIELD("rw", blkif_request_t, nr_segments);
	FIELD("rw", blkif_request_t, handle);
	FIELD("rw", blkif_request_t, id);
	FIELD("rw", blkif_request_t, sector_number);
	FIELD("rw", blkif_request_t, seg);

	FIELD("discard", blkif_request_discard_t, operation);
	FIELD("discard", blkif_request_discard_t, flag);
	FIELD("discard", blkif_request_discard_t, handle);
	FIELD("discard", blkif_request_discard_t, id);
	FIELD("discard", blkif_request_discard_t, sector_number);
	FIELD("discard", blkif_request_discard_t, nr_sectors);

	SIZE("indirect", blkif_request_indirect_t);
	FIELD("indirect", blkif_request_indirect_t, operation);
	FIELD("indirect", blkif_request_indirect_t, indirect_op);
	FIELD("indirect", blkif_request_indirect_t, nr_segments);
	FIELD("indirect", blkif_request_indirect_t, id);
	FIELD("indirect", blkif_request_indirect_t, sector_number);
	FIELD("indirect", blkif_request_indirect_t, handle);
	FIELD("indirect", blkif_request_indirect_t, indirect_grefs);

	FIELD("response", blkif_response_t, id);
	FIELD("response", blkif_response_t, operation);
	FIELD("response", blkif_response_t, status);
	SIZE("response", blkif_response_t);

	FIELD("sring", struct blkif_sring, req_prod);
	FIELD("sring", struct blkif_sring, req_event);
	FIELD("sring", struct blkif_sring, rsp_prod);
	FIELD("sring", struct blkif_sring, rsp_event);
	FIELD("sring", struct blkif_sring, ring);
	SIZE("slot", union blkif_sring_entry);
	SHOW("ring.order0", __CONST_RING_SIZE(blkif, 4096 << 0));
	SHOW("ring.order1", __CONST_RING_SIZE(blkif, 4096 << 1));
	SHOW("ring.order2", __CONST_RING_SIZE(blkif, 4096 << 2));
	SHOW("ring.order3", __CONST_RING_SIZE(blkif, 4096 << 3));
	SHOW("ring.order4", __CONST_RING_SIZE(blkif, 4096 << 4));

	SHOW("op.read", BLKIF_OP_READ);
	SHOW("op.write", BLKIF_OP_WRITE);
	SHOW("op.barrier", BLKIF_OP_WRITE_BARRIER);
	SHOW("op.flush", BLKIF_OP_FLUSH_DISKCACHE);
	SHOW("op.discard", BLKIF_OP_DISCARD);
	SHOW("op.indirect", BLKIF_OP_INDIRECT);
	SHOW("discard.secure", BLKIF_DISCARD_SECURE);
	SHOW("status.okay", BLKIF_RSP_OKAY);
	SHOW("status.error", BLKIF_RSP_ERROR);
	SHOW("status.unsupported", BLKIF_RSP_EOPNOTSUPP);
	SHOW("max.direct", BLKIF_MAX_SEGMENTS_PER_REQUEST);
	SHOW("max.indirect", BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST);
	/* Known to the crate xen-sys as well: shows that this file is read correctly. */
	SHOW("xen.domid", sizeof(domid_t));
	SHOW("xen.port", sizeof(evtchn_port_t));
	SIZE("xen.bind", struct evtchn_bind_interdomain);
	FIELD("xen.bind", struct evtchn_bind_interdomain, remote_dom);
	FIELD("xen.bind", struct evtchn_bind_interdomain, remote_port);
	FIELD("xen.bind", struct evtchn_bind_interdomain, local_port);

	SHOW("segments.page", 4096 / sizeof(struct blkif_request_segment));
}
