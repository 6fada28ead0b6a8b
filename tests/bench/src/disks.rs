// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What the disks stand on, and who serves them.

use crate::backends::{Driver, Store};
use crate::booted::SYSTEM_MIB;
use crate::sample::MKFS;
use crate::snapshots::{self, Layout};
use crate::{booted, sh};
use anyhow::Result;
use std::path::Path;

/// Room for the file of bonnie++ and what a file system needs beside it.
const SIZE_MIB: u32 = 256;
/// The same, and the tables of an image or the journal of a file system.
const IMAGE_MIB: u32 = SIZE_MIB + 128;
const SMALL_MIB: u32 = 8;
/// MiB of a disk of which there are clones: room for a small system and its file system. The rest of the device of images
/// is for what the clones write, 30 MiB or more each if they are 8, of which a boot needs some 10.
const GOLDEN_MIB: u32 = 64;
const NULL_BLK: &str = "/sys/kernel/config/nullb";
const WASTEFUL: &str = "/t/wasteful.ko";
const FILE: &str = "/dev/shm/bench.img";
/// Where a file system is mounted, and its file.
const MOUNT: &str = "/run/bench";
const MOUNTED: &str = "/run/bench/bench.img";
/// Where QEMU's NBD server listens, and its number.
const EXPORT: &str = "/run/bench.nbd";
const SERVER: &str = "/run/bench-nbd.pid";
/// What is below an image there.
const BELOW: &str = "/run/bench/below.img";
/// The key of what is encrypted.
const KEY: &str = "/run/bench.key";
/// Images in a chain, with the raw one at its end.
const CHAIN: u32 = 10;
/// What qemu-io is told.
const WRITES: &str = "/run/bench-writes";
/// The drivers that are compared, as modules.
const MODULES: [&str; 2] = ["xen_blkback_rs", "xen_blkback"];
/// The drivers must come and go when we say so, not when a disk appears.
const NO_ALIASES: &str = "blacklist xen-blkback\nblacklist xen-blkback-rs\n";

/// The stores, written full: a page that was never written would be cheaper to read.
#[derive(Debug)]
pub(crate) struct Stores {
    memory: String,
    of_loop: Option<String>,
    image: Option<String>,
    small: Vec<String>,
}

impl Stores {
    /// Makes what `wanted` asks for, and `small` small disks, the first `used` of them to be read; `cloned` if there
    /// will be clones.
    pub(crate) fn create(wanted: &[Store], small: u32, used: u32, cloned: bool) -> Result<Stores> {
        sh::run(&["modprobe", "null_blk", "nr_devices=0"])?;
        if !Path::new(NULL_BLK).exists() {
            sh::run(&["mount", "-t", "configfs", "none", "/sys/kernel/config"])?;
        }
        let memory = null_blk("bench", SIZE_MIB)?;
        fill(&memory, SIZE_MIB)?;
        let of_loop = if wanted.contains(&Store::Loop) {
            Some(loop_device()?)
        } else {
            None
        };
        let needs_none =
            |store: &Store| matches!(store, Store::Memory | Store::Loop | Store::Export);
        if cloned {
            // Now, because where the modules are is asked for before a job begins.
            sh::run(&["modprobe", "dm-snapshot"])?;
        }
        let image = match cloned || !wanted.iter().all(needs_none) {
            true => Some(null_blk("image", IMAGE_MIB)?),
            false => None,
        };
        let small = (0..small).map(|index| {
            let disk = null_blk(&format!("small{index}"), SMALL_MIB)?;
            if index < used {
                fill(&disk, SMALL_MIB)?;
            }
            Ok(disk)
        });
        Ok(Stores {
            memory,
            of_loop,
            image,
            small: small.collect::<Result<_>>()?,
        })
    }

    /// The device node of a store, or its file.
    pub(crate) fn path(&self, store: Store) -> &str {
        match store {
            Store::Memory => &self.memory,
            Store::Loop => self.of_loop.as_deref().unwrap_or("/dev/loop0"),
            Store::Image(_) | Store::New => self.image(),
            Store::File(_)
            | Store::FileOf(..)
            | Store::Clone(_)
            | Store::Sealed(_)
            | Store::Chain(_) => MOUNTED,
            Store::Export => EXPORT,
        }
    }

    /// The block device that has images and clones.
    pub(crate) fn image(&self) -> &str {
        self.image.as_deref().unwrap_or("/dev/image")
    }

