/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Prototypes of the one-call shims; xenbus/src/linux/sys.rs declares the same for Rust.
 */
#ifndef XBR_SHIM_H
#define XBR_SHIM_H

#include <linux/types.h>

struct attribute_group;
struct bio;
struct bio_set;
struct block_device;
struct device;
struct file;
struct gnttab_map_grant_ref;
struct gnttab_unmap_grant_ref;
struct inode;
struct kiocb;
struct page;
struct xenbus_device;

/* What a block device allows; sizes in bytes, sectors of 512 bytes. */
struct xbr_bdev_limits {
	u64 sectors;
	u32 logical_block;
	u32 physical_block;
	u32 discard_sectors;
	u32 discard_granularity;
	u32 discard_alignment;
	u32 secure_erase_sectors;
	u8 read_only;
	u8 removable;
	u8 cdrom;
	u8 pad[5];
};
static_assert(sizeof(struct xbr_bdev_limits) == 40);

/*
 * What matters of a file to who reads and writes it past the page cache; block in bytes, sectors of 512 bytes.
 * Its device takes so many sectors and segments at once; 0 if it has none.
 */
struct xbr_file_limits {
	u32 block;
	u32 sectors;
	u16 segments;
	u8 regular;
	u8 readable;
	u8 writable;
	/* Past the page cache. */
	u8 direct;
	/* It can say that it would have to wait. */
	u8 nowait;
	/* On block devices of this host, and on no other file system. */
	u8 local;
};
static_assert(sizeof(struct xbr_file_limits) == 16);

#define XBR_ATTR_DEVICE 100
#define XBR_ATTR_MODE 101
typedef u64 (xbr_attr_fn)(struct device *dev, unsigned int which);

int xbr_xen_domain(void);
int xbr_xen_pv_domain(void);
struct device *xbr_dev_device(struct xenbus_device *dev);
const char *xbr_dev_nodename(const struct xenbus_device *dev);
const char *xbr_dev_otherend(const struct xenbus_device *dev);
int xbr_dev_otherend_id(const struct xenbus_device *dev);
void xbr_dev_set_state(struct xenbus_device *dev, unsigned int state);
int xbr_dev_vanished(const struct xenbus_device *dev);
unsigned long xbr_page_gfn(struct page *page);
void xbr_set_map_op(struct gnttab_map_grant_ref *op, struct page *page,
		    unsigned int flags, unsigned int gref, unsigned short domid);
void xbr_set_unmap_op(struct gnttab_unmap_grant_ref *op, struct page *page,
		      unsigned int handle);
#define XBR_UNMAP_DATA 512
int xbr_unmap_refs_sync(struct gntab_unmap_queue_data *data, struct gnttab_unmap_grant_ref *ops,
			struct page **pages,
			unsigned int count);
struct bio *xbr_bio_alloc(struct block_device *bdev, unsigned short vecs,
			  unsigned int opf, struct bio_set *set);
unsigned long long xbr_bdev_nr_sectors(struct block_device *bdev);
void xbr_bdev_limits(struct block_device *bdev, struct xbr_bdev_limits *limits);
int xbr_bdev_stable_writes(struct block_device *bdev);
int xbr_bdev_invalidate(struct block_device *bdev);
int xbr_file_stable_writes(const struct file *file);
void xbr_file_limits(const struct file *file, struct xbr_file_limits *limits);
long long xbr_file_size(const struct file *file);
int xbr_file_try_start_write(const struct file *file);
void xbr_file_start_write(const struct file *file);
void xbr_kiocb_started_write(struct kiocb *iocb);
void xbr_kiocb_end_write(struct kiocb *iocb);
unsigned int xbr_noio_save(void);
void xbr_noio_restore(unsigned int flags);
int xbr_need_resched(void);
void xbr_yield_processor(void);
void xbr_timer_setup(struct timer_list *timer, void (*function)(struct timer_list *));
void xbr_timer_start(struct timer_list *timer, unsigned long ticks);
unsigned int xbr_pin(void);
void xbr_unpin(void);
void xbr_halt_while(const u32 *state, u32 halted);
void xbr_end_halt(unsigned int cpu);
unsigned long xbr_total_ram_pages(void);
unsigned int xbr_num_online_cpus(void);
void xbr_virt_rmb(void);
void xbr_virt_wmb(void);
void xbr_virt_mb(void);
unsigned int xbr_domain_memory_mib(void);
unsigned int xbr_host_memory_mib(void);
unsigned int xbr_feature_persistent(void);
void xbr_set_memory_kib(unsigned int kib);
void xbr_cond_resched(void);
void xbr_dev_err_ratelimited(struct device *dev, const char *text);
void xbr_dev_warn_ratelimited(struct device *dev, const char *text);
void xbr_dev_info_ratelimited(struct device *dev, const char *text);
void xbr_set_attr_fn(xbr_attr_fn *fn);
const struct attribute_group **xbr_attr_groups(void);
u32 xbr_mkdev(u32 major, u32 minor);
void *xbr_page_address(struct page *page);
int xbr_page_count(const struct page *page);
u32 xbr_iminor(const struct inode *inode);
u32 xbr_current_tgid(void);

#endif
