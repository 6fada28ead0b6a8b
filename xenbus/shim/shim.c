// SPDX-License-Identifier: GPL-2.0-only
/*
 * One-call shims for what Rust cannot reach: static inlines, macros, and the fields of structures
 * that the kernel's Rust bindings do not know. No policy and no logic: each function is one call
 * or one access. The layouts that xenbus/src/linux/sys.rs declares are asserted here.
 */

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/io_uring/cmd.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/pagemap.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/stat.h>
#include <linux/smp.h>
#include <linux/sysfs.h>
#include <trace/events/ipi.h>
#include <xen/events.h>
#include <xen/grant_table.h>
#include <xen/interface/sched.h>
#include <xen/page.h>
#include <xen/xen.h>
#include <xen/xenbus.h>
#include <asm/xen/hypercall.h>

#include "shim.h"

/* Layouts declared in sys.rs. */
static_assert(IOCB_NOWAIT == 8);
static_assert(sizeof(struct xenbus_watch) == 48);
static_assert(offsetof(struct xenbus_watch, node) == 16);
static_assert(offsetof(struct xenbus_watch, will_handle) == 32);
static_assert(offsetof(struct xenbus_watch, callback) == 40);
static_assert(offsetof(struct xenbus_driver, probe) == 24);
static_assert(offsetof(struct xenbus_driver, driver) == 72);
static_assert(sizeof(struct xenbus_driver) == 72 + sizeof(struct device_driver) + 24);
static_assert(sizeof(struct xenbus_device_id) == 32);
static_assert(sizeof(struct xenbus_transaction) == 4);
/* It holds a work, whose size depends on the kernel's configuration. */
static_assert(sizeof(struct gntab_unmap_queue_data) <= XBR_UNMAP_DATA);
static_assert(sizeof(struct gnttab_copy) == 40);
static_assert(offsetof(struct gnttab_copy, dest) == 16);
static_assert(offsetof(struct gnttab_copy, len) == 32);
static_assert(offsetof(struct gnttab_copy, status) == 36);
static_assert(sizeof(struct gnttab_map_grant_ref) == 32);
static_assert(offsetof(struct gnttab_map_grant_ref, status) == 18);
static_assert(offsetof(struct gnttab_map_grant_ref, handle) == 20);
static_assert(sizeof(struct gnttab_unmap_grant_ref) == 24);
static_assert(offsetof(struct gnttab_unmap_grant_ref, handle) == 16);
static_assert(GNTCOPY_source_gref == 1 && GNTCOPY_dest_gref == 2);
static_assert(GNTMAP_host_map == 2 && GNTMAP_readonly == 4);
static_assert(GNTST_okay == 0 && GNTST_general_error == -1 && GNTST_no_device_space == -7);
static_assert(DOMID_SELF == 0x7ff0);
static_assert(XEN_EOI_FLAG_SPURIOUS == 1);
static_assert(TASK_IDLE == 0x402);
static_assert((__force unsigned int)BLK_OPEN_READ == 1);
static_assert((__force unsigned int)BLK_OPEN_WRITE == 2);
static_assert(XEN_PAGE_SIZE == PAGE_SIZE);
static_assert(offsetof(struct io_uring_cmd, file) == 0);
static_assert(offsetof(struct io_uring_cmd, sqe) == 8);
static_assert(offsetof(struct io_uring_cmd, cmd_op) == 16);
static_assert(offsetof(struct io_uring_cmd, pdu) == 24);
static_assert(sizeof_field(struct io_uring_cmd, pdu) >= 16);
static_assert(offsetof(struct io_uring_sqe, cmd) == 48);
static_assert(offsetof(struct io_kiocb, cmd) == 0);
static_assert(sizeof(struct io_tw_req) == sizeof(void *));
static_assert(sizeof(struct io_tw_state) == 1);
static_assert(IO_URING_F_COMPLETE_DEFER == 1);
static_assert(IO_URING_F_CANCEL == 1 << 11);

int xbr_xen_domain(void)
{
	return xen_domain();
}

int xbr_xen_pv_domain(void)
{
	return xen_pv_domain();
}

struct device *xbr_dev_device(struct xenbus_device *dev)
{
	return &dev->dev;
}

const char *xbr_dev_nodename(const struct xenbus_device *dev)
{
	return dev->nodename;
}

