// SPDX-License-Identifier: MIT OR Apache-2.0
//! The target from which a disk is served, in the syntax of a configuration: `aio:/srv/a.img`.

mod driver;
mod key;
mod memory;
mod rules;
mod sector;
mod shared;
mod words;

use crate::text::as_text;
use crate::{Export, Failure, GroupName, LeaseKind, Limits, Tls};
use driver::ArgumentKind;
pub use driver::Driver;
pub use memory::MemoryName;
pub use rules::SaidRules;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use words::Words;

/// Bytes of memory that a guest may fill by default.
const ROOM: u64 = 1 << 30;
/// Least bytes of memory: the tables of an empty image, and of some written data.
const LEAST_ROOM: u64 = 1 << 20;

/// Permitted bytes of memory for tables: enough for requests to proceed, and no more than is of use.
const CACHE: RangeInclusive<u64> = 1 << 20..=1 << 30;

/// A driver and what it serves. Written `DRIVER:ARGUMENT`, with `tap:` in front if one likes: `aio:/srv/a.img`,
/// `tap:aio:/srv/a.img`, `ram:64M`. Of an image that several hosts reach it can say first how they agree about who
/// writes it: `lease=record,aio:/srv/a.img`; and of a block device whether the kernel may serve it without the process:
/// `direct=no,aio:/dev/vg/a`. The guest's limits on a new disk for each second are further words:
/// `bps=20M,iops=500,aio:/srv/a.img`; so are the group of disks that share such limits,
/// `group=customer-7,aio:/srv/a.img`, the action on errors, `on-error=stop,aio:/srv/a.img`, and the memory that the
/// guest may fill if its writes go there: `room=2G,cow:qcow2:/srv/a.qcow2`. For an image with tables, it can set the
/// memory that holds them: `cache=64M,qcow2:/srv/a.qcow2`; and that backing images are read through the page cache,
/// which all images with the same backing image share: `below=cached,qcow2:/srv/a.qcow2`. And of an export over a
/// network, that it is encrypted, and who has signed the certificate of its server:
/// `tls-ca=/etc/xentap/ca.pem,nbd://host/a`. Of an image that is encrypted it says the file with the key:
/// `key=/etc/xentap/a.key,luks:/srv/a.img`. Of memory that several disks are to have it says the name:
/// `name=scratch,ram:64M`; and of a new disk that others may have the same at once, `shared=yes,aio:/srv/a.img`. The
/// size of the guest's logical sectors, if it is not that of the image or its storage: `sector-size=512,aio:/dev/vg/a`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Target {
    driver: Driver,
    argument: TargetArgument,
    lease: LeaseKind,
    /// The `direct=` word, if there is one.
    direct: Option<bool>,
    /// The words about the disk, if there are some.
    disk: Option<Box<OfDisk>>,
    /// The `room=` word: memory that a guest may fill.
    room: Option<u64>,
    /// The `cache=` word: memory for an image's tables.
    cache: Option<u64>,
    /// The `below=cached` word: backing images are read through the page cache.
    below_cached: bool,
    /// The `tls-*=` words: encryption of a connection.
    tls: Option<Tls>,
    /// The `key=` word: file with the key of an image.
    key: Option<Box<Path>>,
    /// The `name=` word: name of the memory that several disks share.
    name: Option<Box<MemoryName>>,
    /// The `shared=yes` word: other disks may have it at once.
    shared: bool,
    /// The `sector-size=` word: bytes of a logical sector.
    sector: Option<u32>,
}

/// Words about a new disk rather than about its image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct OfDisk {
    /// How much a guest may do.
    limits: Option<Limits>,
    /// With which others it shares limits.
    group: Option<GroupName>,
    /// Behaviour on errors and on processes that hang.
    rules: SaidRules,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum TargetArgument {
    Image(PathBuf),
    Size(u64),
    Export(Export),
    Below(Below),
}

/// The backing image of a disk that keeps its writes in memory. Its syntax is `DRIVER:IMAGE`, or the path alone of a
/// raw one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Below {
    /// Its driver, which [has an image](Driver::has_image).
    pub driver: Driver,
    /// Its absolute path.
    pub path: PathBuf,
}