    /// Makes a store what it is to hold, before it gets a guest.
    pub(crate) fn prepare(&self, store: Store) -> Result<()> {
        let image = self.image();
        end_server()?;
        match store {
            Store::Memory | Store::Loop => Ok(()),
            Store::Export => serve(&self.memory),
            Store::Image(format) => {
                release()?;
                convert(&self.memory, format, image)
            }
            Store::FileOf(kind, format) => {
                mount(kind, image)?;
                convert(&self.memory, format, MOUNTED)
            }
            Store::File(kind) => {
                mount(kind, image)?;
                copy(&self.memory, MOUNTED, SIZE_MIB)
            }
            Store::Clone(kind) => {
                self.put_below(kind, SIZE_MIB)?;
                put_over(MOUNTED)
            }
            Store::New => {
                release()?;
                let (size, new) = (format!("{SIZE_MIB}M"), ["qemu-img", "create", "-q"]);
                sh::run(&[&new[..], &["-f", "qcow2", image, &size]].concat()).map(drop)
            }
            Store::Sealed(kind) => {
                mount(kind, image)?;
                seal(&self.memory, MOUNTED)
            }
            Store::Chain(kind) => {
                mount(kind, image)?;
                chain()
            }
        }
    }

    /// So many disks that are clones of one with a system of `files` MiB, all on the device of images: new images over
    /// one file, or snapshots of one volume.
    pub(crate) fn clones(&self, store: Store, count: u32, files: u32) -> Result<Vec<String>> {
        release()?;
        end_server()?;
        booted::put_system(&self.memory, files, GOLDEN_MIB)?;
        if let Store::Clone(kind) = store {
            self.put_below(kind, GOLDEN_MIB)?;
            let clones = (0..count).map(|index| {
                let clone = format!("{MOUNT}/clone{index}.img");
                put_over(&clone)?;
                Ok(clone)
            });
            return clones.collect();
        }
        copy(&self.memory, self.image(), GOLDEN_MIB)?;
        let layout = Layout {
            count,
            golden: GOLDEN_MIB,
            all: IMAGE_MIB,
        };
        snapshots::create(self.image(), layout)
    }

    /// Makes a file of the first MiB of the disk for images to be over. dom0 has nothing of it in memory: who reads it
    /// through the page cache is to find it there only if somebody read it before.
    fn put_below(&self, kind: &str, mib: u32) -> Result<()> {
        mount(kind, self.image())?;
        copy(&self.memory, BELOW, mib)?;
        sh::run(&["chmod", "a-w", BELOW])?;
        // So dd drops what the page cache has of a file.
        let from = format!("if={BELOW}");
        sh::run(&["dd", &from, "iflag=nocache", "count=0", "status=none"]).map(drop)
    }

    /// Makes the disk one that a system boots from, on all stores that are prepared after this.
    pub(crate) fn put_system(&self) -> Result<()> {
        release()?;
        booted::put_system(&self.memory, SYSTEM_MIB, SIZE_MIB)?;
        match &self.of_loop {
            Some(_) => copy(&self.memory, FILE, SIZE_MIB),
            None => Ok(()),
        }
    }

    /// The device nodes of the small disks.
    pub(crate) fn small(&self) -> &[String] {
        &self.small
    }
}

/// Makes a block device in memory. Since Linux 6.11 it bears the name of its directory.
fn null_blk(name: &str, mib: u32) -> Result<String> {
    let dir = Path::new(NULL_BLK).join(name);
    std::fs::create_dir(&dir)?;
    sh::put(dir.join("size"), &mib.to_string())?;
    sh::put(dir.join("memory_backed"), "1")?;
    sh::put(dir.join("power"), "1")?;
    let node = format!("/dev/{name}");
    sh::wait_for("the device node of null_blk", || {
        Ok(Path::new(&node).exists())
    })?;
    Ok(node)
}

/// The one before may have had a file system or clones there.
fn release() -> Result<()> {
    sh::shell(&format!("! mountpoint -q {MOUNT} || umount {MOUNT}"))?;
    snapshots::remove()
}

/// Makes a file system of a device, and mounts it.
fn mount(kind: &str, device: &str) -> Result<()> {
    release()?;
    sh::run(&["wipefs", "--quiet", "--all", device])?;
    sh::shell(&match kind {
        "ext4" => format!("{MKFS} {device}"),
        _ => format!("mkfs.{kind} -q {device}"),
    })?;
    std::fs::create_dir_all(MOUNT)?;
    sh::run(&["mount", device, MOUNT]).map(drop)
}