const char *xbr_dev_otherend(const struct xenbus_device *dev)
{
	return dev->otherend;
}

int xbr_dev_otherend_id(const struct xenbus_device *dev)
{
	return dev->otherend_id;
}

void xbr_dev_set_state(struct xenbus_device *dev, unsigned int state)
{
	dev->state = state;
}

int xbr_dev_vanished(const struct xenbus_device *dev)
{
	return dev->vanished;
}

unsigned long xbr_page_gfn(struct page *page)
{
	return xen_page_to_gfn(page);
}

void xbr_set_map_op(struct gnttab_map_grant_ref *op, struct page *page,
		    unsigned int flags, unsigned int gref, unsigned short domid)
{
	gnttab_set_map_op(op, (unsigned long)pfn_to_kaddr(page_to_pfn(page)),
			  flags, gref, domid);
}

void xbr_set_unmap_op(struct gnttab_unmap_grant_ref *op, struct page *page,
		      unsigned int handle)
{
	gnttab_set_unmap_op(op, (unsigned long)pfn_to_kaddr(page_to_pfn(page)),
			    GNTMAP_host_map, handle);
}

int xbr_unmap_refs_sync(struct gntab_unmap_queue_data *data, struct gnttab_unmap_grant_ref *ops,
			struct page **pages, unsigned int count)
{
	*data = (struct gntab_unmap_queue_data) {
		.unmap_ops = ops,
		.pages = pages,
		.count = count,
	};
	return gnttab_unmap_refs_sync(data);
}

struct bio *xbr_bio_alloc(struct block_device *bdev, unsigned short vecs,
			  unsigned int opf, struct bio_set *set)
{
	return bio_alloc_bioset(bdev, vecs, (__force blk_opf_t)opf, GFP_NOIO, set);
}

unsigned long long xbr_bdev_nr_sectors(struct block_device *bdev)
{
	return bdev_nr_sectors(bdev);
}

void xbr_bdev_limits(struct block_device *bdev, struct xbr_bdev_limits *limits)
{
	*limits = (struct xbr_bdev_limits) {
		.sectors = bdev_nr_sectors(bdev),
		.logical_block = bdev_logical_block_size(bdev),
		.physical_block = bdev_physical_block_size(bdev),
		.discard_sectors = bdev_max_discard_sectors(bdev),
		.discard_granularity = bdev_discard_granularity(bdev),
		.discard_alignment = bdev_discard_alignment(bdev),
		.secure_erase_sectors = bdev_max_secure_erase_sectors(bdev),
		.read_only = bdev_read_only(bdev),
		.removable = (bdev->bd_disk->flags & GENHD_FL_REMOVABLE) != 0,
		.cdrom = disk_to_cdi(bdev->bd_disk) != NULL,
	};
}

int xbr_bdev_stable_writes(struct block_device *bdev)
{
	return bdev_stable_writes(bdev);
}

int xbr_bdev_invalidate(struct block_device *bdev)
{
	return invalidate_inode_pages2(bdev->bd_mapping);
}

void xbr_file_limits(const struct file *file, struct xbr_file_limits *limits)
{
	const struct inode *inode = file_inode(file);
	const struct super_block *sb = inode->i_sb;
	unsigned int block = sb->s_bdev ? bdev_logical_block_size(sb->s_bdev) : PAGE_SIZE;
	struct kstat stat = {};
	/* What does not say takes pages, as the process thinks, too; 0 says that there is none. */
	bool says = !vfs_getattr(&file->f_path, &stat, STATX_DIOALIGN, AT_STATX_DONT_SYNC) &&
		    (stat.result_mask & STATX_DIOALIGN);
	unsigned int align = says ? stat.dio_offset_align : PAGE_SIZE;

	*limits = (struct xbr_file_limits) {
		.block = max(block, align),
		.sectors = sb->s_bdev ? queue_max_sectors(bdev_get_queue(sb->s_bdev)) : 0,
		.segments = sb->s_bdev ? queue_max_segments(bdev_get_queue(sb->s_bdev)) : 0,
		.regular = S_ISREG(inode->i_mode),
		.readable = file->f_op->read_iter && (file->f_mode & FMODE_READ),
		.writable = file->f_op->write_iter && (file->f_mode & FMODE_WRITE),
		.direct = align && (file->f_flags & O_DIRECT) && (file->f_mode & FMODE_CAN_ODIRECT),
		.nowait = (file->f_mode & FMODE_NOWAIT) != 0,
		.local = !sb->s_stack_depth && (sb->s_type->fs_flags & FS_REQUIRES_DEV),
	};
}