impl Target {
    /// An image at an absolute path.
    pub fn image(driver: Driver, path: impl Into<PathBuf>) -> Result<Self, Failure> {
        let path = path.into();
        let text = path.to_str().ok_or_else(|| {
            Failure::invalid(format!(
                "the image's path {} is not UTF-8: rename it",
                path.display()
            ))
        })?;
        parse(driver, text)
    }

    /// A disk of `bytes` without an image.
    pub fn sized(driver: Driver, bytes: u64) -> Result<Self, Failure> {
        parse(driver, &bytes.to_string())
    }

    /// Parses the key `params` of a disk, from a toolstack. Beside the usual form that is a path alone, of which libxl
    /// has taken `file:` or `tap:aio:` away, and `aio:` in front of the usual form, which libxl adds where a
    /// configuration says `backendtype=tap`.
    pub fn from_params(text: &str) -> Result<Self, Failure> {
        if text.starts_with('/') {
            return parse(Driver::Aio, text);
        }
        match text.strip_prefix("aio:") {
            Some(rest) if !rest.starts_with('/') => rest.parse(),
            _ => text.parse(),
        }
    }

    /// The driver.
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// How hosts agree about who writes the image.
    pub fn lease(&self) -> &LeaseKind {
        &self.lease
    }

    /// Returns this target with another lease.
    ///
    /// # Errors
    /// There is no image, or none that this lease could be of.
    pub fn with_lease(self, lease: LeaseKind) -> Result<Self, Failure> {
        if lease != LeaseKind::Lock && !self.driver.has_image() {
            return Err(Failure::invalid(format!(
                "{self} has no image that other hosts could reach: remove lease={lease}"
            )));
        }
        if lease == LeaseKind::Reservation && self.driver != Driver::Aio {
            return Err(Failure::invalid(format!(
                "{self} is not a disk that a guest writes byte for byte and past the page cache, of which a reservation \
                 would be: use aio:, or lease=record"
            )));
        }
        // The kernel writes the cache back when the process has ended, and another host may have the lease then.
        if matches!(lease, LeaseKind::Sanlock(_)) && !self.driver.is_direct() {
            return Err(Failure::invalid(format!(
                "{self} uses the page cache, whose writes do not end when sanlock takes the lease away: use \
                 aio:, or lease=record"
            )));
        }
        Ok(Self { lease, ..self })
    }

    /// The kernel may serve the disk without the process, or not; nothing if that is not said.
    pub fn direct(&self) -> Option<bool> {
        self.direct
    }

    /// Returns this target with the `direct=` word.
    ///
    /// # Errors
    /// The kernel never serves disks of this driver.
    pub fn with_direct(self, direct: bool) -> Result<Self, Failure> {
        if !self.driver.may_map() {
            return Err(Failure::invalid(format!(
                "{self} is nothing that the kernel could serve without a process, which is aio:, \
                 qcow2:, qcow:, vhd: and vmdk:; remove direct="
            )));
        }
        Ok(Self {
            direct: Some(direct),
            ..self
        })
    }

    /// Returns this target with a limit of the memory that a guest may fill.
    ///
    /// # Errors
    /// The guest's writes are not in memory, or the limit is too small.
    pub fn with_room(self, room: u64) -> Result<Self, Failure> {
        if self.driver != Driver::Cow {
            return Err(Failure::invalid(format!(
                "{self} does not keep writes over an image in memory: remove room="
            )));
        }
        if room < LEAST_ROOM {
            return Err(Failure::invalid(format!(
                "room={room}: tables need some of it, so give 1M at least"
            )));
        }
        Ok(Self {
            room: Some(room),
            ..self
        })
    }

    /// Returns the most bytes of an image's tables that memory holds, if the target sets that.
    pub fn cache(&self) -> Option<u64> {
        self.cache
    }

    /// Returns this target with a size of the memory for tables.
    ///
    /// # Errors
    /// It has none, or that is too little to work with or more than a disk may have of the host.
    pub fn with_cache(self, cache: u64) -> Result<Self, Failure> {
        if !self.driver.has_tables() {
            return Err(Failure::invalid(format!(
                "{self} has no tables that memory could keep: remove cache="
            )));
        }
        if !CACHE.contains(&cache) {
            return Err(Failure::invalid(format!(
                "cache={cache}: give 1M to 1G of memory for tables; without it there are 32M"
            )));
        }
        Ok(Self {
            cache: Some(cache),
            ..self
        })
    }

