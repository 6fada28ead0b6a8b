// SPDX-License-Identifier: GPL-2.0-only

//! Notifications to a device from its queues, and from the provider of its disk.

use kernel::sync::Arc;

/// A device, as its queues and its disk see it. No method sleeps or waits: the device records the event and schedules
/// its work.
pub(crate) trait DeviceEvents: Send + Sync + 'static {
    /// Reports a change that the device can see itself: how the disk is served, its size, or that a queue has ended.
    fn reconcile(self: Arc<Self>);

    /// Reports that a disk that could not be opened may be available now.
    fn disk_available(self: Arc<Self>);

    /// Reports that a queue found impossible indices in its ring and no longer serves it.
    fn ring_broken(self: Arc<Self>);
}