int xbr_file_stable_writes(const struct file *file)
{
	return mapping_stable_writes(file->f_mapping);
}

long long xbr_file_size(const struct file *file)
{
	return i_size_read(file_inode(file));
}

int xbr_file_try_start_write(const struct file *file)
{
	return sb_start_write_trylock(file_inode(file)->i_sb);
}

void xbr_file_start_write(const struct file *file)
{
	sb_start_write(file_inode(file)->i_sb);
}

/* For lockdep: another thread may end the write. The half of kiocb_start_write() that does not wait. */
void xbr_kiocb_started_write(struct kiocb *iocb)
{
	__sb_writers_release(file_inode(iocb->ki_filp)->i_sb, SB_FREEZE_WRITE);
}

void xbr_kiocb_end_write(struct kiocb *iocb)
{
	kiocb_end_write(iocb);
}

unsigned int xbr_noio_save(void)
{
	return memalloc_noio_save();
}

void xbr_noio_restore(unsigned int flags)
{
	memalloc_noio_restore(flags);
}

void xbr_virt_rmb(void)
{
	virt_rmb();
}

void xbr_virt_wmb(void)
{
	virt_wmb();
}

void xbr_virt_mb(void)
{
	virt_mb();
}

unsigned int xbr_num_online_cpus(void)
{
	return num_online_cpus();
}

int xbr_need_resched(void)
{
	return need_resched();
}

void xbr_yield_processor(void)
{
	HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
}

void xbr_timer_setup(struct timer_list *timer, void (*function)(struct timer_list *))
{
	timer_setup(timer, function, 0);
}

void xbr_timer_start(struct timer_list *timer, unsigned long ticks)
{
	mod_timer(timer, jiffies + ticks);
}

/* The caller stays on this processor, whose number this returns, until xbr_unpin. */
unsigned int xbr_pin(void)
{
	preempt_disable();
	return smp_processor_id();
}

void xbr_unpin(void)
{
	preempt_enable();
}

/*
 * Halts this processor until an interrupt, unless *state is not `halted` any more or another task could run. With
 * interrupts off no wake-up comes between the check and the halt, which switches them on in one step.
 */
void xbr_halt_while(const u32 *state, u32 halted)
{
	local_irq_disable();
#ifdef CONFIG_X86
	if (READ_ONCE(*state) == halted && !need_resched() && single_task_running()) {
		/* As in the idle task, no grace period waits for this processor. */
		rcu_momentary_eqs();
		safe_halt();
		return;
	}
#endif
	local_irq_enable();
}

/* Interrupts a processor that another one has seen halted, which only those of x86 do. */
void xbr_end_halt(unsigned int cpu)
{
#ifdef CONFIG_X86
	preempt_disable();
	/* None goes offline meanwhile. An interrupt of this processor has ended its halt already. */
	if (cpu != smp_processor_id() && cpu_online(cpu))
		smp_send_reschedule(cpu);
	preempt_enable();
#endif
}

unsigned long xbr_total_ram_pages(void)
{
	return totalram_pages();
}

/*
 * Parameters that can be written, or that change by themselves: those that Rust modules declare are
 * not in sysfs.
 */

static unsigned int domain_memory_mib = 256;
module_param(domain_memory_mib, uint, 0644);
MODULE_PARM_DESC(domain_memory_mib, "Memory in MiB for the disks of one guest (uint)");

static unsigned int host_memory_mib;
module_param(host_memory_mib, uint, 0644);
MODULE_PARM_DESC(host_memory_mib, "Memory in MiB for the disks of all guests (0: a quarter of this domain's memory) (uint)");

static bool feature_persistent = true;
module_param(feature_persistent, bool, 0644);
MODULE_PARM_DESC(feature_persistent, "Pages of guests that keep them granted stay mapped, of disks that connect from now on (bool)");

static unsigned int memory_kib;
module_param(memory_kib, uint, 0444);
MODULE_PARM_DESC(memory_kib, "Shows the memory in KiB that the disks of all guests have now (uint)");