    /// Whether backing images are read through the page cache, where other images find their data: always with `cow:`,
    /// for others with `below=cached`.
    pub fn caches_below(&self) -> bool {
        self.below_cached || self.driver == Driver::Cow
    }

    /// Returns this target with backing images read through the page cache.
    ///
    /// # Errors
    /// Its images have no backing images.
    pub fn with_cached_below(self) -> Result<Self, Failure> {
        if !self.driver.has_tables() {
            return Err(Failure::invalid(format!(
                "{self} has no image below it that the page cache could hold: remove below=cached"
            )));
        }
        Ok(Self {
            below_cached: true,
            ..self
        })
    }

    /// How the connection to the export's server is encrypted; nothing if it is not.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// Returns this target with encryption.
    ///
    /// # Errors
    /// It is no export over a network.
    pub fn with_tls(self, tls: Tls) -> Result<Self, Failure> {
        match self.export().map(Export::socket) {
            Some(None) => Ok(Self {
                tls: Some(tls),
                ..self
            }),
            Some(Some(_)) => Err(Failure::invalid(format!(
                "{self} is reached by a socket of this host, which needs no encryption: remove tls-ca= and the like"
            ))),
            None => Err(Failure::invalid(format!(
                "{self} is no export of a server, to which a connection could be encrypted: remove tls-ca= and \
                 its like"
            ))),
        }
    }

    /// Takes the guest's limits out of the target, because they belong to the disk and not to the image.
    pub fn take_limits(&mut self) -> Option<Limits> {
        self.take_of_disk(|said| said.limits.take())?
    }

    /// Takes the group out of the target, because it belongs to the disk, too.
    pub fn take_group(&mut self) -> Option<GroupName> {
        self.take_of_disk(|said| said.group.take())?
    }

    /// Takes a word about the disk out of the target. No part about the disk is left if that was the last one.
    fn take_of_disk<V>(&mut self, take: impl FnOnce(&mut OfDisk) -> V) -> Option<V> {
        let mut said = self.disk.take()?;
        let taken = take(&mut said);
        self.disk = (*said != OfDisk::default()).then_some(said);
        Some(taken)
    }

    /// Returns the group of the disk, if the target names one.
    pub fn group(&self) -> Option<&GroupName> {
        self.disk.as_ref()?.group.as_ref()
    }

    /// Returns the guest's limits, if the target has some.
    pub fn limits(&self) -> Option<&Limits> {
        self.disk.as_ref()?.limits.as_ref()
    }

    /// The image's absolute path, if the driver has one.
    pub fn path(&self) -> Option<&Path> {
        match &self.argument {
            TargetArgument::Image(path) => Some(path),
            TargetArgument::Size(_) | TargetArgument::Export(_) | TargetArgument::Below(_) => None,
        }
    }

    /// Returns the backing image that is never written, if the disk keeps its writes in memory.
    pub fn below(&self) -> Option<&Below> {
        match &self.argument {
            TargetArgument::Below(below) => Some(below),
            TargetArgument::Image(_) | TargetArgument::Size(_) | TargetArgument::Export(_) => None,
        }
    }

    /// Bytes of memory that such a disk may fill, with its tables.
    pub fn room(&self) -> u64 {
        self.room.unwrap_or(ROOM)
    }

    /// The export of an NBD server, if it is one.
    pub fn export(&self) -> Option<&Export> {
        match &self.argument {
            TargetArgument::Export(export) => Some(export),
            TargetArgument::Image(_) | TargetArgument::Size(_) | TargetArgument::Below(_) => None,
        }
    }

    /// Returns the disk's size in bytes, if the target has it and the image does not.
    pub fn size(&self) -> Option<u64> {
        match &self.argument {
            TargetArgument::Image(_) | TargetArgument::Export(_) | TargetArgument::Below(_) => None,
            TargetArgument::Size(bytes) => Some(*bytes),
        }
    }
}

