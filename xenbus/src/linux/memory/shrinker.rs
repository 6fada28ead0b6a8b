// SPDX-License-Identifier: GPL-2.0-only

//! Frees memory on the kernel's request when it has too little (include/linux/shrinker.h).
//!
//! `shrinker_free` waits until no callback runs any more (mm/shrinker.c).
//!
//! Wraps `shrinker_alloc`, `shrinker_register` and `shrinker_free`.

use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::ffi::c_ulong;
use kernel::prelude::*;
use kernel::sync::Arc;

/// An owner of memory that can be freed. Both functions are called while memory is reclaimed: they do not sleep or
/// allocate, and take no lock under which other code allocates.
pub(crate) trait Shrink: Send + Sync + 'static {
    /// Returns the number of pages that could be freed.
    fn count(&self) -> usize;

    /// Frees about `pages` pages, and returns the number of pages that it freed.
    fn free(&self, pages: usize) -> usize;
}

/// A registration; dropping it waits for the callbacks.
///
/// # Invariants
///
/// The pointer is a shrinker whose private data is a reference to a `T`; this object is one of the owners of that `T`.
pub(crate) struct Shrinker<T: Shrink> {
    raw: NonNull<bindings::shrinker>,
    target: PhantomData<Arc<T>>,
}

// SAFETY: A shrinker may be freed from any thread.
unsafe impl<T: Shrink> Send for Shrinker<T> {}
// SAFETY: There is no method that takes `&self`.
unsafe impl<T: Shrink> Sync for Shrinker<T> {}

impl<T: Shrink> Shrinker<T> {
    /// Registers a shrinker. May sleep.
    pub(crate) fn new(name: &'static CStr, target: Arc<T>) -> Result<Self> {
        // SAFETY: The format takes one string, which is given.
        let raw = unsafe { bindings::shrinker_alloc(0, c"%s".as_char_ptr(), name.as_char_ptr()) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        // SAFETY: The shrinker is ours alone until it is registered.
        unsafe {
            (*raw.as_ptr()).count_objects = Some(count::<T>);
            (*raw.as_ptr()).scan_objects = Some(scan::<T>);
            (*raw.as_ptr()).private_data = Arc::into_raw(target).cast_mut().cast();
            bindings::shrinker_register(raw.as_ptr());
        }
        // INVARIANT: Just made so.
        Ok(Self {
            raw,
            target: PhantomData,
        })
    }
}

impl<T: Shrink> Drop for Shrinker<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, and no code changes the private data.
        let target = unsafe { (*self.raw.as_ptr()).private_data }.cast::<T>();
        // SAFETY: It is registered, and freed once. No callback runs after this.
        unsafe { bindings::shrinker_free(self.raw.as_ptr()) };
        // SAFETY: It comes from `Arc::into_raw`, and no code uses it any more.
        drop(unsafe { Arc::from_raw(target) });
    }
}

/// Result that the kernel reads as "nothing could be done".
const STOP: c_ulong = c_ulong::MAX;

/// Returns the number of pages that could be freed.
///
/// # Safety
///
/// For the kernel alone: `raw` is the shrinker of a `Shrinker<T>`.
unsafe extern "C" fn count<T: Shrink>(
    raw: *mut bindings::shrinker,
    _control: *mut bindings::shrink_control,
) -> c_ulong {
    // SAFETY: The private data is a `T` that lives until the shrinker is freed, which waits for us.
    let target = unsafe { &*(*raw).private_data.cast::<T>() };
    target.count() as c_ulong
}

/// Frees pages on the kernel's request.
///
/// # Safety
///
/// As for [`count`]; `control` is valid.
unsafe extern "C" fn scan<T: Shrink>(
    raw: *mut bindings::shrinker,
    control: *mut bindings::shrink_control,
) -> c_ulong {
    // SAFETY: As in `count`; the kernel passes a valid description of its request.
    let (target, pages) = unsafe { (&*(*raw).private_data.cast::<T>(), (*control).nr_to_scan) };
    match target.free(pages) {
        0 => STOP,
        freed => freed as c_ulong,
    }
}
