// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk, whatever its driver.

use crate::{Driver, Extent, Shape};
use control::Failure;
use diskio::{Data, Errno};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

type Later<'a, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + 'a>>;

/// [`Driver`] in a form that can be pointed to.
trait Any {
    fn activate(&self) -> Later<'_, Shape, Failure>;
    fn read(&self, offset: u64, data: Data) -> Later<'_, (), Errno>;
    fn write(&self, offset: u64, data: Data) -> Later<'_, (), Errno>;
    fn flush(&self) -> Later<'_, (), Errno>;
    fn discard(&self, offset: u64, len: u64) -> Later<'_, (), Errno>;
    fn write_zeroes(&self, offset: u64, len: u64) -> Later<'_, (), Errno>;
    fn map(&self, offset: u64, len: u64) -> Extent;
    fn resize(&self) -> Later<'_, u64, Failure>;
    fn stats(&self) -> BTreeMap<String, u64>;
    fn close(&self) -> Later<'_, (), Errno>;
}

impl<D: Driver> Any for D {
    fn activate(&self) -> Later<'_, Shape, Failure> {
        Box::pin(Driver::activate(self))
    }
    fn read(&self, offset: u64, data: Data) -> Later<'_, (), Errno> {
        Box::pin(Driver::read(self, offset, data))
    }
    fn write(&self, offset: u64, data: Data) -> Later<'_, (), Errno> {
        Box::pin(Driver::write(self, offset, data))
    }
    fn flush(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::flush(self))
    }
    fn discard(&self, offset: u64, len: u64) -> Later<'_, (), Errno> {
        Box::pin(Driver::discard(self, offset, len))
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> Later<'_, (), Errno> {
        Box::pin(Driver::write_zeroes(self, offset, len))
    }
    fn map(&self, offset: u64, len: u64) -> Extent {
        Driver::map(self, offset, len)
    }
    fn resize(&self) -> Later<'_, u64, Failure> {
        Box::pin(Driver::resize(self))
    }
    fn stats(&self) -> BTreeMap<String, u64> {
        Driver::stats(self)
    }
    fn close(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::close(self))
    }
}

/// A disk, whatever serves its content. Copies are the same disk. The calls are those of
/// [`Driver`].
#[derive(Clone)]
pub struct Disk(Rc<dyn Any>);

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}

impl Disk {
    /// The disk that `driver` serves.
    pub fn new(driver: impl Driver) -> Self {
        Self(Rc::new(driver))
    }

    /// See [`Driver::activate`].
    pub async fn activate(&self) -> Result<Shape, Failure> {
        self.0.activate().await
    }

    /// See [`Driver::read`].
    pub async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.0.read(offset, data).await
    }

    /// See [`Driver::write`].
    pub async fn write(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.0.write(offset, data).await
    }

    /// See [`Driver::flush`].
    pub async fn flush(&self) -> Result<(), Errno> {
        self.0.flush().await
    }

    /// See [`Driver::discard`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.0.discard(offset, len).await
    }

    /// See [`Driver::write_zeroes`].
    pub async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.0.write_zeroes(offset, len).await
    }

    /// See [`Driver::map`].
    pub fn map(&self, offset: u64, len: u64) -> Extent {
        self.0.map(offset, len)
    }

    /// See [`Driver::resize`].
    pub async fn resize(&self) -> Result<u64, Failure> {
        self.0.resize().await
    }

    /// See [`Driver::stats`].
    pub fn stats(&self) -> BTreeMap<String, u64> {
        self.0.stats()
    }

    /// See [`Driver::close`].
    pub async fn close(&self) -> Result<(), Errno> {
        self.0.close().await
    }
}