unsigned int xbr_domain_memory_mib(void)
{
	return READ_ONCE(domain_memory_mib);
}

unsigned int xbr_host_memory_mib(void)
{
	return READ_ONCE(host_memory_mib);
}

unsigned int xbr_feature_persistent(void)
{
	return READ_ONCE(feature_persistent);
}

void xbr_set_memory_kib(unsigned int kib)
{
	WRITE_ONCE(memory_kib, kib);
}

void xbr_cond_resched(void)
{
	/* A busy thread may never sleep, which RCU tasks (tracing, BPF) would wait for. */
	cond_resched_tasks_rcu_qs();
}

void xbr_dev_err_ratelimited(struct device *dev, const char *text)
{
	dev_err_ratelimited(dev, "%s\n", text);
}

void xbr_dev_warn_ratelimited(struct device *dev, const char *text)
{
	dev_warn_ratelimited(dev, "%s\n", text);
}

void xbr_dev_info_ratelimited(struct device *dev, const char *text)
{
	dev_info_ratelimited(dev, "%s\n", text);
}

/* The sysfs attributes of a vbd, with the names of the C driver (xentop reads them). */

static xbr_attr_fn *attr_fn;

void xbr_set_attr_fn(xbr_attr_fn *fn)
{
	attr_fn = fn;
}

/* Counters first, in the order of blkback/src/totals.rs, which is where the index is looked up. */
#define XBR_STATS(STAT)								\
	STAT(oo_req) STAT(rd_req) STAT(wr_req) STAT(f_req) STAT(ds_req)		\
	STAT(rd_sect) STAT(wr_sect) STAT(refused) STAT(failed) STAT(mapped)	\
	STAT(passes) STAT(notified)						\
	STAT(rd_done) STAT(rd_ns) STAT(wr_done) STAT(wr_ns)			\
	STAT(f_done) STAT(f_ns) STAT(ds_done) STAT(ds_ns)			\
	STAT(page_wait_ns) STAT(pieces) STAT(ring_full)				\
	STAT(memory_kib) STAT(in_flight) STAT(oldest_ns) STAT(kept_pages)	\
	STAT(ring_slots)

#define XBR_STAT_INDEX(name) XBR_STAT_##name,
enum xbr_stat { XBR_STATS(XBR_STAT_INDEX) XBR_STAT_COUNT };
static_assert(XBR_STAT_COUNT <= XBR_ATTR_DEVICE);

#define XBR_STAT_SHOW(name)							\
static ssize_t name##_show(struct device *dev, struct device_attribute *attr,	\
			   char *buf)						\
{										\
	return sysfs_emit(buf, "%llu\n", attr_fn(dev, XBR_STAT_##name));	\
}										\
static DEVICE_ATTR_RO(name);

XBR_STATS(XBR_STAT_SHOW)

static ssize_t physical_device_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	dev_t number = attr_fn(dev, XBR_ATTR_DEVICE);

	return sysfs_emit(buf, "%x:%x\n", MAJOR(number), MINOR(number));
}
static DEVICE_ATTR_RO(physical_device);

static ssize_t mode_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", attr_fn(dev, XBR_ATTR_MODE) ? "w" : "r");
}
static DEVICE_ATTR_RO(mode);

#define XBR_STAT_ATTR(name) &dev_attr_##name.attr,
static struct attribute *stat_attrs[] = { XBR_STATS(XBR_STAT_ATTR) NULL };

static const struct attribute_group stat_group = {
	.name = "statistics",
	.attrs = stat_attrs,
};

static struct attribute *dev_attrs[] = {
	&dev_attr_physical_device.attr,
	&dev_attr_mode.attr,
	NULL
};

static const struct attribute_group dev_group = {
	.attrs = dev_attrs,
};

static const struct attribute_group *attr_groups[] = {
	&dev_group,
	&stat_group,
	NULL
};

const struct attribute_group **xbr_attr_groups(void)
{
	return attr_groups;
}

u32 xbr_mkdev(u32 major, u32 minor)
{
	return MKDEV(major, minor);
}

void *xbr_page_address(struct page *page)
{
	return page_address(page);
}

int xbr_page_count(const struct page *page)
{
	return page_count(page);
}

u32 xbr_iminor(const struct inode *inode)
{
	return iminor(inode);
}

u32 xbr_current_tgid(void)
{
	return task_tgid_vnr(current);
}