fn parse(driver: Driver, argument: &str) -> Result<Target, Failure> {
    let argument = match driver.argument() {
        ArgumentKind::Image => {
            let path = PathBuf::from(argument);
            if !path.is_absolute() || argument.contains('\0') {
                return Err(Failure::invalid(format!(
                    "{driver}:{argument:?} names no image: its absolute path is needed, such as {driver}:/srv/a.img"
                )));
            }
            TargetArgument::Image(path)
        }
        ArgumentKind::Export => TargetArgument::Export(Export::parse(argument)?),
        ArgumentKind::Below => TargetArgument::Below(below(argument)?),
        ArgumentKind::Size => TargetArgument::Size(crate::size(argument).ok_or_else(|| {
            Failure::invalid(format!(
                "{driver}:{argument:?} has no size: say how many bytes, a multiple of 512, such as {driver}:64M"
            ))
        })?),
    };
    Ok(Target {
        driver,
        argument,
        lease: LeaseKind::default(),
        direct: None,
        disk: None,
        room: None,
        cache: None,
        below_cached: false,
        tls: None,
        key: None,
        name: None,
        shared: false,
        sector: None,
    })
}

fn below(argument: &str) -> Result<Below, Failure> {
    let (driver, path) = match argument.split_once(':') {
        Some((name, path)) if !argument.starts_with('/') => (name.parse()?, path),
        _ => (Driver::Aio, argument),
    };
    if !driver.has_image() {
        return Err(Failure::invalid(format!(
            "cow:{argument:?} names no image that could stay as it is: write cow:DRIVER:IMAGE with the driver of an \
             image, such as cow:qcow2:/srv/a.qcow2"
        )));
    }
    if driver == Driver::Luks {
        return Err(Failure::invalid(format!(
            "cow:{argument} keeps writes over an image in memory, where they would not be encrypted: decrypt \
             the image with qemu-img convert, or serve it with luks:"
        )));
    }
    match parse(driver, path)?.argument {
        TargetArgument::Image(path) => Ok(Below { driver, path }),
        _ => Err(Failure::invalid(format!("cow:{argument:?} names no image"))),
    }
}

/// The value of an option that is `yes` or `no`.
///
/// # Errors
/// It is neither.
pub fn yes_or_no(text: &str) -> Result<bool, Failure> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(Failure::invalid(format!("'{text}' is neither yes nor no"))),
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lease != LeaseKind::default() {
            write!(f, "lease={},", self.lease)?;
        }
        if let Some(direct) = self.direct {
            write!(f, "direct={},", if direct { "yes" } else { "no" })?;
        }
        if let Some(room) = self.room {
            write!(f, "room={room},")?;
        }
        if let Some(cache) = self.cache {
            write!(f, "cache={cache},")?;
        }
        if self.below_cached {
            f.write_str("below=cached,")?;
        }
        if let Some(size) = self.sector {
            write!(f, "sector-size={size},")?;
        }
        if let Some(key) = &self.key {
            write!(f, "key={},", key.display())?;
        }
        if let Some(tls) = &self.tls {
            tls.fmt(f)?;
        }
        if let Some(limits) = self.limits() {
            write!(f, "bps={},iops={},", limits.bytes, limits.requests)?;
        }
        if let Some(group) = self.group() {
            write!(f, "group={group},")?;
        }
        self.rules().fmt(f)?;
        if self.shared {
            f.write_str("shared=yes,")?;
        }
        if let Some(name) = &self.name {
            write!(f, "name={name},")?;
        }
        match &self.argument {
            TargetArgument::Image(path) => write!(f, "{}:{}", self.driver, path.display()),
            TargetArgument::Size(bytes) => write!(f, "{}:{bytes}", self.driver),
            TargetArgument::Export(export) => export.fmt(f),
            TargetArgument::Below(Below { driver, path }) => {
                write!(f, "{}:{driver}:{}", self.driver, path.display())
            }
        }
    }
}

impl FromStr for Target {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let mut words = Words::default();
        let rest = words.take(text)?;
        let (driver, argument) = rest.split_once(':').ok_or_else(|| {
            Failure::invalid(format!(
                "{text:?} does not say which driver serves it: write DRIVER:ARGUMENT, such as aio:/srv/a.img"
            ))
        })?;
        words.apply(parse(driver.parse()?, argument)?)
    }
}

as_text!(Target);

#[cfg(test)]
mod tests {
    use super::{Driver, Target};
    use crate::TlsFile;
    use std::path::Path;

    #[test]
    fn a_word_with_a_slip_is_told_with_the_one_that_is_meant() {
        let why = |text: &str| match text.parse::<Target>() {
            Err(failure) => failure.message,
            Ok(target) => panic!("{target}"),
        };
        let slip = why("bsp=20M,aio:/srv/a.img");
        assert!(
            slip.contains("has bsp= before the driver") && slip.contains("bps=?"),
            "{slip}"
        );
        let other = why("colour=red,aio:/srv/a.img");
        assert!(
            other.contains("colour=") && !other.contains("do you mean"),
            "{other}"
        );
        assert!(why("iso:/srv/a=b,c.img").contains("there is no driver 'iso'"));
        assert!("aio:/srv/a=b,c.img".parse::<Target>().is_ok());
    }

