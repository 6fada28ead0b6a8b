// SPDX-License-Identifier: GPL-2.0-only

//! What a device is told by those who work for it: its queues, and who serves its disk.

use kernel::sync::Arc;

/// A device as they see it. Nothing here sleeps or waits: the device notes it, and has its work look.
pub(crate) trait DeviceEvents: Send + Sync + 'static {
    /// Something has changed that the device can see for itself: how the disk is served, its size, or
    /// that a queue is through.
    fn reconcile(self: Arc<Self>);

    /// A disk that could not be had may be had now.
    fn disk_available(self: Arc<Self>);

    /// A queue found impossible indices in its ring, which it does not serve any more.
    fn ring_broken(self: Arc<Self>);
}
