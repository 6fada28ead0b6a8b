// SPDX-License-Identifier: MIT OR Apache-2.0
//! The drivers: one table with a line for each. Everything that knows all drivers is made of the table: the names in
//! configurations, the modules of `drivers`, and the model that judges them.

use crate::Failure;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Calls the macro `$then` with the table of drivers. A line has a description, the variant of [`Driver`], its name in a
/// configuration, and what it can do: a constant of `DriverTraits`. Lines are in groups by the module of `drivers`
/// that opens their disks.
#[macro_export]
macro_rules! driver_table {
    ($then:ident) => {
        $then! {
            raw {
                /// A raw file or block device, asynchronously and past the page cache.
                Aio "aio" RAW;
                /// A raw file on a file system that can do neither: one call after the other.
                Sync "sync" BUFFERED;
            }
            format {
                /// An image of the format qcow2.
                Qcow2 "qcow2" QCOW2;
                /// An image of the format qcow, which blktap and Xen's first tools made.
                Qcow "qcow" TABLES;
                /// An image of the format VHD.
                Vhd "vhd" TABLES;
                /// An image of the format VHDX, which is only read.
                Vhdx "vhdx" VHDX;
                /// An image of the format VMDK.
                Vmdk "vmdk" VMDK;
                /// A raw image, encrypted with LUKS.
                Luks "luks" LUKS;
                /// An image that stays as it is; what a guest writes is in memory, which ends with the disk.
                Cow "cow" COW;
            }
            export {
                /// An export of an NBD server.
                Nbd "nbd" EXPORT;
            }
            ram {
                /// Memory; its content ends with the disk, or with the last one of its [name](crate::MemoryName).
                Ram "ram" MEMORY;
            }
            null {
                /// Reads as zeroes and forgets writes, for measurements.
                Null "null" NOTHING;
            }
        }
    };
}