    #[test]
    fn the_ways_to_write_a_target() {
        let image: Target = "tap:aio:/srv/a:b.img".parse().unwrap();
        assert_eq!(image, "aio:/srv/a:b.img".parse().unwrap());
        assert_eq!(image, "file:/srv/a:b.img".parse().unwrap());
        assert_eq!(image.path(), Some(Path::new("/srv/a:b.img")));
        assert_eq!(image.driver(), Driver::Aio);
        assert_eq!(image.to_string(), "aio:/srv/a:b.img");
        let memory: Target = "ram:64M".parse().unwrap();
        assert_eq!(memory.size(), Some(64 << 20));
        assert_eq!(memory.to_string(), "ram:67108864");
    }

    #[test]
    fn the_ways_in_which_a_toolstack_writes_it() {
        for (params, target) in [
            ("/srv/a.img", "aio:/srv/a.img"),
            ("aio:/srv/a.img", "aio:/srv/a.img"),
            ("tap:aio:/srv/a.img", "aio:/srv/a.img"),
            ("aio:sync:/srv/a.img", "sync:/srv/a.img"),
            ("aio:tap:ram:1M", "ram:1048576"),
            ("ram:1M", "ram:1048576"),
            ("/srv/a:b", "aio:/srv/a:b"),
            // libxl's own word for `format=vhd,backendtype=tap`.
            ("vhd:/srv/a.vhd", "vhd:/srv/a.vhd"),
            ("aio:qcow2:/srv/a.qcow2", "qcow2:/srv/a.qcow2"),
            ("tap:vhdx:/srv/a.vhdx", "vhdx:/srv/a.vhdx"),
            ("tap:vmdk:/srv/a.vmdk", "vmdk:/srv/a.vmdk"),
            ("aio:nbd:host:99:exportname=a", "nbd://host:99/a"),
            ("nbd+unix:///a?socket=/run/s", "nbd+unix:///a?socket=/run/s"),
            ("tap:nbd:unix:/run/s", "nbd+unix:///?socket=/run/s"),
        ] {
            assert_eq!(Target::from_params(params).unwrap().to_string(), target);
        }
        for params in ["", "a.img", "aio:", "aio:a.img", "vdi:/a", "aio:aio:a"] {
            assert!(Target::from_params(params).is_err(), "{params:?}");
        }
    }

    #[test]
    fn names_of_drivers_are_read_as_they_are_written() {
        for &driver in Driver::ALL {
            assert_eq!(driver.name().parse(), Ok(driver));
            let text = serde_json::to_string(&driver).unwrap();
            assert_eq!(text, format!("\"{driver}\""));
            let argument = match driver {
                Driver::Nbd => "//host/a",
                Driver::Cow => "vhd:/srv/a",
                driver if driver.has_image() => "/srv/a",
                _ => "512",
            };
            let target: Target = format!("tap:{driver}:{argument}").parse().unwrap();
            assert_eq!(target.driver(), driver);
        }
        for (name, driver) in [
            ("file", Driver::Aio),
            ("raw", Driver::Aio),
            ("vpc", Driver::Vhd),
        ] {
            assert_eq!(name.parse(), Ok(driver));
        }
        let unknown = "vdi".parse::<Driver>().unwrap_err();
        assert!(unknown.message.contains("qcow2, qcow, vhd"), "{unknown}");
    }

