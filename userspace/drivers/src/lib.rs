// SPDX-License-Identifier: MIT OR Apache-2.0
#![doc = include_str!("../README.md")]
#![doc = include_str!("../../../docs/contributing/write-a-driver.md")]
#![forbid(unsafe_code)]
// `eprintln!` panics if the reader of stderr is gone, `diskio::say!` does not.
#![deny(clippy::print_stderr)]

mod disk;
mod driver;
mod lock;
pub mod nbd;
mod open;
mod queued;

macro_rules! modules {
    ($($module:ident { $($rest:tt)* })*) => {
        $(mod $module;)*
    };
}

// The modules that the table of drivers names.
control::driver_table!(modules);

pub use disk::Disk;
pub use diskio::{Bytes, Data, Errno, File, Io, LockKind, LockPart};
pub use driver::{
    Attributes, Content, DirtyExtent, DiskInfo, Driver, DriverLimits, Extent, Fence, Holder,
    MappedExtent,
};
pub use lock::{lock, lock_part};
pub use null::Null;
pub use open::{activate, create, file, image, missing, open, open_on};
pub use queued::{PlaceHold, QueuedIo};
pub use ram::Ram;
pub use raw::{set_size, Raw};