macro_rules! names {
    ($($module:ident { $($(#[$doc:meta])* $name:ident $text:literal $traits:ident;)* })*) => {
        /// The drivers that tapdisk has. The format of an image is always said, never guessed from its
        /// content: the guest writes the content.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Driver {
            $($($(#[$doc])* $name,)*)*
        }

        impl Driver {
            /// All of them.
            pub const ALL: &'static [Self] = &[$($(Self::$name,)*)*];

            /// The name in a configuration.
            pub fn name(self) -> &'static str {
                match self {
                    $($(Self::$name => $text,)*)*
                }
            }

            fn traits(self) -> DriverTraits {
                match self {
                    $($(Self::$name => DriverTraits::$traits,)*)*
                }
            }
        }
    };
}

driver_table!(names);

/// Text behind the name of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ArgumentKind {
    /// The path of an image.
    Image,
    /// A size.
    Size,
    /// An [`Export`](crate::Export).
    Export,
    /// A [`Below`](crate::Below).
    Below,
}

/// Abilities of a driver. A new one is [`HEADER`](Self::HEADER), or has a constant of its own here.
#[derive(Clone, Copy, Debug)]
struct DriverTraits {
    argument: ArgumentKind,
    has_memory: bool,
    has_format: bool,
    has_tables: bool,
    has_one_writer: bool,
    has_extents: bool,
    may_map: bool,
    may_have_key: bool,
    is_direct: bool,
}

impl DriverTraits {
    /// Zeroes: no image and no memory.
    const NOTHING: Self = Self {
        argument: ArgumentKind::Size,
        has_memory: false,
        has_format: false,
        has_tables: false,
        has_one_writer: false,
        has_extents: false,
        may_map: false,
        may_have_key: false,
        is_direct: false,
    };
    const MEMORY: Self = Self {
        has_memory: true,
        ..Self::NOTHING
    };
    /// A file through the page cache, byte for byte.
    const BUFFERED: Self = Self {
        argument: ArgumentKind::Image,
        ..Self::NOTHING
    };
    /// A file or device past the page cache, byte for byte.
    const RAW: Self = Self {
        is_direct: true,
        may_map: true,
        ..Self::BUFFERED
    };
    /// An image that is not the disk byte for byte, and about which its writer may keep state. Its driver is in `drivers`.
    #[allow(dead_code, reason = "for drivers that are added")]
    const HEADER: Self = Self {
        is_direct: true,
        has_one_writer: true,
        ..Self::BUFFERED
    };
    /// An image with tables, of the crate `formats`.
    const TABLES: Self = Self {
        has_format: true,
        has_tables: true,
        has_one_writer: true,
        ..Self::RAW
    };
    const QCOW2: Self = Self {
        has_extents: true,
        may_have_key: true,
        ..Self::TABLES
    };
    const VMDK: Self = Self {
        has_extents: true,
        ..Self::TABLES
    };
    const VHDX: Self = Self {
        may_map: false,
        ..Self::TABLES
    };
    const LUKS: Self = Self {
        has_tables: false,
        may_map: false,
        may_have_key: true,
        ..Self::TABLES
    };
    const EXPORT: Self = Self {
        argument: ArgumentKind::Export,
        has_one_writer: true,
        ..Self::NOTHING
    };
    const COW: Self = Self {
        argument: ArgumentKind::Below,
        has_tables: true,
        has_one_writer: true,
        ..Self::MEMORY
    };
}

impl Driver {
    pub(super) fn argument(self) -> ArgumentKind {
        self.traits().argument
    }

    /// True if the argument is the path of an image; otherwise it is a size, an [`Export`](crate::Export) or a
    /// [`Below`](crate::Below).
    pub fn has_image(self) -> bool {
        self.argument() == ArgumentKind::Image
    }

    /// Whether the guest's writes are in memory that the supervisor keeps, and that ends with the disk, or with the
    /// last of those that [have it by a name](crate::Target::name).
    pub fn has_memory(self) -> bool {
        self.traits().has_memory
    }

    /// The image is not the disk byte for byte, one process writes it, and the crate `formats` knows it by the driver's
    /// name.
    pub fn has_format(self) -> bool {
        self.traits().has_format
    }

    /// Reports whether the disk is made of tables, be they in an image or in memory.
    pub fn has_tables(self) -> bool {
        self.traits().has_tables
    }

    /// Whether its writer keeps state of its own about it, which another writer would not see: tables, or data that an
    /// export's server has not made durable yet.
    pub fn has_one_writer(self) -> bool {
        self.traits().has_one_writer
    }

    /// Whether an image may have content in further files, which the disk writes too.
    pub fn has_extents(self) -> bool {
        self.traits().has_extents
    }

    /// The kernel may do I/O on the image without its process, as far as that lets it: past the page cache, as all of
    /// that is.
    pub fn may_map(self) -> bool {
        self.traits().may_map
    }

    /// Its images may be encrypted.
    pub fn may_have_key(self) -> bool {
        self.traits().may_have_key
    }

    /// I/O on the image goes past the page cache where its file system can do that.
    pub fn is_direct(self) -> bool {
        self.traits().is_direct
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Driver {
    type Err = Failure;

    fn from_str(name: &str) -> Result<Self, Failure> {
        let name = match name {
            // Names of a raw file or device in configurations of xl and of blktap, and QEMU's name of a VHD.
            "file" | "raw" | "phy" => "aio",
            "vpc" => "vhd",
            // The address of a socket, see `Export`.
            "nbd+unix" => "nbd",
            "nbds" => {
                return Err(Failure::invalid(
                    "nbds: does not say whom to believe: write tls-ca=/etc/xentap/ca.pem,nbd://host/name with the \
                     certificate of the authority that has signed the server's",
                ))
            }
            name => name,
        };
        let mut all = Self::ALL.iter().copied();
        all.find(|driver| driver.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|driver| driver.name()).collect();
            Failure::invalid(format!(
                "there is no driver '{name}': use one of {}",
                known.join(", ")
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Driver;

    /// The abilities that the drivers had before there was a table.
    #[test]
    fn what_each_driver_can_do() {
        let row = |driver: Driver| {
            let traits = [
                (driver.has_image(), "image"),
                (driver.has_memory(), "memory"),
                (driver.has_format(), "format"),
                (driver.has_tables(), "tables"),
                (driver.has_one_writer(), "one writer"),
                (driver.has_extents(), "extents"),
                (driver.may_map(), "mapped"),
                (driver.may_have_key(), "key"),
                (driver.is_direct(), "direct"),
            ];
            let all = traits.iter().filter(|(is_so, _)| *is_so);
            let all: Vec<&str> = all.map(|(_, what)| *what).collect();
            format!("{driver}: {}", all.join(" "))
        };
        let rows: Vec<String> = Driver::ALL.iter().copied().map(row).collect();
        let expected = [
            "aio: image mapped direct",
            "sync: image",
            "qcow2: image format tables one writer extents mapped key direct",
            "qcow: image format tables one writer mapped direct",
            "vhd: image format tables one writer mapped direct",
            "vhdx: image format tables one writer direct",
            "vmdk: image format tables one writer extents mapped direct",
            "luks: image format one writer key direct",
            "cow: memory tables one writer",
            "nbd: one writer",
            "ram: memory",
            "null: ",
        ];
        for row in expected {
            assert!(rows.contains(&row.to_owned()), "{row}: {rows:#?}");
        }
    }
}