    #[test]
    fn what_a_guest_may_do_is_said_before_the_driver() {
        let mut target: Target = "bps=20M,tap:iops=500,direct=no,aio:/srv/a".parse().unwrap();
        let text = "direct=no,bps=20971520,iops=500,aio:/srv/a";
        assert_eq!(target.to_string(), text);
        assert_eq!(text.parse(), Ok(target.clone()));
        let limits = target.take_limits().unwrap();
        assert_eq!((limits.bytes, limits.requests), (20 << 20, 500));
        assert_eq!(target, "direct=no,aio:/srv/a".parse().unwrap());
        let mut target: Target = "iops=500,group=all.7,aio:/srv/a".parse().unwrap();
        let text = "bps=0,iops=500,group=all.7,aio:/srv/a";
        assert_eq!(target.to_string(), text);
        assert_eq!(text.parse(), Ok(target.clone()));
        assert_eq!(target.take_group().unwrap().to_string(), "all.7");
        assert_eq!(target.group(), None);
        for wrong in [
            "group=,aio:/a",
            "group=none,aio:/a",
            "group=a,group=a,aio:/a",
            "bps=x,aio:/a",
            "bps=1K,aio:/a",
            "iops=1,aio:/a",
            "iops=-1,aio:/a",
            "bps=1M,bps=1M,aio:/a",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_image_stays_as_it_is_below_memory() {
        let target: Target = "room=2M,tap:cow:qcow2:/srv/a:b".parse().unwrap();
        let below = target.below().unwrap();
        assert_eq!((below.driver, target.room()), (Driver::Qcow2, 2 << 20));
        assert_eq!(below.path, Path::new("/srv/a:b"));
        assert_eq!(target.to_string(), "room=2097152,cow:qcow2:/srv/a:b");
        assert_eq!(target.to_string().parse(), Ok(target));
        let raw = Target::from_params("aio:cow:/srv/a:b").unwrap();
        assert_eq!(raw, "cow:file:/srv/a:b".parse().unwrap());
        assert_eq!((raw.path(), raw.size()), (None, None));
        assert_eq!(raw.room(), 1 << 30);
        for wrong in [
            "cow:",
            "cow:a.img",
            "cow:qcow2:a",
            "cow:ram:1M",
            "cow:cow:/a",
            "cow:nbd://host/a",
            "room=1K,cow:/a",
            "room=x,cow:/a",
            "room=2M,aio:/a",
            "room=2M,room=2M,cow:/a",
            "direct=yes,cow:/a",
            "lease=record,cow:/a",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn memory_for_tables_is_said_before_the_driver() {
        let target: Target = "cache=64M,direct=yes,qcow2:/srv/a".parse().unwrap();
        assert_eq!(target.cache(), Some(64 << 20));
        let text = "direct=yes,cache=67108864,qcow2:/srv/a";
        assert_eq!(target.to_string(), text);
        assert_eq!(text.parse(), Ok(target));
        let cow: Target = "cache=1M,cow:/srv/a".parse().unwrap();
        assert_eq!(cow.cache(), Some(1 << 20));
        for wrong in [
            "cache=512K,qcow2:/a",
            "cache=2G,qcow2:/a",
            "cache=64M,aio:/a",
            "cache=64M,nbd://host/a",
            "cache=x,vhd:/a",
            "cache=2M,cache=2M,vhd:/a",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn that_what_is_below_is_cached_is_said_before_the_driver() {
        for &driver in Driver::ALL {
            let argument = match driver {
                Driver::Nbd => "//host/a",
                Driver::Ram | Driver::Null => "512",
                _ => "/srv/a",
            };
            let text = format!("{driver}:{argument}");
            let plain: Target = text.parse().unwrap();
            assert_eq!(plain.caches_below(), driver == Driver::Cow);
            let said = format!("below=cached,{text}").parse::<Target>();
            match driver.has_tables() {
                true => assert!(said.unwrap().caches_below(), "{driver}"),
                false => {
                    let failure = said.unwrap_err();
                    assert!(failure.message.contains("remove below=cached"), "{failure}");
                }
            }
        }
        let target: Target = "below=cached,tap:cache=1M,vhd:/srv/a".parse().unwrap();
        let text = "cache=1048576,below=cached,vhd:/srv/a";
        assert_eq!(target.to_string(), text);
        assert_eq!(text.parse(), Ok(target));
        for wrong in [
            "below=,vhd:/a",
            "below=yes,vhd:/a",
            "below=cached,below=cached,vhd:/a",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn encryption_is_said_before_the_driver() {
        for text in [
            "tls-ca=/etc/ca.pem,nbd://host:10809/a",
            "tls-ca=/etc/ca.pem,tls-cert=/etc/c=1.pem,tls-key=/etc/k,nbd://host:10809/a",
            "tls-ca=/etc/ca.pem,bps=1048576,iops=0,nbd://host:10809/a",
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            assert_eq!(Target::from_params(&format!("aio:{text}")), Ok(target));
        }
        let target: Target = "tls-key=/k,tap:tls-ca=/a,tls-cert=/c,nbd:host"
            .parse()
            .unwrap();
        let tls = target.tls().unwrap();
        let paths = TlsFile::ALL.map(|file| tls.path(file).and_then(Path::to_str));
        assert_eq!(paths, [Some("/a"), Some("/c"), Some("/k")]);
        assert!(tls.has_own());
        // A plain target of this export.
        let plain: Target = "nbd:host".parse().unwrap();
        assert_eq!((plain.tls(), plain.export()), (None, target.export()));
        assert_ne!(plain, target);
        for (wrong, remedy) in [
            ("tls-ca=/a,aio:/a", "remove tls-ca="),
            ("tls-ca=/a,cow:/a", "remove tls-ca="),
            ("tls-ca=/a,nbd:unix:/run/s", "remove tls-ca="),
            ("tls-ca=a,nbd:host", "absolute path"),
            ("tls-ca=,nbd:host", "absolute path"),
            ("tls-ca=/a\n,nbd:host", "absolute path"),
            ("tls-ca=/a,tls-ca=/a,nbd:host", "twice"),
            ("tls-cert=/a,tls-key=/b,nbd:host", "tls-ca=FILE"),
            ("tls-ca=/a,tls-key=/b,nbd:host", "say both"),
            ("tls-ca=/a,tls-cert=/b,nbd:host", "say both"),
            ("tls-ca=/a", "ends after tls-ca="),
            ("nbds://host/a", "tls-ca="),
        ] {
            let failure = wrong.parse::<Target>().unwrap_err();
            assert!(failure.message.contains(remedy), "{wrong}: {failure}");
        }
    }

    #[test]
    fn a_lease_is_said_before_the_driver() {
        for text in [
            "lease=record,aio:/srv/a,b.img",
            "lease=record:/srv/leases/a,qcow2:/srv/a.qcow2",
            "lease=sanlock:vms:a:/srv/leases:1048576,qcow2:/srv/a.qcow2",
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            assert_eq!(format!("tap:{text}").parse(), Ok(target.clone()));
            assert_eq!(Target::from_params(&format!("aio:{text}")), Ok(target));
        }
        let plain: Target = "lease=lock,aio:/srv/a".parse().unwrap();
        assert_eq!(plain.to_string(), "aio:/srv/a");
        assert_eq!(plain.path(), Some(Path::new("/srv/a")));
        for text in [
            "lease=record",
            "lease=maybe,aio:/a",
            "lease=record,ram:1M",
            "lease=record,lease=lock,aio:/a",
            "lease=record,/srv/a",
            "lease=sanlock:vms:a:/srv/leases:0,sync:/a",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn that_the_kernel_may_serve_it_is_said_before_the_driver() {
        for (text, direct) in [
            ("aio:/dev/vg/a", None),
            ("direct=no,aio:/dev/vg/a", Some(false)),
            ("direct=yes,aio:/dev/vg/a=b,c", Some(true)),
            ("lease=record,direct=no,aio:/dev/vg/a", Some(false)),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.direct(), direct);
            assert_eq!(target.to_string(), text);
            assert_eq!(Target::from_params(&format!("aio:tap:{text}")), Ok(target));
        }
        let device: Target = "lease=record:/dev/san/l,phy:/dev/san/a".parse().unwrap();
        assert_eq!(device.to_string(), "lease=record:/dev/san/l,aio:/dev/san/a");
        let other: Target = "direct=no,lease=record,raw:/a".parse().unwrap();
        assert_eq!(other.to_string(), "lease=record,direct=no,aio:/a");
        for text in [
            "direct=no",
            "direct=maybe,aio:/a",
            "direct=,aio:/a",
            "direct=no,direct=no,aio:/a",
            "direct=no,sync:/a",
            "direct=no,ram:1M",
            "direct=no,/srv/a",
        ] {
            let error = text.parse::<Target>().unwrap_err();
            assert!(!error.message.is_empty(), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_target_is_refused() {
        for text in [
            "",
            "aio",
            "/srv/a.img",
            "aio:",
            "aio:a.img",
            "aio:/a\0b",
            "qcow3:/a",
            "ram:",
            "ram:M",
            "ram:0",
            "ram:513",
            "ram:+512",
            "ram:-1",
            "ram:16777216T",
            "tap:tap:aio:/a",
            "ram:5\u{e9}",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text:?}");
        }
    }
}