/// Writes all that a disk has to an image.
fn convert(disk: &str, format: &str, image: &str) -> Result<()> {
    // Without looking for zeroes: all of it is written.
    let convert = ["qemu-img", "convert", "-S", "0", "-f", "raw", "-O", format];
    sh::run(&[&convert[..], &[disk, image]].concat()).map(drop)
}

/// Writes all that a disk has to an image that is encrypted, whose key is made anew.
fn seal(disk: &str, image: &str) -> Result<()> {
    sh::shell(&format!(
        "umask 077; head -c 32 /dev/urandom | base64 -w 0 > {KEY}"
    ))?;
    let key = format!("secret,id=s,file={KEY}");
    // A key that takes long to try costs at the attach only.
    let options = "key-secret=s,iter-time=10";
    let size = format!("{SIZE_MIB}M");
    let create = ["qemu-img", "create", "-q", "--object", &key, "-f", "luks"];
    sh::run(&[&create[..], &["-o", options, image, &size]].concat())?;
    let target = format!("driver=luks,key-secret=s,file.filename={image}");
    let convert = ["qemu-img", "convert", "-n", "-S", "0", "--object", &key];
    let source = ["-f", "raw", disk, "--target-image-opts", &target];
    sh::run(&[&convert[..], &source].concat()).map(drop)
}

/// Makes a chain of images that have the disk together: of each [`CHAIN`] clusters one is in each image.
fn chain() -> Result<()> {
    let mut below = (BELOW.to_owned(), "raw");
    sh::run(&["truncate", "--size", &format!("{SIZE_MIB}M"), BELOW])?;
    write_tenth(&below, 0)?;
    for number in 1..CHAIN {
        sh::run(&["chmod", "a-w", &below.0])?;
        let path = match number + 1 {
            CHAIN => MOUNTED.to_owned(),
            _ => format!("{MOUNT}/{number}.qcow2"),
        };
        let over = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", below.1];
        sh::run(&[&over[..], &["-b", &below.0, &path]].concat())?;
        below = (path, "qcow2");
        write_tenth(&below, number)?;
    }
    Ok(())
}

/// Writes those clusters of a disk that its image number `number` is to have.
fn write_tenth(image: &(String, &str), number: u32) -> Result<()> {
    let clusters = (number..SIZE_MIB * 16).step_by(CHAIN as usize);
    let writes = clusters.map(|cluster| format!("write -q {}k 64k\n", cluster * 64));
    std::fs::write(WRITES, writes.collect::<String>())?;
    let (path, format) = image;
    sh::shell(&format!("qemu-io -t none -f {format} {path} < {WRITES}")).map(drop)
}

/// Exports a disk by QEMU's server, past dom0's page cache.
fn serve(disk: &str) -> Result<()> {
    let server = [
        "qemu-nbd",
        "--fork",
        "--persistent",
        "--format=raw",
        "--cache=none",
        "--export-name=disk",
    ];
    let place = ["--socket", EXPORT, "--pid-file", SERVER, disk];
    sh::run(&[&server[..], &place].concat()).map(drop)
}

/// Ends the server, if there is one, and waits for its end.
fn end_server() -> Result<()> {
    let Ok(pid) = std::fs::read_to_string(SERVER) else {
        return Ok(());
    };
    let process = Path::new("/proc").join(pid.trim());
    sh::run(&["kill", pid.trim()])?;
    sh::wait_for("the end of qemu-nbd", || Ok(!process.exists()))?;
    Ok(std::fs::remove_file(SERVER)?)
}

/// Makes a new image over that file.
fn put_over(image: &str) -> Result<()> {
    let over = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"];
    sh::run(&[&over[..], &["-b", BELOW, image]].concat()).map(drop)
}

/// Writes what a disk begins with to a file or device, which gets a place for all of it.
fn copy(disk: &str, file: &str, mib: u32) -> Result<()> {
    let (from, to, count) = (
        format!("if={disk}"),
        format!("of={file}"),
        format!("count={mib}"),
    );
    let words = [
        "dd",
        &from,
        &to,
        &count,
        "bs=1M",
        "iflag=direct",
        "conv=notrunc,fsync",
        "status=none",
    ];
    sh::run(&words).map(drop)
}

fn loop_device() -> Result<String> {
    sh::run(&["modprobe", "loop"])?;
    fill_with(FILE, SIZE_MIB, &[])?;
    Ok(sh::run(&["losetup", "--find", "--show", FILE])?
        .trim()
        .to_owned())
}

fn fill(device: &str, mib: u32) -> Result<()> {
    fill_with(device, mib, &["oflag=direct"])
}

fn fill_with(path: &str, mib: u32, more: &[&str]) -> Result<()> {
    let (out, count) = (format!("of={path}"), format!("count={mib}"));
    let mut words = vec!["dd", "if=/dev/zero", &out, "bs=1M", &count, "status=none"];
    words.extend(more);
    sh::run(&words).map(drop)
}

/// Which driver is loaded.
#[derive(Debug)]
pub(crate) struct Drivers {
    ours: String,
    loaded: Driver,
}

impl Drivers {
    /// Nothing may be loaded yet: the machine boots with `noblkback`.
    pub(crate) fn new(ours: &str) -> Result<Drivers> {
        std::fs::create_dir_all("/etc/modprobe.d")?;
        sh::put("/etc/modprobe.d/bench.conf", NO_ALIASES)?;
        Ok(Drivers {
            ours: ours.to_owned(),
            loaded: Driver::None,
        })
    }

    /// Puts `wanted` in place of what was there. No disk may be attached.
    pub(crate) fn switch(&mut self, wanted: Driver) -> Result<()> {
        if self.loaded == wanted {
            return Ok(());
        }
        self.unload()?;
        let name = match wanted {
            Driver::Ours | Driver::Wasteful => {
                let file = match wanted {
                    Driver::Wasteful => WASTEFUL,
                    _ => &self.ours,
                };
                sh::run(&["insmod", file])?;
                "xen-blkback-rs"
            }
            Driver::C(parameter) => {
                sh::run(&["modprobe", "xen-blkback", parameter])?;
                "vbd"
            }
            Driver::None => return Ok(()),
        };
        self.loaded = wanted;
        let dir = Path::new("/sys/bus/xen-backend/drivers").join(name);
        sh::wait_for("the registration of the driver", || Ok(dir.exists()))
    }

    /// Takes the driver away: the next one sees how many processors there are now.
    pub(crate) fn unload(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.loaded, Driver::None) {
            Driver::Ours | Driver::Wasteful => sh::run(&["rmmod", "xen_blkback_rs"])?,
            Driver::C(_) => sh::run(&["rmmod", "xen_blkback"])?,
            Driver::None => String::new(),
        };
        Ok(())
    }

    /// The functions of the modules of [`MODULES`] and where they are.
    pub(crate) fn functions() -> Result<Vec<(String, String)>> {
        let text = sh::get("/proc/kallsyms")?;
        Ok(text.lines().filter_map(function).collect())
    }

    /// The modules of dom0 and where their text begins.
    pub(crate) fn places() -> Result<Vec<(String, String)>> {
        let text = sh::get("/proc/modules")?;
        Ok(text.lines().filter_map(place).collect())
    }
}

/// `NAME SIZE USES DEPENDENTS STATE ADDRESS`
fn place(line: &str) -> Option<(String, String)> {
    let mut words = line.split_whitespace();
    let name = words.next()?.to_owned();
    let address = words.nth(4)?.trim_start_matches("0x").to_owned();
    Some((name, address))
}

/// `ADDRESS TYPE NAME\t[MODULE]`
fn function(line: &str) -> Option<(String, String)> {
    let (symbol, module) = line.split_once("\t[")?;
    if !MODULES.contains(&module.trim_end_matches(']')) {
        return None;
    }
    let mut words = symbol.split_whitespace();
    let (address, kind, name) = (words.next()?, words.next()?, words.next()?);
    kind.eq_ignore_ascii_case("t")
        .then(|| (name.to_owned(), address.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{function, place};

    #[test]
    fn function_of_a_driver() {
        let line = "ffffffffc0a11010 t submit\t[xen_blkback_rs]";
        let found = function(line).unwrap();
        assert_eq!(found, ("submit".into(), "ffffffffc0a11010".into()));
        assert_eq!(function("ffffffffc0a11010 t submit\t[null_blk]"), None);
        assert_eq!(function("ffffffffc0a11010 d data\t[xen_blkback_rs]"), None);
        assert_eq!(function("ffffffff81000000 T _text"), None);
    }

    #[test]
    fn place_of_a_module() {
        let line = "null_blk 98304 1 - Live 0xffffffffc0a11000 (E)";
        let found = place(line).unwrap();
        assert_eq!(found, ("null_blk".into(), "ffffffffc0a11000".into()));
    }
}
